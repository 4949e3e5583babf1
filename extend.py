"""
Extends a trained checkpoint past its training length, and measures what that does.

    python extend.py --ckpt out/nope --data data/passkey_rare --method none                     # evaluate only
    python extend.py --ckpt out/nope --data data/passkey_rare --method uniform --length 1024    # one temperature for all heads
    python extend.py --ckpt out/nope --data data/passkey_rare --method head --length 1024       # one for each (layer, head)
    python extend.py --ckpt out/rope --data data/passkey_rare --method longrope --length 1024 --population 16 --iterations 10
    torchrun --standalone --nproc_per_node=8 extend.py --ckpt out/tinyllama --data data/corpus --method head --length 8192 --lr 0.1
the paper's Table 2: --method none --lengths 2048,4096,8192,16384 --stride 256 --eval_tokens 2097152 --protocol paper

for any encoding, by sharper attention: lambda_h = scale_h + slope_h ln max(1, n / L), n tokens, training length L
  uniform      one scale for all heads: the one on --grid with the lowest loss at --length on train.bin (Wang et al. 2024, sec. 3)
  head         scale_h of each head, tuned by gradient at --length with every weight frozen (sec. 4, eq. 4 to 6, app. A):
               from the best uniform one, 200 steps of AdamW, never below 1 (the focus constraint)
  uniform-log  the same two, read as a slope: at --length the same temperatures, but none up to the training length, where
  head-log     the model is unchanged, bit for bit, and in between and beyond what the logarithm of the length asks for
for RoPE, by slower rotation, without training (fine-tune with train.py --init_from, --length):
  pi           every frequency divided by s = length / L (Chen et al. 2023)
  ntk          a larger base; recomputed for each evaluated length it is dynamic NTK (bloc97 2023)
  yarn         by parts, with a temperature (Peng et al. 2024)
  longrope     a divisor for each frequency, and first positions that are not stretched, by evolutionary search, with the
               temperature of its code (Ding et al. 2024)

Writes <method>-<length>.pt beside the checkpoint (or in --out), a checkpoint that every script opens, and for it
  .ppl.csv      perplexity by length, over the same tokens of val.bin at every length: those past the longest one. Each
                window has exactly the length named and scores its last `stride` tokens, so that a scored token sees
                length - stride to length - 1 tokens before it (.paper.ppl.csv with --protocol paper: other tokens)
  .entropy.csv  mean attention entropy in nats (eq. 2) of each head in 32 bands of positions, at the longest length
"""
import argparse
import math
import os
import time
from itertools import islice

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from data import io
from model import rope_frequencies


def heads(model, what='scale'):
    """The temperatures of all heads, or their slopes, (n_layer, n_head)."""
    return torch.stack([getattr(b.attn, what).detach() for b in model.blocks]).cpu()


def set_heads(model, value, what='scale'):
    """value: a number, or a tensor (n_layer, n_head)."""
    for b, v in zip(model.blocks, torch.as_tensor(value, dtype=torch.float32).expand(len(model.blocks), model.config.n_head)):
        getattr(b.attn, what).data.copy_(v)


# ---------------------------------------------------------------------------------------------------------------------
# measuring

