"""Counting operations, pricing them, and measuring energy."""

import copy
import itertools
import math
import pickle
import sys
import time
import types
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from classical.layers import QuantizedConv2d
from qconv.energy import (
    HOROWITZ_45NM,
    Counts,
    Measured,
    Meter,
    Price,
    Row,
    count,
    estimate,
    layer_operations,
    meter,
)

# --- Published figures -----------------------------------------------------------------------------------------------


def conv(*args: int, **kwargs: int) -> nn.Conv2d:
    return nn.Conv2d(*args, bias=False, device="meta", **kwargs)


def dense(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False, device="meta")


def alexnet() -> nn.Module:
    return nn.Sequential(
        *(conv(3, 96, 11, stride=4), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(conv(96, 256, 5, padding=2, groups=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(conv(256, 384, 3, padding=1), nn.ReLU()),
        *(conv(384, 384, 3, padding=1, groups=2), nn.ReLU()),
        *(conv(384, 256, 3, padding=1, groups=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Flatten(), dense(9216, 4096), nn.ReLU(), dense(4096, 4096), nn.ReLU(), dense(4096, 1000)),
    )


def vgg16() -> nn.Module:
    layers: list[nn.Module] = []
    channels = 3
    for width, depth in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(depth):
            layers += [conv(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), dense(25088, 4096), dense(4096, 4096), dense(4096, 1000))


class Bottleneck(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.reduce = conv(inputs, width, 1, stride=stride)  # He et al.'s place for the stride
        self.spatial = conv(width, width, 3, padding=1)
        self.expand = conv(width, 4 * width, 1)
        same = stride == 1 and inputs == 4 * width
        self.shortcut = nn.Sequential() if same else conv(inputs, 4 * width, 1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.expand(F.relu(self.spatial(F.relu(self.reduce(x)))))
        y += self.shortcut(x)
        return F.relu(y)


def resnet50() -> nn.Module:
    blocks: list[nn.Module] = []
    channels = 64
    for width, depth, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for block in range(depth):
            blocks.append(Bottleneck(channels, width, stride if block == 0 else 1))
            channels = 4 * width
    stem = (conv(3, 64, 7, stride=2, padding=3), nn.ReLU(), nn.MaxPool2d(3, 2, padding=1))
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), dense(2048, 1000))


@pytest.mark.parametrize(
    ("model", "size", "conv_macs", "macs", "conv_weights", "weights"),
    [
        (alexnet, 227, 665_784_864, 724_406_816, 2_332_704, 60_954_656),
        (vgg16, 224, 15_346_630_656, 15_470_264_320, 14_710_464, 138_344_128),
        (resnet50, 224, 3_855_925_248, 3_857_973_248, 23_454_912, 25_502_912),
    ],
)
def test_published_networks(
    model: Callable[[], nn.Module], size: int, conv_macs: int, macs: int, conv_weights: int, weights: int
) -> None:
    counts = count(model(), (3, size, size))
    convolutions = Counts(tuple(row for row in counts.rows if row.kind == "Conv2d"))
    assert convolutions.total("mac") == conv_macs
    assert counts.total("mac") == macs
    assert convolutions.params == conv_weights
    assert counts.params == weights
    assert counts.weight_bytes == 4 * weights


def test_separable_convolution_against_the_ordinary_one() -> None:
    ordinary = count(conv(64, 128, 3, padding=1), (64, 56, 56))
    separable = count(nn.Sequential(conv(64, 64, 3, padding=1, groups=64), conv(64, 128, 1)), (64, 56, 56))
    assert (ordinary.total("mac"), ordinary.params, ordinary.total("units")) == (231_211_008, 73_728, 401_408)
    assert (separable.total("mac"), separable.params, separable.total("units")) == (27_496_448, 8_768, 602_112)


def lenet5_caffe() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 20, 5), nn.MaxPool2d(2), nn.Conv2d(20, 50, 5), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, 10)),
    )


def test_lenet5_caffe() -> None:
    counts = count(lenet5_caffe(), (1, 28, 28))
    assert counts.params == 431_080
    assert counts.macs() == {"fp32*fp32": 2_293_000}
    assert counts.activation_bytes == 4 * counts.total("units")


