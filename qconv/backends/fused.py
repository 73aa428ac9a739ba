"""The fused CPU kernel of small product-encoded circuits.

With the `fast` extra (llvmlite) a whole quantum convolution is two compiled loops: coefficients from the weights, then
the polynomial of a block of patches at a time, without a patch matrix in memory.
"""

from __future__ import annotations

import ctypes
import math
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from qconv.backends.fused_program import Matrices, Program, wire_forms
from qconv.backends.operators import Make
from qconv.backends.operators import register as register_circuit
from qconv.backends.threads import run

if TYPE_CHECKING:
    from qconv.backends.fourier import FourierCompiled

# 3^6 coefficients of an output: beyond, the contraction is large enough for matrix products to win.
MAX_NUMBERS = 3**6
_GRAIN = 400_000  # multiplications worth a thread of their own, some microseconds
_MOST_PARTS = 16
_PIXELS = 8192  # worth a thread of their own


def register(compiled: FourierCompiled, text: str) -> str | None:
    """Key of the program of a compiled circuit, or None where the fused kernel does not apply.

    Args:
        compiled: The circuit.
        text: What tells it from all others: its text and its noise.
    """

    def prepare() -> Make | None:
        forms = wire_forms(compiled)
        if forms is None or forms[0].digits.shape[1] ** len(forms) > MAX_NUMBERS:
            return None
        return partial(Convolution, Program(compiled, forms))

    return register_circuit("products", text, prepare) if 3**compiled.circuit.n_wires <= MAX_NUMBERS else None


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
        data[[loops.BLOCK_ROWS, loops.PARTS, loops.BLOCK_LENGTH]] = loops.blocks(
            out[0], out[2], out[3], int(data[loops.PITCH]), bool(data[loops.NUMBERS])
        )
        left, right, angles = self._plan
        rows = self.outs + (2 + angles) ** left + (2 + angles) ** right
        length = int(data[loops.BLOCK_LENGTH])
        data[loops.ROOM] = loops.room((left + right) * angles, rows, length, 8 * dtype.itemsize)
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
