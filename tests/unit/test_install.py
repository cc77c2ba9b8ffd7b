"""install(): `import multiprocessing` gives procession, in this process and in its children."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest


def run(tmp_path, code: str, *arguments: str) -> str:
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(code))
    result = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", str(script), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, ""), result.stderr
    return result.stdout


def test_every_way_to_name_a_thing_gives_ours(tmp_path) -> None:
    run(
        tmp_path,
        """
        import procession
        procession.install()
        procession.install()
        import multiprocessing, multiprocessing.pool, multiprocessing.queues, multiprocessing.synchronize
        from multiprocessing import Process, Queue, get_context
        from multiprocessing.context import ForkContext
        from multiprocessing.pool import Pool
        assert Process is multiprocessing.context.Process is procession.Process
        assert multiprocessing.Lock().__class__ is procession.synchronize.Lock
        assert type(Queue()) is procession.queues.Queue
        assert isinstance(Queue(), multiprocessing.queues.Queue)
        assert not isinstance(1, multiprocessing.queues.Queue)
        assert type(multiprocessing.queues.Queue()) is procession.queues.Queue
        assert get_context("spawn") is procession.get_context("spawn")
        assert multiprocessing.context._default_context.get_context("fork") is procession.get_context("fork")
        assert isinstance(get_context("fork"), ForkContext)
        assert multiprocessing.cpu_count() == procession.cpu_count()
        assert multiprocessing.synchronize.Event is procession.synchronize.Event
        with multiprocessing.Pool(1) as pool:
            assert type(pool) is Pool is procession.pool.Pool
        pool.join()
        """,
    )


def test_names_imported_before_are_the_same_contexts_objects(tmp_path) -> None:
    """A function of multiprocessing that was imported early still makes ours; a class cannot."""
    run(
        tmp_path,
        """
        from multiprocessing import Lock, get_context, Process
        import procession
        procession.install()
        assert type(Lock()) is procession.synchronize.Lock
        assert type(get_context("fork")) is procession.context.ForkContext
        p = Process(target=int)
        p.start(); p.join()
        assert p.exitcode == 0
        """,
    )


def test_subclass_of_the_queue_keeps_its_feeder_thread(tmp_path) -> None:
    """loky and torch derive from it and reach into its pipe."""
    run(
        tmp_path,
        """
        import multiprocessing.queues as original
        Std = original.Queue
        import procession
        procession.install()
        from multiprocessing.queues import Queue
        import multiprocessing
        class Sub(Queue):
            def __init__(self, *a, **k):
                super().__init__(*a, **k)
                self.extra = 1
        assert Sub.__mro__[1] is Std
        q = Sub(ctx=multiprocessing.get_context())
        q.put(1)
        assert q.get(timeout=60) == 1 and q.extra == 1 and isinstance(q, Queue)
        q.close(); q.join_thread()
        """,
    )


@pytest.mark.parametrize("early", [False, True])
def test_executor_uses_our_contexts(tmp_path, start_method, early) -> None:
    out = run(
        tmp_path,
        f"""
        {"import concurrent.futures.process" if early else ""}
        import procession
        procession.install()
        import multiprocessing, sys
        from concurrent.futures import ProcessPoolExecutor
        def f(x):
            return type(multiprocessing.current_process()).__module__, x * x
        if __name__ == "__main__":
            multiprocessing.set_start_method({start_method!r})
            with ProcessPoolExecutor(1) as executor:
                print(executor.submit(f, 3).result(60))
        """,
    )
    assert out == "('procession._proc.process', 9)\n"


def test_children_and_grandchildren_have_it_too(tmp_path, start_method) -> None:
    out = run(
        tmp_path,
        f"""
        import multiprocessing as mp
        def f(depth, q):
            if depth:
                p = mp.Process(target=f, args=(depth - 1, q))
                p.start()
                p.join()
            q.put((depth, mp.Queue.__func__.__module__, type(mp.Lock()).__module__))
        if __name__ == "__main__":
            import procession
            procession.install()
            mp.set_start_method({start_method!r})
            q = mp.SimpleQueue()
            p = mp.Process(target=f, args=(1, q))
            p.start()
            p.join()
            print(q.get(), q.get())
        """,
    )
    lock_module = __import__("procession").synchronize.Lock.__module__
    assert out == f"(0, 'procession.context', '{lock_module}') (1, 'procession.context', '{lock_module}')\n"


def test_the_function_stays_callable_whoever_imported_the_module_first() -> None:
    code = "import procession.install; procession.install(); from procession import install; install()"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


def test_pools_of_threads_stay_what_they_are(tmp_path) -> None:
    """The standard library's ThreadPool calls `Pool.__init__`, by a name that has become ours."""
    run(
        tmp_path,
        """
        import procession
        procession.install()
        import multiprocessing.dummy
        from multiprocessing.pool import Pool, ThreadPool

        class Mine(ThreadPool):
            def __init__(self):
                super().__init__(2, initializer=abs, initargs=(1,))

        for make in (ThreadPool, lambda: ThreadPool(2), multiprocessing.dummy.Pool, Mine):
            with make() as pool:
                here = []
                assert pool.map(lambda x: here.append(x) or -x, range(4), chunksize=1) == [0, -1, -2, -3]
                assert sorted(here) == [0, 1, 2, 3]
                assert list(pool.imap(abs, [-1])) == [pool.apply(abs, (-1,))] == [1]
                assert isinstance(pool, ThreadPool) and not isinstance(pool, Pool)
        """,
    )


def test_the_cause_of_a_workers_error_is_what_programs_look_for(tmp_path) -> None:
    run(
        tmp_path,
        """
        import procession
        procession.install()
        import multiprocessing
        from multiprocessing.pool import RemoteTraceback
        with multiprocessing.get_context("fork").Pool(1) as pool:
            try:
                pool.apply(divmod, (1, 0))
            except ZeroDivisionError as error:
                assert isinstance(error.__cause__, RemoteTraceback)
                assert "divmod" in error.__cause__.tb or "ZeroDivisionError" in error.__cause__.tb
            else:
                raise AssertionError
        """,
    )
