"""Ansaetze beside the libraries that they come from: unitaries, phase included where no gate differs by one."""

import numpy as np
import pytest

from circuits.ansatze import ansatz
from circuits.ansatze.layered import ENTANGLEMENTS
from circuits.circuit import Circuit, Gate, const
from qconv.kernel_checks import check_kernels, deviation, summary, unitary_of
from qconv.kernel_list import kernel_rows

EXACT = 1e-10


def drawn(block, seed=0):
    return np.random.default_rng(seed).uniform(-np.pi, np.pi, block.n_weights)


def pennylane_unitary(apply, wires):
    qml = pytest.importorskip("pennylane")
    return np.asarray(qml.matrix(apply, wire_order=range(wires))())


def qiskit_unitary(circuit):
    info = pytest.importorskip("qiskit.quantum_info")
    return np.asarray(info.Operator(circuit.reverse_bits()).data)


@pytest.mark.parametrize(("wires", "depth", "ranges"), [(2, 1, None), (3, 4, None), (4, 3, (2, 3, 1)), (5, 2, (4, 4))])
def test_strongly_entangling(wires, depth, ranges):
    qml = pytest.importorskip("pennylane")
    block = ansatz("strongly_entangling", wires, depth, ranges=ranges)
    weights = drawn(block).reshape(depth, wires, 3)
    theirs = pennylane_unitary(lambda: qml.StronglyEntanglingLayers(weights, range(wires), ranges=ranges), wires)
    np.testing.assert_allclose(unitary_of(block, weights.ravel()), theirs, atol=EXACT)


@pytest.mark.parametrize("rotation", ["RX", "RY", "RZ"])
@pytest.mark.parametrize("wires", [1, 2, 3, 4])
def test_basic_entangler(wires, rotation):
    qml = pytest.importorskip("pennylane")
    block = ansatz("basic_entangler", wires, 2, rotation=rotation)
    weights = drawn(block).reshape(2, wires)
    gate = getattr(qml, rotation)
    theirs = pennylane_unitary(lambda: qml.BasicEntanglerLayers(weights, range(wires), rotation=gate), wires)
    np.testing.assert_allclose(unitary_of(block, weights.ravel()), theirs, atol=EXACT)


@pytest.mark.parametrize("wires", [2, 3, 5])
def test_simplified_two_design(wires):
    qml = pytest.importorskip("pennylane")
    block = ansatz("simplified_two_design", wires, 3)
    weights = drawn(block)
    first, rest = weights[:wires], weights[wires:].reshape(3, wires - 1, 2)
    theirs = pennylane_unitary(lambda: qml.SimplifiedTwoDesign(first, rest, range(wires)), wires)
    np.testing.assert_allclose(unitary_of(block, weights), theirs, atol=EXACT)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("wires", "rotations", "ratio"), [(1, 3, 0.3), (3, None, 0.3), (4, 7, 0.6)])
def test_random_layers_are_pennylanes_for_the_same_seed(wires, rotations, ratio, seed):
    qml = pytest.importorskip("pennylane")
    block = ansatz("random_layers", wires, 2, seed, rotations=rotations, ratio=ratio)
    weights = drawn(block).reshape(2, -1)
    template = qml.RandomLayers(weights, range(wires), ratio_imprim=ratio, seed=seed)
    theirs = [(op.name, tuple(op.wires), *op.parameters) for op in template.decomposition()]
    flat = weights.ravel()
    ours = [(gate.name, gate.wires, *(flat[angle.index] for angle in gate.angles)) for gate in block.gates]
    assert ours == theirs


def real_block(weights, wires):
    import pennylane as qml

    qml.RY(weights[0], wires=wires[0])
    qml.RY(weights[1], wires=wires[1])
    qml.CNOT(wires=wires)


@pytest.mark.parametrize(("name", "template", "wires"), [("ttn", "TTN", 8), ("mps", "MPS", 5), ("ttn", "TTN", 2)])
def test_tree_and_chain(name, template, wires):
    qml = pytest.importorskip("pennylane")
    block = ansatz(name, wires, 1)
    weights = drawn(block)
    theirs = pennylane_unitary(
        lambda: getattr(qml, template)(range(wires), 2, real_block, 2, weights.reshape(-1, 2)), wires
    )
    np.testing.assert_allclose(unitary_of(block, weights), theirs, atol=EXACT)


@pytest.mark.parametrize("entanglement", ENTANGLEMENTS)
@pytest.mark.parametrize(
    ("name", "function"), [("real_amplitudes", "real_amplitudes"), ("efficient_su2", "efficient_su2")]
)
@pytest.mark.parametrize(("wires", "depth"), [(1, 1), (2, 2), (3, 4), (4, 3)])
def test_local_circuits_of_qiskit(name, function, entanglement, wires, depth):
    library = pytest.importorskip("qiskit.circuit.library")
    block = ansatz(name, wires, depth, entanglement=entanglement)
    weights = drawn(block)
    circuit = getattr(library, function)(wires, entanglement=entanglement, reps=depth).assign_parameters(weights)
    np.testing.assert_allclose(unitary_of(block, weights), qiskit_unitary(circuit), atol=EXACT)


def test_hardware_efficient_beside_qiskits_n_local():
    library = pytest.importorskip("qiskit.circuit.library")
    block = ansatz("hardware_efficient", 4, 2)
    weights = drawn(block)
    circuit = library.n_local(4, ["rz", "rx", "rz"], "cz", entanglement="linear", reps=2).assign_parameters(weights)
    np.testing.assert_allclose(unitary_of(block, weights), qiskit_unitary(circuit), atol=EXACT)


def test_convolution_block_of_qiskits_tutorial():
    # As its text has it, on qubits 0 and 1.
    qiskit = pytest.importorskip("qiskit")
    block = ansatz("vatan_williams", 3, 1)
    weights = drawn(block)
    circuit = qiskit.QuantumCircuit(3)
    for (a, b), own in (((0, 1), weights[:3]), ((1, 2), weights[3:])):
        circuit.rz(-np.pi / 2, b)
        circuit.cx(b, a)
        circuit.rz(own[0], a)
        circuit.ry(own[1], b)
        circuit.cx(a, b)
        circuit.ry(own[2], b)
        circuit.cx(b, a)
        circuit.rz(np.pi / 2, a)
    np.testing.assert_allclose(unitary_of(block, weights), qiskit_unitary(circuit), atol=EXACT)


def test_checks_find_what_differs():
    circuit = Circuit(2, (Gate("RX", (0,), (const(0.3),)), Gate("CNOT", (0, 1))))
    one = unitary_of(circuit, np.zeros(0))
    assert deviation(one, np.exp(0.7j) * one) < 1e-14
    assert deviation(one, one @ np.diag([1, 1, 1, -1])) > 0.1
    assert deviation(np.eye(2, dtype=complex), np.array([[0, 1], [1, 0]], dtype=complex)) > 0.5


def test_every_kernel_agrees_with_every_peer():
    pytest.importorskip("pennylane")
    pytest.importorskip("qiskit")
    checks = list(check_kernels(wires=3, depth=2, seed=1))
    names = {row.name for row in kernel_rows(3)}
    for peer, encoding in (("pennylane", "encoding iqp"), ("qiskit", "encoding zz")):
        assert {check.name for check in checks if check.peer == peer} == names | {encoding}
    assert [check for check in checks if not check.passed] == []
    assert "all agree" in summary(checks)
