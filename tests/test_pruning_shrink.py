"""Smaller models: equal outputs on random networks, what goes and what must stay, and why."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune as torch_prune

from classical.pruning import keep_zeros, prune, shrink, shrink_plan, sparsity
from qconv.energy import count


def sample(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def settle(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw every parameter and statistic, so that no bias or scale is special; in eval() and float64."""
    generator = torch.Generator().manual_seed(seed)
    model.double().eval()
    with torch.no_grad():
        for module in model.modules():
            for name, value in [*module._parameters.items(), *module._buffers.items()]:
                if value is not None and value.is_floating_point():
                    noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
                    value.copy_(noise.abs() + 0.3 if name == "running_var" else 0.5 * noise)
    return model


def check(model: nn.Module, x: Tensor, tolerance: float = 1e-12) -> nn.Module:
    """Shrink, compare, and see that the plan says what happens."""
    with torch.no_grad():
        before = model(x)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    small, plan = shrink(model, x), shrink_plan(model, x)
    scale = max(1.0, float(before.abs().max()))
    torch.testing.assert_close(small(x), before, rtol=0, atol=tolerance * scale)
    torch.testing.assert_close(small(x[:1]), before[:1], rtol=0, atol=tolerance * scale)
    for row in plan.rows:
        weight = small.get_submodule(row.name).weight
        assert weight.shape[0] == row.outputs[1]
        assert weight.shape[1] in (row.inputs[1], 1)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    return small


# --- random networks ---


class Block(nn.Module):
    """One step of a random network; `kind` says what its forward does."""

    def __init__(self, kind: str, c: int, draw: Any) -> None:
        super().__init__()
        self.kind = kind
        self.channels = c
        if kind in ("conv", "function"):
            self.channels = draw(st.integers(1, 5))
            k, padding = draw(st.sampled_from([(1, 0), (1, 0), (3, 1), (3, 0), (2, 1)]))
            mode = draw(st.sampled_from(["zeros", "zeros", "circular", "replicate"]))
            self.conv = nn.Conv2d(c, self.channels, k, padding=padding, bias=draw(st.booleans()), padding_mode=mode)
        elif kind == "depthwise":
            self.channels = c * draw(st.integers(1, 2))
            self.conv = nn.Conv2d(c, self.channels, 3, padding=draw(st.integers(0, 1)), groups=c)
        elif kind == "grouped":
            self.conv = nn.Conv2d(c, 2 * c, 1, groups=c if c % 2 else 2)
            self.channels = 2 * c
        elif kind == "norm":
            self.layer = nn.BatchNorm2d(c, affine=draw(st.booleans()))
        elif kind == "activation":
            made = (nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6(), nn.GELU(), nn.Sigmoid(), nn.PReLU(c), nn.PReLU())
            self.layer = draw(st.sampled_from(made))
        elif kind == "pool":
            made = (
                nn.MaxPool2d(2, 1, padding=1),
                nn.AvgPool2d(2, 1, padding=1),
                nn.AvgPool2d(2, 1, padding=1, count_include_pad=False),
                nn.AvgPool2d(2, 1, ceil_mode=True),
                nn.AdaptiveAvgPool2d(3),
                nn.Dropout2d(),
            )
            self.layer = draw(st.sampled_from(made))
        elif kind == "residual":
            self.conv, self.norm = nn.Conv2d(c, c, 3, padding=1, bias=False), nn.BatchNorm2d(c)
        elif kind == "gate":
            self.conv = nn.Conv2d(c, c, 1)
        elif kind == "concatenation":
            self.conv = nn.Conv2d(c, 2, 1)
            self.channels = c + 2

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "function":
            return F.avg_pool2d(F.relu(self.conv(x)), 2, stride=1, padding=1)
        if self.kind == "residual":
            return torch.relu(x + self.norm(self.conv(x)))
        if self.kind == "gate":
            return x * torch.sigmoid(self.conv(x.mean((2, 3), keepdim=True)))
        if self.kind == "concatenation":
            return torch.cat([x, self.conv(x)], 1)
        return self.layer(x) if hasattr(self, "layer") else self.conv(x)


KINDS = ("conv", "function", "depthwise", "grouped", "norm", "activation", "pool", "residual", "gate", "concatenation")


