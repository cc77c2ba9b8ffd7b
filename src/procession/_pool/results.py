"""Jobs: what was asked of a pool, what has come back of it, and who waits for it.

A job is both ends of a call: the *source* from which the scheduler takes units (`next_unit`), and the *result* the caller
holds. Values come in by `put_value`, `put_values` and `put_error`, always from one thread at a time, that which
collects; a job that is settled ignores what comes late.
"""

from __future__ import annotations

import contextlib
import math
import os
import reprlib
import sys
import threading
import time
import weakref
from collections import deque
from functools import partial
from itertools import repeat
from multiprocessing import TimeoutError as _TimeoutError
from multiprocessing import pool as _std

from procession._errors import RemoteError
from procession._pool import messages as m
from procession._pool.errors import TaskCancelledError
from procession._pool.gate import Gate
from procession._pool.state import Unit
from procession._wire import codec

TYPE_CHECKING = False
if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Generator, Iterator, Sequence
    from typing import Any

    from procession._pool.functions import Function

__all__ = ["AsyncResult", "IMapIterator", "IMapUnorderedIterator", "Job", "MapResult", "Stream", "describe_call"]

# A chunk is made to take about this long: long against what a message costs (a few us), short against what a death costs.
CHUNK_S = 0.0015
MOST_ITEMS = 1 << 16
# How far a stream runs ahead of its consumer, in units of work for each worker.
STREAM_AHEAD_S = 0.02
# Items of a stream are not held back for longer than this to make a larger unit.
HOLD_S = 0.001
MOST_BUFFERED = 4096

_shown = reprlib.Repr()
_shown.maxstring = _shown.maxother = 60


