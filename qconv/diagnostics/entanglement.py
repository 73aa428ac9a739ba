"""Entangling capability: how entangled the states of a kernel are on average."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from statistics import NormalDist

import torch
from torch import Tensor

from qconv.diagnostics.states import (
    PERIOD,
    Kernel,
    at_least,
    check_level,
    circuit_of,
    draw,
    generator_of,
    parts,
    patches_of,
    states,
)

# Squared norms of states in single precision are nearer to 1 than that.
_UNNORMALIZED = 1e-4


@dataclass(frozen=True)
class EntanglingCapability:
    """Mean Meyer-Wallach measure of a kernel's states, from 0 (products) to 1.

    Args:
        value: The mean over random weights.
        low: Lower end of its interval.
        high: Upper end.
        level: Of the interval.
        deviation: Standard deviation of the measure over the weights.
        samples: Random weights.
        wires: Of the kernel.
    """

    value: float
    low: float
    high: float
    level: float
    deviation: float
    samples: int
    wires: int

    @property
    def haar(self) -> float:
        """The mean over Haar-random states of as many wires, (N - 2) / (N + 1) with N = 2^wires.

        Source: Meyer & Wallach, Global entanglement in multiparticle systems (arXiv:quant-ph/0108104).
        """
        size = 2.0**self.wires
        return (size - 2) / (size + 1)


def one_wire_matrices(state: Tensor) -> Tensor:
    """Reduced density matrices of single wires: (B, 2^n) amplitudes -> (B, n, 2, 2)."""
    wires = state.shape[-1].bit_length() - 1
    matrices = []
    for wire in range(wires):
        split = state.reshape(len(state), 2**wire, 2, -1)
        matrices.append(torch.einsum("bish,bith->bst", split, split.conj()))
    return torch.stack(matrices, dim=1)


def meyer_wallach(state: Tensor) -> Tensor:
    """Q = 2 (1 - (1/n) sum_k Tr rho_k^2) of normalized states: (B, 2^n) amplitudes -> (B,), in [0, 1].

    Raises:
        ValueError: For another shape, or states that are not normalized.

    Source: Brennen, An observable measure of entanglement for pure states of multi-qubit systems
        (arXiv:quant-ph/0305094); equal to the measure of Meyer & Wallach (arXiv:quant-ph/0108104).
    """
    if not isinstance(state, Tensor) or state.ndim != 2 or state.shape[1] < 2 or state.shape[1].bit_count() != 1:
        given = f"has shape {tuple(state.shape)}" if isinstance(state, Tensor) else f"is a {type(state).__name__}"
        raise ValueError(f"state {given}: give a torch.Tensor (states, 2^n) of the amplitudes of n wires, at least 1")
    norms = state.detach().abs().square().sum(-1)
    if not ((norms - 1).abs() < _UNNORMALIZED).all():
        wrong = norms[int(((norms - 1).abs() < _UNNORMALIZED).int().argmin())]
        raise ValueError(f"a state has the squared norm {float(wrong):.6g}: divide states by their norms")
    purities = one_wire_matrices(state).abs().square().sum((-2, -1))
    return 2 * (1 - purities.mean(-1))


def entangling_capability(
    kernel: Kernel,
    data: Tensor | None = None,
    *,
    samples: int = 5000,
    period: float = PERIOD,
    seed: int | None = None,
    level: float = 0.95,
) -> EntanglingCapability:
    """The mean Meyer-Wallach measure of the states that random weights make.

    Args:
        kernel: A circuit or a layer.
        data: Patches or images, see `states.patches_of`; each sample takes one at random.
        samples: Random weights.
        period: Weights are uniform on [0, period).
        seed: Of all draws; None takes torch's global generator.
        level: Of the interval (normal, from the standard error).

    Raises:
        ValueError: For data that do not fit, a layer with noise, or numbers out of range.

    Source: Sim, Johnson & Aspuru-Guzik (arXiv:1905.10876).
    """
    at_least("samples", samples, 2)
    check_level(level)
    circuit = circuit_of(kernel)
    inputs, weights = draw(circuit, patches_of(kernel, data), samples, period, generator_of(seed))
    with torch.no_grad():
        measured = [meyer_wallach(states(circuit, inputs[k], weights[k])) for k in parts(circuit, samples)]
    values = torch.cat(measured)
    # Rounding may leave a product's measure below 0.
    mean, deviation = max(float(values.mean()), 0.0), float(values.std())
    half = NormalDist().inv_cdf((1 + level) / 2) * deviation / sqrt(samples)
    # No mean of numbers in [0, 1] lies outside.
    low, high = max(mean - half, 0.0), min(mean + half, 1.0)
    return EntanglingCapability(mean, low, high, level, deviation, samples, circuit.n_wires)
