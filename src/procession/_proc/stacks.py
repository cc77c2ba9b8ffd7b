"""The Python stacks of a process and of all below it, from within or from outside, whatever they are at.

Each process of the family has `faulthandler` write its stacks into a file in memory when a certain signal comes: in C, without the GIL, so
that one which hangs tells as well. Whoever wants to know finds that file in ``/proc/<pid>/fd``, sends the signal, and reads.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time

from procession import _native

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import TextIO

__all__ = ["dump", "prepare", "stacks"]

_SIGNAL = signal.SIGRTMAX - 2
_NAME = "procession-stacks"
# So long a process may take to answer; one that is stopped never does.
_PATIENCE_S = 2.0
_LOOK_S = 0.002

# This process's file, and whose it is: a forked child has its parent's at first.
_fd = -1
_inode = 0
_owner = 0


def prepare() -> None:
    """Have this process tell its stacks when it is asked to."""
    global _fd, _inode, _owner
    if _owner == os.getpid():
        return
    import faulthandler
    import fcntl

    with contextlib.suppress(OSError, ValueError):  # no descriptors, or it is forbidden: it tells nothing then
        fd = os.memfd_create(_NAME)
        fcntl.fcntl(fd, fcntl.F_SETFL, os.O_APPEND)
        former, inode = _fd, _inode
        _fd, _inode, _owner = fd, os.fstat(fd).st_ino, os.getpid()
        # A daemon closes all that it finds, and the number may be another file's by now.
        with contextlib.suppress(OSError):
            if os.fstat(former).st_ino == inode:
                os.close(former)
        faulthandler.unregister(_SIGNAL)  # the parent's
        _native._write_end_at(_SIGNAL, _fd)
        faulthandler.register(_SIGNAL, file=_fd, all_threads=True, chain=True)


def dump(file: TextIO | None = None) -> None:
    """Print the Python stacks of this process and of all that it has started, and they have, to `file` (default: stderr).

    Waits up to two seconds for a process that does not answer. None is changed or stopped by it.

    Example:
        >>> import io, procession
        >>> with procession.Pool(1) as pool:
        ...     text = io.StringIO()
        ...     procession.dump(text)
        >>> "worker.py" in text.getvalue()
        True
    """
    prepare()
    out = sys.stderr if file is None else file
    for text in stacks(os.getpid()):
        print(text, file=out)


def stacks(pid: int) -> Iterator[str]:
    """Yield a text for the process `pid`, and for each that descends from it.

    Raises:
        ProcessLookupError: There is no such process.
    """
    if not os.path.exists(f"/proc/{pid}"):
        raise ProcessLookupError(f"there is no process {pid}")
    for depth, each in _below(pid, _children()):
        yield "\n".join(_describe(each, depth))


def _children() -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError, ValueError, IndexError):
                text = _read(f"/proc/{entry}/stat")
                found.setdefault(int(text[text.rindex(")") + 2 :].split()[1]), []).append(int(entry))
    return found


def _below(pid: int, children: dict[int, list[int]], depth: int = 0) -> Iterator[tuple[int, int]]:
    yield depth, pid
    for child in sorted(children.get(pid, ())):
        yield from _below(child, children, depth + 1)


def _read(path: str) -> str:
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read()


def _describe(pid: int, depth: int) -> list[str]:
    try:
        command = _read(f"/proc/{pid}/cmdline").replace("\0", " ").strip()
        status = dict(line.split(":\t", 1) for line in _read(f"/proc/{pid}/status").splitlines() if ":\t" in line)
    except OSError:
        return [f"{'  ' * depth}pid {pid}: it has ended"]
    head = f"{'  ' * depth}pid {pid}, {status.get('State', 'unknown')}: {command[:120] or status.get('Name', '')}"
    try:
        told = _ask(pid, status)
    except OSError as error:
        told = f"no stacks: {error.strerror}"
    return [head, *(f"{'  ' * depth}  {line}" for line in told.splitlines())]


def _file_of(pid: int) -> str | None:
    for number in os.listdir(f"/proc/{pid}/fd"):
        path = f"/proc/{pid}/fd/{number}"
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            if os.readlink(path).startswith(f"/memfd:{_NAME}"):
                return path
    return None


def _ask(pid: int, status: dict[str, str]) -> str:
    """Return what a process tells; or why it does not."""
    caught = int(status.get("SigCgt", "0"), 16) >> (_SIGNAL - 1) & 1
    path = _file_of(pid)
    if not caught or path is None:
        return "no stacks: no Python process, or none that procession has started or that has started one with it"
    with open(path, "r+b") as file:
        file.truncate(0)  # what it told before
        os.kill(pid, _SIGNAL)
        deadline = time.monotonic() + _PATIENCE_S
        text = file.read()
        while time.monotonic() < deadline and not text.endswith(b"\0"):
            time.sleep(_LOOK_S)
            text += file.read()
    return text.decode("utf-8", "replace").strip("\0\n ") or "no stacks: it does not answer"
