"""How a pool's workers are started: by its context's start method, and by fork from a template once there are threads."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from multiprocessing import context as _context

from procession._pool import worker as _worker
from procession._proc.process import ForkProcess, WithResult
from procession._proc.template import Template, TemplateGoneError, TemplatePopen
from procession._proc.threads import find_loaded

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from procession._native import Cells
    from procession._wire.queues import Queue

__all__ = ["Launcher"]

# As short as it gets: what counts is that there is a wake-up.
_NAP_S = 0.00002
# What a worker that is forked from a template finds again by its number.
_inherited: dict[int, _worker.Orders] = {}


class Launcher:
    """Starts the workers of one pool.

    Args:
        context: A context of procession's.
        orders: What each worker is told.

    Attributes:
        method: The start method.
        prepares: A worker runs code of the user's before it is ready.
    """

    def __init__(self, context: Any, orders: _worker.Orders) -> None:
        self.method: str = context.get_start_method()
        self.prepares = orders.initializer is not None or orders.worker_init is not None
        self._context = context
        self._orders = _Sent(orders)
        self._template: Template | None = None
        if self.method == "forkserver":
            _preload()
        if self.method == "fork":
            find_loaded()
        _inherited[id(self._orders)] = orders

    def make_template(self) -> None:
        """From now on workers are not forked from this process. To be called before it has threads of the pool's."""
        if self.method == "fork":
            with _interrupt_put_off(inherited=True):
                self._template = Template()

    def start(self, wid: int, inbox: Queue[Any], done: Queue[Any], cells: Cells) -> Any:
        """Start a worker; return its process."""
        args = (self._orders, wid, inbox, done, cells)
        if self._template is not None:
            try:
                return self._start(args)
            except TemplateGoneError:
                # The next one is made beside threads, which the lost one was to avoid, but a pool without workers is worse.
                self._template.close()
                self.make_template()
        return self._start(args)

    def _start(self, args: tuple[Any, ...]) -> Any:
        if self._template is None:
            process = self._context.Process(target=_main, args=args, daemon=True)
        else:
            process = _TemplateProcess(target=_main, args=args, daemon=True)
            process.template = self._template
        process.name = process.name.replace("Process", "PoolWorker").replace("_Template", "Fork")
        process._threads = self._orders.orders.share, self._orders.orders.threads
        if self.method == "spawn":
            from multiprocessing import resource_tracker

            # If it were started in the block, that would unblock the signal.
            resource_tracker.ensure_running()
        with _interrupt_put_off(inherited=self._template is None and self.method != "forkserver"):
            if self._template is None and self.method == "fork":
                self._template = Template()
            if isinstance(process, WithResult):
                process.start_without_result()
            else:
                process.start()
        if self._template is not None and self.method == "fork" and not isinstance(process, _TemplateProcess):
            # A forked child waits on its parent's CPU for the kernel to balance the load, up to some milliseconds, while
            # another is idle; a sleeper wakes up on the idle one at once. So both go on now.
            time.sleep(_NAP_S)
        return process

    @staticmethod
    def watch(process: Any) -> tuple[int, bool]:
        """Return a descriptor that is readable when the process has ended, and whether it is the caller's to close."""
        if not isinstance(process._popen, TemplatePopen):  # which has one already
            # A sentinel is a pipe's end: the worker's own children may hold it open, and a fork server that dies closes it.
            try:
                return os.pidfd_open(process.pid), True
            except OSError:
                pass
        return process.sentinel, False

    def retire(self) -> None:
        """No more workers will be started: the template may end when the last of its own has."""
        if self._template is not None:
            self._template.retire()

    def close(self) -> None:
        """End the template."""
        _inherited.pop(id(self._orders), None)
        if self._template is not None:
            self._template.close()
            self._template = None


@contextlib.contextmanager
def _interrupt_put_off(*, inherited: bool) -> Iterator[None]:
    """Keep a Ctrl-C until the end of the block, in which a process is started.

    Its KeyboardInterrupt would be raised in one of the hooks of `os.register_at_fork` as likely as not, whose exceptions are
    ignored: the caller would go on as if nothing had been.

    Args:
        inherited: The process inherits this thread's signal mask: there the signal is blocked until the worker has its own
            handler, for before that its traceback would be printed. Else the mask is left alone: the fork server, should
            it be started in the block, would hand it on to all its children.
    """
    in_main = threading.current_thread() is threading.main_thread()
    came: list[tuple[Any, ...]] = []
    former: Any = None
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        if in_main and callable(signal.getsignal(signal.SIGINT)):
            former = signal.signal(signal.SIGINT, lambda *args: came.append(args))
        if inherited:
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        yield
    finally:
        if inherited:
            # Whoever unblocks a signal that waits for any thread takes it; and then the main thread, if it waits for a lock,
            # would go on waiting.
            if not in_main and signal.SIGINT not in mask and signal.sigtimedwait({signal.SIGINT}, 0) is not None:
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if former is not None:
            signal.signal(signal.SIGINT, former)
            if came:
                former(*came[0])


def _preload() -> None:
    """Have the fork server, if it is not running yet, import what every worker needs, once for all of them."""
    from multiprocessing import forkserver

    server: Any = forkserver._forkserver
    if server._forkserver_pid is None and __name__ not in server._preload_modules:
        server._preload_modules = [*server._preload_modules, __name__]


class _Sent:
    """Orders as an argument: inherited where the worker is forked, by this process or a template, and pickled elsewhere."""

    def __init__(self, orders: _worker.Orders) -> None:
        self.orders = orders

    def __reduce__(self) -> tuple[Any, ...]:
        if isinstance(_context.get_spawning_popen(), TemplatePopen):
            return _found, (id(self),)
        return _Sent, (self.orders,)


def _found(number: int) -> _Sent:
    return _Sent(_inherited[number])


def _main(sent: _Sent, wid: int, inbox: Queue[Any], done: Queue[Any], cells: Cells) -> None:
    _worker.main(sent.orders, wid, inbox, done, cells)


class _TemplateProcess(ForkProcess):
    template: Template | None = None

    @staticmethod
    def _Popen(process_obj: Any) -> Any:
        template, process_obj.template = process_obj.template, None
        return TemplatePopen(process_obj, template)
