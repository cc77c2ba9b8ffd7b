"""How many threads BLAS, OpenMP and the like use in a worker."""

from __future__ import annotations

import os
import subprocess
import sys
import types

import pytest

import procession
from procession._proc import threads
from procession._proc.threads import VARIABLES, find_loaded, limit_threads, threads_for, within_share


@pytest.fixture(autouse=True)
def _none_set(monkeypatch):
    for name in (*VARIABLES, "PROCESSION_CPU_SHARE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(threads, "_cpus", lambda: 8)


def settings(_=None):
    return {name: os.environ.get(name) for name in VARIABLES}


def blas_threads(_=None):
    """What NumPy's own BLAS uses, as threadpoolctl sees it."""
    import numpy as np
    from threadpoolctl import threadpool_info

    np.ones((2, 2)) @ np.ones((2, 2))
    return max(info["num_threads"] for info in threadpool_info())


def settings_of_a_pool_within(method):
    with procession.get_context(method).Pool(2) as pool:
        return pool.apply(settings), within_share(1000), len(procession.get_context(method).Pool()._pool)


def all_equal(n):
    return dict.fromkeys(VARIABLES, str(n))


@pytest.mark.parametrize(("workers", "share"), [(1, 8), (2, 4), (3, 2), (8, 1), (100, 1)])
def test_the_share_of_each(workers, share):
    assert threads_for(workers) == share


def test_each_worker_has_its_share(ctx):
    with ctx.Pool(2) as pool:
        assert pool.map(settings, range(4)) == [all_equal(4)] * 4
    with ctx.Pool(2, threads_per_worker=3) as pool:
        assert pool.apply(settings) == all_equal(3)
    assert settings() == dict.fromkeys(VARIABLES)  # here nothing has changed


def test_the_executor_too(ctx):
    with procession.ProcessPoolExecutor(4, mp_context=ctx) as executor:
        assert executor.submit(settings).result() == all_equal(2)
    with procession.ProcessPoolExecutor(4, mp_context=ctx, threads_per_worker=1) as executor:
        assert executor.submit(settings).result() == all_equal(1)


@pytest.mark.parametrize("method", ["fork", "spawn"])  # a fork server has the environment of when it was started
def test_what_the_user_has_set_stays_unless_he_says_otherwise(method, monkeypatch):
    ctx = procession.get_context(method)
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    with ctx.Pool(2) as pool:
        assert pool.apply(settings) == {**all_equal(4), "OMP_NUM_THREADS": "5"}
    with ctx.Pool(2, threads_per_worker=3) as pool:
        assert pool.apply(settings) == all_equal(3)


@pytest.mark.parametrize("text", ["4,2", " 3 ", "0", "many", ""])
def test_whatever_the_user_has_set_the_pool_works(text, monkeypatch):
    """OpenMP knows one number for each level of nesting, and ignores what it does not understand."""
    pytest.importorskip("numpy")  # so that there is something to be told
    monkeypatch.setenv("OMP_NUM_THREADS", text)
    with procession.get_context("fork").Pool(2) as pool:
        assert pool.apply(settings)["OMP_NUM_THREADS"] == text


def test_a_library_that_is_just_being_imported_is_let_alone(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", types.ModuleType("torch"))
    with procession.get_context("fork").Pool(1) as pool:
        assert pool.apply(int) == 0


@pytest.mark.parametrize("wrong", [0, -1, 1.5, "2"])
def test_what_cannot_be_is_refused(wrong):
    with pytest.raises(ValueError, match="threads_per_worker"):
        procession.Pool(1, threads_per_worker=wrong)


@pytest.mark.leaks(
    "a worker's own fork server leaves its socket, as in the stdlib; its directory goes with this process"
)
def test_a_pool_within_a_worker_shares_the_share(start_method):
    with procession.get_context(start_method).Pool(2) as pool:
        inner, share, workers = pool.apply(settings_of_a_pool_within, (start_method,))
    cpus = 8 if start_method == "fork" else procession.cpu_count()
    assert share == 4
    assert inner == all_equal(max(1, min(share, cpus) // 2))
    assert workers == min(share, procession.cpu_count())


def test_it_is_set_before_anything_is_imported(start_method, tmp_path):
    """Also before the main module is, which a spawned worker imports."""
    program = tmp_path / "program.py"
    program.write_text(
        f"""
import os
SEEN = os.environ.get("OMP_NUM_THREADS")
import procession
def seen(_):
    return SEEN
if __name__ == "__main__":
    with procession.get_context({start_method!r}).Pool(2, threads_per_worker=7) as pool:
        print(pool.map(seen, [1]))
"""
    )
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("[None]\n" if start_method == "fork" else "['7']\n", "")


def test_a_library_that_is_loaded_already_is_told(ctx):
    """By threadpoolctl; a forked worker has its parent's NumPy."""
    pytest.importorskip("threadpoolctl")
    before = blas_threads()
    with ctx.Pool(2, threads_per_worker=1) as pool:
        assert pool.apply(blas_threads) == 1
    assert blas_threads() == before


def test_without_threadpoolctl(monkeypatch):
    monkeypatch.setitem(sys.modules, "threadpoolctl", None)
    monkeypatch.setattr(threads, "_controller", None)
    monkeypatch.setattr(threads, "_found", [])
    find_loaded()
    for name in VARIABLES:
        monkeypatch.setenv(name, "9")
    limit_threads(2, 3)
    assert settings() == all_equal(3)
