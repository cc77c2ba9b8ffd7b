"""SIGKILL at random moments over everything shared, for as long as it takes.

    python -m tests.crash.storm --kills 10000
    python -m tests.crash.storm --seconds 60
    python -m tests.crash.storm --module multiprocessing      the same against the standard library, until it wedges

Workers of every kind (producers and consumers of three queues, holders of locks and semaphores, waiters and notifiers
of a condition, parties of a barrier) work on the same objects. One after the other is killed and replaced. None of the
evidence goes through what is tested: counters lie in an anonymous mapping, and each consumer appends what it received
to a file.

Watched all the time: every kind of work goes on (else: wedged). Checked at the end, after producers have stopped and
consumers have drained the queues:

- duplicate: a message received twice (JoinableQueue: except where its first consumer was killed with it in hand);
- corrupt: a message that was never put, or whose bytes are others; an order turned round; a lock held by two;
- lost: a message put and not received, beyond what killed consumers had asked for when they died; for a JoinableQueue
  beyond nothing;
- leaked: blocks of shared memory that outlive every process and handle;
- survivors: every worker that was not killed ends by itself, with exit code 0.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import gc
import importlib
import mmap
import os
import queue as stdlib_queue
import random
import signal
import struct
import sys
import tempfile
import threading
import time
import warnings
import zlib
from collections import Counter
from dataclasses import dataclass, field

# What a worker tells about itself: 8 words of 8 bytes.
SERIAL, STARTED, DONE, PROGRESS, IN_HAND, INSIDE = range(6)
_ROW_WORDS = 8
_SHARED_WORDS = 32
# Words that workers share: the two halves that a lock protects, and so on.
STOP, LOCK_A, LOCK_B, RLOCK_A, RLOCK_B, TICKETS, TORN = range(7)

# producer, number, consumer, anything wrong with the bytes. 16 bytes: a kill can cut a write short where a page of the file
# ends, and must not cut a record there.
_RECORD = struct.Struct("<IIIB3x")
_BATCH = 8
_MANY = 1 << 20

# The kinds of workers, and how many of each. Few of each, so that a wedge of one kind shows at once.
ROLES = {
    "put": 2,
    "get": 2,
    "put_bounded": 2,
    "get_bounded": 2,
    "put_job": 1,
    "do_job": 2,
    "lock": 2,
    "rlock": 1,
    "semaphore": 3,
    "notify": 1,
    "wait": 2,
    "barrier": 2,
}
_QUEUE_OF = {
    "put": "q",
    "get": "q",
    "put_bounded": "bounded",
    "get_bounded": "bounded",
    "put_job": "jobs",
    "do_job": "jobs",
}
_PRODUCERS = ("put", "put_bounded", "put_job")
_CONSUMERS = ("get", "get_bounded", "do_job")


class Table:
    """Words in an anonymous shared mapping: written by one, read by all, gone with the last process."""

    def __init__(self, rows: int) -> None:
        self._map = mmap.mmap(-1, 8 * (_SHARED_WORDS + rows * _ROW_WORDS))
        self._words = memoryview(self._map).cast("Q")

    def row(self, index: int) -> memoryview:
        start = _SHARED_WORDS + index * _ROW_WORDS
        return self._words[start : start + _ROW_WORDS]

    @property
    def shared(self) -> memoryview:
        return self._words[:_SHARED_WORDS]


def payload(producer: int, number: int) -> bytes:
    """The bytes of a message, from its name alone: mostly short, now and then longer than a small ring."""
    seed = zlib.crc32(b"%d %d" % (producer, number))
    size = (0, 10, 100, 500, 3000, 40_000)[min(5, (seed % 1000).bit_length() // 2)] if seed % 7 else seed % 90
    return (seed.to_bytes(4, "little") * (size // 4 + 1))[:size]


@dataclass
class Objects:
    """Everything that is shared."""

    mp: object
    table: Table
    q: object = field(init=False)
    bounded: object = field(init=False)
    jobs: object = field(init=False)
    lock: object = field(init=False)
    rlock: object = field(init=False)
    semaphore: object = field(init=False)
    permits: object = field(init=False)
    condition: object = field(init=False)
    barrier: object = field(init=False)

    def __post_init__(self) -> None:
        mp = self.mp
        self.q, self.bounded, self.jobs = mp.Queue(), mp.Queue(16), mp.JoinableQueue()
        self.lock, self.rlock = mp.Lock(), mp.RLock()
        self.semaphore, self.permits = mp.Semaphore(2), mp.BoundedSemaphore(2)
        self.condition, self.barrier = mp.Condition(), mp.Barrier(2)


class _Died:
    """Set by the warning that a lock's holder died: what it protects may be half-done."""

    def __init__(self) -> None:
        self.seen = False
        warnings.simplefilter("ignore")
        owner_died = getattr(importlib.import_module("procession"), "LockOwnerDied", None)
        if owner_died is not None:
            warnings.filterwarnings("always", category=owner_died)
        warnings.showwarning = self._show

    def _show(self, message, category, *args, **kwargs) -> None:
        self.seen = category.__name__ == "LockOwnerDied"

    def take(self) -> bool:
        seen, self.seen = self.seen, False
        return seen


