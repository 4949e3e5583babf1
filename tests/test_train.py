"""What train.py promises: exact resume after any stop, any number of processes, and one line for each bad input. CPU, fp32, no network."""
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import eval_passkey
import extend
import train
from data import io
from data.passkey import prepare as passkey
from model import ENCODINGS, GPT, GPTConfig

torch.set_num_threads(1)                             # bit for bit needs one number of threads in every process
CPU = '--device cpu --dtype fp32'
SHAPE = '--preset tiny --block_size 64 --n_layer 1 --n_head 2 --n_kv_head 1 --n_embd 32 --n_inner 48'
BATCH = f'--batch_tokens 256 --min_length 16 --micro_batch 2 --eval_tokens 256 --seed 5 --log_every 1 {CPU}'
TINY = f'{SHAPE} {BATCH}'
SCHEDULE = '--steps 40 --decay_steps 40 --warmup 5 --eval_every 10 --optimizer'     # and which

# processes that begin with torch imported: a forkserver forks them in milliseconds, and no thread of ours comes along
spawn = multiprocessing.get_context('forkserver')
spawn.set_forkserver_preload(['train', 'extend', 'eval_passkey', 'torch._dynamo', 'pytest'])


def run(main, *flags):
    """A script in this process, as from the command line; flags are split at spaces. Returns its exit code."""
    argv, handlers = sys.argv, {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    sys.argv = [f'{main.__module__}.py', *' '.join(map(str, flags)).split()]
    try:
        main()
        return 0
    except SystemExit as e:
        return e.code
    finally:
        sys.argv = argv
        for s, handler in handlers.items():
            signal.signal(s, handler)


def at_step(step, act):
    """From now on: act() when the batch of `step` is drawn, which is inside the step before."""
    draw = io.get_batch

    def get_batch(data, bos, rows, T, seed, at, *ranks):
        if at == step:
            act()
        return draw(data, bos, rows, T, seed, at, *ranks)
    io.get_batch = get_batch


def faulty(step, number, **where):
    """What python runs in place of train.py, which sends itself a signal at_step(step) in the process whose environment holds `where`."""
    return ['-c', f'from tests.test_train import *; {where}.items() <= dict(os.environ).items() and at_step({step}, partial(signal.raise_signal, {int(number)})); train.main()']


def child(main, flags, log, env, step, act):
    torch.set_num_threads(1)
    os.environ.update(env)
    with open(log, 'w') as f:
        os.dup2(f.fileno(), 1), os.dup2(f.fileno(), 2)
    at_step(step, act)
    sys.exit(run(main, *flags))


def start(main, *flags, log, world=1, step=None, act=None):
    """
    A script in `world` processes of its own, as torchrun starts them; output to LOG.RANK. The last of them calls act()
    when it draws the batch of `step`.
    """
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        env = dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(s.getsockname()[1]), WORLD_SIZE=str(world))
    ranks = [spawn.Process(target=child, args=(main, flags, f'{log}.{r}', dict(env, RANK=str(r), LOCAL_RANK=str(r)),
                                               step if r == world - 1 else None, act)) for r in range(world)]
    for p in ranks:
        p.start()
    return ranks


def torchrun(*args, **env):
    """Two processes under torchrun, started by a process of its own, to a good end; args: torchrun's flags, the script, its flags. Returns stdout."""
    p = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', *args], capture_output=True, text=True, timeout=300,
                       cwd=os.path.dirname(train.__file__), env={**os.environ, 'OMP_NUM_THREADS': '1', **env})
    assert p.returncode == 0, p.stderr
    return p.stdout


def wait(ranks):
    """The exit codes; nothing outlives the test."""
    for p in ranks:
        p.join(60)
        p.kill()
        p.join()
    return [p.exitcode for p in ranks]


def rows(out):
    """log.jsonl without what time and machine put in it."""
    keys = ('step', 'tokens', 'loss', 'lr', 'grad_norm', 'val_loss')
    with open(f'{out}/log.jsonl') as f:
        return [{k: r[k] for k in keys if k in r} for r in map(json.loads, f)]


def bits(x):
    """Equal only where every bit of a nested value is."""
    if torch.is_tensor(x):
        return str(x.dtype), tuple(x.shape), x.contiguous().numpy().tobytes()
    if isinstance(x, dict):
        return {k: bits(v) for k, v in x.items()}
    return [bits(v) for v in x] if isinstance(x, (list, tuple)) else x


def state(out):
    """All of a run's last checkpoint but the flags that it was started with."""
    ckpt = io.load_checkpoint(str(out))
    return bits({k: v for k, v in ckpt.items() if k != 'args'})