# --- Counting --------------------------------------------------------------------------------------------------------


def terms(layer: nn.Module, shape: tuple[int, ...]) -> int:
    """Products that the outputs of a linear layer add up: the entries of its matrix that are not zero."""
    for parameter in layer.parameters():
        nn.init.ones_(parameter)
    matrix = torch.autograd.functional.jacobian(layer, torch.rand(1, *shape))
    return int((matrix != 0).sum())


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(3, 4, 3, bias=False), (3, 6, 7)),
        (nn.Conv2d(4, 6, (2, 3), stride=(2, 1), groups=2), (4, 6, 7)),
        (nn.Conv2d(2, 2, 3, dilation=2, groups=2), (2, 7, 7)),
        (nn.Conv1d(3, 4, 3, stride=2), (3, 9)),
        (nn.Linear(5, 3), (5,)),
        (nn.Linear(5, 3), (2, 5)),
    ],
)
def test_multiply_accumulates_are_the_terms_of_the_linear_map(layer: nn.Module, shape: tuple[int, ...]) -> None:
    counts = count(layer, shape)
    assert counts.total("mac") == terms(layer, shape)
    assert counts.params == sum(parameter.numel() for parameter in layer.parameters())


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.AvgPool2d(2), (3, 6, 6)),
        (nn.AvgPool2d((3, 2), stride=1), (1, 5, 6)),
        (nn.AvgPool1d(3), (2, 9)),
        (nn.AdaptiveAvgPool2d((2, 3)), (2, 5, 7)),
        (nn.AdaptiveAvgPool2d(1), (4, 3, 3)),
        (nn.AdaptiveAvgPool1d(2), (2, 5)),
    ],
)
def test_averages_add_what_they_read_and_scale_once(layer: nn.Module, shape: tuple[int, ...]) -> None:
    counts = count(layer, shape)
    units = math.prod(counts.rows[0].output_shape)
    assert counts.total("add") == terms(layer, shape) - units
    assert counts.total("mul") == units


@pytest.mark.parametrize(
    ("layer", "cost"),
    [
        (nn.ReLU(), {"cmp:fp32": 48}),
        (nn.ReLU6(), {"cmp:fp32": 96}),
        (nn.LeakyReLU(), {"cmp:fp32": 48, "mul:fp32": 48}),
        (nn.BatchNorm2d(3), {"mul:fp32": 48, "add:fp32": 48, "params": 6, "weight_bits": 192}),
        (nn.MaxPool2d(2), {"cmp:fp32": 3 * 12}),
        (nn.Sigmoid(), {"mul:fp32": 14 * 48, "add:fp32": 13 * 48}),
        (nn.Tanh(), {"mul:fp32": 16 * 48, "add:fp32": 14 * 48}),
        # Of each of 12 rows of 4: largest (3 comparisons), differences (4), exp (10 + 10), sum (3), reciprocal (4 + 2).
        (nn.Softmax(-1), {"cmp:fp32": 12 * 3, "mul:fp32": 12 * (40 + 4 + 4), "add:fp32": 12 * (4 + 40 + 3 + 2)}),
    ],
)
def test_other_layers(layer: nn.Module, cost: dict[str, int]) -> None:
    counts = count(layer, (3, 4, 4))
    units = math.prod(counts.rows[0].output_shape)
    assert counts.operations == {**cost, "units": units, "activation_bits": 32 * units}


@pytest.mark.parametrize("layer", [nn.Flatten(), nn.Dropout(), nn.Identity()])
def test_layers_without_arithmetic_have_a_row_that_costs_nothing(layer: nn.Module) -> None:
    assert [(row.kind, row.operations) for row in count(layer, (2, 3)).rows] == [(type(layer).__name__, {})]


@pytest.mark.parametrize(
    ("dtype", "number", "bits"),
    [(torch.float64, "fp64", 64), (torch.float16, "fp16", 16), (torch.bfloat16, "fp16", 16)],
)
def test_formats_follow_the_dtype(dtype: torch.dtype, number: str, bits: int) -> None:
    counts = count(nn.Sequential(nn.Linear(4, 2), nn.ReLU()).to(dtype), (4,))
    assert counts.macs() == {f"{number}*{number}": 8}
    assert counts.total(f"cmp:{number}") == 2
    assert counts.total("weight_bits") == 10 * bits


