"""What eval_passkey.py promises: prompts as described, scores that are those of decoding, a grid that goes on."""
import copy
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CPU, build, check_refused, refused, run, started, table

import eval_passkey
from data import figures
from data.passkey import prepare as passkey
from data.runtime import Env
from data.tokenizer import get_tokenizer

ENV = Env()


def some(*shape):
    return np.random.default_rng(0).integers(50, size=shape).astype(np.uint16)


# ---------------------------------------------------------------------------------------------------------------------
# the grid

GRID = f'--lengths 80,96,130 --depths 3 --trials 2 --batch_tokens 300 {CPU}'


def lengths_in(file):
    return [row[0] for row in table(file)[1]]


class Scored:
    """In place of eval_passkey.score: counts the batches; number `stop` is Ctrl-C."""

    def __init__(self, monkeypatch):
        self.real, self.batches, self.stop = eval_passkey.score, 0, None
        monkeypatch.setattr(eval_passkey, 'score', self)

    def __call__(self, *args):
        self.batches += 1
        if self.batches == self.stop:
            raise KeyboardInterrupt
        return self.real(*args)


def test_a_grid_that_was_stopped_goes_on(trained, tmp_path, monkeypatch):
    run(eval_passkey, GRID, f'--ckpt {trained} --out {tmp_path}/whole')
    scored, file = Scored(monkeypatch), tmp_path / 'a/ckpt.passkey.csv'
    scored.stop = 6                                  # batches of 3, 3; 3, 3; then the second of 2, 2, 2
    with pytest.raises(KeyboardInterrupt):
        run(eval_passkey, GRID, f'--ckpt {trained} --out {tmp_path}/a --resume')         # nothing there: it starts
    assert lengths_in(file) == [80] * 6 + [96] * 6 + [130] * 2
    scored.stop, scored.batches = None, 0
    run(eval_passkey, GRID, f'--ckpt {trained} --out {tmp_path}/a --resume')
    assert scored.batches == 2
    assert file.read_text() == (tmp_path / 'whole/ckpt.passkey.csv').read_text()


@pytest.fixture
def grid(trained, tmp_path):
    """A whole grid -> (its csv, flags that go on with it)."""
    run(eval_passkey, GRID, f'--ckpt {trained} --out {tmp_path}/a')
    return tmp_path / 'a/ckpt.passkey.csv', f'{GRID} --ckpt {trained} --out {tmp_path}/a --resume'


def test_a_grid_grows_by_more_lengths_and_processes(grid, tmp_path):
    file, flags = grid
    started(eval_passkey, flags, '--lengths 150', log=tmp_path / 'log', world=2)
    assert lengths_in(file) == [n for n in (80, 96, 130, 150) for _ in range(6)]


@pytest.mark.parametrize('more', ['--seed 1', '--trials 1', '--depths 4', '--decode'])
def test_a_grid_of_other_flags_is_not_gone_on_with(more, grid):
    file, flags = grid
    before = file.read_text()
    with refused('another checkpoint or other flags', file):
        run(eval_passkey, flags, more)
    assert file.read_text() == before


def test_a_grid_of_another_checkpoint_is_not_gone_on_with(grid, rope, tmp_path):
    file, flags = grid
    before = file.read_text()
    with refused('another checkpoint', file):
        run(eval_passkey, flags, f'--ckpt {rope}')   # of the same name
    assert file.read_text() == before


def test_a_damaged_grid_is_not_gone_on_with(grid):
    file, flags = grid
    file.write_text(file.read_text()[:-20])
    with refused(f'{file} is damaged'):
        run(eval_passkey, flags)


def test_without_resume_a_grid_begins_anew(grid):
    file, flags = grid
    run(eval_passkey, flags.replace('--resume', ''), '--lengths 96,130')
    assert lengths_in(file) == [96] * 6 + [130] * 6


