"""From a record to tables: Markdown for the docs, the same for the terminal, and a picture.

python -m benchmarks.report runs/benchmark.json --out docs
"""

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.goals import SINGLES, Verdict, digits, verdicts
from benchmarks.peers import PEERS
from benchmarks.record import Comparison, Record
from benchmarks.systems import Conv
from benchmarks.workloads import SIZE, WORKLOADS

Cells = Sequence[str]
METHOD = """\
* One process for each workload and peer. In it nn.Conv2d, our kernels and the peer run in turns, in float32, after a
  warm-up; the order rotates. A ratio is between two systems of the same process. Medians over the rounds.
* A fast call runs in a tight loop of about 30 ms a round; calls slower than 0.3 s run in three rounds. A round is
  disturbed if nn.Conv2d, or a fixed matrix product before and after the round, took more than 1.5 times its best, or if
  other processes were busy. It is repeated, up to as many times as there are rounds; if that does not give enough
  quiet ones, the least disturbed ones count: their number is given, and a ratio from them carries a question mark.
* Forward: evaluation mode under no_grad, fixed weights. Training: the weights change, then values and the gradients of
  their sum with respect to weights and images. W6 trains with cross entropy and Adam.
* Before it is timed, a peer's values (and gradients, where it has them) are compared with ours on the same weights and
  images. Peers run strongly_entangling; "times slower than us" compares with our kernel of that name.
* Compilation is not in the times: it stands in "first call", the first values and gradients of a process. Our
  loops are compiled then: the folder where compiled code is kept is empty.
* "Share" is the part of the workload that a slow or memory-hungry peer ran; its times are scaled up in proportion,
  which favors a peer whose states then fit into the caches.
* Memory is the peak of a process of its own that runs the system once (the share that it is timed on): in all, and what
  that call added."""


def goal_table(record: Record) -> list[Cells]:
    """The goals beside today's ratios: a row a goal and kernel, a column a workload."""
    found = list(verdicts(record))
    workloads = sorted({v.workload for v in found if v.workload})
    rows: dict[tuple[str, str], dict[str, Verdict]] = {}
    for verdict in found:
        if verdict.workload:
            rows.setdefault((verdict.what, verdict.kernel), {})[verdict.workload] = verdict
    body = [(what, kernel, *(str(cells.get(name, "")) for name in workloads)) for (what, kernel), cells in rows.items()]
    return [("goal", "kernel", *workloads), *body]


def single_table(record: Record) -> list[Cells]:
    """The goals that are one number."""
    names = {single.what for single in SINGLES}
    return [("goal", "today"), *((v.what, str(v)) for v in verdicts(record) if v.what in names)]


def workload_table(record: Record, name: str) -> list[Cells]:
    """All systems on one workload."""
    modes = WORKLOADS[name].modes
    unit, factor = ("s", 1.0) if WORKLOADS[name].batches else ("ms", 1e3)
    head = ["system"]
    for mode in modes:
        head += [f"{mode} [{unit}]", f"{mode} / nn.Conv2d"]
    head += ["training, times slower than us", "first call [s]", "peak [MB]", "of the call [MB]", "share"]
    rows: list[Cells] = [head]
    for comparison in record.of(name):
        shown = [s for s in comparison.first_call if comparison.peer in (None, s)]
        for system in shown:
            rows.append(_system_cells(record, comparison, system, modes, factor))
    return rows


def _system_cells(
    record: Record, comparison: Comparison, system: str, modes: Iterable[str], factor: float
) -> list[str]:
    cells = [system]
    for mode in modes:
        seconds = comparison.seconds[mode].get(system)
        ratio = comparison.ratio(mode, system, Conv.name)
        cells += ["-", "-"] if seconds is None or ratio is None else [digits(factor * seconds), digits(ratio)]
    slower = comparison.ratio("training", system, "qconv strongly_entangling") if comparison.peer else None
    memory = record.peak(comparison.workload, system)
    cells += [
        "" if slower is None else digits(slower),
        digits(comparison.first_call[system]),
        "" if memory is None else digits(memory.peak / 1e6),
        "" if memory is None else digits(memory.run / 1e6),
        digits(comparison.share) if comparison.peer and comparison.share < 1 else "",
    ]
    return cells