def describe_call(name: str, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> str:
    """Return ``name(arguments)``, shortened; whatever the arguments' repr does."""
    parts = []
    for prefix, value in [("", a) for a in args] + [(f"{k}=", v) for k, v in (kwargs or {}).items()]:
        try:
            text = _shown.repr(value)
        except Exception:
            text = f"<{type(value).__name__}>"
        parts.append(prefix + text)
    return f"{name}({', '.join(parts)})"


class Job:
    """What single calls, mappings and streams have in common.

    Attributes:
        function: What is called.
        priority: Higher goes first.
        in_order: Long units are not given out in advance, so that each is begun in its turn.
        timeout: Seconds each item may take; None for no limit.
        retries: How many more workers may die of an item.
        unit_seconds: How long its units take, a moving average; None before the first answer.
        owner: The pool, which is not collected as garbage while it has something to do.
        settled: It has its result; what comes now is ignored.
        unpickling_error: What is raised when a result cannot be unpickled here.
    """

    unpickling_error: type[RemoteError] = RemoteError

    function: Function
    priority = 0
    timeout: float | None = None
    retries = 0
    seed: int | None = None
    unit_seconds: float | None = None
    item_seconds: float | None = None
    settled = False
    engine: Any = None
    return_errors = False
    progress: Any = None
    waited_for = 0
    in_order = False
    owner: Any = None

    def next_unit(self, workers: int) -> Unit | None:
        """Return the next unit to be done, None if there is none now."""
        raise NotImplementedError

    def next_units(self, most: int, workers: int) -> list[Unit]:
        """Return the next units to be done, up to `most` of them; none if there are none now."""
        units: list[Unit] = []
        while len(units) < most:
            unit = self.next_unit(workers)
            if unit is None:
                break
            units.append(unit)
        return units

    def observe(self, items: int, seconds: float) -> None:
        """Take in that `items` took `seconds`."""
        each = seconds / items
        before = self.item_seconds
        self.item_seconds = each if before is None else 0.7 * before + 0.3 * each
        self.unit_seconds = (
            self.item_seconds * items if before is None else 0.7 * (self.unit_seconds or 0) + 0.3 * seconds
        )

    def chunk(self, remaining: int, workers: int) -> int:
        """Choose the size of the next chunk when `remaining` items are left."""
        each = self.item_seconds
        if each is None or self.timeout is not None:
            return 1
        wanted = MOST_ITEMS if each * MOST_ITEMS < CHUNK_S else int(CHUNK_S / each)
        return int(max(1, min(wanted, math.ceil(remaining / (2 * workers)), self.engine.most_items)))

    def call_text(self, unit: Unit) -> str:
        """Describe the call that a unit of one item is."""
        return self.function.describe(unit.items if unit.single else unit.items[0])

    def put_value(self, index: int, value: Any) -> None:
        """Item `index` returned `value`."""
        raise NotImplementedError

    def put_values(self, first: int, values: list[Any]) -> None:
        """The items from `first` on returned `values`."""
        for i, value in enumerate(values):
            self.put_value(first + i, value)

    def put_each(self, outcomes: list[tuple[int, Any]]) -> None:
        """The items of these indices returned these values."""
        for index, value in outcomes:
            self.put_value(index, value)

    def put_error(self, index: int, error: BaseException) -> None:
        """Item `index` failed."""
        raise NotImplementedError

    def refused(self, error: BaseException) -> BaseException:
        """Return what is said when a worker could not unpickle an item, but got `error`."""
        return error

    def abandon(self, error: BaseException) -> None:
        """Nothing more will come: whoever waits gets `error`."""
        raise NotImplementedError


class _Settling(Job):
    """A job with one result, at one moment."""

    def __init__(
        self,
        callback: Callable[[Any], object] | None = None,
        error_callback: Callable[[BaseException], object] | None = None,
    ) -> None:
        self._callback = callback
        self._error_callback = error_callback
        self._value: Any = None
        self._success = True
        self._ready = False
        self._gate = Gate()
        self._listeners: list[Callable[[], object]] | None = None

    # -- for the caller

    def ready(self) -> bool:
        """Tell whether there is a result or an error."""
        return self._ready

    def successful(self) -> bool:
        """Tell whether it ended without an error.

        Raises:
            ValueError: It has not ended.
        """
        if not self._ready:
            raise ValueError(f"{self!r} not ready")
        return self._success

    def wait(self, timeout: float | None = None) -> None:
        """Wait for the result, up to `timeout` seconds."""
        if self._ready:
            return
        self.waited_for += 1
        try:
            self.engine.wait(self._gate, self.ready, timeout)
        finally:
            self.waited_for -= 1

    def get(self, timeout: float | None = None) -> Any:
        """Wait for the result and return it.

        Raises:
            multiprocessing.TimeoutError: `timeout` seconds have passed; the task goes on.
            WorkerDiedError: A worker died of it.
            TaskTimeoutError: It took longer than its own `timeout`.
            TaskCancelledError: It was cancelled, or the pool terminated.
            BaseException: What the function raised, with the worker's traceback as its cause.
        """
        if not self._ready:
            self.wait(timeout)
            if not self._ready:
                raise _TimeoutError(f"no result after {timeout:g} s" if timeout is not None else "no result")
        if self._success:
            return self._value
        raise self._value

    def cancel(self) -> bool:
        """Cancel what is not done: what waits is dropped, what runs is interrupted (SIGINT, SIGTERM, SIGKILL).

        Returns:
            False if there is a result already.
        """
        return bool(self.engine.cancel(self))

    def cancelled(self) -> bool:
        """Tell whether it was cancelled."""
        return self._ready and isinstance(self._value, TaskCancelledError)

    def __await__(self) -> Generator[Any, None, Any]:
        """Await the result; cancelling the await cancels the task."""
        if not self._ready:
            import asyncio  # late: it costs as much as all of the pool, and few programs have it

            loop = asyncio.get_running_loop()
            future: asyncio.Future[None] = loop.create_future()

            def tell() -> None:
                with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
                    loop.call_soon_threadsafe(_wake, future)

            self.add_listener(tell)
            self.waited_for += 1
            try:
                yield from future
            except asyncio.CancelledError:
                self.cancel()
                raise
            finally:
                self.waited_for -= 1
        return self.get()

    def add_listener(self, listener: Callable[[], object]) -> None:
        """Have `listener` called once there is a result; at once if there is one."""
        with _event_lock:
            if not self._ready:
                if self._listeners is None:
                    self._listeners = []
                self._listeners.append(listener)
                return
        listener()

    # -- for the engine

    def _settle(self, success: bool, value: Any) -> None:
        with _event_lock:
            if self.settled:
                return
            self.settled = True
        self.engine.settled(self)
        self._success = success
        self._value = value
        callback: Any = self._callback if success else self._error_callback
        self._callback = self._error_callback = None
        try:
            if callback is not None:
                with self.engine.calling_back():
                    _call_back(callback, value)
        finally:
            with _event_lock:
                self._ready = True
                listeners = self._listeners
                self._listeners = None
            self.owner = None
            self._gate.open()
            if listeners:
                with self.engine.calling_back():
                    for listener in listeners:
                        listener()

    def abandon(self, error: BaseException) -> None:
        self._settle(False, error)


_event_lock = threading.Lock()


def _after_fork() -> None:
    # Whoever held it is not here.
    global _event_lock
    _event_lock = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)


