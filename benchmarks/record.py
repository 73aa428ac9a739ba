"""What was measured, as data: one JSON file, from which tables, the page and the picture are made."""

import datetime
import importlib.metadata
import json
import os
import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.workloads import WORKLOADS

PACKAGES = (
    "qconv", "torch", "numpy", "llvmlite", "pennylane", "pennylane-lightning", "tensorcircuit-ng", "jax",
    "torchquantum", "deepquantum", "qulacs", "tensorkrowch", "qiskit", "qiskit-aer",
)  # fmt: skip


@dataclass(frozen=True)
class Comparison:
    """nn.Conv2d, our kernels and at most one peer, timed in turns in one process.

    Args:
        workload: Its name.
        peer: The peer's name; None for us and nn.Conv2d alone.
        seconds: By mode and system, medians, for the whole workload.
        best: The same, shortest round.
        rounds: By mode and system.
        repeated: Rounds that were disturbed and repeated, by mode.
        disturbed: Rounds that were disturbed and count all the same, by mode.
        first_call: Seconds of the first values and gradients by system, compilation included.
        difference: Largest difference between the peer and us: "values" absolute, gradients relative to the largest.
        share: Part of the workload that the peer ran; its seconds are scaled up by 1 / share.
        details: Text by system.
    """

    workload: str
    peer: str | None
    seconds: dict[str, dict[str, float]]
    best: dict[str, dict[str, float]]
    rounds: dict[str, dict[str, int]]
    repeated: dict[str, int]
    disturbed: dict[str, int]
    first_call: dict[str, float]
    difference: dict[str, float]
    share: float
    details: dict[str, dict[str, str]]

    def ratio(self, mode: str, system: str, over: str) -> float | None:
        """Seconds of one system over another's; None where one was not measured."""
        seconds = self.seconds.get(mode, {})
        return seconds[system] / seconds[over] if {system, over} <= seconds.keys() else None


@dataclass(frozen=True)
class Memory:
    """Peak resident memory of a process that runs one system once.

    Args:
        workload: Its name.
        system: The system's name.
        mode: What it ran.
        share: Part of the workload it ran.
        peak: Bytes in all, libraries included.
        run: Bytes by which the call raised the peak.
    """

    workload: str
    system: str
    mode: str
    share: float
    peak: int
    run: int


@dataclass(frozen=True)
class Start:
    """What the `fast` extra costs at the start, and what its absence costs.

    Args:
        first: Seconds from building W1's default layer to its first gradient with an empty cache of compiled code.
        later: The same in a later process, with that cache; both None without the extra.
        without: W1 with the extra hidden.
    """

    first: float | None
    later: float | None
    without: Comparison


@dataclass
class Record:
    """One run of the benchmark.

    Args:
        machine: Where and with what it ran.
        comparisons: Timings.
        memory: Peak memory.
        start: See Start.
        skipped: Why a peer is not in a workload, by workload and peer.
    """

    machine: dict[str, Any]
    comparisons: list[Comparison] = field(default_factory=list)
    memory: list[Memory] = field(default_factory=list)
    start: Start | None = None
    skipped: dict[str, dict[str, str]] = field(default_factory=dict)

    def find(self, workload: str, peer: str | None) -> Comparison | None:
        """A comparison, if it was measured."""
        return next((c for c in self.comparisons if (c.workload, c.peer) == (workload, peer)), None)

    def of(self, workload: str) -> list[Comparison]:
        """All comparisons of a workload, us and nn.Conv2d alone first."""
        found = [c for c in self.comparisons if c.workload == workload]
        return sorted(found, key=lambda c: c.peer is not None)

    def peak(self, workload: str, system: str) -> Memory | None:
        """The memory of a system, if it was measured."""
        return next((m for m in self.memory if (m.workload, m.system) == (workload, system)), None)

    def workloads(self) -> list[str]:
        """Measured workloads, in the order of WORKLOADS, however they were measured."""
        return [name for name in WORKLOADS if self.of(name)]

    def save(self, path: Path) -> None:
        """Write JSON beside the file and rename it: a killed run never leaves half a file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f"{path.name}.new")
        beside.write_text(json.dumps(asdict(self), indent=1) + "\n")
        beside.replace(path)

    @classmethod
    def load(cls, path: Path) -> "Record":
        """What `save` wrote."""
        data = json.loads(path.read_text())
        start = data["start"]
        return cls(
            data["machine"],
            [Comparison(**c) for c in data["comparisons"]],
            [Memory(**m) for m in data["memory"]],
            start and Start(start["first"], start["later"], Comparison(**start["without"])),
            data["skipped"],
        )


def machine() -> dict[str, Any]:
    """This machine and the installed versions; nothing that names a user or a folder."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
        "fast": "llvmlite" in versions,
        "versions": versions,
    }


def _cpu() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
