"""Laws of sums of bits: moments, tail probabilities, samples; and the modules that act on a law alone.

A bit takes the values -1 and +1; its mean h in [-1, 1] says everything about it, P(+1) = (1 + h) / 2. A neuron adds up
N agreements, each such a bit: a = 2 S - N with S of them in agreement.
"""

from __future__ import annotations

from collections import Counter
from math import pi, prod, sqrt
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qconv.patches import Pair, pair

# A variance of nothing, and what decides a tie then: far below all rounding, yet TIE / sqrt(NOTHING) is large.
_NOTHING, _TIE = 1e-36, 1e-17
_FAR = 1e9  # beyond any sum; infinity would make gradients 0 * inf


class Moments(NamedTuple):
    """Mean and variance of a pre-activation, two tensors of one shape: all that the normal law needs.

    A difference of large numbers, the variance may be below 0 by rounding; what reads it clamps it.
    """

    mean: Tensor
    variance: Tensor


class _NormalActivation(torch.autograd.Function):
    """erf(z), z = (scale a + shift) / sqrt(2 scale^2 variance), in few passes over memory."""

    generate_vmap_rule = True

    @staticmethod
    def forward(mean: Tensor, variance: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        root = (variance * (2 * scale**2)).clamp(min=_NOTHING).rsqrt_()
        z = torch.addcmul(shift + _TIE, mean, scale).mul_(root)
        return torch.erf(z), z, root

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs[2:], *output[1:])
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        scale, shift, z, root = ctx.saved_tensors
        slope = (z * z).neg_().exp_().mul_(grad).mul_(root)
        of_shift = (2 / sqrt(pi)) * slope.sum_to_size(shift.shape)
        # z is (a + shift / scale) / sqrt(2 variance) up to the sign: scale enters with shift only.
        of_scale = torch.where(scale == 0, 0.0, -shift / torch.where(scale == 0, 1.0, scale)) * of_shift
        # In this order no product of two large numbers meets the 0 of a saturated slope.
        of_variance = (slope * z).mul_(root).mul_(scale**2 * (-2 / sqrt(pi)))
        return slope.mul_(scale * (2 / sqrt(pi))), of_variance, of_scale, of_shift


def normal_activation(moments: Moments, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
    """2 P(scale a + shift >= 0) - 1 for a normal a; a step with P = 1 at 0 where nothing varies.

    Args:
        moments: Of a; rounding may leave a variance below 0, which counts as 0.
        scale: Broadcasts against the moments; None for 1.
        shift: Of the same shape; None for 0.

    Source: Peters & Welling, Probabilistic Binary Neural Networks (arXiv:1809.03368), eq. 6.
    """
    scale = moments.mean.new_ones(()) if scale is None else scale
    shift = torch.zeros_like(scale) if shift is None else shift
    result: Tensor = _NormalActivation.apply(*moments, scale, shift)[0]  # type: ignore[no-untyped-call]
    return result


def corrected_activation(moments: Moments, scale: Tensor, shift: Tensor, fan_in: int) -> Tensor:
    """2 P(scale a + shift >= 0) - 1 by the normal law with continuity correction.

    a moves in steps of 2 over -N, -N + 2, ..., N: the normal law is cut half a step beyond the last value that counts.
    Shift and scale move that cut in whole steps, so no gradient reaches them.

    Args:
        moments: Of a, before scale and shift.
        scale: Broadcasts against the moments; any sign, and 0 where shift alone decides.
        shift: Likewise.
        fan_in: N.
    """
    some = torch.where(scale == 0, 1.0, scale)
    threshold = -shift / some
    rising = 2 * torch.ceil((threshold + fan_in) / 2) - fan_in - 1
    falling = 2 * torch.floor((threshold + fan_in) / 2) - fan_in + 1
    # No value beyond the ends can occur: there the law has no tail.
    edge = torch.where(some > 0, rising, falling).detach()
    edge = torch.where(edge < -fan_in, -_FAR, torch.where(edge > fan_in, _FAR, edge))
    variance = moments.variance.clamp(min=1e-6)
    soft = torch.sign(some) * torch.erf((moments.mean - edge) * torch.rsqrt(2 * variance))
    return torch.where(scale == 0, sign(shift), soft)


def sign(x: Tensor) -> Tensor:
    """-1 or +1, and +1 for 0: a tie is active."""
    return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)


class _Transverse(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(h: Tensor) -> Tensor:
        return ((1 - h) * (1 + h)).clamp(min=0).sqrt()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0], output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        h, x = ctx.saved_tensors
        slope: Tensor = (grad * h).neg_().div_(x).masked_fill_(x == 0, 0.0)
        return slope


def transverse(h: Tensor) -> Tensor:
    """X = sqrt(1 - h^2) = 2 sqrt(p (1 - p)), the coherence of a qubit in a pure state whose bit has mean h.

    The slope -h / X is infinite at the ends, where a bit is certain: there the gradient is 0, and beyond them X is 0. A
    bit that an activation saturated passes no gradient anyway, since its own slope falls faster than X.
    """
    result: Tensor = _Transverse.apply(h)  # type: ignore[no-untyped-call]
    return result


