"""The command `qconv`. Imports stay inside the commands, so that the quick ones are quick."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections import Counter

    from rich.progress import TaskID

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
        str | None,
        typer.Option(help="comma-separated, see qconv arms (default: ten that fill the slot of one small network)"),
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
    if added := [name for name in dict.fromkeys(task.arm for task in tasks) if name not in names]:
        console.print(f"With the controls of these networks: {', '.join(added)}", soft_wrap=True, highlight=False)
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
def compress(
    dataset: Annotated[str, typer.Option(help="digits, mnist or fashion_mnist")] = "digits",
    data_dir: Annotated[
        Path | None, typer.Option(help="folder of the image files (default: QCONV_DATA, else a download)")
    ] = None,
    network: Annotated[str, typer.Option(help="lenet5 or lenet300")] = "lenet5",
    method: Annotated[
        str,
        typer.Option(help="a quantizer (int8, lsq2, twn, ...), dfq, float, prune, share; joined: prune+share+huffman"),
    ] = "int8",
    bits: Annotated[
        int | None, typer.Option(min=1, help="of a quantizer's family (--method lsq), dfq or share")
    ] = None,
    sparsity: Annotated[float | None, typer.Option(help="share of the weights to prune (default: 0.9)")] = None,
    epochs: Annotated[
        int | None, typer.Option(min=0, help="of compressing (default: as many as the method needs)")
    ] = None,
    lr: Annotated[
        float | None, typer.Option(help="highest learning rate of compressing (default: the method's)")
    ] = None,
    float_epochs: Annotated[
        int | None,
        typer.Option(min=1, help="of the float network (default: 8 for lenet5, 20 for lenet300, more on digits)"),
    ] = None,
    n_train: Annotated[int | None, typer.Option(min=1, help="training images (default: all)")] = None,
    seed: Annotated[int, typer.Option(min=0, help="of the split, the weights and the order of the images")] = 0,
    out: Annotated[Path | None, typer.Option(help="output folder (default: runs/compress-DATASET)")] = None,
) -> None:
    """Train a float network, compress it and show what that gained and cost; a killed run resumes."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from qconv.compression import comparison
    from qconv.compression_runs import FloatJob, Job, files, run_job

    job = Job(FloatJob(dataset, network, seed, float_epochs, n_train=n_train), method, bits, sparsity, epochs, lr)
    out = Path("runs") / f"compress-{dataset}" if out is None else out
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    bar = Progress(*columns, TextColumn("loss {task.fields[loss]:.3f}"), console=console)
    shown: dict[str, TaskID] = {}
    try:

        def on_epoch(step: str, done: int, total: int, loss: float) -> None:
            bar.start()  # at the first epoch: by then the arguments and the data have been found good
            if step not in shown:
                shown[step] = bar.add_task("train float" if step == "train" else step, total=total, loss=loss)
            bar.update(shown[step], completed=done, loss=loss)

        try:
            record = run_job(job, out, data_dir, on_epoch)
        finally:
            if shown:
                bar.stop()
    except KeyboardInterrupt:
        print(f"\nqconv: stopped. A trained float network is kept in {out}: the same command goes on.", file=sys.stderr)
        raise typer.Exit(130) from None
    where = files(job, out)
    console.print(f"{network} on {dataset}, {job.recipe().method}, seed {seed}: {record.n_fit:,} training images")
    if record.report:
        print(f"{record.report}\n")
    print(comparison(record.before, record.after))
    for name, path in (("Model", where.model), ("Record", where.record)):
        console.print(f"{name}: {path}", soft_wrap=True, highlight=False)


