"Many files are scored in batches: rows are kept as they are done, nothing is scored twice, and mistakes cost a second."
import io
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import warm
from conftest import ROOT
from films import sounding
from PIL import Image
from test_score import write_bundle

from hatemm_clip.base import InputError
from hatemm_clip.intake import Item
from hatemm_clip.media import write_video
from hatemm_clip.score import score_files
from hatemm_clip.scorebook import FORMATS, read_scores
from hatemm_clip.scorer import Scorer


@pytest.fixture(scope='module')
def bundle(tmp_path_factory):
    return write_bundle(tmp_path_factory.mktemp('bundle'), clips=dict(length=3., stride=3., stills=0.))


@pytest.fixture(scope='module')
def films(tmp_path_factory):
    folder = tmp_path_factory.mktemp('films')
    for i in range(6): sounding(folder/f'{i}.mp4', first=20*i)
    return folder


@pytest.mark.parametrize('suffix', FORMATS)
def test_a_second_call_finds_the_rows_of_the_first(suffix, bundle, films, tmp_path, monkeypatch):
    files = [*map(str, sorted(films.glob('*.mp4'))), str(tmp_path/'text.mp4'), str(tmp_path/'gone.mp4')]
    (tmp_path/'text.mp4').write_text('no video')
    out = tmp_path/f'scores{suffix}'
    rows = score_files(bundle, files, out, device='cpu')
    assert [r['error'] is None for r in rows] == [True]*6 + [False]*2 and read_scores(out) == rows
    assert not list(tmp_path.glob('*.journal'))
    monkeypatch.setattr('hatemm_clip.score.Scorer', lambda *a, **k: pytest.fail('a model is loaded'))
    assert score_files(bundle, files[:6], out, device='cpu') == rows[:6]
    moved = str(shutil.copy(files[0], tmp_path/'moved.mp4'))
    assert score_files(bundle, [moved], out)[0] == dict(rows[0], file=moved)
    assert {r['file'] for r in read_scores(out)} == {*files, moved}  # rows of other calls stay


@pytest.mark.parametrize('change', [dict(threshold=.9), dict(partial=True), dict(text='good morning')])
def test_what_shapes_a_row_makes_it_anew(change, bundle, films, tmp_path, monkeypatch):
    file = str(films/'0.mp4')
    score_files(bundle, [file], tmp_path/'a.csv', device='cpu')
    item = Item(file, file, change.pop('text', None))
    made = []
    monkeypatch.setattr('hatemm_clip.score.Scorer', lambda *a, **k: made.append(1) or Scorer(*a, **k))
    row, = score_files(bundle, [item], tmp_path/'a.csv', device='cpu', **change)
    assert made and row['threshold'] == change.get('threshold', row['threshold'])


def test_a_row_does_not_depend_on_its_company(bundle, films):
    scorer, files = Scorer(bundle, 'cpu'), sorted(films.glob('*.mp4'))
    together = scorer.score_many([Item(str(f), str(f)) for f in files])
    assert together == [scorer.score(f) for f in files]
    loose = Scorer(bundle, 'cpu', steady=False).score_many([Item(str(f), str(f)) for f in files], explained=False)
    np.testing.assert_allclose([r['prob'] for r in loose], [r['prob'] for r in together], atol=2e-4)


def test_bytes_and_open_files(bundle, films, tmp_path, monkeypatch):
    scorer, file = Scorer(bundle, 'cpu'), films/'1.mp4'
    monkeypatch.setattr('tempfile.tempdir', str(tmp_path))
    expected = dict(scorer.score(file), file='x')
    assert scorer.score(file.read_bytes(), name='x') == expected
    with open(file, 'rb') as opened: assert scorer.score(opened, name='x') == expected
    assert scorer.score(io.BytesIO(b'no video'), name='x')['error'].startswith('x: not a readable media file')
    assert not list(tmp_path.iterdir())


def test_a_long_video_has_a_timeline(bundle, films, tmp_path):
    long = sounding(tmp_path/'long.mp4', seconds=10.)
    row = Scorer(bundle, 'cpu').score(long)
    assert [t for w in row['timeline'] for t in (w['start'], w['end'])] == pytest.approx([0, 3, 3, 6, 6, 9, 7, 10], abs=.1)
    assert row['prob'] == max(w['prob'] for w in row['timeline']) and '4 windows' in row['rule']
    assert [f['time'] for f in row['frames']] == sorted(f['time'] for f in row['frames']) and row['frames'][-1]['time'] > 9
    given = Scorer(bundle, 'cpu').score(long, text=' '.join(f'w{i}' for i in range(10)))
    words = [w for w in given['windows'] if w['start'] < 7]
    assert ' '.join(w['text'] for w in words) == ' '.join(f'w{i}' for i in range(9))  # the last window overlaps


