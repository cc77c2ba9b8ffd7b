"""`ProcessPoolExecutor`: what the standard library's does, and that a death breaks nothing."""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import itertools
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures.process import BrokenProcessPool

import pytest

import procession
from procession._pool.errors import PoolBrokenError, TaskTimeoutError, WorkerDiedError
from tests.pool import causes


def square(x):
    return x * x


def nap(seconds):
    time.sleep(seconds)
    return seconds


def describe(*args, **kwargs):
    return args, kwargs


def fail(x):
    raise ValueError(f"bad {x}")


def fail_at(x, bad):
    if x == bad:
        fail(x)
    return x


def die(signum=signal.SIGKILL):
    os.kill(os.getpid(), signum)
    time.sleep(60)


def die_once(path, x):
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return x
    return die()


def wait_for(event, x):
    event.wait()
    return x


def touch_and_wait(path, event):
    with open(path, "a") as file:
        file.write("x")
    event.wait()


def remember(value):
    global remembered
    remembered = value


def recall():
    return remembered


def refuse():
    raise RuntimeError("no licence")


def count(state, key):
    state[key] = state.get(key, 0) + 1
    return state[key]


class Unpicklable:
    def __reduce__(self):
        raise TypeError("not to be sent")


class Method:
    def __init__(self, base):
        self.base = base

    def add(self, x):
        return self.base + x


@pytest.fixture(params=["standard", "procession"])
def executor_type(request):
    """The standard library's executor, and ours: what must be the same."""
    standard = concurrent.futures.ProcessPoolExecutor
    return standard if request.param == "standard" else procession.ProcessPoolExecutor


@pytest.fixture
def executor():
    with procession.ProcessPoolExecutor(2) as executor:
        yield executor


@pytest.fixture
def event():
    event = procession.Event()
    yield event
    event.set()


# -- as the standard library's


def test_a_call_gives_its_result_or_its_error(executor_type):
    with executor_type(2) as executor:
        assert ((1, 2), {"c": 3}) == executor.submit(describe, 1, 2, c=3).result()
        future = executor.submit(fail, 7)
        assert isinstance(future.exception(), ValueError)
        with pytest.raises(ValueError, match="bad 7") as caught:
            future.result()
        assert "in fail" in str(caught.value.__cause__)


def test_map_gives_results_in_order(executor_type):
    with executor_type(2) as executor:
        assert [x * x for x in range(30)] == list(executor.map(square, range(30)))
        assert [x * x for x in range(30)] == list(executor.map(square, range(30), chunksize=7))
        assert [1, 4, 9] == list(executor.map(pow, [1, 2, 3, 4], [2, 2, 2]))
        assert [1, 4, 9] == list(executor.map(pow, [1, 2, 3, 4], [2, 2, 2], chunksize=2))
        assert [] == list(executor.map(square, []))


def test_map_raises_in_the_place_of_the_item_and_ends(executor_type):
    with executor_type(2) as executor:
        results = executor.map(fail_at, range(5), itertools.repeat(2))
        assert [0, 1] == [next(results), next(results)]
        with pytest.raises(ValueError, match="bad 2"):
            next(results)
        assert [] == list(results)


def test_map_times_out_when_a_result_is_asked_for(executor_type):
    event = procession.Event()
    with executor_type(2, mp_context=multiprocessing.get_context("fork")) as executor:
        results = executor.map(wait_for, [event], [1], timeout=0.05)
        with pytest.raises(concurrent.futures.TimeoutError):
            next(results)
        event.set()


def test_wrong_arguments_are_refused(executor_type):
    for arguments, error in (
        ({"max_workers": 0}, ValueError),
        ({"max_workers": -1}, ValueError),
        ({"initializer": 3}, TypeError),
    ):
        with pytest.raises(error):
            executor_type(**arguments)
    with executor_type(1) as executor, pytest.raises(ValueError, match="chunksize"):
        executor.map(square, [1], chunksize=0)


def test_nothing_is_taken_after_shutdown(executor_type):
    executor = executor_type(1)
    executor.shutdown()
    with pytest.raises(RuntimeError, match="after shutdown"):
        executor.submit(square, 1)
    executor.shutdown()


def test_what_was_submitted_is_done_after_shutdown_without_wait(executor_type):
    executor = executor_type(2)
    futures = [executor.submit(nap, 0.01) for _ in range(6)]
    executor.shutdown(wait=False)
    assert [0.01] * 6 == [future.result() for future in futures]


