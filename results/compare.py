"""
Is one row of a table better than another? Their difference, paired: the same prompts, the same held-out tokens, the same seeds.

    python -m results.compare "NoPE head-log" "NoPE head"
    python -m results.compare "NoPE uniform-log" "NoPE uniform" --seeds 1,2,3 --out out/fp32

Keys: mean difference in points over the prompts, which are the same for every seed, and its standard error, from the trials that
make encodings (or --table ablations: make table) left in --out. Marked * where it is two standard errors or more and no seed has the
other sign: no accident of the prompts, for these models. Another seed is another model, and of those there are few: so the keys, and
the loss from the csv, are shown by seed too.
"""
import glob
import statistics

from data import io
from results.reproduce import SCALES, TABLES, csv_of, where


def trials(row, out, seed):
    """{length: {(depth, trial): 0 or 1}} of a row of reproduce.py."""
    folder, found = where(out, row.run, seed, row.name), {}
    for file in glob.glob(f'{folder}/*.passkey.csv'):
        for r in io.read_csv(file):
            found.setdefault(int(r['length']), {})[r['depth'], r['trial']] = int(r['accuracy'])
    if not found:
        io.fail(f'{folder} has no passkey.csv: measure that row first (make encodings, or make table)')
    return found


def difference(pairs):
    """pairs: a list for each seed of (hit of a, hit of b), the same prompts in each -> (mean of a - b, its standard error over prompts)."""
    d = [statistics.mean(a - b for a, b in of) for of in zip(*pairs)]
    return statistics.mean(d), (statistics.stdev(d) if len(d) > 1 else 0) / len(d) ** 0.5


def main():
    p = io.parser(__doc__)
    p.add_argument('rows', nargs=2, metavar='ROW', help='names of two rows, as the table prints them')
    p.add_argument('--table', choices=TABLES, default='encodings')
    p.add_argument('--scale', choices=[s for s in SCALES if 'corpora' in SCALES[s]], default='tiny')
    p.add_argument('--seeds', type=io.int_list, default=[1, 2, 3])
    p.add_argument('--out', default='out/fp32', help='folder of the runs (that of make table and make encodings)')
    p.add_argument('--csv', help='of the losses (default: results/SCALE-encodings.csv, for ablations results/SCALE.csv, for headline OUT/SCALE/table.csv)')
    args = p.parse_args()
    known = {r.name: r for r in TABLES[args.table]}
    for name in args.rows:
        if name not in known:
            io.fail(f'--table {args.table} has no row "{name}": one of ' + ', '.join(f'"{n}"' for n in known))
    file = args.csv or csv_of(args.table, args.scale, args.out)
    args.seeds = sorted(set(args.seeds))
    hits = {s: [trials(known[name], f'{args.out}/{args.scale}', s) for name in args.rows] for s in args.seeds}
    losses = {(int(d['seed']), d['row'], int(d['length'])): float(d['loss']) for d in io.read_csv(file)}
    if not losses:
        io.fail(f'{file} has no rows: make them first (make encodings, or make table), or give --csv')
    lengths = sorted(set.intersection(*(set(t) for pair in hits.values() for t in pair)))
    L, signs = SCALES[args.scale]['L'], lambda values, form: ', '.join(format(v, form) for v in values)
    print(f'{args.rows[0]} less {args.rows[1]}, seeds {",".join(map(str, args.seeds))}\n\n| at | keys, points | by seed | loss, nats | by seed |\n|---|---|---|---|---|')
    for n in lengths:
        pairs = []
        for s, (a, b) in hits.items():
            if set(a[n]) != set(b[n]):
                io.fail(f'seed {s}: the two rows were measured on other prompts at {n} tokens: measure them again')
            pairs.append([(a[n][k], b[n][k]) for k in sorted(a[n])])
            if len(pairs[0]) != len(pairs[-1]):
                io.fail(f'seeds {args.seeds[0]} and {s} were measured on other prompts at {n} tokens: measure them again')
        mean, error = difference(pairs)
        loss = [losses[s, args.rows[0], n] - losses[s, args.rows[1], n] for s in args.seeds if all((s, name, n) in losses for name in args.rows)]
        each = [100 * difference([of])[0] for of in pairs]
        star = '*' * bool(error and abs(mean) >= 2 * error and min(each) * max(each) >= 0)
        print(f'| {n / L:g}x | {100 * mean:+.1f} ±{100 * error:.1f}{star} | {signs(each, "+.0f")} | '
              + (f'{statistics.mean(loss):+.4f} | {signs(loss, "+.4f")} |' if loss else '| |'))


if __name__ == '__main__':
    main()
