"""Fixtures for every test: nothing stays behind, all start methods, waiting without a maximum duration."""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import multiprocessing
import multiprocessing.util
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

import hypothesis
import psutil
import pytest

from tests._leaks import Footprint

START_METHODS = ("fork", "spawn", "forkserver")

NOTES = pytest.StashKey[list[str]]()

# How long a thing may take to go away by itself once the test has returned (a feeder thread, a child that is ending).
# Arbitrary; long, because a loaded machine is slow, and never waited for in full unless there really is a leak.
_GRACE_S = 10.0


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow too")
    parser.addoption(
        "--stdlib-methods",
        default="fork",
        metavar="METHODS",
        help="start methods to run CPython's own suite with: fork,spawn,forkserver or none (default: fork)",
    )


def pytest_configure() -> None:
    """Give the run a temporary directory of its own: what is left in it was left by a test.

    Its name is short, since the address of a Unix socket has at most 107 bytes.
    """
    private = tempfile.mkdtemp(prefix="prt")
    tempfile.tempdir = private
    os.environ["TMPDIR"] = private
    # No deadline for an example: a loaded machine is slow, and pytest-timeout watches over the whole test.
    hypothesis.settings.register_profile("procession", deadline=None, print_blob=True)
    hypothesis.settings.load_profile("procession")
    # A background job of a shell ignores SIGINT, and so would every child; a signal that Python catches is set back to its
    # default on exec.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # After the standard library's own finalizers (-100 removes its directory, which is in ours); not in forked children.
    multiprocessing.util.Finalize(
        None, shutil.rmtree, args=[private], kwargs={"ignore_errors": True}, exitpriority=-1000
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without --slow the slow tests are collected and skipped, so that they cannot rot unseen."""
    if config.getoption("--slow"):
        return
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="slow: only with --slow"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """What CPython's suite did on this machine that it does not do on others."""
    notes = config.stash.get(NOTES, [])
    if notes:
        terminalreporter.section("CPython's suite: not as the baseline, and not counted")
        for note in sorted(notes):
            terminalreporter.write_line(note)


@pytest.fixture(autouse=True)
def _nothing_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that leaves a process, a descriptor, a thread, shared memory or a temporary file behind.

    It is set up before the test's own fixtures and so looks after they are torn down. ``@pytest.mark.leaks("why")``
    switches it off; what may stay is listed in ``tests/_leaks.py``.
    """
    if request.node.get_closest_marker("leaks"):
        yield
        return
    before = Footprint.take()
    yield
    after = Footprint.take()
    left = after.beyond(before)
    deadline = time.monotonic() + _GRACE_S
    while left and time.monotonic() < deadline:
        multiprocessing.active_children()  # reaps those that have ended, as the next start() would
        gc.collect()
        time.sleep(0.02)
        after = Footprint.take()
        # What was not there at the first look is not the test's: other programs come and go in /dev/shm.
        left = {key: line for key, line in after.beyond(before).items() if key in left}
    # Unless the run is being broken off: then its summary matters more.
    if left and request.session.exitstatus == pytest.ExitCode.OK:
        # So that the next test starts clean. Only descendants: that an orphan is ours is a guess, good enough for a message.
        new = {key[0] for kind, key in left if kind == "processes"}
        for child in psutil.Process().children(recursive=True):
            if child.pid in new:
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
        pytest.fail(f"{request.node.nodeid} left behind:\n  " + "\n  ".join(left.values()), pytrace=False)


@pytest.fixture(params=START_METHODS)
def start_method(request: pytest.FixtureRequest) -> str:
    """Each start method in turn."""
    return str(request.param)


@pytest.fixture
def ctx(start_method: str) -> object:
    """procession's context of each start method in turn."""
    import procession

    return procession.get_context(start_method)


@pytest.fixture
def wait_until() -> Callable[..., None]:
    """Wait for a condition under a watchdog, instead of asserting a maximum duration.

    ``wait_until(lambda: q.qsize() == 3, "three items")`` returns when it holds. After `within` seconds, by default far
    longer than a loaded machine needs, the test fails with the stacks of all threads.
    """

    def wait(condition: Callable[[], object], what: str = "the condition", *, within: float = 60.0) -> None:
        deadline = time.monotonic() + within
        while not condition():
            if time.monotonic() > deadline:
                faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)
                pytest.fail(f"{what} did not come about within {within:g} s", pytrace=True)
            time.sleep(0.005)

    return wait
