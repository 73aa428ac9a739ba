"""Sums of products, every equal one kept once, and programs that evaluate them for many patches.

What a kernel does to a patch is written down as a list of sums: each adds up number * factor * a * b over its terms,
a and b being earlier sums, sines or cosines of the patch. Factors are the same for all patches: they are sums in
another list, of sines and cosines of the weights. Both lists become programs of one kind.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ONE = 0  # the sum that is always 1
ZERO = 1e-14  # numbers below it are rounding errors of zeros
DIGITS = 13  # numbers that agree so far are equal

Wave = tuple[int, float, float]  # sine and cosine of scale * input + offset: (input, scale, offset)
Scale = tuple[float, int]  # number * factor
Value = tuple[float, int, int]  # number * factor * sum
Term = tuple[float, int, int, int]  # number * factor * sum * sum


class TooMany(Exception):
    """A list of sums has grown beyond its limit."""


class Sums:
    """A growing list of sums.

    Args:
        factors: The list that factors are taken from; None where all factors are ONE.
        limit: Sums after which TooMany is raised.
    """

    def __init__(self, limit: int, factors: Sums | None = None) -> None:
        self._factors, self._limit = factors, limit
        self._terms: list[tuple[Term, ...]] = [()]
        self._known: dict[tuple[Term, ...], int] = {}
        self._waves: dict[Wave, tuple[int, int]] = {}

    def __len__(self) -> int:
        return len(self._terms)

    def _new(self, terms: tuple[Term, ...]) -> int:
        if len(self._terms) >= self._limit:
            raise TooMany
        self._terms.append(terms)
        return len(self._terms) - 1

    def wave(self, wave: Wave) -> tuple[int, int]:
        """Sine and cosine of an angle."""
        if wave not in self._waves:
            self._waves[wave] = self._new(()), self._new(())
        return self._waves[wave]

    def add(self, terms: Sequence[Term]) -> Value | None:
        """A sum, or None if it is zero.

        Numbers and factors that all terms share stay outside, so that multiples of a sum are not sums of their own.
        """
        if len(terms) == 1 and ONE in terms[0][2:]:
            ((number, factor, a, b),) = terms
            return (number, factor, max(a, b)) if abs(number) > ZERO else None
        merged: dict[tuple[int, int], Scale] = {}
        for number, factor, a, b in terms:
            key = (a, b) if a > b else (b, a)
            merged[key] = self._plus(merged[key], (number, factor)) if key in merged else (number, factor)
        kept = sorted((key, scale) for key, scale in merged.items() if abs(scale[0]) > ZERO)
        if not kept:
            return None
        number, factor = kept[0][1]
        if any(other != factor for _, (_, other) in kept):
            factor = ONE
        rest = tuple((round(n / number, DIGITS), ONE if f == factor else f, a, b) for (a, b), (n, f) in kept)
        if len(rest) == 1 and rest[0][3] == ONE:
            return number, factor, rest[0][2]
        if rest not in self._known:
            self._known[rest] = self._new(rest)
        return number, factor, self._known[rest]

    def _plus(self, one: Scale, other: Scale) -> Scale:
        if one[1] == other[1]:
            return one[0] + other[0], one[1]
        assert self._factors is not None
        total = self._factors.add([(number, ONE, factor, ONE) for number, factor in (one, other)])
        return (0.0, ONE) if total is None else (total[0], total[2])

    def times(self, one: Scale, other: Scale) -> Scale:
        """A product of factors (sums of this list)."""
        number = one[0] * other[0]
        if ONE in (one[1], other[1]):
            return number, max(one[1], other[1])
        product = self.add([(number, ONE, one[1], other[1])])
        return (0.0, ONE) if product is None else (product[0], product[2])

    def keep(self, value: Value | None) -> int:
        """A place of its own for a multiple of a sum."""
        if value is None:
            return self._new(())
        number, factor, place = value
        return place if (number, factor) == (1.0, ONE) else self._new(((number, factor, place, ONE),))

    def cost(self, place: int) -> int:
        """What a sum adds to a program: its terms, and storing it."""
        return len(self._terms[place]) + 1

    def needed(self, places: Iterable[int]) -> set[int]:
        """All that some sums are made of, themselves included."""
        found, stack = {ONE}, list(places)
        while stack:
            place = stack.pop()
            if place not in found:
                found.add(place)
                stack += [operand for *_, a, b in self._terms[place] for operand in (a, b)]
        return found - {ONE}

    def program(self, outputs: Sequence[int]) -> tuple[Program, list[Scale]]:
        """What evaluates some of the sums, and the coefficients it takes."""
        leaves = {place: wave for wave, both in self._waves.items() for place in both}
        order: list[int] = []
        done = {ONE, *leaves}
        used: dict[Wave, None] = {}
        stack = [(place, False) for place in reversed(outputs)]
        while stack:
            place, ready = stack.pop()
            if place in leaves:
                used[leaves[place]] = None
            if place in done:
                continue
            if ready:
                done.add(place)
                order.append(place)
            else:
                # What a sum needs is evaluated right before it: little is then waiting to be used.
                below = [operand for term in reversed(self._terms[place]) for operand in term[2:]]
                stack += [(place, True), *((operand, False) for operand in below)]
        number = {ONE: ONE}
        for wave in used:
            number.update(zip(self._waves[wave], (len(number), len(number) + 1), strict=True))
        number.update({place: len(number) + k for k, place in enumerate(order)})
        coefficients: dict[Scale, int] = {}
        sums = tuple(
            tuple(
                (coefficients.setdefault((n, f), len(coefficients)), number[a], number[b])
                for n, f, a, b in self._terms[place]
            )
            for place in order
        )
        program = Program(tuple(used), sums, tuple(number[place] for place in outputs), len(coefficients))
        return program, list(coefficients)


@dataclass(frozen=True)
class Program:
    """Sums in an order of evaluation. They are numbered: ONE, then sine and cosine of every wave, then the sums.

    Args:
        waves: Angles whose sines and cosines enter.
        sums: The terms (coefficient, a, b) of each; b is ONE in terms with one operand.
        outputs: The sums that are asked for.
        coefficients: How many there are.
    """

    waves: tuple[Wave, ...]
    sums: tuple[tuple[tuple[int, int, int], ...], ...]
    outputs: tuple[int, ...]
    coefficients: int

    @property
    def first(self) -> int:
        """The number of the first sum."""
        return 1 + 2 * len(self.waves)

    @cached_property
    def _batches(self) -> list[tuple[list[int], list[int], list[int], NDArray[np.int64]]]:
        """Sums that can be evaluated together: numbers, all a, all b (empty if ONE), coefficients (sums, terms)."""
        depth = [0] * self.first
        batches: dict[tuple[int, int, bool], list[int]] = {}
        for number, terms in enumerate(self.sums, self.first):
            depth.append(1 + max((depth[operand] for _, *both in terms for operand in both), default=0))
            products = any(b != ONE for _, _, b in terms)
            batches.setdefault((depth[-1], len(terms), products), []).append(number)
        result = []
        for (_, _, products), numbers in sorted(batches.items()):
            every = [term for number in numbers for term in self.sums[number - self.first]]
            chosen = np.array([term[0] for term in every], dtype=np.int64).reshape(len(numbers), -1)
            others = [term[2] for term in every] if products else []
            result.append((numbers, [term[1] for term in every], others, chosen))
        return result

    def __call__(self, inputs: Tensor, coefficients: Tensor) -> Tensor:
        """Evaluate in torch operations.

        Args:
            inputs: (n_inputs, P).
            coefficients: (F, coefficients).

        Returns:
            (F, outputs, P).
        """
        shape = len(coefficients), inputs.shape[1]
        if not self.outputs:
            return inputs.new_empty(shape[0], 0, shape[1])
        values = [inputs.new_ones(()).expand(shape)] * (self.first + len(self.sums))
        if self.waves:
            table = np.array(self.waves)
            scale, offset = (torch.from_numpy(table[:, k : k + 1]).to(inputs) for k in (1, 2))
            index = torch.from_numpy(table[:, 0].astype(np.int64)).to(inputs.device)
            angles = inputs[index] * scale + offset
            both = torch.stack([torch.sin(angles), torch.cos(angles)], dim=1).flatten(0, 1)
            values[1 : self.first] = both.expand(shape[0], *both.shape).unbind(1)
        order = np.concatenate([chosen.ravel() for *_, chosen in self._batches] or [np.zeros(0, np.int64)])
        picked = coefficients[:, torch.from_numpy(order).to(inputs.device)]
        start = 0
        for numbers, a, b, chosen in self._batches:
            stop = start + chosen.size
            if chosen.size == 0:
                rows = inputs.new_zeros(()).expand(shape[0], len(numbers), shape[1])
            else:
                operands = torch.stack([values[k] for k in a], dim=1)
                if b:
                    operands = operands * torch.stack([values[k] for k in b], dim=1)
                # (F, sums, 1, terms) @ (F, sums, terms, P)
                weights = picked[:, start:stop].reshape(shape[0], len(numbers), 1, chosen.shape[1])
                rows = (weights @ operands.reshape(shape[0], *chosen.shape, shape[1])).squeeze(2)
            for number, row in zip(numbers, rows.unbind(1), strict=True):
                values[number] = row
            start = stop
        return torch.stack([values[number] for number in self.outputs], dim=1)
