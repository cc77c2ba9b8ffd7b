"""Locks and their like in shared memory: what a killed process held is given back."""

from __future__ import annotations

import threading
from multiprocessing.process import current_process

from procession._native import BoundedSemaphore, Event, Lock, RLock, Semaphore
from procession._sync.barrier import Barrier
from procession._sync.condition import Condition

__all__ = ["Barrier", "BoundedSemaphore", "Condition", "Event", "Lock", "RLock", "Semaphore"]


def _whoami() -> str:
    """Name this thread as the standard library's `repr` of a lock does; called by the extension."""
    name = current_process().name
    thread = threading.current_thread()
    return name if thread is threading.main_thread() else f"{name}|{thread.name}"
