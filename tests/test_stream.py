"""
What data/stream.py and the corpora on the hub promise: shares, splits, document boundaries, the same bytes after any
stop, one line for what goes wrong.
"""
import gzip
import json
import os
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import python, refused, run
from test_prepare import give_up

from data import stream
from data.fineweb_edu import prepare as fineweb_edu
from data.pg19 import prepare as pg19
from data.proof_pile import prepare as proof_pile
from data.slimpajama_starcoder import prepare as mix
from data.tokenizer import get_tokenizer
from data.tokens import documents, open_data

BYTES = '--tokenizer bytes --workers 2'


class Lines:
    """As much of a streamed data set of lines as stream.py uses."""

    def __init__(self, files):
        self.files, self.at = files, 0

    def __iter__(self):
        rows = []
        for file in self.files:
            opened = gzip.open if file.endswith('.gz') else open
            with opened(file, 'rt', newline='\n') as f:
                rows += f
        while self.at < len(rows):
            self.at += 1
            yield {'text': rows[self.at - 1].rstrip('\n')}

    def state_dict(self):
        return dict(at=self.at)

    def load_state_dict(self, state):
        self.at = state['at']


def stand_in():
    """As much of the package datasets."""
    logging = SimpleNamespace(set_verbosity=id, CRITICAL=50)
    return SimpleNamespace(load_dataset=lambda path, data_files, **_: Lines(data_files), logging=logging,
                           disable_progress_bars=lambda: None)


@pytest.fixture(params=['stand-in', 'jsonl.gz', 'parquet'])
def kind(request, monkeypatch):
    """Files of this kind are read, at first without the package. Threads tokenise; shards are small."""
    if request.param == 'stand-in':
        monkeypatch.setitem(sys.modules, 'datasets', stand_in())
    else:
        pytest.importorskip('datasets')
    monkeypatch.setattr(stream, 'ProcessPoolExecutor', lambda max_workers, **_: ThreadPoolExecutor(max_workers))
    monkeypatch.setattr(stream, 'SHARD', 3000)
    return request.param.replace('stand-in', 'jsonl')


