"""
Checkpoints: saved whole or not at all, checked when they are read; the lock and the free space of a run's folder.
"""
import hashlib
import math
import os
import shutil
import sys
import tempfile
import zipfile
from contextlib import suppress

import torch

from data.runtime import fail
from data.tokenizer import get_tokenizer
from model import GPT, GPTConfig, init_std

KEYS = ('model', 'config', 'optimizer', 'step', 'tokens', 'seed', 'args', 'fingerprint', 'tokenizer')


def save_checkpoint(path, ckpt):
    """
    A kill loses nothing: written beside, flushed to the disk, then renamed; the one before stays as *.prev.pt.
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
        reason = str(e).partition('\n')[0]
        fail(f'could not save {path} ({reason}): free some space or choose another --out; '
             'what was saved before is intact')


def find_checkpoint(path):
    """A checkpoint file, or a run's folder -> the file that holds the last complete save, or None."""
    path = os.fspath(path)
    if not os.path.isdir(path):
        return path if os.path.exists(path) else None
    # a kill between the two renames of a save leaves only ckpt.prev.pt
    for file in f'{path}/ckpt.pt', f'{path}/ckpt.prev.pt':
        if os.path.exists(file):
            return file
    return None


def load_checkpoint(path):
    """The dict that save_checkpoint wrote, on the CPU. A damaged, foreign or unsafe file is refused in one line."""
    file = find_checkpoint(path)
    if file is None:
        refuse_missing(os.fspath(path))
    if file.endswith(('.safetensors', '.gguf')):
        fail(f'{file} is no checkpoint of train.py or extend.py: python -m data.hf.convert makes one of its folder')
    other = ''
    prev = file.removesuffix('.pt') + '.prev.pt'
    if os.path.exists(prev):
        other = f'; the one before is {prev}'

    try:
        bad = damaged_entry(file)
        if bad:
            fail(f'{file} is damaged (checksum of {bad}): restore it or train again{other}')
        ckpt = torch.load(file, map_location='cpu', weights_only=True)
    except Exception as e:                           # every kind of damage has its own exception
        what = f'is not a whole checkpoint ({type(e).__name__})'
        if 'weights_only' in str(e).lower() or 'Unsupported' in str(e):
            what = 'would run code when loaded'
        fail(f'{file} {what}: restore it or train again{other}')

    missing = KEYS
    if isinstance(ckpt, dict):
        missing = [key for key in KEYS if key not in ckpt]
    if missing:
        fail(f'{file} is not a checkpoint of train.py or extend.py: it lacks {", ".join(missing)}{other}')
    kept = os.path.join(os.path.dirname(os.path.abspath(file)), 'tokenizer')         # see keep_files()
    if ckpt['tokenizer'].startswith('hf:') and os.path.isdir(kept):
        ckpt['tokenizer'] = f'hf:{kept}'
    return ckpt


def refuse_missing(path):
    """Ends the program: there is no checkpoint at this path. Says what is there instead, and what to do."""
    inside = ''
    if os.path.isdir(path):
        files = sorted(os.listdir(path))
        if 'config.json' in files:
            fail(f'{path} is a Hugging Face folder: python -m data.hf.convert {path} out/NAME/ckpt.pt makes a '
                 'checkpoint of it')
        shown = [file for file in files if not file.startswith('.')]
        if shown:
            inside = f' (it holds {", ".join(shown[:8])})'
    before = path.removesuffix('.pt') + '.prev.pt'
    if os.path.exists(before):
        fail(f'no checkpoint at {path}: a save was cut short; the one before is {before}')
    fail(f'no checkpoint at {path}{inside}: train one with train.py --out, or convert one with data.hf.convert')


def damaged_entry(file):
    """The name of an entry of the file that is not what was saved, or None."""
    with zipfile.ZipFile(file) as z:
        bad = z.testzip()                            # torch.load does not look at the checksums
        if bad:
            return bad
        for entry in z.infolist():
            if entry.external_attr & 0x10:           # marked as a folder: torch would silently leave the tensor unread
                return entry.filename
    return None


def fingerprint(path):
    """Of a checkpoint's contents: the checksums that its file carries."""
    with zipfile.ZipFile(find_checkpoint(path)) as z:
        # an entry's name without the folder, which is named after the file
        checksums = [(entry.filename.partition('/')[2], entry.CRC) for entry in z.infolist()]
    return hashlib.sha256(str(checksums).encode()).hexdigest()


