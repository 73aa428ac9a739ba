"""Which parameters of a foreign circuit are features, and the index that each has: one rule for every format."""

from __future__ import annotations

import re
from collections.abc import Sequence

_FEATURE = re.compile(r"x|inputs?|features?|data|images?|patch(es)?|pixels?", re.IGNORECASE)
_WEIGHT = re.compile(r"w|weights?|params?|parameters?|thetas?|θ|ϑ", re.IGNORECASE)
# theta_3, theta3, _theta_3_ (an element of a vector as Qiskit's exporter writes it), theta[3]; theta.
_NUMBERED = re.compile(r"_*(.*?)(?:_?(\d+)|\[(\d+)\])?_*")
# A name with a larger number counts nothing: as an index it would ask for all those below it.
_LARGEST = 100_000


def split_name(name: str) -> tuple[str, int | None]:
    """What stands before the number of a name, and the number if there is one."""
    match = _NUMBERED.fullmatch(name)
    if match is None:
        return name, None
    digits = (match[2] or match[3] or "").lstrip("0") or ("0" if match[2] or match[3] else "")
    # int() refuses thousands of digits.
    return match[1], int(digits) if 0 < len(digits) < 19 else None


def is_feature(name: str) -> bool:
    """Whether a parameter of this name is clearly a feature."""
    return _FEATURE.fullmatch(split_name(name)[0]) is not None


def is_weight(name: str) -> bool:
    """Whether a parameter of this name is clearly a weight; others may be either."""
    return _WEIGHT.fullmatch(split_name(name)[0]) is not None


def places(names: Sequence[str], dense: bool = False) -> list[int]:
    """The index of each parameter of one kind.

    Names that share what stands before the number are ordered by the number, and it is the index where all have one,
    no two the same and none above 100000. Other names keep the order in which they come.

    Args:
        names: In the order of the circuit.
        dense: Number them 0, 1, ... in that order even so.
    """
    parts = [split_name(name) for name in names]
    numbers = [-1 if number is None else number for _, number in parts]
    if len({prefix for prefix, _ in parts}) != 1:
        return list(range(len(names)))
    if not dense and min(numbers) >= 0 and max(numbers) <= _LARGEST and len(set(numbers)) == len(numbers):
        return numbers
    order = sorted(range(len(names)), key=numbers.__getitem__)
    result = [0] * len(names)
    for index, position in enumerate(order):
        result[position] = index
    return result
