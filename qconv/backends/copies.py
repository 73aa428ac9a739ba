"""Copying and adding up rows of numbers in compiled tasks, every number or every second one.

Rows are short, so what does not fill a vector matters. Copies may spoil what comes behind a row, which the next row
repairs; sums overlap the vector before.
"""

from __future__ import annotations

from collections.abc import Callable

from qconv.backends.lanes import Lanes, Value

SHORT = 8
SLACK = 16  # the longest vector


def copy_block(lanes: Lanes, source: Value, apart: Value, target: Value, off: Value, count: Value, rows: Value) -> None:
    """target[i off + j] = source[i apart + j] for all rows i and all j < count."""
    b = lanes.builder
    last = b.sub(count, lanes.index(lanes.size))
    with b.if_else(b.icmp_signed(">=", last, lanes.index(0))) as (long, short):
        with long, lanes.loop(rows) as row:
            here, there = lanes.move(source, b.mul(row, apart)), lanes.move(target, b.mul(row, off))
            with lanes.loop(lanes.vectors(lanes.plus(count, lanes.size - 1))) as index:
                # The last vector overlaps the one before.
                first = lanes.least(lanes.times(index, lanes.size), last)
                lanes.store(lanes.load(here, first), there, first)
        with short, lanes.loop(rows) as row, lanes.loop(count) as j:
            value = lanes.read(source, b.add(b.mul(row, apart), j))
            lanes.write(value, target, b.add(b.mul(row, off), j))


def copy_rows(
    lanes: Lanes,
    source: Value,
    numbers: Value,
    offsets: Value,
    rows: int,
    step: Value,
    target: Value,
    length: Value,
    count: Value,
) -> None:
    """target[k length + j] = source[offsets[k] + step j] for all j < count, source having so many numbers.

    Up to SLACK numbers behind each row of the target are spoilt.
    """
    b = lanes.builder
    furthest = lanes.index(0)
    for k in range(rows):
        offset = lanes.whole(offsets, k)
        furthest = b.select(b.icmp_signed(">", offset, furthest), offset, furthest)
    # Whole vectors are read, which must not reach beyond the end.
    end = b.add(furthest, b.mul(step, lanes.plus(count, SLACK)))
    inside = b.icmp_signed("<=", end, numbers)

    def vectors(apart: int) -> None:
        with lanes.loop(rows) as k:
            start, there = lanes.move(source, lanes.whole(offsets, k)), lanes.move(target, b.mul(k, length))
            with lanes.loop(lanes.vectors(lanes.plus(count, lanes.size - 1))) as index:
                first = lanes.times(index, lanes.size)
                place = lanes.times(first, apart)
                value = lanes.load(start, place)
                if apart == 2:
                    rest = lanes.load(start, lanes.plus(place, lanes.size))
                    value = lanes.shuffle(value, rest, list(range(0, 2 * lanes.size, 2)))
                lanes.store(value, there, first)

    def numbers_one_by_one() -> None:
        with lanes.loop(rows) as k, lanes.loop(count) as j:
            value = lanes.read(source, b.add(lanes.whole(offsets, k), b.mul(step, j)))
            lanes.write(value, target, b.add(b.mul(k, length), j))

    _by_step(lanes, step, inside, vectors, numbers_one_by_one)


def add_rows(
    lanes: Lanes,
    source: Value,
    length: Value,
    target: Value,
    offsets: Value,
    rows: int,
    step: Value,
    count: Value,
) -> None:
    """target[offsets[k] + step j] += source[k length + j] for all j < count."""
    b, short = lanes.builder, Lanes(lanes.builder, lanes.bits, SHORT)
    last = b.sub(count, lanes.index(SHORT))

    def vectors(apart: int) -> None:
        with lanes.loop(rows) as k:
            to, here = lanes.move(target, lanes.whole(offsets, k)), lanes.move(source, b.mul(k, length))
            with lanes.loop(short.vectors(lanes.plus(count, SHORT - 1))) as index:
                wanted = lanes.times(index, SHORT)
                first = lanes.least(wanted, last)
                # What the vector before added is not added again.
                value = short.from_lane(short.load(here, first), b.sub(wanted, first))
                place = lanes.times(first, apart)
                # Of two vectors, the second starts one number early, so that nothing behind the last is touched.
                spread = ((0, [0, 8, 1, 8, 2, 8, 3, 8]), (SHORT - 1, [8, 4, 8, 5, 8, 6, 8, 7]))
                for shift, places in ((0, list(range(SHORT))),) if apart == 1 else spread:
                    there = lanes.plus(place, shift)
                    part = short.shuffle(value, short.constant(0), places)
                    short.store(short.add(short.load(to, there), part), to, there)

    def numbers_one_by_one() -> None:
        with lanes.loop(rows) as k, lanes.loop(count) as j:
            there = b.add(lanes.whole(offsets, k), b.mul(step, j))
            value = lanes.read(source, b.add(b.mul(k, length), j))
            lanes.write(b.fadd(lanes.read(target, there), value), target, there)

    _by_step(lanes, step, b.icmp_signed(">=", last, lanes.index(0)), vectors, numbers_one_by_one)


def _by_step(
    lanes: Lanes, step: Value, vectors_fit: Value, vectors: Callable[[int], None], others: Callable[[], None]
) -> None:
    """vectors(step) for steps of 1 and 2 where they fit, else the others."""
    b = lanes.builder
    one, two = (b.and_(vectors_fit, b.icmp_signed("==", step, lanes.index(k))) for k in (1, 2))
    with b.if_else(one) as (first, rest):
        with first:
            vectors(1)
        with rest, b.if_else(two) as (second, last):
            with second:
                vectors(2)
            with last:
                others()
