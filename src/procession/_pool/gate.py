"""Waiting that bears an exception at any bytecode: Ctrl-C, or a notebook's stop button, in a pool that lives on.

Python runs signal handlers in the main thread, after a call or a jump back, and so also inside `threading.Condition` and
`Event`, which are written in Python: a KeyboardInterrupt between their bytecodes leaves their lock taken for ever, or given
back twice, and then the pool's own thread waits for it. A lock itself is C, and so is its `with`.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Gate"]


class Gate:
    """Where threads wait until something is so."""

    __slots__ = ("_waiting",)

    def __init__(self) -> None:
        self._waiting: deque[threading.Lock] = deque()

    def wait(self, passed: Callable[[], object], timeout: float | None = None) -> bool:
        """Wait until `passed()`, for `timeout` seconds at most.

        Returns:
            False if the time is up and it is not so.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while not passed():
            lock = threading.Lock()
            lock.acquire()
            self._waiting.append(lock)
            try:
                # Again: it may have become so before it was known who waits.
                if passed():
                    return True
                left = -1.0 if deadline is None else deadline - time.monotonic()
                if deadline is not None and left <= 0:
                    return False
                lock.acquire(True, min(left, threading.TIMEOUT_MAX))
            finally:
                with contextlib.suppress(ValueError):
                    self._waiting.remove(lock)
        return True

    def open(self) -> None:
        """Have all who wait look again; to be called after what makes it so."""
        waiting = self._waiting
        while waiting:
            try:
                waiting.popleft().release()
            except IndexError:  # it has left, or another opens
                return
