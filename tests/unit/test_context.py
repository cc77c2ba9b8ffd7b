"""Contexts: the standard library's, with our objects; one start method for both packages."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import multiprocessing.context
import os
import subprocess
import sys
import textwrap
import threading

import pytest

import procession

WAIT_S = 60.0


def square(x):
    return x * x


def put_name(queue, lock, event):
    with lock:
        queue.put(procession.current_process().name)
    event.set()


def test_contexts_are_subclasses_of_the_standard_librarys(ctx, start_method) -> None:
    assert isinstance(ctx, type(multiprocessing.get_context(start_method)))
    assert isinstance(ctx, multiprocessing.context.BaseContext)
    assert ctx.get_start_method() == start_method
    assert ctx.get_context() is ctx
    assert ctx.get_context("fork") is procession.get_context("fork")


def test_unknown_start_method_is_the_standard_librarys_error(ctx) -> None:
    with pytest.raises(ValueError, match="cannot find context for 'nope'"):
        ctx.get_context("nope")
    with pytest.raises(ValueError, match="cannot set start method of concrete context"):
        ctx.set_start_method("fork")


def test_contexts_that_others_registered_are_found(monkeypatch) -> None:
    """loky registers its own in the standard library's table."""
    own = multiprocessing.context.ForkContext()
    monkeypatch.setitem(multiprocessing.context._concrete_contexts, "theirs", own)
    assert procession.get_context("theirs") is own


def test_item_that_cannot_be_pickled_raises_in_put_and_is_named(ctx) -> None:
    queue = ctx.Queue()
    with pytest.raises(TypeError, match="lock") as caught:
        queue.put({"settings": [1, threading.Lock()]})
    if sys.version_info >= (3, 11):
        (note,) = caught.value.__notes__
        assert "the object['settings'][1] (lock)" in note
    assert queue.empty()


def test_objects_of_a_context_reach_its_processes(ctx) -> None:
    queue, lock, event = ctx.Queue(), ctx.Lock(), ctx.Event()
    with ctx.Process(target=put_name, args=(queue, lock, event), name="worker-7"):
        assert queue.get(timeout=WAIT_S) == "worker-7"
        assert event.wait(WAIT_S)


def test_pool_runs_functions_lambdas_and_closures(ctx) -> None:
    offset = 10
    with ctx.Pool(2) as pool:
        assert pool.map(square, range(5)) == [0, 1, 4, 9, 16]
        assert pool.map(lambda x: x + offset, range(3)) == [10, 11, 12]
        assert pool.apply(square, (9,)) == 81
        with pytest.raises(TypeError):
            pool.apply(square, ("a",))
    pool.join()


def test_pool_can_be_made_without_a_context() -> None:
    from procession.pool import Pool

    with Pool(1) as pool:
        assert isinstance(pool, multiprocessing.pool.Pool)
        assert pool.map(square, [3]) == [9]
    pool.join()


def test_process_pool_executor_takes_our_contexts(ctx) -> None:
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=ctx) as executor:
        assert list(executor.map(square, range(4))) == [0, 1, 4, 9]
        with pytest.raises(TypeError):
            executor.submit(square, "a").result(timeout=WAIT_S)


def test_executor_notices_a_killed_worker(ctx) -> None:
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=ctx) as executor:
        future = executor.submit(os._exit, 1)
        with pytest.raises(concurrent.futures.process.BrokenProcessPool):
            future.result(timeout=WAIT_S)


@pytest.mark.leaks("the standard library's heap keeps the file that Value and Array come from")
def test_value_array_manager_and_pipe_work(ctx) -> None:
    value = ctx.Value("i", 3)
    with value.get_lock():
        value.value += 1
    assert value.value == 4
    assert list(ctx.Array("i", [1, 2])) == [1, 2]
    with ctx.Manager() as manager:
        assert list(manager.list([1, 2])) == [1, 2]
    left, right = ctx.Pipe()
    left.send("x")
    assert right.recv() == "x"
    left.close()
    right.close()


