"""Handles: any object, at any time, to any process of the family, by any way; and to nobody else."""

from __future__ import annotations

import collections
import gc
import os
import pickle
import subprocess
import sys

import pytest

import procession
from procession import ForeignHandleError, StaleHandleError, _native
from tests.crash import family

MAKERS = {
    "Lock": lambda ctx: ctx.Lock(),
    "RLock": lambda ctx: ctx.RLock(),
    "Semaphore": lambda ctx: ctx.Semaphore(1),
    "BoundedSemaphore": lambda ctx: ctx.BoundedSemaphore(1),
    "Event": lambda ctx: ctx.Event(),
    "Condition": lambda ctx: ctx.Condition(),
    "Barrier": lambda ctx: ctx.Barrier(1),
    "Queue": lambda ctx: ctx.Queue(),
    "JoinableQueue": lambda ctx: ctx.JoinableQueue(),
    "SimpleQueue": lambda ctx: ctx.SimpleQueue(),
}


@pytest.fixture
def fork():
    return procession.get_context("fork")


def use(name, handle):
    """Do something to the object that its other handles can see."""
    if name in ("Lock", "RLock", "Semaphore", "BoundedSemaphore", "Condition"):
        handle.acquire()
        handle.release()
        if name not in {"RLock", "Condition"}:
            handle.acquire()
    elif name == "Event":
        handle.set()
    elif name == "Barrier":
        handle.abort()
    else:
        handle.put("seen")
    return type(handle).__name__


def was_used(name, handle):
    if name == "Lock":
        return handle.locked()
    if name in ("Semaphore", "BoundedSemaphore"):
        return handle.get_value() == 0
    if name in ("RLock", "Condition"):
        return handle.acquire(False)
    if name == "Event":
        return handle.is_set()
    if name == "Barrier":
        return handle.broken
    return handle.get() == "seen"


def serve(names, handles, inbox, pipe):
    """Use what comes as arguments in containers, then what comes by queue, then what comes by pipe."""
    for name in names:
        use(name, handles[name])
    inbox_handles = inbox.get()
    for name in names:
        use(name, inbox_handles["by queue"][name][0])
    piped = pipe.recv()
    for name in names:
        use(name, piped[name])
    pipe.send("done")
    pipe.close()


def test_every_handle_travels_every_way_under_every_start_method(ctx):
    """As an argument, through a queue and through a pipe, nested in containers; the standard library has only the first."""
    names = list(MAKERS)
    groups = [{name: MAKERS[name](ctx) for name in names} for _ in range(3)]
    inbox = ctx.Queue()
    ours, theirs = ctx.Pipe()
    process = ctx.Process(target=serve, args=(names, groups[0], inbox, theirs))
    process.start()
    theirs.close()
    inbox.put({"by queue": {name: [handle] for name, handle in groups[1].items()}})
    ours.send(collections.OrderedDict(groups[2]))
    assert "done" == ours.recv()
    process.join()
    ours.close()
    assert 0 == process.exitcode
    for way, group in zip(("argument", "queue", "pipe"), groups, strict=True):
        for name, handle in group.items():
            assert was_used(name, handle), (way, name)


def test_a_grandchild_under_another_start_method_is_family_too(fork):
    """The arena goes down every branch of the tree."""
    event = fork.Event()
    with fork.Process(target=_spawn_and_set, args=(event,)) as process:
        process.result(timeout=100)
    assert event.is_set()


def _spawn_and_set(event):
    with procession.get_context("spawn").Process(target=event.set) as process:
        process.result(timeout=100)


def test_siblings_reach_each_other_through_a_queue_they_were_sent(ctx):
    """A queue sent through a queue: the reply address of every request."""
    requests = ctx.Queue()
    server = ctx.Process(target=_answer_one, args=(requests,))
    server.start()
    answers = ctx.Queue()
    requests.put((6, answers))
    assert 36 == answers.get()
    server.join()


def _answer_one(requests):
    x, answers = requests.get()
    answers.put(x * x)


def test_a_handle_comes_back_as_a_result(ctx):
    """Out of a child that made it, and that has ended by the time it is used."""
    with ctx.Process(target=_make_full_queue) as process:
        q = process.result(timeout=100)
    assert ["from the child", 2] == [q.get(), q.get()]


