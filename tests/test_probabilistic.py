import copy
import io
from itertools import product
from math import erf, sqrt

import numpy as np
import pytest
import torch
from torch import nn

from qconv.binarization import binarize, ensemble, reestimate
from qconv.binary_laws import (
    Moments,
    agreement_law,
    binary_concrete,
    corrected_activation,
    exact_activation,
    normal_activation,
    transverse,
)
from qconv.binary_modules import (
    BinaryActivation,
    PixelBits,
    ProbabilisticMaxPool2d,
    StochasticBatchNorm1d,
    StochasticBatchNorm2d,
)
from qconv.energy import count
from qconv.probabilistic import ProbabilisticBinaryConv2d, ProbabilisticBinaryLinear
from qconv.testing import check_layer

DTYPES = {torch.float32: 2e-5, torch.float64: 1e-12}


def numbers(*shape, dtype=torch.float64, seed=0):
    """In [-1, 1]."""
    return (2 * torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 1).to(dtype)


def drawn(layer, seed=0):
    with torch.no_grad():
        for k, p in enumerate(layer.parameters()):
            p.copy_(2 * numbers(*p.shape, seed=seed + k))
    return layer


def enumerated(means):
    """Law of a sum of -1s and +1s by writing down every outcome: {value: probability}."""
    law = dict.fromkeys(range(-len(means), len(means) + 1, 2), 0.0)
    for bits in product((-1, 1), repeat=len(means)):
        law[sum(bits)] += np.prod([(1 + s * m) / 2 for s, m in zip(bits, means, strict=True)])
    return law


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


def test_agreement_law_is_the_poisson_binomial():
    means = numbers(3, 8)
    law = agreement_law(means)
    assert law.shape == (3, 9)
    for row, got in zip(means.tolist(), law.tolist(), strict=True):
        np.testing.assert_allclose(got, list(enumerated(row).values()), atol=1e-15)
    # Stable: hundreds of factors keep every digit, in the far tail too.
    fair = agreement_law(torch.zeros(400, dtype=torch.float64))
    assert abs(fair[0].log2().item() + 400) < 1e-9
    assert abs(fair.sum().item() - 1) < 1e-13


def test_agreement_law_of_pairs():
    single, pairs = numbers(2, 3, seed=1), torch.rand(2, 2, 3, dtype=torch.float64)
    pairs = pairs / pairs.sum(-1, keepdim=True)
    got = agreement_law(single, pairs)
    for b in range(2):
        want = np.array(list(enumerated(single[b].tolist()).values()))
        for k in range(2):
            want = np.convolve(want, pairs[b, k].numpy())
        np.testing.assert_allclose(got[b], want, atol=1e-15)
    assert agreement_law(single[:, :0], pairs).shape == (2, 5)


@pytest.mark.parametrize("scale", [1.7, 0.5, -1.0, 0.0])
@pytest.mark.parametrize("shift", [0.0, 0.5, -2.0, 2.0, 30.0])
def test_thresholds_of_either_direction_and_ties(scale, shift):
    means = numbers(4)
    law = enumerated(means.tolist())
    want = 2 * sum(q for a, q in law.items() if scale * a + shift >= 0) - 1
    lines = torch.tensor([scale], dtype=torch.float64), torch.tensor([shift], dtype=torch.float64)
    got = exact_activation(agreement_law(means)[None], *lines)
    assert abs(got.item() - want) < 1e-14
    mean, variance = means.sum()[None], (1 - means**2).sum()[None]
    corrected = corrected_activation(Moments(mean, variance), *lines, 4).item()
    if abs(want) in (0.0, 1.0):
        assert corrected == want
    else:
        assert abs(corrected - want) < 0.06


def test_continuity_correction_beats_the_plain_normal_law():
    for n in (4, 9, 16):
        means = numbers(200, n) * 0.8
        moments = Moments(means.sum(-1), (1 - means**2).sum(-1))
        one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        exact = exact_activation(agreement_law(means)[:, None], one, zero)[:, 0]
        plain = (normal_activation(moments) - exact).abs().max()
        corrected = (corrected_activation(moments, one, zero, n) - exact).abs().max()
        if n % 2:  # an odd sum has no tie, and 0 is half-way between two of its values
            assert torch.equal(plain, corrected)
        else:
            assert corrected < plain / 2


def test_corrected_activation_has_gradients_and_no_nan():
    mean, variance = torch.tensor([0.3, -4.0]).requires_grad_(), torch.tensor([1.0, 0.0]).requires_grad_()
    for shift in (0.0, 9.0, -9.0):
        out = corrected_activation(Moments(mean, variance), torch.ones(2), torch.full((2,), shift), 4)
        gradients = torch.autograd.grad(out.sum(), (mean, variance))
        assert all(torch.isfinite(g).all() for g in gradients)
        assert (gradients[0][0] > 0) == (shift == 0.0)


