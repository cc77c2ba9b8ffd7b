"""Without sleep slices: a lost wake-up hangs here, where slices would hide it (pitfall 2).

`procession._native._set_slices(False)` makes every sleep last until it is woken, or its deadline.
"""

from __future__ import annotations

import threading

import pytest

import procession
from procession import _native
from tests.crash import family
from tests.crash.blocking import CALLS, ON_FUTEX

ROUNDS = 300


@pytest.fixture(autouse=True)
def no_slices():
    """Children inherit it by fork."""
    _native._set_slices(False)
    yield
    _native._set_slices(True)


@pytest.fixture
def fork():
    return procession.get_context("fork")


@pytest.mark.parametrize("name", ON_FUTEX)
def test_a_sleeper_is_woken(fork, name, wait_until):
    """One sleeper in another process, surely asleep."""
    blocked = CALLS[name](fork)
    process = fork.Process(target=blocked.call, args=(None,))
    process.start()
    wait_until(lambda: family.state_of(process.pid) == "S")
    blocked.wake()
    assert blocked.woken == process.result(timeout=100)
    process.join()


@pytest.mark.parametrize("name", ON_FUTEX)
def test_a_sleeping_thread_is_woken(fork, name):
    """And in the same process, about to sleep or not yet."""
    for _ in range(20):
        blocked = CALLS[name](fork)
        if name == "RLock.acquire":
            return  # the thread that holds it is the one that wakes: tested above
        got = []
        thread = threading.Thread(target=lambda b=blocked, got=got: got.append(b.call(None)))
        thread.start()
        blocked.wake()
        if name.startswith("Condition.wait") and not name.endswith("for"):
            while thread.is_alive():  # it may have come before the wait
                blocked.wake()
                thread.join(0.001)
        thread.join()
        assert [blocked.woken] == got


def test_ping_pong_loses_no_wake_up(fork):
    ping, pong = fork.Queue(), fork.Queue(1)
    process = fork.Process(target=_pong, args=(ping, pong, ROUNDS * 5))
    process.start()
    for i in range(ROUNDS * 5):
        ping.put(i)
        assert i == pong.get()
    process.join()


def _pong(ping, pong, n):
    for _ in range(n):
        pong.put(ping.get())


@pytest.mark.parametrize("kind", ["Queue", "JoinableQueue"])
@pytest.mark.parametrize("maxsize", [0, 1, 3])
def test_producers_and_consumers_lose_no_wake_up(fork, kind, maxsize):
    """Two of each: a flag that one producer clears and restores loses the other's wake-up only then."""
    q = getattr(fork, kind)(maxsize)
    makers = [fork.Process(target=family.put_all, args=(q, list(range(ROUNDS)))) for _ in range(2)]
    takers = [fork.Process(target=_take, args=(q, ROUNDS)) for _ in range(2)]
    for process in takers + makers:
        process.start()
    for process in makers + takers:
        process.join()
    assert [0] * 4 == [process.exitcode for process in makers + takers]
    if kind == "JoinableQueue":
        q.join()


def _take(q, n):
    for _ in range(n):
        q.get()
        if hasattr(q, "task_done"):
            q.task_done()


@pytest.mark.parametrize("kind", ["Lock", "RLock", "Semaphore", "BoundedSemaphore", "Condition"])
def test_a_contended_lock_loses_no_wake_up(fork, kind):
    lock = getattr(fork, kind)()
    processes = [fork.Process(target=_enter, args=(lock, ROUNDS * 3)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [0] * 4 == [process.exitcode for process in processes]


def _enter(lock, n):
    for i in range(n):
        with lock:
            for _ in range(i % 50):
                pass


def test_an_event_loses_no_wake_up(fork):
    """Set and cleared in turns by two."""
    mine, theirs = fork.Event(), fork.Event()
    process = fork.Process(target=_answer, args=(mine, theirs, ROUNDS))
    process.start()
    for _ in range(ROUNDS):
        mine.set()
        theirs.wait()
        theirs.clear()
    process.join()


def _answer(mine, theirs, n):
    for _ in range(n):
        mine.wait()
        mine.clear()
        theirs.set()


def test_a_condition_loses_no_wake_up(fork):
    """A buffer of one place, two at each side: every notify is needed."""
    condition, full, count = fork.Condition(), fork.Event(), ROUNDS
    processes = [fork.Process(target=_move, args=(condition, full, fill, count)) for fill in (True, False, True, False)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [0] * 4 == [process.exitcode for process in processes]


def _move(condition, full, fill, n):
    for _ in range(n):
        with condition:
            condition.wait_for(lambda: full.is_set() != fill)
            if fill:
                full.set()
            else:
                full.clear()
            condition.notify_all()


@pytest.mark.parametrize("parties", [2, 3, 4])
def test_a_barrier_loses_no_wake_up(fork, parties):
    barrier = fork.Barrier(parties)
    processes = [fork.Process(target=_rounds, args=(barrier, ROUNDS)) for _ in range(parties)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [0] * parties == [process.exitcode for process in processes]


def _rounds(barrier, n):
    for _ in range(n):
        barrier.wait()


def test_join_loses_no_wake_up(fork):
    q = fork.JoinableQueue()
    worker = fork.Process(target=_take, args=(q, ROUNDS))
    worker.start()
    for i in range(ROUNDS):
        q.put(i)
        q.join()
    worker.join()
