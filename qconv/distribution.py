"""Chunks of patches on any executor: threads, processes, or the machines of a Dask cluster; values and gradients."""

from __future__ import annotations

import pickle
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Executor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from circuits.circuit import Circuit
from circuits.noise import NoiseModel
from qconv.backends.jobs import JobFailed, run_in_jobs
from qconv.backends.loading import as_backend
from qconv.backends.protocol import Backend, CircuitSize, Compiled, Real, check_call, check_options, circuit_sizes
from qconv.gradients import compile_differentiable

PATCHES = 1024  # a chunk

_KEPT = 16  # compiled circuits of a process

# Backends that threads of one process may run at the same time. PennyLane locks up then, since its queue of gates is
# one for all threads; what is not known here takes turns too.
_THREAD_SAFE = ("statevector", "fourier", "tensor_network")
_TURNS = threading.RLock()


@dataclass(frozen=True)
class _Work:
    """What every chunk needs besides its patches, picklable.

    Args:
        pickled: Backend, circuit, shots and noise, as bytes: what a process compiled once is found by them.
        sampled: Whether there are shots, which each chunk draws from a seed of its own.
        turns: Whether threads of one process take turns.
        dtype: Of the tensors.
        weights: (F, n_weights), in double precision, which holds either dtype exactly.
    """

    pickled: bytes
    sampled: bool
    turns: bool
    dtype: torch.dtype
    weights: Real

    def _compile(self, seed: int) -> Compiled:
        if not self.sampled:
            return _compiled(self.pickled, threading.get_ident())
        backend, circuit, shots, noise = _loaded(self.pickled, threading.get_ident())
        return compile_differentiable(backend, circuit, shots=shots, noise=noise, seed=seed)

    def _turn(self) -> AbstractContextManager[object]:
        return _TURNS if self.turns else nullcontext()

    def _pair(self, rows: Real) -> tuple[Tensor, Tensor]:
        given = (torch.from_numpy(np.ascontiguousarray(part)) for part in (rows, self.weights))
        x, w = (part.to(self.dtype) for part in given)
        return x, w

    def values(self, rows: Real, seed: int) -> Real:
        """Values (R, F n_obs) of patches (R, n_inputs)."""
        x, w = self._pair(rows)
        with self._turn(), torch.no_grad():
            return np.asarray(self._compile(seed)(x, w).flatten(1).double().numpy())

    def slopes(self, rows: Real, grad: Real, seed: int, wanted: tuple[bool, bool]) -> tuple[Real | None, Real | None]:
        """Gradients with respect to the patches and, summed over them, the weights, from that of the values."""
        x, w = self._pair(rows)
        x.requires_grad_(wanted[0])
        w.requires_grad_(wanted[1])
        asked = [part for part, want in zip((x, w), wanted, strict=True) if want]
        with self._turn(), torch.enable_grad():
            values = self._compile(seed)(x, w)
            outer = torch.from_numpy(grad).to(self.dtype).reshape(values.shape)
            found = iter(torch.autograd.grad(values, asked, outer, allow_unused=True, materialize_grads=True))
        gx, gw = (np.asarray(next(found).double().numpy()) if want else None for want in wanted)
        return gx, gw


# One for each thread: nothing says that backends and compiled circuits may be called by several at once.
@lru_cache(maxsize=_KEPT)
def _loaded(pickled: bytes, thread: int) -> tuple[Backend, Circuit, int | None, NoiseModel | None]:
    backend, circuit, shots, noise = pickle.loads(pickled)
    return backend, circuit, shots, noise


@lru_cache(maxsize=_KEPT)
def _compiled(pickled: bytes, thread: int) -> Compiled:
    backend, circuit, shots, noise = _loaded(pickled, thread)
    return compile_differentiable(backend, circuit, shots=shots, noise=noise)