class Repeated(nn.Module):
    """Hands on one channel twice; costs nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, x[:, :1]], 1)

    def counts(self, input_shape: tuple[int, ...]) -> Counter[str]:
        return Counter()


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout()

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(x), 2)
        x = torch.cat([x, F.pad(x[:, :1], (0, 0, 0, 0), mode="replicate")], 1)
        x = F.adaptive_avg_pool2d(F.avg_pool2d(F.relu6(x), 2), (1, 2))
        return torch.softmax(torch.tanh(self.dropout(x).flatten(1)), 1)


def test_functions_between_layers_cost_what_the_modules_cost() -> None:
    modules = nn.Sequential(
        *(nn.ReLU(), nn.MaxPool2d(2), Repeated(), nn.ReLU6(), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d((1, 2))),
        *(nn.Flatten(), nn.Tanh(), nn.Softmax(1)),
    )
    assert count(Functional(), (2, 12, 12)).operations == count(modules, (2, 12, 12)).operations


class Arithmetic(nn.Module):
    """Functions of tensors around a layer, and weights of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.layer = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x) * self.scale
        y += x
        y = (1 - y) / 2
        return (y / x).mean(1) + y.sum(1) - y.amax(1)


def test_arithmetic_between_layers() -> None:
    counts = count(nn.Sequential(Arithmetic()), (4, 3))
    rows = [
        (row.name, {k: n for k, n in row.operations.items() if k[:3] in ("mul", "add", "cmp")}) for row in counts.rows
    ]
    assert rows == [
        ("0", {}),
        ("0.layer", {}),
        ("0.mul", {"mul:fp32": 12}),
        ("0.add", {"add:fp32": 12}),
        ("0.rsub", {"add:fp32": 12}),
        ("0.div", {"mul:fp32": 12}),
        ("0.div", {"mul:fp32": 60, "add:fp32": 24}),
        ("0.mean", {"mul:fp32": 3, "add:fp32": 9}),
        ("0.sum", {"add:fp32": 9}),
        ("0.add", {"add:fp32": 3}),
        ("0.amax", {"cmp:fp32": 9}),
        ("0.sub", {"add:fp32": 3}),
    ]
    assert (counts.params, counts.weight_bytes) == (3, 12)
    assert counts.rows[0].kind == "Arithmetic"


def test_a_layer_used_twice_computes_twice_and_is_stored_once() -> None:
    layer = nn.Linear(4, 4)
    counts = count(nn.Sequential(layer, nn.ReLU(), layer), (4,))
    assert [row.name for row in counts.rows] == ["0", "1", "0"]
    assert (counts.total("mac"), counts.params, counts.total("weight_bits")) == (32, 20, 640)


def test_tied_weights_are_stored_once() -> None:
    first, second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    second.weight = first.weight
    counts = count(nn.Sequential(first, second), (4,))
    assert (counts.total("mac"), counts.params) == (32, 16)


class Stored(nn.Module):
    """Keeps its weights in buffers."""

    def __init__(self, amount: int = 1) -> None:
        super().__init__()
        self.amount = amount

    def forward(self, x: Tensor) -> Tensor:
        return x.sin()  # has no rule: only counts() can say what it costs

    def counts(self, input_shape: tuple[int, ...]) -> Counter[str]:
        return Counter(
            {"mac:ternary*int8": math.prod(input_shape), "params": 7, "add:int32": 0, "cmp:fp32": self.amount}
        )


