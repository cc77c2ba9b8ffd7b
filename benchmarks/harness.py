"""Measure scenarios with all their rivals in one run, and say which targets were met.

A scenario is one row of the table: for each rival a function that measures `n` operations. Rivals are interleaved
round by round (A B C, B C A, ...), so a slow minute of the machine hits all of them; a figure is the median of the
rounds and its spread is the least and the greatest round. Every measurement runs in a process group of its own that is
killed at its time limit: a rival that hangs costs its own figure only.
"""

from __future__ import annotations

import json
import mmap
import os
import select
import signal
import statistics
import subprocess
import time
import traceback
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

OURS = "procession"
#: What the rivals of the table are called on PyPI.
DISTRIBUTIONS = {
    "cloudtoid": "cloudtoid-interprocess",
    "faster-fifo": "faster-fifo",
    "loky": "loky",
    "joblib": "joblib",
    "mpire": "mpire",
    "pebble": "pebble",
    "billiard": "billiard",
    "Dask": "distributed",
    "Ray": "ray",
    "iceoryx2": "iceoryx2",
    "torch.multiprocessing": "torch",
}


@dataclass(frozen=True)
class Cost:
    """What one measurement found: seconds per operation, and how long the timed window was."""

    seconds: float
    elapsed_s: float
    p90_s: float | None = None


@dataclass(frozen=True)
class Failure:
    """Why a measurement gave no figure: 'not installed', 'timed out after 20 s', or the exception's last line."""

    reason: str


@dataclass(frozen=True)
class Target:
    """How many times faster than `rival` we must be, and aim to be; with `at_most`, how many times its cost ours is.

    Without a `must` the ratio is shown and not judged.
    """

    rival: str
    must: float | None = None
    aim: float | None = None
    at_most: bool = False


@dataclass(frozen=True)
class Scenario:
    """One row: `measure[rival](n)` performs about n operations and returns their cost."""

    name: str
    title: str
    measure: Mapping[str, Callable[[int], Cost]]
    targets: tuple[Target, ...] = ()
    # Or "time", "bytes" (seconds per byte), "memory" (bytes in the place of seconds): how the figure is shown.
    unit: str = "rate"
    start_n: int = 1000  # operations of the first trial and of --quick
    max_n: int = 20_000_000
    full_n: int | None = None  # a job of this size each time, instead of as many operations as fill the window
    most_rounds: int = 1000  # where rounds are long and alike
    more_rounds: int = 1  # times as many rounds: where the scheduler's choice of cores makes two or three clusters


@dataclass(frozen=True)
class Settings:
    """How long and how often to measure."""

    rounds: int = 9
    window_s: float = 0.3  # timed part of one measurement: long against a 4 ms scheduler tick
    timeout_s: float = 30.0  # for one measurement, start to end
    quick: bool = False  # start_n operations, no calibration: a smoke run


@dataclass
class Result:
    """All rounds of one scenario."""

    scenario: Scenario
    rounds: dict[str, list[Cost | Failure]] = field(default_factory=dict)

    def costs(self, rival: str) -> list[Cost]:
        """The rounds of `rival` that gave a figure."""
        return [one for one in self.rounds.get(rival, []) if isinstance(one, Cost)]

    def failures(self, rival: str) -> list[str]:
        """Why the other rounds gave none."""
        return [one.reason for one in self.rounds.get(rival, []) if isinstance(one, Failure)]

    def median(self, rival: str) -> float | None:
        """Median seconds per operation, None when no round gave a figure."""
        costs = self.costs(rival)
        return statistics.median(cost.seconds for cost in costs) if costs else None

    def ratio(self, target: Target) -> tuple[float, float, float] | None:
        """Ratio of the medians, and the least and greatest ratio of a single round; None without figures."""
        ours, theirs = self.median(OURS), self.median(target.rival)
        if ours is None or theirs is None:
            return None
        pairs = [
            theirs_i.seconds / ours_i.seconds
            for ours_i, theirs_i in zip(self.rounds[OURS], self.rounds[target.rival], strict=True)
            if isinstance(ours_i, Cost) and isinstance(theirs_i, Cost)
        ] or [theirs / ours]
        values = (theirs / ours, min(pairs), max(pairs))
        if target.at_most:
            return (1 / values[0], 1 / values[2], 1 / values[1])
        return values


