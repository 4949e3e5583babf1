"""
What a run of train.py starts from: a checkpoint or nothing, and flags that a recipe completes. Each function ends the
program with one line where something does not fit.
"""
import argparse
import math
from dataclasses import asdict

import numpy as np

from data.checkpoint import find_checkpoint, load_checkpoint, load_model, padded, preflight
from data.runtime import fail, memory, natural
from data.tokens import random_vocab
from model import ENCODINGS, GPT, PRESETS, GPTConfig


def encodings(text):
    words = set(text.split(','))
    if not words <= set(ENCODINGS):
        raise argparse.ArgumentTypeError(f'{text!r} is unknown; one of {" ".join(ENCODINGS)}, or a pattern of them')
    if len(words) == 1:                              # nope,nope is nope, as in GPTConfig
        return words.pop()
    return text


def windows(text):
    for word in text.split(','):
        natural(word)
    return text


def open_checkpoints(args):
    """-> (the checkpoint that this run resumes, the one of --init_from); None for each that there is not."""
    if find_checkpoint(args.out):
        if not args.resume:
            fail(f'--out {args.out} already holds a checkpoint: go on with --resume, or choose another folder')
        resumed = load_checkpoint(args.out)
        if resumed['optimizer'] is None:
            fail(f'{args.out}/ckpt.pt comes from extend.py and has no optimizer to resume: --init_from it, '
                 'with another --out')
        return resumed, None
    if args.init_from is None:
        return None, None
    if args.block_size:
        fail('--block_size is the length that the checkpoint was pre-trained at and stays: give --length')
    parent = load_checkpoint(args.init_from)
    parent['optimizer'] = None                       # gigabytes
    return None, parent


def given_fields(args):
    """The fields of GPTConfig that flags name."""
    flags = vars(args)
    return {name: flags[name] for name in GPTConfig.__dataclass_fields__ if flags.get(name) is not None}


def build_model(args, resumed, parent, meta, env):
    """The network, on the CPU: as this run left it, with the weights of another run, or new."""
    fields = given_fields(args)
    if resumed:
        env.print(f'resuming {args.out} at step {resumed["step"]:,}')
        return load_model(resumed)
    if parent:
        changes = f' with {fields}' if fields else ''
        env.print(f'starting from the weights of {args.init_from}{changes}')
        if parent.get('extended') and fields.get('pe', parent['config']['pe']) != parent['config']['pe']:
            env.print('its temperatures and frequencies belong to its encoding and stay behind')
        return load_model(parent, **fields)
    env.print(f'nothing to resume in {args.out}, starting' if args.resume else 'starting from scratch')
    shape = dict(PRESETS[args.preset or 'tiny'], vocab_size=padded(meta['vocab_size']))
    shape.update(fields)
    try:
        return GPT(GPTConfig(**shape))
    except ValueError as e:
        fail(str(e))


def resolve(args, recipes, config, resumed, parent):
    """
    What the run uses: each flag as given, else as the run began, else as in the recipe of its preset. What depends on
    two flags is checked here.
    """
    run = argparse.Namespace(**vars(args))
    source = resumed or parent
    if run.preset is None:
        run.preset = source['args']['preset'] if source else 'tiny'
    run.benchmark = bool(random_vocab(args.data))    # keeps nothing but its log
    defaults = dict(length=config.block_size, bos=True) | recipes[run.preset]
    if source:
        defaults['bos'] = source['args'].get('bos', True)
    if run.benchmark:                                # its tokens are one document
        defaults['rows'] = 'anywhere'
    run.rows_why = 'as asked' if args.rows else f'the recipe of {run.preset}'
    run.dtype_why = 'as asked'
    if args.init_from:                               # these belong to training from scratch
        defaults.pop('min_length', None)
        defaults.pop('decay_steps', None)
    if resumed:
        began = dict(rows='anywhere') | resumed['args']
        for name in ('length', 'rows', 'warmup', 'decay_steps'):
            defaults[name] = began[name]
        run.rows_why = 'as this run began'
        if run.dtype == 'auto':
            run.dtype, run.dtype_why = began['dtype'], 'as this run began'
    for name, value in defaults.items():
        if getattr(run, name) is None:
            setattr(run, name, value)
    if run.decay_steps is None:
        run.decay_steps = run.steps
    if run.warmup > run.steps:
        if args.warmup is not None:
            fail(f'--warmup {run.warmup} must lie between 0 and --steps {run.steps}')
        if not resumed:
            run.warmup = run.steps // 10
    run.min_length = min(run.min_length or run.length, run.length)
    return run


