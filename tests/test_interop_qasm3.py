"""Programs that are odd, wrong or hostile: read as they say, or refused at their line."""

import numpy as np
import pytest
from foreign import W, unitary

from circuits import Angle, Gate, const, from_qasm3

HEAD = 'OPENQASM 3.0;\ninclude "stdgates.inc";\ninput float a;\nqubit[2] q;\n'


@pytest.mark.parametrize(
    ("statement", "says"),
    [
        # A measurement in a declaration of bits is one.
        ("bit c = measure q[0]; cx q[0], q[1];", "after its measurement"),
        ("bit[2] c = measure q; h q;", "after its measurement"),
        ("bit c; c = measure q[0]; h q[0];", "after its measurement"),
        ("bit[2] c; c[1] = measure q[0]; h q[0];", "after its measurement"),
        ("foo measure q[0];", "expected '=' but found 'measure'"),
        # Statements without qubits.
        ("nonsense;", "instruction 'nonsense' is not supported"),
        ("foo(3);", "instruction 'foo' is not supported"),
        ("h;", "gate h is called without qubits"),
        ("rx(a);", "gate rx is called without qubits"),
        ("inv @ h;", "gate h is called without qubits"),
        ("gate g u { h; } g q[0];", "gate h is called without qubits"),
        # Names.
        ("qubit q;", "'q' is declared twice"),
        ("input float a;", "'a' is declared twice"),
        ("const float a = 1;", "'a' is declared twice"),
        ("bit a;", "'a' is declared twice"),
        ("gate g u { h u; } gate g u { x u; }", "'g' is declared twice"),
        ("gate g u, u { cx u, u; }", "must have different names"),
        # Expressions.
        ("rx(sqrt(-1)) q[0];", "an expression has no value: "),
        ("rx(log(0)) q[0];", "an expression has no value: "),
        ("rx((-1) ** 0.5) q[0];", "is no real number"),
        ("rx(2 ** 10000) q[0];", "an expression has no value: "),
        ("rx(1e400) q[0];", "no single real number"),
        ("rx(5 & 2) q[0];", "the operator '&' is not supported"),
        ("rx(-5 % 3) q[0];", "the remainder of -5 by 3 is not read"),
        ("rx(mod(a, 3)) q[0];", "the remainder of w[0] by 3 is not read"),
        ("rx(5 % 0) q[0];", "the remainder of 5 by 0 is not read"),
        ("h q[3];", "q[3] is outside the register of 2 qubits"),
        ("h q[{0, -3}];", "q[-3] is outside the register of 2 qubits"),
        ("h q[1:0];", "q[1:0] has no qubits"),
        ("h q[0:0:1];", "q[...] is no range"),
        ("h q[::1:1];", "q[...] is no range"),
        ("h q[];", "expected an expression but found ']'"),
        ("let z = q[0] ++ q;", "'z' has a qubit twice"),
        ("let q = q[0];", "'q' is declared twice"),
        ("let z = y;", "qubit 'y' is not declared"),
        ("rx() q[0];", "gate RX takes 1 angles but was given 0"),
        ("rx(a,) q[0];", "expected an expression but found ')'"),
        # Sizes.
        ("rx(" + "(" * 5000 + "a" + ")" * 5000 + ") q[0];", "more than 50 nested parts"),
        ("rx(" + "-" * 5000 + "a) q[0];", "more than 50 nested parts"),
        ("rx(" + "2**" * 5000 + "1) q[0];", "more than 50 nested parts"),
        ("inv @ " * 60 + "h q[0];", "more than 50 modifiers"),
        ("qubit[8000] r;", "the size of a register of qubits is 8000: give a whole number from 1 to 1024"),
        ("qubit[100000] r;", "the size of a register of qubits is 100000: give a whole number from 1 to 1024"),
        ("qubit[1e9] r;", "from 1 to 1024"),
        ("qubit[1e400] r;", "from 1 to 1024"),
        ("qubit[1e400 - 1e400] r;", "from 1 to 1024"),
        ("qubit[1.5] r;", "from 1 to 1024"),
        ("qubit[a] r;", "from 1 to 1024"),
        ("qubit[1024] r;", "the program declares 1026 qubits"),
        ("ctrl(-1) @ h q[0];", "the number of controls is -1:"),
        ("ctrl(0) @ h q[0];", "the number of controls is 0:"),
        ("ctrl(1.7) @ h q[0], q[1];", "the number of controls is 1.7"),
        ("ctrl @ gphase(a) q[0];", "modifiers of gphase are not supported"),
        ("pow(0.5) @ x q[0];", "the power of a gate is 0.5: give a whole number"),
        ("pow(a) @ x q[0];", "the power of a gate is w[0]"),
        ("pow(40000) @ x q[0]; pow(40000) @ x q[0];", "more than 50000 calls"),
        ("pow(300) @ pow(-300) @ x q[0];", "more than 50000 calls"),
        ("pow @ x q[0];", "expected '(' but found '@'"),
    ],
)
def test_what_is_not_read_is_named_with_its_line(statement, says):
    with pytest.raises(ValueError) as error:
        from_qasm3(HEAD + "h q[1];\n" + statement)
    assert str(error.value).startswith("OpenQASM line 6: ")
    assert says in str(error.value)


