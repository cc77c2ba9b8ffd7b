"""What the caller decides: how long a task may take, whether it is wanted any more, how many workers there are, and when it ends."""

from __future__ import annotations

import asyncio
import functools
import gc
import itertools
import os
import signal
import threading
import time
from pathlib import Path

import pytest

import procession
from procession._pool.errors import (
    PoolBrokenError,
    TaskCancelledError,
    TaskTimeoutError,
    WorkerDiedError,
    WorkerMemoryError,
)
from tests.pool import control
from tests.pool.causes import TaskError, raise_error, run_if, same, sigkill, square


@pytest.fixture
def fork():
    return procession.get_context("fork")


@pytest.fixture
def pool(fork):
    with fork.Pool(2, grace=0.1) as pool:
        yield pool


def lines(path):
    return path.read_text().split() if path.exists() else []


# -- timeout=


def test_a_task_that_takes_too_long_is_stopped(ctx):
    """It is told by name, the others have their results, and the worker goes on: a KeyboardInterrupt ended the task."""
    with ctx.Pool(2) as pool:
        workers = set(pool.map(control.pid_after, [0.1] * 4))
        results = pool.map(control.sleep_or_square, [1, 60.0, 3, 4], timeout=0.3, on_error="return")
        error = results.pop(1)
        assert [1, 9, 16] == results
        assert isinstance(error, TaskTimeoutError)
        assert "sleep_or_square(60.0) was stopped after its timeout of 0.3 s." == str(error)
        assert isinstance(error, TimeoutError)
        assert isinstance(error, procession.TimeoutError)
        assert set(pool.map(control.pid_after, [0.1] * 4)) <= workers


@pytest.mark.parametrize(
    "ignored", [(), (signal.SIGINT,), (signal.SIGINT, signal.SIGTERM)], ids=["nothing", "SIGINT", "SIGINT and SIGTERM"]
)
def test_a_task_that_ignores_signals_is_stopped_all_the_same(pool, ignored, tmp_path):
    with pytest.raises(TaskTimeoutError, match="ignore_signals"):
        pool.apply_async(control.ignore_signals, (str(tmp_path / "x"), *ignored), timeout=0.3).get()
    assert [1, 4, 9] == pool.map(square, [1, 2, 3])


def test_a_task_that_catches_everything_is_stopped_all_the_same(pool, tmp_path):
    with pytest.raises(TaskTimeoutError, match="swallow_interrupts"):
        pool.apply_async(control.swallow_interrupts, (str(tmp_path / "x"),), timeout=0.3).get()
    assert 9 == pool.apply(square, (3,))


def test_a_timeout_holds_for_each_item_of_a_chunk(pool):
    items = [0.4, 0.4, 0.4, 60.0, 0.1]
    results = pool.map(control.sleep_or_square, items, chunksize=5, timeout=1.0, on_error="return")
    error = results.pop(3)
    assert [x * x for x in items if x < 1] == results
    assert isinstance(error, TaskTimeoutError)
    assert "sleep_or_square(60.0)" == error.task


def test_the_pools_timeout_is_that_of_every_task_without_one(fork):
    with fork.Pool(2, timeout=0.2, grace=0.1) as pool:
        for call in (
            lambda: pool.apply(time.sleep, (60,)),
            lambda: pool.apply_async(time.sleep, (60,)).get(),
            lambda: pool.map(time.sleep, [60]),
            lambda: pool.starmap(time.sleep, [(60,)]),
            lambda: list(pool.imap(time.sleep, [60])),
        ):
            with pytest.raises(TaskTimeoutError, match=r"sleep\(60\) was stopped after its timeout of 0.2 s"):
                call()
        assert pool.apply_async(control.pid_after, (0.4,), timeout=60).get()


def test_a_workers_start_is_no_part_of_its_tasks_time(ctx):
    """Importing takes seconds, and so may an initializer."""
    with ctx.Pool(1, control.slow_start, (1.5,), timeout=1.0) as pool:
        assert 9 == pool.apply(square, (3,))
        assert [1, 4] == pool.map(square, [1, 2])