def agreement_law(single: Tensor, pairs: Tensor | None = None) -> Tensor:
    """Exact law of the number of agreements: of independent bits (Poisson-binomial), and of independent pairs of bits.

    Probabilities are only added and multiplied, one block after another: no cancellation, N^2 / 2 steps.

    Args:
        single: Means of the independent bits, (..., n).
        pairs: Laws (..., k, 3) of 0, 1 or 2 agreements in each of k pairs; None for none.

    Returns:
        (..., N + 1): P(S = 0), ..., P(S = N), N = n + 2 k.
    """
    up = (1 + single) / 2
    blocks = [torch.stack([1 - p, p], dim=-1) for p in up.unbind(-1)]
    if pairs is not None:
        blocks += pairs.unbind(-2)
    law = single.new_ones((1,))
    for block in blocks:
        steps = block.shape[-1] - 1
        law = sum(
            (F.pad(law, (k, steps - k)) * block[..., k : k + 1] for k in range(steps + 1)), start=law.new_zeros(())
        )
    return law


def exact_activation(law: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """2 P(scale a + shift >= 0) - 1 from the exact law of the agreements.

    Args:
        law: (..., channels, N + 1), see agreement_law.
        scale: (channels,), of any sign.
        shift: (channels,). Both move the threshold in whole steps, so no gradient reaches them.

    Returns:
        (..., channels).
    """
    n = law.shape[-1] - 1
    a = 2 * torch.arange(n + 1, dtype=law.dtype, device=law.device) - n
    active = scale[:, None] * a + shift[:, None] >= 0
    return 2 * (law * active).sum(-1) - 1


def binary_concrete(h: Tensor, tau: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
    """Draw bits of mean h, exactly -1 or +1, with the gradient of their relaxation at temperature tau.

    Args:
        h: Means in [-1, 1].
        tau: Temperature, above 0; the draw itself does not depend on it.
        generator: Source of randomness; None for torch's global one.

    Source: Maddison, Mnih & Teh, The Concrete Distribution (arXiv:1611.00712), appendix B; straight-through as the hard
        relaxation of Peters & Welling (arXiv:1809.03368), section 4.2.
    """
    uniform = torch.rand(h.shape, generator=generator, dtype=h.dtype, device=h.device)
    tiny = torch.finfo(h.dtype).eps
    # logit(q) = 2 atanh(h): the ends are pulled in by one rounding step, where atanh would be infinite.
    logit = 2 * torch.atanh(h.clamp(-1 + tiny, 1 - tiny))
    soft = torch.tanh((logit + torch.logit(uniform, tiny)) / (2 * tau))
    # Drawn from h itself, so that certain bits stay certain.
    hard = torch.where(uniform < (1 - h) / 2, -1.0, 1.0).to(h.dtype)
    return hard + (soft - soft.detach())


def normal_sample(moments: Moments, generator: torch.Generator | None = None) -> Tensor:
    """One draw of every pre-activation."""
    noise = torch.randn(moments.mean.shape, generator=generator, dtype=moments.mean.dtype, device=moments.mean.device)
    return moments.mean + moments.variance.clamp(min=0).sqrt() * noise


# Functions as the arithmetic that computes them: 1 / sqrt(x) by two Newton steps y (1.5 - 0.5 x y^2), and erf by
# Abramowitz & Stegun 7.1.26: a reciprocal, a polynomial of degree 5 and an exponential (qconv.energy prices likewise).
RSQRT = Counter(mul=7, add=2)
ERF = Counter(mul=22, add=18)
ACTIVATION = RSQRT + ERF + Counter(mul=1)


def operations(units: int, each: Counter[str]) -> Counter[str]:
    """So many times the same float32 operations."""
    return Counter({f"{name}:fp32": units * amount for name, amount in each.items()})


def handed_on(units: int) -> Counter[str]:
    """So many float32 numbers given to the next layer."""
    return Counter({"units": units, "activation_bits": 32 * units})


class PixelBits(nn.Module):
    """Pixels as bits: a value x in [0, 1] is the probability of +1, so its bit has mean h = 2x - 1."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape of pixels in [0, 1] -> means in [-1, 1]."""
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
        """Normalize moments (B, num_features, ...)."""
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
        """(B, C, H, W) moments -> (B, C, H', W') moments."""
        with torch.no_grad():
            drawn = normal_sample(moments, self.generator) if self.training else moments.mean
            _, winners = F.max_pool2d(drawn, self.kernel_size, self.stride, self.padding, return_indices=True)
        mean, variance = (m.flatten(2).gather(2, winners.flatten(2)).view_as(winners) for m in moments)
        return Moments(mean, variance)

    def counts(self, input_shape: tuple[int, ...]) -> Counter[str]:
        """Operations of one inference: comparisons."""
        sizes = zip(input_shape[1:], self.kernel_size, self.stride, self.padding, strict=True)
        units = input_shape[0] * prod((size + 2 * p - k) // s + 1 for size, k, s, p in sizes)
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
        """Moments of any shape -> means in [-1, 1], or bits."""
        h = normal_activation(moments)
        return binary_concrete(h, self.tau, self.generator) if self.sample and self.training else h

    def counts(self, input_shape: tuple[int, ...]) -> Counter[str]:
        """Operations of one inference."""
        units = prod(input_shape)
        return operations(units, ACTIVATION) + handed_on(units)
