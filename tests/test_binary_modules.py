from math import erf, sqrt

import numpy as np
import pytest
import torch
from bits import DTYPES, drawn, numbers
from torch import nn

from qconv.binary_laws import Moments
from qconv.binary_modules import (
    BinaryActivation,
    PixelBits,
    ProbabilisticMaxPool2d,
    StochasticBatchNorm1d,
    StochasticBatchNorm2d,
)
from qconv.probabilistic import ProbabilisticBinaryConv2d, ProbabilisticBinaryLinear


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


def test_max_pool_of_one_image():
    moments = Moments(numbers(3, 6, 7), numbers(3, 6, 7, seed=1).abs())
    batch = Moments(*(m[None] for m in moments))
    pool = ProbabilisticMaxPool2d(2, (2, 1), 1, generator=torch.Generator().manual_seed(0))
    for training in (True, False):
        pool.train(training)
        pool.generator.manual_seed(0)
        one = pool(moments)
        pool.generator.manual_seed(0)
        for a, b in zip(one, pool(batch), strict=True):
            assert torch.equal(a, b[0])


def test_pixels_beyond_their_range_are_refused():
    x = torch.rand(2, 1, 4, 4)
    assert torch.equal(PixelBits()(x), 2 * x - 1)
    torch.testing.assert_close(torch.vmap(PixelBits())(x), 2 * x - 1)
    compiled = torch.compile(PixelBits(), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(255 * x), 510 * x - 1)
    with pytest.raises(ValueError, match=r"pixels are from .* to 255, not within \[0, 1\]: scale them first"):
        PixelBits()(torch.tensor([[0.0, 255.0]]))


TENSOR = torch.zeros(2, 3, 4, 4)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: StochasticBatchNorm2d(3)(Moments(torch.ones(2, 3), torch.ones(2, 3))), "shape (2, 3)"),
        (lambda: StochasticBatchNorm2d(3)(TENSOR), "norm takes Moments (mean, variance) but was given a Tensor"),
        (lambda: ProbabilisticMaxPool2d(2)(TENSOR), "max-pool takes Moments (mean, variance) but was given a Tensor"),
        (lambda: BinaryActivation()(TENSOR), "activation takes Moments (mean, variance) but was given a Tensor"),
        (lambda: ProbabilisticMaxPool2d(2)(Moments(torch.ones(2, 3), torch.ones(2, 3))), "shape (2, 3)"),
        (lambda: ProbabilisticMaxPool2d(2).counts((3, 4)), "input_shape is (3, 4): give (channels, height, width)"),
        (
            lambda: ProbabilisticMaxPool2d(5).counts((3, 8, 4)),
            "input_shape is (3, 8, 4), smaller than the window (5, 5)",
        ),
        (lambda: BinaryActivation(tau=0), "tau is 0"),
    ],
)
def test_errors_say_both_values(make, says):
    with pytest.raises(ValueError) as error:
        make()
    assert says in str(error.value)
