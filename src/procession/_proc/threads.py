"""Each worker's share of the CPUs, and how many threads BLAS, OpenMP and the like may use of it.

A library that computes with threads makes one for each CPU when it is loaded; in four workers on four CPUs those are sixteen, which
get in each other's way. So a pool gives each worker its share, `max(1, cpus // workers)`, before the worker imports anything of the
user's: by the variables that such libraries read when they are loaded, and by `threadpoolctl`, where that is installed, for those
that a forked worker has loaded already. A pool within a worker shares out that worker's share.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys

from procession._proc.limits import cpu_count

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = ["VARIABLES", "find_loaded", "limit_threads", "threads_for", "within_share"]

#: As in joblib and dask.
VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "NUMBA_NUM_THREADS",
)
#: A worker's share, for it and for whatever it starts.
_SHARE = "PROCESSION_CPU_SHARE"
#: What comes with threads of that kind; where none is loaded there is nothing to be changed.
_COMPUTING = ("numpy", "scipy", "sklearn", "numba", "numexpr", "mkl", "torch")


# What `find_loaded` has found.
_controller: Any = None
_found: list[str] = []


@functools.lru_cache(maxsize=1)
def _cpus() -> int:
    return cpu_count()  # 0.1 ms, which is much against the start of a pool


def within_share(cpus: int) -> int:
    """Return how many of these CPUs this process may use: all, or its share as a worker of a pool."""
    with contextlib.suppress(KeyError, ValueError):
        return max(1, min(cpus, int(os.environ[_SHARE])))
    return cpus


def threads_for(workers: int) -> int:
    """Return the share of each of so many workers, of what `cpu_count()` told first."""
    return max(1, within_share(_cpus()) // workers)


def limit_threads(share: int, threads: int | None) -> None:
    """Set what this worker may use.

    Args:
        share: CPUs.
        threads: Threads, where the user has said how many; else as many, but for the variables that the user has set.
    """
    former = os.environ.get(_SHARE)
    os.environ[_SHARE] = str(share)
    for name in VARIABLES:
        # What an outer pool has set is not the user's.
        if threads is not None or os.environ.get(name) in (None, former):
            os.environ[name] = str(threads or share)
    # The user's may be one number for each level of nesting, or nothing that we know.
    outermost = os.environ["OMP_NUM_THREADS"].partition(",")[0].strip()
    now = int(outermost) if outermost.isdecimal() and int(outermost) else share
    if _controller is not None:
        _controller.limit(limits=now)
    set_num_threads = getattr(sys.modules.get("torch"), "set_num_threads", None)  # not while it is being imported
    if set_num_threads is not None:
        set_num_threads(now)


def find_loaded() -> None:
    """Look for libraries that are loaded, so that `limit_threads` can tell them, here and in what is forked from here."""
    global _controller, _found
    loaded = [name for name in _COMPUTING if name in sys.modules]
    if loaded == _found:
        return
    _found = loaded
    with contextlib.suppress(ImportError):
        from threadpoolctl import ThreadpoolController

        _controller = ThreadpoolController()  # 1 ms, 5 ms the first time
