"""Rows of circuits as jobs: one after another, or on an executor; what was finished survives a job that fails."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor
from functools import partial
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from qconv.backends.protocol import Real

Missing = NDArray[np.bool_]


class Run(Protocol):
    """What runs the rows of one job; picklable, so that another process can."""

    def __call__(self, rows: Real, seed: int) -> Real:
        """Values (R, n_obs) of rows of angles (R, K)."""
        ...


class Unfinished(RuntimeError):
    """A job that gave only some of its values.

    Args:
        reason: Why, in words.
        values: (R, n_obs).
        missing: (R,), True where there are none.
    """

    def __init__(self, reason: str, values: Real, missing: Missing) -> None:
        super().__init__(reason, values, missing)
        self.reason, self.values, self.missing = reason, values, missing

    def __str__(self) -> str:
        return self.reason


class JobFailed(RuntimeError):
    """Some circuits of a call were not run; what the others gave is kept here.

    Args:
        reason: Why, in words.
        values: (P, F, n_obs), NaN where missing.
        missing: (P, F), True where there is no value.

    Attributes:
        values: As the argument.
        missing: As the argument.
    """

    def __init__(self, reason: str, values: Real, missing: Missing) -> None:
        super().__init__(reason, values, missing)
        self.reason, self.values, self.missing = reason, values, missing

    def __str__(self) -> str:
        patches: Missing = np.asarray(self.missing.any(axis=1))
        kept = int(self.missing.size - self.missing.sum())
        return (
            f"patches {ranges(np.flatnonzero(patches))} of {len(patches)} have no values, since a job did not finish "
            f"({self.reason}): {kept} of {self.missing.size} circuits did, and their values are kept in this "
            "exception's .values, NaN where .missing is True"
        )

    def of(self, patches: int, filters: int) -> JobFailed:
        """The same where patches * filters rows were one filter's patches."""
        if self.missing.size != patches * filters:
            return self
        shape = (patches, filters)
        return JobFailed(self.reason, self.values.reshape(*shape, -1), self.missing.reshape(shape))


def ranges(numbers: NDArray[np.intp], shown: int = 5) -> str:
    """Increasing whole numbers, at least one, in words: "0 to 3, 7"."""
    ends = [0, *(np.flatnonzero(np.diff(numbers) != 1) + 1).tolist(), len(numbers)]
    runs = [(numbers[a], numbers[b - 1]) for a, b in pairwise(ends)]
    texts = [f"{a} to {b}" if b > a else f"{a}" for a, b in runs[:shown]]
    more = f" and {len(runs) - shown} more ranges" if len(runs) > shown else ""
    return f"{', '.join(texts)}{more}"


def run_in_jobs(
    run: Run, rows: Real, observables: int, draw: np.random.Generator, rows_a_job: int, executor: Executor | None
) -> Real:
    """Values of all rows, in order.

    Each job has a seed of its own, drawn before any of them runs: with and without an executor the numbers are equal.

    Args:
        run: Runs one job.
        rows: Angles (R, K).
        observables: Values a row.
        draw: Draws the seeds.
        rows_a_job: At most so many rows a job.
        executor: Where jobs run at the same time; None for one after another, here.

    Raises:
        JobFailed: If a job raised an error. No further job is started then; those that run are waited for.
    """
    bounds = [(start, min(start + rows_a_job, len(rows))) for start in range(0, len(rows), rows_a_job)]
    calls = [partial(run, rows[a:b], int(draw.integers(2**31))) for a, b in bounds]
    values, missing = np.full((len(rows), observables), np.nan), np.ones(len(rows), dtype=np.bool_)
    failure: Exception | None = None
    futures = [] if executor is None else [executor.submit(call) for call in calls]
    waits: list[Callable[[], Real]] = [future.result for future in futures] or list(calls)
    try:
        for (a, b), wait in zip(bounds, waits, strict=True):
            try:
                values[a:b], missing[a:b] = wait(), False
            except Exception as error:
                if isinstance(error, Unfinished):
                    values[a:b] = np.where(error.missing[:, None], np.nan, error.values)
                    missing[a:b] = error.missing
                if failure is not None:
                    continue
                failure = error
                if not futures:
                    break
                _cancel(futures)
    except BaseException:
        _cancel(futures)
        raise
    if failure is not None:
        reason = str(failure).strip() or type(failure).__name__
        raise JobFailed(reason, values[:, None], missing[:, None]) from failure
    return values


def _cancel(futures: list[Any]) -> None:
    for future in futures:
        future.cancel()
