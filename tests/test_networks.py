import itertools

import pytest
import torch
from torch import nn
from torch.nn.utils import parameters_to_vector

from qconv.data import load_dataset
from qconv.deformed import QuantumDeformedConv2d, QuantumDeformedLinear
from qconv.energy.count import count
from qconv.network_features import NeighborConv2d, PixelFeatures, QubitFeatures
from qconv.networks import ARCHITECTURES, NETWORKS, binary_network, plain_network
from qconv.probabilistic import ProbabilisticBinaryConv2d, ProbabilisticBinaryLinear
from qconv.tensor_layers import TensorNetworkConv2d
from qconv.tensors.feature_maps import FeatureMap
from qconv.train import evaluate, fit

EIGHT, LARGE = (1, 8, 8), (1, 28, 28)

# Synapses of a convolution's 3x3 taps and of the dense layer; a pair of neighbors is half of two inputs, and four of a
# 3x3 kernel's nine taps.
SYNAPSES = {
    "a": (0, 784 * 10),
    "b": (9 * 8 * (1 + 16), 16 * 6 * 6 * 10),
    "c": (9 * 32 * (1 + 64), 64 * 6 * 6 * 10),
}
NEURONS = {"a": 10, "b": 8 + 16 + 10, "c": 32 + 64 + 10}


def build(name, shape=LARGE, seed=0):
    torch.manual_seed(seed)
    return NETWORKS[name].build(shape, 10)


def trained(module):
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


# --- shapes and sizes ---


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_architectures_are_those_of_the_paper(architecture):
    layers = [
        layer
        for layer in build(f"{architecture}_deformed")
        if isinstance(layer, QuantumDeformedConv2d | QuantumDeformedLinear)
    ]
    *convolutions, dense = layers
    assert [(c.out_channels, c.kernel_size, c.stride) for c in convolutions] == [
        (channels, (3, 3), (2, 2)) for channels in {"a": (), "b": (8, 16), "c": (32, 64)}[architecture]
    ]
    assert (dense.out_features, dense.output, dense.norm.gamma) == (10, "mean", 3.0)
    assert all(c.output == "activation" for c in convolutions)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_numbers_to_train(architecture):
    conv, dense = SYNAPSES[architecture]
    norms = 2 * NEURONS[architecture]
    pairs = conv // 9 * 4 + dense // 2
    assert trained(build(f"{architecture}_pbnn")) == conv + dense + norms
    assert trained(build(f"{architecture}_deformed")) == 3 * (conv + dense) + norms
    assert trained(build(f"{architecture}_neighbors")) == 3 * (conv + dense) + 4 * pairs + norms


def test_numbers_to_train_in_tensor_networks_and_linear_controls():
    # 196 sites of dimension 2: two chains of 98, bonds 2, 4, 8, 10, 10, ..., and the root of 10 outputs.
    bonds = [2, 4, 8, *[10] * 95]
    chain = 2 * 2 + sum(2 * a * b for a, b in itertools.pairwise(bonds))
    assert trained(build("mps")) == 2 * chain + 10 * 10 * 10
    assert trained(build("eps")) == 2**9 * 6 + 26 * 26 * 6 * 10 + 10
    assert trained(build("eps2")) == 2**9 * 6 + 6**4 * 6 + 25 * 25 * 6 * 10 + 10
    assert trained(build("a_linear_x")) == 2 * 7840 + 10
    assert trained(build("a_linear_neighbors")) == 8 * 3920 + 10


CONTROLLED = [name for name, network in NETWORKS.items() if network.controls]


@pytest.mark.parametrize("name", CONTROLLED)
@pytest.mark.parametrize("shape", [EIGHT, LARGE])
def test_first_controls_train_as_many_numbers(name, shape):
    control = NETWORKS[name].controls[0]
    assert NETWORKS[control].family == "control"
    assert trained(build(control, shape)) == pytest.approx(trained(build(name, shape)), rel=0.02)


def test_every_quantum_inspired_network_has_a_control():
    inspired = {name for name, network in NETWORKS.items() if network.family == "quantum-inspired"}
    assert inspired < set(CONTROLLED)
    assert {control for name in CONTROLLED for control in NETWORKS[name].controls} <= set(NETWORKS)


