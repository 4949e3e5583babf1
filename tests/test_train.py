"""What train.py promises: exact resume after any stop, any number of processes, and one line for each bad input."""
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import (
    BATCH,
    CPU,
    ROOT,
    TINY,
    bits,
    check_refused,
    close,
    free_port,
    poison,
    refused,
    rows,
    run,
    same_weights,
    start,
    started,
    state,
    steps,
    torchrun,
    wait,
)

import eval_passkey
import extend
import train
from data.checkpoint import load_checkpoint, lock
from data.muon import Muon, orthogonal
from data.run import row_length
from data.runtime import pick_dtype
from data.tokenizer import Tokenizer, get_tokenizer
from data.tokens import by_length, documents, get_batch, open_data, row_starts, write_data
from model import ENCODINGS, GPT, GPTConfig

SCHEDULE = '--steps 40 --decay_steps 40 --warmup 5 --eval_every 10 --optimizer'     # and which


def step_of(out):
    return load_checkpoint(str(out))['step']


@pytest.fixture(scope='session', params=['adamw', 'muon'])
def straight(request, corpus, tmp_path_factory):
    """40 steps without a stop: what every interrupted run must equal."""
    out = str(tmp_path_factory.mktemp('runs') / request.param)
    flags = f'{TINY} {SCHEDULE} {request.param} --data {corpus}'
    run(train, flags, '--out', out)
    return SimpleNamespace(out=out, flags=flags, state=state(out), rows=rows(out))


adamw_only = pytest.mark.parametrize('straight', ['adamw'], indirect=True)


# ---------------------------------------------------------------------------------------------------------------------
# stopping and going on

@pytest.mark.parametrize('k', [7, 20])               # between two saves, and at one
def test_resume_is_bit_for_bit(k, straight, tmp_path):
    run(train, straight.flags, '--steps', k, '--out', tmp_path)
    assert step_of(tmp_path) == k
    assert state(tmp_path) != straight.state
    run(train, straight.flags, '--resume --out', tmp_path)
    assert state(tmp_path) == straight.state
    assert rows(tmp_path) == straight.rows


def test_the_log_has_every_step_and_every_validation(straight):
    assert steps(straight.out) == list(range(1, 41))
    assert steps(straight.out, 'val_loss') == [0, 10, 20, 30, 40]


@pytest.mark.parametrize('flags, more', [
    ('--preset small --steps 2', 3), ('--block_size 32 --steps 2', 3), ('--steps 9', 20),
    ('--pe nope,nope --steps 2', 3)])
def test_resume_needs_no_flag_that_was_not_given(flags, more, corpus, tmp_path):
    base = f'{TINY} {flags} --data {corpus} --out {tmp_path}'.replace('--min_length 16 ', '')
    run(train, base)
    run(train, base, '--resume --steps', more)
    assert step_of(tmp_path) == more


@pytest.mark.parametrize('number, world', [(signal.SIGTERM, 1), (signal.SIGINT, 1), (signal.SIGTERM, 2)])
def test_signal_saves_and_resumes(number, world, straight, tmp_path):
    out, log = tmp_path / 'run', tmp_path / 'log'
    hear = partial(signal.raise_signal, number)      # in two processes only the second one hears it
    ranks = start(train, straight.flags, '--out', out, log=log, world=world, step=13, act=hear)
    assert wait(ranks) == [128 + number] * world
    assert step_of(out) == 13
    assert f'{number.name}: saved at step 13' in (tmp_path / 'log.0').read_text()
    run(train, straight.flags, '--resume --out', out)
    if world == 1:
        assert state(out) == straight.state
        assert rows(out) == straight.rows
    for a, b in zip(rows(out), straight.rows, strict=True):
        assert a == pytest.approx(b, rel=1e-2)       # begun by two processes, ended by one


def hear_inside(number, most):
    """From now on: the signal comes with the third loss, inside a step of eight; after `most` more the run is over."""
    real, calls = F.cross_entropy, []

    def cross_entropy(*args, **kw):
        calls.append(0)
        if len(calls) == 3:
            signal.raise_signal(number)
        assert len(calls) <= most, 'the step went on'
        return real(*args, **kw)
    F.cross_entropy = cross_entropy


