"""The locks and their like, under the name of `multiprocessing.synchronize`."""

from __future__ import annotations

from multiprocessing import synchronize as _std

from procession._sync import Barrier, BoundedSemaphore, Condition, Event, Lock, RLock, Semaphore

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = ["Barrier", "BoundedSemaphore", "Condition", "Event", "Lock", "RLock", "Semaphore"]


def __getattr__(name: str) -> Any:
    # Private names that programs poke at, and names of later Pythons.
    return getattr(_std, name)
