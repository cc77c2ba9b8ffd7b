"""Ten experiments that go wrong with the standard library's multiprocessing, run with the library you name.

    python examples/before_after.py multiprocessing
    python examples/before_after.py procession
    python examples/before_after.py procession R3 R5 --start-method spawn

Each experiment runs in a process group of its own and is ended with everything in it, since some of them hang.
"""

import argparse
import importlib
import os
import queue
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import warnings

# "For ever", in seconds. Whoever has not answered by then has lost the answer; with a busy machine, raise it.
FOR_EVER = float(os.environ.get("FOR_EVER", "5"))


# --- what the children do


def square_but_die_at_three(number):
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number * number


def hold_for_ever(lock, held):
    lock.acquire()
    held.set()
    time.sleep(600)


def sleep_for_ever():
    time.sleep(600)


class TwoArguments(Exception):
    def __init__(self, first, second):
        super().__init__(f"{first} and {second}")


def raise_two_arguments(number):
    raise TwoArguments("one", "two")


def exit_in_the_task(number):
    sys.exit(1)


def identity(number):
    return number


def fail():
    raise LookupError("nothing here")


# --- the experiments: each returns what it saw


def r1(mp):
    """Pool.map, and one task kills its worker."""
    pool = mp.Pool(2)
    result = pool.map_async(square_but_die_at_three, range(6))
    return outcome(lambda: result.get(timeout=FOR_EVER))


NOTEBOOK = """
import sys, {library} as mp
mp.set_start_method("forkserver")
def f(x=1):
    return x + 1
p = mp.Process(target=f)
p.start(); p.join()
print("exit code", p.exitcode)
"""

NOTEBOOK_POOL = """
import {library} as mp
mp.set_start_method("forkserver")
def f(x=1):
    return x + 1
result = mp.Pool(2).map_async(f, range(4))
try:
    print(result.get(timeout={for_ever}), flush=True)
except mp.TimeoutError:
    print("no answer, and no exception", flush=True)
import os
os._exit(0)
"""


def r2(mp):
    """A function of __main__ that is in no file, as in a notebook, and the start method forkserver: Process."""
    return python_c(NOTEBOOK, mp)


def r2_pool(mp):
    """The same with Pool.map."""
    return python_c(NOTEBOOK_POOL, mp)


def r3(mp):
    """A child that holds a lock is killed."""
    lock, held = mp.Lock(), mp.Event()
    child = mp.Process(target=hold_for_ever, args=(lock, held))
    child.start()
    held.wait()
    child.kill()
    child.join()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = lock.acquire(timeout=FOR_EVER)
    said = "".join(f", with a {warning.category.__name__} warning" for warning in caught)
    return f"the next acquire() gets it{said}" if got else "the lock is lost for ever"


def r4(mp):
    """Put something that cannot be pickled."""
    q = mp.Queue()
    try:
        q.put(threading.Lock())
    except TypeError as error:
        return f"put() raises {type(error).__name__}: {error}"
    try:
        q.get(timeout=FOR_EVER)
    except queue.Empty:
        return "put() returned normally, and the item is gone"


def r5(mp):
    """Put an item and ask whether the queue is empty, 200 times."""
    wrong = 0
    for _ in range(200):
        q = mp.Queue()
        q.put(1)
        wrong += q.empty()
        q.get()
        q.close()
        q.join_thread()
    return f"empty() was wrong {wrong} times of 200"


ORPHANS = """
import {library} as mp, os, sys, time
sys.path.insert(0, {directory!r})
from before_after import sleep_for_ever
if __name__ == "__main__":
    children = [mp.Process(target=sleep_for_ever, daemon=True) for _ in range(2)]
    for child in children:
        child.start()
    print(*[child.pid for child in children], flush=True)
    time.sleep(600)
"""


def r6(mp):
    """The parent of two daemons is killed."""
    code = ORPHANS.format(library=mp.__name__, directory=os.path.dirname(os.path.abspath(__file__)))
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    pids = [int(word) for word in parent.stdout.readline().split()]
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + FOR_EVER
    while (alive := [pid for pid in pids if runs(pid)]) and time.monotonic() < deadline:
        time.sleep(0.01)
    return f"{len(alive)} of {len(pids)} live on without it"


