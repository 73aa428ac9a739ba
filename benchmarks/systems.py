"""What is timed: one interface over nn.Conv2d, our layer and every peer."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.workloads import NOISE, SIZE, Mode, Workload
from qconv import QuantumConv2d

CLASSES = 10
NUDGE = 1.0001  # weights change before every training step, so that nothing computed from them can be kept


@dataclass(frozen=True)
class Answers:
    """What a system computes: values (B, outputs, H', W') and the gradients of their sum, where it has any."""

    values: Tensor
    weights: Tensor | None = None
    images: Tensor | None = None


class System(ABC):
    """Something that computes a workload.

    Args:
        workload: What to compute.

    Attributes:
        name: How it is called in every table.
        limit: Patches it takes at most in one call; None for all. Its times are scaled up in proportion.
        batch_limit: Batches of an epoch that it runs at most, scaled up likewise.
        differentiates: Whether it gives gradients with respect to weights and images.
        note: What a reader of its figures must know.
    """

    name: str
    limit: int | None = None
    batch_limit: int | None = None
    differentiates = True
    note = ""

    def __init__(self, workload: Workload) -> None:
        self.workload = workload

    def share(self) -> float:
        """Part of the workload that one call runs; 1 for all."""
        if self.workload.batches is not None:
            return min(1.0, (self.batch_limit or self.workload.batches) / self.workload.batches)
        return self.workload.count(self.workload.images(self.limit)) / self.workload.patches

    def details(self) -> dict[str, str]:
        """What is recorded beside its times."""
        return {"note": self.note} if self.note else {}

    @abstractmethod
    def set_weights(self, weights: Tensor) -> None:
        """Take weights (filters, layers, wires, 3)."""

    @abstractmethod
    def load(self, mode: Mode, images: Tensor) -> None:
        """Get ready to run a mode on images; not timed."""

    @abstractmethod
    def run(self) -> None:
        """One call: the values of the images, or a training step, or an epoch."""

    @abstractmethod
    def answers(self, images: Tensor) -> Answers:
        """Values and gradients, to compare with other systems'."""


class TorchSystem(System):
    """A system that is an nn.Module with one weight tensor."""

    layer: nn.Module

    @property
    def weight(self) -> Tensor:
        """The weights, of any shape."""
        return self.layer.get_parameter("weight")

    def set_weights(self, weights: Tensor) -> None:
        """See System."""
        with torch.no_grad():
            self.weight.copy_(weights.reshape(self.weight.shape))

    def load(self, mode: Mode, images: Tensor) -> None:
        """See System."""
        self.layer.train(mode == "training")
        self._images = images.clone().requires_grad_(mode == "training")
        self._parameters = list(self.layer.parameters())
        self._call = {"forward": self._forward, "training": self._train}[mode]
        if self.workload.batches is not None:
            batches = min(self.batch_limit or self.workload.batches, self.workload.batches)
            head = nn.Linear(self.workload.outputs * self.workload.steps**2, CLASSES)
            self._model = nn.Sequential(self.layer, nn.Flatten(), head)
            self._optimizer = torch.optim.Adam(self._model.parameters(), lr=1e-3)
            self._data = torch.rand(batches, self.workload.batch, self.workload.channels, SIZE, SIZE)
            self._labels = torch.randint(CLASSES, (batches, self.workload.batch))
            self._call = self._epoch

    def run(self) -> None:
        """See System."""
        self._call()

    def _forward(self) -> None:
        with torch.no_grad():
            self.layer(self._images)

    def _train(self) -> None:
        with torch.no_grad():
            for parameter in self._parameters:
                parameter.mul_(NUDGE)
        self.layer(self._images).sum().backward()
        self._images.grad = None
        for parameter in self._parameters:
            parameter.grad = None

    def _epoch(self) -> None:
        for images, labels in zip(self._data, self._labels, strict=True):
            self._optimizer.zero_grad()
            nn.functional.cross_entropy(self._model(images), labels).backward()  # type: ignore[no-untyped-call]
            self._optimizer.step()

    def answers(self, images: Tensor) -> Answers:
        """See System."""
        if not self.differentiates:
            with torch.no_grad():
                return Answers(self.layer(images))
        images = images.clone().requires_grad_()
        values = self.layer(images)
        weight_gradient, image_gradient = torch.autograd.grad(values.sum(), (self.weight, images))
        return Answers(values.detach(), weight_gradient, image_gradient)


class Conv(TorchSystem):
    """The classical convolution of the same shape."""

    name = "nn.Conv2d"

    def __init__(self, workload: Workload) -> None:
        super().__init__(workload)
        w = workload
        self.layer = nn.Conv2d(w.channels, w.outputs, w.side, w.stride, bias=False)


class Ours(TorchSystem):
    """QuantumConv2d with one of its kernels."""

    def __init__(self, workload: Workload, kernel: str) -> None:
        super().__init__(workload)
        w = workload
        self.kernel, self.name = kernel, f"qconv {kernel}"
        noise = NOISE if w.noise else None
        self.layer: QuantumConv2d = QuantumConv2d(
            w.channels, w.outputs, w.side, w.stride, kernel=w.circuit(kernel), noise=noise
        )

    def details(self) -> dict[str, str]:
        """What "auto" chose; a predicted cost to compare with the measured one belongs here too."""
        return {"backend": self.layer.backend}


def own_systems(workload: Workload) -> list[System]:
    """nn.Conv2d first, then our kernels."""
    torch.manual_seed(0)
    return [Conv(workload), *(Ours(workload, kernel) for kernel in workload.kernels)]
