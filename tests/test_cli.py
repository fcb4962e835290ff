"The `hatemm` command: answers at once, reports bad input in one line, leaves nothing half-written."
import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import version

import pytest
from conftest import ROOT


def one_line_error(done):
    assert done.returncode == 2, (done.returncode, done.stderr[-500:])
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith('error: '), done.stderr
    return lines[0]


def test_help_starts_nothing_heavy():
    code = "import sys; import hatemm_clip.cli, hatemm_clip.pipeline; print(sorted({'torch', 'whisper', 'open_clip', 'pandas', 'numpy', 'lancedb'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == '[]'


@pytest.mark.parametrize('option', ['--help', '-h'])
def test_help(hatemm, option):
    done = hatemm(option)
    assert done.returncode == 0 and hatemm('crossval', option).returncode == 0
    for command in ('demo', 'fetch', 'run', 'score', 'check', 'crossval', 'bench', 'report'): assert command in done.stdout


def test_version(hatemm):
    done = hatemm('--version')
    assert done.returncode == 0 and done.stdout.strip() == version('hatemm_clip')


@pytest.mark.parametrize('text, message', [
    ('sede: 3\n', "did you mean 'seed'"), ('seed: many\n', 'expected an int'), ('- 1\n', 'holds a list'),
    ('stages: [00_data]\naudio: mfcc\n', 'which this run leaves out'), ('30_finetune: {lr: 1}\n', 'add it to stages'),
    ('40_fusion: {finetuned: lora}\n', 'which makes it, is left out'), ('00_data: {split: published}\n', 'comes without one'),
    ('10_asr:\n  modle: base\n', "did you mean 'model'"), ('10_asr: base\n', "10_asr is 'base'"), ('stages: [[00_data]]\n', 'is unknown')])
def test_bad_parameters(hatemm, tmp_path, text, message):
    (tmp_path/'p.yml').write_text(text)
    assert message in one_line_error(hatemm('run', tmp_path/'p.yml', '--out', tmp_path/'out'))
    assert not (tmp_path/'out').exists()


def test_dry_run(hatemm, tmp_path):
    done = hatemm('run', 'nbs/params/demo.yml', '--out', tmp_path/'new', '--dry-run', '--json', tmp_path/'plan.json')
    assert done.returncode == 0 and done.stdout.splitlines()[0] == '00_data: never run' and not (tmp_path/'new').exists()
    rows = json.loads((tmp_path/'plan.json').read_text())
    assert rows[0] == dict(stage='00_data', stale=True, why='never run') and len(rows) == 6


def test_notebooks_travel_in_a_wheel(tmp_path):
    ignore = shutil.ignore_patterns('.git', '.venv', 'runs', 'demo_data*', '_docs', '_proc', '__pycache__', '*.egg-info', 'build')
    shutil.copytree(ROOT, tmp_path/'copy', ignore=ignore, symlinks=True)
    subprocess.run([sys.executable, 'setup.py', '-q', 'build_py', '--build-lib', str(tmp_path/'lib')], cwd=tmp_path/'copy', check=True, capture_output=True)
    packed = tmp_path/'lib/hatemm_clip/notebooks'
    assert {p.name for p in (ROOT/'nbs').glob('*.ipynb')} == {p.name for p in packed.glob('*.ipynb')} and (packed/'params/demo.yml').is_file()
    (tmp_path/'my.yml').write_text('seed: 1\n')
    code = "from hatemm_clip.pipeline import plan_run; print(len(plan_run('my.yml')))"
    done = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, env={**os.environ, 'PYTHONPATH': str(tmp_path/'lib')}, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == '6'


def test_bad_runs(hatemm, tmp_path):
    (tmp_path/'file').touch()
    assert 'no such parameter file' in one_line_error(hatemm('run', tmp_path/'none.yml'))
    assert "stage '77_nothing' is unknown" in one_line_error(hatemm('run', 'nbs/params/demo.yml', '--only', '77_nothing', '--out', tmp_path/'out'))
    assert 'is a file' in one_line_error(hatemm('run', 'nbs/params/demo.yml', '--out', tmp_path/'file'))
    assert not (tmp_path/'out').exists()


