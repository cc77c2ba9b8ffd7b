"""Queue: what is put is delivered, exactly, in order, and whoever dies."""

from __future__ import annotations

import asyncio
import gc
import os
import pickle
import queue
import signal
import sys
import threading
import time
import weakref
from multiprocessing.connection import wait

import pytest

import procession
from procession import ShutDown
from tests.crash import family

KINDS = ("Queue", "JoinableQueue")


@pytest.fixture
def fork():
    return procession.get_context("fork")


@pytest.fixture(params=KINDS)
def make(request, fork):
    return getattr(fork, request.param)


class Refuses:
    def __reduce__(self):
        raise TypeError("not this one")


class BreaksOnLoad:
    def __reduce__(self):
        return _refuse, ()


def _refuse():
    raise ValueError("refused where it arrives")


class Puts:
    """Puts into a queue while it is being pickled, and while it is being unpickled."""

    def __init__(self, q):
        self.q = q

    def __reduce__(self):
        self.q.put("while pickling")
        return _put_and_return, (self.q,)


def _put_and_return(q):
    q.put("while unpickling")
    return "itself"


def drain(q):
    items = []
    while not q.empty():
        items.append(q.get_nowait())
    return items


# --- put and get -----------------------------------------------------------------------------------------------------------


def test_items_come_out_in_the_order_they_went_in(ctx, make):
    q = ctx.Queue()
    process = ctx.Process(target=family.put_all, args=(q, list(range(500))))
    process.start()
    assert list(range(500)) == [q.get() for _ in range(500)]
    process.join()
    assert q.empty()


@pytest.mark.parametrize("size", [0, 1, 100, 1000, 5_000, 70_000, 200_000, 3_000_000])
def test_items_of_every_size_arrive_whole(make, size):
    """Inline in the small ring, in a grown one, longer than half of one."""
    q = make()
    items = [os.urandom(size) for _ in range(3)] + ["x" * size, [b"y" * size]]
    for item in items:
        q.put(item)
    assert items == [q.get() for _ in items]


def test_a_backlog_grows_ring_by_ring_and_is_given_back(make):
    """64 KiB, then 16 times as much, and so on, each freed when it is drained."""
    q = make()
    before = procession.memory().blocks
    for i in range(30_000):
        q.put((i, "x" * 60))
    assert 30_000 == q.qsize()
    assert [(i, "x" * 60) for i in range(30_000)] == [q.get() for _ in range(30_000)]
    if hasattr(q, "task_done"):
        for _ in range(30_000):
            q.task_done()
    assert procession.memory().blocks <= before + 1


def test_qsize_empty_and_full_are_exact(make):
    """In the standard library they may lie, since a thread and a pipe are in between."""
    q = make(3)
    for n in range(3):
        assert (n, n == 0, False) == (q.qsize(), q.empty(), q.full())
        q.put(n)
    assert (3, False, True) == (q.qsize(), q.empty(), q.full())
    q.get()
    assert (2, False, False) == (q.qsize(), q.empty(), q.full())


def test_what_another_process_has_put_is_there_when_its_put_has_returned(ctx):
    q, done = ctx.Queue(), ctx.Event()
    process = ctx.Process(target=_put_and_tell, args=(q, done))
    process.start()
    done.wait()
    assert (1, False) == (q.qsize(), q.empty())
    assert "here" == q.get_nowait()
    process.join()


def _put_and_tell(q, done):
    q.put("here")
    done.set()


def test_a_killed_producers_items_are_there(fork):
    """put has delivered when it returns: no feeder thread that could die with items in hand."""
    q = fork.Queue()
    with fork.Process(target=_put_and_die, args=(q,)):
        pass
    assert list(range(100)) == drain(q)


def _put_and_die(q):
    for i in range(100):
        q.put(i)
    family.die("SIGKILL")


def test_a_producer_ends_though_nobody_takes_its_items(fork):
    """With the standard library join() waits for a consumer: the classic deadlock of its tutorial."""
    q = fork.Queue()
    with fork.Process(target=family.put_all, args=(q, [b"x" * 1_000_000] * 5)) as process:
        process.join()
    assert (0, 5) == (process.exitcode, q.qsize())


