"""
What the scripts share: tokenizers by name, .bin files, batches, checkpoints, device and precision, ranks.

Whatever a user can get wrong ends in fail(): one line that says what to do, exit code 2.
"""
import argparse
import csv
import hashlib
import json
import os
import shutil
import sys
import tempfile
import warnings
import zipfile
from contextlib import nullcontext, suppress
from datetime import timedelta
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel

from model import GPT, GPTConfig, init_std


def fail(message, everywhere=False):
    """
    Ends the program with one line and exit code 2. Under torchrun all processes find the same fault, so one of each node
    speaks; everywhere: only this one may have found it, so it speaks whichever it is.
    """
    if everywhere or os.environ.get('LOCAL_RANK', '0') == '0':
        print(f'error: {message}', file=sys.stderr, flush=True)
    finish(2)
    sys.exit(2)


def parser(doc):
    """An argparse.ArgumentParser that shows the docstring as it is and takes no abbreviations; a wrong flag costs one line."""
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.error = lambda message: fail(f'{message} (--help lists the flags)')

    def parse_args():
        args = argparse.ArgumentParser.parse_args(p)
        for a in p._actions:
            if a.nargs is None and getattr(args, a.dest, None) == []:    # what argparse makes of --flag=-- before Python 3.13
                p.error(f'--{a.dest} needs a value')
        return args
    p.parse_args = parse_args
    return p


# ---------------------------------------------------------------------------------------------------------------------
# ranks, device, precision

def explain(kind, e, trace):
    """sys.excepthook: what does not fit in memory, and a process that has lost the others, costs one line as well."""
    first = (str(e).splitlines() or [''])[0]
    if issubclass(kind, torch.OutOfMemoryError) or 'not enough memory' in first:
        print(f'error: out of memory: lower --micro_batch (eval_passkey.py --batch_tokens) or --length, or give --activation_checkpointing. {first}', file=sys.stderr, flush=True)
    elif issubclass(kind, dist.DistError) or 'gloo' in first:
        print(f'error: rank {os.environ.get("RANK")} lost another process, which has ended or not answered in time; start again, train.py with --resume. {first}', file=sys.stderr, flush=True)
    else:
        sys.__excepthook__(kind, e, trace)
    finish(1)


def setup(args):
    """
    Reads torchrun's environment and args.device, args.dtype, args.seed. Returns a namespace: rank, world, master,
    device, dtype ('fp32' or 'bf16'), autocast() and print(), which only rank 0 hears. Prints what was chosen and why.
    """
    if not 0 <= args.seed < 2**63:
        fail(f'--seed {args.seed} must lie between 0 and 2^63')
    rank, world, local = (int(os.environ.get(k, d)) for k, d in (('RANK', 0), ('WORLD_SIZE', 1), ('LOCAL_RANK', 0)))
    kind = args.device.split(':')[0]
    if kind == 'auto':
        kind = 'cuda' if torch.cuda.is_available() else 'cpu'
    if kind not in ('cpu', 'cuda'):
        fail(f'--device {args.device} is unknown: auto, cpu, cuda or cuda:N')
    device = kind
    if kind == 'cuda':
        if not torch.cuda.is_available():
            fail('--device cuda: this torch finds no GPU. Use --device cpu, or install a CUDA build of torch')
        index, n = args.device.split(':')[1] if ':' in args.device else str(local), torch.cuda.device_count()
        if int(os.environ.get('LOCAL_WORLD_SIZE', 1)) > (1 if ':' in args.device else n):
            fail(f'--device {args.device}: one GPU for each process of a node, and this one has {n}: lower --nproc_per_node, or give --device cuda')
        if not index.isdigit() or int(index) >= n:
            fail(f'--device cuda:{index}: there are {n} GPUs, numbered from 0')
        device = f'cuda:{index}'
        torch.cuda.set_device(device)
    sys.excepthook = explain
    if world > 1 and not dist.is_initialized():
        wait = timedelta(seconds=getattr(args, 'timeout', 600))
        store = next(dist.rendezvous('env://', rank, world, timeout=wait))[0]
        if os.environ.get('TORCHELASTIC_USE_AGENT_STORE') == 'True':     # torchrun's own: after --max-restarts it still has the addresses of processes that are gone
            store = dist.PrefixStore(f'attempt_{os.environ["TORCHELASTIC_RESTART_COUNT"]}', store)
        dist.init_process_group('nccl' if kind == 'cuda' else 'gloo', store=store, rank=rank, world_size=world, timeout=wait, **({'device_id': torch.device(device)} if kind == 'cuda' else {}))
        sys.excepthook = explain                     # it had put its own before it
    torch.manual_seed(args.seed)
    dtype, reason = pick_dtype(args.dtype, kind)
    amp = (lambda: torch.autocast(kind, torch.bfloat16)) if dtype == 'bf16' else nullcontext
    say = print if rank == 0 else (lambda *a, **k: None)
    say(f'device {device} x {world}, {dtype} ({reason}), torch {torch.__version__}')
    return SimpleNamespace(rank=rank, world=world, master=rank == 0, device=device, dtype=dtype, autocast=amp, print=say)


