"""Which worker holds which unit of work: the pool's decisions, without a clock, I/O or a thread; time is an argument.

A *source* is a job that still has work to give out: one call, a mapping, a stream. A *unit* is what one message carries: one
item or a chunk of them. The scheduler gives units to workers, a few ahead when they are short, so that none waits for the
parent; and it always knows who holds what, so that a death costs the unit in hand and nothing else.

Invariants (tests/property/test_pool_state.py drives them with any order of events):

- a unit that was given out is with exactly one worker, or returned, until it is answered, lost or withdrawn;
- no worker is idle while a source has a unit, or a unit is returned;
- a unit is answered at most once: a late or double answer finds nothing.
"""

from __future__ import annotations

import heapq
from collections import deque

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Protocol

    class Source(Protocol):
        """A job with work to give out."""

        priority: int
        settled: bool
        unit_seconds: float | None
        in_order: bool

        @property
        def unit_bytes(self) -> float:
            """How much shared memory a unit takes."""

        def next_units(self, most: int, workers: int) -> list[Unit]:
            """Return the next units, `most` of them or fewer; none if there are none now."""


__all__ = ["Loss", "Scheduler", "Unit", "Worker"]

# A worker is given units for about this long in advance. Long against a wake-up, so that it never waits for the parent: 10 to 50
# us, but a slice of the kernel's scheduler, 3 ms, when all cores are at work. Short, since what it holds another cannot take
# without being asked.
AHEAD_S = 0.02
MOST_AHEAD = 256
# And no more than about this in arrays and the like: all of it is in shared memory at once.
AHEAD_BYTES = 32 << 20
# A unit of this length is not given in advance: another worker may be free for it sooner, and what a wake-up costs is nothing.
LONG_S = 0.1


class Unit:
    """What one message to a worker carries.

    Attributes:
        job: The source it came from.
        first: Index of its first item in the job.
        items: The items, a list; or, if `single`, the item itself.
        count: How many.
        offset: How many of them have been answered.
        seq: Its number while a worker has it.
        worker: That worker.
        deaths: How many workers have died of it.
        data: The item in its pickled form, where that exists already.
    """

    __slots__ = ("count", "data", "deaths", "first", "items", "job", "offset", "seq", "single", "worker")

    def __init__(self, job: Any, first: int, items: Any, count: int, single: bool, data: Any = None) -> None:
        self.job = job
        self.first = first
        self.items = items
        self.count = count
        self.single = single
        self.data = data
        self.offset = 0
        self.seq = 0
        self.worker: Worker | None = None
        self.deaths = 0

    def part(self, start: int, stop: int) -> Unit:
        """Return a new unit of the items from `start` to `stop`."""
        if self.single:
            return self
        items = self.items[start:stop]
        unit = Unit(self.job, self.first + start, items, stop - start, False)
        unit.deaths = self.deaths
        unit.seq = self.seq  # what it was called when it was lost
        return unit

    def call_text(self) -> str:
        """Describe the call that a unit of one item is."""
        try:
            return str(self.job.call_text(self))
        except Exception:
            return f"{self.job.function.name}(...)"


class Worker:
    """A worker as the scheduler sees it.

    Attributes:
        wid: Its number.
        units: What it has been given and has not answered, oldest first; it works on the first.
        since: When it began with the first.
        accepting: False once it is to take nothing more.
        items, busy_ns: How many items it has done, and for how long it was at them.
    """

    __slots__ = ("accepting", "busy_ns", "items", "since", "units", "wid")

    def __init__(self, wid: int) -> None:
        self.wid = wid
        self.units: deque[Unit] = deque()
        self.since = 0.0
        self.accepting = True
        self.items = 0
        self.busy_ns = 0


class Loss:
    """What became of the units of a worker that died.

    Attributes:
        unit: The item that died with it, as a unit of one; None if it had nothing in hand, or it is not known which.
        returned: Number of units that others take over.
        in_hand: It had something in hand.
    """

    __slots__ = ("in_hand", "returned", "unit")

    def __init__(self, unit: Unit | None, returned: int, in_hand: bool) -> None:
        self.unit = unit
        self.returned = returned
        self.in_hand = in_hand


