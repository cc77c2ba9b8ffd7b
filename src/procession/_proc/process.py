"""`Process`: the standard library's, with a result.

The classes are subclasses of the standard library's, so `isinstance(p, multiprocessing.Process)`, `active_children()`
and everything else that deals in processes goes on working. Added: `result()`, `exception()` and the context manager.
"""

from __future__ import annotations

import contextlib
import functools
import os
from multiprocessing import context as _context
from multiprocessing import process as _process

from procession import _native
from procession._proc import popen as _popen
from procession._proc import stacks
from procession._proc.descriptors import enough_descriptors
from procession._proc.results import Mailbox

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from types import TracebackType
    from typing import Any

    from typing_extensions import Self

    from procession._proc.results import Outcome

    class _Base(_context.Process):
        _target: Callable[..., Any] | None
        _args: tuple[Any, ...]
        _kwargs: dict[str, Any]
        _parent_pid: int
        _closed: bool
        _popen: Any

        def _check_closed(self) -> None: ...
        def _bootstrap(self, parent_sentinel: int | None = None) -> int: ...
else:
    _Base = object

__all__ = ["ForkProcess", "ForkServerProcess", "Process", "SpawnProcess"]

# After this many seconds a process that ignores the SIGTERM of __exit__ is killed. Arbitrary; as long as
# `docker stop` gives is too long for a program that is being broken off by an exception.
_TERMINATE_GRACE_S = 5.0


