"""Fourier spectrum: which waves of its inputs a kernel's outputs are made of."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qconv.diagnostics.states import (
    PERIOD,
    Kernel,
    at_least,
    check_numbers,
    circuit_of,
    generator_of,
    positive,
    readout_of,
)
from qconv.fourier_conv import MAX_COEFFICIENTS, Spectrum
from qconv.layers import QuantumConv2d
from qconv.reading import read_out
from qconv.surrogates import spectrum_of, surrogate

Real = NDArray[np.float64]
COEFFICIENTS_A_CALL = 2**20


@dataclass(frozen=True)
class FourierSpectrum:
    """Mean squares of the coefficients of f(x) = sum_k c_k exp(i sum_j k_j w_j x_j), k_j from -L_j to L_j.

    Args:
        spectrum: L_j and w_j of each input, as the circuit's gates alone allow them.
        power: Mean |c_k|^2 over outputs and weights; index k_j + L_j on axis j.
        samples: Weights that were averaged.
    """

    spectrum: Spectrum
    power: Real = field(repr=False)
    samples: int

    def accessible(self) -> int:
        """Frequencies that the gates allow, 0 included, k and -k counted once."""
        return (self.power.size + 1) // 2

    def present(self, tolerance: float = 1e-10) -> int:
        """Frequencies whose root mean square coefficient is above `tolerance`, counted as in `accessible`."""
        half = self.power.ravel()[: self.accessible()]
        return int((np.sqrt(half) > tolerance).sum())

    def by_input(self) -> list[Real]:
        """For each input j the power at |k_j| = 0 .. L_j, all other inputs' frequencies summed."""
        result = []
        for axis, degree in enumerate(self.spectrum.degrees):
            line = self.power.sum(tuple(k for k in range(self.power.ndim) if k != axis))
            result.append(np.append(line[degree], line[degree + 1 :] + line[:degree][::-1]))
        return result

    @property
    def degrees(self) -> NDArray[np.int64]:
        """sum_j |k_j| of every frequency, in the shape of `power`."""
        parts = [np.abs(np.arange(-degree, degree + 1)) for degree in self.spectrum.degrees]
        return sum(np.ix_(*parts), np.zeros(self.power.shape, int))

    def by_degree(self) -> Real:
        """The power of all frequencies with sum_j |k_j| = 0 (the constant), 1, ..."""
        result: Real = np.bincount(self.degrees.ravel(), self.power.ravel()).astype(float)
        return result


def fourier_spectrum(
    kernel: Kernel,
    weights: Tensor | None = None,
    *,
    samples: int = 100,
    period: float = PERIOD,
    seed: int | None = None,
) -> FourierSpectrum:
    """The frequencies that a kernel's encoding allows, and how much of each its outputs have.

    Args:
        kernel: A circuit that reads its inputs by rotations; or a layer, with its noise and readout. Where a layer's
            channels run separately, the spectrum is that of one channel's part of the sum.
        weights: (F, n_weights) whose spectra are averaged. None: a layer's own, and `samples` random ones of a
            circuit.
        samples: Random weights, where they are drawn.
        period: Random weights are uniform on [0, period).
        seed: Of random weights; None takes torch's global generator.

    Raises:
        Unsupported: For an amplitude encoding, which is no polynomial.
        ValueError: For a circuit without inputs or observables, more than 2^16 coefficients, weights that do not fit,
            or readout "most_likely_ones".

    Source: Schuld, Sweke & Meyer, Effect of data encoding on the expressive power of variational quantum machine
        learning models (arXiv:2008.08605).
    """
    circuit, readout = circuit_of(kernel, noisy=True), readout_of(kernel)
    noise = kernel.noise if isinstance(kernel, QuantumConv2d) else None
    positive("period", period)
    spectrum = spectrum_of(circuit)
    points = prod(spectrum.sizes)
    if points > MAX_COEFFICIENTS:
        raise ValueError(
            f"circuit has {points} frequencies (degrees {spectrum.degrees}) but up to {MAX_COEFFICIENTS} are listed: "
            "use fewer inputs or fewer uploads"
        )
    if weights is None and isinstance(kernel, QuantumConv2d):
        weights = kernel.weight.detach()
    if weights is None:
        at_least("samples", samples, 1)
        drawn = torch.rand(samples, circuit.n_weights, dtype=torch.float64, generator=generator_of(seed))
        weights = period * drawn
    check_numbers("weights", weights)
    if weights.ndim != 2 or not len(weights):
        raise ValueError(
            f"weights have shape {tuple(weights.shape)}: give (filters, {circuit.n_weights}), at least one filter"
        )
    power = np.zeros(spectrum.sizes)
    outputs = len(circuit.observables) if readout is None else readout.outputs
    step = max(1, COEFFICIENTS_A_CALL // (points * len(circuit.observables) or 1))
    for part in torch.split(weights.double().cpu(), step):
        # State vectors have no noise.
        exact = surrogate(circuit, part, "statevector" if noise is None else "auto", noise=noise).coefficients
        if readout is not None:
            exact = read_out(readout, exact, only_first=True)
        real = exact.reshape(-1, *spectrum.sizes)
        power += _complex(real, spectrum).abs().square().sum(0).numpy()
    return FourierSpectrum(spectrum, power / (len(weights) * outputs), len(weights))


def _complex(coefficients: Tensor, spectrum: Spectrum) -> Tensor:
    """Coefficients of 1, sin, cos, sin 2 ... on each axis -> those of exp(i k w x), k = -L .. L."""
    result = coefficients.to(torch.complex128)
    for axis, degree in enumerate(spectrum.degrees, start=1):
        turn = torch.zeros(2 * degree + 1, 2 * degree + 1, dtype=torch.complex128)
        turn[degree, 0] = 1
        for k in range(1, degree + 1):
            # a sin + b cos = (b - i a)/2 exp(ik) + (b + i a)/2 exp(-ik)
            turn[degree + k, 2 * k - 1 : 2 * k + 1] = torch.tensor([-0.5j, 0.5])
            turn[degree - k, 2 * k - 1 : 2 * k + 1] = torch.tensor([0.5j, 0.5])
        result = (result.movedim(axis, -1) @ turn.T).movedim(-1, axis)
    return result
