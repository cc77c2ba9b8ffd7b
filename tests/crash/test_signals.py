"""A signal is answered by every blocking call, at once, in whatever thread the kernel delivers it."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time

import pytest

import procession
from tests.crash import family
from tests.crash.blocking import CALLS, NOTHING, WITH_TIMEOUT, Blocked


class StopError(Exception):
    """Raised by a handler."""


@pytest.fixture
def fork():
    return procession.get_context("fork")


def block(blocked: Blocked, here, how, timeout=None):
    """Be the child: block, with the handlers and threads that `how` says."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if how == "raises":
        signal.signal(signal.SIGUSR1, _stop)
    if how == "other thread":
        # The kernel gives the signal to the other one: nothing wakes the main thread's sleep (pitfall 4).
        stop = threading.Event()
        other = threading.Thread(target=stop.wait, daemon=True)
        other.start()
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    here.set()
    try:
        return blocked.call(timeout)
    except (KeyboardInterrupt, StopError) as error:
        return type(error).__name__


def _stop(number, frame):
    raise StopError


def start(fork, blocked, how, wait_until, timeout=None):
    here = fork.Event()
    process = fork.Process(target=block, args=(blocked, here, how, timeout))
    process.start()
    here.wait()
    wait_until(lambda: family.state_of(process.pid) in "SZ", "the child's going to sleep")
    return process


@pytest.mark.parametrize(
    ("name", "how"),
    [(name, "main thread") for name in CALLS]
    # connection.wait is the standard library's, and sleeps in the kernel's poll until the descriptor is ready.
    + [(name, "other thread") for name in CALLS if name != "connection.wait"],
)
def test_ctrl_c_interrupts_every_blocking_call(fork, name, how, wait_until):
    """Without a timeout nothing else would end it: a hang here is a program that has to be killed."""
    process = start(fork, CALLS[name](fork), how, wait_until)
    os.kill(process.pid, signal.SIGINT)
    assert "KeyboardInterrupt" == process.result(timeout=60)
    process.join()


@pytest.mark.parametrize("name", CALLS)
def test_a_handler_that_raises_interrupts_every_blocking_call(fork, name, wait_until):
    """Timeouts by alarm, shutdown by SIGTERM."""
    process = start(fork, CALLS[name](fork), "raises", wait_until)
    os.kill(process.pid, signal.SIGUSR1)
    assert "StopError" == process.result(timeout=60)
    process.join()


@pytest.mark.parametrize("name", CALLS)
def test_a_handler_that_returns_lets_the_wait_go_on(fork, name):
    """Signals rain all the while (SIGCHLD of children, timers): the call must still be woken, and give what it should."""
    blocked = CALLS[name](fork)
    here = fork.Event()
    process = fork.Process(target=_block_under_rain, args=(blocked, here, None))
    process.start()
    here.wait()
    time.sleep(0.1)
    blocked.wake()
    result, _, signals = process.result(timeout=60)
    process.join()
    assert blocked.woken == result
    assert signals > 0


@pytest.mark.parametrize("name", WITH_TIMEOUT)
def test_a_handler_that_returns_does_not_make_the_wait_longer_or_shorter(fork, name):
    """Were the whole timeout begun anew after each signal, this would never end; were it not resumed, it would be short."""
    blocked = CALLS[name](fork)
    here = fork.Event()
    process = fork.Process(target=_block_under_rain, args=(blocked, here, 0.2))
    process.start()
    result, seconds, signals = process.result(timeout=60)
    process.join()
    expected = blocked.timed_out.__name__ if isinstance(blocked.timed_out, type) else blocked.timed_out
    assert expected is not NOTHING
    assert (expected, True, True) == (result, seconds >= 0.2, signals > 0)


def _block_under_rain(blocked, here, timeout):
    count = [0]
    signal.signal(signal.SIGALRM, lambda number, frame: count.__setitem__(0, count[0] + 1))
    signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
    here.set()
    started = time.monotonic()
    try:
        result = blocked.call(timeout)
    except Exception as error:
        result = type(error).__name__
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return result, time.monotonic() - started, count[0]


def test_a_handler_may_use_the_object_that_is_waited_for(fork):
    """No internal lock is held while it runs: it can put into the very queue, release the very lock."""
    q, lock = fork.Queue(1), fork.Lock()
    lock.acquire()

    def handler(number, frame):
        q.put(q.qsize())
        lock.release()

    former = signal.signal(signal.SIGUSR1, handler)
    try:
        for wait in (q.get, lock.acquire):
            timer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGUSR1))
            timer.start()
            assert wait() in (0, True)
            timer.join()
            if wait is lock.acquire:
                q.get()
    finally:
        signal.signal(signal.SIGUSR1, former)


def test_an_interrupted_get_takes_nothing_and_an_interrupted_put_puts_nothing(fork):
    """Signals at random moments, items at random moments: each item arrives once."""
    q, out = fork.Queue(4), fork.Queue()
    process = fork.Process(target=_get_under_fire, args=(q, out, 300))
    process.start()
    for i in range(300):
        q.put(i)
    process.join()
    assert list(range(300)) == [out.get_nowait() for _ in range(300)]
    assert out.empty()


def _get_under_fire(q, out, n):
    signal.signal(signal.SIGALRM, _stop)
    taken = []
    while len(taken) < n:
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.0007)
            # All in C: between get's return and the append no handler can run, which it could between two bytecodes.
            taken.extend(map(q.get, (True,)))
            signal.setitimer(signal.ITIMER_REAL, 0)
        except StopError:
            pass
    for _ in range(2):
        with contextlib.suppress(StopError):
            signal.signal(signal.SIGALRM, signal.SIG_IGN)
    out.put_many(taken)
