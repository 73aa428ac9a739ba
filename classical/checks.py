"""What numbers an argument may be."""

import math
from numbers import Integral, Real


def whole(value: object, low: float = -math.inf, high: float = math.inf) -> bool:
    """Whether a value is a whole number from `low` to `high`; True and False are not."""
    return isinstance(value, Integral) and not isinstance(value, bool) and low <= int(value) <= high


def real(value: object, low: float = -math.inf, high: float = math.inf) -> bool:
    """Whether a value is a finite real number from `low` to `high`; True and False are not."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    return math.isfinite(value) and low <= float(value) <= high
