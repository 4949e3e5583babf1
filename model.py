"""
The network, whole: a TinyLlama decoder (RMSNorm, SwiGLU, grouped-query attention, no biases) with a switch for
the position encoding and an attention temperature lambda for each head, in units of 1/sqrt(head size):

    alpha_ij = softmax_j(lambda_h q_i.k_j / sqrt(hs)),   lambda_h = scale_h + slope_h * ln max(1, n / block_size)

for a sequence of n tokens (Wang et al. 2024, eq. 3 and 4, where slope is 0). 1.0 is what pre-training uses. Other laws
put something else in the logarithm's place, see growth(). Layers may differ in encoding and window, see GPTConfig.

    model = GPT(GPTConfig(vocab_size=68, pe='nope', **PRESETS['tiny']))
    logits, _ = model(idx)              # idx (B, T) int64 -> logits (B, T, V)
    _, loss = model(idx, targets)       # mean cross-entropy in nats; the logits are never whole in memory
    idx = model.generate(idx, 1000)     # as long as you like: nothing here knows a maximum length (except pe='learned')

    python model.py out/nope "What is the pass key?" --max_new_tokens 1000        # a checkpoint continues a text
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import sdpa_kernel
from torch.utils.checkpoint import checkpoint

from data.decoding import KVCache, sample
from data.kernels import DECODING, attend, chunked_cross_entropy, slow_in_bf16
from data.positions import alibi_slopes, growth, rope_frequencies, rotate, sinusoid, t5_bucket
from data.shape import check_shape, repeated

ENCODINGS = ('nope', 'learned', 'sinusoidal', 't5', 'alibi', 'rope')


@dataclass
class GPTConfig:
    """Plain values only: a checkpoint holds this as a dict. Raises ValueError where the shape cannot be built."""
    block_size: int = 2048       # training length. Not a limit, except for the table of pe='learned'
    vocab_size: int = 32000
    n_layer: int = 22
    n_head: int = 32
    n_kv_head: int = 4           # grouped-query attention: n_head / n_kv_head queries share one key and value
    n_embd: int = 2048
    n_inner: int = 5632          # width of the SwiGLU
    pe: str = 'nope'             # of all layers; or a pattern of nope and rope that repeats: 'rope,rope,rope,nope'
    window: str = '0'            # tokens that a layer sees, itself included, 0 for all; or a pattern: '16,16,16,0'
    qk_norm: bool | str = False  # True: RMS-normalise q and k in each head, without gains; 'full': over all heads
                                 # together, with gains, as DroPE does (its app. C and code)
    qk_gain: bool = False        # learn one gain on q for each head, from 1 (the g of QKNorm, Henry et al. 2020)
    tie_embeddings: bool = False         # the head is the embedding's matrix (SmolLM, Gemma; TinyLlama has two)
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_fraction: float = 1.0   # p-RoPE: the share of frequencies that rotate, highest first (Barbero et al. 2024)
    rope_inv_freq: list = None   # hs/2 inverse frequencies, where PI, NTK, YaRN or LongRoPE changed those of rope_theta
    rope_start: int = 0          # LongRoPE's n-hat: the first positions keep the frequencies of rope_theta
    law: str = 'length'          # what the slopes of temperatures multiply, see growth()
    law_at: float = 0            # the unit in which a law measures n, in tokens; 0 is block_size
    temperatures: str = 'nope'   # which layers of a mixed model are tuned; other models: always all

    def __post_init__(self):
        self.window = str(self.window)
        check_shape(self, ENCODINGS)
        if len(set(self.layer_pe)) == 1:             # 'nope,nope' is nope
            self.pe = self.layer_pe[0]

    @property
    def head_size(self):
        return self.n_embd // self.n_head

    @property
    def tempered(self):
        """The layers whose temperatures are tuned, and follow the law."""
        if self.temperatures == 'all' or len(set(self.layer_pe)) == 1:
            return list(range(self.n_layer))
        return [layer for layer, pe in enumerate(self.layer_pe) if pe == 'nope']

    @property
    def layer_pe(self):
        return repeated(self.pe, self.n_layer)

    @property
    def layer_window(self):
        return [int(word) for word in repeated(self.window, self.n_layer)]


PRESETS = dict(
    # CPU minutes: the synthetic passkey corpus
    tiny=dict(block_size=256, n_layer=4, n_head=8, n_kv_head=8, n_embd=128, n_inner=128, qk_norm=True, qk_gain=True),
    # one GPU, under an hour: real text, 119M parameters with the GPT-2 vocabulary
    small=dict(block_size=1024, n_layer=12, n_head=10, n_kv_head=5, n_embd=640, n_inner=1728),
    # the paper: TinyLlama-1.1B (Wang et al. 2024, sec. 3; vocabulary 32000)
    tinyllama=dict(block_size=2048, n_layer=22, n_head=32, n_kv_head=4, n_embd=2048, n_inner=5632),
)


class Attention(nn.Module):

    def __init__(self, c, layer):
        super().__init__()
        self.nh, self.nkv, self.hs = c.n_head, c.n_kv_head, c.head_size
        self.layer, self.eps = layer, c.norm_eps
        self.pe, self.window = c.layer_pe[layer], c.layer_window[layer]
        self.q_proj = nn.Linear(c.n_embd, self.nh * self.hs, bias=False)
        self.k_proj = nn.Linear(c.n_embd, self.nkv * self.hs, bias=False)
        self.v_proj = nn.Linear(c.n_embd, self.nkv * self.hs, bias=False)
        self.o_proj = nn.Linear(self.nh * self.hs, c.n_embd, bias=False)
        self.norm_in_heads, self.norm_all_heads = c.qk_norm is True, c.qk_norm == 'full'
        if self.norm_all_heads:
            self.q_norm = nn.RMSNorm(self.nh * self.hs, eps=c.norm_eps)
            self.k_norm = nn.RMSNorm(self.nkv * self.hs, eps=c.norm_eps)
        # the gain belongs to the model and trains with it; 1-D, so without weight decay
        self.gain = nn.Parameter(torch.ones(self.nh)) if c.qk_gain else None
        # the temperature of each query head. 1-D as well; frozen in training, unless law='ssmax' learns the slope
        self.scale = nn.Parameter(torch.empty(self.nh), requires_grad=False)
        self.slope = nn.Parameter(torch.empty(self.nh), requires_grad=False)

    def qkv(self, x, rope, grown):
        """x (B, T, C) -> q (B, nh, T, hs), k and v (B, nkv, T, hs): rotated, normalised, q times its temperature."""
        B, T, _ = x.shape
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.norm_all_heads:
            q, k = self.q_norm(q.float()).type_as(v), self.k_norm(k.float()).type_as(v)
        q = q.view(B, T, self.nh, self.hs).transpose(1, 2)
        k = k.view(B, T, self.nkv, self.hs).transpose(1, 2)
        v = v.view(B, T, self.nkv, self.hs).transpose(1, 2)
        if slow_in_bf16(q):
            q, k, v = q.float(), k.float(), v.float()
        if self.pe == 'rope':
            q, k = rotate(q, rope), rotate(k, rope)
        if self.norm_in_heads:                       # rotation changes no vector's norm, so either order will do
            q = F.rms_norm(q, (self.hs,), eps=self.eps)
            k = F.rms_norm(k, (self.hs,), eps=self.eps)
        # scaling q scales all its scores q.k: lambda enters here. 1.0 changes nothing, bit for bit
        q = q * self.temperature(grown)
        return q.type_as(v), k.type_as(v), v

    def temperature(self, grown):
        """lambda_h = scale_h + slope_h growth(n), and the gain of --qk_gain on top: (nh, 1 or T, 1), fp32."""
        lam = self.scale[:, None] + self.slope[:, None] * grown
        if self.gain is not None:
            lam = lam * self.gain[:, None]
        return lam[:, :, None]

    def forward(self, x, rope, grown, mask=None, cache=None):
        """x (B, T, C) -> (B, T, C). rope, mask: see GPT.rotation, GPT.mask."""
        B, T, C = x.shape
        q, k, v = self.qkv(x, rope, grown)
        if cache is not None:
            k, v = cache.update(self.layer, k, v, self.window)
        y = attend(q, k, v, mask, self.window)       # (B, nh, T, hs)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):

    def __init__(self, c):
        super().__init__()
        self.gate_proj = nn.Linear(c.n_embd, c.n_inner, bias=False)
        self.up_proj = nn.Linear(c.n_embd, c.n_inner, bias=False)
        self.down_proj = nn.Linear(c.n_inner, c.n_embd, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):

    def __init__(self, c, layer):
        super().__init__()
        self.attn_norm = nn.RMSNorm(c.n_embd, eps=c.norm_eps)
        self.attn = Attention(c, layer)
        self.mlp_norm = nn.RMSNorm(c.n_embd, eps=c.norm_eps)
        self.mlp = MLP(c)

    def forward(self, x, rope, grown, mask=None, cache=None):
        x = x + self.attn(self.attn_norm(x), rope=rope, grown=grown, mask=mask, cache=cache)
        return x + self.mlp(self.mlp_norm(x))


def init_std(c, name):
    """TinyLlama's initialisation (its lit_gpt/model.py): smaller for the two matrices that write to the residual."""
    if name.endswith(('o_proj.weight', 'down_proj.weight')):
        return 1 / math.sqrt(c.n_embd) / c.n_layer
    return math.sqrt(2 / 5 / c.n_embd)