def save(file, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == '.parquet':
        parquet = pytest.importorskip('pyarrow.parquet')
        parquet.write_table(sys.modules['pyarrow'].Table.from_pylist(rows), file, row_group_size=7)
    else:
        with (gzip.open if file.suffix == '.gz' else open)(file, 'wt') as f:
            f.writelines(json.dumps(row) + '\n' for row in rows)


def words(rng, n):
    strange = ['ant', 'bee', 'é', 'line\nend', 'cr\r\n', '\u2028', '<|endoftext|>']
    return ' '.join(rng.choice(strange) for _ in range(n))


@pytest.fixture
def slim_star(tmp_path, kind):
    """Local folders like the two data sets on the hub; 100 documents a file, every third of SlimPajama is code."""
    rng = random.Random(0)
    for i in range(3):
        slim, star = [], []
        for j in range(100):
            text = f'slim {i} {j} {words(rng, rng.randint(1, 60))}' if j % 3 else f'GITHUB {j}'
            name = 'RedPajamaBook' if j % 3 else 'RedPajamaGithub'
            slim.append(dict(text=text, meta=dict(redpajama_set_name=name)))
        for j in range(100):
            text = f'star {i} {j} {words(rng, rng.randint(1, 60))}'
            star.append({'content': text, ('id' if i else 'no'): str(j)})
        save(tmp_path / f'slim/data/train-{i:05d}-of-00003.{kind}', slim)
        save(tmp_path / f'star/lang{i}/train-{i:05d}.{kind}', star)
    if kind == 'parquet':                            # the layout of the hub: its patterns choose the files
        never = dict(text='NEVER', meta=dict(redpajama_set_name='RedPajamaC4'))
        save(tmp_path / 'slim/data/validation-00000-of-00001.parquet', [never])
    return f'{BYTES} --slimpajama {tmp_path}/slim --starcoder {tmp_path}/star --tokens 30000 --val 0.2'


def contents(out):
    """{split: documents as text}, each with BOS in front and nowhere else."""
    texts = {}
    for split in 'train', 'val':
        data = np.fromfile(out / f'{split}.bin', np.uint16)
        meta = json.loads((out / 'meta.json').read_text())
        assert meta[split]['docs'] == np.flatnonzero(data == 256).tolist()
        assert meta[split]['tokens'] == len(data)
        texts[split] = [bytes(d[1:].astype(np.uint8)).decode() for d in documents(data, meta, split)]
    return texts


def files(out):
    return {f.name: f.read_bytes() for f in out.iterdir()}


@pytest.fixture
def mixed(slim_star, tmp_path):
    """-> (texts, what was printed)"""
    said = run(mix, slim_star, '--out', tmp_path / 'out')
    return contents(tmp_path / 'out'), said


@pytest.mark.parametrize('name, share', [('slim', 0.693584), ('star', 0.306416)])
def test_the_shares_of_the_paper(name, share, mixed, tmp_path):
    texts, said = mixed
    train, val = ([t for t in texts[split] if t.startswith(name)] for split in ('train', 'val'))
    n = sum(len(t.encode()) + 1 for t in train)
    assert 30_000 * share <= n < 30_000 * share + 600
    whole = open_data(tmp_path / 'out', 'train')[1]['train']['tokens']
    assert f'{n / whole:.4%}' in said
    assert 0.1 < len(val) / len(train) < 0.5


def test_each_document_once_and_none_from_github(mixed):
    texts = mixed[0]['train'] + mixed[0]['val']
    assert all(t.startswith(('slim', 'star')) for t in texts)
    assert len({' '.join(t.split()[:3]) for t in texts}) == len(texts)


def test_the_languages_alternate(mixed):
    code = [t.split()[1] for t in mixed[0]['train'] if t.startswith('star')]
    assert max(map(code.count, '012')) - min(map(code.count, '012')) < 20


def test_nothing_is_left_of_the_shards(mixed, tmp_path):
    assert sorted(os.listdir(tmp_path / 'out')) == ['meta.json', 'train.bin', 'val.bin']


def test_another_seed_gives_another_corpus(mixed, slim_star, tmp_path):
    run(mix, slim_star, '--out', tmp_path / 'other', '--seed 1')
    assert contents(tmp_path / 'other')['train'] != mixed[0]['train']


def test_a_new_name_for_a_part_of_slimpajama_is_refused():
    row = dict(text='x', meta=dict(redpajama_set_name='RedPajamaC4'))
    assert mix.slimpajama_text(row) == 'x'
    row['meta']['redpajama_set_name'] = 'RedPajamaGitHub'
    with refused('RedPajamaGitHub'):
        mix.slimpajama_text(row)


class Shards:
    """In place of stream.encode: counts the shards; number `stop` is left half written, as after a kill, by Ctrl-C."""

    def __init__(self):
        self.real, self.done, self.stop = stream.encode, 0, None

    def __call__(self, file, *rest):
        if self.done == self.stop:
            with open(f'{file}.tmp', 'wb') as f:
                f.write(b'half')
            raise KeyboardInterrupt
        self.done += 1
        return self.real(file, *rest)


@pytest.fixture
def shards(monkeypatch):
    counted = Shards()
    monkeypatch.setattr(stream, 'encode', counted)
    return counted


@pytest.mark.parametrize('stop', [0, 1, 5, 14])
def test_a_stop_anywhere_changes_no_byte(stop, slim_star, shards, tmp_path):
    run(mix, slim_star, '--out', tmp_path / 'whole')
    made = shards.done
    assert made > 12
    shards.done, shards.stop = 0, stop
    with refused('stopped', 'same command'):
        run(mix, slim_star, '--out', tmp_path / 'out')
    assert os.listdir(tmp_path / 'out') == ['.shards']
    shards.stop = None
    run(mix, slim_star, '--out', tmp_path / 'out', '--workers 3')
    assert files(tmp_path / 'out') == files(tmp_path / 'whole')
    # what was there has not been made again, but for a few shards ahead of those that are used
    assert shards.done < made + 12


def test_a_lost_connection_changes_no_byte(slim_star, tmp_path, monkeypatch):
    run(mix, slim_star, '--out', tmp_path / 'whole')
    text, left = mix.slimpajama_text, [30]

    def lost(row):
        left[0] -= 1
        if left[0] == 0:
            raise OSError('connection lost')
        return text(row)
    with monkeypatch.context() as patch, refused('connection lost', 'same command'):
        patch.setattr(mix, 'slimpajama_text', lost)
        run(mix, slim_star, '--out', tmp_path / 'out', '--workers 1')
    run(mix, slim_star, '--out', tmp_path / 'out')
    assert files(tmp_path / 'out') == files(tmp_path / 'whole')


def test_after_a_stop_room_for_what_is_missing_is_enough(slim_star, shards, tmp_path, monkeypatch):
    """30,000 tokens of two bytes are written twice."""
    shards.stop = 5
    with refused('stopped'):
        run(mix, slim_star, '--out', tmp_path / 'out')
    shards.stop = None
    monkeypatch.setattr('shutil.disk_usage', lambda path: SimpleNamespace(free=119_000))
    with refused('GB free'):
        run(mix, slim_star, '--out', tmp_path / 'new')
    run(mix, slim_star, '--out', tmp_path / 'out')


@pytest.fixture
def web(tmp_path, kind):
    """300 documents, each twice, and two that are empty -> flags; --tokens is missing."""
    rows = [dict(text=f'{i % 150} {"word " * (i % 150 % 7)}') for i in range(300)] + [dict(text=''), dict(text=None)]
    save(tmp_path / f'web/sample/10BT/000_00000.{kind}', rows)
    return f'{BYTES} --source {tmp_path}/web --out {tmp_path}/out --val 0.2 --tokens'


def test_documents_keep_their_order_in_each_split(web, tmp_path):
    run(fineweb_edu, web, 1000)
    texts = contents(tmp_path / 'out')
    for split in texts:
        numbers = [int(t.split()[0]) for t in texts[split]]
        assert numbers == sorted(numbers)
    together = sorted(int(t.split()[0]) for t in texts['train'] + texts['val'])
    assert together == list(range(len(together)))


def test_no_more_documents_than_asked_for(web, tmp_path):
    run(fineweb_edu, web, 1000)
    assert 1000 <= open_data(tmp_path / 'out', 'train')[1]['train']['tokens'] < 1050


def test_a_copy_goes_where_the_first_one_is(web, tmp_path):
    run(fineweb_edu, web, 3000)
    texts = contents(tmp_path / 'out')
    assert len(texts['train']) > 150
    assert not set(texts['train']) & set(texts['val'])


def test_a_corpus_that_is_too_small_is_refused(web, tmp_path):
    with refused('web', 'ends after', 'lower --tokens'):
        run(fineweb_edu, web, 10_000)
    run(fineweb_edu, web, 3000)                      # from the same shards
    with refused('val.bin', '--val'):
        run(fineweb_edu, web, 3000, '--val 1e-9')


METAS = [{}, {'a': 1}, {'a': 'x', 'b': [1]}, None]


@pytest.fixture(params=[pg19, proof_pile], ids=['pg19', 'proof_pile'])
def test_set(request, kind, tmp_path):
    """A corpus that has a test set and more, in the layout of the hub -> (script, flags, the texts of the test set)."""
    script, rows = request.param, []
    if script is proof_pile and kind == 'parquet':
        pytest.skip('the data set is jsonl')
    for i in range(20):
        meta = 'a book' if script is pg19 else METAS[i % 4]
        rows.append(dict(text=f'{i} {words(random.Random(i), 300)}', meta=meta))
    file = 'data/test-00000-of-00001-29a571' if script is pg19 else 'test/proofpile_test'
    save(tmp_path / f'source/{file}.{kind}', rows)
    # only the test set is taken where the layout is that of the hub
    hub = 'parquet' if script is pg19 else 'jsonl.gz'
    if kind == hub:
        save(tmp_path / f'source/{file.replace("test", "train")}.{kind}', rows[:1])
    return script, f'{BYTES} --source {tmp_path}/source --out {tmp_path}/out', [r['text'] for r in rows]


def test_a_test_set_is_taken_whole_and_in_order(test_set, tmp_path):
    script, flags, texts = test_set
    run(script, flags)
    assert contents(tmp_path / 'out') == dict(train=[], val=texts)


def test_a_part_of_a_test_set(test_set, tmp_path):
    script, flags, _ = test_set
    run(script, flags, '--tokens 2000')
    assert 0 < len(contents(tmp_path / 'out')['val']) < 5


def test_half_of_a_surrogate_pair_is_no_text(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'datasets', stand_in())
    monkeypatch.setattr(stream, 'ProcessPoolExecutor', lambda max_workers, **_: ThreadPoolExecutor(max_workers))
    save(tmp_path / 'source/a.jsonl', [dict(text='half \ud800')])
    run(pg19, BYTES, '--source', tmp_path / 'source', '--out', tmp_path / 'out')
    assert contents(tmp_path / 'out')['val'] == ['half ?']


@pytest.mark.parametrize('script, flags, words', [
    (pg19, '--source {tmp}/source', ['source', 'text']), (pg19, '--source {tmp}/none', ['none', 'no files']),
    (pg19, '--tokens 0', ['--tokens']), (pg19, '--workers 0', ['--workers']), (pg19, '--tokenizer gpt5', ['gpt5']),
    (pg19, '--seed 0', ['--seed']), (fineweb_edu, '--source {tmp}/source --val 0', ['--val']),
    (fineweb_edu, '--source {tmp}/source --seed -1', ['--seed']),
    (fineweb_edu, '--source {tmp}/source --tokens 1000000000000000', ['GB']),
    (mix, '--slimpajama {tmp}/slim --starcoder {tmp}/source --tokens 100', ['slim', 'meta'])])
def test_what_is_no_corpus_costs_one_line(script, flags, words, kind, tmp_path):
    save(tmp_path / f'source/a.{kind}', [dict(body='x', meta={'a': 1})])
    save(tmp_path / f'slim/a.{kind}', [dict(text='x', meta='a')])
    (tmp_path / 'none').mkdir()
    with refused(*words):
        run(script, BYTES, '--out', tmp_path / 'out', flags.format(tmp=tmp_path))


def test_a_document_that_the_tokenizer_gives_up_on_is_named(tmp_path, monkeypatch):
    tok = get_tokenizer('bytes')
    monkeypatch.setattr(tok, 'encode', give_up)
    monkeypatch.setattr(stream, 'tokenizer_of', lambda name: tok)
    with refused('of 1,004 characters', "'once'", 'StackOverflow'):
        stream.encode(str(tmp_path / 'shard'), 'bytes', 0.1, [' ' * 1000 + 'once'], None)


def test_a_page_in_place_of_json_costs_one_line(kind, tmp_path):
    if kind == 'parquet':
        pytest.skip('no lines of json')
    (tmp_path / 'source').mkdir()
    opened = gzip.open if kind == 'jsonl.gz' else open
    with opened(tmp_path / f'source/a.{kind}', 'wb') as f:
        f.write(b'{"text": "x"}\n<html>')
    with refused('source', 'JSONDecodeError'):
        run(pg19, BYTES, '--source', tmp_path / 'source', '--out', tmp_path / 'out')


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'datasets', None)
    with refused('pip install datasets'):
        run(pg19, BYTES, '--out', tmp_path)


def test_without_network(tmp_path, monkeypatch):
    pytest.importorskip('datasets')
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    with refused('hoskinson-center/proof-pile', 'network', 'local copy'):
        run(proof_pile, BYTES, '--out', tmp_path)


@pytest.mark.slow
def test_real_processes(tmp_path):
    pytest.importorskip('datasets')
    rows = [dict(text=f'{i} {words(random.Random(i), 300)}') for i in range(20)]
    save(tmp_path / 'source/test/proofpile_test.jsonl.gz', rows)
    flags = f'{BYTES} --source {tmp_path}/source --out {tmp_path}/out'
    done = python('-m', 'data.proof_pile.prepare', *flags.split())
    assert (done.returncode, done.stderr) == (0, '')
    assert contents(tmp_path / 'out') == dict(train=[], val=[r['text'] for r in rows])
