"""A program that starts processes, tells their pids on one line, its own first, and dies: METHOD WHAT DEATH."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

import procession
from tests.crash.family import die


def report(queue):
    queue.put(os.getpid())
    time.sleep(1000)


def report_and_start(queue, method, generations):
    queue.put(os.getpid())
    if generations:
        procession.get_context(method).Process(
            target=report_and_start, args=(queue, method, generations - 1), daemon=True
        ).start()
    time.sleep(1000)


def report_and_use_a_pool(queue, method):
    with procession.get_context(method).Pool(2) as pool:
        pool.map(report, [queue] * 2, chunksize=1)


def report_and_compute(queue):
    queue.put(os.getpid())
    sum(range(10**12))  # one call, in C


def report_and_block(queue):
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGALRM, signal.SIGIO})
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    report(queue)


def report_and_wait(queue):
    queue.put(os.getpid())
    procession.parent_process().join()
    os.write(1, b"it has ended\n")


def main(method, what, death):
    context = procession.get_context(method)
    queue = context.Queue()
    kept = []

    def process(target, *args, **options):
        kept.append(context.Process(target=target, args=(queue, *args), daemon=True, **options))
        kept[-1].start()
        return queue.get()

    pids = [os.getpid()]
    if what == "children":
        pids += [process(report), process(report)]
    elif what == "generations":
        pids += [process(report_and_start, method, 2), queue.get(), queue.get()]
    elif what == "pools":
        kept.append(context.Pool(2))
        kept.append(kept[0].map_async(report, [queue] * 2, chunksize=1))
        pids += [queue.get(), queue.get()]
        process_pids = [process(report_and_use_a_pool, method), queue.get()]
        pids += [*process_pids, kept[-1].pid]
    elif what == "executor":
        executor = procession.ProcessPoolExecutor(2, mp_context=context)
        kept.append([executor.submit(report, queue) for _ in range(2)])
        pids += [queue.get(), queue.get()]
    elif what == "busy":
        pids += [process(report_and_compute)]
    elif what == "blocked":
        pids += [process(report_and_block)]
    elif what == "threads":
        thread = threading.Thread(target=lambda: pids.append(process(report)))
        thread.start()
        thread.join()
    elif what == "allowed":
        pids += [process(report, orphan_ok=True), process(report)]
    elif what == "told":
        pids += [process(report_and_wait)]
    print(*pids, flush=True)
    if death == "none":
        time.sleep(1000)
    die(death)


if __name__ == "__main__":
    main(*sys.argv[1:])
