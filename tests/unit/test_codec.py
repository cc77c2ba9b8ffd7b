"""What travels arrives as pickle would have delivered it, type by type; and what only cloudpickle can carry arrives too."""

from __future__ import annotations

import array
import collections
import copyreg
import datetime
import decimal
import enum
import fractions
import functools
import math
import pathlib
import pickle
import struct
import subprocess
import sys
import uuid
from multiprocessing.reduction import ForkingPickler

import pytest

import procession


class Colour(enum.IntEnum):
    RED = 1


class MyInt(int):
    pass


class MyStr(str):
    __slots__ = ()


class MyList(list):
    pass


class MyDict(dict):
    pass


class MyTuple(tuple):
    __slots__ = ()


class MyBytes(bytes):
    pass


class MyFloat(float):
    pass


Point = collections.namedtuple("Point", "x y")  # noqa: PYI024 - the old form is another class


class Plain:
    def __init__(self, value):
        self.value = value

    def __eq__(self, other):
        return type(self) is type(other) and self.value == other.value

    __hash__ = None


class Registered:
    pass


@pytest.fixture
def q():
    return procession.Queue()


def through(q, item):
    q.put(item)
    assert 1 == q.qsize()
    return q.get()


def types_of(item):
    """The types of everything in a value: 1, True and 1.0 are equal and not the same."""
    if isinstance(item, (list, tuple)):
        return [type(item), *map(types_of, item)]
    if isinstance(item, dict):
        return [type(item), *((types_of(k), types_of(v)) for k, v in item.items())]
    return type(item)


VALUES = [
    None, True, False, ..., NotImplemented,
    0, 1, -1, 127, 128, -128, -129, 2**31, 2**63 - 1, -(2**63), 2**63, -(2**63) - 1, 2**64, 10**400, -(10**400),
    0.0, 1.5, math.inf, -math.inf, sys.float_info.max, 5e-324, 1j,
    "", "a", "é€😀", "\0", "a\0b", "\ud800", "x\udfff\ud800", "x" * 255, "x" * 65_535, "y" * 65_536, "é" * 40_000,
    b"", b"\0", bytes(range(256)), b"x" * 1021, b"x" * 70_000, bytearray(b"abc"), bytearray(),
    (), (1,), (1, (2, (3, ()))), [], [1, [2, [3, []]]], {}, {"a": {"b": {"c": {}}}}, set(), {1, 2}, frozenset({(1, 2)}),
    {1: 2, "b": [None], (3,): {4}, None: True, 1.5: b"x"}, {"z": 1, "a": 2, "m": 3},
    [[[[[[[[[[[[1]]]]]]]]]]]], [[i] for i in range(100)], list(range(1000)), [()] * 70_000, {i: str(i) for i in range(500)},
    MyInt(3), MyStr("s"), MyList([1]), MyDict(a=1), MyTuple((1,)), MyBytes(b"b"), MyFloat(1.5), [MyInt(1), MyStr("x")],
    Colour.RED, [Colour.RED], Point(1, 2), [Point(1, Point(2, 3))], Plain([1, Plain("x")]),
    collections.OrderedDict(b=1, a=2), collections.defaultdict(list, a=[1]), collections.Counter("aab"), collections.deque([1, 2], 5),
    datetime.datetime(2026, 1, 2, 3, 4, 5, 6, datetime.timezone.utc), datetime.timedelta(1), decimal.Decimal("1.10"),
    fractions.Fraction(1, 3), uuid.UUID(int=5), pathlib.PurePosixPath("/a"), range(5), slice(1, 2), array.array("d", [1.0]),
    int, len, math.sin, Plain, struct.Struct, ValueError, functools.partial(int, base=2).func,
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=lambda value: f"{type(value).__name__}-{str(value)[:20]!r}")
def test_a_value_arrives_as_pickle_would_deliver_it(q, value):
    """The compact form is a shortcut, and must not be one in meaning: types, order, exactness."""
    expected = pickle.loads(pickle.dumps(value))
    got = through(q, value)
    assert expected == got
    assert types_of(expected) == types_of(got)
    nested = through(q, ([value], {"k": value}))
    assert ([expected], {"k": expected}) == nested
    assert types_of(([expected], {"k": expected})) == types_of(nested)


def test_numbers_that_equality_cannot_tell_apart_arrive_exactly(q):
    got = through(q, [0.0, -0.0, math.nan, -math.nan, 1, True, 1.0])
    assert [1.0, -1.0] == [math.copysign(1, x) for x in got[:2]]
    assert [True, True] == [math.isnan(x) for x in got[2:4]]
    assert [int, bool, float] == [type(x) for x in got[4:]]
    quiet = struct.unpack("<d", struct.pack("<Q", 0x7FF8_0000_0000_1234))[0]
    assert struct.pack("<d", quiet) == struct.pack("<d", through(q, [quiet])[0])


def test_the_order_of_a_dict_is_kept(q):
    keys = ["z", 1, "a", (2,), None, 3.5]
    assert keys == list(through(q, dict.fromkeys(keys)))


