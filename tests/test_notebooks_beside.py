"The notebooks that are no stages run top to bottom, each on a copy of the demo's run."
import pytest
from demo import copy_run
from test_notebooks import NOTEBOOKS, run_notebook

from hatemm_clip.pipeline import STAGES

ELSEWHERE = ('98_own_videos',)  # test_own_videos runs it with its slow cells
BESIDE = [n.stem for n in NOTEBOOKS if n.stem not in ELSEWHERE and (n.stem not in STAGES or n.stem in ('30_finetune', '70_memes'))]
SHORTER = {'45_topics': dict(seeds=2, epochs=8)}


@pytest.mark.parametrize('name', BESIDE)
def test_notebook(name, demo, tmp_path): run_notebook(name, tmp_path, copy_run(demo, tmp_path/'run').folder, demo/'demo_data', **SHORTER.get(name, {}))
