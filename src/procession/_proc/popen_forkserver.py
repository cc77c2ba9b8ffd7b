"""The forkserver start method."""

from __future__ import annotations

from multiprocessing import popen_forkserver

from procession._proc.parcel import Sender

__all__ = ["ForkServerPopen"]


class ForkServerPopen(Sender, popen_forkserver.Popen):
    """Has the fork server start a child."""