def test_normal_activation():
    mean, variance = numbers(50) * 3, numbers(50, seed=1).abs() * 2
    want = [erf(m / sqrt(2 * v)) for m, v in zip(mean.tolist(), variance.tolist(), strict=True)]
    np.testing.assert_allclose(normal_activation(Moments(mean, variance)), want, atol=1e-14)
    for dtype in DTYPES:
        mean = torch.tensor([0.0, -0.0, 1e-9, -1e-9, -5.0], dtype=dtype, requires_grad=True)
        variance = torch.tensor([0.0, -1e-7, 0.0, 0.0, 0.0], dtype=dtype, requires_grad=True)
        steps = normal_activation(Moments(mean, variance))
        assert steps.tolist() == [1, 1, 1, -1, -1]
        steps[2:].sum().backward()
        assert mean.grad.tolist() == variance.grad.tolist() == [0] * 5


def test_gradients_of_the_normal_activation():
    inputs = [numbers(3, 4, 2) * 3, numbers(3, 4, 2, seed=1).abs() + 0.1, numbers(4, 1, seed=2), numbers(4, 1, seed=3)]
    for x in inputs:
        x.requires_grad_()
    assert torch.autograd.gradcheck(lambda m, v, *line: normal_activation(Moments(m, v), *line), inputs)
    z = (inputs[2] * inputs[0] + inputs[3]) / torch.sqrt(2 * inputs[2] ** 2 * inputs[1])
    torch.testing.assert_close(normal_activation(Moments(*inputs[:2]), *inputs[2:]), torch.erf(z))


def test_transverse_component():
    h = torch.tensor([-1.0, -0.6, 0.0, 0.8, 1.0, 1.0 + 1e-7], dtype=torch.float64, requires_grad=True)
    x = transverse(h)
    np.testing.assert_allclose(x.detach(), [0, 0.8, 1, 0.6, 0, 0], atol=1e-15)
    (gradient,) = torch.autograd.grad(x.sum(), h)
    np.testing.assert_allclose(gradient, [0, 0.75, 0, -4 / 3, 0, 0], atol=1e-14)
    assert torch.autograd.gradcheck(transverse, h[1:4].detach().requires_grad_())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 3), (4, 3, 2), (2, 3, 4, 5)])
def test_stochastic_batch_norm_is_its_equation(shape, dtype):
    norm = (StochasticBatchNorm2d if len(shape) == 4 else StochasticBatchNorm1d)(3, dtype=dtype)
    drawn(norm)
    mean, variance = numbers(*shape, dtype=dtype), numbers(*shape, dtype=dtype, seed=1).abs()
    got = norm(Moments(mean, variance))
    for c in range(3):
        mu, var = (t.transpose(0, 1)[c].flatten().tolist() for t in (mean, variance))
        m = sum(mu) / len(mu)
        v = (sum(var) + sum((x - m) ** 2 for x in mu)) / (len(mu) - 1)
        gamma, beta = norm.weight[c].item(), norm.bias[c].item()
        want = [gamma * (x - m) / sqrt(v + 1e-5) + beta for x in mu]
        tolerance = 10 * DTYPES[dtype]
        np.testing.assert_allclose(got.mean.transpose(0, 1)[c].flatten().detach(), want, atol=tolerance)
        want = [gamma**2 * x / (v + 1e-5) for x in var]
        np.testing.assert_allclose(got.variance.transpose(0, 1)[c].flatten().detach(), want, atol=tolerance)
        assert abs(norm.running_mean[c].item() - 0.1 * m) < tolerance
        assert abs(norm.running_var[c].item() - 0.9 - 0.1 * v) < tolerance
    norm.eval()
    again = norm(Moments(mean, variance))
    scale = norm.weight / torch.sqrt(norm.running_var + 1e-5)
    view = (-1, *(1,) * (len(shape) - 2))
    want = (mean - norm.running_mean.reshape(view)) * scale.reshape(view) + norm.bias.reshape(view)
    torch.testing.assert_close(again.mean, want)


