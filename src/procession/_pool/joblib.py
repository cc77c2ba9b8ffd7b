"""joblib's backend ``"procession"``: its batches are calls of a `ProcessPoolExecutor`.

Loaded by `procession.register_joblib_backend` alone: it needs joblib, 1.3 or later.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from joblib._parallel_backends import AutoBatchingMixin, FallbackToBackend, SequentialBackend
from joblib.parallel import ParallelBackendBase

from procession._proc.limits import cpu_count
from procession._proc.threads import within_share

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    from procession._pool.executor import ProcessPoolExecutor, TaskFuture

__all__ = ["ProcessionBackend"]

# Workers that are kept end after so long without a batch; as loky's do.
_IDLE_S = 300.0


class ProcessionBackend(AutoBatchingMixin, ParallelBackendBase):  # type: ignore[misc]
    """Runs joblib's batches.

    Each `Parallel` call, or ``with Parallel(...)`` block, has workers of its own where they are forked: they know all that is
    defined by then. Others take long to start, and are kept for the next call of the same ``parallel_config``.

    Args:
        executor_type: What makes the executor.
        nesting_level: How many `Parallel` calls this one is inside of.
        inner_max_num_threads: Threads of BLAS and the like in each worker; None for its share of the CPUs.
        options: Those of `ProcessPoolExecutor`, from ``parallel_config("procession", ...)``.
    """

    supports_retrieve_callback = True
    supports_inner_max_num_threads = True

    def __init__(
        self,
        executor_type: type[ProcessPoolExecutor],
        nesting_level: int | None = None,
        inner_max_num_threads: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(nesting_level=nesting_level, inner_max_num_threads=inner_max_num_threads)
        self._executor_type = executor_type
        self._options = options
        self._executor: ProcessPoolExecutor | None = None
        self._kept: ProcessPoolExecutor | None = None

    def effective_n_jobs(self, n_jobs: int | None) -> int:
        """Return the number of workers that `n_jobs` stands for; 1 below joblib's threads, from which one does not fork."""
        if n_jobs == 0:
            raise ValueError("n_jobs == 0 in Parallel has no meaning")
        if n_jobs is None or n_jobs == 1:
            return 1
        if not (self.in_main_thread() or self.nesting_level == 0):
            warnings.warn(
                "procession's workers are not started below threads of joblib's, setting n_jobs=1", stacklevel=3
            )
            return 1
        return n_jobs if n_jobs > 0 else max(within_share(cpu_count()) + 1 + n_jobs, 1)

    def configure(self, n_jobs: int = 1, parallel: Any = None, **_: Any) -> int:
        """Make the executor. joblib's own options (`max_nbytes`, `temp_folder`, ...) are for memory maps, which there are none of."""
        n_jobs = self.effective_n_jobs(n_jobs)
        if n_jobs == 1:
            raise FallbackToBackend(SequentialBackend(nesting_level=self.nesting_level))
        self.parallel = parallel
        kept, self._kept = self._kept, None
        if kept is not None and (kept._max_workers != n_jobs or kept._broken):
            kept.shutdown()
            kept = None
        options = {"idle_timeout": _IDLE_S, "threads_per_worker": self.inner_max_num_threads, **self._options}
        self._executor = kept or self._executor_type(n_jobs, **options)
        return n_jobs

    def submit(self, func: Callable[[], Any], callback: Callable[[Future[Any]], object] | None = None) -> TaskFuture:
        """Have a batch done."""
        if self._executor is None:
            raise RuntimeError("the workers of this Parallel call have been ended already")
        future = self._executor.submit(func)
        if callback is not None:
            future.add_done_callback(callback)
        return future

    apply_async = submit  # its name before joblib 1.5

    def retrieve_result_callback(self, out: TaskFuture) -> Any:
        """Return the results of a batch, or raise its error."""
        return out.result()

    def terminate(self) -> None:
        """The call is over."""
        executor, self._executor = self._executor, None
        if executor is not None:
            if executor._mp_context.get_start_method() == "fork":
                executor.shutdown()
            else:
                self._kept = executor
        self.reset_batch_stats()

    def abort_everything(self, ensure_ready: bool = True) -> None:
        """End the workers at once: a batch has failed, or nobody wants the results."""
        executor, self._executor = self._executor, None
        if executor is not None:
            executor.kill_workers()
        if ensure_ready:
            self.configure(n_jobs=self.parallel.n_jobs, parallel=self.parallel)
