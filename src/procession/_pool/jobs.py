"""The jobs of a pool, and whether it takes more of them."""

from __future__ import annotations

import math
from collections import deque

from procession._pool.errors import TaskCancelledError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import threading
    from typing import Any

    from procession._pool.errors import PoolBrokenError
    from procession._pool.results import Job, Stream

__all__ = ["CLOSE", "RUN", "TERMINATE", "Jobs"]

RUN, CLOSE, TERMINATE = "RUN", "CLOSE", "TERMINATE"


class Jobs:
    """The jobs that have no result yet, and whether there may be more.

    Args:
        lock: Held while a job is added, so that one which is added is ended as the others are.

    Attributes:
        state: RUN; CLOSE, no more are taken; or TERMINATE.
        broken: Why the pool has given up.
        forked: This process is a fork of the pool's owner.
        open: The jobs without a result.
        streams: Those of them whose input has not been read to its end.
        shown: Displays of their progress.
    """

    def __init__(self, lock: threading.Lock) -> None:
        self.state = RUN
        self.broken: BaseException | None = None
        self.forked = False
        self.open: set[Job] = set()
        self.streams: set[Stream] = set()
        self.shown: set[Any] = set()
        self._forsaken: deque[Stream] = deque()
        self._lock = lock

    def check(self) -> None:
        """Raise what stands in the way of a new job.

        Raises:
            ValueError: The pool is closed or terminated.
            PoolBrokenError: It has given up.
            RuntimeError: This process is a fork of the pool's owner.
        """
        if self.forked:
            raise RuntimeError(
                "this pool was made before this process was forked, and belongs to the parent. "
                "Make a pool of its own in the child."
            )
        if self.broken is not None:
            raise self.broken.with_traceback(None)
        if self.state != RUN:
            raise ValueError("Pool not running")

    @property
    def ended(self) -> bool:
        """None of them will be done any more."""
        return self.state == TERMINATE or self.broken is not None

    def give_up(self, error: PoolBrokenError) -> None:
        """Every job gets `error`, and so does whoever asks for another."""
        self.broken = error
        self.abandon_all(error)

    def abandon_all(self, error: BaseException) -> None:
        """End all of them, with the error with which the pool has given up, if it has."""
        with self._lock:
            jobs = list(self.open)
        for job in jobs:
            job.abandon(self.broken or error)
        self.open.clear()
        self.streams.clear()

    def discard(self, job: Job) -> None:
        """Forget a job."""
        self.open.discard(job)
        self.streams.discard(job)

    def release_streams(self, all_of_them: bool) -> None:
        """Nobody will consume while the pool is joined: let streams run to their end, or end those that may have none."""
        with self._lock:
            streams = list(self.streams)
        for stream in streams:
            if stream.sized or all_of_them:
                stream.unlimited = True
                stream.make_room()
            else:
                stream.abandon(TaskCancelledError("the pool was left before all of the stream was consumed"))

    def forsake(self, stream: Stream) -> None:
        """The iterator over a stream is gone. May be called at any place: takes no lock."""
        self._forsaken.append(stream)

    def tick(self, now: float) -> float:
        """Close streams that are forsaken, have what others held back given out, show progress; return when next, in seconds."""
        while self._forsaken:
            self._forsaken.popleft().close()
        wait = math.inf
        for stream in list(self.streams):
            if stream.iterator is not None and stream.iterator() is None:
                stream.close()  # broken off before it could be given to anybody, or as it said good-bye
            wait = min(wait, stream.held_until(now))
        for shown in list(self.shown):
            wait = min(wait, shown.tick(now))
            if shown.closed:
                self.shown.discard(shown)
        return wait