@pytest.mark.parametrize('world, most, saved', [(1, 3, 4), (2, 8, 5)])
def test_a_signal_inside_a_long_step(world, most, saved, corpus, tmp_path):
    """One process makes the step again after --resume; several finish it."""
    flags = f'{TINY} --steps 6 --warmup 2 --eval_every 6 --min_length 64 --micro_batch 1 --data {corpus}'
    flags += f' --batch_tokens {512 * world}'
    run(train, flags, f'--out {tmp_path}/straight')
    act = partial(hear_inside, signal.SIGTERM, most)         # drawn one step ahead: the losses of step 4 come next
    ranks = start(train, flags, f'--out {tmp_path}/run', log=tmp_path / 'log', world=world, step=4, act=act)
    assert wait(ranks) == [143] * world
    assert step_of(tmp_path / 'run') == saved
    assert f'saved at step {saved}' in (tmp_path / 'log.0').read_text()
    run(train, flags, f'--resume --out {tmp_path}/run')
    if world == 1:
        assert state(tmp_path / 'run') == state(tmp_path / 'straight')
        assert rows(tmp_path / 'run') == rows(tmp_path / 'straight')


def test_a_signal_inside_a_validation(corpus, tmp_path):
    """It is not waited for, and made again after --resume."""
    flags = f'{TINY} --steps 6 --warmup 2 --eval_every 4 --eval_tokens 512 --micro_batch 1 --data {corpus}'
    run(train, flags, f'--out {tmp_path}/straight')
    act = partial(hear_inside, signal.SIGTERM, 3)            # of the eight rows of the validation at step 4
    ranks = start(train, flags, f'--out {tmp_path}/run', log=tmp_path / 'log', step=4, act=act)
    assert wait(ranks) == [143]
    assert step_of(tmp_path / 'run') == 4
    assert 'SIGTERM: saved at step 4' in (tmp_path / 'log.0').read_text()
    run(train, flags, f'--resume --out {tmp_path}/run')
    assert state(tmp_path / 'run') == state(tmp_path / 'straight')
    assert rows(tmp_path / 'run') == rows(tmp_path / 'straight')


def test_the_first_step_shows_its_progress_from_the_start(corpus, tmp_path, capsys):
    """Quick steps after it show none."""
    run(train, f'{TINY} --steps 2 --min_length 64 --micro_batch 1 --data {corpus} --out {tmp_path}')
    err = capsys.readouterr().err
    assert 'validation:   0%' in err
    assert 'step 1:   0%|' in err
    assert '/4 [' in err
    assert 'step 2' not in err
    assert err.endswith('\r')                        # nothing of it is left on the screen


def inode(out):
    """Of ckpt.pt; None where there is none, as between two renames."""
    if out.exists():
        for f in os.scandir(out):
            if f.name == 'ckpt.pt':
                return f.inode()
    return None


def test_kill_9_costs_nothing_that_was_saved(corpus, tmp_path):
    flags, out = f'{TINY} --steps 200 --warmup 5 --optimizer adamw --data {corpus}', tmp_path / 'killed'
    run(train, flags, '--eval_every 1000 --out', tmp_path / 'straight')
    step = -1
    for delay in (0, 0.003, 0.009, 0.016, 0.031, 0.05):                  # seconds after the first save
        before, end = inode(out), time.time() + 60
        ranks = start(train, flags, '--resume --eval_every 1 --out', out, log=tmp_path / 'log')
        while inode(out) in (before, None) and time.time() < end:
            time.sleep(0.001)
        time.sleep(delay)
        ranks[0].kill()
        assert wait(ranks) == [-signal.SIGKILL]
        last, step = step, step_of(out)
        assert last < step < 200
    run(train, flags, '--resume --eval_every 1000 --out', out)
    assert state(out) == state(tmp_path / 'straight')
    losses = [[r for r in rows(o) if 'loss' in r] for o in (out, tmp_path / 'straight')]
    assert losses[0] == losses[1]
    assert steps(out) == list(range(1, 201))


FAULTY = """
import os, signal
from tests.conftest import at_step
import train
if {where}.items() <= dict(os.environ).items():
    at_step({step}, lambda: signal.raise_signal({number}))
train.main()
"""


def faulty(step, number, **where):
    """Arguments of python for a train.py that sends itself a signal at_step(step), if its environment holds `where`."""
    return ['-c', FAULTY.format(where=where, step=step, number=int(number))]


@pytest.mark.slow
def test_torchrun_restarts_what_was_killed(corpus, tmp_path):
    flags = f'{TINY} {SCHEDULE} muon --timeout 20 --resume --data {corpus} --out {tmp_path}'
    started(train, f'{flags}/straight', log=tmp_path / 'log', world=2)
    once = faulty(27, signal.SIGKILL, RANK='1', TORCHELASTIC_RESTART_COUNT='0')
    said = torchrun('--max_restarts=1', '--no_python', sys.executable, *once, *f'{flags}/run'.split())
    found = re.findall('nothing to resume|resuming .* at step .*|done:', said)
    assert found == ['nothing to resume', f'resuming {tmp_path}/run at step 20', 'done:']
    assert said.count('step 26/') == 2               # made, lost and made again
    assert state(tmp_path / 'run') == state(tmp_path / 'straight')
    assert rows(tmp_path / 'run') == rows(tmp_path / 'straight')


