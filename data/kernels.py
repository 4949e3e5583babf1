"""
Where hardware, precision and memory matter: attention on the fused kernels of torch, whole or in a window, and the
loss in chunks.
"""
import math

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend
from torch.utils.checkpoint import checkpoint

# cuDNN, the first choice on Hopper from torch 2.11, plans anew for each number of keys: decoding does without
DECODING = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def attend(q, k, v, mask=None, window=0):
    """
    Causal attention, fused: softmax(q k^T / sqrt(hs) + mask) v. q (B, nh, T, hs), k and v (B, nkv, n, hs); mask: None,
    or bool or a bias that broadcasts to (B, nh, T, n) -> (B, nh, T, hs).
    """
    if window:                                       # instead of the mask
        return attend_window(q, k, v, window)
    T, groups = q.size(2), q.size(1) // k.size(1)
    if q.is_cuda and groups > 1 and (q.dtype == torch.float32 or mask is not None):
        # torch 2.11 on CUDA: flash takes neither fp32 nor a mask, and mem-efficient no grouped queries. Repeated keys
        # keep this off the slow path that writes all scores to memory
        k = k.repeat_interleave(groups, dim=1)
        v = v.repeat_interleave(groups, dim=1)
    if mask is not None and mask.is_floating_point():
        mask = mask.type_as(q)
    with torch.autocast('cpu', enabled=False):       # in the precision that q came in
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and T > 1,
                                              enable_gqa=k.size(1) < q.size(1))


def attend_window(q, k, v, window):
    """
    attend(), but a query sees `window` keys, itself included. k and v (B, nkv, n, hs) are those of the T queries and up
    to window - 1 before. In blocks of queries, each beside all the keys that one of them sees: time and memory grow
    with 2 T window, on every device, where one mask for all would cost more than attention without a window.
    """
    B, nh, T, hs = q.shape
    before = k.size(2) - T
    if k.size(2) <= window and (T == 1 or before == 0):
        return attend(q, k, v)                       # nothing is too far
    size = min(window, T)
    blocks = math.ceil(T / size)
    pad_left, pad_right = window - before, blocks * size - T
    q = F.pad(q, (0, 0, 0, pad_right)).view(B, nh, blocks, size, hs).transpose(1, 2).flatten(0, 1)
    k = F.pad(k, (0, 0, pad_left, pad_right)).unfold(2, window + size, size).permute(0, 2, 1, 4, 3).flatten(0, 1)
    v = F.pad(v, (0, 0, pad_left, pad_right)).unfold(2, window + size, size).permute(0, 2, 1, 4, 3).flatten(0, 1)
    i = torch.arange(size, device=q.device)[:, None]
    j = torch.arange(window + size, device=q.device)             # key i + window is query i's own
    real = torch.arange(blocks, device=q.device)[:, None, None] * size + j >= pad_left
    mask = (i < j) & (j <= i + window) & real        # (blocks, size, window + size)
    y = attend(q, k, v, mask.repeat(B, 1, 1)[:, None])           # (B blocks, nh, size, hs)
    return y.view(B, blocks, nh, size, hs).transpose(1, 2).flatten(2, 3)[:, :, :T]


def slow_in_bf16(q):
    """Backward through torch's CPU kernel in bf16 takes up to three times as long as in fp32 where rows are short."""
    return q.is_cpu and q.dtype == torch.bfloat16 and q.size(2) < 512 and torch.is_grad_enabled()


def chunked_cross_entropy(head, x, targets, at_once):
    """
    Mean cross-entropy in nats of the logits head(x), for x (N, C), against targets (N,). Of a large vocabulary only
    `at_once` logits are in memory: rows go in chunks, which the backward pass computes again.
    """
    def chunk(x, t):
        return F.cross_entropy(head(x).float(), t, reduction='sum')
    rows = max(1, at_once // head.out_features)
    rows = 2 ** int(math.log2(rows))                 # a power of two divides usual batches: chunks of one shape
    if len(x) <= rows:
        return chunk(x, targets) / len(x)
    total = 0
    for part, t in zip(x.split(rows), targets.split(rows)):
        total = total + checkpoint(chunk, part, t, use_reentrant=False)
    return total / len(x)
