"""How much a quantum convolution costs beside nn.Conv2d and beside PennyLane.

All systems run the same workload in one process, in turns, after a warm-up; medians over rounds are compared, because
single timings depend on caches and load. Gradients are taken with respect to weights and images; the weights change
before every training step, so that nothing computed from them can be kept.

    python benchmarks/quanvolution.py                 # all workloads, several minutes
    python benchmarks/quanvolution.py W1 W2 --rounds 15 --json out.json

Workloads: 32 images of 1x28x28, float32, angle encoding RY(pi x), <Z> of every wire, depth 2. PennyLane computes in
double precision inside, as its users get it.
    W1  2x2 kernel, stride 2, 4 qubits (6,272 patches)    W2  the same, stride 1 (23,328 patches)
    W3  3x3 kernel, stride 1, 9 qubits (21,632 patches)   W4  W1 with re-uploading: 3 times (encode, 1 layer)
    W5  W1 with depolarizing(0.01) on both qubits after every CNOT
    W6  seconds an epoch: 10,000 images, batch 64, W1's kernel -> Linear(784, 10), Adam
"""

import argparse
import importlib.metadata
import json
import math
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pennylane as qml
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from circuits import Channel, Circuit, NoiseModel, kernel
from qconv import QuantumConv2d

BATCH, SIZE, DEPTH = 32, 28, 2
NOISE = NoiseModel((("CNOT", Channel("depolarizing", 0.01)),))
Step = Callable[[nn.Module, Tensor], None]


@dataclass(frozen=True)
class Workload:
    """One row of the table.

    Args:
        side: Height and width of the kernel.
        stride: Its stride.
        kernels: Our kernels, by what they are called.
        noise: Whether NOISE is on.
        uploads: How often the features are encoded.
    """

    side: int = 2
    stride: int = 2
    kernels: tuple[str, ...] = ("heisenberg", "strongly_entangling")
    noise: bool = False
    uploads: int = 1

    @property
    def wires(self) -> int:
        """One qubit a pixel."""
        return self.side**2


WORKLOADS = {
    "W1": Workload(),
    "W2": Workload(stride=1),
    "W3": Workload(side=3, stride=1, kernels=("strongly_entangling",)),
    "W4": Workload(kernels=("strongly_entangling",), uploads=3),
    "W5": Workload(kernels=("strongly_entangling",), noise=True),
}


def circuit(name: str, workload: Workload) -> Circuit:
    """Our kernel of a workload."""
    if workload.uploads == 1:
        return kernel(name, workload.wires, DEPTH)
    layer = kernel(name, workload.wires, 1)
    whole = layer
    for _ in range(workload.uploads - 1):
        whole = whole + layer.shift_weights(whole.n_weights)
    return whole


class PennylaneLayer(nn.Module):
    """The layer as a user of PennyLane writes it: one broadcast QNode over all patches, differentiated by backprop."""

    def __init__(self, workload: Workload) -> None:
        super().__init__()
        self.workload = workload
        wires = range(workload.wires)
        layers = DEPTH if workload.uploads == 1 else workload.uploads
        self.weight = nn.Parameter(0.1 * torch.randn(layers, workload.wires, 3))
        device = qml.device("default.mixed" if workload.noise else "default.qubit", wires=workload.wires)

        @qml.qnode(device, interface="torch", diff_method="backprop")
        def node(x: Tensor, w: Tensor) -> list[object]:
            for k in range(workload.uploads):
                qml.AngleEmbedding(math.pi * x, wires=wires, rotation="Y")
                part = w if workload.uploads == 1 else w[k : k + 1]
                if workload.noise:
                    _noisy_layers(part, workload.wires)
                else:
                    qml.StronglyEntanglingLayers(part, wires=wires)
            return [qml.expval(qml.Z(wire)) for wire in wires]

        self.node = node

    def forward(self, images: Tensor) -> Tensor:
        """(B, 1, 28, 28) -> (B, wires, H', W')."""
        w = self.workload
        columns = nn.functional.unfold(images, w.side, stride=w.stride)
        side = (SIZE - w.side) // w.stride + 1
        values = torch.stack(self.node(columns.mT.reshape(-1, w.wires), self.weight))
        return values.reshape(w.wires, len(images), side, side).transpose(0, 1).to(images.dtype)


def _noisy_layers(weights: Tensor, wires: int) -> None:
    for layer, angles in enumerate(weights):
        for wire in range(wires):
            qml.Rot(*angles[wire], wires=wire)
        for wire in range(wires):
            pair = (wire, (wire + layer % (wires - 1) + 1) % wires)
            qml.CNOT(wires=pair)
            for noisy in pair:
                qml.DepolarizingChannel(0.01, wires=noisy)


