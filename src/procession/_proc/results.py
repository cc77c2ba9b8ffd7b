"""How what a target returned or raised gets from the child to the parent.

::

    parent: start()  makes a Mailbox ───────────► child: _bootstrap() → run() → Mailbox.deliver(...)
    parent: result() ◄── collect() ◄──  one message in the arena  ◄──┘

The message is one of ``("value", pickled)``, ``("error", pickled or None, type name, text, traceback)`` and
``("exit", status)``. It lies in the arena, so it outlives the child, and a child that dies before it has delivered
leaves the mailbox empty: the parent then has the exit status to report.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from multiprocessing.context import TimeoutError as _TimeoutError

from procession._errors import ProcessDiedError, RemoteError, RemoteTraceback
from procession._wire import codec
from procession._wire.queues import Queue

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

__all__ = ["Mailbox", "Outcome", "pack_error", "unpack_error"]

# While result() waits it looks at the process this often: at first soon, since most targets that die die early,
# then at a rate that costs nothing (20 looks of 2 us a second).
_FIRST_LOOK_S = 0.001
_LONGEST_LOOK_S = 0.05
# Two texts of so many bytes always fit, for a message of up to 1 KiB needs no memory of its own.
_SHORT = 300


class Outcome:
    """What a process came to: a value, an exception, or neither (`died`).

    Attributes:
        value: What the target returned.
        error: What it raised, or None.
        died: Set instead when the process ended without saying either.
    """

    __slots__ = ("died", "error", "value")

    def __init__(
        self, value: Any = None, error: BaseException | None = None, died: ProcessDiedError | None = None
    ) -> None:
        self.value = value
        self.error = error
        self.died = died

    def exception(self) -> BaseException | None:
        """Return the target's exception or None; raise `ProcessDiedError` if nobody knows."""
        if self.died is not None:
            raise self.died.with_traceback(None)
        return self.error

    def result(self) -> Any:
        """Return the target's value or raise what it raised."""
        error = self.exception()
        if error is not None:
            # Without the frames of the last time it was raised: the same object is raised at each call.
            raise error.with_traceback(None)
        return self.value


class Mailbox:
    """One message from one child to its parent; made by ``Process.start()``.

    Can be pickled: the copy is the child's end. Delivering never raises and never blocks. Collecting may be done by
    several threads and again and again; the first decodes the message and all get the same objects.
    """

    def __init__(self, queue_: Queue[Any] | None = None) -> None:
        self._queue: Queue[Any] = Queue(1) if queue_ is None else queue_
        self._lock = threading.Lock()
        self._outcome: Outcome | None = None

    def __reduce__(self) -> tuple[type[Mailbox], tuple[Queue[Any]]]:
        return Mailbox, (self._queue,)

    # -- the child's side

    def run(self, target: Callable[[], Any]) -> Any:
        """Call `target` and deliver what it returns or raises; raises the same."""
        try:
            value = target()
        except SystemExit as error:
            self._deliver(("exit", _exit_status(error)))
            raise
        except BaseException as error:
            self._deliver(pack_error(error, skip_frames=1))
            raise
        self._deliver(_pack_value(value))
        return value

    def _deliver(self, message: tuple[Any, ...]) -> None:
        try:
            self._queue.put(message)
        except Exception as error:
            # Most likely no room for the value; there is always room for a short text.
            if message[0] == "error":
                name, text = message[2], f"{_shortened(message[3])} (its traceback did not fit into the arena)"
            else:
                name, text = type_name(error), f"the result does not fit into the arena: {_shortened(str(error))}"
            with contextlib.suppress(Exception):
                self._queue.put(("error", None, _shortened(name), text, ""))

    # -- the parent's side

    def collect(self, popen: Any, name: str, timeout: float | None) -> Outcome:
        """Wait for the message, or for the process to end without one.

        Args:
            popen: The process's Popen; its `poll()` tells whether the child still lives.
            name: The process's name, for the error.
            timeout: Longest wait in seconds, on the monotonic clock. None waits as long as the process lives;
                negative counts as 0.

        Raises:
            multiprocessing.TimeoutError: Nothing was known after `timeout` seconds.
        """
        deadline = None if timeout is None else time.monotonic() + max(timeout, 0.0)
        if not self._lock.acquire(timeout=-1 if timeout is None else max(timeout, 0.0)):
            raise _timed_out(name, timeout)
        try:
            if self._outcome is None:
                message = self._wait(popen, deadline)
                if message == ():
                    raise _timed_out(name, timeout)
                self._outcome = _unpack(message, name, popen)
            return self._outcome
        finally:
            self._lock.release()

    def _wait(self, popen: Any, deadline: float | None) -> tuple[Any, ...] | None:
        """Return the message, None if the process ended without one, () at the deadline."""
        look = _FIRST_LOOK_S
        while True:
            # Asked before the mailbox is: a child that has ended delivers no more.
            ended = popen.poll() is not None
            left = look if deadline is None else min(look, deadline - time.monotonic())
            try:
                return self._queue.get(timeout=left) if left > 0 and not ended else self._queue.get_nowait()  # type: ignore[no-any-return]
            except queue.Empty:
                if ended:
                    return None
            if deadline is not None and time.monotonic() >= deadline:
                return ()
            look = min(look * 2, _LONGEST_LOOK_S)


