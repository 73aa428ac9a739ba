"""Networks in integers: the codes that every layer reads, beside those of the network that was trained."""

import copy
import os
import pickle
from itertools import pairwise
from typing import Any

import pytest
import torch
from test_integer import IntegersOnly
from test_quantized_layers import sample
from torch import Tensor, fx, nn
from torch.nn import functional as F

from classical import quantize
from classical.data_free import ChannelClip, data_free_quantize
from classical.integer import integer_network
from classical.integer.steps import Encode, Scores
from classical.layers import QuantizedConv2d, QuantizedLinear
from qconv.pretrained import MobileNetV2, imagenet_photos, mobilenet_v2_imagenet

BYTES = ("int8", "int8")


class Block(nn.Module):
    """A residual block whose shortcut is what it is given, or a convolution."""

    def __init__(self, channels: int, wider: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, wider, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(wider)
        self.conv2 = nn.Conv2d(wider, wider, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(wider)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, wider, 1, stride, bias=False), nn.BatchNorm2d(wider))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class Dense(nn.Module):
    """Branches that are concatenated, a shortcut that drops pixels and widens, sums that several layers read."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.left = nn.Conv2d(6, 4, 3, padding=1)
        self.right = nn.Conv2d(6, 5, 1)
        self.both = nn.Conv2d(9, 12, 3, stride=2, padding=1)
        self.last = nn.Conv2d(12, 12, 3, groups=4, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        joined = torch.cat((self.left(x), torch.relu(self.right(x))), 1) / 2
        wide = F.pad(x[:, 1:5, ::2, ::2], (0, 0, 0, 0, 4, 4))
        total = self.both(joined) + wide
        return (total + self.last(total)).mean((2, 3))


def lenet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 5, padding=2),
        nn.MaxPool2d(2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 5, padding=2),
        nn.BatchNorm2d(16),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, stride=2, padding=1),
        nn.Flatten(),
        nn.Linear(16 * 16, 32),
        nn.BatchNorm1d(32),
        nn.ReLU(),
        nn.Dropout(),
        nn.Linear(32, 10),
    )


def residual() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        Block(8, 8, 1),
        Block(8, 16, 2),
        Block(16, 16, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    )


def mobile() -> nn.Module:
    return nn.Sequential(
        nn.ZeroPad2d((0, 1, 0, 1)),
        nn.Conv2d(3, 8, 3, stride=2),
        nn.ReLU6(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        ChannelClip(0.0, torch.linspace(0.5, 3, 8)),
        nn.AvgPool2d(2),
        nn.ZeroPad2d(1),
        nn.Conv2d(8, 16, 3),
        nn.Hardtanh(-0.5, 0.75),
        nn.AvgPool2d(2, stride=1),
        nn.Conv2d(16, 10, 3),
        nn.Flatten(),
    )


def trained_network(build: Any, dtype: torch.dtype, **options: Any) -> tuple[nn.Module, Tensor]:
    """A quantized network that has seen batches, with normalizations of both signs and a dead one."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = quantize(build(), **options).to(dtype)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                nn.init.normal_(module.weight, 0.5)
                nn.init.normal_(module.bias, 0, 0.5)
                with torch.no_grad():
                    module.weight[0] = 0
        x = torch.randn(8, 3, 16, 16, dtype=dtype)
        with torch.no_grad():
            for _ in range(5):
                model(x)
        return model.eval(), torch.randn(12, 3, 16, 16, dtype=dtype)


