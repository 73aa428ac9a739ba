"""LeNet-5 and LeNet-300-100, the networks on which papers on quantization and pruning report MNIST."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from circuits.naming import unknown
from qconv.networks import ImageShape

_TAPS = 5
_SMALL = 16  # pixels: from here up, two unpadded 5x5 convolutions and poolings leave at least one pixel


class LeNet5(nn.Sequential):
    """32C5-MP2-64C5-MP2-512FC and a linear classifier, with batch normalization before each activation.

    A layer is convolution -> max-pooling -> batch normalization -> ReLU: pooling before a binary or ternary activation
    takes the largest sum, after it nearly every window would hold the largest level. No convolution and no hidden
    linear layer has a bias, for batch normalization takes it out again. On 28x28 pixels 582,634 parameters.

    Args:
        image_shape: (channels, size, size); below 16 pixels the convolutions pad by 2, so that 8x8 digits fit.
        n_classes: number of outputs.

    Raises:
        ValueError: images that are not square, or below 4x4 pixels.

    Source: LeCun, Bottou, Bengio & Haffner, Proc. IEEE 86 (1998); these widths: Li & Liu, arXiv:1605.04711, section 4.
    """

    def __init__(self, image_shape: ImageShape = (1, 28, 28), n_classes: int = 10) -> None:
        channels, size = _square(image_shape, at_least=4)
        padding = _TAPS // 2 if size < _SMALL else 0
        for _ in range(2):
            size = (size + 2 * padding - _TAPS + 1) // 2
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 32, _TAPS, padding=padding, bias=False)
        self.pool1, self.norm1, self.act1 = nn.MaxPool2d(2), nn.BatchNorm2d(32), nn.ReLU()
        self.conv2 = nn.Conv2d(32, 64, _TAPS, padding=padding, bias=False)
        self.pool2, self.norm2, self.act2 = nn.MaxPool2d(2), nn.BatchNorm2d(64), nn.ReLU()
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(64 * size**2, 512, bias=False)
        self.norm3, self.act3 = nn.BatchNorm1d(512), nn.ReLU()
        self.fc2 = nn.Linear(512, n_classes)


class LeNet300(nn.Sequential):
    """LeNet-300-100: linear layers to 300, 100 and n_classes with ReLU between; 266,610 parameters on 28x28.

    Args:
        image_shape: (channels, size, size).
        n_classes: number of outputs.
        dropout: probability that a hidden unit is left out of a training step.

    Raises:
        ValueError: images that are not square, or a probability outside [0, 1].

    Source: LeCun et al., Proc. IEEE 86 (1998); pruned by Han, Mao & Dally, arXiv:1510.00149, table 2.
    """

    def __init__(self, image_shape: ImageShape = (1, 28, 28), n_classes: int = 10, dropout: float = 0.25) -> None:
        channels, size = _square(image_shape, at_least=1)
        super().__init__()
        self.flatten = nn.Flatten()
        self.fc1, self.act1, self.drop1 = nn.Linear(channels * size**2, 300), nn.ReLU(), nn.Dropout(dropout)
        self.fc2, self.act2, self.drop2 = nn.Linear(300, 100), nn.ReLU(), nn.Dropout(dropout)
        self.fc3 = nn.Linear(100, n_classes)


def _square(image_shape: ImageShape, at_least: int) -> tuple[int, int]:
    channels, height, width = image_shape
    if height != width or height < at_least:
        raise ValueError(
            f"LeNets take square images of at least {at_least}x{at_least} pixels, but these are {height}x{width}"
        )
    return channels, height


LENETS: dict[str, Callable[[ImageShape, int], nn.Module]] = {"lenet5": LeNet5, "lenet300": LeNet300}
"""The networks by name."""


def build_lenet(name: str, image_shape: ImageShape, n_classes: int, seed: int) -> nn.Module:
    """One of `LENETS`, initialized from `seed` alone.

    Raises:
        ValueError: unknown name, or images that the network cannot take.
    """
    if name not in LENETS:
        raise unknown("network", name, LENETS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LENETS[name](image_shape, n_classes)
