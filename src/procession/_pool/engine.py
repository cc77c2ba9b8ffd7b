"""The engine: one thread that collects, two kinds of queues, and a scheduler that knows who holds what.

::

    caller                              parent                                workers
    submit(job) ──► Scheduler ──plan──► an inbox each ───────────────────► take, run
                        ▲                                                     │
    job.get() ◄── put_value ◄── collector ◄───────── one queue of answers ◄───┘

Every change of what is known about a unit comes out of the queue of answers, the death of a worker too: it is put there when
its process has ended, and so behind everything the worker has said. Whoever takes from that queue, one at a time, is the
collector: the engine's thread; or, while it is the only one with something to wait for, the caller of `apply` itself, which
saves two changes of threads.

The main thread may be broken off by a KeyboardInterrupt after any call, and the pool be used on. So it changes nothing but by
single steps (a deque's `append`, an assignment) or in an order in which each beginning is harmless, and waits at a `Gate`; all
else it asks the engine's thread to do (`_requests`). An answer it has taken it leaves in `_taken` until it has acted on it.
What it has promised and not sent, or sent and lost sight of, is found by the *audit*: a worker that says (PONG) to have answered
everything up to a unit that is still open has not got it.

Locks, in the order in which they are taken: `_sending` (what goes into inboxes), `_lock` (the scheduler and the table of members). The
user's code (pickling, callbacks, iterators) never runs under `_lock`.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import sys
import threading
import time
import weakref
from collections import deque
from functools import partial
from multiprocessing import util
from queue import Empty

from procession._errors import describe_exit
from procession._pool import messages as m
from procession._pool.delivery import Delivery
from procession._pool.dispatch import Dispatcher
from procession._pool.errors import (
    PoolBrokenError,
    TaskCancelledError,
    WorkerDiedError,
    WorkerMemoryError,
)
from procession._pool.functions import Registry
from procession._pool.gate import Gate
from procession._pool.insights import Insights, Ledger, Slowest
from procession._pool.jobs import CLOSE, RUN, TERMINATE, Jobs
from procession._pool.launcher import Launcher
from procession._pool.lookout import LONGEST_SLEEP_S, Lookout
from procession._pool.member import Member, Table
from procession._pool.requests import Requests
from procession._pool.restart import RestartBudget
from procession._pool.results import HOLD_S
from procession._pool.stall import Stall
from procession._pool.state import Unit, Worker
from procession._pool.stops import Stops
from procession._proc.results import unpack_error
from procession._wire import codec

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager
    from typing import Any

    from procession._pool.results import AsyncResult, Job, Stream
    from procession._pool.worker import Orders

__all__ = ["Engine", "Options"]

# How many answers are taken at once: enough to make the taking cheap, few enough that workers are not kept waiting.
_BATCH = 256
# For so long the collector waits on the queue itself, from which it wakes fastest, before it waits for all there is to wait for.
_HOT_S = 0.0005
# The collector's first look is this late: until then no worker can have come, and its maker has the first call to send.
_FIRST_LOOK_S = 0.002
# For so long it sleeps when nothing will be due; arbitrary.
_LONGEST_WAIT_S = 3600.0
# So often the collector looks at descriptors while answers keep coming.
_LOOK_S = 0.02
# A pool that has one task and ends this long after its first worker was ready has started no other: two interpreters that
# boot at once on few cores would have made the first result late. If the first takes long to be ready, they are not waited for.
_WARM_UP_S = 0.02
_LONGEST_WARM_UP_S = 0.5
_STALL_S = 30.0
_TERMINATE_GRACE_S = 2.0
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
        self.stall_report: float | None = _STALL_S
        for name, value in options.items():
            if not hasattr(self, name):
                raise TypeError(f"unknown option {name!r}")
            setattr(self, name, value)


class Engine:
    """A pool of workers that do jobs.

    Args:
        context: A context of procession's.
        size: Number of workers, at least 1.
        orders: What each worker is told.
        options: How they are treated.
    """

    inline = False

    def __init__(self, context: Any, size: int, orders: Orders, options: Options) -> None:
        orders.main_by_value = context.get_start_method() != "fork" and not codec.main_is_importable()
        self.size = size
        self.options = options
        self.most_items = orders.most_items or sys.maxsize
        self.functions = Registry(orders.main_by_value)
        table = Table(size)
        self.members, self._scheduler, self._lock, self._done = table.members, table.scheduler, table.lock, table.done
        self._jobs = Jobs(table.lock)
        self._dispatcher = Dispatcher(table, self._jobs, orders.main_by_value)
        self._stall = Stall(table, self._jobs, options.stall_report)
        self._stops = Stops(table, self._jobs, self._dispatcher, options.grace, options.hard_memory)
        self._lookout = Lookout(table)
        self._requests = Requests(self._dispatcher, self._lookout)
        self._slowest = Slowest()
        self._delivery = Delivery(table, self._stall, self._stops, self._slowest)
        self._wids = itertools.count(1)
        # The call whose caller is the collector now.
        self._leader: AsyncResult | None = None
        # Answers that a caller has taken and not acted on.
        self._taken: deque[tuple[Any, ...]] = deque()
        self._asleep = False
        self._budget = RestartBudget(
            max(4, 2 * size) if options.max_restarts is None else options.max_restarts, options.restart_period
        )
        now = time.monotonic()
        self._begun = self._last_look = self._idle_since = now
        # When the workers are started that nobody is waiting for.
        self._warm_at = now + _LONGEST_WARM_UP_S
        self._ledger = Ledger(now)
        self._shown: set[Any] = set()
        self._oom_kills: int | None = None  # not counted yet
        self._launcher = Launcher(context, orders)
        self._prepared = orders.initializer is not None or orders.worker_init is not None
        first: list[Member] = []
        # All that can be made before the forks is: after one, each page that is written to must first be copied.
        self._thread = threading.Thread(target=self._run, name="procession-pool", daemon=True)
        _alive.add(self._jobs)
        try:
            # The others are started by the collector: once there is work for them, or after a moment anyway.
            self._complete = size == 1 or self._launcher.method not in ("fork", "spawn", "forkserver")
            for _ in range(size if self._complete else 1):
                self._launch(first)
            for member in first:
                self._admit(member)
            self._thread.start()
        except BaseException:
            self._jobs.state = TERMINATE
            for member in first:
                if member.process is not None:
                    member.process.terminate()
                    member.process.join()
                member.close()
            self._close()
            raise
        self._finalizer = util.Finalize(self, Engine._at_exit, args=(weakref.ref(self),), exitpriority=15)

    # -- for callers

    def check(self) -> None:
        """Raise what stands in the way of a new job; see `Jobs.check`."""
        self._jobs.check()

    @property
    def state(self) -> str:
        """RUN, CLOSE or TERMINATE."""
        return self._jobs.state

    @state.setter
    def state(self, state: str) -> None:
        self._jobs.state = state

    @property
    def broken(self) -> BaseException | None:
        """Why it has given up."""
        return self._jobs.broken

    @property
    def forked(self) -> bool:
        """This process is a fork of its owner."""
        return self._jobs.forked

    @property
    def jobs(self) -> list[Job]:
        """The jobs without a result."""
        return list(self._jobs.open)

    def submit(self, job: Job) -> None:
        """Have a job done; returns at once."""
        self._jobs.check()
        job.engine = self
        if job.progress is not None:
            self._shown.add(job.progress)
        with self._lock:
            self._jobs.check()  # again: it may have ended meanwhile, and have told those whom it knew
            self._jobs.open.add(job)
            self._requests.pending.append(partial(self._accept, job))
        self._requests.wake_up()

    def _accept(self, job: Job) -> None:
        with self._lock:
            if not job.settled:
                if self._scheduler.idle:
                    self._stall.last_answer = time.monotonic()
                self._scheduler.add_source(job)

    def submit_stream(self, stream: Stream) -> None:
        """Have a stream's input read and its items done."""
        self._jobs.check()
        stream.engine = self
        if stream.progress is not None:
            self._shown.add(stream.progress)
        feeder = threading.Thread(target=stream.feed, name="procession-input", daemon=True)
        with self._lock:
            self._jobs.check()
            self._jobs.open.add(stream)
            self._jobs.streams.add(stream)
            self._requests.pending.append(feeder.start)
        # Its input may give nothing for long, which is seen by who looks around.
        self._requests.wake_up()

    def source_ready(self, job: Stream) -> None:
        """A stream has something to give out, or its input is at its end; said by its feeder."""
        with self._lock:
            if job.input_ended:
                self._jobs.streams.discard(job)
            if self._jobs.ended or job.settled:
                return
            self._scheduler.add_source(job)
        if self._asleep:
            self._asleep = False
            self.nudge()
        self._dispatcher.pump()
        if self._lookout.parked:
            self._lookout.parked = False
            self.nudge()

    def look_soon(self) -> None:
        """Have the collector look whether a stream holds something back."""
        self._lookout.rouse()

    def calling_back(self) -> AbstractContextManager[None]:
        """Around a callback; see `Requests.calling_back`."""
        return self._requests.calling_back()

    def _have_done(self, action: Callable[[], object]) -> None:
        """Do `action`, in the engine's thread where it might be broken off here; return when it is done."""
        if threading.current_thread() is not threading.main_thread() or not self.alive:
            action()
            return
        done: list[bool] = []
        gate = Gate()

        def act() -> None:
            try:
                action()
            finally:
                done.append(True)
                gate.open()

        self._requests.pending.append(act)
        self._requests.wake_up()
        while not gate.wait(lambda: done, LONGEST_SLEEP_S) and self.alive:
            self.nudge()

    def call(self, job: AsyncResult) -> Any:
        """Have a call done and return its result; the fast way, if nobody else is waiting for anything."""
        self._jobs.check()
        self._check_can_wait()
        job.engine = self
        clean = False
        try:
            # What has a deadline is the thread's to watch.
            if job.timeout is None and self.options.hard_memory is None:
                with self._dispatcher.sending:
                    self._begin_alone(job)
                if self._leader is job:
                    self._lead(job)
            clean = True
        finally:
            # Up to here nothing has been called since an exception was raised.
            if self._leader is job:
                self._leader = None
            if not clean:
                self._requests.pending.append(partial(self._forget, job))
            if self._requests.pending or self._taken or self._jobs.open or self._jobs.state != RUN:
                self.nudge()
        if not job.begun:
            self.submit(job)
        return job.get()

    def _forget(self, job: AsyncResult) -> None:
        """The caller of a job has been broken off while it was the collector."""
        job.abandon(TaskCancelledError("its caller was interrupted"))
        self._drop(job)
        self._dispatcher.audit(time.monotonic(), 0.0)

    def _begin_alone(self, job: AsyncResult) -> None:
        """Give a call to an idle worker and make its caller the collector, if nothing else is going on."""
        with self._lock:
            self._jobs.check()
            if self._leader is not None or self._taken or self._requests.pending or not self._scheduler.idle:
                return
            worker = self._idle_worker()
            unit = None if worker is None else job.next_unit(1)
            if worker is None or unit is None:
                return
            self._leader = job
            self._jobs.open.add(job)
            self._stall.last_answer = self._idle_since = now = time.monotonic()
            self._scheduler.assign_now(worker, unit, now)
        self._dispatcher.send(self.members[worker.wid], [unit])

    def _lead(self, job: AsyncResult) -> None:
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
                    self.nudge()
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

    def _idle_worker(self) -> Worker | None:
        for member in self.members.values():
            if member.worker.accepting and not member.worker.units:
                return member.worker
        return None

    def nudge(self) -> None:
        """Have the collector look around."""
        self._lookout.nudge()

    def wait(self, gate: Gate, passed: Callable[[], object], timeout: float | None) -> bool:
        """Wait until `passed()`, which is looked at when `gate` opens; False if `timeout` seconds have gone by."""
        if timeout is None:
            self._check_can_wait()
        if self._requests.pending:
            self.nudge()
        return gate.wait(passed, timeout)

    def pump(self) -> None:
        """Have what was submitted given to the workers that have room; returns when it has been."""
        self._have_done(self._dispatcher.pump)

    def _check_can_wait(self) -> None:
        if threading.current_thread() is self._thread:
            raise RuntimeError(
                "a callback cannot wait for a result: it is called by the thread that collects them. "
                "Use apply_async() or map_async() there, with a callback."
            )

    def cancel(self, job: Job) -> bool:
        """Cancel a job; False if it has a result already."""
        if job.settled:
            return False
        self._have_done(partial(self._cancel, job))
        return job.settled

    def take_back(self, job: Job) -> bool:
        """Take back a call that a worker has been given; False if it has begun with it."""
        taken = self._dispatcher.take_back(job)
        if taken:
            self.nudge()
        return taken

    def _cancel(self, job: Job) -> None:
        job.abandon(TaskCancelledError(f"{job.function.name}() was cancelled"))
        self._drop(job)

    def drop(self, job: Job) -> None:
        """Nobody wants the results of a job any more."""
        if not self._jobs.forked:
            self._have_done(partial(self._drop, job))

    def _drop(self, job: Job) -> None:
        self._stops.drop(job)
        self.nudge()

    def forsake(self, stream: Stream) -> None:
        """The iterator over a stream is gone. The garbage collector says so, at any place: no lock can be taken here."""
        if not self._jobs.forked:
            self._jobs.forsake(stream)
            self.nudge()

    def settled(self, job: Job) -> None:
        """A job has its result."""
        self._jobs.open.discard(job)
        if job is self._leader and threading.get_ident() == self._thread.ident:
            # The collector had been waiting for answers when its caller began to, and got this one.
            self._done.put((m.NUDGE,))
        function = job.function
        if not function.kept:
            for member in list(self.members.values()):
                if function.fid in member.defined:
                    member.defined.discard(function.fid)
                    member.forgotten.append(function.fid)

    def resize(self, size: int) -> None:
        """Have `size` workers from now on: more are started, those too many leave after what they have in hand."""
        self._jobs.check()
        if size < 1:
            raise ValueError("Number of processes must be at least 1")
        self.size = self._scheduler.expected = size
        self._complete = True
        self.nudge()

    def _needed(self) -> int:
        """Return how many workers there must be."""
        return min(self.size, max(1, len(self._jobs.open))) if self.options.on_demand else self.size

    def processes(self) -> list[Any]:
        """Return the workers' processes; waits until all that are needed have been started."""
        self._complete = True
        self.nudge()
        here = threading.current_thread() is self._thread
        while (
            not here
            and self.alive
            and not self._asleep
            and len(self.members) < self._needed()
            and self._jobs.state == RUN
        ):
            time.sleep(0.0005)
        return [member.process for member in list(self.members.values())]

    def close(self) -> None:
        """Take no more jobs; the workers leave when all is done."""
        if self._jobs.state == RUN:
            self._jobs.state = CLOSE
            self.nudge()

    def release_streams(self, all_of_them: bool) -> None:
        """Nobody will consume while the pool is joined; see `Jobs.release_streams`."""
        self._jobs.release_streams(all_of_them)

    def terminate(self) -> None:
        """Drop all jobs and end the workers; returns when they have ended, unless called by a callback."""
        if self._jobs.forked:
            return
        self._jobs.state = TERMINATE
        self.nudge()
        self.join()

    def join(self, timeout: float | None = None) -> None:
        """Wait until the workers have left after `close` or `terminate`."""
        if threading.current_thread() is not self._thread:
            self._stall.joining += 1
            try:
                self._thread.join(timeout)
            finally:
                self._stall.joining -= 1
            if not self._thread.is_alive():
                self._finalizer.cancel()

    @property
    def alive(self) -> bool:
        """The engine has not ended."""
        return self._thread.is_alive()

    @staticmethod
    def _at_exit(reference: weakref.ref[Engine]) -> None:
        engine = reference()
        if engine is not None and not engine.forked:
            engine.terminate()

    def insights(self) -> Insights:
        """Return what the workers have done with their time."""
        now = time.monotonic()
        with self._lock:
            rows = [member.insights(now) for member in self.members.values()]
        return self._ledger.insights(rows, self._slowest.tasks(), now)

    # -- the collector

    def _run(self) -> None:
        try:
            # Whoever made the pool goes on first: only then does this thread let go of the interpreter's lock.
            self._lookout.sleep(_FIRST_LOOK_S)
            while self._step():
                pass
        except BaseException as error:
            # A fault of ours: whoever waits must hear of it.
            sys.excepthook(type(error), error, error.__traceback__)
            self._jobs.give_up(PoolBrokenError(f"the pool's own thread failed: {error!r}"))
        finally:
            try:
                self._jobs.abandon_all(TaskCancelledError("the pool was terminated"))
                self._end_workers()
            finally:
                self._close()

    def _step(self) -> bool:
        """Look around once; False when there is nothing left to do."""
        messages: list[Any] = []
        active = False
        if self._requests.pending:
            self._requests.see_to()
        if self._leader is None:
            if self._taken:
                left = [self._taken.popleft() for _ in range(len(self._taken))]
                self._process(left)
            starting = any(member.ready is None for member in list(self.members.values()))
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

    def _sleep(self, timeout: float, active: bool) -> None:
        """Sleep until something happens: an answer, a death, a nudge, or `timeout` seconds."""
        lookout = self._lookout
        if active:
            timeout = min(timeout, lookout.listen())
        if self._leader is not None:
            timeout = min(timeout, 1.0)  # it may be broken off, and not come to say so
        lookout.parked, lookout.sleeping = not active, True
        if self._requests.pending or self._taken or (not active and self._leader is None and not self._scheduler.idle):
            timeout = 0.0  # given to it meanwhile, by one who saw it awake
        lookout.sleep(timeout)

    def _on_time(self, now: float) -> float:
        """Do what is due; return how long nothing will be."""
        wait = min(self._jobs.tick(now), _LONGEST_WAIT_S)
        with self._lock:
            busy = not self._scheduler.idle
        wait = min(wait, self._dispatcher.tick(now, busy and self._leader is None), self._stops.tick(now, busy))
        self._adjust(now, busy)
        if not self._complete:
            wait = min(wait, max(self._warm_at - now, 0.001))
        if self.options.idle_timeout is not None and self.members:
            wait = min(wait, max(self._idle_since + self.options.idle_timeout - now, 0.01))
        for shown in list(self._shown):
            wait = min(wait, shown.tick(now))
            if shown.closed:
                self._shown.discard(shown)
        return min(wait, self._stall.tick(now, busy))

    def _adjust(self, now: float, busy: bool) -> None:
        """Start and stop workers until there are as many as there should be."""
        if self._jobs.state != RUN and not busy:
            return
        if busy:
            self._idle_since = now
            self._asleep = False
        elif self.options.idle_timeout is not None and now - self._idle_since >= self.options.idle_timeout:
            self._asleep = True
        if self._oom_kills is None and now - self._begun >= _WARM_UP_S:
            self._oom_kills = _oom_kills()
        if not self._complete and (self._scheduler.short_of_workers or now >= self._warm_at):
            self._complete = True
        staying = [member for member in self.members.values() if not member.leaving]
        wanted = 0 if self._asleep else self._needed() if self._complete else 1
        if self.options.on_demand and not self._asleep:
            wanted = max(wanted, len(staying))
        while len(staying) < wanted and self._jobs.broken is None:
            try:
                staying.append(self._start_worker())
            except Exception as error:
                broken = PoolBrokenError(f"no worker could be started: {error}")
                broken.__cause__ = error
                self._jobs.give_up(broken)
                return
        for member in sorted(staying, key=lambda member: len(member.worker.units))[: max(0, len(staying) - wanted)]:
            self._dismiss(member)
        if len(staying) > wanted or busy:
            self._dispatcher.pump()

    def _dismiss(self, member: Member) -> None:
        """Have a worker leave after what it has in hand."""
        with self._lock:
            member.leaving = True
            member.worker.accepting = False
        self._dispatcher.dismiss(member)

    # -- what comes in

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
        member = self.members.get(message[1])
        if kind == m.DIED:
            if member is not None:
                self._bury(member, now)
        elif kind == m.READY:
            if member is not None:
                member.ready = member.worker.since = now
                self._warm_at = min(self._warm_at, now + _WARM_UP_S)
        elif kind == m.FAILED:
            if member is not None:
                member.error = unpack_error(message[2])
        elif kind == m.LEAVING:
            if member is not None:
                with self._lock:
                    member.leaving = True
                    member.worker.accepting = False
        elif kind == m.PONG:
            self._dispatcher.lost(message[1], message[2])
        else:
            self._dispatcher.not_done(message, now)

    # -- workers

    def _launch(self, launched: list[Member]) -> None:
        """Start a process and append it to `launched`; it can be given work once it is admitted."""
        wid = next(self._wids)
        member = Member(wid, Worker(wid), time.monotonic())
        process = self._launcher.start(wid, member.inbox, self._done, member.cells)
        member.process = process
        launched.append(member)

    def _admit(self, member: Member) -> None:
        member.watch, member.owns_watch = self._launcher.watch(member.process)
        with self._lock:
            member.worker = self._scheduler.add_worker(member.wid)
            self.members[member.wid] = member
            self._lookout.add(member)

    def _start_worker(self) -> Member:
        launched: list[Member] = []
        self._launch(launched)
        self._admit(launched[0])
        return launched[0]

    def _bury(self, member: Member, now: float) -> None:
        """A worker's process has ended and all it had to say has been heard."""
        process = member.process
        process.join()
        for _ in range(_REAPED_ELSEWHERE):
            if process.exitcode is not None:
                break
            # Another thread, in active_children(), has reaped it and is about to say so.
            time.sleep(0.001)
        code = process.exitcode
        with self._dispatcher.sending:
            undelivered = self._dispatcher.undelivered(member)
            cells = member.cells
            index = cells[m.INDEX_CELL] if cells[m.RUNNING_CELL] == cells[m.SEQ_CELL] else None
            running = (cells[m.SEQ_CELL], index)
            with self._lock:
                self._ledger.left(member.insights(now, describe_exit(code) if code else "ended"))
                self.members.pop(member.wid, None)
                loss = self._scheduler.worker_left(member.wid, undelivered, running)
        self._lookout.remove(member)
        member.close()
        if loss.unit is not None:
            self._lost(loss.unit, member, code)
        if member.leaving:
            return
        self._ledger.restarts += 1
        if member.error is not None:
            broken = PoolBrokenError(f"the initializer raised {type(member.error).__name__}: {member.error}")
            broken.__cause__ = member.error
            self._jobs.give_up(broken)
            return
        # A death that costs a task, or one in the midst of many, ends with the tasks; only the others could go on for ever.
        futile = member.ready is None or not (loss.in_hand or member.worker.items)
        if (futile or self.options.max_restarts is not None) and not self._budget.spend(now):
            when = "before it was ready" if member.ready is None else "while it ran a task" if loss.in_hand else "idle"
            self._jobs.give_up(
                PoolBrokenError(
                    f"more than {self._budget.intensity} workers died within {self._budget.period:g} s. The last, "
                    f"{process.name} (pid {process.pid}), ended with exit code {code} {when}. "
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
            error = WorkerDiedError(unit.call_text(), member.process.name, member.process.pid, code, oom, unit.deaths)
        job.put_error(unit.first, error)

    # -- the end

    def _may_leave(self) -> bool:
        """After close(): all is done; the workers have been told to leave, and have left."""
        with self._lock:
            if (
                self._requests.pending
                or self._taken
                or self._leader is not None
                or self._jobs.streams
                or not self._scheduler.idle
            ):
                return False
            members = list(self.members.values())
        if members:
            self._launcher.retire()
        for member in members:
            if not member.leaving:
                self._dismiss(member)
                if member.ready is None and not self._prepared:
                    # Still importing, for nothing.
                    member.process.terminate()
        return not members

    def _end_workers(self) -> None:
        """SIGTERM, and after a grace SIGKILL."""
        members = list(self.members.values())
        for step in (signal.SIGTERM, signal.SIGKILL):
            for member in members:
                if member.process.exitcode is None and member.process.pid is not None:
                    with contextlib.suppress(OSError):
                        os.kill(member.process.pid, step)
            deadline = time.monotonic() + _TERMINATE_GRACE_S
            for member in members:
                member.process.join(max(0.0, deadline - time.monotonic()) if step == signal.SIGTERM else None)
            if all(member.process.exitcode is not None for member in members):
                break
        now = time.monotonic()
        for member in members:
            member.close()
            with self._lock:
                self._ledger.left(member.insights(now, "ended"))
                self.members.pop(member.wid, None)

    def _close(self) -> None:
        self._ledger.close(time.monotonic())
        self._launcher.close()
        self._lookout.close()


_alive: weakref.WeakSet[Jobs] = weakref.WeakSet()


def _after_fork() -> None:
    for jobs in list(_alive):
        jobs.forked = True


os.register_at_fork(after_in_child=_after_fork)


def _oom_kills() -> int:
    from procession._proc.cgroups import oom_kills

    return oom_kills()