# --- what workers do, once a call ----------------------------------------------------------------------------------------


class Worker:
    def __init__(self, role: str, objects: Objects, row: memoryview, shared: memoryview, log: int) -> None:
        self.role, self.o, self.row, self.shared, self.log = role, objects, row, shared, log
        self.serial = row[SERIAL]
        self.random = random.Random(self.serial)
        self.died = _Died()

    def run(self) -> None:
        once = getattr(self, self.role.partition("_")[0] if self.role not in ("put_job", "do_job") else self.role)
        while once():
            self.row[PROGRESS] += 1
            if not self.row[PROGRESS] % 32:
                time.sleep(0.001)  # leave the others some of the machine

    def _stopped(self) -> bool:
        return bool(self.shared[STOP])

    def put(self) -> bool:
        if self._stopped():
            return False
        q, number = getattr(self.o, _QUEUE_OF[self.role]), self.row[DONE]
        if hasattr(q, "put_many") and self.random.random() < 0.1:
            n = self.random.randrange(2, _BATCH)
            self.row[STARTED] = number + n
            q.put_many([(self.serial, number + i, payload(self.serial, number + i)) for i in range(n)])
            self.row[DONE] = number + n
            return True
        self.row[STARTED] = number + 1
        q.put((self.serial, number, payload(self.serial, number)))
        self.row[DONE] = number + 1
        if self.role == "put" and hasattr(q, "qsize") and not number % 64:
            while q.qsize() > 2000 and not self._stopped():
                self.row[PROGRESS] += 1
                time.sleep(0.001)
        return True

    put_job = put

    def _take(self, many: bool) -> list | None:
        """Items, or None when there will be no more."""
        q = getattr(self.o, _QUEUE_OF[self.role])
        self.row[IN_HAND] = _BATCH if many else 1
        try:
            items = q.get_many(_BATCH, True, 0.2) if many else [q.get(True, 0.2)]
        except stdlib_queue.Empty:
            return []
        except Exception as error:
            if type(error).__name__ == "ShutDown":
                return None
            raise
        return None if None in items else items

    def _note(self, items: list) -> None:
        lines = b"".join(
            _RECORD.pack(producer, number, self.serial, data != payload(producer, number))
            for producer, number, data in items
        )
        os.write(self.log, lines)

    def get(self) -> bool:
        many = self.random.random() < 0.3 and hasattr(getattr(self.o, _QUEUE_OF[self.role]), "get_many")
        items = self._take(many)
        if items:
            self._note(items)
        self.row[IN_HAND] = 0
        return items is not None

    def do_job(self) -> bool:
        items = self._take(many=False)
        for item in items or ():
            self._note([item])
            self.o.jobs.task_done()
        self.row[IN_HAND] = 0
        return items is not None

    def _protected(self, lock, a: int, b: int) -> bool:
        shared = self.shared
        with lock:
            if self.died.take():
                shared[b] = shared[a]
            if shared[a] != shared[b]:
                shared[TORN] += 1
            shared[a] = value = shared[a] + 1
            for _ in range(self.random.randrange(40)):
                pass
            shared[b] = value
        return not self._stopped()

    def lock(self) -> bool:
        return self._protected(self.o.lock, LOCK_A, LOCK_B)

    def rlock(self) -> bool:
        with self.o.rlock:
            return self._protected(self.o.rlock, RLOCK_A, RLOCK_B)

    def semaphore(self) -> bool:
        if self.random.random() < 0.5:
            with self.o.semaphore:
                self.row[INSIDE] = 1
                time.sleep(0)
                self.row[INSIDE] = 0
        elif self.o.permits.acquire(True, 1.0):
            self.row[INSIDE] = 1
            self.row[INSIDE] = 0
            self.o.permits.release()
        return not self._stopped()

    def notify(self) -> bool:
        with self.o.condition:
            if self.died.take():
                self.o.condition.notify_all()  # it may have been told, and have died before it took the ticket
            elif not self.shared[TICKETS]:
                self.shared[TICKETS] = 1
                self.o.condition.notify()
        time.sleep(0.0005)
        return not self._stopped()

    def wait(self) -> bool:
        with self.o.condition:
            self.o.condition.wait_for(lambda: self.shared[TICKETS] or self._stopped())
            if self.died.take():
                self.o.condition.notify_all()
            if not self._stopped():
                self.shared[TICKETS] -= 1
        return not self._stopped()

    def barrier(self) -> bool:
        try:
            self.o.barrier.wait(20)
        except threading.BrokenBarrierError:
            time.sleep(0.001)
            if not self._stopped():
                self.o.barrier.reset()
        return not self._stopped()


