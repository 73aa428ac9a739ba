"""The named kernels as rows, and how the command line shows them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from circuits.ansatze.library import ANSATZE, ansatz, ansatz_option_values, ansatz_options, find_ansatz
from circuits.encodings import encoding_names
from circuits.readouts import ROOT, readout_names
from qconv.channels import CHANNELS
from qconv.kernel_checks import DEPTH, TOLERANCE, TRANSLATED, WIRES, Check, check_kernels, summary

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class KernelRow:
    """A named kernel's trainable block.

    Args:
        name: Its name.
        wires: Qubits it was built on.
        weights: Trainable numbers.
        formula: Weights on n wires at depth d, in Python; empty where a random structure decides.
        gates: Gates by name.
        depth: Longest chain of gates one after another.
        options: What it takes besides wires and depth, with defaults.
        takes: What each of these takes, in words.
        root: Wires that are not discarded, which readout "root" reads; empty where none is discarded.
        entangles: Whether it has gates on two wires.
        citation: Where it comes from.
    """

    name: str
    wires: int
    weights: int
    formula: str
    gates: dict[str, int]
    depth: int
    options: dict[str, object]
    takes: dict[str, str]
    root: tuple[int, ...]
    entangles: bool
    citation: str


def kernel_rows(wires: int = WIRES, depth: int = DEPTH, seed: int = 0) -> list[KernelRow]:
    """Every named kernel's block.

    Args:
        wires: Qubits.
        depth: Layers.
        seed: Draws the structures of random ones.
    """
    rows = []
    for name, found in ANSATZE.items():
        block = ansatz(name, wires, depth, seed)
        counts = dict(sorted(block.counts().items()))
        sizes = (block.n_weights, found.weights, counts, block.depth())
        options = ansatz_options(name), ansatz_option_values(name)
        root = () if found.root is None else found.root(wires, depth)
        rows.append(KernelRow(name, wires, *sizes, *options, root, found.entangles, found.citation))
    return rows


def show_kernels(wires: int, depth: int, seed: int, name: str | None = None, *, check: bool, as_json: bool) -> bool:
    """Print the kernels, or the checks of them.

    Args:
        wires: Qubits.
        depth: Layers.
        seed: Draws the structures of random ones.
        name: One of them, with what its options take; None for all.
        check: Whether to compare them with the peers that are installed instead of listing them.
        as_json: A JSON list instead of a table.

    Returns:
        Whether no check failed.

    Raises:
        ValueError: For an unknown name.
    """
    from rich.console import Console

    console = Console()
    if name is not None:
        find_ansatz(name)
    if not check:
        rows = [row for row in kernel_rows(wires, depth, seed) if name in (None, row.name)]
        if as_json:
            print(json.dumps([asdict(row) for row in rows], indent=1))
        else:
            console.print(_table_of_kernels(rows, wires, depth))
            console.print(_legend() if name is None else _options_in_words(rows[0]), highlight=False, markup=False)
        return True
    if as_json:
        checks = [done for done in check_kernels(wires, depth, seed) if name in (None, done.name)]
        print(json.dumps([{**asdict(done), "passed": done.passed} for done in checks], indent=1))
    else:
        with console.status("unitaries of the kernels, here and by PennyLane and Qiskit"):
            checks = [done for done in check_kernels(wires, depth, seed) if name in (None, done.name)]
        console.print(_table_of_checks(checks, wires, depth))
        print(summary(checks))
    return all(done.passed for done in checks)


def _table_of_kernels(rows: list[KernelRow], wires: int, depth: int) -> Table:
    from rich.table import Table

    title = f"Kernels on {wires} wires at depth {depth}; a formula counts weights on n wires at depth d"
    table = Table(title=title, show_lines=True)
    # The sources are long: they get the room.
    for column, width in (("kernel", 21), ("weights", 16), ("gates", 14), ("depth", 5), ("source", None)):
        table.add_column(column, max_width=width)
    for row in rows:
        weights = f"{row.weights:,}" + (f"\n{row.formula}" if row.formula else "")
        gates = " ".join(f"{count}×{gate}" for gate, count in row.gates.items())
        options = ", ".join(f"{option}={default!r}" for option, default in row.options.items())
        source = row.citation + (f"\nOptions: {options}" if options else "")
        if row.root:
            left = f"wire{'s' * (len(row.root) > 1)} {', '.join(map(str, row.root))}"
            source += f"\nOf the {wires} wires it leaves {left}, which readout root reads"
        table.add_row(row.name, weights, gates, str(row.depth), source)
    return table


def _options_in_words(row: KernelRow) -> str:
    if not row.options:
        return f"{row.name} takes no options besides wires, depth, entangle and reupload."
    lines = [f"{option}={row.options[option]!r}: {takes}" for option, takes in row.takes.items()]
    return "\n".join([f"Options of {row.name}, with their defaults:", *lines])


def _legend() -> str:
    return "\n".join(
        [
            "What options take: qconv kernels NAME, or circuits.ansatz_option_values(name).",
            f"Encodings: {', '.join(encoding_names())}; see circuits.find_encoding(name).",
            f"Readouts: {', '.join(readout_names())}, {ROOT} of kernels that discard wires, or Pauli strings; see "
            "circuits.find_readout.",
            f"Channels of QuantumConv2d: {', '.join(CHANNELS)}; see qconv.channels.",
        ]
    )


def _table_of_checks(checks: list[Check], wires: int, depth: int) -> Table:
    from rich.table import Table

    title = f"Largest deviation from peers' unitaries on {wires} wires at depth {depth}; up to {TOLERANCE:.0e} passes"
    table = Table("kernel", "by PennyLane", "by Qiskit", "its version in a peer's library", title=title)
    for name in dict.fromkeys(done.name for done in checks):
        cells = {"pennylane": "", "qiskit": "", "own": ""}
        for done in (done for done in checks if done.name == name):
            said = f"{done.deviation:.1e}" + ("" if done.passed else " DIFFERS")
            if done.what == TRANSLATED:
                cells[done.peer] = said
            else:
                cells["own"] = f"{done.what} {said}"
        table.add_row(name, *cells.values())
    return table
