"""RLock: what is its own, beside what test_lock.py tests of both kinds."""

from __future__ import annotations

import os
import signal
import threading

import pytest

import procession
from procession import LockOwnerDied
from tests.crash import family


@pytest.fixture
def fork():
    return procession.get_context("fork")


def acquire_deep_and_die(lock, depth):
    for _ in range(depth):
        lock.acquire()
    family.die("SIGKILL")


def test_its_holder_may_take_it_again_and_must_release_as_often(fork):
    lock = fork.RLock()
    for depth in range(1, 5):
        assert lock.acquire()
        assert f"<RLock(MainProcess, {depth})>" == repr(lock)
    for _ in range(4):
        assert lock.locked()
        lock.release()
    assert "<RLock(None, 0)>" == repr(lock)


def test_nested_with_releases_only_at_the_outermost(fork):
    lock = fork.RLock()
    with lock:
        with lock:
            pass
        assert lock._is_mine()
    assert not lock.locked()


@pytest.mark.parametrize("times", [0, 1])
def test_releasing_more_often_than_acquired_is_an_assertion_error(fork, times):
    """The standard library's error, and not the ValueError of Lock."""
    lock = fork.RLock()
    for _ in range(times):
        lock.acquire()
        lock.release()
    with pytest.raises(AssertionError, match="not owned"):
        lock.release()


def test_another_thread_of_the_holders_process_is_another(fork):
    """The word in shared memory names the process only: the thread has to be looked at too."""
    lock, seen = fork.RLock(), []

    def look():
        seen.append(lock.acquire(False))
        try:
            lock.release()
        except AssertionError:
            seen.append("refused")

    with lock:
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
    assert [False, "refused"] == seen


def test_another_process_may_not_release_it(ctx):
    lock = ctx.RLock()
    with lock:
        with ctx.Process(target=family.release, args=(lock,)) as process:
            assert isinstance(process.exception(timeout=100), AssertionError)
        assert lock._is_mine()


def test_a_child_does_not_own_what_its_parent_held_at_fork(fork):
    """The child's copy of the thread has the same ident; only the tag tells them apart."""
    lock = fork.RLock()
    with lock:
        with fork.Process(target=family.acquire_at_once, args=(lock,)) as process:
            assert process.result(timeout=100) is False
        assert 1 == lock._count()


def test_a_dead_holders_depth_dies_with_it(fork):
    """The next holder starts at one, however deep the dead one was."""
    lock = fork.RLock()
    with fork.Process(target=acquire_deep_and_die, args=(lock, 3)):
        pass
    with pytest.warns(LockOwnerDied):
        lock.acquire()
    assert 1 == lock._count()
    lock.release()
    assert not lock.locked()


def test_repr_of_one_held_elsewhere_names_pid_and_depth(fork):
    lock, held = fork.RLock(), fork.Event()
    process = fork.Process(target=family.acquire_tell_and_sleep, args=(lock, held), name="Holder")
    process.start()
    held.wait()
    assert f"<RLock(Holder pid {process.pid}, 1)>" == repr(lock)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
