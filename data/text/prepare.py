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
    found = {}                                       # by real path: a file that is reached twice is one document
    for path in paths:
        path = os.path.expanduser(path)              # make TEXT=~/books: not every shell does it there
        if os.path.isfile(path):
            files = [path]
        elif os.path.isdir(path):
            files = files_inside(path)
        else:
            fail(f'{path}: no such file or folder')
        if not files:
            fail(f'{path}: this folder holds no files')
        above = os.path.dirname(os.path.abspath(path))
        for file in sorted(files):
            found.setdefault(os.path.realpath(file), os.path.relpath(file, above))
    return found


def files_inside(folder):
    def unreadable(e):
        fail(f'{e.filename} cannot be read ({e.strerror})')

    files = []
    for where, subfolders, names in os.walk(folder, onerror=unreadable):
        subfolders[:] = filter(shown, subfolders)    # os.walk goes into those that are left
        for name in filter(shown, names):
            files.append(os.path.join(where, name))
    return files


def shown(name):
    return not name.startswith('.')


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
    The character at which the last `share` of a text begins, moved back to the start of a line if one is within 1,000
    characters. 0 if the text is too short for two parts.
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


def for_validation(docs, seed, share):
    """
    The files that --val takes of `docs`, {file: name}. Their order is by a hash of each name: another file more or less
    hardly changes what the rest is for.
    """
    def draw(file):
        return hashlib.sha256(os.fsencode(f'{seed}/{docs[file]}')).digest()

    n = len(docs)
    if share < 1:
        n = min(max(1, round(share * len(docs))), len(docs) - 1)         # at least one for each split
    return set(sorted(docs, key=draw)[:n])


def main(argv=None):
    args = parse_args(argv)
    tokenizer = get_tokenizer(args.tokenizer)
    docs = find(args.files + args.val_files)
    val = set(find(args.val_files))
    preflight(args.out, 0)
    # each file is read once before anything is written: what is no text shows now, not after an hour
    for file in tqdm(list(docs), desc='reading', unit='doc', disable=None):
        if not read(file):
            print(f'note: {docs.pop(file)!r} is empty, skipped')
    if not args.val_files:
        val = for_validation(docs, args.seed, args.val or 0.05)
    splits = dict(train=[], val=[])                  # of (file, which part of it)
    for file in docs:
        split = 'val' if file in val else 'train'
        splits[split].append((file, slice(None)))
    if len(docs) == 1 and not args.val_files and args.val != 1:
        [file] = docs
        cut = last_part(read(file), args.val or 0.1)
        if cut:
            splits = dict(train=[(file, slice(0, cut))], val=[(file, slice(cut, None))])
    needed = ['val'] if args.val == 1 else ['val', 'train']
    for split in needed:
        if not splits[split]:
            fail(f'no document is left for {split} ({len(docs)} in all): give more files, or --val 1 for evaluation '
                 'only')
    size = dict(train=0, val=0)                      # bytes

    def encode(split):
        for file, part in tqdm(splits[split], desc=split, unit='doc', disable=None):
            text = read(file)[part]
            size[split] += len(text.encode())
            yield encode_document(tokenizer, text, file)

    texts, source = {}, {}
    for split, files in splits.items():
        texts[split] = encode(split)
        source[split] = [docs[file] for file, _ in files]
    meta = write_data(args.out, tokenizer, texts, source=source)
    for split, files in splits.items():
        n = meta[split]['tokens']
        longest = meta[split]['longest']
        per_token = size[split] / max(1, n - len(files))                 # a document's BOS has no bytes
        print(f'{args.out}/{split}.bin: {n:,} tokens, {len(files):,} documents, the longest {longest:,} tokens, '
              f'{per_token:.2f} bytes a token')


if __name__ == '__main__':
    main()
