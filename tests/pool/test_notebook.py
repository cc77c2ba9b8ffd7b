"""A pool in a notebook, in a real kernel: the stop button, progress, insights, and functions that are defined anew."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from tests._notebook import Notebook, own_environment, processes_in

HEAD = """
import os, time
import procession
procession.set_start_method({method!r})

def square(x):
    return x * x

def work(seconds):
    with open({marks!r} + f"/{{os.getpid()}}-{{time.monotonic_ns()}}", "w"):
        time.sleep(seconds)
"""

#: A cell's code, and how many tasks run when it is stopped.
IN_A_BLOCK = {
    "map": ("with procession.Pool(3) as own: own.map(work, [600] * 9)", 3),
    "apply": ("with procession.Pool(3) as own: own.apply(work, (600,))", 1),
    "imap": ("with procession.Pool(3) as own: list(own.imap(work, [600] * 9))", 3),
    "executor": ("with procession.ProcessPoolExecutor(3) as own: list(own.map(work, [600] * 9))", 3),
    "executor's future": ("with procession.ProcessPoolExecutor(3) as own: own.submit(work, 600).result()", 1),
}
IN_A_VARIABLE = {
    "map": ("pool.map(work, [600] * 9)", 3),
    "map in chunks": ("pool.map(work, [600] * 9, chunksize=3)", 3),
    "starmap": ("pool.starmap(work, [(600,)] * 9)", 3),
    "apply": ("pool.apply(work, (600,))", 1),
    "imap": ("list(pool.imap(work, [600] * 9))", 3),
    "imap_unordered": ("for _ in pool.imap_unordered(work, iter([600] * 9)): pass", 3),
    "executor": ("list(executor.map(work, [600] * 3))", 3),
    "executor's future": ("executor.submit(work, 600).result()", 1),
}


@pytest.fixture
def environment():
    """Where nothing is left when the test has ended."""
    with own_environment() as made:
        yield made


@pytest.fixture
def notebook(environment, wait_until):
    """A notebook; when its kernel has been shut down, nothing that it has started is there any more."""
    opened = Notebook(environment)
    try:
        yield opened
        assert "Traceback" not in opened.shutdown().text
    finally:
        opened.close()
    wait_until(lambda: not processes_in(environment), "the end of the kernel and of all that it has started")


@pytest.fixture
def marks(notebook, start_method, environment):
    """The notebook's first cell has been run; in this directory each call of its `work` leaves a file."""
    directory = Path(environment["TMPDIR"], "marks")
    directory.mkdir()
    cell = notebook.run(HEAD.format(method=start_method, marks=str(directory)))
    assert ([], "") == (cell.errors, cell.text)
    return directory


@pytest.fixture
def stop_in(notebook, marks, wait_until):
    """Run a cell, press the stop button when so many tasks have begun, and return what the cell has brought about."""

    def stop(code, tasks):
        for mark in marks.iterdir():
            mark.unlink()
        notebook.begin(code)
        wait_until(lambda: len(os.listdir(marks)) >= tasks, f"{tasks} tasks of {code!r}")
        time.sleep(0.2)  # so that the caller waits, as it does when somebody loses patience
        notebook.stop()
        return notebook.finish()

    return stop


def test_a_kernel_that_cannot_start_is_an_error_and_leaves_nothing(environment, wait_until):
    """The fixtures look for what is left: of the client here, of the kernel in its environment."""
    nowhere = {**environment, "TMPDIR": environment["TMPDIR"] + "/missing"}
    with pytest.raises(AssertionError, match="the kernel's client has ended"):
        Notebook(nowhere)
    wait_until(lambda: not processes_in(environment), "the end of the kernel")


def test_the_stop_button_ends_a_pool_in_a_block_with_one_error(notebook, stop_in):
    """It is SIGINT to the kernel's process group: the workers get it as well, and keep silent."""
    for name, (code, tasks) in IN_A_BLOCK.items():
        cell = stop_in(code, tasks)
        assert (name, ["KeyboardInterrupt"], "") == (name, cell.errors, cell.text)
        after = notebook.run("with procession.Pool(2) as other: print(other.map(square, range(5)))")
        assert (name, [], "[0, 1, 4, 9, 16]\n") == (name, after.errors, after.text)


