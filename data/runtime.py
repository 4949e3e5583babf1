"""
What every script begins with: its command line, the device, the precision, the other processes. Whatever a user can
get wrong ends in fail(): one line that says what to do, exit code 2.
"""
import argparse
import copy
import functools
import math
import os
import shutil
import signal
import sys
import time
import warnings
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from model import GPT


def fail(message, everywhere=False):
    """
    Ends the program with one line and exit code 2. Under torchrun all processes find the same fault, so one process of
    each node prints it. everywhere: perhaps only this process has found it, so it prints the line whichever it is.
    """
    if everywhere or os.environ.get('LOCAL_RANK', '0') == '0':
        print(f'error: {message}', file=sys.stderr, flush=True)
    finish(2)
    sys.exit(2)


def finish(code=0):
    """Where there are other processes, ends this one at once: threads left behind by gloo may abort a normal exit."""
    if dist.is_initialized():
        if not code:
            dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class HelpWithDefaults(argparse.RawDescriptionHelpFormatter):
    """--help names the default of each flag whose own help does not."""

    def add_argument(self, action):
        value, text = action.default, action.help or ''
        if isinstance(value, list):
            value = (' ' if action.nargs else ',').join(map(str, value))
        is_value = isinstance(value, str | int | float) and not isinstance(value, bool) and value != ''
        if is_value and value != argparse.SUPPRESS and 'default' not in text:
            action.help = f'{text} (default {value})'.strip()
        super().add_argument(action)


def parser(doc):
    """An argparse.ArgumentParser that prints the docstring as it is, without abbreviations; bad flags cost one line."""
    if sys.platform == 'win32':
        fail('Windows is not supported (files are locked and replaced as on Linux): run this inside WSL')
    p = argparse.ArgumentParser(description=doc, allow_abbrev=False, formatter_class=HelpWithDefaults)
    p.error = lambda message: fail(f'{message} (--help lists the flags)')
    sys.excepthook = explain

    def parse_args(argv=None):
        args = argparse.ArgumentParser.parse_args(p, argv)
        for a in p._actions:
            # before Python 3.13 this is what argparse makes of --flag=--
            if a.nargs is None and getattr(args, a.dest, None) == []:
                p.error(f'--{a.dest} needs a value')
        return args
    p.parse_args = parse_args
    return p


# ---------------------------------------------------------------------------------------------------------------------
# argument types: each flag's range stands beside it, and what lies outside costs one line

def number(text, kind, holds, words):
    """The number in `text`, where holds(number) is true; otherwise argparse says that it must be `words`."""
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


def share(text):
    return number(text, float, lambda x: 0 < x <= 1, 'above 0, and at most 1')


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
    """Where a script runs: which process of how many, on which device, in which precision."""
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
    """sys.excepthook: Ctrl-C, too little memory, and a process that has lost the others cost one line as well."""
    if kind is KeyboardInterrupt:
        if os.environ.get('LOCAL_RANK', '0') == '0':
            print('interrupted: the files written so far are complete', file=sys.stderr, flush=True)
        finish(130)
        return
    first = (str(e).splitlines() or [''])[0]
    line = None
    if issubclass(kind, torch.OutOfMemoryError) or 'not enough memory' in first:
        line = (f'out of memory: lower --micro_batch (eval_passkey.py --batch_tokens) or --length, '
                f'or give --activation_checkpointing. {first}')
    elif issubclass(kind, dist.DistError) or 'gloo' in first:
        line = (f'rank {os.environ.get("RANK")} lost another process, which has ended or not answered in time; '
                f'start again, train.py with --resume. {first}')
    if line:
        print(f'error: {line}', file=sys.stderr, flush=True)
    else:
        sys.__excepthook__(kind, e, trace)
    finish(1)


def setup(args, dtype_later=False):
    """
    Reads torchrun's environment and args.device, args.dtype, args.seed. Returns an Env.
    dtype_later: choose_dtype() will set its precision and print the line about the device.
    """
    if not 0 <= args.seed < 2**63:
        fail(f'--seed {args.seed} must lie between 0 and 2^63')
    rank = int(os.environ.get('RANK', 0))
    world = int(os.environ.get('WORLD_SIZE', 1))
    device = pick_device(args.device)
    if world > 1 and not dist.is_initialized():
        meet(rank, world, device, timedelta(seconds=getattr(args, 'timeout', 600)))
        sys.excepthook = explain                     # torch.distributed had put its own before it
    torch.manual_seed(args.seed)
    env = Env(rank, world, device)
    if not dtype_later:
        env.dtype, reason = pick_dtype(args.dtype, device)
        env.print(f'device {device} x {world}, {env.dtype} ({reason}), torch {torch.__version__}')
    return env


