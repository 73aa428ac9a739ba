"""Quantum convolution kernels by name: encoding + ansatz + readout."""

from collections.abc import Sequence

from circuits.ansatze.library import ANSATZE, ansatz, check_flag, check_sizes, find_ansatz
from circuits.circuit import Circuit, Gate
from circuits.encodings import encode, find_encoding
from circuits.gates import AMPLITUDE
from circuits.readouts import ROOT, Readout, find_readout


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


def kernel_readout(
    name: str, readout: str | Sequence[str], wires: int, depth: int = 2, *, reupload: bool = False
) -> Readout:
    """The readout of a named kernel: as `find_readout`, or "root" for Z of each wire that it does not discard.

    Raises:
        ValueError: As `find_readout`, and for "root" of a kernel that discards no wires.
    """
    if not isinstance(readout, str) or readout != ROOT:
        return find_readout(readout, wires)
    root = find_ansatz(name).root
    if root is None:
        rooted = ", ".join(each for each, found in ANSATZE.items() if found.root is not None)
        raise ValueError(
            f"readout 'root' reads the wires that a kernel does not discard, but {name!r} discards none: give 'z', or "
            f"one of the kernels {rooted}"
        )
    # Uploads between layers make each layer a network of its own.
    left = root(wires, 1 if reupload else depth)
    return find_readout(["I" * wire + "Z" + "I" * (wires - 1 - wire) for wire in left], wires)


def kernel(
    name: str,
    wires: int,
    depth: int = 2,
    encoding: str | Circuit = "angle",
    readout: str | Sequence[str] = "z",
    *,
    features: int | None = None,
    seed: int = 0,
    entangle: bool = True,
    reupload: bool = False,
    **options: object,
) -> Circuit:
    """A named quantum convolution kernel.

    Args:
        name: An ansatz of `kernel_names()`.
        wires: Number of qubits, at least 1.
        depth: Layers of the ansatz, at least 1.
        encoding: How features enter: a name of `encoding_names()` ("angle" is RY(pi x), one feature a wire), or a
            Circuit such as encode("zz", 4, entanglement="linear").
        readout: "z" for the expectation of Z on every wire, or another of `find_readout`; of a readout that maps
            expectation values further, the Pauli strings that it needs. Networks that discard wires ("hur_qcnn", "ttn"
            ...) also have "root": Z of the wires that are left, which their papers read.
        features: Features of a patch; as many as the encoding holds on these wires by default.
        seed: Draws the structure of a random ansatz.
        reupload: Whether the encoding is repeated before each of the `depth` layers, each the ansatz of depth 1 with
            weights of its own (Pérez-Salinas et al., arXiv:1907.02085); else it stands once, before an ansatz of
            `depth` layers. A layer that starts and ends with rotations then has both.
        entangle: False for the kernel's control: the same ansatz without gates on several wires and their weights (see
            `circuits.without_entanglement`). The encoding stays as it is: "iqp", "zz", "frqi", "neqr" and "amplitude"
            entangle the wires themselves, so a control without any entanglement wants another encoding.
        options: What the ansatz takes besides, such as ranges=(1, 2) of "strongly_entangling"; see
            `circuits.ansatz_option_values`.

    Returns:
        A Circuit with inputs 0 to features - 1, weights from 0 on, and the readout as observables.

    Raises:
        ValueError: For unknown names or options, values that these do not take, or features that the wires do not hold.
    """
    check_sizes(name, wires, depth)
    check_flag(name, "reupload", reupload)
    encoder = _encoder(encoding, wires, features)
    strings = kernel_readout(name, readout, wires, depth, reupload=reupload).observables
    if not reupload:
        block = ansatz(name, wires, depth, seed, entangle=entangle, **options)
        return (encoder + block).with_observables(strings)
    if encoder.gates and encoder.gates[0].name == AMPLITUDE:
        raise ValueError("encoding 'amplitude' prepares a state, which cannot be repeated: encode by rotations")
    return interleaved([encoder] * depth, name, 1, seed, entangle=entangle, **options).with_observables(strings)


def interleaved(
    encoders: Sequence[Circuit], name: str, depth: int, seed: int = 0, *, entangle: bool = True, **options: object
) -> Circuit:
    """Encodings one after another, each followed by the ansatz with weights of its own.

    Args:
        encoders: Circuits of equally many wires that read no weights.
        name: An ansatz of `kernel_names()`.
        depth: Layers of each ansatz.
        seed: As of `kernel`; a random ansatz has the same structure each time.
        entangle: As of `kernel`.
        options: As of `kernel`.

    Raises:
        ValueError: For no encoding, or what `kernel` refuses.
    """
    if not encoders:
        raise ValueError("there are 0 encodings to repeat: give a depth of at least 1")
    block = ansatz(name, encoders[0].n_wires, depth, seed, entangle=entangle, **options)
    gates: list[Gate] = []
    for k, encoder in enumerate(encoders):
        gates += [*encoder.gates, *block.shift_weights(k * block.n_weights).gates]
    return Circuit(block.n_wires, tuple(gates))


def _encoder(encoding: str | Circuit, wires: int, features: int | None) -> Circuit:
    if not isinstance(encoding, Circuit):
        return encode(encoding, find_encoding(encoding).capacity(wires) if features is None else features, wires)
    if encoding.n_wires != wires or encoding.n_weights or features not in (None, encoding.n_inputs):
        raise ValueError(
            f"encoding has {encoding.n_wires} wires, {encoding.n_inputs} features and {encoding.n_weights} weights but "
            f"the kernel has {wires} wires{'' if features is None else f' and {features} features'}: make them equal, "
            "and read no weights"
        )
    return encoding