def close(a, b):
    """The weights of two checkpoints."""
    torch.testing.assert_close(*(dict(io.load_checkpoint(str(p))['model']) for p in (a, b)), atol=1e-5, rtol=0)


@pytest.fixture(scope='session')
def corpus(tmp_path_factory):
    """A passkey corpus of some 60k tokens, in which documents of val are long enough for 8 times the training length."""
    out = str(tmp_path_factory.mktemp('corpus'))
    splits = dict(train=passkey.generate(40_000, 0.5, 6, (0, 0)), val=passkey.generate(20_000, 0.5, 6, (0, 1)))
    io.write_data(out, io.get_tokenizer('passkey'), splits, '')
    return out


@pytest.fixture(scope='session')
def other(tmp_path_factory):
    """Data of another vocabulary."""
    out = str(tmp_path_factory.mktemp('other'))
    io.write_data(out, io.get_tokenizer('bytes'), {s: [list(range(200))] for s in ('train', 'val')}, '')
    return out


@pytest.fixture(scope='session')
def trained(corpus, tmp_path_factory):
    """A run that has learned a little."""
    out = str(tmp_path_factory.mktemp('runs') / 'trained')
    assert run(train.main, TINY, '--n_layer 2 --steps 60 --warmup 5 --eval_every 60 --data', corpus, '--out', out) == 0
    return out


@pytest.fixture(scope='session', params=['adamw', 'muon'])
def straight(request, corpus, tmp_path_factory):
    """40 steps without a stop: what every interrupted run must equal."""
    out = str(tmp_path_factory.mktemp('runs') / request.param)
    flags = f'{TINY} {SCHEDULE} {request.param} --data {corpus}'
    assert run(train.main, flags, '--out', out) == 0
    return SimpleNamespace(out=out, flags=flags, state=state(out), rows=rows(out))


# ---------------------------------------------------------------------------------------------------------------------
# stopping and going on

@pytest.mark.parametrize('k', [7, 20])               # between two saves, and at one
def test_resume_is_bit_for_bit(k, straight, tmp_path):
    assert run(train.main, straight.flags, '--steps', k, '--out', tmp_path) == 0
    assert io.load_checkpoint(str(tmp_path))['step'] == k and state(tmp_path) != straight.state
    assert run(train.main, straight.flags, '--resume --out', tmp_path) == 0
    assert state(tmp_path) == straight.state and rows(tmp_path) == straight.rows
    assert [r['step'] for r in straight.rows if 'loss' in r] == list(range(1, 41))
    assert [r['step'] for r in straight.rows if 'val_loss' in r] == [0, 10, 20, 30, 40]
    assert len(straight.state['optimizer']) == (2 if 'muon' in straight.out else 1)


@pytest.mark.parametrize('flags, more', [
    ('--preset small --steps 2', '--steps 3'), ('--block_size 32 --steps 2', '--steps 3'), ('--steps 9', '--steps 20')])
def test_resume_needs_no_flag_that_was_not_given(flags, more, corpus, tmp_path):
    base = f'{TINY} {flags} --data {corpus} --out {tmp_path}'.replace('--min_length 16 ', '')
    assert run(train.main, base) == 0 and run(train.main, base, '--resume', more) == 0
    assert io.load_checkpoint(str(tmp_path))['step'] == int(more.split()[1])


@pytest.mark.parametrize('number, world', [(signal.SIGTERM, 1), (signal.SIGINT, 1), (signal.SIGTERM, 2)])
def test_signal_saves_and_resumes(number, world, straight, tmp_path):
    out, hear = tmp_path / 'run', partial(signal.raise_signal, number)   # in two processes only the second one hears it
    assert wait(start(train.main, straight.flags, '--out', out, log=tmp_path / 'log', world=world, step=13, act=hear)) == [128 + number] * world
    assert io.load_checkpoint(str(out))['step'] == 13 and f'{number.name}: saved at step 13' in (tmp_path / 'log.0').read_text()
    assert run(train.main, straight.flags, '--resume --out', out) == 0
    if world == 1:
        assert state(out) == straight.state and rows(out) == straight.rows
    for a, b in zip(rows(out), straight.rows, strict=True):
        assert a == pytest.approx(b, rel=1e-2)       # begun by two processes, ended by one


def hear_inside(number):
    """From now on: the signal comes with the third loss, which is inside a step of eight micro-batches."""
    real, calls = F.cross_entropy, []

    def cross_entropy(*args, **kw):
        calls.append(0)
        if len(calls) == 3:
            signal.raise_signal(number)
        assert len(calls) < 8, 'the step went on'
        return real(*args, **kw)
    F.cross_entropy = cross_entropy


