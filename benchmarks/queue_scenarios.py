"""Queues: throughput seen by the consumer, and the time of a round trip.

Each rival is used as well as its API allows:
- multiprocessing and procession: put() and get() of the object.
- faster-fifo: put() and get(), put_many() and get_many(); a ring of 16 MB, and the C pickler, which is up to twice as
  fast as the ForkingPickler it takes by itself.
- cloudtoid-interprocess carries bytes: the benchmark pickles with the C pickler, except where the payload is bytes. Its
  queue lies in /dev/shm and has 1 MiB (small messages were fastest so, against 64 KiB and 16 MiB and a file in /tmp);
  try_receive() first and receive() when nothing was there beat receive() alone by up to a third for small messages and
  tenfold for 100 kB; a full queue is answered by sched_yield().
"""

from __future__ import annotations

import datetime as dt
import importlib
import os
import pickle
import statistics
import tempfile
import time
from functools import cache, partial
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness import OURS, Cost, Scenario, Target, by_placement, pin

if TYPE_CHECKING:
    from collections.abc import Callable

MP, CLOUDTOID, FASTER = "multiprocessing", "cloudtoid", "faster-fifo"
BATCH = 100


@cache
def _shared_directory() -> tempfile.TemporaryDirectory[str]:
    """Where cloudtoid keeps its queues: in memory if possible, and gone with the run even when a measurement is killed."""
    memory = Path("/dev/shm")
    return tempfile.TemporaryDirectory(prefix="bench", dir=memory if os.access(memory, os.W_OK) else None)


class ObjectQueue:
    """A channel over a Queue class of the stdlib's shape."""

    def __init__(self, module: str, maxsize: int = 0) -> None:
        self.context = importlib.import_module(module).get_context("fork")
        self.queue = self.context.Queue(maxsize)

    def start(self, target: Callable[..., None], *args: object) -> Any:
        """Start a process of the rival's own kind."""
        process = self.context.Process(target=target, args=args)
        process.start()
        return process

    def sender(self) -> Callable[[Any], object]:
        """What puts one object; to be called in the process that puts."""
        return self.queue.put

    def receiver(self) -> Callable[[], Any]:
        """What gets one object; to be called in the process that gets."""
        return self.queue.get

    def send(self, item: object, count: int) -> None:
        """Put `item` so many times."""
        put = self.sender()
        for _ in repeat(None, count):
            put(item)

    def receive(self, count: int) -> None:
        """Get so many items."""
        get = self.receiver()
        for _ in repeat(None, count):
            get()


class ManyQueue(ObjectQueue):
    """procession: batches by put_many() and get_many(). `count` is in batches."""

    def sender(self) -> Callable[[Any], object]:
        return self.queue.put_many

    def receive(self, count: int) -> None:
        left, get_many = count * BATCH, self.queue.get_many
        while left > 0:
            left -= len(get_many(min(left, BATCH)))


class FasterFifo(ObjectQueue):
    """faster-fifo; its queue wants its size in bytes."""

    def __init__(self, maxsize: int = 0) -> None:
        self.context = importlib.import_module("multiprocessing").get_context("fork")
        options = {"loads": pickle.loads, "dumps": pickle.dumps, **({"maxsize": maxsize} if maxsize else {})}
        self.queue = importlib.import_module("faster_fifo").Queue(max_size_bytes=16_000_000, **options)


class FasterFifoMany(FasterFifo):
    """faster-fifo: batches by put_many() and get_many(). `count` is in batches."""

    def sender(self) -> Callable[[Any], object]:
        return self.queue.put_many

    def receive(self, count: int) -> None:
        left, get_many = count * BATCH, self.queue.get_many
        while left > 0:
            left -= len(get_many(max_messages_to_get=min(left, BATCH)))


