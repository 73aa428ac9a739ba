"""What the scripts on compressed LeNets share: tune on validation images, repeat on seeds, print tables from records.

Learning rates were chosen on seed 0 by the validation images of runs that trained without them: not for every method,
but for one of a kind, whose rate the others take (`--tune` tries all rates of every method). Each seed is trained at
that rate on all training images, and then the test images are looked at. Networks and records are kept in one folder,
so a killed run goes on with the same command.

A compressed network starts from the float one and trains on, which the float one itself may gain by: the row "float,
trained on" is that network after the same further training.
"""

import argparse
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from protocol import QUICK_IMAGES, chosen_names, markdown, points
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from qconv.analysis import Interval, t_interval
from qconv.compression_runs import FloatJob, Job, Record, run_jobs
from qconv.data import dataset_names
from qconv.recipes import DISTILL


@dataclass(frozen=True)
class Entry:
    """A method to compress with.

    Args:
        title: how tables call it.
        method, bits, sparsity, epochs: see `qconv.compression.compress`.
        rates: learning rates that --tune tries.
        rate: the one in use: chosen by the validation images of MNIST, for this method or for one of its kind.
        goal: test error in % that this library set out to reach on MNIST.
        goal_ratio: how many times smaller it set out to make the file, None for no goal.
        published: what others report for MNIST, as text.
    """

    title: str
    method: str
    rates: tuple[float, ...]
    rate: float
    epochs: int | None = None
    bits: int | None = None
    sparsity: float | None = None
    goal: float | None = None
    goal_ratio: float | None = None
    published: str = ""

    def job(self, floating: FloatJob, rate: float, distill: float) -> Job:
        """One run; distill as for `qconv.recipes.recipe`."""
        return Job(floating, self.method, self.bits, self.sparsity, self.epochs, rate, distill)


def parser(description: str, out: str, names: Sequence[str]) -> argparse.ArgumentParser:
    """The options of both scripts."""
    found = argparse.ArgumentParser(description=description)
    found.add_argument("--methods", default=",".join(names), help=f"comma-separated, of {', '.join(names)}")
    found.add_argument("--dataset", default="mnist", help=f"{', '.join(dataset_names())} (default: mnist)")
    found.add_argument("--seeds", type=int, default=3, help="number of seeds (default: 3)")
    found.add_argument("--out", type=Path, default=Path("runs") / out, help=f"output folder (default: runs/{out})")
    found.add_argument("--data-dir", type=Path, help="folder of the image files (default: QCONV_DATA, else a download)")
    workers = min(2, os.cpu_count() or 1)
    found.add_argument(
        "--workers", type=int, default=workers, help="processes, one thread each (default: 2, where there are 2 cores)"
    )
    found.add_argument(
        "--distill",
        type=float,
        default=DISTILL,
        help=f"share of the loss that compares with the float network's scores (default: {DISTILL}; 0: labels alone)",
    )
    found.add_argument("--tune", action="store_true", help="choose the learning rates again, on validation images")
    found.add_argument("--quick", action="store_true", help=f"one epoch, {QUICK_IMAGES} images: a smoke run")
    return found


def control(rates: tuple[float, ...], rate: float, epochs: int) -> Entry:
    """The float network itself, trained on as compressed ones are: what more training alone is worth."""
    return Entry("float, trained on", "float", rates, rate, epochs)


