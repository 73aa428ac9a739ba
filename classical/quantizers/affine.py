"""Integers of any width: from the range of the data, or with a learned step."""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import hardtanh

from classical.checks import whole
from classical.quantizers.base import Codes, Learned, Quantizer, Role, passing, straight_through, usable, wide

_PRUNED = 0.1  # share of zeros among weights from which they count as pruned: fewer hardly change a mean
_STARTS, _TURNS = 10, 5  # of the search for the best step


class IntegerWeight(Quantizer):
    """Integers whose scale is taken from the largest weights, so that none is clipped.

    Symmetric: codes from -(2^(bits-1) - 1) to 2^(bits-1) - 1, zero point 0, scale max|w| / (2^(bits-1) - 1).
    Asymmetric: all 2^bits codes span the range from min(w, 0) to max(w, 0), and a real 0 is exact.
    A tensor of zeros gets scale 1. The gradient passes unchanged.

    Args:
        bits: 2 to 16.
        per_channel: one scale for each output channel (axis 0) instead of one for the tensor.
        symmetric: without or with a zero point.

    Raises:
        ValueError: bits out of range.

    Source: Jacob et al., arXiv:1712.05877, section 3; symmetric weights and channel scales: Krishnamoorthi,
    arXiv:1806.08342, section 2.
    """

    roles = ("weight",)

    def __init__(self, bits: int = 8, per_channel: bool = False, symmetric: bool = True) -> None:
        _check_bits(bits)
        name = f"int{bits}" + "_channel" * per_channel + "_affine" * (not symmetric)
        top = 2 ** (bits - 1)
        super().__init__(name, f"int{bits}", range(1 - top, top) if symmetric else range(-top, top))
        self.per_channel = per_channel
        self.asymmetric = not symmetric

    def encode(self, x: Tensor) -> Codes:
        """round(x / scale) + zero; scale and zero of shape (outputs, 1, ...) per channel, else ()."""
        real = wide(x.detach())
        dims, keep = tuple(range(1 if self.per_channel else 0, x.dim())), self.per_channel
        if self.asymmetric:
            return affine(real, real.amin(dims, keepdim=keep), real.amax(dims, keepdim=keep), self.grid)
        scale = usable(real.abs().amax(dims, keepdim=keep) / self.max_code)
        codes = (real / scale).round().clamp(-self.max_code, self.max_code)
        return Codes(codes, scale, codes.new_zeros(()))

    def constants(self, weight: Tensor) -> int:
        """One scale (and zero point), or one for each output channel."""
        return (weight.shape[0] if self.per_channel else 1) * (2 if self.asymmetric else 1)


