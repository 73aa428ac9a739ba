import numpy as np
import pytest
from foreign import assert_same_up_to_phase, unitary
from hypothesis import given
from hypothesis import strategies as st
from strategies import circuits

from circuits import GATES, Angle, Circuit, Gate, const, encode, from_qasm3, from_qiskit, kernel, kernel_names
from circuits.interop.qasm3 import DEFINITIONS

HEAD = 'OPENQASM 3.0;\ninclude "stdgates.inc";\ninput float[64] a;\ninput float x_1;\nqubit[3] q;\n'


@given(circuits())
def test_a_program_is_the_circuit(circuit):
    assert from_qasm3(circuit.to_qasm3()) == circuit


@given(st.floats(allow_nan=False, allow_infinity=False), st.floats(allow_nan=False, allow_infinity=False))
def test_numbers_come_back_exactly(scale, offset):
    angles = (Angle("weight", 3, scale, offset), const(offset), Angle("input", 0, np.pi * 3 / 4, -np.pi / 3))
    circuit = Circuit(1, (Gate("Rot", (0,), angles),))
    assert from_qasm3(circuit.to_qasm3()) == circuit


@pytest.mark.parametrize("name", kernel_names())
def test_library_circuits_come_back(name):
    circuit = kernel(name, 4, encoding="angle_z", readout=["ZZII", "IXIY"])
    assert from_qasm3(circuit.to_qasm3()) == circuit


def test_a_program_is_readable():
    circuit = Circuit(
        3,
        (
            Gate("RY", (0,), (Angle("input", 0, np.pi),)),
            Gate("CRX", (2, 0), (Angle("weight", 0, -1.0, -np.pi / 2),)),
            Gate("RZZ", (0, 1), (const(0.25),)),
        ),
        ("ZII", "IXY"),
    )
    assert circuit.to_qasm3().splitlines() == [
        "OPENQASM 3.0;",
        'include "stdgates.inc";',
        "// qconv observables: ZII IXY",
        "input float[64] x_0;",
        "input float[64] w_0;",
        "gate rzz(theta) a, b { cx a, b; rz(theta) b; cx a, b; }",
        "qubit[3] q;",
        "ry(pi*x_0) q[0];",
        "crx(-w_0 - pi/2) q[2], q[0];",
        "rzz(0.25) q[0], q[1];",
    ]


@pytest.mark.parametrize("name", DEFINITIONS)
def test_gates_that_a_program_defines_are_the_gates(name):
    spec = GATES[name]
    circuit = Circuit(3, (Gate(name, (2, 0, 1)[: spec.n_wires], [Angle("weight", k) for k in range(spec.n_angles)]),))
    text = circuit.to_qasm3()
    assert from_qasm3(text) == circuit
    # Under another name the gate is what its definition says.
    other = from_qasm3(text.replace(f"gate {name.lower()}", "gate mine").replace(f"\n{name.lower()}", "\nmine"))
    assert name not in other.counts()
    assert_same_up_to_phase(unitary(other), unitary(circuit))


def test_a_gate_of_our_name_with_another_definition_is_what_it_says():
    text = Circuit(2, (Gate("RZZ", (0, 1), (const(0.3),)),)).to_qasm3().replace("rz(theta) b", "rx(theta) b")
    assert [gate.name for gate in from_qasm3(text).gates] == ["CNOT", "RX", "CNOT"]


def _from_qiskit():
    from qiskit import QuantumCircuit
    from qiskit.circuit import Parameter
    from qiskit.circuit.library import RYGate, XGate, real_amplitudes, z_feature_map

    qc = z_feature_map(2).compose(real_amplitudes(2, reps=1))
    inner = QuantumCircuit(2, name="inner")
    t = Parameter("t")
    inner.rzx(0.3 - t / 2, 0, 1)
    inner.u(0.1, t, 3 * t + 1, 1)
    qc.append(inner.to_gate(), [1, 0])
    qc.rxx(t, 0, 1)
    qc.ryy(t, 0, 1)
    qc.rzz(t, 0, 1)
    qc.iswap(0, 1)
    qc.ecr(0, 1)
    qc.sxdg(0)
    qc.cu(0.1, 0.2, t, 0.4, 0, 1)
    qc.append(XGate().control(1, ctrl_state=0), [0, 1])
    qc.append(RYGate(0.3).control(1), [0, 1])
    qc.measure_all()
    return qc


