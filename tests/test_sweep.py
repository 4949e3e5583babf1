"""What results/ promises: the sweep at toy size, as make reproduce runs it; its tables, comparisons and benchmarks."""
import importlib
import math
import os
import queue
import shutil
import subprocess
import sys
import time
from concurrent.futures import Executor, Future
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, TINY, build, close, python, refused, run, set_heads, write_corpus

import train
from data.checkpoint import load_checkpoint, load_model
from data.figures import read_csv, write_csv
from data.tokens import anchor, open_data, spaced_rows
from results import bench, compare, fit, gpu, reproduce, stages, tables
from results import heads as sharpened
from results.plan import Machine, Plan
from results.stages import Clock, Command, Stage, run_stages

# ---------------------------------------------------------------------------------------------------------------------
# stages

class Jobs:
    """In place of stages.run: commands that sleep, and may fail; what has begun is in .begun."""

    def __init__(self, monkeypatch):
        self.begun = []
        monkeypatch.setattr(stages, 'run', self)

    def __call__(self, command, threads=None, log=None):
        self.begun.append((command.script, threads))
        time.sleep(command.options.get('seconds', 0))
        if command.options.get('code'):
            sys.exit(command.options['code'])


def stage(name, after=None, **options):
    return Stage(name, [Command(name, options)], 'log', after)


def ended(todo, workers, threads=None):
    names = []
    try:
        for done in run_stages(todo, workers, threads, Clock(todo, workers)):
            names.append(done.name)
    except SystemExit as e:
        return names, e.code
    return names, 0


def test_a_stage_that_fails_costs_no_other_that_runs(monkeypatch):
    jobs = Jobs(monkeypatch)
    todo = [
        stage('fails', seconds=0.1, code=3),
        stage('ends', seconds=0.3),
        stage('waits', after='ends'),
        stage('never'),
    ]
    assert ended(todo, 2, 2) == (['ends'], 3)
    assert jobs.begun == [('fails', 2), ('ends', 2)]


@pytest.mark.parametrize('workers, order', [(1, ['slow', 'quick', 'waited']), (2, ['quick', 'waited', 'slow'])])
def test_what_waited_begins_when_its_own_stage_is_done(workers, order, monkeypatch):
    Jobs(monkeypatch)
    todo = [stage('slow', seconds=0.5), stage('quick'), stage('waited', after='quick')]
    names, code = ended(todo, workers)
    assert code == 0
    assert sorted(names) == sorted(order)
    if workers == 2:
        assert names == order


def test_the_rows_of_a_run_come_before_the_next_run(monkeypatch):
    Jobs(monkeypatch)
    todo = [stage('first', seconds=0.2), stage('row', after='first'), stage('second'), stage('third')]
    assert ended(todo, 1)[0] == ['first', 'row', 'second', 'third']
    assert ended(todo, 2)[0] == ['second', 'third', 'first', 'row']  # what is ready does not wait for what is not


def test_a_run_is_followed_by_its_rows():
    plan = Plan('toy')
    names = [stage.name for stage in plan.stages(plan.rows, 1, Machine('auto'))]
    runs = [names.index(f'{run}, seed 1') for run in ('nope', 'rope')]
    assert all(runs[0] < names.index(f'{row.name}, seed 1') < runs[1] for row in plan.rows if row.run == 'nope')


@pytest.mark.parametrize('options, words', [
    (dict(steps=600), ['--steps', '600']), (dict(qk_norm=False), ['--no-qk_norm']), (dict(resume=True), ['--resume']),
    (dict(lengths=[64, 128]), ['--lengths', '64,128'])], ids=str)
def test_options_are_flags(options, words):
    assert stages.flags(options) == words


# ---------------------------------------------------------------------------------------------------------------------
# the sweep

def last_table(said):
    return said[said.index('| loss (nats)'):said.rindex('\n\n')]


