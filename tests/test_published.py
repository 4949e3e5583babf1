"""
Numbers that others have published, which our formulas must reproduce. Each row says where it stands.
"""
import math
from types import SimpleNamespace

import pytest
import torch

from data import rope
from data.hf.scaling import read_scaling
from data.positions import alibi_slopes, ntk, rope_frequencies, yarn
from data.runtime import Env
from model import GPT, GPTConfig
from results.fit import fit

# Llama-2's attention (Touvron et al. 2023): heads of 128, theta 10000, 4,096 tokens
LLAMA2 = dict(block_size=4096, n_layer=1, n_head=32, n_kv_head=32, n_embd=4096, rope_theta=10000.0)


# ---------------------------------------------------------------------------------------------------------------------
# YaRN (Peng et al. 2024, arXiv 2309.00071) for Llama-2 at s = 16, its 64K model

def test_yarn_keeps_and_divides_the_dimensions_that_the_paper_says():
    """Sec. 3.2, eq. 17 to 20, by turns within L: kept above beta = 32, divided below alpha = 1."""
    freq, _ = yarn(GPTConfig(**LLAMA2), 16 * 4096)
    kept, divided, between = 0, 0, 0
    for m, new in enumerate(freq):
        trained = 10000 ** (-2 * m / 128)
        turns = 4096 * trained / (2 * math.pi)
        if turns > 32:
            assert new == pytest.approx(trained, rel=1e-12)
            kept += 1
        elif turns < 1:
            assert new == pytest.approx(trained / 16, rel=1e-12)
            divided += 1
        else:
            assert trained / 16 < new < trained
            between += 1
    assert (kept, between, divided) == (21, 25, 18)


def test_yarn_between_them_is_the_ramp_of_its_code():
    """jquesnelle/yarn, LlamaYaRNScaledRotaryEmbedding.py: linear in the dimension, here from 20 to 46."""
    freq, _ = yarn(GPTConfig(**LLAMA2), 16 * 4096)
    m = torch.arange(64, dtype=torch.float64)
    trained = 10000 ** (-m / 64)
    ramp = ((m - 20) / (46 - 20)).clamp(0, 1)
    want = trained / 16 * ramp + trained * (1 - ramp)
    torch.testing.assert_close(torch.tensor(freq, dtype=torch.float64), want, rtol=1e-12, atol=0)


# eq. 22: sqrt(1/t) = 0.1 ln s + 1 on q and on k; s = 16 and 32 are its 64K and 128K models
@pytest.mark.parametrize('s, on_each', [(1, 1.0), (16, 1.27726), (32, 1.34657)])
def test_the_temperature_of_yarn(s, on_each):
    assert math.sqrt(yarn(GPTConfig(**LLAMA2), s * 4096)[1]) == pytest.approx(on_each, abs=1e-5)


def test_yarn_as_transformers_has_it():
    transformers = pytest.importorskip('transformers')
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    rope = dict(rope_type='yarn', rope_theta=10000.0, factor=16.0, original_max_position_embeddings=4096)
    config = transformers.LlamaConfig(hidden_size=4096, num_attention_heads=32, max_position_embeddings=65536,
                                      rope_parameters=rope)
    theirs, on_each = ROPE_INIT_FUNCTIONS['yarn'](config, 'cpu')
    freq, temperature = yarn(GPTConfig(**LLAMA2), 16 * 4096)
    torch.testing.assert_close(torch.tensor(freq), theirs, rtol=1e-5, atol=0)
    assert temperature == pytest.approx(on_each ** 2)


# ---------------------------------------------------------------------------------------------------------------------
# LongRoPE, NTK, ALiBi

# microsoft/LongRoPE, rope/longrope.py: sqrt(1 + ln s / ln L) on q and on k; the attention factor of Phi-3.5-mini, which
# goes from 4,096 to 131,072 tokens, in its GGUF files
@pytest.mark.parametrize('L, s, on_each', [(4096, 32, 1.190238), (4096, 1, 1.0)])
def test_the_temperature_of_longrope(L, s, on_each, monkeypatch):
    config = GPTConfig(block_size=L, vocab_size=8, n_layer=1, n_head=1, n_kv_head=1, n_embd=8, n_inner=8, pe='rope')
    model = GPT(config)
    monkeypatch.setattr(rope, 'loss_of', lambda *_: 0.0)
    args = SimpleNamespace(length=s * L, population=4, iterations=0, seed=0, grid_batches=1)
    rope.longrope(model, None, args, Env(device='cpu', dtype='fp32'))
    assert model.blocks[0].attn.scale.item() == pytest.approx(on_each ** 2, rel=1e-5)
    longrope = dict(rope_type='longrope', long_factor=[1.0] * 4, factor=float(s))
    assert math.sqrt(read_scaling(config, longrope, s * L)[1]) == pytest.approx(on_each, rel=1e-5)


