"""Ctrl-C in a terminal while a pool works: one KeyboardInterrupt, the caller's own, and nothing left of the pool."""

from __future__ import annotations

import contextlib
import os
import pty
import select
import signal
import subprocess
import sys
import textwrap
import time

import psutil
import pytest

# In the script's own process; what is forked or spawned by it has other pids.
HEAD = """
import os, sys, time
import procession
from tests.pool.causes import sleep, square

if __name__ == "__main__":
    procession.set_start_method(sys.argv[1])
"""

CALLS = {
    "map": """
        with procession.Pool(3) as pool:
            say("ready", pool.map(square, range(3)))
            pool.map(sleep, [600] * 9)
    """,
    "map without with": """
        pool = procession.Pool(3)
        say("ready", pool.map(square, range(3)))
        pool.map(sleep, [600] * 9)
    """,
    "map in chunks": """
        with procession.Pool(3) as pool:
            say("ready", pool.map(square, range(3)))
            pool.map(sleep, [600] * 9, chunksize=3)
    """,
    "apply": """
        with procession.Pool(3) as pool:
            say("ready", pool.map(square, range(3)))
            pool.apply(sleep, (600,))
    """,
    "imap": """
        with procession.Pool(3) as pool:
            say("ready", pool.map(square, range(3)))
            list(pool.imap(sleep, [600] * 9))
    """,
    "imap_unordered": """
        with procession.Pool(3) as pool:
            say("ready", pool.map(square, range(3)))
            list(pool.imap_unordered(sleep, iter([600] * 9)))
    """,
    "while nothing runs": """
        with procession.Pool(3) as pool:
            say("ready", pool.map(square, range(3)))
            time.sleep(600)
    """,
    "tiny tasks": """
        with procession.Pool(3) as pool:
            say("ready", pool.map(square, range(3)))
            while True:
                pool.map(square, range(10000))
    """,
    "executor": """
        with procession.ProcessPoolExecutor(3) as pool:
            say("ready", list(pool.map(square, range(3))))
            list(pool.map(sleep, [600] * 9))
    """,
    "executor's future": """
        with procession.ProcessPoolExecutor(3) as pool:
            say("ready", list(pool.map(square, range(3))))
            pool.submit(sleep, 600).result()
    """,
}
SAY = """
def say(*words):
    print(*words, flush=True)

"""


class Terminal:
    """A script in a terminal of its own: Ctrl-C there goes to the script and all of its children at once."""

    def __init__(self, path, *arguments):
        self.controller, terminal = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.pool.in_terminal", str(path), *arguments],
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            start_new_session=True,
        )
        os.close(terminal)
        self.output = ""

    def read(self, seconds):
        """Read what there is; False when everybody has closed the terminal."""
        if select.select([self.controller], [], [], seconds)[0]:
            try:
                data = os.read(self.controller, 65536)
            except OSError:
                return False
            self.output += data.decode(errors="replace")
            return bool(data)
        return True

    def expect(self, text, within=60.0):
        deadline = time.monotonic() + within
        while text not in self.output:
            assert self.read(0.1), f"ended without {text!r}:\n{self.output}"
            assert time.monotonic() < deadline, f"no {text!r}:\n{self.output}"

    def press_ctrl_c(self):
        os.write(self.controller, b"\x03")

    def wait_for_the_end(self, within=30.0):
        deadline = time.monotonic() + within
        while self.process.poll() is None:
            self.read(0.05)
            assert time.monotonic() < deadline, f"does not end:\n{self.output}"
        while self.read(1.0) and select.select([self.controller], [], [], 0)[0]:
            pass
        return self.process.returncode

    def processes(self):
        """Whoever is of the terminal's session."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(OSError, psutil.Error):
                if os.getsid(process.pid) == self.process.pid and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process.pid)
        return found

    def close(self):
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        os.close(self.controller)


@pytest.fixture
def terminal(tmp_path):
    opened = []

    def start(body, method):
        path = tmp_path / "script.py"
        path.write_text(SAY + HEAD + textwrap.indent(textwrap.dedent(body), "    "))
        opened.append(Terminal(path, method))
        return opened[0]

    yield start
    for one in opened:
        one.close()


@pytest.mark.parametrize("call", CALLS)
def test_ctrl_c_ends_the_program_with_one_traceback(terminal, call, start_method, wait_until):
    """The traceback is the caller's; the workers keep silent, and none of them is left."""
    script = terminal(CALLS[call], start_method)
    script.expect("ready [0, 1, 4]")
    time.sleep(0.2)
    script.press_ctrl_c()
    code = script.wait_for_the_end()
    assert 1 == script.output.count("Traceback (most recent call last)"), script.output
    assert 1 == script.output.count("KeyboardInterrupt"), script.output
    assert "script.py" in script.output
    assert code in (-signal.SIGINT, 130), script.output
    wait_until(lambda: not script.processes(), "the end of all its processes")
