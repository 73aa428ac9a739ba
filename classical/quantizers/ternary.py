"""Three values: minus, zero, plus."""

from torch import Tensor

from classical.quantizers.base import Codes, Quantizer, wide
from classical.quantizers.codebooks import TrainedLevels, mean_where


class TWN(Quantizer):
    """Ternary weights {-a, 0, a}: threshold 0.7 E|w|, a = mean of |w| above it, one a for the tensor.

    For the chosen support, a minimizes the squared error. The gradient passes unchanged.

    Source: Li, Liu, arXiv:1605.04711, equations 5 and 6.
    """

    roles = ("weight",)

    def __init__(self) -> None:
        super().__init__("twn", "ternary", range(-1, 2))

    def encode(self, x: Tensor) -> Codes:
        """Codes -1, 0, 1; an all-zero tensor gets scale 0."""
        real = wide(x.detach())
        size = real.abs()
        above = size > 0.7 * size.mean()
        codes = real.sign() * above
        return Codes(codes, mean_where(above, size), codes.new_zeros(()))

    def constants(self, weight: Tensor) -> int:
        """One scale."""
        return 1


class TTQ(TrainedLevels):
    """Trained ternary weights {-W_n, 0, W_p}: threshold t max|w|, two trained positive scales for the tensor.

    The scales start as the mean |w| of what they stand for. With g the gradient with respect to the quantized weights,
    W_p gets the sum of g over the weights above the threshold, W_n minus the sum of g over those below (the paper
    prints no minus, though it quantizes to -W_n), and w gets g times W_p, 1 or W_n.

    Args:
        threshold: t, in (0, 1).

    Raises:
        ValueError: threshold out of range.

    Source: Zhu et al., arXiv:1612.01064, equations 6 to 9.
    """

    def __init__(self, threshold: float = 0.05) -> None:
        if not 0 < threshold < 1:
            raise ValueError(f"threshold is {threshold} but must be above 0 and below 1")
        super().__init__("ttq", 3)
        self.threshold = threshold

    def thresholds(self, side: Tensor) -> list[Tensor]:
        """t max|w|, the same on both sides."""
        return [self.threshold * side.abs().amax()]

    def slope(self, levels: Tensor) -> Tensor:
        """W_n, 1 or W_p."""
        return levels.abs().masked_fill(levels == 0, 1)
