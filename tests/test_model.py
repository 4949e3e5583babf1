"""What model.py promises about its numbers, each held against something written apart from it."""
import functools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import build, close, refused, run, set_heads
from torch.nn.attention import SDPBackend, sdpa_kernel

from data import sample
from data.checkpoint import load_checkpoint, load_model
from data.positions import alibi_slopes, ntk, pi, t5_bucket, yarn
from data.tokenizer import get_tokenizer
from model import ENCODINGS, GPT, PRESETS, GPTConfig, KVCache

L = 16                                               # the block_size of build(); most sequences here are longer
every_pe = pytest.mark.parametrize('pe', ENCODINGS)


def heat(model):
    """Another temperature for each head, and another change of it past block_size."""
    for block in model.blocks:
        block.attn.scale.data.uniform_(0.5, 2)
        block.attn.slope.data.uniform_(-0.5, 0.5)
    return model


def tokens(*shape):
    return torch.randint(50, shape)


def span(pe):
    """A length past block_size, where there is one."""
    return L if pe == 'learned' else 40


def t5_table(n):
    """Raffel et al. 2020: the first distances of 32 buckets up to 128, from its code's formula by hand."""
    first = (*range(1, 17), 19, 21, 24, 27, 31, 35, 40, 46, 52, 59, 67, 77, 87, 99, 113)
    return sum(n >= distance for distance in first)


