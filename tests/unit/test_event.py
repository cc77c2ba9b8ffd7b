"""Event: one flag, seen by all."""

from __future__ import annotations

import pickle
import threading
import time
import weakref

import pytest

import procession
from tests.crash import family


@pytest.fixture
def fork():
    return procession.get_context("fork")


def test_it_is_set_and_cleared(fork):
    event = fork.Event()
    assert not event.is_set()
    event.set()
    event.set()
    assert (True, True) == (event.is_set(), event.wait(0))
    event.clear()
    assert (False, False) == (event.is_set(), event.wait(0))


def test_set_wakes_a_waiter_in_another_process(ctx):
    event, here = ctx.Event(), ctx.Event()
    process = ctx.Process(target=family.tell_and_call, args=(here, event.wait))
    process.start()
    here.wait()
    time.sleep(0.05)
    event.set()
    assert process.result(timeout=100) is True
    process.join()


def test_set_wakes_all_waiters(fork):
    """Threads and processes, all with one set()."""
    event, here = fork.Event(), fork.Semaphore(0)
    processes = [fork.Process(target=_tell_and_wait, args=(here, event)) for _ in range(3)]
    threads = [threading.Thread(target=_tell_and_wait, args=(here, event)) for _ in range(3)]
    for each in processes + threads:
        each.start()
    for _ in processes + threads:
        here.acquire()
    event.set()
    for each in processes + threads:
        each.join()
    assert [True] * 3 == [process.result(timeout=100) for process in processes]


def _tell_and_wait(here, event):
    here.release()
    return event.wait()


def test_a_timeout_waits_at_least_so_long(fork):
    event = fork.Event()
    started = time.monotonic()
    assert event.wait(0.15) is False
    assert time.monotonic() - started >= 0.15


@pytest.mark.parametrize("timeout", [0, -1, float("-inf")])
def test_a_timeout_of_zero_or_less_does_not_wait(fork, timeout):
    assert fork.Event().wait(timeout) is False


@pytest.mark.parametrize(("timeout", "error"), [("1", TypeError), (float("nan"), ValueError)])
def test_a_timeout_that_is_no_number_is_refused(fork, timeout, error):
    with pytest.raises(error):
        fork.Event().wait(timeout)


def test_wait_takes_its_timeout_by_name_and_nothing_else(fork):
    event = fork.Event()
    assert event.wait(timeout=0) is False
    with pytest.raises(TypeError):
        event.wait(0, 0)
    with pytest.raises(TypeError):
        event.wait(block=True)


def test_waiting_lets_other_threads_run(fork):
    event = fork.Event()
    thread = threading.Thread(target=lambda: (time.sleep(0.05), event.set()))
    thread.start()
    assert event.wait()
    thread.join()


def test_a_dead_waiter_takes_nothing_with_it(fork, wait_until):
    """Counting who sleeps would drift with every killed sleeper (pitfall 2)."""
    event = fork.Event()
    for _ in range(5):
        victim = fork.Process(target=event.wait)
        victim.start()
        wait_until(lambda pid=victim.pid: family.state_of(pid) == "S")
        victim.kill()
        victim.join()
    survivor = fork.Process(target=event.wait)
    survivor.start()
    event.set()
    assert survivor.result(timeout=100) is True
    survivor.join()


def test_repr_shows_whether_it_is_set(fork):
    event = fork.Event()
    assert repr(event).endswith(" unset>")
    event.set()
    assert repr(event).endswith(" set>")


def test_a_pickled_event_is_the_same_event(fork):
    event = fork.Event()
    pickle.loads(pickle.dumps(event)).set()
    assert event.is_set()


def test_weak_references_and_subclasses_work(fork):
    class Named(type(fork.Event())):
        pass

    event = Named()
    event.name = "mine"
    alive = weakref.ref(event)
    assert alive() is event
    del event
    assert alive() is None
