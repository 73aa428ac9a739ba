"""What `qconv simulate` is given: numbers, noise and backends as they are typed."""

from __future__ import annotations

from collections.abc import Sequence
from math import pi
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray

from circuits.circuit import Circuit
from circuits.interop.qasm3 import DEFINITIONS, STANDARD
from circuits.noise import Channel, ChannelName, NoiseModel, ReadoutError
from qconv.backends.loading import load_backend
from qconv.backends.protocol import Backend
from qconv.kernel_argument import read_options

Real = NDArray[np.float64]


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
        named = " (of a file's parameters, those called x, input or feature, as x_0, are features, others weights)"
        raise ValueError(
            f"{what} needed in a row: {columns}, given by {option}: {len(rows)} row{'s' * (len(rows) != 1)} of "
            f"{rows.shape[1]}{named if columns == 0 and what == 'inputs' else ''}"
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
        channels: "GATE:CHANNEL:PROBABILITY" each, such as "CNOT:depolarizing:0.01"; gate "*" for every gate, and names
            of OpenQASM 3 too, such as "cx".
        readout: "P(1|0),P(0|1)" of every wire; None for no error of the readout.

    Raises:
        ValueError: For texts of another form, and what circuits.NoiseModel refuses.
    """
    after = []
    names = {text: gate for gate, text in STANDARD.items()} | {gate.lower(): gate for gate in DEFINITIONS}
    for text in channels:
        parts = text.split(":")
        if len(parts) != 3:
            raise ValueError(f"--noise {text!r} is not GATE:CHANNEL:PROBABILITY, such as CNOT:depolarizing:0.01")
        (probability,) = _table([("--noise", parts[2])], "probabilities").ravel()[:1]
        after.append((names.get(parts[0], parts[0]), Channel(cast(ChannelName, parts[1]), float(probability))))
    errors = None
    if readout is not None:
        found = _table([("--readout-error", readout)], "probabilities").ravel()
        if len(found) != 2:
            raise ValueError(f"--readout-error {readout!r} is not P(1|0),P(0|1), such as 0.01,0.03")
        errors = ReadoutError(float(found[0]), float(found[1]))
    return NoiseModel(tuple(after), errors) if after or errors is not None else None


def read_backend(name: str, options: Sequence[str]) -> Backend:
    """A backend by name with options of load_backend, see `read_options`.

    Raises:
        ValueError: For texts of another form, and what load_backend refuses.
    """
    return load_backend(name, **read_options(options, "method=matrix_product_state"))
