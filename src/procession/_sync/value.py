"""Value: the standard library's shared numbers, quicker to read and write under their lock."""

from __future__ import annotations

from multiprocessing import sharedctypes

from procession._native import LockedAttribute

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

__all__ = ["Synchronized", "quicken"]


class Synchronized(sharedctypes.Synchronized):  # type: ignore[type-arg]
    """A number in shared memory and its lock; a `multiprocessing.sharedctypes.Synchronized`.

    ``v.value += 1`` reads and writes, each under the lock, and another process can come in between: hold ``v.get_lock()``
    around it, as with the standard library's.
    """

    value = LockedAttribute("value")

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        function, arguments = super().__reduce__()
        return _rebuild, (function, arguments)


def quicken(value: Any) -> Any:
    """Return what `multiprocessing.Value` made; a number with a lock as our `Synchronized`."""
    if type(value) is sharedctypes.Synchronized:
        value.__class__ = Synchronized
    return value


def _rebuild(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    return quicken(function(*arguments))
