"""
Tables, heat maps and plots that several scripts draw, and the files that they stand in.
"""
import csv
import json
import os
from contextlib import suppress

from data.runtime import fail


def pyplot(file):
    """matplotlib.pyplot, drawing to files; fails if it is not installed or FILE cannot be a figure."""
    try:
        import matplotlib
    except ImportError:
        fail('--plot needs matplotlib: pip install matplotlib')
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    if os.path.splitext(file)[1][1:] not in plt.figure().canvas.get_supported_filetypes() or not os.path.isdir(os.path.dirname(file) or '.'):
        fail(f'--plot {file}: a file name like figure.png, in a folder that exists')
    plt.close('all')
    return plt


def write_csv(file, rows):
    """rows: dicts with the same keys."""
    def write(f):
        w = csv.DictWriter(f, rows[0])
        w.writeheader()
        w.writerows(rows)
    write_result(file, write)


def write_json(file, value):
    write_result(file, lambda f: json.dump(value, f))


def write_result(file, write):
    """write(f) fills it; whole or not at all, and one line if it cannot be written."""
    try:
        with open(f'{file}.tmp', 'w', newline='') as f:
            write(f)
        os.replace(f'{file}.tmp', file)
    except OSError as e:
        with suppress(OSError):
            os.remove(f'{file}.tmp')
        fail(f'{file} cannot be written ({e.strerror}): free some space or choose another --out; what was written before is intact')


def read_csv(file):
    """-> its rows as dicts of text; none if there is no such file."""
    if not os.path.exists(file):
        return []
    with open(file, newline='') as f:
        return list(csv.DictReader(f))


def read_json(file):
    """-> its value, or None if there is no such file or it is damaged."""
    try:
        with open(file) as f:
            return json.load(f)
    except (OSError, ValueError):
        return None


def default_lengths(config):
    """1/2 1 1.5 2 3 4 6 8 times the training length, as far as the encoding is defined."""
    return [n for n in (int(config.block_size * s) for s in (0.5, 1, 1.5, 2, 3, 4, 6, 8)) if config.pe != 'learned' or n <= config.block_size]
