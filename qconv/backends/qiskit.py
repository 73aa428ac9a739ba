"""Qiskit Aer as a backend: exact values, or shots from real counts."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import torch
from qiskit import QuantumCircuit, transpile
from qiskit.circuit import ParameterVector
from qiskit.quantum_info import Pauli
from qiskit_aer import AerSimulator
from torch import Tensor

from circuits.circuit import Circuit
from circuits.interop import build_qiskit, preparation_angles, reversed_bits
from circuits.noise import NoiseModel
from qconv.backends.angles import angles_of, evaluate_angles, features_of, normalized
from qconv.backends.protocol import Real, check_call, check_options, device_counts, measurement_settings, split_invalid
from qconv.backends.statevector import simulation_counts

_UNBINDABLE = {"crx", "cry", "crz", "cp", "cu1"}


class QiskitCompiled:
    """A circuit transpiled once; all patches of a call are one job with bound parameters."""

    differentiable = False

    def __init__(
        self, circuit: Circuit, simulator: AerSimulator, shots: int | None, noise: NoiseModel | None, seed: int | None
    ) -> None:
        self.circuit = circuit
        self._simulator, self._shots, self._mixed = simulator, shots, noise is not None
        self._angles, self._features = angles_of(circuit), features_of(circuit)
        # Each call draws its own seed, so that the shots of successive calls are independent.
        self._rng = np.random.default_rng(seed)
        self._settings = measurement_settings(circuit.observables)
        prepared = 2**circuit.n_wires - 1 if self._features else 0
        self._parameters = ParameterVector("a", prepared + len(self._angles))
        # Aer (to 0.18.2) silently drops the bound parameter of a controlled rotation (Qiskit/qiskit-aer issues 2323 and
        # 2403), so these are written as one-wire rotations and CNOTs.
        base = build_qiskit(circuit, list(self._parameters), noise)
        while set(base.count_ops()) & _UNBINDABLE:
            base = base.decompose(gates_to_decompose=list(_UNBINDABLE))
        self._jobs = (
            [self._exact(base)] if shots is None else [self._measured(base, basis) for basis, _ in self._settings]
        )
        self._jobs = transpile(self._jobs, simulator, optimization_level=0)

    def _exact(self, base: QuantumCircuit) -> QuantumCircuit:
        result = base.copy()
        for k, observable in enumerate(self.circuit.observables):
            result.save_expectation_value(Pauli(reversed_bits(observable)), range(self.circuit.n_wires), label=f"o{k}")
        return result

    def _measured(self, base: QuantumCircuit, basis: str) -> QuantumCircuit:
        result = base.copy()
        for wire, letter in enumerate(basis):
            if letter == "Y":
                result.sdg(wire)
            if letter in "XY":
                result.h(wire)
        result.measure_all()
        return result

    def __call__(self, inputs: Tensor, weights: Tensor) -> Tensor:
        """See Compiled."""
        check_call(self.circuit, inputs, weights)
        with torch.no_grad():
            wide, wide_weights = inputs.double().cpu(), weights.double().cpu()
            rows = evaluate_angles(self._angles, wide, wide_weights).numpy()
            if self._features:
                features = evaluate_angles(self._features, wide, wide_weights)
                amplitudes = normalized(features, 2**self.circuit.n_wires).numpy()
                rows = np.concatenate([preparation_angles(amplitudes), rows], axis=1)
        if len(rows) == 0:
            return weights.new_zeros(len(inputs), len(weights), len(self.circuit.observables))
        rows, invalid = split_invalid(rows)
        values = torch.from_numpy(self._run(rows))
        values[torch.from_numpy(invalid)] = torch.nan
        return values.to(weights).reshape(len(inputs), len(weights), -1)

    def _run(self, rows: Real) -> Real:
        """Expectation values (R, n_obs) for rows of bound angles (R, K)."""
        bound = {parameter: rows[:, k].tolist() for k, parameter in enumerate(self._parameters)}
        # Without parameters there is nothing to bind: one run serves all rows.
        repeats = 1 if bound else len(rows)
        runs = len(rows) // repeats
        options: dict[str, Any] = {"seed_simulator": int(self._rng.integers(2**31))}
        if bound:
            options["parameter_binds"] = [bound] * len(self._jobs)
        if self._shots is not None:
            options["shots"] = self._shots
        result = self._simulator.run(self._jobs, **options).result()
        if not result.success:
            raise RuntimeError(f"Aer did not finish {runs * len(self._jobs)} circuits: {result.status}")
        values = np.empty((runs, len(self.circuit.observables)))
        if self._shots is None:
            for row in range(runs):
                data = result.results[row].data
                values[row] = [getattr(data, f"o{k}") for k in range(values.shape[1])]
        else:
            for setting, (_, members) in enumerate(self._settings):
                signs = [_signs(self.circuit.observables[member]) for member in members]
                for row in range(runs):
                    counts = result.results[setting * runs + row].data.counts
                    values[row, list(members)] = _means(counts, signs)
        return np.repeat(values, repeats, axis=0)

    def counts(self, patches: int, filters: int) -> Counter[str]:
        """See Compiled: every patch gate by gate."""
        runs = patches * filters
        return simulation_counts(self.circuit, runs, self._mixed) + device_counts(
            self.circuit, len(self._settings), runs, self._shots
        )


def _signs(observable: str) -> int:
    """Bit mask of the wires whose measured bits multiply to the observable's value; qubit w is bit w."""
    return sum(1 << wire for wire, letter in enumerate(observable) if letter != "I")


def _means(counts: dict[str, int], masks: list[int]) -> list[float]:
    """Means of products of measured signs; Aer's keys are hexadecimal numbers with qubit 0 in the lowest bit."""
    total = sum(counts.values())
    outcomes = [(int(key, 16), n) for key, n in counts.items()]
    return [sum(n * (1 - 2 * ((outcome & mask).bit_count() & 1)) for outcome, n in outcomes) / total for mask in masks]


class QiskitBackend:
    """Qiskit's AerSimulator.

    Args:
        method: Aer's simulation method; by default "statevector", or "density_matrix" where there is noise.
    """

    name = "qiskit"

    def __init__(self, method: str | None = None) -> None:
        if method is not None and method not in AerSimulator().available_methods():
            known = ", ".join(AerSimulator().available_methods())
            raise ValueError(f"Aer has no method {method!r} on this machine: choose from {known}")
        self.method = method

    def compile(
        self, circuit: Circuit, *, shots: int | None = None, noise: NoiseModel | None = None, seed: int | None = None
    ) -> QiskitCompiled:
        """See Backend."""
        check_options(shots, noise, seed)
        if self.method not in (None, "density_matrix") and noise is not None and shots is None:
            raise ValueError(
                f"Aer's method {self.method!r} samples noise but shots=None was asked: give shots, or method "
                "'density_matrix'"
            )
        method = self.method or ("statevector" if noise is None else "density_matrix")
        simulator = AerSimulator(method=method, runtime_parameter_bind_enable=noise is None)
        return QiskitCompiled(circuit, simulator, shots, noise, seed)
