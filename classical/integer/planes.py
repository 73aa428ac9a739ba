"""Where the planes of a convolution's inputs lie: the arithmetic of indices that the compiled loops share.

With stride s, one tap reads one phase (row mod s, column mod s) of the padded input. Each phase of each channel is a
plane, rows of all images one after the other; then all outputs of a tile see a tap at consecutive places, and the tap
is known by one offset.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from classical.integer.codes import InputCode
from classical.integer.loading import load_kernels
from classical.integer.sums import Sums
from classical.layers import Geometry

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Layout:
    """The planes of a batch of images and the outputs computed of them.

    Attributes:
        rows, columns: of one image in a plane.
        height, width: of one output.
    """

    images: int
    rows: int
    columns: int
    height: int
    width: int

    @property
    def size(self) -> int:
        """Positions of one plane."""
        return self.images * self.rows * self.columns

    def shape(self, channels: int, geometry: Geometry) -> tuple[int, ...]:
        """(channels, stride, stride, images, rows, columns): the planes of so many channels."""
        return (channels, geometry.rows.stride, geometry.columns.stride, self.images, self.rows, self.columns)

    def tiles(self, positions: int) -> Indices:
        """Parts of all rows, of about so many positions: whole images, or rows of one.

        Returns:
            (tiles, 2): first row, counted through all images, and number of rows.
        """
        together = max(1, positions // (self.rows * self.columns))
        if together > 1:
            starts = range(0, self.images, together)
            counts = [min(together, self.images - b) for b in starts]
            found = [(b * self.rows, (n - 1) * self.rows + self.height) for b, n in zip(starts, counts, strict=True)]
        else:
            parts = -(-self.height // max(1, positions // self.columns))
            edges = [self.height * part // parts for part in range(parts + 1)]
            rows = [(top, end - top) for top, end in pairwise(edges)]
            found = [(b * self.rows + top, count) for b in range(self.images) for top, count in rows]
        return np.array(found, np.int64).reshape(-1, 2)

    def longest(self, tiles: Indices) -> int:
        """Positions of the largest tile."""
        return int((tiles[:, 1].max(initial=1) - 1) * self.columns + self.width)


def layout(geometry: Geometry, shape: torch.Size) -> Layout:
    """The layout for a batch of shape (images, channels, height, width).

    Raises:
        ValueError: The batch does not fit the layer.
    """
    images, *image = shape
    _, height, width = geometry.output_shape(tuple(image))
    axes = (geometry.rows, geometry.columns)
    padded = [size + axis.before + axis.after for size, axis in zip(image[1:], axes, strict=True)]
    rows, columns = (-(-size // axis.stride) for size, axis in zip(padded, axes, strict=True))
    return Layout(images, rows, columns, height, width)


def tap_places(geometry: Geometry) -> tuple[Indices, Indices, Indices]:
    """Phase, rows down and columns right of every tap, row after row."""
    (down, row), (right, column) = (
        np.divmod(np.arange(axis.kernel) * axis.dilation, axis.stride) for axis in (geometry.rows, geometry.columns)
    )
    phase = row[:, None] * geometry.columns.stride + column
    ones = np.ones_like(phase)
    return phase.ravel(), (down[:, None] * ones).ravel(), (right * ones).ravel()


def phases(geometry: Geometry) -> int:
    """Planes of one channel."""
    return geometry.rows.stride * geometry.columns.stride


def pad(x: Tensor, geometry: Geometry, fill: int) -> Tensor:
    """Pad a batch of images; torch's own reflect and replicate refuse integers."""
    rows, columns = geometry.rows, geometry.columns
    if geometry.padding_mode == "zeros":
        ends = (columns.before, columns.after, rows.before, rows.after)
        return nn.functional.pad(x, ends, value=fill) if any(ends) else x
    for dim, axis in ((2, rows), (3, columns)):
        size = x.shape[dim]
        source = torch.arange(-axis.before, size + axis.after, device=x.device)
        if geometry.padding_mode == "circular":
            source = source % size
        elif geometry.padding_mode == "replicate":
            source = source.clamp(0, size - 1)
        else:  # reflect: about the first and the last pixel
            source = (size - 1) - ((size - 1) - source.abs()).abs()
        x = x.index_select(dim, source)
    return x


