"""Any kernel that a convolution takes, as a circuit."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

from circuits.circuit import Circuit
from circuits.interop.naming import is_weight
from circuits.interop.pennylane import from_pennylane
from circuits.interop.qasm3_reader import from_qasm3, is_qasm3
from circuits.interop.qiskit_reader import from_qiskit, qiskit_inputs
from circuits.interop.tracing import ShapeNeeded

_SUFFIXES = (".qasm", ".qasm3")


def is_program(kernel: object) -> bool:
    """Whether a kernel is an OpenQASM 3 text, or the path of a file with one, and not a name."""
    if isinstance(kernel, Path):
        return True
    return isinstance(kernel, str) and (is_qasm3(kernel) or kernel.lower().endswith(_SUFFIXES))


def as_circuit(kernel: Any, n_features: int, depth: int = 2) -> Circuit:
    """A Circuit, PennyLane function, QNode or tape, Qiskit QuantumCircuit or OpenQASM 3 program as a circuit.

    Args:
        kernel: An OpenQASM 3 program is a text, a pathlib.Path of a file, or a file's name ending in .qasm or .qasm3.
            Features are told from weights by their names, see `from_pennylane`, `from_qiskit` and `from_qasm3`: the
            arguments of a PennyLane function, the Parameters of a QuantumCircuit (where no name is clear it is
            ambiguous) and the inputs of a program. A tape's first n_features trainable parameters are the features.
            What these rules do not fit goes through those three, which say it explicitly.
        n_features: Features of a patch, an array that a PennyLane function is given.
        depth: Layers of the weights of a PennyLane function that uses them as a whole, such as
            qml.StronglyEntanglingLayers(weights, ...). On n wires their shape is the first of (depth, n, 3),
            (depth, n), (n, 3) and (n,) of which the function uses every weight; any other goes through
            `from_pennylane`.

    Raises:
        ValueError: For another type, a text that is no program, or a circuit that cannot be read.
    """
    if isinstance(kernel, Circuit):
        return kernel
    if isinstance(kernel, Path) or (isinstance(kernel, str) and not is_qasm3(kernel) and is_program(kernel)):
        return _from_file(Path(kernel))
    if isinstance(kernel, str):
        if not is_qasm3(kernel):
            raise ValueError(f"kernel {kernel!r} is no OpenQASM 3 text: it needs a line `OPENQASM 3.0;`")
        return from_qasm3(kernel)
    # By the names of packages, so that nothing is imported that the kernel did not bring.
    packages = {base.__module__.partition(".")[0] for base in type(kernel).__mro__}
    if "qiskit" in packages:
        if kernel.parameters and not qiskit_inputs(kernel) and not all(is_weight(p.name) for p in kernel.parameters):
            names = ", ".join(p.name for p in kernel.parameters)
            raise ValueError(
                f"the QuantumCircuit has Parameters {names}, none of which is called x or inputs: say which are "
                f"features with circuits.from_qiskit(qc, inputs=..., weights=...); a patch has {n_features}. If all "
                f"are weights, put an encoding before it: circuits.encode('angle', {n_features}) + "
                "circuits.from_qiskit(qc)"
            )
        return from_qiskit(kernel)
    if "pennylane" in packages or callable(kernel):
        return _from_pennylane(kernel, n_features, depth)
    raise ValueError(
        f"kernel is a {type(kernel).__name__}: give a kernel's name, a circuits.Circuit, a PennyLane function, QNode "
        "or tape, a Qiskit QuantumCircuit, or an OpenQASM 3 text or the path of one"
    )


def _from_file(path: Path) -> Circuit:
    try:
        return from_qasm3(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"kernel {str(path)!r} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is no text: give an OpenQASM 3 program") from None
    except ValueError as error:
        raise ValueError(f"{path} is not read: {error}") from error


def _from_pennylane(kernel: Any, n_features: int, depth: int) -> Circuit:
    try:
        return from_pennylane(kernel, n_features)
    except ShapeNeeded as needed:
        n = needed.n_wires or n_features
        for shape in ((depth, n, 3), (depth, n), (n, 3), (n,)):
            try:
                circuit = from_pennylane(kernel, n_features, shape)
            except ValueError:
                continue
            read = {a.index for gate in circuit.gates for a in gate.angles if a.source == "weight"}
            # Weights that nothing reads belong to another shape.
            if len(read) == prod(shape):
                return circuit
        raise
