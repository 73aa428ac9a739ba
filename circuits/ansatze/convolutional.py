"""Quantum convolutional networks: two-wire blocks, the layers they are laid out in, and pooling."""

from collections.abc import Callable, Sequence
from functools import partial
from math import pi
from typing import Annotated

from circuits.ansatze.builder import AB, BA, A, Ansatz, B, Block, Builder, Pair, Shared, bricks
from circuits.circuit import Circuit
from circuits.gates import Part
from circuits.options import one_of

# Hur, Kim & Park: convolution blocks, weights in the order of takh04/QCNN's unitary.py.
HUR_BLOCKS = {
    "hur_ttn": Block((("RY", A, (0,)), ("RY", B, (1,)), ("CNOT", AB, ()))),
    "hur_u9": Block((("H", A, ()), ("H", B, ()), ("CZ", AB, ()), ("RX", A, (0,)), ("RX", B, (1,)))),
    "hur_u15": Block(
        (
            ("RY", A, (0,)),
            ("RY", B, (1,)),
            ("CNOT", BA, ()),
            ("RY", A, (2,)),
            ("RY", B, (3,)),
            ("CNOT", AB, ()),
        )
    ),
    **{
        name: Block(
            (
                ("RY", A, (0,)),
                ("RY", B, (1,)),
                (gate, BA, (2,)),
                ("RY", A, (3,)),
                ("RY", B, (4,)),
                (gate, AB, (5,)),
            )
        )
        for name, gate in (("hur_u13", "CRZ"), ("hur_u14", "CRX"))
    },
    "hur_so4": Block(
        (
            ("RY", A, (0,)),
            ("RY", B, (1,)),
            ("CNOT", AB, ()),
            ("RY", A, (2,)),
            ("RY", B, (3,)),
            ("CNOT", AB, ()),
            ("RY", A, (4,)),
            ("RY", B, (5,)),
        )
    ),
    **{
        name: Block(
            (
                ("RX", A, (0,)),
                ("RX", B, (1,)),
                ("RZ", A, (2,)),
                ("RZ", B, (3,)),
                (gate, BA, (4,)),
                (gate, AB, (5,)),
                ("RX", A, (6,)),
                ("RX", B, (7,)),
                ("RZ", A, (8,)),
                ("RZ", B, (9,)),
            )
        )
        for name, gate in (("hur_u5", "CRZ"), ("hur_u6", "CRX"))
    },
    "hur_su4": Block(
        (
            ("U3", A, (0, 1, 2)),
            ("U3", B, (3, 4, 5)),
            ("CNOT", AB, ()),
            ("RY", A, (6,)),
            ("RZ", B, (7,)),
            ("CNOT", BA, ()),
            ("RY", A, (8,)),
            ("CNOT", AB, ()),
            ("U3", A, (9, 10, 11)),
            ("U3", B, (12, 13, 14)),
        )
    ),
}

# Poolings: wire a is dropped, wire b stays.
HUR_POOLINGS = {
    "pooling1": Block((("CRZ", AB, (0,)), ("X", A, ()), ("CRX", AB, (1,)))),
    # Written without an angle in takh04/QCNN, where it cannot run; here the angle is a weight.
    "pooling2": Block((("CRZ", AB, (0,)),)),
    "pooling3": Block((("CRot", AB, (0, 1, 2)),)),
}

# Vatan & Williams' N(alpha, beta, gamma), the angles of its rotations as weights.
_N_WITHOUT_END = (
    ("RZ", B, (-pi / 2,)),
    ("CNOT", BA, ()),
    ("RZ", A, (0,)),
    ("RY", B, (1,)),
    ("CNOT", AB, ()),
    ("RY", B, (2,)),
)
VATAN_WILLIAMS = Block((*_N_WITHOUT_END, ("CNOT", BA, ()), ("RZ", A, (pi / 2,))))
VATAN_WILLIAMS_POOL = Block(_N_WITHOUT_END)

_XYZ = ("RX", "RY", "RZ")


def _bases(first: int) -> tuple[Part, ...]:
    """RX RY RZ on either wire, with the weights from `first` on."""
    return tuple((gate, wire, (first + 3 * wire[0] + k,)) for wire in (A, B) for k, gate in enumerate(_XYZ))


# TensorFlow Quantum's tutorial; an exponent t there is an angle pi t here.
CIRQ = Block((*_bases(0), ("RZZ", AB, (6,)), ("RYY", AB, (7,)), ("RXX", AB, (8,)), *_bases(9)))

