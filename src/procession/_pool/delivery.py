"""Handing results to the jobs they belong to. The user's code runs here: unpickling, callbacks."""

from __future__ import annotations

import contextlib
import sys
import threading
import time

from procession._pool import messages as m
from procession._pool.insights import SLOW_NS
from procession._pool.worker import FLUSH_NS
from procession._proc.results import unpack_error
from procession._wire import codec

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from procession._pool.insights import Slowest
    from procession._pool.jobs import Job
    from procession._pool.member import Table
    from procession._pool.stall import Stall
    from procession._pool.state import Unit
    from procession._pool.stops import Stops

__all__ = ["Delivery", "guarded"]


def guarded(action: Callable[..., object], *args: Any) -> None:
    """Do what may raise anything, in a thread that must go on: it is said on stderr."""
    try:
        action(*args)
    except Exception as error:
        with contextlib.suppress(Exception):  # there may be no stderr
            sys.excepthook(type(error), error, error.__traceback__)


class Delivery:
    """Hands results to their jobs.

    Args:
        table: Who is there and who has what.
        stall: It is told that there are results.
        stops: It knows which errors are our doing.
        slowest: The tasks that took longest.
    """

    def __init__(self, table: Table, stall: Stall, stops: Stops, slowest: Slowest) -> None:
        self._lock, self._scheduler = table.lock, table.scheduler
        self._stall = stall
        self._stops = stops
        self._slowest = slowest

    def deliver(self, outcomes: list[tuple[Unit, tuple[Any, ...]]]) -> None:
        """Hand over what was answered: units, each with its message, in the order in which they came."""
        if not outcomes:
            return
        self._stall.answered()
        at, count = 0, len(outcomes)
        while at < count:
            unit, message = outcomes[at]
            job = unit.job
            if message[0] == m.VALUE:
                # The many small ones of one job, all at once.
                values = [(unit.first, message[3])]
                spent = longest = message[4]
                at += 1
                while at < count:
                    unit, message = outcomes[at]
                    if message[0] != m.VALUE or unit.job is not job:
                        break
                    values.append((unit.first, message[3]))
                    ns = message[4]
                    spent += ns
                    longest = max(longest, ns)
                    at += 1
                if longest >= SLOW_NS:
                    for unit, message in outcomes[at - len(values) : at]:
                        self._slowest.remember(message[4], unit)
                guarded(job.put_each, values)
            else:
                at += 1
                spent = message[4] if message[0] <= m.ERROR else message[6]
                values = [unit]  # type: ignore[list-item]
                if message[0] == m.VALUE_PICKLED:
                    guarded(self._deliver_pickled, unit, message)
                elif message[0] == m.ERROR:
                    guarded(self._failed, unit, message)
                else:
                    guarded(self._deliver_part, unit, message)
                    continue
                self._slowest.remember(spent, unit)
            seconds = spent * 1e-9
            job.function.observe(seconds / len(values))
            job.observe(len(values), seconds)

    @staticmethod
    def _deliver_pickled(unit: Unit, message: tuple[Any, ...]) -> None:
        unit.job.weigh(1, message[3])
        value, error = _loaded(unit.job, message[3])
        if error is None:
            unit.job.put_value(unit.first, value)
        else:
            unit.job.put_error(unit.first, error)

    def _failed(self, unit: Unit, message: tuple[Any, ...]) -> None:
        error = self._error(message[1], message[2], message[3])
        for index in range(unit.offset, unit.count):
            unit.job.put_error(unit.first + index, error)

    def _error(self, wid: int, seq: int, packed: tuple[Any, ...]) -> BaseException:
        return self._stops.error(wid, seq, packed) or unpack_error(packed)

    def _deliver_part(self, unit: Unit, message: tuple[Any, ...]) -> None:
        _, wid, seq, start, data, errors, spent, stop = message
        job = unit.job
        if stop < unit.count:
            with self._lock:
                self._scheduler.progressed(seq, stop, time.monotonic())
            unit.offset = stop  # also where the unit's end is in the same batch
        job.weigh(stop - start, data)
        values, error = _loaded(job, data, codec.decode_items)
        if error is not None:
            self._load_each(unit, message, error)
            return
        if values:
            job.observe(len(values), spent * 1e-9)
            # Only its last item can have been long: a part ends when it has taken that much.
            longest = spent if len(values) == 1 else spent - FLUSH_NS
            if longest >= SLOW_NS:
                at = start + len(values) - 1
                self._slowest.remember(longest, unit.part(at, at + 1))
        if errors is None:
            job.put_values(unit.first + start, values)
            return
        for index, value in enumerate(values, start):
            packed = errors.get(index)
            if packed is None:
                job.put_value(unit.first + index, value)
            else:
                job.put_error(unit.first + index, self._error(wid, seq, packed))

    def _load_each(self, unit: Unit, message: tuple[Any, ...], error: BaseException) -> None:
        """One of a part's results cannot be unpickled here: have its items done one by one, to know which."""
        _, wid, seq, start, _, errors, _, stop = message
        job = unit.job
        known = errors or {}
        for index in range(start, stop):
            if index in known:
                job.put_error(unit.first + index, self._error(wid, seq, known[index]))
            elif stop - start == 1:
                job.put_error(unit.first + index, error)
        if stop - start > 1 and not job.settled:
            with self._lock:
                self._scheduler.give_back([unit.part(at, at + 1) for at in range(start, stop) if at not in known])


def _loaded(job: Job, data: Any, loads: Callable[[Any], Any] = codec.loads) -> tuple[Any, BaseException | None]:
    """Unpickle a result; return it, or an error that says what came and why it is not to be had."""
    try:
        return loads(data), None
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) and threading.current_thread() is threading.main_thread():
            raise
        text = f"the result of {job.function.name}() could not be unpickled here: {error}"
        failure = job.unpickling_error(type(error).__qualname__, text)
        failure.__cause__ = error
        return None, failure
