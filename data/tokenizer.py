"""
Tokenizers by name.
"""
import filecmp
import hashlib
import os
import re
import shutil

from data.runtime import fail

# of a Hugging Face folder: all that opens its tokenizer, and says which ids begin and end a text
VOCABULARY = ('tokenizer.json', 'tokenizer.model', 'vocab.json')
FILES = (*VOCABULARY, 'merges.txt', 'tokenizer_config.json', 'special_tokens_map.json', 'added_tokens.json',
         'chat_template.jinja', 'config.json', 'generation_config.json')
LONGEST_BLANK = 900_000      # characters: tiktoken's pattern gives up behind a million of white space


def fingerprint(words):
    """words: {word: id}, or the name of a tokenizer that has only one vocabulary."""
    if isinstance(words, dict):
        words = sorted(words.items())
    return hashlib.sha256(repr(words).encode()).hexdigest()


class Tokenizer:
    """
    encode(text) -> ids, decode(ids) -> text, n_vocab, name, bos (the id that begins a document, or None), eos (the one
    that ends it), fingerprint (of its words and their ids: another tokenizer may have as many).
    """

    def __init__(self, name, n_vocab, bos, encode, decode, eos=None, words=None):
        """words: {word: id}; None where the name says it all."""
        self.name, self.n_vocab, self.bos, self.encode, self.decode = name, n_vocab, bos, encode, decode
        self.eos = bos if eos is None else eos
        self.fingerprint = fingerprint(words or name)


def get_tokenizer(name):
    """
    'bytes', 'passkey' (the synthetic corpus's words), a tiktoken encoding ('gpt2', 'cl100k_base', ...) or 'hf:DIR'.
    Text is only ever text: a special token's name inside a document stays the characters that it is written in.
    """
    if name == 'bytes':
        return of_bytes()
    if name == 'passkey':
        return of_passkey()
    if name.startswith('hf:'):
        return of_hugging_face(name)
    return of_tiktoken(name)


def keep_files(name, out):
    """
    Copies the files of an hf:DIR tokenizer to OUT/tokenizer, where load_checkpoint() finds them, so that a checkpoint
    in OUT opens when DIR is gone.
    """
    if not name.startswith('hf:'):
        return
    folder, kept, tmp = name.removeprefix('hf:'), f'{out}/tokenizer', f'{out}/.tokenizer.tmp'
    files = [file for file in FILES if os.path.isfile(f'{folder}/{file}')]
    vocabulary = [file for file in VOCABULARY if file in files]
    if not vocabulary:
        return
    if os.path.isdir(kept):
        same, _, _ = filecmp.cmpfiles(folder, kept, vocabulary, shallow=False)
        if same != vocabulary:
            fail(f'{kept} holds another tokenizer than {folder}: choose another folder for the checkpoint')
        return
    try:
        shutil.rmtree(tmp, ignore_errors=True)       # of a run that was killed
        os.makedirs(tmp)
        for file in files:
            shutil.copyfile(f'{folder}/{file}', f'{tmp}/{file}')
        os.replace(tmp, kept)
    except OSError as e:
        fail(f'could not save {kept} ({e.strerror}): free some space or choose another folder')


def encode_document(tokenizer, text, name):
    """The ids of a text; where the tokenizer gives up, the program ends with a line that names the document."""
    try:
        return tokenizer.encode(text)
    except (SystemExit, KeyboardInterrupt):
        raise
    except BaseException as e:                       # a panic in Rust is no Exception, nor does it pickle
        fail(f'{name} cannot be tokenised with {tokenizer.name} ({type(e).__name__}: {str(e)[:200]}): leave it out')


def of_bytes():
    def decode(ids):
        return bytes(i for i in ids if i < 256).decode(errors='replace')
    return Tokenizer('bytes', 257, 256, lambda text: list(text.encode()), decode)


def of_passkey():
    from data.passkey.prepare import get_encoding
    enc = get_encoding()

    def encode(text):
        ids = enc.encode_ordinary(text)
        seen = enc.decode(ids)
        if seen != text:                             # words outside the pattern are skipped silently
            at = len(os.path.commonprefix([text, seen]))
            word = text[at:at + 20].partition('\n')[0]
            fail(f'the passkey vocabulary of {enc.n_vocab} words has none for {word!r}')
        return ids
    words = {enc.decode([i]): i for i in range(enc.n_vocab)}
    return Tokenizer('passkey', enc.n_vocab, enc.eot_token, encode, enc.decode, words=words)


def of_hugging_face(name):
    try:
        from transformers import AutoTokenizer
    except ImportError:
        fail('tokenizer hf:DIR needs transformers: pip install transformers')
    folder = os.path.abspath(name.removeprefix('hf:'))
    if not os.path.isdir(folder):
        fail(f'tokenizer {name}: {folder} is not a folder: say where it is now with --tokenizer hf:DIR')
    name = f'hf:{folder}'                            # found from wherever a script is started
    try:
        tok = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as e:                           # every kind of damage has its own
        fail(f'tokenizer {name} cannot be opened ({" ".join(str(e).split())[:200]}): --tokenizer hf:DIR names another')

    def encode(text):
        return tok.encode(text, add_special_tokens=False, split_special_tokens=True)
    if not encode('a word'):
        fail(f'tokenizer {name} makes no token of any word: {folder} lacks its vocabulary (tokenizer.json, '
             'tokenizer.model or vocab.json)')
    bos = tok.eos_token_id if tok.bos_token_id is None else tok.bos_token_id
    return Tokenizer(name, len(tok), bos, encode, tok.decode, tok.eos_token_id, tok.get_vocab())


def of_tiktoken(name):
    import tiktoken
    names = tiktoken.list_encoding_names()
    if name not in names:
        if os.path.isdir(name):
            fail(f'tokenizer {name} is a folder: hf:{name} opens it')
        fail(f'tokenizer {name!r} is unknown: bytes, passkey, hf:DIR or one of {" ".join(names)}')
    try:
        enc = tiktoken.get_encoding(name)
    except Exception as e:                           # whatever its downloader raises without a network
        fail(f'tokenizer {name} could not be loaded ({type(e).__name__}): tiktoken downloads it once; without a '
             'network set TIKTOKEN_CACHE_DIR to a folder that holds it, or use bytes')

    def encode(text):
        ids = []
        for part in between_blanks(text):
            ids += enc.encode_ordinary(part)
        return ids

    def word(i):
        try:
            return enc.decode_single_token_bytes(i)
        except KeyError:                             # an untrained model may say one that the vocabulary leaves out
            return b''

    def decode(ids):
        return b''.join(map(word, ids)).decode(errors='replace')
    return Tokenizer(name, enc.n_vocab, enc.eot_token, encode, decode)


def between_blanks(text):
    """
    The text in parts, for tiktoken gives up on white space of a million characters. Such white space is cut before its
    last character, where the patterns of tiktoken cut it too.
    """
    if len(text) <= LONGEST_BLANK:
        return [text]
    cuts = []
    for blank in re.finditer(r'\s+', text):
        if blank.end() - blank.start() > LONGEST_BLANK and blank.end() < len(text):
            cuts.append(blank.end() - 1)
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)])]
