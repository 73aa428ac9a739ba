"""Integer twins: what a quantized layer computes, from integer arithmetic alone.

    real output = scale * accumulator,   accumulator = 2^f * (sum of q_w q_x - Z_x * sum of q_w) + bias   in int32

with codes q, the input's zero point Z_x and scale = S_w S_x 2^-f. Jacob et al. have f = 0; here the spare bits of the
accumulator hold f fraction bits of the bias, because a step S_w S_x of 1 (two signs) would round a bias away.
The sums depend on the formats: multiplications; additions and subtractions for ternary and binary weights;
popcounts of XNOR for two signs.
"""

import copy
import math

import torch
from torch import Tensor, nn

from classical.layers import Geometry, QuantizedConv2d, QuantizedLinear, require_real
from classical.quantizers import IntegerActivation, Quantizer

_INT32_MAX = 2**31 - 1
_FRACTION_BITS = 20  # the bias is then within 2^-21 of a step: more would be lost in float32


class IntegerLayer(nn.Module):
    """What IntegerConv2d and IntegerLinear share; build one with `integer_twin`. Runs on the CPU.

    No accumulator overflows, whatever the input: 2^f (max|q_x| sum|q_w| + |bias|) of every output channel is checked to
    fit in int32 when the twin is built.

    Attributes:
        weight: codes (outputs, ...), int8, or int16 above 8 bits.
        bias: (outputs,), int32, in steps of `scale`: the layer's bias and the zero-point correction.
        scale: (outputs,), float64: real value of one step of the accumulator.
        zero: (), int32: code of a real 0, which is what padding holds.
        real_bias: (outputs,), float64: added after scaling where XNOR-Net's map varies the scale; 0 elsewhere.
        activation: the input's quantizer.
        fraction_bits: f.

    Raises:
        ValueError: a quantizer without integer codes, an input range never seen, an accumulator that could overflow.

    Source: Jacob et al., arXiv:1712.05877, equations 4 to 7 and section 2.4.
    """

    weight: Tensor
    bias: Tensor
    scale: Tensor
    zero: Tensor
    real_bias: Tensor

    @torch.no_grad()
    def __init__(self, layer: QuantizedConv2d | QuantizedLinear) -> None:
        super().__init__()
        self.activation = copy.deepcopy(layer.activation_quantizer).eval()
        weights, weight_scale, weight_zero = layer.weight_quantizer.integers(layer.weight)
        self.weight_format = layer.weight_quantizer.format
        input_scale, zero = _fixed(self.activation, layer.weight)
        weights = weights - weight_zero
        rows = weights.flatten(1).double()
        scale = weight_scale.double().reshape(-1).expand(len(rows)) * input_scale.double()
        real_bias = torch.zeros_like(scale) if layer.bias is None else layer.bias.double().clone()
        steps = torch.zeros_like(scale)
        if not self.activation.patch_scale:
            steps = torch.where(real_bias == 0, steps, real_bias / scale)
            real_bias = torch.zeros_like(scale)
        correction = -zero * rows.sum(1)
        reach = self.activation.max_code * rows.abs().sum(1) + (correction + steps).abs() + 1
        worst = int(reach.argmax())
        if not reach[worst] <= _INT32_MAX:
            raise ValueError(
                f"output channel {worst} can reach {reach[worst]:.4g} but an int32 accumulator holds {_INT32_MAX}: "
                f"it adds {rows.shape[1]} products and a bias of {steps[worst]:.4g} steps; use fewer bits"
            )
        spare = int(math.log2(_INT32_MAX / float(reach[worst])))
        self.fraction_bits = min(spare, _FRACTION_BITS) if steps.any() else 0
        self.register_buffer("weight", weights.to(torch.int8 if weights.abs().max() < 128 else torch.int16))
        self.register_buffer("bias", ((correction + steps) * 2**self.fraction_bits).round().int())
        self.register_buffer("scale", scale / 2**self.fraction_bits)
        self.register_buffer("zero", zero)
        self.register_buffer("real_bias", real_bias)

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Quantize real inputs, batched as for the layer, to integer codes of the same shape.

        Raises:
            ValueError: x is not floating point.
        """
        require_real(x)
        return self.activation.integers(x).codes

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Real outputs for real inputs: equal to the layer's in eval() up to float rounding."""
        require_real(x)
        if x.dim() < self._batched_dim():
            return self.forward(x.unsqueeze(0)).squeeze(0)
        output = self.accumulate(self.encode(x)).double() * self._per_channel(self.scale)
        if self.activation.patch_scale:
            means = self._patches(x.abs(), torch.zeros(())).double().mean(-1, keepdim=True)
            groups = means.shape[0]
            output = output * self._outputs(means.expand(-1, -1, len(self.weight) // groups), x.shape)
        return (output + self._per_channel(self.real_bias)).to(x.dtype)

    def accumulate(self, codes: Tensor) -> Tensor:
        """Accumulators (int32, the layer's output shape) for batched codes of inputs; integers throughout."""
        patches = self._patches(codes.int(), self.zero)
        groups, _, taps = patches.shape
        weight = self.weight.int().reshape(groups, -1, taps).mT
        sums = _sums(patches, weight, self.weight_format, self.activation.format)
        return self._outputs((sums << self.fraction_bits) + self.bias.reshape(groups, 1, -1), codes.shape)

    def requantize(self, accumulators: Tensor, output: Quantizer) -> Tensor:
        """Turn accumulators into the codes of the next layer's input quantizer by a fixed-point multiplication.

        M = scale / S_out = M0 2^-n with M0 in [1/2, 1) as a 31-bit integer: multiply, add half, shift, add Z_out, clip.
        Equal to quantizing the real output, to one level at most.

        Args:
            accumulators: what `accumulate` returned.
            output: a calibrated integer activation quantizer.

        Raises:
            ValueError: output is of another kind or has seen no range; the scale varies with the position (XNOR-Net
                activations); M is outside 2^-32 ... 2^29.

        Source: Jacob et al., arXiv:1712.05877, equations 5 and 6.
        """
        if not isinstance(output, IntegerActivation):
            raise ValueError(f"requantizing needs an integer activation quantizer such as 'int8', not {output!r}")
        if self.activation.patch_scale:
            raise ValueError("'xnor' activations scale each position by a real number: there is no fixed multiplier")
        out_scale, out_zero = _fixed(output, self.scale)
        multiplier, shift = fixed_point(self.scale / out_scale.double())
        product = accumulators.long() * self._per_channel(multiplier)
        shift = self._per_channel(shift)
        codes = ((product + (torch.ones_like(shift) << (shift - 1))) >> shift) + out_zero
        return codes.clamp(-output.max_code, output.max_code - 1).to(torch.int8 if output.bits <= 8 else torch.int16)

    def _batched_dim(self) -> int:
        raise NotImplementedError

    def _patches(self, x: Tensor, fill: Tensor) -> Tensor:
        """Inputs of every output: (groups, positions of the batch, taps)."""
        raise NotImplementedError

    def _outputs(self, rows: Tensor, input_shape: torch.Size) -> Tensor:
        """(groups, positions of the batch, outputs of a group) in the layer's output shape."""
        raise NotImplementedError

    def _per_channel(self, values: Tensor) -> Tensor:
        """(outputs,) shaped to broadcast against batched outputs."""
        raise NotImplementedError


class IntegerConv2d(IntegerLayer):
    """A QuantizedConv2d in integers."""

    def __init__(self, layer: QuantizedConv2d) -> None:
        super().__init__(layer)
        self.geometry: Geometry = layer.geometry

    def _batched_dim(self) -> int:
        return 4

    def _patches(self, x: Tensor, fill: Tensor) -> Tensor:
        self.geometry.output_shape(x.shape[1:])
        windows = _pad(x, self.geometry, fill)
        for dim, axis in ((2, self.geometry.rows), (3, self.geometry.columns)):
            windows = windows.unfold(dim, axis.span, axis.stride)[..., :: axis.dilation]
        batch, channels, height, width, *kernel = windows.shape
        groups = self.geometry.groups
        windows = windows.reshape(batch, groups, channels // groups, height, width, *kernel)
        taps = channels // groups * math.prod(kernel)
        return windows.permute(1, 0, 3, 4, 2, 5, 6).reshape(groups, batch * height * width, taps)

    def _outputs(self, rows: Tensor, input_shape: torch.Size) -> Tensor:
        channels, height, width = self.geometry.output_shape(input_shape[1:])
        groups, _, outputs = rows.shape
        maps = rows.reshape(groups, input_shape[0], height, width, outputs).permute(1, 0, 4, 2, 3)
        return maps.reshape(input_shape[0], channels, height, width)

    def _per_channel(self, values: Tensor) -> Tensor:
        return values[:, None, None]


class IntegerLinear(IntegerLayer):
    """A QuantizedLinear in integers."""

    def _batched_dim(self) -> int:
        return 2

    def _patches(self, x: Tensor, fill: Tensor) -> Tensor:
        if x.shape[-1] != self.weight.shape[1]:
            raise ValueError(f"input has shape {tuple(x.shape)} but the layer takes (..., {self.weight.shape[1]})")
        return x.reshape(1, -1, x.shape[-1])

    def _outputs(self, rows: Tensor, input_shape: torch.Size) -> Tensor:
        return rows.reshape(*input_shape[:-1], rows.shape[-1])

    def _per_channel(self, values: Tensor) -> Tensor:
        return values


def integer_twin(layer: nn.Module) -> IntegerLayer:
    """Build the twin of a quantized layer: the same outputs, computed in integers.

    Args:
        layer: a QuantizedConv2d or QuantizedLinear whose two quantizers have integer codes; an integer activation
            quantizer must have seen a batch in train(). Later changes of the layer do not reach the twin.

    Raises:
        ValueError: another layer, or one without integer form (see IntegerLayer).
    """
    if isinstance(layer, QuantizedConv2d):
        return IntegerConv2d(layer).cpu()
    if isinstance(layer, QuantizedLinear):
        return IntegerLinear(layer).cpu()
    raise ValueError(f"no integer twin of {type(layer).__name__}: use QuantizedConv2d or QuantizedLinear")


def fixed_point(factor: Tensor) -> tuple[Tensor, Tensor]:
    """Write factors as multiplier * 2^-shift, the multiplier a 31-bit integer.

    Args:
        factor: real numbers in 2^-32 ... 2^29, or 0.

    Returns:
        multiplier, int64 in [2^30, 2^31) (0 for 0), and shift, int64 in 1 ... 62.

    Raises:
        ValueError: a factor out of range.
    """
    mantissa, exponent = torch.frexp(factor.double())
    multiplier = (mantissa * 2**31).round().long()
    carried = multiplier == 2**31  # rounded up to 1: halve it
    multiplier = torch.where(carried, multiplier >> 1, multiplier)
    shift = 31 - exponent.long() - carried.long()
    if ((shift < 1) | (shift > 62)).any():
        raise ValueError(
            f"the multipliers are {factor.min():.3g} ... {factor.max():.3g} but must lie in 2^-32 ... 2^29: "
            "calibrate the output quantizer on this layer's outputs"
        )
    return multiplier, shift


def _fixed(activation: Quantizer, like: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero point of an activation quantizer for inference."""
    if not activation.calibrated:
        raise ValueError(f"{activation!r} has seen no range yet: run a batch through it in train() first")
    stated = activation.integers(like.new_zeros(1, 1))
    return stated.scale.reshape(()), stated.zero.reshape(())


def _pad(x: Tensor, geometry: Geometry, fill: Tensor) -> Tensor:
    """Pad an image; torch's own reflect and replicate refuse integers."""
    rows, columns = geometry.rows, geometry.columns
    if geometry.padding_mode == "zeros":
        ends = (columns.before, columns.after, rows.before, rows.after)
        return nn.functional.pad(x, ends, value=int(fill))
    for dim, axis in ((2, rows), (3, columns)):
        size = x.shape[dim]
        source = torch.arange(-axis.before, size + axis.after)
        if geometry.padding_mode == "circular":
            source = source % size
        elif geometry.padding_mode == "replicate":
            source = source.clamp(0, size - 1)
        else:  # reflect: about the first and the last pixel
            source = (size - 1) - ((size - 1) - source.abs()).abs()
        x = x.index_select(dim, source)
    return x


def _sums(patches: Tensor, weight: Tensor, weight_format: str, input_format: str) -> Tensor:
    """Sum of q_w q_x over the taps, by the operations that the formats allow.

    Args:
        patches: (groups, positions, taps) codes, int32.
        weight: (groups, taps, outputs) codes, int32.
    """
    if weight_format not in ("binary", "ternary"):
        return patches @ weight
    plus, minus = (weight > 0).int(), (weight < 0).int()
    if weight_format == "binary" and input_format == "binary":
        # One bit for each sign. Padding holds neither: it agrees with nothing and is not counted.
        ones, zeros = (patches > 0).int(), (patches < 0).int()
        agreements = ones @ plus + zeros @ minus  # popcount(xnor) = popcount(x and w) + popcount(not x and not w)
        return 2 * agreements - (ones + zeros).sum(-1, keepdim=True, dtype=torch.int32)
    return patches @ plus - patches @ minus  # the products with 0 and 1 only select what is added
