"""
A Hugging Face folder -> a checkpoint.
"""
import os
import zipfile
from dataclasses import asdict

import torch

from data.checkpoint import check_finite_weight, preflight, save_checkpoint
from data.hf.folder import DTYPES, hf_name, read_json
from data.hf.read_config import read_config
from data.runtime import fail
from data.tokenizer import VOCABULARY, fingerprint, keep_files
from model import GPT


def read(folder, out, pe):
    """A Hugging Face folder -> the checkpoint file `out`, and the tokenizer's files in tokenizer/ beside it."""
    folder = os.path.abspath(folder)
    if not out.endswith('.pt'):
        fail(f'{out} must be a file name like out/name/ckpt.pt')
    if os.path.exists(out):
        fail(f'{out} exists already: remove it, or choose another name')
    c, temperature, longest, tied = read_config(folder, pe)
    files = weight_files(folder)
    size = sum(os.path.getsize(file) for file in files)
    out = os.path.join(os.path.dirname(out) or '.', os.path.basename(out))
    preflight(os.path.dirname(out), size)

    temperatures = torch.ones(c.n_layer, c.n_head, dtype=torch.float64)
    for layer, kind in enumerate(c.layer_pe):
        if kind == 'rope':                           # whose scaling brings it along
            temperatures[layer] = temperature
    model = read_model(folder, files, c, temperatures, tied)
    keep_files(f'hf:{folder}', os.path.dirname(out))
    tokenizer = open_tokenizer(folder)
    words = tokenizer and fingerprint(tokenizer.get_vocab())
    # args: what train.py --init_from looks for (whose recipe, where rows begin), and the length that it was made for.
    # Packed chunks as they come, without BOS, are what TinyLlama and the paper's models were trained on
    args = dict(preset='finetune', length=longest, init_from=folder, rows='anywhere', bos=False)
    save_checkpoint(out, dict(model=model, config=asdict(c), optimizer=None, step=0, tokens=0, seed=0, args=args,
                              fingerprint=None, tokenizer=f'hf:{folder}', tokenizer_fingerprint=words, extended=None))
    with torch.device('meta'):
        parameters = GPT(c).num_params()
    said = f'{out}: pe={c.pe}, {c.n_layer} layers, {parameters:,} parameters, training length {c.block_size}'
    if c.rope_inv_freq:
        said += ', scaled RoPE'
    print(f'{said}, tokenizer hf:{folder}')
    bos = tokenizer and (tokenizer.bos_token or tokenizer.eos_token)
    if bos:
        print(f'documents and prompts begin with {bos!r}, its BOS; rows of text are as they come, unless train.py and '
              'extend.py are given --bos')
    elif tokenizer:
        print('note: the tokenizer has neither a BOS nor an EOS, so nothing stands before documents and prompts')
    else:
        print(f'note: no tokenizer of {folder} could be opened, with transformers: text needs --tokenizer hf:DIR, and '
              'whether data belongs to this model cannot be checked')


def read_model(folder, files, c, temperatures, tied):
    """
    -> the weights under our names. Changes what only they tell: the temperatures, which take up the gains of Qwen3's
    norms and the temperatures of Wang et al.'s tuned models, and whether c has a tied head.
    """
    with torch.device('meta'):                       # names and shapes only
        want = GPT(c).state_dict()
    ours = {}                                        # name in the folder -> our name
    for name in want:
        if not name.endswith(('scale', 'slope')):
            ours[hf_name(name)] = name
    layer_of = {f'model.layers.{i}.self_attn.scale_param': i for i in range(c.n_layer)}      # AntNLP/nope_head_scale
    model = {}
    for file in files:
        for name, w in weights(file):
            if name in layer_of:                     # a temperature for each head, in our unit
                check_weight(name, w, (c.n_head,), file)
                temperatures[layer_of[name]] *= w
                continue
            if name.endswith('rotary_emb.inv_freq'):             # old folders store what config.json says
                continue
            if c.qk_norm and name.endswith(('.q_norm.weight', '.k_norm.weight')):
                layer = int(name.split('.')[2])
                temperatures[layer] *= read_gain(name, w, file)
                continue
            if name not in ours:
                fail(f'{file}: weight {name} has no counterpart here')
            check_weight(name, w, want[ours[name]].shape, file)
            model[ours[name]] = w
    if tied and 'embed.weight' in model:
        head = model.setdefault('lm_head.weight', model['embed.weight'])
        c.tie_embeddings = torch.equal(head, model['embed.weight'])      # some folders say tied, and hold two
    if c.tie_embeddings:
        model['lm_head.weight'] = model['embed.weight']                  # in the file they stay one
    missing = [theirs for theirs, name in ours.items() if name not in model]
    if missing:
        names = ', '.join(missing[:3])
        if len(missing) > 3:
            names += ' ...'
        fail(f'{folder} lacks {len(missing)} weights, {names}: download it again')
    for i in range(c.n_layer):
        model[f'blocks.{i}.attn.scale'] = temperatures[i].float()
        model[f'blocks.{i}.attn.slope'] = torch.zeros(c.n_head)
    return {name: model[name] for name in want}


def read_gain(name, w, file):
    """What Qwen3's norm multiplies q or k by; the scores are multiplied by both, as by a temperature."""
    if (w != w[0]).any():
        fail(f'{file}: weight {name} differs between dimensions; QK-norm here has no gain for each')
    return w[0].item()


def check_weight(name, w, shape, file):
    if not torch.is_tensor(w) or w.dtype not in DTYPES.values() or w.shape != shape:
        found = type(w).__name__
        if torch.is_tensor(w):
            found = f'{str(w.dtype).removeprefix("torch.")} {tuple(w.shape)}'
        fail(f'{file}: weight {name} is {found}, not {tuple(shape)} in {", ".join(DTYPES)}: '
             'it does not belong to this config.json')
    check_finite_weight(name, w, file)


# ---------------------------------------------------------------------------------------------------------------------
# the folder's files

def weight_files(folder):
    """The files that hold the weights, one or its shards; safetensors where there are both."""
    for name in ('model.safetensors', 'pytorch_model.bin'):
        if os.path.exists(f'{folder}/{name}'):
            return [f'{folder}/{name}']
        if os.path.exists(f'{folder}/{name}.index.json'):
            shard_of = dict(read_json(f'{folder}/{name}.index.json').get('weight_map') or {})
            files = sorted({f'{folder}/{file}' for file in shard_of.values()})
            for file in files:
                if not os.path.isfile(file):
                    fail(f'{file} is missing, but {name}.index.json names it: download it again')
            return files
    fail(f'{folder} holds no weights: model.safetensors or pytorch_model.bin, or shards of them with their index.json')


def weights(file):
    """(name, tensor) for each weight of a file, read as it is used."""
    try:
        if file.endswith('.safetensors'):
            from safetensors import safe_open
            with safe_open(file, 'pt') as f:
                for name in f.keys():                # noqa: SIM118 (it is no dict)
                    yield name, f.get_tensor(name)
        else:
            zipped = zipfile.is_zipfile(file)        # before torch 1.6 it was a bare pickle, which cannot be mapped
            if zipped:
                bad = zipfile.ZipFile(file).testzip()            # torch.load does not look at the checksums
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
