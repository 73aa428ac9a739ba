"""Batch norm folded, ReLU6 replaced, moments kept: the function stays, and the moments are those of the data."""

import copy
import math

import numpy as np
import pytest
import torch
from data_free_nets import Net, images, nets
from hypothesis import given, settings
from scipy import integrate, stats
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

from classical.data_free import (
    ChannelClip,
    Moments,
    clipped_normal,
    fold_batch_norms,
    natural_noise,
    output_moments,
    propagate,
    record_moments,
    replace_relu6,
)

INF = math.inf


def conv_bn(n_in: int = 3, n_out: int = 4, kernel: int = 3, seed: int = 0, **options: bool) -> nn.Sequential:
    """A convolution and a batch norm that has seen data, in float64."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Conv2d(n_in, n_out, kernel), nn.BatchNorm2d(n_out, **options)).double()
        for tensor in (net[1].weight, net[1].bias):
            if tensor is not None:
                nn.init.normal_(tensor)
        if net[1].running_var is not None:
            nn.init.uniform_(net[1].running_var, 0.2, 2)
    return net.eval()


@settings(max_examples=25, deadline=None)
@given(nets())
def test_folding_and_clips_keep_the_function(net: Net) -> None:
    before = copy.deepcopy(net.state_dict())
    x = images()
    folded, report = fold_batch_norms(net)
    torch.testing.assert_close(folded(x), net(x), rtol=1e-10, atol=1e-10)
    clipped, _ = replace_relu6(folded)
    torch.testing.assert_close(clipped(x), net(x), rtol=1e-10, atol=1e-10)
    assert not any(isinstance(m, nn.ReLU6) for m in clipped.modules())
    left = [m for m in folded.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    assert len(left) == len({entry.layers for entry in report.skipped})
    # Only transposed convolutions and those that run twice keep their norms.
    kept = {"transposed": 1, "twice": 2}
    normed = [block for block in net.blocks if any(isinstance(m, nn.BatchNorm2d) for m in block.modules())]
    assert len(left) == sum(kept.get(block.kind, 0) for block in normed)
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("affine", [True, False])
def test_moments_are_those_of_the_data_that_the_norm_has_seen(affine: bool, dtype: torch.dtype) -> None:
    net = conv_bn(affine=affine).to(dtype)
    x = images(32).to(dtype)
    y = net[0](x).detach()
    net[1].running_mean.copy_(y.mean((0, 2, 3)))
    net[1].running_var.copy_(y.var((0, 2, 3), correction=0))
    folded, _ = fold_batch_norms(net)
    mean, std = output_moments(folded.get_submodule("0"))
    z = folded(x)
    torch.testing.assert_close(mean, z.mean((0, 2, 3)), atol=1e-5 if dtype == torch.float32 else 1e-10, rtol=0)
    torch.testing.assert_close(std, z.std((0, 2, 3), correction=0))
    assert not any("output" in key for key in folded.state_dict())


def test_a_linear_layer_takes_its_norm() -> None:
    net = nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)).double().eval()
    net[1].running_var.fill_(0.3)
    folded, report = fold_batch_norms(net)
    x = images()[:, :, 0, 0]
    torch.testing.assert_close(folded(x), net(x), rtol=1e-12, atol=1e-12)
    assert [entry.layers for entry in report.done] == ["0 -> 1"]


class AfterAdd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.a(x) + self.b(x))


class ReadTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.norm(y) + y


class CalledTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.other = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.a(self.norm(self.a(x))))


@pytest.mark.parametrize(
    ("net", "reason"),
    [
        (AfterAdd(), "it reads add, no convolution or linear layer"),
        (ReadTwice(), "a is also read by add"),
        (CalledTwice(), "a is called 2 times"),
        (nn.Sequential(nn.ConvTranspose2d(3, 4, 2), nn.BatchNorm2d(4)), "0 is a transposed convolution"),
        (nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.BatchNorm2d(4)), "it reads 1, no convolution"),
        (nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1)), "it reads input_1, no convolution"),
        (
            nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)),
            "keeps no running statistics",
        ),
    ],
)
def test_what_cannot_be_folded_stays_and_says_why(net: nn.Module, reason: str) -> None:
    net = net.double().eval()
    folded, report = fold_batch_norms(net)
    assert report.done == ()
    assert reason in report.skipped[0].note
    torch.testing.assert_close(folded(images()), net(images()), rtol=1e-12, atol=1e-12)


def test_features_along_another_axis_are_no_channels() -> None:
    net = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(5)).double().eval()
    folded, report = fold_batch_norms(net)
    assert "its 5 features are not the layer's 4 outputs" in report.skipped[0].note
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    assert torch.equal(folded(x), net(x))


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def test_models_that_cannot_be_traced_say_so() -> None:
    with pytest.raises(ValueError, match=r"Branching cannot be traced by torch\.fx"):
        fold_batch_norms(Branching())
    pruned = nn.Sequential(nn.Conv2d(3, 4, 1))
    prune.l1_unstructured(pruned[0], "weight", 0.5)
    with pytest.raises(ValueError, match="weight of '0' is computed from other tensors"):
        fold_batch_norms(pruned)
    with pytest.raises(ValueError, match=r"remove_parametrizations or torch\.nn\.utils\.prune\.remove"):
        fold_batch_norms(nn.Sequential(parametrizations.weight_norm(nn.Conv2d(3, 4, 1))))


# --- ReLU6 -----------------------------------------------------------------------------------------------------------


class OneActivation(nn.Module):
    """One module called twice, and functions in its place."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 1) for _ in range(3))
        self.act = nn.ReLU6()

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.convs[0](x))
        x = self.act(self.convs[1](x))
        return F.relu6(input=self.convs[2](x))


