"""
The weights of a checkpoint as a Hugging Face folder has them, which knows no temperatures: they are multiplied into
other weights.
"""
import math
from dataclasses import replace

import torch

from data.hf.folder import DTYPES, hf_name
from data.positions import rope_frequencies
from data.runtime import fail


def has_slopes(model):
    return any(w.any() for name, w in model.items() if name.endswith('.slope'))


def temperatures_at(n, model, c):
    """Of each layer: the temperatures (nh,) of its heads for n tokens, gains included."""
    found = []
    for i in range(c.n_layer):
        attn = f'blocks.{i}.attn'
        temperature = model[f'{attn}.scale'] + model[f'{attn}.slope'] * math.log(n / c.block_size)
        if c.qk_gain:
            temperature = temperature * model[f'{attn}.gain']
        found.append(temperature)
    return found


def written_heads(c, temperatures):
    """The GPTConfig of the heads that the folder gets: c itself, or one of heads twice as wide, see fold_into_norms."""
    if not c.qk_norm:
        return c
    if c.head_size % 2:
        fail(f'head size {c.head_size} is odd: Qwen3 rotates pairs')
    for of_heads in temperatures:
        if (of_heads != of_heads[0]).any():
            return doubled_heads(c)
    return c


def doubled_heads(c):
    """The GPTConfig of heads twice as wide, whose RoPE turns the first half of its pairs as c's turns all of them."""
    wide = replace(c, n_embd=2 * c.n_embd, rope_theta=c.rope_theta ** 2, rope_inv_freq=None)
    if c.rope_inv_freq:
        last = c.rope_inv_freq[-1] / rope_frequencies(c)[-1]
        rest = rope_frequencies(wide)[len(c.rope_inv_freq):]             # nothing is there to turn
        wide = replace(wide, rope_inv_freq=c.rope_inv_freq + [f * last for f in rest])
    return wide


def hf_weights(model, c, wide, temperatures, tied, dtype):
    """-> {name in the folder: tensor}, for heads as in `wide`. Takes the weights out of `model`: one copy at a time."""
    if c.qk_norm:
        for i, of_heads in enumerate(temperatures):
            fold_into_norms(model, f'blocks.{i}.attn', of_heads, c, wide)
    state = {}
    for name in list(model):
        w = model.pop(name)
        if name.endswith(('.scale', '.slope', '.gain')) or name.startswith('pos_'):
            continue
        if tied and name == 'lm_head.weight':
            continue
        if name.endswith('q_proj.weight') and not c.qk_norm:
            layer = int(name.split('.')[1])
            w = scale_queries(w, temperatures[layer])
        w = w.to(DTYPES[dtype]).contiguous()
        if not w.isfinite().all():
            fail(f'weight {name} does not fit into {dtype}: give --dtype bf16 or fp32')
        state[hf_name(name)] = w
    return state


def scale_queries(w, temperature):
    """q_proj (nh hs, C), where the rows of each head are multiplied by its temperature, in fp32: 1.0 changes no bit."""
    heads = w.float().view(len(temperature), -1, w.size(1))
    return (heads * temperature[:, None, None]).view(w.shape)


def fold_into_norms(model, attn, temperature, c, wide):
    """
    Temperatures (nh,) of a layer with QK-norm, which would undo them in q_proj. The gains of Qwen3's norm come
    after it and are shared by all heads of a layer: they take a temperature that all share. Where they differ, heads
    become twice as wide. Of b q and a q side by side, with b^2 + a^2 = 2, the root mean square is that of q; keys are 0
    beside a q, and so b alone is left in the scores, another one for each head.
    """
    model[f'{attn}.k_norm.weight'] = torch.ones(wide.head_size)
    if wide is c:
        model[f'{attn}.q_norm.weight'] = torch.full((c.head_size,), temperature[0])
        return
    highest = temperature.abs().max().clamp(min=1e-6)
    model[f'{attn}.q_norm.weight'] = torch.full((wide.head_size,), highest)
    b = (temperature / highest)[:, None, None, None]
    q, k, v, o = (f'{attn}.{name}_proj.weight' for name in 'qkvo')
    model[q] = side_by_side(model[q], b, (2 - b * b).sqrt(), c)
    model[k] = side_by_side(model[k], math.sqrt(2), 0, c)        # its root mean square is that of k, too
    model[v] = side_by_side(model[v], 1, 0, c)
    model[o] = side_by_side(model[o].T, 1, 0, c).T               # its columns are the heads


def side_by_side(w, first, second, c):
    """
    w (heads hs, C) -> (heads 2 hs, C): each head multiplied by `first`, and beside it by `second`. RoPE's pairs
    (m, m + hs/2) become (m, m + hs).
    """
    w = w.float().reshape(-1, 2, c.head_size // 2, c.n_embd)     # (heads, 2, hs/2, C)
    return torch.cat((w * first, w * second), dim=2).reshape(-1, c.n_embd)
