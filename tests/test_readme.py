"""The main job at toy size, as make reproduce runs it, and every command of README and of the scripts' docstrings."""
import contextlib
import functools
import glob
import importlib
import math
import os
import queue
import re
import shlex
import subprocess
import sys
import time
import types

import numpy as np
import pytest
import torch

import train
from data import io
from results import bench, compare, reproduce
from test_train import run as in_process

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def commands():
    """Every line of README, and of the scripts' docstrings, that starts one of our scripts: (file, script, flags)."""
    for file in ('README.md', 'train.py', 'extend.py', 'eval_passkey.py', *sorted(glob.glob('data/*/*.py', root_dir=ROOT)), 'results/reproduce.py', 'results/compare.py', 'results/bench.py'):
        text = open(os.path.join(ROOT, file)).read()
        if '"""' not in text and not file.endswith('.md'):        # an empty __init__.py
            continue
        text = text if file.endswith('.md') else text.split('"""')[1]
        for line in text.splitlines():
            found = re.search(r'(?:python|torchrun(?: --\S+)*) (-m data\.\S+|-m results\.\S+|\w+\.py) ([^#`]*)', line.replace(' ...', ''))
            if found:
                yield file, found[1], found[2].partition('; done')[0].strip()


@pytest.mark.parametrize('file, script, flags', list(commands()))
def test_documented_command_is_accepted(file, script, flags, monkeypatch, tmp_path):
    if script.endswith('harness'):
        pytest.importorskip('lm_eval')
    module = importlib.import_module(script.removeprefix('-m ').removesuffix('.py'))

    class Accepted(Exception):
        pass

    def accept(*_, **__):
        raise Accepted
    monkeypatch.chdir(tmp_path)                      # a sweep goes on where it was, so it must find nothing
    # the first thing that each script does with flags that it has accepted
    monkeypatch.setattr(io, 'setup', accept)
    monkeypatch.setattr(io, 'write_data', accept)
    monkeypatch.setattr(io, 'pyplot', lambda _: None)    # matplotlib is optional
    monkeypatch.setattr(io, 'load_checkpoint', lambda _: dict(args=dict(preset='tiny')))      # of --init_from
    monkeypatch.setattr(io, 'find_checkpoint', lambda _: 'ckpt.pt')
    if script.endswith('convert') and not flags.startswith('out/'):      # told by its config.json from a checkpoint of ours
        os.makedirs(flags.split()[0])
        open(flags.split()[0] + '/config.json', 'w').close()
    if script.endswith('harness'):                   # lm_eval's own command line
        monkeypatch.setattr('lm_eval._cli.run.Run._execute', accept)
    for name in ('get_tokenizer', 'run', 'prepare', 'read', 'write', 'speed', 'costs', 'passkey', 'trials'):
        monkeypatch.setattr(module, name, accept, raising=False)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 8)
    monkeypatch.setattr(sys, 'argv', [script] + shlex.split(flags))
    with pytest.raises(Accepted):
        module.main()


def test_there_are_commands():
    assert len(list(commands())) > 20


def test_a_seventh_encoding(tmp_path, capsys):
    """README's diff, applied to model.py: the new encoding trains."""
    code = open(os.path.join(ROOT, 'model.py')).read()
    diff = re.search(r'```diff\n(.*?)```', open(os.path.join(ROOT, 'README.md')).read(), re.S)[1]
    for hunk in re.split(r'^@@.*\n', diff, flags=re.M)[1:]:
        lines = hunk.splitlines(True)
        old, new = (''.join(line[1:] for line in lines if line[0] in ' ' + sign) for sign in '-+')
        assert code.count(old) == 1, old
        code = code.replace(old, new)
    module = types.ModuleType('seventh')
    sys.modules['seventh'] = module                  # dataclass looks itself up
    exec(compile(code, 'seventh', 'exec'), module.__dict__)
    c = dict(vocab_size=50, block_size=16, n_layer=2, n_head=4, n_kv_head=2, n_embd=32, n_inner=48)
    torch.manual_seed(0)
    model = module.GPT(module.GPTConfig(pe='rope-learned', **c))
    before, idx = model.inv_freq.detach().clone(), torch.randint(50, (2, 17))
    opt = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0)
    model(idx[:, :-1], idx[:, 1:])[1].backward()
    opt.step()
    assert (model.inv_freq != before).any() and 'inv_freq' in model.state_dict()
    assert not any(k == 'inv_freq' for k in module.GPT(module.GPTConfig(pe='rope', **c)).state_dict())


