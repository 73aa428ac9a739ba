"""Gradient variance over wires and depth: does training start on a barren plateau?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from circuits.ansatze.library import ansatz
from circuits.circuit import Circuit
from circuits.naming import unknown
from circuits.options import is_list, is_whole
from qconv.backends.statevector import expectations
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
    readout_of,
    states,
)

Real = NDArray[np.float64]
Build = Callable[[int, int], Circuit]

# Variances of derivatives that are 0 but for rounding.
_ROUNDING = 1e-24

COSTS = {"global": lambda wires: "Z" * wires, "local": lambda wires: "Z" + "I" * (wires - 1)}


@dataclass(frozen=True)
class GradientVariance:
    """Variance over random weights of an output's derivative by a weight, averaged over outputs and weights that act.

    Args:
        value: The mean variance; weights that an output does not depend on do not count.
        low: Lower end of its interval.
        high: Upper end.
        level: Of the interval.
        per_weight: (outputs, n_weights) the variances, 0 where an output does not depend on a weight.
        samples: Random weights.
        wires: Of the kernel.
        resampled: (resamples,) values of the bootstrap.
    """

    value: float
    low: float
    high: float
    level: float
    per_weight: Real = field(repr=False)
    samples: int
    wires: int
    resampled: Real = field(repr=False)


@dataclass(frozen=True)
class Slope:
    """Change of log2(variance) a wire at one depth: -1 halves the variance with every wire.

    Args:
        depth: Layers.
        value: Of a straight line through all numbers of wires.
        low: Lower end of its interval.
        high: Upper end.
    """

    depth: int
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Plateau:
    """Gradient variances over wires and depth.

    Args:
        cost: The observable's name.
        wires: Numbers of wires.
        depths: Numbers of layers.
        points: A row a depth, an entry a number of wires.
        slopes: One a depth.
    """

    cost: str
    wires: tuple[int, ...]
    depths: tuple[int, ...]
    points: tuple[tuple[GradientVariance, ...], ...]
    slopes: tuple[Slope, ...]


def _gradients(circuit: Circuit, inputs: Tensor, weights: Tensor) -> Tensor:
    """Derivatives of the outputs by the weights: (B, n_obs, n_weights)."""
    found = []
    # Every operation keeps its states for the way back.
    for k in parts(circuit, len(weights), copies=8):
        leaf = weights[k].clone().requires_grad_()
        with torch.enable_grad():
            # Rows do not meet, so the derivative of the sum holds that of every row.
            totals = expectations(states(circuit, inputs[k], leaf)[None], circuit.observables)[0].sum(0)
            rows = [torch.autograd.grad(total, leaf, retain_graph=True)[0] for total in totals]
        found.append(torch.stack(rows, dim=1))
    return torch.cat(found)


def gradient_variance(
    kernel: Kernel,
    data: Tensor | None = None,
    *,
    samples: int = 500,
    period: float = PERIOD,
    seed: int | None = None,
    level: float = 0.95,
    resamples: int = 1000,
) -> GradientVariance:
    """The variance of the outputs' derivatives by the weights, over random weights.

    Args:
        kernel: A circuit with observables and weights; or a layer, whose outputs are those of its readout.
        data: Patches or images, see `states.patches_of`; each sample takes one at random.
        samples: Random weights.
        period: Weights are uniform on [0, period).
        seed: Of all draws; None takes torch's global generator.
        level: Of the interval (percentiles of the bootstrap over samples).
        resamples: Of the bootstrap.

    Raises:
        ValueError: For data that do not fit, a kernel without weights or observables, a layer with noise or readout
            "most_likely_ones", or numbers out of range.

    Source: McClean et al., Barren plateaus in quantum neural network training landscapes (arXiv:1803.11173).
    """
    at_least("samples", samples, 2)
    at_least("resamples", resamples, 1)
    check_level(level)
    circuit, readout = circuit_of(kernel), readout_of(kernel)
    if not circuit.n_weights or not circuit.observables:
        raise ValueError(
            f"kernel has {circuit.n_weights} weights and {len(circuit.observables)} observables: a gradient needs at "
            "least one of each"
        )
    generator = generator_of(seed)
    inputs, weights = draw(circuit, patches_of(kernel, data), samples, period, generator)
    gradients = _gradients(circuit, inputs, weights).numpy()
    table = None if readout is None else readout.table()
    if table is not None:
        gradients = table[0] @ gradients
    per_weight = gradients.var(0, ddof=1)
    per_weight[per_weight < _ROUNDING] = 0
    # Without the others: their share grows with the wires, which would look like a plateau.
    flat = gradients[:, per_weight > 0] if per_weight.any() else np.zeros((samples, 1))
    # How often each sample is drawn again, then moments by two matrix products.
    counts = numpy_generator(generator).multinomial(samples, np.full(samples, 1 / samples), resamples) / samples
    spread = counts @ np.square(flat) - np.square(counts @ flat)
    resampled = spread.mean(1) * samples / (samples - 1)
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    value = float(flat.var(0, ddof=1).mean())
    return GradientVariance(value, float(low), float(high), level, per_weight, samples, circuit.n_wires, resampled)


def _line(wires: Sequence[int], variances: Real) -> Real:
    """Slopes of log2(variance) over wires by least squares: (..., wires) -> (...)."""
    centered = np.asarray(wires, float) - np.mean(wires)
    # A variance of 0 has no logarithm: such a slope is infinite or not a number.
    with np.errstate(divide="ignore", invalid="ignore"):
        result: Real = (np.log2(variances) * centered).sum(-1) / np.square(centered).sum()
    return result


def barren_plateau(
    build: str | Build,
    wires: Sequence[int] = (2, 3, 4, 5, 6),
    depths: Sequence[int] = (1, 2, 4, 8),
    *,
    cost: str = "global",
    samples: int = 200,
    period: float = PERIOD,
    seed: int | None = None,
    level: float = 0.95,
    resamples: int = 1000,
) -> Plateau:
    """Gradient variances of a family of circuits over wires and depth, and how fast they fall with wires.

    Args:
        build: A name of `circuits.kernel_names()`, for its block alone, started in |0...0>; or a function (wires,
            depth) -> Circuit, whose inputs are 0.
        wires: At least two different numbers.
        depths: Numbers of layers.
        cost: The observable: "global" is Z of all wires multiplied, "local" Z of wire 0.
        samples: Random weights of each circuit.
        period: Weights are uniform on [0, period).
        seed: Of all draws; None takes torch's global generator.
        level: Of the intervals; that of a slope comes from the same resamples as those of its points.
        resamples: Of the bootstrap.

    Raises:
        ValueError: For an unknown cost, fewer than two numbers of wires, no depth, or a circuit without weights.

    Source: McClean et al. (arXiv:1803.11173); Cerezo et al., Cost function dependent barren plateaus
        (arXiv:2001.00550) for the two costs.
    """
    if cost not in COSTS:
        raise unknown("cost", cost, COSTS)
    for name, sizes in (("wires", wires), ("depths", depths)):
        if not is_list(sizes, is_whole):
            raise ValueError(f"{name} are {sizes!r}: give a list of whole numbers, such as (2, 3, 4)")
    wires, depths = tuple(wires), tuple(depths)
    if len(set(wires)) < 2 or not depths:
        raise ValueError(f"wires are {wires} and depths {depths}: a slope needs two numbers of wires and a depth")
    make: Build = (lambda n, d: ansatz(build, n, d)) if isinstance(build, str) else build
    generator = generator_of(seed)
    points, slopes = [], []
    for depth in depths:
        row = tuple(
            gradient_variance(
                make(count, depth).with_observables((COSTS[cost](count),)),
                samples=samples,
                period=period,
                seed=None if generator is None else int(torch.randint(2**62, (), generator=generator)),
                level=level,
                resamples=resamples,
            )
            for count in wires
        )
        value = float(_line(wires, np.array([point.value for point in row])))
        again = _line(wires, np.stack([point.resampled for point in row], axis=-1))
        low, high = np.quantile(again, [(1 - level) / 2, (1 + level) / 2])
        points.append(row)
        slopes.append(Slope(depth, value, float(low), float(high)))
    return Plateau(cost, wires, depths, tuple(points), tuple(slopes))