@pytest.mark.parametrize('world', [1, 2])
def test_a_signal_inside_a_long_step(world, corpus, tmp_path):
    flags = f'{TINY} --steps 6 --warmup 2 --eval_every 6 --min_length 64 --micro_batch 1 --batch_tokens {512 * world} --data {corpus}'
    assert run(train.main, flags, f'--out {tmp_path}/straight') == 0
    act = partial(hear_inside, signal.SIGTERM)       # drawn one step ahead: the losses of step 4 come next
    assert wait(start(train.main, flags, f'--out {tmp_path}/run', log=tmp_path / 'log', world=world, step=4, act=act)) == [143] * world
    assert io.load_checkpoint(f'{tmp_path}/run')['step'] == 4 and 'saved at step 4' in (tmp_path / 'log.0').read_text()
    assert run(train.main, flags, f'--resume --out {tmp_path}/run') == 0
    if world == 1:
        assert state(tmp_path / 'run') == state(tmp_path / 'straight') and rows(tmp_path / 'run') == rows(tmp_path / 'straight')


def test_kill_9_costs_nothing_that_was_saved(corpus, tmp_path):
    flags, out, step = f'{TINY} --steps 200 --warmup 5 --optimizer adamw --data {corpus}', tmp_path / 'killed', -1
    assert run(train.main, flags, '--eval_every 1000 --out', tmp_path / 'straight') == 0
    inode = lambda: {f.name: f.inode() for f in os.scandir(out)}.get('ckpt.pt') if out.exists() else None    # none between two renames
    for delay in (0, 0.003, 0.009, 0.016, 0.031, 0.05):                  # seconds after the first save
        before, end = inode(), time.time() + 60
        ranks = start(train.main, flags, '--resume --eval_every 1 --out', out, log=tmp_path / 'log')
        while inode() in (before, None) and time.time() < end:
            time.sleep(0.001)
        time.sleep(delay)
        ranks[0].kill()
        assert wait(ranks) == [-signal.SIGKILL]
        last, step = step, io.load_checkpoint(str(out))['step']
        assert last < step < 200
    assert run(train.main, flags, '--resume --eval_every 1000 --out', out) == 0
    assert state(out) == state(tmp_path / 'straight')
    losses = [[r for r in rows(o) if 'loss' in r] for o in (out, tmp_path / 'straight')]
    assert losses[0] == losses[1] and len(losses[0]) == 200


def test_torchrun_restarts_what_was_killed(corpus, tmp_path):
    flags = f'{TINY} {SCHEDULE} muon --timeout 20 --resume --data {corpus} --out {tmp_path}'
    assert wait(start(train.main, f'{flags}/straight', log=tmp_path / 'log', world=2)) == [0, 0]
    once = faulty(27, signal.SIGKILL, RANK='1', TORCHELASTIC_RESTART_COUNT='0')
    said = torchrun('--max_restarts=1', '--no_python', sys.executable, *once, *f'{flags}/run'.split())
    assert re.findall('nothing to resume|resuming .* at step .*|done:', said) == ['nothing to resume', f'resuming {tmp_path}/run at step 20', 'done:']
    assert said.count('step 26/') == 2               # made, lost and made again
    assert state(tmp_path / 'run') == state(tmp_path / 'straight') and rows(tmp_path / 'run') == rows(tmp_path / 'straight')


class Killed(BaseException):
    """No `except` of ours catches it, as none sees a kill."""


@pytest.mark.parametrize('straight', ['adamw'], indirect=True)
@pytest.mark.parametrize('point', ['save', 'fsync', 'ckpt.prev.pt', 'ckpt.pt'])
def test_a_stop_at_any_point_of_a_save(point, straight, tmp_path, monkeypatch):
    saves = []

    def dies(name, f):                               # at the third save: half written, not flushed, not renamed
        def call(*args):
            if name == 'save':
                saves.append(args[0]['step'])
            if len(saves) == 3 and (point == name or str(args[-1]).endswith(f'/{point}')):
                if name == 'save':
                    args[1].write(b'PK half of it')
                raise Killed
            return f(*args)
        return call
    with monkeypatch.context() as m, pytest.raises(Killed):
        for module, name in (torch, 'save'), (os, 'fsync'), (os, 'replace'):
            m.setattr(module, name, dies(name, getattr(module, name)))
        run(train.main, straight.flags, '--out', tmp_path)
    assert saves == [0, 10, 20] and io.load_checkpoint(str(tmp_path))['step'] == 10
    assert run(train.main, straight.flags, '--resume --out', tmp_path) == 0
    assert state(tmp_path) == straight.state and rows(tmp_path) == straight.rows


