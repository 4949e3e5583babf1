"""
Trains a language model from scratch, or goes on from a checkpoint at another length or with another position encoding.

CPU, minutes:    python train.py --preset tiny --pe nope --data data/passkey --out out/nope
one GPU:         python train.py --preset small --pe nope --data data/books --out out/small
one node:        torchrun --standalone --nproc_per_node=8 train.py --preset tinyllama --data data/corpus --out out/tinyllama
two nodes:       torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train.py --preset tinyllama --data data/corpus --out out/tinyllama
after a stop:    the same command with --resume (and with --resume always given: starts if there is nothing to resume)
by itself:       torchrun --standalone --nproc_per_node=8 --max-restarts=3 train.py --resume --preset tinyllama --data data/corpus --out out/tinyllama
DroPE:           python train.py --init_from out/rope --pe nope --steps 300 --data data/passkey --out out/drope
longer context:  python train.py --init_from out/rope --length 1024 --steps 200 --data data/passkey --out out/rope-1024

Writes OUT/ckpt.pt (the one before as ckpt.prev.pt) and OUT/log.jsonl, one JSON object a line. SIGTERM and Ctrl-C save and
exit (143, 130). The batch of a step depends on (seed, step) only, so any number of processes trains on the same data.
"""
import argparse
import json
import math
import os
import resource
import signal
import sys
import time
from dataclasses import asdict

import numpy as np
import torch
import torch.distributed as dist

from data import io
from model import ENCODINGS, GPT, PRESETS, GPTConfig

# what each preset trains with unless a flag says otherwise
RECIPES = dict(
    # chosen by trying on the passkey corpus, see results/README.md
    tiny=dict(steps=2400, batch_tokens=4096, eval_tokens=2**14, min_length=64, micro_batch=16, optimizer='muon', lr=3e-3, muon_lr=1e-2, warmup=100),
    # GPT-2 small's usual lr; one GPU
    small=dict(steps=8000, batch_tokens=131072, micro_batch=32, optimizer='adamw', lr=1e-3, muon_lr=2e-2, warmup=300),
    # Wang et al. 2024: 50K steps of 2M tokens, lr 3.5e-4; the rest as in TinyLlama, whose cosine ends at 1.43M steps
    tinyllama=dict(steps=50_000, decay_steps=1_430_512, batch_tokens=2**21, micro_batch=8, optimizer='adamw', lr=3.5e-4, muon_lr=2e-2, warmup=2000),
)


