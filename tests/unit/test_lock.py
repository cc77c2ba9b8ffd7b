"""Lock, and what Lock and RLock have in common: mutual exclusion, hand-over, and the death of a holder."""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import signal
import threading
import time
import warnings
import weakref

import pytest

import procession
from procession import LockOwnerDied, LockOwnerDiedError
from tests.crash import family

KINDS = ("Lock", "RLock")


@pytest.fixture
def fork():
    return procession.get_context("fork")


@pytest.fixture(params=KINDS)
def make(request, fork):
    """Make a lock of each kind."""
    return getattr(fork, request.param)


class Named(type(procession.Lock())):
    """A subclass with an attribute."""

    def __init__(self, name):
        super().__init__()
        self.name = name


def increment(lock, counter, times):
    for _ in range(times):
        with lock:
            value = counter[0]
            counter[0] = value + 1


# --- the contract of the standard library ------------------------------------------------------------------------------


def test_a_free_lock_is_acquired_and_a_held_one_is_not(fork):
    lock = fork.Lock()
    assert [True, False, False] == [lock.acquire(), lock.acquire(False), lock.acquire(True, 0.01)]
    lock.release()
    assert lock.acquire(block=True, timeout=0)


def test_releasing_a_free_lock_is_an_error(fork):
    with pytest.raises(ValueError, match="released too many times"):
        fork.Lock().release()


def test_with_returns_true_and_releases_after_an_exception(make):
    lock = make()
    with pytest.raises(KeyError), lock as held:
        assert held is True
        raise KeyError
    assert not lock.locked()


def test_only_one_process_at_a_time_is_inside(start_method, tmp_path):
    """The one thing a lock is for, across real processes and by every way of starting them."""
    ctx = procession.get_context(start_method)
    lock, path = ctx.Lock(), tmp_path / "counter"
    path.write_text("0")
    processes = [ctx.Process(target=family.count_in_file, args=(lock, path, 200)) for _ in range(2)]
    for process in processes:
        process.start()
    family.count_in_file(lock, path, 200)
    for process in processes:
        process.join()
    assert "600" == path.read_text()


