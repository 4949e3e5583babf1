"""
The table of a sweep as text, and its figures.
"""
import glob
import math
import os
import statistics

from data.checkpoint import load_checkpoint
from data.figures import draw as draw_heat_map
from data.figures import heat_map, pyplot, read_csv
from results.tables import GROUPS, SHOWN

MEASURES = dict(loss=('loss (nats)', 1, 2), passkey=('passkey (%)', 100, 0))         # unit, factor, decimals


def with_new_columns(line):
    """A line of the csv; of one that was written before there was a column for it, that column is empty."""
    return dict(dtype='fp32', threads='', trained_in='', tokens='', extended_s='') | line


def cells_of(lines, name, lengths, what):
    """-> for each length the values of a row, one a run."""
    cells = {n: [] for n in lengths}
    for line in lines:
        if line['row'] == name and int(line['length']) in cells:
            cells[int(line['length'])].append(float(line[what]))
    return list(cells.values())


def mean_sd(values, digits):
    text = f'{statistics.mean(values):.{digits}f}'
    if len(values) > 1:
        text += f' ±{statistics.stdev(values):.{digits}f}'
    return text


def runs_of(lines):
    """The models behind a table: {(seed, dtype, threads)}."""
    return {(int(line['seed']), line['dtype'], line['threads']) for line in lines}


def markdown(head, rows):
    out = ['| ' + ' | '.join(head) + ' |', '|---' * len(head) + '|']
    return '\n'.join(out + ['| ' + ' | '.join(row) + ' |' for row in rows])


def table(lines, names, lengths, L):
    """A row of the table a line; loss, then passkey accuracy, at multiples of the training length; then the costs."""
    runs = len(runs_of(lines))
    seeds = len({seed for seed, _, _ in runs_of(lines)})
    caption = f'{seeds} seed' if seeds == 1 else f'{seeds} seeds'
    if runs > seeds:
        caption += f', {runs} runs'
    if runs > 1:
        caption += ', mean ± standard deviation'
    parts = [f'{caption}; training length {L}']
    at = [f'{n / L:g}x' for n in lengths]
    for what, (unit, factor, digits) in MEASURES.items():
        rows = []
        for name in names:
            cells = cells_of(lines, name, lengths, what)
            if any(cells):
                fewer = f' ({len(cells[0])} of {runs} runs)' if len(cells[0]) < runs else ''
                rows.append([name + fewer])
                for values in cells:
                    rows[-1].append(mean_sd([factor * v for v in values], digits) if values else '')
        parts.append(markdown([f'{unit} at', *at], rows))
    costs = []
    for name in names:
        found = [line for line in lines if line['row'] == name and int(line['length']) == lengths[0]]
        if found and int(found[0]['tokens'] or 0):
            seconds = mean_sd([float(line['extended_s']) for line in found], 0)
            costs.append([name, f'{int(found[0]["tokens"]):,}', seconds])
    if costs:
        parts.append(markdown(['what extending cost', 'tokens', 'seconds'], costs))
    return '\n\n'.join(parts)


def table_of_caches(plan):
    """What decoding holds at the longest length, in fp32: of each run once."""
    n = plan.lengths[-1]
    runs = {row.run: row for row in reversed(plan.rows)}
    rows = []
    for row in reversed(runs.values()):
        rows.append([row.name, f'{4 * plan.cached_numbers(row, n) / 1e3:,.0f}'])
    return markdown([f'cache after {n:,} tokens', 'kB'], rows)


def table_of_runs(lines, names, lengths, L):
    """Does the claim hold everywhere? Passkey accuracy of each run, and the worst of all."""
    rows = []
    for name in names:
        for run in sorted(runs_of(lines)):
            own = [line for line in lines if runs_of([line]) == {run}]
            seed, dtype, threads = run
            label = f'{name}, seed {seed}, {dtype}' + (f', {threads} threads' if threads else '')
            cells = cells_of(own, name, lengths, 'passkey')
            if any(cells):
                rows.append([label] + [f'{100 * values[0]:.0f}' if values else '' for values in cells])
        cells = cells_of(lines, name, lengths, 'passkey')
        if any(cells):
            rows.append([f'{name}, worst'] + [f'{100 * min(values):.0f}' if values else '' for values in cells])
    return markdown(['passkey (%) of each run at'] + [f'{n / L:g}x' for n in lengths], rows)


