"""Processes that send, hold, change and share arrays are killed at random moments: nothing damaged, nothing left."""

from __future__ import annotations

import gc
import os
import random
import signal
import time

import numpy as np
import psutil
import pytest

import procession
from procession import _native
from procession._native import Segment

N = 16_384  # doubles: 128 KiB
DAMAGED = 77


def fresh(number):
    return np.full(N, number, dtype=float)


def in_place(number):
    array = procession.empty(N)
    array[:] = number
    return array


def is_whole(array):
    return bool((array == array[0]).all())


def take_part(seed, plain, joinable, shared):
    """For ever: make, send, take, keep, change, fork; what comes is whole, or the process ends with DAMAGED."""
    numbers = random.Random(seed)
    kept = []
    while True:
        what = numbers.randrange(8)
        queue = numbers.choice((plain, joinable))
        number = numbers.randrange(1000)
        if what < 4 and queue.qsize() < 20:
            array = (fresh, in_place, fresh)[what % 3](number)
            queue.put({"array": array, "shared": shared, "lock": procession.Lock()} if what == 3 else array)
            array += 1  # nobody sees that
            if not is_whole(array):
                os._exit(DAMAGED)
        elif what < 7:
            try:
                got = queue.get(timeout=0)
            except procession.queues.Empty:
                continue
            if isinstance(got, dict):
                if got["shared"][-1] != N - 1:
                    os._exit(DAMAGED)
                got = got["array"]
            if not is_whole(got):
                os._exit(DAMAGED)
            got += 1
            kept.append(got)
            if queue is joinable:
                queue.task_done()
            if len(kept) > 5:
                kept.pop(numbers.randrange(5))
        elif numbers.random() < 0.1:
            child = os.fork()
            if child == 0:
                damaged = False
                for array in kept:
                    array[:] = array + 1
                    damaged = damaged or not is_whole(array)
                os._exit(DAMAGED if damaged else 0)
            if os.waitpid(child, 0)[1] != 0:
                os._exit(DAMAGED)
        if not all(map(is_whole, kept)):
            os._exit(DAMAGED)


def settled():
    gc.collect()
    while _native.collect():
        pass
    return procession.memory()


@pytest.mark.parametrize("kills", [60, pytest.param(3000, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def test_killed_at_random_moments(kills, wait_until):
    seed = random.randrange(1 << 30)
    print("seed", seed)
    numbers = random.Random(seed)
    ctx = procession.get_context("fork")
    before = settled()
    plain, joinable = ctx.Queue(), ctx.JoinableQueue()
    shared = procession.shared(np.arange(N, dtype=float))
    members = []
    for number in range(kills + 4):
        member = ctx.Process(target=take_part, args=(numbers.random(), plain, joinable, shared))
        member.start()
        members.append(member)
        if len(members) > 4:
            time.sleep(numbers.uniform(0, 0.03))
            victim = members.pop(numbers.randrange(4))
            victim.kill()
            victim.join()
            assert victim.exitcode == -signal.SIGKILL, f"{number}: {victim.exitcode}"
    for member in members:
        member.kill()
        member.join()
    assert [member.exitcode for member in members] == [-signal.SIGKILL] * 4
    for queue in (plain, joinable):
        while True:
            try:
                got = queue.get(timeout=0)
            except procession.queues.Empty:
                break
            got = got["array"] if isinstance(got, dict) else got
            assert is_whole(got)
            assert Segment.find(memoryview(got).cast("B")) is not None
    while joinable._unfinished():
        joinable.task_done()
    del plain, joinable, queue, shared, member, members, victim, got
    # A child's slot counts as taken for 10 s when its parent was killed in the midst of the fork.
    wait_until(lambda: is_clean(before), "all memory given back")


def is_clean(before):
    after = settled()
    # One block more: a chunk of a list that the other objects' holders need.
    return (after.segments, after.objects) <= (before.segments, before.objects) and after.blocks <= before.blocks + 1


def doubled(array):
    return array * 2


@pytest.mark.parametrize("seconds", [3, pytest.param(600, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])])
def test_memory_stays_flat(seconds):
    """A soak: pool, queue, shared and fresh arrays of many sizes, round after round."""
    numbers = random.Random(0)
    queue = procession.Queue()
    parent = psutil.Process()
    held, resident = [], []
    end = time.monotonic() + seconds
    with procession.get_context("fork").Pool(2) as pool:
        while time.monotonic() < end or len(held) < 20:
            arrays = [np.full(numbers.randrange(1, 3 * N), i, dtype=float) for i in range(8)]
            shared = procession.shared(arrays)
            for results in (pool.map(doubled, arrays), list(pool.imap(doubled, shared))):
                assert [a[0] for a in results] == [2 * i for i in range(8)]
            queue.put((arrays, shared))
            assert queue.get()[0][7][-1] == 7
            del results, shared, arrays
            memory = procession.memory()
            held.append((memory.used, memory.objects))
            resident.append(parent.memory_info().rss)
    warm = len(held) // 4
    assert max(held[warm:])[0] <= max(held[: warm + 1])[0] + (4 << 20)
    assert max(objects for _, objects in held[warm:]) <= max(objects for _, objects in held[: warm + 1]) + 4
    # The arena's pages count too, of which up to 64 MiB may lie idle.
    assert max(resident[warm:]) <= max(resident[: warm + 1]) + (80 << 20)
