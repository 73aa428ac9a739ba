"""Compiled loops of the fused kernel: coefficients from weights, and the weights' gradient.

Observables are evolved backwards through the circuit in the Pauli basis. Of each string the numbers of all observables
lie side by side, LANES to a vector. Angles are in double precision.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from llvmlite import ir

from qconv.backends.lanes import BYTES, Lanes, Value
from qconv.backends.tasks import OWN, Data, Task, task
from qconv.backends.tasks import PARTS as PARTS
from qconv.backends.threads import ROOM as ROOM

# Numbers of a task's int64 data, see tasks.py; a part is a filter.
WEIGHTS, N_WEIGHTS = range(OWN, OWN + 2)  # WEIGHTS: pointer to (PARTS, N_WEIGHTS)
OPS, STEPS, ANGLES = 7, 8, 9  # pointers to (OPS, 4): kind, weight (-1: none), first and last entry; (OPS, 2) float64
PLACES, FACTORS = 10, 11  # pointers to the entries' (target, source) and float64 factors
SIZE, CHUNKS, START = 12, 13, 14  # strings, vectors of observables; pointer to (SIZE, CHUNKS * LANES)
FINAL, KEPT, N_KEPT = 15, 16, 17  # pointers to (PARTS, SIZE, ...), (PARTS, N_KEPT, SIZE, ...)
READ, READ_FACTORS, READS = 18, 19, 20  # pointers to (READS, 2): coefficient and string; their float64 factors
MATRICES, NUMBERS, PER_GROUP, OBSERVABLES, OUTS = range(21, 26)  # pointer to (groups, OUTS, NUMBERS)
COPIES, COPY = 26, 27  # how many of MATRICES to add up (backward), and numbers between two
GRADIENT = 28  # pointer to (PARTS, N_WEIGHTS)
LENGTH = 29

LANES = 4
ROTATION, CONSTANT = 0, 1


def room(size: int, bits: int) -> int:
    """Bytes that a thread needs on the way back, for so many numbers of a filter."""
    return -(-2 * size * bits // 8 // BYTES) * BYTES


class _Filter:
    """A filter's observables on their way through the circuit.

    Args:
        lanes: Where the code goes.
        data: A task's numbers.
        number: Which filter.
    """

    def __init__(self, lanes: Lanes, data: Data, number: Value) -> None:
        self._data, self._number = data, number
        self.lanes, self._double = Lanes(lanes.builder, lanes.bits, LANES), Lanes(lanes.builder, 64, 1)
        b = lanes.builder
        self._vectors, self._width = b.mul(data[SIZE], data[CHUNKS]), lanes.times(data[CHUNKS], LANES)
        self._length = b.mul(data[SIZE], self._width)
        self.numbers = lanes.move(data.floats(FINAL), b.mul(number, self._length))

    def copy(self, target: Value, source: Value | None) -> None:
        """All numbers of one array to another, or zeros."""
        lanes = self.lanes
        with lanes.loop(self._vectors) as k:
            place = lanes.times(k, LANES)
            lanes.store(lanes.constant(0) if source is None else lanes.load(source, place), target, place)

    def kept(self, stage: Value) -> Value:
        """Pointer to what was kept before an operation that is no rotation."""
        b, data = self.lanes.builder, self._data
        number = b.add(b.mul(self._number, data[N_KEPT]), stage)
        return self.lanes.move(data.floats(KEPT), b.mul(number, self._length))

    def number(self, value: Value) -> Value:
        """A double as a scalar of the layer's precision."""
        return value if self.lanes.bits == 64 else self.lanes.builder.fptrunc(value, ir.FloatType())

    def wave(self, op: Value, index: Value) -> tuple[Value, Value]:
        """(cosine, sine) of a rotation's angle, doubles."""
        double, b, data = self._double, self.lanes.builder, self._data
        pointer, two = data.doubles(ANGLES), self.lanes.times(op, 2)
        angle = double.variable(double.broadcast(pointer, self.lanes.plus(two, 1)))
        with b.if_then(b.icmp_signed(">=", index, self.lanes.index(0))):
            place = b.add(b.mul(self._number, data[N_WEIGHTS]), index)
            weight = self.lanes.read(data.floats(WEIGHTS), place)
            weight = double.spread(weight if self.lanes.bits == 64 else b.fpext(weight, ir.DoubleType()))
            double.set(angle, double.fma(weight, double.broadcast(pointer, two), double.value(angle)))
        sine, cosine = double.sine_cosine(double.value(angle))
        zero = ir.Constant(ir.IntType(32), 0)
        return b.extract_element(cosine, zero), b.extract_element(sine, zero)

    def scale(self, op: Value) -> Value:
        """What a rotation multiplies its weight by, a double."""
        return self._double.read(self._data.doubles(ANGLES), self.lanes.times(op, 2))

    @contextmanager
    def entries(self, first: Value, last: Value) -> Iterator[tuple[Value, Value, Value]]:
        """Repeat for entries: where their (target, source) are, and their factor, a double."""
        b, lanes, data = self.lanes.builder, self.lanes, self._data
        with lanes.loop(b.sub(last, first)) as k:
            e = b.add(first, k)
            one, two = (b.mul(place, self._width) for place in data.table(PLACES, e, 2))
            yield one, two, self._double.read(data.doubles(FACTORS), e)

    @contextmanager
    def chunks(self, *rows: Value) -> Iterator[list[Value]]:
        """Repeat for the vectors of strings: where each is."""
        lanes = self.lanes
        with lanes.loop(self._data[CHUNKS]) as k:
            yield [lanes.builder.add(row, lanes.times(k, LANES)) for row in rows]

    def add_scaled(self, target: Value, there: Value, source: Value, here: Value, factor: Value) -> None:
        """target[there] += factor source[here], of all observables."""
        lanes = self.lanes
        with self.chunks(there, here) as (to, place):
            lanes.store(lanes.fma(factor, lanes.load(source, place), lanes.load(target, to)), target, to)

    @contextmanager
    def reads(self) -> Iterator[tuple[Value, Value]]:
        """Repeat for all outputs kept: the observable, and where its coefficients start."""
        lanes, b, data = self.lanes, self.lanes.builder, self._data
        group = b.udiv(self._number, data[PER_GROUP])
        place = b.mul(b.urem(self._number, data[PER_GROUP]), data[OBSERVABLES])
        left = b.sub(data[OUTS], place)
        with lanes.loop(lanes.least(left, data[OBSERVABLES])) as o:
            yield o, b.mul(b.add(b.add(b.mul(group, data[OUTS]), place), o), data[NUMBERS])

    @contextmanager
    def projection(self, o: Value) -> Iterator[tuple[Value, Value, Value]]:
        """Repeat for what is read: the coefficient, where an observable's number is, and the factor."""
        lanes, b, data = self.lanes, self.lanes.builder, self._data
        with lanes.loop(data[READS]) as e:
            coefficient, string = data.table(READ, e, 2)
            factor = self.number(self._double.read(data.doubles(READ_FACTORS), e))
            yield coefficient, b.add(b.mul(string, self._width), o), factor


