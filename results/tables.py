"""
What the sweep measures, as data: corpora, training runs, the rows of each table, scales. results/reproduce.py makes
commands of it.

Options are the flags of a script: dict(steps=600, qk_norm=False) is --steps 600 --no-qk_norm. Where dicts are joined
with |, the right one wins. Lengths are given as multiples of the training length, by which `times` is meant.
"""
from dataclasses import dataclass, field

from model import ENCODINGS


@dataclass(frozen=True)
class Run:
    """A training run: options of train.py, the corpus, the run whose weights it starts from (None: from scratch)."""
    options: dict
    corpus: str = 'passkey'
    start: str = None


@dataclass(frozen=True)
class Row:
    """
    A row of a table: a run, extended by a method of extend.py with these options (None: the run as it is) on a corpus,
    at `times` the training length (None: at what the scale says), or anew at each_length that it is measured at past
    the training length, and then perhaps trained on (fine-tuned) with options of train.py.
    """
    name: str
    run: str
    method: str = None
    options: dict = field(default_factory=dict)
    corpus: str = 'passkey_long'
    times: float = None
    each_length: bool = False
    train_on: dict = None


# ---------------------------------------------------------------------------------------------------------------------
# the recipe of the headline: corpora, runs, rows, and what is measured

# options of data.passkey.prepare: documents of up to twice the training length to train on; longer ones of the same
# kind to extend on and to measure with
CORPORA = dict(
    passkey=dict(tokens=8_000_000),
    passkey_long=dict(tokens=8_000_000, longest=8192, seed=1),
)
RUNS = {}
for pe in ENCODINGS:
    RUNS[pe] = Run(dict(pe=pe, steps=1600))

HEADLINE = [
    Row('NoPE', 'nope'),
    Row('NoPE uniform', 'nope', 'uniform'),
    Row('NoPE head', 'nope', 'head'),
    Row('RoPE', 'rope'),
]

# ---------------------------------------------------------------------------------------------------------------------
# further tables

# DroPE: an eighth of the steps more, without RoPE, at the rates of training; in its paper the last eighth of them, at
# three times the rate, with a warm-up of 0.4 to 4 % (here 30 %). As its authors do it: a base without QK-norm, which is
# then recalibrated with theirs (SmolLM) or without (from scratch)
WITHOUT_ROPE = dict(pe='nope', steps=200, warmup=60, min_length=64)
PLAIN = dict(qk_norm=False, qk_gain=False)
RUNS['drope'] = Run(WITHOUT_ROPE, start='rope')
RUNS['rope-no-qk-norm'] = Run(dict(pe='rope', steps=1600) | PLAIN)
RUNS['drope-authors'] = Run(WITHOUT_ROPE | dict(qk_norm='full'), start='rope-no-qk-norm')
RUNS['drope-no-qk-norm'] = Run(WITHOUT_ROPE, start='rope-no-qk-norm')
# ALiBi and T5 were published without QK-norm, whose bound on q.k lets a bias always win far away
RUNS['alibi-no-qk-norm'] = Run(dict(pe='alibi', steps=1600) | PLAIN)
RUNS['t5-no-qk-norm'] = Run(dict(pe='t5', steps=1600) | PLAIN)
# the recipe without one of its parts
RUNS['nope-no-gain'] = Run(dict(pe='nope', steps=1600, qk_gain=False))
RUNS['nope-4-heads'] = Run(dict(pe='nope', steps=1600, n_head=4, n_kv_head=4))
RUNS['nope-anywhere'] = Run(dict(pe='nope', steps=1600, rows='anywhere'))

ABLATIONS = HEADLINE + [
    Row('RoPE YaRN', 'rope', 'yarn'),
    Row('RoPE head', 'rope', 'head'),
    Row('NoPE head, from 1.0', 'nope', 'head', dict(init=1.0)),
    Row('NoPE head, no focus', 'nope', 'head', dict(focus=False)),
    Row('NoPE uniform, tuned at 2x', 'nope', 'uniform', times=2),
    Row('NoPE uniform, tuned at 4x', 'nope', 'uniform', times=4),
    Row('NoPE head, tuned at 2x', 'nope', 'head', times=2),
    Row('NoPE head, tuned at 4x', 'nope', 'head', times=4),
    Row('NoPE, no gain', 'nope-no-gain'),
    Row('NoPE uniform, no gain', 'nope-no-gain', 'uniform'),
    Row('NoPE, 4 heads', 'nope-4-heads'),
    Row('NoPE uniform, 4 heads', 'nope-4-heads', 'uniform'),
    Row('NoPE, rows from anywhere', 'nope-anywhere', options=dict(rows='documents')),
    Row('NoPE uniform, rows from anywhere', 'nope-anywhere', 'uniform', dict(rows='documents')),
]

