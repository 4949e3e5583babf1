"""
What the fields of a GPTConfig may say.
"""


def repeated(pattern, n):
    """'rope,rope,rope,nope' -> the word of each of n layers."""
    words = pattern.split(',')
    if len(words) > n:
        raise ValueError(f'{pattern} names {len(words)} layers of n_layer {n}')
    return [words[i % len(words)] for i in range(n)]


def check_shape(c, encodings):
    """ValueError where the network of this GPTConfig cannot be built."""
    for name in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_kv_head', 'n_embd', 'n_inner'):
        if getattr(c, name) < 1:
            raise ValueError(f'{name} must be at least 1, not {getattr(c, name)}')
    known = encodings
    if len(set(c.layer_pe)) > 1 or any(c.layer_window):
        known = ('nope', 'rope')                     # these need nothing outside their own layer
    if not set(c.layer_pe) <= set(known):
        raise ValueError(f'pe={c.pe} window={c.window}: pe is one of {" ".join(encodings)}; '
                         'only nope and rope differ by layer, or have a window')
    if c.qk_norm not in (False, True, 'full'):
        raise ValueError(f'qk_norm={c.qk_norm!r} is unknown: False, True or full')
    if c.n_embd % c.n_head:
        raise ValueError(f'n_embd {c.n_embd} must be a multiple of n_head {c.n_head}')
    if c.n_head % c.n_kv_head:
        raise ValueError(f'n_head {c.n_head} must be a multiple of n_kv_head {c.n_kv_head}')
    hs = c.head_size
    if 'rope' in c.layer_pe and hs % 2:
        raise ValueError(f'pe=rope rotates pairs: head size {hs} must be even')
    if c.rope_inv_freq is not None and len(c.rope_inv_freq) != hs // 2:
        raise ValueError(f'rope_inv_freq has {len(c.rope_inv_freq)} frequencies for {hs // 2} pairs')
