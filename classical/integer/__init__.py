"""What quantized layers and networks compute, from integer arithmetic alone."""

from classical.integer.layers import IntegerConv2d, IntegerLayer, IntegerLinear, integer_twin
from classical.integer.networks import integer_network
from classical.integer.onnx import export_onnx
from classical.integer.rescale import fixed_point

__all__ = [
    "IntegerConv2d",
    "IntegerLayer",
    "IntegerLinear",
    "export_onnx",
    "fixed_point",
    "integer_network",
    "integer_twin",
]
