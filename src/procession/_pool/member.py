"""The workers as the parent knows them."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections import deque

from procession import _native
from procession._pool import messages as m
from procession._pool.insights import WorkerInsights
from procession._pool.state import Scheduler
from procession._wire.queues import Queue

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from procession._pool.state import Unit, Worker

__all__ = ["Member", "Stop", "Table"]


class Stop:
    """A unit that is being broken off: SIGINT, after a grace SIGTERM, after another SIGKILL."""

    __slots__ = ("due", "error", "seq", "step")

    def __init__(self, seq: int, error: BaseException | None, due: float) -> None:
        self.seq = seq
        self.error = error
        self.step = 0
        self.due = due


class Member:
    """A worker as the parent knows it: its process, its inbox, and what it has done so far."""

    def __init__(self, wid: int, worker: Worker, now: float) -> None:
        self.wid = wid
        self.worker = worker
        self.inbox: Queue[Any] = Queue()
        self.cells = _native.Cells(m.CELLS)
        self.process: Any = None
        self.watch = -1
        self.owns_watch = False
        # Functions it knows, and those of them that nobody will call again.
        self.defined: set[int] = set()
        self.forgotten: deque[int] = deque()
        self.stop: Stop | None = None
        self.leaving = False
        self.error: BaseException | None = None
        self.started = now
        self.ready: float | None = None
        # The last unit it had when it was asked where it is.
        self.asked = 0

    def call_text(self, unit: Unit) -> str:
        """Describe the call that it is at, in a unit it was given."""
        if unit.single:
            return unit.call_text()
        index = self.cells[m.INDEX_CELL] if self.cells[m.SEQ_CELL] == unit.seq else unit.offset
        return unit.part(index, index + 1).call_text()

    def insights(self, now: float, end: str | None = None) -> WorkerInsights:
        """Tell what it has done with its time; `end` is how it ended."""
        worker = self.worker
        items, working = worker.items, worker.busy_ns * 1e-9
        state = "leaving" if self.leaving else "starting" if self.ready is None else "waiting"
        if worker.units and self.ready is not None:
            # What is in its hands has not been counted yet.
            items += worker.units[0].offset
            working += max(0.0, now - max(worker.since, self.ready))
            state = "working" if state == "waiting" else state
        return WorkerInsights.measured(
            self.process.name,
            self.process.pid,
            end or state,
            items,
            lived=now - self.started,
            starting=None if self.ready is None else self.ready - self.started,
            working=working,
        )

    def kill(self, number: int) -> None:
        """Send its process a signal; nothing if that has ended."""
        try:
            # Whatever has become of its pid, and of the fork server or template that would tell of its end.
            signal.pidfd_send_signal(self.watch, number)
        except ProcessLookupError:
            pass
        except OSError:
            if self.process.exitcode is None:  # there are no pidfds here
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.process.pid, number)

    def close(self) -> None:
        if self.owns_watch and self.watch >= 0:
            os.close(self.watch)
        self.watch = -1


class Table:
    """Who is there, who has what, and what they answer.

    Attributes:
        lock: To be held while the scheduler or the members are changed. The user's code never runs under it.
        scheduler: Which worker holds which unit.
        members: The workers by their numbers.
        done: The queue of answers.
    """

    def __init__(self, size: int) -> None:
        self.lock = threading.Lock()
        self.scheduler = Scheduler()
        self.scheduler.expected = size
        self.members: dict[int, Member] = {}
        self.done: Queue[Any] = Queue()
