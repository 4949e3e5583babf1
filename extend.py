"""
Extends a trained checkpoint past its training length, and measures what that does.

    python extend.py --ckpt out/nope --data data/passkey_long --method none                     # measure only
    python extend.py --ckpt out/nope --data data/passkey_long --method uniform --length 2048    # one temperature
    python extend.py --ckpt out/nope --data data/passkey_long --method head --length 2048       # one for each head
    python extend.py --ckpt out/nope --data data/passkey_long --method uniform --law logn --length 2048
    python extend.py --ckpt out/rope --data data/passkey_long --method longrope --length 2048 --population 16
    torchrun --standalone --nproc_per_node=8 extend.py --ckpt out/paper --data data/corpus --method head --length 8192
the paper's Table 2: --method none --lengths 2048,4096,8192,16384 --stride 256 --eval_tokens 2097152 --protocol paper

Sharper attention, for any encoding: lambda_h = scale_h + slope_h ln max(1, n / L) for a sequence of n tokens
and the training length L; --law has others, which go by the position of a query. RoPE is also extended by slower
rotation (fine-tune it with train.py --init_from, --length).

Writes <method>-<length>.pt beside the checkpoint (or in --out), which every script opens, and for both checkpoints
  .ppl.csv      perplexity by length (.paper.ppl.csv with --protocol paper: other tokens)
  .entropy.csv  attention entropy in nats of each head in bands of positions, at the longest length
Those of --ckpt are kept in <checkpoint>.measured.json for its next extension.
"""
import argparse
import math
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import NamedTuple

import torch

from data.checkpoint import check_fits, frozen, load_checkpoint, load_model, preflight, save_checkpoint, stem
from data.extension import (
    Record,
    as_trained,
    best_of,
    check,
    fit_micro_batch,
    growth_at,
    heads,
    micro_batches,
    open_corpus,
    progress,
    reads_corpus,
    resolve,
    set_heads,
    set_law,
)
from data.figures import extension_tables, plot_extension, pyplot
from data.measure import choose_windows, forget, long_enough, measure, measure_base, write_measured
from data.rope import longrope, ntk_grid, stretch
from data.runtime import (
    check_fused,
    choose_dtype,
    compiled,
    fail,
    finish,
    float_list,
    int_list,
    lr_factor,
    memory,
    natural,
    number,
    parser,
    positive_float,
    positive_int,
    setup,
)
from data.tokenizer import keep_files
from data.tokens import documents, open_data

# ---------------------------------------------------------------------------------------------------------------------
# the paper: sharper attention. Each method is a function (model, corpus, args, env) -> Record, and changes the model

def uniform(model, corpus, args, env):
    """
    One temperature for all heads: of those on args.grid the one with the lowest loss at the positions past the training
    length, in rows of args.length (sec. 3; see best_of). With args.law the law as published instead. SWAN's has a free
    unit; unless args.law_at gives it, the best one of a grid is taken.
    """
    if args.law is None:
        return best_of(args.grid, lambda lam: set_heads(model, lam), 'lambda', model, corpus, args, env)
    L = model.config.block_size
    if args.law == 'swan' and not args.law_at:
        units = [L * 2.0 ** k for k in range(-4, 5)]
        return best_of(units, lambda at: set_law(model, 'swan', at), 'unit of SWAN\'s law', model, corpus, args, env)
    set_law(model, args.law, args.law_at or L)
    env.print(f'{args.law} law as published, in units of {args.law_at or L} tokens')
    return Record()


def head(model, corpus, args, env):
    """
    One temperature for each head, tuned from the best uniform one or from a number, args.init (sec. 4). Under a law it
    is the slope of each head that is tuned, from the published one, or from the temperature args.init at args.length.
    """
    record = Record()
    if args.init == 'best':
        record = uniform(model, corpus, args, env)
    elif args.law:
        set_law(model, args.law, args.law_at or model.config.block_size)
        set_heads(model, (args.init - 1) / growth_at(model, args.length), 'slope')
    else:
        set_heads(model, args.init)
    losses = tune(model, corpus, args, env)
    env.print(f'lambda of each head at {args.length} (a row a layer):')
    lam = heads(model) + heads(model, 'slope') * growth_at(model, args.length)
    for row in lam.tolist():
        env.print('  ' + ' '.join(f'{value:5.2f}' for value in row))
    return record._replace(losses=losses, batches=record.batches + args.steps)


def focus(temperatures, least):
    """The focus constraint (Wang et al. 2024, eq. 6): attention may be sharper than it was trained, never flatter."""
    for each in temperatures:
        each.data.clamp_(min=least)