def test_a_log_that_was_cut_or_ran_ahead(corpus, tmp_path):
    flags = f'{TINY} --steps 4 --decay_steps 8 --warmup 2 --eval_every 2 --data {corpus} --resume --out {tmp_path}'
    assert run(train.main, flags) == 0
    with open(tmp_path / 'log.jsonl', 'a') as f:     # what a run wrote after its last save
        f.write('{"step": 5, "tokens": 1280, "loss": 9.0}\n{"step": 6, "tok')
    assert run(train.main, flags, '--steps 8') == 0
    assert [r['step'] for r in rows(tmp_path) if 'loss' in r] == [*range(1, 9)] and all(r.get('loss', 0) < 6 for r in rows(tmp_path))
    assert [r['step'] for r in rows(tmp_path) if 'val_loss' in r] == [0, 2, 4, 6, 8]


def poison(what):
    """From now on every loss, or the slope of every loss, is NaN: the root of zero has no finite slope."""
    real = F.cross_entropy
    bad = dict(loss=lambda y: y * math.nan, infinite=lambda y: y * math.inf, gradient=lambda y: y + (y * 0).sqrt())[what]
    F.cross_entropy = lambda *args, **kw: bad(real(*args, **kw))


@pytest.mark.parametrize('what, world', [('loss', 1), ('infinite', 1), ('gradient', 1), ('loss', 2), ('gradient', 2)])
def test_not_finite_stops_before_the_update(what, world, corpus, tmp_path):
    flags = f'{TINY} --steps 8 --warmup 2 --eval_every 2 --data {corpus} --out {tmp_path}/run'
    assert wait(start(train.main, flags, log=tmp_path / 'log', world=world, step=5, act=partial(poison, what))) == [1] * world
    said = (tmp_path / 'log.0').read_text()
    line, = re.findall('^error: .*', said, re.M)
    assert line.startswith(f'error: step 6: {"gradient" if what == "gradient" else "loss"} is not finite on rank {world - 1} (batch of seed 5, step 5)') and 'Traceback' not in said
    ckpt = io.load_checkpoint(f'{tmp_path}/run')
    assert ckpt['step'] == 4 and all(v.isfinite().all() for v in ckpt['model'].values())
    assert run(train.main, flags, '--resume') == 0 and [r['step'] for r in rows(tmp_path / 'run') if 'loss' in r] == [*range(1, 9)]


# ---------------------------------------------------------------------------------------------------------------------
# one training run, however it is split

def test_two_processes_are_one(corpus, tmp_path):
    flags = f'{TINY} --batch_tokens 512 --steps 6 --warmup 2 --eval_every 3 --optimizer adamw --lr 1e-4 --data {corpus}'
    for name, micro in ('one', 8), ('split', 2):
        assert run(train.main, flags, '--micro_batch', micro, '--out', tmp_path / name) == 0
    said = torchrun('train.py', *f'{flags} --micro_batch 2 --out {tmp_path}/two'.split())
    assert '2 processes x 2 accumulated x 2 rows x 64 tokens' in said and said.count('done:') == 1
    for name in 'split', 'two':
        close(tmp_path / name, tmp_path / 'one')
        for a, b in zip(rows(tmp_path / name), rows(tmp_path / 'one'), strict=True):
            assert a == pytest.approx(b, abs=1e-5)   # a sum in place of a mean would change loss and grad_norm


@pytest.mark.parametrize('pe', ENCODINGS[1:])
def test_two_processes_are_one_for_every_encoding(pe, corpus, tmp_path):
    flags = f'{TINY} --pe {pe} --steps 3 --warmup 1 --eval_every 3 --optimizer adamw --lr 1e-4 --data {corpus}'
    assert run(train.main, flags, f'--out {tmp_path}/one') == 0
    assert wait(start(train.main, flags, f'--out {tmp_path}/two', log=tmp_path / 'log', world=2)) == [0, 0]
    close(tmp_path / 'one', tmp_path / 'two')


