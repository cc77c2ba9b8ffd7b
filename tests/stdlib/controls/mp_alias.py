"""Positive control: a module whose contexts and processes are its own classes,
thin subclasses of the standard library's, as a successor's would be.  It must
score what multiprocessing scores; where it does not, the harness is at fault.

With MP_ALIAS_LOG set it also notes each process that ran one of its Process
objects, so that a run can show that the children used it too.
"""

import os
import sys

from multiprocessing import context as _context
from multiprocessing import process as _process
from multiprocessing.context import (  # noqa: F401
    AuthenticationError,
    BufferTooShort,
    ProcessError,
    TimeoutError,
)


def _log(what):
    path = os.environ.get("MP_ALIAS_LOG")
    if path:
        with open(path, "a") as f:
            f.write(f"{os.getpid()} {what}\n")


class _Logged:
    def run(self):
        _log(type(self).__name__ + ".run")
        super().run()


class Process(_Logged, _process.BaseProcess):
    _start_method = None

    @staticmethod
    def _Popen(process_obj):
        return _default.get_context().Process._Popen(process_obj)

    @staticmethod
    def _after_fork():
        return _default.get_context().Process._after_fork()


class ForkProcess(_Logged, _context.ForkProcess):
    pass


class SpawnProcess(_Logged, _context.SpawnProcess):
    pass


class ForkServerProcess(_Logged, _context.ForkServerProcess):
    pass


class _Own:
    def get_context(self, method=None):
        if method is None:
            return self
        try:
            return _contexts[method]
        except KeyError:
            raise ValueError(f"cannot find context for {method!r}") from None

    def Manager(self):
        _log("Manager")
        return super().Manager()


class ForkContext(_Own, _context.ForkContext):
    Process = ForkProcess


class SpawnContext(_Own, _context.SpawnContext):
    Process = SpawnProcess


class ForkServerContext(_Own, _context.ForkServerContext):
    Process = ForkServerProcess


_contexts = {"fork": ForkContext(), "spawn": SpawnContext(), "forkserver": ForkServerContext()}


class DefaultContext(_context.DefaultContext):
    """Keeps no method of its own: the standard library's is the one that a
    child is told, whether spawned (spawn.prepare) or forked (_bootstrap)."""

    Process = Process

    def get_context(self, method=None):
        if method is None:
            # like the standard library's, this settles the method for good
            method = _context._default_context.get_context()._name
        try:
            return _contexts[method]
        except KeyError:
            raise ValueError(f"cannot find context for {method!r}") from None

    def set_start_method(self, method, force=False):
        _context._default_context.set_start_method(method, force)

    def get_start_method(self, allow_none=False):
        return _context._default_context.get_start_method(allow_none)


_default = DefaultContext(_contexts[_context._default_context._default_context._name])

_names = [n for n in dir(_default) if not n.startswith("_")]
globals().update((n, getattr(_default, n)) for n in _names)
__all__ = _names + [
    "ForkProcess",
    "SpawnProcess",
    "ForkServerProcess",
    "ForkContext",
    "SpawnContext",
    "ForkServerContext",
    "DefaultContext",
]
SUBDEBUG = 5
SUBWARNING = 25
if "__main__" in sys.modules:
    sys.modules["__mp_main__"] = sys.modules["__main__"]
