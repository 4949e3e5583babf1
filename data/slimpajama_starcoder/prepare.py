"""
The paper's training data (Wang et al. 2024, after TinyLlama): SlimPajama without its GitHub part, and StarCoder's code,
0.693584 : 0.306416 by tokens.

    pip install datasets && hf auth login
    python -m data.slimpajama_starcoder.prepare --out data/corpus --tokenizer hf:tinyllama      # 105B tokens
    python -m data.slimpajama_starcoder.prepare --out data/tune --tokenizer hf:tinyllama --tokens 30000000 --seed 1

105B tokens are the paper's 50,000 steps; the second command takes other files, to extend on.
hf:tinyllama is a folder with the Llama tokenizer, such as a download of the paper's checkpoint. 105B tokens take about
half a terabyte of download, 210 GB of disk for the result, and as much again until it ends (see data/stream.py).
StarCoder's data is gated: accept its terms on https://huggingface.co/datasets/bigcode/starcoderdata and log in with
`hf auth login` (`huggingface-cli login` in older versions) or HF_TOKEN. cerebras/SlimPajama-627B is no longer on the
hub; the default is a copy that others uploaded, and --slimpajama takes a local folder of the original (.jsonl.zst).
Every document begins with BOS; TinyLlama's end with EOS. A stopped preparation goes on with the same command.
"""
from data.runtime import fail, parser
from data.stream import Corpus, flags, prepare

SHARES = dict(slimpajama=0.693584, starcoder=0.306416)
KEEP = {'RedPajamaCommonCrawl', 'RedPajamaC4', 'RedPajamaBook', 'RedPajamaArXiv', 'RedPajamaWikipedia',
        'RedPajamaStackExchange'}


def slimpajama_text(row):
    """The document, or None if it is of the GitHub part, which StarCoder's data covers."""
    name = row['meta']['redpajama_set_name']
    if name == 'RedPajamaGithub':
        return None
    if name not in KEEP:                             # a new spelling would let GitHub in, or the rest out, silently
        known = ', '.join(sorted(KEEP))
        fail(f'SlimPajama: a document of the part {name!r}, where only RedPajamaGithub and {known} are known')
    return row['text']


def starcoder_text(row):
    return row['content']


def parse_args(argv=None):
    p = parser(__doc__)
    p.add_argument('--slimpajama', default='gmongaras/SlimPajama-627B_Reupload', metavar='DIR_OR_NAME',
                   help='name on the hub, or a folder of parquet or jsonl files with fields text and meta')
    p.add_argument('--starcoder', default='bigcode/starcoderdata', metavar='DIR_OR_NAME',
                   help='the same, with a field content')
    p.add_argument('--tokens', type=int, default=105_000_000_000, help='of train.bin, both together')
    p.add_argument('--val', type=float, default=0.001,
                   help='share of the documents for validation, chosen by a hash of their text (default 0.001)')
    p.add_argument('--seed', type=int, default=0, help='order of the files: which part of the data is used')
    return flags(p, argv)


def main(argv=None):
    args = parse_args(argv)
    slimpajama = Corpus(args.slimpajama, 'data/train-*.parquet', slimpajama_text, ('text', 'meta'),
                        SHARES['slimpajama'])
    # a file holds one programming language, so many are read in turn
    starcoder = Corpus(args.starcoder, '*/*.parquet', starcoder_text, ('content',), SHARES['starcoder'], lanes=16)
    prepare(args, dict(slimpajama=slimpajama, starcoder=starcoder))


if __name__ == '__main__':
    main()
