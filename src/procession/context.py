"""Contexts: the standard library's, whose factory methods make procession's objects.

`ForkContext`, `SpawnContext`, `ForkServerContext` and `DefaultContext` are subclasses of the classes of the same name in
`multiprocessing.context`, so they can be handed to whatever takes a context: ``ProcessPoolExecutor(mp_context=...)``,
joblib, torch's ``DataLoader``.

The default start method is not kept here. The standard library's own default context keeps it: that is what a
spawned child is told, what `multiprocessing.set_start_method` sets, and so both packages always agree.
"""

from __future__ import annotations

from multiprocessing import context as _std
from multiprocessing.context import (
    AuthenticationError,
    BaseContext,
    BufferTooShort,
    ProcessError,
    TimeoutError,  # noqa: A004
    assert_spawning,
    get_spawning_popen,
    set_spawning_popen,
)
from multiprocessing.util import Finalize as _Finalize

from procession import _native
from procession._proc.process import ForkProcess, ForkServerProcess, Process, SpawnProcess
from procession._wire import codec

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any, Literal

    from procession import _sync, pool
    from procession._wire import queues

    _OnOwnerDeath = Literal["warn", "raise", "ignore"]

__all__ = [
    "AuthenticationError",
    "BaseContext",
    "BufferTooShort",
    "DefaultContext",
    "ForkContext",
    "ForkProcess",
    "ForkServerContext",
    "ForkServerProcess",
    "Process",
    "ProcessError",
    "SpawnContext",
    "SpawnProcess",
    "TimeoutError",
    "assert_spawning",
    "get_spawning_popen",
    "set_spawning_popen",
]


def __getattr__(name: str) -> Any:
    # Private names that programs poke at, and names of later Pythons.
    return getattr(_std, name)


def _for_queues(context: Any) -> Any:
    """Have queues send what is defined in ``__main__`` by value, if this context's children cannot import it."""
    if context._name != "fork" and not codec.main_is_importable():
        _native.set_main_by_value(True)
    return context


