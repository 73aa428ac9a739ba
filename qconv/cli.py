"""The command `qconv`. Imports stay inside the commands, so that the quick ones are quick."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections import Counter

    from qconv.rows import Row

app = typer.Typer(
    name="qconv",
    help="Quantum convolution kernels beside conventional ones: accuracy, operations, energy.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main(args: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 2 bad input (one sentence on stderr), 130 interrupted."""
    try:
        app(args, prog_name="qconv")
    except (ValueError, OSError) as error:
        print(f"qconv: {error}", file=sys.stderr)
        sys.exit(2)


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@app.command()
def compare(
    dataset: Annotated[str, typer.Option(help="digits, mnist or fashion_mnist")] = "digits",
    data_dir: Annotated[
        Path | None, typer.Option(help="folder of the image files (default: QCONV_DATA, else a download)")
    ] = None,
    arms: Annotated[
        str | None, typer.Option(help="comma-separated arms (default: ten that fill the slot of one small network)")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="number of seeds")] = 3,
    epochs: Annotated[int | None, typer.Option(min=1, help="default: 20 on digits, 5 on the larger sets")] = None,
    n_train: Annotated[
        int | None, typer.Option(min=1, help="training images (default: all of digits, 10000 of the larger sets)")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="output folder (default: runs/DATASET)")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="processes (default: one a processor)")] = None,
) -> None:
    """Train every arm under one protocol and report accuracy against energy; a killed run resumes."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from qconv import experiment, report
    from qconv.analysis import choose_settings
    from qconv.models import DEFAULT_ARMS, arm

    names = DEFAULT_ARMS if arms is None else [name.strip() for name in arms.split(",") if name.strip()]
    tasks = experiment.grid(dataset, names, range(seeds), epochs=epochs, n_train=n_train)
    out = Path("runs") / dataset if out is None else out
    console = Console()
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )
    try:
        shown = bar.add_task("training", total=len(tasks))

        def on_row(done: int, total: int, row: Row | None) -> None:
            bar.start()  # at the first call: by then folder and data have been found good
            bar.update(shown, completed=done, description="training" if row is None else f"training {row.task.arm}")

        try:
            rows = experiment.run(tasks, out, workers=workers or _processors(), data_dir=data_dir, progress=on_row)
            bar.update(shown, description="training")
        finally:
            bar.stop()
        chosen = choose_settings(rows)
        firsts = {name: choice.rows[0].task for name, choice in chosen.items()}
        slots = [task for name, task in firsts.items() if not arm(name).whole]
        if slots:
            with console.status("feature maps"):
                experiment.save_feature_maps(slots, out, data_dir=data_dir)
        with console.status("the trained quantum kernels on state vector, PennyLane and Qiskit Aer"):
            quantum = [task for name, task in firsts.items() if chosen[name].arm.family == "quantum"]
            experiment.check_agreement(quantum, out, data_dir=data_dir)
    except KeyboardInterrupt:
        print(f"\nqconv: stopped. Finished tasks are kept in {out}: the same command resumes.", file=sys.stderr)
        raise typer.Exit(130) from None
    made = report.make_report(rows, out)
    page = report.write_report(made, out)
    console.print(report.terminal(made, console.width))
    console.print(f"Report: {page}", soft_wrap=True, highlight=False)
    console.print(made.verdict, soft_wrap=True, highlight=False)


@app.command()
def kernels() -> None:
    """List the quantum kernels with their sizes on 4 wires and where they come from."""
    from textwrap import fill

    from circuits.kernels import kernel, kernel_citation, kernel_entangles, kernel_names

    print("Kernels; sizes on 4 wires at depth 2")
    for name in kernel_names():
        circuit = kernel(name, wires=4)
        kind = "entangling" if kernel_entangles(name) else "not entangling"
        print(f"\n{name}: {circuit.n_weights} weights, {len(circuit.gates)} gates, {kind}")
        print(fill(kernel_citation(name), 100, initial_indent="    ", subsequent_indent="    "))


@app.command()
def draw(
    kernel: Annotated[str, typer.Argument(help="a name that `qconv kernels` lists")],
    wires: Annotated[int, typer.Option(help="qubits")] = 4,
    depth: Annotated[int, typer.Option(help="layers")] = 2,
    seed: Annotated[int, typer.Option(min=0, help="draws the structure of kernel random")] = 0,
) -> None:
    """Draw a kernel's circuit as text."""
    from circuits.kernels import kernel as named_kernel

    print(named_kernel(kernel, wires=wires, depth=depth, seed=seed).draw())


@app.command()
def energy(
    model: Annotated[str, typer.Argument(help="an arm of `qconv compare`")] = "heisenberg",
    image_size: Annotated[int, typer.Option(min=5, max=1024, help="height and width of the images in pixels")] = 8,
) -> None:
    """Operations and modeled energy of one inference, a row a layer."""
    from rich.console import Console
    from rich.table import Table

    from qconv.analysis import joules
    from qconv.energy.count import count
    from qconv.energy.prices import estimate
    from qconv.models import build_model
    from qconv.report import operations

    counts = count(build_model(model, (1, image_size, image_size), 10, seed=0), (1, image_size, image_size))
    estimated = estimate(counts)
    table = Table(
        title=f"{model}: one inference on {image_size}x{image_size} pixels, energy modeled for {estimated.prices}"
    )
    for column in (
        "layer",
        "MACs, weights × activations",
        "other operations",
        "stored numbers",
        "arithmetic",
        "memory",
    ):
        table.add_column(column, justify="left" if column == "layer" else "right")
    for row, layer in zip(counts.rows, estimated.per_layer, strict=True):
        macs, others = operations(row.operations)
        cells = (
            macs,
            others,
            f"{row.operations['params']:,}",
            joules(layer.compute.typical),
            joules(layer.memory.typical),
        )
        table.add_row(f"{row.name} ({row.kind})", *cells)
    console = Console()
    console.print(table)
    print(f"Together {joules(estimated.joules)} ({joules(estimated.low)} to {joules(estimated.high)}).")
    if device := _device(counts.operations):
        print(f"On a quantum device instead: {device}.")


def _device(operations: Counter[str]) -> str:
    """What a quantum device would have to run, in words."""
    words = {"circuits": "circuits", "gates_1q": "1-qubit gates", "gates_2q": "2-qubit gates", "shots": "shots"}
    return ", ".join(f"{operations[f'device:{k}']:,} {word}" for k, word in words.items() if operations[f"device:{k}"])


@app.command()
def version() -> None:
    """Print the versions of qconv and of the packages that its numbers depend on."""
    from importlib.metadata import version as installed

    from qconv import __version__

    print("qconv", __version__)
    for package in ("torch", "numpy", "pennylane", "qiskit", "qiskit-aer"):
        print(package, installed(package))


if __name__ == "__main__":
    main()
