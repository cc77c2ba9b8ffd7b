"""The job behind `Pool.imap`: its input is read by a thread of its own, as far as its consumer allows."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections import deque
from functools import partial
from itertools import repeat
from multiprocessing import TimeoutError as _TimeoutError

from procession._pool.gate import Gate
from procession._pool.jobs import Job
from procession._pool.state import Unit

TYPE_CHECKING = False
if TYPE_CHECKING:
    import weakref
    from collections.abc import Iterator
    from typing import Any

    from procession._pool.functions import Function
    from procession._pool.iterators import IMapIterator

__all__ = ["HOLD_S", "Stream"]

# How far a stream runs ahead of its consumer, in units of work for each worker.
STREAM_AHEAD_S = 0.02
# Items of a stream are not held back for longer than this to make a larger unit.
HOLD_S = 0.001
MOST_BUFFERED = 4096
# And in arrays and the like.
STREAM_BYTES = 64 << 20


class Stream(Job):
    """A mapping whose results are given out one by one; no more than `limit` items are between its input and its consumer."""

    def __init__(
        self,
        function: Function,
        iterable: Any,
        chunksize: int | None,
        buffersize: int | None,
        ordered: bool,
        **options: Any,
    ) -> None:
        self.__dict__.update(options)
        self.function = function
        self.ordered = ordered
        self.sized = hasattr(iterable, "__len__")
        self.unlimited = False
        self._mutex = threading.Lock()
        # Where the consumers wait, and the feeder for them.
        self._gate = Gate()
        self._room = Gate()
        self._chunksize = chunksize
        self._buffersize = buffersize
        self._iterable: Any = iterable
        self._iterator: Iterator[Any] | None = None
        # What the feeder has read and nobody has been given.
        self._buffer: deque[Any] = deque()
        self._read = 0
        self._given_out = 0
        # The feeder says so when it has read this many, and that was so many after it had last said so, and when.
        self._say_at = chunksize or 1
        self._burst = 1
        self._said_when = 0.0
        # The feeder waits until so many have been taken.
        self._room_at: float = math.inf
        # What can be taken, how much that has been in all, and, if ordered, what is too early.
        self._out: deque[tuple[bool, Any]] = deque()
        self._put_out = 0
        self._early: dict[int, tuple[bool, Any]] = {}
        # Who gives the results out; when that is gone, so is the wish for them.
        self.iterator: weakref.ref[IMapIterator] | None = None
        self._input_error: BaseException | None = None
        self._exhausted = False
        self._abandoned: BaseException | None = None

    # -- input: read by the engine's feeder thread, so that an iterable that blocks or raises harms nobody else

    def limit(self, workers: int) -> int | float:
        """How many items may be between the input and the consumer now."""
        if self.unlimited:
            return math.inf
        if self._buffersize is not None:
            return self._buffersize
        least = 2 * workers * (self._chunksize or 1)
        each = self.item_seconds
        if each is None:
            return least
        most = MOST_BUFFERED if not self.item_bytes else int(STREAM_BYTES / self.item_bytes)
        return max(least, min(int(workers * STREAM_AHEAD_S / each) if each > 1e-7 else MOST_BUFFERED, most))

    def feed(self) -> None:
        """Read the input as far as the consumer allows; the body of the feeder thread."""
        buffer = self._buffer
        try:
            iterator = iter(self._iterable)
            self._iterable = None
            while stop := self._wait_for_room():
                read = self._read
                for item in iterator:
                    buffer.append(item)
                    self._read = read = read + 1
                    if read >= self._say_at:
                        self._say()
                        if self._unwanted:
                            break
                    if read >= stop:
                        break
                else:
                    break
                del item
        except BaseException as error:
            self._input_error = error
            if self._chunksize is not None:
                # As in the standard library: the error takes the place of the chunk it was raised in.
                with self._mutex:
                    for _ in range(min(len(buffer), self._read % self._chunksize)):
                        buffer.pop()
                        self._read -= 1
        self._exhausted = True
        self._gate.open()
        # The last chunk may be a smaller one.
        self.engine.source_ready(self)

    def _say(self) -> None:
        """Have what has been read given out; decide when to do so again.

        Items that come fast go together, so that many tiny ones make few units.
        """
        now = time.monotonic()
        with self._mutex:
            fast = now - self._said_when < HOLD_S
            self._said_when = now
            if self._chunksize is not None:
                self._burst = self._chunksize
            else:
                workers = self.engine.size
                self._burst = min(2 * self._burst, self.chunk(self._ahead(workers), workers)) if fast else 1
            self._say_at = self._read + self._burst
        self.engine.source_ready(self)
        if self._burst > 1:
            self.engine.look_soon()

    def held_until(self, now: float) -> float:
        """Have what was held back for HOLD_S given out; return in how many seconds to look again."""
        with self._mutex:
            if self._burst == 1 or self._chunksize is not None or self._room_at < math.inf or self._unwanted:
                return math.inf
            left = self._said_when + HOLD_S - now
            if left > 0:
                return left
            # The input is slow: what comes next goes at once.
            self._burst = 1
            self._say_at = 0
        self.engine.source_ready(self)
        return math.inf

    @property
    def input_ended(self) -> bool:
        """All of the input has been read."""
        return self._exhausted

    def make_room(self) -> None:
        """Have the feeder look again."""
        self._room.open()

    def read_one(self) -> bool:
        """Read one item here and now; False at the end of the input."""
        try:
            if self._iterator is None:
                self._iterator = iter(self._iterable)
            self._buffer.append(next(self._iterator))
        except StopIteration:
            self._exhausted = True
            return False
        except BaseException as error:
            self._input_error = error
            self._exhausted = True
            return False
        self._read += 1
        return True

    def _wait_for_room(self) -> int:
        """Wait until more may be read; return up to how many in all, 0 when none will be wanted."""
        while not self._unwanted:
            workers = self.engine.size
            limit = self.limit(workers)
            if limit == math.inf:
                return self._read + MOST_BUFFERED
            # While the workers have enough to do, it is no use to wake up for each item that is taken.
            chunk = self._chunksize or 1
            least = min(int(limit), max(chunk, (int(limit) - 4 * workers * chunk) // 2))
            room = int(limit) - (self._read - self._taken)
            if room >= least:
                return self._read + room
            self._room_at = self._read + least - int(limit)
            if self._buffer:
                # Perhaps less than a chunk, but more will not come before some of it has been consumed.
                self.engine.source_ready(self)
            self._room.wait(partial(self._may_read, int(limit)))
            self._room_at = math.inf
            self._said_when = time.monotonic()
            if self._burst > 1:
                self.engine.look_soon()
        return 0

    def _may_read(self, before: int) -> bool:
        return self._unwanted or self._taken >= self._room_at or self.limit(self.engine.size) > before

    @property
    def _unwanted(self) -> bool:
        return self.settled or self._abandoned is not None

    def next_unit(self, workers: int) -> Unit | None:
        with self._mutex:
            if self.settled:
                return None
            waiting = len(self._buffer)
            size = self._chunksize or self.chunk(waiting if self._exhausted else self._ahead(workers), workers)
            if waiting < size and self._chunksize and not self._exhausted and self._room_at == math.inf:
                return None  # the feeder goes on
            size = min(size, waiting)
            if size == 0:
                return None
            first = self._given_out
            self._given_out += size
            if size == 1:
                return Unit(self, first, self._buffer.popleft(), 1, True)
            return Unit(self, first, [self._buffer.popleft() for _ in range(size)], size, False)

    def _ahead(self, workers: int) -> int:
        """How many items there are to be shared out, those that will soon be read included."""
        return int(min(self.limit(workers), MOST_BUFFERED))

    # -- output

    def put_value(self, index: int, value: Any) -> None:
        self._put(index, (True, value))

    def put_error(self, index: int, error: BaseException) -> None:
        self._put(index, (self.return_errors, error))

    def _put(self, index: int, outcome: tuple[bool, Any]) -> None:
        self._put_all(index, [outcome])
        if self.progress is not None:
            self.progress.advance(1, not outcome[0] or isinstance(outcome[1], BaseException))

    def put_values(self, first: int, values: list[Any]) -> None:
        self._put_all(first, list(zip(repeat(True), values, strict=False)))
        if self.progress is not None:
            self.progress.advance(len(values), 0)

    def _put_all(self, first: int, outcomes: list[tuple[bool, Any]]) -> None:
        with self._mutex:
            if self.settled:
                return
            if self.ordered and first != self._put_out:
                self._early.update(enumerate(outcomes, first))
                return
            # In this order: seen in between, less has been taken than really was.
            self._out.extend(outcomes)
            self._put_out += len(outcomes)
            while self._early and (outcome := self._early.pop(self._put_out, None)) is not None:
                self._out.append(outcome)
                self._put_out += 1
        self._gate.open()

    @property
    def _taken(self) -> int:
        """How many results have been taken."""
        return self._put_out - len(self._out)

    def abandon(self, error: BaseException) -> None:
        with self._mutex:
            if self._exhausted and self._put_out + len(self._early) >= self._read:
                return  # all is there, and waits for its consumer
            self._abandoned = error
            self._buffer.clear()
        self._say_at = 0  # the feeder is to look
        self._gate.open()
        self._room.open()
        if self.progress is not None:
            self.progress.close()

    def close(self) -> None:
        """Give up the rest: what waits is dropped, what runs is interrupted, and who waits is told that this is the end."""
        with self._mutex:
            if self.settled:
                return
            self.settled = True
            self._buffer.clear()
            self._early.clear()
            self._out.clear()
        self._say_at = 0  # the feeder is to look
        self._gate.open()
        self._room.open()
        self.engine.drop(self)
        if self.progress is not None:
            self.progress.close()

    def next(self, timeout: float | None = None) -> Any:
        """Return the next result; see `IMapIterator.next`."""
        try:
            # One step, for an exception can come after any call.
            outcome = self._out.popleft()
        except IndexError:
            outcome = None  # and not to wait here, where an error would have this one as its context
        success, value = self._wait_for_one(timeout) if outcome is None else outcome
        if self._put_out - len(self._out) >= self._room_at:
            self._room.open()
        if self.waited_for:
            # Another consumer may have waited for this to be gone: the next one is there, or that was the last.
            self._gate.open()
        if success:
            return value
        raise value

    def _wait_for_one(self, timeout: float | None) -> tuple[bool, Any]:
        deadline = None if timeout is None else time.monotonic() + timeout
        self.waited_for += 1
        try:
            while True:
                if self.engine.inline and not self._exhausted:
                    self.engine.pull(self)
                with contextlib.suppress(IndexError):
                    return self._out.popleft()
                if self._abandoned is not None:
                    self.settled = True
                    raise self._abandoned
                if self.settled:
                    raise StopIteration
                if self._exhausted and self._taken >= self._read:
                    self._end()
                left = None if deadline is None else deadline - time.monotonic()
                if not self.engine.wait(self._gate, self._to_be_seen, left):
                    raise _TimeoutError(f"no result after {timeout:g} s")
        finally:
            self.waited_for -= 1

    def _to_be_seen(self) -> bool:
        """Tell whether a consumer that waits has something to do."""
        return (
            bool(self._out)
            or self.settled
            or self._abandoned is not None
            or (self._exhausted and self._taken >= self._read)
        )

    def _end(self) -> None:
        """The input is at its end and every result has been taken."""
        error = self._input_error
        self._input_error = None
        if not self.settled:
            self.settled = True
            self.engine.settled(self)
            if self.progress is not None:
                self.progress.close()
        if error is not None:
            raise error
        raise StopIteration
