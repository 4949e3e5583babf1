"""
A Hugging Face folder of the Llama family becomes our checkpoint, and a checkpoint of ours becomes such a folder.

    python -m data.hf.convert TinyLlama-1.1B out/tinyllama/ckpt.pt
    python -m data.hf.convert TinyLlama-NoPE-1.1B out/nope/ckpt.pt --pe nope      # the paper's, whose config says Llama
    python -m data.hf.convert out/nope/head-8192.pt export/nope-8k --dtype bf16   # for transformers, vLLM, lm_eval

In: Llama, TinyLlama, SmolLM, SmolLM2, SmolLM3 (mixed or not), Qwen3 with constant gains; config.json with
model.safetensors or pytorch_model.bin, whole or in shards. Weights keep their own precision until a script opens them
in fp32. block_size is the length before any RoPE scaling. --pe nope drops RoPE and its scaling (DroPE). A tied head
stays tied, there and back. Frequencies here do not change with the length of the input, so two scalings are frozen:
`dynamic` as it stands at factor x max_position_embeddings tokens, `longrope` at its long_factor.
Out: rope is a LlamaForCausalLM; nope, both mixed and a window are a SmolLM3ForCausalLM; nope or rope with QK-norm is a
Qwen3ForCausalLM (nope is its RoPE with frequencies divided by 1e12). Temperatures are multiplied into q_proj in fp32,
or into Qwen3's norms; slopes as they stand at the length that the checkpoint was extended to. What no fixed matrix
holds (LongRoPE's n-hat, other encodings) is refused. The tokenizer's files go along where it is hf:DIR.
"""
import json
import math
import os
import shutil
import zipfile
from dataclasses import asdict, replace

import torch

from data.checkpoint import (
    check_finite_weight,
    find_checkpoint,
    load_checkpoint,
    load_model,
    preflight,
    save_checkpoint,
)
from data.positions import ntk, pi, rope_frequencies, yarn
from data.runtime import fail, parser
from data.tokenizer import FILES, VOCABULARY, fingerprint, get_tokenizer, keep_files
from model import GPT, GPTConfig

ARCHITECTURE = dict(llama='LlamaForCausalLM', smollm3='SmolLM3ForCausalLM', qwen3='Qwen3ForCausalLM')   # by model_type
SPECIAL = ('bos_token_id', 'eos_token_id', 'pad_token_id')
NO_ROPE = 1e12               # RoPE whose frequencies are divided by so much turns nothing
SHAPE = dict(vocab_size='vocab_size', n_layer='num_hidden_layers', n_head='num_attention_heads',
             n_kv_head='num_key_value_heads', n_embd='hidden_size', n_inner='intermediate_size')
# fields that would make it another network, and the values that do not; the first stands for a missing one
PLAIN = dict(
    # what Llama 4 and Command A have beside layers that differ
    num_local_experts=(None,), attention_chunk_size=(None,), logit_scale=(None,),
    model_type=(None, *ARCHITECTURE), architectures=(None, *([name] for name in ARCHITECTURE.values())),
    hidden_act=('silu',), attention_bias=(False,), mlp_bias=(False,), quantization_config=(None,),
    # of RoPE and its scaling
    partial_rotary_factor=(1, None), beta_fast=(32, None), beta_slow=(1, None), truncate=(True, None), mscale=(None,),
    mscale_all_dim=(None,))
DTYPES = dict(fp32=torch.float32, bf16=torch.bfloat16, fp16=torch.float16)


HF_NAMES = dict(blocks='layers', attn='self_attn', attn_norm='input_layernorm', mlp_norm='post_attention_layernorm',
                embed='embed_tokens')


def hf_name(name):
    """blocks.0.attn_norm.weight -> model.layers.0.input_layernorm.weight; the projections have the same names."""
    if name.startswith('lm_head'):
        return name
    return '.'.join(['model'] + [HF_NAMES.get(part, part) for part in name.split('.')])


def one_line(e):
    return str(e).partition('\n')[0]


