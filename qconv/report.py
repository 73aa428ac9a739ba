"""Rows -> terminal table, table.csv, device.csv, figure and one self-contained web page. Runs no model."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from safetensors.numpy import load_file

from circuits.kernels import kernel, kernel_citation
from qconv import figures
from qconv.analysis import Chosen, Comparison, Interval, choose_settings, comparisons, signed, verdict
from qconv.backends.protocol import DEVICE_SHOTS
from qconv.energy.units import joules
from qconv.experiment import AGREEMENT, FEATURES, Agreement
from qconv.models import SLOT_KERNEL
from qconv.rows import Row, write_atomically

_OPERATIONS = ("mac:", "mul:", "add:", "cmp:")
DEVICE_KEYS = ("circuits", "gates_1q", "gates_2q", "shots")


# --- numbers as text ------------------------------------------------------------------------------------------------


def percent(interval: Interval) -> str:
    """Accuracy in percent with the half width of its interval: "97.8 ± 1.2"."""
    half = "" if math.isnan(interval.half) else f" ± {100 * interval.half:.1f}"
    return f"{100 * interval.mean:.1f}{half}"


def points(value: float) -> str:
    """A difference of accuracies in percentage points, always signed: "+1.23"."""
    return signed(value).replace("-", "\N{MINUS SIGN}")


def span(interval: Interval) -> str:
    """A difference's interval in percentage points: "−0.41 to +1.23"."""
    return "none" if math.isnan(interval.half) else f"{points(interval.low)} to {points(interval.high)}"


def _big(value: float) -> str:
    return f"{value:,.0f}".replace(",", "\N{THIN SPACE}")


def operations(counts: Mapping[str, int]) -> tuple[str, str]:
    """Multiply-accumulates by format, weights first, and the number of single operations: ("784 int8×int8", "392")."""
    macs = (f"{_big(n)} {key[4:].replace('*', '×')}" for key, n in counts.items() if key.startswith("mac:"))
    return ", ".join(macs) or "none", _big(sum(n for key, n in counts.items() if key.startswith(_OPERATIONS[1:])))


# --- what a report says ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """One arm's numbers in the report, at its chosen setting.

    Counts and energies are the first seed's: only a random circuit has others on other seeds.
    """

    chosen: Chosen

    @property
    def row(self) -> Row:
        """The first seed's row."""
        return self.chosen.rows[0]

    @property
    def accuracy_per_microjoule(self) -> float:
        """Percent of test accuracy for each modeled µJ of one inference of the whole network."""
        return 100 * self.chosen.test.mean / (self.row.energy * 1e6)

    @property
    def seconds(self) -> float:
        """Mean s to train once."""
        return math.fsum(row.seconds for row in self.chosen.rows) / len(self.chosen.rows)

    @property
    def measured_joules(self) -> float | None:
        """Mean J that this machine spent on training once; None unless every seed was measured."""
        values = [row.measured_joules for row in self.chosen.rows if row.measured_joules is not None]
        return math.fsum(values) / len(values) if len(values) == len(self.chosen.rows) else None

    @property
    def device(self) -> dict[str, int]:
        """What one inference would take on a quantum device; empty for arms without a circuit."""
        return {key[7:]: n for key, n in self.row.slot_counts.items() if key.startswith("device:")}

    def texts(self) -> dict[str, str]:
        """The cells of the table that people read."""
        row = self.row
        macs, others = operations(row.slot_counts)
        return {
            "arm": self.chosen.arm.title,
            "accuracy": percent(self.chosen.test),
            "parameters": f"{row.slot_parameters} / {_big(row.parameters)}",
            "macs": macs,
            "other": others,
            "slot_energy": joules(row.slot_energy),
            "slot_range": f"{joules(row.slot_energy_low)} – {joules(row.slot_energy_high)}",
            "slot_arithmetic": joules(row.slot_arithmetic),
            "energy": joules(row.energy),
            "range": f"{joules(row.energy_low)} – {joules(row.energy_high)}",
            "efficiency": f"{self.accuracy_per_microjoule:.3g}",
            "seconds": f"{self.seconds:.1f}",
            "joules": "not measured" if self.measured_joules is None else joules(self.measured_joules),
        }

    def numbers(self) -> dict[str, Any]:
        """The cells of table.csv."""
        row, test = self.row, self.chosen.test
        return {
            "arm": self.chosen.arm.name,
            "family": self.chosen.arm.family,
            "lr": self.chosen.setting[0],
            "slot_lr_multiplier": self.chosen.setting[1],
            "seeds": len(self.chosen.rows),
            "val_accuracy": self.chosen.val_accuracy,
            "test_accuracy": test.mean,
            "test_accuracy_95_half_width": test.half,
            "slot_trained_parameters": row.slot_parameters,
            "trained_parameters": row.parameters,
            "slot_operations": json.dumps(
                {k: n for k, n in sorted(row.slot_counts.items()) if k.startswith(_OPERATIONS)}
            ),
            "modeled_slot_joules": row.slot_energy,
            "modeled_slot_joules_low": row.slot_energy_low,
            "modeled_slot_joules_high": row.slot_energy_high,
            "modeled_slot_joules_arithmetic": row.slot_arithmetic,
            "modeled_joules": row.energy,
            "modeled_joules_low": row.energy_low,
            "modeled_joules_high": row.energy_high,
            "accuracy_percent_per_modeled_microjoule": self.accuracy_per_microjoule,
            "training_seconds": self.seconds,
            "measured_training_joules": "" if self.measured_joules is None else self.measured_joules,
        }


