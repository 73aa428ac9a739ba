"""Angles of a foreign circuit while it is read: numbers that remember which feature or weight they came from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import reduce
from math import acos, asin, isfinite
from numbers import Real
from operator import add, mul
from typing import Any, NoReturn

import numpy as np

from circuits.circuit import Angle, Source, computed, const
from circuits.features import Factor, Product

# A product of features and functions of them, or the index of a weight.
Key = Product | int

# A short power of a sum has exponentially many terms, so these bound what an expression may grow to.
_MOST_FACTORS = 64
_MOST_TERMS = 4096


class NotAffine(ValueError):
    """An angle that is neither scale * weight + offset nor a sum of products of features."""


def name_of(key: Key) -> str:
    """A weight or product of features as circuits write it: w[0], x[0]*x[1]."""
    return f"w[{key}]" if isinstance(key, int) else "*".join(factor.text() for factor in key)


def _number(value: Any) -> float | None:
    """A plain real number, also as an array or tensor of no dimensions; None for anything else.

    Raises:
        NotAffine: For a complex number, of which an angle is no multiple.
    """
    if isinstance(value, complex):
        raise NotAffine(f"{value} is no real number: write the exponential of a Pauli word as a Pauli rotation")
    if isinstance(value, Real):
        return float(value)
    if getattr(value, "shape", None) == () and not isinstance(getattr(value, "item", lambda: None)(), Linear):
        try:
            return float(value)
        except (TypeError, ValueError):
            return None
    return None


class Linear:
    """The number offset + sum of scale * (a weight or a product of features), as far as arithmetic keeps it one.

    Args:
        terms: Scale of each weight and each product of features.
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
            return self._product(other)
        number = _number(other)
        if number is None:
            return NotImplemented
        return Linear({key: scale * number for key, scale in self.terms.items()}, self.offset * number)

    __rmul__ = __mul__

    def _product(self, other: Linear) -> Linear:
        if len(self.terms) * len(other.terms) > _MOST_TERMS:
            raise NotAffine(f"a product of {len(self.terms)} and {len(other.terms)} terms exceeds {_MOST_TERMS} terms")
        result = Linear({}, self.offset * other.offset) + _scaled(self, other.offset) + _scaled(other, self.offset)
        for one, scale in self.terms.items():
            for two, factor in other.terms.items():
                if isinstance(one, int) or isinstance(two, int):
                    raise NotAffine(f"({self!r}) * ({other!r}) is a product with a weight")
                if len(one) + len(two) > _MOST_FACTORS:
                    raise NotAffine(f"a product of {len(one) + len(two)} features exceeds {_MOST_FACTORS}")
                result = result + Linear({tuple(sorted(one + two)): scale * factor})
        return result

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
        whole = _number(power)
        if whole is None or not whole.is_integer() or not 1 <= whole <= _MOST_FACTORS:
            raise NotAffine(f"({self!r}) ** {power} is no product of features, at most {_MOST_FACTORS} of them")
        return reduce(mul, [self] * int(whole))

    def applied(self, function: str, *parameters: float) -> Linear:
        """A function of the table of features, of a plain feature or, for arccos, of its square."""
        if not self.terms and function in _OF_NUMBERS:
            return Linear({}, _OF_NUMBERS[function](self.offset))
        if len(self.terms) == 1 and not self.offset:
            ((key, scale),) = self.terms.items()
            factors = key if not isinstance(key, int) and scale == 1 else ()
            if factors and all(factor.function == "x" for factor in factors):
                index = factors[0].index
                if len(factors) == 1:
                    return Linear({(Factor(index, function, parameters),): 1.0})
                if factors == (Factor(index),) * 2 and function == "arccos":
                    return Linear({(Factor(index, "arccos_square"),): 1.0})
        raise NotAffine(f"{function} of {self!r} is no function of one plain feature")

    def arcsin(self) -> Linear:
        """The arcsine of a feature; NumPy calls it on the elements of an array of objects."""
        return self.applied("arcsin")

    def arccos(self) -> Linear:
        """The arccosine of a feature or of its square."""
        return self.applied("arccos")

    def square(self) -> Linear:
        """Its product with itself."""
        return self * self

    def conjugate(self) -> Linear:
        """Itself: it stands for a real number."""
        return self

    def _refuse(self, *others: Any) -> NoReturn:
        raise NotAffine(f"a function or comparison of {self!r} is no product of features")

    # NumPy calls these on the elements of an array of objects.
    sin = cos = tan = arctan = arctan2 = sinh = cosh = tanh = exp = log = sqrt = _refuse
    __float__ = __int__ = __bool__ = __abs__ = __mod__ = __rpow__ = _refuse
    __lt__ = __le__ = __gt__ = __ge__ = __eq__ = __ne__ = _refuse
    # It is itself and equal to nothing, so it can be a key but not be compared.
    __hash__ = object.__hash__

    def angle(self) -> Angle:
        """The number as the angle of a gate.

        Raises:
            NotAffine: If it depends on two weights, or on a weight and a feature.
        """
        used = self.terms if len(self.terms) < 2 else {key: s for key, s in self.terms.items() if s}
        products: dict[Product, float] = {}
        for key, scale in used.items():
            if not isinstance(key, int):
                products[key] = scale
            elif len(used) > 1:
                raise NotAffine(f"{self!r} depends on {' and '.join(map(name_of, used))}: an angle takes one weight")
            else:
                return Angle("weight", key, scale, self.offset)
        # A plain feature keeps its place even if its scale is 0.
        if len(products) == 1 and (key := next(iter(products))) == (Factor(key[0].index),):
            return Angle("input", key[0].index, products[key], self.offset)
        return computed(products, self.offset)


