"Shared fixtures, and the closing line `N passed, N failed`."
import compileall
import os
import subprocess
import sys
from pathlib import Path

import pytest
import warm
from demo import make_demo

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent/'shared'
os.environ.update(HF_HUB_OFFLINE='1', JUPYTER_PLATFORM_DIRS='1', TQDM_DISABLE='1', OMP_NUM_THREADS='1', LOKY_MAX_CPU_COUNT='1',  # two test processes share the cores
                  PYDEVD_DISABLE_FILE_VALIDATION='1')
if warm.ADDRESS not in os.environ:  # one server for all processes of a session, and one compilation, which PYTHONDONTWRITEBYTECODE would leave to each
    compileall.compile_dir(ROOT/'hatemm_clip', quiet=1)
    SERVER = warm.start_server()
    os.environ['PATH'] = f"{ROOT/'tests/bin'}:{os.environ['PATH']}"  # its `hatemm` is a fork
warm.start_kernels_here()


@pytest.fixture(scope='session')
def shared():
    "The folder of real data beside the checkout."
    if not SHARED.is_dir(): pytest.skip(f'needs real data: no folder {SHARED.name} beside the checkout')
    return SHARED


@pytest.fixture(scope='session')
def demo():
    "A clone in which the demo has run up to its predictions and bundle."
    return make_demo()


@pytest.fixture(scope='session')
def hatemm():
    "Run the `hatemm` command; gives the finished process."
    def call(*args, timeout=600):
        return warm.run([sys.executable, '-m', 'hatemm_clip', *args], cwd=ROOT, timeout=timeout)
    return call


def pytest_sessionstart(session):
    "The demo takes minutes: for the whole suite it is made beside the first tests, so that none has to wait for it."
    if session.config.args == ['tests'] and not hasattr(session.config, 'workerinput'):
        subprocess.Popen([sys.executable, ROOT/'tests/demo.py'], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def pytest_xdist_make_scheduler(config, log):
    "A file's tests share a process, and so what they prepare; of the notebooks, each goes to the first that is free."
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid): return nodeid if 'test_notebooks_beside' in nodeid else super()._split_scope(nodeid)
    return Scheduling(config, log)


def pytest_terminal_summary(terminalreporter):
    count = lambda *kinds: sum(len(terminalreporter.stats.get(k, [])) for k in kinds)
    terminalreporter.write_line(f"{count('passed')} passed, {count('failed', 'error')} failed")
