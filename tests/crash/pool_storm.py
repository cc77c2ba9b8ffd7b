"""Tasks by the thousand while a random worker of their pool is killed every few milliseconds.

    python -m tests.crash.pool_storm --tasks 100000
    python -m tests.crash.pool_storm --tasks 100000 --method spawn
    python -m tests.crash.pool_storm --seconds 60 --retries 3

The tasks come in every way there is, all at once, each way from a thread of its own: `apply`, `apply_async` with callbacks,
`map` with chunks of its own choosing and of a given size, `imap`, `imap_unordered`. Each task notes in a shared mapping that it
has been begun and that it has been done.

Watched all the time: answers keep coming (else: wedged). Checked at the end:

- every task was answered exactly once: by its own result, or by a WorkerDiedError;
- none that was answered was never done, none that is reported as dead was never begun;
- no more were reported than workers killed, and none at all if it was retried often enough;
- the pool answers still; nothing is left of it: no process, descriptor, thread or block of shared memory.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import gc
import importlib
import mmap
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field

import procession
from procession import WorkerDiedError
from tests._leaks import Footprint

_SLICE = 500
_notes = None


def open_notes(path):
    """The initializer: two bytes a task, begun and done."""
    global _notes
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with open(path, "r+b") as file:
        _notes = mmap.mmap(file.fileno(), 0)


def work(number):
    """One task: mostly tiny, now and then a millisecond, now and then with a result that has to be pickled."""
    _notes[2 * number] = min(255, _notes[2 * number] + 1)
    if number % 97 == 0:
        time.sleep(0.001)
    result = expected(number)
    _notes[2 * number + 1] = 1
    return result


def expected(number):
    return [number, b"x" * (number % 3000)] if number % 11 == 0 else number


@dataclass
class Report:
    method: str
    tasks: int = 0
    kills: int = 0
    seconds: float = 0.0
    died: int = 0
    repeated: int = 0
    wrong: list[str] = field(default_factory=list)
    ways: Counter = field(default_factory=Counter)

    def __str__(self):
        ways = ", ".join(f"{way} {n}" for way, n in sorted(self.ways.items()))
        faults = "; ".join(self.wrong[:20])
        return (
            f"pool storm, {self.method}: {self.tasks} tasks, {self.kills} kills in {self.seconds:.0f} s\n"
            f"  ways       {ways}\n"
            f"  died       {self.died}\n"
            f"  repeated   {self.repeated}\n"
            f"  {'FAILED: ' + faults if self.wrong else 'passed'}"
        )


class Storm:
    """One run."""

    def __init__(self, method, *, workers, every, retries, seed, patience_s):
        self.method = method
        self.workers = workers
        self.every = every
        self.retries = retries
        self.random = random.Random(seed)
        self.patience_s = patience_s
        self.report = Report(method)
        self.answers = []
        self.lock = threading.Lock()
        self.next = 0
        self.stop_at = 0.0

    def run(self, tasks, seconds):
        ctx = procession.get_context(self.method)
        with ctx.Pool(1) as pool:  # what stays for good (the arena, the fork server) is there from now on
            pool.apply(expected, (1,))
        del pool
        _settle()
        blocks = procession.memory().blocks
        before = Footprint.take()
        with tempfile.TemporaryDirectory(prefix="pool-storm") as directory:
            self._run(ctx, tasks, seconds, f"{directory}/notes")
        self.answers = []
        self._look_for_leaks(before, blocks)
        return self.report

    def _run(self, ctx, tasks, seconds, path):
        self.answers = bytearray(tasks)
        self.deaths = bytearray(tasks)
        with open(path, "wb") as file:
            file.truncate(2 * tasks)
        started = time.monotonic()
        self.stop_at = started + seconds
        pool = ctx.Pool(
            self.workers,
            open_notes,
            (path,),
            retries=self.retries,
            max_restarts=1 << 30,
        )
        threads = [
            threading.Thread(target=self._feed, args=(way,), name=way.__name__, daemon=True)
            for way in (self.apply, self.apply_async, self.map, self.map_in_chunks, self.imap, self.imap_unordered)
        ]
        self.pool, self.tasks = pool, tasks
        self.open = len(threads)
        for thread in threads:
            thread.start()
        if not self._kill_until_done(threads):
            return
        for thread in threads:
            thread.join()
        self.report.tasks = self.next
        if pool.apply_async(expected, (7,), retries=100).get(self.patience_s) != 7:
            self.report.wrong.append("the pool does not answer any more")
        pool.close()
        pool.join()
        self.report.seconds = time.monotonic() - started
        self.pool = None
        with open(path, "rb") as file:
            self._verify(file.read())

    def _kill_until_done(self, threads):
        """Kill a worker now and then; False if nothing goes on any more."""
        seen, moved = -1, time.monotonic()
        while any(thread.is_alive() for thread in threads):
            time.sleep(self.random.uniform(0, 2 * self.every))
            victims = [process for process in self.pool._pool if process.pid is not None]
            if victims and any(thread.is_alive() for thread in threads):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.random.choice(victims).pid, signal.SIGKILL)
                    self.report.kills += 1
            done = sum(self.report.ways.values())
            if done != seen:
                seen, moved = done, time.monotonic()
            elif time.monotonic() - moved > self.patience_s:
                self.report.wrong.append(
                    f"wedged after {done} tasks and {self.report.kills} kills; still at work: "
                    + ", ".join(thread.name for thread in threads if thread.is_alive())
                )
                faulthandler.dump_traceback(all_threads=True)
                self._dump()
                return False
        return True

    def _dump(self):
        engine = self.pool._engine
        scheduler = engine._scheduler
        print("state", engine.state, "broken", engine.broken, "led", engine._collector.leader, file=sys.stderr)
        for member in engine.members.values():
            units = [(unit.seq, unit.first, unit.count, unit.offset) for unit in member.worker.units]
            print(member.process, member.ready, list(member.cells), units, member.inbox.qsize(), file=sys.stderr)
        print(len(scheduler.inflight), len(scheduler._returned), len(scheduler._sources), file=sys.stderr)
        print(self.pool.insights(), file=sys.stderr)

    # -- the ways

    def _feed(self, way):
        while True:
            with self.lock:
                count = min(20 if way == self.apply else _SLICE, self.tasks - self.next)
                if count <= 0 or time.monotonic() > self.stop_at:
                    return
                first, self.next = self.next, self.next + count
            try:
                way(range(first, first + count))
            except BaseException as error:
                self.report.wrong.append(f"{way.__name__} of {first} and so on raised {error!r}")
                return

    def answered(self, number, value):
        self.report.ways[threading.current_thread().name] += 1
        self.answers[number] = min(255, self.answers[number] + 1)
        if isinstance(value, WorkerDiedError):
            self.deaths[number] = 1
        elif value != expected(number):
            self.report.wrong.append(f"task {number} was answered {value!r:.80}")

    def apply(self, numbers):
        for number in numbers:
            try:
                value = self.pool.apply(work, (number,))
            except WorkerDiedError as error:
                value = error
            self.answered(number, value)

    def apply_async(self, numbers):
        told = Counter()
        results = [
            self.pool.apply_async(
                work,
                (number,),
                callback=lambda _, n=number: told.update([n]),
                error_callback=lambda _, n=number: told.update([n]),
            )
            for number in numbers
        ]
        for number, result in zip(numbers, results, strict=True):
            try:
                value = result.get()
            except WorkerDiedError as error:
                value = error
            self.answered(number, value)
        if told != Counter(numbers):
            self.report.wrong.append(f"callbacks of {numbers} came {told}")

    def map(self, numbers, chunksize=None):
        values = self.pool.map(work, numbers, chunksize=chunksize, on_error="return")
        for number, value in zip(numbers, values, strict=True):
            self.answered(number, value)

    def map_in_chunks(self, numbers):
        self.map(numbers, 25)

    def imap(self, numbers):
        for number, value in zip(numbers, self.pool.imap(work, iter(numbers), on_error="return"), strict=True):
            self.answered(number, value)

    def imap_unordered(self, numbers):
        """Values say whose they are; deaths do not, but as many tasks have no value."""
        left, errors = set(numbers), []
        for value in self.pool.imap_unordered(work, iter(numbers), chunksize=5, on_error="return"):
            if isinstance(value, WorkerDiedError):
                errors.append(value)
                continue
            number = value[0] if isinstance(value, list) else value
            left.discard(number)
            self.answered(number, value)
        if len(errors) != len(left):
            self.report.wrong.append(f"imap_unordered: {len(left)} have no answer, {len(errors)} died")
        for number, error in zip(left, errors, strict=False):
            self.answered(number, error)

    # -- the end

    def _verify(self, notes):
        report = self.report
        for number in range(self.next):
            begun, done = notes[2 * number], notes[2 * number + 1]
            if self.answers[number] != 1:
                report.wrong.append(f"task {number} was answered {self.answers[number]} times")
            elif not self.deaths[number] and not done:
                report.wrong.append(f"task {number} has a result and was never done")
            report.repeated += max(0, begun - 1)
        report.died = sum(self.deaths)
        if report.died > report.kills:
            report.wrong.append(f"{report.died} died of {report.kills} kills")

    def _look_for_leaks(self, before, blocks):
        # A child killed before it came to its slot leaves a reservation, which is given up after ten seconds.
        deadline = time.monotonic() + 30
        while True:
            _settle()
            # Others use the machine's shared memory and temporary files.
            left = [line for (kind, _), line in Footprint.take().beyond(before).items() if kind not in ("shm", "files")]
            more = procession.memory().blocks - blocks
            if (not left and more <= 0) or time.monotonic() > deadline:
                break
            time.sleep(0.5)
        if more > 0:
            self.report.wrong.append(f"{more} blocks leaked")
        self.report.wrong += [f"left behind: {line}" for line in left]


def _settle():
    gc.collect()
    native = importlib.import_module("procession._native")
    for _ in range(20):
        if native.collect() == 0:
            break


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.crash.pool_storm", description=__doc__.partition("\n")[0])
    parser.add_argument("--tasks", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin nothing new after so long")
    parser.add_argument("--method", default="fork", choices=("fork", "spawn", "forkserver"))
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--every", type=float, default=0.05, help="mean seconds between two kills")
    parser.add_argument("--retries", type=int, default=0)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 20))
    parser.add_argument("--patience", type=float, default=60.0, help="seconds without an answer that count as wedged")
    options = parser.parse_args()
    faulthandler.register(signal.SIGUSR2)
    print(f"seed {options.seed}", flush=True)
    storm = Storm(
        options.method,
        workers=options.workers,
        every=options.every,
        retries=options.retries,
        seed=options.seed,
        patience_s=options.patience,
    )
    report = storm.run(options.tasks, options.seconds)
    print(report, flush=True)
    if report.wrong:
        # Without waiting for threads and workers that are stuck.
        os._exit(1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
