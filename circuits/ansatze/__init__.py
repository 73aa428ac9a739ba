"""Named trainable blocks, each with its citation. They read weights from index 0 on and no features."""

from circuits.ansatze.builder import Ansatz, ring
from circuits.ansatze.library import (
    ANSATZE,
    ansatz,
    ansatz_option_values,
    ansatz_options,
    find_ansatz,
    without_entanglement,
)
from circuits.ansatze.smaldone import channel_overwrite

__all__ = [
    "ANSATZE",
    "Ansatz",
    "ansatz",
    "ansatz_option_values",
    "ansatz_options",
    "channel_overwrite",
    "find_ansatz",
    "ring",
    "without_entanglement",
]
