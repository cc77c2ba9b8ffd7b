"""The soft limit on descriptors is raised when it is nearly reached; at the hard one there is an error with the numbers."""

from __future__ import annotations

import subprocess
import sys

import pytest

MANY = """
import os, resource, sys, time
import procession as mp
def run(code, soft, hard):
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    exec(code)
def wait(event):
    event.wait()
def pid(_):
    time.sleep(0.001)
    return os.getpid()
if __name__ == "__main__":
    run(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
"""

PROCESSES = """
mp.set_start_method({method!r})
event = mp.Event()
processes = []
try:
    for n in range(60):
        processes.append(mp.Process(target=wait, args=(event,), name=f"number {{n}}"))
        processes[-1].start()
except OSError as error:
    print(error.errno, error.strerror)
    processes.pop()
event.set()
for process in processes:
    process.join()
print(len(processes), {{process.exitcode for process in processes}})
"""


def run(tmp_path, code, soft, hard):
    program = tmp_path / "program.py"
    program.write_text(MANY)
    done = subprocess.run(
        [sys.executable, program, code, str(soft), str(hard)], capture_output=True, text=True, check=False
    )
    return done.stdout, done.stderr


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_the_soft_limit_is_raised(method, tmp_path):
    assert run(tmp_path, PROCESSES.format(method=method), 90, 4096) == ("60 {0}\n", "")


def test_the_hard_limit_is_an_error_with_the_numbers(tmp_path):
    out, err = run(tmp_path, PROCESSES.format(method="fork"), 90, 90)
    first, second = out.splitlines()
    assert first.startswith("24 no file descriptors are left to start number ")
    assert first.endswith(": this process may have 90 (ulimit -n), 90 at most (ulimit -Hn)")
    assert second.endswith(" {0}")
    assert err == ""


def test_a_large_pool(tmp_path):
    code = """
with mp.get_context("fork").Pool(40) as pool:
    print(len(set(pool.map(pid, range(400), chunksize=1))) > 1)
"""
    assert run(tmp_path, code, 100, 4096) == ("True\n", "")
