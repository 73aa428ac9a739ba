from functools import reduce
from math import pi, prod, sqrt

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from circuits import Angle, Channel, Circuit, Gate, NoiseModel, kernel
from qconv import FourierConv2d, QuantumConv2d, Unsupported, simulate
from qconv.fourier_conv import Spectrum
from qconv.patches import unfold
from qconv.tensor_layers import TensorNetworkConv2d
from qconv.tensors import conversions
from qconv.tensors.circuits import TreeNetwork, isometric_circuit, layer_network, train_network
from qconv.tensors.conversions import KernelTrain, kernel_to_tensor_train
from qconv.tensors.trains import canonical, inner, norm, to_dense

NOISE = NoiseModel((("*", Channel("amplitude_damping", 0.1)), ("CNOT", Channel("depolarizing", 0.05))))


def uniform(*shape, seed=0, low=-2.0, high=2.0):
    generator = torch.Generator().manual_seed(seed)
    return low + (high - low) * torch.rand(*shape, generator=generator, dtype=torch.float64)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def expected(circuit, x, weights, noise=None):
    """(P, filters * observables)."""

    def values(row, filter_):
        return oracle.run(circuit, row, filter_)[0] if noise is None else oracle.run_noisy(circuit, row, filter_, noise)

    return np.stack([np.concatenate([values(r, w) for w in weights.numpy()]) for r in x.numpy()])


def inp(index, scale=pi, offset=0.0):
    return Angle("input", index, scale, offset)


def odd_circuit():
    """Inputs in another order than their wires, one twice on its wire, one unread, an idle wire, other axes."""
    gates = (
        Gate("RX", (2,), (inp(0, 1.3, 0.4),)),
        Gate("RY", (0,), (inp(3, -0.7),)),
        Gate("RZ", (0,), (inp(3, 1.4, 0.2),)),
        Gate("H", (1,)),
        Gate("RY", (3,), (Angle("const", 0, 1.0, 0.3),)),
        Gate("RZ", (1,), (inp(1, 2.0),)),
    )
    block = kernel("heisenberg", 4, 1).gates[4:]
    return Circuit(4, gates + block, ("ZIII", "XYZI", "IIIY"))


CIRCUITS = {
    "heisenberg": kernel("heisenberg", 4, 1, readout=["ZIII", "XYIZ", "IIIZ"]),
    "strongly_entangling": kernel("strongly_entangling", 3, 2),
    "reversed wires": odd_circuit(),
    "random": kernel("random", 3, 2),
}


@pytest.mark.parametrize("noise", [None, NOISE], ids=["clean", "noisy"])
@pytest.mark.parametrize("way", ["table", "pull back"])
@pytest.mark.parametrize("name", CIRCUITS)
def test_kernels_are_their_trains(name, way, noise, monkeypatch):
    circuit = CIRCUITS[name]
    if way == "pull back":
        monkeypatch.setattr(conversions, "MAX_COEFFICIENTS", 1)
    weights, x = uniform(2, circuit.n_weights), uniform(5, circuit.n_inputs, seed=1)
    train = kernel_to_tensor_train(circuit, weights, noise=noise)
    np.testing.assert_allclose(train(x), expected(circuit, x, weights, noise), atol=1e-10)
    np.testing.assert_allclose(train(x.float()), train(x), atol=2e-5)
    assert train(x.float()).dtype == torch.float32
    assert train.error == train.bound == 0


def test_the_pull_back_finds_the_tables_ranks(monkeypatch):
    circuit = kernel("heisenberg", 5, 1, readout=["ZIIII", "IIXII"])
    weights = uniform(circuit.n_weights)
    table = kernel_to_tensor_train(circuit, weights)
    monkeypatch.setattr(conversions, "MAX_COEFFICIENTS", 1)
    pulled = kernel_to_tensor_train(circuit, weights)
    assert pulled.ranks == table.ranks
    torch.testing.assert_close(to_dense(pulled.cores), to_dense(table.cores), atol=1e-12, rtol=0)
    # The product kernel entangles nothing: each output is one product.
    product = kernel_to_tensor_train(kernel("product", 5, 1, readout="ZZZZZ"), uniform(30))
    assert product.ranks == (1,) * 5


