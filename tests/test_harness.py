"""
lm-evaluation-harness, where it is installed: on an exported folder, and in process through data/hf/harness.py.

    COMMONSENSE=DIR pytest tests/test_harness.py

takes 100 items each of the whole files in DIR: piqa_valid.jsonl with piqa_valid-labels.lst, and llm-foundry's
openbookqa_llmfoundry.jsonl and winogrande_dev_llmfoundry.jsonl.
"""
import json
import os
import sys
from types import SimpleNamespace

import pytest
import torch

lm_eval = pytest.importorskip('lm_eval')
transformers = pytest.importorskip('transformers')
tokenizers = pytest.importorskip('tokenizers')

from conftest import refused, run  # noqa: E402
from test_hf import build, checkpoint  # noqa: E402

from data.hf import convert, harness  # noqa: E402

# the seven tasks of the paper's Table 1 are of these three forms; each here is a task on a local file
TASKS = dict(
    piqa=dict(doc_to_text='Question: {{goal}}\nAnswer:', doc_to_target='label', doc_to_choice='{{[sol1, sol2]}}'),
    openbookqa=dict(doc_to_text='query', doc_to_target='gold', doc_to_choice='choices'),
    winogrande=dict(doc_to_text='gold', doc_to_target='continuation', doc_to_choice='context_options'),
)
METRICS = dict(
    piqa=('acc', 'acc_norm'), openbookqa=('acc', 'acc_norm'), winogrande=('acc',)
)  # as the harness' own tasks have them
DOCS = dict(
    piqa=[
        dict(
            goal='Boil an egg.',
            sol1='Put it into water that boils, for six minutes.',
            sol2='Put it into the oven.',
            label=0,
        ),
        dict(goal='dresser', sol1='replace drawer with a pin ', sol2='finish with a pin, – then wait', label=1),
    ],
    openbookqa=[
        dict(query='There is fog around:', choices=['a marsh', 'a tundra', 'the plains', 'a desert'], gold=0),
        dict(query='Predators eat', choices=['lions', 'humans', 'bunnies', 'grass'], gold=2),
    ],
    winogrande=[
        dict(
            context_options=['Sarah asked Maria because Sarah', 'Sarah asked Maria because Maria'],
            continuation='knew more.',
            gold=1,
        ),
        dict(
            context_options=['The cup did not fit into the box: the cup', 'The cup did not fit into the box: the box'],
            continuation='was too large.',
            gold=0,
        ),
    ],
)


def commonsense():
    """{task: documents}: the handful above, or the files of the folder COMMONSENSE."""
    folder = os.environ.get('COMMONSENSE')
    if not folder:
        return DOCS

    def read(name):
        with open(f'{folder}/{name}') as f:
            return [json.loads(line) for line in f][:100]
    docs = dict(
        piqa=read('piqa_valid.jsonl'),
        openbookqa=read('openbookqa_llmfoundry.jsonl'),
        winogrande=read('winogrande_dev_llmfoundry.jsonl'),
    )
    with open(f'{folder}/piqa_valid-labels.lst') as f:
        for doc, label in zip(docs['piqa'], f):
            doc['label'] = int(label)
    return docs


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory):
    """A folder with a byte-level tokenizer, begin and end of a document included, that adds no BOS by itself."""
    path = str(tmp_path_factory.mktemp('tok') / 'tok')
    tok = tokenizers.Tokenizer(
        tokenizers.models.BPE({c: i for i, c in enumerate(sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()))}, [])
    )
    tok.pre_tokenizer, tok.decoder = (
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        tokenizers.decoders.ByteLevel(),
    )
    transformers.PreTrainedTokenizerFast(tokenizer_object=tok, bos_token='<s>', eos_token='</s>').save_pretrained(path)
    with open(f'{path}/config.json', 'w') as f:
        json.dump(dict(bos_token_id=256, eos_token_id=257), f)
    return path


