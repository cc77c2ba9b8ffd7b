"""A worker process: takes a message, does what it says, answers, takes the next.

One message at a time, and each answer is in shared memory before the next message is taken: whatever kills the process,
what it had answered is answered, what it had not taken is still there, and at most one unit was in its hands. Which, and
at which item of it, stands in its cells.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import sys
import time
from multiprocessing import process as _process
from queue import Empty

from procession import _native
from procession._pool import messages as m
from procession._proc import results
from procession._proc.threads import limit_threads
from procession._wire import codec

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from procession._wire.queues import Queue

__all__ = ["Orders", "main"]

# So often an idle worker looks whether its parent is still there.
_PARENT_CHECK_S = 1.0
# A part of a chunk is answered when it has been worked on for this long: what a death can make to be done again.
FLUSH_NS = 10_000_000
# A worker's memory is looked at this often at most.
_MEMORY_CHECK_S = 0.05


class Orders:
    """What is the same for all workers of a pool.

    Attributes:
        initializer, initargs: Called first.
        worker_init, worker_exit: Called first and last, with the worker's state if `with_state`.
        with_state: Functions get the worker's state, a dict, as their first argument.
        most_items: The worker leaves after this many items.
        most_seconds: The worker leaves when it is this old.
        most_bytes: The worker leaves when its resident memory is more.
        main_by_value: What is defined in ``__main__`` comes and goes by value.
        as_executor: As the workers of concurrent.futures: a call's SystemExit is its error, a result that cannot be pickled
            has the pickler's, and an initializer's is logged.
        share, threads: CPUs for each worker, and threads if the user has said how many; see `procession._proc.threads`.
        interruptible: SIGINT breaks off what runs, even where the process was started while its parent ignored it.
    """

    def __init__(self, **options: Any) -> None:
        self.initializer: Callable[..., object] | None = None
        self.initargs: tuple[Any, ...] = ()
        self.worker_init: Callable[..., object] | None = None
        self.worker_exit: Callable[..., object] | None = None
        self.with_state = False
        self.most_items: int | None = None
        self.most_seconds: float | None = None
        self.most_bytes: int | None = None
        self.main_by_value = False
        self.as_executor = False
        self.interruptible = False
        self.share = 1
        self.threads: int | None = None
        self.__dict__.update(options)


class _Leave(Exception):  # noqa: N818
    """The worker ends."""


def main(orders: Orders, wid: int, inbox: Queue[Any], done: Queue[Any], cells: _native.Cells) -> None:
    """Be a worker; the target of its process."""
    _Worker(orders, wid, inbox, done, cells).run()


class _Worker:
    def __init__(self, orders: Orders, wid: int, inbox: Queue[Any], done: Queue[Any], cells: _native.Cells) -> None:
        self.orders = orders
        self.wid = wid
        self.inbox = inbox
        self.done = done
        self.cells = cells
        self.state: dict[str, Any] = {}
        self.functions: dict[int, Callable[[Any], Any]] = {}
        # What must be seeded before each item; and what could not be unpickled.
        self.seeded: dict[int, tuple[Callable[[Any], Any], int]] = {}
        self.missing: dict[int, Exception] = {}
        self.items = 0
        self.started = self.memory_checked = time.monotonic()

    def run(self) -> None:
        # A worker may have children of its own, whatever its parent thinks of it.
        _process.current_process()._config["daemon"] = False
        if self.orders.interruptible or signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, self.on_interrupt)
        # Who started this process has blocked it until now.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        try:
            self.prepare()
        except SystemExit:
            raise
        except BaseException as error:
            if self.orders.as_executor:
                log_initializer_error()
            self.done.put((m.FAILED, self.wid, pack(error)))
            # Said; the traceback on stderr would be a second time.
            sys.exit(1)
        self.done.put((m.READY, self.wid, os.getpid()))
        try:
            self.work()
        finally:
            if self.orders.worker_exit is not None:
                self.with_state(self.orders.worker_exit)()

    def prepare(self) -> None:
        """Call what the user wants called first."""
        limit_threads(self.orders.share, self.orders.threads)
        if self.orders.initializer is not None:
            self.orders.initializer(*self.orders.initargs)
        if self.orders.worker_init is not None:
            self.with_state(self.orders.worker_init)()

    def with_state(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return `function`, with the worker's state as its first argument if that is wanted."""
        if not self.orders.with_state:
            return function
        return lambda *args, **kwargs: function(self.state, *args, **kwargs)

    def on_interrupt(self, *_: object) -> None:
        """SIGINT: breaks off the unit it is meant for, or, if it is from the terminal, whatever runs."""
        running = self.cells[m.RUNNING_CELL]
        if running and self.cells[m.CANCEL_CELL] in (0, running):
            self.cells[m.RUNNING_CELL] = 0
            raise KeyboardInterrupt

    def answer(self, message: tuple[Any, ...]) -> None:
        """Say the last word on a unit."""
        self.done.put(message)
        self.cells[m.UNANSWERED_CELL] = 0

    # -- the loop

    def work(self) -> None:
        parent_has_ended = watch_parent()
        keep_last_words(self.cells)
        limited = any(
            limit is not None for limit in (self.orders.most_items, self.orders.most_seconds, self.orders.most_bytes)
        )
        # With limits every item comes here, to be counted.
        fast: dict[int, Callable[[Any], Any]] = {} if limited else self.functions
        get, put, cells = self.inbox.get, self.done.put, self.cells
        while True:
            message: Any = None  # what was in the last one is not kept while nothing comes
            try:
                message = _native._serve(get, put, fast, cells, self.wid, _PARENT_CHECK_S)
                if message[0] is None:
                    self.answer(self.packed(*message[1:]))
                else:
                    self.obey(message)
            except _Leave:
                return
            except BaseException as error:
                if isinstance(error, SystemExit) and not self.orders.as_executor:
                    raise
                cells[m.RUNNING_CELL] = 0
                seq = cells[m.UNANSWERED_CELL]
                if seq:
                    self.answer((m.ERROR, self.wid, seq, pack(error), 0))
                elif isinstance(error, Empty):
                    if parent_has_ended():
                        os._exit(1)
                elif not isinstance(error, KeyboardInterrupt):  # it came late
                    raise

    def obey(self, message: tuple[Any, ...]) -> None:
        kind = message[0]
        if kind == m.ITEM:
            self.item(message[1], message[2], message[3], message[4])
        elif kind == m.PICKLED:
            self.pickled(message)
        elif kind == m.CHUNK:
            self.chunk(message)
        elif kind == m.DEFINE:
            self.define(*message[1:])
        elif kind == m.FORGET:
            for known in (self.functions, self.seeded, self.missing):
                known.pop(message[1], None)
        elif kind == m.PING:
            self.done.put((m.PONG, self.wid, message[1]))
        else:
            raise _Leave

    def define(self, fid: int, data: bytes, mode: int, seed: int | None, print_of_code: int | None) -> None:
        try:
            function = codec.loads(data)
            if print_of_code is not None and fingerprint(function) != print_of_code:
                raise AttributeError("the function has been defined anew since this process was forked")
        except Exception as error:
            self.missing[fid] = error
            return
        function = _adapted(self.with_state(function), mode)
        if seed is None:
            self.functions[fid] = function
        else:
            self.seeded[fid] = (function, seed)

    def take(self, seq: int, fid: int) -> tuple[Callable[[Any], Any], int | None] | None:
        """Write down what was taken and return its function and seed; or answer that there is no such function."""
        self.cells[m.INDEX_CELL] = 0
        self.cells[m.SEQ_CELL] = seq
        self.cells[m.UNANSWERED_CELL] = seq
        function = self.functions.get(fid)
        if function is not None:
            return function, None
        if fid in self.seeded:
            return self.seeded[fid]
        error = self.missing.get(fid) or LookupError(f"function {fid} was not sent")
        self.answer((m.NO_FUNCTION, self.wid, seq, pack(error), fid))
        return None

    def pickled(self, message: tuple[Any, ...]) -> None:
        _, seq, fid, index, data = message
        self.cells[m.SEQ_CELL] = seq
        self.cells[m.UNANSWERED_CELL] = seq
        try:
            value = codec.loads(data)
        except BaseException as error:
            if not isinstance(error, Exception) and not (self.orders.as_executor and isinstance(error, SystemExit)):
                raise
            self.answer((m.REFUSED, self.wid, seq, pack(error)))
            return
        self.item(seq, fid, index, value)

    def item(self, seq: int, fid: int, index: int, value: Any) -> None:
        found = self.take(seq, fid)
        if found is None:
            return
        function, seed = found
        if seed is not None:
            seed_task(seed, index)
        running = self.cells
        begun = time.perf_counter_ns()
        try:
            running[m.RUNNING_CELL] = seq
            result = function(value)
            running[m.RUNNING_CELL] = 0
        except BaseException as error:
            running[m.RUNNING_CELL] = 0
            if isinstance(error, SystemExit) and not self.orders.as_executor:
                raise
            self.answer((m.ERROR, self.wid, seq, pack(error), time.perf_counter_ns() - begun))
        else:
            self.answer(self.packed(seq, result, time.perf_counter_ns() - begun))
        self.finished(1)

    def packed(self, seq: int, result: Any, spent: int) -> tuple[Any, ...]:
        if type(result) in m.PLAIN:
            return (m.VALUE, self.wid, seq, result, spent)
        try:
            data = codec.encode_result(result, main_by_value=self.orders.main_by_value)
        except BaseException as error:
            if self.orders.as_executor:
                return (m.ERROR, self.wid, seq, pack(error), spent)
            if not isinstance(error, Exception):
                raise
            return (m.ERROR, self.wid, seq, unsendable(result, error), spent)
        return (m.VALUE_PICKLED, self.wid, seq, data, spent)

    def chunk(self, message: tuple[Any, ...]) -> None:
        _, seq, fid, first, data = message
        found = self.take(seq, fid)
        if found is None:
            return
        function, seed = found
        try:
            items = codec.decode_items(data)
        except Exception as error:
            self.answer((m.REFUSED, self.wid, seq, pack(error)))
            return
        cells, count, at = self.cells, len(items), 0
        while True:
            start = at
            results: list[Any] = []
            errors: dict[int, Any] = {}
            begun = time.perf_counter_ns()
            while at < count:
                mark = len(results)
                try:
                    cells[m.RUNNING_CELL] = seq
                    if seed is None:
                        _native._run_items(function, items, at, cells, m.INDEX_CELL, results, FLUSH_NS)
                    else:
                        cells[m.INDEX_CELL] = at
                        seed_task(seed, first + at)
                        results.append(function(items[at]))
                    cells[m.RUNNING_CELL] = 0
                    at += len(results) - mark
                except SystemExit:
                    raise  # and the cells still say at which item
                except BaseException as error:
                    cells[m.RUNNING_CELL] = 0
                    at = start + len(results)
                    if at >= count:
                        break  # SIGINT, after the last one
                    errors[at] = pack(error)
                    results.append(None)
                    at += 1
                    if cells[m.DROP_CELL] == seq:
                        break
                if time.perf_counter_ns() - begun >= FLUSH_NS:
                    break
            spent = time.perf_counter_ns() - begun
            self.answer_part(seq, start, results, errors, spent)
            if at >= count:
                break
            if cells[m.DROP_CELL] == seq:
                self.answer((m.ERROR, self.wid, seq, pack(KeyboardInterrupt()), 0))
                break
        self.cells[m.UNANSWERED_CELL] = 0
        self.finished(count)

    def answer_part(self, seq: int, start: int, results: list[Any], errors: dict[int, Any], spent: int) -> None:
        stop = start + len(results)
        by_value = self.orders.main_by_value
        try:
            data = codec.encode_results(results, main_by_value=by_value)
        except Exception:
            # One of them: find it.
            for i, result in enumerate(results):
                try:
                    codec.encode_result(result, main_by_value=by_value)
                except Exception as error:
                    errors[start + i] = unsendable(result, error)
                    results[i] = None
            data = codec.encode_results(results, main_by_value=by_value)
        try:
            self.done.put((m.VALUES, self.wid, seq, start, data, errors or None, spent, stop))
        except MemoryError as error:
            failed = pack(error)
            errors.update((start + i, failed) for i in range(len(results)))
            nothing = codec.encode_results([None] * len(results))
            self.done.put((m.VALUES, self.wid, seq, start, nothing, errors, spent, stop))

    def finished(self, count: int) -> None:
        """Leave when one of the limits is reached."""
        orders = self.orders
        self.items += count
        if orders.most_items is not None and self.items >= orders.most_items:
            self.leave("items")
        if orders.most_seconds is None and orders.most_bytes is None:
            return
        now = time.monotonic()
        if orders.most_seconds is not None and now - self.started >= orders.most_seconds:
            self.leave("age")
        if orders.most_bytes is not None and now - self.memory_checked >= _MEMORY_CHECK_S:
            self.memory_checked = now
            if resident_bytes() > orders.most_bytes:
                self.leave("memory")

    def leave(self, why: str) -> None:
        self.done.put((m.LEAVING, self.wid, why))
        raise _Leave


