"""
What every script begins with: its command line, the device, the precision, the other processes. Whatever a user can get wrong
ends in fail(): one line that says what to do, exit code 2.
"""
import argparse
import math
import os
import shutil
import sys
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel


def fail(message, everywhere=False):
    """
    Ends the program with one line and exit code 2. Under torchrun all processes find the same fault, so one of each node
    speaks; everywhere: only this one may have found it, so it speaks whichever it is.
    """
    if everywhere or os.environ.get('LOCAL_RANK', '0') == '0':
        print(f'error: {message}', file=sys.stderr, flush=True)
    finish(2)
    sys.exit(2)


def finish(code=0):
    """Where there are other processes, this one ends here: threads that gloo leaves behind may abort it on the long way out."""
    if dist.is_initialized():
        if not code:
            dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def parser(doc):
    """An argparse.ArgumentParser that shows the docstring as it is and takes no abbreviations; a wrong flag costs one line."""
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.error = lambda message: fail(f'{message} (--help lists the flags)')

    def parse_args(argv=None):
        args = argparse.ArgumentParser.parse_args(p, argv)
        for a in p._actions:
            if a.nargs is None and getattr(args, a.dest, None) == []:    # what argparse makes of --flag=-- before Python 3.13
                p.error(f'--{a.dest} needs a value')
        return args
    p.parse_args = parse_args
    return p


# ---------------------------------------------------------------------------------------------------------------------
# argument types: each flag's range stands beside it, and what lies outside costs one line

def number(text, kind, holds, words):
    """The number that `text` spells, if it is one and holds(number); otherwise argparse says that it must be `words`."""
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not holds(value):
        raise argparse.ArgumentTypeError(f'{text!r} must be {words}')
    return value


def positive_int(text):
    return number(text, int, lambda n: n >= 1, 'a whole number, at least 1')


def natural(text):
    return number(text, int, lambda n: n >= 0, 'a whole number, at least 0')


def positive_float(text):
    return number(text, float, lambda x: 0 < x < math.inf, 'a positive number')


def natural_float(text):
    return number(text, float, lambda x: 0 <= x < math.inf, 'a number, at least 0')


def fraction(text):
    return number(text, float, lambda x: 0 <= x <= 1, 'between 0 and 1')


def int_list(text):
    """'256,512' -> [256, 512]"""
    return [positive_int(part) for part in text.split(',')]


def float_list(text):
    """'1,1.5' -> [1.0, 1.5]"""
    return [positive_float(part) for part in text.split(',')]


# ---------------------------------------------------------------------------------------------------------------------
# ranks, device, precision


@dataclass
class Env:
    """Where a script runs: which of how many processes, on which device, in which precision. Alone it needs no other."""
    rank: int = 0
    world: int = 1
    device: str = 'cpu'
    dtype: str = 'fp32'          # or 'bf16'

    @property
    def master(self):
        return self.rank == 0

    def autocast(self):
        if self.dtype == 'fp32':
            return nullcontext()
        return torch.autocast(self.device.split(':')[0], torch.bfloat16)

    def print(self, *args, **kwargs):
        if self.master:
            print(*args, **kwargs)

    def sum(self, x):
        """A tensor -> its sum over all processes, on every one of them."""
        if self.world == 1:
            return x
        x = x.to(self.device, copy=True)
        dist.all_reduce(x)
        return x

    def gather(self, value):
        """-> a list with the value of each process, in order; anything that can be pickled."""
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value)
        return values

    def broadcast(self, value):
        """-> the value that the first process has."""
        values = [value]
        if self.world > 1:
            dist.broadcast_object_list(values)
        return values[0]

    def barrier(self):
        if self.world > 1:
            dist.barrier()


def explain(kind, e, trace):
    """sys.excepthook: what does not fit in memory, and a process that has lost the others, costs one line as well."""
    first = (str(e).splitlines() or [''])[0]
    if issubclass(kind, torch.OutOfMemoryError) or 'not enough memory' in first:
        print(f'error: out of memory: lower --micro_batch (eval_passkey.py --batch_tokens) or --length, or give --activation_checkpointing. {first}', file=sys.stderr, flush=True)
    elif issubclass(kind, dist.DistError) or 'gloo' in first:
        print(f'error: rank {os.environ.get("RANK")} lost another process, which has ended or not answered in time; start again, train.py with --resume. {first}', file=sys.stderr, flush=True)
    else:
        sys.__excepthook__(kind, e, trace)
    finish(1)


