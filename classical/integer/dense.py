"""Sums as one matrix product for all positions: integer multiplications, in torch."""

from functools import cache

import torch
from torch import Tensor

from classical.integer.codes import InputCode
from classical.integer.planes import pad
from classical.integer.sums import Sums
from classical.layers import Geometry

_SMALL = 16  # products an output up to which a matrix product of its own for each group is not worth its call


class MatrixSums(Sums):
    """Sums by integer matrix products: int8 with int32 accumulators where codes and weights fit, else int32.

    Weights that lie off the middle of int8 (asymmetric ones less their zero point) are moved there, each output by an
    amount of its own, and the sum of the patch times that amount is added back.
    """

    matrix: Tensor
    middle: Tensor

    def __init__(self, weight: Tensor, geometry: Geometry, code: InputCode, constant: Tensor, shift: int = 0) -> None:
        super().__init__(weight, geometry, code, constant, shift)
        rows = weight.flatten(2).long()
        low, high = rows.amin(-1), rows.amax(-1)
        fits = (low >= -128) & (high <= 127)
        middle = torch.where(fits, torch.zeros_like(low), (low + high + 1) // 2)
        moved = weight.long() - middle[..., None, None, None]
        self.narrow = bool(code.dtype == torch.int8 and moved.min() >= -128 and moved.max() <= 127)
        if not self.narrow:
            middle, moved = torch.zeros_like(middle), weight.long()
        groups = geometry.groups
        # (groups, taps, terms * outputs of a group): taps in the order of pixels that lie channel after channel.
        terms, outputs = weight.shape[:2]
        matrix = moved.permute(0, 1, 3, 4, 2).reshape(terms, groups, outputs // groups, -1)
        matrix = matrix.permute(1, 3, 0, 2).flatten(2)
        if middle.any():
            matrix = torch.cat((matrix, torch.ones_like(matrix[..., :1])), -1)
        self.register_buffer("matrix", matrix.to(torch.int8 if self.narrow else torch.int32).contiguous())
        self.register_buffer("middle", middle.int())

    def accumulate(self, codes: Tensor) -> Tensor:
        """(images, channels, height, width) codes to (terms, images, outputs, height', width') accumulators."""
        _, height, width = self.geometry.output_shape(tuple(codes.shape[1:]))
        terms, outputs = self.weight.shape[:2]
        groups = self.geometry.groups
        sums = self._product(self._patches(codes))
        shape = (groups, codes.shape[0], height, width, terms, outputs // groups)
        found = sums[..., : terms * (outputs // groups)].reshape(shape).permute(4, 1, 0, 5, 2, 3)
        found = found.reshape(terms, codes.shape[0], outputs, height, width)
        if self.middle.any():
            patches = sums[..., -1].reshape(groups, -1, height, width).transpose(0, 1)
            patches = patches.repeat_interleave(outputs // groups, 1)
            found = found + self.middle[:, None, :, None, None] * patches
        if self.shift:
            found <<= self.shift
        return found.add_(self.constant[:, None, :, None, None])

    def _patches(self, codes: Tensor) -> Tensor:
        """Inputs of every output: (groups, positions of the batch, taps), a pixel's channels beside each other."""
        geometry = self.geometry
        windows = pad(codes.to(self.matrix.dtype), geometry, self.code.zero).permute(0, 2, 3, 1).contiguous()
        for dim, axis in ((1, geometry.rows), (2, geometry.columns)):
            windows = windows.unfold(dim, axis.span, axis.stride)[..., :: axis.dilation]
        images, height, width, channels, *kernel = windows.shape
        groups = geometry.groups
        windows = windows.reshape(images, height, width, groups, channels // groups, *kernel)
        rows = windows.permute(3, 0, 1, 2, 5, 6, 4).reshape(groups, -1, self.matrix.shape[1])
        return rows.contiguous()  # reshape may leave rows that overlap, which torch's int8 product reads wrongly

    def _product(self, patches: Tensor) -> Tensor:
        """(groups, positions, taps) times the matrix, in int32."""
        if self.narrow and self.matrix[0].numel() > _SMALL and patches.numel() and _int8_products_are_exact():
            products = [torch._int_mm(rows, weight) for rows, weight in zip(patches, self.matrix, strict=True)]
            return products[0][None] if len(products) == 1 else torch.stack(products)
        return patches.int() @ self.matrix.int()


@cache
def _int8_products_are_exact() -> bool:
    """Whether torch's int8 product adds in int32 here: some processors' instructions saturate at 16 bits."""
    extremes = torch.tensor([-128, 127], dtype=torch.int8)
    left = extremes.repeat_interleave(16)[:, None].expand(-1, 64).contiguous()
    try:
        return torch.equal(torch._int_mm(left, left.T.contiguous()), left.int() @ left.int().T)
    except RuntimeError:
        return False
