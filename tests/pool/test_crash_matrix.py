"""A task, a worker or a callback goes wrong: by whatever cause, in whatever place, by every start method.

Each row: the task's own call gets the named error, every other task of the same map has its result, and the pool answers.
"""

from __future__ import annotations

import faulthandler
import os
import pickle
import re
import signal
import sys
import threading
import time
from multiprocessing import forkserver

import pytest

import procession
from procession import RemoteError
from procession._pool.errors import PoolBrokenError, WorkerDiedError
from procession.pool import MaybeEncodingError, RemoteTraceback
from tests.pool import causes
from tests.pool.causes import CAUSES, DEADLY, RAISING, BadArgument, TaskError

DEATHS = {
    "segfault": r"was killed by SIGSEGV \(a crash in native code\)",
    "SIGKILL": r"was killed by SIGKILL",
    "os._exit": r"ended with exit code 3",
    "sys.exit": r"ended with exit code 3",
    "stack overflow": r"was killed by SIG(SEGV|BUS)",
}
ERRORS = {"exception": TaskError, "MemoryError": MemoryError}
GOOD = [0, 1, 2, 4, 5, 6]


@pytest.fixture
def pool(ctx):
    with ctx.Pool(2) as pool:
        yield pool


def check(result, kind, pattern, *, traced=True):
    """The error is of this kind and says this; what came from a worker has the worker's traceback as its cause."""
    assert kind is type(result) or (kind is WorkerDiedError and isinstance(result, kind)), repr(result)
    assert re.search(pattern, str(result)), str(result)
    if traced and kind is not WorkerDiedError:
        assert isinstance(result.__cause__, RemoteTraceback)
        assert "Traceback (most recent call last)" in str(result.__cause__)


def spoilt(bad):
    return [*GOOD[:3], bad, *GOOD[3:]]


def map_and_check(pool, function, bad, chunksize, kind, pattern, *, traced=True):
    """Others of the map have their results; the pool answers a call, a map and a stream."""
    results = pool.map(function, spoilt(bad), chunksize=chunksize, on_error="return")
    check(results.pop(3), kind, pattern, traced=traced)
    assert GOOD == results
    answers(pool)


def answers(pool):
    assert 9 == pool.apply(causes.square, (3,))
    assert [0, 1, 4] == pool.map(causes.square, range(3))
    assert [0, 1, 4] == list(pool.imap(causes.square, range(3)))


one_by_one_and_in_a_chunk = pytest.mark.parametrize("chunksize", [1, 7], ids=["one by one", "in a chunk"])


@one_by_one_and_in_a_chunk
@pytest.mark.parametrize("cause", DEADLY)
def test_a_death_while_it_runs_costs_one_item(pool, cause, chunksize):
    pattern = rf"PoolWorker-\d+ \(pid \d+\) {DEATHS[cause]}.* while it ran run_if\('{cause}'\)"
    map_and_check(pool, causes.run_if, cause, chunksize, WorkerDiedError, pattern)


@one_by_one_and_in_a_chunk
@pytest.mark.parametrize("cause", RAISING)
def test_what_it_raises_is_raised_at_the_call(pool, cause, chunksize):
    map_and_check(pool, causes.run_if, cause, chunksize, ERRORS[cause], "on purpose")


@one_by_one_and_in_a_chunk
@pytest.mark.parametrize("cause", DEADLY)
def test_a_death_while_its_argument_is_unpickled_costs_one_item(pool, cause, chunksize):
    pattern = rf"{DEATHS[cause]}.* while it ran same\("
    map_and_check(pool, causes.same, BadArgument(cause), chunksize, WorkerDiedError, pattern)


@one_by_one_and_in_a_chunk
@pytest.mark.parametrize("cause", RAISING)
def test_what_unpickling_its_argument_raises_is_raised_at_the_call(pool, cause, chunksize):
    map_and_check(pool, causes.same, BadArgument(cause), chunksize, ERRORS[cause], "on purpose")


@one_by_one_and_in_a_chunk
@pytest.mark.parametrize("cause", DEADLY)
def test_a_death_while_its_result_is_pickled_costs_one_item(pool, cause, chunksize):
    pattern = rf"{DEATHS[cause]}.* while it ran return_bad_result\('{cause}'\)"
    map_and_check(pool, causes.return_bad_result, cause, chunksize, WorkerDiedError, pattern)


