"""
Prints how a checkpoint continues a text: python model.py out/nope "What is the pass key?" --max_new_tokens 1000
"""
import torch

from data.checkpoint import check_ids, frozen, load_checkpoint, load_model, open_tokenizer
from data.runtime import fail, natural_float, parser, positive_int, setup, share


def parse_args(argv=None):
    p = parser(__doc__)
    p.add_argument('ckpt', help='checkpoint file or run folder')
    p.add_argument('prompt', nargs='?', default='', help='text to go on from (default: none, a new document)')
    p.add_argument('--max_new_tokens', type=positive_int, default=200)
    p.add_argument('--temperature', type=natural_float, default=1.0, help='of sampling; 0: always the likeliest token')
    p.add_argument('--top_k', type=positive_int, help='sample from the k likeliest tokens (default: from all)')
    p.add_argument('--top_p', type=share, help='sample from the likeliest tokens that have this probability together')
    p.add_argument('--tokenizer', help='gpt2, hf:DIR, ... (default: the checkpoint\'s, see data/README.md)')
    p.add_argument('--seed', type=int, default=1337)
    p.add_argument('--device', default='auto', help='auto, cpu, cuda or cuda:N')
    p.set_defaults(dtype='fp32')
    return p.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    env = setup(args)
    ckpt = load_checkpoint(args.ckpt)
    model = frozen(load_model(ckpt), env)
    tokenizer = open_tokenizer(ckpt, model.config, args.tokenizer)
    ids = tokenizer.encode(args.prompt)
    if tokenizer.bos is not None:
        ids = [tokenizer.bos, *ids]
    if not ids:
        fail(f'{args.ckpt}: its tokenizer has no BOS to begin a document with: give a prompt')
    check_ids(ids, model.config, tokenizer)
    if model.config.pe == 'learned' and len(ids) + args.max_new_tokens > model.config.block_size + 1:
        fail(f'pe=learned ends at {model.config.block_size} tokens: lower --max_new_tokens {args.max_new_tokens}')
    torch.manual_seed(args.seed)
    print(args.prompt, end='')
    new, shown = [], 0
    idx = torch.tensor([ids], device=env.device)
    for token in model.continuation(idx, args.max_new_tokens, args.temperature, args.top_k, args.top_p):
        new.append(token.item())
        if new[-1] in (tokenizer.eos, tokenizer.bos):            # the next document, or turn of a chat, begins
            break
        text = tokenizer.decode(new)                 # decoded together: a character may be several tokens
        if not text.endswith('\ufffd'):              # which is half of one
            print(text[shown:], end='', flush=True)
            shown = len(text)
    print()
