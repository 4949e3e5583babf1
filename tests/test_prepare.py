"""What data/passkey/prepare.py and data/text/prepare.py promise about the documents that they write."""
import json
import re

import numpy as np
import pytest
from conftest import refused, run

from data.passkey import prepare as passkey
from data.text import prepare as text
from data.tokenizer import get_tokenizer
from data.tokens import documents, open_data

# ---------------------------------------------------------------------------------------------------------------------
# the synthetic corpus

@pytest.fixture(scope='module')
def ids():
    return list(passkey.generate(500_000, 8, (0, 0), 4096))


@pytest.fixture(scope='module')
def docs(ids):
    return [passkey.get_encoding().decode(d) for d in ids]


def test_the_seed_alone_decides(ids):
    assert [list(d) for d in passkey.generate(500_000, 8, (0, 0), 4096)] == [list(d) for d in ids]
    assert list(passkey.generate(50_000, 8, (0, 1), 4096))[:5] != ids[:5]


def test_as_many_tokens_as_asked_in_documents_of_all_lengths(ids):
    lengths = [len(d) for d in ids]
    assert 64 <= min(lengths) < 80
    assert 3500 < max(lengths) <= 4096
    assert 500_000 <= sum(lengths) + len(lengths) < 500_000 + 4097


def test_key_is_told_once_and_every_answer_is_it(docs):
    info = re.escape(passkey.INFO).replace(r'\{key\}', r'(\d{5})')
    answers = 0
    for s in docs:
        told = re.findall(info, s)
        assert len(told) == 1, f'told {len(told)} times in {len(s)} characters'
        key, again = told[0]
        assert key == again
        before, *asked = s.split(passkey.QUESTION)
        assert 'Remember' in before                  # told before it is asked for
        assert all(a.startswith(f' {key}.') for a in asked[:-1])
        assert all(f' {key}.'.startswith(a[:7]) for a in asked[-1:])     # the end of the document may cut the last one
        answers += len(asked)
    assert 3 * len(docs) < answers < 5 * len(docs)


def test_key_and_questions_may_stand_anywhere(docs):
    told, asked = [], []
    for s in docs:
        told.append(s.index('Remember') / len(s))
        asked += [place.start() / len(s) for place in re.finditer(re.escape(passkey.QUESTION), s)]
    assert np.quantile(told, 0.25) < 0.5
    assert np.quantile(told, 0.75) > 0.6
    assert np.quantile(asked, 0.1) < 0.5
    assert np.quantile(asked, 0.9) > 0.9


def test_a_question_has_one_answer_by_the_token_before(docs):
    """What follows " is" is a digit: the only other words behind it are in one token with it."""
    enc = passkey.get_encoding()
    (bare,) = enc.encode_ordinary(' is')
    for s in docs[:50]:
        ids = enc.encode_ordinary(s)
        behind = [enc.decode([b]) for a, b in zip(ids, ids[1:]) if a == bare]
        assert all(text.strip().isdigit() for text in behind)


def test_the_passkey_corpus_on_disk(tmp_path):
    run(passkey, '--tokens 5000 --out', tmp_path)
    train, val = (open_data(tmp_path, split)[0] for split in ('train', 'val'))
    assert len(train) >= 5000
    assert np.asarray(train[:64]).tolist() != np.asarray(val[:64]).tolist()


@pytest.mark.parametrize('flags', [
    '--tokens 0', '--seed -1', '--questions 0', '--questions nan', '--longest 63'])
def test_a_passkey_corpus_that_cannot_be_made_is_refused(flags, tmp_path):
    with refused(flags.split()[0]):
        run(passkey, '--out', tmp_path, '--tokens 100', flags)


# ---------------------------------------------------------------------------------------------------------------------
# text files

@pytest.fixture
def books(tmp_path):
    """20 books in two folders of tmp_path/books, and files that are none. -> {name: text}"""
    names = [f'books/{"ab"[i % 2]}/{i}.txt' for i in range(20)]
    texts = {name: f'book {i}\r\n<|endoftext|> é\n' * (i + 1) for i, name in enumerate(names)}
    for name, content in {**texts, 'books/.git/x': 'no', 'books/.hidden': 'no', 'books/empty.txt': ''}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content.encode())
    return texts


@pytest.fixture
def prepared(tmp_path, books):
    """prepared(*flags) prepares the books and checks that each comes back whole, once -> the names of those in val."""
    tok, out = get_tokenizer('bytes'), tmp_path / 'out'

    def call(*flags):
        said = run(text, tmp_path / 'books', tmp_path / 'books/a', '--out', out, *flags)
        assert "'books/empty.txt' is empty" in said
        meta = json.loads((out / 'meta.json').read_text())
        names = meta['source']
        for split in 'train', 'val':
            data = np.fromfile(out / f'{split}.bin', meta['dtype'])
            docs = documents(data, meta, split)
            assert [tok.decode(d) for d in docs] == [books[name] for name in names[split]]
            assert all(d[0] == tok.bos for d in docs)
            longest = max(map(len, docs), default=0)
            assert f'{split}.bin: {len(data):,} tokens, {len(docs)} documents, the longest {longest:,} tokens' in said
        assert sorted(names['train'] + names['val']) == sorted(books)
        return names['val']
    return call