def r7(mp):
    """A task raises an exception whose class wants two arguments."""
    result = mp.Pool(1).map_async(raise_two_arguments, [1])
    return outcome(lambda: result.get(timeout=FOR_EVER))


def r8(mp):
    """A task calls sys.exit(1)."""
    result = mp.Pool(1).map_async(exit_in_the_task, [1])
    return outcome(lambda: result.get(timeout=FOR_EVER))


def r9(mp):
    """Take the first result of imap() over an endless generator, and wait."""
    taken = 0

    def endless():
        nonlocal taken
        while True:
            taken += 1
            yield taken

    next(mp.Pool(1).imap(identity, endless()))
    time.sleep(1.5)
    return "inputs taken in 1.5 s: " + ("more than a thousand" if taken > 1000 else str(taken))


def r10(mp):
    """A process's function raises."""
    child = mp.Process(target=fail)
    child.start()
    child.join()
    if not hasattr(child, "result"):
        return f"exit code {child.exitcode}, and no exception to be had"
    return outcome(child.result)


# --- the driver


def outcome(call):
    try:
        return f"returns {call()!r}"
    except importlib.import_module("multiprocessing").TimeoutError:
        return "no answer, and no exception"
    except BaseException as error:
        return f"raises {type(error).__name__}: {error}"


def python_c(template, mp):
    code = template.format(library=mp.__name__, for_ever=FOR_EVER)
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return done.stdout.strip()


def runs(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


EXPERIMENTS = {
    "R1": r1,
    "R2": r2,
    "R2-Pool": r2_pool,
    "R3": r3,
    "R4": r4,
    "R5": r5,
    "R6": r6,
    "R7": r7,
    "R8": r8,
    "R9": r9,
    "R10": r10,
}


def run_one(name, library, method):
    """Run one experiment here; nobody waits for what it leaves behind."""
    mp = importlib.import_module(library)
    mp.set_start_method(method or mp.get_all_start_methods()[0])
    print(EXPERIMENTS[name](mp), flush=True)
    os._exit(0)


def run_apart(name, library, method):
    """Run one experiment in a process group and a temporary directory of its own, and end the whole group."""
    command = [sys.executable, os.path.abspath(__file__), library, name, "--here"]
    with tempfile.TemporaryDirectory(prefix="ba", ignore_cleanup_errors=True) as directory:
        child = subprocess.Popen(
            command + (["--start-method", method] if method else []),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "TMPDIR": directory},
            start_new_session=True,
        )
        guard = threading.Timer(6 * FOR_EVER + 10, end_group, (child,))
        guard.start()
        try:
            return child.stdout.readline().strip() or "nothing: it hung, or fell over"
        finally:
            guard.cancel()
            end_group(child)
            child.wait()
            child.stdout.close()


def end_group(leader):
    """SIGTERM first: the standard library's resource tracker ignores it, tidies up and ends when all others have."""
    try:
        os.killpg(leader.pid, signal.SIGTERM)
        deadline = time.monotonic() + 2
        while time.monotonic() < deadline:
            leader.poll()  # a zombie would keep the group in being
            os.killpg(leader.pid, 0)
            time.sleep(0.02)
        os.killpg(leader.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("library", choices=["multiprocessing", "procession"])
    parser.add_argument("experiments", nargs="*", metavar="R1", help=f"of {', '.join(EXPERIMENTS)}; default: all")
    parser.add_argument("--start-method", choices=["fork", "spawn", "forkserver"])
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    for name in args.experiments or EXPERIMENTS:
        if args.here:
            run_one(name, args.library, args.start_method)
        print(f"{name:<8}{EXPERIMENTS[name].__doc__}")
        print(
            textwrap.indent(textwrap.fill(run_apart(name, args.library, args.start_method), 100), " " * 8), flush=True
        )


if __name__ == "__main__":
    main()