# training on takes the tokens that head tuning reads with its grid, 851,968
TRAIN_ON = dict(batch_tokens=8192, micro_batch=8, optimizer='adamw', lr=3e-4, warmup=10, steps=104)
ENCODINGS_ROWS = HEADLINE[:3] + [
    Row('NoPE uniform, at each length', 'nope', 'uniform', each_length=True),
    Row('NoPE uniform-log', 'nope', 'uniform-log'),
    Row('NoPE head-log', 'nope', 'head-log'),
    Row('NoPE head-log, tuned at 2x', 'nope', 'head-log', times=2),
    Row('NoPE head-log, tuned at 4x', 'nope', 'head-log', times=4),
    Row('learned', 'learned'),
    Row('sinusoidal', 'sinusoidal'),
    Row('T5', 't5'),
    Row('T5, no QK-norm', 't5-no-qk-norm'),
    Row('ALiBi', 'alibi'),
    Row('ALiBi, no QK-norm', 'alibi-no-qk-norm'),
    Row('RoPE', 'rope'),
    Row('RoPE PI', 'rope', 'pi'),
    Row('RoPE NTK', 'rope', 'ntk'),
    Row('RoPE NTK, factor from the grid', 'rope', 'ntk-grid'),
    Row('RoPE dynamic NTK', 'rope', 'ntk', each_length=True),
    Row('RoPE YaRN', 'rope', 'yarn'),
    Row('RoPE YaRN, set for 4x', 'rope', 'yarn', times=4),
    Row('RoPE dynamic YaRN', 'rope', 'yarn', each_length=True),
    Row('RoPE LongRoPE', 'rope', 'longrope', dict(population=16, iterations=10)),
    Row('RoPE PI, trained on', 'rope', 'pi', train_on=TRAIN_ON),
    Row('RoPE YaRN, trained on', 'rope', 'yarn', train_on=TRAIN_ON),
    Row('DroPE', 'drope'),
    Row('DroPE uniform', 'drope', 'uniform'),
    Row('DroPE head', 'drope', 'head'),
    Row('RoPE, no QK-norm', 'rope-no-qk-norm'),
    Row("DroPE, the authors' QK-norm", 'drope-authors'),
    Row("DroPE uniform, the authors' QK-norm", 'drope-authors', 'uniform'),
    Row('DroPE, no QK-norm', 'drope-no-qk-norm'),
    Row('DroPE uniform, no QK-norm', 'drope-no-qk-norm', 'uniform'),
]

# layers that differ, and the temperatures that others publish. The pattern is written for four layers at every scale.
# Three windows of 16 reach 46 tokens back: what lies further, only the NoPE layer can find. Three of 64 reach most of a
# row, and the NoPE layer learns nothing (results/notes.md)
MIXED = dict(pe='rope,rope,rope,nope', n_layer=4, steps=1600)
RUNS['mixed'] = Run(MIXED)
RUNS['windowed'] = Run(MIXED | dict(window='16,16,16,0'))
RUNS['ssmax'] = Run(dict(pe='nope', steps=1600, scalable_softmax=True))
RUNS['ssmax-swapped'] = Run(WITHOUT_ROPE | dict(scalable_softmax=True), start='nope')
RUNS['p-rope'] = Run(dict(pe='rope', steps=1600, rope_fraction=0.75))

LAYERS = [
    Row('NoPE', 'nope'),
    Row('NoPE LogN', 'nope', 'uniform', dict(law='logn')),
    Row('NoPE head', 'nope', 'head'),
    Row('RoPE', 'rope'),
    Row('RoPE LogN', 'rope', 'uniform', dict(law='logn')),
    # SmolLM3; Llama 4
    Row('RoPE+NoPE', 'mixed'),
    Row('RoPE+NoPE Llama 4', 'mixed', 'uniform', dict(law='llama4')),
    Row('RoPE+NoPE head', 'mixed', 'head'),
    # RNoPE-SWA; SWAN
    Row('windowed RoPE+NoPE', 'windowed'),
    Row('windowed RoPE+NoPE SWAN', 'windowed', 'uniform', dict(law='swan')),
    Row('windowed RoPE+NoPE head', 'windowed', 'head'),
    Row('windowed RoPE+NoPE head, SWAN', 'windowed', 'head', dict(law='swan')),
    Row('NoPE scalable softmax', 'ssmax'),
    Row('NoPE scalable softmax, swapped in', 'ssmax-swapped'),
    Row('p-RoPE', 'p-rope'),
    Row('p-RoPE LogN', 'p-rope', 'uniform', dict(law='logn')),
]