def _forward(lanes: Lanes, data: Data) -> None:
    b = lanes.builder
    with data.parts() as part:
        own = _Filter(lanes, data, part)
        short, c = own.lanes, own.numbers
        own.copy(c, data.floats(START))
        stage = lanes.variable(lanes.index(0))
        with lanes.loop(data[OPS]) as k:
            kind, index, first, last = data.table(STEPS, k, 4)
            with b.if_else(b.icmp_signed("==", kind, lanes.index(ROTATION))) as (rotation, other):
                with rotation:
                    cosine, sine = own.wave(k, index)
                    turn = short.spread(own.number(cosine))
                    with own.entries(first, last) as (one, two, factor):
                        shift = short.spread(own.number(b.fmul(factor, sine)))
                        # (a, b) of two strings become (cos a - sin b, cos b + sin a).
                        with own.chunks(one, two) as (here, there):
                            x, y = short.load(c, here), short.load(c, there)
                            short.store(short.fms(shift, y, short.mul(turn, x)), c, here)
                            short.store(short.fma(shift, x, short.mul(turn, y)), c, there)
                with other:
                    before = own.kept(lanes.value(stage))
                    lanes.set(stage, lanes.plus(lanes.value(stage), 1))
                    own.copy(before, c)
                    own.copy(c, None)
                    with own.entries(first, last) as (target, source, factor):
                        own.add_scaled(c, target, before, source, short.spread(own.number(factor)))
        matrices = data.floats(MATRICES)
        with own.reads() as (o, base):
            with lanes.loop(data[NUMBERS]) as k:
                lanes.write(ir.Constant(lanes.scalar, 0), matrices, b.add(base, k))
            with own.projection(o) as (coefficient, place, factor):
                target = b.add(base, coefficient)
                value = b.fmul(factor, lanes.read(c, place))
                lanes.write(b.fadd(lanes.read(matrices, target), value), matrices, target)


