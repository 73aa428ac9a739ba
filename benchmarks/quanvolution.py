"""What a quantum convolution costs beside nn.Conv2d and beside every simulator that is installed.

    python -m benchmarks.quanvolution                      # everything: see README.md in this folder
    python -m benchmarks.quanvolution --quick              # W1 and W2, us and nn.Conv2d: under a minute
    python -m benchmarks.quanvolution W1 W5 --peers PennyLane --rounds 15

Run it from the root of the repository.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

from rich.console import Console

from benchmarks import measure, report
from benchmarks.goals import verdicts
from benchmarks.peers import PEERS
from benchmarks.record import Record, Start, machine
from benchmarks.workloads import WORKLOADS

Result = TypeVar("Result")
QUICK = ("W1", "W2")


def alone(function: Callable[..., Result], *arguments: object) -> Result:
    """A function's result, computed in a fresh process."""
    # A server that has imported torch, and nothing else, is forked: starting is cheap, and no process inherits threads,
    # caches or memory of another measurement. qconv is imported after the fork: forked, it would use one thread.
    context = get_context("forkserver")
    context.set_forkserver_preload(["torch"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def run(record: Record, path: Path | None, console: Console, name: str, peers: list[str], rounds: int) -> None:
    """Time on one workload what the record does not have yet; it is saved after every measurement."""
    absent = measure.missing(peers)
    skipped = record.skipped.setdefault(name, {})
    everyone: list[str | None] = [None, *peers]
    for peer in everyone:
        if record.find(name, peer) or peer in skipped:
            continue
        if peer is not None and (reason := absent.get(peer) or PEERS[peer].cannot(WORKLOADS[name])):
            skipped[peer] = reason
            continue
        start = time.perf_counter()
        try:
            record.comparisons.append(alone(measure.compare, name, peer, rounds))
        except Exception as error:
            if peer is None:
                raise
            # One peer's trouble must not cost the figures of the others.
            skipped[peer] = f"failed with {type(error).__name__}"
            console.print(f"{peer} on {name}: {error}", style="red")
        console.print(f"{name} {peer or 'us and nn.Conv2d'}: {time.perf_counter() - start:.0f} s", style="dim")
        save(record, path)


def measure_memory(record: Record, path: Path | None, name: str) -> None:
    """Peak memory of every system that was timed on a workload."""
    systems = dict.fromkeys(system for comparison in record.of(name) for system in comparison.first_call)
    for system in systems:
        if record.peak(name, system) is None:
            record.memory.append(alone(measure.memory, name, system))
            save(record, path)


def measure_start(record: Record, path: Path | None, rounds: int) -> None:
    """What the fast extra costs and brings."""
    if record.start is None:
        first = later = None
        if record.machine["fast"]:
            with tempfile.TemporaryDirectory() as cache:
                first, later = alone(measure.first_call, cache), alone(measure.first_call, cache)
        record.start = Start(first, later, alone(measure.without_fast, rounds))
        save(record, path)


def save(record: Record, path: Path | None) -> None:
    if path is not None:
        record.save(path)


def begin(path: Path | None, resume: bool) -> Record:
    """A new record, or the one to go on with."""
    record = Record(machine())
    if not resume or path is None or not path.exists():
        return record
    found = Record.load(path)
    changed = [key for key in record.machine if key != "date" and record.machine[key] != found.machine.get(key)]
    if changed:
        raise SystemExit(
            f"{path.name} was measured with another {', '.join(changed)}: figures of two set-ups do not compare. "
            "Run without --resume"
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workloads", nargs="*", metavar="WORKLOAD", help=f"of {', '.join(WORKLOADS)}; default: all")
    parser.add_argument("--peers", nargs="*", default=list(PEERS), metavar="PEER", help=f"of {', '.join(PEERS)}")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="W1 and W2, us and nn.Conv2d only, nothing else")
    parser.add_argument("--json", type=Path, help="save everything here after every measurement")
    parser.add_argument("--resume", action="store_true", help="measure only what the JSON file does not have")
    parser.add_argument("--docs", type=Path, help="write performance.md and performance.png into this folder")
    arguments = parser.parse_args()
    names = arguments.workloads or list(QUICK if arguments.quick else WORKLOADS)
    peers = [] if arguments.quick else arguments.peers
    for kind, given, known in (("workload", names, WORKLOADS), ("peer", peers, PEERS)):
        if unknown := [name for name in given if name not in known]:
            parser.error(f"unknown {kind} {', '.join(unknown)}: choose from {', '.join(known)}")

    console = Console(width=None if sys.stdout.isatty() else 200)
    record = begin(arguments.json, arguments.resume)
    for name in names:
        run(record, arguments.json, console, name, peers, arguments.rounds)
        if not arguments.quick:
            measure_memory(record, arguments.json, name)
        report.show(console, f"{name}: {WORKLOADS[name].what}", report.workload_table(record, name))
        for line in report.notes(record, name):
            console.print(line, style="dim")
    if not arguments.quick:
        measure_start(record, arguments.json, arguments.rounds)
    report.show(console, "goals", report.goal_table(record))
    if not arguments.quick:
        report.show(console, "single numbers", report.single_table(record))
    found = list(verdicts(record))
    met = [verdict.met for verdict in found if not verdict.disturbed]
    disturbed = sum(verdict.disturbed for verdict in found)
    console.print(
        f"{met.count(True)} goals met, {met.count(False)} missed, {disturbed} of disturbed rounds, "
        f"{met.count(None)} not measured"
    )
    if arguments.docs:
        report.write(record, arguments.docs)


if __name__ == "__main__":
    main()
