from itertools import product

import numpy as np
import oracle
import pytest
import torch

from circuits import Circuit, Gate, const, encoding_names, find_encoding, find_readout, kernel, readout_names
from qconv import QuantumConv2d, simulate
from qconv.backends.protocol import Unsupported
from qconv.energy import count, estimate
from qconv.reading import read_out
from qconv.testing import check_layer

RNG = np.random.default_rng(0)


def state(circuit, x, w):
    result = np.eye(2**circuit.n_wires, dtype=complex)[0]
    for gate in circuit.gates:
        values = [oracle.angle_value(angle, x, w) for angle in gate.angles]
        result = oracle.gate_matrix(gate, values, circuit.n_wires) @ result
    return result


def ones(index):
    return bin(index).count("1")


def expected(readout, circuit, x, w):
    """What a readout means, from the state alone."""
    psi, n = state(circuit, x, w), circuit.n_wires
    p = np.abs(psi) ** 2
    signs = np.array([[(-1) ** int(bit) for bit in f"{k:0{n}b}"] for k in range(2**n)])
    z = p @ signs
    if readout == "paulis2":
        words = ["".join(letters) for letters in product("IXYZ", repeat=n)]
        return {t: np.vdot(psi, oracle.pauli_string(t) @ psi).real for t in words if 0 < n - t.count("I") <= 2}
    return {
        "z": z,
        "z0": z[:1],
        "zz": [p @ (signs[:, a] * signs[:, b]) for a in range(n) for b in range(a + 1, n)],
        "probabilities": p,
        "ones": [sum(p[k] * ones(k) for k in range(2**n))],
        "most_likely_ones": [ones(int(p.argmax()))],
    }[readout]


def layer_of(readout, dtype=torch.float64, **options):
    torch.manual_seed(0)
    outs = {"probabilities": 16, "paulis2": 20, "zz": 10}.get(readout, 8)
    layer = QuantumConv2d(
        1, outs, (1, 3), kernel="strongly_entangling", depth=1, readout=readout, dtype=dtype, **options
    )
    with torch.no_grad():
        layer.weight.uniform_(0, 2 * np.pi)
    return layer


class TestAgainstTheState:
    @pytest.mark.parametrize("backend", ["auto", "statevector", "pennylane", "qiskit"])
    @pytest.mark.parametrize("readout", readout_names())
    def test_outputs_are_what_the_readout_says(self, readout, backend):
        layer = layer_of(readout, backend=backend)
        x = torch.from_numpy(RNG.random((1, 1, 1, 4)))
        got = layer(x)[0, :, 0].detach().numpy()
        for k in range(2):
            rows = [
                expected(readout, layer.circuit, x[0, 0, 0, k : k + 3].numpy(), w.detach().numpy())
                for w in layer.weight
            ]
            if readout == "paulis2":
                rows = [[row[text] for text in layer.circuit.observables] for row in rows]
            np.testing.assert_allclose(got[:, k], np.concatenate(rows)[: len(got)], atol=1e-10)

    def test_all_pauli_strings_are_there_once(self):
        strings = find_readout("paulis2", 3).observables
        assert len(set(strings)) == len(strings) == 9 + 27
        assert strings[:4] == ("XII", "YII", "ZII", "IXI")
        assert set(find_readout("paulis3", 3).observables) == {"".join(t) for t in product("IXYZ", repeat=3)} - {"III"}

    def test_a_bit_string_has_wire_0_first(self):
        # RX by a quarter turn, so that wires differ: |1> on wire 1 alone.
        circuit = Circuit(2, (Gate("RX", (1,), (const(np.pi),)),), find_readout("probabilities", 2).observables)
        matrix, constant = find_readout("probabilities", 2).table()
        values = simulate(circuit, torch.zeros(1, 0), torch.zeros(0))[0].numpy()
        np.testing.assert_allclose(matrix @ values + constant, [0, 1, 0, 0], atol=1e-6)