@dataclass(frozen=True)
class Report:
    """Everything that a report shows, derived from the rows and the files beside them.

    Args:
        rows: finished rows of one comparison.
        chosen: each arm at its chosen setting.
        comparisons: each quantum arm against the best conventional arm and the controls.
        verdict: the closing sentence.
        agreement: the trained quantum kernels on other simulators; empty where it was not checked.
    """

    rows: tuple[Row, ...]
    chosen: Mapping[str, Chosen]
    comparisons: tuple[Comparison, ...]
    verdict: str
    agreement: tuple[Agreement, ...]

    @property
    def n_seeds(self) -> int:
        """How often each arm was trained at each setting."""
        return len({row.task.seed for row in self.rows})

    @property
    def lines(self) -> list[Line]:
        """One an arm."""
        return [Line(chosen) for chosen in self.chosen.values()]

    @property
    def device_lines(self) -> list[Line]:
        """Arms that have a circuit."""
        return [line for line in self.lines if line.chosen.arm.kernel is not None]


def make_report(rows: Iterable[Row], out: Path) -> Report:
    """Draw the conclusions from the rows.

    Args:
        rows: finished rows of one comparison.
        out: the run's folder, for agreement.json if it is there.

    Raises:
        ValueError: no rows, or an arm and setting without all seeds.
    """
    rows = tuple(rows)
    chosen = choose_settings(rows)
    path = out / AGREEMENT
    checked = [Agreement(**entry) for entry in json.loads(path.read_text())] if path.exists() else []
    return Report(rows, chosen, tuple(comparisons(chosen)), verdict(chosen), tuple(checked))


# --- terminal -------------------------------------------------------------------------------------------------------


