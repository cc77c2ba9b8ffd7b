"""How many CPUs and how much memory: every limit, read from made-up /proc and /sys trees."""

from __future__ import annotations

import dataclasses
import os
import resource
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from procession._proc import cgroups, limits

if TYPE_CHECKING:
    from pathlib import Path

V2_MOUNT = "30 23 0:26 {top} {where} rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
V1_CPU_MOUNT = "32 31 0:29 {top} {where} rw,relatime - cgroup cgroup rw,cpu,cpuacct\n"
V1_MEMORY_MOUNT = "35 31 0:32 {top} {where} rw,relatime - cgroup cgroup rw,memory\n"
MEMINFO = "MemTotal:       16777216 kB\nMemFree:         1000 kB\n"


class Tree:
    """A made-up filesystem root: 8 CPUs, 16 GiB, and whatever files a test adds."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.write("/sys/devices/system/cpu/online", "0-7\n")
        self.write("/proc/meminfo", MEMINFO)

    def __str__(self) -> str:
        return str(self.base)

    def write(self, path: str, text: str | bytes) -> Tree:
        file = self.base / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        return self

    def v2(self, group: str, *, top: str = "/", where: str = "/sys/fs/cgroup") -> Tree:
        self.write("/proc/self/cgroup", f"0::{group}\n")
        return self.write("/proc/self/mountinfo", V2_MOUNT.format(top=top, where=where))

    def v1(self, group: str, *, top: str = "/") -> Tree:
        self.write("/proc/self/cgroup", f"5:memory:{group}\n4:cpuacct,cpu:{group}\n1:name=systemd:/x\n")
        return self.write(
            "/proc/self/mountinfo",
            "23 1 8:1 / / rw - ext4 /dev/root rw\n"
            + V1_CPU_MOUNT.format(top=top, where="/sys/fs/cgroup/cpu,cpuacct")
            + V1_MEMORY_MOUNT.format(top=top, where="/sys/fs/cgroup/memory"),
        )


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(8)))
    monkeypatch.delenv("PYTHON_CPU_COUNT", raising=False)
    monkeypatch.delitem(sys._xoptions, "cpu_count", raising=False)
    monkeypatch.setattr(resource, "getrlimit", lambda _which: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return Tree(tmp_path)


def decision(tree: Tree) -> tuple[int, str]:
    report = limits.cpu_limits(root=str(tree))
    assert limits.cpu_count(root=str(tree)) == report.cpus
    return report.cpus, report.decided_by.name


def test_the_real_machine_has_at_least_one_cpu() -> None:
    assert type(limits.cpu_count()) is int
    assert limits.cpu_count() >= limits.cpu_count(logical=False) >= 1
    assert limits.memory_limit() > 2**20


def test_without_limits_the_machine_decides(tree: Tree) -> None:
    assert decision(tree) == (8, "machine")


def test_affinity_counts(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {1, 5, 6})
    assert decision(tree) == (3, "affinity")


def test_real_affinity_of_a_child_counts() -> None:
    """Against the kernel, not a fake: the child restricts itself to one CPU."""
    code = "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]); from procession._proc.limits import *; print(repr(cpu_limits()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "1 CPU," in done.stdout


@pytest.mark.parametrize("error", [OSError("no"), AttributeError("no")])
def test_no_affinity_falls_back_to_the_machine(tree: Tree, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fails(_pid: int) -> set[int]:
        raise error

    monkeypatch.setattr(os, "sched_getaffinity", fails)
    assert decision(tree) == (8, "machine")
    assert limits.cpu_count(logical=False, root=str(tree)) == 8


# --- cgroup v2


@pytest.mark.parametrize(
    ("text", "cpus"),
    [
        ("200000 100000", 2),
        ("150000 100000", 2),  # 1.5 CPUs: rounded up
        ("100001 100000", 2),
        ("10000 100000", 1),  # a tenth of a CPU: still one
        ("50000 25000", 2),
        ("300000", 3),  # the period left out is the kernel's default
        ("1600000 100000", 8),  # more than there is does not add CPUs
        ("max 100000", 8),
        ("max", 8),
    ],
)
def test_v2_quota_is_rounded_up_and_never_below_one(tree: Tree, text: str, cpus: int) -> None:
    tree.v2("/app").write("/sys/fs/cgroup/app/cpu.max", text + "\n")
    assert decision(tree)[0] == cpus


def test_v2_smallest_quota_on_the_way_up_counts(tree: Tree) -> None:
    """A limit on the slice binds the service in it; reading only the own group, or only the top, misses it."""
    tree.v2("/system.slice/batch.slice/job.service")
    tree.write("/sys/fs/cgroup/system.slice/batch.slice/job.service/cpu.max", "max 100000\n")
    tree.write("/sys/fs/cgroup/system.slice/batch.slice/cpu.max", "300000 100000\n")
    tree.write("/sys/fs/cgroup/system.slice/cpu.max", "700000 100000\n")
    report = limits.cpu_limits(root=str(tree))
    assert report.cpus == 3
    assert report.cgroup.source == "300000 µs in every 100000 µs, /sys/fs/cgroup/system.slice/batch.slice/cpu.max"


def test_v2_own_quota_counts_when_it_is_the_smallest(tree: Tree) -> None:
    tree.v2("/a/b").write("/sys/fs/cgroup/a/b/cpu.max", "100000 100000").write(
        "/sys/fs/cgroup/a/cpu.max", "400000 100000"
    )
    assert decision(tree) == (1, "cgroup")


def test_v2_a_neighbours_quota_does_not_count(tree: Tree) -> None:
    tree.v2("/a").write("/sys/fs/cgroup/ab/cpu.max", "100000 100000").write(
        "/sys/fs/cgroup/a/c/cpu.max", "100000 100000"
    )
    assert decision(tree) == (8, "machine")


def test_docker_with_a_cgroup_namespace(tree: Tree) -> None:
    """The group reads "/", and the top of the mount is the container's own group with its limits."""
    tree.v2("/").write("/sys/fs/cgroup/cpu.max", "250000 100000").write("/sys/fs/cgroup/memory.max", "1073741824")
    assert decision(tree) == (3, "cgroup")
    assert limits.memory_limit(root=str(tree)) == 2**30


