"""Every call that blocks: how to make it block, how to wake it, and what it gives when its time is over."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import wait as connection_wait
from typing import Any

NOTHING = object()


@dataclass
class Blocked:
    """A call that blocks in whoever makes it, until `wake` is called in the process that made this."""

    call: Callable[[float | None], Any]
    wake: Callable[[], Any]
    #: what the call returns, or the type of what it raises, when its time is over
    timed_out: Any
    #: what the call returns when it is woken
    woken: Any


def _held(ctx, kind):
    lock = getattr(ctx, kind)()
    lock.acquire()
    return Blocked(lambda t: lock.acquire(True, t), lock.release, False, True)


def _semaphore(ctx, kind):
    semaphore = getattr(ctx, kind)(1)
    semaphore.acquire()
    return Blocked(lambda t: semaphore.acquire(True, t), semaphore.release, False, True)


def _with_semaphore(ctx):
    semaphore = ctx.Semaphore(0)
    return Blocked(lambda t: semaphore.__enter__(), semaphore.release, NOTHING, True)


def _with_lock(ctx):
    lock = ctx.Lock()
    lock.acquire()
    return Blocked(lambda t: lock.__enter__(), lock.release, NOTHING, True)


def _event(ctx):
    event = ctx.Event()
    return Blocked(event.wait, event.set, False, True)


def _condition(ctx):
    condition = ctx.Condition()

    def call(timeout):
        with condition:
            return condition.wait(timeout)

    def wake():
        with condition:
            condition.notify()

    return Blocked(call, wake, False, True)


def _condition_for(ctx):
    condition, flag = ctx.Condition(), ctx.Event()

    def call(timeout):
        with condition:
            return condition.wait_for(flag.is_set, timeout)

    def wake():
        with condition:
            flag.set()
            condition.notify_all()

    return Blocked(call, wake, False, True)


def _barrier(ctx):
    barrier = ctx.Barrier(2)
    return Blocked(barrier.wait, barrier.wait, threading.BrokenBarrierError, 0)


def _get(ctx, kind):
    q = getattr(ctx, kind)()
    return Blocked(lambda t: q.get(True, t), lambda: q.put("item"), queue.Empty, "item")


def _get_many(ctx):
    q = ctx.Queue()
    return Blocked(lambda t: q.get_many(3, True, t), lambda: q.put("item"), queue.Empty, ["item"])


def _iterate(ctx):
    q = ctx.Queue()
    return Blocked(lambda t: next(iter(q)), lambda: q.put("item"), NOTHING, "item")


def _put(ctx, kind):
    q = getattr(ctx, kind)(1)
    q.put(0)
    return Blocked(lambda t: q.put(1, True, t), q.get, queue.Full, None)


def _put_many(ctx):
    q = ctx.Queue(1)
    q.put(0)
    return Blocked(lambda t: q.put_many([1], True, t), q.get, queue.Full, None)


def _join(ctx):
    q = ctx.JoinableQueue()
    q.put(0)
    q.get()
    return Blocked(q.join, q.task_done, False, True)


def _simple_get(ctx):
    q = ctx.SimpleQueue()
    return Blocked(lambda t: q.get(), lambda: q.put("item"), NOTHING, "item")


def _joinable_get_many(ctx):
    q = ctx.JoinableQueue()
    return Blocked(lambda t: q.get_many(3, True, t), lambda: q.put("item"), queue.Empty, ["item"])


def _aget(ctx):
    q = ctx.Queue()
    return Blocked(lambda t: asyncio.run(q.aget()), lambda: q.put("item"), NOTHING, "item")


def _process(ctx, method, timed_out, woken):
    """The process is a child of the one that blocks, since only its parent may join it."""
    event = ctx.Event()

    def call(timeout):
        process = ctx.Process(target=event.wait)
        process.start()
        try:
            return getattr(process, method)(timeout)
        finally:
            event.set()
            process.join()

    return Blocked(call, event.set, timed_out, woken)


def _poll(ctx):
    q = ctx.Queue()
    return Blocked(q._reader.poll, lambda: q.put("item"), False, True)


def _connection_wait(ctx):
    q = ctx.Queue()
    return Blocked(lambda t: len(connection_wait([q._reader], t)), lambda: q.put("item"), 0, 1)


CALLS: dict[str, Callable[[Any], Blocked]] = {
    "Lock.acquire": lambda ctx: _held(ctx, "Lock"),
    "RLock.acquire": lambda ctx: _held(ctx, "RLock"),
    "with Lock": _with_lock,
    "Semaphore.acquire": lambda ctx: _semaphore(ctx, "Semaphore"),
    "BoundedSemaphore.acquire": lambda ctx: _semaphore(ctx, "BoundedSemaphore"),
    "with Semaphore": _with_semaphore,
    "Event.wait": _event,
    "Condition.wait": _condition,
    "Condition.wait_for": _condition_for,
    "Barrier.wait": _barrier,
    "Queue.get": lambda ctx: _get(ctx, "Queue"),
    "JoinableQueue.get": lambda ctx: _get(ctx, "JoinableQueue"),
    "Queue.get_many": _get_many,
    "iteration": _iterate,
    "Queue.put": lambda ctx: _put(ctx, "Queue"),
    "JoinableQueue.put": lambda ctx: _put(ctx, "JoinableQueue"),
    "Queue.put_many": _put_many,
    "JoinableQueue.join": _join,
    "SimpleQueue.get": _simple_get,
    "JoinableQueue.get_many": _joinable_get_many,
    "Queue.aget": _aget,
    "Process.join": lambda ctx: _process(ctx, "join", None, None),
    "Process.result": lambda ctx: _process(ctx, "result", TimeoutError, True),
    "Process.exception": lambda ctx: _process(ctx, "exception", TimeoutError, None),
    "Reader.poll": _poll,
    "connection.wait": _connection_wait,
}
# Those that sleep on a futex, and not in the kernel's poll.
_ELSEWHERE = ("Reader.poll", "connection.wait", "Queue.aget", "Process.join", "Process.result", "Process.exception")
ON_FUTEX = [name for name in CALLS if name not in _ELSEWHERE]
_WITHOUT_TIMEOUT = ("with Lock", "with Semaphore", "iteration", "SimpleQueue.get", "Queue.aget")
WITH_TIMEOUT = [name for name in CALLS if name not in _WITHOUT_TIMEOUT]
