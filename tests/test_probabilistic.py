import copy
import io
from itertools import product
from math import erf, sqrt

import numpy as np
import pytest
import torch
from bits import DTYPES, drawn, enumerated, network, numbers
from torch import nn

from qconv.binarization import binarize
from qconv.binary_laws import Moments, agreement_law, exact_activation
from qconv.binary_modules import BinaryActivation, ProbabilisticMaxPool2d, StochasticBatchNorm2d
from qconv.deformed import QuantumDeformedConv2d
from qconv.energy import count
from qconv.probabilistic import ProbabilisticBinaryConv2d, ProbabilisticBinaryLinear
from qconv.testing import check_layer


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 2, 5, 6])
def test_layer_against_every_outcome_of_weights_and_inputs(n, dtype):
    """The bits of weights and inputs are written down, not their agreements."""
    layer = drawn(ProbabilisticBinaryLinear(n, 2, norm=False, law="exact", dtype=dtype))
    h = numbers(2, n, dtype=dtype)
    theta = torch.tanh(layer.weight).detach()
    activation = layer(h).detach()
    layer.output = "moments"
    moments = layer(h)
    for p, row in product(range(2), range(2)):
        law = dict.fromkeys(range(-n, n + 1, 2), 0.0)
        for bits in product((-1, 1), repeat=2 * n):
            chances = [(1 + s * m) / 2 for s, m in zip(bits, [*h[p].tolist(), *theta[row].tolist()], strict=True)]
            law[sum(a * b for a, b in zip(bits[:n], bits[n:], strict=True))] += np.prod(chances)
        mean = sum(a * q for a, q in law.items())
        tolerance = DTYPES[dtype]
        assert abs(moments.mean[p, row].item() - mean) < tolerance
        assert abs(moments.variance[p, row].item() - sum((a - mean) ** 2 * q for a, q in law.items())) < tolerance
        assert abs(activation[p, row].item() - (2 * sum(q for a, q in law.items() if a >= 0) - 1)) < tolerance


def test_a_layer_is_exact_and_a_network_mean_field():
    """Layers 3-3-1 over all bits of inputs and weights: hidden bits share inputs, which the second layer ignores."""
    first, second = (ProbabilisticBinaryLinear(3, n, norm=False, law="exact", dtype=torch.float64) for n in (3, 1))
    with torch.no_grad():
        first.weight.copy_(1.5 + 0.3 * numbers(3, 3))
        second.weight.copy_(1.5 + 0.3 * numbers(1, 3, seed=1))
    h = torch.tensor([0.2, 0.3, 0.1], dtype=torch.float64)
    means = torch.cat([h, first.theta().flatten(), second.theta().flatten()]).detach().numpy()
    bits = np.array(list(product((-1, 1), repeat=15)))
    chances = ((1 + bits * means) / 2).prod(1)
    hidden = np.where(np.einsum("bij,bj->bi", bits[:, 3:12].reshape(-1, 3, 3), bits[:, :3]) >= 0, 1, -1)
    outputs = np.where((bits[:, 12:] * hidden).sum(1) >= 0, 1, -1)
    np.testing.assert_allclose(first(h).detach(), chances @ hidden, atol=1e-12)
    # The second layer is exact for hidden bits of these means that share nothing.
    alone = np.concatenate([chances @ hidden, means[12:]])
    free = np.array(list(product((-1, 1), repeat=6)))
    want = ((1 + free * alone) / 2).prod(1) @ np.where((free[:, :3] * free[:, 3:]).sum(1) >= 0, 1, -1)
    assert abs(second(first(h)).item() - want) < 1e-12
    assert abs(want - 0.3450) < 5e-5
    assert abs(chances @ outputs - 0.2771) < 5e-5


def test_means_beyond_their_range_are_refused_by_exact_laws():
    for layer, shape in (
        (ProbabilisticBinaryLinear(3, 2, law="exact", norm=False), (1, 3)),
        (ProbabilisticBinaryConv2d(3, 2, 1, law="exact", norm=False), (1, 3, 2, 2)),
    ):
        layer(torch.ones(shape))
        with pytest.raises(ValueError, match=r"means of bits from 3 to 3, not within \[-1, 1\]: .*PixelBits"):
            layer(torch.full(shape, 3.0))


