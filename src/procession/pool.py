"""`Pool`: the standard library's engine on procession's context.

It still talks to its workers through pipes, whose end a worker sees when the parent has died. What is ours: the
processes, the locks of these pipes (a worker killed while it held one does not wedge the others), the number of
workers if none is given, and functions that only exist here (lambdas, closures, a notebook's) travel by value.
"""

from __future__ import annotations

from multiprocessing import pool as _std
from multiprocessing.pool import (
    ApplyResult,
    AsyncResult,
    IMapIterator,
    IMapUnorderedIterator,
    MapResult,
    MaybeEncodingError,
    ThreadPool,
)
from multiprocessing.queues import SimpleQueue as _PipeQueue

from procession import context as _context
from procession._wire import codec

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

__all__ = [
    "ApplyResult",
    "AsyncResult",
    "IMapIterator",
    "IMapUnorderedIterator",
    "MapResult",
    "MaybeEncodingError",
    "Pool",
    "ThreadPool",
]


def __getattr__(name: str) -> Any:
    # Private names that programs poke at, and names of later Pythons.
    return getattr(_std, name)


class _PipeContext:
    """Gives a pipe-based queue its locks."""

    def __init__(self, context: Any) -> None:
        self._context = context

    def Lock(self) -> Any:
        # A pool that is terminated kills idle workers one after the other, and one of them holds the task pipe's lock.
        return self._context.Lock(on_owner_death="ignore")


class Pool(_std.Pool):
    """A pool of worker processes; interface and behaviour are those of `multiprocessing.pool.Pool`.

    Args:
        processes: Number of workers; None for `cpu_count()`.
        initializer: Called in each worker as it starts.
        initargs: Its arguments.
        maxtasksperchild: A worker is replaced after this many tasks; None never.
        context: A context; None for the default one.
    """

    def __init__(
        self,
        processes: int | None = None,
        initializer: Callable[..., object] | None = None,
        initargs: Iterable[Any] = (),
        maxtasksperchild: int | None = None,
        context: Any = None,
    ) -> None:
        if context is None:
            context = _context._default_context.get_context()
        if processes is None:
            processes = context.cpu_count()
        super().__init__(processes, initializer, initargs, maxtasksperchild, context)

    def _setup_queues(self) -> None:
        context: Any = self._ctx
        pipes = _PipeContext(context)
        self._inqueue: Any = _PipeQueue(ctx=pipes)
        self._outqueue: Any = _PipeQueue(ctx=pipes)
        by_value = context.get_start_method() != "fork" and not codec.main_is_importable()
        send_bytes = self._inqueue._writer.send_bytes
        self._quick_put = lambda task: send_bytes(codec.encode(task, main_by_value=by_value))
        self._quick_get = self._outqueue._reader.recv
