"""Quantizers: real tensors to few representable values, with straight-through gradients.

A quantizer states its values as integers: `integers(x)` gives codes, scale and zero point, and
`forward(x)` is (codes - zero) * scale, exactly. Training uses the second, classical.integer the first.
To add one: a subclass of Quantizer, and its name in the table of its role at the end of this file.
"""

import difflib
from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

Role = Literal["weight", "activation"]


class Codes(NamedTuple):
    """Integers that stand for (codes - zero) * scale; scale and zero broadcast against codes."""

    codes: Tensor
    scale: Tensor
    zero: Tensor


def straight_through(value: Tensor, path: Tensor) -> Tensor:
    """Exactly `value` in the forward pass, the gradient of `path` in the backward pass.

    Args:
        value: what is computed; no gradient flows into it.
        path: same shape, differentiable; its own value is irrelevant, but a NaN in it shows in the result.

    Source: Bengio, Léonard, Courville, arXiv:1308.3432.
    """
    return value.detach() + (path - path.detach())  # path - path is exactly 0, unlike value - x + x


class Quantizer(nn.Module):
    """A map to representable values: `integers` states them, `surrogate` is differentiated in their place.

    Attributes:
        name: what `quantizer` builds it from.
        format: number format in the operation counts: fp32, intN, ternary, binary.
        bits: bits of one stored code.
        max_code: upper bound of |code|.
        roles: what it may quantize.
        patch_scale: for activations, whether the layer multiplies each output by the mean |x| of its patch.
    """

    roles: tuple[Role, ...] = ("weight", "activation")
    patch_scale = False

    def __init__(self, name: str, format: str, bits: int) -> None:
        super().__init__()
        self.name = name
        self.format = format
        self.bits = bits
        self.max_code = 2 ** (bits - 1)

    def integers(self, x: Tensor) -> Codes:
        """State the quantized x in integers; changes no buffer.

        Args:
            x: real values; axis 0 is the output channel of weights, the sample of activations.
        """
        raise NotImplementedError

    def surrogate(self, x: Tensor, stated: Codes) -> Tensor:
        """What is differentiated in place of `stated`, the integers of x; the identity unless overridden."""
        return x

    def forward(self, x: Tensor) -> Tensor:
        """Quantize x to (codes - zero) * scale, of x's shape and dtype, with the surrogate's gradient."""
        stated = self.integers(x)
        codes, scale, zero = stated
        return straight_through(((codes - zero) * scale).to(x.dtype), self.surrogate(x, stated))

    def constants(self, weight: Tensor) -> int:
        """How many numbers (scales, zero points) are stored beside the codes of `weight` or of its input."""
        raise NotImplementedError

    @property
    def calibrated(self) -> bool:
        """Whether scale and zero point are ready for inference (False only before a range has been seen)."""
        return True

    def extra_repr(self) -> str:
        """Show the name."""
        return self.name


class Float(Quantizer):
    """No quantization: the values as they are."""

    def __init__(self) -> None:
        super().__init__("float", "fp32", 32)

    def integers(self, x: Tensor) -> Codes:
        """Refuse.

        Raises:
            ValueError: real values have no integer codes.
        """
        raise ValueError("'float' values have no integer codes: choose a quantizer such as 'int8'")

    def forward(self, x: Tensor) -> Tensor:
        """Return x itself."""
        return x

    def constants(self, weight: Tensor) -> int:
        """None are stored."""
        return 0