class IntegerActivation(Quantizer):
    """Affine integers x = (q - Z) S with real zero exact: codes from -2^(bits-1) to 2^(bits-1) - 1.

    The range [low, high] is widened to hold 0. Each forward pass in train() moves it towards the batch's smallest
    and largest value and quantizes with the moved range; the first batch sets it. In eval() it stands still. Before
    any training batch, eval() gives every sample its own range and stores nothing, so no sample depends on another.

    Args:
        bits: 2 to 16.
        momentum: share of the new batch in the moving range, in (0, 1].

    Raises:
        ValueError: bits or momentum out of range.

    Source: Jacob et al., arXiv:1712.05877, equation 1 and section 3.1.
    """

    roles = ("activation",)
    low: Tensor
    high: Tensor

    def __init__(self, bits: int = 8, momentum: float = 0.1) -> None:
        _check_bits(bits)
        if not 0 < momentum <= 1:
            raise ValueError(f"momentum is {momentum} but must be above 0 and at most 1")
        super().__init__(f"int{bits}", f"int{bits}", range(-(2 ** (bits - 1)), 2 ** (bits - 1)))
        self.coding = {"mul": 1, "add": 1, "cmp": 2}  # times 1 / scale, plus the zero point, clipped at both ends
        self.momentum = momentum
        # The empty range marks "no batch seen": it needs no third buffer and no branch on a tensor's value.
        self.register_buffer("low", torch.tensor(torch.inf))
        self.register_buffer("high", torch.tensor(-torch.inf))

    @property
    def calibrated(self) -> bool:
        """Whether a training batch has set the range."""
        return bool(self.low <= self.high)

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Move the stored range towards that of the batch x; an empty batch, NaN or infinity moves nothing."""
        if x.numel():
            for bound, seen in zip((self.low, self.high), x.aminmax(), strict=True):
                moved = torch.where(bound.isinf(), seen, bound + self.momentum * (seen - bound))
                bound.copy_(torch.where(seen.isfinite(), moved, bound))

    def _range(self, x: Tensor) -> tuple[Tensor, Tensor]:
        dims = tuple(range(1, x.dim()))
        lowest, highest = x.amin(dims, keepdim=True), x.amax(dims, keepdim=True)
        low, high = self.low.to(x.dtype), self.high.to(x.dtype)
        seen = low <= high
        return torch.where(seen, low, lowest), torch.where(seen, high, highest)

    def encode(self, x: Tensor) -> Codes:
        """round(x / scale) + zero, clipped; scale and zero of shape (samples, 1, ...), all equal once calibrated.

        Raises:
            ValueError: x has no batch axis.
        """
        require_batch(x)
        real = wide(x.detach())
        return affine(real, *self._range(real), self.grid)

    def surrogate(self, x: Tensor, stated: Codes) -> Tensor:
        """x clipped to what rounds to a level: values beyond get no gradient."""
        scale, half = stated.scale.to(x.dtype), 0.5  # the range may end up to half a step beyond the last level
        position = x / scale + stated.zero.to(x.dtype)
        return passing(position, self.grid[0] - half, self.grid[-1] + half) * scale

    def forward(self, x: Tensor) -> Tensor:
        """Quantize x, in train() after moving the stored range."""
        if self.training:
            self.observe(x)
        return super().forward(x)

    def constants(self, weight: Tensor) -> int:
        """Scale and zero point."""
        return 2


class LearnedStep(Learned):
    """Multiples of one trained step, the code -Q_N at the lower end and Q_P at the upper one.

    The step starts as 2 E|x| / sqrt(Q_P), of all weights or of the first batch. Of pruned weights, a tenth or more of
    them 0, it starts from those that are left, where it minimizes their squared error: the mean would be that of zeros.

    Args:
        name: as for Quantizer.
        bits: 2 to 8.
        role: "weight" or "activation"; activations that are not fitted yet have a step for each sample in eval().
        signed: Q_N = 2^(bits-1), Q_P = 2^(bits-1) - 1, or else Q_N = 0, Q_P = 2^bits - 1; by default weights are
            signed and activations, taken to follow a ReLU, are not.

    Raises:
        ValueError: bits out of range.

    Source: Esser et al., arXiv:1902.08153, section 2; for pruned weights the start is our choice.
    """

    marker = "step"

    def __init__(self, name: str, bits: int, role: Role, signed: bool | None) -> None:
        if not whole(bits, 2, 8):
            raise ValueError(f"a learned step has 2 to 8 bits, not {bits!r}: choose a name such as 'lsq4' or 'rq4'")
        signed = role == "weight" if signed is None else signed
        super().__init__(name, f"int{bits}", range(-(2 ** (bits - 1)), 2 ** (bits - 1)) if signed else range(2**bits))
        self.roles = (role,)
        self.coding = {"mul": 1, "cmp": 2}
        self.step = nn.Parameter(torch.zeros(()))

    def _initial(self, size: Tensor) -> Tensor:
        return usable(2 * size / self.grid[-1] ** 0.5)

    @torch.no_grad()
    def start(self, x: Tensor) -> None:
        """Set the step from the mean |x|, or from the weights that pruning left."""
        real = wide(x)
        self.step.copy_(self._of_weights(real) if self.roles == ("weight",) else self._initial(real.abs().mean()))

    def _of_weights(self, real: Tensor) -> Tensor:
        if not real.is_meta and 0 < int(real.count_nonzero()) <= (1 - _PRUNED) * real.numel():
            return least_squares_step(real[real != 0], self.grid)
        return self._initial(real.abs().mean())

    def scale(self, x: Tensor) -> Tensor:
        """The step for x: differentiable, of shape (), or (samples, 1, ...) of activations before anything is fitted.

        Raises:
            ValueError: activations without a batch axis.
        """
        if self._fitted:
            return usable(wide(self.step).abs())
        if self.roles == ("weight",):
            return self._of_weights(wide(x.detach()))
        size = wide(x.detach()).abs()
        require_batch(x)
        return self._initial(size.mean(tuple(range(1, x.dim())), keepdim=True))

    def encode(self, x: Tensor) -> Codes:
        """round(clip(x / step, -Q_N, Q_P)); the scale carries a gradient, the codes do not."""
        scale = self.scale(x)
        codes = (wide(x.detach()) / scale.detach()).clamp(self.grid[0], self.grid[-1]).round()
        return Codes(codes, scale, codes.new_zeros(()))

    def constants(self, weight: Tensor) -> int:
        """One step."""
        return 1


class LSQ(LearnedStep):
    """Learned step size quantization: round(clip(x / s, -Q_N, Q_P)) s with a trained step s.

    With v = x / s, the gradient with respect to x passes where -Q_N < v < Q_P, and that with respect to s is
    round(v) - v there, -Q_N below and Q_P above, times 1 / sqrt(N Q_P): N weights, or N features of one sample.

    Args:
        bits, role, signed: see LearnedStep.

    Raises:
        ValueError: bits out of range.

    Source: Esser et al., arXiv:1902.08153, equations 1 to 5 and section 2.2.
    """

    def __init__(self, bits: int = 4, role: Role = "weight", signed: bool | None = None) -> None:
        super().__init__(f"lsq{bits}", bits, role, signed)

    def surrogate(self, x: Tensor, stated: Codes) -> Tensor:
        """The quantized x again, with the rounding passed straight through and the step's gradient scaled."""
        step, real = stated.scale, wide(x)
        count = x.numel() if self.roles == ("weight",) else x.shape[1:].numel()
        gain = (count * self.grid[-1]) ** -0.5
        step = straight_through(step, gain * step)
        # d/ds: round(v) inside, where -v comes from x / s; -Q_N or Q_P outside. hardtanh passes nothing at its ends.
        rounded = straight_through(stated.codes, hardtanh(real / step, self.grid[0], self.grid[-1]))
        return (rounded * step).to(x.dtype)


