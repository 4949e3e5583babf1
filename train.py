"""
Trains a language model from scratch, or goes on from a checkpoint at another length or with another position encoding.

CPU, minutes:    python train.py --preset tiny --pe nope --data data/passkey --out out/nope
one GPU:         python train.py --preset small --pe nope --data data/books --out out/small
one node:        torchrun --standalone --nproc_per_node=8 train.py --preset tinyllama --data data/corpus --out out/paper
two nodes:       torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 \
                     train.py --preset tinyllama --data data/corpus --out out/paper
after a stop:    the same command with --resume (and with --resume always given: starts if there is nothing to resume)
by itself:       torchrun --standalone --nproc_per_node=8 --max-restarts=3 \
                     train.py --resume --preset tinyllama --data data/corpus --out out/paper
DroPE:           python train.py --init_from out/rope --pe nope --steps 300 --data data/passkey --out out/drope
longer context:  python train.py --init_from out/rope --length 1024 --steps 200 --data data/passkey --out out/rope-1024

Writes OUT/ckpt.pt (the one before as ckpt.prev.pt) and OUT/log.jsonl, one JSON object a line. SIGTERM and Ctrl-C save
and exit (143, 130). The batch of a step depends on (seed, step) only: any number of processes trains on the same data.
"""
import argparse
import signal
import sys
from dataclasses import asdict

import torch

from data.checkpoint import check_fits, lock, preflight, save_checkpoint
from data.log import Log
from data.muon import Muon
from data.run import (
    build_model,
    check_machine,
    check_resume,
    encodings,
    open_checkpoints,
    resolve,
    row_length,
    split_batch,
    windows,
)
from data.runtime import (
    accumulating,
    check_fused,
    choose_dtype,
    compiled,
    finish,
    fraction,
    listen,
    lr_factor,
    natural,
    natural_float,
    parallel,
    parser,
    positive_float,
    positive_int,
    setup,
)
from data.tokenizer import keep_files
from data.tokens import anchor, describe_rows, get_batch, open_data, open_rows, spaced_rows
from model import ENCODINGS, PRESETS

# what each preset trains with unless a flag says otherwise
RECIPES = dict(
    # chosen by trying on the passkey corpus, see results/README.md
    tiny=dict(steps=1600, batch_tokens=4096, eval_tokens=2**14, min_length=64, micro_batch=16, rows='documents',
              optimizer='muon', lr=3e-3, muon_lr=1e-2, warmup=100),
    # GPT-2 small's usual lr; one GPU
    small=dict(steps=8000, batch_tokens=131072, eval_tokens=2**16, micro_batch=32, rows='anywhere',
               optimizer='adamw', lr=1e-3, muon_lr=2e-2, warmup=300),
    # Wang et al. 2024: 50K steps of 2M tokens, lr 3.5e-4; the rest as in TinyLlama, whose cosine ends at 1.43M steps
    # and whose rows are blocks of packed text without a BOS before them
    tinyllama=dict(steps=50_000, decay_steps=1_430_512, batch_tokens=2**21, eval_tokens=2**16, micro_batch=8,
                   rows='anywhere', bos=False, optimizer='adamw', lr=3.5e-4, muon_lr=2e-2, warmup=2000),
    # not a --preset, but what --init_from takes for a converted checkpoint. Learning rate, steps and warm-up are those
    # with which Peng et al. 2024 (YaRN, sec. 4.1) fine-tune Llama, on 64 times as many tokens a step, without decay
    finetune=dict(steps=400, batch_tokens=2**16, eval_tokens=2**14, micro_batch=1, rows='anywhere',
                  optimizer='adamw', lr=2e-5, muon_lr=2e-5, warmup=20),
)