def _table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], caption: str = "") -> Table:
    table = Table(
        title=title,
        title_justify="left",
        caption=caption or None,
        caption_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def agreement_table(agreement: Sequence[Agreement]) -> Table:
    """Deviations of other simulators from the trained layer, for a terminal."""
    return _table(
        "The trained quantum kernels on other simulators",
        ["arm", "simulator", "shots", "deviation", "changed"],
        (
            [a.arm, a.backend, str(a.shots or "exact"), f"{a.deviation:.1e}", f"{a.changed} of {a.images}"]
            for a in agreement
        ),
        f"deviation: the largest of {agreement[0].values} expectation values; changed: images of another class",
    )


_RESULTS = {"accuracy": "accuracy %", "parameters": "trained\nslot / all", "seconds": "s", "macs": "slot MACs"}
_ENERGY = {
    "slot_energy": "slot\nenergy",
    "slot_range": "low – high",
    "energy": "network\nenergy",
    "efficiency": "% per\nµJ",
}


def terminal(report: Report, width: int = 80) -> RenderableType:
    """The report's tables for a terminal.

    Args:
        report: see `make_report`.
        width: columns of the terminal; below 120 the main table comes in two parts.
    """
    first, n_seeds = report.rows[0], report.n_seeds
    results = f"accuracy: mean ± 95 % interval over {n_seeds} seeds" if n_seeds > 1 else "accuracy: of one seed"
    results += "; settings, and the arms of the verdict, are chosen by validation accuracy"
    results += "\ns: training once, wall clock, on cores that the workers shared"
    energy = f"energy: one inference, modeled for {first.prices}\nlow – high: cheap or dear memory, for all arms alike"
    name = f"Arms on {first.task.dataset}"
    parts: list[RenderableType] = [
        _table(
            title,
            ["arm", *columns.values()],
            ([line.chosen.arm.name, *(line.texts()[key] for key in columns)] for line in report.lines),
            caption,
        )
        for title, columns, caption in (
            [(name, _RESULTS | _ENERGY, f"{results}\n{energy}")]
            if width >= 120
            else [(name, _RESULTS, results), ("Energy", _ENERGY, energy)]
        )
    ]
    if report.device_lines:
        parts.append(
            _table(
                "On a quantum device, one inference instead",
                ["arm", "circuits", "1-qubit gates", "2-qubit gates", "shots"],
                (
                    [line.chosen.arm.name, *(_big(line.device.get(key, 0)) for key in DEVICE_KEYS)]
                    for line in report.device_lines
                ),
                f"assumes {DEVICE_SHOTS} shots a circuit; gates of the first seed's circuit",
            )
        )
    if report.agreement:
        parts.append(agreement_table(report.agreement))
    return Group(*parts)


# --- files ----------------------------------------------------------------------------------------------------------


def _csv(rows: Sequence[Mapping[str, Any]]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def _chart(report: Report) -> list[figures.Point]:
    return [
        figures.Point(
            line.chosen.arm.title,
            line.chosen.arm.family,
            line.row.slot_energy,
            line.row.slot_energy_low,
            line.row.slot_energy_high,
            line.chosen.test.mean,
            line.chosen.test.half,
        )
        for line in report.lines
    ]


def _feature_maps(path: Path, chosen: Mapping[str, Chosen]) -> dict[str, Any] | None:
    """Images as data URIs: the two inputs, and for each arm its channels of both."""
    if not path.exists():
        return None
    stored = load_file(path)
    inputs = [figures.image_uri(image.mean(0), 0, 1) for image in stored["images"]]
    arms = []
    for name, choice in chosen.items():
        if (maps := stored.get(f"map/{name}")) is not None:
            limit = figures.symmetric_limit([maps])
            uris = [[figures.image_uri(channel, -limit, limit, "PuOr") for channel in image] for image in maps]
            arms.append({"title": choice.arm.title, "maps": uris, "limit": f"{limit:.2g}"})
    if not arms:  # an earlier run's file: whole networks have no maps to show
        return None
    return {"inputs": inputs, "labels": stored["labels"].tolist(), "arms": arms}


def _circuits(chosen: Mapping[str, Chosen]) -> list[dict[str, Any]]:
    drawn = []
    for choice in chosen.values():
        name = choice.arm.kernel
        if name is not None:
            circuit = kernel(name, SLOT_KERNEL**2, seed=choice.rows[0].task.seed)
            drawn.append(
                {
                    "title": choice.arm.title,
                    "note": choice.arm.note,
                    "citation": kernel_citation(name),
                    "weights": circuit.n_weights,
                    "drawing": circuit.draw(),
                }
            )
    return drawn


def _tuning(rows: Sequence[Row], chosen: Mapping[str, Chosen]) -> list[dict[str, Any]]:
    """Mean validation accuracy of every setting, so that nobody need trust the choice."""
    lines = []
    for name, choice in chosen.items():
        cells = []
        for setting in sorted({row.task.setting for row in rows}):
            group = [row.val_accuracy for row in rows if row.task.arm == name and row.task.setting == setting]
            mean = f"{100 * math.fsum(group) / len(group):.1f}" if group else ""
            cells.append((mean, setting == choice.setting))
        lines.append({"title": choice.arm.title, "cells": cells})
    return lines


def _errors_of_sampling(report: Report) -> dict[str, float]:
    """Numbers for the text on intervals: what they allow for, and what they do not, in percent.

    "widening": half widths of resplit images over those of independent seeds. "accuracy", "standard_error": mean test
    accuracy of all arms, and the binomial standard error sqrt(p (1 - p) / n) of one such accuracy.
    """
    row = report.rows[0]
    accuracy = math.fsum(line.chosen.test.mean for line in report.lines) / len(report.lines)
    return {
        "widening": math.sqrt(1 + report.n_seeds * row.n_test / row.n_fit),
        "accuracy": 100 * accuracy,
        "standard_error": 100 * math.sqrt(accuracy * (1 - accuracy) / row.n_test),
    }


def write_report(report: Report, out: Path) -> Path:
    """Write table.csv, device.csv, accuracy_energy.png and report.html to the run's folder.

    Args:
        report: see `make_report`.
        out: the run's folder; feature maps are taken from it.

    Returns:
        The page.

    Raises:
        OSError: the folder cannot be written.
    """
    write_atomically(out / "table.csv", _csv([line.numbers() for line in report.lines]))
    device = [
        {"arm": x.chosen.arm.name} | {key: x.device.get(key, 0) for key in DEVICE_KEYS} for x in report.device_lines
    ]
    if device:
        write_atomically(out / "device.csv", _csv(device))
    else:
        (out / "device.csv").unlink(missing_ok=True)  # of an earlier report on other arms
    chart = _chart(report)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("qconv"), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    first, settings = report.rows[0], sorted({row.task.setting for row in report.rows})
    page = environment.get_template("report.html").render(
        task=first.task,
        row=first,
        n_seeds=report.n_seeds,
        sampling=_errors_of_sampling(report),
        device_shots=DEVICE_SHOTS,
        verdict=report.verdict,
        lines=[(line.chosen.arm, line.chosen.setting, line.texts()) for line in report.lines],
        chart=figures.accuracy_svg(chart),
        comparisons=[(c, points(c.interval.mean), span(c.interval), span(c.adjusted)) for c in report.comparisons],
        device=[
            (line.chosen.arm.title, [_big(line.device.get(k, 0)) for k in DEVICE_KEYS]) for line in report.device_lines
        ],
        agreement=report.agreement,
        circuits=_circuits(report.chosen),
        features=_feature_maps(out / FEATURES, report.chosen),
        settings=settings,
        decay=[f"{c.arm.weight_decay:g} for {c.arm.title}" for c in report.chosen.values() if c.arm.weight_decay],
        whole=any(line.chosen.arm.whole for line in report.lines),
        tuning=_tuning(report.rows, report.chosen),
        learning_rates=[f"{lr:g}" for lr in sorted({lr for lr, _ in settings})],
        multipliers=[f"{multiplier:g}" for multiplier in sorted({multiplier for _, multiplier in settings})],
        scopes=sorted({row.measured_scope for row in report.rows}),
        versions=sorted({", ".join(f"{k} {v}" for k, v in row.versions.items()) for row in report.rows}),
    )
    write_atomically(out / "accuracy_energy.png", figures.accuracy_png(chart))
    write_atomically(out / "report.html", page.encode())
    return out / "report.html"