def systems(workload: Workload) -> dict[str, nn.Module]:
    """Everything that is timed on one workload."""
    torch.manual_seed(0)
    wires, side, stride = workload.wires, workload.side, workload.stride
    layers: dict[str, nn.Module] = {"nn.Conv2d": nn.Conv2d(1, wires, side, stride, bias=False)}
    for name in workload.kernels:
        noise = NOISE if workload.noise else None
        layers[f"qconv {name}"] = QuantumConv2d(1, wires, side, stride, kernel=circuit(name, workload), noise=noise)
    layers["PennyLane"] = PennylaneLayer(workload)
    return layers


def forward(layer: nn.Module, images: Tensor) -> None:
    with torch.no_grad():
        layer(images)


def forward_backward(layer: nn.Module, images: Tensor) -> None:
    with torch.no_grad():
        layer.weight.mul_(1.0001)
    layer(images).sum().backward()
    images.grad = None
    layer.zero_grad()


def measure(step: Step, layers: dict[str, nn.Module], rounds: int) -> dict[str, float]:
    """Median seconds a call of each layer, all in turns; a system slower than a second runs in two rounds only."""
    images = torch.rand(BATCH, 1, SIZE, SIZE, requires_grad=step is forward_backward)
    repeats = {}
    for name, layer in layers.items():
        step(layer, images)
        start = time.perf_counter()
        step(layer, images)
        # Fast layers run in a tight loop of about 30 ms a round.
        repeats[name] = 0.03 / (time.perf_counter() - start)
    times: dict[str, list[float]] = {name: [] for name in layers}
    for turn in range(rounds):
        for name, layer in layers.items():
            if repeats[name] < 0.03 and turn >= 2:
                continue
            times[name].append(timed(step, layer, images, max(1, round(repeats[name]))))
    return {name: statistics.median(values) for name, values in times.items()}


def timed(step: Step, layer: nn.Module, images: Tensor, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        step(layer, images)
    return (time.perf_counter() - start) / repeats


def check_same_values(layers: dict[str, nn.Module]) -> None:
    """The peer computes what we compute: speed is compared on equal answers only."""
    ours, peer = layers["qconv strongly_entangling"], layers["PennyLane"]
    with torch.no_grad():
        ours.weight.copy_(peer.weight.reshape(1, -1))
        images = torch.rand(1, 1, SIZE, SIZE)
        worst = float((ours(images) - peer(images)).abs().max())
    if worst > 1e-5:
        raise SystemExit(f"qconv and PennyLane differ by {worst:.1e}: the benchmark would compare different things")


def epoch(layers: dict[str, nn.Module], images: int) -> dict[str, float]:
    """W6: seconds of one epoch of 10,000 images; PennyLane runs a tenth of it, scaled up."""
    data, labels = torch.rand(images, 1, SIZE, SIZE), torch.randint(10, (images,))
    result = {}
    for name, layer in layers.items():
        model = nn.Sequential(layer, nn.Flatten(), nn.Linear(784, 10))
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        part = images // 10 if name == "PennyLane" else images
        start = time.perf_counter()
        for x, y in zip(data[:part].split(64), labels[:part].split(64), strict=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        result[name] = (time.perf_counter() - start) * images / part
    return result


def show(console: Console, title: str, results: dict[str, dict[str, float]], unit: str) -> None:
    table = Table("system", title=title)
    factor = 1e3 if unit == "ms" else 1
    for label in results:
        for heading in (f"{label} [{unit}]", "/ nn.Conv2d", "PennyLane /"):
            table.add_column(heading, justify="right")
    for name in next(iter(results.values())):
        cells = []
        for times in results.values():
            ours, conv, peer = times[name], times["nn.Conv2d"], times["PennyLane"]
            cells += [f"{factor * ours:.3f}", f"{ours / conv:.2f}", f"{peer / ours:.1f}"]
        table.add_row(name, *cells)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workloads", nargs="*", default=[*WORKLOADS, "W6"], metavar="W1 .. W6")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="write all figures with versions to this file")
    arguments = parser.parse_args()
    if unknown := set(arguments.workloads) - {*WORKLOADS, "W6"}:
        parser.error(f"unknown workload {', '.join(sorted(unknown))}: choose from {', '.join([*WORKLOADS, 'W6'])}")
    console = Console(width=110)
    record: dict[str, object] = {
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "versions": {name: importlib.metadata.version(name) for name in ("qconv", "torch", "pennylane")},
    }
    for name in arguments.workloads:
        layers = systems(WORKLOADS["W1" if name == "W6" else name])
        if name == "W6":
            epoch(layers, 640)  # warm-up
            results, unit = {"epoch": epoch(systems(WORKLOADS["W1"]), 10_000)}, "s"
        else:
            check_same_values(layers)
            steps = {"forward": forward, "forward + backward": forward_backward}
            results = {label: measure(step, layers, arguments.rounds) for label, step in steps.items()}
            unit = "ms"
        show(console, name, results, unit)
        record[name] = results
    if arguments.json:
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
