"""Shallow product-encoded circuits as sums of products: the Heisenberg picture, contracted wire by wire.

An observable is pulled back through the circuit in the Pauli basis, where gates are sparse (pauli_steps.py). A sweep
over the wires keeps, for every choice of the labels of the gates that cross a cut (a bond), the sum over all histories
of the wires on one side of it. Only what can happen gets a sum, and observables share what they have in common; those
of a sweep from the left and of one from the right meet at a cut.

Source: Markov & Shi, SIAM J. Comput. 38, 963 (2008) for contraction wire by wire; Oseledets, SIAM J. Sci. Comput. 33,
2295 (2011) for tensor trains, of which this is one with sparse cores.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from circuits.circuit import Circuit
from qconv.backends.fourier import MAX_WIRES
from qconv.backends.pauli_ops import PauliOp
from qconv.backends.pauli_steps import Entries, Step, entries_of, gather, steps_of
from qconv.backends.protocol import Real, Unsupported
from qconv.backends.sums import ONE, Program, Scale, Sums, Term, TooMany, Value

# Bonds at a cut, and sums: up to MAX_WIRES, where all coefficients can be had instead, and beyond.
LIMITS = (2048, 100_000), (4096, 250_000)
# Gates across a cut, on average over cuts: with more a circuit is not shallow, and looking closer would take minutes.
MOST_CROSSINGS = 500
MOST_LABELS = 16  # of a bond, on average, where there are as many bonds as there may be

Bond = tuple[tuple[int, int], ...]  # (gate, label) of every gate that crosses a cut
Bonds = dict[Bond, Value]


@dataclass(frozen=True)
class _History:
    """An observable on one wire: its letter, and the steps from the readout to the encoding."""

    letter: int
    steps: tuple[Step, ...]


@dataclass
class _Sweep:
    """Sums of the wires on one side, for observables that share what they have in common.

    Args:
        bonds: For every state of the sweep its bonds; state 0 has no wires.
        known: State reached from a state by a wire's history.
    """

    bonds: list[Bonds] = field(default_factory=lambda: [{(): (1.0, ONE, ONE)}])
    known: dict[tuple[int, _History], int] = field(default_factory=dict)


# By the state of a sweep and a wire's history: the next state, and its bonds.
Checked = dict[tuple[int, _History], tuple[int, frozenset[Bond]]]


@dataclass(frozen=True)
class Contraction:
    """A circuit's observables as two programs.

    Args:
        weights: From weights to the coefficients of `patches`.
        constants: The coefficients of `weights`.
        patches: From features to the observables.
    """

    weights: Program
    constants: Real
    patches: Program


def contract(circuit: Circuit, encoders: list[list[PauliOp]], block: list[PauliOp]) -> Contraction:
    """Write a circuit's observables down as sums.

    Args:
        circuit: The circuit, with observables.
        encoders: For every wire its encoding, operations in order; see split_encoding.
        block: All other operations.

    Raises:
        Unsupported: If it takes too many bonds at a cut or too many sums; see LIMITS.
    """
    wires = circuit.n_wires
    bonds, most = LIMITS[wires > MAX_WIRES]
    crossings = sum(abs(op.wires[0] - op.wires[-1]) for op in block) // max(wires - 1, 1)
    if crossings > MOST_CROSSINGS:
        raise Unsupported(
            f"contracting a kernel wire by wire takes up to {MOST_CROSSINGS} gates between neighboring wires but here "
            f"are {crossings} on average, on {wires} wires: use fewer layers or wires, or backend 'statevector'"
        )
    factors = Sums(most)
    sums = Sums(most, factors)
    try:
        values = _Builder(bonds, factors, sums).values(circuit, encoders, block)
    except TooMany:
        others = "'fourier' with all coefficients, or 'statevector'" if wires <= MAX_WIRES else "'statevector'"
        raise Unsupported(
            f"contracting this kernel wire by wire takes more than {bonds} bonds between its {wires} wires or {most} "
            f"sums a patch: use fewer layers, or backend {others}"
        ) from None
    patches, coefficients = sums.program([sums.keep(value) for value in values])
    weights, constants = factors.program([factors.keep((number, ONE, factor)) for number, factor in coefficients])
    return Contraction(weights, np.array([number for number, _ in constants]), patches)


def _following(step: Step, wire: int, from_left: bool, bond: Bond, digit: int) -> list[tuple[Bond, int, int, Scale]]:
    """What can follow a bond and a digit at a step: bonds, and the step's transitions."""
    if step.partner is None:
        return [(bond, *way) for way in step.transitions.get(digit, ())]
    if (step.partner < wire) == from_left:
        # The other end was there first: it has chosen the label.
        (label,) = (own for gate, own in bond if gate == step.gate)
        rest = tuple(pair for pair in bond if pair[0] != step.gate)
        return [(rest, *way) for way in step.labeled.get((digit, label), ())]
    return [((*bond, (step.gate, way[1])), *way) for way in step.transitions.get(digit, ())]


