"""
Passkey retrieval over lengths x depths: a five-digit key hidden in garbage, asked for at the end (the landmark
template, the grid and the exact-match rule of Wang et al. 2024).

    python eval_passkey.py --ckpt out/nope                                       # 1/2 to 8 times the training length
    python eval_passkey.py --ckpt out/nope/head-1024.pt --lengths 256,512,1024 --trials 20 --plot passkey.png
    torchrun --standalone --nproc_per_node=8 eval_passkey.py --ckpt out/tinyllama --lengths 2048,4096,8192,16384

Every prompt with its answer is exactly as long as the column says. A key counts if every token of it would be decoded
greedily. That needs one forward pass of prompt and answer: greedy decoding gives the answer exactly if the answer's
tokens are each the likeliest after the true ones before. --decode decodes them one by one as well, through the cache.
Writes <checkpoint>.passkey.csv beside the checkpoint (or in --out), a row a trial, batch by batch (.passkey.json says of
what; --resume goes on). Prompts depend on (seed, length, depth, trial) only. Nothing is compiled: each length would
compile again.
"""
import os
from contextlib import suppress

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from data import io
from data.passkey.prepare import ANSWER, GARBAGE, INFO, QUESTION, TASK

COLUMNS = ('length', 'depth', 'trial', 'position', 'accuracy', 'logprob')


