"""Gates in the Pauli basis, and what they do to each of their wires.

An observable is pulled back through a circuit digit by digit: between any two gates a wire has one of four digits,
(1, X, Y, Z). Gates are sparse there. A CNOT sends every pair of digits to one pair, a rotation mixes two. One wire of
a gate knows of the other by a label alone, which tells what happens there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product

import numpy as np

from qconv.backends.pauli_ops import PauliOp
from qconv.backends.protocol import Real
from qconv.backends.sums import DIGITS, ONE, ZERO, Scale, Sums, Term

Digits = tuple[int, ...]  # one for each wire of a gate
Entries = dict[tuple[Digits, Digits], Scale]  # of a transfer matrix, those that are not zero
Transition = tuple[int, int, Scale]  # digit after, label, coefficient
Transitions = dict[int, list[Transition]]  # for each digit what can follow


def entries_of(op: PauliOp, sums: Sums) -> Entries:
    """An operation's transfer matrix, its sines and cosines as members of a list."""
    angle = op.angle
    even, cosine, sine = op.parts
    if angle is None or angle.source == "const":
        turn = 0.0 if angle is None else angle.offset
        matrix = even + np.cos(turn) * cosine + np.sin(turn) * sine
        return {place: (float(matrix[at]), ONE) for place, at in _places(matrix)}
    factors = (ONE, *sums.wave((angle.index, angle.scale, angle.offset)))
    result: Entries = {}
    for place, at in _places(np.abs(even) + np.abs(sine) + np.abs(cosine)):
        parts = (float(part[at]) for part in (even, sine, cosine))
        value = sums.add([(number, ONE, wave, ONE) for number, wave in zip(parts, factors, strict=True)])
        if value is not None:
            result[place] = value[0], value[2]
    return result


def _places(matrix: Real) -> Iterator[tuple[tuple[Digits, Digits], tuple[int, int]]]:
    """Digits and indices of the entries of a transfer matrix that are not zero."""
    digits = list(product(range(4), repeat=2 if len(matrix) == 16 else 1))
    return (((digits[i], digits[j]), (i, j)) for i, j in np.argwhere(np.abs(matrix) > ZERO).tolist())


def _after(one: Entries, other: Entries, sums: Sums) -> Entries:
    """The product of two transfer matrices."""
    rows = defaultdict(list)
    for (row, column), scale in other.items():
        rows[row].append((column, scale))
    terms: dict[tuple[Digits, Digits], list[Term]] = defaultdict(list)
    for (row, between), (number, factor) in one.items():
        for column, (n, f) in rows[between]:
            terms[row, column].append((number * n, ONE, factor, f))
    values = {place: sums.add(own) for place, own in terms.items()}
    return {place: (value[0], value[2]) for place, value in values.items() if value is not None}


@dataclass(frozen=True)
class Gate:
    """Operations on the same one or two wires, with nothing in between, as one transfer matrix.

    Args:
        wires: In ascending order.
        entries: Of row vectors times it: digits nearer to the readout, digits nearer to the encoding.
    """

    wires: tuple[int, ...]
    entries: Entries

    def between(self, before: Sequence[set[int]] | None, after: Sequence[set[int]] | None) -> Entries:
        """Entries between some digits of each wire; None for any."""
        return {
            places: scale
            for places, scale in self.entries.items()
            if all(
                allowed is None or all(digit in own for digit, own in zip(place, allowed, strict=True))
                for place, allowed in zip(places, (before, after), strict=True)
            )
        }


def gather(block: list[PauliOp], sums: Sums) -> list[Gate]:
    """Gates from the readout to the encoding."""
    gates: list[Gate] = []
    last: dict[int, int] = {}
    for op in reversed(block):
        entries, wires = entries_of(op, sums), op.wires
        if list(wires) != sorted(wires):
            wires, entries = wires[::-1], {(row[::-1], column[::-1]): scale for (row, column), scale in entries.items()}
        numbers = {last.get(wire, -1) for wire in wires}
        number = numbers.pop() if len(numbers) == 1 else -1
        if number >= 0 and gates[number].wires == wires:
            gates[number] = Gate(wires, _after(gates[number].entries, entries, sums))
        else:
            last.update(dict.fromkeys(wires, len(gates)))
            gates.append(Gate(wires, entries))
    return gates


@dataclass(frozen=True, eq=False)
class Step:
    """What a gate does to one of its wires.

    Args:
        gate: Its number.
        partner: Its other wire, if it has one.
        transitions: For each digit what can follow.
    """

    gate: int
    partner: int | None
    transitions: Transitions

    @cached_property
    def labeled(self) -> dict[tuple[int, int], list[Transition]]:
        """For each digit and label what can follow."""
        result = defaultdict(list)
        for digit, transitions in self.transitions.items():
            for transition in transitions:
                result[digit, transition[1]].append(transition)
        return dict(result)

    def digits(self) -> set[int]:
        """What can come out."""
        return {after for transitions in self.transitions.values() for after, _, _ in transitions}


def steps_of(number: int, gate: Gate, before: Sequence[set[int]], after: Sequence[set[int]]) -> tuple[Step, ...]:
    """A gate as one step for each of its wires, between some digits of theirs."""
    entries = gate.between(before, after)
    if len(gate.wires) == 1:
        alone = defaultdict(list)
        for ((start,), (end,)), scale in entries.items():
            alone[start].append((end, 0, scale))
        return (Step(number, None, dict(alone)),)
    first, second = gate.wires
    here, there = _split(entries, 0), _split(entries, 1)
    # The transitions of either wire may be the labels: those of the one with fewer.
    halves = here[1:] if here[0] <= there[0] else (there[2], there[1])
    return Step(number, second, halves[0]), Step(number, first, halves[1])


def _split(entries: Entries, end: int) -> tuple[int, Transitions, Transitions]:
    """How many labels there are, and the transitions on one end of a gate and on the other.

    What happens on the one end decides what can happen on the other, and how: that is the label. Two transitions that
    allow the same up to a common factor have one label.
    """
    allowed: dict[tuple[int, int], list[tuple[tuple[int, int], Scale]]] = defaultdict(list)
    for (row, column), scale in sorted(entries.items()):
        allowed[row[end], column[end]].append(((row[1 - end], column[1 - end]), scale))
    labels: dict[tuple[object, ...], int] = {}
    near, far = defaultdict(list), defaultdict(list)
    for (before, after), others in allowed.items():
        number, factor = others[0][1]
        if any(f != factor for _, (_, f) in others):
            factor = ONE
        form = tuple((place, (round(n / number, DIGITS), ONE if f == factor else f)) for place, (n, f) in others)
        if form not in labels:
            labels[form] = len(labels)
            for (start, stop), scale in form:
                far[start].append((stop, labels[form], scale))
        near[before].append((after, labels[form], (number, factor)))
    return len(labels), dict(near), dict(far)
