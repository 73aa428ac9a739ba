"""Circuits that the conformance suite runs on, with numbers for them."""

from __future__ import annotations

from dataclasses import dataclass
from math import pi

import numpy as np

from circuits.circuit import Angle, Circuit, Gate, const
from circuits.kernels import kernel
from qconv.dense import Real

HALVES = np.array([0.0, 0.5, 1.0, 1.5])


@dataclass(frozen=True)
class Case:
    """A circuit with numbers for it."""

    name: str
    circuit: Circuit
    clifford: bool = False

    def numbers(self, patches: int, filters: int, seed: int = 0) -> tuple[Real, Real]:
        """Inputs and weights; of Clifford angles only where the case is of those."""
        rng = np.random.default_rng(seed)
        sizes = (patches, self.circuit.n_inputs), (filters, self.circuit.n_weights)
        if self.clifford:
            return rng.choice(HALVES, sizes[0]), rng.choice(HALVES, sizes[1]) * pi
        return rng.uniform(-1, 1, sizes[0]), rng.normal(size=sizes[1])


def _cases() -> dict[str, Case]:
    readout = ["ZII", "IXZ", "YYX"]
    block = kernel("basic_entangler", 2, 1, readout=["ZI", "XY"])
    shared = Circuit(
        3,
        (
            Gate("RX", (0,), (Angle("input", 0, 1.5, 0.2),)),
            Gate("RY", (1,), (Angle("input", 1, -0.7),)),
            Gate("CRY", (0, 1), (Angle("weight", 0, 2.0),)),
            Gate("CP", (1, 0), (Angle("weight", 1, 1.0, -0.4),)),
            Gate("CCX", (0, 1, 2)),
            Gate("RYY", (0, 2), (Angle("weight", 0, -1.0),)),
            Gate("U3", (1,), (Angle("weight", 1), const(0.4), Angle("weight", 0))),
        ),
        ("ZII", "XZY", "IXI"),
    )
    cases = (
        Case("kernel", kernel("strongly_entangling", 3, 1, readout=readout)),
        Case("shared weights, controlled and three-wire gates", shared),
        Case("re-uploading", block + block.shift_weights(block.n_weights)),
        Case("amplitudes", kernel("basic_entangler", 2, 1, encoding="amplitude", features=3)),
        Case("Clifford angles", kernel("strongly_entangling", 3, 1, readout=readout), clifford=True),
        Case("one wire", kernel("product", 1, 1, readout=["X", "Y", "Z"])),
    )
    return {case.name: case for case in cases}


CASES = _cases()
# What most checks run on: the first that the backend takes.
USUAL = (CASES["kernel"], CASES["Clifford angles"])


# Clifford angles around a T, and two outcomes of unequal weight that differ in both bits. That there are no others is
# not asked (ZZ): who approximates finds a percent of them.
BEHIND_T = Case(
    "T before a CNOT",
    Circuit(
        2,
        (
            Gate("H", (0,)),
            Gate("RZ", (0,), (Angle("weight", 0),)),
            Gate("T", (0,)),
            Gate("H", (0,)),
            Gate("RX", (1,), (Angle("input", 0, 2 * pi),)),
            Gate("CNOT", (0, 1)),
        ),
        ("ZI", "IZ"),
    ),
    clifford=True,
)

# Three fair coins where features are 0.5, and products of them.
COINS = Circuit(
    3,
    tuple(Gate("RY", (wire,), (Angle("input", wire, pi),)) for wire in range(3)),
    ("ZII", "IZI", "IIZ", "ZZI", "IZZ", "ZZZ"),
)
