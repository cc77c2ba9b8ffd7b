"""What callers hold of a stream: an iterator over its results."""

from __future__ import annotations

import weakref
from multiprocessing import pool as _std

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from procession._pool.stream import Stream

__all__ = ["IMapIterator", "IMapUnorderedIterator"]


class IMapIterator(_std.IMapIterator):  # type: ignore[type-arg]
    """Gives out the results of a stream; what `Pool.imap` returns. Dropping it cancels what it has not given out."""

    def __init__(self, stream: Stream, owner: Any) -> None:
        self._stream = stream
        self._owner = owner
        stream.iterator = weakref.ref(self)

    def __iter__(self) -> IMapIterator:
        return self

    def __next__(self) -> Any:
        stream = self._stream
        # The frame may live on in a traceback, as that of a notebook's last error, and would keep the iterator.
        del self
        return stream.next()

    def next(self, timeout: float | None = None) -> Any:
        """Return the next result.

        Raises:
            StopIteration: That was all.
            multiprocessing.TimeoutError: None came within `timeout` seconds.
            BaseException: What the function, or the input, raised; the next call goes on with the next item.
        """
        stream = self._stream
        del self  # as in __next__
        return stream.next(timeout)

    def close(self) -> None:
        """Give up the rest: what waits is dropped, what runs is interrupted."""
        self._stream.close()

    def __aiter__(self) -> IMapIterator:
        return self

    async def __anext__(self) -> Any:
        import asyncio

        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(None, self._next_or_end)
        except _EndError:
            raise StopAsyncIteration from None

    def _next_or_end(self) -> Any:
        try:
            return self._stream.next()
        except StopIteration:
            raise _EndError from None

    def __del__(self) -> None:
        stream = self.__dict__.get("_stream")
        if stream is not None and not stream.settled:
            stream.engine.forsake(stream)


class IMapUnorderedIterator(IMapIterator):
    """Gives out the results of a stream as they come; what `Pool.imap_unordered` returns."""


class _EndError(Exception):
    """StopIteration, which cannot be raised into a future."""
