"""Prices of operations in joules, each with its source, and the energy they make of a model's counts."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import product

from qconv.energy.count import Counts, Row, format_bits

_MEMORY = ("weight_bits", "activation_bits")
# Named here so that leaving them out is a decision: "params" and "units" are paid for as weight_bits and
# activation_bits, and what a quantum device would run ("device:...") never shares a column with joules of arithmetic.
_NOT_JOULES = ("params", "units", "device")


@dataclass(frozen=True)
class Range:
    """Joules: a typical value between a low and a high one."""

    low: float
    typical: float
    high: float


@dataclass(frozen=True)
class Price(Range):
    """Energy of one operation (for memory: of one bit) in joules, with the range it may lie in and where it is from.

    Raises:
        ValueError: unless 0 <= low <= typical <= high.
    """

    source: str

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.typical <= self.high < math.inf:
            raise ValueError(
                f"a price needs 0 <= low <= typical <= high joules, but got {self.low}, {self.typical}, {self.high}"
            )


@dataclass(frozen=True)
class PriceTable:
    """Prices by operation; ``table["mac:int8*int8"]`` looks one up.

    Args:
        name: what hardware the prices are for.
        prices: operation to price, in the vocabulary of ``count``.
    """

    name: str
    prices: Mapping[str, Price] = field(repr=False)

    def __getitem__(self, operation: str) -> Price:
        """Look up a price; a KeyError names an operation without one."""
        if operation not in self.prices:
            raise KeyError(
                f'"{operation}" has no price in "{self.name}": add one with '
                f'table.with_prices({{"{operation}": Price(low, typical, high, source)}}), in joules'
            )
        return self.prices[operation]

    def with_prices(self, prices: Mapping[str, Price]) -> "PriceTable":
        """Give a table with these prices added or replaced."""
        return replace(self, prices={**self.prices, **prices})


# --- Horowitz's table ------------------------------------------------------------------------------------------------

_HOROWITZ = "Horowitz, Computing's energy problem (and what we can do about it), ISSCC 2014, Fig. 1.1.9 (45 nm, 0.9 V)"
_SCALING = "scaled with width n from it: an addition as n, a multiplication as n^2"
_ADD = {"int8": 0.03, "int16": 0.05, "int32": 0.1, "fp16": 0.4, "fp32": 0.9}  # pJ
_MULTIPLY = {"int8": 0.2, "int32": 3.1, "fp16": 1.1, "fp32": 3.7}  # pJ
_SRAM_8K, _SRAM_32K, _SRAM_1M, _DRAM = (access / 64 for access in (10, 20, 100, 2600))  # pJ a bit, accesses of 64 bits

_FLOATS = ("fp16", "fp32", "fp64")
_INTEGERS = tuple(f"int{bits}" for bits in range(2, 33))
_SIGNS = ("ternary", "binary")


def _price(low: float, typical: float, high: float, source: str) -> Price:
    return Price(low * 1e-12, typical * 1e-12, high * 1e-12, source)


def _published(picojoules: float, what: str) -> Price:
    return _price(picojoules, picojoules, picojoules, f"{_HOROWITZ}: {what}")


def _plus(a: Range, b: Range, source: str) -> Price:
    return Price(a.low + b.low, a.typical + b.typical, a.high + b.high, source)


def _addition(number: str) -> Price:
    if number in _ADD:
        return _published(_ADD[number], f"{number} add")
    if number == "fp64":
        # High: the step from fp16 to fp32 taken once more.
        return _price(2 * 0.9, 2 * 0.9, 0.9**2 / 0.4, f"{_HOROWITZ}: fp32 add; {_SCALING}")
    bits = format_bits(number)
    low, high = 0.1 / 32 * bits, 0.03 / 8 * bits
    if bits < 8:
        note = "low and typical: scaled with width from the 32- and 8-bit adders; high: an 8-bit adder"
        return _price(low, high, 0.03, f"{_HOROWITZ}: integer adds; {note}")
    # In proportion from either end, but a wider adder never costs less than a narrower one of the table.
    below, above = (8, 16) if bits < 16 else (16, 32)
    cheap, dear = _ADD[f"int{below}"], _ADD[f"int{above}"]
    typical = cheap + (dear - cheap) * (bits - below) / (above - below)
    return _price(max(low, cheap), typical, min(high, dear), f"{_HOROWITZ}: integer adds, interpolated in width")


def _multiplication(a: str, b: str) -> Price:
    if a == b and a in _MULTIPLY:
        return _published(_MULTIPLY[a], f"{a} mult")
    if "fp64" in (a, b):
        return _price(3.7**2 / 1.1, 4 * 3.7, 4 * 3.7, f"{_HOROWITZ}: fp32 mult; {_SCALING}")
    bits = math.sqrt(format_bits(a) * format_bits(b))
    typical = 0.2 * (bits / 8) ** 2
    # Below 8 bits wires and registers do not shrink with the square: high is in proportion to the width.
    return _price(
        3.1 * (bits / 32) ** 2, typical, max(typical, 0.2 * bits / 8), f"{_HOROWITZ}: 8- and 32-bit mult; {_SCALING}"
    )


def _comparison(number: str) -> Price:
    bits = format_bits(number)
    if number not in _FLOATS:
        adder = _addition(number)
        return replace(adder, source=f"an integer comparison is a subtraction. {adder.source}")
    integer, high = _addition(f"int{min(bits, 32)}"), _addition(number)
    words = max(1, bits // 32)
    note = "floats compare like integers of their width (typical) or by a subtraction (high)"
    return Price(words * integer.low, words * integer.typical, high.high, f"{note}. {integer.source}")


def _multiply_accumulate(weight: str, activation: str) -> Price:
    floats = [number for number in (weight, activation) if number in _FLOATS]
    signs = [number for number in (weight, activation) if number in _SIGNS]
    if floats:
        wide = max(floats, key=format_bits)
        # A half-precision product may be accumulated in single precision.
        add = _plus(_addition(wide), _price(0, 0, 0.5 if wide == "fp16" else 0, ""), "")
        if signs:
            return replace(add, source=f"{wide} add or subtract, no product. {_HOROWITZ}")
        return _plus(_multiplication(wide, wide), add, f"{wide} product and {wide} sum. {_HOROWITZ}")
    wide_sum = _addition("int32").typical
    if len(signs) == 2:
        # XNOR (a 1-bit product) and one full adder of a population count; ternary numbers take two bit planes, sign and
        # non-zero. High: no counting tree, each product is added in a 32-bit accumulator.
        planes = 1 if weight == activation == "binary" else 2
        xnor, adder = _multiplication("binary", "binary"), _addition("binary")
        low, typical = xnor.low + adder.low, planes * (xnor.typical + adder.typical)
        note = "no price for XNOR and popcount there: a 1-bit product and a 1-bit sum"
        return Price(low, typical, xnor.high + wide_sum, f"{_HOROWITZ}; {note}, {_SCALING}")
    narrow = max((number for number in (weight, activation) if number not in _SIGNS), key=format_bits)
    sums = Range(_addition(narrow).low, wide_sum, wide_sum)
    note = f"sum in {narrow} (low) or int32 (typical, high)"
    if signs:
        return Price(sums.low, sums.typical, sums.high, f"one add or subtract, no product; {note}. {_HOROWITZ}")
    return _plus(_multiplication(weight, activation), sums, f"{weight} by {activation} product, {note}. {_HOROWITZ}")


def _horowitz_prices() -> dict[str, Price]:
    formats = (*_FLOATS, *_INTEGERS, *_SIGNS)
    prices = {f"add:{number}": _addition(number) for number in formats}
    prices |= {f"mul:{number}": _multiplication(number, number) for number in formats}
    prices |= {f"cmp:{number}": _comparison(number) for number in formats}
    prices |= {f"mac:{w}*{a}": _multiply_accumulate(w, a) for w, a in product(formats, formats)}
    weights = "each bit read once: low from an 8K SRAM, typical a 1M SRAM (whole networks), high DRAM (2600 pJ)"
    activations = "low one access of an 8K SRAM, typical a write and a read of a 32K SRAM (one layer), high of DRAM"
    prices["weight_bits"] = _price(_SRAM_8K, _SRAM_1M, _DRAM, f"{_HOROWITZ}, accesses of 64 bits; {weights}")
    prices["activation_bits"] = _price(
        _SRAM_8K, 2 * _SRAM_32K, 2 * _DRAM, f"{_HOROWITZ}, accesses of 64 bits; {activations}"
    )
    return prices


HOROWITZ_45NM = PriceTable("Horowitz 45 nm", _horowitz_prices())
"""Energies of a 45 nm process at 0.9 V; what the published table lacks is scaled from it, and its source says so."""


# --- Estimates -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerEstimate:
    """Modeled joules of one row of counts: arithmetic and memory apart."""

    name: str
    kind: str
    compute: Range
    memory: Range


@dataclass(frozen=True)
class Estimate:
    """Joules that one inference would take on the hardware of a price table: a model, not a measurement.

    It adds to nothing, least of all to a :class:`~qconv.energy.meter.Measured`: the joules that this machine spent.
    """

    joules: float
    low: float
    high: float
    per_layer: tuple[LayerEstimate, ...]
    prices: str

    @property
    def compute(self) -> Range:
        """Joules of the arithmetic."""
        return _sum(layer.compute for layer in self.per_layer)

    @property
    def memory(self) -> Range:
        """Joules of reading the weights and of handing on activations."""
        return _sum(layer.memory for layer in self.per_layer)

    def __str__(self) -> str:
        total, low, high, compute, memory = (
            f"{joules * 1e6:.4g}"
            for joules in (self.joules, self.low, self.high, self.compute.typical, self.memory.typical)
        )
        parts = f"arithmetic {compute}, memory {memory}"
        return f"{total} uJ an inference ({low} to {high}): {parts}; modeled for {self.prices}"


def estimate(counts: Counts, prices: PriceTable = HOROWITZ_45NM) -> Estimate:
    """Estimate the energy of one inference.

    "params" and "units" are not priced, being paid for as weight_bits and activation_bits; nor are "device:..."
    operations, which no classical hardware runs.

    Args:
        counts: what :func:`~qconv.energy.count.count` found.
        prices: joules an operation.

    Raises:
        KeyError: naming an operation without a price.
    """
    layers = tuple(_layer_estimate(row, prices) for row in counts.rows)
    total = _sum(part for layer in layers for part in (layer.compute, layer.memory))
    return Estimate(total.typical, total.low, total.high, layers, prices.name)


def _layer_estimate(row: Row, prices: PriceTable) -> LayerEstimate:
    compute: list[Range] = []
    memory: list[Range] = []
    for operation, amount in row.operations.items():
        if operation.split(":")[0] in _NOT_JOULES:
            continue
        price = prices[operation]
        part = Range(amount * price.low, amount * price.typical, amount * price.high)
        (memory if operation in _MEMORY else compute).append(part)
    return LayerEstimate(row.name, row.kind, _sum(compute), _sum(memory))


def _sum(ranges: Iterable[Range]) -> Range:
    parts = list(ranges)
    return Range(*(math.fsum(getattr(part, end) for part in parts) for end in ("low", "typical", "high")))
