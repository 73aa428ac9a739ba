"""Contractions wire by wire on the CPU's compiled loops, as torch operators.

With the `fast` extra (llvmlite) a program of sums runs on blocks of patches that stay in cache, taken straight from the
images. The coefficients come from the weights by the same loops: what are patches there are filters here.
"""

from __future__ import annotations

import ctypes
from functools import cached_property, lru_cache, partial
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qconv.backends.operators import apply
from qconv.backends.operators import register as register_circuit
from qconv.backends.protocol import Plain
from qconv.backends.sums import Program
from qconv.backends.sweeps import Contraction
from qconv.backends.threads import run
from qconv.backends.train_code import Codes, Whole
from qconv.patches import Geometry

_GRAIN = 400_000  # terms worth a thread of their own, some microseconds
_MOST_PARTS = 32
_KEPT = 32  # weights whose coefficients are kept: groups of a layer have some each


class Loops:
    """A program on a fixed geometry: the arrays that its loops want, made once.

    Args:
        program: What to evaluate for every patch.
        codes: The same for the loops.
        taps: For every input its channel within the group, row and column offset: (inputs, 3).
        stride: (vertical, horizontal).
        groups: Groups of channels.
        outs: Output channels a group, of the program's outputs for each filter in turn.
    """

    def __init__(
        self, program: Program, codes: Codes, taps: Whole, stride: tuple[int, int], groups: int, outs: int
    ) -> None:
        from qconv.backends import train_loops

        self._loops = train_loops
        self._program, self._codes, self._stride, self._groups, self._outs = program, codes, stride, groups, outs
        self._taps = np.ascontiguousarray(taps, dtype=np.int64)
        self._reach = tuple(int(k) for k in self._taps[:, 1:].max(axis=0, initial=0))
        waves = np.array(program.waves, dtype=np.float64).reshape(-1, 3)
        self._inputs = waves[:, 0].astype(np.int64)
        turns = waves[:, 1:] / np.pi
        self._turns: dict[torch.dtype, NDArray[Any]] = {torch.float32: turns.astype(np.float32), torch.float64: turns}
        self._terms = sum(len(terms) + 1 for terms in program.sums)
        self._template = lru_cache(maxsize=16)(self._new_template)

    def output_shape(self, images: Tensor) -> tuple[int, int, int, int]:
        """Shape of the result for padded images (B, C, H, W)."""
        height = (images.shape[2] - 1 - self._reach[0]) // self._stride[0] + 1
        width = (images.shape[3] - 1 - self._reach[1]) // self._stride[1] + 1
        return images.shape[0], self._groups * self._outs, height, width

    def _new_template(
        self, images: torch.Size, out: torch.Size, dtype: torch.dtype, filters: int, backward: bool
    ) -> ctypes.Array[ctypes.c_int64]:
        """What the loops are told that does not change from call to call."""
        loops, codes, program = self._loops, self._codes, self._program
        code, back = codes.keep if backward else codes.evaluate, codes.pull_back
        (batch, channels, height, width), (_, outs, rows, columns) = images, out
        data = np.zeros(loops.LENGTH + len(self._taps), dtype=np.int64)
        data[loops.PATCHES], data[loops.PLANE] = batch * rows * columns, rows * columns
        data[loops.INPUTS], data[loops.LENGTH :] = len(self._taps), self._taps @ np.array([height * width, width, 1])
        data[loops.IMAGE], data[loops.GROUP] = channels * height * width, channels // self._groups * height * width
        data[loops.DOWN], data[loops.ACROSS] = self._stride[0] * width, self._stride[1]
        data[loops.OUT_IMAGE], data[loops.OUT_GROUP] = outs * rows * columns, self._outs * rows * columns
        data[[loops.ROWS, loops.COLUMNS]] = rows, columns
        data[[loops.GROUPS, loops.OUTS, loops.FILTERS]] = self._groups, self._outs, filters // self._groups
        data[loops.NUMBERS] = program.coefficients
        data[loops.WAVES], data[loops.WAVE_INPUTS] = len(self._inputs), self._inputs.ctypes.data
        data[loops.TURNS] = self._turns[dtype].ctypes.data
        data[loops.CODE], data[loops.SUMS] = code.numbers.ctypes.data, len(program.sums)
        data[loops.RESULTS], data[loops.RESULT_SLOTS] = len(code.results), code.results.ctypes.data
        data[loops.BACK_CODE] = back.numbers.ctypes.data
        data[loops.SLOPE_SLOTS] = back.results.ctypes.data
        bits = 32 if dtype == torch.float32 else 64
        block, lanes = loops.block(bits, backward), loops.BYTES * 8 // bits
        data[loops.TABLE] = block * len(self._taps)
        data[loops.SLOPES] = data[loops.TABLE] + block * code.slots
        data[loops.KEPT] = data[loops.SLOPES] + (block * back.slots if backward else 0)
        data[loops.END] = data[loops.KEPT] + (lanes * filters * program.coefficients if backward else 0)
        data[loops.ROOM] = -(-data[loops.END] // lanes) * loops.BYTES
        # Patches of one image may share pixels, whose gradients no two parts may add to.
        alone = not (backward and any(self._reach))
        data[loops.UNIT] = block if alone else rows * columns
        data[loops.UNITS] = -(-data[loops.PATCHES] // data[loops.UNIT])
        # As many parts on any number of threads: their sums are added in one order and results repeat bit for bit.
        work = data[loops.PATCHES] * filters * self._terms * (3 if backward else 1)
        data[loops.PARTS] = min(data[loops.UNITS], 1 + work // _GRAIN, _MOST_PARTS)
        return (ctypes.c_int64 * len(data))(*data.tolist())

    def _data(self, images: Tensor, out: Tensor, coefficients: Tensor, backward: bool) -> Any:
        loops = self._loops
        template = self._template(images.shape, out.shape, images.dtype, len(coefficients), backward)
        data: ctypes.Array[ctypes.c_int64] = type(template).from_buffer_copy(template)
        data[loops.IMAGES], data[loops.OUT] = images.data_ptr(), out.data_ptr()
        data[loops.COEFFICIENTS] = coefficients.data_ptr()
        return data

    def forward(self, images: Tensor, coefficients: Tensor) -> Tensor:
        """Padded images (B, C, H, W), coefficients (filters, numbers) -> (B, groups * outs, H', W')."""
        out = images.new_empty(self.output_shape(images))
        if out.numel():
            data = self._data(images, out, coefficients, backward=False)
            run(self._loops.compiled_task(images.element_size() * 8, False), data, data[self._loops.PARTS])
        return out

    def backward(
        self, grad: Tensor, images: Tensor, coefficients: Tensor, wanted: tuple[bool, bool] = (True, True)
    ) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of images and coefficients, None for what is not wanted."""
        loops = self._loops
        to_images = torch.zeros_like(images) if wanted[0] else None
        if grad.numel() == 0:
            return to_images, torch.zeros_like(coefficients) if wanted[1] else None
        data = self._data(images, grad, coefficients, backward=True)
        parts = coefficients.new_empty(data[loops.PARTS], *coefficients.shape) if wanted[1] else None
        data[loops.TO_IMAGES] = 0 if to_images is None else to_images.data_ptr()
        data[loops.TO_COEFFICIENTS] = 0 if parts is None else parts.data_ptr()
        run(loops.compiled_task(images.element_size() * 8, True), data, data[loops.PARTS])
        return to_images, None if parts is None else parts.sum(0)


class Kernel:
    """A contraction registered under a key that operators carry: its coefficients from the weights.

    Args:
        contraction: The circuit's programs.
    """

    def __init__(self, contraction: Contraction) -> None:
        self.contraction = contraction
        self._constants = {
            dtype: torch.from_numpy(contraction.constants[None]).to(dtype) for dtype in (torch.float32, torch.float64)
        }
        self._kept: dict[tuple[object, ...], Tensor] = {}

    @cached_property
    def codes(self) -> Codes:
        """Of the patches' program."""
        return Codes.of(self.contraction.patches)

    @cached_property
    def _loops(self) -> Loops:
        # What are channels and pixels of an image elsewhere are weights and filters here.
        program = self.contraction.weights
        inputs = 1 + max((wave[0] for wave in program.waves), default=-1)
        taps = np.array([(k, 0, 0) for k in range(inputs)]).reshape(-1, 3)
        return Loops(program, Codes.of(program), taps, (1, 1), 1, len(program.outputs))

    def coefficients(self, weights: Tensor) -> Tensor:
        """(filters, n_weights) -> (filters, numbers), kept for the backward pass and for inference.

        Weights are found again by their values, so no way of changing them in place can make a result stale.
        """
        # The shape too: filters without weights have equal bytes.
        key = weights.numpy().tobytes(), weights.shape, weights.dtype
        found = self._kept.get(key)
        if found is None:
            values = self._loops.forward(_as_image(weights).contiguous(), self._constants[weights.dtype])
            found = values[0, :, 0].t().contiguous()
            # A new dictionary, so that other threads never see one change.
            self._kept = dict([*self._kept.items(), (key, found)][-_KEPT:])
        return found

    def to_weights(self, grad: Tensor, weights: Tensor) -> Tensor:
        """The gradient of weights from that of their coefficients."""
        columns, constants = _as_image(weights).contiguous(), self._constants[weights.dtype]
        result, _ = self._loops.backward(_as_image(grad).contiguous(), columns, constants, (True, False))
        # As the operator promises it.
        return cast(Tensor, result)[0, :, 0].t().contiguous()


def _as_image(rows: Tensor) -> Tensor:
    """Rows (P, n) as an image of one row, (1, n, 1, P)."""
    return rows.t()[None, :, None]


class Convolution:
    """A kernel on a fixed geometry; see Loops.

    Args:
        kernel: The circuit.
        taps: For every feature its channel within the group, row and column offset: (features, 3), flattened.
        stride: (vertical, horizontal).
        groups: Groups of channels.
        outs: Output channels a group.
    """

    def __init__(self, kernel: Kernel, taps: tuple[int, ...], stride: tuple[int, int], groups: int, outs: int) -> None:
        self._kernel = kernel
        program, places = kernel.contraction.patches, np.array(taps).reshape(-1, 3)
        self._loops = Loops(program, kernel.codes, places, stride, groups, outs)
        self.output_shape = self._loops.output_shape

    def forward(self, images: Tensor, weights: Tensor) -> Tensor:
        """Padded images (B, C, H, W), weights (filters, n_weights) -> (B, groups * outs, H', W')."""
        images, weights = images.detach().contiguous(), weights.detach().contiguous()
        return self._loops.forward(images, self._kernel.coefficients(weights))

    def backward(
        self, grad: Tensor, images: Tensor, weights: Tensor, wanted: tuple[bool, bool] = (True, True)
    ) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of images and weights, None for what is not wanted."""
        images, weights = images.detach().contiguous(), weights.detach().contiguous()
        coefficients = self._kernel.coefficients(weights)
        to_images, rest = self._loops.backward(grad.contiguous(), images, coefficients, wanted)
        return to_images, None if rest is None else self._kernel.to_weights(rest, weights)


def register(contraction: Contraction, text: str) -> str | None:
    """Key of a circuit's kernel, or None where the compiled loops do not apply.

    Args:
        contraction: The circuit's programs.
        text: What tells it from all others: its text and its noise.
    """
    return register_circuit("sums", text, lambda: partial(Convolution, Kernel(contraction)))


def evaluate(key: str | None, inputs: Tensor, weights: Tensor, observables: int, plain: Plain) -> Tensor | None:
    """Values (P, F, observables) of inputs (P, n_inputs) and weights (F, n_weights), or None; see apply."""
    filters = weights.shape[0]

    def rows(image: Tensor, weights: Tensor) -> Tensor:
        return _as_image(plain(image[0, :, 0].t(), weights).flatten(1))

    # An image of one row, whose channels are the features: patches come laid out feature by feature.
    values = apply(key, _as_image(inputs), weights, Geometry((1, 1)), 1, filters * observables, rows)
    return None if values is None else values[0, :, 0].t().reshape(inputs.shape[0], filters, observables)
