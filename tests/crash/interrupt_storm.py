"""Ctrl-C, again and again, at any bytecode of the thread that uses a pool, which lives on and must go on answering.

    python -m tests.crash.interrupt_storm --interrupts 2000
    python -m tests.crash.interrupt_storm --interrupts 2000 --method spawn --seed 7

A child process sends SIGINT after random pauses, most of them shorter than a call, so that some interrupts hit what the one
before has set off. What is raised where the program waits for a result it catches, as the stop button of a notebook does, and
calls again. What was not interrupted must be right; after every hundred interrupts the pool must answer in peace, and at the
end nothing may be left of it.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import gc
import os
import random
import signal
import sys
import time

import procession
from tests._leaks import Footprint

_LIMIT_S = 60
_armed = False


def square(x):
    return x * x


def nap(seconds):
    time.sleep(seconds)
    return seconds


def add(x, y):
    return x + y


def on_interrupt(*_):
    if _armed:
        raise KeyboardInterrupt


def map_of_many(pool):
    assert [x * x for x in range(300)] == pool.map(square, range(300))


def map_one_by_one(pool):
    assert [x * x for x in range(40)] == pool.map(square, range(40), chunksize=1)


def call(pool):
    assert 49 == pool.apply(square, (7,))


def call_that_takes_a_while(pool):
    assert 0.003 == pool.apply(nap, (0.003,))


def calls_at_once(pool):
    results = [pool.apply_async(square, (x,)) for x in range(10)]
    assert [x * x for x in range(10)] == [result.get() for result in results]


def starmap(pool):
    assert [x + 1 for x in range(30)] == pool.starmap(add, [(x, 1) for x in range(30)])


def cancelled(pool):
    result = pool.apply_async(nap, (0.05,))
    result.cancel()
    with contextlib.suppress(procession.TaskCancelledError):
        result.get()


def stream(pool):
    assert [x * x for x in range(60)] == list(pool.imap(square, iter(range(60))))


def part_of_a_stream(pool):
    results = pool.imap(square, iter(range(10**9)))
    assert [0, 1, 4] == [next(results) for _ in range(3)]
    results.close()


def stream_in_any_order(pool):
    assert [x * x for x in range(60)] == sorted(pool.imap_unordered(square, range(60), chunksize=7))


CALLS = [
    map_of_many,
    map_one_by_one,
    call,
    call,
    call_that_takes_a_while,
    calls_at_once,
    starmap,
    cancelled,
    stream,
    part_of_a_stream,
    stream_in_any_order,
]


def interrupt_for_ever(pid, seed):
    """The child: SIGINT after pauses of 0.05 to some ms, until nobody is there."""
    numbers = random.Random(seed)
    while os.getppid() == pid:
        time.sleep(min(0.00005 + numbers.expovariate(1 / 0.002), 0.02))
        os.kill(pid, signal.SIGINT)


def storm(pool, interrupts, seed):
    """Call and be interrupted; return how many calls were made and how many interrupts were caught."""
    global _armed
    numbers = random.Random(seed)
    caught = calls = checked = 0
    while caught < interrupts:
        call_it = numbers.choice(CALLS)
        faulthandler.dump_traceback_later(_LIMIT_S, exit=True)
        try:
            _armed = True
            calls += 1
            call_it(pool)
            _armed = False
        except KeyboardInterrupt:
            _armed = False
            caught += 1
        if caught // 100 > checked:
            checked = caught // 100
            faulthandler.dump_traceback_later(_LIMIT_S, exit=True)
            for one in CALLS:
                one(pool)
    faulthandler.cancel_dump_traceback_later()
    return calls, caught


def main(arguments=None):
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--interrupts", type=int, default=1000)
    parser.add_argument("--method", default="fork", choices=["fork", "spawn", "forkserver"])
    parser.add_argument("--seed", type=int, default=None)
    options = parser.parse_args(arguments)
    seed = options.seed if options.seed is not None else random.randrange(1 << 30)
    print(f"seed {seed}", flush=True)
    signal.signal(signal.SIGINT, on_interrupt)
    if options.method == "forkserver":
        with procession.get_context(options.method).Pool(1) as pool:
            pool.apply(square, (1,))  # its server stays
    before = Footprint.take()
    with procession.get_context(options.method).Pool(2, stall_report=10) as pool:
        for one in CALLS:
            one(pool)
        me = os.getpid()
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            try:
                interrupt_for_ever(me, seed)
            finally:
                os._exit(0)
        try:
            calls, caught = storm(pool, options.interrupts, seed)
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        for one in CALLS:
            one(pool)
        print(f"{calls} calls, {caught} interrupted; restarts {pool.insights().restarts}", flush=True)
    left, deadline = what_is_left(before), time.monotonic() + 10
    while left and time.monotonic() < deadline:
        time.sleep(0.05)
        left = what_is_left(before)
    print("left behind:", *left, sep="\n") if left else print("passed")
    return int(bool(left))


def what_is_left(before):
    """What of this program is still there; a stranger's files are his own."""
    gc.collect()
    return [line for (kind, _), line in Footprint.take().beyond(before).items() if kind not in ("shm", "files")]


if __name__ == "__main__":
    sys.exit(main())
