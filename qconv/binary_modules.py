"""Modules between probabilistic binary layers: pixels as bits, norms, pooling and activations of laws."""

from __future__ import annotations

from collections import Counter
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qconv.binary_laws import (
    ACTIVATION,
    Moments,
    binary_concrete,
    check_range,
    handed_on,
    normal_activation,
    normal_sample,
    operations,
)
from qconv.patches import Pair, pair


def _require_moments(moments: Moments, what: str) -> None:
    if not isinstance(moments, Moments):
        raise ValueError(
            f"{what} takes Moments (mean, variance) but was given a {type(moments).__name__}: build the layer before "
            'it with output="moments"'
        )


class PixelBits(nn.Module):
    """Pixels as bits: a value x in [0, 1] is the probability of +1, so its bit has mean h = 2x - 1."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape of pixels in [0, 1] -> means in [-1, 1].

        Raises:
            ValueError: For pixels beyond [0, 1], unless the program is being compiled.
        """
        check_range(x, 0, 1, "pixels are", "scale them first, such as images / 255")
        return 2 * x - 1

    def counts(self, input_shape: tuple[int, ...]) -> Counter[str]:
        """Operations of one inference."""
        units = prod(input_shape)
        return operations(units, Counter(mul=1, add=1)) + handed_on(units)