def test_cpu_count_is_what_can_be_used(ctx) -> None:
    assert 1 <= ctx.cpu_count() <= len(os.sched_getaffinity(0))
    assert ctx.cpu_count() == procession.cpu_count() == procession.cpu_limits().cpus
    assert 1 <= ctx.cpu_count(logical=False) <= ctx.cpu_count()


def run(code: str, *arguments: str, stdin: bool = False) -> str:
    code = textwrap.dedent(code)
    command = [sys.executable, "-X", "dev", "-W", "error", *(["-"] if stdin else ["-c", code]), *arguments]
    result = subprocess.run(
        command, capture_output=True, text=True, input=code if stdin else None, timeout=120, check=False
    )
    assert (result.returncode, result.stderr) == (0, ""), result.stderr
    return result.stdout


def test_start_method_is_shared_with_the_standard_library() -> None:
    run(
        """
        import multiprocessing, procession
        assert procession.get_start_method(allow_none=True) is None
        multiprocessing.set_start_method("spawn")
        assert procession.get_start_method() == "spawn"
        assert type(procession.get_context()).__name__ == "SpawnContext"
        procession.set_start_method("fork", force=True)
        assert multiprocessing.get_start_method() == "fork"
        try:
            procession.set_start_method("spawn")
        except RuntimeError as error:
            assert "context has already been set" in str(error)
        else:
            raise AssertionError
        """
    )


def test_default_start_method_is_the_interpreters() -> None:
    assert run("import procession; print(procession.get_start_method(), procession.get_all_start_methods())") == run(
        "import multiprocessing as m; print(m.get_start_method(), m.get_all_start_methods())"
    )


@pytest.mark.parametrize("stdin", [False, True], ids=["-c", "stdin"])
def test_main_that_cannot_be_imported_travels_by_value(start_method, stdin) -> None:
    """R2 of FIELD.md: with the standard library these die with AttributeError or FileNotFoundError in the child."""
    out = run(
        f"""
        import procession as mp
        class Error(Exception): pass
        class Point:
            def __init__(self, x): self.x = x
        factor = 3
        def f(p): return Point(p.x * factor)
        def caught(): return Error(1)
        class Own(mp.get_context({start_method!r}).Process):
            def run(self): return f(Point(2)).x
        ctx = mp.get_context({start_method!r})
        lock = ctx.Lock()
        with ctx.Process(target=f, args=(Point(2),)) as p:
            r = p.result(60)
            assert type(r) is Point, type(r)
            print(r.x)
        with Own() as p: print(p.result(60))
        with ctx.Pool(2) as pool:
            print(pool.map(lambda x: f(Point(x)).x, range(3)))
            pool.close()
            pool.join()
        q = ctx.Queue()
        q.put(Point(9))
        with ctx.Process(target=lambda: f(q.get()).x) as p:
            print(p.result(60))
        with ctx.Process(target=caught) as p:
            print(repr(p.result(60)), type(p.result()) is Error)
        """,
        stdin=stdin,
    )
    assert out.splitlines() == ["6", "6", "[0, 3, 6]", "27", "Error(1) True"]


def test_parents_sys_path_is_known_before_anything_of_ours_is_imported(start_method, tmp_path) -> None:
    """A child started with -I or without PYTHONPATH finds procession where its parent found it."""
    source = os.path.dirname(os.path.dirname(os.path.abspath(procession.__file__)))
    code = f"""
import sys
sys.path[:0] = {[source, *[p for p in sys.path if "site-packages" in p]]!r}
import procession as mp
if __name__ == "__main__":
    with mp.get_context({start_method!r}).Process(target=abs, args=(-3,)) as p:
        print(p.result(60))
"""
    script = tmp_path / "script.py"
    script.write_text(code)
    result = subprocess.run(
        [sys.executable, "-I", str(script)], capture_output=True, text=True, timeout=120, check=False
    )
    assert (result.returncode, result.stdout) == (0, "3\n"), result.stderr
