"""What extend.py and eval_passkey.py promise, each against a plain computation in float64. CPU, fp32, no network."""
import copy
import csv
import math
import os
import re
import shutil
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
from model import ENCODINGS, GPT, GPTConfig, t5_bucket
from results import fit
from test_train import BATCH, CPU, TINY, bits, close, corpus, other, refused, run, start, trained, wait      # noqa: F401 (some are fixtures)

ENV = io.setup(SimpleNamespace(device='cpu', dtype='fp32', seed=0))
HEAD = f'--method head --length 128 --steps 4 --batch 4 --grid 0.8,1,1.2 --grid_batches 1 --lengths 128,64,96 --eval_tokens 500 {CPU}'


def build(**shape):
    """A small network in which no attention is nearly uniform, with another temperature for each head."""
    torch.manual_seed(1)
    shape = dict(block_size=16, vocab_size=50, n_layer=2, n_head=4, n_kv_head=2, n_embd=32, n_inner=48) | shape
    model = GPT(GPTConfig(**shape)).requires_grad_(False)
    for p in model.parameters():
        p.mul_(2 if p.dim() == 2 else 1)
    extend.set_heads(model, torch.rand(2, 4) + 0.5)
    return model


def some(*shape):
    return np.random.default_rng(0).integers(50, size=shape).astype(np.uint16)


def knobs(**changed):
    """extend.py's flags, as its functions get them."""
    return SimpleNamespace(**dict(length=40, batch=8, micro_batch=8, seed=3, method='head', lr=0.03, steps=20, focus=True, compile=False, activation_checkpointing=False,
                                  grid=[0.5, 1, 1.7], grid_batches=2) | changed)


def table(file):
    """A csv file's columns and rows; numbers as floats."""
    with open(file) as f:
        rows = list(csv.reader(f))
    return rows[0], [[float(x) for x in r] for r in rows[1:]]


@pytest.fixture(scope='session')
def extended(trained, corpus, tmp_path_factory):
    """The folder of a head-tuned checkpoint and its measurements."""
    out = str(tmp_path_factory.mktemp('extended'))
    assert run(extend.main, HEAD, f'--ckpt {trained} --data {corpus} --out {out}') == 0
    return out


# ---------------------------------------------------------------------------------------------------------------------
# extending

def test_tuning_changes_the_temperatures_only(extended, trained):
    old, new = io.load_checkpoint(trained), io.load_checkpoint(f'{extended}/head-128.pt')
    changed = {k for k in old['model'] if bits(old['model'][k]) != bits(new['model'][k])}
    assert changed == {f'blocks.{i}.attn.scale' for i in (0, 1)} and list(old['model']) == list(new['model'])
    assert all(new['model'][k].dtype == torch.float32 and new['model'][k].min() >= 1 for k in changed)
    assert {k for k in old if bits(old[k]) != bits(new[k])} == {'model', 'optimizer', 'extended'} and new['optimizer'] is None
    how = new['extended']
    assert how['method'] == 'head' and how['length'] == 128 and len(how['losses']) == 4 and [lam for lam, _ in how['curve']] == [0.8, 1, 1.2]
    assert how['tokens'] == (4 + 3) * 4 * 128 and how['heads'] == [b.tolist() for k, b in new['model'].items() if k.endswith('scale')]


@pytest.mark.parametrize('focus', [True, False])
def test_tuning_follows_the_paper(focus):
    model, data, args = build(), some(2000), knobs(focus=focus)
    extend.set_heads(model, 1.05)
    model.lm_head.weight.mul_(10)                    # gradients large enough to be clipped
    ref, clipped = copy.deepcopy(model).double(), 0
    losses = extend.tune(model, data, 7, args, ENV)
    lam, m, v = torch.full((2, 4), 1.05).double(), 0, 0
    for t in range(20):                              # AdamW without decay, its gradient from the whole logits
        for b, row in zip(ref.blocks, lam):
            b.attn.scale = torch.nn.Parameter(row.clone())
        x, y = io.get_batch(data, 7, 8, 40, 3, t)
        loss = F.cross_entropy(ref(x)[0].flatten(0, 1), y.flatten())
        assert losses[t] == pytest.approx(loss.item(), abs=1e-5)
        g = torch.stack(torch.autograd.grad(loss, [b.attn.scale for b in ref.blocks]))
        g, clipped = g / max(1, g.norm()), clipped + (g.norm() > 1)
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g ** 2
        lr = 0.03 * (0.5, 1)[t] if t < 2 else 0.03 * (0.55 + 0.45 * math.cos(math.pi * (t - 2) / 18))
        lam = lam - lr * (m / (1 - 0.9 ** (t + 1))) / ((v / (1 - 0.95 ** (t + 1))).sqrt() + 1e-8)
        lam = lam.clamp(min=1) if focus else lam
    torch.testing.assert_close(extend.heads(model).double(), lam, atol=1e-4, rtol=0)
    assert (lam.min() >= 1) == focus and lam.std() > 0.05 and 0 < clipped


@pytest.mark.parametrize('pe', ENCODINGS)
def test_matrices_kept_in_bf16_change_no_number(pe):
    """io.frozen casts once what autocast casts at each use: the same logits, losses and temperatures, bit for bit."""
    env, found = SimpleNamespace(**vars(ENV) | dict(dtype='bf16', autocast=lambda: torch.autocast('cpu', torch.bfloat16))), []
    for keep in io.frozen, lambda model, env: model:
        model = keep(build(pe=pe, block_size=64), env)
        assert {p.dtype for n, p in model.named_parameters() if n.endswith('proj.weight')} == {torch.bfloat16 if keep is io.frozen else torch.float32}
        assert all(p.dtype == torch.float32 for n, p in model.named_parameters() if not n.endswith(('proj.weight', 'head.weight')))
        x = torch.from_numpy(some(2, 24).astype('int64'))
        with torch.no_grad(), env.autocast():
            found.append([model(x)[0], model(x, x)[1], model.generate(x, 8, temperature=0)])
        found[-1] += [torch.tensor(extend.tune(model, some(2000), 7, knobs(steps=3), env)), extend.heads(model)]
    assert all(torch.equal(a, b) for a, b in zip(*found))


