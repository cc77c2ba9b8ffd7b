"""Every benchmark scenario runs: a table nobody can reproduce is worth nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytest

RUN = Path(__file__).resolve().parents[2] / "benchmarks" / "run.py"
# A hanging measurement ends after this many seconds as a failure with a name, well before the test's own limit.
LIMIT_S = 20


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(RUN), *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)


def _names() -> list[str]:
    return _run("--list").stdout.split()


@pytest.mark.timeout(320)
@pytest.mark.parametrize("name", _names())
def test_scenario_gives_a_figure_for_procession_and_what_is_always_there(name, tmp_path) -> None:
    """Both sides of every ratio must be measured; other rivals may be missing, but then say so."""
    record = tmp_path / "run.json"

    done = _run("--only", f"^{name}$", "--quick", "--timeout", str(LIMIT_S), "--json", str(record))

    rounds = json.loads(record.read_text(encoding="utf-8"))["scenarios"][name]["rounds"]
    # What `array-shared` is compared with is another use of procession itself.
    always_there = [rival for rival in ("procession", "multiprocessing", "an int") if rival in rounds]
    assert len(always_there) == 2
    for rival in always_there:
        assert "seconds" in rounds[rival][0], f"{rival}: {rounds[rival][0]}\n{done.stdout}{done.stderr}"
        assert rounds[rival][0]["seconds"] > 0
    for rival, measured in rounds.items():
        assert "seconds" in measured[0] or measured[0]["reason"].startswith("not installed"), rival


def test_measurement_that_hangs_is_killed_with_its_children_and_reported(monkeypatch) -> None:
    """A rival that deadlocks must cost its own figure, not the run."""
    monkeypatch.syspath_prepend(str(RUN.parent))
    import harness

    reading, writing = os.pipe()

    def hang() -> NoReturn:
        os.fork()  # both keep the pipe's end open until they are dead
        while True:
            signal.pause()

    result = harness.in_process_group(hang, timeout_s=0.5)

    os.close(writing)
    with open(reading, "rb") as pipe:
        assert pipe.read() == b""  # ends only when nobody is left to write
    assert harness.Failure("timed out after 0.5 s") == result
