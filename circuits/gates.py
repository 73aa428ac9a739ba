"""The gate table: wires, angles, matrix, Pauli rotations, shift rule and source of every gate.

Conventions. Wire 0 of a gate is the most significant bit of its matrix. Angles are in radians and
RX(a) = exp(-i a X / 2). Every gate with angles is, up to a global phase, a product of Pauli rotations
exp(-i f a P / 2); the simulators are built on that list alone, so a gate is defined once, here. `matrix` is
written down separately (phase included) for interchange with other libraries; tests hold the two together.

Powers of gates need no rows of their own: with an exponent t, X**t, Y**t and Z**t are RX, RY and RZ of pi t up to a
phase, CZ**t is CP(pi t) and CNOT**t is CP(pi t) between two H on the target.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.complex128]

PAULI: dict[str, Matrix] = {
    "I": np.eye(2, dtype=complex),
    "X": np.array([[0, 1], [1, 0]], dtype=complex),
    "Y": np.array([[0, -1j], [1j, 0]], dtype=complex),
    "Z": np.array([[1, 0], [0, -1]], dtype=complex),
}

NIELSEN_CHUANG = "Nielsen & Chuang, Quantum Computation and Quantum Information, section 4.2-4.3"
OPENQASM3 = "Cross et al., OpenQASM 3 (arXiv:2104.14722), standard gate library"


@dataclass(frozen=True)
class Rotation:
    """One factor exp(-i * factor * angle * pauli / 2) of a gate.

    Args:
        pauli: Pauli string over the gate's wires, such as "ZX".
        angle: Which of the gate's angles turns it.
        factor: Multiple of that angle.
    """

    pauli: str
    angle: int
    factor: float = 1.0


# One gate of a decomposition: name, which of the wires, and as angles indices of the whole gate's angles or numbers.
Part = tuple[str, tuple[int, ...], tuple[int | float, ...]]


@dataclass(frozen=True)
class GateSpec:
    """What a gate is.

    Args:
        name: Its name in a circuit.
        n_wires: Wires it acts on; None for a state preparation that takes any number.
        n_angles: Angles it takes; None for a state preparation that takes any number of features.
        matrix: angles -> unitary (2**n_wires, 2**n_wires), global phase included.
        rotations: Pauli rotations whose product, in the order of application, is the gate up to a global phase;
            empty for a gate without angles.
        frequencies: Per angle, the positive gaps of its generator's spectrum: they fix the parameter-shift rule.
        inverse: Name of the gate that undoes it and, per angle of that gate, which of this gate's angles it
            takes with a minus sign.
        source: Where the definition stands.
        parts: Simpler gates that make it up in the order of application, up to a global phase, for what knows few
            gates or no more than two wires; empty for a simple gate.
    """

    name: str
    n_wires: int | None
    n_angles: int | None
    matrix: Callable[..., Matrix]
    rotations: tuple[Rotation, ...] = ()
    frequencies: tuple[tuple[float, ...], ...] = ()
    inverse: tuple[str, tuple[int, ...]] | None = None
    source: str = NIELSEN_CHUANG
    parts: tuple[Part, ...] = ()


def pauli_matrix(pauli: str) -> Matrix:
    """Kronecker product of one-qubit Paulis, first letter most significant."""
    result = np.eye(1, dtype=complex)
    for letter in pauli:
        result = np.kron(result, PAULI[letter])
    return result


def _turn(pauli: str, angle: float) -> Matrix:
    p = pauli_matrix(pauli)
    result: Matrix = np.cos(angle / 2) * np.eye(len(p)) - 1j * np.sin(angle / 2) * p
    return result


def _controlled(target: Matrix) -> Matrix:
    result = np.eye(2 * len(target), dtype=complex)
    result[len(target) :, len(target) :] = target
    return result


def _phase(angle: float) -> Matrix:
    return np.diag([1, np.exp(1j * angle)]).astype(complex)


def _u3(theta: float, phi: float, lam: float) -> Matrix:
    c, s = np.cos(theta / 2), np.sin(theta / 2)
    return np.array([[c, -np.exp(1j * lam) * s], [np.exp(1j * phi) * s, np.exp(1j * (phi + lam)) * c]], dtype=complex)


def _rot(phi: float, theta: float, omega: float) -> Matrix:
    return _turn("Z", omega) @ _turn("Y", theta) @ _turn("Z", phi)


def _fixed(
    name: str,
    matrix: Matrix,
    inverse: str | None = None,
    source: str = NIELSEN_CHUANG,
    parts: tuple[Part, ...] = (),
) -> GateSpec:
    wires = len(matrix).bit_length() - 1
    return GateSpec(name, wires, 0, matrix.copy, inverse=(inverse or name, ()), source=source, parts=parts)


def _pauli_rotation(pauli: str) -> GateSpec:
    name = "R" + pauli
    return GateSpec(
        name,
        len(pauli),
        1,
        lambda a: _turn(pauli, a),
        (Rotation(pauli, 0),),
        ((1.0,),),
        (name, (0,)),
        NIELSEN_CHUANG if len(pauli) == 1 else OPENQASM3,
    )


def _turns_controlled(axis: str, angle: int) -> tuple[Rotation, ...]:
    # exp(-i a (1 - Z)/2 (x) P / 2) = exp(-i a P/4) exp(+i a ZP/4): two commuting rotations by half the angle,
    # so the generator has the gaps 1/2 and 1 and wants the four-term rule.
    return Rotation("I" + axis, angle, 0.5), Rotation("Z" + axis, angle, -0.5)


def _phases_controlled(angle: int) -> tuple[Rotation, ...]:
    return Rotation("ZI", angle, 0.5), Rotation("IZ", angle, 0.5), Rotation("ZZ", angle, -0.5)


def _controlled_rotation(axis: str) -> GateSpec:
    name = "CR" + axis
    return GateSpec(
        name,
        2,
        1,
        lambda a: _controlled(_turn(axis, a)),
        _turns_controlled(axis, 0),
        ((0.5, 1.0),),
        (name, (0,)),
    )


_X, _Y, _Z = PAULI["X"], PAULI["Y"], PAULI["Z"]
_S, _T = _phase(np.pi / 2), _phase(np.pi / 4)
_SX: Matrix = np.array([[0.5 + 0.5j, 0.5 - 0.5j], [0.5 - 0.5j, 0.5 + 0.5j]])
_H: Matrix = np.array([[1, 1], [1, -1]], dtype=complex) * np.sqrt(0.5)
_SWAP: Matrix = np.eye(4, dtype=complex)[[0, 2, 1, 3]]
# Triplet states stay, the singlet gets the phase i.
_SQSWAP: Matrix = ((1 + 1j) * np.eye(4) + (1 - 1j) * _SWAP) / 2
_ISWAP: Matrix = np.array([[1, 0, 0, 0], [0, 0, 1j, 0], [0, 1j, 0, 0], [0, 0, 0, 1]])
_ECR: Matrix = np.array([[0, 0, 1, 1j], [0, 0, 1j, 1], [1, -1j, 0, 0], [-1j, 1, 0, 0]]) * np.sqrt(0.5)

# Nielsen & Chuang, figure 4.9, without the two H of the target.
_CCZ_PARTS: tuple[Part, ...] = (
    ("CNOT", (1, 2), ()),
    ("Tdg", (2,), ()),
    ("CNOT", (0, 2), ()),
    ("T", (2,), ()),
    ("CNOT", (1, 2), ()),
    ("Tdg", (2,), ()),
    ("CNOT", (0, 2), ()),
    ("T", (1,), ()),
    ("T", (2,), ()),
    ("CNOT", (0, 1), ()),
    ("T", (0,), ()),
    ("Tdg", (1,), ()),
    ("CNOT", (0, 1), ()),
)
_CCX_PARTS: tuple[Part, ...] = (("H", (2,), ()), *_CCZ_PARTS, ("H", (2,), ()))


def _exchange(angle: float, *paulis: str) -> tuple[Part, ...]:
    return tuple(("R" + pauli, (0, 1), (angle,)) for pauli in paulis)


_SPECS = (
    _fixed("X", _X),
    _fixed("Y", _Y),
    _fixed("Z", _Z),
    _fixed("H", _H),
    _fixed("S", _S, "Sdg"),
    _fixed("Sdg", _S.conj(), "S"),
    _fixed("T", _T, "Tdg"),
    _fixed("Tdg", _T.conj(), "T"),
    _fixed("SX", _SX, "SXdg", OPENQASM3),
    _fixed("SXdg", _SX.conj().T, "SX", OPENQASM3),
    _pauli_rotation("X"),
    _pauli_rotation("Y"),
    _pauli_rotation("Z"),
    GateSpec("P", 1, 1, _phase, (Rotation("Z", 0),), ((1.0,),), ("P", (0,)), OPENQASM3),
    GateSpec(
        "U3",
        1,
        3,
        _u3,
        (Rotation("Z", 2), Rotation("Y", 0), Rotation("Z", 1)),
        ((1.0,),) * 3,
        ("U3", (0, 2, 1)),
        OPENQASM3 + ": U(theta, phi, lambda)",
    ),
    GateSpec(
        "Rot",
        1,
        3,
        _rot,
        (Rotation("Z", 0), Rotation("Y", 1), Rotation("Z", 2)),
        ((1.0,),) * 3,
        ("Rot", (2, 1, 0)),
        "PennyLane's Rot(phi, theta, omega) = RZ(omega) RY(theta) RZ(phi)",
    ),
    _fixed("CNOT", _controlled(_X)),
    _fixed("CY", _controlled(_Y), parts=(("Sdg", (1,), ()), ("CNOT", (0, 1), ()), ("S", (1,), ()))),
    _fixed("CZ", _controlled(_Z)),
    _fixed(
        "CH",
        _controlled(_H),
        parts=(("RY", (1,), (-np.pi / 4,)), ("CZ", (0, 1), ()), ("RY", (1,), (np.pi / 4,))),
    ),
    _fixed("SWAP", _SWAP),
    _fixed("SQSWAP", _SQSWAP, "SQSWAPdg", parts=_exchange(np.pi / 4, "XX", "YY", "ZZ")),
    _fixed("SQSWAPdg", _SQSWAP.conj(), "SQSWAP", parts=_exchange(-np.pi / 4, "XX", "YY", "ZZ")),
    _fixed("ISWAP", _ISWAP, "ISWAPdg", parts=_exchange(-np.pi / 2, "XX", "YY")),
    _fixed("ISWAPdg", _ISWAP.conj(), "ISWAP", parts=_exchange(np.pi / 2, "XX", "YY")),
    _fixed(
        "ECR",
        _ECR,
        source="Sheldon et al., Procedure for systematically tuning up cross-talk in the cross-resonance gate "
        "(arXiv:1603.04821); Qiskit's ECRGate",
        parts=(("RZX", (0, 1), (np.pi / 4,)), ("X", (0,), ()), ("RZX", (0, 1), (-np.pi / 4,))),
    ),
    _fixed("CCX", _controlled(_controlled(_X)), parts=_CCX_PARTS),
    _fixed("CCZ", _controlled(_controlled(_Z)), parts=_CCZ_PARTS),
    _fixed("CSWAP", _controlled(_SWAP), parts=(("CNOT", (2, 1), ()), *_CCX_PARTS, ("CNOT", (2, 1), ()))),
    _controlled_rotation("X"),
    _controlled_rotation("Y"),
    _controlled_rotation("Z"),
    GateSpec(
        "CP",
        2,
        1,
        lambda a: _controlled(_phase(a)),
        _phases_controlled(0),
        ((1.0,),),
        ("CP", (0,)),
        OPENQASM3,
    ),
    GateSpec(
        "CRot",
        2,
        3,
        lambda phi, theta, omega: _controlled(_rot(phi, theta, omega)),
        (*_turns_controlled("Z", 0), *_turns_controlled("Y", 1), *_turns_controlled("Z", 2)),
        ((0.5, 1.0),) * 3,
        ("CRot", (2, 1, 0)),
        "PennyLane's CRot(phi, theta, omega): Rot on the target",
        (("CRZ", (0, 1), (0,)), ("CRY", (0, 1), (1,)), ("CRZ", (0, 1), (2,))),
    ),
    GateSpec(
        "CU3",
        2,
        3,
        lambda theta, phi, lam: _controlled(_u3(theta, phi, lam)),
        # U3 = P(phi) RY(theta) P(lambda), phase included.
        (*_phases_controlled(2), *_turns_controlled("Y", 0), *_phases_controlled(1)),
        ((0.5, 1.0), (1.0,), (1.0,)),
        ("CU3", (0, 2, 1)),
        OPENQASM3 + ": ctrl @ U(theta, phi, lambda)",
        (("CP", (0, 1), (2,)), ("CRY", (0, 1), (0,)), ("CP", (0, 1), (1,))),
    ),
    _pauli_rotation("XX"),
    _pauli_rotation("YY"),
    _pauli_rotation("ZZ"),
    _pauli_rotation("ZX"),
)


def _no_matrix(*features: float) -> Matrix:
    raise ValueError("Amplitude prepares a state from |0...0>: it has no unitary matrix of its own")


AMPLITUDE = "Amplitude"
GATES: dict[str, GateSpec] = {spec.name: spec for spec in _SPECS} | {
    AMPLITUDE: GateSpec(
        AMPLITUDE,
        None,
        None,
        _no_matrix,
        source="Schuld & Petruccione, Supervised Learning with Quantum Computers, section 5.2: sum_i x_i |i> / |x|",
    )
}


@cache
def shift_rule(frequencies: tuple[float, ...]) -> tuple[tuple[float, float], ...]:
    """Parameter-shift rule of a gate whose generator has the given spectral gaps.

    The expectation value is a trigonometric polynomial of these frequencies in the gate's angle, so
    f'(a) = sum_k c_k f(a + s_k) holds exactly.

    Args:
        frequencies: Positive gaps, such as (1.0,) for a Pauli rotation or (0.5, 1.0) for a controlled one.

    Returns:
        Pairs (c_k, s_k): two terms a frequency, shifts in radians.

    Source: Wierichs et al., General parameter-shift rules for quantum gradients (arXiv:2107.12390), eq. 6-9;
        for (0.5, 1) it is the four-term rule of Anselmetti et al. (arXiv:2104.05695).
    """
    omega = np.asarray(frequencies)
    base = float(omega.min())
    # For frequencies 1..R in units of the smallest, these shifts are equally spaced over half a period.
    shifts = (2 * np.arange(len(omega)) + 1) * np.pi / (2 * len(omega) * base)
    coefficients = np.linalg.solve(2 * np.sin(np.outer(omega, shifts)), omega)
    return tuple((float(s * c), float(s * t)) for c, t in zip(coefficients, shifts, strict=True) for s in (1, -1))
