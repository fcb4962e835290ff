"Forks of the tests are what processes are: their ends, files, signals and environment."
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import warm

SAY = 'import os, sys; print(sys.argv, os.getcwd(), os.environ.get("COLOUR"), __name__); print("so", file=sys.stderr); sys.exit(3)'


@pytest.mark.parametrize('command', [['-c', SAY, 'a b'], ['said.py', 'a b'], ['-m', 'said', 'a b']])
def test_a_fork_says_what_a_process_says(command, tmp_path):
    (tmp_path/'said.py').write_text(SAY)
    options = dict(cwd=tmp_path, env=dict(os.environ, COLOUR='red'))
    fork = warm.run([sys.executable, *command], **options)
    process = subprocess.run([sys.executable, *command], capture_output=True, text=True, **options)
    assert (fork.returncode, fork.stdout, fork.stderr) == (process.returncode, process.stdout, process.stderr) and 'red' in fork.stdout


def test_other_modules_are_found_first(tmp_path):
    (tmp_path/'hatemm_clip').mkdir()
    (tmp_path/'hatemm_clip/__init__.py').write_text('print("another")')
    assert warm.run([sys.executable, '-c', 'import hatemm_clip'], cwd='/', env=dict(os.environ, PYTHONPATH=str(tmp_path))).stdout == 'another\n'


def test_how_it_ended():
    sleeping = [sys.executable, '-c', 'import time; time.sleep(60)']
    for number, ended in ((signal.SIGKILL, -9), (signal.SIGTERM, -15), (signal.SIGINT, -2)):
        process = warm.Fork(sleeping)
        with pytest.raises(subprocess.TimeoutExpired): process.wait(.1)
        assert process.poll() is None
        process.send_signal(number)
        assert process.wait(10) == process.poll() == ended
    assert 'ValueError: no' in warm.run([sys.executable, '-c', 'raise ValueError("no")']).stderr


def test_it_leads_a_group_and_ends_with_who_asked():
    process = warm.Fork([sys.executable, '-c', 'import time; time.sleep(60)'])
    assert os.getpgid(process.pid) == process.pid
    pid = process.pid
    del process
    for _ in range(100):
        if not Path(f'/proc/{pid}').exists(): return
        time.sleep(.05)
    pytest.fail('it lives on')


def test_the_command_of_the_pages(tmp_path):
    done = subprocess.run('hatemm score none none.mp4; echo $?; hatemm --version', shell=True, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.splitlines()[0] == '2' and 'none' in done.stderr and len(done.stdout.splitlines()) == 2