def _call_back(callback: Callable[[Any], object], value: Any) -> None:
    """Call it; what it raises is printed, since its caller is the thread that collects, which must go on."""
    try:
        callback(value)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) and threading.current_thread() is threading.main_thread():
            raise
        with contextlib.suppress(Exception):  # there may be no stderr
            sys.stderr.write(f"procession: the callback {callback!r} raised:\n")
            sys.excepthook(type(error), error, error.__traceback__)


class AsyncResult(_Settling, _std.ApplyResult):  # type: ignore[type-arg]
    """The result of one call; what `Pool.apply_async` returns."""

    def __init__(self, function: Function, item: Any, data: bytes | None, **options: Any) -> None:
        _Settling.__init__(self, options.pop("callback", None), options.pop("error_callback", None))
        self.function = function
        self._unit: Unit | None = Unit(self, options.pop("index", 0), item, 1, True, data)
        self.__dict__.update(options)

    def next_unit(self, workers: int) -> Unit | None:  # noqa: ARG002
        unit = self._unit
        self._unit = None
        return unit

    @property
    def begun(self) -> bool:
        """It has been given out."""
        return self._unit is None

    def observe(self, items: int, seconds: float) -> None:
        """The function remembers, for the calls to come."""

    def snapshot(self) -> None:
        """Pickle the arguments now, unless their copy cannot differ: what the caller changes later is not seen."""
        unit = self._unit
        if unit is not None and not m.is_plain(unit.items):
            with contextlib.suppress(Exception):  # said when it is sent, where the result can hear it
                unit.data = codec.encode(unit.items, main_by_value=self.function.main_by_value)

    @property
    def unit_seconds(self) -> float | None:
        return self.function.seconds

    def put_value(self, index: int, value: Any) -> None:  # noqa: ARG002
        self._settle(True, value)

    def put_error(self, index: int, error: BaseException) -> None:  # noqa: ARG002
        if self.return_errors:
            self._settle(True, error)
        else:
            self._settle(False, error)


