"Ways to end what works: whole runs at random moments, and an actor of Ray."
import os
import signal
import threading
import time
from contextlib import contextmanager

import numpy as np
import psutil


def kill_runs(run, times=10, longest=1.):
    "Fork a child for each run, which calls `ready()` when its work begins, and kill it up to `longest` s later; the number that died of it."
    rng, killed = np.random.default_rng(0), 0
    for _ in range(times):
        heard, say = os.pipe()
        child = os.fork()  # the imports, most of the time of a run, are done
        if not child:
            try: run(lambda: os.write(say, b'.'))
            finally: os._exit(0)
        os.close(say)
        assert os.read(heard, 1) == b'.', 'a run ended before its work began'
        os.close(heard)
        time.sleep(rng.uniform(.05, longest))
        os.kill(child, signal.SIGKILL)
        killed += os.WIFSIGNALED(os.waitpid(child, 0)[1])
    return killed


def _kill_actor(name, killed, stopped):
    while not stopped.wait(.02):
        for process in psutil.Process().children(recursive=True):
            try:
                if name in ' '.join(process.cmdline()) and process.cpu_times().user > .5: process.kill(); killed.append(process.pid); return
            except psutil.Error: continue


@contextmanager
def killing_actor(name):
    "Meanwhile, kill one actor of Ray of that name once it has worked for half a second; gives the list of those killed."
    killed, stopped = [], threading.Event()
    thread = threading.Thread(target=_kill_actor, args=(name, killed, stopped))
    thread.start()
    try: yield killed
    finally:
        stopped.set()
        thread.join()
