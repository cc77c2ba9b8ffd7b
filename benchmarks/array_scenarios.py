"""Arrays of doubles: how fast they come to a consumer that adds up every element.

- multiprocessing: a Queue.
- procession: a Queue of arrays as they are; "empty()": the producer writes each into memory of procession's own.
- shared_memory by hand: one segment that is used again and again, a semaphore for each direction; the consumer adds up in place.
- iceoryx2: publish-subscribe with loaned samples, the consumer adds up in place; it has no waiting, so both sides yield.
- py-sharedmemory: a pair of endpoints, blocks that are used again; the receiver gets a copy.
- torch.multiprocessing: as tensors, each written into shared memory of torch's own.
- Ray: tasks that return the array, two ahead; joblib: arrays above 1 MB are memory-mapped.
- shared(): the array as each task's argument, and as a part of the function, which a worker gets once.
- memcpy: what this machine copies from one warm buffer to another, in one process.
- bare buffers: four of them and two counters, polled: copying on one core while the other adds up, and nothing else.
"""

from __future__ import annotations

import importlib
import os
import time
from functools import partial
from typing import TYPE_CHECKING, Any

from harness import OURS, Cost, Scenario, Target

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MP, IN_PLACE, BY_HAND = "multiprocessing", "procession, empty()", "shared_memory by hand"
MEMCPY, FLOOR = "memcpy", "bare buffers"
MEGABYTE = 1 << 20
# Messages before the clock starts. Ours puts memory that is used again and again into huge pages, some of them at each message.
# Where each message is copied anew by pickle or into other memory, the first ones are as fast as the last.
WARM, WARM_FOR_OTHERS = 300, 4
DEPTH = 2  # messages that may be under way


