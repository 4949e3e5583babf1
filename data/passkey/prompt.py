"""
The prompts of the passkey test (the landmark template, as Wang et al. 2024 use it), for any tokenizer.
"""
import numpy as np

from data.figures import default_lengths
from data.passkey.prepare import ANSWER, GARBAGE, INFO, QUESTION, TASK
from data.runtime import fail


def shared(a, b):
    """How many leading ids two encodings have in common."""
    for n, (x, y) in enumerate(zip(a, b)):
        if x != y:
            return n
    return min(len(a), len(b))


def make_prompt(tok, length, depth, n_depths, rng):
    """
    -> prompt ids, answer ids, the token position at which the key is told; len(prompt) + len(answer) == length.
    Prompt and answer are tokenised as one string, since encode(a) + encode(b) is not encode(a + b) for most tokenizers.
    The key stands at a sentence boundary drawn from the part [depth, depth + 1) / n_depths of the garbage; tokens are
    cut from the beginning of the garbage to make the length exact. ValueError if there is no room for a sentence.
    """
    def encode(text):
        return bos + tok.encode(text)

    bos = [] if tok.bos is None else [tok.bos]
    key = rng.integers(10000, 100000)
    info, answer = INFO.format(key=key), ANSWER.format(key=key)
    garbage = ''.join(GARBAGE)
    sizes = []                                       # tokens of each sentence, where garbage stands before it
    so_far = TASK + garbage
    for sentence in GARBAGE:
        sizes.append(len(encode(so_far + sentence)) - len(encode(so_far)))
        so_far += sentence
    fixed = len(encode(TASK + garbage + info + garbage + QUESTION + answer)) - 2 * sum(sizes)
    room = length - fixed                            # tokens of garbage
    if room < max(sizes):
        raise ValueError(f'length {length} is too short for a passkey prompt: '
                         f'at least {fixed + max(sizes)} tokens of this tokenizer')

    rounds = room // sum(sizes) + 2                  # more than there is room for: the first ones are cut
    sentences = list(GARBAGE) * rounds
    ends = np.cumsum([0] + sizes * rounds) - (sum(sizes) * rounds - room)        # of sentences, after the cut
    want = (depth + rng.random()) / n_depths * room
    whole = np.flatnonzero((ends > 0) & (ends <= want))
    told_after = int(whole[-1]) if len(whole) else 0
    before = TASK + ''.join(sentences[:told_after])
    text = before + info + ''.join(sentences[told_after:]) + QUESTION
    ids = encode(text + answer)

    told = shared(encode(before), ids)
    asked = shared(encode(text), ids) - len(ids)     # counted from the end, where nothing is cut
    excess = len(ids) - length
    cut = shared(encode(TASK), ids)
    if told - cut >= excess:
        told -= excess
    else:                                            # no whole sentence before the key: the garbage begins behind it
        cut = shared(encode(TASK + info), ids)
    ids = ids[:cut] + ids[cut + excess:]
    return ids[:asked], ids[asked:], told


def usable_lengths(asked, config, tok):
    """The lengths to measure at: those asked for, which must all hold a prompt, or those of the default that do."""
    lengths, too_short = [], None
    for n in sorted(set(asked or default_lengths(config))):
        try:
            make_prompt(tok, n, 0, 1, np.random.default_rng(0))
            lengths.append(n)
        except ValueError as e:                      # half the training length, say, may hold no prompt
            too_short = str(e)
    if too_short and (asked or not lengths):
        fail(too_short)
    return lengths
