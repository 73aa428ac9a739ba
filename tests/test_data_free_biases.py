"""Absorbed and corrected biases, and ranges from statistics."""

from typing import Any

import pytest
import torch
from data_free_nets import Net, images, made
from torch import Tensor, nn
from torch.nn import functional as F

from classical.convert import quantize
from classical.data_free import (
    ChannelClip,
    Moments,
    absorb_biases,
    correct_biases,
    correct_biases_on,
    equalize,
    fold_batch_norms,
    output_moments,
    propagate,
    record_moments,
    replace_relu6,
    set_ranges,
)

DTYPES = (torch.float32, torch.float64)


def with_moments(net: nn.Module, name: str, mean: Any, std: Any) -> nn.Module:
    for key, value in (("output_mean", mean), ("output_std", std)):
        net.get_submodule(name).register_buffer(key, torch.as_tensor(value).double(), persistent=False)
    return net


# --- absorption ------------------------------------------------------------------------------------------------------

READERS: dict[str, tuple[nn.Module, ...]] = {
    "conv": (nn.Conv2d(4, 2, 3),),
    "named padding": (nn.Conv2d(4, 2, 3, padding="valid"),),
    "depthwise": (nn.Conv2d(4, 8, 3, groups=4, bias=False), nn.ReLU(), nn.Conv2d(8, 2, 1)),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2),),
    "reflected borders": (nn.Conv2d(4, 2, 3, padding=1, padding_mode="reflect"),),
    "pooled": (nn.MaxPool2d(2), nn.AvgPool2d(2), nn.Conv2d(4, 2, 1)),
    "flattened": (nn.Flatten(), nn.Linear(4 * 36, 3)),
    "averaged": (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)),
}


