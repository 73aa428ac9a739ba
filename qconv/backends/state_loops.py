"""Compiled loops over blocks of patches that run a state_program, forward and backward.

What happens to a block is emitted once and reads the circuit from tables: all circuits share the compiled code.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from llvmlite import ir

from qconv.backends.lanes import Lanes, Value
from qconv.backends.state_lanes import Tiles, generator, inverse, times
from qconv.backends.state_program import (
    COLUMNS,
    COUNT,
    ENTRY,
    FEATURE,
    FEATURES,
    FIRST,
    KIND,
    NUMBERS,
    PAIRS,
    REACH,
    SLOPES,
    SPIN,
    START,
    WAVE,
    WEIGHT,
)
from qconv.backends.tasks import OWN, Data, Task, task
from qconv.backends.tasks import PARTS as PARTS
from qconv.backends.threads import ROOM as ROOM

# Numbers of a task's int64 data, see tasks.py. Pointers are addresses, steps are in numbers.
CHUNK, PATCHES, FILTERS = range(OWN, OWN + 3)  # a part is CHUNK patches
INPUTS, INPUT_STEP, INPUT_NEXT = range(8, 11)  # pointer to inputs, steps to the next patch and the next feature
WEIGHTS, WEIGHT_STEP, WEIGHT_NEXT = range(11, 14)  # pointer to weights, steps to the next filter and the next weight
OUT, OUT_STEP, OUT_FILTER, OUT_NEXT = range(14, 18)  # result or its gradient; steps to the next patch, filter, value
TO_INPUTS, TO_WEIGHTS = 18, 19  # pointers to (n_inputs, PATCHES), or 0 if not wanted, and (FILTERS, N_WEIGHTS)
SHARED, SUMS = 20, 21  # pointers to (FILTERS, SHARED_LENGTH) and, g summed over patches, (PARTS, FILTERS, SUMS_LENGTH)
TILES, STRIDE = 22, 23  # tiles in a block, numbers in a tile
CALL = 24  # so many numbers belong to a call, the others to a circuit
SHARED_LENGTH, SUMS_LENGTH, WIRES, N_WEIGHTS = range(CALL, CALL + 4)
WAVES, WAVE_INPUTS, WAVE_NUMBERS = range(28, 31)  # angles that read features: how many, which ones, (scale, offset)
CHAINS, CHAIN_TABLE, CHAIN_WAVES, GATE_TABLE, GATE_NUMBERS, ENTRIES = range(31, 37)  # see state_program
READS, READ_TABLE = 37, 38  # observables, pointer to (READS, 4): first entry, added, less, constant
LENGTH = 39


class _Block:
    """A block of patches from features to values, or from the values' gradients to those of features.

    A tile's rows: cosine and sine of every wave, (a, b) of every chain, the state, a value or its gradient; and on the
    way back the adjoint, g, and the slope of every wave.

    Args:
        lanes: Where the code goes.
        rows: Pointer to room for TILES tiles.
        data: A task's numbers.
        patch: Number of the first patch.
        patches: How many, at least 1.
    """

    def __init__(self, lanes: Lanes, rows: Value, data: Data, patch: Value, patches: Value) -> None:
        b = lanes.builder
        self.lanes, self.data, self.patch = lanes, data, patch
        count = b.udiv(lanes.plus(patches, lanes.size - 1), lanes.index(lanes.size))
        self.tiles = Tiles(lanes, rows, self.data[STRIDE], count, patches, self.data.wholes(ENTRIES))
        self.wires = self.data[WIRES]
        self.size = b.shl(lanes.index(2), self.wires)
        self.chains = lanes.times(self.data[WAVES], 2 * lanes.size)
        self.state = lanes.plus(self.chains, lanes.times(self.data[CHAINS], 4 * lanes.size))
        self.value = lanes.plus(self.state, lanes.times(self.size, lanes.size))
        self.adjoint = lanes.plus(self.value, lanes.size)
        self.apart = b.sub(self.adjoint, self.state)
        self.slopes = lanes.plus(self.adjoint, lanes.times(self.size, lanes.size))
        self.wave_slopes = lanes.plus(self.slopes, 3 * lanes.size)

    def wave(self, k: Value) -> Value:
        """Row of a wave."""
        return self.lanes.times(k, 2 * self.lanes.size)

    def chain(self, c: Value) -> Value:
        """Row of a chain."""
        return self.lanes.plus(self.chains, self.lanes.times(c, 4 * self.lanes.size))

    @contextmanager
    def filters(self) -> Iterator[tuple[Value, Value]]:
        """Repeat for every filter: its number, and what its chains are made of."""
        lanes, data = self.lanes, self.data
        with lanes.loop(data[FILTERS]) as f:
            yield f, lanes.move(data.floats(SHARED), lanes.builder.mul(f, data[SHARED_LENGTH]))

    def outside(self, f: Value, k: Value) -> tuple[Value, Value, Value]:
        """Where an observable's values are in memory: pointer, place of the first patch, step."""
        b, data = self.lanes.builder, self.data
        steps = ((self.patch, OUT_STEP), (f, OUT_FILTER), (k, OUT_NEXT))
        first, second, third = (b.mul(count, data[step]) for count, step in steps)
        return data.floats(OUT), b.add(b.add(first, second), third), data[OUT_STEP]

    def read_features(self) -> None:
        """All waves."""
        lanes, b, data = self.lanes, self.lanes.builder, self.data
        numbers = data.floats(WAVE_NUMBERS)
        with lanes.loop(data[WAVES]) as k:
            (which,) = data.table(WAVE_INPUTS, k, 1)
            start = b.add(b.mul(self.patch, data[INPUT_STEP]), b.mul(which, data[INPUT_NEXT]))
            self.tiles.gather(self.wave(k), data.floats(INPUTS), start, data[INPUT_STEP])
            scale, offset = (lanes.broadcast(numbers, lanes.plus(lanes.times(k, 2), j)) for j in (0, 1))
            self.tiles.to_wave(self.wave(k), scale, offset)

    def evolve(self, shared: Value) -> None:
        """From waves to the final state."""
        lanes, b, data, tiles = self.lanes, self.lanes.builder, self.data, self.tiles
        with lanes.loop(data[CHAINS]) as c:
            chain = data.table(CHAIN_TABLE, c, COLUMNS)
            row, numbers = self.chain(c), lanes.move(shared, chain[NUMBERS])
            with b.if_else(b.icmp_signed("==", chain[FEATURES], lanes.index(0))) as (fixed, turned):
                with fixed:
                    tiles.fixed(row, numbers)
                with turned:
                    tiles.start(row, numbers, self.wave(*data.table(CHAIN_WAVES, chain[WAVE], 1)))
                    with lanes.loop(lanes.plus(chain[FEATURES], -1)) as k:
                        (wave,) = data.table(CHAIN_WAVES, lanes.plus(b.add(chain[WAVE], k), 1), 1)
                        axis = lanes.move(numbers, lanes.plus(lanes.times(k, 3), 11))
                        tiles.onward(row, axis, self.wave(wave))
        tiles.product(self.chains, self.state, self.wires)
        with lanes.loop(b.sub(data[CHAINS], self.wires)) as k:
            c = b.add(self.wires, k)
            chain = data.table(CHAIN_TABLE, c, COLUMNS)
            with b.if_else(b.icmp_signed("==", chain[KIND], lanes.index(SPIN))) as (spin, turn):
                with spin:
                    tiles.spin(self.chain(c), chain[ENTRY], chain[PAIRS])
                with turn:
                    tiles.turn(self.chain(c), chain[ENTRY], chain[PAIRS])

    def retrace(self, shared: Value, sums: Value) -> None:
        """From the final state and its adjoint to the slopes of all chains."""
        lanes, b, data, tiles = self.lanes, self.lanes.builder, self.data, self.tiles
        with lanes.loop(data[CHAINS]) as k:
            c = b.sub(lanes.plus(data[CHAINS], -1), k)
            chain = data.table(CHAIN_TABLE, c, COLUMNS)
            place = self.chain(c), self.apart, self.slopes, chain[ENTRY], chain[PAIRS]
            with b.if_else(b.icmp_signed("==", chain[KIND], lanes.index(START))) as (start, later):
                with start:
                    # Nothing stands before the first state.
                    tiles.unspin(*place, undo=False)
                with later, b.if_else(b.icmp_signed("==", chain[KIND], lanes.index(SPIN))) as (spin, turn):
                    with spin:
                        tiles.unspin(*place, undo=True)
                    with turn:
                        tiles.unturn(*place)
            self._read_chain(chain, shared, sums)

    def _read_chain(self, chain: list[Value], shared: Value, sums: Value) -> None:
        lanes, b, data, tiles = self.lanes, self.lanes.builder, self.data, self.tiles
        sums = lanes.move(sums, chain[SLOPES])
        with b.if_then(b.icmp_signed(">=", chain[REACH], lanes.index(0))):
            tiles.total(self.slopes, sums)
        with lanes.loop(chain[FEATURES]) as k:
            feature = b.sub(lanes.plus(chain[FEATURES], -1), k)
            (wave,) = data.table(CHAIN_WAVES, b.add(chain[WAVE], feature), 1)
            axis = lanes.move(shared, lanes.plus(b.add(chain[NUMBERS], lanes.times(feature, 3)), 8))
            weights = b.icmp_signed("<", k, chain[REACH])
            carry = b.or_(weights, b.icmp_signed(">", feature, lanes.index(0)))
            slope = lanes.plus(self.wave_slopes, lanes.times(wave, lanes.size))
            tiles.back(self.slopes, axis, self.wave(wave), slope, carry)
            with b.if_then(weights):
                tiles.total(self.slopes, lanes.move(sums, lanes.plus(lanes.times(k, 3), 3)))

    def values(self) -> None:
        """From features to the values of all filters."""
        lanes, data = self.lanes, self.data
        self.read_features()
        with self.filters() as (f, shared):
            self.evolve(shared)
            with lanes.loop(data[READS]) as k:
                self.tiles.read(self.value, *data.table(READ_TABLE, k, 4))
                self.tiles.scatter(self.value, *self.outside(f, k))

    def slopes_of_values(self, part: Value) -> None:
        """From features and the values' gradients to those of features and chains."""
        lanes, b, data, tiles = self.lanes, self.lanes.builder, self.data, self.tiles
        self.read_features()
        tiles.clear(self.wave_slopes, data[WAVES])
        with self.filters() as (f, shared):
            self.evolve(shared)
            tiles.clear(self.adjoint, self.size)
            with lanes.loop(data[READS]) as k:
                first, added, less, _ = data.table(READ_TABLE, k, 4)
                # Idle lanes get 0, and so add nothing to any sum.
                tiles.gather(self.value, *self.outside(f, k))
                tiles.seed(self.value, self.apart, first, added, less)
            place = b.mul(b.add(b.mul(part, data[FILTERS]), f), data[SUMS_LENGTH])
            self.retrace(shared, lanes.move(data.floats(SUMS), place))
        with b.if_then(b.icmp_signed("!=", data[TO_INPUTS], lanes.index(0))), lanes.loop(data[WAVES]) as k:
            (which,) = data.table(WAVE_INPUTS, k, 1)
            # Slopes are of half angles: a wave's numbers in units of pi.
            scale = lanes.mul(lanes.broadcast(data.floats(WAVE_NUMBERS), lanes.times(k, 2)), lanes.constant(math.pi))
            start = b.add(b.mul(which, data[PATCHES]), self.patch)
            slope = lanes.plus(self.wave_slopes, lanes.times(k, lanes.size))
            tiles.scatter(slope, data.floats(TO_INPUTS), start, lanes.index(1), scale)


