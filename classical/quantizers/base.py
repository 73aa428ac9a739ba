"""What every quantizer is, and what quantizers share."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import hardtanh

Role = Literal["weight", "activation"]


class Codes(NamedTuple):
    """Integers that stand for (codes - zero) * scale; scale and zero broadcast against codes."""

    codes: Tensor
    scale: Tensor
    zero: Tensor


class Codebook(NamedTuple):
    """Indices (int32) into ascending levels: one row (L,) for all values, or a row for each index of axis 0."""

    codes: Tensor
    levels: Tensor

    def values(self) -> Tensor:
        """The levels that the codes name, of the codes' shape."""
        if self.levels.dim() == 1:
            return self.levels[self.codes]
        rows = torch.arange(len(self.levels), device=self.codes.device)
        return self.levels[rows.reshape(-1, *[1] * (self.codes.dim() - 1)), self.codes]


def straight_through(value: Tensor, path: Tensor) -> Tensor:
    """Exactly `value` in the forward pass, the gradient of `path` in the backward pass.

    Args:
        value: what is computed; no gradient flows into it.
        path: same shape, differentiable; its own value is irrelevant, but a NaN in it shows in the result.

    Source: Bengio, Léonard, Courville, arXiv:1308.3432.
    """
    return value.detach() + (path - path.detach())  # path - path is exactly 0, unlike value - x + x


class Quantizer(nn.Module):
    """A map to representable values: `encode` states them, `surrogate` is differentiated in their place.

    Attributes:
        name: what `quantizer` builds it from.
        format: number format in the operation counts: fp32, intN, ternary, binary.
        grid: the codes that `integers` may give, ascending; for uneven levels, the indices of `codebook`.
        bits: bits of one stored code.
        max_code: upper bound of |code|.
        roles: what it may quantize.
        patch_scale: for activations, whether the layer multiplies each output by the mean |x| of its patch.
        planes: how many numbers of `format`, each with a factor of its own, add up to one value.
        scales: real factors that each output of a layer is multiplied by; 0 for none.
        asymmetric: for weights, whether the zero point is not 0, so that a layer must know the sum of each patch.
        coding: for activations, real operations that turn one value into its code.
    """

    roles: tuple[Role, ...] = ("weight", "activation")
    patch_scale = False
    planes = 1
    scales = 1
    asymmetric = False

    def __init__(self, name: str, format: str, grid: range) -> None:
        super().__init__()
        self.name = name
        self.format = format
        self.grid = grid
        self.bits = (len(grid) - 1).bit_length()
        self.max_code = max(abs(grid[0]), abs(grid[-1]))
        self.coding: Mapping[str, int] = {}

    def encode(self, x: Tensor) -> Codes:
        """State the quantized x in whole numbers, kept in x's float type (float32 at least); changes no buffer.

        Args:
            x: real values; axis 0 is the output channel of weights, the sample of activations.

        Raises:
            ValueError: the levels are no multiples of one scale.
        """
        raise NotImplementedError

    @torch.no_grad()
    def integers(self, x: Tensor) -> Codes:
        """The quantized x as int32 codes, scale and int32 zero point; see `encode`."""
        codes, scale, zero = self.encode(x)
        return Codes(codes.int(), scale, zero.int())

    @torch.no_grad()
    def codebook(self, x: Tensor) -> Codebook:
        """The quantized x as indices into its levels; `values()` is what forward gives, up to the cast to x's type.

        Args:
            x: as for `encode`.

        Raises:
            ValueError: more than 8 bits, whose levels are not listed.
        """
        codes, scale, zero = self.encode(x)
        if self.bits > 8:
            raise ValueError(f"{self.name!r} has {self.bits} bits: a codebook lists at most 8; use integers()")
        levels = torch.arange(self.grid.start, self.grid.stop, self.grid.step, dtype=scale.dtype, device=scale.device)
        levels = (levels - zero.reshape(-1, 1)) * scale.reshape(-1, 1)
        index = ((codes - self.grid.start) / self.grid.step).int()
        return Codebook(index, levels if scale.dim() else levels[0])

    def surrogate(self, x: Tensor, stated: Codes) -> Tensor:
        """What is differentiated in place of `stated`, the codes of x; the identity unless overridden."""
        return x

    def forward(self, x: Tensor) -> Tensor:
        """Quantize x to (codes - zero) * scale, of x's shape and dtype, with the surrogate's gradient."""
        stated = self.encode(x)
        codes, scale, zero = stated
        return straight_through(((codes - zero) * scale).to(x.dtype), self.surrogate(x, stated))

    def fit(self, x: Tensor) -> None:
        """Start the learned scales from x, all weights or a batch of activations; one that learns none does nothing."""

    def select(self, outputs: Tensor) -> None:
        """Keep, of numbers stored for each output channel, those of some channels; one that stores none does nothing.

        Args:
            outputs: indices, or a bool for each output channel, of the channels that a layer keeps.
        """

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


