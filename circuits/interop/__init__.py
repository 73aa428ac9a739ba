"""Circuits to and from PennyLane, Qiskit and OpenQASM 3. Those packages are imported inside the functions."""

from circuits.interop.pennylane import apply_in_pennylane, from_pennylane, pennylane_observable, to_pennylane
from circuits.interop.qasm3 import to_qasm3
from circuits.interop.qasm3_reader import from_qasm3, is_qasm3
from circuits.interop.qiskit import (
    append_measurement,
    build_qiskit,
    preparation_angles,
    qiskit_observable,
    reversed_bits,
    to_qiskit,
)
from circuits.interop.qiskit_reader import from_qiskit
from circuits.interop.reading import as_circuit, is_program

__all__ = [
    "append_measurement",
    "apply_in_pennylane",
    "as_circuit",
    "build_qiskit",
    "from_pennylane",
    "from_qasm3",
    "from_qiskit",
    "is_program",
    "is_qasm3",
    "pennylane_observable",
    "preparation_angles",
    "qiskit_observable",
    "reversed_bits",
    "to_pennylane",
    "to_qasm3",
    "to_qiskit",
]
