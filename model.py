"""
The network of nanoNoPE, whole: a TinyLlama decoder (RMSNorm, SwiGLU, grouped-query attention, no biases, untied)
with a switch for the position encoding and one attention temperature for each head.

    model = GPT(GPTConfig(vocab_size=101, pe='nope', **PRESETS['tiny']))
    logits, _ = model(idx)              # idx (B, T) int64 -> logits (B, T, V)
    _, loss = model(idx, targets)       # mean cross-entropy in nats; the logits are never whole in memory
    idx = model.generate(idx, 1000)     # as long as you like: nothing here knows a maximum length (but pe='learned')

The attention temperature is written in units of 1/sqrt(head size), so 1.0 is what pre-training used:
    alpha_ij = softmax_j(lambda_h q_i.k_j / sqrt(hs)),   lambda_h = scale_h + slope_h * ln max(1, n / block_size)
for a sequence of n tokens (Wang et al. 2024, eq. 3 and 4, where slope is 0). Multiplied into q it costs nothing, and
attention stays on the fused kernel.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

# cuDNN, the first choice on Hopper from torch 2.11, plans anew for each number of keys: decoding does without
DECODING = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
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
    pe: str = 'nope'
    qk_norm: bool = False        # RMS-normalise q and k in each head, without a gain (DroPE, app. C)
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_inv_freq: list = None   # hs/2 inverse frequencies; PI, NTK, YaRN, LongRoPE write theirs here. None: from rope_theta
    rope_start: int = 0          # LongRoPE's n-hat: so many first positions keep the frequencies of rope_theta

    def __post_init__(self):
        for name in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_kv_head', 'n_embd', 'n_inner'):
            if getattr(self, name) < 1:
                raise ValueError(f'{name} must be at least 1, not {getattr(self, name)}')
        if self.pe not in ENCODINGS:
            raise ValueError(f'pe={self.pe!r} is unknown; one of {" ".join(ENCODINGS)}')
        if self.n_embd % self.n_head:
            raise ValueError(f'n_embd {self.n_embd} must be a multiple of n_head {self.n_head}')
        if self.n_head % self.n_kv_head:
            raise ValueError(f'n_head {self.n_head} must be a multiple of n_kv_head {self.n_kv_head}')
        if self.pe == 'rope' and (self.n_embd // self.n_head) % 2:
            raise ValueError(f'pe=rope rotates pairs: head size {self.n_embd // self.n_head} must be even')
        if self.rope_inv_freq is not None and len(self.rope_inv_freq) != self.n_embd // self.n_head // 2:
            raise ValueError(f'rope_inv_freq has {len(self.rope_inv_freq)} frequencies for {self.n_embd // self.n_head // 2} pairs')


PRESETS = dict(
    # CPU minutes: the synthetic passkey corpus
    tiny=dict(block_size=256, n_layer=4, n_head=4, n_kv_head=4, n_embd=128, n_inner=128, qk_norm=True),
    # one GPU, under an hour: real text, 119M parameters with the GPT-2 vocabulary
    small=dict(block_size=1024, n_layer=12, n_head=10, n_kv_head=5, n_embd=640, n_inner=1728),
    # the paper: TinyLlama-1.1B (Wang et al. 2024, sec. 3; vocabulary 32000)
    tinyllama=dict(block_size=2048, n_layer=22, n_head=32, n_kv_head=4, n_embd=2048, n_inner=5632),
)


class KVCache:
    """
    Keys and values that a decoder has seen, for each layer; doubles when full, so it has no maximum length. length: how
    many tokens there will be, where that is known: a temperature with a slope goes by it from the first token on.
    """

    def __init__(self, length=0):
        self.kv, self.len, self.length = {}, 0, length           # layer -> (k, v), each (B, nkv, capacity, hs); tokens held

    def update(self, layer, k, v):
        """Appends k, v (B, nkv, T, hs) and returns all keys and values so far, (B, nkv, len + T, hs) each."""
        start, end = self.len, self.len + k.size(2)
        old = self.kv.get(layer)
        if old is None or end > old[0].size(2):
            B, nkv, _, hs = k.shape
            new = [x.new_empty(B, nkv, max(2 * start, end + 64), hs) for x in (k, v)]
            for n, o in zip(new, old or ()):
                n[:, :, :start] = o[:, :, :start]
            self.kv[layer] = new
        for buf, x in zip(self.kv[layer], (k, v)):
            buf[:, :, start:end] = x
        return [buf[:, :, :end] for buf in self.kv[layer]]


def rope_frequencies(c):
    """Su et al. 2021, sec. 3.2.2: the hs/2 inverse frequencies of a GPTConfig as trained, theta^(-2m / hs)."""
    hs = c.n_embd // c.n_head
    return [c.rope_theta ** (-2 * m / hs) for m in range(hs // 2)]


def rotate(x, rope):
    """RoPE on x (B, nh, T, hs): the pair (x_m, x_{m + hs/2}) turns by the angle position * inv_freq_m."""
    cos, sin = rope                                  # (T, hs/2) each, fp32
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def sinusoid(pos, C):
    """Vaswani et al. 2017, 3.5: (T,) positions -> (T, C); even columns sine, odd columns cosine."""
    freq = 10000.0 ** (-torch.arange(0, C, 2, device=pos.device) / C)
    angle = pos[:, None].float() * freq
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1)[:, :C]


def t5_bucket(n):
    """
    Raffel et al. 2020: distances n >= 0, in tokens -> one of 32 buckets. The first 16 hold one distance each, the others
    grow with its logarithm up to 128, and the last one holds all that are further.
    """
    far = 16 + (torch.log(n.clamp(min=1) / 16) / math.log(128 / 16) * 16).long()
    return torch.where(n < 16, n, far.clamp(max=31))


def alibi_slopes(n_head):
    """
    Press et al. 2022, sec. 3: head h of n gets 2^(-8h/n). Where n is no power of two, as in its code: the slopes of the
    power of two below, then every second one of the power above.
    """
    n = 2 ** int(math.log2(n_head))
    return [2 ** (-8 * h / n) for h in range(1, n + 1)] + [2 ** (-4 * h / n) for h in range(1, 2 * n, 2)][:n_head - n]


class Attention(nn.Module):

    def __init__(self, c, layer):
        super().__init__()
        self.nh, self.nkv, self.hs = c.n_head, c.n_kv_head, c.n_embd // c.n_head
        self.layer, self.qk_norm, self.eps = layer, c.qk_norm, c.norm_eps
        self.q_proj = nn.Linear(c.n_embd, self.nh * self.hs, bias=False)
        self.k_proj = nn.Linear(c.n_embd, self.nkv * self.hs, bias=False)
        self.v_proj = nn.Linear(c.n_embd, self.nkv * self.hs, bias=False)
        self.o_proj = nn.Linear(self.nh * self.hs, c.n_embd, bias=False)
        # the temperature of each query head. 1-D, so that weight decay never sees it; frozen until extend.py asks
        self.scale = nn.Parameter(torch.ones(self.nh), requires_grad=False)
        self.slope = nn.Parameter(torch.zeros(self.nh), requires_grad=False)

    def qkv(self, x, rope, log_len):
        """x (B, T, C) -> q (B, nh, T, hs), k and v (B, nkv, T, hs), as the attention kernel gets them."""
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, self.nh, self.hs).transpose(1, 2)
        k = self.k_proj(x).view(B, T, self.nkv, self.hs).transpose(1, 2)
        v = self.v_proj(x).view(B, T, self.nkv, self.hs).transpose(1, 2)
        if q.is_cpu and q.dtype == torch.bfloat16 and T < 512 and torch.is_grad_enabled():
            # torch's attention kernel for CPUs is up to three times slower backwards in bf16 than in fp32 where rows are short
            q, k, v = q.float(), k.float(), v.float()
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        if self.qk_norm:                             # after the rotation or before it is the same: no gain
            q, k = (F.rms_norm(z, (self.hs,), eps=self.eps) for z in (q, k))
        lam = self.scale[:, None] + self.slope[:, None] * log_len    # (nh, 1), fp32
        q = q * lam[:, :, None]                      # by 1.0 it is the identity, bit for bit
        return q.type_as(v), k.type_as(v), v

    def forward(self, x, rope, log_len, mask=None, cache=None):
        B, T, C = x.shape
        q, k, v = self.qkv(x, rope, log_len)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)
        if q.is_cuda and self.nkv < self.nh and (q.dtype == torch.float32 or mask is not None):
            # on CUDA flash takes neither fp32 nor a mask and mem-efficient no grouped queries (torch 2.11): repeated keys keep it off the math path
            k, v = (z.repeat_interleave(self.nh // self.nkv, dim=1) for z in (k, v))
        if mask is not None and mask.is_floating_point():
            mask = mask.type_as(q)
        with torch.autocast('cpu', enabled=False):   # in the precision that qkv chose
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and T > 1, enable_gqa=k.size(1) < self.nh)
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

    def forward(self, x, rope, log_len, mask=None, cache=None):
        x = x + self.attn(self.attn_norm(x), rope, log_len, mask, cache)
        return x + self.mlp(self.mlp_norm(x))


def init_std(c, name):
    """TinyLlama's initialisation (its lit_gpt/model.py): sqrt(2 / 5d), and 1 / (sqrt(d) n_layer) for what is added to the residual."""
    return 1 / math.sqrt(c.n_embd) / c.n_layer if name.endswith(('o_proj.weight', 'down_proj.weight')) else math.sqrt(2 / 5 / c.n_embd)


