"""How many CPUs and how much memory this process can really use, and which limit decides.

`cpu_count()` is the smallest of

========  ==============================================================================================
machine   CPUs that are online
affinity  CPUs the scheduler may run this process on (``taskset``, cpusets, ``docker run --cpuset-cpus``)
cgroup    CPU time the control groups allow (``docker run --cpus``, Kubernetes limits, systemd's CPUQuota)
python    ``-X cpu_count=N`` or ``PYTHON_CPU_COUNT=N``, on every version and not only since Python 3.13
========  ==============================================================================================

Two decisions. A quota of part of a CPU counts as a whole one (1.5 CPUs are 2, 0.2 CPUs are 1): with one worker fewer
the quota could not be used up, and throttling keeps the group within it anyway. And ``PYTHON_CPU_COUNT`` can lower
the number but not raise it above what the kernel grants (in CPython it replaces the number): whoever wants more
workers than CPUs says so where the workers are made, as in ``Pool(16)``.

`memory_limit()` is the smallest of physical memory, the control groups' limits and ``RLIMIT_AS``.

Nothing is cached: an orchestrator may change a quota while the program runs. One call costs about 0.1 ms.
"""

from __future__ import annotations

import os
import resource
import sys

from procession._proc.cgroups import cpu_quota, memory_max, read_text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from procession._proc.limit_report import CpuLimits, MemoryLimits

__all__ = ["cpu_count", "cpu_limits", "memory_limit", "memory_limits"]

#: (name, number or None for "does not limit", where it comes from)
Candidate = tuple[str, "int | None", str]


def cpu_count(logical: bool = True, *, root: str = "/") -> int:
    """Return the number of CPUs this process can use at the same time; at least 1, never an exception.

    Args:
        logical: False counts physical cores: hyper-threads of one core are one. The other limits hold as well.
        root: Where ``proc`` and ``sys`` are read; for tests.

    Example:
        >>> cpu_count() >= cpu_count(logical=False) >= 1
        True
    """
    counts = [count for _, count, _ in cpu_candidates(root) if count is not None]
    if not logical:
        counts.append(physical_cores(root))
    return max(1, min(counts, default=1))


def cpu_limits(*, root: str = "/") -> CpuLimits:
    """Return every limit on the number of CPUs and which one decides.

    Example:
        >>> limits = cpu_limits()
        >>> limits.cpus == cpu_count()
        True
        >>> limits.decided_by.name in ("machine", "affinity", "cgroup", "python")
        True
    """
    # In the function: dataclasses costs 10 ms to import, and most programs only ask for the number.
    from procession._proc.limit_report import CpuLimits, Limit

    machine, affinity, cgroup, python = (Limit(*candidate) for candidate in cpu_candidates(root))
    quota = cpu_quota(root)
    return CpuLimits(machine, affinity, cgroup, python, quota[0] if quota else None, physical_cores(root))


def memory_limit(*, root: str = "/") -> int:
    """Return how many bytes this process and its children can hold at most; `sys.maxsize` if nothing is known."""
    sizes = [size for _, size, _ in memory_candidates(root) if size is not None]
    return min(sizes, default=sys.maxsize)


def memory_limits(*, root: str = "/") -> MemoryLimits:
    """Return every limit on memory and which one decides."""
    from procession._proc.limit_report import Limit, MemoryLimits  # as in cpu_limits

    return MemoryLimits(*(Limit(*candidate) for candidate in memory_candidates(root)))


def cpu_candidates(root: str = "/") -> tuple[Candidate, Candidate, Candidate, Candidate]:
    """Return the limits named machine, affinity, cgroup and python."""
    quota = cpu_quota(root)
    return (
        ("machine", _online(root), "CPUs online"),
        ("affinity", len(_affinity()) or None, "sched_getaffinity()" if _affinity() else "not known"),
        # -(-x // 1) rounds up without importing math.
        ("cgroup", max(1, int(-(-quota[0] // 1))), quota[1]) if quota else ("cgroup", None, "no quota"),
        ("python", *_requested()),
    )


def memory_candidates(root: str = "/") -> tuple[Candidate, Candidate, Candidate]:
    """Return the limits named machine, cgroup and address space."""
    group = memory_max(root)
    try:
        soft = resource.getrlimit(resource.RLIMIT_AS)[0]
    except (OSError, ValueError):
        soft = resource.RLIM_INFINITY
    return (
        ("machine", _physical_bytes(root), "physical memory"),
        ("cgroup", group[0], group[1]) if group else ("cgroup", None, "no limit"),
        ("address space", None, "no limit")
        if soft == resource.RLIM_INFINITY
        else ("address space", soft, "RLIMIT_AS (ulimit -v)"),
    )


def physical_cores(root: str = "/") -> int:
    """Return how many cores the CPUs of this process's affinity belong to."""
    base = f"{root.rstrip('/')}/sys/devices/system/cpu"
    cores = set()
    for cpu in _affinity() or range(_online(root) or 1):
        topology = f"{base}/cpu{cpu}/topology"
        # The list of CPUs that share a core names the core; its older name is for kernels before 5.3.
        siblings = read_text(f"{topology}/core_cpus_list") or read_text(f"{topology}/thread_siblings_list")
        cores.add(siblings.strip() or f"cpu{cpu}")
    return max(1, len(cores))


def _affinity() -> set[int]:
    try:
        return os.sched_getaffinity(0)
    except (OSError, AttributeError):
        return set()


def _online(root: str) -> int | None:
    """Return the number of CPUs online. Not os.cpu_count(): since Python 3.13 that is what -X cpu_count says."""
    count = _count_ranges(read_text(f"{root.rstrip('/')}/sys/devices/system/cpu/online"))
    if count:
        return count
    try:
        return max(1, os.sysconf("SC_NPROCESSORS_ONLN"))
    except (OSError, ValueError):
        return None


def _count_ranges(text: str) -> int:
    """Count the numbers in a kernel list such as "0-3,8"; 0 for nonsense."""
    count = 0
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        try:
            count += int(last or first) - int(first) + 1
        except ValueError:
            return 0
    return max(0, count)


def _requested() -> tuple[int | None, str]:
    """Return what ``-X cpu_count`` asks for, else ``PYTHON_CPU_COUNT``; "default" asks for nothing."""
    if "cpu_count" in sys._xoptions:
        word, source = str(sys._xoptions["cpu_count"]), "-X cpu_count"
    elif "PYTHON_CPU_COUNT" in os.environ and not sys.flags.ignore_environment:
        word, source = os.environ["PYTHON_CPU_COUNT"], "PYTHON_CPU_COUNT"
    else:
        return None, "PYTHON_CPU_COUNT is not set"
    try:
        count = int(word)
    except ValueError:
        count = 0
    if count >= 1:
        return count, source
    return None, f"{source}={word} asks for nothing"


def _physical_bytes(root: str) -> int | None:
    for line in read_text(f"{root.rstrip('/')}/proc/meminfo").splitlines():
        name, _, rest = line.partition(":")
        words = rest.split()
        if name == "MemTotal" and words and words[0].isdecimal():
            return int(words[0]) * 1024
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return None