@app.command()
def arms(as_json: Annotated[bool, typer.Option("--json", help="as a JSON list, for programs")] = False) -> None:
    """List what `qconv compare --arms` can name: what fills a slot, and whole networks with their controls."""
    import json

    from rich.console import Console
    from rich.table import Table

    from qconv.models import ARMS, DEFAULT_ARMS

    if as_json:
        found = [
            {
                "name": arm.name,
                "title": arm.title,
                "family": arm.family,
                "whole": arm.whole,
                "default": arm.name in DEFAULT_ARMS,
                "controls": list(arm.controls),
                "note": arm.note,
            }
            for arm in ARMS.values()
        ]
        print(json.dumps(found, indent=2, ensure_ascii=False))
        return
    titles = {
        False: "Arms that fill the slot of one small network (* in a comparison that names none)",
        True: "Whole networks; a quantum-inspired one brings its controls along",
    }
    for whole, title in titles.items():
        table = Table("name", "title", "family", *(["controls"] if whole else []), "note", title=title)
        table.columns[0].no_wrap = True
        for arm in (arm for arm in ARMS.values() if arm.whole is whole):
            name = f"{arm.name}{' *' if arm.name in DEFAULT_ARMS else ''}"
            table.add_row(name, arm.title, arm.family, *(["\n".join(arm.controls)] if whole else []), arm.note)
        Console().print(table)


_Source = Annotated[str, typer.Argument(metavar="KERNEL", help="a name that `qconv kernels` lists, or a .qasm file")]
_Wires = Annotated[int | None, typer.Option(help="qubits of a named kernel (default: 4)")]
_Depth = Annotated[int | None, typer.Option(help="layers of a named kernel (default: 2)")]
_Encoding = Annotated[str | None, typer.Option(help="how features enter a named kernel (default: angle)")]
_Readout = Annotated[
    str | None, typer.Option(help="what is read: z, zz, root, ..., or ZI,XX (default: z, or the file's own)")
]
_Entangle = Annotated[bool, typer.Option("--entangle/--no-entangle", help="without: the kernel's control")]
_Reupload = Annotated[bool, typer.Option("--reupload", help="the encoding once more before each layer")]
_Options = Annotated[
    list[str] | None,
    typer.Option("--option", help="of the kernel, KEY=VALUE: block=complex (see qconv kernels NAME); may be repeated"),
]


