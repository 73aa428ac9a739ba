"""Memory layouts: torch pools and normalizes several times faster where the channels of a pixel lie together."""

from __future__ import annotations

from functools import reduce
from itertools import product

import torch
from torch import Tensor, nn

from classical.pruning.masks import private_copy


@torch.no_grad()
def lay_out(model: nn.Module, images: Tensor) -> None:
    """Lay a model out channels last, so that it computes in that layout, if it can.

    Sums are then added in another order. A model that takes views of its images, or convolves volumes, cannot.

    Args:
        model: (B, C, H, W) -> any; changed in place.
        images: some that it takes.
    """
    was_training = model.training
    model.eval()
    try:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        model(images)
    except RuntimeError:
        model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    model.train(was_training)


def pooling_fast(model: nn.Module) -> nn.Module:
    """A copy without gradients in which max pooling is much faster on the CPU; its numbers are equal.

    torch looks for places of maxima one pixel after another where images are contiguous; strided maxima are vectorized.
    """
    fast = private_copy(model)
    for module in list(fast.modules()):
        for name, child in module.named_children():
            if type(child) is nn.MaxPool2d and not (child.return_indices or child.ceil_mode or child._forward_hooks):
                kernel, stride, padding, dilation = (
                    _pair(each) for each in (child.kernel_size, child.stride, child.padding, child.dilation)
                )
                if padding == (0, 0) and dilation == (1, 1):
                    setattr(module, name, _Maxima(kernel, stride))
    return fast


class _Maxima(nn.Module):
    """Max pooling without padding, of (..., H, W)."""

    def __init__(self, kernel: tuple[int, int], stride: tuple[int, int]) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride

    def forward(self, x: Tensor) -> Tensor:
        """One maximum for each window."""
        down, right = self.stride
        height, width = (
            (size - k) // s * s + 1 for size, k, s in zip(x.shape[-2:], self.kernel, self.stride, strict=True)
        )
        return reduce(
            torch.maximum,
            (
                x[..., i : i + height : down, j : j + width : right]
                for i, j in product(range(self.kernel[0]), range(self.kernel[1]))
            ),
        )


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size
