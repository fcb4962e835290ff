"The notebooks that are no stages run top to bottom, each on a copy of the demo's run."
import pytest
from demo import copy_run
from test_notebooks import NOTEBOOKS, run_notebook

from hatemm_clip.pipeline import STAGES

BESIDE = [notebook.stem for notebook in NOTEBOOKS if notebook.stem not in STAGES or notebook.stem == '30_finetune']


@pytest.mark.parametrize('name', BESIDE)
def test_notebook(name, demo, tmp_path): run_notebook(name, tmp_path, copy_run(demo, tmp_path/'run').folder, demo/'demo_data')
