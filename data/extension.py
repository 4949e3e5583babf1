"""
What the methods of extend.py share: the temperatures of a model, the corpus that they read, the loss that they go by;
and which of its flags fit each other.
"""
import math
import os
from operator import itemgetter
from typing import NamedTuple

import torch
from tqdm import tqdm

from data.checkpoint import find_checkpoint
from data.figures import default_lengths
from data.positions import growth
from data.runtime import fail, memory
from data.tokens import describe_rows, get_batch, open_data, open_rows


class Corpus(NamedTuple):
    """What methods read: token ids, the id that begins a row, the documents that rows begin with (None: anywhere)."""
    tokens: object
    bos: int                     # None: rows are as they come
    docs: tuple = None


class Record(NamedTuple):
    """How a method found what it changed in the model."""
    curve: list = []             # (lambda, loss) of each that was tried; LongRoPE: (candidates so far, lowest loss)
    losses: list = []            # of each step of tuning
    batches: int = 0             # of args.batch rows that were read


def heads(model, what='scale'):
    """The temperatures of all heads, or their slopes: (n_layer, n_head), on the CPU."""
    return torch.stack([getattr(block.attn, what).detach() for block in model.blocks]).cpu()


def set_heads(model, value, what='scale'):
    """value: a number for the layers whose temperatures are tuned, or a tensor (n_layer, n_head)."""
    shape = (model.config.n_layer, model.config.n_head)
    rows = torch.as_tensor(value, dtype=torch.float32).expand(shape)
    for layer in model.config.tempered:
        getattr(model.blocks[layer].attn, what).data.copy_(rows[layer])


def set_law(model, law, at):
    """A law (see growth) in units of `at` tokens, with the slope that it was published with, for all heads."""
    model.config.law, model.config.law_at = law, at
    slope = dict(logn=1 / math.log(at), llama4=0.1, swan=1 / math.log(at))[law]
    set_heads(model, slope, 'slope')


def growth_at(model, length):
    """What slopes multiply in the last of `length` tokens."""
    return growth(model.config, torch.tensor([length])).item()


def as_trained(model):
    """Whether all temperatures and frequencies are those of training."""
    return bool((heads(model) == 1).all()) and not heads(model, 'slope').any() and not model.config.rope_inv_freq


def best_of(values, use, what, model, corpus, args, env):
    """
    Tries each value by use(value), and keeps the one with the lowest loss. As in the paper's fit (app. B), positions
    past the training length are scored: those within it need no sharpening.
    """
    past = model.config.block_size
    if args.length <= past:
        past = 0
    curve = []
    for value in progress(env, values, desc=f'grid of {what} at {args.length}', leave=False):
        use(value)
        curve.append((value, loss_of(model, corpus, args, env, past)))
    best, lowest = min(curve, key=itemgetter(1))
    highest = max(curve, key=itemgetter(1))[1]
    use(best)

    tokens = args.grid_batches * args.batch * (args.length - past)
    env.print(f'{what} at {args.length}, loss on {tokens:,} tokens past {past}:')
    for value, loss in curve:
        bar = '#' * int(40 * (loss - lowest) / max(1e-9, highest - lowest))
        mark = '  <- best' if value == best else ''
        env.print(f'  {value:5.2f}  {loss:.4f}  {bar}{mark}')
    return Record(curve=curve, batches=len(curve) * args.grid_batches)


GRID_STEP = 10**9                # what is tried on a grid sees other batches than any step of tuning


@torch.no_grad()
def loss_of(model, corpus, args, env, past=0):
    """Mean loss after `past` tokens of a row, on the args.grid_batches batches that every candidate is tried on."""
    total = torch.zeros((), dtype=torch.float64, device=env.device)
    for i in range(args.grid_batches):
        for x, y in micro_batches(corpus, args, env, GRID_STEP + i):
            with env.autocast():
                loss = model(x, y[:, past:], rows=slice(past, None))[1]
                total += loss.double() * len(x) / args.batch / args.grid_batches
    return env.sum(total).item()


def micro_batches(corpus, args, env, step):
    """This process's part of a batch of args.batch rows: [(idx, targets)], each (up to args.micro_batch, length)."""
    x, y = get_batch(corpus.tokens, corpus.bos, args.batch, args.length, args.seed, step, env.rank, env.world,
                     corpus.docs)
    return list(zip(x.to(env.device).split(args.micro_batch), y.to(env.device).split(args.micro_batch)))


def progress(env, *args, **kwargs):
    """A progress bar, on one process."""
    return tqdm(*args, disable=not env.master, dynamic_ncols=True, **kwargs)


