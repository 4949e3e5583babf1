"""
The sweep behind make reproduce, make table and make encodings: plans the stages of a table (results/tables.py), runs
the scripts as a user would, collects their csv files in one, and prints one table, the heat maps and a figure. What is
there already is not run again, so a sweep that was stopped goes on where it was.

    python -m results.reproduce --scale tiny                                        # the headline, one seed
    python -m results.reproduce --scale tiny --seeds 1,2,3,4,5 --dtype bf16,fp32 --csv results/headline.csv
    python -m results.reproduce --scale tiny --seeds 1,2,3 --dtype fp32 --table ablations     # results/tiny.csv
    python -m results.reproduce --scale tiny --seeds 1,2,3 --dtype fp32 --table encodings     # tiny-encodings.csv
    python -m results.reproduce --scale tiny --seeds 1,2,3 --dtype fp32 --table layers        # tiny-layers.csv
    python -m results.reproduce --scale small --text ~/books       # one GPU; without --text FineWeb-Edu and PG19
    python -m results.reproduce --scale paper                      # eight GPUs, days

Past the first decimals the numbers depend on how a machine rounds. So each --dtype of training (and --threads) is a
separate run, with its own folder and its own lines in the csv.
"""
import os
import time

import torch

from data.checkpoint import preflight
from data.figures import pyplot, read_csv, write_csv
from data.runtime import fail, int_list, parser, positive_int
from data.tokens import documents, open_data
from results import figures
from results.plan import Machine, Plan
from results.stages import Clock, run_stages
from results.tables import SCALES, TABLES


def dtype_list(text):
    """'bf16,fp32' -> ['bf16', 'fp32']"""
    dtypes = text.split(',')
    unknown = set(dtypes) - {'auto', 'bf16', 'fp32'}
    if unknown:
        fail(f'--dtype {text}: auto, bf16, fp32, or two of them with a comma between')
    return dtypes


def parse_args(argv=None):
    p = parser(__doc__)
    p.add_argument('--scale', default='tiny', help=' '.join(SCALES))
    p.add_argument('--table', choices=TABLES, default='headline',
                   help='ablations: what takes the method apart, too; encodings: every encoding, every extension; '
                   'layers: encodings and windows that differ by layer')
    p.add_argument('--seeds', type=int_list, default=[1])
    p.add_argument('--dtype', type=dtype_list, default=['auto'],
                   help='of training, one or several. Scales toy and tiny extend and measure in fp32')
    p.add_argument('--threads', type=positive_int, help='of each stage (default: the cores, shared out to the stages)')
    p.add_argument('--out', default='out', help='folder for data and runs')
    p.add_argument('--text', metavar='DIR',
                   help='scales small and paper: these text files, one a document (default: downloaded corpora)')
    p.add_argument('--tokenizer', help='of that text (default: gpt2; for paper hf:TinyLlama-NoPE-1.1B)')
    p.add_argument('--plot', metavar='FILE.png', help='loss and passkey by length; of the first seed attention entropy '
                   'in FILE-entropy.png, passkey by depth in FILE-passkey.png (headline: OUT/SCALE/table.png, if '
                   'matplotlib is installed)')
    p.add_argument('--no_run', action='store_true', help='run nothing: table and figures of what the csv has')
    p.add_argument('--csv', help='where the rows go (default: headline OUT/SCALE/table.csv, ablations '
                   'results/SCALE.csv, encodings and layers results/SCALE-TABLE.csv)')
    args = p.parse_args(argv)
    if args.scale not in SCALES:
        fail(f'SCALE={args.scale} is not here: one of {" ".join(SCALES)}')
    synthetic = 'corpora' in SCALES[args.scale]
    if synthetic and (args.text or args.tokenizer):
        fail(f'SCALE={args.scale} makes its own text: --text and --tokenizer are for small and paper')
    if not synthetic and args.table != 'headline':
        fail(f'SCALE={args.scale} has one table, the headline: --table is for toy and tiny')
    if args.plot:
        pyplot(args.plot)                            # what is missing for it is known before the work
    return args


def check(plan, missing, seed):
    """Before the first stage: shows the commands of what takes days, and ends the program where GPUs are missing."""
    if plan.about:
        print(plan.about)
        for stage in plan.stages(missing, seed, Machine('auto')):
            for command in stage.commands:
                if command.script in ('train.py', 'extend.py') and command.options.get('method') != 'none':
                    print(command)
    gpus = torch.cuda.device_count()
    if plan.dtype == 'auto' and gpus < plan.processes:
        fail(f'SCALE={plan.scale} takes {plan.processes} GPU of this machine, which has {gpus}; SCALE=tiny needs none')


