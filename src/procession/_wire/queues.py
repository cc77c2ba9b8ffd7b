"""Queue, JoinableQueue, SimpleQueue: what was put has been delivered, whoever dies.

No feeder thread and no pipe: `put` pickles in the caller and copies into shared memory. The algorithm, its invariants and
what a kill at each point leaves behind are in ``native/include/procession/queue.hpp`` and ``docs/crash-safety.md``.
"""

from __future__ import annotations

from queue import Empty, Full
from types import GenericAlias

from procession import _native
from procession._errors import ShutDown

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from typing import Any, Generic, TypeVar

    from procession._wire.bell import Bell, Reader, Writer

    _T = TypeVar("_T")
else:
    # `typing` costs a spawned worker as much time as all of this package.
    class Generic:
        __class_getitem__ = classmethod(GenericAlias)

    _T = object


__all__ = ["JoinableQueue", "Queue", "SimpleQueue"]


class _Ends(Generic[_T]):
    """What the three have in common, beside the native half."""

    # Not sent along when a queue is pickled.
    _process_local = ("_bell_here", "_reader_here", "_writer_here")

    def __repr__(self) -> str:
        size = self.qsize()  # type: ignore[attr-defined]
        limit = f"/{self._maxsize}" if self._maxsize else ""  # type: ignore[attr-defined]
        closed = ", closed" if self._closed else ""  # type: ignore[attr-defined]
        return f"<{type(self).__name__} at {id(self):#x}: {size}{limit} items{closed}>"

    @property
    def _bell(self) -> Bell:
        try:
            return self._bell_here
        except AttributeError:
            from procession._wire.bell import Bell

            self._bell_here: Bell = Bell(self)  # type: ignore[arg-type]
            return self._bell_here

    @property
    def _reader(self) -> Reader:
        """Something to poll, as the standard library's queues have; see `procession._wire.bell`."""
        try:
            return self._reader_here
        except AttributeError:
            from procession._wire.bell import Reader

            self._reader_here: Reader = Reader(self, self._bell)
            return self._reader_here

    @property
    def _writer(self) -> Writer:
        try:
            return self._writer_here
        except AttributeError:
            from procession._wire.bell import Writer

            self._writer_here: Writer = Writer(self)
            return self._writer_here


class _Iterable:
    """Iteration and await, for Queue and JoinableQueue."""

    def __iter__(self) -> Iterator[Any]:
        """Take items until the queue is shut down and empty; waits for each."""
        while True:
            try:
                item = self.get()  # type: ignore[attr-defined]
            except ShutDown:
                return
            yield item

    async def __aiter__(self) -> AsyncIterator[Any]:
        """Take items until the queue is shut down and empty; awaits each."""
        while True:
            try:
                item = await self.aget()
            except ShutDown:
                return
            yield item

    async def aget(self) -> Any:
        """Take the oldest item; awaits one without a thread. Cancelling the await takes nothing.

        Raises:
            ShutDown: The queue was shut down and is empty.
            ValueError: It was closed in this process.
        """
        while True:
            try:
                return self.get_nowait()  # type: ignore[attr-defined]
            except Empty:
                await self._bell.wait(space=False)  # type: ignore[attr-defined]

    async def aput(self, obj: Any) -> None:
        """Put an item; awaits room in a full queue without a thread. Cancelling the await puts nothing.

        Raises:
            ShutDown: The queue was shut down.
            ValueError: It was closed in this process.
        """
        while True:
            try:
                self.put_nowait(obj)  # type: ignore[attr-defined]
            except Full:
                await self._bell.wait(space=True)  # type: ignore[attr-defined]
            else:
                return

    def join_thread(self) -> None:
        """Do nothing: there is no thread; what was put has been delivered."""

    def cancel_join_thread(self) -> None:
        """Do nothing: there is no thread, and no item is lost at exit."""

    def _terminate_broken(self) -> None:
        # concurrent.futures calls this when a worker has died.
        self.close()  # type: ignore[attr-defined]


class Queue(_Iterable, _Ends[_T], _native.Queue):
    """A first-in first-out queue between processes.

    `put` has delivered when it returns: the item is a snapshot, errors of pickling raise there, and `empty`, `full` and
    `qsize` are exact. A process that is killed at any point never blocks the others, and no item is lost, doubled or
    damaged, except the one that a killed consumer had just taken (`JoinableQueue` gives that back).

    Args:
        maxsize: Most items it holds; `put` then waits for room. 0 or less: no limit but the memory's.
        ctx: Accepted for the standard library's sake, and not used.
    """


class JoinableQueue(_Iterable, _Ends[_T], _native.JoinableQueue):
    """A `Queue` whose items are marked done.

    An item stays in its consumer's hands until `task_done`. If the consumer dies before that, the item is delivered to
    another: so `join` never waits for the dead.
    """


class SimpleQueue(_Ends[_T], _native.Queue):
    """A queue with `put`, `get`, `empty` and `close`, never full."""

    _closed_error = OSError

    def __init__(self, *, ctx: object = None) -> None:
        super().__init__(0, ctx=ctx)

    def empty(self) -> bool:
        """Tell whether the queue is empty; exact at the moment of the call.

        Raises:
            OSError: It was closed in this process.
        """
        if self._closed:
            raise OSError(f"{self!r} is closed")
        return super().empty()
