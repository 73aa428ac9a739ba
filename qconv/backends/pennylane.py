"""Any PennyLane device as a backend."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pennylane as qml
import torch
from torch import Tensor

from circuits.circuit import Circuit
from circuits.interop import apply_in_pennylane, pennylane_observable
from circuits.noise import NoiseModel
from qconv.backends.angles import angles_of, evaluate_angles, features_of, normalized
from qconv.backends.protocol import (
    Unsupported,
    check_call,
    check_options,
    device_counts,
    measurement_settings,
    split_invalid,
)
from qconv.backends.statevector import simulation_counts

# Devices written in torch-compatible arithmetic: they take batches and autograd flows through them.
_TORCH_DEVICES = ("default.qubit", "default.mixed")


class PennylaneCompiled:
    """A circuit as a PennyLane QNode; patches and filters are one batch."""

    def __init__(
        self,
        circuit: Circuit,
        device: str,
        options: dict[str, Any],
        shots: int | None,
        noise: NoiseModel | None,
        seed: int | None,
    ) -> None:
        self.circuit = circuit
        self.differentiable = device in _TORCH_DEVICES and shots is None
        self._angles, self._features = angles_of(circuit), features_of(circuit)
        self._shots, self._mixed = shots, device == "default.mixed"
        if shots is not None and seed is not None and device in (*_TORCH_DEVICES, "lightning.qubit"):
            options = {"seed": seed, **options}
        try:
            target = qml.device(device, wires=circuit.n_wires, **options)
        except (qml.exceptions.DeviceError, TypeError) as error:
            raise ValueError(f"PennyLane device {device!r} with options {options} does not load: {error}") from error

        def kernel(angles: Any, state: Any) -> list[Any]:
            apply_in_pennylane(circuit, [angles[..., k] for k in range(len(self._angles))], state, noise)
            return [qml.expval(pennylane_observable(observable)) for observable in circuit.observables]

        if self.differentiable:
            node = qml.QNode(kernel, target, interface="torch", diff_method="backprop")
        else:
            node = qml.QNode(kernel, target, diff_method=None)
        self._node = node if shots is None else qml.set_shots(node, shots=shots)

    def __call__(self, inputs: Tensor, weights: Tensor) -> Tensor:
        """See Compiled."""
        check_call(self.circuit, inputs, weights)
        # PennyLane computes in double precision; its answer is handed back in the caller's.
        wide, wide_weights = inputs.double(), weights.double()
        angles: Any = evaluate_angles(self._angles, wide, wide_weights)
        state: Any = None
        if self._features:
            features = evaluate_angles(self._features, wide, wide_weights)
            state = normalized(features, 2**self.circuit.n_wires).to(torch.complex128)
        rows = len(inputs) * len(weights)
        if rows == 0:
            return weights.new_zeros(len(inputs), len(weights), len(self.circuit.observables))
        invalid = np.zeros(rows, dtype=bool)
        if not self.differentiable:
            angles, invalid = split_invalid(angles.detach().cpu().numpy())
            if state is not None:
                state = state.detach().cpu().numpy()
                lost = ~np.isfinite(state).all(axis=1)
                state[lost] = np.eye(1, state.shape[1])
                invalid |= lost
        results = self._node(angles, state)
        # A circuit without angles is run once and answers with a single number.
        values = torch.stack(
            [torch.as_tensor(np.asarray(r) if not torch.is_tensor(r) else r).expand(rows) for r in results], dim=-1
        )
        if invalid.any():
            values = values.clone()
            values[torch.from_numpy(invalid)] = torch.nan
        return values.to(weights).reshape(len(inputs), len(weights), -1)

    def counts(self, patches: int, filters: int) -> Counter[str]:
        """See Compiled: every patch gate by gate."""
        settings = len(measurement_settings(self.circuit.observables))
        runs = patches * filters
        return simulation_counts(self.circuit, runs, self._mixed) + device_counts(
            self.circuit, settings, runs, self._shots
        )


class PennylaneBackend:
    """Any PennyLane device.

    Args:
        device: Its name, such as "default.qubit", "lightning.qubit" or "default.mixed".
        options: The device's own options.
    """

    name = "pennylane"

    def __init__(self, device: str = "default.qubit", **options: Any) -> None:
        self.device, self.options = device, options

    def compile(
        self, circuit: Circuit, *, shots: int | None = None, noise: NoiseModel | None = None, seed: int | None = None
    ) -> PennylaneCompiled:
        """See Backend."""
        check_options(shots, noise, seed)
        if noise is not None and self.device != "default.mixed":
            raise Unsupported(
                f"PennyLane device {self.device!r} was asked for noise: use "
                "backend=load_backend('pennylane', device='default.mixed'), or backend 'fourier' or 'qiskit'"
            )
        return PennylaneCompiled(circuit, self.device, self.options, shots, noise, seed)