class Folding(nn.Module):
    """Runs its layer on every row of the image as on a sample."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x.flatten(0, 2))
        return y.reshape(x.shape)


def test_a_layer_is_asked_and_zeros_left_out() -> None:
    layer = Stored()
    counts = count(nn.Sequential(layer, layer), (2, 3))
    assert counts.rows[0].operations == {"mac:ternary*int8": 6, "params": 7, "cmp:fp32": 1}
    assert counts.rows[1].operations == {"mac:ternary*int8": 6, "cmp:fp32": 1}


def test_samples_folded_into_the_batch_axis_all_count() -> None:
    asked = count(Folding(Stored()), (1, 5, 4))
    assert asked.operations == {"mac:ternary*int8": 20, "cmp:fp32": 5, "params": 7}
    assert count(Folding(nn.Linear(4, 4)), (1, 5, 4)).total("mac") == 5 * 16


def test_quantized_layers_are_asked() -> None:
    layer = QuantizedConv2d(1, 4, 3, weight="twn", activation="int8")
    counts = count(nn.Sequential(layer, nn.ReLU()), (1, 8, 8))
    assert counts.rows[0].operations == layer.counts((1, 8, 8))
    assert counts.macs() == {"ternary*int8": 4 * 36 * 9}


@pytest.mark.parametrize(
    ("counted", "message"),
    [
        ({"macs": 3}, "unknown kind of operation 'macs': did you mean 'mac'"),
        ({"mac:fp32*fp32": -3}, r'layer "0" \(Stored\) counts -3 of mac:fp32\*fp32'),
    ],
)
def test_layers_that_count_nonsense(counted: dict[str, int], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Stored, "counts", lambda self, shape: Counter(counted))
    with pytest.raises(ValueError, match=message):
        count(nn.Sequential(Stored()), (2,))


class Unknown(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


def test_an_unknown_layer_is_an_error_that_says_what_to_do() -> None:
    message = r'layer "1\.0" \(Unknown\): the cost of layer Unknown is unknown: give the class a method counts'
    with pytest.raises(ValueError, match=message):
        count(nn.Sequential(nn.ReLU(), nn.Sequential(Unknown())), (2,))


def test_an_unknown_layer_that_never_runs_costs_nothing() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.loss = nn.ReLU(), nn.CrossEntropyLoss()

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.body(x)
            return y

    assert [row.name for row in count(Net(), (2,)).rows] == ["body"]


def test_a_rule_can_be_registered() -> None:
    class Foreign(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sin()

    @layer_operations.register
    def _(layer: Foreign, inputs: Tensor, outputs: Tensor) -> Counter[str]:
        return Counter({"mul:fp32": outputs.numel()})

    assert count(Foreign(), (3,)).operations == {"mul:fp32": 3}


def test_a_subclass_with_its_own_forward_is_another_layer() -> None:
    class Renamed(nn.Linear):
        pass

    class Signed(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight.sign())

    assert count(Renamed(4, 2), (4,)).total("mac") == 8
    with pytest.raises(ValueError, match="cost of layer Signed is unknown"):
        count(Signed(4, 2), (4,))


@pytest.mark.parametrize("function", [torch.sin, lambda x: x @ x.T, lambda x: F.conv1d(x[None], x[None])])
def test_an_unknown_function_between_layers_is_an_error(function: Callable[[Tensor], Tensor]) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return function(self.body(x))

    with pytest.raises(ValueError, match=r'in "0": the cost of the function aten::\w+.* is unknown'):
        count(nn.Sequential(Net()), (4,))


def test_batch_norm_without_statistics_has_no_cost_for_one_sample() -> None:
    with pytest.raises(ValueError, match="track_running_stats=True"):
        count(nn.BatchNorm2d(2, track_running_stats=False), (2, 3, 3))


@pytest.mark.parametrize("size", [(), (1, 0, 28), (1, -1, 28), (1, 28.0, 28)])
def test_input_size_is_a_shape(size: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="input_size is the shape of one sample"):
        count(nn.ReLU(), size)


def test_an_input_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"cannot run on one sample of shape \(2, 8, 8\): .*expected.* 1 channels"):
        count(nn.Conv2d(1, 2, 3), (2, 8, 8))


class Stateful(nn.Module):
    """Changes all it can when it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.register_buffer("seen", torch.zeros(()))
        self.generator = torch.Generator().manual_seed(5)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen += 1
        self.weight.data.mul_(2)
        return x + torch.rand(()) + torch.rand((), generator=self.generator)

    def counts(self, input_shape: tuple[int, ...]) -> Counter[str]:
        torch.rand(3)
        return Counter({"add:fp32": 2})


