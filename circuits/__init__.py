"""What a quantum kernel is: parametrized circuits as immutable data, and their texts. No simulator."""

from circuits.ansatze import ansatz_option_values, ansatz_options, channel_overwrite, without_entanglement
from circuits.circuit import Angle, Circuit, Gate, computed, const
from circuits.encodings import encode, encoding_names, encoding_option_values, encoding_options, find_encoding
from circuits.features import Factor, Feature
from circuits.gates import GATES, GateSpec, shift_rule
from circuits.interop import as_circuit, from_pennylane, from_qasm3, from_qiskit
from circuits.kernels import kernel, kernel_citation, kernel_entangles, kernel_names
from circuits.noise import Channel, KrausChannel, NoiseModel, ReadoutError, ThermalRelaxation
from circuits.readouts import Readout, find_readout, readout_names

# Checked by qconv/__init__.py: another distribution also installs a package named "circuits".
QCONV_SENTINEL = "qconv"

__all__ = [
    "GATES",
    "Angle",
    "Channel",
    "Circuit",
    "Factor",
    "Feature",
    "Gate",
    "GateSpec",
    "KrausChannel",
    "NoiseModel",
    "Readout",
    "ReadoutError",
    "ThermalRelaxation",
    "ansatz_option_values",
    "ansatz_options",
    "as_circuit",
    "channel_overwrite",
    "computed",
    "const",
    "encode",
    "encoding_names",
    "encoding_option_values",
    "encoding_options",
    "find_encoding",
    "find_readout",
    "from_pennylane",
    "from_qasm3",
    "from_qiskit",
    "kernel",
    "kernel_citation",
    "kernel_entangles",
    "kernel_names",
    "readout_names",
    "shift_rule",
    "without_entanglement",
]