def test_bad_bundle_and_json(hatemm, tmp_path):
    assert 'no bundle there' in one_line_error(hatemm('score', tmp_path, 'x.mp4'))
    assert 'no such folder' in one_line_error(hatemm('check', ROOT.parent/'nowhere'))


def test_demo_refuses_another_data_set(hatemm, tmp_path):
    (tmp_path/'HateMM_annotation.csv').write_text('video_file_name,label,hate_snippet,target\n')
    assert 'holds another data set' in one_line_error(hatemm('demo', tmp_path))
    assert 'too small' in one_line_error(hatemm('demo', tmp_path/'new', '--n', '3'))


def test_annotations_are_not_evaluated(hatemm, tmp_path):
    trap = tmp_path/'pwned'
    (tmp_path/'HateMM_annotation.csv').write_text(f"video_file_name,label,hate_snippet,target\nx.mp4,Hate,\"__import__('os').system('touch {trap}')\",Others\n")
    assert 'line 2' in one_line_error(hatemm('check', tmp_path, '--no-media', '--dataset', 'hatemm'))
    assert not trap.exists()


@pytest.fixture
def own_features(tmp_path):
    "A file of 60 clips of one modality, which knows the label."
    import numpy as np
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 2
    split = np.stack([np.where(np.arange(60)//2 % 5 == k, 'test', np.where(np.arange(60)//2 % 5 == (k + 1) % 5, 'val', 'train')) for k in range(5)])
    np.savez(tmp_path/'own.npz', ids=np.array([f'v{i}' for i in range(60)]), labels=labels, split=split, voice=rng.normal(size=(60, 6)) + 2*labels[:, None])
    return tmp_path/'own.npz'


def test_crossval_on_a_file_of_your_own(hatemm, tmp_path, own_features):
    done = hatemm('crossval', own_features, '--seeds', '2', '--json', tmp_path/'r.json')
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path/'r.json').read_text())
    result = found['BinaryClassifier']['voice']['auroc']
    assert {'mean', 'sd_seeds', 'low', 'high'} <= result.keys() and result['mean'] > .9 and 'tests' not in found


def test_crossval_with_tests(hatemm, own_features):
    done = hatemm('crossval', own_features, '--head', 'MeanLinear,LogisticRegression', '--seeds', '2', '--tests', '--json', '-')
    assert done.returncode == 0, done.stderr
    tests = json.loads(done.stdout)['tests']
    assert 'LogisticRegression:voice' in tests and {'permutation', 'delong', 'mcnemar', 'corrected_t'} <= tests['LogisticRegression:voice'].keys()
    assert 'one run only' in one_line_error(hatemm('crossval', own_features, '--head', 'LogisticRegression', '--seeds', '2', '--tests'))


def test_folds_that_leak(hatemm, tmp_path, own_features):
    "Refused with the share and the first ids; with --allow-leak every figure carries the mark."
    import numpy as np
    file = dict(np.load(own_features))
    np.savez(tmp_path/'torn.npz', **file, video_ids=np.array([f'film{i % 12}' for i in range(60)]))
    refused = one_line_error(hatemm('crossval', tmp_path/'torn.npz', '--seeds', '1'))
    assert '100% of the test clips' in refused and 'film0, film1' in refused and '--allow-leak' in refused
    assert '--allow-leak' in one_line_error(hatemm('robust', tmp_path/'torn.npz', '--seeds', '1'))
    done = hatemm('crossval', tmp_path/'torn.npz', '--head', 'MeanLinear,LogisticRegression', '--seeds', '1', '--allow-leak', '--tests', '--json', tmp_path/'r.json', '--out', tmp_path/'p.parquet')
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path/'r.json').read_text())
    assert all(row['leak'] == 1 for row in found.pop('tests').values())
    assert all(figure['leak'] == 1 for sets in found.values() for figures in sets.values() for figure in figures.values())
    assert all('LEAK: 100%' in line for line in done.stdout.splitlines()[:len(found)])
    grouped = hatemm('crossval', tmp_path/'torn.npz', '--head', 'LogisticRegression', '--seeds', '1', '--protocol', 'grouped_5fold', '--json', '-')
    assert 'leak' not in grouped.stdout and json.loads(grouped.stdout)
    leaky = hatemm('crossval', tmp_path/'torn.npz', '--head', 'LogisticRegression', '--seeds', '1', '--protocol', 'leaky_snippet', '--json', '-')
    assert json.loads(leaky.stdout)['LogisticRegression']['voice']['auroc']['leak'] > .5


