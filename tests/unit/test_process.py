"""Process: what the standard library's does, and results, exceptions and the context manager."""

from __future__ import annotations

import asyncio
import io
import multiprocessing
import os
import signal
import sys
import threading
import time

import pytest

import procession

WAIT_S = 60.0


class TwoArgumentError(Exception):
    """Pickles, and cannot be unpickled: the classic that hangs a pool."""

    def __init__(self, message, code):
        super().__init__(message)
        self.code = code


class UnprintableError(Exception):
    def __str__(self):
        raise RuntimeError("no text")


class CustomError(Exception):
    pass


class NoPickle:
    def __reduce__(self):
        raise TypeError("not this one")


class BreaksOnLoad:
    def __reduce__(self):
        return _refuse, ()


def _refuse():
    raise ValueError("refused in the parent")


def double(x, plus=0):
    return 2 * x + plus


def fail(error):
    raise error


def fail_with_two_arguments():
    raise TwoArgumentError("disk full", 28)


def fail_with_cause():
    try:
        {}["key"]
    except KeyError as error:
        raise CustomError("outer") from error


def fail_with_unprintable():
    raise UnprintableError


def return_unpicklable():
    return NoPickle()


def return_unloadable():
    return BreaksOnLoad()


def return_closure():
    captured = 5
    return lambda x: x + captured


def big_result(size):
    return b"x" * size


def sleep_for_ever():
    while True:
        time.sleep(3600)


def ignore_sigterm(event):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    event.set()
    sleep_for_ever()


def kill_self(number):
    os.kill(os.getpid(), number)
    sleep_for_ever()


def leave(code):
    sys.exit(code)


def leave_at_once(code):
    os._exit(code)


def ask_own_result():
    return procession.current_process().result(timeout=5)


def return_after(event):
    event.wait(WAIT_S)
    return "late"


def test_result_is_the_targets_return_value(ctx) -> None:
    p = ctx.Process(target=double, args=(4,), kwargs={"plus": 1})
    p.start()
    assert p.result(timeout=WAIT_S) == 9
    assert p.result() == 9, "and again"
    assert p.exception() is None
    p.join()
    assert p.result() == 9, "also when it has ended"
    assert p.exitcode == 0


def test_result_of_no_target_and_of_a_target_that_returns_nothing_is_none(ctx) -> None:
    for target in (None, _nothing):
        with ctx.Process(target=target) as p:
            assert p.result(timeout=WAIT_S) is None


def _nothing():
    pass


def test_exception_is_raised_with_the_childs_traceback_as_its_cause(ctx, start_method, capfd) -> None:
    p = ctx.Process(target=fail_with_cause)
    p.start()
    with pytest.raises(CustomError, match="outer") as caught:
        p.result(timeout=WAIT_S)
    cause = caught.value.__cause__
    assert isinstance(cause, procession.RemoteTraceback)
    assert "in fail_with_cause" in str(cause)
    assert "KeyError: 'key'" in str(cause), "the whole chain"
    assert p.exception() is caught.value
    p.join()
    assert p.exitcode == 1
    if start_method != "forkserver":  # that one was started with another stderr
        printed = capfd.readouterr().err
        assert f"Process {p.name}:" in printed, "and the child prints it as it always did"
        assert "CustomError: outer" in printed


@pytest.mark.parametrize("target", [fail_with_two_arguments, fail_with_unprintable])
def test_exception_that_cannot_travel_comes_back_as_remote_error(ctx, target, capfd) -> None:
    """A task is always answered. The standard library's Pool hangs on the first of these."""
    p = ctx.Process(target=target)
    p.start()
    error = p.exception(timeout=WAIT_S)
    if target is fail_with_two_arguments:
        assert isinstance(error, procession.RemoteError)
        assert error.type_name.endswith("TwoArgumentError")
        assert error.message == "disk full"
        assert "in fail_with_two_arguments" in error.traceback
    else:
        assert type(error).__name__ == "UnprintableError"
    p.join()