class _StochasticBatchNorm(nn.Module):
    """Batch normalization of random pre-activations: by the moments of a draw of the batch, not of its means alone.

    m = mean of mu_i, v = (sum sigma_i^2 + sum (mu_i - m)^2) / (M - 1) over the M entries of a channel;
    mu <- gamma (mu - m) / sqrt(v + eps) + beta, sigma^2 <- gamma^2 sigma^2 / (v + eps).

    Args:
        num_features: Channels, the second axis.
        eps: Added to the variance.
        momentum: Weight of a new batch in the running statistics; None for the plain average of all batches.
        gamma: Initial scale; about 3 before a cross-entropy, whose softmax needs scores that far apart.
        device: As nn.BatchNorm2d.
        dtype: As nn.BatchNorm2d.

    Source: Peters & Welling, Probabilistic Binary Neural Networks (arXiv:1809.03368), section 3.3.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    axes: tuple[int, ...]

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        gamma: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_features, self.eps, self.momentum, self.gamma = num_features, eps, momentum, gamma
        self.weight = nn.Parameter(torch.empty(num_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty_like(self.weight))
        self.register_buffer("running_mean", torch.empty_like(self.weight, requires_grad=False))
        self.register_buffer("running_var", torch.empty_like(self.weight, requires_grad=False))
        self.register_buffer("num_batches_tracked", torch.tensor(0, device=device))
        self.reset_parameters()

    def reset_running_stats(self) -> None:
        """Forget the batches seen."""
        self.running_mean.zero_()
        self.running_var.fill_(1)
        self.num_batches_tracked.zero_()

    def reset_parameters(self) -> None:
        """Scale gamma, shift 0, no batches seen."""
        self.reset_running_stats()
        nn.init.constant_(self.weight, self.gamma)
        nn.init.zeros_(self.bias)

    def line(self, moments: Moments | None) -> tuple[Tensor, Tensor]:
        """Scale and shift of each channel, (num_features,) both: of this batch in train mode, else the running ones.

        Raises:
            ValueError: In train mode, for a channel of one entry, which has no variance.
        """
        if self.training:
            if moments is None:
                raise ValueError("stochastic batch norm is in train mode but was given no moments: call eval() first")
            mean, variance = self._batch_statistics(moments)
        else:
            mean, variance = self.running_mean, self.running_var
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return scale, self.bias - mean * scale

    def _batch_statistics(self, moments: Moments) -> tuple[Tensor, Tensor]:
        axes = [axis for axis in range(moments.mean.ndim) if axis != 1]
        entries = moments.mean.numel() // self.num_features
        if entries < 2:
            raise ValueError(
                f"a channel has {entries} entry in this batch, shape {tuple(moments.mean.shape)}, but its variance "
                "needs 2 or more: train on larger batches"
            )
        # Two plain passes: torch.var_mean over these axes takes many times as long on a CPU.
        mean = moments.mean.sum(dim=axes) / entries
        spread = moments.mean - mean.reshape(-1, *(1,) * (moments.mean.ndim - 2))
        variance = ((spread * spread).sum(dim=axes) + moments.variance.sum(dim=axes)) / (entries - 1)
        with torch.no_grad():
            self.num_batches_tracked += 1
            rate = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean, torch.as_tensor(rate, dtype=mean.dtype, device=mean.device))
            self.running_var.lerp_(variance, torch.as_tensor(rate, dtype=mean.dtype, device=mean.device))
        return mean, variance

    def forward(self, moments: Moments) -> Moments:
        """Normalize moments (B, num_features, ...).

        Raises:
            ValueError: For anything but Moments, another shape, or, in train mode, channels of one entry.
        """
        _require_moments(moments, "a stochastic batch norm")
        shape = (-1, *(1,) * (moments.mean.ndim - 2))
        if moments.mean.ndim not in self.axes or moments.mean.shape[1] != self.num_features:
            raise ValueError(
                f"moments have shape {tuple(moments.mean.shape)} but the norm has {self.num_features} features: give "
                f"(batch, {self.num_features}{', height, width' if 4 in self.axes else ''})"
            )
        scale, shift = (line.reshape(shape) for line in self.line(moments))
        return Moments(moments.mean * scale + shift, moments.variance * scale**2)

    def counts(self, input_shape: tuple[int, ...]) -> Counter[str]:
        """Operations of one inference: two scales and a shift."""
        units = prod(input_shape)
        stored = 2 * self.num_features
        total = operations(units, Counter(mul=2, add=1)) + handed_on(2 * units)
        return total + Counter({"params": stored, "weight_bits": 32 * stored})

    def extra_repr(self) -> str:
        """The arguments that define the layer."""
        return f"{self.num_features}, eps={self.eps}, momentum={self.momentum}"


class StochasticBatchNorm1d(_StochasticBatchNorm):
    """Stochastic batch normalization of moments (B, num_features) or (B, num_features, L); arguments as above."""

    axes = (2, 3)


class StochasticBatchNorm2d(_StochasticBatchNorm):
    """Stochastic batch normalization of moments (B, num_features, H, W); arguments as above."""

    axes = (4,)


class ProbabilisticMaxPool2d(nn.Module):
    """Max-pooling of random pre-activations: the winner's moments pass on.

    In train mode every entry is drawn once and the largest draw of a window wins; in eval mode the largest mean does,
    so that inference is repeatable.

    Args:
        kernel_size: As nn.MaxPool2d.
        stride: As nn.MaxPool2d; None for the kernel's size.
        padding: As nn.MaxPool2d; padding never wins.
        generator: Source of the draws; None for torch's global one.

    Source: Peters & Welling, Probabilistic Binary Neural Networks (arXiv:1809.03368), section 3.4.
    """

    def __init__(
        self,
        kernel_size: int | Pair,
        stride: int | Pair | None = None,
        padding: int | Pair = 0,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.kernel_size = pair(kernel_size, "kernel_size", 1)
        self.stride = self.kernel_size if stride is None else pair(stride, "stride", 1)
        self.padding = pair(padding, "padding", 0)
        self.generator = generator

    def forward(self, moments: Moments) -> Moments:
        """(B, C, H, W) or (C, H, W) moments -> as many axes, (..., H', W').

        Raises:
            ValueError: For anything but Moments, or another number of axes.
        """
        _require_moments(moments, "a probabilistic max-pool")
        if moments.mean.ndim not in (3, 4):
            raise ValueError(
                f"moments have shape {tuple(moments.mean.shape)}: give (batch, channels, height, width) or "
                "(channels, height, width)"
            )
        with torch.no_grad():
            drawn = normal_sample(moments, self.generator) if self.training else moments.mean
            _, winners = F.max_pool2d(drawn, self.kernel_size, self.stride, self.padding, return_indices=True)
        mean, variance = (m.flatten(-2).gather(-1, winners.flatten(-2)).view_as(winners) for m in moments)
        return Moments(mean, variance)

    def counts(self, input_shape: tuple[int, ...]) -> Counter[str]:
        """Operations of one inference: comparisons.

        Args:
            input_shape: (channels, height, width).

        Raises:
            ValueError: For another number of axes, or an image smaller than the window.
        """
        if len(input_shape) != 3:
            raise ValueError(f"input_shape is {tuple(input_shape)}: give (channels, height, width)")
        sizes = zip(input_shape[1:], self.kernel_size, self.stride, self.padding, strict=True)
        places = [(size + 2 * p - k) // s + 1 for size, k, s, p in sizes]
        if min(places) < 1:
            raise ValueError(
                f"input_shape is {tuple(input_shape)}, smaller than the window {self.kernel_size} with padding "
                f"{self.padding}: use a smaller kernel_size"
            )
        units = input_shape[0] * prod(places)
        return operations(units, Counter(cmp=prod(self.kernel_size) - 1)) + handed_on(2 * units)

    def extra_repr(self) -> str:
        """The arguments that define the layer."""
        return f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}"


class BinaryActivation(nn.Module):
    """Moments of a pre-activation -> its bit: the mean 2q - 1, q = P(a >= 0) by the normal law, or a drawn bit.

    Args:
        sample: In train mode, draw the bit, with the gradient of the binary concrete relaxation; eval mode always gives
            the mean.
        tau: Temperature of that relaxation.
        generator: Source of the draws; None for torch's global one.

    Source: Peters & Welling, Probabilistic Binary Neural Networks (arXiv:1809.03368), eq. 6 and section 4.2.
    """

    def __init__(self, sample: bool = False, tau: float = 1.0, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        if not tau > 0:
            raise ValueError(f"tau is {tau}: a temperature is above 0")
        self.sample, self.tau, self.generator = sample, tau, generator

    def forward(self, moments: Moments) -> Tensor:
        """Moments of any shape -> means in [-1, 1], or bits.

        Raises:
            ValueError: For anything but Moments.
        """
        _require_moments(moments, "a binary activation")
        h = normal_activation(moments)
        return binary_concrete(h, self.tau, self.generator) if self.sample and self.training else h

    def counts(self, input_shape: tuple[int, ...]) -> Counter[str]:
        """Operations of one inference."""
        units = prod(input_shape)
        return operations(units, ACTIVATION) + handed_on(units)
