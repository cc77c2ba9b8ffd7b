"""Queues against a model: any sequence of operations, any sizes, two handles and another process."""

from __future__ import annotations

import collections
import gc
import pickle
import queue

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import procession
from procession import ShutDown

# Sizes around what can go wrong: the compact form (1 KiB), the inline ring (1 KiB) and half of it, the first grown ring
# (64 KiB) and half of it, the next (16 times as much) and beyond.
EDGES = (0, 8, 500, 504, 512, 1000, 1008, 1016, 1024, 2048, 32_740, 32_752, 32_768, 65_528, 65_536, 131_072, 200_000)
SIZES = st.one_of(
    st.integers(0, 40),
    st.sampled_from(EDGES).flatmap(lambda edge: st.integers(max(0, edge - 17), edge + 17)),
    st.integers(0, 200_000),
)
KINDS = st.sampled_from(["bytes", "str", "list", "tuple"])


def build(kind, size, number):
    """An item that shows when a byte of it is another's."""
    data = (number.to_bytes(4, "little") * (size // 4 + 1))[:size]
    return {"bytes": data, "str": data.hex()[:size], "list": [number, data], "tuple": (number, data.hex()[:size])}[kind]


class QueueModel(RuleBasedStateMachine):
    """What a queue should do, as a deque does it."""

    make = staticmethod(procession.Queue)

    def __init__(self):
        super().__init__()
        self.model = collections.deque()
        self.in_hand = 0
        self.number = 0
        self.shut = False

    @initialize(maxsize=st.sampled_from([0, 0, 1, 3, 50]))
    def create(self, maxsize):
        self.maxsize = maxsize
        self.q = self.make(maxsize) if maxsize or self.make is not procession.SimpleQueue else self.make()
        self.other = pickle.loads(pickle.dumps(self.q))

    def _item(self, kind, size):
        self.number += 1
        return build(kind, size, self.number)

    def _full(self):
        return bool(self.maxsize) and len(self.model) >= self.maxsize

    @rule(kind=KINDS, size=SIZES, other=st.booleans())
    def put(self, kind, size, other):
        item = self._item(kind, size)
        q = self.other if other else self.q
        if self.shut:
            with pytest.raises(ShutDown):
                q.put_nowait(item)
        elif self._full():
            with pytest.raises(queue.Full):
                q.put_nowait(item)
        else:
            q.put(item)
            self.model.append(item)

    @rule(sizes=st.lists(SIZES, max_size=12), kind=KINDS)
    def put_many(self, sizes, kind):
        items = [self._item(kind, size) for size in sizes]
        room = self.maxsize - len(self.model) if self.maxsize else len(items)
        if self.shut and items:
            with pytest.raises(ShutDown):
                self.q.put_many(items, False)
        elif len(items) > room:
            with pytest.raises(queue.Full) as caught:
                self.q.put_many(items, False)
            assert max(room, 0) == caught.value.items_put
            self.model.extend(items[:room])
        else:
            self.q.put_many(items, False)
            self.model.extend(items)

    @rule(count=st.integers(5, 400), size=st.integers(0, 300))
    def put_a_run(self, count, size):
        """Enough to wrap and to grow."""
        if self.shut:
            return
        for _ in range(count):
            if self._full():
                break
            item = self._item("bytes", size)
            self.q.put_nowait(item)
            self.model.append(item)

    def _expect_nothing(self, call):
        with pytest.raises(ShutDown if self.shut else queue.Empty):
            call()

    @rule(other=st.booleans())
    def get(self, other):
        q = self.other if other else self.q
        if not self.model:
            self._expect_nothing(q.get_nowait)
            return
        assert self.model.popleft() == q.get()
        self.in_hand += 1

    @rule(n=st.integers(1, 40))
    def get_many(self, n):
        if not self.model:
            self._expect_nothing(lambda: self.q.get_many(n, False))
            return
        got = self.q.get_many(n)
        assert min(n, len(self.model)) == len(got)
        assert [self.model.popleft() for _ in got] == got
        self.in_hand += len(got)

    @rule(leave=st.integers(0, 5))
    def drain(self, leave):
        while len(self.model) > leave:
            self.get(other=False)

    @rule()
    def refuse(self):
        with pytest.raises(TypeError):
            self.q.put(i for i in ())

    @rule()
    def collect(self):
        """At any time, and with nothing to do, it does nothing."""
        procession._native.collect()

    @precondition(lambda self: self.number > 200)
    @rule(immediate=st.booleans())
    def shut_down(self, immediate):
        self.q.shutdown(immediate)
        self.shut = True
        if immediate:
            self.model.clear()

    @invariant()
    def says_how_full_it_is(self):
        if not hasattr(self, "q"):
            return
        assert (len(self.model), not self.model, self._full()) == (self.q.qsize(), self.q.empty(), self.other.full())


class JoinableModel(QueueModel):
    """Beside that: what is in hand, and join()."""

    make = staticmethod(procession.JoinableQueue)

    @rule(n=st.integers(1, 50))
    def task_done(self, n):
        for _ in range(n):
            if not self.in_hand:
                with pytest.raises(ValueError, match="too many times"):
                    self.q.task_done()
                return
            self.q.task_done()
            self.in_hand -= 1

    @invariant()
    def join_waits_for_what_is_not_done(self):
        if hasattr(self, "q"):
            assert (not self.model and not self.in_hand) == self.q.join(0)


SETTINGS = settings(
    max_examples=150, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True
)


@pytest.mark.parametrize("machine", [QueueModel, JoinableModel])
def test_a_queue_does_what_its_model_does(machine):
    """Rings wrap, fill, grow and are left; sizes fall on every side of every limit."""
    run_state_machine_as_test(machine, settings=SETTINGS)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("machine", [QueueModel, JoinableModel])
def test_a_queue_does_what_its_model_does_for_long(machine):
    run_state_machine_as_test(machine, settings=settings(SETTINGS, max_examples=1500, stateful_step_count=80))


def test_what_the_models_made_is_given_back():
    """Pinned objects apart: a pickled handle without a known receiver keeps its object."""
    gc.collect()
    before = procession.memory().blocks
    q = procession.Queue()
    for i in range(2000):
        q.put(build("bytes", i * 7 % 3000, i))
    for i in range(2000):
        assert build("bytes", i * 7 % 3000, i) == q.get()
    del q
    gc.collect()
    assert before >= procession.memory().blocks
