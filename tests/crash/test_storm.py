"""SIGKILL at random moments: the short run. The long one is `python -m tests.crash.storm --kills 10000`."""

from __future__ import annotations

import pytest

from tests.crash.storms import run


@pytest.mark.timeout(240)
def test_hundreds_of_kills_leave_nothing_lost_doubled_damaged_leaked_or_stuck():
    """The promise of the whole core, where the kernel decides when a process dies and not the test."""
    end, output = run("storm", "--kills", "300", timeout=200)
    assert (0, "passed") == end, output


@pytest.mark.slow
@pytest.mark.timeout(2000)
def test_thousands_of_kills_leave_nothing_lost_doubled_damaged_leaked_or_stuck():
    """Rare windows need many kills."""
    end, output = run("storm", "--kills", "10000", timeout=1900)
    assert (0, "passed") == end, output


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_standard_library_does_not_survive_the_same_storm():
    """Else the storm would prove nothing. Mostly it is wedged within 20 kills; else a survivor does not stop at the end."""
    (code, _), output = run("storm", "--module", "multiprocessing", "--kills", "3000", timeout=250)
    assert 1 == code, output
