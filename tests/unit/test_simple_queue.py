"""SimpleQueue: put, get, empty, close."""

from __future__ import annotations

import inspect
import pickle

import pytest

import procession
from tests.crash import family


def test_items_pass_between_processes(ctx):
    q = ctx.SimpleQueue()
    process = ctx.Process(target=family.put_all, args=(q, [1, "two", [3]]))
    process.start()
    assert [1, "two", [3]] == [q.get(), q.get(), q.get()]
    process.join()
    assert q.empty()


def test_it_is_never_full():
    """The standard library's blocks in put once the pipe's 64 KiB are full."""
    q = procession.SimpleQueue()
    for _ in range(100):
        q.put(b"x" * 10_000)
    assert not q.empty()


def test_it_takes_no_maxsize():
    with pytest.raises(TypeError):
        procession.SimpleQueue(3)


def test_a_killed_user_does_not_wedge_it():
    """The standard library's holds a lock around its pipe: one kill, and all wait for ever."""
    ctx = procession.get_context("fork")
    q = ctx.SimpleQueue()
    for _ in range(3):
        victim = ctx.Process(target=q.get)
        victim.start()
        victim.kill()
        victim.join()
    q.put(1)
    assert 1 == q.get()


def test_a_closed_one_refuses():
    """With the standard library's error: its pipe is closed."""
    q = procession.SimpleQueue()
    q.close()
    with pytest.raises(OSError, match="closed"):
        q.put(1)
    with pytest.raises(OSError, match="closed"):
        q.get()


def test_it_pickles_and_shows_itself():
    q = procession.SimpleQueue()
    q.put(1)
    assert 1 == pickle.loads(pickle.dumps(q)).get()
    assert "SimpleQueue" in repr(q)
    assert not inspect.isabstract(type(q))
