"""What the documents say can be typed: every command parses, every target and every file that they name is there."""
import glob
import importlib
import os
import re
import shlex

import pytest
from conftest import ROOT, refused

DOCUMENTS = ('README.md', 'data/README.md', 'results/README.md')
COMMAND = re.compile(
    r'(?:python3?|torchrun(?: --[a-z]\S*)*) (-m (?:data|results)\.[\w.]+|[a-z_]+\.py)(?= |$|`)([^#`|]*)'
)


def read(file):
    with open(os.path.join(ROOT, file)) as f:
        return f.read()


def texts():
    """(file, the text that has commands): the documents, and the docstring that each script shows with --help."""
    for file in DOCUMENTS:
        yield file, read(file)
    for pattern in '*.py', 'data/*/*.py', 'results/*.py':
        yield from docstrings(pattern)


def docstrings(pattern):
    for file in sorted(glob.glob(pattern, root_dir=ROOT)):
        parts = read(file).split('"""')
        if len(parts) > 1:
            yield file, parts[1]


def commands():
    """(file, script, flags) of every line that starts one of our scripts."""
    for file, text in texts():
        for line in text.replace('\\\n', ' ').splitlines():            # a line that goes on
            found = COMMAND.search(line.replace(' ...', ''))
            if found:
                yield file, found[1], found[2].partition('; done')[0].strip()


def test_there_are_commands():
    assert len(list(commands())) > 20


def module_of(script):
    name = script.removeprefix('-m ').removesuffix('.py')
    if name == 'model':                              # it hands its command line on
        name = 'data.sample'
    return importlib.import_module(name)


@pytest.mark.parametrize('file, script, flags', list(commands()))
def test_a_documented_command_is_accepted(file, script, flags):
    if script.endswith('harness'):
        pytest.skip('the command line is lm_eval\'s own: test_harness.py runs it')
    module = module_of(script)
    module.parse_args(shlex.split(flags.replace('$n', '1024')))      # in a loop of the shell


@pytest.mark.parametrize('file, script, flags', [c for c in commands() if 'harness' not in c[1]])
def test_a_command_with_a_wrong_flag_is_not(file, script, flags):
    module = module_of(script)
    with refused('--nonsense'):
        module.parse_args([*shlex.split(flags.replace('$n', '1024')), '--nonsense'])


def targets():
    return {target for file, text in texts() for target in re.findall(r'`make ([a-z][a-z0-9-]*)', text)}


@pytest.mark.parametrize('target', sorted(targets()))
def test_a_documented_target_is_in_the_makefile(target):
    assert re.search(rf'^{target}:', read('Makefile'), re.M)


def links():
    for file in DOCUMENTS:
        for target in re.findall(r'\]\(([^)#]+)', read(file)):
            if '://' not in target:
                yield file, target


@pytest.mark.parametrize('file, target', sorted(set(links())))
def test_a_link_leads_to_a_file(file, target):
    assert os.path.exists(os.path.join(ROOT, os.path.dirname(file), target))


def named():
    """Names in backticks that are files of ours: with the ending of one, and in a folder that has code."""
    for file in DOCUMENTS:
        for name in re.findall(r'`([\w/.-]+\.(?:py|md|sh))`', read(file)):
            if not name.startswith('out/'):
                yield file, name


@pytest.mark.parametrize('file, name', sorted(set(named())))
def test_a_file_that_is_named_is_there(file, name):
    """From the root or from the folder of the document; a bare name may be anywhere: tables.py."""
    here = [name, os.path.join(os.path.dirname(file), name)]
    found = [path for path in here if os.path.exists(os.path.join(ROOT, path))]
    found += glob.glob(f'**/{name}', root_dir=ROOT, recursive=True)
    assert found
