"""How workers are started: a Ctrl-C at that moment is neither lost nor printed by them; and what that loads."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

import procession
from procession._pool.launcher import _interrupt_put_off


def square(x):
    return x * x


@pytest.mark.parametrize("inherited", [True, False])
def test_an_interrupt_while_a_process_is_started_comes_after_that(inherited: bool) -> None:
    came_through = False
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), _interrupt_put_off(inherited=inherited):
        os.kill(os.getpid(), signal.SIGINT)
        came_through = True
    assert came_through
    assert handler is signal.getsignal(signal.SIGINT)
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_an_interrupt_while_another_thread_starts_a_process_reaches_the_main_thread() -> None:
    """Whoever unblocks a signal takes it, and a main thread that waits for a lock would not be woken for it."""
    begun, sent = threading.Event(), threading.Event()

    def start() -> None:
        with _interrupt_put_off(inherited=True):
            begun.set()
            sent.wait()

    starter = threading.Thread(target=start)
    starter.start()
    begun.wait()
    # Blocked here too, so that it is seen to have come.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    signal.pthread_kill(starter.ident, signal.SIGINT)
    sent.set()
    starter.join()
    try:
        assert signal.SIGINT in signal.sigpending()
        assert signal.SIGINT == signal.sigwait({signal.SIGINT})
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_worker_that_is_interrupted_while_it_starts_says_nothing(method: str, capfd) -> None:
    """Ctrl-C goes to it as well; it has nothing to break off. A fork server's child has a moment in which it does not know yet."""
    with procession.get_context(method).Pool(3) as pool:
        for worker in pool._pool:
            os.kill(worker.pid, signal.SIGINT)
        assert [0, 1, 4] == pool.map(square, range(3))
        assert 0 == pool.insights().restarts
    assert ("", "") == capfd.readouterr()


def test_a_pool_loads_no_large_module_that_few_programs_need():
    """What is loaded is copied with each worker: asyncio alone made a pool's start and end a fifth slower."""
    code = (
        "import procession, sys\n"
        "with procession.get_context('fork').Pool(2) as pool: assert pool.map(abs, [-1]) == list(pool.imap(abs, [1]))\n"
        "print(sorted({'asyncio', 'ssl', 'dataclasses', 'html', 'rich', 'cloudpickle'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60).stdout
    assert out.strip() == "[]"