CONG = Block(
    (
        ("RXX", AB, (0,)),
        ("RYY", AB, (1,)),
        ("RZZ", AB, (2,)),
        ("U3", A, (3, 4, 5)),
        ("U3", B, (6, 7, 8)),
    )
)
# The second of two wires controls the first, and is dropped.
CONG_POOL = Block((("CU3", BA, (0, 1, 2)),))


def ends_and_bricks(wires: Sequence[int]) -> list[Pair]:
    """Hur, Kim & Park's layer: (first, last), the pairs from even places on, those from odd ones."""
    even, odd = bricks(wires)
    ends = [(wires[0], wires[-1])] if len(wires) > 2 else []
    return ends + even + odd


def ring_of_bricks(wires: Sequence[int]) -> list[Pair]:
    """Qiskit's and TensorFlow Quantum's layer: pairs from even places, from odd places, the last with the first.

    As there, the last pair exists for an even number of wires, and two wires meet twice, in both orders.
    """
    even, odd = bricks(wires)
    return even + odd + ([(wires[-1], wires[0])] if len(wires) % 2 == 0 else [])


def _convolution(block: Block, wires: int, depth: int, *, shared: Shared = True) -> Circuit:
    made = Builder(wires)
    for _ in range(depth):
        made.tile(block, ends_and_bricks(range(wires)), shared)
    return made.circuit()


def _vatan_williams(wires: int, depth: int, *, shared: Shared = False) -> Circuit:
    made = Builder(wires)
    for _ in range(depth):
        made.tile(VATAN_WILLIAMS, ring_of_bricks(range(wires)), shared)
    return made.circuit()


# Poolings: which of the wires are dropped, and which stay.
Split = Callable[[Sequence[int]], tuple[Sequence[int], Sequence[int]]]


def _odd_places(wires: Sequence[int]) -> tuple[Sequence[int], Sequence[int]]:
    return wires[1::2], wires[0::2]


def _odd_places_but_the_first_of_two(wires: Sequence[int]) -> tuple[Sequence[int], Sequence[int]]:
    return (wires[:1], wires[1:]) if len(wires) == 2 else _odd_places(wires)


def _first_half(wires: Sequence[int]) -> tuple[Sequence[int], Sequence[int]]:
    half = len(wires) // 2
    return wires[:half], wires[half:]


def _left(split: Split, wires: int, depth: int) -> tuple[int, ...]:
    """Wires that are left after `depth` poolings, or once one is left."""
    left: Sequence[int] = range(wires)
    for _ in range(depth):
        if len(left) > 1:
            left = split(left)[1]
    return tuple(left)


def _hur_qcnn(
    wires: int,
    depth: int,
    *,
    convolution: Annotated[str, one_of(HUR_BLOCKS, "the convolution's block")] = "hur_su4",
    pooling: Annotated[str, one_of(HUR_POOLINGS, "the pooling's block")] = "pooling1",
) -> Circuit:
    def level(made: Builder, wires: Sequence[int], dropped: Sequence[int], kept: Sequence[int]) -> None:
        made.tile(HUR_BLOCKS[convolution], ends_and_bricks(wires), shared=True)
        made.tile(HUR_POOLINGS[pooling], zip(dropped, kept, strict=False), shared=True)

    return _levels(level, _odd_places_but_the_first_of_two, Builder(wires), depth)


def _cong_qcnn(wires: int, depth: int) -> Circuit:
    def level(made: Builder, wires: Sequence[int], dropped: Sequence[int], kept: Sequence[int]) -> None:
        even, odd = bricks(wires)
        made.tile(CONG, even + odd, shared=True)
        made.tile(CONG_POOL, zip(kept, dropped, strict=False), shared=True)

    made = Builder(wires)
    made.tile(Block((("U3", A, (0, 1, 2)), ("U3", B, (3, 4, 5)))), bricks(range(wires))[0], shared=True)
    return _levels(level, _odd_places, made, depth)


def _cirq_qcnn(wires: int, depth: int) -> Circuit:
    def level(made: Builder, wires: Sequence[int], dropped: Sequence[int], kept: Sequence[int]) -> None:
        made.tile(CIRQ, ring_of_bricks(wires), shared=True)
        weights = made.take(6)
        for source, sink in zip(dropped, kept, strict=False):
            for wire, own in ((sink, weights[:3]), (source, weights[3:])):
                for gate, angle in zip(_XYZ, own, strict=True):
                    made.add(gate, wire, angles=(angle,))
            made.add("CNOT", source, sink)
            for gate, angle in zip(reversed(_XYZ), reversed(weights[:3]), strict=True):
                made.add(gate, sink, angles=(angle.times(-1.0),))

    return _levels(level, _first_half, Builder(wires), depth)


