"""
Speed of training beside other trainers, and how the cost of each script grows. Each command writes a csv in results/.

    python -m results.bench --nanogpt ~/nanoGPT                                 # speed.csv
    python -m results.bench --nanogpt ~/nanoGPT --size tinyllama --steps 15     # speed-tinyllama.csv; a GPU of 80 GB
    python -m results.bench --costs                                             # costs.csv
    python -m results.bench --costs --preset tinyllama --lengths 2048,4096,8192,16384    # costs-tinyllama.csv; a GPU
    python -m results.bench --perplexity                     # perplexity-speed.csv; with --preset a file of its name
    python -m results.bench --passkey out/model                                 # passkey-speed.csv

speed: a training step of nanoGPT's train.py, of a Hugging Face Llama and of ours. Every trainer is a process of its
own, in turns, `--rounds` times over; the figure is the median step of a round. All train on the same tokens, 16 rows of
256 a step, with AdamW, at the same shape and number of parameters (SwiGLU of 8/3 of the width has as many as nanoGPT's
MLP of 4). nanoGPT runs as it comes, on CPU in fp32. of_product: the arithmetic of a step as a share of what this
machine does in that time where it only multiplies two large bf16 matrices, measured before each round.
--size tinyllama is 22 layers x 2048, 8 rows of 2,048 tokens, 32,000 of them in the vocabulary, ours on random ones;
with it comes our preset (NoPE, 4 KV heads), by rows in one forward pass, and with activation checkpointing.

costs: seconds and memory of one row in each script, by length and by model size, in fp32; those of a preset in bf16 and
compiled on a GPU. 200 steps of head tuning at 16K, 8 rows each, take 1,600 times what one row costs.

perplexity: measuring it beside bare forward passes over as many windows (of --preset, at --lengths).

passkey: the grid of eval_passkey.py beside transformers' generate, one prompt at a time.
"""
import importlib.util
import json
import math
import multiprocessing
import os
import pickle
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch

import eval_passkey
import extend
from data import measure
from data.checkpoint import frozen, load_checkpoint, load_model
from data.extension import Corpus
from data.figures import default_lengths, read_csv, write_csv
from data.hf import export
from data.log import used_memory
from data.runtime import compiled, fail, int_list, number, parser, positive_int, setup
from data.tokenizer import get_tokenizer
from model import GPT, PRESETS, GPTConfig

PASSKEY_VOCAB = get_tokenizer('passkey').n_vocab


def synchronize(env):
    """A GPU is asked to work and works later: a clock is read after this."""
    if 'cuda' in env.device:
        torch.cuda.synchronize()


def in_turns(rounds, *jobs):
    """Runs the jobs in turns, so that a busy moment hits all -> for each the median seconds, and its last result."""
    seconds = {job: [] for job in jobs}
    results = {}
    for _ in range(rounds):
        for job in jobs:
            start = time.time()
            results[job] = job()
            seconds[job].append(time.time() - start)
    return [(statistics.median(seconds[job]), results[job]) for job in jobs]


def watched(job):
    """-> what job() returns, and the most GB of the GPU that were in use meanwhile, by whoever."""
    seen, done = [0], threading.Event()

    def look():
        while not done.wait(0.1):
            free, total = torch.cuda.mem_get_info() if torch.cuda.is_available() else (0, 0)
            seen.append((total - free) / 1e9)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        return job(), max(seen)
    finally:
        done.set()
        thread.join()


# ---------------------------------------------------------------------------------------------------------------------
# speed of training

class Size(NamedTuple):
    """A model that every trainer can build, and the batch that it is trained on."""
    layers: int
    heads: int
    width: int
    vocab: int
    rows: int                    # a step
    length: int                  # tokens a row

    @property
    def inner(self):
        """Width of the SwiGLU: its three matrices have the parameters of two that are 4 widths wide."""
        return self.width * 8 // 3 // 8 * 8

    @property
    def tokens(self):
        """A step."""
        return self.rows * self.length

    @property
    def shape(self):
        """Fields of GPTConfig."""
        return dict(vocab_size=self.vocab, n_layer=self.layers, n_head=self.heads, n_kv_head=self.heads,
                    n_embd=self.width, n_inner=self.inner)


