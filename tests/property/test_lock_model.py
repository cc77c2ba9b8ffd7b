"""Lock, RLock and the semaphores against a model, with two processes' worth of holders: this one and a partner."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

import procession
from procession import LockOwnerDied
from tests.crash import family

SETTINGS = settings(max_examples=25, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck))


def serve(lock, pipe):
    """Do to the lock what the pipe says; end by its bootstrap when it is closed."""
    with contextlib.suppress(EOFError):
        while True:
            command = pipe.recv()
            if command == "die":
                family.die("SIGKILL")
            try:
                pipe.send(lock.acquire(False) if command == "acquire" else lock.release())
            except (ValueError, AssertionError) as error:
                pipe.send(type(error).__name__)


class Partner:
    """A child that holds the same lock; started again after it was killed."""

    def __init__(self, lock):
        self.lock = lock
        self.ctx = procession.get_context("fork")
        self.start()

    def start(self):
        self.pipe, theirs = self.ctx.Pipe()
        self.process = self.ctx.Process(target=_serve_only, args=(self.lock, theirs, self.pipe))
        self.process.start()
        theirs.close()

    def ask(self, command):
        self.pipe.send(command)
        return self.pipe.recv()

    def kill(self):
        self.pipe.send("die")
        self.process.join()
        self.pipe.close()
        self.process.close()
        self.start()

    def stop(self):
        self.pipe.close()
        self.process.join()
        self.process.close()


def _serve_only(lock, pipe, parents):
    parents.close()
    serve(lock, pipe)


class LockModel(RuleBasedStateMachine):
    kind = "Lock"

    def __init__(self):
        super().__init__()
        self.lock = getattr(procession.get_context("fork"), self.kind)()
        self.partner = Partner(self.lock)
        self.holder = None  # "us", "them", "dead"
        self.depth = 0

    def teardown(self):
        self.partner.stop()

    def _take(self, who):
        self.holder, self.depth = who, 1

    @rule()
    def we_acquire(self):
        if self.holder == "dead":
            with pytest.warns(LockOwnerDied):
                assert self.lock.acquire(False)
            self._take("us")
        elif self.holder is None:
            assert self.lock.acquire(False)
            self._take("us")
        elif self.kind == "RLock" and self.holder == "us":
            assert self.lock.acquire(False)
            self.depth += 1
        else:
            assert not self.lock.acquire(False)

    @rule()
    def they_acquire(self):
        if self.holder == "dead":
            return
        expected = self.holder is None or (self.kind == "RLock" and self.holder == "them")
        assert expected == self.partner.ask("acquire")
        if self.holder is None:
            self._take("them")
        elif expected:
            self.depth += 1

    def _released(self, who, release):
        if self.kind == "RLock" and self.holder != who:
            assert "AssertionError" == release()
        elif self.holder is None:
            assert "ValueError" == release()
        else:
            assert release() is None
            self.depth -= 1
            if self.depth == 0:
                self.holder = None

    @rule()
    def we_release(self):
        def release():
            try:
                return self.lock.release()
            except (ValueError, AssertionError) as error:
                return type(error).__name__

        self._released("us", release)

    @rule()
    def they_release(self):
        self._released("them", lambda: self.partner.ask("release"))

    @rule()
    def they_die(self):
        self.partner.kill()
        if self.holder == "them":
            self.holder = "dead"
            self.depth = 1

    @rule()
    def collect(self):
        procession._native.collect()

    @invariant()
    def shows_it(self):
        assert (self.holder is not None) == self.lock.locked()
        assert (self.depth if self.holder == "us" else 0) == self.lock._count()


class RLockModel(LockModel):
    kind = "RLock"


class SemaphoreModel(RuleBasedStateMachine):
    """Permits of the dead come back from a BoundedSemaphore, and stay away from a bare Semaphore."""

    kind = "Semaphore"
    first = 3

    def __init__(self):
        super().__init__()
        self.semaphore = getattr(procession.get_context("fork"), self.kind)(self.first)
        self.partner = Partner(self.semaphore)
        self.value = self.first
        self.theirs = 0

    def teardown(self):
        self.partner.stop()

    @rule()
    def we_acquire(self):
        assert (self.value > 0) == self.semaphore.acquire(False)
        self.value -= self.value > 0

    @rule()
    def they_acquire(self):
        assert (self.value > 0) == self.partner.ask("acquire")
        self.theirs += self.value > 0
        self.value -= self.value > 0

    @rule()
    def we_release(self):
        if self.kind == "BoundedSemaphore" and self.value == self.first:
            with pytest.raises(ValueError, match="too many times"):
                self.semaphore.release()
            return
        if self.kind == "BoundedSemaphore" and self.first - self.value == self.theirs:
            self.theirs -= 1  # none of ours is out: it was one of theirs
        self.semaphore.release()
        self.value += 1

    @rule()
    def they_die(self):
        self.partner.kill()
        if self.kind == "BoundedSemaphore":
            self.value += self.theirs
        self.theirs = 0
        procession._native.collect()

    @invariant()
    def counts(self):
        assert self.value == self.semaphore.get_value()


class BoundedSemaphoreModel(SemaphoreModel):
    kind = "BoundedSemaphore"


@pytest.mark.parametrize("machine", [LockModel, RLockModel, SemaphoreModel, BoundedSemaphoreModel])
def test_it_does_what_its_model_does(machine):
    """Acquired, released and died with, by two processes in any order."""
    run_state_machine_as_test(machine, settings=SETTINGS)