def keep_last_words(cells: _native.Cells) -> None:
    """Have the Python stack at a crash (SIGSEGV and the like) left where the parent finds it.

    Not where faulthandler is in use already: then it goes where the user wants it.
    """
    import faulthandler

    if faulthandler.is_enabled():
        return
    with contextlib.suppress(OSError):  # no more descriptors, or memfd_create forbidden
        fd = os.memfd_create("procession-last-words")
        _native._keep_last_words(cells, m.LAST_WORDS_CELL, fd)
        faulthandler.enable(fd, all_threads=False)


def last_words(cells: _native.Cells) -> str:
    """Return the Python stack of a worker that has crashed, the innermost call first; empty if there is none."""
    words = b"".join(cells[i].to_bytes(8, "little", signed=True) for i in range(m.LAST_WORDS_CELL, m.CELLS))
    lines = words.rstrip(b"\0").decode("utf-8", "replace").splitlines()
    stack = [line for line in lines if line.startswith("  File ")]
    # What called the user's function is of no interest.
    return "\n".join(itertools.takewhile(lambda line: __file__ not in line, stack))


def watch_parent() -> Callable[[], bool]:
    """Return a function that tells whether the pool's process has ended, which need not be the parent by birth.

    That may be a fork server or a template; their death is no reason to leave.
    """
    owner = _process.parent_process()
    if owner is None:  # not started by multiprocessing
        born_of = os.getppid()
        return lambda: os.getppid() != born_of
    try:
        pidfd = os.pidfd_open(owner.pid or 0)
    except ProcessLookupError:
        return lambda: True
    except OSError:
        return lambda: not owner.is_alive()

    def has_ended() -> bool:
        import select

        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        # The second is closed too when the parent does not know of this worker, which it asked a dying template for.
        return bool(poll.poll(0)) or not owner.is_alive()

    return has_ended