def least_squares_step(x: Tensor, grid: range) -> Tensor:
    """The step s of least squared error between x and its nearest multiples of s on a grid of codes around 0.

    For given codes c the best step is sum(x c) / sum(c^2), for a given step the nearest codes are best. Both are taken
    in turn, from many steps: the error has several minima.

    Args:
        x: real numbers, not all 0.
        grid: the codes, which hold 0.
    """
    real = x.detach().flatten()
    best, least = real.abs().amax(), math.inf
    for start in best / grid[-1] * torch.linspace(1, 0.1, _STARTS, dtype=real.dtype, device=real.device):
        step = start
        for _ in range(_TURNS):
            codes = (real / step).clamp(grid[0], grid[-1]).round()
            power = codes.square().sum()
            if not power:
                break
            step = (real * codes).sum() / power
        error = float((codes * step - real).square().sum())
        if error < least:
            best, least = step, error
    return best


def affine(x: Tensor, low: Tensor, high: Tensor, grid: range) -> Codes:
    """Spread the codes of `grid` over [low, high], widened to hold 0, so that a real 0 is a code.

    Args:
        x: real numbers.
        low, high: ends of the range, which broadcast against x.
        grid: the codes.

    Source: Jacob et al., arXiv:1712.05877, equation 1.
    """
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = usable((high - low) / (len(grid) - 1))
    zero = (grid[0] - low / scale).round()
    return Codes(((x / scale).round() + zero).clamp(grid[0], grid[-1]), scale, zero)


def require_batch(x: Tensor) -> None:
    """Check that activations have a batch axis.

    Raises:
        ValueError: they have none.
    """
    if x.dim() < 2:
        raise ValueError(f"activations have shape {tuple(x.shape)} but need a batch axis first: pass x[None]")


def _check_bits(bits: int) -> None:
    if not whole(bits, 2, 16):
        raise ValueError(f"an integer quantizer has 2 to 16 bits, not {bits!r}: for 1 bit choose 'bnn' or 'xnor'")