def test_normalized_draws_have_variance_one():
    """What the norm is for: a draw of the batch, not its means, is standardized."""
    generator = torch.Generator().manual_seed(0)
    moments = Moments(3 * torch.randn(20000, 1, generator=generator) + 5, torch.full((20000, 1), 4.0))
    out = StochasticBatchNorm1d(1)(moments)
    draw = (out.mean + out.variance.sqrt() * torch.randn(20000, 1, generator=generator)).detach()
    # Of 20000 normal draws, mean and variance deviate by 1/sqrt(20000) and sqrt(2/20000): five of each.
    assert abs(draw.mean().item()) < 5 * 20000**-0.5
    assert abs(draw.var().item() - 1) < 5 * (2 / 20000) ** 0.5


def test_max_pool_keeps_the_winners_moments():
    mean, variance = numbers(2, 3, 6, 7), numbers(2, 3, 6, 7, seed=1).abs()
    pool = ProbabilisticMaxPool2d(2, (2, 1), 1).eval()
    out = pool(Moments(mean, variance))
    torch.testing.assert_close(out.mean, nn.functional.max_pool2d(mean, 2, (2, 1), 1), atol=0, rtol=0)
    for got_mean, got_variance in zip(out.mean.flatten(), out.variance.flatten(), strict=True):
        assert variance.flatten()[mean.flatten() == got_mean].item() == got_variance
    assert pool.counts((3, 6, 7))["units"] == 2 * out.mean[0].numel()


def test_max_pool_draws_in_train_mode():
    """Two entries a window: the second wins with probability Phi((m2 - m1) / sqrt(v1 + v2))."""
    n = 40000
    mean = torch.tensor([0.0, 1.0]).expand(n, 1, 1, 2)
    variance = torch.tensor([1.0, 3.0]).expand(n, 1, 1, 2)
    out = ProbabilisticMaxPool2d((1, 2), generator=torch.Generator().manual_seed(0))(Moments(mean, variance))
    p = (1 + erf(1 / sqrt(8))) / 2
    assert abs(out.mean.mean().item() - p) < 5 * sqrt(p * (1 - p) / n)
    assert torch.equal(out.variance, 1 + 2 * out.mean)


def test_binary_concrete():
    n = 40000
    h = torch.tensor([-1.0, -0.4, 0.9, 1.0], dtype=torch.float64, requires_grad=True)
    bits = binary_concrete(h.expand(n, 4), generator=torch.Generator().manual_seed(0))
    assert set(bits.detach().flatten().tolist()) == {-1.0, 1.0}
    assert bits[:, 0].eq(-1).all()
    assert bits[:, 3].eq(1).all()
    for k in (1, 2):
        assert abs(bits[:, k].mean().item() - h[k].item()) < 5 * sqrt((1 - h[k].item() ** 2) / n)
    # The relaxation tanh((logit q + L) / 2 tau), L logistic, by its own derivative at the same draw.
    u = torch.rand(n, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)[:, 1:3]
    for tau in (1.0, 0.5):
        bits = binary_concrete(h.expand(n, 4), tau, torch.Generator().manual_seed(0))
        (got,) = torch.autograd.grad(bits.sum(), h)
        z = (2 * torch.atanh(h[1:3]) + torch.log(u / (1 - u))) / (2 * tau)
        want = ((1 - torch.tanh(z) ** 2) / tau / (1 - h[1:3] ** 2)).sum(0)
        torch.testing.assert_close(got[1:3], want.detach(), rtol=1e-10, atol=0)


def network(output="activation", **options):
    torch.manual_seed(0)
    return nn.Sequential(
        PixelBits(),
        ProbabilisticBinaryConv2d(1, 4, 3, stride=2, output=output, **options),
        nn.Flatten(),
        ProbabilisticBinaryLinear(36, 3, output="mean", gamma=3.0, **options),
    )


def test_a_network_with_pooling_learns():
    torch.manual_seed(0)
    model = nn.Sequential(
        PixelBits(),
        ProbabilisticBinaryConv2d(1, 8, 3, norm=False, output="moments"),
        ProbabilisticMaxPool2d(2),
        StochasticBatchNorm2d(8),
        BinaryActivation(sample=True),
        nn.Flatten(),
        ProbabilisticBinaryLinear(72, 2, output="mean", gamma=3.0),
    )
    # Noise, with the left or the right half brighter.
    y = torch.arange(64) % 2
    x = 0.7 * torch.rand(64, 1, 8, 8)
    x[y == 0, ..., :4] += 0.3
    x[y == 1, ..., 4:] += 0.3
    optimizer = torch.optim.Adam(model.parameters(), 0.03)
    losses = []
    for _ in range(150):
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[-10:]) < 0.6 * np.mean(losses[:3])
    assert (model.eval()(x).argmax(1) == y).float().mean() > 0.95
    assert torch.equal(model(x), model(x))


