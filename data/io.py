"""Only while the scripts move to the modules below: their names under the old one."""
from data.checkpoint import check_fits, find_checkpoint, fingerprint, frozen, load_checkpoint, load_model, lock, padded, preflight, save_checkpoint, stem  # noqa: F401
from data.figures import default_lengths, pyplot, read_csv, read_json, write_csv, write_json, write_result  # noqa: F401
from data.runtime import Env, check_fused, choose_dtype, compiled, explain, fail, finish, float_list, int_list, lr_factor, memory, parser, pick_dtype, positive_int, setup  # noqa: F401
from data.tokenizer import Tokenizer, get_tokenizer  # noqa: F401
from data.tokens import DOCS_LISTED, Tokens, anchor, by_length, documents, get_batch, open_data, random_vocab, row_starts, write_data  # noqa: F401
