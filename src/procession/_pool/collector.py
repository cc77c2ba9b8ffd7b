"""Taking from the queue of answers, and acting on what comes.

Whoever takes from that queue, one at a time, is the collector: the engine's thread; or, while it is the only one with something to
wait for, the caller of `apply` itself, which saves two changes of threads. An answer that a caller has taken it leaves in `_taken`
until it has acted on it: it may be broken off anywhere.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from functools import partial
from queue import Empty

from procession._pool import messages as m
from procession._pool.errors import TaskCancelledError
from procession._pool.jobs import CLOSE, RUN
from procession._pool.lookout import LONGEST_SLEEP_S
from procession._pool.stream import HOLD_S
from procession._proc.results import unpack_error

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from procession._pool.crew import Crew
    from procession._pool.delivery import Delivery
    from procession._pool.dispatch import Dispatcher
    from procession._pool.jobs import Jobs
    from procession._pool.lookout import Lookout
    from procession._pool.member import Member, Table
    from procession._pool.requests import Requests
    from procession._pool.results import AsyncResult
    from procession._pool.stall import Stall
    from procession._pool.state import Unit
    from procession._pool.stops import Stops

__all__ = ["Collector"]

# How many answers are taken at once: enough to make the taking cheap, few enough that workers are not kept waiting.
_BATCH = 256
# For so long the collector waits on the queue itself, from which it wakes fastest, before it waits for all there is to wait for.
_HOT_S = 0.0005
# So often the thread looks around while answers keep coming.
_LOOK_S = 0.02
# For so long it sleeps when nothing will be due; arbitrary.
_LONGEST_WAIT_S = 3600.0
# And while a caller is the collector: it may be broken off, and not come to say so.
_LEADER_LOOK_S = 1.0


class Collector:
    """Takes answers and acts on them, or has others act: on results, deaths, and what is due.

    Attributes:
        leader: The call whose caller is the collector now.
    """

    def __init__(
        self,
        table: Table,
        jobs: Jobs,
        *,
        requests: Requests,
        lookout: Lookout,
        dispatcher: Dispatcher,
        delivery: Delivery,
        stops: Stops,
        stall: Stall,
        crew: Crew,
    ) -> None:
        self.leader: AsyncResult | None = None
        self._taken: deque[tuple[Any, ...]] = deque()
        self._lock, self._scheduler, self._members, self._done = table.lock, table.scheduler, table.members, table.done
        self._jobs = jobs
        self._requests = requests
        self._lookout = lookout
        self._dispatcher = dispatcher
        self._delivery = delivery
        self._stops = stops
        self._stall = stall
        self._crew = crew
        self._last_look = time.monotonic()

    # -- a caller

    def lead(self, job: AsyncResult) -> None:
        """Have a call done with its caller as the collector, if nobody else is waiting for anything; else it is not begun.

        Returns when it has its result, or when there is something else to do.
        """
        clean = False
        try:
            with self._dispatcher.sending:
                self._begin(job)
            if self.leader is job:
                self._collect_for(job)
            clean = True
        finally:
            # Up to here nothing has been called since an exception was raised.
            if self.leader is job:
                self.leader = None
            if not clean:
                self._requests.pending.append(partial(self._forget, job))
            if self._requests.pending or self._taken or self._jobs.open or self._jobs.state != RUN:
                self._lookout.nudge()

    def _begin(self, job: AsyncResult) -> None:
        """Give a call to an idle worker and make its caller the collector, if nothing else is going on."""
        with self._lock:
            self._jobs.check()
            if self.leader is not None or self._taken or self._requests.pending or not self._scheduler.idle:
                return
            member = self._idle_member()
            unit = None if member is None else job.next_unit(1)
            if member is None or unit is None:
                return
            self.leader = job
            self._jobs.open.add(job)
            self._stall.last_answer = self._crew.idle_since = now = time.monotonic()
            self._scheduler.assign_now(member.worker, unit, now)
        self._dispatcher.send(member, [unit])

    def _idle_member(self) -> Member | None:
        for member in self._members.values():
            if member.worker.accepting and not member.worker.units:
                return member
        return None

    def _collect_for(self, job: AsyncResult) -> None:
        """Collect until `job` has its result, or a message comes that is not for it and so for the engine's thread."""
        taken, take = self._taken, self._done.get
        while not job.settled:
            try:
                # All in C: what is taken is noted, with nothing in between.
                taken.extend(map(take, (True,), (LONGEST_SLEEP_S,)))
                message = taken[0]
            except (Empty, IndexError):
                if self._jobs.ended:
                    return
                if not job.waited_for:
                    # A long one: from now on the collector looks around as well.
                    job.waited_for += 1
                    self._lookout.nudge()
                continue
            if message[0] <= m.ERROR:
                unit = self._scheduler.inflight.get(message[2])
                if unit is None or unit.job is not job:
                    return
                with self._lock:
                    self._scheduler.answered(message[2], time.monotonic(), message[4])
                self._delivery.deliver([(unit, message)])
            elif message[0] in (m.READY, m.NUDGE):
                self._event(message, time.monotonic())
            else:
                return
            with contextlib.suppress(ValueError):
                taken.remove(message)

    def _forget(self, job: AsyncResult) -> None:
        """The caller of a job has been broken off while it was the collector."""
        job.abandon(TaskCancelledError("its caller was interrupted"))
        self._stops.drop(job)
        self._lookout.nudge()
        self._dispatcher.audit(time.monotonic(), 0.0)

    # -- the engine's thread

    def step(self) -> bool:
        """Look around once, then sleep until something happens; False when there is nothing left to do."""
        messages: list[Any] = []
        active = False
        if self._requests.pending:
            self._requests.see_to()
        if self.leader is None:
            if self._taken:
                self._process([self._taken.popleft() for _ in range(len(self._taken))])
            starting = any(member.ready is None for member in list(self._members.values()))
            active = starting or not self._scheduler.idle
            with contextlib.suppress(Empty):
                messages = self._done.get_many(_BATCH, True, _HOT_S if active else 0.0)
            if messages:
                self._process(messages)
        now = time.monotonic()
        if messages and now - self._last_look < (HOLD_S if self._jobs.streams else _LOOK_S):
            return True
        self._last_look = now
        if self._jobs.ended:
            return False
        timeout = self._on_time(now)
        if self._jobs.state == CLOSE and self._may_leave():
            return False
        self._sleep(0.0 if messages else timeout, active)
        return True

    def _on_time(self, now: float) -> float:
        """Have done what is due; return how long nothing will be."""
        wait = min(self._jobs.tick(now), _LONGEST_WAIT_S)
        with self._lock:
            busy = not self._scheduler.idle
        return min(
            wait,
            self._dispatcher.tick(now, busy and self.leader is None),
            self._stops.tick(now, busy),
            self._crew.tick(now, busy),
            self._stall.tick(now, busy),
        )

    def _may_leave(self) -> bool:
        """After close(): all is done; the workers have been told to leave, and have left."""
        with self._lock:
            at_work = self._requests.pending or self._taken or self.leader is not None or self._jobs.streams
            if at_work or not self._scheduler.idle:
                return False
        return self._crew.retire()

    def _sleep(self, timeout: float, active: bool) -> None:
        """Sleep until something happens: an answer, a death, a nudge, or `timeout` seconds."""
        lookout = self._lookout
        if active:
            timeout = min(timeout, lookout.listen())
        if self.leader is not None:
            timeout = min(timeout, _LEADER_LOOK_S)
        lookout.parked, lookout.sleeping = not active, True
        if self._requests.pending or self._taken or (not active and self.leader is None and not self._scheduler.idle):
            timeout = 0.0  # given to it meanwhile, by one who saw it awake
        lookout.sleep(timeout)

    # -- what comes

    def _process(self, messages: list[tuple[Any, ...]]) -> None:
        """Act on messages, in their order."""
        now = time.monotonic()
        outcomes: list[tuple[Unit, tuple[Any, ...]]] = []
        later: list[tuple[int, tuple[Any, ...]]] = []
        answered = self._scheduler.answered
        with self._lock:
            for message in messages:
                kind = message[0]
                if kind <= m.ERROR:
                    unit = answered(message[2], now, message[4])
                    if unit is not None:
                        outcomes.append((unit, message))
                elif kind == m.VALUES:
                    self._part(message, now, outcomes)
                else:
                    # These change the order of things: what came before must have been acted on.
                    later.append((len(outcomes), message))
        done = 0
        for until, message in later:
            self._delivery.deliver(outcomes[done:until])
            done = until
            self._event(message, now)
        self._delivery.deliver(outcomes[done:])
        self._dispatcher.pump()

    def _part(self, message: tuple[Any, ...], now: float, outcomes: list[Any]) -> None:
        seq, spent = message[2], message[6]
        unit = self._scheduler.inflight.get(seq)
        if unit is None:
            return
        last = message[7] == unit.count
        if unit.worker is not None:
            unit.worker.busy_ns += spent
            unit.worker.items += unit.count - 1 if last else 0
        if last:
            self._scheduler.answered(seq, now)
        outcomes.append((unit, message))

    def _event(self, message: tuple[Any, ...], now: float) -> None:
        kind = message[0]
        if kind == m.NUDGE:
            return
        member = self._members.get(message[1])
        if kind == m.DIED:
            if member is not None:
                self._crew.bury(member, now)
        elif kind == m.READY:
            if member is not None:
                self._crew.ready(member, now)
        elif kind == m.FAILED:
            if member is not None:
                member.error = unpack_error(message[2])
        elif kind == m.LEAVING:
            if member is not None:
                self._crew.leaving(member)
        elif kind == m.PONG:
            self._dispatcher.lost(message[1], message[2])
        else:
            self._dispatcher.not_done(message, now)
