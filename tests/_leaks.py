"""What a test left behind: processes, file descriptors, threads, shared memory, temporary files.

``Footprint.take()`` before and after; ``after.beyond(before)`` names what is new, one line a thing.

What may stay, and why:

- the two helper processes of the standard library, ``resource_tracker`` and the fork server, with the pipe ends and
  the socket that belong to them: one of each in a process, started on first use, ended with the process;
- the thread, the listener and the socket of ``multiprocessing.resource_sharer``, likewise;
- the family's one arena (a memfd and its mapping), the process's lifeline (a pipe) and the file for its stacks (a memfd), created on
  first use;
- the ``pymp-*`` directory of ``multiprocessing.util.get_temp_dir()``, removed at exit.
"""

from __future__ import annotations

import functools
import multiprocessing.forkserver
import multiprocessing.process
import multiprocessing.resource_sharer
import multiprocessing.resource_tracker
import os
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_PROC = Path("/proc")
_SHM = Path("/dev/shm")


@dataclass(frozen=True)
class Footprint:
    """Everything this process and its family hold now, by kind: identity -> how to show it."""

    processes: dict[object, str]
    fds: dict[object, str]
    threads: dict[object, str]
    memfds: dict[object, str]
    shm: dict[object, str]
    files: dict[object, str]

    @classmethod
    def take(cls) -> Footprint:
        """Look once; takes a few milliseconds."""
        singletons = _Singletons()
        return cls(
            processes=_processes(singletons),
            fds=_fds(singletons),
            threads=_threads(singletons),
            memfds=_memfds(singletons),
            shm=_shm(),
            files=_files(singletons),
        )

    def beyond(self, before: Footprint) -> dict[tuple[str, Any], str]:
        """What is here and was not there, a line each; a foreign process's shared memory is not counted."""
        found: dict[tuple[str, Any], str] = {}
        for kind, title in (
            ("processes", "process"),
            ("fds", "file descriptor"),
            ("threads", "thread"),
            ("memfds", "memfd mapping"),
            ("shm", "shared memory"),
            ("files", "temporary file"),
        ):
            old = getattr(before, kind)
            new = {key: shown for key, shown in getattr(self, kind).items() if key not in old}
            if kind == "shm" and new:
                new = {key: shown for key, shown in new.items() if not _held_by_strangers(_SHM / str(key), self)}
            found.update({(kind, key): f"{title}: {shown}" for key, shown in new.items()})
        return found


class _Singletons:
    """The standard library's helpers of this process and the arena, as they are now."""

    def __init__(self) -> None:
        tracker = multiprocessing.resource_tracker._resource_tracker
        server = multiprocessing.forkserver._forkserver
        sharer = multiprocessing.resource_sharer._resource_sharer
        self.pids = {tracker._pid, server._forkserver_pid} - {None}
        self.fds = {tracker._fd, server._forkserver_alive_fd} - {None}
        self.threads: set[object] = {getattr(sharer, "_thread", None)}
        self.files = {server._forkserver_address}
        listener = getattr(sharer, "_listener", None)
        if listener is not None:
            self.files.add(listener.address)
            self.fds.add(listener._listener._socket.fileno())
        self.directory = multiprocessing.process.current_process()._config.get("tempdir")
        self.arena: object = None
        native = sys.modules.get("procession._native")
        if native is not None and getattr(native, "has_arena", bool)():
            fd = native.arena_fd()
            self.fds |= {fd, *native._lifeline()}
            self.arena = os.fstat(fd).st_ino
        stacks = sys.modules.get("procession._proc.stacks")
        if stacks is not None:
            self.fds.add(stacks._fd)


@dataclass(frozen=True)
class _Stat:
    pid: int
    state: str
    parent: int
    session: int
    started: int


def _all_processes() -> dict[int, _Stat]:
    found = {}
    for entry in os.listdir(_PROC):
        if not entry.isdigit():
            continue
        try:
            text = (_PROC / entry / "stat").read_text(errors="replace")
        except OSError:
            continue
        # The name in brackets may hold anything, brackets and spaces too: count from the last one.
        fields = text[text.rindex(")") + 2 :].split()
        found[int(entry)] = _Stat(int(entry), fields[0], int(fields[1]), int(fields[3]), int(fields[19]))
    return found