SIZES = dict(
    tiny=Size(layers=4, heads=4, width=128, vocab=PASSKEY_VOCAB, rows=16, length=256),
    small=Size(layers=6, heads=6, width=384, vocab=PASSKEY_VOCAB, rows=16, length=256),
    tinyllama=Size(layers=22, heads=32, width=2048, vocab=32000, rows=8, length=2048),
)
OURS = {
    'ours, fp32': '--pe rope --dtype fp32 --no-compile',
    'ours, bf16': '--pe rope --dtype bf16 --no-compile',
    'ours, fp32, compiled': '--pe rope --dtype fp32 --compile',
    'ours, bf16, compiled': '--pe rope --dtype bf16 --compile',
    'ours, fp32, Muon': '--pe rope --dtype fp32 --no-compile --optimizer muon',
    'ours, fp32, NoPE': '--pe nope --dtype fp32 --no-compile',
}
NEVER = 1_000_000                # updates between evaluations, which are no part of a step
NANOGPT_DATA = 'nanonope_bench'  # the folder in nanoGPT's data/ that our tokens go to


def contenders(args, tmp, size):
    """{name: (command, folder to run it in)} for one size."""
    shape = SIZES[size]
    found = {}
    if args.nanogpt:
        nanogpt = (f'{sys.executable} train.py --device={args.device} --dataset={NANOGPT_DATA} --out_dir={tmp}/nanogpt '
                   f'--max_iters={args.steps} --eval_interval={NEVER} --eval_iters=1 --log_interval=1 '
                   f'--batch_size={shape.rows} --block_size={shape.length} --gradient_accumulation_steps=1 '
                   f'--n_layer={shape.layers} --n_head={shape.heads} --n_embd={shape.width} --dropout=0.0')
        found['nanoGPT'] = f'{nanogpt} --compile=False', args.nanogpt
        found['nanoGPT, compiled'] = f'{nanogpt} --compile=True', args.nanogpt

    if importlib.util.find_spec('transformers'):
        llama = (f'{sys.executable} results/hf_llama.py --data {tmp}/data/train.bin --device {args.device} '
                 f'--vocab {shape.vocab} --layers {shape.layers} --heads {shape.heads} --width {shape.width} '
                 f'--inner {shape.inner} --rows {shape.rows} --length {shape.length} --steps {args.steps}')
        found['Hugging Face Llama, fp32'] = f'{llama} --dtype fp32', '.'
        found['Hugging Face Llama, bf16'] = f'{llama} --dtype bf16', '.'
    else:
        print('no transformers here: no row for the Hugging Face Llama')

    ours = (f'{sys.executable} train.py --out {tmp}/ours --device {args.device} --optimizer adamw '
            f'--steps {args.steps} --warmup 2 --batch_tokens {shape.tokens} '
            f'--eval_every {NEVER} --eval_tokens {shape.length} --log_every 1')
    if size == 'tinyllama':
        ours += ' --preset tinyllama --data random'
    else:
        ours += f' --preset tiny --no-qk_norm --data {tmp}/data'
    for name, flags in OURS.items():
        found[name] = (f'{ours} --micro_batch {shape.rows} --min_length {shape.length} --n_layer {shape.layers} '
                       f'--n_head {shape.heads} --n_kv_head {shape.heads} --n_embd {shape.width} '
                       f'--n_inner {shape.inner} {flags}', '.')

    if size == 'tinyllama':
        # fp32 is nobody's choice at this size; the preset as it is trained is somebody's
        found = {name: contender for name, contender in found.items() if 'fp32' not in name}
        preset = f'{ours} --dtype bf16 --compile'
        for rows in (4, 8):
            found[f'--preset tinyllama, {rows} rows at a time'] = f'{preset} --micro_batch {rows}', '.'
        found['--preset tinyllama, 8 rows at a time, activation checkpointing'] = \
            f'{preset} --micro_batch 8 --activation_checkpointing', '.'
    return found


def give_to_nanogpt(nanogpt, data, vocab):
    """Puts our tokens where nanoGPT's train.py looks for a dataset, in the form that it reads."""
    folder = f'{nanogpt}/data/{NANOGPT_DATA}'
    os.makedirs(folder, exist_ok=True)
    for split in ('train', 'val'):
        shutil.copyfile(f'{data}/{split}.bin', f'{folder}/{split}.bin')
    with open(f'{folder}/meta.pkl', 'wb') as f:
        pickle.dump(dict(vocab_size=vocab), f)


