"""
Passkey retrieval over lengths x depths: a five-digit key hidden in garbage, asked for at the end (the landmark
template, the grid and the exact-match rule of Wang et al. 2024).

    python eval_passkey.py --ckpt out/nope                                       # 1/2 to 8 times the training length
    python eval_passkey.py --ckpt out/nope/head-1024.pt --lengths 256,512,1024 --trials 20 --plot passkey.png
    torchrun --standalone --nproc_per_node=8 eval_passkey.py --ckpt out/tinyllama --lengths 2048,4096,8192,16384

Every prompt with its answer is exactly as long as the column says. A key counts if every token of it would be decoded
greedily. That needs one forward pass of prompt and answer: greedy decoding gives the answer if and only if each of its
tokens is the likeliest one after the true tokens before it. --decode decodes them one by one, too, through the cache.
Writes <checkpoint>.passkey.csv beside the checkpoint (or in --out): one row a trial, written anew after every batch.
<checkpoint>.passkey.json keeps which checkpoint and flags it belongs to; --resume continues a file that matches.
Prompts depend on (seed, length, depth, trial) only. Nothing is compiled: each length would compile again.
"""
import os

import numpy as np
import torch
from tqdm import tqdm

from data.checkpoint import (
    check_ids,
    find_checkpoint,
    fingerprint,
    frozen,
    load_checkpoint,
    load_model,
    open_tokenizer,
    preflight,
    stem,
)
from data.figures import accuracy, draw, heat_map, pyplot
from data.measure import flops, rows_so_far, save_rows
from data.passkey.prompt import make_prompt, usable_lengths
from data.runtime import Estimate, check_fused, choose_dtype, finish, int_list, parser, positive_int, setup

COLUMNS = dict(length=int, depth=float, trial=int, position=int, accuracy=int, logprob=float)


@torch.inference_mode()
def score(model, prompts, answers, env, decode=False):
    """
    Prompts of one total length -> [(accuracy 0 or 1, log-probability of the answer in nats)]. Only the answer's rows
    reach the LM head. With decode the accuracy is that of greedy decoding through the KV cache.
    """
    longest = max(map(len, answers))
    x = torch.tensor([p + a[:-1] for p, a in zip(prompts, answers)], device=env.device)
    with env.autocast():
        logits = model(x, rows=slice(-longest, None))[0].float()         # (B, longest, V)
    out = []
    for row, p, a in zip(logits, prompts, answers):
        row = row[-len(a):]
        a = torch.tensor(a, device=env.device)
        hit = (row.argmax(-1) == a).all().item()
        if decode:
            with env.autocast():
                whole = model.generate(torch.tensor([p], device=env.device), len(a), temperature=0)
            hit = torch.equal(whole[0, len(p):], a)
        out.append((int(hit), row.log_softmax(-1).gather(1, a[:, None]).sum().item()))
    return out


