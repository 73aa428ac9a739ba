"""Convolutions that are trigonometric polynomials of each patch: plain torch operations, no circuit, no simulator."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from math import inf, pi, prod
from typing import Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from classical.quantizers import Quantizer, quantizer
from qconv.backends.contraction import contract, polynomial_counts, split_wires
from qconv.patch_conv import PatchConv2d
from qconv.patches import Pair, pad, whole

Real = NDArray[np.float64]
T = TypeVar("T")
MAX_COEFFICIENTS = 2**16  # an output; 3^10 fit


@dataclass(frozen=True)
class Spectrum:
    """Which waves each number x_j of a patch enters by: 1, and sin and cos of k w_j x_j for k = 1 .. L_j.

    Args:
        degrees: L_j, at least 0, for each number of a patch.
        frequencies: w_j, the base frequency in radians a unit of x_j, above 0.

    Raises:
        ValueError: For degrees or frequencies out of range.

    Source: Schuld, Sweke & Meyer, Phys. Rev. A 103, 032430 (2021), section II.
    """

    degrees: tuple[int, ...]
    frequencies: tuple[float, ...]

    def __post_init__(self) -> None:
        for degree in self.degrees:
            whole(degree, "degree", 0)
        for frequency in self.frequencies:
            if not 0 < frequency < inf:
                raise ValueError(f"frequency is {frequency!r}: give radians a unit of the input, above 0 and finite")

    @property
    def sizes(self) -> tuple[int, ...]:
        """Waves of each number, the constant included: 2 L_j + 1."""
        return tuple(2 * degree + 1 for degree in self.degrees)

    def waves(self, patches: Tensor) -> list[Tensor]:
        """Patches (P, n) -> for each number its waves (2 L_j + 1, P) in the order 1, sin, cos, sin 2, cos 2 ..."""
        columns = patches.t()
        if len(set(self.degrees)) == 1 and len(set(self.frequencies)) == 1:
            return list(_waves(columns * self.frequencies[0], self.degrees[0]).unbind())
        rows = zip(columns.unbind(), self.frequencies, self.degrees, strict=True)
        return [_waves(row[None] * frequency, degree)[0] for row, frequency, degree in rows]

    def points(self) -> list[Real]:
        """Values of each number at which a polynomial must be known: 2 L_j + 1 of them, evenly over one period."""
        return [
            2 * pi / frequency * np.arange(size) / size
            for frequency, size in zip(self.frequencies, self.sizes, strict=True)
        ]

    def transforms(self) -> list[Real]:
        """Discrete Fourier transform of each number: coefficients of its waves = matrix @ values at its points."""
        result = []
        for degree, size in zip(self.degrees, self.sizes, strict=True):
            angles = 2 * pi * np.arange(size) / size
            waves = _waves(torch.from_numpy(angles)[None], degree)[0].numpy()
            # The waves are orthogonal on the grid, of square norm m for the constant and m/2 for the others.
            norms = np.array([size] + [size / 2] * (size - 1))
            result.append(waves / norms[:, None])
        return result


def _waves(angles: Tensor, degree: int) -> Tensor:
    """Angles (n, P) -> (n, 2 degree + 1, P)."""
    parts = [torch.ones_like(angles)]
    for k in range(1, degree + 1):
        multiple = angles if k == 1 else angles * k
        parts += [torch.sin(multiple), torch.cos(multiple)]
    return torch.stack(parts, dim=1)


def polynomial(coefficients: Tensor, features: Sequence[Tensor]) -> Tensor:
    """`contract` by plain operations wherever torch looks on: (rows, D_0, ...) and (D_j, P) of each j -> (rows, P).

    Chunks depend on the number of patches: they would tie an exported program to one batch size.
    """
    if not torch.compiler.is_compiling():
        return contract(coefficients, features)
    half = split_wires(coefficients.shape[1:])
    right = _products(features[half:])
    if half == 0:
        return coefficients.flatten(1) @ right
    left = _products(features[:half])
    partial = coefficients.reshape(-1, right.shape[0]) @ right
    return (partial.reshape(coefficients.shape[0], left.shape[0], -1) * left).sum(1)


def _products(features: Sequence[Tensor]) -> Tensor:
    result = features[0]
    for feature in features[1:]:
        result = (result[:, None] * feature).flatten(0, 1)
    return result


class FourierConv2d(PatchConv2d):
    """A free trigonometric polynomial of each patch: the features of an angle-encoded kernel, coefficients unbound.

    y = sum over digits of weight[d_1 .. d_n] times prod_j f_{d_j}(x_j), f = (1, sin w x, cos w x, ..., sin L w x,
    cos L w x). With the defaults, L = 1 and w = pi, every kernel with "angle" encoding on n wires computes such a
    polynomial; a circuit ties its 3^n coefficients to few angles, this layer leaves them free. It is the control that
    tells the circuit from its features, and what `QuantumConv2d.to_classical` and `surrogate` return: plain torch
    operations, which torch.export, torch.compile and ONNX take.

    Args:
        in_channels: As nn.Conv2d.
        out_channels: As nn.Conv2d; each has prod_j (2 L_j + 1) coefficients, at most 2^16 (3^n: n <= 10), where
            n = in_channels / groups * kernel pixels.
        kernel_size: As nn.Conv2d.
        stride: As nn.Conv2d.
        padding: As nn.Conv2d.
        dilation: As nn.Conv2d.
        groups: As nn.Conv2d.
        bias: As nn.Conv2d; the constant coefficient makes it redundant.
        padding_mode: As nn.Conv2d.
        degree: L, or one for each number of a group's patch in nn.Unfold's order (channel, row, column).
        frequency: w in radians a unit of the input, or one for each number of the patch.
        weight: Quantizer of the coefficients, a name of `classical.quantizer_names()` or a Quantizer; gradients pass
            straight through it.
        device: As nn.Conv2d.
        dtype: As nn.Conv2d.

    Attributes:
        weight: (out_channels, prod_j (2 L_j + 1)), the last number's wave fastest, as trained: `quantized_weight()` is
            what runs.
        spectrum: Degrees and frequencies.

    Raises:
        ValueError: For arguments that do not fit, or too many coefficients.

    Source: Schuld, Sweke & Meyer, Phys. Rev. A 103, 032430 (2021).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Pair,
        stride: int | Pair = 1,
        padding: int | Pair | str = 0,
        dilation: int | Pair = 1,
        groups: int = 1,
        bias: bool = False,
        padding_mode: str = "zeros",
        *,
        degree: int | Sequence[int] = 1,
        frequency: float | Sequence[float] = pi,
        weight: str | Quantizer = "float",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode)
        self.spectrum = Spectrum(_each(degree, self.features, "degree"), _each(frequency, self.features, "frequency"))
        numbers = prod(self.spectrum.sizes)
        if numbers > MAX_COEFFICIENTS:
            raise ValueError(
                f"a patch has {self.features} features, which makes {numbers} coefficients an output, but at most "
                f"{MAX_COEFFICIENTS} are kept: use a smaller kernel_size or degree, or more groups"
            )
        self.weight = nn.Parameter(torch.empty(out_channels, numbers, device=device, dtype=dtype))
        self.weight_quantizer = quantizer(weight).to(self.weight.device, self.weight.dtype)
        self._make_bias(bias, self.weight)
        self.reset_parameters()

    @classmethod
    def frozen(
        cls,
        coefficients: Tensor,
        spectrum: Spectrum,
        in_channels: int,
        kernel_size: int | Pair,
        stride: int | Pair = 1,
        padding: int | Pair | str = 0,
        dilation: int | Pair = 1,
        groups: int = 1,
        bias: Tensor | None = None,
        padding_mode: str = "zeros",
    ) -> Self:
        """A layer of known coefficients that asks for no gradients; `requires_grad_()` trains it on.

        Args:
            coefficients: (out_channels, prod_j (2 L_j + 1)), copied.
            spectrum: Degrees and frequencies.
            in_channels: As nn.Conv2d.
            kernel_size: As nn.Conv2d.
            stride: As nn.Conv2d.
            padding: As nn.Conv2d.
            dilation: As nn.Conv2d.
            groups: As nn.Conv2d.
            bias: (out_channels,), copied; None for none.
            padding_mode: As nn.Conv2d.
        """
        # On "meta" nothing is drawn, so torch's generator stays where it was.
        layer = cls(
            in_channels,
            len(coefficients),
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias is not None,
            padding_mode,
            degree=spectrum.degrees,
            frequency=spectrum.frequencies,
            device="meta",
            dtype=coefficients.dtype,
        )
        layer.weight = nn.Parameter(coefficients.detach().clone(), requires_grad=False)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().to(coefficients).clone(), requires_grad=False)
        return layer

    def reset_parameters(self) -> None:
        """Draw coefficients from N(0, 1 / (4 prod_j (1 + L_j))): outputs get a standard deviation of about 1/2."""
        spread = prod(1 + degree for degree in self.spectrum.degrees)
        with torch.no_grad():
            self.weight.normal_(0, 0.5 * spread**-0.5)
            if self.bias is not None:
                self.bias.zero_()

    def quantized_weight(self) -> Tensor:
        """The coefficients that run, of weight's shape."""
        weight: Tensor = self.weight_quantizer(self.weight)
        return weight

    def quantize(self, weight: str | Quantizer = "int8") -> FourierConv2d:
        """A copy whose coefficients run through a quantizer; this layer stays as it is.

        Args:
            weight: A name of `classical.quantizer_names()` or a Quantizer.

        Raises:
            ValueError: For an unknown quantizer, or one of activations.
        """
        chosen = quantizer(weight).to(self.weight.device, self.weight.dtype)
        copied = deepcopy(self)
        copied.weight_quantizer = chosen
        return copied

    def convolve(self, images: Tensor) -> Tensor:
        """See PatchConv2d: with the quantized coefficients."""
        return self._over_patches(pad(images, self.geometry), self.quantized_weight())

    def evaluate(self, patches: Tensor, weights: Tensor) -> Tensor:
        """See PatchConv2d."""
        return polynomial(weights.reshape(-1, *self.spectrum.sizes), self.spectrum.waves(patches)).t()

    def counts(self, input_shape: tuple[int, ...]) -> Counter[str]:
        """Operations of one inference.

        Quantized coefficients meet real waves: that product, by far the most of them, is counted in the coefficients'
        format, and each output is multiplied by the quantizer's scales, as in a quantized convolution.

        Args:
            input_shape: (channels, height, width).
        """
        patches, total = self._shape_counts(input_shape)
        chosen, units = self.weight_quantizer, total["units"]
        rows, sizes = self.out_channels // self.groups, self.spectrum.sizes
        a_patch = polynomial_counts(rows, sizes, sum(self.spectrum.degrees))
        for key, amount in a_patch.items():
            total[key] += amount * patches * self.groups
        products = units * prod(sizes)
        total["mac:fp32*fp32"] -= products
        total[f"mac:{chosen.format}*fp32"] += products * chosen.planes
        constants = chosen.constants(self.weight)
        if chosen.scales:
            total["mul:fp32"] += units * chosen.scales
            total["add:fp32"] += units * (chosen.scales - 1)  # the parts of an uneven sum are put together
        if chosen.asymmetric:  # the zero point takes the sum of all waves' products
            total["add:fp32"] += patches * self.groups * (prod(sizes) - 1) + units
            total["mul:fp32"] += units
        total["weight_bits"] = 32 * (total["params"] - self.weight.numel() + constants)
        total["weight_bits"] += chosen.bits * self.weight.numel()
        total["params"] += constants
        return +total

    def extra_repr(self) -> str:
        """The arguments that define the layer."""
        degrees, frequencies = self.spectrum.degrees, self.spectrum.frequencies
        extra = ""
        if set(degrees) != {1}:
            extra += f", degree={degrees[0] if len(set(degrees)) == 1 else degrees}"
        if set(frequencies) != {pi}:
            extra += f", frequency={frequencies[0] if len(set(frequencies)) == 1 else frequencies}"
        return super().extra_repr() + extra


def _each(value: T | Sequence[T], features: int, name: str) -> tuple[T, ...]:
    """One value for all numbers of a patch, or one each."""
    if not isinstance(value, Sequence):
        return (value,) * features
    if len(value) != features:
        raise ValueError(
            f"{name} has {len(value)} entries but a patch has {features} numbers: give one for each, or one for all"
        )
    return tuple(value)