@one_by_one_and_in_a_chunk
@pytest.mark.parametrize("cause", RAISING)
def test_a_result_that_cannot_be_pickled_says_what_and_why(pool, cause, chunksize):
    map_and_check(pool, causes.return_bad_result, cause, chunksize, MaybeEncodingError, "BadResult.*Reason.*on purpose")


@one_by_one_and_in_a_chunk
@pytest.mark.parametrize("cause", [*RAISING, "sys.exit"])
def test_a_result_that_cannot_be_unpickled_in_the_parent_costs_one_item(pool, cause, chunksize):
    """It is found when a whole part of a chunk is unpickled at once; the others of it are well all the same."""
    pattern = r"the result of return_bad_in_parent\(\) could not be unpickled here: (on purpose|3)"
    bad = (cause, os.getpid())
    map_and_check(pool, causes.return_bad_in_parent, bad, chunksize, RemoteError, pattern, traced=False)


@one_by_one_and_in_a_chunk
@pytest.mark.parametrize("cause", [*RAISING, "sys.exit"])
def test_an_exception_that_cannot_be_unpickled_in_the_parent_comes_as_text(pool, cause, chunksize):
    bad = (cause, os.getpid())
    map_and_check(pool, causes.raise_bad_error, bad, chunksize, RemoteError, "BadError: the original text")


@pytest.mark.parametrize("cause", [*RAISING, "sys.exit"])
def test_apply_survives_what_comes_back_and_cannot_be_unpickled(pool, cause):
    """The thread that unpickles it is the caller's own."""
    with pytest.raises(RemoteError, match="could not be unpickled here"):
        pool.apply(causes.return_bad_in_parent, ((cause, os.getpid()),))
    with pytest.raises(RemoteError, match="the original text"):
        pool.apply(causes.raise_bad_error, ((cause, os.getpid()),))
    answers(pool)


@pytest.mark.parametrize("cause", [name for name in DEADLY if name not in ("sys.exit", "stack overflow")])
def test_a_worker_that_dies_idle_is_replaced(pool, cause, wait_until):
    """Nobody's task is lost, and nobody is told."""
    pid = pool.apply(causes.run_soon, (cause,))
    wait_until(lambda: pid not in [worker.pid for worker in pool._pool], "the death being seen")
    wait_until(lambda: len(pool._pool) == 2, "the replacement")
    answers(pool)


@pytest.mark.parametrize("cause", DEADLY)
def test_an_initializer_that_kills_its_worker_breaks_the_pool(ctx, cause):
    """For ever it would: so the pool gives up and says how they died."""
    codes = {"segfault": "-11", "SIGKILL": "-9", "stack overflow": "-(11|7)"}
    pattern = (
        r"more than 1 workers died within 60 s\. The last, .*PoolWorker-\d+ \(pid \d+\), "
        rf"ended with exit code {codes.get(cause, '3')} before it was ready"
    )
    with ctx.Pool(1, CAUSES[cause], max_restarts=1, restart_period=60.0) as pool:
        for call in (lambda: pool.map(causes.same, GOOD), lambda: pool.apply(causes.same, (1,))):
            with pytest.raises(PoolBrokenError, match=pattern):
                call()


@pytest.mark.parametrize("cause", ["os._exit", "sys.exit"])
def test_an_initializer_that_ends_its_worker_well_breaks_the_pool_too(ctx, cause):
    """A worker that ends with exit code 0 before it is ready helps nobody either."""
    end = os._exit if cause == "os._exit" else sys.exit
    with ctx.Pool(1, end, (0,)) as pool, pytest.raises(PoolBrokenError, match="before it was ready"):
        pool.map(causes.same, GOOD)


@pytest.mark.parametrize("cause", RAISING)
def test_an_initializer_that_raises_breaks_the_pool_and_is_its_cause(ctx, cause):
    kind = ERRORS[cause]
    with ctx.Pool(2, CAUSES[cause]) as pool:
        for call in (lambda: pool.map(causes.same, GOOD), lambda: pool.apply(causes.same, (1,))):
            with pytest.raises(PoolBrokenError, match=rf"the initializer raised {kind.__name__}: on purpose") as caught:
                call()
            assert kind is type(caught.value.__cause__)
            assert f"in {CAUSES[cause].__name__}" in str(caught.value.__cause__.__cause__)


