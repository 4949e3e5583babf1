"""
The sweep behind make reproduce, make table and make figure: runs the scripts as a user would, collects their csv files
in one, prints one table and the heat maps. What is there already is not run again.

    python -m results.reproduce --scale tiny                              # the headline, one seed
    python -m results.reproduce --scale tiny --seeds 1,2,3 --ablations    # results/tiny.csv, and the figure with --plot
"""
import csv
import os
import shlex
import statistics
import subprocess
import sys
import time

from data import io
from eval_passkey import heat_map

SCALES = dict(
    # the same path in under a minute, for the tests: nothing is learned
    toy=dict(block_size=128, tokens=(60_000, 60_000), train='--steps 6 --batch_tokens 512 --block_size 128 --n_layer 1 --n_embd 32 --n_inner 32 --eval_tokens 512 --log_every 3',
             target=256, tune='--steps 2 --batch 2 --grid 1,1.2 --grid_batches 1', lengths='128,192,256', measure='--eval_tokens 256 --stride 64',
             passkey='--depths 2 --trials 1'),
    tiny=dict(block_size=256, tokens=(12_000_000, 4_000_000), train='', target=1024, tune='', lengths='128,256,384,512,768,1024,1536,2048',
              measure='--eval_tokens 8192 --stride 64', passkey='--depths 10 --trials 10'),
)
# the runs that rows start from
BASES = {'nope': '--pe nope', 'rope': '--pe rope', 'rope-2x': '--pe rope --steps 4800'}
# row, the run it starts from, extend.py's method (None: the trained model itself) and flags, the corpus it is tuned on
ROWS = [
    ('NoPE', 'nope', None, '', None),
    ('NoPE uniform', 'nope', 'uniform', '', 'passkey_tune'),
    ('NoPE head', 'nope', 'head', '', 'passkey_tune'),
    ('RoPE', 'rope', None, '', None),
    ('RoPE YaRN', 'rope', 'yarn', '', 'passkey_tune'),
]
ABLATIONS = [
    ('RoPE head', 'rope', 'head', '', 'passkey_tune'),
    ('RoPE, twice the steps', 'rope-2x', None, '', None),        # the twin has not learned the passkey in its window by then
    ('RoPE YaRN, twice the steps', 'rope-2x', 'yarn', '', 'passkey_tune'),
    ('RoPE head, twice the steps', 'rope-2x', 'head', '', 'passkey_tune'),
    ('NoPE head, training mix', 'nope', 'head', '', 'passkey'),
    ('NoPE head, from 1.0', 'nope', 'head', '--init 1.0', 'passkey_tune'),
    ('NoPE head, no focus', 'nope', 'head', '--no-focus', 'passkey_tune'),
]
COLUMNS = ('seed', 'row', 'length', 'loss', 'passkey', 'prompts', 'seconds', 'flags')


def run(script, flags):
    """One command, shown as it would be typed."""
    command = [sys.executable] + shlex.split(f'{script} {flags}')
    print(f'\n$ python {script} {flags}', flush=True)
    code = subprocess.call(command)
    if code:
        sys.exit(code)


