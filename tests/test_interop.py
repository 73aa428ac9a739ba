import json

import numpy as np
import pytest
import torch
from foreign import W, X, assert_same_up_to_phase, pennylane_unitary, qiskit_unitary, unitary
from hypothesis import given
from strategies import circuits

from circuits import (
    GATES,
    Angle,
    Circuit,
    Gate,
    as_circuit,
    const,
    encode,
    from_pennylane,
    from_qasm3,
    from_qiskit,
    kernel,
    kernel_names,
)
from qconv import QuantumConv2d

LIBRARY = [name for name in kernel_names() if name != "random"]


def every_gate():
    """Each gate of the table once, on wires that are neither in order nor neighbors."""
    gates = []
    for name, spec in GATES.items():
        if spec.n_wires is not None:
            angles = [Angle("weight", k, 0.7, -0.2) for k in range(spec.n_angles)]
            gates.append(Gate(name, (3, 0, 2)[: spec.n_wires], angles))
    return gates


EVERY_GATE = [pytest.param(gate, id=gate.name) for gate in every_gate()]


# PennyLane ----------------------------------------------------------------------------------------------------------


@given(circuits())
def test_pennylane_function_is_the_circuit_and_comes_back(circuit):
    pytest.importorskip("pennylane")
    function = circuit.to_pennylane()
    assert_same_up_to_phase(pennylane_unitary(function, circuit.n_wires, X, W), unitary(circuit))
    back = from_pennylane(function, len(X), len(W), wires=range(circuit.n_wires))
    assert_same_up_to_phase(unitary(back), unitary(circuit))
    assert back.observables == circuit.observables


@pytest.mark.parametrize("gate", EVERY_GATE)
def test_every_gate_goes_to_pennylane_and_comes_back(gate):
    pytest.importorskip("pennylane")
    circuit = Circuit(4, (gate,), ("ZIII",))
    assert_same_up_to_phase(pennylane_unitary(circuit.to_pennylane(), 4, X, W), unitary(circuit))
    back = from_pennylane(circuit.to_pennylane(), wires=range(4))
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


def _other_layers(qml, inputs, weights):
    qml.AngleEmbedding(inputs[::-1], wires=range(4), rotation="X")
    qml.BasicEntanglerLayers(weights[:, :, 0], wires=range(4), rotation=qml.RZ)
    qml.SimplifiedTwoDesign(weights[0, :, 1], weights[1:, :3, 1:], wires=range(4))
    qml.RandomLayers(weights[:, :, 2], wires=range(4), seed=5)


@pytest.mark.parametrize("body", [_angles_and_layers, _adjoint_and_controlled, _odd_operations, _other_layers])
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
        (lambda q, x, w: q.RX(x[0] ** 2, 0), "** 2 is not affine"),
        (lambda q, x, w: q.RX(0.1 if x[0] > 0 else 0.2, 0), "comparison of x[0]"),
        (lambda q, x, w: q.AngleEmbedding(x, wires=[0]), "n_inputs=..."),
        (lambda q, x, w: q.BasicEntanglerLayers(w, wires=[0]), "n_weights=..."),
        (lambda q, x, w: q.RX(x[-1], 0), "n_inputs=..."),
        (lambda q, x, w: nothing(q.RX(x[0] + w[1], 0)), "operation 1 (RX) cannot be read: x[0] + w[1] depends on"),
        (lambda q, x, w: nothing(q.measure(0)), "operation 1 (MidMeasure"),
        (lambda q, x, w: nothing(q.IQPEmbedding(x[:2], wires=[0, 1])), "operation 1 (IQPEmbedding) cannot be read"),
        (lambda q, x, w: q.probs(wires=0), "measurement 0 is probs(wires=[0]): only expectation values"),
        (lambda q, x, w: q.expval(q.Z(0) + q.X(0)), "it must be one Pauli word"),
        (lambda q, x, w: q.expval(2 * q.Z(0)), "with coefficient 1"),
        (lambda q, x, w: q.expval(q.Identity(0)), "not the identity"),
        (lambda q, x, w: 3.0, "returns 3.0 as result 0"),
    ],
)
def test_what_pennylane_functions_must_not_do_is_named(act, says):
    pytest.importorskip("pennylane")
    assert says in pennylane_error(act)


# Qiskit -------------------------------------------------------------------------------------------------------------