@pytest.mark.slow
def test_reproduce_toy(tmp_path):
    command = ['-m', 'results.reproduce', '--scale', 'toy', '--out', tmp_path]
    file = f'{tmp_path}/toy/table.csv'
    names = [row.name for row in Plan('toy').rows]
    first = python(*command)
    assert first.returncode == 0, first.stdout[-2000:] + first.stderr[-2000:]
    lines = read_csv(file)
    assert {line['row'] for line in lines} == set(names)
    assert all(0 <= float(line['passkey']) <= 1 for line in lines)
    assert all(3 < float(line['loss']) < 6 for line in lines)
    at_the_end = first.stdout.rpartition('rows measured')[2]
    assert at_the_end.count('| = training length') == len(names)         # the heat maps
    # once more: nothing is left to do, and the table is the same
    again = python(*command)
    assert again.returncode == 0
    assert '$ python' not in again.stdout
    assert read_csv(file) == lines
    assert last_table(again.stdout) == last_table(first.stdout)
    # a row that other flags made is made again, alone
    for line in lines:
        if line['row'] == names[-1]:
            line['flags'] += ' --more'
    write_csv(file, lines)
    third = python(*command)
    assert third.returncode == 0
    assert f'{len(names) - 1} of {len(names)} rows are in' in third.stdout
    assert {line['flags'] for line in read_csv(file)} == {Plan('toy', out=str(tmp_path)).recipe(row, Machine('auto'))
                                                          for row in Plan('toy', out=str(tmp_path)).rows}


class OneAtATime(Executor):
    """Does its work at once, in the thread that asks: the scripts handle signals, which takes the main thread."""
    def __init__(self, workers):
        pass

    def submit(self, work, *args):
        future = Future()
        future.set_result(work(*args))
        return future


@pytest.fixture
def in_process(monkeypatch):
    """The sweep's commands run in this process, one at a time; -> the list of those that ran."""
    ran = []

    def run_here(command, threads=None, log=None):
        ran.append(command)
        words = command.words()
        script, rest = (words[1], words[2:]) if words[0] == '-m' else (words[0], words[1:])
        run(importlib.import_module(script.removesuffix('.py')), rest)
    monkeypatch.setattr(stages, 'ThreadPoolExecutor', OneAtATime)
    monkeypatch.setattr(stages, 'run', run_here)
    return ran


@pytest.mark.slow
def test_reproduce_on_real_text(tmp_path, in_process):
    """SCALE=small at rehearsal size: NoPE, RoPE and DroPE on text files, extended and measured."""
    for i in range(4):
        lines = [f'Chapter {j}. It was a quiet year, and nothing came of it.' for j in range(i, 300)]
        (tmp_path / f'text {i}.txt').write_text('\n'.join(lines))
    said = run(reproduce, f'--scale small_toy --text {tmp_path} --tokenizer bytes --out {tmp_path}/out')
    for row in tables.REAL:
        assert f'| {row.name} |' in said
    drope = load_checkpoint(f'{tmp_path}/out/small_toy/drope-1')
    assert drope['config']['pe'] == 'nope'