def get_args():
    p = io.parser(__doc__)
    yes_no = argparse.BooleanOptionalAction
    # files
    p.add_argument('--data', required=True, help='folder with train.bin, val.bin, meta.json; or random, random:VOCAB: a benchmark (vocabulary 32000), which saves no checkpoint')
    p.add_argument('--out', required=True, help='folder of this run')
    p.add_argument('--resume', action=yes_no, default=False, help='go on from OUT/ckpt.pt if there is one')
    p.add_argument('--init_from', metavar='CKPT', help='start from the weights of this checkpoint; its shape and block_size stay')
    # model: a preset, and fields of GPTConfig that differ from it
    p.add_argument('--preset', choices=PRESETS, help='shape and recipe (default tiny; with --init_from, the checkpoint\'s)')
    p.add_argument('--pe', choices=ENCODINGS, help='position encoding (default nope)')
    p.add_argument('--qk_norm', action=yes_no, help='normalise q and k in each head')
    for name in ('block_size', 'n_layer', 'n_head', 'n_kv_head', 'n_embd', 'n_inner'):
        p.add_argument(f'--{name}', type=int, help='default: the preset\'s')
    # batch
    p.add_argument('--length', type=int, help='tokens a row (default block_size); another length for fine-tuning')
    p.add_argument('--min_length', type=int, help='each step draws its row length: length, length/2, ... down to this (default: length)')
    p.add_argument('--batch_tokens', type=int, help='tokens a step, over all processes')
    p.add_argument('--micro_batch', type=int, help='rows in one forward pass of one process; the rest is accumulation')
    # optimisation; TinyLlama's values unless the recipe says otherwise
    p.add_argument('--steps', type=int, help='updates')
    p.add_argument('--decay_steps', type=int, help='updates until the cosine ends (default: steps)')
    p.add_argument('--warmup', type=int, help='updates of linear warm-up')
    p.add_argument('--optimizer', choices=('adamw', 'muon'), help='muon: torch.optim.Muon for the matrices of the blocks, AdamW for the rest')
    p.add_argument('--lr', type=float, help='AdamW learning rate; the cosine ends at a tenth of it')
    p.add_argument('--muon_lr', type=float, help='Muon learning rate, matched to AdamW\'s update size')
    p.add_argument('--weight_decay', type=float, default=0.1, help='on matrices, not on vectors (TinyLlama 0.1)')
    p.add_argument('--grad_clip', type=float, default=1.0, help='largest gradient norm (TinyLlama 1.0)')
    # evaluation and logging
    p.add_argument('--eval_every', type=int, default=250, help='updates between validation losses and saves')
    p.add_argument('--eval_tokens', type=int, default=2**16, help='validation tokens, the same every time')
    p.add_argument('--log_every', type=int, default=10)
    # machine
    p.add_argument('--seed', type=int, default=1337)
    p.add_argument('--device', default='auto', help='auto, cpu, cuda or cuda:N')
    p.add_argument('--dtype', choices=('auto', 'bf16', 'fp32'), default='auto', help='auto: bf16 where the hardware multiplies in it')
    p.add_argument('--compile', action=yes_no, help='torch.compile (default: on GPU only)')
    p.add_argument('--activation_checkpointing', action=yes_no, default=False, help='a third more arithmetic for much less memory')
    p.add_argument('--timeout', type=float, default=600, help='seconds that a process waits for the others before the job ends')
    args = p.parse_args()

    given = args.given = sorted(k for k, v in vars(args).items() if v is not None)
    if args.preset is None:
        source = args.out if args.resume and io.find_checkpoint(args.out) else args.init_from
        args.preset = io.load_checkpoint(source)['args']['preset'] if source else 'tiny'
    for name, value in RECIPES[args.preset].items():
        if name not in given and not (name in ('min_length', 'decay_steps') and args.init_from):
            setattr(args, name, value)
    if args.decay_steps is None:
        args.decay_steps = args.steps
    for name in ('steps', 'decay_steps', 'batch_tokens', 'micro_batch', 'eval_every', 'eval_tokens', 'log_every'):
        if getattr(args, name) < 1:
            io.fail(f'--{name} {getattr(args, name)} must be at least 1')
    for name in ('length', 'min_length'):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            io.fail(f'--{name} {getattr(args, name)} must be at least 1')
    for name in ('lr', 'muon_lr', 'grad_clip', 'timeout'):
        if not 0 < getattr(args, name) < math.inf:
            io.fail(f'--{name} {getattr(args, name)} must be a positive number')
    if not 0 <= args.weight_decay < math.inf:
        io.fail(f'--weight_decay {args.weight_decay} must not be negative')
    if args.warmup < 0 or args.warmup > args.steps:
        if 'warmup' in given:
            io.fail(f'--warmup {args.warmup} must lie between 0 and --steps {args.steps}')
        args.warmup = args.steps // 10
    return args


def make_optimizers(model, args):
    """AdamW (beta 0.9, 0.95), decay on matrices only; with --optimizer muon the matrices of the blocks go to Muon."""
    params = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    muon = [p for n, p in params if args.optimizer == 'muon' and p.dim() == 2 and n.startswith('blocks.')]
    rest = [p for _, p in params if not any(p is m for m in muon)]
    groups = [dict(params=[p for p in rest if p.dim() >= 2], weight_decay=args.weight_decay),
              dict(params=[p for p in rest if p.dim() < 2], weight_decay=0.0)]
    opts = [torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)]
    if muon:
        opts.append(torch.optim.Muon(muon, lr=args.muon_lr, weight_decay=args.weight_decay, adjust_lr_fn='match_rms_adamw'))
    return opts


