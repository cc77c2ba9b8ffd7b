"""What the environment can set; read once, when the arena is made.

============================ =======================================================================================
``PROCESSION_ARENA_SIZE``    Bytes the arena may hold; a suffix k, M, G or T is understood. Default: three
                             quarters of the memory limit of this process (cgroup, RLIMIT_AS, physical memory).
============================ =======================================================================================
"""

from __future__ import annotations

import os

__all__ = ["arena_limits", "parse_size"]

_SUFFIXES = {"k": 10, "m": 20, "g": 30, "t": 40}

# Address space, not memory: pages exist once they are written. The smallest user address space (39 bits on some
# aarch64) has room for several of these.
_RESERVED = 64 << 30

# Blocks are neither split nor merged; with room to spare, a large one finds a place though small ones lie about.
_SPARE = 4
# The tables of blocks and of processes come on top.
_TABLES = 2 << 20


def parse_size(text: str) -> int:
    """Read a number of bytes such as ``512M``.

    Raises:
        ValueError: The text is no positive size.
    """
    digits = text.strip().lower().removesuffix("b").removesuffix("i")
    shift = _SUFFIXES.get(digits[-1:], 0)
    try:
        size = float(digits[:-1] if shift else digits) * (1 << shift)
    except ValueError:
        size = 0
    if not 0 < size < 1 << 60:
        raise ValueError(f"{text!r} is not a size; write for example 512M or 4G")
    return int(size)


def arena_limits() -> tuple[int, int]:
    """Return (bytes of address space to reserve, bytes that may be in use)."""
    text = os.environ.get("PROCESSION_ARENA_SIZE", "")
    if text:
        try:
            limit = parse_size(text)
        except ValueError as error:
            raise ValueError(f"PROCESSION_ARENA_SIZE: {error}") from None
        return limit * _SPARE + _TABLES, limit
    from procession._proc.limits import memory_limit

    # The rest is for the processes: where they are counted together, as in a container, the kernel would kill one of them
    # before the arena could say that it is full.
    return _RESERVED, min(memory_limit() // 4 * 3, _RESERVED)
