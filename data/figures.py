"""
Tables, heat maps and plots that several scripts draw, and the files that they stand in.
"""
import csv
import json
import math
import os
from contextlib import suppress

import numpy as np

from data.runtime import fail


def pyplot(file):
    """matplotlib.pyplot, drawing to files; fails if it is not installed or FILE cannot be a figure."""
    try:
        import matplotlib
    except ImportError:
        fail('--plot needs matplotlib: pip install matplotlib')
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    ending = os.path.splitext(file)[1][1:]
    if ending not in plt.figure().canvas.get_supported_filetypes() or not os.path.isdir(os.path.dirname(file) or '.'):
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
        fail(f'{file} cannot be written ({e.strerror}): free some space or choose another --out; '
             'what was written before is intact')


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
    lengths = [int(config.block_size * times) for times in (0.5, 1, 1.5, 2, 3, 4, 6, 8)]
    if config.pe == 'learned':
        lengths = [n for n in lengths if n <= config.block_size]
    return lengths


# ---------------------------------------------------------------------------------------------------------------------
# passkey: accuracy by length and depth

def accuracy(rows, length, depth=None):
    """Mean of the rows of a csv at this length (and depth)."""
    hits = [r['accuracy'] for r in rows if r['length'] == length and depth in (None, r['depth'])]
    return float(np.mean(hits))


def heat_map(rows, block_size):
    """Rows of the csv -> text: depths down, lengths across, a bar where the training length ends."""
    lengths = sorted({r['length'] for r in rows})
    depths = sorted({r['depth'] for r in rows})
    inside = [n for n in lengths if n <= block_size]

    def line(head, cells):
        text = f'{head:>7} '
        for n, cell in zip(lengths, cells):
            text += f'{cell:>6}' + (' |' if inside and n == inside[-1] else '  ')
        return text

    def shade(share):
        return '.' if share == 0 else '░▒▓██'[int(share * 4)] * 4

    lines = [line('length', map(str, lengths)), line('', [f'{n / block_size:g}x' for n in lengths])]
    for depth in depths:
        lines.append(line(f'{depth:.0%}', [shade(accuracy(rows, n, depth)) for n in lengths]))
    lines.append(line('mean', [f'{accuracy(rows, n):.0%}' for n in lengths]))
    lines.append(f'        depth down; | = training length {block_size}')
    return '\n'.join(lines)


def draw(ax, rows, block_size, title):
    """The heat map on an axis of matplotlib."""
    lengths = sorted({r['length'] for r in rows})
    depths = sorted({r['depth'] for r in rows})
    grid = [[accuracy(rows, n, depth) for n in lengths] for depth in depths]
    ax.imshow(grid, cmap='RdYlGn', vmin=0, vmax=1, aspect='auto')
    ax.axvline(sum(n <= block_size for n in lengths) - 0.5, color='black', linestyle='--')
    ax.set(title=title, xlabel='length / training length (dashed)', ylabel='depth of the key')
    ax.set_xticks(range(len(lengths)), [f'{n / block_size:g}' for n in lengths])
    ax.set_yticks(range(len(depths)), [f'{depth:.0%}' for depth in depths])


# ---------------------------------------------------------------------------------------------------------------------
# perplexity and entropy; results: {name: (rows of its ppl.csv, rows of its entropy.csv)}

def entropy_by_position(rows):
    """-> {position: the entropies of all heads}."""
    found = {}
    for r in rows:
        found.setdefault(r['position'], []).append(r['entropy'])
    return found


def extension_tables(results, block_size, rule=None):
    """
    A table of perplexity by length and one of entropy by position, as text, as far as there are rows. rule: by which
    each length has tokens of its own; None where they are the same at every length.
    """
    ppl = {name: rows for name, (rows, _) in results.items() if rows}
    entropy = {name: entropy_by_position(rows) for name, (_, rows) in results.items() if rows}
    lines = []
    if ppl:
        lines += perplexity_table(ppl, block_size, rule)
    if entropy:
        lines += entropy_table(entropy, block_size)
    return '\n'.join(lines)


def perplexity_table(results, block_size, rule):
    """results: {name: rows of its ppl.csv}"""
    ppl = list(results.values())
    scored = [f'{r["tokens"]:,} tokens of {r["docs"]} documents' for r in ppl[0]]
    where = f'{rule}: other tokens at each length' if rule else f'the same {scored[0]} at every length'
    lines = [f'\nperplexity: windows of the length named, stride {ppl[0][0]["stride"]}, {where}',
             '  length          ' + ''.join(f'{name:>18}' for name in results)]
    for i, r in enumerate(ppl[0]):
        cells = ''.join(f'{rows[i]["ppl"]:>18.3f}' for rows in ppl)
        lines.append(f'{r["length"]:>8} {r["length"] / block_size:>5g}x   {cells}')
        if rule:
            lines[-1] += f'   {scored[i]}'
    return lines


def entropy_table(results, block_size):
    """results: {name: {position: the entropies of all heads}}"""
    lines = ['\nattention entropy in nats, mean over heads (least to most diffuse head)',
             ' to position      ' + ''.join(f'{name:>22}' for name in results) + '      uniform attention']
    by_position = list(results.values())
    for position in sorted(by_position[0])[3::4]:    # every fourth band
        cells = ''
        for found in by_position:
            values = found[position]
            text = f'{sum(values) / len(values):.2f} ({min(values):.2f} to {max(values):.2f})'
            cells += f'{text:>22}'
        lines.append(f'{position:>8} {position / block_size:>5g}x   {cells}{math.log(position):>23.2f}')
    return lines


def plot_extension(results, grid, title, block_size, file):
    """grid (n_layer, n_head): the temperatures, or their slopes."""
    fig, (left, middle, right) = pyplot(file).subplots(1, 3, figsize=(14, 4), layout='constrained')
    for name, (ppl, entropy) in results.items():     # --measure may have left one of them out
        left.plot([r['length'] for r in ppl], [r['ppl'] for r in ppl], marker='o', label=name)
        found = entropy_by_position(entropy)
        middle.plot(list(found), [sum(v) / len(v) for v in found.values()], label=name)
    left.set(xlabel='length', ylabel='perplexity', xscale='log', yscale='log')
    middle.set(xlabel='position', ylabel='attention entropy (nats)', xscale='log')
    for ax in left, middle:
        ax.axvline(block_size, color='black', linestyle='--', linewidth=1)
        ax.legend()
    fig.colorbar(right.imshow(grid.numpy(), cmap='viridis', aspect='auto'), ax=right)
    right.set(xlabel='head', ylabel='layer', title=title)
    fig.savefig(file, dpi=150)