def parse_args(argv=None):
    p = parser(__doc__)
    p.add_argument('--ckpt', required=True, help='checkpoint file or run folder')
    p.add_argument('--out', help='folder of the csv (default: the checkpoint\'s)')
    p.add_argument('--tokenizer', help='gpt2, hf:DIR, ... (default: the checkpoint\'s, see data/README.md)')
    p.add_argument('--lengths', type=int_list, help='default 1/2 1 1.5 2 3 4 6 8 times the training length')
    p.add_argument('--depths', type=positive_int, default=10, help='at how many depths the key is told (paper 10)')
    p.add_argument('--trials', type=positive_int, default=10, help='keys for each length and depth (paper 10)')
    p.add_argument('--resume', action='store_true', help='go on with the csv that is there')
    p.add_argument('--decode', action='store_true', help='decode the answers token by token through the KV cache')
    p.add_argument('--plot', metavar='FILE.png', help='also draw the heat map')
    p.add_argument('--batch_tokens', type=positive_int, default=2**14, help='tokens in one forward pass')
    p.add_argument('--seed', type=int, default=42, help='(paper 42)')
    p.add_argument('--device', default='auto', help='auto, cpu, cuda or cuda:N')
    p.add_argument('--dtype', choices=('auto', 'bf16', 'fp32'), default='auto', help='auto: bf16 on a GPU that has it; '
                   'on a CPU the faster one, as measured')
    return p.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    if args.plot:
        pyplot(args.plot)                            # what is missing for it is known before the work
    env = setup(args, dtype_later=True)
    ckpt = load_checkpoint(args.ckpt)
    model = load_model(ckpt)
    L = model.config.block_size
    choose_dtype(env, args.dtype, model.config, L)
    model = frozen(model, env)
    tok = open_tokenizer(ckpt, model.config, args.tokenizer, args.lengths or [])
    ckpt['model'] = ckpt['optimizer'] = None         # gigabytes
    lengths = usable_lengths(args.lengths, model.config, tok)
    check_fused(model, max(lengths), env)
    out = args.out or os.path.dirname(find_checkpoint(args.ckpt)) or '.'
    preflight(out, 0)
    file, note = f'{out}/{stem(args.ckpt)}.passkey.csv', f'{out}/{stem(args.ckpt)}.passkey.json'

    def measure(length, cells):
        """Rows of the csv for these (depth, trial), in one batch."""
        made = []
        for depth, trial in cells:
            rng = np.random.default_rng((args.seed, length, depth, trial))
            prompt, answer, position = make_prompt(tok, length, depth, args.depths, rng)
            check_ids(prompt + answer, model.config, tok)
            made.append((prompt, answer, position))
        prompts, answers, positions = zip(*made)
        scores = score(model, prompts, answers, env, args.decode)
        found = []
        for (depth, trial), position, (hit, logprob) in zip(cells, positions, scores):
            values = (length, depth / args.depths, trial, position, hit, logprob)
            found.append(dict(zip(COLUMNS, values)))
        return found

    made_by = dict(checkpoint=fingerprint(args.ckpt), seed=args.seed, depths=args.depths, trials=args.trials,
                   dtype=env.dtype, decode=args.decode)
    rows = []
    if env.master:
        rows = rows_so_far(file, note, made_by, COLUMNS, args.resume)
    rows = env.broadcast(rows)                       # each process must leave out the same
    done = {(r['length'], r['depth'], r['trial']) for r in rows}
    todo = {}
    for n in lengths:
        cells = [(depth, trial) for trial in range(args.trials) for depth in range(args.depths)]
        todo[n] = [cell for cell in cells if (n, cell[0] / args.depths, cell[1]) not in done]
    total = sum(len(cells) for cells in todo.values())
    work = sum(len(cells) * flops(model, n) for n, cells in todo.items())
    env.print(f'{total:,} prompts, {args.depths * args.trials} at each of {len(lengths)} lengths from {lengths[0]:,} '
              f'to {lengths[-1]:,} tokens')
    estimate = Estimate(env, work, 'fewer --lengths, --trials or --depths take less')
    with tqdm(total=total, unit='prompt', disable=not env.master, dynamic_ncols=True) as bar:
        for length, cells in todo.items():
            size = env.world * max(1, args.batch_tokens // length)
            for i in range(0, len(cells), size):
                batch = cells[i:i + size]
                mine = batch[env.rank::env.world]
                found = []
                if mine:
                    found = measure(length, mine)
                for part in env.gather(found):
                    rows += part
                rows.sort(key=lambda r: (r['length'], r['depth'], r['trial']))
                if env.master:                       # every finished batch is safe
                    save_rows(file, note, made_by, rows)
                estimate.update(len(batch) * flops(model, length))
                bar.update(len(batch))
                bar.set_postfix_str(f'length {length}, accuracy {accuracy(rows, length):.0%}')
    how = ', decoded' if args.decode else ''
    env.print(f'\npasskey accuracy of {args.ckpt}, {args.trials} prompts a cell, seed {args.seed}{how}')
    env.print(heat_map(rows, L))
    env.print(file)
    if args.plot and env.master:
        fig, ax = pyplot(args.plot).subplots(figsize=(1 + 0.7 * len(lengths), 4), layout='constrained')
        draw(ax, rows, L, f'passkey: {args.ckpt}')
        fig.savefig(args.plot, dpi=150)
    finish()


if __name__ == '__main__':
    main()
