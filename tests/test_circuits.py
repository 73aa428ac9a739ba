import pickle
from collections import Counter

import numpy as np
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import circuits, gates

from circuits import (
    GATES,
    Angle,
    Channel,
    Circuit,
    Gate,
    NoiseModel,
    const,
    encode,
    encoding_names,
    kernel,
    kernel_citation,
    kernel_entangles,
    kernel_names,
    shift_rule,
)
from circuits.gates import pauli_matrix

WITH_MATRIX = [name for name, spec in GATES.items() if spec.n_wires]


def with_values(name, values):
    spec = GATES[name]
    return Gate(name, tuple(range(spec.n_wires)), tuple(const(v) for v in values))


@pytest.mark.parametrize("name", WITH_MATRIX)
def test_matrix_is_the_textbooks(name):
    spec = GATES[name]
    values = [0.3, -1.1, 2.0][: spec.n_angles]
    expected = oracle.gate_matrix(with_values(name, values), values, spec.n_wires)
    np.testing.assert_allclose(spec.matrix(*values), expected, atol=1e-14)
    np.testing.assert_allclose(
        spec.matrix(*values) @ spec.matrix(*values).conj().T, np.eye(2**spec.n_wires), atol=1e-14
    )


@pytest.mark.parametrize("name", [name for name in WITH_MATRIX if GATES[name].n_angles])
def test_rotations_multiply_to_the_matrix_up_to_a_phase(name):
    spec = GATES[name]
    values = [0.7, -0.4, 1.9][: spec.n_angles]
    product = np.eye(2**spec.n_wires)
    for rotation in spec.rotations:
        angle = values[rotation.angle] * rotation.factor
        p = pauli_matrix(rotation.pauli)
        product = (np.cos(angle / 2) * np.eye(len(p)) - 1j * np.sin(angle / 2) * p) @ product
    overlap = np.trace(product.conj().T @ spec.matrix(*values)) / len(product)
    assert abs(abs(overlap) - 1) < 1e-14


@pytest.mark.parametrize("name", [name for name in WITH_MATRIX if GATES[name].parts])
def test_parts_multiply_to_the_gate_up_to_a_phase(name):
    spec = GATES[name]
    # Not on wires 0, 1, ...: parts must follow the gate.
    wires = (2, 0, 1)[: spec.n_wires]
    whole = Gate(name, wires, tuple(const(v) for v in [0.7, -0.4, 1.9][: spec.n_angles]))
    product = np.eye(8)
    for part in whole.parts():
        assert len(part.wires) <= 2
        product = oracle.gate_matrix(part, [angle.offset for angle in part.angles], 3) @ product
    expected = oracle.gate_matrix(whole, [angle.offset for angle in whole.angles], 3)
    assert abs(abs(np.trace(product.conj().T @ expected)) / 8 - 1) < 1e-14


def test_simple_gates_are_their_only_part():
    gate = Gate("RX", (1,), (Angle("weight", 3),))
    assert gate.parts() == (gate,)
    three = Gate("CRot", (1, 0), tuple(Angle("weight", k, 2.0) for k in (5, 4, 3)))
    assert [part.text() for part in three.parts()] == ["CRZ 1,0 2.0*w[5]", "CRY 1,0 2.0*w[4]", "CRZ 1,0 2.0*w[3]"]


@pytest.mark.parametrize("name", [name for name in WITH_MATRIX if GATES[name].n_angles])
def test_shift_frequencies_are_the_gaps_of_the_generator(name):
    spec = GATES[name]
    for angle in range(spec.n_angles):
        steps = [g for k, g in oracle.generator_steps(name, tuple(range(spec.n_wires)), spec.n_wires) if k == angle]
        assert len(steps) == 1
        levels = np.linalg.eigvalsh(steps[0])
        gaps = {round(float(a - b), 9) for a in levels for b in levels if a - b > 1e-9}
        assert gaps == set(spec.frequencies[angle])