def layer_codes(model: nn.Module, network: fx.GraphModule, x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """What each layer reads: the codes of the trained network, and those of the integer network."""
    expected: dict[str, Tensor] = {}
    found: dict[str, Tensor] = {}
    handles = []
    for name, layer in model.named_modules():
        if not isinstance(layer, QuantizedConv2d | QuantizedLinear):
            continue
        sums = network.get_submodule(name)

        def trained(layer: Any, inputs: Any, name: str = name) -> None:
            expected[name] = layer.activation_quantizer.integers(inputs[0]).codes

        def integer(sums: Any, inputs: Any, name: str = name) -> None:
            assert inputs[0].dtype == torch.int8
            found[name] = inputs[0].int() + sums.code.shift

        handles += [layer.register_forward_pre_hook(trained), sums.register_forward_pre_hook(integer)]
    with torch.no_grad():
        model(x)
        network(x)
    for handle in handles:
        handle.remove()
    assert expected
    assert expected.keys() == found.keys()
    return {name: (expected[name], found[name]) for name in expected}


class Integers(fx.Interpreter):
    """Runs a network under a mode that refuses real numbers, but for its ends."""

    def run_node(self, n: fx.Node) -> Any:
        module = self.module.get_submodule(str(n.target)) if n.op == "call_module" else None
        if n.op in ("placeholder", "output") or isinstance(module, Encode | Scores):
            return super().run_node(n)
        with IntegersOnly():
            return super().run_node(n)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"weight": "int8_channel_affine"},
    {"weight": "int4", "activation": "int4"},
    {"weight": "twn", "first": BYTES},
    {"weight": "ttq", "activation": "dorefa4", "first": BYTES},
    {"weight": "naq5", "activation": "hwgq2", "first": BYTES, "last": BYTES},
    {"weight": "lq2", "activation": "lsq4", "first": BYTES, "last": BYTES},
    {"weight": "lsq8", "activation": "lsq8", "first": BYTES},
    {"weight": "bnn", "activation": "bnn", "first": BYTES, "last": BYTES},
    {"weight": "rq4", "activation": "rq_st4"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(map(str, options.values())) or "int8")
@pytest.mark.parametrize("build", [lenet, residual, mobile, Dense])
def test_every_layer_reads_the_codes_of_the_trained_network(build: Any, options: dict[str, Any]) -> None:
    model, x = trained_network(build, torch.float64, **options)
    network = integer_network(model, x[:2])
    # In float64 the trained network itself hardly rounds: then all codes agree, layer after layer.
    moved = 0
    for name, (expected, found) in layer_codes(model, network, x).items():
        step = model.get_submodule(name).activation_quantizer.grid.step
        assert (found - expected).abs().max() <= step, name
        moved += int((found != expected).sum())
        assert moved <= 1 + 1e-3 * found.numel(), name  # a tie may be rounded to the other side
    with torch.no_grad():
        expected, output = model(x), network(x)
        assert output.dtype == expected.dtype
        assert (output - expected).abs().max() < (0.05 if moved else 1e-6) * expected.abs().max()
        assert torch.equal(Integers(network).run(x), output)
        assert torch.equal(integer_network(model, x[:2], kernels="torch")(x), output)


@pytest.mark.parametrize("build", [lenet, residual])
def test_float32_networks_agree_but_for_its_rounding(build: Any) -> None:
    model, x = trained_network(build, torch.float32)
    network = integer_network(model, x)
    for name, (expected, found) in layer_codes(model, network, x).items():
        assert (found - expected).abs().max() <= 1, name
        assert (found != expected).double().mean() < 1e-2, name
    assert network(x).dtype == torch.float32


def test_one_level_at_most_for_the_same_inputs() -> None:
    # Each layer alone, fed with the integer network's own codes, and the real function up to the next layer.
    model, x = trained_network(lenet, torch.float64, weight="int8_channel")
    network = integer_network(model, x)
    read = {name: found for name, (_, found) in layer_codes(model, network, x).items()}
    names = list(read)
    for name, following in pairwise(names):
        start, stop = int(name), int(following)
        layer: Any = model.get_submodule(name)
        _, scale, zero = layer.activation_quantizer.integers(x[:1, :1, 0, 0])
        with torch.no_grad():
            real = (read[name] - zero) * scale
            for step in list(model.children())[start:stop]:  # type: ignore[arg-type]
                real = step(real)
        expected = model.get_submodule(following).activation_quantizer.integers(real).codes  # type: ignore[operator]
        assert (read[following] - expected).abs().max() <= 1
        assert len(expected.unique()) > 30


def test_the_networks_are_modules_like_others() -> None:
    model, x = trained_network(residual, torch.float32)
    before = copy.deepcopy(model.state_dict())
    model.train()
    network = integer_network(model, x, threads=2)
    assert model.training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    output = network(x)
    assert torch.equal(network(x[:1]), output[:1])
    assert network(x[:0]).shape == (0, 10)
    assert torch.equal(copy.deepcopy(network)(x), output)
    assert torch.equal(pickle.loads(pickle.dumps(network))(x), output)
    with torch.no_grad():
        model.get_submodule("0").weight.mul_(2)  # type: ignore[operator, union-attr]
    assert torch.equal(network.train()(10 * x), network.eval()(10 * x))  # it learns no range
    assert torch.equal(network(x), output)