def check_longest(plan):
    """Before the hours of training: ends the program if val.bin has no document longer than the longest length."""
    folder = plan.data(plan.measured_on)
    longest = max(map(len, documents(*open_data(folder, 'val'), 'val')))
    need = max(plan.lengths) + plan.measure['stride']            # perplexity scores the stride behind it
    if longest < need:
        fail(f'{folder}/val.bin: its longest document has {longest:,} tokens, the longest length takes {need:,}: '
             'give longer texts')


def sort_rows(lines, names):
    """Lines of the csv: seed by seed and machine by machine, in the order of the table; those of other tables last."""
    def key(line):
        place = len(names)
        if line['row'] in names:
            place = names.index(line['row'])
        return figures.run_of(line), place
    return sorted(lines, key=key)


def line_run(seed, machine):
    """The run as figures.run_of() reads it off a line of the csv."""
    return seed, machine.dtype, machine.threads_text


def missing_rows(plan, done, runs):
    """-> {(seed, machine): the rows of the table of which the csv has no line}"""
    have = set()
    for line in done:
        have.add((line['row'], figures.run_of(line)))
    missing = {}
    for seed, machine in runs:
        missing[seed, machine] = []
        for row in plan.rows:
            if (row.name, line_run(seed, machine)) not in have:
                missing[seed, machine].append(row)
    return missing


def make_rows(plan, missing, done, file, threads):
    """Runs the stages of the missing rows, and writes the csv whenever one is measured -> all its lines."""
    unmeasured = []
    for rows in missing.values():
        unmeasured += rows
    first_seed, _ = next(iter(missing))
    check(plan, unmeasured, first_seed)
    workers, threads = plan.share(len(unmeasured), threads)

    corpora = plan.corpora_stages()
    todo, ahead = {}, list(corpora)
    for (seed, machine), rows in missing.items():
        todo[seed, machine] = plan.stages(rows, seed, machine)
        ahead += todo[seed, machine]
    clock = Clock(ahead, workers)
    for _ in run_stages(corpora, 1, None, clock):
        pass
    check_longest(plan)

    for (seed, machine), stages in todo.items():
        name = f'seed {seed}'
        if machine.dtype != 'auto':
            name += f', {machine.dtype}'
        if machine.threads:
            name += f', {machine.threads} threads'
        wanted = len(missing[seed, machine])
        if wanted < len(plan.rows):
            print(f'{name}: {len(plan.rows) - wanted} of {len(plan.rows)} rows are in {file} already')
        measured = 0
        for stage in run_stages(stages, workers, threads, clock):
            if stage.row:                            # a row counts as soon as it is measured
                done = sort_rows(done + plan.collect(stage, seed, machine), plan.names)
                write_csv(file, done)
                measured += 1
                print(f'{name}: {measured} of {wanted} rows measured', flush=True)
    return done


def main(argv=None):
    args = parse_args(argv)
    start = time.time()
    plan = Plan(args.scale, args.table, args.out, args.text, args.tokenizer)
    file = args.csv or plan.csv
    preflight(os.path.dirname(file) or '.', 0)
    runs = []
    for seed in args.seeds:
        for dtype in args.dtype:
            runs.append((seed, Machine(dtype, args.threads)))

    # the rows that are there count if they were made as they would be now; those of other tables stay
    done = []
    for line in read_csv(file):
        line = figures.with_new_columns(line)
        if plan.is_current(line):
            done.append(line)
    missing = missing_rows(plan, done, runs)
    if any(missing.values()) and not args.no_run:
        done = make_rows(plan, missing, done, file, args.threads)

    asked = [line_run(seed, machine) for seed, machine in runs]
    shown = []
    for line in done:
        if line['row'] in plan.names and figures.run_of(line) in asked:
            shown.append(line)
    if not shown:
        fail(f'{file} has no row of this table, these seeds and this --dtype: leave out --no_run')
    first_seed, first_machine = runs[0]
    figures.print_heat_maps(plan, first_seed, first_machine)
    print('\n' + figures.table(shown, plan.names, plan.lengths, plan.L))
    if args.table == 'layers':
        print('\n' + figures.table_of_caches(plan))
    if len(runs) > 1 and args.table == 'headline':
        print('\n' + figures.table_of_runs(shown, plan.names, plan.lengths, plan.L))
    os.makedirs(plan.out, exist_ok=True)             # where the figure goes by default
    figures.draw(plan, shown, first_seed, first_machine, args.plot)
    print(f'\n{file}; {time.time() - start:.0f} s')


if __name__ == '__main__':
    main()