def test_each_call_of_relu6_gets_a_clip_of_its_own() -> None:
    net = OneActivation().double()
    x = 10 * images()
    clipped, report = replace_relu6(net)
    assert sum(isinstance(m, ChannelClip) for m in clipped.modules()) == len(report.done) == 3
    torch.testing.assert_close(clipped(x), net(x), rtol=0, atol=0)
    plain, _ = replace_relu6(net, "relu")
    assert not torch.allclose(plain(x), net(x))
    torch.testing.assert_close(replace_relu6(clipped, "relu")[0](x), plain(x), rtol=0, atol=0)
    with pytest.raises(ValueError, match="by is 'tanh' but must be 'clip' or 'relu'"):
        replace_relu6(net, "tanh")


def test_a_clip_below_zero_is_no_relu6() -> None:
    net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Hardtanh(-1, 1))
    kept, report = replace_relu6(net, "relu")
    assert report.skipped[0].note == "ChannelClip(low=-1, high=1) is no ReLU6"
    assert isinstance(kept.get_submodule("1"), nn.Hardtanh)
    clipped, _ = replace_relu6(net)
    x = 3 * images().float()
    torch.testing.assert_close(clipped(x), net(x))


def test_clips_of_channels() -> None:
    low, high = torch.tensor([0.0, -1.0]), torch.tensor([1.0, INF])
    x = torch.tensor([[-2.0, -2.0], [5.0, 5.0]])
    expected = torch.tensor([[0.0, -1.0], [1.0, 5.0]])
    assert torch.equal(ChannelClip(low, high)(x), expected)
    assert torch.equal(ChannelClip(low, high)(x[:, :, None, None])[:, :, 0, 0], expected)
    assert torch.equal(ChannelClip(low, high, axis=-1)(x[:, None, None])[:, 0, 0], expected)
    assert ChannelClip(low, high)(x.half()).dtype == torch.float16
    assert "high=1..inf" in repr(ChannelClip(low, high))
    counted = ChannelClip(0.0, high).counts((2, 3, 3))
    assert (counted["cmp:fp32"], counted["units"], counted["params"]) == (36, 18, 3)
    with pytest.raises(ValueError, match="low is 2 and high is 1"):
        ChannelClip(2, 1)


