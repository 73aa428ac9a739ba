"""Operations and parameters of published networks, against the papers' own figures."""

from collections.abc import Callable

import pytest
import torch.nn.functional as F
from torch import Tensor, nn

from qconv.energy import (
    Counts,
    count,
)


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