def halvings(run):
    """How often a row of run.length tokens can be halved before it is shorter than min_length."""
    return int(math.log2(run.length / run.min_length))


def row_length(step, run):
    """Tokens a row of this step: length, a half of it, a quarter ... down to min_length, drawn by (seed, step)."""
    rng = np.random.default_rng((run.seed, step, 1))
    return run.length >> int(rng.integers(halvings(run) + 1))


def split_batch(run, env):
    """Tokens a step -> rows -> processes x accumulation x micro-batch, without a remainder."""
    if run.length % 2 ** halvings(run):
        fail(f'--min_length {run.min_length}: --length {run.length} must halve evenly down to it')
    rows = run.batch_tokens // run.length
    run.micro_batch = min(run.micro_batch, max(1, rows // env.world))
    accumulated = rows // (env.world * run.micro_batch)
    if accumulated == 0 or run.batch_tokens != accumulated * env.world * run.micro_batch * run.length:
        fail(f'--batch_tokens {run.batch_tokens} must be a multiple of length {run.length} x {env.world} processes '
             f'x --micro_batch {run.micro_batch}')
    if run.preset == 'finetune':
        env.print(f'the fine-tuning recipe of a converted checkpoint: {run.steps:,} steps, lr {run.lr:g}, warm-up '
                  f'{run.warmup} (--steps, --lr, --batch_tokens change it; --preset tinyllama pre-trains as the paper)')
    shorter = f'; in some steps more rows, of {run.min_length} tokens up' if run.min_length < run.length else ''
    env.print(f'{run.batch_tokens:,} tokens a step = {env.world} processes x {accumulated} accumulated '
              f'x {run.micro_batch} rows x {run.length} tokens{shorter}')


def check_resume(run, args, resumed, meta):
    """Steps may grow, and machine and number of processes may change; what decides the numbers may not."""
    fields = given_fields(args)
    began = dict(rows='anywhere', bos=True) | resumed['args']
    began.update(asdict(GPTConfig(**resumed['config'])))
    now = dict(vars(run), **fields)
    differs = []
    for name in (*fields, 'preset', 'seed', 'length', 'min_length', 'rows', 'bos', 'batch_tokens', 'optimizer', 'lr',
                 'muon_lr', 'weight_decay', 'grad_clip', 'warmup', 'decay_steps', 'init_from'):
        if now[name] != began[name]:
            differs.append(f'--{name} {now[name]} (was {began[name]})')
    if resumed['fingerprint'] != meta['train']['sha256']:
        differs.append(f'--data {run.data} (other tokens than before)')
    if differs:
        fail(f'cannot resume {run.out} with {", ".join(differs)}: give the flags it was started with, or another --out')


def check_machine(run, model, resumed, meta, env):
    """Ends the program where processes see other files, or the disk or the memory has too little room."""
    step = resumed['step'] if resumed else None
    seen = sorted(set(map(str, env.gather((step, meta['train']['sha256'])))))
    if len(seen) > 1:
        fail(f'the processes do not see the same --out and --data (step, data): {seen}: both must be on shared storage')
    # the checkpoint, the one before and the one being written, each fp32 weights and two moments
    space = 3 * 12 * sum(p.numel() for p in model.parameters())
    if run.benchmark:
        space = 0
    elif resumed:                                    # two are there already
        space //= 3
    need = 0
    if env.device == 'cpu' and not resumed:
        need = memory(model, run.micro_batch * run.length, True, run, env)
    preflight(run.out, space, need)
