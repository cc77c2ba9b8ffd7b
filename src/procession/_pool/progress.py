"""Showing how far a mapping is: a line on a terminal or in a notebook, rich or tqdm where they are wanted, plain lines in a log.

`advance` counts and does nothing else: it is called for every part that is delivered. The engine asks by `tick`, at each of
its looks around, whether it is time to draw; so there is no thread, and no clock on the way of an item. Whatever drawing
raises ends the drawing and nothing else.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import math
import os
import select
import shutil
import sys
import threading
import time
import weakref
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TextIO

__all__ = ["Progress", "Rate", "make_progress"]

# So often a terminal is drawn on: more cannot be read.
_DRAW_S = 0.1
# So often a log gets a line: seldom enough to be read, often enough for those who end what is silent for minutes.
_LOG_S = 30.0
# The rate shown is that of about so many last seconds.
_MEMORY_S = 10.0


class Rate:
    """How many a second: of late, as a moving average over some seconds. No clock: time is an argument."""

    def __init__(self, now: float) -> None:
        self._at = now
        self._done = 0
        self._value: float | None = None

    def update(self, done: int, now: float) -> float | None:
        """Return the rate when `done` are done; None as long as there is none."""
        seconds = now - self._at
        if seconds > 0 and (done > self._done or self._value is not None):
            measured = (done - self._done) / seconds
            weight = 1 - math.exp(-seconds / _MEMORY_S)
            self._value = measured if self._value is None else self._value + weight * (measured - self._value)
            self._at, self._done = now, done
        return self._value


class State:
    """How far it is, as it is drawn.

    Attributes:
        name: What is done.
        total: How many there are; None if nobody knows.
        done, failed: How many are done, and how many of these failed.
        seconds: Since the beginning.
        rate: How many a second of late, None before the first.
        final: It ends here.
    """

    def __init__(self, name: str, total: int | None, done: int, failed: int) -> None:
        self.name = name
        self.total = total
        self.done = done
        self.failed = failed
        self.seconds = 0.0
        self.rate: float | None = None
        self.final = False

    @property
    def left(self) -> float | None:
        """Seconds it will still take, if that can be told."""
        if self.total is None or not self.rate:
            return None
        return max(0, self.total - self.done) / self.rate

    def text(self, separator: str = ", ") -> str:
        """Return it as words."""
        total = "" if self.total is None else f"/{self.total:,}"
        parts = [f"{self.done:,}{total}"]
        if self.total:
            parts[0] += f" ({100 * self.done // self.total} %)"
        rate = self.done / self.seconds if self.final and self.seconds > 0 else self.rate
        if rate is not None:
            parts.append(f"{_number(rate)}/s")
        if self.failed:
            parts.append(f"{self.failed:,} failed")
        if self.final:
            stopped = self.total is not None and self.done < self.total
            parts.append(f"{'stopped after' if stopped else 'in'} {_clock(self.seconds)}")
        else:
            parts.append(f"{_clock(self.seconds)} so far")
            if self.left is not None:
                parts.append(f"about {_clock(self.left)} left")
        return separator.join(parts)


class Painter(Protocol):
    """Draws the states of one job."""

    interval: float

    def draw(self, state: State) -> None:
        """Draw a state; the last one has `final` set."""


class Progress:
    """Counts what is done and has it drawn now and then.

    Attributes:
        closed: Nothing more will be drawn.
    """

    def __init__(
        self, painter: Painter, total: int | None, name: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.closed = False
        self.total = total
        self.name = name
        self._painter = painter
        self._done = 0
        self._failed = 0
        self._clock = clock
        self._begun = clock()
        self._rate = Rate(self._begun)
        # At once on a terminal, for an empty bar is an answer; not before the interval in a log.
        self._due = self._begun if painter.interval < 1 else self._begun + painter.interval
        self._drawing = threading.Lock()

    def advance(self, done: int, failed: int) -> None:
        """So many more are done, of which so many failed."""
        self._done += done
        self._failed += failed

    def tick(self, now: float) -> float:
        """Draw if it is time to; return after how many seconds it will be."""
        if now < self._due:
            return self._due - now
        if self._done == self.total:
            self.close()
        if self.closed:
            return 3600.0
        if self._drawing.acquire(False):
            try:
                if not self.closed:
                    self._draw(now, final=False)
            finally:
                self._drawing.release()
        # From the end of the drawing on: a slow terminal must not leave no time for anything else.
        self._due = self._clock() + self._painter.interval
        return self._painter.interval

    def close(self) -> None:
        """Draw the end; again is harmless."""
        with self._drawing:
            if not self.closed:
                self.closed = True
                self._draw(self._clock(), final=True)

    def _draw(self, now: float, *, final: bool) -> None:
        state = State(self.name, self.total, self._done, self._failed)
        state.seconds = now - self._begun
        state.rate = self._rate.update(state.done, now)
        state.final = final
        try:
            self._painter.draw(state)
        except Exception:
            # A closed file, a display of the user's that fails: the job is worth more than its picture.
            self.closed = True


# -- painters


class LogPainter:
    """A plain line now and then, for what is no terminal."""

    def __init__(self, file: TextIO, interval: float | None = None) -> None:
        self.interval = _LOG_S if interval is None else interval
        self._file = file

    def draw(self, state: State) -> None:
        self._file.write(f"procession: {state.name}: {state.text()}\n")
        self._file.flush()


class _Lines:
    """The line at the foot of one terminal, which all jobs that are shown there share."""

    def __init__(self) -> None:
        self._texts: dict[int, str] = {}
        self._lock = threading.Lock()

    def draw(self, file: TextIO, key: int, state: State) -> None:
        with self._lock:
            text = _line(state)
            if state.final:
                self._texts.pop(key, None)
                end = f"{text}\n"
            else:
                self._texts[key] = text
                end = ""
            if not _has_room(file):
                return
            running = " | ".join(self._texts.values())
            columns = max(20, shutil.get_terminal_size().columns - 1)
            # One write: what other processes print comes before it or after it.
            file.write(f"\r\x1b[K{end}{_cut(running, columns)}")
            file.flush()


_lines: weakref.WeakKeyDictionary[TextIO, _Lines] = weakref.WeakKeyDictionary()


class TerminalPainter:
    """One line of a terminal, drawn anew."""

    interval = _DRAW_S

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._lines = _lines.setdefault(file, _Lines())

    def draw(self, state: State) -> None:
        self._lines.draw(self._file, id(self), state)


class NotebookPainter:
    """A line of a cell's output, replaced by the next one.

    It is a display with a name and not text with carriage returns: of these a notebook that is run by a program, or
    exported, keeps every one. To be made in the cell's own thread.
    """

    # Each is a message to whoever looks at the notebook.
    interval = 2 * _DRAW_S

    def __init__(self, total: int | None, name: str) -> None:
        import uuid

        from IPython import display

        # To which cell the output belongs is in the context: the thread that draws has none, and another cell may run by then.
        self._context = contextvars.copy_context()
        self._show = functools.partial(display.publish_display_data, transient={"display_id": uuid.uuid4().hex})
        self._show({"text/plain": _line(State(name, total, 0, 0))})

    def draw(self, state: State) -> None:
        self._context.run(self._show, {"text/plain": _line(state)}, update=True)


class TqdmPainter:
    """A bar of tqdm's, or of what looks like one."""

    interval = _DRAW_S

    def __init__(self, bar: Any, *, ours: bool) -> None:
        self._bar = bar
        self._ours = ours
        self._shown = 0
        self._failed = 0

    def draw(self, state: State) -> None:
        if state.failed > self._failed and hasattr(self._bar, "set_postfix"):
            self._bar.set_postfix(failed=state.failed, refresh=False)
        self._failed = state.failed
        more, self._shown = state.done - self._shown, state.done
        if more:
            self._bar.update(more)
        if state.final and self._ours:
            self._bar.close()


