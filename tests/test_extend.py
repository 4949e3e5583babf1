"""What extend.py promises, each against a plain computation in float64."""
import copy
import math
import os
import re
import shutil
from types import SimpleNamespace

import conftest
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    BATCH,
    CPU,
    TINY,
    bits,
    check_refused,
    heads,
    refused,
    run,
    same_weights,
    set_heads,
    started,
    table,
    write_corpus,
)

import eval_passkey
import extend
import train
from data import extension, measure, runtime
from data.checkpoint import frozen, load_checkpoint, load_model
from data.extension import Corpus, loss_of
from data.figures import read_csv, read_json, write_json
from data.positions import ntk, pi, rope_frequencies, t5_bucket, yarn
from data.rope import N_HAT, Candidate, search
from data.runtime import Env
from data.tokens import get_batch, open_data
from model import ENCODINGS, GPTConfig
from results import fit

ENV = Env()
STRETCHED = dict(pi=pi, ntk=ntk, yarn=yarn)
HEAD = ('--method head --length 128 --steps 4 --batch 4 --grid 0.8,1,1.2 --grid_batches 1 --lengths 128,64,96 '
        f'--eval_tokens 500 {CPU}')


def build(**shape):
    """A small network in which no attention is nearly uniform, with another temperature for each head."""
    model = conftest.build(**shape).requires_grad_(False)
    for p in model.parameters():
        if p.dim() == 2:
            p.mul_(2)
        elif p.dim() == 1:
            p.fill_(1)
    set_heads(model, torch.rand(2, 4) + 0.5)
    set_heads(model, 0, 'slope')
    return model


def some(*shape):
    return np.random.default_rng(0).integers(50, size=shape).astype(np.uint16)


def corpus_of(n, bos=7):
    return Corpus(some(n), bos)


def flags(**changed):
    """extend.py's flags, as its functions get them."""
    words = ['--ckpt', '', '--data', '', '--method', 'head', '--length', '40', '--no-compile']
    args = extend.parse_args(words)
    defaults = dict(batch=8, micro_batch=8, seed=3, lr=0.03, steps=20, focus=True, grid=[0.5, 1, 1.7], grid_batches=2)
    vars(args).update(defaults | changed)
    return args


@pytest.fixture(scope='session')
def extended(trained, corpus, tmp_path_factory):
    """The folder of a head-tuned checkpoint and its measurements."""
    out = str(tmp_path_factory.mktemp('extended'))
    run(extend, HEAD, f'--ckpt {trained} --data {corpus} --out {out}')
    return out


# ---------------------------------------------------------------------------------------------------------------------
# extending

def test_tuning_changes_the_temperatures_only(extended, trained):
    old, new = load_checkpoint(trained), load_checkpoint(f'{extended}/head-128.pt')
    changed = {k for k in old['model'] if bits(old['model'][k]) != bits(new['model'][k])}
    assert changed == {f'blocks.{i}.attn.scale' for i in (0, 1)}
    assert list(old['model']) == list(new['model'])
    assert all(new['model'][k].dtype == torch.float32 and new['model'][k].min() >= 1 for k in changed)
    assert {k for k in old if bits(old[k]) != bits(new[k])} == {'model', 'optimizer', 'extended'}
    assert new['optimizer'] is None
    how = new['extended']
    assert how['method'] == 'head'
    assert how['length'] == 128
    assert len(how['losses']) == 4
    assert [lam for lam, _ in how['curve']] == [0.8, 1, 1.2]
    assert how['tokens'] == (4 + 3) * 4 * 128
    assert how['heads'] == [b.tolist() for k, b in new['model'].items() if k.endswith('scale')]


@pytest.mark.parametrize('focus', [True, False])
def test_tuning_follows_the_paper(focus):
    model, data, args = build(), some(2000), flags(focus=focus)
    set_heads(model, 1.05)
    model.lm_head.weight.mul_(10)                    # gradients large enough to be clipped
    ref, clipped = copy.deepcopy(model).double(), 0
    losses = extend.tune(model, Corpus(data, 7), args, ENV)
    lam, m, v = torch.full((2, 4), 1.05).double(), 0, 0
    for t in range(20):                              # AdamW without decay, its gradient from the whole logits
        for b, row in zip(ref.blocks, lam):
            b.attn.scale = torch.nn.Parameter(row.clone())
        x, y = get_batch(data, 7, 8, 40, 3, t)
        loss = F.cross_entropy(ref(x)[0].flatten(0, 1), y.flatten())
        assert losses[t] == pytest.approx(loss.item(), abs=1e-5)
        g = torch.stack(torch.autograd.grad(loss, [b.attn.scale for b in ref.blocks]))
        g, clipped = g / max(1, g.norm()), clipped + (g.norm() > 1)
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g ** 2
        lr = 0.03 * (0.5, 1)[t] if t < 2 else 0.03 * (0.55 + 0.45 * math.cos(math.pi * (t - 2) / 18))
        lam = lam - lr * (m / (1 - 0.9 ** (t + 1))) / ((v / (1 - 0.95 ** (t + 1))).sqrt() + 1e-8)
        lam = lam.clamp(min=1) if focus else lam
    torch.testing.assert_close(heads(model).double(), lam, atol=1e-4, rtol=0)
    assert (lam.min() >= 1) == focus
    assert lam.std() > 0.05
    assert clipped > 0


@pytest.mark.parametrize('pe', ENCODINGS)
def test_matrices_kept_in_bf16_change_no_number(pe):
    """frozen casts once what autocast casts at each use: the same logits, losses and temperatures, bit for bit."""
    env, found = Env(dtype='bf16'), []
    for keep in frozen, lambda model, env: model:
        model = keep(build(pe=pe, block_size=64), env)
        assert {p.dtype for n, p in model.named_parameters() if n.endswith('proj.weight')} == {
            torch.bfloat16 if keep is frozen else torch.float32
        }
        assert all(
            p.dtype == torch.float32
            for n, p in model.named_parameters()
            if not n.endswith(('proj.weight', 'head.weight'))
        )
        x = torch.from_numpy(some(2, 24).astype('int64'))
        with torch.no_grad(), env.autocast():
            found.append([model(x)[0], model(x, x)[1], model.generate(x, 8, temperature=0)])
        found[-1] += [torch.tensor(extend.tune(model, corpus_of(2000), flags(steps=3), env)), heads(model)]
    assert all(torch.equal(a, b) for a, b in zip(*found))


