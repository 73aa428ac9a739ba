"""Named kernels beside PennyLane and Qiskit: their unitaries there, and the peers' own circuits of those names.

That a translated circuit has the same unitary tests the gates and the translation; that a peer's own template has it
tests the kernel.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from circuits.ansatze.library import ANSATZE, ansatz
from circuits.ansatze.trees import BLOCKS
from circuits.circuit import Circuit, Gate
from circuits.encodings import encode
from qconv.backends.computed import with_plain_features

Matrix = NDArray[np.complex128]
Weights = NDArray[np.float64]

WIRES, DEPTH = 4, 2
TOLERANCE = 1e-10
TRANSLATED = "translated"


@dataclass(frozen=True)
class Check:
    """A kernel beside a peer.

    Args:
        name: The kernel; or "encoding ..." for one that peers have.
        peer: Package that computed the other unitary.
        what: What was compared: the circuit translated for the peer, or the name of the peer's own version of it.
        deviation: Largest difference of two entries of the unitaries, their global phase taken out.
    """

    name: str
    peer: str
    what: str
    deviation: float

    @property
    def passed(self) -> bool:
        """Whether they agree to rounding."""
        return self.deviation < TOLERANCE


def unitary_of(circuit: Circuit, weights: Weights) -> Matrix:
    """A circuit's unitary from the matrices of the gate table, in double precision.

    Args:
        circuit: Without features.
        weights: (n_weights,) in radians.

    Returns:
        (2^n, 2^n), wire 0 most significant.
    """
    size = 2**circuit.n_wires
    total = np.eye(size, dtype=complex)
    # The simulators run on the gates' rotations; matrices are the other definition that peers know.
    for gate in circuit.gates:
        own = len(gate.wires)
        matrix = gate.spec.matrix(*_values(gate, weights)).reshape((2,) * (2 * own))
        grid = np.tensordot(matrix, total.reshape((2,) * circuit.n_wires + (size,)), (range(own, 2 * own), gate.wires))
        total = np.moveaxis(grid, range(own), gate.wires).reshape(size, size)
    return total


def deviation(one: Matrix, other: Matrix) -> float:
    """Largest difference of entries when the global phase of both is the same."""
    overlap = np.vdot(other, one)
    if abs(overlap) == 0:
        return 2.0
    return float(np.abs(one - other * overlap / abs(overlap)).max())


def check_kernels(wires: int = WIRES, depth: int = DEPTH, seed: int = 0) -> Iterator[Check]:
    """Compare every kernel's unitary with the peers that are installed, at random weights.

    Each is handed to PennyLane and Qiskit gate by gate; where a peer has the kernel in its own library, that version is
    compared too.

    Args:
        wires: Qubits.
        depth: Layers.
        seed: Draws weights and the structures of random kernels.
    """
    rng = np.random.default_rng(seed)
    ways = [(name, way) for name, way in (("pennylane", _by_pennylane), ("qiskit", _by_qiskit)) if find_spec(name)]
    own = _peers_own(wires)
    for name in ANSATZE:
        block = ansatz(name, wires, depth, seed)
        weights = rng.uniform(-np.pi, np.pi, block.n_weights)
        ours = unitary_of(block, weights)
        for peer, way in ways:
            yield Check(name, peer, TRANSLATED, deviation(ours, way(block, weights)))
        for peer, label, make in own.get(name, ()):
            if find_spec(peer):
                yield Check(name, peer, label, deviation(ours, make(wires, depth, seed, weights)))
    for name, (peer, label, make) in _peers_encodings().items():
        if find_spec(peer):
            features = rng.uniform(-1, 1, wires)
            ours = _encoding_matrix(encode(name, wires), features)
            yield Check(f"encoding {name}", peer, label, deviation(ours, make(wires, depth, seed, features)))


def summary(checks: list[Check]) -> str:
    """One sentence on all checks."""
    failed = [f"{check.name} ({check.peer})" for check in checks if not check.passed]
    if not checks:
        return "Nothing was compared: neither PennyLane nor Qiskit is installed."
    translated = Counter(check.peer for check in checks if check.what == TRANSLATED)
    own = Counter(check.peer for check in checks if check.what != TRANSLATED)
    said = ", ".join(f"{n} translated for {peer}" for peer, n in translated.items())
    said += "".join(f", {n} with {peer}'s own templates" for peer, n in own.items())
    worst = max(check.deviation for check in checks)
    verdict = f"all agree, largest deviation {worst:.1e}" if not failed else f"these differ: {', '.join(failed)}"
    return f"{len(checks)} comparisons of unitaries ({said}): {verdict}."


def _values(gate: Gate, weights: Weights) -> list[float]:
    return [
        angle.offset if angle.source == "const" else angle.scale * float(weights[angle.index]) + angle.offset
        for angle in gate.angles
    ]


def _encoding_matrix(circuit: Circuit, features: Weights) -> Matrix:
    """The unitary of an encoding at given features."""
    plain, preparation = with_plain_features(circuit)
    inputs = torch.from_numpy(features)[None]
    values = inputs if preparation is None else preparation(inputs)
    # What reads an input reads a weight of that value.
    gates = (
        replace(gate, angles=tuple(replace(a, source="weight") if a.source == "input" else a for a in gate.angles))
        for gate in plain.gates
    )
    return unitary_of(Circuit(circuit.n_wires, tuple(gates)), values[0].numpy())


def _all_values(circuit: Circuit, weights: Weights) -> list[float]:
    return [value for gate in circuit.gates for value in _values(gate, weights)]


def _pennylane_matrix(apply: Callable[[], object], wires: int) -> Matrix:
    import pennylane as qml

    with qml.queuing.AnnotatedQueue() as queue:
        apply()
    tape = qml.tape.QuantumScript.from_queue(queue)
    return np.asarray(qml.matrix(tape, wire_order=range(wires)), dtype=complex)


def _by_pennylane(circuit: Circuit, weights: Weights) -> Matrix:
    from circuits.interop import apply_in_pennylane

    return _pennylane_matrix(lambda: apply_in_pennylane(circuit, _all_values(circuit, weights)), circuit.n_wires)


def _qiskit_matrix(circuit: Any) -> Matrix:
    from qiskit.quantum_info import Operator

    # Qiskit's first qubit is the least significant.
    return np.asarray(Operator(circuit.reverse_bits()).data, dtype=complex)


def _by_qiskit(circuit: Circuit, weights: Weights) -> Matrix:
    from circuits.interop import build_qiskit

    return _qiskit_matrix(build_qiskit(circuit, _all_values(circuit, weights)))


# (peer, its name for the kernel, (wires, depth, seed, weights) -> unitary).
Own = tuple[str, str, Callable[[int, int, int, Weights], Matrix]]


def _peers_own(wires: int) -> dict[str, tuple[Own, ...]]:
    """Kernels that peers have in their libraries on so many wires."""

    def pennylane(template: str, arguments: Callable[..., dict[str, Any]]) -> Own:
        def make(wires: int, depth: int, seed: int, weights: Weights) -> Matrix:
            import pennylane as qml

            chosen = arguments(wires, depth, seed, weights)
            return _pennylane_matrix(lambda: getattr(qml, template)(**chosen, wires=range(wires)), wires)

        return "pennylane", template, make

    def network(template: str) -> Own:
        real = BLOCKS["real"]

        def block(weights: Any, wires: Any) -> None:
            import pennylane as qml

            qml.RY(weights[0], wires=wires[0])
            qml.RY(weights[1], wires=wires[1])
            qml.CNOT(wires=wires)

        def make(wires: int, depth: int, seed: int, weights: Weights) -> Matrix:
            import pennylane as qml

            def apply() -> None:
                for own in weights.reshape(depth, -1, real.n_weights):
                    getattr(qml, template)(range(wires), 2, block, real.n_weights, own)

            return _pennylane_matrix(apply, wires)

        return "pennylane", template, make

    def qiskit(function: str) -> Own:
        def make(wires: int, depth: int, seed: int, weights: Weights) -> Matrix:
            from qiskit.circuit import library

            circuit = getattr(library, function)(wires, reps=depth)
            return _qiskit_matrix(circuit.assign_parameters(weights))

        return "qiskit", function, make

    def n_local(wires: int, depth: int, seed: int, weights: Weights) -> Matrix:
        from qiskit.circuit import library

        circuit = library.n_local(wires, ["rz", "rx", "rz"], "cz", "linear", reps=depth)
        return _qiskit_matrix(circuit.assign_parameters(weights))

    return {
        "strongly_entangling": (
            pennylane("StronglyEntanglingLayers", lambda n, d, s, w: {"weights": w.reshape(d, n, 3)}),
        ),
        "basic_entangler": (pennylane("BasicEntanglerLayers", lambda n, d, s, w: {"weights": w.reshape(d, n)}),),
        "simplified_two_design": (
            pennylane(
                "SimplifiedTwoDesign",
                lambda n, d, s, w: {"initial_layer_weights": w[:n], "weights": w[n:].reshape(d, n - 1, 2)},
            ),
        ),
        "random_layers": (
            pennylane("RandomLayers", lambda n, d, s, w: {"weights": w.reshape(d, n), "seed": s, "ratio_imprim": 0.3}),
        ),
        # PennyLane's tree takes powers of two alone.
        "ttn": (network("TTN"),) if wires.bit_count() == 1 else (),
        "mps": (network("MPS"),),
        "hardware_efficient": (("qiskit", "n_local", n_local),),
        "real_amplitudes": (qiskit("real_amplitudes"),),
        "efficient_su2": (qiskit("efficient_su2"),),
    }


def _peers_encodings() -> dict[str, Own]:
    """Encodings that peers have in their libraries."""

    def zz(wires: int, depth: int, seed: int, features: Weights) -> Matrix:
        from qiskit.circuit import library

        return _qiskit_matrix(library.zz_feature_map(wires).assign_parameters(features))

    def iqp(wires: int, depth: int, seed: int, features: Weights) -> Matrix:
        import pennylane as qml

        return _pennylane_matrix(lambda: qml.IQPEmbedding(features, wires=range(wires)), wires)

    return {"zz": ("qiskit", "zz_feature_map", zz), "iqp": ("pennylane", "IQPEmbedding", iqp)}