def test_reproduce_toy(tmp_path):
    command = [sys.executable, '-m', 'results.reproduce', '--scale', 'toy', '--out', str(tmp_path)]
    first = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert first.returncode == 0, first.stdout[-2000:] + first.stderr[-2000:]
    for row in ('| NoPE |', '| NoPE uniform |', '| NoPE head |', '| RoPE |'):
        assert first.stdout.count(row) == (3 if 'uniform' in row or 'head' in row else 2)         # loss, passkey, and what it cost to tune
    assert first.stdout[first.stdout.rindex('rows measured'):].count('| = training length 128') == 4      # the heat maps, at the end
    rows = io_rows(f'{tmp_path}/toy/table.csv')
    assert len(rows) == 4 * 3 and all(0 <= float(r['passkey']) <= 1 and 3 < float(r['loss']) < 6 for r in rows)
    assert {r['row']: int(r['tokens']) for r in rows} == {'NoPE': 0, 'NoPE uniform': 2 * 2 * 256, 'NoPE head': (2 + 2) * 2 * 256, 'RoPE': 0}
    # once more: nothing is left to do, and the table is the same
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0 and 'extend.py' not in again.stdout and io_rows(f'{tmp_path}/toy/table.csv') == rows
    assert last_table(again.stdout) == last_table(first.stdout)
    # a row that other flags made is made again, alone
    file = f'{tmp_path}/toy/table.csv'
    text = open(file).read()
    lines = [line.replace('--grid 1,1.2', '--grid 1,1.3') if ',NoPE uniform,' in line else line for line in text.splitlines(True)]
    open(file, 'w').writelines(lines)
    assert open(file).read() != text
    third = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert third.returncode == 0 and third.stdout.count('$ python extend.py') == 2 and '3 of 4 rows are in' in third.stdout
    assert {r['flags'] for r in io_rows(file)} == {r['flags'] for r in rows}
    # models of one precision do not end in the table of another
    precision = io.pick_dtype('auto', 'cuda' if torch.cuda.is_available() else 'cpu')[0]
    assert all(f'--pe {r["flags"].split()[3]} --dtype {precision}' in r['flags'] and '| --lengths 128,192,256 --dtype fp32' in r['flags'] for r in rows)
    if precision == 'bf16':
        other = subprocess.run(command + ['--dtype', 'fp32'], cwd=ROOT, capture_output=True, text=True)
        assert other.returncode == 2 and other.stderr.startswith('error:') and other.stderr.endswith('was trained with --dtype bf16, this table takes fp32: move that folder away, or give another --out\n')


def test_reproduce_on_real_text(tmp_path, monkeypatch, capsys):
    """SCALE=small at rehearsal size: NoPE, RoPE and DroPE on text files, extended and measured; and what SCALE=paper would start."""
    for i in range(4):
        (tmp_path / f'text {i}.txt').write_text('\n'.join(f'Chapter {j}. It was a quiet year, and nothing came of it.' for j in range(i, 300)))
    commands = []

    def script(name, flags, threads=None, log=None, processes=1):
        commands.append((name, flags, processes))
        module = importlib.import_module(name.removeprefix('-m ').removesuffix('.py'))
        monkeypatch.setattr(sys, 'argv', [name, *shlex.split(flags)])
        with contextlib.suppress(SystemExit):
            module.main()
    monkeypatch.setattr(os, 'cpu_count', lambda: 1)  # one row at a time: this process has one sys.argv
    monkeypatch.setattr(reproduce, 'run', script)
    assert in_process(reproduce.main, f'--scale small_toy --text {tmp_path} --tokenizer bytes --out {tmp_path}/out') == 0
    said = capsys.readouterr().out
    assert all(said.count(f'| {r.name} |') == 2 + (r.method in ('uniform', 'head', 'head-log')) for r in reproduce.REAL) and {p for _, _, p in commands} == {1}
    drope = io.load_checkpoint(f'{tmp_path}/out/small_toy/drope-1')
    assert drope['config']['pe'] == 'nope' and drope['step'] == 2 and drope['args']['init_from'].endswith('rope-1')
    commands.clear()
    monkeypatch.undo()
    monkeypatch.setattr(reproduce, 'run', lambda script, flags, threads=None, log=None, processes=1: commands.append((script, flags, processes)))
    assert in_process(reproduce.main, f'--scale paper --out {tmp_path}/paper') == 2
    out, err = capsys.readouterr()
    assert 'takes 8 GPU' in err and '57 hours' in out and out.count('--nproc_per_node=8 train.py --preset tinyllama') == 2 and out.count('extend.py') == 4
    step = types.SimpleNamespace(**train.RECIPES['tinyllama'])
    assert f'{100 * train.lr_factor(step.steps, step):.1f} % of that' in out
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 8)
    monkeypatch.setattr(io, 'open_data', lambda *_: ((), {}))
    monkeypatch.setattr(io, 'documents', lambda *_: [range(10**6)])
    monkeypatch.setattr(io, 'load_checkpoint', lambda *_: dict(extended=dict(tokens=0, seconds=0)))
    with pytest.raises(TypeError):                   # nothing ran, so there is no result to read
        in_process(reproduce.main, f'--scale paper --out {tmp_path}/paper')
    assert [(c[0], c[-1]) for c in commands] == [('-m data.slimpajama_starcoder.prepare', 1), ('-m data.pg19.prepare', 1)] + [(s, 8) for s in ('train.py', 'train.py', 'extend.py', 'extend.py', 'eval_passkey.py')]
    assert '--preset tinyllama --pe nope --steps 50000' in commands[2][1] and '--method head' in commands[4][1] and '--protocol paper' in commands[5][1]      # what takes longest first


