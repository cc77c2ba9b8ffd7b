"""Condition: a lock, and a line of those who wait for news."""

from __future__ import annotations

import time

from procession._native import Lock, RLock, WaitLine

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import TypeVar

    T = TypeVar("T")

__all__ = ["Condition"]


class Condition:
    """A condition variable between processes, first come first served.

    A waiter that is killed never takes a notification with it: the next in line gets it. A holder that is killed loses
    the lock as `Lock` says.

    Args:
        lock: A `Lock` or `RLock` of procession; a new `RLock` when None.
        ctx: Accepted for the standard library's sake, and not used.
    """

    def __init__(self, lock: Lock | RLock | None = None, *, ctx: object = None) -> None:
        del ctx
        self._lock = RLock() if lock is None else lock
        self._line = WaitLine()
        self._bind()

    def _bind(self) -> None:
        self.acquire = self._lock.acquire
        self.release = self._lock.release

    def __getstate__(self) -> tuple[Lock | RLock, WaitLine]:
        return self._lock, self._line

    def __setstate__(self, state: tuple[Lock | RLock, WaitLine]) -> None:
        self._lock, self._line = state
        self._bind()

    def __enter__(self) -> bool:
        return self._lock.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._lock.__exit__(kind, value, traceback)

    def __repr__(self) -> str:
        return f"<Condition({self._lock!r}, {self._line.waiting()})>"

    def wait(self, timeout: float | None = None) -> bool:
        """Let the lock go, wait to be notified, take the lock again.

        Args:
            timeout: Longest wait in seconds, on the monotonic clock. None waits for ever; negative counts as 0.

        Returns:
            False when the time was over before a notification came.

        Raises:
            AssertionError: This thread does not hold the lock.
        """
        if not self._lock._is_mine():
            raise AssertionError("must acquire() condition before using wait()")
        return self._line.wait(self._lock, timeout)

    def wait_for(self, predicate: Callable[[], T], timeout: float | None = None) -> T:
        """Wait until `predicate()` is true; returns its last value, which is false only after `timeout` seconds."""
        result = predicate()
        if result:
            return result
        end = None if timeout is None else time.monotonic() + timeout
        while not result:
            left = None if end is None else end - time.monotonic()
            if left is not None and left <= 0:
                break
            self.wait(left)
            result = predicate()
        return result

    def notify(self, n: int = 1) -> None:
        """Wake the `n` that have waited longest. They go on once this process lets the lock go.

        Raises:
            AssertionError: This thread does not hold the lock.
        """
        if not self._lock._is_mine():
            raise AssertionError("lock is not owned")
        self._line.notify(n)

    def notify_all(self) -> None:
        """Wake all that wait."""
        self.notify((1 << 31) - 1)
