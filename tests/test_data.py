"""What data preparation, batches, checkpoints and a run's folder promise, and what damage to them costs: one line."""
import errno
import importlib
import json
import multiprocessing
import os
import re
import sys
import tempfile
import time
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import tiktoken
import torch

from data import io
from data.passkey import prepare as passkey
from data.text import prepare as text
from model import GPT, GPTConfig


@pytest.fixture
def refused(capsys):
    """`with refused(*words):` the block ends with exit code 2 and one line `error: ...` on stderr that holds the words."""
    @contextmanager
    def check(*words):
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            yield
        line = capsys.readouterr().err
        assert end.value.code == 2 and line.startswith('error: ') and line.count('\n') == 1, line
        assert all(str(w) in line for w in words), line
    return check


@pytest.fixture
def run(monkeypatch):
    """run(main, *flags): a prepare script, as from the command line."""
    def call(main, *flags):
        monkeypatch.setattr('sys.argv', ['prepare', *map(str, flags)])
        main()
    return call


# --- tokenizers and the synthetic corpus

def test_passkey_words(refused):
    tok = io.get_tokenizer('passkey')
    template = passkey.TASK + ''.join(passkey.GARBAGE) + passkey.INFO.format(key=71432) + passkey.QUESTION + passkey.ANSWER.format(key=90817)
    words = passkey.WORD.findall(template) + [f' {w}' for w in [*passkey.NAMES, *passkey.PLACES, *passkey.THINGS, *passkey.COLOURS, *'0123456789']]
    assert tok.decode(tok.encode(template)) == template and all(len(tok.encode(w)) == 1 for w in words)
    for ids in passkey.generate(20_000, 0.5, 25, 1):
        assert tok.encode(tok.decode(ids)) == list(ids) and tok.bos not in ids
    for s in 'The sky is mauve.', 'Eve', ' The  sky', 'The sky!', '<|endoftext|>':
        with refused('passkey vocabulary'):
            tok.encode(s)


cache = os.environ.get('TIKTOKEN_CACHE_DIR', os.path.join(tempfile.gettempdir(), 'data-gym-cache'))
# gpt2's two files, as tiktoken's cache names them: the SHA-1 of their addresses
cached = all(os.path.exists(f'{cache}/{f}') for f in ('6c7ea1a7e38e3a7f062df639a5b80947f075ffe6', '6d1cbeee0f20b3d9449abfede4726ed8212e3aee'))


@pytest.mark.parametrize('name', ['bytes', 'tiny', pytest.param('gpt2', marks=pytest.mark.skipif(not cached, reason='gpt2 is not in the cache'))])
def test_special_tokens_in_a_document_stay_text(name, monkeypatch):
    if name == 'tiny':                               # single bytes, in the place of an encoding that is downloaded
        enc = tiktoken.Encoding('tiny', pat_str=r'(?s:.)', mergeable_ranks={bytes([i]): i for i in range(256)}, special_tokens={'<|endoftext|>': 256})
        monkeypatch.setattr(tiktoken, 'list_encoding_names', lambda: ['tiny'])
        monkeypatch.setattr(tiktoken, 'get_encoding', lambda name: enc)
    tok, s = io.get_tokenizer(name), 'a<|endoftext|>é\r\n\0 <s> <|im_start|>'
    ids = tok.encode(s)
    assert tok.decode(ids) == s and tok.bos not in ids and max(ids) < tok.n_vocab


@pytest.fixture(scope='module')
def corpus():
    return [passkey.get_encoding().decode(d) for d in passkey.generate(500_000, 0.7, 25, (0, 0))]


def test_corpus_is_what_was_asked_for(corpus):
    ids = list(passkey.generate(500_000, 0.7, 25, (0, 0)))
    lens = [len(d) for d in ids]
    assert [passkey.get_encoding().decode(d) for d in ids] == corpus     # the seed alone decides
    assert list(passkey.generate(50_000, 0.7, 25, (0, 1)))[:5] != ids[:5]
    assert 64 <= min(lens) < 80 and 3500 < max(lens) <= 4096 and 500_000 <= sum(lens) + len(lens) < 500_000 + 4097
    share = np.mean([s.startswith('There is an important info') for s in corpus])
    assert abs(share - 0.7) < 4 * (0.7 * 0.3 / len(corpus)) ** 0.5


