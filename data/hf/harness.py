r"""
lm-evaluation-harness on a checkpoint, in process: for what cannot be exported (n-hat, other encodings),
and for prompts that must be cut in the middle, as LongBench's (its own backend for transformers cuts them on the left).

    python -m data.hf.harness run --model nanonope --model_args ckpt=out/nope/head-log-8192.pt --tasks piqa,openbookqa
    python -m data.hf.harness run --model nanonope --model_args ckpt=out/nope/head.pt,max_length=8192 --tasks longbench
    python -m data.hf.harness run --model nanonope --model_args ckpt=out/nope/head.pt,tokenizer=TinyLlama-NoPE-1.1B \
        --tasks niah_single_1 --metadata '{"max_seq_lengths": [2048, 4096, 8000]}'

The command line is lm_eval's own (on a machine without a GPU add --device cpu). model_args: ckpt; max_length (tokens;
default the length that it was trained or extended to); tokenizer (a folder, for tasks that build their prompts with it;
default the checkpoint's own); add_bos_token (default True: rows begin with BOS in training); truncation_side (left,
middle or right; default middle); dtype. Decoding is greedy and one prompt at a time; --batch_size is for scoring. One
process.
"""
from types import SimpleNamespace

import torch
from torch.nn.attention import sdpa_kernel
from tqdm import tqdm

from data.checkpoint import check_ids, frozen, load_checkpoint, load_model, open_tokenizer
from data.hf.export_config import longest, special_ids
from data.kernels import DECODING
from data.runtime import fail, setup
from model import KVCache

try:
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import (
        handle_stop_sequences,
        normalize_gen_kwargs,
        postprocess_generated_text,
        truncate_tokens,
    )
except ImportError as e:
    fail(f'data.hf.harness needs lm-evaluation-harness ({e}): pip install lm-eval')


