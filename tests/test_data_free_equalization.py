"""Channels rescaled: the function stays, ranges become what the equations say, and what is skipped is said."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from data_free_nets import Net, images, nets
from hypothesis import given, settings
from scipy import optimize
from torch import Tensor, nn
from torch.nn import functional as F

from classical.data_free import (
    ChannelClip,
    equalize,
    fold_batch_norms,
    output_moments,
    replace_relu6,
    rescale_randomly,
)
from classical.data_free.flow import Flow
from classical.data_free.graph import traced

DTYPES = (torch.float32, torch.float64)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def prepared(net: nn.Module) -> nn.Module:
    return replace_relu6(fold_batch_norms(net)[0])[0]


def made(*modules: nn.Module, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """A chain whose weights and biases are drawn with channels of uneven size."""
    net = nn.Sequential(*modules).to(dtype)
    random = generator(seed)
    with torch.no_grad():
        for p in net.parameters():
            size = torch.exp(2 * torch.randn(len(p), generator=random, dtype=torch.float64))
            values = torch.randn(p.shape, generator=random, dtype=torch.float64)
            p.copy_(values * size.view(-1, *[1] * (p.dim() - 1)))
    return net.eval()


def rows(layer: nn.Module) -> np.ndarray:
    return layer.weight.detach().abs().flatten(1).amax(1).double().numpy()


def columns(layer: nn.Module) -> np.ndarray:
    """Largest weight that reads each input channel, by a loop over outputs."""
    weight, groups = layer.weight.detach().double().numpy(), getattr(layer, "groups", 1)
    inside, outside = weight.shape[1], len(weight) // groups
    found = np.zeros(inside * groups)
    for o in range(len(weight)):
        for i in range(inside):
            channel = (o // outside) * inside + i
            found[channel] = max(found[channel], np.abs(weight[o, i]).max())
    return found


# --- the function stays ----------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(nets())
def test_equalization_keeps_the_function(net: Net) -> None:
    x = images()
    ready = prepared(net)
    for changed in (equalize(ready)[0], rescale_randomly(ready, 0.01, 100, generator())[0]):
        torch.testing.assert_close(changed(x), net(x), rtol=1e-10, atol=1e-10)
    rescaled, _ = rescale_randomly(ready, 0.01, 100, generator(1))
    torch.testing.assert_close(equalize(rescaled)[0](x), net(x), rtol=1e-10, atol=1e-10)


def test_gradients_are_those_of_the_function() -> None:
    net = prepared(Net(["inverted", "concat"], "mean", "relu6", True, True, 0))
    x = images().requires_grad_()
    gradients = [torch.autograd.grad(model(x).square().sum(), x)[0] for model in (net, equalize(net)[0])]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-10, atol=1e-10)


@settings(max_examples=15, deadline=None)
@given(nets())
def test_moments_follow_their_channels(net: Net) -> None:
    ready = prepared(net)
    changed, _ = rescale_randomly(ready, 0.01, 100, generator())
    for name, layer in ready.named_modules():
        before, after = output_moments(layer), output_moments(changed.get_submodule(name))
        if before is not None:
            ratio = changed.get_submodule(name).bias / layer.bias
            torch.testing.assert_close(after[0] / before[0], ratio)
            torch.testing.assert_close(after[1] / before[1], ratio)


@pytest.mark.parametrize("dtype", DTYPES)
def test_in_every_precision(dtype: torch.dtype) -> None:
    net = Net(["inverted", "shortcut"], "flatten", "relu6", True, True, 0).to(dtype)
    x = images().to(dtype)
    found = equalize(prepared(net))[0]
    assert {p.dtype for p in found.parameters()} == {b.dtype for b in found.buffers()} == {dtype}
    # float32 may differ by a few units in the last place of sums of some hundred terms.
    tolerance = 1e-10 if dtype == torch.float64 else 2e-5
    torch.testing.assert_close(found(x), net(x), rtol=tolerance, atol=tolerance * float(net(x).detach().abs().max()))


def test_the_model_itself_stays() -> None:
    net = made(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)).train()
    before = [p.clone() for p in net.parameters()]
    found, _ = equalize(net)
    assert net.training
    assert not found.training
    assert all(torch.equal(*pair) for pair in zip(before, net.parameters(), strict=True))


# --- ranges ----------------------------------------------------------------------------------------------------------

PAIRS: dict[str, tuple[nn.Module, ...]] = {
    "conv, conv": (nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 3)),
    "grouped": (nn.Conv2d(4, 6, 1, groups=2), nn.ReLU(), nn.Conv2d(6, 4, 3, groups=2)),
    "conv, multiplier": (nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 12, 3, groups=4)),
    "pooled": (nn.Conv2d(3, 5, 3), nn.LeakyReLU(), nn.MaxPool2d(2), nn.Dropout(), nn.Conv2d(5, 4, 1)),
    "linear": (nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)),
    "conv1d": (nn.Conv1d(3, 5, 3), nn.PReLU(5), nn.Conv1d(5, 4, 3)),
}


@pytest.mark.parametrize("name", PAIRS)
def test_both_ranges_of_a_pair_become_the_geometric_mean(name: str) -> None:
    net = made(*PAIRS[name])
    first, second = net[0], net[-1]
    expected = np.sqrt(rows(first) * columns(second))
    scales = np.sqrt(rows(first) / columns(second))
    found, report = equalize(net, tolerance=1e-12)
    last = found.get_submodule(str(len(net) - 1))
    np.testing.assert_allclose(rows(found.get_submodule("0")), expected, rtol=1e-12)
    np.testing.assert_allclose(columns(last), expected, rtol=1e-12)
    bias = found.get_submodule("0").bias.detach().numpy()
    np.testing.assert_allclose(bias, first.bias.detach().numpy() / scales, rtol=1e-12)
    assert torch.equal(last.bias, second.bias)
    assert [entry.done for entry in report.entries] == [True, True]


def test_flattened_pixels_share_their_channel() -> None:
    net = made(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    reader = net[3].weight.detach().abs().reshape(5, 4, 36).amax((0, 2)).numpy()
    expected = np.sqrt(rows(net[0]) * reader)
    found, _ = equalize(net, tolerance=1e-12)
    np.testing.assert_allclose(rows(found.get_submodule("0")), expected, rtol=1e-12)
    torch.testing.assert_close(found(images()), net(images()), rtol=1e-10, atol=1e-10)


def test_three_ranges_around_a_depthwise_layer_become_their_geometric_mean() -> None:
    net = made(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=6), nn.ReLU(), nn.Conv2d(6, 4, 1))
    expected = np.cbrt(rows(net[0]) * rows(net[2]) * columns(net[4]))
    found, _ = equalize(net, tolerance=1e-10)
    for values in (rows(found.get_submodule("0")), rows(found.get_submodule("2")), columns(found.get_submodule("4"))):
        np.testing.assert_allclose(values, expected, rtol=1e-8)


def test_a_pair_reaches_the_best_total_precision() -> None:
    net = made(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 3))
    r1, r2 = rows(net[0]), columns(net[2])

    def precision(log_scales: np.ndarray) -> float:
        """Sum over channels of the product of both relative ranges, which the paper maximizes."""
        a, b = r1 / np.exp(log_scales), r2 * np.exp(log_scales)
        return float((a / a.max() * b / b.max()).sum())

    best = max(
        -optimize.minimize(lambda s: -precision(s), start, method="Nelder-Mead", options={"maxiter": 20000}).fun
        for start in np.random.default_rng(0).normal(size=(4, 5))
    )
    found, _ = equalize(net, tolerance=1e-12)
    a, b = rows(found.get_submodule("0")), columns(found.get_submodule("2"))
    assert float((a / a.max() * b / b.max()).sum()) == pytest.approx(precision(0.5 * np.log(r1 / r2)), rel=1e-12)
    assert precision(0.5 * np.log(r1 / r2)) >= best - 1e-6


def test_rescaling_does_not_matter_to_a_chain() -> None:
    net = made(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=6), nn.ReLU6(), nn.Conv2d(6, 4, 1))
    ready = replace_relu6(net)[0]
    rescaled, _ = rescale_randomly(ready, 1e-3, 1e3, generator())
    one, other = (equalize(model, tolerance=1e-10)[0] for model in (ready, rescaled))
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=0)


def test_equalizing_again_changes_nothing() -> None:
    net = prepared(Net(["residual", "inverted", "depthwise"], "flatten", "relu", True, True, 3))
    once, report = equalize(net, tolerance=1e-9, sweeps=2000)
    assert report.entries[-1].done
    twice, _ = equalize(once, tolerance=1e-9, sweeps=1)
    for a, b in zip(once.parameters(), twice.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)


def test_too_few_sweeps_are_reported() -> None:
    net = prepared(Net(["depthwise", "depthwise"], "flatten", "relu", True, True, 3))
    _, report = equalize(net, sweeps=1)
    assert report.entries[-1] == report.skipped[-1]
    assert "the last of 1 sweeps moved scales by up to" in report.entries[-1].note


def test_clips_follow_their_channels() -> None:
    net = made(nn.Conv2d(3, 5, 1), nn.ReLU6(), nn.Conv2d(5, 4, 1))
    scales = torch.from_numpy(np.sqrt(rows(net[0]) / columns(net[2])))
    found, _ = equalize(replace_relu6(net)[0])
    clip = next(m for m in found.modules() if isinstance(m, ChannelClip))
    torch.testing.assert_close(clip.high, 6 / scales)
    assert torch.equal(clip.low, torch.zeros_like(scales))
    x = 10 * images()
    torch.testing.assert_close(found(x), net(x), rtol=1e-12, atol=1e-12)
    assert (net[:1](x) > 6).any()


def test_clips_of_features_on_the_last_axis() -> None:
    net = made(nn.Linear(6, 5), nn.ReLU6(), nn.Linear(5, 4))
    found, _ = equalize(replace_relu6(net)[0])
    for shape in ((7, 6), (7, 3, 6), (7, 5, 6)):
        x = 5 * torch.randn(shape, dtype=torch.float64, generator=generator())
        torch.testing.assert_close(found(x), net(x), rtol=1e-12, atol=1e-12)


# --- dead channels ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dead", ["never written", "never read", "neither"])
def test_a_dead_channel_does_not_dominate(dead: str) -> None:
    net = made(nn.Conv2d(3, 5, 1), nn.ReLU(), nn.Conv2d(5, 4, 1))
    with torch.no_grad():
        net[0].weight[2] = 1e6
        net[2].weight[:, 2] = 1e6
        if dead != "never read":
            net[0].weight[2] = 0
        if dead != "never written":
            net[2].weight[:, 2] = 0
    live = np.array([0, 1, 3, 4])
    expected = np.sqrt(rows(net[0])[live] * columns(net[2])[live])
    found, _ = equalize(net, tolerance=1e-12)
    a, b = rows(found.get_submodule("0")), columns(found.get_submodule("2"))
    np.testing.assert_allclose(a[live], expected, rtol=1e-12)
    np.testing.assert_allclose(b[live], expected, rtol=1e-12)
    median = float(np.median(expected))
    assert (a[2], b[2]) == pytest.approx(
        {"never written": (0, median), "never read": (median, 0), "neither": (0, 0)}[dead]
    )
    torch.testing.assert_close(found(images()), net(images()), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-12])
def test_the_bias_of_a_dead_channel_does_not_dominate(size: float) -> None:
    net = made(nn.Conv2d(3, 5, 1), nn.ReLU(), nn.Conv2d(5, 4, 1))
    with torch.no_grad():
        net[0].weight[2] *= size
        net[0].bias[2] = 0.5
    found, _ = equalize(net, tolerance=1e-12)
    live = [0, 1, 3, 4]
    median = float(np.median(np.sqrt(rows(net[0])[live] * columns(net[2])[live])))
    # Balanced, the range of 1e-12 would divide the bias by a scale near 1e-6.
    scale = median / float(columns(net[2])[2])
    assert columns(found.get_submodule("2"))[2] == pytest.approx(median, rel=1e-12)
    assert found.get_submodule("0").bias[2].item() == pytest.approx(0.5 / scale, rel=1e-12)
    torch.testing.assert_close(found(images()), net(images()), rtol=1e-9, atol=1e-9)


def test_a_layer_of_zeros_is_left_alone() -> None:
    net = made(nn.Conv2d(3, 5, 1), nn.ReLU(), nn.Conv2d(5, 4, 1))
    nn.init.zeros_(net[2].weight)
    found, _ = equalize(net)
    for a, b in zip(found.parameters(), net.parameters(), strict=True):
        assert torch.equal(a, b)


# --- which channels are tied -----------------------------------------------------------------------------------------


class Built(nn.Module):
    """Layers by name, and a function of them and the input."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.function = forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def built(forward: Callable[[Any, Tensor], Tensor], **layers: nn.Module) -> Built:
    net = Built(forward, **layers)
    made(*layers.values())
    return net.double().eval()