def test_leaving_the_block_by_an_exception_waits_for_the_calls(executor_type):
    with pytest.raises(KeyError), executor_type(2) as executor:
        futures = [executor.submit(nap, 0.01) for _ in range(6)]
        raise KeyError
    assert [0.01] * 6 == [future.result(timeout=0) for future in futures]


def test_cancelled_futures_are_cancelled_and_the_others_done(executor_type):
    with executor_type(1) as executor:
        futures = [executor.submit(nap, 0.02) for _ in range(20)]
        futures[0].result()
        executor.shutdown(cancel_futures=True)
    assert futures[-1].cancelled()
    assert all(future.done() for future in futures)
    assert [None] * sum(not f.cancelled() for f in futures) == [f.exception() for f in futures if not f.cancelled()]


def test_as_completed_and_wait_take_the_futures(executor_type):
    with executor_type(2) as executor:
        futures = [executor.submit(square, x) for x in range(10)]
        assert {x * x for x in range(10)} == {f.result() for f in concurrent.futures.as_completed(futures)}
        done, waiting = concurrent.futures.wait(futures)
        assert (10, 0) == (len(done), len(waiting))


def test_a_callback_is_called_once_with_the_future(executor_type, wait_until):
    called = []
    with executor_type(1) as executor:
        future = executor.submit(square, 3)
        future.add_done_callback(called.append)
        wait_until(lambda: called)
    assert [future] == called


def test_arguments_that_cannot_be_pickled_are_the_futures_error(executor_type):
    with executor_type(1) as executor:
        future = executor.submit(describe, Unpicklable())
        assert isinstance(future.exception(), TypeError)
        assert 9 == executor.submit(square, 3).result()


def test_the_initializer_runs_in_each_worker(executor_type):
    with executor_type(2, initializer=remember, initargs=(5,)) as executor:
        assert [5] * 8 == [executor.submit(recall).result() for _ in range(8)]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_initializer_that_raises_breaks_the_executor(executor_type, capfd):
    with executor_type(1, initializer=refuse) as executor:
        with pytest.raises(BrokenProcessPool):
            executor.submit(square, 1).result()
        with pytest.raises(BrokenProcessPool):
            executor.submit(square, 1)
        assert executor._broken


def test_asyncio_runs_in_it(executor_type):
    async def main(executor):
        loop = asyncio.get_running_loop()
        return await asyncio.gather(*[loop.run_in_executor(executor, square, x) for x in range(5)])

    with executor_type(2) as executor:
        assert [0, 1, 4, 9, 16] == asyncio.run(main(executor))


def test_a_dropped_executor_finishes_its_calls(executor_type):
    executor = executor_type(1)
    futures = [executor.submit(nap, 0.01) for _ in range(4)]
    reference = weakref.ref(executor)
    del executor
    gc.collect()
    assert reference() is None
    assert [0.01] * 4 == [future.result() for future in futures]


EXIT_PROGRAM = """
import sys, time
{executor}
def done(future):
    print(future.result(), flush=True)
def nap(x):
    time.sleep(0.05)
    return x
if __name__ == "__main__":
    executor = ProcessPoolExecutor(1)
    for x in range(3):
        executor.submit(nap, x).add_done_callback(done)
    {end}
"""


@pytest.mark.parametrize("end", ["pass", "executor.shutdown(wait=False)", "del executor", "sys.exit(3)"])
def test_the_interpreter_finishes_what_waits_before_it_ends(tmp_path, end):
    """The standard library's promise; a program that forgets `shutdown` loses nothing and does not hang."""
    program = tmp_path / "program.py"
    program.write_text(EXIT_PROGRAM.format(executor="from procession import ProcessPoolExecutor", end=end))
    ended = subprocess.run([sys.executable, program], capture_output=True, text=True, check=False)
    assert ("0\n1\n2\n", "") == (ended.stdout, ended.stderr)
    assert (3 if "exit" in end else 0) == ended.returncode


def test_a_call_at_the_interpreters_end_is_refused(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import atexit\n"
        "from procession import ProcessPoolExecutor\n"
        "def late():\n"
        "    try:\n"
        "        executor.submit(print, 1)\n"
        "    except RuntimeError as error:\n"
        "        print(error)\n"
        "executor = ProcessPoolExecutor(1)\n"
        "atexit.register(late)\n"
        "print(executor.submit(abs, -1).result())\n"
    )
    ended = subprocess.run([sys.executable, program], capture_output=True, text=True, check=True)
    assert "1\ncannot schedule new futures after interpreter shutdown\n" == ended.stdout


# -- ours


def test_it_is_what_isinstance_asks_for(executor):
    assert isinstance(executor, concurrent.futures.ProcessPoolExecutor)
    assert isinstance(executor.submit(square, 1), concurrent.futures.Future)
    assert 2 == executor._max_workers


