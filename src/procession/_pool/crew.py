"""The workers of a pool: that there are as many as there should be, and what becomes of them."""

from __future__ import annotations

import itertools
import math
import signal
import time

from procession._errors import describe_exit
from procession._pool import messages as m
from procession._pool.errors import PoolBrokenError, TaskCancelledError, WorkerDiedError, WorkerMemoryError
from procession._pool.insights import Ledger
from procession._pool.jobs import RUN
from procession._pool.member import Member
from procession._pool.restart import RestartBudget
from procession._pool.state import Worker
from procession._pool.worker import last_words

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from procession._pool.dispatch import Dispatcher
    from procession._pool.insights import Insights, SlowTask
    from procession._pool.jobs import Jobs
    from procession._pool.launcher import Launcher
    from procession._pool.lookout import Lookout
    from procession._pool.member import Table
    from procession._pool.state import Loss, Unit

__all__ = ["Crew", "Options"]

# A pool that has one task and ends this long after its first worker was ready has started no other: two interpreters that
# boot at once on few cores would have made the first result late. If the first takes long to be ready, they are not waited for.
_WARM_UP_S = 0.02
_LONGEST_WARM_UP_S = 0.5
# After SIGTERM, before SIGKILL.
_TERMINATE_GRACE_S = 2.0
# So often, a millisecond apart, is looked whether another thread has said how a worker ended.
_REAPED_ELSEWHERE = 100


class Options:
    """How a pool treats its workers and tasks; see `Pool` for what each means."""

    def __init__(self, **options: Any) -> None:
        self.retries = 0
        self.timeout: float | None = None
        self.grace = 1.0
        self.max_restarts: int | None = None
        self.restart_period = 10.0
        self.hard_memory: int | None = None
        self.idle_timeout: float | None = None
        self.on_demand = False
        self.stall_report: float | None = 30.0
        for name, value in options.items():
            if not hasattr(self, name):
                raise TypeError(f"unknown option {name!r}")
            setattr(self, name, value)