@pytest.mark.parametrize("frequencies", [(1.0,), (0.5, 1.0), (1.0, 2.0, 3.0)])
def test_shift_rule_differentiates_every_polynomial_of_its_frequencies(frequencies):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, len(frequencies)))
    omega = np.array(frequencies)

    def f(t):
        return 0.3 + a @ np.cos(omega * t) + b @ np.sin(omega * t)

    t = 0.37
    exact = -(a * omega) @ np.sin(omega * t) + (b * omega) @ np.cos(omega * t)
    assert sum(c * f(t + s) for c, s in shift_rule(frequencies)) == pytest.approx(exact, abs=1e-13)


def test_shift_rule_of_controlled_rotations_is_the_four_term_rule():
    rule = sorted(shift_rule((0.5, 1.0)))
    small, large = (np.sqrt(2) - 1) / (4 * np.sqrt(2)), (np.sqrt(2) + 1) / (4 * np.sqrt(2))
    expected = sorted([(large, np.pi / 2), (-large, -np.pi / 2), (-small, 3 * np.pi / 2), (small, -3 * np.pi / 2)])
    np.testing.assert_allclose(rule, expected, atol=1e-14)


@given(circuits())
def test_inverse_undoes_the_circuit(circuit):
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(2, 8))
    total = np.eye(2**circuit.n_wires)
    for gate in (circuit + circuit.inverse()).gates:
        total = oracle.gate_matrix(gate, [oracle.angle_value(a, x, w) for a in gate.angles], circuit.n_wires) @ total
    np.testing.assert_allclose(total, np.eye(len(total)), atol=1e-10)


@given(circuits(), circuits())
def test_text_is_canonical(a, b):
    assert (a.text() == b.text()) == (a == b)
    assert hash(a) == hash(Circuit(a.n_wires, list(a.gates), list(a.observables)))
    assert pickle.loads(pickle.dumps(a)) == a


@given(circuits(), st.integers(0, 5))
def test_sizes_and_counts_follow_from_the_gates(circuit, by):
    used = [a for g in circuit.gates for a in g.angles]
    assert circuit.n_inputs == max((a.index + 1 for a in used if a.source == "input"), default=0)
    shifted = circuit.shift_weights(by)
    assert shifted.n_weights == (circuit.n_weights + by if circuit.n_weights else 0)
    assert shifted.counts() == circuit.counts() == Counter(g.name for g in circuit.gates)
    assert 1 <= circuit.depth() <= len(circuit.gates)


def test_heisenberg_gate_list():
    k = kernel("heisenberg", 3, depth=1)
    names = [(g.name, g.wires, [a.index for a in g.angles]) for g in k.gates]
    assert names == [
        ("RY", (0,), [0]),
        ("RY", (1,), [1]),
        ("RY", (2,), [2]),
        ("Rot", (0,), [0, 1, 2]),
        ("Rot", (1,), [3, 4, 5]),
        ("Rot", (2,), [6, 7, 8]),
        ("RXX", (0, 1), [9]),
        ("RYY", (0, 1), [10]),
        ("RZZ", (0, 1), [11]),
        ("RXX", (1, 2), [12]),
        ("RYY", (1, 2), [13]),
        ("RZZ", (1, 2), [14]),
        ("RXX", (2, 0), [15]),
        ("RYY", (2, 0), [16]),
        ("RZZ", (2, 0), [17]),
        ("Rot", (0,), [18, 19, 20]),
        ("Rot", (1,), [21, 22, 23]),
        ("Rot", (2,), [24, 25, 26]),
    ]
    assert k.gates[0].angles[0].scale == np.pi
    assert k.observables == ("ZII", "IZI", "IIZ")


def test_a_negative_zero_is_zero():
    assert const(0.0) == const(-0.0)
    assert const(0.0).text() == const(-0.0).text() == const(1.0).times(-0.0).text()


def test_numbers_of_numpys_are_stored_as_pythons():
    angle = Angle("weight", np.int64(1), np.float32(2.0), np.int32(3))
    assert (type(angle.index), type(angle.scale), type(angle.offset)) == (int, float, float)
    assert angle == Angle("weight", 1, 2.0, 3.0)


@pytest.mark.parametrize(("wires", "pairs"), [(1, 0), (2, 1), (3, 3), (4, 4)])
def test_ring_has_no_pair_twice(wires, pairs):
    k = kernel("heisenberg", wires, depth=1)
    assert k.counts()["RZZ"] == pairs
    assert k.n_weights == 6 * wires + 3 * pairs


