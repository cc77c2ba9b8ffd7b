"""A pool in which nothing goes on while somebody waits says so, once, and who is at what."""

from __future__ import annotations

import contextlib
import math
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from procession._pool.jobs import Jobs
    from procession._pool.member import Table

__all__ = ["Stall"]

# So often is looked whether somebody waits.
_LOOK_S = 1.0
# So many workers are described in the one line.
_WORKERS = 8


class Stall:
    """Watches whether results come.

    Args:
        table: Who is there and who has what.
        jobs: Who waits for what.
        patience: Seconds that somebody has waited without a result after which it is said; None for never.

    Attributes:
        last_answer: When there was a result last, or nothing to be done.
        joining: How many wait for the end of the pool.
    """

    def __init__(self, table: Table, jobs: Jobs, patience: float | None) -> None:
        self.last_answer = time.monotonic()
        self.joining = 0
        self._table = table
        self._jobs = jobs
        self._patience = patience
        self._said = self._was_busy = False
        self._waited_since: float | None = None

    def answered(self) -> None:
        """There are results."""
        self.last_answer = time.monotonic()
        self._said = False

    def tick(self, now: float, busy: bool) -> float:
        """Say it if it is so; return when to look again, in seconds. `busy` tells whether workers have something to do."""
        if self._patience is None:
            return math.inf
        busy = busy or bool(self._jobs.streams)
        if busy and not self._was_busy:
            self.last_answer = now  # there was nothing to answer
        self._was_busy = busy
        if not busy:
            return self._patience
        if not (self.joining or any(job.waited_for for job in list(self._jobs.open))):
            self._waited_since = None
        elif self._waited_since is None:
            self._waited_since = now
        if self._said:
            return math.inf
        look = min(self._patience, _LOOK_S)
        if self._waited_since is None:
            return look
        # Who comes late to what goes on for long waits in vain only from then on.
        left = max(self._waited_since, self.last_answer) + self._patience - now
        if left > 0:
            return min(left, look)
        self._said = True
        # There may be no stderr, or a closed one.
        with contextlib.suppress(Exception):
            sys.stderr.write(f"procession: {self.describe(now)}\n")
            sys.stderr.flush()
        return look

    def describe(self, now: float) -> str:
        """Say in one line who does what since when."""
        scheduler = self._table.scheduler
        with self._table.lock:
            held, waiting = len(scheduler.inflight), scheduler.waiting
            doing = [
                (member, member.worker.units[0] if member.worker.units else None, now - member.worker.since)
                for member in self._table.members.values()
            ]
        doing.sort(key=lambda one: (one[1] is None, -one[2]))
        parts = []
        for member, unit, seconds in doing[:_WORKERS]:
            if member.ready is None:
                what = f"starting for {now - member.started:.0f} s"
            else:
                what = "waiting" if unit is None else f"{member.call_text(unit)} for {seconds:.0f} s"
            parts.append(f"{member.process.name} (pid {member.process.pid}): {what}")
        if len(doing) > len(parts):
            parts.append(f"and {len(doing) - len(parts)} more workers")
        if held:
            tasks = f"{held} {'is' if held == 1 else 'are'} with workers"
        else:
            tasks = "no worker takes one" if waiting else "the input has given nothing to do"
        text = f"no task has finished for {now - self.last_answer:.0f} s, {tasks}. {'; '.join(parts)}"
        return " ".join(text.split())