def pick_device(asked):
    """'auto', 'cpu', 'cuda' or 'cuda:N' -> 'cpu' or 'cuda:N'; by default N is this process's number on its node."""
    kind, colon, index = asked.partition(':')
    if kind == 'auto':
        kind = 'cuda' if torch.cuda.is_available() else 'cpu'
    if kind not in ('cpu', 'cuda'):
        fail(f'--device {asked} is unknown: auto, cpu, cuda or cuda:N')
    if kind == 'cpu':
        return kind
    if not torch.cuda.is_available():
        fail('--device cuda: this torch finds no GPU. Use --device cpu, or install a CUDA build of torch')
    n = torch.cuda.device_count()
    processes = int(os.environ.get('LOCAL_WORLD_SIZE', 1))
    if processes > (1 if colon else n):
        fail(f'--device {asked}: one GPU for each process of a node, and this one has {n}: '
             'lower --nproc_per_node, or give --device cuda')
    if not colon:
        index = os.environ.get('LOCAL_RANK', '0')
    if not index.isdigit() or int(index) >= n:
        fail(f'--device cuda:{index}: there are {n} GPUs, numbered from 0')
    torch.cuda.set_device(f'cuda:{index}')
    return f'cuda:{index}'


def meet(rank, world, device, timeout):
    """Joins the processes of a job: NCCL between GPUs, gloo between CPUs."""
    store = next(dist.rendezvous('env://', rank, world, timeout=timeout))[0]
    if os.environ.get('TORCHELASTIC_USE_AGENT_STORE') == 'True':
        # torchrun's own store: after a restart it still has the addresses of processes that are gone
        store = dist.PrefixStore(f'attempt_{os.environ["TORCHELASTIC_RESTART_COUNT"]}', store)
    if device == 'cpu':
        dist.init_process_group('gloo', store=store, rank=rank, world_size=world, timeout=timeout)
    else:
        dist.init_process_group('nccl', store=store, rank=rank, world_size=world, timeout=timeout,
                                device_id=torch.device(device))


# ---------------------------------------------------------------------------------------------------------------------
# precision

def pick_dtype(asked, device):
    """'auto', 'bf16' or 'fp32' -> (dtype, reason). bf16 only where the hardware computes in it."""
    if 'cuda' in device:
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        unit = torch.cuda.get_device_name()
    else:
        # private names: a version of torch may lack them
        has_bf16 = False
        for instructions in ('avx512_bf16', 'amx_tile'):
            is_supported = getattr(torch.cpu, f'_is_{instructions}_supported', None)
            if is_supported is not None and is_supported():
                has_bf16 = True
        unit = 'the CPU'
    if asked == 'fp32':
        return 'fp32', 'as asked'
    if has_bf16:
        return 'bf16', 'as asked' if asked == 'bf16' else f'{unit} supports it'
    if asked == 'bf16':
        print(f'warning: --dtype bf16, but {unit} has no bf16 arithmetic; using fp32', file=sys.stderr)
    return 'fp32', f'{unit} has no bf16 arithmetic'


def choose_dtype(env, asked, config, length, training=False, why='as asked'):
    """
    Sets env.dtype, and prints the line about the device. asked: 'bf16', 'fp32', or 'auto': on a GPU bf16 where the
    hardware has it, on a CPU what is faster for a model of this config and rows of `length` tokens. why: who asked.
    """
    dtype, reason = pick_dtype(asked, env.device)
    if reason == 'as asked':
        reason = why
    if asked == 'auto' and dtype == 'bf16' and env.device == 'cpu':
        # having the instructions is not enough: CPUs that have them may still be slower with them
        fp32, bf16 = time_block(config, length, training)
        if bf16 > 0.9 * fp32:                        # a close call goes to the more exact one
            dtype = 'fp32'
        reason = f'a block of this model takes {1000 * fp32:.1f} ms in fp32, {1000 * bf16:.1f} ms in bf16'
    # measured by each process, decided by the first
    env.dtype, reason = env.broadcast((dtype, reason))
    env.print(f'device {env.device} x {env.world}, {env.dtype} ({reason}), torch {torch.__version__}')


