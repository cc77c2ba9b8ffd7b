"""Barrier: nobody goes on before all have come."""

from __future__ import annotations

import threading

from procession._native import BarrierState

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Barrier"]


class Barrier(BarrierState, threading.Barrier):
    """A barrier between processes.

    A process that dies while it waits, or while it runs the action, breaks the barrier: the others get
    `threading.BrokenBarrierError` and do not wait for ever. `reset()` makes it usable again.

    Args:
        parties: How many processes or threads have to come, at least 1.
        action: Called by one of them when all have come, before anybody goes on. An exception in it breaks the barrier.
        timeout: Default of `wait`, in seconds.
        ctx: Accepted for the standard library's sake, and not used.

    Raises:
        ValueError: `parties` is less than 1.
    """

    def __init__(
        self,
        parties: int,
        action: Callable[[], object] | None = None,
        timeout: float | None = None,
        *,
        ctx: object = None,
    ) -> None:
        del ctx
        BarrierState.__init__(self, parties)
        self._action = action
        self._timeout = timeout

    def wait(self, timeout: float | None = None) -> int:
        """Wait until all have come.

        Args:
            timeout: Longest wait in seconds, on the monotonic clock; None takes the barrier's own. A wait that runs
                out breaks the barrier for all.

        Returns:
            A number from 0 to parties - 1, different for each; parties - 1 for the last to come.

        Raises:
            threading.BrokenBarrierError: The barrier is broken: by a timeout, abort(), reset(), a failed action, or the
                death of a process in it.
        """
        return self._wait(self._action, self._timeout if timeout is None else timeout)

    def __repr__(self) -> str:
        state = "broken" if self.broken else f"waiters={self.n_waiting}/{self.parties}"
        return f"<Barrier at {id(self):#x}: {state}>"