@pytest.mark.parametrize(
    ("target", "text"),
    [(return_unpicklable, "not this one"), (return_unloadable, "refused in the parent")],
)
def test_value_that_cannot_travel_is_silent_until_it_is_asked_for(ctx, target, text, capfd) -> None:
    p = ctx.Process(target=target)
    p.start()
    p.join()
    assert p.exitcode == 0
    assert capfd.readouterr().err == ""
    with pytest.raises(procession.RemoteError, match=text):
        p.result(timeout=WAIT_S)


def test_closure_comes_back_by_value(ctx) -> None:
    with ctx.Process(target=return_closure) as p:
        assert p.result(timeout=WAIT_S)(1) == 6


def test_closure_goes_out_by_value(ctx) -> None:
    captured = 40
    with ctx.Process(target=lambda x: x + captured, args=(2,)) as p:
        assert p.result(timeout=WAIT_S) == 42


def test_large_result_does_not_keep_join_waiting(ctx) -> None:
    """With a pipe or a feeder thread the child could not end before somebody reads."""
    p = ctx.Process(target=big_result, args=(5_000_000,))
    p.start()
    p.join()
    assert len(p.result()) == 5_000_000


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV])
def test_killed_child_raises_process_died_error_naming_the_signal(ctx, number, capfd) -> None:
    p = ctx.Process(target=kill_self, args=(number,))
    p.start()
    with pytest.raises(procession.ProcessDiedError, match=number.name) as caught:
        p.result(timeout=WAIT_S)
    assert caught.value.signal is number
    assert caught.value.pid == p.pid
    assert isinstance(caught.value, multiprocessing.ProcessError)
    with pytest.raises(procession.ProcessDiedError):
        p.exception()
    p.join()
    assert p.exitcode == -number


@pytest.mark.parametrize(("target", "code"), [(leave, 3), (leave_at_once, 3), (leave_at_once, 0), (leave, "text")])
def test_exit_before_returning_raises_process_died_error_naming_the_code(ctx, target, code, capfd) -> None:
    p = ctx.Process(target=target, args=(code,))
    p.start()
    expected = 1 if code == "text" else code
    with pytest.raises(procession.ProcessDiedError, match=f"exit code {expected}"):
        p.result(timeout=WAIT_S)
    p.join()
    assert p.exitcode == expected


@pytest.mark.parametrize("code", [0, None])
def test_result_after_a_clean_exit_is_none(ctx, code) -> None:
    with ctx.Process(target=leave, args=(code,)) as p:
        assert p.result(timeout=WAIT_S) is None


def test_timeout_is_honoured_and_the_result_can_still_be_had(ctx) -> None:
    event = ctx.Event()
    with ctx.Process(target=return_after, args=(event,)) as p:
        with pytest.raises(multiprocessing.TimeoutError, match="still running"):
            p.result(timeout=0.05)
        with pytest.raises(multiprocessing.TimeoutError):
            p.exception(timeout=-1)
        event.set()
        assert p.result(timeout=WAIT_S) == "late"


def test_several_threads_may_wait_for_one_result() -> None:
    ctx = procession.get_context("fork")
    event = ctx.Event()
    found: list[object] = []
    with ctx.Process(target=return_after, args=(event,)) as p:
        threads = [threading.Thread(target=lambda: found.append(p.result(timeout=WAIT_S))) for _ in range(4)]
        for thread in threads:
            thread.start()
        event.set()
        for thread in threads:
            thread.join()
    assert found == ["late"] * 4


def test_result_before_start_after_close_and_in_the_child_are_clear_errors(ctx, capfd) -> None:
    p = ctx.Process(target=ask_own_result)
    with pytest.raises(ValueError, match="has not been started"):
        p.result()
    p.start()
    with pytest.raises(ValueError, match="only process"):
        p.result(timeout=WAIT_S)
    p.join()
    p.close()
    with pytest.raises(ValueError, match="closed"):
        p.result()


class RunReturns(procession.Process):
    def run(self):
        return ("own run", self.name)


class ForkRunReturns(procession.get_context("fork").Process):
    def run(self):
        super().run()
        return "fork"


