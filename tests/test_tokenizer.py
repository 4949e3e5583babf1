"""What data/tokenizer.py promises: text comes back as it was, and only ever is text."""
import os
import random
import shutil
import tempfile

import pytest
import tiktoken
from conftest import CPU, TINY, refused, run
from tiktoken_ext import openai_public

import eval_passkey
import extend
import train
from data import sample, tokenizer
from data.passkey import prepare as passkey
from data.tokenizer import get_tokenizer, keep_files
from data.tokens import write_data

TOLD, ASKED = passkey.INFO.format(key=71432), passkey.QUESTION + passkey.ANSWER.format(key=90817)
PROMPT = passkey.TASK + ''.join(passkey.GARBAGE) + TOLD + ASKED


def test_the_passkey_prompt_comes_back_as_it_was():
    tok = get_tokenizer('passkey')
    assert tok.decode(tok.encode(PROMPT)) == PROMPT


def test_every_word_of_the_passkey_corpus_is_one_token():
    tok = get_tokenizer('passkey')
    for word in passkey.WORD.findall(PROMPT) + [f' {digit}' for digit in '0123456789']:
        assert len(tok.encode(word)) == 1, word


def test_a_passkey_document_is_text_of_its_tokenizer():
    tok = get_tokenizer('passkey')
    for ids in passkey.generate(20_000, 8, 1, 512):
        assert tok.encode(tok.decode(ids)) == list(ids)
        assert tok.bos not in ids


@pytest.mark.parametrize('text', ['The sky is mauve.', 'Eve', ' The  sky', 'The sky!', '<|endoftext|>'])
def test_text_outside_the_passkey_vocabulary_is_refused(text):
    with refused('passkey vocabulary'):
        get_tokenizer('passkey').encode(text)


# gpt2's two files, as tiktoken's cache names them: the SHA-1 of their addresses
cache = os.environ.get('TIKTOKEN_CACHE_DIR', os.path.join(tempfile.gettempdir(), 'data-gym-cache'))
gpt2_files = '6c7ea1a7e38e3a7f062df639a5b80947f075ffe6', '6d1cbeee0f20b3d9449abfede4726ed8212e3aee'
gpt2_is_here = all(os.path.exists(f'{cache}/{name}') for name in gpt2_files)
gpt2 = pytest.param('gpt2', marks=pytest.mark.skipif(not gpt2_is_here, reason='gpt2 is not in the cache'))


@pytest.fixture
def tiny_tiktoken(monkeypatch):
    """Single bytes, in the place of an encoding that is downloaded."""
    ranks = {bytes([i]): i for i in range(256)}
    tiny = tiktoken.Encoding('tiny', pat_str=r'(?s:.)', mergeable_ranks=ranks, special_tokens={'<|endoftext|>': 256})
    monkeypatch.setattr(tiktoken, 'list_encoding_names', lambda: ['tiny', 'gpt2'])
    real = tiktoken.get_encoding
    monkeypatch.setattr(tiktoken, 'get_encoding', lambda name: tiny if name == 'tiny' else real(name))


@pytest.mark.parametrize('name', ['bytes', 'tiny', gpt2])
def test_the_names_of_special_tokens_in_a_document_stay_text(name, tiny_tiktoken):
    tok, text = get_tokenizer(name), 'a<|endoftext|>é\r\n\0 <s> <|im_start|>'
    ids = tok.encode(text)
    assert tok.decode(ids) == text
    assert tok.bos not in ids
    assert max(ids) < tok.n_vocab


def test_a_folder_is_named_with_hf(tmp_path):
    with refused(f'hf:{tmp_path} opens it'):
        get_tokenizer(str(tmp_path))


def test_a_folder_does_not_hide_an_encoding_of_its_name(tiny_tiktoken, tmp_path, monkeypatch):
    (tmp_path / 'tiny').mkdir()
    monkeypatch.chdir(tmp_path)
    assert get_tokenizer('tiny').encode('a') == [97]


def test_ids_that_stand_for_no_token_decode_to_nothing(monkeypatch):
    """An untrained model may sample them: cl100k_base leaves some out below its last one, and heads are padded."""
    ranks = {bytes([i]): i for i in range(256)}
    enc = tiktoken.Encoding('tiny', pat_str=r'(?s:.)', mergeable_ranks=ranks, special_tokens={'<|endoftext|>': 300})
    monkeypatch.setattr(tiktoken, 'list_encoding_names', lambda: ['tiny'])
    monkeypatch.setattr(tiktoken, 'get_encoding', lambda name: enc)
    assert get_tokenizer('tiny').decode([97, 258, 98, 100_000]) == 'ab'


