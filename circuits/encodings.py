"""Encodings: how the features of a patch become angles or amplitudes of a circuit."""

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, log2, pi

from circuits.circuit import Angle, Circuit, Gate
from circuits.gates import AMPLITUDE
from circuits.naming import unknown


@dataclass(frozen=True)
class Encoding:
    """A way to put features on wires.

    Args:
        build: (n_features, n_wires) -> the encoding circuit, which reads input 0 to n_features - 1.
        wires: n_features -> wires it needs.
        capacity: n_wires -> the most features that fit.
        range: What values of a feature mean.
        source: Where it comes from.
    """

    build: Callable[[int, int], Circuit]
    wires: Callable[[int], int]
    capacity: Callable[[int], int]
    range: str
    source: str


def _angle(*names: str) -> Callable[[int, int], Circuit]:
    def build(n_features: int, n_wires: int) -> Circuit:
        gates = []
        for feature in range(n_features):
            for name in names:
                angles = (Angle("input", feature, pi),) if name.startswith("R") else ()
                gates.append(Gate(name, (feature,), angles))
        return Circuit(n_wires, tuple(gates))

    return build


def _amplitude(n_features: int, n_wires: int) -> Circuit:
    features = tuple(Angle("input", k) for k in range(n_features))
    return Circuit(n_wires, (Gate(AMPLITUDE, tuple(range(n_wires)), features),))


def _one_a_wire(build: Callable[[int, int], Circuit], axis: str) -> Encoding:
    return Encoding(
        build,
        wires=lambda features: features,
        capacity=lambda wires: wires,
        range=f"x in [0, 1] turns a qubit by pi x about {axis}; any real x is valid, with period 2",
        source="Schuld & Petruccione, Machine Learning with Quantum Computers, section 3.2.2 (angle encoding)",
    )


_RY = _one_a_wire(_angle("RY"), "Y, from |0> at 0 to |1> at 1")

ENCODINGS: dict[str, Encoding] = {
    "angle": _RY,
    "angle_y": _RY,
    "angle_x": _one_a_wire(_angle("RX"), "X, from |0> at 0 to |1> at 1"),
    # RZ leaves |0> as it is: without the Hadamard the feature would be invisible.
    "angle_z": _one_a_wire(_angle("H", "RZ"), "Z, along the equator from |+>"),
    "amplitude": Encoding(
        _amplitude,
        wires=lambda features: max(1, ceil(log2(features))),
        capacity=lambda wires: 2**wires,
        range="features are divided by their Euclidean norm and padded with zeros; zeros alone give |0...0>",
        source="Schuld & Petruccione, Machine Learning with Quantum Computers, section 3.2.1 (amplitude encoding)",
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


def encode(name: str, n_features: int, n_wires: int | None = None) -> Circuit:
    """The circuit that encodes `n_features` features.

    Args:
        name: An encoding's name.
        n_features: Features of a patch, at least 1; feature k is input k of the circuit.
        n_wires: Wires of the circuit; as many as the encoding needs by default.

    Raises:
        ValueError: For an unknown name, no feature, or wires that do not hold the features.
    """
    encoding = find_encoding(name)
    if n_features < 1:
        raise ValueError(f"encoding {name!r} was given {n_features} features: it needs at least 1")
    wires = encoding.wires(n_features) if n_wires is None else n_wires
    if encoding.capacity(wires) < n_features:
        raise ValueError(
            f"encoding {name!r} holds {encoding.capacity(wires)} features on {wires} wires but was given {n_features}: "
            f"use {encoding.wires(n_features)} wires"
        )
    return encoding.build(n_features, wires)