class Cloudtoid(ObjectQueue):
    """cloudtoid-interprocess with objects pickled by the benchmark; endpoints are opened where they are used."""

    tries = 20  # looks at an empty queue, giving the core away after each, before receive() blocks: see round_trip()

    def __init__(self, capacity: int = 1 << 20) -> None:
        self.context = importlib.import_module("multiprocessing").get_context("fork")
        self.library = importlib.import_module("cloudtoid_interprocess")
        self.where = (f"bench{os.getpid()}-{time.monotonic_ns()}", capacity, _shared_directory().name)
        self.subscriber = self.library.Subscriber(*self.where)  # a queue lives as long as an endpoint of it

    def sender(self) -> Callable[[Any], object]:
        try_send, dumps = self.library.Publisher(*self.where).try_send, pickle.dumps

        def put(item: object) -> None:
            message = dumps(item)
            while not try_send(message):
                os.sched_yield()

        return put

    def receiver(self) -> Callable[[], Any]:
        try_receive, receive, loads, tries = (
            self.subscriber.try_receive,
            self.subscriber.receive,
            pickle.loads,
            self.tries,
        )

        def get() -> object:
            for _ in repeat(None, tries):
                message = try_receive()
                if message is not None:
                    return loads(message)
                os.sched_yield()
            return loads(receive())

        return get

    def send(self, item: object, count: int) -> None:
        try_send, dumps = self.library.Publisher(*self.where).try_send, pickle.dumps
        for _ in repeat(None, count):
            message = dumps(item)
            while not try_send(message):
                os.sched_yield()

    def receive(self, count: int) -> None:
        try_receive, receive, loads = self.subscriber.try_receive, self.subscriber.receive, pickle.loads
        for _ in repeat(None, count):
            message = try_receive()
            loads(receive() if message is None else message)


class CloudtoidBytes(Cloudtoid):
    """cloudtoid-interprocess with bytes sent as they are."""

    def send(self, item: object, count: int) -> None:
        try_send = self.library.Publisher(*self.where).try_send
        for _ in repeat(None, count):
            while not try_send(item):
                os.sched_yield()

    def receive(self, count: int) -> None:
        try_receive, receive = self.subscriber.try_receive, self.subscriber.receive
        for _ in repeat(None, count):
            if try_receive() is None:
                receive()


class CloudtoidBlocking(Cloudtoid):
    """cloudtoid-interprocess with nothing but its blocking receive()."""

    tries = 0


