"""Transpiled circuits with folded gates: the noise of a device scaled where it arises, behind the transpiler.

A transpiler removes the folds of a kernel, G G^-1, as gates that do nothing, and adds gates of its own, which bring
qubits together; folds of what it returns stay, and leave no gate out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

from qiskit import QuantumCircuit, transpile
from qiskit.circuit import CircuitInstruction
from qiskit.circuit import Gate as QiskitGate
from qiskit.circuit.exceptions import CircuitError
from qiskit.transpiler.exceptions import TranspilerError

from qconv.backends.protocol import Unsupported
from qconv.backends.qiskit_programs import standard_gates
from qconv.backends.qiskit_runs import Program

# Rotations about Z, which devices do by the phase of later pulses, without time and without error. Source: McKay, Wood,
# Sheldon, Chow & Gambetta, Efficient Z gates for quantum computing (arXiv:1612.00858).
_VIRTUAL = ("rz", "p", "u1")


def folded_program(program: Program, scale: int, native: Iterable[str] | None, noisy: set[str] | None) -> Program:
    """Circuits in which every gate G with noise is G (G^-1 G)^k, k = (scale - 1) / 2.

    Args:
        program: Transpiled, measured circuits.
        scale: Odd.
        native: Names of the gates that are run; None for all of Qiskit's.
        noisy: Of those that have noise; None for all but rotations about Z.

    Raises:
        Unsupported: If noise would not grow by the scale: it follows none of the gates, or a gate's inverse takes other
            ones than the gate.
    """
    names = None if native is None else set(native)
    circuits = tuple(_folded(circuit, scale, names, noisy) for circuit in program.circuits)
    for written, folded in zip(program.circuits, circuits, strict=True):
        before, after = (Counter(len(item.qubits) for item in c.data if _errs(item, noisy)) for c in (written, folded))
        if not before:
            raise Unsupported(
                f"the circuits are made of {', '.join(written.count_ops())}, none of which has noise: there is nothing "
                "to extrapolate"
            )
        if after != Counter({qubits: scale * number for qubits, number in before.items()}):
            raise Unsupported(
                f"folding {scale} times makes gates with noise on (1, 2) qubits from ({before[1]}, {before[2]}) into "
                f"({after[1]}, {after[2]}), since inverses take other gates here: noise must follow a gate and its "
                "inverse alike"
            )
    return replace(program, circuits=circuits)


def _folded(circuit: QuantumCircuit, scale: int, native: set[str] | None, noisy: set[str] | None) -> QuantumCircuit:
    result = circuit.copy_empty_like()
    for item in circuit.data:
        result.append(item)
        for _ in range(scale // 2 if _errs(item, noisy) else 0):
            for gate in _inverse(item, native):
                result.append(gate)
            result.append(item)
    return result


def _errs(item: CircuitInstruction, noisy: set[str] | None) -> bool:
    """Whether an instruction is a gate with noise."""
    name = item.operation.name
    return isinstance(item.operation, QiskitGate) and (name not in _VIRTUAL if noisy is None else name in noisy)


def _inverse(item: CircuitInstruction, native: set[str] | None) -> list[CircuitInstruction]:
    """A gate's inverse in gates that are run."""
    try:
        inverse = item.operation.inverse()
        if inverse.name == item.operation.name or native is None or inverse.name in native:
            return [item.replace(operation=inverse)]
        if len(item.qubits) == 1:
            alone = QuantumCircuit(1)
            alone.append(inverse, [0])
            alone = transpile(alone, basis_gates=standard_gates(sorted(native)), optimization_level=1)
            return [part.replace(qubits=item.qubits) for part in alone.data]
    except (CircuitError, TranspilerError):
        pass  # without a definition, or in none of these gates
    raise Unsupported(f"gate {item.operation.name} cannot be folded: the gates run here do not make up its inverse")
