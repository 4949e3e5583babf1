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
    ending = os.path.splitext(file)[1].removeprefix('.')
    folder = os.path.dirname(file) or '.'
    known = plt.figure().canvas.get_supported_filetypes()
    if ending not in known or not os.path.isdir(folder):
        fail(f'--plot {file}: a file name like figure.png, in a folder that exists')
    plt.close('all')
    return plt


def write_csv(file, rows):
    """rows: dicts with the same keys."""
    def write(f):
        table = csv.DictWriter(f, rows[0])
        table.writeheader()
        table.writerows(rows)
    write_result(file, write)


def write_json(file, value):
    def write(f):
        json.dump(value, f)
    write_result(file, write)


def write_result(file, write):
    """write(f) fills a temporary file, which is then renamed. Ends the program with one line if that cannot be done."""
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
    lengths = []
    for times in (0.5, 1, 1.5, 2, 3, 4, 6, 8):
        length = int(config.block_size * times)
        if config.pe != 'learned' or length <= config.block_size:    # a learned table ends there
            lengths.append(length)
    return lengths


def multiples(lengths, block_size, unit=''):
    """Labels for lengths, as multiples of the training length: '0.5', '1', '2', each with the unit after it."""
    return [f'{n / block_size:g}{unit}' for n in lengths]


# ---------------------------------------------------------------------------------------------------------------------
# passkey: accuracy by length and depth

def accuracy(rows, length, depth=None):
    """Mean of the rows of a csv at this length (and depth)."""
    hits = []
    for row in rows:
        if row['length'] == length and (depth is None or row['depth'] == depth):
            hits.append(row['accuracy'])
    return float(np.mean(hits))


def lengths_and_depths(rows):
    """What the rows of a csv were measured at, in order: across and down a heat map."""
    lengths = {row['length'] for row in rows}
    depths = {row['depth'] for row in rows}
    return sorted(lengths), sorted(depths)


def shade(share):
    """A cell of the heat map as text: full if every key was found, else the darker the more were; a dot for none."""
    if share == 0:
        return '.'
    third = int(3 * share)                           # 3 only where every key was found
    return '░▒▓█'[third] * 4


def heat_map(rows, block_size):
    """Rows of the csv -> text: depths down, lengths across, a bar where the training length ends."""
    lengths, depths = lengths_and_depths(rows)
    trained = [n for n in lengths if n <= block_size]
    last_trained = max(trained, default=None)

    def line(head, cells):
        text = f'{head:>7} '
        for n, cell in zip(lengths, cells):
            text += f'{cell:>6}'
            text += ' |' if n == last_trained else '  '
        return text

    lines = [line('length', lengths), line('', multiples(lengths, block_size, 'x'))]
    for depth in depths:
        cells = [shade(accuracy(rows, n, depth)) for n in lengths]
        lines.append(line(f'{depth:.0%}', cells))
    means = [f'{accuracy(rows, n):.0%}' for n in lengths]
    lines.append(line('mean', means))
    lines.append(f'        depth down; | = training length {block_size}')
    return '\n'.join(lines)


def draw(ax, rows, block_size, title):
    """The heat map on an axis of matplotlib."""
    lengths, depths = lengths_and_depths(rows)
    grid = np.empty((len(depths), len(lengths)))
    for i, depth in enumerate(depths):
        for j, n in enumerate(lengths):
            grid[i, j] = accuracy(rows, n, depth)
    ax.imshow(grid, cmap='RdYlGn', vmin=0, vmax=1, aspect='auto')
    trained = [n for n in lengths if n <= block_size]
    ax.axvline(len(trained) - 0.5, color='black', linestyle='--')        # between two columns of cells
    ax.set(title=title, xlabel='length / training length (dashed)', ylabel='depth of the key')
    ax.set_xticks(range(len(lengths)), multiples(lengths, block_size))
    ax.set_yticks(range(len(depths)), [f'{depth:.0%}' for depth in depths])


# ---------------------------------------------------------------------------------------------------------------------
# perplexity and entropy; results: {name: (rows of its ppl.csv, rows of its entropy.csv)}

