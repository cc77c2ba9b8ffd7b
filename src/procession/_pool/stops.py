"""Breaking off what workers are at: what takes too long or too much memory, and what nobody wants any more."""

from __future__ import annotations

import math
import signal
import time

from procession._pool import messages as m
from procession._pool.errors import TaskCancelledError, TaskTimeoutError, WorkerMemoryError
from procession._pool.member import Stop
from procession._pool.worker import resident_bytes

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from procession._pool.dispatch import Dispatcher
    from procession._pool.jobs import Job, Jobs
    from procession._pool.member import Member, Table
    from procession._pool.state import Unit

__all__ = ["Stops"]

_MEMORY_LOOK_S = 0.1
# A unit that is to be broken off and has not been begun, or is over already, is looked at again after this.
_AGAIN_S = 0.005
# A unit is broken off by one after the other.
_STEPS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)

# What a call raises when it is broken off: by SIGINT, or by what the user's handler of SIGTERM does.
_BROKEN_OFF = ("KeyboardInterrupt", "SystemExit")


class Stops:
    """Sees to what is to be broken off.

    Args:
        table: Who is there and who has what.
        jobs: A job that is dropped is forgotten there.
        dispatcher: It takes back what has not been begun.
        grace: Seconds between one signal and the next.
        hard_memory: Bytes at which a worker is killed; None for no limit.
    """

    def __init__(self, table: Table, jobs: Jobs, dispatcher: Dispatcher, grace: float, hard_memory: int | None) -> None:
        self._lock, self._scheduler, self._members = table.lock, table.scheduler, table.members
        self._jobs = jobs
        self._dispatcher = dispatcher
        self._grace = grace
        self._hard_memory = hard_memory
        self._memory_looked = time.monotonic()

    def drop(self, job: Job) -> None:
        """Nobody wants the results of a job any more: take back what has not been begun, and break off the rest."""
        with self._lock:
            self._jobs.discard(job)
            units = self._scheduler.withdraw(job)
            holders = {unit.worker.wid for unit in units if unit.worker is not None}
        if not holders:
            return
        for wid in holders:
            self._dispatcher.recall(wid)
        now = time.monotonic()
        with self._lock:
            for unit in units:
                if unit.worker is not None and unit.seq in self._scheduler.inflight:
                    member = self._members.get(unit.worker.wid)
                    if member is not None and member.stop is None:
                        member.stop = Stop(unit.seq, None, now)
        self._dispatcher.pump()

    def error(self, wid: int, seq: int, packed: tuple[Any, ...]) -> BaseException | None:
        """Return the error a unit was broken off with, if this exception of a worker's is our doing."""
        member = self._members.get(wid)
        if member is None or member.stop is None or member.stop.seq != seq or packed[2] not in _BROKEN_OFF:
            return None
        error = member.stop.error or TaskCancelledError("the task was cancelled")
        member.stop = None
        member.cells[m.CANCEL_CELL] = 0
        return error

    def tick(self, now: float, busy: bool) -> float:
        """Take the steps that are due; return when the next will be, in seconds."""
        late: list[tuple[Member, Unit]] = []
        with self._lock:
            members = list(self._members.values())
            wait = min((self._find(member, now, late) for member in members), default=math.inf)
        for member, unit in late:
            # Not under the lock: the repr of the arguments is the user's.
            error = TaskTimeoutError(member.call_text(unit), unit.job.timeout)
            with self._lock:
                if member.stop is None and member.worker.units and member.worker.units[0] is unit:
                    member.stop = Stop(unit.seq, error, now)
        for member in members:
            stop = member.stop
            if stop is not None:
                wait = min(wait, self._advance(member, stop, now))
        if self._hard_memory is not None and busy:
            self._check_memory(members, self._hard_memory, now)
            wait = min(wait, _MEMORY_LOOK_S)
        return wait

    @staticmethod
    def _find(member: Member, now: float, late: list[tuple[Member, Unit]]) -> float:
        """Find out whether a worker is to be broken off, put it into `late` if it takes too long; else return when it will."""
        units = member.worker.units
        if member.stop is not None or not units:
            return math.inf
        if units[0].job.settled:
            # Nobody wants it any more, but it had been taken before it could be taken back.
            member.stop = Stop(units[0].seq, None, now)
            return math.inf
        limit = units[0].job.timeout
        if limit is None or member.ready is None:
            return math.inf
        left: float = member.worker.since + limit - now
        if left <= 0:
            late.append((member, units[0]))
            return math.inf
        return max(left, 0.001)

    def _advance(self, member: Member, stop: Stop, now: float) -> float:
        """Take the next step of breaking off a unit; return the seconds until the one after."""
        if stop.seq not in self._scheduler.inflight:
            if stop.step > 1 and now < stop.due:
                return stop.due - now  # it may die of the signal yet, and what it has now is not to blame
            member.stop = None
            member.cells[m.CANCEL_CELL] = 0
            return math.inf
        if now < stop.due:
            return stop.due - now
        if member.cells[m.SEQ_CELL] != stop.seq or (stop.step and member.cells[m.UNANSWERED_CELL] != stop.seq):
            # Not begun yet, or over already.
            stop.due = now + _AGAIN_S
            return _AGAIN_S
        if stop.step == 0:
            member.cells[m.CANCEL_CELL] = stop.seq
            if stop.error is None:
                # All of it, not only the item that runs.
                member.cells[m.DROP_CELL] = stop.seq
        member.kill(_STEPS[min(stop.step, len(_STEPS) - 1)])
        stop.step += 1
        stop.due = now + self._grace
        return self._grace

    def _check_memory(self, members: list[Member], limit: int, now: float) -> None:
        if now - self._memory_looked < _MEMORY_LOOK_S:
            return
        self._memory_looked = now
        for member in members:
            if not member.worker.units or member.process.pid is None:
                continue
            used = resident_bytes(member.process.pid)
            if used > limit:
                unit = member.worker.units[0]
                error = WorkerMemoryError(member.call_text(unit), member.process.name, member.process.pid, limit, used)
                member.stop = Stop(unit.seq, error, now + 3600)
                member.stop.step = 3
                member.kill(signal.SIGKILL)
