"""Effective dimension: how many of a kernel's weights a set of data can tell apart."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import log, pi, sqrt

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from circuits.circuit import Circuit
from circuits.naming import unknown
from qconv.diagnostics.states import (
    PERIOD,
    Kernel,
    at_least,
    check_level,
    check_numbers,
    circuit_of,
    generator_of,
    numpy_generator,
    parts,
    patches_of,
    positive,
    states_and_slopes,
)

Real = NDArray[np.float64]
OUTCOMES = ("bits", "parity")
# Below it a probability counts as 0: its square root could not be told from rounding errors.
_IMPOSSIBLE = 1e-24


@dataclass(frozen=True)
class EffectiveDimension:
    """Effective dimension of a kernel as a statistical model.

    Args:
        value: The effective dimension; it nears the rank of the Fisher information as data grow, and may exceed the
            number of weights for few data.
        low: Lower end of its interval.
        high: Upper end.
        level: Of the interval.
        weights: Trainable weights.
        n_data: Observations that it is stated for.
        gamma: In (0, 1].
        samples: Points in the space of weights.
        eigenvalues: (weights,) of the Fisher information averaged over the points, ascending.
    """

    value: float
    low: float
    high: float
    level: float
    weights: int
    n_data: int
    gamma: float
    samples: int
    eigenvalues: Real = field(repr=False)

    @property
    def normalized(self) -> float:
        """Divided by the number of weights."""
        return self.value / self.weights


def fisher_information(circuit: Circuit, inputs: Tensor, weights: Tensor, outcome: str = "bits") -> Tensor:
    """Fisher information of the law of a measurement in the computational basis, averaged over inputs.

    F_ab = mean_x sum_y d_a p(y|x) d_b p(y|x) / p(y|x), from exact probabilities and derivatives.

    Args:
        circuit: Its observables do not matter.
        inputs: (P, n_inputs), float64.
        weights: (T, n_weights), float64.
        outcome: "bits" (all 2^n bit strings) or "parity" (two classes: an even or odd number of ones).

    Returns:
        (T, n_weights, n_weights).

    Raises:
        ValueError: For an unknown outcome.

    Source: Abbas et al., The power of quantum neural networks (arXiv:2011.00027); parity as there.
    """
    if outcome not in OUTCOMES:
        raise unknown("outcome", outcome, OUTCOMES)
    patches, n_weights = len(inputs), circuit.n_weights
    rows, columns = weights.repeat_interleave(patches, 0), inputs.repeat(len(weights), 1)
    classes = _classes(outcome, circuit.n_wires)
    found = []
    for k in parts(circuit, len(rows), 1 + n_weights):
        state, slopes = states_and_slopes(circuit, columns[k], rows[k])
        chance = (state.abs().square() @ classes)[:, None]
        change = 2 * (state.conj()[:, None] * slopes).real @ classes
        score = torch.where(chance > _IMPOSSIBLE, change / chance.clamp(min=_IMPOSSIBLE).sqrt(), 0)
        found.append(score @ score.mT)
    return torch.cat(found).reshape(len(weights), patches, n_weights, n_weights).mean(1)


def _classes(outcome: str, wires: int) -> Tensor:
    """Which class each bit string belongs to: (2^n, classes) of 0 and 1."""
    size = 2**wires
    if outcome == "bits":
        return torch.eye(size, dtype=torch.float64)
    odd = np.array([k.bit_count() % 2 for k in range(size)], float)
    return torch.from_numpy(np.stack([1 - odd, odd], axis=-1))


def _ball(center: Tensor, radius: float, samples: int, generator: torch.Generator | None) -> Tensor:
    """Points spread evenly over the ball around a center (d,): (samples, d)."""
    size = len(center)
    direction = torch.randn(samples, size, dtype=torch.float64, generator=generator)
    length = torch.rand(samples, 1, dtype=torch.float64, generator=generator) ** (1 / size)
    point: Tensor = center + radius * length * direction / torch.linalg.vector_norm(direction, dim=1, keepdim=True)
    return point


def effective_dimension(
    kernel: Kernel,
    data: Tensor | None = None,
    n_data: int = 1000,
    *,
    gamma: float = 1.0,
    outcome: str = "bits",
    around: Tensor | None = None,
    radius: float | None = None,
    samples: int = 100,
    period: float = PERIOD,
    seed: int | None = None,
    level: float = 0.95,
    resamples: int = 500,
) -> EffectiveDimension:
    """The effective dimension of a kernel whose circuit is measured in the computational basis.

    d(n) = 2 log( mean_w sqrt(det(1 + kappa F^(w))) ) / log kappa with kappa = gamma n / (2 pi log n), where F^ is the
    Fisher information divided by its mean trace and multiplied by the number d of weights.

    Args:
        kernel: A circuit with weights, or a layer.
        data: Patches or images that the Fisher information is averaged over, see `states.patches_of`; all are used,
            so give some tens.
        n_data: Observations n that it is stated for; kappa must exceed 1.
        gamma: In (0, 1].
        outcome: What is observed, see `fisher_information`.
        around: (n_weights,) for the local effective dimension, over the ball of `radius` around these weights; None
            for all weights in [0, period).
        radius: Of the ball; above 1 / sqrt(n).
        samples: Points in the space of weights.
        period: See `around`.
        seed: Of all draws; None takes torch's global generator.
        level: Of the interval (percentiles of the bootstrap over the points).
        resamples: Of the bootstrap.

    Raises:
        ValueError: For a kernel without weights or whose measurement does not depend on them, or numbers out of range.

    Source: Abbas et al., The power of quantum neural networks (arXiv:2011.00027); locally, Abbas et al.,
        Effective dimension of machine learning models (arXiv:2112.04807).
    """
    circuit, patches = circuit_of(kernel), patches_of(kernel, data)
    for name, count in (("samples", samples), ("n_data", n_data), ("resamples", resamples)):
        at_least(name, count, 2)
    check_level(level)
    positive("period", period)
    if not circuit.n_weights:
        raise ValueError("kernel has 0 weights: an effective dimension needs at least 1")
    if not 0 < gamma <= 1:
        raise ValueError(f"gamma is {gamma}: give a number above 0 and up to 1")
    kappa = gamma * n_data / (2 * pi * log(n_data))
    if kappa <= 1:
        raise ValueError(f"n_data is {n_data} and gamma {gamma}, so kappa is {kappa:.3g}: it must exceed 1, give more")
    generator = generator_of(seed)
    if around is None:
        weights = period * torch.rand(samples, circuit.n_weights, dtype=torch.float64, generator=generator)
    else:
        check_numbers("around", around)
        if around.shape != (circuit.n_weights,):
            raise ValueError(f"around has shape {tuple(around.shape)}: give ({circuit.n_weights},) weights")
        if radius is None or radius <= 1 / sqrt(n_data):
            raise ValueError(f"radius is {radius}: give one above 1/sqrt(n_data) = {1 / sqrt(n_data):.3g}")
        weights = _ball(around.detach().double().cpu(), radius, samples, generator)
    with torch.no_grad():
        fisher = fisher_information(circuit, patches, weights, outcome)
    if not fisher.diagonal(dim1=1, dim2=2).sum() > 0:
        raise ValueError("the measured law does not depend on the weights: choose another outcome or kernel")
    # Roots of determinants, from eigenvalues; rounding may leave some below 0.
    spectra = torch.linalg.eigvalsh(fisher).clamp(min=0).numpy()
    value = float(_dimension(spectra[None], kappa)[0])
    chosen = numpy_generator(generator).integers(samples, size=(resamples, samples))
    again = np.concatenate([_dimension(spectra[rows][None], kappa) for rows in chosen])
    low, high = np.quantile(again, [(1 - level) / 2, (1 + level) / 2])
    mean = torch.linalg.eigvalsh(fisher.mean(0)).numpy()
    return EffectiveDimension(value, float(low), float(high), level, circuit.n_weights, n_data, gamma, samples, mean)


def _dimension(spectra: Real, kappa: float) -> Real:
    """(R, samples, d) eigenvalues of the Fisher information at each point -> (R,)."""
    trace = spectra.sum(-1).mean(-1)[:, None, None]
    halves = np.log1p(kappa * spectra.shape[-1] * spectra / trace).sum(-1) / 2
    largest = halves.max(-1, keepdims=True)
    # The determinants themselves may be too large for floating-point numbers.
    result: Real = 2 * (largest[:, 0] + np.log(np.exp(halves - largest).mean(-1))) / log(kappa)
    return result