def test_codes_go_between_layers_where_one_quantizer_reads_them() -> None:
    model, x = trained_network(lenet, torch.float32)
    network = integer_network(model, x)
    kinds = [node.target for node in network.graph.nodes if node.op == "call_module"]
    # Pooling before batch norm sees accumulators; ReLU vanishes, because the codes that follow begin at 0.
    assert kinds == ["input_1_codes", "0", "1", "_2_codes", "4", "_5_codes", "7", "9", "_10_codes", "13", "scores"]


def test_a_quantized_twin_of_two_calls() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = QuantizedConv2d(3, 3, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(self.conv(x).relu()).flatten(1)

    x = sample(4, 3, 5, 5, dtype=torch.float64)
    model = Twice().double()
    for _ in range(20):
        model(x)
    model.eval()
    torch.testing.assert_close(integer_network(model, x)(x), model(x), rtol=0, atol=0.02)


class Function(nn.Module):
    """One function between two layers."""

    def __init__(self, function: Any, channels: int = 4) -> None:
        super().__init__()
        self.first = QuantizedConv2d(3, 4, 3)
        self.function = function
        self.second = QuantizedConv2d(channels, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.function(self.first(x)))


FUNCTIONS: dict[str, Any] = {
    "method": lambda x: x.relu().contiguous(),
    "max": lambda x: F.max_pool2d(x, 2),
    "overlapping max": lambda x: F.max_pool2d(x, (2, 3), stride=(1, 2), padding=1, dilation=(2, 1), ceil_mode=True),
    "adaptive max": lambda x: F.adaptive_max_pool2d(x.relu(), (3, 2)),
    "average": lambda x: F.avg_pool2d(F.relu6(x), 3, stride=2),
    "adaptive": lambda x: F.adaptive_avg_pool2d(x, (2, 1)),
    "mean": lambda x: x.mean((2, 3), keepdim=True),
    "sum of itself": lambda x: x + F.relu(x),
    "scale": lambda x: 0.25 * x,
    "clamp": lambda x: torch.clamp(x.clamp(max=0.4), -0.3) + F.hardtanh(x, -0.2, max_val=0.15),
    "border": lambda x: F.pad(x, (1, 0, 2, 1)),
    "sum behind a border": lambda x: F.pad(x, (1, 0, 2, 1)) + F.pad(x, (0, 1, 1, 2)),
    "concatenated": lambda x: torch.cat((x, x.relu()), 1)[:, 2:6],
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_between_layers(name: str) -> None:
    x = sample(4, 3, 8, 8, dtype=torch.float64) + 0.5
    model = Function(FUNCTIONS[name]).double()
    model(x)
    model.eval()
    network = integer_network(model, x)
    for expected, found in layer_codes(model, network, x).values():
        assert (expected - found).abs().max() <= 1
        assert (expected != found).double().mean() < 2e-3
    torch.testing.assert_close(network(x), model(x), rtol=0, atol=0.02)


@pytest.mark.parametrize("kernels", ["auto", "torch"])
@pytest.mark.parametrize("size", [12, 28, 32])
@pytest.mark.parametrize("pooling", [nn.MaxPool2d(2), nn.MaxPool2d(3, 2, 1), nn.AdaptiveMaxPool2d((4, 2))])
def test_pooling_of_images_of_any_size(pooling: nn.Module, size: int, kernels: Any) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = (nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), pooling, nn.Conv2d(4, 3, 3, padding=1))
        model = quantize(nn.Sequential(*layers)).double()
        x = torch.rand(3, 1, size, size, dtype=torch.float64)
        model(x)
    model.eval()
    network = integer_network(model, x, kernels=kernels)
    expected, found = layer_codes(model, network, x)["3"]
    assert (expected != found).double().mean() < 1e-3
    assert (expected - found).abs().max() <= 1
    torch.testing.assert_close(network(x), model(x), rtol=0, atol=0.02)


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (torch.sigmoid, "'sigmoid' cannot run in integers: sigmoid has no integer form here"),
        (lambda x: F.interpolate(x, scale_factor=2), "'interpolate' cannot run in integers"),
        (F.leaky_relu, "'leaky_relu' cannot run in integers: leaky has no integer form here"),
        (lambda x: F.avg_pool2d(x, 3, padding=1), "'avg_pool2d' cannot run in integers: average pooling with padding"),
        (lambda x: F.adaptive_avg_pool2d(x, 4), r"windows of different sizes: \(6, 6\) pixels for \(4, 4\)"),
        (lambda x: F.adaptive_max_pool2d(x, 4), r"windows of different sizes: \(6, 6\) pixels for \(4, 4\)"),
        (lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"), "'pad' cannot run in integers: it pads with other than"),
        (lambda x: x + x[:, :1], r"it adds tensors of shapes \(2, 4, 6, 6\) and \(2, 1, 6, 6\): they must be equal"),
        (nn.BatchNorm2d(4, track_running_stats=False), "'function' cannot run in integers: batch norm without running"),
        (nn.Conv2d(4, 4, 1), "'function' cannot run in integers: Conv2d is not quantized: use classical.quantize"),
        (QuantizedConv2d(4, 4, 1, weight="float"), "'function' cannot run in integers: 'float' values have no integer"),
        (QuantizedConv2d(4, 4, 1, activation="xnor"), "'function' cannot run in integers: XNORActivation.* use 'bnn'"),
        (QuantizedConv2d(4, 4, 1, activation="lq2"), "'function' cannot run in integers: the levels of 'lq2' are no"),
        (QuantizedLinear(6, 6), r"'function' cannot run in integers: its input has shape .* but 2 axes are needed"),
        (QuantizedConv2d(4, 4, 1, weight="int16", activation="int16"), "'function' .* int32 accumulator holds"),
    ],
)
def test_what_has_no_integer_form_is_named(function: Any, says: str) -> None:
    x = sample(2, 3, 8, 8)
    model = Function(function)
    if "int16" in str(model):
        with torch.no_grad():
            model.function.weight.fill_(1.0)
    model(x)
    with pytest.raises(ValueError, match=says):
        integer_network(model, x)


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class Two(Function):
    def forward(self, x: Tensor) -> Any:
        y = self.first(x)
        return y, self.second(y)