# bloc97 2023 ("NTK-Aware Scaled RoPE"): base * alpha ** (dim / (dim - 2)), dim = 128
@pytest.mark.parametrize('alpha, base', [(2, 20221.3), (4, 40890.0), (8, 82684.6)])
def test_the_base_of_ntk(alpha, base):
    c = GPTConfig(**LLAMA2)
    freq, temperature = ntk(c, alpha * 4096)
    assert freq[1] ** (-128 / 2) == pytest.approx(base, rel=1e-5)
    # YaRN's sec. 3.1: what it is for, the lowest frequency is divided by s and the highest kept
    assert freq[-1] == pytest.approx(rope_frequencies(c)[-1] / alpha)
    assert (freq[0], temperature) == (1.0, 1.0)


# Press et al. 2022, sec. 3: 1/2^1, 1/2^2, ..., 1/2^8 for 8 heads, 1/2^0.5, 1/2^1, 1/2^1.5, ..., 1/2^8 for 16
@pytest.mark.parametrize('n_head, slopes', [
    (8, [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]),
    (16, [2 ** -0.5, 2 ** -1, 2 ** -1.5, 2 ** -2, 2 ** -2.5, 2 ** -3, 2 ** -3.5, 2 ** -4,
          2 ** -4.5, 2 ** -5, 2 ** -5.5, 2 ** -6, 2 ** -6.5, 2 ** -7, 2 ** -7.5, 2 ** -8])])
def test_the_slopes_of_alibi(n_head, slopes):
    assert alibi_slopes(n_head) == pytest.approx(slopes)


# ---------------------------------------------------------------------------------------------------------------------
# the uniform temperature (Wang et al. 2024, arXiv 2404.12224)

# app. B: lambda = 1 + a ln s, a fitted to the best temperature of each position, after 10k and 50k steps; beside it
# the temperature that the paper advises for s times the length
PAPER = [(2, 1.209, 1.275, 1.2), (4, 1.417, 1.551, 1.5), (8, 1.626, 1.826, 1.8)]


@pytest.mark.parametrize('s, after_10k, after_50k, advised', PAPER)
def test_a_slope_gives_the_temperatures_of_the_fit(s, after_10k, after_50k, advised):
    model = GPT(GPTConfig(block_size=16, vocab_size=8, n_layer=1, n_head=2, n_kv_head=2, n_embd=8, n_inner=8))
    attention = model.blocks[0].attn
    attention.slope.data.copy_(torch.tensor([0.3010, 0.3973]))
    found = attention.temperature(torch.tensor([math.log(s)])).flatten().tolist()
    assert found == pytest.approx([after_10k, after_50k], abs=1e-3)
    assert advised == pytest.approx(after_50k, abs=0.08)         # rounded


def test_what_the_paper_advises_lies_between_its_fits():
    a, _ = fit([s for s, *_ in PAPER], [advised for *_, advised in PAPER])
    assert 0.3010 < a < 0.3973
    for column, slope in (1, 0.3010), (2, 0.3973):
        a, r2 = fit([row[0] for row in PAPER], [row[column] for row in PAPER])
        assert a == pytest.approx(slope, abs=1e-3)
        assert r2 > 0.999


# DroPE (Gelberg et al. 2025, app. C.2): 1 + 0.412 ln s from scratch, 1 + 0.103 ln s with QK-norm
@pytest.mark.parametrize('a, values', [(0.412, (1.286, 1.571, 1.857)), (0.103, (1.071, 1.143, 1.214))])
def test_the_temperatures_of_drope(a, values):
    found, r2 = fit((2, 4, 8), values)
    assert found == pytest.approx(a, abs=1e-3)
    assert r2 > 0.999