@given(circuits())
def test_quantum_circuit_is_the_circuit_and_comes_back(circuit):
    pytest.importorskip("qiskit")
    qc = circuit.to_qiskit()
    assert_same_up_to_phase(qiskit_unitary(qc), unitary(circuit))
    back = from_qiskit(qc)
    assert_same_up_to_phase(unitary(back), unitary(circuit))
    assert back.observables == circuit.observables


@pytest.mark.parametrize("gate", EVERY_GATE)
def test_every_gate_goes_to_qiskit_and_comes_back(gate):
    pytest.importorskip("qiskit")
    circuit = Circuit(4, (gate,), ("ZIII",))
    assert_same_up_to_phase(qiskit_unitary(circuit.to_qiskit()), unitary(circuit))
    back = from_qiskit(circuit.to_qiskit())
    assert_same_up_to_phase(unitary(back), unitary(circuit))
    assert (back == circuit) == (gate.name not in ("Rot", "CRot", "CU3", "SQSWAP", "SQSWAPdg", "ISWAPdg"))


@pytest.mark.parametrize("name", LIBRARY)
def test_library_circuits_come_back_from_qiskit(name):
    pytest.importorskip("qiskit")
    circuit = kernel(name, 4, depth=1)
    back = from_qiskit(circuit.to_qiskit())
    assert_same_up_to_phase(unitary(back), unitary(circuit))
    assert (back.n_inputs, back.n_weights) == (circuit.n_inputs, circuit.n_weights)
    assert back.observables == circuit.observables


def test_an_amplitude_encoding_is_no_quantum_circuit_with_parameters():
    pytest.importorskip("qiskit")
    with pytest.raises(ValueError, match=r"gate 0 \(Amplitude\)"):
        encode("amplitude", 4).to_qiskit()


def _composite():
    from qiskit import QuantumCircuit
    from qiskit.circuit import ParameterVector
    from qiskit.circuit.library import PauliEvolutionGate, RYGate, XGate
    from qiskit.quantum_info import SparsePauliOp

    x, t = ParameterVector("x", 2), ParameterVector("t", 12)
    inner = QuantumCircuit(2, name="inner")
    inner.rx(2 * x[1] - 0.5, 1)
    inner.cx(1, 0)
    middle = QuantumCircuit(3, name="middle")
    middle.append(inner.to_instruction(), [2, 0])
    middle.append(RYGate(t[11] / 2).control(1), [1, 2])
    qc = QuantumCircuit(3, 3, global_phase=0.3)
    qc.append(middle.to_instruction(), [1, 2, 0])
    qc.append(XGate().control(2, ctrl_state=1), [0, 2, 1])
    qc.cu(x[0], t[3], 0.1, -t[4], 2, 0)
    qc.r(t[0], 0.7, 1)
    qc.append(PauliEvolutionGate(SparsePauliOp(["ZZI", "XXY"]), time=t[5]), [0, 1, 2])
    qc.unitary(np.eye(4)[[0, 1, 3, 2]], [0, 2])
    qc.mcp(0.4, [0, 1], 2)
    qc.barrier()
    qc.id(0)
    return qc


def _qiskit_library():
    library = pytest.importorskip("qiskit.circuit.library")
    from qiskit.quantum_info import SparsePauliOp

    return {
        "RealAmplitudes": library.real_amplitudes(3, reps=2),
        "EfficientSU2": library.efficient_su2(3, su2_gates=["rx", "y", "rz"], entanglement="circular", reps=1),
        "ExcitationPreserving": library.excitation_preserving(3, reps=1),
        "PauliTwoDesign": library.pauli_two_design(3, reps=2, seed=1),
        "n_local": library.n_local(3, ["rx", "u"], "ecr", reps=1),
        "z_feature_map and real_amplitudes": library.z_feature_map(3).compose(library.real_amplitudes(3, reps=1)),
        "qaoa": library.qaoa_ansatz(SparsePauliOp(["ZZI", "IZZ"]), reps=2),
        "iqp": library.iqp(np.array([[1.0, 2.0], [2.0, 0.5]])),
        "QFT": library.QFTGate(3).definition,
        "composite": _composite(),
    }


QISKIT_LIBRARY = [
    "RealAmplitudes",
    "EfficientSU2",
    "ExcitationPreserving",
    "PauliTwoDesign",
    "n_local",
    "z_feature_map and real_amplitudes",
    "qaoa",
    "iqp",
    "QFT",
    "composite",
]