class Learned(Quantizer):
    """A quantizer whose scales are learned: stored, and started from the first data that it sees.

    `fit` starts them: a layer fits its weights when it is built; otherwise the first batch in train() does. In eval()
    before that, every call (for activations every sample) has the scales that `fit` would give it, and nothing is
    stored. Stored scales are used by their absolute value, so they stay positive whatever step an optimizer takes,
    and the gradient of a positive one is its own. Not fitted is stored as 0: the keys of the state_dict never change.
    Processes that train together start alike if one batch runs before torch's DistributedDataParallel is put on.
    """

    marker: ClassVar[str]  # the tensor that is 0 as long as nothing is fitted

    def __init__(self, name: str, format: str, grid: range) -> None:
        super().__init__(name, format, grid)
        # Kept in Python too: to ask the tensor on every call would break compiled graphs and wait for a GPU.
        self._fitted = False

    @property
    def calibrated(self) -> bool:
        """Whether the scales have been fitted or loaded."""
        return self._fitted

    def fit(self, x: Tensor) -> None:
        """Start the scales from x.

        Args:
            x: all weights, or a batch of activations; an empty one starts nothing.
        """
        if x.numel():
            self.start(x.detach())
            self._fitted = True

    def start(self, x: Tensor) -> None:
        """Store the scales to start from."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Quantize x, in train() after fitting if nothing was fitted yet."""
        if self.training and not self._fitted:
            self.fit(x)
        return super().forward(x)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        stored = state_dict.get(prefix + self.marker)
        if stored is not None:
            own = getattr(self, self.marker)
            if not self._fitted and own.shape != stored.shape:
                own.data = own.new_empty(stored.shape)  # a row for each output channel, known from the weights only
            self._fitted = bool(stored.any())
        super()._load_from_state_dict(state_dict, prefix, *rest)


class Float(Quantizer):
    """No quantization: the values as they are."""

    scales = 0

    def __init__(self) -> None:
        super().__init__("float", "fp32", range(1))
        self.bits = 32

    def encode(self, x: Tensor) -> Codes:
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


def wide(x: Tensor) -> Tensor:
    """X in at least float32: half precision cannot hold 16-bit codes."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def usable(scale: Tensor) -> Tensor:
    """Replace a scale of 0 (or one too small to divide by) with 1: every code is then 0."""
    return torch.where(scale < torch.finfo(scale.dtype).tiny, torch.ones_like(scale), scale)


def passing(x: Tensor, low: float, high: float) -> Tensor:
    """x clipped to [low, high], give or take an ulp; the gradient passes inside and at both ends.

    Stands for torch.clamp on surrogate paths, whose exact value is irrelevant: hardtanh's backward is vectorized, and
    ten times faster.
    """
    info = torch.finfo(x.dtype)
    return hardtanh(x, low - max(info.eps * abs(low), info.tiny), high + max(info.eps * abs(high), info.tiny))


def sign(x: Tensor) -> Tensor:
    """-1 below 0, otherwise 1, in at least float32."""
    return wide((x >= 0).to(x.dtype)) * 2 - 1