def test_the_demo_never_goes_among_the_files_of_a_user(hatemm, tmp_path):
    own = tmp_path/'videos'
    own.mkdir()
    (own/'rally.mp4').write_bytes(b'mine')
    assert 'holds files of yours' in one_line_error(hatemm('demo', own))
    (tmp_path/'p.yml').write_text(f'data_dir: {own}\n')  # `dataset: folder` was forgotten
    assert 'hatemm init' in one_line_error(hatemm('run', tmp_path/'p.yml', '--out', tmp_path/'run'))
    assert [p.name for p in own.iterdir()] == ['rally.mp4'] and not (tmp_path/'run').exists()


def test_no_message_advises_to_write_into_a_folder_of_videos():
    advice = re.compile(r'hatemm (demo|fetch)` (fills|makes|writes)|hatemm demo \{|call one of them|rename .* to annotations')
    for file in (ROOT/'hatemm_clip').glob('*.py'): assert not advice.search(file.read_text()), file.name


@pytest.fixture
def own_folder(tmp_path):
    "Nine moving pictures of noise, and tables that name them in several ways."
    import numpy as np
    from hatemm_clip.media import write_video
    rng = np.random.default_rng(0)
    folder = tmp_path/'my clips'
    folder.mkdir()
    for i in range(9): write_video(folder/f'{i}.mp4', rng.integers(0, 256, (8, 6, 8, 3), dtype=np.uint8).repeat(16, 1).repeat(16, 2), 4)
    return folder


def label(folder, name, labels, column='file'):
    folder.joinpath(name).write_text('\n'.join([f'{column},label', *(f'{i}.mp4,{text}' for i, text in enumerate(labels))]) + '\n')


def test_init(hatemm, tmp_path, own_folder):
    import yaml
    label(own_folder, 'Labels 2026.csv', ['toxic', 'normal', 'toxic']*3, 'FileName')
    (own_folder/'notes.csv').write_text('who,what\nme,nothing\n')
    before = sorted((p.name, p.stat().st_mtime_ns) for p in own_folder.iterdir())
    out = tmp_path/'own.yml'
    done = hatemm('init', own_folder, '--out', out)
    assert done.returncode == 0, done.stderr
    given = yaml.safe_load(out.read_text())
    assert given['dataset'] == 'folder' and given['positive'] == 'toxic' and given['folds'] == 3 and given['60_analysis'] == dict(title='my clips', demo=False)
    assert 'normal 3 in 3 groups, toxic 6 in 6 groups' in done.stdout and done.stdout.count('hatemm ') == 3
    for line in out.read_text().splitlines(): assert not line.strip() or line.startswith('#') or line.endswith(':') or 'title' in line or ' # ' in line, line
    assert hatemm('check', out, '--no-media').returncode == 0 and hatemm('run', out, '--dry-run', '--out', tmp_path/'run').returncode == 0
    assert 'is there already' in one_line_error(hatemm('init', own_folder, '--out', out)) and hatemm('init', own_folder, '--out', out, '--force').returncode == 0
    assert 'among your videos' in one_line_error(hatemm('init', own_folder, '--out', own_folder/'p.yml'))
    assert sorted((p.name, p.stat().st_mtime_ns) for p in own_folder.iterdir()) == before


def test_init_says_what_the_data_cannot_carry(hatemm, tmp_path, own_folder):
    init = lambda *more: one_line_error(hatemm('init', own_folder, '--out', tmp_path/'own.yml', *more))
    assert 'expected a .csv, .tsv or .jsonl with a column `file`' in init()
    (own_folder/'labels.xlsx').touch()
    assert 'save labels.xlsx as CSV' in init()
    label(own_folder, 'a.csv', ['cats', 'dogs', 'dogs']*3)
    assert "'cats', 'dogs'" in init() and 'positive' in init()
    label(own_folder, 'b.csv', ['hateful']*2 + ['normal']*7)
    assert 'holds a.csv, b.csv, any of which could be the table' in init()
    assert 'normal 7 in 7 groups, hateful 2 in 2 groups' in init('--annotations', 'b.csv')
    assert not (tmp_path/'own.yml').exists()
