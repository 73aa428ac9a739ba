"""Programs that are odd, wrong or hostile: read as they say, or refused at their line."""

import numpy as np
import pytest

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
        ("rx(5 % 2) q[0];", "the operator '%' is not supported"),
        ("h q[0:1];", "the operator ':' is not supported"),
        ("rx() q[0];", "gate RX takes 1 angles but was given 0"),
        ("rx(a,) q[0];", "expected an expression but found ')'"),
        # Sizes.
        ("rx(" + "(" * 5000 + "a" + ")" * 5000 + ") q[0];", "more than 50 nested parts"),
        ("rx(" + "-" * 5000 + "a) q[0];", "more than 50 nested parts"),
        ("rx(" + "2**" * 5000 + "1) q[0];", "more than 50 nested parts"),
        ("inv @ " * 60 + "h q[0];", "more than 50 modifiers"),
        ("qubit[8000] r;", "the size of a register of qubits is 8000.0: give a whole number from 1 to 1024"),
        ("qubit[1e9] r;", "from 1 to 1024"),
        ("qubit[1e400] r;", "from 1 to 1024"),
        ("qubit[1e400 - 1e400] r;", "from 1 to 1024"),
        ("qubit[1.5] r;", "from 1 to 1024"),
        ("qubit[a] r;", "from 1 to 1024"),
        ("qubit[1024] r;", "the program declares 1026 qubits"),
        ("ctrl(-1) @ h q[0];", "the number of controls is -1.0"),
        ("ctrl(0) @ h q[0];", "the number of controls is 0.0"),
        ("ctrl(1.7) @ h q[0], q[1];", "the number of controls is 1.7"),
        ("ctrl @ gphase(a) q[0];", "modifiers of gphase are not supported"),
        ("negctrl @ x q[0], q[1];", "the modifier 'negctrl' is not supported"),
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
