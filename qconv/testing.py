"""The conformance suite: what every convolution layer and every backend must pass. Run it on yours.

Each check raises an AssertionError that says what was expected and by how much it was missed. The faults it looks for
were all found in published code: patches that share state, a batch axis that is flipped, one axis unfolded only,
weights that are not shared.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import torch
from torch import Tensor, nn

from circuits.circuit import Angle, Circuit, Gate
from circuits.kernels import kernel
from qconv.backends.protocol import Backend
from qconv.backends.statevector import StatevectorBackend
from qconv.conformance import CHECKS, Conformance, Finding, backend_conformance
from qconv.gradients import compile_differentiable

__all__ = [
    "CHECKS",
    "Conformance",
    "Finding",
    "backend_conformance",
    "check_backend",
    "check_determinism",
    "check_layer",
    "check_sample_independence",
    "check_shift_equivariance",
    "check_weight_sharing",
]


def _images(channels: int, height: int, width: int, batch: int, seed: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, channels, height, width, generator=generator, dtype=torch.float64).to(dtype)


def _close(actual: Tensor, expected: Tensor, atol: float, what: str) -> None:
    if actual.shape != expected.shape:
        raise AssertionError(f"{what}: shape {tuple(actual.shape)} instead of {tuple(expected.shape)}")
    worst = float((actual - expected).abs().max()) if actual.numel() else 0.0
    if not worst <= atol:
        raise AssertionError(f"{what}: values differ by up to {worst:.3g}, more than {atol:.3g}")


def check_shift_equivariance(layer: nn.Module, images: Tensor, stride: tuple[int, int], atol: float) -> None:
    """An image moved by one stride gives an output moved by one pixel, along each axis.

    Args:
        layer: A convolution without padding.
        images: (B, C, H, W).
        stride: The layer's stride.
        atol: Largest difference allowed.
    """
    with torch.no_grad():
        full = layer(images)
        for axis, step in zip((-2, -1), stride, strict=True):
            shifted = layer(images.narrow(axis, step, images.shape[axis] - step))
            rows = full.shape[axis] - 1
            _close(
                shifted.narrow(axis, 0, rows),
                full.narrow(axis, 1, rows),
                atol,
                f"shift equivariance along axis {axis} at stride {step} (is the layer padded, or of another stride?)",
            )


def check_sample_independence(layer: nn.Module, images: Tensor, atol: float) -> None:
    """Each image's output is the same alone, in a batch, and in a batch of another order."""
    with torch.no_grad():
        together = layer(images)
        for k, image in enumerate(images):
            _close(layer(image[None])[0], together[k], atol, f"image {k} alone against in the batch")
        _close(layer(images.flip(0)).flip(0), together, atol, "batch in reverse order")


def check_weight_sharing(layer: nn.Module, images: Tensor, atol: float) -> None:
    """Equal patches give equal outputs wherever they stand: an image of one value has one output a channel."""
    with torch.no_grad():
        flat = images[:1, :, :1, :1].expand(1, -1, *images.shape[-2:])
        output = layer(flat)
        _close(output, output[..., :1, :1].expand_as(output), atol, "weight sharing on a constant image")


def check_determinism(layer: nn.Module, images: Tensor) -> None:
    """Two fresh copies of a layer give the same output bit for bit, shots included if the layer has a seed."""
    with torch.no_grad():
        _close(deepcopy(layer)(images), deepcopy(layer)(images), 0.0, "two copies of the layer")


def check_layer(
    layer: nn.Module,
    in_channels: int,
    *,
    size: int = 9,
    stride: tuple[int, int] = (1, 1),
    atol: float = 1e-5,
    seed: int = 0,
) -> None:
    """Run every check on one layer. It must have no padding, a `stride` as given here, and a seed if it has shots.

    It is checked in eval mode, where nothing may be random and no sample may depend on its batch, and left in its own.

    Args:
        layer: Maps (B, in_channels, H, W) to (B, out_channels, H', W').
        in_channels: Channels of its images.
        size: Height of the images, at least the kernel's reach plus a stride; the width is one stride more.
        stride: The layer's stride.
        atol: Largest difference allowed; for a layer with shots, several standard errors (6 / sqrt(shots) and more).
            Shots need a seed of the layer's besides, since two copies of it must agree.
        seed: Draws the images.
    """
    dtype = next((p.dtype for p in layer.parameters()), torch.get_default_dtype())
    images = _images(in_channels, size, size + stride[1], 3, seed, dtype)
    modes = [(module, module.training) for module in layer.modules()]
    try:
        layer.eval()
        check_determinism(layer, images)
        check_shift_equivariance(layer, images, stride, atol)
        check_sample_independence(layer, images, atol)
        check_weight_sharing(layer, images, atol)
    finally:
        # One by one: a frozen part of a layer in train mode is in eval mode.
        for module, training in modes:
            module.training = training