def test_waiting_for_a_worker_is_no_part_of_a_tasks_time(fork):
    with fork.Pool(1) as pool:
        results = [pool.apply_async(time.sleep, (0.2,), timeout=2.0) for _ in range(12)]
        assert [None] * 12 == [result.get() for result in results]


def test_get_with_a_timeout_leaves_the_task_alone(pool):
    result = pool.apply_async(control.pid_after, (0.3,))
    with pytest.raises(procession.TimeoutError, match=r"no result after 0\.01 s"):
        result.get(0.01)
    assert result.get() in [worker.pid for worker in pool._pool]


# -- cancelling


def test_a_queued_task_that_is_cancelled_is_never_begun(fork, tmp_path):
    with fork.Pool(1) as pool:
        first = pool.apply_async(control.touch_and_sleep, (str(tmp_path / "first"), 0.3))
        second = pool.apply_async(control.touch, (str(tmp_path / "second"),))
        third = pool.apply_async(square, (3,))
        assert second.cancel()
        assert second.cancelled()
        with pytest.raises(TaskCancelledError):
            second.get()
        assert (0.3, 9) == (first.get(), third.get())
    assert not (tmp_path / "second").exists()


def test_a_running_task_that_is_cancelled_is_interrupted(ctx, tmp_path, wait_until):
    with ctx.Pool(1) as pool:
        result = pool.apply_async(control.touch_and_sleep, (str(tmp_path / "x"), 600))
        wait_until((tmp_path / "x").exists, "the task's beginning")
        assert result.cancel()
        with pytest.raises(TaskCancelledError, match=r"touch_and_sleep\(\) was cancelled"):
            result.get()
        assert 9 == pool.apply(square, (3,))
        assert not result.cancel()


def test_a_running_task_that_will_not_stop_is_killed_when_cancelled(pool, tmp_path, wait_until):
    path = tmp_path / "x"
    result = pool.apply_async(control.ignore_signals, (str(path), signal.SIGINT, signal.SIGTERM))
    wait_until(path.exists, "the task's beginning")
    pid = int(lines(path)[0])
    result.cancel()
    wait_until(lambda: pid not in [worker.pid for worker in pool._pool], "the worker's end")
    assert [1, 4] == pool.map(square, [1, 2])


@pytest.mark.parametrize("chunksize", [1, 10])
def test_a_cancelled_map_stops_all_of_it_and_nothing_else(pool, tmp_path, chunksize, wait_until):
    path = tmp_path / "x"
    cancelled = pool.starmap_async(control.touch_and_sleep, [(str(path), 600)] * 20, chunksize)
    wait_until(lambda: len(lines(path)) == 2, "two tasks' beginning")
    other = pool.map_async(square, range(5))
    assert cancelled.cancel()
    assert [0, 1, 4, 9, 16] == other.get()
    pool.close()
    pool.join()
    assert 2 == len(lines(path))


def test_what_is_done_cannot_be_cancelled(pool):
    result = pool.apply_async(square, (3,))
    assert 9 == result.get()
    assert not result.cancel()
    assert 9 == result.get()


def test_a_cancelled_task_calls_its_error_callback_once(fork):
    told = []
    with fork.Pool(1) as pool:
        blocker = pool.apply_async(time.sleep, (0.2,))
        result = pool.apply_async(square, (3,), callback=told.append, error_callback=told.append)
        result.cancel()
        blocker.get()
    assert [TaskCancelledError] == [type(error) for error in told]


# -- on_error


def test_the_first_error_in_the_order_of_the_items_is_raised_and_the_others_run(pool, tmp_path):
    path = tmp_path / "x"
    with pytest.raises(TypeError):
        pool.map(functools.partial(control.touch_and_sleep, str(path)), [0, "a", 0, None, 0], chunksize=1)
    assert 5 == len(lines(path))


