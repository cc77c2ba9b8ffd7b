"""What callers ask of the engine's thread."""

from __future__ import annotations

import _thread
import contextlib
from collections import deque

from procession._pool.delivery import guarded

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from procession._pool.dispatch import Dispatcher
    from procession._pool.lookout import Lookout

__all__ = ["Requests"]


class Requests:
    """What callers, who may be broken off anywhere, do not do themselves.

    Args:
        dispatcher: A request may be one to give something out.
        lookout: Where the engine's thread sleeps.

    Attributes:
        pending: What is to be done, in this order.
    """

    def __init__(self, dispatcher: Dispatcher, lookout: Lookout) -> None:
        self.pending: deque[Callable[[], object]] = deque()
        self._calling_back: list[None] = []  # one for each callback that is running
        self._dispatcher = dispatcher
        self._lookout = lookout

    def wake_up(self) -> None:
        """Have them seen to: by the engine's thread, or, while a callback keeps that, by one for this alone."""
        if self._calling_back:
            # Not by threading, which would wait for its start, in Python.
            _thread.start_new_thread(self.see_to, ())
        else:
            self._lookout.rouse()

    @contextlib.contextmanager
    def calling_back(self) -> Iterator[None]:
        """Around what may take its time, or wait for something that the main thread has yet to ask for."""
        self._calling_back.append(None)
        try:
            if self.pending:
                self.see_to()
            yield
        finally:
            self._calling_back.pop()

    def see_to(self) -> None:
        """Do what is to be done."""
        with contextlib.suppress(IndexError):
            while True:
                guarded(self.pending.popleft())
        self._dispatcher.pump()
