"""Compiled loops of the fused kernel: patches through a trigonometric polynomial, forward and backward.

A wire's features are 1 and sine and cosine of its angle, or with two angles (a, b) sin a cos b, sin a sin b, cos a.
All products of the features of the first wires are called u, of the others v, and an output is u^T M v.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np

from qconv.backends.copies import SLACK, add_rows, copy_block, copy_rows
from qconv.backends.lanes import Lanes, Value, vector_code
from qconv.backends.tasks import SOURCES, at, carray, loop, take, task, task_data

# Numbers of a task's int64 data, see threads.py. Pointers are addresses; arrays are contiguous.
TAKEN, PARTS = 0, 1
IMAGES, BATCH, CHANNELS, HEIGHT, WIDTH = 2, 3, 4, 5, 6  # pointer to (BATCH, CHANNELS, HEIGHT, WIDTH), padded
OUT, ROWS, COLUMNS = 7, 8, 9  # pointer to (BATCH, GROUPS * OUTS, ROWS, COLUMNS): the result, or its gradient
MATRICES, GROUPS, OUTS = 10, 11, 12  # pointer to (GROUPS, OUTS, n_left, n_right)
TAPS, WAVES = 13, 14  # pointers to (wires, angles, 3) int64 and (wires, angles, 2): see Convolution
DOWN, ACROSS = 15, 16  # stride
TO_IMAGES, TO_MATRICES = 17, 18  # pointers to their gradients (the latter for every part), or 0 if not wanted
BLOCK_ROWS, PITCH = 19, 20  # rows worked on at a time, and how far apart they lie then
PLANES, NUMBERS = 21, 22  # pointer to (2, NUMBERS), sine and cosine of every pixel, or 0
LENGTH = 23

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


def _load_features(lanes: Lanes, wires: int, angles: int, turning: Value, rows: Value, place: Value) -> Any:
    """Of the patches at `place`: (sine, cosine) of every wire's angles, and every wire's features."""
    loaded = [
        lanes.load(turning, lanes.plus(lanes.whole(rows, lanes.index(k)), place)) for k in range(2 * wires * angles)
    ]
    pairs = list(zip(loaded[::2], loaded[1::2], strict=True))
    by_wire = [pairs[angles * wire : angles * (wire + 1)] for wire in range(wires)]
    return by_wire, [_wire_features(lanes, own) for own in by_wire]


@vector_code
def _turn(lanes: Lanes, pixels: Any, waves: Any, taps: Any, turning: Any, stride: Any, size: Any) -> None:
    """turning (taps, 2, size): sine and cosine of pi (scale * pixel + offset), from pixels (taps, size)."""
    with lanes.loop(taps) as k:
        scale = lanes.spread(lanes.read(waves, lanes.times(k, 2)))
        offset = lanes.spread(lanes.read(waves, lanes.plus(lanes.times(k, 2), 1)))
        source = lanes.move(pixels, lanes.builder.mul(k, stride))
        sines = lanes.move(turning, lanes.builder.mul(lanes.times(k, 2), stride))
        cosines = lanes.move(sines, stride)
        with lanes.loop(lanes.vectors(size)) as tile:
            place = lanes.times(tile, lanes.size)
            sine, cosine = lanes.sine_cosine(lanes.fma(lanes.load(source, place), scale, offset))
            lanes.store(sine, sines, place)
            lanes.store(cosine, cosines, place)


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
    turning: Any,
    rows: Any,
    matrices: Any,
    outs: Any,
    out: Any,
    stride: Any,
    size: Any,
) -> None:
    """Fills out (outs, size) from matrices (outs, n_left, n_right) and the sines and cosines at `rows` of turning."""
    # Two vectors at a time share each coefficient that is read.
    lanes = Lanes(lanes.builder, lanes.number, LANES)
    with lanes.loop(lanes.vectors(size)) as tile:
        place = lanes.times(tile, lanes.size)
        _, features = _load_features(lanes, left + right, angles, turning, rows, place)
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
    turning: Any,
    rows: Any,
    kept_u: Any,
    kept_v: Any,
    stride: Any,
    size: Any,
) -> None:
    """u (n_left, size) and v (n_right, size) without their first rows, the constants."""
    with lanes.loop(lanes.vectors(size)) as tile:
        place = lanes.times(tile, lanes.size)
        _, features = _load_features(lanes, left + right, angles, turning, rows, place)
        for own, kept in ((features[:left], kept_u), (features[left:], kept_v)):
            for k, product in enumerate(_products(lanes, own)[1:], 1):
                lanes.store(product, kept, lanes.plus(lanes.builder.mul(stride, lanes.index(k)), place))


@vector_code
def _to_pixels(
    lanes: Lanes,
    left: Any,
    right: Any,
    angles: Any,
    turning: Any,
    rows: Any,
    waves: Any,
    matrices: Any,
    outs: Any,
    grad: Any,
    to_pixels: Any,
    stride: Any,
    size: Any,
) -> None:
    """Fills to_pixels (wires * angles, size), the pixels' gradients, from grad (outs, size)."""
    with lanes.loop(lanes.vectors(size)) as tile:
        place = lanes.times(tile, lanes.size)
        by_wire, features = _load_features(lanes, left + right, angles, turning, rows, place)
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
        for wire, (waves_of, slope) in enumerate(zip(by_wire, slopes, strict=True)):
            for angle, total in enumerate(_to_angles(lanes, waves_of, slope)):
                k = wire * angles + angle
                factor = lanes.mul(lanes.broadcast(waves, 2 * k), lanes.constant(math.pi))
                target = lanes.plus(lanes.builder.mul(stride, lanes.index(k)), place)
                lanes.store(lanes.mul(total, factor), to_pixels, target)


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
#
# Where a kernel moves by one pixel, sine and cosine of each pixel are computed once (planes), and a block of patches is
# a piece of an image with all its columns, PITCH apart: the pixels under a tap then lie side by side and are read in
# place. The last columns of such a block are no patches; they are computed and left out. Else the pixels under each
# tap are gathered first, PITCH being COLUMNS.