def _timed_out(name: str, timeout: float | None) -> _TimeoutError:
    return _TimeoutError(f"{name} is still running after {timeout:g} s" if timeout is not None else name)


def _shortened(text: str) -> str:
    return text.encode(errors="replace")[:_SHORT].decode(errors="ignore")


def _exit_status(error: SystemExit) -> int:
    """Return the exit status as `BaseProcess._bootstrap` computes it and the parent sees it."""
    if error.code is None:
        return 0
    return error.code & 0xFF if isinstance(error.code, int) else 1


def _pack_value(value: object) -> tuple[Any, ...]:
    try:
        return ("value", codec.encode_beside(value))
    except Exception as error:
        kind = type(value).__qualname__
        return _pack_failure(f"the target returned a {kind}, which could not be pickled", error)


def _pack_failure(text: str, error: Exception) -> tuple[Any, ...]:
    return ("error", None, type_name(error), f"{text}: {error}", _format(error))


def pack_error(error: BaseException, skip_frames: int) -> tuple[Any, ...]:
    """Pack an exception; tried here to come back to life, since what fails in the parent has no second chance.

    Args:
        error: The exception.
        skip_frames: Number of frames at the top of its traceback that are not the user's.
    """
    trace = error.__traceback__
    for _ in range(skip_frames):
        trace = trace.tb_next if trace is not None and trace.tb_next is not None else trace
    data = None
    try:
        data = codec.encode(error)
        if not isinstance(codec.loads(data), BaseException):
            data = None
    except Exception:
        data = None
    try:
        text = str(error)
    except BaseException as broken:
        text = f"<its text cannot be shown: {type_name(broken)}>"
    return ("error", data, type_name(error), text, _format(error, trace))


def _format(error: BaseException, trace: Any = None) -> str:
    import traceback  # here: 4 ms that only a failure costs

    return "".join(traceback.format_exception(type(error), error, trace or error.__traceback__))


def type_name(error: BaseException) -> str:
    kind = type(error)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def _unpack(message: tuple[Any, ...] | None, name: str, popen: Any) -> Outcome:
    if message is None:
        return Outcome(died=ProcessDiedError(name, popen.pid, popen.poll()))
    kind, *rest = message
    if kind == "exit":
        return Outcome(died=ProcessDiedError(name, popen.pid, rest[0])) if rest[0] else Outcome()
    if kind == "value":
        try:
            return Outcome(codec.loads(rest[0]))
        except Exception as error:
            text = f"the result of {name} could not be unpickled here: {error}"
            remote = RemoteError(type_name(error), text)
            remote.__cause__ = error
            return Outcome(error=remote)
    return Outcome(error=unpack_error(message))


def unpack_error(message: tuple[Any, ...]) -> BaseException:
    """Return the exception that `pack_error` packed, or a RemoteError for it; the child's traceback is its cause."""
    _, data, name, text, formatted = message
    error: BaseException
    try:
        error = RemoteError(name, text, formatted) if data is None else codec.loads(data)
        # Not by assignment, which its class may forbid, as that of a frozen dataclass does.
        vars(BaseException)["__cause__"].__set__(error, RemoteTraceback(formatted))
    except BaseException as broken:
        if isinstance(broken, KeyboardInterrupt) and threading.current_thread() is threading.main_thread():
            raise
        error = RemoteError(name, text, formatted)
        error.__cause__ = RemoteTraceback(formatted)
    return error
