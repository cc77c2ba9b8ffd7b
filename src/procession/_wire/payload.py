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

from procession._native import Hold, Payload, Segment

TYPE_CHECKING = False
if TYPE_CHECKING:
    import pickle

__all__ = ["LEAST_BYTES", "Outside", "Payload", "is_frozen"]

# Shorter buffers are copied into the message: a segment costs a page, a mapping and some 10 us. The extension has the same.
LEAST_BYTES = 64 << 10


def is_frozen(view: memoryview) -> bool:
    """Tell whether these bytes are where `procession.shared` has put them: they are sent as they are, however few."""
    found = Segment.find(view)
    return found is not None and found[0].frozen


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
            raw = buffer.raw()
        except BufferError:  # not contiguous
            return True
        if raw.nbytes < self.least and not is_frozen(raw):
            return True
        self.buffers.append(buffer)
        return False

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
