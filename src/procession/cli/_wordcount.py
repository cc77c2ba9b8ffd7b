"""A word count by several processes, one of which is killed while it has a file in hand; nothing is lost.

The pattern is the one for work that must not be lost. A worker takes a file from a `JoinableQueue`, sends what it
counted, and only then calls ``task_done()``. A file whose worker died before that goes back to the queue. A worker that
died between the two would have its file counted again, so the parent keeps one result a file: done at least once and
counted exactly once.
"""

from __future__ import annotations

import os
import queue
import re
import signal
import sysconfig
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import procession

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.context import BaseContext
    from typing import Any

    Counts = dict[str, int]

__all__ = ["Outcome", "count_by_workers", "count_file", "library_files"]

#: Longest wait for the next result. Far more than a loaded machine needs for a file; not a target.
PATIENCE_S = 60.0

#: So long without a result, and the parent looks whether a worker has died. Arbitrary.
_LOOK_ROUND_S = 1.0

_WORD = re.compile(r"\w+")


@dataclass
class Outcome:
    """What `count_by_workers` saw.

    Attributes:
        counts: File name to its word counts, each file once.
        files_of: Worker's name to the number of files it counted.
        killed: Name of the worker that was killed.
        held: The file it had in hand.
        taken_over_by: Name of the worker that counted this file.
        error: What the killed worker's ``result()`` raised.
        repeated: Results that came a second time and were dropped.
        seconds: From the first start to the last result.
    """

    counts: dict[str, Counts] = field(default_factory=dict)
    files_of: Counter[str] = field(default_factory=Counter)
    killed: str = ""
    held: str = ""
    taken_over_by: str = ""
    error: procession.ProcessDiedError | None = None
    repeated: int = 0
    seconds: float = 0.0

    @property
    def total(self) -> Counter[str]:
        """All files' counts together."""
        return add_up(self.counts)


def library_files() -> list[str]:
    """Return every Python file of the interpreter's own library, without what was installed into it."""
    top = sysconfig.get_path("stdlib")
    found = []
    for directory, subdirectories, names in os.walk(top):
        subdirectories[:] = [name for name in subdirectories if name not in ("site-packages", "dist-packages")]
        found += [os.path.join(directory, name) for name in names if name.endswith(".py")]
    return sorted(found)


def count_file(path: str) -> Counts:
    """Count the words of one file."""
    return dict(Counter(_WORD.findall(Path(path).read_text(encoding="utf-8", errors="replace"))))


def add_up(counts: dict[str, Counts]) -> Counter[str]:
    """Add the counts of all files."""
    total: Counter[str] = Counter()
    for words in counts.values():
        total.update(words)
    return total


@dataclass(frozen=True)
class Channels:
    """What parent and workers share.

    Attributes:
        todo: JoinableQueue of file names.
        results: Queue of (kind, worker, file, counts).
        half_way: Set when half of the files are counted; from then on a worker that takes a file stops with it in hand.
        go_on: Set when one of them has been killed: the others go on.
    """

    todo: Any
    results: Any
    half_way: Any
    go_on: Any


def work(channels: Channels, victim: bool) -> int:
    """Count files until the queue is shut down; return how many.

    Args:
        channels: What is shared with the parent.
        victim: This is the one to be killed: half-way it says which file it holds, and waits.
    """
    name = procession.current_process().name
    counted = 0
    for path in channels.todo:
        if channels.half_way.is_set():
            if victim:
                channels.results.put(("holds", name, path, None))
                time.sleep(PATIENCE_S)
                raise RuntimeError("I was to be killed, and nobody has done it.")
            channels.go_on.wait(PATIENCE_S)
        channels.results.put(("counted", name, path, count_file(path)))
        channels.todo.task_done()
        counted += 1
    return counted


def count_by_workers(
    files: list[str], context: BaseContext, workers: int, log: Callable[[float, str], None] = lambda *_: None
) -> Outcome:
    """Count all files by `workers` processes, and kill the last of them half-way, with a file in hand.

    Args:
        files: The files; at least twice as many as workers.
        context: Where processes and queues come from.
        workers: Number of processes, at least 2.
        log: Called with the seconds since the start and a line of text.

    Raises:
        RuntimeError: No result came for a long time, which a kill must not bring about; or the sums do not agree.
    """
    channels = Channels(context.JoinableQueue(), context.Queue(), context.Event(), context.Event())
    processes: dict[str, Any] = {}
    for number in range(1, workers + 1):
        name, victim = f"worker-{number}", number == workers
        processes[name] = context.Process(target=work, name=name, args=(channels, victim), daemon=True)  # type: ignore[attr-defined]
    started = time.perf_counter()

    def say(text: str) -> None:
        log(time.perf_counter() - started, text)

    outcome = Outcome()
    half = len(files) // 2
    try:
        for process in processes.values():
            process.start()
        for path in files[:half]:
            channels.todo.put(path)
        _collect(outcome, half, channels, processes, say)
        channels.half_way.set()
        for path in files[half:]:
            channels.todo.put(path)
        _collect(outcome, len(files), channels, processes, say)
        channels.todo.join()  # the last task_done() may come after the last result
        channels.todo.shutdown()
        for name, process in processes.items():
            if name != outcome.killed and process.result(timeout=PATIENCE_S) != outcome.files_of[name]:
                raise RuntimeError(f"{name} counted {process.result()} files; {outcome.files_of[name]} came from it.")
    finally:
        for process in processes.values():
            if process.pid is not None:
                process.kill()
                process.join()
    outcome.seconds = time.perf_counter() - started
    return outcome


def _collect(
    outcome: Outcome, number: int, channels: Channels, processes: dict[str, Any], say: Callable[[str], None]
) -> None:
    """Take results until `number` files have one; kill the worker that says that it holds a file."""
    while len(outcome.counts) < number:
        kind, name, path, words = _next_result(outcome, channels, processes)
        if kind == "holds":
            outcome.killed, outcome.held = name, path
            outcome.error = _kill(processes[name], path, say)
            channels.go_on.set()
        elif path in outcome.counts:
            outcome.repeated += 1
        else:
            outcome.counts[path] = words
            outcome.files_of[name] += 1
            if path == outcome.held:
                outcome.taken_over_by = name
                say(f"{os.path.basename(path)} went back to the queue, and {name} has counted it")


def _next_result(outcome: Outcome, channels: Channels, processes: dict[str, Any]) -> Any:
    """Wait for the next result; not for a worker that has died and was not meant to, for that its error is raised."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        try:
            return channels.results.get(timeout=_LOOK_ROUND_S)
        except queue.Empty:
            for name, process in processes.items():
                if name != outcome.killed and not process.is_alive():
                    process.result(timeout=PATIENCE_S)  # raises what happened to it
                    raise RuntimeError(f"{name} has ended before its work was done") from None
    raise RuntimeError(f"no result for {PATIENCE_S:.0f} s; {len(outcome.counts)} files are counted")


def _kill(victim: Any, path: str, say: Callable[[str], None]) -> procession.ProcessDiedError | None:
    """Kill the worker and return what its result() raises."""
    os.kill(victim.pid, signal.SIGKILL)
    say(f"half-way: {victim.name} (pid {victim.pid}) has {os.path.basename(path)} in hand, and is sent SIGKILL")
    try:
        victim.result(timeout=PATIENCE_S)
    except procession.ProcessDiedError as error:
        say(f"its result() raises {type(error).__name__}: {error}")
        return error
    return None
