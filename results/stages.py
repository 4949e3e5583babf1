"""
Runs the stages of a sweep side by side, and says before each how long it will take.
"""
import os
import shlex
import subprocess
import sys
import threading
import time
from collections import deque
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass


def flags(options):
    """dict(steps=600, qk_norm=False, resume=True) -> ['--steps', '600', '--no-qk_norm', '--resume']"""
    words = []
    for name, value in options.items():
        if value is True:
            words.append(f'--{name}')
        elif value is False:
            words.append(f'--no-{name}')
        elif isinstance(value, (list, tuple)):
            words += [f'--{name}', ','.join(map(str, value))]
        else:
            words += [f'--{name}', str(value)]
    return words


@dataclass
class Command:
    """One of our scripts ('train.py') or modules ('-m data.text.prepare'), its options, what stands before them."""
    script: str
    options: dict
    before: tuple = ()
    processes: int = 1

    def words(self):
        launcher = []
        if self.processes > 1:
            launcher = f'-m torch.distributed.run --standalone --nproc_per_node={self.processes}'.split()
        return launcher + self.script.split() + list(self.before) + flags(self.options)

    def __str__(self):
        return 'python ' + shlex.join(self.words())


@dataclass
class Stage:
    """Commands that run one after the other, once the stage named `after` is done."""
    name: str
    commands: list
    log: str                     # where they speak when another stage has the terminal
    after: str = None
    seconds: float = 0           # expected; 0 where nobody has measured it
    row: object = None           # the Row of the table that it measures, if any


class Clock:
    """Seconds of work left: what is expected, corrected by how much longer than expected the stages so far took."""

    def __init__(self, stages, workers):
        self.left = sum(stage.seconds for stage in stages)
        self.workers = workers
        self.expected = self.took = 120              # so that one short stage does not judge the machine

    def announce(self, stage):
        if stage.seconds:
            pace = self.took / self.expected
            print(f'\n{time.strftime("%H:%M:%S")} {stage.name}: about {duration(stage.seconds * pace)}; '
                  f'all that is left: about {duration(self.left * pace / self.workers)}', flush=True)

    def ended(self, stage, seconds):
        self.left -= stage.seconds
        if stage.seconds:
            self.expected += stage.seconds
            self.took += seconds


def duration(seconds):
    return f'{seconds:.0f} s' if seconds < 90 else f'{seconds / 60:.0f} min'


def run(command, threads=None, log=None):
    """Shows and runs a command. With a log its output goes there; if it fails, only the last line is shown."""
    env = dict(os.environ)
    shown = str(command)
    if threads:
        env['OMP_NUM_THREADS'] = str(threads)
        shown = f'OMP_NUM_THREADS={threads} {shown}'
    if not log:
        print(f'\n$ {shown}', flush=True)
        code = subprocess.call([sys.executable, *command.words()], env=env)
    else:
        print(f'\n$ {shown} >> {log} 2>&1', flush=True)
        with open(log, 'a') as f:
            code = subprocess.call([sys.executable, *command.words()], env=env, stdout=f, stderr=subprocess.STDOUT)
        if code:
            with open(log, errors='replace') as f:
                print(f'{log}:', *deque(f, 1), file=sys.stderr)
    if code:
        sys.exit(code)


def run_stages(stages, workers, threads, clock):
    """
    Yields each stage as it ends. `workers` run at a time, with `threads` threads each; one of them has the terminal.
    The next to start is the first in the list that does not wait for another. Once one fails, no other starts. Those
    already running still count if they succeed; then the sweep ends with the failed one's error.
    """
    screen, failed = threading.Lock(), []

    def perform(stage):
        if failed:
            return False
        has_screen = screen.acquire(blocking=False)
        try:
            clock.announce(stage)
            start = time.time()
            for command in stage.commands:
                run(command, threads, None if has_screen else stage.log)
            clock.ended(stage, time.time() - start)
            return True
        except BaseException as e:                   # sys.exit, too
            failed.append(e)
            return False
        finally:
            if has_screen:
                screen.release()

    ended, waiting, running = {None}, list(stages), {}           # None: what a stage comes after that waits for none
    with ThreadPoolExecutor(workers) as pool:
        try:
            while waiting or running:
                ready = [stage for stage in waiting if stage.after in ended]
                for stage in ready[:workers - len(running)]:
                    running[pool.submit(perform, stage)] = stage
                    waiting.remove(stage)
                if not running:                      # what the rest waits for has failed
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    stage = running.pop(future)
                    if future.result():
                        ended.add(stage.name)
                        yield stage
        except BaseException as e:                   # Ctrl-C
            failed.append(e)
            raise
    if failed:
        raise failed[0]
