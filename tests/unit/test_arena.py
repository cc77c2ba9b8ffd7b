"""The arena: its limits are errors with numbers, never a crash and never a loss."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import procession
from procession import ArenaFullError


def run(code, *, env=None, limits=(), prefix=()):
    """Run a program of its own, under limits (name, value) of its own."""

    def set_limits():
        for name, value in limits:
            resource.setrlimit(name, (value, value))

    return subprocess.run(
        [*prefix, sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **(env or {})},
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
        preexec_fn=set_limits if limits else None,
    )


def output_of(code, **options):
    done = run(code, **options)
    assert 0 == done.returncode, done.stderr
    return done.stdout.split()


FILL = """
import procession
from procession import ArenaFullError
q = procession.{kind}()
size = {size}
n = 0
errors = 0
try:
    while True:
        q.put(b"x" * size)
        n += 1
except ArenaFullError as error:
    errors += 1
    text = str(error)
assert isinstance(error if False else ArenaFullError(), MemoryError)
assert str(1 << 20) in text, text
assert "PROCESSION_ARENA_SIZE" in text, text
try:
    q.put(b"x" * size)
except MemoryError:
    errors += 1
assert q.qsize() == n, (q.qsize(), n)
for _ in range(n):
    assert q.get() == b"x" * size
    if hasattr(q, "task_done"):
        q.task_done()
assert q.empty()
for _ in range(5):
    q.put(b"y" * size)
    assert q.get() == b"y" * size
print(n > 0, errors)
"""


@pytest.mark.parametrize("kind", ["Queue", "JoinableQueue", "SimpleQueue"])
@pytest.mark.parametrize("size", [1, 100, 2_000, 20_000])
def test_a_full_arena_is_one_error_with_the_numbers_and_loses_nothing(kind, size):
    """And the queue goes on afterwards: what fills it can always be taken out."""
    assert ["True", "2"] == output_of(FILL.format(kind=kind, size=size), env={"PROCESSION_ARENA_SIZE": "1M"})


def test_an_item_larger_than_the_arena_is_refused_and_the_rest_goes_on():
    code = """
        import procession
        q = procession.Queue()
        q.put(1)
        try:
            q.put(b"x" * (2 << 20))
        except procession.ArenaFullError as error:
            print(f"{2 << 20}" in str(error))
        q.put(2)
        print(q.get(), q.get(), q.empty())
    """
    assert ["True", "1", "2", "True"] == output_of(code, env={"PROCESSION_ARENA_SIZE": "1M"})


def test_put_many_into_a_full_arena_says_how_many_were_put():
    code = """
        import procession
        q = procession.Queue()
        try:
            q.put_many([b"x" * 1000] * 5000)
        except procession.ArenaFullError as error:
            print(error.items_put == q.qsize() > 0)
    """
    assert ["True"] == output_of(code, env={"PROCESSION_ARENA_SIZE": "1M"})


def test_too_many_objects_are_one_error_and_can_be_freed_again():
    code = """
        import procession
        things = []
        try:
            while True:
                things.append(procession.Lock())
        except procession.ArenaFullError:
            pass
        n = len(things)
        print(n > 100)
        things[0].acquire()
        things[0].release()
        things.clear()
        things = [procession.Lock() for _ in range(n)]
        print(len(things) == n)
    """
    assert ["True", "True"] == output_of(code, env={"PROCESSION_ARENA_SIZE": "1M"})


def test_what_others_left_is_taken_back_before_the_arena_is_called_full():
    """A killed child's memory is free memory, once somebody looks."""
    code = """
        import os, signal, procession
        ctx = procession.get_context("fork")
        def hog():
            q = procession.Queue()
            q.put(b"x" * 200_000)
            os.kill(os.getpid(), signal.SIGKILL)
        for _ in range(20):
            pid = os.fork()
            if pid == 0:
                hog()
            os.waitpid(pid, 0)
        q = procession.Queue()
        q.put(b"x" * 200_000)
        print(len(q.get()))
    """
    assert ["200000"] == output_of(code, env={"PROCESSION_ARENA_SIZE": "1M"})


