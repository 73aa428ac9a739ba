"""Layers of stochastic binary weights and activations, as the law of their outputs, and networks binarized from them.

A weight is a bit of mean theta = tanh(weight), an input a bit of mean h; their agreement is a bit of mean theta h. The
pre-activation a is the sum of N agreements, with mean sum theta h and variance N - sum theta^2 h^2, and the output the
mean of the bit [a >= 0] as -1 or +1. No bit is drawn: one pass carries the laws of all.

A neuron's law is exact where its inputs are independent bits, as pixels are. Neurons that share inputs are correlated,
and the next layer takes their bits as independent all the same: across layers this is a mean-field approximation.
Padding is what nn.Conv2d's is: zeros are inputs h = 0, fair coins; reflected, replicated and wrapped pixels count as
further bits, independent of the ones that they copy.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from math import prod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from circuits.naming import unknown
from qconv.backends.protocol import full_precision
from qconv.binary_laws import (
    ACTIVATION,
    RSQRT,
    Moments,
    agreement_law,
    binary_concrete,
    check_range,
    corrected_activation,
    exact_activation,
    handed_on,
    normal_activation,
    operations,
    sign,
    transverse,
)
from qconv.binary_modules import StochasticBatchNorm1d, StochasticBatchNorm2d
from qconv.binary_weights import BinaryWeights
from qconv.patch_conv import PatchConv2d
from qconv.patches import Pair, fold, pad, unfold, whole

LAWS = ("clt", "corrected", "exact")
OUTPUTS = ("activation", "sample", "moments", "mean")


class Terms(NamedTuple):
    """A law's moments as linear functions of monomials of an input: "h", "X", "hh" = h^2, "hX".

    Args:
        mean: Monomial -> coefficients of weight's shape.
        variance: Likewise.
        mean_constant: (rows,), or None for 0.
        variance_constant: (rows,).
    """

    mean: dict[str, Tensor]
    variance: dict[str, Tensor]
    mean_constant: Tensor | None
    variance_constant: Tensor


def monomials(h: Tensor, names: Iterable[str]) -> dict[str, Tensor]:
    """The named monomials of inputs h."""
    found = {"h": h}
    wanted = set(names)
    if wanted & {"X", "hX"}:
        found["X"] = transverse(h)
    if "hh" in wanted:
        found["hh"] = h * h
    if "hX" in wanted:
        found["hX"] = h * found["X"]
    return found


def monomial_operations(names: Iterable[str]) -> Counter[str]:
    """Operations an input that `monomials` runs."""
    wanted = set(names)
    total = Counter({"mul": len(wanted & {"hh", "hX"})})
    # (1 - h)(1 + h), then its root as x / sqrt(x).
    return total + (RSQRT + Counter(mul=2, add=2) if wanted & {"X", "hX"} else Counter())


class BinaryNeurons(BinaryWeights):
    """What layers of stochastic binary neurons share: from the moments of a pre-activation to the output.

    A subclass gives `terms`, the moments as sums over synapses, `contract`, which takes such sums, and `exact`.
    """

    norm: StochasticBatchNorm1d | StochasticBatchNorm2d | None

    def _set_up(
        self,
        shape: tuple[int, ...],
        law: str,
        output: str,
        bias: bool,
        norm: StochasticBatchNorm1d | StochasticBatchNorm2d | None,
        generator: torch.Generator | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        if law not in LAWS:
            raise unknown("law", law, LAWS)
        if output not in OUTPUTS:
            raise unknown("output", output, OUTPUTS)
        if bias and norm:
            raise ValueError("bias is True and norm is True: the norm would cancel a bias and has its own, so give one")
        self.law, self.output, self.generator = law, output, generator
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self._check_dtype()
        self.register_parameter("bias", nn.Parameter(self.weight.new_empty(len(self.weight))) if bias else None)
        self.norm = norm

    def _check_dtype(self) -> None:
        if self.weight.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"the layer is {self.weight.dtype} but laws need torch.float32 or torch.float64: convert it back with "
                ".float(), and use torch.autocast for mixed precision"
            )

    @property
    def fan_in(self) -> int:
        """N, the synapses of one neuron."""
        return self.weight[0].numel()

    def reset_parameters(self) -> None:
        """Draw new weights, see BinaryWeights; the norm forgets the batches that it saw."""
        super().reset_parameters()
        if self.norm is not None:
            self.norm.reset_parameters()

    def terms(self) -> Terms:
        """The moments of the sum of agreements."""
        theta = self.theta()
        constant = theta.new_full((len(theta),), float(self.fan_in))
        return Terms({"h": theta}, {"hh": -(theta**2)}, None, constant)

    def contract(self, features: Sequence[Tensor], coefficients: Sequence[Tensor], constant: Tensor | None) -> Tensor:
        """Sum over features and synapses: features as the input, coefficients as weight -> pre-activations."""
        raise NotImplementedError

    def sums(self, h: Tensor, with_variance: bool) -> tuple[Tensor, Tensor | None]:
        """Mean and, if asked for, variance of the sum of agreements, without bias, of (padded) inputs h."""
        terms = self.terms()
        found = monomials(h, [*terms.mean, *(terms.variance if with_variance else ())])
        mean = self.contract([found[k] for k in terms.mean], [*terms.mean.values()], terms.mean_constant)
        if not with_variance:
            return mean, None
        variance = self.contract(
            [found[k] for k in terms.variance], [*terms.variance.values()], terms.variance_constant
        )
        return mean, variance

    def synapses(self, patches: Tensor, rows: slice) -> tuple[Tensor, Tensor | None]:
        """What exact laws are made of.

        Args:
            patches: (P, N) inputs of neurons.
            rows: Which neurons.

        Returns:
            Means of independent agreements (P, rows, n), and laws (P, rows, k, 3) of k pairs, n + 2 k = N.
        """
        return patches[:, None] * self.theta()[rows].flatten(1), None

    def exact(self, h: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """Activations by the exact law; h as for sums, scale and shift a number for each row."""
        raise NotImplementedError

    def _along(self, line: Tensor) -> Tensor:
        """One number a row, so that it broadcasts against pre-activations."""
        return line

    def respond(self, h: Tensor) -> Tensor | Moments:
        """The output of (padded) inputs h.

        Raises:
            ValueError: For an exact law, with means beyond -1 and 1.
        """
        norming = self.norm is not None and self.norm.training
        active = self.output in ("activation", "sample") and not self.hard
        exact = active and self.law == "exact"
        moments = None
        if norming or not exact:
            mean, variance = self.sums(h, with_variance=not self.hard and (norming or self.output != "mean"))
            moments = Moments(mean, mean.new_zeros(()).expand_as(mean) if variance is None else variance)
        if self.norm is not None:
            scale, shift = self.norm.line(moments)
        else:
            scale = self.weight.new_ones(len(self.weight))
            shift = torch.zeros_like(scale) if self.bias is None else self.bias
        if exact:
            check_range(h, -1, 1, "input has means of bits", "bring pixels of [0, 1] there with PixelBits")
            return self._drawn(self.exact(h, scale, shift))
        assert moments is not None
        scale, shift = self._along(scale), self._along(shift)
        if active:
            if self.law == "corrected":
                return self._drawn(corrected_activation(moments, scale, shift, self.fan_in))
            return self._drawn(normal_activation(moments, scale, shift))
        mean = moments.mean if self.norm is None and self.bias is None else torch.addcmul(shift, moments.mean, scale)
        if self.output == "moments":
            return Moments(mean, moments.variance if self.norm is None else moments.variance * scale**2)
        return mean if self.output == "mean" else sign(mean)

    def _drawn(self, h: Tensor) -> Tensor:
        return binary_concrete(h, generator=self.generator) if self.output == "sample" and self.training else h

    def _operations(self, units: int, read: int) -> Counter[str]:
        """What one inference runs and stores, for so many outputs and inputs read, weights given."""
        active = self.output in ("activation", "sample")
        exact = active and self.law == "exact" and not self.hard
        with_variance = not (self.output == "mean" or self.hard or exact)
        kind = "fp32"
        if self.hard:
            kind = "ternary" if bool((self.weight == 0).any()) else "binary"
        macs, total = self._sum_operations(with_variance, units, read)
        total[f"mac:{kind}*{self._input_format()}"] += units * macs
        total += handed_on(units * (2 if self.output == "moments" else 1), 1 if self.hard and active else 32)
        if exact:
            # Synapse k multiplies a law of k numbers by q and by 1 - q.
            total += operations(units * self.fan_in, Counter(mul=self.fan_in + 1, add=(self.fan_in + 1) // 2))
        elif active:
            total += operations(units, Counter(cmp=1) if self.hard else ACTIVATION)
        numbers = 0 if self.bias is None else len(self.weight)
        if self.norm is not None:
            # Scale and shift, of the variance too where there is one; exact laws take them into their thresholds.
            total += operations(0 if exact else units, Counter(mul=2 if with_variance else 1, add=1))
            numbers += 2 * len(self.weight)
        total["params"] = sum(p.numel() for p in self.parameters())
        total["weight_bits"] = {"binary": 1, "ternary": 2, "fp32": 32}[kind] * macs * len(self.weight) + 32 * numbers
        return +total

    def _input_format(self) -> str:
        return "binary" if self.bits_in else "fp32"

    def _sum_operations(self, with_variance: bool, units: int, read: int) -> tuple[int, Counter[str]]:
        """Multiply-accumulates an output, and what else the sums cost."""
        with torch.no_grad():
            terms = self.terms()
        used = [*terms.mean, *(terms.variance if with_variance else ())]
        return self.fan_in * len(used), operations(read, monomial_operations(used))

    def extra_repr(self) -> str:
        """The arguments that define the layer."""
        kept = f", law={self.law!r}, output={self.output!r}" + (", hard" if self.hard else "")
        return super().extra_repr() + kept


class ProbabilisticBinaryConv2d(BinaryNeurons, PatchConv2d):
    """A convolution of stochastic bits with stochastic binary weights; a drop-in for nn.Conv2d.

    Args:
        in_channels: As nn.Conv2d.
        out_channels: As nn.Conv2d.
        kernel_size: As nn.Conv2d.
        stride: As nn.Conv2d.
        padding: As nn.Conv2d, "same" and "valid" included; zeros are fair coins, h = 0.
        dilation: As nn.Conv2d.
        groups: As nn.Conv2d.
        bias: Whether to add a trainable number to the pre-activation, started at 0. A norm has its own.
        padding_mode: As nn.Conv2d.
        law: What makes a probability of a pre-activation's moments. "clt": the normal law. "corrected": that with
            continuity correction, and "exact": Poisson-binomial, N^2 operations an output; in both, norm and bias only
            move a threshold in whole steps, so no gradient reaches them through the output: train with "clt".
        output: "activation": means 2q - 1 of the bits [a >= 0], in [-1, 1]. "sample": in train mode draws of these bits
            with the gradient of the binary concrete relaxation (PBNet-S), in eval mode their means. "moments": the
            `Moments` of a, for pooling. "mean": the mean of a, for a softmax.
        norm: Whether to normalize a by StochasticBatchNorm2d, in `.norm`.
        gamma: Initial scale of the norm.
        generator: Source of the draws of "sample"; None for torch's global one.
        device: As nn.Conv2d.
        dtype: torch.float32 (default) or torch.float64.

    Attributes:
        weight: (out_channels, in_channels / groups, height, width), real; the weight's bit has mean tanh(weight).
        hard: Whether weights are fixed and outputs are the sign of the mean, as in a network from `binarize`.
        bits_in: Whether inputs of a hard layer are bits, which counts read.

    Raises:
        ValueError: For arguments that do not fit each other, or unknown names.

    Source: Peters & Welling, Probabilistic Binary Neural Networks (arXiv:1809.03368), eq. 4 and 6; in eq. 3 the
        probability of agreement is (1 + theta h) / 2.
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
        law: str = "clt",
        output: str = "activation",
        norm: bool = True,
        gamma: float = 1.0,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode)
        shape = (out_channels, in_channels // groups, *self.geometry.kernel_size)
        made = StochasticBatchNorm2d(out_channels, gamma=gamma, device=device, dtype=dtype) if norm else None
        self._set_up(shape, law, output, bias, made, generator, device, dtype)
        self.reset_parameters()

    def forward(self, h: Tensor) -> Tensor | Moments:  # type: ignore[override]
        """Convolve.

        Args:
            h: Means of input bits in [-1, 1], (B, C, H, W) or (C, H, W).

        Returns:
            See `output`; every tensor sized as nn.Conv2d's output.

        Raises:
            ValueError: For another shape, number of channels or dtype, or, for an exact law, means beyond -1 and 1.
        """
        self._check_dtype()
        variances: list[Tensor] = []

        def mean_of(batch: Tensor) -> Tensor:
            found = self.respond(pad(batch, self.geometry))
            if isinstance(found, Tensor):
                return found
            variances.append(found.variance)
            return found.mean

        mean = self._on_batch(h, mean_of)
        if not variances:
            return mean
        return Moments(mean, variances[0] if h.ndim == 4 else variances[0][0])

    def contract(self, features: Sequence[Tensor], coefficients: Sequence[Tensor], constant: Tensor | None) -> Tensor:
        """See BinaryNeurons: features (B, C, H, W), padded."""
        return self._convolve(features, coefficients, constant, self.dilation)

    def _convolve(
        self, features: Sequence[Tensor], coefficients: Sequence[Tensor], constant: Tensor | None, dilation: Pair
    ) -> Tensor:
        if len(features) == 1:
            (joint,), (weight,) = features, coefficients
        else:
            # A group sees all features of its own channels.
            parts = [torch.unflatten(f, 1, (self.groups, -1)) for f in features]
            joint, weight = torch.stack(parts, dim=2).flatten(1, 3), torch.cat([*coefficients], dim=1)
        return F.conv2d(joint, weight, constant, self.stride, 0, dilation, self.groups)

    def exact(self, h: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """See BinaryNeurons."""
        size = (
            (h.shape[-2] - self._reach(0)) // self.stride[0] + 1,
            (h.shape[-1] - self._reach(1)) // self.stride[1] + 1,
        )
        rows = self.out_channels // self.groups
        outputs = []
        for group, part in enumerate(h.chunk(self.groups, dim=1)):
            mine = slice(group * rows, (group + 1) * rows)
            law = agreement_law(*self.synapses(unfold(part, self.geometry), mine))
            outputs.append(fold(exact_activation(law, scale[mine], shift[mine]), h.shape[0], size))
        return torch.cat(outputs, dim=1)

    def _reach(self, axis: int) -> int:
        return self.dilation[axis] * (self.kernel_size[axis] - 1) + 1

    def _along(self, line: Tensor) -> Tensor:
        return line[:, None, None]

    def _input_format(self) -> str:
        padded = self.padding_mode == "zeros" and self.geometry.margins() != ((0, 0), (0, 0))
        # The 0 of padding is a third value.
        return "ternary" if self.bits_in and padded else super()._input_format()

    def counts(self, input_shape: tuple[int, ...]) -> Counter[str]:
        """Operations of one inference; functions as the arithmetic that computes them.

        Args:
            input_shape: (channels, height, width).
        """
        positions, _ = self._shape_counts(input_shape)
        (top, bottom), (left, right) = self.geometry.margins()
        read = self.in_channels * (input_shape[1] + top + bottom) * (input_shape[2] + left + right)
        return self._operations(positions * self.out_channels, read)


class ProbabilisticBinaryLinear(BinaryNeurons):
    """A dense layer of stochastic binary neurons; a drop-in for nn.Linear.

    Args:
        in_features: As nn.Linear.
        out_features: As nn.Linear.
        bias: See ProbabilisticBinaryConv2d, as all that follow.
        law: See there.
        output: See there.
        norm: Whether to normalize by StochasticBatchNorm1d, over all axes but the last.
        gamma: Initial scale of the norm; 3 serves a last layer before a cross-entropy.
        generator: See there.
        device: As nn.Linear.
        dtype: torch.float32 (default) or torch.float64.

    Attributes:
        weight: (out_features, in_features), real; the weight's bit has mean tanh(weight).

    Source: Peters & Welling, Probabilistic Binary Neural Networks (arXiv:1809.03368), eq. 4 and 6.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        law: str = "clt",
        output: str = "activation",
        norm: bool = True,
        gamma: float = 1.0,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = whole(in_features, "in_features", 1)
        self.out_features = whole(out_features, "out_features", 1)
        made = StochasticBatchNorm1d(out_features, gamma=gamma, device=device, dtype=dtype) if norm else None
        self._set_up((out_features, in_features), law, output, bias, made, generator, device, dtype)
        self.reset_parameters()

    def forward(self, h: Tensor) -> Tensor | Moments:
        """Means of input bits in [-1, 1], (..., in_features) -> (..., out_features), see `output`.

        Raises:
            ValueError: For another number of features or dtype, or, for an exact law, means beyond -1 and 1.
        """
        self._check_dtype()
        if not isinstance(h, Tensor):
            raise ValueError(f"input is a {type(h).__name__}: give a torch.Tensor of means of bits")
        if h.ndim < 1 or h.shape[-1] != self.in_features:
            raise ValueError(
                f"layer has {self.in_features} input features but the input has shape {tuple(h.shape)}: give "
                f"(..., {self.in_features})"
            )
        precision = full_precision(h)
        if h.dtype != self.weight.dtype and (isinstance(precision, nullcontext) or not h.is_floating_point()):
            raise ValueError(f"input is {h.dtype} but the layer is {self.weight.dtype}: convert one with .to(dtype)")
        shape = (*h.shape[:-1], self.out_features)
        # Half precision would lose the variance, a difference of large numbers.
        with precision:
            found = self.respond(h.to(self.weight.dtype).reshape(-1, self.in_features))
            if isinstance(found, Tensor):
                return found.reshape(shape)
            return Moments(found.mean.reshape(shape), found.variance.reshape(shape))

    def contract(self, features: Sequence[Tensor], coefficients: Sequence[Tensor], constant: Tensor | None) -> Tensor:
        """See BinaryNeurons: features (P, in_features)."""
        if len(features) == 1:
            return F.linear(features[0], coefficients[0], constant)
        return F.linear(torch.cat([*features], dim=1), torch.cat([*coefficients], dim=1), constant)

    def exact(self, h: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """See BinaryNeurons."""
        return exact_activation(agreement_law(*self.synapses(h, slice(None))), scale, shift)

    def counts(self, input_shape: tuple[int, ...]) -> Counter[str]:
        """Operations of one inference; functions as the arithmetic that computes them.

        Args:
            input_shape: (..., in_features).
        """
        if not input_shape or input_shape[-1] != self.in_features:
            raise ValueError(f"input_shape is {tuple(input_shape)}: give (..., {self.in_features})")
        rows = prod(input_shape[:-1])
        return self._operations(rows * self.out_features, rows * self.in_features)

    def extra_repr(self) -> str:
        """The arguments that define the layer."""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}{super().extra_repr()}"
