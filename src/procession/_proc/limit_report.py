"""What `procession.cpu_limits()` and `procession.memory_limits()` return: every limit, and the one that decides."""

from __future__ import annotations

from dataclasses import dataclass

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["CpuLimits", "Limit", "MemoryLimits", "format_bytes"]


@dataclass(frozen=True)
class Limit:
    """One limit.

    Attributes:
        name: Short name, such as "affinity".
        value: CPUs or bytes; None when it does not limit.
        source: Where the value was read, or why there is none.
    """

    name: str
    value: int | None
    source: str


@dataclass(frozen=True, repr=False)
class CpuLimits:
    """Limits on the number of CPUs.

    Attributes:
        machine: CPUs online.
        affinity: CPUs the scheduler may run this process on.
        cgroup: The control groups' quota, rounded up to whole CPUs.
        python: ``-X cpu_count`` or ``PYTHON_CPU_COUNT``.
        quota: The control groups' quota as it is, in CPUs; None without one.
        physical_cores: Cores behind the CPUs of `affinity`.
    """

    machine: Limit
    affinity: Limit
    cgroup: Limit
    python: Limit
    quota: float | None
    physical_cores: int

    @property
    def candidates(self) -> tuple[Limit, ...]:
        """All limits, the most general first."""
        return (self.machine, self.affinity, self.cgroup, self.python)

    @property
    def decided_by(self) -> Limit:
        """The smallest limit; of equal ones the most general, so "machine" means that nothing restricts."""
        return _smallest(self.candidates)

    @property
    def cpus(self) -> int:
        """The number `cpu_count()` returns."""
        return max(1, self.decided_by.value or 1)

    def __repr__(self) -> str:
        return f"<CpuLimits: {_plural(self.cpus, 'CPU')}, decided by {self.decided_by.name} ({_brief(self.candidates, str)})>"

    def __str__(self) -> str:
        title = f"{_plural(self.cpus, 'CPU')} usable, on {_plural(self.physical_cores, 'physical core')}"
        return _table(title, self.candidates, self.decided_by, str)


@dataclass(frozen=True, repr=False)
class MemoryLimits:
    """Limits on memory, in bytes.

    Attributes:
        machine: Physical memory.
        cgroup: The control groups' hard limit.
        address_space: ``RLIMIT_AS`` of this process.
    """

    machine: Limit
    cgroup: Limit
    address_space: Limit

    @property
    def candidates(self) -> tuple[Limit, ...]:
        """All limits, the most general first."""
        return (self.machine, self.cgroup, self.address_space)

    @property
    def decided_by(self) -> Limit:
        """The smallest limit; of equal ones the most general."""
        return _smallest(self.candidates)

    @property
    def size_bytes(self) -> int | None:
        """The smallest limit in bytes; None if none is known."""
        return self.decided_by.value

    def __repr__(self) -> str:
        return f"<MemoryLimits: {format_bytes(self.size_bytes)}, decided by {self.decided_by.name} ({_brief(self.candidates, format_bytes)})>"

    def __str__(self) -> str:
        return _table(
            f"{format_bytes(self.size_bytes)} of memory usable", self.candidates, self.decided_by, format_bytes
        )


def format_bytes(size: int | None) -> str:
    """Return a size in binary units, such as "3.9 GiB"."""
    if size is None:
        return "-"
    amount = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{amount:.0f} {unit}" if unit == "B" or amount >= 100 else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} TiB"


def _smallest(limits: tuple[Limit, ...]) -> Limit:
    return min(limits, key=lambda limit: float("inf") if limit.value is None else limit.value)


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _brief(limits: tuple[Limit, ...], shown: Callable[[int], str]) -> str:
    return ", ".join(f"{limit.name} {'-' if limit.value is None else shown(limit.value)}" for limit in limits)


def _table(title: str, limits: tuple[Limit, ...], decided_by: Limit, shown: Callable[[int], str]) -> str:
    values = ["-" if limit.value is None else shown(limit.value) for limit in limits]
    wide = max(len(value) for value in values)
    rows = [
        f"  {limit.name:<13} {value:>{wide}}  {limit.source}{'   <- decides' if limit is decided_by else ''}"
        for limit, value in zip(limits, values, strict=True)
    ]
    return "\n".join([title, *rows])
