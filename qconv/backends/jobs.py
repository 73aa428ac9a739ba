"""Rows of circuits as jobs: one after another, or on an executor; what was finished survives a job that fails."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from functools import partial
from itertools import pairwise
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from qconv.backends.protocol import Real

Missing = NDArray[np.bool_]
Given = TypeVar("Given")


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
        values: (P, F, n_obs), NaN where missing; (shifts, P, F, n_obs) of a backward pass that shifts angles.
        missing: (P, F) or (shifts, P, F), True where there is no value.

    Attributes:
        values: As the argument.
        missing: As the argument.
    """

    def __init__(self, reason: str, values: Real, missing: Missing) -> None:
        super().__init__(reason, values, missing)
        self.reason, self.values, self.missing = reason, values, missing

    def __str__(self) -> str:
        patches: Missing = np.asarray(self.missing.any(axis=-1))
        shifts = ""
        if patches.ndim == 2:
            shifts = f" at shifts {ranges(np.flatnonzero(patches.any(axis=1)))} of {len(patches)} of this call"
            patches = np.asarray(patches.any(axis=0))
        kept = int(self.missing.size - self.missing.sum())
        return (
            f"patches {ranges(np.flatnonzero(patches))} of {len(patches)} have no values{shifts}, since a job did not "
            f"finish ({self.reason}): {kept} of {self.missing.size} circuits did, and their values are kept in this "
            "exception's .values, NaN where .missing is True"
        )

    def of(self, patches: int, filters: int) -> JobFailed:
        """The same where rows were shifts, if several, of patches of filters."""
        shifts, rest = divmod(self.missing.size, patches * filters)
        if rest:
            return self
        shape = (patches, filters) if shifts == 1 else (shifts, patches, filters)
        return JobFailed(self.reason, self.values.reshape(*shape, -1), self.missing.reshape(shape))


class GradientFailed(JobFailed):
    """Some chunks of a backward pass were not run; the gradients of the others are kept here.

    Args:
        reason: Why, in words.
        values: With respect to the patches, (P, 1, n_inputs), NaN where missing; n_inputs is 0 where it is not wanted.
        missing: (P, 1), True where there is none.
        weights: With respect to the weights, (F, n_weights), summed over the patches that are there; None where it is
            not wanted.
    """

    def __init__(self, reason: str, values: Real, missing: Missing, weights: Real | None) -> None:
        super().__init__(reason, values, missing)
        self.args = reason, values, missing, weights
        self.weights = weights

    def __str__(self) -> str:
        return (
            f"patches {ranges(np.flatnonzero(self.missing[:, 0]))} of {len(self.missing)} have no gradients, since a "
            f"job did not finish ({self.reason}): those of the others are kept in this exception's .values (NaN where "
            ".missing is True), and in .weights their sum over patches"
        )


def ranges(numbers: NDArray[np.intp], shown: int = 5) -> str:
    """Increasing whole numbers, at least one, in words: "0 to 3, 7"."""
    ends = [0, *(np.flatnonzero(np.diff(numbers) != 1) + 1).tolist(), len(numbers)]
    runs = [(numbers[a], numbers[b - 1]) for a, b in pairwise(ends)]
    texts = [f"{a} to {b}" if b > a else f"{a}" for a, b in runs[:shown]]
    more = f" and {len(runs) - shown} more ranges" if len(runs) > shown else ""
    return f"{', '.join(texts)}{more}"


def draw_seeds(draw: np.random.Generator | None, jobs: int) -> list[int]:
    """A seed for each of some jobs; without a generator from torch's global one, which torch.manual_seed repeats."""
    if draw is None:
        return [int(seed) for seed in torch.randint(2**31, (jobs,))]
    return [int(draw.integers(2**31)) for _ in range(jobs)]


def gather(
    calls: Sequence[Callable[[], Given]], executor: Executor | None
) -> tuple[list[Given | Exception | None], Exception | None]:
    """What each call gave or raised, in order, None where it was not started; and what failed first.

    No further call is started then; those that run are waited for.

    Args:
        calls: Any; picklable where the executor is of processes.
        executor: Where they run at the same time; None for one after another, here.
    """
    found: list[Given | Exception | None] = [None] * len(calls)
    failure: Exception | None = None
    futures: list[Future[Given]] = []
    waits = calls
    try:
        if executor is not None:
            try:
                for call in calls:
                    futures.append(executor.submit(call))
            except Exception as error:  # it takes no more
                failure = error
                _cancel(futures)
            waits = [future.result for future in futures]
        for k, wait in enumerate(waits):
            try:
                found[k] = wait()
            except Exception as error:
                found[k] = error
                if failure is None:
                    failure = error
                    _cancel(futures)
                if executor is None:
                    break
    except BaseException:
        _cancel(futures)
        raise
    return found, failure


def run_in_jobs(
    run: Run,
    rows: Real,
    observables: int,
    draw: np.random.Generator | None,
    rows_a_job: int,
    executor: Executor | None,
) -> Real:
    """Values of all rows, in order.

    Each job has a seed of its own, drawn before any of them runs: with and without an executor the numbers are equal.

    Args:
        run: Runs one job.
        rows: Angles (R, K).
        observables: Values a row.
        draw: Draws the seeds; see draw_seeds.
        rows_a_job: At most so many rows a job.
        executor: Where jobs run at the same time; None for one after another, here.

    Raises:
        JobFailed: If a job raised an error. No further job is started then; those that run are waited for.
    """
    bounds = [(start, min(start + rows_a_job, len(rows))) for start in range(0, len(rows), rows_a_job)]
    seeds = draw_seeds(draw, len(bounds))
    calls = [partial(run, rows[a:b], seed) for (a, b), seed in zip(bounds, seeds, strict=True)]
    found, failure = gather(calls, executor)
    values, missing = np.full((len(rows), observables), np.nan), np.ones(len(rows), dtype=np.bool_)
    for (a, b), one in zip(bounds, found, strict=True):
        if isinstance(one, Unfinished):
            values[a:b], missing[a:b] = np.where(one.missing[:, None], np.nan, one.values), one.missing
        elif one is not None and not isinstance(one, Exception):
            values[a:b], missing[a:b] = one, False
    if failure is not None:
        raise JobFailed(reason_of(failure), values[:, None], missing[:, None]) from failure
    return values


def reason_of(failure: Exception) -> str:
    """What an exception says, or else its name."""
    return str(failure).strip() or type(failure).__name__


def _cancel(futures: list[Any]) -> None:
    for future in futures:
        future.cancel()