def entropy_by_position(rows):
    """-> {position: the entropies of all heads}."""
    found = {}
    for row in rows:
        found.setdefault(row['position'], []).append(row['entropy'])
    return found


def extension_tables(results, block_size, rule=None):
    """
    A table of perplexity by length and one of entropy by position, as text, as far as there are rows. rule: by which
    each length has tokens of its own; None where they are the same at every length.
    """
    ppl, entropy = {}, {}
    for name, (ppl_rows, entropy_rows) in results.items():
        if ppl_rows:
            ppl[name] = ppl_rows
        if entropy_rows:
            entropy[name] = entropy_by_position(entropy_rows)
    lines = []
    if ppl:
        lines += perplexity_table(ppl, block_size, rule)
    if entropy:
        lines += entropy_table(entropy, block_size)
    return '\n'.join(lines)


def perplexity_table(results, block_size, rule):
    """results: {name: rows of its ppl.csv}"""
    def scored(row):
        return f'{row["tokens"]:,} tokens of {row["docs"]} documents'

    first = next(iter(results.values()))             # what was scored is the same for every name
    where = f'the same {scored(first[0])} at every length'
    if rule:
        where = f'{rule}: other tokens at each length'
    names = ''.join(f'{name:>22}' for name in results)
    lines = [f'\nperplexity: windows of the length named, stride {first[0]["stride"]}, {where}',
             f'  length          {names}']
    for i, row in enumerate(first):
        n = row['length']
        line = f'{n:>8} {n / block_size:>5g}x   '
        for rows in results.values():
            line += f'{rows[i]["ppl"]:>22.3f}'
        if rule:
            line += f'   {scored(row)}'
        lines.append(line)
    return lines


def entropy_table(results, block_size):
    """results: {name: {position: the entropies of all heads}}"""
    names = ''.join(f'{name:>22}' for name in results)
    lines = ['\nattention entropy in nats, mean over heads (least to most diffuse head)',
             f' to position      {names}      uniform attention']
    first = next(iter(results.values()))             # the positions are the same for every name
    for position in sorted(first)[3::4]:             # every fourth band
        line = f'{position:>8} {position / block_size:>5g}x   '
        for entropies in results.values():
            values = entropies[position]
            mean = sum(values) / len(values)
            cell = f'{mean:.2f} ({min(values):.2f} to {max(values):.2f})'
            line += f'{cell:>22}'
        line += f'{math.log(position):>23.2f}'
        lines.append(line)
    return lines


def plot_extension(results, grid, title, block_size, file):
    """grid (n_layer, n_head): the temperatures, or their slopes."""
    fig, axes = pyplot(file).subplots(1, 3, figsize=(14, 4), layout='constrained')
    ppl_ax, entropy_ax, grid_ax = axes
    for name, (ppl, entropy) in results.items():     # --measure may have left one of them out
        lengths = [row['length'] for row in ppl]
        ppl_ax.plot(lengths, [row['ppl'] for row in ppl], marker='o', label=name)
        by_position = entropy_by_position(entropy)
        means = [sum(values) / len(values) for values in by_position.values()]
        entropy_ax.plot(list(by_position), means, label=name)
    ppl_ax.set(xlabel='length', ylabel='perplexity')
    entropy_ax.set(xlabel='position', ylabel='attention entropy (nats)')
    if any(ppl for ppl, _ in results.values()):      # matplotlib has no logarithm of nothing
        ppl_ax.set(xscale='log', yscale='log')
    if any(entropy for _, entropy in results.values()):
        entropy_ax.set(xscale='log')
    for ax in ppl_ax, entropy_ax:
        ax.axvline(block_size, color='black', linestyle='--', linewidth=1)
        ax.legend()
    image = grid_ax.imshow(grid.numpy(), cmap='viridis', aspect='auto')
    fig.colorbar(image, ax=grid_ax)
    grid_ax.set(xlabel='head', ylabel='layer', title=title)
    fig.savefig(file, dpi=150)
