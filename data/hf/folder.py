"""
What a Hugging Face folder calls what is ours, and how its json files are read.
"""
import json

import torch

from data.runtime import fail

ARCHITECTURE = dict(llama='LlamaForCausalLM', smollm3='SmolLM3ForCausalLM', qwen3='Qwen3ForCausalLM')   # by model_type
NO_ROPE = 1e12               # RoPE whose frequencies are divided by so much turns nothing
DTYPES = dict(fp32=torch.float32, bf16=torch.bfloat16, fp16=torch.float16)

# fields of GPTConfig and of config.json
SHAPE = dict(vocab_size='vocab_size', n_layer='num_hidden_layers', n_head='num_attention_heads',
             n_kv_head='num_key_value_heads', n_embd='hidden_size', n_inner='intermediate_size')
# what names of weights are made of; what is not here is the same on both sides, as the projections are
WORDS = dict(blocks='layers', attn='self_attn', attn_norm='input_layernorm', mlp_norm='post_attention_layernorm',
             embed='embed_tokens')


def hf_name(name):
    """blocks.0.attn_norm.weight -> model.layers.0.input_layernorm.weight"""
    if name.startswith('lm_head'):
        return name
    words = ['model']
    for word in name.split('.'):
        words.append(WORDS.get(word, word))
    return '.'.join(words)


def read_json(file):
    try:
        with open(file) as f:
            return dict(json.load(f))
    except (OSError, ValueError, TypeError) as e:
        fail(f'{file} cannot be read ({type(e).__name__}: {one_line(e)}): download it again')


def one_line(e):
    return str(e).partition('\n')[0]
