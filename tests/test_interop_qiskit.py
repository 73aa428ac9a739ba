import numpy as np
import pytest
from foreign import EVERY_GATE, LIBRARY, W, X, assert_same_up_to_phase, qiskit_unitary, unitary
from hypothesis import given
from strategies import circuits

from circuits import (
    Angle,
    Circuit,
    Factor,
    Gate,
    computed,
    encode,
    from_qasm3,
    from_qiskit,
    kernel,
)


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


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_old_classes_of_qiskits_library_are_read():
    library = pytest.importorskip("qiskit.circuit.library")
    assert from_qiskit(library.RealAmplitudes(3, reps=1)) == from_qiskit(library.real_amplitudes(3, reps=1))


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

    # By name: x_1 is feature 1, the others are weights in the order of qc.parameters: a, b, v[3].
    assert sources(from_qiskit(qc)) == [("w", 1), ("w", 0), ("i", 1), ("w", 2)]
    assert sources(from_qiskit(qc, inputs=[b, vector])) == [("i", 0), ("w", 0), ("w", 1), ("i", 4)]
    assert sources(from_qiskit(qc, weights=vector)) == [("i", 1), ("i", 0), ("i", 2), ("w", 3)]
    assert sources(from_qiskit(qc, [x1, a], [b, vector])) == [("w", 0), ("i", 1), ("i", 0), ("w", 4)]
    # Where a vector is split between the two, what is left of it is numbered anew.
    halves = QuantumCircuit(1)
    for parameter in vector:
        halves.rx(parameter, 0)
    assert sources(from_qiskit(halves, inputs=vector[:2])) == [("i", 0), ("i", 1), ("w", 0), ("w", 1)]
    with pytest.raises(ValueError, match="Parameters b, x_1 are neither in inputs nor in weights"):
        from_qiskit(qc, [a], vector)
    with pytest.raises(ValueError, match="'a' is listed twice"):
        from_qiskit(qc, a, [a, b, x1, vector])
    with pytest.raises(ValueError, match="'a' is no Parameter"):
        from_qiskit(qc, "a")


def test_parameters_that_the_circuit_does_not_have_are_named():
    pytest.importorskip("qiskit")
    from qiskit import QuantumCircuit
    from qiskit.circuit import Parameter, ParameterVector

    qc = QuantumCircuit(2)
    vector = ParameterVector("v", 3)
    qc.ry(Parameter("a"), 0)
    qc.rx(vector[1], 1)
    # Of the same names, made anew.
    for strangers in (Parameter("a"), ParameterVector("v", 3), [vector, Parameter("a")]):
        for role in ("inputs", "weights"):
            with pytest.raises(ValueError, match=r"are listed but not in the circuit, which has a, v\[1\]"):
                from_qiskit(qc, **{role: strangers})
    assert from_qiskit(qc, inputs=vector).n_inputs == 2


@pytest.mark.parametrize("names", ["x{0} theta{0}", "x_{0} w_{0}", "inputs{0} t{0}", "features[{0}] v[{0}]"])
def test_the_numbers_of_parameters_are_their_indices(names):
    pytest.importorskip("qiskit")
    from qiskit import QuantumCircuit, qasm3
    from qiskit.circuit import Parameter

    x, w = names.split()
    qc = QuantumCircuit(2)
    # Twelve, because 10 comes before 2 in the order of letters.
    for k in range(12):
        qc.rx(Parameter(x.format(k)), 0)
        qc.ry(Parameter(w.format(11 - k)), 1)
    circuit = from_qiskit(qc)
    found = [(gate.name, gate.angles[0]) for gate in circuit.gates]
    assert found == [own for k in range(12) for own in (("RX", Angle("input", k)), ("RY", Angle("weight", 11 - k)))]
    # The exporter writes no brackets, and the reader of programs has the same rule.
    if "[" not in names:
        assert from_qasm3(qasm3.dumps(qc)) == circuit


