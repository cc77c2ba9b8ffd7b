"""Tasks that take their time, will not stop, or use too much; apart from the tests for spawned workers' sake."""

from __future__ import annotations

import os
import random
import signal
import time

import procession


def ignore_signals(path, *numbers):
    """Sleep for ever, whatever signals of these come; tell by a file that it has begun."""
    for number in numbers:
        signal.signal(number, signal.SIG_IGN)
    touch(path)
    while True:
        time.sleep(60)


def touch(path):
    with open(path, "a") as file:
        file.write(f"{os.getpid()}\n")


def touch_and_sleep(path, seconds):
    touch(path)
    time.sleep(seconds)
    return seconds


def sleep_or_square(item):
    if isinstance(item, float):
        time.sleep(item)
    return item * item


def swallow_interrupts(path):
    """Sleep for ever, as code does that catches everything."""
    touch(path)
    while True:
        try:
            time.sleep(60)
        except BaseException:
            continue


def pid_of(_=None):
    return os.getpid()


def pid_after(seconds):
    time.sleep(seconds)
    return os.getpid()


def hold(mib):
    """Use so much memory until the worker ends."""
    hold.kept = getattr(hold, "kept", b"") + b"x" * (mib << 20)
    return os.getpid()


def hold_and_sleep(mib):
    data = b"x" * (mib << 20)
    time.sleep(60)
    return len(data)


def nested(method, count):
    with procession.get_context(method).Pool(2) as pool:
        return sum(pool.map(abs, range(count)))


def use(pool):
    return pool.map(abs, [1])


def note(path, item):
    """Append the item to a file: the order in which they were begun."""
    with open(path, "a") as file:
        file.write(f"{item}\n")
    return item


def roll(_):
    return random.random()


def state_init(state):
    state["calls"] = 0


def state_count(state, _):
    state["calls"] += 1
    return os.getpid(), state["calls"]


def state_exit(path, state):
    touch(f"{path}/{os.getpid()}-{state['calls']}")


def add(a, b=0, c=0):
    return a + b + c


def slow_start(seconds):
    time.sleep(seconds)


def boom(x):
    raise ValueError(x)
