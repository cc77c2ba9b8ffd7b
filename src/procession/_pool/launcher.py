"""How a pool's workers are started: by its context's start method, and by fork from a template once there are threads."""

from __future__ import annotations

import os
from multiprocessing import context as _context
from multiprocessing import process as _process

from procession._pool import worker as _worker
from procession._proc.process import ForkProcess, WithResult
from procession._proc.template import Template, TemplatePopen

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from procession._native import Cells
    from procession._wire.queues import Queue

__all__ = ["Launcher"]

# What a worker that is forked from a template finds again by its number.
_inherited: dict[int, _worker.Orders] = {}


class Launcher:
    """Starts the workers of one pool.

    Args:
        context: A context of procession's.
        orders: What each worker is told.
    """

    def __init__(self, context: Any, orders: _worker.Orders) -> None:
        self.method: str = context.get_start_method()
        self._context = context
        self._orders = _Sent(orders)
        self._template: Template | None = None
        if self.method == "forkserver":
            _preload()
        _inherited[id(self._orders)] = orders

    def make_template(self) -> None:
        """From now on workers are not forked from this process. To be called before it has threads of the pool's."""
        if self.method == "fork":
            self._template = Template()

    def start(self, wid: int, inbox: Queue[Any], done: Queue[Any], cells: Cells) -> Any:
        """Start a worker; return its process."""
        args = (self._orders, wid, inbox, done, cells)
        if self._template is None:
            process = self._context.Process(target=_main, args=args, daemon=True)
        else:
            process = _TemplateProcess(target=_main, args=args, daemon=True)
            process.template = self._template
        process.name = process.name.replace("Process", "PoolWorker").replace("_Template", "Fork")
        if isinstance(process, WithResult):
            # Without the mailbox that our own start() makes: a worker's result is nobody's.
            _process.BaseProcess.start(process)
        else:
            process.start()
        return process

    @staticmethod
    def watch(process: Any) -> tuple[int, bool]:
        """Return a descriptor that is readable when the process has ended, and whether it is the caller's to close."""
        if not isinstance(process._popen, TemplatePopen) and process._popen.method != "forkserver":
            # A sentinel is a pipe's end, which the worker's own children may hold open.
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
