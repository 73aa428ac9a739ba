"""Encodings: how the features of a patch become angles or amplitudes of a circuit."""

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, log2, pi
from typing import Annotated

from circuits.ansatze.layered import Entanglement, entanglers
from circuits.circuit import Angle, Circuit, Gate, computed
from circuits.features import Factor, Product
from circuits.gates import AMPLITUDE
from circuits.naming import unknown
from circuits.options import check_options, is_whole, number, option_defaults, option_values, whole_number


@dataclass(frozen=True)
class Encoding:
    """A way to put features on wires.

    Args:
        build: (n_features, n_wires, options by keyword) -> the encoding circuit, which reads input 0 to n_features - 1.
        wires: (n_features, options) -> wires it needs.
        capacity: (n_wires, options) -> the most features that fit.
        range: What values of a feature mean, and which are taken.
        source: Where it comes from.
        again: Whether it may follow other gates, as in re-uploading.
        powers: Whether the number of features must be a power of 2.
    """

    build: Callable[..., Circuit]
    wires: Callable[..., int]
    capacity: Callable[..., int]
    range: str
    source: str
    again: bool = True
    powers: bool = False


def _angle(*names: str) -> Callable[[int, int], Circuit]:
    def build(n_features: int, n_wires: int) -> Circuit:
        gates = []
        for feature in range(n_features):
            for name in names:
                angles = (Angle("input", feature, pi),) if name.startswith("R") else ()
                gates.append(Gate(name, (feature,), angles))
        return Circuit(n_wires, tuple(gates))

    return build


