"""`Pool` as a drop-in: what programs written for the standard library's pool do with it, and what they get."""

from __future__ import annotations

import gc
import multiprocessing
import multiprocessing.pool
import os
import subprocess
import sys
import threading
import time
import warnings

import pytest

import procession
from procession import _native


def square(x):
    return x * x


def add(x, y=0):
    return x + y


def pid_after(seconds):
    time.sleep(seconds)
    return os.getpid()


def lambda_maker():
    return lambda: 1


class Refuses:
    def __reduce__(self):
        raise TypeError("this cannot be sent")


class Breaks:
    """Pickles, and cannot be unpickled."""

    def __reduce__(self):
        return int, ("no number",)


@pytest.fixture
def pool(start_method):
    with procession.get_context(start_method).Pool(2) as pool:
        yield pool


def test_all_of_the_interface_under_each_start_method(pool) -> None:
    assert pool.apply(add, (1,), {"y": 2}) == 3
    assert pool.apply_async(square, (5,)).get() == 25
    assert pool.map(square, range(100)) == [x * x for x in range(100)]
    assert pool.map(square, iter([1, 2, 3]), 2) == [1, 4, 9]
    assert pool.map_async(square, [3], 1).get() == [9]
    assert pool.starmap(add, [(1, 2), (3,)]) == [3, 3]
    assert pool.starmap_async(add, [(1, 2)]).get() == [3]
    assert list(pool.imap(square, range(50), 7)) == [x * x for x in range(50)]
    assert sorted(pool.imap_unordered(square, range(50))) == [x * x for x in range(50)]
    assert pool.map(lambda x: x + 1, [1, 2]) == [2, 3]


def test_what_programs_poke_at(pool) -> None:
    assert len(pool._pool) == pool._processes == 2
    assert pool._state == multiprocessing.pool.RUN
    assert all(worker.is_alive() and worker.daemon for worker in pool._pool)
    assert isinstance(pool, multiprocessing.pool.Pool)
    assert isinstance(pool.apply_async(square, (1,)), multiprocessing.pool.AsyncResult)
    assert isinstance(pool.imap(square, []), multiprocessing.pool.IMapIterator)
    assert "state=RUN pool_size=2" in repr(pool)


def test_the_methods_of_a_result() -> None:
    with procession.Pool(1) as pool:
        slow = pool.apply_async(pid_after, (0.3,))
        assert not slow.ready()
        with pytest.raises(ValueError, match="not ready"):
            slow.successful()
        with pytest.raises(multiprocessing.TimeoutError):
            slow.get(timeout=0.01)
        slow.wait()
        assert slow.ready()
        assert slow.successful()


def test_the_error_of_the_first_failing_item_is_raised_with_the_workers_traceback() -> None:
    with procession.Pool(2) as pool:
        with pytest.raises(ZeroDivisionError) as caught:
            pool.map(divide_by, [1, 0, 2], 1)
        assert "in divide_by" in str(caught.value.__cause__)


def divide_by(x):
    return 1 / x


def test_an_argument_is_taken_as_it_is_at_the_call() -> None:
    with procession.Pool(1) as pool:
        blocker = pool.apply_async(pid_after, (0.2,))
        argument = [1]
        result = pool.apply_async(len, (argument,))
        argument.append(2)
        assert result.get() == 1
        blocker.get()


@pytest.mark.parametrize("how", ["apply", "map", "imap"])
def test_what_cannot_be_sent_is_an_error_of_that_call_alone(how) -> None:
    with procession.Pool(2) as pool:
        with pytest.raises(TypeError, match="cannot be sent"):
            {
                "apply": lambda: pool.apply(add, (Refuses(),)),
                "map": lambda: pool.map(add, [Refuses()]),
                "imap": lambda: next(pool.imap(add, [Refuses()])),
            }[how]()
        assert pool.map(square, [1, 2, 3]) == [1, 4, 9]


def test_only_the_item_that_cannot_be_sent_or_read_fails_and_not_its_chunk() -> None:
    with procession.Pool(2) as pool:
        sent = pool.map(str, [1, Refuses(), 2, Breaks(), 3], chunksize=5, on_error="return")
    assert [sent[0], sent[2], sent[4]] == ["1", "2", "3"]
    assert isinstance(sent[1], TypeError)
    assert isinstance(sent[3], ValueError)


def test_a_result_that_cannot_be_sent_is_named() -> None:
    with procession.Pool(1) as pool:
        with pytest.raises(multiprocessing.pool.MaybeEncodingError, match="lambda"):
            pool.apply(lambda_maker)
        assert pool.apply(square, (2,)) == 4