def _make_full_queue():
    q = procession.Queue()
    q.put_many(["from the child", 2])
    return q


def test_a_handle_is_one_object_twice_in_one_pickle(fork):
    lock = fork.Lock()
    a, b = pickle.loads(pickle.dumps((lock, lock)))
    assert a is b


def test_an_object_lives_until_the_last_process_lets_it_go(fork):
    before = procession.memory().objects
    go, out = fork.Event(), fork.Queue()
    process = _start_with_its_own_queue(fork, go, out)
    gc.collect()
    assert before + 4 == procession.memory().objects  # the process's own result queue is one
    go.set()
    assert "kept" == out.get()
    process.join()
    del process, go, out
    gc.collect()
    _native.collect()
    assert before >= procession.memory().objects


def _start_with_its_own_queue(fork, go, out):
    q = fork.Queue()
    q.put("kept")
    process = fork.Process(target=_wait_and_move, args=(go, q, out))
    process.start()
    return process


def _wait_and_move(go, q, out):
    go.wait()
    out.put(q.get())


def test_what_a_killed_process_made_and_nobody_else_holds_is_given_back(fork):
    gc.collect()
    _native.collect()
    before = procession.memory().blocks
    process = fork.Process(target=_make_many_and_die)
    process.start()
    process.join()
    del process
    gc.collect()
    _native.collect()
    assert before >= procession.memory().blocks


def _make_many_and_die():
    things = [procession.Lock() for _ in range(50)] + [procession.Queue() for _ in range(10)]
    for q in things[50:]:
        q.put(b"x" * 10_000)
    family.die("SIGKILL")


def test_a_stranger_gets_one_clear_error(tmp_path):
    """Bytes in a file, read by an unrelated program: its memory is not this one's."""
    handle = tmp_path / "handle"
    handle.write_bytes(pickle.dumps(procession.Lock()))
    code = f"import pickle; pickle.load(open({str(handle)!r}, 'rb'))"
    for start in ("", "import procession; procession.Lock(); "):
        run = subprocess.run([sys.executable, "-c", start + code], capture_output=True, text=True, check=False)
        assert 1 == run.returncode
        assert "ForeignHandleError" in run.stderr
        assert "another family of processes" in run.stderr


def test_a_handle_to_what_has_been_freed_gets_one_clear_error(fork):
    """Its bytes were kept by somebody who held no handle; the memory may be another object's by now."""
    kept = []
    former = _native.handle_collector(kept)
    try:
        data = pickle.dumps(fork.Lock())
    finally:
        _native.handle_collector(former)
    assert pickle.loads(data).acquire(False)
    kept.clear()
    gc.collect()
    with pytest.raises(StaleHandleError, match="freed"):
        pickle.loads(data)
    others = [fork.Lock() for _ in range(5)]
    with pytest.raises(StaleHandleError, match="freed"):
        pickle.loads(data)
    del others


def test_errors_about_handles_are_what_programs_already_catch():
    assert issubclass(ForeignHandleError, ValueError)
    assert issubclass(StaleHandleError, ReferenceError)


def test_bytes_that_are_no_handle_are_refused():
    """The function that rebuilds handles is named in every pickle: nothing given to it may crash."""
    rebuild = _native._rebuild
    lock = procession.Lock()
    _, (kind, arena, block, gen), *_ = lock.__reduce__()
    for args in ((kind, arena, 0, gen), (kind, arena, 1 << 31, gen), (kind, arena, block, gen + 1)):
        with pytest.raises(StaleHandleError):
            rebuild(*args)
    for args in ((kind,), (3, arena, block, gen), (int, arena, block, gen)):
        with pytest.raises(TypeError):
            rebuild(*args)
    with pytest.raises(ForeignHandleError):
        rebuild(kind, arena ^ 1, block, gen)


def test_a_raw_fork_needs_no_cooperation(fork):
    """Programs call os.fork themselves; the child's slot is taken by a handler of the C library."""
    q = fork.Queue()
    pid = os.fork()
    if pid == 0:
        q.put(os.getpid())
        os._exit(0)
    os.waitpid(pid, 0)
    assert pid == q.get()