class DistributedCompiled:
    """A circuit whose patches are evaluated in chunks on an executor.

    Args:
        backend: What evaluates a chunk.
        circuit: The kernel.
        executor: Where; None for here, one chunk after another.
        patches: A chunk.
        shots: See Backend.
        noise: See Backend.
        seed: See Backend; each chunk of each call has a seed of its own.

    Raises:
        Unsupported: If the backend cannot run the circuit.
    """

    differentiable = True

    def __init__(
        self,
        backend: Backend,
        circuit: Circuit,
        executor: Executor | None,
        patches: int,
        *,
        shots: int | None,
        noise: NoiseModel | None,
        seed: int | None,
    ) -> None:
        self.circuit = circuit
        # Compiled here too: what cannot run is said now, and costs are told without an executor.
        self._here = compile_differentiable(backend, circuit, shots=shots, noise=noise, seed=seed)
        self._pickled, self._sampled = pickle.dumps((backend, circuit, shots, noise)), shots is not None
        self._turns = backend.name.partition(" ")[0] not in _THREAD_SAFE
        self._executor, self._patches = executor, patches
        self._rng = np.random.default_rng(seed)

    def __call__(self, inputs: Tensor, weights: Tensor) -> Tensor:
        """See Compiled.

        Raises:
            JobFailed: If a chunk does not finish; it holds the values of the others.
        """
        check_call(self.circuit, inputs, weights)
        if torch._C._are_functorch_transforms_active():
            raise ValueError(
                "chunks on an executor do not run inside torch.func transforms: use the backend itself there"
            )
        values: Tensor = _Distributed.apply(inputs, weights, self)  # type: ignore[no-untyped-call]
        return values

    @property
    def sizes(self) -> tuple[CircuitSize, ...]:
        """See Sized."""
        return circuit_sizes(self._here, self.circuit)

    def counts(self, patches: int, filters: int) -> Counter[str]:
        """See Compiled."""
        return self._here.counts(patches, filters)

    def _work(self, weights: Tensor) -> _Work:
        return _Work(self._pickled, self._sampled, self._turns, weights.dtype, _plain(weights))

    def run(self, inputs: Tensor, weights: Tensor) -> Tensor:
        """Values, without gradients."""
        work, shape = self._work(weights), (len(inputs), len(weights), len(self.circuit.observables))
        numbers = shape[1] * shape[2]
        try:
            found = run_in_jobs(work.values, _plain(inputs), numbers, self._rng, self._patches, self._executor)
        except JobFailed as failure:
            missing = np.repeat(failure.missing, shape[1], axis=1)
            raise JobFailed(failure.reason, failure.values.reshape(shape), missing) from failure.__cause__
        return torch.from_numpy(found).to(weights).reshape(shape)

    def slopes(
        self, inputs: Tensor, weights: Tensor, grad: Tensor, wanted: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Gradients with respect to inputs and weights, each where it is wanted."""
        work, rows, outer = self._work(weights), _plain(inputs), _plain(grad)
        calls: list[Callable[[], tuple[Real | None, Real | None]]] = [
            partial(
                work.slopes,
                rows[start : start + self._patches],
                outer[start : start + self._patches],
                int(self._rng.integers(2**31)),
                wanted,
            )
            for start in range(0, len(rows), self._patches)
        ]
        if self._executor is None:
            found = [call() for call in calls]
        else:
            futures = [self._executor.submit(call) for call in calls]
            try:
                found = [future.result() for future in futures]
            except BaseException:
                for future in futures:
                    future.cancel()
                raise
        gx, gw = None, None
        if wanted[0]:
            parts = [x for x, _ in found if x is not None]
            gx = torch.from_numpy(np.concatenate(parts)).to(inputs) if parts else torch.zeros_like(inputs)
        if wanted[1]:
            # In the order of the chunks, whoever finished first: the sum is the same in every run.
            total = np.zeros(weights.shape)
            for _, w in found:
                total = total if w is None else total + w
            gw = torch.from_numpy(total).to(weights)
        return gx, gw


def _plain(tensor: Tensor) -> Real:
    return np.asarray(tensor.detach().cpu().double().numpy())


class _Distributed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weights: Tensor, compiled: DistributedCompiled) -> Tensor:
        ctx.save_for_backward(inputs, weights)
        ctx.compiled = compiled
        return compiled.run(inputs, weights)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        inputs, weights = ctx.saved_tensors
        return *ctx.compiled.slopes(inputs, weights, grad, ctx.needs_input_grad[:2]), None


class DistributedBackend:
    """A backend whose patches are evaluated in chunks on an executor; made by `distribute`.

    Copies share the executor; another process that it is sent to has none and runs chunks itself.
    """

    def __init__(self, backend: Backend, executor: Executor | None, patches: int) -> None:
        self.backend, self.executor, self.patches = backend, executor, patches

    @property
    def name(self) -> str:
        """Name of the backend, and that it is distributed."""
        return f"{self.backend.name} (distributed)"

    def compile(
        self, circuit: Circuit, *, shots: int | None = None, noise: NoiseModel | None = None, seed: int | None = None
    ) -> DistributedCompiled:
        """See Backend."""
        check_options(shots, noise, seed)
        return DistributedCompiled(
            self.backend, circuit, self.executor, self.patches, shots=shots, noise=noise, seed=seed
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> DistributedBackend:
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "executor": None}


def distribute(backend: str | Backend, executor: Executor, patches: int = PATCHES) -> DistributedBackend:
    """Any backend, with chunks of patches evaluated at the same time on an executor.

    The backward pass evaluates each chunk anew where its gradient is made, so that no state stays in the workers.
    Values and gradients do not depend on the executor, nor, to rounding, on the size of the chunks; under shots,
    chunks draw from seeds of their own. Worth it where a patch is expensive: many wires, noise, a simulator that takes
    one circuit after another.

    Args:
        backend: A backend, or its name; picklable where the executor is of processes.
        executor: A concurrent.futures executor; of a Dask client `client.get_executor()`. It must not be the one that
            the caller runs on. In threads, PennyLane and Qiskit take turns: give processes (or "qiskit" its own
            executor).
        patches: A chunk.

    Returns:
        A backend for `QuantumConv2d(backend=...)` and `simulate`.

    Raises:
        ValueError: For no executor, or chunks of less than one patch.

    Example:
        with ProcessPoolExecutor() as pool:
            layer = QuantumConv2d(1, 12, (3, 4), backend=distribute("statevector", pool))
            layer(images)
    """
    if not isinstance(executor, Executor):
        raise ValueError(
            f"executor is a {type(executor).__name__}: give a concurrent.futures Executor, such as "
            "ProcessPoolExecutor() or, of a Dask client, client.get_executor()"
        )
    if isinstance(patches, bool) or not isinstance(patches, int) or patches < 1:
        raise ValueError(f"patches is {patches!r}: give a whole number of at least 1, the patches of a chunk")
    return DistributedBackend(as_backend(backend), executor, patches)