def test_the_model_and_the_random_state_stay_as_they_are() -> None:
    stateful = Stateful()
    model = nn.Sequential(stateful, nn.BatchNorm1d(2), nn.Sequential(nn.Dropout(), nn.Linear(2, 2)).eval()).train()
    model[2].eval()
    state = copy.deepcopy(model.state_dict())
    flags = [module.training for module in model.modules()]
    random, own = torch.get_rng_state(), stateful.generator.get_state()
    counts = count(model, (2,))
    assert counts.rows[0].operations == {"add:fp32": 2}
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(stateful.generator.get_state(), own)
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert stateful.calls == 0
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.is_grad_enabled()


def test_pruned_and_parametrized_layers() -> None:
    pruned, ties = nn.Linear(4, 3), nn.Linear(4, 4)
    prune.l1_unstructured(pruned, "weight", amount=0.5)
    parametrize.register_parametrization(ties, "weight", nn.Identity())
    counts = count(nn.Sequential(ties, pruned), (4,))
    assert [row.operations["mac:fp32*fp32"] for row in counts.rows] == [16, 12]
    assert counts.params == 20 + 15


def test_lazy_layers_stay_lazy() -> None:
    lazy = nn.LazyLinear(3)
    assert count(lazy, (4,)).total("mac") == 12
    assert isinstance(lazy.weight, nn.UninitializedParameter)


# --- Counts ----------------------------------------------------------------------------------------------------------


def quantized_row(weight: str, activation: str) -> Counts:
    """One output pixel of a 3x3 convolution from 64 to 128 channels."""
    macs = {f"mac:{weight}*{activation}": 128 * 576, "units": 128}
    return Counts((Row("conv", "Conv2d", (64, 3, 3), (128, 1, 1), Counter(macs)),))


def test_bit_operations_by_each_formula() -> None:
    counts = quantized_row("int4", "int8")
    assert round(counts.bops("uniq")) == 3_920_112
    assert counts.bops("seed") == 2_949_120
    assert counts.bops("simple") == 2_359_296


def test_bit_operations_follow_the_formats() -> None:
    assert quantized_row("ternary", "binary").bops("simple") == 73_728 * 2
    assert quantized_row("fp16", "fp32").bops("simple") == 73_728 * 512
    real = count(conv(64, 128, 3), (64, 3, 3))
    assert real.bops() == pytest.approx(73_728 * (32 * 32 + 64 + math.log2(576)))
    with pytest.raises(ValueError, match="unknown way to count bit operations 'uniqq': did you mean 'uniq'"):
        real.bops("uniqq")
    with pytest.raises(ValueError, match='"int" is no number format'):
        quantized_row("int", "int8").bops()


def test_totals_by_key_and_beginning() -> None:
    ops = {
        "mac:int8*int8": 5,
        "mac:int8*int16": 7,
        "mac:fp32*fp32": 11,
        "add:int8": 13,
        "weight_bits": 9,
        "device:shots": 3,
    }
    counts = Counts((Row("a", "A", (1,), (1,), Counter(ops)), Row("b", "B", (1,), (1,), Counter({"add:int8": 1}))))
    expected = {"mac": 23, "mac:int8": 12, "mac:int8*int8": 5, "add": 14, "mul": 0, "params": 0, "device:shots": 3}
    assert {key: counts.total(key) for key in expected} == expected
    assert counts.macs() == {"int8*int8": 5, "int8*int16": 7, "fp32*fp32": 11}
    assert counts.weight_bytes == 2
    with pytest.raises(ValueError, match="unknown kind of operation 'parms': did you mean 'params'"):
        counts.total("parms")


def test_table_as_text() -> None:
    counts = count(lenet5_caffe(), (1, 28, 28))
    lines = str(counts).splitlines()
    assert lines[0].split()[:4] == ["layer", "kind", "input", "output"]
    assert lines[3].split() == ["2", "Conv2d", "20x12x12", "50x8x8", "1,600,000", "0", "25,050", "100,200", "12,800"]
    assert lines[9].split()[:2] == ["total", "2,293,000"]
    assert lines[10] == "2,293,000 mac:fp32*fp32"
    assert not any(line.endswith(" ") for line in lines)


# --- Prices ----------------------------------------------------------------------------------------------------------


