"""The three start methods: the standard library's Popen classes, which tell the arena how their child ended.

A forked child inherits the arena; how a spawned one gets it is told in `procession._proc.parcel`.
"""

from __future__ import annotations

import os
from multiprocessing import popen_fork

from procession import _native

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

__all__ = ["ForkPopen", "Reaper", "arrival_hooks", "launch", "on_arrival"]

# So often a wait for a child's end looks for signals.
_SLICE_S = 0.25

# What every spawned child calls before it imports the user's main module, and passes on to its own.
arrival_hooks: list[Callable[[], object]] = []


def on_arrival(hook: Callable[[], object]) -> None:
    """Have every spawned descendant call `hook`, a function of a module, before it imports the user's main module."""
    if hook not in arrival_hooks:
        arrival_hooks.append(hook)


class Reaper(popen_fork.Popen):
    """Tells the arena how the child ended, once it has been reaped, and until then keeps alive what was sent to it."""

    pid: int
    sentinel: int
    _handles: list[object] | None = None

    def poll(self, *args: Any, **options: Any) -> int | None:
        """Return the exit code, None while the child runs."""
        known = self.returncode
        returncode: int | None = super().poll(*args, **options)
        if known is None and returncode is not None:
            _native.record_exit(self.pid, returncode)
            self._handles = None
        return returncode

    def wait(self, timeout: float | None = None) -> int | None:
        """Wait for the child's end, `timeout` seconds at most; return the exit code, None if it still runs."""
        import select
        import time

        if self.returncode is not None or timeout == 0:
            return self.poll()
        deadline = None if timeout is None else time.monotonic() + timeout
        sentinel = select.poll()
        sentinel.register(self.sentinel, select.POLLIN)
        while True:
            # In slices, for a signal that another thread takes ends no system call in this one.
            left = _SLICE_S if deadline is None else min(_SLICE_S, deadline - time.monotonic())
            if sentinel.poll(max(0, int(left * 1000 + 0.999))) or not os.path.exists(f"/proc/{self.pid}"):
                return self.poll(0)
            # Children of the child's may hold the sentinel open.
            if self.poll() is not None or left < _SLICE_S:
                return self.returncode


class ForkPopen(Reaper):
    """Starts a child by fork."""


def launch(method: str, process: Any) -> popen_fork.Popen:
    """Start `process` in a new process.

    Args:
        method: "fork", "spawn" or "forkserver".
        process: The process object; in a forked child its `_bootstrap` is called, to others it is pickled.
    """
    # The modules are loaded when they are needed, as in the standard library: forkserver needs sockets and selectors.
    if method == "fork":
        _native._lifeline()
        return ForkPopen(process)
    if method == "spawn":
        from procession._proc.popen_spawn import SpawnPopen

        return SpawnPopen(process)
    if method == "forkserver":
        from procession._proc.popen_forkserver import ForkServerPopen

        return ForkServerPopen(process)
    raise ValueError(f"cannot start a process by {method!r}: fork, spawn or forkserver")
