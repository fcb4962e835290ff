"Every notebook runs top to bottom; in number order they share one run, as in a batch."
import shutil

import papermill
import pytest
from conftest import ROOT

from hatemm_clip.pipeline import runnable, stage_parameters

NOTEBOOKS = sorted((ROOT/'nbs').glob('*.ipynb'))


def execute(notebook, cwd, target, **parameters):
    import nbformat
    source = target.with_suffix('.source.ipynb')
    nbformat.write(runnable(notebook), source)
    papermill.execute_notebook(str(source), str(target), parameters, cwd=str(cwd), kernel_name='python3', progress_bar=False)


@pytest.fixture(scope='module')
def run(tmp_path_factory): return tmp_path_factory.mktemp('run')


@pytest.mark.parametrize('notebook', NOTEBOOKS, ids=lambda f: f.stem)
def test_notebook(notebook, run):
    places = dict(run_dir=str(run/'run'), data_dir=str(run/'demo_data'))
    parameters = {n: v for n, v in places.items() if n in stage_parameters(notebook)}
    if notebook.stem == '01_demo': parameters['out_dir'] = places['data_dir']
    execute(notebook, ROOT/'nbs', run/notebook.name, **parameters)


def test_fusion_runs_alone(tmp_path):
    "In a fresh clone with nothing built yet, a student opens 40_fusion and runs all."
    shutil.copytree(ROOT/'nbs', tmp_path/'nbs', symlinks=True, ignore=shutil.ignore_patterns('.ipynb_checkpoints'))
    execute(tmp_path/'nbs/40_fusion.ipynb', tmp_path/'nbs', tmp_path/'40_fusion.ipynb')
    assert (tmp_path/'runs/notebook/predictions.parquet').exists() and (tmp_path/'runs/notebook/bundle/model.safetensors').exists()
