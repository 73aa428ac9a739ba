"""Expressibility: how far the states of a kernel are from random ones."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qconv.diagnostics.states import (
    PERIOD,
    Kernel,
    at_least,
    check_level,
    circuit_of,
    draw,
    generator_of,
    numpy_generator,
    parts,
    patches_of,
    states,
)

Real = NDArray[np.float64]
BINS = 75


@dataclass(frozen=True)
class Expressibility:
    """Kullback-Leibler divergence of a kernel's histogram of fidelities from that of Haar-random states, in nats.

    Args:
        value: Of the measured histogram, as published ones are; above the true one by `bias` on average.
        bias: What the finite number of pairs adds, estimated by resampling.
        low: Lower end of the interval of the divergence without bias.
        high: Its upper end.
        level: Of the interval.
        pairs: Of states.
        wires: Of the kernel.
        histogram: (bins,) measured probabilities of the fidelity, in even bins of [0, 1].
        haar: (bins,) exact ones of Haar-random states.
    """

    value: float
    bias: float
    low: float
    high: float
    level: float
    pairs: int
    wires: int
    histogram: Real = field(repr=False)
    haar: Real = field(repr=False)

    @property
    def corrected(self) -> float:
        """The divergence without the estimated bias; noise can bring it below 0."""
        return self.value - self.bias


def haar_log_masses(wires: int, bins: int = BINS) -> Real:
    """Logarithms of the probabilities of even fidelity bins for pairs of Haar-random states.

    With N = 2^wires the density is (N - 1)(1 - F)^(N - 2), so a bin [a, b] has (1 - a)^(N - 1) - (1 - b)^(N - 1).
    Logarithms, because that of the last bin is no floating-point number from 8 wires on.

    Source: Zyczkowski & Sommers, Average fidelity between random quantum states (arXiv:quant-ph/0311117).
    """
    power = 2.0**wires - 1
    left = 1 - np.arange(bins) / bins
    ratio = np.append(left[1:], 0.0) / left
    result: Real = power * np.log(left) + np.log1p(-(ratio**power))
    return result


def _divergence(histogram: Real, haar_log: Real) -> Real:
    """Of (..., bins); empty bins add nothing."""
    filled = np.where(histogram > 0, histogram, 1.0)
    result: Real = (histogram * (np.log(filled) - haar_log)).sum(-1)
    return result


def fidelities(
    kernel: Kernel, data: Tensor | None = None, *, pairs: int = 5000, period: float = PERIOD, seed: int | None = None
) -> Tensor:
    """|<psi(x, a)|psi(x, b)>|^2 of random weights a and b and a random patch x of the data: (pairs,)."""
    at_least("pairs", pairs, 1)
    return _fidelities(kernel, data, pairs, period, generator_of(seed))


def _fidelities(
    kernel: Kernel, data: Tensor | None, pairs: int, period: float, generator: torch.Generator | None
) -> Tensor:
    circuit, patches = circuit_of(kernel), patches_of(kernel, data)
    inputs, first = draw(circuit, patches, pairs, period, generator)
    _, second = draw(circuit, patches, pairs, period, generator)
    with torch.no_grad():
        overlaps = [
            (states(circuit, inputs[k], first[k]).conj() * states(circuit, inputs[k], second[k])).sum(-1)
            for k in parts(circuit, pairs)
        ]
    # Rounding may leave [0, 1], which the histogram covers.
    return torch.cat(overlaps).abs().square().clamp(0, 1)


def expressibility(
    kernel: Kernel,
    data: Tensor | None = None,
    *,
    pairs: int = 5000,
    bins: int = BINS,
    period: float = PERIOD,
    seed: int | None = None,
    level: float = 0.95,
    resamples: int = 1000,
) -> Expressibility:
    """How far the fidelities of a kernel's states are from those of Haar-random states; 0 is as expressive as can be.

    Args:
        kernel: A circuit or a layer. One without weights is the source's idle circuit, whose value is the largest.
        data: Patches or images, see `states.patches_of`; both states of a pair have the same patch.
        pairs: Of random weights.
        bins: Of the histogram; more of them see more and need more pairs. Values of different numbers of bins or of
            wires cannot be compared.
        period: Weights are uniform on [0, period).
        seed: Of all draws; None takes torch's global generator.
        level: Of the interval.
        resamples: Of the histogram, for bias and interval (basic bootstrap: the resampled divergences lie around the
            measured one as that one lies around the true one).

    Raises:
        ValueError: For data that do not fit, a layer with noise, or fewer than 2 pairs, 2 bins or 2 resamples.

    Source: Sim, Johnson & Aspuru-Guzik, Expressibility and entangling capability of parameterized quantum circuits
        (arXiv:1905.10876); 5000 pairs and 75 bins as there.
    """
    for name, count in (("pairs", pairs), ("bins", bins), ("resamples", resamples)):
        at_least(name, count, 2)
    check_level(level)
    generator = generator_of(seed)
    measured = _fidelities(kernel, data, pairs, period, generator)
    wires = circuit_of(kernel).n_wires
    histogram = np.histogram(measured.numpy(), bins, (0.0, 1.0))[0] / pairs
    haar_log = haar_log_masses(wires, bins)
    value = float(_divergence(histogram, haar_log))
    again = _divergence(numpy_generator(generator).multinomial(pairs, histogram, resamples) / pairs, haar_log)
    tail = (1 - level) / 2
    low, high = 2 * value - np.quantile(again, [1 - tail, tail])
    bias = float(again.mean()) - value
    ends = max(float(low), 0.0), max(float(high), 0.0)
    return Expressibility(value, bias, *ends, level, pairs, wires, histogram, np.exp(haar_log))