def picojoules(key: str) -> tuple[float, float, float]:
    price = HOROWITZ_45NM[key]
    return tuple(round(joules * 1e12, 9) for joules in (price.low, price.typical, price.high))  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("add:int8", (0.03, 0.03, 0.03)),
        ("add:int32", (0.1, 0.1, 0.1)),
        ("add:fp16", (0.4, 0.4, 0.4)),
        ("mul:int32", (3.1, 3.1, 3.1)),
        ("mul:fp32", (3.7, 3.7, 3.7)),
        ("mac:fp32*fp32", (4.6, 4.6, 4.6)),
        ("mac:fp16*fp16", (1.5, 1.5, 2.0)),
        ("mac:int8*int8", (0.23, 0.3, 0.3)),
        ("mac:ternary*int8", (0.03, 0.1, 0.1)),
        ("mac:int8*binary", (0.03, 0.1, 0.1)),
        ("mac:ternary*fp32", (0.9, 0.9, 0.9)),
        ("mac:fp32*binary", (0.9, 0.9, 0.9)),
        ("mac:int8*fp32", (4.6, 4.6, 4.6)),
        # (n / 8)^2 from 8 bits; (n / 32)^2 from 32 bits is lower, n / 8 is higher.
        ("mul:int4", (3.1 / 64, 0.05, 0.1)),
        ("mul:int16", (3.1 / 4, 0.8, 0.8)),
        ("add:int4", (0.0125, 0.015, 0.03)),
        ("add:int12", (0.0375, 0.04, 0.045)),
        # A 1-bit product and a 1-bit sum; high without a counting tree.
        ("mac:binary*binary", (3.1 / 1024 + 0.1 / 32, 0.2 / 64 + 0.03 / 8, 0.2 / 8 + 0.1)),
        ("weight_bits", (10 / 64, 100 / 64, 2600 / 64)),
        ("activation_bits", (10 / 64, 2 * 20 / 64, 2 * 2600 / 64)),
    ],
)
def test_prices(key: str, expected: tuple[float, float, float]) -> None:
    assert picojoules(key) == pytest.approx(expected, rel=1e-6)
    assert "Horowitz" in HOROWITZ_45NM[key].source


def test_wider_numbers_never_cost_less() -> None:
    for operation in ("add:int{}", "mul:int{}", "cmp:int{}", "mac:int{0}*int{0}"):
        prices = [picojoules(operation.format(bits)) for bits in range(2, 33)]
        for narrow, wide in itertools.pairwise(prices):
            assert all(a <= b for a, b in zip(narrow, wide, strict=True)), operation
    kinds = ("binary*binary", "ternary*ternary", "ternary*int8", "int8*int8", "fp16*fp16", "fp32*fp32", "fp64*fp64")
    typical = [HOROWITZ_45NM[f"mac:{kind}"].typical for kind in kinds]
    assert typical == sorted(typical)


def test_every_price_has_a_source() -> None:
    assert all("ISSCC 2014" in price.source for price in HOROWITZ_45NM.prices.values())


@pytest.mark.parametrize("values", [(2.0, 1.0, 3.0), (0.0, 2.0, 1.0), (-1.0, 0.0, 1.0), (0.0, 0.0, math.nan)])
def test_a_price_is_an_ordered_range(values: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match="0 <= low <= typical <= high"):
        Price(*values, "nowhere")


def one_row(**operations: int) -> Counts:
    return Counts((Row("layer", "Layer", (1,), (1,), Counter(operations)),))


@pytest.mark.parametrize("key", ["mac:fp8*fp8", "sqrt:fp32"])
def test_an_operation_without_a_price_is_named(key: str) -> None:
    counts = one_row(**{key: 4})
    with pytest.raises(KeyError, match=f"{key.replace('*', '.')}.* has no price in .*Horowitz 45 nm.*with_prices"):
        estimate(counts)
    extended = HOROWITZ_45NM.with_prices({key: Price(1.0, 2.0, 3.0, "mine")})
    found = estimate(counts, extended)
    assert (found.low, found.joules, found.high) == (4.0, 8.0, 12.0)
    assert key not in HOROWITZ_45NM.prices