def test_parameters_that_are_not_all_numbered_alike():
    pytest.importorskip("qiskit")
    from qiskit import QuantumCircuit, qasm3
    from qiskit.circuit import Parameter

    def indices(*names, **roles):
        qc = QuantumCircuit(1)
        parameters = [Parameter(name) for name in names]
        for parameter in parameters:
            qc.rx(parameter, 0)
        chosen = {key: [parameters[k] for k in places] for key, places in roles.items()}
        circuit = from_qiskit(qc, **chosen)
        assert chosen or from_qasm3(qasm3.dumps(qc)) == circuit
        return [gate.angles[0].index for gate in circuit.gates]

    # In the order of the numbers, the one without a number first.
    assert indices("w10", "w2", "w") == [2, 1, 0]
    assert indices("w_99999999999", "w_7") == [1, 0]
    # In the order of qc.parameters.
    assert indices("w_01", "w_1") == [0, 1]
    assert indices("b2", "b10", "a") == [2, 1, 0]
    # Numbered anew where others of the same name are taken.
    assert indices("p0", "p1", "p10", "p2", inputs=[0, 1]) == [0, 1, 1, 0]


def test_instructions_are_not_known_by_their_names_alone():
    pytest.importorskip("qiskit")
    from qiskit import QuantumCircuit
    from qiskit.circuit import Gate as QiskitGate

    qc = QuantumCircuit(2)
    for name in ("x", "barrier", "id", "measure", "reset", "cu", "rx"):
        inner = QuantumCircuit(1, name=name)
        inner.h(0)
        qc.append(inner.to_instruction(), [0])
    two = QuantumCircuit(2, name="h")
    two.cx(0, 1)
    qc.append(two.to_gate(), [1, 0])
    assert from_qiskit(qc).gates == (*[Gate("H", (0,))] * 7, Gate("CNOT", (1, 0)))
    qc.append(QiskitGate("h", 1, []), [0])
    with pytest.raises(ValueError, match=r"instruction 8 \(h\) is no gate of qconv and has no definition"):
        from_qiskit(qc)


def test_an_angle_of_one_weight_may_name_others_by_zero():
    pytest.importorskip("qiskit")
    from qiskit import QuantumCircuit
    from qiskit.circuit import ParameterVector

    w = ParameterVector("w", 2)
    qc = QuantumCircuit(1)
    qc.rx(0 * w[0] + w[1] / 2, 0)
    assert from_qiskit(qc).gates == (Gate("RX", (0,), (Angle("weight", 1, 0.5),)),)


@pytest.mark.parametrize("small", [1e-9, 1e-14, 1e-18])
def test_small_coefficients_beside_large_ones(small):
    pytest.importorskip("qiskit")
    pair, plain = (Factor(0), Factor(1)), (Factor(2),)
    # The first coefficient becomes the scale, so the other is divided by it.
    for first, x_0 in ((small, 0.7), (0.8 / small, 0.0)):
        circuit = Circuit(1, (Gate("RX", (0,), (computed({pair: first, plain: 0.8}),)),), ("Z",))
        values = [x_0, -0.9, 0.6]
        qc = circuit.to_qiskit()
        (angle,) = qc.data[0].operation.params
        found = angle.bind({p: values[p.index] for p in angle.parameters}).numeric()
        assert abs(float(found) - (first * x_0 * -0.9 + 0.8 * 0.6)) < 1e-12


def test_observables_in_the_metadata():
    pytest.importorskip("qiskit")
    from qiskit import QuantumCircuit

    qc = QuantumCircuit(3)
    for foreign in ("abc", "ZZZ", ["ZZ"], ["III"], [3], 5, None):
        qc.metadata = {"observables": foreign}
        assert from_qiskit(qc).observables == ("ZII", "IZI", "IIZ")
    qc.metadata = {"observables": ["ZXI", "IIY"]}
    assert from_qiskit(qc).observables == ("IXZ", "YII")
    qc.metadata = {"observables": ["ZXI"], "qconv_observables": ["IIX"]}
    assert from_qiskit(qc).observables == ("XII",)
    qc.metadata = {"qconv_observables": "IIX"}
    with pytest.raises(ValueError, match="must be a list of Pauli labels of 3 letters"):
        from_qiskit(qc)
    assert kernel("hur_su4", 4).to_qiskit().metadata.keys() == {"qconv_observables"}


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
    with pytest.raises(ValueError, match="observables are 3: give Pauli strings"):
        from_qiskit(qc, observables=3)