def test_key_is_told_once_and_every_answer_is_it(corpus):
    documents, answers = [s for s in corpus if s.startswith('There is')], 0
    for s in documents:
        told = re.findall(re.escape(passkey.INFO).replace(r'\{key\}', r'(\d{5})'), s)
        assert len(told) == 1 and told[0][0] == told[0][1], f'told {len(told)} times in {len(s)} characters'
        before, *asked = s.split(passkey.QUESTION)
        assert 'Remember' in before                  # told before it is asked for
        # the end of the document may cut the last answer
        assert all(a.startswith(f' {told[0][0]}.') for a in asked[:-1]) and all(f' {told[0][0]}.'.startswith(a[:7]) for a in asked[-1:])
        answers += len(asked)
    assert answers > 10 * len(documents)


def test_stories_contradict_nothing(corpus):
    for fact in passkey.FACTS:
        again = 0
        for s in corpus:
            facts = re.findall(re.sub(r'\\{\w+\\}', r'(\\w+)', re.escape(fact)), s)    # (subject, value)
            assert len(dict(facts)) == len(set(facts))
            again += len(facts) - len(set(facts))
        assert again > 1000


def test_passkey_prepare(run, refused, tmp_path):
    run(passkey.main, '--out', tmp_path, '--tokens', 5000)
    train, val = (io.open_data(tmp_path, s)[0] for s in ('train', 'val'))
    assert len(train) >= 5000 and not np.array_equal(train[:64], val[:64])
    for flags in (('--retrieval', 1.5), ('--retrieval', 'nan'), ('--tokens', 0), ('--seed', -1), ('--gap', 0), ('--gap', 'nan')):
        with refused(flags[0]):
            run(passkey.main, '--out', tmp_path, '--tokens', 100, *flags)


# --- files

@pytest.mark.parametrize('n_vocab, dtype', [(2**16, np.uint16), (2**16 + 1, np.uint32)])
def test_write_and_open(n_vocab, dtype, tmp_path, refused):
    tok = io.Tokenizer('fake', n_vocab, n_vocab - 1, None, None)
    docs = {'train': [[1, 2, n_vocab - 2], [], range(1000)], 'val': [[n_vocab - 2]]}
    meta = io.write_data(tmp_path, tok, {s: iter(d) for s, d in docs.items()}, source='here')
    for split in docs:
        data, opened = io.open_data(tmp_path, split)
        assert opened == meta and data.dtype == dtype and meta['source'] == 'here'
        assert [list(d) for d in io.documents(data, meta, split)] == [[n_vocab - 1, *d] for d in docs[split]]

    def stopped():
        yield [7, 7]
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        io.write_data(tmp_path, tok, {'train': stopped(), 'val': [[3]]}, 'again')
    assert io.open_data(tmp_path, 'train')[1] == meta    # what was there still is
    with refused('train.bin'):
        io.write_data(tmp_path / 'train.bin', tok, docs, '')


def test_documents_that_are_too_many_for_a_list(tmp_path, monkeypatch):
    docs = [[3, 1, 4], [], [1, 5], [9, 2, 6, 5]]
    for listed in 10, 2:
        monkeypatch.setattr(io, 'DOCS_LISTED', listed)
        meta = io.write_data(tmp_path, io.Tokenizer('fake', 100, 99, None, None), dict(train=docs, val=docs[:1]), '')
        assert (meta['train']['docs'] is None) == (listed == 2) and meta['train']['n_docs'] == 4 and meta['train']['longest'] == 5 and meta['val']['docs'] == [0]
        data, meta = io.open_data(tmp_path, 'train')
        assert [list(d) for d in io.documents(data, meta, 'train')] == [[99, *d] for d in docs]