def test_subclass_that_overrides_run_has_its_return_value_as_result() -> None:
    with RunReturns(name="mine") as p:
        assert p.result(timeout=WAIT_S) == ("own run", "mine")
    with ForkRunReturns(target=double, args=(1,)) as p:
        assert p.result(timeout=WAIT_S) == "fork"


def test_with_starts_what_is_not_started_and_joins(ctx) -> None:
    with ctx.Process(target=double, args=(1,)) as p:
        assert p.pid is not None
    assert p.exitcode == 0
    q = ctx.Process(target=double, args=(2,))
    q.start()
    with q:
        pass
    assert q.exitcode == 0
    assert q.result() == 4


def test_with_terminates_when_the_body_raises(ctx) -> None:
    with pytest.raises(ZeroDivisionError), ctx.Process(target=sleep_for_ever) as p:
        raise ZeroDivisionError
    assert p.exitcode == -signal.SIGTERM


def test_with_kills_what_ignores_sigterm(monkeypatch) -> None:
    monkeypatch.setattr("procession._proc.process._TERMINATE_GRACE_S", 0.2)
    ctx = procession.get_context("fork")
    event = ctx.Event()
    with pytest.raises(ZeroDivisionError), ctx.Process(target=ignore_sigterm, args=(event,)) as p:
        assert event.wait(WAIT_S)
        raise ZeroDivisionError
    assert p.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_what_cannot_be_pickled_is_named(method) -> None:
    ctx = procession.get_context(method)
    with pytest.raises(TypeError, match="pickle") as caught:
        ctx.Process(target=double, args=(1, {"log": [io.StringIO(), threading.Lock()]}), name="worker").start()
    if sys.version_info >= (3, 11):
        (note,) = caught.value.__notes__
        assert "args[1]['log'][1] (lock)" in note
        assert "'worker'" in note
        assert method in note
    assert not multiprocessing.active_children()


def test_a_process_is_one_of_the_standard_librarys(ctx) -> None:
    p = ctx.Process(target=sleep_for_ever, daemon=True)
    assert isinstance(p, multiprocessing.process.BaseProcess)
    p.start()
    assert p in multiprocessing.active_children()
    p.kill()
    p.join()
    assert isinstance(procession.Process(), multiprocessing.Process)


MODULE_LOCK = procession.Lock()


def use_module_lock(lock):
    with MODULE_LOCK, lock:
        return "both"


def test_module_level_lock_of_the_child_works(ctx) -> None:
    """The arena is attached before the child imports anything of the user's."""
    with ctx.Process(target=use_module_lock, args=(ctx.Lock(),)) as p:
        assert p.result(timeout=WAIT_S) == "both"


# -- await


def divide(a, b):
    return a / b


def wait_and_say(event, number):
    event.wait()
    return number


def test_await_gives_the_result(ctx) -> None:
    async def main() -> object:
        event = ctx.Event()
        processes = [ctx.Process(target=wait_and_say, args=(event, n)) for n in range(3)]
        for process in processes:
            process.start()
        waiting = asyncio.gather(*processes)
        await asyncio.sleep(0.01)  # the loop is free meanwhile
        assert not waiting.done()
        event.set()
        results = await waiting
        assert await processes[0] == 0  # again
        for process in processes:
            process.join()
            process.close()
        return results

    threads = threading.active_count()
    assert asyncio.run(main()) == [0, 1, 2]
    assert threading.active_count() == threads


def test_await_raises_what_the_target_raised(ctx, capfd) -> None:
    async def main() -> None:
        with ctx.Process(target=divide, args=(1, 0)) as process, pytest.raises(ZeroDivisionError):
            await process
        with pytest.raises(ValueError, match="start"):
            await ctx.Process()

    asyncio.run(main())


def test_cancelling_the_await_terminates_the_process(ctx) -> None:
    async def main() -> None:
        with ctx.Process(target=time.sleep, args=(1000,)) as process:
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(process, 0.05)
            process.join()
            assert process.exitcode == -signal.SIGTERM

    asyncio.run(main())