def turned(x, c):
    """RoPE on x (T, hs) from position 0. Su et al. 2021, eq. 12: a pair is a complex number, times exp(i t theta_m)."""
    T, hs = x.shape
    theta = [math.exp(-2 * m / hs * math.log(c.rope_theta)) for m in range(hs // 2)]
    turn = torch.exp(1j * torch.arange(T).double()[:, None] * torch.tensor(c.rope_inv_freq or theta).double())
    pairs = torch.complex(x[:, :hs // 2], x[:, hs // 2:])
    return torch.view_as_real(pairs * turn).mT.flatten(1)


def reference(model, idx):
    """The network in float64, from the papers' equations: a GPT's config and weights, idx (T,) -> logits (T, V)."""
    c, w = model.config, {k: v.double() for k, v in model.state_dict().items()}
    T, hs = len(idx), c.n_embd // c.n_head

    def norm(x, gain=1):                             # RMSNorm: x / sqrt(mean x^2 + eps)
        return gain * x / (x.pow(2).mean(-1, keepdim=True) + c.norm_eps) ** 0.5

    x = w['embed.weight'][idx]
    if c.pe == 'learned':
        x = x + w['pos_embed.weight'][:T]
    if c.pe == 'sinusoidal':                         # Vaswani et al. 2017, sec. 3.4 and 3.5
        x = x * c.n_embd ** 0.5
        for t in range(T):
            for m in range(0, c.n_embd, 2):
                x[t, m] += math.sin(t / 10000 ** (m / c.n_embd))
                x[t, m + 1] += math.cos(t / 10000 ** (m / c.n_embd))
    for n in range(c.n_layer):
        part = {k.removeprefix(f'blocks.{n}.').removesuffix('.weight'): v for k, v in w.items()}
        h, heads = norm(x, part['attn_norm']), []
        for a in range(c.n_head):
            g = a * c.n_kv_head // c.n_head          # the key head that query head a reads
            q, k, v = (h @ part[f'attn.{z}_proj'].T for z in 'qkv')
            if c.qk_norm == 'full':                  # Gelberg et al. 2025, their code
                q, k = norm(q, part['attn.q_norm']), norm(k, part['attn.k_norm'])
            q, k, v = q[:, a * hs:(a + 1) * hs], k[:, g * hs:(g + 1) * hs], v[:, g * hs:(g + 1) * hs]
            if c.qk_norm is True:
                q, k = norm(q), norm(k)
            if c.pe == 'rope':
                q, k = turned(q, c), turned(k, c)
            # Wang et al. 2024, eq. 4: the temperature on the scores
            lam = part['attn.scale'][a] + part['attn.slope'][a] * math.log(max(1, T / c.block_size))
            s = lam * (q @ k.T) / hs ** 0.5
            for t in range(T):                       # a bias by distance, on the scores
                for j in range(t + 1):
                    if c.pe == 'alibi':              # Press et al. 2022, sec. 3: n a power of two
                        s[t, j] -= 2 ** (-8 * (a + 1) / c.n_head) * (t - j)
                    elif c.pe == 't5':
                        s[t, j] += w['pos_bias.weight'][t5_table(t - j), a]
            e = torch.exp(s).tril()
            heads.append(e / e.sum(1, keepdim=True) @ v)
        x = x + torch.cat(heads, 1) @ part['attn.o_proj'].T
        h = norm(x, part['mlp_norm'])
        gate = h @ part['mlp.gate_proj'].T           # Shazeer 2020: SwiGLU
        x = x + (gate / (1 + torch.exp(-gate)) * (h @ part['mlp.up_proj'].T)) @ part['mlp.down_proj'].T
    return norm(x, w['norm.weight']) @ w['lm_head.weight'].T


@every_pe
@pytest.mark.parametrize('qk_norm', [False, True, 'full'])
def test_forward_is_the_papers_equations(pe, qk_norm):
    model = heat(build(pe, qk_norm=qk_norm))
    for idx in tokens(2, span(pe)):
        close(model(idx[None])[0][0], reference(model, idx))


@every_pe
def test_no_logit_depends_on_a_later_token(pe):
    model, t = heat(build(pe)), 11
    idx = tokens(2, span(pe))
    other = torch.cat((idx[:, :t], (idx[:, t:] + 1) % 50), dim=1)
    before, after = model(idx)[0], model(other)[0]
    assert torch.equal(before[:, :t], after[:, :t])
    assert (before[:, t:] != after[:, t:]).any(-1).all()


@every_pe
@pytest.mark.parametrize('chunks', [[1] * 80, [5, 1, 9, 1, 24, 2, 38], [79, 1]])
def test_cached_decoding_is_the_full_forward(pe, chunks):
    model, cache = heat(build(pe, block_size=80 if pe == 'learned' else L)), KVCache(80)    # 80: the cache has to grow
    idx = tokens(2, 80)
    close(torch.cat([model(part, cache=cache)[0] for part in idx.split(chunks, dim=1)], dim=1), model(idx)[0])


def test_learned_positions_end_with_their_table():
    model, cache = build('learned'), KVCache()
    model(tokens(1, L), cache=cache)
    with pytest.raises(ValueError, match=rf'\b{L}\b'):
        model(tokens(1, L + 1))
    with pytest.raises(ValueError, match=rf'\b{L}\b'):
        model(tokens(1, 1), cache=cache)
    with pytest.raises(ValueError, match=rf'\b{L}\b'):
        model.generate(tokens(1, 1), L + 1)


@every_pe
def test_generate_takes_the_likeliest_token(pe):
    model = heat(build(pe))
    prompt = tokens(2, 5)
    naive = prompt
    for n in range(5, span(pe)):                     # no cache, every logit, in a row as long as it will be
        logits = model(F.pad(naive, (0, span(pe) - 1 - n)))[0]
        naive = torch.cat((naive, logits[:, n - 1:n].argmax(-1)), dim=1)
    assert torch.equal(model.generate(prompt, span(pe) - 5, temperature=0), naive)
    assert torch.equal(model.generate(prompt, span(pe) - 5, temperature=0.5, top_k=1), naive)


def test_generate_begins_with_at_least_one_token():
    model = build('nope')
    with pytest.raises(ValueError, match='begin with BOS'):
        model.generate(torch.empty(1, 0, dtype=torch.long), 3)
    assert model.generate(tokens(1, 1), 3, temperature=0).shape == (1, 4)


@pytest.mark.parametrize('top_k, top_p', [(None, None), (5, None), (None, 0.6), (5, 0.6), (None, 1e-9)])
def test_generate_samples_the_tempered_distribution(top_k, top_p):
    model, n = build(), 4000
    prompt = tokens(4)
    drawn = model.generate(prompt.expand(n, -1), 1, temperature=0.25, top_k=top_k, top_p=top_p)[:, -1]
    p = torch.exp(reference(model, prompt)[-1] / 0.25)
    if top_k:
        p[p.argsort()[:-top_k]] = 0
    p /= p.sum()
    if top_p:                                        # token after token, until there are enough
        together = 0
        for token in p.argsort(descending=True).tolist():
            enough = together >= top_p
            together += p[token].item()
            if enough:
                p[token] = 0
        assert (p > 0).sum() < 10
        p /= p.sum()
    off = (drawn.bincount(minlength=50) - n * p).abs()
    assert (off <= 4 * (n * p) ** 0.5 + 4 * (p > 0)).all()               # four standard deviations of a count


@every_pe
def test_grouped_queries_are_repeated_keys(pe):
    grouped, full = heat(build(pe)), build(pe, n_kv_head=4)
    state = grouped.state_dict()
    for k in state:
        if 'k_proj' in k or 'v_proj' in k:           # (16, 32): key head 0 goes to heads 0 and 1, key head 1 to 2 and 3
            state[k] = state[k].view(2, 8, 32)[[0, 0, 1, 1]].view(32, 32)
    full.load_state_dict(state)
    idx = tokens(2, span(pe))
    close(grouped(idx)[0], full(idx)[0])


class Kernel:
    """In place of the attention kernel: calls it, and keeps what it got and gave."""

    def __init__(self, monkeypatch):
        self.calls, self.real = [], F.scaled_dot_product_attention
        monkeypatch.setattr(F, 'scaled_dot_product_attention', self)

    def __call__(self, q, k, v, attn_mask=None, **more):
        y = self.real(q, k, v, attn_mask=attn_mask, **more)
        self.calls.append((q, k, v, attn_mask, y))
        return y


@pytest.mark.parametrize('autocast', [False, True])
def test_temperature_one_is_the_identity_bit_for_bit(autocast, monkeypatch):
    model, projected, kernel = build(), [], Kernel(monkeypatch)
    for block in model.blocks:
        block.attn.q_proj.register_forward_hook(lambda m, x, q: projected.append(q.view(2, 40, 4, 8).transpose(1, 2)))
    with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
        model(tokens(2, 40))
        with torch.no_grad():
            model(tokens(2, 40))
    attended = [call[0] for call in kernel.calls]
    for p, q in zip(projected, attended, strict=True):
        assert torch.equal(p.type_as(q), q)
    # short rows that train on CPU go through the kernel in fp32; everything else in the precision of the projections
    assert [q.dtype for q in attended] == [torch.float32] * 2 + [projected[0].dtype] * 2


@pytest.mark.parametrize('pe', ['nope', 'rope', 't5'])
@pytest.mark.parametrize('T, trained_in', [(64, torch.float32), (511, torch.float32), (512, torch.bfloat16)])
def test_short_rows_train_on_cpu_with_attention_in_fp32(pe, T, trained_in, monkeypatch):
    """Autocast would cast it back to bf16. What the kernel gives is a float64 formula's, to fp32's precision."""
    model, kernel = build(pe), Kernel(monkeypatch)
    tol = dict(rtol=1e-5, atol=1e-6) if trained_in == torch.float32 else dict(rtol=2e-2, atol=1e-3)
    with torch.autocast('cpu', torch.bfloat16):
        model(tokens(1, T))[0].float().sum().backward()
    assert len(kernel.calls) == 2
    for q, k, v, mask, y in kernel.calls:
        assert {z.dtype for z in (q, k, v, y)} == {trained_in}
        k, v = (z.repeat_interleave(q.size(1) // z.size(1), dim=1) for z in (k, v))
        s = q.double() @ k.double().transpose(-1, -2) / math.sqrt(q.size(-1))
        if mask is None:
            s = s.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
        else:
            assert mask.dtype == trained_in
            s = s + mask.double()
        torch.testing.assert_close(y.double(), s.softmax(-1) @ v.double(), **tol)


def sloped(pe):
    """-> a network whose temperatures grow with the length, and one that always has what they are at 40 tokens."""
    slopes, fixed = build(pe), build(pe)
    for a, b in zip(slopes.blocks, fixed.blocks):
        a.attn.slope.data.uniform_(0.2, 0.5)
        b.attn.scale.data.copy_(1 + a.attn.slope * math.log(40 / L))
    return slopes, fixed


@every_pe
def test_slopes_leave_lengths_up_to_block_size_bit_identical(pe):
    slopes, idx = sloped(pe)[0], tokens(2, L)
    for n in (1, 2, L - 1, L):
        assert torch.equal(slopes(idx[:, :n])[0], build(pe)(idx[:, :n])[0])


past = pytest.mark.parametrize('pe', [pe for pe in ENCODINGS if pe != 'learned'])       # whose table has no past


@past
def test_a_slope_is_one_temperature_a_length(pe):
    (slopes, fixed), idx = sloped(pe), tokens(2, 40)
    close(slopes(idx)[0], fixed(idx)[0])
    # that of 30 tokens is another one
    assert (slopes(idx[:, :30])[0] - fixed(idx[:, :30])[0]).abs().max() > 1e-4


@past
def test_a_decoder_that_is_told_its_length_has_that_temperature_from_the_start(pe):
    (slopes, fixed), idx = sloped(pe), tokens(2, 40)
    close(slopes(idx[:, :5], cache=KVCache(40))[0], fixed(idx)[0][:, :5])
    # one that is not told has that of the tokens it holds
    close(slopes(idx[:, :30], cache=KVCache())[0], slopes(idx[:, :30])[0])


@pytest.mark.parametrize('pe', ['nope', 'rope'])
def test_temperature_folds_into_the_query_projection(pe):
    model = build(pe)
    for block in model.blocks:
        block.attn.scale.data.uniform_(0.5, 2)
    idx = tokens(2, 40)
    heated = model(idx)[0]
    for block in model.blocks:
        block.attn.q_proj.weight.data.view(4, 8, 32).mul_(block.attn.scale.data.view(4, 1, 1))
        block.attn.scale.data.fill_(1)
    close(model(idx)[0], heated)


@pytest.mark.parametrize('qk_norm', [False, True])
def test_one_temperature_for_all_heads_is_the_softmax_scale(qk_norm, monkeypatch):
    model = build(qk_norm=qk_norm)
    idx = tokens(2, 40)
    with monkeypatch.context() as patch:             # Wang et al. 2024, eq. 3
        scaled = functools.partial(F.scaled_dot_product_attention, scale=1.2 / 8 ** 0.5)
        patch.setattr(F, 'scaled_dot_product_attention', scaled)
        uniform = model(idx)[0]
    for block in model.blocks:
        block.attn.scale.data.fill_(1.2)
    close(model(idx)[0], uniform)


@pytest.mark.parametrize('pe, qk_norm', [('nope', True), ('rope', False)])
def test_temperature_gradients_are_finite_differences(pe, qk_norm):
    model, idx, eps = heat(build(pe, qk_norm=qk_norm)), tokens(31), 1e-5
    temperatures = [p.requires_grad_() for block in model.blocks for p in (block.attn.scale, block.attn.slope)]
    model(idx[None, :-1], idx[None, 1:])[1].backward()
    grads = torch.stack([p.grad for p in temperatures])
    model.double()                                   # so that eps does not drown in rounding
    numeric = torch.zeros(4, 4, dtype=torch.double)
    for n, p in enumerate(temperatures):
        for h in range(4):
            for sign, move in (1, eps), (-1, -2 * eps), (0, eps):    # up, down, back
                p.data[h] += move
                numeric[n, h] += sign * F.cross_entropy(reference(model, idx[:-1]), idx[1:]) / (2 * eps)
    close(grads, numeric)
    assert (numeric.abs().amax(1) > 1e-3).all()


@pytest.mark.parametrize('rows', [None, slice(-9, None), torch.tensor([3, 4, 12])])
def test_chunked_loss_is_the_plain_loss(rows):
    model, heads = build(), []
    # room for five rows, so four at a time, of 26, 18 or 6: never a whole number of chunks
    model.logits_at_once = 50 * 5 + 7
    model.lm_head.register_forward_hook(lambda m, x, logits: heads.append(logits.numel() // 50))
    idx, targets = tokens(2, 13), tokens(2, 13)
    if rows is not None:
        targets = targets[:, rows]
    logits, loss = model(idx, targets, rows=rows)
    loss.backward()
    assert logits is None
    assert max(heads) == 4
    assert sum(heads) == 2 * targets.numel()         # once forward, once again backward
    learned = [p for p in model.parameters() if p.requires_grad]
    grads = [p.grad.clone() for p in learned]
    model.zero_grad()
    every = model(idx)[0]
    if rows is not None:
        every = every[:, rows]
    plain = F.cross_entropy(every.flatten(0, 1), targets.flatten())
    plain.backward()
    close(loss, plain)
    for p, g in zip(learned, grads, strict=True):
        close(g, p.grad)


def test_rope_frequencies():
    # Su et al. 2021, sec. 3.2.2: theta_m = base^(-2m/d)
    for theta in (10000.0, 500000.0):
        close(build('rope', rope_theta=theta).inv_freq, 1 / theta ** (torch.arange(0, 8, 2).double() / 8), 1e-6)


def test_rope_takes_any_frequencies():
    idx = tokens(2, 40)
    given = build('rope', rope_inv_freq=[0.7, 0.05, 0.01, 0.0])
    for x in idx:
        close(given(x[None])[0][0], reference(given, x))
    still = build('rope', rope_inv_freq=[0.0] * 4)    # nothing turns
    assert torch.equal(still(idx)[0], build('nope')(idx)[0])


def test_rope_keeps_the_first_positions():
    """LongRoPE's n-hat (Ding et al. 2024, eq. 3): positions below it turn as in training."""
    freq, idx = [0.7, 0.05, 0.01, 0.0], tokens(2, 40)
    kept, given = build('rope', rope_inv_freq=freq, rope_start=9), build('rope', rope_inv_freq=freq)
    assert torch.equal(kept(idx)[0][:, :9], build('rope')(idx)[0][:, :9])
    assert (kept(idx)[0][:, 9:] != given(idx)[0][:, 9:]).any(-1).all()
    angle = torch.arange(40)[:, None] * torch.tensor(freq)
    angle[:9] = torch.arange(9)[:, None] * 10000.0 ** (-torch.arange(4) / 4)
    seen = []
    kept.blocks[0].attn.register_forward_pre_hook(lambda m, x, given: seen.append(given['rope']), with_kwargs=True)
    kept(idx)
    close(torch.stack(seen[0]), torch.stack((angle.cos(), angle.sin())))


@pytest.mark.parametrize('heads, slopes', [
    # Press et al. 2022: a geometric sequence; six and twelve heads by the published code's rule
    (1, [2 ** -8]), (2, [2 ** -4, 2 ** -8]), (8, [2.0 ** -h for h in range(1, 9)]),
    (6, [2 ** -2, 2 ** -4, 2 ** -6, 2 ** -8, 2 ** -1, 2 ** -3]),
    (12, [2.0 ** -h for h in range(1, 9)] + [2 ** -0.5, 2 ** -1.5, 2 ** -2.5, 2 ** -3.5])])
def test_alibi_slopes(heads, slopes):
    assert alibi_slopes(heads) == slopes


def test_t5_buckets():
    n = torch.arange(400)
    assert t5_bucket(n).tolist() == [t5_table(int(x)) for x in n]
    hf = pytest.importorskip('transformers')
    theirs = hf.models.t5.modeling_t5.T5Attention._relative_position_bucket(-n, bidirectional=False)
    assert torch.equal(t5_bucket(n), theirs)


def test_rope_depends_on_differences_only():
    model = build('rope')
    x = torch.randn(2, 40, 32)

    def attend(pos):
        angle = pos[:, None].double() * 10000.0 ** (-torch.arange(4).double() / 4)
        return model.blocks[0].attn(x, (angle.cos().float(), angle.sin().float()), torch.zeros(40))

    pos = torch.arange(40)
    close(attend(pos), attend(pos + 1000))
    assert (attend(pos) - attend(2 * pos)).abs().max() > 0.01


def test_nope_cannot_tell_the_places_of_a_constant_sequence():
    """Wang et al. 2024, sec. 2: alpha_ij = 1/i, whatever the temperature."""
    model, seen = heat(build()), []
    v = torch.randn(40, 2, 8)                        # values that differ, so that the weights show
    for block in model.blocks:
        block.attn.v_proj.register_forward_hook(lambda m, x, out: v.view(1, 40, 16))
        block.attn.o_proj.register_forward_hook(lambda m, x, out: seen.append(x[0].view(40, 4, 8)))
    mean = v.cumsum(0) / torch.arange(1, 41).view(-1, 1, 1)
    model(torch.full((1, 40), 7))
    close(seen[0], mean[:, [0, 0, 1, 1]], 1e-6)
    model(tokens(1, 40))
    assert (seen[2] - mean[:, [0, 0, 1, 1]]).abs().max() > 0.01


def test_a_constant_sequence_teaches_nope_no_queries_or_keys():
    model = heat(build())
    for idx, constant in (torch.full((1, 40), 7), True), (tokens(1, 40), False):
        model.zero_grad()
        model(idx, tokens(1, 40))[1].backward()
        for name, p in model.named_parameters():
            if name.endswith(('q_proj.weight', 'k_proj.weight')):
                assert (p.grad.abs().max() < 1e-6) == constant, name


@every_pe
def test_one_layer_of_nope_sees_the_prefix_as_a_set(pe):
    model = heat(build(pe, n_layer=1))
    idx = tokens(1, L)
    permuted = torch.cat((idx[:, torch.randperm(L - 1)], idx[:, -1:]), dim=1)
    change = (model(idx)[0][:, -1] - model(permuted)[0][:, -1]).abs().max()
    assert change < 1e-5 if pe == 'nope' else change > 1e-3


def test_initialisation_is_tinyllamas():
    shape = PRESETS['tinyllama'] | dict(vocab_size=1000, n_layer=3, n_embd=512, n_inner=1408)
    model = GPT(GPTConfig(pe='learned', **shape))
    for name, p in model.named_parameters():
        if name.endswith(('scale', 'slope')):        # temperatures do nothing until asked, and never see weight decay
            assert (p.shape, p.dtype, p.requires_grad) == ((32,), torch.float32, False)
            assert (p == name.endswith('scale')).all()
        elif 'norm' in name:
            assert (p == 1).all()
        else:                                        # lit_gpt/model.py of TinyLlama, _init_weights
            residual = 'o_proj' in name or 'down_proj' in name
            std = 1 / 512 ** 0.5 / 3 if residual else (2 / (5 * 512)) ** 0.5
            assert p.std().item() == pytest.approx(std, rel=0.02), name
            assert abs(p.mean().item()) < 0.02 * std, name


@pytest.mark.parametrize('pe', ['nope', 'rope'])
def test_tinyllama_has_its_published_size(pe):
    with torch.device('meta'):
        model = GPT(GPTConfig(vocab_size=32000, pe=pe, **PRESETS['tinyllama']))
    temperatures = 22 * 32 * 2                       # a scale and a slope for each head
    assert sum(p.numel() for p in model.parameters()) == 1_100_048_384 + temperatures


def test_temperatures_are_no_parameters_and_a_tied_head_counts_once():
    """SmolLM2-135M as published: https://huggingface.co/HuggingFaceTB/SmolLM2-135M."""
    shape = dict(block_size=8192, vocab_size=49152, n_layer=30, n_head=9, n_kv_head=3, n_embd=576, n_inner=1536)
    with torch.device('meta'):
        tied = GPT(GPTConfig(pe='rope', tie_embeddings=True, **shape))
        apart = GPT(GPTConfig(pe='rope', **shape))
    assert tied.num_params() == 134_515_008
    assert apart.num_params() == 134_515_008 + 49152 * 576
    assert tied.flops_per_token(1) == apart.flops_per_token(1)           # the head multiplies in both


def test_a_tied_head_learns_as_one_matrix():
    model = build('rope', tie_embeddings=True)
    apart = build('rope')
    apart.load_state_dict(model.state_dict())
    idx = torch.randint(50, (2, 17))
    for m in model, apart:
        m(idx[:, :-1], idx[:, 1:])[1].backward()
    close(model.embed.weight.grad, apart.embed.weight.grad + apart.lm_head.weight.grad)
    assert model.lm_head.weight is model.embed.weight


@every_pe
def test_attention_runs_on_a_fused_kernel(pe):
    model, cache = heat(build(pe)), KVCache()
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), torch.profiler.profile() as profile:       # any other kernel raises
        model.requires_grad_(pe != 't5')             # a bias that is learned trains on the math kernel
        with torch.set_grad_enabled(pe != 't5'):
            loss = model(tokens(2, L), tokens(2, L))[1]
            if pe != 't5':
                loss.backward()
        with torch.no_grad():
            for T in (5, 1, 6):                      # prompt, one token, a chunk after cached keys
                model(tokens(2, T), cache=cache)
    calls = [e.count for e in profile.key_averages() if e.key == 'aten::scaled_dot_product_attention']
    assert calls == [2 * 4]


@every_pe
def test_activation_checkpointing_changes_memory_only(pe):
    model, idx, made = heat(build(pe, n_layer=4)), tokens(2, L + 1), []
    for model.activation_checkpointing in False, True:
        kept = []                                    # numbers held for the backward pass
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
            loss = model(idx[:, :-1], idx[:, 1:])[1]
        loss.backward()
        grads = [p.grad.clone() for p in model.parameters() if p.requires_grad]
        made.append((sum(kept), loss.item(), grads))
        model.zero_grad()
    (plain, loss, grads), (less, same_loss, same_grads) = made
    assert less < plain / 3
    assert same_loss == loss
    assert all(torch.equal(a, b) for a, b in zip(grads, same_grads, strict=True))


how_compiled = [(pe, {}) for pe in ENCODINGS]
how_compiled += [('rope', dict(logits_at_once=50 * 5)), ('rope', dict(activation_checkpointing=True))]


@pytest.mark.slow
@pytest.mark.parametrize('pe, how', how_compiled, ids=str)
def test_compiles_in_one_graph(pe, how):
    torch.compiler.reset()                           # it counts how often it compiled the same code
    model, idx = heat(build(pe)), tokens(2, L + 1)
    for name, value in how.items():                  # the loss in chunks, as with a real vocabulary
        setattr(model, name, value)
    # traced forward and backward; no C++ compiler needed
    net = torch.compile(model, backend='aot_eager', fullgraph=True)
    grads = []
    for f in net, model:
        f(idx[:, :-1], idx[:, 1:])[1].backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
        model.zero_grad()
    for name in grads[1]:
        close(grads[0][name], grads[1][name])


sizes = ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_kv_head', 'n_embd', 'n_inner')


@pytest.mark.parametrize('wrong, named', [
    *(({name: 0}, name) for name in sizes), (dict(n_layer=-1), 'n_layer'),
    (dict(n_embd=30), 'n_embd'), (dict(n_kv_head=3), 'n_kv_head'), (dict(n_kv_head=8), 'n_kv_head'),
    (dict(pe='rope', n_embd=20), 'pe='), (dict(pe='ropes'), 'pe='), (dict(pe=''), 'pe=')])
def test_a_shape_that_cannot_be_built_is_refused(wrong, named):
    with pytest.raises(ValueError, match=named):
        GPTConfig(**dict(vocab_size=50, n_head=4, n_kv_head=2, n_embd=32) | wrong)


@pytest.mark.parametrize('pe', ['nope', 'rope'])
@pytest.mark.filterwarnings('ignore')                # of the other package's own making
def test_logits_equal_transformers(pe):
    hf = pytest.importorskip('transformers')
    ours = build(pe)
    c = dict(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, rms_norm_eps=1e-5, max_position_embeddings=64, tie_word_embeddings=False,
             attention_bias=False, pad_token_id=None, attn_implementation='eager')
    if pe == 'rope':                                 # rope_theta: both default to 10000
        theirs = hf.LlamaForCausalLM(hf.LlamaConfig(**c))
    else:
        theirs = hf.SmolLM3ForCausalLM(hf.SmolLM3Config(**c, no_rope_layers=[0, 0], use_sliding_window=False))
    names = dict(blocks='model.layers', embed='model.embed_tokens', attn='self_attn', attn_norm='input_layernorm',
                 mlp_norm='post_attention_layernorm')
    state = {}
    for k, w in ours.state_dict().items():
        if not k.endswith(('scale', 'slope')):
            state['.'.join(names.get(part, part) for part in k.split('.'))] = w
    state['model.norm.weight'] = state.pop('norm.weight')
    theirs.load_state_dict(state)                    # strict: every weight has its counterpart
    idx = tokens(2, 40)
    close(ours(idx)[0], theirs(idx).logits)


# ---------------------------------------------------------------------------------------------------------------------
# stretched frequencies

STRETCHED = dict(pi=pi, ntk=ntk, yarn=yarn)


def wide(block_size, theta=10000.0):
    return GPTConfig(block_size=block_size, n_embd=128, n_head=2, n_kv_head=2, pe='rope', rope_theta=theta)


PLAIN = 10000.0 ** (-np.arange(32) / 32)             # of wide(), heads of 64


def test_pi_divides_every_frequency():
    freq, lam = pi(wide(512), 2048)
    np.testing.assert_allclose(freq, PLAIN / 4)
    assert lam == 1


def test_ntk_keeps_the_highest_frequency_and_divides_the_lowest():
    """The factors of DroPE's eq. 10: s^(-2m / (d - 2)), so that the lowest is PI's."""
    freq, lam = ntk(wide(512), 2048)
    np.testing.assert_allclose(freq, PLAIN * 4.0 ** (-2 * np.arange(32) / 62))
    assert freq[0] == 1
    assert freq[-1] == pytest.approx(PLAIN[-1] / 4)
    assert lam == 1


def test_yarn_keeps_what_turns_often_and_divides_what_turns_seldom():
    freq, lam = yarn(wide(1024), 4096)
    ratio, turns = freq / PLAIN, 1024 * PLAIN / math.tau                 # turns within the training length
    np.testing.assert_allclose(ratio[turns >= 32], 1)
    np.testing.assert_allclose(ratio[turns <= 1], 1 / 4)
    assert (np.diff(ratio) < 1e-9).all()
    assert (ratio[turns > 20] < 0.99).any()          # in between in between
    assert (ratio[turns < 2] > 0.26).any()
    assert lam == pytest.approx((0.1 * math.log(4) + 1) ** 2)


@pytest.mark.parametrize('method', STRETCHED)
def test_nothing_is_stretched_at_the_training_length(method):
    freq, lam = STRETCHED[method](wide(512), 512)
    np.testing.assert_allclose(freq, PLAIN)
    assert lam == 1


@pytest.mark.parametrize('method, theirs', [('pi', 'linear'), ('ntk', 'dynamic'), ('yarn', 'yarn')])
def test_stretched_frequencies_equal_transformers(method, theirs):
    hf = pytest.importorskip('transformers')
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    rope = dict(rope_type=theirs, factor=4.0, rope_theta=10000.0)
    if theirs == 'yarn':
        rope['original_max_position_embeddings'] = 512
    config = hf.LlamaConfig(hidden_size=128, num_attention_heads=2, max_position_embeddings=512, rope_parameters=rope)
    config.standardize_rope_params()
    more = dict(seq_len=896) if theirs == 'dynamic' else {}      # at length l the static one for s = f l / L - (f - 1)
    freq, factor = ROPE_INIT_FUNCTIONS[theirs](config, 'cpu', **more)
    ours, lam = STRETCHED[method](wide(512), 2048)
    np.testing.assert_allclose(ours, freq, rtol=1e-5)
    assert lam == pytest.approx(factor ** 2)


# ---------------------------------------------------------------------------------------------------------------------
# the learned gain of QKNorm

def test_without_qk_gain_there_is_no_parameter():
    assert not [name for name in build(qk_norm=True).state_dict() if 'gain' in name]


def test_a_gain_of_one_changes_no_bit():
    plain, gained, idx = build(qk_norm=True), build(qk_norm=True, qk_gain=True), tokens(2, 40)
    gained.load_state_dict(plain.state_dict(), strict=False)
    assert torch.equal(gained(idx)[0], plain(idx)[0])


def test_the_gain_is_learned_and_kept():
    model = build(qk_norm=True, qk_gain=True)
    names = [f'blocks.{i}.attn.gain' for i in (0, 1)]
    model(tokens(2, L), tokens(2, L))[1].backward()
    for name in names:
        assert name in model.state_dict()
        assert model.get_parameter(name).shape == (4,)
        assert (model.get_parameter(name).grad != 0).all()


def test_the_temperature_multiplies_the_gain():
    gained, plain, idx = build(qk_norm=True, qk_gain=True), build(qk_norm=True), tokens(2, 40)
    gain, lam = torch.rand(2, 4) + 0.5, torch.rand(2, 4) + 0.5
    for block, g in zip(gained.blocks, gain):
        block.attn.gain.data.copy_(g)
    plain.load_state_dict({k: v for k, v in gained.state_dict().items() if 'gain' not in k})
    set_heads(gained, lam)
    set_heads(plain, gain * lam)
    close(gained(idx)[0], plain(idx)[0])


def test_gain_and_temperature_fold_into_the_query_projection():
    model, idx = build(qk_gain=True), tokens(2, 40)
    for block in model.blocks:
        block.attn.gain.data.uniform_(0.5, 2)
        block.attn.scale.data.uniform_(0.5, 2)
    heated = model(idx)[0]
    for block in model.blocks:
        lam = block.attn.gain.data * block.attn.scale.data
        block.attn.q_proj.weight.data.view(4, 8, 32).mul_(lam.view(4, 1, 1))
        block.attn.gain.data.fill_(1)
        block.attn.scale.data.fill_(1)
    close(model(idx)[0], heated)


# ---------------------------------------------------------------------------------------------------------------------
# a seventh encoding

class LearnedRope(GPT):
    """RoPE that learns its frequencies."""

    def __init__(self, config):
        super().__init__(config)
        start = self.inv_freq
        del self.inv_freq
        self.inv_freq = torch.nn.Parameter(start)


class LogBias(GPT):
    """A bias of minus the logarithm of the distance on every score, learned for each head (Chi et al. 2022, KERPLE)."""

    def __init__(self, config):
        super().__init__(config)
        self.log_slope = torch.nn.Parameter(torch.ones(config.n_head))

    def mask(self, pos, start, end):
        back = pos[:, None] - torch.arange(end, device=pos.device)
        bias = -self.log_slope[:, None, None] * (1 + back.clamp(min=0)).log()
        return bias.masked_fill(back < 0, -math.inf)[None]


@pytest.mark.parametrize('kind, pe, name', [(LearnedRope, 'rope', 'inv_freq'), (LogBias, 'nope', 'log_slope')])
def test_a_seventh_encoding_is_a_subclass(kind, pe, name):
    torch.manual_seed(0)
    model = kind(GPTConfig(pe=pe, vocab_size=50, block_size=L, n_layer=2, n_head=4, n_kv_head=2, n_embd=32, n_inner=48))
    before, idx = model.state_dict()[name].clone(), tokens(2, L + 1)
    opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(20):
        loss = model(idx[:, :-1], idx[:, 1:])[1]
        loss.backward()
        opt.step()
        opt.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    assert (model.state_dict()[name] != before).any()
    cache = KVCache(40)                              # and it decodes past its length
    idx = tokens(2, 40)
    parts = [model(part, cache=cache)[0] for part in idx.split([5, 1, 34], dim=1)]
    close(torch.cat(parts, dim=1), model(idx)[0])


# ---------------------------------------------------------------------------------------------------------------------
# python model.py CKPT "prompt"

PROMPT = ' The sky is blue.'


def test_model_py_prints_the_prompt_and_a_continuation(trained):
    said = run(sample, [trained, PROMPT, '--max_new_tokens', '100', '--temperature', '0'], '--device cpu')
    tok, model = get_tokenizer('passkey'), load_model(load_checkpoint(trained))
    ids = torch.tensor([[tok.bos, *tok.encode(PROMPT)]])
    new = model.generate(ids, 100, temperature=0)[0, ids.size(1):].tolist()
    assert tok.decode(new) in said
    assert PROMPT in said


def test_model_py_samples_the_same_text_from_the_same_seed(trained):
    first, again, other = (run(sample, [trained, PROMPT], f'--seed {seed} --device cpu') for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_model_py_samples_from_the_likeliest_only(trained):
    greedy = run(sample, [trained, PROMPT], '--temperature 0 --device cpu')
    assert run(sample, [trained, PROMPT], '--top_k 1 --device cpu') == greedy
    assert run(sample, [trained, PROMPT], '--top_p 1e-9 --device cpu') == greedy


@pytest.mark.parametrize('name', ['eos', 'bos'])
def test_model_py_stops_where_the_document_ends(name, trained, monkeypatch):
    """The third new token ends it, and is not printed."""
    tok = get_tokenizer('passkey')
    words = tok.encode(' The sky is blue.')
    said = [torch.tensor([[i]]) for i in [*words[:2], getattr(tok, name), *words]]
    monkeypatch.setattr(GPT, 'continuation', lambda self, idx, n, *how: iter(said[:n]))
    out = run(sample, [trained, ' The grass'], '--device cpu')
    assert out.endswith(' The grass' + tok.decode(words[:2]) + '\n')


@pytest.mark.parametrize(
    'flags, words',
    [
        ('nowhere x', ['nowhere']),
        ('{trained} mauve', ['passkey vocabulary']),
        ('{trained} --max_new_tokens 0', ['--max']),
        ('{trained} --top_k 0', ['--top_k']),
        ('{trained} --top_p 0', ['--top_p']),
        ('{trained} --top_p 1.1', ['--top_p']),
    ],
)
def test_model_py_refuses_what_it_cannot_do(flags, words, trained):
    with refused(*words):
        run(sample, flags.format(trained=trained), '--device cpu')
