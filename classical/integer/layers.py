"""Integer twins: what a quantized layer computes, from integer arithmetic alone.

    real output = scale * accumulator,   accumulator = 2^f * (sum of q_w q_x - Z_x * sum of q_w) + bias   in int32

with codes q, the input's zero point Z_x and scale = S_w S_x 2^-f. Jacob et al. have f = 0; here the spare bits of the
accumulator hold f fraction bits of the bias, because a step S_w S_x of 1 (two signs) would round a bias away.
The sums depend on the formats: multiplications; additions and subtractions where weights are -1, 0 and 1 or have few
uneven levels; popcounts where inputs have few bits, too.
"""

import copy
import math

import torch
from torch import Tensor, nn

from classical.checks import whole
from classical.integer.bits import BitSums
from classical.integer.codes import input_code, require_codable
from classical.integer.dense import MatrixSums
from classical.integer.grouped import PRODUCTS, GroupedSums
from classical.integer.levels import LevelSums, level_terms
from classical.integer.loading import Kernels, load_kernels
from classical.integer.planes import pad
from classical.integer.rescale import INT32_MAX, Rescale, rescale
from classical.integer.sums import Sums, per_channel
from classical.layers import Axis, Geometry, QuantizedConv2d, QuantizedLinear, require_real
from classical.quantizers import Quantizer
from classical.quantizers.codebooks import Uneven

_FRACTION_BITS = 20  # the bias is then within 2^-21 of a step: more would be lost in float32


