"""From accumulators to codes by fixed-point multiplications: no real number is left.

    code = clip((sum over terms of m n + offset) 2^-shift),   m = round(2^shift factor / S_out)

n being accumulators, m integers of 31 bits, or of more if they must, and the sum an int64; the offset holds bias, zero
point and half a level, so that the shift rounds.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from classical.integer.codes import InputCode, input_code, rounds_to_nearest, thresholds
from classical.integer.loading import Kernels, load_kernels
from classical.integer.sums import per_channel, weighted
from classical.quantizers import Quantizer

INT32_MAX = 2**31 - 1
_HEADROOM = 62  # bits that products and offset may fill together


def fixed_point(factor: Tensor) -> tuple[Tensor, Tensor]:
    """Write factors as multiplier * 2^-shift, the multiplier a 31-bit integer.

    Args:
        factor: real numbers in 2^-32 ... 2^29, or 0.

    Returns:
        multiplier, int64 in [2^30, 2^31) (0 for 0), and shift, int64 in 1 ... 62.

    Raises:
        ValueError: a factor out of range.
    """
    mantissa, exponent = torch.frexp(factor.double())
    multiplier = (mantissa * 2**31).round().long()
    carried = multiplier == 2**31  # rounded up to 1: halve it
    multiplier = torch.where(carried, multiplier >> 1, multiplier)
    shift = 31 - exponent.long() - carried.long()
    if ((shift < 1) | (shift > 62)).any():
        raise ValueError(
            f"the multipliers are {factor.min():.3g} ... {factor.max():.3g} but must lie in 2^-32 ... 2^29: "
            "calibrate the output quantizer on this layer's outputs"
        )
    return multiplier, shift


class Rescale(nn.Module):
    """Integers in steps of a new size, rounded and clipped, from integers with real factors.

    The result is at most one level from the real number rounded: half a level is rounding, and what the multipliers'
    rounding can add is checked to be less than half.

    Args:
        factors: (terms, channels), real value of one step of each term, over that of the result's.
        offset: (channels,), what is added, in steps of the result.
        reach: (terms, channels), upper bounds of the terms' sizes.
        low, high: what the result is clipped to.
        dtype: of the result.
        trailing: axes behind the channels: 2 for images, 0 for vectors.
        kernels: "torch" for no compiled loops; see `integer_twin`.
        room: how many steps of the result from 0 the integers must hold, at least.

    Attributes:
        multiplier: (terms, channels), int64.
        offset: (channels,), int64, in steps of 2^-shift, half a step of the result included.
        shift: (channels,), int64.

    Raises:
        ValueError: factors above 2^29, or so different in size that 64 bits do not hold their sum exactly enough.

    Source: Jacob et al., arXiv:1712.05877, equations 5 and 6.
    """

    multiplier: Tensor
    offset: Tensor
    shift: Tensor

    def __init__(
        self,
        factors: Tensor,
        offset: Tensor,
        reach: Tensor,
        low: int,
        high: int,
        dtype: torch.dtype,
        trailing: int,
        kernels: Kernels = "auto",
        room: float = 0.0,
    ) -> None:
        super().__init__()
        self.low, self.high, self.dtype, self.trailing = low, high, dtype, trailing
        self.compiled = load_kernels(kernels) is not None
        factors = torch.where(reach > 0, factors, torch.zeros_like(factors))  # dead channels may have any factor
        _, shift = fixed_point(factors.abs().amax(0).clamp(min=2.0**-32))
        # Large terms of small factors want more bits, so that rounding their multipliers moves a code in a million at
        # most; of a result that can lie far outside of its range, fewer fit.
        precise = (2.0**19 * (reach.sum(0) + 1)).log2().ceil().long()
        bound = (factors.abs() * reach).sum(0) + offset.abs() + 1 + room
        shift = torch.minimum(torch.maximum(shift, precise), _HEADROOM - bound.log2().ceil().long()).clamp(max=62)
        error = (reach.sum(0) + 1) * torch.exp2(-shift.double() - 1)
        if not (error < 0.5).all():
            worst = int(error.argmax())
            raise ValueError(
                f"channel {worst} can be off by {error[worst]:.3g} levels: its offset is {offset[worst]:.3g} levels, "
                f"its factors are {factors[:, worst].tolist()}; calibrate the next quantizer on its inputs"
            )
        unit = torch.exp2(shift.double())
        self.register_buffer("multiplier", (factors * unit).round().long())
        self.register_buffer("offset", ((offset + 0.5) * unit).round().long())
        self.register_buffer("shift", shift)

    def forward(self, *terms: Tensor) -> Tensor:
        """Integers of shape (batch, channels, ...), one tensor a term."""
        if self.compiled and all(term.dtype == torch.int32 for term in terms):
            return self._fused(terms)
        codes = self._total(terms) >> per_channel(self.shift, self.trailing)
        return codes.clamp_(self.low, self.high).to(self.dtype)

    def _fused(self, terms: Sequence[Tensor]) -> Tensor:
        """The same in one pass over the terms, in the order in which they lie in memory."""
        kernels = load_kernels("numba")
        rows = self.trailing == 0 or (terms[0].dim() == 4 and not terms[0].is_contiguous())
        if rows:
            terms = [term.movedim(-1 - self.trailing, -1) for term in terms]
        terms = [term.contiguous() for term in terms]
        out = torch.empty_like(terms[0], dtype=self.dtype)
        shape = (-1, out.shape[-1]) if rows else (*out.shape[:2], -1)
        kernel = kernels.rescale_rows if rows else kernels.rescale_planes
        if out.numel():
            kernel(
                tuple(term.reshape(shape).numpy() for term in terms),
                self.multiplier.numpy(),
                self.offset.numpy(),
                self.shift.numpy(),
                self.low,
                self.high,
                out.reshape(shape).numpy(),
            )
        return out.movedim(-1, -1 - self.trailing) if rows else out

    def _total(self, terms: Sequence[Tensor]) -> Tensor:
        return weighted(terms, self.multiplier, self.trailing).add_(per_channel(self.offset, self.trailing))

    def extra_repr(self) -> str:
        """Show terms, channels and range."""
        return f"{tuple(self.multiplier.shape)} to {self.low} ... {self.high}"


class Compare(Rescale):
    """Codes of a quantizer that does not round to the nearest: how many of its thresholds are reached.

    Args:
        factors, offset, reach: as for Rescale, in units of any size.
        thresholds: (codes - 1,), ascending, in the same units.
        code: of the result.

    Raises:
        ValueError: as for Rescale; thresholds that are not ascending.
    """

    thresholds: Tensor

    def __init__(
        self, factors: Tensor, offset: Tensor, reach: Tensor, thresholds: Tensor, code: InputCode, trailing: int
    ) -> None:
        if not (thresholds.diff() > 0).all():
            raise ValueError(f"thresholds are {thresholds.tolist()} but must be ascending")
        # A channel may reach far less than the thresholds: they must fit into the same integers.
        room = float(thresholds.abs().max())
        super().__init__(factors, offset, reach, code.low, code.high, code.dtype, trailing, room=room)
        self.step = code.step
        # The half step that the offset holds for rounding is passed on to the thresholds.
        unit = torch.exp2(self.shift.double())
        scaled = (thresholds[:, None] * unit).ceil().long() + (unit / 2).long()
        self.register_buffer("thresholds", scaled)

    def forward(self, *terms: Tensor) -> Tensor:
        """Codes of shape (batch, channels, ...), one tensor of accumulators a term."""
        total = self._total(terms)
        codes = torch.full_like(total, self.low, dtype=self.dtype)
        for threshold in self.thresholds:
            codes += self.step * (total >= per_channel(threshold, self.trailing))
        return codes


def rescale(
    factors: Tensor,
    offset: Tensor,
    reach: Tensor,
    output: Quantizer,
    like: Tensor,
    trailing: int,
    kernels: Kernels = "auto",
) -> Rescale:
    """The map from accumulators to the codes of an activation quantizer.

    Args:
        factors: (terms, channels), float64: real value of one step of each term.
        offset: (channels,), float64, real.
        reach: (terms, channels): upper bounds of the terms' sizes.
        output: the quantizer, calibrated.
        like: a tensor of the type in which it computes.
        trailing, kernels: as for Rescale.

    Raises:
        ValueError: as for Rescale; a quantizer without integer codes.
    """
    code = input_code(output, like)
    found = thresholds(output, like)
    factors, offset = factors / code.scale, offset / code.scale
    if rounds_to_nearest(found, code):
        return Rescale(factors, offset + code.zero, reach, code.low, code.high, code.dtype, trailing, kernels)
    return Compare(factors, offset, reach, found / code.scale, code, trailing)
