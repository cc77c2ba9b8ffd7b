"""What ends a process or a call, and objects that do it in places where no function of the user's is called.

Apart from the tests, so that a spawned worker need not import pytest.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import sys
import threading
import time


class TaskError(Exception):
    """An exception of the user's."""


def segfault():
    faulthandler.disable()  # which would print the stacks of pytest
    ctypes.string_at(0)


def segfault_here():
    ctypes.string_at(0)


def abort_here():
    os.abort()


def call(name):
    module, _, function = name.rpartition(".")
    return getattr(sys.modules[module or __name__], function)()


def sigkill():
    os.kill(os.getpid(), signal.SIGKILL)


def exit_at_once():
    os._exit(3)


def exit_by_exception():
    sys.exit(3)


def raise_error():
    raise TaskError("on purpose")


def raise_memory_error():
    raise MemoryError("on purpose")


def overflow_the_stack():
    """C code that calls itself, as long as the stack lasts; in a thread, where that is not long."""
    faulthandler.disable()
    sys.setrecursionlimit(1_000_000)
    threading.stack_size(1 << 16)
    nested = []
    for _ in range(100_000):
        nested = [nested]
    thread = threading.Thread(target=repr, args=(nested,))
    thread.start()
    thread.join()


DEADLY = {
    "segfault": segfault,
    "SIGKILL": sigkill,
    "os._exit": exit_at_once,
    "sys.exit": exit_by_exception,
    "stack overflow": overflow_the_stack,
}
RAISING = {"exception": raise_error, "MemoryError": raise_memory_error}
CAUSES = {**DEADLY, **RAISING}


def same(x):
    return x


def square(x):
    return x * x


class BadArgument:
    """Unpickling it runs a cause."""

    def __init__(self, cause):
        self.cause = cause

    def __reduce__(self):
        return _run, (self.cause,)


class BadResult:
    """Pickling it runs a cause."""

    def __init__(self, cause):
        self.cause = cause

    def __reduce__(self):
        CAUSES[self.cause]()
        return _run, (self.cause,)


class BadInParent:
    """Unpickling it runs a cause in the process that made the pool, and nowhere else."""

    def __init__(self, cause, parent):
        self.cause = cause
        self.parent = parent

    def __reduce__(self):
        return _run_in, (self.cause, self.parent)


class BadError(Exception):
    """An exception whose unpickling runs a cause in the process that made the pool."""

    def __init__(self, cause, parent):
        super().__init__("the original text")
        self.cause = cause
        self.parent = parent

    def __reduce__(self):
        return _bad_error, (self.cause, self.parent)


def _run(cause):
    CAUSES[cause]()


def _run_in(cause, pid):
    if os.getpid() == pid:
        CAUSES[cause]()


def _bad_error(cause, pid):
    _run_in(cause, pid)
    return BadError(cause, pid)


def run_if(item):
    """Run the cause that an item names; an item that names none is returned."""
    if isinstance(item, str):
        CAUSES[item]()
    return item


def return_bad_result(item):
    return BadResult(item) if isinstance(item, str) else item


def return_bad_in_parent(item):
    return BadInParent(*item) if isinstance(item, tuple) else item


def raise_bad_error(item):
    if isinstance(item, tuple):
        raise BadError(*item)
    return item


def run_soon(cause):
    """Run the cause after the answer has been given, while the worker does nothing."""
    threading.Timer(0.05, CAUSES[cause]).start()
    return os.getpid()


def run_unless_again(path, cause):
    """Run the cause for the first who calls it with this path."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return "second time"
    CAUSES[cause]()
    return "survived"


def sleep(seconds):
    time.sleep(seconds)
    return seconds
