from collections import Counter
from itertools import product

import numpy as np
import oracle
import pytest
import torch

from circuits import Circuit, encode, encoding_names, encoding_options, find_encoding, kernel, kernel_names
from circuits.ansatze.layered import ENTANGLEMENTS
from circuits.interop import from_qiskit
from qconv import simulate

RNG = np.random.default_rng(0)


def unitary(circuit, x):
    """Of a circuit without weights, by the oracle."""
    result = np.eye(2**circuit.n_wires, dtype=complex)
    for gate in circuit.gates:
        values = [oracle.angle_value(angle, x, np.zeros(0)) for angle in gate.angles]
        result = oracle.gate_matrix(gate, values, circuit.n_wires) @ result
    return result


def state(circuit, x):
    return unitary(circuit, np.asarray(x, dtype=float))[:, 0]


def up_to_phase(a, b):
    phase = np.vdot(a, b)
    return a * phase / abs(phase)


class TestAngles:
    def test_dense_angle_turns_each_wire_by_two_features(self):
        x = RNG.random(5)
        circuit = encode("dense_angle", 5)
        assert (circuit.n_wires, circuit.n_inputs) == (3, 5)
        assert [(g.name, g.wires[0], g.angles[0].index) for g in circuit.gates] == [
            *(("RX", 0, 0), ("RY", 0, 1), ("RX", 1, 2), ("RY", 1, 3), ("RX", 2, 4))
        ]
        values, _, _ = oracle.run(circuit.with_observables(("XII", "IYI", "IZI", "IIZ")), x, np.zeros(0))
        a, b = np.pi * x[0::2], np.pi * np.append(x[1::2], 0.0)
        # Bloch vectors of RY(b) RX(a) |0>.
        want = [np.cos(a[0]) * np.sin(b[0]), -np.sin(a[1]), np.cos(a[1]) * np.cos(b[1]), np.cos(a[2])]
        np.testing.assert_allclose(values, want, atol=1e-14)

    def test_arcsin_makes_algebraic_values(self):
        # RZ(arccos x^2) RY(arcsin x) |0>: Mitarai et al., equation 7, for one feature.
        for x in (-0.9, -0.3, 0.0, 0.4, 0.99):
            values, _, _ = oracle.run(encode("arcsin", 1).with_observables(("X", "Y", "Z")), np.array([x]), np.zeros(0))
            want = [x**3, x * np.sqrt(1 - x**4), np.sqrt(1 - x**2)]
            np.testing.assert_allclose(values, want, atol=1e-14)

    @pytest.mark.parametrize("threshold", [0.5, 0.0, -1.0])
    def test_threshold_prepares_the_bits_without_a_phase(self, threshold):
        x = np.array([threshold - 0.1, threshold + 0.1, threshold, 7.0])
        got = state(encode("threshold", 4, threshold=threshold), x)
        np.testing.assert_allclose(got, np.eye(16)[0b0101], atol=1e-15)


class TestFeatureMaps:
    @pytest.mark.parametrize("entanglement", ENTANGLEMENTS)
    @pytest.mark.parametrize("wires", [2, 3, 4])
    def test_zz_is_qiskits(self, wires, entanglement):
        library = pytest.importorskip("qiskit.circuit.library")
        from qiskit.quantum_info import Operator

        x = RNG.uniform(0, 2 * np.pi, wires)
        theirs = library.zz_feature_map(wires, reps=3, entanglement=entanglement)
        ours = encode("zz", wires, reps=3, entanglement=entanglement)
        bound = theirs.assign_parameters(x).reverse_bits()
        got, want = unitary(ours, x), Operator(bound).data
        np.testing.assert_allclose(up_to_phase(got, want), want, atol=1e-10)
        # It comes in as it is: the same gates on the same wires, those side by side in any order.
        read = from_qiskit(theirs)
        assert sorted((g.name, g.wires) for g in read.gates) == sorted((g.name, g.wires) for g in ours.gates)
        np.testing.assert_allclose(unitary(read, x), got, atol=1e-10)
        assert (ours.n_inputs, ours.n_weights) == (wires, 0)

    @pytest.mark.parametrize("order", ["Z", "ZZ", "ZZZ"])
    def test_pauli_feature_maps_come_in_as_they_are(self, order):
        library = pytest.importorskip("qiskit.circuit.library")
        from qiskit.quantum_info import Operator

        theirs = library.pauli_feature_map(3, reps=1, paulis=["Y", order])
        x = RNG.uniform(0, 2 * np.pi, 3)
        want = Operator(theirs.assign_parameters(x).reverse_bits()).data
        np.testing.assert_allclose(up_to_phase(unitary(from_qiskit(theirs), x), want), want, atol=1e-10)

    @pytest.mark.parametrize("reps", [1, 2])
    def test_iqp_is_pennylanes(self, reps):
        qml = pytest.importorskip("pennylane")
        x = RNG.uniform(-1, 1, 3)
        want = qml.matrix(qml.IQPEmbedding, wire_order=range(3))(x, wires=range(3), n_repeats=reps)
        got = unitary(encode("iqp", 3, reps=reps), x)
        np.testing.assert_allclose(up_to_phase(got, want), want, atol=1e-10)

    @pytest.mark.parametrize("name", ["zz", "iqp"])
    def test_scale_is_radians_a_unit(self, name):
        x = RNG.random(3)
        got, want = (unitary(encode(name, 3, scale=s), x * t) for s, t in ((2.5, 1.0), (1.0, 2.5)))
        np.testing.assert_allclose(got, want, atol=1e-12)


