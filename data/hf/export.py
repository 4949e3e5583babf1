"""
A checkpoint -> a Hugging Face folder.
"""
import json
import os
import shutil

import torch

from data.checkpoint import load_model, preflight
from data.hf.export_config import generation_config, hf_config, longest, special_ids
from data.hf.export_weights import has_slopes, hf_weights, temperatures_at, written_heads
from data.hf.folder import DTYPES, one_line
from data.runtime import fail
from data.tokenizer import FILES


def write(ckpt, folder, dtype):
    """A checkpoint -> a Hugging Face folder, whole or not at all."""
    folder = os.path.abspath(folder)
    if os.path.exists(folder) and (not os.path.isdir(folder) or os.listdir(folder)):
        fail(f'{folder} exists already: remove it, or choose another name')
    with torch.device('meta'):                       # do the weights fit?
        c = load_model(ckpt).config
    model, n = ckpt['model'], longest(ckpt)
    sloped_at = (ckpt.get('extended') or {}).get('length') or n      # the length that slopes are frozen at
    check_exportable(c, model, sloped_at)
    try:
        from safetensors.torch import save_file
    except ImportError:
        fail('writing model.safetensors needs safetensors: pip install safetensors')

    tied = torch.equal(model['embed.weight'], model['lm_head.weight'])
    sloped = has_slopes(model)
    ids = special_ids(ckpt['tokenizer'], c.vocab_size)
    temperatures = temperatures_at(sloped_at, model, c)
    wide = written_heads(c, temperatures)
    config, with_scaling = hf_config(c, wide, n, tied, dtype, ids)
    size = sum(w.numel() for w in model.values()) * DTYPES[dtype].itemsize
    preflight(os.path.dirname(folder), size * wide.n_embd // c.n_embd)
    for layer, kind in enumerate(c.layer_pe):
        if kind == 'rope':                           # the reader of rope_scaling multiplies by it once more
            temperatures[layer] = temperatures[layer] / torch.tensor(with_scaling)
    state = hf_weights(model, c, wide, temperatures, tied, dtype)

    source = None                                    # a folder with the files of the tokenizer
    if ckpt['tokenizer'].startswith('hf:'):
        source = ckpt['tokenizer'].removeprefix('hf:')
    tmp = os.path.join(os.path.dirname(folder), f'.{os.path.basename(folder)}.tmp')
    try:
        shutil.rmtree(tmp, ignore_errors=True)       # of a run that was killed
        os.mkdir(tmp)
        for name in FILES:
            if source and os.path.isfile(f'{source}/{name}'):
                shutil.copyfile(f'{source}/{name}', f'{tmp}/{name}')
        save_file(state, f'{tmp}/model.safetensors', metadata={'format': 'pt'})
        write_json(f'{tmp}/config.json', config)
        write_json(f'{tmp}/generation_config.json', generation_config(source, ids, n))
        os.replace(tmp, folder)
    except Exception as e:                           # safetensors has errors of its own
        fail(f'could not write {folder} ({one_line(e)}): free some space or choose another folder')
    finally:
        shutil.rmtree(tmp, ignore_errors=True)       # nothing is there any more but after a failure

    said = f'{folder}: {config["architectures"][0]}, {dtype}, max_position_embeddings {n}'
    if c.pe == 'rope' and config['rope_scaling']:
        said += f', RoPE {config["rope_scaling"]["rope_type"]}'
    if sloped:
        said += f'; temperatures as they are at {sloped_at} tokens, at every length'
    if wide is not c:
        said += f'; heads of {wide.head_size} instead of {c.head_size}, which each have a temperature'
    print(said)
    if source is None:
        print(f'note: the tokenizer {ckpt["tokenizer"]} has no files for transformers, so none goes along')
    if 'nope' in c.layer_pe and c.pe != 'rope,rope,rope,nope':           # SmolLM3's own pattern
        rotated = 'every layer of such a Qwen3' if c.qk_norm else 'three of four layers of any SmolLM3'
        print(f'warning: llama.cpp rotates {rotated}, so a GGUF of this folder would be silently wrong')


def check_exportable(c, model, sloped_at):
    """Ends the program where no network of transformers computes what this one does."""
    none = 'has it, so it cannot be exported'
    if not set(c.layer_pe) <= {'rope', 'nope'}:
        fail(f'pe={c.pe}: no architecture of transformers {none}')
    sloped = has_slopes(model)
    if sloped and c.law != 'length':
        fail(f'law {c.law} goes by the position of a query, which no fixed matrix knows: no architecture here {none}')
    if sloped and sloped_at <= c.block_size:
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


def write_json(file, content):
    with open(file, 'w') as f:
        json.dump(content, f, indent=2)
