"""Sums of products of signs as popcounts: 64 channels a word, one XOR and one popcount for 64 products.

    sum of w x over n signs = n - 2 popcount(bits of w XOR bits of x)

A padded zero is no sign. Its bits read as -1, and what that took away is given back: it is the same for every image.

Source: Rastegari et al., arXiv:1603.05279, section 3.2; Hubara et al., arXiv:1602.02830, section 1.4.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from classical.integer.planes import Indices, Layout, layout, over_tiles, pad, phases, tap_places, unpadded
from classical.integer.sums import InputCode, Sums, load_kernels
from classical.layers import Axis, Geometry


@dataclass(frozen=True)
class _Plan:
    """What depends on the shape of a batch alone."""

    shape: torch.Size
    layout: Layout
    tiles: Indices
    offsets: Indices
    base: NDArray[np.int32]


class BitSums(Sums):
    """Sums of signs times signs; reads codes -1 and 1, or real numbers of which only the sign is read.

    Args:
        weight, geometry, code, constant, shift: as for Sums; one term.
        threads: tiles of the batch run in so many threads.

    Attributes:
        words: (outputs, words * taps), 64 signs a word (int64); for a group of inputs, word after word, tap after tap.
    """

    words: Tensor

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
        bits = (weight[0] > 0).flatten(2).numpy()
        bits = np.pad(bits, ((0, 0), (0, -bits.shape[1] % 64), (0, 0)))
        bits = bits.reshape(len(bits), -1, 64, bits.shape[-1]).astype(np.uint64)
        words = np.bitwise_or.reduce(bits << np.arange(64, dtype=np.uint64)[:, None], 2)
        self.register_buffer("words", torch.from_numpy(words.reshape(len(bits), -1).view(np.int64)))

    def accumulate(self, codes: Tensor) -> Tensor:
        """(images, channels, height, width) codes or reals to (1, images, outputs, height', width') accumulators."""
        ones = torch.ones_like(self.constant[0])
        return self._run(codes, ones, torch.zeros_like(ones))[None]

    def scaled(self, codes: Tensor, factors: Tensor, offset: Tensor) -> Tensor:
        """Codes or reals to real numbers: see Sums."""
        return self._run(codes, factors[0], offset)

    def _run(self, codes: Tensor, factors: Tensor, offset: Tensor) -> Tensor:
        kernels = load_kernels("numba")
        geometry = self.geometry
        if geometry.padding_mode != "zeros":
            codes, geometry = pad(codes, geometry, 0), unpadded(geometry)
        plan = self._prepared(geometry, codes.shape)
        layout = plan.layout
        readable = codes.float() if codes.dtype in (torch.float16, torch.bfloat16) else codes
        count = plan.offsets.size // (geometry.rows.kernel * geometry.columns.kernel)  # words of a pixel
        words = np.empty((layout.images, count, *codes.shape[2:]), np.uint64)
        images = readable.detach().contiguous().flatten(2).numpy()
        kernels.pack(images, geometry.groups, words.reshape(layout.images, count, images.shape[2]))
        planes = np.zeros((count * phases(geometry), layout.size), np.uint64)
        kernels.place(
            words, geometry.rows.before, geometry.columns.before, planes.reshape(layout.shape(count, geometry))
        )
        out = torch.empty((layout.images, len(offset), layout.height, layout.width), dtype=factors.dtype)

        def part(tiles: Indices) -> None:
            kernels.disagreements(
                planes.reshape(-1),
                layout.rows,
                layout.columns,
                tiles,
                plan.offsets,
                self.words.numpy().view(np.uint64),
                self.shift,
                plan.base,
                factors.numpy(),
                offset.numpy(),
                out.numpy(),
            )

        over_tiles(part, plan.tiles, self.threads)
        return out

    def _prepared(self, geometry: Geometry, shape: torch.Size) -> _Plan:
        plan = self._plan
        if plan is None or plan.shape != shape:
            found = layout(geometry, shape)
            phase, down, right = tap_places(geometry)
            count = geometry.groups * self.words.shape[1] // len(phase)
            word = np.arange(count).reshape(geometry.groups, -1, 1)
            offsets = (word * phases(geometry) + phase) * found.size + down * found.columns + right
            tiles = found.tiles()
            base = self._base(geometry, found, shape, found.longest(tiles))
            plan = _Plan(shape, found, tiles, offsets.reshape(geometry.groups, -1), base)
            self._plan = plan
        return plan

    def _base(self, geometry: Geometry, layout: Layout, shape: torch.Size, longest: int) -> NDArray[np.int32]:
        """What accumulators are where no bit differs: (outputs, positions of an image, or of a tile of several)."""
        rows = _inside(geometry.rows, layout.height, shape[2])
        columns = _inside(geometry.columns, layout.width, shape[3])
        weight = self.weight[0].sum(1, dtype=torch.int32).numpy()  # over channels
        seen = rows @ (weight @ columns.T)  # (outputs, height, width): the sum of the weights that see no padding
        products = self.weight[0, 0].numel()
        image = np.zeros((len(weight), layout.rows, layout.columns), np.int32)
        image[:, : layout.height, : layout.width] = products + weight.sum((1, 2), dtype=np.int32)[:, None, None] - seen
        image = (image << self.shift) + self.constant[0].numpy()[:, None, None]
        return np.tile(image.reshape(len(weight), -1), (1, -(-longest // (layout.rows * layout.columns))))


def _inside(axis: Axis, outputs: int, size: int) -> NDArray[np.int32]:
    """(outputs, taps): 1 where a tap reads a pixel, 0 where it reads padding."""
    at = np.arange(outputs)[:, None] * axis.stride + np.arange(axis.kernel) * axis.dilation - axis.before
    return ((at >= 0) & (at < size)).astype(np.int32)