def _qiskit_qcnn(wires: int, depth: int) -> Circuit:
    def level(made: Builder, wires: Sequence[int], dropped: Sequence[int], kept: Sequence[int]) -> None:
        made.tile(VATAN_WILLIAMS, ring_of_bricks(wires), shared=False)
        made.tile(VATAN_WILLIAMS_POOL, zip(dropped, kept, strict=False), shared=False)

    return _levels(level, _first_half, Builder(wires), depth)


def _levels(
    level: Callable[[Builder, Sequence[int], Sequence[int], Sequence[int]], None],
    split: Split,
    made: Builder,
    depth: int,
) -> Circuit:
    """Convolution and pooling, depth times or until one wire is left."""
    left: Sequence[int] = range(made.wires)
    for _ in range(depth):
        if len(left) > 1:
            dropped, kept = split(left)
            level(made, left, dropped, kept)
            left = kept
    return made.circuit()


_HUR = "Hur, Kim & Park, Quantum convolutional neural network for classical data classification (arXiv:2108.00661)"

CONVOLUTIONAL = {
    **{
        name: Ansatz(
            partial(_convolution, block),
            True,
            f"Convolution block {name.removeprefix('hur_').removeprefix('u').upper()} of {_HUR}, gates as in "
            "takh04/QCNN: a layer puts it, with shared weights, on (first, last), on the pairs from even places and on "
            "those from odd ones",
            # Real states give controlled RX and RZ no slope at 0: started there, they would stay.
            initial="uniform" if name in ("hur_u13", "hur_u14") else "near_identity",
            weights=f"{block.n_weights}*d",
            least_wires=2,
        )
        for name, block in HUR_BLOCKS.items()
    },
    "hur_qcnn": Ansatz(
        _hur_qcnn,
        True,
        f"{_HUR}, as in takh04/QCNN: depth times a convolution layer (options: any hur_ block) and one of three "
        "poolings of pairs (1, 0), (3, 2), ..., where even places stay, but of the last two wires the second: on 8 "
        "wires that is wire 4. Weights are shared in a layer. Pooling 2 has no angle there and cannot run: its angle "
        "is a weight here",
        weights="17*min(d, (n - 1).bit_length())",
        least_wires=2,
        root=partial(_left, _odd_places_but_the_first_of_two),
    ),
    "cong_qcnn": Ansatz(
        _cong_qcnn,
        True,
        "Cong, Choi & Lukin, Quantum convolutional neural networks (arXiv:1810.03787), in the form of DeepQuantum's "
        "QuantumConvolutionalNeuralNetwork: U3 layers, then depth times RXX RYY RZZ U3 U3 on neighbors and CU3 as "
        "pooling onto even places; its last gate, any unitary on the wires left, is not here",
        weights="6 + 12*min(d, (n - 1).bit_length())",
        least_wires=2,
        root=partial(_left, _odd_places),
    ),
    "cirq_qcnn": Ansatz(
        _cirq_qcnn,
        True,
        "Cong, Choi & Lukin (arXiv:1810.03787) in the form of TensorFlow Quantum's tutorial: 15 weights a convolution "
        "layer, 6 a pooling onto the second half of the wires. Public copies disagree: some read one weight twice and "
        "another never",
        weights="21*min(d, (n - 1).bit_length())",
        least_wires=2,
        root=partial(_left, _first_half),
    ),
    "vatan_williams": Ansatz(
        _vatan_williams,
        True,
        "N(alpha, beta, gamma) of Vatan & Williams, Optimal quantum circuits for general two-qubit gates "
        "(quant-ph/0308006), figure 6, on the ring of pairs of Qiskit's QCNN tutorial, each with its own weights",
        weights="3*d*(n - n % 2)",
        least_wires=2,
    ),
    "qiskit_qcnn": Ansatz(
        _qiskit_qcnn,
        True,
        "Qiskit's QCNN tutorial: depth times Vatan & Williams' block on a ring of pairs and, without its last two "
        "gates, as pooling onto the second half of the wires. No weights are shared there, though its text says so",
        weights="9*(n - 1 - ((n - 1) >> d))",
        least_wires=2,
        root=partial(_left, _first_half),
    ),
}
