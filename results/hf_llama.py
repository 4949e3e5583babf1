"""
A plain training loop around the Llama of Hugging Face's transformers, to be raced by bench.py, which starts it by its
path. It uses nothing of this project, and prints the time of each step in the words of nanoGPT.

    python results/hf_llama.py --data data/passkey/train.bin --device cpu --dtype fp32 --vocab 68 \
        --layers 4 --heads 4 --width 128 --inner 336 --rows 16 --length 256 --steps 30
"""
import argparse
import time

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM


def parse_args():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--data', required=True, help='file of token ids, two bytes each')
    p.add_argument('--device', choices=('cpu', 'cuda'), required=True)
    p.add_argument('--dtype', choices=('fp32', 'bf16'), required=True, help='bf16: under autocast')
    for name in ('vocab', 'layers', 'heads', 'width', 'inner', 'rows', 'length', 'steps'):
        p.add_argument(f'--{name}', type=int, required=True)
    return p.parse_args()


def main():
    args = parse_args()
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=args.vocab, num_hidden_layers=args.layers, num_attention_heads=args.heads,
                         hidden_size=args.width, intermediate_size=args.inner, use_cache=False)
    model = LlamaForCausalLM(config).to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    data = np.fromfile(args.data, np.uint16)
    rng = np.random.default_rng(0)
    for _ in range(args.steps):
        start = time.time()
        begins = rng.integers(len(data) - args.length, size=args.rows)
        batch = np.stack([data[begin:begin + args.length] for begin in begins])
        x = torch.from_numpy(batch.astype(np.int64)).to(args.device)         # (B, T)
        with torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == 'bf16'):
            loss = model(input_ids=x, labels=x).loss                         # it shifts the labels itself
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss = loss.item()                           # waits for the GPU, so it comes before the clock is read
        print(f'loss {loss:.3f}, time {1000 * (time.time() - start):.2f}ms', flush=True)


if __name__ == '__main__':
    main()
