"""What convolutions over patches share: nn.Conv2d's arguments and shapes, checks, bias and counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn

from qconv.backends.protocol import full_precision
from qconv.patches import Geometry, Pair, fold, pad, unfold, whole

Evaluate = Callable[[Tensor, Tensor], Tensor]


class PatchConv2d(nn.Module):
    """What our convolutions share: nn.Conv2d's arguments and shapes around a function of patches.

    A subclass gives `.weight` and `evaluate(patches, weights) -> (P, rows)`.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Pair,
        stride: int | Pair,
        padding: int | Pair | str,
        dilation: int | Pair,
        groups: int,
        padding_mode: str,
    ) -> None:
        super().__init__()
        for name, value in (("in_channels", in_channels), ("out_channels", out_channels), ("groups", groups)):
            whole(value, name, 1)
        for name, value in (("in_channels", in_channels), ("out_channels", out_channels)):
            if value % groups:
                raise ValueError(
                    f"{name} is {value}, which {groups} groups do not divide: make {name} a multiple of groups"
                )
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.geometry = Geometry.of(kernel_size, stride, padding, dilation, padding_mode)
        # As nn.Conv2d has them, for tools that read a convolution.
        self.kernel_size, self.stride = self.geometry.kernel_size, self.geometry.stride
        self.padding, self.dilation = self.geometry.padding, self.geometry.dilation
        self.padding_mode = padding_mode

    @property
    def features(self) -> int:
        """Numbers in the patch that one group sees."""
        return self.in_channels // self.groups * self.geometry.taps

    def _make_bias(self, bias: bool, like: Tensor) -> None:
        if bias:
            self.bias = nn.Parameter(torch.zeros(self.out_channels, dtype=like.dtype, device=like.device))
        else:
            self.register_parameter("bias", None)

    def evaluate(self, patches: Tensor, weights: Tensor) -> Tensor:
        """Outputs of one group: patches (P, features) and its share of the weights -> (P, rows)."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> Tensor:
        """Convolve.

        Args:
            images: (B, C, H, W) or (C, H, W), floating point, of the layer's dtype (any float under torch.autocast).

        Returns:
            (B, out_channels, H', W') or (out_channels, H', W'), sized as nn.Conv2d's.

        Raises:
            ValueError: For another shape, number of channels or dtype.
        """
        return self._on_batch(images, self._forward)

    def _on_batch(self, images: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """Check images and apply a function of a batch to them in full precision; see forward."""
        if not isinstance(images, Tensor):
            raise ValueError(
                f"images are a {type(images).__name__}: give a torch.Tensor, such as torch.as_tensor(images)"
            )
        dtype = self.weight.dtype
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"the layer is {dtype} but {type(self).__name__} computes in torch.float32 or torch.float64: convert "
                "it back with .float(), and use torch.autocast for mixed precision"
            )
        if images.ndim not in (3, 4):
            raise ValueError(
                f"images have {images.ndim} dimensions {tuple(images.shape)} but the layer takes 3 or 4: give (batch, "
                f"{self.in_channels}, height, width), such as images[None, None] for a single gray one"
            )
        if images.shape[-3] != self.in_channels:
            raise ValueError(
                f"layer has {self.in_channels} input channels but images have shape {tuple(images.shape)}: "
                f"give (batch, {self.in_channels}, height, width)"
            )
        if not images.is_floating_point():
            raise ValueError(f"images are {images.dtype}: convert them to floats first, such as images.float() / 255")
        precision = full_precision(images)
        if images.dtype != dtype and isinstance(precision, nullcontext):
            raise ValueError(f"images are {images.dtype} but the layer is {dtype}: convert one with .to(dtype)")
        # Half precision never enters a circuit: errors of angles would grow with depth.
        with precision:
            batch = images.to(dtype)
            result = function(batch if images.ndim == 4 else batch[None]).contiguous()
        return result if images.ndim == 4 else result[0]

    def convolve(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, out_channels, H', W'), without bias."""
        return self._over_patches(pad(images, self.geometry), self.weight)

    def _over_patches(
        self, padded: Tensor, weight: Tensor, evaluate: Evaluate | None = None, runs: tuple[int, int] | None = None
    ) -> Tensor:
        """Cut padded images into patches, evaluate each group, and put the outputs back in their places.

        A kernel that has other groups and outputs than the layer gives them as `runs`: (groups, outputs a group).
        """
        evaluate = evaluate or self.evaluate
        groups, outs = runs or (self.groups, self.out_channels // self.groups)
        unpadded = replace(self.geometry, padding=(0, 0))
        size = unpadded.output_size(padded.shape[-2], padded.shape[-1])
        outputs = []
        parts = zip(padded.chunk(groups, dim=1), weight.chunk(groups), strict=True)
        for part, weights in parts if groups > 1 else [(padded, weight)]:
            values = evaluate(unfold(part, self.geometry), weights)
            # .shape, not len(): the latter would tie an exported program to one batch size.
            outputs.append(fold(values[:, :outs], padded.shape[0], size))
        return outputs[0] if groups == 1 else torch.cat(outputs, dim=1)

    def _forward(self, images: Tensor) -> Tensor:
        result = self.convolve(images)
        return result if self.bias is None else result + self.bias[:, None, None]

    def _shape_counts(self, input_shape: tuple[int, ...]) -> tuple[int, Counter[str]]:
        """Patches of one image, and the entries of the ledger that follow from shapes alone."""
        if len(input_shape) != 3 or input_shape[0] != self.in_channels:
            raise ValueError(f"input_shape is {input_shape}: give ({self.in_channels}, height, width)")
        height, width = self.geometry.output_size(input_shape[1], input_shape[2])
        units = self.out_channels * height * width
        bias = 0 if self.bias is None else self.out_channels
        # Adding a bias costs nothing: it is where the sum starts.
        return height * width, Counter(
            {"units": units, "activation_bits": 32 * units, "params": self.weight.numel() + bias}
        )

    def extra_repr(self) -> str:
        """The arguments that define the layer."""
        g = self.geometry
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={g.kernel_size}, stride={g.stride}, "
            f"padding={g.padding!r}, dilation={g.dilation}, groups={self.groups}, bias={self.bias is not None}, "
            f"padding_mode={g.padding_mode!r}"
        )