def make_prompt(tok, length, depth, n_depths, rng):
    """
    -> prompt ids, answer ids, the token position at which the key is told; len(prompt) + len(answer) == length.
    The key stands at a sentence boundary drawn from the part [depth, depth + 1) / n_depths of the garbage; the first
    sentence of the garbage is cut to make the length exact. ValueError if the length has no room for a sentence.
    """
    key = rng.integers(10000, 100000)
    head = [tok.bos] * (tok.bos is not None) + tok.encode(TASK)
    info, question, answer = (tok.encode(s.format(key=key)) for s in (INFO, QUESTION, ANSWER))
    sentences = [tok.encode(s) for s in GARBAGE]
    room = length - len(head) - len(info) - len(question) - len(answer)
    if room < max(map(len, sentences)):
        raise ValueError(f'length {length} is too short for a passkey prompt: at least {length - room + max(map(len, sentences))} tokens of this tokenizer')
    filler = sum(sentences, []) * (room // sum(map(len, sentences)) + 1)
    ends = np.cumsum([0] + [len(s) for s in sentences] * (room // sum(map(len, sentences)) + 1)) - (len(filler) - room)
    filler, ends = filler[len(filler) - room:], ends[ends >= 0]          # whole sentences up to the end, the first one cut
    want = (depth + rng.random()) / n_depths * room
    at = int(ends[ends <= want].max(initial=0))
    return head + filler[:at] + info + filler[at:] + question, answer, len(head) + at


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
        row, a = row[-len(a):], torch.tensor(a, device=env.device)
        hit = (row.argmax(-1) == a).all().item()
        if decode:
            with env.autocast():
                hit = torch.equal(model.generate(torch.tensor([p], device=env.device), len(a), temperature=0)[0, len(p):], a)
        out.append((int(hit), row.log_softmax(-1).gather(1, a[:, None]).sum().item()))
    return out


def heat_map(rows, block_size):
    """Rows of the csv -> text: depths down, lengths across, a bar where the training length ends."""
    lengths, depths = (sorted({r[k] for r in rows}) for k in ('length', 'depth'))
    mean = lambda L, d=None: np.mean([r['accuracy'] for r in rows if r['length'] == L and d in (None, r['depth'])])
    bar = lambda L: ' |' if L <= block_size and not any(L < M <= block_size for M in lengths) else '  '
    line = lambda head, cell: f'{head:>7} ' + ''.join(f'{cell(L):>6}{bar(L)}' for L in lengths)
    shade = lambda p: '.' if p == 0 else '░▒▓██'[int(p * 4)] * 4
    return '\n'.join([line('length', str), line('', lambda L: f'{L / block_size:g}x')]
                     + [line(f'{d:.0%}', lambda L: shade(mean(L, d))) for d in depths]
                     + [line('mean', lambda L: f'{mean(L):.0%}')] + [f'        depth down; | = training length {block_size}'])


def draw(ax, rows, block_size, title):
    """The heat map on an axis of matplotlib."""
    lengths, depths = (sorted({r[k] for r in rows}) for k in ('length', 'depth'))
    grid = [[np.mean([r['accuracy'] for r in rows if (r['length'], r['depth']) == (L, d)]) for L in lengths] for d in depths]
    ax.imshow(grid, cmap='RdYlGn', vmin=0, vmax=1, aspect='auto')
    ax.axvline(sum(L <= block_size for L in lengths) - 0.5, color='black', linestyle='--')
    ax.set(title=title, xlabel='length / training length (dashed)', ylabel='depth of the key')
    ax.set_xticks(range(len(lengths)), [f'{n / block_size:g}' for n in lengths])
    ax.set_yticks(range(len(depths)), [f'{d:.0%}' for d in depths])


def main():
    p = io.parser(__doc__)
    p.add_argument('--ckpt', required=True, help='checkpoint file or run folder')
    p.add_argument('--out', help='folder of the csv (default: the checkpoint\'s)')
    p.add_argument('--lengths', type=io.int_list, help='tokens, comma-separated (default 1/2 1 1.5 2 3 4 6 8 times the training length)')
    p.add_argument('--depths', type=int, default=10, help='parts of the length in which the key is told (paper 10)')
    p.add_argument('--trials', type=int, default=10, help='keys for each length and depth (paper 10)')
    p.add_argument('--resume', action='store_true', help='go on with the csv that is there')
    p.add_argument('--decode', action='store_true', help='decode the answers token by token through the KV cache')
    p.add_argument('--plot', metavar='FILE.png', help='also draw the heat map')
    p.add_argument('--batch_tokens', type=int, default=2**14, help='tokens in one forward pass')
    p.add_argument('--seed', type=int, default=42, help='(paper 42)')
    p.add_argument('--device', default='auto', help='auto, cpu, cuda or cuda:N')
    p.add_argument('--dtype', choices=('auto', 'bf16', 'fp32'), default='auto', help='auto: bf16 where the hardware multiplies in it')
    args = p.parse_args()
    for name in ('depths', 'trials', 'batch_tokens'):
        if getattr(args, name) < 1:
            io.fail(f'--{name} {getattr(args, name)} must be at least 1')
    if args.plot:
        io.pyplot(args.plot)                         # what is missing for it is known before the work

    env = io.setup(args)
    ckpt = io.load_checkpoint(args.ckpt)
    model = io.frozen(io.load_model(ckpt), env)
    tok, L = io.get_tokenizer(ckpt['tokenizer']), model.config.block_size
    ckpt['model'] = ckpt['optimizer'] = None         # gigabytes
    io.check_fits(model.config, dict(vocab_size=tok.n_vocab, tokenizer=tok.name), 'the tokenizer', args.lengths or [])
    lengths, too_short = [], None
    for n in sorted(set(args.lengths or ())) or io.default_lengths(model.config):
        try:
            make_prompt(tok, n, 0, 1, np.random.default_rng(0))
            lengths.append(n)
        except ValueError as e:                      # half the training length, say, may hold no prompt
            too_short = str(e)
    if too_short and (args.lengths or not lengths):
        io.fail(too_short)
    io.check_fused(model, max(lengths), env)
    out = args.out or os.path.dirname(io.find_checkpoint(args.ckpt)) or '.'
    io.preflight(out, 0)
    file = f'{out}/{io.stem(args.ckpt)}.passkey.csv'

    def measure(length, cells):
        """Rows of the csv for these (depth, trial), in one batch."""
        made = [make_prompt(tok, length, d, args.depths, np.random.default_rng((args.seed, length, d, t))) for d, t in cells]
        scores = score(model, [m[0] for m in made], [m[1] for m in made], env, args.decode)
        return [dict(zip(COLUMNS, (length, d / args.depths, t, m[2], *s))) for (d, t), m, s in zip(cells, made, scores)]

    # what the rows of the csv are of: --resume adds to them only if it is the same
    note, rows = f'{out}/{io.stem(args.ckpt)}.passkey.json', []
    made_by = dict(checkpoint=io.fingerprint(args.ckpt), seed=args.seed, depths=args.depths, trials=args.trials, dtype=env.dtype, decode=args.decode)
    if args.resume and env.master and os.path.exists(file):
        if io.read_json(note) != made_by:
            io.fail(f'{file} is of another checkpoint or other flags: leave out --resume, or choose another --out')
        try:
            rows = [{c: (float if c in ('depth', 'logprob') else int)(r[c]) for c in COLUMNS} for r in io.read_csv(file)]
        except (KeyError, TypeError, ValueError):
            io.fail(f'{file} is damaged: leave out --resume, or choose another --out')
        print(f'{file} has {len(rows)} prompts already')
    elif env.master:
        with suppress(FileNotFoundError):            # rows of other flags must not stand beside the new note
            os.remove(file)
        io.write_json(note, made_by)
    if env.world > 1:                                # each process must leave out the same
        shared = [rows]
        dist.broadcast_object_list(shared)
        rows = shared[0]
    done = {(r['length'], r['depth'], r['trial']) for r in rows}
    todo = {n: [(d, t) for t in range(args.trials) for d in range(args.depths) if (n, d / args.depths, t) not in done] for n in lengths}
    with tqdm(total=sum(map(len, todo.values())), unit='prompt', disable=not env.master, dynamic_ncols=True) as bar:
        for length, cells in todo.items():
            size = env.world * max(1, args.batch_tokens // length)
            for i in range(0, len(cells), size):
                mine = cells[i:i + size][env.rank::env.world]
                parts = [measure(length, mine) if mine else []]
                if env.world > 1:
                    parts *= env.world
                    dist.all_gather_object(parts, parts[env.rank])
                rows += [r for part in parts for r in part]
                if env.master:                       # every finished batch is safe
                    io.write_csv(file, sorted(rows, key=lambda r: (r['length'], r['depth'], r['trial'])))
                bar.update(len(cells[i:i + size]))
                bar.set_postfix_str(f'length {length}, accuracy {np.mean([r["accuracy"] for r in rows if r["length"] == length]):.0%}')
    env.print(f'\npasskey accuracy of {args.ckpt}, {args.trials} prompts a cell, seed {args.seed}' + (', decoded' if args.decode else ''))
    env.print(heat_map(rows, L))
    env.print(file)
    if args.plot and env.master:
        fig, ax = io.pyplot(args.plot).subplots(figsize=(1 + 0.7 * len(lengths), 4), layout='constrained')
        draw(ax, rows, L, f'passkey: {args.ckpt}')
        fig.savefig(args.plot, dpi=150)
    io.finish()


if __name__ == '__main__':
    main()
