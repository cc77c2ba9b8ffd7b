"""`ProcessPoolExecutor`: the interface of `concurrent.futures` on the engine that `Pool` has.

A future is at once the job that the scheduler takes its unit from. It is RUNNING from the moment it is given to a worker; until
the worker begins with it `cancel` takes it back all the same.
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
from concurrent.futures import Future, InvalidStateError
from concurrent.futures._base import CANCELLED, PENDING, RUNNING
from functools import partial
from multiprocessing import util

from procession._pool import messages as m
from procession._pool.engine import Engine
from procession._pool.errors import PoolBrokenError, TaskCancelledError, UnpicklingFailedError
from procession._pool.functions import describe_call
from procession._pool.gate import Gate
from procession._pool.jobs import RUN, Job
from procession._pool.pool import orders_and_options
from procession._pool.state import Unit
from procession._proc.threads import within_share
from procession._wire import codec

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    # Its private attributes are not ours.
    from concurrent.futures import Executor as _Base
    from typing import Any

    from procession._pool.functions import Function

else:
    from concurrent.futures.process import ProcessPoolExecutor as _Base

__all__ = ["ProcessPoolExecutor", "TaskFuture"]


def _apply(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return function(*args, **kwargs)


def _apply_with_state(
    state: dict[str, Any], function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    return function(state, *args, **kwargs)


def _apply_each(function: Callable[..., Any], chunk: tuple[tuple[Any, ...], ...]) -> list[Any]:
    return [function(*args) for args in chunk]


def _apply_each_with_state(
    state: dict[str, Any], function: Callable[..., Any], chunk: tuple[tuple[Any, ...], ...]
) -> list[Any]:
    return [function(state, *args) for args in chunk]


class TaskFuture(Future, Job):  # type: ignore[type-arg]
    """The future of one call; what `ProcessPoolExecutor.submit` returns."""

    unpickling_error = UnpicklingFailedError

    def __init__(self, engine: Engine, function: Function, item: Any) -> None:
        super().__init__()
        self.engine = engine
        self.function = function
        self.timeout = engine.options.timeout
        self.retries = engine.options.retries
        self._unit: Unit | None = Unit(self, 0, item, 1, True)
        self._blocked = 0
        self._gate = Gate()

    # -- for the caller

    def result(self, timeout: float | None = None) -> Any:
        """Wait for the result and return it.

        Raises:
            TimeoutError: `timeout` seconds have passed; the task goes on.
            CancelledError: It was cancelled.
            WorkerDiedError: A worker died of it; the executor goes on.
            TaskTimeoutError: It took longer than the executor's `timeout`.
            BaseException: What the function raised, with the worker's traceback as its cause.
        """
        self._wait(timeout)
        return super().result(0)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Wait like `result()` and return what the call raised, None if it returned.

        Raises:
            TimeoutError, CancelledError: As for `result()`.
        """
        self._wait(timeout)
        return super().exception(0)

    def _invoke_callbacks(self) -> None:
        self._gate.open()
        if self._done_callbacks:
            with self.engine.calling_back():
                super()._invoke_callbacks()  # type: ignore[misc]

    def _wait(self, timeout: float | None) -> None:
        self._blocked += 1
        try:
            self._gate.wait(partial(getattr, self, "settled"), timeout)
        finally:
            self._blocked -= 1

    def cancel(self) -> bool:
        """Cancel the call, unless a worker has begun with it.

        Returns:
            False if it runs or is done.
        """
        return self.cancel_waiting() or self._take_back()

    def cancel_waiting(self) -> bool:
        """Cancel the call if no worker has been given it. Takes no lock of the engine's: a finalizer may call this."""
        if not super().cancel():
            return False
        with self._condition:
            if self._state == CANCELLED:
                self.set_running_or_notify_cancel()
        self._unit = None
        self.engine.settled(self)
        return True

    def _take_back(self) -> bool:
        if not self.running() or not self.engine.take_back(self):
            return False
        with self._condition:
            if self._state == RUNNING:
                self._state = PENDING
        return self.cancel_waiting()

    # -- for the engine

    @property
    def settled(self) -> bool:  # type: ignore[override]
        """It has its result, or was cancelled."""
        return self._state not in (PENDING, RUNNING)

    @property
    def waited_for(self) -> int:  # type: ignore[override]
        """How many wait for it, or want to be called."""
        return self._blocked + len(self._waiters) + len(self._done_callbacks)

    @property
    def unit_seconds(self) -> float | None:  # type: ignore[override]
        return self.function.seconds

    def observe(self, items: int, seconds: float) -> None:
        """The function remembers, for the calls to come."""

    def snapshot(self) -> None:
        """Pickle the arguments now, unless their copy cannot differ: what the caller changes later is not seen."""
        unit = self._unit
        if unit is not None and not m.is_plain(unit.items):
            with contextlib.suppress(Exception):  # said when it is sent, where the future can hear it
                by_value = self.function.main_by_value
                unit.data = codec.encode_beside(unit.items, main_by_value=by_value, lasting=True)

    def next_unit(self, workers: int) -> Unit | None:  # noqa: ARG002
        unit, self._unit = self._unit, None
        if unit is None:
            return None
        with self._condition:
            return unit if self._state == PENDING and self.set_running_or_notify_cancel() else None

    def next_units(self, most: int, workers: int) -> list[Unit]:  # noqa: ARG002
        unit = self.next_unit(workers)
        return [] if unit is None else [unit]

    def call_text(self, unit: Unit) -> str:
        if self.function.function not in (_apply, _apply_with_state):
            return super().call_text(unit)
        function, args, kwargs = unit.items
        return describe_call(str(getattr(function, "__qualname__", type(function).__qualname__)), args, kwargs)

    def put_value(self, index: int, value: Any) -> None:  # noqa: ARG002
        self._resolve(self.set_result, value)

    def put_error(self, index: int, error: BaseException) -> None:  # noqa: ARG002
        self._resolve(self.set_exception, error)

    def refused(self, error: BaseException) -> BaseException:
        text = f"the arguments of {self.function.name}() could not be unpickled in the worker: {error}"
        failure = self.unpickling_error(type(error).__qualname__, text)
        failure.__cause__ = error
        return failure

    def abandon(self, error: BaseException) -> None:
        if isinstance(error, TaskCancelledError):
            if self.cancel_waiting():
                return
            error = PoolBrokenError("the executor's workers were ended before this call was done")
        self.put_error(0, error)

    def _resolve(self, resolve: Callable[[Any], None], outcome: Any) -> None:
        self.engine.settled(self)
        try:
            resolve(outcome)
        except InvalidStateError:
            pass  # cancelled meanwhile
        except BaseException as error:
            # A callback's SystemExit: it is called by the thread that collects, which must go on.
            sys.excepthook(type(error), error, error.__traceback__)