@pytest.fixture(scope='module')
def task_folder(tmp_path_factory):
    """Tasks of lm-evaluation-harness that read local files."""
    path = tmp_path_factory.mktemp('tasks')
    for name, docs in commonsense().items():
        (path / f'{name}.jsonl').write_text('\n'.join(map(json.dumps, docs)))
        (path / f'{name}.yaml').write_text(
            json.dumps(
                dict(  # JSON is YAML
                    task=f'local_{name}',
                    dataset_path='json',
                    dataset_kwargs=dict(data_files=dict(validation=f'{path}/{name}.jsonl'), cache_dir=f'{path}/cache'),
                    output_type='multiple_choice',
                    validation_split='validation',
                    metric_list=[dict(metric=m) for m in METRICS[name]],
                    **TASKS[name],
                )
            )
        )
    return str(path)


@pytest.fixture
def saved(tmp_path, tokenizer):
    """A NoPE model with temperatures, as a checkpoint and as an exported folder."""
    model = build(vocab_size=258, pe='nope')
    checkpoint(tmp_path / 'a.pt', model, tokenizer=f'hf:{tokenizer}', extended=dict(method='head', length=128))
    run(convert, tmp_path / 'a.pt', tmp_path / 'out')
    return model, str(tmp_path / 'a.pt'), str(tmp_path / 'out')


def logprob(model, ids, n):
    """Log-probability of the last n of the ids, and whether each is the likeliest, by one whole forward pass."""
    logits = model(torch.tensor([ids[:-1]]))[0][0].double()
    logp = logits - torch.logsumexp(logits, -1, keepdim=True)
    return sum(logp[i - 1, ids[i]].item() for i in range(len(ids) - n, len(ids))), all(
        logp[i - 1].argmax() == ids[i] for i in range(len(ids) - n, len(ids))
    )


def ids(text):
    alphabet = {c: i for i, c in enumerate(sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()))}
    return [
        alphabet[c]
        for c in tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)[0][
            0
        ]
    ]


def request(*args):
    return SimpleNamespace(args=args)


@pytest.mark.parametrize('backend', ['hf', 'nanonope'])
def test_multiple_choice_agrees_with_our_own_scoring_on_every_item(saved, task_folder, backend):
    model, ckpt, out = saved
    args = dict(
        hf=f'pretrained={out},dtype=float32,add_bos_token=True,max_length=4096',
        nanonope=f'ckpt={ckpt},dtype=fp32,max_length=4096',
    )[backend]
    got = lm_eval.simple_evaluate(
        model=backend,
        model_args=args,
        tasks=[f'local_{n}' for n in TASKS],
        device='cpu',
        batch_size=4,
        log_samples=True,
        bootstrap_iters=0,
        task_manager=lm_eval.tasks.TaskManager(include_path=task_folder, include_defaults=False),
    )
    for name, docs in commonsense().items():
        hits, hits_norm = [], []
        for doc, sample in zip(docs, sorted(got['samples'][f'local_{name}'], key=lambda s: s['doc_id']), strict=True):
            if name == 'winogrande':
                pairs, gold = [(c, doc['continuation']) for c in doc['context_options']], doc['gold']
            elif name == 'piqa':
                pairs, gold = [(f'Question: {doc["goal"]}\nAnswer:', doc[s]) for s in ('sol1', 'sol2')], doc['label']
            else:
                pairs, gold = [(doc['query'], c) for c in doc['choices']], doc['gold']
            ours = []
            for context, continuation in pairs:
                lead = context[len(context.rstrip()):] + ' '         # spaces belong to what follows
                a, b = ids(context.rstrip()), ids(lead + continuation)
                ours.append(logprob(model, [256] + a + b, len(b)))
            theirs = [r[0] for r in sample['resps']]
            for (lp, greedy), (their_lp, their_greedy) in zip(ours, theirs, strict=True):
                assert abs(lp - float(their_lp)) < 1e-3
                assert str(greedy) == str(their_greedy)
            best = lambda values: max(range(len(values)), key=values.__getitem__)
            hits.append(best([lp for lp, _ in ours]) == gold)
            hits_norm.append(best([lp / len(c) for (lp, _), (_, c) in zip(ours, pairs)]) == gold)
            for metric, hit in zip(METRICS[name], (hits[-1], hits_norm[-1])):
                assert sample[metric] == hit
        for metric, all_hits in zip(METRICS[name], (hits, hits_norm)):
            assert got['results'][f'local_{name}'][f'{metric},none'] == pytest.approx(sum(all_hits) / len(docs))
            print(f'{backend} {name}: {len(docs)} items, {metric} {sum(all_hits) / len(docs):.3f}')


