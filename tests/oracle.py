"""What a circuit computes, written independently of the library: dense matrices on all wires, textbook definitions.

Gates are exponentials of Hermitian generators built from projectors and Pauli matrices by scipy.linalg.expm;
derivatives insert the generator at its place in the product. Nothing here reads the library's gate table.
"""

from functools import reduce

import numpy as np
from scipy.linalg import expm

from circuits import Angle, Channel, Circuit, Factor, Gate, NoiseModel

I2 = np.eye(2)
X = np.array([[0, 1], [1, 0]])
Y = np.array([[0, -1j], [1j, 0]])
Z = np.diag([1, -1])
ONE = np.diag([0, 1])
PAULIS = {"I": I2, "X": X, "Y": Y, "Z": Z}

FIXED = {
    "X": X,
    "Y": Y,
    "Z": Z,
    "H": (X + Z) / np.sqrt(2),
    "S": np.diag([1, 1j]),
    "Sdg": np.diag([1, -1j]),
    "T": np.diag([1, (1 + 1j) / np.sqrt(2)]),
    "Tdg": np.diag([1, (1 - 1j) / np.sqrt(2)]),
    # The square root of X with eigenvalues 1 and i.
    "SX": 0.5 * ((1 + 1j) * I2 + (1 - 1j) * X),
    "SXdg": 0.5 * ((1 - 1j) * I2 + (1 + 1j) * X),
}


def on_wires(operators: dict[int, np.ndarray], n: int) -> np.ndarray:
    """Kronecker product with one operator on each named wire; wire 0 is the most significant."""
    return reduce(np.kron, [operators.get(wire, I2) for wire in range(n)])


def generator_steps(name: str, wires: tuple[int, ...], n: int) -> list[tuple[int, np.ndarray]]:
    """A gate with angles as steps expm(-i angle G): pairs (which angle, G), first applied first."""
    a = wires[0]
    b = wires[-1]
    half = {letter: PAULIS[letter] / 2 for letter in "XYZ"}
    if name in ("RX", "RY", "RZ"):
        return [(0, on_wires({a: half[name[1]]}, n))]
    if name == "P":
        return [(0, on_wires({a: -ONE}, n))]
    if name == "U3":
        return [
            (2, on_wires({a: -ONE}, n)),
            (0, on_wires({a: half["Y"]}, n)),
            (1, on_wires({a: -ONE}, n)),
        ]
    if name == "Rot":
        return [(k, on_wires({a: half[letter]}, n)) for k, letter in enumerate("ZYZ")]
    if name in ("CRX", "CRY", "CRZ"):
        return [(0, on_wires({a: ONE, b: half[name[2]]}, n))]
    if name == "CP":
        return [(0, on_wires({a: -ONE, b: ONE}, n))]
    if name == "CRot":
        return [(k, on_wires({a: ONE, b: half[letter]}, n)) for k, letter in enumerate("ZYZ")]
    if name == "CU3":
        turn, phase = on_wires({a: ONE, b: half["Y"]}, n), on_wires({a: -ONE, b: ONE}, n)
        return [(2, phase), (0, turn), (1, phase)]
    if name in ("RXX", "RYY", "RZZ", "RZX"):
        return [(0, on_wires({a: PAULIS[name[1]], b: half[name[2]]}, n))]
    raise KeyError(name)


def fixed_matrix(name: str, wires: tuple[int, ...], n: int) -> np.ndarray:
    if name in FIXED:
        return on_wires({wires[0]: FIXED[name]}, n)
    a, b = wires[:2]
    if name in ("CNOT", "CY", "CZ", "CH"):
        target = {"CNOT": X, "CY": Y, "CZ": Z, "CH": FIXED["H"]}[name]
        return on_wires({a: I2 - ONE}, n) + on_wires({a: ONE, b: target}, n)
    if name in ("CCX", "CCZ", "CSWAP"):
        # The control decides between nothing and a gate on the two other wires.
        inner = fixed_matrix({"CCX": "CNOT", "CCZ": "CZ", "CSWAP": "SWAP"}[name], wires[1:], n)
        return on_wires({a: I2 - ONE}, n) + on_wires({a: ONE}, n) @ inner
    if name == "ECR":
        return (on_wires({a: X}, n) + on_wires({a: Y, b: -X}, n)) / np.sqrt(2)
    swap = sum(on_wires({a: P, b: P}, n) for P in PAULIS.values()) / 2
    # Powers of the swap, and a swap with the phase i on states that differ.
    root = expm(1j * np.pi / 4 * (np.eye(2**n) - swap))
    phase = expm(1j * np.pi / 4 * (np.eye(2**n) - on_wires({a: Z, b: Z}, n)))
    powers = {"SWAP": swap, "SQSWAP": root, "SQSWAPdg": root.conj().T}
    return (powers | {"ISWAP": swap @ phase, "ISWAPdg": (swap @ phase).conj().T})[name]


def factor(one: Factor, x: np.ndarray) -> tuple[float, float]:
    """A function of a feature and its slope."""
    v = float(x[one.index])
    if one.function == "x":
        return v, 1.0
    if one.function == "step":
        return float(v > one.parameters[0]), 0.0
    if one.function == "bit":
        place, bits = map(int, one.parameters)
        return float(f"{int(v * (2**bits - 1) + 0.5):0{bits}b}"[::-1][place]), 0.0
    if one.function == "arcsin":
        return np.arcsin(v), 1 / np.sqrt(1 - v * v)
    if one.function == "arccos":
        return np.arccos(v), -1 / np.sqrt(1 - v * v)
    assert one.function == "arccos_square"
    return np.arccos(v * v), -2 * v / np.sqrt(1 - v**4)


