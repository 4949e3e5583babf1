"""
Token files: DIR holds train.bin, val.bin (flat token ids) and meta.json. Documents and batches cut out of them.
"""
import hashlib
import json
import os
from contextlib import suppress

import numpy as np
import torch

from data.runtime import fail

DOCS_LISTED = 2**20          # a corpus of more documents has no list of them in its meta.json
READ_AT_ONCE = 2**24         # tokens


def write_data(out, tokenizer, splits, source):
    """
    Writes DIR/{train,val}.bin and meta.json, each under a temporary name first and meta.json last.
    splits: {'train': documents, 'val': documents}, each an iterable of arrays of ids, written one by one with
    tokenizer.bos in front of each. Returns the meta, in which `docs` lists where each document begins, or is
    None where they are too many for a list: each begins with BOS, which no text holds.
    """
    dtype = np.uint16 if tokenizer.n_vocab <= 2**16 else np.uint32
    meta = dict(tokenizer=tokenizer.name, tokenizer_fingerprint=tokenizer.fingerprint, vocab_size=tokenizer.n_vocab,
                bos=tokenizer.bos, dtype=np.dtype(dtype).name, source=source)
    files = [f'{split}.bin' for split in splits] + ['meta.json']
    try:
        os.makedirs(out, exist_ok=True)
        for split, docs in splits.items():
            with open(f'{out}/.{split}.bin.tmp', 'wb') as f:
                meta[split] = write_documents(f, docs, tokenizer.bos, dtype)
        with open(f'{out}/.meta.json.tmp', 'w') as f:
            json.dump(meta, f)
        for file in files:
            os.replace(f'{out}/.{file}.tmp', f'{out}/{file}')
    except OSError as e:
        fail(f'--out {out} cannot be written ({e.strerror}): free some space or choose another folder')
    finally:                                         # only after a failure is there anything left to remove
        for file in files:
            with suppress(OSError):
                os.remove(f'{out}/.{file}.tmp')
    return meta


def write_documents(f, docs, bos, dtype):
    """Writes documents one by one to an open file, each with BOS (unless None). Returns their part of the meta."""
    starts, tokens, n_docs, longest, largest_id, sha = [], 0, 0, 0, -1, hashlib.sha256()
    head = np.array([] if bos is None else [bos], dtype)
    for ids in docs:
        ids = np.concatenate((head, np.asarray(ids, dtype)))
        if n_docs < DOCS_LISTED or bos is None:      # without BOS only the list tells where a document begins
            starts.append(tokens)
        tokens += len(ids)
        n_docs += 1
        longest = max(longest, len(ids))
        largest_id = max(largest_id, int(ids.max(initial=0)))
        sha.update(ids.tobytes())
        f.write(ids.tobytes())
    if len(starts) < n_docs:
        starts = None
    return dict(tokens=tokens, sha256=sha.hexdigest(), n_docs=n_docs, longest=longest, largest_id=largest_id,
                docs=starts)


class Tokens:
    """
    A .bin file: its length in tokens, slices of it, and np.asarray of those, which is when they are read. (A memmap
    would end the program with SIGBUS where the file has become shorter.)
    """

    def __init__(self, file, dtype, start, stop, fd=None):
        self.file, self.dtype, self.start, self.stop = file, dtype, start, stop
        self.fd = fd                                 # slices share it
        if fd is None:
            try:
                self.fd = os.open(file, os.O_RDONLY)
            except OSError as e:
                fail(f'{file} cannot be opened ({e.strerror})')

    def __len__(self):
        return self.stop - self.start

    def __getitem__(self, part):
        if not isinstance(part, slice):
            at = range(len(self))[part]
            return np.asarray(self[at:at + 1])[0]
        a, b, _ = part.indices(len(self))
        return Tokens(self.file, self.dtype, self.start + a, self.start + max(a, b), self.fd)

    def __array__(self, dtype=None, copy=None):
        size = len(self) * self.dtype.itemsize
        try:
            read = os.pread(self.fd, size, self.start * self.dtype.itemsize)
        except OSError as e:
            fail(f'{self.file} cannot be read ({e.strerror}); what was saved before is intact', everywhere=True)
        if len(read) < size:
            fail(f'{self.file} has become shorter since it was opened: prepare the data again; '
                 'what was saved before is intact', everywhere=True)
        return np.frombuffer(read, self.dtype).astype(dtype or self.dtype)


