"""Pickling for another process: by reference where that works, by value where it does not.

`dumps` tries the standard library's `ForkingPickler` first. What it refuses (lambdas, closures, functions of a
notebook cell) goes through `cloudpickle`, which sends code instead of a name. So does what was pickled as
``__main__.name`` when the receiver cannot import this ``__main__`` (``python -c``, a REPL, a notebook, stdin).
Either way the bytes are plain pickle: `pickle.loads` reads them.

When both refuse, the first error is raised, with a note that names the part at fault (from Python 3.11 on).
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import pickle
import sys
from multiprocessing import context as _context
from multiprocessing import process as _process
from multiprocessing.reduction import ForkingPickler
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType

from procession import _native
from procession._wire import tensors
from procession._wire.payload import Outside, Payload, is_frozen

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import Any, ClassVar

__all__ = [
    "annotate",
    "decode_items",
    "dumps",
    "encode",
    "encode_beside",
    "encode_items",
    "encode_result",
    "encode_results",
    "find_culprit",
    "is_found_by_name",
    "loads",
    "main_is_importable",
    "main_path",
]


def _reduce_view(view: memoryview) -> tuple[Any, ...]:
    """Pickle a view of what `procession.shared` has made; others have no owner who would keep their memory."""
    if not (view.c_contiguous and is_frozen(view)):
        raise TypeError("cannot pickle 'memoryview' object")
    return memoryview, (pickle.PickleBuffer(view),)


ForkingPickler.register(memoryview, _reduce_view)

# How deep find_culprit looks. Arbitrary: deeper paths are longer than they are helpful.
_CULPRIT_DEPTH = 5

_MAIN_NAMES = ("__main__", "__mp_main__")


def loads(data: bytes | Payload) -> Any:
    """Return what one of the functions below was given, in whatever process."""
    return data.load() if type(data) is Payload else _native._unpack(data)  # type: ignore[arg-type]


def dumps(obj: object, *, main_by_value: bool = False) -> bytes | Payload:
    """Pickle an object for another process; large buffers and handles go beside the pickle, see `encode_beside`.

    Args:
        obj: Anything `ForkingPickler` or `cloudpickle` can take.
        main_by_value: True when the receiver cannot import this process's ``__main__``: what is defined there
            then travels by value.

    Raises:
        Exception: Whatever the plain pickler raised first, if pickling by value fails too; with a note that names
            the part at fault.
    """
    try:
        return encode_beside(obj, main_by_value=main_by_value)
    except Exception as error:
        annotate(error, "cannot be sent to another process", main_by_value=main_by_value, parts={"the object": obj})
        raise


def encode_beside(obj: object, *, main_by_value: bool = False, lasting: bool = False) -> bytes | Payload:
    """Pickle like `encode`, with large buffers and the handles beside the pickle, if there are any.

    What comes out is to be sent in a message of one of our queues, or in a pickle for a new process. `lasting`: more than once.
    """
    return _beside(functools.partial(encode, obj, main_by_value=main_by_value), lasting)


def _beside(pickled: Callable[[Outside], bytes], lasting: bool = False) -> bytes | Payload:
    outside = Outside()
    former = _native.handle_collector(outside.handles)
    try:
        data = pickled(outside)
    finally:
        _native.handle_collector(former)
    return outside.beside(data, lasting)


def encode(obj: object, outside: Outside | None = None, *, main_by_value: bool = False) -> bytes:
    """Pickle by name or by value; the error carries no note. What need not be in the pickle goes `outside`."""
    popen: Any = _context.get_spawning_popen()
    descriptors: list[int] = getattr(popen, "_fds", [])
    known = len(descriptors)
    try:
        data = _plain(obj, outside)
    except Exception as error:
        # The descriptors of the attempt that failed must not be sent twice.
        del descriptors[known:]
        if outside is not None:
            outside.clear()
        try:
            return _by_value(obj, outside, main_by_value=main_by_value)
        except Exception:
            del descriptors[known:]
            raise error from None
    # The text is searched, not the object: this costs next to nothing, and a false alarm only costs cloudpickle.
    if main_by_value and b"__main__" in data:
        del descriptors[known:]
        if outside is not None:
            outside.clear()
        return _by_value(obj, outside, main_by_value=True)
    return data


def encode_items(items: Sequence[Any], *, main_by_value: bool = False) -> bytes | Payload:
    """Encode a chunk of items for `decode_items`."""
    return _native._pack(items) or encode_beside(items, main_by_value=main_by_value)


def encode_results(results: list[Any], *, main_by_value: bool = False) -> bytes | Payload:
    """Encode a chunk of results for `decode_items`; see `encode_result`."""
    return _native._pack(results) or _encode_result(results, main_by_value=main_by_value)


def decode_items(data: bytes | Payload) -> list[Any]:
    """Return the items as a list; a chunk of a range or tuple too."""
    items = loads(data)
    return items if type(items) is list else list(items)


def encode_result(obj: object, *, main_by_value: bool = False) -> bytes | Payload:
    """Encode a pool's result: by value only what its receiver knows by no name."""
    return _native._pack(obj) or _encode_result(obj, main_by_value=main_by_value)