@loop
def _places(data: Any, group: int, taps: Any, row: int, offsets: Any) -> None:
    """Where the pixels under each tap of a row of patches start."""
    # Divided once a row, not once a tap.
    image, line = row // data[ROWS], row % data[ROWS] * data[DOWN]
    channel = image * data[CHANNELS] + group * (data[CHANNELS] // data[GROUPS])
    for k in range(len(offsets)):
        plane, top, left = channel + taps[3 * k], line + taps[3 * k + 1], taps[3 * k + 2]
        offsets[k] = (plane * data[HEIGHT] + top) * data[WIDTH] + left


@loop
def _gather(
    images: Any,
    data: Any,
    group: int,
    taps: Any,
    waves: Any,
    offsets: Any,
    row: int,
    rows: int,
    pixels: Any,
    turning: Any,
    length: int,
) -> None:
    """The pixels under each tap (taps, length), and turning (taps, 2, length), their sines and cosines."""
    for i in range(rows):
        _places(data, group, taps, row + i, offsets)
        copy_rows(images, offsets, data[ACROSS], pixels, i * data[COLUMNS], length, data[COLUMNS])
    for k in range(len(offsets)):
        # What was copied from behind the last row: no patch, and 0 times NaN would not be 0.
        for j in range(rows * data[COLUMNS], _filled(rows * data[COLUMNS])):
            pixels[k * length + j] = 0
    _turn(pixels, waves, len(offsets), turning, length, _filled(rows * data[COLUMNS]))


@loop
def _scatter(
    slopes: Any, length: int, data: Any, group: int, taps: Any, offsets: Any, row: int, rows: int, images: Any
) -> None:
    """Adds slopes (taps, length) to the pixels they belong to."""
    for i in range(rows):
        _places(data, group, taps, row + i, offsets)
        add_rows(slopes, i * data[PITCH], length, images, offsets, data[ACROSS], data[COLUMNS])


@loop
def _exchange(data: Any, group: int, row: int, rows: int, block: Any, length: int, images: Any, out: bool) -> None:
    """Copies the results of a block (outs, length) to their places in images, or from there if not out."""
    columns, outs, pitch = data[COLUMNS], data[OUTS], data[PITCH]
    done = 0
    while done < rows:
        image, line = (row + done) // data[ROWS], (row + done) % data[ROWS]
        together = min(rows - done, data[ROWS] - line)
        place = (image * data[GROUPS] + group) * outs * data[ROWS] + line
        # Rows of one image lie together, and so they do in the block if no columns are left out.
        count, lines = (together * columns, 1) if pitch == columns else (columns, together)
        for r in range(outs):
            here, there = r * length + done * pitch, (place + r * data[ROWS]) * columns
            if out:
                copy_block(block, here, pitch, images, there, columns, count, lines)
            else:
                copy_block(images, there, columns, block, here, pitch, count, lines)
        done += together


@loop
def _filled(patches: int) -> int:
    return (patches + LANES - 1) // LANES * LANES


def blocks(images: int, height: int, width: int, pitch: int, planes: bool) -> tuple[int, int]:
    """(rows to take at a time, blocks): such that little of the last vector stays empty.

    Args:
        images: Images.
        height: Rows of patches of one.
        width: Patches of a row.
        pitch: How far apart rows lie.
        planes: Whether pixels are read in place: a block then does not reach beyond its image.
    """
    if planes:
        parts = -(-height * pitch // (2 * BLOCK))
        rows = -(-height // parts)
        return rows, images * -(-height // rows)
    choice = range(max(1, BLOCK // 2 // width), max(1, BLOCK // width) + 1)
    rows = max(choice, key=lambda count: (count * width / (-(-count * width // LANES) * LANES), count))
    return rows, -(-images * height // rows)


@loop
def _block(data: Any, part: int) -> tuple[int, int]:
    """(first row, rows) of a block."""
    height, block = data[ROWS], data[BLOCK_ROWS]
    if data[PLANES] == 0:
        return part * block, min(block, data[BATCH] * height - part * block)
    each = (height + block - 1) // block
    first = part % each * block
    return part // each * height + first, min(block, height - first)


@cache
def planes_task(bits: int) -> Any:
    """Task that fills PLANES, some pixels a part, and zeros behind them; bits as forward_task's."""

    sources = SOURCES

    @task
    def compiled(address: Any) -> None:
        data = task_data(address, LENGTH, sources)
        count, numbers = data[BATCH] * data[CHANNELS] * data[HEIGHT] * data[WIDTH], data[NUMBERS]
        images = carray(at(data[IMAGES], bits), (count,))
        planes = carray(at(data[PLANES], bits), (2 * numbers,))
        waves = carray(at(data[WAVES], bits), (2,))
        rest = np.zeros(LANES, images.dtype)
        whole = count // LANES * LANES
        part = take(address)
        while part < data[PARTS]:
            first, last = (
                whole // LANES * part // data[PARTS] * LANES,
                whole // LANES * (part + 1) // data[PARTS] * LANES,
            )
            if last > first:
                _turn(images[first:], waves, 1, planes[first:], numbers, last - first)
            if part == 0:
                for k in range(count - whole):
                    rest[k] = images[whole + k]
                _turn(rest, waves, 1, planes[whole:], numbers, LANES)
                for k in range(whole + LANES, numbers):
                    planes[k] = 0
                    planes[numbers + k] = 0
            part = take(address)

    return compiled


@cache
def forward_task(left: int, right: int, angles: int, bits: int) -> Any:
    """Task that fills OUT, a block a part.

    Args:
        left: Wires whose products are u.
        right: Wires whose products are v.
        angles: Angles of a wire, 1 or 2.
        bits: 32 or 64, of a float.
    """
    wires, numbers = left + right, (2 + angles) ** (left + right)

    sources = SOURCES

    @task
    def compiled(address: Any) -> None:
        data = task_data(address, LENGTH, sources)
        groups, outs = data[GROUPS], data[OUTS]
        images = carray(at(data[IMAGES], bits), (data[BATCH] * data[CHANNELS] * data[HEIGHT] * data[WIDTH],))
        out = carray(at(data[OUT], bits), (data[BATCH] * groups * outs * data[ROWS] * data[COLUMNS],))
        matrices = carray(at(data[MATRICES], bits), (groups, outs * numbers))
        taps = carray(at(data[TAPS], 0), (wires * angles * 3,))
        waves = carray(at(data[WAVES], bits), (wires * angles * 2,))
        planes = carray(at(data[PLANES], bits), (2 * data[NUMBERS],))
        length = _filled(data[BLOCK_ROWS] * data[PITCH] + SLACK)
        # Zeros, so that what is computed beyond the last patch is finite.
        pixels = np.zeros(wires * angles * length if data[PLANES] == 0 else 0, images.dtype)
        turning, result = np.zeros(2 * len(pixels), images.dtype), np.empty(outs * length, images.dtype)
        offsets, rows_of = np.empty(wires * angles, np.int64), np.empty(2 * wires * angles, np.int64)
        part = take(address)
        while part < data[PARTS]:
            row, rows = _block(data, part)
            size = _filled(rows * data[PITCH])
            for g in range(groups):
                if data[PLANES] == 0:
                    _gather(images, data, g, taps, waves, offsets, row, rows, pixels, turning, length)
                    for k in range(2 * wires * angles):
                        rows_of[k] = k * length
                    _forward(left, right, angles, turning, rows_of, matrices[g], outs, result, length, size)
                else:
                    _places(data, g, taps, row, offsets)
                    for k in range(wires * angles):
                        rows_of[2 * k], rows_of[2 * k + 1] = offsets[k], data[NUMBERS] + offsets[k]
                    _forward(left, right, angles, planes, rows_of, matrices[g], outs, result, length, size)
                _exchange(data, g, row, rows, result, length, out, True)
            part = take(address)

    return compiled


@cache
def backward_task(left: int, right: int, angles: int, bits: int) -> Any:
    """Task that fills TO_IMAGES and each part's TO_MATRICES, a range of images a part; arguments as forward_task's."""
    wires, n_left, n_right = left + right, (2 + angles) ** left, (2 + angles) ** right

    sources = SOURCES

    @task
    def compiled(address: Any) -> None:
        data = task_data(address, LENGTH, sources)
        groups, outs, height = data[GROUPS], data[OUTS], data[ROWS]
        pixels_in_all = data[BATCH] * data[CHANNELS] * data[HEIGHT] * data[WIDTH]
        images = carray(at(data[IMAGES], bits), (pixels_in_all,))
        to_images = carray(at(data[TO_IMAGES], bits), (pixels_in_all,))
        out = carray(at(data[OUT], bits), (data[BATCH] * groups * outs * height * data[COLUMNS],))
        matrices = carray(at(data[MATRICES], bits), (groups, outs * n_left * n_right))
        to_matrices = carray(at(data[TO_MATRICES], bits), (data[PARTS], groups, outs * n_left * n_right))
        taps = carray(at(data[TAPS], 0), (wires * angles * 3,))
        waves = carray(at(data[WAVES], bits), (wires * angles * 2,))
        planes = carray(at(data[PLANES], bits), (2 * data[NUMBERS],))
        length = _filled(data[BLOCK_ROWS] * data[PITCH] + SLACK)
        pixels, grad = np.zeros(wires * angles * length, images.dtype), np.zeros(outs * length, images.dtype)
        gathered = np.zeros(2 * len(pixels) if data[PLANES] == 0 else 0, images.dtype)
        u, v = np.empty(n_left * length, images.dtype), np.empty(n_right * length, images.dtype)
        offsets, rows_of = np.empty(wires * angles, np.int64), np.empty(2 * wires * angles, np.int64)
        turning = gathered if data[PLANES] == 0 else planes
        part = take(address)
        while part < data[PARTS]:
            row, last = data[BATCH] * part // data[PARTS] * height, data[BATCH] * (part + 1) // data[PARTS] * height
            while row < last:
                rows = min(data[BLOCK_ROWS], last - row)
                if data[PLANES] != 0:
                    rows = min(rows, height - row % height)
                size = _filled(rows * data[PITCH])
                for g in range(groups):
                    _exchange(data, g, row, rows, grad, length, out, False)
                    for r in range(outs):
                        # What is beyond the last patch must add nothing.
                        for j in range(rows * data[PITCH], size):
                            grad[r * length + j] = 0
                    if data[PLANES] == 0:
                        _gather(images, data, g, taps, waves, offsets, row, rows, pixels, gathered, length)
                        for k in range(2 * wires * angles):
                            rows_of[k] = k * length
                    else:
                        _places(data, g, taps, row, offsets)
                        for k in range(wires * angles):
                            rows_of[2 * k], rows_of[2 * k + 1] = offsets[k], data[NUMBERS] + offsets[k]
                    if data[TO_MATRICES] != 0:
                        _keep_products(left, right, angles, turning, rows_of, u, v, length, size)
                        _to_matrices(n_left, n_right, u, v, grad, outs, to_matrices[part, g], length, size)
                    if data[TO_IMAGES] != 0:
                        _to_pixels(
                            left, right, angles, turning, rows_of, waves, matrices[g], outs, grad, pixels, length, size
                        )
                        _scatter(pixels, length, data, g, taps, offsets, row, rows, to_images)
                row += rows
            part = take(address)

    return compiled