def pick_dtype(asked, kind):
    """'auto', 'bf16' or 'fp32' -> (dtype, reason). bf16 only where the hardware multiplies in it."""
    if kind == 'cuda':
        has, unit = torch.cuda.is_bf16_supported(including_emulation=False), torch.cuda.get_device_name()
    else:
        # private names, so absent is a possible answer
        has = any(getattr(torch.cpu, f'_is_{x}_supported', bool)() for x in ('avx512_bf16', 'amx_tile'))
        unit = 'the CPU'
    if asked == 'fp32':
        return 'fp32', 'as asked'
    if has:
        return 'bf16', f'{unit} multiplies in it' if asked == 'auto' else 'as asked'
    if asked == 'bf16':
        print(f'warning: --dtype bf16, but {unit} has no bf16 arithmetic; using fp32', file=sys.stderr)
    return 'fp32', f'{unit} has no bf16 arithmetic'


def compiled(model, args, env):
    """torch.compile where --compile asks for it, by default on GPU; it needs a compiler of the system."""
    gpu = 'cuda' in env.device
    if not (gpu if args.compile is None else args.compile):
        return model
    need = [os.environ['CC']] if gpu and 'CC' in os.environ else ['gcc', 'clang'] if gpu else [os.environ.get('CXX', 'g++')]
    if not any(map(shutil.which, need)):
        if args.compile:
            fail(f'--compile needs {" or ".join(need)}: install one, or leave the flag out')
        env.print(f'not compiled: {" or ".join(need)} is not installed')
        return model
    torch._dynamo.config.recompile_limit = 64        # --min_length makes a shape of every halving
    return torch.compile(model, dynamic=False)


def check_fused(model, length, env):
    """Says what a bias on every score costs, and where attention of this model, precision and device would fall back to whole T x T scores without a word."""
    c, scores = model.config, f'{4 * model.config.n_head * length ** 2 / 1e6:,.0f} MB'
    if c.pe in ('t5', 'alibi'):
        env.print(f'{c.pe} adds a bias to every score: {scores} at length {length:,}')
    x = torch.zeros(1, min(length, 128, c.block_size), dtype=torch.long, device=env.device)
    try:
        with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]), env.autocast(), warnings.catch_warnings():
            warnings.simplefilter('ignore')
            model(x, x)
    except RuntimeError as e:
        if 'No available kernel' not in str(e):
            raise
        env.print(f'warning: no fused kernel takes this attention (pe={c.pe}, heads of {c.n_embd // c.n_head}, {env.dtype}, {env.device}): it is slower, '
                  f'and each row of {length:,} tokens holds {scores} of scores a layer')


def finish(code=0):
    """Where there are other processes, this one ends here: threads that gloo leaves behind may abort it on the long way out."""
    if dist.is_initialized():
        if not code:
            dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


# ---------------------------------------------------------------------------------------------------------------------
# tokenizers

class Tokenizer:
    """encode(text) -> ids, decode(ids) -> text, n_vocab, bos (the id that begins a document, or None), eos (that ends one), name."""

    def __init__(self, name, n_vocab, bos, encode, decode, eos=None):
        self.name, self.n_vocab, self.bos, self.encode, self.decode = name, n_vocab, bos, encode, decode
        self.eos = bos if eos is None else eos


