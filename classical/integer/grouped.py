"""Sums of many groups with few products each, such as a convolution of every channel apart: integer multiplications."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from classical.integer.planes import Indices, Layout, layout, over_tiles, pad, phases, tap_places, unpadded
from classical.integer.sums import InputCode, Sums, load_kernels
from classical.layers import Geometry

PRODUCTS = 64  # an output, up to which a matrix product for each group is slower


@dataclass(frozen=True)
class _Plan:
    """What depends on the shape of a batch alone."""

    shape: torch.Size
    layout: Layout
    tiles: Indices
    offsets: Indices


class GroupedSums(Sums):
    """Sums of weight * code, tap after tap for all positions of a tile.

    Args:
        weight, geometry, code, constant, shift: as for Sums.
        threads: tiles of the batch run in so many threads.

    Attributes:
        taps: (terms, outputs, taps), int32.
    """

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
        super().__init__(weight, geometry, code, constant, shift)
        load_kernels("numba")
        self.threads = threads
        self._plan: _Plan | None = None
        self.register_buffer("taps", weight.flatten(2).int())

    def accumulate(self, codes: Tensor) -> Tensor:
        """(images, channels, height, width) codes to (terms, images, outputs, height', width') accumulators."""
        kernels = load_kernels("numba")
        geometry = self.geometry
        if geometry.padding_mode != "zeros":
            codes, geometry = pad(codes, geometry, 0), unpadded(geometry)
        plan = self._prepared(geometry, codes.shape)
        layout = plan.layout
        pixels = codes.to(self.code.dtype).contiguous().numpy()
        planes = np.full(layout.shape(geometry.in_channels, geometry), self.code.zero, pixels.dtype)
        kernels.place(pixels, geometry.rows.before, geometry.columns.before, planes)
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

    def _prepared(self, geometry: Geometry, shape: torch.Size) -> _Plan:
        plan = self._plan
        if plan is None or plan.shape != shape:
            found = layout(geometry, shape)
            phase, down, right = tap_places(geometry)
            channel = np.arange(geometry.in_channels).reshape(geometry.groups, -1, 1)
            offsets = (channel * phases(geometry) + phase) * found.size + down * found.columns + right
            self._plan = plan = _Plan(shape, found, found.tiles(), offsets.reshape(geometry.groups, -1))
        return plan
