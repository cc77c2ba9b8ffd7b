"""The spawn start method."""

from __future__ import annotations

from multiprocessing import popen_spawn_posix

from procession._proc.parcel import Sender

__all__ = ["SpawnPopen"]


class SpawnPopen(Sender, popen_spawn_posix.Popen):
    """Starts a child as a fresh interpreter."""