def test_text_prepare(run, refused, tmp_path, capsys):
    books = {f'books/{"ab"[i % 2]}/{i}.txt': f'book {i}\r\n<|endoftext|> é\n' * (i + 1) for i in range(20)}
    for name, s in {**books, 'books/.git/x': 'no', 'books/.hidden': 'no', 'books/empty.txt': ''}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(s.encode())
    tok, B, out = io.get_tokenizer('bytes'), tmp_path / 'books', tmp_path / 'out'

    def val(*flags):                                 # every document comes back whole, once, under its name; returns those of val
        run(text.main, B, B / 'a', '--out', out, *flags)
        said, meta, names = capsys.readouterr().out, json.loads((out / 'meta.json').read_text()), {}
        for split in 'train', 'val':
            data, names[split] = np.fromfile(out / f'{split}.bin', meta['dtype']), meta['source'][split]
            docs = io.documents(data, meta, split)
            assert [tok.decode(d) for d in docs] == [books[n] for n in names[split]] and all(d[0] == tok.bos for d in docs)
            longest = max(map(len, docs), default=0)
            assert f'{split}.bin: {len(data):,} tokens, {len(docs)} documents, the longest {longest:,} tokens, {bool(docs):.2f} bytes' in said
        assert sorted(names['train'] + names['val']) == sorted(books) and "'books/empty.txt' is empty" in said
        return names['val']
    assert len(val('--val', 0.25)) == 5 and len(val('--val', 0.001)) == 1 and len(val('--val', 0.999)) == 19
    assert val('--seed', 1, '--val', 0.25) != val('--val', 0.25) == val('--seed', 0, '--val', 0.25)
    assert val('--val_files', B / 'b', B / 'a/0.txt') == ['books/a/0.txt'] + [n for n in sorted(books) if '/b/' in n]
    assert len(val('--val', 1)) == 20 and len(io.open_data(out, 'val')[0]) and io.open_data(out, 'val')[1]['train']['tokens'] == 0
    before = (out / 'meta.json').read_bytes()
    (tmp_path / 'latin.txt').write_bytes(b'caf\xe9')
    (tmp_path / 'link.txt').symlink_to('nowhere')
    (tmp_path / 'none').mkdir()
    for flags, words in (([B / 'x'], ['books/x', 'no such file']), ([tmp_path / 'none'], ['none', 'no files']), ([B, '--val_files', B / 'x'], ['books/x']),
                         ([tmp_path / 'latin.txt'], ['latin.txt', 'byte 3']), ([tmp_path], ['latin.txt']), ([tmp_path / 'link.txt'], ['link.txt']),
                         ([B / 'empty.txt'], ['for val', '0 in all']), ([B / 'a/0.txt'], ['for val', '1 in all']), ([B, '--val_files', B], ['for train']),
                         ([B, '--val', 0], ['--val']), ([B, '--val', 'nan'], ['--val']), ([B, '--tokenizer', 'gpt5'], ['gpt5', 'bytes']),
                         ([B, '--tokenizer', 'hf:none'], ['hf:']), ([tmp_path, '--out', tmp_path / 'latin.txt'], ['--out'])):
        with refused(*words):
            run(text.main, '--out', out, *flags)
    assert (out / 'meta.json').read_bytes() == before


def edit(file, change):
    return lambda folder: (folder / file).write_bytes(change((folder / file).read_bytes()))


def drop(*keys):
    def change(content):
        meta = json.loads(content)
        del (meta[keys[0]] if len(keys) > 1 else meta)[keys[-1]]
        return json.dumps(meta).encode()
    return edit('meta.json', change)


DAMAGE = dict(
    folder=(lambda d: d.rename(f'{d}2'), 'not a folder'), meta=(lambda d: (d / 'meta.json').unlink(), 'meta.json is missing'),
    cut=(edit('meta.json', lambda b: b[:-9]), 'meta.json is damaged'), no_json=(edit('meta.json', lambda b: b'\xff\xfe'), 'meta.json is damaged'),
    array=(edit('meta.json', lambda b: b'[]'), 'meta.json is damaged'), split=(drop('train'), 'meta.json is damaged'), tokens=(drop('train', 'tokens'), 'damaged'),
    docs=(drop('train', 'docs'), 'meta.json is damaged'), dtype=(drop('dtype'), 'meta.json is damaged'), vocab=(drop('vocab_size'), 'meta.json is damaged'), bos=(drop('bos'), 'meta.json is damaged'),
    bin=(lambda d: (d / 'train.bin').unlink(), 'train.bin is missing'), half=(edit('train.bin', lambda b: b[:80]), 'train.bin holds 80 bytes'),
    odd=(edit('train.bin', lambda b: b[:-1]), 'train.bin holds 183 bytes'), empty=(edit('train.bin', lambda b: b''), 'train.bin holds 0 bytes'),
    outside=(edit('train.bin', lambda b: b[:140] + b'\x64\0' + b[142:]), 'token 70 is 100'))


@pytest.mark.parametrize('damage, words', DAMAGE.values(), ids=DAMAGE)
def test_damaged_data_costs_one_line(damage, words, tmp_path, refused):
    io.write_data(tmp_path / 'data', io.Tokenizer('fake', 100, 99, None, None), {'train': [[5] * 50, range(40)], 'val': []}, '')
    with refused('val.bin is empty'):
        io.open_data(tmp_path / 'data', 'val')
    assert len(io.open_data(tmp_path / 'data', 'train')[0]) == 92
    damage(tmp_path / 'data')
    with refused(words):
        io.open_data(tmp_path / 'data', 'train')