class _Walk:
    """The gates of one chain from last to first, in double precision: what all patches share."""

    def __init__(self, lanes: Lanes, data: Data, f: Value, weights: Value) -> None:
        self.lanes, self.data, self.f, self.weights = lanes, data, f, weights
        self.double = Lanes(lanes.builder, 64, 1)
        # The product of the gates passed so far that read no feature.
        self.after = [self.double.variable(self.double.constant(value)) for value in (1, 0, 0, 0)]

    def number(self, pointer: Value, place: Value) -> Value:
        """A float of the layer's precision."""
        value = self.lanes.read(pointer, place)
        single = self.lanes.bits == 32
        return self.double.spread(self.lanes.builder.fpext(value, ir.DoubleType()) if single else value)

    def write(self, value: Value, pointer: Value, place: Value) -> None:
        """A float of the layer's precision."""
        scalar = self.lanes.builder.extract_element(value, ir.Constant(ir.IntType(32), 0))
        single = self.lanes.bits == 32
        self.lanes.write(self.lanes.builder.fptrunc(scalar, ir.FloatType()) if single else scalar, pointer, place)

    def product(self) -> list[Value]:
        """(a, b) of the gates passed."""
        return [self.double.value(part) for part in self.after]

    @contextmanager
    def gates(self, chain: list[Value]) -> Iterator[tuple[Value, Value, list[Value], list[Value]]]:
        """Repeat for every gate: its kind and index, its numbers, and its axis as it stands at the chain's end."""
        double, b, data = self.double, self.lanes.builder, self.data
        for part, value in zip(self.after, (1, 0, 0, 0), strict=True):
            double.set(part, double.constant(value))
        with self.lanes.loop(chain[COUNT]) as k:
            place = b.sub(self.lanes.plus(b.add(chain[FIRST], chain[COUNT]), -1), k)
            kind, about, index = data.table(GATE_TABLE, place, 3)
            pointer = data.doubles(GATE_NUMBERS)
            numbers = [double.broadcast(pointer, self.lanes.plus(self.lanes.times(place, 4), j)) for j in range(4)]
            one, zero = double.constant(1), double.constant(0)
            axis = [b.select(b.icmp_signed("==", about, self.lanes.index(j)), one, zero) for j in range(3)]
            after = self.product()
            turned = times(double, times(double, after, [zero, *generator(double, axis)[1:]]), inverse(double, after))
            yield kind, index, numbers, [b.fneg(turned[3]), turned[2], b.fneg(turned[1])]
            with b.if_then(b.icmp_signed("!=", kind, self.lanes.index(FEATURE))):
                own = [double.variable(number) for number in numbers]
                with b.if_then(b.icmp_signed("==", kind, self.lanes.index(WEIGHT))):
                    start = b.add(b.mul(self.f, data[WEIGHT_STEP]), b.mul(index, data[WEIGHT_NEXT]))
                    half = double.fma(self.number(self.weights, start), numbers[0], numbers[1])
                    sine, cosine = double.sine_cosine(half)
                    for part, value in zip(own[1:], generator(double, axis)[1:], strict=True):
                        double.set(part, double.mul(sine, value))
                    double.set(own[0], cosine)
                for part, value in zip(self.after, times(double, after, [double.value(v) for v in own]), strict=True):
                    double.set(part, value)