@app.command()
def kernels(
    name: Annotated[str | None, typer.Argument(help="one of them, with what its options take (default: all)")] = None,
    wires: Annotated[int, typer.Option(min=2, max=8, help="qubits")] = 4,
    depth: Annotated[int, typer.Option(min=1, help="layers")] = 2,
    seed: Annotated[int, typer.Option(min=0, help="draws the structure of random kernels")] = 0,
    check: Annotated[bool, typer.Option("--check", help="compare them with the peers that are installed")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """List kernels, encodings, readouts and channels with sizes and sources, or check them against the peers."""
    from qconv.kernel_list import show_kernels

    if not show_kernels(wires, depth, seed, name, check=check, as_json=as_json):
        raise typer.Exit(1)


@app.command()
def draw(
    kernel: _Source,
    wires: _Wires = None,
    depth: _Depth = None,
    encoding: _Encoding = None,
    readout: _Readout = None,
    entangle: _Entangle = True,
    reupload: _Reupload = False,
    option: _Options = None,
    seed: Annotated[int, typer.Option(min=0, help="draws the structure of random kernels")] = 0,
    width: Annotated[float, typer.Option(help="of a figure in inches; longer circuits continue below")] = 10.0,
    out: Annotated[
        Path | None,
        typer.Option(help="file: .svg, .png, .pdf or .txt, in a folder that is made (default: text on the screen)"),
    ] = None,
) -> None:
    """Draw a kernel's circuit; on a screen, rows as long as it is wide, else (in a pipe, a .txt) one row."""
    from shutil import get_terminal_size

    from qconv.kernel_argument import read_circuit
    from qconv.kernel_drawing import save_drawing

    circuit = read_circuit(
        kernel, wires, depth, encoding, seed, readout, entangle=entangle, reupload=reupload, options=option or ()
    )
    if out is None:
        print(circuit.draw(columns=get_terminal_size((0, 0)).columns or None))
    else:
        save_drawing(circuit, out, width)
        print(f"Drawing: {out}")


@app.command()
def simulate(
    source: Annotated[
        str, typer.Argument(metavar="FILE", help="an OpenQASM 3 program, or a name that `qconv kernels` lists")
    ],
    inputs: Annotated[
        str | None, typer.Option("--input", help="features: 0.1,0.2, or a .npy or .csv file with a row a circuit")
    ] = None,
    weights: Annotated[str | None, typer.Option(help="0.1,0.2, a .npy or .csv file, or random")] = None,
    observables: Annotated[
        str | None,
        typer.Option(help="Pauli strings such as ZI,XX, or z, zz, paulis2, root (default: the circuit's own)"),
    ] = None,
    backend: Annotated[str, typer.Option(help="auto, fourier, statevector, pennylane, qiskit, ...")] = "auto",
    option: Annotated[
        list[str] | None, typer.Option(help="of the backend, KEY=VALUE: method=matrix_product_state; may be repeated")
    ] = None,
    shots: Annotated[int | None, typer.Option(help="samples of each measurement setting (default: exact)")] = None,
    noise: Annotated[
        list[str] | None, typer.Option(help="GATE:CHANNEL:PROBABILITY, as CNOT:depolarizing:0.01; may be repeated")
    ] = None,
    readout_error: Annotated[str | None, typer.Option(help="P(1|0),P(0|1) of every wire, as 0.01,0.03")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="of shots, random weights and random kernels")] = None,
    wires: _Wires = None,
    depth: _Depth = None,
    encoding: _Encoding = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON, with every bitstring")] = False,
) -> None:
    """Run a circuit: expectation values, and under shots their standard errors and the bitstrings found."""
    from qconv import simulate_arguments as given
    from qconv.kernel_argument import read_circuit
    from qconv.simulate_file import run_circuit, show

    circuit = read_circuit(source, wires, depth, encoding, seed, observables)
    outcome = run_circuit(
        circuit,
        given.read_numbers(inputs, circuit.n_inputs, "inputs", "--input"),
        given.read_weights(weights, circuit, seed),
        name=source,
        backend=given.read_backend(backend, option or ()),
        shots=shots,
        noise=given.read_noise(noise or (), readout_error),
        seed=seed,
    )
    show(outcome, as_json=as_json)


@app.command()
def diagnose(
    kernel: _Source,
    wires: Annotated[int | None, typer.Option(min=1, max=10, help="qubits of a named kernel (default: 4)")] = None,
    depth: _Depth = None,
    encoding: _Encoding = None,
    readout: _Readout = None,
    entangle: _Entangle = True,
    reupload: _Reupload = False,
    option: _Options = None,
    pairs: Annotated[int, typer.Option(min=2, help="random weights: pairs of them for the expressibility")] = 5000,
    seed: Annotated[int, typer.Option(min=0, help="of random kernels and of all draws")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="output folder (default: runs/diagnose-KERNEL, of a control with -control)")
    ] = None,
) -> None:
    """What a kernel can express, whether it trains, and what it sees of real digits: a table and pictures."""
    from rich.console import Console

    from qconv.diagnostics.command import diagnose as diagnosis_of

    console = Console()
    with console.status(f"diagnosing {kernel}"):
        found = diagnosis_of(
            kernel,
            wires,
            depth,
            encoding,
            readout,
            entangle=entangle,
            reupload=reupload,
            options=option or (),
            pairs=pairs,
            seed=seed,
        )
    folder = f"diagnose-{Path(kernel).stem}{'' if entangle else '-control'}"
    files = found.save(Path("runs") / folder if out is None else out)
    console.print(found.table())
    for path in files:
        console.print(f"Written: {path}", soft_wrap=True, highlight=False)


@app.command()
def energy(
    model: Annotated[str, typer.Argument(help="an arm of `qconv compare`")] = "heisenberg",
    image_size: Annotated[int, typer.Option(min=5, max=1024, help="height and width of the images in pixels")] = 8,
) -> None:
    """Operations and modeled energy of one inference, a row a layer."""
    from rich.console import Console
    from rich.table import Table

    from qconv.energy.count import count
    from qconv.energy.prices import estimate
    from qconv.energy.units import joules
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
