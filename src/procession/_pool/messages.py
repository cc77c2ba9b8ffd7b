"""What a pool and its workers say to each other: tuples of plain values, which travel without pickle.

Whatever is the user's (functions, arguments, results, exceptions) is in them as bytes, or as a value of a type whose copy
cannot fail; so taking a message never runs the user's code, and what goes wrong with his goes wrong where it has a number.

To a worker::

    (DEFINE, fid, data, mode, seed, print_of_code)   what later messages call `fid`
    (FORGET, fid)
    (ITEM, seq, fid, index, value)                   one item, plain, or a NumPy array of numbers, or a short tuple with such
    (PICKLED, seq, fid, index, data)                 one item
    (CHUNK, seq, fid, index, data)                   a list of items, of which the first has this index
    (PING, number)                                   answer when all that came before is answered
    (STOP,)

From a worker, `wid` being its number::

    (VALUE, wid, seq, value, ns)                     the result of an item, plain, and how long it took
    (VALUE_PICKLED, wid, seq, data, ns)
    (ERROR, wid, seq, error, ns)
    (VALUES, wid, seq, start, data, errors, ns, stop)   a part of a chunk: the results from `start` to `stop`; errors by index
    (REFUSED, wid, seq, error)                       could not be unpickled; nothing was run
    (NO_FUNCTION, wid, seq, error, fid)              likewise, the function
    (READY, wid, pid)
    (FAILED, wid, error)                             the initializer raised
    (LEAVING, wid, why)                              takes nothing more
    (PONG, wid, number)
    (DIED, wid)                                      from the parent itself: the process has ended
    (NUDGE,)                                         likewise: nothing, but look around
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = [
    "CALL",
    "CANCEL_CELL",
    "CELLS",
    "CHUNK",
    "DEFINE",
    "DIED",
    "DROP_CELL",
    "EACH",
    "ERROR",
    "FAILED",
    "FORGET",
    "INDEX_CELL",
    "ITEM",
    "KEYWORDS",
    "LAST_WORDS_CELL",
    "LEAVING",
    "NO_FUNCTION",
    "NUDGE",
    "PICKLED",
    "PING",
    "PLAIN",
    "PONG",
    "READY",
    "REFUSED",
    "RUNNING_CELL",
    "SEQ_CELL",
    "STAR",
    "STOP",
    "UNANSWERED_CELL",
    "VALUE",
    "VALUES",
    "VALUE_PICKLED",
    "is_plain",
]

DEFINE, FORGET, ITEM, PICKLED, CHUNK, PING, STOP = range(7)
VALUE, VALUE_PICKLED, ERROR, VALUES, REFUSED, NO_FUNCTION, READY, FAILED, LEAVING, PONG, DIED, NUDGE = range(12)

# How a function is given an item.
EACH, STAR, CALL, KEYWORDS = range(4)  # f(x) | f(*x) | f(*x[0], **x[1]) | f(**x)

# A worker's cells: the unit it last took, the index in its chunk, the unit it shall be interrupted in; the unit whose function
# runs now, which SIGINT may break off; and the one that was taken and not yet answered. 0: none.
SEQ_CELL, INDEX_CELL, CANCEL_CELL, RUNNING_CELL, UNANSWERED_CELL, DROP_CELL = range(6)
# And from here on what faulthandler had to say when it crashed: the end of its stack, as bytes.
LAST_WORDS_CELL = 6
CELLS = 256

# Types whose values arrive without anybody's code being run. Exactly these: a subclass may do anything.
PLAIN = frozenset({int, float, str, bytes, bool, type(None)})


def is_plain(value: Any) -> bool:
    """Tell whether a value can travel as it is."""
    kind = type(value)
    if kind in PLAIN:
        return True
    return kind is tuple and len(value) <= 8 and all(type(part) in PLAIN for part in value)