def test_an_item_is_a_snapshot(make):
    """Changing it after put() changes nothing that arrives; the standard library's thread may pickle it later."""
    q, item = make(), [1, bytearray(b"abc"), {"k": []}]
    q.put(item)
    item[1][0] = 0
    item[2]["k"].append(9)
    item.clear()
    assert [1, bytearray(b"abc"), {"k": []}] == q.get()


def test_a_full_queue_refuses_or_waits(make):
    q = make(1)
    q.put(1)
    with pytest.raises(queue.Full):
        q.put_nowait(2)
    with pytest.raises(queue.Full):
        q.put(2, False)
    started = time.monotonic()
    with pytest.raises(queue.Full):
        q.put(2, timeout=0.1)
    assert time.monotonic() - started >= 0.1
    thread = threading.Thread(target=lambda: (time.sleep(0.05), q.get()))
    thread.start()
    q.put(3)
    thread.join()
    assert 3 == q.get()


def test_an_empty_queue_refuses_or_waits(make):
    q = make()
    with pytest.raises(queue.Empty):
        q.get_nowait()
    with pytest.raises(queue.Empty):
        q.get(False)
    started = time.monotonic()
    with pytest.raises(queue.Empty):
        q.get(timeout=0.1)
    assert time.monotonic() - started >= 0.1
    thread = threading.Thread(target=lambda: (time.sleep(0.05), q.put(4)))
    thread.start()
    assert 4 == q.get()
    thread.join()


def test_zero_and_negative_maxsize_mean_no_limit(make):
    for maxsize in (0, -1):
        q = make(maxsize)
        for i in range(100):
            q.put_nowait(i)
        assert not q.full()


def test_several_threads_and_processes_share_one_queue(fork):
    """Every item arrives once, whoever puts and whoever takes."""
    q, results = fork.Queue(8), fork.Queue()
    makers = [fork.Process(target=family.put_all, args=(q, [(p, i) for i in range(200)])) for p in range(2)]
    makers += [threading.Thread(target=family.put_all, args=(q, [(p, i) for i in range(200)])) for p in (2, 3)]
    takers = [fork.Process(target=_move, args=(q, results, 200)) for _ in range(2)]
    takers += [threading.Thread(target=_move, args=(q, results, 200)) for _ in range(2)]
    for each in takers + makers:
        each.start()
    for each in makers + takers:
        each.join()
    got = [results.get_nowait() for _ in range(800)]
    assert sorted((p, i) for p in range(4) for i in range(200)) == sorted(got)
    assert results.empty()


def _move(q, to, n):
    for _ in range(n):
        to.put(q.get())


# --- errors ----------------------------------------------------------------------------------------------------------------


def test_an_item_that_cannot_be_pickled_raises_where_it_is_put_and_puts_nothing(make):
    """In the standard library the error appears on another thread's stderr and the item is gone."""
    q = make()
    # The last two by cloudpickle's leave, which would send what they show as another type.
    for item in (Refuses(), [1, Refuses()], threading.Lock(), memoryview(b"abc"), sys.__stdin__):
        with pytest.raises(TypeError):
            q.put(item)
        assert q.empty()
    q.put("next")
    assert "next" == q.get()


def test_one_bad_item_keeps_a_whole_batch_out(make):
    q = make()
    with pytest.raises(TypeError):
        q.put_many([1, Refuses(), 3])
    assert q.empty()


def test_an_item_that_cannot_be_unpickled_raises_where_it_is_taken_and_costs_only_itself(make):
    q = make()
    q.put_many([1, BreaksOnLoad(), 3])
    assert 1 == q.get()
    with pytest.raises(ValueError, match="refused where it arrives"):
        q.get()
    assert [3] == drain(q)


def test_a_bad_item_does_not_take_its_batch_along(make):
    """They have been taken out of the queue: they must be somewhere."""
    q = make()
    q.put_many([1, 2, BreaksOnLoad(), 4])
    with pytest.raises(ValueError, match="refused") as caught:
        q.get_many(4)
    assert [1, 2, 4] == caught.value.items_taken + drain(q)


