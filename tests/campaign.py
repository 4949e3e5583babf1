"""
A campaign of faults behind results/faults.csv: each is tried many times, at random moments, sizes and places, and every
time the promise about it is checked. Nothing may be lost, and the user sees one line that says what to do.

    python -m tests.campaign --csv results/faults.csv      # the whole of it; 12 minutes on 2 cores
    python -m tests.campaign --share 0.02                  # the short form, as make test-all runs it: a fiftieth
    python -m tests.campaign --only kill                   # faults whose name holds the word
"""
import argparse
import contextlib
import io as text_io
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from functools import partial
from pathlib import Path

sys.path[:0] = [os.path.dirname(__file__), os.path.dirname(os.path.dirname(__file__))]
import numpy as np  # noqa: E402
import torch  # noqa: E402
from conftest import (  # noqa: E402
    CPU,
    ROOT,
    TINY,
    bits,
    poison,
    python,
    refused,
    rows,
    run,
    start,
    state,
    steps,
    wait,
    write_corpus,
)
from tqdm import tqdm  # noqa: E402

import eval_passkey  # noqa: E402
import extend  # noqa: E402
import train  # noqa: E402
from data.checkpoint import find_checkpoint, load_checkpoint  # noqa: E402
from data.figures import write_csv  # noqa: E402
from data.text import prepare as text  # noqa: E402
from data.tokenizer import get_tokenizer  # noqa: E402
from data.tokens import documents, open_data, write_data  # noqa: E402

STEPS, FAULTS = 60, {}


def fault(name, tries, *args):
    """A function (case, rng, folder of its own, *args) -> what the user saw, which raises where the promise fails."""
    def note(f):
        FAULTS[name] = tries, partial(f, *args)
        return f
    return note


class Case:
    """What is shared: a corpus, and runs that nobody disturbed, by their flags and the number of processes."""

    def __init__(self, folder):
        self.folder, self.straight, self.seconds = folder, {}, {}
        self.data = f'{folder}/data'
        write_corpus(self.data, 20_000)

    def flags(self, every=4, optimizer='muon', data=None):
        return (
            f'{TINY} --steps {STEPS} --warmup 5 --eval_every {every} --optimizer {optimizer} --data {data or self.data}'
        )

    def run(self, flags, world=1):
        """-> the folder of the undisturbed run; self.seconds[folder] is how long it took."""
        if (flags, world) not in self.straight:
            out = self.straight[flags, world] = f'{self.folder}/straight-{len(self.straight)}'
            self.timed(train, flags, out, world)
        return self.straight[flags, world]

    def timed(self, main, flags, out, world=1):
        if out not in self.seconds:
            began = time.time()
            assert wait(start(main, flags, '--out', out, log=f'{out}.log', world=world)) == [0] * world
            self.seconds[out] = time.time() - began
        return self.seconds[out]


def one_line(log):
    """The only line that begins with error:, and no traceback beside it."""
    said = Path(log).read_text()
    line, = re.findall('^error: .*', said, re.M)
    assert 'Traceback' not in said, said
    return line


def goes_on(case, flags, out, world=1):
    """Resumed to its end, the run is the undisturbed one, bit for bit, its log without a gap or a line twice."""
    assert wait(start(train, flags, '--resume --out', out, log=f'{out}.again', world=world)) == [0] * world, Path(
        f'{out}.again.0'
    ).read_text()
    straight = case.run(flags, world)
    assert state(out) == state(straight)
    assert rows(out) == rows(straight)
    assert not [f for f in os.listdir(out) if f.endswith('.tmp')]


def refuses(script, *flags):
    """A script in this process, that ends with exit code 2 and one line, which is returned."""
    with contextlib.redirect_stdout(text_io.StringIO()), refused() as line:
        run(script, *flags)
    return line[0]


# ---------------------------------------------------------------------------------------------------------------------
# 1. a save is all or nothing; results are kept

@fault('kill -9 while training and saving, 1 process', 160, 1)
@fault('kill -9 of one of 2 processes', 40, 2)
def kill(world, case, rng, out):
    flags = case.flags(every=rng.choice((1, 4)))     # 1: much of the time goes into saves
    seconds = case.seconds[case.run(flags, world)]
    ranks = start(train, flags, '--out', out, log=f'{out}.log', world=world)
    time.sleep(rng.uniform(0.1, 1) * seconds)
    rng.choice(ranks).kill()
    codes = wait(ranks)
    assert all(codes) or load_checkpoint(out)['step'] == STEPS
    if find_checkpoint(out):
        load_checkpoint(out)                      # the last complete one opens
    goes_on(case, flags, out, world)
    return 'goes on with --resume, bit for bit'


