"""
The plan of a sweep: which commands make each row of a table at a scale, where its files lie, and what to collect.
"""
import json
import os
import statistics
import zlib
from dataclasses import dataclass

import torch

from data.checkpoint import find_checkpoint, load_checkpoint, stem
from data.figures import read_csv
from model import PRESETS, GPTConfig
from results.stages import Command, Stage, flags
from results.tables import SCALES, TABLES

TUNED = ('head', 'head-log', 'longrope')


@dataclass(frozen=True)
class Machine:
    """What rounding depends on: the precision of training that is asked for, and the threads (None: what is free)."""
    dtype: str
    threads: int = None

    @property
    def threads_text(self):
        return str(self.threads or '')

    @property
    def suffix(self):
        """Of a run's folder: nope-1 where the machine decides, nope-1-fp32, nope-1-fp32-2-threads where it is told."""
        suffix = ''
        if self.dtype != 'auto':
            suffix += f'-{self.dtype}'
        if self.threads:
            suffix += f'-{self.threads}-threads'
        return suffix


class Plan:
    """A table at a scale."""

    def __init__(self, scale, table='headline', out='out', text=None, tokenizer=None):
        settings = SCALES[scale]
        synthetic = 'corpora' in settings            # else real text, which has one table only
        if synthetic:
            settings = TABLES[table] | settings
        self.scale, self.table, self.out = scale, table, f'{out}/{scale}'
        self.rows, self.runs, self.L = settings['rows'], settings['runs'], settings['L']
        self.names = [row.name for row in self.rows]
        self.lengths = [int(self.L * times) for times in settings['lengths']]
        self.times = settings['times']
        self.preset, self.shape = settings['preset'], settings['shape']
        self.train, self.tune = settings['train'], settings['tune']
        self.measure, self.passkey = settings['measure'], settings['passkey']
        self.dtype, self.processes = settings['dtype'], settings['processes']
        self.about, self.seconds = settings.get('about'), settings.get('seconds')
        self.csv = f'results/{scale}-{table}.csv'
        if table == 'headline':
            self.csv = f'{self.out}/table.csv'
        if table == 'ablations':
            self.csv = f'results/{scale}.csv'
        if synthetic:
            self.measured_on = settings['measured_on']
            self.corpora = self.synthetic_corpora(settings)
        else:
            # your own text serves for both, training and measuring; of what is downloaded, PG19 is for measuring
            self.measured_on = 'text' if text else 'pg19'
            self.corpora = self.text_corpora(settings, text, tokenizer or settings['tokenizer'])

    # ------------------------------------------------------------------------------------------------------------
    # corpora: {name: (folder, command)}

    def synthetic_corpora(self, settings):
        used = {self.measured_on}
        for row in self.rows:
            used.add(row.corpus)
            for name in self.chain(row.run):
                used.add(self.runs[name].corpus)
        sizes = settings.get('tokens', {})           # a scale may want fewer tokens of a corpus
        corpora = {}
        for name, options in settings['corpora'].items():
            if name in used:
                folder = f'{self.out}/{name}'
                options = dict(out=folder) | options
                options['tokens'] = sizes.get(name, options['tokens'])
                corpora[name] = folder, Command('-m data.passkey.prepare', options)
        return corpora

    def text_corpora(self, settings, text, tokenizer):
        # {name: (script in data/, its arguments, its options)}
        if text:
            sources = dict(text=('text', (text,), dict(val=0.05, tokenizer=tokenizer)))
        else:
            web = 'fineweb_edu'
            if self.scale == 'paper':
                web = 'slimpajama_starcoder'
            sources = dict(text=(web, (), dict(tokens=settings['tokens'], tokenizer=tokenizer)),
                           pg19=('pg19', (), dict(tokenizer=tokenizer)))
        corpora = {}
        for name, source in sources.items():
            # what a text is, its folder must tell: another text gets another one
            checksum = zlib.crc32(repr(source).encode())
            folder = f'{self.out}/{name}-{checksum:08x}'
            if text and os.path.exists(f'{text}/meta.json'):         # tokenised beforehand
                folder = text
            script, before, options = source
            corpora[name] = folder, Command(f'-m data.{script}.prepare', dict(out=folder) | options, before)
        return corpora

    def data(self, corpus):
        folder, _ = self.corpora[corpus]
        return folder

    def corpora_stages(self):
        """What makes the corpora that are not there yet."""
        stages = []
        for name, (folder, command) in self.corpora.items():
            if os.path.exists(f'{folder}/meta.json'):
                continue
            seconds = 0
            if self.seconds:
                seconds = self.seconds['begin'] + self.seconds['million'] * command.options['tokens'] / 1e6
            stages.append(Stage(f'corpus {name}', [command], f'{folder}.txt', seconds=seconds))
        return stages

    # ------------------------------------------------------------------------------------------------------------
    # options: what decides the numbers

    def chain(self, name):
        """A run, after those that it starts from."""
        start = self.runs[name].start
        if not start:
            return [name]
        return self.chain(start) + [name]

    def train_options(self, name, machine):
        run = self.runs[name]
        options = run.options | self.train | dict(dtype=machine.dtype)
        if run.start:                                # it has the shape of the run that it starts from
            return options
        return dict(preset=self.preset) | self.shape | options

    def extended_length(self, row):
        return int(self.L * (row.times or self.times))

    def extended_lengths(self, row):
        """The lengths that extend.py is called for: none, one, or each past the training length."""
        if row.each_length:
            return [n for n in self.row_lengths(row) if n > self.L]
        if row.method:
            return [self.extended_length(row)]
        return []

    def extend_options(self, row):
        options = dict(method=row.method, length=self.extended_length(row), dtype=self.dtype)
        return options | self.tune | row.options

    def train_on_options(self, row, machine):
        length = dict(length=self.extended_length(row))
        return length | row.train_on | self.train | dict(dtype=machine.dtype)

    def row_lengths(self, row):
        if self.runs[row.run].options['pe'] == 'learned':            # its table ends
            return [n for n in self.lengths if n <= self.L]
        return self.lengths

    def recipe(self, row, machine):
        """All that a row is made with, as text: a row in the csv is made again where it says something else."""
        steps = []

        def add(options, corpus):
            words = ' '.join(flags(options))
            steps.append(f'{words} on {self.known_as(corpus)}')

        for name in self.chain(row.run):
            add(self.train_options(name, machine), self.runs[name].corpus)
        if row.method:
            options = self.extend_options(row)
            if row.each_length:
                options['each_length'] = True
            add(options, row.corpus)
        if row.train_on:
            add(self.train_on_options(row, machine), row.corpus)
        add(dict(lengths=self.row_lengths(row), dtype=self.dtype) | self.measure | self.passkey, self.measured_on)
        return ' | '.join(steps)

    def known_as(self, corpus):
        """A corpus by all that makes it, but for where it lies."""
        _, command = self.corpora[corpus]
        options = dict(command.options)
        del options['out']
        return ' '.join([corpus, *command.before, *flags(options)])

    def is_current(self, line):
        """Whether a line of the csv stays: it is of another table, or made as it would be now."""
        for row in self.rows:
            if row.name == line['row']:              # threads are no part of a recipe
                return line['flags'] == self.recipe(row, Machine(line['dtype']))
        return True

    # ------------------------------------------------------------------------------------------------------------
    # stages

    def share(self, rows, threads):
        """How many stages run side by side, and the threads of each: GPUs are each needed whole, cores are shared."""
        cores = os.cpu_count() or 1
        if self.processes > 1 or torch.cuda.is_available():
            return 1, threads
        workers = max(1, min(rows, cores // (threads or 1)))
        if workers == 1:
            return 1, threads
        return workers, threads or cores // workers

    def folder(self, name, seed, machine):
        """Of a run: out/tiny/nope-1."""
        return f'{self.out}/{name}-{seed}{machine.suffix}'

    def row_folder(self, row, seed, machine):
        """Of a row's results: out/tiny/nope-1/nope-head-no-focus for 'NoPE head, no focus'."""
        name = row.name.replace(',', '').replace(' ', '-').lower()
        return f'{self.folder(row.run, seed, machine)}/{name}'

    def stages(self, rows, seed, machine):
        """
        What makes these rows: each run, and then its rows, so that they are there early. Those that tune or train come
        first, since they take longest.
        """
        def order(row):                              # False sorts before True
            return not row.train_on, row.method not in TUNED

        rows = sorted(rows, key=order)
        names = {}                                   # of the runs, each once, in the order in which they are needed
        for row in rows:
            names |= dict.fromkeys(self.chain(row.run))
        stages = []
        for name in names:
            stages.append(self.run_stage(name, seed, machine))
            stages += [self.row_stage(row, seed, machine) for row in rows if row.run == name]
        return stages

    def command(self, script, options):
        return Command(script, options, processes=self.processes)

    def run_stage(self, name, seed, machine):
        run, folder = self.runs[name], self.folder(name, seed, machine)
        options = self.train_options(name, machine)
        seconds = 0
        if self.seconds:
            steps = options['steps']
            ckpt = find_checkpoint(folder)
            if ckpt:                                 # it was stopped: what is left
                steps -= load_checkpoint(ckpt)['step']
            seconds = self.seconds['begin'] + steps * self.seconds['step']
        where = dict(data=self.data(run.corpus), seed=seed, resume=True, out=folder)
        after = None
        if run.start:
            after = f'{run.start}, seed {seed}'
            where['init_from'] = self.folder(run.start, seed, machine)
        command = self.command('train.py', options | where)
        return Stage(f'{name}, seed {seed}', [command], f'{folder}.txt', after, seconds)

    def checkpoints(self, row, seed, machine):
        """{checkpoint: the lengths that it is measured at}."""
        base, folder = self.folder(row.run, seed, machine), self.row_folder(row, seed, machine)
        lengths = self.row_lengths(row)
        if row.each_length:
            ckpts = {base: [n for n in lengths if n <= self.L]}
            for n in self.extended_lengths(row):
                ckpts[self.extended_file(row, seed, machine, n)] = [n]
            return ckpts
        if row.train_on:
            return {f'{folder}/on': lengths}
        if row.method:
            return {self.extended_file(row, seed, machine): lengths}
        return {base: lengths}

    def extended_file(self, row, seed, machine, length=None):
        """What extend.py writes: uniform-2048.pt, uniform-logn-2048.pt."""
        name = row.method
        if 'law' in row.options:
            name += f'-{row.options["law"]}'
        length = length or self.extended_length(row)
        return f'{self.row_folder(row, seed, machine)}/{name}-{length}.pt'

    def row_stage(self, row, seed, machine):
        """Extends and measures a row of a seed."""
        base, folder = self.folder(row.run, seed, machine), self.row_folder(row, seed, machine)
        commands = []
        for n in self.extended_lengths(row):
            where = dict(ckpt=base, data=self.data(row.corpus), out=folder, eval_tokens=0)
            options = self.extend_options(row) | dict(length=n)
            commands.append(self.command('extend.py', where | options))
        if row.train_on:
            start = self.extended_file(row, seed, machine)
            where = dict(init_from=start, data=self.data(row.corpus), seed=seed, resume=True, out=f'{folder}/on')
            commands.append(self.command('train.py', where | self.train_on_options(row, machine)))
        for ckpt, lengths in self.checkpoints(row, seed, machine).items():
            common = dict(ckpt=ckpt, lengths=lengths, dtype=self.dtype, out=folder)
            ppl = dict(method='none', data=self.data(self.measured_on)) | self.measure
            if 'protocol' not in self.measure:       # the same tokens, where not every length is measured
                ppl['past'] = max(self.lengths)
            commands.append(self.command('extend.py', common | ppl))
            commands.append(self.command('eval_passkey.py', common | self.passkey))
        after = f'{row.run}, seed {seed}'
        seconds = self.row_seconds(row, len(commands))
        return Stage(f'{row.name}, seed {seed}', commands, f'{folder}.txt', after, seconds, row)

    def row_seconds(self, row, n_commands):
        if not self.seconds:
            return 0
        method = (row.method or '').removesuffix('-log')
        extending = self.seconds.get(method, 0) * sum(self.extended_lengths(row)) / self.extended_length(row)
        seconds = n_commands * self.seconds['begin'] + self.seconds['measure'] + extending
        if row.train_on:                             # twice the tokens of a step, four times as long rows
            seconds += row.train_on['steps'] * 3 * self.seconds['step']
        return seconds

    def cached_numbers(self, row, n):
        """What the cache holds after n tokens: keys and values of a layer's window, where it has one."""
        options = dict(PRESETS[self.preset])
        for name in self.chain(row.run):
            options |= self.train_options(name, Machine('auto'))
        fields = GPTConfig.__dataclass_fields__      # the others are of training
        config = GPTConfig(**{name: value for name, value in options.items() if name in fields})
        tokens = 0                                   # of all layers
        for window in config.layer_window:
            if window:
                tokens += min(n, window - 1)
            else:
                tokens += n
        return 2 * config.n_kv_head * config.head_size * tokens

    # ------------------------------------------------------------------------------------------------------------
    # collecting

    def collect(self, stage, seed, machine):
        """Lines of the csv, one a length, from the files that a row's stage has left."""
        row = stage.row
        folder = self.row_folder(row, seed, machine)
        tokens, seconds = self.cost(row, seed, machine)
        trained_in = load_checkpoint(self.folder(row.run, seed, machine))['args']['dtype']
        model = dict(seed=seed, dtype=machine.dtype, threads=machine.threads_text, trained_in=trained_in, row=row.name)
        cost = dict(tokens=tokens, extended_s=f'{seconds:.0f}', flags=self.recipe(row, machine))
        kind = 'paper.ppl' if 'protocol' in self.measure else 'ppl'
        lines = []
        for ckpt in self.checkpoints(row, seed, machine):
            prompts = read_csv(f'{folder}/{stem(ckpt)}.passkey.csv')
            for ppl in read_csv(f'{folder}/{stem(ckpt)}.{kind}.csv'):
                hits = [int(prompt['accuracy']) for prompt in prompts if prompt['length'] == ppl['length']]
                loss = f'{float(ppl["nll"]):.4f}'
                passkey = f'{sum(hits) / len(hits):.4f}'
                found = dict(length=ppl['length'], loss=loss, passkey=passkey, prompts=len(hits))
                lines.append(model | found | cost)
        return lines

    def cost(self, row, seed, machine):
        """What extending a row took: (tokens, seconds)."""
        folder = self.row_folder(row, seed, machine)
        tokens = seconds = 0
        for n in self.extended_lengths(row):
            extended = load_checkpoint(self.extended_file(row, seed, machine, n))['extended']
            tokens += extended['tokens']
            seconds += extended['seconds']
        if row.train_on:
            # by its speed, since training may have been stopped and resumed in between
            speeds = []
            with open(f'{folder}/on/log.jsonl') as f:
                for line in map(json.loads, f):
                    if 'tok_s' in line:
                        speeds.append(line['tok_s'])
            trained = load_checkpoint(f'{folder}/on')['tokens']
            tokens += trained
            seconds += trained / statistics.median(speeds)
        return tokens, seconds
