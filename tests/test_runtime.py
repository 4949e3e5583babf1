"""What data/runtime.py promises: flags in their ranges, a device and a precision with their reasons, one line each."""
import argparse
import math
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import python, refused

from data import runtime
from data.runtime import Env

# ---------------------------------------------------------------------------------------------------------------------
# the command line

TYPES = dict(
    positive_int=(dict(zip(('1', '007', '16'), (1, 7, 16))), ('0', '-1', '1.5', '1e3', '', 'x', 'nan', '0x10')),
    natural=({'0': 0, '3': 3}, ('-1', '1.5', 'x')),
    positive_float=({'1e-3': 1e-3, '2': 2.0}, ('0', '-0.0', '-1', 'nan', 'inf', '', 'x')),
    natural_float=({'0': 0.0, '0.1': 0.1}, ('-1', 'nan', 'inf', 'x')),
    fraction=({'0': 0.0, '1': 1.0, '0.5': 0.5}, ('-0.1', '1.1', 'nan', 'x')),
    int_list=({'64': [64], '256,512': [256, 512]}, ('', '64,', '64,x', '64.5', '0,64', '-5')),
    float_list=({'1,1.5': [1.0, 1.5]}, ('', '1,', 'nan,1', '0')),
)


@pytest.mark.parametrize('name', TYPES)
def test_a_type_takes_what_lies_in_its_range(name):
    for text, value in TYPES[name][0].items():
        assert getattr(runtime, name)(text) == value


@pytest.mark.parametrize('name, text', [(name, text) for name, (_, wrong) in TYPES.items() for text in wrong])
def test_a_type_refuses_what_does_not(name, text):
    with pytest.raises(argparse.ArgumentTypeError):
        getattr(runtime, name)(text)


def parser():
    p = runtime.parser('A script.')
    p.add_argument('--steps', type=runtime.positive_int)
    p.add_argument('--length', type=runtime.positive_int)
    p.add_argument('--out')
    return p


@pytest.mark.parametrize('flags, words', [
    ('--steps 0', ['--steps', "'0'", 'at least 1']), ('--step 5', ['--step']), ('--len 64', ['--len']),
    ('stray', ['stray']), ('--out=--', ['--out', 'needs a value']), ('--steps', ['--steps'])], ids=str)
def test_a_wrong_flag_costs_one_line(flags, words):
    with refused(*words):
        parser().parse_args(flags.split())


def test_help_names_the_default_of_every_flag(capsys):
    p = runtime.parser('what it does')
    p.add_argument('--steps', type=int, default=200)
    p.add_argument('--grid', default=[1, 1.5], help='lambdas to try')
    p.add_argument('--size', nargs='+', default=['tiny', 'small'])
    p.add_argument('--rows', help='default: as trained')
    p.add_argument('--files', default=[], help='none')
    with pytest.raises(SystemExit):
        p.parse_args(['--help'])
    said = capsys.readouterr().out
    assert '(default 200)' in said
    assert 'lambdas to try (default 1,1.5)' in said
    assert '(default tiny small)' in said
    assert 'default: as trained\n' in said
    assert 'none\n' in said