class ProcessPoolExecutor(_Base):
    """`concurrent.futures.ProcessPoolExecutor`, which a death does not break.

    A worker that is killed costs the call it was at: its future gets a `WorkerDiedError`, which is a `BrokenProcessPool`, or
    the call is tried again (`retries`). All others go on, and the worker is replaced. The workers are started with the
    first call.

    Args:
        max_workers: Number of workers; None for `cpu_count()`.
        mp_context: A context of procession's or the standard library's; None for the default one.
        initializer: Called in each worker as it starts. If it raises, the executor is broken and says so.
        initargs: Its arguments.
        max_tasks_per_child: A worker is replaced after this many calls; None never. With any start method.
        options: ``retries``, ``timeout`` (seconds a call may take), ``grace``, ``memory_limit``, ``max_age_per_child``,
            ``worker_init``, ``worker_exit``, ``worker_state``, ``max_restarts``, ``restart_period``, ``idle_timeout``:
            as for `Pool`.

    Raises:
        ValueError: `max_workers` or `max_tasks_per_child` is less than 1.
        TypeError: `max_tasks_per_child` is no whole number, or `initializer` cannot be called.
    """

    def __init__(
        self,
        max_workers: int | None = None,
        mp_context: Any = None,
        initializer: Callable[..., object] | None = None,
        initargs: Iterable[Any] = (),
        *,
        max_tasks_per_child: int | None = None,
        **options: Any,
    ) -> None:
        self._engine: Engine | None = None
        if mp_context is None:
            raise TypeError("mp_context: a context of procession's is needed here; use procession.ProcessPoolExecutor")
        if max_workers is None:
            max_workers = within_share(int(mp_context.cpu_count()))
        if max_workers <= 0:
            raise ValueError("max_workers must be greater than 0")
        if max_tasks_per_child is not None:
            if not isinstance(max_tasks_per_child, int):
                raise TypeError("max_tasks_per_child must be an integer")
            if max_tasks_per_child <= 0:
                raise ValueError("max_tasks_per_child must be >= 1")
        self._orders, self._options = orders_and_options(
            max_workers, initializer, initargs, max_tasks_per_child, **options
        )
        self._orders.as_executor = True
        # As in the standard library: what is not forked takes long to start.
        self._options.on_demand = mp_context.get_start_method() != "fork"
        self._max_workers = max_workers
        self._mp_context = mp_context
        self._initializer = initializer
        self._initargs = initargs
        self._max_tasks_per_child = max_tasks_per_child
        self._shutdown_thread = False
        self._shutdown_lock = threading.Lock()
        # The process whose the workers are; a fork of it has a copy of this object, and no workers.
        self._owner: int | None = None

    # -- what programs poke at

    @property
    def _processes(self) -> dict[int, Any]:
        if self._engine is None:
            return {}
        return {process.pid: process for process in self._engine.processes()}

    @property
    def _broken(self) -> Any:
        return False if self._engine is None or self._engine.broken is None else str(self._engine.broken)

    @property
    def _call_queue(self) -> Any:
        """A queue in which calls go to a worker; each has one of its own."""
        members = [] if self._engine is None else list(self._engine.members.values())
        return members[0].inbox if members else None

    @property
    def _executor_manager_thread(self) -> threading.Thread | None:
        return None if self._engine is None else self._engine._thread

    # -- calls

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> TaskFuture:
        """Have ``fn(*args, **kwargs)`` called in a worker; returns at once.

        The arguments are pickled here and now; if they cannot be, the future says so.

        Raises:
            RuntimeError: After `shutdown`, at the interpreter's end, or in a fork of the process that made the workers.
            BrokenProcessPool: The executor has given up: workers cannot be started, or die before they do anything.
        """
        if self._owner is not None and self._owner != os.getpid():
            raise RuntimeError(
                "this executor made its workers before this process was forked, and they belong to the parent. "
                "Make an executor of its own in the child."
            )
        self._check()
        engine = self._engine or self._start()
        function = engine.functions.get(fn, m.CALL if kwargs else m.STAR)
        item: Any = (args, kwargs) if kwargs else args
        if not function.kept:
            # What is not found by name goes along with its arguments: the worker does not keep it.
            apply = _apply_with_state if self._orders.with_state else _apply
            function, item = engine.functions.get(apply, m.STAR), (fn, args, kwargs)
        future = TaskFuture(engine, function, item)
        future.snapshot()
        with self._shutdown_lock:
            self._check()
            engine.submit(future)
        return future

    def _check(self) -> None:
        engine = self._engine
        if engine is not None and engine.broken is not None:
            engine.check()
        if _exiting:
            raise RuntimeError("cannot schedule new futures after interpreter shutdown")
        if self._shutdown_thread or (engine is not None and engine.state != RUN):
            raise RuntimeError("cannot schedule new futures after shutdown")

    def _start(self) -> Engine:
        with self._shutdown_lock:
            self._check()
            if self._engine is None:
                self._owner = os.getpid()
                try:
                    self._engine = Engine(self._mp_context, self._max_workers, self._orders, self._options)
                except BaseException:
                    self._owner = None
                    raise
                _finish_at_exit(self._engine)
            return self._engine

    def map(
        self,
        fn: Callable[..., Any],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int = 1,
        buffersize: int | None = None,
    ) -> Iterator[Any]:
        """Return an iterator over ``fn`` of the items, in their order; the calls are submitted at once.

        Args:
            fn: Gets one item of each iterable.
            iterables: The items; read to their end first, unless there is a `buffersize`.
            timeout: Seconds from now within which a result must be there when it is asked for.
            chunksize: Items that make one call.
            buffersize: At most so many calls are submitted and not yet given out.

        Raises:
            ValueError: `chunksize` or `buffersize` is less than 1.
        """
        if chunksize < 1:
            raise ValueError("chunksize must be >= 1.")
        if buffersize is not None and not isinstance(buffersize, int):
            raise TypeError("buffersize must be an integer or None")
        if buffersize is not None and buffersize < 1:
            raise ValueError("buffersize must be None or > 0")
        deadline = None if timeout is None else timeout + time.monotonic()
        calls: Iterator[tuple[Any, ...]] = zip(*iterables, strict=False)
        submit: tuple[Any, ...] = (fn,)
        if chunksize > 1:
            submit = (_apply_each_with_state if self._orders.with_state else _apply_each, fn)
            calls = ((chunk,) for chunk in _chunks(calls, chunksize))
        futures = deque(self.submit(*submit, *call) for call in itertools.islice(calls, buffersize))
        # The iterator does not keep the executor alive.
        more = None if buffersize is None else (weakref.ref(self), submit, calls)
        results = _results(futures, more, deadline)
        return results if chunksize == 1 else _items(results)

    # -- the end

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more calls; the workers leave when all is done.

        Args:
            wait: Return when they have left.
            cancel_futures: What no worker has been given is cancelled.
        """
        engine = self._close()
        if engine is None:
            return
        if cancel_futures:
            # What was submitted before has been given to whoever was free, as it is in the standard library.
            engine.pump()
            for job in engine.jobs:
                job.cancel_waiting()
            engine.nudge()
        if wait:
            engine.join()

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        """Wait for all calls; but after a Ctrl-C or an exit, of which workers may have taken the next call, end them."""
        if kind is not None and not issubclass(kind, Exception):
            self.terminate_workers()
        self.shutdown(wait=True)

    def terminate_workers(self) -> None:
        """End the workers at once, by SIGTERM: what runs gets a `BrokenProcessPool`, what waits is cancelled."""
        self._end(signal.SIGTERM)

    def kill_workers(self) -> None:
        """End the workers at once, by SIGKILL: what runs gets a `BrokenProcessPool`, what waits is cancelled."""
        self._end(signal.SIGKILL)

    def _end(self, signum: signal.Signals) -> None:
        engine = self._close()
        if engine is None:
            return
        for job in engine.jobs:
            job.cancel_waiting()
        engine.terminate_by(signum)
        for process in self._processes.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signum)
        engine.terminate()

    def _close(self) -> Engine | None:
        """Take no more calls; return the engine, if it is there and this process's."""
        if self._owner is not None and self._owner != os.getpid():
            return None
        with self._shutdown_lock:
            self._shutdown_thread = True
            if self._engine is not None:
                self._engine.close()
            return self._engine

    def __del__(self) -> None:
        # Takes no lock: it may run at any allocation.
        engine = getattr(self, "_engine", None)
        if engine is not None and engine.state == RUN and self._owner == os.getpid():
            engine.close()