@pytest.mark.parametrize("pattern", [[0], [2, 0, 1], [3, 1, 0, 2], [1, 0, 3, 2], [4, 2, 0, 1, 3]])
def test_permutations_are_swaps(pattern):
    library = pytest.importorskip("qiskit.circuit.library")
    from qiskit import QuantumCircuit

    qc = QuantumCircuit(5)
    qc.append(library.PermutationGate(pattern), [3, 1, 4, 0, 2][: len(pattern)])
    circuit = from_qiskit(qc)
    assert set(circuit.counts()) <= {"SWAP"}
    assert_same_up_to_phase(unitary(circuit), qiskit_unitary(qc))


def _annotated(a, b):
    from qiskit import QuantumCircuit
    from qiskit.circuit import AnnotatedOperation, ControlModifier, InverseModifier, PowerModifier
    from qiskit.circuit.library import RXGate, RYGate, SGate

    inner = QuantumCircuit(2, global_phase=0.4)
    inner.h(0)
    inner.crz(b, 0, 1)
    controlled = inner.to_gate().control(1, ctrl_state=0, annotated=True)
    qc = QuantumCircuit(4)
    qc.append(AnnotatedOperation(SGate(), [InverseModifier(), ControlModifier(2, 1), PowerModifier(3)]), [0, 2, 3])
    qc.append(AnnotatedOperation(RXGate(a), [PowerModifier(-2), ControlModifier(1)]), [0, 2])
    qc.append(controlled.inverse(annotated=True), [3, 1, 0])
    turned = AnnotatedOperation(RYGate(a), [ControlModifier(1, 0)])
    qc.append(AnnotatedOperation(turned, [InverseModifier(), PowerModifier(2)]), [3, 1])
    return qc


def test_annotated_operations_are_what_their_modifiers_make():
    pytest.importorskip("qiskit")
    from qiskit.circuit import Parameter

    circuit = from_qiskit(_annotated(Parameter("w_0"), Parameter("w_1")))
    # Qiskit binds no Parameters of these operations, so theirs has numbers.
    assert_same_up_to_phase(unitary(circuit), qiskit_unitary(_annotated(*W[:2]), {}))


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


def _power(qc, a, power):
    from qiskit.circuit import AnnotatedOperation, PowerModifier
    from qiskit.circuit.library import RXGate

    qc.append(AnnotatedOperation(RXGate(a), [PowerModifier(power)]), [0])


@pytest.mark.parametrize(
    ("act", "says"),
    [
        (lambda qc, a, b: qc.rx(a + b, 0), "instruction 1 (rx) has an angle that cannot be read: a + b depends on"),
        (lambda qc, a, b: qc.rx(a.sin(), 0), "sin(a) is not affine in a"),
        (lambda qc, a, b: qc.rx(a.sign(), 0), "instruction 1 (rx) has an angle that cannot be read"),
        (lambda qc, a, b: [qc.measure(0, 0), qc.x(0)], "instruction 2 (x) acts on a qubit after its measurement"),
        (lambda qc, a, b: qc.reset(0), "instruction 1 (reset) resets a qubit in the middle"),
        (_nested, "instruction 1 (inner), instruction 1 (rx) has an angle"),
        (_conditional, "instruction 2 (if_else)"),
        (lambda qc, a, b: _power(qc, a, 0.5), "instruction 1 (annotated) cannot be read: its power is 0.5"),
        (lambda qc, a, b: _power(qc, a, 10**9), "it repeats a gate 1000000000 times: at most 10000"),
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