@pytest.mark.parametrize("cause", [*RAISING, "sys.exit"])
def test_a_callback_that_raises_harms_nobody(pool, cause, capfd):
    """It is printed, as nobody is there to catch it; the result it was told about is there."""

    def callback(value):
        CAUSES[cause]()

    assert 4 == pool.apply_async(causes.square, (2,), callback=callback).get()
    assert [4] == pool.map_async(causes.square, [2], callback=callback).get()
    with pytest.raises(TaskError):
        pool.apply_async(causes.raise_error, error_callback=callback).get()
    answers(pool)
    pool.close()
    pool.join()
    assert 3 == capfd.readouterr().err.count("the callback")


@pytest.mark.parametrize("cause", DEADLY)
def test_a_callers_own_call_gets_the_death(pool, cause):
    with pytest.raises(WorkerDiedError, match=DEATHS[cause]) as caught:
        pool.apply(causes.run_if, (cause,))
    assert caught.value.exitcode in (3, -signal.SIGKILL, -signal.SIGSEGV, -signal.SIGBUS)
    assert f"run_if('{cause}')" == caught.value.task
    answers(pool)


@pytest.mark.parametrize("cause", ["SIGKILL", "sys.exit"])
def test_a_task_that_is_retried_succeeds_the_second_time(ctx, cause, tmp_path):
    with ctx.Pool(2, retries=1) as pool:
        paths = [str(tmp_path / str(i)) for i in range(3)]
        assert ["second time"] * 3 == pool.starmap(causes.run_unless_again, [(path, cause) for path in paths])
        assert "second time" == pool.apply(causes.run_unless_again, (str(tmp_path / "one"), cause))


def test_retries_can_be_told_for_each_call(pool, tmp_path):
    def calls(name):
        return causes.run_unless_again, (str(tmp_path / name), "SIGKILL")

    with pytest.raises(WorkerDiedError):
        pool.apply_async(*calls("first")).get()
    assert "second time" == pool.apply_async(*calls("second"), retries=1).get()
    items = [(str(tmp_path / f"map{i}"), "SIGKILL") for i in range(2)]
    assert ["second time"] * 2 == pool.starmap(causes.run_unless_again, items, 2, retries=1)
    answers(pool)


def test_retries_are_spent_at_last_and_the_error_says_how_many(pool):
    with pytest.raises(WorkerDiedError, match="the last of 3 attempts") as caught:
        pool.apply_async(causes.run_if, ("SIGKILL",), retries=2).get()
    assert 3 == caught.value.deaths


def test_what_a_task_raises_is_no_reason_to_retry(pool, tmp_path):
    with pytest.raises(TaskError):
        pool.apply_async(causes.run_unless_again, (str(tmp_path / "x"), "exception"), retries=3).get()


def test_several_deaths_in_one_chunk_cost_one_item_each(pool):
    items = [0, "SIGKILL", 2, "exception", "os._exit", 5, "segfault"]
    results = pool.map(causes.run_if, items, chunksize=7, on_error="return")
    assert [0, 2, 5] == [value for value in results if isinstance(value, int)]
    kinds = [type(value) for value in results if not isinstance(value, int)]
    assert [WorkerDiedError, TaskError, WorkerDiedError, WorkerDiedError] == kinds


def test_every_worker_may_die_of_every_task(pool):
    results = pool.map(causes.run_if, ["SIGKILL"] * 12, on_error="return")
    assert [WorkerDiedError] * 12 == [type(result) for result in results]
    answers(pool)


def test_a_stream_goes_on_after_a_death(pool):
    for mapping in (pool.imap, pool.imap_unordered):
        results = []
        stream = mapping(causes.run_if, spoilt("SIGKILL"))
        while True:
            try:
                results.append(next(stream))
            except StopIteration:
                break
            except WorkerDiedError:
                results.append("died")
        assert sorted(map(str, spoilt("died"))) == sorted(map(str, results))


