"The notebooks that are no usual stages run top to bottom, on the run of a fresh clone."
import shutil

import pytest
from conftest import ROOT
from test_notebooks import BRANCHES, NOTEBOOKS, execute, in_run


@pytest.fixture(scope='module')
def clone(tmp_path_factory):
    "A fresh clone with nothing built yet, in which a student opens 40_fusion and runs all."
    folder = tmp_path_factory.mktemp('clone')
    shutil.copytree(ROOT/'nbs', folder/'nbs', symlinks=True, ignore=shutil.ignore_patterns('.ipynb_checkpoints'))
    execute(folder/'nbs/40_fusion.ipynb', folder/'nbs', folder/'40_fusion.ipynb')
    return folder


def test_fusion_runs_alone(clone):
    assert (clone/'runs/notebook/predictions.parquet').exists() and (clone/'runs/notebook/bundle/model.safetensors').exists()


@pytest.mark.parametrize('notebook', [n for n in NOTEBOOKS if n.stem in BRANCHES], ids=lambda f: f.stem)
def test_notebook_beside(notebook, clone): in_run(notebook, clone, clone/'runs/notebook', clone/'demo_data')