def read_json(file):
    try:
        with open(file) as f:
            return dict(json.load(f))
    except (OSError, ValueError, TypeError) as e:
        fail(f'{file} cannot be read ({type(e).__name__}: {one_line(e)}): download it again')


# ---------------------------------------------------------------------------------------------------------------------
# RoPE scaling, both ways

def read_scaling(c, rope, longest):
    """
    rope_scaling or rope_parameters of a config.json -> (hs/2 inverse frequencies, None where rope_theta gives them;
    temperature on the scores). c: the GPTConfig without scaling; longest: max_position_embeddings, in tokens. The kinds
    are those of transformers' modeling_rope_utils. KeyError, TypeError, ValueError or ArithmeticError for what makes no
    sense.
    """
    kind = rope.get('rope_type', rope.get('type', 'default'))
    L, trained = c.block_size, rope_frequencies(c)
    factor = rope.get('factor') or longest / L
    if kind == 'default':
        return None, 1.0
    if kind == 'linear':
        return pi(c, factor * L)
    if kind == 'dynamic':                            # its s at length l is factor l / L - factor + 1; here l = factor L
        return ntk(c, (factor * factor - factor + 1) * L)
    if kind == 'yarn':
        freq, lam = yarn(c, factor * L)
        if rope.get('attention_factor') is not None:
            lam = rope['attention_factor'] ** 2      # it multiplies q and k
        return freq, lam
    if kind == 'longrope':
        on_each = rope.get('attention_factor') or math.sqrt(1 + math.log(max(1, factor)) / math.log(L))
        return [f / r for f, r in zip(trained, rope['long_factor'], strict=True)], on_each ** 2
    if kind == 'llama3':     # a frequency is kept, divided by factor, or between the two, by the turns that fit into L
        low, high = rope['low_freq_factor'], rope['high_freq_factor']
        freq = []
        for f in trained:
            turns = L * f / (2 * math.pi)
            keep = min(1, max(0, (turns - low) / (high - low)))
            freq.append(f * (keep + (1 - keep) / factor))
        return freq, 1.0
    raise ValueError(f'rope_type {kind!r} is unknown')


def longrope(c, longest, r):
    """The rope_scaling that divides each frequency by its own r. vLLM calls attention_factor short_ and long_mscale."""
    return dict(rope_type='longrope', factor=longest / c.block_size, original_max_position_embeddings=c.block_size,
                short_factor=r, long_factor=r, attention_factor=1.0, short_mscale=1.0, long_mscale=1.0)


def write_scaling(c, longest):
    """
    The inverse, up to `longest` tokens: -> (rope_theta, rope_scaling or None, the temperature that goes with it).
    Takes the first kind that is read back as these frequencies; longrope can name any.
    """
    trained, d, L = rope_frequencies(c), c.n_embd // c.n_head, dict(original_max_position_embeddings=c.block_size)
    freq = c.rope_inv_freq or trained
    tries = [(c.rope_theta, {}), (freq[-1] ** (-d / max(1, d - 2)), {})]         # NTK is another base
    asked, seen = longest / c.block_size, round(trained[-1] / freq[-1], 9)       # what extend.py was asked for, or did
    for s in asked, seen:
        for rope in (dict(rope_type='linear', factor=s), dict(rope_type='yarn', factor=s, **L),
                     dict(rope_type='llama3', factor=s, **L, low_freq_factor=1.0, high_freq_factor=4.0)):
            tries.append((c.rope_theta, rope))
    r = [t / f for t, f in zip(trained, freq)]
    tries.append((c.rope_theta, longrope(c, longest, r)))
    for theta, rope in tries:
        plain = replace(c, rope_theta=theta, rope_inv_freq=None)
        got, lam = read_scaling(plain, rope, longest)
        got = got or rope_frequencies(plain)
        if all(math.isclose(a, b, rel_tol=2e-7) for a, b in zip(freq, got)):     # fp32 has no more
            return theta, rope or None, lam