def _adapted(function: Callable[..., Any], mode: int) -> Callable[[Any], Any]:
    if mode == m.STAR:
        return lambda item: function(*item)
    if mode == m.CALL:
        return lambda item: function(*item[0], **item[1])
    if mode == m.KEYWORDS:
        return lambda item: function(**item)
    return function


def pack(error: BaseException) -> tuple[Any, ...]:
    """Pack an exception, without the frames of this module at the top of its traceback."""
    skip, trace = 0, error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
        skip, trace = skip + 1, trace.tb_next
    return results.pack_error(error, skip)


def unsendable(result: Any, error: Exception) -> tuple[Any, ...]:
    """Describe a result that could not be pickled, as the standard library does."""
    from multiprocessing.pool import MaybeEncodingError

    failure = MaybeEncodingError(error, result)
    failure.__cause__ = error
    return pack(failure)


def log_initializer_error() -> None:
    """Log the exception that is being handled, as the standard library does: a program may look for it there."""
    from concurrent.futures._base import LOGGER

    LOGGER.critical("Exception in initializer:", exc_info=True)


def fingerprint(function: Any) -> int | None:
    """Return a number that changes with a function's code; None for what has no code."""
    code = getattr(function, "__code__", None)
    if code is None:
        return None
    import marshal
    import zlib

    return zlib.crc32(marshal.dumps(code))


def seed_task(seed: int, index: int) -> None:
    """Seed `random`, and NumPy's global generator where it is loaded, for one item; the same wherever it runs."""
    import hashlib
    import random

    number = int.from_bytes(hashlib.blake2b(b"%d:%d" % (seed, index), digest_size=16).digest(), "little")
    random.seed(number)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(number & 0xFFFFFFFF)


def resident_bytes(pid: int | str = "self") -> int:
    """Return the resident memory of a process in bytes; 0 when it is gone."""
    try:
        with open(f"/proc/{pid}/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0
