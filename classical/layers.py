"""QuantizedConv2d and QuantizedLinear: torch's layers with quantized weights and inputs.

Inputs are quantized before they are padded, and padding zeros stay 0 in every format: affine integers represent 0
exactly; beside signs (bnn, xnor) the border holds a third value, so a sign layer with padding is ternary there.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from classical.quantizers import Quantizer, quantizer


def require_real(x: Tensor) -> None:
    """Check that an input is a tensor of floating point numbers.

    Raises:
        ValueError: it does not.
    """
    if not isinstance(x, Tensor):
        raise ValueError(f"input is a {type(x).__name__} but must be a tensor")
    if not x.is_floating_point():
        raise ValueError(f"input is {x.dtype} but a layer needs floating point: pass x.float() / 255 for 8-bit images")


def require_module(model: object) -> None:
    """Check that a model is a module.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model is {model!r} ({type(model).__name__}) but must be an nn.Module")


@dataclass(frozen=True)
class Axis:
    """A convolution along one image axis; `before` and `after` are the padding in pixels."""

    kernel: int
    stride: int
    dilation: int
    before: int
    after: int

    @property
    def span(self) -> int:
        """Pixels from the kernel's first tap to its last."""
        return self.dilation * (self.kernel - 1) + 1


@dataclass(frozen=True)
class Geometry:
    """Which inputs each output of a convolution sees."""

    in_channels: int
    out_channels: int
    groups: int
    rows: Axis
    columns: Axis
    padding_mode: str

    def output_shape(self, input_shape: tuple[int, ...]) -> tuple[int, int, int]:
        """Shape (out_channels, H', W') of the output for one input of shape (in_channels, H, W).

        Raises:
            ValueError: input_shape is not (in_channels, H, W), or the kernel is larger than the padded input.
        """
        if len(input_shape) != 3 or input_shape[0] != self.in_channels:
            raise ValueError(
                f"input has shape {tuple(input_shape)} but the layer takes ({self.in_channels}, height, width)"
            )
        axes = (self.rows, self.columns)
        padded = [size + axis.before + axis.after for size, axis in zip(input_shape[1:], axes, strict=True)]
        if any(size < axis.span for size, axis in zip(padded, axes, strict=True)):
            raise ValueError(
                f"kernel spans {self.rows.span}x{self.columns.span} but the padded input is {padded[0]}x{padded[1]}: "
                "use a smaller kernel or more padding"
            )
        height, width = ((size - axis.span) // axis.stride + 1 for size, axis in zip(padded, axes, strict=True))
        return self.out_channels, height, width


class QuantizedConv2d(nn.Conv2d):
    """nn.Conv2d with quantized weights and inputs, trained through straight-through gradients.

    Learned scales of the weights start from the weights that the layer is drawn with; after other weights were put in,
    `layer.weight_quantizer.fit(layer.weight)` starts them again. Loading a state_dict loads them.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype:
            as for nn.Conv2d.
        weight: quantizer of the weights, a name (see `quantizer_names`) or a Quantizer.
        activation: quantizer of the inputs, likewise.

    Raises:
        ValueError: unknown quantizer; groups that do not divide the channels; a size below 1.

    Source: see the quantizers.
    """

    weight_quantizer: Quantizer
    activation_quantizer: Quantizer

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        weight: str | Quantizer = "int8",
        activation: str | Quantizer = "int8",
    ) -> None:
        if groups < 1 or in_channels % groups or out_channels % groups:
            raise ValueError(
                f"groups={groups} must divide in_channels={in_channels} and out_channels={out_channels}: "
                "choose a common divisor"
            )
        for name, size in (("kernel_size", kernel_size), ("stride", stride), ("dilation", dilation)):
            if min(size if isinstance(size, tuple | list) else (size,)) < 1:
                raise ValueError(f"{name} is {size} but must be 1 or more on each axis")
        if min(in_channels, out_channels) < 1:
            raise ValueError(f"in_channels={in_channels} and out_channels={out_channels} must be 1 or more")
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype
        )
        attach_quantizers(self, weight, activation)

    def quantized_weight(self) -> Tensor:
        """The weights that run, of weight's shape."""
        weight: Tensor = self.weight_quantizer(self.weight)
        return weight

    @property
    def geometry(self) -> Geometry:
        """What the layer reads and writes where."""
        left, right, top, bottom = self._reversed_padding_repeated_twice
        rows, columns = zip(self.kernel_size, self.stride, self.dilation, strict=True)
        return Geometry(
            self.in_channels,
            self.out_channels,
            self.groups,
            Axis(*rows, before=top, after=bottom),
            Axis(*columns, before=left, after=right),
            self.padding_mode,
        )

    def forward(self, input: Tensor) -> Tensor:
        """Convolve (B, C, H, W) or (C, H, W), as nn.Conv2d does, with quantized weights and input.

        Raises:
            ValueError: input is not floating point or does not fit the layer.
        """
        require_real(input)
        if input.dim() == 3:
            return self.forward(input.unsqueeze(0)).squeeze(0)
        self.geometry.output_shape(input.shape[1:])
        scaled = self.activation_quantizer.patch_scale
        bias = None if scaled else self.bias
        output: Tensor = self._conv_forward(self.activation_quantizer(input), self.quantized_weight(), bias)
        if scaled:
            output = output * self._patch_scale(input)
            return output if self.bias is None else output + self.bias[:, None, None]
        return output

    def _patch_scale(self, x: Tensor) -> Tensor:
        """Mean |x| of the patch that each output sees, padding included: (B, out_channels, H', W')."""
        means = x.abs().reshape(-1, self.groups, self.in_channels // self.groups, *x.shape[2:]).mean(2)
        box = means.new_ones(self.groups, 1, *self.kernel_size) / (self.kernel_size[0] * self.kernel_size[1])
        scale: Tensor = self._conv_forward(means, box, None)
        return scale.repeat_interleave(self.out_channels // self.groups, 1)

    def counts(self, input_shape: tuple[int, ...]) -> Counter[str]:
        """Operations, parameters and bits of one inference on one input of shape (in_channels, H, W).

        Raises:
            ValueError: input_shape does not fit the layer.
        """
        channels, rows, columns = self.geometry.output_shape(input_shape)
        positions = rows * columns
        values, patches = torch.Size(input_shape).numel(), positions * self.groups
        counts = _counts(self, values, channels * positions, patches)
        if self.activation_quantizer.patch_scale:
            area = self.kernel_size[0] * self.kernel_size[1]
            pixels = input_shape[1] * input_shape[2]
            counts["add:fp32"] += (self.in_channels - self.groups) * pixels + self.groups * positions * (area - 1)
            counts["mul:fp32"] += self.groups * positions  # by 1 / (channels * area)
        return +counts


class QuantizedLinear(nn.Linear):
    """nn.Linear with quantized weights and inputs, trained through straight-through gradients.

    Learned scales of the weights start as in QuantizedConv2d.

    Args:
        in_features, out_features, bias, device, dtype: as for nn.Linear.
        weight: quantizer of the weights, a name (see `quantizer_names`) or a Quantizer.
        activation: quantizer of the inputs, likewise.

    Raises:
        ValueError: unknown quantizer.

    Source: see the quantizers.
    """

    weight_quantizer: Quantizer
    activation_quantizer: Quantizer

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        weight: str | Quantizer = "int8",
        activation: str | Quantizer = "int8",
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        attach_quantizers(self, weight, activation)

    def quantized_weight(self) -> Tensor:
        """The weights that run, of weight's shape."""
        weight: Tensor = self.weight_quantizer(self.weight)
        return weight

    def forward(self, input: Tensor) -> Tensor:
        """Multiply (..., in_features) to (..., out_features), axis 0 being the batch if there are two or more.

        Raises:
            ValueError: input is not floating point or does not fit the layer.
        """
        require_real(input)
        self._check(input.shape)
        if input.dim() == 1:
            return self.forward(input.unsqueeze(0)).squeeze(0)
        scaled = self.activation_quantizer.patch_scale
        bias = None if scaled else self.bias
        output = nn.functional.linear(self.activation_quantizer(input), self.quantized_weight(), bias)
        if scaled:
            output = output * input.abs().mean(-1, keepdim=True)
            return output if self.bias is None else output + self.bias
        return output

    def _check(self, shape: tuple[int, ...]) -> None:
        if not shape or shape[-1] != self.in_features:
            raise ValueError(f"input has shape {tuple(shape)} but the layer takes (..., {self.in_features})")

    def counts(self, input_shape: tuple[int, ...]) -> Counter[str]:
        """Operations, parameters and bits of one inference on one input of shape (..., in_features).

        Raises:
            ValueError: input_shape does not end in in_features.
        """
        self._check(input_shape)
        rows = torch.Size(input_shape[:-1]).numel()
        counts = _counts(self, rows * self.in_features, rows * self.out_features, rows)
        if self.activation_quantizer.patch_scale:
            counts["add:fp32"] += rows * (self.in_features - 1)
            counts["mul:fp32"] += rows
        return +counts


def attach_quantizers(
    layer: QuantizedConv2d | QuantizedLinear, weight: str | Quantizer, activation: str | Quantizer
) -> None:
    """Give a layer its quantizers, on its device, in its dtype and mode, learned scales fitted to its weights.

    Raises:
        ValueError: unknown quantizer.
    """
    parts = quantizer(weight, "weight"), quantizer(activation, "activation")
    layer.weight_quantizer, layer.activation_quantizer = (
        part.to(layer.weight.device, layer.weight.dtype).train(layer.training) for part in parts
    )
    if not layer.weight_quantizer.calibrated:
        layer.weight_quantizer.fit(layer.weight)


def _counts(layer: QuantizedConv2d | QuantizedLinear, values: int, units: int, patches: int) -> Counter[str]:
    """What both layers share: `values` real inputs, `units` real outputs, computed from `patches` lists of inputs.

    Counted as the layer is trained and evaluated, real numbers in and out. Each input is quantized once, as its
    quantizer says: integers multiply by 1 / scale, add a zero point if they have one and clip twice; signs compare
    once. Each output is multiplied by its scale if it has one. The bias, with the input's zero-point correction folded
    in, is where the accumulator starts and costs nothing; a zero point of the weights takes the sum of every patch,
    and a product and a sum an output. Where levels are uneven, inputs are added up level by level, an addition a
    product, and each sum is multiplied once an output (TTQ, NAQ); or sums of signs are, one for every pair of basis
    numbers (LQ-Nets). Rounding and changing between float and integer registers are not counted. A chain of integer
    twins that hands codes to the next layer is cheaper (one requantization an output, outputs of few bits): this count
    does not claim it.
    """
    weight, activation = layer.weight_quantizer, layer.activation_quantizer
    taps = layer.weight[0].numel()
    constants = weight.constants(layer.weight) + activation.constants(layer.weight)
    bias = 0 if layer.bias is None else layer.bias.numel()
    planes, factors = weight.planes * activation.planes, max(1, weight.scales) * max(1, activation.scales)
    if weight.format == "ternary" and activation.format == "binary":
        planes *= max(1, weight.scales // 2)  # signs are counted, not added up: once for every pair of levels
    counts = Counter(
        {
            f"mac:{weight.format}*{activation.format}": units * taps * planes,
            "params": layer.weight.numel() + bias + constants,
            "weight_bits": layer.weight.numel() * weight.bits + 32 * (bias + constants),
            "units": units,
            "activation_bits": 32 * units,
        }
    )
    counts.update({f"{operation}:fp32": amount * values for operation, amount in activation.coding.items()})
    if weight.scales or activation.scales:
        counts["mul:fp32"] += units * factors
        counts["add:fp32"] += units * (factors - 1)  # the parts of an uneven sum are put together
    if weight.asymmetric:
        number = "fp32" if activation.format == "fp32" else "int32"
        counts.update({f"add:{number}": patches * (taps - 1) + units, f"mul:{number}": units})
    if activation.patch_scale:
        counts["mul:fp32"] += units
        counts["add:fp32"] += units * (bias > 0)  # the accumulator is scaled before it meets the bias
    return counts