def test_the_adapter_equals_the_exported_folder(saved):
    from lm_eval.models.huggingface import HFLM
    model, ckpt, out = saved
    theirs, ours = (
        HFLM(pretrained=out, dtype='float32', add_bos_token=True, device='cpu', max_length=96),
        harness.NanoNoPE(ckpt, max_length=96, dtype='fp32', batch_size=3),
    )
    pairs = [
        request('The grass is', ' green.'),
        request('', 'Nothing before it'),
        request('x' * 40, ' y'),
        request('a b ', 'c'),
        request('So', ''),
    ]
    for (a, ga), (b, gb) in zip(theirs.loglikelihood(pairs[:-1]), ours.loglikelihood(pairs[:-1]), strict=True):
        assert abs(a - b) < 1e-3
        assert ga == gb
    texts = [request('Short.'), request('A text that is longer than one window of the model. ' * 6)]
    whole = HFLM(
        pretrained=out, dtype='float32', add_bos_token=False, device='cpu', max_length=96
    ).loglikelihood_rolling(texts)
    assert ours.loglikelihood_rolling(texts) == pytest.approx(whole, abs=1e-2)
    prompts = [
        request('The sky is', dict(until=[], max_gen_toks=24)),
        request('The sky is', dict(until=['e', '\n'], max_gen_toks=24, do_sample=False)),
    ]
    assert ours.generate_until(prompts) == theirs.generate_until(prompts)


def test_what_cannot_be_exported_runs_in_process_past_the_training_length(tmp_path, tokenizer):
    model = build(vocab_size=258, pe='alibi', qk_norm=True)
    for b in model.blocks:
        b.attn.slope.data.fill_(0.3)
    checkpoint(tmp_path / 'a.pt', model, tokenizer=f'hf:{tokenizer}')
    with refused('pe=alibi'):
        run(convert, tmp_path / 'a.pt', tmp_path / 'out')
    lm = harness.NanoNoPE(str(tmp_path / 'a.pt'), max_length=128, dtype='fp32', batch_size=2)
    pairs = [('b' * 70, ' c d'), ('One', ' and two'), ('Three', ' f' * 20)]
    for (context, continuation), (lp, greedy) in zip(
        pairs, lm.loglikelihood([request(*p) for p in pairs]), strict=True
    ):
        want, want_greedy = logprob(model, [256] + ids(context) + ids(continuation), len(ids(continuation)))
        assert abs(lp - want) < 1e-3
        assert greedy == want_greedy