def test_docker_without_a_cgroup_namespace(tree: Tree) -> None:
    """The mount shows only the container's part of the tree, whose name on the host the group still carries."""
    tree.v2("/docker/abc/inner", top="/docker/abc")
    tree.write("/sys/fs/cgroup/cpu.max", "200000 100000").write("/sys/fs/cgroup/inner/cpu.max", "max 100000")
    assert decision(tree) == (2, "cgroup")


def test_group_outside_the_mounted_part_uses_the_top_of_the_mount(tree: Tree) -> None:
    tree.v2("/elsewhere/x", top="/docker/abc").write("/sys/fs/cgroup/cpu.max", "200000 100000")
    assert decision(tree) == (2, "cgroup")


def test_group_outside_the_cgroup_namespace_is_not_bound_by_what_is_seen(tree: Tree) -> None:
    """After nsenter into a container without joining its group, the limits in sight are somebody else's."""
    tree.v2("/../../user.slice").write("/sys/fs/cgroup/cpu.max", "200000 100000")
    assert decision(tree) == (8, "machine")


def test_mount_from_above_the_cgroup_namespace(tree: Tree) -> None:
    tree.v2("/", top="/..").write("/sys/fs/cgroup/cpu.max", "200000 100000")
    assert decision(tree) == (2, "cgroup")


def test_hierarchy_mounted_twice(tree: Tree) -> None:
    tree.write("/proc/self/cgroup", "0::/a/b\n")
    tree.write(
        "/proc/self/mountinfo",
        V2_MOUNT.format(top="/a/b", where="/mnt/part") + V2_MOUNT.format(top="/", where="/sys/fs/cgroup"),
    )
    tree.write("/mnt/part/cpu.max", "500000 100000").write("/sys/fs/cgroup/a/cpu.max", "200000 100000")
    assert decision(tree) == (2, "cgroup")


