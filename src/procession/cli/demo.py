"""``procession demo``: the tutorial's programs, and a word count in which one worker is killed on purpose."""

from __future__ import annotations

import faulthandler
import functools
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import procession
from procession.cli import _wordcount

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

__all__ = ["add_parser", "main"]

#: The tutorial's pauses are shortened so many times: 6 seconds of its pool become a third of a second.
_SPEED = 20

#: When the demonstration has not ended by then something hangs: print where, and give up. Usual: 5 to 10 s.
_WATCHDOG_S = 120.0

#: Runs a program unchanged, under a start method that it does not choose itself.
_LAUNCH = """
import runpy, sys, procession
_, path, method = sys.argv
procession.set_start_method(method)
sys.argv = [path]
runpy.run_path(path, run_name="__main__")
"""

COLORS = ["red", "green", "blue", "black"]


class WrongError(Exception):
    """The demonstration did not show what it should."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the ``demo`` command."""
    parser = subparsers.add_parser(
        "demo",
        help="run the tutorial, then a word count with one worker killed half-way",
        description="Run the tutorial's programs, then a word count over every .py file of the interpreter's own library "
        "in which one worker is killed half-way. The exit status is 1 when anything is not as it should be.",
    )
    parser.add_argument("--start-method", choices=["fork", "forkserver", "spawn"], help="default: this interpreter's")
    parser.add_argument("--only", choices=["tutorial", "count"], help="run one half of it")
    parser.add_argument("--files", type=int, metavar="N", help="count the first N files only")


def main(args: argparse.Namespace) -> int:
    """Run the demonstration; 0 when everything was as it should be."""
    method = str(args.start_method or procession.get_start_method())
    limits = procession.cpu_limits()
    _say(f"procession {procession.__version__} on Python {platform.python_version()}, Linux {platform.release()}")
    _say(f"{limits.cpus} CPUs (decided by: {limits.decided_by.name}), start method {method}")
    started = time.perf_counter()
    parts: list[Callable[[], None]] = []
    if args.only != "count":
        parts += [functools.partial(_program, name, check, method) for name, check in PROGRAMS.items()]
    if args.only != "tutorial":
        parts.append(functools.partial(_count, method, args.files))
    faulthandler.dump_traceback_later(_WATCHDOG_S, exit=True, file=sys.__stderr__ or 2)
    problems = 0
    try:
        for part in parts:
            try:
                part()
            except Exception as error:  # the other parts are worth seeing all the same
                problems += 1
                _say(f"  WRONG: {error if isinstance(error, WrongError) else f'{type(error).__name__}: {error}'}")
    finally:
        faulthandler.cancel_dump_traceback_later()
    _say("")
    verdict = "Everything was as it should be" if not problems else f"{problems} of {len(parts)} parts went wrong"
    _say(f"{verdict}, in {time.perf_counter() - started:.1f} s.")
    return 1 if problems else 0


def _say(text: str) -> None:
    print(text, flush=True)


# --- the tutorial


def tutorial_directory() -> Path:
    """Return where the tutorial's programs are: installed beside the package, or in the source tree."""
    package = Path(procession.__file__).parent
    for directory in (package / "_examples" / "tutorial", package.parents[1] / "examples" / "tutorial"):
        if (directory / "1_cpu_count.py").is_file():
            return directory
    raise WrongError(f"the tutorial's programs are not installed (looked in {package / '_examples'})")


def _program(name: str, check: Callable[[list[str]], str], method: str) -> None:
    _say(f"\n$ python examples/tutorial/{name}")
    path = tutorial_directory() / name
    environment = {**os.environ, "TUTORIAL_SPEED": str(_SPEED)}
    environment.pop("PYTHONUNBUFFERED", None)  # with it, print() writes a line in pieces, and those of processes mix
    child = subprocess.Popen(
        [sys.executable, "-c", _LAUNCH, str(path), method],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,  # a group of its own, so that a program that hangs is ended with its children
    )
    try:
        output, _ = child.communicate(timeout=_WATCHDOG_S / 2)
    except subprocess.TimeoutExpired:
        raise WrongError(f"{name} did not end within {_WATCHDOG_S / 2:.0f} s") from None
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.communicate()
    lines = output.splitlines()
    for line in lines:
        _say(f"  | {line}")
    if child.returncode != 0:
        raise WrongError(f"{name} ended with {child.returncode}")
    _say(f"  ok: {check(lines)}")