def test_reuploading_kernels_are_trains_over_higher_waves():
    block = kernel("heisenberg", 2, 1)
    circuit = block + block.shift_weights(block.n_weights)
    weights, x = uniform(1, circuit.n_weights), uniform(4, 2, seed=1)
    train = kernel_to_tensor_train(circuit, weights)
    assert [core.shape[1] for core in train.cores] == [2, 5, 5]
    np.testing.assert_allclose(train(x), expected(circuit, x, weights), atol=1e-10)


def test_a_kernel_of_sixteen_wires():
    # 3^16 coefficients are 43 million an output.
    circuit = kernel("heisenberg", 16, 1, readout=["Z" + "I" * 15, "I" * 7 + "XY" + "I" * 7])
    weights, x = uniform(circuit.n_weights, low=-1, high=1), uniform(2, 16, seed=1)
    train = kernel_to_tensor_train(circuit, weights)
    torch.testing.assert_close(train(x), simulate(circuit, x, weights, backend="statevector"), atol=1e-10, rtol=0)


@pytest.mark.parametrize("groups", [1, 2])
def test_layers(groups):
    layer = QuantumConv2d(2, 6, (2, 2 // groups), groups=groups, bias=True, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(uniform(*layer.weight.shape))
        layer.bias.copy_(uniform(6))
    images = uniform(2, 2, 4, 4, seed=2)
    for found in (layer, layer.to_classical()):
        train = kernel_to_tensor_train(found)
        parts = [
            train(unfold(part, layer.geometry))[:, 6 // groups * g : 6 // groups * (g + 1)]
            for g, part in enumerate(images.chunk(groups, dim=1))
        ]
        want = (layer(images) - layer.bias[:, None, None]).movedim(1, -1).flatten(0, 2)
        torch.testing.assert_close(torch.cat(parts, dim=1), want.detach(), atol=1e-10, rtol=0)


def test_quantized_coefficients_as_they_run():
    layer = FourierConv2d(1, 3, 2, weight="int4", dtype=torch.float64)
    patches = uniform(5, 4)
    want = layer.evaluate(patches, layer.quantized_weight())
    torch.testing.assert_close(kernel_to_tensor_train(layer)(patches), want.detach(), atol=1e-10, rtol=0)


def trained(wires=6, depth=2):
    circuit = kernel("heisenberg", wires, depth)
    return circuit, uniform(circuit.n_weights, seed=3, low=-1, high=1)


@pytest.mark.parametrize("bond", [2, 6, 20])
def test_truncation_deviates_within_the_bound(bond):
    circuit, weights = trained()
    exact = kernel_to_tensor_train(circuit, weights)
    short = exact.truncate(bond)
    assert max(short.ranks) <= bond
    difference = to_dense(short.cores) - to_dense(exact.cores)
    assert short.error == pytest.approx(float(torch.linalg.vector_norm(difference)), rel=1e-10)
    assert short.bound == pytest.approx(short.error * 2**3, rel=1e-12)
    x = uniform(4000, 6, seed=5)
    deviation = torch.linalg.vector_norm(short(x) - exact(x), dim=1)
    assert 0 < deviation.max() <= short.bound
    # Over a whole period of every input, here 2 pi / pi; with 4000 patches the mean is known to some percent.
    assert deviation.square().mean().sqrt() <= short.error
    again = short.truncate(1)
    assert again.error >= float(torch.linalg.vector_norm(to_dense(again.cores) - to_dense(exact.cores)))


def test_the_bound_is_reached():
    # What was cut off is a multiple of the waves' product at one patch: no smaller bound holds for all kernels.
    spectrum = Spectrum((1, 2), (pi, 1.0))
    x = torch.tensor([[0.3, -0.8]], dtype=torch.float64)
    lost = [wave.t()[:, :, None] for wave in spectrum.waves(x)]
    cut = KernelTrain((torch.ones(1, 1, 1).double(), *lost), spectrum)
    error = float(norm(cut.cores))
    assert abs(float(cut(x))) == pytest.approx(KernelTrain(cut.cores, spectrum, error).bound, rel=1e-12)
    assert error == pytest.approx(sqrt(2 * 3))


def test_a_tolerance_is_a_promise_for_all_outputs():
    circuit, weights = trained()
    exact = kernel_to_tensor_train(circuit, weights)
    short = exact.truncate(tolerance=0.1 / 2**3)
    assert short.bound <= 0.1
    assert sum(short.ranks) < sum(exact.ranks)
    x = uniform(500, 6, seed=5)
    assert (short(x) - exact(x)).abs().max() <= 0.1


# Trees


def local(x):
    return np.stack([np.cos(pi * x / 2), np.sin(pi * x / 2)], axis=-1)


def dense_tree(network):
    """(outputs, 2, ..., 2) by one sum over all bonds."""
    n, count = network.features, len(network.tensors)
    # Every id has a letter of its own: that of the leg towards its parent.
    arguments = []
    for k, (tensor, children) in enumerate(zip(network.tensors, network.children, strict=True)):
        arguments += [tensor.numpy(), [n + k, *children]]
    return np.einsum(*arguments, [n + count - 1, *range(n)])


def tree_values(network, x):
    """f_o at patches (P, n): (P, outputs)."""
    dense = dense_tree(network)
    vectors = [reduce(np.kron, local(row)) for row in x.numpy()]
    return np.stack([dense.reshape(len(dense), -1) @ vector for vector in vectors])


def train(sites, bond, outputs=None, dtype=torch.float64, seed=0, at=0):
    sizes = [2] * sites if outputs is None else [*[2] * at, outputs, *[2] * (sites - at)]
    edges = [1, *[bond] * (len(sizes) - 1), 1]
    return [normal(edges[k], size, edges[k + 1], seed=seed + k, dtype=dtype) for k, size in enumerate(sizes)]


def test_a_train_is_its_network():
    for at in (0, 2, 4):
        cores = train(4, 3, outputs=3, at=at)
        want = to_dense(cores).movedim(at, 0)
        np.testing.assert_allclose(dense_tree(train_network(cores, at)), want, atol=1e-12)
        turned = dense_tree(train_network(cores, at, [2, 0, 3, 1]))
        np.testing.assert_allclose(np.transpose(turned, (0, 3, 1, 4, 2)), want, atol=1e-12)
    cores = train(4, 3)
    np.testing.assert_allclose(dense_tree(train_network(cores))[0], to_dense(cores), atol=1e-12)


def tree(children, sizes, seed=0, dtype=torch.float64):
    """Sizes are those of the tensors' parent legs."""
    features = sum(map(len, children)) - len(children) + 1
    tensors = []
    for k, (own, size) in enumerate(zip(children, sizes, strict=True)):
        below = [2 if child < features else sizes[child - features] for child in own]
        tensors.append(normal(size, *below, seed=seed + k, dtype=dtype))
    return TreeNetwork(tuple(tensors), tuple(children))


BINARY = ((0, 1), (2, 3), (4, 5))
CHAINS = ((0,), (4, 1), (3,), (2, 6), (5, 7))  # two chains that meet in the root
NETWORKS = {
    "mps, bond 2": train_network(train(5, 2)),
    "mps, bond 4": train_network(train(5, 4)),
    "mps, bond 3, complex": train_network(train(4, 3, dtype=torch.complex128)),
    "mps, bond 1": train_network(train(3, 1)),
    "mps of one site": train_network(train(1, 1)),
    "mps, 3 outputs": train_network(train(4, 4, outputs=3), output=0),
    "mps, outputs between sites": train_network(train(4, 3, outputs=4, at=2), output=2, features=[0, 1, 3, 2]),
    "mps, outputs last": train_network(train(3, 2, outputs=2, at=3), output=3),
    "mps, more outputs than states": train_network(train(3, 2, outputs=4), output=0),
    "tree, bond 2": tree(BINARY, (2, 2, 1)),
    "tree, bond 4": tree(((0, 1), (2, 3), (4, 5), (6, 7)), (4, 2, 4, 1)),
    "tree, bond 4, 2 outputs": tree(BINARY, (4, 3, 2)),
    "tree of three children": tree(((0, 1, 2), (4, 3)), (2, 3)),
    "chains": tree(CHAINS, (2, 3, 2, 3, 2)),
}


def matrix_of(circuit, weights):
    """All gates but the encoding, as one dense matrix."""
    result = np.eye(2**circuit.n_wires)
    for gate in circuit.gates:
        if not gate.depends_on("input"):
            values = [oracle.angle_value(angle, np.zeros(0), weights.numpy()) for angle in gate.angles]
            result = oracle.gate_matrix(gate, values, circuit.n_wires) @ result
    return result


def amplitudes(found, x):
    """Amplitude (P, zeros, read) of every outcome, from dense matrices."""
    n = found.circuit.n_wires
    features = x.shape[1]
    encoded = [reduce(np.kron, [*local(row), *[np.array([1, 0])] * (n - features)]) for row in x.numpy()]
    states = np.stack(encoded) @ matrix_of(found.circuit, found.weights).T
    grid = states.reshape(len(x), *(2,) * n)
    grid = np.transpose(grid, (0, *(1 + w for w in found.zeros), *(1 + w for w in found.read)))
    return grid.reshape(len(x), 2 ** len(found.zeros), -1)


@pytest.mark.parametrize("name", NETWORKS)
def test_amplitudes_of_the_circuit_are_the_network(name):
    network = NETWORKS[name]
    x = uniform(6, network.features, seed=1)
    found = isometric_circuit(network)
    want = tree_values(network, x)
    got = found.scale * amplitudes(found, x)[:, 0, : found.outputs]
    # One global phase for all patches and outputs.
    phase = np.vdot(got, want) / np.vdot(got, got)
    assert abs(phase) == pytest.approx(1, abs=1e-7)
    np.testing.assert_allclose(phase * got, want, atol=1e-7 * np.abs(want).max())
    if name == "mps, bond 2":
        # States that the post-selection must not see are there.
        assert np.abs(amplitudes(found, x)[:, 1:]).max() > 0.1


@pytest.mark.parametrize("backend", ["statevector", "pennylane", "qiskit", "fourier"])
@pytest.mark.parametrize("name", ["mps, bond 4", "mps, 3 outputs", "tree, bond 2", "tree, bond 4, 2 outputs", "chains"])
def test_probabilities_on_every_backend(name, backend):
    network = NETWORKS[name]
    x = uniform(3, network.features, seed=1)
    found = isometric_circuit(network)
    values = simulate(found.circuit, x, found.weights, backend=backend)
    got = found.scale**2 * found.probabilities(values)
    want = np.abs(tree_values(network, x)) ** 2
    np.testing.assert_allclose(got, want, atol=1e-6 * want.max())


def orthonormal(*shape, seed=0):
    q, _ = torch.linalg.qr(normal(int(prod(shape[1:])), shape[0], seed=seed))
    return q.T.reshape(shape).contiguous()


def classifier(outputs=2):
    """An isometric tree: 2 to 1 qubits in each tensor."""
    return TreeNetwork((orthonormal(2, 2, 2), orthonormal(2, 2, 2, seed=1), orthonormal(outputs, 2, 2)), BINARY)


@pytest.mark.parametrize("backend", ["statevector", "pennylane", "qiskit"])
@pytest.mark.parametrize("outputs", [2, 4])
def test_discarding_traces_out(outputs, backend):
    network = classifier(outputs)
    x = uniform(4, 4, seed=1)
    found = isometric_circuit(network, "discard")
    assert found.circuit.n_wires == 4
    assert len(found.circuit.observables) == outputs - 1
    # Density matrix of the output register, all other wires traced out.
    all_outcomes = amplitudes(found, x)
    rho = np.einsum("pmo,pmq->poq", all_outcomes, all_outcomes.conj())
    got = found.probabilities(simulate(found.circuit, x, found.weights, backend=backend))
    np.testing.assert_allclose(got, np.einsum("poo->po", rho).real, atol=1e-6)
    np.testing.assert_allclose(got.sum(1), 1, atol=1e-6)
    # Its term with all freed qubits in 0 is the network itself, no larger than the whole.
    part = np.abs(tree_values(network, x)) ** 2
    np.testing.assert_allclose(found.scale, 1, atol=1e-12)
    np.testing.assert_allclose(np.abs(all_outcomes[:, 0]) ** 2, part, atol=1e-7)
    assert (got.numpy() >= part - 1e-6).all()
    assert (got.numpy() - part).max() > 0.01


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_the_inverse_prepares_a_matrix_product_state(dtype):
    cores = train(4, 4, dtype=dtype, seed=7)
    found = isometric_circuit(train_network(cores))
    assert found.scale == pytest.approx(float(norm(cores)), rel=1e-10)
    prepared = matrix_of(found.preparation(), found.weights)[:, 0]
    overlap = np.dot(to_dense(cores).flatten().numpy(), prepared) / found.scale
    assert abs(overlap) == pytest.approx(1, abs=1e-7)


def test_canonical_cores_are_what_the_circuit_is_made_of():
    cores = train(4, 4)
    assert abs(float(inner(cores, cores)) - isometric_circuit(train_network(canonical(cores, 2))).scale ** 2) < 1e-8


def test_a_network_is_a_quantum_kernel():
    network = classifier()
    found = isometric_circuit(network, "discard")
    layer = QuantumConv2d(1, 1, 2, kernel=found.circuit, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(found.weights)
    images = uniform(2, 1, 3, 3, seed=4)
    out = layer(images)
    rho = np.abs(amplitudes(found, unfold(images, layer.geometry))) ** 2
    want = rho.sum(1) @ np.array([1, -1])
    np.testing.assert_allclose(out.detach().movedim(1, -1).flatten(), want, atol=1e-6)
    out.sum().backward()
    assert layer.weight.grad.abs().max() > 0


@settings(max_examples=15)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 3), st.integers(0, 99))
def test_any_train(bond, sites, outputs, seed):
    network = train_network(train(sites, bond, outputs, seed=seed), output=0)
    x = uniform(3, sites, seed=seed)
    found = isometric_circuit(network)
    want = np.abs(tree_values(network, x)) ** 2
    got = (np.abs(found.scale * amplitudes(found, x)[:, 0, :outputs])) ** 2
    np.testing.assert_allclose(got, want, atol=1e-6 * found.scale**2)
    values = simulate(found.circuit, x, found.weights, backend="statevector")
    np.testing.assert_allclose(found.scale**2 * found.probabilities(values), want, atol=1e-6 * found.scale**2)


@pytest.mark.parametrize(
    "options",
    [
        {"structure": "mps", "kernel_size": (2, 3), "bond_dim": 4},
        {"structure": "mps", "kernel_size": (3, 2), "order": "raster", "bond_dim": 2},
        {"structure": "tree", "kernel_size": (2, 3), "bond_dim": 3},
        {"structure": "tree", "kernel_size": (1, 2), "in_channels": 4, "groups": 2, "site": "feature", "bond_dim": 2},
        {"structure": "mps", "kernel_size": (2, 1), "in_channels": 2, "site": "feature", "bond_dim": 2},
    ],
)
def test_layers_become_circuits(options):
    torch.manual_seed(0)
    channels, groups = options.pop("in_channels", 1), options.get("groups", 1)
    layer = TensorNetworkConv2d(channels, 2 * groups, dtype=torch.float64, **options)
    images = uniform(2, channels, 4, 4, low=0, high=1)
    want = layer(images).detach().movedim(1, -1).flatten(0, 2).chunk(groups, dim=1)
    for group, part in enumerate(images.chunk(groups, dim=1)):
        found = isometric_circuit(layer_network(layer, group))
        patches = unfold(part, layer.geometry)
        values = simulate(found.circuit, patches, found.weights, backend="statevector")
        got = found.scale**2 * found.probabilities(values)
        torch.testing.assert_close(got, want[group].square(), rtol=0, atol=1e-6 * found.scale**2)


def test_results_repeat():
    first, second = (isometric_circuit(NETWORKS["mps, bond 4"]) for _ in range(2))
    assert first.circuit == second.circuit
    assert torch.equal(first.weights, second.weights)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: kernel_to_tensor_train(kernel("product", 2)), "weights are None"),
        (lambda: kernel_to_tensor_train(FourierConv2d(1, 1, 2), torch.zeros(3)), "beside a FourierConv2d"),
        (lambda: kernel_to_tensor_train(kernel("product", 16, 1), torch.zeros(3)), "shape (3,)"),
        (lambda: kernel_to_tensor_train(FourierConv2d(1, 1, 2))(torch.zeros(3, 5)), "shape (3, 5)"),
        (lambda: train_network(train(0, 1, 2), output=0), "train has 1 cores"),
        (lambda: train_network(train(3, 1), features=[0, 1, 1]), "features are [0, 1, 1]"),
        (lambda: train_network(train(3, 1), output=3), "output is 3"),
        (lambda: layer_network(TensorNetworkConv2d(1, 1, 2, structure="eps")), "structure 'eps'"),
        (lambda: layer_network(TensorNetworkConv2d(2, 1, 2)), "2 channels at a pixel"),
        (lambda: isometric_circuit(NETWORKS["mps, bond 2"], "both"), "both"),
        (lambda: isometric_circuit(tree(BINARY, (2, 2, 2)), "discard"), "singular values"),
        (lambda: isometric_circuit(NETWORKS["mps, bond 2"], "discard"), "has 1 outputs"),
        (lambda: isometric_circuit(train_network(train(13, 1))), "measures 13 wires"),
        (lambda: isometric_circuit(train_network(train(10, 16))), "5 qubits but at most 4"),
        (lambda: isometric_circuit(train_network([torch.zeros(1, 2, 1)])), "network is 0"),
        (lambda: isometric_circuit(train_network([torch.full((1, 2, 1), torch.nan)])), "not finite"),
        (lambda: isometric_circuit(train_network([torch.ones(1, 3, 1)])), "sizes (2,)"),
        (lambda: isometric_circuit(TreeNetwork((torch.ones(1, 2, 2),), ((0, 0),))), "((0, 0),)"),
        (lambda: isometric_circuit(NETWORKS["mps, 3 outputs"]).preparation(), "3 outputs"),
    ],
)
def test_errors_say_both_values(make, says):
    with pytest.raises(ValueError) as error:
        make()
    assert says in str(error.value)


def test_large_kernels_of_other_kinds_are_refused(monkeypatch):
    block = kernel("heisenberg", 8, 1)
    deep = block + block.shift_weights(block.n_weights)
    with pytest.raises(Unsupported, match="product encoding"):
        kernel_to_tensor_train(deep, torch.zeros(deep.n_weights))
    dense_angle = [Gate(name, (k // 2,), (inp(k),)) for k in range(12) for name in ("RY", "RZ")[k % 2 :][:1]]
    twice = Circuit(6, tuple(dense_angle), ("ZZZZZZ",))
    with pytest.raises(Unsupported, match="one wire for each input"):
        kernel_to_tensor_train(twice, torch.zeros(twice.n_weights))
    circuit = kernel("heisenberg", 12, 1)
    monkeypatch.setattr(conversions, "MAX_RANK", 4)
    with pytest.raises(Unsupported, match="rank"):
        kernel_to_tensor_train(circuit, uniform(circuit.n_weights))
