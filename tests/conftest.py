"""
What the tests share: a script run as a user would run it (run, python, torchrun, start), a command that must be refused
in one line (refused), one corpus, one trained checkpoint, one small model. CPU, fp32, one thread, no network.
"""
import csv
import importlib
import json
import math
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO

import pytest
import torch
import torch.nn.functional as F
from tqdm import tqdm

import train
from data.checkpoint import load_checkpoint
from data.passkey import prepare as passkey
from data.tokenizer import get_tokenizer
from data.tokens import get_batch, write_data
from model import GPT, GPTConfig

torch.set_num_threads(1)                             # bit for bit needs one number of threads in every process
ROOT = os.path.dirname(os.path.abspath(train.__file__))
CPU = '--device cpu --dtype fp32'
SHAPE = '--preset tiny --block_size 64 --n_layer 1 --n_head 2 --n_kv_head 1 --n_embd 32 --n_inner 48 --rows anywhere'
BATCH = f'--batch_tokens 256 --min_length 16 --micro_batch 2 --eval_tokens 256 --seed 5 --log_every 1 {CPU}'
TINY = f'{SHAPE} {BATCH}'


def pytest_configure(config):
    config.addinivalue_line('markers', 'slow: takes more than a few seconds; only make test-all runs it')


# ---------------------------------------------------------------------------------------------------------------------
# running a script

def split(flags):
    """'--lr 0.1', Path, ['a name', 'b'] -> the words of a command line: strings are cut at spaces, lists are not."""
    words = []
    for part in flags:
        if isinstance(part, list):
            words += part
        else:
            words += str(part).split()
    return words


def run(script, *flags):
    """A script in this process, as from the command line -> what it printed. Any exit code but 0 raises SystemExit."""
    argv, out = sys.argv, StringIO()
    handlers = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    sys.argv = [script.__name__, *split(flags)]
    try:
        with redirect_stdout(out):
            script.main()
    except SystemExit as end:
        if end.code:
            raise
    finally:
        sys.argv = argv
        for s, handler in handlers.items():
            signal.signal(s, handler)
        print(out.getvalue(), end='')                # pytest shows it where the test fails
    return out.getvalue()


@contextmanager
def refused(*words):
    """
    `with refused('--steps', 'at least 1'):` what stands inside ends with exit code 2 and one line `error: ...`, which
    holds the words. Gives a list that has this line afterwards.
    """
    said, line, code = StringIO(), [], None
    with redirect_stderr(said):
        try:                                         # pytest.raises would keep the script's frames, lock included
            yield line
        except SystemExit as end:
            code = end.code
    line.append(said.getvalue())
    assert code == 2, f'exit code {code}: {line[0]}'
    assert line[0].startswith('error: '), line[0]
    assert line[0].count('\n') == 1, line[0]
    for word in words:
        assert str(word) in line[0], f'{word!r} is not in {line[0]!r}'


def check_refused(script, flags, case):
    """Refused in a line that names the flag of case, '--flag value', or, of '--flag value : words', has the words."""
    more, _, words = case.partition(' : ')
    with refused(*words.split() or re.findall('--[a-z_]+', more)[:1]):
        run(script, flags, more)


def python(*args, **env):
    """`python ARGS` in the project's folder, in a process of its own -> subprocess.CompletedProcess, output as text."""
    command = [sys.executable, *map(str, args)]
    env = {**os.environ, 'OMP_NUM_THREADS': '1', **env}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)


def torchrun(*args, **env):
    """Two processes under torchrun, to a good end; args: torchrun's flags, the script, its flags. Returns stdout."""
    done = python('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', *args, **env)
    assert done.returncode == 0, done.stderr
    return done.stdout


# processes that begin with torch imported: a forkserver forks them in milliseconds, and no thread of ours comes along
spawn = multiprocessing.get_context('forkserver')
spawn.set_forkserver_preload(['train', 'extend', 'eval_passkey', 'torch._dynamo', 'pytest'])


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return str(s.getsockname()[1])


def start(script, *flags, log, world=1, step=None, act=None):
    """
    A script in `world` processes of its own, as torchrun starts them; each prints to LOG.RANK. The last of them calls
    act() when it draws the batch of `step`.
    """
    env = dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=free_port(), WORLD_SIZE=str(world))
    ranks = []
    for rank in range(world):
        own = dict(env, RANK=str(rank), LOCAL_RANK=str(rank))
        when = step if rank == world - 1 else None
        ranks.append(spawn.Process(target=child, args=(script.__name__, split(flags), f'{log}.{rank}', own, when, act)))
    for p in ranks:
        p.start()
    return ranks


def child(script, words, log, env, step, act):
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())                 # its own is a semaphore, which who becomes nobody cannot remove
    os.environ.update(env)
    with open(log, 'w') as f:
        os.dup2(f.fileno(), 1)
        os.dup2(f.fileno(), 2)
    if step is not None:
        at_step(step, act)
    sys.argv = [script, *words]
    importlib.import_module(script).main()


def wait(ranks):
    """The exit codes; nothing outlives the test."""
    for p in ranks:
        p.join(60)
        p.kill()
        p.join()
    return [p.exitcode for p in ranks]


def started(script, *flags, log, **how):
    """start() and wait(): all processes must end well."""
    ranks = start(script, *flags, log=log, **how)
    codes = wait(ranks)
    with open(f'{log}.0') as f:
        assert codes == [0] * len(ranks), f.read()


