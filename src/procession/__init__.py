"""procession: multiprocessing that survives its processes.

::

    import procession as mp

gives every public name of the running interpreter's `multiprocessing`, and more: `Process` has a result, a lock whose
holder was killed is recovered, a queue has delivered when `put` returns. `install()` makes ``import multiprocessing``
give the same, and ``procession run SCRIPT`` does that for a program that does not know of us.

Importing this module loads nothing else; a name is looked up when it is first used. Public modules have the names
they have in the standard library (`procession.pool`, `procession.queues`, ...); everything that starts with an
underscore is private.
"""

from __future__ import annotations

import sys

if not sys.platform.startswith("linux"):
    raise ImportError(
        f"procession runs on Linux; this is {sys.platform}. Its shared memory needs memfd_create, futexes and pidfds. "
        "Use multiprocessing here: procession has the same names."
    )

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from procession._errors import (
        ArenaFullError,
        ForeignHandleError,
        LockOwnerDied,
        LockOwnerDiedError,
        ProcessDiedError,
        ProcessionError,
        RemoteError,
        RemoteTraceback,
        ShutDown,
        StaleHandleError,
    )
    from procession._pool.errors import (
        PoolBrokenError,
        TaskCancelledError,
        TaskTimeoutError,
        WorkerDiedError,
        WorkerMemoryError,
    )
    from procession._proc.limits import cpu_limits, memory_limit, memory_limits
    from procession._proc.stacks import dump
    from procession._version import __version__
    from procession._wire.arrays import Holder, Memory, array, empty, memory, shared, zeros
    from procession.context import (
        AuthenticationError,
        BufferTooShort,
        Process,
        ProcessError,
        TimeoutError,  # noqa: A004
        _default_context,
    )
    from procession.futures import ProcessPoolExecutor, register_joblib_backend
    from procession.install import install

    Array = _default_context.Array
    Barrier = _default_context.Barrier
    BoundedSemaphore = _default_context.BoundedSemaphore
    Condition = _default_context.Condition
    Event = _default_context.Event
    JoinableQueue = _default_context.JoinableQueue
    Lock = _default_context.Lock
    Manager = _default_context.Manager
    Pipe = _default_context.Pipe
    Pool = _default_context.Pool
    Queue = _default_context.Queue
    RLock = _default_context.RLock
    RawArray = _default_context.RawArray
    RawValue = _default_context.RawValue
    Semaphore = _default_context.Semaphore
    SimpleQueue = _default_context.SimpleQueue
    Value = _default_context.Value
    active_children = _default_context.active_children
    allow_connection_pickling = _default_context.allow_connection_pickling
    cpu_count = _default_context.cpu_count
    current_process = _default_context.current_process
    freeze_support = _default_context.freeze_support
    get_all_start_methods = _default_context.get_all_start_methods
    get_context = _default_context.get_context
    get_logger = _default_context.get_logger
    get_start_method = _default_context.get_start_method
    log_to_stderr = _default_context.log_to_stderr
    parent_process = _default_context.parent_process
    reducer = _default_context.reducer
    set_executable = _default_context.set_executable
    set_forkserver_preload = _default_context.set_forkserver_preload
    set_start_method = _default_context.set_start_method
del TYPE_CHECKING  # what is public here is in __all__

__all__ = [
    "ArenaFullError",
    "Array",
    "AuthenticationError",
    "Barrier",
    "BoundedSemaphore",
    "BufferTooShort",
    "Condition",
    "Event",
    "ForeignHandleError",
    "Holder",
    "JoinableQueue",
    "Lock",
    "LockOwnerDied",
    "LockOwnerDiedError",
    "Manager",
    "Memory",
    "Pipe",
    "Pool",
    "PoolBrokenError",
    "Process",
    "ProcessDiedError",
    "ProcessError",
    "ProcessPoolExecutor",
    "ProcessionError",
    "Queue",
    "RLock",
    "RawArray",
    "RawValue",
    "RemoteError",
    "RemoteTraceback",
    "Semaphore",
    "ShutDown",
    "SimpleQueue",
    "StaleHandleError",
    "TaskCancelledError",
    "TaskTimeoutError",
    "TimeoutError",
    "Value",
    "WorkerDiedError",
    "WorkerMemoryError",
    "__version__",
    "active_children",
    "allow_connection_pickling",
    "array",
    "cpu_count",
    "cpu_limits",
    "current_process",
    "dump",
    "empty",
    "freeze_support",
    "get_all_start_methods",
    "get_context",
    "get_logger",
    "get_start_method",
    "install",
    "log_to_stderr",
    "memory",
    "memory_limit",
    "memory_limits",
    "parent_process",
    "reducer",
    "register_joblib_backend",
    "set_executable",
    "set_forkserver_preload",
    "set_start_method",
    "shared",
    "zeros",
]

# Where a name lives that is not a method of the default context.
_HOMES = {
    "ArenaFullError": "_errors",
    "ForeignHandleError": "_errors",
    "Holder": "_wire.arrays",
    "LockOwnerDied": "_errors",
    "LockOwnerDiedError": "_errors",
    "Memory": "_wire.arrays",
    "PoolBrokenError": "_pool.errors",
    "ProcessDiedError": "_errors",
    "ProcessPoolExecutor": "futures",
    "ProcessionError": "_errors",
    "RemoteError": "_errors",
    "RemoteTraceback": "_errors",
    "ShutDown": "_errors",
    "StaleHandleError": "_errors",
    "TaskCancelledError": "_pool.errors",
    "TaskTimeoutError": "_pool.errors",
    "WorkerDiedError": "_pool.errors",
    "WorkerMemoryError": "_pool.errors",
    "__version__": "_version",
    "array": "_wire.arrays",
    "cpu_limits": "_proc.limits",
    "dump": "_proc.stacks",
    "empty": "_wire.arrays",
    "install": "install",
    "memory": "_wire.arrays",
    "memory_limit": "_proc.limits",
    "memory_limits": "_proc.limits",
    "register_joblib_backend": "futures",
    "shared": "_wire.arrays",
    "zeros": "_wire.arrays",
}

# Submodules that need no import of their own: `import multiprocessing` brings some of them and programs rely on it.
_MODULES = frozenset(
    (
        "connection",
        "context",
        "dummy",
        "futures",
        "heap",
        "managers",
        "pool",
        "process",
        "queues",
        "reduction",
        "shared_memory",
        "sharedctypes",
        "spawn",
        "synchronize",
        "util",
    )
)


def __getattr__(name: str) -> Any:
    import importlib

    value: Any
    if name in _HOMES:
        value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    elif name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    elif name.startswith("_"):
        # `from procession import _native` asks here before it looks for the submodule.
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    else:
        value = _name_of_multiprocessing(name)
    globals()[name] = value
    return value


def _name_of_multiprocessing(name: str) -> Any:
    """Return what `multiprocessing` has under this name: ours if it is a method of a context."""
    import multiprocessing

    from procession.context import _default_context

    try:
        return getattr(_default_context if hasattr(_default_context, name) else multiprocessing, name)
    except AttributeError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
