"""``procession demo`` shows what it says, and notices when it does not."""

from __future__ import annotations

import argparse
import re
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import procession
from procession.cli import _wordcount, demo


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    paths = []
    for number in range(60):
        path = tmp_path / f"file{number:02}.py"
        path.write_text(f"common common word{number} " * (number + 1))
        paths.append(str(path))
    return paths


def test_whole_demonstration_ends_with_0(start_method: str) -> None:
    """The README's first command, with fewer files."""
    command = [sys.executable, "-m", "procession", "demo", "--start-method", start_method, "--files", "200"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert f"start method {start_method}" in done.stdout
    assert len(re.findall(r"^  ok: ", done.stdout, re.MULTILINE)) == 6
    assert "ProcessDiedError: worker-" in done.stdout
    assert "was killed by SIGKILL" in done.stdout
    one, several = re.findall(r"([\d,]+ words, [\d,]+ different)", done.stdout)
    assert one == several


def test_killed_worker_costs_nothing(files: list[str], start_method: str) -> None:
    lines: list[str] = []
    outcome = _wordcount.count_by_workers(
        files, procession.get_context(start_method), 3, lambda _at, text: lines.append(text)
    )
    assert {path: _wordcount.count_file(path) for path in files} == outcome.counts
    assert outcome.killed == "worker-3"
    assert outcome.held in files
    assert outcome.taken_over_by in ("worker-1", "worker-2")
    assert outcome.error is not None
    assert outcome.error.signal is signal.SIGKILL
    assert outcome.error.name == "worker-3"
    assert sum(outcome.files_of.values()) == len(files)
    assert len(lines) == 3
    assert outcome.total["common"] == 2 * sum(range(1, 61))


def test_one_survivor_is_enough(files: list[str]) -> None:
    outcome = _wordcount.count_by_workers(files, procession.get_context(), 2)
    assert outcome.taken_over_by == "worker-1"
    assert outcome.total == _wordcount.add_up({path: _wordcount.count_file(path) for path in files})


def test_worker_that_dies_unasked_is_an_error_and_no_endless_wait(files: list[str], monkeypatch) -> None:
    def fall_over(path: str) -> dict[str, int]:
        raise LookupError(f"no words in {path}")

    monkeypatch.setattr(_wordcount, "count_file", fall_over)
    with pytest.raises(LookupError, match="no words in"):
        _wordcount.count_by_workers(files, procession.get_context("fork"), 2)


def good_outcome(files: list[str]) -> tuple[_wordcount.Outcome, dict[str, dict[str, int]]]:
    alone = {path: _wordcount.count_file(path) for path in files}
    error = procession.ProcessDiedError("worker-3", 1, -9)
    outcome = _wordcount.Outcome(dict(alone), Counter(), "worker-3", files[0], "worker-1", error)
    return outcome, alone


def test_check_accepts_what_is_right(files: list[str]) -> None:
    outcome, alone = good_outcome(files)
    demo._check_count(outcome, alone, _wordcount.add_up(alone))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"error": None}, "should have been killed"),
        ({"error": procession.ProcessDiedError("worker-3", 1, -15)}, "not of SIGKILL"),
        ({"taken_over_by": ""}, "was not taken over"),
        ({"taken_over_by": "worker-3"}, "was not taken over"),
        ({"counts": {}}, "differ from the sequential ones"),
    ],
)
def test_check_notices_what_is_wrong(files: list[str], change: dict[str, object], message: str) -> None:
    outcome, alone = good_outcome(files)
    for name, value in change.items():
        setattr(outcome, name, value)
    with pytest.raises(demo.WrongError, match=message):
        demo._check_count(outcome, alone, _wordcount.add_up(alone))


def test_exit_status_is_1_when_a_part_goes_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "1_cpu_count.py").write_text("print('a million')")
    (tmp_path / "2_process.py").write_text("raise SystemExit(3)")
    monkeypatch.setattr(demo, "tutorial_directory", lambda: tmp_path)
    programs = {name: demo.PROGRAMS[name] for name in ("1_cpu_count.py", "2_process.py")}
    monkeypatch.setattr(demo, "PROGRAMS", programs)
    assert demo.main(argparse.Namespace(start_method="fork", only="tutorial", files=None)) == 1
    text = capsys.readouterr().out
    assert "WRONG: expected ['Number of cpu" in text
    assert "WRONG: 2_process.py ended with 3" in text
    assert "2 of 2 parts went wrong" in text


def test_program_that_hangs_is_ended_with_its_children(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "x.py").write_text("import os, time\nos.fork()\ntime.sleep(600)")
    monkeypatch.setattr(demo, "tutorial_directory", lambda: tmp_path)
    monkeypatch.setattr(demo, "_WATCHDOG_S", 2)
    with pytest.raises(demo.WrongError, match="did not end within 1 s"):
        demo._program("x.py", lambda _lines: "", "fork")


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("1_cpu_count.py", []),
        ("2_process.py", ["The name of continent is : Asia"]),
        ("3_queue.py", ["popping items from queue:", "item no: 0 red"]),
        ("4_process_queue_lock.py", [f"Task no {number} is done by Process-1" for number in range(4)]),
        ("4_process_queue_lock.py", [f"Task no {number} is done by Process-1" for number in (*range(10), 3)]),
        ("5_pool.py", ["Process A Finished."]),
    ],
)
def test_each_program_that_falls_short_is_noticed(name: str, lines: list[str]) -> None:
    with pytest.raises(demo.WrongError):
        demo.PROGRAMS[name](lines)


def test_too_few_files_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main(argparse.Namespace(start_method="fork", only="count", files=3)) == 1
    assert "no half-way" in capsys.readouterr().out


def test_library_files_are_the_interpreters_own() -> None:
    found = _wordcount.library_files()
    assert len(found) > 500
    assert found == sorted(found)
    assert not [path for path in found if "site-packages" in path]
    assert any(path.endswith("/asyncio/tasks.py") for path in found)
