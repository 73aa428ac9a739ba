"""Unitaries of circuits, of ours by the oracle and of PennyLane's and Qiskit's by those libraries."""

import numpy as np
import oracle

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
