"""What the processes of these tests do. Imports little: spawned children import it too."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import resource
import signal
import sys
import time
from pathlib import Path

# How a process can die without a word, and what its exit code says then.
DEATHS = {"SIGKILL": -signal.SIGKILL, "SIGTERM": -signal.SIGTERM, "os._exit": 3, "segfault": -signal.SIGSEGV}
# What the warning about it says.
WORDS = {"SIGKILL": "SIGKILL", "SIGTERM": "SIGTERM", "os._exit": "exit code 3", "segfault": "SIGSEGV"}


def die(how):
    """End here and now, without any clean-up."""
    faulthandler.disable()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if how == "os._exit":
        os._exit(3)
    if how == "segfault":
        signal.signal(signal.SIGSEGV, signal.SIG_DFL)
        ctypes.string_at(8)
    os.kill(os.getpid(), getattr(signal, how))
    while True:
        time.sleep(60)


def acquire_and_die(lock, how="SIGKILL"):
    lock.acquire()
    die(how)


def enter_and_die(lock, how="SIGKILL"):
    with lock:
        die(how)


def acquire_and_end(lock):
    lock.acquire()


def count_in_file(lock, path, times):
    """Read, add one, write: what is lost unless one at a time does it."""
    for _ in range(times):
        with lock:
            path.write_text(str(int(path.read_text()) + 1))


def release(lock):
    lock.release()


def acquire_at_once(lock):
    return lock.acquire(False)


def acquire_tell_and_sleep(lock, acquired):
    lock.acquire()
    acquired.set()
    time.sleep(3600)


def acquire_and_exec(lock, acquired, path):
    """Become another program while holding; it says so, and lives on."""
    lock.acquire()
    acquired.set()
    os.execv(sys.executable, [sys.executable, "-c", f"open({path!r}, 'w').close(); import time; time.sleep(3600)"])


def call(function, *args):
    """Call a bound method or the like that the parent chose."""
    return function(*args)


def tell_and_call(here, function, *args):
    here.set()
    return function(*args)


def put_all(q, items):
    for item in items:
        q.put(item)


def get_n(q, n):
    return [q.get() for _ in range(n)]


def get_and_die(q, how="SIGKILL"):
    q.get()
    die(how)


def echo(handle):
    """Take a handle in, and give it back by the way results travel."""
    return handle


def state_of(pid):
    """The letter of /proc/<pid>/stat: R, S (asleep), T (stopped), Z; "" when it is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    return text[text.rindex(")") + 2]