def test_threads_exclude_each_other_too(make):
    """One process has one tag in the lock word, however many threads it has."""
    lock, counter = make(), [0]
    threads = [threading.Thread(target=increment, args=(lock, counter, 2000)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 8000 == counter[0]


def test_a_lock_may_be_released_by_another_process(ctx):
    """As with POSIX semaphores: signalling by a lock is legal, so the owner's word is no reason to refuse."""
    lock = ctx.Lock()
    lock.acquire()
    with ctx.Process(target=family.release, args=(lock,)) as process:
        process.result(timeout=100)
    assert lock.acquire(False)


def test_a_timeout_waits_at_least_so_long(make, fork):
    lock = make()
    with fork.Process(target=family.acquire_and_end, args=(lock,)):
        pass
    started = time.monotonic()
    assert not lock.acquire(True, 0.15)
    assert time.monotonic() - started >= 0.15


@pytest.mark.parametrize("timeout", [0, -1, -1e300, float("-inf")])
def test_a_timeout_of_zero_or_less_does_not_wait(fork, timeout):
    """The standard library's rule, not threading's (where -1 is for ever)."""
    lock = fork.Lock()
    lock.acquire()
    assert not lock.acquire(True, timeout)


@pytest.mark.parametrize("timeout", [float("inf"), 1e18, 10**30])
def test_a_huge_timeout_is_for_ever_and_not_an_overflow(fork, timeout):
    lock = fork.Lock()
    lock.acquire()
    release = threading.Timer(0.05, lock.release)
    release.start()
    assert lock.acquire(True, timeout)
    release.join()


@pytest.mark.parametrize(
    ("timeout", "error"), [("1", TypeError), (float("nan"), ValueError), ([], TypeError), (1j, TypeError)]
)
def test_a_timeout_that_is_no_number_is_refused_and_takes_nothing(make, timeout, error):
    lock = make()
    with pytest.raises(error):
        lock.acquire(True, timeout)
    assert not lock.locked()


@pytest.mark.parametrize(("args", "kwargs"), [((True, 1, 2), {}), ((), {"blocking": True}), ((True,), {"block": True})])
def test_wrong_arguments_are_refused(make, args, kwargs):
    with pytest.raises(TypeError):
        make().acquire(*args, **kwargs)


@pytest.mark.parametrize("policy", ["", "warning", None, 3])
def test_an_unknown_policy_is_refused(make, policy):
    with pytest.raises((ValueError, TypeError)):
        make(on_owner_death=policy)


def test_waiting_lets_other_threads_run(fork):
    """The GIL is given up: a thread of the same process releases what the main thread waits for."""
    lock = fork.Lock()
    lock.acquire()
    thread = threading.Thread(target=lambda: (time.sleep(0.05), lock.release()))
    thread.start()
    assert lock.acquire()
    thread.join()


# --- what it looks like ---------------------------------------------------------------------------------------------------


def test_repr_says_who_holds_it(fork, wait_until):
    """The standard library says SomeOtherProcess; the pid is what one needs to look further."""
    lock, held = fork.Lock(), fork.Event()
    assert "<Lock(owner=None)>" == repr(lock)
    with lock:
        assert "<Lock(owner=MainProcess)>" == repr(lock)
        seen = []
        thread = threading.Thread(target=lambda: seen.append(repr(lock)), name="T")
        thread.start()
        thread.join()
        assert ["<Lock(owner=SomeOtherThread)>"] == seen
    process = fork.Process(target=family.acquire_tell_and_sleep, args=(lock, held), name="Holder")
    process.start()
    held.wait()
    assert f"<Lock(owner=Holder pid {process.pid})>" == repr(lock)
    process.kill()
    process.join()
    assert "<Lock(owner=a process that died)>" == repr(lock)


def test_locked_tells(make):
    lock = make()
    assert not lock.locked()
    with lock:
        assert lock.locked()


def test_what_programs_poke_in_the_standard_librarys_locks_is_there(make):
    lock = make()
    semlock = lock._semlock
    assert [False, 0, False, 1] == [semlock._is_mine(), semlock._count(), semlock._is_zero(), semlock._get_value()]
    with lock:
        assert [True, 1, True, 0] == [semlock._is_mine(), semlock._count(), semlock._is_zero(), semlock._get_value()]


# --- Python's side of the object --------------------------------------------------------------------------------------------


def test_exit_outlives_every_other_reference_to_the_lock(make):
    """The callables live inside the lock's own memory."""
    lock = make()
    lock.acquire()
    alive = weakref.ref(lock)
    leave = lock.__exit__
    del lock
    leave(None, None, None)
    assert alive() is not None
    del leave
    gc.collect()
    assert alive() is None


def test_enter_and_exit_work_through_the_class(make):
    """ExitStack looks them up there and calls them with the lock."""
    lock = make()
    with contextlib.ExitStack() as stack:
        stack.enter_context(lock)
        assert lock.locked()
    assert not lock.locked()
    assert type(lock).__enter__(lock) is True
    type(lock).__exit__(lock, None, None, None)
    assert not lock.locked()


def test_a_subclass_with_attributes_works_and_travels(start_method):
    lock = Named("mine")
    with lock:
        assert lock.locked()
    ctx = procession.get_context(start_method)
    with ctx.Process(target=family.echo, args=(lock,)) as process:
        again = process.result(timeout=100)
    assert ("mine", Named) == (again.name, type(again))
    with lock:
        assert again.locked()


def test_an_object_without_init_says_so(make):
    """Instead of a crash: `__new__` alone is what a broken subclass leaves."""
    kind = type(make())
    lock = kind.__new__(kind)
    for method in (lock.acquire, lock.release, lock.locked, lock.__enter__):
        with pytest.raises(RuntimeError, match="__init__"):
            method()
    assert "uninitialised" in repr(lock)


def test_init_twice_is_refused(make):
    """The first object would be leaked, and held by nobody."""
    lock = make()
    with pytest.raises(RuntimeError, match="twice"):
        lock.__init__()


def test_a_lock_dies_with_its_last_handle(make):
    before = procession.memory().blocks
    locks = [make() for _ in range(50)]
    assert procession.memory().blocks >= before + 50
    del locks
    assert before >= procession.memory().blocks


# --- death of a holder ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", family.DEATHS)
def test_the_next_to_acquire_gets_a_dead_holders_lock_and_a_warning(make, fork, how):
    """The reason for this library: with the standard library's lock everybody waits for ever."""
    lock = make()
    process = fork.Process(target=family.acquire_and_die, args=(lock, how), name="Victim")
    process.start()
    process.join()
    assert family.DEATHS[how] == process.exitcode
    with pytest.warns(LockOwnerDied) as caught:
        assert lock.acquire()
    text = str(caught[0].message)
    assert f"Victim pid {process.pid}" in text
    assert family.WORDS[how] in text
    assert 1 == len(caught)
    lock.release()
    assert lock.acquire(False)  # once told, nothing is left of it
    lock.release()


@pytest.mark.parametrize("how", ["SIGKILL", "os._exit"])
def test_the_holders_death_ends_a_wait_that_has_begun(make, fork, how, wait_until):
    """Nobody else need come by: the sleeper finds out by itself, also while the victim is an unreaped zombie."""
    lock, held = make(), fork.Event()
    process = fork.Process(target=family.acquire_tell_and_sleep, args=(lock, held))
    process.start()
    held.wait()
    killer = threading.Timer(0.1, os.kill, (process.pid, signal.SIGKILL))
    killer.start()
    with pytest.warns(LockOwnerDied, match=f"pid {process.pid}.*SIGKILL"):
        assert lock.acquire()
    killer.join()
    process.join()
    lock.release()


def test_acquire_without_waiting_finds_the_dead_too(make, fork):
    """A poller never sleeps, so it has to be told by the look at the holder alone."""
    lock = make()
    with fork.Process(target=family.acquire_and_die, args=(lock,)):
        pass
    with pytest.warns(LockOwnerDied):
        assert lock.acquire(False)
    lock.release()


def test_a_holder_killed_under_every_start_method_is_found(start_method):
    ctx = procession.get_context(start_method)
    lock = ctx.Lock()
    process = ctx.Process(target=family.enter_and_die, args=(lock,))
    process.start()
    process.join()
    with pytest.warns(LockOwnerDied, match=rf"pid {process.pid}\) was killed by SIGKILL"):
        lock.acquire()
    lock.release()


def test_a_grandchild_finds_its_dead_sibling(fork):
    """The process table is the family's: the finder need not be the parent, which has not even reaped the victim."""
    lock, held = fork.Lock(on_owner_death="raise"), fork.Event()
    victim = fork.Process(target=family.acquire_tell_and_sleep, args=(lock, held))
    victim.start()
    held.wait()
    os.kill(victim.pid, signal.SIGKILL)
    finder = fork.Process(target=family.call, args=(lock.acquire,))
    with finder:
        assert isinstance(finder.exception(timeout=100), LockOwnerDiedError)
    victim.join()


def test_raise_gives_an_error_and_leaves_the_lock_free(make, fork):
    """For programs that would rather stop than go on with half-done data."""
    lock = make(on_owner_death="raise")
    process = fork.Process(target=family.acquire_and_die, args=(lock,))
    process.start()
    process.join()
    with pytest.raises(LockOwnerDiedError, match=f"pid {process.pid}.*SIGKILL"), lock:
        pytest.fail("entered")
    assert not lock.locked()
    assert lock.acquire()
    lock.release()


def test_ignore_says_nothing(make, fork):
    lock = make(on_owner_death="ignore")
    with fork.Process(target=family.acquire_and_die, args=(lock,)):
        pass
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert lock.acquire()
    lock.release()


def test_a_warning_turned_into_an_error_leaves_the_lock_free(make, fork):
    """With -W error the caller never learns that it holds the lock, so it must not."""
    lock = make()
    with fork.Process(target=family.acquire_and_die, args=(lock,)):
        pass
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(LockOwnerDied):
            lock.acquire()
    assert not lock.locked()
    assert lock.acquire(False)
    lock.release()


def test_what_shows_the_warning_may_take_the_same_rlock(fork, monkeypatch):
    """A logging handler does, where warnings are logged."""
    lock = fork.RLock()
    with fork.Process(target=family.acquire_and_die, args=(lock,)):
        pass

    def show(*args, **kwargs):
        with lock:
            pass

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr(warnings, "showwarning", show)
        assert lock.acquire()
    assert (1, True) == (lock._count(), lock.locked())
    lock.release()
    assert not lock.locked()


def test_a_holder_that_ends_by_its_bootstrap_keeps_the_lock(make, ctx):
    """Hand-over is legal: another process may be meant to release it. The standard library does the same."""
    lock = make()
    with ctx.Process(target=family.acquire_and_end, args=(lock,)) as process:
        process.result(timeout=100)
    assert not lock.acquire(True, 0.1)
    assert lock.locked()


def test_a_lock_kept_by_an_ended_process_can_be_released_by_another(fork):
    lock = fork.Lock()
    with fork.Process(target=family.acquire_and_end, args=(lock,)):
        pass
    lock.release()
    assert lock.acquire(False)


def test_many_deaths_in_a_row_are_all_survived(make, fork):
    """Slots of the process table are used again: an old tag must never pass for a new process."""
    lock = make()
    for _ in range(20):
        process = fork.Process(target=family.acquire_and_die, args=(lock,))
        process.start()
        process.join()
        with pytest.warns(LockOwnerDied, match=rf"pid {process.pid}\) "):
            lock.acquire()
        lock.release()


def test_a_stopped_holder_is_not_robbed(make, fork, wait_until):
    """Paused is not dead: a debugger, a laptop lid, a frozen container. Recovery on a timeout would let two in."""
    lock, held = make(), fork.Event()
    process = fork.Process(target=family.acquire_tell_and_sleep, args=(lock, held))
    process.start()
    held.wait()
    os.kill(process.pid, signal.SIGSTOP)
    wait_until(lambda: family.state_of(process.pid) == "T")
    assert not lock.acquire(True, 0.3)
    os.kill(process.pid, signal.SIGCONT)
    assert not lock.acquire(True, 0.05)
    process.kill()
    process.join()
    with pytest.warns(LockOwnerDied):
        lock.acquire()
    lock.release()


def test_a_holder_that_becomes_another_program_counts_as_dead(fork, tmp_path, wait_until):
    """exec ends the program that held it without a word, and the pid lives on."""
    lock, held, other = fork.Lock(), fork.Event(), tmp_path / "other"
    process = fork.Process(target=family.acquire_and_exec, args=(lock, held, str(other)))
    process.start()
    held.wait()
    wait_until(other.exists, "the other program's start")
    with pytest.warns(LockOwnerDied, match=f"pid {process.pid}"):
        assert lock.acquire()
    process.kill()
    process.join()
    lock.release()


def test_a_lock_held_at_fork_is_not_the_childs(make, fork):
    """The child must neither own it nor, by dying, give it away."""
    lock = make()
    with lock:
        process = fork.Process(target=family.acquire_at_once, args=(lock,))
        with process:
            assert process.result(timeout=100) is False
        victim = fork.Process(target=family.die, args=("SIGKILL",))
        victim.start()
        victim.join()
        assert lock.locked()
        assert lock._is_mine()


# --- handles travel ---------------------------------------------------------------------------------------------------------


def test_a_pickled_lock_is_the_same_lock(make):
    """At any time, not only while a process is being started: the standard library raises RuntimeError here."""
    lock = make()
    again = pickle.loads(pickle.dumps(lock))
    with lock:
        assert again.locked()
    assert not again.locked()