def test_what_a_quantum_device_would_run_has_no_joules() -> None:
    device = {
        "device:circuits": 9,
        "device:gates_1q": 9,
        "device:gates_2q": 9,
        "device:shots": 9,
        "params": 3,
        "units": 3,
    }
    assert estimate(one_row(**device)).high == 0
    assert estimate(one_row(**device, **{"add:fp32": 1})).joules == pytest.approx(0.9e-12)


def test_lenet5_caffe_in_microjoules() -> None:
    real = count(lenet5_caffe(), (1, 28, 28))
    found = estimate(real)
    assert found.compute.typical == pytest.approx(10.55e-6, rel=1e-3)
    integers = estimate(one_row(**{"mac:int8*int8": real.total("mac")}))
    assert (integers.low, integers.joules) == (pytest.approx(0.527e-6, rel=1e-3), pytest.approx(0.688e-6, rel=1e-3))
    weights = estimate(one_row(weight_bits=real.total("weight_bits")))
    assert weights.high == pytest.approx(560e-6, rel=1e-3)


def test_an_estimate_adds_up() -> None:
    found = estimate(count(lenet5_caffe(), (1, 28, 28)))
    assert found.low < found.joules < found.high
    assert found.joules == pytest.approx(found.compute.typical + found.memory.typical)
    assert found.high == pytest.approx(found.compute.high + found.memory.high)
    assert found.memory.typical == pytest.approx(sum(layer.memory.typical for layer in found.per_layer))
    assert [layer.kind for layer in found.per_layer][:2] == ["Conv2d", "MaxPool2d"]
    assert found.per_layer[0].compute.typical == pytest.approx(288_000 * 4.6e-12)
    assert str(found).startswith(f"{found.joules * 1e6:.4g} uJ an inference")
    assert str(found).endswith("modeled for Horowitz 45 nm")


def test_counts_and_estimates_can_be_sent_to_other_processes() -> None:
    counts = count(lenet5_caffe(), (1, 28, 28))
    found = estimate(counts)
    assert pickle.loads(pickle.dumps((counts, found, HOROWITZ_45NM))) == (counts, found, HOROWITZ_45NM)


def test_modeled_and_measured_joules_do_not_add() -> None:
    modeled, measured = estimate(one_row(**{"add:fp32": 1})), Measured(1.0, 2.0, "CPU")
    for a, b in ((modeled, measured), (measured, modeled), (modeled, modeled), (measured, measured)):
        with pytest.raises(TypeError, match="unsupported operand"):
            a + b  # type: ignore[operator]


# --- Measuring -------------------------------------------------------------------------------------------------------


SPAN = 1_000_000  # uJ at which the fake counters wrap


def zone(powercap: Path, folder: str, name: str, energy: int) -> Path:
    path = powercap / folder
    path.mkdir(parents=True)
    (path / "name").write_text(f"{name}\n")
    (path / "max_energy_range_uj").write_text(f"{SPAN}\n")
    (path / "energy_uj").write_text(f"{energy}\n")
    return path / "energy_uj"


@pytest.fixture(autouse=True)
def _without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)


def test_joules_of_packages_and_memory_with_wraparound(tmp_path: Path) -> None:
    package = zone(tmp_path, "intel-rapl:0", "package-0", 100)
    other = zone(tmp_path, "intel-rapl:1", "package-1", SPAN - 50)
    memory = zone(tmp_path, "intel-rapl:0:1", "dram", 7)
    # Parts of a package, and of the whole machine: counted already.
    inside = [zone(tmp_path, "intel-rapl:0:0", "core", 0), zone(tmp_path, "intel-rapl:2", "psys", 0)]
    again = zone(tmp_path, "intel-rapl-mmio:0", "package-0", 0)
    with Meter(tmp_path) as running:
        package.write_text("600")
        other.write_text("20")
        memory.write_text("10")
        for path in (*inside, again):
            path.write_text("999")
        time.sleep(0.01)
    measured = running.measured
    assert measured.joules == pytest.approx((500 + 70 + 3) * 1e-6)
    assert 0.01 <= measured.seconds < 5
    assert "CPU by RAPL (package-0, dram, package-1)" in measured.scope
    assert "GPU not measured: pynvml is not installed" in measured.scope


