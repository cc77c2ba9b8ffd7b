"""Locks and what is made of them: uncontended, between two processes, and what creating one costs.

The stdlib's context and ours have the same factory methods, so each rival is a module name.
"""

from __future__ import annotations

import importlib
import mmap
import statistics
import threading
import time
from functools import cache, partial
from itertools import repeat
from typing import TYPE_CHECKING, Any

from harness import OURS, Cost, Scenario, Target, by_placement, pin

if TYPE_CHECKING:
    from collections.abc import Callable

MP, THREADING = "multiprocessing", "threading"
WORK_S = 2e-6  # inside and outside the contended lock
CHUNKS = 15  # pieces of a tight loop; the median piece ignores the ones another process interrupted


def context(module: str) -> Any:
    """The rival's fork context."""
    return importlib.import_module(module).get_context("fork")


def lock(module: str) -> Any:
    """A lock of the rival's."""
    return threading.Lock() if module == THREADING else context(module).Lock()


# --- uncontended: tight loops, less the empty loop ---------------------------------------------------------------------


def nothing(_: object, count: int) -> None:
    """The loop alone."""
    for _ in repeat(None, count):
        pass


def with_lock(lock: Any, count: int) -> None:
    """`with lock:`."""
    for _ in repeat(None, count):
        with lock:
            pass


def acquire_release(lock: Any, count: int) -> None:
    """The two calls, looked up each time as a program does."""
    for _ in repeat(None, count):
        lock.acquire()
        lock.release()


def add_one(value: Any, count: int) -> None:
    """`value += 1` under the value's own lock."""
    for _ in repeat(None, count):
        with value.get_lock():
            value.value += 1