class Factories(BaseContext):
    """The factory methods of every context of ours; a mixin before a context class of the standard library."""

    def Lock(self, *, on_owner_death: _OnOwnerDeath = "warn") -> _sync.Lock:
        """Return a non-recursive lock.

        Args:
            on_owner_death: What `acquire()` does when the process that held the lock was killed: "warn" takes the
                lock and issues a `LockOwnerDied` warning, "raise" raises `LockOwnerDiedError` and leaves it free,
                "ignore" takes it silently.
        """
        from procession._sync import Lock

        return Lock(ctx=self.get_context(), on_owner_death=on_owner_death)

    def RLock(self, *, on_owner_death: _OnOwnerDeath = "warn") -> _sync.RLock:
        """Return a recursive lock; the options are those of `Lock`."""
        from procession._sync import RLock

        return RLock(ctx=self.get_context(), on_owner_death=on_owner_death)

    def Condition(self, lock: _sync.Lock | _sync.RLock | None = None) -> _sync.Condition:
        """Return a condition variable on `lock`, or on an RLock of its own."""
        from procession._sync import Condition

        return Condition(lock, ctx=self.get_context())

    def Semaphore(self, value: int = 1) -> _sync.Semaphore:
        """Return a semaphore with `value` permits."""
        from procession._sync import Semaphore

        return Semaphore(value, ctx=self.get_context())

    def BoundedSemaphore(self, value: int = 1) -> _sync.BoundedSemaphore:
        """Return a semaphore that raises ValueError when it is released more often than acquired."""
        from procession._sync import BoundedSemaphore

        return BoundedSemaphore(value, ctx=self.get_context())

    def Event(self) -> _sync.Event:
        """Return an event, not set."""
        from procession._sync import Event

        return Event(ctx=self.get_context())

    def Barrier(
        self, parties: int, action: Callable[[], object] | None = None, timeout: float | None = None
    ) -> _sync.Barrier:
        """Return a barrier for `parties` processes or threads; one of them calls `action` each time it opens."""
        from procession._sync import Barrier

        return Barrier(parties, action, timeout, ctx=self.get_context())

    def Value(self, typecode_or_type: Any, *args: Any, lock: Any = True) -> Any:
        """Return a ctypes object in shared memory; `lock` is True for a new RLock, False for none, or a lock."""
        from procession._sync.value import quicken

        return quicken(super().Value(typecode_or_type, *args, lock=lock))

    def Queue(self, maxsize: int = 0) -> queues.Queue[Any]:
        """Return a queue; `maxsize` items at most, 0 for no limit."""
        from procession._wire.queues import Queue

        return Queue(maxsize, ctx=_for_queues(self.get_context()))

    def JoinableQueue(self, maxsize: int = 0) -> queues.JoinableQueue[Any]:
        """Return a queue with `task_done()` and `join()`."""
        from procession._wire.queues import JoinableQueue

        return JoinableQueue(maxsize, ctx=_for_queues(self.get_context()))

    def SimpleQueue(self) -> queues.SimpleQueue[Any]:
        """Return a queue with `put()`, `get()`, `empty()` and `close()` alone."""
        from procession._wire.queues import SimpleQueue

        return SimpleQueue(ctx=_for_queues(self.get_context()))

    def Pipe(self, duplex: bool = True) -> tuple[Any, Any]:
        """Return the two ends of a pipe: `Connection` objects, `duplex`, or one that reads and one that writes."""
        from procession._wire.pipes import Pipe

        return Pipe(duplex)

    def Pool(
        self,
        processes: int | None = None,
        initializer: Callable[..., object] | None = None,
        initargs: Iterable[Any] = (),
        maxtasksperchild: int | None = None,
        **options: Any,
    ) -> pool.Pool:
        """Return a pool of worker processes, as many as `cpu_count()` says if `processes` is None; see `procession.pool.Pool`."""
        from procession.pool import Pool

        return Pool(processes, initializer, initargs, maxtasksperchild, context=self.get_context(), **options)

    def cpu_count(self, logical: bool = True) -> int:
        """Return the number of CPUs this process can really use: affinity, cgroup quota, PYTHON_CPU_COUNT.

        Args:
            logical: False counts physical cores: hyper-threads of one core are one.

        See also: `procession.cpu_limits()`, which tells what decided.
        """
        from procession._proc.limits import cpu_count

        return cpu_count(logical)

    def get_context(self, method: str | None = None) -> Any:
        """Return this context, or the one of the start method `method`."""
        if method is None:
            return self
        # What others have registered there too, as loky does.
        context = _concrete_contexts.get(method) or _std._concrete_contexts.get(method)  # type: ignore[attr-defined]
        if context is None:
            raise ValueError(f"cannot find context for {method!r}")
        context._check_available()
        return context


class ForkContext(Factories, _std.ForkContext):
    """Starts processes by fork."""

    Process = ForkProcess


class SpawnContext(Factories, _std.SpawnContext):
    """Starts processes as fresh interpreters."""

    Process = SpawnProcess


class ForkServerContext(Factories, _std.ForkServerContext):
    """Starts processes through a fork server."""

    Process = ForkServerProcess


class DefaultContext(Factories, _std.DefaultContext):
    """The context of the current start method; keeps no method of its own, see the module's docstring."""

    Process = Process

    def get_context(self, method: str | None = None) -> Any:
        """Return the context of `method`, or of the current start method, which from then on cannot be changed."""
        if method is None:
            # Asked in this way because it settles the method for good, as in the standard library.
            method = _std._default_context.get_start_method()
        return super().get_context(method)

    def set_start_method(self, method: str | None, force: bool = False) -> None:
        """Set the start method, once; None with `force` goes back to not set."""
        _std._default_context.set_start_method(method, force)

    def get_start_method(self, allow_none: bool = False) -> str | None:
        """Return the current start method; with `allow_none` None if none has been settled."""
        return _std._default_context.get_start_method(allow_none)

    def get_all_start_methods(self) -> list[str]:
        """Return the start methods this platform has, the default first."""
        return _std._default_context.get_all_start_methods()


_concrete_contexts: dict[str, Any] = {
    "fork": ForkContext(),
    "spawn": SpawnContext(),
    "forkserver": ForkServerContext(),
}
_default_context: DefaultContext = DefaultContext(None)  # type: ignore[arg-type]

# The lowest priority: after everything multiprocessing does when the main process ends, joining children included.
# A child ends by Process._bootstrap, and a Finalize is only run by the process that made it.
_Finalize(None, _native.process_exiting, exitpriority=-(2**31))
