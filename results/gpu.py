"""
The stages of results/gpu.sh: what a GPU of 80 GB is to be measured for, each within ten minutes.

    python -m results.gpu attention compile train       # rows of results/gpu.csv; what has its rows is not run again
    python -m results.gpu --toy --csv out/gpu-toy.csv peers tune       # small, on any machine: a rehearsal
"""
import glob
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from functools import partial
from types import SimpleNamespace

import torch
from torch.profiler import ProfilerActivity, profile

from data.checkpoint import frozen, load_checkpoint, preflight, save_checkpoint
from data.figures import read_csv, write_csv
from data.log import peak_flops
from data.runtime import Env, compiled, fail, parser, setup
from data.tokenizer import get_tokenizer
from model import ENCODINGS, GPT, PRESETS, GPTConfig
from results import bench, smollm2
from results.plan import Plan

FULL = SimpleNamespace(
    shape=PRESETS['tinyllama'], train='--data random --preset tinyllama --steps 12', batch_tokens=131_072,
    length=2048, rows=8, long=16_384, tune=(16_384, 18_432, 8192, 4096),
    # several calls, since a row is written after each
    grid=('2048,4096,6144,8192', '10240,12288,14336,16384', '18432,20480,22528,24576', '26624,28672,30720,32768'),
    prompts='--depths 10 --trials 10', windows=(2048, 16_384), peers='tinyllama', peers_steps=15, sweep='small',
    # 62.9M tokens, a thousandth of DroPE's middle budget, in steps a quarter as large
    without_rope='--steps 240 --warmup 30 --batch_tokens 262144 --micro_batch 4 --eval_tokens 65536 --eval_every 60',
    measure=SimpleNamespace(lengths=[1024, 4096, 8192, 16_384], stride=512, eval_tokens=8192, depths=10))
TOY = SimpleNamespace(
    shape=dict(vocab_size=101, block_size=64, n_layer=1, n_head=4, n_kv_head=2, n_embd=32, n_inner=48),
    train='--data random:101 --preset tiny --block_size 64 --n_layer 1 --optimizer adamw --steps 3 --no-compile',
    batch_tokens=512, length=64, rows=2, long=256, tune=(128,), grid=('128', '192,256'),
    prompts='--depths 2 --trials 1', windows=(1024,), peers='tiny', peers_steps=3, sweep='small_toy',
    without_rope='--steps 3 --warmup 1 --batch_tokens 640 --micro_batch 2 --eval_tokens 640 --no-compile',
    measure=SimpleNamespace(lengths=[320, 640], stride=64, eval_tokens=256, depths=2))
LIMIT = 500                      # seconds in one call of what is resumed by the next
DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
DEVICE_NAME = torch.cuda.get_device_name() if DEVICE == 'cuda' else 'CPU'
STAGES = ('attention', 'compile', 'train', 'tune', 'passkey', 'perplexity', 'peers', 'ddp', 'small', 'recalibrate')


