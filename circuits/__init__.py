"""What a quantum kernel is: parametrized circuits as immutable data, and their texts. No simulator."""

from circuits.circuit import Angle, Circuit, Gate, const
from circuits.encodings import encode, encoding_names
from circuits.gates import GATES, GateSpec, shift_rule
from circuits.kernels import kernel, kernel_citation, kernel_entangles, kernel_names
from circuits.noise import Channel, NoiseModel

# Checked by qconv/__init__.py: another distribution also installs a package named "circuits".
QCONV_SENTINEL = "qconv"

__all__ = [
    "GATES",
    "Angle",
    "Channel",
    "Circuit",
    "Gate",
    "GateSpec",
    "NoiseModel",
    "const",
    "encode",
    "encoding_names",
    "kernel",
    "kernel_citation",
    "kernel_entangles",
    "kernel_names",
    "shift_rule",
]
