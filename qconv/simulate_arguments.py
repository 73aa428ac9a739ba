"""What `qconv simulate` is given: circuits, numbers, noise and backends as they are typed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from math import pi
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from circuits.ansatze.library import ANSATZE
from circuits.circuit import Circuit
from circuits.interop import from_qasm3
from circuits.kernels import kernel
from circuits.naming import unknown
from circuits.noise import Channel, ChannelName, NoiseModel, ReadoutError
from circuits.readouts import find_readout
from qconv.backends.loading import load_backend
from qconv.backends.protocol import Backend

Real = NDArray[np.float64]

_SUFFIXES = (".qasm", ".qasm3")


def read_circuit(
    source: str,
    wires: int | None = None,
    depth: int | None = None,
    encoding: str | None = None,
    seed: int | None = None,
) -> Circuit:
    """A circuit from an OpenQASM 3 file, or a kernel by name.

    Args:
        source: A path, or a name that `qconv kernels` lists.
        wires: Of a named kernel; 4 by default.
        depth: Of a named kernel; 2 by default.
        encoding: Of a named kernel; "angle" by default.
        seed: Draws the structure of a random kernel.

    Raises:
        ValueError: For what is neither, a file that is no OpenQASM 3 program, or sizes given for a file.
    """
    path = Path(source)
    if not (path.exists() or path.suffix.lower() in _SUFFIXES):
        if source not in ANSATZE:
            raise unknown("file or kernel", source, ANSATZE)
        return kernel(source, wires or 4, 2 if depth is None else depth, encoding or "angle", seed=seed or 0)
    if (wires, depth, encoding) != (None, None, None):
        raise ValueError(f"{path} is a file, which has its own wires, gates and encoding: leave those options out")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is no text: give an OpenQASM 3 program") from None
    try:
        return from_qasm3(text)
    except ValueError as error:
        raise ValueError(f"{path} is not read: {error}") from error


def read_numbers(text: str | None, columns: int, what: str, option: str) -> Real:
    """Rows of numbers, as typed or from a file.

    Args:
        text: "0.1,0.2", or the path of a .npy or .csv file with a row a line; None for none.
        columns: Numbers a row.
        what: That they are, for messages ("inputs").
        option: How they are given, for messages.

    Returns:
        (rows, columns).

    Raises:
        ValueError: For what are no finite numbers, or another number of them.
    """
    if text is None:
        if columns:
            raise ValueError(
                f"{what} needed: {columns}, given: 0. Give {option} with {columns} numbers separated by commas, or a "
                ".npy or .csv file"
            )
        return np.zeros((1, 0))
    suffix = Path(text).suffix.lower()
    if suffix == ".npy":
        rows = _from_npy(Path(text), what)
    elif suffix == ".csv":
        lines = Path(text).read_text(encoding="utf-8").splitlines()
        rows = _table([(f"{text}, line {k}", line) for k, line in enumerate(lines, 1) if line.strip()], what)
    else:
        rows = _table([(option, text)] if text.strip() else [], what)
    if rows.shape[1] != columns or len(rows) == 0:
        raise ValueError(
            f"{what} needed in a row: {columns}, given by {option}: {len(rows)} row{'s' * (len(rows) != 1)} of "
            f"{rows.shape[1]}"
        )
    if not np.isfinite(rows).all():
        row = int(np.argwhere(~np.isfinite(rows))[0, 0])
        raise ValueError(f"{what} of row {row + 1} are {rows[row].tolist()}: give finite numbers")
    return rows


def _from_npy(path: Path, what: str) -> Real:
    try:
        found = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is no .npy file of numbers: {error}") from None
    if not isinstance(found, np.ndarray) or found.dtype.kind not in "iufb" or found.ndim not in (1, 2):
        shape = f"of {found.dtype} and shape {found.shape}" if isinstance(found, np.ndarray) else "of several"
        raise ValueError(f"{path} holds an array {shape}: {what} are real numbers, one row or a table of rows")
    return np.asarray(np.atleast_2d(found), dtype=np.float64)


def _table(lines: list[tuple[str, str]], what: str) -> Real:
    rows: list[list[float]] = []
    for place, line in lines:
        cells = line.split(",")
        try:
            rows.append([float(cell) for cell in cells])
        except ValueError:
            raise ValueError(f"{place}: {line.strip()!r} is no list of {what}: give numbers such as 0.1,0.2") from None
        if len(rows[-1]) != len(rows[0]):
            raise ValueError(
                f"{place} has {len(rows[-1])} numbers but the first row has {len(rows[0])}: make them equal"
            )
    return np.array(rows, dtype=np.float64).reshape(len(rows), -1 if rows else 0)


def read_weights(text: str | None, circuit: Circuit, seed: int | None) -> Real:
    """One row of weights as `read_numbers`, or "random": uniform in [0, 2 pi), drawn from the seed.

    Raises:
        ValueError: As `read_numbers`, and for several rows.
    """
    count = circuit.n_weights
    if text == "random":
        return np.asarray(np.random.default_rng(seed).uniform(0, 2 * pi, count))
    try:
        rows = read_numbers(text, count, "weights", "--weights")
    except ValueError as error:
        raise ValueError(f"{error}, or --weights random") if text is None else error from None
    if len(rows) > 1:
        raise ValueError(f"--weights gives {len(rows)} rows: give one, the weights of one circuit")
    return rows.ravel()


def read_noise(channels: Sequence[str], readout: str | None) -> NoiseModel | None:
    """A noise model as typed.

    Args:
        channels: "GATE:CHANNEL:PROBABILITY" each, such as "CNOT:depolarizing:0.01"; gate "*" for every gate.
        readout: "P(1|0),P(0|1)" of every wire; None for no error of the readout.

    Raises:
        ValueError: For texts of another form, and what circuits.NoiseModel refuses.
    """
    after = []
    for text in channels:
        parts = text.split(":")
        if len(parts) != 3:
            raise ValueError(f"--noise {text!r} is not GATE:CHANNEL:PROBABILITY, such as CNOT:depolarizing:0.01")
        (probability,) = _table([("--noise", parts[2])], "probabilities").ravel()[:1]
        after.append((parts[0], Channel(cast(ChannelName, parts[1]), float(probability))))
    errors = None
    if readout is not None:
        found = _table([("--readout-error", readout)], "probabilities").ravel()
        if len(found) != 2:
            raise ValueError(f"--readout-error {readout!r} is not P(1|0),P(0|1), such as 0.01,0.03")
        errors = ReadoutError(float(found[0]), float(found[1]))
    return NoiseModel(tuple(after), errors) if after or errors is not None else None


def read_backend(name: str, options: Sequence[str]) -> Backend:
    """A backend by name with options "KEY=VALUE" of load_backend; values are numbers, true, false, or text.

    Raises:
        ValueError: For texts of another form, and what load_backend refuses.
    """
    found: dict[str, Any] = {}
    for text in options:
        key, separator, value = text.partition("=")
        if not separator or not key:
            raise ValueError(f"--option {text!r} is not KEY=VALUE, such as method=matrix_product_state")
        try:
            found[key] = json.loads(value)
        except ValueError:
            found[key] = value
    return load_backend(name, **found)


def with_observables(circuit: Circuit, observables: str | None) -> Circuit:
    """A circuit with other observables: Pauli strings separated by commas, or a readout's name; None for its own."""
    if observables is None:
        return circuit
    names = [name.strip() for name in observables.split(",")]
    readout = find_readout(names[0] if len(names) == 1 else names, circuit.n_wires)
    return circuit.with_observables(readout.observables)
