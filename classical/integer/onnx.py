"""Export to ONNX with explicit quantization: QuantizeLinear and DequantizeLinear around every quantized layer.

A runtime that knows integer convolutions finds them between these nodes; one that does not computes the same in float.
"""

import os
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from classical.integer.codes import InputCode, input_code, rounds_to_nearest, thresholds
from classical.layers import QuantizedConv2d, QuantizedLinear, require_real
from classical.pruning.masks import private_copy

_BYTE = (-128, 127, torch.int8)


def export_onnx(model: nn.Module, example: Tensor, path: str | os.PathLike[str]) -> None:
    """Write a network of quantized layers as an ONNX model, batches of any size its input.

    Inputs of quantized layers are quantized to int8 and weights are stored as int8. Where both have 8 bits, biases are
    int32 in steps of the product of both scales, as integer runtimes want them. The rest stays float.

    Args:
        model: with QuantizedConv2d and QuantizedLinear of at most 8 bits; it stays as it is. Layers whose quantizers
            are both 'float' are written as they are.
        example: a batch of inputs, float32.
        path: of the file.

    Raises:
        ValueError: a layer whose values are no int8 codes, named.
        ImportError: without the extra "onnx".
    """
    if find_spec("onnx") is None or find_spec("onnxscript") is None:
        raise ImportError("export_onnx needs onnx and onnxscript, which are not installed: pip install 'qconv[onnx]'")
    import_module("torch.ao.quantization.fx._decomposed")  # defines the operators that are written
    require_real(example)
    twin = private_copy(model).eval().cpu().float()
    for name, layer in twin.named_modules():
        if isinstance(layer, QuantizedConv2d | QuantizedLinear):
            try:
                _explicit(layer)
            except ValueError as error:
                raise ValueError(f"layer {name!r} cannot be written: {error}") from error
    batch = example.detach().cpu().float()
    if len(batch) < 2:  # torch.export takes an axis of one for fixed
        batch = torch.cat((batch, batch))
    shapes = ({0: torch.export.Dim("batch")},)
    program: Any = torch.onnx.export(twin, (batch,), dynamo=True, dynamic_shapes=shapes, verbose=False)
    target = Path(path)
    beside = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        beside.write_bytes(program.model_proto.SerializeToString())
        beside.replace(target)
    finally:
        beside.unlink(missing_ok=True)


def _explicit(layer: QuantizedConv2d | QuantizedLinear) -> None:
    """Put stored codes and operators that ONNX knows in the place of a layer's quantizers."""
    activation, quantizer = layer.activation_quantizer, layer.weight_quantizer
    if activation.format == quantizer.format == "fp32":
        return
    code = input_code(activation, layer.weight)
    rounds = code.dtype == torch.int8 and rounds_to_nearest(thresholds(activation, layer.weight), code)
    if activation.patch_scale or not rounds:
        raise ValueError(f"its inputs, {activation!r}, are no codes of at most 8 bits that round to the nearest")
    codes, scale, zero = quantizer.integers(layer.weight)
    if codes.min() < -128 or codes.max() > 127:
        raise ValueError(f"its weights, {quantizer!r}, have codes {int(codes.min())} ... {int(codes.max())}, not int8")
    scales, zeros = (values.reshape(-1).expand(len(codes)).clone() for values in (scale.float(), zero))
    layer.activation_quantizer = _CodedInput(code)  # type: ignore[assignment]
    layer.weight_quantizer = _Stored(codes.to(torch.int8), scales, zeros)  # type: ignore[assignment]
    # Steps of fewer bits are so large that a bias in whole steps would be another.
    if layer.bias is not None and activation.bits == quantizer.bits == 8:
        steps = scales.double() * code.scale
        stored = (layer.bias.detach().double() / steps).round()
        if stored.abs().max() < 2**31:
            bias = _Stored(stored.int(), steps.float(), None)
            parametrize.register_parametrization(layer, "bias", bias, unsafe=True)


class _CodedInput(nn.Module):
    """Real numbers to codes and back."""

    patch_scale = False

    def __init__(self, code: InputCode) -> None:
        super().__init__()
        self.code = code

    def forward(self, x: Tensor) -> Tensor:
        code = self.code
        if (code.low, code.high) != _BYTE[:2]:  # QuantizeLinear clips to all of int8
            x = x.clamp((code.low - code.zero) * code.scale, (code.high - code.zero) * code.scale)
        operators = torch.ops.quantized_decomposed
        codes = operators.quantize_per_tensor(x, code.scale, code.zero, *_BYTE)
        real: Tensor = operators.dequantize_per_tensor(codes, code.scale, code.zero, *_BYTE)
        return real


class _Stored(nn.Module):
    """Codes of weights or biases, a scale an output; what is passed in their place is not read."""

    codes: Tensor
    scales: Tensor

    def __init__(self, codes: Tensor, scales: Tensor, zeros: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.register_buffer("zeros", zeros)

    def forward(self, _: Tensor) -> Tensor:
        info = torch.iinfo(self.codes.dtype)
        real: Tensor = torch.ops.quantized_decomposed.dequantize_per_channel(
            self.codes, self.scales, self.zeros, 0, info.min, info.max, self.codes.dtype
        )
        return real
