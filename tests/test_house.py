"What is generated agrees with the notebooks, and the notebooks are clean."
import ast
import configparser
import filecmp
import json
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

from hatemm_clip.base import cell_flag, leave_out_flagged

NOTEBOOKS = sorted((ROOT/'nbs').glob('*.ipynb'))
BIN = sys.executable.rsplit('/', 1)[0]


def run_in(folder, *command): subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=300)


@pytest.fixture(scope='module')
def copy(tmp_path_factory):
    "A copy of the checkout's sources, to export and clean in."
    folder = tmp_path_factory.mktemp('copy')/'hatemm_clip'
    ignore = shutil.ignore_patterns('.git', '.venv', 'runs', 'demo_data', '_docs', '_proc', '__pycache__', '*.egg-info', 'build', '.cache')
    shutil.copytree(ROOT, folder, ignore=ignore, symlinks=True)
    return folder


def test_export_leaves_no_diff(copy):
    run_in(copy, f'{BIN}/nbdev_export')
    for file in sorted((ROOT/'hatemm_clip').glob('*.py')): assert filecmp.cmp(file, copy/'hatemm_clip'/file.name, shallow=False), f'{file.name} differs from its notebook: run `make export`'


def test_notebooks_are_clean(copy):
    run_in(copy, f'{BIN}/nbdev_clean')
    for file in NOTEBOOKS: assert filecmp.cmp(file, copy/'nbs'/file.name, shallow=False), f'{file.name} is not clean: run `make export`'


def test_readme_is_generated(copy):
    run_in(copy, sys.executable, 'tools/prepare.py', '--readme')
    assert (copy/'nbs/sidebar.yml').read_text() == (ROOT/'nbs/sidebar.yml').read_text(), 'nbs/sidebar.yml lacks a notebook: run `make export`'
    assert (copy/'README.md').read_text() == (ROOT/'README.md').read_text(), 'README.md differs from nbs/index.ipynb: run `make export`'
    assert '<style' not in (ROOT/'README.md').read_text(), 'a table as HTML in README.md: print it'


@pytest.mark.parametrize('file', NOTEBOOKS, ids=lambda f: f.stem)
def test_notebook_is_fit_to_show(file):
    nb = json.loads(file.read_text())
    debris = re.compile(r'/(?:work|root|tmp|home/\w+)/|Traceback \(most recent|Warning: |IProgress|\\u001b\[|\d+it/s')
    for cell in nb['cells']:
        for output in cell.get('outputs', []):
            text = json.dumps({k: v for k, v in output.items() if k != 'data'}) + ''.join(json.dumps(v) for k, v in output.get('data', {}).items() if k.startswith('text/plain'))
            assert not debris.search(text), f"{file.name}: debris in an output of the cell {''.join(cell['source'])[:60]!r}"
    if file.name[0].isdigit(): assert any('parameters' in c['metadata'].get('tags', []) for c in nb['cells']), f'{file.name} has no parameters cell'


@pytest.mark.parametrize('file', NOTEBOOKS, ids=lambda f: f.stem)
def test_run_all_leaves_flagged_cells_out(file):
    sources = [''.join(c['source']) for c in json.loads(file.read_text())['cells'] if c['cell_type'] == 'code']
    flagged = [i for i, source in enumerate(sources) if cell_flag(source)]
    asked = [i for i, source in enumerate(sources) if 'leave_out_flagged()' in source.splitlines()]
    assert not flagged or asked and asked[0] < flagged[0], f'{file.name} has flagged cells and does not call leave_out_flagged before them'


def test_flagged_cells_say_how_to_run(monkeypatch, capsys):
    from IPython.core.interactiveshell import InteractiveShell
    shell = InteractiveShell.instance()
    leave_out_flagged()
    leave_out_flagged()
    monkeypatch.delenv('HATEMM_CELLS', raising=False)
    shell.run_cell('#| slow\nran = 1')
    assert 'ran' not in shell.user_ns and capsys.readouterr().out.count('%env HATEMM_CELLS=slow') == 1
    monkeypatch.setenv('HATEMM_CELLS', 'slow')
    shell.run_cell('#| slow\nran = 1')
    assert shell.user_ns['ran'] == 1
    InteractiveShell.clear_instance()


def room_of_module():
    "Notebook by module: 000_base for base."
    return {f.stem.split('_', 1)[1]: f.stem for f in NOTEBOOKS if f.name[0].isdigit()}


def imported_modules(file):
    "Modules of the package that a file imports, at its top or inside functions."
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import): found |= {a.name.split('.')[1] for a in node.names if a.name.startswith('hatemm_clip.')}
        if not isinstance(node, ast.ImportFrom): continue
        parts = (node.module or '').split('.')
        package, inner = (True, parts) if node.level else (parts[0] == 'hatemm_clip', parts[1:])
        if package: found |= {inner[0]} if inner and inner[0] else {a.name for a in node.names}
    return found


def test_imports_are_seen():
    seen = imported_modules(ROOT/'hatemm_clip/embed.py')
    assert {'base', 'features', 'asr'} <= seen


@pytest.mark.parametrize('name', room_of_module())
def test_a_module_imports_only_from_lower_numbers(name):
    rooms, file = room_of_module(), ROOT/f'hatemm_clip/{name}.py'
    if not file.exists(): pytest.skip('exports nothing')
    for used in imported_modules(file) & rooms.keys() - {name}: assert rooms[used] < rooms[name], f'{rooms[name]} imports {rooms[used]}, which comes later'


def test_every_module_comes_from_a_notebook():
    files = {f.stem for f in (ROOT/'hatemm_clip').glob('*.py')} - {'__init__', '__main__', '_modidx'}
    assert files <= room_of_module().keys(), 'a module that no notebook exports: delete it'


def test_package_needs_no_nbdev():
    settings = configparser.ConfigParser(delimiters=['='], interpolation=None)
    settings.read(ROOT/'settings.ini')
    assert not re.search(r'nbdev|fastcore|execnb', settings['DEFAULT']['requirements'])
    for file in (ROOT/'hatemm_clip').glob('*.py'):
        if file.name != '_modidx.py': assert not re.search(r'^\s*(import|from) (nbdev|fastcore|execnb)', file.read_text(), re.M), file.name


def test_quarto_settings_are_a_link():
    assert (ROOT/'nbs/_quarto.yml').is_symlink() and (ROOT/'nbs/_quarto.yml').resolve() == ROOT/'_quarto.yml'
