"""A pool under fire: the short run. The long one is `python -m tests.crash.pool_storm --tasks 100000`."""

from __future__ import annotations

import pytest

from tests.crash import storms


def run(*options, timeout):
    end, output = storms.run("pool_storm", *options, timeout=timeout)
    assert (0, "passed") == end, output


@pytest.mark.timeout(240)
@pytest.mark.parametrize("retries", [0, 100])
def test_every_task_is_answered_once_while_workers_are_killed_all_the_time(retries):
    run("--tasks", "15000", "--every", "0.01", "--retries", str(retries), timeout=200)


@pytest.mark.timeout(240)
def test_workers_that_are_killed_before_they_have_started_cost_nothing_but_time():
    """A spawned one takes longer to start than it has to live, on average."""
    run("--tasks", "1000", "--method", "spawn", "--workers", "2", "--every", "0.15", timeout=200)


@pytest.mark.slow
@pytest.mark.timeout(2000)
def test_a_hundred_thousand_tasks_are_answered_once_each(start_method):
    run("--tasks", "100000", "--method", start_method, timeout=1900)
