"""Measurements, each of which runs in a process of its own."""

import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.peers import PEERS
from benchmarks.record import Comparison, Memory
from benchmarks.systems import Answers, Ours, System, own_systems
from benchmarks.timing import alternate
from benchmarks.workloads import WORKLOADS, Mode, Workload
from qconv import QuantumConv2d

# float32: values lie in [-1, 1]; gradients are sums over thousands of patches, relative to the largest.
TOLERANCE = {"values": 1e-4, "weights": 1e-3, "images": 1e-3}
CIRCUIT = "strongly_entangling"


def compare(name: str, peer_name: str | None, rounds: int) -> Comparison:
    """Time nn.Conv2d, our kernels and a peer on a workload, after checking that the peer computes what we compute.

    Raises:
        ValueError: If it does not: then there is nothing to compare.
    """
    # An empty folder, so that every first call compiles.
    with tempfile.TemporaryDirectory() as cache:
        before = os.environ.get("QCONV_CACHE")
        os.environ["QCONV_CACHE"] = cache
        try:
            return _compare(name, peer_name, rounds)
        finally:
            del os.environ["QCONV_CACHE"]
            if before is not None:
                os.environ["QCONV_CACHE"] = before


def _compare(name: str, peer_name: str | None, rounds: int) -> Comparison:
    workload = WORKLOADS[name]
    systems = own_systems(workload)
    peer = PEERS[peer_name](workload) if peer_name else None
    images = {system.name: workload.images(system.limit) for system in systems}
    first_call = {system.name: _seconds(system.answers, images[system.name]) for system in systems}
    difference: dict[str, float] = {}
    if peer is not None:
        images[peer.name] = workload.images(peer.limit)
        ours = next(s for s in systems if isinstance(s, Ours) and s.kernel == CIRCUIT)
        first_call[peer.name], difference = check(workload, ours, peer, images[peer.name])
        systems.append(peer)

    seconds: dict[str, dict[str, float]] = {}
    best: dict[str, dict[str, float]] = {}
    taken: dict[str, dict[str, int]] = {}
    repeated: dict[str, int] = {}
    disturbed: dict[str, int] = {}
    for mode in workload.modes:
        calls = {}
        shares = {}
        for system in systems:
            if mode == "training" and not system.differentiates:
                continue
            system.load(mode, images[system.name])
            calls[system.name], shares[system.name] = system.run, system.share()
        found = alternate(calls, rounds)
        timings, repeated[mode], disturbed[mode] = found.timings, found.repeated, found.disturbed
        seconds[mode] = {system: timing.median / shares[system] for system, timing in timings.items()}
        best[mode] = {system: timing.best / shares[system] for system, timing in timings.items()}
        taken[mode] = {system: timing.rounds for system, timing in timings.items()}
    return Comparison(
        name,
        peer_name,
        seconds,
        best,
        taken,
        repeated,
        disturbed,
        first_call,
        difference,
        peer.share() if peer else 1.0,
        {system.name: details for system in systems if (details := system.details())},
    )


def check(workload: Workload, ours: System, peer: System, images: Tensor) -> tuple[float, dict[str, float]]:
    """Equal weights, equal answers.

    Returns:
        Seconds of the peer's first call, and the largest differences.

    Raises:
        ValueError: For answers that differ by more than TOLERANCE.
    """
    generator = torch.Generator().manual_seed(2)
    weights = torch.randn(workload.filters, workload.layers, workload.wires, 3, generator=generator)
    ours.set_weights(weights)
    peer.set_weights(weights)
    expected = ours.answers(images)
    start = time.perf_counter()
    found = peer.answers(images)
    seconds = time.perf_counter() - start
    result = differences(expected, found)
    for what, value in result.items():
        if not value <= TOLERANCE[what]:
            raise ValueError(
                f"{peer.name} and {ours.name} differ by {value:.1e} in {what}, allowed are {TOLERANCE[what]:.0e}: "
                "the benchmark would compare different things"
            )
    return seconds, result


def differences(expected: Answers, found: Answers) -> dict[str, float]:
    """Largest difference of values, and of gradients in parts of the largest one."""
    result = {"values": float((expected.values - found.values).abs().max())}
    for what in ("weights", "images"):
        ours, theirs = getattr(expected, what), getattr(found, what)
        if theirs is not None:
            result[what] = float((ours.flatten() - theirs.flatten()).abs().max() / ours.abs().max())
    return result


def memory(name: str, system_name: str) -> Memory:
    """Peak memory of a system that runs a workload once; call it in a fresh process."""
    workload = WORKLOADS[name]
    own = {system.name: system for system in own_systems(workload)}
    system = own[system_name] if system_name in own else PEERS[system_name](workload)
    mode: Mode = "training" if system.differentiates else "forward"
    # A first call on few patches: libraries and compiled code are not what a workload costs.
    system.load(mode, workload.images(1))
    if workload.batches is None:
        system.run()
    before = _peak()
    system.load(mode, workload.images(system.limit))
    system.run()
    peak = _peak()
    return Memory(name, system.name, mode, system.share(), peak, peak - before)


def first_call(cache: str) -> float:
    """Seconds from building W1's default layer to its first values and gradients; call it in a fresh process.

    Args:
        cache: Folder for compiled code.
    """
    os.environ["QCONV_CACHE"] = cache
    images = WORKLOADS["W1"].images().requires_grad_()
    torch.nn.Conv2d(1, 4, 2, 2)(images).sum().backward()

    def call() -> None:
        layer = QuantumConv2d(1, 4, 2, 2)
        layer(images).sum().backward()
        with torch.no_grad():
            layer.eval()(images)

    return _seconds(call)


def without_fast(rounds: int) -> Comparison:
    """W1 as it runs without the fast extra; call it in a fresh process."""
    sys.modules["llvmlite"] = None  # type: ignore[assignment]
    return compare("W1", None, rounds)


def missing(names: Sequence[str]) -> dict[str, str]:
    """Why some peers do not run here at all."""
    return {name: "not installed" for name in names if not PEERS[name].installed()}


def _seconds(call: Callable[..., object], *arguments: object) -> float:
    start = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - start


def _peak() -> int:
    """Bytes; Linux counts in kilobytes, macOS in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