def _dense_angle(n_features: int, n_wires: int) -> Circuit:
    gates = (Gate(("RX", "RY")[k % 2], (k // 2,), (Angle("input", k, pi),)) for k in range(n_features))
    return Circuit(n_wires, tuple(gates))


# Types of options.
Threshold = Annotated[float, number("a number: features above it are |1>")]
Reps = Annotated[int, whole_number(1, "how often all is repeated")]
Scale = Annotated[float, number("a number: radians a unit of a feature")]
Bits = Annotated[int, whole_number(1, "of a gray value, which has 2^bits levels")]


def _threshold(n_features: int, n_wires: int, *, threshold: Threshold = 0.5) -> Circuit:
    # RY, not X or RX: it takes |0> to |1> without a phase, and by an angle that a step can switch off.
    gates = (Gate("RY", (k,), (computed({(Factor(k, "step", (threshold,)),): pi}),)) for k in range(n_features))
    return Circuit(n_wires, tuple(gates))


def _arcsin(n_features: int, n_wires: int) -> Circuit:
    gates: list[Gate] = []
    for k in range(n_features):
        gates.append(Gate("RY", (k,), (computed({(Factor(k, "arcsin"),): 1.0}),)))
        gates.append(Gate("RZ", (k,), (computed({(Factor(k, "arccos_square"),): 1.0}),)))
    return Circuit(n_wires, tuple(gates))


def _iqp(
    n_features: int, n_wires: int, *, reps: Reps = 1, entanglement: Entanglement = "full", scale: Scale = 1.0
) -> Circuit:
    gates: list[Gate] = []
    for layer in range(reps):
        for k in range(n_features):
            gates += [Gate("H", (k,)), Gate("RZ", (k,), (Angle("input", k, scale),))]
        for a, b in entanglers(entanglement, n_features, layer):
            gates.append(Gate("RZZ", (a, b), (computed({(Factor(a), Factor(b)): scale**2}),)))
    return Circuit(n_wires, tuple(gates))


def _zz(
    n_features: int, n_wires: int, *, reps: Reps = 2, entanglement: Entanglement = "full", scale: Scale = 1.0
) -> Circuit:
    gates: list[Gate] = []
    for layer in range(reps):
        gates += [Gate("H", (k,)) for k in range(n_features)]
        gates += [Gate("P", (k,), (Angle("input", k, 2 * scale),)) for k in range(n_features)]
        for a, b in entanglers(entanglement, n_features, layer):
            # 2 (pi - scale x_a) (pi - scale x_b), written out.
            single = -2 * pi * scale
            terms: dict[Product, float] = {(Factor(a), Factor(b)): 2 * scale**2}
            terms |= {(Factor(a),): single, (Factor(b),): single}
            turn = Gate("P", (b,), (computed(terms, 2 * pi**2),))
            gates += [Gate("CNOT", (a, b)), turn, Gate("CNOT", (a, b))]
    return Circuit(n_wires, tuple(gates))


def _amplitude(n_features: int, n_wires: int) -> Circuit:
    features = tuple(Angle("input", k) for k in range(n_features))
    return Circuit(n_wires, (Gate(AMPLITUDE, tuple(range(n_wires)), features),))


def _selected_ry(target: int, address: list[int], factors: list[Factor]) -> list[Gate]:
    """RY(pi f_i) on the target where the address wires read i, the first its most significant bit."""
    size, bits = len(factors), len(address)
    gates: list[Gate] = []
    for step in range(size):
        gray, following = step ^ step >> 1, (step + 1) % size
        # Between CNOTs on the bits of `gray`, a turn by a adds (-1)^(i . gray) a: an inverse Walsh transform.
        terms: dict[Product, float] = {
            (factor,): pi / size * (-1) ** (i & gray).bit_count() for i, factor in enumerate(factors)
        }
        gates.append(Gate("RY", (target,), (computed(terms),)))
        flipped = gray ^ following ^ following >> 1
        if flipped:
            gates.append(Gate("CNOT", (address[bits - flipped.bit_length()], target)))
    return gates


def _frqi(n_features: int, n_wires: int) -> Circuit:
    address = list(range(1, 1 + _bits_of(n_features)))
    gates = [Gate("H", (wire,)) for wire in address]
    gates += _selected_ry(0, address, [Factor(k) for k in range(n_features)])
    return Circuit(n_wires, tuple(gates))


def _neqr(n_features: int, n_wires: int, *, bits: Bits = 4) -> Circuit:
    address = list(range(bits, bits + _bits_of(n_features)))
    gates = [Gate("H", (wire,)) for wire in address]
    for wire in range(bits):
        factors = [Factor(k, "bit", (bits - 1 - wire, bits)) for k in range(n_features)]
        gates += _selected_ry(wire, address, factors)
    return Circuit(n_wires, tuple(gates))


def _bits_of(n_features: int) -> int:
    return n_features.bit_length() - 1


def _one_a_wire(build: Callable[..., Circuit], range: str, source: str) -> Encoding:
    def wires(features: int, **options: object) -> int:
        return features

    return Encoding(build, wires, wires, range, source)


def _turning(build: Callable[[int, int], Circuit], axis: str) -> Encoding:
    return _one_a_wire(
        build,
        f"x in [0, 1] turns a qubit by pi x about {axis}; any real x is valid, with period 2",
        "Schuld & Petruccione, Machine Learning with Quantum Computers, section 3.2.2 (angle encoding)",
    )


_RY = _turning(_angle("RY"), "Y, from |0> at 0 to |1> at 1")

ENCODINGS: dict[str, Encoding] = {
    "angle": _RY,
    "angle_y": _RY,
    "angle_x": _turning(_angle("RX"), "X, from |0> at 0 to |1> at 1"),
    # RZ leaves |0> as it is: without the Hadamard the feature would be invisible.
    "angle_z": _turning(_angle("H", "RZ"), "Z, along the equator from |+>"),
    "dense_angle": Encoding(
        _dense_angle,
        wires=lambda features: ceil(features / 2),
        capacity=lambda wires: 2 * wires,
        range="x in [0, 1]: features 2k and 2k + 1 turn wire k by pi x about X, then Y; any real x is valid, with "
        "period 2",
        source="two features a wire as in Hur, Kim & Park (arXiv:2108.00661), whose public code pairs feature k with "
        "k + n/2 instead; LaRose & Coyle (arXiv:2003.01695) for the name",
    ),
    "arcsin": _one_a_wire(
        _arcsin,
        "x in [-1, 1], others are refused: RY(arcsin x), then RZ(arccos x^2), so <X> and <Z> are algebraic in x. The "
        "slope at the ends, which is infinite, is given as 0",
        "Mitarai, Negoro, Kitagawa & Fujii, Quantum circuit learning (arXiv:1803.00745), section III",
    ),
    "threshold": _one_a_wire(
        _threshold,
        "x above the option threshold (0.5) is |1>, else |0>; any real x is valid. The slope in x is 0",
        "Henderson et al., Quanvolutional neural networks (arXiv:1904.04767): basis encoding of bits",
    ),
    "iqp": _one_a_wire(
        _iqp,
        "any real x: RZ(s x_j) after H on each wire and RZZ(s^2 x_j x_k) on pairs, with s the option scale (1), in "
        "radians a unit of x",
        "Havlicek et al. (arXiv:1804.11326) in the form of PennyLane's IQPEmbedding: options reps (1), entanglement "
        '("full", or as in `ansatze.layered.ENTANGLEMENTS`)',
    ),
    "zz": _one_a_wire(
        _zz,
        "any real x: P(2 s x_j) after H on each wire and, between CNOTs, P(2 (pi - s x_j) (pi - s x_k)) on pairs, with "
        "s the option scale (1), in radians a unit of x; Havlicek et al. take s x from (0, 2 pi]",
        "Havlicek et al. (arXiv:1804.11326) as Qiskit's zz_feature_map: options reps (2), entanglement "
        '("full", or "linear", "circular" and the others of Qiskit)',
    ),
    "amplitude": Encoding(
        _amplitude,
        wires=lambda features: max(1, ceil(log2(features))),
        capacity=lambda wires: 2**wires,
        range="features are divided by their Euclidean norm and padded with zeros; zeros alone give |0...0>",
        source="Schuld & Petruccione, Machine Learning with Quantum Computers, section 3.2.1 (amplitude encoding)",
        again=False,
    ),
    "frqi": Encoding(
        _frqi,
        wires=lambda features: 1 + max(0, ceil(log2(features))),
        capacity=lambda wires: 2 ** (wires - 1),
        range="x in [0, 1] is the color cos(pi x / 2)|0> + sin(pi x / 2)|1> of wire 0 at the pixel's position, which "
        "the other wires hold in superposition, row before column; any real x is valid, with period 2 in <Z>",
        source="Le, Dong & Hirota, A flexible representation of quantum images, Quantum Inf. Process. 10, 63 (2011); "
        "gates as in Möttönen et al. (quant-ph/0404089): one RY and one CNOT a pixel",
        powers=True,
    ),
    "neqr": Encoding(
        _neqr,
        wires=lambda features, bits=4: bits + max(0, ceil(log2(features))),
        capacity=lambda wires, bits=4: 2 ** max(0, wires - bits),
        range="x in [0, 1], others are refused: the first wires hold the bits of round(x (2^bits - 1)), the most "
        "significant first, the others the position, row before column. Option bits (4; the paper's gray values have "
        "8). The slope in x is 0",
        source="Zhang, Lu, Gao & Wang, NEQR: a novel enhanced quantum representation of digital images, Quantum Inf. "
        "Process. 12, 2833 (2013); gates as in Möttönen et al. (quant-ph/0404089): one RY and one CNOT a bit and pixel",
        powers=True,
    ),
}


def encoding_names() -> tuple[str, ...]:
    """Names that `kernel(encoding=...)` takes."""
    return tuple(ENCODINGS)


def find_encoding(name: str) -> Encoding:
    """The encoding of that name.

    Raises:
        ValueError: For an unknown name, with the nearest valid one.
    """
    if name not in ENCODINGS:
        raise unknown("encoding", name, ENCODINGS)
    return ENCODINGS[name]


def encoding_options(name: str) -> dict[str, object]:
    """Options that `encode` takes for a named encoding, with their defaults; see `encoding_option_values`.

    Raises:
        ValueError: For an unknown name, with the nearest valid one.
    """
    return option_defaults(find_encoding(name).build)


def encoding_option_values(name: str) -> dict[str, str]:
    """What each option of a named encoding takes, in words.

    Raises:
        ValueError: For an unknown name, with the nearest valid one.
    """
    return option_values(find_encoding(name).build)


def encode(name: str, n_features: int, n_wires: int | None = None, **options: object) -> Circuit:
    """The circuit that encodes `n_features` features.

    Args:
        name: An encoding's name.
        n_features: Features of a patch, at least 1; feature k is input k of the circuit.
        n_wires: Wires of the circuit; as many as the encoding needs by default.
        options: What this encoding takes besides, see `encoding_option_values`.

    Raises:
        ValueError: For an unknown name or option, a value that it does not take, no feature, features that no image
            has (of "frqi" and "neqr"), or wires that do not hold the features.
    """
    encoding = find_encoding(name)
    check_options(f"encoding {name!r}", encoding.build, options)
    for count, kind in ((n_features, "features"), (n_wires, "wires")):
        if count is not None and (not is_whole(count) or count < 1):
            raise ValueError(f"encoding {name!r} was given {count!r} {kind}: it needs at least 1, a whole number")
    if encoding.powers and n_features & (n_features - 1):
        raise ValueError(
            f"encoding {name!r} was given {n_features} features: it takes images of 2^k by 2^l pixels, so give a power "
            "of 2"
        )
    sizing = {key: value for key, value in options.items() if key == "bits"}
    needed = encoding.wires(n_features, **sizing)
    wires = needed if n_wires is None else n_wires
    if wires < needed:
        raise ValueError(
            f"encoding {name!r} holds {encoding.capacity(wires, **sizing)} features on {wires} wires but was given "
            f"{n_features}: use {needed} wires"
        )
    return encoding.build(n_features, wires, **options)