@pytest.fixture
def gpt2_pattern(monkeypatch):
    """GPT-2's pattern over bytes and runs of spaces, without its download. -> the encoding of tiktoken"""
    ranks = {bytes([i]): i for i in range(256)}
    ranks.update({b' ' * n: 254 + n for n in range(2, 9)})
    enc = tiktoken.Encoding('like gpt2', pat_str=openai_public.r50k_pat_str, mergeable_ranks=ranks,
                            special_tokens={'<|endoftext|>': 263})
    monkeypatch.setattr(tiktoken, 'list_encoding_names', lambda: ['gpt2'])
    monkeypatch.setattr(tiktoken, 'get_encoding', lambda name: enc)
    return enc


def test_more_than_a_million_spaces_before_a_letter(gpt2_pattern):
    """As in RedPajama: tiktoken alone ends in a panic of Rust, at the same document every time."""
    tok, text = get_tokenizer('gpt2'), ' ' * 1_200_000 + 'a' + '\n' * 1_200_000 + 'b'
    assert tok.decode(tok.encode(text)) == text


def test_what_is_cut_out_of_long_blanks_has_the_same_ids(gpt2_pattern, monkeypatch):
    monkeypatch.setattr(tokenizer, 'LONGEST_BLANK', 3)
    rng = random.Random(1)
    for _ in range(300):
        text = ''.join(rng.choice(['a', "b's", '.', ' ' * rng.randint(1, 20), '\n', '\r\n \t']) for _ in range(30))
        assert get_tokenizer('gpt2').encode(text) == gpt2_pattern.encode_ordinary(text), repr(text)


def words_tokenizer(folder):
    """A tokenizer of transformers over a handful of words, saved in a folder of its own, without config.json."""
    tokenizers, transformers = pytest.importorskip('tokenizers'), pytest.importorskip('transformers')
    words = ['<s>', '</s>', '<unk>', 'the', 'grass', 'is', 'green']
    ids = {word: i for i, word in enumerate(words)}
    tok = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token='<unk>'))
    tok.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = dict(bos_token='<s>', eos_token='</s>', unk_token='<unk>')
    transformers.PreTrainedTokenizerFast(tokenizer_object=tok, **special).save_pretrained(folder)


def test_a_tokenizer_of_transformers(tmp_path):
    words_tokenizer(tmp_path)
    tok = get_tokenizer(f'hf:{tmp_path}')
    assert tok.encode('the grass is green') == [3, 4, 5, 6]
    assert (tok.n_vocab, tok.bos, tok.eos) == (7, 0, 1)


@pytest.fixture
def run_with_words(tmp_path):
    """A run on data of a words_tokenizer, whose folder is tmp_path/words."""
    words_tokenizer(tmp_path / 'words')
    tok = get_tokenizer(f'hf:{tmp_path}/words')
    write_data(tmp_path / 'data', tok, {s: [[3, 4, 5, 6] * 40] * 9 for s in ('train', 'val')}, source='')
    run(train, TINY, '--steps 1 --data', tmp_path / 'data', '--out', tmp_path / 'run')
    return tmp_path


def test_a_checkpoint_opens_when_the_folder_of_its_tokenizer_is_gone(run_with_words, monkeypatch):
    tmp_path = run_with_words
    shutil.rmtree(tmp_path / 'words')
    run(extend, f'--ckpt {tmp_path}/run --data {tmp_path}/data --out {tmp_path}/longer --method uniform --length 128',
        f'--batch 2 --grid 1.2 --eval_tokens 0 --rows anywhere {CPU}')
    run(train, TINY, f'--resume --steps 2 --data {tmp_path}/data --out {tmp_path}/run')
    monkeypatch.chdir(tmp_path)
    for ckpt in 'run', 'longer/uniform-128.pt':
        assert '\nthe grass is' in run(sample, ckpt, ['the grass is'], '--max_new_tokens 2 --device cpu')
    os.rename('run/tokenizer', 'elsewhere')
    with refused('not a folder', '--tokenizer'):
        run(sample, 'run', ['the grass'], '--device cpu')
    said = run(sample, 'run', ['the grass'], '--max_new_tokens 2 --device cpu --tokenizer hf:elsewhere')
    assert '\nthe grass' in said


def test_a_tokenizer_with_other_ids_is_refused(run_with_words):
    tmp_path = run_with_words
    file = tmp_path / 'run/tokenizer/tokenizer.json'
    file.write_text(file.read_text().replace('"grass"', '"trees"'))
    with refused('another tokenizer'):
        run(sample, tmp_path / 'run', ['the trees'], '--device cpu')
    with refused('another tokenizer'):
        run(eval_passkey, f'--ckpt {tmp_path}/run --tokenizer hf:{tmp_path}/run/tokenizer --device cpu')
    with refused('run/tokenizer', 'another tokenizer', 'choose another folder'):
        keep_files(f'hf:{tmp_path}/words', str(tmp_path / 'run'))


@pytest.mark.parametrize('name, words', [('gpt5', ['gpt5', 'bytes']), ('hf:nowhere', ['hf:'])])
def test_an_unknown_tokenizer_is_refused(name, words):
    with refused(*words):
        get_tokenizer(name)
