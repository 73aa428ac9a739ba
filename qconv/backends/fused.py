"""The fused CPU kernel of small product-encoded circuits, as a torch operator.

With the `fast` extra (numba) a whole quantum convolution is two compiled loops: coefficients from the weights, then
the polynomial of a block of patches at a time, without a patch matrix in memory. Forward and
backward are registered with torch.library, so autograd, torch.compile and export see one operator.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from circuits.gates import pauli_matrix
from qconv.patches import Geometry, pad

if TYPE_CHECKING:
    from qconv.backends.fourier import FourierCompiled, PauliOp

Plain = Callable[[Tensor, Tensor], Tensor]

MAX_FUSED_WIRES = 5  # beyond, the contraction is large enough for matrix products to win
_CACHED_WEIGHTS = 8
_PARALLEL_FROM = 40_000_000  # multiplications below which a second thread costs more than it saves


@cache
def numba_installed() -> bool:
    """Whether the `fast` extra is here; numba itself is imported on first use."""
    return importlib.util.find_spec("numba") is not None


class Program:
    """A compiled circuit as arrays for the loops, registered under a key that operators carry.

    Args:
        compiled: A product-encoded circuit whose wires each read one feature by one rotation, all alike.
    """

    def __init__(self, compiled: FourierCompiled, wave: tuple[float, float], digits: np.ndarray[Any, Any]) -> None:
        circuit = compiled.circuit
        n = circuit.n_wires
        self.wires = n
        self.rows = len(circuit.observables)
        self.wave = np.array(wave) / np.pi
        self.start = np.zeros((4**n, self.rows))
        for k, observable in enumerate(circuit.observables):
            self.start[_index(observable), k] = 1
        self._read(compiled.block)
        # Each wire's Pauli digits as (1, sin, cos) of its angle; 4^n strings become 3^n coefficients.
        projection = np.eye(1)
        for _ in range(n):
            projection = np.kron(projection, digits)
        self.projection = projection
        # Usually each coefficient is one Pauli string's, up to a sign: then it is looked up.
        single = (np.count_nonzero(projection, axis=0) == 1).all()
        self._strings = np.abs(projection).argmax(axis=0) if single else None
        self._caches: OrderedDict[tuple[Any, ...], tuple[Any, Any, Any]] = OrderedDict()
        self._typed: dict[Any, Any] = {}
        self._lock = threading.Lock()

    def _read(self, block: list[PauliOp]) -> None:
        from qconv.backends.numba_kernels import DIGIT, PERMUTATION, ROTATION

        n, size = self.wires, 4**self.wires
        kinds, tables, angles = [], [], []
        pairs: list[Any] = []
        signs: list[Any] = []
        entries: list[list[tuple[int, int, float]]] = []
        known: dict[str, int] = {}
        for op in reversed(block):
            if op.pauli is not None and op.angle is not None:
                text = "".join(dict(zip(op.wires, op.pauli, strict=True)).get(wire, "I") for wire in range(n))
                if text not in known:
                    known[text] = len(pairs)
                    partner, sign = _rotation_table(text)
                    pairs.append(partner)
                    signs.append(sign)
                kinds.append(ROTATION)
                tables.append((known[text], op.angle.index if op.angle.source == "weight" else -1))
                angles.append((op.angle.scale, op.angle.offset))
                continue
            matrix = op.parts[0]
            permutes = np.allclose(np.abs(matrix) @ np.ones(len(matrix)), 1) and np.allclose(
                matrix @ matrix.T, np.eye(len(matrix))
            )
            permutes = permutes and np.allclose(np.abs(matrix), np.round(np.abs(matrix)))
            kinds.append(PERMUTATION if permutes else DIGIT)
            tables.append((len(entries), -1))
            angles.append((0.0, 0.0))
            entries.append(_digit_table(matrix, op.wires, n))
        longest = max((len(rows) for rows in entries), default=1)
        digits = np.full((max(1, len(entries)), longest, 3), -1.0)
        for k, rows in enumerate(entries):
            digits[k, : len(rows)] = rows
        self.ops = (
            np.array(kinds, dtype=np.int64),
            np.array(tables, dtype=np.int64).reshape(-1, 2),
            np.array(angles, dtype=np.float64).reshape(-1, 2),
            np.array(pairs, dtype=np.int64).reshape(-1, size // 4, 2),
            np.array(signs, dtype=np.float64).reshape(-1, size // 4),
            digits,
        )
        self.kept = sum(kind == DIGIT for kind in kinds)

    def coefficients(self, weights: np.ndarray[Any, Any]) -> tuple[Any, Any, Any]:
        """(coefficients (F, 3^n, O), evolved observables (F, 4^n, O), what the backward pass needs), cached by value.

        The cache compares the numbers themselves: no way of changing weights in place can make it stale.
        """
        # The shape too: a circuit without weights has equal bytes for any number of filters.
        key = (weights.tobytes(), weights.shape, weights.dtype)
        with self._lock:
            found = self._caches.get(key)
            if found is not None:
                self._caches.move_to_end(key)
                return found
        from qconv.backends.numba_kernels import coefficients_forward

        start, projection = self._as(weights.dtype)
        final = np.empty((len(weights), *start.shape), weights.dtype)
        kept = np.empty((len(weights), self.kept, *start.shape), weights.dtype)
        coefficients_forward(weights, start, *self.ops, final, kept)
        if self._strings is None:
            result = (projection.T @ final, final, kept)
        else:
            signs = projection[self._strings, np.arange(len(self._strings))]
            result = (final[:, self._strings] * signs[:, None], final, kept)
        with self._lock:
            self._caches[key] = result
            if len(self._caches) > _CACHED_WEIGHTS:
                self._caches.popitem(last=False)
        return result

    def weight_gradient(self, grad: np.ndarray[Any, Any], weights: np.ndarray[Any, Any]) -> Any:
        """Gradient (F, n_weights) from that of the coefficients (F, 3^n, O)."""
        from qconv.backends.numba_kernels import coefficients_backward

        _, final, kept = self.coefficients(weights)
        _, projection = self._as(weights.dtype)
        if self._strings is None:
            full = projection @ grad
        else:
            full = np.zeros_like(final)
            full[:, self._strings] = grad * projection[self._strings, np.arange(len(self._strings))][:, None]
        return coefficients_backward(full, weights, *self.ops, final.copy(), kept)

    def _as(self, dtype: Any) -> tuple[Any, Any]:
        if dtype not in self._typed:
            self._typed[dtype] = self.start.astype(dtype), self.projection.astype(dtype)
        return self._typed[dtype]  # type: ignore[no-any-return]


def _index(pauli: str) -> int:
    index = 0
    for letter in pauli:
        index = 4 * index + "IXYZ".index(letter)
    return index


@cache
def _product_table() -> tuple[Any, Any]:
    """(digit of A B, phase of A B) for one-wire Paulis."""
    digit, phase = np.zeros((4, 4), dtype=np.int64), np.zeros((4, 4), dtype=complex)
    for a, first in enumerate("IXYZ"):
        for b, second in enumerate("IXYZ"):
            product = pauli_matrix(first) @ pauli_matrix(second)
            for c, third in enumerate("IXYZ"):
                overlap = np.trace(pauli_matrix(third) @ product) / 2
                if abs(overlap) > 0.5:
                    digit[a, b], phase[a, b] = c, overlap
    return digit, phase


@cache
def _rotation_table(pauli: str) -> tuple[Any, Any]:
    """Pairs (Q, Q') with i P Q = sign Q', each once, and the signs: a rotation about P mixes just these."""
    digit, phase = _product_table()
    n = len(pauli)
    strings = np.stack(np.unravel_index(np.arange(4**n), (4,) * n), axis=1)
    letters = np.array(["IXYZ".index(letter) for letter in pauli])
    partner = digit[letters, strings] @ (4 ** np.arange(n)[::-1])
    factor = 1j * phase[letters, strings].prod(axis=1)
    first = np.flatnonzero((np.abs(factor.imag) < 0.5) & (np.arange(4**n) < partner))
    return np.stack([first, partner[first]], axis=1), factor.real[first]


def _digit_table(matrix: Any, wires: tuple[int, ...], n: int) -> list[tuple[int, int, float]]:
    """Entries (target, source, factor) of new[target] = sum factor old[source] for a row vector times a matrix."""
    strings = np.stack(np.unravel_index(np.arange(4**n), (4,) * n), axis=1)
    powers = 4 ** np.arange(n)[::-1]
    local = strings[:, list(wires)] @ (4 ** np.arange(len(wires))[::-1])
    base = np.arange(4**n) - strings[:, list(wires)] @ powers[list(wires)]
    offsets = np.stack(np.unravel_index(np.arange(4 ** len(wires)), (4,) * len(wires)), axis=1) @ powers[list(wires)]
    table = []
    for i, j in zip(*np.nonzero(np.abs(matrix) > 1e-14), strict=True):
        for source in np.flatnonzero(local == i):
            table.append((int(base[source] + offsets[j]), int(source), float(matrix[i, j])))
    return sorted(table)


def single_rotation(compiled: FourierCompiled) -> tuple[tuple[float, float], Any] | None:
    """((scale, offset), digits (4, 3)) if every wire reads its own feature by one rotation, all alike; else None.

    The Bloch vector (1, X, Y, Z) of each wire is digits @ (1, sin, cos) of scale * feature + offset.
    """
    features = compiled.features
    kinds = set()
    for wire, ops in enumerate(features.encoders):
        reading = [op for op in ops if op.angle is not None]
        if len(reading) != 1 or reading[0].angle is None or reading[0].angle.source != "input":
            return None
        angle = reading[0].angle
        if angle.index != wire:
            return None
        kinds.add((angle.scale, angle.offset, tuple(op.form() for op in ops)))
    if len(kinds) != 1:
        return None
    ((scale, offset, _),) = kinds
    ops = features.encoders[0]
    samples = np.linspace(-3, 3, 16)
    grid = np.array([[a if op.angle is not None else 0.0 for op in ops] for a in samples])
    waves = np.stack([np.ones(16), np.sin(samples), np.cos(samples)], axis=1)
    digits = np.linalg.lstsq(waves, features.bloch(ops, grid), rcond=None)[0].T
    return (scale, offset), np.where(np.abs(digits) < 1e-12, 0.0, digits)


_PROGRAMS: dict[str, Program] = {}


def register(compiled: FourierCompiled, text: str) -> str | None:
    """Key of the program of a compiled circuit, or None where the fused kernel does not apply.

    Args:
        compiled: The circuit.
        text: What tells it from all others: its text and its noise.
    """
    if not numba_installed() or compiled.circuit.n_wires > MAX_FUSED_WIRES:
        return None
    key = hashlib.sha256(text.encode()).hexdigest()
    if key not in _PROGRAMS:
        form = single_rotation(compiled)
        if form is None:
            return None
        _PROGRAMS[key] = Program(compiled, *form)
    return key


@cache
def _pool(process: int) -> ThreadPoolExecutor:
    # One pool a process: threads do not survive a fork, so a forked worker makes its own.
    return ThreadPoolExecutor(max_workers=max(1, (os.cpu_count() or 2) - 1), thread_name_prefix="qconv")


def _parts(images: int, work: int) -> int:
    """Threads for so many images and multiplications."""
    return max(1, min(images, torch.get_num_threads())) if work > _PARALLEL_FROM else 1


def _share(task: Callable[[int, int, int], None], images: int, work: int) -> None:
    """Run task(part, first, last) over ranges of images, one a thread, this thread included."""
    parts = _parts(images, work)
    bounds = [images * k // parts for k in range(parts + 1)]
    waiting = [_pool(os.getpid()).submit(task, k, bounds[k], bounds[k + 1]) for k in range(1, parts)]
    task(0, bounds[0], bounds[1])
    for future in waiting:
        future.result()


class Convolution:
    """A program on a fixed geometry: the arrays that its loops want, made once.

    Args:
        program: The circuit.
        taps: For every wire its channel within the group, row and column offset: (wires, 3), flattened.
        stride: (vertical, horizontal).
        groups: Groups of channels.
        outs: Output channels a group.
    """

    def __init__(
        self, program: Program, taps: tuple[int, ...], stride: tuple[int, int], groups: int, outs: int
    ) -> None:
        self.program, self.groups, self.outs = program, groups, outs
        self._taps = np.array(taps).reshape(-1, 3)
        self._stride = np.array(stride)
        self._reach = (int(self._taps[:, 1].max()), int(self._taps[:, 2].max()))
        self._left = program.wires // 2

    def output_shape(self, images: Tensor) -> tuple[int, int, int, int]:
        """Shape of the result for padded images (B, C, H, W)."""
        height = (images.shape[2] - 1 - self._reach[0]) // int(self._stride[0]) + 1
        width = (images.shape[3] - 1 - self._reach[1]) // int(self._stride[1]) + 1
        return images.shape[0], self.groups * self.outs, height, width

    def forward(self, images: Tensor, weights: Tensor) -> Tensor:
        """Padded images (B, C, H, W), weights (filters, n_weights) -> (B, groups * outs, H', W')."""
        x, w = _array(images), _array(weights)
        coefficients = self._arranged(self.program.coefficients(w)[0])
        out = torch.empty(self.output_shape(images), dtype=images.dtype)
        loop, _ = self._loops()
        target = out.numpy()

        def part(_: int, first: int, last: int) -> None:
            loop(x, coefficients, self._taps, self.program.wave, self._stride, target, first, last)

        _share(part, len(x), target.size * coefficients[0, 0].size)
        return out

    def backward(self, grad: Tensor, images: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of images and weights."""
        g, x, w = _array(grad), _array(images), _array(weights)
        full = self.program.coefficients(w)[0]
        coefficients = self._arranged(full)
        _, loop = self._loops()
        target = np.zeros_like(x)
        work = 3 * g.size * coefficients[0, 0].size
        sums = np.zeros((_parts(len(x), work), *coefficients.shape), coefficients.dtype)

        def part(k: int, first: int, last: int) -> None:
            loop(g, x, coefficients, self._taps, self.program.wave, self._stride, target, sums[k], first, last)

        _share(part, len(x), work)
        # The threads' parts are added in a fixed order, so that results repeat bit for bit.
        filters, numbers, rows = full.shape
        kept = np.zeros((self.groups, filters // self.groups * rows, numbers), full.dtype)
        kept[:, : self.outs] = sums.sum(axis=0).reshape(self.groups, self.outs, numbers)
        by_filter = kept.reshape(filters, rows, numbers).transpose(0, 2, 1)
        return torch.from_numpy(target), torch.from_numpy(self.program.weight_gradient(by_filter, w))

    def _arranged(self, full: Any) -> Any:
        """(F, 3^n, O) -> (G, outs, left, right), surplus outputs dropped."""
        rows = full.transpose(0, 2, 1).reshape(self.groups, -1, full.shape[1])[:, : self.outs]
        return np.ascontiguousarray(rows.reshape(self.groups, self.outs, 3**self._left, -1))

    def _loops(self) -> tuple[Callable[..., None], Callable[..., None]]:
        from qconv.backends.numba_kernels import patch_kernels

        return patch_kernels(self._left, self.program.wires - self._left)


def _array(tensor: Tensor) -> Any:
    return tensor.detach().contiguous().numpy()


@lru_cache(maxsize=256)
def convolution(key: str, taps: tuple[int, ...], stride: tuple[int, int], groups: int, outs: int) -> Convolution:
    """The convolution of a registered program on a geometry."""
    return Convolution(_PROGRAMS[key], taps, stride, groups, outs)


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
        if torch.is_grad_enabled():
            wanted = [t for t in (images, weights) if t.requires_grad]
            found = iter(torch.autograd.grad(ctx.plain(images, weights), wanted, grad, create_graph=True))
            return *(next(found) if t.requires_grad else None for t in (images, weights)), None, None
        return (*ctx.kernel.backward(grad, images, weights), None, None)


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
    return convolution(key, tuple(taps), (stride[0], stride[1]), groups, outs).backward(grad, images, weights)


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
    compiled: FourierCompiled, images: Tensor, weights: Tensor, geometry: Geometry, groups: int, outs: int, plain: Plain
) -> Tensor | None:
    """Convolve by the fused kernel, or None where it does not apply.

    Args:
        compiled: The circuit.
        images: (B, C, H, W), not padded.
        weights: (filters, n_weights).
        geometry: How the kernel moves.
        groups: Groups of channels.
        outs: Output channels a group.
        plain: The same function of (padded images, weights) in torch operations, for second derivatives.
    """
    if compiled.fused is None or images.device.type != "cpu" or torch._C._are_functorch_transforms_active():
        return None
    padded = pad(images, geometry)
    (height, width), (down, across) = geometry.kernel_size, geometry.dilation
    channels = range(images.shape[1] // groups)
    taps = [v for c in channels for i in range(height) for j in range(width) for v in (c, i * down, j * across)]
    if torch.compiler.is_compiling():
        plan = (compiled.fused, taps, list(geometry.stride), groups, outs)
        return cast(Tensor, product_convolution(padded, weights, *plan))
    kernel = convolution(compiled.fused, tuple(taps), geometry.stride, groups, outs)
    if torch.is_grad_enabled() and (padded.requires_grad or weights.requires_grad):
        result: Tensor = Eager.apply(padded, weights, kernel, plain)  # type: ignore[no-untyped-call]
        return result
    return kernel.forward(padded, weights)