def run(scenario: Scenario, settings: Settings) -> Result:
    """Measure every rival of the scenario, interleaved.

    Args:
        scenario: What to measure.
        settings: Rounds, window and time limit.

    Returns:
        Every round of every rival, failures included.
    """
    result = Result(scenario, {rival: [] for rival in scenario.measure})
    sizes = {rival: _calibrate(scenario, measure, settings) for rival, measure in scenario.measure.items()}
    rivals = list(scenario.measure)
    for turn in range(min(settings.rounds * scenario.more_rounds, scenario.most_rounds)):
        first = turn % len(rivals)
        for rival in rivals[first:] + rivals[:first]:
            size = sizes[rival]
            if isinstance(size, Failure):
                result.rounds[rival].append(size)
                continue
            measured = in_process_group(
                lambda rival=rival, size=size: scenario.measure[rival](size), settings.timeout_s
            )
            result.rounds[rival].append(measured)
            if isinstance(measured, Failure) and scenario.full_n:
                sizes[rival] = measured  # the same job would fail again, and a time limit each
    return result


def _calibrate(scenario: Scenario, measure: Callable[[int], Cost], settings: Settings) -> int | Failure:
    """How many operations fill the window; the first trial also warms caches and page tables."""
    size = scenario.start_n
    for _ in range(4):
        trial = in_process_group(lambda size=size: measure(size), settings.timeout_s)
        if isinstance(trial, Failure):
            return trial
        if settings.quick or scenario.full_n or trial.elapsed_s >= settings.window_s / 2:
            break
        # At most 30 times as many at once: the first trial is short and so a poor guess.
        growth = min(settings.window_s / max(trial.elapsed_s, 1e-6), 30.0)
        size = min(int(size * growth) + 1, scenario.max_n)
    return size if settings.quick else scenario.full_n or size


def use_all_memory() -> None:
    """Have most of the memory that is free, and that may be used, used once and given back.

    The host of a virtual machine brings it when it is used for the first time, which takes ten times as long as the kernel takes
    for a page of its own; whoever gets such pages would lose.
    """
    pid = os.fork()
    if pid == 0:
        try:
            Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
            import procession

            free = min(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), procession.memory().limit)
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_POPULATE", 0)
            mmap.mmap(-1, int(free * 0.85), flags=flags)
        finally:
            os._exit(0)
    os.waitpid(pid, 0)


def in_process_group(measure: Callable[[], Cost], timeout_s: float) -> Cost | Failure:
    """Run `measure` in a forked process that leads a session of its own; kill that group afterwards, whatever happened.

    Args:
        measure: Returns the cost; may start children.
        timeout_s: Limit for all of it, in seconds.

    Returns:
        The cost, or why there is none.
    """
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.setsid()
        # Our handler, which raises, would be the rivals' too: a worker that is told to end just before it waits in C
        # would note it and wait for ever.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.close(reading)
        _report(measure, writing)
    os.close(writing)
    try:
        ready, _, _ = select.select([reading], [], [], timeout_s)
        # One write of less than PIPE_BUF bytes: it arrives whole, or not at all when the process died.
        text = os.read(reading, select.PIPE_BUF) if ready else None
    finally:
        os.close(reading)
        # The leader is not reaped yet, so the group cannot be somebody else's. Before setsid() there is none.
        try:
            os.killpg(pid, signal.SIGKILL)
        except ProcessLookupError:
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
    if text is None:
        return Failure(f"timed out after {timeout_s:g} s")
    if not text:
        return Failure(f"died with wait status {status}")
    answer = json.loads(text)
    return Failure(answer["failure"]) if "failure" in answer else Cost(**answer)


def _report(measure: Callable[[], Cost], writing: int) -> None:
    """Child's side of in_process_group: measure, write the answer, leave without any clean-up."""
    try:
        answer = vars(measure())
    except ModuleNotFoundError as missing:
        answer = {"failure": f"not installed ({missing.name})"}
    except BaseException as error:
        if os.environ.get("BENCHMARK_TRACEBACK"):
            traceback.print_exc()
        answer = {"failure": traceback.format_exception_only(error)[-1].strip()[:500]}
    os.write(writing, json.dumps(answer).encode())
    os._exit(0)


# --- what is printed ------------------------------------------------------------------------------------------------


def show(cost_s: float, unit: str) -> str:
    """A figure to three digits: operations a second for 'rate', gigabytes a second for 'bytes', megabytes for 'memory', else a time."""
    if unit == "bytes":
        return f"{1 / cost_s / 1e9:.3g} GB/s"
    if unit == "rate":
        rate = 1 / cost_s
        for factor, suffix in ((1e6, " M/s"), (1e3, " k/s")):
            if rate >= factor:
                return f"{rate / factor:.3g}{suffix}"
        return f"{rate:.3g} /s"
    if unit == "memory":
        return f"{cost_s / 1e6:.3g} MB"
    for factor, suffix in ((1.0, " s"), (1e-3, " ms"), (1e-6, " us")):
        if cost_s >= factor:
            return f"{cost_s / factor:.3g}{suffix}"
    return f"{cost_s / 1e-9:.3g} ns"