def parse_args(argv=None):
    """The flags as they were given; None for those that resolve() finds a value for."""
    p = parser(__doc__)
    yes_no = argparse.BooleanOptionalAction
    # files
    p.add_argument('--data', required=True, help='folder with train.bin, val.bin, meta.json; or random, random:VOCAB: '
                   'a benchmark (vocabulary 32000), which saves no checkpoint')
    p.add_argument('--out', required=True, help='folder of this run')
    p.add_argument('--resume', action=yes_no, default=False, help='go on from OUT/ckpt.pt if there is one')
    p.add_argument('--init_from', metavar='CKPT', help='start from these weights; their shape and block_size stay')
    # model: a preset, and fields of GPTConfig that differ from it
    p.add_argument('--preset', choices=PRESETS, help='shape and recipe (default tiny, or the checkpoint\'s)')
    p.add_argument('--pe', type=encodings, help=f'position encoding (default nope): {" ".join(ENCODINGS)}; or a '
                   'pattern of nope and rope that repeats over the layers: rope,rope,rope,nope')
    p.add_argument('--window', type=windows, help='tokens that a layer sees, itself included, 0 for all '
                   '(default); or a pattern as for --pe: 16,16,16,0')
    p.add_argument('--qk_norm', nargs='?', const=True, choices=('full',), help='normalise q and k in each head; '
                   'full: over all heads together, with learned gains')
    p.add_argument('--no-qk_norm', dest='qk_norm', action='store_false', default=None)
    p.add_argument('--qk_gain', action=yes_no, help='learn a factor on the scores of each head')
    p.add_argument('--rope_fraction', type=fraction, help='p-RoPE: the share of RoPE\'s frequencies that rotate, '
                   'the highest first (default 1; 0.75 in the paper)')
    p.add_argument('--scalable_softmax', dest='law', action='store_const', const='ssmax', help='multiply the '
                   'scores of token n by s ln n, with s learned for each head; --init_from may add it')
    for name in ('block_size', 'n_layer', 'n_head', 'n_kv_head', 'n_embd', 'n_inner'):
        p.add_argument(f'--{name}', type=positive_int, help='default: the preset\'s')
    # batch
    p.add_argument('--length', type=positive_int, help='tokens a row (default block_size); another to fine-tune at')
    p.add_argument('--min_length', type=positive_int, help='each step draws its length: length, length/2, ... to this')
    p.add_argument('--rows', choices=('documents', 'anywhere'), help='where rows begin: at the start of a document '
                   'longer than the row, or anywhere')
    p.add_argument('--bos', action=yes_no, help='with --rows anywhere: each row begins with BOS (default: yes, except '
                   'for tinyllama; or as the checkpoint was trained)')
    p.add_argument('--batch_tokens', type=positive_int, help='tokens a step, over all processes')
    p.add_argument('--micro_batch', type=positive_int, help='rows in a forward pass; the rest is accumulation')
    # optimisation; TinyLlama's values unless the recipe says otherwise
    p.add_argument('--steps', type=positive_int, help='updates')
    p.add_argument('--decay_steps', type=positive_int, help='updates until the cosine ends (default: steps)')
    p.add_argument('--warmup', type=natural, help='updates of linear warm-up')
    p.add_argument('--optimizer', choices=('adamw', 'muon'), help='muon: for the blocks\' matrices, AdamW for the rest')
    p.add_argument('--lr', type=positive_float, help='AdamW learning rate; the cosine ends at a tenth of it')
    p.add_argument('--muon_lr', type=positive_float, help='Muon learning rate, matched to AdamW\'s update size')
    p.add_argument('--weight_decay', type=natural_float, default=0.1, help='on matrices, not on vectors')
    p.add_argument('--grad_clip', type=positive_float, default=1.0, help='largest gradient norm')
    # evaluation and logging
    p.add_argument('--eval_every', type=positive_int, default=250, help='updates between validation losses and saves')
    p.add_argument('--eval_tokens', type=positive_int, help='validation tokens, the same every time')
    p.add_argument('--log_every', type=positive_int, default=10)
    # machine
    p.add_argument('--seed', type=int, default=1337)
    p.add_argument('--device', default='auto', help='auto, cpu, cuda or cuda:N')
    p.add_argument('--dtype', choices=('auto', 'bf16', 'fp32'), default='auto', help='auto: bf16 on a GPU that has it; '
                   'on a CPU the faster one, as measured')
    p.add_argument('--compile', action=yes_no, help='torch.compile (default: on GPU only)')
    p.add_argument('--activation_checkpointing', action=yes_no, default=False, help='more arithmetic, much less memory')
    p.add_argument('--timeout', type=positive_float, default=600, help='seconds that a process waits for the others')
    return p.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    env = setup(args, dtype_later=True)
    data, meta = open_data(args.data, 'train')
    val_data, val_meta = open_data(args.data, 'val')
    # lock before reading: a live run may be writing the checkpoint
    preflight(args.out, 0)
    if env.master:
        locked = lock(args.out)                      # noqa: F841 (for as long as this file is open)
        keep_files(meta['tokenizer'], args.out)
    env.barrier()

    # what this run starts from, and what its flags come to
    resumed, parent = open_checkpoints(args)
    raw = build_model(args, resumed, parent, meta, env)              # saving and evaluation go through the bare module
    run = resolve(args, RECIPES, raw.config, resumed, parent)
    if resumed:
        check_resume(run, args, resumed, meta)
    check_fits(raw.config, meta, run.data, [run.length], resumed or parent)
    docs = open_rows(run.rows, data, meta, 'train', run.length, run.data)
    val_docs = open_rows(run.rows, val_data, val_meta, 'val', run.length, run.data)
    bos = meta['bos'] if run.bos else None
    split_batch(run, env)
    env.print(describe_rows(run.rows, run.rows_why, data, run.length, docs, bos))
    choose_dtype(env, run.dtype, raw.config, run.length, training=True, why=run.dtype_why)
    run.dtype = env.dtype                            # a resumed run stays with it
    check_machine(run, raw, resumed, meta, env)
    raw.activation_checkpointing = run.activation_checkpointing
    raw.to(env.device)
    check_fused(raw, run.length, env)

    opts = make_optimizers(raw, run)
    params = [p for p in raw.parameters() if p.requires_grad]
    step, saved = 0, -1
    if resumed:
        step = saved = resumed['step']
        for opt, state in zip(opts, resumed['optimizer']):
            opt.load_state_dict(state)
    resumed = parent = None                          # gigabytes
    fast = compiled(raw, run, env)
    model = parallel(fast, env)
    log = Log(raw, fast is not raw, run, step, saved, env)
    stop = listen()

    def save():
        if env.master and not run.benchmark:
            weights = {name: tensor.cpu() for name, tensor in raw.state_dict().items()}
            if raw.config.tie_embeddings:            # in the file they stay one
                weights['lm_head.weight'] = weights['embed.weight']
            save_checkpoint(f'{run.out}/ckpt.pt', dict(
                model=weights, config=asdict(raw.config), optimizer=[opt.state_dict() for opt in opts], step=step,
                tokens=step * run.batch_tokens, seed=run.seed, args=vars(run), fingerprint=meta['train']['sha256'],
                tokenizer=meta['tokenizer'], tokenizer_fingerprint=meta.get('tokenizer_fingerprint'), extended=None))
        env.barrier()

    def next_batch(step):
        """The micro-batches of this process: [(idx, targets)], each (rows, T) on the device."""
        T = row_length(step, run)
        x, y = get_batch(data, bos, run.batch_tokens // T, T, run.seed, step, env.rank, env.world, docs)
        if 'cuda' in env.device:
            x = x.contiguous().pin_memory().to(env.device, non_blocking=True)
            y = y.contiguous().pin_memory().to(env.device, non_blocking=True)
        rows = run.micro_batch * run.length // T     # shorter rows, more of them
        return list(zip(x.split(rows), y.split(rows)))

    batch = next_batch(step)
    while True:
        # save before evaluating: an evaluation that fails must not cost the run
        if step % run.eval_every == 0 or step == run.steps:
            if step != saved:
                save()
                saved = step
            val_loss = validate(raw, val_data, bos, run, env, val_docs, log, stop)
            if val_loss is None:
                leave(stop.signal, save, step, run, env)             # --resume validates again
            log.validation(step, val_loss, saved)
        if step == run.steps:
            break

        log.begin_step()
        factor = lr_factor(step, run.warmup, run.decay_steps)
        for opt, lr in zip(opts, (run.lr, run.muon_lr)):
            for group in opt.param_groups:
                group['lr'] = lr * factor

        loss_sum = torch.zeros((), device=env.device)
        bar = log.bar(batch, f'step {step + 1:,}')
        for i, (x, y) in enumerate(bar):
            if i > 0 and stop.signal and env.world == 1:
                bar.close()
                leave(stop.signal, save, step, run, env)             # --resume repeats the unfinished step
            with accumulating(model, i == len(batch) - 1):
                with env.autocast():
                    loss = model(x, y)[1] / len(batch)
                loss.backward()
            loss_sum += loss.detach()
        norm = torch.nn.utils.get_total_norm([p.grad for p in params])
        batch = next_batch(step + 1)                 # while the GPU works

        # before the update all processes learn every one's loss, gradient norm and signal, so that all decide alike
        status = torch.zeros(env.world, 3, device=env.device)
        status[env.rank] = torch.stack((loss_sum, norm, torch.tensor(float(stop.signal), device=env.device)))
        losses, norms, signals = env.sum(status).cpu().T
        check_finite(losses, norms, step, saved, run, env)
        torch.nn.utils.clip_grads_with_norm_(params, run.grad_clip, norm)
        for opt in opts:
            opt.step()
            opt.zero_grad(set_to_none=True)
        step += 1
        log.end_step()                               # the losses have waited for the GPU

        if step % run.log_every == 0 or step == run.steps:
            log.training(step, losses.mean().item(), run.lr * factor, norm.item(), saved)
        if signals.any():
            leave(int(signals.max()), save, step, run, env)
    log.summary(step)
    finish()


# ---------------------------------------------------------------------------------------------------------------------
# the parts of the loop

def make_optimizers(model, run):
    """AdamW (beta 0.9, 0.95), decay on matrices only; with --optimizer muon the matrices of the blocks go to Muon."""
    matrices, vectors, muon = [], [], []
    for name, p in model.named_parameters():
        if not p.requires_grad:                      # temperatures are for extend.py
            continue
        if p.dim() < 2:
            vectors.append(p)
        elif run.optimizer == 'muon' and name.startswith('blocks.'):
            muon.append(p)
        else:
            matrices.append(p)
    groups = [dict(params=matrices, weight_decay=run.weight_decay), dict(params=vectors, weight_decay=0.0)]
    opts = [torch.optim.AdamW(groups, lr=run.lr, betas=(0.9, 0.95), fused=True)]
    if muon:
        dtype = torch.bfloat16 if run.dtype == 'bf16' else torch.float32
        opts.append(Muon(muon, run.muon_lr, run.weight_decay, dtype))
    return opts


@torch.no_grad()
def validate(model, data, bos, run, env, docs, log, stop):
    """
    Mean loss in nats over fixed, evenly spaced rows, split over the processes. None if a signal came meanwhile (to a
    single process only; several would have to agree first).
    """
    T = run.length
    mine = spaced_rows(data, T, run.eval_tokens, docs)[env.rank::env.world]
    if docs is not None:
        bos = None                                   # a document has its own
    total = torch.zeros(2, dtype=torch.float64)      # of loss, of rows
    bar = log.bar(range(0, len(mine), run.micro_batch), 'validation')
    for i in bar:
        if stop.signal and env.world == 1:
            bar.close()
            return None
        x = anchor([data[start:start + T + 1] for start in mine[i:i + run.micro_batch]], bos).to(env.device)
        with env.autocast():
            loss = model(x[:, :-1], x[:, 1:])[1]
        total += torch.tensor([loss.item() * len(x), len(x)], dtype=torch.float64)
    total = env.sum(total)
    return (total[0] / total[1]).item()


def check_finite(losses, norms, step, saved, run, env):
    """losses, norms (world,): each process's loss, and the norm of the gradient, which they share."""
    bad = losses.isfinite().logical_not().nonzero().flatten().tolist()
    if not bad and norms.isfinite().all():
        return
    what = f'loss is not finite on rank {bad[0]}' if bad else 'gradient is not finite'
    good = '' if run.benchmark else f', the last good checkpoint is {run.out}/ckpt.pt at step {saved}'
    env.print(f'error: step {step + 1}: {what} (batch of seed {run.seed}, step {step}); no weight was changed{good}: '
              'lower --lr, or look at that batch', file=sys.stderr, flush=True)
    finish(1)
    sys.exit(1)


def leave(number, save, step, run, env):
    """Saves, and ends with the exit code of the signal `number`."""
    save()
    done = 'stopped at' if run.benchmark else 'saved at'
    hint = '' if run.benchmark else '; the same command with --resume goes on'
    env.print(f'{signal.Signals(number).name}: {done} step {step:,}{hint}', flush=True)
    finish(128 + number)
    sys.exit(128 + number)


if __name__ == '__main__':
    main()