@pytest.mark.parametrize("body", ["", "h u; "])
def test_gates_that_double_at_every_level_are_refused(body):
    gates = f"gate g0 u {{ {body} }}\n" + "".join(f"gate g{k + 1} u {{ g{k} u; g{k} u; }}\n" for k in range(40))
    with pytest.raises(ValueError, match="more than 50000 calls"):
        from_qasm3(HEAD + gates + "g40 q[0];")
    found = from_qasm3(HEAD + gates + "g5 q[0];").gates
    assert found == (Gate("H", (0,)),) * (32 if body else 0)


def test_gates_that_are_nested_deeply_are_refused():
    gates = "gate g0 u { h u; }\n" + "".join(f"gate g{k + 1} u {{ g{k} u; }}\n" for k in range(400))
    assert from_qasm3(HEAD + gates + "g40 q[0];").gates == (Gate("H", (0,)),)
    with pytest.raises(ValueError, match="is defined through more than 50 others"):
        from_qasm3(HEAD + gates + "g400 q[0];")


@pytest.mark.parametrize(
    "expression",
    ["x ** 1e9", "((x ** 64) ** 64) ** 64", "(x + y + z + 1) ** 60", "x ** 65"],
)
def test_products_that_grow_without_end_are_refused(expression):
    inputs = "".join(f"input float {name};\n" for name in "xyz")
    roles = "// qconv inputs: x y z\n"
    with pytest.raises(ValueError, match="line 8: the angle cannot be read"):
        from_qasm3(HEAD + inputs.replace("\n", " ") + "\n" + roles + f"\nrx({expression}) q[0];")


def test_a_gate_may_have_the_name_of_a_word_of_the_reader():
    for name in ("assignment", "bits", "version", "qubits", "statement"):
        text = HEAD + f"gate {name} u {{ h u; }}\n{name} q[0];\nx q[0];"
        assert from_qasm3(text).gates == (Gate("H", (0,)), Gate("X", (0,)))


def test_bits_and_measurements_at_the_end_change_nothing():
    text = (
        HEAD + 'h q;\nbit[2] c = "00"; bit d = measure q[0];\nc[1] = measure q[1]; measure q[1] -> c[0]; measure q[0];'
    )
    assert from_qasm3(text).gates == (Gate("H", (0,)), Gate("H", (1,)))


@pytest.mark.parametrize(
    ("text", "value"), [("1_000.5", 1000.5), ("0x1F", 31), ("0b101", 5), ("0o17", 15), ("1_0e-1", 1.0), (".5", 0.5)]
)
def test_numbers(text, value):
    assert from_qasm3(HEAD + f"rx({text}) q[0];").gates == (Gate("RX", (0,), (const(value),)),)


