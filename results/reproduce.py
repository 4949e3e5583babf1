"""
The sweep behind make reproduce, make table and make figure: runs the scripts as a user would, collects their csv files
in one, prints one table and the heat maps. What is there already is not run again.

    python -m results.reproduce --scale tiny                                        # the headline, one seed
    python -m results.reproduce --scale tiny --seeds 1,2,3 --table ablations        # results/tiny.csv, and the figure with --plot
    python -m results.reproduce --scale tiny --seeds 1,2,3 --table encodings        # results/tiny-encodings.csv: every encoding, every extension
"""
import glob
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest

from data import io
from model import ENCODINGS
from eval_passkey import heat_map

SCALES = dict(
    # the same path in under a minute, for the tests: nothing is learned
    toy=dict(L=128, tokens=(60_000, 60_000, 200_000), shape='--block_size 128 --n_layer 1 --n_embd 32 --n_inner 32 ', train='--steps 6 --batch_tokens 512 --eval_tokens 512 --log_every 3 --warmup 2',
             target=256, tune='--steps 2 --batch 2 --grid 1,1.2 --grid_batches 1', lengths='128,192,256', measure='--eval_tokens 256 --stride 64',
             passkey='--depths 2 --trials 1'),
    tiny=dict(L=256, tokens=(12_000_000, 4_000_000, 1_000_000), shape='', train='', target=1024, tune='', lengths='128,256,384,512,768,1024,1536,2048',
              measure='--eval_tokens 8192 --stride 64', passkey='--depths 10 --trials 10'),
)
# questions often, for most of the training; rarely, for the rest of it and for the extension; and in longer documents, for measuring past those
CORPORA = dict(passkey='--retrieval 0.5', passkey_rare='--retrieval 0.7 --gap 200 --seed 1', passkey_long='--retrieval 0.7 --gap 200 --seed 2 --longest 16384')
# what rows start from: flags of train.py, the run that it goes on from (if any), the corpus. Each has 3,000 steps in two parts:
# retrieval comes early where the question comes often, and reaches over the whole window where it comes rarely (results/README.md)
Run = namedtuple('Run', 'flags parent corpus', defaults=(None, 'passkey'))
RARE = '--steps 600 --warmup 60 --min_length 64 --lr 1e-3 --muon_lr 3e-3'
RUNS = {f'{pe}-often': Run(f'--pe {pe}') for pe in ENCODINGS} | {pe: Run(f'--pe {pe} {RARE}', f'{pe}-often', 'passkey_rare') for pe in ENCODINGS} | {
    # the last eighth without RoPE (DroPE)
    'rope-7-8': Run('--pe rope --steps 225 --warmup 60 --min_length 64 --lr 1e-3 --muon_lr 3e-3', 'rope-often', 'passkey_rare'),
    'drope': Run('--pe nope --steps 375 --warmup 60 --min_length 64 --lr 1e-3 --muon_lr 3e-3', 'rope-7-8', 'passkey_rare'),
    'drope-no-qk-norm': Run('--pe nope --no-qk_norm --steps 375 --warmup 60 --min_length 64 --lr 1e-3 --muon_lr 3e-3', 'rope-7-8', 'passkey_rare'),
}
# extend.py's method (None: the run as it is) and flags, the corpus it is extended on; then train.py's flags, where it is trained on
Row = namedtuple('Row', 'name run method extra corpus then', defaults=(None, '', 'passkey_rare', None))
HEADLINE = [
    Row('NoPE', 'nope'),
    Row('NoPE uniform', 'nope', 'uniform'),
    Row('NoPE head', 'nope', 'head'),
    Row('RoPE', 'rope'),
    Row('RoPE YaRN', 'rope', 'yarn'),
]
ABLATIONS = HEADLINE + [
    Row('RoPE head', 'rope', 'head'),
    Row('NoPE head, frequent questions', 'nope', 'head', corpus='passkey'),
    Row('NoPE head, from 1.0', 'nope', 'head', '--init 1.0'),
    Row('NoPE head, no focus', 'nope', 'head', '--no-focus'),
]
ON = '--length {target} --batch_tokens 8192 --micro_batch 8 --optimizer adamw --lr 3e-4 --warmup 20'       # the tokens of head tuning
EXTENSIONS = HEADLINE[:3] + [
    Row('NoPE uniform-log', 'nope', 'uniform-log'),
    Row('NoPE head-log', 'nope', 'head-log'),
    Row('learned', 'learned'),
    Row('sinusoidal', 'sinusoidal'),
    Row('T5', 't5'),
    Row('ALiBi', 'alibi'),
    Row('RoPE', 'rope'),
    Row('RoPE PI', 'rope', 'pi'),
    Row('RoPE NTK', 'rope', 'ntk'),
    Row('RoPE dynamic NTK', 'rope', 'ntk-dynamic'),
    Row('RoPE YaRN', 'rope', 'yarn'),
    Row('RoPE LongRoPE', 'rope', 'longrope', '--population 16 --iterations 10'),
    Row('RoPE PI, trained on', 'rope', 'pi', then=f'{ON} --steps 200'),
    Row('RoPE PI, trained on 5x', 'rope', 'pi', then=f'{ON} --steps 1000'),
    Row('RoPE YaRN, trained on', 'rope', 'yarn', then=f'{ON} --steps 200'),
    Row('RoPE YaRN, trained on 5x', 'rope', 'yarn', then=f'{ON} --steps 1000'),
    Row('DroPE', 'drope'),
    Row('DroPE uniform', 'drope', 'uniform'),
    Row('DroPE head', 'drope', 'head'),
    Row('DroPE head-log', 'drope', 'head-log'),
    Row('DroPE, no QK-norm', 'drope-no-qk-norm'),
    Row('DroPE uniform, no QK-norm', 'drope-no-qk-norm', 'uniform'),
]
TABLES = dict(headline=HEADLINE, ablations=ABLATIONS, encodings=EXTENSIONS)