def test_start_from_real_weights():
    layer = ProbabilisticBinaryConv2d(2, 3, 3)
    real = torch.randn(3, 2, 3, 3) * 0.05
    layer.init_from(real)
    torch.testing.assert_close(layer.theta(), (real / real.std()).clamp(-0.9, 0.9), atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match=r"\(3, 2, 3, 2\) but the layer \(3, 2, 3, 3\)"):
        layer.init_from(real[..., :2])


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_padding_is_padded_inputs(mode):
    layer = drawn(ProbabilisticBinaryConv2d(2, 3, 3, padding=(1, 2), padding_mode=mode, output="moments", norm=False))
    bare = ProbabilisticBinaryConv2d(2, 3, 3, output="moments", norm=False)
    bare.load_state_dict(layer.state_dict())
    h = numbers(2, 2, 5, 6, dtype=torch.float32)
    padded = nn.functional.pad(h, (2, 2, 1, 1), mode="constant" if mode == "zeros" else mode)
    for got, want in zip(layer(h), bare(padded), strict=True):
        assert torch.equal(got, want)
    assert layer(h).mean.shape == nn.Conv2d(2, 3, 3, padding=(1, 2), padding_mode=mode)(h).shape
    if mode == "zeros":  # fair coins: mean 0, variance 1
        far = ProbabilisticBinaryConv2d(2, 3, 3, padding=3, output="moments", norm=False)(h)
        assert torch.equal(far.mean[..., 0, 0], torch.zeros(2, 3))
        assert torch.equal(far.variance[..., 0, 0], torch.full((2, 3), 18.0))


@pytest.mark.parametrize("law", ["clt", "corrected", "exact"])
def test_norm_moves_the_threshold_of_every_law(law):
    layer = drawn(ProbabilisticBinaryConv2d(1, 3, (2, 3), law=law, dtype=torch.float64))
    with torch.no_grad():
        layer.norm.weight.copy_(torch.tensor([1.3, -0.7, 0.0]))
        layer.norm.bias.copy_(torch.tensor([0.2, -0.4, -0.1]))
    h = numbers(4, 1, 5, 6)
    layer(h)  # running statistics
    layer.eval()
    got = layer(h).detach()
    norm = layer.norm.requires_grad_(False)
    patches = nn.functional.unfold(h, (2, 3)).mT
    size = got.shape[-2:]
    for c in range(3):
        scale = (norm.weight[c] / torch.sqrt(norm.running_var[c] + norm.eps)).item()
        shift = (norm.bias[c] - norm.running_mean[c] * scale).item()
        values = got[:, c].flatten(1)
        for b, p in ((0, 0), (1, 7), (3, 5)):
            law_of_a = enumerated((patches[b, p] * torch.tanh(layer.weight[c]).flatten()).tolist())
            exact = 2 * sum(q for a, q in law_of_a.items() if scale * a + shift >= 0) - 1
            if law == "clt":
                mean = sum(a * q for a, q in law_of_a.items())
                deviation = abs(scale) * sqrt(sum((a - mean) ** 2 * q for a, q in law_of_a.items()))
                exact = erf((scale * mean + shift) / deviation / sqrt(2)) if scale else np.sign(shift)
            assert abs(values[b, p].item() - exact) < (0.08 if law == "corrected" else 1e-12)
    assert size == (4, 4)


@pytest.mark.parametrize("law", ["corrected", "exact"])
def test_bias_moves_the_threshold(law):
    layer = drawn(ProbabilisticBinaryLinear(6, 2, bias=True, norm=False, law=law, dtype=torch.float64))
    bare = ProbabilisticBinaryLinear(6, 2, norm=False, law=law, dtype=torch.float64)
    bare.load_state_dict({"weight": layer.weight})
    h = numbers(5, 6)
    with torch.no_grad():
        layer.bias.copy_(torch.tensor([-2.0, 100.0]))
    exact = exact_activation(agreement_law(h[:, None] * layer.theta()), torch.ones(2), torch.tensor([-2.0, 100.0]))
    assert (layer(h) - exact).abs().max() < {"exact": 1e-12, "corrected": 0.03}[law]
    assert not torch.allclose(layer(h)[:, 0], bare(h)[:, 0])
    layer.output = "mean"
    bare.output = "mean"
    torch.testing.assert_close(layer(h), bare(h) + layer.bias)


@pytest.mark.parametrize("law", ["clt", "exact"])
def test_gradients(law):
    layer = drawn(ProbabilisticBinaryConv2d(1, 2, 2, law=law, dtype=torch.float64))
    if law == "exact":
        layer.eval()
    h = (0.9 * numbers(2, 1, 3, 3)).requires_grad_()
    weight = layer.weight.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: torch.func.functional_call(layer, {"weight": w}, x), (h, weight))


def test_samples_in_train_mode_and_means_in_eval_mode():
    layer = ProbabilisticBinaryLinear(5, 3, output="sample")
    h = numbers(20, 5, dtype=torch.float32)
    assert set(layer(h).detach().flatten().tolist()) == {-1.0, 1.0}
    layer.eval()
    mean = layer(h)
    layer.output = "activation"
    assert torch.equal(mean, layer(h))


def test_draws_come_from_the_generator_given():
    h = numbers(20, 5, dtype=torch.float32)
    layer = ProbabilisticBinaryLinear(5, 3, output="sample", generator=torch.Generator().manual_seed(1))
    before = torch.get_rng_state()
    first, second = layer(h), layer(h)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(first, second)
    layer.generator.manual_seed(1)
    twin = copy.deepcopy(layer)
    assert torch.equal(layer(h), first)
    assert torch.equal(twin(h), first)
    for kind in (ProbabilisticBinaryConv2d, QuantumDeformedConv2d):
        layer = kind(1, 4, 3, output="sample", norm=False, generator=torch.Generator().manual_seed(3))
        twin = kind(1, 4, 3, output="sample", norm=False, generator=torch.Generator().manual_seed(3))
        twin.load_state_dict(layer.state_dict())
        images = torch.zeros(2, 1, 6, 6)
        assert torch.equal(layer(images), twin(images))
        twin.generator.manual_seed(4)
        assert not torch.equal(layer(images), twin(images))


