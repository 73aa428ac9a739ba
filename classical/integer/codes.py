"""How real inputs become integers: the code of a calibrated activation quantizer, and where its codes begin."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from classical.integer.loading import Kernels, load_kernels
from classical.quantizers import Quantizer

HOLDS_NAN = "input holds NaN, which no integer stands for: check the data"


@dataclass(frozen=True)
class InputCode:
    """How a calibrated activation quantizer codes its values, as a layer reads them: real = (code - zero) * scale.

    Attributes:
        low, high: the smallest and the largest code.
        step: between neighboring codes.
        shift: subtracted from the quantizer's own codes, so that any 8 bits fit into int8.
        compiled: type of the real numbers whose codes a compiled loop finds, the very same; None where there is none.
    """

    scale: float
    zero: int
    low: int
    high: int
    step: int
    shift: int
    compiled: torch.dtype | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of the codes: int8, or int16 above 8 bits."""
        return torch.int8 if self.low >= -128 and self.high <= 127 else torch.int16

    @property
    def bits(self) -> int:
        """Of a code, counted from the lowest."""
        return ((self.high - self.low) // self.step).bit_length()

    @property
    def reach(self) -> int:
        """Upper bound of |code|, the padding's included."""
        return max(-self.low, self.high, abs(self.zero))

    def encode(self, activation: Quantizer, x: Tensor) -> Tensor:
        """Codes of x by the quantizer that this is the code of.

        Raises:
            ValueError: x holds NaN.
        """
        if self._runs_compiled(x):
            return self.nearest(x.detach())
        require_codable(x)
        codes, _, _ = activation.encode(x)
        return (codes - self.shift if self.shift else codes).to(self.dtype)

    def _runs_compiled(self, x: Tensor) -> bool:
        return (
            x.dtype == self.compiled
            and x.device.type == "cpu"
            and x.dim() > 1  # the quantizer says what is wrong with others
            and not torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
            and load_kernels("auto") is not None  # built in a place that had them
        )

    def nearest(self, x: Tensor) -> Tensor:
        """clip(round(x / scale) + zero) in one pass of a compiled loop, x float32 or float64 on the CPU.

        Raises:
            ValueError: x holds NaN.
        """
        x = x.contiguous()
        codes = torch.empty_like(x, dtype=self.dtype)
        reals = x.numpy().reshape(-1)
        ends = (reals.dtype.type(end) for end in (self.scale, self.zero, self.low, self.high))
        if load_kernels("numba").nearest(reals, *ends, codes.numpy().reshape(-1)):
            raise ValueError(HOLDS_NAN)
        return codes


class Coded(nn.Module):
    """A module that was built for one code, and refuses the state of one that was built for another.

    Attributes:
        code: of its inputs.
    """

    code: InputCode

    def get_extra_state(self) -> Tensor:
        """The code as numbers."""
        code = self.code
        return torch.tensor([code.scale, code.zero, code.low, code.high, code.step, code.shift], dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        """Check that a state is of the same code.

        Raises:
            ValueError: it is not.
        """
        if not torch.equal(state.cpu(), self.get_extra_state()):
            raise ValueError(
                f"state is of inputs whose scale, zero, ends, step and shift are {state.tolist()}, but here they are "
                f"{self.get_extra_state().tolist()}: build the integer twin from the layer that the state is of"
            )


def input_code(activation: Quantizer, like: Tensor, kernels: Kernels = "torch") -> InputCode:
    """The code of an activation quantizer that has seen its range.

    Args:
        activation: the quantizer.
        like: a tensor of the layer's type and device.
        kernels: "torch" for no compiled loops; see `integer_twin`.

    Raises:
        ValueError: no range seen yet, or values without integer codes.
    """
    if not activation.calibrated:
        raise ValueError(
            f"{activation!r} has seen no range yet: calibrate() the network, or run a batch in train(); without data, "
            "give data_free_quantize() what it cannot know, input_range=(low, high) of the network's input"
        )
    stated = activation.integers(like.new_zeros(1, 1))
    grid = activation.grid
    middle = (len(grid) + 1) // 2 if grid[0] >= 0 and grid[-1] > 127 else 0
    found = InputCode(
        float(stated.scale), int(stated.zero) - middle, grid[0] - middle, grid[-1] - middle, grid.step, middle
    )
    return _compiled(found, activation, like, kernels)


def _compiled(code: InputCode, activation: Quantizer, like: Tensor, kernels: Kernels) -> InputCode:
    """The same code, its loop compiled if that begins every code at the number at which the quantizer does."""
    if load_kernels(kernels) is None or like.dtype not in (torch.float32, torch.float64) or code.step != 1:
        return code
    first = thresholds(activation, like).to("cpu", like.dtype)
    before = torch.nextafter(first, first.new_tensor(-torch.inf))
    codes = torch.arange(code.low + 1, code.high + 1)
    same = torch.equal(code.nearest(first), codes.to(code.dtype)) and torch.equal(
        code.nearest(before), (codes - 1).to(code.dtype)
    )
    return replace(code, compiled=like.dtype) if same else code


def require_codable(x: Tensor) -> None:
    """Check that real inputs can have codes: NaN would become an arbitrary one, infinities become the ends.

    Raises:
        ValueError: one is NaN.
    """
    # A NaN is in the sum too, which takes a tenth of the time of a look at each number; so is infinity - infinity.
    if bool(x.sum().isnan()) and bool(x.isnan().any()):
        raise ValueError(HOLDS_NAN)


def thresholds(activation: Quantizer, like: Tensor) -> Tensor:
    """The smallest real numbers that get each code but the lowest, float64, by bisection.

    Args:
        activation: a calibrated quantizer, whose codes never fall as its input grows.
        like: a tensor of the type in which it computes.
    """
    codes = torch.tensor(activation.grid[1:], device=like.device)
    _, scale, zero = activation.integers(like.new_zeros(1, 1))
    # All that lies between two codes further out than the last ones.
    ends = [(end - float(zero)) * float(scale) for end in (activation.grid[0] - 4, activation.grid[-1] + 4)]
    low, high = (torch.full(codes.shape, end, dtype=torch.float64, device=like.device) for end in ends)
    while True:
        middle = ((low + high) / 2).to(like.dtype).double()
        if ((middle == low) | (middle == high)).all():  # no number lies between
            break
        reached = activation.integers(middle[None].to(like.dtype)).codes[0] >= codes
        low, high = torch.where(reached, low, middle), torch.where(reached, middle, high)
    return high


def rounds_to_nearest(found: Tensor, code: InputCode) -> bool:
    """Whether thresholds lie half way between neighboring codes."""
    codes = torch.arange(code.low + 1, code.high + 1, dtype=torch.float64, device=found.device)
    if code.step != 1:
        return False
    halfway = (codes - 0.5 - code.zero) * code.scale
    return bool((found - halfway).abs().max() <= 0.01 * code.scale)  # more than float32 errs at 16 bits
