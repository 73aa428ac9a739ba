"""Laws of sums of bits: moments, tail probabilities, samples; and the modules that act on a law alone.

A bit takes the values -1 and +1; its mean h in [-1, 1] says everything about it, P(+1) = (1 + h) / 2. A neuron adds up
N agreements, each such a bit: a = 2 S - N with S of them in agreement.
"""

from __future__ import annotations

from collections import Counter
from math import pi, sqrt
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# A variance of nothing, and what decides a tie then: far below all rounding, yet TIE / sqrt(NOTHING) is large.
_NOTHING, _TIE = 1e-36, 1e-17
_FAR = 1e9  # beyond any sum; infinity would make gradients 0 * inf
_ROUNDING = 1e-4  # by so much a law that was summed up in float32 may leave its range
_FLAT = 80.0  # z^2 from where on exp(-z^2), below 2e-35, counts as 0

EXACT_BYTES = 2**32
"""What exact laws may take at a time."""


def check_range(values: Tensor, low: float, high: float, what: str, remedy: str) -> None:
    """Raise a ValueError unless all values lie between low and high, rounding apart; NaN passes.

    Not asked where it would cost more than it helps, or has no answer: in a compiled program, on a device that holds no
    values, and while a CUDA graph is captured.
    """
    if torch.compiler.is_compiling() or values.is_meta or not values.numel():
        return
    if values.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    try:
        least, most = torch.stack(torch.aminmax(values.detach())).tolist()
    except RuntimeError:  # many values in one, under torch.vmap
        return
    if least < low - _ROUNDING or most > high + _ROUNDING:
        raise ValueError(f"{what} from {least:.6g} to {most:.6g}, not within [{low:g}, {high:g}]: {remedy}")


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
        ctx.save_for_backward(*inputs, *output[1:])
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        mean, variance, scale, shift, z, root = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _differentiable_slopes(grad, mean, variance, scale, shift, z)
        slope = (z * z).neg_().exp_().mul_(root) * grad
        of_shift = (2 / sqrt(pi)) * slope.sum_to_size(shift.shape)
        # In this order no product of two large numbers meets the 0 of a saturated slope.
        of_variance = (slope * z).mul_(root).mul_(scale**2 * (-2 / sqrt(pi)))
        return slope.mul_(scale * (2 / sqrt(pi))), of_variance, _of_scale(scale, shift, of_shift), of_shift


def _of_scale(scale: Tensor, shift: Tensor, of_shift: Tensor) -> Tensor:
    # z is (a + shift / scale) / sqrt(2 variance) up to the sign: scale enters with shift only.
    return torch.where(scale == 0, 0.0, -shift / torch.where(scale == 0, 1.0, scale)) * of_shift


def _differentiable_slopes(
    grad: Tensor, mean: Tensor, variance: Tensor, scale: Tensor, shift: Tensor, z: Tensor
) -> tuple[Tensor, ...]:
    """The same gradients as functions of all that z is made of, for second derivatives; twice as slow."""
    # Where erf is flat its derivatives are 0, but their factors need not be finite.
    flat = (z * z).detach() > _FLAT
    mean, variance = torch.where(flat, 0.0, mean), torch.where(flat, 1.0, variance)
    root = (variance * (2 * scale**2)).clamp(min=_NOTHING).sqrt().reciprocal()
    z = torch.addcmul(shift + _TIE, mean, scale) * root
    slope = torch.where(flat, 0.0, torch.exp(-z * z) * root * grad) * (2 / sqrt(pi))
    of_shift = slope.sum_to_size(shift.shape)
    return slope * scale, -slope * z * root * scale**2, _of_scale(scale, shift, of_shift), of_shift


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
        slope: Tensor
        if torch.is_grad_enabled():
            # Second derivatives are finite only if nothing is divided by 0 on the way.
            slope = torch.where(x == 0, 0.0, -grad * h / torch.where(x == 0, 1.0, x))
        else:
            slope = (grad * h).neg_().div_(x).masked_fill_(x == 0, 0.0)
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


def exact_bytes(outputs: int, fan_in: int, itemsize: int, backward: bool) -> int:
    """About how many bytes agreement_law takes at its peak, its inputs included; somewhat less with pairs.

    Args:
        outputs: How many laws.
        fan_in: N.
        itemsize: Bytes of a number.
        backward: Whether gradients follow: two shifted copies of the law are kept at each of N steps, N^2 numbers.
    """
    return outputs * itemsize * fan_in * (fan_in + 11 if backward else 8)


def check_memory(inputs: Tensor, outputs: int, parts: int, fan_in: int, backward: bool) -> None:
    """Raise a ValueError where exact laws would take more than EXACT_BYTES, before any is made.

    Not asked in a compiled program, whose batch has no size yet, and on a device that holds no values.

    Args:
        inputs: A batch.
        outputs: Of one input.
        parts: Into how many the outputs are divided, one part made after another: what gradients need is kept of all.
        fan_in: N.
        backward: Whether gradients will be asked for.
    """
    if torch.compiler.is_compiling() or inputs.is_meta:
        return
    batch, size = len(inputs), inputs.element_size()
    without = exact_bytes(outputs // parts, fan_in, size, False)
    single = exact_bytes(outputs, fan_in, size, True) if backward else without
    if batch * single <= EXACT_BYTES:
        return
    advice = ["build the layer with law 'clt' or 'corrected'"]
    if backward and batch * without <= EXACT_BYTES:
        advice.insert(0, "call it under torch.no_grad() if no gradients are needed")
    if single <= EXACT_BYTES:
        advice.insert(0, f"give at most {EXACT_BYTES // single:,} inputs at a time")
    raise ValueError(
        f"law 'exact' would take about {batch * single:,} bytes{' with what gradients need' if backward else ''} for "
        f"{batch:,} inputs of {outputs:,} outputs with {fan_in:,} synapses each, more than {EXACT_BYTES:,}: "
        f"{', or '.join(advice)}"
    )


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


def handed_on(units: int, bits: int = 32) -> Counter[str]:
    """So many numbers of so many bits given to the next layer."""
    return Counter({"units": units, "activation_bits": bits * units})
