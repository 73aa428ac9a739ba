"""Any kernel that a convolution takes, as a circuit."""

from __future__ import annotations

from typing import Any

from circuits.circuit import Circuit
from circuits.interop.pennylane import from_pennylane
from circuits.interop.qasm3_reader import from_qasm3, is_qasm3
from circuits.interop.qiskit import from_qiskit, qiskit_inputs


def as_circuit(kernel: Any, n_features: int) -> Circuit:
    """A Circuit, PennyLane function, QNode or tape, Qiskit QuantumCircuit or OpenQASM 3 text as a circuit.

    Args:
        kernel: A PennyLane function is called as f(inputs, weights) with n_features inputs and asks for its weights by
            index; a tape's first n_features trainable parameters are the features. In Qiskit and OpenQASM, parameters
            called x, input(s) or feature(s), alone, as a vector or with a number, are the features and the others are
            the weights; a QuantumCircuit without such names is ambiguous. What these rules do not fit goes through
            `from_pennylane`, `from_qiskit` or `from_qasm3`, which say it explicitly.
        n_features: Features of a patch.

    Raises:
        ValueError: For another type, a text that is no program, or a circuit that cannot be read.
    """
    if isinstance(kernel, Circuit):
        return kernel
    if isinstance(kernel, str):
        if not is_qasm3(kernel):
            raise ValueError(f"kernel {kernel!r} is no OpenQASM 3 text: it needs a line `OPENQASM 3.0;`")
        return from_qasm3(kernel)
    # By the names of packages, so that nothing is imported that the kernel did not bring.
    packages = {base.__module__.partition(".")[0] for base in type(kernel).__mro__}
    if "qiskit" in packages:
        if kernel.parameters and not qiskit_inputs(kernel):
            names = ", ".join(p.name for p in kernel.parameters)
            raise ValueError(
                f"the QuantumCircuit has Parameters {names}, none of which is called x or inputs: say which are "
                f"features with circuits.from_qiskit(qc, inputs=..., weights=...); a patch has {n_features}"
            )
        return from_qiskit(kernel)
    if "pennylane" in packages or callable(kernel):
        return from_pennylane(kernel, n_features)
    raise ValueError(
        f"kernel is a {type(kernel).__name__}: give a kernel's name, a circuits.Circuit, a PennyLane function, QNode "
        "or tape, a Qiskit QuantumCircuit or an OpenQASM 3 text"
    )
