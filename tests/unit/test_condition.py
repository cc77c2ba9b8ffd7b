"""Condition: first come first served, and no notification for a corpse."""

from __future__ import annotations

import os
import pickle
import signal
import threading
import time
import warnings
import weakref

import pytest

import procession
from procession import LockOwnerDied
from tests.crash import family


@pytest.fixture
def fork():
    return procession.get_context("fork")


@pytest.fixture(params=["RLock", "Lock"])
def condition(request, fork):
    """With the lock it makes itself, and with a Lock."""
    return fork.Condition(None if request.param == "RLock" else fork.Lock())


def wait_and_tell(condition, woken, timeout=None):
    with condition:
        result = condition.wait(timeout)
    woken.release()
    return result


def hold_and_sleep(condition, held):
    condition.acquire()
    held.set()
    time.sleep(3600)


def start_waiters(fork, condition, woken, n, wait_until):
    """Start n processes that wait, one after the other: the order of the line is known."""
    processes = []
    for i in range(n):
        process = fork.Process(target=wait_and_tell, args=(condition, woken))
        process.start()
        processes.append(process)
        wait_until(lambda want=i + 1: condition._line.waiting() == want, f"{i + 1} in line")
    return processes


@pytest.mark.parametrize("method", ["wait", "notify", "notify_all", "wait_for"])
def test_it_must_be_held(condition, method):
    with pytest.raises(AssertionError):
        getattr(condition, method)(*([lambda: False] if method == "wait_for" else []))


def test_notify_wakes_one_and_the_longest_waiting_first(fork, condition, wait_until):
    woken = fork.Semaphore(0)
    first, second = start_waiters(fork, condition, woken, 2, wait_until)
    with condition:
        condition.notify()
    assert woken.acquire()
    first.join()
    assert second.is_alive()
    assert not woken.acquire(True, 0.05)
    with condition:
        condition.notify()
    second.join()


def test_notify_n_wakes_exactly_n(fork, condition, wait_until):
    """Not more: the waiters of a bounded buffer count on it."""
    woken = fork.Semaphore(0)
    processes = start_waiters(fork, condition, woken, 4, wait_until)
    with condition:
        condition.notify(3)
    for _ in range(3):
        woken.acquire()
    assert not woken.acquire(True, 0.05)
    assert 1 == condition._line.waiting()
    with condition:
        condition.notify_all()
    for process in processes:
        process.join()
    assert [True] * 4 == [process.result(timeout=100) for process in processes]


def test_notify_without_a_waiter_is_not_kept(condition):
    with condition:
        condition.notify()
        assert condition.wait(0.05) is False


@pytest.mark.parametrize("n", [0, -1])
def test_notifying_nobody_wakes_nobody(fork, condition, n, wait_until):
    woken = fork.Semaphore(0)
    (process,) = start_waiters(fork, condition, woken, 1, wait_until)
    with condition:
        condition.notify(n)
    assert not woken.acquire(True, 0.05)
    with condition:
        condition.notify()
    process.join()


def test_it_wakes_across_every_start_method(ctx, wait_until):
    condition, woken = ctx.Condition(), ctx.Semaphore(0)
    process = ctx.Process(target=wait_and_tell, args=(condition, woken))
    process.start()
    wait_until(lambda: condition._line.waiting() == 1)
    with condition:
        condition.notify()
    assert process.result(timeout=100) is True
    process.join()


