"""`Pipe`: the standard library's, through which arrays and handles go beside what is written to it.

A pipe carries bytes and can hold on to nothing, so what must be held goes by a queue for each direction, and the pipe carries
the number of the message there. The queue is written first: whoever reads the number finds the message. What a sender put there
and was killed before it wrote its number, stays with the receiver until that closes its end.

A number takes 100 bytes of the pipe, its arrays megabytes: so a sender of arrays waits, as a full pipe would make it wait, while the
other end has some to read.
"""

from __future__ import annotations

import errno
import itertools
import os
import pickle
import select
import time
from multiprocessing import connection as _std
from multiprocessing import reduction
from queue import Empty

from procession._wire import codec
from procession._wire.payload import Payload
from procession._wire.queues import SimpleQueue

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = ["Connection", "Pipe"]

_numbers = itertools.count()

# So many messages with arrays may be under way in one direction; and so often who waits looks whether there is room.
MOST_UNREAD = 8
_LOOK_S = 0.0002


class _Beside:
    """Stands in the pipe for a message that is in the queue."""

    def __init__(self, key: tuple[int, int]) -> None:
        self.key = key

    def __reduce__(self) -> tuple[Any, ...]:
        return _Beside, (self.key,)


class Connection(_std.Connection):
    """One end of a `Pipe`; as the standard library's, of which it is one.

    `send` and `recv` take arrays and other large buffers, locks and queues through shared memory, as a `Queue` does.
    """

    def __init__(self, handle: Any, readable: bool, writable: bool, incoming: Any, outgoing: Any) -> None:
        super().__init__(handle, readable, writable)
        self._incoming, self._outgoing = incoming, outgoing
        # What threads that send at the same time have put there in another order than here.
        self._early: dict[tuple[int, int], Payload] = {}

    def send(self, obj: Any) -> None:
        """Send an object; blocks while the other end has much to read: a full pipe, or eight messages with arrays.

        Raises:
            OSError: The end is closed, or only for reading, or the other is closed (`BrokenPipeError`).
            ArenaFullError: There is no room for its arrays; a `MemoryError`.
        """
        self._check_closed()  # type: ignore[attr-defined]
        self._check_writable()  # type: ignore[attr-defined]
        data = codec.encode_beside(obj)
        if isinstance(data, Payload):
            if data.nbytes:
                self._wait_for_room()
            key = (os.getpid(), next(_numbers))
            self._outgoing.put((*key, data))
            data = codec.encode(_Beside(key))
        self._send_bytes(data)  # type: ignore[attr-defined]

    def _wait_for_room(self) -> None:
        """Wait until the other end has read something, or is closed, as by its process's death."""
        hung_up = None
        while self._outgoing.qsize() >= MOST_UNREAD:
            if hung_up is None:
                hung_up = select.poll()
                hung_up.register(self.fileno(), 0)
            if hung_up.poll(0):
                raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
            time.sleep(_LOOK_S)

    def recv(self) -> Any:
        """Receive an object; blocks until there is one.

        Raises:
            EOFError: There is nothing left, and the other end is closed.
            OSError: The end is closed, or only for writing.
        """
        self._check_closed()  # type: ignore[attr-defined]
        self._check_readable()  # type: ignore[attr-defined]
        obj = pickle.loads(self._recv_bytes().getbuffer())  # type: ignore[attr-defined]
        return self._take(obj.key) if type(obj) is _Beside else obj

    def close(self) -> None:
        """Close this end; what it has not received is gone."""
        super().close()
        self._early.clear()

    def _take(self, key: tuple[int, int]) -> Any:
        while key not in self._early:
            try:
                pid, number, data = self._incoming.get_nowait()
            except Empty:
                text = "what was sent beside this message has been taken by another reader of the same end"
                raise EOFError(text) from None
            self._early[pid, number] = data
        return codec.loads(self._early.pop(key))


def Pipe(duplex: bool = True) -> tuple[Connection, Connection]:
    """Return the two ends of a pipe, `duplex` or (reader, writer)."""
    one, other = _std.Pipe(duplex)
    there: SimpleQueue[Any] = SimpleQueue()
    back: SimpleQueue[Any] | None = SimpleQueue() if duplex else None
    return (
        Connection(_taken_over(one), one.readable, one.writable, there, back),
        Connection(_taken_over(other), other.readable, other.writable, back, there),
    )


def _taken_over(end: Any) -> int:
    """Return an end's descriptor, a copy: the end closes its own when it goes."""
    with end:
        return os.dup(end.fileno())


def _reduce(end: Connection) -> tuple[Any, ...]:
    duplicate = reduction.DupFd(end.fileno())
    return _rebuild, (duplicate, end.readable, end.writable, end._incoming, end._outgoing)


def _rebuild(duplicate: Any, *rest: Any) -> Connection:
    return Connection(duplicate.detach(), *rest)


reduction.register(Connection, _reduce)