def test_tuning_in_bf16_saves_the_weights_as_they_were(trained, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(io, 'pick_dtype', lambda *_: ('bf16', 'emulated where the CPU has none'))
    assert run(extend.main, HEAD.replace('--dtype fp32', ''), f'--dtype bf16 --eval_tokens 0 --ckpt {trained} --data {corpus} --out {tmp_path}') == 0
    old, new = io.load_checkpoint(trained), io.load_checkpoint(f'{tmp_path}/head-128.pt')
    assert {k for k in old['model'] if bits(old['model'][k]) != bits(new['model'][k])} == {f'blocks.{i}.attn.scale' for i in (0, 1)}


def test_a_model_shares_its_weights_with_the_checkpoint(trained):
    ckpt = io.load_checkpoint(trained)
    model = io.load_model(ckpt)
    assert all(p.data_ptr() == ckpt['model'][k].data_ptr() for k, p in model.state_dict().items())
    assert {k for k, p in model.named_parameters() if not p.requires_grad} == {f'blocks.{i}.attn.{what}' for i in (0, 1) for what in ('scale', 'slope')}
    for dtype in torch.float32, torch.bfloat16:      # a converted one, its head and embedding one tensor there
        ckpt['model']['embed.weight'] = ckpt['model']['lm_head.weight'] = ckpt['model']['embed.weight'].to(dtype)
        model = io.load_model(ckpt)
        assert {p.dtype for p in model.parameters()} == {torch.float32} and model.embed.weight.data_ptr() != model.lm_head.weight.data_ptr()


def test_focus_holds_at_any_rate():
    lowest = []
    for focus in True, False:
        model = build()
        extend.set_heads(model, 1)
        extend.tune(model, some(2000), 7, knobs(lr=5, steps=3, focus=focus), ENV)
        lowest.append(extend.heads(model).min())
    assert lowest[0] >= 1 > lowest[1]


def test_micro_batches_change_nothing():
    made, data = [], some(2000)
    for micro in 8, 1, 3:
        model, args = build(), knobs(micro_batch=micro, steps=10)
        curve = extend.uniform(model, data, 7, args, ENV)[1]
        made.append(np.concatenate((np.array(curve)[:, 1], extend.tune(model, data, 7, args, ENV), extend.heads(model).flatten())))
    for m in made[1:]:
        np.testing.assert_allclose(m, made[0], atol=1e-5)


def test_uniform_takes_the_lowest_loss(capsys):
    model, data, args = build(), some(2000), knobs()
    best, curve = extend.uniform(model, data, 7, args, ENV)
    ref = copy.deepcopy(model).double()
    for lam, loss in curve:
        for b in ref.blocks:
            b.attn.scale.fill_(lam)
        batches = [io.get_batch(data, 7, 8, 40, 3, 10**9 + i) for i in range(2)]
        want = [F.cross_entropy(ref(x)[0].flatten(0, 1), y.flatten()).item() for x, y in batches]
        assert loss == pytest.approx(sum(want) / 2, abs=1e-5)
    assert [lam for lam, _ in curve] == args.grid and best == min(curve, key=lambda c: c[1])[0] == args.grid[0]
    assert (extend.heads(model) == best).all() and re.search(r' 0\.50 .*best', capsys.readouterr().out)


def test_the_grid_and_the_tuning_see_different_batches(monkeypatch):
    seen, real = [], io.get_batch
    monkeypatch.setattr(io, 'get_batch', lambda *a: seen.append(real(*a)[0]) or (seen[-1], seen[-1]))
    model, args = build(), knobs(steps=4)
    extend.uniform(model, some(4000), None, args, ENV)
    grid, seen[:] = {x.numpy().tobytes() for x in seen}, []
    extend.tune(model, some(4000), None, args, ENV)
    tuning = {x.numpy().tobytes() for x in seen}
    assert len(grid) == 2 and len(tuning) == 4 and not grid & tuning     # every lambda on the same two


@pytest.mark.parametrize('init', ['best', '1.3'])
def test_where_head_tuning_starts(init, trained, corpus, tmp_path):
    flags = f'--init {init} --steps 1 --lr 1e-9 --eval_tokens 0 --grid 1.2,1.4 --ckpt {trained} --data {corpus} --out {tmp_path}'
    assert run(extend.main, HEAD, flags) == 0
    how = io.load_checkpoint(f'{tmp_path}/head-128.pt')['extended']
    want = 1.3 if init == '1.3' else min(how['curve'], key=lambda c: c[1])[0]
    np.testing.assert_allclose(how['heads'], want, atol=1e-6)
    assert os.listdir(tmp_path) == ['head-128.pt']   # --eval_tokens 0 measures nothing


def test_fit_of_the_best_temperature(trained, extended, corpus, tmp_path, capsys):
    s = np.array([1.5, 2, 4, 8])
    assert fit.fit(s, 1 + 0.3 * np.log(s)) == (pytest.approx(0.3), pytest.approx(1))
    lam = np.array([1.2, 1.2, 1.5, 1.6])             # by a general solver, and R2 by its definition
    a, r2 = fit.fit(s, lam)
    assert a == pytest.approx(np.linalg.lstsq(np.log(s)[:, None], lam - 1, rcond=None)[0][0])
    assert r2 == pytest.approx(1 - ((lam - 1 - a * np.log(s)) ** 2).mean() / lam.var())
    assert fit.lowest([(x, 2 + (x - 1.23) ** 2) for x in (1.6, 1.0, 1.2, 1.4)]) == pytest.approx(1.23)
    assert fit.lowest([(1.0, 2.0), (1.1, 2.1), (1.2, 2.3)]) == 1                                    # the edge of the grid
    for n in 96, 128:
        assert run(extend.main, HEAD, f'--method uniform --length {n} --eval_tokens 0 --ckpt {trained} --data {corpus} --out {tmp_path}') == 0
    capsys.readouterr()
    assert run(fit.main, f'{tmp_path}/uniform-128.pt {tmp_path}/uniform-96.pt') == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[1:3]] == [['96', '1.5x'], ['128', '2x']] and re.fullmatch(r'lambda = 1 \+ -?\d\.\d{4} ln s, R2 -?\d+\.\d{4}', lines[3])
    refused(capsys, fit.main, f'{tmp_path}/uniform-128.pt', ' : two lengths')
    refused(capsys, fit.main, f'{tmp_path}/uniform-128.pt {extended}/head-128.pt', ' : not made by uniform')


