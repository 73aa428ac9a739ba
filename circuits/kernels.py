"""Quantum convolution kernels by name: encoding + ansatz + readout."""

from collections.abc import Sequence

from circuits.ansatze.library import ANSATZE, ansatz, find_ansatz
from circuits.circuit import Circuit
from circuits.encodings import encode, find_encoding


def kernel_names() -> tuple[str, ...]:
    """Names that `kernel` and `QuantumConv2d(kernel=...)` take."""
    return tuple(ANSATZE)


def kernel_citation(name: str) -> str:
    """Where a named kernel comes from.

    Raises:
        ValueError: For an unknown name, with the nearest valid one.
    """
    return find_ansatz(name).citation


def kernel_entangles(name: str) -> bool:
    """Whether a named kernel has gates on two wires.

    Raises:
        ValueError: For an unknown name, with the nearest valid one.
    """
    return find_ansatz(name).entangles


def readout_observables(readout: str | Sequence[str], wires: int) -> tuple[str, ...]:
    """Pauli strings of a readout.

    Args:
        readout: "z" (Z of every wire), one Pauli string, or a list of them, each with one letter a wire.
        wires: Number of qubits.

    Raises:
        ValueError: For a name that is neither "z" nor a Pauli string.
    """
    if readout == "z":
        return tuple("I" * wire + "Z" + "I" * (wires - wire - 1) for wire in range(wires))
    strings = (readout,) if isinstance(readout, str) else tuple(readout)
    if not strings:
        raise ValueError('readout is an empty list: give "z" or at least one Pauli string such as "ZZII"')
    for text in strings:
        if not text or set(text) - set("IXYZ"):
            raise ValueError(f"readout {text!r} is neither 'z' nor a Pauli string: give {wires} letters of I, X, Y, Z")
    # Lengths are checked by Circuit, which knows them best.
    return strings


def kernel(
    name: str,
    wires: int,
    depth: int = 2,
    encoding: str = "angle",
    readout: str | Sequence[str] = "z",
    *,
    features: int | None = None,
    seed: int = 0,
    entangle: bool = True,
    **options: object,
) -> Circuit:
    """A named quantum convolution kernel.

    Args:
        name: An ansatz of `kernel_names()`.
        wires: Number of qubits, at least 1.
        depth: Layers of the ansatz, at least 1.
        encoding: How features enter: "angle" is RY(pi x), one feature a wire.
        readout: "z" for the expectation of Z on every wire, or Pauli strings, wire 0 first.
        features: Features of a patch; as many as the encoding holds on these wires by default.
        seed: Draws the structure of a random ansatz.
        entangle: False for the kernel's control: the same ansatz without gates on several wires and their weights.
        options: What the ansatz takes besides, such as ranges=(1, 2) of "strongly_entangling"; see
            `circuits.ansatz_options`.

    Returns:
        A Circuit with inputs 0 to features - 1, weights from 0 on, and the readout as observables.

    Raises:
        ValueError: For unknown names or options, or features that the wires do not hold.
    """
    block = ansatz(name, wires, depth, seed, entangle=entangle, **options)
    n_features = find_encoding(encoding).capacity(wires) if features is None else features
    return (encode(encoding, n_features, wires) + block).with_observables(readout_observables(readout, wires))