def test_the_scale_of_the_paper_takes_eight_gpus_and_shows_its_commands(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr('torch.cuda.device_count', lambda: 0)
    with refused('takes 8 GPU'):
        run(reproduce, f'--scale paper --out {tmp_path}')
    said = capsys.readouterr().out
    assert said.count('--nproc_per_node=8 train.py --preset tinyllama') == 2
    assert 'extend.py' in said


# of each table one row of a kind: an encoding, a table that ends, each length its own NTK, training on, DroPE
SOME_ROWS = dict(
    encodings=['NoPE head-log', 'NoPE uniform, at each length', 'learned', 'ALiBi', 'RoPE dynamic NTK',
               'RoPE PI, trained on', 'DroPE uniform', "DroPE, the authors' QK-norm"],
    layers=['RoPE+NoPE Llama 4', 'windowed RoPE+NoPE head, SWAN', 'NoPE scalable softmax, swapped in', 'p-RoPE LogN'])


@pytest.mark.slow
@pytest.mark.parametrize('table', SOME_ROWS)
def test_the_other_tables(table, tmp_path, in_process, monkeypatch):
    kept = [row for row in tables.TABLES[table]['rows'] if row.name in SOME_ROWS[table]]
    monkeypatch.setitem(tables.TABLES[table], 'rows', kept)
    flags = f'--scale toy --table {table} --out {tmp_path} --csv {tmp_path}/rows.csv'
    said = run(reproduce, flags)
    plan = Plan('toy', table, str(tmp_path))
    lines = read_csv(f'{tmp_path}/rows.csv')
    assert [(line['row'], int(line['length'])) for line in lines] == [
        (r.name, n) for r in kept for n in plan.row_lengths(r)
    ]
    assert all(3 < float(line['loss']) < 6 for line in lines)
    assert all(f'\n| {row.name} |' in last_table(said) for row in kept)
    in_process.clear()
    run(reproduce, flags)
    assert in_process == []                          # nothing is left to do


def test_unknown_scale_is_one_line():
    with refused('SCALE=huge'):
        run(reproduce, '--scale huge')


# ---------------------------------------------------------------------------------------------------------------------
# comparing rows, fitting the best temperature

@pytest.fixture
def hits(tmp_path):
    """Trials of three rows for two seeds, at two lengths -> {(seed, row): (2, 20)}. Those of RoPE lack a prompt."""
    rng, found = np.random.default_rng(0), {}
    plan, machine = Plan('tiny', 'encodings', str(tmp_path)), Machine('fp32')
    rows = {row.name: row for row in plan.rows}
    for seed in 1, 2:
        for name, p in ('NoPE', 0.3), ('NoPE head', 0.6), ('RoPE', 0.5):
            found[seed, name] = rng.random((2, 20)) < p
            lines = []
            for n, row in zip((256, 512), found[seed, name]):
                lines += [dict(length=n, depth=0.5, trial=t, accuracy=int(h)) for t, h in enumerate(row)]
            folder = plan.row_folder(rows[name], seed, machine)
            os.makedirs(folder)
            write_csv(f'{folder}/x.passkey.csv', lines[:39] if name == 'RoPE' else lines)
    losses = [(1, 'NoPE', 0.5), (1, 'NoPE head', 0.4), (2, 'NoPE', 0.6), (2, 'NoPE head', 0.45)]
    # --threads has runs of its own, whose rows may stand in the same csv
    losses = [('', *loss) for loss in losses] + [('1', seed, name, 9.0) for seed, name, _ in losses]
    columns = []
    for threads, seed, name, loss in losses:
        columns.append(dict(seed=seed, dtype='fp32', threads=threads, row=name, length=256, loss=loss))
    write_csv(f'{tmp_path}/rows.csv', columns)
    return found


@pytest.fixture
def compared(hits, tmp_path):
    return lambda a, b: run(compare, [a, b], f'--seeds 1,2 --out {tmp_path} --csv {tmp_path}/rows.csv')


@pytest.mark.parametrize('i, times', [(0, 1), (1, 2)])
def test_a_difference_is_paired_and_has_its_standard_error(i, times, hits, compared):
    d = np.stack([hits[s, 'NoPE head'][i].astype(float) - hits[s, 'NoPE'][i] for s in (1, 2)])  # (seed, prompt)
    error, each = d.mean(0).std(ddof=1) / np.sqrt(20), d.mean(1)
    star = '*' if abs(d.mean()) >= 2 * error and each.prod() >= 0 else ''
    by_seed = f'{100 * each[0]:+.0f}, {100 * each[1]:+.0f}'
    want = f'| {times}x | {100 * d.mean():+.1f} ±{100 * error:.1f}{star} | {by_seed} |'
    assert want in compared('NoPE head', 'NoPE')


def test_the_loss_is_compared_by_seed(compared):
    assert '| -0.1250 | -0.1000, -0.1500 |' in compared('NoPE head', 'NoPE')


def test_a_row_does_not_differ_from_itself(compared):
    assert '| 1x | +0.0 ±0.0 | +0, +0 | +0.0000 |' in compared('NoPE', 'NoPE')


@pytest.mark.parametrize('row, words', [
    ('NoPe', ['no row "NoPe"']), ('RoPE', ['other prompts at 512']), ('ALiBi', ['has no passkey.csv'])])
def test_rows_that_cannot_be_compared_are_refused(row, words, compared):
    with refused(*words):
        compared(row, 'NoPE')


def test_without_losses_nothing_is_compared(compared, tmp_path):
    os.remove(tmp_path / 'rows.csv')
    with refused('rows.csv has no rows'):
        compared('NoPE head', 'NoPE')


def test_one_temperature_for_all_positions_past_the_training_length_stands_for_their_mean_logarithm():
    positions = np.linspace(1, 8, 100_001)
    assert np.log(fit.typical(8)) == pytest.approx(np.log(positions).mean(), abs=1e-5)


def test_the_best_temperature_grows_with_the_logarithm_of_the_length():
    s = np.array([1.5, 2, 4, 8])
    assert fit.fit(s, 1 + 0.3 * np.log(s)) == (pytest.approx(0.3), pytest.approx(1))
    lam = np.array([1.2, 1.2, 1.5, 1.6])             # by a general solver, and R2 by its definition
    a, r2 = fit.fit(s, lam)
    assert a == pytest.approx(np.linalg.lstsq(np.log(s)[:, None], lam - 1, rcond=None)[0][0])
    assert r2 == pytest.approx(1 - ((lam - 1 - a * np.log(s)) ** 2).mean() / lam.var())


def test_the_lowest_point_of_a_curve():
    assert fit.lowest([(x, 2 + (x - 1.23) ** 2) for x in (1.6, 1.0, 1.2, 1.4)]) == pytest.approx(1.23)
    assert fit.lowest([(1.0, 2.0), (1.1, 2.1), (1.2, 2.3)]) == 1         # the edge of the grid


def test_the_share_of_the_first_token_is_that_of_the_attention(corpus):
    """By fused attention over values that are 1 for the first token and 0 for the others."""
    model = build('rope', n_layer=2, n_kv_head=2, qk_gain=True)
    set_heads(model, 1.7)
    x = torch.randint(model.config.vocab_size, (3, 40))
    shares = sharpened.on_first_token(model, x, [1, 7, 40])
    q, k, v = model.blocks[0].attn.qkv(model.blocks[0].attn_norm(model.embed(x)), model.rotation(torch.arange(40)), 0)
    first = torch.zeros_like(v)
    first[:, :, 0] = 1
    want = F.scaled_dot_product_attention(q, k, first, is_causal=True, enable_gqa=True)[..., 0].mean(0)
    close(shares[0], want[:, [0, 6, 39]])
    assert (shares[:, :, 0] == 1).all()


def test_a_head_that_counts_is_known_by_the_weight_of_its_first_token():
    """And the temperature 1 + ln s / ln w gives it back the share that it had s times earlier."""
    places = [16, 64, 256, 1025]
    n = torch.tensor(places)
    assert sharpened.first_token_weight(50 / (50 + n - 1), places) == pytest.approx(50)
    assert sharpened.first_token_weight(torch.full((4,), 0.5), places) is None
    assert sharpened.first_token_weight(1 / n, places) is None           # weighs as any other
    assert sharpened.first_token_weight(torch.ones(4), places) is None   # all there is
    w = 50 ** (1 + math.log(4) / math.log(50))
    assert w / (w + 4 * 256) == pytest.approx(50 / (50 + 256))


def test_each_head_is_sharpened_alone(trained, corpus):
    """A line for each, with the losses of the model in which only that head has another temperature."""
    said = run(sharpened, f'--ckpt {trained} --data {corpus} --length 128 --factor 4 --eval_tokens 1024')
    lines = [line.split() for line in said.splitlines() if line.startswith('layer')]
    model = load_model(load_checkpoint(trained))
    data, meta = open_data(corpus, 'val')
    x = anchor([data[i:i + 129] for i in spaced_rows(data, 128, 1024)], meta['bos'])
    assert len(lines) == 4
    for _, layer, _, head, inside, past, *_ in lines:
        scales = torch.ones(2, 2)
        scales[int(layer), int(head)] = 4
        set_heads(model, scales)
        with torch.no_grad():
            window, whole = model(x[:, :64], x[:, 1:65])[1], model(x[:, :-1], x[:, 1:])[1]
        assert float(inside) == pytest.approx(window.item(), abs=1e-3)
        assert float(past) == pytest.approx(2 * whole.item() - window.item(), abs=1e-3)


def test_the_figure_of_the_heads(trained, corpus, tmp_path):
    pytest.importorskip('matplotlib')
    file = f'{tmp_path}/heads.png'
    said = run(sharpened, f'--ckpt {trained} --data {corpus} --length 128 --eval_tokens 256 --plot {file}')
    assert said.endswith(f'{file}\n')
    assert os.path.getsize(file) > 10_000


def test_heads_that_do_not_see_the_first_token_as_it_is_are_refused(tmp_path, corpus):
    run(train, TINY, '--pe alibi --steps 1 --data', corpus, '--out', tmp_path)
    with refused('nope, rope or sinusoidal'):
        sharpened.main(['--ckpt', str(tmp_path), '--data', corpus])


def test_heads_whose_temperatures_grow_are_refused(tmp_path, corpus):
    run(train, TINY, '--scalable_softmax --steps 1 --data', corpus, '--out', tmp_path)
    with refused('grow with the length'):
        sharpened.main(['--ckpt', str(tmp_path), '--data', corpus])


# ---------------------------------------------------------------------------------------------------------------------
# the demonstration, the benchmarks, the faults

@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists(f'{ROOT}/results/demo/nope.pt'), reason='results/demo is not there')
def test_the_demo_finds_keys_and_goes_on(tmp_path):
    done = python('-m', 'results.demo', '--depths', 2, '--trials', 1, '--out', tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('| NoPE') == 3


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists(f'{ROOT}/results/demo/nope.pt'), reason='results/demo is not there')
def test_the_demo_s_extensions_can_be_made_again(tmp_path, monkeypatch):
    """head, which begins with uniform: bit for bit where no rounding differs, else to a tenth."""
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    shipped = {name: load_checkpoint(f'{ROOT}/results/demo/{name}.pt')['extended'] for name in ('uniform', 'head')}
    corpus = stages.flags(tables.CORPORA['passkey_long'])
    done = python('-m', 'data.passkey.prepare', '--out', f'{tmp_path}/long', *corpus)
    assert done.returncode == 0, done.stderr
    flags = f'--data {tmp_path}/long --out {tmp_path} --method head --length 2048 --dtype fp32 --eval_tokens 0'
    base = f'{ROOT}/results/demo/nope.pt'
    done = python('extend.py', '--ckpt', base, *flags.split(), *stages.flags(tables.TUNE))
    assert done.returncode == 0, done.stderr
    made = load_checkpoint(f'{tmp_path}/head-2048.pt')['extended']
    assert made['data_fingerprint'] == shipped['head']['data_fingerprint']
    if made['losses'] == shipped['head']['losses']:
        assert made['heads'] == shipped['head']['heads']
        assert made['curve'] == shipped['uniform']['curve']
    np.testing.assert_allclose(np.array(made['heads']), np.array(shipped['head']['heads']), atol=0.1)
    np.testing.assert_allclose(np.array(made['curve']), np.array(shipped['uniform']['curve']), atol=1e-3)


