"""
RoPE scaling, both ways: what config.json says of it, and our frequencies with the temperature that goes with them.
"""
import math
from dataclasses import replace

from data.positions import ntk, pi, rope_frequencies, yarn


def read_scaling(c, rope, longest):
    """
    rope_scaling or rope_parameters of a config.json -> (hs/2 inverse frequencies, None where rope_theta gives them;
    temperature on the scores). c: the GPTConfig without scaling; longest: max_position_embeddings, in tokens. The kinds
    are those of transformers' modeling_rope_utils. KeyError, TypeError, ValueError or ArithmeticError for what makes no
    sense.
    """
    kind = rope.get('rope_type', rope.get('type', 'default'))
    L, trained = c.block_size, rope_frequencies(c)
    factor = rope.get('factor') or longest / L
    if kind == 'default':
        return None, 1.0
    if kind == 'linear':
        return pi(c, factor * L)
    if kind == 'dynamic':                            # its s at length l is factor l / L - factor + 1; here l = factor L
        return ntk(c, (factor * factor - factor + 1) * L)
    if kind == 'yarn':
        freq, temperature = yarn(c, factor * L)
        if rope.get('attention_factor') is not None:
            temperature = rope['attention_factor'] ** 2          # it multiplies q and k
        return freq, temperature
    if kind == 'longrope':
        on_each = rope.get('attention_factor') or math.sqrt(1 + math.log(max(1, factor)) / math.log(L))
        freq = [f / r for f, r in zip(trained, rope['long_factor'], strict=True)]
        return freq, on_each ** 2
    if kind == 'llama3':
        return llama3(c, rope['low_freq_factor'], rope['high_freq_factor'], factor), 1.0
    raise ValueError(f'rope_type {kind!r} is unknown')


def llama3(c, low, high, factor):
    """
    By the turns that fit into the training length: with `high` or more a frequency is kept, with `low` or fewer divided
    by the factor, and it is something between the two for what lies between.
    """
    freq = []
    for f in rope_frequencies(c):
        turns = c.block_size * f / (2 * math.pi)
        keep = min(1, max(0, (turns - low) / (high - low)))
        freq.append(f * (keep + (1 - keep) / factor))
    return freq


def longrope(c, longest, r):
    """The rope_scaling that divides each frequency by its own r. vLLM calls attention_factor short_ and long_mscale."""
    return dict(rope_type='longrope', factor=longest / c.block_size, original_max_position_embeddings=c.block_size,
                short_factor=r, long_factor=r, attention_factor=1.0, short_mscale=1.0, long_mscale=1.0)


def write_scaling(c, longest):
    """
    The inverse, up to `longest` tokens: -> (rope_theta, rope_scaling or None, the temperature that goes with it).
    Takes the first kind that is read back as these frequencies; longrope can name any.
    """
    freq = c.rope_inv_freq or rope_frequencies(c)
    for theta, rope in scalings_to_try(c, freq, longest):
        plain = replace(c, rope_theta=theta, rope_inv_freq=None)
        read_back, temperature = read_scaling(plain, rope, longest)
        if same(freq, read_back or rope_frequencies(plain)):
            return theta, rope or None, temperature


def scalings_to_try(c, freq, longest):
    """[(rope_theta, rope_scaling)] that may stand for the frequencies `freq`, the plainest first."""
    trained = rope_frequencies(c)
    base = freq[-1] ** (-c.head_size / max(1, c.head_size - 2))          # NTK is another base
    scalings = [(c.rope_theta, {}), (base, {})]
    asked = longest / c.block_size                   # of extend.py
    found = round(trained[-1] / freq[-1], 9)         # what it did
    original = dict(original_max_position_embeddings=c.block_size)
    for factor in asked, found:
        kinds = (dict(rope_type='linear', factor=factor), dict(rope_type='yarn', factor=factor, **original),
                 dict(rope_type='llama3', factor=factor, **original, low_freq_factor=1.0, high_freq_factor=4.0))
        for rope in kinds:
            scalings.append((c.rope_theta, rope))
    r = [before / after for before, after in zip(trained, freq)]
    scalings.append((c.rope_theta, longrope(c, longest, r)))
    return scalings


def same(freq, others):
    return all(math.isclose(a, b, rel_tol=2e-7) for a, b in zip(freq, others))           # fp32 has no more
