"""The leak check itself: a check that sees nothing would pass every test."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from multiprocessing import forkserver, resource_tracker, shared_memory

import pytest

from tests._leaks import Footprint


def test_nothing_is_found_where_nothing_was_left() -> None:
    """Two looks in a row agree, unless another program has used /dev/shm between them."""

    def found() -> dict[tuple[str, object], str]:
        before = Footprint.take()
        return Footprint.take().beyond(before)

    assert any(found() == {} for _ in range(20))


def test_a_running_child_is_found() -> None:
    """Named by its pid."""
    before = Footprint.take()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        left = Footprint.take().beyond(before).values()

    assert any(line.startswith(f"process: pid {child.pid},") for line in left)


def test_an_orphan_is_found(wait_until: Callable[..., None]) -> None:
    """A grandchild whose parent is dead is no descendant any more, and still ours."""
    before = Footprint.take()
    reader, writer = os.pipe()
    script = "import subprocess, sys; p = subprocess.Popen(['cat'], stdin=0, stdout=2); print(p.pid)"
    with open(reader, "rb") as stdin:
        done = subprocess.run(
            [sys.executable, "-c", script], check=True, stdin=stdin, stdout=subprocess.PIPE, text=True
        )
    orphan = int(done.stdout)
    try:
        left = Footprint.take().beyond(before).values()
        assert any(line.startswith(f"process: pid {orphan},") for line in left)
    finally:
        os.close(writer)  # which ends the cat
    wait_until(lambda: not Footprint.take().beyond(before), "the end of the orphan")


def test_a_descriptor_a_thread_and_a_memfd_are_found() -> None:
    """What one process holds."""
    before = Footprint.take()
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait, name="left-over")
    thread.start()
    fd = os.memfd_create("left-over")
    try:
        left = Footprint.take().beyond(before).values()
    finally:
        os.close(fd)
        stop.set()
        thread.join()

    assert ["file descriptor", "thread"] == sorted(line.partition(":")[0] for line in left)
    assert all("left-over" in line for line in left)


def test_shared_memory_and_files_are_found() -> None:
    """What outlives every process."""
    before = Footprint.take()
    memory = shared_memory.SharedMemory(create=True, size=1)
    fd, path = tempfile.mkstemp()
    try:
        left = Footprint.take().beyond(before).values()
    finally:
        os.close(fd)
        os.unlink(path)
        memory.close()
        memory.unlink()

    assert f"temporary file: {path}" in left
    assert f"shared memory: /dev/shm/{memory.name.lstrip('/')}" in left


@pytest.mark.leaks("the helpers may be started here for the first time; the test itself looks")
def test_the_helpers_of_the_standard_library_may_stay() -> None:
    """One resource tracker and one fork server in a process, ended with it."""
    before = Footprint.take()
    resource_tracker.ensure_running()
    forkserver.ensure_running()

    assert {} == Footprint.take().beyond(before)
    assert multiprocessing.active_children() == []
