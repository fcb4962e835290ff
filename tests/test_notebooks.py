"Every notebook runs top to bottom: the stages in number order on one run, as in a batch; the others on a run of their own, in a second process."
import shutil

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


@pytest.fixture(scope='module')
def clone(tmp_path_factory):
    "A fresh clone with nothing built yet, in which a student opens 40_fusion and runs all."
    folder = tmp_path_factory.mktemp('clone')
    shutil.copytree(ROOT/'nbs', folder/'nbs', symlinks=True, ignore=shutil.ignore_patterns('.ipynb_checkpoints'))
    execute(folder/'nbs/40_fusion.ipynb', folder/'nbs', folder/'40_fusion.ipynb')
    return folder


def in_run(notebook, folder, run_dir, data_dir):
    "Execute a notebook on a run."
    places = dict(run_dir=str(run_dir), data_dir=str(data_dir))
    parameters = {n: v for n, v in places.items() if n in stage_parameters(notebook)}
    if notebook.stem == '01_demo': parameters['out_dir'] = places['data_dir']
    execute(notebook, ROOT/'nbs', folder/notebook.name, **parameters)


@pytest.mark.xdist_group('notebooks of the pipeline')
@pytest.mark.parametrize('notebook', [n for n in NOTEBOOKS if n.stem not in BRANCHES], ids=lambda f: f.stem)
def test_notebook(notebook, run): in_run(notebook, run, run/'run', run/'demo_data')


@pytest.mark.xdist_group('notebooks beside it')
def test_fusion_runs_alone(clone):
    assert (clone/'runs/notebook/predictions.parquet').exists() and (clone/'runs/notebook/bundle/model.safetensors').exists()


@pytest.mark.xdist_group('notebooks beside it')
@pytest.mark.parametrize('notebook', [n for n in NOTEBOOKS if n.stem in BRANCHES], ids=lambda f: f.stem)
def test_notebook_beside(notebook, clone): in_run(notebook, clone, clone/'runs/notebook', clone/'demo_data')