class Killed(BaseException):
    """No `except` of ours catches it, as none sees a kill."""


@adamw_only
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
    with monkeypatch.context() as patch, pytest.raises(Killed):
        for module, name in (torch, 'save'), (os, 'fsync'), (os, 'replace'):
            patch.setattr(module, name, dies(name, getattr(module, name)))
        run(train, straight.flags, '--out', tmp_path)
    assert saves == [0, 10, 20]
    assert step_of(tmp_path) == 10
    run(train, straight.flags, '--resume --out', tmp_path)
    assert state(tmp_path) == straight.state
    assert rows(tmp_path) == straight.rows


def test_a_log_that_was_cut_or_ran_ahead(corpus, tmp_path):
    flags = f'{TINY} --steps 4 --decay_steps 8 --warmup 2 --eval_every 2 --data {corpus} --resume --out {tmp_path}'
    run(train, flags)
    with open(tmp_path / 'log.jsonl', 'a') as f:     # what a run wrote after its last save
        f.write('{"step": 5, "tokens": 1280, "loss": 9.0}\n{"step": 6, "tok')
    run(train, flags, '--steps 8')
    assert steps(tmp_path) == list(range(1, 9))
    assert steps(tmp_path, 'val_loss') == [0, 2, 4, 6, 8]
    assert all(r.get('loss', 0) < 6 for r in rows(tmp_path))


@pytest.mark.parametrize('what, world', [
    ('loss', 1), ('infinite', 1), ('gradient', 1), ('loss', 2), ('gradient', 2)])
def test_not_finite_stops_before_the_update(what, world, corpus, tmp_path):
    out, flags = tmp_path / 'run', f'{TINY} --steps 8 --warmup 2 --eval_every 2 --data {corpus} --out {tmp_path}/run'
    ranks = start(train, flags, log=tmp_path / 'log', world=world, step=5, act=partial(poison, what))
    assert wait(ranks) == [1] * world
    said = (tmp_path / 'log.0').read_text()
    line, = re.findall('^error: .*', said, re.M)
    # of a gradient, which the processes share, only the step is known
    found = 'gradient is not finite' if what == 'gradient' else f'loss is not finite on rank {world - 1}'
    assert line.startswith(f'error: step 6: {found} (batch of seed 5, step 5)')
    assert 'Traceback' not in said
    ckpt = load_checkpoint(str(out))
    assert ckpt['step'] == 4
    assert all(v.isfinite().all() for v in ckpt['model'].values())
    run(train, flags, '--resume')
    assert steps(out) == list(range(1, 9))


# ---------------------------------------------------------------------------------------------------------------------
# one training run, however it is split

@pytest.mark.slow
def test_two_processes_are_one(corpus, tmp_path):
    flags = f'{TINY} --batch_tokens 512 --steps 6 --warmup 2 --eval_every 3 --optimizer adamw --lr 1e-4 --data {corpus}'
    for name, micro in ('one', 8), ('split', 2):
        run(train, flags, '--micro_batch', micro, '--out', tmp_path / name)
    said = torchrun('train.py', *f'{flags} --micro_batch 2 --out {tmp_path}/two'.split())
    assert '2 processes x 2 accumulated x 2 rows x 64 tokens' in said
    assert said.count('done:') == 1
    for name in 'split', 'two':
        same_weights(tmp_path / name, tmp_path / 'one')
        for a, b in zip(rows(tmp_path / name), rows(tmp_path / 'one'), strict=True):
            assert a == pytest.approx(b, abs=1e-5)   # a sum in place of a mean would change loss and grad_norm


@pytest.mark.parametrize('pe', ENCODINGS)
def test_two_processes_are_one_for_every_encoding(pe, corpus, tmp_path):
    flags = f'{TINY} --pe {pe} --steps 3 --warmup 1 --eval_every 3 --optimizer adamw --lr 1e-4 --data {corpus}'
    run(train, flags, f'--out {tmp_path}/one')
    started(train, flags, f'--out {tmp_path}/two', log=tmp_path / 'log', world=2)
    same_weights(tmp_path / 'one', tmp_path / 'two')


DIFFERENT_START = """
import os
import train
from data import run
real = train.build_model
def build_model(*args):
    model = real(*args)
    for p in model.parameters():
        p.data.add_(float(os.environ['RANK']))
    return model
train.build_model = build_model
train.main()
"""