def get_tokenizer(name):
    """
    'bytes', 'passkey' (the synthetic corpus's words), a tiktoken encoding ('gpt2', 'cl100k_base', ...) or 'hf:DIR'.
    Text is only ever text: a special token's name inside a document stays the characters that it is written in.
    """
    if name == 'bytes':
        return Tokenizer(name, 257, 256, lambda s: list(s.encode()),
                         lambda ids: bytes(i for i in ids if i < 256).decode(errors='replace'))
    if name == 'passkey':
        from data.passkey.prepare import get_encoding
        enc = get_encoding()

        def encode(s):
            ids = enc.encode_ordinary(s)
            if enc.decode(ids) != s:                 # words outside the pattern are skipped silently
                seen = enc.decode(ids)
                at = next((i for i, (a, b) in enumerate(zip(s, seen)) if a != b), min(len(s), len(seen)))
                fail(f'the passkey vocabulary of {enc.n_vocab} words has none for {s[at:at + 20].split(chr(10))[0]!r}')
            return ids
        return Tokenizer(name, enc.n_vocab, enc.eot_token, encode, enc.decode)
    if name.startswith('hf:'):
        try:
            from transformers import AutoTokenizer
        except ImportError:
            fail('tokenizer hf:DIR needs transformers: pip install transformers')
        if not os.path.isdir(name[3:]):
            fail(f'tokenizer {name}: {name[3:]} is not a folder')
        try:
            tok = AutoTokenizer.from_pretrained(name[3:], local_files_only=True)
        except (OSError, ValueError) as e:
            fail(f'tokenizer {name}: {str(e).splitlines()[0]}')
        bos = tok.bos_token_id if tok.bos_token_id is not None else tok.eos_token_id
        return Tokenizer(name, len(tok), bos, lambda s: tok.encode(s, add_special_tokens=False, split_special_tokens=True), tok.decode, tok.eos_token_id)
    import tiktoken
    if name not in tiktoken.list_encoding_names():
        fail(f'tokenizer {name!r} is unknown: bytes, passkey, hf:DIR or one of {" ".join(tiktoken.list_encoding_names())}')
    try:
        enc = tiktoken.get_encoding(name)
    except Exception as e:                           # whatever its downloader raises without a network
        fail(f'tokenizer {name} could not be loaded ({type(e).__name__}): tiktoken downloads it once; without a network set '
             'TIKTOKEN_CACHE_DIR to a folder that holds it, or use bytes')
    return Tokenizer(name, enc.n_vocab, enc.eot_token, lambda s: enc.encode_ordinary(s),
                     lambda ids: enc.decode([i for i in ids if i < enc.n_vocab]))        # an untrained model may say a padded one


# ---------------------------------------------------------------------------------------------------------------------
# data: DIR holds train.bin, val.bin (flat token ids) and meta.json

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


# ---------------------------------------------------------------------------------------------------------------------
# checkpoints

def save_checkpoint(path, ckpt):
    """
    All or nothing: written beside, flushed to the disk, then renamed; the one before stays as *.prev.pt.
    Ends with one line if the disk is full or the folder cannot be written; the old checkpoint is still there then.
    """
    tmp = os.path.join(os.path.dirname(path), '.' + os.path.basename(path) + '.tmp')
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(tmp, 'wb') as f:
            torch.save(ckpt, f)
            f.flush()
            os.fsync(f.fileno())
        if os.path.exists(path):
            os.replace(path, path.removesuffix('.pt') + '.prev.pt')
        os.replace(tmp, path)
    except (OSError, RuntimeError) as e:             # torch's writer reports a full disk as a RuntimeError
        with suppress(OSError):                      # half a file would go on filling the disk
            os.remove(tmp)
        fail(f'could not save {path} ({str(e).partition(chr(10))[0]}): free some space or choose another --out; what was saved before is intact')


def find_checkpoint(path):
    """A checkpoint file, or a run's folder -> the file that holds the last complete save, or None."""
    path = os.fspath(path)
    if not os.path.isdir(path):
        return path if os.path.exists(path) else None
    # a kill between the two renames of a save leaves the previous one only
    return next((p for p in (f'{path}/ckpt.pt', f'{path}/ckpt.prev.pt') if os.path.exists(p)), None)


def load_checkpoint(path):
    """The dict that save_checkpoint wrote, on the CPU. A damaged, foreign or unsafe file is refused in one line."""
    file = find_checkpoint(path)
    if file is None:
        inside = ', '.join(sorted(f for f in os.listdir(path) if not f.startswith('.'))[:8]) if os.path.isdir(path) else ''
        fail(f'no checkpoint at {path}' + (f' (it holds {inside})' if inside else '') + ': train one with train.py --out')
    prev = file.removesuffix('.pt') + '.prev.pt'
    other = f'; the one before is {prev}' if os.path.exists(prev) and prev != file else ''
    try:
        with zipfile.ZipFile(file) as z:             # torch.load does not look at the checksums
            # a folder's mark in the directory makes torch leave the tensor unread, without a word
            bad = z.testzip() or next((i.filename for i in z.infolist() if i.external_attr & 0x10), None)
        if bad:
            fail(f'{file} is damaged (checksum of {bad}): restore it or train again{other}')
        ckpt = torch.load(file, map_location='cpu', weights_only=True)
    except Exception as e:                           # every kind of damage has its own exception
        unsafe = 'weights_only' in str(e).lower() or 'Unsupported' in str(e)
        what = 'would run code when loaded' if unsafe else f'is not a whole checkpoint ({type(e).__name__})'
        fail(f'{file} {what}: restore it or train again{other}')
    keys = ('model', 'config', 'optimizer', 'step', 'tokens', 'seed', 'args', 'fingerprint', 'tokenizer')
    lacks = [k for k in keys if k not in ckpt] if isinstance(ckpt, dict) else keys
    if lacks:
        fail(f'{file} is not a checkpoint of train.py or extend.py: it lacks {", ".join(lacks)}{other}')
    return ckpt


