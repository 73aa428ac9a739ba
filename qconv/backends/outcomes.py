"""What one measurement of several observables can give: joint outcomes, their probabilities, and shots drawn from them.

Observables that are measured together are read off the same bitstrings, so their errors are correlated as those of a
device are. What is drawn are counts: by conditional binomials where there are many shots an outcome, by outcomes one
after the other where there are few. Both are multinomial, exactly.

Source: Devroye, Non-Uniform Random Variate Generation, section XI.1.3, for conditional binomials.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from circuits.circuit import Circuit
from qconv.backends.protocol import Compiled, Real, Unsupported, measurement_settings

MAX_STRINGS = 2**12  # of one measurement setting, where probabilities are made of Pauli strings


@dataclass(frozen=True)
class Setting:
    """Observables measured together, and what their joint outcomes are.

    Args:
        basis: A Pauli string to measure every wire in; I where no observable cares.
        members: Indices of the observables.
        observables: The observables themselves.
    """

    basis: str
    members: tuple[int, ...]
    observables: tuple[str, ...]

    @staticmethod
    def of(observables: tuple[str, ...]) -> list[Setting]:
        """Every setting that the observables need."""
        return [
            Setting(basis, members, tuple(observables[k] for k in members))
            for basis, members in measurement_settings(observables)
        ]

    @cached_property
    def _masks(self) -> list[int]:
        """Wires whose bits multiply to each observable; wire 0 is the most significant bit."""
        return [int("".join("01"[letter != "I"] for letter in text), 2) for text in self.observables]

    @cached_property
    def generators(self) -> list[int]:
        """Masks of observables whose bits determine those of all: a basis over the field of two elements."""
        reduced: list[int] = []
        chosen = []
        for mask in self._masks:
            rest = mask
            for other in reduced:
                rest = min(rest, rest ^ other)
            if rest:
                reduced.append(rest)
                chosen.append(mask)
        return chosen

    @property
    def outcomes(self) -> int:
        """Number of joint outcomes: one bit for each generator, the first the most significant."""
        return int(2 ** len(self.generators))

    def _products(self) -> NDArray[np.int64]:
        """Mask of the product of every subset of generators: (outcomes,)."""
        masks = np.zeros(1, dtype=np.int64)
        for generator in self.generators:
            masks = (masks[:, None] ^ np.array([0, generator])).ravel()
        return masks

    @cached_property
    def strings(self) -> tuple[str, ...]:
        """Pauli strings of the products of subsets of generators, the empty one left out."""
        n = len(self.basis)
        return tuple(
            "".join(letter if bit == "1" else "I" for letter, bit in zip(self.basis, f"{mask:0{n}b}", strict=True))
            for mask in self._products()[1:].tolist()
        )

    @cached_property
    def signs(self) -> Real:
        """Values +1 or -1 of the observables in every joint outcome: (outcomes, members)."""
        subset_of = {mask: k for k, mask in enumerate(self._products().tolist())}
        subsets = np.array([subset_of[mask] for mask in self._masks])
        odd = np.bitwise_count(np.arange(self.outcomes)[:, None] & subsets) & 1
        return np.asarray(1.0 - 2.0 * odd, dtype=np.float64)

    @cached_property
    def outcome_of_bits(self) -> NDArray[np.int64]:
        """The joint outcome in which each bitstring of all wires results: (2^n,)."""
        bits = np.arange(2 ** len(self.basis))
        result = np.zeros_like(bits)
        for generator in self.generators:
            result = 2 * result + (np.bitwise_count(bits & generator) & 1)
        return result


class Distribution(Protocol):
    """Exact probabilities of the joint outcomes of measurement settings."""

    circuit: Circuit
    numbers: int  # that a (patch, filter) pair needs at a time

    def probabilities(self, inputs: Tensor, weights: Tensor) -> list[Tensor]:
        """For each setting (P, F, outcomes), to rounding: some may be slightly negative."""
        ...

    def counts(self, patches: int, filters: int) -> Counter[str]:
        """Operations of the simulation for so many patches and filters."""
        ...


class FromStrings:
    """Probabilities from expectation values: p(s) = 2^-r sum over subsets of generators of their sign in s times <P>.

    Args:
        circuit: The circuit.
        settings: Its measurement settings.
        compile_exact: Compiles a circuit exactly, noise included.
        name: Of the backend, for messages.
        numbers: That it keeps for a (patch, filter) pair besides.

    Raises:
        Unsupported: For settings with too many joint outcomes.
    """

    def __init__(
        self,
        circuit: Circuit,
        settings: Sequence[Setting],
        compile_exact: Callable[[Circuit], Compiled],
        name: str,
        numbers: int = 0,
    ) -> None:
        self.circuit, self._settings = circuit, settings
        outcomes = sum(setting.outcomes for setting in settings)
        self.numbers = outcomes + numbers
        if outcomes > MAX_STRINGS:
            raise Unsupported(
                f"backend {name!r} samples shots from the expectation values of all products of the observables, up to "
                f"{MAX_STRINGS:,}, but here are {outcomes:,}: use fewer observables, or "
                + ("backend 'qiskit'" if name == "statevector" else "backend 'statevector'")
            )
        strings = tuple(dict.fromkeys(text for setting in settings for text in setting.strings))
        place = {text: k for k, text in enumerate(strings)}
        self._places = [np.array([place[text] for text in setting.strings]) for setting in settings]
        self._compiled = compile_exact(circuit.with_observables(strings))

    def probabilities(self, inputs: Tensor, weights: Tensor) -> list[Tensor]:
        """See Distribution."""
        values = self._compiled(inputs, weights)
        result = []
        for places in self._places:
            own = values[..., torch.as_tensor(places, device=values.device)]
            own = torch.cat([torch.ones_like(own[..., :1]), own], dim=-1)
            result.append(walsh_hadamard(own) / own.shape[-1])
        return result

    def counts(self, patches: int, filters: int) -> Counter[str]:
        """See Distribution."""
        adds = sum(setting.outcomes * len(setting.generators) for setting in self._settings)
        return self._compiled.counts(patches, filters) + Counter({"add:fp32": patches * filters * adds})


def walsh_hadamard(values: Tensor) -> Tensor:
    """Sums over k of (-1)^|j & k| values[..., k], for every j: 2^r numbers in the last dimension."""
    shape = values.shape
    step = 1
    while step < shape[-1]:
        pairs = values.reshape(*shape[:-1], -1, 2, step)
        even, odd = pairs.unbind(-2)
        values = torch.stack([even + odd, even - odd], dim=-2).reshape(shape)
        step *= 2
    return values


def draw_values(probabilities: Tensor, signs: Real, shots: int, generator: torch.Generator | None) -> Tensor:
    """Means over shots of the observables of one setting.

    Args:
        probabilities: (..., outcomes); rounding errors below 0 are taken for 0, and rows are scaled to sum 1.
        signs: (outcomes, members), as Setting.signs.
        shots: Bitstrings a row.
        generator: None for torch's global one.

    Returns:
        (..., members), float64; NaN where a probability is not finite.
    """
    outcomes = probabilities.shape[-1]
    rows = probabilities.reshape(-1, outcomes).double().clamp(min=0)
    valid = rows.isfinite().all(1, keepdim=True)
    rows = torch.where(valid, rows, 1.0)
    table = torch.as_tensor(signs, device=rows.device)
    if shots < outcomes:
        drawn = torch.multinomial(rows, shots, replacement=True, generator=generator)
        values = table[drawn].mean(1)
    else:
        values = _multinomial(rows, shots, generator) @ table / shots
    return torch.where(valid, values, torch.nan).reshape(*probabilities.shape[:-1], -1)


def _multinomial(rows: Tensor, shots: int, generator: torch.Generator | None) -> Tensor:
    """Counts of every outcome, (R, 2^r), from weights of the same shape: halves of halves, each split binomially."""
    levels = [rows]
    while levels[-1].shape[1] > 1:
        # Bits are decided from the most significant on, so the last level is halved by neighbors.
        levels.append(levels[-1].reshape(len(rows), -1, 2).sum(-1))
    counts = rows.new_full((len(rows), 1), float(shots))
    for level, total in zip(levels[-2::-1], levels[:0:-1], strict=True):
        first = level.reshape(len(rows), -1, 2)[..., 0]
        share = torch.where(total > 0, first / torch.where(total > 0, total, 1.0), 0.0).clamp(max=1)
        ones = torch.binomial(counts, share, generator=generator)
        counts = torch.stack([ones, counts - ones], dim=-1).flatten(1)
    return counts
