"""Circuits as Qiskit QuantumCircuits with Parameters.

Qiskit counts qubits from the least significant bit and writes Pauli labels and bit strings from the most significant
one; our wire w is its qubit w, and `reversed_bits` is the one place that turns texts around.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from circuits.circuit import Angle, Circuit, Gate
from circuits.features import Factor, Feature
from circuits.gates import AMPLITUDE
from circuits.interop.symbols import evaluated
from circuits.noise import AnyChannel, NoiseModel, ReadoutError

if TYPE_CHECKING:
    from qiskit import QuantumCircuit
    from qiskit.quantum_info import SparsePauliOp

FloatArray = NDArray[np.float64]

# Gate -> name of the method of QuantumCircuit.
_QISKIT = {"P": "p", "CNOT": "cx", "U3": "u"}

# Gates that are written as their parts.
PARTS = ("CRot", "CU3", "SQSWAP", "SQSWAPdg", "ISWAPdg")

# Keys in a QuantumCircuit's metadata for the readout, as Qiskit's Pauli labels: what is written, and an older one.
METADATA = "qconv_observables"
OLD_METADATA = "observables"


def reversed_bits(text: str) -> str:
    """A Pauli string or bit string of ours as Qiskit writes it, and back."""
    return text[::-1]


def build_qiskit(circuit: Circuit, values: Sequence[Any], noise: NoiseModel | None = None) -> QuantumCircuit:
    """A circuit as a Qiskit QuantumCircuit, without measurements.

    Args:
        circuit: The circuit.
        values: One number or Parameter for each angle of each gate in order. A state preparation takes the first
            2**n_wires - 1 of them, the angles of `preparation_angles`.
        noise: Channels after gates, as Kraus instructions; errors of the readout are left to `qiskit_observable` and
            `append_measurement`.

    Raises:
        ValueError: If the noise names a wire that the circuit does not have.
    """
    from qiskit import QuantumCircuit

    if noise is not None:
        noise.check_wires(circuit.n_wires)
    result = QuantumCircuit(circuit.n_wires)
    remaining = iter(values)
    for gate in circuit.gates:
        if gate.name == AMPLITUDE:
            for wire in range(circuit.n_wires):
                _uniformly_controlled_ry(result, list(range(wire)), wire, remaining)
            continue
        _append(result, gate, [next(remaining) for _ in gate.angles])
        if noise is not None:
            for channel, wires in noise.channels_after(gate):
                # Qiskit takes the first wire as the least significant.
                result.append(_kraus_instruction(channel), wires[::-1])
    return result


def _append(target: QuantumCircuit, gate: Gate, values: list[Any]) -> None:
    if gate.name == "Rot":
        phi, theta, omega = values
        target.rz(phi, gate.wires[0])
        target.ry(theta, gate.wires[0])
        target.rz(omega, gate.wires[0])
    elif gate.name in PARTS:
        for part, (_, _, angles) in zip(gate.parts(), gate.spec.parts, strict=True):
            _append(target, part, [values[angle] if isinstance(angle, int) else angle for angle in angles])
    else:
        getattr(target, _QISKIT.get(gate.name, gate.name.lower()))(*values, *gate.wires)


def qiskit_observable(text: str, noise: NoiseModel | None = None) -> SparsePauliOp:
    """A Pauli string as a Qiskit operator; with errors of the readout, what measuring it measures."""
    from qiskit.quantum_info import SparsePauliOp

    terms = {text: 1.0} if noise is None else noise.measured(text)
    return SparsePauliOp([reversed_bits(term) for term in terms], list(terms.values()))


def append_measurement(target: QuantumCircuit, basis: str, noise: NoiseModel | None = None) -> None:
    """Measure every wire in a basis, bits misread as the noise says; bit w is that of wire w.

    Args:
        target: Changed in place.
        basis: A Pauli string, I where a wire's bit does not matter.
        noise: Of which the errors of the readout are read, as Kraus instructions before the measurements.
    """
    for wire, letter in enumerate(basis):
        if letter == "Y":
            target.sdg(wire)
        if letter in "XY":
            target.h(wire)
        error = None if noise is None else noise.readout_of(wire)
        if error is not None:
            target.append(_kraus_instruction(error), [wire])
    target.measure_all()


def _kraus_instruction(channel: AnyChannel | ReadoutError) -> Any:
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


def preparation_angles(amplitudes: FloatArray) -> FloatArray:
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


def _leaf_angles(angles: FloatArray) -> FloatArray:
    if angles.shape[1] == 1:
        return angles
    zero, one = np.split(angles, 2, axis=1)
    return np.concatenate([_leaf_angles((zero + one) / 2), _leaf_angles((zero - one) / 2)], axis=1)


def to_qiskit(circuit: Circuit) -> QuantumCircuit:
    """A circuit as a Qiskit QuantumCircuit: features are its ParameterVector x, weights its ParameterVector w.

    Wire w is qubit w. The readout stands in its metadata under "qconv_observables", as Qiskit's Pauli labels.

    Raises:
        ValueError: For a state preparation, whose angles are no expressions of the features, and for thresholds and
            bits of features.
    """
    from qiskit.circuit import ParameterVector

    if any(gate.name == AMPLITUDE for gate in circuit.gates):
        raise ValueError(
            "gate 0 (Amplitude) divides features by their norm, which no angle of a QuantumCircuit with Parameters "
            "does: use another encoding, or run the circuit with backend 'qiskit'"
        )
    x, w = ParameterVector("x", circuit.n_inputs), ParameterVector("w", circuit.n_weights)
    # Lists, because a vector's own indexing knows no Ellipsis.
    inputs, weights = list(x), list(w)
    angles = [evaluated(_distributed(a), inputs, weights, _applied) for gate in circuit.gates for a in gate.angles]
    result = build_qiskit(circuit, angles)
    result.metadata = {METADATA: [reversed_bits(text) for text in circuit.observables]}
    return result


def _distributed(angle: Angle) -> Angle:
    """The same angle; where factors of its terms are tiny, with each multiplied by the scale."""
    if angle.computed is None:
        return angle
    terms = angle.computed.terms
    # Qiskit takes a product with a number of about 1e-15 for the number, even if a large one multiplies it next.
    if min(abs(number) for number in (angle.scale, *(c for c, _ in terms))) > 1e-12:
        return angle
    return replace(angle, scale=1.0, computed=Feature(tuple((angle.scale * c, product) for c, product in terms)))


def _applied(factor: Factor, value: Any) -> Any:
    if factor.function == "arccos_square":
        return (value * value).arccos()
    if factor.function in ("arcsin", "arccos"):
        return getattr(value, factor.function)()
    raise ValueError(
        f"an angle reads {factor.text()}, which no ParameterExpression is: compute it before the circuit, or run the "
        "circuit with backend 'qiskit'"
    )