_OF_NUMBERS: dict[str, Callable[[float], float]] = {"arcsin": asin, "arccos": acos}


def _scaled(value: Linear, by: float) -> Linear:
    """The terms of a number times another; none times 0."""
    return Linear({key: scale * by for key, scale in value.terms.items()} if by else {})


def symbol(source: Source, index: int) -> Linear:
    """One feature or weight."""
    return Linear({(Factor(index),) if source == "input" else index: 1.0})


def symbols(source: Source, shape: int | tuple[int, ...]) -> Any:
    """Features or weights as a NumPy array of objects, numbered in C order."""
    result = np.empty(shape, dtype=object)
    result.reshape(-1)[:] = [symbol(source, k) for k in range(result.size)]
    return result


def angle_of(value: Any) -> Angle:
    """A traced or plain number as an angle.

    Raises:
        NotAffine: For what is neither a finite real number nor made of one weight or of products of features.
    """
    if isinstance(value, np.ndarray) and value.shape == ():
        value = value.item()
    if isinstance(value, Linear):
        return value.angle()
    number = _number(value)
    if number is None or not isfinite(number):
        raise NotAffine(f"{value!r} is no single real number")
    return const(number)


def evaluated(angle: Angle, inputs: Any, weights: Any, apply: Callable[[Factor, Any], Any]) -> Any:
    """What an angle is for these features and weights, whatever arithmetic they bring; no needless 1 * or + 0.

    Args:
        angle: The angle.
        inputs: Features, a list or an array (..., n_inputs).
        weights: Weights, likewise.
        apply: A factor's function other than "x" of a value, in that arithmetic.
    """
    if angle.source == "const":
        return angle.offset

    def read(values: Any, index: int) -> Any:
        return values[index] if isinstance(values, (list, tuple)) else values[..., index]

    def factor(one: Factor) -> Any:
        value = read(inputs, one.index)
        return value if one.function == "x" else apply(one, value)

    if angle.computed is None:
        value = read(inputs if angle.source == "input" else weights, angle.index)
    else:
        products = [_times(c, reduce(mul, map(factor, own))) for c, own in angle.computed.terms]
        value = reduce(add, products)
    value = _times(angle.scale, value)
    return value + angle.offset if angle.offset else value


def _times(scale: float, value: Any) -> Any:
    return value if scale == 1 else scale * value


def z_of_every_wire(n_wires: int) -> tuple[str, ...]:
    """The readout of a foreign circuit that names none."""
    return tuple("I" * wire + "Z" + "I" * (n_wires - wire - 1) for wire in range(n_wires))
