"""Compiled loops of the fused kernel: patches through a trigonometric polynomial, forward and backward.

A wire's features are 1 and sine and cosine of its angle, or with two angles (a, b) sin a cos b, sin a sin b, cos a.
All products of the features of the first wires are called u, of the others v, and an output is u^T M v.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np

from qconv.backends.copies import add_row, copy_row
from qconv.backends.lanes import Lanes, Value, vector_code
from qconv.backends.tasks import at, carray, loop, take, task

# Numbers of a task's int64 data, see threads.py. Pointers are addresses; arrays are contiguous.
TAKEN, PARTS = 0, 1
IMAGES, BATCH, CHANNELS, HEIGHT, WIDTH = 2, 3, 4, 5, 6  # pointer to (BATCH, CHANNELS, HEIGHT, WIDTH), padded
OUT, ROWS, COLUMNS = 7, 8, 9  # pointer to (BATCH, GROUPS * OUTS, ROWS, COLUMNS): the result, or its gradient
MATRICES, GROUPS, OUTS = 10, 11, 12  # pointer to (GROUPS, OUTS, n_left, n_right)
TAPS, WAVES = 13, 14  # pointers to (wires, angles, 3) int64 and (wires, angles, 2): see Convolution
DOWN, ACROSS = 15, 16  # stride
TO_IMAGES, TO_MATRICES = 17, 18  # pointers to their gradients (the latter for every part), or 0 if not wanted
BLOCK_ROWS = 19  # rows worked on at a time
LENGTH = 20

BLOCK = 384  # at most so many patches are worked on at a time, where rows are not longer: they stay in cache
LANES = 32  # blocks are filled up to a multiple of this many patches


def _wire_features(lanes: Lanes, waves: list[tuple[Value, Value]]) -> list[Value]:
    """Features of a wire after the constant 1, from (sine, cosine) of its one or two angles."""
    if len(waves) == 1:
        return list(waves[0])
    (sine, cosine), (sine_b, cosine_b) = waves
    return [lanes.mul(sine, cosine_b), lanes.mul(sine, sine_b), cosine]


def _products(lanes: Lanes, features: list[list[Value]]) -> list[Value]:
    """All products of one feature a wire, last wire fastest; None stands for the constant 1."""
    result: list[Value] = [None]
    for own in features:
        result = [b if a is None else a if b is None else lanes.mul(a, b) for a in result for b in [None, *own]]
    return result


def _products_backward(lanes: Lanes, features: list[list[Value]], grads: list[Value]) -> list[list[Value]]:
    """Gradients of the features from those of their products (the constant's is not read)."""
    result: list[list[Value]] = []
    for wire in reversed(range(len(features))):
        before = _products(lanes, features[:wire])
        step = 1 + len(features[wire])
        slopes: list[Value] = [None] * (step - 1)
        shared: list[Value] = []
        for k, product in enumerate(before):
            own = grads[k * step + 1 : (k + 1) * step]
            slopes = [_plus(lanes, slope, g, product) for slope, g in zip(slopes, own, strict=True)]
            total = grads[k * step]
            if k:
                for g, feature in zip(own, features[wire], strict=True):
                    total = lanes.fma(g, feature, total)
            shared.append(total)
        result.append(slopes)
        grads = shared
    return result[::-1]


def _plus(lanes: Lanes, total: Value, grad: Value, factor: Value) -> Value:
    if total is None:
        return grad if factor is None else lanes.mul(grad, factor)
    return lanes.add(total, grad) if factor is None else lanes.fma(grad, factor, total)


def _load_features(
    lanes: Lanes, wires: int, angles: int, pixels: Value, waves: Value, stride: Value, place: Value
) -> Any:
    """Of the patches at `place`: (sine, cosine) of every angle, and every wire's features."""
    turning = []
    for k in range(wires * angles):
        pixel = lanes.load(pixels, lanes.plus(lanes.builder.mul(stride, lanes.index(k)), place))
        scale, offset = lanes.broadcast(waves, 2 * k), lanes.broadcast(waves, 2 * k + 1)
        turning.append(lanes.sine_cosine(lanes.fma(pixel, scale, offset)))
    by_wire = [turning[angles * wire : angles * (wire + 1)] for wire in range(wires)]
    return by_wire, [_wire_features(lanes, own) for own in by_wire]


def _row(lanes: Lanes, matrix: Value, a: int, v: list[Value]) -> Value:
    """sum_k M[a, k] v_k."""
    total = lanes.broadcast(matrix, a * len(v))
    for k in range(1, len(v)):
        total = lanes.fma(lanes.broadcast(matrix, a * len(v) + k), v[k], total)
    return total


@vector_code
def _forward(
    lanes: Lanes,
    left: Any,
    right: Any,
    angles: Any,
    pixels: Any,
    waves: Any,
    matrices: Any,
    outs: Any,
    out: Any,
    stride: Any,
    size: Any,
) -> None:
    """Fills out (outs, size) from pixels (wires * angles, size) and matrices (outs, n_left, n_right)."""
    # Two vectors at a time share each coefficient that is read.
    lanes = Lanes(lanes.builder, lanes.number, LANES)
    with lanes.loop(lanes.vectors(size)) as tile:
        place = lanes.times(tile, lanes.size)
        _, features = _load_features(lanes, left + right, angles, pixels, waves, stride, place)
        u, v = _products(lanes, features[:left]), _products(lanes, features[left:])
        with lanes.loop(outs) as r:
            matrix = lanes.move(matrices, lanes.times(r, len(u) * len(v)))
            total = _row(lanes, matrix, 0, v)
            for a in range(1, len(u)):
                total = lanes.fma(u[a], _row(lanes, matrix, a, v), total)
            lanes.store(total, out, lanes.plus(lanes.builder.mul(r, stride), place))


@vector_code
def _keep_products(
    lanes: Lanes,
    left: Any,
    right: Any,
    angles: Any,
    pixels: Any,
    waves: Any,
    kept_u: Any,
    kept_v: Any,
    stride: Any,
    size: Any,
) -> None:
    """u (n_left, size) and v (n_right, size) without their first rows, the constants."""
    with lanes.loop(lanes.vectors(size)) as tile:
        place = lanes.times(tile, lanes.size)
        _, features = _load_features(lanes, left + right, angles, pixels, waves, stride, place)
        for own, kept in ((features[:left], kept_u), (features[left:], kept_v)):
            for k, product in enumerate(_products(lanes, own)[1:], 1):
                lanes.store(product, kept, lanes.plus(lanes.builder.mul(stride, lanes.index(k)), place))


@vector_code
def _to_pixels(
    lanes: Lanes,
    left: Any,
    right: Any,
    angles: Any,
    pixels: Any,
    waves: Any,
    matrices: Any,
    outs: Any,
    grad: Any,
    stride: Any,
    size: Any,
) -> None:
    """Gradients of pixels (wires * angles, size), which they replace, from grad (outs, size)."""
    with lanes.loop(lanes.vectors(size)) as tile:
        place = lanes.times(tile, lanes.size)
        turning, features = _load_features(lanes, left + right, angles, pixels, waves, stride, place)
        u, v = _products(lanes, features[:left]), _products(lanes, features[left:])
        to_u = [lanes.variable(lanes.constant(0)) for _ in u]
        to_v = [lanes.variable(lanes.constant(0)) for _ in v]
        with lanes.loop(outs) as r:
            matrix = lanes.move(matrices, lanes.times(r, len(u) * len(v)))
            g = lanes.load(grad, lanes.plus(lanes.builder.mul(r, stride), place))
            sums = [lanes.value(variable) for variable in to_v]
            for a in range(len(u)):
                weighted = g if a == 0 else lanes.mul(g, u[a])
                for k in range(1, len(v)):
                    sums[k] = lanes.fma(weighted, lanes.broadcast(matrix, a * len(v) + k), sums[k])
                if a:
                    lanes.set(to_u[a], lanes.fma(g, _row(lanes, matrix, a, v), lanes.value(to_u[a])))
            for variable, total in zip(to_v[1:], sums[1:], strict=True):
                lanes.set(variable, total)
        slopes = [
            *_products_backward(lanes, features[:left], [lanes.value(variable) for variable in to_u]),
            *_products_backward(lanes, features[left:], [lanes.value(variable) for variable in to_v]),
        ]
        for wire, (waves_of, slope) in enumerate(zip(turning, slopes, strict=True)):
            for angle, total in enumerate(_to_angles(lanes, waves_of, slope)):
                k = wire * angles + angle
                factor = lanes.mul(lanes.broadcast(waves, 2 * k), lanes.constant(math.pi))
                lanes.store(
                    lanes.mul(total, factor), pixels, lanes.plus(lanes.builder.mul(stride, lanes.index(k)), place)
                )


def _to_angles(lanes: Lanes, waves: list[tuple[Value, Value]], slopes: list[Value]) -> list[Value]:
    """Gradients of a wire's angles from those of its features."""
    sine, cosine = waves[0]
    if len(waves) == 1:
        return [lanes.sub(lanes.mul(slopes[0], cosine), lanes.mul(slopes[1], sine))]
    sine_b, cosine_b = waves[1]
    along, across, rest = slopes
    to_sine = lanes.fma(along, cosine_b, lanes.mul(across, sine_b))
    first = lanes.sub(lanes.mul(to_sine, cosine), lanes.mul(rest, sine))
    second = lanes.sub(lanes.mul(across, cosine_b), lanes.mul(along, sine_b))
    return [first, lanes.mul(second, sine)]


@vector_code
def _to_matrices(
    lanes: Lanes, n_left: Any, n_right: Any, u: Any, v: Any, grad: Any, outs: Any, out: Any, stride: Any, size: Any
) -> None:
    """Adds sum_p grad[r, p] u[a, p] v[k, p] to out (outs, n_left, n_right)."""
    # So many sums at a time as fit in registers.
    columns = min(n_right, 18)
    step = max(1, 18 // columns)
    with lanes.loop(outs) as r:
        target = lanes.move(out, lanes.times(r, n_left * n_right))
        incoming = lanes.move(grad, lanes.builder.mul(r, stride))
        for first in range(0, n_left, step):
            for column in range(0, n_right, columns):
                block = [
                    (a, k)
                    for a in range(first, min(first + step, n_left))
                    for k in range(column, min(column + columns, n_right))
                ]
                sums = {pair: lanes.variable(lanes.constant(0)) for pair in block}
                with lanes.loop(lanes.vectors(size)) as tile:
                    place = lanes.times(tile, lanes.size)
                    g = lanes.load(incoming, place)
                    others = {
                        k: lanes.load(v, lanes.plus(lanes.builder.mul(stride, lanes.index(k)), place))
                        for _, k in block
                        if k
                    }
                    for a in dict.fromkeys(a for a, _ in block):
                        mine = (
                            lanes.load(u, lanes.plus(lanes.builder.mul(stride, lanes.index(a)), place)) if a else None
                        )
                        weighted = g if mine is None else lanes.mul(g, mine)
                        for pair in block:
                            if pair[0] == a:
                                total = lanes.value(sums[pair])
                                k = pair[1]
                                lanes.set(
                                    sums[pair],
                                    lanes.fma(weighted, others[k], total) if k else lanes.add(total, weighted),
                                )
                for a, k in block:
                    offset = a * n_right + k
                    lanes.write(
                        lanes.add(lanes.read(target, offset), lanes.sum(lanes.value(sums[a, k]))), target, offset
                    )


# Below, the output rows of all images are numbered one after the other: row k is row k % ROWS of image k // ROWS.


@loop
def _gather(images: Any, data: Any, group: int, taps: Any, row: int, rows: int, pixels: Any, length: int) -> None:
    """The pixels under each tap: all images -> pixels (taps, length)."""
    for i in range(rows):
        # Divided once a row, not once a tap.
        image, line = (row + i) // data[ROWS], (row + i) % data[ROWS] * data[DOWN]
        channel = image * data[CHANNELS] + group * (data[CHANNELS] // data[GROUPS])
        for k in range(len(taps) // 3):
            plane, top, left = channel + taps[3 * k], line + taps[3 * k + 1], taps[3 * k + 2]
            source = (plane * data[HEIGHT] + top) * data[WIDTH] + left
            copy_row(images, source, data[ACROSS], pixels, k * length + i * data[COLUMNS], data[COLUMNS])


@loop
def _scatter(slopes: Any, length: int, data: Any, group: int, taps: Any, row: int, rows: int, images: Any) -> None:
    """Adds slopes (taps, length) to the pixels they belong to."""
    for i in range(rows):
        image, line = (row + i) // data[ROWS], (row + i) % data[ROWS] * data[DOWN]
        channel = image * data[CHANNELS] + group * (data[CHANNELS] // data[GROUPS])
        for k in range(len(taps) // 3):
            plane, top, left = channel + taps[3 * k], line + taps[3 * k + 1], taps[3 * k + 2]
            target = (plane * data[HEIGHT] + top) * data[WIDTH] + left
            add_row(slopes, k * length + i * data[COLUMNS], images, target, data[ACROSS], data[COLUMNS])


@loop
def _filled(patches: int) -> int:
    return (patches + LANES - 1) // LANES * LANES


def block_rows(width: int) -> int:
    """Rows of so many patches to take at a time, such that little of the last vector stays empty."""
    rows = range(max(1, BLOCK // 2 // width), max(1, BLOCK // width) + 1)
    return max(rows, key=lambda count: (count * width / (-(-count * width // LANES) * LANES), count))


@cache
def forward_task(left: int, right: int, angles: int, bits: int) -> Any:
    """Task that fills OUT, BLOCK_ROWS of all rows a part.

    Args:
        left: Wires whose products are u.
        right: Wires whose products are v.
        angles: Angles of a wire, 1 or 2.
        bits: 32 or 64, of a float.
    """
    wires, numbers = left + right, (2 + angles) ** (left + right)

    @task
    def compiled(address: Any) -> None:
        data = carray(address, (LENGTH,))
        groups, outs, height, width = data[GROUPS], data[OUTS], data[ROWS], data[COLUMNS]
        images = carray(at(data[IMAGES], bits), (data[BATCH] * data[CHANNELS] * data[HEIGHT] * data[WIDTH],))
        out = carray(at(data[OUT], bits), (data[BATCH] * groups * outs * height * width,))
        matrices = carray(at(data[MATRICES], bits), (groups, outs * numbers))
        taps = carray(at(data[TAPS], 0), (wires * angles * 3,))
        waves = carray(at(data[WAVES], bits), (wires * angles * 2,))
        block, total = data[BLOCK_ROWS], data[BATCH] * height
        length = _filled(block * width)
        pixels, result = np.zeros(wires * angles * length, images.dtype), np.empty(outs * length, images.dtype)
        part = take(address)
        while part < data[PARTS]:
            row = part * block
            rows = min(block, total - row)
            for g in range(groups):
                _gather(images, data, g, taps, row, rows, pixels, length)
                _forward(left, right, angles, pixels, waves, matrices[g], outs, result, length, _filled(rows * width))
                done = 0
                while done < rows:
                    # Rows of one image lie together.
                    image, line = (row + done) // height, (row + done) % height
                    together = min(rows - done, height - line)
                    place = (image * groups + g) * outs * height + line
                    for r in range(outs):
                        source, target = r * length + done * width, (place + r * height) * width
                        copy_row(result, source, 1, out, target, together * width)
                    done += together
            part = take(address)

    return compiled


@cache
def backward_task(left: int, right: int, angles: int, bits: int) -> Any:
    """Task that fills TO_IMAGES and each part's TO_MATRICES, a range of images a part; arguments as forward_task's."""
    wires, n_left, n_right = left + right, (2 + angles) ** left, (2 + angles) ** right

    @task
    def compiled(address: Any) -> None:
        data = carray(address, (LENGTH,))
        groups, outs, height, width = data[GROUPS], data[OUTS], data[ROWS], data[COLUMNS]
        pixels_in_all = data[BATCH] * data[CHANNELS] * data[HEIGHT] * data[WIDTH]
        images = carray(at(data[IMAGES], bits), (pixels_in_all,))
        to_images = carray(at(data[TO_IMAGES], bits), (pixels_in_all,))
        out = carray(at(data[OUT], bits), (data[BATCH] * groups * outs * height * width,))
        matrices = carray(at(data[MATRICES], bits), (groups, outs * n_left * n_right))
        to_matrices = carray(at(data[TO_MATRICES], bits), (data[PARTS], groups, outs * n_left * n_right))
        taps = carray(at(data[TAPS], 0), (wires * angles * 3,))
        waves = carray(at(data[WAVES], bits), (wires * angles * 2,))
        block = data[BLOCK_ROWS]
        length = _filled(block * width)
        pixels, grad = np.zeros(wires * angles * length, images.dtype), np.zeros(outs * length, images.dtype)
        u, v = np.empty(n_left * length, images.dtype), np.empty(n_right * length, images.dtype)
        part = take(address)
        while part < data[PARTS]:
            first, last = data[BATCH] * part // data[PARTS] * height, data[BATCH] * (part + 1) // data[PARTS] * height
            for row in range(first, last, block):
                rows = min(block, last - row)
                size = _filled(rows * width)
                for g in range(groups):
                    done = 0
                    while done < rows:
                        image, line = (row + done) // height, (row + done) % height
                        together = min(rows - done, height - line)
                        place = (image * groups + g) * outs * height + line
                        for r in range(outs):
                            source, target = (place + r * height) * width, r * length + done * width
                            copy_row(out, source, 1, grad, target, together * width)
                        done += together
                    for r in range(outs):
                        # What is beyond the last patch must add nothing.
                        for j in range(rows * width, size):
                            grad[r * length + j] = 0
                    _gather(images, data, g, taps, row, rows, pixels, length)
                    if data[TO_MATRICES] != 0:
                        _keep_products(left, right, angles, pixels, waves, u, v, length, size)
                        _to_matrices(n_left, n_right, u, v, grad, outs, to_matrices[part, g], length, size)
                    if data[TO_IMAGES] != 0:
                        _to_pixels(left, right, angles, pixels, waves, matrices[g], outs, grad, length, size)
                        _scatter(pixels, length, data, g, taps, row, rows, to_images)
            part = take(address)

    return compiled
