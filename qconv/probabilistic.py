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
from collections.abc import Sequence
from contextlib import nullcontext
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from qconv.backends.protocol import full_precision
from qconv.binary_laws import Moments, agreement_law, exact_activation
from qconv.binary_modules import StochasticBatchNorm1d, StochasticBatchNorm2d
from qconv.binary_neurons import BinaryNeurons
from qconv.patch_conv import PatchConv2d
from qconv.patches import Pair, fold, pad, unfold, whole


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
        law: What makes a probability of a pre-activation's moments. "clt": the normal law, which has a gradient for all
            parameters: train with it. "corrected": that with continuity correction, many times closer to "exact", the
            Poisson-binomial law of N^2 operations an output; in both, norm and bias only move a threshold in whole
            steps, so no gradient reaches them through the output. docs/binary_networks.md measures their errors.
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

    Training: weights start normal, with standard deviation 1/2. Adam under a one-cycle schedule (qconv.train.fit) wants
        peak rates of 0.01 to 0.1, above those of plain layers; examples/reproduce/quantum_deformed.py chooses.

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
            ValueError: For another shape, number of channels or dtype; for an exact law, also for means beyond -1
                and 1, and for more inputs than fit into 4 GiB.
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
        self._check_memory(h, size[0] * size[1] * self.out_channels, self.groups)
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

    Training: as ProbabilisticBinaryConv2d; a dense layer alone wants the lower of those rates.

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
            ValueError: For another number of features or dtype; for an exact law, also for means beyond -1
                and 1, and for more inputs than fit into 4 GiB.
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
        self._check_memory(h, self.out_features, 1)
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
