"""Compiled loops of the fused kernel: patches through a trigonometric polynomial, forward and backward.

What happens to a block of patches is emitted in patch_lanes.py; here are the blocks, and where their pixels lie.
"""

from __future__ import annotations

from functools import cache

from llvmlite import ir

from qconv.backends.copies import SLACK, add_rows, copy_block, copy_rows
from qconv.backends.lanes import BYTES, Lanes, Value
from qconv.backends.patch_lanes import LANES, add_outer, evaluate, keep_products, pull_back, turn
from qconv.backends.tasks import OWN, Data, Task, task
from qconv.backends.tasks import PARTS as PARTS
from qconv.backends.threads import ROOM as ROOM

# Numbers of a task's int64 data, see tasks.py. Pointers are addresses; arrays are contiguous.
IMAGES, BATCH, CHANNELS, HEIGHT, WIDTH = range(OWN, OWN + 5)  # pointer to (BATCH, CHANNELS, HEIGHT, WIDTH), padded
OUT, ROWS, COLUMNS = range(10, 13)  # pointer to (BATCH, GROUPS * OUTS, ROWS, COLUMNS): the result, or its gradient
MATRICES, GROUPS, OUTS = range(13, 16)  # pointer to (GROUPS, OUTS, n_left, n_right)
TAPS, WAVES = 16, 17  # pointers to (wires, angles, 3) int64 and (wires, angles, 2): see Convolution
DOWN, ACROSS = 18, 19  # stride
TO_IMAGES, TO_MATRICES = 20, 21  # pointers to their gradients (the latter for every part), or 0 if not wanted
BLOCK_ROWS, PITCH = 22, 23  # rows worked on at a time, and how far apart they lie then
PLANES, NUMBERS = 24, 25  # pointer to (2, NUMBERS), sine and cosine of every pixel, or 0
BLOCK_LENGTH = 26  # numbers of which a block has one for every patch
LENGTH = 27

BLOCK = 384  # at most so many patches are worked on at a time, where rows are not longer: they stay in cache

_WHOLE = ir.IntType(64)

# Below, the output rows of all images are numbered one after the other: row k is row k % ROWS of image k // ROWS.
#
# Where a kernel moves by one pixel, sine and cosine of each pixel are computed once (planes), and a block of patches is
# a piece of an image with all its columns, PITCH apart: the pixels under a tap then lie side by side and are read in
# place. The last columns of such a block are no patches; they are computed and left out. Else the pixels under each
# tap are gathered first, PITCH being COLUMNS.


