"""What data/checkpoint.py promises: saved whole or not at all, checked when it is read, and one run a folder."""
import errno
import math
import multiprocessing
import os
import re
import time
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import bits, refused

from data.checkpoint import (
    check_fits,
    find_checkpoint,
    load_checkpoint,
    load_model,
    lock,
    padded,
    preflight,
    save_checkpoint,
    stem,
)
from data.runtime import Env, memory
from data.tokenizer import Tokenizer
from model import GPT, GPTConfig

SHAPE = dict(block_size=8, vocab_size=17, n_layer=1, n_head=2, n_kv_head=1, n_embd=8, n_inner=12)


def checkpoint(step=1, **shape):
    """What train.py saves, of a very small model after one update."""
    torch.manual_seed(step)
    model = GPT(GPTConfig(**SHAPE, **shape))
    opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    x = torch.randint(17, (2, 8))
    model(x, x)[1].backward()
    opt.step()
    return dict(model=model.state_dict(), config=asdict(model.config), optimizer=[opt.state_dict()], step=step,
                tokens=16, seed=1, args=dict(lr=1e-3, init_from=None), fingerprint='0' * 64, tokenizer='bytes',
                extended=None)


def is_step(file, step):
    """The file holds checkpoint(step), bit for bit, in the same order."""
    return bits(load_checkpoint(file)) == bits(checkpoint(step))


@pytest.fixture
def out(tmp_path):
    """A run's folder with the checkpoint of step 1."""
    save_checkpoint(f'{tmp_path}/out/ckpt.pt', checkpoint(1))
    return f'{tmp_path}/out'


# ---------------------------------------------------------------------------------------------------------------------
# saving and loading

def test_what_is_saved_is_loaded_bit_for_bit(out):
    assert bits(checkpoint(1)) != bits(checkpoint(2))
    assert is_step(out, 1)
    assert bits(torch.load(f'{out}/ckpt.pt', weights_only=True)) == bits(checkpoint(1))
    assert os.listdir(out) == ['ckpt.pt']


def test_the_checkpoint_before_is_kept(out):
    for step in 2, 3:
        save_checkpoint(f'{out}/ckpt.pt', checkpoint(step))
        assert is_step(out, step)
        assert is_step(f'{out}/ckpt.prev.pt', step - 1)
    assert sorted(os.listdir(out)) == ['ckpt.prev.pt', 'ckpt.pt']


def test_a_model_has_the_weights_of_its_checkpoint():
    ckpt = checkpoint()
    assert bits(dict(load_model(ckpt).state_dict())) == bits(dict(ckpt['model']))


def test_a_kill_between_the_renames_costs_nothing(out, monkeypatch):
    rename = os.replace

    def killed(a, b):
        if b.endswith('/ckpt.pt'):
            raise KeyboardInterrupt
        rename(a, b)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, 'replace', killed)
        save_checkpoint(f'{out}/ckpt.pt', checkpoint(2))
    assert find_checkpoint(out) == f'{out}/ckpt.prev.pt'
    assert is_step(out, 1)
    save_checkpoint(f'{out}/ckpt.pt', checkpoint(3))
    assert is_step(out, 3)


@pytest.mark.parametrize('error', [
    OSError(errno.ENOSPC, 'No space left'), RuntimeError('PytorchStreamWriter failed\nat ...'), RuntimeError()])
def test_a_failing_save_keeps_the_old_one(error, out, monkeypatch):
    def full(ckpt, f):
        f.write(b'half of it')
        raise error
    monkeypatch.setattr(torch, 'save', full)
    with refused('ckpt.pt', 'intact', *str(error).splitlines()[:1]):
        save_checkpoint(f'{out}/ckpt.pt', checkpoint(2))
    assert os.listdir(out) == ['ckpt.pt']            # and no half file fills the disk
    assert is_step(out, 1)


def test_results_go_under_the_name_of_their_checkpoint(out):
    save_checkpoint(f'{out}/ckpt.pt', checkpoint(2))
    save_checkpoint(f'{out}/head-128.pt', checkpoint(2))
    assert [stem(f) for f in (out, f'{out}/ckpt.prev.pt', f'{out}/head-128.pt')] == ['ckpt', 'ckpt', 'head-128']


# ---------------------------------------------------------------------------------------------------------------------
# damage

