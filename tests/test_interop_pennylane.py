import numpy as np
import pytest
import torch
from foreign import EVERY_GATE, LIBRARY, W, X, assert_same_up_to_phase, pennylane_unitary, unitary
from hypothesis import given
from strategies import circuits

from circuits import (
    Angle,
    Circuit,
    Gate,
    const,
    encode,
    from_pennylane,
    kernel,
)
from qconv import QuantumConv2d


@given(circuits())
def test_pennylane_function_is_the_circuit_and_comes_back(circuit):
    pytest.importorskip("pennylane")
    function = circuit.to_pennylane()
    assert_same_up_to_phase(pennylane_unitary(function, circuit.n_wires, X, W), unitary(circuit))
    back = from_pennylane(function, len(X), len(W))
    assert_same_up_to_phase(unitary(back), unitary(circuit))
    assert back.observables == circuit.observables


def test_wires_that_nothing_acts_on_come_back_from_pennylane():
    qml = pytest.importorskip("pennylane")
    circuit = Circuit(3, (Gate("RX", (0,), (Angle("weight", 0),)),), ("ZII",))
    assert from_pennylane(circuit.to_pennylane()) == circuit
    assert from_pennylane(qml.QNode(circuit.to_pennylane(), qml.device("default.qubit"))) == circuit
    assert from_pennylane(Circuit(2).to_pennylane()) == Circuit(2)


@pytest.mark.parametrize("gate", EVERY_GATE)
def test_every_gate_goes_to_pennylane_and_comes_back(gate):
    pytest.importorskip("pennylane")
    circuit = Circuit(4, (gate,), ("ZIII",))
    assert_same_up_to_phase(pennylane_unitary(circuit.to_pennylane(), 4, X, W), unitary(circuit))
    back = from_pennylane(circuit.to_pennylane())
    assert_same_up_to_phase(unitary(back), unitary(circuit))
    # Only the root of the swap is no operation of PennyLane.
    assert (back == circuit) == (not gate.name.startswith("SQSWAP"))


@pytest.mark.parametrize("encoding", ["angle", "amplitude"])
@pytest.mark.parametrize("name", LIBRARY)
def test_library_circuits_come_back_from_pennylane_as_they_were(name, encoding):
    pytest.importorskip("pennylane")
    circuit = kernel(name, 4, depth=2, encoding=encoding)
    # The number of weights is found by tracing.
    assert from_pennylane(circuit.to_pennylane()) == circuit


def test_amplitudes_are_normalized_in_pennylane():
    qml = pytest.importorskip("pennylane")
    circuit = encode("amplitude", 3).with_observables(("ZI", "IZ"))
    node = qml.QNode(circuit.to_pennylane(), qml.device("default.qubit", wires=2))
    np.testing.assert_allclose(node(np.array([3.0, 0.0, 4.0])), [0.36 - 0.64, 1.0], atol=1e-12)
    np.testing.assert_allclose(node([3.0, 0.0, 4.0]), [0.36 - 0.64, 1.0], atol=1e-12)