# the columns of a table's figure
GROUPS = dict(layers={
    'layers of one kind': ['NoPE', 'NoPE LogN', 'NoPE head', 'RoPE', 'RoPE LogN'],
    '3 RoPE : 1 NoPE': [row.name for row in LAYERS if row.run in ('mixed', 'windowed')],
    'trained in': ['NoPE scalable softmax', 'NoPE scalable softmax, swapped in', 'p-RoPE', 'p-RoPE LogN'],
}, encodings={
    'position encodings': ['NoPE', 'learned', 'sinusoidal', 'T5', 'ALiBi', 'RoPE', 'T5, no QK-norm',
                           'ALiBi, no QK-norm'],
    'NoPE, sharpened': ['NoPE', 'NoPE uniform', 'NoPE uniform, at each length', 'NoPE head'],
    'NoPE, one tuning for every length': ['NoPE uniform-log', 'NoPE head-log', 'NoPE head-log, tuned at 4x',
                                          'NoPE head-log, tuned at 2x'],
    'RoPE, stretched for 8x': ['RoPE', 'RoPE PI', 'RoPE NTK', 'RoPE NTK, factor from the grid', 'RoPE YaRN',
                               'RoPE LongRoPE'],
    'stretched anew at each length; trained on': ['RoPE YaRN', 'RoPE dynamic NTK', 'RoPE dynamic YaRN',
                                                  'RoPE PI, trained on', 'RoPE YaRN, trained on'],
    'DroPE beside YaRN': ['RoPE YaRN', 'DroPE', 'DroPE uniform', 'DroPE head', "DroPE, the authors' QK-norm",
                          "DroPE uniform, the authors' QK-norm", 'DroPE, no QK-norm', 'DroPE uniform, no QK-norm'],
})
# the rows of every other figure
SHOWN = ['NoPE', 'NoPE uniform', 'NoPE LogN', 'NoPE head', 'NoPE head-log', 'RoPE', 'RoPE YaRN', 'DroPE uniform',
         'RoPE+NoPE', 'windowed RoPE+NoPE', 'windowed RoPE+NoPE head']

# ---------------------------------------------------------------------------------------------------------------------
# real text: NoPE, RoPE, and DroPE that goes on from RoPE for an eighth of its tokens more