def stem(path):
    """The name that results of a checkpoint go under: out/nope -> ckpt, out/nope/head-1024.pt -> head-1024."""
    return os.path.basename(find_checkpoint(path)).removesuffix('.pt').removesuffix('.prev')


def load_model(ckpt, **override):
    """
    The GPT of a checkpoint, with config fields overridden (pe, block_size, ...). Names what does not fit. Temperatures
    and frequencies were found for the encoding that it had: with another one they are those of training.
    """
    config = {**ckpt['config'], **override}
    other_pe = config['pe'] != ckpt['config']['pe']
    if other_pe:
        config.update(rope_inv_freq=None, rope_start=0)
    law = ckpt['config'].get('law', 'length')
    if other_pe and law != 'ssmax':                  # its slopes are weights, and stay
        config.update(dict(law='length', law_at=0) | override)
    try:
        with torch.device('meta'):                   # shapes only: the weights are the checkpoint's
            model = GPT(GPTConfig(**config))
    except (TypeError, ValueError) as e:
        fail(f'the checkpoint\'s configuration does not fit: {e}')
    have, want = ckpt['model'], model.state_dict()
    optional = ('pos_',)                             # tables come and go with pe, gains with qk_norm
    if config.get('qk_norm') != ckpt['config'].get('qk_norm'):
        optional += ('q_norm', 'k_norm')
    check_names_and_shapes(have, want, optional)
    for name, tensor in have.items():
        check_finite_weight(name, tensor, 'the checkpoint')

    # the checkpoint's tensors themselves, so that memory holds them once. Those of a converted one may be in half
    # precision, or the head's may be the embedding's although they learn apart
    shared = 'lm_head.weight' in have and have['lm_head.weight'].data_ptr() == have['embed.weight'].data_ptr()
    weights = {}
    for name, shape in want.items():
        if name in have:
            weights[name] = have[name].detach().to(shape.dtype, copy=shared and name == 'lm_head.weight')
        elif 'k_norm' in name or 'q_norm' in name:
            weights[name] = torch.ones(shape.shape)
        else:                                        # the table of a position encoding that the checkpoint lacks
            weights[name] = torch.nn.init.normal_(torch.empty(shape.shape), std=init_std(model.config, name))
    model.load_state_dict(weights, assign=True)
    if model.config.tie_embeddings:                  # assigning has given each a parameter of its own
        model.lm_head.weight = model.embed.weight
    if model.config.law != law or other_pe and law != 'ssmax':
        model.reset_temperatures()
    return model


def check_names_and_shapes(have, want, optional):
    """Ends the program where a weight of only one of the two state dicts is none of the optional, or shapes differ."""
    differs = []
    for name in sorted(have.keys() | want.keys()):
        if name not in have or name not in want:
            if not any(part in name for part in optional):
                differs.append(name)
        elif have[name].shape != want[name].shape:
            differs.append(f'{name} {tuple(have[name].shape)} for {tuple(want[name].shape)}')
    if len(differs) > 4:
        differs = differs[:3] + [f'{differs[3]} ...']
    if differs:
        fail(f'the checkpoint\'s weights do not fit its configuration: {", ".join(differs)}')


def check_finite_weight(name, tensor, where):
    """A model with one infinite weight would answer every prompt wrongly, and look like one that fails at length."""
    if not tensor.isfinite().all():
        fail(f'{where}: weight {name} holds numbers that are not finite: restore it, or make it again')


def frozen(model, env):
    """
    The model on its device, where none of its weights learns. In bf16 its matrices are kept as autocast would cast them
    at every use: the same numbers from half the memory.
    """
    model.eval().requires_grad_(False)
    if env.dtype == 'bf16':
        if model.config.tie_embeddings:              # autocast casts the head, but looks up in fp32
            model.lm_head.weight = torch.nn.Parameter(model.embed.weight.clone(), requires_grad=False)
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.to(torch.bfloat16)
    return model.to(env.device)


def padded(n):
    """
    Rows of a head for a vocabulary of n: a multiple of 64, as tensor cores like it, where that adds little. No token
    has the rows that are added.
    """
    return n if n < 4096 else (n + 63) // 64 * 64