# Qiskit's own exponential of a sum of Pauli strings warns of its own matrices.
@pytest.mark.filterwarnings("ignore::scipy.sparse.SparseEfficiencyWarning")
@pytest.mark.parametrize("name", QISKIT_LIBRARY)
def test_qiskits_library_and_composite_instructions_are_read(name):
    qc = _qiskit_library()[name]
    circuit = from_qiskit(qc)
    inputs = [p for p in qc.parameters if p.vector.name == "x"]
    weights = [p for p in qc.parameters if p.vector.name != "x"]
    vectors = {p.vector.name for p in weights}
    places = {p: p.index if len(vectors) == 1 else k for k, p in enumerate(weights)}
    values = {p: X[p.index] for p in inputs} | {p: W[places[p]] for p in weights}
    assert_same_up_to_phase(unitary(circuit), qiskit_unitary(qc, values))


def test_the_old_classes_of_qiskits_library_are_read():
    library = pytest.importorskip("qiskit.circuit.library")
    with pytest.warns(DeprecationWarning, match="RealAmplitudes"):
        old = library.RealAmplitudes(3, reps=1)
    assert from_qiskit(old) == from_qiskit(library.real_amplitudes(3, reps=1))


def test_roles_of_qiskit_parameters():
    pytest.importorskip("qiskit")
    from qiskit import QuantumCircuit
    from qiskit.circuit import Parameter, ParameterVector

    a, b, x1 = Parameter("a"), Parameter("b"), Parameter("x_1")
    vector = ParameterVector("v", 4)
    qc = QuantumCircuit(1)
    for parameter in (b, a, x1, vector[3]):
        qc.rx(parameter, 0)

    def sources(circuit):
        return [(gate.angles[0].source[0], gate.angles[0].index) for gate in circuit.gates]

    # By name: x_1 is a feature, the others are weights in the order of qc.parameters: a, b, v[3].
    assert sources(from_qiskit(qc)) == [("w", 1), ("w", 0), ("i", 0), ("w", 2)]
    assert sources(from_qiskit(qc, inputs=[b, vector])) == [("i", 0), ("w", 0), ("w", 1), ("i", 4)]
    assert sources(from_qiskit(qc, weights=vector)) == [("i", 1), ("i", 0), ("i", 2), ("w", 3)]
    assert sources(from_qiskit(qc, [x1, a], [b, vector])) == [("w", 0), ("i", 1), ("i", 0), ("w", 4)]
    with pytest.raises(ValueError, match="Parameters b, x_1 are neither in inputs nor in weights"):
        from_qiskit(qc, [a], vector)
    with pytest.raises(ValueError, match="'a' is listed twice"):
        from_qiskit(qc, a, [a, b, x1, vector])
    with pytest.raises(ValueError, match="'a' is no Parameter"):
        from_qiskit(qc, "a")


def test_observables_of_qiskit_are_turned_around_once():
    pytest.importorskip("qiskit")
    from qiskit import QuantumCircuit
    from qiskit.quantum_info import Pauli, SparsePauliOp

    qc = QuantumCircuit(3)
    qc.h(0)
    assert from_qiskit(qc).observables == ("ZII", "IZI", "IIZ")
    assert from_qiskit(qc, observables="XYI").observables == ("XYI",)
    assert from_qiskit(qc, observables=SparsePauliOp(["XYI", "IIZ"])).observables == ("IYX", "ZII")
    assert from_qiskit(qc, observables=["XII", Pauli("XII")]).observables == ("XII", "IIX")
    with pytest.raises(ValueError, match="coefficient"):
        from_qiskit(qc, observables=SparsePauliOp(["ZII"], [0.5]))
    with pytest.raises(ValueError, match="observable is a int"):
        from_qiskit(qc, observables=[3])


def qiskit_error(act):
    from qiskit import QuantumCircuit
    from qiskit.circuit import Parameter

    qc = QuantumCircuit(2, 2)
    qc.h(0)
    act(qc, Parameter("a"), Parameter("b"))
    with pytest.raises(ValueError) as error:
        from_qiskit(qc)
    return str(error.value)


def _nested(qc, a, b):
    inner = type(qc)(2, name="inner")
    inner.cx(0, 1)
    inner.rx(a * a, 0)
    qc.append(inner.to_gate(), [0, 1])


def _conditional(qc, a, b):
    qc.measure(1, 0)
    with qc.if_test((qc.clbits[0], 1)):
        qc.x(1)