def test_errors_are_results_if_one_wants_them_to_be(pool):
    def kinds(results):
        return [type(result) for result in results]

    items = [1, "exception", "SIGKILL"]
    expected = [int, TaskError, WorkerDiedError]
    assert expected == kinds(pool.map(run_if, items, on_error="return"))
    assert expected == kinds(pool.starmap(run_if, [(item,) for item in items], on_error="return"))
    assert expected == kinds(pool.imap(run_if, items, on_error="return"))
    assert set(expected) == set(kinds(pool.imap_unordered(run_if, items, on_error="return")))
    assert TaskError is type(pool.apply_async(raise_error, on_error="return").get())
    with pytest.raises(ValueError, match=r'on_error must be "raise" or "return", not .ignore'):
        pool.map(same, [1], on_error="ignore")


# -- memory_limit, maxtasksperchild, max_age_per_child


def some_memory():
    """200 MiB more than a forked worker has from this process: what is mapped from files, the arena's too, it has not at first."""
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    return (int(status.partition("RssAnon:")[2].split()[0]) << 10) + (200 << 20)


def test_a_worker_over_its_soft_limit_is_replaced_after_its_task(fork):
    with fork.Pool(1, memory_limit=some_memory()) as pool:
        small = pool.apply(control.pid_of)
        time.sleep(0.1)
        big = pool.apply(control.hold, (400,))
        assert small == big
        assert pool.apply(control.pid_of) != big


def test_a_worker_over_its_hard_limit_is_killed_and_its_task_is_told(fork):
    limit = some_memory()
    with fork.Pool(2, memory_limit=(None, limit)) as pool:
        results = pool.map_async(control.hold_and_sleep, [400], on_error="return")
        assert [1, 4] == pool.map(square, [1, 2])
        (error,) = results.get()
        assert isinstance(error, WorkerMemoryError)
        assert isinstance(error, MemoryError)
        assert error.used > error.limit == limit
        assert f"more than the hard limit of {limit >> 20} MiB (memory_limit), while it ran hold_and_sleep(400)" in str(
            error
        )
        with pytest.raises(WorkerMemoryError):
            pool.apply(control.hold_and_sleep, (400,))
        assert 9 == pool.apply(square, (3,))


def test_a_worker_leaves_after_so_many_tasks(ctx):
    with ctx.Pool(1, maxtasksperchild=2) as pool:
        pids = [pool.apply(control.pid_of) for _ in range(6)]
        assert [2, 2, 2] == [len(list(group)) for _, group in itertools.groupby(pids)]
        assert 5 <= len(set(pool.map(control.pid_of, range(10))))


def test_a_worker_leaves_when_it_is_old(fork):
    with fork.Pool(1, max_age_per_child=0.2) as pool:
        first = pool.apply(control.pid_of)
        time.sleep(0.3)
        pool.apply(control.pid_of)
        assert first != pool.apply(control.pid_of)


def test_a_worker_that_leaves_after_each_task_loses_none_of_many(fork):
    with fork.Pool(2, maxtasksperchild=1) as pool:
        assert [x * x for x in range(60)] == pool.map(square, range(60), chunksize=1)
        assert sorted(x * x for x in range(30)) == sorted(pool.imap_unordered(square, range(30)))


# -- who uses it


@pytest.mark.leaks("a fork server of the worker's own, which ends with the worker, leaves its socket")
def test_a_worker_may_have_a_pool_of_its_own(ctx, start_method):
    with ctx.Pool(2) as pool:
        assert [45, 45] == pool.starmap(control.nested, [(start_method, 10)] * 2)