class IntegerWeight(Quantizer):
    """Symmetric integers: codes from -(2^(bits-1) - 1) to 2^(bits-1) - 1, zero point 0.

    The scale is max|w| / (2^(bits-1) - 1), so that no weight is clipped; an all-zero tensor gets scale 1.

    Args:
        bits: 2 to 16.
        per_channel: one scale for each output channel (axis 0) instead of one for the tensor.

    Raises:
        ValueError: bits out of range.

    Source: Jacob et al., arXiv:1712.05877, section 3; symmetric weights and channel scales: Krishnamoorthi,
    arXiv:1806.08342, section 2.
    """

    roles = ("weight",)

    def __init__(self, bits: int = 8, per_channel: bool = False) -> None:
        _check_bits(bits)
        super().__init__(f"int{bits}_channel" if per_channel else f"int{bits}", f"int{bits}", bits)
        self.per_channel = per_channel
        self.max_code -= 1

    def integers(self, x: Tensor) -> Codes:
        """round(x / scale); scale of shape (outputs, 1, ...) per channel, else ()."""
        wide = _wide(x)
        peak = (
            wide.abs().amax(tuple(range(1, x.dim())), keepdim=True)
            if self.per_channel
            else wide.abs().amax(tuple(range(x.dim())))
        )
        scale = _usable(peak / self.max_code)
        codes = (wide / scale).round().clamp(-self.max_code, self.max_code).int()
        return Codes(codes, scale, codes.new_zeros(()))

    def constants(self, weight: Tensor) -> int:
        """One scale, or one for each output channel."""
        return weight.shape[0] if self.per_channel else 1


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
        super().__init__(f"int{bits}", f"int{bits}", bits)
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
        rows = _wide(x.detach()).flatten(1).aminmax(dim=1)
        low, high = self.low.to(rows.min.dtype), self.high.to(rows.min.dtype)
        seen = low <= high
        shape = (-1,) + (1,) * (x.dim() - 1)
        return (
            torch.where(seen, low, rows.min).clamp(max=0).view(shape),
            torch.where(seen, high, rows.max).clamp(min=0).view(shape),
        )

    def integers(self, x: Tensor) -> Codes:
        """round(x / scale) + zero, clipped; scale and zero of shape (samples, 1, ...), all equal once calibrated.

        Raises:
            ValueError: x has no batch axis.
        """
        if x.dim() < 2:
            raise ValueError(f"activations have shape {tuple(x.shape)} but need a batch axis first: pass x[None]")
        low, high = self._range(x)
        scale = _usable((high - low) / (2**self.bits - 1))
        zero = (-self.max_code - low / scale).round()
        codes = (_wide(x) / scale).round() + zero
        return Codes(codes.clamp(-self.max_code, self.max_code - 1).int(), scale, zero.int())

    def surrogate(self, x: Tensor, stated: Codes) -> Tensor:
        """x clipped to what rounds to a level: values beyond get no gradient."""
        half = 0.5  # the ends of the range may themselves lie up to half a step beyond the last level
        low = (-self.max_code - half - stated.zero) * stated.scale
        high = (self.max_code - 1 + half - stated.zero) * stated.scale
        return torch.clamp(x, low.to(x.dtype), high.to(x.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Quantize x, in train() after moving the stored range."""
        if self.training:
            self.observe(x)
        return super().forward(x)

    def constants(self, weight: Tensor) -> int:
        """Scale and zero point."""
        return 2


class TWN(Quantizer):
    """Ternary weights {-a, 0, a}: threshold 0.7 E|w|, a = mean of |w| above it, one a for the tensor.

    For the chosen support, a minimizes the squared error. The gradient passes unchanged.

    Source: Li, Liu, arXiv:1605.04711, equations 5 and 6.
    """

    roles = ("weight",)

    def __init__(self) -> None:
        super().__init__("twn", "ternary", 2)
        self.max_code = 1

    def integers(self, x: Tensor) -> Codes:
        """Codes -1, 0, 1; an all-zero tensor gets scale 0."""
        size = _wide(x).abs()
        above = size > 0.7 * size.mean()
        scale = (size * above).sum() / above.sum().clamp(min=1)
        codes = (x.sign() * above).int()
        return Codes(codes, scale, codes.new_zeros(()))

    def constants(self, weight: Tensor) -> int:
        """One scale."""
        return 1


class BNN(Quantizer):
    """sign(x) with sign(0) = +1 and no scale; the gradient passes where |x| <= 1.

    Source: Hubara et al., arXiv:1602.02830, equations 1 and 4.
    """

    def __init__(self) -> None:
        super().__init__("bnn", "binary", 1)

    def integers(self, x: Tensor) -> Codes:
        """Codes -1 and 1, scale 1."""
        codes = _sign(x)
        return Codes(codes, _wide(x).new_ones(()), codes.new_zeros(()))

    def surrogate(self, x: Tensor, stated: Codes) -> Tensor:
        """x clipped to [-1, 1]."""
        return x.clamp(-1, 1)

    def constants(self, weight: Tensor) -> int:
        """None are stored."""
        return 0


class XNORWeight(Quantizer):
    """sign(w) times the mean |w| of its output channel; both factors are differentiated.

    Source: Rastegari et al., arXiv:1603.05279, equations 5 and 6; sign(w) as in BNN.
    """

    roles = ("weight",)

    def __init__(self) -> None:
        super().__init__("xnor", "binary", 1)

    def _scale(self, x: Tensor) -> Tensor:
        return _wide(x).abs().mean(tuple(range(1, x.dim())), keepdim=True)

    def integers(self, x: Tensor) -> Codes:
        """Codes -1 and 1, scale of shape (outputs, 1, ...)."""
        codes = _sign(x)
        return Codes(codes, self._scale(x.detach()), codes.new_zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """Quantize x; the gradient reaches x through its sign and through its channel's mean."""
        sign = straight_through(_sign(x).to(x.dtype), x.clamp(-1, 1))
        return (sign * self._scale(x)).to(x.dtype)

    def constants(self, weight: Tensor) -> int:
        """One scale for each output channel."""
        return weight.shape[0]


class XNORActivation(BNN):
    """sign(x), scaled by the layer with XNOR-Net's map K, one factor for each output position.

    K = A * k is the mean of |x| over the patch that an output sees (A: mean over channels, k: box filter). It is
    constant within a patch, so it leaves the convolution as a factor: output = K (sign(x) * W) + bias, and the layer
    multiplies. K needs the real inputs, not the signs alone.

    Source: Rastegari et al., arXiv:1603.05279, section 3.2, equation 11.
    """

    roles = ("activation",)
    patch_scale = True

    def __init__(self) -> None:
        super().__init__()
        self.name = "xnor"


def _check_bits(bits: int) -> None:
    if not 2 <= bits <= 16:
        raise ValueError(f"an integer quantizer has 2 to 16 bits, not {bits}: for 1 bit choose 'bnn' or 'xnor'")


def _wide(x: Tensor) -> Tensor:
    """X in at least float32: half precision cannot hold 16-bit codes."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _usable(scale: Tensor) -> Tensor:
    """Replace a scale of 0 (or one too small to divide by) with 1: every code is then 0."""
    return torch.where(scale < torch.finfo(scale.dtype).tiny, torch.ones_like(scale), scale)


def _sign(x: Tensor) -> Tensor:
    one = torch.ones((), dtype=torch.int32, device=x.device)
    return torch.where(x >= 0, one, -one)


_BITS = range(2, 17)
_WEIGHT: dict[str, Callable[[], Quantizer]] = {
    "float": Float,
    **{f"int{n}": partial(IntegerWeight, n) for n in _BITS},
    **{f"int{n}_channel": partial(IntegerWeight, n, per_channel=True) for n in _BITS},
    "twn": TWN,
    "bnn": BNN,
    "xnor": XNORWeight,
}
_ACTIVATION: dict[str, Callable[[], Quantizer]] = {
    "float": Float,
    **{f"int{n}": partial(IntegerActivation, n) for n in _BITS},
    "bnn": BNN,
    "xnor": XNORActivation,
}
_BUILDERS: dict[Role, dict[str, Callable[[], Quantizer]]] = {"weight": _WEIGHT, "activation": _ACTIVATION}


def quantizer_names(role: Role = "weight") -> tuple[str, ...]:
    """Names that `quantizer` accepts for weights or for activations.

    Raises:
        ValueError: role is neither "weight" nor "activation".
    """
    if role not in _BUILDERS:
        raise ValueError(f"role is {role!r} but must be 'weight' or 'activation'")
    return tuple(_BUILDERS[role])


def quantizer(spec: str | Quantizer, role: Role = "weight") -> Quantizer:
    """Build a quantizer from its name; a quantizer object is returned as it is, so a shared one shares its range.

    Args:
        spec: a name of `quantizer_names(role)`, or a Quantizer.
        role: "weight" or "activation".

    Raises:
        ValueError: unknown name, or a quantizer of the other role.
    """
    names = quantizer_names(role)
    if isinstance(spec, Quantizer):
        if role not in spec.roles:
            raise ValueError(f"quantizer {spec!r} is for {' and '.join(spec.roles)}, not for {role}: choose another")
        return spec
    if spec in names:
        return _BUILDERS[role][spec]()
    if any(spec in table for table in _BUILDERS.values()):
        raise ValueError(f"quantizer {spec!r} is not for {role}s: choose one of {', '.join(names)}")
    near = difflib.get_close_matches(str(spec), names, n=1, cutoff=0)[0]
    known = ", ".join(names)
    raise ValueError(f"unknown {role} quantizer {spec!r}: the nearest name is {near!r}. Valid names: {known}")
