"""
What the corpora on the Hugging Face hub share: streaming, several tokenizer processes, and going on after a stop.

Documents are read through `datasets` from parquet or jsonl (.gz, .zst) files, on the hub or in a local folder, and
tokenised a shard at a time. DIR/.shards keeps each shard, with where the readers stood after it, until train.bin and
val.bin are complete: the same command goes on after a stop, and ends in the same bytes as without one.
Memory holds a few shards for each process; the disk holds every token twice until the end.
"""
import functools
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from glob import glob
from itertools import zip_longest
from typing import Callable, NamedTuple

import numpy as np
from tqdm import tqdm

from data.checkpoint import lock, preflight
from data.runtime import fail
from data.tokenizer import encode_document, get_tokenizer
from data.tokens import write_data

SHARD = 2**22                                        # characters, about a second of work: what a stop loses a process
tokenizer_of = functools.cache(get_tokenizer)        # one for each process


class Corpus(NamedTuple):
    source: str                                      # a local folder, or a name on the hub
    files: str                                       # which of its files
    text: Callable = lambda row: row['text']         # a row -> the document, or None to leave it out
    columns: tuple = ('text',)                       # all that `text` looks at, and all that is read of a parquet file
    share: float = 1.0                               # of --tokens
    lanes: int = 1                                   # files read in turn, document by document


def flags(p, argv=None):
    """Adds the flags of every corpus to the parser, and parses."""
    p.add_argument('--out', required=True, help='folder for train.bin, val.bin, meta.json')
    p.add_argument('--tokenizer', default='gpt2', help='gpt2 (default), another tiktoken encoding, bytes, or hf:DIR')
    p.add_argument('--workers', type=int, default=os.cpu_count(), help='tokenizer processes (default: one a core)')
    args = p.parse_args(argv)
    if not 0 < args.val <= 1:
        fail(f'--val {args.val} must be above 0, and at most 1')
    for flag, least in dict(workers=1, tokens=1, seed=0).items():
        value = getattr(args, flag)
        if value is not None and value < least:
            fail(f'--{flag} {value} must be at least {least}')
    if args.workers > 1024:
        fail(f'--workers {args.workers} must be at most 1024')
    return args


def find(c, seed):
    """
    Paths or addresses of a corpus's files, sorted, or with a seed in random order. A local folder of another layout
    gives all it has.
    """
    try:
        import datasets  # noqa: F401 (brings what opens hf:// too)
        import fsspec
    except ImportError:
        fail('this corpus is read through the package datasets: pip install datasets')
    local = os.path.isdir(c.source)
    url, patterns = f'hf://datasets/{c.source}', [c.files]
    if local:
        url, patterns = os.path.abspath(c.source), [c.files, '**/*.parquet', '**/*.jsonl*']
    found = []
    try:
        fs, root = fsspec.core.url_to_fs(url)
        for pattern in patterns:
            found = found or sorted(fs.glob(f'{root}/{pattern}'))
    except Exception as e:                           # each version of the hub's client has its own exceptions
        fail(f'{c.source} is no folder here, and the hub cannot give it ({reason(e)}): check network and name, '
             'or name a local copy')
    if not found and local:
        fail(f'{c.source} has no files {c.files}, nor *.parquet or *.jsonl')
    if not found:
        fail(f'{c.source} has no files {c.files}: it has moved; name another one or a local copy')
    if seed is not None:
        order = np.random.default_rng(seed).permutation(len(found))
        found = [found[i] for i in order]
    if not local:
        found = [fs.unstrip_protocol(file) for file in found]
    return found


def reason(e):
    return f'{type(e).__name__}: {str(e).strip().partition(chr(10))[0][:200]}'


def read(c, files, states):
    """Yields (texts, states): a shard's documents, and where each lane stands after them. Goes on from `states`."""
    import datasets
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    parquet = files[0].endswith('.parquet')
    # lines of json are parsed here: fields that nobody reads may have another form on every line
    kind = dict(path='text')
    if parquet:
        kind = dict(path='parquet', columns=list(c.columns))
    texts, n = [], 0
    try:
        lanes = []
        for i in range(min(c.lanes, len(files))):
            of_lane = files[i::c.lanes]
            lanes.append(datasets.load_dataset(**kind, data_files=of_lane, split='train', streaming=True))
        for lane, state in zip(lanes, states or []):
            lane.load_state_dict(state)
        for rows in zip_longest(*lanes):
            for row in filter(None, rows):           # None: a lane that has ended
                if not parquet:
                    row = json.loads(row['text'])
                text = c.text(row)
                if text:
                    texts.append(text)
                    n += len(text)
            if n >= SHARD:
                yield texts, states_of(lanes)
                texts, n = [], 0
        if texts:
            yield texts, states_of(lanes)
    except Exception as e:
        fail(f'{c.source} cannot be read ({reason(e)}): it needs the fields {" and ".join(c.columns)}, and where it is '
             'gated `hf auth login`; after a lost connection the same command goes on from here')


def states_of(lanes):
    return [lane.state_dict() for lane in lanes]


def follow():
    """A worker leaves Ctrl-C to the main process, and ends with it, even where that is killed."""
    def end_with_it():
        multiprocessing.parent_process().join()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_it, daemon=True).start()