@pytest.mark.parametrize("size", ["", "0", "-1", "abc", "1X", "1e400"])
def test_a_size_that_is_none_is_named_in_the_error(size):
    done = run("import procession; procession.Lock()", env={"PROCESSION_ARENA_SIZE": size})
    if not size:
        assert 0 == done.returncode, done.stderr
    else:
        assert 1 == done.returncode
        assert "PROCESSION_ARENA_SIZE" in done.stderr
        assert "ValueError" in done.stderr


USE = """
import procession
q, lock = procession.Queue(), procession.Lock()
with lock:
    q.put(b"x" * 1000)
print(len(q.get()))
"""


@pytest.mark.parametrize("limit", [400 << 20, 1 << 30, 8 << 30])
def test_it_takes_less_address_space_under_ulimit_v(limit):
    """The reservation is 64 GiB of nothing; where that is forbidden, less must do (pitfall 26)."""
    assert ["1000"] == output_of(USE, limits=[(resource.RLIMIT_AS, limit)])


@pytest.mark.parametrize("limit", [4 << 20, 1 << 30])
def test_it_takes_a_smaller_file_under_ulimit_f(limit):
    assert ["1000"] == output_of(USE, limits=[(resource.RLIMIT_FSIZE, limit)])


def test_a_ulimit_f_too_small_for_anything_is_one_clear_error():
    done = run(USE, limits=[(resource.RLIMIT_FSIZE, 100_000)])
    assert 1 == done.returncode
    assert "ulimit -f" in done.stderr


def test_no_more_descriptors_is_one_clear_error_and_can_be_mended():
    code = """
        import os, resource, procession
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        from procession import _settings
        from procession._proc import limits
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
        fds = []
        try:
            while True:
                fds.append(os.open("/dev/null", os.O_RDONLY))
        except OSError:
            pass
        try:
            procession.Lock()
        except OSError as error:
            print("descriptor" if error.errno == 24 else error)
        for fd in fds:
            os.close(fd)
        print(procession.Lock().acquire())
    """
    assert ["descriptor", "True"] == output_of(code)


def test_objects_need_no_descriptor_each():
    """One memfd for all, where the standard library takes two descriptors a queue."""
    code = """
        import os, procession
        procession.Lock()
        before = len(os.listdir("/proc/self/fd"))
        things = [procession.Queue() for _ in range(500)] + [procession.Lock() for _ in range(500)]
        for q in things[:500]:
            q.put(1)
        print(len(os.listdir("/proc/self/fd")) - before)
    """
    assert ["0"] == output_of(code, limits=[(resource.RLIMIT_NOFILE, 64)])


def test_operations_go_on_without_a_single_descriptor_left():
    """Recovery of a dead holder's lock reads /proc: where it cannot, a dead one counts as alive until it can."""
    code = """
        import os, resource, warnings, procession
        warnings.simplefilter("ignore")
        ctx = procession.get_context("fork")
        q, lock = procession.Queue(), procession.Lock()
        child = ctx.Process(target=lambda: (lock.acquire(), os._exit(1)))
        child.start(); child.join()
        resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
        fds = []
        try:
            while True:
                fds.append(os.open("/dev/null", os.O_RDONLY))
        except OSError:
            pass
        q.put(b"x" * 100_000)
        print(len(q.get()), lock.acquire(True, 60))
    """
    assert ["100000", "True"] == output_of(code)


def _can_mount():
    return (
        shutil.which("unshare")
        and 0 == subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode
    )


@pytest.mark.parametrize("options", ["ro", "size=4k"])
def test_dev_shm_is_not_needed(options):
    """Read-only or of one page, as in small containers: every lock of the standard library fails there."""
    if not _can_mount():
        pytest.skip("no permission to make a mount namespace (unshare -m)")
    prefix = ["unshare", "-m", "sh", "-c", f'mount -t tmpfs -o {options} tmpfs /dev/shm && exec "$@"', "sh"]
    assert ["1000"] == output_of(USE, prefix=prefix)


