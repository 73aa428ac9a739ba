"""Layers of rotations and entanglers on all wires: the general-purpose ansaetze."""

from collections.abc import Sequence
from itertools import combinations
from typing import Annotated

from circuits.ansatze.builder import Ansatz, Builder, Pair, bricks, chain, ring
from circuits.circuit import Circuit
from circuits.options import Option, is_list, is_whole, one_of, optional


def _heisenberg(wires: int, depth: int) -> Circuit:
    made = Builder(wires)
    made.layer("Rot")
    for _ in range(depth):
        for pair in ring(wires):
            for name in ("RXX", "RYY", "RZZ"):
                made.add(name, *pair)
        made.layer("Rot")
    return made.circuit()


def _product(wires: int, depth: int) -> Circuit:
    made = Builder(wires)
    for _ in range(depth + 1):
        made.layer("Rot")
    return made.circuit()


_RANGES = Option(
    "a list of whole numbers, one a layer: how far a control is from its target, 1 to wires - 1",
    lambda value: is_list(value, is_whole),
)


def _strongly_entangling(
    wires: int, depth: int, *, ranges: Annotated[Sequence[int] | None, optional(_RANGES, "1, 2, ... in turn")] = None
) -> Circuit:
    if ranges is None:
        ranges = [layer % (wires - 1) + 1 for layer in range(depth)] if wires > 1 else [0] * depth
    elif len(ranges) != depth or not all(1 <= reach < wires for reach in ranges):
        raise ValueError(
            f"strongly_entangling of depth {depth} on {wires} wires was given ranges {tuple(ranges)}: give {depth} "
            f"of 1 to {wires - 1}"
        )
    made = Builder(wires)
    for reach in ranges:
        made.layer("Rot")
        if wires > 1:
            made.pairs("CNOT", ((wire, (wire + reach) % wires) for wire in range(wires)))
    return made.circuit()


def _basic_entangler(
    wires: int,
    depth: int,
    *,
    rotation: Annotated[str, one_of(("RX", "RY", "RZ"), "the gate on every wire")] = "RX",
) -> Circuit:
    made = Builder(wires)
    for _ in range(depth):
        made.layer(rotation)
        made.pairs("CNOT", ring(wires))
    return made.circuit()


def _hardware_efficient(wires: int, depth: int) -> Circuit:
    made = Builder(wires)
    made.layer("RZ", "RX", "RZ")
    for _ in range(depth):
        made.pairs("CZ", chain(range(wires)))
        made.layer("RZ", "RX", "RZ")
    return made.circuit()


def _simplified_two_design(wires: int, depth: int) -> Circuit:
    made = Builder(wires)
    made.layer("RY")
    for _ in range(depth):
        for pairs in bricks(range(wires)):
            for a, b in pairs:
                made.add("CZ", a, b)
                made.layer("RY", on=(a, b))
    return made.circuit()


ENTANGLEMENTS = ("reverse_linear", "linear", "full", "circular", "pairwise", "sca")


def _is_pair(value: object) -> bool:
    return is_list(value, is_whole) and len(value) == 2  # type: ignore[arg-type]


Entanglement = Annotated[
    str | Sequence[Pair],
    Option(
        f"{', '.join(ENTANGLEMENTS)} (as Qiskit names them), or a list of pairs of wires: which wires meet in a layer",
        lambda value: value in ENTANGLEMENTS if isinstance(value, str) else is_list(value, _is_pair),
        ENTANGLEMENTS,
    ),
]


