"""What callers hold: the results of single calls and of mappings."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from multiprocessing import TimeoutError as _TimeoutError
from multiprocessing import pool as _std

from procession._pool import messages as m
from procession._pool.errors import TaskCancelledError
from procession._pool.gate import Gate
from procession._pool.jobs import Job
from procession._pool.state import Unit
from procession._wire import codec

TYPE_CHECKING = False
if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Generator, Sequence
    from typing import Any

    from procession._pool.functions import Function

__all__ = ["AsyncResult", "MapResult"]


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


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


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
                by_value = self.function.main_by_value
                unit.data = codec.encode_beside(unit.items, main_by_value=by_value, lasting=True)

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
