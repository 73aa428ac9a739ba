"""Sums over the taps of a convolution, in integers: what the three ways to compute them share."""

from collections.abc import Sequence

import torch
from torch import Tensor

from classical.integer.codes import Coded, InputCode
from classical.layers import Geometry


class Sums(Coded):
    """Accumulators of a convolution, exact in int32: 2^shift * (sum over the taps of weight * code) + constant.

    Padding holds the code of 0. A weight may have several terms, weights of their own that are scaled apart.

    Args:
        weight: (terms, outputs, inputs / groups, height, width), integers.
        geometry: of the convolution; a linear layer is one of 1x1 on images of one pixel.
        code: of the inputs.
        constant: (terms, outputs), int32.
        shift: at least 0.
    """

    weight: Tensor
    constant: Tensor

    def __init__(self, weight: Tensor, geometry: Geometry, code: InputCode, constant: Tensor, shift: int = 0) -> None:
        super().__init__()
        self.geometry, self.code, self.shift = geometry, code, shift
        self.register_buffer("weight", weight.to(torch.int8 if weight.abs().max() < 128 else torch.int16))
        self.register_buffer("constant", constant.int())

    def forward(self, codes: Tensor) -> Tensor:
        """Accumulators of a batch of codes.

        Args:
            codes: (images, channels, height, width), or (samples, features) for a linear layer.

        Returns:
            int32, (terms, images, outputs, height', width'), or (terms, samples, outputs).

        Raises:
            ValueError: codes do not fit the layer.
        """
        if codes.dim() == 2:
            return self.accumulate(codes[..., None, None])[..., 0, 0]
        return self.accumulate(codes)

    def accumulate(self, codes: Tensor) -> Tensor:
        """Accumulators of images: see forward."""
        raise NotImplementedError

    def scaled(self, codes: Tensor, factors: Tensor, offset: Tensor) -> Tensor:
        """Real numbers: the sum over the terms of factor * accumulator, and an offset.

        Args:
            codes: images.
            factors: (terms, outputs), float32 or float64.
            offset: (outputs,), of the same type.
        """
        return weighted(self.accumulate(codes).unbind(), factors, 2) + offset[:, None, None]

    def extra_repr(self) -> str:
        """Show the shape of the weight."""
        return f"weight={tuple(self.weight.shape)}"


def weighted(terms: Sequence[Tensor], factors: Tensor, trailing: int) -> Tensor:
    """The sum of factors times terms, of the factors' type.

    Args:
        terms: each (batch, channels, ...).
        factors: (terms, channels).
        trailing: axes behind the channels.
    """
    total = terms[0].to(factors.dtype) * per_channel(factors[0], trailing)
    for term, factor in zip(terms[1:], factors[1:], strict=True):
        total = total + term.to(factors.dtype) * per_channel(factor, trailing)
    return total


def per_channel(values: Tensor, trailing: int) -> Tensor:
    """(channels,) shaped to broadcast against (batch, channels, ...) with so many axes behind the channels."""
    return values.view(-1, *[1] * trailing)