# ---------------------------------------------------------------------------------------------------------------------
# in

def pattern(words):
    """[rope, rope, nope, rope, rope] -> 'rope,rope,nope', what repeats over the layers."""
    for n in range(1, len(words) + 1):
        if all(word == words[i % n] for i, word in enumerate(words)):
            return ','.join(map(str, words[:n]))
    return ''


def read_config(folder, pe):
    """config.json -> (GPTConfig, temperature, longest length, is the head tied?). pe: 'nope', None: as there."""
    file = f'{folder}/config.json'
    config = read_json(file)
    rope = config.get('rope_scaling') or config.get('rope_parameters') or {}     # before and since transformers 5
    try:
        for field, fine in PLAIN.items():
            value = {**config, **rope}.get(field, fine[0])
            if value not in fine:
                fail(f'{file}: {field} {value!r} has no counterpart here (only {" or ".join(map(repr, fine))})')
        if any(isinstance(v, dict) for v in rope.values()):
            fail(f'{file}: rope_parameters differ between layers; here they are the same in all')
        qwen3 = config.get('model_type') == 'qwen3'
        head_dim = config.get('head_dim', 128 if qwen3 else None)
        if head_dim not in (None, config['hidden_size'] / config['num_attention_heads']):
            fail(f'{file}: head_dim {head_dim} is not hidden_size / num_attention_heads, '
                 'the only head size here')
        smollm3 = config.get('model_type') == 'smollm3'
        n = config['num_hidden_layers']
        with_rope = [1] * n                          # of each layer: 1 with RoPE, 0 without
        if smollm3:
            every = config.get('no_rope_layer_interval', 4)
            with_rope = config.get('no_rope_layers') or [int((i + 1) % every > 0) for i in range(n)]
        window = config.get('sliding_window') or 0
        slides = config.get('use_sliding_window') and window
        if slides and not smollm3:
            fail(f'{file}: sliding_window is in use, which here only SmolLM3 has')
        by_default = ['full_attention' if rotates or not slides else 'sliding_attention' for rotates in with_rope]
        kinds = config.get('layer_types') or by_default
        if set(kinds) - {'full_attention', 'sliding_attention'}:
            fail(f'{file}: layer_types {sorted(set(kinds))}: here are only full_attention and sliding_attention')
        windows = [window if kind == 'sliding_attention' else 0 for kind in kinds[:n]]
        if 'sliding_attention' in kinds and not slides:
            fail(f'{file}: layer_types names sliding_attention, which only SmolLM3 has, with use_sliding_window and '
                 'sliding_window')
        config['num_key_value_heads'] = config.get('num_key_value_heads') or config['num_attention_heads']
        longest = config['max_position_embeddings']
        shape = {ours: config[theirs] for ours, theirs in SHAPE.items()}
        original = 'original_max_position_embeddings'
        shape['block_size'] = config.get(original) or rope.get(original) or longest
        for name, value in {'max_position_embeddings': longest, **shape}.items():
            if not isinstance(value, int):
                fail(f'{file}: {SHAPE.get(name, name)} {value!r} is not a whole number')
        theta = rope.get('rope_theta') or config.get('rope_theta') or (2e6 if smollm3 else 1e4)
        as_configured = pattern(['rope' if rotates else 'nope' for rotates in with_rope[:n]])
        if min(rope.get('long_factor') or [rope.get('factor') or 1]) >= NO_ROPE:
            as_configured = 'nope'
        c = GPTConfig(**shape, pe=pe or as_configured, window=pattern(windows), qk_norm=qwen3,
                      norm_eps=float(config.get('rms_norm_eps', 1e-6)), rope_theta=float(theta))
        freq, lam = None, 1.0
        if 'rope' in c.layer_pe:
            freq, lam = read_scaling(c, rope, longest)
        return replace(c, rope_inv_freq=freq), float(lam), longest, config.get('tie_word_embeddings', smollm3)
    except KeyError as e:
        fail(f'{file} lacks {e.args[0]}')
    except (AttributeError, TypeError, ValueError, ArithmeticError, IndexError) as e:
        fail(f'{file} describes no network that can be built ({e})')


