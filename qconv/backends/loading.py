"""Backends by name."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any, Protocol, runtime_checkable

from circuits.naming import unknown
from qconv.backends.auto import AutoBackend
from qconv.backends.fourier import FourierBackend
from qconv.backends.protocol import Backend
from qconv.backends.statevector import StatevectorBackend


def _pennylane(**options: Any) -> Backend:
    from qconv.backends.pennylane import PennylaneBackend

    return PennylaneBackend(**options)


def _qiskit(**options: Any) -> Backend:
    from qconv.backends.qiskit import QiskitBackend

    return QiskitBackend(**options)


def _tensor_network(**options: Any) -> Backend:
    from qconv.backends.tensor_network import TensorNetworkBackend

    return TensorNetworkBackend(**options)


# PennyLane and Qiskit are slow to import: their files are read when asked for.
_LOADERS: dict[str, Callable[..., Backend]] = {
    "auto": AutoBackend,
    "statevector": StatevectorBackend,
    "fourier": FourierBackend,
    "tensor_network": _tensor_network,
    "pennylane": _pennylane,
    "qiskit": _qiskit,
}


def backend_names() -> tuple[str, ...]:
    """Names that `load_backend` and `QuantumConv2d(backend=...)` take."""
    return tuple(_LOADERS)


def load_backend(name: str, **options: Any) -> Backend:
    """A backend by name.

    Args:
        name: One of `backend_names()`.
        options: "pennylane": device (a PennyLane device or its name), diff_method ("backprop", "adjoint",
            "parameter-shift", "spsa", "finite-diff", "best") and the device's own options. "qiskit": method of
            AerSimulator, device (any BackendV2 or SamplerV2), noise_model, coupling_map, basis_gates, executor and
            AerSimulator's own options; see `qconv.backends.qiskit.QiskitBackend`. "tensor_network": method, max_bond
            and cutoff; see `qconv.backends.tensor_network.TensorNetworkBackend`.

    Raises:
        ValueError: For an unknown name, with the nearest valid one, or options the backend does not have.
    """
    if name not in _LOADERS and "." in name:
        raise ValueError(
            f"unknown backend {name!r}: backends are {', '.join(_LOADERS)}; for PennyLane's device of that name give "
            f"load_backend('pennylane', device={name!r})"
        )
    if name not in _LOADERS:
        raise unknown("backend", name, _LOADERS)
    try:
        return _LOADERS[name](**options)
    except TypeError as error:
        raise ValueError(f"backend {name!r} does not take the options {sorted(options)}: {error}") from error


@runtime_checkable
class OnExecutor(Protocol):
    """A backend of jobs."""

    def on(self, executor: Executor) -> Backend:
        """The same, with jobs on an executor."""
        ...


def as_backend(backend: Any, executor: Executor | None = None) -> Backend:
    """A backend from what users give: a name, a backend, a device of PennyLane's, or a device or sampler of Qiskit's.

    Args:
        backend: Any of these.
        executor: Runs the jobs of "qiskit" (in place of an executor of its own), or of a device or sampler of Qiskit's.

    Raises:
        ValueError: For anything else, and for an executor given with another backend.
    """
    # Told by its classes' modules, since importing Qiskit or PennyLane to ask is slow.
    origins = {kind.__module__.partition(".")[0] for kind in type(backend).__mro__}
    on_qiskit = backend == "qiskit" if isinstance(backend, str) else bool(origins & {"qiskit", "qiskit_aer"})
    if executor is not None and isinstance(backend, OnExecutor):
        return backend.on(executor)
    if executor is not None and not on_qiskit:
        raise ValueError(
            f"executor was given with backend {getattr(backend, 'name', backend)!r}: it runs the jobs of "
            "backend='qiskit'; for chunks of patches on any backend use "
            "qconv.distribution.distribute(backend, executor)"
        )
    jobs = {} if executor is None else {"executor": executor}
    if isinstance(backend, str):
        return load_backend(backend, **jobs)
    if isinstance(backend, Backend):
        return backend
    if on_qiskit:
        return load_backend("qiskit", device=backend, **jobs)
    if "pennylane" in origins:
        return load_backend("pennylane", device=backend)
    raise ValueError(
        f"backend is a {type(backend).__name__}: give one of {', '.join(backend_names())}, an object with `name` and "
        "`compile` (qconv.Backend), a device of PennyLane's, or a BackendV2 or SamplerV2 of Qiskit's"
    )