@pytest.mark.slow
def test_processes_that_drew_other_weights_train_those_of_the_first(corpus, tmp_path):
    """Nodes with different CPUs may draw different ones."""
    flags = f'{TINY} --steps 2 --warmup 1 --eval_every 2 --optimizer adamw --lr 1e-4 --data {corpus} --out {tmp_path}'
    run(train, f'{flags}/one')
    torchrun('--no_python', sys.executable, '-c', DIFFERENT_START, *f'{flags}/two'.split())
    same_weights(tmp_path / 'one', tmp_path / 'two')
    for a, b in zip(rows(tmp_path / 'one'), rows(tmp_path / 'two'), strict=True):
        assert a == pytest.approx(b, abs=1e-5)       # the second one's loss and validation too


@pytest.mark.slow
@pytest.mark.parametrize('number, rank, timeout', [
    (signal.SIGSTOP, 1, 3), (signal.SIGKILL, 1, 600), (signal.SIGKILL, 0, 600)])
def test_a_process_that_hangs_or_is_killed_ends_the_job(number, rank, timeout, corpus, tmp_path):
    flags = f'{TINY} --steps 9999 --warmup 2 --eval_every 2 --timeout {timeout} --data {corpus} --out {tmp_path}/run'
    env = dict(os.environ, MASTER_ADDR='127.0.0.1', MASTER_PORT=free_port(), WORLD_SIZE='2', OMP_NUM_THREADS='1')
    command = [sys.executable, *faulty(5, number, RANK=str(rank)), *flags.split()]
    ranks = []
    for r in 0, 1:
        own = dict(env, RANK=str(r), LOCAL_RANK=str(r))
        pipe = subprocess.PIPE
        ranks.append(subprocess.Popen(command, env=own, cwd=ROOT, stdout=pipe, stderr=pipe, text=True))
    left = ranks[1 - rank]
    try:
        err = left.communicate(timeout=60)[1]        # the other one ends by itself
    finally:
        for p in ranks:
            p.kill()
            p.communicate()
    line, = re.findall('^error: .*', err, re.M)
    assert left.returncode == 1
    assert re.match(f'error: rank {1 - rank} lost another process.*--resume', line)
    assert 'Traceback' not in err
    assert step_of(tmp_path / 'run') == 4


def test_random_data_is_a_benchmark(tmp_path):
    said = run(train, TINY, f'--data random --steps 2 --out {tmp_path}')
    assert all(abs(r['loss'] - math.log(32000)) < 0.5 for r in rows(tmp_path) if 'loss' in r)
    times = re.search('a step: (.*) ms in the median, 5 to 95 %: (.*) to (.*), the longest (.*)', said).groups()
    median, low, high, longest = map(float, times)
    assert 0 < low <= median <= high <= longest
    assert set(os.listdir(tmp_path)) == {'log.jsonl', '.lock'}           # no gigabytes of nothing


def test_random_data_of_another_vocabulary(tmp_path):
    run(train, TINY, f'--data random:70000 --steps 1 --out {tmp_path}/large')
    losses = [r['val_loss'] for r in rows(tmp_path / 'large') if 'val_loss' in r]
    assert losses == pytest.approx([math.log(70000)] * 2, abs=0.5)


@pytest.mark.parametrize('wrong', ['random:many', 'random:1'])
def test_random_data_without_a_vocabulary_is_refused(wrong, tmp_path):
    with refused('random:50257'):
        run(train, TINY, f'--data {wrong} --steps 1 --out {tmp_path}/run')


# ---------------------------------------------------------------------------------------------------------------------
# what is trained, and how

@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_it_learns(optimizer, tmp_path):
    ids = np.random.default_rng(0).integers(60, size=40)                 # chance is log 68 = 4.2
    write_data(tmp_path / 'data', get_tokenizer('passkey'), {'train': [ids], 'val': [ids]}, '')
    flags = f'{TINY} --block_size 32 --steps 40 --eval_every 40 --lr 1e-2 --muon_lr 3e-2 --optimizer {optimizer}'
    run(train, flags, f'--data {tmp_path}/data --out {tmp_path}/run')
    before, after = [r['val_loss'] for r in rows(tmp_path / 'run') if 'val_loss' in r]
    assert before > 4.1
    assert after < 0.5


def data_of(folder, name, n_vocab):
    """4,000 tokens of a tokenizer of that name and size."""
    ids = np.random.default_rng(0).integers(n_vocab - 10, size=4000)
    write_data(folder, Tokenizer(name, n_vocab, 0, None, None), {'train': [ids], 'val': [ids]}, '')
    return folder


