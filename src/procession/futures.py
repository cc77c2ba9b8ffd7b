"""`ProcessPoolExecutor`, the names of `concurrent.futures`, and the way into joblib."""

from __future__ import annotations

import functools
import multiprocessing
from concurrent import futures as _std

from procession._pool.executor import ProcessPoolExecutor as _ProcessPoolExecutor
from procession.pool import context_of_ours

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

__all__ = ["ProcessPoolExecutor", "register_joblib_backend"]


def __getattr__(name: str) -> Any:
    # The rest of the standard library's: `wait`, `as_completed`, `Future`, ...
    return getattr(_std, name)


class ProcessPoolExecutor(_ProcessPoolExecutor):  # noqa: D101
    __doc__ = _ProcessPoolExecutor.__doc__

    def __init__(
        self,
        max_workers: int | None = None,
        mp_context: Any = None,
        initializer: Callable[..., object] | None = None,
        initargs: Iterable[Any] = (),
        *,
        max_tasks_per_child: int | None = None,
        **options: Any,
    ) -> None:
        if mp_context is None and max_tasks_per_child is not None:
            # As documented for the standard library's, whose programs need not bear to be forked then.
            mp_context = multiprocessing.get_context("spawn")
        super().__init__(
            max_workers,
            context_of_ours(mp_context),
            initializer,
            initargs,
            max_tasks_per_child=max_tasks_per_child,
            **options,
        )


def register_joblib_backend(*, make_default: bool = False) -> None:
    """Make ``"procession"`` a backend of joblib's, and so of scikit-learn's ``n_jobs``.

    ``joblib.parallel_config("procession", n_jobs=4)`` selects it; more arguments go to `ProcessPoolExecutor`
    (``retries=2``, ``mp_context=...``).

    Args:
        make_default: `Parallel` uses it where no backend is named.

    Raises:
        ImportError: There is no joblib, or one before 1.3.
    """
    from joblib import register_parallel_backend

    from procession._pool.joblib import ProcessionBackend

    register_parallel_backend(
        "procession", functools.partial(ProcessionBackend, ProcessPoolExecutor), make_default=make_default
    )