# ---------------------------------------------------------------------------------------------------------------------
# passkey by length and depth

def prompts_of(plan, rows, seed, machine):
    """{name of a row: the prompts in its passkey.csv}, of the rows that this seed has been measured for."""
    found = {}
    for row in rows:
        for file in sorted(glob.glob(f'{plan.row_folder(row, seed, machine)}/*.passkey.csv')):
            prompts = []
            for line in read_csv(file):
                prompts.append(dict(length=int(line['length']), depth=float(line['depth']),
                                    accuracy=float(line['accuracy'])))
            found.setdefault(row.name, []).extend(prompts)
    return found


def shown_rows(plan):
    """The rows that figures show: all of a short table, else those named in tables.py."""
    return [row for row in plan.rows if row.name in SHOWN or len(plan.rows) <= 8]


def print_heat_maps(plan, seed, machine):
    for name, prompts in prompts_of(plan, shown_rows(plan), seed, machine).items():
        print(f'\n{name}, seed {seed}: passkey accuracy\n{heat_map(prompts, plan.L)}')


def draw(plan, lines, seed, machine, file):
    """The figures; without a file only the headline's, where matplotlib is there to draw it."""
    if not file:
        try:
            import matplotlib  # noqa: F401 (is it there?)
        except ImportError:
            return
        if plan.table == 'headline':
            plot_headline(plan, lines, seed, machine, f'{plan.out}/table.png')
        return
    base, extension = os.path.splitext(file)
    if plan.table == 'headline':
        plot_headline(plan, lines, seed, machine, file)
        plot_entropy(plan, seed, machine, f'{base}-entropy{extension}')
        return
    groups = GROUPS.get(plan.table) or {'': [row.name for row in shown_rows(plan)]}
    plot_table(lines, groups, plan.lengths, plan.L, file)
    plot_entropy(plan, seed, machine, f'{base}-entropy{extension}')
    plot_heat_maps(plan, seed, machine, f'{base}-passkey{extension}')


def save(fig, file):
    fig.savefig(file, dpi=130)
    print(file)


# ---------------------------------------------------------------------------------------------------------------------
# by length: mean over the runs, and their range

def plot_lines(ax, lines, names, lengths, L, what, label):
    runs = len(runs_of(lines))
    for name in names:
        cells = cells_of(lines, name, lengths, what)
        at = [i for i, values in enumerate(cells) if values]
        if at:
            most = max(map(len, cells))
            fewer = f' ({most} of {runs} runs)' if most < runs else ''
            line, = ax.plot(at, [statistics.mean(cells[i]) for i in at], marker='.', label=name + fewer)
            low, high = [min(cells[i]) for i in at], [max(cells[i]) for i in at]
            ax.fill_between(at, low, high, color=line.get_color(), alpha=0.15)
    ax.axvline(lengths.index(L), color='black', linestyle='--', linewidth=1)
    ax.set_xticks(range(len(lengths)), [f'{n / L:g}' for n in lengths])
    ax.set(xlabel='length / training length (dashed)', ylabel=label)
    if what == 'loss':                               # RoPE's collapse must not flatten the rest
        lowest = min(float(line['loss']) for line in lines)
        ax.set_ylim(bottom=0.8 * lowest, top=min(ax.get_ylim()[1], 4 * lowest))


def plot_pair(top, below, title, *args):
    """Passkey accuracy and loss of the same rows."""
    plot_lines(top, *args, 'passkey', 'passkey accuracy')
    plot_lines(below, *args, 'loss', 'loss (nats a token)')
    top.set(title=title)
    if top.get_legend_handles_labels()[0]:
        top.legend(fontsize='small')


def plot_table(lines, groups, lengths, L, file):
    """groups: {title: names of rows}, three side by side; one alone has its two figures side by side."""
    plt = pyplot(file)
    if len(groups) == 1:
        fig, axes = plt.subplots(1, 2, figsize=(11, 4), layout='constrained')
        pairs = [axes]
    else:
        bands = math.ceil(len(groups) / 3)
        fig, axes = plt.subplots(2 * bands, 3, figsize=(13, 6.5 * bands), layout='constrained', sharey='row')
        pairs = [(axes[2 * band, i], axes[2 * band + 1, i]) for band in range(bands) for i in range(3)]
    for (top, below), (title, names) in zip(pairs, groups.items()):
        plot_pair(top, below, title, lines, names, lengths, L)
    save(fig, file)