@pytest.mark.parametrize(
    ("names", "indices"),
    [
        (["w_5", "w_3"], [5, 3]),
        # The same number twice, or one far above their count, is no index.
        (["w_1", "w_01"], [0, 1]),
        (["w_99999999999", "w_0"], [1, 0]),
        (["w_" + "9" * 5000, "w_0"], [0, 1]),
        (["w10", "w", "w2"], [2, 0, 1]),
    ],
)
def test_numbers_in_names_as_indices(names, indices):
    text = 'OPENQASM 3.0;\ninclude "stdgates.inc";\nqubit q;\n'
    text += "".join(f"input float {name};\nrx({name}) q;\n" for name in names)
    circuit = from_qasm3(text)
    assert [gate.angles[0] for gate in circuit.gates] == [Angle("weight", index) for index in indices]
    assert circuit.n_weights == np.max(indices) + 1


def _controlled(matrix, *values):
    """A matrix where wires before its own have these values, else the identity."""
    for value in reversed(values):
        size = len(matrix)
        whole = np.eye(2 * size, dtype=complex)
        whole[value * size : (value + 1) * size, value * size : (value + 1) * size] = matrix
        matrix = whole
    return matrix


def _rx(angle):
    return np.cos(angle / 2) * np.eye(2) - 1j * np.sin(angle / 2) * np.array([[0, 1], [1, 0]])


@pytest.mark.parametrize(
    ("call", "matrix"),
    [
        ("negctrl @ rx(a)", _controlled(_rx(W[0]), 0)),
        ("negctrl @ ctrl @ x", _controlled(_rx(np.pi) * 1j, 0, 1)),
        ("ctrl @ negctrl @ x", _controlled(_rx(np.pi) * 1j, 1, 0)),
        ("negctrl(2) @ pow(3) @ x", _controlled(_rx(np.pi) * 1j, 0, 0)),
        ("pow(3) @ negctrl @ inv @ rx(a)", _controlled(_rx(-3 * W[0]), 0)),
        ("inv @ negctrl @ pow(-2) @ rx(a)", _controlled(_rx(2 * W[0]), 0)),
        ("pow(0) @ ctrl @ x", np.eye(4)),
    ],
)
def test_modifiers_make_the_gates_that_they_say(call, matrix):
    wires = len(matrix).bit_length() - 1
    head = f'OPENQASM 3.0;\ninclude "stdgates.inc";\ninput float a;\nqubit[{wires}] q;\n'
    circuit = from_qasm3(head + f"{call} {', '.join(f'q[{k}]' for k in range(wires))};")
    np.testing.assert_allclose(unitary(circuit), matrix, atol=1e-12)


def test_powers_of_defined_gates_repeat_them():
    text = HEAD + "gate g(t) u { rx(t) u; s u; } pow(-2) @ g(a) q[1];"
    once = [Gate("Sdg", (1,)), Gate("RX", (1,), (Angle("weight", 0, -1.0),))]
    assert from_qasm3(text).gates == tuple(2 * once)


@pytest.mark.parametrize(
    ("selected", "wires"),
    [
        ("q[1:3]", [1, 2, 3]),
        ("q[:1]", [0, 1]),
        ("q[3:]", [3, 4]),
        ("q[0:2:4]", [0, 2, 4]),
        ("q[4:-2:1]", [4, 2]),
        ("q[-2:-1]", [3, 4]),
        ("q[{3, 0}]", [3, 0]),
        ("q[4] ++ r ++ q[0:1]", [4, 5, 0, 1]),
    ],
)
def test_aliases_ranges_and_sets_of_qubits(selected, wires):
    head = 'OPENQASM 3.0;\ninclude "stdgates.inc";\nqubit[5] q;\nqubit r;\n'
    circuit = from_qasm3(head + f"let z = {selected};\nh z;\nx z[-1];")
    assert circuit.gates == (*(Gate("H", (wire,)) for wire in wires), Gate("X", (wires[-1],)))
    if "+" not in selected:
        assert from_qasm3(head + f"h {selected};").gates == circuit.gates[:-1]


@pytest.mark.parametrize(("text", "value"), [("7 % 4 * 2", 6.0), ("mod(7.5, 2)", 1.5), ("1 + n % 2", 2.0)])
def test_remainders_of_constants(text, value):
    found = from_qasm3(HEAD + f"const int n = 3;\nrx({text}) q[n % 2];").gates
    assert found == (Gate("RX", (1,), (const(value),)),)
