"""Ten tasks in one queue, four processes that take from it, a log in a second queue, a lock around the printing."""

import os
import queue  # for queue.Empty
import time

from procession import Lock, Process, Queue, current_process

# TUTORIAL_SPEED=20 makes the pauses 20 times shorter.
PAUSE = 0.5 / float(os.environ.get("TUTORIAL_SPEED", "1"))


def do_job(tasks_to_accomplish, tasks_that_are_done, print_lock):
    while True:
        try:
            task = tasks_to_accomplish.get_nowait()
        except queue.Empty:
            break
        else:
            with print_lock:
                print(task, flush=True)
            tasks_that_are_done.put(task + " is done by " + current_process().name)
            time.sleep(PAUSE)
    return True


def main():
    number_of_task = 10
    number_of_processes = 4
    tasks_to_accomplish = Queue()
    tasks_that_are_done = Queue()
    print_lock = Lock()
    processes = []

    for i in range(number_of_task):
        tasks_to_accomplish.put("Task no " + str(i))

    for _ in range(number_of_processes):
        p = Process(target=do_job, args=(tasks_to_accomplish, tasks_that_are_done, print_lock))
        processes.append(p)
        p.start()

    for p in processes:
        p.join()

    while not tasks_that_are_done.empty():
        print(tasks_that_are_done.get())


if __name__ == "__main__":
    main()
