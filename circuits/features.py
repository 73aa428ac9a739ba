"""Angles that are no plain feature: products, sums and fixed functions of a patch's features, as data.

They depend on the patch alone, so they are computed before the circuit: a backend sees them as inputs of their own and
needs to know nothing of them (`qconv.backends.computed`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf, isfinite

from circuits.naming import unknown

# Function -> numbers it takes besides the feature, and the features it is defined for.
FUNCTIONS: dict[str, tuple[int, tuple[float, float]]] = {
    "x": (0, (-inf, inf)),
    "arcsin": (0, (-1.0, 1.0)),
    "arccos": (0, (-1.0, 1.0)),
    # arccos(x^2), of the "arcsin" encoding.
    "arccos_square": (0, (-1.0, 1.0)),
    # 1 above the threshold, else 0.
    "step": (1, (-inf, inf)),
    # Bit k (0 is the least) of round(x (2^n - 1)).
    "bit": (2, (0.0, 1.0)),
}


@dataclass(frozen=True, order=True)
class Factor:
    """One feature of a patch, or a fixed function of it.

    Args:
        index: Which feature.
        function: "x" (itself), "arcsin", "arccos", "arccos_square", "step" or "bit".
        parameters: The function's numbers: (threshold,) for "step", which is 1 for x above it and else 0; (k, n) for
            "bit", which is bit k of the gray value round(x (2^n - 1)), k = 0 the least.

    Raises:
        ValueError: For an unknown function, a negative index, or numbers that the function does not take.
    """

    index: int
    function: str = "x"
    parameters: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.function not in FUNCTIONS:
            raise unknown("function of a feature", self.function, FUNCTIONS)
        numbers = FUNCTIONS[self.function][0]
        object.__setattr__(self, "parameters", tuple(float(number) for number in self.parameters))
        if self.index < 0:
            raise ValueError(f"feature has index {self.index}: it must be 0 or more")
        if len(self.parameters) != numbers or not all(map(isfinite, self.parameters)):
            raise ValueError(f"{self.function} was given the numbers {self.parameters}: give {numbers} finite ones")
        if self.function == "bit":
            bit, bits = self.parameters
            if not (bit.is_integer() and bits.is_integer() and 0 <= bit < bits):
                raise ValueError(f"bit {bit:g} of {bits:g} bits: give whole numbers, the first from 0 to {bits:g} - 1")

    @property
    def range(self) -> tuple[float, float]:
        """Least and largest feature that it is defined for."""
        return FUNCTIONS[self.function][1]

    def text(self) -> str:
        """As written in a circuit's canonical text."""
        name = f"x[{self.index}]"
        if self.function == "x":
            return name
        return f"{self.function}({','.join([name, *map(repr, self.parameters)])})"


Product = tuple[Factor, ...]
Term = tuple[float, Product]


@dataclass(frozen=True)
class Feature:
    """A number computed from a patch before the circuit: the sum of coefficient * product of factors over all terms.

    Equal functions are equal data: terms are merged and sorted, longest products first.

    Args:
        terms: (coefficient, factors) each; at least one, none without factors (a constant is an Angle's offset).

    Raises:
        ValueError: For no term, a term without factors, or a coefficient that is not finite.
    """

    terms: tuple[Term, ...]

    def __post_init__(self) -> None:
        merged: dict[Product, float] = {}
        for coefficient, factors in self.terms:
            if not factors or not isfinite(coefficient):
                raise ValueError(
                    f"term of a feature has coefficient {coefficient} and {len(factors)} factors: give a finite number "
                    "and at least one factor"
                )
            product = tuple(sorted(factors))
            merged[product] = merged.get(product, 0.0) + float(coefficient)
        kept = sorted(((c, product) for product, c in merged.items() if c), key=lambda t: (-len(t[1]), t[1]))
        if not kept:
            raise ValueError(f"feature has the terms {self.terms}, whose sum is 0: give at least one that stays")
        object.__setattr__(self, "terms", tuple(kept))

    @property
    def factors(self) -> tuple[Factor, ...]:
        """Every factor once."""
        return tuple(dict.fromkeys(factor for _, product in self.terms for factor in product))

    @property
    def indices(self) -> tuple[int, ...]:
        """Features that it reads."""
        return tuple(sorted({factor.index for factor in self.factors}))

    def shifted(self, by: int) -> Feature:
        """The same function of features `by` places further on."""
        return Feature(
            tuple(
                (c, tuple(Factor(f.index + by, f.function, f.parameters) for f in product)) for c, product in self.terms
            )
        )

    def text(self) -> str:
        """As written in a circuit's canonical text."""
        terms = ("*".join([repr(c), *(factor.text() for factor in product)]) for c, product in self.terms)
        return f"({' + '.join(terms)})"


def simplest(terms: Mapping[Product, float]) -> tuple[float, int | Feature] | None:
    """A sum of products as a scale and a feature: its index where it is plain.

    Args:
        terms: Coefficient of each product.

    Returns:
        (scale, index or Feature): the Feature's first coefficient is 1. None if nothing is left.
    """
    left = {product: c for product, c in terms.items() if c}
    if not left:
        return None
    feature = Feature(tuple((c, product) for product, c in left.items()))
    scale, first = feature.terms[0]
    if len(feature.terms) == 1 and len(first) == 1 and first[0].function == "x":
        return scale, first[0].index
    return scale, Feature(tuple((c / scale, product) for c, product in feature.terms))