@pytest.mark.parametrize("act", [nn.ReLU(), ChannelClip(0.0, 40.0), ChannelClip(-2.0, 50.0)])
@pytest.mark.parametrize("name", READERS)
def test_absorption_is_exact_where_nothing_lies_below(name: str, act: nn.Module) -> None:
    net = made(nn.Conv2d(3, 4, 3), act, *READERS[name])
    x = images()
    with torch.no_grad():
        net[0].bias[:2] += torch.tensor([20.0, 30.0]) - net[0](x).amin((0, 2, 3))[:2]
        lowest = net[0](x).amin((0, 2, 3))  # 20, 30 and two below 0
    std = torch.tensor([2.0, 1.0, 1.0, 1.0])
    assert (lowest[2:] < 0).all()
    mean = torch.tensor([19.0 + 3 * 2, 28.0 + 3 * 1, 1.0, 0.0], dtype=torch.float64)
    net = with_moments(net, "0", mean, std)
    shift = torch.tensor([19.0, 28.0, 0.0, 0.0], dtype=torch.float64)
    found, report = absorb_biases(net)
    torch.testing.assert_close(found(x), net(x), rtol=1e-10, atol=1e-10)
    layer = found.get_submodule("0")
    torch.testing.assert_close(layer.bias, net[0].bias - shift, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(output_moments(layer)[0], mean - shift)
    assert report.done[0].note.startswith("2 of 4 channels")
    assert torch.equal(output_moments(net[0])[0], mean)


def test_a_channel_that_is_always_clipped_is_absorbed_up_to_the_clip() -> None:
    net = made(nn.Conv2d(3, 1, 1), ChannelClip(0.0, 6.0), nn.Conv2d(1, 2, 1))
    nn.init.constant_(net[0].bias, 100.0)
    found, _ = absorb_biases(with_moments(net, "0", [100.0], [1.0]))
    assert float(found.get_submodule("1").high) == 0
    torch.testing.assert_close(found(images()), net(images()), rtol=1e-12, atol=1e-12)


def test_a_clip_above_zero_leaves_less_to_absorb() -> None:
    net = made(nn.Conv2d(3, 1, 1), ChannelClip(2.0, 60.0), nn.Conv2d(1, 2, 1))
    nn.init.constant_(net[0].bias, 50.0)
    found, _ = absorb_biases(with_moments(net, "0", [50.0], [5.0]))
    assert found.get_submodule("0").bias.item() == pytest.approx(50 - (50 - 3 * 5 - 2))
    torch.testing.assert_close(found(images()), net(images()), rtol=1e-10, atol=1e-10)


def test_padded_readers_are_skipped_or_wrong_at_their_borders_alone() -> None:
    net = made(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.ZeroPad2d(1), nn.Conv2d(4, 2, 3, padding=1))
    nn.init.constant_(net[0].bias, 50.0)
    net = with_moments(net, "0", [50.0] * 4, [5.0] * 4)
    kept, report = absorb_biases(net)
    assert [entry.note for entry in report.skipped] == ["read by 2"]
    assert torch.equal(kept(images()), net(images()))
    net = nn.Sequential(net[0], net[1], net[3])
    assert absorb_biases(net)[1].skipped[0].note == "2 pads with zeros"
    changed, _ = absorb_biases(net, padded=True)
    torch.testing.assert_close(changed(images())[:, :, 1:-1, 1:-1], net(images())[:, :, 1:-1, 1:-1])
    assert not torch.allclose(changed(images()), net(images()))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        return self.c(x + F.relu(self.b(x)))


def test_absorption_stops_at_additions_and_outputs() -> None:
    net = Residual().double().eval()
    for name in ("a", "b"):
        with_moments(net, name, [9.0] * 4, [1.0] * 4)
    _, report = absorb_biases(net)
    assert {entry.note for entry in report.entries} == {"read by add"}
    _, report = absorb_biases(with_moments(made(nn.Conv2d(3, 2, 1), nn.ReLU()), "0", [9.0, 9.0], [1.0, 1.0]))
    assert report.entries[0].note == "it is the network's output"


class Fan(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 3), nn.Conv2d(4, 2, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        return self.b(x) * torch.sigmoid(self.c(x))


def test_all_readers_get_their_share() -> None:
    net = Fan().double().eval()
    nn.init.constant_(net.a.bias, 30.0)
    found, report = absorb_biases(with_moments(net, "a", [30.0] * 4, [1.0] * 4))
    assert report.done[0].layers == "a -> b, c"
    torch.testing.assert_close(found(images()), net(images()), rtol=1e-10, atol=1e-10)


class Odd(nn.Module):
    """Layers whose mean nothing can take over: read beside their ReLU, without ReLU, without batch norm, as output."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d, self.e = (nn.Conv2d(n, 4, 1) for n in (3, 4, 4, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x = self.b(x + F.relu(x))
        x = F.relu(self.c(torch.tanh(x)))
        return self.e(F.relu(self.d(x)))


def test_every_layer_that_could_not_hand_on_its_mean_is_reported() -> None:
    net = Odd().double().eval()
    for name in ("a", "b", "d", "e"):
        with_moments(net, name, [9.0] * 4, [1.0] * 4)
    found, report = absorb_biases(net)
    assert {entry.layers: (entry.done, entry.note) for entry in report.entries} == {
        "a": (False, "read by add"),
        "b": (False, "read by tanh"),
        "c": (False, "no batch norm says what is hardly ever cut off"),
        "d -> e": (True, "4 of 4 channels, by up to 6"),
        "e": (False, "it is the network's output"),
    }
    assert torch.equal(found.get_submodule("a").bias, net.a.bias)


def test_low_biases_are_left_alone() -> None:
    net = made(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    found, report = absorb_biases(with_moments(net, "0", [1.0, 2.9, 0.0, -1.0], [1.0] * 4))
    assert report.entries == ()
    assert torch.equal(found(images()), net(images()))


# --- correction ------------------------------------------------------------------------------------------------------


def shifted(net: nn.Module, weight: str = "int3") -> nn.Module:
    """Few bits in the weights, none in the activations: what is left is the error of the weights."""
    return quantize(net, weight=weight, activation="float").eval()


@pytest.mark.parametrize("weight", ["int3", "int3_channel", "int3_affine", "twn"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_constant_images_the_correction_is_exact(weight: str, dtype: torch.dtype) -> None:
    net = made(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3, groups=2, bias=False)).to(dtype)
    mean = torch.tensor([0.3, -1.0, 2.0], dtype=dtype)
    graph, _ = fold_batch_norms(net)
    inputs = Moments(mean, torch.zeros_like(mean), mean, mean)
    corrected, report = correct_biases(shifted(graph, weight), graph, propagate(graph, inputs=inputs))
    x = mean[None, :, None, None].expand(2, 3, 8, 8)
    tolerance = 1e-10 if dtype == torch.float64 else 2e-5
    torch.testing.assert_close(corrected(x), net(x), rtol=tolerance, atol=tolerance)
    assert not torch.allclose(shifted(graph, weight)(x), net(x), rtol=1e-3)
    assert len(report.done) == 2


def test_the_mean_over_normal_data_is_restored() -> None:
    """1x1 layers on data whose pre-activations are exactly normal: the mean error falls to that of sampling."""
    net = made(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.ReLU6(), nn.Conv2d(6, 4, 1))
    with torch.no_grad():
        weight = net[0].weight[:, :, 0, 0]
        net[1].running_mean.copy_(net[0].bias)
        net[1].running_var.copy_(weight.square().sum(1))
        net[1].eps = 0.0
    graph, _ = replace_relu6(fold_batch_norms(net)[0])
    corrected, _ = correct_biases(shifted(graph), graph, propagate(graph))
    n = 20_000
    x = torch.randn(n, 3, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        inner = shifted(graph)
        inner.get_submodule("0").weight_quantizer = nn.Identity()  # the first layer exact: the second's input is normal
        corrected.get_submodule("0").load_state_dict(graph.get_submodule("0").state_dict(), strict=False)
        corrected.get_submodule("0").weight_quantizer = nn.Identity()
        before, after = (model(x) - net(x) for model in (inner, corrected))
    bound = 5 * after.std(0) / n**0.5  # five standard errors
    assert (after.mean(0).abs() < bound).all()
    assert (before.mean(0).abs() > 2 * bound).any()


def test_unknown_means_are_skipped() -> None:
    net = made(nn.Conv2d(3, 4, 1), nn.MaxPool2d(2), nn.Conv2d(4, 2, 1), nn.Flatten(), nn.Linear(32, 2))
    graph = record_moments(net, images())[0]
    corrected, report = correct_biases(shifted(graph), graph, propagate(graph))
    assert [(entry.layers, entry.done) for entry in report.entries] == [("0", False), ("2", False), ("4", True)]
    assert [entry.note for entry in report.skipped] == [
        "the mean of its input is unknown because of the network's input: give input_mean",
        "the mean of its input is unknown because of MaxPool2d 1",
    ]
    assert torch.equal(corrected.get_submodule("2").bias, graph.get_submodule("2").bias)


class Twice(nn.Module):
    """A layer that is called twice, between two that are called once."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.h, self.o = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)
        self.act = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.act(self.h(self.act(self.h(self.act(self.a(x)))))))


def twice(act: nn.Module, seed: int = 0) -> Twice:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = Twice().double().eval()
    net.act = act
    return net


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_layer_called_twice_takes_the_mean_of_its_shifts(dtype: torch.dtype) -> None:
    net = twice(nn.Identity()).to(dtype)
    graph, _ = fold_batch_norms(net)
    mean = torch.tensor([0.3, -1.0, 2.0], dtype=dtype)
    inputs = Moments(mean, torch.zeros_like(mean), mean, mean)
    quantized = shifted(graph)
    corrected, report = correct_biases(quantized, graph, propagate(graph, inputs=inputs))
    first = net.a(mean[:, None, None])
    second = net.h(first)
    layer = quantized.get_submodule("h")
    error = (layer.quantized_weight() - net.h.weight)[:, :, 0, 0]
    expected = net.h.bias - error @ ((first + second) / 2).flatten()
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(corrected.get_submodule("h").bias, expected, rtol=tolerance, atol=tolerance)
    assert [entry.layers for entry in report.done] == ["a", "h", "o"]
    unknown = {name: moments for name, moments in propagate(graph, inputs=inputs).items() if name != "act_1"}
    corrected, report = correct_biases(quantized, graph, unknown)
    assert [entry.layers for entry in report.skipped] == ["h"]
    assert torch.equal(corrected.get_submodule("h").bias, net.h.bias)


def test_on_images_a_layer_called_twice_is_left_alone() -> None:
    net = twice(nn.ReLU())
    graph, _ = fold_batch_norms(net)
    x = images(16)
    corrected, report = correct_biases_on(shifted(graph), graph, x)
    assert [(entry.layers, entry.done, entry.note) for entry in report.skipped] == [
        ("h", False, "called 2 times, with one bias")
    ]
    assert torch.equal(corrected.get_submodule("h").bias, net.h.bias)
    torch.testing.assert_close(corrected(x).mean((0, 2, 3)), net(x).mean((0, 2, 3)), rtol=1e-9, atol=1e-9)


def test_on_images_every_layer_gets_its_mean_back() -> None:
    net = Net(["residual", "inverted"], "flatten", "relu6", True, False, 0)
    graph, _ = equalize(replace_relu6(fold_batch_norms(net)[0])[0])
    x = images(16)
    quantized = quantize(graph, weight="int4", activation="int4").train()
    quantized(x)
    quantized.eval()
    corrected, report = correct_biases_on(quantized, graph, x)
    layers = [name for name, m in graph.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert [entry.layers for entry in report.done] == layers
    outputs: dict[str, list[Tensor]] = {name: [] for name in layers}
    for model in (graph, corrected):
        for name in layers:
            model.get_submodule(name).register_forward_hook(lambda _, __, y, name=name: outputs[name].append(y))
        model(x)
    for name, (exact, found) in outputs.items():
        axes = [0, 2, 3][: exact.dim() - 1]
        torch.testing.assert_close(found.mean(axes), exact.mean(axes), rtol=1e-9, atol=1e-9, msg=name)
        assert not torch.allclose(found, exact)


# --- ranges ----------------------------------------------------------------------------------------------------------


def test_ranges_are_those_of_the_widest_channels() -> None:
    net = made(
        nn.Conv2d(3, 2, 1), nn.ReLU(), nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1), ChannelClip(0.0, 2.5), nn.Conv2d(2, 2, 1)
    )
    with_moments(net, "0", [1.0, -5.0], [0.5, 2.0])
    with_moments(net, "2", [0.5, 0.0], [1.0, 3.0])
    with_moments(net, "3", [0.5, 0.0], [1.0, 3.0])
    graph = fold_batch_norms(net)[0]
    quantized = quantize(graph, weight="int8", activation="int8").eval()
    found, report = set_ranges(quantized, propagate(graph, sigmas=4))

    def at(name: str) -> tuple[float, float]:
        quantizer = found.get_submodule(name).activation_quantizer
        return float(quantizer.low), float(quantizer.high)

    assert at("2") == (0.0, 3.0)  # relu: max(1 + 4 / 2, -5 + 4 * 2)
    assert at("3") == (-12.0, 12.0)
    assert at("5") == (0.0, 2.5)
    assert at("0") == (float("inf"), float("-inf"))
    assert [entry.layers for entry in report.skipped] == ["0"]
    cause = "that of its input is unknown because of the network's input: each sample gets its own; give input_range"
    assert cause in report.skipped[0].note
    assert set_ranges(shifted(graph), propagate(graph))[1].entries == ()


def test_the_range_of_a_layer_called_twice_holds_both_inputs() -> None:
    net = with_moments(twice(nn.ReLU()), "a", [5.0] * 8, [1.0] * 8)
    graph = fold_batch_norms(net)[0]
    moments = propagate(graph)
    first, second = (moments[name] for name in ("act", "act_1"))
    assert float(first.high.max()) == 11.0
    assert float(second.high.max()) != 11.0
    quantized = quantize(graph, weight="int8", activation="int8").eval()
    for scale in (0.01, 1.0, 100.0):  # either may be the wider one
        changed = moments | {"act_1": Moments(*(scale * value for value in second))}
        found, report = set_ranges(quantized, changed)
        quantizer = found.get_submodule("h").activation_quantizer
        assert float(quantizer.high) == pytest.approx(max(11.0, scale * float(second.high.max())), rel=1e-6)
        assert float(quantizer.low) == 0
        assert [entry.layers for entry in report.done] == ["h", "o"]
    found, report = set_ranges(quantized, {name: known for name, known in moments.items() if name != "act"})
    assert [entry.layers for entry in report.skipped] == ["a", "h"]
    assert not found.get_submodule("h").activation_quantizer.calibrated


def test_moments_of_a_layer_called_twice_follow_from_its_inputs() -> None:
    net = twice(nn.ReLU())
    graph, report = record_moments(net, images(8))
    assert [(entry.layers, entry.note) for entry in report.entries] == [
        ("a", "on 8 images"),
        ("h", "called 2 times"),
        ("o", "on 8 images"),
    ]
    assert output_moments(graph.get_submodule("h")) is None
    moments = propagate(graph)
    expected = net.h.weight[:, :, 0, 0] @ moments["act"].mean + net.h.bias
    torch.testing.assert_close(moments["h"].mean, expected, rtol=1e-12, atol=1e-12)