# --- moments ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("low", [-INF, -0.7, 0.0, 0.4])
@pytest.mark.parametrize("high", [0.5, 6.0, INF])
@pytest.mark.parametrize("mean", [-3.0, -0.2, 0.3, 5.0])
@pytest.mark.parametrize("std", [1e-3, 0.7, 2.0])
def test_clipped_normal_against_integration(mean: float, std: float, low: float, high: float) -> None:
    arguments = [torch.tensor(v, dtype=torch.float64) for v in (mean, std, low, high)]
    found = [float(value) for value in clipped_normal(*arguments)]
    law = stats.norm(mean, std)

    def moment(power: int) -> float:
        ends = (max(low, mean - 12 * std), min(high, mean + 12 * std))
        inside = integrate.quad(lambda x: x**power * law.pdf(x), *ends, epsabs=1e-13)[0] if ends[0] < ends[1] else 0.0
        below = low**power * law.cdf(low) if low > -INF else 0.0
        return inside + below + (high**power * law.sf(high) if high < INF else 0.0)

    assert found[0] == pytest.approx(moment(1), abs=1e-9)
    assert found[1] == pytest.approx(moment(2) - moment(1) ** 2, abs=1e-8)


def test_clipped_normal_at_its_edges() -> None:
    def at(*values: float) -> list[float]:
        return [float(v) for v in clipped_normal(*(torch.tensor(value) for value in values))]

    assert at(2.0, 0.0, 0.0, INF) == [2.0, 0.0]
    assert at(-2.0, 0.0, 0.0, INF) == [0.0, 0.0]
    assert at(9.0, 0.0, 0.0, 6.0) == [6.0, 0.0]
    # A standard normal's positive part has mean 1 / sqrt(2 pi) and second moment 1 / 2.
    assert at(0.0, 1.0, 0.0, INF) == pytest.approx([1 / math.sqrt(2 * math.pi), 0.5 - 1 / (2 * math.pi)], abs=1e-6)
    assert all(math.isnan(value) for value in at(math.nan, math.nan, 0.0, 6.0))
    arguments = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.3, 0.8, -0.5, 1.4)]
    assert torch.autograd.gradcheck(clipped_normal, arguments)