def weight_files(folder):
    """The files that hold the weights, one or its shards; safetensors where there are both."""
    for name in ('model.safetensors', 'pytorch_model.bin'):
        if os.path.exists(f'{folder}/{name}'):
            return [f'{folder}/{name}']
        if os.path.exists(f'{folder}/{name}.index.json'):
            shard_of = dict(read_json(f'{folder}/{name}.index.json').get('weight_map') or {})
            files = sorted({f'{folder}/{f}' for f in shard_of.values()})
            for f in files:
                if not os.path.isfile(f):
                    fail(f'{f} is missing, but {name}.index.json names it: download it again')
            return files
    fail(f'{folder} holds no weights: model.safetensors or pytorch_model.bin, or shards of them with their index.json')


def weights(file):
    """(name, tensor) for each weight of a file, read as it is used."""
    try:
        if file.endswith('.safetensors'):
            from safetensors import safe_open
            with safe_open(file, 'pt') as f:
                for k in f.keys():                   # noqa: SIM118 (it is no dict)
                    yield k, f.get_tensor(k)
        else:
            zipped = zipfile.is_zipfile(file)        # before torch 1.6 it was a bare pickle, which cannot be mapped
            bad = zipfile.ZipFile(file).testzip() if zipped else None    # torch.load does not look at the checksums
            if bad:
                fail(f'{file} is damaged (checksum of {bad}): download it again')
            yield from torch.load(file, map_location='cpu', weights_only=True, mmap=zipped).items()
    except ImportError:
        fail(f'{file} needs safetensors: pip install safetensors')
    except Exception as e:                           # every kind of damage has its own
        if 'weights_only' in str(e).lower():
            fail(f'{file} would run code when loaded: get it as safetensors')
        fail(f'{file} is no whole file of weights ({type(e).__name__}): download it again')


def open_tokenizer(folder):
    """The folder's tokenizer; None where none can be opened (it may come later), or without transformers."""
    if not any(os.path.isfile(f'{folder}/{file}') for file in VOCABULARY):
        return None                                  # transformers would make an empty one
    try:
        from transformers import AutoTokenizer
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception:                                # every kind of folder has its own
        return None


