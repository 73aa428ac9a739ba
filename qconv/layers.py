"""Quantum convolution as a drop-in for nn.Conv2d."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from math import ceil, pi
from typing import Any

import torch
from torch import Tensor, nn

from circuits.ansatze import ANSATZE
from circuits.circuit import Circuit
from circuits.encodings import find_encoding
from circuits.interop import as_circuit, is_qasm3
from circuits.kernels import kernel as named_kernel
from circuits.naming import unknown
from circuits.noise import NoiseModel
from qconv.backends.auto import TYPICAL, AutoBackend, AutoCompiled
from qconv.backends.costs import Call
from qconv.backends.loading import load_backend
from qconv.backends.protocol import Backend, Compiled, Precomputed
from qconv.fourier_conv import FourierConv2d as FourierConv2d
from qconv.gradients import compile_differentiable
from qconv.patch_conv import PatchConv2d as PatchConv2d
from qconv.patches import Pair, pad
from qconv.surrogates import surrogate

CHANNELS = ("joint",)
_REMEMBERED = 15  # shapes of images
_ROUNDING = 1e-12  # coefficients lie in [-1, 1]; what double precision leaves of 0 is smaller


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
        kernel: A name of `circuits.kernel_names()`; or a Circuit, a PennyLane function f(inputs, weights), QNode or
            tape, a Qiskit QuantumCircuit or an OpenQASM 3 text, read by `circuits.as_circuit`, which says how features
            and weights are told apart.
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
        kernel: Any = "heisenberg",
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
        named = isinstance(kernel, str) and kernel in ANSATZE
        self._initial = ANSATZE[kernel].initial if named else "near_identity"
        self.shots, self.noise, self.seed = shots, noise, seed
        self._backend = load_backend(backend) if isinstance(backend, str) else backend
        self._reason = self._backend.name
        if isinstance(self._backend, AutoBackend):
            forced = self._backend.forced(self.circuit, shots, noise)
            self._backend, self._reason = forced or (self._backend, "")
        self._compiled: Compiled | None = None
        self._last_call: Call | None = None
        self._ways: dict[tuple[object, ...], tuple[Call, Compiled]] = {}
        # Compiled now, so that what a backend cannot run is said here and not in the first training step.
        self._compile()

        per_group = ceil(out_channels / groups / len(self.circuit.observables))
        weight = torch.empty(groups * per_group, self.circuit.n_weights, device=device, dtype=dtype)
        if weight.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"dtype is {weight.dtype}: a circuit needs torch.float32 or torch.float64")
        self.weight, self._weight_shape = nn.Parameter(weight), weight.shape
        self._make_bias(bias, weight)
        self.reset_parameters()

    def _read_kernel(
        self, kernel: Any, depth: int, encoding: str, readout: str | Sequence[str], seed: int | None
    ) -> Circuit:
        if isinstance(kernel, str) and not is_qasm3(kernel):
            wires = find_encoding(encoding).wires(self.features)
            circuit = named_kernel(kernel, wires, depth, encoding, readout, features=self.features, seed=seed or 0)
        else:
            circuit = as_circuit(kernel, self.features)
        if not circuit.observables:
            raise ValueError("kernel has 0 observables: add at least one with circuit.with_observables(('Z...',))")
        if circuit.n_inputs != self.features:
            height, width = self.geometry.kernel_size
            share = self.in_channels // self.groups
            raise ValueError(
                f"kernel has {circuit.n_wires} wires and takes {circuit.n_inputs} features but a {height}x{width} "
                f"patch of {share} channel{'s' if share > 1 else ''} gives {self.features}: change kernel_size "
                "or the kernel"
            )
        return circuit

    def _compile(self) -> Compiled:
        if self._compiled is None:
            self._compiled = compile_differentiable(
                self._backend, self.circuit, shots=self.shots, noise=self.noise, seed=self.seed
            )
        return self._compiled

    def __getstate__(self) -> dict[str, Any]:
        # The circuit is data; what a backend made of it is compiled again where the copy lives.
        return {**self.__dict__, "_compiled": None, "_ways": {}}

    @property
    def backend(self) -> str:
        """The backend that runs the kernel and, where "auto" chose it, why: for the last call, or a typical one."""
        compiled = self._compile()
        if isinstance(compiled, AutoCompiled):
            if self._last_call is not None:
                return compiled.reason(self._last_call)
            typical = compiled.reason(TYPICAL._replace(filters=len(self.weight) // self.groups))
            return f"{typical} (a typical call: there was none yet)"
        return self._reason

    def _way(self, images: Tensor) -> Compiled:
        """How padded or unpadded images of this shape are evaluated."""
        compiled = self._compile()
        if not isinstance(compiled, AutoCompiled):
            return compiled
        if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
            return compiled.pick(*TYPICAL)
        training = torch.is_grad_enabled() and (images.requires_grad or self.weight.requires_grad)
        # Looked up by shape first: a small layer takes some twenty microseconds in all.
        asked = images.shape, training, images.device
        if asked not in self._ways:
            height, width = self.geometry.output_size(images.shape[2], images.shape[3])
            filters = len(self.weight) // self.groups
            call = Call(images.shape[0] * height * width, filters, training, images.device.type, True)
            # Few, so that images of ever new sizes do not pile up.
            self._ways = dict([*list(self._ways.items())[-_REMEMBERED:], (asked, (call, compiled.pick(*call)))])
        self._last_call, way = self._ways[asked]
        return way

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
        """See PatchConv2d: images as a whole where the backend takes them, else patch by patch."""
        if self.weight.shape != self._weight_shape:
            raise ValueError(
                f"weight has shape {tuple(self.weight.shape)} but this layer has {self._weight_shape[0]} filters of "
                f"{self._weight_shape[1]} weights: change its values, not its shape"
            )
        way = self._way(images)

        def evaluate(patches: Tensor, weights: Tensor) -> Tensor:
            return way(patches, weights).flatten(1)

        def plain(padded: Tensor, weights: Tensor) -> Tensor:
            return self._over_patches(padded, weights, evaluate)

        # Not isinstance(way, Convolving): asking a protocol takes a sixth of a small layer's time.
        convolve: Callable[..., Tensor | None] | None = getattr(way, "convolve", None)
        if convolve is not None:
            outs = self.out_channels // self.groups
            result = convolve(images, self.weight, self.geometry, self.groups, outs, plain)
            if result is not None:
                return result
        return plain(pad(images, self.geometry), self.weight)

    def evaluate(self, patches: Tensor, weights: Tensor) -> Tensor:
        """See PatchConv2d: outputs ordered (filter, observable)."""
        return self._compile()(patches, weights).flatten(1)

    def to_classical(self) -> FourierConv2d:
        """The kernel with its weights frozen, as a trigonometric polynomial in plain torch operations.

        Its values are this layer's exact ones, noise included (shots are not drawn: `qconv.surrogate` measures). It
        needs no simulator, asks for no gradients, and goes through torch.export, torch.compile and ONNX export; its
        coefficients can be quantized with `.quantize("int8")`.

        Returns:
            The same geometry, outputs and bias; later changes of this layer do not reach it.

        Raises:
            Unsupported: For an amplitude encoding, which is no polynomial.
            ValueError: For more than 2^16 coefficients an output, or input scales without a common divisor.

        Source: Schreiber, Eisert & Meyer, Classical surrogates for quantum learning models (arXiv:2206.11740).
        """
        # In double precision, where what should be 0 can be told from what is small: a quantizer that reads signs must
        # not read those of rounding errors.
        exact = surrogate(self.circuit, self.weight.detach().to("cpu", torch.float64), noise=self.noise)
        coefficients = exact.coefficients.where(exact.coefficients.abs() > _ROUNDING, 0).to(self.weight)
        return FourierConv2d.frozen(
            exact.rows(coefficients, self.out_channels, self.groups),
            exact.spectrum,
            self.in_channels,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            self.bias,
            self.padding_mode,
        )

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
        if isinstance(compiled, AutoCompiled):
            compiled = compiled.pick(patches, filters, False, "cpu", True)
        stored = self.weight.numel()
        if isinstance(compiled, Precomputed):
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