def test_layer_conformance():
    check_layer(ProbabilisticBinaryConv2d(2, 3, (2, 3), stride=(2, 1)).eval(), 2, stride=(2, 1))
    check_layer(ProbabilisticBinaryConv2d(2, 3, 2, law="exact").eval(), 2)


def test_the_same_generator_state_gives_the_same_layer():
    layers = []
    for _ in range(2):
        torch.manual_seed(5)
        layers.append(ProbabilisticBinaryConv2d(2, 3, 3))
    assert torch.equal(layers[0].weight, layers[1].weight)
    assert 0.4 < ProbabilisticBinaryLinear(500, 20).weight.std().item() < 0.6


def test_copies_and_files():
    layer = binarize(nn.Sequential(ProbabilisticBinaryConv2d(1, 3, 3)))
    x = numbers(2, 1, 5, 5, dtype=torch.float32)
    layer.eval()
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for copied in (copy.deepcopy(layer), torch.load(buffer, weights_only=False)):
        assert torch.equal(copied(x), layer(x))
    assert ProbabilisticBinaryConv2d(1, 3, 3, device="meta", norm=False)(x.to("meta")).shape == (2, 3, 3, 3)


def test_counts():
    layer = ProbabilisticBinaryConv2d(2, 4, 3)
    ledger = layer.counts((2, 8, 8))
    assert ledger["mac:fp32*fp32"] == 2 * 4 * 36 * 18
    assert ledger["params"] == 4 * 18 + 2 * 4
    assert ledger["units"] == 4 * 36
    layer.output = "mean"
    assert layer.counts((2, 8, 8))["mac:fp32*fp32"] == 4 * 36 * 18
    layer.output = "moments"
    assert layer.counts((2, 8, 8))["units"] == 2 * 4 * 36
    layer.output, layer.law = "activation", "exact"
    # 18 synapses: each product theta h, then step k of the law multiplies k + 1 numbers twice.
    assert layer.counts((2, 8, 8))["mul:fp32"] == 4 * 36 * 18 * 19
    layer.binarize_("map")
    assert layer.counts((2, 8, 8))["mac:binary*fp32"] == 4 * 36 * 18
    assert layer.counts((2, 8, 8))["weight_bits"] == 4 * 18 + 32 * 8
    rows = count(network(), (1, 8, 8)).rows
    assert [row.kind for row in rows] == [
        "PixelBits",
        "ProbabilisticBinaryConv2d",
        "Flatten",
        "ProbabilisticBinaryLinear",
    ]
    modules = nn.Sequential(ProbabilisticBinaryConv2d(1, 2, 3, output="moments", norm=False), StochasticBatchNorm2d(2))
    pooled = nn.Sequential(*modules, ProbabilisticMaxPool2d(2), BinaryActivation())
    assert count(pooled, (1, 6, 6)).total("cmp") == 2 * 4 * 3


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: ProbabilisticBinaryConv2d(1, 2, 3, law="exat"), "'exact'"),
        (lambda: ProbabilisticBinaryConv2d(1, 2, 3, output="moment"), "'moments'"),
        (lambda: ProbabilisticBinaryConv2d(1, 2, 3, dtype=torch.float16), "torch.float16"),
        (lambda: ProbabilisticBinaryConv2d(1, 2, 3, bias=True), "bias is True and norm is True"),
        (lambda: ProbabilisticBinaryConv2d(3, 2, 3, groups=2), "in_channels is 3"),
        (lambda: ProbabilisticBinaryConv2d(1, 2, 3)(torch.ones(1, 2, 5, 5)), "1 input channels"),
        (lambda: ProbabilisticBinaryLinear(0, 2), "in_features is 0"),
        (lambda: ProbabilisticBinaryLinear(3, 2)(torch.ones(2, 3, dtype=torch.float64)), "torch.float64"),
        (lambda: ProbabilisticBinaryLinear(3, 2)(Moments(torch.ones(2, 3), torch.ones(2, 3))), "input is a Moments"),
        (lambda: ProbabilisticBinaryLinear(3, 2).init_from(torch.full((2, 3), 0.1)), "standard deviation 0.0"),
        (lambda: ProbabilisticBinaryLinear(1, 1).init_from(torch.ones(1, 1)), "standard deviation nan"),
        (lambda: ProbabilisticBinaryLinear(3, 2)(torch.ones(1, 3)), "1 entry in this batch"),
        (lambda: ProbabilisticBinaryLinear(3, 2, output="mean").counts((4,)), "input_shape is (4,)"),
    ],
)
def test_errors_say_both_values(make, says):
    with pytest.raises(ValueError) as error:
        make()
    assert says in str(error.value)