def entanglers(entanglement: str | Sequence[Pair], wires: int, layer: int) -> list[Pair]:
    """Pairs of one layer, as Qiskit's n_local names and orders them; or those that are given.

    Raises:
        ValueError: For a pair of wires that are not there, or of one with itself.
    """
    if not isinstance(entanglement, str):
        for a, b in entanglement:
            if a == b or not (0 <= a < wires and 0 <= b < wires):
                raise ValueError(f"entanglement has the pair {(a, b)}: give two different wires of 0 to {wires - 1}")
        return [(a, b) for a, b in entanglement]
    pairs = chain(range(wires))
    closed = [(wires - 1, 0), *pairs] if wires > 2 else pairs
    # Shifted, circular, alternating: the ring starts one pair earlier each layer, every other time turned around.
    start = layer % len(closed) if closed else 0
    shifted = closed[len(closed) - start :] + closed[: len(closed) - start]
    known = {
        "reverse_linear": pairs[::-1],
        "linear": pairs,
        "full": list(combinations(range(wires), 2)),
        "circular": closed,
        "pairwise": pairs[0::2] + pairs[1::2],
        "sca": [(b, a) for a, b in shifted] if layer % 2 else shifted,
    }
    return known[entanglement]


def _local(rotations: Sequence[str], wires: int, depth: int, entanglement: str | Sequence[Pair]) -> Circuit:
    made = Builder(wires)
    for layer in range(depth):
        made.layer(*rotations)
        made.pairs("CNOT", entanglers(entanglement, wires, layer))
    made.layer(*rotations)
    return made.circuit()


def _real_amplitudes(wires: int, depth: int, *, entanglement: Entanglement = "reverse_linear") -> Circuit:
    return _local(("RY",), wires, depth, entanglement)


def _efficient_su2(wires: int, depth: int, *, entanglement: Entanglement = "reverse_linear") -> Circuit:
    return _local(("RY", "RZ"), wires, depth, entanglement)


LAYERED = {
    "heisenberg": Ansatz(
        _heisenberg,
        True,
        "Rot on every wire, then depth times [RXX RYY RZZ on each pair of the ring, Rot on every wire]: the exchange "
        "couplings of the Heisenberg model as in Vatan & Williams, Phys. Rev. A 69, 032315 (2004), angles trainable",
        weights="3*n + d*(3*n + 3*(n if n > 2 else n - 1))",
    ),
    "strongly_entangling": Ansatz(
        _strongly_entangling,
        True,
        "Schuld, Bocharov, Svore & Wiebe, Circuit-centric quantum classifiers, Phys. Rev. A 101, 032308 (2020); "
        "weights in the order (depth, wire, 3) of PennyLane's StronglyEntanglingLayers",
        weights="3*n*d",
    ),
    "basic_entangler": Ansatz(
        _basic_entangler,
        True,
        "PennyLane's BasicEntanglerLayers: RX on every wire, then a ring of CNOTs; weights (depth, wire)",
        weights="n*d",
    ),
    "hardware_efficient": Ansatz(
        _hardware_efficient,
        True,
        "Kandala et al., Hardware-efficient variational quantum eigensolver (arXiv:1704.05018): Euler rotations RZ RX "
        "RZ on every wire between entanglers. Theirs is the device's own drift, here a chain of CZ; public versions "
        "differ in both",
        weights="3*n*(d + 1)",
    ),
    "simplified_two_design": Ansatz(
        _simplified_two_design,
        True,
        "Cerezo et al., Cost function dependent barren plateaus (arXiv:2001.00550); gates and weights in the order of "
        "PennyLane's SimplifiedTwoDesign",
        weights="n + 2*(n - 1)*d",
    ),
    "real_amplitudes": Ansatz(
        _real_amplitudes,
        True,
        "Qiskit's real_amplitudes: RY on every wire, CNOTs between; its amplitudes stay real",
        weights="n*(d + 1)",
    ),
    "efficient_su2": Ansatz(
        _efficient_su2,
        True,
        "Qiskit's efficient_su2: RY and RZ on every wire, CNOTs between",
        weights="2*n*(d + 1)",
    ),
    "product": Ansatz(
        _product,
        False,
        "The control: heisenberg's rotations without its two-wire gates, so the state never entangles",
        weights="3*n*(d + 1)",
    ),
}