@fault('kill -9 while tuning temperatures', 20)
def kill_extend(case, rng, out):
    flags = (f'--ckpt {case.run(case.flags())} --data {case.data} --method head --length 128 --steps 20 --batch 4 '
             f'--grid 1,1.2 --grid_batches 1 --lengths 64,128 --eval_tokens 256 {CPU}')
    seconds = case.timed(extend, flags, f'{case.folder}/extended')
    ranks = start(extend, flags, '--out', out, log=f'{out}.log')
    time.sleep(rng.uniform(0.2, 1) * seconds)
    ranks[0].kill()
    wait(ranks)
    if os.path.exists(f'{out}/head-128.pt'):
        load_checkpoint(f'{out}/head-128.pt')
    assert wait(start(extend, flags, '--out', out, log=f'{out}.log')) == [0]
    for name in ('head-128.ppl.csv', 'head-128.entropy.csv'):
        assert Path(f'{out}/{name}').read_bytes() == Path(f'{case.folder}/extended/{name}').read_bytes()
    assert bits(dict(load_checkpoint(f'{out}/head-128.pt')['model'])) == bits(
        dict(load_checkpoint(f'{case.folder}/extended/head-128.pt')['model'])
    )
    return 'the same command starts again, the same result'


@fault('kill -9 in a passkey grid', 20)
def kill_grid(case, rng, out):
    lengths = ','.join(map(str, range(80, 400, 40)))
    flags = f'--ckpt {case.run(case.flags())} --lengths {lengths} --depths 5 --trials 4 --resume {CPU}'
    file = f'{out}/ckpt.passkey.csv'
    seconds = case.timed(eval_passkey, flags, f'{case.folder}/grid')
    ranks = start(eval_passkey, flags, '--out', out, log=f'{out}.log')
    time.sleep(rng.uniform(0.2, 1) * seconds)
    ranks[0].kill()
    wait(ranks)
    kept = Path(file).read_text() if os.path.exists(file) else ''
    assert wait(start(eval_passkey, flags, '--out', out, log=f'{out}.log')) == [0]
    assert Path(file).read_text() == Path(f'{case.folder}/grid/ckpt.passkey.csv').read_text()
    assert Path(file).read_text().startswith(kept)
    return 'goes on with --resume after the last finished batch'


# ---------------------------------------------------------------------------------------------------------------------
# 2. a damaged checkpoint is never used

def damaged(case, out, change):
    """A run's last checkpoint after change(bytes): refused in one line that offers the one before, or bit-equal."""
    straight = case.run(case.flags())
    shutil.copytree(straight, out)
    good = Path(f'{out}/ckpt.pt').read_bytes()
    Path(f'{out}/ckpt.pt').write_bytes(change(good))
    try:
        with contextlib.redirect_stderr(text_io.StringIO()):
            loaded = load_checkpoint(out)
        if bits(loaded) == bits(load_checkpoint(straight)):
            return 'only padding: what is loaded is bit-equal'
        raise AssertionError('another checkpoint was loaded')
    except SystemExit:
        line = refuses(train, case.flags(), '--resume --out', out)
        assert 'the one before is' in line
        assert f'{out}/ckpt.prev.pt' in line
        load_checkpoint(f'{out}/ckpt.prev.pt')
        return line


@fault('one flipped bit in a checkpoint', 200)
def flip(case, rng, out):
    def change(good):
        at = rng.randrange(len(good))
        return good[:at] + bytes([good[at] ^ 1 << rng.randrange(8)]) + good[at + 1:]
    return damaged(case, out, change)


@fault('a checkpoint cut short', 200)
def cut(case, rng, out):
    return damaged(case, out, lambda good: good[:rng.randrange(len(good))])


@fault('no checkpoint of ours: empty, text, an older form, a pickle that runs code', 20)
def foreign(case, rng, out):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (f'{out}/trapped',)
    what = text_io.BytesIO()
    torch.save(rng.choice(({'model': {}}, {'state_dict': {}, 'iter_num': 3}, Trap(), [1])), what)
    line = damaged(case, out, lambda good: rng.choice((b'', b'some text\n' * 100, what.getvalue())))
    assert not os.path.exists(f'{out}/trapped')
    return line


