"The notebooks that are no stages run top to bottom, each on a copy of the demo's run."
import pytest
from conftest import ROOT
from demo import copy_run, execute, first_clips, small_corpus
from test_notebooks import NOTEBOOKS, run_notebook

from hatemm_clip.pipeline import STAGES

ELSEWHERE = ('98_own_videos', 'index')  # test_own_videos runs the one with its slow cells, a test below the other
BESIDE = [n.stem for n in NOTEBOOKS if n.stem not in ELSEWHERE and (n.stem not in STAGES or n.stem in ('30_finetune', '70_memes'))]
SHORTER = {'01_demo': dict(out_dir='corpus', videos=24), '03_check': dict(data_dir='few'), '06_compare': dict(n=200), '30_finetune': dict(fold='0', epochs=2),
           '45_topics': dict(seeds=1, epochs=1), '55_localise': dict(run_dir=''),  # stories alone; test_localise measures a run
           '70_memes': dict(data_dir='memes', demo_memes=40), '74_transfer': dict(shares='0.1,1', draws=1)}
FEWER = {'30_finetune': 48, 'howto_compare': 48, 'howto_encoder': 40, 'howto_head': 48, 'start_lab': 48, 'start_memes': 48}  # clips of the run; every part has both classes


@pytest.mark.parametrize('name', BESIDE)
def test_notebook(name, demo, tmp_path):
    run = copy_run(demo, tmp_path/'run')
    if name in FEWER: first_clips(run, FEWER[name])
    shorter = {n: str(tmp_path/value) if n in ('out_dir', 'data_dir') else value for n, value in SHORTER.get(name, {}).items()}
    if name == '03_check': small_corpus(demo, tmp_path/'few', 24)
    run_notebook(name, run.folder, demo/'demo_data', **shorter)


def test_index(demo, tmp_path):
    "In a clone that has the first videos of the demo's corpus, with their transcripts and features."
    for name in ('nbs', 'runs'): (tmp_path/name).mkdir()
    small_corpus(demo, tmp_path/'demo_data', 60)
    (tmp_path/'tools').symlink_to(ROOT/'tools')
    copy_run(demo, tmp_path/'runs/index', 'predictions.parquet')
    page, text = tmp_path/'nbs/index.ipynb', (ROOT/'nbs/index.ipynb').read_text()
    assert text.count('seeds=10') == 1
    page.write_text(text.replace('seeds=10', 'seeds=1'))
    execute(page, tmp_path/'nbs')