def settled(values):
    """The median of a run's steps without the first third, which warms up or compiles."""
    return statistics.median(values[len(values) // 3:])


def matrix_product(device):
    """FLOP/s of this machine in one large bf16 matrix product, which is the most that a training step could reach."""
    n = 8192 if 'cuda' in device else 1024
    a, b = torch.randn(2, n, n, device=device).bfloat16()
    shortest, rounds, began = math.inf, 0, time.perf_counter()
    # seconds each where the CPU has no bf16 instructions
    while rounds < 2 or rounds < 10 and time.perf_counter() - began < 1:
        start = time.perf_counter()
        a @ b
        synchronize(SimpleNamespace(device=device))
        shortest = min(shortest, time.perf_counter() - start)
        rounds += 1
    return 2 * n**3 / shortest


def step_flops(name, size):
    """Arithmetic of a contender's step. All have as many parameters, but for our preset."""
    shape = PRESETS['tinyllama'] if name.startswith('--preset') else SIZES[size].shape
    return SIZES[size].rows * expected('train', SIZES[size].length, shape)[0]


def lap(command, folder, out, tokens):
    """
    Runs a contender -> its milliseconds a step, and what only our log in `out` tells. RuntimeError where it fails: out
    of memory, say. tokens: of a step.
    """
    shutil.rmtree(out, ignore_errors=True)
    done = subprocess.run(command.split(), cwd=folder, capture_output=True, text=True)
    if done.returncode:
        errors = done.stderr.strip().splitlines() or [str(done.returncode)]
        raise RuntimeError(errors[-1])
    if not os.path.exists(f'{out}/log.jsonl'):
        ms = [float(text) for text in re.findall(r'time ([\d.]+)ms', done.stdout)]
        return settled(ms), dict(mem_gb='', mfu='')
    with open(f'{out}/log.jsonl') as f:
        steps = [line for line in map(json.loads, f) if 'tok_s' in line]
    ms = [1000 * tokens / line['tok_s'] for line in steps]
    last = steps[-1]
    mfu = ''
    if last['mfu']:                                  # where the peak of the device is known
        mfu = f'{settled([line["mfu"] for line in steps]):.3f}'
    return settled(ms), dict(mem_gb=f'{last["mem_gb"]:.1f}', mfu=mfu)


def race(args, tmp, size):
    """-> a row of the csv for each contender that ran to its end."""
    tokens = SIZES[size].tokens
    found = {}                   # name: milliseconds a step, of each round
    extras = {}                  # name: what only our log tells
    products = []                # FLOP/s, of each round
    entrants = contenders(args, tmp, size)
    for k in range(args.rounds):
        products.append(matrix_product(args.device))
        print(f'{size}, round {k + 1}, a bf16 matrix product: {products[-1] / 1e12:.3f} TFLOP/s', flush=True)
        for name, (command, folder) in entrants.items():
            try:
                ms, extras[name] = lap(command, folder, f'{tmp}/ours', tokens)
            except RuntimeError as e:                # the others count all the same
                print(f'{size}, round {k + 1}, {name}: {e}', flush=True)
                continue
            found.setdefault(name, []).append(ms)
            print(f'{size}, round {k + 1}, {name}: {ms:.1f} ms', flush=True)

    rows = []
    for name, ms in found.items():
        median = statistics.median(ms)
        to_nanogpt = ''
        if 'nanoGPT' in found:
            to_nanogpt = f'{statistics.median(found["nanoGPT"]) / median:.2f}'
        reached = step_flops(name, size) / (median / 1000)
        row = dict(size=size, trainer=name, ms=f'{median:.1f}', least=f'{min(ms):.1f}', most=f'{max(ms):.1f}',
                   rounds=len(ms), steps=args.steps, tok_s=f'{1000 * tokens / median:.0f}', to_nanogpt=to_nanogpt)
        rows.append(row | extras[name] | dict(of_product=f'{reached / statistics.median(products):.3f}'))
    return rows


def speed(args):
    file = 'results/speed-tinyllama.csv' if 'tinyllama' in args.size else 'results/speed.csv'
    kept = []
    for row in read_csv(file):
        if row['size'] not in args.size:
            row.setdefault('of_product', '')         # older rows have none
            kept.append(row)
    rows = []
    with tempfile.TemporaryDirectory() as tmp:
        prepare = [sys.executable, '-m', 'data.passkey.prepare', '--out', f'{tmp}/data', '--tokens', '1000000']
        subprocess.run(prepare, check=True)
        for size in args.size:
            if args.nanogpt:
                give_to_nanogpt(args.nanogpt, f'{tmp}/data', SIZES[size].vocab)
            rows += race(args, tmp, size)
            if rows:
                write_csv(file, sorted(kept + rows, key=lambda row: list(SIZES).index(row['size'])))
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# costs

SCRIPTS = ('train', 'tune', 'tune_checkpointing', 'perplexity', 'passkey', 'entropy')


def once(what, length, shape, dtype, answers):
    """
    Puts into the queue `answers` the seconds and the peak of memory, in MB, of one step, prompt or window of one row.
    shape: fields of GPTConfig. In a process of its own, since a peak is that of a process.
    """
    env = setup(SimpleNamespace(device='auto', dtype=dtype, seed=0))
    torch.manual_seed(0)
    args = SimpleNamespace(length=length, batch=1, micro_batch=1, seed=0, method='head', lr=0.05, steps=1, focus=True,
                           compile=None, activation_checkpointing=what.endswith('checkpointing'))
    model = GPT(GPTConfig(**shape))
    model = model.to(env.device) if what == 'train' else frozen(model, env)
    tok = get_tokenizer('passkey')
    ids = np.random.default_rng(0).integers(PASSKEY_VOCAB, size=4 * length + 64).astype(np.uint16)
    before = used_memory(env.device)
    if what == 'train':
        net = compiled(model, args, env)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step():
        if what == 'train':
            x = torch.from_numpy(ids[None, :length + 1].astype(np.int64)).to(env.device)         # (1, T + 1)
            with env.autocast():
                loss = net(x[:, :-1], x[:, 1:])[1]
            loss.backward()
            optimizer.step()
        elif what.startswith('tune'):
            extend.tune(model, Corpus(ids, tok.bos), args, env)
        elif what == 'perplexity':
            measure.perplexity(model, [ids], tok.bos, [length], 64, 64, env, length)
        elif what == 'entropy':
            measure.entropies(model, [ids], length, env, samples=1)
        else:
            prompt, answer, _ = eval_passkey.make_prompt(tok, length, 4, 10, np.random.default_rng(0))
            eval_passkey.score(model, [prompt], [answer], env)
        synchronize(env)

    start = time.time()
    step()
    seconds = time.time() - start
    # the first one warms up, and on a GPU compiles; a long one on a CPU counts as it is
    if seconds < 2 or 'cuda' in env.device:
        n, start = 0, time.time()
        while n < 20 and time.time() - start < 2:
            step()
            n += 1
        seconds = (time.time() - start) / n
    answers.put((seconds, 1000 * (used_memory(env.device) - before)))


def expected(what, n, shape):
    """-> arithmetic of one row of n tokens but for a constant, (6N + 12 n_layer n_embd T) T, and the parameters N."""
    with torch.device('meta'):
        model = GPT(GPTConfig(**shape))
    flops = n * model.flops_per_token(n)
    if what == 'entropy':                            # takes the scores a second time
        flops += 6 * shape['n_layer'] * shape['n_embd'] * n * n
    return flops, model.num_params(tables=False)


def alone(what, n, shape, dtype):
    """once() in a process of its own -> (seconds, MB), or None where it ended without an answer: out of memory, say."""
    spawn = multiprocessing.get_context('spawn')
    answers = spawn.Queue()
    process = spawn.Process(target=once, args=(what, n, shape, dtype, answers))
    process.start()
    while process.is_alive() and answers.empty():
        time.sleep(0.1)
    if answers.empty():
        return None
    found = answers.get()
    process.join()
    return found


def smaller(row, rows):
    """The last of the rows that differs in nothing but a smaller length or a smaller width, or None."""
    found = None
    for old in rows:
        shorter = old['width'] == row['width'] and old['length'] < row['length']
        narrower = old['length'] == row['length'] and old['width'] < row['width']
        if old['what'] == row['what'] and (shorter or narrower):
            found = old
    return found


def growth(row, old, flops):
    """How a row grew from a smaller one, as slopes in log-log. flops: the ratio of their arithmetic."""
    by = 'length' if old['length'] < row['length'] else 'width'

    def exponent(ratio):
        return f'{math.log(ratio) / math.log(row[by] / old[by]):.2f}'

    def ratio(column):                               # what was too little to measure stands there as 0
        return max(float(row[column]), 1e-9) / max(float(old[column]), 1e-9)

    return dict(grows_by=by, arithmetic_exponent=exponent(flops), time_exponent=exponent(ratio('seconds')),
                memory_exponent=exponent(ratio('mb')))


def costs(args):
    def square(width):
        return dict(vocab_size=PASSKEY_VOCAB, block_size=256, n_layer=4, n_head=4, n_kv_head=4, n_embd=width,
                    n_inner=width, qk_norm=True)

    if args.preset:
        file, dtype, shape = f'results/costs-{args.preset}.csv', 'auto', PRESETS[args.preset]
    else:
        file, dtype, shape = 'results/costs.csv', 'fp32', square(128)
    grid = [(what, n, shape) for what in SCRIPTS for n in args.lengths]
    if not args.preset:
        grid += [(what, 1024, square(width)) for what in SCRIPTS for width in (256, 512)]

    rows, flops = [], {}
    for what, n, shape in grid:
        width = shape['n_embd']
        found = alone(what, n, shape, dtype)
        if not found:
            print(f'{what} at {n}, width {width}: ended without an answer (out of memory?)', flush=True)
            continue
        seconds, mb = found
        flops[what, n, width], params = expected(what, n, shape)
        row = dict(what=what, length=n, width=width, params=params, seconds=f'{seconds:.4f}', mb=f'{mb:.1f}',
                   grows_by='', arithmetic_exponent='', time_exponent='', memory_exponent='')
        old = smaller(row, rows)
        if old:
            row |= growth(row, old, flops[what, n, width] / flops[what, old['length'], old['width']])
        rows.append(row)
        print(row, flush=True)
        write_csv(file, rows)
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# perplexity

def perplexity_at(n, model, env, rounds):
    """-> seconds of measure.perplexity at this length and of bare forward passes, in turns, and of how many windows."""
    vocab = model.config.vocab_size
    per_pass, n_windows = max(1, 2**14 // n), max(4, 2**16 // n)
    stride = min(256, n // 2)
    ids = np.random.default_rng(0).integers(vocab, size=n + n_windows * stride + 1).astype(np.uint16)
    batch = torch.from_numpy(ids[:n].astype(np.int64)).to(env.device).repeat(per_pass, 1)        # (per_pass, T)

    @torch.inference_mode()
    def bare():
        for done in range(0, n_windows, per_pass):
            with env.autocast():
                model(batch[:n_windows - done], rows=slice(-1, None))
        synchronize(env)

    def whole():
        measure.perplexity(model, [ids], None, [n], stride, n_windows * stride, env, 2**14)

    in_turns(1, bare, whole)                         # warms up
    (bare_s, _), (whole_s, _) = in_turns(rounds, bare, whole)
    return dict(length=n, windows=n_windows, stride=stride, forward_s=f'{bare_s:.3f}', perplexity_s=f'{whole_s:.3f}',
                times=f'{whole_s / bare_s:.2f}')


def perplexity(args):
    """Seconds of measure.perplexity, and of bare forward passes over the same number of windows, in turns."""
    dtype = 'auto' if 'cuda' in args.device else 'fp32'
    env = setup(SimpleNamespace(device=args.device, dtype=dtype, seed=0))
    preset = args.preset or 'tiny'
    vocab = 32000 if args.preset else PASSKEY_VOCAB
    file = f'results/perplexity-speed-{preset}.csv' if args.preset else 'results/perplexity-speed.csv'
    model = frozen(GPT(GPTConfig(vocab_size=vocab, **PRESETS[preset])), env)
    rows = []
    for n in args.lengths:
        rows.append(dict(preset=preset) | perplexity_at(n, model, env, args.rounds))
        print(rows[-1], flush=True)
        write_csv(file, rows)
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# passkey

def in_transformers(ckpt, env):
    """The network of a checkpoint as a model of transformers that decodes as many tokens as it is told to."""
    from transformers import AutoModelForCausalLM
    with tempfile.TemporaryDirectory() as tmp:
        export.write(ckpt, f'{tmp}/hf', 'fp32')
        theirs = AutoModelForCausalLM.from_pretrained(f'{tmp}/hf')
    theirs.generation_config.eos_token_id = None     # or it would stop there, or be kept from it
    return theirs.to(env.device).eval()


def passkey(args):
    """The same prompts through eval_passkey.score, and as the paper has it: one at a time through generate."""
    if not importlib.util.find_spec('transformers'):
        fail('--passkey measures transformers: pip install transformers')
    env = setup(SimpleNamespace(device=args.device, dtype='fp32', seed=0))
    ckpt = load_checkpoint(args.passkey)
    model = load_model(ckpt).to(env.device).eval()
    tok = get_tokenizer(ckpt['tokenizer'])
    theirs = in_transformers(ckpt, env)

    def our_scores(prompts, answers):
        """-> [(1 if the answer would be decoded, else 0; its log-probability)]"""
        per_pass = max(1, 2**14 // (len(prompts[0]) + len(answers[0])))
        scores = []
        for i in range(0, len(prompts), per_pass):
            scores += eval_passkey.score(model, prompts[i:i + per_pass], answers[i:i + per_pass], env)
        return scores

    def their_answers(prompts, answers):
        """-> what is decoded, as many tokens as each answer has."""
        decoded = []
        for prompt, answer in zip(prompts, answers):
            x = torch.tensor([prompt], device=env.device)
            out = theirs.generate(x, attention_mask=torch.ones_like(x), max_new_tokens=len(answer), do_sample=False)
            decoded.append(out[0, len(prompt):].tolist())
        return decoded

    file, shape = 'results/passkey-speed.csv', dict(layers=model.config.n_layer, width=model.config.n_embd)
    rows = []
    for row in read_csv(file):
        if dict(layers=int(row['layers']), width=int(row['width'])) != shape:
            rows.append(row)                         # of another model: stays
    for n in default_lengths(model.config)[1:]:      # half the training length may hold no prompt
        prompts, answers = [], []
        for trial in range(2):
            for depth in range(10):
                rng = np.random.default_rng((42, n, depth, trial))
                prompt, answer, _ = eval_passkey.make_prompt(tok, n, depth, 10, rng)
                prompts.append(prompt)
                answers.append(answer)
        our_scores(prompts[:1], answers[:1])         # nobody is timed cold
        their_answers(prompts[:1], answers[:1])
        (our_s, scores), (their_s, decoded) = in_turns(
            args.rounds, lambda: our_scores(prompts, answers), lambda: their_answers(prompts, answers))

        their_hits = alike = 0
        for prompt, answer, told in zip(prompts, answers, decoded):
            idx = torch.tensor([prompt], device=env.device)
            ours = model.generate(idx, len(answer), temperature=0)[0, len(prompt):].tolist()
            their_hits += told == answer
            alike += told == ours
        rows.append(dict(shape, length=n, prompts=len(prompts), ours_s=f'{our_s:.3f}', generate_s=f'{their_s:.3f}',
                         times=f'{their_s / our_s:.1f}', our_hits=sum(hit for hit, _ in scores),
                         their_hits=their_hits, decoded_alike=alike))
        print(rows[-1], flush=True)
        write_csv(file, rows)
    return rows


# ---------------------------------------------------------------------------------------------------------------------

def at_least_three(text):
    """Of the steps of a run the first third is left out."""
    return number(text, int, lambda n: n >= 3, 'a whole number, at least 3')


def parse_args(argv=None):
    p = parser(__doc__)
    p.add_argument('--passkey', metavar='CKPT', help='instead of the speed of training: the passkey grid of this '
                   'checkpoint, ours and through transformers')
    p.add_argument('--perplexity', action='store_true', help='instead: measuring perplexity beside bare forward passes')
    p.add_argument('--costs', action='store_true', help='instead: how the cost of each script grows')
    p.add_argument('--preset', choices=PRESETS, help='of --costs (default: 4 layers x 128, fp32) or of --perplexity '
                   '(default: tiny)')
    p.add_argument('--nanogpt', metavar='DIR', help='a clone of nanoGPT; its train.py is run as it is')
    p.add_argument('--size', nargs='+', choices=SIZES, default=['tiny', 'small'])
    p.add_argument('--rounds', type=positive_int, default=3)
    p.add_argument('--steps', type=at_least_three, default=30)
    p.add_argument('--lengths', type=int_list, default=[256, 1024, 4096, 16384, 32768])
    p.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    args = p.parse_args(argv)
    if args.preset and not (args.costs or args.perplexity):
        fail('--preset is for --costs and --perplexity; the speed of training takes --size')
    return args


def main(argv=None):
    args = parse_args(argv)
    if args.passkey:
        rows = passkey(args)
    elif args.perplexity:
        rows = perplexity(args)
    elif args.costs:
        rows = costs(args)
    else:
        rows = speed(args)
    if not rows:
        fail('nothing was measured: the lines above say why')
    print('\n| ' + ' | '.join(rows[0]) + ' |\n|' + '---|' * len(rows[0]))
    for row in rows:
        print('| ' + ' | '.join(map(str, row.values())) + ' |')


if __name__ == '__main__':
    main()
