"""What the corpora on the hub promise: shares, splits, document boundaries, the same bytes after any stop, one line for what goes wrong."""
import gzip
import json
import os
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest

from data import io, stream
from data.fineweb_edu import prepare as fineweb_edu
from data.pg19 import prepare as pg19
from data.proof_pile import prepare as proof_pile
from data.slimpajama_starcoder import prepare as mix
from extend import windows
from test_data import refused        # noqa: F401 (a fixture)


class Lines:
    """As much of a streamed data set of lines as stream.py uses."""

    def __init__(self, files):
        self.files, self.at = files, 0

    def __iter__(self):
        rows = [line for f in self.files for line in (gzip.open if f.endswith('.gz') else open)(f, 'rt', newline='\n')]
        while self.at < len(rows):
            self.at += 1
            yield {'text': rows[self.at - 1].rstrip('\n')}

    def state_dict(self):
        return dict(at=self.at)

    def load_state_dict(self, state):
        self.at = state['at']


@pytest.fixture(params=['stand-in', 'jsonl.gz', 'parquet'])
def kind(request, monkeypatch):
    """Files of this kind are read: in the first case without the package, in the others with it. Threads tokenise; shards are small."""
    if request.param == 'stand-in':
        monkeypatch.setitem(sys.modules, 'datasets', SimpleNamespace(
            load_dataset=lambda path, data_files, **_: Lines(data_files), disable_progress_bars=lambda: None,
            logging=SimpleNamespace(set_verbosity=id, CRITICAL=50)))
    else:
        pytest.importorskip('datasets')
    monkeypatch.setattr(stream, 'ProcessPoolExecutor', lambda max_workers, **_: ThreadPoolExecutor(max_workers))
    monkeypatch.setattr(stream, 'SHARD', 3000)
    return request.param.replace('stand-in', 'jsonl')


@pytest.fixture
def prepare(monkeypatch):
    """prepare(script, *flags) from the command line, with the bytes as tokens and two workers."""
    def call(script, *flags):
        monkeypatch.setattr('sys.argv', ['prepare', '--tokenizer', 'bytes', '--workers', '2', *map(str, flags)])
        script.main()
    return call


