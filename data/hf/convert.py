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
import os

from data.checkpoint import find_checkpoint, load_checkpoint
from data.hf.export import write
from data.hf.folder import DTYPES
from data.hf.read import read
from data.runtime import fail, parser


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
        if not find_checkpoint(args.source):
            fail(f'{args.source} is neither a Hugging Face folder (with config.json; hf download NAME --local-dir DIR '
                 'gets one) nor a checkpoint')
        if args.pe:
            fail('--pe is for reading a Hugging Face folder; to drop RoPE from a checkpoint: train.py --init_from')
        if args.out.endswith(('.pt', '.bin', '.safetensors', '.gguf')):
            fail(f'{args.out}: a checkpoint becomes a Hugging Face folder, so name a folder')
        write(load_checkpoint(args.source), args.out, args.dtype or 'fp32')


if __name__ == '__main__':
    main()