def plot_headline(plan, lines, seed, machine, file):
    """Passkey and loss by length above, a heat map of each row below, as far as its run is there."""
    plt = pyplot(file)
    prompts = prompts_of(plan, shown_rows(plan), seed, machine)
    if not prompts:
        plot_table(lines, {'': plan.names}, plan.lengths, plan.L, file)
        return
    columns = max(2, len(prompts))
    fig = plt.figure(figsize=(3 * columns, 7), layout='constrained')
    above, below = fig.subfigures(2, 1)
    plot_pair(*above.subplots(1, 2), '', lines, plan.names, plan.lengths, plan.L)
    axes = below.subplots(1, columns, squeeze=False)[0]
    for ax, (name, of_row) in zip(axes, prompts.items()):
        draw_heat_map(ax, of_row, plan.L, name)
    save(fig, file)


def plot_heat_maps(plan, seed, machine, file):
    """Passkey accuracy by length and depth, one seed."""
    plt = pyplot(file)
    prompts = prompts_of(plan, [row for row in plan.rows if row.name in SHOWN], seed, machine)
    if not prompts:
        print(f'{file} needs the runs of seed {seed} in {plan.out}: not drawn')
        return
    fig, axes = plt.subplots(1, len(prompts), figsize=(3.2 * len(prompts), 3.4), layout='constrained', squeeze=False)
    for ax, (name, of_row) in zip(axes[0], prompts.items()):
        draw_heat_map(ax, of_row, plan.L, name)
    save(fig, file)


# ---------------------------------------------------------------------------------------------------------------------
# the paper's explanation

def entropy_rows(plan, seed, machine):
    """[(row, its entropy.csv)] of nope and rope as they are, and extended in one way for every length."""
    found = []
    for row in shown_rows(plan):
        plain = row.run in ('nope', 'rope') and not row.each_length and not row.train_on and not row.times
        if plain:
            for file in glob.glob(f'{plan.row_folder(row, seed, machine)}/*.entropy.csv'):
                found.append((row, file))
    return found


def plot_entropy(plan, seed, machine, file):
    """Of one seed: entropy by position (mean over heads, and each head), the temperatures that lower it."""
    plt = pyplot(file)
    found = entropy_rows(plan, seed, machine)
    if not found:
        print(f'{file} needs the runs of seed {seed} in {plan.out}: not drawn')
        return
    tuned = [(row, csv) for row, csv in found if row.method in ('head', 'head-log')]
    fig, axes = plt.subplots(1, 1 + len(tuned), figsize=(6 + 3 * len(tuned), 4), layout='constrained',
                             width_ratios=[2] + [1] * len(tuned), squeeze=False)
    curves = axes[0, 0]
    for row, csv in found:
        heads = {}                                   # position -> the entropy of each head
        for line in read_csv(csv):
            heads.setdefault(int(line['position']), []).append(float(line['entropy']))
        means = [statistics.mean(values) for values in heads.values()]
        drawn, = curves.plot(list(heads), means, label=row.name)
        if not row.method:                           # each head, where that does not hide the rest
            curves.plot(list(heads), list(heads.values()), color=drawn.get_color(), alpha=0.25, linewidth=0.7)
    curves.axvline(plan.L, color='black', linestyle='--', linewidth=1)
    curves.set(xlabel='position (dashed: training length)', ylabel='attention entropy (nats)')
    curves.set_xscale('log', base=2)
    curves.legend(fontsize='small', loc='lower right')
    for ax, (row, csv) in zip(axes[0, 1:], tuned):
        extended = load_checkpoint(csv.replace('.entropy.csv', '.pt'))['extended']
        what, key = ('slope', 'slopes') if row.method == 'head-log' else ('temperature', 'heads')
        grid = extended[key]
        fig.colorbar(ax.imshow(grid, cmap='viridis', aspect='auto'), ax=ax)
        ax.set(xlabel='head', ylabel='layer', title=f'{row.name}: {what}')
        ax.set_xticks(range(len(grid[0])))
        ax.set_yticks(range(len(grid)))
    save(fig, file)