def fingerprint(path):
    """Of a checkpoint's contents: the checksums that its file carries."""
    with zipfile.ZipFile(find_checkpoint(path)) as z:
        return hashlib.sha256(str([(i.filename.partition('/')[2], i.CRC) for i in z.infolist()]).encode()).hexdigest()


def load_model(ckpt, **override):
    """The GPT of a checkpoint, with config fields overridden (pe, block_size, ...). Names what does not fit."""
    try:
        with torch.device('meta'):                   # shapes only: the weights are the checkpoint's
            model = GPT(GPTConfig(**{**ckpt['config'], **override}))
    except (TypeError, ValueError) as e:
        fail(f'the checkpoint\'s configuration does not fit: {e}')
    have, want = ckpt['model'], model.state_dict()
    # a position table comes and goes with pe; everything else must be there, in the same shape
    diff = [k for k in want if k not in have and not k.startswith('pos_')] + [k for k in have if k not in want and not k.startswith('pos_')]
    diff += [f'{k} {tuple(have[k].shape)} for {tuple(want[k].shape)}' for k in want if k in have and have[k].shape != want[k].shape]
    if diff:
        fail(f'the checkpoint\'s weights do not fit its configuration: {", ".join(diff[:4])}{" ..." if len(diff) > 4 else ""}')
    # the tensors themselves, so that they are held once; but those of a converted one may be in half precision, or the head one with the embedding
    tied = 'lm_head.weight' in have and have['lm_head.weight'].data_ptr() == have['embed.weight'].data_ptr()
    own = {k: have[k].detach().to(want[k].dtype, copy=tied and k == 'lm_head.weight') for k in want if k in have}
    for k in want.keys() - own.keys():               # the table of a position encoding that the checkpoint has not
        own[k] = torch.nn.init.normal_(torch.empty(want[k].shape), std=init_std(model.config, k))
    model.load_state_dict(own, assign=True)
    return model


def frozen(model, env):
    """
    The model on its device, where nothing of it learns (but, later, temperatures). In bf16 its matrices are kept as
    autocast would cast them at every use: the same numbers from half the memory.
    """
    for m in model.eval().requires_grad_(False).modules():
        if isinstance(m, torch.nn.Linear) and env.dtype == 'bf16':
            m.to(torch.bfloat16)
    return model.to(env.device)


def padded(n):
    """Rows of a head for a vocabulary of n: a multiple of 64, as tensor cores like it, where that adds little. No token has the rows that are added."""
    return n if n < 4096 else (n + 63) // 64 * 64


def check_fits(config, meta, data_path, lengths=(), tokenizer=None):
    """
    The data's vocabulary is the model's, and the lengths lie inside a learned table. A model may have more rows than its tokenizer
    has tokens: one of Hugging Face any number, one of ours those of padded(), which other tokenizers may share.
    """
    n = meta['vocab_size']
    same = config.vocab_size == n or config.vocab_size == padded(n) and tokenizer in (None, meta['tokenizer']) or n < config.vocab_size and meta['tokenizer'].startswith('hf:')
    if not same:
        fail(f'{data_path} has a vocabulary of {meta["vocab_size"]} ({meta["tokenizer"]}), the model one of {config.vocab_size}: use data of the tokenizer that it was trained with')
    if config.pe == 'learned' and max(lengths, default=0) > config.block_size:
        fail(f'pe=learned has a table of {config.block_size} positions: lengths up to there, not {max(lengths)}')