def _processes(singletons: _Singletons) -> dict[object, str]:
    """Descendants of this process, and orphans of its session (their parent was one of ours and is dead).

    An orphan is known by its parent, which is then the reaper; its session alone does not tell, as the reaper of a
    container, its pid 1, may be of the same one.
    """
    everything = _all_processes()
    me, session = os.getpid(), os.getsid(0)
    ours = {me}
    grew = True
    while grew:
        more = {pid for pid, stat in everything.items() if stat.parent in ours} - ours
        grew = bool(more)
        ours |= more
    for pid, stat in everything.items():
        # Older than this process: what started it, and has lost its own parent since.
        younger = me in everything and stat.started > everything[me].started
        if stat.session == session and stat.parent == _reaper() and younger and stat.state != "Z":
            ours.add(pid)
    return {
        (pid, everything[pid].started): _show_process(everything[pid])
        for pid in sorted(ours - {me} - singletons.pids)
        if pid in everything
    }


@functools.cache
def _reaper() -> int:
    """The pid that orphans of this process get as their parent: pid 1, or an ancestor that asked for it."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        child = os.getpid()
        if os.fork() == 0:
            while os.getppid() == child:
                time.sleep(0.001)
            os.write(writer, str(os.getppid()).encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(writer)
    with open(reader, "rb") as answer:
        return int(answer.read())


def _show_process(stat: _Stat) -> str:
    try:
        command = (_PROC / str(stat.pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        command = ""
    return f"pid {stat.pid}, parent {stat.parent}: {command.strip()[:200] or '(no command line: it is ending)'}"


def _fds(singletons: _Singletons) -> dict[object, str]:
    found: dict[object, str] = {}
    for entry in os.listdir(_PROC / "self" / "fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{entry}")
        except OSError:
            continue  # the descriptor of the listing itself
        if int(entry) not in singletons.fds:
            found[int(entry), target] = f"{entry} -> {target}"
    return found


def _threads(singletons: _Singletons) -> dict[object, str]:
    named = {thread.native_id: thread for thread in threading.enumerate()}
    allowed = {thread.native_id for thread in named.values() if thread in singletons.threads}
    return {
        int(tid): repr(named.get(int(tid), f"a native thread without a Python object, tid {tid}"))
        for tid in os.listdir(_PROC / "self" / "task")
        if int(tid) not in allowed
    }


def _memfds(singletons: _Singletons) -> dict[object, str]:
    found: dict[object, str] = {}
    for line in (_PROC / "self" / "maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5].startswith("/memfd:") and int(fields[4]) != singletons.arena:
            found[int(fields[4])] = f"{fields[5]} (inode {fields[4]})"
    return found


def _shm() -> dict[object, str]:
    try:
        return {name: f"{_SHM}/{name}" for name in os.listdir(_SHM)}
    except OSError:
        return {}


def _held_by_strangers(path: Path, footprint: Footprint) -> bool:
    """Does a process that is none of ours have it open or mapped, so that it is another program's?"""
    ours = {os.getpid(), *(key[0] for key in footprint.processes if isinstance(key, tuple))}
    for entry in os.listdir(_PROC):
        if not entry.isdigit() or int(entry) in ours:
            continue
        try:
            if str(path) in (_PROC / entry / "maps").read_text(errors="replace"):
                return True
        except OSError:
            continue
    return False


def _files(singletons: _Singletons) -> dict[object, str]:
    """The run's own temporary directory, and the standard library's in it."""
    top = Path(tempfile.gettempdir())
    found: dict[object, str] = {}
    for place in (top, singletons.directory and Path(singletons.directory)):
        if not place or not place.is_dir():
            continue
        for path in place.iterdir():
            if str(path) in singletons.files or str(path) == singletons.directory:
                continue
            if path.name.startswith("pytest-of-"):
                continue  # tmp_path, which pytest itself clears away
            found[str(path)] = str(path)
    return found
