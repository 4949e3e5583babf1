"""
The table of a sweep as text, and its figures.
"""
import glob
import math
import os
import statistics

from data.checkpoint import load_checkpoint
from data.figures import draw as draw_heat_map
from data.figures import heat_map, multiples, pyplot, read_csv
from results.tables import GROUPS, SHOWN

MEASURES = dict(loss=('loss (nats)', 1, 2), passkey=('passkey (%)', 100, 0))         # unit, factor, decimals


def with_new_columns(line):
    """A line of the csv. Columns that are newer than the line are filled in: dtype with fp32, the others empty."""
    return dict(dtype='fp32', threads='', trained_in='', tokens='', extended_s='') | line


def cells_of(lines, name, lengths, what):
    """-> for each length the values of a row, one a run."""
    cells = {n: [] for n in lengths}
    for line in lines:
        if line['row'] == name and int(line['length']) in cells:
            cells[int(line['length'])].append(float(line[what]))
    return list(cells.values())


def mean_sd(values, digits):
    """Mean ± standard deviation as text, as far as there are values for them."""
    if not values:
        return ''
    text = f'{statistics.mean(values):.{digits}f}'
    if len(values) > 1:
        text += f' ±{statistics.stdev(values):.{digits}f}'
    return text


def run_of(line):
    """The model behind a line of the csv: (seed, dtype, threads)."""
    return int(line['seed']), line['dtype'], line['threads']


def runs_of(lines):
    """The models behind a table: {(seed, dtype, threads)}."""
    return {run_of(line) for line in lines}


def with_runs(name, measured, runs):
    """The name of a row; a row that only some of the runs have says how many."""
    if measured < runs:
        return f'{name} ({measured} of {runs} runs)'
    return name


def markdown(head, rows):
    lines = ['| ' + ' | '.join(head) + ' |', '|---' * len(head) + '|']
    for row in rows:
        lines.append('| ' + ' | '.join(row) + ' |')
    return '\n'.join(lines)


def table(lines, names, lengths, L):
    """A row of the table a line; loss, then passkey accuracy, at multiples of the training length; then the costs."""
    tables = [caption(lines, L)]
    for what in MEASURES:
        tables.append(table_of_measure(lines, names, lengths, L, what))
    costs = costs_of(lines, names, lengths)
    if costs:
        tables.append(markdown(['what extending cost', 'tokens', 'seconds'], costs))
    return '\n\n'.join(tables)


def caption(lines, L):
    runs = runs_of(lines)
    seeds = {seed for seed, _, _ in runs}
    text = f'{len(seeds)} seed'
    if len(seeds) != 1:
        text += 's'
    if len(runs) > len(seeds):
        text += f', {len(runs)} runs'
    if len(runs) > 1:
        text += ', mean ± standard deviation'
    return f'{text}; training length {L}'


def table_of_measure(lines, names, lengths, L, what):
    unit, factor, digits = MEASURES[what]
    runs = len(runs_of(lines))
    rows = []
    for name in names:
        cells = cells_of(lines, name, lengths, what)
        if not any(cells):
            continue
        row = [with_runs(name, len(cells[0]), runs)]
        for values in cells:
            in_unit = [factor * value for value in values]
            row.append(mean_sd(in_unit, digits))
        rows.append(row)
    return markdown([f'{unit} at', *multiples(lengths, L, 'x')], rows)


def costs_of(lines, names, lengths):
    """[name, tokens, seconds] of each row that read tokens to be extended."""
    rows = []
    for name in names:
        # the cost of a row stands at each of its lengths, so one of them tells it
        found = [line for line in lines if line['row'] == name and int(line['length']) == lengths[0]]
        if found and int(found[0]['tokens'] or 0):
            tokens = int(found[0]['tokens'])
            seconds = [float(line['extended_s']) for line in found]
            rows.append([name, f'{tokens:,}', mean_sd(seconds, 0)])
    return rows


def table_of_caches(plan):
    """What decoding holds at the longest length, in fp32: of each run once, by the name of its first row."""
    n = plan.lengths[-1]
    seen = set()
    rows = []
    for row in plan.rows:
        if row.run not in seen:
            seen.add(row.run)
            kilobytes = 4 * plan.cached_numbers(row, n) / 1e3
            rows.append([row.name, f'{kilobytes:,.0f}'])
    return markdown([f'cache after {n:,} tokens', 'kB'], rows)


def table_of_runs(lines, names, lengths, L):
    """Does the claim hold everywhere? Passkey accuracy of each run, and the worst of all."""
    rows = []

    def add_row(label, name, of_lines):
        cells = cells_of(of_lines, name, lengths, 'passkey')
        if any(cells):
            rows.append([label, *map(worst, cells)])

    for name in names:
        for run in sorted(runs_of(lines)):
            seed, dtype, threads = run
            label = f'{name}, seed {seed}, {dtype}'
            if threads:
                label += f', {threads} threads'
            add_row(label, name, [line for line in lines if run_of(line) == run])
        add_row(f'{name}, worst', name, lines)
    return markdown(['passkey (%) of each run at', *multiples(lengths, L, 'x')], rows)


def worst(accuracies):
    """In per cent; empty where nothing was measured."""
    if not accuracies:
        return ''
    return f'{100 * min(accuracies):.0f}'


# ---------------------------------------------------------------------------------------------------------------------
# passkey by length and depth

def prompts_of(plan, rows, seed, machine):
    """{name of a row: the prompts in its passkey.csv}, of the rows that this seed has been measured for."""
    found = {}
    for row in rows:
        for file in sorted(glob.glob(f'{plan.row_folder(row, seed, machine)}/*.passkey.csv')):
            prompts = found.setdefault(row.name, [])
            for line in read_csv(file):
                length, depth, accuracy = int(line['length']), float(line['depth']), float(line['accuracy'])
                prompts.append(dict(length=length, depth=depth, accuracy=accuracy))
    return found


