"""States as matrix products: a tensor a wire, linked by bonds that carry the entanglement between them.

A chain is kept in canonical form around a center, where singular values are the Schmidt coefficients of the state, so
what a truncation drops is known exactly. Gates on wires that are apart swap their way together; wires are not moved
back. Everything is done for a batch of states at once.

Source: Vidal, Efficient classical simulation of slightly entangled quantum computations (arXiv:quant-ph/0301063);
    Schollwöck, The density-matrix renormalization group in the age of matrix product states (arXiv:1008.3477).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import sin, sqrt

import torch
from torch import Tensor

from qconv.backends.protocol import Composed

# Amplitudes of a state of norm 1 that are 0: rounding errors of rounding errors, whose squares would underflow inside a
# decomposition.
TINY = 1e-32


@dataclass(frozen=True)
class Truncation:
    """What was lost by cutting bonds, the worst of all circuits of a call: of each on its own, before their values
    are extrapolated or otherwise combined.

    Every cut turns the state by an angle arcsin(sqrt(w)), with w the weight that it discards. Such angles are a metric
    on states, which gates do not change, so the whole error is at most their sum.

    Args:
        discarded: Sum of the discarded weights, squares of Schmidt coefficients of states of norm 1.
        angle: Sum of the angles, in radians: a bound on that between the exact state and the one that was measured.
        max_bond: Largest bond that was kept.
    """

    discarded: float = 0.0
    angle: float = 0.0
    max_bond: int | None = None

    @property
    def fidelity(self) -> float:
        """A lower bound of |<exact|measured>|^2."""
        return 1 - self.value_error**2 / 4 if self.angle < torch.pi / 2 else 0.0

    @property
    def value_error(self) -> float:
        """An upper bound of the error of any expectation value of a Pauli string: 2 sin(angle)."""
        return 2 * sin(min(self.angle, torch.pi / 2))

    @staticmethod
    def worst(found: Iterable[Truncation | None]) -> Truncation | None:
        """Of several evaluations, None for those that cannot lose anything; None if there is no other."""
        known = [one for one in found if one is not None]
        if not known:
            return None
        return Truncation(
            max(one.discarded for one in known),
            max(one.angle for one in known),
            max((one.max_bond for one in known if one.max_bond is not None), default=None),
        )

    def __str__(self) -> str:
        bond = "" if self.max_bond is None else f", bonds up to {self.max_bond}"
        return (
            f"discarded weight {self.discarded:.3g}, fidelity at least {self.fidelity:.6g}, values within "
            f"{self.value_error:.3g}{bond}"
        )


def truncation_of(compiled: object) -> Truncation | None:
    """What the last evaluation of a compiled circuit lost; None where it cannot lose anything, or did not run yet."""
    found: Truncation | None = getattr(compiled, "truncation_error", None)
    if found is None and isinstance(compiled, Composed):
        return Truncation.worst(truncation_of(part) for _, part in compiled.parts)
    return found


def approximation_of(compiled: object) -> str:
    """What a simulator of others truncates without telling what that lost, in words; empty where it does not."""
    found = str(getattr(compiled, "approximation", ""))
    if not found and isinstance(compiled, Composed):
        return next(filter(None, (approximation_of(part) for _, part in compiled.parts)), "")
    return found


class Chain:
    """A batch of states of a chain of wires, all |0> at first; complex128, since what is discarded may be small.

    Args:
        rows: States.
        n_wires: Wires.
        device: As of torch.
        max_bond: Largest bond; None for any.
        cutoff: Weight that one cut may discard; what is smaller than rounding errors always goes.

    Attributes:
        sites: Tensors (rows, left bond, 2, right bond), by place.
        order: Wires by place.
        discarded: Weight discarded so far, (rows,).
        angle: See Truncation, (rows,).
    """

    def __init__(
        self,
        rows: int,
        n_wires: int,
        device: torch.device,
        max_bond: int | None = None,
        cutoff: float = 0.0,
    ) -> None:
        ground = torch.zeros(rows, 1, 2, 1, dtype=torch.complex128, device=device)
        ground[:, 0, 0, 0] = 1
        self.sites: list[Tensor] = [ground] * n_wires
        self.order = list(range(n_wires))
        self.discarded = torch.zeros(rows, dtype=torch.float64, device=device)
        self.angle = torch.zeros_like(self.discarded)
        self._center = 0
        self._max_bond, self._cutoff = max_bond, cutoff

    @property
    def bond(self) -> int:
        """The largest bond."""
        return max(site.shape[-1] for site in self.sites)

    def prepare(self, amplitudes: Tensor) -> None:
        """Take the state of given amplitudes (rows, 2^n), in the order of the wires."""
        rows, n = len(amplitudes), len(self.sites)
        self.order = list(range(n))
        rest = amplitudes.reshape(rows, 1, -1)
        for place in range(n - 1):
            left, bond = rest.shape[1], rest.shape[2] // 2
            isometry, rest = self._split(rest.reshape(rows, 2 * left, bond))
            self.sites[place] = isometry.reshape(rows, left, 2, -1)
        self.sites[-1] = rest.reshape(rows, -1, 2, 1)
        self._center = n - 1

    def apply(self, matrix: Tensor, wires: Sequence[int]) -> None:
        """Apply a unitary (rows or 1, d, d) on one or two wires."""
        if len(wires) == 1:
            place = self.order.index(wires[0])
            self.sites[place] = torch.einsum("...ij,...ajb->...aib", matrix, self.sites[place])
            return
        a, b = (self.order.index(wire) for wire in wires)
        while abs(a - b) > 1:
            # The one further right comes nearer.
            place = max(a, b) - 1
            self._pair(place, None)
            self.order[place], self.order[place + 1] = self.order[place + 1], self.order[place]
            a, b = (self.order.index(wire) for wire in wires)
        gate = matrix.reshape(-1, 2, 2, 2, 2)
        self._pair(min(a, b), gate if a < b else gate.permute(0, 2, 1, 4, 3))

    def _pair(self, place: int, gate: Tensor | None) -> None:
        """Apply a gate (rows or 1, 2, 2, 2, 2) to a place and the next one; None swaps them."""
        self.center_at(place if self._center <= place else place + 1)
        pair = torch.einsum("raib,rbjc->raijc", self.sites[place], self.sites[place + 1])
        pair = pair.transpose(2, 3) if gate is None else torch.einsum("...ijkl,...aklc->...aijc", gate, pair)
        rows, left, _, _, right = pair.shape
        isometry, rest = self._split(pair.reshape(rows, 2 * left, 2 * right))
        self.sites[place] = isometry.reshape(rows, left, 2, -1)
        self.sites[place + 1] = rest.reshape(rows, -1, 2, right)
        self._center = place + 1

    def _split(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """A matrix as an isometry and the rest, truncated and of norm 1."""
        left, values, right = torch.linalg.svd(_flushed(matrix), full_matrices=False)
        weights = values.square()
        weights = weights / weights.sum(1, keepdim=True)
        # What is discarded where values up to the k-th are kept; summed from the smallest, which rounding would hide.
        tails = weights.flip(1).cumsum(1).flip(1).roll(-1, 1)
        tails[:, -1] = 0
        rounding = torch.finfo(values.dtype).eps
        enough = tails <= max(self._cutoff, rounding * rounding * values.shape[1])
        places = torch.arange(values.shape[1], device=values.device)
        # Each row by its own: what it gives must not depend on the rows beside it.
        ranks = enough.int().argmax(1) + 1
        if self._max_bond is not None:
            ranks = ranks.clamp(max=self._max_bond)
        kept = places < ranks[:, None]
        lost = torch.where(kept, 0.0, weights).sum(1)
        self.discarded += lost
        self.angle += lost.clamp(max=1).sqrt().arcsin()
        bond = int(ranks.max()) if len(ranks) else 1
        values = torch.where(kept, values, 0.0)[:, :bond]
        values = values / torch.linalg.vector_norm(values, dim=1, keepdim=True)
        return left[:, :, :bond], values[..., None] * right[:, :bond]

    def center_at(self, place: int) -> None:
        """Move the center of the canonical form."""
        while self._center != place:
            here = self._center
            site = self.sites[here]
            rows, left, _, right = site.shape
            if here < place:
                isometry, rest = torch.linalg.qr(_flushed(site.reshape(rows, 2 * left, right)))
                self.sites[here] = isometry.reshape(rows, left, 2, -1)
                self.sites[here + 1] = torch.einsum("rab,rbic->raic", rest, self.sites[here + 1])
                self._center += 1
            else:
                isometry, rest = torch.linalg.qr(_flushed(site.reshape(rows, left, 2 * right).mH))
                self.sites[here] = isometry.mH.reshape(rows, -1, 2, right)
                self.sites[here - 1] = torch.einsum("raib,rbc->raic", self.sites[here - 1], rest.mH)
                self._center -= 1

    def expectations(self, observables: Sequence[str]) -> Tensor:
        """Expectation values of Pauli strings, (rows, n_obs), real."""
        befores, afters = self._environments()
        norm = befores[-1][:, 0, 0].real
        values = []
        for observable in observables:
            support = [place for place, wire in enumerate(self.order) if observable[wire] != "I"]
            carried = befores[support[0]]
            for place in range(support[0], support[-1] + 1):
                site = self.sites[place]
                carried = _carry(carried, site, pauli_on(site, observable[self.order[place]]))
            values.append(torch.einsum("rab,rab->r", carried, afters[support[-1] + 1]).real / norm)
        return torch.stack(values, dim=-1)

    def _environments(self) -> tuple[list[Tensor], list[Tensor]]:
        """<psi|psi> contracted over the places before each cut, and over those behind it: (rows, bond, bond)."""
        one = self.sites[0].new_ones(len(self.sites[0]), 1, 1)
        befores, afters = [one], [one]
        for site in self.sites:
            befores.append(_carry(befores[-1], site, site))
        for site in reversed(self.sites):
            afters.append(torch.einsum("raic,rbid,rcd->rab", site.conj(), site, afters[-1]))
        return befores, afters[::-1]

    def sample(self, basis: str, shots: int, generator: torch.Generator | None) -> Tensor:
        """Measured bits (rows, shots, n_wires), int8, each wire in the basis of its letter (I is Z).

        Bits are drawn one after another from their exact conditional probabilities.

        Source: Ferris & Vidal, Perfect sampling with unitary tensor networks (arXiv:1201.3974).
        """
        self.center_at(0)
        rows = len(self.sites[0])
        drawn = self.sites[0].new_ones(rows, shots, 1)
        bits = torch.zeros(rows, shots, len(self.order), dtype=torch.int8, device=drawn.device)
        for wire, site in zip(self.order, self.sites, strict=True):
            turned = torch.einsum("ij,rajb->raib", _to_z(basis[wire], site), site)
            both = torch.einsum("rsa,raib->rsib", drawn, turned)
            weights = both.real.square().sum(-1) + both.imag.square().sum(-1)
            chance = weights[..., 1] / weights.sum(-1)
            found = torch.rand(chance.shape, generator=generator, dtype=chance.dtype, device=chance.device) < chance
            bits[..., wire] = found
            drawn = torch.where(found[..., None], both[..., 1, :], both[..., 0, :])
            drawn = drawn / torch.linalg.vector_norm(drawn, dim=-1, keepdim=True)
        return bits


def _carry(carried: Tensor, bra: Tensor, ket: Tensor) -> Tensor:
    half = torch.einsum("rab,rbid->raid", carried, ket)
    return torch.einsum("raic,raid->rcd", bra.conj(), half)


def _flushed(matrix: Tensor) -> Tensor:
    return matrix.masked_fill(matrix.abs() < TINY, 0)


def pauli_on(site: Tensor, letter: str) -> Tensor:
    """A Pauli matrix on a site's wire."""
    if letter == "I":
        return site
    zero, one = site.unbind(2)
    if letter == "Z":
        return torch.stack([zero, -one], dim=2)
    return torch.stack([one, zero] if letter == "X" else [-1j * one, 1j * zero], dim=2)


def _to_z(letter: str, like: Tensor) -> Tensor:
    rows = {"X": [[1, 1], [1, -1]], "Y": [[1, -1j], [1, 1j]]}
    if letter not in rows:
        return torch.eye(2, dtype=like.dtype, device=like.device)
    return torch.tensor(rows[letter], dtype=like.dtype, device=like.device) * sqrt(0.5)