class Random(nn.Module):
    def __init__(self, draw: Any) -> None:
        super().__init__()
        channels, size = 2, 8
        blocks: list[nn.Module] = []
        for kind in ["conv", *draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=7))]:
            block = Block(kind, channels, draw)
            padded = kind not in ("conv", "function", "depthwise") or block.conv.padding != (0, 0)
            if size >= 4 or padded or block.conv.kernel_size == (1, 1):
                blocks.append(block)
                channels = block.channels
                size = nn.Sequential(*blocks).eval()(torch.zeros(1, 2, 8, 8)).shape[-1]
        self.blocks = nn.Sequential(*blocks)
        self.hidden = nn.Linear(channels * size**2, 4)
        self.head = nn.Linear(4, 3)
        self.flat = draw(st.sampled_from(["flatten", "view", "torch"]))

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(x)
        if self.flat == "view":
            x = x.view(x.size(0), -1)
        else:
            x = x.flatten(1) if self.flat == "flatten" else torch.flatten(x, start_dim=1)
        return self.head(F.relu(self.hidden(x)))


@st.composite
def pruned(draw: st.DrawFn) -> nn.Module:
    """A random network with random filters and channels pruned, some of its biases zero."""
    model = settle(Random(draw), draw(st.integers(0, 99)))
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            structure = draw(st.sampled_from(["filter", "filter", "channel", "weight"]))
            prune(model, {name: draw(st.sampled_from([0.0, 0.4, 0.7, 1.0]))}, structure=structure)
            if module.bias is not None and draw(st.booleans()):
                nn.init.zeros_(module.bias)
    return model


@settings(max_examples=60)
@given(pruned())
def test_random_networks_give_the_same_outputs(model: nn.Module) -> None:
    check(model, sample(3, 2, 8, 8))


# --- what goes ---


def chain(padding: int = 0, activation: nn.Module | None = None) -> nn.Sequential:
    made = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=padding),
        nn.BatchNorm2d(8),
        activation or nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 6, 3, padding=padding),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(6 * (9 if padding == 0 else 36), 10),
        nn.ReLU(),
        nn.Linear(10, 4),
    )
    settle(made)
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_chain_without_padding_loses_every_pruned_filter(dtype: torch.dtype) -> None:
    model = chain().to(dtype)
    prune(model, {"0": 0.5, "4": 0.5, "7": 0.3}, structure="filter")
    small = check(model, sample(2, 1, 12, 12, dtype=dtype), 1e-12 if dtype == torch.float64 else 1e-6)
    assert [small[i].weight.shape for i in (0, 4, 7, 9)] == [(4, 1, 3, 3), (3, 4, 3, 3), (7, 27), (4, 7)]
    assert small[1].num_features == len(small[1].running_mean) == 4
    assert type(small) is nn.Sequential
    assert not any("parametrizations" in name for name in small.state_dict())
    if dtype == torch.float64:  # (the count knows prices of 32-bit numbers)
        return
    before, after = count(model, (1, 12, 12)).macs().total(), count(small, (1, 12, 12)).macs().total()
    assert before == 100 * 8 * 9 + 9 * 6 * 72 + 54 * 10 + 40
    assert after == 100 * 4 * 9 + 9 * 3 * 36 + 27 * 7 + 28


def test_channels_that_nothing_reads_go_with_their_filters() -> None:
    model = chain(padding=1)
    prune(model, {"4": 0.5}, structure="channel")
    prune(model, {"9": 0.4}, structure="channel")
    small = check(model, sample(2, 1, 12, 12))
    assert [small[i].weight.shape for i in (0, 4, 7, 9)] == [(4, 1, 3, 3), (6, 4, 3, 3), (6, 216), (4, 6)]


def test_what_only_removed_filters_read_goes_too() -> None:
    """Filters of the second layer that are constant through pruned inputs, and inputs that only they read."""
    model = settle(nn.Sequential(nn.Conv2d(1, 4, 1), nn.Conv2d(4, 3, 1), nn.Conv2d(3, 2, 1)))
    with torch.no_grad():
        model[0].weight[0] = 0  # channel 0 is constant
        model[1].weight[0, 1:] = 0  # filter 0 reads channel 0 alone: constant
        model[1].weight[1:, 1] = 0  # channel 1 is read by no other filter
        model[2].weight[:, 1] = 0  # filter 1 is read by nobody; channel 2 is read by filter 1 alone
        model[1].weight[2, 2] = 0
    small = check(model, sample(2, 1, 5, 5))
    assert [layer.weight.shape[:2] for layer in small] == [(1, 1), (1, 1), (2, 1)]


