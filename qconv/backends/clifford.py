"""Which circuits a stabilizer simulator runs: rotations by multiples of pi/2, and fixed gates that permute Paulis."""

from __future__ import annotations

from functools import cache
from itertools import product

import numpy as np

from circuits.circuit import Circuit
from circuits.gates import AMPLITUDE, GATES, pauli_matrix
from qconv.backends.protocol import Real, Unsupported

# Largest distance from a multiple of pi/2, in radians, that rounding of single precision may leave.
TOLERANCE = 1e-5


@cache
def is_clifford(name: str) -> bool:
    """Whether a gate without angles maps every Pauli string to a Pauli string, up to sign."""
    matrix = np.asarray(GATES[name].matrix())
    wires = len(matrix).bit_length() - 1
    paulis = [pauli_matrix("".join(letters)) for letters in product("IXYZ", repeat=wires)]
    # Overlaps of turned Paulis with all Paulis: a signed permutation.
    overlaps = [[np.trace(p @ matrix @ q @ matrix.conj().T).real / len(matrix) for q in paulis] for p in paulis]
    return bool(np.allclose(np.abs(overlaps), np.abs(overlaps).round(), atol=1e-9))


def check_fixed_gates(circuit: Circuit, method: str, others: tuple[str, ...] = ()) -> None:
    """Raise Unsupported for gates without angles that a stabilizer method does not run.

    Args:
        circuit: The circuit.
        method: Named in the error.
        others: Gates that it runs besides Clifford ones.
    """
    for position, gate in enumerate(circuit.gates):
        if gate.name != AMPLITUDE and not gate.angles and gate.name not in others and not is_clifford(gate.name):
            raise Unsupported(
                f"gate {position} ({gate.name}) is no Clifford gate, which is all that method {method!r} runs"
                f"{' besides ' + ', '.join(others) if others else ''}: use method 'statevector' or "
                "'matrix_product_state'"
            )


def clifford_angles(circuit: Circuit, rows: Real, prepared: int, method: str) -> Real:
    """Rows of angles, each rounded to the multiple of pi/2 that a stabilizer simulator takes it for.

    Args:
        circuit: The circuit.
        rows: (R, prepared + K): angles of the RY gates of a state preparation, then the K angles of the gates.
        prepared: How many belong to the state preparation.
        method: Named in the error.

    Raises:
        Unsupported: Naming the gate and the angle, if a Pauli rotation of it is no multiple of pi/2.
    """
    factors = [(AMPLITUDE, 0, 1.0)] * prepared
    for position, gate in enumerate(circuit.gates):
        for index in range(0 if gate.name == AMPLITUDE else len(gate.angles)):
            # The smallest factor asks most: a controlled rotation turns by half its angle.
            turns = [abs(rotation.factor) for rotation in gate.spec.rotations if rotation.angle == index]
            factors.append((gate.name, position, min(turns)))
    steps = np.array([(np.pi / 2) / factor for _, _, factor in factors])
    rounded: Real = np.round(rows / steps) * steps
    off = np.abs(rows - rounded) > TOLERANCE
    if off.any():
        row, column = np.argwhere(off)[0]
        name, position, _ = factors[column]
        raise Unsupported(
            f"gate {position} ({name}) has the angle {rows[row, column]:.6g} in circuit {row} but method {method!r} "
            f"runs Clifford circuits, whose angles there are multiples of {steps[column]:.6g}: use method "
            "'statevector' or 'matrix_product_state'"
        )
    return rounded
