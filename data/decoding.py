"""
What decoding needs beside the network: the keys and values so far, and a choice among the next tokens.
"""
import math

import torch


class KVCache:
    """
    Keys and values that a decoder has seen, for each layer; doubles when full, so it has no maximum length. length: how
    many tokens there will be, where that is known: a temperature with a slope goes by it from the first token on.
    A layer with a window keeps what the next token will see, in exactly as much memory.
    """

    def __init__(self, length=0):
        self.kv = {}                                 # layer -> (2, B, nkv, capacity, hs)
        self.len = 0                                 # tokens seen; a layer with a window holds fewer
        self.length = length

    def update(self, layer, k, v, window=0):
        """
        Appends k, v (B, nkv, T, hs) and returns what these T queries need, (B, nkv, n, hs) each: all keys and values so
        far, or with a window the last window - 1 of them and these.
        """
        start, end = self.len, self.len + k.size(2)
        cached = self.kv.get(layer)
        if window:
            kv = torch.stack((k, v))
            if cached is not None:
                kv = torch.cat((cached, kv), dim=3)
            self.kv[layer] = kv[:, :, :, max(0, kv.size(3) - window + 1):].clone()           # a view would hold it all
            return kv
        if cached is None or end > cached.size(3):
            B, nkv, _, hs = k.shape
            larger = k.new_empty(2, B, nkv, max(2 * start, end + 64), hs)
            if cached is not None:
                larger[:, :, :, :start] = cached[:, :, :, :start]
            cached = self.kv[layer] = larger
        cached[0, :, :, start:end] = k
        cached[1, :, :, start:end] = v
        return cached[:, :, :, :end]


def sample(logits, temperature, top_k=None, top_p=None):
    """
    logits (B, V) -> token ids (B, 1). top_k: from the k likeliest tokens; top_p: from the smallest set of likeliest
    tokens whose probabilities add up to it (Holtzman et al. 2020).
    """
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    probs = (logits / temperature).softmax(-1)
    if top_p is not None:
        ordered, order = probs.sort(descending=True)
        before = ordered.cumsum(-1) - ordered        # the probability of all likelier tokens together
        beyond = before >= top_p                     # in sorted order; scatter brings it back to that of the ids
        probs = probs.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), 0)
    return torch.multinomial(probs, 1)
