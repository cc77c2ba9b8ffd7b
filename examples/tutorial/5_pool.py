"""Two processes of a pool share four jobs of 5, 2, 1 and 3 seconds."""

import os
import time

from procession import Pool

# TUTORIAL_SPEED=20 makes the jobs 20 times shorter.
SPEED = float(os.environ.get("TUTORIAL_SPEED", "1"))

work = (["A", 5], ["B", 2], ["C", 1], ["D", 3])


def work_log(work_data):
    print(f"Process {work_data[0]} waiting {work_data[1]} seconds", flush=True)
    time.sleep(work_data[1] / SPEED)
    print(f"Process {work_data[0]} Finished.", flush=True)


def pool_handler():
    with Pool(2) as p:
        p.map(work_log, work)


if __name__ == "__main__":
    pool_handler()
