"""Programs of sums as the numbers that the compiled loops read (see train_loops.py)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qconv.backends.sums import ONE, Program

Whole = NDArray[np.int64]


class _Slots:
    """Hands out numbers, those given back first."""

    def __init__(self, taken: int) -> None:
        self.count, self._free = taken, list[int]()

    def take(self) -> int:
        if self._free:
            return self._free.pop()
        self.count += 1
        return self.count - 1

    def give_back(self, slot: int) -> None:
        self._free.append(slot)


@dataclass(frozen=True)
class Code:
    """A program as numbers for the loops, see train_loops.

    Args:
        numbers: For every sum how many terms it has of one operand and of two, its slot, and the terms.
        slots: How many there are; the first are ONE's and the waves'.
        results: The outputs' slots.
    """

    numbers: Whole
    slots: int
    results: Whole

    @classmethod
    def _of(cls, lines: list[list[int]], slots: _Slots, results: list[int]) -> Code:
        numbers = [number for line in lines for number in line]
        return cls(np.array(numbers, dtype=np.int64), slots.count, np.array(results, dtype=np.int64))

    @classmethod
    def forward(cls, program: Program, reuse: bool) -> Code:
        """To evaluate; with `reuse` a slot is given to another sum after its last use."""
        outputs = set(program.outputs)
        last = {operand: k for k, terms in enumerate(program.sums) for _, *both in terms for operand in both}
        slots, slot = _Slots(program.first), dict(enumerate(range(program.first)))
        lines = []
        for k, terms in enumerate(program.sums):
            # Every term is read before the sum is stored, so its place may be one of theirs.
            own = {operand for _, *both in terms for operand in both}
            for operand in own if reuse else ():
                if last[operand] == k and operand >= program.first and operand not in outputs:
                    slots.give_back(slot[operand])
            line = _line(terms, slot)
            slot[program.first + k] = slots.take()
            lines.append([*line[:2], slot[program.first + k], *line[2:]])
        return cls._of(lines, slots, [slot[output] for output in program.outputs])

    @classmethod
    def backward(cls, program: Program) -> Code:
        """To pull slopes back through what `forward` without reuse evaluated; the slots are those of slopes."""
        slots, slot = _Slots(program.first), dict(enumerate(range(program.first)))
        for output in program.outputs:
            if output not in slot:
                slot[output] = slots.take()
        results = [slot[output] for output in program.outputs]
        lines = []
        for k in reversed(range(len(program.sums))):
            terms = program.sums[k]
            for _, *both in terms:
                for operand in both:
                    if operand not in slot:
                        slot[operand] = slots.take()
            own = slot[program.first + k]
            line = _line(terms, slot, slopes=True)
            lines.append([*line[:2], own, *line[2:]])
            # It is 0 again when the next sum takes it.
            slots.give_back(own)
        return cls._of(lines, slots, results)


@dataclass(frozen=True)
class Codes:
    """All that the loops do with a program.

    Args:
        evaluate: With as few slots as possible.
        keep: With a slot for every sum.
        pull_back: After `keep`.
    """

    evaluate: Code
    keep: Code
    pull_back: Code

    @classmethod
    def of(cls, program: Program) -> Codes:
        """Written down once for all geometries."""
        return cls(Code.forward(program, reuse=True), Code.forward(program, reuse=False), Code.backward(program))


def _line(terms: tuple[tuple[int, int, int], ...], slot: dict[int, int], slopes: bool = False) -> list[int]:
    """Terms of one operand and of two: how many, then their coefficients and slots (values', then slopes')."""
    single = [term for term in terms if term[2] == ONE]
    double = [term for term in terms if term[2] != ONE]
    line = [len(single), len(double)]
    for coefficient, *operands in [*((c, a) for c, a, _ in single), *double]:
        # Values are not moved where slopes are asked for: a sum's slot is then its number.
        line += [coefficient, *(operands if slopes else ()), *(slot[operand] for operand in operands)]
    return line