def test_one_flipped_byte_is_found_or_harmless(out):
    file, found = f'{out}/ckpt.pt', 0
    good = np.fromfile(file, np.uint8)
    places = [*np.linspace(0, len(good) - 1, 60, dtype=int), *range(len(good) - 400, len(good), 20)]
    flips = [(at, 0x41) for at in places]
    # in zip's directory, the bit that makes an entry a folder: torch leaves the tensor unread, and no checksum knows
    flips += [(m.start() + 38, 0x10) for m in re.finditer(b'PK\x01\x02', good.tobytes())]
    for at, flip in flips:
        bad = good.copy()
        bad[at] ^= flip
        bad.tofile(file)
        try:
            assert is_step(file, 1), f'byte {at} of {len(good)}'
        except SystemExit:
            with refused(file, 'restore it or train again'):
                load_checkpoint(file)
            found += 1
    assert 40 < found < len(flips)                   # in the padding it is harmless


def test_no_checkpoint_costs_one_line(out, tmp_path):
    with refused('no checkpoint', tmp_path / 'none'):
        load_checkpoint(f'{tmp_path}/none')
    with refused('no checkpoint', 'holds out'):
        load_checkpoint(str(tmp_path))


def test_half_a_file_is_refused_and_the_one_before_named(out):
    save_checkpoint(f'{out}/ckpt.pt', checkpoint(2))
    with open(f'{out}/ckpt.pt', 'rb') as f:
        good = f.read()
    lfs = b'version https://git-lfs.github.com/spec/v1\noid sha256:' + b'0' * 64 + b'\nsize 4400000000\n'
    halves = [good[:n] for n in np.linspace(0, len(good) - 1, 20, dtype=int)]
    for content in [*halves, b'some text\n' * 1000, lfs]:
        with open(f'{out}/ckpt.pt', 'wb') as f:
            f.write(content)
        with refused('ckpt.pt', 'restore it or train again', 'the one before is', 'ckpt.prev.pt'):
            load_checkpoint(out)


@pytest.mark.parametrize('foreign', [{'model': {}}, {'state_dict': {}, 'config': {}}, [1], torch.zeros(2)], ids=repr)
def test_a_checkpoint_of_others_is_refused(foreign, out):
    torch.save(foreign, f'{out}/ckpt.pt')
    with refused('ckpt.pt', 'lacks', 'optimizer'):
        load_checkpoint(out)


@pytest.mark.parametrize('name', ['model.safetensors', 'model.gguf'])
def test_a_file_of_another_library_says_what_makes_a_checkpoint_of_it(tmp_path, name):
    (tmp_path / name).write_bytes(b'GGUF')
    with refused(name, 'python -m data.hf.convert'):
        load_checkpoint(tmp_path / name)


@pytest.mark.parametrize('zipped, words', [(True, 'would run code'), (False, 'not a whole checkpoint')])
def test_a_checkpoint_runs_no_code(zipped, words, out):
    class Trap:
        def __reduce__(self):
            return open, (f'{out}/ran', 'w')
    torch.save({**checkpoint(), 'extended': Trap()}, f'{out}/ckpt.pt', _use_new_zipfile_serialization=zipped)
    with refused('ckpt.pt', words):
        load_checkpoint(out)
    assert not os.path.exists(f'{out}/ran')
    torch.load(f'{out}/ckpt.pt', weights_only=False)
    assert os.path.exists(f'{out}/ran')              # it was a trap


# ---------------------------------------------------------------------------------------------------------------------
# what does not fit

@pytest.mark.parametrize('change, words', [
    (dict(vocab_size=19), ['embed.weight (17, 8) for (19, 8)', 'lm_head.weight']), (dict(n_layer=2), ['blocks.1.']),
    (dict(pe='alibaba'), ['alibaba']), (dict(n_heads=2), ['n_heads'])], ids=str)
def test_a_configuration_that_does_not_fit_is_named(change, words):
    with refused(*words):
        load_model(checkpoint(), **change)


def test_a_weight_that_does_not_fit_is_named():
    ckpt = checkpoint()
    ckpt['model'] = {**ckpt['model'], '_orig_mod.x': torch.zeros(2)}
    with refused('_orig_mod.x'):
        load_model(ckpt)


