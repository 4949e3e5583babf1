"""
config.json and generation_config.json of a checkpoint that becomes a Hugging Face folder.
"""
import os

from data.hf.folder import ARCHITECTURE, DTYPES, NO_ROPE, SHAPE, read_json
from data.hf.scaling import longrope, write_scaling
from data.tokenizer import get_tokenizer

SPECIAL = ('bos_token_id', 'eos_token_id', 'pad_token_id')


def hf_config(c, wide, longest, tied, dtype, ids):
    """
    -> (what config.json holds, the temperature that its RoPE scaling brings along). wide: the GPTConfig of the heads as
    they are written; longest: up to so many tokens; ids: see special_ids().
    """
    kind = model_type(c)
    config = dict(architectures=[ARCHITECTURE[kind]], model_type=kind)
    for ours, theirs in SHAPE.items():
        config[theirs] = getattr(c, ours)
    config.update(
        hidden_act='silu', attention_bias=False, mlp_bias=False, rms_norm_eps=c.norm_eps,
        max_position_embeddings=longest, tie_word_embeddings=tied, rope_theta=c.rope_theta,
        torch_dtype=str(DTYPES[dtype]).removeprefix('torch.'), **ids)
    if kind == 'qwen3':
        config['head_dim'] = wide.head_size
    if longest > c.block_size:
        config['original_max_position_embeddings'] = c.block_size
    temperature = 1.0
    if 'rope' in c.layer_pe:                         # the older names, which all versions read
        config['rope_theta'], config['rope_scaling'], temperature = write_scaling(wide, longest)
    elif kind == 'qwen3':
        # not `linear`, for which vLLM would keep a table of factor x n positions
        config['rope_scaling'] = longrope(c, longest, [NO_ROPE] * (wide.head_size // 2))
    if kind != 'llama':
        kinds = ['sliding_attention' if window else 'full_attention' for window in c.layer_window]
        windows = set(c.layer_window) - {0}          # at most one
        config.update(layer_types=kinds, use_sliding_window=bool(windows), sliding_window=max(windows, default=None))
    if kind == 'smollm3':
        config['no_rope_layers'] = [int(pe == 'rope') for pe in c.layer_pe]              # 0 is without RoPE
    return config, temperature


def model_type(c):
    if c.qk_norm:
        return 'qwen3'
    if c.pe == 'rope' and not any(c.layer_window):
        return 'llama'
    return 'smollm3'


def longest(ckpt):
    """Tokens: the longest length that a checkpoint was trained or extended to."""
    extended = ckpt.get('extended') or {}
    return max(ckpt['config']['block_size'], ckpt['args'].get('length') or 0, extended.get('length') or 0)


def special_ids(tokenizer, vocab_size):
    """The ids for config.json: those of the tokenizer's folder, or the one that begins and so ends a document."""
    ids = dict.fromkeys(SPECIAL)
    folder = tokenizer.removeprefix('hf:')
    if tokenizer.startswith('hf:') and not os.path.isdir(folder):
        print(f'note: {folder} is not there any more, so no tokenizer goes along')
    elif tokenizer.startswith('hf:') and os.path.exists(f'{folder}/config.json'):
        config = read_json(f'{folder}/config.json')
        for name in SPECIAL:
            ids[name] = config.get(name)
        # -1 is seen; with an id outside the vocabulary no model is built
        if not 0 <= (ids['pad_token_id'] or 0) < vocab_size:
            ids['pad_token_id'] = None
    else:
        ids['bos_token_id'] = ids['eos_token_id'] = get_tokenizer(tokenizer).bos
    return ids


def generation_config(source, ids, longest):
    """As in the tokenizer's folder `source` (None: there is none), whose lengths were another model's."""
    config = {}
    if source and os.path.isfile(f'{source}/generation_config.json'):
        config = read_json(f'{source}/generation_config.json')
    lengths = {'max_length': longest} if 'max_length' in config else {}
    for name in ('max_length', 'max_new_tokens', 'pad_token_id'):
        config.pop(name, None)
    named = {name: token for name, token in ids.items() if token is not None}
    return named | config | lengths
