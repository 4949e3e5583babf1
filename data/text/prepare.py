"""
Local text files as training or evaluation data, with any named tokenizer. One file is one document; of a single file
the last tenth is for validation.

    python -m data.text.prepare books --out data/books --tokenizer gpt2              # one document in 20 for validation
    python -m data.text.prepare books --val_files books/heldout --out data/books     # these for validation
    python -m data.text.prepare proofs --val 1 --out data/proofs --tokenizer gpt2    # to measure with: no train.bin

A folder gives every file in it and in its subfolders, except where a name begins with a dot or a subfolder is a link.
Text is taken as it is, so it must be UTF-8; empty files are skipped. Memory holds one document at a time.
"""
import hashlib
import os

from tqdm import tqdm

from data.checkpoint import preflight
from data.runtime import fail, parser
from data.tokenizer import encode_document, get_tokenizer
from data.tokens import write_data


def find(paths):
    """Files and folders -> {real path: name}, sorted within each folder; a name starts with the folder given."""
    def unreadable(e):
        fail(f'{e.filename} cannot be read ({e.strerror})')

    found = {}                                       # by real path: a file that is reached twice is one document
    for path in map(os.path.expanduser, paths):      # make TEXT=~/books: not every shell does it there
        files = [path] if os.path.isfile(path) else []
        if os.path.isdir(path):
            for folder, inside, names in os.walk(path, onerror=unreadable):
                inside[:] = [d for d in inside if not d.startswith('.')]
                files += [os.path.join(folder, n) for n in names if not n.startswith('.')]
        if not files:
            fail(f'{path}: ' + ('this folder holds no files' if os.path.isdir(path) else 'no such file or folder'))
        for f in sorted(files):
            found.setdefault(os.path.realpath(f), os.path.relpath(f, os.path.dirname(os.path.abspath(path))))
    return found


def read(file):
    """The text of a file as it is: no newline is translated, no byte replaced."""
    try:
        with open(file, 'rb') as f:
            return f.read().decode()
    except UnicodeDecodeError as e:
        fail(f'{file} is not UTF-8 text (byte {e.start:,}): convert it, for example with iconv, or leave it out')
    except OSError as e:
        fail(f'{file} cannot be read ({e.strerror}): restore it, or leave it out')


def last_part(text, share):
    """
    Where the last part of a single document begins, in characters; with a line where one begins near. 0: it is too
    short for two parts.
    """
    cut = round((1 - share) * len(text))
    if cut == len(text):
        return 0
    return text.rfind('\n', max(0, cut - 1000), cut) + 1 or cut


def parse_args(argv=None):
    p = parser(__doc__)
    # files
    p.add_argument('files', nargs='+', metavar='FILE_OR_FOLDER', help='the documents')
    p.add_argument('--out', required=True, help='folder for train.bin, val.bin, meta.json')
    p.add_argument('--tokenizer', default='bytes', help='bytes (default), gpt2, cl100k_base, ... or hf:DIR')
    # split, always between documents
    split = p.add_mutually_exclusive_group()
    split.add_argument('--val', type=float, help='share of the documents for validation (default 0.05), at least one; '
                       '1: all. Of a single file: its last part (default 0.1)')
    split.add_argument('--val_files', nargs='+', metavar='FILE_OR_FOLDER', default=[],
                       help='the documents for validation; all others are for training')
    p.add_argument('--seed', type=int, default=0, help='which documents --val takes (default 0)')
    args = p.parse_args(argv)
    if args.val is not None and not 0 < args.val <= 1:
        fail(f'--val {args.val} must be above 0, and at most 1')
    return args


def main(argv=None):
    args = parse_args(argv)
    tokenizer = get_tokenizer(args.tokenizer)
    docs, val = find(args.files + args.val_files), set(find(args.val_files))
    preflight(args.out, 0)
    # each file is read once before anything is written: what is no text shows now, not after an hour
    for f in tqdm(list(docs), desc='reading', unit='doc', disable=None):
        if not read(f):
            print(f'note: {docs.pop(f)!r} is empty, skipped')
    if not args.val_files:
        # the order is by a hash of each name: another file more or less hardly changes what the rest is for
        order = sorted(docs, key=lambda f: hashlib.sha256(os.fsencode(f'{args.seed}/{docs[f]}')).digest())
        share = args.val or 0.05
        val = set(order if share == 1 else order[:min(max(1, round(share * len(docs))), len(docs) - 1)])
    # each split: files, and which part of each
    splits = dict(train=[], val=[])
    for f in docs:
        splits['val' if f in val else 'train'].append((f, slice(None)))
    if len(docs) == 1 and not args.val_files and args.val != 1:
        (f,) = docs
        cut = last_part(read(f), args.val or 0.1)
        if cut:
            splits = dict(train=[(f, slice(0, cut))], val=[(f, slice(cut, None))])
    if not splits['val'] or not splits['train'] and args.val != 1:
        empty = 'train' if splits['val'] else 'val'
        fail(f'no document is left for {empty} ({len(docs)} in all): give more files, or --val 1 for evaluation only')
    size = dict(train=0, val=0)                      # bytes

    def encode(split):
        for f, part in tqdm(splits[split], desc=split, unit='doc', disable=None):
            text = read(f)[part]
            size[split] += len(text.encode())
            yield encode_document(tokenizer, text, f)
    texts = {split: encode(split) for split in splits}
    source = {split: [docs[f] for f, _ in files] for split, files in splits.items()}
    meta = write_data(args.out, tokenizer, texts, source=source)
    for s, files in splits.items():
        n = meta[s]['tokens']
        print(f'{args.out}/{s}.bin: {n:,} tokens, {len(files):,} documents, the longest {meta[s]["longest"]:,} tokens, '
              f'{size[s] / max(1, n - len(files)):.2f} bytes a token')


if __name__ == '__main__':
    main()
