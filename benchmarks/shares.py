"""Where the time of a training step goes, for the goals that are missed: with the fast extra, and in plain torch.

    python -m benchmarks.shares            # W1, W2
    python -m benchmarks.shares --plain    # W1 as it runs without the fast extra

Run it from the root of the repository.
"""

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks.workloads import WORKLOADS
from qconv import QuantumConv2d

KERNEL = "strongly_entangling"
STEPS = 300
LOOPS = {"coefficients": "coefficients", "coefficients_back": "coefficients", "planes": "pixels' sines and cosines"}


def training_step(layer: nn.Module, images: torch.Tensor) -> Callable[[], None]:
    """What the benchmark's training times: new weights, values, gradients of both."""

    def step() -> None:
        with torch.no_grad():
            layer.weight.mul_(1.0001)  # type: ignore[operator]
        layer(images).sum().backward()
        images.grad = layer.weight.grad = None  # type: ignore[union-attr]

    return step


def seconds(call: Callable[[], None]) -> float:
    """Of one call, the best of five loops."""
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(STEPS):
            call()
        best = min(best, (time.perf_counter() - start) / STEPS)
    return best


def fast(console: Console, name: str) -> None:
    """Time inside compiled loops, by loop, and the rest of the step."""
    from qconv.backends import fused, fused_program, tasks, threads

    workload = WORKLOADS[name]
    images = workload.images().requires_grad_()
    step = training_step(QuantumConv2d(1, 4, 2, workload.stride, kernel=KERNEL), images)
    step()
    whole = seconds(step)
    conv = seconds(training_step(nn.Conv2d(1, 4, 2, workload.stride, bias=False), images))
    names = {task.address: symbol for symbol, task in tasks._TASKS.items()}
    spent: dict[str, float] = {}

    def run(task: tasks.Task, data: Any, most: int) -> None:
        start = time.perf_counter()
        threads.run(task, data, most)
        symbol = names[task.address].removeprefix("qconv_").rsplit("_", 1)[0]
        kind = LOOPS.get(symbol, "patches, backward" if "back" in symbol else "patches, forward")
        spent[kind] = spent.get(kind, 0) + time.perf_counter() - start

    fused.run = fused_program.run = run  # type: ignore[attr-defined]
    for _ in range(STEPS):
        step()
    fused.run = fused_program.run = threads.run  # type: ignore[attr-defined]
    table = Table("part", "us", "share", title=f"{name}, training, {KERNEL}: {1e6 * whole:.0f} us a step")
    for part, total in spent.items():
        table.add_row(part, f"{1e6 * total / STEPS:.0f}", f"{total / STEPS / whole:.0%}")
    rest = whole - sum(spent.values()) / STEPS
    table.add_row("Python, autograd and torch around them", f"{1e6 * rest:.0f}", f"{rest / whole:.0%}")
    console.print(table)
    console.print(f"nn.Conv2d's step: {1e6 * conv:.0f} us; {torch.get_num_threads()} threads\n")


def plain(console: Console) -> None:
    """torch's own operations, by the time they take themselves."""
    workload = WORKLOADS["W1"]
    images = workload.images().requires_grad_()
    layer = QuantumConv2d(1, 4, 2, workload.stride, kernel=KERNEL)
    step = training_step(layer, images)
    step()
    whole = seconds(step)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(20):
            step()
    events = sorted(profile.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    table = Table(
        "operation", "calls a step", "share", title=f"W1, training without the fast extra: {1e3 * whole:.2f} ms"
    )
    for event in events[:12]:
        table.add_row(event.key, f"{event.count / 20:.0f}", f"{event.self_cpu_time_total / total:.0%}")
    console.print(table)
    calls = sum(event.count for event in events if event.key.startswith("aten::")) / 20
    console.print(f"{calls:.0f} operations of torch a step; shares of the profiled time, which profiling lengthens")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plain", action="store_true", help="hide the fast extra")
    arguments = parser.parse_args()
    console = Console(width=100)
    if arguments.plain:
        sys.modules["llvmlite"] = None  # type: ignore[assignment]
        plain(console)
    else:
        for name in ("W1", "W2"):
            fast(console, name)


if __name__ == "__main__":
    main()