def _chunks(calls: Iterator[tuple[Any, ...]], size: int) -> Iterator[tuple[tuple[Any, ...], ...]]:
    while chunk := tuple(itertools.islice(calls, size)):
        yield chunk


def _results(futures: deque[TaskFuture], more: Any, deadline: float | None) -> Iterator[Any]:
    """Give out results in order, submitting a call for each where there are more; drop the rest when nobody wants it."""
    try:
        while futures:
            if more is not None:
                reference, submit, calls = more
                executor = reference()
                if executor is not None:
                    futures.extend(executor.submit(*submit, *call) for call in itertools.islice(calls, 1))
                del executor
            # No reference to what was given out is kept.
            yield _result_or_cancel(futures.popleft(), deadline)
    finally:
        for future in futures:
            future.cancel_waiting()


def _result_or_cancel(future: TaskFuture, deadline: float | None) -> Any:
    try:
        try:
            return future.result(None if deadline is None else deadline - time.monotonic())
        finally:
            future.cancel_waiting()
    finally:
        del future  # in the traceback it would be a cycle


def _items(chunks: Iterator[Any]) -> Iterator[Any]:
    for chunk in chunks:
        chunk.reverse()
        while chunk:
            yield chunk.pop()


# -- the end of the process: what was submitted is done first, as in the standard library

_open: weakref.WeakSet[Engine] = weakref.WeakSet()
_exiting = False
_finalizer_of = 0


def _finish_at_exit(engine: Engine) -> None:
    global _finalizer_of
    _open.add(engine)
    if _finalizer_of != os.getpid():
        # A child of multiprocessing's ends its pools (15) before its threads.
        _finalizer_of = os.getpid()
        util.Finalize(None, _finish, exitpriority=20)


def _finish() -> None:
    global _finalizer_of
    _finalizer_of = 0
    engines = [engine for engine in _open if not engine.forked]
    for engine in engines:
        engine.close()
    for engine in engines:
        engine.join()


def _at_exit() -> None:
    global _exiting
    _exiting = True
    _finish()


threading._register_atexit(_at_exit)