def test_a_position_table_comes_and_goes_with_its_encoding():
    assert load_model(checkpoint(), pe='learned').pos_embed.weight.shape == (8, 8)
    assert not hasattr(load_model(checkpoint(pe='learned'), pe='nope'), 'pos_embed')


def test_data_of_another_vocabulary_is_refused():
    with refused('257', 'words', '17'):
        check_fits(GPTConfig(**SHAPE), dict(vocab_size=257, tokenizer='words'), 'data')
    # a model of transformers may be padded past its tokenizer
    check_fits(GPTConfig(**SHAPE), dict(vocab_size=16, tokenizer='hf:dir'), 'data')


def test_data_of_another_tokenizer_of_the_same_size_is_refused():
    words, permuted = dict(a=0, b=1), dict(a=1, b=0)
    ours, theirs = [Tokenizer('hf:dir', 17, 0, None, None, words=w).fingerprint for w in (words, permuted)]
    ckpt = dict(tokenizer='hf:dir', tokenizer_fingerprint=ours)
    meta = dict(vocab_size=17, tokenizer='hf:dir', tokenizer_fingerprint=ours)
    check_fits(GPTConfig(**SHAPE), meta, 'data', ckpt=ckpt)
    with refused('another tokenizer', 'other ids'):
        check_fits(GPTConfig(**SHAPE), dict(meta, tokenizer_fingerprint=theirs), 'data', ckpt=ckpt)


@pytest.mark.parametrize('largest, fits', [(16, True), (17, False)])
def test_an_added_token_counts_only_where_the_data_uses_it(largest, fits):
    """A model of 17 rows and a tokenizer of 18 tokens, as many a folder of Hugging Face has them."""
    words = {f'word {i}': i for i in range(18)}
    mark = Tokenizer('hf:dir', 18, 0, None, None, words=words).fingerprint
    ckpt = dict(tokenizer='hf:dir', tokenizer_fingerprint=mark)
    meta = dict(vocab_size=18, tokenizer='hf:dir', tokenizer_fingerprint=mark, train=dict(largest_id=16),
                val=dict(largest_id=largest))
    if fits:
        check_fits(GPTConfig(**SHAPE), meta, 'data', ckpt=ckpt)
    else:
        with refused('token 17', '17 only', 'added'):
            check_fits(GPTConfig(**SHAPE), meta, 'data', ckpt=ckpt)
    with refused('vocabulary of 18'):                # data of an older version does not tell
        check_fits(GPTConfig(**SHAPE), dict(meta, val=dict()), 'data', ckpt=ckpt)
    with refused('vocabulary of 18'):                # nor is it known whose ids these are
        check_fits(GPTConfig(**SHAPE), meta, 'data', ckpt=dict(ckpt, tokenizer_fingerprint=None))


@pytest.mark.parametrize('bad', [math.nan, math.inf])
def test_a_weight_that_is_not_finite_is_refused_by_name(bad):
    """Such a model finds 0 % of the keys, which is just what failing at length looks like."""
    ckpt = checkpoint()
    ckpt['model']['blocks.0.mlp.up_proj.weight'][3, 2] = bad
    with refused('blocks.0.mlp.up_proj.weight', 'not finite'):
        load_model(ckpt)


def test_temperatures_and_frequencies_stay_with_their_encoding():
    ckpt = checkpoint(pe='rope')
    ckpt['config'].update(rope_inv_freq=[0.5, 0.1], rope_start=4)
    ckpt['model']['blocks.0.attn.scale'].fill_(1.3)
    kept = load_model(ckpt)
    assert kept.config.rope_inv_freq == [0.5, 0.1]
    assert kept.blocks[0].attn.scale.tolist() == pytest.approx([1.3, 1.3])
    dropped = load_model(ckpt, pe='nope')
    assert dropped.config.rope_inv_freq is None
    assert dropped.config.rope_start == 0
    assert dropped.blocks[0].attn.scale.tolist() == [1, 1]
    assert dropped.blocks[0].attn.slope.tolist() == [0, 0]


def test_lengths_past_a_learned_table_are_refused():
    meta = dict(vocab_size=17, tokenizer='words')
    check_fits(GPTConfig(**SHAPE), meta, 'data', [4, 800])
    check_fits(GPTConfig(**SHAPE, pe='learned'), meta, 'data', [4, 8])
    with refused('learned', '8 positions', '9'):
        check_fits(GPTConfig(**SHAPE, pe='learned'), meta, 'data', [4, 9])


