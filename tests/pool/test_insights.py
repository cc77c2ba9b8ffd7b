"""`Pool.insights()`, the line that tells of a stall, and `repr(pool)`."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import signal
import sys
import threading
import time
import types

import pytest

import procession
from procession._pool.errors import WorkerDiedError
from procession._pool.insights import Insights, Ledger, SlowTask, WorkerInsights
from procession._pool.stall import Stall


def square(x):
    return x * x


def nap(seconds):
    time.sleep(seconds)
    return seconds


DEADLY = (7, 57, 107, 157)


def nap_or_die(x):
    if x in DEADLY:
        os._exit(1)
    time.sleep(0.002)
    return x


def kill_self(x):
    os.kill(os.getpid(), signal.SIGKILL)


gate = None


def take_gate(event):
    global gate
    gate = event


def pass_gate(x):
    gate.wait()
    return x


def wait_at(event):
    event.wait()


class ManyLines:
    def __repr__(self) -> str:
        return "many\nlines"

    def __reduce__(self):
        return ManyLines, ()


def worker(name="W-1", *, items=0, starting=0.0, waiting=0.0, working=0.0, state="waiting", pid=4711):
    return WorkerInsights(name, pid, state, items, starting, waiting, working)


# -- the numbers, without a pool


def test_ratios_are_parts_of_a_life() -> None:
    one = worker(starting=1.0, waiting=2.0, working=5.0)
    assert (8.0, 0.125, 0.25, 0.625) == (one.seconds, one.starting_ratio, one.waiting_ratio, one.working_ratio)
    assert worker().working_ratio == 0.0


@pytest.mark.parametrize(
    ("lived", "starting", "working", "expected"),
    [
        (10.0, 1.0, 4.0, (1.0, 5.0, 4.0)),
        (10.0, None, 0.0, (10.0, 0.0, 0.0)),
        # The clocks of two processes are read at different moments.
        (10.0, 1.0, 9.1, (1.0, 0.0, 9.0)),
    ],
)
def test_what_is_neither_starting_nor_working_is_waiting(lived, starting, working, expected) -> None:
    one = WorkerInsights.measured("W-1", 1, "waiting", 3, lived=lived, starting=starting, working=working)
    assert expected == (one.starting, one.waiting, one.working)


def test_totals_count_workers_that_ended_long_ago() -> None:
    ledger = Ledger(100.0)
    for _ in range(1000):
        ledger.left(worker(items=2, starting=0.5, waiting=0.25, working=1.0))
    found = ledger.insights([worker(items=3, working=1.0)], [], 110.0)
    assert (2003, 500.0, 250.0, 1001.0) == (
        found.items,
        found.total.starting,
        found.total.waiting,
        found.total.working,
    )
    assert (1001, 1, 10.0) == (found.count, len(found.workers), found.elapsed)
    assert len(found.ended) < 1000


def insights(*workers: WorkerInsights, slowest: tuple[SlowTask, ...] = ()) -> Insights:
    return Ledger(0.0).insights(workers, slowest, 10.0)


def test_repr_is_a_table() -> None:
    found = insights(
        worker(items=1234, starting=1.0, waiting=1.0, working=8.0),
        worker("PoolWorker-22", pid=5, working=1.0),
        slowest=(SlowTask(0.5, "f(1)"), SlowTask(2.25, "f('a')")),
    )
    assert repr(found).splitlines() == [
        "<Insights: 1,234 items in 10.00 s by 2 workers>",
        "worker          pid  state    items      starting       waiting       working",
        "W-1            4711  waiting  1,234  1.00 s  10 %  1.00 s  10 %  8.00 s  80 %",
        "PoolWorker-22     5  waiting      0  0.00 s   0 %  0.00 s   0 %  1.00 s 100 %",
        "all                           1,234  1.00 s   9 %  1.00 s   9 %  9.00 s  82 %",
        "slowest tasks:",
        "      2.250 s  f('a')",
        "      0.500 s  f(1)",
    ]


def test_html_escapes_what_users_named() -> None:
    html = insights(worker("<W>"), slowest=(SlowTask(1.0, "f('<script>')"),))._repr_html_()
    assert "&lt;W&gt;" in html
    assert "<script>" not in html
    assert html.count("<table>") == html.count("</table>") == 2


# -- of a pool


@pytest.mark.parametrize("chunksize", [None, 1, 30])
def test_all_items_are_counted(ctx, chunksize) -> None:
    with ctx.Pool(2) as pool:
        pool.map(square, range(1000), chunksize=chunksize)
        pool.apply(square, (1,))
        list(pool.imap(square, range(10)))
        assert pool.insights().items == 1011
        assert [0.0, 0.0] < [one.starting for one in pool.insights().workers]


def test_they_are_there_while_tasks_run_and_after_the_end(wait_until) -> None:
    with procession.Pool(2) as pool:
        assert 2 == len(pool._pool)
        job = pool.map_async(nap, [60])
        wait_until(lambda: "working" in {one.state for one in pool.insights().workers}, "a worker at work")
        wait_until(lambda: pool.insights().total.working > 0, "its time to be counted")
        job.cancel()
        pool.map(square, range(100))
    after = pool.insights()
    assert ((), 2, 2, 0) == (after.workers, len(after.ended), after.count, after.restarts)
    assert after.items >= 100
    assert {"ended"} == {one.state for one in after.ended}
    assert after.elapsed == pool.insights().elapsed


def test_the_slowest_tasks_are_named_with_their_arguments() -> None:
    with procession.Pool(2) as pool:
        pool.map(square, range(1000))
        pool.map(nap, [0.0, 0.6, 0.0, 0.4], chunksize=1)
        pool.map(nap, [0.0, 0.0, 0.5, 0.0], chunksize=4)
        slowest = pool.insights().slowest
    # Not their order: a loaded machine makes any of them longer.
    assert {"nap(0.4)", "nap(0.5)", "nap(0.6)"} == {task.call for task in slowest[:3]}
    assert slowest[2].seconds >= 0.39
    assert [task.seconds for task in slowest] == sorted((task.seconds for task in slowest), reverse=True)


def test_a_worker_that_died_is_told_of(wait_until) -> None:
    with procession.Pool(2) as pool:
        pool.map(square, range(100))
        with pytest.raises(WorkerDiedError):
            pool.apply(kill_self, (1,))
        pool.map(square, range(100))
        wait_until(lambda: len(pool.insights().workers) == 2, "the worker to be replaced")
        found = pool.insights()
    assert (1, 200, 3) == (found.restarts, found.items, found.count)
    [dead] = found.ended
    assert "SIGKILL" in dead.state
    assert "1 died" in repr(found)


@pytest.mark.parametrize("chunksize", [1, 10])
def test_each_item_is_counted_once_though_workers_die(chunksize) -> None:
    with procession.Pool(2, max_restarts=1000) as pool:
        results = pool.map(nap_or_die, range(200), chunksize=chunksize, on_error="return")
        assert pool.insights().items == 196
    assert [x for x in range(200) if x not in DEADLY] == [x for x in results if isinstance(x, int)]
    assert pool.insights().restarts == 4


def test_workers_that_were_recycled_are_counted_but_did_not_die() -> None:
    with procession.Pool(1, maxtasksperchild=1) as pool:
        pool.map(square, range(4), chunksize=1)
    assert (4, 0) == (pool.insights().items, pool.insights().restarts)
    assert pool.insights().count >= 4


def test_a_pool_that_was_terminated_still_tells() -> None:
    pool = procession.Pool(2)
    assert 2 == len(pool._pool)
    pool.map(square, range(10))
    pool.terminate()
    assert (10, 2) == (pool.insights().items, len(pool.insights().ended))


def test_a_pool_without_workers_tells_of_this_process() -> None:
    with procession.Pool(workers=0) as pool:
        pool.map(nap, [0.01, 0.02])
        assert {"nap(0.01)", "nap(0.02)"} == {task.call for task in pool.insights().slowest}
        [me] = pool.insights().workers
    assert (os.getpid(), 2) == (me.pid, me.items)
    assert me.working >= 0.03


def test_repr_of_a_pool_is_the_standard_librarys() -> None:
    with procession.Pool(2) as pool:
        assert repr(pool) == "<procession.pool.Pool state=RUN pool_size=2>"
        pool.close()
        assert repr(pool) == "<procession.pool.Pool state=CLOSE pool_size=2>"


# -- stalls

WAITS = {
    "map": lambda pool: pool.map(pass_gate, [5], chunksize=1),
    "chunk": lambda pool: pool.map(pass_gate, [5, 5], chunksize=2),
    "apply": lambda pool: pool.apply(pass_gate, (5,)),
    "apply_async": lambda pool: pool.apply_async(pass_gate, (5,)).get(),
    "imap": lambda pool: list(pool.imap(pass_gate, [5])),
    "imap_unordered": lambda pool: list(pool.imap_unordered(pass_gate, iter([5]))),
}


class Told:
    """What has been written to stderr so far."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys
        self._text = ""

    def lines(self) -> list[str]:
        self._text += self._capsys.readouterr().err
        return self._text.splitlines()