def tune(model, corpus, args, env):
    """
    The paper's tuning of the temperatures that the model has now (sec. 4, eq. 4 to 6, app. A): with everything else
    frozen, by the language-model loss at args.length. AdamW (0.9, 0.95) without decay, gradients clipped at norm 1,
    a warm-up over a tenth of the steps, then a cosine to a tenth of args.lr. Returns the loss of each step. Where the
    model follows a law of the position, slopes are tuned instead. Their learning rate is divided by growth(length), so
    that a step moves the last token's temperature as far as it would without a law.
    """
    what, lr, least = 'scale', args.lr, 1.0
    if model.config.law != 'length':
        what, lr, least = 'slope', args.lr / growth_at(model, args.length), 0.0
    model.requires_grad_(False)
    model.activation_checkpointing = args.activation_checkpointing
    scales = [getattr(model.blocks[i].attn, what).requires_grad_() for i in model.config.tempered]
    optimizer = torch.optim.AdamW(scales, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    net = compiled(model, args, env)
    warmup = max(1, args.steps // 10)
    losses = []
    if args.focus:
        focus(scales, least)
    bar = progress(env, range(args.steps), desc=f'{args.method} at {args.length}')
    for step in bar:
        optimizer.param_groups[0]['lr'] = lr * lr_factor(step, warmup, args.steps)
        mean = torch.zeros((), device=env.device)
        for x, y in micro_batches(corpus, args, env, step):
            with env.autocast():
                loss = net(x, y)[1] * len(x) / args.batch
            loss.backward()
            mean += loss.detach()
        # data-parallel: a few numbers a layer
        mean = env.sum(mean)
        for scale in scales:
            scale.grad = env.sum(scale.grad)
        norm = torch.nn.utils.clip_grad_norm_(scales, 1.0)
        if not (mean.isfinite() and norm.isfinite()):
            fail(f'step {step + 1}: the loss or a gradient is not finite; nothing was written. Lower --lr, or look at '
                 f'the batch of seed {args.seed}, step {step}')
        optimizer.step()
        optimizer.zero_grad()
        if args.focus:
            focus(scales, least)
        losses.append(mean.item())
        lam = heads(model, what)
        bar.set_postfix_str(f'loss {losses[-1]:.4f}, {what} {lam.min().item():.2f} to {lam.max().item():.2f}')
    return losses


def as_slopes(model, length):
    """
    Turns the temperatures found at `length` into slopes, lambda_h(n) = 1 + slope_h ln max(1, n / L), so that they stay
    what they are at that length. Up to the training length L the model is as trained, bit for bit.
    """
    set_heads(model, (heads(model) - 1) / math.log(length / model.config.block_size), 'slope')
    set_heads(model, 1)


def uniform_log(model, corpus, args, env):
    record = uniform(model, corpus, args, env)
    as_slopes(model, args.length)
    return record


def head_log(model, corpus, args, env):
    record = head(model, corpus, args, env)
    as_slopes(model, args.length)
    return record


class Method(NamedTuple):
    run: Callable                # (model, corpus, args, env) -> Record
    reads_corpus: bool
    rope_only: bool
    line: str                    # what --help says


METHODS = {
    'uniform': Method(uniform, True, False, 'one scale for all, of --grid the best at --length (Wang et al. 2024)'),
    'head': Method(head, True, False, 'a scale for each head, tuned by gradient at --length, never below 1 (ibid.)'),
    'uniform-log': Method(uniform_log, True, False, 'uniform read as a slope: the same at --length, nothing up to L'),
    'head-log': Method(head_log, True, False, 'head read as slopes: the same at --length, nothing up to L'),
    'pi': Method(stretch, False, True, 'RoPE, every frequency divided by s = length / L (Chen et al. 2023)'),
    'ntk': Method(stretch, False, True, 'RoPE, a larger base (bloc97 2023; for each length anew: emozilla 2023)'),
    'ntk-grid': Method(ntk_grid, True, True, 'ntk for --length times the best of --grid'),
    'yarn': Method(stretch, False, True, 'RoPE, by parts, with a temperature (Peng et al. 2024)'),
    'longrope': Method(longrope, True, True, 'RoPE, a divisor for each frequency, by search (Ding et al. 2024)'),
    'none': Method(None, False, False, 'only measure the checkpoint'),
}


# ---------------------------------------------------------------------------------------------------------------------
# the command line

def best_or_float(text):
    return text if text == 'best' else positive_float(text)


def measures(text):
    names = text.split(',')
    if set(names) - {'ppl', 'entropy'}:
        raise argparse.ArgumentTypeError(f'{text!r} must be ppl, entropy, or ppl,entropy')
    return names


def population(text):
    return number(text, int, lambda n: n >= 4, 'a whole number, at least 4')


def parse_args(argv=None):
    """The flags as they were given; None for those that resolve() finds a value for."""
    lines = [f'  {name:12} {method.line}' for name, method in METHODS.items()]
    p = parser(__doc__ + '\nmethods, for a model of training length L\n' + '\n'.join(lines))
    yes_no = argparse.BooleanOptionalAction
    p.add_argument('--ckpt', required=True, help='checkpoint file or run folder')
    p.add_argument('--data', required=True, help='folder with train.bin (tuned on), val.bin (measured), meta.json')
    p.add_argument('--method', required=True, choices=METHODS)
    p.add_argument('--length', type=positive_int,
                   help='tokens a row while extending (default 4 times the training length)')
    p.add_argument('--rows', choices=('documents', 'anywhere'),
                   help='where rows begin, in tuning and measuring: at the start of a document longer than the row, or '
                        'anywhere (default: as the checkpoint was trained)')
    p.add_argument('--bos', action=yes_no, help='with --rows anywhere: each row begins with BOS (default: as the '
                   'checkpoint was trained)')
    p.add_argument('--out', help='folder of the results (default: the checkpoint\'s)')
    p.add_argument('--temperatures', choices=('nope', 'all'), help='layers that have them: the NoPE ones of a mixed '
                   'model (default, unless the checkpoint says otherwise), or all')
    # uniform, head: a law by the position of the query instead of one number
    p.add_argument('--law', choices=('logn', 'llama4', 'swan'), help='uniform takes it as published: max(1, log_L n) '
                   'for token n (Su 2021; Qwen), 1 + 0.1 ln(1 + floor(n / L)) (Llama 4), log_a(a + n) with the best a '
                   'of a grid (SWAN); head tunes the factor of its logarithm for each head')
    p.add_argument('--law_at', type=positive_int, help='the L or a of a law, in tokens (default: the training length; '
                   '8192 in Llama 4)')
    # uniform, and where head starts
    grid = [1 + i / 10 for i in range(16)]
    p.add_argument('--grid', type=float_list, default=grid, help='lambdas to try, in units of 1/sqrt(head size)')
    p.add_argument('--grid_batches', type=positive_int, default=4, help='batches that each candidate is tried on')
    # head; the paper's values (app. A)
    p.add_argument('--init', type=best_or_float, default='best', help='best: the best uniform lambda; or a number')
    p.add_argument('--focus', action=yes_no, default=True, help='keep every lambda at 1 or above (eq. 6)')
    p.add_argument('--lr', type=positive_float, default=0.05, help='0.05 or 0.1 in the paper')
    p.add_argument('--steps', type=positive_int, default=200)
    p.add_argument('--batch', type=positive_int, default=8, help='rows a step, over all processes')
    p.add_argument('--micro_batch', type=positive_int,
                   help="rows in one forward pass (default: this process's share of --batch; on a GPU, what fits)")
    # longrope; the paper's values (table 9)
    p.add_argument('--population', type=population, default=64, help='candidates at first; then half as many at a time')
    p.add_argument('--iterations', type=positive_int, default=40, help='generations after the first')
    # measuring
    p.add_argument('--measure', type=measures, default=['ppl', 'entropy'], help='ppl, entropy or both (default); past '
                   '2,000 tokens the entropy takes most of the time')
    p.add_argument('--lengths', type=int_list, help='default 1/2 1 1.5 2 3 4 6 8 times the training length')
    p.add_argument('--past', type=positive_int,
                   help='tokens of a document before the first scored one, to score the same ones as another call '
                        '(with --rows anywhere; default: the longest of --lengths)')
    p.add_argument('--stride', type=positive_int,
                   help='tokens that each window scores (default: half the shortest length; paper 256)')
    p.add_argument('--eval_tokens', type=natural, default=2**14,
                   help='tokens scored at each length; 0 measures nothing (paper 2097152)')
    p.add_argument('--protocol', choices=('same', 'paper'), default='same',
                   help='same: the same tokens at every length (with --rows documents: beginnings of documents, chosen '
                        'for each length); paper: each length on the first documents longer than it, no BOS')
    p.add_argument('--batch_tokens', type=positive_int, default=2**14, help='tokens in a forward pass of measuring')
    p.add_argument('--plot', metavar='FILE.png', help='draw perplexity, entropy and the temperatures')
    # machine
    p.add_argument('--seed', type=int, default=314, help='(paper 314)')
    p.add_argument('--device', default='auto', help='auto, cpu, cuda or cuda:N')
    p.add_argument('--dtype', choices=('auto', 'bf16', 'fp32'), default='auto', help='auto: bf16 on a GPU that has it; '
                   'on a CPU the faster one, as measured')
    p.add_argument('--compile', action=yes_no, help='torch.compile while tuning (default: on GPU only)')
    p.add_argument('--activation_checkpointing', action=yes_no, default=False, help='more arithmetic, much less memory')
    return p.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    if args.plot:
        pyplot(args.plot)                            # what is missing for it is known before the work
    env = setup(args, dtype_later=True)
    ckpt = load_checkpoint(args.ckpt)
    ckpt['optimizer'] = None                         # gigabytes
    model = load_model(ckpt)
    why = resolve(args, ckpt, model.config)
    choose_dtype(env, args.dtype, model.config, args.length)
    model = frozen(model, env)
    if args.compile:
        compiled(model, args, env)                   # a missing compiler is known before the work
    method = METHODS[args.method]
    check(args, method.rope_only, model, env)
    tuned = method.run in (head, head_log)
    val, meta = open_data(args.data, 'val')
    lengths, space = args.lengths, 0
    if args.method != 'none':
        lengths = [*lengths, args.length]
        space = 8 * sum(p.numel() for p in model.parameters())           # fp32; the checkpoint and the one before it
    check_fits(model.config, meta, args.data, lengths, ckpt)
    check_fused(model, max(lengths), env)
    L = model.config.block_size
    at = '' if args.method == 'none' else f' at {args.length} ({args.length / L:g}x)'
    env.print(f'{args.ckpt}: {model.config.pe}, training length {L}; {args.method}{at}')
    bos = meta['bos'] if args.bos else None
    corpus = open_corpus(args, meta, bos, why, env) if reads_corpus(args, method) else None
    docs = documents(val, meta, 'val')
    paper = args.protocol == 'paper'
    if 'ppl' in args.measure:                        # too short a val.bin is known before the work
        choose_windows(docs, args.lengths, args.stride, 1, paper, args.past, args.rows)
    if 'entropy' in args.measure:
        long_enough(docs, args.lengths[-1])
    args.micro_batch = fit_micro_batch(args, model, tuned, env)
    need = 0
    if tuned and env.device == 'cpu':
        need = memory(model, args.micro_batch * args.length, False, args, env)
    preflight(args.out, space, need)
    if env.master and args.method != 'none':
        keep_files(ckpt['tokenizer'], args.out)

    results = {}                                     # {name: (rows of perplexity, rows of entropy)}
    if args.measure:
        base = measure_base(model, docs, bos, meta, args, env)
        results[stem(args.ckpt)] = base
    if args.method != 'none':
        began = time.time()
        record = method.run(model, corpus, args, env)
        name = '-'.join(filter(None, (args.method, args.law, str(args.length))))
        tokens = record.batches * args.batch * args.length
        seconds = time.time() - began
        if env.master:
            save(f'{args.out}/{name}.pt', ckpt, model, meta, record, tokens, seconds, args)
            forget(f'{args.out}/{name}')
        env.print(f'{args.out}/{name}.pt: {tokens:,} tokens, {seconds:.0f} s')
        if args.measure and as_trained(model):
            env.print(f'{name} is the checkpoint as it was: its numbers are too')
            write_measured(name, *base, args, env)
            results[name] = base
        elif args.measure:
            results[name] = measure(model, name, docs, bos, args, env)
    if results:
        rule = None
        if paper:
            rule = 'by the paper\'s rule'
        elif args.rows == 'documents':
            rule = 'each the beginning of a document'
        env.print(extension_tables(results, L, rule))
        if args.plot and env.master:
            what = 'slope' if heads(model, 'slope').any() else 'scale'
            plot_extension(results, heads(model, what), f"{what} of each head's temperature", L, args.plot)
    finish()


def save(path, ckpt, model, meta, record, tokens, seconds, args):
    """The checkpoint it came from, with other temperatures or frequencies, and how they were found."""
    weights = dict(ckpt['model'])
    for name, value in model.state_dict().items():
        if name.endswith(('scale', 'slope')):
            weights[name] = value.cpu()
    read = meta['train']['sha256'] if reads_corpus(args, METHODS[args.method]) else None
    extended = dict(vars(args), from_ckpt=args.ckpt, data_fingerprint=read,
                    heads=heads(model).tolist(), slopes=heads(model, 'slope').tolist(),
                    curve=record.curve, losses=record.losses, tokens=tokens, seconds=seconds)
    save_checkpoint(path, dict(ckpt, model=weights, config=asdict(model.config), extended=extended))


if __name__ == '__main__':
    main()
