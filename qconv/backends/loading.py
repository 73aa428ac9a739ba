"""Backends by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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


# PennyLane and Qiskit are slow to import: their files are read when asked for.
_LOADERS: dict[str, Callable[..., Backend]] = {
    "auto": AutoBackend,
    "statevector": StatevectorBackend,
    "fourier": FourierBackend,
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
        options: "pennylane": device (any PennyLane device name) and the device's own options. "qiskit": method of
            AerSimulator.

    Raises:
        ValueError: For an unknown name, with the nearest valid one, or options the backend does not have.
    """
    if name not in _LOADERS:
        raise unknown("backend", name, _LOADERS)
    try:
        return _LOADERS[name](**options)
    except TypeError as error:
        raise ValueError(f"backend {name!r} does not take the options {sorted(options)}: {error}") from error