def test_many_threads_wait_in_one_process(fork, condition, wait_until):
    """More than the object has room for: the line grows; each thread has a place of its own."""
    n, woken = 40, fork.Semaphore(0)
    threads = [threading.Thread(target=wait_and_tell, args=(condition, woken)) for _ in range(n)]
    for thread in threads:
        thread.start()
    wait_until(lambda: condition._line.waiting() == n)
    with condition:
        condition.notify(n // 2)
    for _ in range(n // 2):
        woken.acquire()
    wait_until(lambda: condition._line.waiting() == n - n // 2)
    with condition:
        condition.notify_all()
    for thread in threads:
        thread.join()


def test_a_timeout_waits_at_least_so_long_and_has_the_lock_again(condition):
    with condition:
        started = time.monotonic()
        assert condition.wait(0.15) is False
        assert time.monotonic() - started >= 0.15
        assert condition._lock._is_mine()
    assert 0 == condition._line.waiting()


@pytest.mark.parametrize(("timeout", "error"), [("1", TypeError), (float("nan"), ValueError)])
def test_a_timeout_that_is_no_number_leaves_nobody_in_line(condition, timeout, error):
    """A place left behind would take the next notification."""
    with condition:
        with pytest.raises(error):
            condition.wait(timeout)
        assert condition._lock._is_mine()
    assert 0 == condition._line.waiting()


def test_a_deeply_held_rlock_is_let_go_and_taken_back_as_deep(fork, wait_until):
    """Else nobody could ever notify."""
    condition, woken = fork.Condition(), fork.Semaphore(0)

    def notify():
        wait_until(lambda: condition._line.waiting() == 1)
        with condition:
            condition.notify()

    thread = threading.Thread(target=notify)
    thread.start()
    with condition, condition, condition:
        assert condition.wait()
        assert 3 == condition._lock._count()
    thread.join()
    assert not condition._lock.locked()
    del woken


def test_wait_for_returns_the_predicates_last_value(fork):
    condition = fork.Condition()
    with condition:
        assert "yes" == condition.wait_for(lambda: "yes")
        started = time.monotonic()
        assert "" == condition.wait_for(lambda: "", timeout=0.1)
        assert time.monotonic() - started >= 0.1


def test_wait_for_wakes_when_it_comes_true(fork):
    condition, seen = fork.Condition(), []

    def change():
        for _ in range(3):
            time.sleep(0.01)
            with condition:
                seen.append(None)
                condition.notify()

    thread = threading.Thread(target=change)
    with condition:
        thread.start()
        assert condition.wait_for(lambda: len(seen) == 3)
    thread.join()


# --- death ---------------------------------------------------------------------------------------------------------------


def test_a_waiter_killed_before_the_notify_does_not_get_it(fork, condition, wait_until):
    woken = fork.Semaphore(0)
    first, second = start_waiters(fork, condition, woken, 2, wait_until)
    first.kill()
    first.join()
    with condition:
        condition.notify()
    assert second.result(timeout=100) is True
    second.join()


def test_an_unreaped_waiter_does_not_get_it_either(fork, condition, wait_until):
    """A zombie is dead, though kill(pid, 0) says it lives (pitfall 5)."""
    woken = fork.Semaphore(0)
    first, second = start_waiters(fork, condition, woken, 2, wait_until)
    os.kill(first.pid, signal.SIGKILL)
    wait_until(lambda: family.state_of(first.pid) == "Z")
    with condition:
        condition.notify()
    assert second.result(timeout=100) is True
    first.join()
    second.join()


def test_a_notification_its_receiver_could_not_take_goes_to_the_next(fork, condition, wait_until):
    """Killed after the notify, asleep: a stopped process cannot wake up in between."""
    woken = fork.Semaphore(0)
    first, second = start_waiters(fork, condition, woken, 2, wait_until)
    os.kill(first.pid, signal.SIGSTOP)
    wait_until(lambda: family.state_of(first.pid) == "T")
    with condition:
        condition.notify()
    os.kill(first.pid, signal.SIGKILL)
    assert second.result(timeout=100) is True
    first.join()
    second.join()


def test_a_waiter_killed_while_it_waits_for_the_lock_passes_the_notification_on(fork, condition, wait_until):
    """It is awake and told, and has done nothing yet: between waking up and having the lock is the longest window."""
    woken = fork.Semaphore(0)
    first, second = start_waiters(fork, condition, woken, 2, wait_until)
    with condition:
        condition.notify()
        time.sleep(0.1)  # it wakes up, and waits for the lock that is held here
        assert 1 == condition._line.waiting()
        os.kill(first.pid, signal.SIGKILL)
        first.join()
    assert second.result(timeout=100) is True
    second.join()


def test_the_lock_of_a_killed_holder_is_recovered_by_those_who_wait(fork, wait_until):
    condition, held = fork.Condition(), fork.Event()
    victim = fork.Process(target=hold_and_sleep, args=(condition, held))
    victim.start()
    held.wait()
    victim.kill()
    victim.join()
    with pytest.warns(LockOwnerDied, match=str(victim.pid)), condition:
        condition.notify()


def wait_and_tell_inside(condition, woken):
    warnings.simplefilter("ignore", LockOwnerDied)
    with condition:
        condition.wait()
        woken.release()


def test_a_kill_at_a_random_moment_never_takes_a_notification(fork, wait_until):
    """Ten times over, one of two waiters dies about when it is told: the other is told, or the next to come knows why not.

    A waiter that is killed once wait() has returned has had its notification, but then it holds the lock: whoever acquires
    it is warned, and tells somebody else. What must not be is a notification that is gone without a word.
    """
    condition, woken = fork.Condition(fork.Lock()), fork.Semaphore(0)
    for i in range(10):
        waiters = []
        for n in (1, 2):
            waiters.append(fork.Process(target=wait_and_tell_inside, args=(condition, woken)))
            waiters[-1].start()
            wait_until(lambda want=n: condition._line.waiting() == want, f"{n} in line")
        first, second = waiters
        with condition:
            condition.notify()
        time.sleep(0.0002 * i)
        first.kill()
        first.join()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with condition:
                if caught:
                    condition.notify()
        assert woken.acquire(True, 60)
        with condition:
            condition.notify()  # where it was the first who told
        second.join()
        while woken.acquire(False):
            pass


# --- signals -----------------------------------------------------------------------------------------------------------------


def test_an_interrupted_wait_has_the_lock_again_and_leaves_the_line(condition):
    """Else the `with` around it would release what it does not hold."""

    class StopError(Exception):
        pass

    def handler(number, frame):
        raise StopError

    former = signal.signal(signal.SIGUSR1, handler)
    try:
        with pytest.raises(StopError), condition:
            timer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGUSR1))
            timer.start()
            condition.wait()
    finally:
        signal.signal(signal.SIGUSR1, former)
    timer.join()
    assert 0 == condition._line.waiting()
    assert not condition._lock.locked()


# --- the object ---------------------------------------------------------------------------------------------------------------


def test_repr_shows_lock_and_waiters(fork):
    assert "<Condition(<RLock(None, 0)>, 0)>" == repr(fork.Condition())


def test_a_pickled_condition_is_the_same_and_keeps_its_lock(fork):
    lock = fork.Lock()
    condition = fork.Condition(lock)
    again, same = pickle.loads(pickle.dumps((condition, lock)))
    with again:
        assert lock.locked()
        assert same.locked()
    assert again.wait.__self__ is again
    with again, warnings.catch_warnings():
        assert again.wait(0) is False


def test_weak_references_and_subclasses_work(fork):
    class Named(type(fork.Condition())):
        pass

    condition = Named()
    condition.name = "mine"
    alive = weakref.ref(condition)
    assert alive() is condition
