"""The errors of pools; each is also what a program written for the standard library's pools already catches.

::

    procession.ProcessionError
    ├── ProcessDiedError
    │   └── WorkerDiedError          a worker died of this task (also BrokenProcessPool)
    │       └── WorkerMemoryError    it was stopped at its hard memory limit (also MemoryError)
    ├── RemoteError
    │   └── UnpicklingFailedError    arguments or a result could not be unpickled where they went (also BrokenProcessPool)
    ├── TaskTimeoutError             the task took longer than its timeout (also TimeoutError, twice)
    ├── TaskCancelledError           cancel(), or the pool was terminated (also CancelledError)
    └── PoolBrokenError              the pool has given up; the message says why (also BrokenProcessPool)
"""

from __future__ import annotations

import multiprocessing
from concurrent.futures import CancelledError
from concurrent.futures.process import BrokenProcessPool

from procession._errors import ProcessDiedError, ProcessionError, RemoteError, describe_exit

__all__ = [
    "PoolBrokenError",
    "TaskCancelledError",
    "TaskTimeoutError",
    "UnpicklingFailedError",
    "WorkerDiedError",
    "WorkerMemoryError",
]


class WorkerDiedError(ProcessDiedError, BrokenProcessPool):
    """The worker that ran this task died of it. The pool goes on with the other tasks and a new worker.

    Attributes:
        task: The call, as text, arguments shortened.
        name: The worker's name.
        pid: Its process id.
        exitcode: ``-N`` when signal N killed it, else its exit status.
        out_of_memory: The kernel's out-of-memory killer was at work in this cgroup while the task ran.
        deaths: How many workers have died of this task, retries included.
        stack: Where in Python it crashed, the innermost call first, as by `faulthandler`; empty where that is not known: after
            SIGKILL and `os._exit`, which leave no time, and where the worker uses `faulthandler` itself.
    """

    def __init__(
        self,
        task: str,
        name: str,
        pid: int | None,
        exitcode: int | None,
        out_of_memory: bool = False,
        deaths: int = 1,
        stack: str = "",
    ) -> None:
        super().__init__(name, pid, exitcode)
        self.args = (task, name, pid, exitcode, out_of_memory, deaths, stack)
        self.task = task
        self.out_of_memory = out_of_memory
        self.deaths = deaths
        self.stack = stack

    def __str__(self) -> str:
        how = describe_exit(self.exitcode)
        if self.out_of_memory:
            how += "; the kernel's out-of-memory killer struck in this cgroup meanwhile"
        times = "" if self.deaths < 2 else f", the last of {self.deaths} attempts"
        where = f" It was here, innermost call first:\n{self.stack}" if self.stack else ""
        return (
            f"{self.name} (pid {self.pid}) {how} while it ran {self.task}{times}. "
            "The pool goes on; retries=n would run such a task again."
            f"{where}"
        )


class WorkerMemoryError(WorkerDiedError, MemoryError):
    """The worker was killed because it used more memory than `memory_limit`'s hard limit."""

    def __init__(self, task: str, name: str, pid: int | None, limit: int, used: int) -> None:
        super().__init__(task, name, pid, -9)
        self.args = (task, name, pid, limit, used)
        self.limit = limit
        self.used = used

    def __str__(self) -> str:
        return (
            f"{self.name} (pid {self.pid}) was killed: it used {self.used >> 20} MiB, more than the hard limit of "
            f"{self.limit >> 20} MiB (memory_limit), while it ran {self.task}."
        )


class UnpicklingFailedError(RemoteError, BrokenProcessPool):
    """Arguments or a result could not be unpickled where they went. The pool goes on.

    `concurrent.futures` breaks the pool then, so that programs written for it catch a `BrokenProcessPool`.
    """


class TaskTimeoutError(ProcessionError, multiprocessing.TimeoutError, TimeoutError):
    """The task ran longer than its `timeout` and was stopped; the pool goes on.

    Attributes:
        task: The call, as text, arguments shortened.
        timeout: Seconds it was given.
    """

    def __init__(self, task: str, timeout: float) -> None:
        super().__init__(task, timeout)
        self.task = task
        self.timeout = timeout

    def __str__(self) -> str:
        return f"{self.task} was stopped after its timeout of {self.timeout:g} s."


class TaskCancelledError(ProcessionError, CancelledError):
    """The task was cancelled before it had a result."""


class PoolBrokenError(ProcessionError, BrokenProcessPool):
    """The pool takes no more tasks: its workers cannot be started, or die before they do anything."""
