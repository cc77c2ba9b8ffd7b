"""Arrays in the family's memory: `shared`, `empty`, `zeros`, `array`; and who uses how much of it: `memory`."""

from __future__ import annotations

import os
import pickle
from collections import namedtuple
from multiprocessing.process import current_process

from procession import _native
from procession._native import Segment
from procession._wire import codec
from procession._wire.payload import LEAST_BYTES, Outside

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any, TypeVar

    import numpy as np
    from numpy.typing import ArrayLike, DTypeLike, NDArray

    _T = TypeVar("_T")

__all__ = ["Holder", "Memory", "array", "empty", "memory", "shared", "zeros"]

# So that every array in a segment begins on a cache line.
_ALIGN = 64


def shared(obj: _T) -> _T:
    """Return a copy of `obj` whose data all processes of the family read in place.

    However often it is sent, to however many processes, its data is neither pickled nor copied again: they get a handle. The copy
    is read-only, here and everywhere. The memory is freed when no process has it any more, whoever is killed.

    Args:
        obj: A NumPy array, a pandas or Arrow object, or any other that pickles its buffers out of band (protocol 5), or a list,
            tuple, dict or other object that has such in it: all their buffers are shared, the rest is pickled with each message.
            Of `bytes`, a `bytearray` or a `memoryview` a read-only `memoryview` is returned.

    Raises:
        TypeError: There is nothing in it that could be shared.
        ArenaFullError: The limit of the family's memory has been reached; a `MemoryError`.
    """
    if isinstance(obj, (bytes, bytearray, memoryview)):
        view: Any = memoryview(_frozen([memoryview(obj).cast("B")])[0])
        return view  # type: ignore[no-any-return]
    outside = Outside(least=0)
    data = codec.encode(obj, outside)
    if not outside.buffers:
        raise TypeError(
            f"there is nothing to share in a {type(obj).__qualname__}: it has no buffers (as NumPy arrays, DataFrames and bytes "
            "have), and would be pickled for each task. Give it to each worker once instead: Pool(initializer=..., initargs=...)"
        )
    copy: _T = pickle.loads(data, buffers=_frozen([buffer.raw() for buffer in outside.buffers]))
    return copy


def _frozen(buffers: Sequence[memoryview]) -> list[memoryview]:
    """Copy buffers into one segment that is never written to again; return where they are in it."""
    starts, size = [], 0
    for buffer in buffers:
        starts.append(size)
        size += -(-buffer.nbytes // _ALIGN) * _ALIGN
    while True:
        segment = Segment(size)
        for start, buffer in zip(starts, buffers, strict=True):
            segment.fill(buffer, start)
        if segment.isolated:  # another thread has forked meanwhile
            continue
        try:
            segment.freeze()
        except BufferError:
            continue
        view = memoryview(segment)
        return [view[start : start + buffer.nbytes] for start, buffer in zip(starts, buffers, strict=True)]


def empty(shape: int | Sequence[int], dtype: DTypeLike = float, order: str = "C") -> NDArray[Any]:
    """Return a NumPy array in the family's memory, its elements not set.

    It is used as any other; but the first time it is sent to another process, it is not copied: the receiver reads it where it is.
    What either writes after that, the other does not see. Arrays below 64 KiB, and those of objects, are ordinary ones.

    Args:
        shape: As for `numpy.empty`.
        dtype: As for `numpy.empty`.
        order: "C" or "F".

    Raises:
        ArenaFullError: The limit of the family's memory has been reached; a `MemoryError`.
        ModuleNotFoundError: NumPy is not installed.
    """
    return _new(shape, dtype, order)[0]


def zeros(shape: int | Sequence[int], dtype: DTypeLike = float, order: str = "C") -> NDArray[Any]:
    """Return a NumPy array of zeros in the family's memory; see `empty`."""
    new, segment = _new(shape, dtype, order)
    if segment is None:
        new[...] = 0
    else:
        segment.zero()
    return new


def array(obj: ArrayLike, dtype: DTypeLike | None = None, order: str = "C") -> NDArray[Any]:
    """Return a copy of an array, or of what NumPy makes one of, in the family's memory; see `empty`."""
    import numpy as np

    source = np.asarray(obj, dtype=dtype)
    new = empty(source.shape, source.dtype, order)
    new[...] = source
    return new


def _new(shape: Any, dtype: Any, order: str) -> tuple[np.ndarray[Any, Any], Segment | None]:
    import numpy as np

    if order not in {"C", "F"}:
        raise ValueError(f'order must be "C" or "F", not {order!r}')
    kind = np.dtype(dtype)
    # NumPy's own arithmetic and errors, for a shape of one element's memory.
    like = np.broadcast_to(np.empty((), np.uint8), shape)
    if kind.hasobject or like.size * kind.itemsize < LEAST_BYTES:
        return np.empty(shape, kind, order=order), None  # type: ignore[call-overload]
    segment = Segment(like.size * kind.itemsize)
    segment.populate()
    return np.ndarray(like.shape, kind, buffer=memoryview(segment), order=order), segment  # type: ignore[arg-type]


# By collections, not typing: that costs a worker more than all of this package.
class Holder(namedtuple("Holder", ("pid", "name", "bytes", "segments"))):  # noqa: PYI024
    """A process that holds arrays, or other buffers, in the family's memory.

    Attributes:
        pid: Its process id.
        name: Its name, as far as it is known.
        bytes: How much they take. What several processes hold is counted for each.
        segments: How many they are.
    """

    __slots__ = ()


class Memory(
    namedtuple(  # noqa: PYI024
        "Memory", "used limit idle segments in_messages reserved blocks objects processes holders"
    )
):
    """What the family's memory holds, in bytes; what `memory` returns.

    Attributes:
        used: Taken by queues, locks, arrays and all else.
        limit: What may be used: three quarters of the container's or the machine's memory when the first process began, or
            PROCESSION_ARENA_SIZE.
        idle: Not used, and not given back to the kernel yet: the next arrays get it.
        segments: The part of `used` that arrays and other buffers take.
        in_messages: The part of `segments` that is in queues, on its way.
        reserved: The address space it has.
        blocks, objects, processes: How many blocks are used; how many of them are locks, queues, arrays and the like; how many
            processes the family has.
        holders: Who has arrays, a tuple of `Holder`, the largest first.
    """

    __slots__ = ()

    @property
    def free(self) -> int:
        """What may still be used."""
        return int(self.limit - self.used)


def memory() -> Memory:
    """Tell how much of the family's memory is used, and by whom. Takes some 10 us, and 5 ns for each block."""
    state = _native.memory()
    # The first process of a family has no name there: nobody has started it.
    mine = {os.getpid(): current_process().name}
    holders = [
        Holder(pid, name or mine.get(pid, ""), nbytes, segments) for pid, name, nbytes, segments in state.pop("holders")
    ]
    return Memory(holders=tuple(sorted(holders, key=lambda holder: -holder.bytes)), **state)