def test_a_large_vocabulary_is_padded(tmp_path):
    flags = f'{TINY} --data {data_of(tmp_path / "data", "gpt2", 5000)} --out {tmp_path}/run'
    run(train, flags, '--steps 1')
    assert load_checkpoint(f'{tmp_path}/run')['config']['vocab_size'] == 5056
    run(train, flags, '--steps 2 --resume')
    # 5,010 tokens are padded to the same number: those of another tokenizer are others all the same
    on = f'{BATCH} --init_from {tmp_path}/run --steps 1'
    run(train, on, f'--data {data_of(tmp_path / "more", "gpt2", 5010)} --out {tmp_path}/more-run')
    with refused('vocabulary'):
        run(train, on, f'--data {data_of(tmp_path / "p50k", "p50k_base", 5010)} --out {tmp_path}/p50k-run')


@pytest.mark.parametrize('pe', ENCODINGS)
def test_attention_off_the_fused_kernels_is_said(pe, corpus, tmp_path):
    said = run(train, TINY, f'--pe {pe} --block_size 96 --batch_tokens 384 --steps 1 --data {corpus} --out {tmp_path}')
    assert ('no fused kernel' in said) == (pe == 't5')
    assert (f'{pe} adds a bias to every score: ' in said) == (pe in ('t5', 'alibi'))
    said = run(eval_passkey, f'--ckpt {tmp_path} --lengths 96 --depths 1 --trials 1 {CPU}')
    assert 'no fused kernel' not in said             # nothing learns there, so the bias has a kernel
    assert (f'{pe} adds a bias to every score: 0 MB at length 96' in said) == (pe in ('t5', 'alibi'))


def row_lengths(min_length, n):
    flags = SimpleNamespace(length=96, min_length=min_length, seed=5)
    return [row_length(step, flags) for step in range(n)]


def test_rows_are_halved_as_often_as_the_shortest_allows_each_as_often():
    drawn = row_lengths(20, 300)
    assert all(drawn.count(T) > 75 for T in (96, 48, 24))
    assert drawn == row_lengths(20, 300)
    assert set(row_lengths(96, 9)) == {96}


def test_learning_rate(corpus, tmp_path):
    flags = '--steps 12 --decay_steps 9 --warmup 3 --optimizer muon --lr 2e-3 --muon_lr 5e-3'
    run(train, TINY, flags, f'--data {corpus} --out {tmp_path}')
    # up in three equal steps, half a cosine from 1 to 0.1 over the next six, then flat
    want = [1 / 3, 2 / 3, 1] + [0.55 + 0.45 * math.cos(k / 6 * math.pi) for k in range(6)] + [0.1] * 3
    assert [r['lr'] / 2e-3 for r in rows(tmp_path) if 'loss' in r] == pytest.approx(want)
    groups = [o['param_groups'] for o in load_checkpoint(str(tmp_path))['optimizer']]
    assert [g['lr'] for o in groups for g in o] == pytest.approx([2e-4, 2e-4, 5e-4])


@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
@pytest.mark.parametrize('pe', ['nope', 'learned', 't5', 'alibi'])
def test_matrices_decay_and_temperatures_are_not_trained(optimizer, pe):
    shape = dict(block_size=8, vocab_size=17, n_layer=2, n_head=2, n_kv_head=1, n_embd=8, n_inner=12)
    model = GPT(GPTConfig(pe=pe, **shape))
    name = {id(p): n for n, p in model.named_parameters()}
    opts = train.make_optimizers(model, SimpleNamespace(optimizer=optimizer, weight_decay=0.1, lr=1, muon_lr=1,
                                                         dtype='fp32'))
    found = {}
    for opt in opts:
        for group in opt.param_groups:
            for p in group['params']:
                found[name[id(p)]] = type(opt).__name__, group['weight_decay']
    assert set(found) == {n for n in name.values() if not n.endswith(('scale', 'slope'))}
    for n, (kind, decay) in found.items():
        assert kind == ('Muon' if optimizer == 'muon' and n.endswith('_proj.weight') else 'AdamW')
        assert decay == (0.0 if 'norm' in n else 0.1)


def test_muon_is_that_of_torch():
    """In bf16 bit for bit; in fp32 as far from it as bf16 rounds, and its update is near an orthogonal matrix."""
    def trained(optimizer, **kwargs):
        torch.manual_seed(0)
        matrices = [nn.Parameter(torch.randn(shape)) for shape in ((16, 16), (16, 48), (48, 16))]
        opt = optimizer(matrices, lr=0.1, weight_decay=0.1, **kwargs)
        for _ in range(4):
            for p in matrices:
                p.grad = torch.randn_like(p)
            opt.step()
        return matrices

    theirs = trained(torch.optim.Muon, adjust_lr_fn='match_rms_adamw')
    for ours, bf16, fp32 in zip(theirs, trained(Muon, dtype=torch.bfloat16), trained(Muon, dtype=torch.float32)):
        assert torch.equal(ours, bf16)
        assert not torch.equal(ours, fp32)
        close(ours, fp32, tol=0.02)                 # of updates that sum to about 0.3
    for shape in (16, 16), (16, 48), (48, 16):
        values = torch.linalg.svdvals(orthogonal(torch.randn(shape), torch.float32))
        assert values.min() > 0.5
        assert values.max() < 1.3


