"""
Is one row of a table better than another? Their difference, paired: the same prompts, the same held-out tokens, the
same seeds.

    python -m results.compare "NoPE head-log" "NoPE head"
    python -m results.compare "NoPE uniform-log" "NoPE uniform" --seeds 1,2,3

Keys: the mean difference in points over the prompts, which are the same for every seed, with its standard error, from
the trials that make encodings (or make ablations) left in --out. A * marks two standard errors or more with no seed of
the other sign: for these models, no accident of the prompts. Another seed is another model, and seeds are few, so keys
and loss (from the csv) are shown for each.
"""
import glob
import statistics

from data.figures import read_csv
from data.runtime import fail, int_list, parser
from results.plan import Machine, Plan
from results.tables import SCALES, TABLES


def trials(plan, row, seed, machine):
    """{length: {(depth, trial): 0 or 1}} of a row of the sweep."""
    folder = plan.row_folder(row, seed, machine)
    found = {}
    for file in glob.glob(f'{folder}/*.passkey.csv'):
        for line in read_csv(file):
            hits = found.setdefault(int(line['length']), {})
            hits[line['depth'], line['trial']] = int(line['accuracy'])
    if not found:
        fail(f'{folder} has no passkey.csv: measure that row first (make encodings, or make ablations)')
    return found


def difference(pairs):
    """
    pairs: for each seed a list of (hit of a, hit of b), the same prompts in each -> the mean of a - b, and its standard
    error over prompts.
    """
    means = []
    for of_prompt in zip(*pairs):                    # one prompt, the pair of each seed
        by_seed = [a - b for a, b in of_prompt]
        means.append(statistics.mean(by_seed))
    spread = statistics.stdev(means) if len(means) > 1 else 0
    return statistics.mean(means), spread / len(means) ** 0.5


def joined(values, form):
    return ', '.join([format(value, form) for value in values])


def losses_of(file, dtype):
    """{(seed, row, length): loss} of the csv, as far as it was trained in this precision."""
    losses = {}
    for line in read_csv(file):
        # older files have neither column; trials() reads the runs without --threads
        if line.get('dtype', dtype) == dtype and not line.get('threads'):
            losses[int(line['seed']), line['row'], int(line['length'])] = float(line['loss'])
    if not losses:
        fail(f'{file} has no rows: make them first (make encodings, or make ablations), or give --csv')
    return losses


def paired(hits, n):
    """The hits of both rows at n tokens, for each seed a list of pairs, in the same order of prompts."""
    pairs = []
    for seed, (first, second) in hits.items():
        a, b = first[n], second[n]
        if set(a) != set(b):
            fail(f'seed {seed}: the two rows were measured on other prompts at {n} tokens: measure them again')
        pairs.append([(a[prompt], b[prompt]) for prompt in sorted(a)])
        if len(pairs[0]) != len(pairs[-1]):
            fail(f'seeds {min(hits)} and {seed} were measured on other prompts at {n} tokens: measure them again')
    return pairs


def shown_keys(pairs):
    """Two cells: the difference in points with its standard error, and the difference of each seed."""
    mean, error = difference(pairs)
    by_seed = []
    for of_seed in pairs:
        mean_of_seed, _ = difference([of_seed])
        by_seed.append(100 * mean_of_seed)
    same_sign = min(by_seed) * max(by_seed) >= 0
    star = ''
    if error and abs(mean) >= 2 * error and same_sign:
        star = '*'
    return f'{100 * mean:+.1f} ±{100 * error:.1f}{star} | {joined(by_seed, "+.0f")}'


def shown_losses(losses, seeds, first, second, n):
    """Two cells: the mean difference over the seeds that have both losses, and that of each."""
    by_seed = []
    for seed in seeds:
        if (seed, first, n) in losses and (seed, second, n) in losses:
            by_seed.append(losses[seed, first, n] - losses[seed, second, n])
    if not by_seed:
        return '|'
    return f'{statistics.mean(by_seed):+.4f} | {joined(by_seed, "+.4f")}'


def parse_args(argv=None):
    p = parser(__doc__)
    p.add_argument('rows', nargs=2, metavar='ROW', help='names of two rows, as the table prints them')
    p.add_argument('--table', choices=TABLES, default='encodings')
    p.add_argument('--scale', choices=[s for s in SCALES if 'corpora' in SCALES[s]], default='tiny')
    p.add_argument('--seeds', type=int_list, default=[1, 2, 3])
    p.add_argument('--dtype', choices=('auto', 'bf16', 'fp32'), default='fp32', help='of training, as the sweep had it')
    p.add_argument('--out', default='out', help='folder of the runs')
    p.add_argument('--csv', help='of the losses (default: where the sweep writes that table)')
    return p.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    plan = Plan(args.scale, args.table, args.out)
    machine = Machine(args.dtype)
    rows = {row.name: row for row in plan.rows}
    for name in args.rows:
        if name not in rows:
            known = ', '.join([f'"{row}"' for row in rows])
            fail(f'--table {args.table} has no row "{name}": one of {known}')
    first, second = args.rows
    seeds = sorted(set(args.seeds))
    hits = {}                                        # {seed: the trials of both rows}
    for seed in seeds:
        hits[seed] = [trials(plan, rows[name], seed, machine) for name in args.rows]
    losses = losses_of(args.csv or plan.csv, args.dtype)

    print(f'{first} less {second}, seeds {",".join(map(str, seeds))}\n')
    print('| at | keys, points | by seed | loss, nats | by seed |\n|---|---|---|---|---|')
    measured = []
    for of_rows in hits.values():
        measured += map(set, of_rows)                # the lengths of each row and seed
    for n in sorted(set.intersection(*measured)):
        keys = shown_keys(paired(hits, n))
        loss = shown_losses(losses, seeds, first, second, n)
        print(f'| {n / plan.L:g}x | {keys} | {loss} |')


if __name__ == '__main__':
    main()
