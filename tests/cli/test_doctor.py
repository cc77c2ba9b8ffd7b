"""``procession doctor`` tells what is there, and fails when something does not work."""

from __future__ import annotations

import argparse
import errno
import json
import os
import platform
import resource
import subprocess
import sys

import pytest

import procession
from procession.cli import doctor

SECTIONS = ["The system", "Limits", "Processes", "Shared memory"]


def run(*arguments: str, limit: tuple[int, int] | None = None) -> subprocess.CompletedProcess[str]:
    def before() -> None:
        if limit is not None:
            resource.setrlimit(limit[0], (limit[1], limit[1]))

    return subprocess.run(
        [sys.executable, "-m", "procession", "doctor", *arguments],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=before,
    )


def test_doctor_prints_every_section_and_ends_with_0() -> None:
    done = run()
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    lines = done.stdout.splitlines()
    assert SECTIONS == [line for line in lines if line in SECTIONS]
    assert "Everything works here" in lines[-1]


def test_doctor_stays_within_the_width_of_a_terminal() -> None:
    assert [line for line in run().stdout.splitlines() if len(line) > 130] == []


def test_json_says_the_same_for_programs() -> None:
    done = run("--json")
    answer = json.loads(done.stdout)
    assert answer["ok"] is True
    found = {finding["name"]: finding for finding in answer["findings"]}
    assert found["CPUs"]["data"]["cpus"] == procession.cpu_count()
    assert found["CPUs"]["data"]["decided_by"] in ("machine", "affinity", "cgroup", "python")
    assert found["memory"]["data"]["size_bytes"] == procession.memory_limit()
    assert {"fork", "spawn", "forkserver"} <= set(found)
    assert {finding["level"] for finding in answer["findings"]} <= {"ok", "note", "slow"}
    for name in ("kernel", "python", "start method", "arena", "memfd_create", "futex", "/dev/shm", "RLIMIT_NOFILE"):
        assert name in found


def test_low_limits_are_noted() -> None:
    done = run("--json", limit=(resource.RLIMIT_NOFILE, 200))
    found = {finding["name"]: finding for finding in json.loads(done.stdout)["findings"]}
    assert (found["RLIMIT_NOFILE"]["level"], found["RLIMIT_NOFILE"]["data"]["soft"]) == ("note", 200)
    assert "ulimit -n" in found["RLIMIT_NOFILE"]["advice"]


def test_refused_memfd_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """As under a seccomp filter: nothing of procession works, and the exit status must say so."""

    def refuse(*_arguments: object) -> int:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "memfd_create", refuse)
    monkeypatch.setattr(os, "pidfd_open", refuse)
    memfd, futex, pidfd = doctor._system_calls()
    assert (memfd.level, futex.level, pidfd.level) == ("fail", "ok", "slow")
    assert "seccomp" in memfd.advice


def test_exit_status_is_1_when_something_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> list[doctor.Finding]:
        raise OSError("the disk is on fire")

    monkeypatch.setattr(doctor, "SECTIONS", {"The system": [doctor._kernel, broken]})
    assert doctor.main(argparse.Namespace(json=False)) == 1
    text = capsys.readouterr().out
    assert "! broken                 OSError: the disk is on fire" in text
    assert "1 of 2 things do not work here" in text
    assert doctor.main(argparse.Namespace(json=True)) == 1
    assert json.loads(capsys.readouterr().out)["ok"] is False


@pytest.mark.parametrize(
    ("release", "level"), [("4.19.0-27-amd64", "slow"), ("5.4.0", "ok"), ("6.18.44", "ok"), ("strange", "ok")]
)
def test_old_kernel_is_said(monkeypatch: pytest.MonkeyPatch, release: str, level: str) -> None:
    monkeypatch.setattr(platform, "release", lambda: release)
    assert [level] == [finding.level for finding in doctor._kernel()]


def test_part_of_a_cpu_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    from procession._proc.limit_report import CpuLimits, Limit

    limits = CpuLimits(
        Limit("machine", 8, ""),
        Limit("affinity", 8, ""),
        Limit("cgroup", 2, "cpu.max"),
        Limit("python", None, ""),
        1.5,
        4,
    )
    monkeypatch.setattr(procession, "cpu_limits", lambda: limits)
    [finding] = doctor._cpus()
    assert finding.level == "note"
    assert "1.5 CPUs is rounded up to 2" in finding.advice


def test_start_method_that_fails_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def kill_yourself() -> None:
        os.kill(os.getpid(), 9)

    monkeypatch.setattr(doctor, "_answer", kill_yourself)
    finding = doctor._try_start("fork", "fork")
    assert finding.level == "fail"
    assert "SIGKILL" in finding.value


def test_cloudpickle_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    assert "notebook" in doctor._neighbours()[0].advice
