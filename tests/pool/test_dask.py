"""The executor as a scheduler of dask's, with the real dask."""

from __future__ import annotations

import os

import pytest

import procession

dask = pytest.importorskip("dask")


def work(x):
    return x + 1, os.getpid()


def test_dask_computes_on_the_executor(ctx):
    """dask takes an executor of concurrent.futures as its scheduler."""
    with procession.ProcessPoolExecutor(2, ctx) as executor:
        results = dask.compute(*[dask.delayed(work)(x) for x in range(20)], scheduler=executor)
    assert [x + 1 for x in range(20)] == [result for result, _ in results]
    assert os.getpid() not in {pid for _, pid in results}