def read(folder, out, pe):
    """A Hugging Face folder -> the checkpoint file `out`, and the tokenizer's files in tokenizer/ beside it."""
    folder = os.path.abspath(folder)
    if not out.endswith('.pt'):
        fail(f'{out} must be a file name like out/name/ckpt.pt')
    if os.path.exists(out):
        fail(f'{out} exists already: remove it, or choose another name')
    c, lam, longest, tied = read_config(folder, pe)
    files, model = weight_files(folder), {}
    # of all heads of a layer: the temperature that comes with RoPE's scaling, times Qwen3's gains
    gains = [lam if kind == 'rope' else 1.0 for kind in c.layer_pe]
    with torch.device('meta'):                       # names and shapes only
        want = {k: v.shape for k, v in GPT(c).state_dict().items()}
    ours = {hf_name(k): k for k in want if not k.endswith(('scale', 'slope'))}
    out = os.path.join(os.path.dirname(out) or '.', os.path.basename(out))
    preflight(os.path.dirname(out), sum(os.path.getsize(f) for f in files))
    for file in files:
        for name, w in weights(file):
            if name.endswith('rotary_emb.inv_freq'):             # old folders store what config.json says
                continue
            if c.qk_norm and name.endswith(('.q_norm.weight', '.k_norm.weight')):
                if (w != w[0]).any():
                    fail(f'{file}: weight {name} differs between dimensions; QK-norm here has no gain for each')
                gains[int(name.split('.')[2])] *= w[0].item()
                continue
            if name not in ours:
                fail(f'{file}: weight {name} has no counterpart here')
            shape = want[ours[name]]
            if not torch.is_tensor(w) or w.dtype not in DTYPES.values() or w.shape != shape:
                found = type(w).__name__
                if torch.is_tensor(w):
                    found = f'{str(w.dtype).removeprefix("torch.")} {tuple(w.shape)}'
                fail(f'{file}: weight {name} is {found}, not {tuple(shape)} in {", ".join(DTYPES)}: '
                     'it does not belong to this config.json')
            check_finite_weight(name, w, file)
            model[ours[name]] = w
    if tied and 'embed.weight' in model:
        head = model.setdefault('lm_head.weight', model['embed.weight'])
        c.tie_embeddings = torch.equal(head, model['embed.weight'])      # some folders say tied, and hold two
    if c.tie_embeddings:
        model['lm_head.weight'] = model['embed.weight']                  # in the file they stay one
    missing = [name for name, k in ours.items() if k not in model]
    if missing:
        more = ' ...' if len(missing) > 3 else ''
        fail(f'{folder} lacks {len(missing)} weights, {", ".join(missing[:3])}{more}: download it again')
    for i in range(c.n_layer):
        model[f'blocks.{i}.attn.scale'] = torch.full((c.n_head,), gains[i])
        model[f'blocks.{i}.attn.slope'] = torch.zeros(c.n_head)
    keep_files(f'hf:{folder}', os.path.dirname(out))
    tokenizer = open_tokenizer(folder)
    # args: what train.py --init_from looks for (whose recipe, where rows begin), and the length that it was made for.
    # Packed chunks as they come, without BOS, are what TinyLlama and the paper's models were trained on
    args = dict(preset='finetune', length=longest, init_from=folder, rows='anywhere', bos=False)
    save_checkpoint(out, dict(model={k: model[k] for k in want}, config=asdict(c), optimizer=None, step=0, tokens=0,
                              seed=0, args=args, fingerprint=None, tokenizer=f'hf:{folder}',
                              tokenizer_fingerprint=tokenizer and fingerprint(tokenizer.get_vocab()), extended=None))
    with torch.device('meta'):
        parameters = GPT(c).num_params()
    scaled = ', scaled RoPE' if c.rope_inv_freq else ''
    print(f'{out}: pe={c.pe}, {c.n_layer} layers, {parameters:,} parameters, training length {c.block_size}{scaled}, '
          f'tokenizer hf:{folder}')
    if tokenizer:
        bos = tokenizer.bos_token or tokenizer.eos_token
        print(f'documents and prompts begin with {bos!r}, its BOS; rows of text are as they come, unless train.py and '
              'extend.py are given --bos')


# ---------------------------------------------------------------------------------------------------------------------
# out

def generation_config(source, ids, longest):
    """As in the tokenizer's folder `source`, whose lengths were another model's."""
    config = {}
    if os.path.isfile(f'{source}/generation_config.json'):
        config = read_json(f'{source}/generation_config.json')
    for name in ('max_length', 'max_new_tokens', 'pad_token_id'):
        config.pop(name, None)
    named = {k: v for k, v in ids.items() if v is not None}
    return {**named, **config, 'max_length': longest}


def special_ids(tokenizer, vocab_size):
    """The ids for config.json: those of the tokenizer's folder, or the one that begins and so ends a document."""
    folder, ids = tokenizer.removeprefix('hf:'), dict.fromkeys(SPECIAL)
    if tokenizer.startswith('hf:') and not os.path.isdir(folder):
        print(f'note: {folder} is not there any more, so no tokenizer goes along')
    elif tokenizer.startswith('hf:') and os.path.exists(f'{folder}/config.json'):
        ids.update({k: v for k, v in read_json(f'{folder}/config.json').items() if k in ids})
        # -1 is seen; with an id outside the vocabulary no model is built
        if not 0 <= (ids['pad_token_id'] or 0) < vocab_size:
            ids['pad_token_id'] = None
    else:
        ids['bos_token_id'] = ids['eos_token_id'] = get_tokenizer(tokenizer).bos
    return ids