def test_several_threads_may_use_one_pool(pool):
    """Each gets its own, whatever way it takes."""
    wrong = []

    def work(k):
        for i in range(40):
            expected = [x * x for x in range(k, k + 20)]
            ways = (
                lambda: pool.map(square, range(k, k + 20)),
                lambda: list(pool.imap(square, range(k, k + 20))),
                lambda: [pool.apply(square, (x,)) for x in range(k, k + 20)],
                lambda: [r.get() for r in [pool.apply_async(square, (x,)) for x in range(k, k + 20)]],
            )
            if expected != ways[i % 4]():
                wrong.append((k, i))

    threads = [threading.Thread(target=work, args=(k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [] == wrong


def test_a_pool_is_its_makers_and_not_a_forked_childs(fork, pool):
    """The child would take answers away from its parent."""
    with pytest.raises(RuntimeError, match=r"belongs to the parent\. Make a pool of its own in the child"):
        child = fork.Process(target=control.use, args=(pool,))
        child.start()
        try:
            child.result(timeout=60)
        finally:
            child.join()
    assert 9 == pool.apply(square, (3,))


def test_a_forked_child_ends_well_with_its_parents_pool_in_its_memory(fork, pool):
    """Its exit handlers must not end, nor wait for, what is not its own."""
    waiting = pool.map_async(time.sleep, [0.3, 0.3])
    child = fork.Process(target=square, args=(3,))
    child.start()
    assert 9 == child.result(timeout=60)
    child.join()
    assert 0 == child.exitcode
    assert [None, None] == waiting.get()
    assert 9 == pool.apply(square, (3,))


# -- when workers die for nothing


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_pool_whose_workers_die_at_their_start_says_so_to_everyone(fork):
    with fork.Pool(2, sigkill, max_restarts=3, restart_period=60.0) as pool:
        told = []
        results = [pool.apply_async(square, (x,), error_callback=told.append) for x in range(3)]
        stream = pool.imap(square, itertools.count())
        for waiting in (*(result.get for result in results), stream.__next__, lambda: pool.map(square, [1])):
            with pytest.raises(PoolBrokenError, match="more than 3 workers died within 60 s"):
                waiting()
        assert [PoolBrokenError] * 3 == [type(error) for error in told]


def test_killing_idle_workers_now_and_then_breaks_nothing(fork, wait_until):
    with fork.Pool(2, max_restarts=2, restart_period=0.2) as pool:
        for _ in range(5):
            pid = pool._pool[0].pid
            os.kill(pid, signal.SIGKILL)
            wait_until(lambda pid=pid: pid not in [worker.pid for worker in pool._pool], "the death being seen")
            time.sleep(0.25)
        assert [1, 4] == pool.map(square, [1, 2])


# -- how many workers


def test_a_pool_grows_while_it_is_busy(fork, wait_until):
    with fork.Pool(1) as pool:
        result = pool.map_async(control.pid_after, [0.1] * 20, chunksize=1)
        pool.resize(4)
        wait_until(lambda: len(pool._pool) == 4, "four workers")
        assert 4 <= len(set(result.get()))
        assert 4 == pool._processes


def test_a_pool_shrinks_while_it_is_busy_and_loses_nothing(fork, wait_until):
    with fork.Pool(4) as pool:
        result = pool.map_async(control.sleep_or_square, [0.02] * 60, chunksize=1)
        pool.resize(1)
        wait_until(lambda: len(pool._pool) == 1, "one worker")
        assert 60 == len(result.get())
        with pytest.raises(ValueError, match="at least 1"):
            pool.resize(0)


def test_idle_workers_are_let_go_and_come_back(ctx, wait_until):
    with ctx.Pool(2, idle_timeout=0.2) as pool:
        for _ in range(2):
            assert [0, 1, 4] == pool.map(square, range(3))
            wait_until(lambda: not pool._pool, "the workers' leave")
        assert 9 == pool.apply(square, (3,))
        wait_until(lambda: not pool._pool, "the workers' leave")
        assert [0, 1, 4] == list(pool.imap(square, iter(range(3))))
        wait_until(lambda: not pool._pool, "the workers' leave")


# -- in what order


def test_what_is_urgent_goes_first(fork, tmp_path):
    path = str(tmp_path / "order")
    with fork.Pool(1) as pool:
        blocker = pool.apply_async(time.sleep, (0.3,))
        late = pool.starmap_async(control.note, [(path, f"low{i}") for i in range(3)], 1, priority=-1)
        normal = pool.apply_async(control.note, (path, "normal"))
        urgent = pool.starmap_async(control.note, [(path, f"high{i}") for i in range(3)], 1, priority=5)
        for result in (blocker, late, normal, urgent):
            result.get()
    assert ["high0", "high1", "high2", "normal", "low0", "low1", "low2"] == lines(tmp_path / "order")


@pytest.mark.parametrize(
    "cost", [[2, 3, 1, 5], lambda item: {"a": 2, "b": 3, "c": 1, "d": 5}[item[1]]], ids=["list", "function"]
)
def test_what_costs_most_is_begun_first_and_results_stay_in_order(fork, tmp_path, cost):
    path = str(tmp_path / "order")
    with fork.Pool(1) as pool:
        items = [(path, name) for name in "abcd"]
        assert list("abcd") == pool.starmap(control.note, items, cost=cost)
        with pytest.raises(ValueError, match="cost has 3 entries for 4 items"):
            pool.starmap(control.note, items, cost=[1, 2, 3])
    assert list("dbac") == lines(tmp_path / "order")


def test_seeds_give_the_same_numbers_whatever_the_workers_and_chunks(fork):
    def numbers(workers, method="map", **options):
        with fork.Pool(workers=workers) as pool:
            return list(getattr(pool, method)(control.roll, range(20), seed=7, **options))

    expected = numbers(1)
    assert 20 == len(set(expected))
    assert expected == numbers(3)
    assert expected == numbers(2, chunksize=7)
    assert expected == numbers(2, "imap", chunksize=3)
    assert expected == numbers(2, retries=3)
    assert expected == numbers(0)
    with fork.Pool(2) as pool:
        assert expected != pool.map(control.roll, range(20), seed=8)
        assert pool.map(control.roll, range(20)) != pool.map(control.roll, range(20))


# -- what it is given


def test_workers_have_a_state_a_beginning_and_an_end(ctx, tmp_path):
    exit_ = functools.partial(control.state_exit, str(tmp_path))
    with ctx.Pool(2, worker_init=control.state_init, worker_exit=exit_, worker_state=True) as pool:
        counts = {}
        for pid, count in pool.map(control.state_count, range(20)):
            counts[pid] = max(count, counts.get(pid, 0))
        assert 20 == sum(counts.values())
    ended = dict(map(int, path.name.split("-")) for path in tmp_path.iterdir())
    assert counts == {pid: count for pid, count in ended.items() if count}


def test_keywords_and_several_iterables(pool):
    assert [11, 12] == pool.map(control.add, [1, 2], kwargs={"b": 10})
    assert [11, 22] == pool.map(control.add, [1, 2], [10, 20])
    assert [111, 222] == pool.map(control.add, [1, 2], [10, 20], [100, 200])
    assert [111, 122] == pool.map(control.add, [1, 2], [10, 20], kwargs={"c": 100})
    assert [11, 22] == list(pool.imap(control.add, iter([1, 2]), iter([10, 20])))
    assert [11, 12] == pool.starmap(control.add, [(1,), (2,)], kwargs={"b": 10})
    with pytest.raises(TypeError, match="nonsense"):
        pool.map(same, [1], nonsense=3)


def test_results_can_be_awaited(pool):
    async def main():
        squares = await pool.map_async(square, range(4))
        one = await pool.apply_async(square, (3,))
        stream = [x async for x in pool.imap(square, range(3))]
        with pytest.raises(ValueError, match="5"):
            await pool.apply_async(control.boom, (5,))
        task = asyncio.ensure_future(_awaited(pool.apply_async(time.sleep, (600,))))
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        both = await asyncio.gather(*(_awaited(pool.apply_async(square, (x,))) for x in range(10)))
        return squares, one, stream, both

    assert ([0, 1, 4, 9], 9, [0, 1, 4], [x * x for x in range(10)]) == asyncio.run(main())


async def _awaited(result):
    return await result


def test_no_workers_means_here(fork):
    """Where a debugger sees it, and print() is seen."""
    with fork.Pool(workers=0) as pool:
        assert [os.getpid()] * 2 == pool.map(control.pid_of, range(2))
        assert os.getpid() == pool.apply(control.pid_of)
        assert 9 == pool.apply_async(square, (3,)).get()
        assert [0, 1, 4] == list(pool.imap(square, iter(range(3))))
        assert {0, 1, 4} == set(pool.imap_unordered(square, range(3)))
        assert [3, 7] == pool.starmap(control.add, [(1, 2), (3, 4)])
        with pytest.raises(ValueError, match="4"):
            pool.map(control.boom, [4])
        assert [ValueError] == [type(error) for error in pool.map(control.boom, [4], on_error="return")]
        assert 1 == next(pool.imap(square, itertools.count(1)))
    with pytest.raises(ValueError, match="not running"):
        pool.map(square, [1])


# -- streams


def test_a_stream_reads_no_further_ahead_than_it_is_told(ctx):
    read = []

    def numbers():
        for i in itertools.count():
            read.append(i)
            yield i

    with ctx.Pool(2) as pool:
        stream = pool.imap(square, numbers(), buffersize=5)
        for i in range(10):
            assert i * i == next(stream)
            time.sleep(0.02)
            assert len(read) <= i + 1 + 5
        stream.close()
        lazy = pool.imap_unordered(square, numbers())
        next(lazy)
        time.sleep(0.1)
        assert len(read) < 20_000
        lazy.close()


def test_an_input_that_raises_midway_raises_after_what_it_gave(pool):
    def numbers():
        yield 1
        yield 2
        raise OSError("the input ended badly")

    for mapping in (pool.imap, pool.imap_unordered):
        stream = mapping(square, numbers())
        assert {1, 4} == {next(stream), next(stream)}
        with pytest.raises(OSError, match="the input ended badly"):
            next(stream)
        with pytest.raises(StopIteration):
            next(stream)
    with pytest.raises(OSError, match="the input ended badly"):
        pool.map(square, numbers())
    assert [1, 4] == pool.map(square, [1, 2])


def test_an_input_that_blocks_holds_up_nobody_else(pool):
    go_on = threading.Event()

    def numbers():
        yield 1
        go_on.wait()
        yield 2

    stream = pool.imap(square, numbers())
    assert 1 == next(stream)
    assert [0, 1, 4] == pool.map(square, range(3))
    with pytest.raises(procession.TimeoutError):
        stream.next(0.05)
    go_on.set()
    assert [4] == list(stream)


def test_a_stream_that_nobody_wants_any_more_is_cancelled(fork, tmp_path, wait_until):
    path = tmp_path / "begun"
    with fork.Pool(1) as pool:
        stream = pool.imap(functools.partial(control.touch_and_sleep, str(path)), [600] * 5)
        wait_until(lambda: lines(path), "the first task's beginning")
        del stream
        gc.collect()
        assert 9 == pool.apply(square, (3,))
    assert 1 == len(lines(path))


def test_a_closed_stream_is_at_its_end_for_whoever_waits_for_it(pool):
    stream = pool.imap(time.sleep, [600])
    ended = []
    waiting = threading.Thread(target=lambda: ended.append(list(stream)))
    waiting.start()
    time.sleep(0.05)
    stream.close()
    waiting.join()
    assert [[]] == ended
    stream = pool.imap(square, range(1000))
    assert [0, 1] == [next(stream), next(stream)]
    stream.close()
    assert [] == list(stream)
    assert 9 == pool.apply(square, (3,))


def test_streams_may_be_garbage_at_any_moment(pool):
    """In cycles they are found by the collector, in whatever thread and under whatever lock that happens to run."""
    threshold = gc.get_threshold()
    gc.set_threshold(5, 2, 2)
    try:
        for _ in range(60):
            ring = [pool.imap(square, range(1000))]
            ring.append(ring)
            next(ring[0])
            del ring
            assert [0, 1, 4] == pool.map(square, range(3))
    finally:
        gc.set_threshold(*threshold)
    gc.collect()


# -- the end


def test_who_waits_when_the_pool_is_terminated_is_told(ctx, wait_until):
    """In whatever way he waits, and whether his task had been begun or not."""
    pool = ctx.Pool(1)
    outcomes = []

    def wait_for(call):
        try:
            outcomes.append(call())
        except BaseException as error:
            outcomes.append(type(error))

    calls = [
        lambda: pool.apply(time.sleep, (600,)),
        lambda: pool.apply_async(time.sleep, (600,)).get(),
        lambda: pool.map(time.sleep, [600, 600]),
        lambda: next(pool.imap(time.sleep, [600])),
        lambda: next(pool.imap_unordered(time.sleep, itertools.repeat(600))),
    ]
    threads = [threading.Thread(target=wait_for, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(pool._engine.jobs) == len(calls), "all of them waiting")
    pool.terminate()
    for thread in threads:
        thread.join()
    assert [TaskCancelledError] * len(calls) == outcomes
    with pytest.raises(ValueError, match="not running"):
        pool.apply(square, (3,))
    pool.join()


def test_calls_that_come_while_the_pool_is_terminated_do_not_hang(fork):
    """Each is answered: with its result, or that it was too late."""
    for _ in range(10):
        pool = fork.Pool(2)
        outcomes = []

        def call(pool=pool, outcomes=outcomes):
            try:
                while True:
                    pool.apply(square, (3,))
                    pool.map(square, range(3))
                    list(pool.imap(square, range(3)))
            except BaseException as error:
                outcomes.append(type(error))

        threads = [threading.Thread(target=call) for _ in range(3)]
        for thread in threads:
            thread.start()
        time.sleep(0.02)
        pool.terminate()
        for thread in threads:
            thread.join()
        assert 3 == len(outcomes)
        assert set(outcomes) <= {TaskCancelledError, ValueError}


def test_terminate_ends_workers_that_ignore_its_signal(fork, tmp_path, wait_until):
    pool = fork.Pool(1)
    pool.apply_async(control.ignore_signals, (str(tmp_path / "x"), signal.SIGINT, signal.SIGTERM))
    wait_until((tmp_path / "x").exists, "the task's beginning")
    pool.terminate()
    pool.join()


def test_terminate_may_be_called_by_a_callback(fork, wait_until):
    pool = fork.Pool(1)
    pool.apply_async(square, (3,), callback=lambda _: pool.terminate())
    wait_until(lambda: pool._state == "TERMINATE", "the callback")
    pool.join()


def test_close_and_join_wait_for_all_that_was_begun(ctx, tmp_path):
    """A stream that nobody consumes is run to its end, as the standard library's is."""
    path = str(tmp_path / "done")
    pool = ctx.Pool(2)
    result = pool.map_async(square, range(5))
    stream = pool.imap(functools.partial(control.note, path), range(100))
    pool.close()
    with pytest.raises(ValueError, match="not running"):
        pool.map(square, [1])
    pool.join()
    assert [0, 1, 4, 9, 16] == result.get()
    assert list(range(100)) == list(stream)
    assert 100 == len(lines(tmp_path / "done"))


def test_join_without_close_is_a_mistake(pool):
    with pytest.raises(ValueError, match="still running"):
        pool.join()


def test_leaving_the_block_waits_for_what_was_begun(ctx):
    with ctx.Pool(2) as pool:
        result = pool.map_async(control.sleep_or_square, [0.2, 3])
    assert [pytest.approx(0.04), 9] == result.get(0)


def test_leaving_the_block_by_an_exception_drops_what_was_begun(ctx):
    with pytest.raises(TaskError), ctx.Pool(2) as pool:
        result = pool.map_async(time.sleep, [600] * 4)
        raise_error()
    with pytest.raises(TaskCancelledError, match="terminated"):
        result.get()


def test_leaving_the_block_ends_a_stream_without_end(fork):
    with fork.Pool(2) as pool:
        stream = pool.imap(square, itertools.count())
        assert 0 == next(stream)
    with pytest.raises(TaskCancelledError):
        for _ in range(1_000_000):
            next(stream)


def test_callbacks_that_raise_are_shown_and_harm_nobody(pool, capfd):
    def callback(value):
        raise TaskError("in a callback")

    assert 9 == pool.apply_async(square, (3,), callback=callback).get()
    with pytest.raises(ValueError, match="1"):
        pool.map_async(control.boom, [1], error_callback=callback).get()
    assert [0, 1, 4] == pool.map(square, range(3))
    pool.close()
    pool.join()
    assert 2 == capfd.readouterr().err.count("TaskError: in a callback")