# ---------------------------------------------------------------------------------------------------------------------
# what happens to a run: for processes of their own, where nothing has to be undone

def at_step(step, act):
    """From now on: act() when the batch of `step` is drawn, which is inside the step before."""
    def draw(data, bos, rows, T, seed, at, *more, **named):
        if at == step:
            act()
        return get_batch(data, bos, rows, T, seed, at, *more, **named)

    for module in list(sys.modules.values()):        # under every name that it was imported by
        if getattr(module, 'get_batch', None) is get_batch and module.__name__ != __name__:
            module.get_batch = draw


def poison(what):
    """From now on every loss, or the slope of every loss, is not finite: the root of zero has no finite slope."""
    real = F.cross_entropy

    def cross_entropy(*args, **kw):
        loss = real(*args, **kw)
        if what == 'gradient':
            return loss + (loss * 0).sqrt()
        return loss * dict(loss=math.nan, infinite=math.inf)[what]

    F.cross_entropy = cross_entropy


# ---------------------------------------------------------------------------------------------------------------------
# looking at what a run has left

def rows(out):
    """log.jsonl without what time and machine put in it."""
    keys = ('step', 'tokens', 'loss', 'lr', 'grad_norm', 'val_loss')
    with open(f'{out}/log.jsonl') as f:
        return [{k: r[k] for k in keys if k in r} for r in map(json.loads, f)]


def steps(out, what='loss'):
    """The steps of which log.jsonl has a loss (or a val_loss), in order."""
    return [r['step'] for r in rows(out) if what in r]


def bits(x):
    """Equal only where every bit of a nested value is."""
    if torch.is_tensor(x):
        return str(x.dtype), tuple(x.shape), x.contiguous().numpy().tobytes()
    if isinstance(x, dict):
        return {k: bits(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [bits(v) for v in x]
    return x


def state(out):
    """All of a run's last checkpoint but the flags that it was started with."""
    ckpt = load_checkpoint(str(out))
    return bits({k: v for k, v in ckpt.items() if k != 'args'})


def table(file):
    """A csv file's columns and rows; numbers as floats."""
    with open(file) as f:
        columns, *lines = csv.reader(f)
    return columns, [[float(x) for x in line] for line in lines]


def weights(path):
    return dict(load_checkpoint(str(path))['model'])


def changed(a, b):
    """Names of the weights in which two checkpoints differ, be it by a bit."""
    old, new = weights(a), weights(b)
    assert list(old) == list(new)
    return {name for name in old if bits(old[name]) != bits(new[name])}


def same_weights(a, b):
    torch.testing.assert_close(weights(a), weights(b), atol=1e-5, rtol=0)


def close(a, b, tol=1e-5):
    torch.testing.assert_close(a.double(), b.double(), atol=tol, rtol=tol)


# ---------------------------------------------------------------------------------------------------------------------
# what the tests begin with

def build(pe='nope', **shape):
    """A small network with gains away from 1, and with attention away from uniform."""
    torch.manual_seed(1)
    shape = dict(block_size=16, vocab_size=50, n_layer=2, n_head=4, n_kv_head=2, n_embd=32, n_inner=48) | shape
    model = GPT(GPTConfig(pe=pe, **shape))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if 'q_proj' in name or 'k_proj' in name:
                p.mul_(1.5)
            elif 'norm' in name:
                p.uniform_(0.5, 1.5)
            elif name == 'pos_bias.weight':
                p.mul_(10)
    return model


def set_heads(model, value, what='scale'):
    """Temperatures of all heads, or their slopes: a number, or (n_layer, n_head)."""
    value = torch.as_tensor(value, dtype=torch.float32).expand(model.config.n_layer, model.config.n_head)
    for block, own in zip(model.blocks, value):
        getattr(block.attn, what).data.copy_(own)


def heads(model, what='scale'):
    """-> (n_layer, n_head)"""
    return torch.stack([getattr(block.attn, what).detach() for block in model.blocks]).cpu()


def write_corpus(out, tokens=40_000, seed=0):
    """A passkey corpus; some documents of val are longer than 8 times the training length of TINY."""
    train_docs = passkey.generate(tokens, 8, (seed, 0), 4096)
    val_docs = passkey.generate(tokens // 2, 8, (seed, 1), 4096)
    write_data(out, get_tokenizer('passkey'), dict(train=train_docs, val=val_docs), source='')
    return out


@pytest.fixture(scope='session')
def corpus(tmp_path_factory):
    return write_corpus(str(tmp_path_factory.mktemp('corpus')))


@pytest.fixture(scope='session')
def other(tmp_path_factory):
    """Data of another vocabulary."""
    out = str(tmp_path_factory.mktemp('other'))
    write_data(out, get_tokenizer('bytes'), {s: [list(range(200))] for s in ('train', 'val')}, source='')
    return out


@pytest.fixture(scope='session')
def trained(corpus, tmp_path_factory):
    """The folder of a run that has learned a little."""
    out = str(tmp_path_factory.mktemp('runs') / 'trained')
    run(train, TINY, '--n_layer 2 --steps 60 --warmup 5 --eval_every 60 --data', corpus, '--out', out)
    return out


@pytest.fixture(scope='session')
def rope(corpus, tmp_path_factory):
    """The same with pe=rope, after two steps."""
    out = str(tmp_path_factory.mktemp('runs') / 'rope')
    run(train, TINY, '--pe rope --steps 2 --data', corpus, '--out', out)
    return out
