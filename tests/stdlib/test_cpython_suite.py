"""Every test of CPython's multiprocessing suite that the standard library passes on this machine passes here.

One test of ours runs one test class of theirs, in a process of its own, for one start method. ``--stdlib-methods`` names
the start methods (``fork`` by default; ``fork,spawn,forkserver`` for all, ``none`` for none). Which tests do not count,
and why, is in ``known.txt``; what the standard library scores is in ``baseline/``.

A test that does not do what the baseline says is run again alone, then against multiprocessing itself: where that does
not pass it here and now either, it is the machine and not us. Both are named at the end of the run.
"""

from __future__ import annotations

import pytest

from tests.stdlib._conf import compare

_TESTS = "multiprocessing"

# The class may have several tests that hang, each broken off after compare.SILENCE_S.
pytestmark = pytest.mark.timeout(480)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test a start method and class of theirs."""
    compare.parametrize(metafunc, _TESTS)


@pytest.fixture(scope="module")
def copies():
    """The suite for procession and for multiprocessing, each made when first asked for."""
    with compare.copies(_TESTS) as copies:
        yield copies


def test_what_the_standard_library_passes_passes(method, their_class, copies, request):
    """Compare outcomes; the text of a failure is their traceback."""
    compare.check(request.config, method, their_class, copies)


def test_every_line_of_known_gives_a_reason():
    """A test that is not counted says why."""
    compare.check_known(_TESTS)