def test_what_is_one_object_arrives_as_one(q):
    """Lists and dicts are changed in place: two copies of one would behave otherwise."""
    shared, empty = [1], {}
    got = through(q, [shared, {"k": shared}, (shared,), empty, empty])
    got[0].append(2)
    got[3]["x"] = 1
    assert [[1, 2], {"k": [1, 2]}, ([1, 2],), {"x": 1}, {"x": 1}] == got


def test_values_that_contain_themselves_arrive_so(q):
    items = [1]
    items.append(items)
    got = through(q, items)
    assert got is got[1]
    mapping = {}
    mapping["self"] = (mapping,)
    got = through(q, mapping)
    assert got is got["self"][0]


def test_very_deep_values_do_what_pickle_does(q):
    """Beyond the recursion limit pickle refuses; it must be an error and not a crash."""
    deep = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(RecursionError):
        q.put(deep)
    assert q.empty()
    for _ in range(99_900):
        deep = deep[0]
    assert deep == through(q, deep)


def test_lambdas_and_closures_travel_by_value(q):
    """What pickle refuses, cloudpickle carries; plain pickle reads it."""
    n = 3
    assert 8 == through(q, lambda x: x + n)(5)
    assert 9 == through(q, [lambda x: x * n])[0](3)

    class Local:
        def answer(self):
            return n

    assert 3 == through(q, Local()).answer()


def test_a_reducer_may_be_registered_replaced_and_taken_away_while_the_program_runs(q):
    """torch registers its own at import, whenever that is; nothing may be cached (pitfall 21)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ForkingPickler, "_extra_reducers", ForkingPickler._extra_reducers)
        assert isinstance(through(q, Registered()), Registered)
        copyreg.pickle(Registered, lambda value: (str, ("copyreg",)))
        try:
            assert "copyreg" == through(q, Registered())
            for text in ("first", "second"):
                ForkingPickler.register(Registered, lambda value, text=text: (str, (text,)))
                assert text == through(q, Registered())
            del ForkingPickler._extra_reducers[Registered]
            assert "copyreg" == through(q, Registered())
        finally:
            copyreg.dispatch_table.pop(Registered, None)
            ForkingPickler._extra_reducers.pop(Registered, None)
        assert isinstance(through(q, Registered()), Registered)


def test_connections_travel_in_items():
    """By the reducers that multiprocessing registers: what makes a reply channel."""
    ctx = procession.get_context("fork")
    q = ctx.Queue()
    ours, theirs = ctx.Pipe()
    with ctx.Process(target=_answer_through, args=(q,)):
        q.put([theirs])
        assert "hello" == ours.recv()
    ours.close()
    theirs.close()
    from multiprocessing import resource_sharer

    resource_sharer.stop()


def _answer_through(q):
    (connection,) = q.get()
    connection.send("hello")
    connection.close()


class _Nested:
    """Pickles another value by the same pickler, and fails now and then."""

    def __init__(self, q, fail):
        self.q, self.fail = q, fail

    def __reduce__(self):
        self.q.put(Plain("inner"))
        if self.fail:
            raise KeyError("refused")
        return str, ("outer",)


def test_the_kept_pickler_survives_errors_and_nesting(q):
    for _ in range(5):
        with pytest.raises(KeyError):
            q.put([Plain(1), _Nested(q, fail=True)])
        while not q.empty():
            assert Plain("inner") == q.get()
        q.put([Plain(2), _Nested(q, fail=False)])
        assert [Plain("inner"), [Plain(2), "outer"]] == [q.get(), q.get()]


def test_put_from_many_threads_with_reducers_in_python(q):
    """The one kept pickler must not be shared by two at once: a reducer in Python gives the GIL away."""
    import threading

    class Slow:
        def __reduce__(self):
            for _ in range(50):
                pass
            return str, ("slow",)

    threads = [threading.Thread(target=lambda: [q.put([Slow()] * 3) for _ in range(200)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [["slow"] * 3] * 800 == [q.get() for _ in range(800)]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exceptions have notes from Python 3.11 on")
def test_the_error_keeps_picklings_own_type_and_text(q):
    with pytest.raises(TypeError, match="cannot pickle"):
        q.put({"a": [(i for i in ())]})


def test_what_a_notebook_defines_travels_to_a_spawned_child():
    """In `python -c` the child cannot import __main__: functions and classes have to go by value."""
    code = """
import procession
class Thing:
    def __init__(self, x): self.x = x
def work(q, out):
    out.put(q.get().x * 2)
ctx = procession.get_context("spawn")
q, out = ctx.Queue(), ctx.Queue()
p = ctx.Process(target=work, args=(q, out))
p.start()
q.put(Thing(21))
print(out.get(timeout=60))
p.join()
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=100)
    assert "42" == run.stdout.strip(), run.stderr


@pytest.mark.parametrize(
    "size", [*range(40), 500, 1015, 1016, 1017, 1020, 1021, 1022, 1023, 1024, 1025, 2047, 2048, 2049, 65_533, 65_536]
)
def test_bytes_and_text_of_every_size_around_the_limits_arrive(q, size):
    """Compact up to 1 KiB, on the stack up to 2 KiB, with a 16-bit length inside of containers."""
    for item in (b"x" * size, "y" * size, [b"x" * size], ("y" * size,), "é" * size):
        assert item == through(q, item)
