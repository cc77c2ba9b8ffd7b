"""Runs a storm in an interpreter and a session of its own: what it must not leave in shared memory is counted there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest


def run(name, *options, timeout):
    """Run `tests.crash.<name>`; return its exit code and its last word, and what it printed."""
    command = [sys.executable, "-W", "error", "-m", f"tests.crash.{name}", *options]
    storm = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        output, _ = storm.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(storm.pid, signal.SIGKILL)
        output, _ = storm.communicate()
        pytest.fail(f"the storm did not end:\n{output}")
    return (storm.returncode, output.split()[-1]), output
