"""
The synthetic corpus of the tiny reproduction: generated, no download, a vocabulary of about a hundred words.

    python -m data.passkey.prepare --out data/passkey                          # 8M tokens to train on
    python -m data.passkey.prepare --out data/passkey_long --longest 8192 --gap 6 --seed 1       # longer, to extend on

Documents of random length (log-uniform, 64 to --longest tokens), of two kinds in random order:
  passkey  the landmark template (Mohtashami & Jaggi 2023, as Wang et al. 2024 use it): the task, one key told once
           anywhere in the document, as in the test's prompts, and from then on the question with its answer again and
           again between runs of garbage sentences in random order
  story    who lives where, who has what, what colour it is: facts drawn anew for each document and told over and over
           in random order, so that a fact told before can be recalled
"""
import functools
import re

import numpy as np

TASK = ('There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. '
        'I will quiz you about the important information there.\n')
GARBAGE = (' The grass is green.', ' The sky is blue.', ' The sun is yellow.', ' Here we go.', ' There and back again.')
INFO = '\nThe pass key is {key}. Remember it. {key} is the pass key.\n'
QUESTION = '\nWhat is the pass key? The pass key is'
ANSWER = ' {key}'

NAMES = ['Tom', 'Anna', 'Ben', 'Lucy', 'Sam', 'Mia', 'Max', 'Eva']
PLACES = ['garden', 'kitchen', 'forest', 'river', 'school', 'market', 'tower', 'bridge']
THINGS = ['ball', 'book', 'hat', 'lamp', 'ring', 'drum', 'kite', 'cup']
COLOURS = ['red', 'white', 'black', 'brown', 'grey', 'pink']
FACTS = (' {name} lives near the {place}.', ' {name} has the {thing}.', ' The {thing} looks {colour}.')

ROOM = 30                        # tokens that the key and a first question take, at the end of a document
WORD = re.compile(r' ?[A-Za-z]+| ?[0-9]|[.?\n]')


@functools.cache
def get_encoding():
    """The corpus's word-level tiktoken.Encoding: a word with the space before it is one token, a digit is one token."""
    import tiktoken
    text = TASK + ''.join(GARBAGE) + INFO + QUESTION + ANSWER
    text = text.format(key='') + ''.join(FACTS) + ''.join(f' {w}' for w in NAMES + PLACES + THINGS + COLOURS)
    words = dict.fromkeys(WORD.findall(re.sub(r'{\w+}', '', text)))
    words.update(dict.fromkeys([f' {d}' for d in range(10)] + [f'{d}' for d in range(10)]))
    pattern = '|'.join(re.escape(w) for w in sorted(words, key=len, reverse=True))
    return tiktoken.Encoding('passkey', pat_str=pattern, mergeable_ranks={w.encode(): i for i, w in enumerate(words)},
                             special_tokens={'<|endoftext|>': len(words)})


def passkey_document(rng, n, encode, gap):
    """At least n ids: task, garbage, the key, and from then on the question: often in some, rarely in others."""
    key = rng.integers(10000, 100000)
    info, asked = encode(INFO.format(key=key)), encode(QUESTION + ANSWER.format(key=key) + '.')
    garbage = [encode(g) for g in GARBAGE]
    ids, told = list(encode(TASK)), False
    gap = np.exp(rng.uniform(np.log(2), np.log(gap)))            # sentences between questions, on average
    at = len(ids) + rng.integers(0, max(1, n - len(ids) - ROOM))
    while len(ids) < n:
        for i in rng.integers(0, len(garbage), size=1 + rng.poisson(gap) if told else 1):
            ids += garbage[i]
        if told:
            ids += asked
        elif len(ids) >= at:
            ids += info
            told = True
    return ids


def story_document(rng, n, encode, gap):
    """At least n ids: three to eight people, each with a home and a thing of some colour, told over and over."""
    people = rng.permutation(NAMES)[:rng.integers(3, 9)]
    places, things = rng.permutation(PLACES), rng.permutation(THINGS)
    colours = rng.choice(COLOURS, len(things))
    facts = []
    for name, place, thing, colour in zip(people, places, things, colours):
        for fact in FACTS:
            facts.append(encode(fact.format(name=name, place=place, thing=thing, colour=colour)))
    ids = []
    for i in rng.integers(0, len(facts), size=n // 5 + 1):       # five to six ids a fact
        ids += facts[i]
    return ids


def generate(tokens, retrieval, gap, seed, longest=4096):
    """Yields documents until there are `tokens` ids; a share `retrieval` of them are passkey documents."""
    rng, encode = np.random.default_rng(seed), functools.cache(get_encoding().encode_ordinary)
    while tokens > 0:
        n = int(np.exp(rng.uniform(np.log(64), np.log(longest))))
        make = passkey_document if rng.random() < retrieval else story_document
        ids = make(rng, n, encode, gap)[:n]
        tokens -= len(ids) + 1
        yield ids


def parse_args(argv=None):
    from data.runtime import number, parser

    def between(kind, least, most):
        return lambda text: number(text, kind, lambda v: least <= v <= most, f'from {least:,} to {most:,}')

    p = parser(__doc__)
    p.add_argument('--out', default='data/passkey', help='folder for train.bin, val.bin, meta.json')
    p.add_argument('--tokens', type=between(int, 1, 2**40), default=8_000_000, help='of train.bin; val.bin has 1M')
    p.add_argument('--retrieval', type=between(float, 0, 1), default=1.0, help='share of passkey documents')
    p.add_argument('--gap', type=between(float, 2, 1000), default=12,
                   help='sentences between two questions, on average, in the documents that have the fewest')
    p.add_argument('--longest', type=between(int, 64, 2**24), default=512, help='tokens of the longest document')
    p.add_argument('--seed', type=between(int, 0, 2**63), default=0)
    return p.parse_args(argv)


def main(argv=None):
    from data.tokenizer import get_tokenizer
    from data.tokens import write_data
    args = parse_args(argv)
    splits = {}
    for i, (split, tokens) in enumerate(dict(train=args.tokens, val=min(args.tokens, 1_000_000)).items()):
        splits[split] = generate(tokens, args.retrieval, args.gap, (args.seed, i), args.longest)
    meta = write_data(args.out, get_tokenizer('passkey'), splits, source=f'generated: {vars(args)}')
    for split in splits:
        print(f'{args.out}/{split}.bin: {meta[split]["tokens"]:,} tokens, {meta[split]["n_docs"]:,} documents, '
              f'vocabulary {meta["vocab_size"]}')


if __name__ == '__main__':
    main()
