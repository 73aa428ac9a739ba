"""Circuits whose structure is drawn from a seed."""

from itertools import combinations
from typing import Annotated

import numpy as np

from circuits.ansatze.builder import Ansatz, Builder, Seed
from circuits.circuit import Circuit
from circuits.options import number, optional, whole_number

# A random gate is a CNOT with this probability, as in PennyLane's RandomLayers.
RATIO_CNOT = 0.3


def _random(wires: int, depth: int, *, seed: Seed = 0) -> Circuit:
    rng = np.random.default_rng(seed)
    made = Builder(wires)
    for _ in range(depth):
        rotations = 0
        while rotations < wires:
            if wires > 1 and rng.random() < RATIO_CNOT:
                control, target = (int(wire) for wire in rng.permutation(wires)[:2])
                made.add("CNOT", control, target)
            else:
                name = str(rng.choice(["RX", "RY", "RZ"]))
                made.add(name, int(rng.integers(wires)))
                rotations += 1
    return made.circuit()


def _random_layers(
    wires: int,
    depth: int,
    *,
    seed: Seed = 0,
    rotations: Annotated[int | None, optional(whole_number(1, "rotations a layer"), "one a wire")] = None,
    ratio: Annotated[
        float, number("a number of 0 to below 1: probability of a CNOT", lambda p: 0 <= p < 1)
    ] = RATIO_CNOT,
) -> Circuit:
    rng = np.random.default_rng(seed)
    made = Builder(wires)
    for _ in range(depth):
        placed = 0
        while placed < (wires if rotations is None else rotations):
            # Draws in PennyLane's order, so that a seed means the same circuit there.
            if rng.random() > ratio:
                name = str(rng.choice(["RX", "RY", "RZ"]))
                made.add(name, int(rng.choice(wires, size=1, replace=False)[0]))
                placed += 1
            elif wires > 1:
                control, target = (int(wire) for wire in rng.choice(wires, size=2, replace=False))
                made.add("CNOT", control, target)
    return made.circuit()


CONNECTION = 0.15
PAIR_GATES = ("CU3", "CNOT", "SWAP", "SQSWAP")
ONE_WIRE_GATES = ("RX", "RY", "RZ", "U3", "P", "T", "H")


_PROBABILITY = number("a number of 0 to 1: probability that a pair of wires has a gate", lambda p: 0 <= p <= 1)


def _henderson(
    wires: int, depth: int, *, seed: Seed = 0, connection: Annotated[float, _PROBABILITY] = CONNECTION
) -> Circuit:
    rng = np.random.default_rng(seed)
    made = Builder(wires)
    for _ in range(depth):
        chosen: list[tuple[str, tuple[int, ...]]] = []
        for pair in combinations(range(wires), 2):
            if rng.random() < connection:
                control, target = (int(wire) for wire in rng.permutation(pair))
                chosen.append((str(rng.choice(PAIR_GATES)), (control, target)))
        # 0 to 2 n^2 - 2 of them; a single wire may have two.
        for _ in range(int(rng.integers(max(2 * wires**2 - 1, 3)))):
            chosen.append((str(rng.choice(ONE_WIRE_GATES)), (int(rng.integers(wires)),)))
        for k in rng.permutation(len(chosen)):
            name, on = chosen[k]
            made.add(name, *on)
    return made.circuit()


_HENDERSON = "Henderson, Shakya, Pradhan & Cook, Quanvolutional neural networks (arXiv:1904.04767)"

DRAWN = {
    "random": Ansatz(
        _random,
        True,
        f"{_HENDERSON}, in the form of PennyLane's RandomLayers: random RX, RY, RZ and CNOTs drawn from a seed",
        "uniform",
        weights="n*d",
    ),
    "random_layers": Ansatz(
        _random_layers,
        True,
        f"{_HENDERSON}, as PennyLane's RandomLayers draws it from the same seed, gate by gate",
        "uniform",
        weights="n*d",
    ),
    "henderson": Ansatz(
        _henderson,
        True,
        f"{_HENDERSON}: each pair of wires has with a probability a controlled U3, CNOT, SWAP or root of SWAP; 0 to 2 "
        "n^2 - 2 gates RX, RY, RZ, U3, P, T, H on one wire; all in random order, as qml-benchmarks describes it. "
        "Angles, random constants there, are weights; they draw a circuit a filter, here a seed is one circuit",
        "uniform",
    ),
}
