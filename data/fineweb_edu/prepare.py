"""
FineWeb-Edu (Penedo et al. 2024): web pages of educational value, a corpus for the `small` preset. Streamed: only what
is used is downloaded.

    pip install datasets
    python -m data.fineweb_edu.prepare --out data/fineweb_edu   # 1.1B tokens of GPT-2: what `small` sees in one run
    python -m data.fineweb_edu.prepare --out data/fineweb_edu --source /copies/fineweb-edu --workers 16   # local copy

From sample/10BT, ten billion tokens drawn from the whole at random. Open to all, no login.
A stopped preparation goes on with the same command. Until it ends the disk holds every token twice (data/stream.py).
"""
from data.runtime import parser
from data.stream import Corpus, flags, prepare


def parse_args(argv=None):
    p = parser(__doc__)
    p.add_argument('--source', default='HuggingFaceFW/fineweb-edu', metavar='DIR_OR_NAME',
                   help='name on the hub, or a folder of parquet or jsonl files with a field text')
    p.add_argument('--tokens', type=int, default=1_100_000_000, help='of train.bin')
    p.add_argument('--val', type=float, default=0.005,
                   help='share of the documents for validation, chosen by a hash of their text (default 0.005)')
    p.add_argument('--seed', type=int, default=0, help='order of the files: which part of the sample is used')
    return flags(p, argv)


def main(argv=None):
    args = parse_args(argv)
    prepare(args, {'fineweb_edu': Corpus(args.source, 'sample/10BT/*.parquet')})


if __name__ == '__main__':
    main()
