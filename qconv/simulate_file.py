"""A circuit run on rows of numbers, with the bitstrings that were found, and how the command line shows it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from circuits.circuit import Circuit
from circuits.noise import NoiseModel
from qconv.backends.jobs import JobFailed, ranges
from qconv.backends.matrix_products import Truncation, approximation_of, truncation_of
from qconv.backends.protocol import Backend, check_options, measurement_settings
from qconv.simulation import evaluate

if TYPE_CHECKING:
    from rich.console import Console

Real = NDArray[np.float64]

# Bitstrings are found from the means of all 2^n products of bits.
MAX_COUNTED_WIRES = 10
_SHOWN = 16  # bitstrings of a row
_SHOWN_OF_MANY = 4  # where there are several rows
_WHOLE = 1e-6  # of a count, that rounding of means may leave


@dataclass(frozen=True)
class Counted:
    """Bitstrings of one measurement setting.

    Args:
        basis: The Pauli that each wire was measured in, wire 0 first.
        observables: What is read off them.
        rows: For each row of inputs how often each bitstring was found, the most frequent first; wire 0 is the first
            bit. Empty for rows that a failed job left out.
    """

    basis: str
    observables: tuple[str, ...]
    rows: tuple[dict[str, int], ...]


@dataclass(frozen=True)
class Outcome:
    """What running a circuit gave.

    Args:
        circuit: Its name, or file.
        wires: Qubits.
        backend: Where it ran.
        shots: Samples a row and measurement setting; None for exact values.
        seed: Of the shots.
        observables: Pauli strings.
        inputs: (P, n_inputs).
        weights: (n_weights,).
        values: Expectation values (P, n_obs); NaN where a job failed.
        errors: Their standard errors, estimated from the shots; None for exact values, and for a single shot.
        counts: By measurement setting; None for exact values and where there are too many wires to count.
        failure: What failed and which rows it left out, in a sentence; empty if nothing did.
        truncation: What a backend that truncates lost, the worst row's; None for others.
        approximation: What a simulator truncates without telling what that lost; empty for others.
    """

    circuit: str
    wires: int
    backend: str
    shots: int | None
    seed: int | None
    observables: tuple[str, ...]
    inputs: Real
    weights: Real
    values: Real
    errors: Real | None
    counts: tuple[Counted, ...] | None
    failure: str = ""
    truncation: Truncation | None = None
    approximation: str = ""

    def record(self) -> dict[str, Any]:
        """As JSON takes it."""
        return {
            "circuit": self.circuit,
            "wires": self.wires,
            "backend": self.backend,
            "shots": self.shots,
            "seed": self.seed,
            "observables": list(self.observables),
            "inputs": self.inputs.tolist(),
            "weights": self.weights.tolist(),
            "values": _plain(self.values),
            "standard_errors": None if self.errors is None else _plain(self.errors),
            "counts": None
            if self.counts is None
            else [
                {"basis": setting.basis, "observables": list(setting.observables), "rows": list(setting.rows)}
                for setting in self.counts
            ],
            "failure": self.failure or None,
            "truncation": None
            if self.truncation is None
            else asdict(self.truncation) | {"value_error": self.truncation.value_error},
            "approximation": self.approximation or None,
        }


def _plain(rows: Real) -> list[list[float | None]]:
    """Numbers as JSON takes them, which has no NaN."""
    return [[None if np.isnan(number) else float(number) for number in row] for row in rows]


# --- running ----------------------------------------------------------------------------------------------------------


def run_circuit(
    circuit: Circuit,
    inputs: Real,
    weights: Real,
    *,
    name: str = "circuit",
    backend: Backend,
    shots: int | None = None,
    noise: NoiseModel | None = None,
    seed: int | None = None,
) -> Outcome:
    """Run a circuit on rows of inputs.

    Under shots every measurement setting is run once, and expectation values and bitstrings are of the same shots.
    After a job that failed no other is run, and what finished is in the outcome.

    Args:
        circuit: With at least one observable.
        inputs: (P, n_inputs).
        weights: (n_weights,).
        name: Shown.
        backend: Where it runs.
        shots: Samples a row and setting; None for exact values.
        noise: See qconv.simulate.
        seed: Makes shots repeatable.

    Raises:
        ValueError: As qconv.simulate, and for a job that failed where no row has finished.
    """
    check_options(shots, noise, seed)
    x, w = torch.from_numpy(inputs), torch.from_numpy(weights)
    failures: list[JobFailed] = []
    truncations: list[Truncation | None] = []
    approximations: set[str] = set()

    def values_of(observables: tuple[str, ...], own_seed: int | None) -> Real:
        if failures:
            return np.full((len(inputs), len(observables)), np.nan)
        run = circuit.with_observables(observables)
        try:
            found, compiled = evaluate(run, x, w, backend, shots=shots, noise=noise, seed=own_seed)
            truncations.append(truncation_of(compiled))
            approximations.add(approximation_of(compiled))
        except JobFailed as failure:
            failures.append(failure)
            return np.where(failure.missing, np.nan, failure.values[:, 0])
        return np.asarray(found.detach().numpy())

    counts: list[Counted] | None = None
    if shots is None or circuit.n_wires > MAX_COUNTED_WIRES:
        values = values_of(circuit.observables, seed if shots is not None else None)
    else:
        values, counts = np.empty((len(inputs), len(circuit.observables))), []
        for number, (basis, members) in enumerate(measurement_settings(circuit.observables)):
            # Settings are measurements of their own: their draws must not be the same.
            own = None if seed is None else int(np.random.SeedSequence((seed, number)).generate_state(1)[0])
            # Wires that no observable reads are measured too.
            basis = basis.replace("I", "Z")
            means = values_of(_products(basis), own)
            read = [circuit.observables[k] for k in members]
            values[:, list(members)] = means[:, [_mask(text) - 1 for text in read]]
            rows = _bitstrings(means, shots)
            if rows is None:  # read off shots of their own: the values stand, but there are no bitstrings
                counts = None
                values = values_of(circuit.observables, seed)
                break
            counts.append(Counted(basis, tuple(read), rows))
    failure = ""
    if failures:
        failure = f"a job on backend {backend.name!r} did not finish: {failures[0].reason}"
        left_out = np.isnan(values).any(axis=1)
        if np.isnan(values).all():
            raise ValueError(failure) from failures[0]
        failure += f"; rows {ranges(np.flatnonzero(left_out) + 1)} of {len(values)} have no values, or not all"
    errors = None
    if shots is not None and shots > 1:
        errors = np.sqrt(np.clip(1 - values**2, 0, None) / (shots - 1))
    sizes = name, circuit.n_wires, backend.name, shots, seed, circuit.observables
    truncation = Truncation.worst(truncations)
    found = None if counts is None else tuple(counts)
    approximation = max(approximations, default="")
    return Outcome(*sizes, inputs, weights, values, errors, found, failure, truncation, approximation)


def _products(basis: str) -> tuple[str, ...]:
    """Products of the bits of every subset of wires but the empty one, as Pauli strings; number k has mask k + 1."""
    chosen = product((False, True), repeat=len(basis))
    strings = ("".join(letter if on else "I" for letter, on in zip(basis, wires, strict=True)) for wires in chosen)
    return tuple(strings)[1:]


def _mask(observable: str) -> int:
    return int("".join("01"[letter != "I"] for letter in observable), 2)


def _bitstrings(means: Real, shots: int) -> tuple[dict[str, int], ...] | None:
    """How often each bitstring was found: N(s) = shots 2^-n sum over masks m of (-1)^|s & m| <m>.

    Args:
        means: Of the products of bits of `_products`, read off the same shots, (P, 2^n - 1).
        shots: How many.

    Returns:
        By row, empty for those of NaN; None where the products were not read off the same shots, which gives no whole
        numbers.
    """
    there = np.asarray(np.isfinite(means).all(axis=1))
    means = np.where(there[:, None], means, 0.0)
    transformed = np.concatenate([np.ones((len(means), 1)), means], axis=1)
    n = transformed.shape[1].bit_length() - 1
    grid = transformed.reshape(-1, *(2,) * n)
    for axis in range(1, n + 1):
        grid = np.concatenate([grid.sum(axis, keepdims=True), -np.diff(grid, axis=axis)], axis=axis)
    found = grid.reshape(len(means), -1) * shots / 2**n
    whole = np.rint(found)
    found[~there], whole[~there] = 0, 0
    if not np.abs(found - whole).max() < max(_WHOLE, 1e-12 * shots) or whole.min() < 0:
        return None
    result = []
    for row in whole.astype(int):
        order = np.argsort(-row, kind="stable")
        result.append({f"{k:0{n}b}": int(row[k]) for k in order if row[k]})
    return tuple(result)


# --- showing ----------------------------------------------------------------------------------------------------------


def show(outcome: Outcome, *, as_json: bool) -> None:
    """Print an outcome.

    Args:
        outcome: What to print.
        as_json: JSON with everything, instead of tables with what is most frequent.

    Raises:
        ValueError: After printing what there is, if a job failed.
    """
    _print(outcome, as_json)
    if outcome.failure:
        raise ValueError(outcome.failure)


def _print(outcome: Outcome, as_json: bool) -> None:
    if as_json:
        print(json.dumps(outcome.record(), indent=1))
        return
    from rich.console import Console

    console = Console()
    how = "exact" if outcome.shots is None else f"{outcome.shots:,} shots a measurement setting"
    if outcome.truncation is not None and outcome.truncation.discarded > 0:
        cut = f"truncated: {outcome.truncation}"
        how = cut if outcome.shots is None else f"{how}, {cut}"
    if outcome.approximation:
        cut = f"truncated by an unknown error ({outcome.approximation})"
        how = cut if outcome.shots is None else f"{how}, {cut}"
    settings = f"{outcome.circuit}: {outcome.wires} wire{'s' * (outcome.wires != 1)}, backend {outcome.backend}, {how}"
    settings += "; wire 0 is the first letter and bit" if outcome.wires > 1 else ""
    console.print(settings, soft_wrap=True, highlight=False)
    if len(outcome.inputs) == 1:
        _show_one(outcome, console)
    else:
        _show_many(outcome, console)
    if outcome.shots is not None and outcome.counts is None:
        console.print(f"Bitstrings are counted on up to {MAX_COUNTED_WIRES} wires measured together.", highlight=False)


def _show_one(outcome: Outcome, console: Console) -> None:
    from rich.table import Table

    table = Table("observable", "value", *([] if outcome.errors is None else ["standard error"]))
    for k, observable in enumerate(outcome.observables):
        errors = [] if outcome.errors is None else [f"{outcome.errors[0, k]:.6f}"]
        table.add_row(observable, f"{outcome.values[0, k]:+.6f}", *errors)
    console.print(table)
    for setting in outcome.counts or ():
        found = setting.rows[0]
        total = sum(found.values())
        if not found:
            continue
        table = Table("bits", "count", "share", title=f"bits in {setting.basis}")
        for bits, count in list(found.items())[:_SHOWN]:
            table.add_row(bits, f"{count:,}", f"{count / total:.4f}")
        if len(found) > _SHOWN:
            rest = total - sum(list(found.values())[:_SHOWN])
            table.add_row(f"{len(found) - _SHOWN} others", f"{rest:,}", f"{rest / total:.4f}")
        console.print(table)


def _show_many(outcome: Outcome, console: Console) -> None:
    from rich.table import Table

    settings = outcome.counts or ()
    columns = [f"bits in {setting.basis}" for setting in settings]
    table = Table("row", *outcome.observables, *columns)
    for row in range(len(outcome.inputs)):
        cells = []
        for k in range(len(outcome.observables)):
            value, error = f"{outcome.values[row, k]:+.4f}", ""
            if outcome.errors is not None:
                error = f" ± {outcome.errors[row, k]:.4f}"
            missing = outcome.failure and np.isnan(outcome.values[row, k])
            cells.append("missing" if missing else value + error)
        for setting in settings:
            found = list(setting.rows[row].items())
            more = len(found) - _SHOWN_OF_MANY
            shown = " ".join(f"{bits}:{count}" for bits, count in found[:_SHOWN_OF_MANY])
            cells.append(shown + (f" and {more} others" if more > 0 else ""))
        table.add_row(str(row + 1), *cells)
    console.print(table)