class WithResult(_Base):
    """What procession adds to a process class of the standard library.

    Attributes:
        orphan_ok: It may outlive the process that has started it. By default it is killed half a second after that has ended,
            however it ended: by SIGKILL, a crash or `os._exit()`. To be set before `start()`, or given to the constructor.
    """

    _mailbox: Mailbox | None = None
    orphan_ok = False
    # What a pool's worker may use of the CPUs: the arguments of `limit_threads`.
    _threads: tuple[int, int | None] | None = None

    def __init__(self, *args: Any, orphan_ok: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if orphan_ok:
            self.orphan_ok = True

    def run(self) -> Any:
        """Run the target in the child and return its value; a subclass may override this and return its own."""
        if self._target:
            return self._target(*self._args, **self._kwargs)
        return None

    def start(self) -> None:
        """Start the child process.

        Raises:
            Exception: The target or an argument cannot be pickled (spawn and forkserver); a note names which.
            OSError: No descriptors are left, and the soft limit cannot be raised any more.
        """
        if self._popen is None and not self._closed:
            self._mailbox = Mailbox()
        self.start_without_result()

    def start_without_result(self) -> None:
        """Start the child process; what its target returns is nobody's."""
        stacks.prepare()
        # The standard library forbids a daemon to have children, since they would be left over when it is terminated.
        config = _process.current_process()._config  # type: ignore[attr-defined]
        daemon = config.pop("daemon", None)
        try:
            with enough_descriptors(f"to start {self.name}"):
                super().start()
        finally:
            if daemon is not None:
                config["daemon"] = daemon

    def result(self, timeout: float | None = None) -> Any:
        """Wait for what the target returns (or `run()`, where it is overridden) and return it.

        Can be called any number of times and by several threads, also when the process has ended. It does not wait
        for the process to end and does not replace `join()`.

        Args:
            timeout: Longest wait in seconds, on the monotonic clock. None waits as long as the process lives.

        Raises:
            BaseException: What the target raised, with the child's traceback as its cause.
            RemoteError: What the target returned or raised could not be pickled.
            ProcessDiedError: The process was killed, or ended by `os._exit()` or `sys.exit(n)` with n other than 0,
                before the target returned. After `sys.exit(0)` the result is None.
            multiprocessing.TimeoutError: `timeout` seconds have passed.
            ValueError: Not started, closed, or asked in a process other than the one that started it.

        Example:
            >>> import math, procession
            >>> with procession.get_context("fork").Process(target=math.factorial, args=(5,)) as p:
            ...     p.result(timeout=60)
            120
        """
        return self._collect("result", timeout).result()

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Wait like `result()` and return the exception the target raised, None if it returned.

        Raises:
            ProcessDiedError: As for `result()`: whether the target would have raised is not known.
            multiprocessing.TimeoutError: `timeout` seconds have passed.
            ValueError: Not started, closed, or asked in a process other than the one that started it.
        """
        return self._collect("exception", timeout).exception()

    def _collect(self, method: str, timeout: float | None) -> Outcome:
        self._check_closed()
        if self._parent_pid != os.getpid():
            raise ValueError(
                f"{method}() of {self.name} was called in process {os.getpid()}; "
                f"only process {self._parent_pid}, which made it, can know its result"
            )
        if self._popen is None or self._mailbox is None:
            raise ValueError(f"{self.name} has not been started: call start() before {method}()")
        return self._mailbox.collect(self._popen, self.name, timeout)

    def __await__(self) -> Generator[Any, None, Any]:
        """Wait for the process's end without blocking the event loop; as `result()` otherwise. Cancelling it terminates the process.

        No thread waits: the loop is told by a descriptor.
        """
        return self._ended().__await__()

    async def _ended(self) -> Any:
        import asyncio  # late: few programs have it

        self._check_closed()
        if self._popen is None:
            raise ValueError(f"{self.name} has not been started: call start() before await")
        if self._popen.poll() is not None:
            return self.result()
        try:
            fd = os.pidfd_open(self._popen.pid)
        except OSError:  # a fork server's child that has just ended, or a sandbox
            fd = os.dup(self._popen.sentinel)
        ended = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_reader(fd, ended.set)
        try:
            await ended.wait()
        except asyncio.CancelledError:
            self.terminate()
            raise
        finally:
            loop.remove_reader(fd)
            os.close(fd)
        return self.result()

    def close(self) -> None:
        """Close the object and free the result; a ValueError while the process is running."""
        super().close()
        self._mailbox = None

    def __enter__(self) -> Self:
        """Start the process if it has not been started."""
        self._check_closed()
        if self._popen is None:
            self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Join; after an exception in the body terminate first, and kill what ignores that for five seconds."""
        if self._closed or self._popen is None:
            return
        if kind is not None:
            self.terminate()
            self.join(_TERMINATE_GRACE_S)
            if self.is_alive():
                self.kill()
        self.join()

    def _bootstrap(self, parent_sentinel: int | None = None) -> int:
        """Be the child: the standard library's bootstrap, with `run()` reporting what it comes to."""
        _native.set_process_name(self.name)
        stacks.prepare()
        with contextlib.suppress(OSError):  # no /proc, or no such signals in a sandbox
            (_native._drop_lifeline if self.orphan_ok else _native._arm_lifeline)()
        mailbox = self._mailbox
        if mailbox is not None:
            # An attribute of this one object: run() may be overridden, also by a class that knows nothing of us.
            self.run = functools.partial(mailbox.run, self.run)  # type: ignore[method-assign]
        code = 1
        try:
            code = super()._bootstrap(parent_sentinel)
        finally:
            # One that fails keeps its locks, as in the standard library; the items it had in hand are another's to do.
            _native.process_exiting(code != 0)
        return code


class Process(WithResult, _context.Process):
    """A process of the current start method; as `multiprocessing.Process`, with a result.

    Example:
        >>> import procession
        >>> p = procession.Process(target=print)
        >>> p.exitcode is None
        True
    """

    @staticmethod
    def _Popen(process_obj: Any) -> Any:
        return _popen.launch(_context._default_context.get_start_method(), process_obj)


class ForkProcess(WithResult, _context.ForkProcess):  # type: ignore[misc]
    """A process started by fork."""

    @staticmethod
    def _Popen(process_obj: Any) -> Any:
        return _popen.launch("fork", process_obj)


class SpawnProcess(WithResult, _context.SpawnProcess):  # type: ignore[misc]
    """A process started as a fresh interpreter."""

    @staticmethod
    def _Popen(process_obj: Any) -> Any:
        return _popen.launch("spawn", process_obj)


class ForkServerProcess(WithResult, _context.ForkServerProcess):  # type: ignore[misc]
    """A process forked by the fork server."""

    @staticmethod
    def _Popen(process_obj: Any) -> Any:
        return _popen.launch("forkserver", process_obj)
