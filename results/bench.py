"""
Speed of training beside other trainers, and how the cost of each script grows.

    python -m results.bench --nanogpt ~/nanoGPT          # results/speed.csv: a training step of nanoGPT's train.py, of a Hugging Face Llama, of ours
    python -m results.bench --nanogpt ~/nanoGPT --size tinyllama --steps 15              # results/speed-tinyllama.csv: the same at 1.1B, on a GPU of 80 GB
    python -m results.bench --costs                      # results/costs.csv: seconds and memory by length and by model size
    python -m results.bench --costs --preset tinyllama --lengths 2048,4096,8192,16384    # results/costs-tinyllama.csv: of a preset, on a GPU in bf16, compiled
    python -m results.bench --perplexity                 # results/perplexity-speed.csv: measuring perplexity beside bare forward passes (--preset, --lengths)
    python -m results.bench --passkey out/model          # results/passkey-speed.csv: the passkey grid beside transformers' generate

Every contender is a process of its own, in turns, `--rounds` times over; the figure is the median step of a round. All
train on the same tokens, 16 rows of 256 a step, with AdamW, at the same shape and number of parameters (SwiGLU of 8/3 of
the width has as many as nanoGPT's MLP of 4). nanoGPT runs as it comes, on CPU in fp32. --size tinyllama is 22 layers x
2048, 8 rows of 2,048 tokens, 32,000 of them in the vocabulary, ours on random ones; with it come our preset (NoPE, 4 KV heads)
by rows in one forward pass, and where activations are computed twice. 200 steps of head tuning at 16K, 8 rows each, take 1,600 times
what one row costs.
"""
import json
import math
import multiprocessing
import os
import pickle
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from types import SimpleNamespace

import numpy as np
import torch

import eval_passkey
import extend
from data.checkpoint import frozen, load_checkpoint, load_model
from data.figures import default_lengths, read_csv, write_csv
from data.runtime import compiled, fail, int_list, parser, setup
from data.tokenizer import get_tokenizer
from data.hf import convert
from model import GPT, PRESETS, GPTConfig

# layers, heads, width; rows a step, tokens a row
SIZES = dict(tiny=(4, 4, 128, 16, 256), small=(6, 6, 384, 16, 256), tinyllama=(22, 32, 2048, 8, 2048))

HF = '''
import sys, time, numpy as np, torch
from transformers import LlamaConfig, LlamaForCausalLM
device, file, vocab, layers, heads, width, inner, rows, T, steps, amp = *sys.argv[1:3], *map(int, sys.argv[3:])
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(vocab_size=vocab, num_hidden_layers=layers, num_attention_heads=heads, hidden_size=width, intermediate_size=inner, use_cache=False)).to(device)
opt, data, rng = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True), np.fromfile(file, np.uint16), np.random.default_rng(0)
for step in range(steps):
    start = time.time()
    x = torch.from_numpy(np.stack([data[i:i + T] for i in rng.integers(len(data) - T, size=rows)]).astype(np.int64)).to(device)
    with torch.autocast(device, torch.bfloat16, enabled=bool(amp)):
        loss = model(input_ids=x, labels=x).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    opt.step()
    opt.zero_grad(set_to_none=True)
    print(f'loss {loss.item():.3f}, time {1000 * (time.time() - start):.2f}ms', flush=True)
'''