def jobs(stage, args, size):
    """Yields (setting, a function that measures it); such a function gives {what: (value, unit)}."""
    trained = partial(training, args, size)
    if stage == 'attention':
        for dtype in 'bf16', 'fp32':
            for pe in ENCODINGS:
                yield f'{pe}, {dtype}', partial(attention, size, pe, dtype)
            yield f'nope, {dtype}, compiled', partial(attention, size, 'nope', dtype, compile=True)
            yield f'nope, {dtype}, decoding', partial(attention, size, 'nope', dtype, decode=True)
    elif stage == 'compile':
        for pe in ENCODINGS:
            yield pe, partial(graph_breaks, size, pe)
        yield 'nope, activation checkpointing', partial(graph_breaks, size, 'nope', checkpointing=True)
    elif stage == 'train':
        yield 'a large bf16 matrix product', lambda: dict(speed=(f'{bench.matrix_product(DEVICE):.3g}', 'FLOP/s'))
        yield f'{size.rows} rows', partial(trained, size.rows, size.length)
        yield f'{2 * size.rows} rows', partial(trained, 2 * size.rows, size.length)
        yield f'{size.rows} rows, checkpointing', partial(trained, size.rows, size.length, '--activation_checkpointing')
        yield f'1 row of {size.long}, checkpointing', partial(trained, 1, size.long, '--activation_checkpointing')
        yield f'{size.rows} rows, not compiled', partial(trained, size.rows, size.length, '--no-compile')
    elif stage == 'tune':
        for n in size.tune:
            yield f'a row of {n}', partial(tuning, size, 'tune', n)
        for n in size.tune[:2]:
            yield f'a row of {n}, checkpointing', partial(tuning, size, 'tune_checkpointing', n)
    elif stage == 'passkey':
        for lengths in size.grid:
            yield f'lengths {lengths}', partial(grid, args, size, lengths)
    elif stage == 'perplexity':
        for n in size.windows:
            yield f'windows of {n}', partial(perplexity, size, n)
    elif stage == 'peers':
        if args.nanogpt:
            bench.give_to_nanogpt(args.nanogpt, f'{args.out}/data', bench.SIZES[size.peers].vocab)
        race = SimpleNamespace(nanogpt=args.nanogpt, steps=size.peers_steps, device=DEVICE)
        for name, (command, folder) in bench.contenders(race, args.out, size.peers).items():
            # presets are the stage train; compiling takes longer than all of a rehearsal
            left_out = '--preset' in name or 'fp32' in name or args.toy and 'compiled' in name
            if not left_out:
                yield name, partial(peer, args, size, name, command, folder)
    elif stage == 'ddp' and (args.toy or torch.cuda.device_count() > 1):
        device = '--device cpu' if args.toy else ''  # one GPU is too few for two processes
        yield '2 processes', partial(trained, size.rows, size.length, device, processes=2)
    elif stage == 'small' and args.text:
        yield f'SCALE={size.sweep}', partial(sweep, args, size)
    elif stage == 'recalibrate' and args.smollm2:
        yield 'training without RoPE', partial(recalibration, args, size)
        for model in 'RoPE', 'RoPE YaRN', 'without RoPE', 'without RoPE uniform':
            yield model, partial(recalibrated, args, size, model)


def attention(size, pe, dtype, compile=False, decode=False):
    """By the profiler, which kernels attention really reaches, forward and backward. Whole scores are an error."""
    env = Env(device=DEVICE, dtype=dtype)
    net = model = GPT(GPTConfig(**size.shape | dict(n_layer=1, pe=pe))).to(DEVICE)
    if compile:                                      # on a GPU
        net = compiled(model, SimpleNamespace(compile=None), env)
    x = torch.zeros(2, model.config.block_size, dtype=torch.long, device=DEVICE)

    def run():
        with env.autocast():
            if decode:
                model.generate(x, 4, temperature=0)
            else:
                net(x, x)[1].backward()

    run()                                            # compiles
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        run()
    prefix = 'aten::_scaled_dot_product_'
    names = [event.key.removeprefix(prefix) for event in seen.key_averages() if event.key.startswith(prefix)]
    whole = not names or any('math' in name for name in names)
    if whole and (DEVICE == 'cuda' or pe != 't5'):   # torch has no kernel for CPUs that takes a bias which learns
        raise RuntimeError(f'no fused kernel: {names}')
    return dict(kernels=(' '.join(sorted(names)), ''))


def graph_breaks(size, pe, checkpointing=False):
    model = GPT(GPTConfig(**size.shape | dict(n_layer=2, pe=pe))).to(DEVICE)
    model.activation_checkpointing = checkpointing
    x = torch.zeros(2, model.config.block_size, dtype=torch.long, device=DEVICE)
    torch._dynamo.reset()
    with Env(device=DEVICE, dtype='bf16').autocast():
        told = torch._dynamo.explain(model)(x, x)
    if told.graph_break_count:
        raise RuntimeError(f'{told.graph_break_count} graph breaks: {told.break_reasons[0].reason}')
    return {'graph breaks': (0, f'in {told.graph_count} graph')}


def speed(tokens, ms, mfu):
    mfu = dict(mfu=(mfu, 'of the published peak')) if mfu else {}        # unknown on a CPU
    return dict(step=(f'{ms:.1f}', 'ms'), speed=(f'{1000 * tokens / ms:.0f}', 'tokens/s')) | mfu


