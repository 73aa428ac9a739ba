"""Evenly spaced levels that no data need be seen for: DoReFa-Net, and HWGQ's levels for a half Gaussian."""

import math
from functools import cache

from torch import Tensor

from classical.checks import whole
from classical.quantizers.base import Codes, Quantizer, passing, sign, usable, wide


class DoReFaWeight(Quantizer):
    """Weights 2 q_k(tanh w / (2 max|tanh w|) + 1/2) - 1 with q_k(a) = round((2^k - 1) a) / (2^k - 1).

    The codes are the odd numbers from -(2^k - 1) to 2^k - 1: 0 is no level. Only the rounding is passed straight
    through; tanh and the maximum are differentiated. One bit is sign(w) E|w| with an unchanged gradient. For two bits
    and more the levels span [-1, 1] whatever the weights: a normalization should follow the layer.

    Args:
        bits: k, 1 to 8.

    Raises:
        ValueError: bits out of range.

    Source: Zhou et al., arXiv:1606.06160, equations 5 to 9.
    """

    roles = ("weight",)

    def __init__(self, bits: int = 2) -> None:
        _check_bits(bits)
        super().__init__(f"dorefa{bits}", _format(bits), range(1 - 2**bits, 2**bits, 2))

    def _squashed(self, x: Tensor) -> Tensor:
        """tanh w / max|tanh w|, in [-1, 1]."""
        squashed = wide(x).tanh()
        return squashed / usable(squashed.abs().amax())

    def encode(self, x: Tensor) -> Codes:
        """Odd codes, scale 1 / (2^k - 1), or E|w| for one bit."""
        if self.bits == 1:
            codes = sign(x)
            return Codes(codes, wide(x.detach()).abs().mean(), codes.new_zeros(()))
        codes = 2 * (self.max_code * (self._squashed(x.detach()) / 2 + 0.5)).round() - self.max_code
        return Codes(codes, codes.new_tensor(1 / self.max_code), codes.new_zeros(()))

    def surrogate(self, x: Tensor, stated: Codes) -> Tensor:
        """What is rounded; for one bit x itself."""
        return x if self.bits == 1 else self._squashed(x).to(x.dtype)

    def constants(self, weight: Tensor) -> int:
        """One scale."""
        return 1


class DoReFaActivation(Quantizer):
    """Activations q_k(clip(x, 0, 1)), codes 0 to 2^k - 1; the gradient passes where 0 <= x <= 1.

    Args:
        bits: k, 1 to 8.

    Raises:
        ValueError: bits out of range.

    Source: Zhou et al., arXiv:1606.06160, equations 5, 6 and 11.
    """

    roles = ("activation",)

    def __init__(self, bits: int = 2) -> None:
        _check_bits(bits)
        super().__init__(f"dorefa{bits}", _format(bits), range(2**bits))
        self.coding = _coding(bits)

    def encode(self, x: Tensor) -> Codes:
        """round((2^k - 1) clip(x, 0, 1)), scale 1 / (2^k - 1)."""
        codes = (wide(x.detach()).clamp(0, 1) * self.max_code).round()
        return Codes(codes, codes.new_tensor(1 / self.max_code), codes.new_zeros(()))

    def surrogate(self, x: Tensor, stated: Codes) -> Tensor:
        """x clipped to [0, 1]."""
        return passing(x, 0, 1)

    def constants(self, weight: Tensor) -> int:
        """One scale."""
        return 1


class HWGQ(Quantizer):
    """Half-wave Gaussian quantization of activations: 0 for x <= 0, else the nearest of Δ, 2Δ ... (2^b - 1)Δ.

    Δ minimizes the mean squared error for x of N(0, 1), so a batch normalization should precede the layer. No
    positive x becomes 0. The gradient passes where 0 < x <= (2^b - 1)Δ.

    Args:
        bits: b, 1 to 4.

    Raises:
        ValueError: bits out of range.

    Source: Cai et al., arXiv:1702.00953: the levels, and of the backward approximations the clipped ReLU.
    """

    roles = ("activation",)

    def __init__(self, bits: int = 2) -> None:
        if not whole(bits, 1, 4):
            raise ValueError(f"HWGQ has 1 to 4 bits, not {bits!r}: choose a name such as 'hwgq2'")
        super().__init__(f"hwgq{bits}", _format(bits), range(2**bits))
        self.coding = _coding(bits)
        self.step = half_gaussian_step(self.max_code)

    def encode(self, x: Tensor) -> Codes:
        """Codes 0 to 2^b - 1, scale Δ."""
        real = wide(x.detach())
        codes = (real / self.step).round().clamp(1, self.max_code) * (real > 0)
        return Codes(codes, codes.new_tensor(self.step), codes.new_zeros(()))

    def surrogate(self, x: Tensor, stated: Codes) -> Tensor:
        """x clipped to [0, top level], no gradient at 0."""
        return passing(x.relu(), 0, self.max_code * self.step)

    def constants(self, weight: Tensor) -> int:
        """One scale."""
        return 1


@cache
def half_gaussian_step(levels: int) -> float:
    """The Δ for which the nearest of Δ, 2Δ ... levels Δ is closest, in mean square, to the positive half of N(0, 1).

    Where the nearest level is k on (a_k, b_k), the error is stationary at
        Δ = sum_k k (φ(a_k) - φ(b_k)) / sum_k k^2 (Φ(b_k) - Φ(a_k)),
    which is iterated: each round lowers the error.
    """

    def density(x: float) -> float:
        return math.exp(-x * x / 2)  # times sqrt(2 π), as is `mass`

    def mass(a: float, b: float) -> float:
        return math.sqrt(math.pi / 2) * (math.erf(b / math.sqrt(2)) - math.erf(a / math.sqrt(2)))

    step, previous = 3 / (levels + 1), 0.0
    while abs(step - previous) > 1e-14:
        edges = [0.0, *((k + 0.5) * step for k in range(1, levels)), math.inf]
        cells = [(k, edges[k - 1], edges[k]) for k in range(1, levels + 1)]
        previous = step
        step = sum(k * (density(a) - density(b)) for k, a, b in cells) / sum(k * k * mass(a, b) for k, a, b in cells)
    return step


def _check_bits(bits: int) -> None:
    if not whole(bits, 1, 8):
        raise ValueError(f"DoReFa-Net has 1 to 8 bits, not {bits!r}: choose a name such as 'dorefa2'")


def _format(bits: int) -> str:
    return "binary" if bits == 1 else f"int{bits}"


def _coding(bits: int) -> dict[str, int]:
    return {"cmp": 1} if bits == 1 else {"mul": 1, "cmp": 2}
