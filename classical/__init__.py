"""Conventional convolution made cheap. No qubits."""

from classical.calibration import calibrate
from classical.convert import quantize
from classical.data_free import data_free_quantize
from classical.factorized import FactorizedConv2d, factorize
from classical.integer import IntegerConv2d, IntegerLinear, export_onnx, integer_network, integer_twin
from classical.layers import QuantizedConv2d, QuantizedLinear
from classical.quantizers import Quantizer, quantizer, quantizer_names

# Checked by qconv/__init__.py: it must find this package and no other of the name.
QCONV_SENTINEL = "qconv"

__all__ = [
    "FactorizedConv2d",
    "IntegerConv2d",
    "IntegerLinear",
    "QuantizedConv2d",
    "QuantizedLinear",
    "Quantizer",
    "calibrate",
    "data_free_quantize",
    "export_onnx",
    "factorize",
    "integer_network",
    "integer_twin",
    "quantize",
    "quantizer",
    "quantizer_names",
]
