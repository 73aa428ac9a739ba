"""Copying and adding up rows of numbers in compiled loops, every number or every second one."""

from __future__ import annotations

from typing import Any

from qconv.backends.lanes import Lanes, Value, vector_code
from qconv.backends.tasks import loop

# Rows are short, so what does not fill a vector matters: the last vector of a row overlaps the one before it.
SHORT = 8


def _overlapping(lanes: Lanes, count: Value) -> Any:
    """(lanes of SHORT numbers, a loop over vectors that cover `count` >= SHORT numbers, where vector i starts)."""
    short, b = Lanes(lanes.builder, lanes.number, SHORT), lanes.builder
    vectors = b.udiv(lanes.plus(count, SHORT - 1), lanes.index(SHORT))
    last = b.sub(count, lanes.index(SHORT))

    def start(index: Value) -> tuple[Value, Value]:
        wanted = lanes.times(index, SHORT)
        first = b.select(b.icmp_signed("<", wanted, last), wanted, last)
        return first, b.sub(wanted, first)

    return short, short.loop(vectors), start


@vector_code
def _copy_vectors(lanes: Lanes, step: Any, source: Any, start: Any, target: Any, to: Any, count: Any) -> None:
    """target[to + j] = source[start + step j], step 1 or 2."""
    short, vectors, overlapping = _overlapping(lanes, count)
    with vectors as index:
        first, _ = overlapping(index)
        place = short.plus(start, short.times(first, step))
        value = short.load(source, place)
        if step == 2:
            # Shifted by one, so that nothing behind the last number is read.
            rest = short.load(source, short.plus(place, SHORT - 1))
            value = short.shuffle(value, rest, [0, 2, 4, 6, 9, 11, 13, 15])
        short.store(value, target, short.plus(to, first))


@vector_code
def _add_vectors(lanes: Lanes, step: Any, source: Any, start: Any, target: Any, to: Any, count: Any) -> None:
    """target[to + step j] += source[start + j], step 1 or 2."""
    short, vectors, overlapping = _overlapping(lanes, count)
    with vectors as index:
        first, done = overlapping(index)
        place = short.plus(to, short.times(first, step))
        value = short.from_lane(short.load(source, short.plus(start, first)), done)
        if step == 1:
            short.store(short.add(short.load(target, place), value), target, place)
        else:
            zero = short.constant(0)
            for shift, places in ((0, [0, 8, 1, 8, 2, 8, 3, 8]), (SHORT - 1, [8, 4, 8, 5, 8, 6, 8, 7])):
                here = short.plus(place, shift)
                part = short.shuffle(value, zero, places)
                short.store(short.add(short.load(target, here), part), target, here)


@loop
def copy_row(source: Any, start: int, step: int, target: Any, to: int, count: int) -> None:
    """target[to + j] = source[start + step j]."""
    if step == 1 and count >= SHORT:
        _copy_vectors(1, source, start, target, to, count)
    elif step == 2 and count >= SHORT:
        _copy_vectors(2, source, start, target, to, count)
    else:
        for j in range(count):
            target[to + j] = source[start + step * j]


@loop
def add_row(source: Any, start: int, target: Any, to: int, step: int, count: int) -> None:
    """target[to + step j] += source[start + j]."""
    if step == 1 and count >= SHORT:
        _add_vectors(1, source, start, target, to, count)
    elif step == 2 and count >= SHORT:
        _add_vectors(2, source, start, target, to, count)
    else:
        for j in range(count):
            target[to + step * j] += source[start + j]