@pytest.mark.parametrize('what', ['train', 'tune', 'tune_checkpointing', 'perplexity', 'passkey', 'entropy'])
def test_what_a_step_costs(what):
    answer = queue.Queue()
    bench.once(what, 96, dict(vocab_size=101, block_size=64, n_layer=1, n_head=4, n_kv_head=2, n_embd=32, n_inner=32), 'fp32', answer)
    seconds, mb = answer.get()
    assert 0 < seconds < 10 and 0 <= mb < 1000


def test_arithmetic_beside_what_it_costs():
    """The counted arithmetic is that of one layer written out, and the csv's exponents are its slopes."""
    C, inner, T = 8, 24, 100
    shape = dict(vocab_size=101, n_layer=1, n_head=2, n_kv_head=2, n_embd=C, n_inner=inner)
    params = 4 * C * C + 3 * C * inner + 101 * C + 3 * C + 2 * 2         # and norms, and temperatures and slopes
    assert bench.expected('train', T, shape) == (T * (6 * params + 12 * C * T), params)
    assert bench.expected('entropy', T, shape) == (T * (6 * params + 18 * C * T), params)
    rows = {(r['what'], int(r['length']), int(r['width'])): r for r in io_rows('results/costs.csv')}
    for (what, n, width), r in rows.items():
        if r['grows_by'] == 'length' and n > 1024:
            more, less = (bench.expected(what, m, dict(vocab_size=101, n_layer=4, n_head=4, n_kv_head=4, n_embd=width, n_inner=width))[0] for m in (n, n // 2 if n == 32768 else n // 4))
            assert abs(float(r['arithmetic_exponent']) - math.log(more / less) / math.log(2 if n == 32768 else 4)) < 0.006


def test_perplexity_beside_bare_forward_passes(tmp_path, monkeypatch):
    monkeypatch.setattr(io, 'write_csv', lambda file, rows: None)
    row, = bench.perplexity(types.SimpleNamespace(device='cpu', preset=None, lengths=[32], rounds=1))
    assert row['windows'] * row['stride'] == 2**15 and 0.1 < float(row['times']) < 10


@pytest.mark.parametrize('size', ['tiny', 'tinyllama'])
def test_what_is_raced(size, tmp_path, monkeypatch):
    """train.py takes the flags of each of our entries, and the preset is raced as it is."""
    ours = {name: c for name, (c, _) in bench.contenders(types.SimpleNamespace(nanogpt='nanoGPT', steps=4, device='cpu'), str(tmp_path), size).items() if f'{tmp_path}/ours' in c}
    for name, command in ours.items():
        monkeypatch.setattr(sys, 'argv', command.split()[1:])
        args = train.get_args()
        assert args.steps == 4 and args.dtype == ('fp32' if 'fp32' in name else 'bf16') and args.preset == size and (args.n_embd is None) == ('preset' in name)
    assert len(ours) == (6 if size == 'tiny' else 5)


def test_the_table_of_encodings(tmp_path, monkeypatch, capsys):
    """One row of each kind, in this process: an encoding, a table that ends, each length its own NTK, a search, training on, DroPE."""
    def script(name, flags, *_, **__):
        module = importlib.import_module(name.removeprefix('-m ').removesuffix('.py'))
        assert in_process(module.main, flags) == 0, (name, flags)

    names = ('NoPE head-log', 'learned', 'ALiBi', 'RoPE dynamic NTK', 'RoPE LongRoPE', 'RoPE PI, trained on', 'DroPE uniform')
    monkeypatch.setattr(os, 'cpu_count', lambda: 1)  # one row at a time: this process has one sys.argv
    monkeypatch.setattr(reproduce, 'run', script)
    kept = [r._replace(extra='--population 4 --iterations 1') if r.method == 'longrope' else r for r in reproduce.EXTENSIONS if r.name in names]
    monkeypatch.setitem(reproduce.TABLES, 'encodings', kept)
    flags = f'--scale toy --table encodings --out {tmp_path} --csv {tmp_path}/rows.csv'
    assert in_process(reproduce.main, flags) == 0
    rows = io_rows(f'{tmp_path}/rows.csv')
    lengths = [128, 192, 256, 2048]
    assert [(r['row'], int(r['length'])) for r in rows] == [(r.name, n) for r in kept for n in (lengths[:1] if r.run == 'learned' else lengths)]
    assert all(3 < float(r['loss']) < 6 and r['prompts'] == '2' for r in rows)
    shown = last_table(capsys.readouterr().out)
    assert '16x |' in shown and all(f'\n| {n} |' in shown for n in names)
    dynamic = {r['length']: r['loss'] for r in rows if r['row'] == 'RoPE dynamic NTK'}
    for n in 192, 2048:                              # the static one of that length, on the same tokens
        assert os.path.exists(f'{tmp_path}/toy/rope-1/rope-dynamic-ntk/ntk-{n}.pt')
        ppl = io_rows(f'{tmp_path}/toy/rope-1/rope-dynamic-ntk/ntk-{n}.ppl.csv')
        assert dynamic[str(n)] == f"{float(next(r['nll'] for r in ppl if r['length'] == str(n))):.4f}" and len({r['tokens'] for r in ppl}) == 1
    config = io.load_checkpoint(f'{tmp_path}/toy/drope-1')['config']
    assert config['pe'] == 'nope' and io.load_checkpoint(f'{tmp_path}/toy/rope-7-8-1')['config']['pe'] == 'rope'
    on = io.load_checkpoint(f'{tmp_path}/toy/rope-1/rope-pi-trained-on/on')
    assert on['config']['rope_inv_freq'] and on['args']['length'] == 256
    try:
        import matplotlib                            # noqa: F401 (optional)
        assert in_process(reproduce.main, flags, f'--plot {tmp_path}/table.png') == 0
        assert all((tmp_path / f).stat().st_size > 10_000 for f in ('table.png', 'table-entropy.png', 'table-passkey.png'))
    except ImportError:
        pass
    monkeypatch.setattr(reproduce, 'run', lambda *_, **__: pytest.fail('nothing is left to do'))
    assert in_process(reproduce.main, flags) == 0
    # a csv that lacks rows is shown as it is, one that has none is refused
    part = [line for line in open(f'{tmp_path}/rows.csv') if line.startswith(('seed', '1,ALiBi'))]
    open(f'{tmp_path}/rows.csv', 'w').writelines(part)
    assert in_process(reproduce.main, flags, '--no_run') == 0 and '\n| ALiBi |' in last_table(capsys.readouterr().out)
    open(f'{tmp_path}/rows.csv', 'w').writelines(part[:1])
    assert in_process(reproduce.main, flags, '--no_run') == 2 and capsys.readouterr().err.startswith(f'error: {tmp_path}/rows.csv has no row')


def test_two_rows_compared(tmp_path, capsys, monkeypatch):
    """The paired difference and its standard error, against numpy; what cannot be compared is refused."""
    rng, hits = np.random.default_rng(0), {}
    for seed in 1, 2:
        for name, p in ('NoPE', 0.3), ('NoPE head', 0.6), ('RoPE', 0.5):
            hits[seed, name] = rng.random((2, 20)) < p
            folder = reproduce.where(f'{tmp_path}/tiny', name.split()[0].lower(), seed, name)
            os.makedirs(folder)
            io.write_csv(f'{folder}/x.passkey.csv', [dict(length=n, depth=0.5, trial=t, accuracy=int(h)) for n, row in zip((256, 512), hits[seed, name]) for t, h in enumerate(row)][:40 if name != 'RoPE' else 39])
    io.write_csv(f'{tmp_path}/rows.csv', [dict(seed=s, row=name, length=256, loss=loss) for s, name, loss in ((1, 'NoPE', 0.5), (1, 'NoPE head', 0.4), (2, 'NoPE', 0.6), (2, 'NoPE head', 0.45))])

    def answer(*rows):
        monkeypatch.setattr(sys, 'argv', ['compare', *rows, '--seeds', '1,2', '--out', str(tmp_path), '--csv', f'{tmp_path}/rows.csv'])
        try:
            compare.main()
        except SystemExit as e:
            assert e.code == 2
        return capsys.readouterr()
    shown = answer('NoPE head', 'NoPE').out
    for i, n in enumerate((1, 2)):
        d = np.stack([hits[s, 'NoPE head'][i].astype(float) - hits[s, 'NoPE'][i] for s in (1, 2)])           # (seed, prompt)
        error, each = d.mean(0).std(ddof=1) / np.sqrt(20), d.mean(1)
        star = '*' if abs(d.mean()) >= 2 * error and each.prod() >= 0 else ''
        assert f'| {n}x | {100 * d.mean():+.1f} ±{100 * error:.1f}{star} | {100 * each[0]:+.0f}, {100 * each[1]:+.0f} |' in shown
    assert '| -0.1250 | -0.1000, -0.1500 |' in shown
    assert '| 1x | +0.0 ±0.0 | +0, +0 | +0.0000 |' in answer('NoPE', 'NoPE').out
    assert answer('NoPE', 'NoPe').err.startswith('error: --table encodings has no row "NoPe"')
    assert 'were measured on other prompts at 512' in answer('RoPE', 'NoPE').err
    assert 'has no passkey.csv' in answer('ALiBi', 'NoPE').err
    os.remove(f'{tmp_path}/rows.csv')
    assert 'rows.csv has no rows' in answer('NoPE', 'NoPE').err


def last_table(out):
    return out[out.index('| loss (nats)'):out.rindex('\n\n')]


def io_rows(file):
    import csv
    return list(csv.DictReader(open(file, newline='')))


def test_unknown_scale_is_one_line():
    out = subprocess.run([sys.executable, '-m', 'results.reproduce', '--scale', 'huge'], cwd=ROOT, capture_output=True, text=True)
    assert out.returncode == 2 and out.stderr.startswith('error: SCALE=huge') and out.stderr.count('\n') == 1


def test_a_small_campaign_of_faults():
    """A fiftieth of tests/campaign.py, random command lines among it."""
    out = subprocess.run([sys.executable, '-m', 'tests.campaign', '--share', '0.02'], cwd=ROOT, capture_output=True, text=True, env=dict(os.environ, OMP_NUM_THREADS='1'))
    assert out.returncode == 0 and out.stdout.count(' 0 failed') == 10, out.stdout + out.stderr


def test_a_row_that_fails_costs_no_other(monkeypatch):
    begun = []

    def job(name, seconds, code, then, threads, seen):
        begun.append((name, threads))
        time.sleep(seconds)
        return sys.exit(code) if code else (name, [functools.partial(job, *x) for x in then])

    def results(jobs, workers):
        begun.clear()
        for name in reproduce.side_by_side([functools.partial(job, *x) for x in jobs], workers):
            found.append(name)
    monkeypatch.setattr(os, 'cpu_count', lambda: 4)
    found = []
    with pytest.raises(SystemExit) as e:
        results([('fails', 0.1, 3, ()), ('ends', 0.3, 0, [('waited', 0, 0, ())]), ('never', 0, 0, ()), ('neither', 0, 0, ())], 2)
    assert e.value.code == 3 and found == ['ends'] and begun == [('fails', 2), ('ends', 2)]
    # what waited begins when its own job is done, not when all are
    for workers in 1, 2:
        found = []
        results([('slow', 0.5, 0, ()), ('quick', 0, 0, [('waited', 0, 0, ())])], workers)
        assert found == (['slow', 'quick', 'waited'] if workers == 1 else ['quick', 'waited', 'slow'])
