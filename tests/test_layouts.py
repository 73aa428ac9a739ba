"""Layouts that make networks faster and leave their numbers alone."""

import pytest
import torch
from torch import nn

from qconv.layouts import lay_out, pooling_fast
from qconv.lenets import build_lenet


class Viewing(nn.Module):
    """Takes a view of images, which channels that lie together do not have."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(1, 4, 3), nn.Linear(144, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        return self.linear(x.view(x.size(0), -1))


@pytest.mark.parametrize("size", [(8, 8), (9, 7)])
@pytest.mark.parametrize(
    "options",
    [(2,), (3, 1), (3, 2), ((2, 3), (1, 2)), (2, 2, 1), (2, 1, 0, 2), (2, 2, 0, 1, False, True)],
    ids=str,
)
def test_fast_pooling_gives_equal_numbers(options, size):
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.MaxPool2d(*options), nn.ReLU()).eval()
    x = torch.randn(3, 1, *size)
    x[0, 0, 2, 2] = torch.nan
    with torch.no_grad():
        assert torch.equal(pooling_fast(model)(x).nan_to_num(99), model(x).nan_to_num(99))
    assert type(model[1]) is nn.MaxPool2d


def test_a_lenet_has_the_same_scores():
    model = build_lenet("lenet5", (1, 28, 28), 10, 0).eval()
    x = torch.rand(20, 1, 28, 28)
    with torch.no_grad():
        assert torch.equal(pooling_fast(model)(x), model(x))
    assert not any(type(module) is nn.MaxPool2d for module in pooling_fast(model).modules())


def test_what_cannot_lie_channels_last_stays_as_it_is():
    x = torch.rand(2, 1, 8, 8)
    for model, last in ((Viewing(), False), (nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten()), True)):
        model.train()
        lay_out(model, x)
        weight = next(model.parameters())
        assert weight.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
        assert model(x).shape[0] == 2
        assert model.training
