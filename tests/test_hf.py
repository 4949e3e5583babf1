"""What data/hf/convert.py promises: the same logits on both sides, an exact round trip, one line for the rest."""
import copy
import importlib
import json
import math
import os
import shutil
import sys
from dataclasses import asdict
from types import SimpleNamespace

import conftest
import numpy as np
import pytest
import torch
from conftest import BATCH, CPU, bits, changed, check_refused, close, refused, run, same_weights, set_heads, started
from test_tokenizer import words_tokenizer

import extend
import train
from data import sample
from data.checkpoint import frozen, load_checkpoint, load_model, save_checkpoint
from data.hf import convert
from data.hf.export_config import special_ids
from data.hf.read_config import read_config
from data.hf.scaling import read_scaling
from data.positions import ntk, pi, rope_frequencies, yarn
from data.runtime import Env
from data.tokenizer import Tokenizer, get_tokenizer
from data.tokens import open_data, write_data
from model import GPT, GPTConfig

STRETCHED = dict(pi=pi, ntk=ntk, yarn=yarn)
SHAPE = dict(block_size=32, vocab_size=60, n_layer=2, n_head=4, n_kv_head=2, n_embd=32, n_inner=48)
LLAMA = dict(
    architectures=['LlamaForCausalLM'],
    model_type='llama',
    vocab_size=60,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    hidden_size=32,
    intermediate_size=48,
    hidden_act='silu',
    max_position_embeddings=32,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    tie_word_embeddings=False,
)
SMOLLM3 = dict(LLAMA, architectures=['SmolLM3ForCausalLM'], model_type='smollm3', no_rope_layers=[0, 0])
# each kind with the length up to which transformers computes it as it is here
SCALINGS = dict(
    default=({}, 90),
    linear=(dict(rope_type='linear', factor=4.0), 90),
    dynamic=(dict(rope_type='dynamic', factor=2.0), 64),
    yarn=(dict(rope_type='yarn', factor=4.0, original_max_position_embeddings=32), 90),
    attention_factor=(
        dict(rope_type='yarn', factor=4.0, original_max_position_embeddings=32, attention_factor=1.2),
        90,
    ),
    longrope=(
        dict(
            rope_type='longrope',
            original_max_position_embeddings=32,
            short_factor=[1.0] * 4,
            long_factor=[1.0, 1.5, 2.5, 4.0],
        ),
        90,
    ),
    llama3=(
        dict(
            rope_type='llama3',
            factor=8.0,
            original_max_position_embeddings=64,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
        ),
        90,
    ),
)


def build(**shape):
    """A network of ours in which attention is not uniform and no norm is the identity."""
    model = conftest.build(**SHAPE | shape).requires_grad_(False)
    for name, p in model.named_parameters():
        if p.dim() == 2 and 'q_proj' not in name and 'k_proj' not in name:
            p.mul_(2)
    return model


def theirs(state, tied=False):
    """Our weights under the names of a Hugging Face Llama, written out here once more."""
    out = {'model.embed_tokens.weight': state['embed.weight'], 'model.norm.weight': state['norm.weight']}
    for i in range(SHAPE['n_layer']):
        for a, b in (
            ('input_layernorm', 'attn_norm'),
            ('post_attention_layernorm', 'mlp_norm'),
            *((f'self_attn.{x}_proj', f'attn.{x}_proj') for x in 'qkvo'),
            *((f'mlp.{x}_proj',) * 2 for x in ('gate', 'up', 'down')),
        ):
            out[f'model.layers.{i}.{a}.weight'] = state[f'blocks.{i}.{b}.weight']
    return out if tied else {**out, 'lm_head.weight': state['lm_head.weight']}


def folder(path, state, config=LLAMA, shards=1):
    """A Hugging Face folder with pytorch_model.bin, or shards of it, and its index."""
    os.makedirs(path)
    with open(f'{path}/config.json', 'w') as f:
        json.dump(config, f)
    parts, names = (
        [{k: state[k].clone() for k in list(state)[i::shards]} for i in range(shards)],
        [f'pytorch_model-{i}.bin' for i in range(shards)],
    )
    for part, name in zip(parts, names if shards > 1 else ['pytorch_model.bin']):
        torch.save(part, f'{path}/{name}')
    if shards > 1:
        with open(f'{path}/pytorch_model.bin.index.json', 'w') as f:
            json.dump(dict(weight_map={k: name for part, name in zip(parts, names) for k in part}), f)
    return path


def checkpoint(path, model, tokenizer='bytes', **more):
    save_checkpoint(
        str(path),
        dict(
            model=model.state_dict(),
            config=asdict(model.config),
            optimizer=None,
            step=0,
            tokens=0,
            seed=0,
            args=dict(preset='tiny', length=model.config.block_size),
            fingerprint='',
            tokenizer=tokenizer,
            extended=None,
        )
        | more,
    )
    return path


def logits(path, idx):
    with torch.no_grad():
        return load_model(load_checkpoint(str(path)))(idx)[0]


def config_of(path):
    with open(f'{path}/config.json') as f:
        return json.load(f)


