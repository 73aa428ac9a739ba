"""Peers that take all patches at once, as torch tensors."""

import importlib
import math
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from benchmarks.hollow import hollow_modules
from benchmarks.peer import TorchPeer, signs, too_wide
from benchmarks.workloads import ERROR, Workload


class Pennylane(TorchPeer):
    """One broadcast QNode over all patches, differentiated by backprop."""

    name, package, module = "PennyLane", "pennylane", "pennylane"
    note = "default.qubit or, with noise, default.mixed; double precision inside, as its users get it"

    @classmethod
    def cannot(cls, workload: Workload) -> str | None:
        """See Peer."""
        return too_wide(workload)

    @cached_property
    def node(self) -> Callable[[Tensor, Tensor], Tensor]:
        """The circuit."""
        qml: Any = importlib.import_module(self.module)
        w = self.workload
        device = qml.device("default.mixed" if w.noise else "default.qubit", wires=w.wires)

        def circuit(x: Tensor, weights: Tensor) -> Any:
            for move, i, k in w.moves():
                if move == "encode":
                    qml.RY(math.pi * x[:, k], wires=i)
                elif move == "rot":
                    qml.Rot(*weights[k, i], wires=i)
                else:
                    qml.CNOT(wires=(i, k))
                    if w.noise:
                        qml.DepolarizingChannel(ERROR, wires=i)
                        qml.DepolarizingChannel(ERROR, wires=k)
            return qml.probs(wires=range(w.wires))  # cheaper than one expectation value after another

        return qml.QNode(circuit, device, interface="torch", diff_method="backprop")  # type: ignore[no-any-return]

    def evaluate(self, patches: Tensor, weights: Tensor) -> Tensor:
        """See TorchPeer."""
        probabilities = self.node(patches, weights)
        return probabilities @ signs(self.workload.wires).to(probabilities)


class Torchquantum(TorchPeer):
    """Batched state vectors in plain torch, gates as functions."""

    name, package, module = "torchquantum", "torchquantum", "torchquantum"

    @classmethod
    def cannot(cls, workload: Workload) -> str | None:
        """See Peer."""
        if workload.noise:
            return "no depolarizing channel inside a differentiable circuit"
        return too_wide(workload)

    @cached_property
    def library(self) -> Any:
        """The package, without what it imports for other purposes."""
        with hollow_modules(
            "torchquantum.plugin",
            "torchquantum.dataset",
            "torchquantum.pulse",
            "torchquantum.noise_model",
            "torchpack",
            "torchdiffeq",
            "pathos",
            "qiskit_ibm_runtime",
            "qiskit.providers.aer",
        ):
            return importlib.import_module(self.module)

    def evaluate(self, patches: Tensor, weights: Tensor) -> Tensor:
        """See TorchPeer."""
        w, tq = self.workload, self.library
        functional = tq.functional
        device = tq.QuantumDevice(n_wires=w.wires, bsz=len(patches))
        for move, i, k in w.moves():
            if move == "encode":
                functional.ry(device, wires=i, params=math.pi * patches[:, k], comp_method="einsum")
            elif move == "rot":
                functional.rot(device, wires=i, params=weights[k, i][None], comp_method="einsum")
            else:
                functional.cnot(device, wires=[i, k], comp_method="einsum")
        values: Tensor = device.get_states_1d().abs().square() @ signs(w.wires)
        return values


class Deepquantum(TorchPeer):
    """Its circuit vectorized over the patches by torch.vmap."""

    name, package, module = "deepquantum", "deepquantum", "deepquantum"

    @classmethod
    def cannot(cls, workload: Workload) -> str | None:
        """See Peer."""
        return too_wide(workload)

    @cached_property
    def circuit(self) -> tuple[Any, list[tuple[Any, int, int]]]:
        """The circuit, and its trained gates with their wire and layer."""
        w = self.workload
        circuit = importlib.import_module(self.module).QubitCircuit(w.wires, den_mat=w.noise, reupload=w.uploads > 1)
        trained = []
        angle = math.asin(math.sqrt(ERROR))  # its channels take the angle whose squared sine is the probability
        for move, i, k in w.moves():
            if move == "encode":
                circuit.ry(i, encode=True)
            elif move == "rot":
                circuit.u3(i, inputs=[0.0, 0.0, 0.0])
                trained.append((circuit.operators[-1], i, k))
            else:
                circuit.cnot(i, k)
                if w.noise:
                    circuit.depolarizing(i, inputs=angle)
                    circuit.depolarizing(k, inputs=angle)
        return circuit, trained

    def evaluate(self, patches: Tensor, weights: Tensor) -> Tensor:
        """See TorchPeer."""
        circuit, trained = self.circuit
        for gate, wire, layer in trained:
            phi, theta, omega = weights[layer, wire]
            gate.init_para(torch.stack([theta, omega, phi]))  # U3 is Rot up to a global phase
        state: Tensor = circuit(math.pi * patches)
        if self.workload.noise:
            probabilities = state.diagonal(dim1=-2, dim2=-1).real
        else:
            probabilities = state.squeeze(-1).abs().square()
        return probabilities @ signs(self.workload.wires)
