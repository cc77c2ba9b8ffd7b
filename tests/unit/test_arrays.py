"""Arrays and other large buffers: equal after any trip, in place, nobody's writes seen by anybody, nothing left."""

from __future__ import annotations

import collections
import copyreg
import gc
import itertools
import os
import pickle
import platform
import resource
import signal
import threading
import time
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import procession
from procession import _native
from procession._native import Segment
from procession._wire import codec
from tests.unit.test_arena import _can_mount, output_of

LARGE = 1 << 20


def segments():
    """Bytes in segments, once all that nobody has any more is gone."""
    gc.collect()
    _native.collect()
    return procession.memory().segments


@pytest.fixture(autouse=True)
def _all_given_back():
    before = segments()
    yield
    assert segments() <= before


def is_in_place(array):
    return Segment.find(memoryview(array.reshape(-1, order="A")).cast("B")) is not None


def queues():
    return {"Queue": procession.Queue, "JoinableQueue": procession.JoinableQueue, "SimpleQueue": procession.SimpleQueue}


@pytest.mark.parametrize("kind", queues())
def test_an_array_arrives_in_place_and_writable(kind):
    q = queues()[kind]()
    sent = np.arange(LARGE // 8, dtype=float)
    q.put(sent)
    got = q.get()
    assert is_in_place(got)
    assert (got == sent).all()
    got += 1
    assert (sent[0], got[0]) == (0, 1)


def test_put_is_a_snapshot():
    q = procession.Queue()
    sent = np.zeros(LARGE)
    q.put(sent)
    sent += 1
    assert not q.get().any()


def make_special():
    class_of_ints = np.dtype([("a", "i4"), ("b", "f8", (3,))])
    base = np.arange(200_000.0)
    return {
        "0-d": np.array(3.0),
        "empty": np.zeros((0, 5)),
        "small": np.arange(10),
        "C": base.reshape(400, 500),
        "Fortran": np.asfortranarray(base.reshape(400, 500)),
        "not contiguous": base[::2],
        "transposed": base.reshape(400, 500).T,
        "negative stride": base[::-1],
        "broadcast": np.broadcast_to(base, (3, len(base))),
        "structured": np.zeros(20_000, class_of_ints),
        "objects": np.array([{"a": 1}, None, [2]] * 10_000, dtype=object),
        "text": np.array(["a", "bcd"] * 20_000),
        "times": np.arange("2020", "2030", dtype="datetime64[h]"),
        "masked": np.ma.masked_greater(base, 100.0),
        "bool": base > 100,
        "complex": base * 1j,
        "big endian": base.astype(">f8"),
        "record": np.zeros(20_000, class_of_ints).view(np.recarray),
        "nested": {"x": [base, (base, b"bytes")], "y": np.arange(5)},
    }


def equal(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, np.ndarray):
        same = type(a) is type(b) and a.dtype == b.dtype and a.shape == b.shape
        return same and (np.ma.allequal(a, b) if isinstance(a, np.ma.MaskedArray) else np.array_equal(a, b))
    return a == b


@pytest.mark.parametrize("kind", make_special())
def test_every_kind_of_array_is_equal_after_the_trip(kind):
    q = procession.Queue()
    value = make_special()[kind]
    q.put(value)
    got = q.get()
    assert equal(value, got)
    if isinstance(value, np.ndarray) and value.ndim > 1:
        assert value.flags.f_contiguous == got.flags.f_contiguous


def test_a_memory_mapped_array(tmp_path):
    mapped = np.memmap(tmp_path / "data", dtype="f8", mode="w+", shape=(LARGE // 8,))
    mapped[:] = 7
    q = procession.Queue()
    q.put(mapped)
    assert (q.get() == 7).all()


ARRAYS = hnp.arrays(
    hnp.scalar_dtypes() | hnp.array_dtypes() | hnp.boolean_dtypes(),
    hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=20),
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(array=ARRAYS, times=st.sampled_from([1, 300]), order=st.sampled_from("CF"), nested=st.booleans())
def test_any_array_is_equal_after_the_trip(array, times, order, nested):
    value = np.array(np.broadcast_to(array, (times, *array.shape)), order=order)
    q = procession.Queue()
    q.put({"a": [value, 1], "b": value} if nested else value)
    got = q.get()
    if nested:
        assert got["a"][0] is got["b"]
        got = got["b"]
    # NumPy's own pickle gives dates another byte order.
    same = value if value.dtype.kind in "mM" else pickle.loads(pickle.dumps(value, protocol=5))
    assert (same.dtype, same.shape, same.tobytes()) == (got.dtype, got.shape, got.tobytes())


def variants(n):
    """Arrays that differ in what is beside their elements."""
    plain = np.arange(24.0 * n).reshape(4, 6 * n)
    frozen = plain.copy()
    frozen.flags.writeable = False
    yield from (
        plain,
        frozen,
        plain.T,
        frozen.T,
        plain[::2],
        plain[:, 1:-1],
        frozen[:, ::2],
        plain[::-1],
        plain[:, ::-1],
    )
    yield from (plain[:0], np.array(3.5), plain[1:2], plain[:, :1])
    cube = plain.reshape(2, 3, 4 * n)
    yield from (cube.transpose(1, 0, 2), cube.transpose(2, 0, 1), cube.transpose(1, 2, 0)[::2])
    yield np.lib.stride_tricks.as_strided(plain, (3, 4 * n), (0, 8))
    yield np.frombuffer(b"x" + plain.tobytes(), np.uint8)[1:].view(float)  # not aligned
    for letter in "?bBhHiIlLqQefdgFDG":
        yield np.ones(3 * n, letter)
    for dtype in (">f8", "<i4", "U3", "S3", "M8[ns]", "m8[D]", "V3", [("x", "i4"), ("y", "f8", 2)]):
        yield np.zeros(3 * n, dtype)
    yield np.ones(3 * n, np.dtype("f8", metadata={"unit": "m"}))
    yield np.array([None, "text", 3] * n, dtype=object)
    yield np.ones((1,) * 31 + (n,))


@pytest.mark.parametrize("n", [1, 30_000])
def test_an_array_is_what_numpys_own_pickle_makes_of_it(n):
    """But for one flag: it is the receiver's own, and so it may write to it, as with multiprocessing."""
    q = procession.Queue()
    for sent in variants(n):
        q.put(sent)
        got, expected = q.get(), pickle.loads(pickle.dumps(sent, protocol=5))
        assert type(got) is np.ndarray
        assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
        assert got.dtype.metadata == expected.dtype.metadata
        if got.dtype.hasobject:
            assert got.tolist() == expected.tolist()
        else:
            assert got.tobytes() == expected.tobytes()
        assert got.flags.writeable
        if sent.strides == sent.copy("K").strides:  # NumPy keeps the order of dimensions since 2.3 or so
            assert got.strides == sent.strides
        else:
            for flag in ("C_CONTIGUOUS", "F_CONTIGUOUS"):
                assert got.flags[flag] == expected.flags[flag], (flag, sent.dtype, sent.shape, sent.strides)
        assert got.flags.aligned


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("times", [1, 30_000])
def test_what_was_read_only_here_is_the_receivers_own(nested, times):
    q = procession.Queue()
    for order in "CF":
        sent = np.tile(np.arange(6.0).reshape(2, 3), (1, times)).copy(order)
        sent.flags.writeable = False
        q.put([{sent.size}, sent] if nested else sent)  # a set: by pickle
        got = q.get()
        got = got[1] if nested else got
        assert got.flags.writeable
        assert np.array_equal(got, sent)
        assert got.flags.f_contiguous == sent.flags.f_contiguous


@pytest.mark.parametrize("table", ["multiprocessing", "copyreg"])
@pytest.mark.parametrize("times", [1, 30_000])
def test_a_reducer_that_somebody_has_registered_is_used(table, times):
    reducers = copyreg.dispatch_table if table == "copyreg" else ForkingPickler._extra_reducers
    q = procession.Queue()
    sent = np.ones(times)
    reducers[np.ndarray] = lambda array: (list, (array.tolist(),))
    try:
        for message in (sent, [sent], [sent, {1}]):
            q.put(message)
        with procession.Pool(1) as pool:
            assert type(pool.apply(type, (sent,))) is type
            assert pool.map(type, [sent] * 4) == [list] * 4
    finally:
        del reducers[np.ndarray]
    assert [type(q.get()), type(q.get()[0]), type(q.get()[0])] == [list] * 3


def test_another_thread_changes_what_is_being_sent():
    """While an array is copied other threads run: one may take the next one out, and its memory may be another's by then."""
    q = procession.Queue()
    frames = {k: np.full(LARGE + k, float(k)) for k in range(8)}
    stop = threading.Event()

    def replace():
        for n in itertools.count():
            if stop.is_set():
                return
            k = n % 8
            frames[k] = np.full(LARGE + k, float(k))

    thread = threading.Thread(target=replace)
    thread.start()
    try:
        for _ in range(20):
            q.put(frames)
            for k, got in q.get().items():
                assert got.shape == (LARGE + k,)
                assert (got[0], got[-1]) == (k, k)
    finally:
        stop.set()
        thread.join()


SMALL, MANY = np.arange(5.0), np.arange(LARGE)
PACKED = {
    "an array": SMALL,
    "a large one": MANY,
    "a list": [SMALL, MANY],
    "the same": [SMALL] * 300 + [MANY] * 300,
    "tuples": [(MANY, i, "text") for i in range(300)],
    "dicts": [{"a": MANY[i:], "b": SMALL * i} for i in range(20)],
    "many": [SMALL + i for i in range(256)],
    "one more": [SMALL + i for i in range(257)],
    "long": [np.arange(5000.0) + i for i in range(20)],
    "with others": [SMALL, {1}],
    "twice": [[SMALL]] * 2,
    "none": [(1, "text"), [2]],
}


@pytest.mark.parametrize("what", PACKED)
def test_what_the_pool_packs_is_as_it_was(what):
    value = PACKED[what]
    data = _native._pack(value)
    assert (data is None) == (what in {"one more", "long", "with others", "twice", "none"})
    if data is None:
        return
    got = codec.loads(data)
    np.testing.assert_equal(got, value)
    if what == "the same":
        assert len({id(array) for array in got}) == 2


def test_a_subclass_keeps_its_type_and_a_name_is_not_enough():
    q = procession.Queue()
    for array in (np.rec.array([(1, 2.0)]), np.ma.array([1, 2], mask=[0, 1])):
        q.put(array)
        assert type(q.get()) is type(array)
    with pytest.raises(ValueError, match="there is no type 'x'"):
        _native._array(b"", (0,), "x", False)
    for wrong in ("dd", "", None):
        with pytest.raises(ValueError, match="there is no type"):
            _native._array(b"", (0,), wrong, False)
    with pytest.raises(TypeError):
        _native._array(b"", (1,), "d", False)


@pytest.mark.parametrize("dtype", ["M8[ns]", "M8[D]", "m8[s]", ">M8[us]"])
def test_dates_are_not_in_the_pickle(dtype):
    sent = np.arange(LARGE, dtype="i8").astype(dtype).reshape(2, -1).T
    data, buffers = _native.pickle_beside(sent)
    assert (len(data) < 1000, len(buffers)) == (True, 1)
    q = procession.Queue()
    q.put([sent, procession.shared(sent)])
    got, shared = q.get()
    assert (got.dtype, got.flags.f_contiguous, got.flags.writeable) == (sent.dtype, True, True)
    assert not shared.flags.writeable
    assert (got == sent).all()
    assert (shared == sent).all()
    got[0] = 5
    assert sent[0, 0] != got[0, 0]


@pytest.mark.leaks("threads of pyarrow, where it is installed")
def test_data_frames():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(
        {
            "f": np.arange(50_000.0),
            "i": np.arange(50_000),
            "text": ["a", "b"] * 25_000,
            "category": pandas.Categorical(["x", "y"] * 25_000),
            "nullable": pandas.array([1, None] * 25_000, dtype="Int64"),
            "time": pandas.date_range("2020", periods=50_000, freq="h", tz="UTC"),
        }
    )
    q = procession.Queue()
    q.put(frame)
    pandas.testing.assert_frame_equal(frame, q.get())
    with procession.get_context("fork").Pool(1) as pool:
        pandas.testing.assert_frame_equal(frame, pool.apply(identity, (frame,)))
        shared = procession.shared(frame)
        assert pool.apply(sum_of_column, (shared,)) == frame["f"].sum()


@pytest.mark.leaks("threads of pyarrow")
def test_arrow_tables():
    arrow = pytest.importorskip("pyarrow")
    table = arrow.table({"x": np.arange(100_000)})
    q = procession.Queue()
    q.put(table)
    assert q.get().equals(table)


def identity(value):
    return value


def sum_of_column(frame):
    return frame["f"].sum()


def double(array):
    array *= 2
    return array


def sum_of(array):
    return float(array.sum())


def test_arguments_and_results_of_a_pool(ctx):
    arrays = [np.full(LARGE // 8, i, dtype=float) for i in range(6)]
    with ctx.Pool(2) as pool:
        for chunksize in (None, 1, 3):
            doubled = pool.map(double, arrays, chunksize=chunksize)
            assert [a[0] for a in doubled] == [0, 2, 4, 6, 8, 10]
            assert all(is_in_place(a) for a in doubled)
        assert [a[0] for a in arrays] == [0, 1, 2, 3, 4, 5]
        assert pool.apply_async(double, (arrays[1],)).get()[0] == 2
        assert list(pool.imap(sum_of, arrays)) == [a.sum() for a in arrays]
        assert sorted(pool.imap_unordered(sum_of, arrays)) == sorted(a.sum() for a in arrays)
        assert pool.starmap(np.add, [(arrays[1], arrays[2])])[0][0] == 3
        del doubled


def test_arguments_and_results_of_an_executor(ctx):
    array = np.ones(LARGE)
    with procession.ProcessPoolExecutor(2, ctx) as executor:
        future = executor.submit(double, array)
        assert (future.result() == 2).all()
        assert array[0] == 1
        del future


def test_arguments_and_result_of_a_process(ctx):
    array = np.ones(LARGE)
    process = ctx.Process(target=double, args=(array,))
    process.start()
    result = process.result()
    assert (result == 2).all()
    assert array[0] == 1
    process.join()
    process.close()
    del result, process


def die_once(args):
    array, path = args
    array += 1
    if not os.path.exists(path):
        with open(path, "w", encoding="ascii"):
            pass
        os.kill(os.getpid(), signal.SIGKILL)
    return float(array[0])


@pytest.mark.parametrize("call", ["map", "apply"])
def test_a_retried_task_gets_its_array_as_it_was(ctx, tmp_path, call):
    """The worker that was killed had written to it."""
    array = np.zeros(LARGE)
    with ctx.Pool(1) as pool:
        item = (array, str(tmp_path / "died"))
        if call == "map":
            assert pool.map(die_once, [item], retries=1) == [1]
        else:
            assert pool.apply_async(die_once, (item,), retries=1).get() == 1


def test_a_functions_own_arrays():
    """A closure, or a partial, is sent to each worker."""
    import functools

    big = np.arange(LARGE, dtype=float)
    with procession.get_context("fork").Pool(2) as pool:
        assert pool.map(functools.partial(np.dot, big[:10]), [big[:10]] * 4) == [285.0] * 4
        assert pool.map(functools.partial(largest, big), range(4)) == [LARGE - 1 + i for i in range(4)]


def largest(array, more):
    return float(array.max()) + more


def read_and_write(array, conn_queue, go):
    go.wait()
    conn_queue.put(float(array[0]))
    array[0] = -1
    conn_queue.put(float(array[0]))


def test_after_a_fork_both_have_their_own():
    """Pitfall 10, and the writes of either after it."""
    fork = procession.get_context("fork")
    q, answers, go = fork.Queue(), fork.Queue(), fork.Event()
    q.put(np.full(LARGE, 7.0))
    array = q.get()
    child = fork.Process(target=read_and_write, args=(array, answers, go))
    child.start()
    array[0] = 1
    go.set()
    assert (answers.get(), answers.get()) == (7, -1)
    child.join()
    assert array[0] == 1


def test_after_a_fork_the_child_keeps_what_the_parent_drops():
    fork = procession.get_context("fork")
    q, answers, go = fork.Queue(), fork.Queue(), fork.Event()
    q.put(np.full(LARGE, 7.0))
    array = q.get()
    child = fork.Process(target=read_and_write, args=(array, answers, go))
    child.start()
    del array
    for i in range(5):  # the block would be used again
        q.put(np.full(LARGE, 999.0 + i))
        q.get()
    go.set()
    assert answers.get() == 7
    child.join()


def test_a_forked_childs_array_can_be_sent_on():
    """Its pages are its own: what is sent is what it sees."""
    fork = procession.get_context("fork")
    q = fork.Queue()
    q.put(np.zeros(LARGE))
    array = q.get()
    child = fork.Process(target=lambda: (double(np.add(array, 1, out=array)), q.put(array)))
    child.start()
    assert (q.get() == 2).all()
    assert not array.any()
    child.join()


# --- empty, zeros, array


@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_of_our_own_memory(order):
    zeros = procession.zeros((300, 500), order=order)
    assert is_in_place(zeros)
    assert not zeros.any()
    assert zeros.flags.f_contiguous == (order == "F")
    copy = procession.array(np.arange(150_000).reshape(300, 500), order=order)
    assert copy[1, 0] == 500
    empty = procession.empty(LARGE, "u1")
    assert (empty.shape, empty.dtype) == ((LARGE,), np.uint8)
    assert procession.array([1, 2, 3]).tolist() == [1, 2, 3]
    assert not is_in_place(procession.zeros(3))
    assert procession.zeros(20_000, dtype=object)[0] == 0


def test_memory_used_before_is_zero_again():
    first = procession.empty(LARGE)
    first[:] = 1
    del first
    assert not procession.zeros(LARGE).any()


@pytest.mark.parametrize("arguments", [(-1,), ((3, -1),), ("a",), (3, "no such type"), (LARGE, float, "X")])
def test_what_cannot_be_an_array(arguments):
    with pytest.raises((ValueError, TypeError)):
        procession.empty(*arguments)


def test_an_array_of_ours_is_not_copied_and_still_a_snapshot():
    q = procession.Queue()
    array = procession.zeros(LARGE)
    before = procession.memory().segments
    q.put(array)
    assert procession.memory().segments == before
    array[0] = 1
    got = q.get()
    assert (got[0], got[1]) == (0, 0)
    got[1] = 5
    assert array[1] == 0
    q.put(array)  # it has been given away once: a copy
    assert q.get()[0] == 1
    q.put(got)
    assert q.get()[1] == 5


def send_and_change(q, done):
    array = procession.zeros(LARGE)
    q.put(array)
    array += 1
    done.set()
    q.put(array)


def test_an_array_of_ours_sent_to_another_process(ctx):
    q, done = ctx.Queue(), ctx.Event()
    child = ctx.Process(target=send_and_change, args=(q, done))
    child.start()
    done.wait()
    first = q.get()
    assert not first.any()
    first += 5
    assert (q.get() == 1).all()
    child.join()


def test_parts_of_an_array_of_ours():
    q = procession.Queue()
    array = procession.array(np.arange(LARGE))
    for part in np.array_split(array, 4):
        q.put(part)
    assert np.array_equal(np.concatenate([q.get() for _ in range(4)]), array)


def test_twice_in_one_message():
    q = procession.Queue()
    array = procession.zeros(LARGE)
    q.put((array, array, array.view("u8")))
    a, b, c = q.get()
    assert a is b
    a[0] = 1
    assert c[0] == 0


# --- shared


def test_shared_is_read_only_and_sent_as_a_handle(ctx):
    shared = procession.shared(np.arange(LARGE, dtype=float))
    assert not shared.flags.writeable
    before = procession.memory().segments
    with ctx.Pool(2) as pool:
        assert pool.map(sum_of, [shared] * 50, chunksize=1) == [shared.sum()] * 50
        assert pool.map(try_to_write, [shared] * 4) == ["ValueError"] * 4
        got = pool.apply(identity, (shared,))
        assert not got.flags.writeable
        assert got.__array_interface__["data"] == shared.__array_interface__["data"]
        assert procession.memory().segments == before
        del got


def try_to_write(array):
    try:
        array[0] = 1
    except ValueError as error:
        return type(error).__name__
    return "written"


def look_at(value):
    if isinstance(value, dict):
        return {k: look_at(v) for k, v in value.items()}
    return (type(value).__name__, bytes(memoryview(value)[:3]), memoryview(value).readonly)


def test_what_can_be_shared(ctx):
    data = b"abc" * LARGE
    with ctx.Pool(1) as pool:
        for source in (data, bytearray(data), memoryview(data)):
            assert pool.apply(look_at, (procession.shared(source),)) == ("memoryview", b"abc", True)
        arrays = procession.shared({"x": np.zeros(LARGE, "u1"), "small": np.ones(4, "u1")})
        assert not arrays["small"].flags.writeable
        seen = pool.apply(look_at, (arrays,))
        assert seen == {"x": ("ndarray", b"\0\0\0", True), "small": ("ndarray", b"\1\1\1", True)}


@pytest.mark.parametrize("value", [{"a": 1}, 5, "text", [object]])
def test_nothing_to_share(value):
    with pytest.raises(TypeError, match="nothing to share"):
        procession.shared(value)


def test_a_part_of_a_shared_array(ctx):
    shared = procession.shared(np.arange(LARGE))
    before = procession.memory().segments
    with ctx.Pool(2) as pool:
        sums = pool.map(sum_of, np.array_split(shared, 4))
        assert sum(sums) == shared.sum()
    assert procession.memory().segments <= before


def test_a_view_that_has_no_owner_is_refused():
    q = procession.Queue()
    with pytest.raises(TypeError, match="memoryview"):
        q.put(memoryview(bytearray(LARGE)))


def test_shared_lives_as_long_as_its_last_holder():
    fork = procession.get_context("fork")
    inbox, answers = fork.Queue(), fork.Queue()
    child = fork.Process(target=lambda: keep_until_told(inbox, answers))
    child.start()
    shared = procession.shared(np.full(LARGE, 7.0))
    inbox.put(shared)
    assert answers.get() == "has it"
    del shared
    gc.collect()
    again = procession.shared(np.zeros(LARGE))
    inbox.put("look")
    assert answers.get() == 7
    child.join()
    del again


def keep_until_told(inbox, answers):
    array = inbox.get()
    answers.put("has it")
    inbox.get()
    answers.put(float(array.max()))


# --- whose it is, and death


def hold(q, ready):
    array = q.get()
    ready.put(float(array[0]))
    signal.pause()


def test_a_killed_holders_memory_is_given_back(ctx, wait_until):
    before = segments()
    q, ready = ctx.Queue(), ctx.Queue()
    child = ctx.Process(target=hold, args=(q, ready))
    child.start()
    q.put(np.ones(LARGE))
    assert ready.get() == 1
    assert procession.memory().segments > before
    assert [h.pid for h in procession.memory().holders if h.bytes] == [child.pid]
    child.kill()
    child.join()
    wait_until(lambda: segments() <= before)


def test_a_queue_takes_its_arrays_along():
    before = segments()
    q = procession.Queue()
    for _ in range(3):
        q.put(np.ones(LARGE))
    memory = procession.memory()
    assert memory.in_messages == memory.segments - before > 0
    del q
    assert segments() == before


@pytest.mark.parametrize("immediate", [False, True])
def test_a_queue_that_is_shut_down(immediate):
    before = segments()
    q = procession.JoinableQueue()
    for _ in range(100):
        q.put(np.ones(10_000))
    q.get()
    q.shutdown(immediate=immediate)
    if not immediate:
        for _ in range(99):
            q.get()
    while q._unfinished():
        q.task_done()
    assert segments() == before


def take_and_die(q, taken):
    array = q.get()
    array += 1
    taken.set()
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_joinable_queues_item_comes_again_as_it_was(ctx):
    before = segments()
    q, taken = ctx.JoinableQueue(), ctx.Event()
    q.put(np.zeros(LARGE))
    child = ctx.Process(target=take_and_die, args=(q, taken))
    child.start()
    taken.wait()
    child.join()
    assert not q.get().any()
    q.task_done()
    q.join()
    assert segments() == before


def test_many_of_them_at_once():
    q = procession.Queue()
    q.put_many([np.full(20_000, i) for i in range(50)])
    assert [a[0] for a in q.get_many(50)] == list(range(50))


def test_a_put_that_fails_keeps_nothing():
    before = segments()
    q = procession.Queue(1)
    q.put(1)
    with pytest.raises(procession.queues.Full):
        q.put(np.zeros(LARGE), timeout=0)
    with pytest.raises(procession.queues.Full):
        q.put_many([np.zeros(LARGE)] * 2, timeout=0)
    q.shutdown()
    with pytest.raises(procession.ShutDown):
        q.put(np.zeros(LARGE))
    with pytest.raises(TypeError):
        q.put([np.zeros(LARGE), threading.Lock()])
    assert segments() == before


def test_handles_in_messages_are_not_kept_for_ever():
    """A lock that was sent through a queue lives in the message, then with its receiver."""
    gc.collect()
    before = procession.memory().objects
    q = procession.Queue()
    q.put({"lock": procession.Lock(), "array": np.zeros(LARGE)})
    got = q.get()
    assert got["lock"].acquire()
    del got, q
    gc.collect()
    assert procession.memory().objects == before


def test_a_queue_in_a_queue():
    before = procession.memory().objects
    outer, inner = procession.Queue(), procession.Queue()
    inner.put(np.full(LARGE, 3.0))
    outer.put(inner)
    del inner
    gc.collect()
    assert (outer.get().get() == 3).all()
    outer.put(procession.Queue())
    del outer
    gc.collect()
    assert procession.memory().objects == before


Pair = collections.namedtuple("Pair", "a b")  # noqa: PYI024


def test_by_value_too():
    """What only cloudpickle can take keeps its buffers outside."""
    q = procession.Queue()
    array = np.arange(LARGE)
    q.put(Pair(lambda: array.sum(), array))  # noqa: PLW0108
    got = q.get()
    assert got.a() == array.sum()
    assert is_in_place(got.b)


def test_plain_pickle_buffers():
    q = procession.Queue()
    q.put({"data": pickle.PickleBuffer(bytearray(b"x" * LARGE))})
    assert bytes(q.get()["data"]) == b"x" * LARGE


# --- limits

FILL = """
import numpy as np, procession
q = procession.Queue()
n = 0
try:
    while True:
        q.put(np.ones(1 << 17))
        n += 1
except MemoryError as error:
    print(type(error).__name__, "in use" in str(error))
got = [q.get() for _ in range(n)]
print(n > 10, sum(float(a.sum()) for a in got) == n * (1 << 17))
del got
q.put(np.ones(1 << 17))
print(q.get().sum() == 1 << 17)
"""


@pytest.mark.parametrize("limits", [[], [(resource.RLIMIT_AS, 4 << 30)], [(resource.RLIMIT_FSIZE, 1 << 30)]], ids=str)
def test_the_limit_is_a_memory_error_with_numbers(limits):
    """Whatever `ulimit` says; and what is given back can be used again."""
    lines = output_of(FILL, limits=limits, env={"PROCESSION_ARENA_SIZE": "64M"})
    assert lines == ["ArenaFullError", "True", "True", "True", "True"]


def _make_group(parent, limit):
    group = Path("/sys/fs/cgroup", parent, f"procession-test-{os.getpid()}")
    try:
        group.mkdir()
    except OSError:
        return None
    try:
        (group / limit).write_text(str(512 << 20))
    except OSError:
        group.rmdir()
        return None
    return group


@pytest.fixture
def small_group(wait_until):
    """The directory of a control group of 512 MB, where one can be made."""
    places = [("memory", "memory.limit_in_bytes"), ("unified", "memory.max"), (".", "memory.max")]
    group = next(filter(None, (_make_group(*place) for place in places)), None)
    if group is None:
        pytest.skip("no control group can be made here")
    yield group
    wait_until(lambda: not (group / "cgroup.procs").read_text().strip())
    group.rmdir()


def test_in_a_group_of_512_megabytes(small_group):
    """Who asks for too much gets an error; the kernel kills nobody, and what is taken in turn goes through."""
    code = f"""
import os
with open({str(small_group / "cgroup.procs")!r}, "w") as f:
    f.write(str(os.getpid()))
{FILL}
with procession.get_context("fork").Pool(2) as pool:
    print(sum(float(a.sum()) for a in pool.imap(np.negative, (np.ones(1 << 20) for _ in range(100)))) == -100 * (1 << 20))
print(procession.memory().limit < 512 << 20)
"""
    assert output_of(code) == ["ArenaFullError", "True", "True", "True", "True", "True", "True"]


@pytest.mark.parametrize("options", ["size=4k", "ro"])
def test_without_dev_shm(options):
    """Arrays need no room there."""
    if not _can_mount():
        pytest.skip("no permission to make a mount namespace (unshare -m)")
    prefix = ["unshare", "-m", "sh", "-c", f'mount -t tmpfs -o {options} tmpfs /dev/shm && exec "$@"', "sh"]
    code = """
import numpy as np, procession
with procession.get_context("fork").Pool(2) as pool:
    print(sum(float(a.sum()) for a in pool.map(np.negative, [np.ones(1 << 20)] * 4)) == -4 * (1 << 20))
"""
    assert output_of(code, prefix=prefix) == ["True"]


def test_idle_memory_is_given_back_to_the_kernel():
    q = procession.Queue()
    q.put(np.ones(4 * LARGE))
    q.get()
    assert procession.memory().idle >= 4 * LARGE
    resident = os.fstat(_native.arena_fd()).st_blocks
    _native.trim()
    assert procession.memory().idle == 0
    assert os.fstat(_native.arena_fd()).st_blocks < resident


def huge_kilobytes():
    """How much of the arena this process has mapped in huge pages."""
    lines = Path("/proc/self/smaps").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("ShmemPmdMapped:"))


def test_locked_memory_is_zero_again():
    """Which the kernel does not take back as other memory."""
    code = """
import ctypes
import procession
arrays = [procession.empty(4_000_000) for _ in range(5)]
locked = ctypes.CDLL(None).mlockall(1 | 4)  # what there is, when it is used
for array in arrays:
    array[:] = 7
del array
arrays.clear()
procession._native.trim()
print(procession.memory().idle)
arrays = [procession.zeros(4_000_000) for _ in range(5)]
print(any(array.any() for array in arrays))
"""
    assert output_of(code) == ["0", "False"]


def kernel_collapses():
    """Tell whether this kernel makes huge pages when it is asked to: Linux from 6.1 on, built with them."""
    version = tuple(int(part) for part in platform.release().split(".")[:2])
    return version >= (6, 1) and Path("/sys/kernel/mm/transparent_hugepage").exists()


@pytest.mark.parametrize("nbytes", [(24 << 20) + 24, (50 << 20) + 8])
def test_what_is_used_often_is_in_huge_pages_and_as_it_was(nbytes):
    """Also where the copy takes the way past the caches, whose streams the length is no multiple of."""
    q = procession.Queue()
    for n in range(100):
        sent = np.arange(n, n + nbytes // 8)
        q.put(sent)
        got = q.get()
        assert np.array_equal(got, sent)
        del got
        if huge_kilobytes() >= nbytes >> 10:
            break
    else:
        assert not kernel_collapses()
    # A small one that lies in the same memory, parts of it mapped for itself, and the kernel's taking it back.
    array = procession.array(np.arange(nbytes // 8))
    q.put(array)
    array[:] = 0
    assert np.array_equal(q.get(), np.arange(nbytes // 8))
    _native.trim()
    assert procession.memory().idle == 0
    assert not procession.zeros(nbytes // 8).any()


def test_memory_is_used_again():
    q = procession.Queue()
    q.put(np.ones(LARGE))
    first = q.get().__array_interface__["data"][0]
    q.put(np.ones(LARGE))
    assert q.get().__array_interface__["data"][0] == first


def test_a_stream_of_large_results_holds_what_is_in_flight(ctx):
    """Its consumer is slow; what is ahead of it is bounded in bytes, not only in time."""
    peak = 0
    with ctx.Pool(2) as pool:
        for i, array in enumerate(pool.imap(eight_megabytes, range(60))):
            assert array[0] == i
            time.sleep(0.005)
            peak = max(peak, procession.memory().segments)
        del array
    assert peak < 150 << 20


def eight_megabytes(number):
    return np.full(LARGE, number, dtype=float)


def test_large_arguments_are_sent_a_few_ahead():
    """A worker has not more in advance than some megabytes, however short its tasks are."""
    peak = 0
    arrays = [np.full(LARGE, i, dtype=float) for i in range(60)]
    with procession.get_context("fork").Pool(2) as pool:
        result = pool.map_async(first_of, arrays)
        while not result.ready():
            peak = max(peak, procession.memory().segments)
        assert result.get() == list(range(60))
    assert peak < 150 << 20


def first_of(array):
    return int(array[0])


# --- pipes


def answer_doubled(conn):
    while (array := conn.recv()) is not None:
        array *= 2
        conn.send({"array": array, "small": 1})


def test_through_a_pipe(ctx):
    ours, theirs = ctx.Pipe()
    child = ctx.Process(target=answer_doubled, args=(theirs,))
    child.start()
    theirs.close()
    for i in range(5):
        array = np.full(LARGE, i, dtype=float)
        ours.send(array)
        got = ours.recv()["array"]
        assert got[0] == 2 * i
        assert is_in_place(got)
        ours.send(array[:3])
        assert ours.recv()["array"].tolist() == [2 * i] * 3
    ours.send(None)
    child.join()
    ours.close()
    assert child.exitcode == 0


def test_one_end_of_a_pipe(ctx):
    reader, writer = ctx.Pipe(duplex=False)
    q = ctx.Queue()
    child = ctx.Process(target=receive_an_end, args=(q, writer))
    child.start()
    writer.close()
    q.put("go")
    assert reader.recv()[0] == 7
    with pytest.raises(EOFError):
        reader.recv()
    reader.close()
    child.join()


def receive_an_end(q, writer):
    q.get()
    writer.send(np.full(LARGE, 7.0))


@pytest.mark.parametrize("duplex", [False, True])
def test_a_pipes_sender_waits_for_its_reader(duplex):
    """A message takes 100 bytes of the pipe, and its array megabytes."""
    reader, writer = procession.Pipe(duplex)
    sent = []

    def send():
        try:
            for i in range(60):
                writer.send(np.full(LARGE // 8, i, dtype=float))
                sent.append(i)
        except BrokenPipeError:
            sent.append("broken")

    thread = threading.Thread(target=send)
    thread.start()
    peak = 0
    for i in range(40):
        assert reader.recv()[0] == i
        peak = max(peak, procession.memory().in_messages)
    assert peak < 20 << 20
    reader.close()
    thread.join()
    assert sent[-1] == "broken"
    writer.close()


def test_a_sender_killed_before_its_message_is_in_the_pipe():
    fork = procession.get_context("fork")
    reader, writer = fork.Pipe(duplex=False)
    child = fork.Process(target=die_between, args=(writer,))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    writer.send(np.ones(LARGE))
    assert reader.recv()[0] == 1
    assert not reader.poll()
    reader.close()
    writer.close()


def die_between(writer):
    writer._send_bytes = lambda _: os.kill(os.getpid(), signal.SIGKILL)
    writer.send(np.zeros(LARGE))


def test_threads_that_send_at_the_same_time():
    reader, writer = procession.Pipe(duplex=False)
    mutex = threading.Lock()
    send = writer._send_bytes

    def send_alone(data):
        time.sleep(0.001)
        with mutex:
            send(data)

    writer._send_bytes = send_alone
    threads = [threading.Thread(target=writer.send, args=(np.full(20_000, i),)) for i in range(20)]
    for thread in threads:
        thread.start()
    assert sorted(reader.recv()[0] for _ in threads) == list(range(20))
    for thread in threads:
        thread.join()
    reader.close()
    writer.close()


def test_a_lock_through_a_pipe_is_not_kept_for_ever():
    gc.collect()
    before = procession.memory().objects
    ours, theirs = procession.Pipe()
    ours.send(procession.Lock())
    assert theirs.recv().acquire()
    ours.close()
    theirs.close()
    del ours, theirs
    gc.collect()
    assert procession.memory().objects == before


def act(shared):
    shared.value += 1


def reach(barrier, shared):
    barrier.wait()


@pytest.mark.leaks("the heap of multiprocessing keeps its file")
def test_what_a_handle_carries_is_sent_once(ctx):
    """A barrier's action has a descriptor in it, as heap memory has: twice in the same pickle it cannot be sent to a new process."""
    import functools

    shared = ctx.RawValue("i", 0)
    barrier = ctx.Barrier(1, action=functools.partial(act, shared))
    child = ctx.Process(target=reach, args=(barrier, shared))
    child.start()
    child.join()
    assert (child.exitcode, shared.value) == (0, 1)
