"""
What the methods of extend.py share: the temperatures of a model, the corpus that they read, the loss that they go by.
"""
import math
from operator import itemgetter
from typing import NamedTuple

import torch
from tqdm import tqdm

from data.positions import growth
from data.runtime import memory
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
    for value in progress(env, values, desc=f'{args.method} at {args.length}', leave=False):
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