def longest(ckpt):
    """Tokens: the longest length that a checkpoint was trained or extended to."""
    extended = ckpt.get('extended') or {}
    return max(ckpt['config']['block_size'], ckpt['args'].get('length') or 0, extended.get('length') or 0)


def doubled_heads(c):
    """The GPTConfig of heads twice as wide, whose RoPE turns the first half of its pairs as c's turns all of them."""
    wide = replace(c, n_embd=2 * c.n_embd, rope_theta=c.rope_theta ** 2, rope_inv_freq=None)
    if c.rope_inv_freq:
        last = c.rope_inv_freq[-1] / rope_frequencies(c)[-1]
        rest = rope_frequencies(wide)[len(c.rope_inv_freq):]             # nothing is there to turn
        wide = replace(wide, rope_inv_freq=c.rope_inv_freq + [f * last for f in rest])
    return wide


def fold_into_norms(model, attn, lam, c, wide):
    """
    Temperatures lam (nh,) of a layer with QK-norm, which would undo them in q_proj. The gains of Qwen3's norm come
    after it and are shared by all heads of a layer: they take a temperature that all share. Where they differ, heads
    become twice as wide. Of b q and a q side by side, with b^2 + a^2 = 2, the root mean square is that of q; keys are 0
    beside a q, and so b alone is left in the scores, another one for each head.
    """
    width, most = wide.n_embd // wide.n_head, lam.abs().max().clamp(min=1e-6)
    model[f'{attn}.k_norm.weight'] = torch.ones(width)
    if wide is c:
        model[f'{attn}.q_norm.weight'] = torch.full((width,), lam[0])
        return
    model[f'{attn}.q_norm.weight'] = torch.full((width,), most)
    b = lam / most

    def side_by_side(name, first, second):
        w = model[f'{attn}.{name}_proj.weight'].float()
        if name == 'o':                              # its columns are the heads
            w = w.T
        # RoPE's pairs (m, m + hs/2) become (m, m + hs)
        w = w.reshape(-1, 2, width // 4, c.n_embd)   # (heads, 2, hs/2, C)
        w = torch.cat((w * first, w * second), dim=2).reshape(-1, c.n_embd)
        model[f'{attn}.{name}_proj.weight'] = w.T if name == 'o' else w

    side_by_side('q', b[:, None, None, None], (2 - b * b).sqrt()[:, None, None, None])
    side_by_side('k', math.sqrt(2), 0)               # its root mean square is that of k, too
    side_by_side('v', 1, 0)
    side_by_side('o', 1, 0)


def write(ckpt, folder, dtype):
    """A checkpoint -> a Hugging Face folder, whole or not at all."""
    folder = os.path.abspath(folder)
    if os.path.exists(folder) and (not os.path.isdir(folder) or os.listdir(folder)):
        fail(f'{folder} exists already: remove it, or choose another name')
    with torch.device('meta'):                       # do the weights fit?
        c = load_model(ckpt).config
    model, none = ckpt['model'], 'has it, so it cannot be exported'
    if not set(c.layer_pe) <= {'rope', 'nope'}:
        fail(f'pe={c.pe}: no architecture of transformers {none}')
    n, sloped = longest(ckpt), any(model[k].any() for k in model if k.endswith('.slope'))
    if sloped and c.law != 'length':
        fail(f'law {c.law} goes by the position of a query, which no fixed matrix knows: no architecture here {none}')
    if sloped and n <= c.block_size:
        fail(f'slope: the temperatures of this checkpoint go by the length, and it knows none past {c.block_size} to '
             'be frozen at: convert the one that extend.py wrote')
    if c.qk_norm == 'full':
        fail(f'qk_norm=full, over all heads together: no architecture of transformers {none}')
    if 'rope' in c.layer_pe and c.rope_fraction < 1:
        fail(f'rope_fraction {c.rope_fraction:g} (p-RoPE): no architecture here {none}')
    windows = set(c.layer_window) - {0}
    if len(windows) > 1:
        fail(f'window {c.window}: SmolLM3 has one for all layers that have one, so it cannot be exported')
    if c.qk_norm and (windows or len(set(c.layer_pe)) > 1):
        fail(f'qk_norm with layers that differ: no architecture of transformers {none}')
    if 'rope' in c.layer_pe and c.rope_inv_freq and c.rope_start:
        fail(f'rope_start {c.rope_start} (LongRoPE\'s n-hat): no architecture of transformers {none}')
    try:
        from safetensors.torch import save_file
    except ImportError:
        fail('writing model.safetensors needs safetensors: pip install safetensors')
    kind = 'llama' if c.pe == 'rope' and not windows else 'smollm3'
    if c.qk_norm:
        kind = 'qwen3'
    tied = torch.equal(model['embed.weight'], model['lm_head.weight'])
    shape = {theirs: getattr(c, ours) for ours, theirs in SHAPE.items()}
    config = dict(
        architectures=[ARCHITECTURE[kind]], model_type=kind, **shape, hidden_act='silu', attention_bias=False,
        mlp_bias=False, rms_norm_eps=c.norm_eps, max_position_embeddings=n, tie_word_embeddings=tied,
        rope_theta=c.rope_theta, torch_dtype=str(DTYPES[dtype]).removeprefix('torch.'),
        **special_ids(ckpt['tokenizer'], c.vocab_size))
    scale, state = {}, {}
    for k in model:
        if k.endswith('.scale'):
            scale[k] = model[k] + model[k.replace('scale', 'slope')] * math.log(n / c.block_size)
            if c.qk_gain:
                scale[k] = scale[k] * model[k.replace('scale', 'gain')]
    alike = all((lam == lam[0]).all() for lam in scale.values())         # all heads of a layer
    wide = c
    if c.qk_norm:
        if c.n_embd // c.n_head % 2:
            fail(f'head size {c.n_embd // c.n_head} is odd: Qwen3 rotates pairs')
        if not alike:
            wide = doubled_heads(c)
        config.update(head_dim=wide.n_embd // wide.n_head)
    lam = 1.0                                        # the temperature that comes with RoPE's scaling
    if n > c.block_size:
        config['original_max_position_embeddings'] = c.block_size
    if 'rope' in c.layer_pe:                         # the older names, which all versions read
        config['rope_theta'], config['rope_scaling'], lam = write_scaling(wide, n)
    elif c.qk_norm:
        # not `linear`, for which vLLM would keep a table of factor x n positions
        config['rope_scaling'] = longrope(c, n, [NO_ROPE] * (config['head_dim'] // 2))
    if kind != 'llama':
        kinds = ['sliding_attention' if window else 'full_attention' for window in c.layer_window]
        config.update(layer_types=kinds, use_sliding_window=bool(windows), sliding_window=max(windows, default=None))
    if kind == 'smollm3':
        config['no_rope_layers'] = [int(pe == 'rope') for pe in c.layer_pe]              # 0 is without RoPE
    size = sum(w.numel() for w in model.values()) * DTYPES[dtype].itemsize
    preflight(os.path.dirname(folder), size * wide.n_embd // c.n_embd)

    if c.qk_norm:
        for i in range(c.n_layer):
            fold_into_norms(model, f'blocks.{i}.attn', scale[f'blocks.{i}.attn.scale'] / torch.tensor(lam), c, wide)
    for k in list(model):
        w = model.pop(k)                             # one copy at a time
        if k.endswith(('.scale', '.slope', '.gain')) or k.startswith('pos_') or (tied and k == 'lm_head.weight'):
            continue
        if k.endswith('q_proj.weight') and not c.qk_norm:        # 1.0 changes no bit
            fold = scale[k.replace('q_proj.weight', 'scale')]                # (nh,), fp32
            if c.layer_pe[int(k.split('.')[1])] == 'rope':
                fold = fold / torch.tensor(lam)
            w = (w.float().view(c.n_head, -1, c.n_embd) * fold[:, None, None]).view(w.shape)
        state[hf_name(k)] = w.to(DTYPES[dtype]).contiguous()
        if not state[hf_name(k)].isfinite().all():
            fail(f'weight {k} does not fit into {dtype}: give --dtype bf16 or fp32')
    tmp = os.path.join(os.path.dirname(folder), f'.{os.path.basename(folder)}.tmp')
    try:
        shutil.rmtree(tmp, ignore_errors=True)       # of a run that was killed
        os.mkdir(tmp)
        source = ckpt['tokenizer'].removeprefix('hf:')
        if not ckpt['tokenizer'].startswith('hf:'):
            source = None
        for name in FILES:
            if source and os.path.isfile(f'{source}/{name}'):
                shutil.copyfile(f'{source}/{name}', f'{tmp}/{name}')
        save_file(state, f'{tmp}/model.safetensors', metadata={'format': 'pt'})
        ids = {name: config[name] for name in SPECIAL}
        for file, content in ('config', config), ('generation_config', generation_config(source, ids, n)):
            with open(f'{tmp}/{file}.json', 'w') as f:
                json.dump(content, f, indent=2)
        os.replace(tmp, folder)
    except Exception as e:                           # safetensors has errors of its own
        fail(f'could not write {folder} ({one_line(e)}): free some space or choose another folder')
    finally:
        shutil.rmtree(tmp, ignore_errors=True)       # nothing is there any more but after a failure
    said = f'{folder}: {ARCHITECTURE[kind]}, {dtype}, max_position_embeddings {n}'
    if c.pe == 'rope' and config['rope_scaling']:
        said += f', RoPE {config["rope_scaling"]["rope_type"]}'
    if sloped:
        said += f'; temperatures as they are at {n} tokens, at every length'
    if wide is not c:
        said += f'; heads of {config["head_dim"]} instead of {c.n_embd // c.n_head}, which each have a temperature'
    print(said)
    if source is None:
        print(f'note: the tokenizer {ckpt["tokenizer"]} has no files for transformers, so none goes along')
    if 'nope' in c.layer_pe and c.pe != 'rope,rope,rope,nope':           # SmolLM3's own pattern
        rotated = dict(smollm3='three of four layers of any SmolLM3', qwen3='every layer of such a Qwen3')[kind]
        print(f'warning: llama.cpp rotates {rotated}, so a GGUF of this folder would be silently wrong')


def parse_args(argv=None):
    p = parser(__doc__)
    p.add_argument('source', help='a Hugging Face folder, or a checkpoint (a file or a run\'s folder)')
    p.add_argument('out', help='the checkpoint to write (out/name/ckpt.pt), or the folder')
    p.add_argument('--pe', choices=('nope',), help='in: drop RoPE from every layer')
    p.add_argument('--dtype', choices=DTYPES, help='out: precision of the weights (default fp32)')
    return p.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    if args.source.endswith('.gguf'):
        fail(f'{args.source}: transformers makes a folder of it that is read here: AutoModelForCausalLM and '
             'AutoTokenizer.from_pretrained(DIR, gguf_file=NAME), then save_pretrained(FOLDER) of both')
    if os.path.exists(f'{args.source}/config.json'):
        if args.dtype:
            fail('--dtype is for writing a Hugging Face folder; a checkpoint keeps the weights as they are')
        read(args.source.rstrip('/'), args.out, args.pe)
    else:
        if args.pe:
            fail('--pe is for reading a Hugging Face folder; to drop RoPE from a checkpoint: train.py --init_from')
        if not find_checkpoint(args.source):
            fail(f'{args.source} is neither a Hugging Face folder (with config.json; hf download NAME --local-dir DIR '
                 'gets one) nor a checkpoint')
        if args.out.endswith(('.pt', '.bin', '.safetensors', '.gguf')):
            fail(f'{args.out}: a checkpoint becomes a Hugging Face folder, so name a folder')
        write(load_checkpoint(args.source), args.out, args.dtype or 'fp32')


if __name__ == '__main__':
    main()