def random_vocab(path):
    """'random' or 'random:VOCAB' -> the size of its vocabulary; None for a folder."""
    name, _, vocab = os.fspath(path).partition(':')
    if name != 'random':
        return None
    if vocab and not (vocab.isdigit() and 1 < int(vocab) < 2**31):
        fail(f'--data {path}: random:VOCAB takes a number of tokens, random:50257 for instance')
    return int(vocab or 32000)


def random_data(vocab, split):
    """(tokens, meta) for benchmarks: they cost nothing to read and teach nothing."""
    dtype = np.dtype(np.uint16 if vocab <= 2**16 else np.uint32)
    seed = dict(train=0, val=1)[split]
    data = np.random.default_rng(seed).integers(vocab, size=2**22, dtype=dtype)
    part = dict(tokens=len(data), docs=[0], sha256='random')
    return data, dict(tokenizer='random', dtype=dtype.name, vocab_size=vocab, bos=None, train=part, val=part)


def open_data(path, split):
    """(Tokens, meta), checked as far as that is cheap: size, type, the largest id."""
    vocab = random_vocab(path)
    if vocab:
        return random_data(vocab, split)
    if not os.path.isdir(path):
        fail(f'--data {path} is not a folder; make one with python -m data.passkey.prepare or data.text.prepare')
    try:
        with open(f'{path}/meta.json') as f:
            meta = json.load(f)
        n, dtype, vocab_size = meta[split]['tokens'], np.dtype(meta['dtype']), meta['vocab_size']
        meta['bos'], meta[split]['docs']             # used later: where they are missing, it shows now
    except FileNotFoundError:
        fail(f'{path}/meta.json is missing: make such a folder with python -m data.passkey.prepare, or from text files '
             'with python -m data.text.prepare')
    except (ValueError, KeyError, TypeError) as e:
        fail(f'{path}/meta.json is damaged ({type(e).__name__}: {e}): prepare the data again')
    file = f'{path}/{split}.bin'
    if not os.path.isfile(file):
        fail(f'{file} is missing: prepare the data again')
    size = os.path.getsize(file)
    if size != n * dtype.itemsize:
        fail(f'{file} holds {size:,} bytes, but its meta.json says {n:,} tokens of {dtype.itemsize}: '
             'prepare the data again')
    if n == 0:
        fail(f'{file} is empty: prepare the data again from more text, with --val below 1')
    data = Tokens(file, dtype, 0, n)
    # all of a small file; of one that would take minutes, 64 places
    for i in range(0, n, max(READ_AT_ONCE, n // 64)):
        part = np.asarray(data[i:i + READ_AT_ONCE])
        if part.max() >= vocab_size:
            at = i + int(part.argmax())
            fail(f'{file}: token {at:,} is {int(data[at])}, outside the vocabulary of {vocab_size}: '
                 'prepare the data again')
    return data, meta


def document_starts(data, meta, split):
    """Where each document of a split begins, in order: int64, in tokens."""
    listed = meta[split]['docs']
    if listed is not None:
        return np.array(listed, np.int64)
    # too many for a list: every document begins with BOS, and nothing else is BOS
    found = []
    for i in range(0, len(data), READ_AT_ONCE):
        part = np.asarray(data[i:i + READ_AT_ONCE])
        found.append(i + np.flatnonzero(part == meta['bos']))
    return np.concatenate(found)


def documents(data, meta, split):
    """The documents of a split, in order, as slices (each with its BOS)."""
    starts = document_starts(data, meta, split).tolist()
    ends = starts[1:] + [len(data)]
    return [data[start:end] for start, end in zip(starts, ends)]


def by_length(data, meta, split):
    """The documents of a split from the shortest to the longest: (starts, lengths), int64, in tokens with their BOS."""
    starts = document_starts(data, meta, split)
    lengths = np.diff(starts, append=len(data))
    order = np.argsort(lengths, kind='stable')
    return starts[order], lengths[order]


def row_starts(data, T, docs=None):
    """
    All places where a row of T tokens, and the target of its last one, may begin.
    docs: None for anywhere in the stream; by_length() for the beginning of a document that is longer than the row, but
    not more than twice as long (where there are such): what it is about then lies as often inside a row of any length.
    """
    if docs is None:
        return range(len(data) - T)
    starts, lengths = docs
    longer = np.searchsorted(lengths, T, side='right')
    too_long = np.searchsorted(lengths, 2 * T, side='right')
    if too_long == longer:
        too_long = len(lengths)
    return starts[longer:too_long]


def open_rows(rows, data, meta, split, T, path):
    """
    --rows documents or anywhere -> the `docs` of row_starts(). Ends the program where the split, of the folder `path`,
    has no place for a row of T tokens.
    """
    file = f'{path}/{split}.bin'
    if rows == 'anywhere':
        if len(data) < T + 1:
            fail(f'{file} has {len(data):,} tokens, a row of {T:,} and its last target take {T + 1:,}: '
                 'prepare more text, or lower --length')
        return None
    docs = by_length(data, meta, split)
    starts, lengths = docs
    if lengths[-1] <= T:
        fail(f'--rows documents: the longest document of {file} has {lengths[-1]:,} tokens, a row takes {T + 1:,}: '
             'give --rows anywhere, or lower --length')
    return docs


def spaced_rows(data, T, tokens, docs=None):
    """Where rows of T tokens for an evaluation begin, evenly spaced, always the same: about `tokens` in all."""
    places = row_starts(data, T, docs)
    most = (len(data) - 1) // T                      # rows side by side
    if docs is not None:
        places, most = np.sort(places), len(places)  # one of each document
    n = max(1, min(tokens // T, most))
    return [places[i * (len(places) - 1) // max(1, n - 1)] for i in range(n)]


def describe_rows(rows, why, data, T, docs, bos):
    """The line that says where rows begin, and why there."""
    where = 'anywhere in the text, as they come' if bos is None else 'anywhere in the text, behind a BOS'
    if docs is not None:
        fitting = len(row_starts(data, T, docs))
        where = f'with one of the {fitting:,} documents (of {len(docs[0]):,}) that are longer than {T:,} tokens'
    return f'rows begin {where} (--rows {rows}, {why})'


def get_batch(data, bos, rows, T, seed, step, rank=0, world=1, docs=None):
    """
    The batch of one step, a pure function of (seed, step): `rows` windows drawn for all ranks together, of which this
    rank gets its own. Any number of ranks sees the same global batch, and resuming needs no state.
    Returns idx, targets, int64, (rows / world, T) each; every row begins with `bos` (see anchor), or, with docs (see
    row_starts), with the BOS of its document.
    """
    places = row_starts(data, T, docs)
    drawn = np.random.default_rng((seed, step)).integers(len(places), size=rows)
    mine = [places[i] for i in drawn[rank * rows // world:(rank + 1) * rows // world]]
    if docs is not None:
        bos = None                                   # it is there already
    x = anchor([data[start:start + T + 1] for start in mine], bos)
    return x[:, :-1], x[:, 1:]


def anchor(windows, bos):
    """
    Windows of equal length cut out of a stream -> int64 (B, T). `bos` (unless None) takes the place of the first token
    of each, and so stands before the others, which are all predicted. NoPE can read positions off the attention that
    this one known token still gets (Kazemnejad et al. 2023, theorem 1).
    """
    x = torch.from_numpy(np.stack(windows).astype(np.int64))
    if bos is not None:
        x[:, 0] = bos
    return x