def test_the_grid_before_stays_until_there_is_a_new_row(grid, monkeypatch):
    file, flags = grid
    before = file.read_text()

    def interrupted(*args):
        raise KeyboardInterrupt
    monkeypatch.setattr(eval_passkey, 'score', interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(eval_passkey, flags.replace('--resume', ''), '--lengths 200')
    assert file.read_text() == before


def test_rows_whose_note_was_not_written_are_not_gone_on_with(grid, monkeypatch):
    _, flags = grid

    def killed(*args):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr('data.measure.write_json', killed)
        with pytest.raises(KeyboardInterrupt):
            run(eval_passkey, flags.replace('--resume', ''), '--seed 9')
    for seed in '', '--seed 9':                      # what the note before was of, and what the rows are of
        with refused('leave out --resume'):
            run(eval_passkey, flags, seed)


def test_default_lengths_have_room_for_a_prompt(trained, tmp_path):
    run(eval_passkey, f'--ckpt {trained} --depths 1 --trials 1 --out {tmp_path} {CPU}')
    # half the training length, 32, and the training length, 64, hold none
    assert [r[0] for r in table(tmp_path / 'ckpt.passkey.csv')[1]] == [96, 128, 192, 256, 384, 512]


# ---------------------------------------------------------------------------------------------------------------------
# passkey

@pytest.fixture(params=['passkey', 'bytes'])
def tok(request):
    return get_tokenizer(request.param)


def prompt_of(tok, length, depth, n_depths, seed=0):
    return eval_passkey.make_prompt(tok, length, depth, n_depths, np.random.default_rng(seed))


def shortest(tok):
    with pytest.raises(ValueError) as too_short:
        prompt_of(tok, 10, 0, 1)
    return int(re.search(r'at least (\d+)', str(too_short.value))[1])


def lengths_of(tok):
    return [*range(shortest(tok), shortest(tok) + 50), 2000]


def test_the_shortest_prompt_is_the_one_that_is_named(tok):
    prompt_of(tok, shortest(tok), 0, 1)
    with pytest.raises(ValueError):
        prompt_of(tok, shortest(tok) - 1, 0, 1)


def test_prompt_and_answer_are_exactly_as_long_as_asked(tok):
    for length in lengths_of(tok):
        prompt, answer, _ = prompt_of(tok, length, 1, 4)
        assert len(prompt) + len(answer) == length


def test_a_prompt_tells_its_key_once_and_asks_for_it(tok):
    for length in lengths_of(tok):
        prompt, answer, where = prompt_of(tok, length, 2, 4, length)
        text, key = tok.decode(prompt), tok.decode(answer).strip()
        told = passkey.INFO.format(key=key)
        assert re.fullmatch('[1-9][0-9]{4}', key)
        assert text.count(told) == text.count(passkey.INFO.split('{key}')[0]) == 1
        assert text.count(key) == 2
        assert text.endswith(passkey.QUESTION)
        assert prompt[where:where + len(tok.encode(told))] == tok.encode(told)
        assert prompt[:1 + len(tok.encode(passkey.TASK))] == [tok.bos, *tok.encode(passkey.TASK)]


def test_a_key_stands_between_two_sentences_in_its_part_of_the_garbage(tok):
    sentence, begin = max(len(tok.encode(s)) for s in passkey.GARBAGE), 1 + len(tok.encode(passkey.TASK))
    for length in lengths_of(tok):
        places = []
        for depth in range(4):
            prompt, answer, where = prompt_of(tok, length, depth, 4, length)
            told = passkey.INFO.format(key=tok.decode(answer).strip())
            room = length - begin - len(tok.encode(told)) - len(tok.encode(passkey.QUESTION)) - len(answer)
            places.append(where - begin)
            assert depth / 4 * room - sentence <= places[-1] < (depth + 1) / 4 * room
            assert places[-1] == 0 or tok.decode(prompt).split(told)[0].endswith('.')
        assert places == sorted(places)


def test_keys_lie_all_over_their_part(tok):
    places = {prompt_of(tok, 2000, 1, 4, seed)[2] for seed in range(30)}
    assert len(places) > 10
    assert max(places) - min(places) > 1500 / 8


def test_a_prompt_depends_on_its_seed_only(tok):
    assert prompt_of(tok, 2000, 1, 4, 5) == prompt_of(tok, 2000, 1, 4, 5)
    assert len({tok.decode(prompt_of(tok, 2000, 1, 4, seed)[1]) for seed in range(4)}) > 1


def test_score_is_that_of_greedy_decoding():
    model = build(block_size=200)
    prompts, answers = [some(40 - n).tolist() for n in (5, 3, 5, 5)], []
    for p, n in zip(prompts, (5, 3, 5, 5)):          # what the model itself would say, token by token
        x = list(p)
        for _ in range(n):
            x.append(model(torch.tensor([x]))[0][0, -1].argmax().item())
        answers.append(x[len(p):])
    answers[2][0] = (answers[2][0] + 1) % 50         # misses at the first token, and at the last
    answers[3][-1] = (answers[3][-1] + 1) % 50
    rows = []
    model.lm_head.register_forward_hook(lambda m, x, y: rows.append(x[0].shape[1]))
    plain = eval_passkey.score(model, prompts, answers, ENV)
    assert rows == [5]                               # the answers' rows only
    decoded = eval_passkey.score(model, prompts, answers, ENV, decode=True)
    assert [s[0] for s in plain] == [s[0] for s in decoded] == [1, 1, 0, 0]
    ref = copy.deepcopy(model).double()
    for p, a, (_, logprob) in zip(prompts, answers, plain):
        logp = ref(torch.tensor([p + a[:-1]]))[0][0].log_softmax(-1)
        assert logprob == pytest.approx(sum(logp[len(p) - 1 + i, t].item() for i, t in enumerate(a)), abs=1e-4)


@pytest.mark.parametrize('miss', [None, 0, 2, 4])
def test_oracle(miss):
    answers = torch.randint(50, (6, 5))
    said = answers.clone()
    if miss is not None:
        said[1, miss] = (said[1, miss] + 1) % 50
    oracle = lambda x, rows: (torch.cat((torch.zeros(6, 20, 50), F.one_hot(said, 50) * 100.0), dim=1)[:, rows], None)
    got = eval_passkey.score(oracle, some(6, 15).tolist(), answers.tolist(), ENV)
    assert [a for a, _ in got] == [1, int(miss is None), 1, 1, 1, 1]
    assert [p for _, p in got] == pytest.approx([0, 0 if miss is None else -100, 0, 0, 0, 0], abs=1e-4)


@pytest.mark.parametrize('block_size, marked', [(128, '128'), (200, '128'), (256, '256'), (1000, '512'), (100, None)])
def test_heat_map_marks_the_training_length(block_size, marked):
    grid = [
        dict(length=n, depth=d, trial=t, accuracy=int(n < 500 and t < 2 * d + 1))
        for n in (128, 256, 512)
        for d in (0, 0.5)
        for t in range(2)
    ]
    lines = figures.heat_map(grid, block_size).splitlines()
    assert re.findall(r'(\d+) \|', lines[0]) == ([marked] if marked else [])
    assert len(lines) == 6
    half, full, mean = lines[2:5]
    assert full.count('████') == 2
    assert '█' not in half
    assert half.count(' . ') == full.count(' . ') == 1
    assert re.findall(r'\d+%', mean) == ['75%', '75%', '0%']


@pytest.mark.parametrize(
    'case',
    [
        '--ckpt nowhere : nowhere',
        '--ckpt {corpus}/val.bin : val.bin not a whole',
        '--lengths 96,20 : 20 too short',
        '--out {corpus}/val.bin/x',
        '--depths 0',
        '--trials 0',
        '--seed -1',
        '--batch_tokens 0',
    ],
)
def test_bad_input_of_eval_passkey(case, corpus, trained, tmp_path):
    check_refused(eval_passkey, f'--ckpt {trained} --out {tmp_path}/out {CPU}', case.format(corpus=corpus))
    assert not (tmp_path / 'out').exists()