def test_ctrl_c_is_one_line(capsys):
    runtime.explain(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert capsys.readouterr().err == 'interrupted: the files written so far are complete\n'


# ---------------------------------------------------------------------------------------------------------------------
# device, precision, compiler, kernels

def setup(**flags):
    return runtime.setup(SimpleNamespace(**dict(device='cpu', dtype='fp32', seed=0) | flags))


@pytest.mark.parametrize('flags, words', [
    (dict(device='tpu'), ['tpu', 'cuda']), (dict(device='cuda'), ['--device', 'no GPU']), (dict(seed=-1), ['--seed']),
    (dict(seed=2**63), ['--seed'])], ids=str)
def test_a_device_or_seed_that_is_not_there_is_refused(flags, words, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with refused(*words):
        setup(**flags)


@pytest.fixture
def no_bf16(monkeypatch):
    for name in 'avx512_bf16', 'amx_tile':
        monkeypatch.setattr(torch.cpu, f'_is_{name}_supported', lambda: False, raising=False)


@pytest.mark.parametrize('asked', ['auto', 'bf16', 'fp32'])
def test_a_cpu_without_bf16_computes_in_fp32_and_says_so(asked, no_bf16, capsys):
    dtype, reason = runtime.pick_dtype(asked, 'cpu')
    assert dtype == 'fp32'
    assert ('no bf16' in reason) == (asked != 'fp32')
    err = capsys.readouterr().err
    assert err.count('\n') == (asked == 'bf16')
    assert err.startswith('warning: --dtype bf16') == (asked == 'bf16')


@pytest.fixture
def no_compiler(monkeypatch):
    monkeypatch.setattr(shutil, 'which', lambda name: None)
    for name in 'CC', 'CXX':
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize('device, need', [('cpu', 'g++'), ('cuda:0', 'gcc')])
def test_compile_without_a_compiler_is_refused(device, need, no_compiler):
    with refused(f'--compile needs {need}'):
        runtime.compiled(torch.nn.Linear(1, 1), SimpleNamespace(compile=True), Env(device=device))


@pytest.mark.parametrize('device', ['cpu', 'cuda:0'])
def test_without_a_compiler_nothing_is_compiled_by_default(device, no_compiler, capsys):
    model = torch.nn.Linear(1, 1)
    assert runtime.compiled(model, SimpleNamespace(compile=None), Env(device=device)) is model
    assert ('not compiled' in capsys.readouterr().out) == (device != 'cpu')          # it would have been by default
    assert runtime.compiled(model, SimpleNamespace(compile=False), Env(device=device)) is model


@pytest.mark.filterwarnings('ignore')                # of torch's own making
def test_with_a_compiler_the_model_is_compiled(monkeypatch):
    monkeypatch.setattr(shutil, 'which', lambda name: name)
    monkeypatch.setattr(runtime, 'trial_compile', lambda device: None)
    model = torch.nn.Linear(1, 1)
    assert runtime.compiled(model, SimpleNamespace(compile=True), Env()) is not model


@pytest.fixture
def broken_compiler(monkeypatch):
    """It may be there without its headers: what torch raises then is a page long."""
    monkeypatch.setattr(shutil, 'which', lambda name: name)
    monkeypatch.setattr(runtime, 'trial_compile', lambda device: 'no headers')


def test_a_compiler_that_does_not_work_is_refused_in_one_line(broken_compiler):
    with refused('--compile fails on one line of code (no headers)'):
        runtime.compiled(torch.nn.Linear(1, 1), SimpleNamespace(compile=True), Env())


def test_by_default_a_compiler_that_does_not_work_is_left_out(broken_compiler, capsys):
    model = torch.nn.Linear(1, 1)
    assert runtime.compiled(model, SimpleNamespace(compile=None), Env(device='cuda:0')) is model
    assert capsys.readouterr().out == 'not compiled: torch.compile fails on one line of code (no headers)\n'


@pytest.mark.slow
def test_a_compiler_without_headers_is_found_out(tmp_path):
    """With the real torch.compile and a compiler that fails."""
    bad = tmp_path / 'g++'
    bad.write_text('#!/bin/sh\necho "fatal error: Python.h: No such file" >&2\nexit 1\n')
    bad.chmod(0o755)
    code = 'from data import runtime; print(runtime.trial_compile("cpu"))'
    done = python('-c', code, CXX=str(bad), TORCHINDUCTOR_CACHE_DIR=str(tmp_path / 'cache'))
    assert done.returncode == 0, done.stderr
    assert 'compiler' in done.stdout.lower()
    assert done.stdout.count('\n') == 1


def test_windows_is_told_about_wsl(monkeypatch):
    monkeypatch.setattr(sys, 'platform', 'win32')
    with refused('WSL'):
        runtime.parser('')


# ---------------------------------------------------------------------------------------------------------------------
# ranks, the schedule, the end

def test_a_process_alone_needs_no_other():
    env, x = Env(), torch.arange(3.0)
    assert env.master
    assert env.sum(x) is x
    assert env.gather('a') == ['a']
    assert env.broadcast('a') == 'a'
    env.barrier()


def test_the_learning_rate_warms_up_and_decays():
    # up in three equal steps, half a cosine from 1 to 0.1 over the next six, then flat
    want = [1 / 3, 2 / 3, 1] + [0.55 + 0.45 * math.cos(k / 6 * math.pi) for k in range(6)] + [0.1] * 3
    assert [runtime.lr_factor(step, 3, 9) for step in range(12)] == pytest.approx(want)


@pytest.mark.parametrize('error', [
    torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB.\nand more'),
    RuntimeError('[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 2.00 GiB')])
def test_out_of_memory_is_one_line(error, capsys):
    runtime.explain(type(error), error, None)
    said = capsys.readouterr().err
    assert said.count('\n') == 1
    assert 'lower --micro_batch' in said
    assert '2.00 GiB' in said