@pytest.mark.parametrize('method', ['uniform-log', 'head-log'])
def test_log_methods_leave_the_window_alone(method, trained, corpus, tmp_path, capsys):
    assert run(extend.main, HEAD, f'--method {method} --grid 1.2,1.6 --eval_tokens 0 --ckpt {trained} --data {corpus} --out {tmp_path}') == 0
    old, new = io.load_checkpoint(trained), io.load_checkpoint(f'{tmp_path}/{method}-128.pt')
    assert {k for k in old['model'] if bits(old['model'][k]) != bits(new['model'][k])} == {f'blocks.{i}.attn.slope' for i in (0, 1)}
    before, after, L = io.load_model(old), io.load_model(new), old['config']['block_size']
    slopes, best = extend.heads(after, 'slope'), min(new['extended']['curve'], key=lambda c: c[1])[0]
    assert new['extended']['slopes'] == slopes.tolist() and (slopes >= 0).all() and len(new['extended']['losses']) == (4 if method == 'head-log' else 0)
    if method == 'uniform-log':                      # --grid names the temperature at --length
        torch.testing.assert_close(1 + slopes * math.log(128 / L), torch.full_like(slopes, best))
    # at --length it is the method without -log; the window is the base's; in between the temperature is
    assert run(extend.main, HEAD, f'--method {method[:-4]} --grid 1.2,1.6 --eval_tokens 0 --ckpt {trained} --data {corpus} --out {tmp_path}') == 0
    flat, idx = io.load_model(io.load_checkpoint(f'{tmp_path}/{method[:-4]}-128.pt')), torch.randint(before.config.vocab_size, (2, 128))
    torch.testing.assert_close(1 + slopes * math.log(128 / L), extend.heads(flat))
    with torch.no_grad():
        torch.testing.assert_close(after(idx)[0], flat(idx)[0])
        assert torch.equal(after(idx[:, :L])[0], before(idx[:, :L])[0]) and (after(idx[:, :L + 8])[0] != before(idx[:, :L + 8])[0]).any()
    refused(capsys, extend.main, f'{HEAD} --ckpt {trained} --data {corpus} --method {method} --length {L}', ' : past the training length')
    refused(capsys, extend.main, f'{HEAD} --ckpt {tmp_path}/{method}-128.pt --data {corpus}', ' : extended already')


def test_stretched_frequencies():
    c, s = GPTConfig(block_size=512, n_embd=128, n_head=2, n_kv_head=2, pe='rope', rope_theta=10000.0), 4
    plain = np.array([10000 ** (-2 * i / 64) for i in range(32)])
    freq, lam = extend.pi(c, 2048)
    np.testing.assert_allclose(freq, plain / s)
    assert lam == 1
    freq, lam = extend.ntk(c, 2048)                  # the factors of DroPE's eq. 10: s^(-2m / (d - 2)), so that the lowest is PI's
    np.testing.assert_allclose(freq, plain * s ** (-2 * np.arange(32) / 62))
    assert lam == 1 and freq[0] == 1 and freq[-1] == pytest.approx(plain[-1] / s)
    for method in extend.ROPE.values():
        np.testing.assert_allclose(method(c, 512)[0], plain)


def test_stretched_frequencies_equal_transformers():
    hf = pytest.importorskip('transformers')
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    c = GPTConfig(block_size=512, n_embd=128, n_head=2, n_kv_head=2, pe='rope')
    for name, theirs in ('pi', 'linear'), ('ntk', 'dynamic'), ('yarn', 'yarn'):
        rope = dict(rope_type=theirs, factor=4.0, rope_theta=10000.0, **(dict(original_max_position_embeddings=512) if theirs == 'yarn' else {}))
        config = hf.LlamaConfig(hidden_size=128, num_attention_heads=2, max_position_embeddings=512, rope_parameters=rope)
        config.standardize_rope_params()
        if theirs == 'dynamic':                      # at length l it is the static one for s = f l / L - (f - 1)
            freq, factor = ROPE_INIT_FUNCTIONS[theirs](config, 'cpu', seq_len=896)
        else:
            freq, factor = ROPE_INIT_FUNCTIONS[theirs](config, 'cpu')
        ours, lam = extend.ROPE[name](c, 2048)
        np.testing.assert_allclose(ours, freq, rtol=1e-5)
        assert lam == pytest.approx(factor ** 2)


def test_longrope(corpus, tmp_path, capsys):
    assert run(train.main, TINY, f'--pe rope --steps 1 --data {corpus} --out {tmp_path}') == 0
    flags = f'{HEAD} --method longrope --population 8 --iterations 3 --ckpt {tmp_path} --data {corpus} --eval_tokens 0'
    assert run(extend.main, flags) == run(extend.main, flags, f'--out {tmp_path}/again') == 0
    old, new, again = (io.load_checkpoint(f'{tmp_path}/{f}.pt') for f in ('ckpt', 'longrope-128', 'again/longrope-128'))
    assert new['config'] == again['config'] and bits(new['model']) == bits(again['model'])
    lam = 1 + math.log(128 / 64) / math.log(64)      # the square of transformers' attention_factor
    assert all(bits(v) == bits(old['model'][k]) or k.endswith('.scale') and (v == torch.tensor(lam)).all() for k, v in new['model'].items())
    c, tried = GPTConfig(**new['config']), new['extended']['curve']
    divisors = np.array(extend.rope_frequencies(c)) / c.rope_inv_freq
    assert (divisors > 1 - 1e-5).all() and (np.diff(divisors) > -1e-5).all() and divisors.max() <= 1.25 * 128 / 64 + 1e-5 and c.rope_start in extend.N_HAT
    assert [n for n, _ in tried] == sorted(n for n, _ in tried) and len(tried) == 4 and [x for _, x in tried] == sorted((x for _, x in tried), reverse=True)
    # the loss that it reports is that of the checkpoint, and no worse than the methods that it began with
    args = knobs(length=128, batch=4, micro_batch=4, seed=314, grid_batches=1)
    data, meta = io.open_data(corpus, 'train')
    assert tried[-1][1] == pytest.approx(extend.loss_of(io.load_model(new), data, meta['bos'], args, ENV), abs=1e-6)
    for name, method in extend.ROPE.items():
        seed = io.load_model({**old, 'config': {**old['config'], 'rope_inv_freq': method(GPTConfig(**old['config']), 128)[0]}})
        extend.set_heads(seed, lam)
        assert tried[-1][1] <= extend.loss_of(seed, data, meta['bos'], args, ENV) + 1e-6
    assert run(eval_passkey.main, f'--ckpt {tmp_path}/longrope-128.pt --lengths 96 --depths 1 --trials 1 --decode {CPU}') == 0
    refused(capsys, extend.main, f'{HEAD} --ckpt {tmp_path}/longrope-128.pt --data {corpus} --method pi', ' : extended already')


