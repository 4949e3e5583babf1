"""Layers that differ: what a pattern of nope and rope with windows promises, held against formulas written out here."""
import math
import os
import shutil

import pytest
import torch
from conftest import BATCH, CPU, bits, build, check_refused, close, refused, run, same_weights, started, state
from test_hf import checkpoint, load, logits, random_llama, same
from test_model import heat

import extend
import train
from data.checkpoint import load_checkpoint, load_model
from data.hf import convert
from data.measure import attention_entropy
from data.positions import growth
from model import GPTConfig, KVCache

L = 16                                               # the block_size of build()
MIXED = dict(pe='rope,rope,nope', window='6,5,0', n_layer=3)
patterns = pytest.mark.parametrize('shape', [
    MIXED, dict(pe='nope,rope', n_layer=4), dict(pe='rope', window='7'), dict(pe='nope', window='0,1')], ids=str)
FLAGS = f'--block_size 64 --n_layer 3 --n_head 2 --n_kv_head 1 --n_embd 32 --n_inner 48 --rows anywhere {BATCH} ' \
        '--preset tiny --pe rope,rope,nope --window 24,8,0'


def tokens(*shape):
    return torch.randint(50, shape)


@patterns
def test_no_logit_depends_on_a_later_token(shape):
    model, idx = heat(build(**shape)), tokens(2, 40)
    other = torch.cat((idx[:, :11], (idx[:, 11:] + 1) % 50), dim=1)
    before, after = model(idx)[0], model(other)[0]
    assert torch.equal(before[:, :11], after[:, :11])
    assert (before[:, 11:] != after[:, 11:]).any(-1).all()


def test_a_pattern_repeats_over_the_layers_and_one_word_is_one_word():
    c = GPTConfig(n_layer=5, pe='rope,rope,nope', window='4,0')
    assert c.layer_pe == ['rope', 'rope', 'nope', 'rope', 'rope']
    assert c.layer_window == [4, 0, 4, 0, 4]
    same = build(pe='rope,rope', window=0)
    assert (same.config.pe, same.config.layer_window) == ('rope', [0, 0])
    assert torch.equal(same(tokens(1, 9) * 0)[0], build('rope')(tokens(1, 9) * 0)[0])


def test_layers_of_one_kind_are_what_they_were_bit_for_bit():
    """A window that nothing is too far for leaves the kernel's own causal path, and a pattern mixes layers of both."""
    idx = tokens(2, 40)
    for pe in 'nope', 'rope':
        assert torch.equal(build(pe, window=40)(idx)[0], build(pe)(idx)[0])
        assert (build(pe, window=39)(idx)[0] != build(pe)(idx)[0]).any()


