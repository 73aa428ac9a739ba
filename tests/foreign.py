"""What goes to other libraries, and unitaries: of circuits by the oracle, of PennyLane's and Qiskit's by those."""

import numpy as np
import oracle
import pytest

from circuits import GATES, Angle, Gate, kernel_names

X = np.array([0.31, -0.87, 0.44, 1.93, -0.12, 0.66])
W = np.linspace(-2.9, 2.7, 120) ** 3 / 7


def unitary(circuit):
    total = np.eye(2**circuit.n_wires)
    for gate in circuit.gates:
        values = [oracle.angle_value(angle, X, W) for angle in gate.angles]
        total = oracle.gate_matrix(gate, values, circuit.n_wires) @ total
    return total


def pennylane_unitary(fn, n_wires, *arguments):
    import pennylane as qml

    return qml.matrix(fn, wire_order=range(n_wires))(*arguments)


def qiskit_unitary(qc, values=None):
    """Of a QuantumCircuit whose Parameters called x... are our features and whose others, in order, our weights."""
    from qiskit.quantum_info import Operator

    if values is None:
        values = {p: (X if p.vector.name == "x" else W)[p.index] for p in qc.parameters}
    return Operator(qc.assign_parameters(values).reverse_bits()).data


def assert_same_up_to_phase(found, expected):
    place = np.unravel_index(np.abs(expected).argmax(), expected.shape)
    phase = found[place] / expected[place]
    assert abs(abs(phase) - 1) < 1e-12
    np.testing.assert_allclose(found, phase * expected, atol=1e-12)


LIBRARY = kernel_names()


def every_gate():
    """Each gate of the table once, on wires that are neither in order nor neighbors."""
    gates = []
    for name, spec in GATES.items():
        if spec.n_wires is not None:
            angles = [Angle("weight", k, 0.7, -0.2) for k in range(spec.n_angles)]
            gates.append(Gate(name, (3, 0, 2)[: spec.n_wires], angles))
    return gates


EVERY_GATE = [pytest.param(gate, id=gate.name) for gate in every_gate()]
