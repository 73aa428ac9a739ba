"""Sums over the taps of a convolution, in integers: what the three ways to compute them share."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor, nn

from classical.layers import Geometry
from classical.quantizers import Quantizer

Kernels = Literal["auto", "numba", "torch"]


@dataclass(frozen=True)
class InputCode:
    """How a calibrated activation quantizer codes its values, as a layer reads them: real = (code - zero) * scale.

    Attributes:
        low, high: the smallest and the largest code.
        step: between neighboring codes.
        shift: subtracted from the quantizer's own codes, so that any 8 bits fit into int8.
    """

    scale: float
    zero: int
    low: int
    high: int
    step: int
    shift: int

    @property
    def dtype(self) -> torch.dtype:
        """Of the codes: int8, or int16 above 8 bits."""
        return torch.int8 if self.low >= -128 and self.high <= 127 else torch.int16

    @property
    def bits(self) -> int:
        """Of a code, counted from the lowest."""
        return ((self.high - self.low) // self.step).bit_length()

    @property
    def reach(self) -> int:
        """Upper bound of |code|, the padding's included."""
        return max(-self.low, self.high, abs(self.zero))

    def encode(self, activation: Quantizer, x: Tensor) -> Tensor:
        """Codes of x by the quantizer that this is the code of.

        Raises:
            ValueError: x holds NaN.
        """
        require_codable(x)
        codes, _, _ = activation.encode(x)
        return (codes - self.shift if self.shift else codes).to(self.dtype)


def input_code(activation: Quantizer, like: Tensor) -> InputCode:
    """The code of an activation quantizer that has seen its range.

    Args:
        activation: the quantizer.
        like: a tensor of the layer's type and device.

    Raises:
        ValueError: no range seen yet, or values without integer codes.
    """
    if not activation.calibrated:
        raise ValueError(
            f"{activation!r} has seen no range yet: calibrate() the network, or run a batch in train(); without data, "
            "give data_free_quantize() what it cannot know, input_range=(low, high) of the network's input"
        )
    stated = activation.integers(like.new_zeros(1, 1))
    grid = activation.grid
    middle = (len(grid) + 1) // 2 if grid[0] >= 0 and grid[-1] > 127 else 0
    return InputCode(
        float(stated.scale), int(stated.zero) - middle, grid[0] - middle, grid[-1] - middle, grid.step, middle
    )


def require_codable(x: Tensor) -> None:
    """Check that real inputs can have codes: NaN would become an arbitrary one, infinities become the ends.

    Raises:
        ValueError: one is NaN.
    """
    # A NaN is in the sum too, which takes a tenth of the time of a look at each number; so is infinity - infinity.
    if bool(x.sum().isnan()) and bool(x.isnan().any()):
        raise ValueError("input holds NaN, which no integer stands for: check the data")


class Sums(nn.Module):
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


def load_kernels(choice: Kernels) -> Any:
    """The module of compiled loops, or None where torch is to run.

    Args:
        choice: "auto" for the loops if numba is installed, "numba" for them in any case, "torch" for none.

    Raises:
        ValueError: another choice.
        ImportError: "numba" where it is not installed.
    """
    if choice not in ("auto", "numba", "torch"):
        raise ValueError(f"kernels is {choice!r} but must be 'auto', 'numba' or 'torch'")
    if choice == "torch" or (choice == "auto" and find_spec("numba") is None):
        return None
    try:
        return import_module("classical.integer.kernels")
    except ImportError as error:
        raise ImportError(
            "kernels='numba' needs numba, which is not installed: pip install 'qconv[integer]'; "
            "kernels='torch' gives the same results without"
        ) from error