def tight(make: Callable[[], Any], loop: Callable[[Any, int], None], count: int) -> Cost:
    """Seconds of one pass of `loop`, less the empty loop: medians of pieces that alternate."""
    subject, piece = make(), max(count // CHUNKS, 1)
    loop(subject, piece)
    times: dict[Callable[[Any, int], None], list[float]] = {loop: [], nothing: []}
    began = time.perf_counter()
    for _ in range(CHUNKS):
        for body, seconds in times.items():
            start = time.perf_counter()
            body(subject, piece)
            seconds.append(time.perf_counter() - start)
    elapsed = time.perf_counter() - began
    cost = statistics.median(times[loop]) - statistics.median(times[nothing])
    return Cost(max(cost / piece, 1e-12), elapsed)


# --- two processes -----------------------------------------------------------------------------------------------------


def spin(steps: int) -> None:
    """Work that touches nothing shared."""
    for _ in repeat(None, steps):
        pass


@cache
def steps_of_work() -> int:
    """How many steps last WORK_S, by the fastest of 50 trials; one figure for all rivals of a run."""
    steps = 20_000

    def trial() -> float:
        start = time.perf_counter()
        spin(steps)
        return time.perf_counter() - start

    return max(round(steps * WORK_S / min(trial() for _ in range(50))), 1)


def pass_through(lock: Any, steps: int) -> None:
    """One pass of the contended loop."""
    with lock:
        spin(steps)
    spin(steps)


def increment(value: Any, _: int) -> None:
    """One += under the value's lock."""
    with value.get_lock():
        value.value += 1


def contended(module: str, make: Callable[[], Any], once: Callable[[Any, int], None], steps: int, count: int) -> Cost:
    """Seconds per pass of two processes together: this one does `count` passes, the other as many as it gets done."""
    subject = make()
    shared = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("q")  # [0]: 1 = stop; [1]: passes of the other process
    process = context(module).Process(target=_rival, args=(subject, once, steps, shared))
    process.start()
    while shared[1] < 10:  # the other one is up
        once(subject, steps)
    for _ in repeat(None, count // 10):
        once(subject, steps)
    before, start = shared[1], time.perf_counter()
    for _ in repeat(None, count):
        once(subject, steps)
    after, elapsed = shared[1], time.perf_counter() - start
    shared[0] = 1
    process.join()
    return Cost(elapsed / (count + after - before), elapsed)


def _rival(subject: Any, once: Callable[[Any, int], None], steps: int, shared: memoryview) -> None:
    while not shared[0]:
        once(subject, steps)
        shared[1] += 1


def event_wake(module: str, cores: tuple[int, int] | None, count: int) -> Cost:
    """Median and p90 of set() -> the other process's wait() returns: half of a ping-pong of two events."""
    ping, pong = context(module).Event(), context(module).Event()
    process = context(module).Process(target=_answer, args=(ping, pong, count, cores))
    process.start()
    pin(cores, 0)
    now, times = time.perf_counter, []
    began = now()
    for _ in repeat(None, count):
        start = now()
        ping.set()
        pong.wait()
        times.append((now() - start) / 2)
        pong.clear()
    elapsed = now() - began
    process.join()
    counted = times[count // 10 :]
    return Cost(statistics.median(counted), elapsed, statistics.quantiles(counted, n=10)[-1])


def _answer(ping: Any, pong: Any, count: int, cores: tuple[int, int] | None) -> None:
    pin(cores, 1)
    for _ in repeat(None, count):
        ping.wait()
        ping.clear()
        pong.set()


def barrier_rounds(module: str, cores: tuple[int, int] | None, count: int) -> Cost:
    """Seconds per round of two processes that do nothing but wait for each other."""
    barrier, warm = context(module).Barrier(2), count // 10 + 1
    process = context(module).Process(target=_wait, args=(barrier, warm + count, cores))
    process.start()
    pin(cores, 0)
    _wait(barrier, warm)
    start = time.perf_counter()
    _wait(barrier, count)
    elapsed = time.perf_counter() - start
    process.join()
    return Cost(elapsed / count, elapsed)


def _wait(barrier: Any, count: int, cores: tuple[int, int] | None = None) -> None:
    pin(cores, 1)
    for _ in repeat(None, count):
        barrier.wait()


# --- creating ----------------------------------------------------------------------------------------------------------


def creating(module: str, kind: str, count: int) -> Cost:
    """Seconds to create one and to drop it, with 100 of them alive: no rival can hand out the same one for ever."""
    factory, alive = getattr(context(module), kind), 100
    times = []
    for _ in repeat(None, max(count // alive, 3)):
        start = time.perf_counter()
        made = [factory() for _ in range(alive)]
        del made
        times.append(time.perf_counter() - start)
    return Cost(statistics.median(times) / alive, sum(times))


def scenarios() -> list[Scenario]:
    """The rows about locks and their kin."""
    both = (OURS, MP)
    steps = steps_of_work()

    def value(module: str) -> Any:
        return context(module).Value("i", 0)

    def two(make: Callable[[str], Any], once: Callable[[Any, int], None]) -> dict[str, Callable[[int], Cost]]:
        return {who: partial(contended, who, partial(make, who), once, steps) for who in both}

    def one(make: Callable[[str], Any], loop: Callable[[Any, int], None], *rivals: str) -> dict[str, Any]:
        return {who: partial(tight, partial(make, who), loop) for who in rivals}

    def made(kind: str) -> dict[str, Callable[[int], Cost]]:
        return {who: partial(creating, who, kind) for who in both}

    return [
        Scenario(
            "lock-with",
            "with lock: (uncontended)",
            one(lock, with_lock, *both, THREADING),
            (Target(MP, 4, 7), Target(THREADING, 1, 1)),
            unit="time",
        ),
        Scenario(
            "lock-acquire-release",
            "acquire() + release() (uncontended)",
            one(lock, acquire_release, *both, THREADING),
            (Target(MP, 1.2, 3),),
            unit="time",
        ),
        Scenario(
            "lock-contended",
            "lock contended by 2 processes, 2 us of work inside and outside",
            two(lock, pass_through),
            (Target(MP, 1.3, 2),),
        ),
        *by_placement(
            lambda cores: {who: partial(event_wake, who, cores) for who in both},
            Scenario(
                "event-wake",
                "Event.set() -> wait() returns in another process",
                {},
                (Target(MP, 1.7, 4),),
                unit="time",
                start_n=200,
            ),
        ),
        Scenario(
            "value-contended",
            "Value('i') += 1 under its lock, 2 processes",
            two(value, increment),
            (Target(MP, 1.8, 3),),
        ),
        Scenario(
            "value-uncontended", "Value('i') += 1 under its lock, 1 process", one(value, add_one, *both), unit="time"
        ),
        *by_placement(
            lambda cores: {who: partial(barrier_rounds, who, cores) for who in both},
            Scenario("barrier", "Barrier(2) rounds", {}, (Target(MP, 3, 3.3),), start_n=200),
        ),
        Scenario("create-lock", "create and drop a Lock, 100 alive", made("Lock"), (Target(MP, 8, 25),), unit="time"),
        Scenario(
            "create-queue", "create and drop a Queue, 100 alive", made("Queue"), (Target(MP, 8, 25),), unit="time"
        ),
    ]