def run(script, flags, threads=None, log=None):
    """One command, shown as it would be typed."""
    print(f'\n$ {f"OMP_NUM_THREADS={threads} " if threads else ""}python {script} {flags}' + (f' > {log}' if log else ''), flush=True)
    code = subprocess.call([sys.executable] + shlex.split(f'{script} {flags}'), stdout=open(log, 'a') if log else None,
                           env=dict(os.environ, OMP_NUM_THREADS=str(threads)) if threads else None)
    if code:
        sys.exit(code)


def train(runs):
    """{folder: flags}: trains them side by side, each with its share of the cores; the first is seen, the others write to FOLDER.txt."""
    cores = os.cpu_count() or 1
    with ThreadPoolExecutor(max(1, min(len(runs), cores))) as pool:
        for folder in runs:
            os.makedirs(os.path.dirname(folder), exist_ok=True)
        for done in [pool.submit(run, 'train.py', f'{flags} --out {folder}', max(1, cores // len(runs)), f'{folder}.txt' if i else None)
                     for i, (folder, flags) in enumerate(runs.items())]:
            done.result()


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
            if any(cells):
                fewer = f' ({len(cells[0])} of {len(seeds)} seeds)' if len(cells[0]) < len(seeds) else ''
                out.append(f'| {name}{fewer} | ' + ' | '.join(mean_sd(c, digits) if c else '' for c in cells) + ' |')
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
            if any(cells):
                at = [i for i, c in enumerate(cells) if c]
                line, = ax.plot(at, [statistics.mean(cells[i]) for i in at], marker='o', label=name)
                ax.fill_between(at, [min(cells[i]) for i in at], [max(cells[i]) for i in at], color=line.get_color(), alpha=0.15)
        ax.axvline(lengths.index(L), color='black', linestyle='--', linewidth=1)
        ax.set_xticks(range(len(lengths)), [f'{n / L:g}x\n{n}' for n in lengths])
        ax.set(xlabel='length (dashed: training length)', ylabel=label)
    axes[0].legend()
    fig.savefig(file, dpi=130)
    print(file)


def plot_entropy(todo, out, seed, L, file):
    """The paper's explanation, of one seed: entropy by position (mean over heads, and each head), the temperatures that bend it back."""
    plt = io.pyplot(file)
    found = [(r, f) for r in todo for f in glob.glob(f'{where(out, r.run, seed, r.name)}/*.entropy.csv')]
    if not found:
        return print(f'{file} needs the runs of seed {seed} in {out}: not drawn')
    tuned = [(r, f.replace('.entropy.csv', '.pt')) for r, f in found if r.method in ('head', 'head-log') and not r.then]
    fig, axes = plt.subplots(1, 1 + len(tuned), figsize=(6 + 3 * len(tuned), 4), layout='constrained', width_ratios=[2] + [1] * len(tuned), squeeze=False)
    for r, f in found:
        by_pos = {}
        for e in io.read_csv(f):
            by_pos.setdefault(int(e['position']), []).append(float(e['entropy']))
        line, = axes[0, 0].plot(list(by_pos), [statistics.mean(v) for v in by_pos.values()], label=r.name)
        if not r.method:                             # the spread over heads, where it does not hide the rest
            axes[0, 0].plot(list(by_pos), list(by_pos.values()), color=line.get_color(), alpha=0.25, linewidth=0.7)
    axes[0, 0].axvline(L, color='black', linestyle='--', linewidth=1)
    axes[0, 0].set(xlabel='position (dashed: training length)', ylabel='attention entropy (nats)', xscale='log')
    axes[0, 0].legend(fontsize='small')
    for ax, (r, ckpt) in zip(axes[0, 1:], tuned):
        what = 'slopes' if r.method.endswith('-log') else 'heads'
        grid = io.load_checkpoint(ckpt)['extended'][what]
        fig.colorbar(ax.imshow(grid, cmap='viridis', aspect='auto'), ax=ax)
        ax.set(xlabel='head', ylabel='layer', xticks=range(len(grid[0])), yticks=range(len(grid)), title=f'{r.name}: {"slope" if what == "slopes" else "temperature"}')
    fig.savefig(file, dpi=130)
    print(file)


def main():
    p = io.parser(__doc__)
    p.add_argument('--scale', default='tiny')
    p.add_argument('--table', choices=TABLES, default='headline', help='ablations: and what takes the method apart; encodings: every encoding, every extension')
    p.add_argument('--seeds', type=io.int_list, default=[1])
    p.add_argument('--out', default='out', help='folder for data and runs')
    p.add_argument('--plot', metavar='FILE.png', help='draw loss and passkey accuracy by length, and in FILE-entropy.png attention entropy of the first seed')
    p.add_argument('--csv', help='where the rows go (default: headline OUT/SCALE/table.csv, ablations results/SCALE.csv, encodings results/SCALE-encodings.csv)')
    args = p.parse_args()
    if args.scale not in SCALES:
        io.fail(f'SCALE={args.scale} is not here: one of {" ".join(SCALES)}')
    if args.plot:
        io.pyplot(args.plot)
    scale, out, todo, start = SCALES[args.scale], f'{args.out}/{args.scale}', TABLES[args.table], time.time()
    file = args.csv or dict(headline=f'{out}/table.csv', ablations=f'results/{args.scale}.csv', encodings=f'results/{args.scale}-encodings.csv')[args.table]
    L, target, names = scale['L'], scale['target'], [r.name for r in todo]
    lengths, measured_on = io.int_list(scale['lengths']), 'passkey_rare'
    if args.table == 'encodings':                    # up to 16 times, on documents that are as long
        lengths, measured_on = lengths + [16 * L], 'passkey_long'
    # what makes each row: in the csv too, so that a row which other flags made is made again
    trained = {name: f'{"" if r.parent else "--preset tiny "}{r.flags} --dtype fp32 {scale["train"] if r.parent else scale["shape"] + scale["train"]}'.strip() for name, r in RUNS.items()}
    line = lambda name: (line(RUNS[name].parent) if RUNS[name].parent else []) + [name]          # a run, after those that it goes on from
    extend = {r.name: f'--method {r.method} --length {target} --dtype fp32 {scale["tune"]} {r.extra}'.strip() for r in todo}
    then = {r.name: f'{r.then.format(target=target)} --dtype fp32 {scale["train"]}'.strip() for r in todo if r.then}
    flags = {}
    for r in todo:
        parts = [f'{trained[name]} on {RUNS[name].corpus}' for name in line(r.run)]
        parts += [f'{extend[r.name]} on {r.corpus}'] * bool(r.method) + ([then[r.name]] if r.then else [])
        flags[r.name] = ' | '.join(parts + [f'--lengths {",".join(map(str, lengths))} --dtype fp32 {scale["measure"]} {scale["passkey"]}' + f' on {measured_on}' * (measured_on != 'passkey_rare')])
    done = [d for d in io.read_csv(file) if d['row'] not in flags or d.get('flags') == flags[d['row']]]
    missing = {seed: [r for r in todo if not any(d['row'] == r.name and int(d['seed']) == seed for d in done)] for seed in args.seeds}
    for (corpus, options), tokens in zip(CORPORA.items(), scale['tokens']):
        if any(missing.values()) and corpus in ('passkey', 'passkey_rare', measured_on) and not os.path.exists(f'{out}/{corpus}/meta.json'):
            run('-m data.passkey.prepare', f'--out {out}/{corpus} --tokens {tokens} {options}')

    def measure(ckpt, folder, lengths):
        """{length: (loss, [hits])} of a checkpoint."""
        common = f'--lengths {",".join(map(str, lengths))} --dtype fp32'
        run('extend.py', f'--ckpt {ckpt} --data {out}/{measured_on} --method none {common} --out {folder} {scale["measure"]}')
        run('eval_passkey.py', f'--ckpt {ckpt} {common} --out {folder} {scale["passkey"]}')
        ppl, pk = (io.read_csv(f'{folder}/{io.stem(ckpt)}.{what}.csv') for what in ('ppl', 'passkey'))
        return {int(row['length']): (float(row['nll']), [int(r['accuracy']) for r in pk if r['length'] == row['length']]) for row in ppl}

    for seed in args.seeds:
        left = missing[seed]
        if len(left) < len(todo):
            print(f'seed {seed}: {len(todo) - len(left)} of {len(todo)} rows are in {file} already')
        # --resume: a sweep that was stopped goes on where it was, and a finished run costs a few seconds
        for generation in zip_longest(*(line(r.run) for r in left)):
            train({f'{out}/{name}-{seed}': (f'--init_from {out}/{RUNS[name].parent}-{seed} ' if RUNS[name].parent else '')
                   + f'{trained[name]} --data {out}/{RUNS[name].corpus} --seed {seed} --resume' for name in dict.fromkeys(generation) if name})
        for r in left:
            began, ckpt, folder = time.time(), f'{out}/{r.run}-{seed}', where(out, r.run, seed, r.name)
            cells = {}
            if r.method == 'ntk-dynamic':            # the static one, anew for each length; the longest stays, so that the tokens are the same
                for n in lengths:
                    at = ckpt
                    if n > L:
                        run('extend.py', f'--ckpt {ckpt} --data {out}/{r.corpus} {extend[r.name].replace("-dynamic", "")} --length {n} --out {folder} --eval_tokens 0')
                        at = f'{folder}/ntk-{n}.pt'
                    cells[n] = measure(at, folder, sorted({n, lengths[-1]}))[n]
            else:
                if r.method:
                    run('extend.py', f'--ckpt {ckpt} --data {out}/{r.corpus} {extend[r.name]} --out {folder} --eval_tokens 0')
                    ckpt = f'{folder}/{r.method}-{target}.pt'
                if r.then:
                    run('train.py', f'--init_from {ckpt} {then[r.name]} --data {out}/{r.corpus} --seed {seed} --resume --out {folder}/on')
                    ckpt = f'{folder}/on'
                cells = measure(ckpt, folder, [n for n in lengths if n <= L or r.run != 'learned'])          # its table ends
            done += [dict(seed=seed, row=r.name, length=n, loss=f'{loss:.4f}', passkey=f'{sum(hits) / len(hits):.4f}', prompts=len(hits),
                          seconds=f'{time.time() - began:.0f}', flags=flags[r.name]) for n, (loss, hits) in cells.items()]
            io.write_csv(file, done)
    for r in HEADLINE:                               # the first seed's; the others are in the same folders
        folder = where(out, r.run, args.seeds[0], r.name)
        for f in sorted(os.listdir(folder)) if os.path.isdir(folder) else ():
            if f.endswith('.passkey.csv'):
                print(f'\n{r.name}, seed {args.seeds[0]}: passkey accuracy\n' + heat_map(
                    [{k: float(v) if k != 'length' else int(v) for k, v in row.items()} for row in io.read_csv(f'{folder}/{f}')], L))
    print('\n' + table([d for d in done if int(d['seed']) in args.seeds], names, lengths, L))
    if args.plot:
        plot(done, names, lengths, L, args.plot)
        plot_entropy(todo, out, args.seeds[0], L, '-entropy'.join(os.path.splitext(args.plot)))
    print(f'\n{file}; {time.time() - start:.0f} s')


if __name__ == '__main__':
    main()
