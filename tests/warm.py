"""Python processes that fork from one in which the libraries are imported already.

A test session starts some four hundred kernels and commands, and each would spend five seconds on the same imports. A fork is as fresh otherwise: it
has its own memory, folder, environment, arguments and session, and runs its module, its code or its file from the top.

The server is this file as a script. Each connection to its socket is one process: in comes the command, with its folder, its environment and its
files for stdin, stdout and stderr; out go its number and, at its end, its exit status. It is killed when the other side hangs up.
"""
import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import types
import warnings
import weakref

LIBRARIES = ['torch', 'torch._dynamo', 'torchvision', 'pandas', 'sklearn.linear_model', 'sklearn.ensemble', 'scipy.stats', 'matplotlib.pyplot', 'seaborn',
             'pyarrow.parquet', 'lancedb', 'av', 'transformers', 'transformers.models.auto', 'open_clip', 'whisper', 'faster_whisper',
             'IPython', 'ipykernel.kernelapp', 'ipykernel.debugger', 'papermill', 'peft', 'fastapi']
ADDRESS = 'HATEMM_TESTS_FORK_AT'  # variable with the place of the server's socket; what starts without it starts its own processes cold
LONGEST = 1 << 20  # bytes of a message
gc.set_threshold(20_000)  # new objects between two collections; 700 are for programs that are small


def open_socket(): return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)  # a message comes whole or not at all


# What asks for a process

def can_fork(command, env):
    "Whether a process is one of this Python, and there is a server to ask."
    return command[0] == sys.executable and ADDRESS in env


class Fork:
    "`[sys.executable, …]`, started at once; it has what is used here of subprocess.Popen, keeps the output, and ends with this object."
    stdin = stdout = stderr = returncode = None

    def __init__(self, command, cwd=None, env=None, keep=True, stderr=None):
        self.args = list(map(str, command))
        assert can_fork(self.args, os.environ), f'not this Python, or no server of forks: {self.args}'
        self._kept = [tempfile.TemporaryFile('w+') for _ in range(2)] if keep else []
        request = dict(command=self.args[1:], cwd=os.path.abspath(cwd or '.'), env=dict(env or os.environ))
        self._connection = open_socket()
        self._connection.connect(os.environ[ADDRESS])
        files = [0, *[f.fileno() for f in self._kept]] if keep else [0, 1, 2]
        if stderr: files[2] = stderr.fileno()
        socket.send_fds(self._connection, [json.dumps(request).encode()], files)
        self.pid = int(self._connection.recv(LONGEST))

    def wait(self, timeout=None):
        if self.returncode is not None: return self.returncode
        self._connection.settimeout(timeout)
        try: self.returncode = int(self._connection.recv(LONGEST))
        except (TimeoutError, BlockingIOError) as e: raise subprocess.TimeoutExpired(self.args, timeout) from e
        self._connection.close()
        return self.returncode

    def poll(self):
        with contextlib.suppress(subprocess.TimeoutExpired): return self.wait(0)

    def communicate(self, timeout=None):
        "Wait for its end; gives what it wrote, and what to stderr."
        self.wait(timeout)
        for file in self._kept: file.seek(0)
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


def cold():
    "The environment of a process whose own kernels are to be started as anywhere, so that they can be found and killed."
    return {name: value for name, value in os.environ.items() if name != ADDRESS}


def start_kernels_here():
    "From now on the kernels that this process starts are forks."
    from jupyter_client.provisioning import local_provisioner
    usual = local_provisioner.launch_kernel

    def launch_kernel(command, cwd=None, env=None, **options):
        if can_fork(command, env or os.environ): return Fork(command, cwd, env, keep=False)
        return usual(command, cwd=cwd, env=env, **options)
    local_provisioner.launch_kernel = launch_kernel


# The server

def start_server():
    "A server for this process and all that it starts; it ends when the one who called it, who holds what this gives, does."
    folder = tempfile.mkdtemp(prefix='hatemm-tests-')
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ[ADDRESS] = f'{folder}/socket'
    with open_socket() as listener:
        listener.bind(os.environ[ADDRESS])
        listener.listen(100)  # who comes before the libraries are there waits
        command = [sys.executable, os.path.abspath(__file__), str(listener.fileno())]
        return subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=[listener.fileno()], start_new_session=True)


