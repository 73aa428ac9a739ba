"""Peers that run one circuit after another, written in C++."""

import importlib
import math
from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.peer import TOO_WIDE, TorchPeer, one_thread_if_small, single_limit
from benchmarks.workloads import ERROR, Workload


class Lightning(TorchPeer):
    """PennyLane's C++ simulator with adjoint gradients, one patch after another."""

    name, package, module = "PennyLane lightning", "pennylane-lightning", "pennylane_lightning"
    note = "lightning.qubit, adjoint gradients, one patch after another"
    batch_limit = 1

    def __init__(self, workload: Workload) -> None:
        super().__init__(workload)
        self.limit = single_limit(workload, 100)
        one_thread_if_small(workload)

    @classmethod
    def cannot(cls, workload: Workload) -> str | None:
        """See Peer."""
        if workload.noise:
            return "no noise channels"
        if workload.batches is not None or workload.filters > 1:
            return "one patch costs milliseconds: W1 shows it"
        return "minutes a patch" if workload.wires > TOO_WIDE else None

    @cached_property
    def node(self) -> Callable[[Tensor, Tensor], list[Tensor]]:
        """The circuit."""
        qml: Any = importlib.import_module("pennylane")
        w = self.workload
        device = qml.device("lightning.qubit", wires=w.wires, c_dtype=np.complex64)

        def circuit(x: Tensor, weights: Tensor) -> list[Any]:
            for move, i, k in w.moves():
                if move == "encode":
                    qml.RY(math.pi * x[k], wires=i)
                elif move == "rot":
                    qml.Rot(*weights[k, i], wires=i)
                else:
                    qml.CNOT(wires=(i, k))
            return [qml.expval(qml.Z(wire)) for wire in range(w.wires)]

        # device_vjp: one adjoint sweep a patch instead of one an output.
        return qml.QNode(circuit, device, interface="torch", diff_method="adjoint", device_vjp=True)  # type: ignore[no-any-return]

    def evaluate(self, patches: Tensor, weights: Tensor) -> Tensor:
        """See TorchPeer."""
        return torch.stack([torch.stack(self.node(patch, weights)) for patch in patches])


