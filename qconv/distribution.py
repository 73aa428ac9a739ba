"""Chunks of patches on any executor: threads, processes, or the machines of a Dask cluster; values and gradients."""

from __future__ import annotations

import pickle
import threading
from collections import Counter
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
from qconv.backends.jobs import GradientFailed, JobFailed, Unfinished, draw_seeds, gather, reason_of, run_in_jobs
from qconv.backends.loading import as_backend
from qconv.backends.matrix_products import Truncation, truncation_of
from qconv.backends.protocol import Backend, Compiled, Composed, Real, check_call, check_options
from qconv.gradients import compile_differentiable

PATCHES = 1024  # a chunk
TRUNCATION = 3  # numbers that say what a chunk lost

# Of a chunk: gradients with respect to patches and weights, where wanted, and what was truncated.
Slopes = tuple[Real | None, Real | None, Truncation | None]

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
        """Values of patches (R, n_inputs), behind them what was truncated, and a 1 for each filter without values.

        Returns:
            (R, F n_obs + TRUNCATION + F).
        """
        x, w = self._pair(rows)
        with self._turn(), torch.no_grad():
            compiled = self._compile(seed)
            try:
                values = compiled(x, w).flatten(1).double().numpy()
            except JobFailed as failure:
                if isinstance(compiled, Composed) and not isinstance(compiled, DistributedCompiled):
                    raise  # what is kept then is not values of this circuit
                parts = (failure.values.reshape(len(x), -1), np.full((len(x), TRUNCATION), np.nan), failure.missing)
                kept = np.concatenate(parts, axis=1)
                raise Unfinished(failure.reason, kept, np.all(failure.missing, axis=1)) from failure
            lost = np.tile(_numbers(truncation_of(compiled)), (len(values), 1))
            return np.concatenate([values, lost, np.zeros((len(x), len(w)))], axis=1)

    def slopes(self, rows: Real, grad: Real, seed: int, wanted: tuple[bool, bool]) -> Slopes:
        """Gradients with respect to the patches and, summed over them, the weights, from that of the values."""
        x, w = self._pair(rows)
        x.requires_grad_(wanted[0])
        w.requires_grad_(wanted[1])
        asked = [part for part, want in zip((x, w), wanted, strict=True) if want]
        with self._turn(), torch.enable_grad():
            compiled = self._compile(seed)
            values = compiled(x, w)
            outer = torch.from_numpy(grad).to(self.dtype).reshape(values.shape)
            found = iter(torch.autograd.grad(values, asked, outer, allow_unused=True, materialize_grads=True))
            gx, gw = (np.asarray(next(found).double().numpy()) if want else None for want in wanted)
            return gx, gw, truncation_of(compiled)


def _numbers(lost: Truncation | None) -> Real:
    """What was truncated as numbers, NaN where there is none to tell."""
    given = (None, None, None) if lost is None else (lost.discarded, lost.angle, lost.max_bond)
    return np.array([np.nan if number is None else number for number in given], dtype=np.float64)


