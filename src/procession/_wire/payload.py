"""What goes beside a pickle: large buffers, in the family's memory, and the handles that are in it.

An object that pickles its buffers out of band (protocol 5: NumPy arrays, pandas and Arrow data, `pickle.PickleBuffer`) is sent
as a pickle without them and a segment of shared memory for each. They are copied there once, by the sender; the receiver's
object uses the segment in place, and it is freed with that object. What already lies in a segment (`procession.shared`, `empty`,
`zeros`, `array`) is not even copied.

Whose writes are seen by whom: nobody's by anybody, as with any other message. A receiver that is the only holder writes to the
segment itself; where there is another, each that may write maps its pages privately (copy on write) from that moment on. What
`shared` has made is never written to: its buffers are read-only.
"""

from __future__ import annotations

import pickle

from procession._native import Hold, Segment, _set_payload_class

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

__all__ = ["LEAST_BYTES", "Outside", "Payload"]

# Shorter buffers are copied into the message: a segment costs a page, a mapping and some 10 us. The extension has the same.
LEAST_BYTES = 64 << 10


class Payload:
    """A pickle, the buffers it leaves out, and the handles in it, which live as long as this does.

    Args:
        data: The pickle.
        buffers: For each buffer its segment, where it begins there, and its length.
        handles: What holds the locks, queues and other objects whose handles are in `data`.
        lasting: It is sent more than once. Else it is given away when it is pickled: its receiver is the only holder then.
    """

    __slots__ = ("buffers", "data", "handles", "lasting")

    def __init__(
        self,
        data: bytes,
        buffers: Sequence[tuple[Segment, int, int]],
        handles: Sequence[object] = (),
        lasting: bool = False,
    ) -> None:
        self.data = data
        self.buffers = buffers
        self.handles = handles
        self.lasting = lasting

    def __reduce__(self) -> tuple[Any, ...]:
        state = (self.data, self.buffers, self.handles)
        self.given()
        return Payload, state

    def given(self) -> None:
        """It is on its way."""
        if not self.lasting:
            self.buffers = self.handles = ()

    @property
    def nbytes(self) -> int:
        """How much is beside the pickle, but for what all share."""
        return sum(length for segment, _, length in self.buffers if not segment.frozen)

    def load(self) -> Any:
        """Unpickle; the object uses the segments in place. Once only: two would be the same memory."""
        return pickle.loads(self.data, buffers=[_view(*each) for each in self.buffers])


_set_payload_class(Payload)


def _view(segment: Segment, offset: int, length: int) -> Any:
    return segment if length == len(segment) else memoryview(segment)[offset : offset + length]


class Outside:
    """What one pickle leaves out, or needs: a pickler's `buffer_callback`, and the list for `handle_collector`.

    Args:
        least: How long the buffers are that are left out, in bytes.
    """

    def __init__(self, least: int = LEAST_BYTES) -> None:
        self.least = least
        self.buffers: list[pickle.PickleBuffer] = []
        self.handles: list[object] = []

    def __call__(self, buffer: pickle.PickleBuffer) -> bool:
        """Take a large buffer; tell whether it goes into the pickle."""
        try:
            large = buffer.raw().nbytes >= self.least
        except BufferError:  # not contiguous
            large = False
        if large:
            self.buffers.append(buffer)
        return not large

    def clear(self) -> None:
        """Another attempt will be made, of the same object."""
        self.buffers.clear()
        self.handles.clear()

    def beside(self, data: bytes, lasting: bool = False) -> bytes | Payload:
        """Return the pickle, with what is outside of it, if there is anything."""
        if not self.buffers and not self.handles:
            return data
        # Not the handles themselves: they would be pickled again, with all that they carry.
        holds = [Hold(handle) for handle in self.handles]
        return Payload(data, [Segment.place(buffer) for buffer in self.buffers], holds, lasting)
