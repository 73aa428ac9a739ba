"""Angles of a foreign circuit while it is read: numbers that remember which feature or weight they came from."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from numbers import Real
from typing import Any, NoReturn

import numpy as np

from circuits.circuit import Angle, Source, const

Key = tuple[Source, int]


class NotAffine(ValueError):
    """An angle that is not scale * (one feature or weight) + offset."""


def name_of(key: Key) -> str:
    """A feature or weight as circuits write it: x[0], w[0]."""
    return f"{'x' if key[0] == 'input' else 'w'}[{key[1]}]"


def _number(value: Any) -> float | None:
    """A plain number, also as an array or tensor of no dimensions; None for anything else."""
    if isinstance(value, Real):
        return float(value)
    if getattr(value, "shape", None) == () and not isinstance(getattr(value, "item", lambda: None)(), Linear):
        try:
            return float(value)
        except (TypeError, ValueError):
            return None
    return None


class Linear:
    """The number offset + sum of scale * (a feature or weight), as far as arithmetic keeps it one.

    Args:
        terms: Scale of each feature or weight.
        offset: What is added to them.
    """

    def __init__(self, terms: Mapping[Key, float], offset: float = 0.0) -> None:
        self.terms, self.offset = dict(terms), offset

    def __repr__(self) -> str:
        terms = [f"{'' if scale == 1 else f'{scale!r}*'}{name_of(key)}" for key, scale in self.terms.items()]
        return " + ".join([*terms, *([repr(self.offset)] if self.offset or not terms else [])])

    def __add__(self, other: Any) -> Linear:
        if isinstance(other, Linear):
            terms = dict(self.terms)
            for key, scale in other.terms.items():
                terms[key] = terms.get(key, 0.0) + scale
            return Linear(terms, self.offset + other.offset)
        number = _number(other)
        return NotImplemented if number is None else Linear(self.terms, self.offset + number)

    __radd__ = __add__

    def __mul__(self, other: Any) -> Linear:
        if isinstance(other, Linear):
            for constant, linear in ((self, other), (other, self)):
                if not constant.terms:
                    return linear * constant.offset
            raise NotAffine(f"({self!r}) * ({other!r}) is a product of features or weights")
        number = _number(other)
        if number is None:
            return NotImplemented
        return Linear({key: scale * number for key, scale in self.terms.items()}, self.offset * number)

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Linear:
        if isinstance(other, Linear) and not other.terms:
            other = other.offset
        if isinstance(other, Linear):
            raise NotAffine(f"({self!r}) / ({other!r}) divides by a feature or weight")
        number = _number(other)
        if number is None:
            return NotImplemented
        return Linear({key: scale / number for key, scale in self.terms.items()}, self.offset / number)

    def __rtruediv__(self, other: Any) -> NoReturn:
        raise NotAffine(f"{other!r} / ({self!r}) divides by a feature or weight")

    def __neg__(self) -> Linear:
        return self * -1.0

    def __pos__(self) -> Linear:
        return self

    def __sub__(self, other: Any) -> Linear:
        number = _number(other)
        if number is None and not isinstance(other, Linear):
            return NotImplemented
        return self + (-other if number is None else -number)

    def __rsub__(self, other: Any) -> Linear:
        return (-self).__add__(other)

    def __pow__(self, power: Any) -> Linear:
        if power == 1:
            return self
        raise NotAffine(f"({self!r}) ** {power} is not affine")

    def conjugate(self) -> Linear:
        """Itself: it stands for a real number."""
        return self

    def _refuse(self, *others: Any) -> NoReturn:
        raise NotAffine(f"a function or comparison of {self!r} is not affine in one feature or weight")

    # NumPy calls these on the elements of an array of objects.
    sin = cos = tan = arcsin = arccos = arctan = arctan2 = sinh = cosh = tanh = exp = log = sqrt = square = _refuse
    __float__ = __int__ = __bool__ = __abs__ = __mod__ = __rpow__ = _refuse
    __lt__ = __le__ = __gt__ = __ge__ = _refuse

    def angle(self) -> Angle:
        """The number as the angle of a gate.

        Raises:
            NotAffine: If it depends on two features or weights.
        """
        used = self.terms if len(self.terms) < 2 else {key: s for key, s in self.terms.items() if s}
        if len(used) > 1:
            raise NotAffine(f"{self!r} depends on {' and '.join(map(name_of, used))}: an angle takes one of them")
        for (source, index), scale in used.items():
            return Angle(source, index, scale, self.offset)
        return const(self.offset)


def symbol(source: Source, index: int) -> Linear:
    """One feature or weight."""
    return Linear({(source, index): 1.0})


def symbols(source: Source, shape: int | tuple[int, ...]) -> Any:
    """Features or weights as a NumPy array of objects, numbered in C order."""
    result = np.empty(shape, dtype=object)
    result.reshape(-1)[:] = [symbol(source, k) for k in range(result.size)]
    return result


def angle_of(value: Any) -> Angle:
    """A traced or plain number as an angle.

    Raises:
        NotAffine: For what is neither a finite real number nor affine in one feature or weight.
    """
    if isinstance(value, np.ndarray) and value.shape == ():
        value = value.item()
    if isinstance(value, Linear):
        return value.angle()
    number = _number(value)
    if number is None or not isfinite(number):
        raise NotAffine(f"{value!r} is no single real number")
    return const(number)


def evaluated(angle: Angle, inputs: Any, weights: Any) -> Any:
    """What an angle is for these features and weights, whatever arithmetic they bring; no needless 1 * or + 0."""
    if angle.source == "const":
        return angle.offset
    values = inputs if angle.source == "input" else weights
    value = values[angle.index] if isinstance(values, (list, tuple)) else values[..., angle.index]
    if angle.scale != 1:
        value = angle.scale * value
    return value + angle.offset if angle.offset else value


def z_of_every_wire(n_wires: int) -> tuple[str, ...]:
    """The readout of a foreign circuit that names none."""
    return tuple("I" * wire + "Z" + "I" * (n_wires - wire - 1) for wire in range(n_wires))
