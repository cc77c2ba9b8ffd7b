"""A template process: a copy of this one, made while it had no other threads, that forks on request.

A pool must replace its workers long after it has started, when there are threads, its own among them; and a fork of a
process with threads copies whatever lock one of them holds. So the pool forks a template of itself first. The template has
one thread and does nothing; for each request it forks a child, which inherits what the pool's maker had when it made the pool.

The protocol is that of `multiprocessing.forkserver`: two descriptors go with each request, from one the child reads
its process object, into the other the template writes the child's pid and, when it has ended, its exit status.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import struct
import threading
from multiprocessing import context as _context
from multiprocessing import reduction, util

from procession import _native
from procession._proc.descriptors import enough_descriptors
from procession._proc.popen import Reaper
from procession._wire import codec

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = ["Template", "TemplateGoneError", "TemplatePopen"]

_NUMBER = struct.Struct("q")
# So often the template looks whether its parent is still there, beside the end of its socket.
_PARENT_CHECK_MS = 1000


class Template:
    """A forked copy of this process that forks children. To be made before the threads are.

    Raises:
        OSError: No process could be made.
    """

    def __init__(self) -> None:
        with enough_descriptors("for a pool's template process"):
            _native._lifeline()
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        util._flush_std_streams()
        parent = os.getpid()
        pid = _native._fork_dormant(ours.fileno(), theirs.fileno())
        if pid == 0:
            code = 1
            try:
                ours.detach()  # closed already
                _serve(theirs, parent)
                code = 0
            finally:
                os._exit(code)
        theirs.close()
        self._socket = ours
        self._owner = os.getpid()
        self.pid = pid

    def request(self, child_reads: int, status_to: int) -> None:
        """Have a child forked.

        Raises:
            OSError: The template has ended.
        """
        reduction.sendfds(self._socket, [child_reads, status_to])

    def retire(self) -> None:
        """Have the template end when its last child has."""
        if self._owner == os.getpid():
            # Whatever was forked since has a copy of this end, so its closing alone says nothing.
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def close(self) -> None:
        """End the template; waits for its end, and so for that of its children."""
        self.retire()
        if self._owner == os.getpid():
            with contextlib.suppress(ChildProcessError):
                os.waitpid(self.pid, 0)


class TemplateGoneError(OSError):
    """The template has ended, as by SIGKILL, before it started what was asked for."""


class TemplatePopen(Reaper):
    """Starts a child through a template.

    Raises:
        TemplateGoneError: It has ended.
    """

    method = "fork"
    sentinel: int

    def __init__(self, process: Any, template: Template) -> None:
        self._fds: list[int] = []
        self._template = template
        self._reading = threading.Lock()
        super().__init__(process)

    def _launch(self, process: Any) -> None:
        handles: list[object] = []
        former = _native.handle_collector(handles)
        _context.set_spawning_popen(self)  # type: ignore[arg-type]
        try:
            data = codec.encode(process)
        finally:
            _context.set_spawning_popen(None)
            _native.handle_collector(former)
        self._handles = handles
        child_reads, to_child = os.pipe()
        self._status, status_to = os.pipe()
        # The end of `to_child` stays open: its closing tells the child that the parent is gone.
        ours = [to_child, self._status]
        try:
            try:
                self._template.request(child_reads, status_to)
            finally:
                os.close(child_reads)
                os.close(status_to)
            with open(to_child, "wb", closefd=False) as file:
                file.write(_NUMBER.pack(len(data)) + data)
            self.pid = _read_number(self._status)
        except (OSError, EOFError) as error:
            util.close_fds(*ours)
            raise TemplateGoneError(f"the template process {self._template.pid} has ended") from error
        try:
            # Also when the template is killed, and the status never comes, this tells when the child has ended.
            self.sentinel = os.pidfd_open(self.pid)
            ours.append(self.sentinel)
        except OSError:
            self.sentinel = self._status
        self.finalizer = util.Finalize(self, util.close_fds, ours)

    def poll(self, flag: int = os.WNOHANG) -> int | None:
        """Return the exit code, None while the child runs."""
        if self.returncode is None:
            from multiprocessing.connection import wait

            if not wait([self.sentinel], 0 if flag == os.WNOHANG else None):
                return None
            with self._reading:  # active_children() in one thread, join() in another
                if self.returncode is None:
                    try:
                        code = _read_number(self._status)
                    except (OSError, EOFError):
                        code = 255  # the template is gone, and nobody knows how its child ended
                    self.returncode = code
                    _native.record_exit(self.pid, code)
                    self._handles = None
        return self.returncode

    def duplicate_for_child(self, fd: int) -> int:  # noqa: ARG002
        """Descriptors cannot be sent this way; what a worker needs it has inherited."""
        raise ValueError("a descriptor cannot be sent to a worker that is forked from a template")


def _read_number(fd: int) -> int:
    data = b""
    while len(data) < _NUMBER.size:
        part = os.read(fd, _NUMBER.size - len(data))
        if not part:
            raise EOFError("the template process has ended")
        data += part
    return int(_NUMBER.unpack(data)[0])


# -- the template's side


def _serve(requests: socket.socket, parent: int) -> None:
    """Be the template, until the parent ends, or has closed the socket and all children have ended."""
    interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
    wake_reads, wake_writes = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    ended = signal.signal(signal.SIGCHLD, lambda *_: None)
    wakeup = signal.set_wakeup_fd(wake_writes, warn_on_full_buffer=False)
    children: dict[int, int] = {}
    poll = select.poll()
    poll.register(requests, select.POLLIN)
    poll.register(wake_reads, select.POLLIN)
    wanted = True
    while os.getppid() == parent and (wanted or children):
        ready = dict(poll.poll(_PARENT_CHECK_MS))
        if wake_reads in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(wake_reads, 4096)
        _reap(children)
        if not wanted or requests.fileno() not in ready:
            continue
        try:
            child_reads, status_to = reduction.recvfds(requests, 2)
        except (EOFError, OSError, RuntimeError):
            wanted = False
            poll.unregister(requests)
            continue
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                signal.set_wakeup_fd(wakeup)
                signal.signal(signal.SIGCHLD, ended)
                signal.signal(signal.SIGINT, interrupt)
                for fd in (wake_reads, wake_writes, status_to, *children.values()):
                    os.close(fd)
                requests.close()
                code = _be_child(child_reads)
            finally:
                os._exit(code)
        os.close(child_reads)
        children[pid] = status_to
        _say(status_to, pid)


def _reap(children: dict[int, int]) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        fd = children.pop(pid, None)
        if fd is not None:
            _say(fd, os.waitstatus_to_exitcode(status))
            os.close(fd)


def _say(fd: int, number: int) -> None:
    with contextlib.suppress(OSError):  # the parent no longer wants to know
        os.write(fd, _NUMBER.pack(number))


def _be_child(fd: int) -> int:
    with open(fd, "rb", closefd=False) as file:
        data = file.read(_NUMBER.unpack(file.read(_NUMBER.size))[0])
    process = codec.loads(data)
    return int(process._bootstrap(parent_sentinel=fd))