def test_programs_that_qiskit_writes_are_read():
    pytest.importorskip("qiskit")
    from qiskit import qasm3

    qc = _from_qiskit()
    found, expected = from_qasm3(qasm3.dumps(qc)), from_qiskit(qc)
    assert (found.n_inputs, found.n_weights) == (expected.n_inputs, expected.n_weights) == (2, 5)
    assert found.observables == ("ZI", "IZ")
    # Both take the other parameters by name: t, then those of the ansatz.
    assert_same_up_to_phase(unitary(found), unitary(expected))


@pytest.mark.parametrize(
    ("statements", "gates"),
    [
        ("ctrl @ p(a) q[0], q[1];", [Gate("CP", (0, 1), (Angle("weight", 0),))]),
        ("ctrl(2) @ x q[2], q[0], q[1];", [Gate("CCX", (2, 0, 1))]),
        ("inv @ rx(a + pi) q[1];", [Gate("RX", (1,), (Angle("weight", 0, -1.0, -np.pi),))]),
        ("inv @ ctrl @ inv @ ry(x_1) q[1], q[0];", [Gate("CRY", (1, 0), (Angle("input", 1),))]),
        ("const float b = 2**2 * sqrt(4.0); rx(b / 4 - a / 2) q[0];",
         [Gate("RX", (0,), (Angle("weight", 0, -0.5, 2.0),))]),
        ("gate g(t) u, v { rx(2*t) u; gphase(t); cx v, u; } g(a) q[2], q[0];",
         [Gate("RX", (2,), (Angle("weight", 0, 2.0),)), Gate("CNOT", (0, 2))]),
        ("gate g u { s u; h u; } gate k u { inv @ g u; } k q[1];", [Gate("H", (1,)), Gate("Sdg", (1,))]),
        ("h q;", [Gate("H", (k,)) for k in range(3)]),
        ("cx q[0], q[-1]; // flips\n/* twice\n */ x q[1];", [Gate("CNOT", (0, 2)), Gate("X", (1,))]),
        ("cu(0.1, 0.2, a, x_1) q[1], q[0];",
         [Gate("P", (1,), (Angle("input", 1),)), Gate("CU3", (1, 0), (const(0.1), const(0.2), Angle("weight", 0)))]),
        ("u2(0.1, a) q[0]; id q[1]; U(a, 0, 1) q[2];",
         [Gate("U3", (0,), (const(np.pi / 2), const(0.1), Angle("weight", 0))),
          Gate("U3", (2,), (Angle("weight", 0), const(0.0), const(1.0)))]),
        ("reset q; x q[0]; barrier q; bit[3] c; c = measure q;", [Gate("X", (0,))]),
        ("qubit r; qubit[2] s; cx r, s;", [Gate("CNOT", (3, 4)), Gate("CNOT", (3, 5))]),
        ("measure q -> c; gphase(pi);", []),
    ],
)  # fmt: skip
def test_statements_and_the_gates_they_are(statements, gates):
    assert from_qasm3(HEAD + statements).gates == tuple(gates)


