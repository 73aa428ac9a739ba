"""Tensor networks as circuits: trees, MERA and chains of two-wire blocks."""

from collections.abc import Sequence
from math import pi
from typing import Annotated

from circuits.ansatze.builder import AB, BA, A, Ansatz, B, Block, Builder, Pair, Shared, chain
from circuits.circuit import Circuit
from circuits.options import one_of

BLOCKS = {
    "real": Block((("RY", A, (0,)), ("RY", B, (1,)), ("CNOT", AB, ()))),
    "complex": Block((("RX", A, (0,)), ("RY", A, (1,)), ("RX", B, (2,)), ("RY", B, (3,)), ("CNOT", AB, ()))),
    # Any two-wire unitary: Vatan & Williams, figure 6, its three inner angles taken as they are.
    "general": Block(
        (
            ("Rot", A, (0, 1, 2)),
            ("Rot", B, (3, 4, 5)),
            ("RZ", B, (pi / 2,)),
            ("CNOT", BA, ()),
            ("RZ", A, (6,)),
            ("RY", B, (7,)),
            ("CNOT", AB, ()),
            ("RY", B, (8,)),
            ("CNOT", BA, ()),
            ("RZ", A, (-pi / 2,)),
            ("Rot", A, (9, 10, 11)),
            ("Rot", B, (12, 13, 14)),
        )
    ),
}


# As `block` of the options below.
Named = Annotated[str, one_of(BLOCKS, "the gates on a pair of wires")]


def tree_levels(wires: Sequence[int]) -> list[tuple[Sequence[int], list[Pair]]]:
    """Wires of each level and its pairs: (0, 1), (2, 3), ..., then (1, 3), ...: the second of a pair goes on.

    An odd one out goes on alone.
    """
    levels = []
    while len(wires) > 1:
        pairs = list(zip(wires[0::2], wires[1::2], strict=False))
        levels.append((wires, pairs))
        wires = [b for _, b in pairs] + list(wires[2 * len(pairs) :])
    return levels


def _network(pairs: Sequence[Sequence[Pair]], wires: int, depth: int, block: str, shared: bool) -> Circuit:
    made = Builder(wires)
    for _ in range(depth):
        for layer in pairs:
            made.tile(BLOCKS[block], layer, shared)
    return made.circuit()


def _ttn(wires: int, depth: int, *, block: Named = "real", shared: Shared = False) -> Circuit:
    return _network([pairs for _, pairs in tree_levels(range(wires))], wires, depth, block, shared)


def _mera(wires: int, depth: int, *, block: Named = "real", shared: Shared = False) -> Circuit:
    layers: list[list[Pair]] = []
    for own, pairs in tree_levels(range(wires)):
        # Disentanglers sit across the borders of the pairs.
        between = chain(own)[1 : 2 * len(pairs) : 2]
        layers += [between, pairs] if between else [pairs]
    return _network(layers, wires, depth, block, shared)


def _mps(wires: int, depth: int, *, block: Named = "real", shared: Shared = False) -> Circuit:
    return _network([chain(range(wires))], wires, depth, block, shared)


def _last(wires: int, depth: int) -> tuple[int, ...]:
    # Of each level's last pair the second wire goes on, or an odd one out alone.
    return (wires - 1,)


_GRANT = "Grant et al., Hierarchical quantum classifiers (arXiv:1804.03680)"
_OPTIONS = (
    "blocks (options): real, RY RY CNOT as in piQture; complex, RX RY on both wires and CNOT; general, any two-wire "
    "unitary of Vatan & Williams (quant-ph/0308006) with 15 weights; shared or not in a layer; depth repeats the whole"
)

TREES = {
    "ttn": Ansatz(
        _ttn,
        True,
        f"Tree of {_GRANT}: of a pair the second wire goes on, the last one is the root; {_OPTIONS}",
        weights="2*d*(n - 1)",
        least_wires=2,
        root=_last,
    ),
    "mera": Ansatz(
        _mera,
        True,
        f"MERA of {_GRANT}: the tree, and before each of its levels blocks across the borders of its pairs. "
        f"PennyLane's template lets other wires of the pairs go on; {_OPTIONS}",
        weights="2*d*sum((n - 1) >> k for k in range(n))",
        least_wires=2,
        root=_last,
    ),
    "mps": Ansatz(
        _mps,
        True,
        "Chain of blocks on neighbors, a matrix product state of bond 2 for depth 1: Huggins et al., Towards quantum "
        f"machine learning with tensor networks (arXiv:1803.11537); {_OPTIONS}",
        weights="2*d*(n - 1)",
        least_wires=2,
    ),
}