def work(role: str, objects: Objects, index: int, log: int) -> None:
    """The target of every worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.nice(5)  # so that the parent, which forks and kills, gets its turn on a machine full of workers
    faulthandler.enable()
    Worker(role, objects, objects.table.row(index), objects.table.shared, log).run()


# --- the storm ----------------------------------------------------------------------------------------------------------


@dataclass
class Report:
    module: str
    kills: int = 0
    seconds: float = 0.0
    messages: int = 0
    redelivered: int = 0
    duplicates: int = 0
    corrupt: int = 0
    lost: Counter = field(default_factory=Counter)
    may_be_lost: Counter = field(default_factory=Counter)
    leaked_blocks: int = 0
    survivors: int = 0
    bad_survivors: int = 0
    wedged: str = ""
    rounds: Counter = field(default_factory=Counter)

    @property
    def faults(self) -> list[str]:
        found = [self.wedged] if self.wedged else []
        if self.duplicates:
            found.append(f"{self.duplicates} duplicates")
        if self.corrupt:
            found.append(f"{self.corrupt} corrupt")
        found += [
            f"{n} messages of {name} lost, {self.may_be_lost[name]} may be"
            for name, n in self.lost.items()
            if n > self.may_be_lost[name]
        ]
        if self.leaked_blocks:
            found.append(f"{self.leaked_blocks} blocks leaked")
        if self.bad_survivors:
            found.append(f"{self.bad_survivors} survivors did not end well")
        return found

    def __str__(self) -> str:
        lost = ", ".join(
            f"{name} {self.lost[name]} (at most {self.may_be_lost[name]})" for name in ("q", "bounded", "jobs")
        )
        rounds = ", ".join(f"{role} {n}" for role, n in self.rounds.items())
        return (
            f"storm over {self.module}: {self.kills} kills in {self.seconds:.0f} s\n"
            f"  messages   {self.messages} ({self.redelivered} delivered again)\n"
            f"  duplicates {self.duplicates}\n"
            f"  corrupt    {self.corrupt}\n"
            f"  lost       {lost}\n"
            f"  leaked     {self.leaked_blocks} blocks\n"
            f"  survivors  {self.survivors}, of which {self.bad_survivors} did not end well\n"
            f"  work done  {rounds}\n"
            f"  {'FAILED: ' + '; '.join(self.faults) if self.faults else 'passed'}"
        )


class Storm:
    """One run. The parent only forks, kills and looks; it waits on nothing that is tested until the end."""

    def __init__(self, module: str, *, seed: int, patience_s: float) -> None:
        self.module = importlib.import_module(module)
        self.mp = self.module.get_context("fork")
        self.random = random.Random(seed)
        self.patience_s = patience_s
        self.report = Report(module)
        self.serial = 0
        self.produced: dict[str, dict[int, tuple[int, int]]] = {"q": {}, "bounded": {}, "jobs": {}}
        self.killed: set[int] = set()

    def run(self, *, kills: int, seconds: float) -> Report:
        memory = getattr(self.module, "memory", None)
        if memory is not None:
            _settle()
            before = memory().blocks
        with tempfile.TemporaryDirectory(prefix="storm") as directory:
            self._run(directory, kills, seconds)
        if memory is not None:
            # Nothing of it is referred to any more: every block of it must be free again.
            self.objects = None
            # A child killed before it came to its slot leaves a reservation, which is given up after ten seconds.
            deadline = time.monotonic() + 30
            while True:
                _settle()
                self.report.leaked_blocks = memory().blocks - before
                if self.report.leaked_blocks == 0 or time.monotonic() > deadline:
                    break
                time.sleep(0.5)
        return self.report

    def _run(self, directory: str, kills: int, seconds: float) -> None:
        names = [role for role, n in ROLES.items() for _ in range(n)]
        self.table = Table(len(names))
        self.objects = Objects(self.mp, self.table)
        self.logs = {
            name: os.open(f"{directory}/{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND) for name in self.produced
        }
        self.workers = [None] * len(names)
        self.roles = names
        self.progress = dict.fromkeys(ROLES, 0)
        self.last_progress = dict.fromkeys(ROLES, (time.monotonic(), 0))
        started = time.monotonic()
        try:
            for index in range(len(names)):
                self._start(index)
            while not self.report.wedged and not all(self.progress.values()):  # everybody is at work before the first
                time.sleep(0.01)
                self._look()
            while not self.report.wedged and self.report.kills < kills and time.monotonic() - started < seconds:
                time.sleep(self.random.expovariate(1 / 0.003))
                self._kill(self.random.randrange(len(names)))
                self._look()
            if not self.report.wedged:
                self._finish()
        finally:
            for index, worker in enumerate(self.workers):
                if worker is not None and worker.is_alive():
                    worker.kill()
                    worker.join()
                    self._account(index)
            for log in self.logs.values():
                os.close(log)
            self.workers.clear()
        self.report.seconds = time.monotonic() - started
        self._verify(directory)

    def _start(self, index: int) -> None:
        self.serial += 1
        row = self.table.row(index)
        for word in (STARTED, DONE, IN_HAND, INSIDE):
            row[word] = 0
        row[SERIAL] = self.serial
        role = self.roles[index]
        log = self.logs.get(_QUEUE_OF.get(role, ""), -1)
        worker = self.mp.Process(target=work, args=(role, self.objects, index, log), daemon=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            worker.start()
        self.workers[index] = worker

    def _kill(self, index: int) -> None:
        worker = self.workers[index]
        with contextlib.suppress(ProcessLookupError):  # it has ended by itself, which is told below
            os.kill(worker.pid, signal.SIGKILL)
        worker.join()
        self.report.kills += 1
        if worker.exitcode != -signal.SIGKILL:
            self.report.bad_survivors += 1
            print(f"a worker ({self.roles[index]}) ended by itself: exit code {worker.exitcode}", file=sys.stderr)
        row = self.table.row(index)
        self.killed.add(row[SERIAL])
        if self.roles[index] in ("get", "get_bounded"):
            self.report.may_be_lost[_QUEUE_OF[self.roles[index]]] += row[IN_HAND]
        self._account(index)
        worker.close()
        self._start(index)

    def _account(self, index: int) -> None:
        row, role = self.table.row(index), self.roles[index]
        if role in _PRODUCERS:
            self.produced[_QUEUE_OF[role]][row[SERIAL]] = (row[DONE], row[STARTED])

    def _look(self) -> None:
        """Has every kind of work moved on? By itself, that is: a new worker's first round does not count for the old."""
        now = time.monotonic()
        sums = dict.fromkeys(ROLES, 0)
        for index, role in enumerate(self.roles):
            sums[role] += self.table.row(index)[PROGRESS]
        for role, n in sums.items():
            if n != self.progress[role]:
                self.progress[role], self.last_progress[role] = n, (now, self.report.kills)
            elif now - self.last_progress[role][0] > self.patience_s:
                still = sorted(r for r in ROLES if now - self.last_progress[r][0] > self.patience_s / 2)
                self.report.wedged = (
                    f"wedged: no {role!r} for {self.patience_s:g} s, the last before kill "
                    f"{self.last_progress[role][1] + 1}; at a standstill: {', '.join(still)}"
                )
        self.report.rounds = Counter(sums)

    def _finish(self) -> None:
        """Let everybody end by himself: producers first, then consumers, when the queues are empty."""
        shared = self.table.shared
        shared[STOP] = 1
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if self.objects.condition.acquire(True, self.patience_s):
                self.objects.condition.notify_all()
                self.objects.condition.release()
        self._join(lambda role: role not in _CONSUMERS)
        if self.report.wedged:
            return
        self._drain()

    def _drain(self) -> None:
        o = self.objects
        if hasattr(o.jobs, "shutdown"):
            if not o.jobs.join(timeout=self.patience_s):
                self.report.wedged = "JoinableQueue.join() did not return at the end"
                return
            for q in (o.q, o.bounded, o.jobs):
                q.shutdown()
        else:
            for q in (o.q, o.bounded, o.jobs):
                for _ in range(4):
                    q.put(None)
        self._join(lambda role: role in _CONSUMERS)

    def _join(self, chosen) -> None:
        deadline = time.monotonic() + self.patience_s
        for index, worker in enumerate(self.workers):
            if not chosen(self.roles[index]):
                continue
            worker.join(max(0.1, deadline - time.monotonic()))
            if worker.exitcode is None:
                self.report.wedged = self.report.wedged or f"a surviving {self.roles[index]!r} did not end"
                continue
            self.report.survivors += 1
            self.report.bad_survivors += worker.exitcode != 0
            self._account(index)

    def _verify(self, directory: str) -> None:
        report = self.report
        report.corrupt += self.table.shared[TORN]
        for name, produced in self.produced.items():
            seen: dict[int, bytearray] = {}
            last: dict[tuple[int, int], int] = {}
            by: dict[tuple[int, int], int] = {}
            with open(f"{directory}/{name}", "rb") as log:
                records = _RECORD.iter_unpack(log.read())
            for producer, number, consumer, damaged in records:
                done, started = produced.get(producer, (0, 0))
                counts = seen.setdefault(producer, bytearray(started))
                report.messages += 1
                if damaged or number >= started:
                    report.corrupt += 1
                    continue
                counts[number] += 1
                if counts[number] > 1:
                    if name == "jobs" and by.get((producer, number)) in self.killed:
                        report.redelivered += 1
                    else:
                        report.duplicates += 1
                elif name != "jobs":
                    # First in, first out: one consumer sees one producer's messages in order.
                    report.corrupt += number < last.get((producer, consumer), 0)
                    last[producer, consumer] = number
                if name == "jobs":
                    by[producer, number] = consumer
            if not report.wedged:
                for producer, (done, _) in produced.items():
                    report.lost[name] += seen.get(producer, bytearray(done))[:done].count(0)


def _settle() -> None:
    gc.collect()
    native = importlib.import_module("procession._native")
    for _ in range(20):
        if native.collect() == 0:
            break


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.crash.storm", description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=None, help="stop after so many (default 10000)")
    parser.add_argument("--seconds", type=float, default=None, help="stop after so long")
    parser.add_argument("--module", default="procession", choices=("procession", "multiprocessing"))
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(_MANY))
    parser.add_argument("--patience", type=float, default=None, help="seconds without progress that count as wedged")
    options = parser.parse_args()
    patience = options.patience or (60.0 if options.module == "procession" else 10.0)
    kills = options.kills or (_MANY if options.seconds else 10_000)
    print(f"seed {options.seed}", flush=True)
    storm = Storm(options.module, seed=options.seed, patience_s=patience)
    report = storm.run(kills=kills, seconds=options.seconds or float("inf"))
    print(report)
    return 1 if report.faults else 0


if __name__ == "__main__":
    sys.exit(main())
