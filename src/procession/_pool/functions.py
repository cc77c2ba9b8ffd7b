"""Functions on their way to workers: sent once to each, and named by a number from then on."""

from __future__ import annotations

import functools
import itertools
import reprlib
from types import BuiltinFunctionType, FunctionType

from procession._pool import messages as m
from procession._pool.worker import fingerprint
from procession._wire import codec

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

__all__ = ["Function", "Registry", "describe_call"]

_numbers = itertools.count(1)
_shown = reprlib.Repr()
_shown.maxstring = _shown.maxother = 60


def describe_call(name: str, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> str:
    """Return ``name(arguments)``, shortened; whatever the arguments' repr does."""
    parts = []
    for prefix, value in [("", a) for a in args] + [(f"{k}=", v) for k, v in (kwargs or {}).items()]:
        try:
            text = _shown.repr(value)
        except Exception:
            text = f"<{type(value).__name__}>"
        parts.append(prefix + text)
    return f"{name}({', '.join(parts)})"


class Function:
    """One function in the way it is called.

    Attributes:
        fid: Its number in messages.
        kept: It is known for as long as the pool lives; else until its job is over.
        seconds: How long a call takes, a moving average; None before the first answer.
    """

    __slots__ = ("_message", "by_value", "fid", "function", "kept", "main_by_value", "mode", "seconds", "seed")

    def __init__(self, function: Callable[..., Any], mode: int, seed: int | None, main_by_value: bool) -> None:
        self.fid = next(_numbers)
        self.function = function
        self.mode = mode
        self.seed = seed
        self.kept = False
        self.by_value = False
        self.seconds: float | None = None
        self.main_by_value = main_by_value
        self._message: tuple[Any, ...] | None = None

    def message(self) -> tuple[Any, ...]:
        """Return the message that makes it known to a worker.

        Raises:
            Exception: It cannot be pickled, neither by name nor by value.
        """
        if self._message is None:
            by_value = self.main_by_value or self.by_value
            data = codec.encode_beside(self.function, main_by_value=by_value, lasting=True)
            mark = None
            by_name = not self.main_by_value and not self.by_value and not codec.main_is_importable()
            if by_name and getattr(self.function, "__module__", None) == "__main__":
                # A forked worker looks it up in the __main__ it inherited, where by now another may go by the name.
                mark = fingerprint(self.function)
            self._message = (m.DEFINE, self.fid, data, self.mode, self.seed, mark)
        return self._message

    def send_by_value(self) -> None:
        """A worker does not have it under its name: from now on it is sent as code, under a new number."""
        self.by_value = True
        self._message = None
        self.fid = next(_numbers)

    def observe(self, seconds: float) -> None:
        """Take in that a call took `seconds`."""
        self.seconds = seconds if self.seconds is None else 0.7 * self.seconds + 0.3 * seconds

    @property
    def name(self) -> str:
        """What messages call it."""
        function = self.function
        while isinstance(function, functools.partial):
            function = function.func
        return str(getattr(function, "__qualname__", None) or type(function).__qualname__)

    def describe(self, item: Any) -> str:
        """Return the call with `item` as text."""
        if self.mode == m.EACH:
            return describe_call(self.name, (item,))
        if self.mode == m.STAR:
            try:
                return describe_call(self.name, tuple(item))
            except TypeError:
                return describe_call(self.name, (item,))
        if self.mode == m.CALL:
            return describe_call(self.name, *item)
        return describe_call(self.name, (), item)


class Registry:
    """The functions of one pool."""

    def __init__(self, main_by_value: bool) -> None:
        self.main_by_value = main_by_value
        self._kept: dict[tuple[Any, int], Function] = {}

    def get(self, function: Callable[..., Any], mode: int, seed: int | None = None) -> Function:
        """Return the entry of a function.

        Only functions that are found by name are remembered: whatever else there is (a closure, a partial, a bound
        method) may have changed since it was last sent.
        """
        known = seed is None and type(function) in (FunctionType, BuiltinFunctionType, type)
        if not known:
            return Function(function, mode, seed, self.main_by_value)
        entry = self._kept.get((function, mode))
        if entry is None:
            entry = Function(function, mode, None, self.main_by_value)
            if codec.is_found_by_name(function) and not (self.main_by_value and function.__module__ == "__main__"):
                entry.kept = True
                self._kept[function, mode] = entry
        return entry