def encode(file, tokenizer, val, texts, states):
    """
    In a process of its own: writes a shard, its documents' ids one after another, where each ends, and which are for
    validation.
    """
    tokenizer = tokenizer_of(tokenizer)
    docs, for_validation = [], []
    for text in texts:
        in_bytes = text.encode(errors='replace')     # half of a surrogate pair is no text
        text = in_bytes.decode()
        # a hash of the text decides, so that no document is in both splits, nor a copy of it
        number = int.from_bytes(hashlib.sha256(in_bytes).digest()[:6], 'big')
        for_validation.append(number < val * 2**48)
        name = f'the document of {len(text):,} characters that begins with {text.lstrip()[:60]!r}'
        docs.append(np.array(encode_document(tokenizer, text, name), np.min_scalar_type(tokenizer.n_vocab)))
    with open(f'{file}.tmp', 'wb') as f:
        ends = np.cumsum([len(doc) for doc in docs])
        np.savez(f, ids=np.concatenate(docs), ends=ends, val=for_validation, states=json.dumps(states))
        f.flush()
        os.fsync(f.fileno())
    os.replace(f'{file}.tmp', file)
    return file


def shards(c, files, folder, args, pool):
    """
    Yields the file of shard after shard, in order: those of an earlier run, then new ones, at most two ahead for each
    process.
    """
    k, states, waiting = 0, None, deque()
    while os.path.exists(f'{folder}/{k:06d}.npz'):
        yield f'{folder}/{k:06d}.npz'
        k += 1
    if k:
        with np.load(f'{folder}/{k - 1:06d}.npz') as shard:
            states = json.loads(str(shard['states']))
    for texts, states in read(c, files, states):
        waiting.append(pool.submit(encode, f'{folder}/{k:06d}.npz', args.tokenizer, args.val, texts, states))
        k += 1
        if len(waiting) > 2 * args.workers:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def documents_of(files):
    """(ids, split) of each document, shard after shard."""
    for file in files:
        with np.load(file) as shard:
            ids, ends, val = shard['ids'], shard['ends'].tolist(), shard['val']
        start = 0
        for end, for_validation in zip(ends, val):
            yield ids[start:end], 'val' if for_validation else 'train'
            start = end


def prepare(args, corpora):
    """
    Writes args.out from {name: Corpus}, one after another: batches are drawn from the whole of train.bin, so their
    order does not matter, and the shares hold to a document. args.tokens counts train.bin (val.bin where args.val is
    1; None: all there is); val.bin gets the documents for validation that come among these.
    """
    tokenizer = tokenizer_of(args.tokenizer)
    counted = 'val' if args.val == 1 else 'train'
    files = {name: find(c, args.seed) for name, c in corpora.items()}
    # every token twice, less what a run before this one has written
    written = sum(map(os.path.getsize, glob(f'{args.out}/.shards/*/*') + glob(f'{args.out}/.*.tmp')))
    preflight(args.out, 2 * (args.tokens or 0) * np.min_scalar_type(tokenizer.n_vocab).itemsize - written)
    folders = {}
    for name, c in corpora.items():
        # shards of other flags or files are of no use: they have another folder
        key = repr((name, args.tokenizer, args.val, files[name]))
        folders[name] = f'{args.out}/.shards/{hashlib.sha256(key.encode()).hexdigest()[:16]}'
        os.makedirs(folders[name], exist_ok=True)
        here = len(glob(f'{folders[name]}/*.npz'))
        print(f'{name}: {len(files[name])} files from {c.source}, {here} shards are here already')
    sizes = {}                                       # of each corpus: the tokens that each split gets from it

    def documents(split):
        for name, c in corpora.items():
            want = (args.tokens or np.inf) * c.share
            n = sizes[name] = dict(train=0, val=0)
            for ids, of in documents_of(shards(c, files[name], folders[name], args, pool)):
                size = len(ids) + (tokenizer.bos is not None)
                n[of] += size
                if of == split == counted:
                    bar.update(size)
                if of == split:
                    yield ids
                if n[counted] >= want:
                    break
            if n[counted] < want < np.inf:
                fail(f'{c.source} ends after {n[counted]:,} of {want:,.0f} tokens: '
                     'the same command with a lower --tokens uses these')
        if not sum(n[split] for n in sizes.values()):
            fail(f'no document for {split}.bin: give more --tokens or another --val')

    # spawned, not forked: `datasets` and arrow have threads
    spawn = multiprocessing.get_context('spawn')
    pool = ProcessPoolExecutor(max_workers=args.workers, mp_context=spawn, initializer=follow)
    splits = dict(train=documents('train'), val=documents('val'))
    if args.val == 1:
        splits['train'] = []
    try:
        with lock(f'{args.out}/.shards'), tqdm(total=args.tokens, unit=' tokens', unit_scale=True, disable=None) as bar:
            meta = write_data(args.out, tokenizer, splits, source=dict(files=files, tokens=sizes))
    except KeyboardInterrupt:
        fail('stopped (Ctrl-C); the same command goes on from here')
    except BrokenProcessPool:
        fail('stopped (a tokenizer process was killed: try fewer --workers); the same command goes on from here')
    finally:
        pool.shutdown(cancel_futures=True)
    shutil.rmtree(f'{args.out}/.shards')
    for split in splits:
        n = meta[split]['tokens']
        said = f'{n:,} tokens, {meta[split]["n_docs"]:,} documents, the longest {meta[split]["longest"]:,} tokens'
        if len(sizes) > 1:
            for name, size in sizes.items():
                said += f', {size[split] / max(1, n):.4%} {name}'
        print(f'{args.out}/{split}.bin: {said}')