@pytest.fixture
def told(capsys):
    return Told(capsys)


class Waiting:
    """A thread that calls something and waits; leaving opens the gate it waits at."""

    def __init__(self, call, event) -> None:
        self._thread = threading.Thread(target=call)
        self._event = event

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_) -> None:
        self._event.set()
        self._thread.join()


@pytest.mark.parametrize("call", WAITS)
def test_a_stall_is_told_once_to_who_waits(call, told, wait_until) -> None:
    event = procession.Event()
    with procession.Pool(2, take_gate, (event,), stall_report=0.2) as pool:
        assert 2 == len(pool._pool)
        wait_until(lambda: ["waiting"] * 2 == [one.state for one in pool.insights().workers], "two workers")
        with Waiting(lambda: WAITS[call](pool), event):
            wait_until(told.lines, "a line")
            time.sleep(0.5)
        [line] = told.lines()
    assert line.startswith("procession: no task has finished for ")
    assert "pass_gate(5) for " in line
    assert "PoolWorker-" in line
    assert ": waiting" in line


def test_a_stall_is_told_under_every_start_method(ctx, told, wait_until) -> None:
    event = ctx.Event()
    with ctx.Pool(1, take_gate, (event,), stall_report=0.2) as pool, Waiting(lambda: WAITS["apply"](pool), event):
        wait_until(told.lines, "a line")
        # Importing what a spawned worker needs may take longer than the interval.
        assert "pass_gate(5) for " in told.lines()[0] or ": starting for " in told.lines()[0]