@fault('the checkpoint of another run', 5)
def another(case, rng, out):
    other = case.flags(optimizer='adamw').replace('--n_embd 32', '--n_embd 64')
    shutil.copytree(case.run(other), out)
    return refuses(train, case.flags(), '--resume --out', out)


# ---------------------------------------------------------------------------------------------------------------------
# 3. the disk

def stopped(flags, rng, out, act, last=STEPS - 1):
    """A run in which act() happens at a random step; it ends with exit code 2 and the one line that is returned."""
    assert wait(start(train, flags, '--out', out, log=f'{out}.log', step=rng.randrange(6, last), act=act)) == [2]
    return one_line(f'{out}.log.0')


def limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


@fault('a full disk in the middle of a run (no file may grow past a random size)', 30)
def full(case, rng, out):
    flags = case.flags()
    size = os.path.getsize(f'{case.run(flags)}/ckpt.pt')
    line = stopped(
        flags, rng, out, partial(limit, rng.randrange(7000, size))
    )  # what it prints, into a file too, is shorter
    load_checkpoint(out)
    goes_on(case, flags, out)
    return line


@fault('a disk with too little room, before the first step', 3)
def little(case, rng, out):
    real, shutil.disk_usage = shutil.disk_usage, lambda path: real(path)._replace(free=rng.randrange(1000))
    try:
        return refuses(train, case.flags(), '--out', out)
    finally:
        shutil.disk_usage = real


def forbid(out):
    os.chmod(out, 0o555)
    if os.geteuid() == 0:                            # whom no mode stops
        os.seteuid(65534)


@fault('the folder becomes read-only', 5)
def read_only(case, rng, out):
    flags = case.flags(every=2)
    case.run(flags)
    os.chmod(case.folder, 0o755)
    line = stopped(flags, rng, out, partial(forbid, out))
    os.chmod(out, 0o755)
    load_checkpoint(out)
    goes_on(case, flags, out)
    return line


@fault('the folder vanishes', 5)
def vanish(case, rng, out):
    return stopped(case.flags(), rng, out, partial(shutil.rmtree, out))


# ---------------------------------------------------------------------------------------------------------------------
# 4. and 5. signals, NaN

@fault('SIGTERM or SIGINT, 1 process', 40, 1)
@fault('SIGTERM or SIGINT to one of 2 processes', 20, 2)
def asked_to_stop(world, case, rng, out):
    flags, number, at = case.flags(), rng.choice((signal.SIGTERM, signal.SIGINT)), rng.randrange(1, STEPS)
    ranks = start(
        train, flags, '--out', out, log=f'{out}.log', world=world, step=at, act=partial(signal.raise_signal, number)
    )
    assert wait(ranks) == [128 + number] * world
    line, = re.findall('.*: saved at step .*', Path(f'{out}.log.0').read_text())
    assert load_checkpoint(out)['step'] == at     # drawn while the step before was made
    goes_on(case, flags, out, world)
    return line


@fault('SIGTERM or SIGINT to the launcher (torchrun, 2 processes)', 6)
def launcher(case, rng, out):
    flags = case.flags()
    with open(f'{out}.log', 'w') as log:
        p = subprocess.Popen(
            [
                sys.executable,
                '-m',
                'torch.distributed.run',
                '--standalone',
                '--nproc_per_node=2',
                'train.py',
                *flags.replace(f'--steps {STEPS}', '--steps 100000 --decay_steps 60').split(),
                '--out',
                out,
            ],
            cwd=ROOT,
            env=dict(os.environ, OMP_NUM_THREADS='1'),
            stdout=log,
            stderr=log,
        )
    while not find_checkpoint(out) and p.poll() is None:
        time.sleep(0.05)
    time.sleep(rng.uniform(0, 1))
    p.send_signal(rng.choice((signal.SIGTERM, signal.SIGINT)))
    assert p.wait(60) != 0
    said = Path(f'{out}.log').read_text()
    line, = re.findall('SIG(?:TERM|INT): saved at step .*', said)
    last = int(line.split()[4].strip(';').replace(',', ''))
    assert load_checkpoint(out)['step'] == last
    assert steps(out) == [*range(1, last + 1)]
    return line