def test_small_images_are_refused():
    assert build("b_deformed", (1, 7, 7))(torch.rand(2, 1, 7, 7)).shape == (2, 10)
    for make in (binary_network, plain_network):
        with pytest.raises(ValueError, match="images are 6x6 but 2 convolutions of 3x3 and stride 2 need 7x7"):
            make("b", "deformed", (1, 6, 6), 10)


# --- controls see what the deformed layers see ---


def of_weights(layer, h):
    """Gradient of the single output of each row of h: the features, for a layer linear in its weights."""
    rows = []
    for row in h:
        layer.zero_grad()
        layer(row[None]).sum().backward()
        rows.append(torch.cat([p.grad.flatten() for p in layer.parameters()]))
    return torch.stack(rows)


def residual(features, values):
    """Largest error of the best linear combination of the features."""
    found = torch.linalg.lstsq(features, values[:, None], driver="gelsd").solution
    return (features @ found - values[:, None]).abs().max().item()


@pytest.mark.parametrize("kind", ["pair", "neighbors"])
def test_means_of_deformed_convolutions_are_linear_in_their_controls_features(kind):
    torch.manual_seed(1)
    options = {"deformation": kind, "output": "mean", "norm": False, "dtype": torch.float64}
    layer = QuantumDeformedConv2d(2, 1, 3, 2, **options)
    for name in ("angle", "offset", "gate"):
        if getattr(layer, name) is not None:
            nn.init.normal_(getattr(layer, name))
    h = 2 * torch.rand(300, 2, 3, 3, dtype=torch.float64) - 1
    with torch.no_grad():
        values = layer(h).flatten()
    one = torch.ones(len(h), 1, dtype=torch.float64)  # what a batch norm adds
    alone = nn.Sequential(QubitFeatures(("h", "X", "hX")), nn.Conv2d(6, 1, 3, 2, bias=False)).double()
    pairs = NeighborConv2d(2, 1).double()
    assert residual(torch.cat([of_weights(pairs, h), one], 1), values) < 1e-9
    on_alone = residual(torch.cat([of_weights(alone, h), one], 1), values)
    assert on_alone < 1e-9 if kind == "pair" else on_alone > 1e-2


@pytest.mark.parametrize("kind", ["pair", "neighbors"])
def test_means_of_deformed_dense_layers_are_linear_in_their_controls_features(kind):
    torch.manual_seed(2)
    options = {"deformation": kind, "output": "mean", "norm": False, "dtype": torch.float64}
    layer = QuantumDeformedLinear(5, 1, **options)  # an odd number: the last input has no neighbor
    for name in ("angle", "offset", "gate"):
        if getattr(layer, name) is not None:
            nn.init.normal_(getattr(layer, name))
    h = 2 * torch.rand(100, 5, dtype=torch.float64) - 1
    with torch.no_grad():
        values = layer(h).flatten()
    one = torch.ones(len(h), 1, dtype=torch.float64)
    alone, pairs = (QubitFeatures(("h", "X"), neighbors)(h) for neighbors in (False, True))
    assert pairs.shape == (100, 2 * 5 + 4 * 2)
    assert residual(torch.cat([pairs, one], 1), values) < 1e-9
    on_alone = residual(torch.cat([alone, one], 1), values)
    assert on_alone < 1e-9 if kind == "pair" else on_alone > 1e-2


def test_neighbor_convolution_against_a_sum_over_taps():
    torch.manual_seed(3)
    layer = NeighborConv2d(2, 3).double()
    h = 2 * torch.rand(2, 2, 8, 9, dtype=torch.float64) - 1
    result = layer(h)
    assert result.shape == (2, 3, 3, 4)
    x = torch.sqrt(1 - h**2)
    single = layer.single.weight.reshape(3, 3, 2, 3, 3)
    across, down = layer.across.weight.reshape(3, 2, 2, 2, 3), layer.down.weight.reshape(3, 2, 2, 2)
    for b, o, r, c in itertools.product(range(2), range(3), range(3), range(4)):
        total = 0.0
        for channel in range(2):
            of_h, of_x = (t[b, channel, 2 * r : 2 * r + 3, 2 * c : 2 * c + 3] for t in (h, x))
            kernel = single[o, :, channel]
            total += (kernel[0] * of_h + kernel[1] * of_x + kernel[2] * of_h * of_x).sum()
            for i, j in itertools.product(range(2), range(2)):
                one, other = (of_h, of_x)[i], (of_h, of_x)[j]
                total += (across[o, i, j, channel] * one[:, 0] * other[:, 1]).sum()
                total += down[o, i, j, channel] * one[0, 2] * other[1, 2]
        assert result[b, o, r, c].item() == pytest.approx(total.item(), abs=1e-12)