class TestImages:
    @pytest.mark.parametrize("side", [1, 2, 4])
    def test_frqi_is_decoded_from_its_state(self, side):
        image = RNG.random((side, side))
        circuit = encode("frqi", side * side)
        k = side.bit_length() - 1
        assert circuit.n_wires == 1 + 2 * k
        got = state(circuit, image.ravel()).reshape(2, side, side)
        # Wire 0 is the color, then the bits of the row, then those of the column.
        want = np.array([np.cos(np.pi / 2 * image), np.sin(np.pi / 2 * image)]) / side
        np.testing.assert_allclose(got, want, atol=1e-12)
        decoded = 2 / np.pi * np.arctan2(got[1].real, got[0].real)
        np.testing.assert_allclose(decoded, image, atol=1e-12)
        assert +circuit.counts() == +Counter({"H": 2 * k, "RY": side**2, "CNOT": side**2 if side > 1 else 0})

    @pytest.mark.parametrize(("side", "bits"), [(1, 3), (2, 1), (2, 3), (4, 2)])
    def test_neqr_is_decoded_from_its_state(self, side, bits):
        gray = RNG.integers(0, 2**bits, (side, side))
        circuit = encode("neqr", side * side, bits=bits)
        got = state(circuit, gray.ravel() / (2**bits - 1)).reshape(2**bits, side, side)
        want = np.zeros((2**bits, side, side))
        for row, column in product(range(side), repeat=2):
            want[gray[row, column], row, column] = 1 / side
        np.testing.assert_allclose(got, want, atol=1e-12)

    def test_neqr_rounds_to_the_nearest_gray_value(self):
        for x, level in ((0.16, 0), (0.17, 1), (0.5 - 1e-9, 1), (0.51, 2), (1.0, 3)):
            got = np.abs(state(encode("neqr", 1, bits=2), [x]))
            assert got.argmax() == level
            assert got.max() == pytest.approx(1)


@pytest.mark.parametrize("name", encoding_names())
def test_backends_agree_with_the_oracle(name):
    circuit = kernel("basic_entangler", encode(name, 2).n_wires, 1, name, features=2)
    circuit = circuit.with_observables((circuit.observables[0], "X" + "Y" * (circuit.n_wires - 1)))
    x = torch.tensor([[0.15, 0.8], [0.9, 0.35]], dtype=torch.float64)
    w = torch.from_numpy(RNG.normal(size=(1, circuit.n_weights)))
    want = np.array([oracle.run(circuit, row, w[0].numpy())[0] for row in x.numpy()])
    for backend in ("auto", "statevector", "pennylane", "qiskit"):
        got = simulate(circuit, x, w, backend=backend)[:, 0]
        np.testing.assert_allclose(got, want, atol=1e-10, err_msg=backend)
        single = simulate(circuit, x.float(), w.float(), backend=backend)[:, 0]
        np.testing.assert_allclose(single, want, atol=1e-5, err_msg=backend)


