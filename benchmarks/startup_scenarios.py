"""What `import procession` costs a program that said `import multiprocessing`."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from functools import partial
from typing import TYPE_CHECKING

from harness import OURS, Cost, Scenario, Target

if TYPE_CHECKING:
    from collections.abc import Callable

MP = "multiprocessing"
SUBMODULES = [
    "connection",
    "context",
    "managers",
    "pool",
    "process",
    "queues",
    "shared_memory",
    "sharedctypes",
    "synchronize",
    "util",
]
TIMED = "import time; start = time.perf_counter(); {}; print(time.perf_counter() - start)"


def bare(module: str) -> str:
    """The import alone."""
    return f"import {module}"


def full(module: str) -> str:
    """The import and that of every submodule: nothing lazy is left."""
    return ", ".join([f"import {module}", *(f"{module}.{name}" for name in SUBMODULES)])


def interpreter(code: str) -> tuple[str, float]:
    """Output and wall time of `python -c code`."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    elapsed = time.perf_counter() - start
    if done.returncode:
        message = done.stderr.strip().splitlines()[-1]
        missing = ModuleNotFoundError(message, name=OURS) if "No module named" in message else RuntimeError(message)
        raise missing
    return done.stdout, elapsed


def importing(code: str, count: int) -> Cost:
    """Median time of the import statement itself, in fresh interpreters."""
    runs = [interpreter(TIMED.format(code)) for _ in range(count)]
    return Cost(statistics.median(float(output) for output, _ in runs), sum(wall for _, wall in runs))


def wall(code: str, count: int) -> Cost:
    """Median wall time of a program that only imports, less one that does nothing, run in turn."""
    pairs = [(interpreter(code)[1], interpreter("pass")[1]) for _ in range(count)]
    with_import, without = (statistics.median(column) for column in zip(*pairs, strict=True))
    return Cost(max(with_import - without, 1e-6), sum(map(sum, pairs)))


def scenarios() -> list[Scenario]:
    """The rows about imports."""
    targets = (Target(MP, 1.5, 1, at_most=True),)

    def row(name: str, title: str, how: Callable[[str, int], Cost], code: Callable[[str], str]) -> Scenario:
        measure = {who: partial(how, code(who)) for who in (OURS, MP)}
        return Scenario(name, title, measure, targets, unit="time", start_n=5)

    return [
        row("import", "import (the statement)", importing, bare),
        row("import-submodules", "import with all submodules (the statement)", importing, full),
        row("import-wall", "import (wall time of python -c, less a bare python)", wall, bare),
    ]
