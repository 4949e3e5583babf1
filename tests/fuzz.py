"""
Random command lines for every script, made from the parsers' own definitions: valid values, wrong ones, and flags that
do not go together. Each must end with exit code 0 or 2, and with 2 in one line; never with a traceback.

    python -m tests.fuzz --n 500 [--seed 0] [--only train]
"""
import argparse
import contextlib
import importlib
import io as text_io
import json
import os
import random
import re
import sys
import tempfile
import time
import traceback

sys.path[:0] = [os.path.dirname(__file__), os.path.dirname(os.path.dirname(__file__))]
from conftest import TINY, write_corpus  # noqa: E402

from data import runtime  # noqa: E402

SCRIPTS = (
    'train',
    'extend',
    'eval_passkey',
    'data.passkey.prepare',
    'data.text.prepare',
    'data.hf.convert',
    'data.pg19.prepare',
    'data.proof_pile.prepare',
    'data.fineweb_edu.prepare',
    'data.slimpajama_starcoder.prepare',
)
# what keeps a valid run short; a random flag after it may take its place
BASE = {
    'train': TINY + ' --steps 2 --data {data} --out {out}',
    'extend': '--ckpt {ckpt} --data {data} --method none --length 128 --steps 2 --batch 2 --grid 1,1.2 '
    '--grid_batches 1 --population 4 --iterations 1 --lengths 64,96 '
    '--eval_tokens 128 --device cpu --out {out}',
    'eval_passkey': '--ckpt {ckpt} --lengths 96 --depths 2 --trials 1 --device cpu --out {out}',
    'data.passkey.prepare': '--out {out} --tokens 3000',
    'data.text.prepare': '{text} --out {out} --tokenizer bytes',
    'data.hf.convert': '{ckpt} {out}',
    **{
        f'data.{name}.prepare': '--source {jsonl} --out {out} --tokenizer bytes --workers 1 --tokens 2000'
        for name in ('pg19', 'proof_pile')
    },
    'data.fineweb_edu.prepare': '--source {jsonl} --out {out} --tokenizer bytes --workers 1 --tokens 2000 --val 0.3',
    'data.slimpajama_starcoder.prepare': '--slimpajama {jsonl} --starcoder {jsonl} --out {out} --tokenizer bytes '
    '--workers 1 --tokens 2000 --val 0.3',
}
NUMBERS = (
    '0',
    '-1',
    '1',
    '2',
    '3',
    '7',
    '16',
    '64',
    '96',
    '100',
    '128',
    '1e-3',
    '0.5',
    '1e9',
    '99999999999',
    '-0.0',
    'nan',
    'inf',
    '-inf',
    '',
    'x',
    '1,2',
    '0x10',
    '१',
)
SHORT = ('0', '-1', '1', '2', '3', '7', '16', '', 'x', 'nan', '1.5')  # of what would take hours: --steps 1e9 is a wish
LONG = {'steps', 'iterations', 'population', 'trials', 'depths', 'grid_batches', 'batch', 'tokens', 'eval_tokens'}
WORDS = (
    '',
    'x',
    'nowhere',
    '-',
    '--',
    '../',
    'a b',
    '\n',
    'ü',
    '0',
    'auto',
    'cpu',
    'cuda',
    'cuda:7',
    'best',
    'gpt2x',
    'bytes',
    'hf:nowhere',
    '{data}',
    '{ckpt}',
    '{ckpt}/ckpt.pt',
    '{data}/val.bin',
    '{out}',
    '/dev/null',
    '/proc/nope',
    '{text}',
    'figure.word',
)


def parser_of(module):
    """The parser that main() builds, without running it."""
    class Built(Exception):
        pass

    real, made = runtime.parser, []

    def record(doc):
        p = real(doc)
        made.append(p)

        def parse_args(*_):
            raise Built
        p.parse_args = parse_args
        return p
    homes = [m for m in (runtime, getattr(module, 'io', None), module) if hasattr(m, 'parser')]
    for m in homes:
        m.parser = record
    try:
        module.main()
    except Built:
        return made[0]
    finally:
        for m in homes:
            m.parser = real


def value(rng, action):
    if action.choices and rng.random() < 0.8:
        return rng.choice(list(action.choices))
    if action.type in (int, float):
        return rng.choice(SHORT if action.dest in LONG else NUMBERS)
    if action.type:                                  # lists
        return ','.join(rng.choice(NUMBERS[:12] + ('', 'x')) for _ in range(rng.randint(1, 3)))
    return rng.choice(WORDS)