def train(runs):
    """{folder: flags}: trains them side by side, each with its share of the cores; the first is seen, the others write to FOLDER.txt."""
    share, started = str(max(1, (os.cpu_count() or 1) // max(1, len(runs)))), []
    for i, (folder, flags) in enumerate(runs.items()):
        command = f'train.py {flags} --out {folder}'
        print(f'\n$ OMP_NUM_THREADS={share} python {command}' + (f' > {folder}.txt &' if i else ''), flush=True)
        os.makedirs(os.path.dirname(folder), exist_ok=True)
        started.append(subprocess.Popen([sys.executable] + shlex.split(command), env=dict(os.environ, OMP_NUM_THREADS=share),
                                        stdout=open(f'{folder}.txt', 'a') if i else None))
    for code in [p.wait() for p in started]:
        if code:
            sys.exit(code)


def read_csv(file):
    return list(csv.DictReader(open(file, newline=''))) if os.path.exists(file) else []


def mean_sd(values, digits):
    text = f'{statistics.mean(values):.{digits}f}'
    return text + (f' ±{statistics.stdev(values):.{digits}f}' if len(values) > 1 else '')


def table(rows, order, lengths, L):
    """Markdown: a line a row; loss, then passkey accuracy in percent, at multiples of the training length."""
    seeds = {str(r['seed']) for r in rows}
    out = [f'{len(seeds)} seed{"s, mean ± standard deviation" if len(seeds) > 1 else ""}; training length {L}']
    for what, key, scale, digits in (('loss (nats)', 'loss', 1, 2), ('passkey (%)', 'passkey', 100, 0)):
        out += ['', f'| {what} at | ' + ' | '.join(f'{n / L:g}x' for n in lengths) + ' |', '|---|' + '---|' * len(lengths)]
        for name in order:
            cells = [[float(r[key]) * scale for r in rows if (r['row'], int(r['length'])) == (name, n)] for n in lengths]
            if all(cells):
                fewer = f' ({len(cells[0])} of {len(seeds)} seeds)' if len(cells[0]) < len(seeds) else ''
                out.append(f'| {name}{fewer} | ' + ' | '.join(mean_sd(c, digits) for c in cells) + ' |')
    return '\n'.join(out)


def where(out, base, seed, name):
    """Folder of a row's results: out/tiny, nope, 1, 'NoPE head, no focus' -> out/tiny/nope-1/nope-head-no-focus."""
    return f'{out}/{base}-{seed}/{name.replace(",", "").replace(" ", "-").lower()}'


def plot(rows, order, lengths, L, file):
    plt = io.pyplot(file)
    fig, axes = plt.subplots(1, 2, figsize=(11, 4), layout='constrained')
    for ax, key, label in zip(axes, ('passkey', 'loss'), ('passkey accuracy', 'loss (nats a token)')):
        for name in order:
            cells = [[float(r[key]) for r in rows if (r['row'], int(r['length'])) == (name, n)] for n in lengths]
            if all(cells):
                line, = ax.plot(range(len(lengths)), [statistics.mean(c) for c in cells], marker='o', label=name)
                ax.fill_between(range(len(lengths)), [min(c) for c in cells], [max(c) for c in cells], color=line.get_color(), alpha=0.15)
        ax.axvline(lengths.index(L), color='black', linestyle='--', linewidth=1)
        ax.set_xticks(range(len(lengths)), [f'{n / L:g}x\n{n}' for n in lengths])
        ax.set(xlabel='length (dashed: training length)', ylabel=label)
    axes[0].legend()
    fig.savefig(file, dpi=130)
    print(file)


def main():
    p = io.parser(__doc__)
    p.add_argument('--scale', default='tiny')
    p.add_argument('--seeds', type=io.int_list, default=[1])
    p.add_argument('--ablations', action='store_true', help='also the rows that take the method apart')
    p.add_argument('--out', default='out', help='folder for data and runs')
    p.add_argument('--plot', metavar='FILE.png', help='draw loss and passkey accuracy by length')
    p.add_argument('--csv', help='where the rows go (default OUT/SCALE/table.csv; with --ablations results/SCALE.csv)')
    args = p.parse_args()
    if args.scale not in SCALES:
        io.fail(f'SCALE={args.scale} is not here: one of {" ".join(SCALES)}')
    if args.plot:
        io.pyplot(args.plot)
    scale, out = SCALES[args.scale], f'{args.out}/{args.scale}'
    file = args.csv or (f'results/{args.scale}.csv' if args.ablations else f'{out}/table.csv')
    lengths, L = io.int_list(scale['lengths']), scale['block_size']
    todo, done, start = ROWS + ABLATIONS * args.ablations, read_csv(file), time.time()
    # what makes each row: in the csv too, so that a row which other flags made is made again
    train_flags = {base: f'--preset tiny {pe} --dtype fp32 {scale["train"]}'.strip() for base, pe in BASES.items()}
    tune_flags = {name: f'--method {method} --length {scale["target"]} --dtype fp32 {scale["tune"]} {extra}'.strip() for name, _, method, extra, _ in todo}
    measure_flags = f'--lengths {scale["lengths"]} --dtype fp32'
    flags = {name: ' | '.join([train_flags[base]] + [f'{tune_flags[name]} on {corpus}'] * bool(method)
                              + [f'{measure_flags} {scale["measure"]} {scale["passkey"]}']) for name, base, method, _, corpus in todo}
    done = [d for d in done if d['row'] not in flags or d.get('flags') == flags[d['row']]]
    missing = {seed: [r for r in todo if not any(d['row'] == r[0] and int(d['seed']) == seed for d in done)] for seed in args.seeds}
    for corpus, options, tokens in zip(('passkey', 'passkey_tune'), ('--retrieval 0.5', '--retrieval 0.7 --gap 200 --seed 1'), scale['tokens']):
        if any(missing.values()) and not os.path.exists(f'{out}/{corpus}/meta.json'):
            run('-m data.passkey.prepare', f'--out {out}/{corpus} --tokens {tokens} {options}')
    for seed in args.seeds:
        left = missing[seed]
        if len(left) < len(todo):
            print(f'seed {seed}: {len(todo) - len(left)} of {len(todo)} rows are in {file} already')
        # --resume: a sweep that was stopped goes on where it was, and a finished run costs a few seconds
        train({f'{out}/{base}-{seed}': f'{train_flags[base]} --data {out}/passkey --seed {seed} --resume' for base in dict.fromkeys(r[1] for r in left)})
        for name, base, method, _, corpus in left:
            began, ckpt = time.time(), f'{out}/{base}-{seed}'
            folder = where(out, base, seed, name)
            if method:
                run('extend.py', f'--ckpt {ckpt} --data {out}/{corpus} {tune_flags[name]} --out {folder} --eval_tokens 0')
                ckpt = f'{folder}/{method}-{scale["target"]}.pt'
            run('extend.py', f'--ckpt {ckpt} --data {out}/passkey_tune --method none {measure_flags} --out {folder} {scale["measure"]}')
            run('eval_passkey.py', f'--ckpt {ckpt} {measure_flags} --out {folder} {scale["passkey"]}')
            stem = io.stem(ckpt)
            ppl, pk = read_csv(f'{folder}/{stem}.ppl.csv'), read_csv(f'{folder}/{stem}.passkey.csv')
            for row in ppl:
                hits = [int(r['accuracy']) for r in pk if r['length'] == row['length']]
                done.append(dict(seed=seed, row=name, length=row['length'], loss=f'{float(row["nll"]):.4f}', passkey=f'{sum(hits) / len(hits):.4f}',
                                 prompts=len(hits), seconds=f'{time.time() - began:.0f}', flags=flags[name]))
            with open(f'{file}.tmp', 'w', newline='') as f:
                w = csv.DictWriter(f, COLUMNS)
                w.writeheader()
                w.writerows(done)
            os.replace(f'{file}.tmp', file)
    for name, base, *_ in ROWS:                      # the first seed's; the others are in the same folders
        folder = where(out, base, args.seeds[0], name)
        for f in sorted(os.listdir(folder)) if os.path.isdir(folder) else ():
            if f.endswith('.passkey.csv'):
                print(f'\n{name}, seed {args.seeds[0]}: passkey accuracy\n' + heat_map(
                    [{k: float(v) if k != 'length' else int(v) for k, v in r.items()} for r in read_csv(f'{folder}/{f}')], L))
    print('\n' + table([r for r in done if int(r['seed']) in args.seeds], [r[0] for r in todo], lengths, L))
    if args.plot:
        plot(done, [r[0] for r in todo], lengths, L, args.plot)
    print(f'\n{file}; {time.time() - start:.0f} s')


if __name__ == '__main__':
    main()