def throughput(make: Callable[[], ObjectQueue], item: object, count: int, *, producers: int = 1, each: int = 1) -> Cost:
    """Seconds per item at the consumer, over `count` items after a tenth as many to warm up.

    Args:
        make: Creates the channel.
        item: What is put, again and again.
        count: Items to time.
        producers: Processes that put.
        each: Items that one put carries.
    """
    channel = make()
    messages = max(count // each, 10)
    warm = max(messages // 10, 10)
    share = -(-(warm + messages) // producers)
    processes = [channel.start(channel.send, item, share) for _ in range(producers)]
    channel.receive(warm)
    start = time.perf_counter()
    channel.receive(messages)
    elapsed = time.perf_counter() - start
    channel.receive(share * producers - warm - messages)
    for process in processes:
        process.join()
    return Cost(elapsed / (messages * each), elapsed)


def round_trip(
    make: Callable[[], ObjectQueue], count: int, *, pause_s: float = 0.0, cores: tuple[int, int] | None = None
) -> Cost:
    """Median and p90 of the time from put() until another process's answer is got, through two queues.

    Args:
        make: Creates a channel.
        count: Round trips; the first tenth is not counted.
        pause_s: Sleep before each, so that the other side has gone to sleep; 0 for busy.
        cores: Of this process and of the one that answers; None leaves them to the scheduler.
    """
    there, back = make(), make()
    process = there.start(_echo, there, back, count, cores)
    pin(cores, 0)
    put, get, now, sleep = there.sender(), back.receiver(), time.perf_counter, time.sleep
    times = []
    began = now()
    for _ in repeat(None, count):
        if pause_s:
            sleep(pause_s)
        start = now()
        put(7)
        get()
        times.append(now() - start)
    elapsed = now() - began
    process.join()
    counted = times[count // 10 :]
    return Cost(statistics.median(counted), elapsed, statistics.quantiles(counted, n=10)[-1])


def _echo(there: ObjectQueue, back: ObjectQueue, count: int, cores: tuple[int, int] | None) -> None:
    pin(cores, 1)
    get, put = there.receiver(), back.sender()
    for _ in repeat(None, count):
        put(get())


def scenarios() -> list[Scenario]:
    """The rows about queues."""
    _shared_directory()  # made here, in the process that outlives all measurements
    ours, theirs = partial(ObjectQueue, OURS), partial(ObjectQueue, MP)

    def row(name: str, title: str, item: object, targets: tuple[Target, ...], **more: Any) -> Scenario:
        sort = (
            {"cloudtoid": CloudtoidBytes, "cloudtoid, pickled": Cloudtoid}
            if isinstance(item, bytes)
            else {"cloudtoid": Cloudtoid}
        )
        makes = more.pop("makes", {OURS: ours, MP: theirs, **sort, FASTER: FasterFifo})
        limit = more.pop("max_n", 20_000_000)
        measure = {who: partial(throughput, make, item, **more) for who, make in makes.items()}
        return Scenario(name, title, measure, targets, max_n=limit)

    bounded = {
        OURS: partial(ours, 64),
        MP: partial(theirs, 64),
        FASTER: partial(FasterFifo, 64),
        # 64 messages of 8 bytes of frame and 8 of pickled int.
        CLOUDTOID: partial(Cloudtoid, 1024),
    }
    batches = {OURS: partial(ManyQueue, OURS), MP: theirs, CLOUDTOID: Cloudtoid, FASTER: FasterFifoMany}
    trips = {OURS: ours, MP: theirs, CLOUDTOID: Cloudtoid, "cloudtoid, blocking": CloudtoidBlocking, FASTER: FasterFifo}

    def trip(pause_s: float, row: Scenario) -> list[Scenario]:
        return by_placement(
            lambda cores: {who: partial(round_trip, make, pause_s=pause_s, cores=cores) for who, make in trips.items()},
            row,
        )

    return [
        row("queue-int", "Queue 1->1, ints", 12345, (Target(MP, 12, 40), Target(CLOUDTOID, 1.2, 3))),
        row(
            "queue-bytes-100", "Queue 1->1, 100-byte bytes", bytes(100), (Target(MP, 8, 25), Target(CLOUDTOID, 1.3, 3))
        ),
        row(
            "queue-tuple-dict",
            "Queue 1->1, (1, 'abc', {'k': 2.5})",
            (1, "abc", {"k": 2.5}),
            (Target(MP, 7, 10), Target(CLOUDTOID, 1, 1.5)),
        ),
        row(
            "queue-tuple-big-int",
            "Queue 1->1, (1, 'abc', {'k': {2}}): pickled by all",
            (1, "abc", {"k": {2}}),
            (Target(MP, 7, 10), Target(CLOUDTOID, 1, 1.5)),
        ),
        # Not judged: four fifths of our cost is Pickler and Unpickler, which look the class up for each message.
        row(
            "queue-date",
            "Queue 1->1, (1, 'abc', {'k': a date}): pickled by all",
            (1, "abc", {"k": dt.date(2026, 11, 22)}),
            (Target(MP), Target(CLOUDTOID)),
        ),
        # At most 4,000 messages: whatever of these 400 MB waits in an unbounded queue has to fit into memory.
        row("queue-bytes-100k", "Queue 1->1, 100 kB bytes", bytes(100_000), (Target(MP, 8, 20),), max_n=4000),
        row("queue-2-producers", "Queue 2->1, ints", 12345, (Target(MP, 5, 20),), producers=2),
        row("queue-bounded", "Queue(64) 1->1, ints", 12345, (Target(MP, 6, 15),), makes=bounded),
        row(
            "queue-batches",
            "batches of 100 ints: put_many/get_many (others: a list as one message)",
            list(range(1000, 1000 + BATCH)),
            (Target(MP, 1, 1.5),),
            makes=batches,
            each=BATCH,
        ),
        *trip(
            0,
            Scenario(
                "round-trip-busy",
                "round trip through two queues, busy",
                {},
                (Target(MP, 5, 30), Target(CLOUDTOID, 1, 3)),
                unit="time",
                start_n=200,
            ),
        ),
        *trip(
            0.001,
            Scenario(
                "round-trip-idle",
                "round trip through two queues, 1 ms pause before each",
                {},
                (Target(MP), Target(CLOUDTOID, 1, 1.2)),
                unit="time",
                start_n=50,
            ),
        ),
    ]