class GPT(nn.Module):
    logits_at_once = 2**26       # logits held at a time by the loss: 256 MB in fp32
    activation_checkpointing = False         # keep only what enters each block, and compute the rest again in backward

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.embed = nn.Embedding(c.vocab_size, c.n_embd)
        if c.pe == 'learned':
            self.pos_embed = nn.Embedding(c.block_size, c.n_embd)
        elif c.pe == 't5':
            self.pos_bias = nn.Embedding(32, c.n_head)           # one table for all layers
        elif c.pe == 'alibi':
            self.register_buffer('slopes', torch.tensor(alibi_slopes(c.n_head), device='cpu'), persistent=False)
        elif c.pe == 'rope':
            trained = rope_frequencies(c)
            self.register_buffer('trained_freq', torch.tensor(trained, dtype=torch.float32, device='cpu'), persistent=False)
            self.register_buffer('inv_freq', torch.tensor(c.rope_inv_freq or trained, dtype=torch.float32, device='cpu'), persistent=False)
        self.blocks = nn.ModuleList(Block(c, i) for i in range(c.n_layer))
        self.norm = nn.RMSNorm(c.n_embd, eps=c.norm_eps)
        self.lm_head = nn.Linear(c.n_embd, c.vocab_size, bias=False)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=init_std(c, name))

    def forward(self, idx, targets=None, rows=None, cache=None):
        """
        idx (B, T) token ids -> (logits, loss).
        rows: which positions reach the head, a slice or an index (default all). targets: the next token at those
        positions, (B, len(rows)); with them loss is their mean cross-entropy in nats and logits is None, without
        them loss is None. cache: a KVCache, to which these T tokens are appended.
        ValueError past the table of pe='learned'.
        """
        c, start = self.config, cache.len if cache is not None else 0
        end = start + idx.size(1)
        pos = torch.arange(start, end, device=idx.device)
        x = self.embed(idx)                          # (B, T, C)
        rope = mask = None
        if 0 < start < end - 1:                      # a chunk after cached keys: is_causal would align to the top left
            mask = torch.ones(end - start, end, dtype=torch.bool, device=idx.device).tril(start)
        if c.pe == 'learned':
            if end > c.block_size:
                raise ValueError(f'pe=learned has a table of {c.block_size} positions; {end} were asked for')
            x = x + self.pos_embed(pos)
        elif c.pe == 'sinusoidal':
            x = x * math.sqrt(c.n_embd) + sinusoid(pos, c.n_embd)
        elif c.pe in ('t5', 'alibi'):                # (1, nh, T, end): added to the scores, after the temperature
            n = pos[:, None] - torch.arange(end, device=idx.device)          # how far back each key lies
            mask = self.pos_bias(t5_bucket(n.clamp(min=0))).permute(2, 0, 1) if c.pe == 't5' else -self.slopes[:, None, None] * n
            mask = mask.masked_fill(n < 0, -math.inf)[None]      # 4-D, or the fused kernel refuses it
        elif c.pe == 'rope':
            angle = pos[:, None].float() * torch.where(pos[:, None] < c.rope_start, self.trained_freq, self.inv_freq)
            rope = angle.cos(), angle.sin()          # (T, hs/2) each
        n = (pos[-1:] + 1).clamp(min=cache.length if cache is not None else 0)
        log_len = (n / c.block_size).clamp(min=1).log()              # (1,): 0 up to block_size
        for block in self.blocks:
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, rope, log_len, mask, use_reentrant=False)
            else:
                x = block(x, rope, log_len, mask, cache)
        if cache is not None:
            cache.len = end
        x = self.norm(x if rows is None else x[:, rows])
        if targets is None:
            return self.lm_head(x), None
        return None, self.cross_entropy(x.flatten(0, 1), targets.flatten())

    def cross_entropy(self, x, targets):
        """Mean cross-entropy of x (N, C) against targets (N,), a chunk of rows at a time, each recomputed in backward."""
        def chunk(x, t):
            return F.cross_entropy(self.lm_head(x).float(), t, reduction='sum')
        n = 1 << max(1, self.logits_at_once // self.config.vocab_size).bit_length() - 1      # chunks of one shape, for batches of any usual size
        if len(x) <= n:
            return chunk(x, targets) / len(x)
        return sum(checkpoint(chunk, a, t, use_reentrant=False) for a, t in zip(x.split(n), targets.split(n))) / len(x)

    @torch.no_grad()
    @sdpa_kernel(DECODING)
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None):
        """
        idx (B, T) -> (B, T + max_new_tokens). temperature divides the final logits; 0 takes the likeliest token.
        ValueError where idx holds no token: begin with BOS.
        """
        if idx.size(1) == 0:
            raise ValueError('generate goes on from at least one token: begin with BOS')
        cache, new = KVCache(idx.size(1) + max_new_tokens - 1), idx
        for _ in range(max_new_tokens):
            logits = self(new, rows=slice(-1, None), cache=cache)[0][:, -1].float()      # (B, V)
            if temperature == 0:
                new = logits.argmax(-1, keepdim=True)
            else:
                if top_k is not None:
                    kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
                    logits = logits.masked_fill(logits < kth, -math.inf)
                new = torch.multinomial((logits / temperature).softmax(-1), 1)
            idx = torch.cat((idx, new), dim=1)
        return idx

    def num_params(self):
        """Parameters without the embedding tables, which only look up."""
        return sum(p.numel() for n, p in self.named_parameters() if 'embed' not in n and n != 'pos_bias.weight')

    def flops_per_token(self, T):
        """Training FLOPs a token at length T as PaLM (app. B) counts them: 6N + 12 n_layer n_embd T, attention un-halved."""
        return 6 * self.num_params() + 12 * self.config.n_layer * self.config.n_embd * T