@pytest.mark.parametrize('pe', ENCODINGS)
def test_the_whole_way(pe, corpus, tmp_path):
    """Every encoding trains, is extended by temperatures, measured, decoded, and trained on at another length."""
    n = 64 if pe == 'learned' else 128               # a table ends
    assert run(train.main, TINY, f'--pe {pe} --steps 2 --data {corpus} --out {tmp_path}') == 0
    assert run(extend.main, HEAD, f'--ckpt {tmp_path} --data {corpus} --length {n} --lengths 48,{n} --steps 2 --grid 1,1.2') == 0
    ppl, entropy = (table(tmp_path / f'head-{n}.{what}.csv')[1] for what in ('ppl', 'entropy'))
    assert len(ppl) == 2 and all(math.isfinite(x) for r in ppl + entropy for x in r)
    if pe != 'learned':                              # 64 tokens hold no prompt
        assert run(eval_passkey.main, f'--ckpt {tmp_path}/head-{n}.pt --lengths {n} --depths 2 --trials 1 --decode {CPU}') == 0
    assert run(train.main, BATCH, f'--init_from {tmp_path}/head-{n}.pt --length {n} --steps 1 --data {corpus} --out {tmp_path}/on') == 0


@pytest.mark.parametrize('method', ['pi', 'ntk', 'yarn', 'longrope'])
def test_a_stretched_model_is_trained_on(method, corpus, tmp_path):
    assert run(train.main, TINY, f'--pe rope --steps 1 --data {corpus} --out {tmp_path}') == 0
    assert run(extend.main, HEAD, f'--method {method} --population 4 --iterations 1 --ckpt {tmp_path} --data {corpus} --eval_tokens 0') == 0
    stretched = f'{tmp_path}/{method}-128.pt'
    assert run(train.main, BATCH, f'--init_from {stretched} --length 128 --steps 2 --data {corpus} --out {tmp_path}/on') == 0
    old, new = io.load_checkpoint(stretched), io.load_checkpoint(f'{tmp_path}/on')
    assert new['config'] == old['config'] and new['args']['length'] == 128
    moved = {k for k in old['model'] if bits(old['model'][k]) != bits(new['model'][k])}
    assert moved and not any(k.endswith(('scale', 'slope')) for k in moved)      # YaRN's temperature stays


def test_drope(corpus, tmp_path):
    """Gelberg et al. 2025: train with RoPE, drop it for the last eighth at the same length, then one temperature at the longer one."""
    assert run(train.main, TINY, f'--pe rope --steps 7 --data {corpus} --out {tmp_path}/rope') == 0
    for flag in '--qk_norm', '--no-qk_norm':
        out = f'{tmp_path}/{flag}'
        assert run(train.main, BATCH, f'--init_from {tmp_path}/rope --pe nope {flag} --steps 1 --data {corpus} --out {out}') == 0
        c = io.load_checkpoint(out)['config']
        assert c['pe'] == 'nope' and c['block_size'] == 64 and c['qk_norm'] == (flag == '--qk_norm')
        assert run(extend.main, HEAD, f'--method uniform --ckpt {out} --data {corpus}') == 0
        assert run(eval_passkey.main, f'--ckpt {out}/uniform-128.pt --lengths 96 --depths 1 --trials 1 {CPU}') == 0


def test_yarn(corpus, tmp_path, capsys):
    c = GPTConfig(block_size=1024, n_embd=128, n_head=2, n_kv_head=2, pe='rope')
    freq, lam = extend.yarn(c, 4096)
    plain = [10000 ** (-i / 32) for i in range(32)]
    ratio = [f / p for f, p in zip(freq, plain)]
    # kept above 32 turns in the training length, divided by 4 below one, in between in between
    turns = [1024 * p / math.tau for p in plain]
    assert ratio == sorted(ratio, reverse=True) and all(r == pytest.approx(1 if t >= 32 else 1 / 4) for r, t in zip(ratio, turns) if not 1 < t < 32)
    assert any(r < 0.99 and t > 20 for r, t in zip(ratio, turns)) and any(r > 0.26 and t < 2 for r, t in zip(ratio, turns))
    assert lam == pytest.approx((0.1 * math.log(4) + 1) ** 2) and extend.yarn(c, 1024) == (pytest.approx(plain), 1)
    assert run(train.main, TINY, f'--pe rope --steps 1 --data {corpus} --out {tmp_path}') == 0
    assert run(extend.main, HEAD, f'--method yarn --ckpt {tmp_path} --data {corpus}') == 0
    old, new = (io.load_checkpoint(f'{tmp_path}/{f}.pt') for f in ('ckpt', 'yarn-128'))
    freq, lam = extend.yarn(GPTConfig(**old['config']), 128)
    assert new['config'] == {**old['config'], 'rope_inv_freq': freq}
    assert all((v == torch.tensor(lam)).all() if k.endswith('scale') else bits(v) == bits(old['model'][k]) for k, v in new['model'].items())
    assert run(eval_passkey.main, f'--ckpt {tmp_path}/yarn-128.pt --lengths 96 --depths 1 --trials 1 {CPU}') == 0
    refused(capsys, extend.main, f'{HEAD} --ckpt {tmp_path}/yarn-128.pt --data {corpus} --method yarn', ' : extended already')


# ---------------------------------------------------------------------------------------------------------------------
# perplexity and entropy

