"The demo, made once for all tests: what a student finds after running 40_fusion in a fresh clone."
import hashlib
import json
import os
import shutil
from pathlib import Path

import papermill
import warm
from filelock import FileLock
from nbclient import NotebookClient

from hatemm_clip.base import Run, remove, write_atomic

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT/'tests/.cache'
MADE_BY = '40_fusion'  # the last notebook that the demo is made by
SEEDS = 4  # of its networks, ten for a student


def execute(notebook, cwd, **parameters):
    "Run a notebook as a batch does, all cells but the flagged ones; its page is not kept."
    from hatemm_clip.pipeline import kernel_over_files, runnable
    with kernel_over_files() as config:
        papermill.execute_notebook(runnable(notebook), None, parameters, cwd=str(cwd), kernel_name='python3', progress_bar=False, config=config)


def run_all(nb, cwd, **options):
    "Execute all cells of a notebook in memory, as *Run All* does."
    from hatemm_clip.pipeline import kernel_over_files
    with kernel_over_files() as config:
        NotebookClient(nb, kernel_name='python3', config=config, resources=dict(metadata=dict(path=str(cwd))), **options).execute()


def key():
    "Hash of the code that the demo is made by; prose and outputs do not count."
    digest = hashlib.sha256()
    for file in sorted((ROOT/'nbs').glob('[0-9]*.ipynb')):
        if file.stem > MADE_BY: break
        cells = [''.join(c['source']) for c in json.loads(file.read_text())['cells'] if c['cell_type'] == 'code']
        if file.stem != MADE_BY: cells = [c for c in cells if c.startswith('#| export')]
        digest.update(json.dumps(cells).encode())
    return digest.hexdigest()[:16]


def make_demo():
    "A clone in which 40_fusion has run; made by the first test that asks, and kept for the next session."
    CACHE.mkdir(exist_ok=True)
    clone = CACHE/key()
    with FileLock(CACHE/'.lock'):
        if not (clone/'done').exists():
            for old in CACHE.iterdir():
                if old.name != '.lock': remove(old)
            shutil.copytree(ROOT/'nbs', clone/'nbs', symlinks=True, ignore=shutil.ignore_patterns('.ipynb_checkpoints'))
            execute(clone/'nbs'/f'{MADE_BY}.ipynb', clone/'nbs', seeds=SEEDS)
            (clone/'done').touch()
    return clone


def copy_run(clone, target, *leave_out):
    "The run of a clone under another name, without some of its files; files are links, since none is changed in place."
    ignore = shutil.ignore_patterns('*.lock', *leave_out)
    return Run(shutil.copytree(clone/'runs/notebook', target, copy_function=os.link, ignore=ignore))


def first_clips(run, n):
    "Cut a run to its first `n` clips: its tables and its store, if it has one; the bundle stays that of all."
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    from hatemm_clip.features import open_store
    clips = pq.read_table(run.clips).slice(0, n)
    for path, column in ((run.clips, 'clip_id'), (run.splits, 'video_id'), (run.transcripts, 'clip_id'), (run.predictions, 'clip_id')):
        if not path.exists(): continue
        table = pq.read_table(path)
        with write_atomic(path) as part: pq.write_table(table.filter(pc.is_in(table[column], clips[column])), part)
    names = ', '.join(f"'{name}'" for name in clips['clip_id'].to_pylist())
    if not run.features.exists(): return run
    open_store(run.features).table.delete(f'clip_id not in ({names})')
    return run


def small_corpus(clone, target, n):
    "The first `n` videos of the demo corpus as a data set of their own, in HateMM's layout."
    import csv
    source = clone/'demo_data'
    with open(source/'HateMM_annotation.csv', newline='', encoding='utf-8') as f: rows = list(csv.DictReader(f))
    truth = json.loads((source/'truth.json').read_text())
    names = {row['video_file_name'] for row in rows[:n]}
    for file in source.rglob('*.mp4'):
        if file.name not in names: continue
        (target/file.parent.name).mkdir(parents=True, exist_ok=True)
        os.link(file, target/file.parent.name/file.name)
    with open(target/'HateMM_annotation.csv', 'w', newline='', encoding='utf-8') as f:
        writer = csv.DictWriter(f, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows[:n])
    videos = [v for v in truth['videos'] if v['video_file_name'] in names]
    (target/'truth.json').write_text(json.dumps(dict(truth, videos=videos)))
    return target


if __name__ == '__main__':
    warm.start_kernels_here()
    make_demo()