@pytest.mark.parametrize(
    ("act", "says"),
    [
        (lambda qc, a, b: qc.rx(a + b, 0), "instruction 1 (rx) has an angle that cannot be read: a + b depends on"),
        (lambda qc, a, b: qc.rx(a.sin(), 0), "sin(a) is not affine in a"),
        (lambda qc, a, b: [qc.measure(0, 0), qc.x(0)], "instruction 2 (x) acts on a qubit after its measurement"),
        (lambda qc, a, b: qc.reset(0), "instruction 1 (reset) resets a qubit in the middle"),
        (_nested, "instruction 1 (inner), instruction 1 (rx) has an angle"),
        (_conditional, "instruction 2 (if_else)"),
    ],
)
def test_what_quantum_circuits_must_not_do_is_named(act, says):
    pytest.importorskip("qiskit")
    assert says in qiskit_error(act)


def test_measurements_at_the_end_and_resets_at_the_start_change_nothing():
    pytest.importorskip("qiskit")
    from qiskit import QuantumCircuit

    qc = QuantumCircuit(2)
    qc.reset(0)
    qc.h(0)
    qc.measure_all()
    assert from_qiskit(qc) == Circuit(2, (Gate("H", (0,)),), ("ZI", "IZ"))


# Layers -------------------------------------------------------------------------------------------------------------


def _as_function(circuit):
    def function(inputs, weights):
        return circuit.to_pennylane()(inputs, weights)

    return function


def _as_qnode(circuit):
    qml = pytest.importorskip("pennylane")
    return qml.QNode(circuit.to_pennylane(), qml.device("default.qubit", wires=circuit.n_wires))


def _as_tape(circuit):
    qml = pytest.importorskip("pennylane")
    return qml.tape.make_qscript(circuit.to_pennylane())(np.zeros(circuit.n_inputs), np.zeros(circuit.n_weights))


FORMS = {
    "circuit": lambda circuit: circuit,
    "function": _as_function,
    "qnode": _as_qnode,
    "quantum circuit": lambda circuit: circuit.to_qiskit(),
    "qasm": lambda circuit: circuit.to_qasm3(),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("form", FORMS)
def test_a_layer_takes_a_kernel_in_any_form(form, dtype):
    circuit = kernel("hur_su4" if form == "qasm" else "heisenberg", 4, depth=1)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 1, 5, 5, dtype=dtype, generator=generator, requires_grad=True)
    expected = QuantumConv2d(1, 4, 2, kernel=circuit, dtype=dtype)
    layer = QuantumConv2d(1, 4, 2, kernel=FORMS[form](circuit), dtype=dtype)
    assert layer.circuit.observables == circuit.observables
    layer.load_state_dict(expected.state_dict())
    tolerance = 1e-5 if dtype == torch.float32 else 1e-10
    torch.testing.assert_close(layer(images), expected(images), atol=tolerance, rtol=0)
    gradients = [torch.autograd.grad(own(images).square().sum(), (images, own.weight)) for own in (layer, expected)]
    for found, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(found, wanted, atol=100 * tolerance, rtol=0)


def test_a_layer_takes_a_tape():
    # A tape has numbers, so scales and offsets are gone: its first trainable parameters are the features.
    circuit = Circuit(2, (Gate("RY", (0,), (Angle("input", 0),)), Gate("RX", (1,), (Angle("weight", 0),))), ("ZI",))
    assert as_circuit(_as_tape(circuit), 1) == circuit
    assert QuantumConv2d(1, 1, 1, kernel=_as_tape(circuit)).circuit == circuit


def test_a_layer_with_a_foreign_kernel_is_saved_and_copied():
    import copy
    import pickle

    layer = QuantumConv2d(1, 4, 2, kernel=_as_function(kernel("product", 4)))
    images = torch.rand(1, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(images), layer(images))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: 3, "kernel is a int: give a kernel's name"),
        (lambda: kernel("product", 3), "takes 3 features but a 2x2 patch"),
        (lambda: kernel("product", 3).to_qiskit(), "takes 3 features but a 2x2 patch"),
        (lambda: "heisenburg", "did you mean 'heisenberg'"),
        (lambda: "OPENQASM 2.0; qreg q[1];", "only version 3"),
        (
            lambda: pytest.importorskip("qiskit.circuit.library").real_amplitudes(4),
            "none of which is called x or inputs",
        ),
    ],
)
def test_what_is_no_kernel_is_refused(make, says):
    with pytest.raises(ValueError) as error:
        QuantumConv2d(1, 4, 2, kernel=make())
    assert says in str(error.value)


def test_texts_that_are_no_program():
    with pytest.raises(ValueError, match="no OpenQASM 3 text"):
        as_circuit("heisenberg", 4)
    assert from_qasm3(json.loads(json.dumps(kernel("sim1", 3).to_qasm3()))) == kernel("sim1", 3)
