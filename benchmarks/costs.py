"""The cost model of backend "auto" against the clock: every exact way of some circuits, predicted and measured.

    python -m benchmarks.costs            # a table, and how often the fastest way was chosen
    python -m benchmarks.costs --fit      # and the model's constants anew, from these times
    python -m benchmarks.costs --plain    # the ways that there are without the fast extra

Run it from the root of the repository.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.timing import alternate
from circuits import Circuit, kernel
from qconv import QuantumConv2d
from qconv.backends.auto import AutoCompiled
from qconv.backends.costs import WAYS, Call, Rates, seconds

SHAPES = ((1, 14), (32, 14), (8, 27))  # images, output positions along a side of one


def _reuploading(wires: int) -> Circuit:
    layer = kernel("strongly_entangling", wires, 1)
    return layer + layer.shift_weights(layer.n_weights)


def circuits() -> dict[str, Circuit]:
    """What is timed, by name."""
    found = {
        f"{name} {wires} wires depth {depth}": kernel(name, wires, depth)
        for name, wires, depth in (
            ("heisenberg", 2, 2),
            ("heisenberg", 4, 2),
            ("strongly_entangling", 6, 2),
            ("strongly_entangling", 8, 2),
            ("strongly_entangling", 9, 1),
            ("strongly_entangling", 9, 2),
            ("strongly_entangling", 9, 3),
            ("heisenberg", 9, 2),
            ("strongly_entangling", 12, 2),
            ("heisenberg", 12, 1),
        )
    }
    found["re-uploading 4 wires"] = _reuploading(4)
    found["re-uploading 7 wires"] = _reuploading(7)
    found["amplitude 16 features"] = kernel("heisenberg", 4, encoding="amplitude")
    found["amplitude 64 features"] = kernel("heisenberg", 6, encoding="amplitude")
    return found


@dataclass(frozen=True)
class Case:
    """One way of one circuit at one call.

    Args:
        circuit: Its name.
        call: What was asked.
        way: Its name.
        kind: A key of WAYS.
        built, run: Multiplications from the weights, and on patches.
        predicted, measured: Seconds.
    """

    circuit: str
    call: Call
    way: str
    kind: str
    built: int
    run: int
    predicted: float
    measured: float


def _step(layer: QuantumConv2d, images: Tensor, training: bool) -> Callable[[], None]:
    def forward() -> None:
        with torch.no_grad():
            layer(images)

    def train() -> None:
        with torch.no_grad():
            layer.weight.mul_(1.0001)  # so that nothing is kept
        layer(images).sum().backward()
        images.grad = layer.weight.grad = None

    return train if training else forward


def measure(name: str, circuit: Circuit, batch: int, side: int, training: bool, rounds: int) -> list[Case]:
    """All ways of one circuit, timed in turns."""
    torch.manual_seed(0)
    height = circuit.n_inputs + side - 1
    images = torch.rand(batch, 1, height, side, requires_grad=training)
    steps, works = {}, {}
    outputs = len(circuit.observables)
    whole = QuantumConv2d(1, outputs, (circuit.n_inputs, 1), kernel=circuit)._compile()
    assert isinstance(whole, AutoCompiled)
    call = Call(batch * side**2, 1, training, "cpu", True)
    for way, compiled in whole.ways.items():
        layer = QuantumConv2d(1, outputs, (circuit.n_inputs, 1), kernel=circuit)
        layer._compiled = AutoCompiled(circuit, {way: compiled})
        steps[way] = _step(layer, images, training)
        works[way] = compiled
    timings = alternate(steps, rounds).timings
    cases = []
    for way, compiled in works.items():
        work = compiled.work(call)
        counts = compiled.counts(call.patches, 1)
        run = sum(amount for key, amount in counts.items() if key.startswith(("mac:", "mul:")))
        built = 0 if work.kept and not training else work.built
        predicted = seconds(compiled, call)
        cases.append(Case(name, call, way, work.way, built, run, predicted, timings[way].median))
    return cases


def fitted(cases: list[Case]) -> dict[str, list[Rates]]:
    """Rates of each way, in inference and in training: least squares of relative errors, none negative."""
    from scipy.optimize import nnls

    found: dict[str, list[Rates]] = {}
    for kind in WAYS:
        for training in (False, True):
            rows = [case for case in cases if case.kind == kind and case.call.training == training]
            if rows:
                matrix = np.array([[1.0, case.built, case.run] for case in rows])
                times = np.array([case.measured for case in rows])
                solution, _ = nnls(matrix / times[:, None], np.ones(len(rows)))
                latency, *costs = (float(value) for value in solution)
                # What hardly costs anything, or did not occur, gets a rate that does not matter.
                found.setdefault(kind, []).append(Rates(latency, *(1 / max(cost, 1e-12) for cost in costs)))
    return found


def show(console: Console, cases: list[Case]) -> None:
    """The table, and how good the choices were."""
    table = Table(
        "circuit", "mode", "patches", "way", "predicted", "measured", "chosen", title='"auto" against the clock'
    )
    losses, errors = [], []
    groups: dict[tuple[str, Call], list[Case]] = {}
    for case in cases:
        groups.setdefault((case.circuit, case.call), []).append(case)
    for (name, call), ways in groups.items():
        chosen = min(ways, key=lambda case: case.predicted)
        losses.append(chosen.measured / min(case.measured for case in ways))
        for case in ways:
            errors.append(max(case.predicted / case.measured, case.measured / case.predicted))
            cells = (f"{1e3 * case.predicted:.3g} ms", f"{1e3 * case.measured:.3g} ms", "*" if case is chosen else "")
            mode = "training" if call.training else "inference"
            table.add_row(name, mode, f"{call.patches:,}", f"{case.way} ({case.kind})", *cells)
    console.print(table)
    right = sum(loss <= 1.05 for loss in losses)
    console.print(
        f"The way chosen was the fastest, or within 5 % of it, in {right} of {len(losses)} calls; at worst it took "
        f"{max(losses):.2f} times as long. Predictions are off by a factor of {statistics.median(errors):.2f} "
        f"(median), {max(errors):.1f} at most."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="rounds of timing; default 3")
    parser.add_argument("--fit", action="store_true", help="print the model's constants as these times give them")
    parser.add_argument("--plain", action="store_true", help="hide the fast extra")
    arguments = parser.parse_args()
    console = Console(width=140)
    if arguments.plain:
        sys.modules["llvmlite"] = None  # type: ignore[assignment]
    cases = [
        case
        for name, circuit in circuits().items()
        for batch, side in SHAPES
        for training in (False, True)
        for case in measure(name, circuit, batch, side, training, arguments.rounds)
    ]
    show(console, cases)
    if arguments.fit:
        for kind, modes in fitted(cases).items():
            rates = ", ".join(f"Rates({r.latency:.1e}, {r.building:.1e}, {r.running:.1e})" for r in modes)
            console.print(f'    "{kind}": ({rates}),')


if __name__ == "__main__":
    main()