def test_batch_is_a_function_of_seed_and_step():
    data = np.arange(1000, dtype=np.uint16)
    x, y = io.get_batch(data, 999, 8, 16, seed=3, step=7)
    assert x.dtype == y.dtype == torch.int64 and x.shape == y.shape == (8, 16)
    assert (x[:, 0] == 999).all() and torch.equal(x[:, 1:], y[:, :-1]) and torch.equal(y, y[:, :1] + torch.arange(16))
    np.random.seed(0), torch.manual_seed(0)          # no other state counts
    assert torch.equal(io.get_batch(data, 999, 8, 16, 3, 7)[1], y)
    assert not torch.equal(io.get_batch(data, 999, 8, 16, 3, 8)[1], y) and not torch.equal(io.get_batch(data, 999, 8, 16, 4, 7)[1], y)
    for world in 2, 4:
        for i, whole in enumerate((x, y)):
            assert torch.equal(torch.cat([io.get_batch(data, 999, 8, 16, 3, 7, r, world)[i] for r in range(world)]), whole)
    plain, after = io.get_batch(data, None, 8, 16, 3, 7)                 # a tokenizer without BOS: the text itself
    assert torch.equal(after, y) and torch.equal(plain, y - 1)
    seen = torch.cat([torch.stack(io.get_batch(data[:20], None, 4, 16, 0, step)) for step in range(20)])
    assert seen.min() == 0 and seen.max() == 19 and data[0] == 0         # the first and the last token are reached


# --- checkpoints

SHAPE = dict(block_size=8, vocab_size=17, n_layer=1, n_head=2, n_kv_head=1, n_embd=8, n_inner=12)


def checkpoint(step=1, **shape):
    """What train.py saves, of a very small model after one update."""
    torch.manual_seed(step)
    model = GPT(GPTConfig(**SHAPE, **shape))
    opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    x = torch.randint(17, (2, 8))
    model(x, x)[1].backward()
    opt.step()
    return dict(model=model.state_dict(), config=asdict(model.config), optimizer=[opt.state_dict()], step=step, tokens=16, seed=1,
                args=dict(lr=1e-3, init_from=None), fingerprint='0' * 64, tokenizer='bytes', extended=None)


def same(a, b):
    """Equal bit for bit, through dicts and lists."""
    if torch.is_tensor(a):
        return torch.is_tensor(b) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    return len(a) == len(b) and all(map(same, a, b)) if isinstance(a, list) else a == b


@pytest.fixture
def out(tmp_path):
    """A run's folder with the checkpoint of step 1."""
    io.save_checkpoint(f'{tmp_path}/out/ckpt.pt', checkpoint(1))
    return f'{tmp_path}/out'


def test_checkpoint_round_trip(out):
    one, two = checkpoint(1), checkpoint(2)
    assert same(io.load_checkpoint(out), one) and not same(one, two) and os.listdir(out) == ['ckpt.pt']
    io.save_checkpoint(f'{out}/ckpt.pt', two)
    assert same(io.load_checkpoint(out), two) and same(io.load_checkpoint(f'{out}/ckpt.prev.pt'), one)
    io.save_checkpoint(f'{out}/ckpt.pt', one)
    assert same(torch.load(f'{out}/ckpt.pt', weights_only=True), one) and same(io.load_checkpoint(f'{out}/ckpt.prev.pt'), two)
    assert sorted(os.listdir(out)) == ['ckpt.prev.pt', 'ckpt.pt']
    assert same(dict(io.load_model(two).state_dict()), dict(two['model']))


def test_a_kill_between_the_renames_costs_nothing(out, monkeypatch):
    rename = os.replace

    def killed(a, b):
        if b.endswith('/ckpt.pt'):
            raise KeyboardInterrupt
        rename(a, b)
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(os, 'replace', killed)
        io.save_checkpoint(f'{out}/ckpt.pt', checkpoint(2))
    assert io.find_checkpoint(out) == f'{out}/ckpt.prev.pt' and same(io.load_checkpoint(out), checkpoint(1))
    io.save_checkpoint(f'{out}/ckpt.pt', checkpoint(3))
    assert io.load_checkpoint(out)['step'] == 3


