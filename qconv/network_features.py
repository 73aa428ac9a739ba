"""Features of pixels and qubits as modules: what the plain controls of quantum-inspired networks are built on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor, nn

from qconv.binary_laws import RSQRT, handed_on, operations
from qconv.binary_neurons import monomial_operations, monomials
from qconv.tensors.feature_maps import FeatureMap

KERNEL, STRIDE = 3, 2
"""Taps and stride of the convolutions of architectures B and C, see networks.py."""


def _products(one: Tensor, other: Tensor) -> Tensor:
    """All products of a feature of `one` and one of `other`: (B, features, ...) twice -> (B, features^2, ...)."""
    return (one[:, :, None] * other[:, None]).flatten(1, 2)


class QubitFeatures(nn.Module):
    """Means h of bits -> monomials of h and X = sqrt(1 - h^2), on axis 1, and products over neighboring inputs.

    Args:
        names: Of "h", "X", "hh", "hX".
        neighbors: Whether to add h h', h X', X h', X X' of inputs 0-1, 2-3, ...; dense inputs only.
    """

    def __init__(self, names: Sequence[str], neighbors: bool = False) -> None:
        super().__init__()
        self.names, self.neighbors = tuple(names), neighbors

    def forward(self, h: Tensor) -> Tensor:
        """(B, C, ...) -> (B, len(names) C, ...), and 4 (C // 2) more for neighbors."""
        found = monomials(h, (*self.names, *(("X",) if self.neighbors else ())))
        features = [found[name] for name in self.names]
        if self.neighbors:
            both = torch.stack([found["h"], found["X"]], dim=1)
            used = h.shape[1] // 2 * 2
            features.append(_products(both[..., 0:used:2], both[..., 1:used:2]).flatten(1))
        return torch.cat(features, dim=1)

    def counts(self, input_shape: tuple[int, ...]) -> Counter[str]:
        """Operations of one inference."""
        read = prod(input_shape)
        wanted = {*self.names, *(("X",) if self.neighbors else ())}
        products = 4 * (read // 2) if self.neighbors else 0
        total = operations(read, monomial_operations(wanted)) + operations(products, Counter(mul=1))
        return total + handed_on(read * len(self.names) + products)

    def extra_repr(self) -> str:
        """The arguments."""
        return f"{self.names}, neighbors={self.neighbors}"


class NeighborConv2d(nn.Module):
    """A plain 3x3 convolution of stride 2 on (h, X, hX) of each tap and on products over neighboring taps.

    Neighbors are those of QuantumDeformedConv2d: taps 0-1 of each row, and rows 0-1 of the last column; each pair gives
    h h', h X', X h' and X X'.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.features = QubitFeatures(("h", "X", "hX"))
        self.single = nn.Conv2d(3 * in_channels, out_channels, KERNEL, STRIDE, bias=False)
        self.across = nn.Conv2d(4 * in_channels, out_channels, (3, 1), (2, 1), bias=False)
        self.down = nn.Conv2d(4 * in_channels, out_channels, 1, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, out_channels, H', W'), sized as nn.Conv2d's."""
        features = self.features(h)
        sums: Tensor = self.single(features)
        rows, columns = sums.shape[-2:]
        both = features[:, : 2 * h.shape[1]].unflatten(1, (2, -1))
        across: Tensor = self.across(
            _products(both[..., 0 : 2 * columns : 2], both[..., 1 : 2 * columns : 2]).flatten(1, 2)
        )
        last = both[..., 2::2]
        down: Tensor = self.down(
            _products(last[..., 0 : 2 * rows : 2, :], last[..., 1 : 2 * rows : 2, :]).flatten(1, 2)
        )
        return sums + across + down


class PixelFeatures(nn.Module):
    """A tensor network's local feature map alone: pixels (B, C, H, W) -> (B, size, H, W)."""

    def __init__(self, feature_map: FeatureMap) -> None:
        super().__init__()
        self.feature_map = feature_map

    def forward(self, x: Tensor) -> Tensor:
        """Map the channels of each pixel."""
        return self.feature_map(x)

    def counts(self, input_shape: tuple[int, ...]) -> Counter[str]:
        """Operations of one inference."""
        pixels, channels = prod(input_shape[1:]), input_shape[0]
        each = self.feature_map.counts(channels)
        total = Counter({key: pixels * amount for key, amount in each.items()})
        return total + handed_on(pixels * self.feature_map.size(channels))

    def extra_repr(self) -> str:
        """The feature map."""
        return repr(self.feature_map)


class UnitVectors(nn.Module):
    """The channels of each pixel as a vector of norm 1, as the state of a site is: (B, C, H, W) as it came."""

    def forward(self, x: Tensor) -> Tensor:
        """Divide by the norm over channels."""
        return nn.functional.normalize(x, dim=1)

    def counts(self, input_shape: tuple[int, ...]) -> Counter[str]:
        """Operations of one inference."""
        units, pixels = prod(input_shape), prod(input_shape[1:])
        total = operations(units, Counter(mul=2, add=1)) + operations(pixels, RSQRT)
        return total + handed_on(units)
