"""What is computed: geometries, circuits and noise, the same for every system."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from circuits import Channel, Circuit, NoiseModel, kernel

SIZE, DEPTH, ERROR = 28, 2, 0.01
# Depolarizing noise on both wires of every entangling gate; strongly_entangling has CNOTs only.
NOISE = NoiseModel(tuple((gate, Channel("depolarizing", ERROR)) for gate in ("CNOT", "RXX", "RYY", "RZZ")))

Mode = Literal["forward", "training"]
Move = tuple[Literal["encode", "rot", "cnot"], int, int]


@dataclass(frozen=True)
class Workload:
    """One convolution of a batch of images by an angle-encoded circuit, Z of every wire read out.

    Args:
        what: In words.
        side: Height and width of the kernel.
        stride: Its stride.
        channels: Channels of the images, all encoded into one register.
        filters: Circuits with weights of their own.
        uploads: How often the features are encoded; with more than one, each is followed by one layer.
        noise: Whether NOISE is on.
        batch: Images in a batch.
        batches: Batches of one epoch, trained with a linear classifier and Adam; None for a bare layer.
        kernels: Kernels of ours that are timed; peers run strongly_entangling.
    """

    what: str
    side: int = 2
    stride: int = 2
    channels: int = 1
    filters: int = 1
    uploads: int = 1
    noise: bool = False
    batch: int = 32
    batches: int | None = None
    kernels: tuple[str, ...] = ("strongly_entangling",)

    @property
    def wires(self) -> int:
        """One qubit a pixel and channel."""
        return self.channels * self.side**2

    @property
    def layers(self) -> int:
        """Strongly entangling layers in all."""
        return DEPTH if self.uploads == 1 else self.uploads

    @property
    def outputs(self) -> int:
        """Channels of the output."""
        return self.filters * self.wires

    @property
    def steps(self) -> int:
        """Output positions along one side of an image."""
        return (SIZE - self.side) // self.stride + 1

    @property
    def patches(self) -> int:
        """Patches of a batch."""
        return self.batch * self.steps**2

    @property
    def modes(self) -> tuple[Mode, ...]:
        """What is timed: an epoch has no forward half."""
        return ("forward", "training") if self.batches is None else ("training",)

    def circuit(self, name: str) -> Circuit:
        """Our kernel."""
        if self.uploads == 1:
            return kernel(name, self.wires, DEPTH)
        layer = kernel(name, self.wires, 1)
        whole = layer
        for _ in range(self.uploads - 1):
            whole = whole + layer.shift_weights(whole.n_weights)
        return whole

    def moves(self) -> Iterator[Move]:
        """The strongly entangling circuit, spelled out for peers.

        Yields:
            ("encode", wire, wire): RY(pi x) by the wire's own feature. ("rot", wire, layer): Rot by weights
            [layer, wire]. ("cnot", control, target).
        """
        per_upload = self.layers // self.uploads
        for upload in range(self.uploads):
            for wire in range(self.wires):
                yield "encode", wire, wire
            for k in range(per_upload):
                for wire in range(self.wires):
                    yield "rot", wire, upload * per_upload + k
                reach = k % (self.wires - 1) + 1
                for wire in range(self.wires):
                    yield "cnot", wire, (wire + reach) % self.wires

    def images(self, patches: int | None = None) -> Tensor:
        """The same random images for every system.

        Args:
            patches: At most so many patches: fewer images, and below one image a smaller one. None for the whole
                batch.

        Returns:
            (images, channels, height, width) in [0, 1).
        """
        generator = torch.Generator().manual_seed(1)
        images = torch.rand(self.batch, self.channels, SIZE, SIZE, generator=generator)
        if patches is None or patches >= self.patches:
            return images
        if patches >= self.steps**2:
            return images[: patches // self.steps**2].contiguous()
        reach = self.side + self.stride * (max(1, math.isqrt(patches)) - 1)
        return images[:1, :, :reach, :reach].contiguous()

    def count(self, images: Tensor) -> int:
        """Patches of some images."""
        return len(images) * math.prod((size - self.side) // self.stride + 1 for size in images.shape[2:])


_BOTH = ("heisenberg", "strongly_entangling")
WORKLOADS = {
    "W1": Workload("2x2 kernel, stride 2, 4 qubits", kernels=_BOTH),
    "W2": Workload("2x2 kernel, stride 1, 4 qubits", stride=1, kernels=_BOTH),
    "W3": Workload("3x3 kernel, stride 1, 9 qubits", side=3, stride=1),
    "W4": Workload("W1 re-uploading: 3 times (encode, 1 layer)", uploads=3),
    "W5": Workload("W1 with depolarizing noise of 0.01 after every entangling gate", noise=True, kernels=_BOTH),
    "W6": Workload(
        "one epoch of 10,000 images: W1's kernel, Linear(784, 10), Adam", batch=64, batches=157, kernels=_BOTH
    ),
    "L1": Workload("2x2 kernel on 3 channels, stride 2, 12 qubits", channels=3),
    "L2": Workload("W1 with 8 filters, 32 outputs", filters=8),
    "N16": Workload("4x4 kernel, stride 1, 16 qubits", side=4, stride=1),
    "N25": Workload("5x5 kernel, stride 1, 25 qubits", side=5, stride=1),
}