def test_mount_point_with_a_space(tree: Tree) -> None:
    tree.v2("/a", where="/my\\040groups").write("/my groups/a/cpu.max", "200000 100000")
    assert decision(tree) == (2, "cgroup")


def test_removed_group_still_obeys_its_parents(tree: Tree) -> None:
    tree.v2("/a/gone (deleted)").write("/sys/fs/cgroup/a/cpu.max", "200000 100000")
    assert decision(tree) == (2, "cgroup")


# --- cgroup v1 and hybrid


@pytest.mark.parametrize(
    ("quota", "period", "cpus"),
    [("-1", "100000", 8), ("250000", "100000", 3), ("5000", "100000", 1), ("0", "100000", 8)],
)
def test_v1_quota(tree: Tree, quota: str, period: str, cpus: int) -> None:
    tree.v1("/app")
    tree.write("/sys/fs/cgroup/cpu,cpuacct/app/cpu.cfs_quota_us", quota)
    tree.write("/sys/fs/cgroup/cpu,cpuacct/app/cpu.cfs_period_us", period)
    assert decision(tree)[0] == cpus


def test_v1_smallest_quota_on_the_way_up_counts(tree: Tree) -> None:
    """Kubernetes: the pod's group limits the container's."""
    tree.v1("/kubepods/pod1/c1")
    for group, quota in (("kubepods", "-1"), ("kubepods/pod1", "200000"), ("kubepods/pod1/c1", "400000")):
        tree.write(f"/sys/fs/cgroup/cpu,cpuacct/{group}/cpu.cfs_quota_us", quota)
        tree.write(f"/sys/fs/cgroup/cpu,cpuacct/{group}/cpu.cfs_period_us", "100000")
    assert decision(tree) == (2, "cgroup")


def test_v1_docker(tree: Tree) -> None:
    tree.v1("/docker/abc", top="/docker/abc")
    tree.write("/sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us", "150000").write(
        "/sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us", "100000"
    )
    tree.write("/sys/fs/cgroup/memory/memory.limit_in_bytes", "536870912")
    assert decision(tree) == (2, "cgroup")
    assert limits.cpu_limits(root=str(tree)).quota == 1.5
    assert limits.memory_limit(root=str(tree)) == 512 * 2**20


def test_hybrid_reads_the_controller_where_it_is(tree: Tree) -> None:
    """The hybrid layout of systemd: controllers in v1, an empty v2 tree beside them."""
    tree.write("/proc/self/cgroup", "4:memory:/job\n1:cpu:/job\n0::/\n")
    tree.write(
        "/proc/self/mountinfo",
        V1_CPU_MOUNT.format(top="/", where="/sys/fs/cgroup/cpu")
        + V1_MEMORY_MOUNT.format(top="/", where="/sys/fs/cgroup/memory")
        + V2_MOUNT.format(top="/", where="/sys/fs/cgroup/unified"),
    )
    tree.write("/sys/fs/cgroup/cpu/job/cpu.cfs_quota_us", "300000").write(
        "/sys/fs/cgroup/cpu/job/cpu.cfs_period_us", "100000"
    )
    tree.write("/sys/fs/cgroup/memory/job/memory.limit_in_bytes", "1048576")
    assert decision(tree) == (3, "cgroup")
    assert limits.memory_limit(root=str(tree)) == 2**20


# --- what is missing or makes no sense


@pytest.mark.parametrize(
    "junk", ["", "\n", "max max", "-5 100000", "100000 0", "x y z", "1e5 100000", "99 -1", b"\xff\xfe\x00"]
)
def test_nonsense_in_cpu_max_does_not_limit(tree: Tree, junk: str | bytes) -> None:
    tree.v2("/a").write("/sys/fs/cgroup/a/cpu.max", junk)
    assert decision(tree) == (8, "machine")


