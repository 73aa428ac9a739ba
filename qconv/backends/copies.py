"""Copying and adding up rows of numbers in compiled loops, every number or every second one."""

from __future__ import annotations

from typing import Any

from qconv.backends.lanes import Lanes, vector_code
from qconv.backends.tasks import loop

# Rows are short, so what does not fill a vector matters, and so does a function call: what follows is emitted where it
# is used. Copies may spoil what comes behind a row, which the next row repairs; sums overlap the vector before.
SHORT = 8
SLACK = 16  # the longest vector


@vector_code
def _copy_block(
    lanes: Lanes, source: Any, start: Any, apart: Any, target: Any, to: Any, off: Any, count: Any, rows: Any
) -> None:
    b = lanes.builder
    last = b.sub(count, lanes.index(lanes.size))
    vectors = b.udiv(lanes.plus(count, lanes.size - 1), lanes.index(lanes.size))
    with lanes.loop(rows) as row:
        here, there = lanes.plus(start, b.mul(row, apart)), lanes.plus(to, b.mul(row, off))
        with lanes.loop(vectors) as index:
            wanted = lanes.times(index, lanes.size)
            # The last vector overlaps the one before.
            first = b.select(b.icmp_signed("<", wanted, last), wanted, last)
            lanes.store(lanes.load(source, lanes.plus(here, first)), target, lanes.plus(there, first))


@loop
def copy_block(source: Any, start: int, apart: int, target: Any, to: int, off: int, count: int, rows: int) -> None:
    """target[to + i off + j] = source[start + i apart + j] for all rows i and all j < count."""
    if count >= SLACK:
        _copy_block(source, start, apart, target, to, off, count, rows)
    else:
        for i in range(rows):
            for j in range(count):
                target[to + i * off + j] = source[start + i * apart + j]


@vector_code
def _copy_rows(
    lanes: Lanes, step: Any, source: Any, offsets: Any, rows: Any, target: Any, to: Any, length: Any, count: Any
) -> None:
    b = lanes.builder
    vectors = b.udiv(lanes.plus(count, lanes.size - 1), lanes.index(lanes.size))
    with lanes.loop(rows) as k:
        start, here = lanes.whole(offsets, k), lanes.plus(to, b.mul(k, length))
        with lanes.loop(vectors) as index:
            first = lanes.times(index, lanes.size)
            place = lanes.plus(start, lanes.times(first, step))
            value = lanes.load(source, place)
            if step == 2:
                rest = lanes.load(source, lanes.plus(place, lanes.size))
                value = lanes.shuffle(value, rest, list(range(0, 2 * lanes.size, 2)))
            lanes.store(value, target, lanes.plus(here, first))


@loop
def copy_rows(source: Any, offsets: Any, step: int, target: Any, to: int, length: int, count: int) -> None:
    """target[to + k length + j] = source[offsets[k] + step j] for all j < count.

    Up to SLACK numbers behind each row of the target are spoilt.
    """
    furthest = 0
    for k in range(len(offsets)):
        furthest = max(furthest, offsets[k])
    # Whole vectors are read, which must not reach beyond the end.
    if step <= 2 and furthest + step * (count + SLACK) <= len(source):
        if step == 1:
            _copy_rows(1, source, offsets, len(offsets), target, to, length, count)
        else:
            _copy_rows(2, source, offsets, len(offsets), target, to, length, count)
    else:
        for k in range(len(offsets)):
            for j in range(count):
                target[to + k * length + j] = source[offsets[k] + step * j]


@vector_code
def _add_rows(
    lanes: Lanes, step: Any, source: Any, start: Any, length: Any, target: Any, offsets: Any, rows: Any, count: Any
) -> None:
    short, b = Lanes(lanes.builder, lanes.number, SHORT), lanes.builder
    vectors = b.udiv(lanes.plus(count, SHORT - 1), lanes.index(SHORT))
    last = b.sub(count, lanes.index(SHORT))
    with lanes.loop(rows) as k:
        to, here = lanes.whole(offsets, k), lanes.plus(start, b.mul(k, length))
        with lanes.loop(vectors) as index:
            wanted = lanes.times(index, SHORT)
            first = b.select(b.icmp_signed("<", wanted, last), wanted, last)
            # What the vector before added is not added again.
            value = short.from_lane(short.load(source, lanes.plus(here, first)), b.sub(wanted, first))
            place = lanes.plus(to, lanes.times(first, step))
            if step == 1:
                short.store(short.add(short.load(target, place), value), target, place)
            else:
                # The second vector starts one number early, so that nothing behind the last one is touched.
                for shift, places in ((0, [0, 8, 1, 8, 2, 8, 3, 8]), (SHORT - 1, [8, 4, 8, 5, 8, 6, 8, 7])):
                    there = lanes.plus(place, shift)
                    part = short.shuffle(value, short.constant(0), places)
                    short.store(short.add(short.load(target, there), part), target, there)


@loop
def add_rows(source: Any, start: int, length: int, target: Any, offsets: Any, step: int, count: int) -> None:
    """target[offsets[k] + step j] += source[start + k length + j] for all j < count."""
    if step == 1 and count >= SHORT:
        _add_rows(1, source, start, length, target, offsets, len(offsets), count)
    elif step == 2 and count >= SHORT:
        _add_rows(2, source, start, length, target, offsets, len(offsets), count)
    else:
        for k in range(len(offsets)):
            for j in range(count):
                target[offsets[k] + step * j] += source[start + k * length + j]