def check_fits(config, meta, data_path, lengths=(), ckpt=None):
    """
    Ends the program where the data's vocabulary is not the model's, or a length lies outside a learned table. ckpt: the
    checkpoint that the model comes from; its tokenizer and the data's must agree word by word. The model may have more
    rows than its tokenizer has tokens: those of padded() if it was trained here, any number if it came from Hugging
    Face. It may have fewer if the data uses none of the missing ids. meta: of data, or of a tokenizer alone, whose ids
    check_ids() sees as they come.
    """
    n = meta['vocab_size']
    made_with = ckpt and ckpt['tokenizer']
    known = ckpt and ckpt.get('tokenizer_fingerprint')
    found = meta.get('tokenizer_fingerprint')        # checkpoints and data of older versions have none
    same = known and known == found
    ours = config.vocab_size == padded(n) and made_with in (None, meta['tokenizer'])
    hugging_face = config.vocab_size > n and meta['tokenizer'].startswith('hf:')
    splits = [meta[split] for split in ('train', 'val') if split in meta]
    largest = max([split.get('largest_id', math.inf) for split in splits], default=-1)
    if same and config.vocab_size <= largest < n:
        fail(f'{data_path} holds token {largest}, but the model has rows for {config.vocab_size} only: its tokenizer '
             'has tokens that were added to it; prepare text that does not use them')
    all_have_rows = same and largest < config.vocab_size
    if config.vocab_size != n and not ours and not hugging_face and not all_have_rows:
        fail(f'{data_path} has a vocabulary of {n} ({meta["tokenizer"]}), the model one of {config.vocab_size}: '
             'use data of the tokenizer that it was trained with')
    if known and found and known != found:
        fail(f'{data_path} goes by another tokenizer ({meta["tokenizer"]}) than the model knows ({made_with}), '
             'with other ids: use data of the tokenizer that it was trained with')
    if config.pe == 'learned' and max(lengths, default=0) > config.block_size:
        fail(f'pe=learned has a table of {config.block_size} positions: lengths up to there, not {max(lengths)}')


def open_tokenizer(ckpt, config, name=None, lengths=()):
    """
    The tokenizer of a checkpoint, checked against its model: the one of `name`, else the folder tokenizer/ beside the
    checkpoint, else the one that its data was made with, where that lay.
    """
    tok = get_tokenizer(name or ckpt['tokenizer'])
    meta = dict(vocab_size=tok.n_vocab, tokenizer=tok.name, tokenizer_fingerprint=tok.fingerprint)
    check_fits(config, meta, 'the text', lengths, ckpt)
    return tok


def check_ids(ids, config, tokenizer):
    """Ends the program where a text has become a token that the model has no row for: one that was added later."""
    largest = max(ids)
    if largest >= config.vocab_size:
        fail(f'the text holds {tokenizer.decode([largest])!r}, token {largest} of its tokenizer, but the model has '
             f'rows for {config.vocab_size} only: leave it out', everywhere=True)


def preflight(out, need_bytes, need_memory=0):
    """Before long work: ends the program where `out` cannot be written, or bytes lack on the disk or in memory."""
    try:
        os.makedirs(out, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):        # a name of its own: all ranks come here at once
            pass
    except OSError as e:
        fail(f'--out {out} cannot be written ({e.strerror}): choose another folder')
    free = shutil.disk_usage(out).free
    if free < need_bytes:
        fail(f'--out {out}: {free / 1e9:.2f} GB free, this will take up to {need_bytes / 1e9:.2f} GB: '
             'free some space or choose another folder')
    need_memory *= int(os.environ.get('LOCAL_WORLD_SIZE', 1))
    free = free_memory()
    if free is not None and free < need_memory:
        fail(f'{free / 1e9:.1f} GB of memory are free, this will take at least {need_memory / 1e9:.1f} GB: '
             'lower --micro_batch or --length, give --activation_checkpointing, or take a smaller model')


def free_memory():
    """Bytes that programs can still get, where the system tells (Linux); otherwise None."""
    try:
        with open('/proc/meminfo') as f:
            for line in f:
                if line.startswith('MemAvailable'):
                    return int(line.split()[1]) * 1024           # in KiB
    except OSError:
        pass
    return None


def lock(out):
    """Keeps a second run out of the folder as long as the returned file is open; it closes when the program ends."""
    import fcntl
    f = open(f'{out}/.lock', 'w')                    # noqa: SIM115 (it stays open)
    try:
        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f'another run is writing to {out}: wait for it, or choose another --out')
    except OSError as e:
        print(f'warning: {out} cannot be locked on this file system ({e.strerror}): start no second run there',
              file=sys.stderr)
    return f
