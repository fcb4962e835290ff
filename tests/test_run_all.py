"*Run All* keeps what flagged cells have given, in JupyterLab and wherever else a notebook runs."
import shutil

import nbformat
import pytest
from conftest import ROOT
from demo import run_all
from nbformat.v4 import new_code_cell, new_notebook

PIXEL = 'iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg==\n'
OUTPUTS = [
    dict(output_type='stream', name='stdout', text='one\ntwo\n'),
    dict(output_type='display_data', data={'text/plain': '<Figure>', 'image/png': PIXEL}, metadata={'image/png': dict(width=3)}),
    dict(output_type='execute_result', execution_count=None, data={'text/html': '<table>\n</table>', 'text/plain': 'a table'}, metadata={})]
ERROR = [dict(output_type='error', ename='ValueError', evalue='shown failing', traceback=['first', 'second'])]


@pytest.mark.parametrize('known_by', ['JupyterLab', 'VS Code', 'its folder'])
def test_flagged_cells_keep_their_outputs(tmp_path, monkeypatch, known_by):
    file, elsewhere = tmp_path/'nbs/toy.ipynb', tmp_path/'elsewhere'
    for folder in (file.parent, elsewhere): folder.mkdir()
    begin = f"__vsc_ipynb_file__ = {str(file)!r}\n"*(known_by == 'VS Code') + 'from hatemm_clip.base import leave_out_flagged\nleave_out_flagged()'
    cells = [new_code_cell(begin), new_code_cell('#| slow\nraise ValueError', outputs=OUTPUTS), new_code_cell('#| hide\n#| data\n1/0', outputs=ERROR)]
    stored = nbformat.from_dict(new_notebook(cells=[*cells, new_code_cell('#| net\n1/0')], metadata=dict(kernelspec=dict(name='python3', display_name='python3'))))
    nbformat.write(stored, file)
    monkeypatch.delenv('HATEMM_CELLS', raising=False)
    monkeypatch.setenv('JPY_SESSION_NAME', str(file) if known_by == 'JupyterLab' else '')
    nb = nbformat.read(file, 4)
    for cell in nb.cells: cell.outputs = []  # as JupyterLab does with all that wait
    if known_by != 'its folder': nb.cells.insert(1, new_code_cell(f'import pathlib\nempty = pathlib.Path({str(file)!r})\nempty.write_text(empty.read_text().replace("two", "2"))'))
    run_all(nb, file.parent if known_by == 'its folder' else elsewhere)
    assert all(isinstance(o.execution_count, int) for cell in nb.cells for o in cell.outputs if o.output_type == 'execute_result')  # JupyterLab drops others
    for cell in nb.cells:
        for output in cell.outputs: output.pop('execution_count', None)
    *_, slow, data, net = nb.cells
    expected = [{k: v for k, v in o.items() if k != 'execution_count'} for o in OUTPUTS]
    if known_by != 'its folder': expected[0] = dict(expected[0], text='one\n2\n')  # the file says what is shown
    assert slow.outputs == expected and data.outputs == ERROR
    assert '%env HATEMM_CELLS=net' in net.outputs[0].text


def test_an_emptied_file_loses_nothing(tmp_path, monkeypatch):
    "JupyterLab may save the emptied cells before they are reached."
    file = tmp_path/'toy.ipynb'
    cells = [new_code_cell('from hatemm_clip.base import leave_out_flagged\nleave_out_flagged()'),
             new_code_cell(f"import nbformat\nnb = nbformat.read({str(file)!r}, 4)\nnb.cells[2].outputs = []\nnbformat.write(nb, {str(file)!r})"),
             new_code_cell('#| slow\nraise ValueError', outputs=OUTPUTS[:1])]
    nbformat.write(nbformat.from_dict(new_notebook(cells=cells)), file)
    monkeypatch.setenv('JPY_SESSION_NAME', str(file))
    nb = nbformat.read(file, 4)
    nb.cells[2].outputs = []
    run_all(nb, tmp_path)
    assert nb.cells[2].outputs == OUTPUTS[:1]


@pytest.mark.parametrize('known_by', ['JupyterLab', 'nothing'])
def test_defaults_lie_beside_the_notebooks(tmp_path, monkeypatch, known_by):
    "A kernel that was started elsewhere makes the run of the clone, not one beside its own folder."
    clone, elsewhere = tmp_path/'clone', tmp_path/'some/where'
    for folder in (clone/'nbs', elsewhere): folder.mkdir(parents=True)
    shutil.copytree(ROOT/'hatemm_clip', clone/'hatemm_clip', ignore=shutil.ignore_patterns('__pycache__'))
    for name in ('00_data', '20_embed'): shutil.copy(ROOT/f'nbs/{name}.ipynb', clone/'nbs')
    cells = ['from hatemm_clip.base import leave_out_flagged\nfrom hatemm_clip.demo import demo_clips', 'leave_out_flagged()',
             "demo_clips('../runs/notebook', '../demo_data', 12)"]
    monkeypatch.setenv('PYTHONPATH', str(clone))
    monkeypatch.setenv('JPY_SESSION_NAME', str(clone/'nbs/20_embed.ipynb') if known_by == 'JupyterLab' else '')
    nb = new_notebook(cells=[new_code_cell(c) for c in cells])
    run_all(nb, elsewhere)
    assert (clone/'runs/notebook/clips.parquet').is_file() and (clone/'demo_data/truth.json').is_file()
    assert not list(elsewhere.iterdir()) and not (tmp_path/'some/runs').exists()


def test_a_kernel_of_another_project_stays_where_it_is(tmp_path):
    nbformat.write(new_notebook(), tmp_path/'mine.ipynb')
    cells = ['import os\nfrom hatemm_clip.base import leave_out_flagged', 'leave_out_flagged()', 'print(os.getcwd())']
    nb = new_notebook(cells=[new_code_cell(c) for c in cells])
    run_all(nb, tmp_path)
    assert nb.cells[-1].outputs[0].text.strip() == str(tmp_path.resolve())
