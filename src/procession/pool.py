"""`Pool`, and the names of `multiprocessing.pool`."""

from __future__ import annotations

from multiprocessing import pool as _std
from multiprocessing.pool import MaybeEncodingError, ThreadPool

from procession import context as _context
from procession._errors import RemoteTraceback
from procession._pool.iterators import IMapIterator, IMapUnorderedIterator
from procession._pool.pool import Pool as _Pool
from procession._pool.results import AsyncResult, MapResult

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

__all__ = [
    "ApplyResult",
    "AsyncResult",
    "IMapIterator",
    "IMapUnorderedIterator",
    "MapResult",
    "MaybeEncodingError",
    "Pool",
    "RemoteTraceback",
    "ThreadPool",
]

ApplyResult = AsyncResult
_StdPool = _std.Pool

_STANDARD = (_context._std.DefaultContext, *{type(one) for one in _context._std._concrete_contexts.values()})


def __getattr__(name: str) -> Any:
    # Private names that programs poke at, and names of later Pythons.
    return getattr(_std, name)


def context_of_ours(context: Any) -> Any:
    """Return the context of ours that stands for one of the standard library's, or for None; any other as it is."""
    if context is None or type(context) in _STANDARD:
        # The workers talk through the arena, which the standard library's processes do not bring along.
        return _context._default_context.get_context(context and context.get_start_method())
    return context


class Pool(_Pool):  # noqa: D101
    __doc__ = _Pool.__doc__

    def __init__(
        self,
        processes: int | None = None,
        initializer: Callable[..., object] | None = None,
        initargs: Iterable[Any] = (),
        maxtasksperchild: int | None = None,
        context: Any = None,
        **options: Any,
    ) -> None:
        if not isinstance(self, Pool):
            # The standard library's ThreadPool says Pool.__init__(self, ...) and means its own; after install() that is this.
            _StdPool.__init__(self, processes, initializer, initargs, maxtasksperchild, context)  # type: ignore[unreachable]
            return
        super().__init__(processes, initializer, initargs, maxtasksperchild, context_of_ours(context), **options)
