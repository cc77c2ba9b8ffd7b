"""Descriptors: more of them when they run out, and a clear error when there are no more."""

from __future__ import annotations

import contextlib
import errno
import os
import resource

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["enough_descriptors"]

# A process, or a worker of a pool, takes up to six. Arbitrary beyond that: what the program itself needs meanwhile.
_SPARE = 64


@contextlib.contextmanager
def enough_descriptors(what: str) -> Iterator[None]:
    """Raise this process's soft limit (`ulimit -n`) if it is nearly reached; say what the matter is where it cannot be.

    Args:
        what: What the descriptors are for: "to start Process-3".

    Raises:
        OSError: EMFILE or ENFILE, with the numbers.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if _next_descriptor(soft) + _SPARE > soft and (soft < hard or hard == resource.RLIM_INFINITY):
        more = 2 * soft if hard == resource.RLIM_INFINITY else min(hard, 2 * soft)
        with contextlib.suppress(OSError, ValueError):  # beyond what the kernel allows
            resource.setrlimit(resource.RLIMIT_NOFILE, (more, hard))
    try:
        yield
    except OSError as error:
        if error.errno == errno.EMFILE:
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            text = f"no file descriptors are left {what}: this process may have {soft} (ulimit -n), {hard} at most (ulimit -Hn)"
        elif error.errno == errno.ENFILE:
            text = f"no file descriptors are left {what}: the machine has no more (fs.file-max)"
        else:
            raise
        raise OSError(error.errno, text) from error


def _next_descriptor(limit: int) -> int:
    """Return the lowest number that is free, which is how many there are or less."""
    try:
        fd = os.open("/", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return limit
    os.close(fd)
    return fd
