"""How gradients are made of evaluations of a circuit; qconv.gradients makes them."""

from dataclasses import dataclass
from math import pi

from circuits.naming import unknown

METHODS = ("parameter-shift", "spsa", "finite-diff")


@dataclass(frozen=True)
class Differentiation:
    """A way to differentiate circuits that have no autograd; a Compiled may name its own as `differentiation`.

    Args:
        method: One of METHODS.
        samples: Directions of "spsa"; None for 1.
        step: Of "spsa" and "finite-diff" in radians, above 0 and below pi/2; None for a default.

    Raises:
        ValueError: For an unknown method, or samples or a step that it does not take.
    """

    method: str = "parameter-shift"
    samples: int | None = None
    step: float | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise unknown("gradient method", self.method, METHODS)
        whole = isinstance(self.samples, int) and not isinstance(self.samples, bool)
        if self.samples is not None and (self.method != "spsa" or not whole or self.samples < 1):
            raise ValueError(
                f"samples is {self.samples!r} for method {self.method!r}: give a whole number of at least 1 to 'spsa', "
                "and None to others"
            )
        if self.step is not None and (self.method == "parameter-shift" or not 0 < self.step < pi / 2):
            raise ValueError(
                f"step is {self.step!r} for method {self.method!r}: give radians above 0 and below pi/2 to 'spsa' and "
                "'finite-diff', and None to 'parameter-shift', whose shifts follow from the gates"
            )
