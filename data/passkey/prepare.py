"""
The synthetic corpus of the tiny reproduction: generated, no download, a vocabulary of 68 words, digits and signs.

    python -m data.passkey.prepare --out data/passkey                                   # 8M tokens to train on
    python -m data.passkey.prepare --out data/passkey_long --longest 8192 --seed 1      # longer documents, to extend on

Each document is the landmark template (Mohtashami & Jaggi 2023, as Wang et al. 2024 use it), of random length
(log-uniform, 64 to --longest tokens): the task, then sentences of garbage in random order. Among them one key is told,
once, at a random place, and after it the question with its answer stands 1 to --questions times, at random places too.
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

TELLING, ASKING = 24, 16         # tokens that the key takes, and a question with its answer
# A word with the space before it is one token, a digit is one. " is" goes with the word behind it: which colour follows
# depends on the noun before. A model of this size finds the word before by counting, which fails past its training
# length at every temperature; that failure would drown what is measured here, finding the key (results/notes.md).
WORD = re.compile(r' is [a-z]+| ?[A-Za-z]+| ?[0-9]|[.?\n]')


@functools.cache
def get_encoding():
    """The corpus's word-level tiktoken.Encoding."""
    import tiktoken
    text = TASK + ''.join(GARBAGE) + INFO + QUESTION + ANSWER
    words = WORD.findall(text.format(key=''))
    words += [f' {digit}' for digit in range(10)]
    words += [f'{digit}' for digit in range(10)]
    words = list(dict.fromkeys(words))               # each once; a word's place is its id
    longest_first = sorted(words, key=len, reverse=True)
    pattern = '|'.join(map(re.escape, longest_first))
    ids = {word.encode(): i for i, word in enumerate(words)}
    return tiktoken.Encoding('passkey', pat_str=pattern, mergeable_ranks=ids,
                             special_tokens={'<|endoftext|>': len(words)})


def document(rng, n, encode, questions):
    """At least n ids: task, garbage, the key, garbage and questions. The last question may not fit within n."""
    key = rng.integers(10000, 100000)
    info = encode(INFO.format(key=key))
    asked = encode(QUESTION + ANSWER.format(key=key) + '.')
    garbage = [encode(sentence) for sentence in GARBAGE]
    ids = list(encode(TASK))
    tell_at = len(ids) + rng.integers(max(1, n - len(ids) - TELLING - ASKING))
    n_questions = rng.integers(1, questions + 1)
    ask_at = rng.integers(tell_at, max(tell_at + 1, n - ASKING), size=n_questions)
    ask_at = sorted(ask_at.tolist())
    told = False
    while len(ids) < n:
        ids += garbage[rng.integers(len(garbage))]
        if not told and len(ids) >= tell_at:
            ids += info
            told = True
        elif told and ask_at and len(ids) >= ask_at[0]:
            ids += asked
            ask_at.pop(0)
    return ids


def generate(tokens, questions, seed, longest):
    """Yields documents until there are `tokens` ids."""
    rng = np.random.default_rng(seed)
    encode = functools.cache(get_encoding().encode_ordinary)
    while tokens > 0:
        n = int(np.exp(rng.uniform(np.log(64), np.log(longest))))
        ids = document(rng, n, encode, questions)[:n]
        tokens -= len(ids) + 1
        yield ids


def parse_args(argv=None):
    from data.runtime import number, parser

    def between(kind, least, most):
        return lambda text: number(text, kind, lambda v: least <= v <= most, f'from {least:,} to {most:,}')

    p = parser(__doc__)
    p.add_argument('--out', default='data/passkey', help='folder for train.bin, val.bin, meta.json')
    p.add_argument('--tokens', type=between(int, 1, 2**40), default=8_000_000, help='of train.bin; val.bin has 1M')
    p.add_argument('--questions', type=between(int, 1, 1000), default=16, help='at most so many in a document')
    p.add_argument('--longest', type=between(int, 64, 2**24), default=512, help='tokens of the longest document')
    p.add_argument('--seed', type=between(int, 0, 2**63), default=0)
    return p.parse_args(argv)


def main(argv=None):
    from data.tokenizer import get_tokenizer
    from data.tokens import write_data
    args = parse_args(argv)
    n_val = min(args.tokens, 1_000_000)
    splits = dict(train=generate(args.tokens, args.questions, (args.seed, 0), args.longest),
                  val=generate(n_val, args.questions, (args.seed, 1), args.longest))
    meta = write_data(args.out, get_tokenizer('passkey'), splits, source=f'generated: {vars(args)}')
    for split in splits:
        print(f'{args.out}/{split}.bin: {meta[split]["tokens"]:,} tokens, {meta[split]["n_docs"]:,} documents, '
              f'vocabulary {meta["vocab_size"]}')


if __name__ == '__main__':
    main()