def one(module, line):
    """-> (exit code, what was wrong or '')."""
    out, err, argv = text_io.StringIO(), text_io.StringIO(), sys.argv
    sys.argv = [module.__name__] + line
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            module.main()
        code = 0
    except SystemExit as e:
        code = e.code or 0
    except BaseException:
        return None, traceback.format_exc()
    finally:
        sys.argv = argv
    said = [x for x in re.split('[\n\r]', err.getvalue()) if x.startswith('error: ')]
    if code == 1 and len(said) == 1 and 'is not finite' in said[0]:      # a learning rate of 1e11 is a valid wish
        return 2, ''
    if code not in (0, 2):
        return code, f'exit code {code}: {err.getvalue()[-500:]}'
    if code == 2 and len(said) != 1:
        return code, f'{len(said)} error lines: {err.getvalue()[-500:]}'
    return code, ''


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--n', type=int, default=500, help='command lines a script')
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--only', choices=SCRIPTS)
    args = p.parse_args()
    import torch
    torch.set_num_threads(1)
    failures, here = 0, os.getcwd()
    with tempfile.TemporaryDirectory() as tmp:
        os.chdir(tmp)                                # what a strange --out makes, it makes here
        names = dict(data=f'{tmp}/data', ckpt=f'{tmp}/run', text=f'{tmp}/text', jsonl=f'{tmp}/jsonl', out=f'{tmp}/out')
        write_corpus(names['data'], 20_000)
        os.makedirs(names['text'])
        os.makedirs(names['jsonl'])
        with open(f'{tmp}/jsonl/0.jsonl', 'w') as f:
            f.writelines(
                json.dumps(
                    dict(
                        text=f'some text {i}, again and again. ' * 9,
                        content=f'x = {i}\n' * 9,
                        meta=dict(redpajama_set_name='RedPajamaBook'),
                    )
                )
                + '\n'
                for i in range(40)
            )
        for i in range(4):
            with open(f'{tmp}/text/{i}.txt', 'w') as f:
                f.write('some text, again and again. ' * 200)
        assert (
            one(
                importlib.import_module('train'),
                (BASE['train'].format(**{**names, 'out': names['ckpt']}) + ' --no-qk_norm').split(),
            )[0]
            == 0
        )
        for name in [args.only] if args.only else SCRIPTS:
            module, rng, codes, began = (
                importlib.import_module(name),
                random.Random(f'{args.seed} {name}'),
                {0: 0, 2: 0},
                time.time(),
            )
            actions = [
                a for a in parser_of(module)._actions if a.dest not in ('help', 'compile')
            ]  # compiling takes minutes
            for i in range(args.n):
                out = f'{tmp}/{name}-{i}'
                line = BASE[name].format(**{**names, 'out': out}).split()
                for a in rng.sample(actions, rng.randint(0, 4)):
                    flag = rng.choice(a.option_strings) if a.option_strings else None
                    # argparse takes --flag=value where the value begins with a dash
                    line += (
                        ([flag] if flag else [])
                        if a.nargs == 0
                        else [f'{flag}={value(rng, a)}' if flag else value(rng, a)]
                    )
                line = [x.format(**{**names, 'out': out}) for x in line]
                if rng.random() < 0.1:
                    line.insert(
                        rng.randint(0, len(line)),
                        rng.choice(('--nonsense', '--le=3', '-x', 'stray', '--seed', '--out')),
                    )
                code, wrong = one(module, line)
                if (
                    not wrong
                    and code == 2
                    and os.path.isdir(out)
                    and [f for f in os.listdir(out) if f.endswith('.tmp')]
                ):
                    wrong = f'half a file is left: {os.listdir(out)}'
                codes[code] = codes.get(code, 0) + 1
                if wrong:
                    failures += 1
                    print(f'\n{name} {" ".join(line)}\n{wrong}', flush=True)
            print(
                f'{name}: {args.n} command lines, {codes[0]} ran, {codes[2]} refused in one line, '
                f'{args.n - codes[0] - codes[2]} failed, {time.time() - began:.0f} s',
                flush=True,
            )
        os.chdir(here)
    sys.exit(failures > 0)


if __name__ == '__main__':
    main()
