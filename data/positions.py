"""
How positions come in, as formulas that model.py uses: the encodings of pe=, RoPE's frequencies and their
stretched forms, and the laws by which a temperature grows. c is a GPTConfig, hs its head size.
"""
import math

import torch

# ---------------------------------------------------------------------------------------------------------------------
# RoPE's frequencies, as trained and stretched

def rope_frequencies(c):
    """Su et al. 2021, sec. 3.2.2: the hs/2 inverse frequencies of a GPTConfig as trained, theta^(-2m / hs)."""
    freq = [c.rope_theta ** (-2 * m / c.head_size) for m in range(c.head_size // 2)]
    rotating = round(c.rope_fraction * len(freq))
    return freq[:rotating] + [0.0] * (len(freq) - rotating)


def pi(c, length):
    """Position interpolation (Chen et al. 2023, eq. 4) -> (hs/2 inverse frequencies, temperature 1)."""
    return [freq * c.block_size / length for freq in rope_frequencies(c)], 1.0


def ntk(c, length):
    """NTK-aware scaling (bloc97 2023): PI's division for the lowest frequency, none for the highest -> as pi()."""
    hs = c.head_size
    base = c.rope_theta * (length / c.block_size) ** (hs / max(1, hs - 2))
    return [base ** (-2 * m / hs) for m in range(hs // 2)], 1.0


def yarn(c, length):
    """YaRN (Peng et al. 2024, sec. 3.2 and 3.4; ramp as in its code) -> (frequencies, temperature on the scores)."""
    hs = c.head_size
    s = length / c.block_size

    def pair(turns):
        """The (fractional) index of the pair of dimensions that turns so often within the training length."""
        return hs * math.log(c.block_size / (2 * math.pi * turns)) / (2 * math.log(c.rope_theta))

    low = max(0, math.floor(pair(32)))
    high = min(hs - 1, math.ceil(pair(1)))
    inv_freq = []
    for m, freq in enumerate(rope_frequencies(c)):
        ramp = min(1.0, max(0.0, (m - low) / max(1e-3, high - low)))       # 0: kept as trained, 1: divided by s
        inv_freq.append(freq * (1 - ramp) + freq / s * ramp)
    return inv_freq, (0.1 * math.log(s) + 1) ** 2


# ---------------------------------------------------------------------------------------------------------------------
# encodings

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
    Raffel et al. 2020: distances n >= 0, in tokens -> one of 32 buckets. The first 16 hold one distance each, the
    others grow with its logarithm up to 128, and the last one holds all that are further.
    """
    far = 16 + (torch.log(n.clamp(min=1) / 16) / math.log(128 / 16) * 16).long()
    return torch.where(n < 16, n, far.clamp(max=31))


def alibi_slopes(n_head):
    """
    Press et al. 2022, sec. 3: head h of n gets 2^(-8h/n). Where n is no power of two, as in its code: the slopes of the
    power of two below, then every second one of the power above.
    """
    n = 2 ** int(math.log2(n_head))
    slopes = [2 ** (-8 * h / n) for h in range(1, n + 1)]
    between = [2 ** (-4 * h / n) for h in range(1, 2 * n, 2)]
    return slopes + between[:n_head - n]


# ---------------------------------------------------------------------------------------------------------------------
# temperatures

def growth(c, n):
    """
    What the slope of a temperature multiplies, by the law of a GPTConfig. n: the tokens that each query sees, (T,); for
    the law 'length' those of the whole sequence, (1,). Only that one must know the final length before it begins.
    """
    at = c.law_at or c.block_size
    if c.law == 'ssmax':                             # scalable softmax (Nakanishi 2025): s_h ln n, scale_h is 0
        return n.log()
    if c.law == 'llama4':                            # Meta 2025: 1 + 0.1 ln(1 + floor(n / 8192))
        return (1 + (n / at).floor()).log()
    if c.law == 'swan':                              # Puvvada et al. 2025: log_a(a + n) = 1 + ln(1 + n / a) / ln a
        return (1 + n / at).log()
    # LogN (Su 2021; Qwen): max(1, log_L n) = 1 + ln max(1, n / L) / ln L, and the same by the length
    return (n / at).clamp(min=1).log()