def test_rows_without_bos_stay_so(corpus, tmp_path):
    """A model that was trained on packed chunks as they come is trained on, tuned and measured on such."""
    anywhere = 'rows begin anywhere in the text'
    said = run(train, TINY, f'--rows anywhere --steps 1 --data {corpus} --out {tmp_path}/bos')
    assert f'{anywhere}, behind a BOS' in said
    said = run(train, TINY, f'--rows anywhere --no-bos --steps 1 --data {corpus} --out {tmp_path}/run')
    assert f'{anywhere}, as they come' in said
    assert rows(tmp_path / 'run')[0]['val_loss'] != rows(tmp_path / 'bos')[0]['val_loss']
    on = f'--init_from {tmp_path}/run --rows anywhere --steps 1 --data {corpus} --out {tmp_path}/on'
    said = run(train, BATCH, on)
    assert f'{anywhere}, as they come' in said
    said = run(extend, f'--ckpt {tmp_path}/on --data {corpus} --method uniform --grid 1,1.1 --grid_batches 1 --batch 2 '
                       f'--length 128 --eval_tokens 0 {CPU}')
    assert f'{anywhere}, as they come' in said


def test_checkpoint_form(trained):
    ckpt = torch.load(f'{trained}/ckpt.pt', weights_only=True)
    assert set(ckpt) == {'model', 'config', 'optimizer', 'step', 'tokens', 'seed', 'args', 'fingerprint', 'tokenizer',
                         'tokenizer_fingerprint', 'extended'}
    assert (ckpt['step'], ckpt['tokens'], ckpt['seed']) == (60, 60 * 256, 5)
    assert (ckpt['tokenizer'], ckpt['extended']) == ('passkey', None)
    model = GPT(GPTConfig(**ckpt['config']))
    assert list(ckpt['model']) == list(model.state_dict())               # the bare module's names
    for name, value in ckpt['model'].items():
        if name.endswith(('scale', 'slope')):
            assert (value == name.endswith('scale')).all()


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which('g++'), reason='torch.compile on CPU needs g++')
@pytest.mark.parametrize('dtype, model', [
    ('fp32', '--pe rope --n_layer 2 --optimizer muon --muon_lr 1e-4'), ('bf16', '--pe nope --optimizer adamw')])
def test_two_compiled_processes_are_one_plain(dtype, model, corpus, tmp_path):
    """
    The path of a GPU node, here under gloo: compiled, data-parallel, gradients accumulated, rows of two lengths, bf16.
    A fused kernel leaves out roundings to bf16 that separate kernels make, which moves the weights by up to 4e-4, as
    far as bf16 itself does; told not to, by 1e-6.
    """
    if dtype == 'bf16' and pick_dtype('auto', 'cpu')[0] == 'fp32':
        pytest.skip('this CPU has no bf16 arithmetic')
    flags = (f'{TINY} {model} --dtype {dtype} --min_length 32 --batch_tokens 512 --steps 4 --warmup 1 --eval_every 4 '
             f'--lr 1e-4 --data {corpus} --out {tmp_path}')
    run(train, f'{flags}/plain --no-compile')
    said = torchrun('train.py', *f'{flags}/compiled --compile'.split(), TORCHINDUCTOR_EMULATE_PRECISION_CASTS='1')
    assert 'compile on' in said
    assert f'cpu x 2, {dtype}' in said
    assert '2 processes x 2 accumulated x 2 rows x 64 tokens; in some steps' in said
    # 2.11 does not listen on CPU: there only losses and gradients are compared
    told = dtype == 'fp32' or torch.__version__ >= (2, 13)
    # one rounding to bf16 that falls the other way moves a gradient by 2**-9 of a part: its norm by up to 1.4e-4, seen
    # on an EPYC; the losses and the weights by a tenth of that
    near = 1e-4 if told else 2e-3
    near_norm = 5e-4 if told and dtype == 'bf16' else near
    for a, b in zip(rows(tmp_path / 'compiled'), rows(tmp_path / 'plain'), strict=True):
        assert a.pop('grad_norm', 0) == pytest.approx(b.pop('grad_norm', 0), rel=near_norm)
        assert a == pytest.approx(b, rel=near)
    if told:
        same_weights(tmp_path / 'compiled', tmp_path / 'plain')
    names = [list(load_checkpoint(f'{tmp_path}/{x}')['model']) for x in ('compiled', 'plain')]
    assert names[0] == names[1]                      # the bare module's


