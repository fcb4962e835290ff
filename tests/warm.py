"""Python processes that fork from one in which the libraries are imported already.

A test session starts some three hundred kernels and commands, and each would spend five seconds on the same imports. A fork is as fresh otherwise: it
has its own memory, folder, environment and arguments, and runs its module or its code from the top.
"""
import atexit
import contextlib
import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import unittest.mock

LIBRARIES = ['torch', 'torch._dynamo', 'torchvision', 'pandas', 'sklearn.linear_model', 'sklearn.ensemble', 'scipy.stats', 'matplotlib.pyplot', 'seaborn',
             'pyarrow.parquet', 'lancedb', 'av', 'transformers', 'transformers.models.auto', 'open_clip', 'whisper', 'faster_whisper',
             'IPython', 'ipykernel.kernelapp', 'papermill']
CONTEXT = multiprocessing.get_context('forkserver')
CONTEXT.set_forkserver_preload(LIBRARIES)
FOUND_BY = os.environ.get('PYTHONPATH')  # what the server finds modules by


def _run(flag, what, *args):
    "Run `-m MODULE` or `-c CODE` with arguments, as `python` does; gives the exit status."
    try:
        sys.argv = ['-c', *args]
        if flag == '-c': exec(compile(what, '<string>', 'exec'), dict(__name__='__main__'))
        else: runpy.run_module(what, run_name='__main__', alter_sys=True)
    except SystemExit as e:
        if isinstance(e.code, str): print(e.code, file=sys.stderr)
        return e.code if isinstance(e.code, int) else int(e.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _become(command, cwd, env, out, err):
    "In the fork: what `python …` is in a shell."
    os.setsid()
    multiprocessing.set_start_method(None, force=True)  # its own processes start as they do anywhere
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background has it ignored
    for path, fd in ((out, 1), (err, 2)):
        if path: os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), fd)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env, JPY_PARENT_PID=str(os.getppid()))  # by which a kernel sees that nobody needs it any more
    sys.path[:] = [os.getcwd()] + [p for p in sys.path if p not in ('', os.path.dirname(__file__))]
    code = _run(*command)
    threading._shutdown()  # what follows is the end of every Python process, which multiprocessing has in another order
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def can_fork(command, env):
    "Whether a process is one of this Python, with the modules that the server has imported."
    return command[0] == sys.executable and env.get('PYTHONPATH') == FOUND_BY


def _ensure_server():
    with unittest.mock.patch.dict(os.environ, PYTHONWARNINGS='ignore:lancedb fork:RuntimeWarning'):  # it has nothing under way when it is forked
        multiprocessing.forkserver.ensure_running()


class Fork:
    "`[sys.executable, …]`, started at once; it has what is used here of subprocess.Popen, and its output where that is kept."
    stdin = stdout = stderr = None

    def __init__(self, command, cwd='.', env=None, keep=True):
        self.args, env = list(map(str, command)), dict(env or os.environ)
        assert can_fork(self.args, env), f'not this Python, or with another path to find modules by: {self.args}'
        self._kept = [tempfile.NamedTemporaryFile('r') for _ in range(2)] if keep else []
        files = [f.name for f in self._kept] or [None]*2
        _ensure_server()
        self._process = CONTEXT.Process(target=_become, args=(self.args[1:], str(cwd or '.'), env, *files))
        self._process.start()
        self.pid = self._process.pid
        with contextlib.suppress(ProcessLookupError):  # it has ended already
            while self.poll() is None and os.getpgid(self.pid) != self.pid: time.sleep(.001)  # until then a signal to its group would be one to ours

    def poll(self): return self._process.exitcode

    @property
    def returncode(self): return self.poll()

    def wait(self, timeout=None):
        self._process.join(timeout)
        if self.poll() is None: raise subprocess.TimeoutExpired(self.args, timeout)
        return self.poll()

    def communicate(self, timeout=None):
        "Wait for its end; gives what it wrote, and what to stderr."
        self.wait(timeout)
        return tuple(f.read() for f in self._kept)

    def send_signal(self, number):
        if self.poll() is None: os.kill(self.pid, number)

    def kill(self): self.send_signal(signal.SIGKILL)

    def terminate(self): self.send_signal(signal.SIGTERM)


def run(command, timeout=None, **options):
    "Run `[sys.executable, …]` to its end; gives what subprocess.run gives."
    process = Fork(command, **options)
    try: written = process.communicate(timeout)
    finally: process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, *written)


def start_kernels_here():
    "From now on the kernels of this process are forks, but for those that bring another path to find modules by."
    from jupyter_client.provisioning import local_provisioner
    usual = local_provisioner.launch_kernel

    def launch_kernel(command, cwd=None, env=None, **options):
        if can_fork(command, env or os.environ): return Fork(command, cwd, env, keep=False)
        return usual(command, cwd=cwd, env=env, **options)
    local_provisioner.launch_kernel = launch_kernel
