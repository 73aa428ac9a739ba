"""Compiled loops that run a program of sums (see sums.py), a block of patches at a time, forward and backward.

A program is data: sums in an order of evaluation, each a few terms that name slots of a table. A slot holds one sum
for all patches of a block, and a term works on whole vectors of patches. So all circuits share the compiled code,
which costs a few instructions a term for tens of multiplications.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from qconv.backends.lanes import BYTES, Lanes, Value
from qconv.backends.tasks import OWN, Data, Task, task
from qconv.backends.tasks import PARTS as PARTS
from qconv.backends.threads import ROOM as ROOM

# Numbers of a task's int64 data, see tasks.py. Pointers are addresses; arrays are contiguous.
UNIT, UNITS, PATCHES = range(OWN, OWN + 3)  # patches come in UNITS units; a part is a number of whole ones
IMAGES, IMAGE, GROUP, DOWN, ACROSS = range(8, 13)  # pointer, and steps to the next image, group, patch below, patch
OUT, OUT_IMAGE, OUT_GROUP, PLANE = range(13, 17)  # the result or its gradient; steps to the next image, group, output
ROWS, COLUMNS = 17, 18  # of the patches of an image
GROUPS, OUTS, FILTERS = 19, 20, 21  # filters of a group; of its FILTERS * RESULTS outputs the first OUTS are kept
COEFFICIENTS, NUMBERS = 22, 23  # pointer to (GROUPS * FILTERS, NUMBERS)
WAVES, WAVE_INPUTS, TURNS = 24, 25, 26  # how many; pointers to the inputs they read and (WAVES, 2) scale, offset
CODE, SUMS, RESULTS, RESULT_SLOTS = range(27, 31)  # see train_code
BACK_CODE, SLOPE_SLOTS = 31, 32  # the same of the slopes' table
TABLE, SLOPES, KEPT, END = range(33, 37)  # where in a thread's memory they start, after pixels, and where it ends
TO_IMAGES, TO_COEFFICIENTS = 37, 38  # pointers to gradients (the latter's for every part), or 0 if not wanted
INPUTS = 39  # how many; behind it, from LENGTH on, the place of each one's first pixel
LENGTH = 40

FORWARD_TILE, BACKWARD_TILE = 8, 4  # vectors of patches in a block: few enough that what is worked on stays in cache


def block(bits: int, backward: bool) -> int:
    """Patches in a block, for numbers of so many bits."""
    return (BACKWARD_TILE if backward else FORWARD_TILE) * BYTES * 8 // bits


class _Reader:
    """Reads whole numbers one after the other."""

    def __init__(self, lanes: Lanes, code: Value) -> None:
        self._lanes, self._code = lanes, code
        self._place = lanes.variable(lanes.index(0))

    def __call__(self) -> Value:
        place = self._lanes.value(self._place)
        self._lanes.set(self._place, self._lanes.plus(place, 1))
        return self._lanes.fixed(self._code, place)


class _Table:
    """A table of slots, each `tile` vectors."""

    def __init__(self, lanes: Lanes, numbers: Value, tile: int) -> None:
        self._lanes, self._numbers, self._tile = lanes, numbers, tile

    def slot(self, number: Value) -> Value:
        """Pointer to a slot."""
        return self._lanes.move(self._numbers, self._lanes.times(number, self._tile * self._lanes.size))

    def load(self, slot: Value) -> list[Value]:
        """The vectors of a slot."""
        return [self._lanes.load(slot, k * self._lanes.size) for k in range(self._tile)]

    def store(self, slot: Value, vectors: list[Value]) -> None:
        """Change them."""
        for k, vector in enumerate(vectors):
            self._lanes.store(vector, slot, k * self._lanes.size)

    def fill(self, slot: Value, number: float) -> None:
        """Make all of them one number."""
        self.store(slot, [self._lanes.constant(number)] * self._tile)

    def add(self, slot: Value, factors: list[Value], vectors: list[Value]) -> None:
        """Add products."""
        self.store(slot, [self._lanes.fma(*three) for three in zip(factors, vectors, self.load(slot), strict=True)])


class _Block:
    """A block of patches on its way through a program.

    Args:
        lanes: Where the code goes.
        data: A task's numbers.
        tile: Vectors in a block.
    """

    def __init__(self, lanes: Lanes, data: Data, tile: int) -> None:
        self._lanes, self._data, self._tile = lanes, data, tile
        self.floats, self.wholes = data.floats, data.wholes
        start = data.memory()
        self._start, self.kept = start, lanes.move(start, self[KEPT])
        self.pixels = _Table(lanes, start, tile)
        self.table, self.slopes = (_Table(lanes, lanes.move(start, self[place]), tile) for place in (TABLE, SLOPES))

    def __getitem__(self, field: int) -> Value:
        return self._data[field]

    def clear(self, first: Value, last: Value) -> None:
        """Make a range of the memory, whole vectors, 0."""
        lanes = self._lanes
        with lanes.loop(lanes.vectors(lanes.builder.sub(last, first))) as k:
            lanes.store(lanes.constant(0), self._start, lanes.plus(first, lanes.times(k, lanes.size)))

    def coefficients(self, own: Value) -> Value:
        """Pointer to a filter's."""
        return self._lanes.move(self.floats(COEFFICIENTS), self._lanes.builder.mul(own, self[NUMBERS]))

    @contextmanager
    def blocks(self, part: Value) -> Iterator[tuple[Value, Value]]:
        """Repeat for all blocks of a part: first patch, how many."""
        lanes, b = self._lanes, self._lanes.builder
        first, last = (
            lanes.least(b.mul(b.udiv(b.mul(self[UNITS], k), self[PARTS]), self[UNIT]), self[PATCHES])
            for k in (part, lanes.plus(part, 1))
        )
        width = self._tile * lanes.size
        with lanes.loop(b.udiv(lanes.plus(b.sub(last, first), width - 1), lanes.index(width))) as k:
            start = b.add(first, lanes.times(k, width))
            yield start, lanes.least(b.sub(last, start), lanes.index(width))

    @contextmanager
    def _runs(self, start: Value, count: Value, group: Value) -> Iterator[tuple[Value, Value, Value, Value]]:
        """Repeat for all runs of patches, each within one row of one image: where a run starts in the block, how long
        it is, and where the pixels and outputs of its first patch start in memory."""
        lanes, b = self._lanes, self._lanes.builder
        end, columns = b.add(start, count), self[COLUMNS]
        top = b.udiv(start, columns)
        with lanes.loop(b.sub(lanes.plus(b.udiv(lanes.plus(end, -1), columns), 1), top)) as k:
            line = b.add(top, k)
            edge = b.mul(line, columns)
            first = b.select(b.icmp_signed(">", start, edge), start, edge)
            last = lanes.least(end, b.add(edge, columns))
            image, row = b.udiv(line, self[ROWS]), b.urem(line, self[ROWS])
            places = ((image, self[IMAGE]), (group, self[GROUP]), (row, self[DOWN]), (b.sub(first, edge), self[ACROSS]))
            pixel, out = lanes.index(0), b.sub(first, b.mul(image, self[PLANE]))
            for number, step in places:
                pixel = b.add(pixel, b.mul(number, step))
            for number, step in ((image, self[OUT_IMAGE]), (group, self[OUT_GROUP])):
                out = b.add(out, b.mul(number, step))
            yield b.sub(first, start), b.sub(last, first), pixel, out

    def gather(self, start: Value, count: Value, group: Value) -> None:
        """The pixels of all inputs."""
        lanes, b = self._lanes, self._lanes.builder
        with b.if_then(b.icmp_signed("<", count, lanes.index(self._tile * lanes.size))), lanes.loop(self[INPUTS]) as k:
            # What is beyond the last patch has the slope 0, but times another group's NaN that would not be 0.
            self.pixels.fill(self.pixels.slot(k), 0)
        self._move_pixels(start, count, group, self.floats(IMAGES), gather=True)

    def scatter(self, start: Value, count: Value, group: Value) -> None:
        """Add what is in the pixels' place to the gradient of images."""
        self._move_pixels(start, count, group, self.floats(TO_IMAGES), gather=False)

    def _move_pixels(self, start: Value, count: Value, group: Value, images: Value, gather: bool) -> None:
        lanes, b = self._lanes, self._lanes.builder
        with self._runs(start, count, group) as (begin, length, pixel, _), lanes.loop(self[INPUTS]) as k:
            row = lanes.move(self.pixels.slot(k), begin)
            memory = lanes.move(images, b.add(pixel, lanes.fixed(self._data.pointer, lanes.plus(k, LENGTH))))
            with lanes.loop(length) as j:
                place = b.mul(j, self[ACROSS])
                if gather:
                    lanes.write(lanes.read(memory, place), row, j)
                else:
                    lanes.write(lanes.add(lanes.read(memory, place), lanes.read(row, j)), memory, place)

    def move_outputs(self, start: Value, count: Value, group: Value, f: Value, backward: bool) -> None:
        """A filter's outputs to memory, or added to their slopes from there."""
        lanes, b = self._lanes, self._lanes.builder
        before = b.mul(f, self[RESULTS])
        kept = lanes.least(self[RESULTS], b.sub(self[OUTS], before))
        slots = self.wholes(SLOPE_SLOTS if backward else RESULT_SLOTS)
        with self._runs(start, count, group) as (begin, length, _, out), lanes.loop(kept) as k:
            slot = (self.slopes if backward else self.table).slot(lanes.fixed(slots, k))
            row = lanes.move(slot, begin)
            memory = lanes.move(self.floats(OUT), b.add(out, b.mul(b.add(before, k), self[PLANE])))
            with lanes.loop(length) as j:
                if backward:
                    lanes.write(lanes.add(lanes.read(row, j), lanes.read(memory, j)), row, j)
                else:
                    lanes.write(lanes.read(row, j), memory, j)

    def turn(self) -> None:
        """Sines and cosines, into the first slots after ONE's."""
        lanes, turns = self._lanes, self.floats(TURNS)
        self.table.fill(self.table.slot(lanes.index(0)), 1)
        with lanes.loop(self[WAVES]) as wave:
            scale, offset = (lanes.broadcast(turns, lanes.plus(lanes.times(wave, 2), k)) for k in (0, 1))
            values = self.pixels.load(self.pixels.slot(lanes.fixed(self.wholes(WAVE_INPUTS), wave)))
            both = [lanes.sine_cosine(lanes.fma(value, scale, offset)) for value in values]
            for k in (0, 1):
                self.table.store(self.table.slot(lanes.plus(lanes.times(wave, 2), 1 + k)), [pair[k] for pair in both])

    def turn_back(self) -> None:
        """The slopes of inputs, in their pixels' place, from those of sines and cosines."""
        lanes, turns = self._lanes, self.floats(TURNS)
        with lanes.loop(self[INPUTS]) as k:
            self.pixels.fill(self.pixels.slot(k), 0)
        with lanes.loop(self[WAVES]) as wave:
            scale = lanes.mul(lanes.broadcast(turns, lanes.times(wave, 2)), lanes.constant(math.pi))
            places = [lanes.plus(lanes.times(wave, 2), 1 + k) for k in (0, 1)]
            sine, cosine = (self.table.load(self.table.slot(place)) for place in places)
            to_sine, to_cosine = (self.slopes.load(self.slopes.slot(place)) for place in places)
            turned = [
                lanes.fms(b, s, lanes.mul(a, c)) for s, c, a, b in zip(sine, cosine, to_sine, to_cosine, strict=True)
            ]
            pixels = self.pixels.slot(lanes.fixed(self.wholes(WAVE_INPUTS), wave))
            self.pixels.add(pixels, [scale] * self._tile, turned)

    def evaluate(self, coefficients: Value) -> None:
        """All sums. For each, the code has how many terms of one operand and of two, its slot, and the terms:
        coefficient and slots."""
        lanes, table, read = self._lanes, self.table, _Reader(self._lanes, self.wholes(CODE))
        with lanes.loop(self[SUMS]):
            single, double, target = read(), read(), read()
            totals = [lanes.variable(lanes.constant(0)) for _ in range(self._tile)]
            with lanes.loop(single):
                factor, values = lanes.broadcast(coefficients, read()), table.load(table.slot(read()))
                for total, value in zip(totals, values, strict=True):
                    lanes.set(total, lanes.fma(factor, value, lanes.value(total)))
            with lanes.loop(double):
                factor, one, other = lanes.broadcast(coefficients, read()), table.slot(read()), table.slot(read())
                for total, a, b in zip(totals, table.load(one), table.load(other), strict=True):
                    lanes.set(total, lanes.fma(lanes.mul(factor, a), b, lanes.value(total)))
            table.store(table.slot(target), [lanes.value(total) for total in totals])

    def pull_back(self, coefficients: Value, kept: Value) -> None:
        """From the slopes of results to those of waves, and kept += those of coefficients, a vector each.

        The code has the sums backwards: how many terms of one operand and of two, the slope's slot, and the terms:
        coefficient, slots of the operands, slots of their slopes. A slope is 0 again when it was used.
        """
        lanes, table, slopes = self._lanes, self.table, self.slopes
        read = _Reader(lanes, self.wholes(BACK_CODE))
        with lanes.loop(self[SUMS]):
            single, double, own = read(), read(), slopes.slot(read())
            slope = slopes.load(own)
            slopes.fill(own, 0)
            for operands, terms in ((1, single), (2, double)):
                with lanes.loop(terms):
                    number = read()
                    factor, place = lanes.broadcast(coefficients, number), lanes.times(number, lanes.size)
                    values = [table.load(table.slot(read())) for _ in range(operands)]
                    targets = [slopes.slot(read()) for _ in range(operands)]
                    total = lanes.load(kept, place)
                    if operands == 1:
                        slopes.add(targets[0], [factor] * self._tile, slope)
                        for g, a in zip(slope, *values, strict=True):
                            total = lanes.fma(g, a, total)
                    else:
                        scaled = [lanes.mul(factor, g) for g in slope]
                        for target, other in zip(targets, reversed(values), strict=True):
                            slopes.add(target, scaled, other)
                        for g, a, b in zip(slope, *values, strict=True):
                            total = lanes.fma(lanes.mul(g, a), b, total)
                    lanes.store(total, kept, place)