class _Builder:
    """Builds the sums of a circuit.

    Args:
        most_bonds: At a cut; TooMany is raised beyond.
        factors: Sums of weights.
        sums: Sums of features, with those factors.
    """

    def __init__(self, most_bonds: int, factors: Sums, sums: Sums) -> None:
        self._most_bonds, self._factors, self._sums = most_bonds, factors, sums

    def values(self, circuit: Circuit, encoders: list[list[PauliOp]], block: list[PauliOp]) -> list[Value | None]:
        """Every observable's sum; see contract."""
        self._features = [self._encoded(ops) for ops in encoders]
        self._gates = gather(block, self._factors)
        self._take_in_last_rotations()
        self._live = self._live_digits()
        self._steps: dict[tuple[object, ...], tuple[Step, ...]] = {}
        left, right = _Sweep(), _Sweep()
        pulled = [self._pull_back(observable) for observable in circuit.observables]
        from_left: Checked = {}
        from_right: Checked = {}
        for _, histories in pulled:
            wires = list(enumerate(histories))
            self._check(from_left, wires, True)
            self._check(from_right, wires[::-1], False)
        sides = []
        for _, histories in pulled:
            wires = list(enumerate(histories))
            own = self._swept(left, wires, True), self._swept(right, wires[::-1], False)[::-1]
            sides.append(list(zip(*own, strict=True)))
        return self._meet([factor for factor, _ in pulled], sides)

    def _encoded(self, ops: list[PauliOp]) -> dict[int, Value]:
        """The digits of a wire after its encoding, which starts from (1, 0, 0, 1)."""
        digits: dict[int, Value] = {0: (1.0, ONE, ONE), 3: (1.0, ONE, ONE)}
        for op in ops:
            digits = self._turned(entries_of(op, self._sums), digits, inputs=True)
        return digits

    def _turned(self, entries: Entries, digits: dict[int, Value], inputs: bool) -> dict[int, Value]:
        """A matrix that depends on inputs, or on weights, times digits."""
        terms = defaultdict(list)
        for ((row,), (column,)), (number, factor) in entries.items():
            if column in digits:
                n, f, place = digits[column]
                scale, other = ((number * n, f), factor) if inputs else (self._times((number, factor), (n, f)), ONE)
                terms[row].append((*scale, place, other))
        return self._added(terms)

    def _times(self, one: Scale, other: Scale) -> Scale:
        return self._factors.times(one, other)

    def _added(self, terms: dict[Any, list[Term]]) -> dict[Any, Value]:
        if len(terms) > 4 * self._most_bonds:
            raise TooMany
        values = {key: self._sums.add(own) for key, own in terms.items()}
        return {key: value for key, value in values.items() if value is not None}

    def _take_in_last_rotations(self) -> None:
        """A gate on one wire with nothing between it and the encoding is the same for all observables and bonds."""
        last = {wire: number for number, gate in enumerate(self._gates) for wire in gate.wires}
        taken = {number for number in last.values() if len(self._gates[number].wires) == 1}
        for number in taken:
            (wire,) = self._gates[number].wires
            self._features[wire] = self._turned(self._gates[number].entries, self._features[wire], inputs=False)
        self._gates = [gate for number, gate in enumerate(self._gates) if number not in taken]

    def _live_digits(self) -> list[list[set[int]]]:
        """Digits after each gate from which the encoding can be reached."""
        live = [set(features) for features in self._features]
        result = []
        for gate in reversed(self._gates):
            after = [live[wire] for wire in gate.wires]
            result.append(after)
            rows = [row for row, _ in gate.between(None, after)]
            for k, wire in enumerate(gate.wires):
                live[wire] = {row[k] for row in rows}
        return result[::-1]

    def _pull_back(self, observable: str) -> tuple[float, list[_History]]:
        """What happens to an observable on every wire, and a number it is multiplied with."""
        letters = ["IXYZ".index(letter) for letter in observable]
        digits = [{letter} for letter in letters]
        steps: list[list[Step]] = [[] for _ in letters]
        factor = 1.0
        for number, gate in enumerate(self._gates):
            before = [digits[wire] for wire in gate.wires]
            if not any(steps[wire] for wire in gate.wires):
                # Clifford gates, and all that acts outside the light cone, only change the Pauli string.
                entries = list(gate.between(before, None).items())
                if len(entries) == 1 and entries[0][1][1] == ONE:
                    (((_, column), (change, _)),) = entries
                    factor *= change
                    for wire, letter in zip(gate.wires, column, strict=True):
                        letters[wire], digits[wire] = letter, {letter}
                    continue
            key = number, *map(frozenset, before)
            if key not in self._steps:
                # Equal steps are one object: observables are compared by them.
                self._steps[key] = steps_of(number, gate, before, self._live[number])
            for wire, step in zip(gate.wires, self._steps[key], strict=True):
                steps[wire].append(step)
                digits[wire] = step.digits()
        return factor, [_History(letter, tuple(own)) for letter, own in zip(letters, steps, strict=True)]

    def _swept(self, sweep: _Sweep, wires: list[tuple[int, _History]], from_left: bool) -> list[Bonds]:
        """The bonds after 0, 1, ... wires."""
        state, result = 0, [sweep.bonds[0]]
        for wire, history in wires:
            key = state, history
            if key not in sweep.known:
                sweep.bonds.append(self._through(result[-1], wire, history, from_left))
                sweep.known[key] = len(sweep.bonds) - 1
            state = sweep.known[key]
            result.append(sweep.bonds[state])
        return result

    def _through(self, bonds: Bonds, wire: int, history: _History, from_left: bool) -> Bonds:
        """Take one more wire in."""
        table = {(bond, history.letter): value for bond, value in bonds.items()}
        for step in history.steps:
            terms = defaultdict(list)
            for (bond, digit), (number, factor, place) in table.items():
                for new, after, _, scale in _following(step, wire, from_left, bond, digit):
                    terms[new, after].append((*self._times((number, factor), scale), place, ONE))
            table = self._added(terms)
        ends = defaultdict(list)
        for (bond, digit), (number, factor, place) in table.items():
            if digit in self._features[wire]:
                n, f, feature = self._features[wire][digit]
                # Sorted, since from the other side they come in another order.
                ends[tuple(sorted(bond))].append((*self._times((number, factor), (n, f)), place, feature))
        if len(ends) > self._most_bonds:
            raise TooMany
        return self._added(ends)

    def _check(self, known: Checked, wires: list[tuple[int, _History]], from_left: bool) -> None:
        """Raise TooMany if a sweep's bonds are too many, without their sums: that takes a fraction of the time."""
        state, bonds = 0, frozenset[Bond]({()})
        for wire, history in wires:
            if (state, history) not in known:
                known[state, history] = len(known) + 1, self._reached(bonds, wire, history, from_left)
            state, bonds = known[state, history]

    def _reached(self, bonds: frozenset[Bond], wire: int, history: _History, from_left: bool) -> frozenset[Bond]:
        """The bonds after one more wire, or a few more than those whose sums are not 0."""
        table = {(bond, history.letter) for bond in bonds}
        for step in history.steps:
            reached: set[tuple[Bond, int]] = set()
            labels = 0
            for bond, digit in table:
                reached.update(way[:2] for way in _following(step, wire, from_left, bond, digit))
                labels += len(bond)
                if len(reached) > 4 * self._most_bonds or labels > 4 * self._most_bonds * MOST_LABELS:
                    raise TooMany
            table = reached
        ends = frozenset(tuple(sorted(bond)) for bond, digit in table if digit in self._features[wire])
        if len(ends) > self._most_bonds:
            raise TooMany
        return ends

    def _meet(self, factors: list[float], sides: list[list[tuple[Bonds, Bonds]]]) -> list[Value | None]:
        """Join the two sides of every observable at the cut where it needs the fewest terms of its own."""
        common = [[left.keys() & right.keys() for left, right in cuts] for cuts in sides]
        needs = [
            [
                self._sums.needed(side[bond][2] for bond in bonds for side in cut)
                for cut, bonds in zip(cuts, both, strict=True)
            ]
            for cuts, both in zip(sides, common, strict=True)
        ]
        used: Counter[int] = Counter()
        chosen = [0] * len(sides)
        for again in (False, True):
            for k, own in enumerate(needs):
                if again:
                    used.subtract(own[chosen[k]])
                costs = [
                    len(bonds) + sum(self._sums.cost(place) for place in need if not used[place])
                    for bonds, need in zip(common[k], own, strict=True)
                ]
                chosen[k] = int(np.argmin(costs))
                used.update(own[chosen[k]])
        result = []
        for factor, cuts, both, cut in zip(factors, sides, common, chosen, strict=True):
            left, right = cuts[cut]
            terms = []
            for bond in sorted(both[cut]):
                (n, f, a), (m, g, b) = left[bond], right[bond]
                terms.append((*self._times((factor * n, f), (m, g)), a, b))
            result.append(self._sums.add(terms))
        return result
