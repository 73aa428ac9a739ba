"""What an integer network does between its layers, beside rescaling."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from classical.integer.codes import Coded, InputCode
from classical.integer.sums import per_channel, weighted
from classical.quantizers import Quantizer


class Encode(Coded):
    """Codes of a real input: the first of two places where a network meets real numbers."""

    def __init__(self, quantizer: Quantizer, code: InputCode) -> None:
        super().__init__()
        self.quantizer, self.code = quantizer, code

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Real numbers to codes of the same shape."""
        return self.code.encode(self.quantizer, x)


class Scores(nn.Module):
    """Real outputs: the last accumulators times their scales.

    Args:
        factors: (terms, channels).
        offset: (channels,).
        dtype: of the outputs.
        trailing: axes behind the channels.
    """

    factors: Tensor
    offset: Tensor

    def __init__(self, factors: Tensor, offset: Tensor, dtype: torch.dtype, trailing: int) -> None:
        super().__init__()
        self.dtype, self.trailing = dtype, trailing
        self.register_buffer("factors", factors)
        self.register_buffer("offset", offset)

    def forward(self, *terms: Tensor) -> Tensor:
        """Accumulators, one tensor a term."""
        real = weighted(terms, self.factors, self.trailing) + per_channel(self.offset, self.trailing)
        return real.to(self.dtype)


class Clip(nn.Module):
    """min(max(x, low), high) of integers, with bounds for each channel.

    Args:
        low, high: (channels,), int64.
        trailing: axes behind the channels.
    """

    low: Tensor
    high: Tensor

    def __init__(self, low: Tensor, high: Tensor, trailing: int) -> None:
        super().__init__()
        self.trailing = trailing
        self.register_buffer("low", low)
        self.register_buffer("high", high)

    def forward(self, x: Tensor) -> Tensor:
        """Integers of shape (batch, channels, ...)."""
        low, high = (per_channel(bound.to(x.dtype), self.trailing) for bound in (self.low, self.high))
        return torch.clamp(x, low, high)


class Largest(nn.Module):
    """Max pooling of integers.

    Args:
        options: of torch.nn.functional.max_pool2d: kernel_size, stride, padding, dilation, ceil_mode.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__()
        self.options = options

    def forward(self, x: Tensor) -> Tensor:
        """Integers of shape (batch, channels, height, width)."""
        # With channels side by side torch counts pixels in the integers' own type, so that int8 would end at 127 of
        # them; and planes of int8 take it fifty times as long as int32 of this layout.
        wide = x.to(torch.int32, memory_format=torch.channels_last)
        largest: Tensor = F.max_pool2d(wide, **self.options)
        return largest.to(x.dtype)


def window_sums(x: Tensor, kernel: tuple[int, int], stride: tuple[int, int]) -> Tensor:
    """Sums of int32 over windows of the last two axes."""
    windows = x.unfold(2, kernel[0], stride[0]).unfold(3, kernel[1], stride[1])
    return windows.sum((-2, -1), dtype=torch.int32)