class Flows(nn.Module):
    """Every operation whose moments follow from those of its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1)
        self.last, self.linear = nn.Conv2d(6, 3, 1), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a(x), self.b(x)
        total = a + b
        joined = torch.cat([F.relu(total), 3 * b], 1)
        wide = F.pad(joined[:, 1:3], (0, 0, 0, 0, 1, 3))
        return self.linear(F.max_pool2d(self.last(wide), 2).flatten(1))


def test_moments_of_every_operation() -> None:
    net = fx.symbolic_trace(Flows().double())
    mean, std = torch.tensor([[0.5, -1.0], [0.2, 2.0]]).double(), torch.tensor([[0.3, 0.4], [1.0, 0.5]]).double()
    for name, m, s in (("a", mean[0], std[0]), ("b", mean[1], std[1])):
        net.get_submodule(name).register_buffer("output_mean", m)
        net.get_submodule(name).register_buffer("output_std", s)
    found = propagate(net, sigmas=2)

    def check(name: str, **expected: Tensor) -> None:
        for field, value in expected.items():
            torch.testing.assert_close(getattr(found[name], field), value.double(), rtol=1e-12, atol=1e-12)

    check("a", mean=mean[0], variance=std[0] ** 2, low=mean[0] - 2 * std[0], high=mean[0] + 2 * std[0])
    spread = 2 * (std[0] ** 2 + std[1] ** 2).sqrt()
    check("add", mean=mean.sum(0), variance=(std**2).sum(0), low=mean.sum(0) - spread, high=mean.sum(0) + spread)
    rectified, variance = clipped_normal(mean.sum(0), spread / 2, torch.tensor(0.0), torch.tensor(INF))
    check("relu", mean=rectified, variance=variance, low=torch.tensor([0.0, 0.0]))
    check("mul", mean=3 * mean[1], variance=9 * std[1] ** 2, low=3 * (mean[1] - 2 * std[1]))
    check("cat", mean=torch.cat([rectified, 3 * mean[1]]))
    check("pad", mean=torch.tensor([0, rectified[1], 3 * mean[1, 0], 0, 0, 0]))
    weight, bias = net.last.weight[:, :, 0, 0], net.last.bias
    check("last", mean=weight @ found["pad"].mean + bias, variance=weight**2 @ found["pad"].variance)
    assert found["max_pool2d"].mean.isnan().all()
    check("flatten", high=found["last"].high)
    assert found["linear"].mean.isnan().all()
    assert "x" not in found


def test_moments_of_independent_inputs_are_those_of_samples() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU6(), nn.Conv2d(4, 2, 1)).double()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for module in net:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight)
    graph, _ = replace_relu6(net)
    mean, std = torch.tensor([0.5, -0.2, 1.0]).double(), torch.tensor([1.0, 0.5, 2.0]).double()
    found = propagate(graph, inputs=Moments(mean, std**2, mean - std, mean + std))
    n = 40_000
    noise = torch.randn(n, 3, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x = mean[:, None, None] + std[:, None, None] * noise
    for name, y in (("_0", net[0](x)), ("_1", net[:2](x))):
        samples = y[:, :, 0, 0]
        expected = found[name]
        bound = 5 * (expected.variance / n).sqrt()  # five standard errors
        assert ((samples.mean(0) - expected.mean).abs() < bound).all()
        fourth = (samples - samples.mean(0)).pow(4).mean(0)
        bound = 5 * ((fourth - expected.variance**2) / n).sqrt()
        assert ((samples.var(0) - expected.variance).abs() < bound).all()
    torch.testing.assert_close(net(x).mean((0, 2, 3)), found["_2"].mean, rtol=0.02, atol=0.02)


def test_recorded_moments() -> None:
    net = nn.Sequential(*conv_bn(), nn.ReLU(), nn.Conv2d(4, 2, 1), nn.Flatten(), nn.Linear(72, 3)).double()
    folded, _ = fold_batch_norms(net)
    before = [value.clone() for value in output_moments(folded.get_submodule("0"))]
    recorded, report = record_moments(folded, images(16))
    assert [entry.layers for entry in report.done] == ["3", "5"]
    assert all(torch.equal(*pair) for pair in zip(before, output_moments(recorded.get_submodule("0")), strict=True))
    y, z = net[:4](images(16)), net(images(16))
    for name, expected in (
        ("3", (y.mean((0, 2, 3)), y.std((0, 2, 3), correction=0))),
        ("5", (z.mean(0), z.std(0, correction=0))),
    ):
        for value, other in zip(output_moments(recorded.get_submodule(name)), expected, strict=True):
            torch.testing.assert_close(value, other, rtol=1e-10, atol=1e-12)


def test_noise_has_the_spectrum_of_photographs() -> None:
    noise = natural_noise((64, 3, 64, 64), torch.Generator().manual_seed(0))
    assert noise.shape == (64, 3, 64, 64)
    assert (float(noise.min()), float(noise.max())) == (0.0, 1.0)
    assert abs(float(noise.mean()) - 0.45) < 0.03
    power = torch.fft.fft2(noise[:, 0] - noise[:, 0].mean()).abs().square().mean(0)
    frequencies = np.arange(2, 17)
    along_axes = (power[0, 2:17] + power[2:17, 0]) / 2
    slope = np.polyfit(np.log(frequencies), np.log(along_axes.numpy()), 1)[0]
    assert abs(slope + 2) < 0.25  # clipping at 0 and 1 adds a little to the high frequencies
    together = torch.corrcoef(noise.transpose(0, 1).reshape(3, -1))
    assert ((together[0, 1:] > 0.8) & (together[0, 1:] < 0.95)).all()
    assert torch.equal(noise, natural_noise((64, 3, 64, 64), torch.Generator().manual_seed(0)))