def test_another_stall_is_told_again(told, wait_until) -> None:
    event = procession.Event()
    with procession.Pool(1, take_gate, (event,), stall_report=0.2) as pool:
        for number in (1, 2):
            event.clear()
            with Waiting(lambda: pool.map(pass_gate, [5]), event):
                wait_until(lambda number=number: len(told.lines()) == number, f"line {number}")


def test_who_joins_waits_as_well(told, wait_until) -> None:
    event = procession.Event()
    pool = procession.Pool(1, take_gate, (event,), stall_report=0.2)
    pool.map_async(pass_gate, [5])
    pool.close()
    with Waiting(pool.join, event):
        wait_until(told.lines, "a line")


def test_who_awaits_waits_as_well(told, wait_until) -> None:
    event = procession.Event()

    async def wait(pool) -> None:
        await pool.map_async(pass_gate, [5])

    with (
        procession.Pool(1, take_gate, (event,), stall_report=0.2) as pool,
        Waiting(lambda: asyncio.run(wait(pool)), event),
    ):
        wait_until(told.lines, "a line")


def test_an_initializer_that_hangs_is_told_of(told, wait_until) -> None:
    event = procession.Event()
    with (
        procession.Pool(1, wait_at, (event,), stall_report=0.2) as pool,
        Waiting(lambda: pool.map(square, [5]), event),
    ):
        wait_until(lambda: any(": starting for " in line for line in told.lines()), "the line")


def test_an_input_that_gives_nothing_is_told_of(told, wait_until) -> None:
    event = threading.Event()

    def items():
        event.wait()
        yield 1

    with procession.Pool(1, stall_report=0.2) as pool, Waiting(lambda: list(pool.imap(square, items())), event):
        wait_until(lambda: any("the input has given nothing to do" in line for line in told.lines()), "the line")


def test_the_line_is_one_line_whatever_a_repr_says(told, wait_until) -> None:
    event = procession.Event()
    with (
        procession.Pool(1, take_gate, (event,), stall_report=0.2) as pool,
        Waiting(lambda: pool.map(pass_gate, [ManyLines()]), event),
    ):
        wait_until(told.lines, "a line")
        [line] = told.lines()
        assert "pass_gate(many lines)" in line


@pytest.mark.parametrize("seconds", [0.1, None])
def test_nothing_is_told_when_nobody_waits_or_nobody_wants_to_know(seconds, told, wait_until) -> None:
    event = procession.Event()
    with procession.Pool(1, take_gate, (event,), stall_report=seconds) as pool:
        job = pool.map_async(pass_gate, [5])
        if seconds is None:
            job.wait(0.5)
        else:
            time.sleep(0.5)
        event.set()
        wait_until(job.ready, "the result")  # who leaves before it waits for it
    assert told.lines() == []


def test_who_comes_late_is_not_told_of_the_time_before(monkeypatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    job = types.SimpleNamespace(waited_for=0)
    table = types.SimpleNamespace(
        scheduler=types.SimpleNamespace(inflight=[1], waiting=0), lock=contextlib.nullcontext(), members={}
    )
    stall = Stall(table, types.SimpleNamespace(streams=(), open=[job]), 30.0)
    now = time.monotonic()
    assert stall.tick(now, True) == 1.0
    assert stall.tick(now + 100, True) == 1.0
    job.waited_for = 1
    assert stall.tick(now + 101, True) == 1.0
    assert stall.tick(now + 130.5, True) == 0.5
    assert sys.stderr.getvalue() == ""
    stall.tick(now + 131, True)
    assert sys.stderr.getvalue() == "procession: no task has finished for 131 s, 1 is with workers.\n"


@pytest.mark.parametrize("call", WAITS)
def test_a_pool_that_was_idle_for_long_has_not_stalled(call, told) -> None:
    event = procession.Event()
    event.set()
    with procession.Pool(1, take_gate, (event,)) as pool:
        pool.map(square, [1])
        pool._engine._stall.last_answer -= 1000
        WAITS[call](pool)
        pool._engine._stall.last_answer -= 1000
        WAITS[call](pool)
    assert told.lines() == []


def test_a_stall_without_a_stderr_harms_nobody(monkeypatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    event = procession.Event()
    with procession.Pool(1, take_gate, (event,), stall_report=0.1) as pool:
        job = pool.map_async(pass_gate, [5])
        job.wait(0.5)
        event.set()
        assert job.get() == [5]


@pytest.mark.parametrize("wrong", [0, -1.0, float("inf")])
def test_an_interval_that_cannot_be_is_refused(wrong) -> None:
    with pytest.raises(ValueError, match="stall_report"):
        procession.Pool(1, stall_report=wrong)
