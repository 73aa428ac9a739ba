"""How much a quantum convolution costs beside nn.Conv2d and beside PennyLane.

All systems run the same workload in one process, in turns, after a warm-up; medians over rounds are compared, because
single timings depend on caches and load. Gradients are taken with respect to weights and images.

    python benchmarks/quanvolution.py                 # W1 and W2
    python benchmarks/quanvolution.py W1 --rounds 15 --json out.json

Workloads: 32 images of 1x28x28, float32, angle encoding, 2x2 kernel on 4 qubits, <Z> of every wire. PennyLane computes
in double precision inside, as its users get it.
    W1  stride 2 (6,272 patches)      W2  stride 1 (23,328 patches)
"""

import argparse
import importlib.metadata
import json
import math
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pennylane as qml
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from qconv import QuantumConv2d

BATCH, SIZE, WIRES, DEPTH = 32, 28, 4, 2
STRIDES = {"W1": 2, "W2": 1}
GOAL = 12  # times faster than PennyLane default.qubit, forward and forward + backward


def pennylane_layer(stride: int) -> Callable[[Tensor], Tensor]:
    """The layer as a user of PennyLane writes it: one broadcast QNode over all patches, differentiated by backprop."""
    device = qml.device("default.qubit", wires=WIRES)

    @qml.qnode(device, interface="torch", diff_method="backprop")
    def node(x: Tensor, w: Tensor) -> list[object]:
        qml.AngleEmbedding(math.pi * x, wires=range(WIRES), rotation="Y")
        qml.StronglyEntanglingLayers(w, wires=range(WIRES))
        return [qml.expval(qml.Z(wire)) for wire in range(WIRES)]

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(0.1 * torch.randn(DEPTH, WIRES, 3))

        def forward(self, images: Tensor) -> Tensor:
            columns = nn.functional.unfold(images, 2, stride=stride)
            side = (SIZE - 2) // stride + 1
            values = torch.stack(node(columns.mT.reshape(-1, WIRES), self.weight))
            return values.reshape(WIRES, len(images), side, side).transpose(0, 1).to(images.dtype)

    return Layer()


def systems(workload: str) -> dict[str, nn.Module]:
    """Everything that is timed on one workload."""
    stride = STRIDES[workload]
    torch.manual_seed(0)
    layers = {"nn.Conv2d": nn.Conv2d(1, WIRES, 2, stride, bias=False)}
    for kernel in ("heisenberg", "strongly_entangling"):
        layers[f"qconv {kernel}"] = QuantumConv2d(1, WIRES, 2, stride, kernel=kernel, depth=DEPTH)
    layers["PennyLane default.qubit"] = pennylane_layer(stride)
    return layers


def forward(layer: nn.Module, images: Tensor) -> None:
    with torch.no_grad():
        layer(images)


def forward_backward(layer: nn.Module, images: Tensor) -> None:
    layer(images).sum().backward()
    images.grad = None
    layer.zero_grad()


def measure(step: Callable[[nn.Module, Tensor], None], layers: dict[str, nn.Module], rounds: int) -> dict[str, float]:
    """Median seconds a call of each layer, all in turns."""
    images = torch.rand(BATCH, 1, SIZE, SIZE, requires_grad=step is forward_backward)
    repeats = {}
    for name, layer in layers.items():
        step(layer, images)
        start = time.perf_counter()
        step(layer, images)
        # Fast layers run in a tight loop of about 30 ms a round.
        repeats[name] = max(1, round(0.03 / (time.perf_counter() - start)))
    times: dict[str, list[float]] = {name: [] for name in layers}
    for _ in range(rounds):
        for name, layer in layers.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                step(layer, images)
            times[name].append((time.perf_counter() - start) / repeats[name])
    return {name: statistics.median(values) for name, values in times.items()}


def check_same_values(layers: dict[str, nn.Module]) -> None:
    """The peer computes what we compute: speed is compared on equal answers only."""
    ours, peer = layers["qconv strongly_entangling"], layers["PennyLane default.qubit"]
    with torch.no_grad():
        ours.weight.copy_(peer.weight.reshape(1, -1))
        images = torch.rand(2, 1, SIZE, SIZE)
        worst = float((ours(images) - peer(images)).abs().max())
    if worst > 1e-5:
        raise SystemExit(f"qconv and PennyLane differ by {worst:.1e}: the benchmark would compare different things")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workloads", nargs="*", default=list(STRIDES), metavar="W1 W2")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="write all figures with versions to this file")
    arguments = parser.parse_args()
    console = Console(width=110)
    record: dict[str, object] = {
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "versions": {name: importlib.metadata.version(name) for name in ("qconv", "torch", "pennylane")},
    }
    for workload in arguments.workloads:
        layers = systems(workload)
        check_same_values(layers)
        table = Table("system", title=f"{workload}: {BATCH} images, stride {STRIDES[workload]}")
        results = {}
        for label, step in (("forward", forward), ("forward + backward", forward_backward)):
            table.add_column(f"{label} [ms]", justify="right")
            table.add_column("/ nn.Conv2d", justify="right")
            table.add_column("PennyLane /", justify="right")
            results[label] = measure(step, layers, arguments.rounds)
        for name in layers:
            cells = []
            for times in results.values():
                conv, peer = times["nn.Conv2d"], times["PennyLane default.qubit"]
                cells += [f"{1e3 * times[name]:.3f}", f"{times[name] / conv:.2f}", f"{peer / times[name]:.1f}"]
            table.add_row(name, *cells)
        console.print(table)
        record[workload] = results
        worst = min(
            times["PennyLane default.qubit"] / times[name]
            for times in results.values()
            for name in layers
            if name.startswith("qconv")
        )
        console.print(f"{workload}: at least {worst:.1f} times faster than PennyLane default.qubit (goal {GOAL})\n")
    if arguments.json:
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