@pytest.mark.parametrize('stride, asked, bos', [(8, 64, 7777), (7, 200, 7777), (20, 10**6, None)])
def test_every_length_scores_the_same_tokens(stride, asked, bos):
    docs = [np.arange(n) + 1000 * i for i, n in enumerate((420, 50, 300, 110))]      # a token says where it stands
    seen = {}

    def model(x, y, rows):
        whole = torch.cat((x, y[:, -1:]), dim=1)
        assert (whole[:, bos is not None:].diff() == 1).all() and (whole[:, 0] == (bos or whole[:, 1] - 1)).all()
        assert torch.equal(whole[:, 1:][:, rows], y) and y.size(1) == stride
        seen.setdefault(whole.size(1), []).append(y.flatten())
        return None, torch.tensor(1.0)
    got = extend.perplexity(model, docs, bos, [21, 48, 96], stride, asked, ENV, batch_tokens=200)
    assert list(seen) == [21, 48, 96]                # a window is exactly the length named
    scored = [torch.cat(s).sort()[0] for s in seen.values()]
    assert all(torch.equal(s, scored[0]) for s in scored) and scored[0].unique().numel() == scored[0].numel()
    assert (scored[0] % 1000 >= 96).all()            # past the longest
    n = len(scored[0])
    assert min(asked, sum(max(0, len(d) - 96) // stride * stride for d in docs)) <= n < asked + 3 * stride
    assert [r['tokens'] for r in got] == [n] * 3 and [r['docs'] for r in got] == [len((scored[0] // 1000).unique())] * 3
    assert [list(r) for r in got] == [['length', 'stride', 'docs', 'tokens', 'nll', 'ppl']] * 3 and got[0]['ppl'] == pytest.approx(math.e)


def test_perplexity_is_the_plain_one():
    model, docs = build(), [some(90), some(200)[90:], some(20)]
    ref, want = copy.deepcopy(model).double(), []
    for length in 10, 25, 40:
        nll = []
        for d, end in extend.windows(docs, 40, 6, 60):
            w = torch.tensor([7, *d[end - length + 1:end].tolist()])
            nll += [-ref(w[None, :-1])[0][0, i - 1].log_softmax(-1)[w[i]].item() for i in range(length - 6, length)]
        want.append(sum(nll) / len(nll))
    for batch_tokens in 1, 10**6:
        got = extend.perplexity(model, docs, 7, [10, 25, 40], 6, 60, ENV, batch_tokens)
        assert [r['nll'] for r in got] == pytest.approx(want, abs=1e-5) and [r['ppl'] for r in got] == pytest.approx(np.exp(want).tolist(), rel=1e-5)


def test_the_papers_windows(trained, corpus, tmp_path, capsys):
    """Wang et al.'s run_ppl.py as its protocol is described: [e - L, e) for e = L, L + S, ... < len(document), the last S tokens scored, in order up to a budget."""
    model, docs = build(), [some(55), some(30)[5:], some(90)]
    ref = copy.deepcopy(model).double()
    got = extend.perplexity(model, docs, 7, [20, 40], 6, 60, ENV, 200, paper=True)
    for row in got:
        nll, seen, L = [], set(), row['length']
        for i, d in enumerate(docs):
            for e in range(L, len(d), 6):
                if len(nll) < 60:
                    w = torch.from_numpy(d[e - L:e].astype('int64'))             # no BOS but the document's own
                    logp = ref(w[None, :-1])[0][0].log_softmax(-1)
                    nll += [-logp[k - 1, w[k]].item() for k in range(L - 6, L)]
                    seen.add(i)
        assert row['nll'] == pytest.approx(sum(nll) / len(nll), abs=1e-5) and row['tokens'] == len(nll) == 60 and row['docs'] == len(seen)
    assert [r['docs'] for r in got] == [3, 2]        # 55 tokens hold six windows of 20, but three of 40, and 25 none of 40
    flags = f'--ckpt {trained} --data {corpus} --method none --out {tmp_path} --lengths 32,64 --stride 8 --eval_tokens 64 {CPU} --protocol paper'
    assert run(extend.main, flags) == 0
    out = capsys.readouterr().out
    assert "by the paper's rule" in out and out.count('64 tokens of') == 2
    refused(capsys, extend.main, flags.replace('32,64', '32,999999'), ' : no document of val.bin is longer than 999,999 tokens')


@pytest.mark.parametrize('stride', [1, 5, 9])
def test_uniform_model_has_the_vocabulary_as_perplexity(stride):
    model = build()
    model.lm_head.weight.zero_()
    got = extend.perplexity(model, [some(150)], 7, [10, 16, 77], stride, 200, ENV, 100)
    assert [r['ppl'] for r in got] == pytest.approx([50] * 3, rel=1e-5)


@pytest.mark.parametrize('block', [1, 16, 77, 256])
def test_attention_entropy(block):
    q, k = torch.randn(3, 4, 77, 8) * 3, torch.randn(3, 2, 77, 8)
    a = (q.double() @ k.double().repeat_interleave(2, 1).mT / 8 ** 0.5).masked_fill(torch.ones(77, 77).triu(1).bool(), -math.inf).softmax(-1)
    torch.testing.assert_close(extend.attention_entropy(q, k, block).double(), -torch.xlogy(a, a).sum(-1).mean(0), atol=1e-5, rtol=0)
    even = extend.attention_entropy(q * 0, k, block)
    torch.testing.assert_close(even, torch.arange(1, 78).log().expand(4, 77), atol=1e-5, rtol=0)


def test_entropies_are_those_of_the_model():
    model, docs = build(), [some(60), some(30), some(80)[9:]]
    got, want = extend.entropies(model, docs, 50, ENV), 0
    for d in docs[0], docs[2]:                       # layer 0 by hand: lambda sharpens
        x, at = model.embed(torch.from_numpy(d[:50].astype(np.int64)))[None], model.blocks[0].attn
        q, k = (z.unflatten(-1, (-1, 8)).transpose(1, 2) for z in (at.q_proj(F.rms_norm(x, (32,))), at.k_proj(F.rms_norm(x, (32,)))))
        want = want + extend.attention_entropy(q * at.scale[:, None, None], k, 50) / 2
    torch.testing.assert_close(got[0], want, atol=1e-3, rtol=0)
    for b in model.blocks:
        b.attn.q_proj.weight.zero_()
    torch.testing.assert_close(extend.entropies(model, docs, 50, ENV), torch.arange(1, 51).log().expand(2, 4, 50), atol=1e-5, rtol=0)
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
    torch.testing.assert_close(extend.entropies(model, [some(60)], 50, ENV).double(), want.expand(2, 4, 50), atol=1e-5, rtol=0)
    assert (want[:, -1] < 0.98 * math.log(50)).any()


def test_past_scores_the_tokens_of_a_longer_length(trained, corpus, tmp_path):
    flags = f'--method none --stride 8 --eval_tokens 500 --ckpt {trained} --data {corpus} {CPU}'
    assert run(extend.main, flags, f'--lengths 24,64,100 --out {tmp_path}/a') == run(extend.main, flags, f'--lengths 64 --past 100 --out {tmp_path}/b') == 0
    rows, (row,) = (list(io.read_csv(tmp_path / f'{x}/ckpt.ppl.csv')) for x in 'ab')
    assert rows[1] == row != rows[2]


def test_entropy_of_short_lengths(trained, corpus, tmp_path):
    assert run(extend.main, f'--method none --lengths 8,20 --eval_tokens 32 --ckpt {trained} --data {corpus} --out {tmp_path} {CPU}') == 0
    rows = table(tmp_path / 'ckpt.entropy.csv')[1]   # fewer than 32 positions: fewer bands, none of them empty
    assert all(math.isfinite(r[3]) and 1 <= r[2] <= 20 for r in rows)


# ---------------------------------------------------------------------------------------------------------------------
# what the scripts write, and what opens it

def test_files(extended, trained, corpus, tmp_path, capsys):
    assert sorted(os.listdir(extended)) == ['ckpt.entropy.csv', 'ckpt.ppl.csv', 'head-128.entropy.csv', 'head-128.ppl.csv', 'head-128.pt']
    columns, ppl = table(f'{extended}/head-128.ppl.csv')
    assert columns == ['length', 'stride', 'docs', 'tokens', 'nll', 'ppl'] and [r[:2] for r in ppl] == [[n, 32] for n in (64, 96, 128)]
    columns, entropy = table(f'{extended}/head-128.entropy.csv')
    assert columns == ['layer', 'head', 'position', 'entropy']
    assert [r[:3] for r in entropy] == [[i, h, p] for i in (0, 1) for h in (0, 1) for p in range(4, 129, 4)]
    ckpt = f'--ckpt {extended}/head-128.pt --out {tmp_path}'
    assert run(extend.main, HEAD, '--method none --data', corpus, ckpt) == 0                 # measures the same again
    for kind in 'ppl', 'entropy':
        assert table(f'{tmp_path}/head-128.{kind}.csv') == table(f'{extended}/head-128.{kind}.csv') != table(f'{extended}/ckpt.{kind}.csv')
    assert run(eval_passkey.main, CPU, '--lengths 96,80 --depths 2 --trials 3', ckpt) == 0
    columns, rows = table(tmp_path / 'head-128.passkey.csv')
    assert columns == ['length', 'depth', 'trial', 'position', 'accuracy', 'logprob']
    assert [r[:3] for r in rows] == [[n, d, t] for n in (80, 96) for d in (0, 0.5) for t in range(3)]
    assert run(train.main, BATCH, f'--init_from {extended}/head-128.pt --steps 1 --data {corpus} --out {tmp_path}/run') == 0
    new, old = io.load_checkpoint(f'{tmp_path}/run')['model'], io.load_checkpoint(f'{extended}/head-128.pt')['model']
    assert all(bits(new[k]) == bits(old[k]) for k in old if 'scale' in k) and bits(new) != bits(old)
    assert [io.stem(f) for f in (trained, f'{trained}/ckpt.prev.pt', f'{extended}/head-128.pt')] == ['ckpt', 'ckpt', 'head-128']


def test_two_processes_write_the_same(extended, trained, corpus, tmp_path):
    here = f'--ckpt {trained} --out {tmp_path}'
    assert wait(start(extend.main, HEAD, here, f'--data {corpus}', log=tmp_path / 'log', world=2)) == [0, 0]
    close(tmp_path / 'head-128.pt', f'{extended}/head-128.pt')
    flags = f'--lengths 80,130 --depths 3 --trials 3 {CPU}'
    assert wait(start(eval_passkey.main, flags, here, log=tmp_path / 'log', world=2)) == [0, 0]
    assert run(eval_passkey.main, flags, f'--ckpt {trained} --out {extended} --batch_tokens 1') == 0     # nor does the batch matter
    for name in sorted(f for f in os.listdir(tmp_path) if f.endswith('.csv')):
        (columns, x), (columns2, y) = table(f'{extended}/{name}'), table(tmp_path / name)
        assert columns == columns2
        np.testing.assert_allclose(x, y, atol=1e-4, rtol=1e-5)
    assert len(table(tmp_path / 'ckpt.passkey.csv')[1]) == 18 and len(table(tmp_path / 'head-128.ppl.csv')[1]) == 3


def test_a_grid_that_was_stopped_goes_on(extended, trained, tmp_path, capsys):
    flags, file = f'--lengths 80,96,130 --depths 3 --trials 2 --batch_tokens 300 {CPU}', tmp_path / 'a/ckpt.passkey.csv'
    assert run(eval_passkey.main, flags, f'--ckpt {trained} --out {tmp_path}/whole') == 0
    real, calls = eval_passkey.score, []

    def score(model, prompts, *more):
        calls.append(len(prompts[0]))
        if len(calls) == stop:
            raise KeyboardInterrupt
        return real(model, prompts, *more)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(eval_passkey, 'score', score)
        stop = 6                                     # batches of 3, 3; 3, 3; then the second of 2, 2, 2
        with pytest.raises(KeyboardInterrupt):
            run(eval_passkey.main, flags, f'--ckpt {trained} --out {tmp_path}/a --resume')           # nothing there: it starts
        assert [r[0] for r in table(file)[1]] == [80] * 6 + [96] * 6 + [130] * 2
        calls.clear()
        stop = 0
        assert run(eval_passkey.main, flags, f'--ckpt {trained} --out {tmp_path}/a --resume') == 0 and len(calls) == 2
    assert file.read_text() == (tmp_path / 'whole/ckpt.passkey.csv').read_text()
    grow = f'--lengths 150 --depths 3 --trials 2 --out {tmp_path}/a --resume {CPU}'
    assert wait(start(eval_passkey.main, grow, f'--ckpt {trained}', log=tmp_path / 'log', world=2)) == [0, 0]       # more lengths, by more processes
    assert [r[0] for r in table(file)[1]] == [n for n in (80, 96, 130, 150) for _ in range(6)]
    before = file.read_text()
    for more in '--seed 1', '--trials 1', '--depths 4', '--decode':
        refused(capsys, eval_passkey.main, f'{flags} --ckpt {trained} --out {tmp_path}/a --resume', f'{more} : another checkpoint other flags {file}')
    os.makedirs(tmp_path / 'b')
    shutil.copyfile(f'{extended}/head-128.pt', tmp_path / 'b/ckpt.pt')           # another checkpoint of the same name
    refused(capsys, eval_passkey.main, f'{flags} --ckpt {tmp_path}/b --out {tmp_path}/a --resume', f' : another checkpoint {file}')
    assert file.read_text() == before
    file.write_text(before[:-20])
    refused(capsys, eval_passkey.main, f'{flags} --ckpt {trained} --out {tmp_path}/a --resume', f' : {file} is damaged')
    assert run(eval_passkey.main, flags.replace('80,', ''), f'--ckpt {trained} --out {tmp_path}/a') == 0 and len(table(file)[1]) == 12       # without --resume: anew


def test_default_lengths_have_room_for_a_prompt(trained, tmp_path):
    assert run(eval_passkey.main, f'--ckpt {trained} --depths 1 --trials 1 --out {tmp_path} {CPU}') == 0
    # half the training length, 32, and the training length, 64, hold none
    assert [r[0] for r in table(tmp_path / 'ckpt.passkey.csv')[1]] == [96, 128, 192, 256, 384, 512]


# ---------------------------------------------------------------------------------------------------------------------
# passkey

@pytest.mark.parametrize('name', ['passkey', 'bytes'])
def test_prompt(name):
    tok = io.get_tokenizer(name)
    make = lambda *a, seed=(0, 0): eval_passkey.make_prompt(tok, *a, np.random.default_rng(seed))
    with pytest.raises(ValueError) as too_short:
        make(10, 0, 1)
    shortest, sentence = int(re.search(r'at least (\d+)', str(too_short.value))[1]), max(len(tok.encode(s)) for s in passkey.GARBAGE)
    with pytest.raises(ValueError):
        make(shortest - 1, 0, 1)
    for length in [*range(shortest, shortest + 50), 2000]:
        at, info, seen = [], passkey.INFO.split('{key}')[0], set()
        for depth in range(4):
            prompt, answer, where = make(length, depth, 4, seed=(length, depth))
            text, key = tok.decode(prompt), tok.decode(answer).strip()
            told = passkey.INFO.format(key=key)
            assert len(prompt) + len(answer) == length and re.fullmatch('[1-9][0-9]{4}', key)
            assert text.count(told) == 1 and text.count(info) == 1 and text.count(key) == 2 and text.endswith(passkey.QUESTION)
            assert prompt[where:where + len(tok.encode(told))] == tok.encode(told)
            head = [tok.bos, *tok.encode(passkey.TASK)]
            room, at = length - len(head) - sum(len(tok.encode(s)) for s in (told, passkey.QUESTION)) - len(answer), at + [where - len(head)]
            assert prompt[:len(head)] == head and depth / 4 * room - sentence <= at[-1] < (depth + 1) / 4 * room
            assert at[-1] == 0 or text.split(told)[0].endswith('.')      # between two sentences
            assert make(length, depth, 4, seed=(length, depth)) == (prompt, answer, where)
            seen.add(key)
        assert at == sorted(at) and len(seen) > 1
    spread = {make(2000, 1, 4, seed=i)[2] for i in range(30)}
    assert len(spread) > 10 and max(spread) - min(spread) > room / 8     # all over its band


def test_score_is_that_of_greedy_decoding():
    model = build(block_size=200)
    prompts, answers = [some(40 - n).tolist() for n in (5, 3, 5, 5)], []
    for p, n in zip(prompts, (5, 3, 5, 5)):          # what the model itself would say, token by token
        x = list(p)
        for _ in range(n):
            x.append(model(torch.tensor([x]))[0][0, -1].argmax().item())
        answers.append(x[len(p):])
    answers[2][0] = (answers[2][0] + 1) % 50         # misses at the first token, and at the last
    answers[3][-1] = (answers[3][-1] + 1) % 50
    rows = []
    model.lm_head.register_forward_hook(lambda m, x, y: rows.append(x[0].shape[1]))
    plain = eval_passkey.score(model, prompts, answers, ENV)
    assert rows == [5]                               # the answers' rows only
    decoded = eval_passkey.score(model, prompts, answers, ENV, decode=True)
    assert [s[0] for s in plain] == [s[0] for s in decoded] == [1, 1, 0, 0]
    ref = copy.deepcopy(model).double()
    for p, a, (_, logprob) in zip(prompts, answers, plain):
        logp = ref(torch.tensor([p + a[:-1]]))[0][0].log_softmax(-1)
        assert logprob == pytest.approx(sum(logp[len(p) - 1 + i, t].item() for i, t in enumerate(a)), abs=1e-4)


@pytest.mark.parametrize('miss', [None, 0, 2, 4])
def test_oracle(miss):
    answers = torch.randint(50, (6, 5))
    said = answers.clone()
    if miss is not None:
        said[1, miss] = (said[1, miss] + 1) % 50
    oracle = lambda x, rows: (torch.cat((torch.zeros(6, 20, 50), F.one_hot(said, 50) * 100.0), dim=1)[:, rows], None)
    got = eval_passkey.score(oracle, some(6, 15).tolist(), answers.tolist(), ENV)
    assert [a for a, _ in got] == [1, int(miss is None), 1, 1, 1, 1]
    assert [p for _, p in got] == pytest.approx([0, 0 if miss is None else -100, 0, 0, 0, 0], abs=1e-4)


@pytest.mark.parametrize('block_size, marked', [(128, '128'), (200, '128'), (256, '256'), (1000, '512'), (100, None)])
def test_heat_map_marks_the_training_length(block_size, marked):
    grid = [dict(length=n, depth=d, trial=t, accuracy=int(n < 500 and t < 2 * d + 1)) for n in (128, 256, 512) for d in (0, 0.5) for t in range(2)]
    lines = eval_passkey.heat_map(grid, block_size).splitlines()
    assert re.findall(r'(\d+) \|', lines[0]) == ([marked] if marked else []) and len(lines) == 6
    half, full, mean = lines[2:5]
    assert full.count('████') == 2 and '█' not in half and half.count(' . ') == full.count(' . ') == 1
    assert re.findall(r'\d+%', mean) == ['75%', '75%', '0%']


def test_figures(trained, extended, corpus, tmp_path, capsys):
    pytest.importorskip('matplotlib')
    short = f'--ckpt {trained} --data {corpus} --out {tmp_path}'
    assert run(extend.main, HEAD, short, f'--plot {tmp_path}/a.png') == 0
    assert run(extend.main, HEAD, short, f'--method head-log --plot {tmp_path}/b.png') == 0
    assert run(eval_passkey.main, f'--ckpt {extended}/head-128.pt --lengths 96,128 --depths 2 --trials 1 --out {tmp_path} --plot {tmp_path}/c.png {CPU}') == 0
    assert all((tmp_path / f'{x}.png').stat().st_size > 10_000 for x in 'abc')
    refused(capsys, extend.main, f'{HEAD} {short}', f'--plot {tmp_path}/nowhere/a.png : --plot folder')
    refused(capsys, extend.main, f'{HEAD} {short}', f'--plot {tmp_path}/a.word : --plot figure.png')


# ---------------------------------------------------------------------------------------------------------------------
# bad input

@pytest.mark.parametrize('case', [
    '--ckpt nowhere : nowhere train.py', '--ckpt {corpus} : {corpus} no checkpoint meta.json', '--ckpt {corpus}/val.bin : val.bin not a whole',
    '--ckpt {lfs} : {lfs} not a whole', '--data nowhere : nowhere', '--data {other} : vocabulary 257', '--out {corpus}/val.bin/x', '--device cuda',
    '--stride 0', '--stride -1', '--stride 64 : --stride 64 63', '--lengths 0,64', '--lengths -5', '--lengths 64,9000 : 9,0 val.bin --lengths',
    '--length 0', '--length -1', '--length 70000 : --length 70,000 train.bin', '--init 0.9 : --init 0.9 focus', '--init nan', '--grid nan,1',
    '--grid_batches 0', '--batch 0', '--micro_batch 0', '--micro_batch -1', '--batch_tokens 0', '--steps 0', '--lr 0', '--lr nan', '--seed -1',
    '--eval_tokens -1', '--past 0', '--past 127 : --past 127 128', '--past 200 --protocol paper : --past', '--past 99999 : no document val.bin --lengths', '--population 3', '--iterations 0', *(f'--method {m} : {m} rope nope' for m in ('pi', 'ntk', 'yarn', 'longrope'))])
def test_bad_input_of_extend(case, corpus, other, trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    lfs = tmp_path / 'lfs.pt'
    lfs.write_text('version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4400000000\n')
    refused(capsys, extend.main, f'{HEAD} --ckpt {trained} --data {corpus} --out {tmp_path}/out', case.format(corpus=corpus, other=other, lfs=lfs))
    assert not list(tmp_path.glob('out/*'))          # before the work


def test_a_missing_compiler_is_known_before_the_work(corpus, trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shutil, 'which', lambda name: None)
    refused(capsys, extend.main, f'{HEAD} --ckpt {trained} --data {corpus} --out {tmp_path}/out', '--compile')
    assert not list(tmp_path.glob('out/*'))


@pytest.mark.parametrize('case', [
    '--ckpt nowhere : nowhere', '--ckpt {corpus}/val.bin : val.bin not a whole', '--lengths 96,20 : 20 too short', '--out {corpus}/val.bin/x',
    '--depths 0', '--trials 0', '--seed -1', '--batch_tokens 0'])
def test_bad_input_of_eval_passkey(case, corpus, trained, tmp_path, capsys):
    refused(capsys, eval_passkey.main, f'--ckpt {trained} --out {tmp_path}/out {CPU}', case.format(corpus=corpus))
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('main', [extend.main, eval_passkey.main])
@pytest.mark.parametrize('flags', ['--device=--', '--lengths 64,many', '--lengths 64,', '--lengths 64.5', '--length 96 --len 64', '--dtype fp16', '--seed one'])
def test_bad_flags(main, flags, corpus, trained, tmp_path, capsys):
    assert run(main, f'--ckpt {trained} --out {tmp_path}/out', f'--data {corpus} --method none' if main is extend.main else '', flags) == 2
    err = capsys.readouterr().err
    assert err.startswith('error: ') and err.count('\n') == 1 and not (tmp_path / 'out').exists()


def test_learned_table_has_an_end(corpus, tmp_path, capsys):
    assert run(train.main, TINY, f'--pe learned --steps 1 --data {corpus} --out {tmp_path}') == 0
    for main, flags in (extend.main, f'{HEAD} --data {corpus}'), (eval_passkey.main, f'--lengths 96 {CPU}'):
        refused(capsys, main, f'--ckpt {tmp_path} {flags}', ' : learned 64')


def test_entropy_is_exact_under_autocast():
    q, k = torch.randn(1, 2, 64, 16, generator=torch.Generator().manual_seed(0)) * 3, torch.randn(1, 2, 64, 16, generator=torch.Generator().manual_seed(1))
    with torch.autocast('cpu', torch.bfloat16):      # as it is called from a bf16 forward pass
        got = extend.attention_entropy(q, k, block=24)
    assert got.dtype == torch.float32 and torch.equal(got, extend.attention_entropy(q, k, block=24))


def test_an_extended_checkpoint_is_not_extended_again(extended, corpus, tmp_path, capsys):
    refused(capsys, extend.main, f'{HEAD} --ckpt {extended}/head-128.pt --data {corpus} --out {tmp_path}', ' : extended already')
