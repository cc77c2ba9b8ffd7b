"""SIGKILL at random moments: the short run. The long one is `python -m tests.crash.storm --kills 10000`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

STORM = [sys.executable, "-W", "error", "-m", "tests.crash.storm"]


def run(*options, timeout):
    """In an interpreter of its own: what the storm must not leave in shared memory is counted there."""
    storm = subprocess.Popen(
        [*STORM, *options], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        output, _ = storm.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(storm.pid, signal.SIGKILL)
        output, _ = storm.communicate()
        pytest.fail(f"the storm did not end:\n{output}")
    return storm.returncode, output


@pytest.mark.timeout(240)
def test_hundreds_of_kills_leave_nothing_lost_doubled_damaged_leaked_or_stuck():
    """The promise of the whole core, where the kernel decides when a process dies and not the test."""
    code, output = run("--kills", "300", timeout=200)
    assert (0, "passed") == (code, output.split()[-1]), output


@pytest.mark.slow
@pytest.mark.timeout(2000)
def test_thousands_of_kills_leave_nothing_lost_doubled_damaged_leaked_or_stuck():
    """Rare windows need many kills."""
    code, output = run("--kills", "10000", timeout=1900)
    assert (0, "passed") == (code, output.split()[-1]), output


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_standard_library_does_not_survive_the_same_storm():
    """Else the storm would prove nothing. Mostly it is wedged within 20 kills; else a survivor does not stop at the end."""
    code, output = run("--module", "multiprocessing", "--kills", "3000", timeout=250)
    assert 1 == code, output