@fault('NaN or Inf in the loss or the gradient on one of 2 processes', 20)
def nan(case, rng, out):
    flags, what, at = case.flags(), rng.choice(('loss', 'infinite', 'gradient')), rng.randrange(5, STEPS)
    assert wait(start(train, flags, '--out', out, log=f'{out}.log', world=2, step=at, act=partial(poison, what))) == [
        1,
        1,
    ]
    line = one_line(f'{out}.log.0')
    found = 'gradient is not finite' if what == 'gradient' else 'loss is not finite on rank 1'
    assert f'step {at + 1}: {found}' in line
    ckpt = load_checkpoint(out)
    assert ckpt['step'] == at // 4 * 4
    assert all(v.isfinite().all() for v in ckpt['model'].values())
    goes_on(case, flags, out, 2)
    return line


# ---------------------------------------------------------------------------------------------------------------------
# 6. data

@fault('data cut short under a running reader', 20)
def shorter(case, rng, out):
    write_corpus(f'{out}.data', 20_000)
    size = os.path.getsize(f'{out}.data/train.bin')
    line = stopped(
        case.flags(data=f'{out}.data'),
        rng,
        out,
        partial(os.truncate, f'{out}.data/train.bin', rng.randrange(size // 4)),
        STEPS - 30,
    )  # and not by SIGBUS
    load_checkpoint(out)
    return line


@fault('other data than the checkpoint saw', 5)
def changed(case, rng, out):
    write_corpus(f'{out}.data', 20_000, rng.randrange(1, 1000))
    shutil.copytree(case.run(case.flags()), out)
    return refuses(train, case.flags(data=f'{out}.data'), '--resume --out', out)


@fault('damaged data: a byte lost, an id outside the vocabulary, another type, no documents, too few tokens', 50)
def bad_data(case, rng, out):
    write_corpus(f'{out}.data', 20_000)
    bin, meta, kind = Path(f'{out}.data/train.bin'), Path(f'{out}.data/meta.json'), rng.randrange(5)
    if kind == 0:
        bin.write_bytes(bin.read_bytes()[:-rng.randrange(1, 100)])
    elif kind == 1:
        ids = np.fromfile(bin, np.uint16)
        ids[rng.randrange(len(ids))] = rng.randrange(68, 2**16)
        ids.tofile(bin)
    elif kind == 2:
        meta.write_text(meta.read_text().replace('uint16', rng.choice(('uint32', 'uint8', 'float', 'words'))))
    elif kind == 3:
        meta.write_text(meta.read_text().replace('"docs"', '"pages"'))
    else:
        write_data(
            f'{out}.data',
            get_tokenizer('passkey'),
            {s: [[5] * rng.randrange(0, 63)] for s in ('train', 'val')},
            source='',
        )
    return refuses(train, case.flags(data=f'{out}.data'), '--out', out)


# ---------------------------------------------------------------------------------------------------------------------
# 7. and 8. two runs in one folder; memory

@fault('a second run in the folder of a living one, and after it was killed', 10)
def two_runs(case, rng, out):
    flags = case.flags()
    ranks = start(
        train,
        flags.replace(f'--steps {STEPS}', f'--steps 100000 --decay_steps {STEPS}'),
        '--out',
        out,
        log=f'{out}.log',
    )
    while not find_checkpoint(out):
        time.sleep(0.01)
    line = refuses(train, flags, '--resume --out', out)
    assert 'another run is writing' in line
    ranks[0].kill()
    wait(ranks)
    if load_checkpoint(out)['step'] <= STEPS:
        goes_on(case, flags, out)                    # a dead one's lock does not block
    return line


@fault('a model, or a length, that does not fit into memory (CPU)', 6)
def memory(case, rng, out):
    if rng.random() < 0.5:
        return refuses(
            train, f'{case.flags()} --micro_batch 100000000 --batch_tokens 6400000000 --min_length 64 --out', out
        )
    return refuses(
        extend,
        f'--ckpt {case.run(case.flags())} --data {case.data} --method head --length 15000 --batch 1000000',
        f'--lengths 64,128 --eval_tokens 256 {CPU} --out',
        out,
    )


# ---------------------------------------------------------------------------------------------------------------------
# 9. and 10. command lines, text

@fault('random command lines', 5000)
def command_lines(case, rng, out):
    raise NotImplementedError                        # tests/fuzz.py does them all at once


@fault('text: empty, one letter, no UTF-8, special tokens, control characters', 50)
def strange_text(case, rng, out):
    os.makedirs(f'{out}.text')
    strange = rng.choice(
        (
            b'',
            b'x',
            b'caf\xe9',
            b'<|endoftext|>' * 5,
            b'\0\1\2',
            '\ufeff\u200b 🙂'.encode(),
            b'<s> </s>\r\n' * 3,
            b'one word ' * 200_000,
        )
    )
    for i, content in enumerate((strange, *[b'Some plain text of a book. ' * rng.randrange(5, 50) for _ in range(5)])):
        Path(f'{out}.text/{i}.txt').write_bytes(content)
    argv = f'{out}.text --out {out} --tokenizer bytes --val 0.3'
    if strange == b'caf\xe9':
        return refuses(text, argv)
    assert wait(start(text, argv, log=f'{out}.log')) == [0], Path(f'{out}.log.0').read_text()
    docs = [bytes(int(i) for i in d[1:]) for s in ('train', 'val') for d in documents(*open_data(out, s), s)]
    assert all(max(d, default=0) < 256 for d in docs)  # no special token inside
    assert sorted(docs) == sorted(
        d for f in os.listdir(f'{out}.text') if (d := Path(f'{out}.text/{f}').read_bytes().decode().encode())
    )
    return 'stays the text that it is'


def tried(f, case, name, n, seed, prefix):
    """-> how many of n tries survived, and a Counter of what was said, without its numbers and folders."""
    survived, seen = 0, Counter()
    for i in tqdm(range(n), desc=name[:50], dynamic_ncols=True):
        rng, out = random.Random(f'{seed} {name} {i}'), f'{prefix}-{i}'
        try:
            said = f(case, rng, out).replace(out, 'OUT').replace(case.folder, 'TMP')
            survived += 1
            seen[re.sub(r'\d[\d,.]*', 'N', said)] += 1
        except (Exception, SystemExit):
            print(f'\n{name}, try {i}:\n{traceback.format_exc()}', flush=True)
        finally:
            folder, _, number = prefix.rpartition('/')
            for path in Path(folder).glob(f'{number}-{i}*'):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    return survived, seen


def fuzzed(n, seed):
    """n random command lines for each of the ten scripts, by tests/fuzz.py -> (tries, survived, Counter)."""
    done = python('-m', 'tests.fuzz', '--n', n, '--seed', seed)
    print(done.stdout, done.stderr[-2000:])
    survived = ran = turned_away = 0
    pattern = r'(\d+) command lines, (\d+) ran, (\d+) refused in one line, (\d+) failed'
    # a script that is killed prints nothing
    for lines, ok, refusals, failed in re.findall(pattern, done.stdout):
        survived += int(lines) - int(failed)
        ran += int(ok)
        turned_away += int(refusals)
    return 10 * n, survived, Counter({f'{ran} ran, {turned_away} refused in one line': 1})


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--csv', help='where the table goes')
    p.add_argument('--share', type=float, default=1.0)
    p.add_argument('--only', default='')
    p.add_argument('--seed', type=int, default=0)
    args = p.parse_args()
    table, failures, began = [], 0, time.time()
    with tempfile.TemporaryDirectory() as tmp:
        case = Case(tmp)
        for name, (tries, f) in FAULTS.items():
            if args.only not in name:
                continue
            n, at = max(1, round(tries * args.share)), time.time()
            if f.func is command_lines:
                n, survived, seen = fuzzed(max(1, n // 10), args.seed)
            else:
                survived, seen = tried(f, case, name, n, args.seed, f'{tmp}/{len(table)}')
            failures += n - survived
            often = ' / '.join(said.strip() for said, _ in seen.most_common(3))
            table.append(dict(fault=name, tries=n, survived=survived, seen=often))
            print(f'{name}: {survived} of {n}, {time.time() - at:.0f} s', flush=True)
            if args.csv:
                write_csv(args.csv, table)
    survived, tries = sum(row['survived'] for row in table), sum(row['tries'] for row in table)
    print(f'{survived} of {tries} survived, {time.time() - began:.0f} s')
    sys.exit(failures > 0)


if __name__ == '__main__':
    main()
