"""JoinableQueue: join() waits for work done, not for the dead."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

import procession
from procession import ShutDown
from tests.crash import family


@pytest.fixture
def fork():
    return procession.get_context("fork")


def work(q, done):
    for item in q:
        done.put(item)
        q.task_done()


def take_tell_and_sleep(q, taken, n=1):
    for _ in range(n):
        q.get()
    taken.set()
    time.sleep(3600)


def take_mark_take_and_die(q):
    q.get()
    q.task_done()
    q.get()
    family.die("SIGKILL")


def test_join_returns_when_every_item_has_been_marked(ctx):
    q, done = ctx.JoinableQueue(), ctx.Queue()
    worker = ctx.Process(target=work, args=(q, done))
    worker.start()
    q.put_many(range(20))
    q.join()
    assert 20 == done.qsize()
    q.shutdown()
    worker.join()
    assert 0 == worker.exitcode


def test_join_of_a_new_queue_returns_at_once(fork):
    assert fork.JoinableQueue().join() is True


def test_join_with_a_timeout_says_whether_all_was_done(fork):
    q = fork.JoinableQueue()
    q.put(1)
    started = time.monotonic()
    assert q.join(0.1) is False
    assert time.monotonic() - started >= 0.1
    q.get()
    assert q.join(timeout=0) is False  # taken is not done
    q.task_done()
    assert q.join(timeout=0) is True


def test_task_done_more_often_than_taken_is_an_error(fork):
    q = fork.JoinableQueue()
    with pytest.raises(ValueError, match="too many times"):
        q.task_done()
    q.put(1)
    q.get()
    q.task_done()
    with pytest.raises(ValueError, match="too many times"):
        q.task_done()


def test_an_item_not_yet_taken_cannot_be_marked(fork):
    """The standard library's counter lets that pass, and join() then returns too early."""
    q = fork.JoinableQueue()
    q.put(1)
    with pytest.raises(ValueError, match="too many times"):
        q.task_done()
    assert not q.join(0.01)


def test_another_process_may_mark_what_this_one_took(fork):
    """As with the standard library's counter, which knows no takers."""
    q = fork.JoinableQueue()
    q.put(1)
    q.get()
    with fork.Process(target=q.task_done):
        pass
    assert q.join(0)


@pytest.mark.parametrize("how", family.DEATHS)
def test_what_a_dead_consumer_had_in_hand_is_delivered_again(fork, how):
    """So join() cannot wait for ever, and no work is lost."""
    q = fork.JoinableQueue()
    q.put_many(["a", b"b" * 10_000])
    with fork.Process(target=family.get_and_die, args=(q, how)):
        pass
    assert ["a", b"b" * 10_000] == sorted([q.get(timeout=100), q.get(timeout=100)], key=len)
    q.task_done()
    q.task_done()
    assert q.join(0)


def test_the_redelivered_item_counts_in_qsize_and_empty(fork):
    """They are exact: it is in nobody's hands any more."""
    q = fork.JoinableQueue()
    q.put(1)
    with fork.Process(target=family.get_and_die, args=(q,)):
        pass
    assert (1, False) == (q.qsize(), q.empty())
    assert 1 == q.get_nowait()


def test_all_items_in_a_dead_hand_come_back(fork):
    q, taken = fork.JoinableQueue(), fork.Event()
    q.put_many(range(30))
    victim = fork.Process(target=take_tell_and_sleep, args=(q, taken, 20))
    victim.start()
    taken.wait()
    assert 10 == q.qsize()
    victim.kill()
    victim.join()
    assert list(range(30)) == sorted(q.get(timeout=100) for _ in range(30))
    assert not q.join(0)


def test_what_it_had_marked_does_not_come_back(fork):
    q = fork.JoinableQueue()
    q.put_many(["done", "in hand"])
    with fork.Process(target=take_mark_take_and_die, args=(q,)):
        pass
    assert "in hand" == q.get(timeout=100)
    assert q.empty()


def test_a_waiting_consumer_is_woken_by_a_death(fork, wait_until):
    """Nobody puts anything any more: the sleeper has to find the dead one's item itself."""
    q, taken, here = fork.JoinableQueue(), fork.Event(), fork.Event()
    q.put("x")
    victim = fork.Process(target=take_tell_and_sleep, args=(q, taken))
    victim.start()
    taken.wait()
    heir = fork.Process(target=family.tell_and_call, args=(here, q.get))
    heir.start()
    here.wait()
    os.kill(victim.pid, signal.SIGKILL)
    assert "x" == heir.result(timeout=100)
    victim.join()
    heir.join()


def test_join_goes_on_when_another_finishes_a_dead_consumers_work(fork):
    q, taken, done = fork.JoinableQueue(), fork.Event(), fork.Queue()
    q.put("x")
    victim = fork.Process(target=take_tell_and_sleep, args=(q, taken))
    victim.start()
    taken.wait()
    joined = threading.Thread(target=q.join)
    joined.start()
    victim.kill()
    victim.join()
    worker = fork.Process(target=work, args=(q, done))
    worker.start()
    joined.join()
    assert "x" == done.get()
    q.shutdown()
    worker.join()


def test_a_stopped_consumer_keeps_what_it_has(fork, wait_until):
    q, taken = fork.JoinableQueue(), fork.Event()
    q.put("x")
    process = fork.Process(target=take_tell_and_sleep, args=(q, taken))
    process.start()
    taken.wait()
    os.kill(process.pid, signal.SIGSTOP)
    wait_until(lambda: family.state_of(process.pid) == "T")
    assert q.empty()
    assert not q.join(0.2)
    process.kill()
    process.join()
    assert "x" == q.get(timeout=100)


def test_an_immediate_shutdown_lets_join_return(fork):
    """Dropped items are nobody's work any more."""
    q = fork.JoinableQueue()
    q.put_many(range(5))
    q.shutdown(immediate=True)
    assert q.join(0)
    with pytest.raises(ShutDown):
        q.get()


def test_many_deaths_lose_nothing(fork):
    q = fork.JoinableQueue()
    q.put_many(range(10))
    for _ in range(15):
        with fork.Process(target=family.get_and_die, args=(q,)):
            pass
    assert list(range(10)) == sorted(q.get(timeout=100) for _ in range(10))