def test_a_pool_in_a_variable_goes_on_after_the_stop_button(notebook, stop_in, wait_until):
    """What the stopped cell had asked for is not in the way of the next one, and no worker has to be killed for it."""
    notebook.run("pool, executor = procession.Pool(3), procession.ProcessPoolExecutor(3)")
    # Their successors are started between cells, while the kernel ignores SIGINT, which a new process inherits.
    notebook.run("for worker in pool._pool: worker.kill()")
    time.sleep(0.5)
    wait_until(lambda: "3" == notebook.run("pool.insights().restarts").result, "the deaths to be noticed")
    for name, (code, tasks) in IN_A_VARIABLE.items():
        cell = stop_in(code, tasks)
        assert (name, ["KeyboardInterrupt"], "") == (name, cell.errors, cell.text)
        after = notebook.run("pool.map(square, range(5)), list(executor.map(square, range(5)))")
        assert (name, [], "") == (name, after.errors, after.text)
        assert "([0, 1, 4, 9, 16], [0, 1, 4, 9, 16])" == after.result
    assert "3" == notebook.run("pool.insights().restarts").result


def test_a_kernel_that_is_shut_down_takes_a_working_pool_along(notebook, marks, wait_until):
    """The fixture looks for what is left."""
    notebook.run("pool = procession.Pool(3); job = pool.map_async(work, [600] * 9)")
    wait_until(lambda: len(os.listdir(marks)) >= 3, "three tasks")


def test_a_kernel_that_is_killed_takes_its_pool_along(environment, start_method, wait_until):
    killed = Notebook(environment)
    try:
        code = f"import procession; pool = procession.get_context({start_method!r}).Pool(3); pool.map(abs, [-1])"
        assert "[1]" == killed.run(code).result
        killed.shutdown(now=True)
    finally:
        killed.close()
    wait_until(lambda: not processes_in(environment), "the end of all that the kernel had started")


def test_a_function_that_is_defined_anew_is_the_new_one(notebook, start_method):
    """In a pool that knows the old one, and in a new pool."""
    notebook.run(f"import procession; procession.set_start_method({start_method!r}); pool = procession.Pool(2)")
    assert "[0, 1, 2]" == notebook.run("def f(x): return x\npool.map(f, range(3))").result
    for factor in (10, 20):
        cell = notebook.run(
            f"def f(x): return x * {factor}\n"
            "with procession.Pool(2) as other: print(other.map(f, range(3)))\n"
            "pool.map(f, range(3)), pool.apply(f, (3,)), list(pool.imap(f, [4]))"
        )
        assert f"{[0, factor, 2 * factor]}\n" == cell.text
        assert f"({[0, factor, 2 * factor]}, {3 * factor}, {[4 * factor]})" == cell.result


def test_progress_is_one_line_of_its_cell_that_is_replaced(notebook):
    notebook.run("import procession, time; pool = procession.Pool(2)\ndef nap(x): time.sleep(0.05)")
    cell = notebook.run("pool.map(nap, range(40), progress='naps')[0]")
    [line] = cell.of("display_data")
    updates = cell.of("update_display_data")
    assert {line["transient"]["display_id"]} == {update["transient"]["display_id"] for update in updates}
    assert line["data"]["text/plain"].startswith("naps [")
    assert " 40/40 (100 %), " in updates[-1]["data"]["text/plain"]
    assert ("", []) == (cell.text, cell.strays)
    # A flood: a message for each item, or many in a second.
    cell = notebook.run("pool.map(abs, range(100_000), progress=True)[-1]")
    assert len(cell.of("update_display_data")) <= 2 + 10 * cell.seconds
    assert ("99999", "") == (cell.result, cell.text)


def test_progress_stays_in_the_cell_that_began_the_work(notebook):
    """Also when it is another cell that runs while it goes on: the display is named, whichever cell ipykernel takes for the parent."""
    notebook.run("import procession, time; pool = procession.Pool(2)")
    begun = notebook.run("job = pool.map_async(time.sleep, [0.05] * 40, progress='naps')")
    other = notebook.run("job.wait(); print('waited')")
    [line] = begun.of("display_data")
    assert "waited\n" == other.text
    updates = other.of("update_display_data")
    assert {line["transient"]["display_id"]} == {update["transient"]["display_id"] for update in updates}
    assert not other.of("display_data")


def test_insights_are_a_table(notebook):
    cell = notebook.run("import procession; pool = procession.Pool(2); pool.map(abs, range(5)); pool.insights()")
    [shown] = cell.of("execute_result")
    assert shown["data"]["text/html"].startswith("<p>5 items in ")
    assert "PoolWorker-1</td>" in shown["data"]["text/html"]
    assert shown["data"]["text/plain"].startswith("<Insights: 5 items in ")