@register_model('nanonope')
class NanoNoPE(TemplateLM):

    def __init__(self, ckpt=None, max_length=None, tokenizer=None, add_bos_token=True, truncation_side='middle',
                 dtype='auto', batch_size=1, max_batch_size=None, device=None, **unknown):
        super().__init__()
        if unknown or not ckpt:
            wrong = f'{", ".join(unknown)} unknown' if unknown else 'no ckpt'
            fail(f'model_args: {wrong}; there are ckpt, max_length, tokenizer, add_bos_token, truncation_side, dtype')
        for n in batch_size, max_length or 1:
            if not str(n).isdigit() or int(n) < 1:
                fail(f'max_length={max_length} and --batch_size {batch_size} must be whole numbers above 0')
        if truncation_side not in ('left', 'middle', 'right') or dtype not in ('auto', 'bf16', 'fp32'):
            fail(f'model_args: truncation_side={truncation_side} (left, middle or right), '
                 f'dtype={dtype} (auto, bf16 or fp32)')
        self.env = setup(SimpleNamespace(device=device or 'auto', dtype=dtype, seed=0))
        if self.env.world > 1:
            fail('data.hf.harness is one process: start it without torchrun')
        ckpt = load_checkpoint(str(ckpt))
        self.model = frozen(load_model(ckpt), self.env)
        by_length = self.model.config.law == 'length'
        self.sloped = by_length and any(block.attn.slope.any().item() for block in self.model.blocks)
        name = f'hf:{tokenizer}' if tokenizer else ckpt['tokenizer']
        self.max_length = int(max_length or longest(ckpt))
        self.tok = open_tokenizer(ckpt, self.model.config, name, [self.max_length])
        self.ends = {self.tok.eos}                   # ids that end a text
        for ids in special_ids(name, self.model.config.vocab_size).values():
            if isinstance(ids, list):                # Llama 3 has several
                self.ends.update(ids)
            else:
                self.ends.add(ids)
        self.batch_size, self.side = int(batch_size), truncation_side
        self.add_bos = bool(add_bos_token and self.tok.bos is not None)

    @property
    def eot_token_id(self):
        if self.tok.bos is None:
            fail(f'the tokenizer {self.tok.name} has neither a BOS nor an EOS, which this task begins a text with')
        return self.tok.bos                          # it begins a document, and so ends the one before

    @property
    def tokenizer_name(self):                        # lm_eval's cache asks
        return self.tok.name

    def tok_encode(self, string, add_special_tokens=None, **kwargs):
        ids = self.tok.encode(string)
        if self.add_bos and add_special_tokens is not False:
            ids = [self.tok.bos] + ids
        if ids:
            check_ids(ids, self.model.config, self.tok)
        return ids

    def anchor(self, ids, n, side):
        """At most n of the ids; what is cut begins with BOS all the same, as rows do in training."""
        if len(ids) <= n:
            return ids
        ids = truncate_tokens(ids, n, side)
        if self.add_bos:
            ids = [self.tok.bos] + ids[1:]
        return ids

    @torch.inference_mode()
    def _loglikelihood_tokens(self, requests, disable_tqdm=False, **kwargs):
        """[(_, context ids, continuation ids)] -> [(its log-probability in nats, is it the greedy one)]."""
        rows = []                                    # (ids, how many of the last ones are scored)
        for _, context, continuation in requests:
            ids = self.anchor(context + continuation, self.max_length + 1, 'left')
            rows.append((ids, min(len(continuation), len(ids) - 1)))
        scores = [None] * len(rows)
        for batch in tqdm(self.batches(rows), disable=disable_tqdm):
            for i, score in zip(batch, self.score([rows[i] for i in batch])):
                scores[i] = score
                self.cache_hook.add_partial('loglikelihood', requests[i][0], score)
        return scores

    def batches(self, rows):
        """-> lists of indices into `rows`, at most batch_size each, the longest rows first: memory shows at once."""
        lengths = [len(ids) for ids, _ in rows]
        batches = []
        for i in sorted(range(len(rows)), key=lambda i: -lengths[i]):
            fits = batches and len(batches[-1]) < self.batch_size
            if fits and self.sloped:                 # the length is part of the temperature, and nothing may pad
                fits = lengths[i] == lengths[batches[-1][0]]
            if fits:
                batches[-1].append(i)
            else:
                batches.append([i])
        return batches

    def score(self, rows):
        """One batch, the longest row first -> [(log-probability of what is scored, is it the greedy one)]."""
        T = len(rows[0][0]) - 1
        padded = []
        for ids, _ in rows:
            padding = T + 1 - len(ids)               # stands where nothing looks
            padded.append(ids[:-1] + [0] * padding)
        first = min(len(ids) - 1 - n for ids, n in rows)         # the position that predicts the first token scored
        with self.env.autocast():
            x = torch.tensor(padded, device=self.env.device)
            logits = self.model(x, rows=slice(first, None))[0]                   # (B, T - first, V)
        scores = []
        for (ids, n), predicted in zip(rows, logits):
            end = len(ids) - 1 - first
            predicted = predicted[end - n:end].float()
            want = torch.tensor(ids[len(ids) - n:], device=predicted.device, dtype=torch.long)
            logprob = predicted.log_softmax(-1).gather(1, want[:, None]).sum().item()
            scores.append((logprob, torch.equal(predicted.argmax(-1), want)))
        return scores

    @torch.inference_mode()
    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        """[(text,)] -> [its log-probability], in windows of max_length that overlap only if the last would be short."""
        out = []
        for r in tqdm(requests, disable=disable_tqdm):
            ids = self.tok_encode(r.args[0], add_special_tokens=False)
            windows = utils.get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1)
            total = 0.0
            for context, continuation in map(utils.make_disjoint_window, windows):
                ids = torch.tensor([context + continuation], device=self.env.device)
                n = len(continuation)
                with self.env.autocast():            # with targets, so that no T x V logits stand in memory
                    loss = self.model(ids[:, :-1], ids[:, -n:], rows=slice(-n, None))[1]
                total -= loss.item() * n
            out.append(total)
            self.cache_hook.add_partial('loglikelihood_rolling', r.args, total)
        return out

    @torch.inference_mode()
    def generate_until(self, requests, disable_tqdm=False):
        """[(prompt, its settings)] -> [text up to a stop sequence, the end of a document or max_gen_toks], greedy."""
        out, cut = [], 0
        for request in tqdm(requests, disable=disable_tqdm):
            context, asked = request.args
            settings = normalize_gen_kwargs(asked)
            if settings['do_sample'] or settings.get('num_beams', 1) > 1:
                fail('data.hf.harness decodes greedily: neither do_sample nor num_beams')
            until = [stop for stop in handle_stop_sequences(settings['until'], eos=None) if stop]
            n = settings['max_gen_toks']
            if n >= self.max_length:
                fail(f'max_length={self.max_length} has no room for a prompt beside the {n} tokens that the task '
                     'generates')
            whole = self.tok_encode(context)
            ids = self.anchor(whole, self.max_length - n, self.side)
            if len(ids) < len(whole):
                cut += 1
            text = self.go_on(ids, n, until)
            out.append(postprocess_generated_text(text, until, None))
            self.cache_hook.add_partial('generate_until', (context, asked), out[-1])
        if cut:
            print(f'note: {cut} of {len(requests)} prompts were cut ({self.side}) to max_length={self.max_length} '
                  'less what is generated')
        return out

    def go_on(self, ids, n, until):
        """The text of at most n tokens behind the ids: it ends with the document, or with the first stop sequence."""
        cache = KVCache(len(ids) + n - 1)
        unseen, new, text = ids, [], ''
        with self.env.autocast(), sdpa_kernel(DECODING):
            while len(new) < n and not any(stop in text for stop in until):
                x = torch.tensor([unseen], device=self.env.device)
                logits = self.model(x, rows=slice(-1, None), cache=cache)[0]
                token = logits[0, -1].argmax().item()
                if token in self.ends:
                    break
                new.append(token)
                text = self.tok.decode(new)
                unseen = [token]
        return text


def main():
    from lm_eval.__main__ import cli_evaluate
    cli_evaluate()


if __name__ == '__main__':
    main()
