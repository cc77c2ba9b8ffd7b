"""Pools of two worker processes, each used as its own documentation advises for the job.

- multiprocessing and billiard: `Pool.map`, `apply`, `imap`.
- ProcessPoolExecutor and loky: `map`, `submit(...).result()`. Their `map` sends items one by one unless told otherwise: for a
  million items, and for the stream, they are given chunks.
- joblib: `Parallel` as a context manager, which keeps the workers; for tasks one by one with batch_size=1, else its "auto".
- mpire: `WorkerPool(keep_alive=True)`; pebble: `ProcessPool.map`, `schedule(...).result()`.
- Dask: a `LocalCluster` of processes with one thread each, without dashboard; a million items go as a bag.
- Ray: remote functions; for mappings with chunks and for the stream its `ray.util.multiprocessing.Pool`.

All but the start-up rows run with workers that have answered before. Where a rival has the choice it forks, as multiprocessing
does; loky, joblib, Dask and Ray start fresh interpreters, and so stand in the start-up row of spawn.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import random
import statistics
import sys
import tempfile
import time
from functools import cache, partial
from itertools import chain, repeat
from typing import TYPE_CHECKING, Any

from harness import OURS, Cost, Scenario, Target

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    Durations = Callable[[random.Random, int], list[int]]

MP, FUTURES = "multiprocessing", "ProcessPoolExecutor"
WORKERS = 2
CHUNK = 256  # items that go at once in the stream, for those that do not choose themselves
MEGABYTE = 1_000_000
UNIT_S = 0.00002  # one unit of a skewed task
LISTS = 4  # of skewed tasks, one after the other
LIMIT = "limit"


class Pool:
    """procession.Pool, multiprocessing.Pool, and what has their interface."""

    def __init__(self, module: str = MP, method: str = "fork", **each: Any) -> None:
        self.pool = importlib.import_module(module).get_context(method).Pool(WORKERS)
        self.options = each

    def one_by_one(self, function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        """Map, each item a task of its own."""
        return self.pool.map(function, items, chunksize=1)

    def map(self, function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        """Map, in what chunks the library likes."""
        return self.pool.map(function, items, **self.options)

    def call(self, function: Callable[[Any], Any], item: object) -> object:
        """One call and its result."""
        return self.pool.apply(function, (item,))

    def stream(self, function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        """Results in order, while `items` is read."""
        return self.pool.imap(function, items, chunksize=CHUNK)

    def stop(self) -> None:
        """End the workers and wait for them."""
        self.pool.close()
        self.pool.join()

    def leave(self) -> None:
        """What must be done before this process is killed together with all it has started."""


class Ours(Pool):
    """procession.Pool: no chunk size needed for the stream."""

    def __init__(self, method: str = "fork") -> None:
        super().__init__(OURS, method)

    def stream(self, function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        return self.pool.imap(function, items)


class Billiard(Pool):
    """billiard.Pool."""

    def __init__(self, method: str = "fork") -> None:
        super().__init__("billiard", method)


class Executor(Pool):
    """concurrent.futures.ProcessPoolExecutor, and loky's."""

    def __init__(self, method: str = "fork") -> None:
        from concurrent.futures import ProcessPoolExecutor
        from multiprocessing import get_context

        self.pool = ProcessPoolExecutor(WORKERS, get_context(method))

    def one_by_one(self, function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        return list(self.pool.map(function, items))

    def map(self, function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        # multiprocessing.Pool's choice where there are many; else one by one, as is its own.
        return list(self.pool.map(function, items, chunksize=-(-len(items) // (4 * WORKERS)) if _many(items) else 1))

    def call(self, function: Callable[[Any], Any], item: object) -> object:
        return self.pool.submit(function, item).result()

    def stream(self, function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        return self.pool.map(function, items, chunksize=CHUNK)

    def stop(self) -> None:
        self.pool.shutdown()


class OurExecutor(Executor):
    """procession.ProcessPoolExecutor."""

    def __init__(self, method: str = "fork") -> None:
        ours = importlib.import_module(OURS)
        if not hasattr(ours, "ProcessPoolExecutor"):
            raise ModuleNotFoundError("not there yet", name="procession.ProcessPoolExecutor")
        self.pool = ours.ProcessPoolExecutor(WORKERS, ours.get_context(method))


class Loky(Executor):
    """loky's executor; always of fresh interpreters."""

    def __init__(self, method: str = "loky") -> None:  # noqa: ARG002
        self.pool = importlib.import_module("loky").ProcessPoolExecutor(WORKERS)


class Joblib(Pool):
    """joblib.Parallel on its default backend."""

    def __init__(self, method: str = "loky") -> None:  # noqa: ARG002
        self.joblib = importlib.import_module("joblib")
        self.open = contextlib.ExitStack()
        self.one = self.open.enter_context(self.parallel(batch_size=1))
        self.auto = self.parallel()

    def parallel(self, **options: Any) -> Any:
        return self.joblib.Parallel(n_jobs=WORKERS, **options)

    def one_by_one(self, function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        return self.one(map(self.joblib.delayed(function), items))

    def map(self, function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        # Outside a context, so that "auto" begins anew; the workers are loky's reusable ones all the same.
        return self.auto(map(self.joblib.delayed(function), items))

    def call(self, function: Callable[[Any], Any], item: object) -> object:
        return self.one([self.joblib.delayed(function)(item)])[0]

    def stream(self, function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        return self.parallel(return_as="generator", batch_size=CHUNK)(map(self.joblib.delayed(function), items))

    def stop(self) -> None:
        self.open.close()
        importlib.import_module("joblib.externals.loky").get_reusable_executor().shutdown(wait=True)

    leave = stop


class Mpire(Pool):
    """mpire.WorkerPool."""

    def __init__(self, method: str = "fork") -> None:
        self.pool = importlib.import_module("mpire").WorkerPool(WORKERS, start_method=method, keep_alive=True)

    def one_by_one(self, function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        return self.pool.map(function, items, chunk_size=1)

    def map(self, function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        return self.pool.map(function, items)

    def call(self, function: Callable[[Any], Any], item: object) -> object:
        return self.pool.apply(function, (item,))

    def stream(self, function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        return self.pool.imap(function, items, chunk_size=CHUNK)

    def stop(self) -> None:
        self.pool.stop_and_join()


class Pebble(Pool):
    """pebble.ProcessPool."""

    def __init__(self, method: str = "fork") -> None:
        from multiprocessing import get_context

        self.pool = importlib.import_module("pebble").ProcessPool(WORKERS, context=get_context(method))

    def one_by_one(self, function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        return list(self.pool.map(function, items).result())

    def map(self, function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        size = -(-len(items) // (4 * WORKERS)) if _many(items) else 1
        return list(self.pool.map(function, items, chunksize=size).result())

    def call(self, function: Callable[[Any], Any], item: object) -> object:
        return self.pool.schedule(function, args=(item,)).result()

    def stream(self, function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        return self.pool.map(function, items, chunksize=CHUNK).result()

    def stop(self) -> None:
        self.pool.close()
        self.pool.join()


class Dask(Pool):
    """distributed: a local cluster of processes."""

    def __init__(self, method: str = "spawn") -> None:  # noqa: ARG002
        distributed = importlib.import_module("distributed")
        self.cluster = distributed.LocalCluster(
            n_workers=WORKERS, threads_per_worker=1, processes=True, dashboard_address=None, silence_logs=logging.ERROR
        )
        self.client = distributed.Client(self.cluster)

    def one_by_one(self, function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        return self.client.gather(self.client.map(function, items, pure=False))

    def map(self, function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        if not _many(items):
            return self.one_by_one(function, items)
        return importlib.import_module("dask.bag").from_sequence(items).map(function).compute()

    def call(self, function: Callable[[Any], Any], item: object) -> object:
        return self.client.submit(function, item, pure=False).result()

    def stop(self) -> None:
        self.client.close()
        self.cluster.close()


class Ray(Pool):
    """Ray, on this machine alone."""

    def __init__(self, method: str = "spawn") -> None:  # noqa: ARG002
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        self.ray = importlib.import_module("ray")
        self.ray.init(
            num_cpus=WORKERS,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="error",
            configure_logging=True,
        )
        self.remote: dict[Any, Any] = {}
        self._pool: Any = None

    @property
    def pool(self) -> Any:
        if self._pool is None:
            self._pool = importlib.import_module("ray.util.multiprocessing").Pool(WORKERS)
        return self._pool

    def function(self, function: Callable[[Any], Any]) -> Callable[[Any], Any]:
        if function not in self.remote:
            self.remote[function] = self.ray.remote(_python(function)).remote
        return self.remote[function]

    def one_by_one(self, function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        remote = self.function(function)
        return self.ray.get([remote(item) for item in items])

    def map(self, function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        return self.pool.map(function, items) if _many(items) else self.one_by_one(function, items)

    def call(self, function: Callable[[Any], Any], item: object) -> object:
        return self.ray.get(self.function(function)(item))

    def stop(self) -> None:
        self.ray.shutdown()

    leave = stop


def _python(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Ray takes no built-in functions."""

    def python(item: Any) -> Any:
        return function(item)

    return function if hasattr(function, "__code__") else python


def _many(items: Sequence[Any]) -> bool:
    return len(items) > 10_000


# --- what the tasks do ------------------------------------------------------------------------------------------------


def noop(_: object) -> None:
    """Nothing."""


def square(x: int) -> int:
    """Next to nothing."""
    return x * x


def burn(units: int) -> int:
    """Keep a core busy, for some UNIT_S a unit."""
    x = 1
    for _ in repeat(None, units * 500):
        x = (x * 3 + 1) & 0xFFFF
    return x


def nap(units: int) -> None:
    """Take as long as `burn`, on no core: what is lost then is the scheduler's doing, not the machine's."""
    time.sleep(units * UNIT_S)


def lognormal(numbers: random.Random, count: int) -> list[int]:
    """Durations of which a few are fifty times the median."""
    return [int(numbers.lognormvariate(4.5, 1.2)) + 1 for _ in range(count)]


def few_long(numbers: random.Random, count: int) -> list[int]:
    """Short ones with some that take 400 times as long, none of them among the last fifth."""
    long = set(numbers.sample(range(count * 4 // 5), max(1, count // 100)))
    return [4000 if i in long else 10 for i in range(count)]


def lists(durations: Durations, count: int) -> list[list[int]]:
    """Some lists of durations: in any single one the last long task may happen to begin early, or late."""
    return [durations(random.Random(seed), count) for seed in range(LISTS)]


@cache
def _temporary_directory() -> tempfile.TemporaryDirectory[str]:
    """Where fork servers have their sockets; gone with the run even when a measurement is killed."""
    return tempfile.TemporaryDirectory(prefix="bench")


# --- what is measured ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def warm(make: Callable[[], Pool], *, calls: bool = False) -> Iterator[Pool]:
    """A pool whose workers have answered, `calls` or mappings; mpire's do not bear both."""
    pool = make()
    if calls:
        for item in range(20):
            pool.call(square, item)
    else:
        pool.one_by_one(square, range(20))
    yield pool
    pool.leave()


def one_by_one(make: Callable[[], Pool], count: int) -> Cost:
    """Seconds per task of a mapping without chunks."""
    with warm(make) as pool:
        pool.one_by_one(noop, range(max(count // 10, 10)))
        start = time.perf_counter()
        pool.one_by_one(noop, range(count))
        elapsed = time.perf_counter() - start
    return Cost(elapsed / count, elapsed)


def mapping(make: Callable[[], Pool], count: int) -> Cost:
    """Seconds per item of a mapping in the library's own chunks."""
    with warm(make) as pool:
        start = time.perf_counter()
        results = pool.map(square, range(count))
        elapsed = time.perf_counter() - start
    if results[-1] != (count - 1) ** 2 or len(results) != count:
        raise AssertionError(f"wrong results: {len(results)}")
    return Cost(elapsed / count, elapsed)


def streaming(make: Callable[[], Pool], count: int) -> Cost:
    """Seconds per item of a stream that is consumed as it comes."""
    with warm(make) as pool:
        start, taken = time.perf_counter(), 0
        for _ in pool.stream(square, iter(range(count))):
            taken += 1
        elapsed = time.perf_counter() - start
    if taken != count:
        raise AssertionError(f"{taken} results of {count}")
    return Cost(elapsed / count, elapsed)


def round_trip(make: Callable[[], Pool], count: int) -> Cost:
    """Median and p90 of a call and its result; the first tenth is not counted."""
    times, now = [], time.perf_counter
    with warm(make, calls=True) as pool:
        call = pool.call
        began = now()
        for item in range(count):
            start = now()
            call(noop, item)
            times.append(now() - start)
        elapsed = now() - began
    counted = times[count // 10 :]
    return Cost(statistics.median(counted), elapsed, statistics.quantiles(counted, n=10)[-1])


def whole_life(make: Callable[[], Pool], count: int, most: int = 1000) -> Cost:
    """Median time from making a pool to its workers' end, with one result between. The first time is not counted."""
    count = min(count, most)
    # What a program's own main module costs its workers is not the pool's.
    vars(sys.modules["__main__"]).pop("__file__", None)
    tempfile.tempdir = _temporary_directory().name
    times, now = [], time.perf_counter
    for _ in range(count + 1):
        start = now()
        pool = make()
        if pool.call(abs, -7) != 7:
            raise AssertionError("wrong result")
        pool.stop()
        times.append(now() - start)
    return Cost(statistics.median(times[1:]), sum(times[1:]))


def skewed(make: Callable[[], Pool], work: Callable[[int], Any], durations: Durations, count: int) -> Cost:
    """Seconds for all lists, each a mapping."""
    every = lists(durations, count)
    with warm(make) as pool:
        pool.map(work, [1] * 8)
        start = time.perf_counter()
        for tasks in every:
            pool.map(work, tasks)
        elapsed = time.perf_counter() - start
    return Cost(elapsed, elapsed)


def half_of_serial(work: Callable[[int], Any], durations: Durations, count: int) -> Cost:
    """Half the seconds for all tasks, in this process, one after the other."""
    every = lists(durations, count)
    work(50)
    start = time.perf_counter()
    for task in chain.from_iterable(every):
        work(task)
    elapsed = (time.perf_counter() - start) / WORKERS
    return Cost(elapsed, elapsed)


def bare_processes(work: Callable[[int], Any], durations: Durations, count: int) -> Cost:
    """Seconds for all lists in two forked processes, each with its half, without any talk: what the machine can do."""
    every = lists(durations, count)
    start = time.perf_counter()
    for tasks in every:
        halves: list[list[int]] = [[] for _ in range(WORKERS)]
        for task in sorted(tasks, reverse=True):
            min(halves, key=sum).append(task)
        children = []
        for half in halves:
            child = os.fork()
            if child == 0:
                for task in half:
                    work(task)
                os._exit(0)
            children.append(child)
        for child in children:
            os.waitpid(child, 0)
    elapsed = time.perf_counter() - start
    return Cost(elapsed, elapsed)


def peak_memory(make: Callable[[], Pool], count: int) -> Cost:
    """Bytes by which this process grows while it consumes a stream, with a nap of 50 ms before every 50,000 items."""
    with warm(make) as pool:
        for _ in pool.stream(square, iter(range(1000))):
            pass
        idle = _memory("VmRSS")
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")  # VmHWM begins anew
        start, taken = time.perf_counter(), 0
        for _ in pool.stream(square, iter(range(count))):
            if taken % 50_000 == 0:
                time.sleep(0.05)
            taken += 1
        elapsed = time.perf_counter() - start
        peak = _memory("VmHWM")
    if taken != count:
        raise AssertionError(f"{taken} results of {count}")
    return Cost(float(max(peak - idle, 1)), elapsed)


def _memory(field: str) -> int:
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field + ":"))


def _fixed(figure: float, _: int) -> Cost:
    return Cost(figure, 1.0)


# --- the rows ----------------------------------------------------------------------------------------------------------

RIVALS: Mapping[str, Callable[[], Pool]] = {
    OURS: Ours,
    "procession's executor": OurExecutor,
    MP: Pool,
    FUTURES: Executor,
    "loky": Loky,
    "joblib": Joblib,
    "mpire": Mpire,
    "pebble": Pebble,
    "billiard": Billiard,
    "Dask": Dask,
    "Ray": Ray,
}
FORKING = (OURS, "procession's executor", MP, FUTURES, "mpire", "pebble")


def scenarios() -> list[Scenario]:
    """The rows about pools."""
    _temporary_directory()  # made here, in the process that outlives all measurements

    def all_of(measure: Callable[..., Cost], *more: Any, leave_out: Iterable[str] = ()) -> dict[str, Any]:
        return {who: partial(measure, make, *more) for who, make in RIVALS.items() if who not in leave_out}

    def life(method: str) -> Scenario:
        who = [*FORKING, *(["billiard"] if method == "fork" else [])]
        measure: dict[str, Callable[[int], Cost]] = {
            one: partial(whole_life, partial(RIVALS[one], method=method)) for one in who
        }
        if method == "spawn":
            measure |= {one: partial(whole_life, RIVALS[one]) for one in ("loky", "joblib")}
            measure |= {one: partial(whole_life, RIVALS[one], most=1) for one in ("Dask", "Ray")}  # seconds each
        return Scenario(
            f"pool-life-{method}",
            f"start, first result and stop of a pool of 2, {method}",
            measure,
            (Target(FUTURES, 1.2, 2),),
            unit="time",
            start_n=3,
            max_n=30,
        )

    def skew(name: str, title: str, work: Callable[[int], Any], durations: Durations, count: int) -> Scenario:
        one_each = partial(Pool, chunksize=1)
        measure = {
            **all_of(skewed, work, durations),
            "multiprocessing, chunksize=1": partial(skewed, one_each, work, durations),
            "serial / 2": partial(half_of_serial, work, durations),
            "two bare processes": partial(bare_processes, work, durations),
        }
        return Scenario(
            name,
            title,
            measure,
            (Target("serial / 2", 0.9, 0.97), Target("two bare processes"), Target(MP)),
            unit="time",
            start_n=20,
            full_n=count,
        )

    memory = {**all_of(peak_memory, leave_out=("Dask", "Ray")), LIMIT: partial(_fixed, 50 * MEGABYTE)}
    return [
        Scenario(
            "pool-one-by-one",
            "map of no-ops, chunksize=1",
            all_of(one_by_one),
            (Target(MP, 5, 10), Target(FUTURES, 15, 30)),
            start_n=100,
            max_n=200_000,
        ),
        Scenario(
            "pool-million",
            "map of one million x*x, default chunks",
            all_of(mapping),
            (Target(MP, 1.5, 3),),
            start_n=20_000,
            full_n=1_000_000,
        ),
        Scenario(
            "pool-stream",
            f"imap of 300,000 x*x (others: in chunks of {CHUNK}), consumed one by one",
            all_of(streaming, leave_out=("Dask", "Ray")),
            (Target(MP), Target(FUTURES)),
            start_n=2000,
            full_n=300_000,
        ),
        Scenario(
            "pool-round-trip",
            "one call and its result: Pool.apply and its like",
            all_of(round_trip),
            (Target(MP, 4, 12), Target(FUTURES)),
            unit="time",
            start_n=50,
            max_n=50_000,
        ),
        *(life(method) for method in ("fork", "forkserver", "spawn")),
        *(
            skew(
                f"pool-{name}{suffix}",
                f"{LISTS} times {count} {kind} tasks, {which}, on 2 workers",
                work,
                durations,
                count,
            )
            for kind, suffix, work in (("CPU-bound", "", burn), ("sleeping", "-asleep", nap))
            for name, which, durations, count in (
                ("skewed", "lognormal durations", lognormal, 300),
                ("few-long", "10 of them 400 times as long", few_long, 1000),
            )
        ),
        Scenario(
            "pool-memory",
            "peak memory of the parent above idle, imap of 2 million x*x, a consumer with naps",
            memory,
            (Target(LIMIT, 1, 0.5, at_most=True),),
            unit="memory",
            start_n=2000,
            full_n=2_000_000,
            most_rounds=3,
        ),
    ]