def reads_corpus(args, method):
    """Whether train.bin is read. A law as published needs no tokens, but SWAN's looks for its unit."""
    as_published = args.method == 'uniform' and args.law and (args.law != 'swan' or args.law_at)
    return method.reads_corpus and not as_published


def open_corpus(args, meta, bos, why, env):
    """What a method reads: args.data's train.bin, in rows of args.length."""
    tokens, _ = open_data(args.data, 'train')
    docs = open_rows(args.rows, tokens, meta, 'train', args.length, args.data)
    env.print(describe_rows(args.rows, why, tokens, args.length, docs, bos))
    return Corpus(tokens, bos, docs)


HEADROOM = 2 * 10**9             # bytes that memory() leaves out: the allocator's, the library's


def fit_micro_batch(args, model, tuned, env):
    """Rows in one forward pass: as asked, else this process's share of the batch, on a GPU what fits of it."""
    share = args.batch // env.world
    if args.micro_batch:
        return min(args.micro_batch, share)
    rows = share
    if tuned and 'cuda' in env.device:
        free = torch.cuda.mem_get_info()[0] - HEADROOM
        while rows > 1 and 1.3 * memory(model, rows * args.length, False, args, env) > free:
            rows //= 2
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# flags

def resolve(args, ckpt, config):
    """Gives a value to every flag that has none. Returns why rows begin where they do."""
    args.length = args.length or 4 * config.block_size
    args.lengths = sorted(set(args.lengths or default_lengths(config)))
    args.stride = args.stride or max(1, args.lengths[0] // 2)
    if args.eval_tokens == 0:
        args.measure = []
    config.temperatures = args.temperatures or config.temperatures
    args.out = args.out or os.path.dirname(find_checkpoint(args.ckpt)) or '.'
    if args.bos is None:
        args.bos = ckpt['args'].get('bos', True)
    if args.rows:
        return 'as asked'
    args.rows = ckpt['args'].get('rows', 'anywhere')
    return 'as the checkpoint was trained'


def check(args, rope_only, model, env):
    """
    Ends the program where the flags do not fit each other, the checkpoint or the processes. rope_only: whether the
    method is for RoPE alone.
    """
    L, pe = model.config.block_size, model.config.pe
    if args.method in ('head', 'head-log') and args.focus and args.init != 'best' and args.init < 1:
        fail(f'--init {args.init} lies below the focus constraint: 1 or more, or --no-focus')
    if args.law and args.method not in ('uniform', 'head'):
        fail(f'--law {args.law} is for --method uniform and head')
    if args.law_at and (not args.law or args.law_at < 2):
        fail(f'--law_at {args.law_at} belongs to a --law, and must be at least 2 tokens')
    if args.law in ('logn', 'llama4') and args.length <= (args.law_at or L):
        fail(f'--law {args.law} changes what lies past {args.law_at or L} tokens: '
             f'--length {args.length} must be longer')
    if args.lengths[0] < 2:
        fail(f'--lengths {args.lengths[0]} must be at least 2')
    if args.stride >= args.lengths[0]:
        fail(f'--stride {args.stride} must lie between 1 and the shortest of --lengths less one, {args.lengths[0] - 1}')
    if args.past and args.protocol == 'paper':
        fail('--past is for --protocol same')
    if args.past and args.past < args.lengths[-1]:
        fail(f'--past {args.past} must be at least the longest of --lengths, {args.lengths[-1]}')
    if args.method == 'none':
        return
    if args.batch % env.world:
        fail(f'--batch {args.batch} must be a multiple of the {env.world} processes')
    if model.config.law == 'ssmax':
        fail(f'{args.ckpt} has learned its temperatures (scalable softmax): measure it with --method none')
    if (heads(model) != 1).any() or (heads(model, 'slope') != 0).any():
        fail(f'{args.ckpt} has been extended already, or was imported with temperatures (YaRN, gains): start '
             'from a checkpoint without')
    if rope_only and pe != 'rope':
        fail(f'--method {args.method} stretches the frequencies of pe=rope: {args.ckpt} is pe={pe}')
    if rope_only and model.config.rope_inv_freq:
        fail(f'--method {args.method} stretches frequencies as trained: those of {args.ckpt} are stretched already')
    if rope_only and args.length <= L:
        fail(f'--method {args.method} needs a --length above the training length {L}: not {args.length}')
    if rope_only and model.config.rope_fraction < 1:
        fail(f'--method {args.method} stretches all frequencies: of rope_fraction {model.config.rope_fraction:g} '
             'some are zero')
    if args.method.endswith('-log') and args.length <= L:
        fail(f'--method {args.method} changes what lies past the training length {L}: '
             f'--length {args.length} must be longer')
