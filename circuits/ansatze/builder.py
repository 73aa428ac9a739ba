"""What ansaetze are made of: gates with weights of their own, blocks of gates, and pairs of wires."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import count, pairwise
from typing import Annotated, Literal

from circuits.circuit import Angle, Circuit, Gate, const
from circuits.gates import GATES, Part
from circuits.options import flag, whole_number

Pair = tuple[int, int]

# Wires a and b of a block of two; of a controlled gate the first is the control.
A, B, AB, BA = (0,), (1,), (0, 1), (1, 0)

# Types of options that several ansaetze have.
Shared = Annotated[bool, flag("whether the blocks of a layer share their weights")]
Seed = Annotated[int, whole_number(0, "draws the structure")]


@dataclass(frozen=True)
class Ansatz:
    """A named trainable block.

    Args:
        build: (wires, depth, options by keyword) -> the block as a circuit without readout, weights from index 0 on.
            What options take stands in their annotations, see circuits.options; `seed` draws a random structure.
        entangles: Whether it has gates on two wires.
        citation: Where it comes from.
        initial: How a layer starts its weights: "near_identity" draws rotations from N(0, 0.1) and starts two-wire
            gates at 0, so that training decides how much entanglement there is; "uniform" draws all from [0, 2 pi).
        weights: Number of weights on n wires with d layers, as a formula in Python; empty for a random structure.
        least_wires: Fewest wires it exists on.
        root: (wires, depth) -> the wires that are not discarded, where it discards some: what readout "root" reads.
    """

    build: Callable[..., Circuit]
    entangles: bool
    citation: str
    initial: Literal["near_identity", "uniform"] = "near_identity"
    weights: str = ""
    least_wires: int = 1
    root: Callable[[int, int], tuple[int, ...]] | None = None


@dataclass(frozen=True)
class Block:
    """Gates on a few wires, to be placed again and again.

    Args:
        parts: (gate, which of the block's wires, which of its weights or numbers in radians) in the order of
            application.
    """

    parts: tuple[Part, ...]

    @property
    def n_weights(self) -> int:
        """Weights of one block."""
        return 1 + max((a for _, _, angles in self.parts for a in angles if isinstance(a, int)), default=-1)


class Builder:
    """Collects gates and hands out weights in order.

    Args:
        wires: Number of qubits.
    """

    def __init__(self, wires: int) -> None:
        self.wires = wires
        self.gates: list[Gate] = []
        self._next = count()

    def take(self, n: int) -> tuple[Angle, ...]:
        """New weights."""
        return tuple(Angle("weight", next(self._next)) for _ in range(n))

    def add(self, name: str, *on: int, angles: Sequence[Angle] | None = None) -> None:
        """One gate, by default with weights of its own."""
        own = self.take(GATES[name].n_angles or 0) if angles is None else tuple(angles)
        self.gates.append(Gate(name, on, own))

    def layer(self, *names: str, on: Iterable[int] | None = None) -> None:
        """Gates on every wire, each name a layer."""
        wires = range(self.wires) if on is None else tuple(on)
        for name in names:
            for wire in wires:
                self.add(name, wire)

    def pairs(self, name: str, pairs: Iterable[Pair]) -> None:
        """A gate on each pair, the first wire its control."""
        for pair in pairs:
            self.add(name, *pair)

    def place(self, block: Block, on: Sequence[int], weights: Sequence[Angle] | None = None) -> None:
        """A block on some wires, by default with weights of its own."""
        own = self.take(block.n_weights) if weights is None else weights
        for name, wires, angles in block.parts:
            values = tuple(own[angle] if isinstance(angle, int) else const(angle) for angle in angles)
            self.add(name, *(on[wire] for wire in wires), angles=values)

    def tile(self, block: Block, pairs: Iterable[Pair], shared: bool) -> None:
        """A block on each pair, all with the same weights or each with its own."""
        weights = self.take(block.n_weights) if shared else None
        for pair in pairs:
            self.place(block, pair, weights)

    def power(self, control: int, target: int, angle: Angle) -> None:
        """CNOT to the power angle / pi: CXPow with its exponent in half turns, phase included."""
        self.add("H", target)
        self.add("CP", control, target, angles=(angle,))
        self.add("H", target)

    def circuit(self) -> Circuit:
        """What was collected."""
        return Circuit(self.wires, tuple(self.gates))


def chain(wires: Sequence[int]) -> list[Pair]:
    """Neighboring pairs (0, 1), (1, 2) and so on."""
    return list(pairwise(wires))


def ring(wires: int) -> list[Pair]:
    """Neighboring pairs (i, i + 1) around a ring; one pair for two wires, none for one."""
    pairs = chain(range(wires))
    return [*pairs, (wires - 1, 0)] if wires > 2 else pairs


def bricks(wires: Sequence[int]) -> tuple[list[Pair], list[Pair]]:
    """Neighboring pairs that start at even places, and those at odd ones."""
    pairs = chain(wires)
    return pairs[0::2], pairs[1::2]
