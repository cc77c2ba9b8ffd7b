"""``procession doctor``: what this machine gives to procession, and what would be slow or fail here, and why."""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import json
import mmap
import os
import platform
import resource
import statistics
import sys
import textwrap
import time
from dataclasses import asdict, dataclass, field

import procession
from procession._proc.limit_report import format_bytes

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable
    from typing import Any

__all__ = ["Finding", "add_parser", "examine", "main"]

#: A child that has not answered by then will not: the machine refuses, or something hangs.
_PATIENCE_S = 60.0

#: Linux 5.4 is the oldest kernel procession is made for: the first long-term one with pidfd_open() (5.3).
_OLDEST_KERNEL = (5, 4)

#: Each process needs three to six descriptors in its parent. Fewer than these are used up by some dozens.
_FEW_FILES = 256

#: Each process is one, and each thread of it. Arbitrary; a shell and its programs need some dozens themselves.
_FEW_PROCESSES = 256

#: System call numbers of futex(2), for the machines procession is made for.
_SYS_FUTEX = {"x86_64": 202, "aarch64": 98}
_FUTEX_WAKE = 1

_SHM = "/dev/shm"  # noqa: S108 - looked at, not used

#: Programs that also run things in parallel, with what a user of procession may want to know of each.
_NEIGHBOURS = {
    "cloudpickle": "functions of __main__, notebook cells and closures travel by value",
    "joblib": "its own workers (loky); procession's contexts can be given to its multiprocessing backend",
    "loky": "joblib's executor",
    "torch": "DataLoader(multiprocessing_context=procession.get_context(...))",
    "ray": "not used by this version",
    "dask": "not used by this version",
    "distributed": "not used by this version",
}


@dataclass
class Finding:
    """One thing looked at.

    Attributes:
        section: The heading it stands under.
        name: What was looked at.
        value: What was found, for people.
        level: "ok", "note" (good to know), "slow" (works, slowly) or "fail" (does not work here).
        advice: Why it matters and what to do; "" when all is well.
        data: The same for programs, in ``--json``.
    """

    section: str
    name: str
    value: str
    level: str = "ok"
    advice: str = ""
    data: dict[str, Any] = field(default_factory=dict)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the ``doctor`` command."""
    parser = subparsers.add_parser(
        "doctor",
        help="show limits, start method and what would be slow or fail here",
        description="Look at the kernel, the limits on CPUs and memory, the start methods and the arena, and say what "
        "would be slow or fail on this machine, and why. The exit status is 1 when something does not work.",
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def main(args: argparse.Namespace) -> int:
    """Print all findings; 1 when one of them is a failure."""
    findings = examine()
    failed = [finding for finding in findings if finding.level == "fail"]
    if args.json:
        print(json.dumps({"ok": not failed, "findings": [asdict(finding) for finding in findings]}, indent=2))
    else:
        print(report(findings))
    return 1 if failed else 0


def examine() -> list[Finding]:
    """Look at everything; a look that itself fails becomes a finding."""
    findings: list[Finding] = []
    for section, looks in SECTIONS.items():
        for look in looks:
            try:
                found = look()
            except Exception as error:  # a doctor that falls over helps nobody
                name = look.__name__.strip("_").replace("_", " ")
                found = [Finding("", name, f"{type(error).__name__}: {error}", "fail", "This look itself failed.")]
            for finding in found:
                finding.section = section
            findings += found
    return findings


def report(findings: list[Finding]) -> str:
    """Lay the findings out as text, 100 columns at most."""
    marks = {"ok": " ", "note": "i", "slow": "~", "fail": "!"}
    lines: list[str] = []
    section = ""
    for finding in findings:
        if finding.section != section:
            section = finding.section
            lines += ["", section]
        indent = " " * 25
        first, *more = finding.value.splitlines() or [""]
        lines.append(f"{marks[finding.level]} {finding.name:<22} {first}".rstrip())
        lines += [indent + line.rstrip() for line in more]
        lines += textwrap.wrap(finding.advice, 100, initial_indent=indent, subsequent_indent=indent)
    counts = {level: sum(finding.level == level for finding in findings) for level in marks}
    if counts["fail"]:
        verdict = f"{counts['fail']} of {len(findings)} things do not work here: the lines with a !"
    elif counts["slow"]:
        verdict = "Everything works here; the lines with a ~ are slower than they need be."
    else:
        verdict = "Everything works here."
    return "\n".join([*lines[1:], "", verdict])


# --- the system


def _kernel() -> list[Finding]:
    release = platform.release()
    numbers = tuple(int(part) for part in release.split("-")[0].split(".")[:2] if part.isdecimal())
    old = len(numbers) == 2 and numbers < _OLDEST_KERNEL
    advice = f"procession is made for Linux {'.'.join(map(str, _OLDEST_KERNEL))} and later." if old else ""
    return [
        Finding(
            "",
            "kernel",
            f"Linux {release}, {platform.machine()}",
            "slow" if old else "ok",
            advice,
            {"release": release},
        )
    ]


def _python() -> list[Finding]:
    free_threaded = not getattr(sys, "_is_gil_enabled", lambda: True)()
    text = (
        f"{platform.python_implementation()} {platform.python_version()}{', without the GIL' if free_threaded else ''}"
    )
    findings = [
        Finding("", "procession", procession.__version__, data={"version": procession.__version__}),
        Finding("", "python", f"{text}, {sys.executable}", data={"version": platform.python_version()}),
    ]
    if free_threaded:
        findings[1].level, findings[1].advice = "note", "procession is not yet tested on a free-threaded build."
    return findings


def _system_calls() -> list[Finding]:
    """Try each system call the core stands on; an old container's seccomp filter may refuse it."""
    return [_try_call("memfd_create", _try_memfd), _try_call("futex", _try_futex), _try_call("pidfd_open", _try_pidfd)]