def test_roles_and_readout():
    head = 'OPENQASM 3;\ninclude "stdgates.inc";\n'
    body = "qubit[2] q;\n" + "".join(f"rx({name}) q[0];\n" for name in ("t", "x2", "w_5", "w_3", "_x_0_"))
    declared = "".join(f"input float {name};\n" for name in ("t", "x2", "w_5", "w_3", "_x_0_"))

    def sources(text):
        return [(gate.angles[0].source[0], gate.angles[0].index) for gate in from_qasm3(text).gates]

    # t is no w, so weights take their places among the declarations; features are numbered alike.
    assert sources(head + declared + body) == [("w", 0), ("i", 2), ("w", 1), ("w", 2), ("i", 0)]
    numbered = (declared + body).replace("input float t;\n", "").replace("rx(t) q[0];\n", "")
    assert sources(head + numbered) == [("i", 2), ("w", 5), ("w", 3), ("i", 0)]
    listed = head + "// qconv inputs: w_3 t\n// qconv weights: x2 _x_0_ w_5\n" + declared + body
    assert sources(listed) == [("i", 1), ("w", 0), ("w", 2), ("i", 0), ("w", 1)]
    assert from_qasm3(listed).observables == ("ZI", "IZ")
    assert from_qasm3(listed + "// qconv observables: XY\n").observables == ("XY",)
    assert from_qasm3(listed + "// qconv observables:\n").observables == ()


@pytest.mark.parametrize(
    ("statement", "says"),
    [
        ("rx(sin(a)) q[0];", "the angle cannot be read"),
        ("rx(a * x_1) q[0];", "(w[0]) * (x[1]) is a product"),
        ("rx(a + x_1) q[0];", "depends on w[0] and x[1]"),
        ("foo q[0];", "instruction 'foo' is not supported"),
        ("if (a > 1) { x q[0]; }", "'if' is not supported"),
        ("for int i in [0:2] { x q[i]; }", "'for' is not supported"),
        ("float f = 3;", "'float' is not supported"),
        ("#pragma x", "'#' is not supported"),
        ("x q[3];", "outside the register of 3 qubits"),
        ("x r;", "qubit 'r' is not declared"),
        ("x $0;", "physical qubits are not supported"),
        ("cx q[0];", "gate CNOT acts on 2 wires but was given (0,)"),
        ("cx q[0], q[0];", "they must differ"),
        ("rx q[0];", "gate RX takes 1 angles but was given 0"),
        ("qubit[2] r; cx q, r;", "registers of [3, 2] qubits"),
        ("bit c; c = measure q[0]; x q[0];", "after its measurement"),
        ("x q[0]; reset q;", "reset of a qubit in the middle"),
        ("pow(0.5) @ x q[0];", "the power of a gate is 0.5"),
        ("ctrl @ u3(1, 2, 3) q[0], q[1];", "depends on the phase of u3"),
        ("ctrl @ t q[0], q[1];", "ctrl @ of gate T is not supported"),
        ("x q[0]", "expected ';' but found 'the end'"),
        ("rx(b) q[0];", "'b' in an expression is not defined"),
        ("rx(1 / 0) q[0];", "an expression has no value"),
        ("gate g u { g u; } g q[0];", "is defined by itself"),
        ("gate g(t) u { rx(t) u; } g q[0];", "takes 1 angles and 1 qubits but was given 0 and 1"),
        ("gate g u { rx(a) u; } g q[0];", "'a' in an expression is not defined"),
        ("input bool b;", "input of type 'bool'"),
        ('include "mine.inc";', 'only "stdgates.inc"'),
        ("x q[0]; \\", "unexpected character"),
    ],
)
def test_errors_name_the_line(statement, says):
    with pytest.raises(ValueError) as error:
        from_qasm3(HEAD + "h q[0];\n" + statement)
    assert str(error.value).startswith("OpenQASM line 7: ")
    assert says in str(error.value)


def test_other_versions_and_empty_programs():
    with pytest.raises(ValueError, match=r"line 1: the program is OpenQASM 2\.0"):
        from_qasm3("OPENQASM 2.0;")
    with pytest.raises(ValueError, match="declares no qubit"):
        from_qasm3("OPENQASM 3.0;")
    with pytest.raises(ValueError, match="does not include"):
        from_qasm3("OPENQASM 3.0; qubit q; h q;")
    with pytest.raises(ValueError, match=r"gate 0 \(Amplitude\)"):
        encode("amplitude", 4).to_qasm3()