def figure(result: Result, rival: str) -> str:
    """Median (least-greatest) of one rival, p90 where measured, and what failed."""
    median, unit = result.median(rival), result.scenario.unit
    failures = result.failures(rival)
    if median is None:
        return failures[0] if failures else "-"
    costs = result.costs(rival)
    text = show(median, unit)
    if len(costs) > 1:
        ends = sorted((cost.seconds for cost in costs), reverse=unit in {"rate", "bytes"})
        text += f" ({show(ends[0], unit)} - {show(ends[-1], unit)})"
    tails = [cost.p90_s for cost in costs if cost.p90_s is not None]
    if tails:
        text += f", p90 {show(statistics.median(tails), unit)}"
    if failures:
        text += f"; {len(failures)} of {len(result.rounds[rival])} rounds failed: {failures[0]}"
    return text


def verdict(result: Result, target: Target) -> tuple[str, str]:
    """The measured ratio with its spread, and 'aim met', 'met', 'MISSED' or why it is unknown."""
    ratio = result.ratio(target)
    if ratio is None:
        failed = OURS if result.median(OURS) is None else target.rival
        return "-", f"no figure: {failed} {figure(result, failed)}"
    value, least, greatest = ratio
    text = f"{value:.3g}x ({least:.3g} - {greatest:.3g})"
    if target.must is None or target.aim is None:
        word = ""
    elif target.at_most:
        word = "aim met" if value <= target.aim else "met" if value <= target.must else "MISSED"
    else:
        word = "aim met" if value >= target.aim else "met" if value >= target.must else "MISSED"
    if result.failures(OURS):
        word += f", but {len(result.failures(OURS))} of our rounds failed"
    return text, word


def floors(target: Target) -> str:
    """Must and aim as two cells."""
    if target.must is None or target.aim is None:
        return "- | -"
    sign = "<= " if target.at_most else ""
    return f"{sign}{target.must:g}x | {sign}{target.aim:g}x"


def pin(cores: Sequence[int] | None, role: int) -> None:
    """Keep the calling process on the core of its role; without cores, leave it to the scheduler."""
    if cores:
        os.sched_setaffinity(0, {cores[role]})


def by_placement(
    measure: Callable[[tuple[int, int] | None], Mapping[str, Callable[[int], Cost]]],
    free: Scenario,
) -> list[Scenario]:
    """A row for processes placed by the scheduler, judged, and rows for both on one core and on two, only shown.

    A wake-up costs several times as much from core to core as on one core, and the scheduler decides anew in each
    round: only with the cores given are two rounds of a ping-pong alike. So the judged row gets more rounds.

    Args:
        measure: Gives the rivals' functions for a pair of cores, or None for any.
        free: The judged row; its own `measure` is replaced.
    """
    first, *others = sorted(os.sched_getaffinity(0))
    places = {"together": (first, first), **({"apart": (first, others[0])} if others else {})}
    shown = tuple(Target(target.rival) for target in free.targets)
    return [
        replace(free, measure=measure(None), more_rounds=3),
        *(
            replace(
                free, name=f"{free.name}-{place}", title=f"{free.title}; {place}", measure=measure(cores), targets=shown
            )
            for place, cores in places.items()
        ),
    ]


def tables(results: Sequence[Result]) -> str:
    """Two Markdown tables: targets with their verdicts, then every figure."""
    lines = ["| scenario | against | must | aim | measured (spread of rounds) | |", "|---|---|---|---|---|---|"]
    for result in results:
        for target in result.scenario.targets:
            text, word = verdict(result, target)
            lines.append(f"| {result.scenario.title} | {target.rival} | {floors(target)} | {text} | {word} |")
    lines += ["", "| scenario | who | median (least - greatest round) |", "|---|---|---|"]
    lines += [
        f"| {result.scenario.title} | {rival} | {figure(result, rival)} |"
        for result in results
        for rival in result.scenario.measure
    ]
    return "\n".join(lines)


def machine() -> dict[str, str]:
    """Where and on what this run was made."""
    model = next(
        (line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        os.uname().machine,
    )
    facts = {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "machine": f"{model}, {len(os.sched_getaffinity(0))} usable cores, Linux {os.uname().release}",
        "load": " ".join(f"{load:.2f}" for load in os.getloadavg()),
        "python": _python(),
        "commit": commit(),
    }
    facts.update({name: _version(distribution) for name, distribution in DISTRIBUTIONS.items()})
    return facts


def commit() -> str:
    """The checked-out commit, marked when src/ or native/ differ from it."""
    root = Path(__file__).resolve().parent.parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("-modified" if git("status", "--short", "src", "native") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _python() -> str:
    import platform

    return f"{platform.python_implementation()} {platform.python_version()}"


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


def _lines(path: str) -> list[str]:
    return Path(path).read_text(encoding="utf-8").splitlines()
