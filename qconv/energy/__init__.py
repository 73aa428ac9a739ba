"""Operations of a model, what they would cost in joules on some hardware, and what this machine measures."""

from qconv.energy.count import Counts, Row, count
from qconv.energy.meter import Measured, Meter
from qconv.energy.prices import HOROWITZ_45NM, Estimate, LayerEstimate, Price, PriceTable, Range, estimate
from qconv.energy.rules import layer_operations

__all__ = [
    "HOROWITZ_45NM",
    "Counts",
    "Estimate",
    "LayerEstimate",
    "Measured",
    "Meter",
    "Price",
    "PriceTable",
    "Range",
    "Row",
    "count",
    "estimate",
    "layer_operations",
]
