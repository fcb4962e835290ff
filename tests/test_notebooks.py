"Every notebook runs top to bottom: here the stages, on the run of a clone in which 40_fusion has run."
import pytest
from conftest import ROOT
from demo import copy_run, execute, first_clips, small_corpus

from hatemm_clip.base import Run
from hatemm_clip.stages import stage_parameters
from hatemm_clip.pipeline import STAGES

NOTEBOOKS = sorted((ROOT/'nbs').glob('*.ipynb'))
LATER = [stage for stage in STAGES if '40_fusion' < stage < '70_memes']  # 30_finetune and 70_memes are beside: nothing here needs them


def run_notebook(name, run_dir, data_dir, /, **more):
    "Execute a notebook on a run."
    notebook = ROOT/'nbs'/f'{name}.ipynb'
    places = dict(run_dir=str(run_dir), data_dir=str(data_dir))
    parameters = {n: v for n, v in places.items() if n in stage_parameters(notebook)}
    execute(notebook, ROOT/'nbs', **(parameters | more))


def test_fusion_runs_alone_in_a_fresh_clone(demo):
    run = Run(demo/'runs/notebook')
    assert run.predictions.exists() and (run.bundle/'model.safetensors').exists()


@pytest.mark.parametrize('name, made', [('00_data', 'clips.parquet'), ('10_asr', 'transcripts.parquet'), ('20_embed', 'features.lance'), ('12_ocr', 'ocr.parquet')])
def test_first_stages(name, made, demo, tmp_path_factory):
    "Each makes its results for a few videos, from what the stage before it made."
    folder = tmp_path_factory.getbasetemp()/'first_stages'
    if not folder.exists(): small_corpus(demo, folder/'data', 24)
    if name == '10_asr': first_clips(Run(folder/'run'), 8)
    more = dict(fps=.1) if name == '12_ocr' else {}  # a frame a clip
    run_notebook(name, folder/'run', folder/'data', **more)
    assert (folder/'run'/made).exists()


@pytest.fixture(scope='module')
def run(demo, tmp_path_factory): return first_clips(copy_run(demo, tmp_path_factory.mktemp('run')/'run'), 60)


@pytest.mark.parametrize('name', LATER)
def test_later_stages(name, run, demo):
    run_notebook(name, run.folder, demo/'demo_data', **(dict(seeds=1) if name == '50_robust' else {}))
    assert (run.folder/STAGES[name][0]).exists()
