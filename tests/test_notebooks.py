"Every notebook runs top to bottom: here the stages, in number order on one run, as in a batch; the others in test_notebooks_beside.py, for a second process."
import papermill
import pytest
from conftest import ROOT

from hatemm_clip.pipeline import runnable, stage_parameters

NOTEBOOKS = sorted((ROOT/'nbs').glob('*.ipynb'))
BRANCHES = ('02_fetch', '03_check', '05_metrics', '15_tiny_clip', '30_finetune', '45_topics', '50_robust')  # need the features of a run at most, and give nothing to the later stages


def execute(notebook, cwd, target, **parameters):
    import nbformat
    source = target.with_suffix('.source.ipynb')
    nbformat.write(runnable(notebook), source)
    papermill.execute_notebook(str(source), str(target), parameters, cwd=str(cwd), kernel_name='python3', progress_bar=False)


@pytest.fixture(scope='module')
def run(tmp_path_factory): return tmp_path_factory.mktemp('run')


def in_run(notebook, folder, run_dir, data_dir):
    "Execute a notebook on a run."
    places = dict(run_dir=str(run_dir), data_dir=str(data_dir))
    parameters = {n: v for n, v in places.items() if n in stage_parameters(notebook)}
    if notebook.stem == '01_demo': parameters['out_dir'] = places['data_dir']
    execute(notebook, ROOT/'nbs', folder/notebook.name, **parameters)


@pytest.mark.parametrize('notebook', [n for n in NOTEBOOKS if n.stem not in BRANCHES], ids=lambda f: f.stem)
def test_notebook(notebook, run): in_run(notebook, run, run/'run', run/'demo_data')