class MapResult(_Settling, _std.MapResult):  # type: ignore[type-arg]
    """The results of a mapping, in the order of its items; what `Pool.map_async` returns."""

    def __init__(self, function: Function, items: Sequence[Any], chunksize: int | None, **options: Any) -> None:
        order: list[int] | None = options.pop("order", None)
        _Settling.__init__(self, options.pop("callback", None), options.pop("error_callback", None))
        self.__dict__.update(options)
        self.function = function
        self._items: Sequence[Any] | None = items
        self._count = len(items)
        self._left = self._count
        self._values: list[Any] = [None] * self._count
        self._cursor = 0
        self._chunksize = chunksize
        self._order = order
        self.in_order = order is not None or self.priority != 0
        # Of several errors the one of the first item is raised, whichever came first.
        self._failed_at = self._count
        self._first_error: BaseException | None = None

    def start(self) -> None:
        """Settle it if there is nothing to do."""
        if self._left == 0:
            self._items = None
            if self.progress is not None:
                self.progress.close()
            self._settle(True, [])

    def next_unit(self, workers: int) -> Unit | None:
        items = self._items
        at = self._cursor
        if items is None or at >= self._count:
            self._items = None
            return None
        if self._order is not None:
            self._cursor = at + 1
            index = self._order[at]
            return Unit(self, index, items[index], 1, True)
        size = self._chunksize or self.chunk(self._count - at, workers)
        self._cursor = at + size
        if size == 1:
            return Unit(self, at, items[at], 1, True)
        part = items[at : at + size]
        return Unit(self, at, part, len(part), False)

    def next_units(self, most: int, workers: int) -> list[Unit]:
        items = self._items
        if self._chunksize != 1 or self._order is not None or items is None:
            return super().next_units(most, workers)
        start = self._cursor
        self._cursor = stop = min(start + most, self._count)
        return [Unit(self, i, items[i], 1, True) for i in range(start, stop)]

    def put_each(self, outcomes: list[tuple[int, Any]]) -> None:
        if self.settled:
            return
        values = self._values
        for index, value in outcomes:
            values[index] = value
        self._left -= len(outcomes)
        if self.progress is not None:
            self.progress.advance(len(outcomes), 0)
        if self._left == 0:
            self._finish()

    def put_value(self, index: int, value: Any) -> None:
        if self.settled:
            return
        self._values[index] = value
        self._left -= 1
        if self.progress is not None:
            self.progress.advance(1, 0)
        if self._left == 0:
            self._finish()

    def put_values(self, first: int, values: list[Any]) -> None:
        if self.settled:
            return
        self._values[first : first + len(values)] = values
        self._left -= len(values)
        if self.progress is not None:
            self.progress.advance(len(values), 0)
        if self._left == 0:
            self._finish()

    def put_error(self, index: int, error: BaseException) -> None:
        if self.settled:
            return
        if self.return_errors:
            self._values[index] = error
        elif index < self._failed_at:
            self._failed_at, self._first_error = index, error
        self._left -= 1
        if self.progress is not None:
            self.progress.advance(1, 1)
        if self._left == 0:
            self._finish()

    def _finish(self) -> None:
        if self.progress is not None:
            self.progress.close()
        self._items = None
        if self._first_error is not None:
            self._values = []
            self._settle(False, self._first_error)
        else:
            values, self._values = self._values, []
            self._settle(True, values)

    def abandon(self, error: BaseException) -> None:
        self._items = None
        if self.progress is not None:
            self.progress.close()
        super().abandon(error)

    @property
    def remaining(self) -> int:
        """How many items have no result yet."""
        return self._left


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
        return max(least, min(int(workers * STREAM_AHEAD_S / each) if each > 1e-7 else MOST_BUFFERED, MOST_BUFFERED))

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


class IMapIterator(_std.IMapIterator):  # type: ignore[type-arg]
    """Gives out the results of a stream; what `Pool.imap` returns. Dropping it cancels what it has not given out."""

    def __init__(self, stream: Stream, owner: Any) -> None:
        self._stream = stream
        self._owner = owner
        stream.iterator = weakref.ref(self)

    def __iter__(self) -> IMapIterator:
        return self

    def __next__(self) -> Any:
        stream = self._stream
        # The frame may live on in a traceback, as that of a notebook's last error, and would keep the iterator.
        del self
        return stream.next()

    def next(self, timeout: float | None = None) -> Any:
        """Return the next result.

        Raises:
            StopIteration: That was all.
            multiprocessing.TimeoutError: None came within `timeout` seconds.
            BaseException: What the function, or the input, raised; the next call goes on with the next item.
        """
        stream = self._stream
        del self  # as in __next__
        return stream.next(timeout)

    def close(self) -> None:
        """Give up the rest: what waits is dropped, what runs is interrupted."""
        self._stream.close()

    def __aiter__(self) -> IMapIterator:
        return self

    async def __anext__(self) -> Any:
        import asyncio

        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(None, self._next_or_end)
        except _EndError:
            raise StopAsyncIteration from None

    def _next_or_end(self) -> Any:
        try:
            return self._stream.next()
        except StopIteration:
            raise _EndError from None

    def __del__(self) -> None:
        stream = self.__dict__.get("_stream")
        if stream is not None and not stream.settled:
            stream.engine.forsake(stream)


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


class _EndError(Exception):
    """StopIteration, which cannot be raised into a future."""


class IMapUnorderedIterator(IMapIterator):
    """Gives out the results of a stream as they come; what `Pool.imap_unordered` returns."""