@pytest.mark.parametrize('error', [OSError(errno.ENOSPC, 'No space left on device'), RuntimeError('PytorchStreamWriter failed\nat ...'), RuntimeError()])
def test_a_failing_save_keeps_the_old_one(error, out, monkeypatch, refused):
    def full(ckpt, f):
        f.write(b'half of it')
        raise error
    monkeypatch.setattr(torch, 'save', full)
    with refused('ckpt.pt', 'intact', *str(error).splitlines()[:1]):
        io.save_checkpoint(f'{out}/ckpt.pt', checkpoint(2))
    assert os.listdir(out) == ['ckpt.pt'] and same(io.load_checkpoint(out), checkpoint(1))   # and no half file fills the disk


def test_one_flipped_byte_is_found_or_harmless(out, capsys):
    file, want, found = f'{out}/ckpt.pt', checkpoint(1), 0
    good = np.fromfile(file, np.uint8)
    flips = [(at, 0x41) for at in (*np.linspace(0, len(good) - 1, 60, dtype=int), *range(len(good) - 400, len(good), 20))]
    # in zip's directory, the bit that makes an entry a folder: torch then leaves the tensor unread, and no checksum knows
    flips += [(m.start() + 38, 0x10) for m in re.finditer(b'PK\x01\x02', good.tobytes())]
    for at, bits in flips:
        bad = good.copy()
        bad[at] ^= bits
        bad.tofile(file)
        try:
            assert same(io.load_checkpoint(file), want), f'byte {at} of {len(good)}'
        except SystemExit as end:
            line = capsys.readouterr().err
            assert end.code == 2 and line.startswith(f'error: {file}') and 'restore it or train again' in line and line.count('\n') == 1
            found += 1
    assert 40 < found < len(flips)                   # in the padding it is harmless


def test_what_is_no_checkpoint_costs_one_line(out, refused, tmp_path):
    with refused('no checkpoint', tmp_path / 'none'):
        io.load_checkpoint(f'{tmp_path}/none')
    with refused('no checkpoint', 'holds out'):
        io.load_checkpoint(str(tmp_path))
    io.save_checkpoint(f'{out}/ckpt.pt', checkpoint(2))
    with open(f'{out}/ckpt.pt', 'rb') as f:
        good = f.read()
    lfs = b'version https://git-lfs.github.com/spec/v1\noid sha256:' + b'0' * 64 + b'\nsize 4400000000\n'
    for content in *(good[:n] for n in np.linspace(0, len(good) - 1, 20, dtype=int)), b'some text\n' * 1000, lfs:
        with open(f'{out}/ckpt.pt', 'wb') as f:
            f.write(content)
        with refused('ckpt.pt', 'restore it or train again', 'the one before is', 'ckpt.prev.pt'):
            io.load_checkpoint(out)
    for foreign in {'model': {}}, {'state_dict': {}, 'config': {}}, [1], torch.zeros(2):
        torch.save(foreign, f'{out}/ckpt.pt')
        with refused('ckpt.pt', 'lacks', 'optimizer'):
            io.load_checkpoint(out)


@pytest.mark.parametrize('zipped', [True, False])
def test_a_checkpoint_runs_no_code(zipped, out, refused):
    class Trap:
        def __reduce__(self):
            return open, (f'{out}/ran', 'w')
    torch.save({**checkpoint(), 'extended': Trap()}, f'{out}/ckpt.pt', _use_new_zipfile_serialization=zipped)
    with refused('ckpt.pt', 'would run code' if zipped else 'not a whole checkpoint'):
        io.load_checkpoint(out)
    assert not os.path.exists(f'{out}/ran')
    torch.load(f'{out}/ckpt.pt', weights_only=False)
    assert os.path.exists(f'{out}/ran')              # it was a trap


