"""
config.json of a Hugging Face folder -> a GPTConfig. What would be another network is refused.
"""
from dataclasses import replace

from data.hf.folder import ARCHITECTURE, NO_ROPE, SHAPE, read_json
from data.hf.scaling import read_scaling
from data.runtime import fail
from model import GPTConfig

# fields that would make it another network, and the values that do not; the first stands for a missing one
PLAIN = dict(
    # what Llama 4 and Command A have beside layers that differ
    num_local_experts=(None,), attention_chunk_size=(None,), logit_scale=(None,),
    model_type=(None, *ARCHITECTURE), architectures=(None, *([name] for name in ARCHITECTURE.values())),
    hidden_act=('silu',), attention_bias=(False,), mlp_bias=(False,), quantization_config=(None,),
    # of RoPE and its scaling
    partial_rotary_factor=(1, None), beta_fast=(32, None), beta_slow=(1, None), truncate=(True, None), mscale=(None,),
    mscale_all_dim=(None,))


def read_config(folder, pe):
    """config.json -> (GPTConfig, temperature, longest length, is the head tied?). pe: 'nope', None: as there."""
    file = f'{folder}/config.json'
    config = read_json(file)
    try:
        return network(config, pe, file)
    except KeyError as e:
        fail(f'{file} lacks {e.args[0]}')
    except (AttributeError, TypeError, ValueError, ArithmeticError, IndexError) as e:
        fail(f'{file} describes no network that can be built ({e})')


def network(config, pe, file):
    """read_config() of what the file holds: KeyError for a field that is missing, others for what makes no sense."""
    rope = config.get('rope_scaling') or config.get('rope_parameters') or {}     # before and since transformers 5
    refuse_others(config, rope, file)
    smollm3 = config.get('model_type') == 'smollm3'
    rotating = rotating_layers(config)
    windows = windows_of_layers(config, rotating, file)
    longest = config['max_position_embeddings']
    shape = read_shape(config, rope, longest, file)
    theta = rope.get('rope_theta') or config.get('rope_theta')
    if not theta:
        theta = 2e6 if smollm3 else 1e4
    configured = configured_pe(rotating[:shape['n_layer']], rope)
    c = GPTConfig(**shape, pe=pe or configured, window=pattern(windows), qk_norm=config.get('model_type') == 'qwen3',
                  norm_eps=float(config.get('rms_norm_eps', 1e-6)), rope_theta=float(theta))
    temperature = 1.0
    if 'rope' in c.layer_pe:
        freq, temperature = read_scaling(c, rope, longest)
        c = replace(c, rope_inv_freq=freq)
    return c, float(temperature), longest, config.get('tie_word_embeddings', smollm3)


def refuse_others(config, rope, file):
    """Ends the program where the fields of config.json, or those of its RoPE scaling, make it another network."""
    for field, fine in PLAIN.items():
        value = {**config, **rope}.get(field, fine[0])
        if value not in fine:
            fail(f'{file}: {field} {value!r} has no counterpart here (only {" or ".join(map(repr, fine))})')
    for value in rope.values():
        if isinstance(value, dict):
            fail(f'{file}: rope_parameters differ between layers; here they are the same in all')
    head_dim = config.get('head_dim')
    if config.get('model_type') == 'qwen3':          # which does not derive it from the other two
        head_dim = config.get('head_dim', 128)
    if head_dim not in (None, config['hidden_size'] / config['num_attention_heads']):
        fail(f'{file}: head_dim {head_dim} is not hidden_size / num_attention_heads, the only head size here')


def rotating_layers(config):
    """Of each layer: 1 with RoPE, 0 without."""
    n_layer = config['num_hidden_layers']
    rotating = [1] * n_layer
    if config.get('model_type') == 'smollm3':
        every = config.get('no_rope_layer_interval', 4)
        rotating = config.get('no_rope_layers')      # in spite of its name 1 is with RoPE
        if not rotating:
            rotating = [int(layer % every > 0) for layer in range(1, n_layer + 1)]
    return rotating


def windows_of_layers(config, rotating, file):
    """Of each layer: how many tokens it sees, 0 for all."""
    window = config.get('sliding_window') or 0
    slides = config.get('use_sliding_window') and window
    if slides and config.get('model_type') != 'smollm3':
        fail(f'{file}: sliding_window is in use, which here only SmolLM3 has')
    by_default = []
    for rotates in rotating:
        kind = 'full_attention'
        if slides and not rotates:
            kind = 'sliding_attention'
        by_default.append(kind)
    kinds = config.get('layer_types') or by_default
    if set(kinds) - {'full_attention', 'sliding_attention'}:
        fail(f'{file}: layer_types {sorted(set(kinds))}: here are only full_attention and sliding_attention')
    windows = []
    for kind in kinds[:config['num_hidden_layers']]:
        windows.append(window if kind == 'sliding_attention' else 0)
    if 'sliding_attention' in kinds and not slides:
        fail(f'{file}: layer_types names sliding_attention, which only SmolLM3 has, with use_sliding_window and '
             'sliding_window')
    return windows


def read_shape(config, rope, longest, file):
    """The fields of GPTConfig that are whole numbers. block_size is the length before any scaling of RoPE."""
    config['num_key_value_heads'] = config.get('num_key_value_heads') or config['num_attention_heads']
    shape = {}
    for ours, theirs in SHAPE.items():
        shape[ours] = config[theirs]
    original = 'original_max_position_embeddings'
    shape['block_size'] = config.get(original) or rope.get(original) or longest
    for name, value in {'max_position_embeddings': longest, **shape}.items():
        if not isinstance(value, int):
            fail(f'{file}: {SHAPE.get(name, name)} {value!r} is not a whole number')
    return shape


def configured_pe(rotating, rope):
    """GPTConfig.pe as config.json has it: nope, rope, or both in turn."""
    words = []
    for rotates in rotating:
        words.append('rope' if rotates else 'nope')
    pe = pattern(words)
    factors = rope.get('long_factor') or [rope.get('factor') or 1]
    if min(factors) >= NO_ROPE:                      # how export.py writes a Qwen3 without RoPE
        pe = 'nope'
    return pe


def pattern(words):
    """[rope, rope, nope, rope, rope] -> 'rope,rope,nope', what repeats over the layers."""
    for n in range(1, len(words) + 1):
        if all(word == words[i % n] for i, word in enumerate(words)):
            return ','.join(map(str, words[:n]))
    return ''