def unpadded(geometry: Geometry) -> Geometry:
    """The geometry that sees an input which is already padded."""
    axes = (replace(axis, before=0, after=0) for axis in (geometry.rows, geometry.columns))
    rows, columns = axes
    return replace(geometry, rows=rows, columns=columns, padding_mode="zeros")


@dataclass(frozen=True)
class Plan:
    """What a loop needs of the shape of a batch alone.

    Attributes:
        shape: of the batch, padded if padding is not zeros.
        geometry: of the convolution of such a batch.
        tiles: of the layout.
        offsets: of all runs, in the shape in which the loop takes them.
        base: what else the loop reads; empty if nothing.
    """

    shape: torch.Size
    geometry: Geometry
    layout: Layout
    tiles: Indices
    offsets: Indices
    base: NDArray[np.int32]


class PlaneSums(Sums):
    """Sums by a compiled loop over tiles of planes.

    Args:
        weight, geometry, code, constant, shift: as for Sums.
        threads: tiles run in so many threads.

    Raises:
        ImportError: without numba.
    """

    tile: ClassVar[int]  # positions of a tile

    def __init__(
        self,
        weight: Tensor,
        geometry: Geometry,
        code: InputCode,
        constant: Tensor,
        shift: int = 0,
        threads: int = 1,
    ) -> None:
        load_kernels("numba")
        super().__init__(weight, geometry, code, constant, shift)
        self.threads = threads
        self._plan: Plan | None = None

    def plan(self, codes: Tensor) -> tuple[Tensor, Plan]:
        """The batch as it is laid out in planes, contiguous, and its plan, which is kept for batches of its shape."""
        geometry = self.geometry
        if geometry.padding_mode != "zeros":
            codes, geometry = pad(codes, geometry, 0), unpadded(geometry)
        plan = self._plan
        if plan is None or plan.shape != codes.shape:
            found = layout(geometry, codes.shape)
            tiles = found.tiles(min(self.tile, -(-found.size // self.threads)))
            base = self.base(geometry, found, codes.shape, found.longest(tiles))
            plan = Plan(codes.shape, geometry, found, tiles, self.offsets(geometry, found), base)
            self._plan = plan
        return codes.contiguous(), plan

    def offsets(self, geometry: Geometry, layout: Layout) -> Indices:
        """Where all runs begin."""
        raise NotImplementedError

    def base(self, geometry: Geometry, layout: Layout, shape: torch.Size, longest: int) -> NDArray[np.int32]:
        """What else depends on the shape; nothing unless overridden."""
        return np.zeros((0, 0), np.int32)

    def planes(self, pixels: NDArray[Any], plan: Plan, fill: int, spare: int = 0) -> NDArray[Any]:
        """(planes, positions): a batch (images, channels, height, width) in planes, padded with `fill`.

        Behind them are so many spare planes of zeros.
        """
        geometry, channels = plan.geometry, pixels.shape[1]
        count = channels * phases(geometry)
        planes = np.full((count + spare, plan.layout.size), fill, pixels.dtype)
        planes[count:] = 0
        ends = (geometry.rows.before, geometry.columns.before)
        load_kernels("numba").place(pixels, *ends, planes[:count].reshape(plan.layout.shape(channels, geometry)))
        return planes


def group_offsets(geometry: Geometry, layout: Layout, channels: int) -> Indices:
    """(groups, channels of a group * taps): where the runs of a group begin; every output of it reads them all.

    Args:
        geometry, layout: of the batch.
        channels: planes of all groups, phases not counted.
    """
    phase, down, right = tap_places(geometry)
    channel = np.arange(channels).reshape(geometry.groups, -1, 1)
    offsets = (channel * phases(geometry) + phase) * layout.size + down * layout.columns + right
    return offsets.reshape(geometry.groups, -1)


def over_tiles(run: Callable[[Indices], None], tiles: Indices, threads: int) -> None:
    """Run a compiled loop over all tiles, in threads of our own."""
    if threads == 1 or len(tiles) < 2:
        run(tiles)
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(run, np.array_split(tiles, min(threads, len(tiles)))))