def test_beside_zero_padding_only_zeros_go() -> None:
    model = chain(padding=1)
    prune(model, {"0": 0.5}, structure="filter")
    empty = ~model[0].weight.flatten(1).any(1)
    constants = model[:3](torch.zeros(1, 1, 4, 4, dtype=torch.float64))[0, :, 0, 0]
    # Two of the four are negative before ReLU, so 0 after it; two are not.
    with torch.no_grad():
        shift = torch.tensor([-1.0, 1.0, -2.0, 2.0], dtype=torch.float64)
        model[1].bias[empty] += shift - model[:2](torch.zeros(1, 1, 4, 4, dtype=torch.float64))[0, empty, 0, 0]
    small = check(model, sample(2, 1, 12, 12))
    assert constants.shape == (8,)
    assert small[0].out_channels == 6
    row = shrink_plan(model, sample(2, 1, 12, 12)).rows[0]
    assert row.outputs == (8, 6)
    assert row.kept == ("2 filters: '4' reads a constant that its zero padding interrupts",)
    inexact = shrink(model, sample(2, 1, 12, 12), exact=False)
    assert inexact[0].out_channels == 4
    x = sample(2, 1, 12, 12, seed=1)
    difference = (inexact[:6](x) - model[:6](x)).detach().abs().amax((0, 1))
    assert difference[1:-1, 1:-1].max() < 1e-12  # the inside stays what it was
    assert difference[0].max() > 1e-3
    model[4].padding_mode = "circular"  # continues the constant
    assert check(model, sample(2, 1, 12, 12))[0].out_channels == 4


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 1)
        self.first, self.norm, self.second = nn.Conv2d(6, 5, 3, padding=1), nn.BatchNorm2d(5), nn.Conv2d(5, 6, 1)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.second(torch.relu(self.norm(self.first(x)))))
        return self.head(x.mean((2, 3)))


def test_residual_branches_must_agree() -> None:
    model = settle(Residual())
    with torch.no_grad():
        model.stem.weight[[1, 2]] = 0
        model.stem.bias[[1, 2]] = -1.0  # 0 after ReLU, so that the padding of `first` is no hindrance
        model.second.weight[[2, 3]] = 0
        model.first.weight[[0, 4]] = 0
    small = check(model, sample(2, 1, 5, 5))
    assert (small.stem.out_channels, small.second.out_channels, small.head.in_features) == (5, 5, 5)
    assert (small.first.out_channels, small.first.in_channels) == (3, 5)
    plan = shrink_plan(model, sample(2, 1, 5, 5))
    assert [row.name for row in plan.rows] == ["stem", "first", "second", "head"]
    assert plan.rows[0].kept == ("1 filter: add() joins it with 'second', which is not pruned there",)
    assert plan.rows[2].kept == ("1 filter: add() joins it with 'stem', which is not pruned there",)
    assert str(plan).splitlines()[:2] == [
        "layer   outputs  inputs  pruned but kept",
        "stem    6 -> 5   1 -> 1  1 filter: add() joins it with 'second', which is not pruned there",
    ]


