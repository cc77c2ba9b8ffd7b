"""What once went wrong in the pool, each seen to fail before it was mended."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from unittest import mock

import pytest

import procession

_PARENT = os.getpid()


def square(number: int) -> int:
    return number * number


def return_first_last(number: int) -> int:
    if number == 0:
        time.sleep(0.2)
    return number


class ComesOnlyHereWith:
    """Its copy raises `error` in the parent."""

    def __init__(self, error: type[BaseException]) -> None:
        self.error = error

    def __reduce__(self) -> object:
        return _raise_in_parent, (self.error,)


def _raise_in_parent(error: type[BaseException]) -> object:
    if os.getpid() == _PARENT:
        raise error
    return None


class BecomesANumberError(Exception):
    def __reduce__(self) -> object:
        return _number_in_parent, ()


def _number_in_parent() -> object:
    return 7 if os.getpid() == _PARENT else BecomesANumberError()


def raise_what_becomes_a_number(_: object) -> None:
    raise BecomesANumberError


class StrInterruptsError(Exception):
    def __str__(self) -> str:
        raise KeyboardInterrupt


def raise_what_has_no_text(_: object) -> None:
    raise StrInterruptsError


@pytest.mark.timeout(60)
def test_of_two_pools_the_first_one_ends_while_the_second_and_another_process_live() -> None:
    with procession.get_context("fork").Pool(1) as first, procession.get_context("fork").Pool(1) as second:
        assert first.apply(square, (3,)) == 9
        assert second.apply(square, (3,)) == 9
        assert len(first._pool) == len(second._pool) == 1
        other = procession.get_context("fork").Process(target=time.sleep, args=(1000,))
        other.start()
        first.terminate()
        assert second.apply(square, (4,)) == 16
        second.terminate()
        other.kill()
        other.join()


@pytest.mark.parametrize("error", [ValueError, SystemExit, KeyboardInterrupt, GeneratorExit])
def test_a_callback_that_raises_anything_costs_neither_its_result_nor_the_pool(
    error: type[BaseException], capsys: pytest.CaptureFixture[str]
) -> None:
    def callback(_: object) -> None:
        raise error

    with procession.get_context("fork").Pool(1) as pool:
        assert pool.apply_async(square, (3,), callback=callback).get(30) == 9
        assert pool.apply(square, (4,)) == 16
    assert "the callback" in capsys.readouterr().err


def test_a_callback_that_raises_where_there_is_no_stderr_does_not_cost_its_result(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def callback(_: object) -> None:
        raise ValueError

    with procession.get_context("fork").Pool(1) as pool, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", None)
        assert pool.apply_async(square, (3,), callback=callback).get(30) == 9


@pytest.mark.parametrize("error", [ValueError, SystemExit, KeyboardInterrupt, GeneratorExit])
def test_a_result_whose_unpickling_raises_anything_costs_itself_alone(error: type[BaseException]) -> None:
    with procession.get_context("fork").Pool(1) as pool:
        with pytest.raises(procession.RemoteError, match="could not be unpickled here"):
            pool.apply_async(ComesOnlyHereWith, (error,)).get(30)
        with pytest.raises(procession.RemoteError, match="could not be unpickled here"):
            pool.map_async(ComesOnlyHereWith, [error] * 3, chunksize=3).get(30)
        assert pool.apply(square, (4,)) == 16


@pytest.mark.parametrize("chunksize", [1, 2])
def test_an_exception_that_arrives_as_something_else_is_told_in_words(chunksize: int) -> None:
    with procession.get_context("fork").Pool(1) as pool:
        with pytest.raises(procession.RemoteError, match="BecomesANumberError"):
            pool.map_async(raise_what_becomes_a_number, [1, 2], chunksize=chunksize).get(30)
        assert pool.apply(square, (4,)) == 16


@pytest.mark.parametrize("chunksize", [1, 2])
def test_an_exception_without_a_text_does_not_cost_the_worker(chunksize: int) -> None:
    with procession.get_context("fork").Pool(1) as pool:
        before = pool._pool[0].pid
        with pytest.raises(StrInterruptsError):
            pool.map_async(raise_what_has_no_text, [1, 2], chunksize=chunksize).get(30)
        assert pool._pool[0].pid == before


def test_an_item_that_only_says_it_is_an_int_is_its_own_error() -> None:
    with procession.get_context("fork").Pool(1) as pool:
        results = pool.map_async(square, [mock.Mock(spec=int), 2], chunksize=1, on_error="return").get(30)
        assert isinstance(results[0], Exception)
        assert results[1] == 4
        assert pool.apply(square, (4,)) == 16


def test_several_threads_that_consume_one_ordered_stream_all_come_to_its_end() -> None:
    with procession.get_context("fork").Pool(2) as pool:
        stream = pool.imap(return_first_last, range(4), chunksize=1)
        taken: list[int] = []
        threads = [threading.Thread(target=lambda: taken.extend(stream), daemon=True) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(taken) == [0, 1, 2, 3]


def test_a_callback_that_waits_for_a_result_is_told_that_it_cannot(capsys: pytest.CaptureFixture[str]) -> None:
    with procession.get_context("fork").Pool(1) as pool:
        for wait in (lambda _: pool.apply(square, (2,)), lambda _: pool.map(square, [2])):
            assert pool.apply_async(square, (3,), callback=wait).get(30) == 9
        assert pool.apply(square, (4,)) == 16
    assert capsys.readouterr().err.count("RuntimeError: a callback cannot wait") == 2


class InterruptsItsPickling:
    def __reduce__(self) -> object:
        raise KeyboardInterrupt


def take_long_and_spoil_the_second(number: int) -> object:
    time.sleep(0.02)
    return InterruptsItsPickling() if number == 1 else number


def test_a_part_of_a_chunk_that_comes_with_the_chunks_end_keeps_its_results() -> None:
    with procession.get_context("fork").Pool(1) as pool:
        assert pool.apply(square, (3,)) == 9
        engine = pool._engine
        entered, leave = threading.Event(), threading.Event()
        pool.apply_async(square, (3,), callback=lambda _: (entered.set(), leave.wait()))
        assert entered.wait(30)
        result = pool.map_async(take_long_and_spoil_the_second, [0, 1], chunksize=2, on_error="return")
        while engine._done.qsize() < 2:
            time.sleep(0.001)
        leave.set()
        first, second = result.get(30)
    assert first == 0
    assert isinstance(second, KeyboardInterrupt)


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("count", [1, 7, 5000])
def test_what_a_generator_gave_before_it_stopped_to_wait_is_done(count: int, ordered: bool) -> None:
    """Items that come fast go together in large units, but none is held back for one that does not come."""
    go_on = threading.Event()

    def numbers() -> Iterator[int]:
        for turn in range(3):
            yield from range(turn * count, (turn + 1) * count)
            assert go_on.wait(60)
            go_on.clear()

    with procession.get_context("fork").Pool(2) as pool:
        results = (pool.imap if ordered else pool.imap_unordered)(abs, numbers())
        for turn in range(3):
            assert sorted(results.next(60) for _ in range(count)) == list(range(turn * count, (turn + 1) * count))
            go_on.set()
        assert list(results) == []


@pytest.mark.parametrize("buffersize", [1, 10, 256, 257, 300, 511])
def test_a_buffer_that_is_no_multiple_of_the_chunk_holds_nothing_back(buffersize: int) -> None:
    """When there is no room for a whole chunk, a smaller one goes: the consumer makes room only by what it gets."""
    with procession.get_context("fork").Pool(2) as pool:
        results = pool.imap(abs, iter(range(3000)), chunksize=256, buffersize=buffersize)
        for number in range(3000):
            assert results.next(60) == number


def test_a_whole_chunk_does_not_wait_for_the_item_after_it() -> None:
    go_on = threading.Event()

    def numbers() -> Iterator[int]:
        yield from range(10)
        assert go_on.wait(60)

    with procession.get_context("fork").Pool(2) as pool:
        results = pool.imap(abs, numbers(), chunksize=5)
        assert [results.next(60) for _ in range(10)] == list(range(10))
        go_on.set()
        assert list(results) == []


class LooksAtThePool:
    """An argument whose text asks the pool, in the parent, what it is doing."""

    pool = None

    def __repr__(self) -> str:
        return "looked" if self.pool is not None and self.pool.insights() else "here"


def sleep_long(_: object) -> None:
    time.sleep(60)


def test_the_text_of_a_late_task_may_ask_the_pool() -> None:
    with (
        procession.get_context("fork").Pool(1, timeout=0.2) as pool,
        mock.patch.object(LooksAtThePool, "pool", pool),
        pytest.raises(procession.TaskTimeoutError, match=r"sleep_long\(looked\)"),
    ):
        pool.apply_async(sleep_long, (LooksAtThePool(),)).get(60)
