"""
The headline in one minute, without training: opens the models that come with the repository (results/demo: a base and
its extended twins; made.json tells how they were made), draws how far each finds a passkey, and lets them continue the
same long prompt.

    python -m results.demo
    python -m results.demo --models out/mine      # your own nope.pt, uniform.pt, head.pt
"""
import hashlib
import os
import subprocess
import sys

import torch

from data.checkpoint import load_checkpoint, load_model
from data.figures import read_csv, read_json
from data.passkey.prepare import GARBAGE, INFO, QUESTION, TASK
from data.runtime import fail, parser, positive_int
from data.tokenizer import get_tokenizer

MODELS = dict(nope='NoPE', uniform='NoPE uniform', head='NoPE head')
KEY = 27182


def check(folder):
    """The models are there, and they are those that made.json tells of. Own ones may come without it."""
    made = read_json(f'{folder}/made.json') or {}
    for name in MODELS:
        file = f'{folder}/{name}.pt'
        if not os.path.isfile(file):
            fail(f'{file} is missing: restore results/demo, or train and extend models of your own with make reproduce')
        with open(file, 'rb') as f:
            sha256 = hashlib.sha256(f.read()).hexdigest()
        if name in made.get('sha256', {}) and sha256 != made['sha256'][name]:
            fail(f'{file} is not the file that {folder}/made.json tells of: restore it')


def long_prompt(tok, length):
    """Garbage with a key told a third of the way in, then the question: about `length` tokens."""
    sentence = ''.join(GARBAGE)
    times = (length - len(tok.encode(TASK + INFO.format(key=KEY) + QUESTION))) // len(tok.encode(sentence))
    before = max(1, times // 3)
    return TASK + before * sentence + INFO.format(key=KEY) + (times - before) * sentence + QUESTION


def answer(file, prompt, n):
    """What the model of a checkpoint says next, n tokens, the likeliest each."""
    ckpt = load_checkpoint(file)
    tok = get_tokenizer(ckpt['tokenizer'])
    idx = torch.tensor([[tok.bos, *tok.encode(prompt)]])         # (1, T)
    new = load_model(ckpt).eval().generate(idx, n, temperature=0)[0, idx.size(1):]
    return tok.decode(new.tolist())


def parse_args(argv=None):
    p = parser(__doc__)
    p.add_argument('--models', default='results/demo', help='folder with nope.pt, uniform.pt, head.pt and made.json')
    p.add_argument('--out', default='out/demo', help='folder of the csv files')
    p.add_argument('--depths', type=positive_int, default=5, help='rows of a heat map')
    p.add_argument('--trials', type=positive_int, default=2, help='prompts a cell')
    return p.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    check(args.models)
    ckpt = load_checkpoint(f'{args.models}/nope.pt')
    L, tok = ckpt['config']['block_size'], get_tokenizer(ckpt['tokenizer'])
    lengths = [n * L for n in (1, 2, 4, 8, 16)]
    table = []
    for name, title in MODELS.items():
        command = ['eval_passkey.py', '--ckpt', f'{args.models}/{name}.pt', '--lengths', ','.join(map(str, lengths)),
                   '--depths', str(args.depths), '--trials', str(args.trials), '--dtype', 'fp32', '--out', args.out]
        print(f'\n{title}\n$ python {" ".join(command)}', flush=True)
        code = subprocess.call([sys.executable, *command])
        if code:
            sys.exit(code)
        cells = [title]
        lines = read_csv(f'{args.out}/{name}.passkey.csv')
        for n in lengths:
            hits = [int(line['accuracy']) for line in lines if int(line['length']) == n]
            cells.append(f'{100 * sum(hits) / len(hits):.0f}')
        table.append('| ' + ' | '.join(cells) + ' |')
    print(f'\n| passkey (%), {args.depths * args.trials} prompts a length | '
          + ' | '.join(f'{n // L}x' for n in lengths) + ' |\n' + '|---' * (len(lengths) + 1) + '|')
    print('\n'.join(table))

    prompt = long_prompt(tok, 8 * L)
    print(f'\nA prompt of {len(tok.encode(prompt)):,} tokens, 8 times the training length, tells the key {KEY} once '
          f'and ends\n  ...{prompt[-120:].strip()}')
    for name, title in MODELS.items():
        print(f'{title:>14}: {answer(f"{args.models}/{name}.pt", prompt, 12)!r}')


if __name__ == '__main__':
    main()
