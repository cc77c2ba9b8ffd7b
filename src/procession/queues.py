"""The queues, under the name of `multiprocessing.queues`."""

from __future__ import annotations

from multiprocessing import queues as _std
from queue import Empty, Full

from procession._errors import ShutDown
from procession._wire.queues import JoinableQueue, Queue, SimpleQueue

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = ["Empty", "Full", "JoinableQueue", "Queue", "ShutDown", "SimpleQueue"]


def __getattr__(name: str) -> Any:
    # Private names that programs poke at, and names of later Pythons.
    return getattr(_std, name)
