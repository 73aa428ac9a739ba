"""Image <-> patches: geometry only, exactly nn.Conv2d's."""

from __future__ import annotations

from dataclasses import dataclass
from operator import index

import torch.nn.functional as F
from torch import Tensor

from circuits.naming import unknown

Pair = tuple[int, int]
PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


def whole(value: object, name: str, least: int) -> int:
    """A whole number of at least `least`; numpy's are welcome.

    Raises:
        ValueError: For anything else.
    """
    try:
        number = index(value)  # type: ignore[arg-type]
    except TypeError:
        number = least - 1
    if number < least:
        raise ValueError(f"{name} is {value!r}: give a whole number of at least {least}")
    return number


def pair(value: int | Pair, name: str, least: int) -> Pair:
    """One number for both axes, or one each, as (vertical, horizontal)."""
    both = tuple(value) if isinstance(value, tuple | list) else (value, value)
    if len(both) != 2:
        raise ValueError(f"{name} is {value!r}: give one whole number, or two")
    return whole(both[0], name, least), whole(both[1], name, least)


@dataclass(frozen=True)
class Geometry:
    """How a kernel moves over an image.

    Args:
        kernel_size: (height, width), at least 1.
        stride: At least 1.
        padding: (vertical, horizontal) at least 0, or "same" or "valid".
        dilation: At least 1.
        padding_mode: "zeros", "reflect", "replicate" or "circular".

    Raises:
        ValueError: For a number out of range, an unknown name, or "same" with a stride.
    """

    kernel_size: Pair
    stride: Pair = (1, 1)
    padding: Pair | str = (0, 0)
    dilation: Pair = (1, 1)
    padding_mode: str = "zeros"

    @classmethod
    def of(
        cls,
        kernel_size: int | Pair,
        stride: int | Pair = 1,
        padding: int | Pair | str = 0,
        dilation: int | Pair = 1,
        padding_mode: str = "zeros",
    ) -> Geometry:
        """Read nn.Conv2d's arguments, one number or two."""
        if padding_mode not in PADDING_MODES:
            raise unknown("padding_mode", padding_mode, PADDING_MODES)
        steps = pair(stride, "stride", 1)
        if isinstance(padding, str):
            if padding not in ("same", "valid"):
                raise unknown("padding", padding, ("same", "valid"))
            if padding == "same" and steps != (1, 1):
                raise ValueError(f"padding 'same' has stride {steps}: it needs stride 1, or give the padding in pixels")
        else:
            padding = pair(padding, "padding", 0)
        return cls(pair(kernel_size, "kernel_size", 1), steps, padding, pair(dilation, "dilation", 1), padding_mode)

    @property
    def taps(self) -> int:
        """Pixels of one channel under the kernel."""
        return self.kernel_size[0] * self.kernel_size[1]

    def margins(self) -> tuple[Pair, Pair]:
        """Padding (before, after) of the vertical and of the horizontal axis."""
        if self.padding == "valid":
            return (0, 0), (0, 0)
        if self.padding == "same":
            total = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
            return (total[0] // 2, total[0] - total[0] // 2), (total[1] // 2, total[1] - total[1] // 2)
        assert not isinstance(self.padding, str)
        vertical, horizontal = self.padding
        return (vertical, vertical), (horizontal, horizontal)

    def output_size(self, height: int, width: int) -> Pair:
        """(H', W') of an image of that size.

        Raises:
            ValueError: If the kernel does not fit into the padded image.
        """
        sizes, margins = [], self.margins()
        for axis, size in enumerate((height, width)):
            reach = self.dilation[axis] * (self.kernel_size[axis] - 1) + 1
            before, after = margins[axis]
            padded = size + before + after
            if padded < reach:
                raise ValueError(
                    f"kernel reaches over {reach} pixels but the padded image has {padded} "
                    f"({'height' if axis == 0 else 'width'}): use a smaller kernel or more padding"
                )
            sizes.append((padded - reach) // self.stride[axis] + 1)
        return sizes[0], sizes[1]


def pad(images: Tensor, geometry: Geometry) -> Tensor:
    """Images (B, C, H, W) with their margins."""
    geometry.output_size(images.shape[-2], images.shape[-1])
    (top, bottom), (left, right) = geometry.margins()
    if not (top or bottom or left or right):
        return images
    mode = "constant" if geometry.padding_mode == "zeros" else geometry.padding_mode
    return F.pad(images, (left, right, top, bottom), mode=mode)


def unfold(images: Tensor, geometry: Geometry) -> Tensor:
    """Cut padded images into patches.

    Args:
        images: (B, C, H, W), padded.
        geometry: How the kernel moves; its padding is not applied again.

    Returns:
        (B * H' * W', C * taps): features in nn.Unfold's order (channel, row, column), patches in the order (image, row,
        column). The memory is laid out feature by feature: backends work on all patches of one feature at a time.
    """
    columns = F.unfold(images, geometry.kernel_size, geometry.dilation, 0, geometry.stride)
    return columns.transpose(0, 1).flatten(1).t()


def fold(values: Tensor, batch: int, size: Pair) -> Tensor:
    """Put one row of outputs a patch back in its place: (B * H' * W', channels) -> (B, channels, H', W')."""
    return values.reshape(batch, *size, values.shape[1]).movedim(-1, 1)