def test_pennylane_functions_take_batches_and_gradients_flow():
    qml = pytest.importorskip("pennylane")
    circuit = kernel("strongly_entangling", 2, depth=1)
    node = qml.QNode(circuit.to_pennylane(), qml.device("default.qubit"), diff_method="backprop")
    inputs = torch.rand(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    weights = torch.linspace(0.1, 2, 6, dtype=torch.float64)
    values = torch.stack(node(inputs, weights), dim=-1)
    layer = QuantumConv2d(1, 2, (1, 2), kernel=circuit, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(weights[None])
    images = inputs.detach().reshape(5, 1, 1, 2).requires_grad_()
    torch.testing.assert_close(layer(images).flatten(1), values)
    (ours,) = torch.autograd.grad(layer(images).square().sum(), images)
    (theirs,) = torch.autograd.grad(values.square().sum(), inputs)
    torch.testing.assert_close(ours.flatten(1), theirs)


def _angles_and_layers(qml, inputs, weights):
    qml.AngleEmbedding(np.pi * inputs - 0.25, wires=range(4), rotation="Y")
    qml.StronglyEntanglingLayers(weights, wires=range(4))


def _adjoint_and_controlled(qml, inputs, weights):
    qml.ctrl(qml.Rot, control=2)(inputs[0], weights[0, 0, 1], 0.3, wires=0)
    qml.adjoint(qml.StronglyEntanglingLayers)(weights, wires=range(4))
    qml.ctrl(qml.U3(0.3, inputs[1] / 2, weights[0, 0, 2], wires=1), control=3, control_values=[0])
    qml.adjoint(qml.U3)(0.3, -inputs[1], weights[0, 0, 2], wires=1)
    qml.ctrl(qml.S(0), control=1)


def _odd_operations(qml, inputs, weights):
    qml.PauliRot(2 * inputs[0], "XZY", wires=[2, 0, 3])
    qml.PauliRot(inputs[1], "XZ", wires=[2, 0])
    qml.MultiRZ(-weights[1, 3, 2], wires=[1, 2, 3])
    qml.SingleExcitation(inputs[2] + 1, wires=[3, 1])
    qml.IsingXY(inputs[3], wires=[0, 3])
    qml.PSWAP(weights[0, 0, 0] * 3, wires=[2, 1])
    qml.QubitUnitary(np.eye(4)[[0, 1, 3, 2]], wires=[0, 2])
    qml.QFT(wires=[1, 0, 2])
    qml.U2(inputs[0], 0.5 * weights[0, 1, 0], wires=1)
    qml.prod(qml.RX(inputs[0], 0), qml.RY(inputs[1], 0))
    qml.BasisState([1, 0], wires=[1, 3])
    qml.GlobalPhase(0.3)
    qml.Barrier(wires=[0, 1])
    qml.Identity(2)


def _controlled_rotations(qml, inputs, weights):
    for wire in range(4):
        qml.Hadamard(wire)
    qml.ctrl(qml.RX(weights[0, 0, 0], 2), [0, 1])
    qml.ctrl(qml.RY(2 * inputs[0], 0), [3, 1, 2], control_values=[0, 1, 0])
    qml.ctrl(qml.RZ(weights[0, 0, 1], 2), [0, 3])
    qml.ctrl(qml.PhaseShift(weights[0, 0, 2], 1), [2, 0, 3])
    qml.ctrl(qml.IsingXX(inputs[1], [3, 0]), [1, 2])
    qml.adjoint(qml.ctrl(qml.IsingYY(weights[1, 0, 0], [3, 0]), [1, 2]))
    qml.FermionicSWAP(3 * weights[1, 0, 1], [2, 0])


def _other_layers(qml, inputs, weights):
    qml.AngleEmbedding(inputs[::-1], wires=range(4), rotation="X")
    qml.BasicEntanglerLayers(weights[:, :, 0], wires=range(4), rotation=qml.RZ)
    qml.SimplifiedTwoDesign(weights[0, :, 1], weights[1:, :3, 1:], wires=range(4))
    qml.RandomLayers(weights[:, :, 2], wires=range(4), seed=5)


BODIES = [_angles_and_layers, _adjoint_and_controlled, _odd_operations, _controlled_rotations, _other_layers]


@pytest.mark.parametrize("body", BODIES)
def test_pennylane_operations_and_templates_are_read(body):
    qml = pytest.importorskip("pennylane")

    def function(inputs, weights):
        body(qml, inputs, weights)

    circuit = from_pennylane(function, 4, (2, 4, 3))
    assert circuit.n_inputs <= 4
    assert circuit.n_weights <= 24
    expected = pennylane_unitary(function, 4, X[:4], W[:24].reshape(2, 4, 3))
    assert_same_up_to_phase(unitary(circuit), expected)
    assert circuit.observables == ("ZIII", "IZII", "IIZI", "IIIZ")


def test_strongly_entangling_layers_are_our_kernel():
    qml = pytest.importorskip("pennylane")

    def function(inputs, weights):
        qml.AngleEmbedding(np.pi * inputs, wires=range(4), rotation="Y")
        qml.StronglyEntanglingLayers(weights, wires=range(4))
        return [qml.expval(qml.Z(wire)) for wire in range(4)]

    assert from_pennylane(function, 4, (2, 4, 3)) == kernel("strongly_entangling", 4, depth=2)


def test_wires_of_qnodes_labels_and_measurements():
    qml = pytest.importorskip("pennylane")

    @qml.qnode(qml.device("default.qubit", wires=["a", "b", "c"]))
    def node(inputs):
        qml.RX(inputs[1], "c")
        qml.CNOT(["c", "a"])
        return qml.expval(qml.X("c") @ qml.Y("a")), qml.expval(qml.Z("b"))

    gates = (Gate("RX", (2,), (Angle("input", 1),)), Gate("CNOT", (2, 0)))
    assert from_pennylane(node) == Circuit(3, gates, ("YIX", "IZI"))
    turned = from_pennylane(node, wires=["c", "b", "a"])
    assert turned == Circuit(3, (Gate("RX", (0,), gates[0].angles), Gate("CNOT", (0, 2))), ("XIY", "IZI"))
    # Without a device: whole numbers as they are, other labels as they come.
    assert from_pennylane(qml.tape.QuantumScript([qml.X(2)])).n_wires == 3
    assert from_pennylane(node.func).observables == ("XYI", "IIZ")


def test_trainable_parameters_of_a_tape():
    qml = pytest.importorskip("pennylane")
    with qml.tape.QuantumTape() as tape:
        qml.RX(0.1, 0)
        qml.BasicEntanglerLayers(np.array([[0.2, 0.3]]), wires=[0, 1])
        qml.RY(0.4, 1)
        qml.expval(qml.Z(1))

    def angles(circuit):
        return [angle for gate in circuit.gates for angle in gate.angles]

    assert angles(from_pennylane(tape)) == [Angle("weight", k) for k in range(4)]
    assert from_pennylane(tape).observables == ("IZ",)
    assert angles(from_pennylane(tape, 2)) == [
        *(Angle("input", k) for k in (0, 1)),
        *(Angle("weight", k) for k in (0, 1)),
    ]
    tape.trainable_params = [2]
    assert angles(from_pennylane(tape)) == [const(0.1), const(0.2), const(0.3), Angle("weight", 0)]
    with pytest.raises(ValueError, match="1 trainable numbers but n_inputs is 2"):
        from_pennylane(tape, 2)


def nothing(operation):
    """What a function returns that only queues an operation."""


def pennylane_error(act, **sizes):
    import pennylane as qml

    def function(inputs, weights):
        qml.Hadamard(0)
        return act(qml, inputs, weights)

    with pytest.raises(ValueError) as error:
        from_pennylane(function, **sizes)
    return str(error.value)


@pytest.mark.parametrize(
    ("act", "says"),
    [
        (lambda q, x, w: q.RX(np.sin(x[0]), 0), "after 1 operations (the last is Hadamard)"),
        (lambda q, x, w: q.RX(x[0] * w[0], 0), "(x[0]) * (w[0]) is a product"),
        (lambda q, x, w: q.RX(1 / x[0], 0), "1 / (x[0]) divides"),
        (lambda q, x, w: q.RX(x[0] ** 0.5, 0), "** 0.5 is no product of features"),
        (lambda q, x, w: q.RX(x[0] * w[0], 0), "is a product with a weight"),
        (lambda q, x, w: q.RX(0.1 if x[0] > 0 else 0.2, 0), "comparison of x[0]"),
        (lambda q, x, w: q.RX(0.1 if x[0] == 0 else 0.2, 0), "comparison of x[0]"),
        (lambda q, x, w: q.RX(0.1 if x[0] != w[0] else 0.2, 0), "comparison of x[0]"),
        (lambda q, x, w: q.exp(q.X(0) @ q.Z(1), -0.5j * w[0]), "as a Pauli rotation"),
        (lambda q, x, w: q.evolve(q.X(0) @ q.Z(1), w[0]), "as a Pauli rotation"),
        (lambda q, x, w: q.AngleEmbedding(x, wires=[0]), "its features as a whole"),
        (lambda q, x, w: q.BasicEntanglerLayers(w, wires=[0]), "its weights as a whole"),
        (lambda q, x, w: q.RX(x[-1], 0), "its features as a whole"),
        (lambda q, x, w: nothing(q.RX(x[0] + w[1], 0)), "operation 1 (RX) cannot be read: x[0] + w[1] depends on"),
        (lambda q, x, w: nothing(q.measure(0)), "operation 1 (MidMeasure"),
        (lambda q, x, w: nothing(q.IQPEmbedding(w[:2], wires=[0, 1])), "operation 1 (IQPEmbedding) cannot be read"),
        (lambda q, x, w: q.probs(wires=0), "measurement 0 is probs(wires=[0]): only expectation values"),
        (lambda q, x, w: q.probs(wires=0), "readout='probabilities'"),
        (lambda q, x, w: q.expval(q.Z(0) + q.X(0)), "it must be one Pauli word"),
        (lambda q, x, w: q.expval(2 * q.Z(0)), "with coefficient 1"),
        (lambda q, x, w: q.expval(q.Identity(0)), "not the identity"),
        (lambda q, x, w: 3.0, "returns 3.0 as result 0"),
    ],
)
def test_what_pennylane_functions_must_not_do_is_named(act, says):
    pytest.importorskip("pennylane")
    assert says in pennylane_error(act)


def test_operations_are_not_known_by_their_names_alone():
    qml = pytest.importorskip("pennylane")

    class PauliX(qml.operation.Operation):
        num_wires = 1

        @staticmethod
        def compute_decomposition(wires):
            return [qml.Hadamard(wires)]

    class Barrier(PauliX):
        pass

    class U3(qml.operation.Operation):
        num_params, num_wires = 3, 1

        @staticmethod
        def compute_decomposition(*angles, wires):
            return [qml.RX(angles[0], wires), qml.RZ(angles[1], wires), qml.RX(angles[2], wires)]

    def function(inputs, weights):
        PauliX(0)
        Barrier(1)
        qml.ctrl(U3(weights[0], weights[1], weights[2], wires=1), control=0)

    angles = [Angle("weight", k) for k in range(3)]
    expected = [
        Gate("H", (0,)),
        Gate("H", (1,)),
        *(Gate(name, (0, 1), (angle,)) for name, angle in zip(("CRX", "CRZ", "CRX"), angles, strict=True)),
    ]
    assert from_pennylane(function).gates == tuple(expected)