def _prepare(lanes: Lanes, weights: Value, data: Data) -> None:
    """Fills SHARED: of every chain the product of its gates that read no feature, the same turned about the axis of the
    first feature, and the axes of all features as they stand at its end."""
    b = lanes.builder
    with lanes.loop(data[FILTERS]) as f, lanes.loop(data[CHAINS]) as c:
        chain, walk = data.table(CHAIN_TABLE, c, COLUMNS), _Walk(lanes, data, f, weights)
        double = walk.double
        shared = lanes.move(data.floats(SHARED), b.add(b.mul(f, data[SHARED_LENGTH]), chain[NUMBERS]))
        place = lanes.variable(lanes.plus(lanes.times(chain[FEATURES], 3), 8))
        first = [double.variable(double.constant(0)) for _ in range(3)]
        with walk.gates(chain) as (kind, _, own, axis), b.if_then(b.icmp_signed("==", kind, lanes.index(FEATURE))):
            lanes.set(place, lanes.plus(lanes.value(place), -3))
            for k, value in enumerate(axis):
                signed = double.mul(value, own[0])
                walk.write(signed, shared, lanes.plus(lanes.value(place), k))
                double.set(first[k], signed)
        after = walk.product()
        turned = times(double, generator(double, [double.value(part) for part in first]), after)
        for k, value in enumerate([*after, *turned]):
            walk.write(value, shared, lanes.index(k))