def serve(listener):
    "Fork for each connection. This returns in the forks, each with what it is to run."
    ready, running = selectors.DefaultSelector(), {}  # process → what is ready at its end
    for place in (0, listener): ready.register(place, selectors.EVENT_READ)
    while True:
        key, _ = ready.select()[0]
        if key.fd == 0:
            for pid in running: os.kill(pid, signal.SIGKILL)
            os._exit(0)
        elif key.fileobj is listener:
            connection, _ = listener.accept()
            request, files, *_ = socket.recv_fds(connection, LONGEST, 3)
            pid = fork()
            if not pid: return become(connection, files, ready, **json.loads(request))
            for file in files: os.close(file)
            running[pid] = os.pidfd_open(pid)
            for place in (connection, running[pid]): ready.register(place, selectors.EVENT_READ, (pid, connection))
        elif key.fileobj is key.data[1]:  # its other side has hung up
            ready.unregister(key.fileobj)
            os.kill(key.data[0], signal.SIGKILL)
        else: say_end(ready, running, *key.data)


def fork():
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # libraries warn of threads, of which none has anything under way here
        return os.fork()


def say_end(ready, running, pid, connection):
    "Tell who waits for a process how it has ended."
    ended = running.pop(pid)
    ready.unregister(ended)
    os.close(ended)
    with contextlib.suppress(KeyError): ready.unregister(connection)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with contextlib.suppress(OSError): connection.send(str(status).encode())
    connection.close()


def become(connection, files, ready, command, cwd, env):
    "In the fork: what a process is before its program begins; gives the command."
    for key in list(ready.get_map().values()):
        if isinstance(key.fileobj, socket.socket): key.fileobj.close()
        elif key.fd: os.close(key.fd)
    ready.close()
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background has it ignored
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    connection.send(str(os.getpid()).encode())
    connection.close()
    os.chdir(cwd)
    tempfile.tempdir = None  # which depends on the environment
    os.environ.clear()
    os.environ.update(env, JPY_PARENT_PID=str(os.getppid()))  # by which a kernel sees that nobody needs it any more
    return command


def execute(how, *args):
    "Run `-m MODULE`, `-c CODE` or a file."
    if how == '-m':
        sys.argv[:] = args
        runpy.run_module(args[0], run_name='__main__', alter_sys=True)
    elif how == '-c':
        sys.argv[:] = ['-c', *args[1:]]
        main = sys.modules['__main__'] = types.ModuleType('__main__')
        exec(compile(args[0], '<string>', 'exec'), vars(main))
    else:
        sys.argv[:], sys.path[0] = [how, *args], os.path.dirname(os.path.abspath(how))
        runpy.run_path(how, run_name='__main__')


def end(command):
    "Run a command and end as `python` does, but for the second in which every object of the libraries is taken apart."
    status = 0
    try: execute(*command)
    except SystemExit as e:
        status = e.code if isinstance(e.code, int) else int(e.code is not None)
        if isinstance(e.code, str): print(e.code, file=sys.stderr)
    except BaseException as e:
        sys.excepthook(type(e), e, e.__traceback__)
        status = -signal.SIGINT if isinstance(e, KeyboardInterrupt) else 1
    threading._shutdown()
    atexit._run_exitfuncs()
    for file in (sys.stdout, sys.stderr): file.flush()
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


def import_libraries():
    "What the forks have from the start. None of them collects it as garbage or takes it apart at its end."
    for name in LIBRARIES: importlib.import_module(name)
    nbformat = sys.modules['nbformat']
    nbformat.validate(nbformat.v4.new_notebook())  # the first time compiles a schema
    for held in weakref.finalize._registry: held.atexit = False
    gc.freeze()


def found_first(): return [p for p in os.environ.get('PYTHONPATH', '').split(os.pathsep) if p]


if __name__ == '__main__':
    libraries = [p for p in sys.path[1:] if p not in found_first()]
    listener = socket.socket(fileno=int(sys.argv[1]))
    if 0 in select.select([0, listener], [], [])[0]: sys.exit()  # nothing was asked for, so nothing is imported
    start_kernels_here()
    import_libraries()
    command = serve(listener)
    sys.path[:] = [os.getcwd(), *found_first(), *libraries]
    end(command)