def setup(args):
    """
    Reads torchrun's environment and args.device, args.dtype, args.seed. Returns an Env.
    Prints what was chosen and why.
    """
    if not 0 <= args.seed < 2**63:
        fail(f'--seed {args.seed} must lie between 0 and 2^63')
    rank, world, local = (int(os.environ.get(k, d)) for k, d in (('RANK', 0), ('WORLD_SIZE', 1), ('LOCAL_RANK', 0)))
    kind = args.device.split(':')[0]
    if kind == 'auto':
        kind = 'cuda' if torch.cuda.is_available() else 'cpu'
    if kind not in ('cpu', 'cuda'):
        fail(f'--device {args.device} is unknown: auto, cpu, cuda or cuda:N')
    device = kind
    if kind == 'cuda':
        if not torch.cuda.is_available():
            fail('--device cuda: this torch finds no GPU. Use --device cpu, or install a CUDA build of torch')
        index, n = args.device.split(':')[1] if ':' in args.device else str(local), torch.cuda.device_count()
        if int(os.environ.get('LOCAL_WORLD_SIZE', 1)) > (1 if ':' in args.device else n):
            fail(f'--device {args.device}: one GPU for each process of a node, and this one has {n}: lower --nproc_per_node, or give --device cuda')
        if not index.isdigit() or int(index) >= n:
            fail(f'--device cuda:{index}: there are {n} GPUs, numbered from 0')
        device = f'cuda:{index}'
        torch.cuda.set_device(device)
    sys.excepthook = explain
    if world > 1 and not dist.is_initialized():
        wait = timedelta(seconds=getattr(args, 'timeout', 600))
        store = next(dist.rendezvous('env://', rank, world, timeout=wait))[0]
        if os.environ.get('TORCHELASTIC_USE_AGENT_STORE') == 'True':     # torchrun's own: after --max-restarts it still has the addresses of processes that are gone
            store = dist.PrefixStore(f'attempt_{os.environ["TORCHELASTIC_RESTART_COUNT"]}', store)
        dist.init_process_group('nccl' if kind == 'cuda' else 'gloo', store=store, rank=rank, world_size=world, timeout=wait, **({'device_id': torch.device(device)} if kind == 'cuda' else {}))
        sys.excepthook = explain                     # it had put its own before it
    torch.manual_seed(args.seed)
    dtype, reason = pick_dtype(args.dtype, kind)
    env = Env(rank, world, device, dtype)
    env.print(f'device {device} x {world}, {dtype} ({reason}), torch {torch.__version__}')
    return env


def pick_dtype(asked, kind):
    """'auto', 'bf16' or 'fp32' -> (dtype, reason). bf16 only where the hardware multiplies in it."""
    if kind == 'cuda':
        has, unit = torch.cuda.is_bf16_supported(including_emulation=False), torch.cuda.get_device_name()
    else:
        # private names, so absent is a possible answer
        has = any(getattr(torch.cpu, f'_is_{x}_supported', bool)() for x in ('avx512_bf16', 'amx_tile'))
        unit = 'the CPU'
    if asked == 'fp32':
        return 'fp32', 'as asked'
    if has:
        return 'bf16', f'{unit} multiplies in it' if asked == 'auto' else 'as asked'
    if asked == 'bf16':
        print(f'warning: --dtype bf16, but {unit} has no bf16 arithmetic; using fp32', file=sys.stderr)
    return 'fp32', f'{unit} has no bf16 arithmetic'


def compiled(model, args, env):
    """torch.compile where --compile asks for it, by default on GPU; it needs a compiler of the system."""
    gpu = 'cuda' in env.device
    if not (gpu if args.compile is None else args.compile):
        return model
    need = [os.environ['CC']] if gpu and 'CC' in os.environ else ['gcc', 'clang'] if gpu else [os.environ.get('CXX', 'g++')]
    if not any(map(shutil.which, need)):
        if args.compile:
            fail(f'--compile needs {" or ".join(need)}: install one, or leave the flag out')
        env.print(f'not compiled: {" or ".join(need)} is not installed')
        return model
    torch._dynamo.config.recompile_limit = 64        # --min_length makes a shape of every halving
    return torch.compile(model, dynamic=False)


def check_fused(model, length, env):
    """Says what a bias on every score costs, and where attention of this model, precision and device would fall back to whole T x T scores without a word."""
    c, scores = model.config, f'{4 * model.config.n_head * length ** 2 / 1e6:,.0f} MB'
    if c.pe in ('t5', 'alibi'):
        env.print(f'{c.pe} adds a bias to every score: {scores} at length {length:,}')
    x = torch.zeros(1, min(length, 128, c.block_size), dtype=torch.long, device=env.device)
    try:
        with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]), env.autocast(), warnings.catch_warnings():
            warnings.simplefilter('ignore')
            model(x, x)
    except RuntimeError as e:
        if 'No available kernel' not in str(e):
            raise
        env.print(f'warning: no fused kernel takes this attention (pe={c.pe}, heads of {c.n_embd // c.n_head}, {env.dtype}, {env.device}): it is slower, '
                  f'and each row of {length:,} tokens holds {scores} of scores a layer')


def memory(model, tokens, trained, args, env):
    """
    Bytes that a CPU needs at the least beside the weights: where they are `trained`, their gradients and the
    moments of the optimizer; and what each block keeps of `tokens` tokens for the backward pass, or with activation checkpointing, what enters it.
    """
    c, n, at = model.config, sum(p.numel() for p in model.parameters()), 2 if env.dtype == 'bf16' else 4
    C, kv, inner = c.n_embd, c.n_kv_head * c.n_embd // c.n_head, c.n_inner
    kept = 5 * C + 2 * kv + 3 * inner + (3 * C + kv + inner) * trained           # a token's norms, q, k, v, attention, SwiGLU
    return (12 if trained and args.optimizer == 'adamw' else 8 * trained) * n + at * tokens * (kept + c.n_layer * C if args.activation_checkpointing else kept * c.n_layer)


def lr_factor(step, warmup, decay_steps):
    """The part of the learning rate that update `step` (from 0) uses: a linear warm-up, then a cosine from 1 to 0.1 that ends at decay_steps."""
    if step < warmup:
        return (step + 1) / warmup
    t = min(1.0, (step - warmup) / max(1, decay_steps - warmup))
    return 0.1 + 0.45 * (1 + math.cos(math.pi * t))