def _doubles(nbytes: int) -> Any:
    import numpy as np

    return np.arange(nbytes // 8, dtype=float)


def _check(total: float, nbytes: int) -> None:
    n = nbytes // 8
    if total != n * (n - 1) / 2:
        raise AssertionError(f"wrong sum: {total}")


def _timed(totals: Iterator[float], nbytes: int, count: int, warm: int = WARM_FOR_OTHERS) -> Cost:
    """Take sums as they come; the first ones are not counted."""
    for _ in range(warm):
        _check(next(totals), nbytes)
    start = time.perf_counter()
    for _ in range(count):
        total = next(totals)
    elapsed = time.perf_counter() - start
    _check(total, nbytes)
    return Cost(elapsed / (count * nbytes), elapsed)


# --- one producer, one consumer ---------------------------------------------------------------------------------------


def _produce(queue: Any, nbytes: int, count: int) -> None:
    array = _doubles(nbytes)
    for _ in range(count):
        queue.put(array)


def _produce_in_place(queue: Any, nbytes: int, count: int) -> None:
    import procession

    source = _doubles(nbytes)
    for _ in range(count):
        array = procession.empty(len(source))
        array[:] = source
        queue.put(array)
        del array


def through_queue(module: str, produce: Callable[..., None], nbytes: int, count: int) -> Cost:
    """Seconds per byte through a Queue."""
    context = importlib.import_module(module).get_context("fork")
    warm = WARM if module == OURS else WARM_FOR_OTHERS
    queue = context.Queue(DEPTH)
    child = context.Process(target=produce, args=(queue, nbytes, warm + count))
    child.start()

    def totals() -> Iterator[float]:
        while True:
            yield float(queue.get().sum())

    cost = _timed(totals(), nbytes, count, warm)
    child.join()
    return cost


def through_torch(nbytes: int, count: int) -> Cost:
    """Seconds per byte through a Queue of torch.multiprocessing, as tensors, each written to its memory as DataLoader does."""
    torch: Any = importlib.import_module("torch")
    torch.set_num_threads(1)
    context = importlib.import_module("torch.multiprocessing").get_context("fork")
    queue, done = context.Queue(DEPTH), context.Event()

    def produce() -> None:
        array = torch.from_numpy(_doubles(nbytes))
        for _ in range(WARM_FOR_OTHERS + count):
            storage = torch.UntypedStorage._new_shared(nbytes)
            queue.put(torch.empty(0, dtype=torch.float64).set_(storage).copy_(array))
        done.wait()  # its memory goes with the producer

    child = context.Process(target=produce)
    child.start()

    def totals() -> Iterator[float]:
        while True:
            yield float(queue.get().sum())

    cost = _timed(totals(), nbytes, count)
    done.set()
    child.join()
    return cost


def py_sharedmemory(nbytes: int, count: int) -> Cost:
    """Seconds per byte through a pair of py-sharedmemory's."""
    import multiprocessing

    make: Any = importlib.import_module("py_sharedmemory").create_shared_memory_pair
    context = multiprocessing.get_context("fork")
    sender, receiver = make(DEPTH, ctx=context)

    def produce() -> None:
        array = _doubles(nbytes)
        for _ in range(WARM_FOR_OTHERS + count):
            sender.put(array)
        sender.wait_for_all_ack()
        sender.close()

    child = context.Process(target=produce)
    child.start()

    def totals() -> Iterator[float]:
        while True:
            yield float(receiver.get().sum())

    cost = _timed(totals(), nbytes, count)
    child.join()
    receiver.close()
    return cost


def by_hand(nbytes: int, count: int) -> Cost:
    """Seconds per byte through one segment of shared memory that is used again and again."""
    import multiprocessing
    from multiprocessing import shared_memory

    import numpy as np

    context = multiprocessing.get_context("fork")
    segment = shared_memory.SharedMemory(create=True, size=nbytes)
    full, empty = context.Semaphore(0), context.Semaphore(1)

    def produce() -> None:
        array, there = _doubles(nbytes), np.ndarray(nbytes // 8, buffer=segment.buf)
        for _ in range(WARM + count):
            empty.acquire()
            there[:] = array
            full.release()

    def totals() -> Iterator[float]:
        there = np.ndarray(nbytes // 8, buffer=segment.buf)
        while True:
            full.acquire()
            total = float(there.sum())
            empty.release()
            yield total

    try:
        child = context.Process(target=produce)
        child.start()
        cost = _timed(totals(), nbytes, count, WARM)
        child.join()
    finally:
        segment.unlink()
    return cost


def bare_buffers(nbytes: int, count: int) -> Cost:
    """Seconds per byte through four buffers in shared memory and a counter for each direction that is polled: the floor.

    No queue, no pickle, no kernel: what the machine takes to copy on one core and add up on the other at the same time.
    """
    import mmap

    import numpy as np

    n, buffers = nbytes // 8, 4
    memory = np.frombuffer(mmap.mmap(-1, buffers * nbytes), float).reshape(buffers, n)
    counters = np.frombuffer(mmap.mmap(-1, 4096), np.int64)
    child = os.fork()
    if child == 0:
        array = _doubles(nbytes)
        for number in range(WARM + count):
            while number - counters[8] >= buffers:
                pass
            memory[number % buffers] = array
            counters[0] = number + 1
        os._exit(0)

    def totals() -> Iterator[float]:
        number = 0
        while True:
            while counters[0] <= number:
                pass
            total = float(memory[number % buffers].sum())
            number += 1
            counters[8] = number
            yield total

    cost = _timed(totals(), nbytes, count, WARM)
    os.waitpid(child, 0)
    return cost


def iceoryx2(nbytes: int, count: int) -> Cost:
    """Seconds per byte through iceoryx2's shared memory."""
    import ctypes

    import numpy as np

    iox2: Any = importlib.import_module("iceoryx2")
    iox2.set_log_level(iox2.LogLevel.Fatal)
    name = f"procession-bench-{os.getpid()}"

    def service() -> Any:
        node = iox2.NodeBuilder.new().create(iox2.ServiceType.Ipc)
        builder = node.service_builder(iox2.ServiceName.new(name)).publish_subscribe(iox2.Slice[ctypes.c_double])
        builder = builder.enable_safe_overflow(False).subscriber_max_buffer_size(DEPTH).history_size(0)
        return node, builder.open_or_create()

    ready = os.pipe()
    child = os.fork()
    if child == 0:
        _node, here = service()
        publisher = here.publisher_builder().initial_max_slice_len(nbytes // 8).create()
        os.read(ready[0], 1)
        array = _doubles(nbytes)
        for _ in range(WARM + count):
            sample = publisher.loan_slice_uninit(nbytes // 8)
            ctypes.memmove(sample.payload().as_ptr(), array.ctypes.data, nbytes)
            sample.assume_init().send()
        time.sleep(0.5)
        os._exit(0)

    _node, here = service()
    subscriber = here.subscriber_builder().create()
    os.write(ready[1], b"x")

    def totals() -> Iterator[float]:
        while True:
            sample = subscriber.receive()
            if sample is None:
                os.sched_yield()
                continue
            # Its view claims as many elements as there are bytes.
            view = np.frombuffer(sample.payload().as_memory_view(), float, nbytes // 8)
            total = float(view.sum())
            del view
            sample.delete()
            yield total

    return _timed(totals(), nbytes, count, WARM)


def ray_store(nbytes: int, count: int) -> Cost:
    """Seconds per byte from a task's result to the driver, through the object store."""
    ray = _ray()

    @ray.remote
    def produce(kept: list[Any] = []) -> Any:  # noqa: B006
        kept or kept.append(_doubles(nbytes))
        return kept[0]

    def totals() -> Iterator[float]:
        under_way = [produce.remote() for _ in range(DEPTH)]
        while True:
            under_way.append(produce.remote())
            yield float(ray.get(under_way.pop(0)).sum())

    cost = _timed(totals(), nbytes, count)
    ray.shutdown()
    return cost


def _ray() -> Any:
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    ray = importlib.import_module("ray")
    ray.init(
        num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error", object_store_memory=2 << 30
    )
    return ray


def memcpy(nbytes: int, count: int) -> Cost:
    """Seconds per byte of a copy within this process, its pages warm."""
    import numpy as np

    source, target = _doubles(nbytes), np.empty(nbytes // 8)
    for _ in range(WARM_FOR_OTHERS):
        target[:] = source
    start = time.perf_counter()
    for _ in range(count):
        target[:] = source
    elapsed = time.perf_counter() - start
    return Cost(elapsed / (count * nbytes), elapsed)


def first_message(module: str, nbytes: int, count: int) -> Cost:
    """Seconds per byte of the very first array: all pages are new. `count` is not used: there is one first."""
    del count
    importlib.import_module("numpy")  # or the consumer would, when it has the array
    context = importlib.import_module(module).get_context("fork")
    queue, go = context.Queue(), context.Event()

    def produce() -> None:
        array = _doubles(nbytes)
        go.wait()
        queue.put(array)

    child = context.Process(target=produce)
    child.start()
    time.sleep(0.2)
    start = time.perf_counter()
    go.set()
    total = float(queue.get().sum())
    elapsed = time.perf_counter() - start
    _check(total, nbytes)
    child.join()
    return Cost(elapsed / nbytes, elapsed)


# --- pools ---------------------------------------------------------------------------------------------------------------


def _double(array: Any) -> Any:
    return array * 2.0


def _map_pool(module: str) -> tuple[Callable[[list[Any]], list[Any]], Callable[[], None]]:
    pool = importlib.import_module(module).get_context("fork").Pool(2)
    return partial(pool.map, _double), lambda: (pool.close(), pool.join())  # type: ignore[func-returns-value]


def _map_joblib() -> tuple[Callable[[list[Any]], list[Any]], Callable[[], None]]:
    joblib = importlib.import_module("joblib")
    parallel = joblib.Parallel(n_jobs=2)
    stop = importlib.import_module("joblib.externals.loky").get_reusable_executor
    return lambda arrays: parallel(map(joblib.delayed(_double), arrays)), lambda: stop().shutdown(wait=True)


def _map_ray() -> tuple[Callable[[list[Any]], list[Any]], Callable[[], None]]:
    ray = _ray()
    remote = ray.remote(_double).remote
    return lambda arrays: ray.get([remote(array) for array in arrays]), ray.shutdown


def mapping(
    make: Callable[[], tuple[Callable[[list[Any]], list[Any]], Callable[[], None]]], nbytes: int, count: int
) -> Cost:
    """Seconds per array of a mapping that returns arrays as large, all of them read by the caller."""
    arrays = [_doubles(nbytes) for _ in range(min(count, 16))]
    run, stop = make()
    _check(float(run(arrays[:4])[-1].sum()) / 2, nbytes)
    start, done = time.perf_counter(), 0
    while done < count:
        for result in run(arrays):
            total = float(result.sum())
        done += len(arrays)
        del result
    elapsed = time.perf_counter() - start
    _check(total / 2, nbytes)
    stop()
    return Cost(elapsed / done, elapsed)


def _first(array: Any) -> int:
    return len(array)


def _same(number: int) -> int:
    return abs(number)


def _one_of(array: Any, number: int) -> int:
    return len(array) + number


def shared_tasks(what: str, nbytes: int, count: int) -> Cost:
    """Seconds per task of mappings of 1,000: each gets the array, or an int, or an int with the array in the function."""
    import procession

    shared = procession.shared(_doubles(nbytes)) if nbytes else None
    function, items = {
        "each": (_first, [shared] * 1000),
        "partial": (partial(_one_of, shared), list(range(1000))),
        "int": (_same, list(range(1000))),
    }[what]
    with procession.get_context("fork").Pool(2) as pool:
        for _ in range(3):
            pool.map(function, items)
        start = time.perf_counter()
        for _ in range(count):
            pool.map(function, items)
        elapsed = time.perf_counter() - start
    return Cost(elapsed / (count * 1000), elapsed)


def scenarios() -> list[Scenario]:
    """The rows about arrays."""
    rows = []
    for megabytes in (1, 16, 128):
        nbytes = megabytes * MEGABYTE
        measure = {
            OURS: partial(through_queue, OURS, _produce, nbytes),
            IN_PLACE: partial(through_queue, OURS, _produce_in_place, nbytes),
            MP: partial(through_queue, MP, _produce, nbytes),
            BY_HAND: partial(by_hand, nbytes),
            "iceoryx2": partial(iceoryx2, nbytes),
            "py-sharedmemory": partial(py_sharedmemory, nbytes),
            "torch.multiprocessing": partial(through_torch, nbytes),
            "Ray": partial(ray_store, nbytes),
            MEMCPY: partial(memcpy, nbytes),
            FLOOR: partial(bare_buffers, nbytes),
        }
        targets = (
            *(Target(MP, 20, 35), Target(BY_HAND, 1, 1.5), Target("iceoryx2", 1, 1.5)),
            *(
                Target("py-sharedmemory", 1, 1.5),
                Target("torch.multiprocessing"),
                Target(MEMCPY, 0.5, 0.9),
                Target(FLOOR),
            ),
        )
        title = f"{megabytes} MB of doubles through a Queue, warm, each added up"
        rows.append(Scenario(f"array-queue-{megabytes}", title, measure, targets, unit="bytes", start_n=4, max_n=5000))
    nbytes = 16 * MEGABYTE
    return [
        *rows,
        Scenario(
            "array-first",
            "the first 16 MB through a Queue, pages new, added up",
            {who: partial(first_message, who, nbytes) for who in (OURS, MP)},
            (Target(MP, 2, 5),),
            unit="bytes",
            start_n=1,
            full_n=1,
            more_rounds=3,
        ),
        Scenario(
            "array-map",
            "Pool.map of arrays of 8 MB, results as large, added up by the caller",
            {
                OURS: partial(mapping, partial(_map_pool, OURS), 8 * MEGABYTE),
                MP: partial(mapping, partial(_map_pool, MP), 8 * MEGABYTE),
                "joblib": partial(mapping, _map_joblib, 8 * MEGABYTE),
                "Ray": partial(mapping, _map_ray, 8 * MEGABYTE),
            },
            (Target(MP, 8, 15), Target("joblib", 2, 4), Target("Ray", 1, 2)),
            start_n=16,
            max_n=2000,
        ),
        Scenario(
            "array-shared",
            "a task of Pool.map that gets 1 GB of shared(), 1,000 of them; against an int",
            {
                OURS: partial(shared_tasks, "each", 1 << 30),
                "procession, in a partial": partial(shared_tasks, "partial", 1 << 30),
                "an int": partial(shared_tasks, "int", 0),
            },
            (Target("an int", 1.2, 1.05, at_most=True),),
            unit="time",
            start_n=3,
            max_n=500,
        ),
    ]
