"""The stacks of a whole family, from within and from outside."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest

import procession
from procession._proc import stacks
from tests.crash.test_orphans import ROOT, started


def at_the_gate(started, event):
    started.set()
    event.wait()


def has_a_child(ctx_method, started, event):
    with procession.get_context(ctx_method).Process(target=at_the_gate, args=(started, event)) as process:
        process.join()


def dumped():
    text = io.StringIO()
    procession.dump(text)
    return text.getvalue()


@pytest.mark.leaks(
    "a child's own fork server leaves its socket, as in the stdlib; its directory goes with this process"
)
def test_all_tell_where_they_are(ctx, start_method):
    started, event = ctx.Event(), ctx.Event()
    with ctx.Process(target=has_a_child, args=(start_method, started, event)):
        started.wait()
        text = dumped()
        event.set()
    assert f"pid {os.getpid()}, R (running)" in text
    assert "in test_all_tell_where_they_are" in text
    assert re.search(r"\n +File .* in has_a_child\n", text)
    assert re.search(r"\n +File .* in at_the_gate\n", text)


def test_again_and_only_what_is_new():
    first, second = dumped(), dumped()
    assert first.count("in dumped") == second.count("in dumped") == 1


def test_what_was_told_is_not_kept():
    sizes = []
    for _ in range(3):
        dumped()
        sizes.append(os.fstat(stacks._fd).st_size)
    assert sizes[2] < 2 * sizes[0]


@pytest.mark.leaks("a killed parent leaves the directory of the fork server's socket, as in the stdlib")
def test_from_outside_also_one_that_holds_the_gil(start_method):
    with started(start_method, "busy", "none") as (program, pids):
        done = subprocess.run(
            [sys.executable, "-m", "procession", "stack", str(program.pid)], capture_output=True, text=True, check=True
        )
    assert f"pid {program.pid}, " in done.stdout
    assert f"pid {pids[1]}, R (running)" in done.stdout
    assert "in report_and_compute" in done.stdout
    assert "in main" in done.stdout
    assert done.stderr == ""


def test_one_that_is_stopped_does_not_answer(monkeypatch, wait_until):
    monkeypatch.setattr(stacks, "_PATIENCE_S", 0.2)
    ctx = procession.get_context("fork")
    started, event = ctx.Event(), ctx.Event()
    with ctx.Process(target=at_the_gate, args=(started, event)) as process:
        started.wait()
        os.kill(process.pid, signal.SIGSTOP)
        try:
            wait_until(lambda: psutil.Process(process.pid).status() == psutil.STATUS_STOPPED, "the stop")
            text = dumped()
        finally:
            os.kill(process.pid, signal.SIGCONT)
            event.set()
    assert re.search(rf"pid {process.pid}, T \(stopped\).*\n +no stacks: it does not answer", text)


def test_others_are_named_and_left_alone():
    with subprocess.Popen(["sleep", "1000"], cwd=ROOT) as other:
        time.sleep(0.05)
        text = dumped()
        assert other.poll() is None
        other.kill()
    assert re.search(rf"pid {other.pid}, .*: sleep 1000\n +no stacks: no Python process", text)


def test_nobody_there():
    done = subprocess.run(
        [sys.executable, "-m", "procession", "stack", str(2**22 + 1)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"procession stack: there is no process {2**22 + 1}\n"