class Chain(nn.Module):
    """Two additions in a row, the first to the model's input."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.one(x)) + x
        x = torch.relu(x) + self.two(torch.relu(x))
        return self.head(x.mean((2, 3)))


def test_the_plan_names_what_an_addition_joins_with_a_pruned_filter() -> None:
    model = settle(Chain())
    with torch.no_grad():
        model.one.weight[1] = 0
        model.two.weight[[0, 1]] = 0
    rows = {row.name: row.kept for row in shrink_plan(model, sample(2, 4, 5, 5)).rows}
    assert rows["one"] == ("1 filter: add() joins it with an input of the model, which is not pruned there",)
    assert rows["two"] == (
        "1 filter: add() joins it with 'one', which is not pruned there",
        "1 filter: add() joins it with an input of the model, which is not pruned there",
    )


@pytest.mark.parametrize("function", [shrink, shrink_plan])
def test_arguments_of_other_types_are_refused(function: Any) -> None:
    with pytest.raises(ValueError, match=r"model is 5 \(int\) but must be an nn.Module"):
        function(5, sample(2, 1, 5, 5))
    with pytest.raises(ValueError, match="example_input is 'x' but must be a tensor, or a tuple"):
        function(Residual(), "x")


def test_depthwise_convolutions_shrink_with_their_neighbors() -> None:
    model = settle(
        nn.Sequential(
            nn.Conv2d(1, 6, 1),
            nn.BatchNorm2d(6),
            nn.ReLU6(),
            nn.Conv2d(6, 12, 3, groups=6),
            nn.BatchNorm2d(12),
            nn.ReLU6(),
            nn.Conv2d(12, 3, 1),
        )
    )
    with torch.no_grad():
        model[0].weight[1] = 0  # a constant enters the depthwise filters 2 and 3
        model[3].weight[8:10] = 0  # both filters of input 4
        model[3].weight[4] = 0  # one of the two of input 2: its partner lives
    small = check(model, sample(2, 1, 6, 6))
    assert (small[0].out_channels, small[3].groups, small[3].out_channels, small[6].in_channels) == (4, 4, 8, 8)
    assert shrink_plan(model, sample(2, 1, 6, 6)).rows[1].kept == ("1 filter: '6' reads it where it is not constant",)


def test_the_last_channel_stays() -> None:
    model = chain()
    with torch.no_grad():
        model[0].weight.zero_()
        model[7].weight.zero_()
    x = sample(2, 1, 12, 12)
    small = check(model, x)
    assert [small[i].weight.shape[0] for i in (0, 4, 7, 9)] == [1, 1, 1, 4]
    assert shrink_plan(model, x).rows[0].kept[0] == "1 filter: it is the last one of '0'"


@pytest.mark.parametrize("name", ["weight", "column"])
def test_without_whole_filters_nothing_changes(name: Any) -> None:
    model = chain()
    prune(model, 0.3, structure=name, skip=("0", "7", "9"))
    small = check(model, sample(2, 1, 12, 12))
    assert torch.equal(small[4].weight, model[4].weight)


def test_modes_training_and_masks_afterwards() -> None:
    model = chain().train()
    model[1].eval()
    model[4].weight.requires_grad_(False)
    prune(model, {"0": 0.5, "7": 0.2}, structure="filter")
    prune(model, {"9": 0.6})
    x = sample(2, 1, 12, 12)
    small = shrink(model, x)
    assert [m.training for m in small] == [m.training for m in model]
    assert not small[4].weight.requires_grad
    assert small[0].weight.requires_grad
    keep_zeros(small)
    zeros = small[9].weight == 0
    small.train()(x).square().sum().backward()
    torch.optim.SGD(small.parameters(), 0.1).step()
    assert torch.equal(small[9].weight == 0, zeros)
    assert sparsity(small).rows[0].empty_filters == 0


def test_masks_of_torch_shrink() -> None:
    model = chain()
    torch_prune.ln_structured(model[0], "weight", amount=0.5, n=1, dim=0)
    model(sample(2, 1, 12, 12))
    assert shrink(model, sample(2, 1, 12, 12))[0].out_channels == 4


@pytest.mark.data
def test_trained_networks() -> None:
    from qconv.pretrained import mobilenet_v2_imagenet, resnet20_cifar10

    model = resnet20_cifar10()
    prune(model, {name: 0.5 for name, _ in model.named_modules() if name.endswith(".conv1")}, structure="filter")
    x = sample(2, 3, 32, 32, dtype=torch.float32)
    small = check(model, x, 1e-6)
    assert all(block.conv1.out_channels < 64 for block in small.layer3)
    assert all(block.conv1.out_channels == 32 for block in shrink(model, x, exact=False).layer3)
    mobile = mobilenet_v2_imagenet()  # its first depthwise filters are partly dead, as published
    assert check(mobile, sample(1, 3, 96, 96, dtype=torch.float32), 1e-6).stem[1].out_channels == 22