def test_memory_tells_what_is_there():
    memory = procession.memory()
    q = procession.Queue()
    after = procession.memory()
    assert (1, True) == (after.objects - memory.objects, after.used > memory.used)
    assert after.limit <= after.reserved
    assert after.free == after.limit - after.used
    del q


def test_the_error_is_a_memory_error():
    """A drop-in program may already catch that."""
    assert issubclass(ArenaFullError, MemoryError)


def test_nobody_can_cut_the_arena_short():
    """A truncated file would be SIGBUS in every process of the family (pitfall 17)."""
    procession.Lock()
    fd = procession._native.arena_fd()
    with pytest.raises(PermissionError):
        os.ftruncate(fd, 4096)


def test_attach_refuses_what_is_no_arena(tmp_path):
    """And one error, not a crash: descriptors get mixed up."""
    with (tmp_path / "file").open("wb+") as file:
        file.truncate(1 << 20)
        fd = os.dup(file.fileno())
        with pytest.raises(ValueError, match="not an arena"):
            procession._native.attach(fd)
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.close(fd)  # it was taken, and closed
    own = os.dup(procession._native.arena_fd())
    procession._native.attach(own)  # once more, which changes nothing
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.close(own)


def test_a_holder_whose_fate_cannot_be_learned_counts_as_alive():
    """No descriptor to read /proc with, as under a sandbox that hides it: robbing the living is worse than waiting."""
    code = """
        import os, resource, procession
        ctx = procession.get_context("fork")
        lock, held, go = procession.Lock(), procession.Event(), procession.Event()
        child = ctx.Process(target=lambda: (lock.acquire(), held.set(), go.wait(), lock.release()))
        child.start()
        held.wait()
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (40, hard))
        fds = []
        try:
            while True:
                fds.append(os.open("/dev/null", os.O_RDONLY))
        except OSError:
            pass
        print(lock.acquire(True, 0.3))
        go.set()
        print(lock.acquire(True, 60))
        for fd in fds:
            os.close(fd)
        child.join()
    """
    assert ["False", "True"] == output_of(code)


def test_no_thread_is_started_behind_the_programs_back():
    """Python 3.12 and later count the threads of the system before a fork, and warn."""
    code = """
        import os, procession
        ctx = procession.get_context("fork")
        q, lock, event = ctx.Queue(), ctx.Lock(), ctx.Event()
        q.put(b"x" * 1_000_000)
        q.get()
        event.wait(0.05)
        lock.acquire()
        q._reader.poll(0.05)
        print(len(os.listdir("/proc/self/task")))
    """
    assert ["1"] == output_of(code)


def test_the_arena_is_left_out_of_core_files():
    """Its 64 GiB of address space would be written out, page by page (pitfall 17)."""
    procession.Lock()
    flags = [
        line.split()[1:]
        for part in Path("/proc/self/smaps").read_text().split("/memfd:procession")[1:]
        for line in part.splitlines()
        if line.startswith("VmFlags:")
    ]
    assert "dd" in flags[0]


def test_a_process_tells_what_became_of_it_though_the_arena_is_full():
    code = """
        import procession

        def work(full, what):
            full.wait(60)
            if what:
                return "x" * what
            def deep(depth):
                if depth == 0:
                    raise ValueError("deep")
                deep(depth - 1)
            deep(100)

        ctx = procession.get_context("fork")
        full, q = ctx.Event(), ctx.Queue()
        processes = [ctx.Process(target=work, args=(full, what)) for what in (10, 3000, 0)]
        for process in processes:
            process.start()
        for size in (100_000, 10_000, 1000, 100):
            try:
                while True:
                    q.put(b"x" * size)
            except MemoryError:
                pass
        full.set()
        small, large, error = [process.exception(60) for process in processes]
        print(small, type(large).__name__, "does not fit into the arena" in str(large))
        print(type(error).__name__, error.type_name, "deep (its traceback did not fit" in str(error))
        for process in processes:
            process.join()
    """
    done = run(code, env={"PROCESSION_ARENA_SIZE": "1M"})
    expected = "None RemoteError True\nRemoteError ValueError True\n"
    assert expected == done.stdout
