"""What every peer shares: which part of a workload it takes, patches of images, and whether it is here."""

import importlib.util
import os
from abc import abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.systems import System, TorchSystem
from benchmarks.workloads import Workload

STATE_BYTES = 2**31  # what all intermediate states of one batched training step may take together
SMALL = 2**9  # amplitudes up to which the price of a patch is the overhead of its calls
TOO_WIDE = 20  # wires beyond which one batched step does not fit into memory


def batched_limit(workload: Workload) -> int:
    """Patches whose states after every gate, kept for the backward pass, fit into STATE_BYTES."""
    numbers = 1 << workload.wires * (2 if workload.noise else 1)
    gates = sum(1 for _ in workload.moves())
    return max(1, STATE_BYTES // (16 * numbers * gates))


def single_limit(workload: Workload, patches: int) -> int:
    """Patches for a simulator that runs one patch after another, given how many small ones it can do in a second."""
    return max(1, patches * SMALL // max(SMALL, 1 << workload.wires))


def one_thread_if_small(workload: Workload) -> None:
    """Have a library that is loaded from now on use one thread where a second only costs.

    torch, loaded before, keeps its own: OpenMP reads this once for each copy of it that a package brings.
    """
    if workload.wires <= 12:
        os.environ["OMP_NUM_THREADS"] = "1"


def signs(wires: int) -> Tensor:
    """Z of every wire on every basis state: (2^wires, wires), wire 0 the most significant bit."""
    states = torch.arange(2**wires)[:, None]
    return 1 - 2 * (states >> torch.arange(wires - 1, -1, -1) & 1).float()


class PatchLayer(nn.Module):
    """Patches of the images through one function.

    Args:
        workload: The geometry.
        evaluate: (patches (P, wires), weights (layers, wires, 3)) -> (P, wires).
    """

    def __init__(self, workload: Workload, evaluate: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.workload, self.evaluate = workload, evaluate
        self.weight = nn.Parameter(torch.zeros(workload.filters, workload.layers, workload.wires, 3))

    def forward(self, images: Tensor) -> Tensor:
        """(B, channels, H, W) -> (B, outputs, H', W')."""
        w = self.workload
        columns = nn.functional.unfold(images, w.side, stride=w.stride)
        patches = columns.mT.reshape(-1, w.wires)
        values = torch.cat([self.evaluate(patches, weights) for weights in self.weight], 1).to(images.dtype)
        height = (images.shape[2] - w.side) // w.stride + 1
        return values.reshape(len(images), -1, w.outputs).mT.reshape(len(images), w.outputs, height, -1)


class Peer(System):
    """A simulator that may be installed.

    Attributes:
        package: The name it is installed by.
        module: The name it is imported by.
    """

    package: str
    module: str

    @classmethod
    def installed(cls) -> bool:
        """Whether it can be imported here."""
        return importlib.util.find_spec(cls.module) is not None

    @classmethod
    def cannot(cls, workload: Workload) -> str | None:
        """Why it does not run a workload; None if it does."""
        return None


def too_wide(workload: Workload) -> str | None:
    """Why a batched simulator does not run a workload."""
    return "the states of one step do not fit into memory" if workload.wires > TOO_WIDE else None


class TorchPeer(Peer, TorchSystem):
    """A peer with an nn.Module around `evaluate`."""

    batch_limit = 16

    def __init__(self, workload: Workload) -> None:
        super().__init__(workload)
        self.limit = batched_limit(workload)
        self.layer = PatchLayer(workload, self.evaluate)

    @abstractmethod
    def evaluate(self, patches: Tensor, weights: Tensor) -> Tensor:
        """Expectation values (P, wires) of patches (P, wires) under one circuit's weights (layers, wires, 3)."""