def _worst(rows: Real) -> Truncation | None:
    """The worst of rows of such numbers."""
    finite = rows[np.isfinite(rows[:, 0])]
    if not len(finite):
        return None
    discarded, angle, bond = np.fmax.reduce(finite)
    return Truncation(float(discarded), float(angle), None if np.isnan(bond) else int(bond))


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

    Attributes:
        parts: See Composed: what every chunk runs.
        truncation_error: What the last evaluation lost where the backend truncates, the worst of its chunks.

    Raises:
        Unsupported: If the backend cannot run the circuit.
    """

    differentiable = True
    evaluates_again = True  # each chunk where its gradient is made
    truncation_error: Truncation | None = None

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
        self.parts = ((circuit, self._here),)
        self._pickled, self._sampled = pickle.dumps((backend, circuit, shots, noise)), shots is not None
        self._turns = backend.name.partition(" ")[0] not in _THREAD_SAFE
        self._executor, self._patches = executor, patches
        self._rng = None if seed is None and self._sampled else np.random.default_rng(seed)

    def __call__(self, inputs: Tensor, weights: Tensor) -> Tensor:
        """See Compiled.

        Raises:
            JobFailed: If a chunk does not finish; no further one is begun then, and it holds the values
                of those that finished.
        """
        check_call(self.circuit, inputs, weights)
        if torch._C._are_functorch_transforms_active():
            raise ValueError(
                "chunks on an executor do not run inside torch.func transforms: use the backend itself there"
            )
        values: Tensor = _Distributed.apply(inputs, weights, self)  # type: ignore[no-untyped-call]
        return values

    def counts(self, patches: int, filters: int) -> Counter[str]:
        """See Compiled."""
        return self._here.counts(patches, filters)

    def _work(self, weights: Tensor) -> _Work:
        return _Work(self._pickled, self._sampled, self._turns, weights.dtype, _plain(weights))

    def run(self, inputs: Tensor, weights: Tensor) -> Tensor:
        """Values, without gradients."""
        work, shape = self._work(weights), (len(inputs), len(weights), len(self.circuit.observables))
        numbers = shape[1] * shape[2]
        columns = numbers + TRUNCATION + shape[1]
        try:
            found = run_in_jobs(work.values, _plain(inputs), columns, self._rng, self._patches, self._executor)
        except JobFailed as failure:
            values = failure.values[:, 0, :numbers].reshape(shape)
            missing = failure.missing | (failure.values[:, 0, numbers + TRUNCATION :] == 1)
            raise JobFailed(failure.reason, values, missing) from failure.__cause__
        self.truncation_error = _worst(found[:, numbers : numbers + TRUNCATION])
        return torch.from_numpy(found[:, :numbers]).to(weights).reshape(shape)

    def slopes(
        self, inputs: Tensor, weights: Tensor, grad: Tensor, wanted: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Gradients with respect to inputs and weights, each where it is wanted.

        Raises:
            GradientFailed: If a chunk does not finish; it holds the gradients of the others.
        """
        work, rows, outer = self._work(weights), _plain(inputs), _plain(grad)
        chunks = [slice(start, start + self._patches) for start in range(0, len(rows), self._patches)]
        seeds = draw_seeds(self._rng, len(chunks))
        calls = [
            partial(work.slopes, rows[chunk], outer[chunk], seed, wanted)
            for chunk, seed in zip(chunks, seeds, strict=True)
        ]
        found, failure = gather(calls, self._executor)
        gx = np.full((len(rows), rows.shape[1] if wanted[0] else 0), np.nan)
        # In the order of the chunks, whoever finished first: the sum is the same in every run.
        gw, missing, lost = np.zeros(weights.shape), np.ones((len(rows), 1), dtype=np.bool_), []
        for chunk, one in zip(chunks, found, strict=True):
            if one is None or isinstance(one, Exception):
                continue
            gx[chunk], missing[chunk] = 0.0 if one[0] is None else one[0], False
            gw += 0.0 if one[1] is None else one[1]
            lost.append(one[2])
        if failure is not None:
            summed = gw if wanted[1] else None
            raise GradientFailed(reason_of(failure), gx[:, None], missing, summed) from failure
        self.truncation_error = Truncation.worst(lost)
        return (
            torch.from_numpy(gx).to(inputs) if wanted[0] else None,
            torch.from_numpy(gw).to(weights) if wanted[1] else None,
        )


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
        backend: A backend, or its name; picklable, and no sampler of Qiskit's, which draws from a seed of its own.
        executor: A concurrent.futures executor; of a Dask client `client.get_executor()`. It must not be the one that
            the caller runs on. In threads, PennyLane and Qiskit take turns, and so does what may choose them ("auto")
            or is not qconv's: name the exact backend, or give processes (or "qiskit" its own executor).
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