@pytest.mark.parametrize('pe', ['nope', 'rope'])     # DroPE, and fine-tuning at another length
def test_init_from(pe, rope, corpus, tmp_path):
    parent, out = shutil.copytree(rope, tmp_path / 'parent'), tmp_path / 'run'
    flags = f'--init_from {parent} --pe {pe} --batch_tokens 384 --micro_batch 2 --warmup 0 {CPU} --data {corpus}'
    said = run(train, flags, f'--out {out} --length 96 --steps 2')
    assert '2 rows x 96 tokens' in said
    old, first, new = map(load_checkpoint, (rope, f'{out}/ckpt.prev.pt', str(out)))
    assert first['step'] == 0
    assert bits(first['model']) == bits(old['model'])
    assert bits(new['model']) != bits(old['model'])
    assert new['config'] == {**old['config'], 'pe': pe}
    assert (new['args']['length'], new['tokens']) == (96, 2 * 384)
    shutil.rmtree(parent)                            # nobody needs it any more
    run(train, flags, f'--out {out} --resume --steps 3')
    assert load_checkpoint(str(out))['args']['length'] == 96             # the length stays


# ---------------------------------------------------------------------------------------------------------------------
# rows that begin with a document

@pytest.fixture
def opened(corpus):
    return open_data(corpus, 'train')


def test_rows_begin_with_the_bos_of_a_document_that_fills_them(opened):
    data, meta = opened
    docs = by_length(data, meta, 'train')
    whole = [np.asarray(d).tolist() for d in documents(data, meta, 'train')]
    x, y = get_batch(data, meta['bos'], 16, 64, 3, 7, docs=docs)
    for row, last in zip(x.tolist(), y[:, -1].tolist()):
        assert row[0] == meta['bos']
        assert any(d[:65] == [*row, last] for d in whole)


def test_every_document_that_is_long_enough_may_begin_a_row(opened):
    data, meta = opened
    long_enough = [500 < len(d) <= 1000 for d in documents(data, meta, 'train')]
    assert len(row_starts(data, 500, by_length(data, meta, 'train'))) == sum(long_enough)


@pytest.mark.parametrize('world', [2, 4])
def test_any_number_of_processes_shares_the_same_documents(world, opened):
    data, meta = opened
    docs = by_length(data, meta, 'train')
    whole = get_batch(data, meta['bos'], 8, 64, 3, 7, docs=docs)
    parts = [get_batch(data, meta['bos'], 8, 64, 3, 7, rank, world, docs) for rank in range(world)]
    for a, b in zip(whole, zip(*parts)):
        assert torch.equal(a, torch.cat(b))


def test_resume_with_rows_of_documents_is_bit_for_bit(corpus, tmp_path):
    tiny = TINY.replace('--rows anywhere', '')
    flags = f'{tiny} --rows documents --warmup 2 --decay_steps 8 --data {corpus}'
    said = run(train, flags, f'--steps 8 --out {tmp_path}/straight')
    assert re.search(r'rows begin with one of the [\d,]+ documents .*--rows documents, as asked', said)
    run(train, flags, f'--steps 5 --out {tmp_path}/run')
    said = run(train, flags.replace('--rows documents', ''), f'--steps 8 --resume --out {tmp_path}/run')
    assert 'as this run began' in said
    assert state(tmp_path / 'run') == state(tmp_path / 'straight')


def test_documents_that_are_too_short_for_a_row_are_refused(tmp_path):
    write_data(tmp_path / 'data', get_tokenizer('bytes'), {s: [list(range(60))] * 9 for s in ('train', 'val')}, '')
    with refused('--rows documents', '61 tokens', '65', '--rows anywhere'):
        run(train, f'{TINY} --rows documents --steps 1 --data {tmp_path}/data --out {tmp_path}/run')


# ---------------------------------------------------------------------------------------------------------------------
# the precision that --dtype auto chooses

@pytest.mark.parametrize('chosen', ['fp32', 'bf16'])
def test_resume_stays_with_the_precision_that_auto_chose(chosen, corpus, tmp_path, monkeypatch):
    def choose(asked, device):
        if asked == 'auto':
            return chosen, 'chosen here'
        return asked, 'as asked'
    monkeypatch.setattr('data.runtime.pick_dtype', choose)
    monkeypatch.setattr('data.runtime.time_block', lambda *_: (2.0, 1.0))        # bf16 is faster, if there is one
    flags = f'{TINY} --dtype auto --warmup 1 --decay_steps 4 --data {corpus} --out {tmp_path}'
    assert f'cpu x 1, {chosen} (' in run(train, flags, '--steps 2')
    assert load_checkpoint(str(tmp_path))['args']['dtype'] == chosen
    monkeypatch.setattr('data.runtime.time_block', lambda *_: pytest.fail('it was chosen already'))
    assert f'cpu x 1, {chosen} (as this run began)' in run(train, flags, '--steps 4 --resume')


