"""Compiled tasks on torch's own threads.

torch keeps its OpenMP threads spinning between operations, so a second pool of ours would fight them for cores. A task
here runs on the same ones: the call costs one or two microseconds. A task is compiled code, void task(int64 *data). It
takes parts of the work until none are left. What its first numbers mean is said in tasks.py, which needs an extra.
"""

from __future__ import annotations

import ctypes
import os
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from qconv.backends.tasks import Task

# Of a task's numbers: parts taken, threads that came, where the threads' memory is, bytes for each.
TAKEN, CAME, MEMORY, ROOM = 0, 2, 3, 4
_IMPORTED_IN = os.getpid()


@cache
def _fork_join() -> Any:
    """GOMP_parallel(function, data, threads, flags) of the OpenMP library that torch itself uses, or None."""
    # Asked for by its path, since a process may hold several (scikit-learn brings one); GNU's and LLVM's both have it.
    candidates: list[str | None] = [str(path) for path in (Path(torch.__file__).parent / "lib").glob("lib*omp*")]
    for candidate in [*sorted(path for path in candidates if path), None]:
        try:
            function = ctypes.CDLL(candidate).GOMP_parallel
        except (OSError, AttributeError, TypeError):
            continue
        function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        function.restype = None
        return function
    return None


@cache
def _callable(address: int) -> Any:
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=max(1, (os.cpu_count() or 2) - 1), thread_name_prefix="qconv")


def available() -> int:
    """Threads that a task may use: as many as torch does, and one in a forked process, where OpenMP's are gone."""
    return 1 if os.getpid() != _IMPORTED_IN else torch.get_num_threads()


def run(task: Task, data: np.ndarray[Any, Any] | ctypes.Array[Any], most: int) -> None:
    """Run a task until all its parts are done.

    Which thread takes which part is left to chance: a task whose parts write to places of their own repeats bit for
    bit, on any number of threads.

    Args:
        task: Compiled code.
        data: Its int64 numbers; TAKEN, CAME and MEMORY are filled in here.
        most: Threads that are worth waking, at most the parts there are.
    """
    threads = max(1, min(most, available()))
    # Begins at a cache line, as all of torch's memory does; each thread takes ROOM bytes.
    memory = torch.empty(threads * int(data[ROOM]), dtype=torch.uint8, device="cpu")
    data[TAKEN], data[CAME], data[MEMORY] = 0, 0, memory.data_ptr()
    address = data.ctypes.data if isinstance(data, np.ndarray) else ctypes.addressof(data)
    if threads == 1:
        _callable(task.address)(address)
        return
    fork_join = _fork_join()
    if fork_join is not None:
        fork_join(task.address, address, threads, 0)
        return
    waiting = [_pool().submit(_callable(task.address), address) for _ in range(threads - 1)]
    try:
        _callable(task.address)(address)
    finally:
        # Whatever happens: the memory must not go while somebody works in it.
        wait(waiting)
