"""What a pool's workers have done with their time; what `Pool.insights` returns. No clock: time is an argument."""

from __future__ import annotations

import heapq
from collections import deque

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from procession._pool.state import Unit

__all__ = ["SLOW_NS", "Insights", "Ledger", "SlowTask", "Slowest", "WorkerInsights"]

# So many workers that have ended are remembered one by one; the totals count all. Arbitrary.
_ENDED = 64
# So many tasks are named, none of them shorter than this.
_SLOWEST = 5
SLOW_NS = 1_000_000


class _Record:
    """What was found out at one moment. Not a dataclass: importing that module costs as much as starting a worker."""

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and vars(other) == vars(self)

    def __hash__(self) -> int:
        return hash(tuple(vars(self).values()))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in vars(self).items())})"


class SlowTask(_Record):
    """One of the tasks that took longest.

    Attributes:
        seconds: How long it took. For an item of a chunk this may be up to 0.01 s too little.
        call: The call as text, arguments shortened.
    """

    def __init__(self, seconds: float, call: str) -> None:
        self.seconds = seconds
        self.call = call


class WorkerInsights(_Record):
    """What one worker, or all together, did with the time.

    Attributes:
        name: The process's name.
        pid: Its process id.
        state: "starting", "waiting", "working", "leaving", or how it ended.
        items: How many items it has done.
        starting: Seconds until it could take work: start of the process, imports, initializer.
        waiting: Seconds without work.
        working: Seconds within the user's function, with what is running now.
    """

    def __init__(
        self, name: str, pid: int | None, state: str, items: int, starting: float, waiting: float, working: float
    ) -> None:
        self.name = name
        self.pid = pid
        self.state = state
        self.items = items
        self.starting = starting
        self.waiting = waiting
        self.working = working

    @property
    def seconds(self) -> float:
        """How long it has lived."""
        return self.starting + self.waiting + self.working

    @property
    def starting_ratio(self) -> float:
        """Part of its life that starting took, 0 to 1."""
        return self._ratio(self.starting)

    @property
    def waiting_ratio(self) -> float:
        """Part of its life spent without work, 0 to 1."""
        return self._ratio(self.waiting)

    @property
    def working_ratio(self) -> float:
        """Part of its life spent working, 0 to 1."""
        return self._ratio(self.working)

    def _ratio(self, seconds: float) -> float:
        return seconds / self.seconds if self.seconds > 0 else 0.0

    @classmethod
    def measured(
        cls,
        name: str,
        pid: int | None,
        state: str,
        items: int,
        *,
        lived: float,
        starting: float | None,
        working: float,
    ) -> WorkerInsights:
        """Return them from what was measured; the rest of its life it waited.

        Args:
            name, pid, state, items: As the attributes.
            lived: Seconds since its process was started.
            starting: Seconds until it was ready; None if it is not.
            working: Seconds at work.
        """
        begun = lived if starting is None else min(starting, lived)
        worked = min(working, lived - begun)
        return cls(name, pid, state, items, begun, max(0.0, lived - begun - worked), worked)