def notes(record: Record, name: str) -> list[str]:
    """What a reader of a workload's table must know, line by line."""
    lines = []
    for comparison in record.of(name):
        for system, details in comparison.details.items():
            if comparison.peer in (None, system):
                lines.append(f"{system}: {'; '.join(details.values())}")
        for what, counts in (("repeated", comparison.repeated), ("counted all the same", comparison.disturbed)):
            if any(counts.values()):
                beside = f" beside {comparison.peer}" if comparison.peer else ""
                text = ", ".join(f"{count} of {mode}" for mode, count in counts.items())
                lines.append(f"disturbed rounds{beside}, {what}: {text}")
    reasons: dict[str, list[str]] = {}
    for peer, reason in record.skipped.get(name, {}).items():
        reasons.setdefault(reason, []).append(peer)
    return lines + [f"not run: {', '.join(peers)} ({reason})" for reason, peers in reasons.items()]


def show(console: Console, title: str, table: Sequence[Cells]) -> None:
    """A table in the terminal."""
    head, *rows = ([escape(cell) for cell in row] for row in table)  # units in brackets are no markup
    printed = Table(*head, title=title)
    for row in rows:
        printed.add_row(*row)
    console.print(printed)


def markdown(record: Record) -> str:
    """The page."""
    machine = record.machine
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    extra = "with" if machine["fast"] else "without"
    parts = [
        "<!-- Generated by `python -m benchmarks.report` from a record of `make bench`: change those, not this. -->",
        "# Performance",
        f"Measured on {machine['date']}: {machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, "
        f"{machine['system']}, Python {machine['python']}, {extra} the fast extra. {versions}.",
        "![Seconds over nn.Conv2d's, by workload and system](performance.png)",
        "## Goals",
        markdown_table(goal_table(record)),
        markdown_table(single_table(record)),
        "## Method",
        METHOD,
        "## Figures",
    ]
    for name in record.workloads():
        workload = WORKLOADS[name]
        parts += [
            f"### {name}: {workload.what}",
            f"{workload.batch} images of {workload.channels}x{SIZE}x{SIZE} a batch: {workload.patches:,} patches.",
            markdown_table(workload_table(record, name)),
            "\n".join(f"* {line}" for line in notes(record, name)),
        ]
    return "\n\n".join(part for part in parts if part) + "\n"


def measured_on(machine: dict[str, Any]) -> str:
    """When, on which machine and with which versions a record was measured, in a sentence or two."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return (
        f"Measured on {machine['date']}: {machine['cpu']}, {machine['cores']} cores, {machine['system']}, "
        f"Python {machine['python']}. {versions}."
    )


def markdown_table(table: Sequence[Cells]) -> str:
    """A table, its head first."""
    lines = [table[0], ["---"] * len(table[0]), *table[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def picture(record: Record, path: Path) -> None:
    """Seconds over nn.Conv2d's, by workload and system, on a logarithmic scale."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = record.workloads()
    ours = [f"qconv {kernel}" for kernel in ("heisenberg", "strongly_entangling")]
    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 1, sharex=True)
    for axes, mode in zip(panels, ("forward", "training"), strict=True):
        for k, system in enumerate([*ours, *PEERS]):
            points = []
            for x, name in enumerate(names):
                comparison = record.find(name, None if system in ours else system)
                ratio = comparison and comparison.ratio(mode, system, Conv.name)
                if ratio:
                    # Side by side: systems of one workload must not hide each other.
                    points.append((x + 0.07 * (k - 4), ratio))
            if points:
                marker = "D" if system in ours else "ov^sP*X"[k - len(ours)]
                axes.plot(*zip(*points, strict=True), marker, color=f"C{k}", markersize=7, label=system)
        axes.axhline(1, color="black", linewidth=1, label="nn.Conv2d")
        axes.set(yscale="log", ylabel="seconds / nn.Conv2d's", title=mode)
        axes.set_xticks(range(len(names)), names)
        axes.set_xlim(-0.6, len(names) - 0.4)
        axes.grid(axis="y", alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    figure.savefig(path, dpi=110)


def write(record: Record, folder: Path) -> None:
    """performance.md and performance.png into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "performance.md").write_text(markdown(record))
    picture(record, folder / "performance.png")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write performance.md and performance.png from a record.")
    parser.add_argument("record", type=Path, help="JSON file of benchmarks.quanvolution")
    parser.add_argument("--out", type=Path, default=Path("docs"))
    arguments = parser.parse_args()
    write(Record.load(arguments.record), arguments.out)


if __name__ == "__main__":
    main()
