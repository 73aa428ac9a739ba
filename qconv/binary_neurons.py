"""What layers of stochastic binary neurons share: from the moments of a pre-activation to the output, and its cost.

See probabilistic.py for what these neurons are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from circuits.naming import unknown
from qconv.binary_laws import (
    ACTIVATION,
    RSQRT,
    Moments,
    binary_concrete,
    check_memory,
    check_range,
    corrected_activation,
    handed_on,
    normal_activation,
    operations,
    sign,
    transverse,
)
from qconv.binary_modules import StochasticBatchNorm1d, StochasticBatchNorm2d
from qconv.binary_weights import BinaryWeights

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

    def _check_memory(self, h: Tensor, outputs: int, parts: int) -> None:
        backward = torch.is_grad_enabled() and (h.requires_grad or any(p.requires_grad for p in self.parameters()))
        check_memory(h, outputs, parts, self.fan_in, backward)

    def _along(self, line: Tensor) -> Tensor:
        """One number a row, so that it broadcasts against pre-activations."""
        return line

    def respond(self, h: Tensor) -> Tensor | Moments:
        """The output of (padded) inputs h.

        Raises:
            ValueError: For an exact law, with means beyond -1 and 1, or of too many outputs for the memory.
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