class IntegerLayer(nn.Module):
    """What IntegerConv2d and IntegerLinear share; build one with `integer_twin`. Runs on the CPU.

    No accumulator overflows, whatever the input: 2^f (max|q_x| sum|q_w| + |bias|) of every output channel is checked to
    fit in int32 when the twin is built.

    Weights of uneven levels (TTQ, NAQ, LQ-Nets) have an accumulator for each size of level: the sum of the inputs whose
    weight is of that size. There is one multiplication a level, and the bias is real.

    Attributes:
        sums: adds up the products.
        weight: integers (outputs, ...), or (levels, outputs, ...) of -1, 0 and 1 for uneven levels.
        bias: (outputs,), int32, in steps of `scale`: the layer's bias and the zero-point correction; (levels, outputs)
            for uneven levels, the correction alone.
        scale: (outputs,) or (levels, outputs), float64: real value of one step of the accumulator.
        zero: (), int32: code of a real 0, which is what padding holds.
        real_bias: (outputs,), float64: added after scaling for uneven levels, and where XNOR-Net's map varies the
            scale; 0 elsewhere.
        activation: the input's quantizer.
        fraction_bits: f.

    Raises:
        ValueError: a quantizer without integer codes, an input range never seen, an accumulator that could overflow.

    Source: Jacob et al., arXiv:1712.05877, equations 4 to 7 and section 2.4; levels: see classical.integer.levels.
    """

    scale: Tensor
    zero: Tensor
    real_bias: Tensor
    reach: Tensor

    @torch.no_grad()
    def __init__(
        self, layer: QuantizedConv2d | QuantizedLinear, *, kernels: Kernels = "auto", threads: int = 1
    ) -> None:
        super().__init__()
        self.activation = copy.deepcopy(layer.activation_quantizer).eval()
        self.code = input_code(self.activation, layer.weight, kernels)
        weight, factors = weight_terms(layer)
        scale = factors * self.code.scale
        self.uneven = isinstance(layer.weight_quantizer, Uneven)
        real_bias = scale.new_zeros(scale.shape[1]) if layer.bias is None else layer.bias.double().clone()
        steps = torch.zeros_like(scale)
        if not (self.uneven or self.activation.patch_scale):
            steps = torch.where(real_bias == 0, steps, real_bias / scale)
            real_bias = torch.zeros_like(real_bias)
        rows = weight.flatten(2).double()
        correction = -self.code.zero * rows.sum(2)
        reach = self.code.reach * rows.abs().sum(2) + (correction + steps).abs() + 1
        largest = reach.amax(0)
        worst = int(largest.argmax())
        if not largest[worst] <= INT32_MAX:
            raise ValueError(
                f"output channel {worst} can reach {largest[worst]:.4g} but an int32 accumulator holds {INT32_MAX}: "
                f"it adds {rows.shape[2]} products and a bias of {steps[:, worst].abs().max():.4g} steps; "
                "use fewer bits"
            )
        spare = int(math.log2(INT32_MAX / float(largest[worst])))
        self.fraction_bits = min(spare, _FRACTION_BITS) if steps.any() else 0
        constant = ((correction + steps) * 2**self.fraction_bits).round()
        scale = scale / 2**self.fraction_bits
        self.register_buffer("scale", scale if self.uneven else scale[0])
        self.register_buffer("zero", torch.tensor(self.code.zero, dtype=torch.int32))
        self.register_buffer("real_bias", real_bias)
        self.register_buffer("reach", reach * 2**self.fraction_bits)
        self.sums = layer_sums(layer, weight, constant, self.fraction_bits, kernels=kernels, threads=threads)

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Quantize real inputs, batched as for the layer, to codes of the same shape: int8, or int16 above 8 bits.

        Raises:
            ValueError: x is not floating point, or holds NaN.
        """
        require_real(x)
        return self.code.encode(self.activation, x)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Real outputs for real inputs: equal to the layer's in eval() up to float rounding.

        Raises:
            ValueError: x is not floating point, holds NaN or does not fit the layer.
        """
        require_real(x)
        if x.dim() < self._batched_dim():
            return self.forward(x.unsqueeze(0)).squeeze(0)
        if isinstance(self.sums, BitSums) and self.sums.signs:
            require_codable(x)
            codes = x  # signs are read from real numbers directly
        else:
            codes = self.encode(x)
        dtype = torch.promote_types(x.dtype, torch.float32)
        factors, bias = self.scale.view(len(self.sums.weight), -1).to(dtype), self.real_bias.to(dtype)
        if not self.activation.patch_scale:
            return self._scaled(codes, factors, bias).to(x.dtype)
        output = self._scaled(codes, factors, torch.zeros_like(bias)) * self._patch_means(x.to(dtype).abs())
        return (output + per_channel(bias, self._trailing)).to(x.dtype)

    def accumulate(self, codes: Tensor) -> Tensor:
        """Accumulators for batched codes of inputs; integers throughout.

        Returns:
            int32, of the layer's output shape, or (levels, ...) for uneven levels.

        Raises:
            ValueError: codes do not fit the layer.
        """
        sums = self._sums(codes)
        return sums if self.uneven else sums[0]

    def requantize(self, accumulators: Tensor, output: Quantizer) -> Tensor:
        """Turn accumulators into the codes of the next layer's input quantizer by a fixed-point multiplication.

        M = scale / S_out = M0 2^-n with M0 in [1/2, 1) as a 31-bit integer: multiply, add half, shift, add Z_out, clip.
        Equal to quantizing the real output, to one level at most.

        Args:
            accumulators: what `accumulate` returned.
            output: a calibrated activation quantizer that rounds to the nearest.

        Raises:
            ValueError: output is of another kind or has seen no range; the scale varies with the position (XNOR-Net
                activations); M is above 2^29.

        Source: Jacob et al., arXiv:1712.05877, equations 5 and 6.
        """
        if self.activation.patch_scale:
            raise ValueError("'xnor' activations scale each position by a real number: there is no fixed multiplier")
        levels = accumulators if self.uneven else accumulators[None]
        factors = self.scale.view(len(levels), -1)
        step = rescale(factors, self.real_bias, self.reach, output, self.scale, self._trailing)
        if type(step) is not Rescale:
            raise ValueError(
                f"requantizing needs a quantizer that rounds to the nearest, such as 'int8', not {output!r}"
            )
        codes: Tensor = step(*levels.unbind())
        return codes

    @property
    def weight(self) -> Tensor:
        """Integers (outputs, ...), int8, or int16 above 8 bits; (levels, outputs, ...) for uneven levels."""
        return self.sums.weight if self.uneven else self.sums.weight[0]

    @property
    def bias(self) -> Tensor:
        """What accumulators start from, int32."""
        return self.sums.constant if self.uneven else self.sums.constant[0]

    _trailing: int  # axes behind the channels

    def _batched_dim(self) -> int:
        raise NotImplementedError

    def _sums(self, codes: Tensor) -> Tensor:
        """Accumulators for batched codes: (terms, ...)."""
        raise NotImplementedError

    def _scaled(self, codes: Tensor, factors: Tensor, offset: Tensor) -> Tensor:
        """Real outputs for batched codes."""
        raise NotImplementedError

    def _patch_means(self, sizes: Tensor) -> Tensor:
        """Mean of the inputs that each output sees, for inputs of the layer's shape."""
        raise NotImplementedError


