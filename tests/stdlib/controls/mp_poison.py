"""Negative control: a module whose every way to make something fails.

The tests that still pass against it never touch the module under test; they
would pass for anybody and are marked `stdlib` in known.txt.  MP_POISON_KEEP
names what to leave alone (comma-separated), e.g. MP_POISON_KEEP=Manager.
"""

import os

import multiprocessing as _std

_MAKERS = (
    "Process Pool Manager Pipe Lock RLock Condition Semaphore BoundedSemaphore Event "
    "Barrier Queue JoinableQueue SimpleQueue RawValue RawArray Value Array"
).split()
_keep = set(os.environ.get("MP_POISON_KEEP", "").split(","))

__all__ = list(_std.__all__)
# taken now: under substitute/ the package's own names become this module's
_real = {n: getattr(_std, n) for n in __all__}


class Poisoned(Exception):
    pass


def _poison(name):
    def maker(*args, **kwargs):
        raise Poisoned(name)

    maker.__name__ = maker.__qualname__ = name
    return maker


class _Process(_real["Process"]):
    def __init__(self, *args, **kwargs):
        raise Poisoned("Process")

    def terminate(self):
        raise Poisoned("terminate")

    def kill(self):
        raise Poisoned("kill")


class _Context:
    def __init__(self, ctx):
        self._ctx = ctx

    def __getattr__(self, name):
        if name in _MAKERS and name not in _keep:
            return _Process if name == "Process" else _poison(name)
        return getattr(self._ctx, name)


def get_context(method=None):
    return _Context(_real["get_context"](method))


def __getattr__(name):
    if name not in __all__:
        raise AttributeError(name)
    if name in _MAKERS and name not in _keep:
        # setUpModule makes one RLock to see whether the platform can
        return _Process if name == "Process" else _poison(name)
    return _real[name]


class RLock:
    """setUpModule makes one to see whether the platform can; no more."""

    def __init__(self):
        pass

    def __getattr__(self, name):
        raise Poisoned("RLock." + name)


def __dir__():
    return __all__