def _try_call(name: str, attempt: Callable[[], str]) -> Finding:
    needed = name != "pidfd_open"
    try:
        return Finding("", name, attempt())
    except OSError as error:
        if needed:
            advice = (
                "Nothing of procession works without it. In a container: a newer runtime, or another seccomp profile."
            )
            return Finding("", name, f"refused: {error}", "fail", advice)
        advice = "The death of a process is looked up in /proc instead, which is slower."
        return Finding("", name, f"refused: {error}", "slow", advice)


def _try_memfd() -> str:
    fd = os.memfd_create("procession-doctor", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, mmap.PAGESIZE)
        mmap.mmap(fd, mmap.PAGESIZE).close()
    finally:
        os.close(fd)
    return "available"


def _try_futex() -> str:
    number = _SYS_FUTEX.get(platform.machine())
    if number is None:
        return f"not tried: its number on {platform.machine()} is not known"
    libc = ctypes.CDLL(None, use_errno=True)
    word = ctypes.c_uint32(0)
    if libc.syscall(number, ctypes.byref(word), _FUTEX_WAKE, 1, None, None, 0) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return "available"


def _try_pidfd() -> str:
    os.close(os.pidfd_open(os.getpid()))
    return "available"


# --- limits


def _cpus() -> list[Finding]:
    limits = procession.cpu_limits()
    finding = Finding(
        "", "CPUs", str(limits), data={"cpus": limits.cpus, "decided_by": limits.decided_by.name, **asdict(limits)}
    )
    if limits.cpus == 1:
        finding.level, finding.advice = (
            "slow",
            "With one CPU, processes take turns: work that computes gains nothing from them.",
        )
    elif limits.quota is not None and limits.quota < limits.cpus:
        finding.level = "note"
        finding.advice = f"The quota of {limits.quota:g} CPUs is rounded up to {limits.cpus}: with all of them busy the kernel pauses the program now and then."
    return [finding]


def _memory() -> list[Finding]:
    limits = procession.memory_limits()
    data = {"size_bytes": limits.size_bytes, "decided_by": limits.decided_by.name, **asdict(limits)}
    finding = Finding("", "memory", str(limits), data=data)
    if limits.address_space.value is not None:
        finding.level = "note"
        finding.advice = "RLIMIT_AS counts reserved addresses, not memory in use, and so also the arena's reservation, which shrinks to fit."
    return [finding]


def _resource_limits() -> list[Finding]:
    findings = []
    for name, too_few, advice in (
        ("NOFILE", _FEW_FILES, "Each process needs a few descriptors in its parent: ulimit -n raises this."),
        ("NPROC", _FEW_PROCESSES, "Each process and each thread of this user counts: ulimit -u raises this."),
        ("FSIZE", None, "The arena is a file in memory and cannot grow beyond this: ulimit -f unlimited."),
        ("AS", None, "The arena reserves addresses, and reserves fewer of them here: ulimit -v unlimited."),
    ):
        soft, hard = resource.getrlimit(getattr(resource, f"RLIMIT_{name}"))
        unlimited = soft == resource.RLIM_INFINITY
        little = not unlimited and (too_few is None or soft < too_few)
        shown = "unlimited" if unlimited else f"{soft:,}{'' if hard == soft else ' (could be raised)'}"
        data = {"soft": None if unlimited else soft, "hard": None if hard == resource.RLIM_INFINITY else hard}
        findings.append(
            Finding("", f"RLIMIT_{name}", shown, "note" if little else "ok", advice if little else "", data)
        )
    return findings


