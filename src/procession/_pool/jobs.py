"""What was asked of a pool, and whether it takes more.

A job is both ends of a call: the *source* from which the scheduler takes units (`next_unit`), and the *result* the caller
holds. Values come in by `put_value`, `put_values` and `put_error`, always from one thread at a time, that which
collects; a job that is settled ignores what comes late.
"""

from __future__ import annotations

import math
import os
import weakref
from collections import deque

from procession._errors import RemoteError
from procession._pool.errors import TaskCancelledError
from procession._wire.payload import Payload

TYPE_CHECKING = False
if TYPE_CHECKING:
    import threading
    from typing import Any

    from procession._pool.errors import PoolBrokenError
    from procession._pool.functions import Function
    from procession._pool.state import Unit
    from procession._pool.stream import Stream

__all__ = ["CLOSE", "RUN", "TERMINATE", "Job", "Jobs"]

RUN, CLOSE, TERMINATE = "RUN", "CLOSE", "TERMINATE"

# A chunk is made to take about this long: long against what a message costs (a few us), short against what a death costs.
CHUNK_S = 0.0015
# And not less than this, also at the end of a mapping, when the chunks get smaller: as long as it takes to send and answer one.
LEAST_S = 0.00005
# Nor made of more than this in arrays and the like: a message is in memory as a whole.
CHUNK_BYTES = 16 << 20
MOST_ITEMS = 1 << 16


class Job:
    """What single calls, mappings and streams have in common.

    Attributes:
        function: What is called.
        priority: Higher goes first.
        in_order: Long units are not given out in advance, so that each is begun in its turn.
        timeout: Seconds each item may take; None for no limit.
        retries: How many more workers may die of an item.
        unit_seconds: How long its units take, a moving average; None before the first answer.
        item_bytes: How much shared memory an item takes, or its result if that is more; a moving maximum, 0 below 64 KiB.
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
    item_bytes = 0.0
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

    def weigh(self, items: int, data: Any) -> None:
        """Take in what `items` items, or their results, were packed as; or how many bytes they take beside the message."""
        nbytes = data.nbytes if type(data) is Payload else data if type(data) is int else 0
        if nbytes:
            self.item_bytes = max(nbytes / items, 0.9 * self.item_bytes)

    @property
    def unit_bytes(self) -> float:
        """How much shared memory a unit takes, about."""
        each = self.item_seconds
        items = (self.unit_seconds or each) / each if each else 1.0
        return self.item_bytes * max(1.0, items)

    def chunk(self, remaining: int, workers: int) -> int:
        """Choose the size of the next chunk when `remaining` items are left."""
        each = self.item_seconds
        if each is None or self.timeout is not None:
            return 1
        wanted = MOST_ITEMS if each * MOST_ITEMS < CHUNK_S else int(CHUNK_S / each)
        if self.item_bytes:
            wanted = min(wanted, max(1, int(CHUNK_BYTES / self.item_bytes)))
        least = min(remaining, wanted, MOST_ITEMS if each * MOST_ITEMS < LEAST_S else int(LEAST_S / each))
        return int(max(1, min(wanted, max(least, math.ceil(remaining / (2 * workers))), self.engine.most_items)))

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


class Jobs:
    """The jobs that have no result yet, and whether there may be more.

    Args:
        lock: Held while a job is added, so that one which is added is ended as the others are.

    Attributes:
        state: RUN; CLOSE, no more are taken; or TERMINATE.
        broken: Why the pool has given up.
        forked: This process is a fork of the pool's owner.
        open: The jobs without a result.
        streams: Those of them whose input has not been read to its end.
        shown: Displays of their progress.
    """

    def __init__(self, lock: threading.Lock) -> None:
        self.state = RUN
        self.broken: BaseException | None = None
        self.forked = False
        self.open: set[Job] = set()
        self.streams: set[Stream] = set()
        self.shown: set[Any] = set()
        self._forsaken: deque[Stream] = deque()
        self._lock = lock
        _all.add(self)

    def check(self) -> None:
        """Raise what stands in the way of a new job.

        Raises:
            ValueError: The pool is closed or terminated.
            PoolBrokenError: It has given up.
            RuntimeError: This process is a fork of the pool's owner.
        """
        if self.forked:
            raise RuntimeError(
                "this pool was made before this process was forked, and belongs to the parent. "
                "Make a pool of its own in the child."
            )
        if self.broken is not None:
            raise self.broken.with_traceback(None)
        if self.state != RUN:
            raise ValueError("Pool not running")

    @property
    def ended(self) -> bool:
        """None of them will be done any more."""
        return self.state == TERMINATE or self.broken is not None

    def give_up(self, error: PoolBrokenError) -> None:
        """Every job gets `error`, and so does whoever asks for another."""
        self.broken = error
        self.abandon_all(error)

    def abandon_all(self, error: BaseException) -> None:
        """End all of them, with the error with which the pool has given up, if it has."""
        with self._lock:
            jobs = list(self.open)
        for job in jobs:
            job.abandon(self.broken or error)
        self.open.clear()
        self.streams.clear()

    def discard(self, job: Job) -> None:
        """Forget a job."""
        self.open.discard(job)
        self.streams.discard(job)

    def release_streams(self, all_of_them: bool) -> None:
        """Nobody will consume while the pool is joined: let streams run to their end, or end those that may have none."""
        with self._lock:
            streams = list(self.streams)
        for stream in streams:
            if stream.sized or all_of_them:
                stream.unlimited = True
                stream.make_room()
            else:
                stream.abandon(TaskCancelledError("the pool was left before all of the stream was consumed"))

    def forsake(self, stream: Stream) -> None:
        """The iterator over a stream is gone. May be called at any place: takes no lock."""
        self._forsaken.append(stream)

    def tick(self, now: float) -> float:
        """Close streams that are forsaken, have what others held back given out, show progress; return when next, in seconds."""
        while self._forsaken:
            self._forsaken.popleft().close()
        wait = math.inf
        for stream in list(self.streams):
            if stream.iterator is not None and stream.iterator() is None:
                stream.close()  # broken off before it could be given to anybody, or as it said good-bye
            wait = min(wait, stream.held_until(now))
        for shown in list(self.shown):
            wait = min(wait, shown.tick(now))
            if shown.closed:
                self.shown.discard(shown)
        return wait


_all: weakref.WeakSet[Jobs] = weakref.WeakSet()


def _after_fork() -> None:
    for jobs in list(_all):
        jobs.forked = True


os.register_at_fork(after_in_child=_after_fork)
