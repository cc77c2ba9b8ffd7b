"""Every test of CPython's test_concurrent_futures that the standard library's process pool passes here, ours passes.

As in ``test_cpython_suite.py``: one test of ours runs one test class of theirs that has a process pool, in a process of
its own; the class says how the pool starts its workers, and ``--stdlib-methods`` which of them are run. In the copy of
the tests the name ``ProcessPoolExecutor`` is procession's, and so are the contexts it is given. What does not count is in
``known_concurrent_futures.txt``. An interpreter without these tests (some are installed without them) is skipped.
"""

from __future__ import annotations

import pytest

from tests.stdlib._conf import compare

_TESTS = "concurrent_futures"

# The class may have several tests that hang, each broken off after compare.SILENCE_S.
pytestmark = pytest.mark.timeout(480)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test a class of theirs, of the start methods asked for."""
    compare.parametrize(metafunc, _TESTS)


@pytest.fixture(scope="module")
def copies():
    """The suite for procession and for the standard library, each made when first asked for."""
    with compare.copies(_TESTS) as copies:
        yield copies


def test_what_the_standard_library_passes_passes(method, their_class, copies, request):
    """Compare outcomes; the text of a failure is their traceback."""
    compare.check(request.config, method, their_class, copies)


def test_every_line_of_known_gives_a_reason():
    """A test that is not counted says why."""
    compare.check_known(_TESTS)