def contenders(args, tmp, size):
    """{name: (command, folder to run it in)} for one size."""
    layers, heads, width, rows, T = SIZES[size]
    inner, steps, large = width * 8 // 3 // 8 * 8, args.steps, size == 'tinyllama'
    vocab, out = 32000 if large else get_tokenizer('passkey').n_vocab, {}
    if args.nanogpt:
        for name, more in {'nanoGPT': '--compile=False', 'nanoGPT, compiled': '--compile=True'}.items():
            out[name] = (f'{sys.executable} train.py --device={args.device} {more} --dataset=nanonope_bench --out_dir={tmp}/nanogpt --eval_interval=1000000 --eval_iters=1 --log_interval=1 --block_size={T} '
                         f'--batch_size={rows} --gradient_accumulation_steps=1 --n_layer={layers} --n_head={heads} --n_embd={width} --dropout=0.0 --max_iters={steps}', args.nanogpt)
    try:
        import transformers                          # noqa: F401 (is it there?)
        for name, amp in {'Hugging Face Llama, fp32': 0, 'Hugging Face Llama, bf16': 1}.items():
            out[name] = f'{sys.executable} -c HF {args.device} {tmp}/data/train.bin {vocab} {layers} {heads} {width} {inner} {rows} {T} {steps} {amp}', '.'
    except ImportError:
        print('no transformers here: no row for the Hugging Face Llama')
    common = f'{sys.executable} train.py --optimizer adamw --out {tmp}/ours --steps {steps} --warmup 2 --batch_tokens {rows * T} --eval_every 1000000 --eval_tokens {T} --log_every 1 --device {args.device} '
    ours = common + f'--micro_batch {rows} --min_length {T} --n_layer {layers} --n_head {heads} --n_kv_head {heads} --n_embd {width} --n_inner {inner} ' + (
        '--preset tinyllama --data random ' if large else f'--preset tiny --no-qk_norm --data {tmp}/data ')
    for name, more in {'ours, fp32': '--pe rope --dtype fp32 --no-compile', 'ours, bf16': '--pe rope --dtype bf16 --no-compile', 'ours, fp32, compiled': '--pe rope --dtype fp32 --compile',
                       'ours, bf16, compiled': '--pe rope --dtype bf16 --compile', 'ours, fp32, Muon': '--pe rope --dtype fp32 --no-compile --optimizer muon', 'ours, fp32, NoPE': '--pe nope --dtype fp32 --no-compile'}.items():
        out[name] = ours + more, '.'
    if large:                                        # fp32 at that size is nobody's choice; what --preset tinyllama trains is
        out = {name: c for name, c in out.items() if 'fp32' not in name}
        for name, more in {f'--preset tinyllama, {n} rows at a time': f'--micro_batch {n}' for n in (4, 8)}.items() | {'--preset tinyllama, 8 rows at a time, activation checkpointing': '--micro_batch 8 --activation_checkpointing'}.items():
            out[name] = f'{common}--preset tinyllama --data random --dtype bf16 --compile {more}', '.'
    return out


