"What pages that follow a reader share: a folder to work in, and `!` that prints what a terminal would and stops at a failure."
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]  # the clone


def shell(command):
    "Run a line as a terminal would, with nobody watching for progress; a failure ends the page."
    command = get_ipython().var_expand(command)
    done = subprocess.run(command, shell=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    print(done.stdout.rstrip())
    if done.returncode: raise RuntimeError(f'{command}: exit code {done.returncode}')


def put_own_commands_first():
    "Make this Python's commands come first, and its package be found from any folder; in tests their forks stay before them."
    own, found = Path(sys.executable).parent, shutil.which('hatemm')
    if not found or Path(found).parent != ROOT/'tests/bin': os.environ['PATH'] = f"{own}{os.pathsep}{os.environ['PATH']}"
    given = os.environ.get('PYTHONPATH', '')
    if given: os.environ['PYTHONPATH'] = os.pathsep.join(str(Path(p).resolve()) for p in given.split(os.pathsep) if p)


def demo_bundle(run_dir):
    "A run with features and a bundle, as the demo leaves one; what is missing is made."
    from hatemm_clip.base import Run
    from hatemm_clip.embed import demo_run
    from hatemm_clip.features import read_features
    from hatemm_clip.fusion import fit_run_bundle
    from hatemm_clip.plan import bundle_info
    run = Run(demo_run(run_dir).resolve())
    kept = (run.bundle/'config.json').exists() and bundle_info(run.bundle)
    if not (kept and kept['reviews'] and kept['made_with']['clips']):
        fit_run_bundle(run, read_features(run), 'BinaryClassifier', modalities='image+text', demo=True)
    return run


def copy_results(run, target):
    "What the demo has made, under another name."
    target.mkdir(parents=True)
    for path in (run.clips, run.splits, run.transcripts): shutil.copy(path, target/path.name)
    for path in (run.features, run.bundle):
        shutil.copytree(path, target/path.name, ignore=shutil.ignore_patterns('*.lock'))


def open_walk(folder='', run_dir=''):
    "Go to a folder, a temporary one where none is named, as a reader's terminal does; with a run, find it there as runs/demo."
    put_own_commands_first()
    run = demo_bundle(run_dir) if run_dir else None
    folder = Path(folder or tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    if run: copy_results(run, Path('runs/demo'))
    get_ipython().system = shell  # what `!` calls


def bring_films(folder, n):
    "Put videos of the run into a folder, with a table of their labels, as a reader has them."
    from hatemm_clip.base import Run, read_table, write_text
    clips, lines = read_table(Run('runs/demo').clips).head(n), ['file,label']
    Path(folder).mkdir()
    for i, clip in enumerate(clips.itertuples(), 1):
        shutil.copy(clip.path, f'{folder}/film {i:02}.mp4')
        lines.append(f'film {i:02}.mp4,{("normal", "hateful")[clip.label]}')
    write_text(f'{folder}/labels.csv', '\n'.join(lines) + '\n')