def test_a_reducer_may_use_the_same_queue(fork):
    """No lock is held while Python code runs (pitfall 12)."""
    q = fork.Queue()
    q.put(Puts(q))
    assert ["while pickling", "itself", "while unpickling"] == [q.get() for _ in range(3)]


@pytest.mark.parametrize(("timeout", "error"), [("1", TypeError), (float("nan"), ValueError), ([], TypeError)])
def test_a_timeout_that_is_no_number_is_refused_and_nothing_moves(make, timeout, error):
    q = make(1)
    with pytest.raises(error):
        q.get(True, timeout)
    with pytest.raises(error):
        q.put(1, True, timeout)
    assert q.empty()


@pytest.mark.parametrize("timeout", [0, -1, float("-inf")])
def test_a_timeout_of_zero_or_less_does_not_wait(make, timeout):
    q = make(1)
    with pytest.raises(queue.Empty):
        q.get(True, timeout)
    q.put(1, True, timeout)
    with pytest.raises(queue.Full):
        q.put(2, True, timeout)


@pytest.mark.parametrize(
    ("maxsize", "error"), [(1 << 31, ValueError), (1 << 70, OverflowError), ("3", TypeError), (1.5, TypeError)]
)
def test_a_maxsize_that_is_no_count_is_refused(make, maxsize, error):
    with pytest.raises(error):
        make(maxsize)


def test_wrong_arguments_are_refused(make):
    q = make()
    for call in (
        q.put,
        lambda: q.put(1, True, 1, 1),
        lambda: q.put(item=1),
        lambda: q.get(1, 2, 3),
        lambda: q.get(wait=True),
        q.put_nowait,
        q.put_many,
        lambda: q.put_many(3),
        lambda: q.get_many("3"),
    ):
        with pytest.raises(TypeError):
            call()
    for n in (0, -1):
        with pytest.raises(ValueError, match="at least 1"):
            q.get_many(n)
    assert q.empty()


def test_put_takes_its_arguments_by_name_as_in_the_standard_library(make):
    q = make()
    q.put(obj=1, block=True, timeout=None)
    assert 1 == q.get(block=True, timeout=1)


# --- close and shutdown ------------------------------------------------------------------------------------------------------


def test_a_closed_queue_refuses_here_and_nowhere_else(fork):
    q = fork.Queue()
    q.put(1)
    other = pickle.loads(pickle.dumps(q))
    q.close()
    for call in (lambda: q.put(2), q.get, q.get_nowait, lambda: q.put_many([1]), q.get_many):
        with pytest.raises(ValueError, match="closed"):
            call()
    q.join_thread()
    q.cancel_join_thread()
    assert 1 == other.get()


def test_shutdown_lets_consumers_finish_and_producers_not_begin(make):
    q = make()
    q.put_many([1, 2])
    q.shutdown()
    with pytest.raises(ShutDown):
        q.put(3)
    with pytest.raises(ShutDown):
        q.put_many([3])
    assert [1, 2] == [q.get(), q.get()]
    for call in (q.get, q.get_nowait, q.get_many):
        with pytest.raises(ShutDown):
            call()
    q.shutdown()  # twice does no harm


def test_an_immediate_shutdown_drops_what_is_there(make):
    q = make()
    q.put_many([b"x" * 50_000] * 20)
    q.shutdown(immediate=True)
    assert (0, True) == (q.qsize(), q.empty())
    with pytest.raises(ShutDown):
        q.get()


@pytest.mark.skipif(sys.version_info < (3, 13), reason="queue.ShutDown came with Python 3.13")
def test_shutdowns_error_is_the_standard_librarys():
    assert ShutDown is queue.ShutDown


@pytest.mark.parametrize("immediate", [False, True])
def test_shutdown_wakes_whoever_waits_in_other_processes(ctx, immediate):
    q, full = ctx.Queue(), ctx.Queue(1)
    full.put(1)
    here = ctx.Event(), ctx.Event()
    getter = ctx.Process(target=family.tell_and_call, args=(here[0], q.get))
    putter = ctx.Process(target=family.tell_and_call, args=(here[1], full.put, 2))
    for process in (getter, putter):
        process.start()
    for event in here:
        event.wait()
    time.sleep(0.05)
    q.shutdown(immediate)
    full.shutdown(immediate)
    for process in (getter, putter):
        assert isinstance(process.exception(timeout=100), ShutDown)
        process.join()