class Crew:
    """Starts workers, lets them leave, and sees to what the dead have left.

    Args:
        table: Who is there and who has what; as many as its scheduler expects are started.
        jobs: They are given up when workers die too often.
        dispatcher: It empties the inboxes of the dead, and gives units to the new.
        lookout: It is to wake up when a worker has ended.
        launcher: Starts the processes.
        options: How workers are treated.

    Attributes:
        complete: All workers are to be there, not only the first.
        asleep: None is: there has been nothing to do for long.
        idle_since: When there was something to do last.
    """

    def __init__(
        self, table: Table, jobs: Jobs, dispatcher: Dispatcher, lookout: Lookout, launcher: Launcher, options: Options
    ) -> None:
        self._table = table
        self._lock, self._scheduler, self._members = table.lock, table.scheduler, table.members
        self._jobs = jobs
        self._dispatcher = dispatcher
        self._lookout = lookout
        self._launcher = launcher
        self._options = options
        size = table.scheduler.expected
        self._limited = options.max_restarts is not None
        self._budget = RestartBudget(
            max(4, 2 * size) if options.max_restarts is None else options.max_restarts, options.restart_period
        )
        self._wids = itertools.count(1)
        self._oom_kills: int | None = None  # not counted yet
        now = time.monotonic()
        self._begun = self.idle_since = now
        # When the workers are started that nobody is waiting for.
        self._warm_at = now + _LONGEST_WARM_UP_S
        self._ledger = Ledger(now)
        self.asleep = False
        self.farewell = signal.SIGTERM
        # The others are started by the collector: once there is work for them, or after a moment anyway.
        self.complete = size == 1 or launcher.method not in ("fork", "spawn", "forkserver")

    # -- their number

    def start(self, launched: list[Member]) -> None:
        """Start those that are there from the beginning; each is appended to `launched` as soon as its process is there."""
        for _ in range(self._scheduler.expected if self.complete else 1):
            self._launch(launched)
        for member in launched:
            self._admit(member)

    @staticmethod
    def undo(launched: list[Member]) -> None:
        """The start has failed: end those that were launched."""
        for member in launched:
            member.process.terminate()
            member.process.join()
            member.close()

    def _launch(self, launched: list[Member]) -> None:
        """Start a process and append it to `launched`; it can be given work once it is admitted."""
        wid = next(self._wids)
        member = Member(wid, Worker(wid), time.monotonic())
        member.process = self._launcher.start(wid, member.inbox, self._table.done, member.cells)
        launched.append(member)

    def _admit(self, member: Member) -> None:
        member.watch, member.owns_watch = self._launcher.watch(member.process)
        with self._lock:
            member.worker = self._scheduler.add_worker(member.wid)
            self._members[member.wid] = member
            self._lookout.add(member)

    @property
    def needed(self) -> int:
        """How many there must be."""
        size = self._scheduler.expected
        return min(size, max(1, len(self._jobs.open))) if self._options.on_demand else size

    def tick(self, now: float, busy: bool) -> float:
        """See that there are as many as there should be; return when to do so again, in seconds."""
        self._adjust(now, busy)
        wait = math.inf if self.complete else max(self._warm_at - now, 0.001)
        if self._options.idle_timeout is not None and self._members:
            wait = min(wait, max(self.idle_since + self._options.idle_timeout - now, 0.01))
        return wait

    def _adjust(self, now: float, busy: bool) -> None:
        """Start and stop workers until there are as many as there should be."""
        if self._jobs.state != RUN and not busy:
            return
        if busy:
            self.idle_since = now
            self.asleep = False
        elif self._options.idle_timeout is not None and now - self.idle_since >= self._options.idle_timeout:
            self.asleep = True
        if self._oom_kills is None and now - self._begun >= _WARM_UP_S:
            self._oom_kills = _oom_kills()
        if not self.complete and (self._scheduler.short_of_workers or now >= self._warm_at):
            self.complete = True
        staying = [member for member in self._members.values() if not member.leaving]
        wanted = 0 if self.asleep else self.needed if self.complete else 1
        if self._options.on_demand and not self.asleep:
            wanted = max(wanted, len(staying))
        while len(staying) < wanted and self._jobs.broken is None:
            launched: list[Member] = []
            try:
                self._launch(launched)
                self._admit(launched[0])
            except Exception as error:
                broken = PoolBrokenError(f"no worker could be started: {error}")
                broken.__cause__ = error
                self._jobs.give_up(broken)
                return
            staying += launched
        for member in sorted(staying, key=lambda member: len(member.worker.units))[: max(0, len(staying) - wanted)]:
            self._dismiss(member)
        if len(staying) > wanted or busy:
            self._dispatcher.pump()

    # -- their lives

    def ready(self, member: Member, now: float) -> None:
        """A worker says that it can take work."""
        member.ready = member.worker.since = now
        self._warm_at = min(self._warm_at, now + _WARM_UP_S)

    def leaving(self, member: Member) -> None:
        """A worker takes nothing more."""
        with self._lock:
            member.leaving = True
            member.worker.accepting = False

    def _dismiss(self, member: Member) -> None:
        """Have a worker leave after what it has in hand."""
        self.leaving(member)
        self._dispatcher.dismiss(member)

    def bury(self, member: Member, now: float) -> None:
        """A worker's process has ended and all it had to say has been heard."""
        code = _exit_code(member.process)
        with self._dispatcher.sending:
            undelivered = self._dispatcher.undelivered(member)
            cells = member.cells
            index = cells[m.INDEX_CELL] if cells[m.RUNNING_CELL] == cells[m.SEQ_CELL] else None
            running = (cells[m.SEQ_CELL], index)
            with self._lock:
                self._ledger.left(member.insights(now, describe_exit(code) if code else "ended"))
                self._members.pop(member.wid, None)
                loss = self._scheduler.worker_left(member.wid, undelivered, running)
        self._lookout.remove(member)
        member.close()
        if loss.unit is not None:
            self._lost(loss.unit, member, code)
        if not member.leaving:
            self._count(member, loss, now)

    def _count(self, member: Member, loss: Loss, now: float) -> None:
        """A worker is to be replaced; give up if that will not help."""
        self._ledger.restarts += 1
        if member.error is not None:
            broken = PoolBrokenError(f"the initializer raised {type(member.error).__name__}: {member.error}")
            broken.__cause__ = member.error
            self._jobs.give_up(broken)
            return
        # A death that costs a task, or one in the midst of many, ends with the tasks; only the others could go on for ever.
        futile = member.ready is None or not (loss.in_hand or member.worker.items)
        if (futile or self._limited) and not self._budget.spend(now):
            when = "before it was ready" if member.ready is None else "while it ran a task" if loss.in_hand else "idle"
            process = member.process
            self._jobs.give_up(
                PoolBrokenError(
                    f"more than {self._budget.intensity} workers died within {self._budget.period:g} s. The last, "
                    f"{process.name} (pid {process.pid}), ended with exit code {process.exitcode} {when}. "
                    "See max_restarts and restart_period."
                )
            )

    def _lost(self, unit: Unit, member: Member, code: int | None) -> None:
        """A worker died with this unit of one item in its hands."""
        job = unit.job
        stop = member.stop
        unit.deaths += 1
        if stop is not None and stop.seq != unit.seq and stop.step > 1 and unit.worker is None:
            # The kill was meant for the one before.
            unit.deaths -= 1
            with self._lock:
                self._scheduler.give_back([unit])
            return
        if stop is not None and stop.seq != unit.seq:
            stop = None  # it died of this one, before the other's end was noticed
        error: BaseException
        if stop is not None and stop.error is not None and not isinstance(stop.error, WorkerMemoryError):
            error = stop.error
        elif stop is not None and stop.error is None:
            error = TaskCancelledError("the task was cancelled")
        elif unit.deaths <= job.retries and not job.settled:
            with self._lock:
                self._scheduler.give_back([unit])
            return
        elif stop is not None and stop.error is not None:
            error = stop.error
        else:
            kills = _oom_kills()
            before, self._oom_kills = self._oom_kills, kills
            oom = code == -signal.SIGKILL and before is not None and kills > before
            stack = last_words(member.cells)
            error = WorkerDiedError(
                unit.call_text(), member.process.name, member.process.pid, code, oom, unit.deaths, stack
            )
        job.put_error(unit.first, error)

    def insights(self, slowest: list[SlowTask]) -> Insights:
        """Return what they have done with their time."""
        now = time.monotonic()
        with self._lock:
            rows = [member.insights(now) for member in self._members.values()]
        return self._ledger.insights(rows, slowest, now)

    # -- their end

    def retire(self) -> bool:
        """All is done, and no more will come: have the workers leave. True when they have left."""
        members = list(self._members.values())
        if members:
            self._launcher.retire()
        for member in members:
            if not member.leaving:
                self._dismiss(member)
                if member.ready is None and not self._launcher.prepares:
                    # Still importing, for nothing.
                    member.process.terminate()
        return not members

    def end(self) -> None:
        """End them: by `farewell`, and after a grace by SIGKILL."""
        members = list(self._members.values())
        for step in (self.farewell, signal.SIGKILL):
            for member in members:
                member.kill(step)
            deadline = time.monotonic() + _TERMINATE_GRACE_S
            for member in members:
                member.process.join(max(0.0, deadline - time.monotonic()) if step != signal.SIGKILL else None)
            if all(member.process.exitcode is not None for member in members):
                break
        now = time.monotonic()
        for member in members:
            member.close()
            with self._lock:
                self._ledger.left(member.insights(now, "ended"))
                self._members.pop(member.wid, None)

    def close(self) -> None:
        """There will be no more of them."""
        self._ledger.close(time.monotonic())
        self._launcher.close()


def _exit_code(process: Any) -> int | None:
    process.join()
    for _ in range(_REAPED_ELSEWHERE):
        if process.exitcode is not None:
            break
        # Another thread, in active_children(), has reaped it and is about to say so.
        time.sleep(0.001)
    return process.exitcode  # type: ignore[no-any-return]


def _oom_kills() -> int:
    from procession._proc.cgroups import oom_kills

    return oom_kills()
