"""`qconv diagnose`: all diagnostics of a kernel as a table, a JSON file and pictures."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from circuits.ansatze.library import ansatz
from circuits.circuit import Circuit
from circuits.encodings import find_encoding
from qconv.data import load_dataset
from qconv.diagnostics.entanglement import entangling_capability
from qconv.diagnostics.expressibility import expressibility
from qconv.diagnostics.fisher import effective_dimension
from qconv.diagnostics.gradients import COSTS, Build, barren_plateau, gradient_variance
from qconv.diagnostics.kernels import gaussian_kernel, geometric_difference, kernel_matrix, target_alignment
from qconv.diagnostics.spectrum import fourier_spectrum
from qconv.kernel_argument import is_file, read_circuit, read_options

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

IMAGES = 200
PATCHES = 30  # that the Fisher information is averaged over
PIXELS = 64
REGULARIZATION = 0.01
PLATEAU_WIRES = (2, 3, 4, 5, 6)
MAX_WIRES = 10


@dataclass(frozen=True)
class Finding:
    """A row of the table.

    Args:
        measure: What was measured.
        value: The number; None where the measure does not apply.
        low: Lower end of its 95 % interval, None where there is none.
        high: Upper end.
        meaning: How many samples, and what to compare with; or why there is no value.
    """

    measure: str
    value: float | None
    low: float | None
    high: float | None
    meaning: str


@dataclass(frozen=True)
class Diagnosis:
    """What `qconv diagnose` shows.

    Args:
        name: The kernel's.
        circuit: The kernel.
        findings: Rows of the table.
        pictures: By file name.
    """

    name: str
    circuit: Circuit
    findings: tuple[Finding, ...]
    pictures: dict[str, Figure]

    def table(self) -> Table:
        """For the screen."""
        from rich.table import Table

        title = f"{self.name} on {self.circuit.n_wires} wires, {self.circuit.n_weights} weights"
        table = Table(title=title)
        for column, side in (("measure", "left"), ("value", "right"), ("95 % interval", "right"), ("", "left")):
            table.add_column(column, justify="right" if side == "right" else "left")
        for row in self.findings:
            value = "" if row.value is None else f"{row.value:.4g}"
            interval = "" if row.low is None else f"{row.low:.4g} to {row.high:.4g}"
            table.add_row(row.measure, value, interval, row.meaning)
        return table

    def save(self, folder: Path) -> list[Path]:
        """Write the findings as JSON and the pictures as PNG, each replaced as a whole; returns the files."""
        folder.mkdir(parents=True, exist_ok=True)
        rows = [vars(row) for row in self.findings]
        text = json.dumps({"kernel": self.name, "circuit": self.circuit.text(), "findings": rows}, indent=1)
        written = [_write(folder / "diagnosis.json", lambda path: path.write_text(text + "\n", encoding="utf-8"))]
        for name, figure in self.pictures.items():
            written.append(_write(folder / f"{name}.png", partial(figure.savefig, dpi=160)))
        return written


def _write(path: Path, write: Callable[[Path], Any]) -> Path:
    beside = path.with_name(f".{path.stem}.part{path.suffix}")
    try:
        write(beside)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    return path


def digit_pixels(count: int, images: int = IMAGES) -> tuple[Tensor, Tensor]:
    """Pixels of real handwritten digits, those nearest to the middle of 8x8, and which digits they are of.

    Args:
        count: Pixels of an image, 1 to 64.
        images: The first so many of scikit-learn's digits.

    Returns:
        (images, count) in [0, 1], float64, in the order of rows, and (images,).
    """
    found = load_dataset("digits")
    rows, columns = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    distance = (rows - 3.5).square() + (columns - 3.5).square()
    nearest = distance.flatten().argsort(stable=True)[:count].sort().values
    return found.train_images[:images].flatten(1)[:, nearest].double(), found.train_labels[:images]


@dataclass(frozen=True)
class _Case:
    """What is diagnosed: a circuit, the family that it belongs to (None for a file), digits, and how much is drawn."""

    name: str
    circuit: Circuit
    build: Build | None
    depth: int
    data: Tensor
    digits: Tensor
    pairs: int
    seed: int


def diagnose(
    source: str,
    wires: int | None = None,
    depth: int | None = None,
    encoding: str | None = None,
    readout: str | None = None,
    *,
    entangle: bool = True,
    reupload: bool = False,
    options: Sequence[str] = (),
    pairs: int = 5000,
    seed: int = 0,
) -> Diagnosis:
    """Every diagnostic of a kernel; those that need data take pixels of real handwritten digits.

    Args:
        source: Of `circuits.kernel_names()`, or an OpenQASM 3 file.
        wires: As of `read_circuit`, like all up to options.
        depth: Layers.
        encoding: How features enter.
        readout: What is read at the end: outputs are the expectation values of its Pauli strings.
        entangle: False for the control.
        reupload: Whether the encoding is repeated.
        options: "KEY=VALUE" of a named kernel.
        pairs: Of random weights for the expressibility, and random weights for the entangling capability.
        seed: Of random kernels and of all draws.

    Raises:
        ValueError: For unknown names, or sizes that do not fit.
    """
    build: Build | None = None
    features = None
    if not is_file(source):
        features = min(find_encoding(encoding or "angle").capacity(4 if wires is None else wires), PIXELS)
        taken = read_options(options)
        build = lambda n, d: ansatz(source, n, d, seed, entangle=entangle, **taken)  # noqa: E731
    circuit = read_circuit(
        source,
        wires,
        depth,
        encoding,
        seed,
        readout,
        entangle=entangle,
        reupload=reupload,
        options=options,
        features=features,
    )
    if circuit.n_wires > MAX_WIRES or circuit.n_inputs > PIXELS:
        raise ValueError(
            f"{source} has {circuit.n_wires} wires and takes {circuit.n_inputs} features: give up to {MAX_WIRES} wires "
            f"and {PIXELS} features, the pixels of a digit"
        )
    name = f"{Path(source).stem}{'' if entangle else ' without entanglement'}"
    case = _Case(name, circuit, build, depth or 2, *digit_pixels(circuit.n_inputs), pairs, seed)
    findings: list[Finding] = []
    pictures: dict[str, Figure] = {}
    for step in (_states, _gradients, _waves, _data):
        for finding, picture in step(case):
            findings.append(finding)
            pictures |= picture
    return Diagnosis(name, circuit, tuple(findings), pictures)


Found = Iterator[tuple[Finding, "dict[str, Figure]"]]


def _without(measure: str, why: str) -> tuple[Finding, dict[str, Figure]]:
    return Finding(measure, None, None, None, why), {}


def _states(case: _Case) -> Found:
    from qconv.diagnostics.pictures import draw_fidelities

    spread = expressibility(case.circuit, case.data, pairs=case.pairs, seed=case.seed)
    meaning = (
        f"nats from Haar-random states (0), {spread.value:.4g} less a bias of {spread.bias:.2g}; {case.pairs:,} pairs, "
        f"{len(spread.histogram)} bins{'' if case.circuit.n_weights else '; no weights: one state, the most there is'}"
    )
    picture = {"fidelities": draw_fidelities(spread, case.name)}
    yield Finding("expressibility", spread.corrected, spread.low, spread.high, meaning), picture
    tangled = entangling_capability(case.circuit, case.data, samples=case.pairs, seed=case.seed)
    meaning = f"mean Meyer-Wallach measure, 0 to 1; Haar-random states {tangled.haar:.4g}; {case.pairs:,} samples"
    yield Finding("entangling capability", tangled.value, tangled.low, tangled.high, meaning), {}


def _gradients(case: _Case) -> Found:
    from qconv.diagnostics.pictures import draw_plateau

    if not case.circuit.n_weights or not case.circuit.observables:
        lacking = "observables" if case.circuit.n_weights else "weights"
        yield _without("gradient variance", f"the kernel has no {lacking}")
        return
    here = gradient_variance(case.circuit, case.data, seed=case.seed)
    meaning = f"of its outputs, mean over weights that act; {here.samples} samples"
    yield Finding("gradient variance", here.value, here.low, here.high, meaning), {}
    if case.build is None:
        yield _without("log2 gradient variance a wire", "a file is one circuit: named kernels exist on many wires")
        return
    for cost in COSTS:
        depths = (1, case.depth) if case.depth > 1 else (1,)
        try:
            family = barren_plateau(case.build, PLATEAU_WIRES, depths, cost=cost, seed=case.seed)
        except ValueError as error:
            yield _without(f"log2 gradient variance a wire, {cost}", str(error))
            continue
        picture = {f"gradients_{cost}": draw_plateau(family, case.name)}
        for slope in family.slopes:
            meaning = f"depth {slope.depth}, {PLATEAU_WIRES[0]} to {PLATEAU_WIRES[-1]} wires; random circuits have -1"
            row = Finding(f"log2 gradient variance a wire, {cost}", slope.value, slope.low, slope.high, meaning)
            yield row, picture


def _waves(case: _Case) -> Found:
    from qconv.diagnostics.pictures import draw_spectrum

    try:
        waves = fourier_spectrum(case.circuit, seed=case.seed)
    except ValueError as error:
        yield _without("Fourier frequencies", str(error))
        return
    meaning = f"of {waves.accessible()} that the encoding allows; up to {max(waves.spectrum.degrees)} an input"
    picture = {"spectrum": draw_spectrum(waves, case.name)}
    yield Finding("Fourier frequencies", waves.present(), None, None, meaning), picture


def _data(case: _Case) -> Found:
    circuit, data, digits, seed = case.circuit, case.data, case.digits, case.seed
    if circuit.n_weights:
        try:
            size = effective_dimension(circuit, data[:PATCHES], seed=seed)
        except ValueError as error:
            yield _without("effective dimension", str(error))
        else:
            meaning = f"of {size.weights} weights, for {size.n_data} observations; {size.samples} samples"
            yield Finding("effective dimension", size.value, size.low, size.high, meaning), {}
    if not circuit.n_inputs:
        yield _without("kernels of data", "the circuit takes no features")
        return
    weights = torch.rand(circuit.n_weights, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    matrices = {
        kind: kernel_matrix(circuit, data, weights * 2 * torch.pi, kind=kind) for kind in ("fidelity", "projected")
    }
    gaussian = gaussian_kernel(data)
    reference = target_alignment(gaussian, digits)
    for kind, matrix in matrices.items():
        meaning = f"10 digits, {len(data)} images, {data.shape[1]} pixels; Gaussian kernel {reference:.4g}"
        yield Finding(f"target alignment, {kind} kernel", target_alignment(matrix, digits), None, None, meaning), {}
    for kind, matrix in matrices.items():
        apart = geometric_difference(gaussian, matrix, REGULARIZATION)
        meaning = (
            f"from a Gaussian kernel, lambda {REGULARIZATION}; far below sqrt(N) = {apart.reference:.4g} means no "
            "advantage"
        )
        yield Finding(f"geometric difference, {kind} kernel", apart.value, None, None, meaning), {}
