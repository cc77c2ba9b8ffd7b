"""Semaphore and BoundedSemaphore: counting, and whose permits come back when a process dies."""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import signal
import threading
import time
import weakref

import pytest

import procession
from tests.crash import family

KINDS = ("Semaphore", "BoundedSemaphore")


@pytest.fixture
def fork():
    return procession.get_context("fork")


@pytest.fixture(params=KINDS)
def make(request, fork):
    return getattr(fork, request.param)


def acquire_tell_and_sleep(semaphore, acquired):
    with semaphore:
        acquired.set()
        time.sleep(3600)


def acquire_times_and_die(semaphore, times):
    for _ in range(times):
        semaphore.__enter__()
    family.die("SIGKILL")


def test_it_counts_down_and_up(make):
    semaphore = make(2)
    assert [True, True, False] == [semaphore.acquire(False) for _ in range(3)]
    assert 0 == semaphore.get_value()
    semaphore.release()
    semaphore.release()
    assert 2 == semaphore.get_value()


def test_a_semaphore_may_be_released_above_its_first_value(fork):
    semaphore = fork.Semaphore(1)
    semaphore.release()
    assert 2 == semaphore.get_value()


def test_a_bounded_semaphore_may_not(fork):
    semaphore = fork.BoundedSemaphore(1)
    with pytest.raises(ValueError, match="too many times"):
        semaphore.release()
    assert 1 == semaphore.get_value()


def test_with_takes_one_and_gives_it_back_after_an_exception(make):
    semaphore = make(1)
    with pytest.raises(KeyError), semaphore as held:
        assert (True, 0) == (held, semaphore.get_value())
        raise KeyError
    assert 1 == semaphore.get_value()


@pytest.mark.parametrize(
    ("value", "error"), [(-1, ValueError), ("1", TypeError), (1.5, TypeError), (1 << 31, OverflowError)]
)
def test_a_value_that_is_no_count_is_refused(make, value, error):
    with pytest.raises(error):
        make(value)


@pytest.mark.parametrize(("timeout", "error"), [("1", TypeError), (float("nan"), ValueError)])
def test_a_timeout_that_is_no_number_is_refused_and_takes_nothing(make, timeout, error):
    semaphore = make(1)
    with pytest.raises(error):
        semaphore.acquire(True, timeout)
    assert 1 == semaphore.get_value()


def test_a_timeout_waits_at_least_so_long_and_a_negative_one_not_at_all(make):
    semaphore = make(0)
    started = time.monotonic()
    assert not semaphore.acquire(True, 0.15)
    assert time.monotonic() - started >= 0.15
    assert not semaphore.acquire(True, -1)


def test_permits_pass_between_processes(ctx):
    """Signalling: who releases need not have acquired."""
    semaphore = ctx.Semaphore(0)
    with ctx.Process(target=family.release, args=(semaphore,)):
        assert semaphore.acquire()
    assert 0 == semaphore.get_value()


def test_waiting_lets_other_threads_run(make):
    semaphore = make(1)
    semaphore.acquire()
    thread = threading.Thread(target=lambda: (time.sleep(0.05), semaphore.release()))
    thread.start()
    assert semaphore.acquire()
    thread.join()