# ---------------------------------------------------------------------------------------------------------------------
# bad input

CASES = """
--data nowhere : nowhere data.passkey.prepare
--init_from nowhere : no checkpoint nowhere
--out {trained} : {trained} --resume
--steps 0
--steps -3
--warmup 6 : --warmup 6 5
--warmup -1
--seed -1
--lr 0
--lr=-1e-3
--lr nan
--lr inf
--muon_lr nan
--grad_clip 0
--weight_decay -1
--weight_decay nan
--eval_every 0
--log_every 0
--eval_tokens 0
--decay_steps 0
--timeout 0
--micro_batch 0
--batch_tokens 250 : 250 64
--batch_tokens 32 : 32 64
--batch_tokens 384 --micro_batch 4 : 384 64 4
--length 0
--length -64
--length 60000 : train.bin 60,001
--pe learned --length 128 : learned 64 128
--min_length 0
--min_length -1
--length 66 --batch_tokens 264 : --min_length 66
--n_head 3 : n_embd 32 n_head 3
--n_kv_head 3 : n_head 2 n_kv_head 3
--pe rope --n_head 32 : rope 1 even
--n_layer 0 : n_layer
--init_from {trained} --block_size 64 : --block_size --length
--init_from {trained} --n_layer 3 : blocks.2
--init_from {trained} --pe learned --length 96 : learned 64 96
--init_from {trained} --data {other} : vocabulary 257 bytes
--device tpu : tpu cuda
--device cuda : --device no GPU
--out {corpus}/train.bin/run : --out train.bin
"""


@pytest.mark.parametrize('case', CASES.strip().splitlines())
def test_bad_input(case, corpus, other, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    base = f'{BATCH if "--init_from" in case else TINY} --steps 5 --data {corpus} --out {tmp_path}/run'
    check_refused(train, base, case.format(corpus=corpus, other=other, trained=trained))
    assert not (tmp_path / 'run/ckpt.pt').exists()


@pytest.mark.parametrize('flags', [
    '--step 5', '--steps five', '--pe alibaba', '--qk_norm half', '--preset huge', '--optimizer sgd', '--dtype fp16',
    '--data'])
def test_bad_flags(flags, corpus, tmp_path):
    with refused(flags.split()[0]):
        run(train, TINY, f'--steps 5 --data {corpus} --out {tmp_path}/run', flags)
    assert not (tmp_path / 'run').exists()


@adamw_only
@pytest.mark.parametrize('case', [
    '--seed 6', '--batch_tokens 512', '--optimizer muon', '--lr 1e-4', '--warmup 4', '--weight_decay 0.2',
    '--grad_clip 2', '--length 32', '--min_length 32', '--pe rope', '--n_layer 2', '--rows documents',
    '--no-bos : bos False',
    '--no-qk_norm : qk_norm False', '--data {other}', '--init_from {trained}'])
def test_resume_refuses_what_would_change_the_run(case, straight, other, trained):
    base = f'{straight.flags} --steps 50 --resume --out {straight.out}'
    check_refused(train, base, case.format(other=other, trained=trained))
    assert state(straight.out) == straight.state


@pytest.fixture
def copied(trained, corpus, tmp_path):
    """-> flags that go on with a copy of `trained`, which is in tmp_path."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    return f'{TINY} --n_layer 2 --steps 61 --warmup 5 --data {corpus} --resume --out {tmp_path}'


def test_a_folder_that_another_run_holds_is_refused(copied, tmp_path):
    held = lock(tmp_path)
    with refused('another run', tmp_path):
        run(train, copied)
    held.close()


def test_a_damaged_checkpoint_is_not_resumed(copied, tmp_path):
    whole = (tmp_path / 'ckpt.pt').read_bytes()
    (tmp_path / 'ckpt.pt').write_bytes(whole[:len(whole) // 2])
    with refused(f'{tmp_path}/ckpt.pt', 'is not a whole checkpoint', f'{tmp_path}/ckpt.prev.pt'):
        run(train, copied)


def test_bf16_without_the_hardware(corpus, tmp_path, capsys, monkeypatch):
    for name in 'avx512_bf16', 'amx_tile':
        monkeypatch.setattr(torch.cpu, f'_is_{name}_supported', lambda: False, raising=False)
    said = run(train, TINY, f'--steps 1 --dtype bf16 --data {corpus} --out {tmp_path}')
    assert 'cpu x 1, fp32' in said
    assert capsys.readouterr().err.startswith('warning: --dtype bf16')