def test_iteration_ends_with_the_shutdown(ctx):
    q = ctx.Queue()
    process = ctx.Process(target=list, args=(q,))
    process.start()
    q.put_many(range(50))
    q.shutdown()
    assert list(range(50)) == process.result(timeout=100)
    process.join()


# --- many at once ----------------------------------------------------------------------------------------------------------------


def test_put_many_and_get_many_keep_the_order(make):
    q = make()
    items = [b"x" * (i * 37 % 3000) for i in range(300)] + [b"y" * 100_000]
    q.put_many(iter(items))
    got = []
    while len(got) < len(items):
        batch = q.get_many(7)
        assert 1 <= len(batch) <= 7
        got += batch
    assert items == got


def test_get_many_waits_for_the_first_only(make):
    q = make()
    with pytest.raises(queue.Empty):
        q.get_many(5, timeout=0.05)
    q.put_many([1, 2])
    assert [1, 2] == q.get_many(5)


def test_put_many_says_how_many_found_room(make):
    """Else the caller could not go on where it stopped."""
    q = make(3)
    with pytest.raises(queue.Full) as caught:
        q.put_many(range(5), timeout=0.05)
    assert (3, [0, 1, 2]) == (caught.value.items_put, drain(q))


def test_put_many_longer_than_the_limit_passes_through(fork):
    q = fork.Queue(3)
    process = fork.Process(target=q.put_many, args=(range(50),))
    process.start()
    assert list(range(50)) == [q.get() for _ in range(50)]
    process.join()


def test_putting_nothing_is_fine(make):
    q = make()
    q.put_many([])
    assert q.empty()


# --- await ----------------------------------------------------------------------------------------------------------------------


def test_aget_awaits_what_another_process_puts(ctx):
    q = ctx.Queue()

    async def main():
        process = ctx.Process(target=family.put_all, args=(q, ["a", "b"]))
        process.start()
        got = [await q.aget(), await q.aget()]
        process.join()
        return got

    assert ["a", "b"] == asyncio.run(main())


def test_aput_awaits_room(fork):
    q = fork.Queue(1)

    async def main():
        await q.aput(0)
        process = fork.Process(target=family.get_n, args=(q, 20))
        process.start()
        for i in range(1, 20):
            await q.aput(i)
        got = process.result(timeout=100)
        process.join()
        return got

    assert list(range(20)) == asyncio.run(main())


def test_many_awaits_share_one_queue(make):
    q = make()

    async def main():
        tasks = [asyncio.ensure_future(q.aget()) for _ in range(20)]
        await asyncio.sleep(0.01)
        q.put_many(range(20))
        return await asyncio.gather(*tasks)

    assert list(range(20)) == sorted(asyncio.run(main()))


def test_a_cancelled_await_takes_nothing_and_puts_nothing(make):
    """A timeout around aget() is how one polls: an item must not be lost in it."""
    q, full = make(), make(1)
    full.put("first")

    async def main():
        for i in range(10):
            for call in (q.aget(), full.aput("second")):
                task = asyncio.ensure_future(call)
                await asyncio.sleep(0.001 * (i % 3))
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(q.aget(), 0.002)
        q.put("kept")
        return await q.aget()

    assert "kept" == asyncio.run(main())
    assert ["first"] == drain(full)


def test_async_iteration_ends_with_the_shutdown(make):
    q = make()

    async def main():
        asyncio.get_running_loop().call_later(0.02, q.shutdown)
        return [item async for item in q]

    q.put_many(range(5))
    assert list(range(5)) == asyncio.run(main())


# --- selectable ends --------------------------------------------------------------------------------------------------------------


