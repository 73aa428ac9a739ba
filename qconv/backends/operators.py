"""Compiled convolutions as torch operators: forward and backward are registered with torch.library.

So autograd, torch.compile and export see one operator. Outside torch.compile a shorter way is taken, and where torch
wants to look inside (second derivatives, functorch, tracing) the same function in torch operations.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import warnings
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from qconv.backends.protocol import Plain
from qconv.patches import Geometry, pad


@cache
def fast_installed() -> bool:
    """Whether the `fast` extra is here and works; asked when a circuit is compiled, not on import."""
    if any(importlib.util.find_spec(name) is None for name in ("llvmlite", "platformdirs")):
        return False
    try:
        importlib.import_module("qconv.backends.tasks").machine()
    except Exception as error:  # a library of machine code fails in many ways
        warnings.warn(
            f"llvmlite is installed but fails ({error}): qconv runs in torch operations instead", stacklevel=2
        )
        return False
    return True


def watched(*tensors: Tensor) -> bool:
    """Whether something wants to see torch operations: forward derivatives, a mode that traces, tensors of others."""
    modes = forward_ad._current_level >= 0 or torch._C._len_torch_dispatch_stack() > 0
    return (
        modes
        or torch._C._get_tracing_state() is not None
        or any(type(tensor) not in (Tensor, Parameter) for tensor in tensors)
    )


class Convolution(Protocol):
    """A circuit on a fixed geometry, compiled."""

    def output_shape(self, images: Tensor) -> tuple[int, int, int, int]:
        """Shape of the result for padded images (B, C, H, W)."""

    def forward(self, images: Tensor, weights: Tensor) -> Tensor:
        """Padded images (B, C, H, W), weights (filters, n_weights) -> (B, groups * outs, H', W')."""

    def backward(
        self, grad: Tensor, images: Tensor, weights: Tensor, wanted: tuple[bool, bool] = (True, True)
    ) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of images and weights, None for what is not wanted."""


# (taps, stride, groups, outs) -> convolution. taps: for every feature its channel within the group, row and column
# offset: (features, 3), flattened. outs: output channels a group.
Make = Callable[[tuple[int, ...], tuple[int, int], int, int], Convolution]
_MAKERS: dict[str, Make] = {}


def register(kind: str, text: str, prepare: Callable[[], Make | None]) -> str | None:
    """Key of a circuit, which operators carry, or None where there are no compiled loops for it.

    Args:
        kind: Of loops.
        text: What tells the circuit from all others: its text and its noise.
        prepare: Gives what makes its convolutions, or None; called once a circuit.
    """
    if not fast_installed():
        return None
    key = f"{kind}:{hashlib.sha256(text.encode()).hexdigest()}"
    if key not in _MAKERS:
        make = prepare()
        if make is None:
            return None
        _MAKERS[key] = make
    return key


@lru_cache(maxsize=256)
def convolution(key: str, taps: tuple[int, ...], stride: tuple[int, int], groups: int, outs: int) -> Convolution:
    """The convolution of a registered circuit on a geometry."""
    return _MAKERS[key](taps, stride, groups, outs)


def feature_taps(geometry: Geometry, channels: int) -> list[int]:
    """Where each feature of a patch lies: (channel, row, column) one after the other."""
    (height, width), (down, across) = geometry.kernel_size, geometry.dilation
    return [n for c in range(channels) for i in range(height) for j in range(width) for n in (c, i * down, j * across)]


@lru_cache(maxsize=256)
def _planned(key: str, geometry: Geometry, channels: int, groups: int, outs: int) -> Convolution:
    """The convolution of a registered circuit, with groups of so many channels."""
    return convolution(key, tuple(feature_taps(geometry, channels)), geometry.stride, groups, outs)


def many(grad: Tensor) -> bool:
    """Whether a gradient stands for several at once, or is not to be read."""
    if watched(grad) or torch._C._are_functorch_transforms_active():
        return True
    try:
        grad.data_ptr()
    except RuntimeError:
        return True
    return False