@pytest.mark.parametrize("mode", ["map", "ternary", "sample"])
def test_binarized_networks_are_networks_of_bits(mode):
    model = network().eval()
    reestimate(model, [torch.rand(64, 1, 8, 8)])
    theta = [torch.tanh(layer.weight.detach()) for layer in (model[1], model[3])]
    before = copy.deepcopy(model.state_dict())
    small = binarize(model, mode, torch.Generator().manual_seed(1))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    weights = [layer.theta() for layer in (small[1], small[3])]
    for bits, mean in zip(weights, theta, strict=True):
        assert set(bits.unique().tolist()) <= ({-1.0, 0.0, 1.0} if mode == "ternary" else {-1.0, 1.0})
        if mode == "map":
            assert torch.equal(bits, mean.sign())
        if mode == "ternary":
            assert torch.equal(bits, mean.sign() * ((1 + mean.abs()) / 2 >= 0.75))
    x = torch.rand(5, 1, 8, 8)
    # The same in plain torch: sums, running statistics, signs.
    a = nn.functional.conv2d(2 * x - 1, weights[0], stride=2)
    norm = small[1].norm
    a = nn.functional.batch_norm(a, norm.running_mean, norm.running_var, norm.weight, norm.bias)
    assert torch.equal(small[:2](x), torch.where(a >= 0, 1.0, -1.0))
    norm = small[3].norm
    b = torch.where(a >= 0, 1.0, -1.0).flatten(1) @ weights[1].T
    b = nn.functional.batch_norm(b, norm.running_mean, norm.running_var, norm.weight, norm.bias)
    torch.testing.assert_close(small(x), b)
    keys = [k for k in count(small, (1, 8, 8)).macs() if not k.startswith(("binary", "ternary"))]
    assert not keys


def test_drawn_weights_have_their_means():
    model = nn.Sequential(ProbabilisticBinaryLinear(20000, 1))
    with torch.no_grad():
        model[0].weight.fill_(0.5)
    bits = binarize(model, "sample", torch.Generator().manual_seed(0))[0].theta()
    p = np.tanh(0.5)
    assert abs(bits.mean().item() - p) < 5 * sqrt((1 - p**2) / 20000)


def test_ensemble_averages_probabilities():
    model = network().eval()
    x = torch.rand(4, 1, 8, 8)
    together = ensemble(model, 3, torch.Generator().manual_seed(0))
    assert len({member[1].weight.sum().item() for member in together.members}) == 3
    want = torch.stack([torch.softmax(member(x), -1) for member in together.members]).mean(0)
    torch.testing.assert_close(together(x).exp(), want)


def test_reestimated_statistics_are_plain_averages():
    model = network().eval()
    drawn_model = binarize(model, "sample", torch.Generator().manual_seed(0))
    weights = {k: v.clone() for k, v in drawn_model.state_dict().items() if "running" not in k and "tracked" not in k}
    batches = [torch.rand(16, 1, 8, 8) for _ in range(3)]
    reestimate(drawn_model, batches)
    a = [nn.functional.conv2d(2 * x - 1, drawn_model[1].theta(), stride=2) for x in batches]
    norm = drawn_model[1].norm
    torch.testing.assert_close(norm.running_mean, torch.stack([t.mean((0, 2, 3)) for t in a]).mean(0))
    variances = [t.transpose(0, 1).flatten(1).var(1) for t in a]
    torch.testing.assert_close(norm.running_var, torch.stack(variances).mean(0))
    assert not any(m.training for m in drawn_model.modules())
    assert norm.momentum == 0.1
    assert all(torch.equal(drawn_model.state_dict()[k], v) for k, v in weights.items())


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
        (lambda: ProbabilisticBinaryLinear(3, 2)(torch.ones(1, 3)), "1 entry in this batch"),
        (lambda: ProbabilisticBinaryLinear(3, 2, output="mean").counts((4,)), "input_shape is (4,)"),
        (lambda: StochasticBatchNorm2d(3)(Moments(torch.ones(2, 3), torch.ones(2, 3))), "shape (2, 3)"),
        (lambda: BinaryActivation(tau=0), "tau is 0"),
        (lambda: binarize(network(), "nearest"), "nearest"),
        (lambda: binarize(nn.Linear(2, 2)), "0 probabilistic binary layers"),
        (lambda: reestimate(nn.Linear(2, 2), []), "0 stochastic batch norms"),
        (lambda: reestimate(network(), []), "batches are empty"),
        (lambda: ensemble(network(), 0), "n is 0"),
    ],
)
def test_errors_say_both_values(make, says):
    with pytest.raises(ValueError) as error:
        make()
    assert says in str(error.value)