def time_block(config, length, training):
    """
    Seconds that one block of the model, with a head as small as its other matrices, takes for a few rows: (fp32, bf16).
    Forward and backward where it is training, else forward with frozen weights. The shortest of several runs in turn.
    """
    config = replace(config, pe=config.layer_pe[0], window=config.layer_window[0])
    block_flops = 6 * (4 * config.n_embd + 3 * config.n_inner) * config.n_embd           # a token, both ways
    tokens = min(max(10**9 // block_flops, 64), 512)         # so that a small model takes 0.2 s in all
    T = min(length, tokens)
    vocab = min(config.vocab_size, config.n_embd)
    shape = replace(config, n_layer=1, block_size=T, vocab_size=vocab, tie_embeddings=False)
    with torch.random.fork_rng(devices=[]):          # the run's own random numbers stay what they are
        model = GPT(shape)
    idx = torch.arange(tokens // T * T).view(-1, T) % shape.vocab_size
    models = dict(fp32=model, bf16=copy.deepcopy(model))
    if not training:
        for module in models['bf16'].modules():      # as checkpoint.frozen() keeps them
            if isinstance(module, torch.nn.Linear):
                module.to(torch.bfloat16)

    shortest = dict(fp32=math.inf, bf16=math.inf)
    rounds, began = 0, time.perf_counter()
    while rounds < 3 or time.perf_counter() - began < 0.2:
        for dtype in shortest:
            start = time.perf_counter()
            with torch.set_grad_enabled(training), Env(dtype=dtype).autocast():
                loss = models[dtype](idx, idx)[1]
            if training:
                loss.backward()
            shortest[dtype] = min(shortest[dtype], time.perf_counter() - start)
        rounds += 1
    return shortest['fp32'], shortest['bf16']


# ---------------------------------------------------------------------------------------------------------------------
# the model on this machine

def compiled(model, args, env):
    """torch.compile where --compile asks for it, by default on GPU; it needs a compiler of the system."""
    gpu = 'cuda' in env.device
    wanted = gpu if args.compile is None else args.compile
    if not wanted:
        return model
    if gpu:
        compilers = [os.environ['CC']] if 'CC' in os.environ else ['gcc', 'clang']
    else:
        compilers = [os.environ.get('CXX', 'g++')]
    if not any(map(shutil.which, compilers)):
        names = ' or '.join(compilers)
        if args.compile:
            fail(f'--compile needs {names}: install one, or leave the flag out')
        env.print(f'not compiled: {names} is not installed')
        return model
    failure = trial_compile(env.device)
    if failure:
        if args.compile:
            fail(f'--compile fails on one line of code ({failure}): install the compiler with its headers '
                 '(build-essential, python3-dev), or leave the flag out')
        env.print(f'not compiled: torch.compile fails on one line of code ({failure})')
        return model
    torch._dynamo.config.recompile_limit = 64        # --min_length makes a shape of every halving
    return torch.compile(model, dynamic=False)


@functools.cache
def trial_compile(device):
    """Why torch.compile does not work here, in one line; None where it does. A compiler may lack its headers."""
    try:
        torch.compile(lambda x: x.exp() + 1)(torch.zeros(8, device=device))
    except Exception as e:                           # of dynamo, inductor, triton or the compiler
        lines = [line.strip() for line in str(e).splitlines() if line.strip()]
        told = [line for line in lines if 'error' in line.lower()] or lines or [type(e).__name__]
        return told[0][:160]
    return None


def check_fused(model, length, env):
    """
    Says what a bias on every score costs, and where the attention of this model, precision and device would silently
    fall back to whole T x T scores.
    """
    c = model.config
    scores = f'{4 * c.n_head * length ** 2 / 1e6:,.0f} MB'
    if c.pe in ('t5', 'alibi'):
        env.print(f'{c.pe} adds a bias to every score: {scores} at length {length:,}')
    x = torch.zeros(1, min(length, 128, c.block_size), dtype=torch.long, device=env.device)
    fused = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    try:
        with sdpa_kernel(fused), env.autocast(), warnings.catch_warnings():
            warnings.simplefilter('ignore')
            model(x, x)
    except RuntimeError as e:
        if 'No available kernel' not in str(e):
            raise
        env.print(f'warning: no fused kernel takes this attention (pe={c.pe}, heads of {c.n_embd // c.n_head}, '
                  f'{env.dtype}, {env.device}): it is slower, and each row of {length:,} tokens holds {scores} '
                  'of scores a layer')


def memory(model, tokens, trained, args, env):
    """
    Bytes that a CPU needs beside the weights, at the least: their gradients and the moments of the optimizer where they
    are `trained`, and what autograd keeps of `tokens` tokens for the backward pass.
    """
    c = model.config
    C, kv, inner = c.n_embd, c.n_kv_head * c.n_embd // c.n_head, c.n_inner
    # what a block keeps of a token, in numbers:
    #   5 C      the inputs of the two norms, q before and after its temperature, the output of attention
    #   2 kv     k and v
    #   3 inner  the gate, its SiLU and what that multiplies
    kept = 5 * C + 2 * kv + 3 * inner
    if trained:
        # the gradient of a matrix needs what the matrix was multiplied by:
        #   3 C      the outputs of the two norms, and those of the heads side by side
        #   inner    what enters down_proj
        kept += 3 * C + inner
    blocks = kept * c.n_layer
    if args.activation_checkpointing:                # the input of each block, and one block that is computed again
        blocks = kept + c.n_layer * C
    size = 2 if env.dtype == 'bf16' else 4
    # fp32 for each weight: the gradient and one moment (Muon), or two (AdamW)
    each = 0
    if trained:
        each = 12 if args.optimizer == 'adamw' else 8
    return each * sum(p.numel() for p in model.parameters()) + size * tokens * blocks


def parallel(model, env):
    """For several processes: the weights of the first one in all, and gradients that are averaged over them."""
    if env.world == 1:
        return model
    # else torch.compile cuts its graph at DDP's buckets, and cannot where the loss is computed in checkpointed chunks
    torch._dynamo.config.optimize_ddp = False
    return DistributedDataParallel(model, gradient_as_bucket_view=True)


def accumulating(model, last):
    """The context of one micro-batch: with several processes, gradients meet in the `last` one of a step only."""
    if last or not isinstance(model, DistributedDataParallel):
        return nullcontext()
    return model.no_sync()


# ---------------------------------------------------------------------------------------------------------------------
# while a run lasts

def listen():
    """From now on SIGTERM and SIGINT do not end the program. -> an object whose `signal` is the one that came, or 0."""
    heard = argparse.Namespace(signal=0)

    def on_signal(number, _):
        heard.signal = number
        # a launcher and a scheduler may both send SIGTERM; a second Ctrl-C means it
        signal.signal(number, signal.SIG_DFL if number == signal.SIGINT else signal.SIG_IGN)

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
    return heard


LONG = 20                        # seconds: what takes less needs no announcement
FIRST = 2                        # seconds of work before the total is estimated: the first calls are slow


class Estimate:
    """
    Says once how long the work will take, if that is long, and what makes it `shorter`. Appears above a progress bar.
    work: its total, in any unit.
    """

    def __init__(self, env, work, shorter):
        self.env, self.work, self.shorter = env, work, shorter
        self.began, self.done, self.silent = time.time(), 0, False

    def update(self, done):
        """Adds `done` to the work done so far."""
        self.done += done
        elapsed = time.time() - self.began
        if self.silent or elapsed < FIRST:
            return
        self.silent = True
        seconds = elapsed * self.work / self.done
        if self.env.master and seconds > LONG:
            about = f'{seconds:.0f} s'
            if seconds > 100:
                about = f'{seconds / 60:.0f} min'
            if seconds > 6000:
                about = f'{seconds / 3600:.0f} h'
            tqdm.write(f'this takes about {about}: {self.shorter}')


def lr_factor(step, warmup, decay_steps):
    """
    What update `step` (from 0) multiplies the learning rate by: a linear warm-up, then a cosine from 1 to 0.1 that ends
    at decay_steps.
    """
    if step < warmup:
        return (step + 1) / warmup
    t = min(1.0, (step - warmup) / max(1, decay_steps - warmup))
    return 0.1 + 0.45 * (1 + math.cos(math.pi * t))
