"""
The sweep behind make reproduce, make table and make figure: runs the scripts as a user would, collects their csv files
in one, prints one table and the heat maps. What is there already is not run again.

    python -m results.reproduce --scale tiny                                        # the headline, one seed
    python -m results.reproduce --scale tiny --seeds 1,2,3 --table ablations --dtype fp32 --out out/fp32        # results/tiny.csv, and the figure with --plot
    python -m results.reproduce --scale tiny --seeds 1,2,3 --table encodings --dtype fp32 --out out/fp32        # results/tiny-encodings.csv: every encoding, every extension
    python -m results.reproduce --scale small --text ~/books                        # one GPU, real text; without --text FineWeb-Edu and PG19, downloaded
    python -m results.reproduce --scale paper                                       # eight GPUs, days
"""
import glob
import json
import math
import os
import re
import shlex
import statistics
import subprocess
import sys
import threading
import time
import zlib
from collections import deque, namedtuple
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import nullcontext
from functools import partial

import torch

from data import io
from model import ENCODINGS
from eval_passkey import draw, heat_map

# questions often, for most of the training; rarely, for the rest of it and for the extension; and in longer documents, for measuring past those
CORPORA = dict(passkey='--retrieval 0.5', passkey_rare='--retrieval 0.7 --gap 200 --seed 1', passkey_long='--retrieval 0.7 --gap 200 --seed 2 --longest 16384')
# what rows start from: flags of train.py, the run that it goes on from (if any), the corpus. Each has 3,000 steps in two parts:
# retrieval comes early where the question comes often, and reaches over the whole window where it comes rarely (results/README.md)
Run = namedtuple('Run', 'flags parent corpus', defaults=(None, 'passkey'))
RARE = '--steps 600 --warmup 60 --min_length 64 --lr 1e-3 --muon_lr 3e-3'
RUNS = {f'{pe}-often': Run(f'--pe {pe}') for pe in ENCODINGS} | {pe: Run(f'--pe {pe} {RARE}', f'{pe}-often', 'passkey_rare') for pe in ENCODINGS} | {
    # the last eighth without RoPE (DroPE), at the rates of the first part
    'rope-7-8': Run('--pe rope --steps 225 --warmup 60 --min_length 64 --lr 1e-3 --muon_lr 3e-3', 'rope-often', 'passkey_rare'),
    'drope': Run('--pe nope --steps 375 --warmup 60 --min_length 64', 'rope-7-8', 'passkey_rare'),
    'drope-no-qk-norm': Run('--pe nope --no-qk_norm --steps 375 --warmup 60 --min_length 64', 'rope-7-8', 'passkey_rare'),
}
# extend.py's method (None: the run as it is) and flags, the corpus it is extended on; then train.py's flags, where it is trained on
Row = namedtuple('Row', 'name run method extra corpus then', defaults=(None, '', 'passkey_rare', None))
HEADLINE = [
    Row('NoPE', 'nope'),
    Row('NoPE uniform', 'nope', 'uniform'),
    Row('NoPE head', 'nope', 'head'),
    Row('RoPE', 'rope'),
]
ABLATIONS = HEADLINE + [
    Row('RoPE YaRN', 'rope', 'yarn'),
    Row('RoPE head', 'rope', 'head'),
    Row('NoPE head, frequent questions', 'nope', 'head', corpus='passkey'),
    Row('NoPE head, from 1.0', 'nope', 'head', '--init 1.0'),
    Row('NoPE head, no focus', 'nope', 'head', '--no-focus'),
]
ON = '--length {target} --batch_tokens 8192 --micro_batch 8 --optimizer adamw --lr 3e-4 --warmup 20'       # the tokens of head tuning
EXTENSIONS = HEADLINE[:3] + [
    Row('NoPE uniform-log', 'nope', 'uniform-log'),
    Row('NoPE head-log', 'nope', 'head-log'),
    Row('NoPE head, tuned at 2x', 'nope', 'head', '--length 512'),
    Row('NoPE head-log, tuned at 2x', 'nope', 'head-log', '--length 512'),
    Row('NoPE head, tuned at 8x', 'nope', 'head', '--length 2048'),
    Row('NoPE head-log, tuned at 8x', 'nope', 'head-log', '--length 2048'),
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
GROUPS = {                                           # columns of its figure
    'position encodings': ('NoPE', 'learned', 'sinusoidal', 'T5', 'ALiBi', 'RoPE'),
    'NoPE, sharpened': ('NoPE', 'NoPE uniform', 'NoPE uniform-log', 'NoPE head', 'NoPE head-log'),
    'NoPE, tuned at 2x and 8x': ('NoPE', 'NoPE head, tuned at 2x', 'NoPE head-log, tuned at 2x', 'NoPE head, tuned at 8x', 'NoPE head-log, tuned at 8x'),
    'RoPE, stretched': ('RoPE', 'RoPE PI', 'RoPE NTK', 'RoPE dynamic NTK', 'RoPE YaRN', 'RoPE LongRoPE'),
    'RoPE, stretched and trained on': ('RoPE YaRN', 'RoPE PI, trained on', 'RoPE PI, trained on 5x', 'RoPE YaRN, trained on', 'RoPE YaRN, trained on 5x'),
    'DroPE beside YaRN': ('RoPE YaRN', 'DroPE', 'DroPE uniform', 'DroPE head', 'DroPE head-log', 'DroPE, no QK-norm', 'DroPE uniform, no QK-norm'),
}
MAIN = ('NoPE', 'NoPE uniform', 'NoPE head', 'NoPE head-log', 'RoPE', 'RoPE YaRN', 'DroPE uniform')
TABLES = dict(headline=HEADLINE, ablations=ABLATIONS, encodings=EXTENSIONS)

# real text, small: NoPE, RoPE, and DroPE from the finished RoPE (an eighth of its tokens more)
SMALL = {'nope': Run('--pe nope --steps {steps}', None, 'text'), 'rope': Run('--pe rope --steps {steps}', None, 'text'), 'drope': Run('--pe nope --lr 1e-3 --steps {eighth} --warmup {warmup}', 'rope', 'text')}
REAL = [Row(*r, 'text') for r in (
    ('NoPE', 'nope', None, ''), ('NoPE uniform', 'nope', 'uniform', ''), ('NoPE head', 'nope', 'head', ''), ('NoPE head-log', 'nope', 'head-log', ''),
    ('RoPE', 'rope', None, ''), ('RoPE YaRN', 'rope', 'yarn', ''), ('DroPE', 'drope', None, ''), ('DroPE uniform', 'drope', 'uniform', ''))]
# Wang et al. 2024: NoPE and RoPE on 105B tokens, temperatures from the best uniform ones that they name
PAPER = [Row(*r, 'text') for r in (
    ('NoPE', 'nope', None, ''), ('NoPE head, 4K', 'nope', 'head', '--length 4096'), ('NoPE head, 8K', 'nope', 'head', '--length 8192 --init 1.6'),
    ('NoPE head, 18K', 'nope', 'head', '--length 18432 --init 1.7'), ('RoPE', 'rope', None, ''), ('RoPE YaRN, 16K', 'rope', 'yarn', '--length 16384'))]
TEXT = dict(L=1024, runs=SMALL, rows=REAL, dtype='auto', processes=1, shape='', target=4096, lengths='512,1024,1536,2048,3072,4096,6144,8192,16384')
TINY = dict(preset='tiny', dtype='fp32', runs=RUNS, corpora=CORPORA, processes=1)
SCALES = dict(
    # the same path in under a minute, for the tests: nothing is learned
    toy=dict(TINY, L=128, tokens=(60_000, 60_000, 200_000), shape='--block_size 128 --n_layer 1 --n_embd 32 --n_inner 32 ', train='--steps 6 --batch_tokens 512 --eval_tokens 512 --log_every 3 --warmup 2',
             target=256, tune='--steps 2 --batch 2 --grid 1,1.2 --grid_batches 1', lengths='128,192,256', measure='--eval_tokens 256 --stride 64',
             passkey='--depths 2 --trials 1'),
    tiny=dict(TINY, L=256, tokens=(12_000_000, 4_000_000, 1_000_000), shape='', train='', target=1024, tune='', lengths='128,256,384,512,768,1024,1536,2048',
              measure='--eval_tokens 8192 --stride 64', passkey='--depths 10 --trials 10',
              headline=dict(measure='--eval_tokens 4096 --stride 64', passkey='--depths 10 --trials 5')),          # the newcomer's run
    # one GPU, under an hour (an estimate: not run yet)
    small=dict(TEXT, preset='small', steps=5000, tokenizer='gpt2', tokens=700_000_000, train='', tune='--micro_batch 2', measure='--eval_tokens 131072 --stride 256', passkey='--depths 10 --trials 5'),
    # its rehearsal on CPU
    small_toy=dict(TEXT, preset='small', dtype='fp32', steps=16, tokenizer='bytes', tokens=200_000, L=320, shape='--block_size 320 --n_layer 1 --n_head 2 --n_kv_head 1 --n_embd 32 --n_inner 48 ',
                   train='--batch_tokens 640 --micro_batch 2 --eval_tokens 640', target=640, tune='--steps 2 --batch 2 --grid 1,1.2 --grid_batches 1',
                   lengths='320,640,1280', measure='--eval_tokens 512 --stride 64', passkey='--depths 2 --trials 1'),
    # eight GPUs, days (not run yet)
    paper=dict(TEXT, about='50,000 steps of 2,097,152 tokens for NoPE, the same for RoPE: 57 hours each on 8 GPUs if one makes 64,000 tokens a second (never measured), then temperatures and\n'
               'measuring, an hour. lr 3.5e-4 from step 2,000 on; its cosine would end at step 1,430,512, as TinyLlama\'s, so at 50,000 it is still 99.7 % of that. The commands, after the data:',
                preset='tinyllama', processes=8, steps=50_000, tokenizer='hf:TinyLlama-NoPE-1.1B', tokens=106_000_000_000, rows=PAPER, L=2048, train='', target=8192, tune='--lr 0.1',
               lengths='1024,2048,4096,8192,16384', measure='--eval_tokens 2097152 --stride 256 --protocol paper', passkey='--depths 10 --trials 10'),
)


def command(script, flags, processes=1):
    """As it would be typed."""
    return 'python ' + f'-m torch.distributed.run --standalone --nproc_per_node={processes} ' * (processes > 1 and script.endswith('.py')) + f'{script} {flags}'


def run(script, flags, threads=None, log=None, processes=1):
    """One command, shown; with a log it speaks there, and only its last line is said where it fails."""
    line = command(script, flags, processes)
    print(f'\n$ {f"OMP_NUM_THREADS={threads} " if threads else ""}{line}' + (f' >> {log} 2>&1' if log else ''), flush=True)
    with open(log, 'a') if log else nullcontext() as out:
        code = subprocess.call([sys.executable] + shlex.split(line)[1:], stdout=out, stderr=log and subprocess.STDOUT,
                               env=dict(os.environ, OMP_NUM_THREADS=str(threads)) if threads else None)
    if code:
        if log:
            with open(log, errors='replace') as f:
                print(f'{log}:', *deque(f, 1), file=sys.stderr)
        sys.exit(code)


def side_by_side(jobs, workers):
    """
    Calls each job(threads, seen), which returns a result and the jobs that waited for it, and yields the results as they
    end. `workers` at a time, each with its share of the cores; one of them is seen. Where one fails none begins any more,
    and what is running still counts.
    """
    if workers == 1:
        queue = deque(jobs)
        while queue:
            result, then = queue.popleft()(None, True)
            queue.extend(then)
            if result:
                yield result
        return
    threads, failed, screen = (os.cpu_count() or 1) // workers, [], threading.Lock()

    def one(job):
        if failed:
            return None, ()
        seen = screen.acquire(blocking=False)
        try:
            return job(threads, seen)
        except BaseException as e:
            failed.append(e)
            return None, ()
        finally:
            if seen:
                screen.release()
    with ThreadPoolExecutor(workers) as pool:
        running = {pool.submit(one, job) for job in jobs}
        try:
            while running:
                ended, running = wait(running, return_when=FIRST_COMPLETED)
                for result, then in (end.result() for end in ended):
                    running |= {pool.submit(one, job) for job in then}
                    if result:
                        yield result
        except BaseException as e:                   # Ctrl-C
            failed.append(e)
            raise
    if failed:
        raise failed[0]


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
    once = [r for r in rows if int(r['length']) == lengths[0] and int(r['tokens'] or 0)]        # one a seed
    cost = {name: [r for r in once if r['row'] == name] for name in order}
    if once:
        out += ['', '| what extending cost | tokens | seconds |', '|---|---|---|']
        out += [f'| {name} | {int(found[0]["tokens"]):,} | {mean_sd([float(r["extended_s"]) for r in found], 0)} |' for name, found in cost.items() if found]
    return '\n'.join(out)


def where(out, base, seed, name):
    """Folder of a row's results: out/tiny, nope, 1, 'NoPE head, no focus' -> out/tiny/nope-1/nope-head-no-focus."""
    return f'{out}/{base}-{seed}/{name.replace(",", "").replace(" ", "-").lower()}'


def csv_of(table, scale, out):
    """Where the rows of a table go."""
    return f'{out}/{scale}/table.csv' if table == 'headline' else f'results/{scale}{"-encodings" * (table == "encodings")}.csv'


def plot(rows, groups, lengths, L, file):
    """groups: {title: names of rows}: passkey accuracy and, below it, loss by length, mean and range of the seeds; three groups side by side."""
    plt = io.pyplot(file)
    one = len(groups) == 1
    fig, axes = plt.subplots(*(1, 2) if one else (2 * math.ceil(len(groups) / 3), 3), figsize=(11, 4) if one else (13, 6.5 * math.ceil(len(groups) / 3)), layout='constrained', squeeze=False, sharey='none' if one else 'row')
    seeds, highest = len({r['seed'] for r in rows}), 4 * min(float(r['loss']) for r in rows)
    columns = axes if one else [column for i in range(0, len(axes), 2) for column in axes[i:i + 2].T]
    for k, (column, (title, names)) in enumerate(zip(columns, groups.items())):
        for ax, key, label in zip(column, ('passkey', 'loss'), ('passkey accuracy', 'loss (nats a token)')):
            for name in names:
                cells = [[float(r[key]) for r in rows if (r['row'], int(r['length'])) == (name, n)] for n in lengths]
                if any(cells):
                    at = [i for i, c in enumerate(cells) if c]
                    fewer = f' ({max(map(len, cells))} of {seeds} seeds)' if max(map(len, cells)) < seeds else ''
                    line, = ax.plot(at, [statistics.mean(cells[i]) for i in at], marker='.', label=name + fewer)
                    ax.fill_between(at, [min(cells[i]) for i in at], [max(cells[i]) for i in at], color=line.get_color(), alpha=0.15)
            ax.axvline(lengths.index(L), color='black', linestyle='--', linewidth=1)
            ax.set_xticks(range(len(lengths)), [f'{n / L:g}' for n in lengths])
            ax.set(xlabel='length / training length', ylabel=label if one or k % 3 == 0 else '', title=title if ax is column[0] else '')
        if column[1].get_ylim()[1] > highest:
            column[1].set_ylim(top=highest)
        if column[0].get_legend_handles_labels()[0]:
            column[0].legend(fontsize='small')
    fig.savefig(file, dpi=130)
    print(file)


def plot_heat_maps(todo, out, seed, L, file):
    """Passkey accuracy by length and depth of these rows, one seed."""
    plt = io.pyplot(file)
    found = {r.name: f for r in todo for f in glob.glob(f'{where(out, r.run, seed, r.name)}/*.passkey.csv')}
    if not found:
        return print(f'{file} needs the runs of seed {seed} in {out}: not drawn')
    fig, axes = plt.subplots(1, len(found), figsize=(3.2 * len(found), 3.4), layout='constrained', squeeze=False)
    for ax, (name, f) in zip(axes[0], found.items()):
        draw(ax, [{k: float(r[k]) for k in ('length', 'depth', 'accuracy')} for r in io.read_csv(f)], L, name)
    fig.savefig(file, dpi=130)
    print(file)


def plot_entropy(todo, out, seed, L, file):
    """The paper's explanation, of one seed: entropy by position (mean over heads, and each head), the temperatures that lower it."""
    plt = io.pyplot(file)
    found = [(r, f) for r in todo for f in glob.glob(f'{where(out, r.run, seed, r.name)}/*.entropy.csv')]
    if not found:
        return print(f'{file} needs the runs of seed {seed} in {out}: not drawn')
    tuned = [(r, f.replace('.entropy.csv', '.pt')) for r, f in found if r.method in ('head', 'head-log')]
    fig, axes = plt.subplots(1, 1 + len(tuned), figsize=(6 + 3 * len(tuned), 4), layout='constrained', width_ratios=[2] + [1] * len(tuned), squeeze=False)
    for r, f in found:
        by_pos = {}
        for e in io.read_csv(f):
            by_pos.setdefault(int(e['position']), []).append(float(e['entropy']))
        line, = axes[0, 0].plot(list(by_pos), [statistics.mean(v) for v in by_pos.values()], label=r.name)
        if not r.method:                             # the spread over heads, where it does not hide the rest
            axes[0, 0].plot(list(by_pos), list(by_pos.values()), color=line.get_color(), alpha=0.25, linewidth=0.7)
    axes[0, 0].axvline(L, color='black', linestyle='--', linewidth=1)
    axes[0, 0].set(xlabel='position (dashed: training length)', ylabel='attention entropy (nats)')
    axes[0, 0].set_xscale('log', base=2)
    axes[0, 0].legend(fontsize='small', loc='lower right')
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
    p.add_argument('--dtype', choices=('auto', 'fp32'), default='auto', help='of training; the tables of results/ are fp32. Scales toy and tiny extend and measure in fp32')
    p.add_argument('--out', default='out', help='folder for data and runs')
    p.add_argument('--text', metavar='DIR', help='scales small and paper: train and measure on these text files, one file a document (default: downloaded corpora)')
    p.add_argument('--tokenizer', help='of that text (default: gpt2; for paper hf:TinyLlama-NoPE-1.1B)')
    p.add_argument('--plot', metavar='FILE.png', help='draw loss and passkey accuracy by length; of the first seed attention entropy in FILE-entropy.png, passkey by depth in FILE-passkey.png')
    p.add_argument('--no_run', action='store_true', help='run nothing: table and figures of what the csv has')
    p.add_argument('--csv', help='where the rows go (default: headline OUT/SCALE/table.csv, ablations results/SCALE.csv, encodings results/SCALE-encodings.csv)')
    args = p.parse_args()
    if args.scale not in SCALES:
        io.fail(f'SCALE={args.scale} is not here: one of {" ".join(SCALES)}')
    if 'corpora' not in SCALES[args.scale] and args.table != 'headline' or 'corpora' in SCALES[args.scale] and (args.text or args.tokenizer):
        io.fail('--table is for the scales toy and tiny, --text and --tokenizer are for the others')
    if args.plot:
        io.pyplot(args.plot)
    scale, out, todo, start = SCALES[args.scale], f'{args.out}/{args.scale}', TABLES[args.table], time.time()
    scale = scale | (scale.get('headline', {}) if args.table == 'headline' else {})
    file = args.csv or csv_of(args.table, args.scale, args.out)
    io.preflight(os.path.dirname(file) or '.', 0)
    todo = scale.get('rows', todo)                   # real text has one table
    L, target, names = scale['L'], scale['target'], [r.name for r in todo]
    lengths, dtype, processes = io.int_list(scale['lengths']), scale['dtype'], scale['processes']
    # bf16 where the CPU has it is 1.4 times faster to train in; which it was is in the csv
    precision = io.pick_dtype(args.dtype, 'cuda' if torch.cuda.is_available() else 'cpu')[0] if 'corpora' in scale else args.dtype
    if 'corpora' in scale:
        measured_on = 'passkey_rare'
        corpora = {name: ('passkey', f'--tokens {n} {options}') for (name, options), n in zip(scale['corpora'].items(), scale['tokens'])}
        if args.table == 'encodings':                # up to 16 times, on documents that are as long
            lengths, measured_on = lengths + [16 * L], 'passkey_long'
        corpora = {name: corpora[name] for name in ('passkey', 'passkey_rare', measured_on)}
    else:
        tokenizer = f'--tokenizer {args.tokenizer or scale["tokenizer"]}'
        measured_on = 'text' if args.text else 'pg19'
        corpora = dict(text=('text', f'{shlex.quote(args.text)} --val 0.05 {tokenizer}')) if args.text else dict(
            text=('slimpajama_starcoder' if args.scale == 'paper' else 'fineweb_edu', f'--tokens {scale["tokens"]} {tokenizer}'), pg19=('pg19', tokenizer))
    # the synthetic corpora are known by their names; what a text is, the folder's name and the csv must tell
    folder_of = {name: name if 'corpora' in scale else f'{name}-{zlib.crc32(repr(command).encode()):08x}' for name, command in corpora.items()}
    known = {name: name if 'corpora' in scale else ' '.join(command) for name, command in corpora.items()}
    # what makes each row: in the csv too, so that a row which other flags made is made again
    runs, steps = scale['runs'], scale.get('steps', 0)
    own = {name: r.flags.format(steps=steps, eighth=steps // 8, warmup=steps // 80) for name, r in runs.items()}
    preset = f'--preset {scale["preset"]} '
    trained = {name: f'{"" if r.parent else preset}{own[name]} --dtype {precision} {scale["train"] if r.parent else scale["shape"] + scale["train"]}'.strip() for name, r in runs.items()}
    line = lambda name: (line(runs[name].parent) if runs[name].parent else []) + [name]          # a run, after those that it goes on from
    extend = {r.name: f'--method {r.method} --length {target} --dtype {dtype} {scale["tune"]} {r.extra}'.strip() for r in todo}
    then = {r.name: f'{r.then.format(target=target)} --dtype {precision} {scale["train"]}'.strip() for r in todo if r.then}
    flags = {}
    for r in todo:
        parts = [f'{trained[name]} on {known.get(runs[name].corpus, runs[name].corpus)}' for name in line(r.run)]
        parts += [f'{extend[r.name]} on {r.corpus}'] * bool(r.method) + ([then[r.name]] if r.then else [])
        flags[r.name] = ' | '.join(parts + [f'--lengths {",".join(map(str, lengths))} --dtype {dtype} {scale["measure"]} {scale["passkey"]}' + f' on {known[measured_on]}' * (measured_on != 'passkey_rare')])
    done = [dict(tokens='', extended_s='') | d for d in io.read_csv(file) if d['row'] not in flags or d.get('flags') == flags[d['row']]]
    missing = {seed: [r for r in todo if not args.no_run and not any(d['row'] == r.name and int(d['seed']) == seed for d in done)] for seed in args.seeds}
    if args.no_run and not any(d['row'] in names for d in done):
        io.fail(f'{file} has no row of this table made with these flags: leave out --no_run')
    train_flags = lambda name, seed: (f'--init_from {out}/{runs[name].parent}-{seed} ' if runs[name].parent else '') + f'{trained[name]} --data {out}/{folder_of[runs[name].corpus]} --seed {seed} --resume'
    if any(missing.values()) and 'about' in scale:
        print(scale['about'])
        for name in dict.fromkeys(name for r in todo for name in line(r.run)):
            print(command('train.py', f'{train_flags(name, args.seeds[0])} --out {out}/{name}-{args.seeds[0]}', processes))
        for r in todo:
            if r.method:
                print(command('extend.py', f'--ckpt {out}/{r.run}-{args.seeds[0]} --data {out}/{folder_of[r.corpus]} {extend[r.name]}', processes))
    if any(missing.values()) and dtype == 'auto' and torch.cuda.device_count() < processes:
        io.fail(f'SCALE={args.scale} takes {processes} GPU of this machine, which has {torch.cuda.device_count()}; SCALE=tiny needs none')
    for corpus, (source, options) in corpora.items():
        if any(missing.values()) and not os.path.exists(f'{out}/{folder_of[corpus]}/meta.json'):
            run(f'-m data.{source}.prepare', f'--out {out}/{folder_of[corpus]} {options}')
    if any(missing.values()):                        # known before the hours
        longest, need = max(map(len, io.documents(*io.open_data(f'{out}/{folder_of[measured_on]}', 'val'), 'val'))), max(lengths) + 256
        if longest < need:
            io.fail(f'{out}/{folder_of[measured_on]}/val.bin: its longest document has {longest:,} tokens, the longest length takes {need:,}: give longer texts')

    for folder in {f'{out}/{name}-{seed}' for seed in args.seeds for r in missing[seed] for name in line(r.run)}:
        if 'corpora' in scale and io.find_checkpoint(folder) and (was := io.load_checkpoint(folder)['args']['dtype']) != precision:
            io.fail(f'{folder} was trained with --dtype {was}, this table takes {precision}: move that folder away, or give another --out')

    def make(r, seed, threads, seen):
        """Extends and measures a row of a seed -> its lines of the csv, and nothing that waits for them. What is not seen goes to FOLDER.txt."""
        began, ckpt, folder, tokens = time.time(), f'{out}/{r.run}-{seed}', where(out, r.run, seed, r.name), 0
        same = '' if 'paper' in scale['measure'] else f' --past {lengths[-1]}'           # the same tokens, where not every length is measured
        do = partial(run, threads=threads, log=None if seen else f'{folder}.txt', processes=processes)

        def measure(ckpt, lengths):
            """{length: (loss, [hits])} of a checkpoint."""
            common = f'--lengths {",".join(map(str, lengths))} --dtype {dtype}'
            do('extend.py', f'--ckpt {ckpt} --data {out}/{folder_of[measured_on]} --method none {common} --out {folder} {scale["measure"]}{same}')
            do('eval_passkey.py', f'--ckpt {ckpt} {common} --out {folder} {scale["passkey"]}')
            ppl, pk = (io.read_csv(f'{folder}/{io.stem(ckpt)}.{what}.csv') for what in ('paper.ppl' if 'paper' in scale['measure'] else 'ppl', 'passkey'))
            return {int(row['length']): (float(row['nll']), [int(r['accuracy']) for r in pk if r['length'] == row['length']]) for row in ppl}

        extended = 0
        if r.method == 'ntk-dynamic':                # the static one, anew for each length
            cells = measure(ckpt, [n for n in lengths if n <= L])
            for n in (n for n in lengths if n > L):
                do('extend.py', f'--ckpt {ckpt} --data {out}/{folder_of[r.corpus]} {extend[r.name].replace("-dynamic", "")} --length {n} --out {folder} --eval_tokens 0')
                cells |= measure(f'{folder}/ntk-{n}.pt', [n])
        else:
            if r.method:
                do('extend.py', f'--ckpt {ckpt} --data {out}/{folder_of[r.corpus]} {extend[r.name]} --out {folder} --eval_tokens 0')
                ckpt = f'{folder}/{r.method}-{re.findall("--length ([0-9]+)", extend[r.name])[-1]}.pt'
                how = io.load_checkpoint(ckpt)['extended']
                tokens, extended = how['tokens'], how['seconds']
            if r.then:
                do('train.py', f'--init_from {ckpt} {then[r.name]} --data {out}/{folder_of[r.corpus]} --seed {seed} --resume --out {folder}/on')
                ckpt = f'{folder}/on'
                more = io.load_checkpoint(ckpt)['tokens']
                with open(f'{ckpt}/log.jsonl') as f:             # it may have been resumed
                    speed = statistics.median(r['tok_s'] for r in map(json.loads, f) if 'tok_s' in r)
                tokens, extended = tokens + more, extended + more / speed
            cells = measure(ckpt, [n for n in lengths if n <= L or r.run != 'learned'])          # its table ends
        return [dict(seed=seed, row=r.name, length=n, loss=f'{loss:.4f}', passkey=f'{sum(hits) / len(hits):.4f}', prompts=len(hits), tokens=tokens,
                     extended_s=f'{extended:.0f}', seconds=f'{time.time() - began:.0f}', flags=flags[r.name]) for n, (loss, hits) in cells.items()], ()

    for seed in args.seeds:
        left = missing[seed]
        if len(left) < len(todo) and not args.no_run:
            print(f'seed {seed}: {len(todo) - len(left)} of {len(todo)} rows are in {file} already')
        # those that tune or train first: they take longest
        left = sorted(left, key=lambda r: (not r.then, r.method not in ('head', 'head-log', 'longrope')))
        runs_left = list(dict.fromkeys(name for r in left for name in line(r.run)))
        # side by side on CPU; on GPUs, which each needs whole, one after the other
        workers = 1 if processes > 1 or torch.cuda.is_available() else max(1, min(len(left), os.cpu_count() or 1))

        def train(name, threads, seen):
            """A run; then those that go on from it, and its rows. --resume: a sweep that was stopped goes on where it was."""
            folder = f'{out}/{name}-{seed}'
            run('train.py', f'{train_flags(name, seed)} --out {folder}', threads, None if seen else f'{folder}.txt', processes)
            return None, [partial(train, n) for n in runs_left if runs[n].parent == name] + [partial(make, r, seed) for r in left if r.run == name]

        os.makedirs(out, exist_ok=True)
        for n, new in enumerate(side_by_side([partial(train, n) for n in runs_left if not runs[n].parent], workers), 1):
            done = sorted(done + new, key=lambda d: (int(d['seed']), names.index(d['row']) if d['row'] in names else len(names)))
            io.write_csv(file, done)
            print(f'seed {seed}: {n} of {len(left)} rows measured', flush=True)
    for r in scale.get('rows', HEADLINE):            # the first seed's; the others are in the same folders
        folder = where(out, r.run, args.seeds[0], r.name)
        for f in sorted(os.listdir(folder)) if os.path.isdir(folder) else ():
            if f.endswith('.passkey.csv'):
                print(f'\n{r.name}, seed {args.seeds[0]}: passkey accuracy\n' + heat_map(
                    [{k: float(v) if k != 'length' else int(v) for k, v in row.items()} for row in io.read_csv(f'{folder}/{f}')], L))
    print('\n' + table([d for d in done if int(d['seed']) in args.seeds], names, lengths, L))
    if args.plot:
        shown = [r for r in todo if r.name in MAIN or args.table != 'ablations']
        plot([d for d in done if int(d['seed']) in args.seeds], GROUPS if args.table == 'encodings' else {'': [r.name for r in shown]}, lengths, L, args.plot)
        plot_entropy([r for r in shown if r.run in ('nope', 'rope') and r.method != 'ntk-dynamic' and not r.then and 'tuned at' not in r.name], out, args.seeds[0], L, '-entropy'.join(os.path.splitext(args.plot)))
        plot_heat_maps([r for r in todo if r.name in MAIN], out, args.seeds[0], L, '-passkey'.join(os.path.splitext(args.plot)))
    print(f'\n{file}; {time.time() - start:.0f} s')


if __name__ == '__main__':
    main()