def conv(n_in: int, n_out: int, kernel: int = 1, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(n_in, n_out, kernel, padding=kernel // 2, **options)


def groups(net: nn.Module) -> list[tuple[tuple[str, ...], tuple[str, ...], int]]:
    """Writers, readers and the number of free variables of each group."""
    flow = Flow(traced(net))
    free = flow.free()
    return [(g.writers, g.readers, int(free[g.variables].sum())) for g in flow.groups if g.writers and g.readers]


def test_additions_tie_all_that_they_join() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        x = F.relu(net.a(x))
        for block in (net.b, net.c):
            x = F.relu(x + block(x))
        return net.last(x)

    net = built(forward, a=conv(3, 4), b=conv(4, 4, 3), c=conv(4, 4, 3), last=conv(4, 2))
    assert groups(net) == [(("a", "b", "c"), ("b", "c", "last"), 4)]
    flow = Flow(traced(net))
    assert np.array_equal(flow.written["a"], flow.read["last"])
    found, report = equalize(net)
    torch.testing.assert_close(found(images()), net(images()), rtol=1e-10, atol=1e-10)
    assert "a, b, c -> b, c, last" in str(report)


def test_concatenated_padded_and_sliced_channels_keep_their_own() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        joined = torch.cat([net.a(x), net.b(x)], dim=1)
        wide = F.pad(joined[:, 1:, ::2, ::2], (0, 0, 0, 0, 2, 1))
        return net.last(wide)

    net = built(forward, a=conv(3, 2), b=conv(3, 3), last=conv(7, 2))
    flow = Flow(traced(net))
    assert list(flow.read["last"][2:6]) == [*flow.written["a"][1:], *flow.written["b"]]
    assert len(set(flow.read["last"])) == 7
    assert groups(net) == [(("a", "b"), ("last",), 7)] or groups(net)[0][2] == 8
    torch.testing.assert_close(equalize(net)[0](images()), net(images()), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (lambda net, x: net.b(torch.sigmoid(net.a(x))), "read by sigmoid"),
        (lambda net, x: net.b(F.relu6(net.a(x))), "read by ReLU6 relu6"),
        (lambda net, x: net.b(net.a(x) * net.a(x)), "read by mul"),
        (lambda net, x: net.b(net.a(x) + 1), "read by add"),
        (lambda net, x: net.b(-1 * net.a(x)), "read by mul"),
        (lambda net, x: net.b(F.pad(net.a(x), (1, 1), value=1.0)), "read by pad"),
        (lambda net, x: net.b(net.a(x).transpose(2, 3)), "read by transpose"),
        (lambda net, x: (net.b(net.a(x)), net.a(x)), "it is the network's output"),
        (lambda net, x: net.b(net.a(x) + x.mean(1, keepdim=True)), "read by add"),
        (lambda net, x: net.b(net.same(net.a(x))), "read by ConvTranspose2d same"),
        (lambda net, x: net.b(net.norm(net.a(x) + net.a(x))), "read by BatchNorm2d norm"),
        (lambda net, x: net.b(net.a(x).chunk(1, 1)[0]), "read by chunk"),
        (lambda net, x: net.along(net.a(x)), "read by along along another axis"),
    ],
)
def test_what_is_not_homogeneous_fixes_its_channels(forward: Callable[[Any, Tensor], Tensor], reason: str) -> None:
    layers = {"a": conv(3, 4), "b": conv(4, 2), "same": nn.ConvTranspose2d(4, 4, 1), "norm": nn.BatchNorm2d(4)}
    net = built(forward, **layers, along=nn.Linear(8, 4))
    found, report = equalize(net)
    torch.testing.assert_close(found(images()), net(images()), rtol=1e-12, atol=1e-12)
    flow = Flow(traced(net))
    assert {flow.reasons[v] for v in flow.written["a"].tolist()} == {reason}
    assert not report.done


def test_layers_called_twice_or_sharing_weights() -> None:
    twice = built(lambda net, x: net.last(net.b(net.b(net.a(x)))), a=conv(3, 4), b=conv(4, 4), last=conv(4, 2))
    assert groups(twice) == [(("a", "b"), ("b", "last"), 4)]
    torch.testing.assert_close(equalize(twice)[0](images()), twice(images()), rtol=1e-10, atol=1e-10)
    shared = built(lambda net, x: net.last(net.b(net.a(x))), a=conv(4, 4), b=conv(4, 4), last=conv(4, 2))
    shared.b.weight = shared.a.weight
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64, generator=generator())
    found, report = equalize(shared)
    torch.testing.assert_close(found(x), shared(x), rtol=1e-12, atol=1e-12)
    assert {entry.note for entry in report.skipped} == {"a and b share their weight"}
    two_ways = built(
        lambda net, x: net.b(net.a(x).flatten(1)) + net.b(net.c(x)), a=conv(3, 2), b=nn.Linear(128, 3), c=nn.Flatten()
    )
    two_ways.c = nn.Sequential(nn.Flatten(), nn.Linear(192, 128)).double()
    assert "b is called in two ways" in str(equalize(two_ways)[1])
    torch.testing.assert_close(equalize(two_ways)[0](images()), two_ways(images()), rtol=1e-12, atol=1e-12)


def test_shapes_may_be_asked_for() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        y = F.relu(net.a(x))
        y = F.avg_pool2d(y, y.size()[3])
        return net.last(y.reshape(y.shape[0], -1))

    net = built(forward, a=conv(3, 4), last=nn.Linear(4, 2))
    assert groups(net) == [(("a",), ("last",), 4)]


def test_random_factors() -> None:
    net = made(nn.Conv2d(3, 200, 1), nn.ReLU(), nn.Conv2d(200, 4, 1))
    rescaled, report = rescale_randomly(net, 0.01, 100, generator())
    factors = np.log10(rows(rescaled.get_submodule("0")) / rows(net[0]))
    assert factors.min() >= -2
    assert factors.max() <= 2
    assert abs(factors.mean()) < 5 * (4 / math.sqrt(12)) / math.sqrt(200)  # log-uniform
    assert report.entries[0].note == "200 channels"
    with pytest.raises(ValueError, match="low is 2 and high is 1: factors need 0 < low <= high"):
        rescale_randomly(net, 2, 1, generator())
