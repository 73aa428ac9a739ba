"""Work spread over processes, one thread each."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor
from concurrent.futures import wait as first_done
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import wait
from typing import TypeVar

import torch

Job = TypeVar("Job")
Result = TypeVar("Result")


@contextmanager
def one_thread() -> Iterator[None]:
    """Keep torch to one thread: sums over several depend on their number, so one gives the same numbers anywhere."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def in_processes(
    function: Callable[[Job], Result],
    jobs: Sequence[Job],
    workers: int,
    then: Callable[[Job], Iterable[Job]] | None = None,
) -> Iterator[tuple[Job, Result]]:
    """Call `function` on every job, each in one of `workers` processes; jobs and results as they finish.

    Args:
        function: importable from its module, or a functools.partial of such a one.
        jobs: what it is called with; they travel by pickle.
        workers: with 1, everything runs in this process.
        then: called with each job that is finished; jobs that waited for it, which follow those that wait already.

    Raises:
        ValueError: workers below 1.
        OSError: a process was killed.
    """
    if workers < 1:
        raise ValueError(f"workers must be at least 1, but is {workers}")
    if workers == 1 or (then is None and len(jobs) <= 1):
        waiting = deque(jobs)
        while waiting:
            job = waiting.popleft()
            with one_thread():
                result = function(job)
            waiting.extend(then(job) if then is not None else ())
            yield job, result
        return
    context = multiprocessing.get_context("spawn")  # a forked child would inherit torch's threads, half alive
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start)
    try:
        futures: dict[Future[Result], Job] = {pool.submit(function, job): job for job in jobs}
        while futures:
            done = first_done(futures, return_when=FIRST_COMPLETED).done
            for future in sorted(done, key=lambda each: each.exception() is not None):  # what is done is not lost
                job, result = futures.pop(future), future.result()
                for each in then(job) if then is not None else ():
                    futures[pool.submit(function, each)] = each
                yield job, result
    except BrokenProcessPool:
        raise OSError(
            "a worker process ended unexpectedly (out of memory?): run again, or with fewer workers; what is finished "
            "is kept"
        ) from None
    finally:
        # Cancelling here, not future by future: the pool trips over futures that were cancelled behind its back.
        pool.shutdown(wait=False, cancel_futures=True)


def _start() -> None:
    torch.set_num_threads(1)
    # Ctrl-C ends a worker at once and in silence: the parent says what happened.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    if parent is not None:
        # A worker whose parent was killed would wait for its next job for ever: it holds the queue's other end itself.
        sentinel = parent.sentinel
        threading.Thread(target=lambda: (wait([sentinel]), os._exit(1)), daemon=True).start()
