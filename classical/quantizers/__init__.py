"""Quantizers: real tensors to few representable values, with straight-through gradients.

A quantizer of evenly spaced levels states its values as integers: `integers(x)` gives codes, scale and zero point.
Every quantizer of at most 8 bits states them as a table: `codebook(x)` gives indices and levels. `forward(x)` is either
of them as real numbers, exactly, and is what a layer trains with. `quantizer(name, role)` builds one.
To add one: a subclass of Quantizer with an `encode` of its own, and its name in the table of `names`.
"""

from classical.quantizers.affine import LSQ, IntegerActivation, IntegerWeight, LearnedStep
from classical.quantizers.base import Codebook, Codes, Float, Learned, Quantizer, Role, straight_through
from classical.quantizers.binary import BNN, XNORActivation, XNORWeight
from classical.quantizers.codebooks import LQ, NAQ, TrainedLevels, Uneven
from classical.quantizers.names import quantizer, quantizer_names
from classical.quantizers.relaxed import RelaxedQuantizer
from classical.quantizers.ternary import TTQ, TWN
from classical.quantizers.uniform import HWGQ, DoReFaActivation, DoReFaWeight, half_gaussian_step

__all__ = [
    "BNN",
    "HWGQ",
    "LQ",
    "LSQ",
    "NAQ",
    "TTQ",
    "TWN",
    "Codebook",
    "Codes",
    "DoReFaActivation",
    "DoReFaWeight",
    "Float",
    "IntegerActivation",
    "IntegerWeight",
    "Learned",
    "LearnedStep",
    "Quantizer",
    "RelaxedQuantizer",
    "Role",
    "TrainedLevels",
    "Uneven",
    "XNORActivation",
    "XNORWeight",
    "half_gaussian_step",
    "quantizer",
    "quantizer_names",
    "straight_through",
]
