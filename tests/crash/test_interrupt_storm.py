"""Ctrl-C at any bytecode, some hundred times, in a pool that is used on; the long storms run by hand."""

from __future__ import annotations

import pytest

from tests.crash import interrupt_storm, storms


@pytest.mark.timeout(300)
def test_a_pool_answers_after_interrupts_at_any_bytecode(start_method):
    """What an interrupt leaves half done would keep the pool, or its own thread, waiting for ever."""
    end, output = storms.run("interrupt_storm", "--interrupts", "400", "--method", start_method, timeout=250)
    assert (0, "passed") == end, output
    assert "400 interrupted; restarts 0" in output


def test_the_storm_calls_a_pool_in_every_way():
    """A kind of call that is not in the storm is not shown to bear it."""
    names = {name for call in interrupt_storm.CALLS for name in call.__code__.co_names}
    assert {"apply", "apply_async", "map", "starmap", "imap", "imap_unordered", "cancel", "close"} <= names