def test_what_is_absent_is_masked_and_said(bundle, tmp_path, films):
    Image.new('RGB', (64, 64), 'red').save(tmp_path/'a.png')
    strict, partial = Scorer(bundle, 'cpu'), Scorer(bundle, 'cpu', partial=True)
    assert 'words alone; this bundle takes image, text' in strict.score(text='good morning')['error']
    alone = partial.score(text='good morning')
    assert alone['modalities']['image'] == 0 and alone['notes'] == ['there is no picture; scored without'] and alone['needs_review']
    still = strict.score(tmp_path/'a.png', text='good morning')
    assert still['error'] is None and still['timeline'][0]['end'] == 0 and any('a still picture' in n for n in still['notes'])
    picture = np.asarray(Image.open(tmp_path/'a.png'))
    memory, = strict.score_many([Item('a', text='good morning', picture=picture)])
    assert memory['prob'] == still['prob'] and memory['modalities'] == still['modalities']


def test_a_meme_without_words_is_read(tmp_path):
    pytest.importorskip('rapidocr', reason='needs the extra hatemm_clip[real]')
    from test_ocr import still
    memes = write_bundle(tmp_path/'memes', clips=dict(length=0., stride=0., stills=1.), asr={})
    scorer = Scorer(memes, 'cpu')
    read = scorer.score(still(tmp_path/'a.png', 'THE CHOIR IS HERE'))
    assert 'CHOIR' in read['transcript'] and read['modalities']['text'] != 0
    assert scorer.score(tmp_path/'a.png', text='other words')['transcript'] == 'other words'


def test_threshold(bundle, films):
    row = Scorer(bundle, 'cpu').score(films/'0.mp4')
    for threshold in (row['prob'] - 1e-4, row['prob'] + 1e-4):
        found = Scorer(bundle, 'cpu', threshold=threshold).score(films/'0.mp4')
        assert found['label'] == ('Hate' if found['prob'] >= threshold else 'Non Hate') and found['needs_review']
    with pytest.raises(InputError, match='threshold is 2'): Scorer(bundle, 'cpu', threshold=2)


def score(*args): return warm.Fork([sys.executable, '-m', 'hatemm_clip', 'score', *args], cwd=ROOT)


def test_a_killed_run_goes_on(bundle, tmp_path):
    "Once by Ctrl-C, which ends in a line, and once for good."
    folder = tmp_path/'many'
    folder.mkdir()
    for i in range(4): sounding(folder/f'{i:02}.mp4', seconds=1., first=4*i)
    for i in range(4, 60): write_video(folder/f'{i:02}.mp4', [np.full((64, 96, 3), 4*i, np.uint8)]*5, fps=5)
    for n, end in enumerate([signal.SIGINT, signal.SIGKILL]):
        out = tmp_path/f'scores{n}.jsonl'
        run, journal = score(bundle, folder, '--out', out, '--device', 'cpu'), Path(f'{out}.journal')
        for _ in range(6000):
            if journal.exists() and journal.stat().st_size: break
            time.sleep(.01)
        run.send_signal(end)
        told = run.communicate(timeout=60)[1].strip().splitlines()
        if end == signal.SIGINT: assert run.returncode == 130 and len(told) == 1 and told[0].startswith('stopped: '), told
        before = read_scores(out) if out.exists() else [json.loads(line) for line in journal.read_text().splitlines()]
        assert 0 < len(before) < 60
        again = score(bundle, folder, '--out', out, '--device', 'cpu')
        assert '60 scored' in again.communicate(timeout=120)[0] and again.returncode == 0
        after = {r['file']: r for r in read_scores(out)}
        assert len(after) == 60 and not journal.exists() and all(after[r['file']] == r for r in before)


def test_names_from_standard_input_and_a_missing_one(bundle, films, tmp_path, monkeypatch, capsys):
    from hatemm_clip import cli
    names = [str(films/'0.mp4'), str(films/'none.mp4')]
    command = ['hatemm', 'score', bundle, '-', '--json', tmp_path/'a.json', '--device', 'cpu']
    monkeypatch.setattr(sys, 'argv', list(map(str, command)))
    monkeypatch.setattr(sys, 'stdin', io.StringIO('\n'.join(names)))
    with pytest.raises(SystemExit) as end: cli.main()
    rows, told = json.loads((tmp_path/'a.json').read_text()), capsys.readouterr()
    assert end.value.code == 1 and [r['file'] for r in rows] == names and told.err.count('no such file') == 1 and '1 scored' in told.out


def test_a_table_of_words(bundle, films, tmp_path):
    Image.new('RGB', (64, 64), 'blue').save(tmp_path/'a.png')
    (tmp_path/'t.csv').write_text('image,sentence\na.png,"good morning, all"\n')
    run = score(bundle, '--table', tmp_path/'t.csv', '--out', tmp_path/'o.csv', '--device', 'cpu')
    out, err = run.communicate(timeout=120)
    assert run.returncode == 0, err
    assert read_scores(tmp_path/'o.csv')[0]['transcript'] == 'good morning, all'