@pytest.mark.parametrize('number, rank, timeout', [(signal.SIGSTOP, 1, 3), (signal.SIGKILL, 1, 600), (signal.SIGKILL, 0, 600)])
def test_a_process_that_hangs_or_is_killed_ends_the_job(number, rank, timeout, corpus, tmp_path):
    flags = f'{TINY} --steps 9999 --warmup 2 --eval_every 2 --timeout {timeout} --data {corpus} --out {tmp_path}/run'.split()
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        env = dict(os.environ, MASTER_ADDR='127.0.0.1', MASTER_PORT=str(s.getsockname()[1]), WORLD_SIZE='2', OMP_NUM_THREADS='1')
    ranks = [subprocess.Popen([sys.executable, *faulty(5, number, RANK=str(rank)), *flags], env=dict(env, RANK=str(r), LOCAL_RANK=str(r)), cwd=os.path.dirname(train.__file__),
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for r in (0, 1)]
    try:
        err = ranks[1 - rank].communicate(timeout=60)[1]                 # the other one ends by itself
    finally:
        for p in ranks:
            p.kill()
            p.communicate()
    line, = re.findall('^error: .*', err, re.M)
    assert ranks[1 - rank].returncode == 1 and re.match(f'error: rank {1 - rank} lost another process.*--resume', line) and 'Traceback' not in err
    assert io.load_checkpoint(f'{tmp_path}/run')['step'] == 4


def test_random_data_is_a_benchmark(tmp_path, capsys):
    assert run(train.main, TINY, f'--data random --steps 2 --out {tmp_path}') == 0
    losses = [r['loss'] for r in rows(tmp_path) if 'loss' in r]
    assert all(abs(x - math.log(32000)) < 0.5 for x in losses)
    median, low, high, longest = map(float, re.search('a step: (.*) ms in the median, 5 to 95 %: (.*) to (.*), the longest (.*)', capsys.readouterr().out).groups())
    assert 0 < low <= median <= high <= longest
    assert set(os.listdir(tmp_path)) == {'log.jsonl', '.lock'}           # no gigabytes of nothing
    assert run(train.main, TINY, f'--data random:70000 --steps 1 --out {tmp_path}/large') == 0
    assert [abs(r['val_loss'] - math.log(70000)) < 0.5 for r in rows(tmp_path / 'large') if 'val_loss' in r] == [True, True]
    for wrong in 'random:', 'random:many', 'random:1':
        assert (run(train.main, TINY, f'--data {wrong} --steps 1 --out {tmp_path}/{wrong}') == 0) == (wrong == 'random:')


# ---------------------------------------------------------------------------------------------------------------------
# what is trained, and how

def test_it_learns(tmp_path):
    ids = np.random.default_rng(0).integers(100, size=40)                # chance is log 100 = 4.6
    io.write_data(tmp_path / 'data', io.get_tokenizer('passkey'), {'train': [ids], 'val': [ids]}, '')
    for which in 'adamw', 'muon':
        flags = f'{TINY} --block_size 32 --steps 40 --eval_every 40 --lr 1e-2 --muon_lr 3e-2 --optimizer {which}'
        assert run(train.main, flags, f'--data {tmp_path}/data --out {tmp_path}/{which}') == 0
        before, after = [r['val_loss'] for r in rows(tmp_path / which) if 'val_loss' in r]
        assert before > 4.5 and after < 0.5


def test_a_large_vocabulary_is_padded(tmp_path):
    assert [io.padded(n) for n in (101, 257, 32000, 50257, 100277)] == [101, 257, 32000, 50304, 100288]
    ids = np.random.default_rng(0).integers(5000, size=4000)
    io.write_data(tmp_path / 'data', io.Tokenizer('gpt2', 5000, 0, None, None), {'train': [ids], 'val': [ids]}, '')
    assert run(train.main, TINY, f'--steps 1 --data {tmp_path}/data --out {tmp_path}/run') == 0
    assert io.load_checkpoint(f'{tmp_path}/run')['config']['vocab_size'] == 5056
    assert run(train.main, TINY, f'--steps 2 --resume --data {tmp_path}/data --out {tmp_path}/run') == 0
    assert run(extend.main, f'--ckpt {tmp_path}/run --method none --lengths 16 --eval_tokens 64 --stride 8 --data {tmp_path}/data') == 0
    for name, code in ('p50k_base', 2), ('gpt2', 0):             # 5,010 are padded to the same number: other tokens
        io.write_data(tmp_path / name, io.Tokenizer(name, 5010, 0, None, None), {'train': [ids], 'val': [ids]}, '')
        assert run(train.main, BATCH, f'--init_from {tmp_path}/run --steps 1 --data {tmp_path}/{name} --out {tmp_path}/{name}-run') == code
        assert run(extend.main, f'--ckpt {tmp_path}/run --method none --lengths 16 --eval_tokens 64 --stride 8 --data {tmp_path}/{name} --out {tmp_path}/{name}-run') == code
    io.write_data(tmp_path / 'other', io.Tokenizer('gpt2', 4990, 0, None, None), {'train': [ids % 4990], 'val': [ids % 4990]}, '')
    assert run(extend.main, f'--ckpt {tmp_path}/run --method none --data {tmp_path}/other') == 2


@pytest.mark.parametrize('pe', ENCODINGS)
def test_attention_off_the_fused_kernels_is_said(pe, corpus, tmp_path, capsys):
    assert run(train.main, TINY, f'--pe {pe} --block_size 96 --batch_tokens 384 --steps 1 --data {corpus} --out {tmp_path}') == 0
    said = capsys.readouterr().out
    assert ('no fused kernel' in said) == (pe == 't5') and (f'{pe} adds a bias to every score: ' in said) == (pe in ('t5', 'alibi'))
    assert run(eval_passkey.main, f'--ckpt {tmp_path} --lengths 96 --depths 1 --trials 1 --device cpu --dtype fp32') == 0
    said = capsys.readouterr().out                   # nothing learns there, so the bias has a kernel
    assert 'no fused kernel' not in said and (f'{pe} adds a bias to every score: 0 MB at length 96' in said) == (pe in ('t5', 'alibi'))


def test_row_lengths():
    drawn = [train.row_length(step, SimpleNamespace(length=96, min_length=20, seed=5)) for step in range(300)]
    assert all(drawn.count(T) > 75 for T in (96, 48, 24))                # halved as often as the shortest allows, each as often
    assert drawn == [train.row_length(step, SimpleNamespace(length=96, min_length=20, seed=5)) for step in range(300)]
    assert {train.row_length(step, SimpleNamespace(length=96, min_length=96, seed=5)) for step in range(9)} == {96}


def test_learning_rate(corpus, tmp_path):
    flags = '--steps 12 --decay_steps 9 --warmup 3 --optimizer muon --lr 2e-3 --muon_lr 5e-3'
    assert run(train.main, TINY, flags, f'--data {corpus} --out {tmp_path}') == 0
    # up in three equal steps, half a cosine from 1 to 0.1 over the next six, then flat
    want = [1 / 3, 2 / 3, 1] + [0.55 + 0.45 * math.cos(k / 6 * math.pi) for k in range(6)] + [0.1] * 3
    assert [r['lr'] / 2e-3 for r in rows(tmp_path) if 'loss' in r] == pytest.approx(want)
    groups = [o['param_groups'] for o in io.load_checkpoint(str(tmp_path))['optimizer']]
    assert [g['lr'] for o in groups for g in o] == pytest.approx([2e-4, 2e-4, 5e-4])


@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
@pytest.mark.parametrize('pe', ['nope', 'learned', 't5', 'alibi'])
def test_parameter_groups(optimizer, pe):
    model = GPT(GPTConfig(block_size=8, vocab_size=17, n_layer=2, n_head=2, n_kv_head=1, n_embd=8, n_inner=12, pe=pe))
    name = {id(p): n for n, p in model.named_parameters()}
    opts = train.make_optimizers(model, SimpleNamespace(optimizer=optimizer, weight_decay=0.1, lr=1, muon_lr=1))
    found = sorted((name[id(p)], type(o).__name__, g['weight_decay']) for o in opts for g in o.param_groups for p in g['params'])
    want = [(n, 'Muon' if optimizer == 'muon' and n.endswith('_proj.weight') else 'AdamW', 0.0 if 'norm' in n else 0.1) for n in name.values()]
    assert found == sorted(w for w in want if not w[0].endswith(('scale', 'slope')))     # the temperatures are not for pre-training


def test_checkpoint_form(trained):
    ckpt = torch.load(f'{trained}/ckpt.pt', weights_only=True)
    assert set(ckpt) == {'model', 'config', 'optimizer', 'step', 'tokens', 'seed', 'args', 'fingerprint', 'tokenizer', 'extended'}
    assert ckpt['step'] == 60 and ckpt['tokens'] == 60 * 256 and ckpt['seed'] == 5 and ckpt['tokenizer'] == 'passkey' and ckpt['extended'] is None
    model = GPT(GPTConfig(**ckpt['config']))
    assert list(ckpt['model']) == list(model.state_dict())               # the bare module's names
    assert all((v == k.endswith('scale')).all() for k, v in ckpt['model'].items() if k.endswith(('scale', 'slope')))


@pytest.mark.skipif(not shutil.which('g++'), reason='torch.compile on CPU needs g++')
@pytest.mark.parametrize('dtype, model', [('fp32', '--pe rope --n_layer 2 --optimizer muon --muon_lr 1e-4'), ('bf16', '--pe nope --optimizer adamw')])
def test_two_compiled_processes_are_one_plain(dtype, model, corpus, tmp_path):
    """
    The path of a GPU node, here under gloo: compiled, data-parallel, gradients accumulated, rows of two lengths, bf16. A fused kernel leaves out
    roundings to bf16 that separate kernels make, which moves the weights by up to 4e-4, as far as bf16 itself does; told not to, by 1e-6.
    """
    if dtype == 'bf16' and io.pick_dtype('auto', 'cpu')[0] == 'fp32':
        pytest.skip('this CPU has no bf16 arithmetic')
    flags = f'{TINY} {model} --dtype {dtype} --min_length 32 --batch_tokens 512 --steps 4 --warmup 1 --eval_every 4 --lr 1e-4 --data {corpus} --out {tmp_path}'
    assert run(train.main, f'{flags}/plain --no-compile') == 0
    said = torchrun('train.py', *f'{flags}/compiled --compile'.split(), TORCHINDUCTOR_EMULATE_PRECISION_CASTS='1')
    assert 'compile on' in said and f'cpu x 2, {dtype}' in said and '2 processes x 2 accumulated x 2 rows x 64 tokens; in some steps' in said
    told = dtype == 'fp32' or torch.__version__ >= (2, 13)                # 2.11 does not listen on CPU: there only losses and gradients are compared
    for a, b in zip(rows(tmp_path / 'compiled'), rows(tmp_path / 'plain'), strict=True):
        assert a == pytest.approx(b, rel=1e-4 if told else 2e-3)
    if told:
        close(tmp_path / 'compiled', tmp_path / 'plain')
    assert list(io.load_checkpoint(f'{tmp_path}/compiled')['model']) == list(io.load_checkpoint(f'{tmp_path}/plain')['model'])      # the bare module's names


@pytest.fixture(scope='session')
def rope(corpus, tmp_path_factory):
    out = str(tmp_path_factory.mktemp('runs') / 'rope')
    assert run(train.main, TINY, '--pe rope --steps 2 --data', corpus, '--out', out) == 0
    return out


@pytest.mark.parametrize('pe', ['nope', 'rope'])     # DroPE, and fine-tuning at another length
def test_init_from(pe, rope, corpus, tmp_path, capsys):
    parent, tmp_path = shutil.copytree(rope, tmp_path / 'parent'), tmp_path / 'run'
    flags = f'--init_from {parent} --pe {pe} --batch_tokens 384 --micro_batch 2 --warmup 0 {CPU} --data {corpus} --out {tmp_path}'
    assert run(train.main, flags, '--length 96 --steps 2') == 0 and '2 rows x 96 tokens' in capsys.readouterr().out
    old, first, new = map(io.load_checkpoint, (rope, f'{tmp_path}/ckpt.prev.pt', str(tmp_path)))
    assert first['step'] == 0 and bits(first['model']) == bits(old['model']) != bits(new['model'])
    assert new['config'] == {**old['config'], 'pe': pe} and new['config']['block_size'] == 64
    assert new['args']['length'] == 96 and new['tokens'] == 2 * 384
    shutil.rmtree(parent)                            # nobody needs it any more
    assert run(train.main, flags, '--resume --steps 3') == 0 and io.load_checkpoint(str(tmp_path))['args']['length'] == 96    # the length stays


# ---------------------------------------------------------------------------------------------------------------------
# bad input

def refused(capsys, main, base, case):
    """
    One line `error: ...` on stderr and exit code 2; returns the line. case: '--flag value', whose name the line must
    hold, or '--flag value : words', which it must hold.
    """
    flags, _, words = case.partition(' : ')
    capsys.readouterr()
    code, err = run(main, base, flags), capsys.readouterr().err
    assert code == 2 and err.startswith('error: ') and err.count('\n') == 1, err
    assert all(w in err for w in words.split() or re.findall('--[a-z_]+', flags)[:1]), err
    return err


@pytest.mark.parametrize('case', [
    '--data nowhere : nowhere data.passkey.prepare', '--init_from nowhere : no checkpoint nowhere', '--out {trained} : {trained} --resume',
    '--steps 0', '--steps -3', '--warmup 6 : --warmup 6 5', '--warmup -1', '--seed -1', '--lr 0', '--lr=-1e-3', '--lr nan', '--lr inf',
    '--muon_lr nan', '--grad_clip 0', '--weight_decay -1', '--weight_decay nan', '--eval_every 0', '--log_every 0', '--eval_tokens 0',
    '--decay_steps 0', '--micro_batch 0', '--batch_tokens 250 : 250 64', '--batch_tokens 32 : 32 64', '--batch_tokens 384 --micro_batch 4 : 384 64 4',
    '--length 0', '--length -64', '--length 60000 : train.bin 60,001', '--pe learned --length 128 : learned 64 128', '--min_length 0',
    '--min_length -1', '--length 66 --batch_tokens 264 : --min_length 66', '--n_head 3 : n_embd 32 n_head 3', '--n_kv_head 3 : n_head 2 n_kv_head 3',
    '--pe rope --n_head 32 : rope 1 even', '--n_layer 0 : n_layer',
    '--init_from {trained} --block_size 64 : --block_size --length', '--init_from {trained} --n_layer 3 : blocks.2',
    '--init_from {trained} --pe learned --length 96 : learned 64 96', '--init_from {trained} --data {other} : vocabulary 257 bytes',
    '--device tpu : tpu cuda', '--device cuda : --device no GPU', '--out {corpus}/train.bin/run : --out train.bin'])
def test_bad_input(case, corpus, other, trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    base = f'{BATCH if "--init_from" in case else TINY} --steps 5 --data {corpus} --out {tmp_path}/run'
    refused(capsys, train.main, base, case.format(corpus=corpus, other=other, trained=trained))
    assert not (tmp_path / 'run/ckpt.pt').exists()


@pytest.mark.parametrize('flags', ['--step 5', '--steps five', '--pe alibaba', '--preset huge', '--optimizer sgd', '--dtype fp16', '--data'])
def test_bad_flags(flags, corpus, tmp_path, capsys):
    assert run(train.main, TINY, f'--steps 5 --data {corpus} --out {tmp_path}/run', flags) == 2
    err = capsys.readouterr().err
    assert err.startswith('error: ') and err.count('\n') == 1 and not (tmp_path / 'run').exists()


@pytest.mark.parametrize('straight', ['adamw'], indirect=True)
@pytest.mark.parametrize('case', [
    '--seed 6', '--batch_tokens 512', '--optimizer muon', '--lr 1e-4', '--warmup 4', '--weight_decay 0.2', '--grad_clip 2', '--length 32',
    '--min_length 32', '--pe rope', '--n_layer 2', '--no-qk_norm : qk_norm False', '--data {other}', '--init_from {trained}'])
def test_resume_refuses_what_would_change_the_run(case, straight, other, trained, capsys):
    refused(capsys, train.main, f'{straight.flags} --steps 50 --resume --out {straight.out}', case.format(other=other, trained=trained))
    assert state(straight.out) == straight.state


def test_resume_from_damage_and_from_a_held_folder(trained, corpus, tmp_path, capsys):
    flags = f'{TINY} --n_layer 2 --steps 61 --warmup 5 --data {corpus} --resume --out {tmp_path}'
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    held = io.lock(tmp_path)
    refused(capsys, train.main, flags, f' : another run {tmp_path}')
    held.close()
    whole = (tmp_path / 'ckpt.pt').read_bytes()
    (tmp_path / 'ckpt.pt').write_bytes(whole[:len(whole) // 2])
    refused(capsys, train.main, flags, f' : {tmp_path}/ckpt.pt is not a whole checkpoint {tmp_path}/ckpt.prev.pt')


@pytest.mark.filterwarnings('ignore')                # of torch's own making
@pytest.mark.parametrize('device, need', [('cpu', 'g++'), ('cuda:0', 'gcc')])
def test_compile_needs_a_compiler(device, need, monkeypatch, capsys):
    monkeypatch.setattr(shutil, 'which', lambda name: None)
    for name in 'CC', 'CXX':
        monkeypatch.delenv(name, raising=False)
    env, model = SimpleNamespace(device=device, print=print), torch.nn.Linear(1, 1)
    with pytest.raises(SystemExit):
        io.compiled(model, SimpleNamespace(compile=True), env)
    err = capsys.readouterr().err
    assert err.startswith(f'error: --compile needs {need}') and err.count('\n') == 1
    assert io.compiled(model, SimpleNamespace(compile=None), env) is model is io.compiled(model, SimpleNamespace(compile=False), env)
    assert ('not compiled' in capsys.readouterr().out) == (device != 'cpu')          # it would have been by default
    monkeypatch.setattr(shutil, 'which', lambda name: name)
    assert io.compiled(model, SimpleNamespace(compile=True), env) is not model


def test_bf16_without_the_hardware(corpus, tmp_path, capsys, monkeypatch):
    for name in 'avx512_bf16', 'amx_tile':
        monkeypatch.setattr(torch.cpu, f'_is_{name}_supported', lambda: False, raising=False)
    assert run(train.main, TINY, f'--steps 1 --dtype bf16 --data {corpus} --out {tmp_path}') == 0
    out, err = capsys.readouterr()
    assert err.startswith('warning: --dtype bf16') and err.count('\n') == 1 and 'cpu x 1, fp32' in out
