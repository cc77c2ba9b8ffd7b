"""`Pool`: the interface of `multiprocessing.pool.Pool`, and what procession adds to it."""

from __future__ import annotations

import functools
import math
import signal
import warnings
from collections.abc import Sized
from multiprocessing import pool as _std

from procession._pool import messages as m
from procession._pool.crew import Options
from procession._pool.engine import Engine
from procession._pool.inline import InlineEngine
from procession._pool.iterators import IMapIterator, IMapUnorderedIterator
from procession._pool.jobs import RUN, TERMINATE
from procession._pool.results import AsyncResult, MapResult
from procession._pool.stream import Stream
from procession._pool.worker import Orders
from procession._proc.threads import threads_for, within_share

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import TracebackType
    from typing import Any

    from typing_extensions import Self

    from procession._pool.functions import Function
    from procession._pool.insights import Insights

__all__ = ["Pool", "orders_and_options"]


class Pool(_std.Pool):
    """A pool of worker processes; `multiprocessing.pool.Pool`, which a death does not stop.

    A worker that is killed costs the task it was at: that task gets a `WorkerDiedError`, or is tried again (`retries`), all
    others go on, and the worker is replaced. Arguments of mappings are read in the caller; `imap` reads its input only so
    far ahead of its consumer. ``with Pool() as pool`` waits for what was begun, and drops it on an exception.

    Args:
        processes: Number of workers; None for `cpu_count()`.
        initializer: Called in each worker as it starts. If it raises, the pool is broken and says so.
        initargs: Its arguments.
        maxtasksperchild: A worker is replaced after this many tasks; None never.
        context: A context of procession's; None for the default one.
        workers: Another name for `processes`; 0 runs everything in this process, for debugging; -1 is `cpu_count()`.
        retries: How many more workers may die of a task before it gets its error.
        timeout: Seconds a task may take before it is stopped; None for no limit.
        grace: Seconds between SIGINT, SIGTERM and SIGKILL when a task is stopped.
        memory_limit: Bytes of resident memory. A number: a worker that has more is replaced after its task. A pair
            (soft, hard): and one that has more than `hard` is killed, its task gets a `WorkerMemoryError`.
        max_age_per_child: A worker is replaced after the task at which it is this many seconds old.
        worker_init, worker_exit: Called in each worker first and last.
        worker_state: Each worker has a dict, and every function gets it as its first argument.
        max_restarts: So many workers may die within `restart_period` seconds; one more breaks the pool. None: only
            deaths that cost no task count, and `max(4, 2 * processes)` are allowed.
        restart_period: Seconds.
        idle_timeout: After so many seconds without work the workers are let go, and started again when there is some.
        stall_report: When somebody has waited and nothing has finished for so many seconds, a line on stderr says which
            worker does what since when, once. None: never.
        threads_per_worker: Threads that BLAS, OpenMP and the like may use in each worker. None: each worker's share of the CPUs,
            `max(1, cpus // processes)`, unless the user has set `OMP_NUM_THREADS` and the like.

    Raises:
        ValueError: `processes` is less than 1, or `maxtasksperchild` no positive number.
    """

    def __init__(
        self,
        processes: int | None = None,
        initializer: Callable[..., object] | None = None,
        initargs: Iterable[Any] = (),
        maxtasksperchild: int | None = None,
        context: Any = None,
        *,
        workers: int | None = None,
        retries: int = 0,
        timeout: float | None = None,
        grace: float = 1.0,
        memory_limit: int | tuple[int | None, int] | None = None,
        max_age_per_child: float | None = None,
        worker_init: Callable[..., object] | None = None,
        worker_exit: Callable[..., object] | None = None,
        worker_state: bool = False,
        max_restarts: int | None = None,
        restart_period: float = 10.0,
        idle_timeout: float | None = None,
        stall_report: float | None = 30.0,
        threads_per_worker: int | None = None,
    ) -> None:
        self._state_here: str | None = None
        if context is None:
            raise TypeError("context: a context of procession's is needed here; use procession.Pool")
        inline = processes is None and workers == 0
        if processes is None and workers not in (None, 0, -1):
            processes = workers
        if processes is None:
            processes = within_share(context.cpu_count())
        if processes < 1:
            raise ValueError("Number of processes must be at least 1")
        orders, self._options = orders_and_options(
            processes,
            initializer,
            initargs,
            maxtasksperchild,
            retries=retries,
            timeout=timeout,
            grace=grace,
            memory_limit=memory_limit,
            max_age_per_child=max_age_per_child,
            worker_init=worker_init,
            worker_exit=worker_exit,
            worker_state=worker_state,
            max_restarts=max_restarts,
            restart_period=restart_period,
            idle_timeout=idle_timeout,
            stall_report=stall_report,
            threads_per_worker=threads_per_worker,
        )
        self._ctx = context
        self._initializer = initializer
        self._initargs = initargs
        self._maxtasksperchild = maxtasksperchild
        self._engine: Engine | InlineEngine
        self._engine = InlineEngine(orders) if inline else Engine(context, processes, orders, self._options)

    # -- what programs poke at

    @property
    def _state(self) -> str:
        return self._state_here or (self._engine.state if hasattr(self, "_engine") else TERMINATE)

    @_state.setter
    def _state(self, value: str) -> None:
        self._state_here = value

    @property
    def _processes(self) -> int:
        return int(self._engine.size)

    @property
    def _pool(self) -> list[Any]:
        return self._engine.processes()

    def _repopulate_pool(self) -> None:
        self._engine.nudge()

    def _check_running(self) -> None:
        if self._state != RUN:
            raise ValueError("Pool not running")

    def __repr__(self) -> str:
        cls = type(self)
        return f"<{cls.__module__}.{cls.__qualname__} state={self._state} pool_size={self._engine.size}>"

    def __reduce__(self) -> Any:
        raise NotImplementedError("pool objects cannot be passed between processes or pickled")

    # -- one call

    def apply(self, func: Callable[..., Any], args: Iterable[Any] = (), kwds: dict[str, Any] | None = None) -> Any:
        """Call ``func(*args, **kwds)`` in a worker and return its result; blocks."""
        return self._result(self._single(func, args, kwds, {}), self._engine.call)

    def apply_async(
        self,
        func: Callable[..., Any],
        args: Iterable[Any] = (),
        kwds: dict[str, Any] | None = None,
        callback: Callable[[Any], object] | None = None,
        error_callback: Callable[[BaseException], object] | None = None,
        *,
        timeout: float | None = None,
        retries: int | None = None,
        priority: int = 0,
        on_error: str = "raise",
    ) -> AsyncResult:
        """Have ``func(*args, **kwds)`` called in a worker; returns at once.

        Args:
            func, args, kwds: The call.
            callback, error_callback: Called with the result or the error, in a thread of the pool's.
            timeout, retries: As those of the pool, for this call.
            priority: Higher goes first.
            on_error: "return" makes an exception the result.
        """
        options = self._call_options(timeout, retries, priority, on_error)
        job = self._single(func, args, kwds, {"callback": callback, "error_callback": error_callback, **options})
        self._engine.submit(job)
        return job

    def _single(
        self, func: Callable[..., Any], args: Iterable[Any], kwds: dict[str, Any] | None, options: dict[str, Any]
    ) -> AsyncResult:
        self._check_running()
        item: Any = tuple(args)
        mode = m.STAR
        if kwds:
            item, mode = (item, kwds), m.CALL
        options.setdefault("timeout", self._options.timeout)
        options.setdefault("retries", self._options.retries)
        job = AsyncResult(self._engine.functions.get(func, mode), item, None, **options)
        job.owner = self
        job.snapshot()
        return job

    # -- mappings

    def map(
        self,
        func: Callable[..., Any],
        iterable: Iterable[Any],
        *more: Any,
        chunksize: int | None = None,
        **options: Any,
    ) -> list[Any]:
        """Call `func` with each item in workers and return the results in order; blocks.

        Args:
            func: Gets one item; or one of each, when there are more iterables.
            iterable: The items; read to its end first.
            more: `chunksize`, as in the standard library; or more iterables, as with the built-in `map`.
            chunksize: Items that go to a worker at once. None: chosen from how long they take.
            options: Those of `map_async`, without the callbacks.

        Raises:
            BaseException: The first error, once all items are done.
        """
        return self._result(self._map(m.EACH, func, iterable, more, chunksize, options))  # type: ignore[no-any-return]

    def map_async(
        self,
        func: Callable[..., Any],
        iterable: Iterable[Any],
        *more: Any,
        chunksize: int | None = None,
        **options: Any,
    ) -> MapResult:
        """As `map`, but returns at once; the result can be awaited.

        Args:
            func, iterable, chunksize: As for `map`.
            more: ``chunksize, callback, error_callback``, as in the standard library; or more iterables.
            options: ``callback``, ``error_callback``: called with the list or the error.
                ``kwargs``: keyword arguments for each call.
                ``on_error``: "return" puts exceptions into the list, in the place of results.
                ``cost``: a function of an item, or a list: the costliest items are begun first.
                ``seed``: `random` and NumPy's global generator are seeded for each item, from this number and the
                item's index: the same numbers whatever the workers and chunks.
                ``progress``: True, a description, or a class of tqdm's or rich's: shows how far it is.
                ``timeout``, ``retries``, ``priority``: as for `apply_async`.
        """
        return self._map(m.EACH, func, iterable, more, chunksize, options)

    def starmap(
        self, func: Callable[..., Any], iterable: Iterable[Any], chunksize: int | None = None, **options: Any
    ) -> list[Any]:
        """As `map`, for items that are tuples of arguments."""
        return self._result(self._map(m.STAR, func, iterable, (), chunksize, options))  # type: ignore[no-any-return]

    def starmap_async(
        self,
        func: Callable[..., Any],
        iterable: Iterable[Any],
        chunksize: int | None = None,
        callback: Callable[[list[Any]], object] | None = None,
        error_callback: Callable[[BaseException], object] | None = None,
        **options: Any,
    ) -> MapResult:
        """As `map_async`, for items that are tuples of arguments."""
        options.update(callback=callback, error_callback=error_callback)
        return self._map(m.STAR, func, iterable, (), chunksize, options)

    def _map(
        self,
        mode: int,
        func: Callable[..., Any],
        iterable: Iterable[Any],
        more: tuple[Any, ...],
        chunksize: int | None,
        options: dict[str, Any],
    ) -> MapResult:
        self._check_running()
        if more and (more[0] is None or isinstance(more[0], int)):
            names = ("chunksize", "callback", "error_callback")
            if len(more) > len(names):
                raise TypeError("too many positional arguments after chunksize, callback and error_callback")
            given = dict(zip(names, more, strict=False))
            chunksize = given.pop("chunksize")
            options.update(given)
        elif more:
            iterable, mode = zip(iterable, *more, strict=False), m.STAR
        items: Any = iterable if isinstance(iterable, (list, tuple, range)) else list(iterable)
        if isinstance(items, list) and items is iterable:
            items = items.copy()  # the caller may change it while the pool is at it
        order = _order(options.pop("cost", None), items)
        function, rest = self._function(func, mode, options)
        progress = options.pop("progress", None)
        job_options = self._mapping_options(options)
        job = MapResult(function, items, _chunksize(chunksize), order=order, **rest, **job_options)
        job.engine, job.owner = self._engine, self
        self._engine.check()
        job.progress = _progress(progress, len(items), function)
        job.start()
        if items:
            self._engine.submit(job)
        return job

    @staticmethod
    def _result(job: Any, wait: Callable[[Any], Any] = MapResult.get) -> Any:
        """Wait for a job that nobody but this call knows, and return its result."""
        try:
            return wait(job)
        except BaseException:
            # Not its error but the caller's: Ctrl-C, or what another signal's handler raises. The pool may live on, and its
            # workers must not be at what nobody can ask for any more.
            if job.engine is not None:
                job.cancel()
            raise

    # -- streams

    def imap(
        self,
        func: Callable[..., Any],
        iterable: Iterable[Any],
        *more: Any,
        chunksize: int | None = None,
        **options: Any,
    ) -> IMapIterator:
        """As `map`, but returns an iterator over the results in order, and reads `iterable` as they are consumed.

        Args:
            func, iterable, chunksize: As for `map`.
            more: `chunksize`, or more iterables.
            options: ``buffersize``: how many items may be between `iterable` and the consumer; None: as many as keep
                the workers busy. ``kwargs``, ``on_error``, ``seed``, ``progress``, ``timeout``, ``retries``,
                ``priority``: as for `map_async`.
        """
        stream = self._stream(func, iterable, more, chunksize, True, options)
        results = IMapIterator(stream, self)
        self._engine.submit_stream(stream)
        return results

    def imap_unordered(
        self,
        func: Callable[..., Any],
        iterable: Iterable[Any],
        *more: Any,
        chunksize: int | None = None,
        **options: Any,
    ) -> IMapUnorderedIterator:
        """As `imap`, with the results in the order in which they come."""
        stream = self._stream(func, iterable, more, chunksize, False, options)
        results = IMapUnorderedIterator(stream, self)
        self._engine.submit_stream(stream)
        return results

    def _stream(
        self,
        func: Callable[..., Any],
        iterable: Iterable[Any],
        more: tuple[Any, ...],
        chunksize: int | None,
        ordered: bool,
        options: dict[str, Any],
    ) -> Stream:
        self._check_running()
        mode = m.EACH
        if len(more) == 1 and (more[0] is None or isinstance(more[0], int)):
            chunksize = more[0]
        elif more:
            iterable, mode = zip(iterable, *more, strict=False), m.STAR
        buffersize = options.pop("buffersize", None)
        if buffersize is not None:
            _whole("buffersize", buffersize, 1)
        function, rest = self._function(func, mode, options)
        progress = options.pop("progress", None)
        job_options = self._mapping_options(options)
        stream = Stream(function, iterable, _chunksize(chunksize), buffersize, ordered, **rest, **job_options)
        total = len(iterable) if isinstance(iterable, Sized) else None
        self._engine.check()
        stream.progress = _progress(progress, total, function)
        stream.engine = self._engine
        return stream

    # -- options

    def _function(
        self, func: Callable[..., Any], mode: int, options: dict[str, Any]
    ) -> tuple[Function, dict[str, Any]]:
        kwargs = options.pop("kwargs", None)
        seed = options.pop("seed", None)
        if kwargs:
            func = functools.partial(func, **kwargs)
        callbacks: dict[str, Any] = {
            name: options.pop(name) for name in ("callback", "error_callback") if name in options
        }
        return self._engine.functions.get(func, mode, seed), callbacks

    def _mapping_options(self, options: dict[str, Any]) -> dict[str, Any]:
        known = {name: options.pop(name, None) for name in ("timeout", "retries")}
        result = self._call_options(
            known["timeout"], known["retries"], options.pop("priority", 0), options.pop("on_error", "raise")
        )
        if options:
            raise TypeError(f"unknown option {next(iter(options))!r}")
        return result

    def _call_options(self, timeout: float | None, retries: int | None, priority: int, on_error: str) -> dict[str, Any]:
        if on_error not in ("raise", "return"):
            raise ValueError(f'on_error must be "raise" or "return", not {on_error!r}')
        return {
            "timeout": self._options.timeout if timeout is None else _positive("timeout", timeout),
            "retries": self._options.retries if retries is None else _whole("retries", retries, 0),
            "priority": priority,
            "return_errors": on_error == "return",
        }

    # -- the pool itself

    def resize(self, processes: int) -> None:
        """Have this many workers: more are started, those too many leave after the task they are at."""
        self._engine.resize(processes)

    def insights(self) -> Insights:
        """Return what the workers have done with their time, and the slowest tasks; at any time, the pool's end included."""
        return self._engine.insights()

    def close(self) -> None:
        """Take no more work; the workers leave when all is done."""
        self._engine.close()

    def terminate(self) -> None:
        """Drop all work and end the workers; who waits for a result gets a `TaskCancelledError`."""
        self._engine.terminate()

    def join(self) -> None:
        """Wait until the workers have left; to be called after `close` or `terminate`."""
        if self._state == RUN:
            raise ValueError("Pool is still running")
        self._engine.release_streams(True)
        self._engine.join()

    def __enter__(self) -> Self:
        self._check_running()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for what was begun, or drop it when the body raised."""
        if kind is not None:
            self.terminate()
            return
        self._engine.close()
        self._engine.release_streams(False)
        self._engine.join()

    def __del__(self, _warn: Any = warnings.warn, _run: str = RUN) -> None:
        engine = getattr(self, "_engine", None)
        if engine is None:
            return
        if self._state == _run:
            _warn(f"unclosed running multiprocessing pool {self!r}", ResourceWarning, source=self)
        engine.leave()


def orders_and_options(
    processes: int,
    initializer: Callable[..., object] | None,
    initargs: Iterable[Any],
    most_items: int | None,
    *,
    retries: int = 0,
    timeout: float | None = None,
    grace: float = 1.0,
    memory_limit: int | tuple[int | None, int] | None = None,
    max_age_per_child: float | None = None,
    worker_init: Callable[..., object] | None = None,
    worker_exit: Callable[..., object] | None = None,
    worker_state: bool = False,
    max_restarts: int | None = None,
    restart_period: float = 10.0,
    idle_timeout: float | None = None,
    stall_report: float | None = 30.0,
    threads_per_worker: int | None = None,
) -> tuple[Orders, Options]:
    """Check what a pool was given, and return what its workers and its engine are told; see `Pool` for what each means.

    Raises:
        ValueError, TypeError: One of them cannot be.
    """
    if most_items is not None:
        _whole("maxtasksperchild", most_items, 1)
    if initializer is not None and not callable(initializer):
        raise TypeError("initializer must be a callable")
    soft, hard = memory_limit if isinstance(memory_limit, tuple) else (memory_limit, None)
    orders = Orders(
        initializer=initializer,
        initargs=tuple(initargs),
        worker_init=worker_init,
        worker_exit=worker_exit,
        with_state=worker_state,
        most_items=most_items,
        most_seconds=max_age_per_child,
        most_bytes=soft,
        share=threads_for(processes),
        threads=None if threads_per_worker is None else _whole("threads_per_worker", threads_per_worker, 1),
        # Not as it is when a worker is started: a notebook's kernel ignores SIGINT between cells.
        interruptible=signal.getsignal(signal.SIGINT) is not signal.SIG_IGN,
    )
    options = Options(
        retries=_whole("retries", retries, 0),
        timeout=_positive("timeout", timeout),
        grace=grace,
        max_restarts=max_restarts,
        restart_period=restart_period,
        hard_memory=hard,
        idle_timeout=_positive("idle_timeout", idle_timeout),
        stall_report=_positive("stall_report", stall_report),
    )
    return orders, options


def _order(cost: Any, items: Any) -> list[int] | None:
    """Return the indices of `items`, the costliest first."""
    if cost is None:
        return None
    costs = [cost(item) for item in items] if callable(cost) else list(cost)
    if len(costs) != len(items):
        raise ValueError(f"cost has {len(costs)} entries for {len(items)} items")
    return sorted(range(len(items)), key=lambda i: -costs[i])


def _chunksize(value: int | None) -> int | None:
    if value is not None and value < 1:
        raise ValueError(f"Chunksize must be 1+, not {value:n}")
    return value


def _whole(name: str, value: Any, least: int) -> int:
    if not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, not {value!r}")
    return value


def _positive(name: str, value: float | None) -> float | None:
    if value is not None and not (0 < value < math.inf):
        raise ValueError(f"{name} must be a positive number of seconds, not {value!r}")
    return value


def _progress(progress: Any, total: int | None, function: Function) -> Any:
    if progress is None or progress is False:
        return None
    from procession._pool.progress import make_progress

    return make_progress(progress, total, function.name)