class Qulacs(TorchPeer):
    """One circuit object whose angles are set for each patch; gradients by its own backprop, also one a patch."""

    name, package, module = "qulacs", "qulacs", "qulacs"
    note = "one patch after another; gradients of weights and inputs by its backprop, one call a patch"
    batch_limit = 1

    def __init__(self, workload: Workload) -> None:
        super().__init__(workload)
        self.limit = single_limit(workload, 50 if workload.noise else 2000)
        one_thread_if_small(workload)
        if workload.noise:
            self.differentiates, self.note = False, "density matrix, one patch after another; no gradients there"
        elif workload.wires > TOO_WIDE:
            self.differentiates, self.note = False, "one patch; values only, its backprop takes minutes here"

    @classmethod
    def cannot(cls, workload: Workload) -> str | None:
        """See Peer."""
        return None

    @cached_property
    def circuit(self) -> tuple[Any, list[tuple[bool, int]]]:
        """The circuit, and for each angle (is it an input, index into inputs or flat weights)."""
        qulacs: Any = importlib.import_module(self.module)
        noise: Any = importlib.import_module("qulacs.gate").DepolarizingNoise
        w = self.workload
        circuit = qulacs.ParametricQuantumCircuit(w.wires)
        angles: list[tuple[bool, int]] = []
        for move, i, k in w.moves():
            if move == "encode":
                circuit.add_parametric_RY_gate(i, 0.0)
                angles.append((True, k))
            elif move == "rot":
                first = 3 * (k * w.wires + i)
                circuit.add_parametric_RZ_gate(i, 0.0)
                circuit.add_parametric_RY_gate(i, 0.0)
                circuit.add_parametric_RZ_gate(i, 0.0)
                angles += [(False, first), (False, first + 1), (False, first + 2)]
            else:
                circuit.add_CNOT_gate(i, k)
                if w.noise:
                    circuit.add_gate(noise(i, ERROR))
                    circuit.add_gate(noise(k, ERROR))
        return circuit, angles

    def set_angles(self, inputs: list[float], weights: list[float]) -> None:
        """Its rotations turn the other way."""
        circuit, angles = self.circuit
        for position, (is_input, index) in enumerate(angles):
            circuit.set_parameter(position, -math.pi * inputs[index] if is_input else -weights[index])

    def run_patches(self, patches: Tensor, weights: Tensor) -> Tensor:
        """Expectation values (P, wires)."""
        qulacs: Any = importlib.import_module(self.module)
        wires = self.workload.wires
        circuit, angles = self.circuit
        state = (qulacs.DensityMatrix if self.workload.noise else qulacs.QuantumState)(wires)
        observables = [self.observable({wire: 1.0}) for wire in range(wires)]
        uploads = [(position, index) for position, (is_input, index) in enumerate(angles) if is_input]
        self.set_angles([0.0] * wires, weights.flatten().tolist())
        values = np.empty((len(patches), wires), dtype=np.float32)
        for row, patch in zip(values, (-math.pi * patches).tolist(), strict=True):
            for position, index in uploads:
                circuit.set_parameter(position, patch[index])
            state.set_zero_state()
            circuit.update_quantum_state(state)
            row[:] = [observable.get_expectation_value(state) for observable in observables]
        return torch.from_numpy(values)

    def observable(self, coefficients: dict[int, float]) -> Any:
        """A weighted sum of Z."""
        result = importlib.import_module(self.module).Observable(self.workload.wires)
        for wire, coefficient in coefficients.items():
            result.add_operator(coefficient, f"Z {wire}")
        return result

    def backpropagate(self, patches: Tensor, weights: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of sum(upstream * values) with respect to patches and weights."""
        circuit, angles = self.circuit
        flat = weights.flatten().tolist()
        table = np.empty((len(patches), len(angles)))
        for row, patch, scales in zip(table, patches.tolist(), upstream.tolist(), strict=True):
            self.set_angles(patch, flat)
            row[:] = circuit.backprop(self.observable(dict(enumerate(scales))))
        inputs = np.zeros((len(patches), self.workload.wires))
        total = np.zeros(len(flat))
        for column, (is_input, index) in zip(table.T, angles, strict=True):
            if is_input:
                inputs[:, index] -= math.pi * column
            else:
                total[index] -= column.sum()
        return torch.from_numpy(inputs).to(patches), torch.from_numpy(total).to(weights).reshape(weights.shape)

    def evaluate(self, patches: Tensor, weights: Tensor) -> Tensor:
        """See TorchPeer."""
        result: Tensor = _QulacsFunction.apply(patches, weights, self)  # type: ignore[no-untyped-call]
        return result


class _QulacsFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, patches: Tensor, weights: Tensor, peer: Qulacs) -> Tensor:
        ctx.save_for_backward(patches, weights)
        ctx.peer = peer
        return peer.run_patches(patches.detach(), weights.detach())

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor, None]:
        return *ctx.peer.backpropagate(*ctx.saved_tensors, *upstream), None


class Aer(TorchPeer):
    """One circuit, all patches bound as run-time parameters; forward only."""

    name, package, module = "Qiskit Aer", "qiskit-aer", "qiskit_aer"
    note = "run-time parameter binds, double precision; it has no gradients"
    differentiates = False

    def __init__(self, workload: Workload) -> None:
        super().__init__(workload)
        self.limit = single_limit(workload, 2000)

    @classmethod
    def cannot(cls, workload: Workload) -> str | None:
        """See Peer."""
        return "no gradients" if workload.batches is not None else None

    @cached_property
    def circuit(self) -> tuple[Any, Any, Any, Any]:
        """Simulator, circuit, and the parameters of inputs and weights."""
        aer: Any = importlib.import_module(self.module)
        noise: Any = importlib.import_module("qiskit_aer.noise")
        qiskit: Any = importlib.import_module("qiskit")
        pauli: Any = importlib.import_module("qiskit.quantum_info").Pauli
        vector: Any = importlib.import_module("qiskit.circuit").ParameterVector
        w = self.workload
        inputs, weights = vector("x", w.wires), vector("w", 3 * w.wires * w.layers)
        circuit = qiskit.QuantumCircuit(w.wires)
        for move, i, k in w.moves():
            if move == "encode":
                circuit.ry(inputs[k], i)
            elif move == "rot":
                first = 3 * (k * w.wires + i)
                circuit.u(weights[first + 1], weights[first + 2], weights[first], i)
            else:
                circuit.cx(i, k)
        for wire in range(w.wires):
            circuit.save_expectation_value(pauli("Z"), [wire], label=str(wire))
        options: dict[str, Any] = {"method": "density_matrix" if w.noise else "statevector"}
        if w.noise:
            # Qiskit's parameter mixes with the identity too: 4/3 of the probability of an error.
            single = noise.depolarizing_error(4 * ERROR / 3, 1)
            options["noise_model"] = noise.NoiseModel()
            options["noise_model"].add_all_qubit_quantum_error(single.tensor(single), ["cx"])
        simulator = aer.AerSimulator(**options, runtime_parameter_bind_enable=True)
        return simulator, circuit, inputs, weights

    def evaluate(self, patches: Tensor, weights: Tensor) -> Tensor:
        """See TorchPeer."""
        simulator, circuit, x, w = self.circuit
        binds = dict(zip(x, (math.pi * patches).T.tolist(), strict=True))
        binds |= {angle: [value] * len(patches) for angle, value in zip(w, weights.flatten().tolist(), strict=True)}
        results = simulator.run(circuit, parameter_binds=[binds], shots=1).result()
        return torch.tensor(
            [[results.data(row)[str(wire)] for wire in range(self.workload.wires)] for row in range(len(patches))]
        )
