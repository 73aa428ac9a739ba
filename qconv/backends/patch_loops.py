"""Compiled loops of the fused kernel: patches through a trigonometric polynomial, forward and backward.

What happens to a block of patches is emitted in patch_lanes.py; here are the blocks, and where their pixels lie.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from qconv.backends.copies import SLACK, add_rows, copy_block, copy_rows
from qconv.backends.patch_lanes import LANES, add_outer, evaluate, keep_products, pull_back, turn
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
    turn(pixels, waves, len(offsets), turning, length, _filled(rows * data[COLUMNS]))


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
                turn(images[first:], waves, 1, planes[first:], numbers, last - first)
            if part == 0:
                for k in range(count - whole):
                    rest[k] = images[whole + k]
                turn(rest, waves, 1, planes[whole:], numbers, LANES)
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
                    evaluate(left, right, angles, turning, rows_of, matrices[g], outs, result, length, size)
                else:
                    _places(data, g, taps, row, offsets)
                    for k in range(wires * angles):
                        rows_of[2 * k], rows_of[2 * k + 1] = offsets[k], data[NUMBERS] + offsets[k]
                    evaluate(left, right, angles, planes, rows_of, matrices[g], outs, result, length, size)
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
                        keep_products(left, right, angles, turning, rows_of, u, v, length, size)
                        add_outer(n_left, n_right, u, v, grad, outs, to_matrices[part, g], length, size)
                    if data[TO_IMAGES] != 0:
                        pull_back(
                            left, right, angles, turning, rows_of, waves, matrices[g], outs, grad, pixels, length, size
                        )
                        _scatter(pixels, length, data, g, taps, offsets, row, rows, to_images)
                row += rows
            part = take(address)

    return compiled
