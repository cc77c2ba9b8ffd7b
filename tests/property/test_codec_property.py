"""Whatever pickle can carry arrives as pickle would deliver it: values, types, order, and what is one object."""

from __future__ import annotations

import math
import pickle
import struct

import hypothesis.strategies as st
from hypothesis import given, settings

import procession
from tests.unit.test_codec import MyBytes, MyDict, MyFloat, MyInt, MyList, MyStr, MyTuple, Plain

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.complex_numbers(allow_nan=False),
    st.text(st.characters(), max_size=50),
    st.text(max_size=400),
    st.binary(max_size=400),
    st.binary(max_size=40).map(bytearray),
    st.integers(0, 70_000).map(lambda n: b"x" * n),
    st.integers().map(MyInt),
    st.text(max_size=5).map(MyStr),
    st.binary(max_size=5).map(MyBytes),
    st.floats(allow_nan=False).map(MyFloat),
)
KEYS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.text(max_size=8), st.binary(max_size=8), st.tuples(st.integers())
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=6),
        st.lists(inner, max_size=6).map(tuple),
        st.dictionaries(KEYS, inner, max_size=6),
        st.frozensets(st.integers(), max_size=5),
        st.sets(st.text(max_size=3), max_size=5),
        st.lists(inner, max_size=3).map(MyList),
        st.dictionaries(st.text(max_size=3), inner, max_size=3).map(MyDict),
        st.lists(inner, max_size=3).map(MyTuple),
        inner.map(Plain),
        inner.map(lambda x: [x, x]),  # one object twice
        inner.map(lambda x: ([x], {"k": [x]})),
    ),
    max_leaves=25,
)


def shape(value, seen=None):
    """A value taken apart so that ==, types, bits of floats, order, and identity of mutable objects all count."""
    seen = {} if seen is None else seen
    kind = type(value)
    if kind in (list, dict, set, bytearray, MyList, MyDict, Plain):
        if id(value) in seen:
            return ("again", seen[id(value)])
        seen[id(value)] = len(seen)
    if isinstance(value, float):
        return (kind, "nan" if math.isnan(value) else struct.pack("<d", value))
    if isinstance(value, (list, tuple)):
        return (kind, [shape(item, seen) for item in value])
    if isinstance(value, dict):
        return (kind, [(shape(k, seen), shape(v, seen)) for k, v in value.items()])
    if isinstance(value, Plain):
        return (kind, shape(value.value, seen))
    return (kind, value)


@settings(max_examples=400, deadline=None)
@given(value=VALUES)
def test_a_value_arrives_as_pickle_would_deliver_it(value):
    q = procession.Queue()
    q.put(value)
    assert shape(pickle.loads(pickle.dumps(value, -1))) == shape(q.get())


@settings(max_examples=100, deadline=None)
@given(values=st.lists(VALUES, max_size=8))
def test_many_at_once_arrive_as_one_by_one(values):
    """put_many keeps what each encoder wrote in one buffer; each item must find its own."""
    q = procession.Queue()
    q.put_many(values)
    got = q.get_many(len(values)) if values else []
    while len(got) < len(values):
        got += q.get_many(len(values))
    assert [shape(pickle.loads(pickle.dumps(value, -1))) for value in values] == [shape(item) for item in got]


@settings(max_examples=100, deadline=None)
@given(value=VALUES, depth=st.integers(0, 3))
def test_recursive_containers_arrive_recursive(value, depth):
    items, mapping = [value], {"value": value}
    items.append(mapping)
    for _ in range(depth):
        items = [items]
    mapping["all"] = items
    q = procession.Queue()
    q.put(items)
    assert shape(pickle.loads(pickle.dumps(items, -1))) == shape(q.get())
