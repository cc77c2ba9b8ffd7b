"""A file descriptor that becomes readable when a queue has items, or room: for `connection.wait` and asyncio."""

from __future__ import annotations

import contextlib
import os
import time
import weakref
from multiprocessing import connection

TYPE_CHECKING = False
if TYPE_CHECKING:
    import asyncio
    from typing import Any

    from procession._native import Queue as NativeQueue

__all__ = ["Bell", "Reader", "Writer"]

# A bell can fail (its slots all taken, /proc hidden), and a consumer's death rings none: so waits look for themselves.
_SLICE_S = 0.25
_SLICE_WITHOUT_BELL_S = 0.01


def _close(fds: list[int]) -> None:
    while fds:
        with contextlib.suppress(OSError):
            os.close(fds.pop())


class Bell:
    """One process's pipe that other processes ring for one queue.

    It is armed for one ring at a time; whoever puts (or gets) next finds the pipe through /proc/<pid>/fd and writes a byte.
    """

    def __init__(self, queue: NativeQueue) -> None:
        self._queue = weakref.ref(queue)
        self._pid = 0
        self._fds: list[int] = []
        self._index = -1
        # By event loop: threads may run one each.
        self._waiting: dict[asyncio.AbstractEventLoop, set[asyncio.Future[None]]] = {}
        # Not at exit: threads of the pool still poll then.
        weakref.finalize(self, _close, self._fds).atexit = False

    def _open(self) -> None:
        if self._pid == os.getpid():
            return
        _close(self._fds)  # inherited by fork: the parent's
        self._fds[:] = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._pid = os.getpid()
        queue = self._queue()
        self._index = -1 if queue is None else queue._add_bell(self._fds[1])

    def arm(self, *, space: bool) -> bool:
        """Ask for the next ring; True when there is no need to wait."""
        self._open()
        queue = self._queue()
        if queue is None or self._index < 0:
            return False
        return queue._arm_bell(self._index, space)

    def fileno(self) -> int:
        """Return a descriptor that is readable when the queue has items, now or later. Arms the bell."""
        self._open()
        self.drain()
        if self._index < 0:
            raise OSError("too many processes poll this queue at once; use get(timeout=…) instead")
        if self.arm(space=False):
            os.write(self._fds[1], b"\0")
        return self._fds[0]

    def drain(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._fds[0], 4096)

    def close(self) -> None:
        queue = self._queue()
        if self._pid == os.getpid() and queue is not None:
            queue._remove_bell(self._index)
        self._pid = 0
        _close(self._fds)

    async def wait(self, *, space: bool) -> None:
        """Return when there may be items (room): the caller tries again."""
        if self.arm(space=space):
            return
        import asyncio  # costs as much as all else here together, and few programs have it

        loop = asyncio.get_running_loop()
        future = loop.create_future()
        if loop not in self._waiting:
            self._waiting[loop] = set()
            loop.add_reader(self._fds[0], self._rung)
        self._waiting[loop].add(future)
        try:
            await asyncio.wait((future,), timeout=_SLICE_S if self._index >= 0 else _SLICE_WITHOUT_BELL_S)
        finally:
            self._waiting[loop].discard(future)
            if not self._waiting[loop]:
                del self._waiting[loop]
                loop.remove_reader(self._fds[0])

    def _rung(self) -> None:
        self.drain()
        # Whichever loop was woken empties the pipe, so it tells the others.
        for loop, futures in list(self._waiting.items()):
            with contextlib.suppress(RuntimeError):  # closed meanwhile
                loop.call_soon_threadsafe(_wake, list(futures))


def _wake(futures: list[asyncio.Future[None]]) -> None:
    for future in futures:
        if not future.done():
            future.set_result(None)


class Reader:
    """The reading end of a queue, in the shape of a `Connection`: what `concurrent.futures` and others poll."""

    def __init__(self, queue: Any, bell: Bell) -> None:
        self._queue = weakref.ref(queue)
        self._bell = bell
        self._closed = False

    @property
    def closed(self) -> bool:
        queue = self._queue()
        return self._closed or queue is None or queue._closed

    def fileno(self) -> int:
        self._target()
        return self._bell.fileno()

    def poll(self, timeout: float | None = 0.0) -> bool:
        """Tell whether there is an item; wait for one up to `timeout` seconds (monotonic clock), None: for ever."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while self._target().empty():
            left = _SLICE_S if deadline is None else min(_SLICE_S, deadline - time.monotonic())
            if left <= 0:
                return False
            # In slices: a signal may have been given to another thread, and a dead consumer's item comes back unrung.
            try:
                connection.wait([self], left)  # type: ignore[list-item]
            except OSError:
                time.sleep(min(left, _SLICE_WITHOUT_BELL_S))  # all bells are taken
        return True

    def recv(self) -> Any:
        return self._target().get()

    def close(self) -> None:
        self._closed = True
        self._bell.close()

    def _target(self) -> Any:
        if self.closed:
            raise OSError("handle is closed")
        return self._queue()


class Writer:
    """The writing end, likewise."""

    def __init__(self, queue: Any) -> None:
        self._queue = weakref.ref(queue)
        self._closed = False

    @property
    def closed(self) -> bool:
        queue = self._queue()
        return self._closed or queue is None or queue._closed

    def send(self, obj: Any) -> None:
        queue = self._queue()
        if queue is None or self.closed:
            raise OSError("handle is closed")
        queue.put(obj)

    def close(self) -> None:
        self._closed = True