def lr_factor(step, args):
    """Linear warm-up, then a cosine from 1 to 0.1 that ends at decay_steps."""
    if step < args.warmup:
        return (step + 1) / args.warmup
    t = min(1.0, (step - args.warmup) / max(1, args.decay_steps - args.warmup))
    return 0.1 + 0.45 * (1 + math.cos(math.pi * t))


def row_length(step, args):
    """Tokens a row of this step: length, a half of it, a quarter ... down to min_length, drawn by (seed, step)."""
    halvings = int(math.log2(args.length / args.min_length))
    return args.length >> int(np.random.default_rng((args.seed, step, 1)).integers(halvings + 1))


@torch.no_grad()
def validate(model, data, bos, args, env):
    """Mean loss in nats over fixed, evenly spaced windows, shared out to all ranks."""
    T = args.length
    n = max(1, min(args.eval_tokens // T, (len(data) - 1) // T))
    starts = [i * (len(data) - 1 - T) // max(1, n - 1) for i in range(n)][env.rank::env.world]
    total = torch.zeros(2, dtype=torch.float64, device=env.device)
    for i in range(0, len(starts), args.micro_batch):
        x = io.anchor([data[s:s + T + 1] for s in starts[i:i + args.micro_batch]], bos).to(env.device)
        with env.autocast():
            loss = model(x[:, :-1], x[:, 1:])[1]
        total += torch.tensor([loss.item() * len(x), len(x)], dtype=torch.float64, device=env.device)
    if env.world > 1:
        dist.all_reduce(total)
    return (total[0] / total[1]).item()


def peak_flops(device):
    """Dense bf16 FLOP/s of the GPU by its data sheet, or None: MFU is then not reported."""
    name = torch.cuda.get_device_name() if 'cuda' in device else ''
    known = {'H200': 989e12, 'H100 PCIe': 756e12, 'H100 NVL': 835e12, 'H100': 989e12, 'A100': 312e12, 'L40S': 362e12, '4090': 165e12, 'B200': 2250e12}
    return next((f for k, f in known.items() if k in name), None)


def main():
    args = get_args()
    env = io.setup(args)
    print0 = env.print
    data, meta = io.open_data(args.data, 'train')
    val, _ = io.open_data(args.data, 'val')

    # a run that still lives may be saving: before its checkpoint is read
    held = None
    if os.path.isdir(args.out):
        io.preflight(args.out, 0)
        held = io.lock(args.out) if env.master else None
    if env.world > 1:
        dist.barrier()
    # model: from scratch, from the weights of another run, or where this run stopped
    fields = {k: v for k, v in vars(args).items() if k in GPTConfig.__dataclass_fields__ and v is not None}
    ckpt = trained_with = None
    if io.find_checkpoint(args.out):
        if not args.resume:
            io.fail(f'--out {args.out} already holds a checkpoint: go on with --resume, or choose another folder')
        ckpt = io.load_checkpoint(args.out)
        model = io.load_model(ckpt)
        print0(f'resuming {args.out} at step {ckpt["step"]:,}')
    elif args.init_from:
        if 'block_size' in fields:
            io.fail('--block_size is the length that the checkpoint was pre-trained at and stays: give --length')
        start = io.load_checkpoint(args.init_from)
        model, trained_with = io.load_model(start, **fields), start['tokenizer']
        del start                                    # gigabytes
        print0(f'starting from the weights of {args.init_from}' + (f' with {fields}' if fields else ''))
    else:
        try:
            model = GPT(GPTConfig(**{**PRESETS[args.preset], 'vocab_size': io.padded(meta['vocab_size']), **fields}))
        except ValueError as e:
            io.fail(str(e))
        print0(f'nothing to resume in {args.out}, starting' if args.resume else 'starting from scratch')
    config = model.config
    args.length = args.length or (ckpt['args']['length'] if ckpt else config.block_size)
    args.min_length = min(args.min_length or args.length, args.length)
    if ckpt:
        if ckpt['optimizer'] is None:
            io.fail(f'{args.out}/ckpt.pt comes from extend.py and has no optimizer to resume: --init_from it, with another --out')
        for k in ('warmup', 'decay_steps'):          # they may follow from --steps
            if k not in args.given:
                setattr(args, k, ckpt['args'][k])
        # steps may grow, the world and the machine may change; what decides the numbers may not
        differs = [f'--{k} {v} (was {ckpt["config"][k]})' for k, v in fields.items() if ckpt['config'][k] != v]
        differs += [f'--{k} {getattr(args, k)} (was {ckpt["args"][k]})' for k in ('preset', 'seed', 'length', 'min_length', 'batch_tokens', 'optimizer', 'lr',
                    'muon_lr', 'weight_decay', 'grad_clip', 'warmup', 'decay_steps', 'init_from') if ckpt['args'][k] != getattr(args, k)]
        if ckpt['fingerprint'] != meta['train']['sha256']:
            differs.append(f'--data {args.data} (other tokens than before)')
        if differs:
            io.fail(f'cannot resume {args.out} with {", ".join(differs)}: give the flags it was started with, or another --out')
    io.check_fits(config, meta, args.data, [args.length], trained_with)
    for name, tokens in (('train', data), ('val', val)):
        if len(tokens) < args.length + 1:
            io.fail(f'{args.data}/{name}.bin has {len(tokens):,} tokens, a row takes {args.length + 1:,}: prepare more text, or lower --length')

    # the batch: tokens a step -> rows -> ranks x accumulation x micro-batch
    if args.min_length < 1 or args.length % (1 << int(math.log2(args.length / args.min_length))):
        io.fail(f'--min_length {args.min_length}: --length {args.length} must halve evenly down to it')
    rows, left = divmod(args.batch_tokens, args.length)
    args.micro_batch = min(args.micro_batch, max(1, rows // env.world))
    accum, left2 = divmod(rows, env.world * args.micro_batch)
    if left or left2 or not accum:
        io.fail(f'--batch_tokens {args.batch_tokens} must be a multiple of length {args.length} x {env.world} processes x --micro_batch {args.micro_batch}')
    print0(f'{args.batch_tokens:,} tokens a step = {env.world} processes x {accum} accumulated x {args.micro_batch} rows x {args.length} tokens'
           + (f'; in some steps more rows, of {args.min_length} tokens up' if args.min_length < args.length else ''))

    if env.world > 1:                                # a folder that only some nodes see would tear the run apart
        where = [None] * env.world
        dist.all_gather_object(where, (ckpt and ckpt['step'], meta['train']['sha256']))
        if len(set(where)) > 1:
            io.fail(f'the processes do not see the same --out and --data (step, data): {sorted(set(map(str, where)))}: both must be on shared storage')
    benchmark = io.random_vocab(args.data)           # has nothing to keep but its log
    io.preflight(args.out, 0 if benchmark else (1 if ckpt else 3) * 12 * sum(p.numel() for p in model.parameters()),
                 io.memory(model, args.micro_batch * args.length, True, args, env) if env.device == 'cpu' and not ckpt else 0)
    held = held or (io.lock(args.out) if env.master else None)           # noqa: F841 (kept open as long as we live)
    model.activation_checkpointing = args.activation_checkpointing
    raw = model.to(env.device)                       # saving and evaluation go through the bare module
    io.check_fused(raw, args.length, env)
    opts = make_optimizers(raw, args)
    step = tokens_seen = 0
    if ckpt:
        for opt in opts:
            opt.load_state_dict(ckpt['optimizer'].pop(0))
        step, tokens_seen = ckpt['step'], ckpt['tokens']
        ckpt['model'] = ckpt['optimizer'] = None     # gigabytes
    base_lr = [args.lr, args.muon_lr]
    params = [p for p in raw.parameters() if p.requires_grad]
    model = io.compiled(raw, args, env)
    flops, peak = raw.flops_per_token(args.length), peak_flops(env.device)
    print0(f'{config.pe}, {sum(p.numel() for p in raw.parameters()):,} parameters, training length {config.block_size}; {args.optimizer}, '
           f'compile {"off" if model is raw else "on"}; {flops / 1e6:,.1f} MFLOP a token (6N + 12 n_layer n_embd T)'
           + (f'; MFU of {peak / 1e12:.0f} TFLOP/s' if peak else '; no MFU: no published peak for this device'))

    # the log: after a kill it may run ahead of the checkpoint
    log_file = f'{args.out}/log.jsonl'
    if env.master:
        kept = []
        if ckpt and os.path.exists(log_file):
            for line in open(log_file):
                try:
                    row = json.loads(line)
                except ValueError:                   # a line cut by a kill
                    continue
                if row['step'] < step or (row['step'] == step and 'val_loss' not in row):
                    kept.append(line)
        with open(f'{log_file}.tmp', 'w') as f:
            f.writelines(kept)
        os.replace(f'{log_file}.tmp', log_file)

    def log(row, line):
        if env.master:
            try:
                with open(log_file, 'a') as f:
                    f.write(json.dumps(row) + '\n')
            except OSError as e:
                io.fail(f'{log_file} cannot be written ({e.strerror}): free some space' + f'; the last checkpoint is that of step {saved}, --resume goes on' * (not benchmark))
            print(line, flush=True)

    def save():
        if env.master and not benchmark:
            io.save_checkpoint(f'{args.out}/ckpt.pt', dict(
                model={k: v.cpu() for k, v in raw.state_dict().items()}, config=asdict(config), optimizer=[o.state_dict() for o in opts],
                step=step, tokens=tokens_seen, seed=args.seed, args=vars(args), fingerprint=meta['train']['sha256'],
                tokenizer=meta['tokenizer'], extended=None))
        if env.world > 1:
            dist.barrier()

    stop = 0                                         # the signal that asked us to stop

    def on_signal(number, _):
        nonlocal stop
        stop = number
        # a launcher and a scheduler may both send SIGTERM; a second Ctrl-C means it
        signal.signal(number, signal.SIG_DFL if number == signal.SIGINT else signal.SIG_IGN)
    for s in (signal.SIGTERM, signal.SIGINT):
        signal.signal(s, on_signal)

    def next_batch(step):
        T = row_length(step, args)
        x, y = io.get_batch(data, meta['bos'], args.batch_tokens // T, T, args.seed, step, env.rank, env.world)
        if 'cuda' in env.device:
            x, y = (t.contiguous().pin_memory().to(env.device, non_blocking=True) for t in (x, y))
        return x.split(args.micro_batch * args.length // T), y.split(args.micro_batch * args.length // T)

    def stopping():
        """The signal that any rank has heard, the same answer on every rank."""
        if env.world == 1:
            return stop
        heard = torch.tensor(stop, device=env.device)
        dist.all_reduce(heard, dist.ReduceOp.MAX)
        return heard.item()

    def save_and_leave(number):
        save()
        print0(f'{signal.Signals(number).name}: ' + (f'stopped at step {step:,}' if benchmark else f'saved at step {step:,}; the same command with --resume goes on'), flush=True)
        io.finish(128 + number)
        sys.exit(128 + number)

    x, y = next_batch(step)
    started, clock, clock_step, times = time.time(), time.time(), step, []
    saved = step if ckpt else -1
    while True:
        # save first, then evaluate: a failing evaluation must not cost the run
        if (step % args.eval_every == 0 or step == args.steps) and step != saved:
            save()
            saved = step
        if step % args.eval_every == 0 or step == args.steps:
            val_loss = validate(raw, val, meta['bos'], args, env)
            log(dict(step=step, tokens=tokens_seen, val_loss=val_loss), f'step {step:,}/{args.steps:,} | val loss {val_loss:.4f}')
            clock, clock_step = time.time(), step
        if step >= args.steps:
            break

        began, factor = time.time(), lr_factor(step, args)
        for opt, base in zip(opts, base_lr):
            for group in opt.param_groups:
                group['lr'] = base * factor
        loss_sum = torch.zeros((), device=env.device)
        for micro in range(accum):
            # a long step must not outlive the launcher's patience: asked eight times a step; what was accumulated is made again
            if micro and micro % max(1, accum // 8) == 0 and (number := stopping()):
                save_and_leave(number)
            with env.autocast():
                loss = model(x[micro], y[micro])[1] / accum
            (loss / env.world).backward()
            loss_sum += loss.detach()
        grads = [p.grad for p in params]
        own = norm = torch.nn.utils.get_total_norm(grads)
        if env.world > 1:                            # data-parallel: the gradients meet once a step
            for g in grads:
                dist.all_reduce(g)
            norm = torch.nn.utils.get_total_norm(grads)
        torch.nn.utils.clip_grads_with_norm_(params, args.grad_clip, norm)
        x, y = next_batch(step + 1)                  # while the GPU works
        # what every rank must know before the update: each one's loss, its own gradient norm, that of all, and its wish to stop
        status = torch.stack((loss_sum, own, norm, torch.tensor(float(stop), device=env.device)))
        ranks = [torch.empty_like(status) for _ in range(env.world)] if env.world > 1 else [status]
        if env.world > 1:
            dist.all_gather(ranks, status)
        ranks = torch.stack(ranks).cpu()             # (world, 4)
        if not ranks[:, :3].isfinite().all():
            rank, column = (~ranks[:, :3].isfinite()).T.nonzero()[0].flip(0).tolist()        # a loss before a gradient
            print0(f'error: step {step + 1}: {"loss" if column == 0 else "gradient"} is not finite on rank {rank} (batch of seed {args.seed}, step {step});'
                   ' no weight was changed' + f', the last good checkpoint is {args.out}/ckpt.pt at step {saved}' * (not benchmark) + ': lower --lr, or look at that batch', file=sys.stderr, flush=True)
            io.finish(1)
            sys.exit(1)
        for opt in opts:
            opt.step()
            opt.zero_grad(set_to_none=True)
        step, tokens_seen = step + 1, tokens_seen + args.batch_tokens
        times.append(1000 * (time.time() - began))   # every step has waited for the GPU, for its status

        if step % args.log_every == 0 or step == args.steps:
            loss_mean, now = ranks[:, 0].mean().item(), time.time()
            speed = (step - clock_step) * args.batch_tokens / (now - clock)
            mfu = speed * flops / (peak * env.world) if peak else None
            mem = (torch.cuda.max_memory_allocated() if 'cuda' in env.device else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024) / 1e9
            left = (args.steps - step) * args.batch_tokens / speed
            log(dict(step=step, tokens=tokens_seen, loss=loss_mean, lr=args.lr * factor, grad_norm=norm.item(), tok_s=speed, mfu=mfu, mem_gb=mem),
                f'step {step:,}/{args.steps:,} | loss {loss_mean:.4f} | lr {args.lr * factor:.2e} | norm {norm.item():.2f} | {speed:,.0f} tok/s'
                + (f' | mfu {mfu:.1%}' if mfu else '') + f' | {mem:.2f} GB | {left / 60:.1f} min left')
            clock, clock_step = now, step
        if ranks[:, 3].any():
            save_and_leave(int(ranks[:, 3].max()))
    if times:
        low, median, high = np.percentile(times, (5, 50, 95))
        print0(f'a step: {median:,.1f} ms in the median, 5 to 95 %: {low:,.1f} to {high:,.1f}, the longest {max(times):,.1f}')
    print0(f'done: {tokens_seen:,} tokens, {time.time() - started:.0f} s, {args.out}/{"log.jsonl" if benchmark else "ckpt.pt"}')
    io.finish()


if __name__ == '__main__':
    main()
