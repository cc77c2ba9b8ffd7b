"""The pool's scheduler against a model: sources, plans, answers, deaths, recalls and cancellations in any order."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from procession._pool.restart import RestartBudget
from procession._pool.state import MOST_AHEAD, Scheduler, Unit

WAITING, HELD, ANSWERED, LOST, CANCELLED = "waiting", "held", "answered", "lost", "cancelled"


class Job:
    """A source of numbered items, and the model: what has become of each."""

    def __init__(self, count, chunk, priority, seconds):
        self.count = count
        self.chunk = chunk
        self.priority = priority
        self.unit_seconds = seconds
        self.unit_bytes = 0.0
        self.in_order = priority != 0
        self.cursor = 0
        self.fate = [WAITING] * count
        self.cancelled = False

    def next_units(self, most, workers):
        return [self._unit() for _ in range(min(most, -(-(self.count - self.cursor) // self.chunk)))]

    def _unit(self):
        first, self.cursor = self.cursor, min(self.count, self.cursor + self.chunk)
        if self.chunk == 1:
            return Unit(self, first, first, 1, True)
        return Unit(self, first, list(range(first, self.cursor)), self.cursor - first, False)

    def become(self, start, stop, fate, of):
        """The items from `start` to `stop` become `fate`, which must be a step from what they were."""
        for item in range(start, stop):
            if not self.cancelled:
                assert self.fate[item] in of, f"item {item} is {self.fate[item]}, and is to be {fate}"
            self.fate[item] = fate

    @property
    def settled(self):
        return self.cancelled

    @property
    def open(self):
        return not self.cancelled and any(fate in (WAITING, HELD) for fate in self.fate)

    @property
    def waiting(self):
        return not self.cancelled and WAITING in self.fate


def items_of(unit):
    """The numbers of the items that a unit still has to do."""
    items = [unit.items] if unit.single else unit.items
    assert unit.count == len(items)
    assert list(range(unit.first, unit.first + unit.count)) == list(items)
    return unit.first + unit.offset, unit.first + unit.count


class SchedulerModel(RuleBasedStateMachine):
    """Whatever happens in whatever order, each item is with one worker or waits, until it is answered, lost or cancelled."""

    def __init__(self):
        super().__init__()
        self.scheduler = Scheduler()
        self.jobs = []
        self.now = 0.0
        self.wids = 0
        self.gone = []

    # -- what happens

    @rule(
        count=st.integers(0, 40),
        chunk=st.sampled_from([1, 1, 2, 3, 7]),
        priority=st.integers(-1, 1),
        seconds=st.sampled_from([None, 0.0, 1e-6, 1e-4, 1e-3, 2e-3, 1.0]),
    )
    def add_source(self, count, chunk, priority, seconds):
        self.jobs.append(Job(count, chunk, priority, seconds))
        self.scheduler.add_source(self.jobs[-1])

    @precondition(lambda self: self.jobs)
    @rule(data=st.data(), more=st.integers(0, 5))
    def a_stream_has_more(self, data, more):
        job = data.draw(st.sampled_from(self.jobs))
        if not job.cancelled:
            job.fate += [WAITING] * more
            job.count += more
            self.scheduler.add_source(job)

    @rule()
    def add_worker(self):
        self.wids += 1
        self.scheduler.add_worker(self.wids)

    @rule()
    def plan(self):
        self.now += 0.001
        given = self.scheduler.plan(self.now)
        assert len({worker.wid for worker, _ in given}) == len(given)
        for worker, units in given:
            assert worker.accepting
            assert list(worker.units)[-len(units) :] == units
            for unit in units:
                unit.job.become(*items_of(unit), HELD, of=[WAITING])
        self._check_plan(given)

    def _check_plan(self, given):
        waiting = [job.priority for job in self.jobs if job.waiting]
        idle = [worker for worker in self.scheduler.workers.values() if worker.accepting and not worker.units]
        assert not (waiting and idle), "a worker is idle while something waits"
        lowest = min((unit.job.priority for _, units in given for unit in units), default=None)
        assert lowest is None or lowest >= max(waiting, default=lowest), "something more urgent waits"
        for worker, units in given:
            assert len(worker.units) <= MOST_AHEAD * 2
            ahead = [unit for unit in units if unit is not worker.units[0]]
            slow = [unit for unit in ahead if unit.job.unit_seconds is None or unit.job.unit_seconds > 0.004]
            assert not (slow and idle), "a long unit stands behind another while a worker is idle"

    @precondition(lambda self: self._busy())
    @rule(data=st.data())
    def answer(self, data):
        worker = self._draw(data, self._busy())
        self._answer(worker)

    def _answer(self, worker):
        unit = worker.units[0]
        seq = unit.seq
        unit.job.become(*items_of(unit), ANSWERED, of=[HELD])
        assert unit is self.scheduler.answered(seq, self.now)
        self.gone.append(seq)

    @precondition(lambda self: any(worker.units[0].count > 1 for worker in self._busy()))
    @rule(data=st.data())
    def answer_a_part(self, data):
        unit = self._draw(data, [w for w in self._busy() if w.units[0].count > 1]).units[0]
        offset = data.draw(st.integers(unit.offset, unit.count - 1))
        unit.job.become(unit.first + unit.offset, unit.first + offset, ANSWERED, of=[HELD])
        assert unit is self.scheduler.progressed(unit.seq, offset, self.now)

    @precondition(lambda self: self.gone)
    @rule(data=st.data())
    def answer_late(self, data):
        seq = data.draw(st.sampled_from(self.gone))
        assert self.scheduler.answered(seq, self.now) is None
        assert self.scheduler.progressed(seq, 1, self.now) is None
        assert self.scheduler.take_back([seq]) == []

    @precondition(lambda self: self.scheduler.workers)
    @rule(data=st.data(), taken=st.sampled_from([0, 1, 1, 2]), told=st.booleans(), retried=st.booleans())
    def die(self, data, taken, told, retried):
        """A worker has taken its first unit or not; with `taken` 2 it seems to have taken two, which cannot be."""
        worker = self._draw(data, list(self.scheduler.workers.values()))
        units = list(worker.units)
        first = units[0] if units and taken else None
        running = None
        if first is not None and told:
            at = st.integers(first.offset, first.count - 1)
            running = (first.seq, data.draw(st.none() | at if first.count > 1 else at))
        elif told:
            running = (data.draw(st.sampled_from(self.gone)), 3) if self.gone else None
        undelivered = [unit.seq for unit in units[taken:]]
        for unit in units:
            unit.job.become(*items_of(unit), WAITING, of=[HELD])
        loss = self.scheduler.worker_left(worker.wid, undelivered, running)
        self.gone += [unit.seq for unit in units]
        assert loss.in_hand == (first is not None)
        if first is None:
            assert loss.unit is None
            return
        lost = loss.unit
        if running is not None and running[1] is None and first.count - first.offset > 1:
            assert lost is None
            return
        assert lost.job is first.job
        expected = first.first + (running[1] if running and running[1] is not None else first.offset)
        assert (expected, expected + 1) == items_of(lost)
        lost.deaths += 1
        if lost.job.cancelled:
            return
        if retried:
            self.scheduler.give_back([lost])
        else:
            lost.job.become(*items_of(lost), LOST, of=[WAITING])

    @precondition(lambda self: self._busy())
    @rule(data=st.data(), taken=st.integers(0, 3))
    def recall(self, data, taken):
        """What a worker has not taken goes back, as from a worker that is at a long one."""
        worker = self._draw(data, self._busy())
        units = list(worker.units)[taken:]
        seqs = [unit.seq for unit in units]
        assert units == self.scheduler.take_back(seqs)
        self.gone += seqs
        for unit in units:
            unit.job.become(*items_of(unit), WAITING, of=[HELD])
        self.scheduler.give_back([unit for unit in units if not unit.job.cancelled])

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def cancel(self, data):
        job = data.draw(st.sampled_from(self.jobs))
        held = {unit.seq for worker in self._busy() for unit in worker.units if unit.job is job}
        assert held == {unit.seq for unit in self.scheduler.withdraw(job)}
        job.cancelled = True
        job.cursor = job.count

    @precondition(lambda self: self.scheduler.workers)
    @rule(data=st.data())
    def dismiss(self, data):
        """A worker is to take nothing more; another comes in its place."""
        self._draw(data, list(self.scheduler.workers.values())).accepting = False
        self.add_worker()

    @precondition(lambda self: self.scheduler.idle and any(w.accepting for w in self.scheduler.workers.values()))
    @rule(data=st.data())
    def call(self, data):
        """The fast way of `apply`: past the sources, to an idle worker."""
        job = Job(1, 1, 0, None)
        self.jobs.append(job)
        worker = self._draw(data, [w for w in self.scheduler.workers.values() if w.accepting])
        self.scheduler.assign_now(worker, job.next_units(1, 1)[0], self.now)
        job.become(0, 1, HELD, of=[WAITING])

    # -- what always holds

    @invariant()
    def everybody_agrees_on_who_holds_what(self):
        held = {}
        for worker in self.scheduler.workers.values():
            for unit in worker.units:
                assert unit.worker is worker
                assert unit.seq not in held
                held[unit.seq] = unit
        assert held == self.scheduler.inflight
        assert [unit.seq for worker in self._busy() for unit in worker.units] == [
            seq for worker in self._busy() for seq in sorted(unit.seq for unit in worker.units)
        ]

    @invariant()
    def it_is_idle_only_when_nothing_is_to_be_done(self):
        if self.scheduler.idle:
            assert not any(job.open for job in self.jobs)
        if any(job.waiting for job in self.jobs):
            assert self.scheduler.waiting

    @invariant()
    def it_knows_when_a_worker_could_take_over(self):
        workers = self.scheduler.workers.values()
        idle = any(worker.accepting and not worker.units for worker in workers)
        assert self.scheduler.unbalanced == (idle and any(len(worker.units) > 1 for worker in workers))
        stalled = self.scheduler.stalled(self.now + 1.0, 0.5)
        assert stalled is None or (len(stalled.units) > 1 and idle)

    def teardown(self):
        """Whoever is left does the rest: nothing was lost on the way, and nothing is left over."""
        self.add_worker()
        self.plan()
        while self._busy():
            self._answer(self._busy()[0])
            self.plan()
        assert self.scheduler.idle
        for job in self.jobs:
            assert job.cancelled or set(job.fate) <= {ANSWERED, LOST}

    def _busy(self):
        return [worker for worker in self.scheduler.workers.values() if worker.units]

    @staticmethod
    def _draw(data, workers):
        return data.draw(st.sampled_from(workers))


SETTINGS = settings(
    max_examples=200, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True
)


def test_no_order_of_events_loses_an_item_or_has_it_answered_twice():
    run_state_machine_as_test(SchedulerModel, settings=SETTINGS)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_no_order_of_events_loses_an_item_or_has_it_answered_twice_for_long():
    run_state_machine_as_test(SchedulerModel, settings=settings(SETTINGS, max_examples=5000, stateful_step_count=80))


@given(
    intensity=st.integers(0, 5),
    period=st.sampled_from([0.5, 1.0, 10.0]),
    gaps=st.lists(st.sampled_from([0.0, 0.1, 0.5, 1.0, 3.0, 20.0]), max_size=40),
)
def test_the_restart_budget_is_spent_when_more_than_so_many_fall_into_one_period(intensity, period, gaps):
    budget = RestartBudget(intensity, period)
    now, times = 100.0, []
    for gap in gaps:
        now += gap
        times.append(now)
        recent = [time for time in times if time > now - period]
        assert (len(recent) <= intensity) == budget.spend(now)


def test_a_restart_budget_of_none_forgives_nothing():
    assert not RestartBudget(0, 10.0).spend(1.0)
