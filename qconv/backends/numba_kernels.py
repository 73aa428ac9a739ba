"""Compiled loops of the fused kernel: coefficients from weights, and patches through a trigonometric polynomial.

Plain functions of numpy arrays, forward and backward, on one thread without the interpreter's lock; `fused.py` shares
the work out and tells torch about them. Features of a wire are always (1, sin, cos) of one angle.
"""

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import overload

# Contraction to fused multiply-add and reordered sums are allowed; NaN and infinity keep their meaning.
_OPTIONS: dict[str, Any] = {
    "nogil": True,
    "cache": True,
    "error_model": "numpy",
    "fastmath": {"contract", "nsz", "reassoc"},
}
# Patches worked on at a time, rows of several images together: their products stay in the nearest caches. Loops run to
# a multiple of LANES, past the last patch if need be: what does not fill a vector would be done one by one.
BLOCK = 512
LANES = 16

ROTATION, PERMUTATION, DIGIT = 0, 1, 2


# Copies and fills are written as loops: numba compiles them several times faster than slices.
@njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def _copy(source: Any, target: Any) -> None:
    for i in range(source.shape[0]):
        for j in range(source.shape[1]):
            target[i, j] = source[i, j]


@njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def _clear(target: Any) -> None:
    for i in range(target.shape[0]):
        for j in range(target.shape[1]):
            target[i, j] = 0


@njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def coefficients_forward(
    weights: Any,
    start: Any,
    kinds: Any,
    tables: Any,
    angles: Any,
    pairs: Any,
    signs: Any,
    digits: Any,
    out: Any,
    kept: Any,
) -> None:
    """Evolve observables backwards through the circuit in the Pauli basis.

    Args:
        weights: (F, n_weights).
        start: (4^n, O), the observables.
        kinds: (ops,), last gate of the circuit first.
        tables: (ops, 2): which table, and which weight (-1 for a constant angle).
        angles: (ops, 2): scale and offset.
        pairs: (rotations, 4^n / 4, 2): strings Q and i P Q that a rotation turns into each other.
        signs: (rotations, 4^n / 4).
        digits: for permutations and one-digit matrices, rows (target, source, factor): (tables, entries, 3).
        out: (F, 4^n, O), result.
        kept: (F, digit ops, 4^n, O): coefficients before each operation that cannot be undone.
    """
    for f in range(len(weights)):
        c = out[f]
        _copy(start, c)
        stage = 0
        scratch = np.empty(c.shape, c.dtype)
        for k in range(len(kinds)):
            table, index = tables[k, 0], tables[k, 1]
            if kinds[k] == ROTATION:
                angle = angles[k, 1]
                if index >= 0:
                    angle += angles[k, 0] * weights[f, index]
                cosine, sine = weights.dtype.type(math.cos(angle)), weights.dtype.type(math.sin(angle))
                for e in range(pairs.shape[1]):
                    i, j = pairs[table, e, 0], pairs[table, e, 1]
                    s = weights.dtype.type(signs[table, e]) * sine
                    for o in range(c.shape[1]):
                        a, b = c[i, o], c[j, o]
                        c[i, o] = cosine * a - s * b
                        c[j, o] = cosine * b + s * a
            else:
                if kinds[k] == DIGIT:
                    _copy(c, kept[f, stage])
                    stage += 1
                _copy(c, scratch)
                _clear(c)
                for e in range(digits.shape[1]):
                    target, source = int(digits[table, e, 0]), int(digits[table, e, 1])
                    factor = weights.dtype.type(digits[table, e, 2])
                    if target >= 0:
                        for o in range(c.shape[1]):
                            c[target, o] += factor * scratch[source, o]


@njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def coefficients_backward(
    grad: Any,
    weights: Any,
    kinds: Any,
    tables: Any,
    angles: Any,
    pairs: Any,
    signs: Any,
    digits: Any,
    final: Any,
    kept: Any,
) -> Any:
    """Gradient of the weights from that of the coefficients; rotations are undone on the way, not remembered.

    Args:
        grad: (F, 4^n, O), overwritten.
        weights: As of `coefficients_forward`, and so the following up to digits.
        kinds: Operations.
        tables: Operations.
        angles: Operations.
        pairs: Tables.
        signs: Tables.
        digits: Tables.
        final: (F, 4^n, O), the forward result; overwritten.
        kept: As the forward pass left it.
    """
    result = np.zeros(weights.shape, weights.dtype)
    for f in range(len(weights)):
        c, g = final[f], grad[f]
        stage = kept.shape[1]
        scratch = np.empty(c.shape, c.dtype)
        for k in range(len(kinds) - 1, -1, -1):
            table, index = tables[k, 0], tables[k, 1]
            if kinds[k] == ROTATION:
                angle = angles[k, 1]
                if index >= 0:
                    angle += angles[k, 0] * weights[f, index]
                cosine, sine = weights.dtype.type(math.cos(angle)), weights.dtype.type(math.sin(angle))
                slope = 0.0
                for e in range(pairs.shape[1]):
                    i, j = pairs[table, e, 0], pairs[table, e, 1]
                    sign = weights.dtype.type(signs[table, e])
                    s = sign * sine
                    for o in range(c.shape[1]):
                        a, b, ga, gb = c[i, o], c[j, o], g[i, o], g[j, o]
                        slope += sign * (gb * a - ga * b)
                        c[i, o] = cosine * a + s * b
                        c[j, o] = cosine * b - s * a
                        g[i, o] = cosine * ga + s * gb
                        g[j, o] = cosine * gb - s * ga
                if index >= 0:
                    result[f, index] += angles[k, 0] * slope
            else:
                _copy(g, scratch)
                _clear(g)
                for e in range(digits.shape[1]):
                    target, source = int(digits[table, e, 0]), int(digits[table, e, 1])
                    if target >= 0:
                        for o in range(c.shape[1]):
                            g[source, o] += weights.dtype.type(digits[table, e, 2]) * scratch[target, o]
                if kinds[k] == DIGIT:
                    stage -= 1
                    _copy(kept[f, stage], c)
                else:
                    _copy(c, scratch)
                    for e in range(digits.shape[1]):
                        target, source = int(digits[table, e, 0]), int(digits[table, e, 1])
                        if target >= 0:
                            for o in range(c.shape[1]):
                                # A signed permutation is undone by its transpose.
                                c[source, o] = weights.dtype.type(digits[table, e, 2]) * scratch[target, o]
    return result


def _sine_cosine_single(turns: Any) -> Any:
    """Sine and cosine of pi * turns in float32, by polynomials, so that the loop around it is vectorized.

    Source: minimax coefficients of the Cephes library's sinf and cosf on [-pi/4, pi/4]; error below 2e-7.
    """
    quarter = np.rint(np.float32(2) * turns)
    t = (turns - np.float32(0.5) * quarter) * np.float32(math.pi)
    u = t * t
    s = t + t * u * (
        np.float32(-1.6666654611e-1) + u * (np.float32(8.3321608736e-3) + u * np.float32(-1.9515295891e-4))
    )
    c = (
        np.float32(1)
        - np.float32(0.5) * u
        + u
        * u
        * (
            np.float32(4.166664568298827e-2)
            + u * (np.float32(-1.388731625493765e-3) + u * np.float32(2.443315711809948e-5))
        )
    )
    q = np.int32(quarter)
    swapped = (q & 1) != 0
    sine = c if swapped else s
    cosine = s if swapped else c
    return -sine if (q & 2) != 0 else sine, -cosine if ((q + 1) & 2) != 0 else cosine


def _sine_cosine_double(turns: Any) -> Any:
    # Reduced by whole turns first, which is exact, so that pi * turns stays small.
    angle = math.pi * (turns - 2.0 * np.rint(0.5 * turns))
    return math.sin(angle), math.cos(angle)


def sine_cosine(turns: Any) -> Any:
    """Sine and cosine of pi * turns, chosen by type when a loop is compiled."""
    raise NotImplementedError("for compiled code")


# An overload rather than an argument: numba finds a cached loop again only if all it closes over are numbers.
@overload(sine_cosine)
def _sine_cosine(turns: Any) -> Any:
    return _sine_cosine_single if turns == types.float32 else _sine_cosine_double


@njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def _products(features: Any, first: int, last: int, out: Any) -> None:
    """All products of one feature a wire: features (n, 2, size) -> out (3^wires, size), last wire fastest.

    One loop a row: rows are told apart when a loop starts, and then it is vectorized.
    """
    width = out.shape[1]
    for p in range(width):
        out[0, p] = 1
    size = 1
    for wire in range(first, last):
        sine, cosine = features[wire, 0], features[wire, 1]
        # From the back, so that no product is overwritten before it was used.
        for k in range(size - 1, -1, -1):
            base, one, two = out[k], out[3 * k + 1], out[3 * k + 2]
            for p in range(width):
                two[p] = base[p] * cosine[p]
            for p in range(width):
                one[p] = base[p] * sine[p]
            if k > 0:
                zero = out[3 * k]
                for p in range(width):
                    zero[p] = base[p]
        size *= 3


@njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def _products_backward(features: Any, grad: Any, first: int, last: int, out: Any, slopes: Any) -> None:
    """Gradients of the features from those of their products, which are taken apart again on the way."""
    size, width = 1, out.shape[1]
    for _ in range(first, last):
        size *= 3
    for wire in range(last - 1, first - 1, -1):
        size //= 3
        sine, cosine = features[wire, 0], features[wire, 1]
        to_sine, to_cosine = slopes[wire, 0], slopes[wire, 1]
        _clear(slopes[wire])
        for k in range(size):
            base, one, two, total = out[3 * k], grad[3 * k + 1], grad[3 * k + 2], grad[k]
            for p in range(width):
                to_sine[p] += one[p] * base[p]
            for p in range(width):
                to_cosine[p] += two[p] * base[p]
            if k > 0:
                zero, product = grad[3 * k], out[k]
                for p in range(width):
                    total[p] = zero[p]
                for p in range(width):
                    product[p] = base[p]
            for p in range(width):
                total[p] += one[p] * sine[p]
            for p in range(width):
                total[p] += two[p] * cosine[p]


# Below, the output rows of all images are numbered one after the other: row k is row k % height of image k // height.


@njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def _features(
    images: Any, channel: int, taps: Any, wave: Any, stride: Any, row: int, rows: int, shape: Any, pixels: Any, out: Any
) -> None:
    """Sines and cosines of the pixels under each tap: images (B, C, H, W) -> out (wires, 2, size)."""
    number = images.dtype.type
    factor, shift = number(wave[0]), number(wave[1])
    height, width = shape
    for wire in range(len(taps)):
        plane, down, across = channel + taps[wire, 0], taps[wire, 1], taps[wire, 2]
        for i in range(rows):
            source = images[(row + i) // height, plane, (row + i) % height * stride[0] + down]
            target = pixels[i * width :]
            if stride[1] == 1:
                for j in range(width):
                    target[j] = source[across + j]
            else:
                for j in range(width):
                    target[j] = source[across + j * stride[1]]
        sine, cosine = out[wire, 0], out[wire, 1]
        for p in range(pixels.size):
            sine[p], cosine[p] = sine_cosine(factor * pixels[p] + shift)


@njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def _pixels_backward(
    features: Any,
    slopes: Any,
    channel: int,
    taps: Any,
    wave: Any,
    stride: Any,
    row: int,
    rows: int,
    shape: Any,
    out: Any,
) -> None:
    """Add the gradients of the features to those of the pixels they came from, out (B, C, H, W)."""
    turn = out.dtype.type(math.pi * wave[0])
    height, width = shape
    for wire in range(len(taps)):
        plane, down, across = channel + taps[wire, 0], taps[wire, 1], taps[wire, 2]
        sine, cosine, to_sine, to_cosine = features[wire, 0], features[wire, 1], slopes[wire, 0], slopes[wire, 1]
        for p in range(to_sine.size):
            to_sine[p] = turn * (to_sine[p] * cosine[p] - to_cosine[p] * sine[p])
        for i in range(rows):
            target = out[(row + i) // height, plane, (row + i) % height * stride[0] + down]
            source = to_sine[i * width :]
            if stride[1] == 1:
                for j in range(width):
                    target[across + j] += source[j]
            else:
                for j in range(width):
                    target[across + j * stride[1]] += source[j]


@njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def _size(rows: int, width: int) -> int:
    """Numbers in a block of rows, up to a multiple of LANES."""
    return (rows * width + LANES - 1) // LANES * LANES


@cache
def patch_kernels(left: int, right: int) -> tuple[Callable[..., None], Callable[..., None]]:
    """Forward and backward loops for that many wires in the two halves of the contraction.

    The sizes are constants of the compiled code: the inner sums are unrolled and the loops over patches vectorized.
    """
    n_left, n_right = 3**left, 3**right

    @njit(**_OPTIONS)  # type: ignore[untyped-decorator]
    def forward(
        images: Any, coefficients: Any, taps: Any, wave: Any, stride: Any, out: Any, first: int, last: int
    ) -> None:
        """images (B, C, H, W), coefficients (G, R, n_left, n_right) -> out (B, G * R, H', W'), images first to last."""
        groups, rows_out = coefficients.shape[0], coefficients.shape[1]
        channels = images.shape[1] // groups
        height, width = out.shape[2], out.shape[3]
        block = max(1, BLOCK // width)
        number = images.dtype.type
        for row in range(first * height, last * height, block):
            rows = min(block, last * height - row)
            size = _size(rows, width)
            pixels, result = np.zeros(size, images.dtype), np.empty(size, images.dtype)
            features = np.empty((left + right, 2, size), images.dtype)
            u, v = np.empty((n_left, size), images.dtype), np.empty((n_right, size), images.dtype)
            for g in range(groups):
                _features(images, g * channels, taps, wave, stride, row, rows, (height, width), pixels, features)
                _products(features, 0, left, u)
                _products(features, left, left + right, v)
                for r in range(rows_out):
                    matrix = coefficients[g, r]
                    for p in range(size):
                        total = number(0)
                        for a in range(n_left):
                            partial = number(0)
                            for k in range(n_right):
                                partial += matrix[a, k] * v[k, p]
                            total += partial * u[a, p]
                        result[p] = total
                    for i in range(rows):
                        target = out[(row + i) // height, g * rows_out + r, (row + i) % height]
                        for j in range(width):
                            target[j] = result[i * width + j]

    @njit(**_OPTIONS)  # type: ignore[untyped-decorator]
    def backward(
        grad: Any,
        images: Any,
        coefficients: Any,
        taps: Any,
        wave: Any,
        stride: Any,
        grad_images: Any,
        grad_coefficients: Any,
        first: int,
        last: int,
    ) -> None:
        """From grad (B, G * R, H', W'), adds to grad_images (B, C, H, W), grad_coefficients (G, R, n_left, n_right)."""
        groups, rows_out = coefficients.shape[0], coefficients.shape[1]
        channels = images.shape[1] // groups
        height, width = grad.shape[2], grad.shape[3]
        block = max(1, BLOCK // width)
        number = images.dtype.type
        for row in range(first * height, last * height, block):
            rows = min(block, last * height - row)
            size = _size(rows, width)
            # Zeros behind the last patch: what is added there comes to nothing.
            pixels, incoming = np.zeros(size, images.dtype), np.zeros(size, images.dtype)
            features = np.empty((left + right, 2, size), images.dtype)
            slopes = np.empty((left + right, 2, size), images.dtype)
            u, gu = np.empty((n_left, size), images.dtype), np.empty((n_left, size), images.dtype)
            v, gv = np.empty((n_right, size), images.dtype), np.empty((n_right, size), images.dtype)
            weighted = np.empty((n_left, size), images.dtype)
            for g in range(groups):
                _features(images, g * channels, taps, wave, stride, row, rows, (height, width), pixels, features)
                _products(features, 0, left, u)
                _products(features, left, left + right, v)
                _clear(gu)
                _clear(gv)
                for r in range(rows_out):
                    for i in range(rows):
                        source = grad[(row + i) // height, g * rows_out + r, (row + i) % height]
                        for j in range(width):
                            incoming[i * width + j] = source[j]
                    matrix, slope = coefficients[g, r], grad_coefficients[g, r]
                    for a in range(n_left):
                        mine, product, scaled = gu[a], u[a], weighted[a]
                        for p in range(size):
                            scaled[p] = incoming[p] * product[p]
                        for p in range(size):
                            partial = number(0)
                            for k in range(n_right):
                                partial += matrix[a, k] * v[k, p]
                            mine[p] += incoming[p] * partial
                        for k in range(n_right):
                            total, other = number(0), v[k]
                            for p in range(size):
                                total += scaled[p] * other[p]
                            slope[a, k] += total
                    for k in range(n_right):
                        mine = gv[k]
                        for p in range(size):
                            partial = mine[p]
                            for a in range(n_left):
                                partial += matrix[a, k] * weighted[a, p]
                            mine[p] = partial
                _products_backward(features, gu, 0, left, u, slopes)
                _products_backward(features, gv, left, left + right, v, slopes)
                shape = (height, width)
                _pixels_backward(features, slopes, g * channels, taps, wave, stride, row, rows, shape, grad_images)

    return forward, backward
