"""Counting operations."""

import copy
import math
from collections import Counter
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from classical.layers import QuantizedConv2d
from qconv.energy import (
    count,
    layer_operations,
)


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


# --- weights of 0 ---


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(3, 4, 3, bias=False), (3, 6, 7)),
        (nn.Conv2d(4, 6, (2, 3), stride=(2, 1), groups=2), (4, 6, 7)),
        (nn.Conv1d(3, 4, 3, stride=2), (3, 9)),
        (nn.Linear(5, 3), (2, 5)),
    ],
)
def test_weights_of_zero_make_no_terms(layer: nn.Module, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        layer.weight.mul_(torch.rand(layer.weight.shape, generator=generator) < 0.3)
    matrix = torch.autograd.functional.jacobian(layer, torch.rand(1, *shape))
    counts = count(layer, shape)
    skipping = counts.skipping_zeros()
    assert skipping.total("mac") == int((matrix != 0).sum()) < counts.total("mac")
    assert skipping.skipping_zeros() == skipping
    for kept in ("params", "weight_bits", "units", "activation_bits"):
        assert skipping.total(kept) == counts.total(kept)


def test_zeros_are_those_that_run() -> None:
    def zeros(layer: nn.Module) -> int:
        counts = count(layer, (2, 6, 6))
        return (counts.total("mac") - counts.skipping_zeros().total("mac")) // 16  # each weight is used 4 * 4 times

    torch.manual_seed(0)
    dense = nn.Conv2d(2, 4, 3)
    assert zeros(dense) == 0
    masked = prune.random_unstructured(copy.deepcopy(dense), "weight", amount=18)
    assert zeros(masked) == 18
    ternary = QuantizedConv2d(2, 4, 3, weight="twn", activation="int8")
    assert zeros(ternary) == int((ternary.quantized_weight() == 0).sum()) > 10
    binary = QuantizedConv2d(2, 4, 3, weight="bnn", activation="bnn")
    nn.init.zeros_(binary.weight)
    assert zeros(binary) == 0  # the sign of 0 is +1
    assert zeros(nn.Conv2d(2, 4, 3, device="meta")) == 0  # there are no values to look at


@pytest.mark.parametrize("kind", ["uniq", "seed", "simple"])
def test_bit_operations_without_the_products_of_zeros(kind: str) -> None:
    layer = QuantizedConv2d(3, 5, 2, weight="int4", activation="int8")
    with torch.no_grad():
        layer.weight.view(-1)[::3] = 0
    pruned = float((layer.quantized_weight() == 0).double().mean())
    assert pruned >= 1 / 3
    # Written out for one output, as Hawks et al., arXiv:2102.11289, equation 8, with n inputs: channels times taps.
    n = 3 * 4
    sums = {"uniq": 8 + 4 + math.log2(n), "seed": 8, "simple": 0}[kind]
    expected = 5 * 4 * 4 * n * ((1 - pruned) * 8 * 4 + sums)
    assert count(layer, (3, 5, 5)).bops(kind, skip_zeros=True) == pytest.approx(expected, rel=1e-12)
    assert count(layer, (3, 5, 5)).bops(kind) == pytest.approx(5 * 4 * 4 * n * (32 + sums), rel=1e-12)
