"""All ansaetze by name, and how one is built."""

from collections.abc import Sequence
from dataclasses import replace

from circuits.ansatze.builder import Ansatz
from circuits.ansatze.convolutional import CONVOLUTIONAL
from circuits.ansatze.drawn import DRAWN
from circuits.ansatze.layered import LAYERED
from circuits.ansatze.sim import SIM
from circuits.ansatze.smaldone import SMALDONE
from circuits.ansatze.trees import TREES
from circuits.circuit import Circuit, Gate
from circuits.naming import unknown
from circuits.options import check_options, is_flag, is_whole, option_defaults, option_values

ANSATZE: dict[str, Ansatz] = LAYERED | DRAWN | SIM | CONVOLUTIONAL | TREES | SMALDONE


def find_ansatz(name: str) -> Ansatz:
    """The ansatz of that name.

    Raises:
        ValueError: For an unknown name, with the nearest valid one.
    """
    if name not in ANSATZE:
        raise unknown("kernel", name, ANSATZE)
    return ANSATZE[name]


def ansatz_options(name: str) -> dict[str, object]:
    """Options that a named ansatz takes besides wires and depth, with their defaults; see `ansatz_option_values`.

    Raises:
        ValueError: For an unknown name, with the nearest valid one.
    """
    return option_defaults(find_ansatz(name).build)


def ansatz_option_values(name: str) -> dict[str, str]:
    """What each option of a named ansatz takes, in words; `qconv kernels NAME` prints them.

    Raises:
        ValueError: For an unknown name, with the nearest valid one.
    """
    return option_values(find_ansatz(name).build)


def check_sizes(name: str, wires: object, depth: object) -> None:
    """Raise a ValueError unless wires and depth of a named kernel are whole numbers of at least 1."""
    if not all(is_whole(size) and size >= 1 for size in (wires, depth)):  # type: ignore[operator]
        raise ValueError(
            f"kernel {name!r} was given {wires!r} wires and depth {depth!r}: both must be whole numbers of at least 1"
        )


def check_flag(name: str, option: str, value: object) -> None:
    """Raise a ValueError unless an option of a named kernel is True or False."""
    if not is_flag(value):
        raise ValueError(f"kernel {name!r} was given {option}={value!r}: give True or False")


def ansatz(
    name: str, wires: int, depth: int = 2, seed: int = 0, *, entangle: bool = True, **options: object
) -> Circuit:
    """A named trainable block.

    Args:
        name: An ansatz's name.
        wires: Number of qubits, at least 1; 2 where there is nothing to see on one.
        depth: Number of layers, at least 1. Networks that pool stop when one wire is left.
        seed: Draws the structure of a random one, at least 0; the others do not depend on it.
        entangle: False for its control, see `without_entanglement`.
        options: What this ansatz takes besides, see `ansatz_option_values`.

    Raises:
        ValueError: For an unknown name or option, a value that an option does not take, or too few wires or layers.
    """
    found = find_ansatz(name)
    check_sizes(name, wires, depth)
    check_flag(name, "entangle", entangle)
    if not is_whole(seed) or seed < 0:
        raise ValueError(f"kernel {name!r} was given seed {seed!r}: give a whole number of at least 0")
    if wires < found.least_wires:
        raise ValueError(f"kernel {name!r} was given {wires} wire: it needs at least {found.least_wires}")
    check_options(f"kernel {name!r}", found.build, options)
    if "seed" in ansatz_options(name):
        options["seed"] = seed
    circuit = found.build(wires, depth, **options)
    return circuit if entangle else without_entanglement(circuit)


def without_entanglement(circuit: Circuit) -> Circuit:
    """A circuit's control: the same without its gates on several wires, and without the weights that only they had.

    A power of CNOT (CP between two H on its target) leaves RX by the same angle on its target, which it is where its
    control is 1: kernels of powers alone would have no weights left.

    Args:
        circuit: Any circuit; a state preparation stays, whatever it entangles.

    Returns:
        The weights that are left keep their order and are numbered anew.

    Raises:
        ValueError: For a circuit of features whose readout would see none of them, such as one of an ancilla.
    """
    kept = tuple(gate for gate in _powers_opened(circuit.gates) if len(gate.wires) == 1 or gate.spec.n_wires is None)
    seen = {wire for gate in kept if gate.depends_on("input") for wire in gate.wires}
    read = {wire for text in circuit.observables for wire, letter in enumerate(text) if letter != "I"}
    if circuit.n_inputs and read and not seen & read:
        raise ValueError(
            f"circuit reads out the wires {sorted(read)} but without gates on several wires features are on "
            f"{sorted(seen)}: its control would be constant, so take that of a kernel that reads the features' wires"
        )
    used = sorted({angle.index for gate in kept for angle in gate.angles if angle.source == "weight"})
    number = {index: k for k, index in enumerate(used)}
    gates = (
        replace(
            gate,
            angles=tuple(
                replace(angle, index=number[angle.index]) if angle.source == "weight" else angle
                for angle in gate.angles
            ),
        )
        for gate in kept
    )
    return replace(circuit, gates=tuple(gates))


def _powers_opened(gates: Sequence[Gate]) -> list[Gate]:
    """Gates, each power of CNOT as RX on its target."""
    opened: list[Gate] = []
    k = 0
    while k < len(gates):
        three = gates[k : k + 3]
        if [gate.name for gate in three] == ["H", "CP", "H"] and three[0].wires == three[2].wires == three[1].wires[1:]:
            opened.append(Gate("RX", three[0].wires, three[1].angles))
            k += 3
        else:
            opened.append(gates[k])
            k += 1
    return opened
