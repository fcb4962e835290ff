"Files are whole or absent, whenever the process that writes them ends."
import os
import subprocess
import sys

import pytest
from killing import kill_runs

from hatemm_clip.base import InputError, Run, read_json, store_lock, write_atomic, write_json, write_text

CONTENTS = ['old'*200_000, 'new'*200_000]


def write_on(path):
    "Write one content after the other, for ever."
    def run(ready):
        ready()
        while True:
            for content in CONTENTS: write_text(path, content)
    return run


def test_kill_at_any_moment_leaves_a_whole_file(tmp_path):
    path = write_text(tmp_path/'note.txt', CONTENTS[0])
    assert kill_runs(write_on(path), times=10, longest=.3) == 10
    assert path.read_text() in CONTENTS
    assert write_text(path, 'after').read_text() == 'after'


def test_kill_between_write_and_rename_leaves_the_old_file(tmp_path):
    path = write_text(tmp_path/'note.txt', 'old')
    code = "import os, sys; from hatemm_clip.base import write_atomic\nwith write_atomic(sys.argv[1]) as part: part.write_text('new'); os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, '-c', code, path]).returncode == -9
    assert path.read_text() == 'old' and len(list(tmp_path.iterdir())) == 2
    assert write_text(path, 'new').read_text() == 'new'


@pytest.mark.parametrize('error', [KeyboardInterrupt, SystemExit, OSError])
def test_an_exception_leaves_nothing_behind(tmp_path, error):
    with pytest.raises(error), write_atomic(tmp_path/'new'/'folder') as part:
        part.mkdir()
        (part/'half').touch()
        raise error
    assert not list((tmp_path/'new').iterdir())


def test_lock_ends_with_its_process(tmp_path):
    code = "import os, sys; from hatemm_clip.base import store_lock\nwith store_lock(sys.argv[1]): os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, '-c', code, tmp_path/'store']).returncode == -9
    with store_lock(tmp_path/'store'), pytest.raises(InputError, match='another run'), store_lock(tmp_path/'store'): pass


def test_run_is_a_path_and_names_files(tmp_path):
    run = Run(Run(tmp_path))
    write_json(run.metrics, dict(a=1))
    assert read_json(tmp_path/'metrics.json') == dict(a=1) and os.fspath(run) == str(tmp_path)