def _dev_shm() -> list[Finding]:
    try:
        stat = os.statvfs(_SHM)
    except OSError as error:
        return [Finding("", _SHM, f"not there ({error.strerror})", "note", _DEV_SHM)]
    size_bytes = stat.f_blocks * stat.f_frsize
    small = size_bytes < 2**28
    value = f"{size_bytes / 2**20:,.0f} MiB; procession does not use it (its memory is a memfd)"
    return [Finding("", _SHM, value, "note" if small else "ok", _DEV_SHM if small else "", {"size_bytes": size_bytes})]


_DEV_SHM = "Queues, locks and events are not bound by it. multiprocessing.shared_memory and libraries that use it are: with Docker, --shm-size."


# --- processes


def _start_methods() -> list[Finding]:
    """Start a process by each method and look how long it takes."""
    default = procession.get_start_method(allow_none=True) or procession.get_all_start_methods()[0]
    why = (
        "set by the program"
        if procession.get_start_method(allow_none=True)
        else f"the default of Python {sys.version_info[0]}.{sys.version_info[1]}"
    )
    findings = [Finding("", "start method", f"{default} ({why})", data={"start_method": default})]
    return findings + [_try_start(method, default) for method in procession.get_all_start_methods()]


def _answer() -> int:
    return os.getpid()


def _try_start(method: str, default: str) -> Finding:
    context: Any = procession.get_context(method)
    times_s = []
    for _ in range(4):  # the first one also starts the fork server; it is not counted
        started = time.perf_counter()
        process = context.Process(target=_answer)
        try:
            process.start()
            process.result(timeout=_PATIENCE_S)
            process.join(_PATIENCE_S)
        except Exception as error:
            if process.pid is not None:
                process.kill()
                process.join()
            return Finding(
                "", method, f"{type(error).__name__}: {error}", "fail", "Processes cannot be started this way here."
            )
        times_s.append(time.perf_counter() - started)
    typical_ms = statistics.median(times_s[1:]) * 1000
    finding = Finding(
        "",
        method,
        f"{typical_ms:.1f} ms to start a process, have its result and join it",
        data={"median_ms": typical_ms},
    )
    if method == default and typical_ms > 100:
        finding.level, finding.advice = "slow", "Give each process more to do, or reuse processes (Pool)."
    return finding


def _threads() -> list[Finding]:
    count = len(os.listdir("/proc/self/task"))
    value = f"{count} in this process"
    advice = (
        "fork copies only the thread that calls it: a lock that another thread holds (of logging, BLAS, gRPC) stays locked in the child for "
        "ever. Start processes before threads, or use forkserver."
    )
    if sys.version_info >= (3, 12):
        advice += " Python warns of it since 3.12."
    return [Finding("", "fork and threads", value, "note", advice, {"threads": count})]


# --- the arena


def _primitives() -> list[Finding]:
    """Use a lock and a queue once: they work, or they do not."""
    started = time.perf_counter()
    queue: Any = procession.Queue()
    with procession.Lock():
        for number in range(1000):
            queue.put(number)
            if queue.get(timeout=_PATIENCE_S) != number:
                return [Finding("", "queue and lock", "a queue gave back something else than was put", "fail")]
    seconds = time.perf_counter() - started
    return [
        Finding(
            "",
            "queue and lock",
            f"work; put() and get() together {seconds * 1000:.1f} µs",
            data={"put_get_us": seconds * 1000},
        )
    ]


def _arena() -> list[Finding]:
    memory = procession.memory()._asdict()
    del memory["holders"]
    counts, apart = ("blocks", "objects", "processes"), ("segments", "in_messages")
    shown = ", ".join(
        f"{name} {f'{value:,}' if name in counts else format_bytes(value)}"
        for name, value in memory.items()
        if name not in apart
    )
    return [Finding("", "arena", shown, data=memory)]


# --- what else is installed


def _neighbours() -> list[Finding]:
    findings = []
    for name, remark in _NEIGHBOURS.items():
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        findings.append(Finding("", name, f"{version}: {remark}", data={"version": version}))
    if importlib.util.find_spec("cloudpickle") is None:
        advice = "Functions of notebook cells, lambdas and closures cannot be sent to a process that was not forked: pip install cloudpickle."
        findings.insert(0, Finding("", "cloudpickle", "not installed", "slow", advice))
    return findings


SECTIONS: dict[str, list[Callable[[], list[Finding]]]] = {
    "The system": [_python, _kernel, _system_calls],
    "Limits": [_cpus, _memory, _resource_limits, _dev_shm],
    "Processes": [_start_methods, _threads],
    "Shared memory": [_primitives, _arena],
    "Also installed": [_neighbours],
}
