"""
Tokenizers by name.
"""
import os

from data.runtime import fail


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