def training(args, size, rows, length, flags='', processes=1):
    out, launcher = f'{args.out}/run', ''
    if processes > 1:
        launcher = f'-m torch.distributed.run --standalone --nproc_per_node={processes}'
    command = (f'{sys.executable} {launcher} train.py {size.train} --out {out} --length {length} '
               f'--min_length {length} --batch_tokens {size.batch_tokens} --micro_batch {rows} --warmup 2 '
               f'--eval_every {bench.NEVER} --eval_tokens {length} --log_every 1 {flags}')
    ms, extras = bench.lap(command, '.', out, size.batch_tokens)
    return speed(size.batch_tokens, ms, extras['mfu']) | dict(memory=(extras['mem_gb'], 'GB'))


def tuning(size, what, n):
    found = bench.alone(what, n, size.shape, 'auto')
    if not found:
        raise RuntimeError('ended without an answer: out of memory?')
    seconds, mb = found
    return dict(row=(f'{seconds:.3f}', 's'), whole=(f'{200 * 8 * seconds / 60:.1f}', 'min for 200 steps of 8 rows'),
                memory=(f'{mb / 1000:.2f}', 'GB beside the weights'))


def grid(args, size, lengths):
    ckpt = f'{args.out}/random.pt'
    if not os.path.exists(ckpt):
        tok = get_tokenizer('passkey')
        model = GPT(GPTConfig(**size.shape | dict(vocab_size=tok.n_vocab)))
        save_checkpoint(ckpt, dict(model=model.state_dict(), config=asdict(model.config), optimizer=None, step=0,
                                   tokens=0, seed=0, args={}, fingerprint='random', tokenizer=tok.name))
    command = f'{sys.executable} eval_passkey.py --ckpt {ckpt} --lengths {lengths} {size.prompts}'
    start = time.time()
    subprocess.run(command.split(), check=True)
    seconds, rows = time.time() - start, read_csv(f'{args.out}/random.passkey.csv')
    return dict(seconds=(f'{seconds:.1f}', f's for {len(rows)} prompts, start included'))


def perplexity(size, n):
    env = setup(SimpleNamespace(device=DEVICE, dtype='auto', seed=0))
    row = bench.perplexity_at(n, frozen(GPT(GPTConfig(**size.shape)), env), env, rounds=3)
    return dict(whole=(row['perplexity_s'], f's for {row["windows"]} windows'), forward=(row['forward_s'], 's'),
                times=(row['times'], 'times bare forward passes'))


def peer(args, size, name, command, folder):
    tokens, peak = bench.SIZES[size.peers].tokens, peak_flops(DEVICE)
    (ms, _), gb = bench.watched(lambda: bench.lap(command, folder, f'{args.out}/ours', tokens))
    mfu = f'{bench.step_flops(name, size.peers) / (ms / 1000) / peak:.3f}' if peak else ''
    return speed(tokens, ms, mfu) | dict(memory=(f'{gb:.1f}', 'GB of the device'))


def sweep(args, size):
    """Stopped after LIMIT seconds, train.py saves, and the next call goes on."""
    plan = Plan(size.sweep, out=args.out, text=args.text)
    command = f'timeout {LIMIT} {sys.executable} -m results.reproduce --scale {size.sweep} --out {args.out} --text'
    start = time.time()
    code = subprocess.call([*command.split(), args.text])
    found = dict(seconds=(f'{time.time() - start:.0f}', 's of this call'))
    for file in sorted(glob.glob(f'{plan.out}/*/log.jsonl')):
        found |= pace(os.path.dirname(file))
    for row in read_csv(plan.csv):
        found[f'{row["row"]} at {row["length"]}'] = (row['passkey'], f'of the keys, loss {row["loss"]}')
    return found | ended(code)


def pace(run):
    """The speed of train.py, from its log."""
    with open(f'{run}/log.jsonl') as f:
        steps = [line for line in map(json.loads, f) if 'tok_s' in line]
    if not steps:
        return {}
    tok_s = bench.settled([line['tok_s'] for line in steps])
    return {os.path.basename(run): (f'{tok_s:.0f}', f'tokens/s up to step {steps[-1]["step"]}')}


def ended(code):
    """What is to be said of a command that had LIMIT seconds."""
    if code == 124:
        return dict(unfinished=(f'after {LIMIT} s', 'the same command goes on'))
    if code:
        return dict(error=(f'exit code {code}', ''))
    return {}


