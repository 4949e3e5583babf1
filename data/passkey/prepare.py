"""
The synthetic corpus of the tiny reproduction: generated, no download, a vocabulary of about a hundred words.

    python -m data.passkey.prepare --out data/passkey                          # 12M tokens, half of the documents passkey, questions often
    python -m data.passkey.prepare --out data/passkey_rare --retrieval 0.7 --gap 200 --seed 1 --tokens 4000000     # questions rarely

Documents of random length (log-uniform, 64 to --longest tokens), of two kinds in random order:
  passkey  the landmark template (Mohtashami & Jaggi 2023, as Wang et al. 2024 use it): the task, one key told once, and
           the question with its answer again and again between runs of garbage sentences in random order
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

NAMES = 'Tom Anna Ben Lucy Sam Mia Max Eva'.split()
PLACES = 'garden kitchen forest river school market tower bridge'.split()
THINGS = 'ball book hat lamp ring drum kite cup'.split()
COLOURS = 'red white black brown grey pink'.split()
FACTS = (' {name} lives near the {place}.', ' {name} has the {thing}.', ' The {thing} looks {colour}.')

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
    """At least n ids: the task, garbage, the key told once, and from then on the question: often in some documents, rarely in others."""
    key = rng.integers(10000, 100000)
    info, asked = encode(INFO.format(key=key)), encode(QUESTION + ANSWER.format(key=key) + '.')
    garbage = [encode(g) for g in GARBAGE]
    ids, told, gap = list(encode(TASK)), False, np.exp(rng.uniform(np.log(2), np.log(gap)))     # sentences between questions, on average
    at = len(ids) + rng.integers(0, max(1, min(n, 512) // 2 - len(ids)))
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
    facts = [encode(f.format(name=a, place=b, thing=c, colour=d)) for a, b, c, d in zip(people, places, things, colours) for f in FACTS]
    return [i for f in rng.integers(0, len(facts), size=n // 5 + 1) for i in facts[f]]      # five to six ids a fact


def generate(tokens, retrieval, gap, seed, longest=4096):
    """Yields documents until there are `tokens` ids; a share `retrieval` of them are passkey documents."""
    rng, encode = np.random.default_rng(seed), functools.cache(get_encoding().encode_ordinary)
    while tokens > 0:
        n = int(np.exp(rng.uniform(np.log(64), np.log(longest))))
        make = passkey_document if rng.random() < retrieval else story_document
        ids = make(rng, n, encode, gap)[:n]
        tokens -= len(ids) + 1
        yield ids


def main():
    from data.runtime import fail, parser
    from data.tokenizer import get_tokenizer
    from data.tokens import write_data
    p = parser(__doc__)
    p.add_argument('--out', default='data/passkey', help='folder for train.bin, val.bin, meta.json')
    p.add_argument('--tokens', type=int, default=12_000_000, help='of train.bin; val.bin has 1M')
    p.add_argument('--retrieval', type=float, default=0.5, help='share of passkey documents')
    p.add_argument('--gap', type=float, default=6, help='most sentences between two questions of a passkey document, on average')
    p.add_argument('--longest', type=int, default=4096, help='tokens of the longest document')
    p.add_argument('--seed', type=int, default=0)
    args = p.parse_args()
    if not 0 <= args.retrieval <= 1:
        fail(f'--retrieval {args.retrieval} must lie between 0 and 1')
    if args.tokens < 1:
        fail(f'--tokens {args.tokens} must be at least 1')
    if not 64 <= args.longest <= 2**24:              # a document is made in memory
        fail(f'--longest {args.longest} must lie between 64 and {2**24}')
    if args.seed < 0:
        fail(f'--seed {args.seed} must not be negative')
    if not 2 <= args.gap <= 1000:
        fail(f'--gap {args.gap} must lie between 2 and 1000')
    splits = {split: generate(n, args.retrieval, args.gap, (args.seed, i), args.longest) for i, (split, n) in enumerate((('train', args.tokens), ('val', min(args.tokens, 1_000_000))))}
    meta = write_data(args.out, get_tokenizer('passkey'), splits, source=f'generated: {vars(args)}')
    for split in splits:
        print(f'{args.out}/{split}.bin: {meta[split]["tokens"]:,} tokens, {meta[split]["n_docs"]:,} documents, vocabulary {meta["vocab_size"]}')


if __name__ == '__main__':
    main()