def test_never_more_inside_than_permits(fork, tmp_path):
    """Threads of several processes at once; each counts who is in with it."""
    semaphore = fork.Semaphore(2)

    def enter(inside, most):
        for _ in range(300):
            with semaphore:
                inside.append(None)
                most[0] = max(most[0], len(inside))
                inside.pop()

    inside, most = [], [0]
    threads = [threading.Thread(target=enter, args=(inside, most)) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most[0] <= 2
    assert 2 == semaphore.get_value()


@pytest.mark.parametrize("how", family.DEATHS)
def test_a_permit_held_by_with_comes_back_when_its_holder_dies(make, fork, how):
    """Else every crash makes a pool of N connections one smaller, until all wait for ever."""
    semaphore = make(1)
    with fork.Process(target=family.enter_and_die, args=(semaphore, how)):
        pass
    assert semaphore.acquire(True, 100)
    semaphore.release()
    assert 1 == semaphore.get_value()


def test_a_permit_of_a_bounded_semaphore_comes_back_without_with(fork):
    """Bounded means that whoever takes one gives it back: so the dead's can be told from signals."""
    semaphore = fork.BoundedSemaphore(1)
    with fork.Process(target=family.acquire_and_die, args=(semaphore,)):
        pass
    assert semaphore.acquire(True, 100)


def test_a_bare_acquire_of_a_semaphore_stays_taken(fork):
    """It may be a signal that another process answers, as with POSIX semaphores."""
    semaphore = fork.Semaphore(1)
    with fork.Process(target=family.acquire_and_die, args=(semaphore,)):
        pass
    assert not semaphore.acquire(True, 0.1)


def test_all_permits_of_one_holder_come_back(make, fork):
    semaphore = make(3)
    with fork.Process(target=acquire_times_and_die, args=(semaphore, 3)):
        pass
    assert [True, True, True] == [semaphore.acquire(True, 100) for _ in range(3)]
    assert 0 == semaphore.get_value()


def test_a_death_ends_a_wait_that_has_begun(make, fork):
    """Nobody releases and nobody else looks: the sleeper itself has to find out."""
    semaphore, held = make(1), fork.Event()
    process = fork.Process(target=acquire_tell_and_sleep, args=(semaphore, held))
    process.start()
    held.wait()
    killer = threading.Timer(0.1, os.kill, (process.pid, signal.SIGKILL))
    killer.start()
    assert semaphore.acquire()
    killer.join()
    process.join()


def test_a_stopped_holder_keeps_its_permit(make, fork, wait_until):
    semaphore, held = make(1), fork.Event()
    process = fork.Process(target=acquire_tell_and_sleep, args=(semaphore, held))
    process.start()
    held.wait()
    os.kill(process.pid, signal.SIGSTOP)
    wait_until(lambda: family.state_of(process.pid) == "T")
    assert not semaphore.acquire(True, 0.2)
    process.kill()
    process.join()
    assert semaphore.acquire(True, 100)


def test_a_holder_that_ends_by_its_bootstrap_keeps_its_permit(make, fork):
    semaphore = make(1)
    with fork.Process(target=family.acquire_and_end, args=(semaphore,)):
        pass
    assert not semaphore.acquire(True, 0.1)
    semaphore.release()
    assert 1 == semaphore.get_value()


def test_many_holders_are_written_down(fork):
    """More than the object itself has room for: the list of holders grows, and all come back."""
    n = 12
    semaphore, held = fork.BoundedSemaphore(n), fork.Semaphore(0)
    processes = [fork.Process(target=_acquire_release_sleep, args=(semaphore, held)) for _ in range(n)]
    for process in processes:
        process.start()
    for _ in processes:
        held.acquire()
    assert not semaphore.acquire(False)
    for process in processes:
        process.kill()
    for process in processes:
        process.join()
    assert [True] * n == [semaphore.acquire(True, 100) for _ in range(n)]


def _acquire_release_sleep(semaphore, held):
    semaphore.acquire()
    held.release()
    time.sleep(3600)


def test_repr_shows_the_value(fork):
    semaphore, bounded = fork.Semaphore(3), fork.BoundedSemaphore(2)
    bounded.acquire()
    assert "<Semaphore(value=3)>" == repr(semaphore)
    assert "<BoundedSemaphore(value=1, maxvalue=2)>" == repr(bounded)


def test_a_pickled_semaphore_is_the_same_semaphore(make):
    semaphore = make(2)
    pickle.loads(pickle.dumps(semaphore)).acquire()
    assert 1 == semaphore.get_value()


def test_weak_references_subclasses_and_exit_stacks_work(make):
    class Named(type(make())):
        pass

    semaphore = Named(1)
    semaphore.name = "mine"
    with contextlib.ExitStack() as stack:
        stack.enter_context(semaphore)
        assert 0 == semaphore.get_value()
    alive = weakref.ref(semaphore)
    del semaphore
    gc.collect()
    assert alive() is None


def test_a_bounded_semaphore_is_a_semaphore():
    """As in the standard library."""
    assert issubclass(type(procession.BoundedSemaphore()), type(procession.Semaphore()))