def recalibration(args, size):
    """DroPE (Gelberg et al. 2025, table 4): RoPE is dropped, their QK-norm comes in, lr 1e-3, at the same length."""
    run = f'{args.out}/without_rope'
    command = f'timeout {LIMIT} {sys.executable} train.py --resume --pe nope --qk_norm full --rows anywhere --lr 1e-3'
    where = ['--init_from', args.smollm2, '--data', f'{args.smollm2}/text', '--out', run]
    code = subprocess.call([*command.split(), *size.without_rope.split(), *where])
    return ended(code) or pace(run)


def recalibrated(args, size, model):
    """Perplexity and passkeys of the model with RoPE and of the one trained on without it, plain and extended."""
    without = f'{args.out}/without_rope'
    state = load_checkpoint(without)
    if state['step'] < state['args']['steps']:
        return dict(unfinished=(f'at step {state["step"]}', 'the same command goes on'))
    folder = without if model.startswith('without') else args.smollm2
    text, how = f'{args.smollm2}/text', SimpleNamespace(out=folder, dtype='fp32', **vars(size.measure))
    ckpt, length = f'{folder}/ckpt.pt', size.measure.lengths[-1]
    if model.endswith('YaRN'):
        ckpt = smollm2.extended('yarn', length, text, how)
    elif model.endswith('uniform'):
        ckpt = smollm2.extended('uniform', length, text, how, dict(grid='1,1.05,1.1,1.15,1.2,1.3,1.4,1.6'))
    found = {}
    for n, cell in smollm2.measured(ckpt, how.lengths, text, how).items():
        found[f'perplexity at {n}'] = (f'{cell["ppl"]:.3f}', f'over {cell["tokens"]} tokens')
        found[f'passkey at {n}'] = (f'{cell["keys"]:.2f}', f'of {cell["prompts"]}')
    return found


def parse_args(argv=None):
    p = parser(__doc__)
    p.add_argument('stages', nargs='+', choices=STAGES)
    p.add_argument('--toy', action='store_true', help='a rehearsal, on any machine')
    p.add_argument('--csv', default='results/gpu.csv')
    p.add_argument('--out', default='out/gpu', help='folder for checkpoints and runs')
    p.add_argument('--nanogpt', metavar='DIR', help='peers: a clone of nanoGPT; its train.py is run as it is')
    p.add_argument('--text', metavar='DIR', help='small: text files, or what data.text.prepare made of them')
    p.add_argument('--smollm2', metavar='DIR', help='recalibrate: a folder with ckpt.pt and text/')
    args = p.parse_args(argv)
    args.out = os.path.abspath(args.out)             # nanoGPT is run in its own folder
    return args


def main(argv=None):
    args = parse_args(argv)
    if DEVICE == 'cpu' and not args.toy:
        fail('this measures a GPU, and torch finds none: sh results/gpu.sh toy rehearses it on any machine')
    preflight(args.out, 0)
    failed = False
    for stage in args.stages:
        for setting, job in jobs(stage, args, TOY if args.toy else FULL):
            rows = read_csv(args.csv)
            key = dict(stage=stage, setting=setting, device=DEVICE_NAME)
            earlier = [row for row in rows if row | key == row]
            if earlier and not any(row['what'] in ('error', 'unfinished') for row in earlier):
                print(f'{stage} | {setting} | is in {args.csv} already', flush=True)
                continue
            try:
                found = job()
            except (Exception, SystemExit) as e:     # out of memory, say: the others count all the same
                found = dict(error=(f'{type(e).__name__}: {e}'.partition('\n')[0][:200], ''))
            failed = failed or 'error' in found
            stamp = dict(device=DEVICE_NAME, torch=torch.__version__, date=time.strftime('%Y-%m-%d'))
            rows = [row for row in rows if row not in earlier]
            for what, (value, unit) in found.items():
                rows.append(dict(stage=stage, what=what, setting=setting, value=value, unit=unit) | stamp)
                print(f'{stage} | {setting} | {what} {value} {unit}', flush=True)
            write_csv(args.csv, rows)
    sys.exit(int(failed))


if __name__ == '__main__':
    main()
