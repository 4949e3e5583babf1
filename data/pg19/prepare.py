r"""
PG-19 (Rae et al. 2020): the 100 books of its test set, for perplexity at length. val.bin holds them, train.bin is
empty.

    pip install datasets
    python -m data.pg19.prepare --out data/pg19 --tokenizer gpt2       # the checkpoint's tokenizer
    python extend.py --ckpt out/small --data data/pg19 --method none \
        --lengths 2048,4096,8192,16384 --stride 256 --eval_tokens 2097152

Open to all, no login. The default is a copy in parquet files: the original's loading script no longer runs.
"""
from data.runtime import parser
from data.stream import Corpus, flags, prepare


def parse_args(argv=None):
    p = parser(__doc__)
    p.add_argument('--source', default='emozilla/pg19', metavar='DIR_OR_NAME',
                   help='name on the hub, or a folder of parquet or jsonl files with a field text')
    p.add_argument('--tokens', type=int,
                   help='stop after the document that reaches this many (default: the whole test set)')
    p.set_defaults(val=1.0, seed=None)
    return flags(p, argv)


def main(argv=None):
    args = parse_args(argv)
    prepare(args, {'pg19': Corpus(args.source, 'data/test-*.parquet')})


if __name__ == '__main__':
    main()