def windows(docs, longest, stride, tokens):
    """
    Where to score: [(document, end)], at least `tokens` / stride of them where there are as many, shared out evenly over
    the documents that are long enough and evenly spaced in each. The tokens [end - stride, end) all lie past `longest`.
    """
    room = [(d, (len(d) - longest) // stride) for d in docs]
    room = [(d, n) for d, n in room if n > 0]
    if not room:
        io.fail(f'no document of val.bin has {longest + stride:,} tokens (the longest has {max(map(len, docs)):,}): lower --lengths or --stride')
    room, out = sorted(room, key=lambda r: r[1]), []     # short documents first: what they lack, the others give
    for i, (d, n) in enumerate(room):
        take = min(n, math.ceil((tokens / stride - len(out)) / (len(room) - i)))
        out += [(d, longest + stride * (1 + k * n // take)) for k in range(take)]
    return out


def paper_windows(docs, length, stride, tokens):
    """
    The same by the rule of Wang et al. (their run_ppl.py): document after document, a window that ends at `length`, at
    length + stride, and so on as long as it lies inside. So each length has tokens, and maybe documents, of its own. (With
    8 GPUs their 16 workers share the budget, so that they stop after 512 windows in a document; here it is read whole.)
    """
    out = list(islice(((d, e) for d in docs for e in range(length, len(d), stride)), math.ceil(tokens / stride)))
    if not out:
        io.fail(f'no document of val.bin is longer than {length:,} tokens (the longest has {max(map(len, docs)):,}): lower --lengths')
    return out


@torch.inference_mode()
def perplexity(model, docs, bos, lengths, stride, tokens, env, batch_tokens, paper=False, past=None):
    """
    -> a row {length, stride, docs, tokens, nll, ppl} for each length; nll is the mean over scored tokens, in nats.
    past: they lie past so many tokens of their document (default: the longest length). paper: windows as in Wang et al.,
    without a BOS of their own.
    """
    same, rows = windows(docs, past or max(lengths), stride, tokens) if not paper else None, []
    at = {n: same or paper_windows(docs, n, stride, tokens) for n in lengths}
    with tqdm(total=sum(n * len(ends) for n, ends in at.items()), unit='tok', unit_scale=True, desc='perplexity', disable=not env.master, leave=False, dynamic_ncols=True) as bar:
        for length, ends in at.items():
            mine, total = ends[env.rank::env.world], torch.zeros(1, dtype=torch.float64)
            size = max(1, batch_tokens // length)
            for i in range(0, len(mine), size):
                w = io.anchor([d[e - length:e] for d, e in mine[i:i + size]], None if paper else bos).to(env.device)
                with env.autocast():
                    loss = model(w[:, :-1], w[:, -stride:], rows=slice(-stride, None))[1]
                total += loss.item() * len(w) * stride
                bar.update(len(w) * length * env.world)
            if env.world > 1:
                total = total.to(env.device)
                dist.all_reduce(total)
            nll = total.item() / (len(ends) * stride)
            rows.append(dict(length=length, stride=stride, docs=len({id(d) for d, _ in ends}), tokens=len(ends) * stride, nll=nll, ppl=math.exp(nll)))
    return rows


def attention_entropy(q, k, block=256, bias=None):
    """
    q (B, nh, T, hs), k (B, nkv, T, hs), bias (1, nh, T, T) on the scores -> (nh, T): the entropy of each query's causal
    attention in nats, mean over B (Wang et al. 2024, eq. 2). Exact, and `block` rows of the T x T scores at a time.
    """
    B, nh, T, hs = q.shape
    k = k.repeat_interleave(nh // k.size(1), dim=1).float()
    out = []
    with torch.autocast(q.device.type, enabled=False):       # or the fp32 product would go back to bf16
        for i in range(0, T, block):
            s = q[:, :, i:i + block].float() @ k[:, :, :i + block].transpose(-1, -2) / math.sqrt(hs)      # (B, nh, block, <= i + block)
            if bias is not None:
                s = s + bias[..., i:i + block, :i + block]
            future = torch.ones(s.size(2), s.size(2), dtype=torch.bool, device=s.device).triu(1)
            s[..., i:].masked_fill_(future, -math.inf)
            out.append(torch.special.entr(s.softmax(-1)).sum(-1).mean(0))
    return torch.cat(out, dim=-1)


@torch.inference_mode()
def entropies(model, docs, T, env, samples=4):
    """-> (n_layer, n_head, T), mean over the first T tokens of up to `samples` documents, shared out over ranks."""
    found = []
    hooks = [b.attn.register_forward_pre_hook(lambda m, x: found.append(attention_entropy(*m.qkv(*x[:3])[:2], bias=x[3]))) for b in model.blocks]
    docs, total = [d for d in docs if len(d) >= T][:samples], 0
    for d in docs[env.rank::env.world]:
        found.clear()
        with env.autocast():
            model(torch.from_numpy(np.asarray(d[:T]).astype('int64'))[None].to(env.device), rows=slice(-1, None))
        total = total + torch.stack(found)
    for h in hooks:
        h.remove()
    if env.world > 1:
        total = torch.zeros(model.config.n_layer, model.config.n_head, T, device=env.device) + total
        dist.all_reduce(total)
    return total.cpu() / len(docs)


def evaluate(model, docs, bos, lengths, args, env):
    """Perplexity by length, and entropy in 32 bands of positions: rows {layer, head, position (the band's last), entropy}."""
    ppl = perplexity(model, docs, bos, lengths, args.stride, args.eval_tokens, env, args.batch_tokens, args.protocol == 'paper', args.past)
    ent = entropies(model, docs, max(lengths), env)
    T = ent.size(-1)
    edges = [T * i // 32 for i in range(33)]
    rows = [dict(layer=l, head=h, position=b, entropy=ent[l, h, a:b].mean().item())
            for l in range(ent.size(0)) for h in range(ent.size(1)) for a, b in zip(edges, edges[1:]) if a < b]
    return ppl, rows


# ---------------------------------------------------------------------------------------------------------------------
# extending

@torch.no_grad()
def loss_of(model, data, bos, args, env):
    """Mean loss at args.length on the --grid_batches batches that every candidate is tried on."""
    total = torch.zeros((), dtype=torch.float64, device=env.device)
    for i in range(args.grid_batches):               # steps that head tuning never reaches: other batches than its own
        for x, y in batch(data, bos, args, env, args.seed, 10**9 + i):
            with env.autocast():
                total += model(x, y)[1].double() * len(x) / args.batch / args.grid_batches
    if env.world > 1:
        dist.all_reduce(total)
    return total.item()


def uniform(model, data, bos, args, env):
    """Tries every lambda of args.grid at args.length -> (best lambda, [(lambda, loss)])."""
    curve = []
    for lam in tqdm(args.grid, desc=f'uniform at {args.length}', disable=not env.master, leave=False, dynamic_ncols=True):
        set_heads(model, lam)
        curve.append((lam, loss_of(model, data, bos, args, env)))
    best = min(curve, key=lambda c: c[1])[0]
    set_heads(model, best)
    width = 40 / max(1e-9, max(c[1] for c in curve) - min(c[1] for c in curve))
    env.print(f'uniform lambda at {args.length}, loss on {args.grid_batches * args.batch * args.length:,} tokens:')
    for lam, loss in curve:
        env.print(f'  {lam:5.2f}  {loss:.4f}  ' + '#' * int((loss - min(c[1] for c in curve)) * width) + ('  <- best' if lam == best else ''))
    return best, curve


def pi(c, length):
    """Position interpolation (Chen et al. 2023, eq. 4): -> (hs/2 inverse frequencies, temperature 1)."""
    return [f * c.block_size / length for f in rope_frequencies(c)], 1.0


def ntk(c, length):
    """NTK-aware scaling (bloc97; YaRN's eq. 14 to 16): base b s^(d / (d - 2)) -> (hs/2 inverse frequencies, temperature 1)."""
    d = c.n_embd // c.n_head
    base = c.rope_theta * (length / c.block_size) ** (d / max(1, d - 2))
    return [base ** (-2 * i / d) for i in range(d // 2)], 1.0


def yarn(c, length):
    """
    YaRN (Peng et al. 2024, sec. 3.2 and 3.4, with the ramp over dimensions of its code) for length / block_size = s:
    -> (hs/2 inverse frequencies, temperature (0.1 ln s + 1)^2 on the scores).
    """
    d, s = c.n_embd // c.n_head, length / c.block_size
    dim = lambda turns: d * math.log(c.block_size / (2 * math.pi * turns)) / (2 * math.log(c.rope_theta))
    low, high = max(0, math.floor(dim(32))), min(d - 1, math.ceil(dim(1)))
    slow = [min(1.0, max(0.0, (i - low) / max(1e-3, high - low))) for i in range(d // 2)]      # 0: keep, 1: divide by s
    return [f * (1 - r) + f / s * r for f, r in zip(rope_frequencies(c), slow)], (0.1 * math.log(s) + 1) ** 2


ROPE = dict(pi=pi, ntk=ntk, yarn=yarn)
N_HAT = (0, 1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 64, 128, 256)


def longrope(model, data, bos, args, env):
    """
    LongRoPE (Ding et al. 2024, eq. 3, alg. 1): divisors of the frequencies, 1 <= r_0 <= r_1 <= ... <= 1.25 s, and n-hat,
    so many first positions that are not stretched, by evolution from PI, NTK and YaRN. Lowest loss at args.length wins,
    at the temperature 1 + ln s / ln block_size of its code (there the root of it, on q and on k).
    -> (hs/2 inverse frequencies, n-hat, [(candidates tried, best loss)]). Leaves the model with them.
    """
    set_heads(model, 1 + math.log(args.length / model.config.block_size) / math.log(max(2, model.config.block_size)))
    c, rng, known = model.config, np.random.default_rng(args.seed), {}
    freq, top = rope_frequencies(c), 1.25 * args.length / c.block_size
    parts = args.population // 4                     # mutants a generation, and as many crossings; twice as many parents
    monotone = lambda r: all(a <= b for a, b in zip(r, r[1:]))

    def put(candidate):
        model.inv_freq.copy_(torch.tensor([f / r for f, r in zip(freq, candidate[:-1])]))
        c.rope_start = candidate[-1]

    def mutate(candidate):
        """Each divisor, with probability 0.3, anew between its neighbours in steps of 0.01; so n-hat, from its list."""
        new = list(candidate)
        for i in range(len(freq)):
            if rng.random() < 0.3:
                low, high = new[i - 1] if i else 1.0, candidate[i + 1] if i + 1 < len(freq) else top
                new[i] = min(high, low + 0.01 * int(rng.integers(int((high - low) / 0.01 + 1e-6) + 1)))
        if rng.random() < 0.3:
            new[-1] = int(rng.choice(N_HAT))
        return tuple(new)

    def cross(a, b):
        """a with 30 % of its numbers from b, where that is monotone."""
        for _ in range(20):
            new = tuple(y if rng.random() < 0.3 else x for x, y in zip(a, b))
            if monotone(new[:-1]):
                return new
        return a

    seeds = [tuple(min(top, max(1.0, f / g)) for f, g in zip(freq, method(c, args.length)[0])) + (0,) for method in ROPE.values()]
    some = lambda of: of[int(rng.integers(len(of)))]
    generation, curve = seeds + [mutate(some(seeds)) for _ in range(args.population - len(seeds))], []
    with tqdm(total=args.population + 2 * parts * args.iterations, desc=f'longrope at {args.length}', disable=not env.master, dynamic_ncols=True) as bar:
        for i in range(args.iterations + 1):
            for candidate in generation:
                if candidate not in known:
                    put(candidate)
                    known[candidate] = loss_of(model, data, bos, args, env)
                bar.update()
            parents = sorted(known, key=known.get)[:max(2, 2 * parts)]
            curve.append((len(known), known[parents[0]]))
            bar.set_postfix_str(f'loss {known[parents[0]]:.4f}')
            generation = [mutate(some(parents)) for _ in range(parts)] + [cross(some(parents), some(parents)) for _ in range(parts)]
    for name, seed in zip(ROPE, seeds):
        env.print(f'  {name:8} {known[seed]:.4f}')
    env.print(f'  longrope {known[parents[0]]:.4f}  n-hat {parents[0][-1]}, divisors ' + ' '.join(f'{r:.2f}' for r in parents[0][:-1]))
    put(parents[0])
    return model.inv_freq.tolist(), parents[0][-1], curve


def batch(data, bos, args, env, seed, step):
    """This rank's micro-batches of one global batch of args.batch rows."""
    x, y = io.get_batch(data, bos, args.batch, args.length, seed, step, env.rank, env.world)
    return [(a.to(env.device), b.to(env.device)) for a, b in zip(x.split(args.micro_batch), y.split(args.micro_batch))]


def tune(model, data, bos, args, env):
    """
    The paper's head-based tuning of the temperatures that `model` has now: everything else frozen, language-model loss at
    args.length, AdamW (0.9, 0.95) without decay, clipping at 1, linear warm-up over a tenth of the steps, a cosine to a
    tenth. With args.focus none goes below 1 (eq. 6). Returns the losses.
    """
    model.requires_grad_(False)
    model.activation_checkpointing = args.activation_checkpointing
    params = [b.attn.scale.requires_grad_() for b in model.blocks]
    opt = torch.optim.AdamW(params, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0)
    net = io.compiled(model, args, env)
    losses, warmup = [], max(1, args.steps // 10)
    bar = tqdm(range(args.steps), desc=f'{args.method} at {args.length}', disable=not env.master, dynamic_ncols=True)
    for step in bar:
        t = (step - warmup) / max(1, args.steps - warmup)
        opt.param_groups[0]['lr'] = args.lr * ((step + 1) / warmup if step < warmup else 0.1 + 0.45 * (1 + math.cos(math.pi * t)))
        total = torch.zeros((), device=env.device)
        for x, y in batch(data, bos, args, env, args.seed, step):
            with env.autocast():
                loss = net(x, y)[1] * len(x) / args.batch
            loss.backward()
            total += loss.detach()
        flat = torch.cat([total[None]] + [p.grad for p in params])       # a few numbers, in one message
        if env.world > 1:
            dist.all_reduce(flat)
        if not flat.isfinite().all():
            io.fail(f'step {step + 1}: the loss or a gradient is not finite; nothing was written. Lower --lr, or look at the batch of seed {args.seed}, step {step}')
        for p, g in zip(params, flat[1:].split([p.numel() for p in params])):
            p.grad.copy_(g)
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        opt.step()
        opt.zero_grad()
        if args.focus:
            for p in params:
                p.data.clamp_(min=1.0)
        losses.append(flat[0].item())
        lam = torch.cat([p.data for p in params])
        bar.set_postfix_str(f'loss {losses[-1]:.4f}, lambda {lam.min().item():.2f} to {lam.max().item():.2f}')
    return losses


# ---------------------------------------------------------------------------------------------------------------------
# showing

def show(results, lengths, block_size, args, env):
    """results: {name: (ppl rows, entropy rows)} -> a table of perplexity by length and one of entropy by position."""
    names, rows = list(results), [r for r, _ in results.values()]
    r, paper = rows[0][0], args.protocol == 'paper'
    on = lambda r: f'{r["tokens"]:,} tokens of {r["docs"]} documents'
    env.print(f'\nperplexity: windows of the length named, stride {r["stride"]}, ' + ('by the paper\'s rule: other tokens at each length' if paper else f'the same {on(r)} at every length'))
    env.print('  length          ' + ''.join(f'{n:>18}' for n in names))
    for i, n in enumerate(lengths):
        env.print(f'{n:>8} {n / block_size:>5g}x   ' + ''.join(f'{x[i]["ppl"]:>18.3f}' for x in rows) + f'   {on(rows[0][i])}' * paper)
    env.print('\nattention entropy in nats, mean over heads (least to most diffuse head)')
    env.print(' to position      ' + ''.join(f'{n:>22}' for n in names) + '      uniform attention')
    for pos in sorted({e['position'] for e in results[names[0]][1]})[3::4]:
        cells = []
        for _, ent in results.values():
            v = [e['entropy'] for e in ent if e['position'] == pos]
            cells.append(f'{sum(v) / len(v):.2f} ({min(v):.2f} to {max(v):.2f})')
        env.print(f'{pos:>8} {pos / block_size:>5g}x   ' + ''.join(f'{c:>22}' for c in cells) + f'{math.log(pos):>23.2f}')


def plot(results, model, block_size, file):
    plt = io.pyplot(file)
    fig, (a, b, c) = plt.subplots(1, 3, figsize=(14, 4), layout='constrained')
    for name, (ppl, ent) in results.items():
        a.plot([r['length'] for r in ppl], [r['ppl'] for r in ppl], marker='o', label=name)
        by_pos = {}
        for e in ent:
            by_pos.setdefault(e['position'], []).append(e['entropy'])
        b.plot(list(by_pos), [sum(v) / len(v) for v in by_pos.values()], label=name)
    for ax, y in ((a, 'perplexity'), (b, 'attention entropy (nats)')):
        ax.axvline(block_size, color='black', linestyle='--', linewidth=1)
        ax.set(xlabel='length' if ax is a else 'position', ylabel=y, xscale='log')
        ax.legend()
    a.set_yscale('log')
    what = 'slope' if heads(model, 'slope').any() else 'scale'
    fig.colorbar(c.imshow(heads(model, what).numpy(), cmap='viridis', aspect='auto'), ax=c)
    c.set(xlabel='head', ylabel='layer', title=f'{what} of each head\'s temperature')
    fig.savefig(file, dpi=150)


def float_list(text):
    return [float(x) for x in text.split(',')]


def best_or_float(text):
    return text if text == 'best' else float(text)


def main():
    p = io.parser(__doc__)
    p.add_argument('--ckpt', required=True, help='checkpoint file or run folder')
    p.add_argument('--data', required=True, help='folder with train.bin (the extension corpus), val.bin (measured), meta.json')
    p.add_argument('--method', required=True, choices=('none', 'uniform', 'head', 'uniform-log', 'head-log', 'pi', 'ntk', 'yarn', 'longrope'))
    p.add_argument('--length', type=int, help='tokens a row while extending, L\' in the paper (default 4 times the training length)')
    p.add_argument('--out', help='folder of the results (default: the checkpoint\'s)')
    # uniform, and where head starts
    p.add_argument('--grid', type=float_list, default=[1 + i / 10 for i in range(16)], help='lambdas to try, in units of 1/sqrt(head size)')
    p.add_argument('--grid_batches', type=int, default=4, help='batches that each candidate is tried on')
    # head; the paper's values (app. A)
    p.add_argument('--init', type=best_or_float, default='best', help='best: the best uniform lambda, found first; or a number')
    p.add_argument('--focus', action=argparse.BooleanOptionalAction, default=True, help='keep every lambda at 1 or above (eq. 6)')
    p.add_argument('--lr', type=float, default=0.05, help='0.05 or 0.1 in the paper')
    p.add_argument('--steps', type=int, default=200)
    p.add_argument('--batch', type=int, default=8, help='rows a step, over all processes')
    p.add_argument('--micro_batch', type=int, help='rows in one forward pass (default: this process\'s share of --batch, on a GPU what fits of it)')
    # longrope (the paper's values, table 9)
    p.add_argument('--population', type=int, default=64, help='candidates in the first generation; later ones have half as many new ones')
    p.add_argument('--iterations', type=int, default=40, help='generations after the first')
    # measuring
    p.add_argument('--lengths', type=io.int_list, help='tokens, comma-separated (default 1/2 1 1.5 2 3 4 6 8 times the training length)')
    p.add_argument('--past', type=int, help='tokens of a document before the first scored one, to score the same ones as another call (default: the longest of --lengths)')
    p.add_argument('--stride', type=int, help='tokens that each window scores (default: half the shortest length; paper 256)')
    p.add_argument('--eval_tokens', type=int, default=2**14, help='tokens scored at each length; 0 measures nothing (paper 2097152)')
    p.add_argument('--protocol', choices=('same', 'paper'), default='same', help='same: the same tokens at every length, windows begin with BOS; paper: each length on the first documents longer than it, no BOS')
    p.add_argument('--batch_tokens', type=int, default=2**14, help='tokens in one forward pass of the measurement')
    p.add_argument('--plot', metavar='FILE.png', help='draw perplexity, entropy and the temperatures')
    # machine
    p.add_argument('--seed', type=int, default=314, help='(paper 314)')
    p.add_argument('--device', default='auto', help='auto, cpu, cuda or cuda:N')
    p.add_argument('--dtype', choices=('auto', 'bf16', 'fp32'), default='auto', help='auto: bf16 where the hardware multiplies in it')
    p.add_argument('--compile', action=argparse.BooleanOptionalAction, help='torch.compile while tuning (default: on GPU only)')
    p.add_argument('--activation_checkpointing', action=argparse.BooleanOptionalAction, default=False, help='a third more arithmetic for much less memory')
    args = p.parse_args()
    for name, least in dict(grid_batches=1, steps=1, batch=1, batch_tokens=1, length=1, past=1, stride=1, micro_batch=1, iterations=1, population=4, eval_tokens=0).items():
        if getattr(args, name) is not None and getattr(args, name) < least:
            io.fail(f'--{name} {getattr(args, name)} must be at least {least}')
    if args.lengths and min(args.lengths) < 2:
        io.fail(f'--lengths {min(args.lengths)} must be at least 2')
    if not all(0 < lam < math.inf for lam in args.grid):
        io.fail(f'--grid {args.grid} must be positive numbers')
    if not 0 < args.lr < math.inf:
        io.fail(f'--lr {args.lr} must be a positive number')
    tuned = args.method in ('head', 'head-log')
    if tuned and args.focus and args.init != 'best' and not 1 <= args.init < math.inf:
        io.fail(f'--init {args.init} lies below the focus constraint: 1 or more, or --no-focus')

    if args.plot:
        io.pyplot(args.plot)                         # what is missing for it is known before the work
    env = io.setup(args)
    ckpt = io.load_checkpoint(args.ckpt)
    ckpt['optimizer'] = None                         # gigabytes
    model = io.frozen(io.load_model(ckpt), env)
    if args.compile:                                 # a missing compiler is known before the work
        io.compiled(model, args, env)
    L = model.config.block_size
    val, meta = io.open_data(args.data, 'val')
    data = io.open_data(args.data, 'train')[0] if args.method != 'none' else ()
    args.length = args.length or 4 * L
    lengths = sorted(set(args.lengths or io.default_lengths(model.config)))
    args.stride = args.stride or max(1, lengths[0] // 2)
    io.check_fits(model.config, meta, args.data, lengths + [args.length] * (args.method != 'none'), ckpt['tokenizer'])
    io.check_fused(model, max(lengths), env)
    if not 0 < args.stride < lengths[0]:
        io.fail(f'--stride {args.stride} must lie between 1 and the shortest of --lengths less one, {lengths[0] - 1}')
    if args.past and (args.past < lengths[-1] or args.protocol == 'paper'):
        io.fail(f'--past {args.past} must be at least the longest of --lengths, {lengths[-1]}' if args.protocol == 'same' else '--past is for --protocol same')
    if args.method != 'none' and not 1 <= args.length < len(data):
        io.fail(f'--length {args.length:,} must lie between 1 and the {len(data) - 1:,} tokens of {args.data}/train.bin')
    if args.batch % env.world:
        io.fail(f'--batch {args.batch} must be a multiple of the {env.world} processes')
    given, rows = args.micro_batch, args.batch // env.world
    args.micro_batch = min(given or rows, rows)
    while not given and tuned and 'cuda' in env.device and args.micro_batch > 1 and (
            1.3 * io.memory(model, args.micro_batch * args.length, False, args, env) + 2e9 > torch.cuda.mem_get_info()[0]):      # room for what the estimate leaves out
        args.micro_batch //= 2
    docs = io.documents(val, meta, 'val')
    if args.eval_tokens:
        (paper_windows if args.protocol == 'paper' else windows)(docs, args.past or lengths[-1], args.stride, 1)      # too short a val.bin is known before the work
    out = args.out or os.path.dirname(io.find_checkpoint(args.ckpt)) or '.'
    io.preflight(out, 8 * sum(p.numel() for p in model.parameters()),
                 io.memory(model, args.micro_batch * args.length, False, args, env) if env.device == 'cpu' and tuned else 0)
    if args.method != 'none' and ((heads(model) != 1) | (heads(model, 'slope') != 0)).any():
        io.fail(f'{args.ckpt} has been extended already: start from the checkpoint that train.py wrote')
    if (args.method in ROPE or args.method == 'longrope') and (model.config.pe != 'rope' or model.config.rope_inv_freq or args.length < L):
        io.fail(f'--method {args.method} stretches the frequencies of an unextended pe=rope checkpoint to a --length above {L}: this one is pe={model.config.pe}')
    if args.method.endswith('-log') and args.length <= L:
        io.fail(f'--method {args.method} changes what lies past the training length {L}: --length {args.length} must be longer')
    env.print(f'{args.ckpt}: {model.config.pe}, training length {L}; {args.method}' + (f' at {args.length} ({args.length / L:g}x)' if args.method != 'none' else ''))

    results = {}

    def measure(name):
        if args.eval_tokens:
            results[name] = evaluate(model, docs, meta['bos'], lengths, args, env)
            for what, rows in zip(('ppl', 'entropy'), results[name]):
                if env.master:
                    io.write_csv(f'{out}/{name}{".paper" if (what, args.protocol) == ("ppl", "paper") else ""}.{what}.csv', rows)

    measure(io.stem(args.ckpt))
    if args.method != 'none':
        start, curve, losses = time.time(), [], []
        if args.method in ROPE:
            ckpt['config']['rope_inv_freq'], lam = ROPE[args.method](model.config, args.length)
            model = io.frozen(io.load_model(ckpt), env)
            set_heads(model, lam)
        elif args.method == 'longrope':
            ckpt['config']['rope_inv_freq'], ckpt['config']['rope_start'], curve = longrope(model, data, meta['bos'], args, env)
        elif not tuned or args.init == 'best':
            best, curve = uniform(model, data, meta['bos'], args, env)
        if tuned:
            set_heads(model, max(best, float(args.focus)) if args.init == 'best' else args.init)
            losses = tune(model, data, meta['bos'], args, env)
            env.print(f'lambda of each head at {args.length} (a row a layer):\n' + '\n'.join('  ' + ' '.join(f'{x:5.2f}' for x in row) for row in heads(model).tolist()))
        if args.method.endswith('-log'):             # lambda = 1 + slope ln(length / L)
            set_heads(model, (heads(model) - 1) / math.log(args.length / L), 'slope')
            set_heads(model, 1)
        name = f'{args.method}-{args.length}'
        tried = curve[-1][0] if args.method == 'longrope' else len(curve)
        tokens = len(losses) * args.batch * args.length + tried * args.grid_batches * args.batch * args.length
        if env.master:
            io.save_checkpoint(f'{out}/{name}.pt', dict(
                model=ckpt['model'] | {k: v.cpu() for k, v in model.state_dict().items() if k.endswith(('scale', 'slope'))}, config=ckpt['config'], optimizer=None, step=ckpt['step'],
                tokens=ckpt['tokens'], seed=ckpt['seed'], args=ckpt['args'], fingerprint=ckpt['fingerprint'], tokenizer=ckpt['tokenizer'],
                extended=dict(vars(args), from_ckpt=args.ckpt, data_fingerprint=meta['train']['sha256'], heads=heads(model).tolist(), slopes=heads(model, 'slope').tolist(),
                              curve=curve, losses=losses, tokens=tokens, seconds=time.time() - start)))
        env.print(f'{out}/{name}.pt: {tokens:,} tokens, {time.time() - start:.0f} s')
        measure(name)
    if results:
        show(results, lengths, L, args, env)
        if args.plot and env.master:
            plot(results, model, L, args.plot)
    io.finish()


if __name__ == '__main__':
    main()