def test_the_demo_without_its_models_is_refused(tmp_path):
    with refused('nope.pt is missing'):
        run(importlib.import_module('results.demo'), '--models', tmp_path)


def test_models_that_are_not_those_of_made_json_are_refused(trained, tmp_path):
    for name in 'nope', 'uniform', 'head':
        shutil.copyfile(f'{trained}/ckpt.pt', tmp_path / f'{name}.pt')
    (tmp_path / 'made.json').write_text('{"sha256": {"nope": "0"}}')
    with refused('nope.pt', 'made.json'):
        run(importlib.import_module('results.demo'), '--models', tmp_path)


SMALL = dict(vocab_size=101, block_size=64, n_layer=1, n_head=4, n_kv_head=2, n_embd=32, n_inner=32)


@pytest.mark.parametrize('what', ['train', 'tune', 'tune_checkpointing', 'perplexity', 'passkey', 'entropy'])
def test_what_a_step_costs(what):
    answer = queue.Queue()
    bench.once(what, 96, SMALL, 'fp32', answer)
    seconds, mb = answer.get()
    assert 0 < seconds < 10
    assert 0 <= mb < 1000


def test_arithmetic_is_that_of_one_layer_written_out():
    C, inner, T = 8, 24, 100
    shape = dict(vocab_size=101, n_layer=1, n_head=2, n_kv_head=2, n_embd=C, n_inner=inner)
    params = 4 * C * C + 3 * C * inner + 101 * C + 3 * C                 # and norms; temperatures are no parameters
    assert bench.expected('train', T, shape) == (T * (6 * params + 12 * C * T), params)
    assert bench.expected('entropy', T, shape) == (T * (6 * params + 18 * C * T), params)


