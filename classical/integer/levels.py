"""Reduce and scale: weights of few levels add up their inputs level by level, and multiply once a level.

    c = W_p sum of a over I_p - W_n sum of a over I_n,   W_p, W_n > 0

for ternary weights {-W_n, 0, W_p}; N-ary ones have a sum for every level but 0. Two levels of opposite value share one
sum, in which one of them is subtracted.

Source: Zhu et al., arXiv:1612.01064 (trained ternary weights); Schindler et al., arXiv:1911.13161 (N-ary, sparse sums).
"""

import numpy as np
import torch
from torch import Tensor

from classical.integer.codes import InputCode
from classical.integer.loading import load_kernels
from classical.integer.planes import Indices, Layout, PlaneSums, over_tiles, phases, tap_places
from classical.layers import Geometry
from classical.quantizers import Codebook


def level_terms(book: Codebook) -> tuple[Tensor, Tensor]:
    """Split weights into terms of -1, 0 and 1 and a real factor for each: weight = sum over terms of factor * term.

    Args:
        book: indices (outputs, ...) into levels (L,) or (outputs, L).

    Returns:
        terms (terms, outputs, ...) int8 and factors (terms, outputs) float64, which are positive wherever a level has
        the same sign in all channels. Weights that are all 0 are one term of factor 0.
    """
    outputs = len(book.codes)
    levels = book.levels.double().expand(outputs, -1)  # (L,) or (outputs, L)
    left = [k for k in range(levels.shape[1]) if levels[:, k].any()]
    terms, factors = [], []
    while left:
        k = left.pop()  # the largest first, which is not negative in most books
        sign = -1 if (levels[:, k] <= 0).all() else 1
        term = sign * (book.codes == k).to(torch.int8)
        opposite = next((m for m in left if torch.equal(levels[:, m], -levels[:, k])), None)
        if opposite is not None:
            left.remove(opposite)
            term -= sign * (book.codes == opposite).to(torch.int8)
        terms.append(term)
        factors.append(sign * levels[:, k])
    if not terms:
        return torch.zeros_like(book.codes, dtype=torch.int8)[None], levels.new_zeros(1, outputs)
    return torch.stack(terms), torch.stack(factors)


class LevelSums(PlaneSums):
    """Sums of weights -1, 0 and 1 by additions alone, over lists of the inputs that each output adds or subtracts.

    8-bit codes add up in 16 bits, whose sum is moved to 32 before it could overflow: 256 codes of at most 255 fit.

    Args:
        weight, geometry, code, constant, shift, threads: as for PlaneSums.

    Attributes:
        runs: (3, addends): plane, rows down and columns right of all that is added, list after list.
        starts: (outputs, lists + 1): where the lists of an output begin in runs.
        lists: (terms + 1,): where the lists of a term begin.
        signs: (lists,).
        start: (terms, outputs): the constant, corrected for how codes are stored.
    """

    tile = 4096  # long loops, whose partial sums of 16 bits still fit in the nearest cache
    runs: Tensor
    starts: Tensor
    lists: Tensor
    signs: Tensor
    start: Tensor

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
        self.narrow = code.dtype == torch.int8
        kernels = load_kernels("numba")
        terms, outputs, inputs = weight.shape[:3]
        spare = geometry.in_channels * phases(geometry)  # the plane behind all others holds zeros: it fills lists up
        phase, down, right = tap_places(geometry)
        signs = [(term, sign) for term in range(terms) for sign in (1, -1) if (weight[term] == sign).any()]
        zeros = np.array([[spare], [0], [0]])
        found = weight.flatten(3).numpy()
        lists = [np.zeros((3, 0), np.int64)]
        for o in range(outputs):
            first = o // (outputs // geometry.groups) * inputs
            for term, sign in signs:
                channel, tap = np.nonzero(found[term, o] == sign)
                runs = np.stack(((first + channel) * phases(geometry) + phase[tap], down[tap], right[tap]))
                lists.append(np.concatenate((runs, zeros.repeat(-len(tap) % kernels.RUNS, 1)), 1))
        edges = np.cumsum([part.shape[1] for part in lists])
        each = np.arange(outputs)[:, None] * len(signs) + np.arange(len(signs) + 1)
        for name, values in (
            ("runs", np.concatenate(lists, 1)),
            ("starts", edges[each]),
            ("lists", np.searchsorted([term for term, _ in signs], np.arange(terms + 1))),
            ("signs", np.array([sign for _, sign in signs], np.int64)),
        ):
            self.register_buffer(name, torch.from_numpy(values))
        # 8-bit codes are stored without their sign, 128 higher, so that 16 bits hold 256 of them.
        self.rise = 128 if self.narrow else 0
        raised = self.rise * weight.flatten(2).sum(-1, dtype=torch.int32) << shift
        self.register_buffer("start", self.constant - raised)

    def accumulate(self, codes: Tensor) -> Tensor:
        """(images, channels, height, width) codes to (terms, images, outputs, height', width') accumulators."""
        ones = torch.ones_like(self.constant)
        return self._run(codes, len(ones), ones, torch.zeros_like(ones[0]))

    def scaled(self, codes: Tensor, factors: Tensor, offset: Tensor) -> Tensor:
        """Codes to real numbers: see Sums."""
        return self._run(codes, 1, factors, offset)[0]

    def _run(self, codes: Tensor, kept: int, factors: Tensor, offset: Tensor) -> Tensor:
        kernels = load_kernels("numba")
        codes, plan = self.plan(codes)
        layout = plan.layout
        pixels = codes.numpy().view(np.uint8) ^ np.uint8(self.rise) if self.narrow else codes.int().numpy()
        planes = self.planes(pixels, plan, self.code.zero + self.rise, spare=1)
        shape = (kept, layout.images, len(offset), layout.height, layout.width)
        out = torch.empty(shape, dtype=factors.dtype)

        def part(tiles: Indices) -> None:
            kernels.reduce(
                planes.reshape(-1),
                layout.rows,
                layout.columns,
                tiles,
                self.starts.numpy(),
                plan.offsets,
                self.lists.numpy(),
                self.signs.numpy(),
                self.shift,
                self.start.numpy(),
                factors.numpy(),
                offset.numpy(),
                256 if self.narrow else 2**30,
                np.empty(layout.longest(tiles), np.uint16 if self.narrow else np.int32),
                out.numpy(),
            )

        over_tiles(part, plan.tiles, self.threads)
        return out

    def offsets(self, geometry: Geometry, layout: Layout) -> Indices:
        """(addends,): where the runs begin."""
        channel, down, right = self.runs
        found: Indices = (channel * layout.size + down * layout.columns + right).numpy()
        return found