def test_every_encoding_says_what_its_numbers_mean():
    for name in encoding_names():
        assert len(find_encoding(name).range) > 20
        assert len(find_encoding(name).source) > 20
        circuit = encode(name, 4)
        assert circuit.n_wires == find_encoding(name).wires(4)
        assert (circuit.n_inputs, circuit.n_weights) == (4, 0)
        assert encode(name, 4, circuit.n_wires + 1).n_wires == circuit.n_wires + 1


class TestReuploading:
    @pytest.mark.parametrize("name", ["heisenberg", "strongly_entangling", "random", "product"])
    @pytest.mark.parametrize("encoding", ["angle", "zz", "dense_angle", "threshold"])
    def test_the_encoding_stands_before_each_layer(self, name, encoding):
        once = kernel(name, 2, 1, encoding, features=2, seed=1)
        encoder = encode(encoding, 2, 2)
        again = kernel(name, 2, 3, encoding, features=2, seed=1, reupload=True)
        block = Circuit(2, once.gates[len(encoder.gates) :])
        want = encoder + block
        for layer in (1, 2):
            want = want + encoder + block.shift_weights(layer * block.n_weights)
        assert again == want.with_observables(once.observables)
        assert again.n_weights == 3 * once.n_weights
        assert again.n_inputs == 2

    def test_amplitudes_cannot_be_repeated(self):
        with pytest.raises(ValueError, match="cannot be repeated"):
            kernel("heisenberg", 2, 2, "amplitude", reupload=True)

    def test_its_degree_grows(self):
        # L uploads make a polynomial of degree L in each feature: sampled on a finer grid, the rest vanishes.
        circuit = kernel("strongly_entangling", 1, 3, reupload=True, seed=0)
        x = 2 * torch.arange(16, dtype=torch.float64)[:, None] / 16
        w = torch.from_numpy(RNG.normal(size=circuit.n_weights))
        spectrum = np.abs(np.fft.fft(simulate(circuit, x, w)[:, 0].numpy()))
        assert (spectrum[4:13] < 1e-10).all()
        assert spectrum[3] > 1e-3


def test_encodings_of_ones_own_are_circuits():
    encoder = encode("zz", 3, entanglement="linear", reps=1)
    circuit = kernel("product", 3, 1, encoder)
    assert circuit.gates[: len(encoder.gates)] == encoder.gates
    with pytest.raises(ValueError, match="encoding has 3 wires, 3 features and 0 weights but the kernel has 4 wires"):
        kernel("product", 4, 1, encoder)
    assert "product" in kernel_names()


def test_options_are_listed():
    assert encoding_options("zz") == {"reps": 2, "entanglement": "full", "scale": 1.0}
    assert encoding_options("angle") == {}


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: encode("zz", 2, rep=2), "did you mean 'reps'"),
        (lambda: encode("zz", 2, reps=0), "was given reps 0: give a whole number of at least 1"),
        (lambda: encode("zz", 2, entanglement="ful"), "did you mean 'full'"),
        (lambda: encode("frqi", 3), "given 3 features: it takes images of 2\\^k by 2\\^l"),
        (lambda: encode("neqr", 4, 5), "holds 2 features on 5 wires but was given 4: use 6 wires"),
        (lambda: encode("dense_angle", 5, 2), "holds 4 features on 2 wires but was given 5: use 3 wires"),
        (lambda: encode("angle", 0), "needs at least 1"),
        (lambda: encode("angle", "4"), "was given '4' features: it needs at least 1, a whole number"),
        (lambda: encode("angle", 4, 4.0), "was given 4.0 wires"),
        (lambda: encode("threshold", 4, threshold=[0.1, 0.2]), r"threshold \[0.1, 0.2\]: give a number"),
        (lambda: encode("zz", 4, reps="2"), "reps '2': give a whole number of at least 1"),
        (lambda: encode("iqp", 4, scale=float("nan")), "scale nan: give a number"),
    ],
)
def test_errors_say_what_to_do(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_selected_rotations_are_the_walsh_transform():
    # Each address turns the target by its own feature, for 8 addresses: read off the blocks of the unitary.
    x = RNG.random(8)
    whole = unitary(encode("frqi", 8), x)
    blocks = whole.reshape(2, 8, 2, 8)[:, :, :, 0]
    for address, half in enumerate(np.pi * x / 2):
        turned = np.array([[np.cos(half), -np.sin(half)], [np.sin(half), np.cos(half)]]) / np.sqrt(8)
        np.testing.assert_allclose(blocks[:, address], turned, atol=1e-12)