@pytest.mark.slow
def test_the_exponents_in_the_csv_are_slopes_of_that_arithmetic():
    for row in read_csv(f'{ROOT}/results/costs.csv'):
        what, n, width = row['what'], int(row['length']), int(row['width'])
        if row['grows_by'] == 'length' and n > 1024:
            less = n // 2 if n == 32768 else n // 4
            shape = dict(vocab_size=101, n_layer=4, n_head=4, n_kv_head=4, n_embd=width, n_inner=width)
            ratio = bench.expected(what, n, shape)[0] / bench.expected(what, less, shape)[0]
            assert float(row['arithmetic_exponent']) == pytest.approx(math.log(ratio) / math.log(n / less), abs=0.006)


@pytest.mark.slow
def test_perplexity_beside_bare_forward_passes(monkeypatch):
    monkeypatch.setattr(getattr(bench, 'io', bench), 'write_csv', lambda file, rows: None)
    row, = bench.perplexity(SimpleNamespace(device='cpu', preset=None, lengths=[32], rounds=1))
    assert row['windows'] * row['stride'] == 2**15
    assert 0.1 < float(row['times']) < 10


@pytest.mark.parametrize('size, n', [('tiny', 6), ('tinyllama', 5)])
def test_train_takes_the_flags_of_what_is_raced(size, n, tmp_path):
    made = bench.contenders(SimpleNamespace(nanogpt='nanoGPT', steps=4, device='cpu'), str(tmp_path), size)
    ours = {name: command for name, (command, _) in made.items() if f'{tmp_path}/ours' in command}
    assert len(ours) == n
    for name, command in ours.items():
        args = train.parse_args(command.split()[2:])
        assert (args.steps, args.preset) == (4, size)
        assert args.dtype == ('fp32' if 'fp32' in name else 'bf16')
        assert (args.n_embd is None) == ('preset' in name)


