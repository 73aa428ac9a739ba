"""What shrink leaves alone or refuses: operations without a rule, shared modules, sizes written into the code."""

import copy
from typing import Any

import pytest
import torch
from test_pruning_shrink import chain, check, sample, settle
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from classical.pruning import prune, shrink, shrink_plan


class Forward(nn.Module):
    """Two convolutions and any function between them."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.first, self.second, self.function = nn.Conv2d(1, 4, 1), nn.Conv2d(4, 2, 1), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def in_place_twice(net: Any, x: Tensor) -> Tensor:
    y = net.first(x)
    z = F.relu(y, inplace=True)  # y is no longer what `first` gave
    return net.second(y + z)


@pytest.mark.parametrize(
    "function",
    [
        lambda net, x: net.second(F.softmax(net.first(x), 1)),
        lambda net, x: net.second(net.first(x).flip(1)),
        lambda net, x: net.second(F.layer_norm(net.first(x), (4, 5, 5))),
        lambda net, x: net.second(torch.cat(net.first(x).chunk(2, 1), 1)),
        lambda net, x: net.second(net.first(x) + net.first(x[:, :, :1, :1])),
        lambda net, x: (net.first(x), net.second(net.first(x))),
        lambda net, x: net.second(net.first(x) * net.second.bias.mean()),
        lambda net, x: net.second(net.first(x)).sum() * net.first(x),
        lambda net, x: net.second(F.dropout(net.first(x), 0.0)),
        in_place_twice,
    ],
)
def test_what_has_no_rule_keeps_its_channels(function: Any) -> None:
    model = settle(Forward(function))
    prune(model, {"first": 0.5}, structure="filter")
    x = sample(2, 1, 5, 5)
    small = shrink(model, x)
    assert small.first.out_channels == 4
    for a, b in zip(small(x), model(x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "function",
    [
        lambda net, x: net.second(2.0 * net.first(x)[:, :, ::2, 1:] - 1),
        lambda net, x: net.second(F.dropout(F.hardtanh(net.first(x), -0.2, 0.3), 0.5, net.training)),
        lambda net, x: net.second(net.first(x).clamp(min=0.1).add(3).contiguous()),
        lambda net, x: net.second(torch.sigmoid(net.first(x)) * net.first.bias.shape[0]),
        lambda net, x: net.second((lambda y: y * torch.sigmoid(y))(net.first(x))),
        lambda net, x: net.second(F.max_pool2d(net.first(x), 2) - F.adaptive_max_pool2d(x, 2)[:, :1] * 0),
    ],
)
def test_functions_that_are_followed(function: Any) -> None:
    model = settle(Forward(function))
    prune(model, {"first": 0.5}, structure="filter")
    x = sample(2, 1, 5, 5)
    small = shrink(model, x)
    torch.testing.assert_close(small(x), model(x), rtol=1e-12, atol=1e-12)


def test_modules_called_twice_and_shared_weights_are_left_alone() -> None:
    twice = settle(Forward(lambda net, x: net.second(net.second(net.first(x)).repeat(1, 2, 1, 1))))
    prune(twice, {"second": 0.5}, structure="filter")
    assert check(twice, sample(2, 1, 5, 5)).second.out_channels == 2
    tied = settle(nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 5), nn.Linear(5, 2)))
    with torch.no_grad():
        tied[0].weight[1] = 0
    tied[2].weight = tied[0].weight
    assert check(tied, sample(3, 5))[0].out_features == 5
    hooked = chain()
    prune(hooked, {"0": 0.5}, structure="filter")
    hooked[1].register_forward_hook(lambda module, args, output: output + 1)
    assert check(hooked, sample(2, 1, 12, 12))[0].out_channels == 8
    normed = chain()
    prune(normed, {"0": 0.5}, structure="filter")
    normed[4] = parametrizations.weight_norm(normed[4])
    assert shrink(normed, sample(2, 1, 12, 12))[0].out_channels == 8


def test_sizes_written_into_the_code() -> None:
    model = settle(nn.Sequential(nn.Conv2d(1, 4, 1), nn.Flatten(), nn.Unflatten(1, (4, 25)), nn.Flatten()))
    prune(model, {"0": 0.5}, structure="filter")
    assert check(model, sample(2, 1, 5, 5))[0].out_channels == 4

    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(1, 4, 1), nn.Linear(100, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.conv(x).view(-1, 100))

    fixed = settle(Fixed())
    prune(fixed, {"conv": 0.5}, structure="filter")
    assert check(fixed, sample(2, 1, 5, 5)).conv.out_channels == 4
    assert shrink_plan(fixed, sample(2, 1, 5, 5)).rows[0].kept == ("2 filters: 'view' has no rule",)


def test_several_inputs_and_outputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(1, 4, 1), nn.Conv2d(2, 4, 1), nn.Conv2d(4, 3, 1)

        def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
            z = self.a(x) + self.b(y)
            return {"c": self.c(z), "b": self.c(torch.relu(z)).mean((2, 3))}

    model = settle(Two())
    model.d = copy.deepcopy(model.c)  # unused
    with torch.no_grad():
        model.a.weight[1] = 0
        model.b.weight[1] = 0
    inputs = (sample(2, 1, 5, 5), sample(2, 2, 5, 5, seed=1))
    small = shrink(model, inputs)
    assert small.a.out_channels == small.b.out_channels == 4  # `c` is called twice
    for name, value in model(*inputs).items():
        torch.testing.assert_close(small(*inputs)[name], value, rtol=1e-12, atol=1e-12)


def test_models_that_branch_on_values_are_refused() -> None:
    model = Forward(lambda net, x: net.first(x) if x.sum() > 0 else net.second(net.first(x)))
    with pytest.raises(ValueError, match=r"Forward cannot be traced by torch\.fx"):
        shrink(model, sample(1, 1, 3, 3, dtype=torch.float32))


def test_a_forward_that_relies_on_sizes_is_refused() -> None:
    def sizes(net: Any, x: Tensor) -> Tensor:
        return net.second(net.first(x)) * net.first.out_channels  # torch.fx sees a number

    model = settle(Forward(sizes))
    prune(model, {"first": 0.5}, structure="filter")
    with pytest.raises(ValueError, match="outputs on the example are off by"):
        shrink(model, sample(2, 1, 5, 5))