def _encode_result(obj: object, *, main_by_value: bool) -> bytes | Payload:
    if main_by_value:
        return encode_beside(obj, main_by_value=True)
    return _beside(functools.partial(_plain, obj))


def _plain(obj: object, outside: Outside | None = None) -> bytes:
    if outside is None:
        return _native.pickle_beside(obj, sys.maxsize)[0]
    data, buffers = _native.pickle_beside(obj, outside.least)
    outside.buffers.extend(buffers)
    return data


def _by_value(obj: object, outside: Outside | None, *, main_by_value: bool) -> bytes:
    buffer = io.BytesIO()
    _by_value_pickler()(buffer, main_by_value, outside).dump(obj)
    return buffer.getvalue()


@functools.lru_cache(maxsize=1)
def _by_value_pickler() -> Any:
    """Return a cloudpickle pickler that knows what `ForkingPickler` was taught; made on first use."""
    from collections import ChainMap

    import cloudpickle

    class ByValuePickler(cloudpickle.Pickler):  # type: ignore[misc]
        # The registry itself and not a copy: torch and others register while the program runs.
        dispatch_table: ClassVar[Any] = ChainMap(
            ForkingPickler._extra_reducers,
            {io.TextIOWrapper: _refuse},
            cloudpickle.Pickler.dispatch_table,
        )

        def __init__(self, file: io.BytesIO, main_by_value: bool, outside: Outside | None) -> None:
            super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL, buffer_callback=outside)
            self._main_by_value = main_by_value

        def reducer_override(self, obj: Any) -> Any:
            known = ForkingPickler._extra_reducers.get(type(obj))
            if getattr(known, "__module__", None) == "torch.multiprocessing.reductions":
                return tensors.instead_of(known)(obj)
            # cloudpickle sends everything of __main__ by value. Where the receiver has that module too, a name is
            # shorter and keeps the identity of classes.
            if not self._main_by_value and isinstance(obj, (type, FunctionType)) and _is_found_in_main(obj):
                return NotImplemented
            return super().reducer_override(obj)

    return ByValuePickler


def _refuse(obj: object) -> Any:
    """Stand in for cloudpickle's reducers that send a copy of another type: a file's text, a buffer's bytes."""
    raise TypeError(f"cannot pickle {type(obj).__name__!r} object")


def is_found_by_name(obj: Any) -> bool:
    """Tell whether this class or function is what its module has under its name: it is pickled as that name."""
    module = obj.__module__ or "builtins"
    found: Any = sys.modules.get("__main__" if module in _MAIN_NAMES else module)
    for part in obj.__qualname__.split("."):
        found = getattr(found, part, None)
    return found is obj


def _is_found_in_main(obj: Any) -> bool:
    return obj.__module__ in _MAIN_NAMES and is_found_by_name(obj)