class IntegerConv2d(IntegerLayer):
    """A QuantizedConv2d in integers."""

    _trailing = 2

    def _batched_dim(self) -> int:
        return 4

    def _sums(self, codes: Tensor) -> Tensor:
        sums: Tensor = self.sums(codes)
        return sums

    def _scaled(self, codes: Tensor, factors: Tensor, offset: Tensor) -> Tensor:
        return self.sums.scaled(codes, factors, offset)

    def _patch_means(self, sizes: Tensor) -> Tensor:
        geometry = self.sums.geometry
        images, channels, *size = sizes.shape
        means = sizes.reshape(images, geometry.groups, channels // geometry.groups, *size).mean(2)
        means = pad(means, geometry, 0)
        rows, columns = geometry.rows, geometry.columns
        box = means.new_full((geometry.groups, 1, rows.kernel, columns.kernel), 1 / (rows.kernel * columns.kernel))
        strides, dilations = (rows.stride, columns.stride), (rows.dilation, columns.dilation)
        means = nn.functional.conv2d(means, box, None, strides, 0, dilations, geometry.groups)
        shared = means[:, :, None].expand(-1, -1, geometry.out_channels // geometry.groups, -1, -1)
        return means if geometry.groups == 1 else shared.flatten(1, 2)


class IntegerLinear(IntegerLayer):
    """A QuantizedLinear in integers."""

    _trailing = 0

    @property
    def weight(self) -> Tensor:
        """Integers (outputs, inputs), int8, or int16 above 8 bits; (levels, outputs, inputs) for uneven levels."""
        return super().weight.flatten(-3)

    def _batched_dim(self) -> int:
        return 2

    def _rows(self, codes: Tensor) -> Tensor:
        features = self.sums.geometry.in_channels
        if codes.shape[-1] != features:
            raise ValueError(f"input has shape {tuple(codes.shape)} but the layer takes (..., {features})")
        return codes.reshape(-1, features)

    def _sums(self, codes: Tensor) -> Tensor:
        sums: Tensor = self.sums(self._rows(codes))
        return sums.reshape(len(sums), *codes.shape[:-1], -1)

    def _scaled(self, codes: Tensor, factors: Tensor, offset: Tensor) -> Tensor:
        output = self.sums.scaled(self._rows(codes)[..., None, None], factors, offset)
        return output.reshape(*codes.shape[:-1], -1)

    def _patch_means(self, sizes: Tensor) -> Tensor:
        return sizes.mean(-1, keepdim=True)


def integer_twin(layer: nn.Module, *, kernels: Kernels = "auto", threads: int = 1) -> IntegerLayer:
    """Build the twin of a quantized layer: the same outputs, computed in integers.

    Args:
        layer: a QuantizedConv2d or QuantizedLinear whose input quantizer has integer codes and, where it learns a
            range or a step, has seen a batch in train(). Later changes of the layer do not reach the twin.
        kernels: "auto" runs sums without multiplications, and the coding of inputs, in compiled loops where numba is
            installed (extra "integer"), "numba" demands them, "torch" does without. The results are the same.
        threads: of the compiled loops, over the batch; from 1.

    Raises:
        ValueError: another layer, or one without integer form (see IntegerLayer); threads out of range.
        ImportError: kernels="numba" without numba.
    """
    if isinstance(layer, QuantizedConv2d):
        return IntegerConv2d(layer, kernels=kernels, threads=threads).cpu()
    if isinstance(layer, QuantizedLinear):
        return IntegerLinear(layer, kernels=kernels, threads=threads).cpu()
    raise ValueError(f"no integer twin of {type(layer).__name__}: use QuantizedConv2d or QuantizedLinear")


def weight_terms(layer: QuantizedConv2d | QuantizedLinear) -> tuple[Tensor, Tensor]:
    """The quantized weight as a sum of terms, integers with a real factor each.

    Returns:
        integers (terms, outputs, inputs / groups, height, width) and factors (terms, outputs), float64. Evenly spaced
        levels are one term; for others see `level_terms`.

    Raises:
        ValueError: a quantizer without codes.
    """
    quantizer = layer.weight_quantizer
    if isinstance(quantizer, Uneven):
        weight, factors = level_terms(quantizer.codebook(layer.weight))
    else:
        codes, scale, zero = quantizer.integers(layer.weight)
        weight, factors = (codes - zero)[None], scale.double().reshape(1, -1).expand(1, len(codes))
    return weight.reshape(*weight.shape[:3], *(weight.shape[3:] or (1, 1))), factors


def layer_sums(
    layer: QuantizedConv2d | QuantizedLinear,
    weight: Tensor,
    constant: Tensor,
    shift: int = 0,
    *,
    kernels: Kernels = "auto",
    threads: int = 1,
) -> Sums:
    """How a layer's products are added up.

    Weights of -1, 0 and 1 meet inputs of few bits as popcounts, others as additions; the rest is multiplied.

    Args:
        layer: with a calibrated input quantizer.
        weight: of `weight_terms`.
        constant, shift: as for Sums.
        kernels, threads: as for `integer_twin`.
    """
    if not whole(threads, 1):
        raise ValueError(f"threads is {threads!r} but must be 1 or more")
    code = input_code(layer.activation_quantizer, layer.weight)
    if isinstance(layer, QuantizedConv2d):
        geometry = layer.geometry
    else:
        pixel = Axis(kernel=1, stride=1, dilation=1, before=0, after=0)
        geometry = Geometry(layer.in_features, layer.out_features, 1, pixel, pixel, "zeros")
    weight, constant = weight.cpu(), constant.cpu()
    if weight.abs().max() <= 1 and load_kernels(kernels) is not None:
        if BitSums.pays(weight, code):
            return BitSums(weight, geometry, code, constant, shift, threads)
        if len(weight) > 1 or not weight.all():
            return LevelSums(weight, geometry, code, constant, shift, threads)
    few = geometry.groups > 1 and weight[0, 0].numel() <= PRODUCTS
    if few and load_kernels(kernels) is not None:
        return GroupedSums(weight, geometry, code, constant, shift, threads)
    return MatrixSums(weight, geometry, code, constant, shift)
