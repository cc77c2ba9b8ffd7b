"""How a process object travels to a spawned child, and the family's arena before it.

Two pickles are sent, preparation data and the process object, and between the two the child imports the user's
``__main__``: its module-level ``lock = procession.Lock()`` must find the arena already. The first thing in the
preparation data that can run code is the process's name; so the name sent is a `_Name`, which unpickles as a plain
string and on the way attaches the arena::

    parent                                             child (multiprocessing.spawn._main)
    Popen._launch(process)
      super()._launch(Parcel(process))
        pickle {name: _Name, sys_path, ...}  ───────►  sys.path as in the parent, arrive(): attach, hooks
                                                       prepare(): import __main__
        pickle Parcel                        ───────►  the process object, decoded by our codec
                                                       process._bootstrap()
"""

from __future__ import annotations

import contextlib
import operator
import os
import sys
from multiprocessing import reduction, spawn

from procession import _native
from procession._proc.popen import Reaper, arrival_hooks, on_arrival
from procession._proc.threads import find_loaded, limit_threads
from procession._wire import codec

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

__all__ = ["Parcel", "Sender", "arrive"]


def arrive(
    name: str,
    arena: Any,
    lifeline: Any,
    threads: tuple[int, int | None] | None,
    missing_main: str | None,
    hooks: list[Callable[[], object]],
) -> str:
    """Make a spawned child a member of its parent's family; called by unpickling a `_Name`.

    Args:
        name: The process's name, which is what is returned.
        arena: A DupFd of the arena's descriptor; owned by the arena from here on.
        lifeline: A DupFd of the parent's, to die with it; None if this process is to outlive it.
        threads: What it may use of the CPUs; see `procession._proc.threads`.
        missing_main: What the parent's ``__main__`` calls its file though there is no such file; its import is
            skipped.
        hooks: See `on_arrival`; they are called and passed on to this process's own children.
    """
    _native.attach(arena.detach())
    if lifeline is not None:
        fd = lifeline.detach()
        with contextlib.suppress(OSError):
            _native._arm_lifeline(fd)
        os.close(fd)
    if threads is not None:
        find_loaded()  # a fork server may have been told to load them
        limit_threads(*threads)
    if missing_main is not None:
        # multiprocessing.spawn does not import a main module whose file this one already has.
        sys.modules["__main__"].__file__ = missing_main
    for hook in hooks:
        on_arrival(hook)
        hook()
    return name


class _ParentPath:
    """Unpickles as None and sets `sys.path` to the parent's, so that `procession` is found where the parent did."""

    def __reduce__(self) -> tuple[Any, ...]:
        return spawn.prepare, ({"sys_path": spawn.get_preparation_data("")["sys_path"]},)


class _Arrival:
    """Unpickles by calling `arrive`."""

    def __init__(self, name: str, orphan_ok: bool, threads: tuple[int, int | None] | None) -> None:
        self._name = name
        self._orphan_ok = orphan_ok
        self._threads = threads

    def __reduce__(self) -> tuple[Any, ...]:
        path = codec.main_path()
        missing_main = path if path is not None and not codec.main_is_importable() else None
        # Only while a child is being spawned: multiprocessing decides how the descriptor gets there.
        arena = reduction.DupFd(_native.arena_fd())
        lifeline = None if self._orphan_ok else reduction.DupFd(_native._lifeline()[0])
        return arrive, (self._name, arena, lifeline, self._threads, missing_main, list(arrival_hooks))


class _Name(str):
    """A process's name that attaches the arena where it is unpickled."""

    __slots__ = ("orphan_ok", "threads")
    orphan_ok: bool
    threads: tuple[int, int | None] | None

    def __reduce__(self) -> tuple[Any, ...]:
        # Pickle looks up a function before its arguments are built; hence this pair, whose first half is built
        # with nothing but the standard library.
        return operator.getitem, ((_ParentPath(), _Arrival(str(self), self.orphan_ok, self.threads)), 1)


class Parcel:
    """A process object on its way: stands in for it in the standard library's `_launch`."""

    def __init__(self, process: Any, method: str) -> None:
        self._name = _Name(process._name)
        self._name.orphan_ok = getattr(process, "orphan_ok", False)
        self._name.threads = getattr(process, "_threads", None)
        self._process = process
        self._method = method

    def __reduce__(self) -> tuple[Any, ...]:
        main_by_value = not codec.main_is_importable()
        try:
            data = codec.encode_beside(self._process, main_by_value=main_by_value)
        except Exception as error:
            what = f"could not be sent to the new process {self._process.name!r} (start method {self._method!r})"
            codec.annotate(error, what, main_by_value=main_by_value, parts=_named_parts(self._process))
            raise
        return codec.loads, (data,)


def _named_parts(process: Any) -> dict[str, object]:
    """Return what a process object carries, under the names its maker gave."""
    state = dict(process.__dict__)
    parts: dict[str, object] = {}
    if state.get("_target") is not None:
        parts["target"] = state["_target"]
    parts.update((f"args[{i}]", value) for i, value in enumerate(state.pop("_args", ())))
    parts.update((f"kwargs[{key!r}]", value) for key, value in state.pop("_kwargs", {}).items())
    state.pop("_target", None)
    parts.update((f"self.{key}", value) for key, value in state.items())
    return parts


class Sender(Reaper):
    """A Popen that sends the process object in a `Parcel`; a mixin before one of the standard library's."""

    def _launch(self, process_obj: Any) -> None:
        handles: list[object] = []
        former = _native.handle_collector(handles)
        try:
            super()._launch(Parcel(process_obj, self.method))  # type: ignore[misc]
        finally:
            _native.handle_collector(former)
        self._handles = handles
