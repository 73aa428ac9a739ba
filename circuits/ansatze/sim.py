"""The nineteen circuits of Sim, Johnson & Aspuru-Guzik on any number of wires."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Annotated

from circuits.ansatze.builder import Ansatz, Builder, Pair, bricks, chain
from circuits.circuit import Circuit
from circuits.options import flag


def _down(wires: int) -> list[Pair]:
    """Controls from the last wire on, each targets the wire before: (3, 2), (2, 1), (1, 0)."""
    return [(b, a) for a, b in reversed(chain(range(wires)))]


def _around(wires: int) -> list[Pair]:
    """Controls from the last wire on, each targets the wire after it on the ring: (3, 0), (2, 3), (1, 2), (0, 1)."""
    # Two wires have both pairs: they differ in their control.
    return [(wire, (wire + 1) % wires) for wire in reversed(range(wires))]


def _back(wires: int) -> list[Pair]:
    """The ring the other way, from the last wire on: (3, 2), (0, 3), (1, 0), (2, 1)."""
    return [(wire % wires, (wire - 1) % wires) for wire in range(wires - 1, 2 * wires - 1)]


def _all(wires: int) -> list[Pair]:
    return [(c, t) for c in reversed(range(wires)) for t in reversed(range(wires)) if c != t]


def _bricks(wires: int) -> tuple[list[Pair], list[Pair]]:
    """(1, 0), (3, 2) and so on, then (2, 1) and so on."""
    even, odd = bricks(range(wires))
    return [(b, a) for a, b in even], [(b, a) for a, b in odd]


def _chained(made: Builder, gate: str) -> None:
    made.layer("RX", "RZ")
    made.pairs(gate, _down(made.wires))


def _complete(made: Builder, gate: str) -> None:
    made.layer("RX", "RZ")
    made.pairs(gate, _all(made.wires))
    made.layer("RX", "RZ")


def _two_bricks(made: Builder, gate: str) -> None:
    even, odd = _bricks(made.wires)
    made.layer("RX", "RZ")
    made.pairs(gate, even)
    made.layer("RX", "RZ")
    made.pairs(gate, odd)


def _inner_bricks(made: Builder, gate: str) -> None:
    even, odd = _bricks(made.wires)
    made.layer("RY", "RZ")
    made.pairs(gate, even)
    made.layer("RY", "RZ", on=sorted(wire for pair in odd for wire in pair))
    made.pairs(gate, odd)


def _two_rings(made: Builder, gate: str) -> None:
    made.layer("RY")
    made.pairs(gate, _around(made.wires))
    made.layer("RY")
    made.pairs(gate, _back(made.wires))


def _brick_wall(made: Builder, gate: str) -> None:
    even, odd = _bricks(made.wires)
    made.layer("RX", "RZ")
    made.pairs(gate, even + odd)


def _ring(made: Builder, gate: str) -> None:
    made.layer("RX", "RZ")
    made.pairs(gate, _around(made.wires))


def _sim1(made: Builder, gate: str) -> None:
    made.layer("RX", "RZ")


def _sim9(made: Builder, gate: str) -> None:
    made.layer("H")
    made.pairs(gate, _down(made.wires))
    made.layer("RX")


def _sim10(made: Builder, gate: str) -> None:
    made.layer("RY")
    closing = [(made.wires - 1, 0)] if made.wires > 2 else []
    made.pairs(gate, _down(made.wires) + closing)
    made.layer("RY")


def _build(layer: Callable[[Builder, str], None], gate: str, wires: int, depth: int) -> Circuit:
    made = Builder(wires)
    for _ in range(depth):
        layer(made, gate)
    return made.circuit()


def _build_rings(
    layer: Callable[[Builder, str], None],
    gate: str,
    wires: int,
    depth: int,
    *,
    exchanged: Annotated[bool, flag("whether the rings' controls are their targets")] = False,
) -> Circuit:
    made = _build(layer, gate, wires, depth)
    if not exchanged:
        return made
    return replace(made, gates=tuple(replace(g, wires=g.wires[::-1]) for g in made.gates))


_CHAIN = "d*(3*n - 1)"
_INNER = "d*(2*n + 4*((n - 1)//2))"

# Number -> one layer, its two-wire gate, weights.
_CIRCUITS: dict[int, tuple[Callable[[Builder, str], None], str, str]] = {
    1: (_sim1, "", "2*n*d"),
    2: (_chained, "CNOT", "2*n*d"),
    3: (_chained, "CRZ", _CHAIN),
    4: (_chained, "CRX", _CHAIN),
    5: (_complete, "CRZ", "d*(n*n + 3*n)"),
    6: (_complete, "CRX", "d*(n*n + 3*n)"),
    7: (_two_bricks, "CRZ", "d*(5*n - 1)"),
    8: (_two_bricks, "CRX", "d*(5*n - 1)"),
    9: (_sim9, "CZ", "n*d"),
    10: (_sim10, "CZ", "2*n*d"),
    11: (_inner_bricks, "CNOT", _INNER),
    12: (_inner_bricks, "CZ", _INNER),
    13: (_two_rings, "CRZ", "4*n*d"),
    14: (_two_rings, "CRX", "4*n*d"),
    15: (_two_rings, "CNOT", "2*n*d"),
    16: (_brick_wall, "CRZ", _CHAIN),
    17: (_brick_wall, "CRX", _CHAIN),
    18: (_ring, "CRZ", "3*n*d"),
    19: (_ring, "CRX", "3*n*d"),
}

_NOTES = {
    1: "; it does not entangle: the control of circuits 2 to 4 and 16 to 19",
    10: "; MindQuantum repeats all but the first RY layer, which is the same for depth 1",
    11: "; the second rotations are on the wires that the second gates couple",
    12: "; the second rotations are on the wires that the second gates couple",
}
_NOTES |= dict.fromkeys(
    (13, 14, 15),
    "; for other than 4 wires copies differ in the second ring, here the first one turned around; some reuse weights",
)
_RINGS = (13, 14, 15, 18, 19)
for _number in _RINGS:
    _NOTES[_number] = _NOTES.get(_number, "") + "; option exchanged: the rings' targets control"
# What the paper's measure is taken to be, see docs/diagnostics.md.
_FIGURES = (
    "; the paper's entangling capability with one layer, {}, is that of exchanged=True ({}), not of the copies ({})"
)
_NOTES[15] += _FIGURES.format("0.8184", "0.818", "0.853")
_NOTES[19] += _FIGURES.format("0.5916", "0.591", "0.557")

SIM = {
    f"sim{number}": Ansatz(
        partial(_build_rings if number in _RINGS else _build, layer, gate),
        number > 1,
        f"Circuit {number} of Sim, Johnson & Aspuru-Guzik, Expressibility and entangling capability of parameterized "
        "quantum circuits (arXiv:1905.10876), as MindQuantum and bagmk/Quantum_Machine_Learning_Express have it for "
        f"4 wires, the pattern continued on others{_NOTES.get(number, '')}",
        # Real states give controlled RX and RZ no slope at 0: started there, they would stay.
        initial="uniform" if number in (13, 14) else "near_identity",
        weights=weights,
        least_wires=2,
    )
    for number, (layer, gate, weights) in _CIRCUITS.items()
}