def _check_cpu_count(lines: list[str]) -> str:
    _expect([f"Number of cpu : {procession.cpu_count()}"], lines)
    return "the CPUs this program can use, not those the machine has"


def _check_process(lines: list[str]) -> str:
    _expect([f"The name of continent is : {name}" for name in ("Africa", "America", "Asia", "Europe")], sorted(lines))
    return "four processes, one of them with the default"


def _check_queue(lines: list[str]) -> str:
    popped = lines[lines.index("popping items from queue:") + 1 :]
    _expect([f"item no: {number} {color}" for number, color in enumerate(COLORS)], popped)
    return "four in, four out; empty() told the truth"


def _check_tasks(lines: list[str]) -> str:
    done = [match for line in lines if (match := re.fullmatch(r"(Task no \d) is done by (\S+)", line))]
    _expect([f"Task no {number}" for number in range(10)], sorted(match[1] for match in done))
    shares = sorted(Counter(match[2] for match in done).items())
    return "ten tasks, each done once: " + ", ".join(f"{name} did {count}" for name, count in shares)


def _check_pool(lines: list[str]) -> str:
    _expect([f"Process {name} Finished." for name in "ABCD"], sorted(line for line in lines if "Finished" in line))
    return "four jobs by two processes"


def _expect(expected: list[str], actual: list[str]) -> None:
    if expected != actual:
        raise WrongError(f"expected {expected}, got {actual}")


PROGRAMS: dict[str, Callable[[list[str]], str]] = {
    "1_cpu_count.py": _check_cpu_count,
    "2_process.py": _check_process,
    "3_queue.py": _check_queue,
    "4_process_queue_lock.py": _check_tasks,
    "5_pool.py": _check_pool,
}


# --- the word count


def _count(method: str, limit: int | None) -> None:
    files = _wordcount.library_files()[:limit]
    if len(files) < 20:
        raise WrongError(f"only {len(files)} files to count; with fewer than 20 there is no half-way")
    size_bytes = sum(os.path.getsize(path) for path in files)
    # One more than there are CPUs, since one of them will be killed; more than 9 only make the output long.
    workers = min(procession.cpu_count(), 8) + 1
    _say(f"\nThe words of this Python's own library: {len(files):,} files, {size_bytes / 2**20:.1f} MiB")

    started = time.perf_counter()
    alone = {path: _wordcount.count_file(path) for path in files}
    expected = _wordcount.add_up(alone)
    _say(f"  one process           {_totals(expected)}, {time.perf_counter() - started:.2f} s")
    _say(f"  {workers} workers, fed by a JoinableQueue:")

    context = procession.get_context(method)
    outcome = _wordcount.count_by_workers(files, context, workers, lambda at, text: _say(f"    {at:6.2f} s  {text}"))
    shares = ", ".join(f"{name} {count:,}" for name, count in sorted(outcome.files_of.items()))
    _say(f"    {outcome.seconds:6.2f} s  done; files counted: {shares}")
    _say(f"  {workers} workers, {workers - 1} alive      {_totals(outcome.total)}, {outcome.seconds:.2f} s")
    _check_count(outcome, alone, expected)
    common = ", ".join(f"{word} {count:,}" for word, count in expected.most_common(5))
    _say(f"  ok: equal, file by file and word by word. The most common: {common}")


def _totals(counts: Counter[str]) -> str:
    return f"{sum(counts.values()):,} words, {len(counts):,} different"


def _check_count(outcome: _wordcount.Outcome, alone: dict[str, dict[str, int]], expected: Counter[str]) -> None:
    if outcome.counts != alone or outcome.total != expected:
        wrong = [path for path in alone if outcome.counts.get(path) != alone[path]]
        raise WrongError(
            f"the workers' counts differ from the sequential ones in {len(wrong)} files, first in {wrong[:1]}"
        )
    if outcome.error is None:
        raise WrongError(
            f"a worker should have been killed; it was {outcome.killed or 'none'}, and its result() did not say so"
        )
    if outcome.error.signal is not signal.SIGKILL:
        raise WrongError(f"the worker died of {outcome.error.signal}, not of SIGKILL")
    if outcome.taken_over_by in ("", outcome.killed):
        raise WrongError(f"{outcome.held}, which the killed worker held, was not taken over")