def main_is_importable() -> bool:
    """Tell whether a spawned child can import this process's ``__main__``; `multiprocessing.spawn`'s own rule."""
    main = sys.modules.get("__main__")
    name = getattr(getattr(main, "__spec__", None), "name", None)
    if name is not None:
        # The __main__.py of packages and archives is not imported by the child: it has no code but the main code.
        return not (name == "__main__" or name.endswith(".__main__"))
    path = main_path()
    return path is not None and os.path.splitext(os.path.basename(path))[0] != "ipython" and os.path.isfile(path)


def main_path() -> str | None:
    """Return the path a child is told to import as ``__main__``; it need not exist (``<stdin>``)."""
    main = sys.modules.get("__main__")
    path = getattr(main, "__file__", None)
    if path is None or getattr(getattr(main, "__spec__", None), "name", None) is not None:
        return None
    if not os.path.isabs(path) and _process.ORIGINAL_DIR is not None:
        path = os.path.join(_process.ORIGINAL_DIR, path)
    return os.path.normpath(path)


def annotate(error: BaseException, what: str, *, main_by_value: bool = False, parts: dict[str, object]) -> None:
    """Add to `error` a note that names the part that could not be pickled; before Python 3.11 do nothing.

    Args:
        error: What `dumps` raised.
        what: What is the matter with it, to follow its name: "could not be sent to ...".
        main_by_value: As given to `dumps`.
        parts: The parts of what was pickled, by the names the caller knows them by.
    """
    if not hasattr(error, "add_note"):
        return
    where = ""
    for name, part in parts.items():
        where = find_culprit(part, name, main_by_value=main_by_value)
        if where:
            break
    error.add_note(
        f"{where or 'An attribute'} {what}. Give the other process what it needs to open or build the object there "
        "(a path, an address, plain data), or define __reduce__ or __getstate__ on its class."
    )


def find_culprit(obj: object, name: str, *, main_by_value: bool = False, depth: int = _CULPRIT_DEPTH) -> str:
    """Return the path to the innermost part of `obj` that cannot be pickled, starting with `name`; "" if all can."""
    popen: Any = _context.get_spawning_popen()
    descriptors: list[int] = getattr(popen, "_fds", [])
    known = len(descriptors)
    try:
        encode(obj, main_by_value=main_by_value)
    except Exception:
        if depth > 0:
            for suffix, part in _parts(obj):
                inner = find_culprit(part, name + suffix, main_by_value=main_by_value, depth=depth - 1)
                if inner:
                    return inner
        return f"{name} ({type(obj).__qualname__})"
    finally:
        del descriptors[known:]
    return ""


def _parts(obj: object) -> Iterator[tuple[str, object]]:
    """Yield the parts of an object that pickling visits, each with how one writes it in Python."""
    if isinstance(obj, dict):
        for key, value in obj.items():
            yield f"[{key!r}]", value
    elif isinstance(obj, (list, tuple)):
        for index, value in enumerate(obj):
            yield f"[{index}]", value
    elif isinstance(obj, functools.partial):
        yield ".func", obj.func
        yield ".args", obj.args
        yield ".keywords", obj.keywords
    elif isinstance(obj, MethodType):
        yield ".__self__", obj.__self__
    elif isinstance(obj, FunctionType):
        yield from _parts_of_function(obj)
    elif not isinstance(obj, (type, ModuleType, BuiltinFunctionType)):
        for attribute, value in getattr(obj, "__dict__", {}).items():
            yield f".{attribute}", value


def _parts_of_function(function: FunctionType) -> Iterator[tuple[str, object]]:
    for variable, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=False):
        with contextlib.suppress(ValueError):  # not yet assigned
            yield f"'s variable {variable}", cell.cell_contents
    if function.__module__ in _MAIN_NAMES:
        for variable in function.__code__.co_names:
            if variable in function.__globals__:
                yield f"'s global {variable}", function.__globals__[variable]
