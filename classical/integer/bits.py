"""Sums as popcounts: 64 channels a word, an XOR, an AND and a popcount for 64 products.

Inputs of few bits are a + d (b_0 + 2 b_1 + 4 b_2 ...), signs for instance -1 + 2 b_0. With n set where weights are -1
and m where they are -1 or 1,
    sum of w x = a sum of w + d sum over k of 2^k (popcount((b_k XOR n) AND m) - popcount(n)).
The AND is left out where no weight is 0.

Padding holds the code of 0, which is no sign. It is read as the lowest code, and what that took away is given back: it
is the same for every image.

Source: Rastegari et al., arXiv:1603.05279, section 3.2, for signs; Zhou et al., arXiv:1606.06160, equation 3, for bits.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from classical.integer.codes import InputCode
from classical.integer.loading import load_kernels
from classical.integer.planes import Indices, Layout, PlaneSums, group_offsets, over_tiles
from classical.layers import Axis, Geometry

_ADDITIONS = 14  # of 8-bit codes that take the time of 64 products of bits


class BitSums(PlaneSums):
    """Sums of weights -1, 0 and 1 times inputs of few bits, of which signs also are read from real numbers.

    Args:
        weight, geometry, code, constant, shift, threads: as for PlaneSums.

    Attributes:
        signs: whether inputs are -1 and 1.
        bits: of an input.
        words: (terms, outputs, words), 64 bits a word (int64), set for -1; word after word of a group's channels, tap
            after tap.
        masks: (terms, outputs, words), set for -1 and 1; without outputs if no weight is 0.
    """

    tile = 1024  # their words and sums fit in the nearest cache
    words: Tensor
    masks: Tensor

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
        self.signs = (code.low, code.step, code.high) == (-1, 2, 1)
        self.bits = code.bits
        self.register_buffer("words", _packed(weight < 0))
        self.register_buffer("masks", _packed(weight != 0) if (weight == 0).any() else self.words[:, :0])

    @staticmethod
    def pays(weight: Tensor, code: InputCode) -> bool:
        """Whether popcounts are faster than additions for weights of -1, 0 and 1: few bits, few zeros."""
        terms, outputs, inputs = weight.shape[:3]
        words = terms * outputs * weight[0, 0, 0].numel() * -(-inputs // 64)
        signs = code.step == 2 and code.bits == 1
        return (
            (signs or code.step == 1)
            and code.bits <= 4
            and code.bits * words * _ADDITIONS <= 64 * int((weight != 0).sum())
        )

    def accumulate(self, codes: Tensor) -> Tensor:
        """(images, channels, height, width) codes to (terms, images, outputs, height', width') accumulators."""
        ones = torch.ones_like(self.constant)
        return torch.stack(self._run(codes, ones)) if len(ones) > 1 else self._run(codes, ones)[0][None]

    def scaled(self, codes: Tensor, factors: Tensor, offset: Tensor) -> Tensor:
        """Codes, or reals where signs are read, to real numbers: see Sums."""
        first, *rest = self._run(codes, factors, offset)
        for term in rest:
            first += term
        return first

    def _run(self, codes: Tensor, factors: Tensor, offset: Tensor | None = None) -> list[Tensor]:
        """The sums of each term times its factors; the offset is added to the first."""
        kernels = load_kernels("numba")
        codes, plan = self.plan(codes)
        layout = plan.layout
        readable = codes.float() if codes.dtype in (torch.float16, torch.bfloat16) else codes
        images = readable.detach().flatten(2).numpy()
        words = np.empty((self.bits, len(images), self._words(), images.shape[2]), np.uint64)
        low = 0 if self.signs else self.code.low + (self.bits == 1)
        kernels.pack(images, self.geometry.groups, low, self.bits, words)
        shape = (*words.shape[1:3], *codes.shape[2:])
        planes = np.stack([self.planes(word.reshape(shape), plan, 0).reshape(-1) for word in words])
        nothing = torch.zeros_like(factors[0])
        found: list[Tensor] = []
        for term, factor in enumerate(factors):
            out = torch.empty((layout.images, len(factor), layout.height, layout.width), dtype=factor.dtype)
            extra = nothing if term or offset is None else offset

            def part(tiles: Indices, term: int = term, factor: Tensor = factor, extra: Tensor = extra) -> None:
                kernels.agreements(
                    planes,
                    layout.rows,
                    layout.columns,
                    tiles,
                    plan.offsets,
                    self.words[term].numpy().view(np.uint64),
                    self.masks[term].numpy().view(np.uint64),
                    self.shift + (self.code.step == 2),
                    plan.base[term],
                    factor.numpy(),
                    extra.numpy(),
                    found[-1].numpy(),
                )

            found.append(out)
            over_tiles(part, plan.tiles, self.threads)
        return found

    def _words(self) -> int:
        """Words of a pixel."""
        return self.geometry.groups * self.words.shape[2] // self.weight[0, 0, 0].numel()

    def offsets(self, geometry: Geometry, layout: Layout) -> Indices:
        """(groups, words): where the runs of a group begin."""
        return group_offsets(geometry, layout, self._words())

    def base(self, geometry: Geometry, layout: Layout, shape: torch.Size, longest: int) -> NDArray[np.int32]:
        """What accumulators are where no bit agrees: (terms, outputs, positions of an image, or of a larger tile)."""
        rows = _inside(geometry.rows, layout.height, shape[2])
        columns = _inside(geometry.columns, layout.width, shape[3])
        weight = self.weight.sum(2, dtype=torch.int32).numpy()  # over channels
        seen = rows @ (weight @ columns.T)  # (terms, outputs, height, width): the weights that see no padding
        total = weight.sum((2, 3), dtype=np.int32)[..., None, None]
        negative = (self.weight < 0).flatten(2).sum(-1, dtype=torch.int32).numpy()[..., None, None]
        code = self.code
        padded = code.zero * (total - seen) + code.low * seen
        image = np.zeros((*weight.shape[:2], layout.rows, layout.columns), np.int32)
        image[..., : layout.height, : layout.width] = padded - code.step * (2**self.bits - 1) * negative
        image = (image << self.shift) + self.constant.numpy()[..., None, None]
        return np.tile(image.reshape(*weight.shape[:2], -1), (1, 1, -(-longest // (layout.rows * layout.columns))))


def _packed(bits: Tensor) -> Tensor:
    """(terms, outputs, channels, height, width) bools to (terms, outputs, words * taps) int64, 64 channels a word."""
    found = bits.flatten(3).numpy()
    found = np.pad(found, ((0, 0), (0, 0), (0, -found.shape[2] % 64), (0, 0)))
    found = found.reshape(*found.shape[:2], -1, 64, found.shape[3]).astype(np.uint64)
    words = np.bitwise_or.reduce(found << np.arange(64, dtype=np.uint64)[:, None], 3)
    return torch.from_numpy(words.reshape(*words.shape[:2], -1).view(np.int64))


def _inside(axis: Axis, outputs: int, size: int) -> NDArray[np.int32]:
    """(outputs, taps): 1 where a tap reads a pixel, 0 where it reads padding."""
    at = np.arange(outputs)[:, None] * axis.stride + np.arange(axis.kernel) * axis.dilation - axis.before
    return ((at >= 0) & (at < size)).astype(np.int32)