@pytest.mark.parametrize(
    "junk", ["", "0", "0::", "::", "0:cpu", "0::relative", "x" * 5000, b"0::/\x00a\n", b"\xff\n0::/\xff"]
)
def test_nonsense_in_proc_self_cgroup_does_not_limit(tree: Tree, junk: str | bytes) -> None:
    tree.v2("/").write("/proc/self/cgroup", junk)
    assert decision(tree) == (8, "machine")


@pytest.mark.parametrize(
    "junk", ["", " - ", "1 2 3 - cgroup2", "a b c / /m rw - cgroup2", " - cgroup2 cgroup2 rw", b"\xff - \xff"]
)
def test_nonsense_in_mountinfo_does_not_limit(tree: Tree, junk: str | bytes) -> None:
    tree.v2("/").write("/sys/fs/cgroup/cpu.max", "100000 100000").write("/proc/self/mountinfo", junk)
    assert decision(tree) == (8, "machine")


@pytest.mark.parametrize("junk", ["", "-", "a-b", "7-0", ",", b"\xff"])
def test_nonsense_in_the_list_of_cpus_falls_back_to_sysconf(
    tree: Tree, monkeypatch: pytest.MonkeyPatch, junk: str | bytes
) -> None:
    monkeypatch.setattr(os, "sysconf", lambda _name: 4)
    tree.write("/sys/devices/system/cpu/online", junk)
    assert decision(tree) == (4, "machine")


def test_nothing_at_all_still_counts_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_arguments: object) -> int:
        raise OSError

    monkeypatch.setattr(os, "sched_getaffinity", fails)
    monkeypatch.setattr(os, "sysconf", fails)
    monkeypatch.setattr(resource, "getrlimit", fails)
    monkeypatch.delenv("PYTHON_CPU_COUNT", raising=False)
    monkeypatch.delitem(sys._xoptions, "cpu_count", raising=False)
    assert limits.cpu_count(root=str(tmp_path)) == 1
    assert limits.cpu_count(logical=False, root=str(tmp_path)) == 1
    assert limits.cpu_limits(root=str(tmp_path)).cpus == 1
    assert limits.memory_limit(root=str(tmp_path)) == sys.maxsize
    assert "None" not in str(limits.memory_limits(root=str(tmp_path)))


def test_unreadable_file_does_not_limit(tree: Tree) -> None:
    tree.v2("/a")
    (tree.base / "sys/fs/cgroup/a/cpu.max").mkdir(parents=True)  # reading it gives EISDIR
    assert decision(tree) == (8, "machine")
    assert cgroups.read_text("/with\0nul") == ""


# --- PYTHON_CPU_COUNT and -X cpu_count


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("3", (3, "python")),
        ("100", (8, "machine")),
        ("default", (8, "machine")),
        ("0", (8, "machine")),
        ("-2", (8, "machine")),
        ("many", (8, "machine")),
    ],
)
def test_environment_lowers_and_never_raises(
    tree: Tree, monkeypatch: pytest.MonkeyPatch, word: str, expected: tuple[int, str]
) -> None:
    monkeypatch.setenv("PYTHON_CPU_COUNT", word)
    assert decision(tree) == expected


@pytest.mark.parametrize(("option", "cpus"), [("2", 2), ("default", 8), (True, 8)])
def test_x_option_goes_before_the_environment(
    tree: Tree, monkeypatch: pytest.MonkeyPatch, option: object, cpus: int
) -> None:
    monkeypatch.setenv("PYTHON_CPU_COUNT", "5")
    monkeypatch.setitem(sys._xoptions, "cpu_count", option)
    assert decision(tree)[0] == cpus