class GPT(nn.Module):
    logits_at_once = 2**26       # logits held at a time by the loss: 256 MB in fp32
    activation_checkpointing = False         # keep only what enters each block, and compute the rest again in backward

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.embed = nn.Embedding(c.vocab_size, c.n_embd)
        # a checkpoint of another pe lacks these pos_ tables; buffers name a device, for load_model() builds on meta
        if c.pe == 'learned':
            self.pos_embed = nn.Embedding(c.block_size, c.n_embd)
        elif c.pe == 't5':
            self.pos_bias = nn.Embedding(32, c.n_head)           # one table for all layers
        elif c.pe == 'alibi':
            self.register_buffer('slopes', torch.tensor(alibi_slopes(c.n_head), device='cpu'), persistent=False)
        elif 'rope' in c.layer_pe:
            trained = torch.tensor(rope_frequencies(c), dtype=torch.float32, device='cpu')
            stretched = torch.tensor(c.rope_inv_freq or rope_frequencies(c), dtype=torch.float32, device='cpu')
            self.register_buffer('trained_freq', trained, persistent=False)
            self.register_buffer('inv_freq', stretched, persistent=False)
        self.blocks = nn.ModuleList(Block(c, i) for i in range(c.n_layer))
        self.norm = nn.RMSNorm(c.n_embd, eps=c.norm_eps)
        self.lm_head = nn.Linear(c.n_embd, c.vocab_size, bias=False)
        if c.tie_embeddings:
            self.lm_head.weight = self.embed.weight
        for name, p in self.named_parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=init_std(c, name))
        self.reset_temperatures()

    def reset_temperatures(self):
        """1 for every head; where scalable softmax learns them, ln n / ln block_size to begin with."""
        c = self.config
        start = 1 / math.log(max(2, c.block_size))
        for layer, block in enumerate(self.blocks):
            learned = c.law == 'ssmax' and layer in c.tempered
            block.attn.scale.data = torch.full_like(block.attn.scale, 0.0 if learned else 1.0)
            block.attn.slope.data = torch.full_like(block.attn.slope, start if learned else 0.0)
            block.attn.slope.requires_grad = learned

    def forward(self, idx, targets=None, rows=None, cache=None):
        """
        idx (B, T) token ids -> (logits, loss).
        rows: which positions reach the head, a slice or an index (default all). targets: the next token at those
        positions, (B, len(rows)); with them loss is their mean cross-entropy in nats and logits is None, without
        them loss is None. cache: a KVCache, to which these T tokens are appended.
        ValueError past the table of pe='learned'.
        """
        c = self.config
        start = 0 if cache is None else cache.len
        end = start + idx.size(1)
        pos = torch.arange(start, end, device=idx.device)
        x = self.embed(idx)                          # (B, T, C)
        if c.pe == 'learned':
            if end > c.block_size:
                raise ValueError(f'pe=learned has a table of {c.block_size} positions: too short for {end} tokens')
            x = x + self.pos_embed(pos)
        elif c.pe == 'sinusoidal':
            x = x * math.sqrt(c.n_embd) + sinusoid(pos, c.n_embd)
        rope = self.rotation(pos)
        mask = self.mask(pos, start, end)
        n = pos + 1
        if c.law == 'length':                        # one n for all; a decoder may know its final length
            n = n[-1:]
            if cache is not None:
                n = n.clamp(min=cache.length)
        grown = growth(c, n)                         # (1,) or (T,): what slopes multiply
        for block in self.blocks:
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, rope, grown, mask, use_reentrant=False)
            else:
                x = block(x, rope, grown, mask, cache)
        if cache is not None:
            cache.len = end
        if rows is not None:
            x = x[:, rows]
        x = self.norm(x)
        if targets is None:
            return self.lm_head(x), None
        return None, chunked_cross_entropy(self.lm_head, x.flatten(0, 1), targets.flatten(), self.logits_at_once)

    def rotation(self, pos):
        """pos (T,) -> RoPE's cosines and sines, (T, hs/2) each; None where no layer rotates."""
        if 'rope' not in self.config.layer_pe:
            return None
        inv_freq = torch.where(pos[:, None] < self.config.rope_start, self.trained_freq, self.inv_freq)
        angle = pos[:, None].float() * inv_freq
        return angle.cos(), angle.sin()

    def mask(self, pos, start, end):
        """
        What is added to the scores, after the temperature: the bias of t5 and alibi, (1, nh, T, end). Where a chunk of
        tokens follows cached keys, which keys each may see, (T, end). None if plain causal attention will do. A layer
        with a window needs none of it, see data/kernels.py.
        """
        if self.config.pe in ('t5', 'alibi'):
            back = pos[:, None] - torch.arange(end, device=pos.device)       # how far back each key lies, in tokens
            if self.config.pe == 't5':
                bias = self.pos_bias(t5_bucket(back.clamp(min=0))).permute(2, 0, 1)
            else:
                bias = -self.slopes[:, None, None] * back
            return bias.masked_fill(back < 0, -math.inf)[None]       # 4-D, or the fused kernel refuses it
        if start > 0 and end - start > 1:            # is_causal would align the first query with the first key
            return torch.ones(end - start, end, dtype=torch.bool, device=pos.device).tril(start)
        return None

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None):
        """
        idx (B, T) -> (B, T + max_new_tokens). This temperature is that of sampling: it divides the final logits, and 0
        takes the likeliest token. ValueError where idx holds no token: begin with BOS.
        """
        return torch.cat([idx, *self.continuation(idx, max_new_tokens, temperature, top_k, top_p)], dim=1)

    @torch.no_grad()
    def continuation(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None):
        """The new tokens of generate one by one, as they come: (B, 1) each."""
        if idx.size(1) == 0:
            raise ValueError('generate goes on from at least one token: begin with BOS')
        cache = KVCache(idx.size(1) + max_new_tokens - 1)
        new = idx
        for _ in range(max_new_tokens):
            with sdpa_kernel(DECODING):
                logits, _ = self(new, rows=slice(-1, None), cache=cache)
            new = sample(logits[:, -1].float(), temperature, top_k, top_p)
            yield new

    def num_params(self, tables=True):
        """What pre-training learns; a tied head counts once. tables=False leaves out those that are only looked up."""
        total = 0
        for name, p in self.named_parameters():
            looked_up = 'embed' in name or name == 'pos_bias.weight'
            if looked_up and p is not self.lm_head.weight and not tables:
                continue
            if not name.endswith(('scale', 'slope')):
                total += p.numel()
        return total

    def flops_per_token(self, T):
        """Training FLOPs a token at length T (PaLM, app. B): 6N + 12 n_layer n_embd T, attention not halved."""
        return 6 * self.num_params(tables=False) + 12 * self.config.n_layer * self.config.n_embd * T


if __name__ == '__main__':
    from data.sample import main  # here, since everything in data/ imports this file
    main()
