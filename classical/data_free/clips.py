"""ChannelClip: an activation function whose bounds follow its channels when they are rescaled."""

from collections import Counter

import torch
from torch import Tensor, nn


class ChannelClip(nn.Module):
    """min(max(x, low), high), with bounds for each channel.

    ReLU6 of a channel divided by s is a clip at 6 / s: a network keeps its function when the bound is divided too,
    while plain ReLU in its place would change it.

    Args:
        low: lower bounds, shape () or (channels,).
        high: upper bounds, likewise; infinity for none.
        axis: where the channels are.

    Raises:
        ValueError: a lower bound above its upper bound, or bounds of more than one axis.
    """

    low: Tensor
    high: Tensor

    def __init__(self, low: Tensor | float = 0.0, high: Tensor | float = 6.0, axis: int = 1) -> None:
        super().__init__()
        bounds = torch.as_tensor(low), torch.as_tensor(high)
        if any(bound.dim() > 1 for bound in bounds) or bool((bounds[0] > bounds[1]).any()):
            raise ValueError(f"low is {low} and high is {high}: give numbers, or one a channel, with low <= high")
        for name, bound in zip(("low", "high"), bounds, strict=True):
            self.register_buffer(name, bound.clone().to(torch.promote_types(bound.dtype, torch.float32)))
        self.axis = axis

    def forward(self, x: Tensor) -> Tensor:
        """Clip x, whose axis `axis` has as many channels as there are bounds."""
        shape = (-1,) + (1,) * (x.dim() - 1 - self.axis % x.dim())
        return torch.clamp(x, self.low.to(x.dtype).view(shape), self.high.to(x.dtype).view(shape))

    def counts(self, input_shape: tuple[int, ...]) -> Counter[str]:
        """Operations of one inference on one input: a comparison a value and bound, and the stored bounds."""
        units = torch.Size(input_shape).numel()
        bounds = [bound for bound in (self.low, self.high) if not bool(bound.isinf().all())]
        numbers = sum(bound.numel() for bound in bounds)
        found = {"cmp:fp32": len(bounds) * units, "units": units, "activation_bits": 32 * units}
        return +Counter(found | {"params": numbers, "weight_bits": 32 * numbers})

    def extra_repr(self) -> str:
        """Show the bounds' ranges."""
        return ", ".join(
            f"{name}={float(bound.min()):g}" + (f"..{float(bound.max()):g}" if bound.numel() > 1 else "")
            for name, bound in (("low", self.low), ("high", self.high))
        )
