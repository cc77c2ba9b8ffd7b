"""However a process ends, all that it has started end too, and what they have started."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import procession
from tests.crash.family import DEATHS

ROOT = Path(__file__).parents[2]


def start(method, what, *more):
    """Start the program; return it, and the pids that it tells: its own, and those of all that it has started."""
    program = subprocess.Popen(
        [sys.executable, "-m", "tests.crash.orphans", method, what, *more], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert program.stdout is not None
    return program, [int(word) for word in program.stdout.readline().split()]


def runs(pid):
    """Tell whether a process runs; a zombie does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


@contextlib.contextmanager
def started(method, what, *more):
    program, pids = start(method, what, *more)
    with program:
        try:
            yield program, pids
        finally:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


@pytest.mark.leaks("a killed parent leaves the directory of the fork server's socket, as in the stdlib")
@pytest.mark.parametrize(
    ("what", "death"),
    [*(("children", death) for death in DEATHS), *((what, "SIGKILL") for what in ("generations", "pools", "executor"))],
)
def test_all_end_with_the_first(start_method, what, death, wait_until):
    with started(start_method, what, death) as (program, pids):
        assert len(pids) >= 3
        assert program.wait() == DEATHS[death]
        wait_until(lambda: not any(map(runs, pids)), "the end of all")


@pytest.mark.leaks("a killed parent leaves the directory of the fork server's socket, as in the stdlib")
@pytest.mark.parametrize("what", ["busy", "blocked", "threads"])
def test_whatever_they_are_at(start_method, what, wait_until):
    """In a loop in C that holds the GIL, with signals blocked, started by a thread that has ended."""
    with started(start_method, what, "SIGKILL") as (_, pids):
        wait_until(lambda: not any(map(runs, pids)), "the end of all")


@pytest.mark.leaks("a killed parent leaves the directory of the fork server's socket, as in the stdlib")
def test_one_in_the_middle(start_method, wait_until):
    """Those below it end, those above and beside it do not."""
    with started(start_method, "generations", "none") as (_, pids):
        os.kill(pids[1], signal.SIGKILL)
        wait_until(lambda: not any(map(runs, pids[1:])), "the end of the lower two")
        assert runs(pids[0])


@pytest.mark.leaks("a killed parent leaves the directory of the fork server's socket, as in the stdlib")
def test_one_that_may_outlive_it(start_method, wait_until):
    with started(start_method, "allowed", "SIGKILL") as (program, pids):
        program.wait()
        wait_until(lambda: not runs(pids[2]), "the end of the one that may not")
        assert runs(pids[1])


@pytest.mark.leaks("a killed parent leaves the directory of the fork server's socket, as in the stdlib")
def test_time_for_a_last_word(start_method):
    """Who waits for the parent's end sees it, and can say so."""
    program, _ = start(start_method, "told", "SIGKILL")
    with program:
        assert program.stdout.read() == "it has ended\n"


def test_a_thread_that_ends_takes_nobody_along(ctx):
    """As PR_SET_PDEATHSIG would: it is for the thread, not for the process."""
    import threading

    held = []
    event = ctx.Event()
    thread = threading.Thread(target=lambda: held.append(ctx.Process(target=event.wait)))
    thread.start()
    thread.join()
    process = held[0]
    starter = threading.Thread(target=process.start)
    starter.start()
    starter.join()
    process.join(0.7)  # longer than the grace
    assert process.is_alive()
    event.set()
    process.join()
    assert process.exitcode == 0
    process.close()


def test_a_raw_fork_is_left_alone(wait_until):
    """A process that user code forks, as a daemon does, is nobody's child; and its own children are its own."""
    code = """
import os, sys, time
import procession as mp
mp.set_start_method("fork")
process = mp.Process(target=time.sleep, args=(1000,), daemon=True)
process.start()
if os.fork() == 0:
    own = mp.Process(target=time.sleep, args=(1000,), daemon=True)
    own.start()
    os.write(1, f"{os.getpid()} {own.pid}\\n".encode())
    time.sleep(1000)
os.write(1, f"{process.pid}\\n".encode())
os._exit(0)
"""
    program = subprocess.Popen([sys.executable, "-W", "ignore", "-c", code], stdout=subprocess.PIPE, text=True)
    assert program.stdout is not None
    lines = sorted((program.stdout.readline().split(), program.stdout.readline().split()), key=len)
    child, (forked, grandchild) = int(lines[0][0]), map(int, lines[1])
    try:
        program.wait()
        wait_until(lambda: not runs(child), "the end of the child")
        assert runs(forked)
        assert runs(grandchild)
        os.kill(forked, signal.SIGKILL)
        wait_until(lambda: not runs(grandchild), "the end of the grandchild")
    finally:
        for pid in (forked, grandchild):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        program.stdout.close()


def test_a_daemon_that_closes_everything(tmp_path):
    """The numbers of what procession had open are its log's and others' by then: they are left alone."""
    code = """
import os, sys
import procession as mp
mp.set_start_method("fork")
def write(log, text):
    os.write(log, text)
process = mp.Process(target=int)
process.start()
process.join()
if os.fork() == 0:
    os.closerange(3, 100)
    logs = [os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND) for _ in range(40)]
    import time
    process = os.fork()
    if process == 0:
        mp.Process(target=write, args=(logs[0], b"never"))
        for log in logs:
            write(log, b"x")
        os._exit(0)
    os.waitpid(process, 0)
    from procession import _native
    from procession._proc import stacks
    stacks.prepare()
    _native._lifeline()
    if os.fork() == 0:
        _native._arm_lifeline()
        stacks.prepare()
        for log in logs:
            write(log, b"y")
        os._exit(0)
    os.wait()
    for log in logs:
        write(log, b"z")
    os._exit(0)
os.wait()
"""
    log = tmp_path / "log"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code, log], check=True)
    assert log.read_text() == "x" * 40 + "y" * 40 + "z" * 40


def test_orphan_ok_is_an_attribute_too(ctx):
    assert not ctx.Process().orphan_ok
    assert ctx.Process(orphan_ok=True).orphan_ok
    process = procession.Process(name="it")
    process.orphan_ok = True
    process.start()
    process.join()
    assert process.exitcode == 0
    process.close()
