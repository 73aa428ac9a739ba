"""Quantum convolution as a drop-in for nn.Conv2d, and its control with free coefficients."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from math import ceil, pi
from typing import Any

import torch
from torch import Tensor, nn

from circuits.ansatze import ANSATZE
from circuits.circuit import Circuit
from circuits.encodings import find_encoding
from circuits.kernels import kernel as named_kernel
from circuits.naming import unknown
from circuits.noise import NoiseModel
from qconv.backends import fused
from qconv.backends.contraction import contract, polynomial_counts, scaled
from qconv.backends.fourier import MAX_WIRES, FourierCompiled
from qconv.backends.loading import AutoBackend, load_backend
from qconv.backends.protocol import Backend, Compiled, full_precision
from qconv.gradients import compile_differentiable
from qconv.patches import Geometry, Pair, fold, pad, unfold, whole

CHANNELS = ("joint",)


class PatchConv2d(nn.Module):
    """What our convolutions share: nn.Conv2d's arguments and shapes around a function of patches.

    A subclass gives `.weight` and `evaluate(patches, weights) -> (P, rows)`.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Pair,
        stride: int | Pair,
        padding: int | Pair | str,
        dilation: int | Pair,
        groups: int,
        padding_mode: str,
    ) -> None:
        super().__init__()
        for name, value in (("in_channels", in_channels), ("out_channels", out_channels), ("groups", groups)):
            whole(value, name, 1)
        for name, value in (("in_channels", in_channels), ("out_channels", out_channels)):
            if value % groups:
                raise ValueError(
                    f"{name} is {value}, which {groups} groups do not divide: make {name} a multiple of groups"
                )
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.geometry = Geometry.of(kernel_size, stride, padding, dilation, padding_mode)
        # As nn.Conv2d has them, for tools that read a convolution.
        self.kernel_size, self.stride = self.geometry.kernel_size, self.geometry.stride
        self.padding, self.dilation = self.geometry.padding, self.geometry.dilation
        self.padding_mode = padding_mode

    @property
    def features(self) -> int:
        """Numbers in the patch that one group sees."""
        return self.in_channels // self.groups * self.geometry.taps

    def _make_bias(self, bias: bool, like: Tensor) -> None:
        if bias:
            self.bias = nn.Parameter(torch.zeros(self.out_channels, dtype=like.dtype, device=like.device))
        else:
            self.register_parameter("bias", None)

    def evaluate(self, patches: Tensor, weights: Tensor) -> Tensor:
        """Outputs of one group: patches (P, features) and its share of the weights -> (P, rows)."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> Tensor:
        """Convolve.

        Args:
            images: (B, C, H, W) or (C, H, W), floating point, of the layer's dtype (any float under torch.autocast).

        Returns:
            (B, out_channels, H', W') or (out_channels, H', W'), sized as nn.Conv2d's.

        Raises:
            ValueError: For another shape, number of channels or dtype.
        """
        if not isinstance(images, Tensor):
            raise ValueError(
                f"images are a {type(images).__name__}: give a torch.Tensor, such as torch.as_tensor(images)"
            )
        if self.weight.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"the layer is {self.weight.dtype} but a circuit needs torch.float32 or torch.float64: convert it back "
                "with .float(), and use torch.autocast for mixed precision"
            )
        if images.ndim not in (3, 4) or images.shape[-3] != self.in_channels:
            raise ValueError(
                f"layer has {self.in_channels} input channels but images have shape {tuple(images.shape)}: "
                f"give (batch, {self.in_channels}, height, width)"
            )
        if not images.is_floating_point():
            raise ValueError(f"images are {images.dtype}: convert them to floats first, such as images.float() / 255")
        precision = full_precision(images)
        if images.dtype != self.weight.dtype and isinstance(precision, nullcontext):
            raise ValueError(
                f"images are {images.dtype} but the layer is {self.weight.dtype}: convert one with .to(dtype)"
            )
        # Half precision never enters a circuit: errors of angles would grow with depth.
        with precision:
            return self._forward(images.to(self.weight.dtype))

    def convolve(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, out_channels, H', W'), without bias."""
        return self._over_patches(pad(images, self.geometry), self.weight)

    def _over_patches(self, padded: Tensor, weight: Tensor) -> Tensor:
        """Cut padded images into patches, evaluate each group, and put the outputs back in their places."""
        unpadded = replace(self.geometry, padding=(0, 0))
        size = unpadded.output_size(padded.shape[-2], padded.shape[-1])
        outputs = []
        for part, weights in zip(padded.chunk(self.groups, dim=1), weight.chunk(self.groups), strict=True):
            values = self.evaluate(unfold(part, self.geometry), weights)
            outputs.append(fold(values[:, : self.out_channels // self.groups], len(padded), size))
        return outputs[0] if self.groups == 1 else torch.cat(outputs, dim=1)

    def _forward(self, images: Tensor) -> Tensor:
        batch = images if images.ndim == 4 else images[None]
        result = self.convolve(batch)
        if self.bias is not None:
            result = result + self.bias[:, None, None]
        result = result.contiguous()
        return result if images.ndim == 4 else result[0]

    def _shape_counts(self, input_shape: tuple[int, ...]) -> tuple[int, Counter[str]]:
        """Patches of one image, and the entries of the ledger that follow from shapes alone."""
        if len(input_shape) != 3 or input_shape[0] != self.in_channels:
            raise ValueError(f"input_shape is {input_shape}: give ({self.in_channels}, height, width)")
        height, width = self.geometry.output_size(input_shape[1], input_shape[2])
        units = self.out_channels * height * width
        bias = 0 if self.bias is None else self.out_channels
        # Adding a bias costs nothing: it is where the sum starts.
        return height * width, Counter(
            {"units": units, "activation_bits": 32 * units, "params": self.weight.numel() + bias}
        )

    def extra_repr(self) -> str:
        """The arguments that define the layer."""
        g = self.geometry
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={g.kernel_size}, stride={g.stride}, "
            f"padding={g.padding!r}, dilation={g.dilation}, groups={self.groups}, bias={self.bias is not None}, "
            f"padding_mode={g.padding_mode!r}"
        )


class QuantumConv2d(PatchConv2d):
    """A convolution whose kernel is a quantum circuit; a drop-in for nn.Conv2d.

    Each patch is encoded into qubits, a parametrized circuit acts on them, and expectation values of its observables
    become output channels. All patches share the weights.

    Args:
        in_channels: Channels of the image.
        out_channels: Channels of the output. A circuit gives n_obs of them, so there are
            groups * ceil(out_channels / groups / n_obs) filters (circuits with weights of their own); surplus outputs
            are dropped.
        kernel_size: As nn.Conv2d.
        stride: As nn.Conv2d.
        padding: As nn.Conv2d, "same" and "valid" included.
        dilation: As nn.Conv2d.
        groups: As nn.Conv2d.
        bias: Whether to add a trainable bias, started at 0; unlike nn.Conv2d's, off by default.
        padding_mode: As nn.Conv2d.
        kernel: A name of `circuits.kernel_names()` or a Circuit.
        depth: Layers of a named kernel.
        encoding: How features of a patch, in nn.Unfold's order (channel, row, column), enter a named kernel: "angle"
            is RY(pi x).
        readout: Readout of a named kernel: "z" for Z of every wire, or Pauli strings.
        channels: "joint": the pixels of all channels of a group are features of one register.
        backend: "auto", another name of `qconv.backends.backend_names()`, or a backend object.
        shots: Samples a circuit; None for exact expectation values.
        noise: A circuits.NoiseModel; None for none.
        seed: Draws the structure of kernel "random" (None draws that of seed 0) and makes shots repeatable.
        device: As nn.Conv2d.
        dtype: torch.float32 (default) or torch.float64.

    Attributes:
        weight: (filters, n_weights), the one trainable parameter besides bias, the same on every backend. Angles in
            radians.
        circuit: The kernel as data.

    Raises:
        ValueError: For arguments that do not fit each other, unknown names, or what the backend cannot run.

    Source: Henderson et al., Quanvolutional neural networks (arXiv:1904.04767), made trainable.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Pair,
        stride: int | Pair = 1,
        padding: int | Pair | str = 0,
        dilation: int | Pair = 1,
        groups: int = 1,
        bias: bool = False,
        padding_mode: str = "zeros",
        *,
        kernel: str | Circuit = "heisenberg",
        depth: int = 2,
        encoding: str = "angle",
        readout: str | Sequence[str] = "z",
        channels: str = "joint",
        backend: str | Backend = "auto",
        shots: int | None = None,
        noise: NoiseModel | None = None,
        seed: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode)
        if channels not in CHANNELS:
            raise unknown("channels", channels, CHANNELS)
        self.circuit = self._read_kernel(kernel, depth, encoding, readout, seed)
        self._initial = ANSATZE[kernel].initial if isinstance(kernel, str) else "near_identity"
        self.shots, self.noise, self.seed = shots, noise, seed
        self._backend = load_backend(backend) if isinstance(backend, str) else backend
        self._reason = self._backend.name
        if isinstance(self._backend, AutoBackend):
            self._backend, self._reason = self._backend.choose(self.circuit, shots, noise)
        self._compiled: Compiled | None = None
        # Compiled now, so that what a backend cannot run is said here and not in the first training step.
        self._compile()

        per_group = ceil(out_channels / groups / len(self.circuit.observables))
        weight = torch.empty(groups * per_group, self.circuit.n_weights, device=device, dtype=dtype)
        if weight.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"dtype is {weight.dtype}: a circuit needs torch.float32 or torch.float64")
        self.weight = nn.Parameter(weight)
        self._make_bias(bias, weight)
        self.reset_parameters()

    def _read_kernel(
        self, kernel: str | Circuit, depth: int, encoding: str, readout: str | Sequence[str], seed: int | None
    ) -> Circuit:
        if isinstance(kernel, str):
            wires = find_encoding(encoding).wires(self.features)
            kernel = named_kernel(kernel, wires, depth, encoding, readout, features=self.features, seed=seed or 0)
        elif not isinstance(kernel, Circuit):
            raise ValueError(f"kernel is a {type(kernel).__name__}: give a kernel's name or a circuits.Circuit")
        if not kernel.observables:
            raise ValueError("kernel has 0 observables: add at least one with circuit.with_observables(('Z...',))")
        if kernel.n_inputs != self.features:
            height, width = self.geometry.kernel_size
            share = self.in_channels // self.groups
            raise ValueError(
                f"kernel has {kernel.n_wires} wires and takes {kernel.n_inputs} features but a {height}x{width} patch "
                f"of {share} channel{'s' if share > 1 else ''} gives {self.features}: change kernel_size or the kernel"
            )
        return kernel

    def _compile(self) -> Compiled:
        if self._compiled is None:
            self._compiled = compile_differentiable(
                self._backend, self.circuit, shots=self.shots, noise=self.noise, seed=self.seed
            )
        return self._compiled

    def __getstate__(self) -> dict[str, Any]:
        # The circuit is data; what a backend made of it is compiled again where the copy lives.
        return {**self.__dict__, "_compiled": None}

    @property
    def backend(self) -> str:
        """The backend that runs the kernel and, where "auto" chose it, why."""
        return self._reason

    def reset_parameters(self) -> None:
        """Draw new weights from torch's global generator.

        Rotations start from N(0, 0.1) and gates on two wires at 0, so that a kernel with trainable entanglers starts as
        a product kernel and learns how much entanglement it wants; "random" draws all angles from [0, 2 pi).
        """
        with torch.no_grad():
            if self._initial == "uniform":
                self.weight.uniform_(0, 2 * pi)
            else:
                self.weight.normal_(0, 0.1)
                entangling = {
                    angle.index
                    for gate in self.circuit.gates
                    if len(gate.wires) > 1
                    for angle in gate.angles
                    if angle.source == "weight"
                }
                self.weight[:, sorted(entangling)] = 0
            if self.bias is not None:
                self.bias.zero_()

    def convolve(self, images: Tensor) -> Tensor:
        """See PatchConv2d: by the fused kernel where it applies, else patch by patch."""
        compiled = self._compile()
        if isinstance(compiled, FourierCompiled):
            outs = self.out_channels // self.groups
            result = fused.convolve(
                compiled, images, self.weight, self.geometry, self.groups, outs, plain=self._over_patches
            )
            if result is not None:
                return result
        return super().convolve(images)

    def evaluate(self, patches: Tensor, weights: Tensor) -> Tensor:
        """See PatchConv2d: outputs ordered (filter, observable)."""
        return self._compile()(patches, weights).flatten(1)

    def counts(self, input_shape: tuple[int, ...]) -> Counter[str]:
        """Operations of one inference: what runs here, and (device:...) what a quantum device would have to run.

        Args:
            input_shape: (channels, height, width).
        """
        patches, total = self._shape_counts(input_shape)
        compiled = self._compile()
        filters = len(self.weight) // self.groups
        for _ in range(self.groups):
            total += compiled.counts(patches, filters)
        stored = self.weight.numel()
        if isinstance(compiled, FourierCompiled):
            # Inference reads the coefficients, not the angles they were built from.
            stored = compiled.stored_numbers(len(self.weight))
        total["weight_bits"] = 32 * (stored + (0 if self.bias is None else self.out_channels))
        return total

    def extra_repr(self) -> str:
        """The arguments that define the layer."""
        shots = f", shots={self.shots}" if self.shots else ""
        return (
            f"{super().extra_repr()}, wires={self.circuit.n_wires}, filters={len(self.weight)}, "
            f"weights={self.circuit.n_weights}, backend={self._backend.name}{shots}"
        )


class FourierConv2d(PatchConv2d):
    """A free trigonometric polynomial of each patch: the features of an angle-encoded kernel, coefficients unbound.

    y = sum over digits of weight[d_1 .. d_n] times prod_j f_{d_j}(x_j), f = (1, sin pi x, cos pi x). Every kernel with
    "angle" encoding on n wires computes such a polynomial; a circuit ties its 3^n coefficients to few angles, this
    layer leaves them free. It is the control that tells the circuit from its features.

    Args:
        in_channels: As nn.Conv2d.
        out_channels: As nn.Conv2d; each has 3^n coefficients, n = in_channels / groups * kernel pixels, n <= 10.
        kernel_size: As nn.Conv2d.
        stride: As nn.Conv2d.
        padding: As nn.Conv2d.
        dilation: As nn.Conv2d.
        groups: As nn.Conv2d.
        bias: As nn.Conv2d; the constant coefficient makes it redundant.
        padding_mode: As nn.Conv2d.
        device: As nn.Conv2d.
        dtype: As nn.Conv2d.

    Raises:
        ValueError: For arguments that do not fit, or a patch of more than 10 features.

    Source: Schuld, Sweke & Meyer, Phys. Rev. A 103, 032430 (2021).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Pair,
        stride: int | Pair = 1,
        padding: int | Pair | str = 0,
        dilation: int | Pair = 1,
        groups: int = 1,
        bias: bool = False,
        padding_mode: str = "zeros",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode)
        if self.features > MAX_WIRES:
            raise ValueError(
                f"a patch has {self.features} features but 3^n coefficients are kept for at most {MAX_WIRES}: use a "
                "smaller kernel_size or more groups"
            )
        self.weight = nn.Parameter(torch.empty(out_channels, 3**self.features, device=device, dtype=dtype))
        self._make_bias(bias, self.weight)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw coefficients from N(0, 2^-n / 4), which gives outputs a standard deviation of about 1/2."""
        with torch.no_grad():
            self.weight.normal_(0, 0.5 * 2 ** (-self.features / 2))
            if self.bias is not None:
                self.bias.zero_()

    def evaluate(self, patches: Tensor, weights: Tensor) -> Tensor:
        """See PatchConv2d."""
        angles = patches.t() * pi
        features = torch.stack([torch.ones_like(angles), torch.sin(angles), torch.cos(angles)], dim=1)
        coefficients = weights.reshape(len(weights), *(3,) * self.features)
        return contract(coefficients, list(features)).t()

    def counts(self, input_shape: tuple[int, ...]) -> Counter[str]:
        """Operations of one inference.

        Args:
            input_shape: (channels, height, width).
        """
        patches, total = self._shape_counts(input_shape)
        a_patch = polynomial_counts(self.out_channels // self.groups, [3] * self.features, self.features)
        total += scaled(a_patch, patches * self.groups)
        total["weight_bits"] = 32 * total["params"]
        return total
