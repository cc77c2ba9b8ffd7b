"""The joblib backend ``"procession"``, with the real joblib."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import warnings

import pytest

import procession

joblib = pytest.importorskip("joblib", minversion="1.3")
from joblib import Parallel, delayed, parallel_config  # noqa: E402

from procession._pool.errors import WorkerDiedError  # noqa: E402


@pytest.fixture(autouse=True)
def _registered():
    procession.register_joblib_backend()
    yield
    joblib.parallel.BACKENDS.pop("procession", None)


def square(x):
    return x * x


def fail_at(x, bad):
    if x == bad:
        raise ValueError(f"bad {x}")
    return x


def die_at(x, bad):
    if x == bad:
        os.kill(os.getpid(), signal.SIGKILL)
    return x


def die_once(path, x):
    if x == 3 and not os.path.exists(path):
        with open(path, "w"):
            os.kill(os.getpid(), signal.SIGKILL)
    return x


def pid_of(_):
    return os.getpid()


def nested(x):
    backend = type(joblib.parallel.get_active_backend()[0]).__name__
    return backend, Parallel(n_jobs=2)(delayed(square)(i) for i in range(x))


def nested_explicitly(x):
    procession.register_joblib_backend()
    return Parallel(n_jobs=2, backend="procession")(delayed(square)(i) for i in range(x))


def nested_below_threads():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with parallel_config("procession"):
            result = Parallel(n_jobs=2)(delayed(square)(i) for i in range(3))
    return result, [str(one.message) for one in caught]


def wait_for(event):
    event.wait()


def test_results_come_in_order_from_other_processes(ctx):
    with parallel_config("procession", n_jobs=2, mp_context=ctx):
        assert [x * x for x in range(200)] == Parallel()(delayed(square)(x) for x in range(200))
        assert os.getpid() not in Parallel()(delayed(pid_of)(x) for x in range(4))
        assert [0, 1, 2] == Parallel()(delayed(lambda x: x)(x) for x in range(3))


def test_small_tasks_go_in_ever_larger_batches():
    with Parallel(n_jobs=2, backend="procession") as parallel:
        assert [x * x for x in range(3000)] == parallel(delayed(square)(x) for x in range(3000))
        assert parallel._backend.compute_batch_size() > 1


def test_it_is_named_in_the_call_too():
    assert [0, 1, 4] == Parallel(n_jobs=2, backend="procession")(delayed(square)(x) for x in range(3))
    assert [0, 1, 4] == Parallel(n_jobs=1, backend="procession")(delayed(square)(x) for x in range(3))


def test_joblib_takes_our_contexts(start_method):
    """In a program of its own, for joblib's own pool keeps a folder and a tracker until its end."""
    code = (
        "import procession; from joblib import Parallel, delayed; from operator import neg\n"
        "if __name__ == '__main__':\n"
        f"    ctx = procession.get_context({start_method!r})\n"
        "    print(Parallel(n_jobs=2, backend=ctx)(delayed(neg)(i) for i in range(3)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False)
    assert (done.returncode, done.stdout) == (0, "[0, -1, -2]\n"), done.stderr


def test_it_can_be_the_default():
    before = joblib.parallel.DEFAULT_BACKEND
    try:
        procession.register_joblib_backend(make_default=True)
        backend, _ = joblib.parallel.get_active_backend()
        assert "ProcessionBackend" == type(backend).__name__
    finally:
        joblib.parallel.DEFAULT_BACKEND = before


def test_the_number_of_jobs_counts_from_the_cpus_that_can_be_used():
    with parallel_config("procession"):
        assert procession.cpu_count() == joblib.effective_n_jobs(-1)
        assert 3 == joblib.effective_n_jobs(3)
        assert 1 == joblib.effective_n_jobs(None)
        with pytest.raises(ValueError, match="n_jobs"):
            joblib.effective_n_jobs(0)


def test_an_error_is_raised_and_the_next_call_works(ctx):
    with parallel_config("procession", n_jobs=2, mp_context=ctx):
        with Parallel(pre_dispatch="all") as parallel:
            with pytest.raises(ValueError, match="bad 5"):
                parallel(delayed(fail_at)(x, 5) for x in range(20))
            assert [0, 1, 4] == parallel(delayed(square)(x) for x in range(3))
        assert [0, 1, 4] == Parallel()(delayed(square)(x) for x in range(3))


def test_a_killed_worker_is_an_error_and_no_hang(ctx):
    with parallel_config("procession", n_jobs=2, mp_context=ctx):
        with pytest.raises(WorkerDiedError, match="SIGKILL"):
            Parallel()(delayed(die_at)(x, 5) for x in range(20))
        assert [0, 1, 4] == Parallel()(delayed(square)(x) for x in range(3))


def test_a_killed_worker_is_none_with_retries(tmp_path):
    with parallel_config("procession", n_jobs=2, retries=1):
        assert list(range(10)) == Parallel()(delayed(die_once)(str(tmp_path / "died"), x) for x in range(10))


def test_forked_workers_are_fresh_in_each_call_and_others_are_kept(start_method):
    context = procession.get_context(start_method)
    with parallel_config("procession", n_jobs=2, mp_context=context):
        first, second = (set(Parallel()(delayed(pid_of)(x) for x in range(20))) for _ in range(2))
    # Either of the two may have been too late for any batch.
    assert len(first | second) <= (4 if start_method == "fork" else 2)
    assert start_method != "fork" or not first & second


def test_a_call_with_another_number_of_jobs_has_other_workers():
    with parallel_config("procession", mp_context=procession.get_context("forkserver")):
        first = Parallel(n_jobs=2)(delayed(pid_of)(x) for x in range(4))
        second = Parallel(n_jobs=3)(delayed(pid_of)(x) for x in range(4))
    assert set() == set(first) & set(second)


def test_what_is_nested_falls_back_to_threads():
    with parallel_config("procession", n_jobs=2):
        assert [("ThreadingBackend", [0, 1, 4])] * 2 == Parallel()(delayed(nested)(3) for _ in range(2))


def test_what_is_nested_may_have_workers_of_its_own():
    with parallel_config("procession", n_jobs=2):
        assert [[0, 1, 4]] * 2 == Parallel()(delayed(nested_explicitly)(3) for _ in range(2))


def test_below_threads_it_runs_without_workers_and_says_so():
    (found,) = Parallel(n_jobs=2, backend="threading")(delayed(nested_below_threads)() for _ in range(1))
    result, messages = found
    assert [0, 1, 4] == result
    assert any("setting n_jobs=1" in message for message in messages)


@pytest.mark.parametrize("order", ["generator", "generator_unordered"])
def test_results_can_be_had_one_by_one(order):
    with parallel_config("procession", n_jobs=2):
        results = Parallel(return_as=order)(delayed(square)(x) for x in range(20))
        assert [x * x for x in range(20)] == sorted(results)


def test_a_call_that_takes_too_long_ends_with_its_workers():
    event = procession.Event()
    with parallel_config("procession", n_jobs=2), pytest.raises(joblib.parallel.TimeoutError):
        Parallel(timeout=0.1)(delayed(wait_for)(event) for _ in range(2))


def test_threads_within_workers_are_limited():
    with parallel_config("procession", n_jobs=2, inner_max_num_threads=3):
        assert Parallel()(delayed(os.getenv)("OMP_NUM_THREADS") for _ in range(2)) == ["3", "3"]


def test_without_joblib_it_says_what_is_missing():
    program = (
        "import sys\n"
        "sys.modules['joblib'] = None\n"
        "import procession\n"
        "try:\n"
        "    procession.register_joblib_backend()\n"
        "except ImportError as error:\n"
        "    print(error.name)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "joblib\n" == ended.stdout


def test_scikit_learn_runs_on_it():
    pytest.importorskip("sklearn")
    from sklearn.datasets import load_iris
    from sklearn.model_selection import cross_val_score
    from sklearn.tree import DecisionTreeClassifier

    x, y = load_iris(return_X_y=True)
    model = DecisionTreeClassifier(random_state=0)
    with parallel_config("procession", n_jobs=2):
        scores = cross_val_score(model, x, y, cv=4)
    assert cross_val_score(model, x, y, cv=4, n_jobs=1).tolist() == scores.tolist()