def test_strongly_entangling_reaches_further_each_layer():
    k = kernel("strongly_entangling", 4, depth=4)
    targets = [g.wires for g in k.gates if g.name == "CNOT"]
    assert targets[0::4] == [(0, 1), (0, 2), (0, 3), (0, 1)]
    assert k.n_weights == 4 * 4 * 3


def test_product_is_heisenberg_without_its_two_wire_gates():
    full, control = kernel("heisenberg", 4), kernel("product", 4)
    assert [(g.name, g.wires) for g in full.gates if len(g.wires) == 1] == [(g.name, g.wires) for g in control.gates]
    assert not kernel_entangles("product")
    assert kernel_entangles("heisenberg")


def test_random_kernel_is_its_seeds():
    assert kernel("random", 4, seed=3) == kernel("random", 4, seed=3)
    assert kernel("random", 4, seed=3) != kernel("random", 4, seed=4)
    assert any("CNOT" in kernel("random", 4, seed=s).counts() for s in range(5))


@pytest.mark.parametrize("name", kernel_names())
@pytest.mark.parametrize("encoding", encoding_names())
def test_every_kernel_takes_every_encoding(name, encoding):
    wires = 5 if encoding == "neqr" else 3
    observables = ("ZZI" + "I" * (wires - 3), "XIY" + "I" * (wires - 3))
    k = kernel(name, wires, encoding=encoding, readout=list(observables))
    assert k.n_inputs == {"amplitude": 8, "dense_angle": 6, "frqi": 4, "neqr": 2}.get(encoding, 3)
    assert k.observables == observables
    assert sorted({a.index for g in k.gates for a in g.angles if a.source == "weight"}) == list(range(k.n_weights))
    assert len(kernel_citation(name)) > 20
    assert k.draw().count("\n") >= 3


def test_angle_encoding_is_ry_of_pi_x():
    x = np.array([0.0, 0.25, 1.0])
    values, _, _ = oracle.run(encode("angle", 3).with_observables(("ZII", "IZI", "IIZ")), x, np.zeros(0))
    np.testing.assert_allclose(values, np.cos(np.pi * x), atol=1e-14)


def test_angle_z_is_visible():
    values, _, _ = oracle.run(encode("angle_z", 1).with_observables(("X", "Y")), np.array([0.3]), np.zeros(0))
    np.testing.assert_allclose(values, [np.cos(0.3 * np.pi), np.sin(0.3 * np.pi)], atol=1e-14)


def test_amplitude_encoding_pads():
    circuit = encode("amplitude", 3).with_observables(("ZI", "IZ"))
    values, _, _ = oracle.run(circuit, np.array([3.0, 0.0, 4.0]), np.zeros(0))
    np.testing.assert_allclose(values, [0.36 - 0.64, 1.0], atol=1e-14)


def test_drawing_shows_controls_angles_and_readout():
    circuit = Circuit(
        3,
        (Gate("RY", (0,), (Angle("input", 0, np.pi),)), Gate("CNOT", (0, 2)), Gate("RZ", (1,), (const(np.pi / 2),))),
        ("ZIZ",),
    )
    assert circuit.draw().splitlines() == [
        "0: ─RY(πx0)─●─────────",
        "            │",
        "1: ─────────┼─RZ(π/2)─",
        "            │",
        "2: ─────────X─────────",
        "reads <ZIZ>",
    ]


