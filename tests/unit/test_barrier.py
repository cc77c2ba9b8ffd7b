"""Barrier: nobody goes on before all have come, and nobody waits for the dead."""

from __future__ import annotations

import os
import pickle
import signal
import threading
import time
from threading import BrokenBarrierError

import pytest

import procession
from tests.crash import family


@pytest.fixture
def fork():
    return procession.get_context("fork")


def wait_or_broken(barrier, timeout=None):
    try:
        return barrier.wait(timeout)
    except BrokenBarrierError:
        return "broken"


def wait_rounds(barrier, n):
    return [barrier.wait() for _ in range(n)]


def kill_self():
    family.die("SIGKILL")


def start_waiting(fork, barrier, n, wait_until):
    processes = [fork.Process(target=wait_or_broken, args=(barrier,)) for _ in range(n)]
    for process in processes:
        process.start()
    wait_until(lambda: barrier.n_waiting == n, f"{n} at the barrier")
    return processes


def test_all_go_on_when_the_last_has_come(ctx, wait_until):
    barrier = ctx.Barrier(3)
    processes = [ctx.Process(target=wait_or_broken, args=(barrier,)) for _ in range(2)]
    for process in processes:
        process.start()
    wait_until(lambda: barrier.n_waiting == 2)
    indexes = [barrier.wait()] + [process.result(timeout=100) for process in processes]
    assert [0, 1, 2] == sorted(indexes)
    assert 2 == indexes[0]
    for process in processes:
        process.join()


def test_it_can_be_used_again_at_once(fork):
    """A fast party must not run into the generation it has just left."""
    barrier = fork.Barrier(2)
    process = fork.Process(target=wait_rounds, args=(barrier, 500))
    process.start()
    mine = wait_rounds(barrier, 500)
    theirs = process.result(timeout=100)
    process.join()
    assert [{0, 1}] * 500 == [set(pair) for pair in zip(mine, theirs, strict=True)]


def test_the_action_runs_once_a_round_before_anybody_goes_on(fork):
    ran = []
    barrier = fork.Barrier(3, action=lambda: ran.append(len(ran)))
    seen = []

    def party():
        for _ in range(20):
            barrier.wait()
            seen.append(len(ran))
            barrier.wait()

    threads = [threading.Thread(target=party) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 40 == len(ran)
    assert sorted(list(range(1, 41, 2)) * 3) == sorted(seen)


def test_an_action_that_raises_breaks_the_barrier(fork, wait_until):
    barrier = fork.Barrier(2, action=lambda: 1 / 0)
    (process,) = start_waiting(fork, barrier, 1, wait_until)
    with pytest.raises(ZeroDivisionError):
        barrier.wait()
    assert ("broken", True) == (process.result(timeout=100), barrier.broken)
    process.join()


def test_a_timeout_breaks_it_for_all(fork, wait_until):
    barrier = fork.Barrier(3)
    (process,) = start_waiting(fork, barrier, 1, wait_until)
    with pytest.raises(BrokenBarrierError):
        barrier.wait(0.05)
    assert "broken" == process.result(timeout=100)
    process.join()


def test_its_own_timeout_is_the_default(fork):
    with pytest.raises(BrokenBarrierError):
        fork.Barrier(2, timeout=0.05).wait()


def test_abort_breaks_it_and_reset_mends_it(fork, wait_until):
    barrier = fork.Barrier(2)
    (process,) = start_waiting(fork, barrier, 1, wait_until)
    barrier.abort()
    assert "broken" == process.result(timeout=100)
    process.join()
    with pytest.raises(BrokenBarrierError):
        barrier.wait()
    barrier.reset()
    assert not barrier.broken
    (process,) = start_waiting(fork, barrier, 1, wait_until)
    assert 1 == barrier.wait()
    process.join()


def test_reset_sends_those_who_wait_away(fork, wait_until):
    barrier = fork.Barrier(3)
    processes = start_waiting(fork, barrier, 2, wait_until)
    barrier.reset()
    assert ["broken"] * 2 == [process.result(timeout=100) for process in processes]
    assert not barrier.broken
    for process in processes:
        process.join()


# --- death ---------------------------------------------------------------------------------------------------------------


def test_a_party_that_dies_waiting_breaks_it_for_those_who_wait(fork, wait_until):
    """They would wait for ever: the dead will not come to the next round either."""
    barrier = fork.Barrier(3)
    victim, survivor = start_waiting(fork, barrier, 2, wait_until)
    victim.kill()
    assert "broken" == survivor.result(timeout=100)
    victim.join()
    survivor.join()


def test_a_party_that_died_waiting_is_not_counted_by_the_last_to_come(fork, wait_until):
    """Nobody was there to notice: the one who comes next must not go on as if it were two."""
    barrier = fork.Barrier(2)
    (victim,) = start_waiting(fork, barrier, 1, wait_until)
    victim.kill()
    victim.join()
    with pytest.raises(BrokenBarrierError):
        barrier.wait(100)


def test_a_zombie_is_not_counted_either(fork, wait_until):
    barrier = fork.Barrier(2)
    (victim,) = start_waiting(fork, barrier, 1, wait_until)
    os.kill(victim.pid, signal.SIGKILL)
    wait_until(lambda: family.state_of(victim.pid) == "Z")
    with pytest.raises(BrokenBarrierError):
        barrier.wait(100)
    victim.join()


def test_a_party_that_dies_in_the_action_breaks_it(fork, wait_until):
    barrier = fork.Barrier(2, action=kill_self)
    (survivor,) = start_waiting(fork, barrier, 1, wait_until)
    runner = fork.Process(target=wait_or_broken, args=(barrier,))
    runner.start()
    assert "broken" == survivor.result(timeout=100)
    runner.join()
    survivor.join()


def test_a_stopped_party_is_waited_for(fork, wait_until):
    """Paused is not dead."""
    barrier = fork.Barrier(3)
    processes = start_waiting(fork, barrier, 2, wait_until)
    os.kill(processes[0].pid, signal.SIGSTOP)
    time.sleep(0.3)
    assert not barrier.broken
    os.kill(processes[0].pid, signal.SIGCONT)
    assert 2 == barrier.wait()
    assert {0, 1} == {process.result(timeout=100) for process in processes}
    for process in processes:
        process.join()


# --- the object ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("parties", "error"), [(0, ValueError), (-1, ValueError), ("2", TypeError), (2.0, TypeError)])
def test_parties_that_are_no_positive_number_are_refused(fork, parties, error):
    with pytest.raises(error):
        fork.Barrier(parties)


@pytest.mark.parametrize(("timeout", "error"), [("1", TypeError), (float("nan"), ValueError)])
def test_a_timeout_that_is_no_number_is_refused_and_breaks_nothing(fork, timeout, error):
    barrier = fork.Barrier(2)
    with pytest.raises(error):
        barrier.wait(timeout)
    assert (False, 0) == (barrier.broken, barrier.n_waiting)


def test_one_party_never_waits(fork):
    assert 0 == fork.Barrier(1).wait()


def test_repr_shows_who_waits(fork):
    barrier = fork.Barrier(2)
    assert "waiters=0/2" in repr(barrier)
    barrier.abort()
    assert "broken" in repr(barrier)


def test_it_is_a_threading_barrier_and_pickles(fork):
    """As the standard library's is."""
    barrier = fork.Barrier(2, timeout=0.05)
    assert isinstance(barrier, threading.Barrier)
    again = pickle.loads(pickle.dumps(barrier))
    with pytest.raises(BrokenBarrierError):
        again.wait()
    assert barrier.broken