def tokens(*shape):
    return torch.randint(60, shape, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def saved(monkeypatch):
    """Stands in for safetensors: what is exported lies in pytorch_model.bin, which needs no package."""
    def save_file(state, file, metadata):
        assert metadata == {'format': 'pt'}
        assert all(w.is_contiguous() for w in state.values())
        torch.save(state, file.replace('model.safetensors', 'pytorch_model.bin'))
    monkeypatch.setitem(sys.modules, 'safetensors', SimpleNamespace())
    monkeypatch.setitem(sys.modules, 'safetensors.torch', SimpleNamespace(save_file=save_file))


# ---------------------------------------------------------------------------------------------------------------------
# in, without any package

@pytest.mark.parametrize(
    'pe, config, shards',
    [('rope', LLAMA, 1), ('rope', LLAMA, 3), ('nope', SMOLLM3, 2), ('rope', dict(SMOLLM3, no_rope_layers=[1, 1]), 1)],
)
def test_a_folder_gives_our_logits(pe, config, shards, tmp_path):
    model = build(pe=pe)
    folder(
        tmp_path / 'hf',
        theirs(model.state_dict()) | {'model.layers.0.self_attn.rotary_emb.inv_freq': torch.ones(4)},
        config,
        shards,
    )
    assert f'pe={pe}, 2 layers' in run(convert, tmp_path / 'hf/', tmp_path / 'run/ckpt.pt')
    ckpt = load_checkpoint(str(tmp_path / 'run'))
    assert bits(dict(ckpt['model'])) == bits(dict(model.state_dict()))
    assert ckpt['config'] == asdict(model.config)
    assert ckpt['tokenizer'] == f'hf:{tmp_path}/hf'
    assert torch.equal(logits(tmp_path / 'run', tokens(2, 50)), model(tokens(2, 50))[0])


def test_a_tied_head_and_half_precision(tmp_path):
    model = build(pe='rope')
    for p in model.parameters():
        p.copy_(p.bfloat16())
    model.lm_head.weight.copy_(model.embed.weight)
    state = theirs({k: w.bfloat16() for k, w in model.state_dict().items()}, tied=True)
    folder(tmp_path / 'hf', state, dict(LLAMA, tie_word_embeddings=True))
    torch.save(state, tmp_path / 'hf/pytorch_model.bin', _use_new_zipfile_serialization=False)  # as before torch 1.6
    run(convert, tmp_path / 'hf', tmp_path / 'ckpt.pt')
    ckpt = load_checkpoint(str(tmp_path / 'ckpt.pt'))['model']
    assert torch.equal(ckpt['lm_head.weight'].float(), model.embed.weight)
    assert ckpt['embed.weight'].dtype == torch.bfloat16
    assert ckpt['blocks.0.attn.scale'].dtype == torch.float32
    assert ckpt['embed.weight'].untyped_storage().data_ptr() == ckpt['lm_head.weight'].untyped_storage().data_ptr()
    assert torch.equal(logits(tmp_path / 'ckpt.pt', tokens(2, 9)), model(tokens(2, 9))[0])


def test_a_tied_head_stays_tied_in_training_and_export(saved, tmp_path):
    """One matrix in memory, in the file and in the folder; a stopped run goes on bit for bit."""
    write_data(tmp_path / 'data', get_tokenizer('bytes'), {s: [list(range(200))] for s in ('train', 'val')}, '')
    checkpoint(tmp_path / 'a.pt', build(pe='rope', vocab_size=257, tie_embeddings=True))
    run(convert, tmp_path / 'a.pt', tmp_path / 'hf')
    assert f'{23_744:,} parameters' in run(convert, tmp_path / 'hf', tmp_path / 'b.pt')
    ckpt = load_checkpoint(str(tmp_path / 'b.pt'))
    save_checkpoint(str(tmp_path / 'c.pt'), dict(ckpt, tokenizer='bytes'))

    flags = f'{BATCH} --micro_batch 1 --batch_tokens 64 --length 32 --warmup 0 --decay_steps 4 --lr 1e-2'
    flags += f' --init_from {tmp_path}/c.pt --data {tmp_path}/data'
    run(train, flags, '--steps 4 --out', tmp_path / 'whole')
    run(train, flags, '--steps 2 --out', tmp_path / 'parts')
    run(train, flags, '--steps 4 --resume --out', tmp_path / 'parts')
    trained = load_checkpoint(str(tmp_path / 'whole'))
    assert bits(trained['model']) == bits(load_checkpoint(str(tmp_path / 'parts'))['model'])
    embed, head = trained['model']['embed.weight'], trained['model']['lm_head.weight']
    assert embed.data_ptr() == head.data_ptr()
    assert not torch.equal(embed, ckpt['model']['embed.weight'])
    model = load_model(trained)
    assert model.lm_head.weight is model.embed.weight

    run(convert, tmp_path / 'whole', tmp_path / 'back')
    assert config_of(tmp_path / 'back')['tie_word_embeddings']
    assert 'lm_head.weight' not in torch.load(tmp_path / 'back/pytorch_model.bin')


def test_two_processes_train_a_tied_head_as_one(tmp_path):
    write_data(tmp_path / 'data', get_tokenizer('bytes'), {s: [list(range(200))] for s in ('train', 'val')}, '')
    checkpoint(tmp_path / 'a.pt', build(pe='rope', vocab_size=257, tie_embeddings=True))
    flags = f'--optimizer adamw --lr 1e-4 --warmup 0 --steps 2 --length 32 --batch_tokens 256 --micro_batch 2 {CPU}'
    flags += f' --rows anywhere --eval_tokens 64 --init_from {tmp_path}/a.pt --data {tmp_path}/data'
    run(train, flags, f'--out {tmp_path}/one')
    started(train, flags, f'--out {tmp_path}/two', log=tmp_path / 'log', world=2)
    same_weights(tmp_path / 'one', tmp_path / 'two')


def test_a_converted_checkpoint_is_fine_tuned_by_default(saved, tmp_path):
    """Not by the recipe of the paper's pre-training, 2M tokens a step."""
    write_data(tmp_path / 'data', get_tokenizer('bytes'), {s: [list(range(200))] for s in ('train', 'val')}, '')
    folder(tmp_path / 'hf', theirs(build(pe='rope', vocab_size=257).state_dict()), dict(LLAMA, vocab_size=257))
    run(convert, tmp_path / 'hf', tmp_path / 'a.pt')
    save_checkpoint(str(tmp_path / 'b.pt'), dict(load_checkpoint(str(tmp_path / 'a.pt')), tokenizer='bytes'))
    flags = f'--micro_batch 256 --steps 3 {CPU} --data {tmp_path}/data --init_from {tmp_path}/b.pt --out {tmp_path}/run'
    said = run(train, flags)
    assert 'the fine-tuning recipe of a converted checkpoint: 3 steps, lr 2e-05, warm-up 0' in said
    assert '65,536 tokens a step' in said
    assert load_checkpoint(str(tmp_path / 'run'))['args']['lr'] == 2e-5


def test_a_tied_head_in_bf16_keeps_the_embedding_in_fp32():
    model = build(pe='rope', tie_embeddings=True)
    env = Env(dtype='bf16')
    with env.autocast():
        want = model(tokens(2, 9))[0]
        assert torch.equal(frozen(model, env)(tokens(2, 9))[0], want)


def test_a_folder_that_says_tied_and_holds_two_matrices_keeps_both(tmp_path):
    model = build(pe='rope')
    folder(tmp_path / 'hf', theirs(model.state_dict()), dict(LLAMA, tie_word_embeddings=True))
    run(convert, tmp_path / 'hf', tmp_path / 'a.pt')
    assert torch.equal(logits(tmp_path / 'a.pt', tokens(2, 9)), model(tokens(2, 9))[0])


def test_dropping_rope(tmp_path):
    yarn = dict(rope_scaling=SCALINGS['yarn'][0], max_position_embeddings=128)
    for name, config in ('llama', LLAMA | yarn), ('mixed', dict(SMOLLM3, no_rope_layers=[1, 0])):
        folder(tmp_path / name, theirs(build(pe='rope').state_dict()), config)
        run(convert, tmp_path / name, tmp_path / f'{name}.pt', '--pe nope')
        assert torch.equal(logits(tmp_path / f'{name}.pt', tokens(2, 50)), build(pe='nope')(tokens(2, 50))[0])
        c = load_checkpoint(str(tmp_path / f'{name}.pt'))['config']
        assert c['block_size'] == 32
        assert c['rope_inv_freq'] is None


@pytest.mark.parametrize('form', ['old', 'new'])
@pytest.mark.parametrize('kind', SCALINGS)
def test_rope_scaling_is_read(kind, form, tmp_path):
    rope, longest = dict(SCALINGS[kind][0]), 32 if kind in ('default', 'linear', 'dynamic') else 128
    config = dict(LLAMA, max_position_embeddings=longest)
    if form == 'old':
        config.update(
            rope_theta=5000.0, rope_scaling={'type' if k == 'rope_type' else k: v for k, v in rope.items()} or None
        )
    else:
        config.update(rope_parameters=dict(rope_theta=5000.0, **rope or dict(rope_type='default')))
        del config['rope_theta']
    folder(tmp_path / 'hf', {}, config)
    c, lam, most, tied = read_config(tmp_path / 'hf', None)
    assert (c.block_size, most, c.rope_theta, c.pe, tied, c.norm_eps) == (
        64 if kind == 'llama3' else 32,
        longest,
        5000,
        'rope',
        False,
        1e-5,
    )
    plain, m = 5000.0 ** (-np.arange(4) / 4), np.arange(4)
    wavelength = 2 * math.pi / plain                 # llama3: longer than 64 or shorter than 16 tokens, or between
    want = dict(
        linear=plain / 4,
        dynamic=(5000 * 3 ** (8 / 6)) ** (-m / 4),
        longrope=plain / [1, 1.5, 2.5, 4],  # dynamic: 2 * 64 / 32 - 1 = 3
        llama3=np.where(
            wavelength > 64,
            plain / 8,
            np.where(wavelength < 16, plain, plain * ((w := (64 / wavelength - 1) / 3) + (1 - w) / 8)),
        ),
    )
    if kind in want:
        np.testing.assert_allclose(c.rope_inv_freq, want[kind], rtol=1e-12)
    if kind in ('yarn', 'attention_factor'):
        np.testing.assert_allclose(c.rope_inv_freq, yarn(GPTConfig(**SHAPE, rope_theta=5000), 128)[0])
    assert lam == pytest.approx(
        dict(yarn=(0.1 * math.log(4) + 1) ** 2, attention_factor=1.44, longrope=1 + math.log(4) / math.log(32)).get(
            kind, 1
        )
    )
    assert (c.rope_inv_freq is None) == (kind == 'default')


def test_the_other_scripts_open_it(corpus, tmp_path):
    vocab = open_data(corpus, 'val')[1]['vocab_size']
    folder(
        tmp_path / 'hf',
        theirs(build(pe='rope', vocab_size=vocab).state_dict()),
        dict(LLAMA, vocab_size=vocab, rope_scaling=SCALINGS['linear'][0]),
    )
    run(convert, tmp_path / 'hf', tmp_path / 'run/ckpt.pt')
    run(
        train,
        BATCH,
        f'--preset tiny --init_from {tmp_path}/run --pe nope --steps 1 --length 32 --data {corpus}',
        f'--out {tmp_path}/drope',
    )
    flags = (f'--ckpt {tmp_path}/run --data {corpus} --method uniform --length 64 --batch 2 --grid 1,1.2 '
             f'--lengths 32,64 --eval_tokens 64 {CPU}')
    run(extend, flags)
    assert load_checkpoint(f'{tmp_path}/run/uniform-64.pt')['extended']['length'] == 64


# ---------------------------------------------------------------------------------------------------------------------
# out, without any package

@pytest.mark.parametrize('case', ['rope', 'nope', 'tied', 'pi', 'yarn', 'llama3', 'tuned longer', 'qk_norm rope',
                                  'qk_norm nope'])
def test_round_trip_is_exact(case, saved, tmp_path):
    model, more = (
        build(
            pe='nope' if case in ('nope', 'tuned longer', 'qk_norm nope') else 'rope',
            block_size=64 if case == 'llama3' else 32,
            tie_embeddings=case == 'tied',
            qk_norm='qk_norm' in case,
        ),
        {},
    )
    if 'qk_norm' in case:
        set_heads(model, [[1.3], [0.7]])             # of all heads of a layer
    if case == 'tuned longer':
        more = dict(args=dict(preset='tiny', length=100))
    if case in ('pi', 'yarn'):
        model.config.rope_inv_freq, lam = STRETCHED[case](model.config, 100)       # s is no round number
        set_heads(model, lam)
        more = dict(extended=dict(length=100))
    if case == 'llama3':
        model.config.rope_inv_freq = read_scaling(model.config, SCALINGS[case][0], 32)[0]
    checkpoint(tmp_path / 'a.pt', model, **more)
    run(convert, tmp_path / 'a.pt', tmp_path / 'hf')
    run(convert, tmp_path / 'hf', tmp_path / 'b.pt')
    a, b, config = (
        load_checkpoint(str(tmp_path / 'a.pt')),
        load_checkpoint(str(tmp_path / 'b.pt')),
        config_of(tmp_path / 'hf'),
    )
    assert bits(dict(a['model'])) == bits(dict(b['model']))
    assert {k: v for k, v in a['config'].items() if k != 'rope_inv_freq'} == {
        k: v for k, v in b['config'].items() if k != 'rope_inv_freq'
    }
    if a['config']['rope_inv_freq']:
        np.testing.assert_allclose(b['config']['rope_inv_freq'], a['config']['rope_inv_freq'], rtol=1e-14)
        assert config['rope_scaling']['rope_type'] == dict(pi='linear').get(case, case)
    assert torch.equal(logits(tmp_path / 'a.pt', tokens(2, 90)), logits(tmp_path / 'b.pt', tokens(2, 90)))
    assert config['max_position_embeddings'] == b['args']['length'] == (100 if more else model.config.block_size)
    assert config['tie_word_embeddings'] == (case == 'tied')
    assert (config['bos_token_id'], config['eos_token_id'], config['pad_token_id']) == (256, 256, None)  # of bytes
    assert sorted(os.listdir(tmp_path)) == ['a.pt', 'b.pt', 'hf']
    assert sorted(os.listdir(tmp_path / 'hf')) == ['config.json', 'generation_config.json', 'pytorch_model.bin',]


def test_the_papers_tuned_temperatures_come_along(tmp_path):
    model = build(pe='nope')
    state = theirs(model.state_dict())
    tuned = (torch.rand(2, 4) + 1).bfloat16()        # AntNLP/nope_head_scale: one for each query head, in bf16
    for i in (0, 1):
        state[f'model.layers.{i}.self_attn.scale_param'] = tuned[i]
    run(convert, folder(tmp_path / 'hf', state), tmp_path / 'a.pt', '--pe nope')
    set_heads(model, tuned.float())
    assert torch.equal(logits(tmp_path / 'a.pt', idx := tokens(2, 90)), model(idx)[0])
    state['model.layers.0.self_attn.scale_param'] = tuned[0, :2]
    with refused('model.layers.0.self_attn.scale_param is bfloat16 (2,), not (4,)'):
        run(convert, folder(tmp_path / 'bad', state), tmp_path / 'b.pt', '--pe nope')


def test_slopes_are_exported_as_they_are_at_the_length_that_they_were_found_for(saved, tmp_path):
    model = build(pe='nope')
    set_heads(model, torch.rand(2, 4), 'slope')
    known_up_to = dict(preset='tiny', length=128)    # an import with scaled RoPE, say
    checkpoint(tmp_path / 'a.pt', model, extended=dict(length=64), args=known_up_to)
    assert 'as they are at 64 tokens' in run(convert, tmp_path / 'a.pt', tmp_path / 'hf')
    run(convert, tmp_path / 'hf', tmp_path / 'b.pt')
    close(logits(tmp_path / 'b.pt', idx := tokens(2, 64)), model(idx)[0])


def test_a_folder_that_is_missing_or_not_converted_yet_is_named(tmp_path):
    with refused('is neither a Hugging Face folder'):
        run(convert, tmp_path / 'missing', tmp_path / 'a.pt', '--pe nope')
    hf = folder(tmp_path / 'hf', theirs(build(pe='rope').state_dict()))
    with refused(f'{hf} is a Hugging Face folder: python -m data.hf.convert {hf}'):
        load_checkpoint(str(hf))


def test_a_tokenizer_without_bos_begins_with_the_prompt(tmp_path, monkeypatch):
    checkpoint(tmp_path / 'a.pt', build(pe='nope', vocab_size=257))
    letters = Tokenizer('letters', 257, None, lambda text: list(text.encode()), lambda ids: bytes(ids).decode('latin1'))
    monkeypatch.setattr(sample, 'open_tokenizer', lambda *_: letters)
    assert '\nabc' in run(sample, tmp_path / 'a.pt', 'abc', '--max_new_tokens 3')
    with refused('has no BOS to begin a document with: give a prompt'):
        run(sample, tmp_path / 'a.pt')


def test_temperatures_fold(saved, tmp_path):
    for pe in 'nope', 'rope':
        model = build(pe=pe)
        set_heads(model, torch.rand(2, 4) + 0.5)
        set_heads(model, torch.rand(2, 4) - 0.5, 'slope')                 # is as it stands at 64 tokens
        checkpoint(tmp_path / f'{pe}.pt', model, extended=dict(length=64))
        run(convert, tmp_path / f'{pe}.pt', tmp_path / pe)
        run(convert, tmp_path / pe, tmp_path / f'{pe}-2.pt')
        ours = load_checkpoint(str(tmp_path / f'{pe}-2.pt'))
        assert all((w == 1).all() for k, w in ours['model'].items() if k.endswith('scale'))
        assert ours['config']['block_size'] == 32
        assert {k for k, w in ours['model'].items() if not torch.equal(w, model.state_dict()[k])} == {
            f'blocks.{i}.attn.{x}' for i in (0, 1) for x in ('q_proj.weight', 'scale', 'slope')
        }
        close(logits(tmp_path / f'{pe}-2.pt', idx := tokens(2, 64)), model(idx)[0])
        # folded in fp32, rounded once
        run(convert, tmp_path / f'{pe}.pt', tmp_path / f'{pe}-bf16', '--dtype bf16')
        assert config_of(tmp_path / f'{pe}-bf16')['torch_dtype'] == 'bfloat16'
        full, half = (torch.load(f'{tmp_path}/{pe}{x}/pytorch_model.bin') for x in ('', '-bf16'))
        assert list(half) == list(full)
        assert all(torch.equal(half[k], w.bfloat16()) for k, w in full.items())


def test_any_frequencies_can_be_named(saved, tmp_path):
    model = build(pe='rope')
    c = model.config
    nearly = [f * (1 + i * 1e-5) for i, f in enumerate(pi(c, 128)[0])]
    for name, freq, lam in (
        ('ntk', *ntk(c, 128)),
        ('searched', [1.0, 0.05, 0.004, 0.0003], 1),
        ('nearly pi', nearly, 1),
        ('mixed', yarn(c, 96)[0], 1.3),
    ):
        name = name.replace(' ', '-')
        c.rope_inv_freq = freq
        set_heads(model, lam)
        model.inv_freq.copy_(torch.tensor(freq))
        checkpoint(tmp_path / f'{name}.pt', model, extended=dict(length=128))
        run(convert, tmp_path / f'{name}.pt', tmp_path / name)
        run(convert, tmp_path / name, tmp_path / f'{name}-2.pt')
        close(logits(tmp_path / f'{name}-2.pt', tokens(2, 120)), model(tokens(2, 120))[0])
        rope = config_of(tmp_path / name)
        assert (rope['rope_theta'] > 10000, (rope['rope_scaling'] or {}).get('rope_type')) == dict(
            ntk=(True, None), mixed=(False, 'yarn')).get(name, (False, 'longrope'))
        if name == 'searched':
            r = rope['rope_scaling']
            assert r['short_factor'] == r['long_factor']
            assert r['attention_factor'] == r['short_mscale'] == r['long_mscale'] == 1
            assert r['factor'] == 4


def test_the_tokenizer_goes_along(saved, tmp_path):
    hf = folder(
        tmp_path / 'hf',
        theirs(build(pe='rope').state_dict()),
        config := dict(LLAMA, bos_token_id=1, eos_token_id=[2, 5], pad_token_id=-1),
    )
    for name in ('tokenizer.json', 'tokenizer_config.json', 'generation_config.json', 'README.md'):
        (tmp_path / 'hf' / name).write_text('{}')
    run(convert, hf, tmp_path / 'a.pt')
    run(convert, tmp_path / 'a.pt', tmp_path / 'out')
    assert sorted(os.listdir(tmp_path / 'out')) == [
        'config.json',
        'generation_config.json',
        'pytorch_model.bin',
        'tokenizer.json',
        'tokenizer_config.json',
    ]
    assert [config_of(tmp_path / 'out')[k] for k in ('bos_token_id', 'eos_token_id', 'pad_token_id')] == [
        1,
        [2, 5],
        None,
    ]
    for pad, want in (3, 3), (60, None), (None, None):           # one that no embedding has is left out
        (hf / 'config.json').write_text(json.dumps(dict(config, pad_token_id=pad)))
        assert special_ids(f'hf:{hf}', 60)['pad_token_id'] == want
    shutil.rmtree(hf)                                # a copy of it stays with the checkpoint
    run(convert, tmp_path / 'a.pt', tmp_path / 'out1')
    assert sorted(os.listdir(tmp_path / 'out1')) == sorted(os.listdir(tmp_path / 'out'))
    shutil.rmtree(tmp_path / 'tokenizer')
    assert 'no tokenizer goes along' in run(convert, tmp_path / 'a.pt', tmp_path / 'out2')
    assert sorted(os.listdir(tmp_path / 'out2')) == ['config.json', 'generation_config.json', 'pytorch_model.bin']


@pytest.mark.parametrize('length', [dict(max_length=128), {}])
def test_the_generation_config_fits_the_exported_model(length, saved, tmp_path):
    hf = folder(tmp_path / 'hf', theirs(build(pe='rope').state_dict()))
    stale = dict(length, max_new_tokens=100, eos_token_id=[2, 5], pad_token_id=99, top_p=0.9)
    (hf / 'generation_config.json').write_text(json.dumps(stale))
    checkpoint(tmp_path / 'a.pt', build(), f'hf:{hf}', extended=dict(length=512))
    run(convert, tmp_path / 'a.pt', tmp_path / 'out')
    written = json.loads((tmp_path / 'out/generation_config.json').read_text())
    assert written == dict(eos_token_id=[2, 5], top_p=0.9) | {name: 512 for name in length}


@pytest.mark.parametrize('tokenizer', ['bytes', 'passkey'])
def test_an_export_says_what_does_not_follow(tokenizer, saved, tmp_path):
    checkpoint(tmp_path / 'a.pt', build(vocab_size=300), tokenizer)
    said = run(convert, tmp_path / 'a.pt', tmp_path / 'out')
    assert f'the tokenizer {tokenizer} has no files' in said
    assert 'llama.cpp rotates three of four layers of any SmolLM3' in said
    checkpoint(tmp_path / 'b.pt', build(vocab_size=300, pe='rope'), tokenizer)
    assert 'llama.cpp' not in run(convert, tmp_path / 'b.pt', tmp_path / 'out2')
    checkpoint(tmp_path / 'c.pt', build(vocab_size=300, qk_norm=True), tokenizer)
    assert 'llama.cpp rotates every layer of such a Qwen3' in run(convert, tmp_path / 'c.pt', tmp_path / 'out3')


# ---------------------------------------------------------------------------------------------------------------------
# what does not fit costs one line

@pytest.mark.parametrize(
    'change, words',
    [
        (dict(model_type='mistral'), 'config.json model_type mistral'),
        (dict(architectures=['GPT2LMHeadModel']), 'architectures GPT2LMHeadModel'),
        (dict(hidden_act='gelu'), 'hidden_act gelu'),
        (dict(attention_bias=True), 'attention_bias'),
        (dict(mlp_bias=True), 'mlp_bias'),
        (dict(head_dim=16), 'head_dim 16'),
        (dict(partial_rotary_factor=0.5), 'partial_rotary_factor'),
        (dict(quantization_config=dict(bits=4)), 'quantization_config'),
        (dict(SMOLLM3, sliding_window=16, layer_types=['sliding_attention'] * 2), 'use_sliding_window'),
        (dict(SMOLLM3, use_sliding_window=True, layer_types=['sliding_attention'] * 2), 'sliding_window'),
        (dict(layer_types=['sliding_attention'] * 2), 'layer_types'),
        (dict(use_sliding_window=True, sliding_window=16), 'sliding_window'),
        (dict(layer_types=['chunked_attention'] * 2), 'layer_types chunked_attention'),
        (dict(model_type='llama4_text', num_local_experts=16, attention_chunk_size=8192), 'num_local_experts 16'),
        (dict(model_type='llama4_text', attention_chunk_size=8192), 'attention_chunk_size 8192'),
        (dict(model_type='cohere2', logit_scale=0.0625, sliding_window=4096), 'logit_scale 0.0625'),
        (dict(rope_scaling=dict(type='mrope', factor=2.0)), 'rope_type mrope'),
        (dict(rope_parameters=dict(full_attention=dict(rope_theta=1.0))), 'rope_parameters'),
        (dict(rope_scaling=dict(rope_type='llama3', factor=2.0)), 'lacks low_freq_factor'),
        (dict(rope_scaling=dict(type='linear', factor='2')), 'config.json'),
        (dict(rope_scaling=dict(type='longrope', short_factor=[1], long_factor=[1])), 'config.json'),
        (dict(rope_scaling=7), 'config.json'),
        (dict(rope_scaling=dict(type='yarn', factor=2.0, beta_fast=16)), 'beta_fast 16'),
        (dict(rope_scaling=dict(type='yarn', factor=2.0, mscale=0.7)), 'mscale 0.7'),
        (dict(num_key_value_heads=3), 'n_kv_head 3'),
        (dict(num_hidden_layers=0), 'n_layer'),
        (dict(hidden_size='32'), 'config.json'),
        (dict(vocab_size=60.0), 'vocab_size 60.0'),
        (dict(num_attention_heads=0), 'config.json'),
        (dict(max_position_embeddings=None), 'max_position_embeddings None'),
        (dict(intermediate_size=None), 'intermediate_size None'),
    ],
)
def test_a_configuration_that_does_not_fit(change, words, tmp_path):
    hf = folder(tmp_path / 'hf', theirs(build(pe='rope').state_dict()), LLAMA | change)
    check_refused(convert, f'{hf} {tmp_path}/ckpt.pt', f' : {words}')
    assert os.listdir(tmp_path) == ['hf']


def test_files_that_do_not_fit(tmp_path, monkeypatch):
    state = theirs(build(pe='rope').state_dict())

    def case(words, change=None, config=LLAMA, shards=1, flags=''):
        shutil.rmtree(tmp_path / 'hf', ignore_errors=True)
        hf = folder(tmp_path / 'hf', {k: w for k, w in state.items() if k != change}, config, shards)
        if callable(change):
            change(hf)
        elif isinstance(change, dict):
            torch.save({**state, **change}, hf / 'pytorch_model.bin')
        check_refused(convert, f'{hf} {tmp_path}/ckpt.pt', f'{flags} : {words}')
        assert os.listdir(tmp_path) == ['hf']            # nothing is left behind

    case('pytorch_model-1.bin missing index.json', lambda hf: os.remove(hf / 'pytorch_model-1.bin'), shards=2)
    case('no weights', lambda hf: os.remove(hf / 'pytorch_model.bin'))
    case('index.json cannot be read', lambda hf: (hf / 'pytorch_model.bin.index.json').write_text('{'), shards=2)
    case('config.json cannot be read', lambda hf: (hf / 'config.json').write_text('{"model_type": '))
    case('config.json cannot be read', lambda hf: (hf / 'config.json').write_text('[1]'))
    case('config.json lacks', lambda hf: (hf / 'config.json').write_text('{}'))
    case('pytorch_model.bin no whole file', lambda hf: os.truncate(hf / 'pytorch_model.bin', 9000))
    case('pytorch_model.bin no whole file', lambda hf: (hf / 'pytorch_model.bin').write_bytes(b''))
    case(
        'model.safetensors', lambda hf: (hf / 'model.safetensors').write_bytes(b'{}')
    )  # damaged, or the package is missing
    case('lacks 1 weights, lm_head.weight', 'lm_head.weight')
    case('model.norm.weight float32 (31,) (32,)', {'model.norm.weight': torch.ones(31)})
    case('model.norm.weight int8', {'model.norm.weight': torch.ones(32, dtype=torch.int8)})
    case('model.norm.weight list', {'model.norm.weight': [1.0]})
    case('model.layers.1.self_attn.q_proj.bias counterpart', {'model.layers.1.self_attn.q_proj.bias': torch.ones(32)})
    case('embed_tokens (60, 32) (61, 32)', config=dict(LLAMA, vocab_size=61))
    case('--dtype', flags='--dtype bf16')
    case(
        'pytorch_model.bin would run code',
        lambda hf: torch.save({'model.norm.weight': SimpleNamespace()}, hf / 'pytorch_model.bin'),
    )

    def flip(hf):
        raw = bytearray((hf / 'pytorch_model.bin').read_bytes())
        raw[raw.find(state['lm_head.weight'].numpy().tobytes())] ^= 1
        (hf / 'pytorch_model.bin').write_bytes(raw)
    case('pytorch_model.bin damaged checksum', flip)
    monkeypatch.setitem(sys.modules, 'safetensors', None)
    case('pip install safetensors', lambda hf: (hf / 'model.safetensors').write_bytes(b'{}'))
    monkeypatch.undo()

    hf = folder(tmp_path / 'good', state)
    checkpoint(tmp_path / 'there.pt', build())
    for out, words in (tmp_path, 'ckpt.pt'), (tmp_path / 'name', 'ckpt.pt'), (tmp_path / 'there.pt', 'exists already'):
        check_refused(convert, f'{hf} {out}', f' : {words}')
    check_refused(convert, f'{hf} {tmp_path}/x.pt --pe rope', '')
    (tmp_path / 'a.gguf').write_bytes(b'GGUF')
    check_refused(convert, f'{tmp_path}/a.gguf {tmp_path}/x.pt', ' : a.gguf gguf_file= save_pretrained')


def test_a_checkpoint_that_does_not_fold(saved, tmp_path, monkeypatch):
    def case(words, model, flags='', out='hf', **more):
        check_refused(
            convert, f'{checkpoint(tmp_path / "ckpt.pt", model, **more)} {tmp_path / out}', f'{flags} : {words}'
        )
        assert not (tmp_path / 'hf').exists()
        assert not [f for f in os.listdir(tmp_path) if f.endswith('.tmp')]

    for pe in 'learned', 'sinusoidal', 't5', 'alibi':
        case(f'pe={pe}', build(pe=pe))
    for out in 'other.pt', 'hf.safetensors', 'hf.gguf':
        case(f'{out} folder', build(), out=out)
    case('head size 5 odd', build(qk_norm=True, n_embd=20))
    case('qk_norm=full', build(qk_norm='full'))
    sloped = build()
    set_heads(sloped, 0.1, 'slope')
    case('slope past 32 extend.py', sloped)
    lawful = build()
    set_heads(lawful, 0.1, 'slope')
    lawful.config.law = 'logn'
    case('law logn', lawful)
    case('rope_fraction 0.5', build(pe='rope', rope_fraction=0.5))
    case('window 4,9', build(pe='rope', window='4,9'))
    case('rope_start 4 n-hat', build(pe='rope', rope_start=4, rope_inv_freq=[1.0, 0.1, 0.01, 0.001]))
    case('--pe --init_from', build(pe='rope'), '--pe nope')
    (tmp_path / 'full').mkdir()
    (tmp_path / 'full/file').write_text('')
    case('full exists already', build(), out='full')
    case('full/file exists already', build(), out='full/file')
    short = build()
    del short.blocks[1].mlp
    case('do not fit blocks.1.mlp', short)
    check_refused(
        convert, f'{tmp_path}/nowhere {tmp_path}/hf', ' : nowhere neither Hugging Face config.json checkpoint'
    )
    check_refused(convert, f'{tmp_path}/full {tmp_path}/hf', ' : full neither config.json checkpoint')
    monkeypatch.setitem(sys.modules, 'safetensors.torch', None)
    case('pip install safetensors', build())

    def full(*a, **k):
        raise OSError(28, 'No space left on device')
    monkeypatch.setitem(sys.modules, 'safetensors.torch', SimpleNamespace(save_file=full))
    case('could not write No space left', build())


# ---------------------------------------------------------------------------------------------------------------------
# against transformers

@pytest.fixture(scope='module')
def hf():
    pytest.importorskip('safetensors')
    package = pytest.importorskip('transformers')
    package.logging.set_verbosity_error()
    package.logging.disable_progress_bar()
    return package


def random_llama(hf, kind='LlamaFor', **config):
    """A network of theirs with random weights large enough to make attention matter."""
    torch.manual_seed(3)
    config = {k: v for k, v in LLAMA.items() if k not in ('architectures', 'model_type', 'rope_theta')} | config
    model = getattr(hf, f'{kind}CausalLM')(getattr(hf, f'{kind[:-3]}Config')(**config)).eval().requires_grad_(False)
    for p in model.parameters():
        p.mul_(7) if p.dim() == 2 else p.mul_(torch.rand(p.shape) + 0.5)
    return model


def load(hf, path):
    return hf.AutoModelForCausalLM.from_pretrained(path, local_files_only=True).eval()


@torch.no_grad()
def same(model, path, T, tol=1e-5):
    """Their model and a checkpoint of ours have the same logits at length T; returns ours."""
    ours = logits(path, tokens(2, T))
    assert ours.std() > 0.3
    close(ours, model(tokens(2, T)).logits, tol)
    return ours


@pytest.mark.parametrize('kind', SCALINGS)
def test_llama_in_and_out(kind, hf, tmp_path):
    rope, T = SCALINGS[kind]
    tied, longest = kind in ('default', 'yarn', 'llama3'), 32 if kind in ('default', 'linear', 'dynamic') else 128
    theta = dict(rope_theta=5000.0, **rope or dict(rope_type='default'))
    model = random_llama(
        hf,
        tie_word_embeddings=tied,
        num_key_value_heads=4 if kind == 'linear' else 1,
        max_position_embeddings=longest,
        rope_parameters=theta,
    )
    model.save_pretrained(tmp_path / 'hf', max_shard_size='20KB' if kind in ('default', 'dynamic') else '1GB')
    run(convert, tmp_path / 'hf', tmp_path / 'a.pt')
    run(convert, tmp_path / 'a.pt', tmp_path / 'out')
    ours, back = same(model, tmp_path / 'a.pt', T), load(hf, tmp_path / 'out')
    if kind != 'default':                            # the scaling counts
        plain = copy.deepcopy(load_checkpoint(str(tmp_path / 'a.pt')))
        plain['config']['rope_inv_freq'] = None
        assert (load_model(plain)(tokens(2, T))[0] - ours).abs().max() > 0.01
    same(back, tmp_path / 'a.pt', T)
    assert back.config.tie_word_embeddings == tied
    assert back.config.max_position_embeddings == longest
    if kind in ('default', 'linear', 'yarn', 'llama3'):          # nothing was folded
        assert bits(dict(back.state_dict())) == bits(dict(model.state_dict()))
        got, was = back.config.rope_parameters, model.config.rope_parameters
        assert {k: got[k] for k in was} == was


@pytest.mark.parametrize('rows', [1, 3])
def test_smollm3_in_and_out(rows, hf, tmp_path):
    model = random_llama(
        hf,
        'SmolLM3For',
        no_rope_layers=[0, 0],
        pad_token_id=None,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=rows == 3,
    )
    model.save_pretrained(tmp_path / 'hf', max_shard_size='20KB' if rows == 3 else '1GB')
    run(convert, tmp_path / 'hf', tmp_path / 'a.pt')
    run(convert, tmp_path / 'a.pt', tmp_path / 'out')
    same(model, tmp_path / 'a.pt', 90)
    back = load(hf, tmp_path / 'out')
    same(back, tmp_path / 'a.pt', 90)
    assert type(back).__name__ == 'SmolLM3ForCausalLM'
    assert back.config.bos_token_id == 1
    assert bits(dict(back.state_dict())) == bits(dict(model.state_dict()))
    # the same weights under a Llama's configuration, as the paper's checkpoint has them
    llama = random_llama(hf, tie_word_embeddings=rows == 3)
    llama.load_state_dict(model.state_dict())
    llama.save_pretrained(tmp_path / 'llama')
    run(convert, tmp_path / 'llama', tmp_path / 'b.pt', '--pe nope')
    assert torch.equal(logits(tmp_path / 'b.pt', tokens(2, 90)), logits(tmp_path / 'a.pt', tokens(2, 90)))
    assert (llama(tokens(2, 90)).logits - model(tokens(2, 90)).logits).abs().max() > 0.1


@pytest.mark.parametrize('method', ['head', 'head rope', 'pi', 'ntk', 'yarn', 'longrope'])
def test_what_extend_makes_runs_there(method, hf, tmp_path):
    model = build(pe='nope' if method == 'head' else 'rope')
    c, lam = model.config, torch.rand(2, 4) * 2 + 0.5
    if method in STRETCHED:
        c.rope_inv_freq, lam = STRETCHED[method](c, 128)
    if method == 'longrope':
        c.rope_inv_freq, lam = (
            [f / r for f, r in zip(rope_frequencies(c), (1, 1.3, 2.9, 5))],
            1 + math.log(4) / math.log(32),
        )
    set_heads(model, lam)
    checkpoint(tmp_path / 'a.pt', model, extended=dict(length=128))
    run(convert, tmp_path / 'a.pt', tmp_path / 'out')
    back = load(hf, tmp_path / 'out')
    same(back, tmp_path / 'a.pt', 120)
    assert back.config.max_position_embeddings == 128
    assert type(back).__name__ == ('SmolLM3' if method == 'head' else 'Llama') + 'ForCausalLM'
    if not method.startswith('head'):
        assert back.config.rope_parameters['rope_type'] == dict(pi='linear', ntk='default').get(method, method)
    # greedy and cached, past the training length and past the extended one
    idx, ours = tokens(1, 100), load_model(load_checkpoint(str(tmp_path / 'a.pt')))
    there = back.generate(
        idx, attention_mask=torch.ones_like(idx), max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert torch.equal(there, ours.generate(idx, 40, temperature=0))
    run(convert, tmp_path / 'a.pt', tmp_path / 'half', '--dtype fp16')
    same(load(hf, tmp_path / 'half').float(), tmp_path / 'a.pt', 120, tol=0.1)


@pytest.mark.parametrize('case', ['tiny', 'alike', 'head', 'head-log', 'yarn', 'longrope'])
@pytest.mark.parametrize('pe', ['nope', 'rope'])
def test_qk_norm_runs_there_as_qwen3(pe, case, hf, tmp_path):
    if pe == 'nope' and case in ('yarn', 'longrope'):
        pytest.skip('stretches RoPE')
    model = build(pe=pe, qk_norm=True, qk_gain=case == 'tiny')
    lam = 1.0
    if case == 'tiny':                               # what the preset learns: a gain for each head, here even below 0
        set_heads(model, torch.randn(2, 4) * 2, 'gain')
    if case == 'alike':
        lam = torch.tensor([[1.3], [1.7]])           # of each layer
    if case in ('head', 'yarn'):
        lam = torch.rand(2, 4) * 2 + 0.5
    if case == 'head-log':
        set_heads(model, torch.rand(2, 4), 'slope')
    if case == 'yarn':
        model.config.rope_inv_freq, t = yarn(model.config, 128)
        lam = lam * t
    if case == 'longrope':
        model.config.rope_inv_freq = [f / r for f, r in zip(rope_frequencies(model.config), (1, 1.3, 2.9, 5))]
        lam = torch.rand(2, 4) + 1
    set_heads(model, lam)
    checkpoint(tmp_path / 'a.pt', model, extended=dict(length=128))
    run(convert, tmp_path / 'a.pt', tmp_path / 'out')
    there = load(hf, tmp_path / 'out')
    same(there, tmp_path / 'a.pt', 128, tol=1e-4)
    assert type(there).__name__ == 'Qwen3ForCausalLM'
    assert there.config.head_dim == (8 if case == 'alike' else 16)       # twice as wide only where it must be
    if pe == 'nope':                                 # vLLM keeps a table of factor x length positions of some kinds
        assert there.config.rope_parameters['factor'] == 4
    if case == 'alike':                              # and then nothing is lost on the way back
        run(convert, tmp_path / 'out', tmp_path / 'b.pt')
        assert changed(tmp_path / 'a.pt', tmp_path / 'b.pt') == set()


def test_a_qwen3_with_a_gain_for_each_dimension_is_refused(hf, tmp_path):
    model = random_llama(hf, 'Qwen3For', head_dim=8)
    model.save_pretrained(tmp_path / 'hf')
    with refused('_norm.weight', 'differs between dimensions'):
        run(convert, tmp_path / 'hf', tmp_path / 'a.pt')


def test_a_tokenizer_without_its_vocabulary_is_refused(hf, tmp_path):
    """transformers makes an empty one of it, without a word, and a corpus would be empty too."""
    words_tokenizer(tmp_path / 'words')
    os.remove(tmp_path / 'words/tokenizer.json')
    with refused('words'):
        get_tokenizer(f'hf:{tmp_path}/words')


def test_a_prompt_with_a_token_that_the_model_has_no_row_for(hf, tmp_path):
    words_tokenizer(tmp_path / 'words')              # of 7 tokens
    mark = get_tokenizer(f'hf:{tmp_path}/words').fingerprint
    checkpoint(tmp_path / 'a.pt', build(vocab_size=6), f'hf:{tmp_path}/words', tokenizer_fingerprint=mark)
    said = run(sample, tmp_path / 'a.pt', ['the grass is'], '--max_new_tokens 2 --device cpu')
    assert '\nthe grass is' in said
    with refused('green', 'token 6', '6 only'):
        run(sample, tmp_path / 'a.pt', ['the grass is green'], '--max_new_tokens 2 --device cpu')


def test_a_weight_that_is_not_finite_is_not_read(tmp_path):
    state = theirs(build(pe='rope').state_dict())
    state['model.norm.weight'][0] = math.inf
    folder(tmp_path / 'hf', state, LLAMA)
    with refused('model.norm.weight', 'not finite'):
        run(convert, tmp_path / 'hf', tmp_path / 'a.pt')


def test_what_stands_for_bos_is_said(hf, tmp_path):
    """An Instruct model's is the beginning of a turn."""
    folder(tmp_path / 'hf', theirs(build(pe='rope').state_dict()))
    words_tokenizer(tmp_path / 'hf')
    said = run(convert, tmp_path / 'hf', tmp_path / 'a.pt')
    assert "begin with '<s>'" in said
    assert '--bos' in said


def test_a_tokenizer_of_theirs(hf, tmp_path):
    """Trained here on its ids, then written with it: a folder without config.json."""
    words_tokenizer(tmp_path / 'words')
    checkpoint(tmp_path / 'a.pt', build(vocab_size=7), tokenizer=f'hf:{tmp_path}/words')
    run(convert, tmp_path / 'a.pt', tmp_path / 'out')
    there = hf.AutoTokenizer.from_pretrained(tmp_path / 'out', local_files_only=True)
    ours = get_tokenizer(f'hf:{tmp_path}/out')
    assert there.encode('the grass is green', add_special_tokens=False) == ours.encode('the grass is green')
    assert ours.encode('the grass is green') == [3, 4, 5, 6]
    assert load(hf, tmp_path / 'out').config.bos_token_id == config_of(tmp_path / 'out')['eos_token_id'] == 0


@pytest.mark.parametrize('pe, qk_norm', [('nope', True), ('rope', True), ('nope', False), ('rope', False)])
def test_the_passkey_grid_through_generate(pe, qk_norm, hf, tmp_path, monkeypatch):
    """results/bench.py --passkey: their greedy decoding gives our tokens, and as many keys."""
    from results import bench
    bench_home = getattr(bench, 'io', bench)
    torch.manual_seed(0)
    model = GPT(GPTConfig(**dict(SHAPE, vocab_size=101, block_size=96), pe=pe, qk_norm=qk_norm))
    for p in model.parameters():                     # sharp enough that no two tokens are level
        if p.dim() == 2:
            p.data *= 3
    path = checkpoint(tmp_path / 'ckpt.pt', model, 'passkey')
    monkeypatch.setattr(bench_home, 'write_csv', lambda *_: None)
    monkeypatch.setattr(bench_home, 'read_csv', lambda _: [])
    monkeypatch.setattr(bench_home, 'default_lengths', lambda _: [48, 96, 128])
    made = bench.passkey(SimpleNamespace(passkey=path, device='cpu', rounds=1))
    assert [row['length'] for row in made] == [96, 128]
    for row in made:
        assert row['decoded_alike'] == row['prompts'] == 20
        assert row['our_hits'] == row['their_hits']


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, 'lm_eval', None)
    monkeypatch.delitem(sys.modules, 'data.hf.harness', raising=False)
    with refused('lm-evaluation-harness', 'pip install lm-eval'):
        importlib.import_module('data.hf.harness')
