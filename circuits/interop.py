"""Circuits handed to PennyLane and Qiskit. Those packages are imported inside the functions.

Qiskit counts qubits from the least significant bit and writes Pauli labels and bit strings from the most significant
one; our wire w is its qubit w, and `reversed_bits` is the one place that turns texts around.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from circuits.circuit import Circuit, Gate
from circuits.gates import AMPLITUDE
from circuits.noise import Channel, NoiseModel

if TYPE_CHECKING:
    from qiskit import QuantumCircuit

Real = NDArray[np.float64]

# Gate -> name of the operator in PennyLane; the inverses of S, T and SX are adjoints there.
_PENNYLANE = {
    "X": "PauliX",
    "Y": "PauliY",
    "Z": "PauliZ",
    "H": "Hadamard",
    "P": "PhaseShift",
    "CP": "ControlledPhaseShift",
    "RXX": "IsingXX",
    "RYY": "IsingYY",
    "RZZ": "IsingZZ",
}

# Gate -> name of the method of QuantumCircuit.
_QISKIT = {"P": "p", "CNOT": "cx", "U3": "u"}


def reversed_bits(text: str) -> str:
    """A Pauli string or bit string of ours as Qiskit writes it, and back."""
    return text[::-1]


def apply_in_pennylane(
    circuit: Circuit, values: Sequence[Any], state: Any = None, noise: NoiseModel | None = None
) -> None:
    """Queue a circuit's gates inside a PennyLane quantum function.

    Args:
        circuit: Its gates are applied to wires 0 to n_wires - 1.
        values: One value for each angle of each gate in order (state preparation left out), each a number or a
            batch of numbers.
        state: Amplitudes (..., 2**n_wires) for a circuit that starts with a state preparation.
        noise: Channels after gates; needs a device that runs them, such as default.mixed.
    """
    import pennylane as qml

    remaining = iter(values)
    for gate in circuit.gates:
        wires = list(gate.wires)
        if gate.name == AMPLITUDE:
            qml.StatePrep(state, wires=wires)
            continue
        arguments = [next(remaining) for _ in gate.angles]
        if gate.name.endswith("dg"):
            qml.adjoint(getattr(qml, gate.name.removesuffix("dg"))(wires=wires))
        else:
            getattr(qml, _PENNYLANE.get(gate.name, gate.name))(*arguments, wires=wires)
        if noise is not None:
            for channel in noise.channels_after(gate.name):
                for wire in wires:
                    qml.QubitChannel(list(channel.kraus()), wires=wire)


def pennylane_observable(text: str) -> Any:
    """A Pauli string as a PennyLane observable."""
    import pennylane as qml

    return qml.pauli.string_to_pauli_word(text)


def build_qiskit(circuit: Circuit, values: Sequence[Any], noise: NoiseModel | None = None) -> QuantumCircuit:
    """A circuit as a Qiskit QuantumCircuit, without measurements.

    Args:
        circuit: The circuit.
        values: One number or Parameter for each angle of each gate in order. A state preparation takes the first
            2**n_wires - 1 of them, the angles of `preparation_angles`.
        noise: Channels after gates, as Kraus instructions.
    """
    from qiskit import QuantumCircuit

    result = QuantumCircuit(circuit.n_wires)
    remaining = iter(values)
    for gate in circuit.gates:
        if gate.name == AMPLITUDE:
            for wire in range(circuit.n_wires):
                _uniformly_controlled_ry(result, list(range(wire)), wire, remaining)
            continue
        _append(result, gate, [next(remaining) for _ in gate.angles])
        if noise is not None:
            for channel in noise.channels_after(gate.name):
                for wire in gate.wires:
                    result.append(_kraus_instruction(channel), [wire])
    return result


def _append(target: QuantumCircuit, gate: Gate, values: list[Any]) -> None:
    if gate.name == "Rot":
        phi, theta, omega = values
        target.rz(phi, gate.wires[0])
        target.ry(theta, gate.wires[0])
        target.rz(omega, gate.wires[0])
    else:
        getattr(target, _QISKIT.get(gate.name, gate.name.lower()))(*values, *gate.wires)


def _kraus_instruction(channel: Channel) -> Any:
    from qiskit.quantum_info import Kraus

    return Kraus(list(channel.kraus())).to_instruction()


def _uniformly_controlled_ry(target: QuantumCircuit, controls: list[int], wire: int, values: Any) -> None:
    # RY(a) CX RY(b) CX is RY(a + b) or RY(a - b) as the control is 0 or 1.
    if not controls:
        target.ry(next(values), wire)
        return
    _uniformly_controlled_ry(target, controls[1:], wire, values)
    target.cx(controls[0], wire)
    _uniformly_controlled_ry(target, controls[1:], wire, values)
    target.cx(controls[0], wire)


def preparation_angles(amplitudes: Real) -> Real:
    """RY angles that prepare real amplitudes from |0...0> in the circuit that `build_qiskit` writes.

    Args:
        amplitudes: (R, 2**n), each row of norm 1, signs allowed.

    Returns:
        (R, 2**n - 1) in radians.

    Source: Möttönen, Vartiainen, Bergholm & Salomaa, Transformation of quantum states using uniformly controlled
        rotations (quant-ph/0407010), section II.
    """
    rows, size = amplitudes.shape
    wires = size.bit_length() - 1
    columns = []
    for wire in range(wires):
        blocks = amplitudes.reshape(rows, 2**wire, 2, -1)
        # Signs are set by the last wire; the earlier ones split norms.
        halves = blocks[..., 0] if wire == wires - 1 else np.linalg.norm(blocks, axis=-1)
        columns.append(_leaf_angles(2 * np.arctan2(halves[:, :, 1], halves[:, :, 0])))
    return np.concatenate(columns, axis=1)


def _leaf_angles(angles: Real) -> Real:
    if angles.shape[1] == 1:
        return angles
    zero, one = np.split(angles, 2, axis=1)
    return np.concatenate([_leaf_angles((zero + one) / 2), _leaf_angles((zero - one) / 2)], axis=1)