def memory(model, tokens, trained, args, env):
    """
    Bytes that a CPU needs at the least beside the weights: where they are `trained`, their gradients and the
    moments of the optimizer; and what each block keeps of `tokens` tokens for the backward pass, or with activation checkpointing, what enters it.
    """
    c, n, at = model.config, sum(p.numel() for p in model.parameters()), 2 if env.dtype == 'bf16' else 4
    C, kv, inner = c.n_embd, c.n_kv_head * c.n_embd // c.n_head, c.n_inner
    kept = 5 * C + 2 * kv + 3 * inner + (3 * C + kv + inner) * trained           # a token's norms, q, k, v, attention, SwiGLU
    return (12 if trained and args.optimizer == 'adamw' else 8 * trained) * n + at * tokens * (kept + c.n_layer * C if args.activation_checkpointing else kept * c.n_layer)


def preflight(out, need_bytes, need_memory=0):
    """Before long work: the folder can be written and has room for need_bytes, and need_memory bytes are free (on Linux, which tells)."""
    try:
        os.makedirs(out, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):        # a name of its own: all ranks come here at once
            pass
    except OSError as e:
        fail(f'--out {out} cannot be written ({e.strerror}): choose another folder')
    free = shutil.disk_usage(out).free
    if free < need_bytes:
        fail(f'--out {out}: {free / 1e9:.2f} GB free, this will take up to {need_bytes / 1e9:.2f} GB: free some space or choose another folder')
    need_memory *= int(os.environ.get('LOCAL_WORLD_SIZE', 1))
    if need_memory and os.path.exists('/proc/meminfo'):
        free = next(int(line.split()[1]) * 1024 for line in open('/proc/meminfo') if line.startswith('MemAvailable'))
        if free < need_memory:
            fail(f'{free / 1e9:.1f} GB of memory are free, this will take at least {need_memory / 1e9:.1f} GB: lower --micro_batch or --length, give --activation_checkpointing, '
                 'or take a smaller model')


def lock(out):
    """Keeps a second run out of the folder while this one lives; the operating system drops it when we end. Keep the result."""
    import fcntl
    f = open(f'{out}/.lock', 'w')
    try:
        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f'another run is writing to {out}: wait for it, or choose another --out')
    except OSError as e:
        print(f'warning: {out} cannot be locked on this file system ({e.strerror}): start no second run there', file=sys.stderr)
    return f


# ---------------------------------------------------------------------------------------------------------------------
# lengths, file names and figures of the evaluations

def pyplot(file):
    """matplotlib.pyplot, drawing to files; fails if it is not installed or FILE cannot be a figure."""
    try:
        import matplotlib
    except ImportError:
        fail('--plot needs matplotlib: pip install matplotlib')
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    if os.path.splitext(file)[1][1:] not in plt.figure().canvas.get_supported_filetypes() or not os.path.isdir(os.path.dirname(file) or '.'):
        fail(f'--plot {file}: a file name like figure.png, in a folder that exists')
    plt.close('all')
    return plt


def write_csv(file, rows):
    """rows: dicts with the same keys."""
    def write(f):
        w = csv.DictWriter(f, rows[0])
        w.writeheader()
        w.writerows(rows)
    write_result(file, write)


def write_json(file, value):
    write_result(file, lambda f: json.dump(value, f))


def write_result(file, write):
    """write(f) fills it; whole or not at all, and one line if it cannot be written."""
    try:
        with open(f'{file}.tmp', 'w', newline='') as f:
            write(f)
        os.replace(f'{file}.tmp', file)
    except OSError as e:
        with suppress(OSError):
            os.remove(f'{file}.tmp')
        fail(f'{file} cannot be written ({e.strerror}): free some space or choose another --out; what was written before is intact')


def read_csv(file):
    """-> its rows as dicts of text; none if there is no such file."""
    if not os.path.exists(file):
        return []
    with open(file, newline='') as f:
        return list(csv.DictReader(f))


def read_json(file):
    """-> its value, or None if there is no such file or it is damaged."""
    try:
        with open(file) as f:
            return json.load(f)
    except (OSError, ValueError):
        return None


def int_list(text):
    """'256,512' -> [256, 512]; argparse turns the ValueError into its error line."""
    return [int(x) for x in text.split(',')]


def default_lengths(config):
    """1/2 1 1.5 2 3 4 6 8 times the training length, as far as the encoding is defined."""
    return [n for n in (int(config.block_size * s) for s in (0.5, 1, 1.5, 2, 3, 4, 6, 8)) if config.pe != 'learned' or n <= config.block_size]


def stem(path):
    """The name that results of a checkpoint go under: out/nope -> ckpt, out/nope/head-1024.pt -> head-1024."""
    return os.path.basename(find_checkpoint(path)).removesuffix('.pt').removesuffix('.prev')