def _forward(lanes: Lanes, data: Data) -> None:
    block = _Block(lanes, data, FORWARD_TILE)
    with data.parts() as part, block.blocks(part) as (start, count), lanes.loop(block[GROUPS]) as group:
        block.gather(start, count, group)
        block.turn()
        with lanes.loop(block[FILTERS]) as f:
            block.evaluate(block.coefficients(lanes.plus(lanes.builder.mul(group, block[FILTERS]), f)))
            block.move_outputs(start, count, group, f, backward=False)


def _backward(lanes: Lanes, data: Data) -> None:
    block = _Block(lanes, data, BACKWARD_TILE)
    with data.parts() as part:
        _pull_back(lanes, block, part)


def _pull_back(lanes: Lanes, block: _Block, part: Value) -> None:
    """A part of the gradient of images, and of that of coefficients."""
    b = lanes.builder
    filters = b.mul(block[GROUPS], block[FILTERS])
    numbers = b.mul(filters, block[NUMBERS])
    none = lanes.index(0)
    block.clear(block[SLOPES], block[END])
    with block.blocks(part) as (start, count), lanes.loop(block[GROUPS]) as group:
        block.gather(start, count, group)
        block.turn()
        with lanes.loop(block[FILTERS]) as f:
            own = b.add(b.mul(group, block[FILTERS]), f)
            block.evaluate(block.coefficients(own))
            block.move_outputs(start, count, group, f, backward=True)
            kept = lanes.move(block.kept, lanes.times(b.mul(own, block[NUMBERS]), lanes.size))
            block.pull_back(block.coefficients(own), kept)
        with b.if_then(b.icmp_signed("!=", block[TO_IMAGES], none)):
            block.turn_back()
            block.scatter(start, count, group)
        # The slopes of ONE and of waves, which no sum takes back.
        with lanes.loop(lanes.plus(lanes.times(block[WAVES], 2), 1)) as k:
            block.slopes.fill(block.slopes.slot(k), 0)
    with b.if_then(b.icmp_signed("!=", block[TO_COEFFICIENTS], none)), lanes.loop(numbers) as k:
        total = lanes.sum(lanes.load(block.kept, lanes.times(k, lanes.size)))
        lanes.write(total, block.floats(TO_COEFFICIENTS), b.add(b.mul(part, numbers), k))


@cache
def compiled_task(bits: int, backward: bool) -> Task:
    """Task that fills OUT; or that adds to TO_IMAGES and fills each part's TO_COEFFICIENTS.

    Args:
        bits: 32 or 64, of a float.
        backward: Which of the two.
    """
    return task(_backward, "sums_back", bits) if backward else task(_forward, "sums", bits)