def read_only(folder):
    (folder/'locked').mkdir()
    (folder/'locked/scores.csv').mkdir()  # nobody, root neither, writes a file there
    return folder/'locked/scores.csv'


@pytest.mark.parametrize('made, told', [
    (lambda b, f, t: [b, f/'0.mp4', '--out', t/'none/a.csv'], 'no such folder'),
    (lambda b, f, t: [b, f/'0.mp4', '--out', t/'a.xlsx'], 'ends in .parquet, .csv, .jsonl'),
    (lambda b, f, t: [b, f/'0.mp4', '--out', read_only(t)], 'a folder'),
    (lambda b, f, t: [b, f/'0.mp4', '--json', t/'none/a.json'], 'no such folder'),
    (lambda b, f, t: [b, f/'none.mp4'], 'no such file'),
    (lambda b, f, t: [b, 'https://example.com/a.mp4'], 'a URL, and nothing is fetched'),
    (lambda b, f, t: [b, t], 'no video, sound or picture'),
    (lambda b, f, t: [b, t/'*.mp4'], 'no file matches'),
    (lambda b, f, t: [b], 'no file to score'),
    (lambda b, f, t: [b, '--text', ' '], '--text is empty'),
    (lambda b, f, t: [b, f, '--text', 'good morning'], 'there are 6'),
    (lambda b, f, t: [b, '--table', t/'none.csv'], 'no such'),
    (lambda b, f, t: [t, f/'0.mp4'], 'no bundle there'),
    (lambda b, f, t: [b, f/'0.mp4', '--engine', 'spark'], "engine is 'spark'"),
    (lambda b, f, t: [b, f/'0.mp4', '--threshold', '7'], 'threshold is 7.0'),
    (lambda b, f, t: [b, f/'0.mp4', '--jobs', '-1'], 'jobs is -1')])
def test_mistakes_cost_a_second_and_a_line(made, told, bundle, films, tmp_path, monkeypatch, capsys):
    from hatemm_clip import cli
    monkeypatch.setattr('hatemm_clip.scorer.load_bundle', lambda *a, **k: pytest.fail('a model is loaded'))
    monkeypatch.setattr(sys, 'argv', ['hatemm', 'score', *map(str, made(bundle, films, tmp_path))])
    with pytest.raises(SystemExit) as end: cli.main()
    lines = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and len(lines) == 1 and lines[0].startswith('error: ') and told in lines[0], lines


def changed(bundle, folder, **config):
    shutil.copytree(bundle, folder)
    made = json.loads((folder/'config.json').read_text())
    for key, value in config.items(): made[key] = dict(made[key], **value) if isinstance(value, dict) else value
    (folder/'config.json').write_text(json.dumps(made))
    return folder


@pytest.mark.parametrize('config, told', [
    (dict(encoder=dict(encoder='..')), 'lies outside of the bundle'), (dict(encoder=dict(encoder='/tmp')), 'lies outside of the bundle'),
    (dict(modalities=dict(image=10**10)), 'modalities is'), (dict(modalities=dict(image=10**5)), 'do not fit'), (dict(params=dict(ensemble=10**9)), 'do not fit'), (dict(params=dict(hidden=10**9)), 'do not fit'),
    (dict(head='__import__'), 'do not fit'), (dict(weights_sha256='0'*64), 'sha256 differs'), (dict(files={'review.safetensors': '0'*64}), 'sha256 differs'),
    (dict(modalities=7), 'modalities is'), (dict(label_names=[]), 'label_names is'), (dict(threshold='x'), 'threshold is')])
def test_a_hostile_bundle_is_refused(config, told, bundle, tmp_path):
    with pytest.raises(InputError, match=told): Scorer(changed(bundle, tmp_path/'bundle', **config), 'cpu')


def test_a_pickle_in_a_bundle_is_not_opened(bundle, tmp_path):
    evil = changed(bundle, tmp_path/'bundle')
    (evil/'model.pkl').write_bytes(b'cos\nsystem\n(S"touch /tmp/owned"\ntR.')
    (evil/'model.safetensors').write_bytes(b'cos\nsystem\n(S"touch /tmp/owned"\ntR.')
    with pytest.raises(InputError, match='sha256 differs'): Scorer(evil, 'cpu')
    assert not os.path.exists('/tmp/owned')


@pytest.mark.parametrize('args', [['-h'], ['score', '-h'], ['bundle', 'info', '-h'], ['serve', '-h']])
def test_help_answers_without_a_model(args, hatemm):
    done = hatemm(*args)
    assert done.returncode == 0 and done.stdout.startswith('Usage: ')


def test_a_shell_completes_commands(hatemm, monkeypatch):
    for name, value in dict(_HATEMM_COMPLETE='complete_bash', COMP_WORDS='hatemm sc', COMP_CWORD='1').items(): monkeypatch.setenv(name, value)
    assert hatemm().stdout.split() == ['score']