@pytest.mark.slow
def test_a_step_is_compared_with_the_machine_s_own_matrix_product(tmp_path, monkeypatch, capsys):
    """The arithmetic is that of the shape that every contender has: one layer of attention and SwiGLU, and the head."""
    toy = bench.Size(layers=1, heads=2, width=32, vocab=101, rows=4, length=64)
    monkeypatch.chdir(ROOT)
    monkeypatch.setitem(bench.SIZES, 'toy', toy)
    monkeypatch.setattr(bench, 'OURS', {'ours, fp32': '--pe rope --dtype fp32 --no-compile'})
    monkeypatch.setattr(bench, 'matrix_product', lambda device: 1e9)
    write_corpus(f'{tmp_path}/data')
    row = bench.race(SimpleNamespace(nanogpt=None, rounds=1, steps=4, device='cpu'), str(tmp_path), 'toy')[-1]
    params = 4 * 32 * 32 + 3 * 32 * toy.inner + 32 * 101 + 3 * 32 + 2 * 2
    flops = 4 * 64 * (6 * params + 12 * 32 * 64)
    assert row['trainer'] == 'ours, fp32'
    assert float(row['of_product']) == pytest.approx(flops / (float(row['ms']) / 1000) / 1e9, rel=0.02)


@pytest.mark.slow
def test_the_stages_for_a_gpu_are_rehearsed(tmp_path):
    """Every stage of results/gpu.sh ends well at toy size and writes rows, and none is run again."""
    env = dict(os.environ, PYTHON=sys.executable, OMP_NUM_THREADS='1')
    env.update(OUT_DIR=f'{tmp_path}/out', CSV=f'{tmp_path}/gpu.csv')
    env.pop('NANOGPT', None)
    done = subprocess.run(['sh', 'results/gpu.sh', 'toy'], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = read_csv(f'{tmp_path}/gpu.csv')
    assert list(rows[0]) == ['stage', 'what', 'setting', 'value', 'unit', 'device', 'torch', 'date']
    assert {row['stage'] for row in rows} == set(gpu.STAGES)
    assert all(row['value'] for row in rows)
    again = python('-m', 'results.gpu', '--toy', 'train', '--out', f'{tmp_path}/out', '--csv', f'{tmp_path}/gpu.csv')
    assert again.stdout.count('already') == 6
    assert read_csv(f'{tmp_path}/gpu.csv') == rows


def test_a_stage_that_fails_says_so_in_the_csv_and_the_others_go_on(tmp_path, monkeypatch):
    """And it is run again by the next call."""
    def fails():
        raise RuntimeError('out of memory\nand so on')

    def found(large):
        def jobs(*_):
            yield 'large', large
            yield 'small', lambda: dict(speed=(3, 'tokens/s'))
        monkeypatch.setattr(gpu, 'jobs', jobs)
        with pytest.raises(SystemExit) as end:
            gpu.main(['--toy', 'train', '--csv', f'{tmp_path}/gpu.csv', '--out', str(tmp_path)])
        rows = read_csv(f'{tmp_path}/gpu.csv')
        return end.value.code, {(row['setting'], row['what'], row['value']) for row in rows}

    assert found(fails) == (1, {('large', 'error', 'RuntimeError: out of memory'), ('small', 'speed', '3')})
    assert found(lambda: dict(speed=(2, 'tokens/s'))) == (0, {('large', 'speed', '2'), ('small', 'speed', '3')})


@pytest.mark.parametrize('model', ['RoPE', 'without RoPE'])
def test_nothing_is_measured_before_the_recalibration_is_done(model, tmp_path, monkeypatch):
    """The row says so, and the next call goes on."""
    half = dict(step=120, args=dict(steps=240))
    monkeypatch.setattr(gpu, 'load_checkpoint', lambda path: half)
    args = SimpleNamespace(smollm2=str(tmp_path), out=str(tmp_path))
    assert gpu.recalibrated(args, gpu.FULL, model) == dict(unfinished=('at step 120', 'the same command goes on'))


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
def test_without_a_gpu_only_a_rehearsal_is_run():
    with refused('sh results/gpu.sh toy'):
        gpu.main(['train'])


def test_text_that_is_tokenised_already_is_taken_as_it_is(tmp_path):
    (tmp_path / 'meta.json').write_text('{}')
    plan = Plan('small', text=str(tmp_path))
    assert plan.data('text') == str(tmp_path)
    assert plan.corpora_stages() == []


@pytest.mark.slow
def test_a_small_campaign_of_faults():
    """A fiftieth of tests/campaign.py, random command lines among it."""
    done = python('-m', 'tests.campaign', '--share', '0.02')
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(' 0 failed') == 10, done.stdout