def speed(args):
    rows, file = [], f'results/speed{"-tinyllama" * ("tinyllama" in args.size)}.csv'
    others = [r for r in read_csv(file) if r['size'] not in args.size]
    with tempfile.TemporaryDirectory() as tmp:
        subprocess.run([sys.executable, '-m', 'data.passkey.prepare', '--out', f'{tmp}/data', '--tokens', '1000000'], check=True)
        for size in args.size:
            found, log, tokens = {}, {}, SIZES[size][3] * SIZES[size][4]
            if args.nanogpt:
                folder = f'{args.nanogpt}/data/nanonope_bench'
                os.makedirs(folder, exist_ok=True)
                for split in ('train', 'val'):
                    shutil.copyfile(f'{tmp}/data/{split}.bin', f'{folder}/{split}.bin')
                with open(f'{folder}/meta.pkl', 'wb') as f:
                    pickle.dump(dict(vocab_size=32000 if size == 'tinyllama' else get_tokenizer('passkey').n_vocab), f)
            for k in range(args.rounds):
                for name, (command, folder) in contenders(args, tmp, size).items():
                    shutil.rmtree(f'{tmp}/ours', ignore_errors=True)
                    words = [HF if w == 'HF' else w for w in command.split()]
                    done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
                    if done.returncode:              # out of memory, say: the others count all the same
                        print(f'{size}, round {k + 1}, {name}: {done.stderr.strip().splitlines()[-1] if done.stderr.strip() else done.returncode}', flush=True)
                        continue
                    if f'{tmp}/ours' in command:
                        with open(f'{tmp}/ours/log.jsonl') as f:
                            steps = [r for r in map(json.loads, f) if 'tok_s' in r]
                        log[name] = dict(mem_gb=f'{steps[-1]["mem_gb"]:.1f}', mfu=f'{statistics.median(r["mfu"] for r in steps[len(steps) // 3:]):.3f}' if steps[-1]['mfu'] else '')
                        ms = [1000 * tokens / r['tok_s'] for r in steps]
                    else:
                        ms = [float(x) for x in re.findall(r'time ([\d.]+)ms', done.stdout)]
                    found.setdefault(name, []).append(statistics.median(ms[len(ms) // 3:]))      # the first third warms up, or compiles
                    print(f'{size}, round {k + 1}, {name}: {found[name][-1]:.1f} ms', flush=True)
            for name, ms in found.items():
                rows.append(dict(size=size, trainer=name, ms=f'{statistics.median(ms):.1f}', least=f'{min(ms):.1f}', most=f'{max(ms):.1f}', rounds=len(ms), steps=args.steps,
                                 tok_s=f'{1000 * tokens / statistics.median(ms):.0f}', to_nanogpt=f'{statistics.median(found["nanoGPT"]) / statistics.median(ms):.2f}' if 'nanoGPT' in found else '',
                                 **log.get(name, dict(mem_gb='', mfu=''))))
            if rows:
                write_csv(file, sorted(others + rows, key=lambda r: list(SIZES).index(r['size'])))
    return rows


def once(what, length, shape, dtype, answer):
    """In a process of its own: seconds and peak memory of one step, prompt or window of one row; shape: fields of GPTConfig."""
    env = setup(SimpleNamespace(device='auto', dtype=dtype, seed=0))
    torch.manual_seed(0)
    model = GPT(GPTConfig(**shape)).to(env.device) if what == 'train' else frozen(GPT(GPTConfig(**shape)), env)
    tok, ids = get_tokenizer('passkey'), np.random.default_rng(0).integers(101, size=4 * length + 64).astype(np.uint16)
    args = SimpleNamespace(length=length, batch=1, micro_batch=1, seed=0, method='head', lr=0.05, steps=1, focus=True, compile=None, activation_checkpointing=what.endswith('checkpointing'))
    before = torch.cuda.memory_allocated() if 'cuda' in env.device else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def step():
        if what == 'train':
            x = torch.from_numpy(ids[:length + 1].astype(np.int64))[None].to(env.device)
            with env.autocast():
                loss = net(x[:, :-1], x[:, 1:])[1]
            loss.backward()
            opt.step()
        elif what.startswith('tune'):
            extend.tune(model, extend.Corpus(ids, tok.bos), args, env)
        elif what == 'perplexity':
            extend.perplexity(model, [ids], tok.bos, [length], 64, 64, env, length)
        elif what == 'entropy':
            extend.entropies(model, [ids], length, env, samples=1)
        else:
            prompt, answer, _ = eval_passkey.make_prompt(tok, length, 4, 10, np.random.default_rng(0))
            eval_passkey.score(model, [prompt], [answer], env)
    wait = torch.cuda.synchronize if 'cuda' in env.device else lambda: None
    net, opt = compiled(model, args, env), torch.optim.AdamW(model.parameters(), fused=True)
    start, n = time.time(), 0
    step()                                           # compiles on a GPU; on a CPU it counts where it is long
    wait()
    seconds = time.time() - start
    if seconds < 2 or 'cuda' in env.device:
        start = time.time()
        while n < 20 and time.time() - start < 2:
            step()
            wait()
            n += 1
        seconds = (time.time() - start) / n
    peak = torch.cuda.max_memory_allocated() if 'cuda' in env.device else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    answer.put((seconds, (peak - before) / 1e6))


def expected(what, n, shape):
    """Arithmetic of one row of n tokens, but for a constant: (6N + 12 n_layer n_embd T) T; the entropy takes the scores a second time."""
    with torch.device('meta'):
        model = GPT(GPTConfig(**shape))
    return n * (model.flops_per_token(n) + 6 * shape['n_layer'] * shape['n_embd'] * n * (what == 'entropy')), model.num_params()


def costs(args):
    rows, flops, spawn = [], {}, multiprocessing.get_context('spawn')
    whats = ('train', 'tune', 'tune_checkpointing', 'perplexity', 'passkey', 'entropy')
    own = lambda width: dict(vocab_size=101, block_size=256, n_layer=4, n_head=4, n_kv_head=4, n_embd=width, n_inner=width, qk_norm=True)
    shape, dtype, file = (PRESETS[args.preset], 'auto', f'results/costs-{args.preset}.csv') if args.preset else (own(128), 'fp32', 'results/costs.csv')
    grid = [(what, n, shape) for what in whats for n in args.lengths]
    if not args.preset:
        grid += [(what, 1024, own(width)) for what in whats for width in (256, 512)]
    for what, n, shape in grid:
        answer, width = spawn.Queue(), shape['n_embd']
        p = spawn.Process(target=once, args=(what, n, shape, dtype, answer))
        p.start()
        while p.is_alive() and answer.empty():
            time.sleep(0.1)
        if answer.empty():
            print(f'{what} at {n}, width {width}: ended without an answer (out of memory?)', flush=True)
            continue
        seconds, mb = answer.get()
        p.join()
        flops[what, n, width], params = expected(what, n, shape)
        rows.append(dict(what=what, length=n, width=width, params=params, seconds=f'{seconds:.4f}', mb=f'{mb:.1f}'))
        # how it grew from the last one, as the slope in log-log: by length, or where that is the same, by width
        before = [r for r in rows[:-1] if r['what'] == what and (r['width'] == width and r['length'] < n or r['length'] == n and r['width'] < width)]
        exponents = ['', '', '', '']
        if before:
            old = before[-1]
            by = 'length' if old['length'] < n else 'width'
            grew = math.log(rows[-1][by] / old[by])
            exponents = [by] + [f'{math.log(x) / grew:.2f}' for x in (flops[what, n, width] / flops[what, old['length'], old['width']],
                                                                      *(max(float(rows[-1][k]), 1e-9) / max(float(old[k]), 1e-9) for k in ('seconds', 'mb')))]
        rows[-1].update(zip(('grows_by', 'arithmetic_exponent', 'time_exponent', 'memory_exponent'), exponents))
        print(rows[-1], flush=True)
        write_csv(file, rows)
    return rows


def perplexity(args):
    """Seconds of extend.perplexity, and of as many bare forward passes over the same number of windows, in turns."""
    env = setup(SimpleNamespace(device=args.device, dtype='auto' if 'cuda' in args.device else 'fp32', seed=0))
    vocab = 32000 if args.preset else get_tokenizer('passkey').n_vocab
    model, rows = frozen(GPT(GPTConfig(vocab_size=vocab, **PRESETS[args.preset or 'tiny'])), env), []
    wait = torch.cuda.synchronize if 'cuda' in env.device else lambda: None
    for n in args.lengths:
        size, many = max(1, 2**14 // n), max(4, 2**16 // n)          # windows in a forward pass, and in all
        stride = min(256, n // 2)
        ids = np.random.default_rng(0).integers(vocab, size=n + many * stride + 1).astype(np.uint16)
        window = torch.from_numpy(ids[:n].astype(np.int64)).to(env.device).repeat(size, 1)

        @torch.inference_mode()
        def bare():
            for i in range(0, many, size):
                with env.autocast():
                    model(window[:many - i], rows=slice(-1, None))
            wait()
        times = ([], [])
        for k in range(args.rounds + 1):             # the first one warms up
            for t, how in zip(times, (bare, lambda: extend.perplexity(model, [ids], None, [n], stride, many * stride, env, 2**14))):
                start = time.time()
                how()
                t.append(time.time() - start)
        forward, whole = (statistics.median(t[1:]) for t in times)
        rows.append(dict(preset=args.preset or 'tiny', length=n, windows=many, stride=stride, forward_s=f'{forward:.3f}', perplexity_s=f'{whole:.3f}', times=f'{whole / forward:.2f}'))
        print(rows[-1], flush=True)
        write_csv('results/perplexity-speed.csv', rows)
    return rows


def passkey(args):
    """The same prompts through eval_passkey.score, and as the paper has it: one prompt at a time through transformers' generate."""
    try:
        from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM
    except ImportError:
        fail('--passkey measures transformers: pip install transformers')
    env, ckpt = setup(SimpleNamespace(device=args.device, dtype='fp32', seed=0)), load_checkpoint(args.passkey)
    model, tok = load_model(ckpt).to(env.device).eval(), get_tokenizer(ckpt['tokenizer'])
    c = model.config
    if c.qk_norm:                                    # not exported; Qwen3 has it, with a gain of 1 here, and RoPE, which by frequencies of 0 is none
        if c.pe not in ('nope', 'rope') or c.rope_inv_freq or (extend.heads(model) != 1).any() or extend.heads(model, 'slope').any():
            fail(f'{args.passkey}: with QK-norm, transformers knows only nope and rope, not extended')
        theirs = Qwen3ForCausalLM(Qwen3Config(**{hf: getattr(c, ours) for ours, hf in convert.SHAPE.items()}, head_dim=c.n_embd // c.n_head, rms_norm_eps=c.norm_eps, rope_theta=c.rope_theta,
                                              tie_word_embeddings=False, max_position_embeddings=16 * c.block_size, bos_token_id=tok.bos, eos_token_id=None, pad_token_id=None)).to(env.device).eval()
        theirs.load_state_dict({convert.hf_name(k): w for k, w in ckpt['model'].items() if not k.endswith(('.scale', '.slope'))}, strict=False)
        if c.pe == 'nope':
            theirs.model.rotary_emb.inv_freq.zero_()
    else:
        with tempfile.TemporaryDirectory() as tmp:
            convert.write(ckpt, f'{tmp}/hf', 'fp32')
            theirs = AutoModelForCausalLM.from_pretrained(f'{tmp}/hf').to(env.device).eval()
    theirs.generation_config.eos_token_id = None     # or they would stop there, or be kept from it
    file, shape = 'results/passkey-speed.csv', dict(layers=c.n_layer, width=c.n_embd)
    rows = [r for r in read_csv(file) if {k: int(r[k]) for k in shape} != shape]              # of other shapes

    def ours_score(made):
        size = max(1, 2**14 // len(made[0][0] + made[0][1]))
        return [hit for i in range(0, len(made), size) for hit, _ in eval_passkey.score(model, [m[0] for m in made[i:i + size]], [m[1] for m in made[i:i + size]], env)]

    def their_score(made):
        return [int(decoded[len(prompt):] == answer) for (prompt, answer, _), decoded in zip(made, map(their_text, made))]

    def their_text(m):
        x = torch.tensor([m[0]], device=env.device)
        return theirs.generate(x, attention_mask=torch.ones_like(x), max_new_tokens=len(m[1]), do_sample=False)[0].tolist()

    for n in default_lengths(model.config)[1:]:   # half of it may hold no prompt
        made = [eval_passkey.make_prompt(tok, n, d, 10, np.random.default_rng((42, n, d, t))) for t in range(2) for d in range(10)]
        for how in (ours_score, their_score):        # nobody is timed cold
            how(made[:1])
        times, hits = ([], []), [None, None]
        for _ in range(args.rounds):
            for i, how in enumerate((ours_score, their_score)):
                start = time.time()
                hits[i] = how(made)
                times[i].append(time.time() - start)
        ours, other = map(statistics.median, times)
        rows.append(dict(shape, length=n, prompts=len(made), ours_s=f'{ours:.3f}', generate_s=f'{other:.3f}', times=f'{other / ours:.1f}', our_hits=sum(hits[0]), their_hits=sum(hits[1]),
                         decoded_alike=sum(model.generate(torch.tensor([m[0]], device=env.device), len(m[1]), temperature=0)[0].tolist() == their_text(m) for m in made)))
        print(rows[-1], flush=True)
        write_csv(file, rows)
    return rows


def parse_args(argv=None):
    p = parser(__doc__)
    p.add_argument('--passkey', metavar='CKPT', help='the passkey grid of this checkpoint, ours and through transformers, instead of the speed of training')
    p.add_argument('--perplexity', action='store_true', help='measuring perplexity beside bare forward passes, instead of the speed of training')
    p.add_argument('--costs', action='store_true', help='how the cost of each script grows, instead of the speed of training')
    p.add_argument('--preset', choices=PRESETS, help='--costs of this one (default: 4 layers x 128, fp32); --perplexity of this one (default tiny)')
    p.add_argument('--nanogpt', metavar='DIR', help='a clone of nanoGPT; its train.py is run as it is')
    p.add_argument('--size', nargs='+', choices=SIZES, default=['tiny', 'small'])
    p.add_argument('--rounds', type=int, default=3)
    p.add_argument('--steps', type=int, default=30)
    p.add_argument('--lengths', type=int_list, default=[256, 1024, 4096, 16384, 32768])
    p.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    args = p.parse_args(argv)
    if args.rounds < 1 or args.steps < 3:
        fail('--rounds must be at least 1, --steps at least 3')
    if args.preset and not (args.costs or args.perplexity):
        fail('--preset is for --costs and --perplexity; the speed of training takes --size')
    return args


def main(argv=None):
    args = parse_args(argv)
    rows = (passkey if args.passkey else perplexity if args.perplexity else costs if args.costs else speed)(args)
    if not rows:
        fail('nothing was measured: the lines above say why')
    print('\n| ' + ' | '.join(rows[0]) + ' |\n|' + '---|' * len(rows[0]))
    for r in rows:
        print('| ' + ' | '.join(str(v) for v in r.values()) + ' |')


if __name__ == '__main__':
    main()
