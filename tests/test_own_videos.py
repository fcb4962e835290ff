"The road of a new user: a folder of clips of mixed kinds, a table of labels, and the commands of the page, to a scored file."
import json
import re

import nbformat
import pytest
from conftest import ROOT
from demo import run_all


N = 12  # clips; three of them hateful, one a fold
FEWER_NETWORKS = """
asked = Path('clips.yml').read_text()
assert 'seeds: 10' in asked
Path('clips.yml').write_text(asked.replace('seeds: 10', 'seeds: 2') + '50_robust: {seeds: 1}\\n')
"""


@pytest.fixture(scope='module')
def walk(demo, tmp_path_factory):
    "The page, run with its slow cells as a reader would follow it; gives its folder and the outputs by command."
    folder = tmp_path_factory.mktemp('own')/'project'
    nb = nbformat.read(ROOT/'nbs/98_own_videos.ipynb', 4)
    given = next(c for c in nb.cells if 'parameters' in c.metadata.get('tags', []))
    given.source = f"videos, folder, corpus = {N}, {str(folder)!r}, {str(demo/'demo_data')!r}"
    asked = next(c for c in nb.cells if c.source == '!cat clips.yml')
    asked.source += '\n' + FEWER_NETWORKS
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('HATEMM_CELLS', 'slow')
        run_all(nb, ROOT/'nbs', timeout=600)
    text = lambda cell: ''.join(o.get('text', '') for o in cell.outputs)
    return folder, {c.source: text(c) for c in nb.cells if c.cell_type == 'code'}


def said(walk, command):
    return next(text for source, text in walk[1].items() if command in source)


def test_init_writes_beside_the_videos(walk):
    folder, _ = walk
    printed, params = said(walk, 'hatemm init'), (folder/'clips.yml').read_text()
    assert f'clips.yml: {N} videos by labels.csv' in printed and printed.count('  hatemm ') == 3
    assert 'positive: hateful' in params and 'dataset: folder' in params and 'demo: false' in params
    assert re.search(r'^folds: [345] ', params, re.M)


def test_check_finds_nothing_wrong(walk):
    assert f'{N} videos' in said(walk, 'hatemm check') and 'error' not in said(walk, 'hatemm check')


def test_run_reaches_the_report(walk):
    run = walk[0]/'runs/clips'
    assert 'report: runs/clips/report.html' in said(walk, 'hatemm run')
    metrics = json.loads((run/'metrics.json').read_text())
    assert metrics['BinaryClassifier:image+text']['auroc']['mean'] is not None
    assert 'Demonstration.' not in (run/'report.html').read_text()
    robust = json.loads((run/'robust.json').read_text())
    for name, why in robust.get('left_out', {}).items(): assert name in (run/'report.html').read_text() and 'donor' in why


def test_the_bundle_scores_a_file_by_the_positive_class(walk, hatemm):
    folder, _ = walk
    config = json.loads((folder/'runs/clips/bundle/config.json').read_text())
    assert config['label_names'][1] == 'hateful' and not config['demo']
    assert re.search(r'\d\.\d{3}', said(walk, '!{score}'))
    rows = json.loads(hatemm('score', folder/'runs/clips/bundle', folder/'clips/clip 03.webm', '--json', '-').stdout)
    assert rows[0]['error'] is None and 0 <= rows[0]['prob'] <= 1


def test_nothing_is_written_among_the_videos(walk):
    names = {p.suffix for p in (walk[0]/'clips').iterdir()}
    assert names == {'.mp4', '.mkv', '.webm', '.avi', '.ts', '.csv'} and len(list((walk[0]/'clips').iterdir())) == N + 1


def test_videos_in_which_nobody_speaks_reach_the_report(tmp_path, capsys):
    "No sound, so no text: what was seen is enough, and the report says the rest."
    import numpy as np

    from hatemm_clip.analysis import report_run
    from hatemm_clip.asr import transcribe_clips
    from hatemm_clip.base import Run
    from hatemm_clip.data import prepare_data
    from hatemm_clip.embed import embed_clips
    from hatemm_clip.encoders import load_encoder
    from hatemm_clip.fusion import run_fusion
    from hatemm_clip.media import write_video
    from hatemm_clip.robust import robust_stage
    from hatemm_clip.score import score_files
    rng, rows = np.random.default_rng(0), ['file,label']
    for i in range(20):
        colour = rng.integers(0, 80, 3) + [150, 0, 0] if i % 2 else rng.integers(0, 80, 3) + [0, 0, 150]
        picture = np.kron(rng.integers(0, 60, (6, 8, 1)), np.ones((16, 16, 3))) + colour
        write_video(tmp_path/f'own/{i}.mp4', [picture.clip(0, 255).astype(np.uint8)]*8, fps=4)
        rows.append(f"{i}.mp4,{('fine', 'toxic')[i % 2]}")
    (tmp_path/'own/table.csv').write_text('\n'.join(rows))
    run = Run(tmp_path/'run')
    clips, _ = prepare_data('folder', tmp_path/'own', run.folder, folds=3)
    texts = transcribe_clips(clips, run.folder)
    assert set(texts.text) == {''} and {f for flags in texts['flags'] for f in flags} == {'no_audio'}
    embed_clips(clips, texts, run.features, load_encoder())
    predictions = run_fusion(run.folder, seeds=1, epochs=8)
    assert set(predictions.run) == {'BinaryClassifier:image'} and 'text is absent from every clip' in capsys.readouterr().out
    assert robust_stage(run.folder, []) == (None, [])
    report_run(run.folder)
    assert 'BinaryClassifier' in run.report.read_text() and 'text: absent from every clip' in run.report.read_text()
    row = score_files(run.bundle, [tmp_path/'own/1.mp4'])[0]
    assert row['error'] is None and row['prob_of'] == 'toxic' and row['notes'] == []