class TestProbabilities:
    @pytest.mark.parametrize("shots", [None, 100])
    def test_they_are_probabilities(self, shots):
        layer = layer_of("probabilities", shots=shots, seed=0, backend="qiskit")
        values = layer(torch.rand(1, 1, 2, 4, dtype=torch.float64)).detach().reshape(2, 8, -1)
        torch.testing.assert_close(values.sum(1), torch.ones_like(values[:, 0]), atol=1e-12, rtol=0)
        assert values.min() >= -1e-12
        if shots is not None:
            # Frequencies of counts, all from one setting.
            torch.testing.assert_close(values * shots, (values * shots).round(), atol=1e-9, rtol=0)

    @pytest.mark.parametrize("readout", ["probabilities", "ones"])
    def test_gradients_are_those_of_finite_differences(self, readout):
        layer = layer_of(readout)
        x = torch.rand(1, 1, 1, 3, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(layer, x)
        weight = layer.weight.detach().clone().requires_grad_()
        assert torch.autograd.gradcheck(lambda w: torch.func.functional_call(layer, {"weight": w}, x.detach()), weight)

    @pytest.mark.parametrize("readout", ["probabilities", "ones", "paulis2"])
    def test_the_classical_twin_has_the_same_outputs(self, readout):
        layer = layer_of(readout, bias=True)
        with torch.no_grad():
            layer.bias.normal_()
        x = torch.rand(2, 1, 2, 5, dtype=torch.float64)
        torch.testing.assert_close(layer.to_classical()(x), layer(x), atol=1e-10, rtol=0)


class TestMostLikely:
    def test_it_has_no_gradient_and_no_polynomial(self):
        layer = layer_of("most_likely_ones")
        values = layer(torch.rand(1, 1, 2, 4, dtype=torch.float64, requires_grad=True))
        assert not values.requires_grad
        assert set(values.unique().tolist()) <= {0.0, 1.0, 2.0, 3.0}
        with pytest.raises(Unsupported, match="is no polynomial"):
            layer.to_classical()

    def test_nan_stays_nan(self):
        x = torch.tensor([[[[0.1, torch.nan, 0.3, 0.2, 0.2, 0.2]]]], dtype=torch.float64)
        values = layer_of("most_likely_ones")(x)
        assert values[..., :2].isnan().all()
        assert values[..., 2:].isfinite().all()

    def test_of_several_the_first_counts(self):
        # RY(pi x) after H: both strings are as likely at x = 0, and 0 is the first.
        circuit = Circuit(1, (Gate("H", (0,)), *kernel("product", 1, 1).gates[:1]), ("Z",))
        layer = QuantumConv2d(1, 1, 1, kernel=circuit, readout="most_likely_ones", dtype=torch.float64)
        assert layer(torch.tensor([[[[-0.2, 0.0, 0.2]]]], dtype=torch.float64)).flatten().tolist() == [0.0, 0.0, 1.0]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("backend", ["auto", "statevector", "fourier", "pennylane", "qiskit"])
    @pytest.mark.parametrize(
        ("wires", "gates", "ones"),
        [
            (2, ["H0", "H1"], 0),
            (2, ["H0", "CNOT01", "X0"], 1),
            (3, ["H0", "CNOT01", "CNOT12"], 0),
            (3, ["X0", "H1", "T1", "H2", "CNOT12", "H0"], 0),
            (3, ["H0", "CNOT01", "X0", "RY2"], 1),
            (4, ["H0", "T0", "H0", "SWAP03", "H1", "CNOT12", "X1", "T2", "H0"], 1),
            (4, ["RX0", "RX1", "RX2", "RX3", "CNOT01", "T1", "CNOT23"], 0),
        ],
    )
    def test_ties_are_no_matter_of_rounding(self, wires, gates, ones, backend, dtype):
        # Features are 0: what is measured is the same for every patch, and exact strings tie.
        added = [
            Gate(text.rstrip("0123"), tuple(map(int, text[len(text.rstrip("0123")) :])), (const(np.pi / 2),))
            if text[0] == "R"
            else Gate(text.rstrip("0123"), tuple(map(int, text[len(text.rstrip("0123")) :])))
            for text in gates
        ]
        encoding = [gate for gate in kernel("product", wires, 1).gates if gate.depends_on("input")]
        circuit = Circuit(wires, (*encoding, *added), ("Z" * wires,))
        zeros = np.zeros(wires)
        p = np.abs(state(circuit, zeros, zeros)) ** 2
        assert bin(int((p > p.max() - 1e-9).argmax())).count("1") == ones
        layer = QuantumConv2d(
            1, 1, (1, wires), kernel=circuit, readout="most_likely_ones", dtype=dtype, backend=backend
        )
        assert layer(torch.zeros(1, 1, 1, wires, dtype=dtype)).item() == ones

    def test_counts_that_differ_by_one_are_no_tie(self):
        readout = find_readout("most_likely_ones", 1)
        for shots in (101, 999_999):
            # One sample more in |1>.
            values = torch.tensor([[-1 / shots]], dtype=torch.float32)
            assert read_out(readout, values, shots=shots).item() == 1
            assert read_out(readout, torch.zeros(1, 1), shots=shots).item() == 0

    def test_hendersons_layer(self):
        # Threshold, a random circuit, ones of the most likely string.
        layer = QuantumConv2d(
            1, 2, 2, kernel="random", encoding="threshold", readout="most_likely_ones", seed=3, dtype=torch.float64
        )
        bits = (torch.rand(1, 1, 3, 3) > 0.5).double()
        assert torch.equal(layer(0.4 * bits + 0.3), layer(bits))
        check_layer(layer, 1, size=4)


@pytest.mark.parametrize("encoding", encoding_names())
def test_layers_of_every_encoding_and_readout_conform(encoding):
    # Pairs of wires want two.
    size = (1, 2) if find_encoding(encoding).wires(2) > 1 else (2, 2)
    for readout in readout_names():
        layer = QuantumConv2d(1, 3, size, kernel="basic_entangler", depth=1, encoding=encoding, readout=readout)
        torch.nn.init.uniform_(layer.weight, 0, 2 * np.pi)
        check_layer(layer, 1, size=3, atol=1e-5)


def test_filters_follow_from_the_outputs():
    assert layer_of("ones").weight.shape[0] == 8
    assert layer_of("probabilities").weight.shape[0] == 2
    assert layer_of("most_likely_ones").weight.shape[0] == 8
    grouped = QuantumConv2d(2, 6, (1, 2), groups=2, readout="ones", dtype=torch.float64)
    x = torch.rand(1, 2, 2, 3, dtype=torch.float64)
    alone = QuantumConv2d(1, 3, (1, 2), readout="ones", dtype=torch.float64)
    alone.weight.data = grouped.weight.data[3:]
    torch.testing.assert_close(grouped(x)[:, 3:], alone(x[:, 1:]), atol=1e-12, rtol=0)


def test_a_kernel_that_brings_observables_takes_another_readout_where_asked():
    circuit = kernel("product", 2, readout="XX")
    assert QuantumConv2d(1, 1, (1, 2), kernel=circuit).circuit.observables == ("XX",)
    assert QuantumConv2d(1, 4, (1, 2), kernel=circuit, readout="probabilities").circuit.observables == (
        "IZ",
        "ZI",
        "ZZ",
    )


def test_the_map_is_in_the_ledger():
    plain, mapped, decided = (
        QuantumConv2d(1, 1, (1, 2), readout=r) for r in (["IZ", "ZI", "ZZ"], "probabilities", "most_likely_ones")
    )
    more = mapped.counts((1, 2, 2)) - plain.counts((1, 2, 2))
    assert more["mac:fp32*fp32"] == 2 * 4 * 3
    assert decided.counts((1, 2, 2))["cmp:fp32"] == 2 * 3
    assert estimate(count(decided, (1, 2, 2))).joules > 0


@pytest.mark.parametrize(
    ("readout", "wires", "says"),
    [
        ("z4", 4, "reads wire 4 but there are 4: give z0 to z3"),
        ("zz", 1, "reads pairs of wires"),
        ("paulis5", 4, "give paulis1 to paulis4"),
        ("paulis0", 4, "give paulis1 to paulis4"),
        ("probabilities", 13, "at most 4095"),
        ("paulis6", 9, "at most 4095"),
        ("probability", 4, "did you mean 'probabilities'"),
        ("root", 4, "belongs to named kernels that discard wires"),
        ("ZA", 2, "is no Pauli string of 2 letters"),
    ],
)
def test_errors_say_what_to_do(readout, wires, says):
    with pytest.raises(ValueError, match=says):
        find_readout(readout, wires)
