"""Processes, under the name of `multiprocessing.process`, with the classes that have a result."""

from __future__ import annotations

from multiprocessing import process as _std
from multiprocessing.process import BaseProcess, active_children, current_process, parent_process

from procession._proc.process import ForkProcess, ForkServerProcess, Process, SpawnProcess

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = [
    "BaseProcess",
    "ForkProcess",
    "ForkServerProcess",
    "Process",
    "SpawnProcess",
    "active_children",
    "current_process",
    "parent_process",
]


def __getattr__(name: str) -> Any:
    # Private names that programs poke at (always the present value), and names of later Pythons.
    return getattr(_std, name)