def test_an_argument_that_cannot_be_pickled_is_the_callers_error(pool):
    """The others of its chunk go."""
    results = pool.map(causes.same, [1, threading.Lock(), 3], chunksize=3, on_error="return")
    assert [1, 3] == [results[0], results[2]]
    assert isinstance(results[1], TypeError)
    with pytest.raises(TypeError, match="pickle"):
        pool.apply(causes.same, (threading.Lock(),))
    answers(pool)


@pytest.mark.parametrize("chunksize", [1, 3])
@pytest.mark.parametrize("cause", ["segfault_here", "abort_here"])
def test_the_error_of_a_crash_has_the_stack_it_happened_at(ctx, cause, chunksize):
    # pytest uses faulthandler, and forked workers inherit that.
    with ctx.Pool(1, initializer=faulthandler.disable) as pool:
        died, *good = pool.map(causes.call, [cause, "os.getpid", "os.getpid"], chunksize=chunksize, on_error="return")
        assert isinstance(died, WorkerDiedError)
        assert re.search(rf'File ".*causes\.py", line \d+ in {cause}\n.*causes\.py", line \d+ in call$', died.stack)
        assert died.stack in str(died)
        assert good[0] == good[1]
        assert died.stack == pickle.loads(pickle.dumps(died)).stack


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_where_the_user_has_faulthandler_write_it_writes(method, capfd):
    """A fork server has the stderr that was there when it was started."""
    with procession.get_context(method).Pool(1, initializer=faulthandler.enable) as pool:
        with pytest.raises(WorkerDiedError) as caught:
            pool.apply(causes.abort_here)
        assert not caught.value.stack
    assert "in abort_here" in capfd.readouterr().err


def test_a_function_that_cannot_be_pickled_is_the_callers_error(pool):
    lock = threading.Lock()
    with pytest.raises((AttributeError, TypeError), match="pickle"):
        pool.map(lambda x: lock, [1, 2])
    answers(pool)


def test_deaths_of_tasks_never_use_up_the_budget_of_restarts(pool):
    """Each of them ends a task; the pool stands as long as there are tasks."""
    for _ in range(4):
        pool.map(causes.run_if, ["os._exit"] * 6, on_error="return")
    answers(pool)


@pytest.mark.parametrize("how", ["idle", "starting"])
def test_workers_that_die_for_ever_break_the_pool(ctx, how):
    """The error says how many, within what time, and how the last one ended."""
    init = (causes.run_soon, ("SIGKILL",)) if how == "idle" else (causes.sigkill, ())
    with ctx.Pool(1, *init, max_restarts=2, restart_period=60.0) as pool:
        with pytest.raises(PoolBrokenError, match=r"more than 2 workers died within 60 s\. The last, .*PoolWorker"):
            pool.map(causes.sleep, [30, 30, 30, 30])
        with pytest.raises(PoolBrokenError, match="more than 2 workers died"):
            pool.apply(causes.same, (1,))


@pytest.mark.leaks("a fork server that is killed leaves its socket")
@pytest.mark.parametrize("victim", ["template", "forkserver"])
def test_when_the_maker_of_workers_is_killed_its_workers_go_on(victim, wait_until):
    """No task is lost, no worker given up; and those that die later are replaced."""
    with procession.get_context("fork" if victim == "template" else "forkserver").Pool(2) as pool:
        first = {worker.pid for worker in pool._pool}
        for pid in first:
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: pool.apply_async(causes.square, (3,), retries=5).get(60) == 9, "workers of the template")
        wait_until(lambda: not first & {worker.pid for worker in pool._pool}, "none but workers of the template")
        second = {worker.pid for worker in pool._pool}
        running = pool.map_async(causes.sleep, [0.5] * 6, chunksize=1)
        template = pool._engine._crew._launcher._template
        os.kill(forkserver._forkserver._forkserver_pid if template is None else template.pid, signal.SIGKILL)
        assert len(running.get(60)) == 6
        # Idle for longer than it takes a worker to look whether the pool's process is there.
        time.sleep(1.5)
        assert second == {worker.pid for worker in pool._pool}
        died, result = pool.map(causes.run_if, ["SIGKILL", 2], chunksize=1, on_error="return")
        assert isinstance(died, WorkerDiedError)
        assert died.pid in second
        assert result == 2
        answers(pool)
        third = pool._pool
    wait_until(lambda: not any(worker.is_alive() for worker in third), "the end of the workers")