def reproduce(
    network: str, epochs: int, entries: dict[str, Entry], given: argparse.Namespace, published: str = ""
) -> int:
    """Train and print; the exit code: 0 done, 2 bad input, 130 interrupted.

    Args:
        network: key of `qconv.lenets.LENETS`.
        epochs: of the float network.
        entries: what --methods may name.
        given: the command line.
        published: what others report of the float network on MNIST, as text.
    """
    try:
        if given.seeds < 1:
            raise ValueError(f"--seeds is {given.seeds}: give at least 1")
        chosen = [entries[name] for name in chosen_names(given.methods, list(entries), "methods")]
        whole = given.dataset != "digits" and not given.quick  # has a test part of its own
        floating = FloatJob(given.dataset, network, epochs=epochs, validate=not whole or given.tune)
        if given.quick:
            floating = replace(floating, epochs=1, n_train=QUICK_IMAGES)
            chosen = [replace(entry, epochs=entry.epochs and 1, rates=entry.rates[:1]) for entry in chosen]
        print(_tuned(chosen, floating, given) if given.tune else _tables(chosen, floating, given, published))
    except KeyboardInterrupt:
        print(f"\nstopped. Finished runs are kept in {given.out}: the same command resumes.", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _run(jobs: list[Job], given: argparse.Namespace) -> list[Record]:
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    bar = Progress(TextColumn("{task.description}"), *columns, console=Console(stderr=True))
    shown = bar.add_task("networks", total=None)

    def on_job(done: int, total: int) -> None:
        bar.start()  # at the first call: by then the data have been found good
        bar.update(shown, completed=done, total=total)

    try:
        return run_jobs(jobs, given.out, workers=given.workers, data_dir=given.data_dir, progress=on_job)
    finally:
        bar.stop()


def _tuned(entries: Sequence[Entry], floating: FloatJob, given: argparse.Namespace) -> str:
    """Validation errors of every rate on seed 0."""
    jobs = [entry.job(floating, rate, given.distill) for entry in entries for rate in entry.rates]
    records = dict(zip(jobs, _run(jobs, given), strict=True))
    lines = []
    for entry in entries:
        errors = {rate: 1 - records[entry.job(floating, rate, given.distill)].after.validation for rate in entry.rates}
        best = min(errors, key=errors.__getitem__)
        tried = ", ".join(f"{rate:g}: {100 * error:.2f}" for rate, error in errors.items())
        lines.append([entry.title, tried, f"{best:g}", f"{entry.rate:g}"])
    first = records[jobs[0]]
    note = (
        f"{given.dataset}, seed 0: validation error in % at each learning rate, {first.n_fit:,} training and "
        f"{first.after.n_validation:,} validation images."
    )
    return f"{note}\n\n{markdown(('method', 'rate: error', 'best', 'in use'), lines)}"


def _tables(entries: Sequence[Entry], floating: FloatJob, given: argparse.Namespace, published: str) -> str:
    """Test errors, sizes and modeled energies, mean over seeds."""
    seeds = [replace(floating, seed=seed) for seed in range(given.seeds)]
    # Backwards: RQ-ST, the slowest, is the last of its table; begun last, it would leave all processes but one idle.
    jobs = [entry.job(seed, entry.rate, given.distill) for entry in reversed(entries) for seed in seeds]
    records = dict(zip(jobs, _run(jobs, given), strict=True))
    goals = given.dataset == "mnist"
    lines = []
    for entry in entries:
        found = [records[entry.job(seed, entry.rate, given.distill)] for seed in seeds]
        lines.append(
            [
                f"{entry.title} (`{entry.method}`)",
                points(_interval([1 - record.after.accuracy for record in found], found[0])),
                "" if entry.goal is None or not goals else f"{entry.goal:.2f}",
                entry.published if goals else "",
                points(_interval([r.before.accuracy - r.after.accuracy for r in found], found[0]), sign="+"),
                f"{_mean([r.after.bytes for r in found]):,.0f}",
                f"{_mean([r.before.bytes / r.after.bytes for r in found]):.1f}",
                "" if entry.goal_ratio is None or not goals else f"{entry.goal_ratio:.0f}",
                f"{1e6 * _mean([r.after.joules for r in found]):.2f}",
                f"{_mean([r.seconds for r in found]) / 60:.1f}",
            ]
        )
    firsts = [records[entries[0].job(seed, entries[0].rate, given.distill)] for seed in seeds]
    before = [
        "float",
        points(_interval([1 - r.before.accuracy for r in firsts], firsts[0])),
        *("", published if goals else "", ""),
        f"{firsts[0].before.bytes:,}",
        *("1.0", ""),
        f"{1e6 * firsts[0].before.joules:.2f}",
        f"{_mean([r.float_seconds for r in firsts]) / 60:.1f}",
    ]
    head = (
        *("method", "test error %", "goal", "published", "minus float's", "file, bytes", "times smaller", "goal"),
        *("energy, µJ", "min a run"),
    )
    note = (
        f"{given.dataset}, {floating.network}: {firsts[0].n_fit:,} training, {firsts[0].before.n_test:,} test images; "
        f"mean of {given.seeds} seed{'s' if given.seeds > 1 else ''} ± 95 % interval over seeds (Student's t). Errors "
        "are those of the files, read back. Energy is modeled, of one inference that passes over weights of 0. "
        f"{given.distill:.0%} of the loss of trained methods compares with the float network's scores."
    )
    if any(entry.method == "float" for entry in entries):
        note += " What “float, trained on” gains on “float”, longer training gains: no compression does."
    return f"{note}\n\n{markdown(head, [before, *lines])}"


def _interval(values: list[float], record: Record) -> Interval:
    return t_interval(values, resolution=1 / record.before.n_test)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