def real_runs(steps):
    drope = dict(pe='nope', lr=1e-3, steps=steps // 8, warmup=steps // 80)
    return dict(
        nope=Run(dict(pe='nope', steps=steps), 'text'),
        rope=Run(dict(pe='rope', steps=steps), 'text'),
        drope=Run(drope, 'text', start='rope'),
    )


REAL = [
    Row('NoPE', 'nope'),
    Row('NoPE uniform', 'nope', 'uniform', corpus='text'),
    Row('NoPE head', 'nope', 'head', corpus='text'),
    Row('NoPE head-log', 'nope', 'head-log', corpus='text'),
    Row('RoPE', 'rope'),
    Row('RoPE YaRN', 'rope', 'yarn', corpus='text'),
    Row('DroPE', 'drope'),
    Row('DroPE uniform', 'drope', 'uniform', corpus='text'),
]

# Wang et al. 2024: NoPE and RoPE on 105B tokens; temperatures start from the best uniform ones of their code
PAPER = [
    Row('NoPE', 'nope'),
    Row('NoPE head, 4K', 'nope', 'head', corpus='text', times=2),
    Row('NoPE head, 8K', 'nope', 'head', dict(init=1.6), 'text', times=4),
    Row('NoPE head, 18K', 'nope', 'head', dict(init=1.7), 'text', times=9),
    Row('RoPE', 'rope'),
    Row('RoPE YaRN, 16K', 'rope', 'yarn', corpus='text', times=8),
]
ABOUT_PAPER = """\
50,000 steps of 2,097,152 tokens for NoPE, the same for RoPE: 57 hours each on 8 GPUs if one makes 64,000 tokens a
second (never measured), then temperatures and measuring, an hour. lr 3.5e-4 from step 2,000 on; its cosine would end
at step 1,430,512, as TinyLlama's, so at 50,000 it is still 99.7 % of that. Passkeys at five lengths (the paper: 16).
The commands, after the data:"""

# ---------------------------------------------------------------------------------------------------------------------
# tables and scales: what a scale says replaces what the table says

TIMES = (0.5, 1, 1.5, 2, 3, 4, 6, 8)
# 70 prompts a length: 210 with three seeds
TABLE = dict(runs=RUNS, times=8, lengths=(1, 1.5, 2, 3, 4, 6, 8, 16), measured_on='passkey_long',
             measure=dict(eval_tokens=4096, stride=128), passkey=dict(depths=10, trials=7))
TABLES = dict(
    # five seeds, each in two precisions: 500 prompts a length
    headline=TABLE | dict(rows=HEADLINE, passkey=dict(depths=10, trials=5)),
    ablations=TABLE | dict(rows=ABLATIONS),
    # three seeds, 150 prompts a length: measuring takes half of the hours
    encodings=TABLE | dict(rows=ENCODINGS_ROWS, passkey=dict(depths=10, trials=5)),
    layers=TABLE | dict(rows=LAYERS),
)

# Seconds on 2 cores, about, two stages side by side with a thread each: what the sweep tells before each stage,
# corrected by what the stages before it took on this machine. begin: to import torch and open files.
# million: a million tokens of a corpus; step: one of train.py; measure: a row; the others: extending by that method.
SECONDS = dict(begin=4, million=1, step=0.25, measure=60, uniform=40, head=150, longrope=150)

# 8x the training length is 2,048 tokens a row
TUNE = dict(steps=60, batch=4, grid=tuple(1 + i / 10 for i in range(11)))
SYNTHETIC = dict(preset='tiny', dtype='fp32', processes=1, corpora=CORPORA, shape={}, train={}, tune=TUNE)
TEXT = dict(preset='small', dtype='auto', processes=1, runs=real_runs(5000), rows=REAL, tokenizer='gpt2', L=1024,
            shape={}, train={}, times=4, lengths=TIMES + (16,), passkey=dict(depths=10, trials=5))
SCALES = dict(
    # the same path in under a minute, for the tests: nothing is learned
    toy=SYNTHETIC | dict(
        L=128, tokens=dict(passkey=60_000, passkey_long=200_000),
        seconds=SECONDS | dict(measure=6, uniform=1, head=1, longrope=5),
        shape=dict(block_size=128, n_layer=1, n_embd=32, n_inner=32),
        train=dict(steps=6, batch_tokens=512, eval_tokens=512, log_every=3, warmup=2),
        times=2, tune=dict(steps=2, batch=2, grid=(1, 1.2), grid_batches=1),
        lengths=(1, 1.5, 2), measure=dict(eval_tokens=256, stride=64), passkey=dict(depths=2, trials=1)),
    tiny=SYNTHETIC | dict(L=256, seconds=SECONDS),
    # one GPU, under an hour (an estimate: not run yet)
    small=TEXT | dict(tokens=700_000_000, tune=dict(micro_batch=2), measure=dict(eval_tokens=131_072, stride=256)),
    # its rehearsal on CPU
    small_toy=TEXT | dict(
        runs=real_runs(16), dtype='fp32', tokenizer='bytes', tokens=200_000, L=320,
        shape=dict(block_size=320, n_layer=1, n_head=2, n_kv_head=1, n_embd=32, n_inner=48),
        train=dict(batch_tokens=640, micro_batch=2, eval_tokens=640),
        times=2, tune=dict(steps=2, batch=2, grid=(1, 1.2), grid_batches=1),
        lengths=(1, 2, 4), measure=dict(eval_tokens=512, stride=64), passkey=dict(depths=2, trials=1)),
    # eight GPUs, days (not run yet)
    paper=TEXT | dict(
        about=ABOUT_PAPER, preset='tinyllama', processes=8, runs=real_runs(50_000), rows=PAPER, L=2048,
        tokenizer='hf:TinyLlama-NoPE-1.1B', tokens=106_000_000_000, tune=dict(lr=0.1),
        lengths=(0.5, 1, 2, 4, 8), measure=dict(eval_tokens=2_097_152, stride=256, protocol='paper'),
        passkey=dict(depths=10, trials=10)),
)