class RichPainter:
    """A task of a rich Progress."""

    # A refresh takes milliseconds.
    interval = 2 * _DRAW_S

    def __init__(self, progress: Any, total: int | None, name: str) -> None:
        self._progress = progress
        self._task = progress.add_task(name, total=total, failed="")
        self._counted = False

    def draw(self, state: State) -> None:
        with _rich_lock:
            if not self._counted:
                self._counted = True
                _started_by_us(self._progress, 1)
            failed = f"{state.failed:,} failed" if state.failed else ""
            total = state.done if state.final and state.total is None else state.total
            self._progress.update(self._task, completed=state.done, total=total, failed=failed)
            if not self._progress.live.auto_refresh:
                self._progress.refresh()
            if state.final:
                _started_by_us(self._progress, -1)


# How many jobs are shown by a display that we started: the last one stops it, and its thread if it has one.
_rich_users: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
_rich_lock = threading.Lock()
# One display for all jobs that are shown on a file at a time: two would draw over each other.
_rich_displays: weakref.WeakKeyDictionary[TextIO, Any] = weakref.WeakKeyDictionary()


def _started_by_us(progress: Any, change: int) -> None:
    """Start a display for its first job, unless the user has, and stop it after its last."""
    users = _rich_users.get(progress, 0)
    if users or not progress.live.is_started:
        _rich_users[progress] = users + change
        if users == 0:
            progress.start()
        elif users + change == 0:
            progress.stop()