def test_what_does_not_fit_is_named(refused):
    ckpt = checkpoint()
    for words, change in ((['embed.weight (17, 8) for (19, 8)', 'lm_head.weight'], dict(vocab_size=19)), (['blocks.1.'], dict(n_layer=2)),
                          (['alibaba'], dict(pe='alibaba')), (['n_heads'], dict(n_heads=2))):
        with refused(*words):
            io.load_model(ckpt, **change)
    with refused('_orig_mod.x'):
        io.load_model({**ckpt, 'model': {**ckpt['model'], '_orig_mod.x': torch.zeros(2)}})
    assert io.load_model(ckpt, pe='learned').pos_embed.weight.shape == (8, 8)    # a position table comes
    assert not hasattr(io.load_model(checkpoint(pe='learned'), pe='nope'), 'pos_embed')      # and goes
    with refused('257', 'words', '17'):
        io.check_fits(GPTConfig(**SHAPE), dict(vocab_size=257, tokenizer='words'), 'data')
    io.check_fits(GPTConfig(**SHAPE), dict(vocab_size=16, tokenizer='hf:dir'), 'data')          # padded past its tokenizer
    for pe, n in ('nope', 800), ('learned', 8), ('learned', 9):
        with refused('learned', '8 positions', '9') if n == 9 else nullcontext():
            io.check_fits(GPTConfig(**SHAPE, pe=pe), dict(vocab_size=17, tokenizer='words'), 'data', [4, n])


# --- a run's folder

def test_preflight(tmp_path, refused, monkeypatch):
    with ThreadPoolExecutor(8) as pool:              # as the ranks of a node do, all at once
        list(pool.map(lambda _: io.preflight(f'{tmp_path}/new/run', 1000), range(2000)))
    assert os.listdir(tmp_path / 'new/run') == []
    (tmp_path / 'file').touch()
    for path in 'file', 'file/run':
        with refused('--out', path, 'cannot be written'):
            io.preflight(f'{tmp_path}/{path}', 0)
    monkeypatch.setattr('shutil.disk_usage', lambda path: namedtuple('usage', 'total used free')(10**10, 9 * 10**9, 10**9))
    io.preflight(tmp_path, 10**9)
    with refused('--out', '1.00 GB free', '2.00 GB'):
        io.preflight(tmp_path, 2 * 10**9)


def test_a_missing_package_is_named(monkeypatch, refused):
    monkeypatch.setitem(sys.modules, 'lm_eval', None)
    monkeypatch.delitem(sys.modules, 'data.hf.harness', raising=False)
    with refused('lm-evaluation-harness', 'pip install lm-eval'):
        importlib.import_module('data.hf.harness')


@pytest.mark.parametrize('trained', [True, False])
@pytest.mark.parametrize('shape', [dict(n_embd=128, n_head=4, n_kv_head=4, n_inner=128, qk_norm=True), dict(n_embd=64, n_head=8, n_kv_head=2, n_inner=200, pe='rope')])
def test_memory_that_is_not_there(trained, shape, tmp_path, refused):
    """The estimate against what autograd really keeps; it is one from below."""
    model, kept = GPT(GPTConfig(vocab_size=50, block_size=64, n_layer=3, **shape)).requires_grad_(trained), {}
    for b in model.blocks:
        b.attn.scale.requires_grad_(not trained)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t     # once, however many operations share it
        return t
    x = torch.randint(50, (8, 65))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(x[:, :-1], x[:, 1:])
    real = sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in weights)
    need = lambda checkpointing, dtype='fp32': io.memory(model, 8 * 64, trained, SimpleNamespace(activation_checkpointing=checkpointing, optimizer='adamw'), SimpleNamespace(dtype=dtype))
    assert 0.7 * real < need(False) - 12 * sum(p.numel() for p in model.parameters()) * trained <= real and need(True) < need(False) > need(False, 'bf16')
    io.preflight(tmp_path, 0, need(False))
    with refused('GB of memory are free', 'at least 1000000.0 GB', '--micro_batch'):
        io.preflight(tmp_path, 0, 10**15)


def test_lock_lasts_as_long_as_the_process(tmp_path, refused):
    def hold():
        held = io.lock(tmp_path)                     # noqa: F841 (kept open as long as we live)
        ready.set()
        time.sleep(60)
    fork = multiprocessing.get_context('fork')
    ready, other = fork.Event(), fork.Process(target=hold)
    other.start()
    try:
        assert ready.wait(10)
        with refused('another run', tmp_path):
            io.lock(tmp_path)
    finally:
        other.kill()                                 # kill -9: nothing is cleaned up
        other.join()
    held = io.lock(tmp_path)
    with refused('another run'):
        io.lock(tmp_path)
    held.close()


def test_out_of_memory_is_one_line(capsys):
    io.explain(torch.OutOfMemoryError, torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB.\nand more'), None)
    io.explain(RuntimeError, RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes"), None)
    first, second = capsys.readouterr().err.splitlines()
    assert 'lower --micro_batch' in first and '2.00 GiB' in first and 'lower --micro_batch' in second and '9 bytes' in second