def test_long_prompts_are_cut_in_the_middle_and_begin_with_bos(saved):
    model, ckpt, out = saved
    text, settings = 'The beginning. ' + 'x ' * 200 + 'The end.', dict(until=[], max_gen_toks=8)
    lm = harness.NanoNoPE(ckpt, dtype='fp32')
    assert lm.max_length == 128                      # what it was extended to
    whole, n = [256] + ids(text), 128 - 8
    cut = dict(middle=whole[:n // 2] + whole[-(n - n // 2):], left=[256] + whole[-n + 1:], right=whole[:n])
    for side, prompt in cut.items():
        lm.side = side
        want = model.generate(torch.tensor([prompt]), 8, temperature=0)[0, n:].tolist()
        want = want[:next((i for i, t in enumerate(want) if t in (256, 257)), 8)]
        assert lm.generate_until([request(text, settings)]) == [lm.tok.decode(want)]
    lp = lm.loglikelihood([request('y' * 300, ' z')])[0][0]
    assert abs(lp - logprob(model, [256] + ids('y' * 126 + ' z'), 2)[0]) < 1e-3


def test_the_command_line(saved, task_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        sys,
        'argv',
        [
            'harness',
            'run',
            '--model',
            'nanonope',
            '--model_args',
            f'ckpt={saved[1]},dtype=fp32',
            '--tasks',
            'local_piqa',
            '--limit',
            '2',
            '--include_path',
            task_folder,
            '--output_path',
            str(tmp_path / 'res'),
            '--device',
            'cpu',
        ],
    )
    harness.main()
    assert 'local_piqa' in capsys.readouterr().out


def test_longbench_on_local_documents(saved, tmp_path, monkeypatch):
    """Two of its tasks as they are, on documents of ours; its package `rouge`, which neither uses, may be missing."""
    pytest.importorskip('jieba')
    pytest.importorskip('fuzzywuzzy')
    monkeypatch.setitem(sys.modules, 'rouge', SimpleNamespace(Rouge=None))
    doc = dict(question='What is it?', input='', answers=['a text', 'text'], length=9, language='en', all_classes=[])
    for task, context in dict(qasper='Long text. ' * 300, lcc='def f(x):\n' * 200).items():
        (tmp_path / f'{task}.jsonl').write_text(json.dumps(dict(doc, context=context, dataset=task, _id='0')))
        (tmp_path / f'{task}.yaml').write_text(
            json.dumps(
                dict(
                    include=f'{os.path.dirname(lm_eval.__file__)}/tasks/longbench/{task}.yaml',
                    task=f'local_{task}',
                    tag=[],
                    dataset_path='json',
                    dataset_name=None,
                    dataset_kwargs=dict(
                        data_files=dict(test=f'{tmp_path}/{task}.jsonl'), cache_dir=f'{tmp_path}/cache'
                    ),
                )
            )
        )
    got = lm_eval.simple_evaluate(
        model='nanonope',
        model_args=f'ckpt={saved[1]},dtype=fp32,max_length=256',
        tasks=['local_qasper', 'local_lcc'],
        device='cpu',
        bootstrap_iters=0,
        log_samples=True,
        task_manager=lm_eval.tasks.TaskManager(include_path=str(tmp_path), include_defaults=False),
    )
    for task in 'local_qasper', 'local_lcc':
        assert 0 <= got['results'][task]['score,none'] <= 1
        assert isinstance(got['samples'][task][0]['resps'][0][0], str)


def test_a_needle_in_a_haystack(saved, tokenizer, capsys):
    pytest.importorskip('wonderwords')
    got = lm_eval.simple_evaluate(
        model='nanonope',
        model_args=f'ckpt={saved[1]},tokenizer={tokenizer},dtype=fp32,max_length=2048',
        tasks=['niah_single_1'],
        limit=2,
        bootstrap_iters=0,
        metadata=dict(max_seq_lengths=[1024], tokenizer=tokenizer),
        log_samples=True,
    )
    prompt = got['samples']['niah_single_1'][0]['arguments'][0][0]
    assert 'special magic' in prompt
    assert len(ids(prompt)) <= 1024
    assert got['results']['niah_single_1']['1024,none'] in (0, 0.5, 1)


@pytest.mark.parametrize(
    'args, why',
    [
        (dict(ckpt='nowhere.pt'), 'nowhere.pt'),
        (dict(truncation_side='both'), 'truncation_side=both'),
        (dict(dtype='fp8'), 'dtype=fp8'),
        (dict(length=9), 'model_args: length unknown'),
        (dict(tokenizer='nowhere'), 'nowhere is not a folder'),
        (dict(ckpt=None), 'no ckpt'),
        (dict(max_length='8k'), 'max_length=8k'),
        (dict(batch_size='auto'), '--batch_size auto'),
    ],
)
def test_refusals(saved, capsys, args, why):
    with pytest.raises(SystemExit) as e:
        harness.NanoNoPE(**dict(ckpt=saved[1]) | args)
    assert e.value.code == 2
    err = capsys.readouterr().err
    assert why in err
    assert err.count('\n') == 1


def test_what_the_adapter_does_not_do_is_said(saved, capsys):
    lm = harness.NanoNoPE(saved[1], dtype='fp32')
    for settings, why in ((dict(do_sample=True, temperature=1.0), 'greedily'), (dict(max_gen_toks=128), 'no room')):
        with pytest.raises(SystemExit):
            lm.generate_until([request('A', dict(until=[]) | settings)])
        assert why in capsys.readouterr().err