# -- which


def make_progress(progress: Any, total: int | None, name: str, file: TextIO | None = None) -> Progress | None:
    """Return what shows a job's progress.

    Args:
        progress: True; a description; a class as tqdm's or rich's Progress, or an object of one.
        total: How many items there are; None if nobody knows.
        name: What is done.
        file: Where to draw; None for stderr.

    Raises:
        TypeError: `progress` is none of these.
    """
    if isinstance(progress, str):
        name, progress = progress, True
    if progress is True:
        file = sys.stderr if file is None else file
        # A program without a terminal may be without stderr as well.
        return None if file is None else Progress(_painter_for(file, total, name), total, name)
    if _is_rich(progress):
        progress = progress() if isinstance(progress, type) else progress
        return Progress(RichPainter(progress, total, name), total, name)
    if callable(progress):
        return Progress(TqdmPainter(progress(total=total, desc=name), ours=True), total, name)
    if hasattr(progress, "update"):
        return Progress(TqdmPainter(progress, ours=False), total, name)
    raise TypeError(
        "progress must be True, a description, or a class or object of tqdm's or rich's (one with update()), "
        f"not {progress!r}"
    )


def _painter_for(file: TextIO, total: int | None, name: str) -> Painter:
    if _in_notebook(file):
        return NotebookPainter(total, name)
    if not _is_terminal(file):
        return LogPainter(file)
    try:
        shown = _rich_display(file)
    except ImportError:
        return TerminalPainter(file)
    return RichPainter(shown, total, name)


def _rich_display(file: TextIO) -> Any:
    from rich import console, progress

    with _rich_lock:
        shown = _rich_displays.get(file)
        if shown is None or not _rich_users.get(shown):
            # Refreshed when it is drawn, so without a thread; and sys.stdout is not for a pool's thread to replace.
            shown = _rich_displays[file] = progress.Progress(
                progress.TextColumn("{task.description}", markup=False),
                progress.BarColumn(),
                progress.TaskProgressColumn(show_speed=True),
                progress.MofNCompleteColumn(),
                progress.TimeElapsedColumn(),
                progress.TimeRemainingColumn(),
                progress.TextColumn("{task.fields[failed]}", style="red", markup=False),
                console=console.Console(file=file),
                auto_refresh=False,
                redirect_stdout=False,
                redirect_stderr=False,
            )
    return shown


def _is_rich(progress: Any) -> bool:
    kind = progress if isinstance(progress, type) else type(progress)
    return any((base.__module__, base.__name__) == ("rich.progress", "Progress") for base in kind.__mro__)


def _is_terminal(file: TextIO) -> bool:
    try:
        return file.isatty() and os.environ.get("TERM") != "dumb"
    except Exception:
        return False


def _in_notebook(file: TextIO) -> bool:
    """Tell whether a file is shown by a Jupyter front end."""
    kernel = sys.modules.get("ipykernel.iostream")
    return kernel is not None and isinstance(file, kernel.OutStream)


def _has_room(file: TextIO) -> bool:
    """Tell whether a terminal takes something: after Ctrl-S it does not, and who writes all the same is stopped too."""
    with contextlib.suppress(Exception):
        poll = select.poll()
        poll.register(file.fileno(), select.POLLOUT)
        return bool(poll.poll(0))
    return True


# -- text


def _line(state: State) -> str:
    if state.total:
        filled = 20 * min(state.done, state.total) // state.total
        return f"{state.name} [{'#' * filled}{'.' * (20 - filled)}] {state.text()}"
    return f"{state.name} {state.text()}"


def _cut(text: str, columns: int) -> str:
    return text if len(text) <= columns else f"{text[: columns - 1]}…"


def _clock(seconds: float) -> str:
    whole = int(seconds)
    if seconds < 10:
        return f"{seconds:.1f} s"
    hours, rest = divmod(whole, 3600)
    minutes, rest = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes:02}:{rest:02}"


def _number(rate: float) -> str:
    if rate >= 100:
        return f"{rate:,.0f}"
    return f"{rate:.1f}" if rate >= 1 else f"{rate:.2g}"
