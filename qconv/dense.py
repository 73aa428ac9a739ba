"""What a circuit gives, from dense matrices on all its wires: slow, plain, and sharing nothing with the backends.

The yardstick of `qconv.conformance`. It reads the gate table's matrices and the channels' Kraus operators, and takes
slopes by differences, so neither the Pauli rotations nor the shift rules that backends are built on enter.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce

import numpy as np
from numpy.typing import NDArray

from circuits.circuit import Angle, Circuit, Gate
from circuits.gates import AMPLITUDE, Matrix
from circuits.noise import NoiseModel

Real = NDArray[np.float64]

# Of differences of fourth order: at frequencies up to 2 pi, truncation and rounding both stay below 1e-10.
STEP = 5e-4

_SQRT_HALF = np.sqrt(0.5)
# Behind these Z measures the letter.
_TURNS = {
    "I": np.eye(2),
    "Z": np.eye(2),
    "X": _SQRT_HALF * np.array([[1, 1], [1, -1]]),
    "Y": _SQRT_HALF * np.array([[1, -1j], [1, 1j]]),
}


def dense_values(circuit: Circuit, inputs: Real, weights: Real, noise: NoiseModel | None = None) -> Real:
    """Expectation values from density matrices.

    Args:
        circuit: Of plain features.
        inputs: (P, n_inputs).
        weights: (F, n_weights).
        noise: Channels after gates and errors of the readout.

    Returns:
        (P, F, n_obs).
    """
    values = np.empty((len(inputs), len(weights), len(circuit.observables)))
    for p, x in enumerate(inputs):
        for f, w in enumerate(weights):
            state = _density(circuit, x, w, noise)
            values[p, f] = [_mean(state, observable, noise) for observable in circuit.observables]
    return values


def differences(function: Callable[[Real], Real], at: Real) -> Real:
    """Slopes of a function of an array, by central differences of fourth order.

    Args:
        function: Of arrays of the shape of `at`.
        at: Where.

    Returns:
        Slopes with the shape of `at` before that of the function's values.
    """
    slopes = []
    for place in np.ndindex(at.shape):
        moved = np.zeros_like(at)
        moved[place] = STEP
        near, far = (function(at + k * moved) - function(at - k * moved) for k in (1, 2))
        slopes.append((8 * near - far) / (12 * STEP))
    return np.array(slopes).reshape(*at.shape, *np.shape(function(at)))


def _angle(angle: Angle, x: Real, w: Real) -> float:
    if angle.computed is not None:
        raise ValueError("an angle is computed from several features: dense_values takes plain ones")
    if angle.source == "const":
        return angle.offset
    return float(angle.scale * (x if angle.source == "input" else w)[angle.index] + angle.offset)


def _on_all(matrix: Matrix, wires: tuple[int, ...], n: int) -> Matrix:
    """A matrix on some wires as one on all; wire 0 is the most significant."""
    rest = [wire for wire in range(n) if wire not in wires]
    order = list(np.argsort([*wires, *rest]))
    grid = np.kron(matrix, np.eye(2 ** len(rest))).reshape((2,) * (2 * n))
    return np.asarray(grid.transpose([*order, *(n + k for k in order)]).reshape(2**n, 2**n), dtype=np.complex128)


def _density(circuit: Circuit, x: Real, w: Real, noise: NoiseModel | None) -> Matrix:
    n = circuit.n_wires
    state: Matrix = np.zeros((2**n, 2**n), dtype=complex)
    state[0, 0] = 1
    for gate in circuit.gates:
        values = [_angle(angle, x, w) for angle in gate.angles]
        if gate.name == AMPLITUDE:
            amplitudes = np.zeros(2**n)
            amplitudes[: len(values)] = np.array(values) / np.linalg.norm(values)
            state = np.outer(amplitudes, amplitudes).astype(complex)
            continue
        unitary = _on_all(gate.spec.matrix(*values), gate.wires, n)
        state = unitary @ state @ unitary.conj().T
        for operators, wires in _channels(gate, noise):
            full = [_on_all(k, wires, n) for k in operators]
            state = sum((k @ state @ k.conj().T for k in full), np.zeros_like(state))
    return state


def _channels(gate: Gate, noise: NoiseModel | None) -> list[tuple[tuple[Matrix, ...], tuple[int, ...]]]:
    return [] if noise is None else [(channel.kraus(), wires) for channel, wires in noise.channels_after(gate)]


def _mean(state: Matrix, observable: str, noise: NoiseModel | None) -> float:
    """Turn, measure all bits, misread each, multiply the signs."""
    n = len(observable)
    turn = reduce(np.kron, [_TURNS[letter] for letter in observable])
    probabilities = np.real(np.diag(turn @ state @ turn.conj().T)).reshape((2,) * n)
    for wire in range(n):
        error = None if noise is None else noise.readout_of(wire)
        if error is not None:
            probabilities = np.moveaxis(np.tensordot(error.confusion(), probabilities, (1, wire)), 0, wire)
    signs = reduce(np.kron, [np.array([1, 1 if letter == "I" else -1]) for letter in observable])
    return float(probabilities.ravel() @ signs)