def test_tuning_in_bf16_saves_the_weights_as_they_were(trained, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr('data.runtime.pick_dtype', lambda *_: ('bf16', 'emulated where the CPU has none'))
    run(
        extend,
        HEAD.replace('--dtype fp32', ''),
        f'--dtype bf16 --eval_tokens 0 --ckpt {trained} --data {corpus} --out {tmp_path}',
    )
    old, new = load_checkpoint(trained), load_checkpoint(f'{tmp_path}/head-128.pt')
    assert {k for k in old['model'] if bits(old['model'][k]) != bits(new['model'][k])} == {
        f'blocks.{i}.attn.scale' for i in (0, 1)
    }


def test_a_model_shares_its_weights_with_the_checkpoint(trained):
    ckpt = load_checkpoint(trained)
    model = load_model(ckpt)
    assert all(p.data_ptr() == ckpt['model'][k].data_ptr() for k, p in model.state_dict().items())
    assert {k for k, p in model.named_parameters() if not p.requires_grad} == {
        f'blocks.{i}.attn.{what}' for i in (0, 1) for what in ('scale', 'slope')
    }
    for dtype in torch.float32, torch.bfloat16:      # a converted one, its head and embedding one tensor there
        ckpt['model']['embed.weight'] = ckpt['model']['lm_head.weight'] = ckpt['model']['embed.weight'].to(dtype)
        model = load_model(ckpt)
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert model.embed.weight.data_ptr() != model.lm_head.weight.data_ptr()


def test_focus_holds_at_any_rate():
    lowest = []
    for focus in True, False:
        model = build()
        set_heads(model, 1)
        extend.tune(model, corpus_of(2000), flags(lr=5, steps=3, focus=focus), ENV)
        lowest.append(heads(model).min())
    assert lowest[0] >= 1 > lowest[1]


def test_micro_batches_change_nothing():
    made, data = [], some(2000)
    for micro in 8, 1, 3:
        model, args = build(), flags(micro_batch=micro, steps=10)
        curve = extend.uniform(model, Corpus(data, 7), args, ENV).curve
        made.append(
            np.concatenate(
                (np.array(curve)[:, 1], extend.tune(model, Corpus(data, 7), args, ENV), heads(model).flatten())
            )
        )
    for m in made[1:]:
        np.testing.assert_allclose(m, made[0], atol=1e-5)


@pytest.mark.parametrize('length, past', [(40, 16), (12, 0)])
def test_uniform_takes_the_lowest_loss_past_the_training_length(length, past, capsys):
    model, data, args = build(), some(2000), flags(length=length)
    curve = extend.uniform(model, Corpus(data, 7), args, ENV).curve
    best = heads(model)[0, 0].item()
    ref = copy.deepcopy(model).double()
    for lam, loss in curve:
        for b in ref.blocks:
            b.attn.scale.fill_(lam)
        batches = [get_batch(data, 7, 8, length, 3, 10**9 + i) for i in range(2)]
        want = [F.cross_entropy(ref(x)[0][:, past:].flatten(0, 1), y[:, past:].flatten()).item() for x, y in batches]
        assert loss == pytest.approx(sum(want) / 2, abs=1e-5)
    assert [lam for lam, _ in curve] == args.grid
    assert best == min(curve, key=lambda c: c[1])[0]
    assert (heads(model) == best).all()
    assert re.search(rf' {best:.2f} .*best', capsys.readouterr().out)


def test_the_grid_and_the_tuning_see_different_batches(monkeypatch):
    seen, real = [], get_batch
    monkeypatch.setattr(extension, 'get_batch', lambda *a: seen.append(real(*a)[0]) or (seen[-1], seen[-1]))
    model, args = build(), flags(steps=4)
    extend.uniform(model, corpus_of(4000, None), args, ENV)
    grid, seen[:] = {x.numpy().tobytes() for x in seen}, []
    extend.tune(model, corpus_of(4000, None), args, ENV)
    tuning = {x.numpy().tobytes() for x in seen}
    assert len(grid) == 2
    assert len(tuning) == 4
    assert not grid & tuning  # every lambda on the same two


@pytest.mark.parametrize('init', ['best', '1.3'])
def test_where_head_tuning_starts(init, trained, corpus, tmp_path):
    flags = f'--init {init} --steps 1 --lr 1e-9 --eval_tokens 0 --grid 1.2,1.4 --ckpt {trained} --data {corpus}'
    flags += f' --out {tmp_path}'
    run(extend, HEAD, flags)
    how = load_checkpoint(f'{tmp_path}/head-128.pt')['extended']
    want = 1.3 if init == '1.3' else min(how['curve'], key=lambda c: c[1])[0]
    np.testing.assert_allclose(how['heads'], want, atol=1e-6)
    assert os.listdir(tmp_path) == ['head-128.pt']   # --eval_tokens 0 measures nothing


@pytest.fixture
def uniforms(trained, corpus, tmp_path):
    """Two uniform checkpoints, for 96 and for 128 tokens."""
    for n in 96, 128:
        run(
            extend,
            HEAD,
            f'--method uniform --length {n} --eval_tokens 0 --ckpt {trained} --data {corpus} --out {tmp_path}',
        )
    return tmp_path


def test_fit_reads_uniform_checkpoints(uniforms):
    lines = run(fit, f'{uniforms}/uniform-128.pt {uniforms}/uniform-96.pt').splitlines()
    assert [line.split()[:2] for line in lines[1:3]] == [['96', '1.24x'], ['128', '1.47x']]
    assert re.fullmatch(r'lambda = 1 \+ -?\d\.\d{4} ln s, R2 -?\d+\.\d{4}', lines[3])


def test_fit_takes_two_lengths_made_by_uniform(uniforms, extended):
    with refused('two lengths'):
        run(fit, f'{uniforms}/uniform-128.pt')
    with refused('not made by extend.py --method uniform'):
        run(fit, f'{uniforms}/uniform-128.pt {extended}/head-128.pt')


@pytest.mark.parametrize('method', ['uniform-log', 'head-log'])
def test_log_methods_leave_the_window_alone(method, trained, corpus, tmp_path):
    run(
        extend,
        HEAD,
        f'--method {method} --grid 1.2,1.6 --eval_tokens 0 --ckpt {trained} --data {corpus} --out {tmp_path}',
    )
    old, new = load_checkpoint(trained), load_checkpoint(f'{tmp_path}/{method}-128.pt')
    assert {k for k in old['model'] if bits(old['model'][k]) != bits(new['model'][k])} == {
        f'blocks.{i}.attn.slope' for i in (0, 1)
    }
    before, after, L = load_model(old), load_model(new), old['config']['block_size']
    slopes, best = heads(after, 'slope'), min(new['extended']['curve'], key=lambda c: c[1])[0]
    assert new['extended']['slopes'] == slopes.tolist()
    assert (slopes >= 0).all()
    assert len(new['extended']['losses']) == (4 if method == 'head-log' else 0)
    if method == 'uniform-log':                      # --grid names the temperature at --length
        torch.testing.assert_close(1 + slopes * math.log(128 / L), torch.full_like(slopes, best))
    # at --length it is the method without -log; the window is the base's; in between the temperature is
    run(
        extend,
        HEAD,
        f'--method {method[:-4]} --grid 1.2,1.6 --eval_tokens 0 --ckpt {trained} --data {corpus} --out {tmp_path}',
    )
    flat, idx = (
        load_model(load_checkpoint(f'{tmp_path}/{method[:-4]}-128.pt')),
        torch.randint(before.config.vocab_size, (2, 128)),
    )
    torch.testing.assert_close(1 + slopes * math.log(128 / L), heads(flat))
    with torch.no_grad():
        torch.testing.assert_close(after(idx)[0], flat(idx)[0])
        assert torch.equal(after(idx[:, :L])[0], before(idx[:, :L])[0])
        assert (after(idx[:, : L + 8])[0] != before(idx[:, : L + 8])[0]).any()
    check_refused(
        extend, f'{HEAD} --ckpt {trained} --data {corpus} --method {method} --length {L}', ' : past the training length'
    )
    check_refused(extend, f'{HEAD} --ckpt {tmp_path}/{method}-128.pt --data {corpus}', ' : extended already')


def test_longrope_tries_nothing_twice_and_every_divisor_grows():
    """On a bowl with its bottom at (1.5, 2, 3): every candidate is valid and new, and the best comes near."""
    target, tried = np.array([1.5, 2, 3]), []

    def loss(candidate):
        tried.append(candidate)
        return float(np.square(np.array(candidate.divisors) - target).sum()) + 0.01 * candidate.start

    seeds = [Candidate((1.0, 1.0, 1.0), 0), Candidate((4.0, 4.0, 4.0), 0)]
    losses, curve = search(seeds, 5.0, loss, 16, 30, np.random.default_rng(0), lambda lowest: None)
    assert len(tried) == len(set(tried)) == len(losses) == curve[-1][0]
    assert all(1 <= a <= b <= c <= 5 for (a, b, c), _ in tried)
    assert len(tried) == 16 + 30 * 8
    assert min(losses.values()) < 0.05


def test_longrope(corpus, tmp_path):
    run(train, TINY, f'--pe rope --steps 1 --data {corpus} --out {tmp_path}')
    search = '--method longrope --population 8 --iterations 3 --eval_tokens 0'
    command = f'{HEAD} {search} --ckpt {tmp_path} --data {corpus}'
    run(extend, command)
    run(extend, command, f'--out {tmp_path}/again')
    old, new, again = (load_checkpoint(f'{tmp_path}/{f}.pt') for f in ('ckpt', 'longrope-128', 'again/longrope-128'))
    assert new['config'] == again['config']
    assert bits(new['model']) == bits(again['model'])
    lam = 1 + math.log(128 / 64) / math.log(64)  # the square of transformers' attention_factor
    assert all(
        bits(v) == bits(old['model'][k]) or k.endswith('.scale') and (v == torch.tensor(lam)).all()
        for k, v in new['model'].items()
    )
    c, tried = GPTConfig(**new['config']), new['extended']['curve']
    divisors = np.array(rope_frequencies(c)) / c.rope_inv_freq
    assert (divisors > 1 - 1e-5).all()
    assert (np.diff(divisors) > -1e-5).all()
    assert divisors.max() <= 1.25 * 128 / 64 + 1e-5
    assert c.rope_start in N_HAT
    assert [n for n, _ in tried] == sorted(n for n, _ in tried)
    assert len(tried) == 4
    assert [x for _, x in tried] == sorted((x for _, x in tried), reverse=True)
    # the loss that it reports is that of the checkpoint, and no worse than the methods that it began with
    args = flags(length=128, batch=4, micro_batch=4, seed=314, grid_batches=1)
    data, meta = open_data(corpus, 'train')
    assert tried[-1][1] == pytest.approx(
        loss_of(load_model(new), Corpus(data, meta['bos']), args, ENV), abs=1e-6
    )
    for name, method in STRETCHED.items():
        seed = load_model(
            {**old, 'config': {**old['config'], 'rope_inv_freq': method(GPTConfig(**old['config']), 128)[0]}}
        )
        set_heads(seed, lam)
        assert tried[-1][1] <= loss_of(seed, Corpus(data, meta['bos']), args, ENV) + 1e-6
    run(eval_passkey, f'--ckpt {tmp_path}/longrope-128.pt --lengths 96 --depths 1 --trials 1 --decode {CPU}')
    check_refused(
        extend, f'{HEAD} --ckpt {tmp_path}/longrope-128.pt --data {corpus} --method pi', ' : extended already'
    )


@pytest.mark.parametrize('pe', ENCODINGS)
def test_the_whole_way(pe, corpus, tmp_path):
    """Every encoding trains, is extended by temperatures, measured, decoded, and trained on at another length."""
    n = 64 if pe == 'learned' else 128               # a table ends
    run(train, TINY, f'--pe {pe} --steps 2 --data {corpus} --out {tmp_path}')
    run(extend, HEAD, f'--ckpt {tmp_path} --data {corpus} --length {n} --lengths 48,{n} --steps 2 --grid 1,1.2')
    ppl, entropy = (table(tmp_path / f'head-{n}.{what}.csv')[1] for what in ('ppl', 'entropy'))
    assert len(ppl) == 2
    assert all(math.isfinite(x) for r in ppl + entropy for x in r)
    if pe != 'learned':                              # 64 tokens hold no prompt
        run(eval_passkey, f'--ckpt {tmp_path}/head-{n}.pt --lengths {n} --depths 2 --trials 1 --decode {CPU}')
    run(train, BATCH, f'--init_from {tmp_path}/head-{n}.pt --length {n} --steps 1 --data {corpus} --out {tmp_path}/on')


def test_ntk_grid_is_ntk_at_the_best_multiple_of_the_length(corpus, rope, tmp_path):
    flags = f'{HEAD} --ckpt {rope} --data {corpus} --eval_tokens 0 --grid 1,2,4 --out {tmp_path}'
    run(extend, flags, '--method ntk-grid')
    found = load_checkpoint(f'{tmp_path}/ntk-grid-128.pt')
    curve = dict(found['extended']['curve'])
    best = min(curve, key=curve.get)
    assert list(curve) == [1, 2, 4]
    run(extend, flags, f'--method ntk --length {int(128 * best)}')
    assert load_checkpoint(f'{tmp_path}/ntk-{int(128 * best)}.pt')['config'] == found['config']


@pytest.mark.parametrize('method', ['pi', 'ntk', 'ntk-grid', 'yarn', 'longrope'])
def test_a_stretched_model_is_trained_on(method, corpus, tmp_path):
    run(train, TINY, f'--pe rope --steps 1 --data {corpus} --out {tmp_path}')
    run(
        extend,
        HEAD,
        f'--method {method} --population 4 --iterations 1 --ckpt {tmp_path} --data {corpus} --eval_tokens 0',
    )
    stretched = f'{tmp_path}/{method}-128.pt'
    run(train, BATCH, f'--init_from {stretched} --length 128 --steps 2 --data {corpus} --out {tmp_path}/on')
    old, new = load_checkpoint(stretched), load_checkpoint(f'{tmp_path}/on')
    assert new['config'] == old['config']
    assert new['args']['length'] == 128
    moved = {k for k in old['model'] if bits(old['model'][k]) != bits(new['model'][k])}
    assert moved
    assert not any(k.endswith(('scale', 'slope')) for k in moved)  # YaRN's temperature stays


def test_drope(corpus, tmp_path):
    """Gelberg et al. 2025: RoPE is dropped for the last eighth, then one temperature at the longer length."""
    run(train, TINY, f'--pe rope --steps 7 --data {corpus} --out {tmp_path}/rope')
    for flag, qk_norm in ('--qk_norm', True), ('--qk_norm full', 'full'), ('--no-qk_norm', False):
        out = f'{tmp_path}/{flag.replace(" ", "-")}'
        run(train, BATCH, f'--init_from {tmp_path}/rope --pe nope {flag} --steps 1 --data {corpus} --out {out}')
        c = load_checkpoint(out)['config']
        assert c['pe'] == 'nope'
        assert c['block_size'] == 64
        assert c['qk_norm'] == qk_norm
        run(extend, HEAD, f'--method uniform --ckpt {out} --data {corpus}')
        run(eval_passkey, f'--ckpt {out}/uniform-128.pt --lengths 96 --depths 1 --trials 1 {CPU}')


def test_a_stretched_model_that_drops_rope_can_be_extended(corpus, rope, tmp_path):
    """YaRN's temperature and frequencies stay behind."""
    run(extend, HEAD, f'--method yarn --ckpt {rope} --data {corpus} --out {tmp_path}')
    flags = f'--init_from {tmp_path}/yarn-128.pt --pe nope --steps 1 --data {corpus} --out {tmp_path}/on'
    said = run(train, BATCH, flags)
    assert 'stay behind' in said
    run(extend, HEAD, f'--method uniform --ckpt {tmp_path}/on --data {corpus}')


def test_yarn_changes_frequencies_and_temperature_only(corpus, rope, tmp_path):
    run(extend, HEAD, f'--method yarn --ckpt {rope} --data {corpus} --out {tmp_path}')
    old, new = load_checkpoint(rope), load_checkpoint(f'{tmp_path}/yarn-128.pt')
    freq, lam = yarn(GPTConfig(**old['config']), 128)
    assert new['config'] == {**old['config'], 'rope_inv_freq': freq}
    for name, value in new['model'].items():
        if name.endswith('scale'):
            assert (value == torch.tensor(lam)).all()
        else:
            assert bits(value) == bits(old['model'][name])
    run(eval_passkey, f'--ckpt {tmp_path}/yarn-128.pt --lengths 96 --depths 1 --trials 1 {CPU}')


# ---------------------------------------------------------------------------------------------------------------------
# perplexity and entropy

@pytest.mark.parametrize('stride, asked, bos', [(8, 64, 7777), (7, 200, 7777), (20, 10**6, None)])
def test_every_length_scores_the_same_tokens(stride, asked, bos):
    docs = [np.arange(n) + 1000 * i for i, n in enumerate((420, 50, 300, 110))]      # a token says where it stands
    seen = {}

    def model(x, y, rows):
        whole = torch.cat((x, y[:, -1:]), dim=1)
        assert (whole[:, bos is not None:].diff() == 1).all()
        assert (whole[:, 0] == (bos or whole[:, 1] - 1)).all()
        assert torch.equal(whole[:, 1:][:, rows], y)
        assert y.size(1) == stride
        seen.setdefault(whole.size(1), []).append(y.flatten())
        return None, torch.tensor(1.0)
    model.flops_per_token = lambda T: T
    got = measure.perplexity(model, docs, bos, [21, 48, 96], stride, asked, ENV, batch_tokens=200)
    assert list(seen) == [21, 48, 96]                # a window is exactly the length named
    scored = [torch.cat(s).sort()[0] for s in seen.values()]
    assert all(torch.equal(s, scored[0]) for s in scored)
    assert scored[0].unique().numel() == scored[0].numel()
    assert (scored[0] % 1000 >= 96).all()            # past the longest
    n = len(scored[0])
    assert min(asked, sum(max(0, len(d) - 96) // stride * stride for d in docs)) <= n < asked + 3 * stride
    assert [r['tokens'] for r in got] == [n] * 3
    assert [r['docs'] for r in got] == [len((scored[0] // 1000).unique())] * 3
    assert [list(r) for r in got] == [['length', 'stride', 'docs', 'tokens', 'nll', 'ppl']] * 3
    assert got[0]['ppl'] == pytest.approx(math.e)


def test_perplexity_is_the_plain_one():
    model, docs = build(), [some(90), some(200)[90:], some(20)]
    ref, want = copy.deepcopy(model).double(), []
    for length in 10, 25, 40:
        nll = []
        for d, end in measure.windows(docs, 40, 6, 60):
            w = torch.tensor([7, *d[end - length + 1:end].tolist()])
            nll += [-ref(w[None, :-1])[0][0, i - 1].log_softmax(-1)[w[i]].item() for i in range(length - 6, length)]
        want.append(sum(nll) / len(nll))
    for batch_tokens in 1, 10**6:
        got = measure.perplexity(model, docs, 7, [10, 25, 40], 6, 60, ENV, batch_tokens)
        assert [r['nll'] for r in got] == pytest.approx(want, abs=1e-5)
        assert [r['ppl'] for r in got] == pytest.approx(np.exp(want).tolist(), rel=1e-5)


def test_the_papers_windows(trained, corpus, tmp_path):
    """
    Wang et al.'s run_ppl.py: [e - L, e) for e = L, L + S, ... < len(document), the last S tokens scored, in order up to
    a budget.
    """
    model, docs = build(), [some(55), some(30)[5:], some(90)]
    ref = copy.deepcopy(model).double()
    got = measure.perplexity(model, docs, 7, [20, 40], 6, 60, ENV, 200, paper=True)
    for row in got:
        nll, seen, L = [], set(), row['length']
        for i, d in enumerate(docs):
            for e in range(L, len(d), 6):
                if len(nll) < 60:
                    w = torch.from_numpy(d[e - L:e].astype('int64'))             # no BOS but the document's own
                    logp = ref(w[None, :-1])[0][0].log_softmax(-1)
                    nll += [-logp[k - 1, w[k]].item() for k in range(L - 6, L)]
                    seen.add(i)
        assert row['nll'] == pytest.approx(sum(nll) / len(nll), abs=1e-5)
        assert row['tokens'] == len(nll) == 60
        assert row['docs'] == len(seen)
    assert [r['docs'] for r in got] == [3, 2]  # 55 tokens hold six windows of 20, but three of 40, and 25 none of 40
    flags = (f'--ckpt {trained} --data {corpus} --method none --out {tmp_path} --lengths 32,64 --stride 8 '
             f'--eval_tokens 64 {CPU} --protocol paper')
    out = run(extend, flags)
    assert "by the paper's rule" in out
    assert out.count('64 tokens of') == 2
    check_refused(
        extend, flags.replace('32,64', '32,999999'), ' : no document of val.bin is longer than 999,999 tokens'
    )


@pytest.mark.parametrize('stride', [1, 5, 9])
def test_uniform_model_has_the_vocabulary_as_perplexity(stride):
    model = build()
    model.lm_head.weight.zero_()
    got = measure.perplexity(model, [some(150)], 7, [10, 16, 77], stride, 200, ENV, 100)
    assert [r['ppl'] for r in got] == pytest.approx([50] * 3, rel=1e-5)


@pytest.mark.parametrize('block', [1, 16, 77, 256])
def test_attention_entropy(block):
    q, k = torch.randn(3, 4, 77, 8) * 3, torch.randn(3, 2, 77, 8)
    a = (
        (q.double() @ k.double().repeat_interleave(2, 1).mT / 8**0.5)
        .masked_fill(torch.ones(77, 77).triu(1).bool(), -math.inf)
        .softmax(-1)
    )
    torch.testing.assert_close(
        measure.attention_entropy(q, k, block).double(), -torch.xlogy(a, a).sum(-1).mean(0), atol=1e-5, rtol=0
    )
    even = measure.attention_entropy(q * 0, k, block)
    torch.testing.assert_close(even, torch.arange(1, 78).log().expand(4, 77), atol=1e-5, rtol=0)


def test_entropies_are_those_of_the_model():
    model, docs = build(), [some(60), some(30), some(80)[9:]]
    got, want = measure.entropies(model, docs, 50, ENV), 0
    for d in docs[0], docs[2]:                       # layer 0 by hand: lambda sharpens
        x, at = model.embed(torch.from_numpy(d[:50].astype(np.int64)))[None], model.blocks[0].attn
        q, k = (
            z.unflatten(-1, (-1, 8)).transpose(1, 2)
            for z in (at.q_proj(F.rms_norm(x, (32,))), at.k_proj(F.rms_norm(x, (32,))))
        )
        want = want + measure.attention_entropy(q * at.scale[:, None, None], k, 50) / 2
    torch.testing.assert_close(got[0], want, atol=1e-3, rtol=0)
    for b in model.blocks:
        b.attn.q_proj.weight.zero_()
    torch.testing.assert_close(
        measure.entropies(model, docs, 50, ENV), torch.arange(1, 51).log().expand(2, 4, 50), atol=1e-5, rtol=0
    )
    assert not any(b.attn._forward_pre_hooks for b in model.blocks)


@pytest.mark.parametrize('pe', ['alibi', 't5'])
def test_entropies_see_the_bias(pe):
    model, n = build(pe=pe), torch.arange(50)[:, None] - torch.arange(50)
    for b in model.blocks:
        b.attn.q_proj.weight.zero_()                 # nothing but the bias is left of the scores
    a = -torch.tensor([1 / 4, 1 / 16, 1 / 64, 1 / 256])[:, None, None] * n
    if pe == 't5':
        a = model.pos_bias.weight.mul_(10)[t5_bucket(n.clamp(min=0))].permute(2, 0, 1)
    a = a.masked_fill(n < 0, -math.inf).double().softmax(-1)
    want = -torch.xlogy(a, a).sum(-1)
    torch.testing.assert_close(
        measure.entropies(model, [some(60)], 50, ENV).double(), want.expand(2, 4, 50), atol=1e-5, rtol=0
    )
    assert (want[:, -1] < 0.98 * math.log(50)).any()


def test_past_scores_the_tokens_of_a_longer_length(trained, corpus, tmp_path):
    flags = f'--method none --stride 8 --eval_tokens 500 --ckpt {trained} --data {corpus} {CPU}'
    run(extend, flags, f'--lengths 24,64,100 --out {tmp_path}/a')
    run(extend, flags, f'--lengths 64 --past 100 --out {tmp_path}/b')
    rows, (row,) = (list(read_csv(tmp_path / f'{x}/ckpt.ppl.csv')) for x in 'ab')
    assert rows[1] == row != rows[2]


def test_entropy_of_short_lengths(trained, corpus, tmp_path):
    run(
        extend, f'--method none --lengths 8,20 --eval_tokens 32 --ckpt {trained} --data {corpus} --out {tmp_path} {CPU}'
    )
    rows = table(tmp_path / 'ckpt.entropy.csv')[1]   # fewer than 32 positions: fewer bands, none of them empty
    assert all(math.isfinite(r[3]) and 1 <= r[2] <= 20 for r in rows)


def count(monkeypatch):
    """-> a list that grows by 'ppl' or 'entropy' with each measurement of either."""
    calls = []
    for what, name in ('ppl', 'perplexity'), ('entropy', 'entropies'):
        def counted(*args, what=what, real=getattr(measure, name), **named):
            calls.append(what)
            return real(*args, **named)
        monkeypatch.setattr(measure, name, counted)
    return calls


@pytest.mark.parametrize('what, files', [('ppl', ['ckpt.ppl.csv']), ('entropy', ['ckpt.entropy.csv'])])
def test_what_is_not_asked_for_is_not_measured(what, files, trained, corpus, tmp_path, monkeypatch):
    calls = count(monkeypatch)
    flags = f'--method none --lengths 64,96 --eval_tokens 500 --ckpt {trained} --data {corpus} {CPU}'
    said = run(extend, flags, f'--measure {what} --out {tmp_path}')
    assert calls == [what]
    assert sorted(f for f in os.listdir(tmp_path) if f.endswith('.csv')) == files
    assert ('perplexity: windows' in said) == (what == 'ppl')
    assert ('attention entropy' in said) == (what == 'entropy')


def test_the_checkpoint_is_measured_once_for_its_extensions(rope, trained, corpus, tmp_path, monkeypatch):
    calls = count(monkeypatch)
    flags = f'--ckpt {rope} --lengths 64,96 --eval_tokens 500 --out {tmp_path} {CPU} --data {corpus} --length 128'
    first = run(extend, flags, '--method pi')
    again = run(extend, flags, '--method pi')
    assert calls == 2 * ['ppl', 'entropy'] + ['ppl', 'entropy']          # checkpoint and extension, then this one alone
    assert 'measured before' in again
    assert again[again.index('perplexity:'):] == first[first.index('perplexity:'):]
    run(extend, flags, '--method yarn --measure ppl')
    assert calls[6:] == ['ppl']
    # whatever makes other numbers
    longer = write_corpus(str(tmp_path / 'longer'), seed=1)
    for change in '--lengths 64,80', '--eval_tokens 400', '--stride 16', '--no-bos', f'--data {longer}', \
            f'--ckpt {trained} --method uniform --grid 1.5 --grid_batches 1 --batch 1':
        del calls[:]
        run(extend, flags, '--method pi --measure ppl', change)
        assert calls == ['ppl', 'ppl'], change
    del calls[:]
    run(extend, flags, '--method none --measure ppl')                    # nothing else is asked for
    run(extend, flags, '--method none --measure ppl')
    assert calls == ['ppl', 'ppl']


def test_long_measurements_are_announced(trained, corpus, tmp_path, monkeypatch):
    """What, how long by its first seconds, and what makes it shorter."""
    flags = f'--ckpt {trained} --lengths 64,96 --out {tmp_path} {CPU}'
    measure = f'--method none --eval_tokens 500 --data {corpus}'
    assert 'this takes' not in run(extend, flags, measure)
    monkeypatch.setattr(runtime, 'LONG', 0)
    monkeypatch.setattr(runtime, 'FIRST', 0)
    said = run(extend, flags, measure)
    assert 'ckpt: perplexity at 2 lengths, 64 to 96 tokens, on 500 tokens each\nthis takes about' in said
    assert 'ckpt: attention entropy on up to 4 documents of 96 tokens\nthis takes about' in said
    assert said.count('this takes about') == 2
    assert '--eval_tokens' in said
    assert '--measure ppl' in said
    said = run(eval_passkey, f'--ckpt {trained} --lengths 80,96 --depths 2 --trials 2 --out {tmp_path} {CPU}')
    assert '8 prompts, 4 at each of 2 lengths from 80 to 96 tokens\nthis takes about' in said
    assert said.count('this takes about') == 1
    assert '--trials' in said


@pytest.mark.parametrize('damage', ['', '{"made_by": ', '[]'])
def test_a_damaged_measurement_is_made_again(damage, rope, corpus, tmp_path):
    flags = f'--ckpt {rope} --lengths 64,96 --eval_tokens 500 --out {tmp_path} {CPU} --data {corpus} --length 128'
    first = run(extend, flags, '--method pi --measure ppl')
    (tmp_path / 'ckpt.measured.json').write_text(damage)
    again = run(extend, flags, '--method pi --measure ppl')
    assert 'measured before' not in again
    assert again[again.index('perplexity:'):] == first[first.index('perplexity:'):]


@pytest.mark.parametrize('method', ['uniform', 'uniform-log'])
def test_an_extension_that_changes_nothing_is_not_measured_again(method, trained, corpus, tmp_path, monkeypatch):
    calls = count(monkeypatch)
    flags = f'--method {method} --grid 1 --grid_batches 1 --batch 1 --length 128 --lengths 64,96 --eval_tokens 500'
    said = run(extend, flags, f'--ckpt {trained} --data {corpus} --out {tmp_path} {CPU}')
    assert calls == ['ppl', 'entropy']
    assert f'{method}-128 is the checkpoint as it was' in said
    for what in 'ppl', 'entropy':
        assert table(tmp_path / f'{method}-128.{what}.csv') == table(tmp_path / f'ckpt.{what}.csv')


@pytest.mark.parametrize('method', ['pi', 'ntk', 'yarn'])
def test_a_formula_needs_no_training_text(method, rope, corpus, tmp_path):
    data = shutil.copytree(corpus, tmp_path / 'data')
    os.remove(data / 'train.bin')
    meta = read_json(data / 'meta.json')
    del meta['train']
    write_json(data / 'meta.json', meta)
    run(extend, f'--method {method} --ckpt {rope} --data {data} --out {tmp_path} --eval_tokens 0 {CPU}')
    assert load_checkpoint(f'{tmp_path}/{method}-256.pt')['extended']['data_fingerprint'] is None


# ---------------------------------------------------------------------------------------------------------------------
# what the scripts write, and what opens it

def test_files(extended, trained, corpus, tmp_path):
    assert sorted(os.listdir(extended)) == [
        'ckpt.entropy.csv',
        'ckpt.measured.json',
        'ckpt.ppl.csv',
        'head-128.entropy.csv',
        'head-128.ppl.csv',
        'head-128.pt',
    ]
    columns, ppl = table(f'{extended}/head-128.ppl.csv')
    assert columns == ['length', 'stride', 'docs', 'tokens', 'nll', 'ppl']
    assert [r[:2] for r in ppl] == [[n, 32] for n in (64, 96, 128)]
    columns, entropy = table(f'{extended}/head-128.entropy.csv')
    assert columns == ['layer', 'head', 'position', 'entropy']
    assert [r[:3] for r in entropy] == [[i, h, p] for i in (0, 1) for h in (0, 1) for p in range(4, 129, 4)]
    ckpt = f'--ckpt {extended}/head-128.pt --out {tmp_path}'
    run(extend, HEAD, '--method none --data', corpus, ckpt)                 # measures the same again
    for kind in 'ppl', 'entropy':
        assert (
            table(f'{tmp_path}/head-128.{kind}.csv')
            == table(f'{extended}/head-128.{kind}.csv')
            != table(f'{extended}/ckpt.{kind}.csv')
        )
    run(eval_passkey, CPU, '--lengths 96,80 --depths 2 --trials 3', ckpt)
    columns, rows = table(tmp_path / 'head-128.passkey.csv')
    assert columns == ['length', 'depth', 'trial', 'position', 'accuracy', 'logprob']
    assert [r[:3] for r in rows] == [[n, d, t] for n in (80, 96) for d in (0, 0.5) for t in range(3)]
    run(train, BATCH, f'--init_from {extended}/head-128.pt --steps 1 --data {corpus} --out {tmp_path}/run')
    new, old = load_checkpoint(f'{tmp_path}/run')['model'], load_checkpoint(f'{extended}/head-128.pt')['model']
    assert all(bits(new[k]) == bits(old[k]) for k in old if 'scale' in k)
    assert bits(new) != bits(old)


def test_two_processes_write_the_same(extended, trained, corpus, tmp_path):
    here = f'--ckpt {trained} --out {tmp_path}'
    started(extend, HEAD, here, f'--data {corpus}', log=tmp_path / 'log', world=2)
    same_weights(tmp_path / 'head-128.pt', f'{extended}/head-128.pt')
    flags = f'--lengths 80,130 --depths 3 --trials 3 {CPU}'
    started(eval_passkey, flags, here, log=tmp_path / 'log', world=2)
    run(eval_passkey, flags, f'--ckpt {trained} --out {extended} --batch_tokens 1')     # nor does the batch matter
    for name in sorted(f for f in os.listdir(tmp_path) if f.endswith('.csv')):
        (columns, x), (columns2, y) = table(f'{extended}/{name}'), table(tmp_path / name)
        assert columns == columns2
        np.testing.assert_allclose(x, y, atol=1e-4, rtol=1e-5)
    assert len(table(tmp_path / 'ckpt.passkey.csv')[1]) == 18
    assert len(table(tmp_path / 'head-128.ppl.csv')[1]) == 3


def test_figures(trained, extended, corpus, tmp_path):
    pytest.importorskip('matplotlib')
    short = f'--ckpt {trained} --data {corpus} --out {tmp_path}'
    run(extend, HEAD, short, f'--plot {tmp_path}/a.png')
    run(extend, HEAD, short, f'--method head-log --plot {tmp_path}/b.png')
    run(extend, HEAD, short, f'--measure entropy --plot {tmp_path}/d.png')
    run(extend, HEAD, short, f'--measure ppl --plot {tmp_path}/e.png')
    run(
        eval_passkey,
        f'--ckpt {extended}/head-128.pt --lengths 96,128 --depths 2 --trials 1 --out {tmp_path}',
        f'--plot {tmp_path}/c.png {CPU}',
    )
    assert all((tmp_path / f'{x}.png').stat().st_size > 10_000 for x in 'abcde')
    check_refused(extend, f'{HEAD} {short}', f'--plot {tmp_path}/nowhere/a.png : --plot folder')
    check_refused(extend, f'{HEAD} {short}', f'--plot {tmp_path}/a.word : --plot figure.png')


# ---------------------------------------------------------------------------------------------------------------------
# bad input

@pytest.mark.parametrize(
    'case',
    [
        '--ckpt nowhere : nowhere train.py',
        '--ckpt {corpus} : {corpus} no checkpoint meta.json',
        '--ckpt {corpus}/val.bin : val.bin not a whole',
        '--ckpt {lfs} : {lfs} not a whole',
        '--data nowhere : nowhere',
        '--data {other} : vocabulary 257',
        '--out {corpus}/val.bin/x',
        '--device cuda',
        '--stride 0',
        '--stride -1',
        '--stride 64 : --stride 64 63',
        '--lengths 0,64',
        '--lengths -5',
        '--lengths 64,9000 : 9,0 val.bin --lengths',
        '--length 0',
        '--length -1',
        '--length 70000 : --length 70,000 train.bin',
        '--init 0.9 : --init 0.9 focus',
        '--init nan',
        '--grid nan,1',
        '--grid_batches 0',
        '--batch 0',
        '--micro_batch 0',
        '--micro_batch -1',
        '--batch_tokens 0',
        '--steps 0',
        '--lr 0',
        '--lr nan',
        '--seed -1',
        '--eval_tokens -1',
        '--measure loss',
        '--measure entropy --lengths 64,9000 : 9,0 val.bin --lengths',
        '--past 0',
        '--past 127 : --past 127 128',
        '--past 200 --protocol paper : --past',
        '--past 99999 : no document val.bin --lengths',
        '--population 3',
        '--iterations 0',
        *(f'--method {m} : {m} rope nope' for m in ('pi', 'ntk', 'ntk-grid', 'yarn', 'longrope')),
    ],
)
def test_bad_input_of_extend(case, corpus, other, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    lfs = tmp_path / 'lfs.pt'
    lfs.write_text('version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4400000000\n')
    check_refused(
        extend,
        f'{HEAD} --ckpt {trained} --data {corpus} --out {tmp_path}/out',
        case.format(corpus=corpus, other=other, lfs=lfs),
    )
    assert not list(tmp_path.glob('out/*'))          # before the work


def test_a_missing_compiler_is_known_before_the_work(corpus, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, 'which', lambda name: None)
    check_refused(extend, f'{HEAD} --ckpt {trained} --data {corpus} --out {tmp_path}/out', '--compile')
    assert not list(tmp_path.glob('out/*'))


def test_what_was_measured_of_the_checkpoint_before_does_not_stay(trained, corpus, tmp_path):
    flags = f'--ckpt {trained} --data {corpus} --out {tmp_path} --method uniform --length 128 --grid_batches 1 {CPU}'
    run(extend, flags, '--grid 1.5 --eval_tokens 500')
    (tmp_path / 'uniform-128.passkey.csv').write_text('length,depth\n')
    kinds = '.ppl.csv', '.entropy.csv', '.passkey.csv'
    assert all((tmp_path / f'uniform-128{kind}').exists() for kind in kinds)
    run(extend, flags, '--grid 2 --eval_tokens 0')
    assert not any((tmp_path / f'uniform-128{kind}').exists() for kind in kinds)


def test_measuring_needs_no_room_for_a_checkpoint(trained, corpus, tmp_path, monkeypatch):
    flags = f'--ckpt {trained} --data {corpus} --out {tmp_path} --length 128 --eval_tokens 500 --measure ppl {CPU}'
    monkeypatch.setattr('shutil.disk_usage', lambda path: SimpleNamespace(free=1000))
    run(extend, flags, '--method none')
    with refused('free some space'):
        run(extend, flags, '--method uniform')


def test_measuring_does_not_ask_for_a_batch_of_every_process():
    args = extend.parse_args(['--ckpt', 'x', '--data', 'y', '--method', 'none', '--stride', '8', '--lengths', '32'])
    sixteen = SimpleNamespace(world=16)
    extension.check(args, False, build(), sixteen)
    args.method = 'uniform'
    with refused('--batch 8', '16 processes'):
        extension.check(args, False, build(), sixteen)


@pytest.mark.parametrize(
    'script, more', [(extend, '--data nowhere --method none'), (eval_passkey, '')], ids=['extend', 'eval']
)
@pytest.mark.parametrize('flags', [
    '--device=--', '--lengths 64,many', '--lengths 64,', '--lengths 64.5', '--len 64', '--dtype fp16', '--seed one'])
def test_bad_flags(script, more, flags, trained, tmp_path):
    with refused(re.match('--[a-z]+', flags)[0]):
        run(script, f'--ckpt {trained} --out {tmp_path}/out {more}', flags)
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize(
    'script, more', [(extend, HEAD), (eval_passkey, f'--lengths 96 {CPU}')], ids=['extend', 'eval']
)
def test_learned_table_has_an_end(script, more, corpus, tmp_path):
    run(train, TINY, f'--pe learned --steps 1 --data {corpus} --out {tmp_path}')
    data = f'--data {corpus}' if script is extend else ''
    with refused('learned', '64'):
        run(script, f'--ckpt {tmp_path}', data, more)


def test_entropy_is_exact_under_autocast():
    q, k = (
        torch.randn(1, 2, 64, 16, generator=torch.Generator().manual_seed(0)) * 3,
        torch.randn(1, 2, 64, 16, generator=torch.Generator().manual_seed(1)),
    )
    with torch.autocast('cpu', torch.bfloat16):      # as it is called from a bf16 forward pass
        got = measure.attention_entropy(q, k, block=24)
    assert got.dtype == torch.float32
    assert torch.equal(got, measure.attention_entropy(q, k, block=24))


def test_an_extended_checkpoint_is_not_extended_again(extended, corpus, tmp_path):
    check_refused(
        extend, f'{HEAD} --ckpt {extended}/head-128.pt --data {corpus} --out {tmp_path}', ' : extended already'
    )
