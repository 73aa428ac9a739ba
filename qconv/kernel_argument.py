"""The kernel that a command is given: a name with its options, or an OpenQASM 3 file."""

from __future__ import annotations

import json
from ast import literal_eval
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from circuits.ansatze.library import ANSATZE
from circuits.circuit import Circuit
from circuits.interop import as_circuit
from circuits.kernels import kernel
from circuits.naming import unknown
from circuits.readouts import find_readout

SUFFIXES = (".qasm", ".qasm3")


def is_file(source: str) -> bool:
    """Whether a command's argument is a file rather than a kernel's name."""
    path = Path(source)
    return path.suffix.lower() in SUFFIXES or (source not in ANSATZE and path.is_file())


def read_circuit(
    source: str,
    wires: int | None = None,
    depth: int | None = None,
    encoding: str | None = None,
    seed: int | None = None,
    readout: str | None = None,
    *,
    entangle: bool = True,
    reupload: bool = False,
    options: Sequence[str] = (),
    features: int | None = None,
) -> Circuit:
    """A kernel by name, or a circuit from an OpenQASM 3 file.

    Args:
        source: A name that `qconv kernels` lists, or a path.
        wires: Of a named kernel; 4 by default.
        depth: Of a named kernel; 2 by default.
        encoding: Of a named kernel; "angle" by default.
        seed: Draws the structure of a random kernel.
        readout: A readout's name, or Pauli strings with commas between; None for the file's own, or "z".
        entangle: False for the control of a named kernel.
        reupload: Whether a named kernel's encoding is repeated before each layer.
        options: "KEY=VALUE" of a named kernel's ansatz, see `read_options`.
        features: Of a named kernel; as many as the encoding holds by default.

    Raises:
        ValueError: For what is neither, a file that is no OpenQASM 3 program, or options of kernels given for a file.
    """
    read = None if readout is None else _names(readout)
    if not is_file(source):
        if source not in ANSATZE:
            raise unknown("file or kernel", source, ANSATZE)
        return kernel(
            source,
            4 if wires is None else wires,
            2 if depth is None else depth,
            encoding or "angle",
            read or "z",
            features=features,
            seed=seed or 0,
            entangle=entangle,
            reupload=reupload,
            **read_options(options),
        )
    path = Path(source)
    if (wires, depth, encoding) != (None, None, None) or not entangle or reupload or options:
        raise ValueError(
            f"{path} is a file, which has its own wires, gates and encoding: leave options of named kernels out"
        )
    circuit = as_circuit(path, n_features=0)  # names in the file tell its features
    return circuit if read is None else circuit.with_observables(find_readout(read, circuit.n_wires).observables)


def _names(text: str) -> str | list[str]:
    names = [name.strip() for name in text.split(",")]
    return names[0] if len(names) == 1 else names


def read_options(texts: Sequence[str], example: str = "block=complex") -> dict[str, Any]:
    """Options as typed, "KEY=VALUE" each: numbers, true, false, lists such as 1,2 or [1,2], else text.

    Args:
        texts: As typed.
        example: For the message.

    Raises:
        ValueError: For a text of another form, or a name given twice.
    """
    found: dict[str, Any] = {}
    for text in texts:
        name, separator, value = text.partition("=")
        if not separator or not name:
            raise ValueError(f"--option {text!r} is not KEY=VALUE, such as {example}")
        if name in found:
            raise ValueError(f"--option {name} is given twice, {found[name]!r} and {value!r}: give it once")
        found[name] = _value(value)
    return found


def _value(text: str) -> Any:
    for read in (json.loads, literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError):
            continue
    return text