class Scheduler:
    """Gives units to workers and knows who has which."""

    def __init__(self) -> None:
        self.workers: dict[int, Worker] = {}
        self.inflight: dict[int, Unit] = {}
        self._returned: deque[Unit] = deque()
        self._sources: list[tuple[int, int, Any]] = []
        self._listed: set[int] = set()
        self._order = 0
        self._seq = 0
        # Workers there will be; some may not have come yet.
        self.expected = 1

    # -- what there is to do

    def add_source(self, source: Source) -> None:
        """Have `source` asked for units, after those of its priority that were added before; again is harmless."""
        if id(source) not in self._listed:
            self._listed.add(id(source))
            self._order += 1
            heapq.heappush(self._sources, (-source.priority, self._order, source))

    def give_back(self, units: list[Unit]) -> None:
        """Put units before everything else of their priority, in their order; but those that nobody wants any more."""
        self._returned.extendleft(unit for unit in reversed(units) if not unit.job.settled)
        if len({unit.job.priority for unit in self._returned}) > 1:
            self._returned = deque(sorted(self._returned, key=_urgency))

    def withdraw(self, job: Any) -> list[Unit]:
        """Forget what `job` has not given out; return its units that workers have."""
        if id(job) in self._listed:
            self._listed.discard(id(job))
            self._sources = [entry for entry in self._sources if entry[2] is not job]
            heapq.heapify(self._sources)
        if self._returned:
            self._returned = deque(unit for unit in self._returned if unit.job is not job)
        return [unit for unit in self.inflight.values() if unit.job is job]

    @property
    def idle(self) -> bool:
        """Nothing is with a worker and nothing waits."""
        return not self.inflight and not self._returned and not self._sources

    @property
    def waiting(self) -> bool:
        """There is something to give out."""
        return bool(self._returned or self._sources)

    # -- giving it out

    def plan(self, now: float) -> list[tuple[Worker, list[Unit]]]:
        """Give units to the workers that have room; return who got which."""
        given: dict[int, tuple[Worker, list[Unit]]] = {}
        ready = [worker for worker in self.workers.values() if worker.accepting]
        while ready:
            job = self._upcoming()
            if job is None:
                break
            depth = self._depth(job)
            worker = min(ready, key=_load)
            held = len(worker.units)
            # Filled up when half empty: one wake-up for many units.
            if held > (depth // 2 if worker.wid not in given else depth - 1):
                break
            # In portions: evenly spread when there is little, and cheap when there is much.
            units = self._next(min(depth - held, max(1, depth // 4)))
            if not units:
                continue
            if not held:
                worker.since = now
            self._assign(worker, units)
            if worker.wid in given:
                given[worker.wid][1].extend(units)
            else:
                given[worker.wid] = (worker, units)
        return list(given.values())

    def _upcoming(self) -> Any:
        """Return the job of the next unit; None when there is none, or none now."""
        if self._returned_first():
            return self._returned[0].job
        return self._sources[0][2] if self._sources else None

    def _returned_first(self) -> bool:
        """The next unit is a returned one: no source is more urgent."""
        if not self._returned:
            return False
        return not self._sources or self._returned[0].job.priority >= self._sources[0][2].priority

    def _next(self, most: int) -> list[Unit]:
        """Take up to `most` units of one job; a source that has none now is forgotten until it is added again."""
        if self._returned_first():
            return [self._returned.popleft()]
        source = self._sources[0][2]
        units: list[Unit] = source.next_units(most, max(len(self.workers), self.expected))
        if not units:
            heapq.heappop(self._sources)
            self._listed.discard(id(source))
        return units

    @staticmethod
    def _depth(job: Any) -> int:
        seconds = job.unit_seconds
        if seconds is None or seconds >= LONG_S:
            return 1
        depth = MOST_AHEAD if seconds * MOST_AHEAD < AHEAD_S else int(AHEAD_S / seconds)
        if depth > 2 and (nbytes := job.unit_bytes):
            depth = min(depth, int(AHEAD_BYTES / nbytes))
        # Two, so that the worker has the next when it is done with one; but not where the order matters more.
        return max(1 if job.in_order else 2, depth)

    def _assign(self, worker: Worker, units: list[Unit]) -> None:
        seq = self._seq
        inflight = self.inflight
        for unit in units:
            seq += 1
            unit.seq = seq
            unit.worker = worker
            inflight[seq] = unit
        self._seq = seq
        worker.units.extend(units)

    def assign_now(self, worker: Worker, unit: Unit, now: float) -> None:
        """Give a unit that came from no source to `worker`, which is idle."""
        # The main thread is here, and may be broken off after any call: the only one is the last.
        self._seq = seq = self._seq + 1
        unit.seq = seq
        unit.worker = worker
        worker.since = now
        self.inflight[seq] = unit
        worker.units.append(unit)

    # -- what comes back

    def answered(self, seq: int, now: float, ns: int = 0) -> Unit | None:
        """A worker has answered all of a unit, after `ns` nanoseconds; return it, None if it is not known (any more)."""
        unit = self.inflight.get(seq)
        if unit is None:
            return None
        # Broken off anywhere, as the main thread may be, this can be done again.
        worker = unit.worker
        if worker is not None:
            units = worker.units
            if units and units[0] is unit:
                del units[0]
            elif unit in units:
                units.remove(unit)
            worker.since = now
            worker.items += 1
            worker.busy_ns += ns
            unit.worker = None
        del self.inflight[seq]
        return unit

    def progressed(self, seq: int, offset: int, now: float) -> Unit | None:
        """A worker has answered the first `offset` items of a unit; return it, None if it is not known (any more)."""
        unit = self.inflight.get(seq)
        if unit is not None and unit.worker is not None:
            unit.offset = offset
            unit.worker.since = now
        return unit

    def take_back(self, seqs: list[int]) -> list[Unit]:
        """Take units that were found undelivered from their workers; return those that are still known."""
        units = []
        for seq in seqs:
            unit = self.inflight.pop(seq, None)
            if unit is not None and unit.worker is not None:
                unit.worker.units.remove(unit)
                unit.worker = None
                units.append(unit)
        return units

    def split(self, unit: Unit, index: int) -> Unit:
        """A worker died at item `index` of `unit`: give back the others, and return that item alone.

        Items before it that were done but not answered are done again: their results died with the worker.
        """
        if unit.single or unit.count == 1:
            return unit
        index = min(max(index, unit.offset), unit.count - 1)
        parts = [unit.part(start, stop) for start, stop in ((unit.offset, index), (index + 1, unit.count))]
        self.give_back([part for part in parts if part.count])
        return unit.part(index, index + 1)

    # -- workers

    def add_worker(self, wid: int) -> Worker:
        """A worker that can be given units."""
        worker = self.workers[wid] = Worker(wid)
        return worker

    def worker_left(self, wid: int, undelivered: list[int], running: tuple[int, int | None] | None) -> Loss:
        """A worker has ended, well or not.

        Args:
            wid: Its number.
            undelivered: Numbers of the units it had been given and never took.
            running: Number of the unit it last took and the index of the item it was at, if it said so; None for the index
                if it was at none, but unpickled the unit or pickled its results. Then each item is tried on its own.
        """
        back = self.take_back(undelivered)
        worker = self.workers.pop(wid)
        in_hand = list(worker.units)
        for unit in in_hand:
            self.inflight.pop(unit.seq, None)
            unit.worker = None
        worker.units.clear()
        # It takes one after the other and answers each before the next: more than one in hand cannot be. Should it be so
        # all the same, nobody has begun the later ones.
        returned = in_hand[1:] + back
        self.give_back(returned)
        if not in_hand:
            return Loss(None, len(returned), False)
        unit = in_hand[0]
        index: int | None = unit.offset
        if running is not None and running[0] == unit.seq:
            index = running[1]
        if index is None and unit.count - unit.offset > 1:
            parts = [unit.part(at, at + 1) for at in range(unit.offset, unit.count)]
            self.give_back(parts)
            return Loss(None, len(returned) + len(parts), True)
        return Loss(self.split(unit, unit.offset if index is None else index), len(returned), True)

    def stalled(self, now: float, patience: float) -> Worker | None:
        """Return a worker that holds units which an idle worker could take, if it is `patience` seconds at its first."""
        if self.waiting or not any(worker.accepting and not worker.units for worker in self.workers.values()):
            return None
        held = [worker for worker in self.workers.values() if len(worker.units) > 1 and now - worker.since >= patience]
        return max(held, key=_load, default=None)

    @property
    def short_of_workers(self) -> bool:
        """There is work that one more worker could begin with."""
        return self.waiting or any(len(worker.units) > 1 for worker in self.workers.values())

    @property
    def unbalanced(self) -> bool:
        """A worker is idle while another holds units that it has not begun."""
        return any(len(worker.units) > 1 for worker in self.workers.values()) and any(
            worker.accepting and not worker.units for worker in self.workers.values()
        )


def _load(worker: Worker) -> int:
    return len(worker.units)


def _urgency(unit: Unit) -> int:
    return -int(unit.job.priority)