@pytest.mark.parametrize('share, held', [(0.25, 5), (0.001, 1), (0.999, 19), (1, 20)])
def test_a_share_of_the_books_is_held_out(share, held, prepared):
    assert len(prepared('--val', share)) == held


def test_everything_may_be_for_validation(prepared, tmp_path):
    prepared('--val 1')
    val, meta = open_data(tmp_path / 'out', 'val')
    assert len(val) > 0
    assert meta['train']['tokens'] == 0


def test_the_seed_chooses_what_is_held_out(prepared):
    first = prepared('--val 0.25')
    assert prepared('--val 0.25 --seed 0') == first
    assert prepared('--val 0.25 --seed 1') != first


def test_files_that_are_named_are_held_out(prepared, tmp_path, books):
    held = prepared('--val_files', tmp_path / 'books/b', tmp_path / 'books/a/0.txt')
    assert held == ['books/a/0.txt'] + [name for name in sorted(books) if '/b/' in name]


@pytest.mark.parametrize('flags, share', [('', 0.1), ('--val 0.25', 0.25)])
def test_the_last_part_of_a_single_file_is_held_out(flags, share, tmp_path):
    whole = ''.join(f'line {i}\n' for i in range(1000))
    (tmp_path / 'book.txt').write_text(whole)
    said = run(text, tmp_path / 'book.txt', '--out', tmp_path / 'out', flags)
    assert 'train.bin' in said
    assert '1.00 bytes a token' in said
    tok, found = get_tokenizer('bytes'), {}
    for split in 'train', 'val':
        data, meta = open_data(tmp_path / 'out', split)
        (doc,) = documents(data, meta, split)
        assert doc[0] == tok.bos
        found[split] = tok.decode(np.asarray(doc).tolist())
    assert found['train'] + found['val'] == whole    # every character once
    assert found['val'].startswith('line ')          # whole lines
    assert len(found['val']) == pytest.approx(share * len(whole), rel=0.01)


def test_the_home_folder_may_be_a_tilde(books, tmp_path, monkeypatch):
    """`make TEXT=~/books` comes here as it is written, in shells that leave it so."""
    monkeypatch.setenv('HOME', str(tmp_path))
    run(text, '~/books', '--val_files', '~/books/a', '--out', tmp_path / 'out')
    assert json.loads((tmp_path / 'out/meta.json').read_text())['source']['val'][0] == 'books/a/0.txt'


class Panic(BaseException):
    """As a panic of Rust comes: no Exception, and it does not pickle."""


def give_up(text):
    raise Panic('StackOverflow')


def test_a_document_that_the_tokenizer_gives_up_on_is_named(books, tmp_path, monkeypatch):
    tok = get_tokenizer('bytes')
    monkeypatch.setattr(tok, 'encode', give_up)
    monkeypatch.setattr(text, 'get_tokenizer', lambda name: tok)
    with refused('books/a/', '.txt', 'StackOverflow'):
        run(text, tmp_path / 'books', '--out', tmp_path / 'out')
    assert not (tmp_path / 'out/meta.json').exists()


@pytest.mark.parametrize('flags, words', [
    ('books/x', ['books/x', 'no such file']), ('none', ['none', 'no files']),
    ('books --val_files books/x', ['books/x']), ('latin.txt', ['latin.txt', 'byte 3']), ('.', ['latin.txt']),
    ('link.txt', ['link.txt']),
    ('books/empty.txt', ['for val', '0 in all']), ('letter.txt', ['for val', '1 in all']),
    ('books --val_files books', ['for train']), ('books --val 0', ['--val']), ('books --val nan', ['--val']),
    ('books --tokenizer gpt5', ['gpt5', 'bytes']), ('books --tokenizer hf:none', ['hf:']),
    ('books --out latin.txt', ['--out'])])
def test_text_that_is_no_corpus_is_refused_and_nothing_changed(flags, words, books, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(text, 'books --out out')
    before = (tmp_path / 'out/meta.json').read_bytes()
    (tmp_path / 'letter.txt').write_text('a')
    (tmp_path / 'latin.txt').write_bytes(b'caf\xe9')
    (tmp_path / 'link.txt').symlink_to('nowhere')
    (tmp_path / 'none').mkdir()
    with refused(*words):
        run(text, '--out out', flags)
    assert (tmp_path / 'out/meta.json').read_bytes() == before
