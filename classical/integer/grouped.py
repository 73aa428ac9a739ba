"""Sums of many groups with few products each, such as a convolution of every channel apart: integer multiplications."""

import torch
from torch import Tensor

from classical.integer.codes import InputCode
from classical.integer.loading import load_kernels
from classical.integer.planes import Indices, Layout, PlaneSums, group_offsets, over_tiles
from classical.layers import Geometry

PRODUCTS = 64  # an output, up to which a matrix product for each group is slower


class GroupedSums(PlaneSums):
    """Sums of weight * code, tap after tap for all positions of a tile.

    Args:
        weight, geometry, code, constant, shift, threads: as for PlaneSums.

    Attributes:
        taps: (terms, outputs, taps), int32.
    """

    tile = 1024  # their sums fit in the nearest cache
    taps: Tensor

    def __init__(
        self,
        weight: Tensor,
        geometry: Geometry,
        code: InputCode,
        constant: Tensor,
        shift: int = 0,
        threads: int = 1,
    ) -> None:
        super().__init__(weight, geometry, code, constant, shift, threads)
        self.register_buffer("taps", weight.flatten(2).int())

    def accumulate(self, codes: Tensor) -> Tensor:
        """(images, channels, height, width) codes to (terms, images, outputs, height', width') accumulators."""
        kernels = load_kernels("numba")
        codes, plan = self.plan(codes)
        layout = plan.layout
        planes = self.planes(codes.to(self.code.dtype).numpy(), plan, self.code.zero)
        terms, outputs = self.taps.shape[:2]
        out = torch.empty((terms, layout.images, outputs, layout.height, layout.width), dtype=torch.int32)

        def part(tiles: Indices) -> None:
            kernels.weigh(
                planes.reshape(-1),
                layout.rows,
                layout.columns,
                tiles,
                plan.offsets,
                self.taps.numpy(),
                self.shift,
                self.constant.numpy(),
                out.numpy(),
            )

        over_tiles(part, plan.tiles, self.threads)
        return out

    def offsets(self, geometry: Geometry, layout: Layout) -> Indices:
        """(groups, taps): where the runs of a group begin."""
        return group_offsets(geometry, layout, geometry.in_channels)