@given(st.data(), st.integers(1, 4))
def test_drawing_has_one_line_a_wire_and_all_lines_fit(data, n):
    body = data.draw(st.lists(gates(n, ("input", "weight", "const"), n, 3), max_size=8))
    lines = Circuit(n, tuple(body), ("Z" * n,)).draw().splitlines()
    wires = [line for line in lines if ": ─" in line]
    assert len(wires) == n
    assert len({len(line) for line in wires}) == 1


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Gate("CNOTT", (0, 1)), "did you mean 'CNOT'"),
        (lambda: Gate("CNOT", (0,)), "acts on 2 wires but was given"),
        (lambda: Gate("CNOT", (1, 1)), "must differ"),
        (lambda: Gate("RX", (0,)), "takes 1 angles but was given 0"),
        (lambda: Angle("feature", 0), "unknown angle source 'feature'"),
        (lambda: Angle("input", -1), "index -1"),
        (lambda: Angle("input", 0, float("nan")), "must be finite"),
        (lambda: Angle("const", 2), "index 2"),
        (lambda: Angle("const", 0, 2.0), "constant angle has scale 2.0"),
        (lambda: Angle("input", 1.5), "angle index is 1.5"),
        (lambda: Gate("X", (0.0,)), "wire is 0.0"),
        (lambda: Gate("X", "0"), "wire is '0'"),
        (lambda: Gate("RX", (0,), (0.3,)), "each must be a circuits.Angle"),
        (lambda: Circuit(0), "0 wires"),
        (lambda: Circuit(2.5), "number of wires is 2.5"),
        (lambda: Circuit(True), "number of wires is True"),
        (lambda: Circuit("3"), "number of wires is '3'"),
        (lambda: Circuit(1, (), "XZ"), "observables are the text 'XZ'"),
        (lambda: Angle("weight", True), "angle index is True"),
        (lambda: Angle("weight", 0, np.array(2.0)), "angle scale is array(2.)"),
        (lambda: Angle("weight", 0, "2"), "angle scale is '2'"),
        (lambda: Angle("weight", 0, 1.0, None), "angle offset is None"),
        (lambda: encode("neqr", 2, bits=0), "was given bits 0: give a whole number of at least 1"),
        (lambda: Circuit(2, (Gate("X", (2,)),)), "gate 0 (X) acts on wires (2,) but the circuit has wires 0 to 1"),
        (lambda: Circuit(2, (), ("ZZZ",)), "does not fit 2 wires"),
        (lambda: Circuit(2, (), ("II",)), "not all I"),
        (lambda: Circuit(2) + Circuit(3), "circuits of 2 and 3 wires"),
        (lambda: encode("amplitude", 4).inverse(), "has no inverse"),
        (lambda: Circuit(1) + encode("amplitude", 2) + encode("amplitude", 2), "must be the first gate"),
        (lambda: encode("angle", 5, 4), "holds 4 features on 4 wires but was given 5: use 5 wires"),
        (lambda: encode("angel", 5), "did you mean 'angle'"),
        (lambda: kernel("heisenburg", 4), "did you mean 'heisenberg'"),
        (lambda: kernel("heisenberg", 0, features=1), "0 wires"),
        (lambda: kernel("heisenberg", 4, depth=0), "depth 0"),
        (lambda: kernel("heisenberg", 4, readout=[]), "empty list"),
        (lambda: kernel("heisenberg", 4, readout="zy"), "is no Pauli string of 4 letters"),
        (lambda: kernel("heisenberg", 4, readout="ZZ"), "does not fit 4 wires"),
        (lambda: Channel("depolarising", 0.1), "did you mean 'depolarizing'"),
        (lambda: Channel("bit_flip", 1.5), "probability 1.5"),
        (lambda: NoiseModel(()), "0 channels"),
        (lambda: NoiseModel((("CNOTT", Channel("bit_flip", 0.5)),)), "did you mean 'CNOT'"),
    ],
)
def test_errors_name_both_values(make, says):
    with pytest.raises(ValueError) as error:
        make()
    assert says in str(error.value)


@pytest.mark.parametrize("name", ["depolarizing", "bit_flip", "phase_flip", "amplitude_damping", "phase_damping"])
@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_channels_are_trace_preserving_and_the_textbooks(name, p):
    kraus = Channel(name, p).kraus()
    np.testing.assert_allclose(sum(k.conj().T @ k for k in kraus), np.eye(2), atol=1e-15)
    rho = np.array([[0.6, 0.2 - 0.1j], [0.2 + 0.1j, 0.4]])
    expected = sum(k @ rho @ k.conj().T for k in oracle.kraus_of(Channel(name, p)))
    np.testing.assert_allclose(sum(k @ rho @ k.conj().T for k in kraus), expected, atol=1e-15)
