"""Limits that Linux control groups set for this process: CPU time and memory, v1, v2 and hybrid.

A limit binds everything below the group that carries it, so the files are read from the process's own group up to
the top of what is mounted, and the smallest value counts. Which group is ours says ``/proc/self/cgroup``; where its
files are says ``/proc/self/mountinfo``. Reading ``/sys/fs/cgroup/cpu.max`` alone is right only inside a container
with a cgroup namespace; a systemd unit, a batch job and a container without one all sit deeper.

Every function takes the root of the filesystem to read, so that tests can hand in a tree of their own. What cannot be
read or makes no sense does not limit: a strange ``/proc`` must never stop a program from counting its CPUs.

**Source:** Documentation/admin-guide/cgroup-v2.rst, cgroups(7), cgroup_namespaces(7), proc_pid_mountinfo(5).
"""

from __future__ import annotations

import re

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["cpu_quota", "memory_max", "read_text"]

# v1 writes "no memory limit" as LONG_MAX rounded down to a page, about 2**63; nobody has 2**60 bytes (1 EiB).
_UNLIMITED_BYTES = 2**60

# Kernel default of a group's period; used when cpu.max holds only the quota.
_DEFAULT_PERIOD_US = 100_000


def read_text(path: str) -> str:
    """Return the text of a small file, or "" when it cannot be read."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except (OSError, ValueError):  # ValueError: a NUL inside the path
        return ""


def cpu_quota(root: str = "/") -> tuple[float, str] | None:
    """Return the smallest CPU quota that binds this process.

    Returns:
        Number of CPUs (1.5 is "150 ms of CPU time in every 100 ms") and where it was read; None without a quota.
    """
    found: list[tuple[float, str]] = []
    for version, directory in _directories(root, "cpu"):
        if version == 2:
            name = "cpu.max"
            words = read_text(f"{directory}/cpu.max").split()
        else:
            name = "cpu.cfs_quota_us"
            words = [
                *read_text(f"{directory}/{name}").split()[:1],
                *read_text(f"{directory}/cpu.cfs_period_us").split()[:1],
            ]
        quota_us = _positive(words[0]) if words else None
        period_us = _positive(words[1]) if len(words) > 1 else _DEFAULT_PERIOD_US
        if quota_us is not None and period_us is not None:
            where = _shown(root, f"{directory}/{name}")
            found.append((quota_us / period_us, f"{quota_us} µs in every {period_us} µs, {where}"))
    return min(found, key=lambda item: item[0], default=None)


def memory_max(root: str = "/") -> tuple[int, str] | None:
    """Return the smallest hard memory limit that binds this process.

    Returns:
        Bytes and where they were read; None without a limit.
    """
    found: list[tuple[int, str]] = []
    for version, directory in _directories(root, "memory"):
        name = "memory.max" if version == 2 else "memory.limit_in_bytes"
        words = read_text(f"{directory}/{name}").split()
        size_bytes = _positive(words[0]) if words else None
        if size_bytes is not None and size_bytes < _UNLIMITED_BYTES:
            found.append((size_bytes, _shown(root, f"{directory}/{name}")))
    return min(found, key=lambda item: item[0], default=None)


def _positive(word: str) -> int | None:
    """Return a number above 0; None for "max", -1 (v1's "no quota") and nonsense."""
    try:
        number = int(word)
    except ValueError:
        return None
    return number if number > 0 else None


def _shown(root: str, path: str) -> str:
    """Return `path` as this process sees it, without the root a test put before it."""
    return path[len(root.rstrip("/")) :]


def _memberships(root: str) -> dict[str, str]:
    """Map each v1 controller, and "" for v2, to this process's group."""
    groups: dict[str, str] = {}
    for line in read_text(f"{root.rstrip('/')}/proc/self/cgroup").splitlines():
        number, colon, rest = line.partition(":")
        controllers, second_colon, path = rest.partition(":")
        if not (colon and second_colon and path.startswith("/")):
            continue
        if controllers:
            groups.update(dict.fromkeys(controllers.split(","), path))
        elif number == "0":
            groups[""] = path
    return groups


def _mounts(root: str) -> Iterator[tuple[str, list[str], str, str]]:
    """Yield (filesystem type, its options, the directory that is mounted, where) of each mounted group hierarchy."""
    for line in read_text(f"{root.rstrip('/')}/proc/self/mountinfo").splitlines():
        left, dash, right = line.partition(" - ")
        fields, kind = left.split(" "), right.split(" ")
        if dash and len(fields) >= 6 and len(kind) >= 3 and kind[0] in ("cgroup", "cgroup2"):
            yield kind[0], kind[2].split(","), _unescaped(fields[3]), _unescaped(fields[4])


def _unescaped(path: str) -> str:
    """Undo the kernel's escapes: space, tab, newline and backslash are written as octal numbers."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), path)


def _directories(root: str, controller: str) -> Iterator[tuple[int, str]]:
    """Yield (version, directory) of this process's groups that can limit `controller`, innermost first."""
    groups = _memberships(root)
    mounts = list(_mounts(root))
    for version, group in ((1, groups.get(controller)), (2, groups.get(""))):
        if group is None:
            continue
        if version == 1:
            ours = [(top, where) for kind, options, top, where in mounts if kind == "cgroup" and controller in options]
        else:
            ours = [(top, where) for kind, _, top, where in mounts if kind == "cgroup2"]
        # A hierarchy can be mounted more than once, each mount showing another part of it.
        inside = [(where, below) for top, where in ours if (below := _below(group, top)) is not None]
        if not inside and ".." not in group.split("/"):
            # The group lies outside what is mounted (a container that was given only a part): the top of the mount is
            # the nearest to us that can be seen. A group with ".." is outside our cgroup namespace: nothing here is ours.
            inside = [(where, []) for _, where in ours]
        for where, below in inside:
            for depth in range(len(below), -1, -1):
                yield version, "/".join([root.rstrip("/") + where.rstrip("/"), *below[:depth]])


def _below(group: str, top: str) -> list[str] | None:
    """Return the names that lead from the mounted directory `top` to `group`; None if it is not below."""
    top = top.rstrip("/")
    if group != top and not group.startswith(f"{top}/"):
        return None
    names = [name for name in group[len(top) :].split("/") if name]
    return None if ".." in names else names


def oom_kills(root: str = "/") -> int:
    """Return how often the out-of-memory killer has struck in this process's memory cgroup; 0 where nobody counts."""
    for version, directory in _directories(root, "memory"):
        text = read_text(f"{directory}/{'memory.events' if version == 2 else 'memory.oom_control'}")
        for line in text.splitlines():
            name, _, number = line.partition(" ")
            if name == "oom_kill" and number.strip().isdigit():
                return int(number)
    return 0