def _finish(lanes: Lanes, weights: Value, data: Data) -> None:
    """Adds to TO_WEIGHTS from SUMS, part by part."""
    b = lanes.builder
    with lanes.loop(data[FILTERS]) as f, lanes.loop(data[CHAINS]) as c:
        chain, walk = data.table(CHAIN_TABLE, c, COLUMNS), _Walk(lanes, data, f, weights)
        double = walk.double
        g = [double.variable(double.constant(0)) for _ in range(3)]
        place = lanes.variable(b.add(b.mul(f, data[SUMS_LENGTH]), chain[SLOPES]))

        def collect() -> None:
            for part in g:
                double.set(part, double.constant(0))
            with lanes.loop(data[PARTS]) as k:
                start = b.add(lanes.value(place), b.mul(k, b.mul(data[FILTERS], data[SUMS_LENGTH])))
                for j, part in enumerate(g):
                    found = walk.number(data.floats(SUMS), lanes.plus(start, j))
                    double.set(part, double.add(double.value(part), found))
            lanes.set(place, lanes.plus(lanes.value(place), 3))

        collect()
        with walk.gates(chain) as (kind, index, own, axis):
            with b.if_then(b.icmp_signed("==", kind, lanes.index(FEATURE))):
                collect()
            with b.if_then(b.icmp_signed("==", kind, lanes.index(WEIGHT))):
                x, y, z = (double.mul(value, double.value(part)) for value, part in zip(axis, g, strict=True))
                target = b.add(b.mul(f, data[N_WEIGHTS]), index)
                before = walk.number(data.floats(TO_WEIGHTS), target)
                half = double.mul(own[0], double.constant(math.pi))
                slope = double.fma(half, double.add(double.add(x, y), z), before)
                walk.write(slope, data.floats(TO_WEIGHTS), target)