def save(file, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == '.parquet':
        parquet = pytest.importorskip('pyarrow.parquet')
        parquet.write_table(sys.modules['pyarrow'].Table.from_pylist(rows), file, row_group_size=7)
    else:
        with (gzip.open if file.suffix == '.gz' else open)(file, 'wt') as f:
            f.writelines(json.dumps(row) + '\n' for row in rows)


def words(rng, n):
    return ' '.join(rng.choice(['ant', 'bee', 'é', 'line\nend', 'cr\r\n', '\u2028', '<|endoftext|>']) for _ in range(n))


@pytest.fixture
def slim_star(tmp_path, kind):
    """Local folders like the two data sets on the hub; 100 documents a file, of which every third of SlimPajama is code."""
    rng = random.Random(0)
    for i in range(3):
        save(tmp_path / f'slim/data/train-{i:05d}-of-00003.{kind}',
             [dict(text=f'slim {i} {j} {words(rng, rng.randint(1, 60))}' if j % 3 else f'GITHUB {j}',
                   meta=dict(redpajama_set_name='RedPajamaBook' if j % 3 else 'RedPajamaGithub')) for j in range(100)])
        save(tmp_path / f'star/lang{i}/train-{i:05d}.{kind}',
             [{'content': f'star {i} {j} {words(rng, rng.randint(1, 60))}', ('id' if i else 'no'): str(j)} for j in range(100)])
    if kind == 'parquet':                            # the layout of the hub: its patterns choose the files
        save(tmp_path / 'slim/data/validation-00000-of-00001.parquet', [dict(text='NEVER', meta=dict(redpajama_set_name='RedPajamaC4'))])
    return ['--slimpajama', tmp_path / 'slim', '--starcoder', tmp_path / 'star', '--tokens', 30_000, '--val', 0.2]


def contents(out):
    """{split: documents as text}, each with BOS in front and nowhere else."""
    texts = {}
    for split in 'train', 'val':
        data, meta = np.fromfile(out / f'{split}.bin', np.uint16), json.loads((out / 'meta.json').read_text())
        docs = io.documents(data, meta, split)
        assert meta[split]['docs'] == np.flatnonzero(np.asarray(data) == 256).tolist() and meta[split]['tokens'] == len(data)
        texts[split] = [bytes(np.asarray(d[1:]).astype(np.uint8)).decode() for d in docs]
    return texts


def test_the_mix_of_the_paper(slim_star, prepare, tmp_path, capsys, kind):
    prepare(mix, *slim_star, '--out', tmp_path / 'out')
    texts, said = contents(tmp_path / 'out'), capsys.readouterr().out
    for name, share in ('slim', 0.693584), ('star', 0.306416):
        n = sum(len(t.encode()) + 1 for t in texts['train'] if t.startswith(name))
        assert 30_000 * share <= n < 30_000 * share + 600 and f'{n / io.open_data(tmp_path / "out", "train")[1]["train"]["tokens"]:.4%}' in said
        assert 0.1 < sum(t.startswith(name) for t in texts['val']) / sum(t.startswith(name) for t in texts['train']) < 0.5
    every = texts['train'] + texts['val']
    assert len({' '.join(t.split()[:3]) for t in every}) == len(every) and all(t.startswith(('slim', 'star')) for t in every)
    code = [t.split()[1] for t in texts['train'] if t.startswith('star')]
    assert max(map(code.count, '012')) - min(map(code.count, '012')) < 20            # the languages alternate
    assert sorted(os.listdir(tmp_path / 'out')) == ['meta.json', 'train.bin', 'val.bin']     # and nothing is left of the shards
    prepare(mix, *slim_star, '--out', tmp_path / 'other', '--seed', 1)
    assert contents(tmp_path / 'other')['train'] != texts['train']


def test_a_new_name_for_a_part_of_slimpajama_is_refused(refused):
    row = dict(text='x', meta=dict(redpajama_set_name='RedPajamaC4'))
    assert mix.slimpajama_text(row) == 'x' and abs(sum(mix.SHARES.values()) - 1) < 1e-9
    row['meta']['redpajama_set_name'] = 'RedPajamaGitHub'
    with refused('RedPajamaGitHub'):
        mix.slimpajama_text(row)


def test_a_stop_anywhere_changes_no_byte(slim_star, prepare, tmp_path, monkeypatch, refused, kind):
    encode, done = stream.encode, []

    def count(file, *rest):
        done.append(file)
        return encode(file, *rest)
    monkeypatch.setattr(stream, 'encode', count)
    prepare(mix, *slim_star, '--out', tmp_path / 'whole')
    whole, shards = {f.name: f.read_bytes() for f in (tmp_path / 'whole').iterdir()}, len(done)
    assert shards > 12

    def killed(file, *rest):                         # Ctrl-C, and what a kill leaves: half a shard, perhaps with whole ones after it
        if len(done) == at:
            open(f'{file}.tmp', 'wb').write(b'half')
            raise KeyboardInterrupt
        return count(file, *rest)

    def lost(row):                                   # the connection, at some document
        lost.left -= 1
        if not lost.left:
            raise OSError('connection lost')
        return text(row)
    text = mix.slimpajama_text
    for at in 0, 1, 5, 14:
        done.clear()
        with monkeypatch.context() as m, refused('stopped', 'same command'):
            m.setattr(stream, 'encode', killed)
            prepare(mix, *slim_star, '--out', tmp_path / f'at{at}')
        assert sorted(os.listdir(tmp_path / f'at{at}')) == ['.shards']
        if at < 2:
            lost.left = 30
            with monkeypatch.context() as m, refused('connection lost', 'same command'):
                m.setattr(mix, 'slimpajama_text', lost)
                prepare(mix, *slim_star, '--out', tmp_path / f'at{at}', '--workers', 1)
        with monkeypatch.context() as m:             # room for what is missing is enough: 30,000 tokens of two bytes are written twice
            m.setattr('shutil.disk_usage', lambda path: SimpleNamespace(free=120_000 if at == 0 else 119_000))
            prepare(mix, *slim_star, '--out', tmp_path / f'at{at}', '--workers', 3)
        assert {f.name: f.read_bytes() for f in (tmp_path / f'at{at}').iterdir()} == whole
        # what was there has not been made again, but for a few shards ahead of those that are used
        assert len(done) < shards + 12


def test_splits(prepare, tmp_path, kind, refused, capsys):
    rows = [dict(text=f'{i % 150} {"word " * (i % 150 % 7)}') for i in range(300)] + [dict(text=''), dict(text=None)]
    save(tmp_path / f'web/sample/10BT/000_00000.{kind}', rows)
    flags = '--source', tmp_path / 'web', '--out', tmp_path / 'out', '--val', 0.2, '--tokens'
    prepare(fineweb_edu, *flags, 1000)
    texts = contents(tmp_path / 'out')
    assert texts['train'] + texts['val'] == [r['text'] for r in sorted(rows[:len(sum(texts.values(), []))], key=lambda r: r['text'] in texts['val'])]
    assert 1000 <= io.open_data(tmp_path / 'out', 'train')[1]['train']['tokens'] < 1050
    with refused('web', 'ends after', 'lower --tokens'):
        prepare(fineweb_edu, *flags, 10_000)
    prepare(fineweb_edu, *flags, 3000)               # from the same shards
    texts = contents(tmp_path / 'out')
    assert len(texts['train']) > 150 and not set(texts['train']) & set(texts['val'])     # a copy goes where the first one is
    with refused('val.bin', '--val'):
        prepare(fineweb_edu, *flags, 3000, '--val', 1e-9)


@pytest.mark.parametrize('script, file, meta', [(pg19, 'data/test-00000-of-00001-29a571', 'a book'), (proof_pile, 'test/proofpile_test', None)])
def test_test_sets_for_perplexity(script, file, meta, prepare, tmp_path, kind):
    if script is proof_pile and kind == 'parquet':
        pytest.skip('the data set is jsonl')
    rows = [dict(text=f'{i} {words(random.Random(i), 300)}', meta=meta or [{}, {'a': 1}, {'a': 'x', 'b': [1]}, None][i % 4]) for i in range(20)]
    rows[3]['text'] += '\ud800' if kind != 'parquet' else '?'
    for f in file, file.replace('test', 'train'):
        save(tmp_path / f'source/{f}.{kind}', rows if f == file else rows[:1])
    if kind != 'jsonl' and script is proof_pile or kind == 'parquet':        # only the test set is taken where the layout is that of the hub
        assert len(stream.find(stream.Corpus(tmp_path / 'source', '*/*'), None)) == 2
    else:
        os.remove(tmp_path / f'source/{file.replace("test", "train")}.{kind}')
    prepare(script, '--source', tmp_path / 'source', '--out', tmp_path / 'out')
    texts = contents(tmp_path / 'out')
    rows[3]['text'] = rows[3]['text'].replace('\ud800', '?')
    assert texts == dict(train=[], val=[r['text'] for r in rows])            # all, in order
    data, meta = io.open_data(tmp_path / 'out', 'val')
    assert windows(io.documents(data, meta, 'val'), 256, 64, 1000)          # and extend.py finds its windows
    prepare(script, '--source', tmp_path / 'source', '--out', tmp_path / 'out', '--tokens', 2000)
    assert 0 < len(contents(tmp_path / 'out')['val']) < 5


def test_one_line_each(prepare, tmp_path, kind, refused, monkeypatch):
    save(tmp_path / f'source/a.{kind}', [dict(body='x', meta={'a': 1})])
    save(tmp_path / f'slim/a.{kind}', [dict(text='x', meta='a')])
    (tmp_path / 'none').mkdir()
    out = '--out', tmp_path / 'out'
    for flags, said in ((['--source', tmp_path / 'source'], ['source', 'text']), (['--source', tmp_path / 'none'], ['none', 'no files']),
                        (['--tokens', 0], ['--tokens 0']), (['--workers', 0], ['--workers']), (['--tokenizer', 'gpt5'], ['gpt5']), (['--seed', 0], ['--seed'])):
        with refused(*said):
            prepare(pg19, *out, *flags)
    for flags, said in ((['--val', 0], ['--val 0']), (['--seed', -1], ['--seed -1']), (['--tokens', 10**15], ['GB'])):
        with refused(*said):
            prepare(fineweb_edu, *out, '--source', tmp_path / 'source', *flags)
    with refused('slim', 'meta'):
        prepare(mix, *out, '--slimpajama', tmp_path / 'slim', '--starcoder', tmp_path / 'source', '--tokens', 100)
    if kind != 'parquet':
        page = b'{"text": "x"}\n<html>'
        (tmp_path / f'source/a.{kind}').write_bytes(gzip.compress(page) if kind == 'jsonl.gz' else page)
        with refused('source', 'JSONDecodeError'):
            prepare(pg19, *out, '--source', tmp_path / 'source')
    monkeypatch.setitem(sys.modules, 'datasets', None)
    with refused('pip install datasets'):
        prepare(pg19, *out)


def test_without_network(prepare, tmp_path, refused, monkeypatch):
    pytest.importorskip('datasets')
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    with refused('hoskinson-center/proof-pile', 'network', 'local copy'):
        prepare(proof_pile, '--out', tmp_path)


def test_real_processes(tmp_path):
    pytest.importorskip('datasets')
    rows = [dict(text=f'{i} {words(random.Random(i), 300)}') for i in range(20)]
    save(tmp_path / 'source/test/proofpile_test.jsonl.gz', rows)
    flags = '--source', tmp_path / 'source', '--out', tmp_path / 'out', '--tokenizer', 'bytes', '--workers', '2'
    done = subprocess.run([sys.executable, '-m', 'data.proof_pile.prepare', *flags], capture_output=True, text=True, timeout=100,
                          cwd=os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert contents(tmp_path / 'out') == dict(train=[], val=[r['text'] for r in rows])