def test_workers_are_started_with_the_first_call(wait_until):
    with procession.ProcessPoolExecutor(2) as executor:
        assert {} == executor._processes
        executor.submit(square, 1).result()
        wait_until(lambda: len(executor._processes) == 2)
        pids = executor._processes
        assert all(process.pid == pid and process.is_alive() for pid, process in pids.items())


@pytest.mark.parametrize("context", [multiprocessing, procession], ids=["standard", "procession"])
def test_it_takes_contexts_of_both_packages(context, start_method):
    with procession.ProcessPoolExecutor(1, mp_context=context.get_context(start_method)) as executor:
        assert 49 == executor.submit(square, 7).result()
        assert start_method == executor._mp_context.get_start_method()


def test_a_killed_worker_costs_its_own_call_and_no_other(ctx):
    with procession.ProcessPoolExecutor(2, mp_context=ctx) as executor:
        futures = [executor.submit(die) if x == 3 else executor.submit(square, x) for x in range(10)]
        error = futures[3].exception()
        assert isinstance(error, WorkerDiedError)
        assert isinstance(error, BrokenProcessPool)
        assert -signal.SIGKILL == error.exitcode
        assert [x * x for x in range(10) if x != 3] == [f.result() for x, f in enumerate(futures) if x != 3]
        assert 64 == executor.submit(square, 8).result()
        assert not executor._broken


def test_a_call_is_tried_again_after_a_death(tmp_path):
    with procession.ProcessPoolExecutor(1, retries=1) as executor:
        assert 5 == executor.submit(die_once, str(tmp_path / "died"), 5).result()


def test_a_call_that_takes_too_long_is_stopped():
    with procession.ProcessPoolExecutor(1, timeout=0.1) as executor:
        assert isinstance(executor.submit(nap, 600).exception(), TaskTimeoutError)
        assert 4 == executor.submit(square, 2).result()


def test_a_worker_is_replaced_after_its_tasks(ctx):
    with procession.ProcessPoolExecutor(1, mp_context=ctx, max_tasks_per_child=3) as executor:
        pids = [executor.submit(os.getpid).result() for _ in range(7)]
    assert [3, 3, 1] == [len(list(group)) for _, group in itertools.groupby(pids)]
    assert 3 == len(set(pids))


@pytest.mark.parametrize(("value", "error"), [(0, ValueError), (-1, ValueError), (1.5, TypeError)])
def test_the_number_of_tasks_of_a_worker_is_a_positive_number(value, error):
    with pytest.raises(error, match="max_tasks_per_child"):
        procession.ProcessPoolExecutor(1, max_tasks_per_child=value)


def test_an_unknown_option_is_refused_at_once():
    with pytest.raises(TypeError, match="unheard_of"):
        procession.ProcessPoolExecutor(1, unheard_of=1)


def test_a_future_runs_when_a_worker_has_it_and_not_before(executor, event, wait_until):
    futures = [executor.submit(wait_for, event, x) for x in range(6)]
    wait_until(lambda: sum(future.running() for future in futures) == 2)
    assert [True, True, False, False, False, False] == [future.running() for future in futures]
    event.set()
    assert list(range(6)) == [future.result() for future in futures]


def test_a_waiting_call_can_be_cancelled_and_a_running_one_not(event, tmp_path, wait_until):
    path = tmp_path / "begun"
    with procession.ProcessPoolExecutor(1) as executor:
        running = executor.submit(touch_and_wait, str(path), event)
        waiting = executor.submit(touch_and_wait, str(path), event)
        wait_until(path.exists)
        assert (False, True) == (running.cancel(), waiting.cancel())
        assert {waiting} == concurrent.futures.wait([waiting]).done
        event.set()
        assert running.result() is None
    assert "x" == path.read_text()


def test_what_is_in_a_workers_inbox_can_be_cancelled_too(event, tmp_path, wait_until):
    """Quick calls are given out in advance; none of them has begun while the first blocks."""
    path, opened = tmp_path / "begun", procession.Event()
    opened.set()
    with procession.ProcessPoolExecutor(1) as executor:
        for _ in range(50):
            executor.submit(touch_and_wait, str(path), opened).result()
        began = path.stat().st_size
        futures = [executor.submit(touch_and_wait, str(path), event) for _ in range(10)]
        wait_until(lambda: path.stat().st_size == began + 1)
        assert [False] + [True] * 9 == [future.cancel() for future in futures]
        event.set()
        assert futures[0].result() is None
    assert began + 1 == path.stat().st_size