class Insights(_Record):
    """What a pool has done so far.

    Attributes:
        workers: Those that live.
        ended: The last of those that have ended.
        total: All workers together, those that ended long ago included.
        count: How many workers there have been.
        slowest: The slowest tasks, the slowest first. An item of a chunk is seen only if it took more than 0.01 s.
        restarts: How many workers have died and were, or will be, replaced; those that left as planned do not count.
        elapsed: Seconds since the pool was made; until its end, if it has ended.
    """

    def __init__(
        self,
        workers: tuple[WorkerInsights, ...],
        ended: tuple[WorkerInsights, ...],
        total: WorkerInsights,
        count: int,
        slowest: tuple[SlowTask, ...],
        restarts: int,
        elapsed: float,
    ) -> None:
        self.workers = workers
        self.ended = ended
        self.total = total
        self.count = count
        self.slowest = slowest
        self.restarts = restarts
        self.elapsed = elapsed

    @property
    def items(self) -> int:
        """How many items have been done."""
        return self.total.items

    def _title(self) -> str:
        died = f", {self.restarts} died" if self.restarts else ""
        workers = "1 worker" if self.count == 1 else f"{self.count} workers"
        return f"{self.items:,} items in {self.elapsed:.2f} s by {workers}{died}"

    def _rows(self) -> list[tuple[str, ...]]:
        head = ("worker", "pid", "state", "items", "starting", "waiting", "working")
        rows = [head, *(_row(worker) for worker in (*self.workers, *self.ended))]
        return [*rows, _row(self.total)]

    def __repr__(self) -> str:
        rows = self._rows()
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        # Names and states to the left, numbers to the right.
        lines = [
            "  ".join(cell.ljust(width) if i in (0, 2) else cell.rjust(width) for i, (cell, width) in enumerate(cells))
            for cells in (list(zip(row, widths, strict=True)) for row in rows)
        ]
        lines = [f"<Insights: {self._title()}>", *lines]
        if self.slowest:
            lines.append("slowest tasks:")
            lines += [f"  {task.seconds:9.3f} s  {task.call}" for task in self.slowest]
        return "\n".join(line.rstrip() for line in lines)

    def _repr_html_(self) -> str:
        from html import escape

        head, *rows = self._rows()
        parts = [f"<p>{escape(self._title())}</p>", _table(head, rows)]
        if self.slowest:
            slow = [(f"{task.seconds:.3f} s", task.call) for task in self.slowest]
            parts.append(_table(("took", "slowest tasks"), slow))
        return "".join(parts)


def _row(worker: WorkerInsights) -> tuple[str, ...]:
    times = zip(
        (worker.starting, worker.waiting, worker.working),
        (worker.starting_ratio, worker.waiting_ratio, worker.working_ratio),
        strict=True,
    )
    shown = [f"{seconds:.2f} s {100 * ratio:3.0f} %" for seconds, ratio in times]
    pid = "" if worker.pid is None else str(worker.pid)
    return (worker.name, pid, worker.state, f"{worker.items:,}", *shown)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    from html import escape

    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "".join(line(row, "td") for row in rows)
    return f"<table><thead>{line(head, 'th')}</thead><tbody>{body}</tbody></table>"


class Slowest:
    """The tasks that took longest."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, str]] = []

    def remember(self, spent: int, unit: Unit) -> None:
        """A unit of one item took `spent` nanoseconds."""
        if spent < SLOW_NS or (len(self._heap) == _SLOWEST and spent <= self._heap[0][0]):
            return
        entry = (spent, unit.seq, unit.call_text())
        if len(self._heap) < _SLOWEST:
            heapq.heappush(self._heap, entry)
        else:
            heapq.heappushpop(self._heap, entry)

    def tasks(self) -> list[SlowTask]:
        """Return them, in no order."""
        return [SlowTask(spent * 1e-9, call) for spent, _, call in list(self._heap)]


class Ledger:
    """What an engine writes down for its insights.

    Attributes:
        restarts: How many workers have died.
    """

    def __init__(self, now: float) -> None:
        self.restarts = 0
        self._begun = now
        self._end: float | None = None
        self._ended: deque[WorkerInsights] = deque(maxlen=_ENDED)
        self._count = 0
        self._items = 0
        self._times = (0.0, 0.0, 0.0)

    def left(self, worker: WorkerInsights) -> None:
        """A worker has ended."""
        self._ended.append(worker)
        self._count += 1
        self._items += worker.items
        starting, waiting, working = self._times
        self._times = (starting + worker.starting, waiting + worker.waiting, working + worker.working)

    def close(self, now: float) -> None:
        """The pool has ended."""
        self._end = now

    def insights(self, workers: Sequence[WorkerInsights], slowest: Iterable[SlowTask], now: float) -> Insights:
        """Return what there is to tell while these workers live."""
        starting, waiting, working = self._times
        total = WorkerInsights(
            "all",
            None,
            "",
            self._items + sum(worker.items for worker in workers),
            starting + sum(worker.starting for worker in workers),
            waiting + sum(worker.waiting for worker in workers),
            working + sum(worker.working for worker in workers),
        )
        elapsed = (now if self._end is None else self._end) - self._begun
        slow = tuple(sorted(slowest, key=lambda task: -task.seconds))
        count = self._count + len(workers)
        return Insights(tuple(workers), tuple(self._ended), total, count, slow, self.restarts, elapsed)
