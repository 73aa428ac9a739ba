"""Backends by name, and the choice behind "auto"."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from circuits.circuit import Circuit
from circuits.naming import unknown
from circuits.noise import NoiseModel
from qconv.backends.fourier import TRAIN_FROM, FourierBackend, FourierCompiled
from qconv.backends.protocol import Backend, Compiled, Unsupported, check_options
from qconv.backends.statevector import StatevectorBackend


def _pennylane(**options: Any) -> Backend:
    from qconv.backends.pennylane import PennylaneBackend

    return PennylaneBackend(**options)


def _qiskit(**options: Any) -> Backend:
    from qconv.backends.qiskit import QiskitBackend

    return QiskitBackend(**options)


class AutoBackend:
    """Picks a backend by the circuit, shots and noise; `choose` says which and why."""

    name = "auto"

    def choose(self, circuit: Circuit, shots: int | None, noise: NoiseModel | None) -> tuple[Backend, str]:
        """The backend for this circuit, and the reason in words."""
        check_options(shots, noise, None)
        if shots is not None:
            return _qiskit(), f"qiskit: {shots} shots are sampled from counts of AerSimulator"
        try:
            compiled = FourierBackend().compile(circuit, noise=noise)
        except Unsupported as reason:
            if noise is not None:
                return _pennylane(device="default.mixed"), f"pennylane default.mixed: noise, and {reason}"
            return StatevectorBackend(), f"statevector: {reason}"
        if not isinstance(compiled, FourierCompiled):
            return FourierBackend(), (
                f"fourier: product encoding on {circuit.n_wires} wires and a shallow circuit, so coefficients are a "
                "short tensor train, built once a call"
            )
        if circuit.n_wires >= TRAIN_FROM and noise is None:
            # Building 4^n coefficients then costs more than evolving the 2^n basis states.
            return StatevectorBackend(), (
                f"statevector: product encoding, but {circuit.n_wires} wires and no short tensor train"
            )
        return FourierBackend(), (
            f"fourier: product encoding on {circuit.n_wires} wires, so coefficients are built once a call and each "
            "patch costs one real contraction"
        )

    def compile(
        self, circuit: Circuit, *, shots: int | None = None, noise: NoiseModel | None = None, seed: int | None = None
    ) -> Compiled:
        """See Backend."""
        backend, _ = self.choose(circuit, shots, noise)
        return backend.compile(circuit, shots=shots, noise=noise, seed=seed)


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