def test_pbnn_is_the_deformed_network_without_deformation():
    torch.manual_seed(4)
    plain = binary_network("b", "pbnn", LARGE, 10)
    twins = []
    for layer in plain:
        if isinstance(layer, ProbabilisticBinaryConv2d):
            twin = QuantumDeformedConv2d(layer.in_channels, layer.out_channels, 3, 2, deformation="none")
        elif isinstance(layer, ProbabilisticBinaryLinear):
            size = layer.in_features, layer.out_features
            twin = QuantumDeformedLinear(*size, deformation="none", output="mean", gamma=3.0)
        else:
            twins.append(layer)
            continue
        twin.load_state_dict(layer.state_dict())
        twins.append(twin)
    images = torch.rand(4, *LARGE)
    assert torch.equal(nn.Sequential(*twins)(images), plain(images))


def test_tensor_controls_see_the_same_features():
    images = torch.rand(2, *LARGE)
    pooled = torch.nn.functional.avg_pool2d(images, 2)
    features = build("mps_control")[:2](images)
    torch.testing.assert_close(features[:, 0], torch.cos(torch.pi / 2 * pooled[:, 0]))
    torch.testing.assert_close(features[:, 1], torch.sin(torch.pi / 2 * pooled[:, 0]))
    for name in ("eps", "eps2"):
        cores = [layer for layer in build(name) if isinstance(layer, TensorNetworkConv2d)]
        control = [layer for layer in build(NETWORKS[name].controls[0]) if isinstance(layer, PixelFeatures)]
        assert [layer.feature_map for layer in cores] == [layer.feature_map for layer in control]
        assert cores[0].feature_map == FeatureMap("cos_sin")


# --- counts ---


@pytest.mark.parametrize("name", NETWORKS)
def test_counts_of_every_network(name):
    network = build(name)
    counts = count(network, LARGE)
    stored = counts.total("params")
    # Batch norms keep two running numbers a channel beside the two trained ones, or fold them into those.
    kept = sum(buffer.numel() for buffer in network.buffers() if buffer.is_floating_point())
    assert trained(network) <= stored <= trained(network) + kept
    assert counts.macs()["fp32*fp32"] > 0


def test_counts_against_sums_by_hand():
    # Means of h and X, and variances of h, X, h^2, hX, on 13x13 and 6x6 outputs; the dense layer has means alone.
    convolutions = 9 * (8 * 13**2 + 8 * 16 * 6**2)
    assert count(build("b_deformed"), LARGE).macs()["fp32*fp32"] == 6 * convolutions + 2 * 5760
    assert count(build("b_pbnn"), LARGE).macs()["fp32*fp32"] == 2 * convolutions + 5760
    # Plain on h, X, hX: one coefficient each.
    assert count(build("b_deformed_control"), LARGE).macs()["fp32*fp32"] == 3 * (convolutions + 5760)
    pairs = 4 * convolutions // 9
    counted = count(build("b_neighbors_control"), LARGE)
    assert counted.macs()["fp32*fp32"] == 3 * (convolutions + 5760) + 4 * pairs + 4 * 5760 // 2
    # The first layer's products of taps 0-1: 4 at each of 28 rows and 13 places.
    products = next(row for row in counted.rows if row.kind == "function" and "mul" in row.name)
    assert products.operations["mul:fp32"] == 4 * 28 * 13


# --- training ---


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits").split(0, n_train=200)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_learns_a_little_of_digits(name, digits):
    network = build(name, EIGHT)
    before = evaluate(network, *digits.train)
    lr = 0.003 if name in ("mps", "eps", "eps2") else 0.01
    fit(network, *digits.train, epochs=6, lr=lr, batch_size=20, seed=0)
    after = evaluate(network, *digits.train)
    assert after.loss < 0.8 * before.loss
    assert after.accuracy > 0.5
    assert bool(torch.isfinite(parameters_to_vector(network.parameters())).all())


@pytest.mark.parametrize("name", ["b_neighbors", "b_neighbors_control", "mps", "eps2"])
def test_networks_take_double_precision(name):
    network = build(name, EIGHT).double().eval()
    assert network(torch.rand(2, *EIGHT, dtype=torch.float64)).dtype == torch.float64
