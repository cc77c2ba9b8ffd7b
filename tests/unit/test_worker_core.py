"""What of a pool's worker is in the extension: the shared cells, the loop over a chunk, numbers as bytes."""

from __future__ import annotations

import math
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from procession import _native

NUMBERS = st.lists(st.integers(-(2**63), 2**63 - 1)) | st.lists(st.floats(allow_nan=False))


@given(NUMBERS)
def test_a_list_of_numbers_comes_back_as_it_was(numbers) -> None:
    data = _native._pack(numbers)
    if not numbers:
        assert data is None
        return
    back = _native._unpack(data)
    assert back == numbers
    assert [type(x) for x in back] == [type(x) for x in numbers]
    assert [math.copysign(1, x) for x in back] == [math.copysign(1, x) for x in numbers]


@pytest.mark.parametrize("other", [[2**63], [1, 2.0], [1.0, 1], [True], [1, None], ["1"], (1, 2), range(3), [1, True]])
def test_any_other_list_is_left_to_pickle(other) -> None:
    assert _native._pack(other) is None


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"I123", ValueError),
        (b"I" + bytes(7), ValueError),
        (b"", SystemError),
        (b"R\0\0", SystemError),
        (b"l\xff\xff", SystemError),
        ("I", TypeError),
        (None, TypeError),
    ],
)
def test_bytes_that_are_not_packed_are_refused(data, error) -> None:
    with pytest.raises(error):
        _native._unpack(data)


def test_cells_are_shared_with_a_child_and_bounded() -> None:
    cells = _native.Cells(3)
    assert list(cells) == [0, 0, 0]
    pid = os.fork()
    if pid == 0:
        cells[1] = -5
        os._exit(0)
    os.waitpid(pid, 0)
    assert list(cells) == [0, -5, 0]
    with pytest.raises(IndexError, match="cell 3 of 3"):
        cells[3] = 1
    with pytest.raises(TypeError):
        cells[0] = "1"
    with pytest.raises(TypeError, match="cannot be deleted"):
        del cells[0]


@pytest.mark.parametrize("count", [0, -1, 10_000])
def test_a_senseless_number_of_cells_is_refused(count) -> None:
    with pytest.raises(ValueError, match="takes 1 to"):
        _native.Cells(count)


def test_the_loop_writes_where_it_is_and_stops_at_an_exception_or_its_time() -> None:
    cells, results = _native.Cells(1), []

    def invert(x):
        assert cells[0] == items.index(x)
        return 1 / x

    items = [1, 2, 0, 4]
    with pytest.raises(ZeroDivisionError):
        _native._run_items(invert, items, 0, cells, 0, results, 10**9)
    assert results == [1, 0.5]
    _native._run_items(invert, items, 3, cells, 0, results, 0)
    assert results == [1, 0.5, 0.25]
    assert cells[0] == 3


def test_the_loop_bears_a_function_that_shortens_its_list() -> None:
    items, results = [1, 2, 3], []

    def shorten(x):
        items.clear()
        return x

    _native._run_items(shorten, items, 0, _native.Cells(1), 0, results, 10**9)
    assert results == [1]


@pytest.mark.parametrize("arguments", [(), (len, [], 0), (len, (), 0, None, 0, [], 1), (len, [], 0, 1, 5, [], 1)])
def test_the_loop_refuses_what_it_cannot_use(arguments) -> None:
    with pytest.raises((TypeError, IndexError)):
        _native._run_items(*arguments)
