"""Named trainable blocks, each with its citation. They read weights from index 0 on and no features."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from numbers import Integral
from typing import Literal

import numpy as np

from circuits.circuit import Angle, Circuit, Gate
from circuits.naming import unknown


@dataclass(frozen=True)
class Ansatz:
    """A named trainable block.

    Args:
        build: (wires, depth, seed) -> the block as a circuit without readout.
        entangles: Whether it has gates on two wires.
        citation: Where it comes from.
        initial: How a layer starts its weights: "near_identity" draws rotations from N(0, 0.1) and starts two-wire
            gates at 0, so that training decides how much entanglement there is; "uniform" draws all from [0, 2 pi).
    """

    build: Callable[[int, int, int], Circuit]
    entangles: bool
    citation: str
    initial: Literal["near_identity", "uniform"] = "near_identity"


class _Weights:
    """Hands out weight angles in order."""

    def __init__(self) -> None:
        self._next = count()

    def take(self, n: int) -> tuple[Angle, ...]:
        return tuple(Angle("weight", next(self._next)) for _ in range(n))


def _rot_layer(wires: int, weights: _Weights) -> list[Gate]:
    return [Gate("Rot", (wire,), weights.take(3)) for wire in range(wires)]


def ring(wires: int) -> list[tuple[int, int]]:
    """Neighbouring pairs (i, i + 1) around a ring; one pair for two wires, none for one."""
    if wires < 3:
        return [(0, 1)][: wires - 1]
    return [(wire, (wire + 1) % wires) for wire in range(wires)]


def _heisenberg(wires: int, depth: int, seed: int) -> Circuit:
    weights = _Weights()
    gates = _rot_layer(wires, weights)
    for _ in range(depth):
        for pair in ring(wires):
            gates += [Gate(name, pair, weights.take(1)) for name in ("RXX", "RYY", "RZZ")]
        gates += _rot_layer(wires, weights)
    return Circuit(wires, tuple(gates))


def _product(wires: int, depth: int, seed: int) -> Circuit:
    weights = _Weights()
    gates = [gate for _ in range(depth + 1) for gate in _rot_layer(wires, weights)]
    return Circuit(wires, tuple(gates))


def _strongly_entangling(wires: int, depth: int, seed: int) -> Circuit:
    weights = _Weights()
    gates: list[Gate] = []
    for layer in range(depth):
        gates += _rot_layer(wires, weights)
        if wires > 1:
            reach = layer % (wires - 1) + 1
            gates += [Gate("CNOT", (wire, (wire + reach) % wires)) for wire in range(wires)]
    return Circuit(wires, tuple(gates))


def _basic_entangler(wires: int, depth: int, seed: int) -> Circuit:
    weights = _Weights()
    gates: list[Gate] = []
    for _ in range(depth):
        gates += [Gate("RX", (wire,), weights.take(1)) for wire in range(wires)]
        gates += [Gate("CNOT", pair) for pair in ring(wires)]
    return Circuit(wires, tuple(gates))


# A random gate is a CNOT with this probability, as in PennyLane's RandomLayers.
RATIO_CNOT = 0.3


def _random(wires: int, depth: int, seed: int) -> Circuit:
    rng = np.random.default_rng(seed)
    weights = _Weights()
    gates: list[Gate] = []
    for _ in range(depth):
        rotations = 0
        while rotations < wires:
            if wires > 1 and rng.random() < RATIO_CNOT:
                control, target = (int(wire) for wire in rng.permutation(wires)[:2])
                gates.append(Gate("CNOT", (control, target)))
            else:
                name = str(rng.choice(["RX", "RY", "RZ"]))
                gates.append(Gate(name, (int(rng.integers(wires)),), weights.take(1)))
                rotations += 1
    return Circuit(wires, tuple(gates))


ANSATZE: dict[str, Ansatz] = {
    "heisenberg": Ansatz(
        _heisenberg,
        True,
        "Rot on every wire, then depth times [RXX RYY RZZ on each pair of the ring, Rot on every wire]: the exchange "
        "couplings of the Heisenberg model as in Vatan & Williams, Phys. Rev. A 69, 032315 (2004), angles trainable",
    ),
    "strongly_entangling": Ansatz(
        _strongly_entangling,
        True,
        "Schuld, Bocharov, Svore & Wiebe, Circuit-centric quantum classifiers, Phys. Rev. A 101, 032308 (2020); "
        "weights in the order (depth, wire, 3) of PennyLane's StronglyEntanglingLayers",
    ),
    "basic_entangler": Ansatz(
        _basic_entangler,
        True,
        "PennyLane's BasicEntanglerLayers: RX on every wire, then a ring of CNOTs; weights (depth, wire)",
    ),
    "random": Ansatz(
        _random,
        True,
        "Henderson, Shakya, Pradhan & Cook, Quanvolutional neural networks (arXiv:1904.04767), in the form of "
        "PennyLane's RandomLayers: random RX, RY, RZ and CNOTs drawn from a seed",
        "uniform",
    ),
    "product": Ansatz(
        _product,
        False,
        "The control: heisenberg's rotations without its two-wire gates, so the state never entangles",
    ),
}


def find_ansatz(name: str) -> Ansatz:
    """The ansatz of that name.

    Raises:
        ValueError: For an unknown name, with the nearest valid one.
    """
    if name not in ANSATZE:
        raise unknown("kernel", name, ANSATZE)
    return ANSATZE[name]


def ansatz(name: str, wires: int, depth: int = 2, seed: int = 0) -> Circuit:
    """A named trainable block.

    Args:
        name: An ansatz's name.
        wires: Number of qubits, at least 1.
        depth: Number of layers, at least 1.
        seed: Draws the structure of "random"; the others do not depend on it.

    Raises:
        ValueError: For an unknown name, or fewer than one wire or layer.
    """
    found = find_ansatz(name)
    if not all(isinstance(number, Integral) for number in (wires, depth)) or wires < 1 or depth < 1:
        raise ValueError(
            f"kernel {name!r} was given {wires} wires and depth {depth}: both must be whole numbers of at least 1"
        )
    return found.build(wires, depth, seed)