@pytest.mark.parametrize("arguments", [["-X", "cpu_count=1"], []], ids=["option", "environment"])
def test_real_interpreter_honours_both_on_every_version(arguments: list[str]) -> None:
    code = "from procession._proc.limits import cpu_count; print(cpu_count())"
    environment = {**os.environ, "PYTHON_CPU_COUNT": "1"}
    done = subprocess.run(
        [sys.executable, *arguments, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout == "1\n"


def test_machine_is_not_what_python_was_told(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    """Since 3.13 os.cpu_count() repeats the option; the report must still say what the machine has."""
    monkeypatch.setenv("PYTHON_CPU_COUNT", "3")
    assert limits.cpu_limits(root=str(tree)).machine.value == 8


# --- physical cores


@pytest.mark.parametrize("name", ["core_cpus_list", "thread_siblings_list"])
def test_hyper_threads_of_a_core_count_once(tree: Tree, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for cpu in range(8):
        tree.write(f"/sys/devices/system/cpu/cpu{cpu}/topology/{name}", f"{cpu % 4},{cpu % 4 + 4}\n")
    assert limits.cpu_count(logical=False, root=str(tree)) == 4
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {0, 4, 5})
    assert limits.cpu_count(logical=False, root=str(tree)) == 2
    assert limits.cpu_count(root=str(tree)) == 3


def test_without_topology_every_cpu_is_a_core(tree: Tree) -> None:
    assert limits.cpu_count(logical=False, root=str(tree)) == 8


def test_quota_binds_physical_cores_too(tree: Tree) -> None:
    tree.v2("/").write("/sys/fs/cgroup/cpu.max", "150000 100000")
    assert limits.cpu_count(logical=False, root=str(tree)) == 2


# --- memory


def test_memory_smallest_on_the_way_up_counts(tree: Tree) -> None:
    tree.v2("/a/b").write("/sys/fs/cgroup/a/b/memory.max", "max").write("/sys/fs/cgroup/a/memory.max", "4294967296")
    report = limits.memory_limits(root=str(tree))
    assert (report.size_bytes, report.decided_by.name) == (4 * 2**30, "cgroup")
    assert report.cgroup.source == "/sys/fs/cgroup/a/memory.max"


@pytest.mark.parametrize("text", ["9223372036854771712", "max", "-1", "", "junk"])
def test_memory_without_a_limit_is_the_machines(tree: Tree, text: str) -> None:
    tree.v1("/a").write("/sys/fs/cgroup/memory/a/memory.limit_in_bytes", text)
    report = limits.memory_limits(root=str(tree))
    assert (report.size_bytes, report.decided_by.name) == (16 * 2**30, "machine")


def test_memory_limit_of_the_address_space(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _which: (2**28, 2**29))
    report = limits.memory_limits(root=str(tree))
    assert (report.size_bytes, report.decided_by.name) == (2**28, "address space")


# --- the reports


def test_report_shows_every_limit_and_the_deciding_one(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHON_CPU_COUNT", "6")
    tree.v2("/app").write("/sys/fs/cgroup/app/cpu.max", "150000 100000")
    report = limits.cpu_limits(root=str(tree))
    assert repr(report) == "<CpuLimits: 2 CPUs, decided by cgroup (machine 8, affinity 8, cgroup 2, python 6)>"
    lines = str(report).splitlines()
    assert lines[0] == "2 CPUs usable, on 8 physical cores"
    assert [line.split()[0] for line in lines[1:]] == ["machine", "affinity", "cgroup", "python"]
    assert [line for line in lines if line.endswith("<- decides")] == [lines[3]]


def test_reports_are_frozen(tree: Tree) -> None:
    report = limits.cpu_limits(root=str(tree))
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.quota = 3  # type: ignore[misc]
    assert "15" not in repr(report)
    assert (
        repr(limits.memory_limits(root=str(tree)))
        == "<MemoryLimits: 16.0 GiB, decided by machine (machine 16.0 GiB, cgroup -, address space -)>"
    )


def test_counting_does_not_import_dataclasses() -> None:
    """Importing dataclasses brings inspect, which costs more than all of limits; a program that only counts must not pay."""
    code = (
        "import sys; before = set(sys.modules); from procession._proc.limits import cpu_count; cpu_count(); "
        "print(sorted((set(sys.modules) - before) & {'dataclasses', 'inspect', 'typing', 'pathlib'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