@patterns
def test_each_layer_has_its_encoding_and_its_window(shape):
    """Against attention written out: the scores of a layer from its own input."""
    model, seen, idx = build(**shape), {}, tokens(1, 30)
    for i, block in enumerate(model.blocks):
        block.attn.register_forward_hook(lambda m, x, y, i=i: seen.update({i: (x[0][0].double(), y[0].double())}))
    model(idx)
    pe = shape['pe'].split(',') * 4
    windows = [int(w) for w in shape.get('window', '0').split(',')] * 4
    theta = torch.tensor([1, 0.1, 0.01, 0.001]).double()             # 10000 ** (-2m / 8)
    turn = torch.exp(1j * torch.arange(30).double()[:, None] * theta)
    for i, block in enumerate(model.blocks):
        x, y = seen[i]
        heads = []
        for h in range(4):
            q = x @ block.attn.q_proj.weight.double()[8 * h:8 * h + 8].T
            k, v = (x @ w.weight.double()[8 * (h // 2):][:8].T for w in (block.attn.k_proj, block.attn.v_proj))
            if pe[i] == 'rope':
                q, k = (torch.view_as_real(torch.complex(z[:, :4], z[:, 4:]) * turn).mT.flatten(1) for z in (q, k))
            e = torch.exp(q @ k.T / 8 ** 0.5)
            for t in range(30):
                for j in range(30):
                    if j > t or windows[i] and t - j >= windows[i]:
                        e[t, j] = 0
            heads.append(e / e.sum(1, keepdim=True) @ v)
        close(torch.cat(heads, 1) @ block.attn.o_proj.weight.double().T, y)


@patterns
@pytest.mark.parametrize('chunks', [[1] * 80, [5, 1, 9, 1, 24, 2, 38], [79, 1]], ids=['single', 'mixed', 'prompt'])
def test_cached_decoding_is_the_full_forward(shape, chunks):
    model, cache, idx = heat(build(**shape)), KVCache(80), tokens(2, 80)
    close(torch.cat([model(part, cache=cache)[0] for part in idx.split(chunks, dim=1)], dim=1), model(idx)[0])


def test_the_cache_of_a_windowed_layer_holds_its_window_only():
    model, cache = build(**MIXED), KVCache()
    for part in tokens(2, 80).split([70, 1, 9], dim=1):
        model(part, cache=cache)
        for layer, window in (0, 6), (1, 5):
            held = cache.kv[layer]
            assert held.shape == (2, 2, 2, window - 1, 8)
            assert held.untyped_storage().nbytes() == held.numel() * 4           # and not the prompt behind it


def test_a_window_of_one_token_sees_itself_alone():
    model, idx = build(pe='nope', window='1', n_layer=1), tokens(1, 20)
    close(model(idx)[0][0], model(idx.T)[0][:, 0])


def test_entropy_of_a_windowed_layer():
    q, k = torch.zeros(1, 2, 9, 4), torch.randn(1, 1, 9, 4)          # attention is uniform over what is seen
    back = torch.arange(9)[:, None] - torch.arange(9)
    entropy = attention_entropy(q, k, block=4, bias=(back >= 0) & (back < 3))
    close(entropy, torch.tensor([1, 2] + [3] * 7).log().expand(2, 9))


@pytest.mark.parametrize('shape, words', [
    (dict(pe='rope,alibi'), 'only nope and rope differ by layer'),
    (dict(pe='rope,nope', n_layer=1), 'rope,nope names 2 layers of n_layer 1'),
    (dict(window='4,0,0'), '4,0,0 names 3 layers of n_layer 2'),
    (dict(pe='alibi', window=4), 'only nope and rope differ by layer, or have a window'),
    (dict(window='4,x'), "'x'"),
])
def test_what_does_not_fit_is_refused(shape, words):
    with pytest.raises(ValueError, match=words):
        build(**shape)


# ---------------------------------------------------------------------------------------------------------------------
# laws of temperature

def published(law, n, at):
    """The temperature of the query that sees n tokens, as each law was published."""
    if law == 'logn':                                # Su 2021; Qwen's code
        return max(1, math.log(n, at))
    if law == 'llama4':                              # its modeling code: positions from 0
        return 1 + 0.1 * math.log(math.floor(((n - 1) + 1) / at) + 1)
    return math.log(at + n, at)                      # SWAN


every_law = pytest.mark.parametrize('law', ['logn', 'llama4', 'swan'])


def lawful(law, at=0, **shape):
    """A model under a law as published; at 0: in units of its training length."""
    model = build(**shape)
    extend.set_law(model, law, at or L)
    model.config.law_at = at                         # 0 stands for the training length
    return model


@every_law
@pytest.mark.parametrize('at', [0, 7])
def test_a_law_is_what_was_published(law, at):
    model, n = lawful(law, at), torch.arange(1, 100)
    found = model.blocks[0].attn.temperature(growth(model.config, n))        # (nh, T, 1)
    want = torch.tensor([published(law, i, at or L) for i in range(1, 100)])
    close(found, want[None, :, None].expand(4, 99, 1))


@every_law
@pytest.mark.parametrize('shape', [dict(pe='nope'), MIXED], ids=str)
def test_a_law_multiplies_the_query_in_the_nope_layers(law, shape):
    """Each query is what it would be in the plain model at its own, constant, temperature."""
    model, plain, idx = lawful(law, **shape), build(**shape), tokens(1, 40)
    if len(plain.blocks) > 2:                        # one layer with a temperature: the last
        assert [i for i, b in enumerate(model.blocks) if b.attn.slope.any()] == [2]
    else:                                            # else the layers before would see other temperatures
        model.config.n_layer, model.blocks, plain.blocks = 1, model.blocks[:1], plain.blocks[:1]
    for t in 3, 15, 16, 31, 39:
        plain.blocks[-1].attn.scale.data.fill_(published(law, t + 1, L))
        close(model(idx)[0][:, t], plain(idx)[0][:, t])


@every_law
def test_a_law_of_the_position_decodes_without_knowing_the_length(law):
    model, idx = heat(lawful(law, **MIXED)), tokens(2, 80)
    for cache in KVCache(), KVCache(80):
        parts = [model(part, cache=cache)[0] for part in idx.split([5, 1, 9, 1, 24, 2, 38], dim=1)]
        close(torch.cat(parts, dim=1), model(idx)[0])
    close(model(idx[:, :30])[0], model(idx)[0][:, :30])              # and what comes later changes nothing


def test_llama_4_scales_as_its_own_code_does():
    """Llama 4's attention without RoPE, from transformers: the same weights give the same output at all positions."""
    llama4 = pytest.importorskip('transformers.models.llama4.modeling_llama4')
    config = llama4.Llama4TextConfig(hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
                                     num_hidden_layers=1, no_rope_layers=[0], floor_scale=16, attn_scale=0.1,
                                     attn_implementation='eager')
    theirs, model = llama4.Llama4TextAttention(config, 0), lawful('llama4')
    ours = model.blocks[0].attn
    names = [f'{x}_proj.weight' for x in 'qkvo']
    theirs.load_state_dict({name: ours.state_dict()[name] for name in names})
    x = torch.randn(2, 70, 32)
    future = torch.full((70, 70), float('-inf')).triu(1)[None, None]
    log_n = growth(model.config, torch.arange(1, 71))
    close(ours(x, None, log_n), theirs(x, None, future)[0])


def extended(straight, corpus, out, flags):
    run(extend, f'--ckpt {straight} --data {corpus} --out {out} --length 128 --batch 2 --eval_tokens 0',
        f'--grid_batches 1 --grid 1,1.5 {CPU}', flags)
    return load_model(load_checkpoint(f'{out}/{os.listdir(out)[0]}'))


@every_law
def test_uniform_takes_a_law_as_published_in_the_nope_layers(law, straight, corpus, tmp_path):
    model = extended(straight, corpus, tmp_path, f'--method uniform --law {law}')
    c, n = model.config, torch.arange(1, 300)
    assert os.listdir(tmp_path) == [f'uniform-{law}-128.pt']
    if law == 'swan':                                # the best of a grid around the training length
        assert c.law_at in [64 * 2.0 ** k for k in range(-4, 5)]
    want = torch.tensor([published(law, i, c.law_at) for i in range(1, 300)])
    for i in 0, 1, 2:
        found = model.blocks[i].attn.temperature(growth(c, n)) / model.blocks[i].attn.gain[:, None, None]
        close(found, (want if i == 2 else torch.ones(299))[None, :, None].expand(2, 299, 1))


@pytest.mark.parametrize('flags', ['--law logn', '--law swan --law_at 32'])
def test_a_law_as_published_needs_no_tokens(flags, straight, corpus, tmp_path):
    shutil.copytree(corpus, tmp_path / 'data')
    (tmp_path / 'data/train.bin').write_bytes(b'')   # as that of a corpus for measuring only
    extended(straight, tmp_path / 'data', tmp_path / 'out', f'--method uniform {flags}')
    (file,) = os.listdir(tmp_path / 'out')
    saved = load_checkpoint(f'{tmp_path}/out/{file}')
    assert saved['extended']['data_fingerprint'] is None


@every_law
def test_head_tunes_the_slopes_of_a_law_in_the_nope_layers(law, straight, corpus, tmp_path):
    before = load_model(load_checkpoint(straight)).state_dict()
    model = extended(straight, corpus, tmp_path, f'--method head --law {law} --law_at 32 --steps 3 --lr 0.1 --init 1.2')
    differs = {name for name, w in model.state_dict().items() if not torch.equal(w, before[name])}
    assert differs == {'blocks.2.attn.slope'}
    assert (model.config.law, model.config.law_at) == (law, 32)
    found = model.blocks[2].attn.slope * growth(model.config, torch.tensor(128)) + 1
    assert (found >= 1).all()
    assert (found != 1.2).all()
    assert (found - 1.2).abs().max() < 0.35  # steps of lr 0.1


def test_temperatures_of_a_mixed_model_are_those_of_its_nope_layers_or_of_all(straight, corpus, tmp_path):
    few = extended(straight, corpus, tmp_path / 'nope', '--method uniform --grid 1.5')
    every = extended(straight, corpus, tmp_path / 'all', '--method uniform --grid 1.5 --temperatures all')
    assert [b.attn.scale.tolist() for b in few.blocks] == [[1, 1], [1, 1], [1.5, 1.5]]
    assert [b.attn.scale.tolist() for b in every.blocks] == [[1.5, 1.5]] * 3
    log = extended(straight, corpus, tmp_path / 'log', '--method head-log --steps 2')
    assert [bool(b.attn.slope.any()) for b in log.blocks] == [False, False, True]


def test_another_encoding_leaves_the_law_behind(straight, corpus, tmp_path):
    extended(straight, corpus, tmp_path, '--method uniform --law logn')
    ckpt = load_checkpoint(f'{tmp_path}/uniform-logn-128.pt')
    dropped = load_model(ckpt, pe='nope')
    assert dropped.config.law == 'length'
    assert not any(b.attn.slope.any() for b in dropped.blocks)
    assert load_model(ckpt).config.law == 'logn'


@pytest.mark.parametrize('case', [
    '--method head-log --law logn : --law', '--method none --law swan : --law',
    '--method uniform --law_at 99 : --law_at', '--method uniform --law swan --law_at 1 : --law_at 1',
    '--method head --law llama4 --length 64 : llama4 64 longer',
    '--method uniform --law cosine : --law'])
def test_laws_that_do_not_fit(case, straight, corpus, tmp_path):
    check_refused(extend, f'--ckpt {straight} --data {corpus} --out {tmp_path} {CPU}', case)


# ---------------------------------------------------------------------------------------------------------------------
# trained in: scalable softmax, p-RoPE

def slopes(path):
    ckpt = load_checkpoint(str(path))['model']
    return torch.stack([w for name, w in ckpt.items() if name.endswith('slope')])


@pytest.mark.parametrize('shape', [dict(pe='nope', n_layer=3), MIXED], ids=str)
def test_scalable_softmax_is_a_factor_times_ln_n(shape):
    model, plain, idx = build(law='ssmax', **shape), build(**shape), tokens(1, 40)
    where = [2] if shape == MIXED else [0, 1, 2]
    assert [i for i, b in enumerate(model.blocks) if b.attn.slope.requires_grad] == where
    for i in where:
        block = model.blocks[i]
        at_L = block.attn.temperature(growth(model.config, torch.tensor([L])))
        close(at_L, torch.ones(4, 1, 1))             # where it starts: nothing changes at the training length
        block.attn.slope.data.copy_(torch.tensor([0.1, 0.43, 0.7, 1]))
    log = torch.arange(1, 41).log()
    for layer, block in enumerate(plain.blocks):     # softmax(s ln n z): s ln n on each query, by hand
        def scaled(m, x, q, layer=layer):
            s = torch.tensor([0.1, 0.43, 0.7, 1]).repeat_interleave(8)
            return q * s * log[:, None] if layer in where else q
        block.attn.q_proj.register_forward_hook(scaled)
    close(model(idx)[0], plain(idx)[0])
    cache = KVCache()
    close(torch.cat([model(part, cache=cache)[0] for part in idx.split([5, 1, 34], dim=1)], dim=1), model(idx)[0])


def test_scalable_softmax_is_trained_resumed_and_swapped_in(straight, corpus, tmp_path):
    flags = f'{FLAGS} --scalable_softmax --decay_steps 4 --data {corpus} --out {tmp_path}'
    run(train, f'{flags}/whole --steps 4')
    run(train, f'{flags}/halves --steps 2')
    run(train, f'{flags}/halves --steps 4 --resume')
    assert state(tmp_path / 'whole') == state(tmp_path / 'halves')
    start = torch.tensor([[0, 0], [0, 0], [1 / math.log(64)] * 2])
    assert ((slopes(tmp_path / 'whole') != start) == (start > 0)).all()          # learned, in the NoPE layer
    run(train, f'{BATCH} --min_length 64 --init_from {straight} --scalable_softmax --steps 2 --warmup 1 '
        f'--data {corpus} --out {tmp_path}/swapped')
    assert ((slopes(tmp_path / 'swapped') != start) == (start > 0)).all()
    assert not slopes(straight).any()
    with refused('learned its temperatures', '--method none'):
        run(extend, f'--ckpt {tmp_path}/whole --data {corpus} --method uniform --out {tmp_path} {CPU}')
    run(extend, f'--ckpt {tmp_path}/whole --data {corpus} --method none --lengths 64,128 --eval_tokens 128 {CPU}',
        f'--out {tmp_path}')


def test_p_rope_rotates_the_highest_frequencies_only():
    model = build('rope', rope_fraction=0.75)
    close(model.inv_freq, torch.tensor([1, 0.1, 0.01, 0]))           # 10000 ** (-2m / 8)
    given, idx = build('rope', rope_inv_freq=[1, 0.1, 0.01, 0.0]), tokens(1, 40)
    close(model(idx)[0], given(idx)[0])
    assert torch.equal(build('rope', rope_fraction=0.0)(idx)[0], build('nope')(idx)[0])


def test_p_rope_is_trained_and_its_zeros_are_not_stretched(corpus, tmp_path):
    run(train, f'{FLAGS} --pe rope --rope_fraction 0.75 --steps 1 --warmup 1 --data {corpus} --out {tmp_path}/run')
    model = load_model(load_checkpoint(f'{tmp_path}/run'))
    assert (model.inv_freq == 0).tolist() == [False] * 6 + [True] * 2
    with refused('rope_fraction 0.75'):
        run(extend, f'--ckpt {tmp_path}/run --data {corpus} --method yarn --out {tmp_path} {CPU}')
    with refused('--rope_fraction'):
        run(train, f'{FLAGS} --pe rope --rope_fraction 1.5 --steps 1 --data {corpus} --out {tmp_path}/wrong')


# ---------------------------------------------------------------------------------------------------------------------
# Hugging Face

@pytest.fixture(scope='module')
def transformers():
    pytest.importorskip('safetensors')
    package = pytest.importorskip('transformers')
    package.logging.set_verbosity_error()
    package.logging.disable_progress_bar()
    return package


YARN = dict(rope_type='yarn', factor=4.0, original_max_position_embeddings=32, rope_theta=5000.0)


@pytest.mark.parametrize('n, pe, window, config', [
    (8, 'rope,rope,rope,nope', '0', {}),             # SmolLM3's own default
    (5, 'rope,rope,rope,nope', '0', dict(rope_parameters=YARN, max_position_embeddings=128)),
    (4, 'rope,nope', '0,11', dict(no_rope_layers=[1, 0] * 2, use_sliding_window=True, sliding_window=11)),
    (4, 'rope,rope,rope,nope', '11,11,11,0', dict(
        use_sliding_window=True, sliding_window=11, layer_types=['sliding_attention'] * 3 + ['full_attention'])),
], ids=['default', 'yarn', 'nope-slides', 'rope-slides'])
def test_smollm3_with_layers_that_differ_in_and_out(n, pe, window, config, transformers, tmp_path):
    ids = dict(pad_token_id=None, bos_token_id=1, eos_token_id=2)
    model = random_llama(transformers, 'SmolLM3For', **dict(num_hidden_layers=n, **ids) | config)
    model.save_pretrained(tmp_path / 'hf')
    run(convert, tmp_path / 'hf', tmp_path / 'a.pt')
    run(convert, tmp_path / 'a.pt', tmp_path / 'out')
    c = load_model(load_checkpoint(str(tmp_path / 'a.pt'))).config
    assert (c.pe, c.window) == (pe, window)
    same(model, tmp_path / 'a.pt', 90)
    back = load(transformers, tmp_path / 'out')
    same(back, tmp_path / 'a.pt', 90)
    if 'rope_parameters' not in config:              # nothing was folded
        assert bits(dict(back.state_dict())) == bits(dict(model.state_dict()))


@pytest.mark.parametrize('shape', [MIXED | dict(window='6,6,0'), dict(pe='rope', window='6,0')], ids=str)
def test_ours_with_a_window_and_temperatures_goes_out_and_comes_back(shape, transformers, tmp_path):
    model = build(vocab_size=60, **shape)
    for i in model.config.tempered:
        model.blocks[i].attn.scale.data.uniform_(1, 2)
    checkpoint(tmp_path / 'a.pt', model, extended=dict(length=64))
    run(convert, tmp_path / 'a.pt', tmp_path / 'out')
    same(load(transformers, tmp_path / 'out'), tmp_path / 'a.pt', 60)
    run(convert, tmp_path / 'out', tmp_path / 'back.pt')
    back = load_checkpoint(str(tmp_path / 'back.pt'))['config']
    assert (back['pe'], back['window'], back['block_size']) == (model.config.pe, model.config.window, L)
    idx = tokens(2, 60)
    close(logits(tmp_path / 'back.pt', idx), logits(tmp_path / 'a.pt', idx))


@pytest.mark.parametrize('kind, field', [('Llama4Text', 'num_local_experts'), ('Cohere2', 'logit_scale')])
def test_other_families_are_refused_by_the_field_that_is_missing_here(kind, field, transformers, tmp_path):
    getattr(transformers, f'{kind}Config')().save_pretrained(tmp_path / 'hf')
    with refused('config.json', field, 'no counterpart here'):
        run(convert, tmp_path / 'hf', tmp_path / 'a.pt')


# ---------------------------------------------------------------------------------------------------------------------
# a run

@pytest.fixture(scope='module')
def straight(corpus, tmp_path_factory):
    """A mixed run of six steps."""
    out = str(tmp_path_factory.mktemp('runs') / 'mixed')
    run(train, FLAGS, '--steps 6 --eval_every 3 --data', corpus, '--out', out)
    return out


def test_resume_is_bit_for_bit(straight, corpus, tmp_path):
    flags = f'{FLAGS} --decay_steps 6 --eval_every 3 --data {corpus} --out {tmp_path}/run'
    run(train, flags, '--steps 3')
    run(train, flags, '--steps 6 --resume')
    assert state(f'{tmp_path}/run') == state(straight)


def test_resume_refuses_another_pattern(straight, corpus):
    for change in '--pe rope,nope', '--window 24,24,0':
        with refused(*change.split()):
            run(train, f'{FLAGS} --steps 9 --resume --data {corpus} --out {straight}', change)


@pytest.mark.parametrize('case', ['--pe rope,alibi', '--pe rope,abacus', '--window 3,-1', '--window a'])
def test_flags_that_do_not_fit(case, corpus, tmp_path):
    with refused(case.split()[0].removeprefix('--'), case.split(',')[-1].split()[-1]):
        run(train, f'{FLAGS} --steps 1 --data {corpus} --out {tmp_path}', case)


def test_a_mixed_run_is_measured_and_stays_what_it_is(straight, corpus, tmp_path):
    said = run(extend, f'--ckpt {straight} --data {corpus} --method none --out {tmp_path} --lengths 64,256 {CPU} '
               '--eval_tokens 128 --stride 32')
    assert 'rope,rope,nope, training length 64' in said
    dropped = load_model(load_checkpoint(straight), pe='nope', window='0')
    assert dropped.config.layer_pe == ['nope'] * 3


@pytest.mark.slow
def test_two_processes_are_one(straight, corpus, tmp_path):
    started(train, f'{FLAGS} --steps 6 --eval_every 3 --data {corpus} --out {tmp_path}/run', world=2,
            log=f'{tmp_path}/log')
    same_weights(f'{tmp_path}/run', straight)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which('g++'), reason='torch.compile on CPU needs g++')
def test_a_compiled_run_is_a_plain_one(corpus, tmp_path):
    flags = f'{FLAGS} --min_length 64 --steps 4 --warmup 1 --lr 1e-4 --muon_lr 1e-4 --data {corpus} --out {tmp_path}'
    for name in 'plain --no-compile', 'compiled --compile':
        run(train, f'{flags}/{name}')
    same_weights(f'{tmp_path}/compiled', f'{tmp_path}/plain')
