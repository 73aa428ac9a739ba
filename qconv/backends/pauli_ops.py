"""Gates, noise channels and misread bits as real matrices on Pauli digits: their Pauli transfer matrices.

Source: Wood, Biamonte & Cory (arXiv:1111.6950).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from circuits.circuit import Angle, Circuit, Gate
from circuits.gates import AMPLITUDE, GATES, Matrix, pauli_matrix
from circuits.noise import AnyChannel, NoiseModel
from qconv.backends.protocol import Unsupported

Real = NDArray[np.float64]
Numbers = NDArray[Any]  # real, or complex for unitaries


@cache
def _paulis(wires: int) -> list[Matrix]:
    return [pauli_matrix("".join(letters)) for letters in product("IXYZ", repeat=wires)]


def transfer_matrix(kraus: tuple[Matrix, ...]) -> Real:
    """Pauli transfer matrix R[i, j] = tr(P_i sum_k K_k P_j K_k^+) / d of a channel; one operator for a unitary."""
    wires = int(np.log2(len(kraus[0])))
    paulis = _paulis(wires)
    images = [sum(k @ p @ k.conj().T for k in kraus) for p in paulis]
    traces: Real = np.array([[np.trace(p @ image).real for image in images] for p in paulis])
    result: Real = traces / 2**wires
    return result


@cache
def rotation_parts(pauli: str) -> tuple[Real, Real, Real]:
    """(A, B, C) with transfer matrix A + B cos a + C sin a of exp(-i a pauli / 2)."""
    p = pauli_matrix(pauli)
    at = {a: transfer_matrix((np.cos(a / 2) * np.eye(len(p)) - 1j * np.sin(a / 2) * p,)) for a in (0, np.pi, np.pi / 2)}
    even, odd = (at[0] + at[np.pi]) / 2, (at[0] - at[np.pi]) / 2
    return even, odd, at[np.pi / 2] - even


@dataclass(frozen=True)
class PauliOp:
    """A transfer matrix (or a unitary) on one or two wires: constant, or A + B cos a + C sin a of an angle."""

    wires: tuple[int, ...]
    parts: tuple[Numbers, Numbers, Numbers]
    angle: Angle | None = None
    pauli: str | None = None

    def entries(self) -> list[list[tuple[int, int, float]]]:
        """By row the (part, column, number) that are not 0, of a transfer matrix."""
        return [
            [
                (k, column, float(part[row, column]))
                for k, part in enumerate(self.parts)
                for column in range(part.shape[1])
                if abs(part[row, column]) > 1e-14
            ]
            for row in range(len(self.parts[0]))
        ]

    def form(self) -> tuple[object, ...]:
        """What it does apart from the numbers in its angle: equal forms are evaluated together."""
        source = None if self.angle is None else self.angle.source
        return source, *(part.tobytes() for part in self.parts)


@cache
def _fixed_parts(name: str) -> tuple[Real, Real, Real]:
    constant = transfer_matrix((GATES[name].matrix(),))
    return constant, 0 * constant, 0 * constant


def gate_ops(gate: Gate) -> list[PauliOp]:
    """A gate as transfer matrices in the order of application."""
    if len(gate.wires) > 2:
        return [op for part in gate.parts() for op in gate_ops(part)]
    if not gate.angles:
        return [PauliOp(gate.wires, _fixed_parts(gate.name))]
    ops = []
    for rotation in gate.spec.rotations:
        angle, factor = gate.angles[rotation.angle], rotation.factor
        turned = angle.times(factor)
        ops.append(PauliOp(gate.wires, rotation_parts(rotation.pauli), turned, rotation.pauli))
    return ops


def channel_op(wires: tuple[int, ...], channel: AnyChannel) -> PauliOp:
    """A noise channel as a constant transfer matrix."""
    constant = transfer_matrix(channel.kraus())
    return PauliOp(wires, (constant, 0 * constant, 0 * constant))


def readout_ops(circuit: Circuit, noise: NoiseModel | None) -> list[PauliOp]:
    """Errors of the readout as the last operations: each measured Pauli P becomes offset I + factor P.

    As linear maps they are no channels, since X, Y and Z are never measured together.
    """
    if noise is not None:
        noise.check_wires(circuit.n_wires)
    ops = []
    for wire in range(circuit.n_wires):
        error = None if noise is None else noise.readout_of(wire)
        if error is not None:
            matrix = np.diag([1.0] + [error.factor] * 3)
            matrix[1:, 0] = error.offset
            ops.append(PauliOp((wire,), (matrix, 0 * matrix, 0 * matrix)))
    return ops


def noisy_ops(gate: Gate, noise: NoiseModel | None) -> list[PauliOp]:
    """A gate and the channels that follow it."""
    channels = () if noise is None else noise.channels_after(gate)
    return gate_ops(gate) + [channel_op(wires, channel) for channel, wires in channels]


def split_encoding(circuit: Circuit, noise: NoiseModel | None) -> tuple[list[list[PauliOp]], list[PauliOp]]:
    """Separate each wire's encoding from the trainable block.

    Returns:
        (encoders, block): for every wire the operations up to its last feature, and all other operations in order.

    Raises:
        Unsupported: Unless every feature enters by one-wire gates before anything trainable or entangling.
    """
    last = [-1] * circuit.n_wires
    for position, gate in enumerate(circuit.gates):
        if gate.name == AMPLITUDE:
            raise Unsupported(
                "a polynomial needs a product encoding but this kernel encodes amplitudes: use 'statevector'"
            )
        if gate.depends_on("input"):
            for wire in gate.wires:
                last[wire] = position
    encoders: list[list[PauliOp]] = [[] for _ in range(circuit.n_wires)]
    block: list[PauliOp] = []
    for position, gate in enumerate(circuit.gates):
        encodes = any(position <= last[wire] for wire in gate.wires)
        if encodes and (len(gate.wires) > 1 or gate.depends_on("weight")):
            raise Unsupported(
                f"backend 'fourier' needs a product encoding but gate {position} ({gate.text()}) stands before the "
                "last feature of its wire and is entangling or trainable (re-uploading): use "
                + ("'statevector'" if noise is None else "'statevector' (up to 10 wires), or 'qiskit'")
            )
        (encoders[gate.wires[0]] if encodes else block).extend(noisy_ops(gate, noise))
    return encoders, block + readout_ops(circuit, noise)