def test_the_reader_can_be_waited_for(ctx):
    """As `connection.wait([q._reader, sentinel])` of concurrent.futures does."""
    q = ctx.Queue()
    assert [] == wait([q._reader], 0)
    process = ctx.Process(target=family.put_all, args=(q, ["x"]))
    process.start()
    assert [q._reader] == wait([q._reader], 100)
    assert (True, "x") == (q._reader.poll(), q._reader.recv())
    assert not q._reader.poll(0)
    process.join()
    q._writer.send("y")
    assert q._reader.poll(None)
    assert "y" == q.get()
    q._reader.close()
    with pytest.raises(OSError, match="closed"):
        q._reader.recv()


def test_waiting_for_the_reader_again_and_again_works(fork):
    """Each ring of the bell is for one wait; the next has to arm it anew."""
    q, back = fork.Queue(), fork.Queue()
    process = fork.Process(target=_echo_n, args=(q, back, 50))
    process.start()
    for i in range(50):
        q.put(i)
        assert wait([back._reader], 100)
        assert i == back.get_nowait()
    process.join()


def _echo_n(q, back, n):
    for _ in range(n):
        back.put(q.get())


def test_a_dead_waiters_bell_never_rings_in_somebodys_file(fork, tmp_path):
    """The number of its closed pipe may belong to the program's file by then: a byte written there damages it."""
    q = fork.Queue()
    other = pickle.loads(pickle.dumps(q))
    other._reader.fileno()
    del other
    gc.collect()
    with (tmp_path / "1").open("wb") as one, (tmp_path / "2").open("wb") as two:
        for file in (one, two):
            file.write(b"data")
            file.flush()
        with fork.Process(target=q.put, args=(1,)):
            pass
    assert [b"data"] * 2 == [(tmp_path / name).read_bytes() for name in "12"]


def test_handles_come_and_go_without_using_up_the_bells(fork):
    q = fork.Queue()
    for _ in range(20):
        other = pickle.loads(pickle.dumps(q))
        assert other._reader.fileno() >= 0
        del other
        gc.collect()


# --- death -------------------------------------------------------------------------------------------------------------------------


def test_a_killed_consumer_takes_at_most_its_own_item(fork):
    q = fork.Queue()
    q.put_many(range(10))
    with fork.Process(target=family.get_and_die, args=(q,)):
        pass
    assert list(range(1, 10)) == drain(q)


def test_a_consumer_killed_while_it_waits_takes_nothing(fork, wait_until):
    q, here = fork.Queue(), fork.Event()
    victim = fork.Process(target=family.tell_and_call, args=(here, q.get))
    victim.start()
    here.wait()
    wait_until(lambda: family.state_of(victim.pid) == "S")
    os.kill(victim.pid, signal.SIGKILL)
    q.put(1)
    assert 1 == q.get(timeout=100)
    victim.join()


def test_a_producer_killed_while_it_waits_for_room_puts_nothing(fork, wait_until):
    q, here = fork.Queue(1), fork.Event()
    q.put(0)
    victim = fork.Process(target=family.tell_and_call, args=(here, q.put, 1))
    victim.start()
    here.wait()
    wait_until(lambda: family.state_of(victim.pid) == "S")
    victim.kill()
    victim.join()
    assert [0] == drain(q)
    q.put(2)
    assert 2 == q.get()


# --- the object --------------------------------------------------------------------------------------------------------------------


def test_repr_shows_how_full_it_is(make):
    q = make(5)
    q.put(1)
    assert f"<{type(q).__name__} at " in repr(q)
    assert ": 1/5 items>" in repr(q)
    q.close()
    assert "closed" in repr(q)


def test_weak_references_subclasses_and_type_arguments_work(fork):
    class Named(type(fork.Queue())):
        def __init__(self, name):
            super().__init__(3)
            self.name = name

    q = Named("mine")
    q.put(1)
    q._reader.poll()
    alive = weakref.ref(q)
    assert 1 == q.get()
    del q
    gc.collect()
    assert alive() is None
    assert type(fork.Queue())[int]


def test_attributes_that_belong_to_a_process_stay_in_it(fork):
    """Its pipe means nothing elsewhere; what the program attached may."""
    q = fork.Queue()
    q._reader.fileno()
    q.note = "travels"
    again = pickle.loads(pickle.dumps(q))
    assert {"note": "travels"} == vars(again)
    assert "_bell_here" in vars(q)
