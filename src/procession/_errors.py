"""The errors of procession: one tree, each also what a drop-in program already catches.

::

    multiprocessing.ProcessError
    └── ProcessionError
        ├── ProcessDiedError         a process ended without handing over its result
        ├── RemoteError              what a child raised or returned could not be pickled
        ├── LockOwnerDiedError       the holder of a lock died (``on_owner_death="raise"``)
        ├── ForeignHandleError       a handle from another family of processes (also ValueError)
        ├── StaleHandleError         a handle whose object has been freed (also ReferenceError)
        └── ArenaFullError           the arena has reached its limit (also MemoryError)
    RuntimeWarning
    └── LockOwnerDied                the same event as a warning, the default
    queue.ShutDown                   the queue was shut down (our own class before Python 3.13)

Every class can be pickled and says in its message who, what, why and what to do next.
"""

from __future__ import annotations

import signal
import sys
from multiprocessing import ProcessError

__all__ = [
    "ArenaFullError",
    "ForeignHandleError",
    "LockOwnerDied",
    "LockOwnerDiedError",
    "ProcessDiedError",
    "ProcessionError",
    "RemoteError",
    "RemoteTraceback",
    "ShutDown",
    "StaleHandleError",
    "describe_exit",
]

if sys.version_info >= (3, 13):
    from queue import ShutDown
else:

    class ShutDown(Exception):  # noqa: N818 - the name queue.ShutDown has since Python 3.13
        """Raised by put and get of a queue that was shut down."""


def describe_exit(exitcode: int | None) -> str:
    """Say in words how a process ended.

    Args:
        exitcode: As in ``Process.exitcode``: ``-N`` for signal N, else the exit status; None if it is not known.
    """
    if exitcode is None:
        return "ended for an unknown reason (its exit status went to another process)"
    if exitcode < 0:
        try:
            name = signal.Signals(-exitcode).name
        except ValueError:
            name = f"signal {-exitcode}"
        hint = {
            "SIGKILL": " (kill -9, or the kernel's out-of-memory killer)",
            "SIGSEGV": " (a crash in native code)",
            "SIGBUS": " (a crash in native code)",
            "SIGABRT": " (abort() in native code)",
            "SIGTERM": " (terminate() or kill)",
        }.get(name, "")
        return f"was killed by {name}{hint}"
    return f"ended with exit code {exitcode}"


class ProcessionError(ProcessError):
    """Root of procession's errors; a ``multiprocessing.ProcessError``."""


class ProcessDiedError(ProcessionError):
    """A process ended without handing over a result.

    Attributes:
        name: The process's name.
        pid: Its process id, or None if it never started.
        exitcode: ``-N`` when signal N killed it, else its exit status.
        signal: The ``signal.Signals`` member that killed it, or None.
    """

    def __init__(self, name: str, pid: int | None, exitcode: int | None) -> None:
        super().__init__(name, pid, exitcode)
        self.name = name
        self.pid = pid
        self.exitcode = exitcode

    @property
    def signal(self) -> signal.Signals | None:
        try:
            return signal.Signals(-self.exitcode) if self.exitcode is not None and self.exitcode < 0 else None
        except ValueError:
            return None

    def __str__(self) -> str:
        return f"{self.name} (pid {self.pid}) {describe_exit(self.exitcode)} before it returned a result."


class RemoteError(ProcessionError):
    """Stands for something of a child process that could not travel to the parent.

    Attributes:
        type_name: Qualified name of the original exception's type, or of the error that pickling the value raised.
        message: The original's text.
        traceback: The child's formatted traceback.
    """

    def __init__(self, type_name: str, message: str, traceback: str = "") -> None:
        super().__init__(type_name, message, traceback)
        self.type_name = type_name
        self.message = message
        self.traceback = traceback

    def __str__(self) -> str:
        return f"{self.type_name}: {self.message}"


class RemoteTraceback(Exception):  # noqa: N818 - as in multiprocessing.pool and concurrent.futures
    """The child's traceback as text; the ``__cause__`` of an exception that came from a child."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = self.tb = text

    def __str__(self) -> str:
        return f'\n"""\n{self.text}"""'


class LockOwnerDied(RuntimeWarning):
    """The lock just acquired was held by a process that died. The lock is held; what it protects may be half-done."""


class LockOwnerDiedError(ProcessionError, RuntimeError):
    """The lock's holder died, and the lock was made with ``on_owner_death="raise"``. The lock is free again."""


class ForeignHandleError(ProcessionError, ValueError):
    """A lock, queue or event of another family of processes was unpickled here."""


class StaleHandleError(ProcessionError, ReferenceError):
    """The object a handle names has been freed."""


class ArenaFullError(ProcessionError, MemoryError):
    """The arena cannot hold what was asked for; the message has the numbers."""