def test_a_cancelled_call_wakes_those_who_wait_for_it(event):
    with procession.ProcessPoolExecutor(1) as executor:
        executor.submit(wait_for, event, 1)
        waiting = executor.submit(wait_for, event, 2)
        found = []
        thread = threading.Thread(target=lambda: found.extend(concurrent.futures.as_completed([waiting])))
        thread.start()
        assert waiting.cancel()
        thread.join()
        event.set()
    assert [waiting] == found


@pytest.mark.parametrize(
    ("method", "signum"), [("kill_workers", signal.SIGKILL), ("terminate_workers", signal.SIGTERM)]
)
def test_ending_the_workers_ends_every_future(ctx, method, signum, tmp_path, wait_until):
    path, event = tmp_path / "begun", procession.Event()
    executor = procession.ProcessPoolExecutor(1, mp_context=ctx)
    futures = [executor.submit(touch_and_wait, str(path), event) for _ in range(4)]
    wait_until(path.exists)
    (process,) = executor._processes.values()
    getattr(executor, method)()
    assert isinstance(futures[0].exception(), BrokenProcessPool)
    assert all(future.cancelled() for future in futures[1:])
    process.join()
    assert -signum == process.exitcode
    with pytest.raises(RuntimeError, match="after shutdown"):
        executor.submit(square, 1)
    getattr(executor, method)()


@pytest.mark.parametrize("method", ["kill_workers", "terminate_workers"])
def test_ending_workers_that_were_never_started_is_nothing(method):
    with procession.ProcessPoolExecutor(1) as executor:
        getattr(executor, method)()


def test_a_callback_may_end_the_executor(event):
    executor = procession.ProcessPoolExecutor(2)
    blocked = executor.submit(wait_for, event, 1)
    executor.submit(square, 1).add_done_callback(lambda _: executor.kill_workers())
    assert isinstance(blocked.exception(), BrokenProcessPool)
    executor.shutdown()


def test_a_buffered_map_reads_no_further_than_its_buffer(executor):
    taken = itertools.count()
    results = executor.map(square, taken, buffersize=4)
    assert 4 == next(taken)
    assert [0, 1, 4, 9, 25] == [next(results) for _ in range(5)]
    assert next(taken) <= 11
    results.close()


def test_a_buffered_map_goes_to_the_end(executor):
    assert [x * x for x in range(50)] == list(executor.map(square, range(50), buffersize=3))
    assert [x * x for x in range(50)] == list(executor.map(square, range(50), buffersize=3, chunksize=4))


@pytest.mark.parametrize(("size", "error"), [(0, ValueError), (-1, ValueError), ("1", TypeError)])
def test_a_buffer_has_at_least_one_place(executor, size, error):
    with pytest.raises(error, match="buffersize"):
        executor.map(square, [1], buffersize=size)


def test_the_results_of_map_do_not_keep_the_executor_alive():
    executor = procession.ProcessPoolExecutor(1)
    results = executor.map(square, range(3), buffersize=2)
    reference = weakref.ref(executor)
    del executor
    gc.collect()
    assert reference() is None
    assert [0, 1] == list(results)


def test_closures_and_bound_methods_are_called_as_they_are_at_submit(executor):
    base = Method(1)
    first = executor.submit(base.add, 1)
    base.base = 10
    second = executor.submit(base.add, 1)
    assert [2, 11] == [first.result(), second.result()]
    assert [3, 4] == [executor.submit(lambda y, x=x: x + y, 1).result() for x in (2, 3)]


def test_arguments_are_sent_as_they_are_at_submit(executor, event):
    blocked = [executor.submit(wait_for, event, 0) for _ in range(2)]
    items = [1]
    future = executor.submit(sum, items)
    items.append(100)
    event.set()
    assert [0, 0, 1] == [one.result() for one in (*blocked, future)]


def test_functions_get_the_workers_state_if_wanted():
    with procession.ProcessPoolExecutor(1, worker_state=True) as executor:
        assert [1, 2] == [executor.submit(count, "a").result() for _ in range(2)]
        assert 0 == executor.submit(lambda state, key: state.get(key, 0), "b").result()
        assert [3, 4, 5] == list(executor.map(count, "aaa", chunksize=2))


def test_an_error_of_the_initializer_is_the_cause():
    with procession.ProcessPoolExecutor(1, initializer=refuse) as executor:
        with pytest.raises(PoolBrokenError, match="no licence") as caught:
            executor.submit(square, 1).result()
        assert isinstance(caught.value.__cause__, RuntimeError)