def test_a_pool_that_is_left_without_close_says_so_and_ends() -> None:
    pool = procession.Pool(1)
    workers = pool._pool
    with pytest.warns(ResourceWarning, match="unclosed running multiprocessing pool"):
        del pool
    for worker in workers:
        worker.join()


def test_after_close_nothing_is_taken_and_join_waits_for_the_rest() -> None:
    pool = procession.Pool(2)
    with pytest.raises(ValueError, match="still running"):
        pool.join()
    result = pool.map_async(pid_after, [0.1] * 4)
    pool.close()
    with pytest.raises(ValueError, match="not running"):
        pool.apply(square, (1,))
    pool.join()
    assert len(result.get()) == 4
    assert not procession.active_children()


def test_a_stream_that_nobody_has_read_does_not_keep_join_waiting() -> None:
    pool = procession.Pool(2)
    stream = pool.imap(square, (x for x in range(500)), 1)
    pool.close()
    pool.join()
    assert list(stream) == [x * x for x in range(500)]


def test_leaving_an_endless_stream_ends_it() -> None:
    def endless():
        x = 0
        while True:
            yield x
            x += 1

    with procession.Pool(2) as pool:
        stream = pool.imap(square, endless())
        assert [next(stream) for _ in range(5)] == [0, 1, 4, 9, 16]
    with pytest.raises(procession.TaskCancelledError):
        list(stream)


@pytest.mark.leaks(
    reason="a worker's own fork server leaves the name of its socket to the main process, as in the stdlib"
)
def test_a_pool_can_be_made_in_a_worker(pool) -> None:
    assert pool.apply(nested) == [0, 1, 4]


def nested():
    with procession.Pool(2) as pool:
        return pool.map(square, range(3))


def test_several_threads_use_one_pool() -> None:
    results = {}

    def use(number):
        results[number] = [pool.apply(add, (number, i)) for i in range(50)] + pool.map(square, range(number))

    with procession.Pool(2) as pool:
        threads = [threading.Thread(target=use, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert results == {n: [n + i for i in range(50)] + [x * x for x in range(n)] for n in range(4)}


def test_workers_are_replaced_without_forking_a_process_with_threads() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with procession.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
            first = {pool.apply(os.getpid) for _ in range(3)}
    assert len(first) == 3


def test_nothing_is_kept_in_shared_memory_or_in_the_workers_by_use() -> None:
    with procession.Pool(2) as pool:
        assert len(pool._pool) == 2  # all are there
        use_in_many_ways(pool)
        before = settled_memory()
        for _ in range(20):
            use_in_many_ways(pool)
        assert settled_memory() <= before
        assert all(len(member.defined) <= 4 for member in pool._engine.members.values())


def use_in_many_ways(pool) -> None:
    pool.map(lambda x: x, range(10))
    pool.apply(len, ([1] * 1000,))
    list(pool.imap(square, range(20)))
    pool.map(len, ["a" * 2000] * 5)


def settled_memory():
    gc.collect()
    _native.collect()
    return _native.memory()["used"]


ORPHANED = """
import os, sys
import procession as mp
def f(x):
    return os.getpid()
if __name__ == "__main__":
    mp.set_start_method(sys.argv[1])
    pool = mp.Pool(2)
    print(len(pool._pool), pool.apply(f, (1,)) > 0, flush=True)
    os._exit(0)
"""


@pytest.mark.leaks(reason="os._exit() leaves the directory of the fork server's socket, as in the stdlib")
def test_idle_workers_leave_when_their_parent_is_gone(start_method, tmp_path) -> None:
    program = tmp_path / "program.py"
    program.write_text(ORPHANED, encoding="utf-8")
    # The workers hold the pipe open: this returns when the last of them has left.
    done = subprocess.run([sys.executable, program, start_method], check=False, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("2 True\n", "")


REDEFINED = """
import {library} as mp
mp.set_start_method("fork")
pool = mp.Pool(1)
def f(x):
    return ("first", x)
print(pool.map(f, [1]))
def f(x):
    return ("second", x)
print(pool.map(f, [1]), pool.apply(f, (2,)))
pool.close()
pool.join()
"""


def test_a_function_defined_after_the_fork_and_then_anew_is_the_new_one() -> None:
    done = subprocess.run(
        [sys.executable, "-c", REDEFINED.format(library="procession")], check=False, capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == ("[('first', 1)]\n[('second', 1)] ('second', 2)\n", "")
