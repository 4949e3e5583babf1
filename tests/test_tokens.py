"""What data/tokens.py promises: files that are whole or not there, documents as they were, batches without a state."""
import json

import numpy as np
import pytest
import torch
from conftest import refused

from data import tokens
from data.tokenizer import Tokenizer
from data.tokens import documents, get_batch, open_data, write_data


def fake(n_vocab):
    """A tokenizer of n_vocab tokens, the last of which is BOS."""
    return Tokenizer('fake', n_vocab, n_vocab - 1, None, None)


def lists(docs):
    return [np.asarray(d).tolist() for d in docs]


# ---------------------------------------------------------------------------------------------------------------------
# files

@pytest.mark.parametrize('n_vocab, dtype', [(2**16, np.uint16), (2**16 + 1, np.uint32)])
def test_what_is_written_is_read(n_vocab, dtype, tmp_path):
    docs = dict(train=[[1, 2, n_vocab - 2], [], list(range(1000))], val=[[n_vocab - 2]])
    meta = write_data(tmp_path, fake(n_vocab), {split: iter(d) for split, d in docs.items()}, source='here')
    assert meta['source'] == 'here'
    assert (meta['train']['largest_id'], meta['val']['largest_id']) == (n_vocab - 1, n_vocab - 1)        # BOS
    for split in docs:
        data, opened = open_data(tmp_path, split)
        assert opened == meta
        assert data.dtype == dtype
        assert lists(documents(data, meta, split)) == [[n_vocab - 1, *d] for d in docs[split]]


def test_a_stop_while_writing_leaves_what_was_there(tmp_path):
    def stopped():
        yield [7, 7]
        raise KeyboardInterrupt

    meta = write_data(tmp_path, fake(100), dict(train=[[1, 2]], val=[[3]]), source='')
    with pytest.raises(KeyboardInterrupt):
        write_data(tmp_path, fake(100), dict(train=stopped(), val=[[3]]), source='again')
    data, opened = open_data(tmp_path, 'train')
    assert opened == meta
    assert np.asarray(data).tolist() == [99, 1, 2]
    assert sorted(f.name for f in tmp_path.iterdir()) == ['meta.json', 'train.bin', 'val.bin']


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / 'file').touch()
    with refused('file', 'cannot be written'):
        write_data(tmp_path / 'file', fake(100), dict(train=[[1]], val=[[1]]), source='')


@pytest.mark.parametrize('listed', [10, 2])
def test_documents_that_are_too_many_for_a_list(listed, tmp_path, monkeypatch):
    docs = [[3, 1, 4], [], [1, 5], [9, 2, 6, 5]]
    monkeypatch.setattr(tokens, 'DOCS_LISTED', listed)
    meta = write_data(tmp_path, fake(100), dict(train=docs, val=docs[:1]), source='')
    assert (meta['train']['docs'] is None) == (listed == 2)
    assert (meta['train']['n_docs'], meta['train']['longest']) == (4, 5)
    assert meta['val']['docs'] == [0]
    data, meta = open_data(tmp_path, 'train')
    assert lists(documents(data, meta, 'train')) == [[99, *d] for d in docs]


def edit(file, change):
    return lambda folder: (folder / file).write_bytes(change((folder / file).read_bytes()))


def drop(*keys):
    """Takes an entry out of meta.json."""
    def change(content):
        meta = json.loads(content)
        inner = meta
        for key in keys[:-1]:
            inner = inner[key]
        del inner[keys[-1]]
        return json.dumps(meta).encode()
    return edit('meta.json', change)


DAMAGE = dict(
    folder=(lambda d: d.rename(f'{d}2'), 'not a folder'),
    meta=(lambda d: (d / 'meta.json').unlink(), 'meta.json is missing'),
    cut=(edit('meta.json', lambda b: b[:-9]), 'meta.json is damaged'),
    no_json=(edit('meta.json', lambda b: b'\xff\xfe'), 'meta.json is damaged'),
    array=(edit('meta.json', lambda b: b'[]'), 'meta.json is damaged'),
    split=(drop('train'), 'meta.json is damaged'),
    tokens=(drop('train', 'tokens'), 'meta.json is damaged'),
    docs=(drop('train', 'docs'), 'meta.json is damaged'),
    dtype=(drop('dtype'), 'meta.json is damaged'),
    vocab=(drop('vocab_size'), 'meta.json is damaged'),
    bos=(drop('bos'), 'meta.json is damaged'),
    bin=(lambda d: (d / 'train.bin').unlink(), 'train.bin is missing'),
    half=(edit('train.bin', lambda b: b[:80]), 'train.bin holds 80 bytes'),
    odd=(edit('train.bin', lambda b: b[:-1]), 'train.bin holds 183 bytes'),
    empty=(edit('train.bin', lambda b: b''), 'train.bin holds 0 bytes'),
    outside=(edit('train.bin', lambda b: b[:140] + b'\x64\0' + b[142:]), 'token 70 is 100'),
)


@pytest.fixture
def folder(tmp_path):
    """92 tokens for training, none for validation."""
    write_data(tmp_path / 'data', fake(100), dict(train=[[5] * 50, range(40)], val=[]), source='')
    return tmp_path / 'data'


@pytest.mark.parametrize('damage, words', DAMAGE.values(), ids=DAMAGE)
def test_damaged_data_costs_one_line(damage, words, folder):
    assert len(open_data(folder, 'train')[0]) == 92
    damage(folder)
    with refused(words):
        open_data(folder, 'train')


def test_an_empty_split_is_refused(folder):
    with refused('val.bin is empty', '--val below 1'):
        open_data(folder, 'val')


# ---------------------------------------------------------------------------------------------------------------------
# batches: 8 rows of 16 tokens out of a stream in which a token says where it stands

STREAM, BOS = np.arange(1000, dtype=np.uint16), 999


def batch(seed=3, step=7, bos=BOS, **ranks):
    return get_batch(STREAM, bos, 8, 16, seed, step, **ranks)


def test_a_batch_is_windows_of_the_stream_that_begin_with_bos():
    x, y = batch()
    assert (x.dtype, y.dtype) == (torch.int64, torch.int64)
    assert x.shape == y.shape == (8, 16)
    assert (x[:, 0] == BOS).all()
    assert torch.equal(x[:, 1:], y[:, :-1])
    assert torch.equal(y, y[:, :1] + torch.arange(16))


def test_without_a_bos_a_row_is_the_text_itself():
    x, y = batch(bos=None)
    assert torch.equal(y, batch()[1])
    assert torch.equal(x, y - 1)


def test_a_batch_depends_on_seed_and_step_only():
    y = batch()[1]
    np.random.seed(0)
    torch.manual_seed(0)
    assert torch.equal(batch()[1], y)
    assert not torch.equal(batch(step=8)[1], y)
    assert not torch.equal(batch(seed=4)[1], y)


@pytest.mark.parametrize('world', [2, 4])
def test_any_number_of_processes_shares_the_same_batch(world):
    for whole, parts in zip(batch(), zip(*(batch(rank=rank, world=world) for rank in range(world)))):
        assert torch.equal(torch.cat(parts), whole)


def test_the_first_and_the_last_token_are_reached():
    seen = [get_batch(STREAM[:20], None, 4, 16, 0, step) for step in range(20)]
    assert min(x.min() for x, _ in seen) == 0
    assert max(y.max() for _, y in seen) == 19