def test_networks_that_cannot_be_converted() -> None:
    x = sample(2, 3, 8, 8)
    seen, unseen, two = Function(nn.Identity()), Function(nn.Identity()), Two(nn.Identity())
    unseen.first(x)
    seen(x)
    two(x)
    for model, says in (
        (unseen, r"'second' cannot run in integers: .* has seen no range yet: calibrate"),
        (two, "the network returns several tensors: return one"),
        (nn.Sequential(nn.BatchNorm2d(3), seen), "the network's input is read by 0: one quantizer must read it first"),
        (nn.Sequential(nn.Conv2d(3, 4, 1)), r"Sequential has no quantized layers: quantize\(\) turns its layers"),
        (Branching(), r"Branching cannot be traced by torch\.fx .* its forward must not branch on values"),
    ):
        with pytest.raises(ValueError, match=says):
            integer_network(model, x)


def test_pooling_of_features_is_refused() -> None:
    # Its windows would mix channels, each of which has a scale of its own.
    model = nn.Sequential(QuantizedLinear(6, 8, weight="int8_channel"), nn.MaxPool1d(2), QuantizedLinear(4, 2))
    x = sample(3, 6)
    model(x)
    with pytest.raises(ValueError, match=r"'1' cannot run in integers: max pooling of shape \(3, 8\): images of 4"):
        integer_network(model, x)


@pytest.mark.data
def test_mobilenet_in_integers_recognizes_the_same_photos() -> None:
    if not os.environ.get("QCONV_DATA"):
        pytest.skip("QCONV_DATA is not set: no photos to look at")
    photos = MobileNetV2.normalize(imagenet_photos().images[:3]).double()
    model, _ = data_free_quantize(mobilenet_v2_imagenet().double(), input_range=(-1.0, 1.0), images=photos[:2])
    network = integer_network(model, photos[:2])
    with torch.no_grad():
        expected = model(photos)
    assert torch.equal(network(photos).argmax(1), expected.argmax(1))
    for name, (real, found) in layer_codes(model, network, photos[:2]).items():
        assert (real != found).double().mean() < 1e-3, name
