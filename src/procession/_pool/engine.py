"""The engine: one thread that collects, two kinds of queues, and a scheduler that knows who holds what.

::

    caller                              parent                                workers
    submit(job) ──► Scheduler ──plan──► an inbox each ───────────────────► take, run
                        ▲                                                     │
    job.get() ◄── put_value ◄── collector ◄───────── one queue of answers ◄───┘

Every change of what is known about a unit comes out of the queue of answers, the death of a worker too: it is put there when
its process has ended, and so behind everything the worker has said.

The main thread may be broken off by a KeyboardInterrupt after any call, and the pool be used on. So it changes nothing but by
single steps (a deque's `append`, an assignment) or in an order in which each beginning is harmless, and waits at a `Gate`; all
else it asks the engine's thread to do (`Requests`). What it has promised and not sent, or sent and lost sight of, is found by the
audit (`Dispatcher.audit`).

Locks, in the order in which they are taken: `Dispatcher.sending` (what goes into inboxes), `Table.lock` (the scheduler and the
members). The user's code (pickling, callbacks, iterators) never runs under `Table.lock`.

Here is what callers use, and the parts are put together. Each of them is given the others it needs, and none the engine.
"""

from __future__ import annotations

import sys
import threading
import time
import weakref
from functools import partial
from multiprocessing import util

from procession._pool import messages as m
from procession._pool.collector import Collector
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
from procession._pool.stall import Stall
from procession._pool.stops import Stops
from procession._wire import codec

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal
    from collections.abc import Callable
    from contextlib import AbstractContextManager
    from typing import Any

    from procession._pool.crew import Options
    from procession._pool.jobs import Job
    from procession._pool.member import Member
    from procession._pool.results import AsyncResult
    from procession._pool.stream import Stream
    from procession._pool.worker import Orders

__all__ = ["Engine"]

# The collector's first look is this late: until then no worker can have come, and its maker has the first call to send.
_FIRST_LOOK_S = 0.002


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
        self._crew = Crew(table, self._jobs, self._dispatcher, self._lookout, Launcher(context, orders), options)
        self._collector = Collector(
            table,
            self._jobs,
            requests=self._requests,
            lookout=self._lookout,
            dispatcher=self._dispatcher,
            delivery=self._delivery,
            stops=self._stops,
            stall=self._stall,
            crew=self._crew,
        )
        first: list[Member] = []
        # All that can be made before the forks is: after one, each page that is written to must first be copied.
        self._thread = threading.Thread(target=self._run, name="procession-pool", daemon=True)
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
            self._jobs.shown.add(job.progress)
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
            self._jobs.shown.add(stream.progress)
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
        # What has a deadline is the thread's to watch.
        if job.timeout is None and self.options.hard_memory is None:
            self._collector.lead(job)
        if not job.begun:
            self.submit(job)
        return job.get()

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
        if job is self._collector.leader and threading.get_ident() == self._thread.ident:
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

    def terminate_by(self, signum: signal.Signals) -> None:
        """Have the workers ended by this signal; from here on a death is none that is made good."""
        self._crew.farewell = signum
        self._jobs.state = TERMINATE

    def leave(self) -> None:
        """End the workers, and wait for nothing: nobody has the pool any longer."""
        if self._jobs.state == RUN and not self._jobs.forked:
            self._jobs.state = TERMINATE
            self.nudge()

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
            while self._collector.step():
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

    def _close(self) -> None:
        self._crew.close()
        self._lookout.close()