def through_plain(plain: Plain, tensors: tuple[Tensor, Tensor], grad: Tensor) -> list[Tensor | None]:
    """Gradients by torch's own operations: where they are differentiated again, or come many at once."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        wanted = [t for t in tensors if t.requires_grad]
        found = torch.autograd.grad(plain(*tensors), wanted, grad, create_graph=again, materialize_grads=True)
    gradients = iter(found)
    return [next(gradients) if t.requires_grad else None for t in tensors]


class Eager(torch.autograd.Function):
    """The loops outside torch.compile: the dispatcher's bookkeeping would cost more than the loops."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, weights: Tensor, kernel: Convolution, plain: Plain) -> Tensor:
        """See Convolution.forward."""
        ctx.save_for_backward(images, weights)
        ctx.kernel, ctx.plain = kernel, plain
        return kernel.forward(images, weights)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """See Convolution.backward; a second derivative is taken through the plain torch path."""
        images, weights = ctx.saved_tensors
        if torch.is_grad_enabled() or many(grad):
            return *through_plain(ctx.plain, (images, weights), grad), None, None
        return (*ctx.kernel.backward(grad, images, weights, ctx.needs_input_grad[:2]), None, None)


def _check(images: Tensor, weights: Tensor, groups: int) -> None:
    """Operators can be called by their names: what would be read beyond an array's end must not get through."""
    if groups < 1 or images.shape[1] % groups or len(weights) % groups or not len(weights):
        raise ValueError(f"{groups} groups do not divide {images.shape[1]} channels and {len(weights)} filters")


# torch.compile and export see operators that they need not look into.
@torch.library.custom_op("qconv::convolution", mutates_args=())
def circuit_convolution(
    images: Tensor, weights: Tensor, key: str, taps: list[int], stride: list[int], groups: int, outs: int
) -> Tensor:
    """See Convolution.forward."""
    _check(images, weights, groups)
    return convolution(key, tuple(taps), (stride[0], stride[1]), groups, outs).forward(images, weights)


@circuit_convolution.register_fake
def _(images: Tensor, weights: Tensor, key: str, taps: list[int], stride: list[int], groups: int, outs: int) -> Tensor:
    return images.new_empty(convolution(key, tuple(taps), (stride[0], stride[1]), groups, outs).output_shape(images))


@torch.library.custom_op("qconv::convolution_backward", mutates_args=())
def circuit_convolution_backward(
    grad: Tensor, images: Tensor, weights: Tensor, key: str, taps: list[int], stride: list[int], groups: int, outs: int
) -> tuple[Tensor, Tensor]:
    """See Convolution.backward."""
    _check(images, weights, groups)
    kernel = convolution(key, tuple(taps), (stride[0], stride[1]), groups, outs)
    return cast(tuple[Tensor, Tensor], kernel.backward(grad, images, weights))


@circuit_convolution_backward.register_fake
def _(
    grad: Tensor, images: Tensor, weights: Tensor, key: str, taps: list[int], stride: list[int], groups: int, outs: int
) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(images, memory_format=torch.contiguous_format),
        torch.empty_like(weights, memory_format=torch.contiguous_format),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    images, weights, *ctx.plan = inputs
    ctx.save_for_backward(images, weights)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return (*circuit_convolution_backward(grad, *ctx.saved_tensors, *ctx.plan), None, None, None, None, None)


circuit_convolution.register_autograd(_backward, setup_context=_setup)


def apply(
    key: str | None, padded: Tensor, weights: Tensor, geometry: Geometry, groups: int, outs: int, plain: Plain
) -> Tensor | None:
    """Convolve by compiled loops, or None where they do not apply.

    Args:
        key: Of a registered circuit; None for none.
        padded: Images (B, C, H, W), padded.
        weights: (filters, n_weights).
        geometry: How the kernel moves.
        groups: Groups of channels.
        outs: Output channels a group.
        plain: The same function of (padded images, weights) in torch operations, for second derivatives.
    """
    # is_cpu before the rest: this path is taken tens of thousands of times a second.
    if key is None or not padded.is_cpu or torch._C._are_functorch_transforms_active():
        return None
    channels = padded.shape[1] // groups
    if torch.compiler.is_compiling():
        plan = (key, feature_taps(geometry, channels), list(geometry.stride), groups, outs)
        return cast(Tensor, circuit_convolution(padded, weights, *plan))
    if watched(padded, weights):
        return None
    kernel = _planned(key, geometry, channels, groups, outs)
    if torch.is_grad_enabled() and (padded.requires_grad or weights.requires_grad):
        result: Tensor = Eager.apply(padded, weights, kernel, plain)  # type: ignore[no-untyped-call]
        return result
    return kernel.forward(padded, weights)


def convolve(
    key: str | None, images: Tensor, weights: Tensor, geometry: Geometry, groups: int, outs: int, plain: Plain
) -> Tensor | None:
    """The same for images that are not padded yet; see apply."""
    if key is None or not images.is_cpu:
        return None
    return apply(key, pad(images, geometry), weights, geometry, groups, outs, plain)
