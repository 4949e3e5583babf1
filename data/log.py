"""
What a training run says: losses, speed and memory, on the terminal and in OUT/log.jsonl, one JSON object a line.
"""
import json
import os
import resource
import sys
import time

import numpy as np
import torch
from tqdm import tqdm

from data.runtime import fail


def repair_log(file, step):
    """Drops what a killed run wrote after its last save, at `step` (-1: there was none), and a line that was cut."""
    kept = []
    if step >= 0 and os.path.exists(file):
        with open(file) as f:
            lines = f.readlines()
        for line in lines:
            try:
                row = json.loads(line)
            except ValueError:                       # cut
                continue
            if row['step'] < step or (row['step'] == step and 'val_loss' not in row):    # validation comes after a save
                kept.append(line)
    with open(f'{file}.tmp', 'w') as f:
        f.writelines(kept)
    os.replace(f'{file}.tmp', file)


class Log:
    """Speed, memory and losses, on the terminal and in OUT/log.jsonl."""

    def __init__(self, model, compiled, run, step, saved, env):
        self.run, self.env, self.file = run, env, f'{run.out}/log.jsonl'
        if env.master:
            repair_log(self.file, saved)
        self.flops, self.peak = model.flops_per_token(run.length), peak_flops(env.device)
        self.began = time.time()
        self.restart(step)
        self.times = []                              # milliseconds of each step
        mfu = 'no MFU: no published peak for this device'
        if self.peak:
            mfu = f'MFU of {self.peak / 1e12:.0f} TFLOP/s'
        env.print(f'{model.config.pe}, {model.num_params():,} parameters, training length '
                  f'{model.config.block_size}; {run.optimizer}, compile {"on" if compiled else "off"}; '
                  f'{self.flops / 1e6:,.1f} MFLOP a token (6N + 12 n_layer n_embd T); {mfu}')

    def restart(self, step):
        """Speed is counted from here."""
        self.clock, self.clock_step = time.time(), step

    def write(self, row, line, saved):
        if not self.env.master:
            return
        try:
            with open(self.file, 'a') as f:
                f.write(json.dumps(row) + '\n')
        except OSError as e:
            good = ''
            if not self.run.benchmark:
                good = f'; the last checkpoint is that of step {saved}, --resume goes on'
            fail(f'{self.file} cannot be written ({e.strerror}): free some space{good}')
        print(line, flush=True)

    def validation(self, step, val_loss, saved):
        row = dict(step=step, tokens=step * self.run.batch_tokens, val_loss=val_loss)
        self.write(row, f'step {step:,}/{self.run.steps:,} | val loss {val_loss:.4f}', saved)
        self.restart(step)

    def bar(self, parts, what):
        """Progress inside a step or a validation, gone after it; where steps take seconds, as the first one may."""
        quick = self.times and self.times[-1] < 2000
        return tqdm(parts, desc=what, leave=False, mininterval=1, disable=quick or not self.env.master,
                    dynamic_ncols=True)

    def begin_step(self):
        self.step_began = time.time()

    def end_step(self):
        self.times.append(1000 * (time.time() - self.step_began))

    def training(self, step, loss, lr, norm, saved):
        run = self.run
        speed = (step - self.clock_step) * run.batch_tokens / (time.time() - self.clock)         # tokens a second
        mfu, shown = None, ''
        if self.peak:
            mfu = speed * self.flops / (self.peak * self.env.world)
            shown = f' | mfu {mfu:.1%}'
        mem = used_memory(self.env.device)
        minutes_left = (run.steps - step) * run.batch_tokens / speed / 60
        row = dict(step=step, tokens=step * run.batch_tokens, loss=loss, lr=lr, grad_norm=norm, tok_s=speed, mfu=mfu,
                   mem_gb=mem)
        self.write(row, f'step {step:,}/{run.steps:,} | loss {loss:.4f} | lr {lr:.2e} | norm {norm:.2f} | '
                   f'{speed:,.0f} tok/s{shown} | {mem:.2f} GB | {minutes_left:.1f} min left', saved)
        self.restart(step)

    def summary(self, step):
        if self.times:
            low, median, high = np.percentile(self.times, (5, 50, 95))
            self.env.print(f'a step: {median:,.1f} ms in the median, 5 to 95 %: {low:,.1f} to {high:,.1f}, '
                           f'the longest {max(self.times):,.1f}')
        result = 'log.jsonl' if self.run.benchmark else 'ckpt.pt'
        self.env.print(f'done: {step * self.run.batch_tokens:,} tokens, {time.time() - self.began:.0f} s, '
                       f'{self.run.out}/{result}')


def used_memory(device):
    """GB: the most that this process has held."""
    if 'cuda' in device:
        return torch.cuda.max_memory_allocated() / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit = 1 if sys.platform == 'darwin' else 1024   # bytes on macOS, KiB on Linux
    return peak * unit / 1e9


def peak_flops(device):
    """Dense bf16 FLOP/s of the GPU by its data sheet, or None: MFU is then not reported."""
    known = {'H200': 989e12, 'H100 PCIe': 756e12, 'H100 NVL': 835e12, 'H100': 989e12, 'A100': 312e12, 'L40S': 362e12,
             '4090': 165e12, 'B200': 2250e12}
    if 'cuda' in device:
        name = torch.cuda.get_device_name()
        for part, flops in known.items():
            if part in name:
                return flops
    return None
