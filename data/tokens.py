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

DOCS_LISTED = 2**20


def write_data(out, tokenizer, splits, source):
    """
    Writes DIR/{train,val}.bin and meta.json, each under a temporary name first and meta.json last.
    splits: {'train': documents, 'val': documents}, each an iterable of arrays of ids, written one by one with
    tokenizer.bos in front of each. Returns the meta, in which `docs` lists where each document begins, or is
    None where they are too many for a list: each begins with BOS, which no text holds.
    """
    dtype = np.uint16 if tokenizer.n_vocab <= 2**16 else np.uint32
    meta = dict(tokenizer=tokenizer.name, vocab_size=tokenizer.n_vocab, bos=tokenizer.bos, dtype=np.dtype(dtype).name, source=source)
    files = [f'{split}.bin' for split in splits] + ['meta.json']
    try:
        os.makedirs(out, exist_ok=True)
        for split, docs in splits.items():
            starts, n, n_docs, longest, sha = [], 0, 0, 0, hashlib.sha256()
            with open(f'{out}/.{split}.bin.tmp', 'wb') as f:
                for ids in docs:
                    head = [] if tokenizer.bos is None else [tokenizer.bos]
                    ids = np.concatenate((np.array(head, dtype), np.asarray(ids, dtype)))
                    if n_docs < DOCS_LISTED or tokenizer.bos is None:
                        starts.append(n)
                    n, n_docs, longest = n + len(ids), n_docs + 1, max(longest, len(ids))
                    sha.update(ids.tobytes())
                    f.write(ids.tobytes())
            meta[split] = dict(tokens=n, sha256=sha.hexdigest(), n_docs=n_docs, longest=longest, docs=starts if len(starts) == n_docs else None)
        with open(f'{out}/.meta.json.tmp', 'w') as f:
            json.dump(meta, f)
        for file in files:
            os.replace(f'{out}/.{file}.tmp', f'{out}/{file}')
    except OSError as e:
        fail(f'--out {out} cannot be written ({e.strerror}): free some space or choose another folder')
    finally:                                         # nothing is there any more but after a failure
        for file in files:
            with suppress(OSError):
                os.remove(f'{out}/.{file}.tmp')
    return meta


class Tokens:
    """
    A .bin file: its length in tokens, slices of it, and np.asarray of those, which is when they are read. (A memmap would
    end us with SIGBUS where the file has become shorter.)
    """

    def __init__(self, file, dtype, start, stop, fd=None):
        self.file, self.dtype, self.start, self.stop = file, dtype, start, stop
        try:
            self.fd = os.open(file, os.O_RDONLY) if fd is None else fd
        except OSError as e:
            fail(f'{file} cannot be opened ({e.strerror})')

    def __len__(self):
        return self.stop - self.start

    def __getitem__(self, part):
        if not isinstance(part, slice):
            return np.asarray(self[range(len(self))[part]:][:1])[0]
        a, b, _ = part.indices(len(self))
        return Tokens(self.file, self.dtype, self.start + a, self.start + max(a, b), self.fd)

    def __array__(self, dtype=None, copy=None):
        size = len(self) * self.dtype.itemsize
        try:
            read = os.pread(self.fd, size, self.start * self.dtype.itemsize)
        except OSError as e:
            fail(f'{self.file} cannot be read ({e.strerror}); what was saved before is intact', everywhere=True)
        if len(read) < size:
            fail(f'{self.file} has become shorter since it was opened: prepare the data again; what was saved before is intact', everywhere=True)
        return np.frombuffer(read, self.dtype).astype(dtype or self.dtype)


def random_vocab(path):
    """'random' or 'random:VOCAB' -> the size of its vocabulary; None for a folder."""
    name, _, vocab = os.fspath(path).partition(':')
    if name != 'random':
        return None
    if vocab and not (vocab.isdigit() and 1 < int(vocab) < 2**31):
        fail(f'--data {path}: random:VOCAB takes a number of tokens, random:50257 for instance')
    return int(vocab or 32000)


def open_data(path, split):
    """(Tokens, meta), checked as far as that is cheap: size, type, the largest id."""
    if vocab := random_vocab(path):                  # for benchmarks: tokens that cost nothing to read and teach nothing
        data = np.random.default_rng(split == 'val').integers(vocab, size=2**22, dtype=np.uint16 if vocab <= 2**16 else np.uint32)
        return data, dict(tokenizer='random', dtype=data.dtype.name, vocab_size=vocab, bos=None, **{s: dict(tokens=len(data), docs=[0], sha256='random') for s in ('train', 'val')})
    if not os.path.isdir(path):
        fail(f'--data {path} is not a folder; make one with python -m data.passkey.prepare or data.text.prepare')
    try:
        with open(f'{path}/meta.json') as f:
            meta = json.load(f)
        n, dtype, vocab_size = meta[split]['tokens'], np.dtype(meta['dtype']), meta['vocab_size']
        meta['bos'], meta[split]['docs']             # used later: missing shows now
    except FileNotFoundError:
        fail(f'{path}/meta.json is missing: prepare the data again')
    except (ValueError, KeyError, TypeError) as e:
        fail(f'{path}/meta.json is damaged ({type(e).__name__}: {e}): prepare the data again')
    file = f'{path}/{split}.bin'
    if not os.path.isfile(file):
        fail(f'{file} is missing: prepare the data again')
    if os.path.getsize(file) != n * dtype.itemsize:
        fail(f'{file} holds {os.path.getsize(file):,} bytes, but its meta.json says {n:,} tokens of {dtype.itemsize}: prepare the data again')
    if n == 0:
        fail(f'{file} is empty: prepare the data again from more text')
    data = Tokens(file, dtype, 0, n)
    for i in range(0, n, max(2**24, n // 64)):       # all of a small file; of one that would take minutes, 64 places
        part = np.asarray(data[i:i + 2**24])
        if part.max() >= vocab_size:
            at = i + int(part.argmax())
            fail(f'{file}: token {at:,} is {int(data[at])}, outside the vocabulary of {vocab_size}: prepare the data again')
    return data, meta


def documents(data, meta, split):
    """The documents of a split, in order, as slices (each with its BOS)."""
    starts = meta[split]['docs']
    if starts is None:
        starts = [i + int(j) for i in range(0, len(data), 2**24) for j in np.flatnonzero(np.asarray(data[i:i + 2**24]) == meta['bos'])]
    starts = starts + [len(data)]
    return [data[a:b] for a, b in zip(starts, starts[1:])]


def get_batch(data, bos, rows, T, seed, step, rank=0, world=1):
    """
    The batch of one step, a pure function of (seed, step): `rows` windows drawn for all ranks together, of which this
    rank gets its own. Any number of ranks sees the same global batch, and resuming needs no state.
    Returns idx, targets, int64, (rows / world, T) each; every row begins with `bos` (see anchor).
    """
    start = np.random.default_rng((seed, step)).integers(len(data) - T, size=rows)[rank * rows // world:(rank + 1) * rows // world]
    x = anchor([data[i:i + T + 1] for i in start], bos)
    return x[:, :-1], x[:, 1:]


def anchor(windows, bos):
    """
    Windows of equal length cut out of a stream -> int64 (B, T), the first token of each replaced by `bos` (unless None).
    NoPE can read positions off the attention that this one known token still gets (Kazemnejad et al. 2023, theorem 1).
    """
    x = torch.from_numpy(np.stack(windows).astype(np.int64))
    if bos is not None:
        x[:, 0] = bos
    return x
