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
import os
import sys
import threading
import time
import weakref
from collections import deque
from functools import partial
from multiprocessing import util
from queue import Empty

from procession._pool import messages as m
from procession._pool.crew import Crew
from procession._pool.delivery import Delivery
from procession._pool.dispatch import Dispatcher
from procession._pool.errors import PoolBrokenError, TaskCancelledError
from procession._pool.functions import Registry
from procession._pool.gate import Gate
from procession._pool.insights import Insights, Slowest
from procession._pool.jobs import CLOSE, RUN, TERMINATE, Jobs
from procession._pool.launcher import Launcher
from procession._pool.lookout import LONGEST_SLEEP_S, Lookout
from procession._pool.member import Table
from procession._pool.requests import Requests
from procession._pool.results import HOLD_S
from procession._pool.stall import Stall
from procession._pool.stops import Stops
from procession._proc.results import unpack_error
from procession._wire import codec

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager
    from typing import Any

    from procession._pool.crew import Options
    from procession._pool.member import Member
    from procession._pool.results import AsyncResult, Job, Stream
    from procession._pool.state import Unit, Worker
    from procession._pool.worker import Orders

__all__ = ["Engine"]

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
        # The call whose caller is the collector now.
        self._leader: AsyncResult | None = None
        # Answers that a caller has taken and not acted on.
        self._taken: deque[tuple[Any, ...]] = deque()
        self._last_look = time.monotonic()
        self._shown: set[Any] = set()
        self._crew = Crew(table, self._jobs, self._dispatcher, self._lookout, Launcher(context, orders), options)
        first: list[Member] = []
        # All that can be made before the forks is: after one, each page that is written to must first be copied.
        self._thread = threading.Thread(target=self._run, name="procession-pool", daemon=True)
        _alive.add(self._jobs)
        try:
            self._crew.start(first)
            self._thread.start()
        except BaseException:
            self._jobs.state = TERMINATE
            self._crew.undo(first)
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
        if self._crew.asleep:
            self._crew.asleep = False
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
            self._stall.last_answer = self._crew.idle_since = now = time.monotonic()
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
        self._crew.complete = True
        self.nudge()

    def processes(self) -> list[Any]:
        """Return the workers' processes; waits until all that are needed have been started."""
        self._crew.complete = True
        self.nudge()
        here = threading.current_thread() is self._thread
        while (
            not here
            and self.alive
            and not self._crew.asleep
            and len(self.members) < self._crew.needed
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
        return self._crew.insights(self._slowest.tasks())

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
                self._crew.end()
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
        wait = min(wait, self._crew.tick(now, busy))
        for shown in list(self._shown):
            wait = min(wait, shown.tick(now))
            if shown.closed:
                self._shown.discard(shown)
        return min(wait, self._stall.tick(now, busy))

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
        return self._crew.retire()

    def _close(self) -> None:
        self._crew.close()
        self._lookout.close()


_alive: weakref.WeakSet[Jobs] = weakref.WeakSet()


def _after_fork() -> None:
    for jobs in list(_alive):
        jobs.forked = True


os.register_at_fork(after_in_child=_after_fork)