def test_a_cancelled_await_cancels_what_waits(event):
    async def main(executor):
        loop = asyncio.get_running_loop()
        running = loop.run_in_executor(executor, wait_for, event, 1)
        waiting = loop.run_in_executor(executor, wait_for, event, 2)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        event.set()
        return await running

    with procession.ProcessPoolExecutor(1) as executor:
        assert 1 == asyncio.run(main(executor))


def test_several_threads_submit_to_one_executor(executor):
    results = {}

    def use(number):
        results[number] = [executor.submit(square, x).result() for x in range(20)]

    threads = [threading.Thread(target=use, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {number: [x * x for x in range(20)] for number in range(4)} == results


def test_a_fork_of_its_owner_is_refused():
    with procession.ProcessPoolExecutor(1) as executor:
        executor.submit(square, 1).result()

        def use():
            try:
                executor.submit(square, 1)
            except RuntimeError as error:
                return str(error)
            finally:
                executor.shutdown()

        child = procession.get_context("fork").Process(target=use)
        child.start()
        assert "before this process was forked" in child.result()
        child.join()
        assert 4 == executor.submit(square, 2).result()


def nested(x):
    executor = procession.ProcessPoolExecutor(1)
    return executor.submit(square, x).result()


def test_a_call_may_have_an_executor_of_its_own(executor):
    """It is left open: the worker finishes it as it ends."""
    assert [0, 1, 4] == list(executor.map(nested, range(3)))


def leave(_):
    sys.exit(3)


@pytest.mark.parametrize("x", [1, (1, 2)])  # plain arguments, and such as are pickled
def test_an_exit_is_the_error_of_its_call_and_the_worker_goes_on(executor_type, x):
    with executor_type(1) as executor:
        pid = executor.submit(os.getpid).result()
        with pytest.raises(SystemExit, match="3"):
            executor.submit(leave, x).result()
        assert pid == executor.submit(os.getpid).result()


def test_a_result_that_cannot_be_pickled_has_the_error_of_the_pickler(executor_type):
    with executor_type(1) as executor:
        with pytest.raises(causes.TaskError, match="on purpose"):
            executor.submit(causes.return_bad_result, "exception").result()
        with pytest.raises(SystemExit, match="3"):
            executor.submit(causes.return_bad_result, "sys.exit").result()
        assert 9 == executor.submit(square, 3).result()


@pytest.mark.parametrize("cause", ["exception", "sys.exit"])
def test_what_cannot_be_unpickled_breaks_its_call_and_no_other(executor, cause):
    """The standard library breaks the executor: what catches that error catches this one."""
    bad_argument = executor.submit(causes.same, causes.BadArgument(cause))
    bad_result = executor.submit(causes.return_bad_in_parent, (cause, os.getpid()))
    for future, text in (
        (bad_argument, r"the arguments of same\(\) could not be unpickled in the worker: (on purpose|3)"),
        (bad_result, r"the result of return_bad_in_parent\(\) could not be unpickled here: (on purpose|3)"),
    ):
        with pytest.raises(BrokenProcessPool, match=text) as caught:
            future.result()
        assert isinstance(caught.value, procession.RemoteError)
    assert 9 == executor.submit(square, 3).result()


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_workers_that_are_not_forked_are_started_as_they_are_needed(method, event):
    with procession.ProcessPoolExecutor(3, procession.get_context(method)) as executor:
        for x in range(4):
            executor.submit(square, x).result()
        assert 1 == len(executor._processes)
        futures = [executor.submit(wait_for, event, x) for x in range(2)]
        assert 2 == len(executor._processes)
        futures += [executor.submit(wait_for, event, x) for x in range(2, 9)]
        assert 3 == len(executor._processes)
        event.set()
        assert list(range(9)) == [future.result() for future in futures]


def test_a_limit_of_calls_selects_spawn_where_no_context_is_given():
    """So it is documented for the standard library's, which has the option from Python 3.11 on."""
    assert "spawn" == procession.ProcessPoolExecutor(1, max_tasks_per_child=3)._mp_context.get_start_method()
    context = procession.get_context("fork")
    assert context is procession.ProcessPoolExecutor(1, context, max_tasks_per_child=3)._mp_context


def refuse_and_log(path):
    logging.getLogger("concurrent.futures").addHandler(logging.FileHandler(path))
    refuse()


def test_the_error_of_an_initializer_is_logged(executor_type, tmp_path):
    log = tmp_path / "log"
    executor = executor_type(1, initializer=refuse_and_log, initargs=(str(log),))
    with executor, pytest.raises(BrokenProcessPool):
        executor.submit(square, 3).result()
    text = log.read_text()
    assert "Exception in initializer:" in text
    assert "RuntimeError: no licence" in text
