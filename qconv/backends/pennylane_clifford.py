"""Gates with angles on a device of Clifford gates: their Pauli rotations must turn by multiples of pi/2."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from math import pi

import pennylane as qml

from circuits.circuit import Circuit, Gate
from circuits.gates import AMPLITUDE
from circuits.interop import apply_in_pennylane
from qconv.backends.clifford import TOLERANCE
from qconv.backends.protocol import Unsupported


def turn_to_z(letter: str, wire: int) -> None:
    """Queue what makes a Pauli on a wire Z."""
    if letter == "Y":
        qml.adjoint(qml.S(wire))
    if letter in "XY":
        qml.Hadamard(wire)


def turn_from_z(letter: str, wire: int) -> None:
    """Queue what undoes `turn_to_z`."""
    if letter in "XY":
        qml.Hadamard(wire)
    if letter == "Y":
        qml.S(wire)


def apply_clifford(circuit: Circuit, values: Sequence[float]) -> None:
    """Queue a circuit as Clifford gates, up to its global phase.

    Args:
        circuit: Its gates are applied to wires 0 to n_wires - 1.
        values: One number for each angle of each gate in order.

    Raises:
        Unsupported: For a gate whose Pauli rotations are no multiples of pi/2, or a state preparation.
    """
    remaining = iter(values)
    for position, gate in enumerate(circuit.gates):
        if gate.name == AMPLITUDE:
            raise Unsupported(
                "amplitude encoding prepares no stabilizer state but a device of Clifford gates was asked: use device "
                "'default.qubit'"
            )
        angles = [next(remaining) for _ in gate.angles]
        if not angles:
            apply_in_pennylane(replace(circuit, gates=(gate,)), [])
        for rotation in gate.spec.rotations:
            quarters = rotation.factor * angles[rotation.angle] / (pi / 2)
            if abs(quarters - round(quarters)) * pi / 2 > TOLERANCE:
                raise Unsupported(
                    f"gate {position} ({gate.name} on wires {gate.wires}) has the angle {angles[rotation.angle]:.6g} "
                    "but a device of Clifford gates turns by multiples of pi/2 (controlled gates by multiples of pi) "
                    "alone: give such features and weights, or use device 'default.qubit'"
                )
            _rotate(gate, rotation.pauli, round(quarters) % 4)


def _rotate(gate: Gate, pauli: str, quarters: int) -> None:
    """Queue exp(-i quarters pi P / 4), which is a power of S on the parity of the wires in the eigenbasis of P."""
    if quarters == 0:
        return
    on = [(letter, wire) for letter, wire in zip(pauli, gate.wires, strict=True) if letter != "I"]
    for letter, wire in on:
        turn_to_z(letter, wire)
    for (_, wire), (_, following) in pairwise(on):
        qml.CNOT([wire, following])
    last = on[-1][1]
    if quarters == 2:
        qml.Z(last)
    else:
        qml.S(last) if quarters == 1 else qml.adjoint(qml.S(last))
    for (_, wire), (_, following) in reversed(list(pairwise(on))):
        qml.CNOT([wire, following])
    for letter, wire in on:
        turn_from_z(letter, wire)
