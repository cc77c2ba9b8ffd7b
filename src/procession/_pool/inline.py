"""``workers=0``: the pool without processes. Everything runs where it is called, so that a debugger sees it."""

from __future__ import annotations

import contextlib
import os
import time

from procession._pool import messages as m
from procession._pool.errors import TaskCancelledError
from procession._pool.functions import Registry
from procession._pool.insights import Insights, Ledger, SlowTask, WorkerInsights
from procession._pool.worker import seed_task

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager
    from typing import Any

    from procession._pool.gate import Gate
    from procession._pool.jobs import Job
    from procession._pool.results import AsyncResult
    from procession._pool.stream import Stream
    from procession._pool.worker import Orders

__all__ = ["InlineEngine"]


class InlineEngine:
    """Has the interface of `Engine`, and does each job within `submit`; a stream item by item, as it is asked for."""

    inline = True
    most_items = 1
    size = 1

    def __init__(self, orders: Orders) -> None:
        self.functions = Registry(False)
        self.state = "RUN"
        self.members: dict[int, Any] = {}
        self.worker_state: dict[str, Any] = {}
        self._orders = orders
        self._ledger = Ledger(time.monotonic())
        self._items = 0
        self._working = 0.0
        self._slowest: list[SlowTask] = []
        if orders.initializer is not None:
            orders.initializer(*orders.initargs)
        if orders.worker_init is not None:
            self._call(orders.worker_init)

    def _call(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        return function(self.worker_state, *args, **kwargs) if self._orders.with_state else function(*args, **kwargs)

    def check(self) -> None:
        if self.state != "RUN":
            raise ValueError("Pool not running")

    def submit(self, job: Job) -> None:
        self.check()
        job.engine = self
        while not job.settled and (unit := job.next_unit(1)) is not None:
            for index, item in enumerate([unit.items] if unit.single else unit.items, unit.first):
                self._run(job, index, item)

    def _run(self, job: Job, index: int, item: Any) -> None:
        function = job.function
        if function.seed is not None:
            seed_task(function.seed, index)
        begun = time.perf_counter()
        try:
            if function.mode == m.EACH:
                value = self._call(function.function, item)
            elif function.mode == m.STAR:
                value = self._call(function.function, *item)
            else:
                value = self._call(function.function, *item[0], **item[1])
        except Exception as error:
            self._took(time.perf_counter() - begun, job, item)
            job.put_error(index, error)
        else:
            self._took(time.perf_counter() - begun, job, item)
            job.put_value(index, value)
        if job.progress is not None:
            job.progress.tick(time.monotonic())

    def _took(self, seconds: float, job: Job, item: Any) -> None:
        self._items += 1
        self._working += seconds
        if len(self._slowest) < 5 or seconds > self._slowest[-1].seconds:
            task = SlowTask(seconds, job.function.describe(item))
            self._slowest = sorted([*self._slowest, task], key=lambda one: -one.seconds)[:5]

    def insights(self) -> Insights:
        now = time.monotonic()
        me = WorkerInsights("this process", os.getpid(), "waiting", self._items, 0.0, 0.0, self._working)
        return self._ledger.insights([me], self._slowest, now)

    def call(self, job: AsyncResult) -> Any:
        self.submit(job)
        return job.get()

    def submit_stream(self, stream: Stream) -> None:
        self.check()
        stream.engine = self

    def pull(self, stream: Stream) -> None:
        """Do a stream's next item."""
        if stream.read_one():
            unit = stream.next_unit(1)
            if unit is not None:
                self._run(stream, unit.first, unit.items if unit.single else unit.items[0])

    def source_ready(self, job: Job) -> None:
        """Nothing: the item is done at once."""

    @staticmethod
    def wait(gate: Gate, passed: Callable[[], object], timeout: float | None) -> bool:
        """Wait at `gate`; what another thread has asked for it also does."""
        return gate.wait(passed, timeout)

    @staticmethod
    def calling_back() -> AbstractContextManager[None]:
        """Nobody else is kept from anything."""
        return contextlib.nullcontext()

    def cancel(self, job: Job) -> bool:
        if job.settled:
            return False
        job.abandon(TaskCancelledError(f"{job.function.name}() was cancelled"))
        return True

    def drop(self, job: Job) -> None:
        """Nothing runs on."""

    def forsake(self, stream: Stream) -> None:
        """Nothing runs on."""

    def settled(self, job: Job) -> None:
        """Nothing is remembered."""

    def resize(self, size: int) -> None:
        """There are no workers."""

    def processes(self) -> list[Any]:
        return []

    def close(self) -> None:
        if self.state == "RUN":
            self.state = "CLOSE"
            if self._orders.worker_exit is not None:
                self._call(self._orders.worker_exit)

    def release_streams(self, all_of_them: bool) -> None:
        """They run as they are asked."""

    def terminate(self) -> None:
        self.close()
        self.state = "TERMINATE"

    def nudge(self) -> None:
        """There is no thread."""

    def leave(self) -> None:
        self.state = "TERMINATE"

    def join(self, timeout: float | None = None) -> None:
        """Nothing runs."""
