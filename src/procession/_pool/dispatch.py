"""Giving units to workers, and taking back what they have not begun.

The main thread gives out too, and may be broken off as it does so. What it has promised and not sent, or sent and lost sight of, is
found by the *audit*: a worker that says (PONG) to have answered everything up to a unit that is still open has not got it.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from queue import Empty

from procession import _native
from procession._pool import messages as m
from procession._pool.state import Unit
from procession._proc.results import unpack_error
from procession._wire import codec

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from procession._pool.functions import Function
    from procession._pool.jobs import Job, Jobs
    from procession._pool.member import Member, Table

__all__ = ["Dispatcher"]

# How many messages are taken out of an inbox at once.
_BATCH = 256
# So long nothing may be heard of a worker that has something before it is asked where it is.
_AUDIT_S = 0.25
# An idle worker takes over from one that is this long at its task.
_PATIENCE_S = 0.001

# Messages of the parent to itself, beside DIED and NUDGE: a unit that could not be sent, and one that is to be sent item by item.
_UNSENT, _SPLIT = 100, 101
# The messages that carry a unit.
_UNITS = (m.ITEM, m.PICKLED, m.CHUNK)


class Dispatcher:
    """Puts units into the workers' inboxes and takes them out again.

    Args:
        table: Who is there and who has what.
        jobs: When none of them will be done any more, nothing is given out.
        main_by_value: Whether what is defined in `__main__` is sent as code.

    Attributes:
        sending: To be held while inboxes are written to or emptied here; taken before the table's lock.
    """

    def __init__(self, table: Table, jobs: Jobs, main_by_value: bool) -> None:
        self.sending = threading.RLock()
        self._lock, self._scheduler, self._members = table.lock, table.scheduler, table.members
        self._jobs = jobs
        self._done = table.done
        self._main_by_value = main_by_value
        self._failures: dict[int, Exception] = {}
        self._audited = 0.0

    # -- giving out

    def pump(self) -> None:
        """Give units to the workers that have room."""
        if self._jobs.ended:
            return
        with self.sending:
            with self._lock:
                plan = self._scheduler.plan(time.monotonic())
            for worker, units in plan:
                self.send(self._members[worker.wid], units)

    def send(self, member: Member, units: list[Unit]) -> None:
        """Put units into a worker's inbox; what goes wrong with one comes out of the queue of answers."""
        out: list[tuple[Any, ...]] = []
        while member.forgotten:
            out.append((m.FORGET, member.forgotten.popleft()))
        new: set[int] = set()
        for unit in units:
            function = unit.job.function
            try:
                if function.fid not in member.defined and function.fid not in new:
                    out.append(function.message())
                    new.add(function.fid)
                if unit.single and unit.data is None and type(unit.items) in m.PLAIN:
                    out.append((m.ITEM, unit.seq, function.fid, unit.first, unit.items))
                else:
                    out.append(self._message(unit))
            except Exception as error:
                self._unsent(member, unit, error)
        try:
            member.inbox.put_many(out)
        except MemoryError:
            self._send_one_by_one(member, out, new)
        member.defined |= new

    def _message(self, unit: Unit) -> tuple[Any, ...]:
        fid = unit.job.function.fid
        if not unit.single:
            data = codec.encode_items(unit.items, main_by_value=self._main_by_value)
            unit.job.weigh(unit.count, data)
            return (m.CHUNK, unit.seq, fid, unit.first, data)
        data = unit.data
        if data is None:
            nbytes = _native._weigh(unit.items)
            if nbytes >= 0:
                unit.job.weigh(1, nbytes)
                return (m.ITEM, unit.seq, fid, unit.first, unit.items)
            data = codec.encode_beside(unit.items, main_by_value=self._main_by_value)
            if type(data) is bytes:  # else it is given away
                unit.data = data
            unit.job.weigh(1, data)
        return (m.PICKLED, unit.seq, fid, unit.first, data)

    def _unsent(self, member: Member, unit: Unit, error: Exception) -> None:
        if unit.count > 1:
            self._done.put((_SPLIT, member.wid, unit.seq))
            return
        self._failures[unit.seq] = error
        self._done.put((_UNSENT, member.wid, unit.seq))

    def _send_one_by_one(self, member: Member, out: list[tuple[Any, ...]], new: set[int]) -> None:
        """Shared memory is full: what has room goes, and the rest has its error."""
        found = self._drain(member)
        if found:
            member.inbox.put_many(found)
        there = {message[1] for message in found}
        for message in out:
            kind, number = message[0], message[1]
            if number in there:
                continue
            unit = self._scheduler.inflight.get(number) if kind in _UNITS else None
            try:
                # Packed again: what it had beside it went with the attempt.
                member.inbox.put(message if unit is None else self._message(unit))
            except MemoryError as error:
                if kind == m.DEFINE:
                    new.discard(number)
                    continue
                if unit is not None:
                    self._failures[number] = error
                    self._done.put((_UNSENT, member.wid, number))

    def dismiss(self, member: Member) -> None:
        """Have a worker leave after what it has in hand."""
        with self.sending:
            member.inbox.put((m.STOP,))

    # -- taking back

    @staticmethod
    def _drain(member: Member) -> list[tuple[Any, ...]]:
        found: list[tuple[Any, ...]] = []
        with contextlib.suppress(Empty):
            while True:
                found.extend(member.inbox.get_many(_BATCH, False))
        return found

    def undelivered(self, member: Member) -> list[int]:
        """Empty the inbox of a worker that has died; return the numbers of the units in it. To be called with `sending`."""
        return [message[1] for message in self._drain(member) if message[0] in _UNITS]

    def recall(self, wid: int) -> None:
        """Take back what a worker has not taken yet, and let the scheduler decide anew."""
        with self.sending:
            member = self._members.get(wid)
            if member is None:
                return
            found = self._drain(member)
            keep = [message for message in found if message[0] not in _UNITS]
            if keep:
                member.inbox.put_many(keep)
            with self._lock:
                units = self._scheduler.take_back([message[1] for message in found if message[0] in _UNITS])
                self._scheduler.give_back([unit for unit in units if not unit.job.settled])

    def take_back(self, job: Job) -> bool:
        """Take back a call that a worker has been given; False if it has begun with it."""
        with self.sending:
            with self._lock:
                held = next((unit for unit in self._scheduler.inflight.values() if unit.job is job), None)
                if held is None:
                    # Returned by a worker that died, or answered.
                    waits = any(unit.job is job for unit in self._scheduler._returned)
                    self._scheduler.withdraw(job)
                    return waits
                member = None if held.worker is None else self._members.get(held.worker.wid)
            if member is None:
                return False
            found = self._drain(member)
            kept = [message for message in found if message[0] not in _UNITS or message[1] != held.seq]
            if kept:
                member.inbox.put_many(kept)
            if len(kept) == len(found):
                return False
            with self._lock:
                self._scheduler.take_back([held.seq])
        return True

    def tick(self, now: float, audit: bool) -> float:
        """Look for what is stuck; return when to do so again, in seconds."""
        if audit and now - self._audited >= _AUDIT_S:
            self.audit(now, _AUDIT_S)
        with self._lock:
            unbalanced = self._scheduler.unbalanced
            stalled = self._scheduler.stalled(now, _PATIENCE_S) if unbalanced else None
        if stalled is not None:
            self.recall(stalled.wid)
            self.pump()
        return _PATIENCE_S if unbalanced else math.inf

    # -- what comes back without having been run

    def audit(self, now: float, patience: float) -> None:
        """Ask the workers of which nothing has been heard for so long where they are; forget what has its result."""
        self._audited = now
        for job in list(self._jobs.open):
            if job.settled:
                self._jobs.open.discard(job)
        with self.sending, contextlib.suppress(MemoryError):  # what had been given out has been sent, or is lost
            for member in list(self._members.values()):
                units = member.worker.units
                if units and member.asked != units[-1].seq and now - member.worker.since >= patience:
                    member.inbox.put((m.PING, units[-1].seq))
                    member.asked = units[-1].seq

    def lost(self, wid: int, until: int) -> None:
        """The worker has answered all up to `until`: what is still open of it, an interrupted caller has not sent or has lost."""
        with self._lock:
            member = self._members.get(wid)
            if member is None:
                return
            lost = [unit for unit in member.worker.units if unit.seq <= until]
            for unit in lost:
                self._scheduler.answered(unit.seq, time.monotonic())
            self._scheduler.give_back([unit.part(unit.offset, unit.count) if unit.offset else unit for unit in lost])

    def not_done(self, message: tuple[Any, ...], now: float) -> None:
        """A unit came back without having been run."""
        kind, seq = message[0], message[2]
        with self._lock:
            unit = self._scheduler.answered(seq, now)
        failure = self._failures.pop(seq, None)
        if unit is None:
            return
        if kind == m.NO_FUNCTION and _can_be_sent_again(unit.job.function, message[4]):
            with self._lock:
                self._scheduler.give_back([unit])
            return
        if unit.count > 1 and kind in (_SPLIT, m.REFUSED):
            with self._lock:
                self._scheduler.give_back([_single(unit, i) for i in range(unit.count)])
            return
        error: BaseException = failure or unpack_error(message[3])
        if kind == m.REFUSED:
            error = unit.job.refused(error)
        for index in range(unit.offset, unit.count):
            unit.job.put_error(unit.first + index, error)


def _can_be_sent_again(function: Function, fid: int) -> bool:
    """A worker does not have a function under the number `fid`; tell whether there is another way to send it."""
    if fid == function.fid:
        if function.by_value:
            return False
        function.send_by_value()
        try:
            function.message()
        except Exception:
            return False
    return True  # or was sent as code meanwhile


def _single(unit: Unit, index: int) -> Unit:
    one = Unit(unit.job, unit.first + index, unit.items[index], 1, True)
    one.deaths = unit.deaths
    return one
