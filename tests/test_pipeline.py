"A run killed with -9 in the middle of a stage is finished by the next one; no row is lost or doubled."
import json
import os
import signal
import sys
import time

import pandas as pd
import psutil
import pytest
import warm
from conftest import ROOT

STAGES = ['00_data', '10_asr', '20_embed', '40_fusion', '60_analysis']
HATEMM = [sys.executable, '-m', 'hatemm_clip']


def kill_when(command, ready, limit=300):
    "Start a run and kill it as soon as `ready()`; its kernel, for a second, lives on, and the next run has to see to that."
    process = warm.Fork(command, cwd=ROOT, env=warm.cold())
    began = time.time()
    while not ready():
        assert process.poll() is None and time.time() - began < limit, 'the run ended before it could be killed'
        time.sleep(.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "Two runs that were killed in the middle of a stage, and one that finished what they began."
    folder = tmp_path_factory.mktemp('killed')
    stages = ', '.join(STAGES)
    (folder/'p.yml').write_text(f"data_dir: {folder/'demo'}\ndemo_videos: 12\nbatch_size: 4\nstages: [{stages}]\n40_fusion:\n  seeds: 1\n")
    out = folder/'run'
    command = [*HATEMM, 'run', str(folder/'p.yml'), '--out', str(out)]
    making = out/'.making'
    journal, store = making/'10_asr/transcripts.parquet.journal', making/'20_embed/features.lance'
    killed = [('00_data', 'transcripts.parquet', lambda: journal.exists() and journal.stat().st_size > 2000),
              ('10_asr', 'features.lance', store.exists)]
    for done_before, made, ready in killed:
        before = warm.run([*command, '--only', done_before], cwd=ROOT)
        assert before.returncode == 0, before.stderr[-500:]
        kill_when(command, ready)
        assert not (out/made).exists()
    done = warm.run(command, cwd=ROOT, timeout=900)
    assert done.returncode == 0, done.stderr[-500:]
    return folder, out, command, done.stdout


def test_nothing_is_lost_or_doubled(run):
    from hatemm_clip.features import open_store
    _, out, _, _ = run
    clips = pd.read_parquet(out/'clips.parquet').clip_id.sort_values().tolist()
    assert len(clips) == 12
    assert pd.read_parquet(out/'transcripts.parquet').clip_id.sort_values().tolist() == clips
    assert sorted(open_store(out/'features.lance').clip_ids()) == clips


def test_all_outputs_are_there(run):
    _, out, _, printed = run
    for name in ('metrics.json', 'report.html', 'predictions.parquet', 'bundle/model.safetensors', 'bundle/MODEL_CARD.md', 'run.json'): assert (out/name).exists(), name
    metrics = json.loads((out/'metrics.json').read_text())
    assert {'mean', 'low', 'high'} <= metrics['BinaryClassifier:image+text']['macro_f1'].keys()
    assert 'report:' in printed


def test_second_run_has_nothing_to_do(run):
    _, _, command, _ = run
    again = warm.run(command, cwd=ROOT)
    assert again.returncode == 0 and again.stdout.count('up to date') == len(STAGES)


def changed_run(run, text):
    "The run again with other parameters."
    folder, out, command, _ = run
    (folder/'changed.yml').write_text((folder/'p.yml').read_text() + text)
    return [part.replace('p.yml', 'changed.yml') for part in command]


def test_ctrl_c_is_one_line_and_leaves_the_old_result(run):
    _, out, _, _ = run
    before = (out/'predictions.parquet').read_bytes()
    process = warm.Fork(changed_run(run, '  epochs: 61\n'), cwd=ROOT, env=warm.cold())
    kernel = out/'.making/40_fusion/.kernel.json'
    while not kernel.exists(): time.sleep(.05)
    time.sleep(2)
    os.killpg(process.pid, signal.SIGINT)
    printed, said = process.communicate(timeout=60)
    assert process.returncode == 130 and said == 'stopped; run again to go on\n' and printed.count('up to date') == 3
    assert not any(str(kernel) in (p.info['cmdline'] or []) for p in psutil.process_iter(['cmdline']))
    assert (out/'predictions.parquet').read_bytes() == before


def test_a_failing_stage_throws_nothing_away(run):
    _, out, command, _ = run
    text = '10_asr: {model: no-such-model}\n'
    done = warm.run(changed_run(run, text), cwd=ROOT)
    assert done.returncode == 2 and done.stderr.count('\n') == 1 and 'no-such-model' in done.stderr
    plan = warm.run([*command, '--dry-run', '--json', '-'], cwd=ROOT)
    assert [row['stage'] for row in json.loads(plan.stdout) if row['stale']] == []


def test_scoring_goes_on_past_a_bad_file(run, hatemm):
    folder, out, _, _ = run
    good = next((folder/'demo/hate_videos').glob('*.mp4'))
    (folder/'bad.mp4').write_text('hello')
    done = hatemm('score', out/'bundle', good, folder/'bad.mp4', '--json', '-')
    rows = json.loads(done.stdout)
    assert done.returncode == 1 and rows[0]['error'] is None and 'not a readable media file' in rows[1]['error']
    assert rows[0]['demo'] and 0 <= rows[0]['prob'] <= 1
    assert abs(sum(rows[0]['modalities'].values())) <= 1
    assert hatemm('score', out/'bundle', folder/'bad.mp4').returncode == 2
