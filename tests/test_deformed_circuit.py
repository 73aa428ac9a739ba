from math import pi

import numpy as np
import oracle
import pytest
import torch
from scipy.linalg import expm

from circuits import Circuit
from circuits.circuit import Angle, Gate
from qconv import simulate
from qconv.deformed import QuantumDeformedConv2d, QuantumDeformedLinear
from qconv.deformed_circuit import neighbor_gate, neuron_circuit
from qconv.patches import unfold

DEFORMATIONS = ("none", "input", "traceless", "pair", "neighbors")


def drawn(layer, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return layer


def means(*shape, seed=0):
    return 2 * torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 1


def run(layer, h, output, backend="statevector"):
    inputs, weights = layer.circuit_inputs(h), layer.circuit_weights(output)
    return simulate(layer.circuit(output), inputs, weights, backend=backend)[:, 0]


@pytest.mark.parametrize("inputs", ["coherent", "mixed"])
@pytest.mark.parametrize("deformation", DEFORMATIONS)
def test_statevectors_give_the_layers_activations(deformation, inputs):
    for n in (2, 3, 4):
        options = {"deformation": deformation, "inputs": inputs, "law": "exact", "dtype": torch.float64}
        layer = drawn(QuantumDeformedLinear(n, 2, norm=False, **options), seed=n)
        h = means(3, n)
        for output in range(2):
            torch.testing.assert_close(run(layer, h, output), layer(h)[:, output].detach(), atol=1e-12, rtol=0)


@pytest.mark.parametrize("backend", ["qiskit", "pennylane"])
@pytest.mark.parametrize(
    ("deformation", "inputs"), [("pair", "coherent"), ("neighbors", "mixed"), ("neighbors", "coherent")]
)
def test_simulators_give_the_layers_activations(backend, deformation, inputs):
    n = 3 if inputs == "coherent" else 2
    options = {"deformation": deformation, "inputs": inputs, "law": "exact", "dtype": torch.float64}
    layer = drawn(QuantumDeformedLinear(n, 1, norm=False, **options))
    h = means(2, n)
    torch.testing.assert_close(run(layer, h, 0, backend), layer(h)[:, 0].detach(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("scale", [1.0, -0.8, 0.0])
@pytest.mark.parametrize("shift", [0.0, 0.7, -1.3, 9.0, -9.0])
def test_norm_moves_the_threshold_of_the_count(scale, shift):
    layer = drawn(QuantumDeformedLinear(3, 1, law="exact", dtype=torch.float64)).eval()
    with torch.no_grad():
        layer.norm.weight.fill_(scale)
        layer.norm.bias.fill_(shift)
        layer.norm.running_mean.fill_(0.2)
    h = means(2, 3)
    torch.testing.assert_close(run(layer, h, 0), layer(h)[:, 0].detach(), atol=1e-12, rtol=0)


@pytest.mark.parametrize("deformation", ["pair", "neighbors"])
def test_convolution_gives_the_circuit_of_a_patch(deformation):
    layer = QuantumDeformedConv2d(
        2,
        2,
        (1, 2),
        stride=(1, 2),
        groups=1,
        bias=True,
        deformation=deformation,
        norm=False,
        law="exact",
        dtype=torch.float64,
    )
    drawn(layer)
    h = means(1, 2, 2, 4)
    patches = unfold(h, layer.geometry)
    for output in range(2):
        want = layer(h)[0, output].flatten().detach()
        torch.testing.assert_close(run(layer, patches, output), want, atol=1e-12, rtol=0)


def test_register_holds_the_count():
    """Every basis state of inputs and weights: the whole register, not its sign alone, against counting."""
    n, threshold = 3, 2
    circuit = neuron_circuit(n, (), threshold, False, False, False)
    size = circuit.n_wires - 2 * n
    readout = circuit.with_observables(tuple("I" * k + "Z" + "I" * (circuit.n_wires - k - 1) for k in range(size)))
    for bits in np.ndindex((2,) * (2 * n)):
        x = torch.tensor([bits[:n]], dtype=torch.float64)
        w = pi * torch.tensor(bits[n:], dtype=torch.float64)
        signs = simulate(readout, x, w, backend="statevector")[0]
        register = sum(2 ** (size - 1 - k) * round((1 - z) / 2) for k, z in enumerate(signs.tolist()))
        torch.testing.assert_close(signs.abs(), torch.ones(size, dtype=torch.float64), atol=1e-12, rtol=0)
        assert register == (sum(a == b for a, b in zip(bits[:n], bits[n:], strict=True)) - threshold) % 2**size


def test_neighbor_gate_is_its_exponential():
    gates = neighbor_gate(0, 1, Angle("weight", 0), Angle("weight", 1))
    d, r = 0.7, 1.9
    values = {"weight": (d, r)}
    got = np.eye(4)
    for gate in gates:
        angles = [a.scale * values["weight"][a.index] if a.source == "weight" else a.offset for a in gate.angles]
        got = oracle.gate_matrix(gate, angles, 2) @ got
    axis = np.cos(d) * oracle.Z - np.sin(d) * oracle.X
    np.testing.assert_allclose(got, expm(-0.5j * r * np.kron(axis, oracle.Y)), atol=1e-14)


def test_the_circuit_is_data():
    layer = drawn(QuantumDeformedLinear(3, 2, deformation="neighbors", norm=False))
    circuit = layer.circuit(1)
    assert isinstance(circuit, Circuit)
    assert circuit.n_inputs == 3
    assert circuit.n_weights == len(layer.circuit_weights(1)) == 3 * 4 + 4
    assert circuit.counts()["CRY"] == 3
    assert circuit.counts()["RZZ"] == 2
    assert Gate("CNOT", (2, 8)) in QuantumDeformedLinear(3, 1, inputs="mixed", norm=False).circuit().gates
    with pytest.raises(ValueError, match="output is -1"):
        layer.circuit(-1)
    with pytest.raises(ValueError, match="output is 2"):
        layer.circuit_weights(2)


def test_a_hard_layer_has_no_circuit_of_probabilities():
    layer = drawn(QuantumDeformedLinear(3, 2, deformation="none", norm=False, law="exact"))
    h = means(2, 3).float()
    before = run(layer, h, 0)
    torch.testing.assert_close(before, layer(h)[:, 0].detach(), atol=1e-5, rtol=0)
    with torch.no_grad():
        layer.weight[:, 0] = 0.1  # a weight of 0 in "ternary"
    layer.binarize_("ternary")
    for ask in (layer.circuit, layer.circuit_weights):
        with pytest.raises(ValueError, match=r"hard is True: .* before binarize"):
            ask(0)
    layer.reset_parameters()
    torch.testing.assert_close(run(layer, h, 1), layer(h)[:, 1].detach(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("output", ["moments", "mean"])
def test_a_layer_that_gives_sums_has_no_circuit(output):
    layer = drawn(QuantumDeformedLinear(3, 2, output=output, law="exact"))
    for ask in (layer.circuit, layer.circuit_weights):
        with pytest.raises(ValueError, match=rf"output is '{output}', .* build the layer with output='activation'"):
            ask(0)
    # The remedy that the error names.
    other = QuantumDeformedLinear(3, 2, law="exact").eval()
    other.load_state_dict(layer.state_dict())
    h = means(2, 3).float()
    torch.testing.assert_close(run(other, h, 1), other(h)[:, 1].detach(), atol=1e-5, rtol=0)


def test_a_layer_that_draws_bits_has_the_circuit_of_their_means():
    layer = drawn(QuantumDeformedLinear(3, 2, output="sample", law="exact", norm=False, dtype=torch.float64)).eval()
    h = means(2, 3)
    torch.testing.assert_close(run(layer, h, 0), layer(h)[:, 0].detach(), atol=1e-12, rtol=0)