def _undo(own: _Filter, grads: Value, wave: tuple[Value, Value], first: Value, last: Value) -> Value:
    """Turns a rotation back, numbers and gradients; returns the angle's derivative, to be summed over the vector."""
    short, b, values = own.lanes, own.lanes.builder, own.numbers
    cosine, sine = wave
    turn, slope = short.spread(own.number(cosine)), short.variable(short.constant(0))
    with own.entries(first, last) as (one, two, factor):
        sign, shift = short.spread(own.number(factor)), short.spread(own.number(b.fmul(factor, sine)))
        with own.chunks(one, two) as (here, there):
            x, y = short.load(values, here), short.load(values, there)
            to_x, to_y = short.load(grads, here), short.load(grads, there)
            mixed = short.fms(to_x, y, short.mul(to_y, x))
            short.set(slope, short.fma(sign, mixed, short.value(slope)))
            short.store(short.fma(shift, y, short.mul(turn, x)), values, here)
            short.store(short.fms(shift, x, short.mul(turn, y)), values, there)
            short.store(short.fma(shift, to_y, short.mul(turn, to_x)), grads, here)
            short.store(short.fms(shift, to_x, short.mul(turn, to_y)), grads, there)
    return short.value(slope)


def _backward(lanes: Lanes, data: Data) -> None:
    b = lanes.builder
    g = data.memory()
    with data.parts() as part:
        own = _Filter(lanes, data, part)
        short, c = own.lanes, own.numbers
        scratch = lanes.move(g, b.mul(data[SIZE], lanes.times(data[CHUNKS], LANES)))
        own.copy(g, None)
        matrices, zero = data.floats(MATRICES), ir.Constant(lanes.scalar, 0)
        with own.reads() as (o, base), own.projection(o) as (coefficient, place, factor):
            total = lanes.variable(zero)
            # Always in the same order, so that results repeat bit for bit.
            with lanes.loop(data[COPIES]) as copy:
                source = b.add(b.add(b.mul(copy, data[COPY]), base), coefficient)
                lanes.set(total, b.fadd(lanes.value(total), lanes.read(matrices, source)))
            lanes.write(b.fadd(lanes.read(g, place), b.fmul(factor, lanes.value(total))), g, place)
        gradient = lanes.move(data.floats(GRADIENT), b.mul(part, data[N_WEIGHTS]))
        with lanes.loop(data[N_WEIGHTS]) as k:
            lanes.write(zero, gradient, k)
        stage = lanes.variable(data[N_KEPT])
        with lanes.loop(data[OPS]) as forth:
            k = b.sub(lanes.plus(data[OPS], -1), forth)
            kind, index, first, last = data.table(STEPS, k, 4)
            with b.if_else(b.icmp_signed("==", kind, lanes.index(ROTATION))) as (rotation, other):
                with rotation:
                    slope = _undo(own, g, own.wave(k, index), first, last)
                    with b.if_then(b.icmp_signed(">=", index, lanes.index(0))):
                        # Angles are in units of pi.
                        scale = b.fmul(own.scale(k), ir.Constant(ir.DoubleType(), math.pi))
                        total = b.fmul(own.number(scale), short.sum(slope))
                        lanes.write(b.fadd(lanes.read(gradient, index), total), gradient, index)
                with other:
                    lanes.set(stage, lanes.plus(lanes.value(stage), -1))
                    own.copy(scratch, g)
                    own.copy(g, None)
                    own.copy(c, own.kept(lanes.value(stage)))
                    with own.entries(first, last) as (target, source, factor):
                        own.add_scaled(g, source, scratch, target, short.spread(own.number(factor)))


@cache
def forward_task(bits: int) -> Task:
    """Task that fills MATRICES, FINAL and KEPT for a filter a part; bits 32 or 64, of a float."""
    return task(_forward, "coefficients", bits)


@cache
def backward_task(bits: int) -> Task:
    """Task that fills GRADIENT from the sum of all COPIES of MATRICES; FINAL is overwritten."""
    return task(_backward, "coefficients_back", bits)