def _shared(lanes: Lanes, data: Data, backward: bool) -> None:
    (_finish if backward else _prepare)(lanes, data.floats(WEIGHTS), data)


def _blocks(lanes: Lanes, data: Data, backward: bool) -> None:
    b, rows = lanes.builder, data.memory()
    size = lanes.times(data[TILES], lanes.size)

    with data.parts() as part:
        first = b.mul(data[CHUNK], part)
        last = lanes.least(data[PATCHES], b.add(first, data[CHUNK]))
        with lanes.loop(b.udiv(lanes.plus(b.add(b.sub(last, first), size), -1), size)) as k:
            patch = b.add(first, b.mul(k, size))
            block = _Block(lanes, rows, data, patch, lanes.least(size, b.sub(last, patch)))
            if backward:
                block.slopes_of_values(part)
            else:
                block.values()


@cache
def shared_task(backward: bool, bits: int) -> Task:
    """Task that fills SHARED, or backward adds to TO_WEIGHTS, in one call by one thread.

    Args:
        backward: Which of the two.
        bits: 32 or 64, of a float.
    """
    name = "states_finish" if backward else "states_prepare"
    return task(lambda lanes, data: _shared(lanes, data, backward), name, bits)


@cache
def block_task(backward: bool, bits: int) -> Task:
    """Task that fills OUT, or backward adds to TO_INPUTS and SUMS from the gradient in OUT; for arguments see above."""
    name = "states_back" if backward else "states"
    return task(lambda lanes, data: _blocks(lanes, data, backward), name, bits)
