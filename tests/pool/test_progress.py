"""`progress=`: every mapping call counts all it does, and what is drawn never harms the job."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys
import threading
import time
from typing import ClassVar

import pytest

import procession
from procession._pool import progress as p


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Bar:
    """Has tqdm's interface, and remembers."""

    made: ClassVar[list[Bar]] = []

    def __init__(self, total: int | None = None, desc: str | None = None) -> None:
        self.total, self.desc = total, desc
        self.done = 0
        self.closed = False
        self.postfix: dict[str, object] = {}
        self.threads: set[str] = set()
        Bar.made.append(self)

    def update(self, more: int) -> None:
        self.done += more
        self.threads |= {thread.name for thread in threading.enumerate()}

    def set_postfix(self, refresh: bool = True, **values: object) -> None:
        self.postfix = values

    def close(self) -> None:
        self.closed = True


class FailingBar(Bar):
    def update(self, more: int) -> None:
        raise OSError("the display is gone")


@pytest.fixture(autouse=True)
def _no_bars():
    Bar.made = []


@pytest.fixture
def no_rich(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich", None)


def square(x):
    return x * x


def second(_, x):
    return x


def fail_on_odd(x):
    if x % 2:
        raise ValueError(x)
    return x


def die_at_seven(x):
    if x % 10 == 7:
        os._exit(1)
    return x


def nap(x):
    time.sleep(x)


# -- counting and drawing, without a pool


def test_the_rate_is_that_of_the_last_seconds() -> None:
    rate = p.Rate(0.0)
    assert rate.update(0, 1.0) is None
    assert rate.update(10, 2.0) == 5.0
    for second_ in range(3, 103):
        value = rate.update(10 + 100 * (second_ - 2), float(second_))
    assert value == pytest.approx(100, rel=0.01)


def test_a_state_tells_count_rate_failures_and_time_left() -> None:
    state = p.State("resize", 2000, 500, 3)
    state.seconds, state.rate = 90.0, 10.0
    assert state.text() == "500/2,000 (25 %), 10.0/s, 3 failed, 01:30 so far, about 02:30 left"


def test_an_unknown_total_shows_count_and_rate() -> None:
    state = p.State("resize", None, 1500, 0)
    state.seconds, state.rate = 3.0, 500.0
    assert state.text() == "1,500, 500/s, 3.0 s so far"


def test_what_ends_early_says_so() -> None:
    state = p.State("resize", 10, 4, 0)
    state.seconds, state.final = 4000.0, True
    assert state.text().endswith("stopped after 1:06:40")


def test_a_log_gets_a_line_every_thirty_seconds_and_one_at_the_end() -> None:
    clock, file = Clock(), io.StringIO()
    shown = p.Progress(p.LogPainter(file), 100, "resize", clock)
    assert shown.tick(clock.now) == 30.0
    for _ in range(70):
        clock.now += 1
        shown.advance(1, 0)
        shown.tick(clock.now)
    assert len(file.getvalue().splitlines()) == 2
    shown.close()
    shown.close()
    assert [line.split(",")[0] for line in file.getvalue().splitlines()] == [
        "procession: resize: 30/100 (30 %)",
        "procession: resize: 60/100 (60 %)",
        "procession: resize: 70/100 (70 %)",
    ]
    assert "\r" not in file.getvalue()


def test_a_terminal_has_one_line_that_is_drawn_anew() -> None:
    clock, file = Clock(), Terminal()
    shown = p.Progress(p.TerminalPainter(file), 10, "resize", clock)
    shown.tick(clock.now)
    shown.advance(5, 1)
    shown.tick(clock.now + 1)
    assert "\n" not in file.getvalue()
    assert "1 failed" in file.getvalue().split("\r")[-1]
    shown.close()
    assert file.getvalue().count("\n") == 1


def test_two_jobs_share_the_line_of_a_terminal(no_rich, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    file = Terminal()
    first, other = (p.make_progress(name, 10, "f", file) for name in ("first", "other"))
    for shown in (first, other):
        shown.tick(time.monotonic())
    last = file.getvalue().split("\r")[-1]
    assert "first" in last
    assert "other" in last
    first.close()
    assert file.getvalue().split("\n")[-1].startswith("other")
    other.close()
    assert file.getvalue().endswith("\n")


def test_a_line_is_no_longer_than_the_terminal_is_wide(no_rich, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    file = Terminal()
    shown = p.make_progress("a very long description indeed " * 3, 10, "f", file)
    shown.tick(time.monotonic())
    assert len(file.getvalue().removeprefix("\r\x1b[K")) < 40


def test_a_terminal_that_takes_nothing_stops_nobody(no_rich) -> None:
    """After Ctrl-S a write to a terminal waits for Ctrl-Q, and the thread that collects must not."""
    reads, writes = os.pipe()
    with os.fdopen(reads, "rb"), os.fdopen(writes, "w") as file:
        os.set_blocking(writes, False)
        with pytest.raises(BlockingIOError):
            while True:
                os.write(writes, b"x" * 65536)
        os.set_blocking(writes, True)
        shown = p.Progress(p.TerminalPainter(file), 10, "f")
        shown.tick(time.monotonic())
        shown.close()


def test_a_dumb_terminal_gets_plain_lines(monkeypatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    file = Terminal()
    p.make_progress(True, 0, "f", file).close()
    assert file.getvalue().startswith("procession: f: 0/0")


def test_a_program_without_stderr_shows_nothing(monkeypatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    assert p.make_progress(True, 10, "f") is None


def test_an_object_of_tqdms_is_advanced_and_left_open() -> None:
    bar = Bar(total=10)
    shown = p.make_progress(bar, 10, "f")
    shown.advance(4, 0)
    shown.close()
    assert (4, False) == (bar.done, bar.closed)


@pytest.mark.parametrize("wrong", [3, [], object()])
def test_anything_else_is_an_error_at_the_call(wrong) -> None:
    with procession.Pool(1) as pool:
        with pytest.raises(TypeError, match="progress must be"):
            pool.map(square, [1], progress=wrong)
        assert pool.map(square, [2]) == [4]


def test_rich_draws_without_a_thread() -> None:
    pytest.importorskip("rich", reason="needs rich: pip install procession[progress]")
    file = Terminal()
    first, other = (p.make_progress(name, total, "f", file) for name, total in (("first", 10), ("other", None)))
    before = threading.active_count()
    for shown in (first, other):
        shown.advance(4, 1)
        shown.tick(time.monotonic())
    assert before == threading.active_count()
    first.close()
    other.close()
    assert "first" in file.getvalue()
    assert "1 failed" in file.getvalue()


@pytest.mark.parametrize("started", [True, False])
def test_a_progress_of_rich_is_stopped_only_if_we_started_it(started) -> None:
    rich = pytest.importorskip("rich.progress", reason="needs rich: pip install procession[progress]")
    console = pytest.importorskip("rich.console").Console(file=io.StringIO())
    display = rich.Progress(console=console)
    if started:
        display.start()
    with procession.Pool(2) as pool:
        assert pool.map(square, range(100), progress=display) == [x * x for x in range(100)]
        assert list(pool.imap(square, iter(range(10)), progress=display)) == [x * x for x in range(10)]
    assert started == display.live.is_started
    assert [100, 10] == [task.completed for task in display.tasks]
    display.stop()


# -- every mapping call of a pool

PAIRS = [(0, x) for x in range(50)]
CALLS = {
    "map": lambda pool, **options: pool.map(square, range(50), **options),
    "map-iterables": lambda pool, **options: pool.map(second, range(50), range(50), **options),
    "map-chunks": lambda pool, **options: pool.map(square, range(50), 7, **options),
    "map_async": lambda pool, **options: pool.map_async(square, range(50), **options).get(),
    "starmap": lambda pool, **options: pool.starmap(second, PAIRS, **options),
    "starmap_async": lambda pool, **options: pool.starmap_async(second, PAIRS, **options).get(),
    "imap": lambda pool, **options: list(pool.imap(square, range(50), **options)),
    "imap-chunks": lambda pool, **options: list(pool.imap(square, range(50), 7, **options)),
    "imap_unordered": lambda pool, **options: list(pool.imap_unordered(square, range(50), **options)),
}


@pytest.mark.parametrize("call", CALLS)
def test_every_mapping_call_counts_all_items(call) -> None:
    with procession.Pool(2) as pool:
        CALLS[call](pool, progress=Bar)
    [bar] = Bar.made
    assert (50, 50, True) == (bar.total, bar.done, bar.closed)
    assert bar.desc in {"square", "second"}


def test_it_counts_under_every_start_method(ctx) -> None:
    with ctx.Pool(2) as pool:
        assert pool.map(square, range(200), progress=Bar) == [x * x for x in range(200)]
    assert [(200, True)] == [(bar.done, bar.closed) for bar in Bar.made]


@pytest.mark.parametrize("call", ["map", "imap"])
def test_failures_are_counted(call) -> None:
    with procession.Pool(2) as pool:
        list(getattr(pool, call)(fail_on_odd, range(10), on_error="return", progress=Bar))
    [bar] = Bar.made
    assert (10, {"failed": 5}) == (bar.done, bar.postfix)


@pytest.mark.parametrize("chunksize", [1, 10])
def test_each_item_is_counted_once_though_workers_die(chunksize) -> None:
    with procession.Pool(2, max_restarts=1000) as pool:
        pool.map(die_at_seven, range(200), chunksize=chunksize, on_error="return", progress=Bar)
    assert [(200, {"failed": 20})] == [(bar.done, bar.postfix) for bar in Bar.made]


def test_a_map_that_raises_has_counted_and_closed() -> None:
    with procession.Pool(2) as pool, pytest.raises(ValueError, match="1"):
        pool.map(fail_on_odd, range(10), progress=Bar)
    assert [(10, True)] == [(bar.done, bar.closed) for bar in Bar.made]


def test_a_generator_has_no_total() -> None:
    with procession.Pool(2) as pool:
        assert len(list(pool.imap(square, (x for x in range(20)), progress=Bar))) == 20
    assert [(None, 20, True)] == [(bar.total, bar.done, bar.closed) for bar in Bar.made]


def test_nothing_to_do_is_closed_at_once() -> None:
    with procession.Pool(1) as pool:
        assert pool.map(square, [], progress=Bar) == []
        assert list(pool.imap(square, [], progress=Bar)) == []
    assert [True, True] == [bar.closed for bar in Bar.made]


def test_an_iterator_that_is_dropped_closes_its_bar(wait_until) -> None:
    with procession.Pool(1) as pool:
        results = pool.imap(square, iter(range(1000)), progress=Bar)
        assert next(results) == 0
        del results
        wait_until(lambda: Bar.made[0].closed, "the bar to be closed")


def test_terminating_the_pool_closes_the_bars(wait_until) -> None:
    pool = procession.Pool(1)
    pool.map_async(nap, [60, 60], progress=Bar)
    results = pool.imap(nap, iter([60, 60]), progress=Bar)
    pool.terminate()
    wait_until(lambda: [True, True] == [bar.closed for bar in Bar.made], "both bars to be closed")
    del results


def test_a_display_that_fails_does_not_harm_the_job() -> None:
    with procession.Pool(2) as pool:
        assert pool.map(square, range(100), progress=FailingBar) == [x * x for x in range(100)]
        assert list(pool.imap(square, range(100), progress=FailingBar)) == [x * x for x in range(100)]


def test_it_is_drawn_while_nothing_finishes(wait_until) -> None:
    """A log must not be silent for minutes because each task takes minutes."""
    with procession.Pool(1) as pool:
        shown = []

        class Painter:
            interval = 0.05

            def draw(self, state) -> None:
                shown.append(state.done)

        job = pool.map_async(nap, [60])
        job.progress = p.Progress(Painter(), 1, "nap")
        pool._engine._jobs.shown.add(job.progress)
        pool._engine.nudge()
        wait_until(lambda: len(shown) >= 3, "three drawings")
        assert set(shown) == {0}
        job.cancel()


def test_no_thread_is_started_for_it() -> None:
    with procession.Pool(1) as pool:
        pool.map(square, range(1000), progress=Bar)
        assert Bar.made[0].threads <= {"procession-pool"} | {thread.name for thread in threading.enumerate()}


def test_a_pool_without_workers_shows_it_too() -> None:
    with procession.Pool(workers=0) as pool:
        assert pool.map(square, range(5), progress=Bar) == [0, 1, 4, 9, 16]
        assert list(pool.imap(square, range(5), progress=Bar)) == [0, 1, 4, 9, 16]
    assert [(5, True), (5, True)] == [(bar.done, bar.closed) for bar in Bar.made]


def test_what_is_no_terminal_gets_one_line_for_a_short_job(capsys) -> None:
    with procession.Pool(2) as pool:
        pool.map(square, range(1000), progress="squares")
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("procession: squares: 1,000/1,000 (100 %), ")


def test_a_real_terminal_shows_the_line() -> None:
    code = "import procession\nwith procession.Pool(2) as pool: pool.map(abs, range(1000), progress='all of it')"
    ours, theirs = pty.openpty()
    try:
        done = subprocess.run([sys.executable, "-c", code], stderr=theirs, stdin=theirs, check=False, timeout=100)
        shown = os.read(ours, 100_000).decode()
    finally:
        os.close(ours)
        os.close(theirs)
    assert done.returncode == 0, shown
    assert "\r" in shown
    assert "all of it" in shown
    assert "1,000" in shown or "1000/1000" in shown
