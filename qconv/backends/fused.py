"""The fused CPU kernel of small product-encoded circuits, as a torch operator.

With the `fast` extra (numba) a whole quantum convolution is two compiled loops: coefficients from the weights, then
the polynomial of a block of patches at a time, without a patch matrix in memory. Forward and
backward are registered with torch.library, so autograd, torch.compile and export see one operator.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import importlib.util
import math
import warnings
from collections.abc import Callable
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from qconv.backends.fused_program import Matrices, Program, wire_forms
from qconv.backends.threads import run
from qconv.patches import Geometry, pad

if TYPE_CHECKING:
    from qconv.backends.fourier import FourierCompiled

Plain = Callable[[Tensor, Tensor], Tensor]

# 3^6 coefficients of an output: beyond, the contraction is large enough for matrix products to win.
MAX_NUMBERS = 3**6
_GRAIN = 400_000  # multiplications worth a thread of their own, some microseconds
_MOST_PARTS = 16
_PIXELS = 8192  # worth a thread of their own


@cache
def numba_installed() -> bool:
    """Whether the `fast` extra is here and works; asked when a circuit is compiled, not on import."""
    if importlib.util.find_spec("numba") is None:
        return False
    try:
        importlib.import_module("qconv.backends.tasks")
    except Exception as error:  # numba refuses other libraries' versions by errors of several kinds
        warnings.warn(f"numba is installed but fails ({error}): qconv runs in torch operations instead", stacklevel=2)
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


_PROGRAMS: dict[str, Program] = {}


def register(compiled: FourierCompiled, text: str) -> str | None:
    """Key of the program of a compiled circuit, or None where the fused kernel does not apply.

    Args:
        compiled: The circuit.
        text: What tells it from all others: its text and its noise.
    """
    if not numba_installed() or 3**compiled.circuit.n_wires > MAX_NUMBERS:
        return None
    key = hashlib.sha256(text.encode()).hexdigest()
    if key not in _PROGRAMS:
        forms = wire_forms(compiled)
        if forms is None or forms[0].digits.shape[1] ** len(forms) > MAX_NUMBERS:
            return None
        _PROGRAMS[key] = Program(compiled, forms)
    return key


class Convolution:
    """A program on a fixed geometry: the arrays that its loops want, made once.

    Args:
        program: The circuit.
        taps: For every feature its channel within the group, row and column offset: (features, 3), flattened.
        stride: (vertical, horizontal).
        groups: Groups of channels.
        outs: Output channels a group.
    """

    def __init__(
        self, program: Program, taps: tuple[int, ...], stride: tuple[int, int], groups: int, outs: int
    ) -> None:
        # Kept, since even asking for a module takes half a microsecond, and a small layer takes twenty.
        from qconv.backends import patch_loops

        self._loops = patch_loops
        self.program, self.groups, self.outs, self._stride = program, groups, outs, stride
        places = np.array(taps, dtype=np.int64).reshape(-1, 3)
        self._reach = int(places[:, 1].max()), int(places[:, 2].max())
        self._taps = np.ascontiguousarray(places[list(program.inputs)])
        self._waves = {torch.float32: program.waves.astype(np.float32), torch.float64: program.waves}
        left = program.wires // 2
        self._plan = left, program.wires - left, program.angles
        self._template = lru_cache(maxsize=16)(self._new_template)

    def output_shape(self, images: Tensor) -> tuple[int, int, int, int]:
        """Shape of the result for padded images (B, C, H, W)."""
        height = (images.shape[2] - 1 - self._reach[0]) // self._stride[0] + 1
        width = (images.shape[3] - 1 - self._reach[1]) // self._stride[1] + 1
        return images.shape[0], self.groups * self.outs, height, width

    def _new_template(self, images: torch.Size, out: torch.Size, dtype: torch.dtype) -> ctypes.Array[ctypes.c_int64]:
        """What the loops are told that does not change from call to call."""
        loops = self._loops
        data = np.zeros(loops.LENGTH, dtype=np.int64)
        data[[loops.BATCH, loops.CHANNELS, loops.HEIGHT, loops.WIDTH]] = images
        data[[loops.ROWS, loops.COLUMNS]] = out[2:]
        data[[loops.DOWN, loops.ACROSS]] = self._stride
        data[loops.GROUPS], data[loops.OUTS] = self.groups, self.outs
        data[loops.TAPS], data[loops.WAVES] = self._taps.ctypes.data, self._waves[dtype].ctypes.data
        data[loops.PITCH] = out[3]
        if (
            self._stride == (1, 1)
            and out[3] >= loops.LANES // 2
            and (self.program.waves == self.program.waves[0]).all()
        ):
            # Patches share pixels: sine and cosine of each are computed once. Vectors may reach beyond the last one.
            data[loops.PITCH] = images[3]
            beyond = 3 * loops.LANES + self._reach[0] * images[3] + self._reach[1]
            data[loops.NUMBERS] = math.prod(images) + beyond
        # A part is a block here; the backward pass has parts of its own.
        rows, parts = loops.blocks(out[0], out[2], out[3], int(data[loops.PITCH]), bool(data[loops.NUMBERS]))
        data[loops.BLOCK_ROWS], data[loops.PARTS] = rows, parts
        return (ctypes.c_int64 * len(data))(*data.tolist())

    def _task_data(self, images: Tensor, out: Tensor, matrices: Matrices) -> Any:
        loops = self._loops
        template = self._template(images.shape, out.shape, images.dtype)
        data: ctypes.Array[ctypes.c_int64] = type(template).from_buffer_copy(template)
        data[loops.IMAGES], data[loops.OUT], data[loops.MATRICES] = images.data_ptr(), out.data_ptr(), matrices.address
        return data

    def _planes(self, images: Tensor, data: Any) -> Tensor | None:
        """Sine and cosine of every pixel where the loops want them; to be kept until these have run."""
        loops = self._loops
        if not data[loops.NUMBERS]:
            return None
        planes = images.new_empty(2, data[loops.NUMBERS])
        data[loops.PLANES] = planes.data_ptr()
        own = type(data).from_buffer_copy(data)
        own[loops.PARTS] = parts = 1 + images.numel() // _PIXELS
        run(loops.planes_task(images.element_size() * 8), own, parts)
        return planes

    def forward(self, images: Tensor, weights: Tensor) -> Tensor:
        """Padded images (B, C, H, W), weights (filters, n_weights) -> (B, groups * outs, H', W')."""
        loops = self._loops
        images = images.contiguous()
        out = images.new_empty(self.output_shape(images))
        if out.numel() == 0:
            return out
        matrices = self.program.matrices(_array(weights), self.groups, self.outs)
        data = self._task_data(images, out, matrices)
        planes = self._planes(images, data)
        threads = min(data[loops.PARTS], 1 + out.numel() * self.program.numbers // _GRAIN)
        run(loops.forward_task(*self._plan, out.element_size() * 8), data, threads)
        del planes
        return out

    def backward(
        self, grad: Tensor, images: Tensor, weights: Tensor, wanted: tuple[bool, bool] = (True, True)
    ) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of images and weights, None for what is not wanted."""
        loops = self._loops
        grad, images = grad.contiguous(), images.contiguous()
        to_images = torch.zeros_like(images) if wanted[0] else None
        if grad.numel() == 0:
            return to_images, torch.zeros_like(weights) if wanted[1] else None
        w = _array(weights)
        matrices = self.program.matrices(w, self.groups, self.outs)
        # As many parts on any number of threads: their sums are added in one order and results repeat bit for bit.
        parts = min(len(images), 1 + 3 * grad.numel() * self.program.numbers // _GRAIN, _MOST_PARTS)
        sums = np.zeros((parts, *matrices.values.shape), matrices.values.dtype) if wanted[1] else None
        data = self._task_data(images, grad, matrices)
        data[loops.PARTS] = parts
        data[loops.TO_IMAGES] = 0 if to_images is None else to_images.data_ptr()
        data[loops.TO_MATRICES] = 0 if sums is None else sums.ctypes.data
        planes = self._planes(images, data)
        run(loops.backward_task(*self._plan, grad.element_size() * 8), data, parts)
        del planes
        to_weights = None if sums is None else torch.from_numpy(self.program.weight_gradient(sums, w))
        return to_images, to_weights


def _array(tensor: Tensor) -> Any:
    return (tensor if tensor.is_contiguous() else tensor.contiguous()).detach().numpy()


@lru_cache(maxsize=256)
def convolution(key: str, taps: tuple[int, ...], stride: tuple[int, int], groups: int, outs: int) -> Convolution:
    """The convolution of a registered program on a geometry."""
    return Convolution(_PROGRAMS[key], taps, stride, groups, outs)


def feature_taps(geometry: Geometry, channels: int) -> list[int]:
    """Where each feature of a patch lies: (channel, row, column) one after the other."""
    (height, width), (down, across) = geometry.kernel_size, geometry.dilation
    return [n for c in range(channels) for i in range(height) for j in range(width) for n in (c, i * down, j * across)]


@lru_cache(maxsize=256)
def planned(key: str, geometry: Geometry, channels: int, groups: int, outs: int) -> Convolution:
    """The convolution of a registered program, with groups of so many channels."""
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
    """The kernel outside torch.compile: the dispatcher's bookkeeping would cost more than the loops."""

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


# torch.compile and export see operators that they need not look into.
@torch.library.custom_op("qconv::product_convolution", mutates_args=())
def product_convolution(
    images: Tensor, weights: Tensor, key: str, taps: list[int], stride: list[int], groups: int, outs: int
) -> Tensor:
    """See Convolution.forward."""
    return convolution(key, tuple(taps), (stride[0], stride[1]), groups, outs).forward(images, weights)


@product_convolution.register_fake
def _(images: Tensor, weights: Tensor, key: str, taps: list[int], stride: list[int], groups: int, outs: int) -> Tensor:
    return images.new_empty(convolution(key, tuple(taps), (stride[0], stride[1]), groups, outs).output_shape(images))


@torch.library.custom_op("qconv::product_convolution_backward", mutates_args=())
def product_convolution_backward(
    grad: Tensor, images: Tensor, weights: Tensor, key: str, taps: list[int], stride: list[int], groups: int, outs: int
) -> tuple[Tensor, Tensor]:
    """See Convolution.backward."""
    kernel = convolution(key, tuple(taps), (stride[0], stride[1]), groups, outs)
    return cast(tuple[Tensor, Tensor], kernel.backward(grad, images, weights))


@product_convolution_backward.register_fake
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
    return (*product_convolution_backward(grad, *ctx.saved_tensors, *ctx.plan), None, None, None, None, None)


product_convolution.register_autograd(_backward, setup_context=_setup)


def convolve(
    key: str | None, images: Tensor, weights: Tensor, geometry: Geometry, groups: int, outs: int, plain: Plain
) -> Tensor | None:
    """Convolve by the fused kernel, or None where it does not apply.

    Args:
        key: Of a registered program; None for none.
        images: (B, C, H, W), not padded.
        weights: (filters, n_weights).
        geometry: How the kernel moves.
        groups: Groups of channels.
        outs: Output channels a group.
        plain: The same function of (padded images, weights) in torch operations, for second derivatives.
    """
    # is_cpu before the rest: this path is taken tens of thousands of times a second.
    if key is None or not images.is_cpu or torch._C._are_functorch_transforms_active():
        return None
    padded = pad(images, geometry)
    channels = images.shape[1] // groups
    if torch.compiler.is_compiling():
        plan = (key, feature_taps(geometry, channels), list(geometry.stride), groups, outs)
        return cast(Tensor, product_convolution(padded, weights, *plan))
    if watched(padded, weights):
        return None
    kernel = planned(key, geometry, channels, groups, outs)
    if torch.is_grad_enabled() and (padded.requires_grad or weights.requires_grad):
        result: Tensor = Eager.apply(padded, weights, kernel, plain)  # type: ignore[no-untyped-call]
        return result
    return kernel.forward(padded, weights)