def blocks(images: int, height: int, width: int, pitch: int, planes: bool) -> tuple[int, int, int]:
    """(rows to take at a time, blocks, numbers for a block): such that little of the last vector stays empty.

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
        count = images * -(-height // rows)
    else:
        choice = range(max(1, BLOCK // 2 // width), max(1, BLOCK // width) + 1)
        rows = max(choice, key=lambda count: (count * width / (-(-count * width // LANES) * LANES), count))
        count = -(-images * height // rows)
    return rows, count, -(-(rows * pitch + SLACK) // LANES) * LANES


def room(taps: int, rows: int, length: int, bits: int) -> int:
    """Bytes that a thread needs: what is kept of every tap, and so many rows of a block beside its pixels' three."""
    return _offsets(taps) + -(-(3 * taps + rows) * length * bits // 8 // BYTES) * BYTES


def _offsets(taps: int) -> int:
    """Bytes of three int64 for every tap, filled up."""
    return -(-24 * taps // BYTES) * BYTES


def _pixels(lanes: Lanes, data: Data) -> Value:
    """Numbers in IMAGES."""
    count = data[BATCH]
    for field in (CHANNELS, HEIGHT, WIDTH):
        count = lanes.builder.mul(count, data[field])
    return count


class _Blocks:
    """Blocks of patches, one after the other in a thread's memory.

    Args:
        lanes: Where the code goes.
        data: A task's numbers.
        taps: Angles of all wires.
    """

    def __init__(self, lanes: Lanes, data: Data, taps: int) -> None:
        b = lanes.builder
        self._lanes, self._data, self._taps, self._length = lanes, data, taps, data[BLOCK_LENGTH]
        memory = data.memory()
        whole = _WHOLE.as_pointer()
        self._offsets = b.bitcast(memory, whole)
        # Where sines and cosines of the pixels under each tap start.
        self.rows_of = b.gep(self._offsets, [lanes.index(taps)], source_etype=_WHOLE)
        self._free = lanes.move(memory, lanes.index(_offsets(taps) * 8 // lanes.bits))
        self.pixels, self._gathered = self.rows(taps), self.rows(2 * taps)
        self._in_place = b.icmp_signed("!=", data[PLANES], lanes.index(0))
        self.turning = b.select(self._in_place, data.floats(PLANES), self._gathered)

    def rows(self, count: Value) -> Value:
        """Pointer to memory for so many numbers a patch."""
        lanes = self._lanes
        count = lanes.index(count) if isinstance(count, int) else count
        result, self._free = self._free, lanes.move(self._free, lanes.builder.mul(count, self._length))
        return result

    def count(self, first: Value, last: Value) -> Value:
        """Blocks in a range of rows; whole images where pixels are read in place."""
        b, data, each = self._lanes.builder, self._data, self._in_image()
        rows = b.sub(last, first)
        return b.select(self._in_place, b.mul(b.udiv(rows, data[ROWS]), each), self._up(rows, data[BLOCK_ROWS]))

    def block(self, first: Value, last: Value, number: Value) -> tuple[Value, Value]:
        """(first row, rows) of a block in a range of rows."""
        b, data, each = self._lanes.builder, self._data, self._in_image()
        line = b.mul(b.urem(number, each), data[BLOCK_ROWS])
        image = b.add(first, b.mul(b.udiv(number, each), data[ROWS]))
        start = b.add(first, b.mul(number, data[BLOCK_ROWS]))
        left = b.select(self._in_place, b.sub(data[ROWS], line), b.sub(last, start))
        return b.select(self._in_place, b.add(image, line), start), self._lanes.least(left, data[BLOCK_ROWS])

    def _in_image(self) -> Value:
        return self._up(self._data[ROWS], self._data[BLOCK_ROWS])

    def _up(self, a: Value, divisor: Value) -> Value:
        b = self._lanes.builder
        return b.udiv(self._lanes.plus(b.add(a, divisor), -1), divisor)

    def filled(self, patches: Value) -> Value:
        """So many, up to a multiple of LANES."""
        lanes = self._lanes
        return lanes.times(lanes.builder.udiv(lanes.plus(patches, LANES - 1), lanes.index(LANES)), LANES)

    def zeros(self, pointer: Value, first: Value, last: Value) -> None:
        """Make numbers 0."""
        lanes = self._lanes
        with lanes.loop(lanes.builder.sub(last, first)) as k:
            lanes.write(ir.Constant(lanes.scalar, 0), pointer, lanes.builder.add(first, k))

    def _places(self, group: Value, row: Value) -> None:
        """Where the pixels under each tap of a row of patches start."""
        lanes, data, b = self._lanes, self._data, self._lanes.builder
        # Divided once a row, not once a tap.
        image, line = b.udiv(row, data[ROWS]), b.mul(b.urem(row, data[ROWS]), data[DOWN])
        channel = b.add(b.mul(image, data[CHANNELS]), b.mul(group, b.udiv(data[CHANNELS], data[GROUPS])))
        for k in range(self._taps):
            plane, top, left = data.table(TAPS, lanes.index(k), 3)
            start = b.mul(b.add(b.mul(b.add(channel, plane), data[HEIGHT]), b.add(line, top)), data[WIDTH])
            self._set(self._offsets, k, b.add(start, left))

    def _set(self, wholes: Value, place: int, value: Value) -> None:
        b = self._lanes.builder
        b.store(value, b.gep(wholes, [self._lanes.index(place)], source_etype=_WHOLE))

    def read(self, group: Value, row: Value, rows: Value) -> None:
        """Sines and cosines of a block's pixels, at rows_of of turning."""
        lanes, data, b = self._lanes, self._data, self._lanes.builder
        with b.if_else(self._in_place) as (in_place, gathered):
            with in_place:
                self._places(group, row)
                for k in range(self._taps):
                    offset = lanes.whole(self._offsets, k)
                    self._set(self.rows_of, 2 * k, offset)
                    self._set(self.rows_of, 2 * k + 1, b.add(data[NUMBERS], offset))
            with gathered:
                self._gather(group, row, rows)
                for k in range(2 * self._taps):
                    self._set(self.rows_of, k, lanes.times(self._length, k))

    def _gather(self, group: Value, row: Value, rows: Value) -> None:
        lanes, data, b = self._lanes, self._data, self._lanes.builder
        numbers = _pixels(lanes, data)
        with lanes.loop(rows) as i:
            self._places(group, b.add(row, i))
            copy_rows(
                lanes,
                data.floats(IMAGES),
                numbers,
                self._offsets,
                self._taps,
                data[ACROSS],
                lanes.move(self.pixels, b.mul(i, data[COLUMNS])),
                self._length,
                data[COLUMNS],
            )
        patches = b.mul(rows, data[COLUMNS])
        size = self.filled(patches)
        with lanes.loop(self._taps) as k:
            # What was copied from behind the last row: no patch, and 0 times NaN would not be 0.
            self.zeros(lanes.move(self.pixels, b.mul(k, self._length)), patches, size)
        turn(lanes, self.pixels, data.floats(WAVES), self._taps, self._gathered, self._length, size)

    def blank(self, products: Value, count: int, rows: Value, size: Value) -> None:
        """Make products 0 that belong to no patch but were read in place: (count, BLOCK_LENGTH), the first not kept."""
        lanes, data, b = self._lanes, self._data, self._lanes.builder
        with b.if_then(self._in_place):
            for k in range(1, count):
                own = lanes.move(products, lanes.times(self._length, k))
                with lanes.loop(rows) as i:
                    start = b.mul(i, data[PITCH])
                    self.zeros(own, b.add(start, data[COLUMNS]), b.add(start, data[PITCH]))
                self.zeros(own, b.mul(rows, data[PITCH]), size)

    def scatter(self, slopes: Value, group: Value, row: Value, rows: Value) -> None:
        """Adds slopes (taps, BLOCK_LENGTH) to the gradient of the pixels they belong to."""
        lanes, data, b = self._lanes, self._data, self._lanes.builder
        with lanes.loop(rows) as i:
            self._places(group, b.add(row, i))
            here = lanes.move(slopes, b.mul(i, data[PITCH]))
            add_rows(
                lanes,
                here,
                self._length,
                data.floats(TO_IMAGES),
                self._offsets,
                self._taps,
                data[ACROSS],
                data[COLUMNS],
            )

    def exchange(self, group: Value, row: Value, rows: Value, block: Value, out: bool) -> None:
        """Copies the results of a block (OUTS, BLOCK_LENGTH) to their places in OUT, or from there if not out."""
        lanes, data, b = self._lanes, self._data, self._lanes.builder
        columns, outs, pitch, height = data[COLUMNS], data[OUTS], data[PITCH], data[ROWS]
        first = b.udiv(row, height)
        images = lanes.plus(b.sub(b.udiv(lanes.plus(b.add(row, rows), -1), height), first), 1)
        with lanes.loop(images) as k:
            image = b.add(first, k)
            edge = b.mul(image, height)
            # Rows of one image lie together, and so they do in the block if no columns are left out.
            start = b.select(b.icmp_signed(">", row, edge), row, edge)
            end, below = b.add(row, rows), b.add(edge, height)
            together = b.sub(lanes.least(end, below), start)
            whole = b.icmp_signed("==", pitch, columns)
            count = b.select(whole, b.mul(together, columns), columns)
            lines = b.select(whole, lanes.index(1), together)
            place = b.add(b.mul(b.mul(b.add(b.mul(image, data[GROUPS]), group), outs), height), b.sub(start, edge))
            with lanes.loop(outs) as r:
                here = b.add(b.mul(r, self._length), b.mul(b.sub(start, row), pitch))
                there = b.mul(b.add(place, b.mul(r, height)), columns)
                inside, outside = (lanes.move(block, here), pitch), (lanes.move(data.floats(OUT), there), columns)
                copy_block(lanes, *(inside + outside if out else outside + inside), count, lines)


def _planes(lanes: Lanes, data: Data) -> None:
    b = lanes.builder
    images, planes, waves, numbers = data.floats(IMAGES), data.floats(PLANES), data.floats(WAVES), data[NUMBERS]
    count = _pixels(lanes, data)
    vectors = b.udiv(count, lanes.index(LANES))
    rest = data.memory()
    with data.parts() as part:
        first, last = (lanes.times(b.udiv(b.mul(vectors, k), data[PARTS]), LANES) for k in (part, lanes.plus(part, 1)))
        turn(lanes, lanes.move(images, first), waves, 1, lanes.move(planes, first), numbers, b.sub(last, first))
        with b.if_then(b.icmp_signed("==", part, lanes.index(0))):
            whole = lanes.times(vectors, LANES)
            with lanes.loop(LANES) as k:
                lanes.write(ir.Constant(lanes.scalar, 0), rest, k)
            with lanes.loop(b.sub(count, whole)) as k:
                lanes.write(lanes.read(images, b.add(whole, k)), rest, k)
            turn(lanes, rest, waves, 1, lanes.move(planes, whole), numbers, lanes.index(LANES))
            with lanes.loop(b.sub(numbers, lanes.plus(whole, LANES))) as k:
                for plane in (planes, lanes.move(planes, numbers)):
                    lanes.write(ir.Constant(lanes.scalar, 0), plane, lanes.plus(b.add(whole, k), LANES))


def _forward(lanes: Lanes, data: Data, left: int, right: int, angles: int) -> None:
    b, taps, each = lanes.builder, (left + right) * angles, (2 + angles) ** (left + right)
    own = _Blocks(lanes, data, taps)
    result, none, last = own.rows(data[OUTS]), lanes.index(0), b.mul(data[BATCH], data[ROWS])
    with data.parts() as part:
        row, rows = own.block(none, last, part)
        size = own.filled(b.mul(rows, data[PITCH]))
        with lanes.loop(data[GROUPS]) as g:
            own.read(g, row, rows)
            matrices = lanes.move(data.floats(MATRICES), b.mul(g, lanes.times(data[OUTS], each)))
            length = data[BLOCK_LENGTH]
            evaluate(lanes, left, right, angles, own.turning, own.rows_of, matrices, data[OUTS], result, length, size)
            own.exchange(g, row, rows, result, out=True)


def _backward(lanes: Lanes, data: Data, left: int, right: int, angles: int) -> None:
    b, taps = lanes.builder, (left + right) * angles
    n_left, n_right = (2 + angles) ** left, (2 + angles) ** right
    own, length, outs = _Blocks(lanes, data, taps), data[BLOCK_LENGTH], data[OUTS]
    grad, u, v = own.rows(outs), own.rows(n_left), own.rows(n_right)
    none, numbers = lanes.index(0), lanes.times(outs, n_left * n_right)
    # What is no patch must add nothing.
    own.zeros(grad, none, b.mul(outs, length))
    with data.parts() as part:
        first, last = (
            b.mul(b.udiv(b.mul(data[BATCH], k), data[PARTS]), data[ROWS]) for k in (part, lanes.plus(part, 1))
        )
        with lanes.loop(own.count(first, last)) as number, lanes.loop(data[GROUPS]) as g:
            row, rows = own.block(first, last, number)
            patches = b.mul(rows, data[PITCH])
            size = own.filled(patches)
            own.exchange(g, row, rows, grad, out=False)
            with lanes.loop(outs) as r:
                own.zeros(lanes.move(grad, b.mul(r, length)), patches, size)
            own.read(g, row, rows)
            features = left, right, angles, own.turning, own.rows_of
            with b.if_then(b.icmp_signed("!=", data[TO_MATRICES], none)):
                keep_products(lanes, *features, u, v, length, size)
                # There the gradient is 0, but times NaN, of another group's pixels too, that would not be 0.
                own.blank(u, n_left, rows, size)
                own.blank(v, n_right, rows, size)
                place = b.mul(b.add(b.mul(part, data[GROUPS]), g), numbers)
                target = lanes.move(data.floats(TO_MATRICES), place)
                add_outer(lanes, n_left, n_right, u, v, grad, outs, target, length, size)
            with b.if_then(b.icmp_signed("!=", data[TO_IMAGES], none)):
                matrices = lanes.move(data.floats(MATRICES), b.mul(g, numbers))
                pull_back(lanes, *features, data.floats(WAVES), matrices, outs, grad, own.pixels, length, size)
                own.scatter(own.pixels, g, row, rows)


@cache
def planes_task(bits: int) -> Task:
    """Task that fills PLANES, some pixels a part, and zeros behind them; bits as forward_task's."""
    return task(_planes, "planes", bits)


@cache
def forward_task(left: int, right: int, angles: int, bits: int) -> Task:
    """Task that fills OUT, a block a part.

    Args:
        left: Wires whose products are u.
        right: Wires whose products are v.
        angles: Angles of a wire, 1 or 2.
        bits: 32 or 64, of a float.
    """
    name = f"patches_{left}_{right}_{angles}"
    return task(lambda lanes, data: _forward(lanes, data, left, right, angles), name, bits)


@cache
def backward_task(left: int, right: int, angles: int, bits: int) -> Task:
    """Task that fills TO_IMAGES and each part's TO_MATRICES, a range of images a part; arguments as forward_task's."""
    name = f"patches_back_{left}_{right}_{angles}"
    return task(lambda lanes, data: _backward(lanes, data, left, right, angles), name, bits)