def shown_rows(plan):
    """The rows that figures show: all of a short table, else those named in tables.py."""
    if len(plan.rows) <= 8:
        return plan.rows
    return [row for row in plan.rows if row.name in SHOWN]


def print_heat_maps(plan, seed, machine):
    prompts = prompts_of(plan, shown_rows(plan), seed, machine)
    for name, of_row in prompts.items():
        print(f'\n{name}, seed {seed}: passkey accuracy\n{heat_map(of_row, plan.L)}')


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
    shown = {'': [row.name for row in shown_rows(plan)]}
    groups = GROUPS.get(plan.table, shown)
    plot_table(lines, groups, plan.lengths, plan.L, file)
    if plan.table != 'layers':                       # its entropies are the headline's
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
        if not at:
            continue
        measured = [cells[i] for i in at]
        means = [statistics.mean(values) for values in measured]
        lowest = [min(values) for values in measured]
        highest = [max(values) for values in measured]
        most = max(map(len, measured))
        line, = ax.plot(at, means, marker='.', label=with_runs(name, most, runs))
        ax.fill_between(at, lowest, highest, color=line.get_color(), alpha=0.15)
    ax.axvline(lengths.index(L), color='black', linestyle='--', linewidth=1)
    ax.set_xticks(range(len(lengths)), multiples(lengths, L))
    ax.set(xlabel='length / training length (dashed)', ylabel=label)
    if what == 'loss':                               # RoPE's collapse must not flatten the rest
        best = min(float(line['loss']) for line in lines)
        limit = min(ax.get_ylim()[1], 4 * best)
        ax.set_ylim(bottom=0.8 * best, top=limit)


def plot_pair(passkey_ax, loss_ax, title, lines, names, lengths, L):
    """Passkey accuracy and loss of the same rows."""
    plot_lines(passkey_ax, lines, names, lengths, L, 'passkey', 'passkey accuracy')
    plot_lines(loss_ax, lines, names, lengths, L, 'loss', 'loss (nats a token)')
    passkey_ax.set(title=title)
    handles, _ = passkey_ax.get_legend_handles_labels()
    if handles:
        passkey_ax.legend(fontsize='small')


def plot_table(lines, groups, lengths, L, file):
    """groups: {title: names of rows}, three side by side; one alone has its two figures side by side."""
    plt = pyplot(file)
    pairs = []
    if len(groups) == 1:
        fig, axes = plt.subplots(1, 2, figsize=(11, 4), layout='constrained')
        pairs.append(axes)
    else:
        bands = math.ceil(len(groups) / 3)           # a band: a row of passkey figures, one of losses below it
        fig, axes = plt.subplots(2 * bands, 3, figsize=(13, 6.5 * bands), layout='constrained', sharey='row')
        for i in range(len(groups)):
            band, column = divmod(i, 3)
            pairs.append((axes[2 * band, column], axes[2 * band + 1, column]))
    for (passkey_ax, loss_ax), (title, names) in zip(pairs, groups.items()):
        plot_pair(passkey_ax, loss_ax, title, lines, names, lengths, L)
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
    passkey_ax, loss_ax = above.subplots(1, 2)
    plot_pair(passkey_ax, loss_ax, '', lines, plan.names, plan.lengths, plan.L)
    axes = below.subplots(1, columns)
    for ax, (name, of_row) in zip(axes, prompts.items()):
        draw_heat_map(ax, of_row, plan.L, name)
    save(fig, file)


def plot_heat_maps(plan, seed, machine, file):
    """Passkey accuracy by length and depth, one seed."""
    plt = pyplot(file)
    rows = [row for row in plan.rows if row.name in SHOWN]
    prompts = prompts_of(plan, rows, seed, machine)
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
        if row.run not in ('nope', 'rope') or row.each_length or row.train_on or row.times:
            continue
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
    curves, *grids = axes[0]
    for row, csv in found:
        plot_curve(curves, row, csv)
    curves.axvline(plan.L, color='black', linestyle='--', linewidth=1)
    curves.set(xlabel='position (dashed: training length)', ylabel='attention entropy (nats)')
    curves.set_xscale('log', base=2)
    curves.legend(fontsize='small', loc='lower right')
    for ax, (row, csv) in zip(grids, tuned):
        image = plot_temperatures(ax, row, csv)
        fig.colorbar(image, ax=ax)
    save(fig, file)


def plot_curve(ax, row, csv):
    """Entropy by position of a row."""
    heads = {}                                       # position -> the entropy of each head
    for line in read_csv(csv):
        heads.setdefault(int(line['position']), []).append(float(line['entropy']))
    positions = list(heads)
    means = [statistics.mean(values) for values in heads.values()]
    drawn, = ax.plot(positions, means, label=row.name)
    if not row.method:                               # each head, where that does not hide the rest
        ax.plot(positions, list(heads.values()), color=drawn.get_color(), alpha=0.25, linewidth=0.7)


def plot_temperatures(ax, row, csv):
    """What a tuned row has found for each head -> the image."""
    extended = load_checkpoint(csv.replace('.entropy.csv', '.pt'))['extended']
    what, grid = 'temperature', extended['heads']
    if row.method == 'head-log':
        what, grid = 'slope', extended['slopes']
    image = ax.imshow(grid, cmap='viridis', aspect='auto')
    ax.set(xlabel='head', ylabel='layer', title=f'{row.name}: {what}')
    ax.set_xticks(range(len(grid[0])))
    ax.set_yticks(range(len(grid)))
    return image