def test_a_counter_that_wraps_twice_is_read_in_between(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meter, "_READ_EVERY", 0.001)
    reads: list[int] = []
    original = meter._read_count

    def read(path: Path) -> int:
        value = original(path)
        reads.append(value)
        return value

    monkeypatch.setattr(meter, "_read_count", read)
    path = zone(tmp_path, "intel-rapl:0", "package-0", 500_000)
    with Meter(tmp_path) as running:
        for value in (400_000, 300_000):
            # Replaced, not rewritten, so that the reader never sees an empty file.
            fresh = tmp_path / "fresh"
            fresh.write_text(str(value))
            fresh.replace(path)
            until = time.monotonic() + 10
            while value not in reads:
                assert time.monotonic() < until, "the counter was not read in the background"
                time.sleep(0.001)
    assert running.measured.joules == pytest.approx(1.8)


def test_without_counters_there_are_no_joules_and_a_reason(tmp_path: Path) -> None:
    with Meter(tmp_path / "none") as running:
        pass
    assert running.measured.joules is None
    assert running.measured.seconds >= 0
    assert "CPU not measured: no RAPL package counter" in running.measured.scope


def test_a_counter_for_root_only_gives_no_joules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zone(tmp_path, "intel-rapl:0", "package-0", 100)

    def refuse(path: Path) -> int:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(meter, "_read_count", refuse)
    with Meter(tmp_path) as running:
        pass
    assert running.measured.joules is None
    assert "may not be read by this user" in running.measured.scope


def test_a_counter_that_vanishes_gives_no_joules(tmp_path: Path) -> None:
    package = zone(tmp_path, "intel-rapl:0", "package-0", 100)
    with Meter(tmp_path) as running:
        package.unlink()
    assert running.measured.joules is None
    assert "an energy counter failed during the measurement" in running.measured.scope


def test_a_malformed_counter_gives_no_joules(tmp_path: Path) -> None:
    zone(tmp_path, "intel-rapl:0", "package-0", 100).write_text("soon")
    with Meter(tmp_path) as running:
        pass
    assert running.measured.joules is None
    assert "CPU not measured: invalid literal" in running.measured.scope


def test_the_measurement_is_there_after_the_block_also_if_it_failed(tmp_path: Path) -> None:
    running = Meter(tmp_path)
    with pytest.raises(KeyError), running:  # noqa: PT012
        with pytest.raises(ValueError, match="has not ended"):
            _ = running.measured
        raise KeyError
    assert running.measured.joules is None


class FakeNVML(types.ModuleType):
    """Two GPUs by the names of pynvml."""

    class NVMLError(Exception):
        pass

    def __init__(self) -> None:
        super().__init__("pynvml")
        self.millijoules = {"gpu0": 5000, "gpu1": 100}
        self.fails = False

    def nvmlInit(self) -> None:
        if self.fails:
            raise self.NVMLError("Driver Not Loaded")

    def nvmlDeviceGetCount(self) -> int:
        return len(self.millijoules)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        return f"gpu{index}"

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        if self.fails:
            raise self.NVMLError("GPU is lost")
        return self.millijoules[handle]


def test_gpu_energy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakeNVML()
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    package = zone(tmp_path, "intel-rapl:0", "package-0", 0)
    with Meter(tmp_path) as both:
        nvml.millijoules = {"gpu0": 7000, "gpu1": 150}
        package.write_text("500000")
    assert both.measured.joules == pytest.approx(2.05 + 0.5)
    with Meter(tmp_path / "none") as gpu:
        nvml.millijoules["gpu1"] = 151
    assert gpu.measured.joules == pytest.approx(0.001)
    assert "CPU not measured" in gpu.measured.scope
    assert "GPU by NVML (2 NVIDIA)" in gpu.measured.scope


def test_gpu_counters_that_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakeNVML()
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    with Meter(tmp_path) as lost:
        nvml.fails = True
    assert lost.measured.joules is None
    assert "GPU is lost" in lost.measured.scope
    with Meter(tmp_path) as absent:
        nvml.fails = False
    assert "GPU not measured: Driver Not Loaded" in absent.measured.scope
    with Meter(tmp_path) as reset:
        nvml.millijoules["gpu0"] = 0
    assert reset.measured.joules is None
    assert "fell from 5000 to 0" in reset.measured.scope