def _cases() -> dict[str, Circuit]:
    mixed = ["ZII", "IXZ", "YYX"]
    reupload = kernel("heisenberg", 3, 1, readout=mixed)
    return {
        "heisenberg": kernel("heisenberg", 3, readout=mixed),
        "strongly_entangling": kernel("strongly_entangling", 3),
        "random": kernel("random", 3, readout=mixed, seed=1),
        "one wire": kernel("basic_entangler", 1, readout=["X", "Y", "Z"]),
        "re-uploading": reupload + reupload.shift_weights(reupload.n_weights),
        "amplitude": kernel("basic_entangler", 2, encoding="amplitude"),
        "wires encoded almost alike": Circuit(
            2,
            (
                Gate("Rot", (0,), (Angle("const", 0, 1.0, 0.3), Angle("input", 0), Angle("const", 0, 1.0, 0.2))),
                Gate("Rot", (1,), (Angle("input", 1), Angle("input", 1), Angle("input", 1))),
                Gate("CRX", (0, 1), (Angle("weight", 0),)),
            ),
            ("ZI", "XY"),
        ),
        "controlled rotations, shared and scaled weights": Circuit(
            2,
            (
                Gate("RX", (0,), (Angle("input", 0, 1.5, 0.2),)),
                Gate("RY", (1,), (Angle("input", 1, -0.7),)),
                Gate("CRY", (0, 1), (Angle("weight", 0, 2.0),)),
                Gate("CP", (1, 0), (Angle("weight", 1, 1.0, -0.4),)),
                Gate("SX", (0,)),
                Gate("CRX", (1, 0), (Angle("weight", 0, -1.0),)),
                Gate("U3", (1,), (Angle("weight", 2), Angle("weight", 1), Angle("const", 0, 1.0, 0.3))),
            ),
            ("ZI", "XY"),
        ),
    }


def check_backend(
    backend: Backend,
    *,
    dtype: torch.dtype = torch.float64,
    atol: float = 1e-6,
    may_refuse: Callable[[str], bool] | None = None,
) -> list[str]:
    """Compare a backend with exact state vectors: values, and gradients for inputs and weights.

    Args:
        backend: The backend to check.
        dtype: torch.float32 or torch.float64.
        atol: Largest difference allowed, relative to the largest value where that is above 1.
        may_refuse: Tells for a case's name whether the backend may raise ValueError; by default it may not.

    Returns:
        Names of the cases that ran.
    """
    ran = []
    generator = torch.Generator().manual_seed(0)
    for name, circuit in _cases().items():
        inputs = torch.rand(5, circuit.n_inputs, generator=generator, dtype=torch.float64).to(dtype)
        weights = torch.randn(2, circuit.n_weights, generator=generator, dtype=torch.float64).to(dtype)
        try:
            actual = _value_and_gradients(backend, circuit, inputs, weights)
        except ValueError:
            if may_refuse is not None and may_refuse(name):
                continue
            raise
        expected = _value_and_gradients(StatevectorBackend(), circuit, inputs, weights)
        for what, a, e in zip(("values", "input gradient", "weight gradient"), actual, expected, strict=True):
            scale = max(1.0, float(e.abs().max()))
            _close(a, e, atol * scale, f"{backend.name} on {name}: {what}")
        ran.append(name)
    return ran


def _value_and_gradients(
    backend: Backend, circuit: Circuit, inputs: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    x, w = inputs.clone().requires_grad_(), weights.clone().requires_grad_()
    values = compile_differentiable(backend, circuit)(x, w)
    # Unequal weights of the outputs, so that errors do not cancel.
    factors = torch.linspace(0.5, 1.5, values.numel(), dtype=values.dtype).reshape(values.shape)
    gradients = torch.autograd.grad((values * factors).sum(), (x, w))
    return values.detach(), gradients[0], gradients[1]