def test_a_large_vocabulary_is_padded_to_a_multiple_of_64():
    assert [padded(n) for n in (101, 257, 32000, 50257, 100277)] == [101, 257, 32000, 50304, 100288]


# ---------------------------------------------------------------------------------------------------------------------
# a run's folder

def test_all_ranks_of_a_node_check_the_folder_at_once(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: preflight(f'{tmp_path}/new/run', 1000), range(2000)))
    assert os.listdir(tmp_path / 'new/run') == []


@pytest.mark.parametrize('path', ['file', 'file/run'])
def test_a_folder_that_cannot_be_written_is_refused(path, tmp_path):
    (tmp_path / 'file').touch()
    with refused('--out', path, 'cannot be written'):
        preflight(f'{tmp_path}/{path}', 0)


def test_too_little_room_on_the_disk_is_refused(tmp_path, monkeypatch):
    usage = namedtuple('usage', 'total used free')(10**10, 9 * 10**9, 10**9)
    monkeypatch.setattr('shutil.disk_usage', lambda path: usage)
    preflight(tmp_path, 10**9)
    with refused('--out', '1.00 GB free', '2.00 GB'):
        preflight(tmp_path, 2 * 10**9)


def kept_for_backward(model, x):
    """Bytes of what autograd keeps of model(x, x), weights aside; once, however many operations share it."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in weights:
            kept[t.untyped_storage().data_ptr()] = t
        return t
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(x, x)
    return sum(t.untyped_storage().nbytes() for t in kept.values())


@pytest.mark.parametrize('trained', [True, False])
@pytest.mark.parametrize('shape', [
    dict(n_embd=128, n_head=4, n_kv_head=4, n_inner=128, qk_norm=True),
    dict(n_embd=64, n_head=8, n_kv_head=2, n_inner=200, pe='rope')], ids=['qk_norm', 'rope'])
def test_the_memory_asked_for_is_what_autograd_keeps(trained, shape):
    """It is an estimate from below."""
    model = GPT(GPTConfig(vocab_size=50, block_size=64, n_layer=3, **shape)).requires_grad_(trained)
    for b in model.blocks:
        b.attn.scale.requires_grad_(not trained)

    def need(checkpointing=False, dtype='fp32'):
        args = SimpleNamespace(activation_checkpointing=checkpointing, optimizer='adamw')
        return memory(model, 8 * 64, trained, args, Env(dtype=dtype))
    real = kept_for_backward(model, torch.randint(50, (8, 64)))
    optimizer = 12 * sum(p.numel() for p in model.parameters()) * trained
    assert 0.7 * real < need() - optimizer <= real
    assert need(checkpointing=True) < need()
    assert need(dtype='bf16') < need()


def test_too_little_memory_is_refused(tmp_path):
    preflight(tmp_path, 0, 10**6)
    with refused('GB of memory are free', 'at least 1000000.0 GB', '--micro_batch'):
        preflight(tmp_path, 0, 10**15)


def test_a_folder_is_locked_as_long_as_its_process_lives(tmp_path):
    fork = multiprocessing.get_context('fork')
    ready = fork.Event()

    def hold():
        held = lock(tmp_path)                        # noqa: F841 (kept open as long as we live)
        ready.set()
        time.sleep(60)
    other = fork.Process(target=hold)
    other.start()
    try:
        assert ready.wait(10)
        with refused('another run', tmp_path):
            lock(tmp_path)
    finally:
        other.kill()                                 # kill -9: nothing is cleaned up
        other.join()
    held = lock(tmp_path)
    with refused('another run'):
        lock(tmp_path)
    held.close()


def test_a_save_that_was_cut_short_names_the_one_before(tmp_path):
    """A kill between the two renames: the folder opens as the one before, the file's name says where it is."""
    save_checkpoint(f'{tmp_path}/ckpt.pt', checkpoint(1))
    os.rename(tmp_path / 'ckpt.pt', tmp_path / 'ckpt.prev.pt')
    assert load_checkpoint(tmp_path)['step'] == 1
    with refused('cut short', f'{tmp_path}/ckpt.prev.pt'):
        load_checkpoint(f'{tmp_path}/ckpt.pt')
