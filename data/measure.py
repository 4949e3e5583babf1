"""
Perplexity by length and the entropy of attention, of any model.
"""
import math
import os
from contextlib import suppress
from itertools import islice
from operator import itemgetter

import torch
from tqdm import tqdm

from data.checkpoint import fingerprint, stem
from data.figures import read_csv, read_json, write_csv, write_json
from data.runtime import Estimate, fail
from data.tokens import anchor

# ---------------------------------------------------------------------------------------------------------------------
# where to score: windows, each (document, end), the tokens before `end`; the last `stride` of them are scored

def windows(docs, longest, stride, tokens):
    """
    The same tokens at every length, each with length - stride to length - 1 tokens before it: all lie past `longest`,
    at least `tokens` of them where there are as many, shared out evenly over the documents and evenly spaced in each.
    """
    room = []                                        # (windows that it has room for, document)
    for doc in docs:
        n = (len(doc) - longest) // stride
        if n > 0:
            room.append((n, doc))
    if not room:
        needed = f'has the {longest + stride:,} tokens of the longest length and a stride'
        too_short(docs, needed, '--lengths or --stride')
    room.sort(key=itemgetter(0))                     # short documents first: what they lack, the others give
    found = []
    for i, (n, doc) in enumerate(room):
        share = math.ceil((tokens / stride - len(found)) / (len(room) - i))
        take = min(n, share)
        for k in range(take):
            found.append((doc, longest + stride * (1 + k * n // take)))
    return found


def beginnings(docs, length, stride, tokens):
    """
    For a model that was trained on beginnings of documents: the first `length` tokens of documents that have as many,
    and no more than twice as many, so that what matters lies about as often inside the window at every length.
    """
    fitting = [doc for doc in docs if length < len(doc) <= 2 * length]
    if not fitting:
        fail(f'no document of val.bin has {length:,} to {2 * length:,} tokens, which is what rows that begin with a '
             'document are measured on: give --rows anywhere')
    n = min(len(fitting), math.ceil(tokens / stride))
    found = []
    for i in range(n):                               # evenly spaced among them
        found.append((fitting[i * len(fitting) // n], length))
    return found


def paper_windows(docs, length, stride, tokens):
    """
    The rule of Wang et al. (their run_ppl.py): document after document, windows that end at `length`, length + stride,
    and so on inside it. So each length has tokens, and maybe documents, of its own. (With 8 GPUs their 16 workers share
    the budget. One that has its 512 windows empties the queue of documents without scoring them, so the others may stop
    short. Here there is one, which reads documents whole.)
    """
    found = list(islice(ends_inside(docs, length, stride), math.ceil(tokens / stride)))
    if not found:
        too_short(docs, f'is longer than {length:,} tokens', '--lengths')
    return found


def ends_inside(docs, length, stride):
    for doc in docs:
        for end in range(length, len(doc), stride):
            yield doc, end


def too_short(docs, needed, flags):
    longest = max(map(len, docs))
    fail(f'no document of val.bin {needed} (the longest has {longest:,}): lower {flags}')


def choose_windows(docs, lengths, stride, tokens, paper, past, rows):
    """{length: windows}, by the rule that paper and rows name."""
    if not paper and rows != 'documents':
        return dict.fromkeys(lengths, windows(docs, past or max(lengths), stride, tokens))
    rule = paper_windows if paper else beginnings
    found = {}
    for length in lengths:
        found[length] = rule(docs, length, stride, tokens)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# perplexity and entropy

def flops(model, n):
    """In proportion to the arithmetic of n tokens: causal attention is half of what flops_per_token counts."""
    return n * (model.flops_per_token(n) + model.flops_per_token(0)) / 2


@torch.inference_mode()
def perplexity(model, docs, bos, lengths, stride, tokens, env, batch_tokens, paper=False, past=None, rows='anywhere'):
    """
    -> a row {length, stride, docs, tokens, nll, ppl} for each length; nll is the mean over all scored tokens, in nats.
    They are the same ones at every length, past `past` tokens (default: the longest length) of their documents; the
    exceptions are paper (see paper_windows) and rows='documents' (see beginnings).
    """
    at = choose_windows(docs, lengths, stride, tokens, paper, past, rows)
    if paper or rows == 'documents':
        bos = None                                   # a window is as it comes
    out = []
    work, all_tokens = {}, 0                         # work: of each length, in operations
    for length, ends in at.items():
        work[length] = len(ends) * flops(model, length)
        all_tokens += length * len(ends)
    estimate = Estimate(env, sum(work.values()), 'fewer --lengths or --eval_tokens take less')
    bar = tqdm(total=all_tokens, unit='tok', unit_scale=True, desc='perplexity', disable=not env.master, leave=False,
               dynamic_ncols=True)
    for length, ends in at.items():
        mine = ends[env.rank::env.world]
        size = max(1, batch_tokens // length)
        total = torch.zeros(1, dtype=torch.float64)
        for i in range(0, len(mine), size):
            x = anchor([doc[end - length:end] for doc, end in mine[i:i + size]], bos).to(env.device)
            with env.autocast():
                loss = model(x[:, :-1], x[:, -stride:], rows=slice(-stride, None))[1]
            total += loss.item() * len(x) * stride
            estimate.update(len(x) * env.world / len(ends) * work[length])
            bar.update(len(x) * length * env.world)
        scored = len(ends) * stride
        nll = env.sum(total).item() / scored
        n_docs = len({id(doc) for doc, _ in ends})
        out.append(dict(length=length, stride=stride, docs=n_docs, tokens=scored, nll=nll, ppl=math.exp(nll)))
    bar.close()
    return out


def long_enough(docs, T):
    """The documents that have T tokens, of which there must be one."""
    found = [doc for doc in docs if len(doc) >= T]
    if not found:
        too_short(docs, f'has {T:,} tokens', '--lengths')
    return found


def attention_entropy(q, k, block=256, bias=None):
    """
    q (B, nh, T, hs), k (B, nkv, T, hs), bias (1, nh, T, T) on the scores, or a bool mask (T, T) -> (nh, T): the entropy
    of each query's causal attention in nats, mean over B (Wang et al. 2024, eq. 2). Exact, and `block` rows of the
    T x T scores at a time.
    """
    B, nh, T, hs = q.shape
    k = k.repeat_interleave(nh // k.size(1), dim=1).float()
    entropy = []
    with torch.autocast(q.device.type, enabled=False):       # or the fp32 product would go back to bf16
        for i in range(0, T, block):
            # (B, nh, block, up to i + block)
            scores = q[:, :, i:i + block].float() @ k[:, :, :i + block].transpose(-1, -2) / math.sqrt(hs)
            if bias is not None and bias.dtype == torch.bool:
                scores = scores.masked_fill(~bias[i:i + block, :i + block], -math.inf)
            elif bias is not None:
                scores = scores + bias[..., i:i + block, :i + block]
            n = scores.size(2)
            future = torch.ones(n, n, dtype=torch.bool, device=q.device).triu(1)
            scores[..., i:].masked_fill_(future, -math.inf)
            entropy.append(torch.special.entr(scores.softmax(-1)).sum(-1).mean(0))
    return torch.cat(entropy, dim=-1)


@torch.inference_mode()
def entropies(model, docs, T, env, samples=4):
    """-> (n_layer, n_head, T): mean over the first T tokens of up to `samples` documents, shared by all processes."""
    docs = long_enough(docs, T)[:samples]
    total = torch.zeros(model.config.n_layer, model.config.n_head, T, device=env.device)
    found = []

    def look(attn, x, given):
        q, k, _ = attn.qkv(*x, given['rope'], given['grown'])
        mask = given['mask']
        if attn.window:
            pos = torch.arange(q.size(2), device=q.device)
            mask = pos[:, None] - pos < attn.window
        found.append(attention_entropy(q, k, bias=mask))

    mine = tqdm(docs[env.rank::env.world], desc='entropy', disable=not env.master, leave=False, dynamic_ncols=True)
    estimate = Estimate(env, len(docs), 'shorter --lengths take less, --measure ppl leaves it out')
    hooks = [block.attn.register_forward_pre_hook(look, with_kwargs=True) for block in model.blocks]
    for doc in mine:
        found.clear()
        with env.autocast():
            model(anchor([doc[:T]], None).to(env.device), rows=slice(-1, None))
        total += torch.stack(found)
        estimate.update(env.world)
    for hook in hooks:
        hook.remove()
    return env.sum(total).cpu() / len(docs)


def entropy_rows(entropy, bands=32):
    """(n_layer, n_head, T) -> rows {layer, head, position (the last of its band), entropy (the band's mean)}."""
    n_layer, n_head, T = entropy.shape
    ends = sorted({T * i // bands for i in range(bands + 1)})        # a short T has fewer bands
    rows = []
    for layer in range(n_layer):
        for h in range(n_head):
            for start, end in zip(ends, ends[1:]):
                mean = entropy[layer, h, start:end].mean().item()
                rows.append(dict(layer=layer, head=h, position=end, entropy=mean))
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# what extend.py writes

def measure(model, name, docs, bos, args, env):
    """-> the rows of perplexity and those of entropy, none of what --measure leaves out. Writes their csv."""
    ppl, entropy = [], []
    lengths = f'{args.lengths[0]:,} to {args.lengths[-1]:,} tokens'
    if 'ppl' in args.measure:
        env.print(f'{name}: perplexity at {len(args.lengths)} lengths, {lengths}, on {args.eval_tokens:,} tokens each')
        ppl = perplexity(model, docs, bos, args.lengths, args.stride, args.eval_tokens, env, args.batch_tokens,
                         args.protocol == 'paper', args.past, args.rows)
    if 'entropy' in args.measure:
        env.print(f'{name}: attention entropy on up to 4 documents of {args.lengths[-1]:,} tokens')
        entropy = entropy_rows(entropies(model, docs, args.lengths[-1], env))
    write_measured(name, ppl, entropy, args, env)
    return ppl, entropy


def write_measured(name, ppl, entropy, args, env):
    """<name>.ppl.csv and <name>.entropy.csv in args.out, as far as there are rows."""
    paper = '.paper' if args.protocol == 'paper' else ''
    if env.master and ppl:
        write_csv(f'{args.out}/{name}{paper}.ppl.csv', ppl)
    if env.master and entropy:
        write_csv(f'{args.out}/{name}.entropy.csv', entropy)


def forget(stem):
    """Removes what was measured of a checkpoint: another one has taken its name."""
    for kind in '.ppl.csv', '.paper.ppl.csv', '.entropy.csv', '.passkey.csv', '.passkey.json', '.measured.json':
        with suppress(FileNotFoundError):
            os.remove(stem + kind)


def measure_base(model, docs, bos, meta, args, env):
    """
    measure() of --ckpt itself, once for all its extensions: a file beside the csv keeps the rows and what made them.
    Only --method none always measures again.
    """
    name = stem(args.ckpt)
    file = f'{args.out}/{name}.measured.json'
    made_by = dict(checkpoint=fingerprint(args.ckpt), data=meta['val']['sha256'], bos=bos, dtype=env.dtype)
    for flag in 'lengths', 'stride', 'eval_tokens', 'protocol', 'past', 'rows':
        made_by[flag] = getattr(args, flag)

    kept = env.broadcast(read_json(file)) or {}      # all processes must decide alike
    alike = kept.get('made_by') == made_by and all(kept[what] for what in args.measure)
    if alike and args.method != 'none':
        env.print(f'{args.ckpt} was measured before: its numbers are those of {file}')
        ppl = kept['ppl'] if 'ppl' in args.measure else []
        entropy = kept['entropy'] if 'entropy' in args.measure else []
        write_measured(name, ppl, entropy, args, env)
        return ppl, entropy
    ppl, entropy = measure(model, name, docs, bos, args, env)
    if env.master:
        write_json(file, dict(made_by=made_by, ppl=ppl, entropy=entropy))
    return ppl, entropy


# ---------------------------------------------------------------------------------------------------------------------
# what eval_passkey.py goes on with

def rows_so_far(file, note, made_by, columns, resume):
    """
    Rows of an existing csv, if --resume continues it; the note beside it says which checkpoint and flags made them.
    columns: {name: type}.
    """
    if resume and os.path.exists(file):
        if read_json(note) != made_by:
            fail(f'{file} is of another checkpoint or other flags: leave out --resume, or choose another --out')
        rows = []
        try:
            for words in read_csv(file):
                rows.append({name: kind(words[name]) for name, kind in columns.items()})
        except (KeyError, TypeError, ValueError):
            fail(f'{file} is damaged: leave out --resume, or choose another --out')
        print(f'{file} has {len(rows)} prompts already')
        return rows
    return []


def save_rows(file, note, made_by, rows):
    """The rows so far, and the note. A csv without a note is refused, so the note of other rows goes first."""
    if read_json(note) != made_by:
        with suppress(FileNotFoundError):
            os.remove(note)
    write_csv(file, rows)
    write_json(note, made_by)