def angle_value(angle: Angle, x: np.ndarray, w: np.ndarray) -> float:
    if angle.source == "const":
        return angle.offset
    if angle.computed is not None:
        total = sum(c * np.prod([factor(one, x)[0] for one in product]) for c, product in angle.computed.terms)
        return angle.scale * total + angle.offset
    return angle.scale * (x if angle.source == "input" else w)[angle.index] + angle.offset


def angle_slopes(angle: Angle, x: np.ndarray) -> dict[tuple[str, int], float]:
    """Derivatives of an angle with respect to what it reads, by the product rule."""
    if angle.source == "const":
        return {}
    if angle.computed is None:
        return {(angle.source, angle.index): angle.scale}
    slopes: dict[tuple[str, int], float] = {}
    for c, product in angle.computed.terms:
        for k, one in enumerate(product):
            others = [factor(other, x)[0] for j, other in enumerate(product) if j != k]
            key = ("input", one.index)
            slopes[key] = slopes.get(key, 0.0) + angle.scale * c * factor(one, x)[1] * np.prod(others)
    return slopes


def gate_matrix(gate: Gate, values: list[float], n: int) -> np.ndarray:
    if not gate.angles:
        return fixed_matrix(gate.name, gate.wires, n)
    result = np.eye(2**n, dtype=complex)
    for k, generator in generator_steps(gate.name, gate.wires, n):
        result = expm(-1j * values[k] * generator) @ result
    return result


def pauli_string(text: str) -> np.ndarray:
    return reduce(np.kron, [PAULIS[letter] for letter in text])


def run(circuit: Circuit, x: np.ndarray, w: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Expectation values (n_obs,) with derivatives (n_obs, n_inputs) and (n_obs, n_weights)."""
    n = circuit.n_wires
    state = np.zeros(2**n, dtype=complex)
    state[0] = 1
    # One tangent vector for each feature and weight, carried along with the state.
    tangents = {("input", k): 0 * state for k in range(circuit.n_inputs)}
    tangents |= {("weight", k): 0 * state for k in range(circuit.n_weights)}
    for gate in circuit.gates:
        if gate.name == "Amplitude":
            features = np.array([angle_value(angle, x, w) for angle in gate.angles])
            norm = np.linalg.norm(features)
            if norm == 0:
                continue
            state = np.zeros(2**n, dtype=complex)
            state[: len(features)] = features / norm
            for k, angle in enumerate(gate.angles):
                direction = np.zeros(2**n)
                direction[k] = 1
                tangents[angle.source, angle.index] += angle.scale * (direction - state * features[k] / norm) / norm
            continue
        if not gate.angles:
            matrix = fixed_matrix(gate.name, gate.wires, n)
            state = matrix @ state
            tangents = {key: matrix @ t for key, t in tangents.items()}
            continue
        for k, generator in generator_steps(gate.name, gate.wires, n):
            angle = gate.angles[k]
            matrix = expm(-1j * angle_value(angle, x, w) * generator)
            state = matrix @ state
            tangents = {key: matrix @ t for key, t in tangents.items()}
            for key, slope in angle_slopes(angle, x).items():
                tangents[key] = tangents[key] - 1j * slope * generator @ state
    operators = [pauli_string(text) for text in circuit.observables]
    values = np.array([np.vdot(state, o @ state).real for o in operators])

    def slopes(source: str, size: int) -> np.ndarray:
        rows = [[2 * np.vdot(state, o @ tangents[source, k]).real for k in range(size)] for o in operators]
        return np.array(rows).reshape(len(operators), size)

    return values, slopes("input", circuit.n_inputs), slopes("weight", circuit.n_weights)


def kraus_of(channel: Channel) -> list[np.ndarray]:
    p = channel.probability
    if channel.name == "amplitude_damping":
        return [np.array([[1, 0], [0, np.sqrt(1 - p)]]), np.array([[0, np.sqrt(p)], [0, 0]])]
    if channel.name == "phase_damping":
        return [np.array([[1, 0], [0, np.sqrt(1 - p)]]), np.array([[0, 0], [0, np.sqrt(p)]])]
    letters = {"depolarizing": "XYZ", "bit_flip": "X", "phase_flip": "Z"}[channel.name]
    return [np.sqrt(1 - p) * I2] + [np.sqrt(p / len(letters)) * PAULIS[letter] for letter in letters]


def run_noisy(circuit: Circuit, x: np.ndarray, w: np.ndarray, noise: NoiseModel) -> np.ndarray:
    """Expectation values (n_obs,) of the density matrix with channels after gates."""
    n = circuit.n_wires
    rho = np.zeros((2**n, 2**n), dtype=complex)
    rho[0, 0] = 1
    for gate in circuit.gates:
        values = [angle_value(angle, x, w) for angle in gate.angles]
        matrix = gate_matrix(gate, values, n)
        rho = matrix @ rho @ matrix.conj().T
        for name, channel in noise.after:
            if name in ("*", gate.name):
                for wire in gate.wires:
                    kraus = [on_wires({wire: k}, n) for k in kraus_of(channel)]
                    rho = sum(k @ rho @ k.conj().T for k in kraus)
    return np.array([np.trace(pauli_string(text) @ rho).real for text in circuit.observables])
