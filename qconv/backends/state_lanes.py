"""Vector code on states: what gates do to tiles of patches, and the slopes on the way back.

A tile is a vector of patches, one lane each, with all its rows one behind the other: cosine and sine of every wave (an
angle that reads a feature), (a, b) of every chain of gates, the state as real and imaginary parts, and more.

Two operations are all there is. A spin is what a chain of gates on one wire does between two entangling ones, the
unitary [[a, -b*], [b, a*]], with an (a, b) of every patch's own where the chain reads features. A turn is exp(-i t P)
for a Pauli string P: it rotates pairs of rows by the angle t, and comes from a chain of its own, of rotations about Y,
where (a, b) = (cos t, sin t). Tables say which rows are meant, so permutations of amplitudes cost nothing.

On the way back operations are undone on the state and on its adjoint, the gradient by the state. Before each, g is read
off, the slopes with dL = g . r for a small rotation exp(-i r . (X, Y, Z)) after the chain. A gate about an axis has the
slope axis . g once g is carried back to where the gate stands, so all gates of a chain cost one g.

Source: Jones & Gacon (arXiv:2009.02823) for adjoint differentiation.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from qconv.backends.lanes import Lanes, Value


def times(lanes: Lanes, unitary: list[Value], pair: list[Value]) -> list[Value]:
    """[[a, -b*], [b, a*]] times two amplitudes, all as real and imaginary parts.

    The pair may be the (a, b) of another unitary: the result is that of the product. Re a is None for 0.
    """
    (a, i, b, j), (p, r, q, s) = unitary, pair
    fma, fms = lanes.fma, lanes.fms

    def first(value: Value) -> Value:
        return lanes.constant(0) if a is None else lanes.mul(a, value)

    return [
        fms(b, q, fms(j, s, fms(i, r, first(p)))),
        fms(b, s, fma(j, q, fma(i, p, first(r)))),
        fma(b, p, fms(j, r, fma(i, s, first(q)))),
        fma(b, r, fma(j, p, fms(i, q, first(s)))),
    ]


def inverse(lanes: Lanes, unitary: list[Value]) -> list[Value]:
    """(a, b) of the inverse."""
    return [unitary[0], *(lanes.builder.fneg(value) for value in unitary[1:])]


def generator(lanes: Lanes, axis: list[Value]) -> list[Value]:
    """-i times axis . (X, Y, Z), as (a, b) with None for Re a = 0."""
    x, y, z = axis
    return [None, lanes.builder.fneg(z), y, lanes.builder.fneg(x)]


@dataclass(frozen=True)
class Tiles:
    """Tiles of patches. Rows are given as places within a tile, in numbers.

    Args:
        lanes: Where the code goes.
        rows: Pointer to the first tile.
        stride: Numbers of a tile.
        count: Tiles.
        patches: Patches in them; the last lanes may be idle.
        entries: Pointer to the tables of rows.
    """

    lanes: Lanes
    rows: Value
    stride: Value
    count: Value
    patches: Value
    entries: Value

    @contextmanager
    def _each(self) -> Iterator[Value]:
        with self.lanes.loop(self.count) as tile:
            yield self.lanes.move(self.rows, self.lanes.builder.mul(self.stride, tile))

    def _load(self, here: Value, row: Value, count: int) -> list[Value]:
        return [self.lanes.load(here, self.lanes.plus(row, k * self.lanes.size)) for k in range(count)]

    def _store(self, values: list[Value], here: Value, row: Value) -> None:
        for k, value in enumerate(values):
            self.lanes.store(value, here, self.lanes.plus(row, k * self.lanes.size))

    @contextmanager
    def _entries(self, first: Value, count: Value, size: int) -> Iterator[list[Value]]:
        """Repeat for so many entries of a table, from a place on: their `size` rows."""
        lanes = self.lanes
        with lanes.loop(count) as k:
            start = lanes.plus(first, lanes.times(k, size))
            yield [lanes.fixed(self.entries, lanes.plus(start, j)) for j in range(size)]

    @contextmanager
    def _outside(self, start: Value, step: Value) -> Iterator[tuple[Value, Value, Value, Value]]:
        """Repeat for every tile: its pointer, where its first patch is in memory, its patches, if they are a vector."""
        lanes, b = self.lanes, self.lanes.builder
        with lanes.loop(self.count) as tile:
            first = lanes.times(tile, lanes.size)
            left = b.sub(self.patches, first)
            full = b.icmp_signed(">=", left, lanes.index(lanes.size))
            count = b.select(full, lanes.index(lanes.size), left)
            together = b.and_(full, b.icmp_signed("==", step, lanes.index(1)))
            here = lanes.move(self.rows, b.mul(self.stride, tile))
            yield here, lanes.plus(start, b.mul(step, first)), count, together

    def gather(self, row: Value, memory: Value, start: Value, step: Value) -> None:
        """memory[start + step * patch] to a row; idle lanes get 0."""
        lanes, b = self.lanes, self.lanes.builder
        with self._outside(start, step) as (here, place, count, together), b.if_else(together) as (vector, single):
            with vector:
                lanes.store(lanes.load(memory, place), here, row)
            with single:
                lanes.store(lanes.constant(0), here, row)
                with lanes.loop(count) as k:
                    value = lanes.read(memory, lanes.plus(place, b.mul(step, k)))
                    lanes.write(value, here, lanes.plus(row, k))

    def scatter(self, row: Value, memory: Value, start: Value, step: Value, factor: Value | None = None) -> None:
        """A row to memory[start + step * patch]; with a factor, that times the row is added to what is there."""
        lanes, b = self.lanes, self.lanes.builder
        with self._outside(start, step) as (here, place, count, together), b.if_else(together) as (vector, single):
            with vector:
                value = lanes.load(here, row)
                value = value if factor is None else lanes.fma(factor, value, lanes.load(memory, place))
                lanes.store(value, memory, place)
            with single:
                if factor is not None:
                    lanes.store(lanes.mul(factor, lanes.load(here, row)), here, row)
                with lanes.loop(count) as k:
                    target = lanes.plus(place, b.mul(step, k))
                    number = lanes.read(here, lanes.plus(row, k))
                    if factor is not None:
                        number = b.fadd(number, lanes.read(memory, target))
                    lanes.write(number, memory, target)

    def clear(self, row: Value, count: Value) -> None:
        """Zeros in several rows."""
        with self._each() as here, self.lanes.loop(count) as k:
            self._store([self.lanes.constant(0)], here, self.lanes.plus(row, self.lanes.times(k, self.lanes.size)))

    def to_wave(self, row: Value, scale: Value, offset: Value) -> None:
        """Cosine and sine of pi (scale * feature + offset), in place of the feature."""
        lanes = self.lanes
        with self._each() as here:
            sine, cosine = lanes.sine_cosine(lanes.fma(lanes.load(here, row), scale, offset))
            self._store([cosine, sine], here, row)

    def fixed(self, row: Value, numbers: Value) -> None:
        """(a, b) of a chain that reads no feature."""
        unitary = [self.lanes.broadcast(numbers, k) for k in range(4)]
        with self._each() as here:
            self._store(unitary, here, row)

    def start(self, row: Value, numbers: Value, wave: Value) -> None:
        """(a, b) of a chain's shared gates, the first feature turning them: numbers[:4] cos t + numbers[4:] sin t."""
        lanes = self.lanes
        shared = [lanes.broadcast(numbers, k) for k in range(8)]
        with self._each() as here:
            cosine, sine = self._load(here, wave, 2)
            values = [lanes.fma(cosine, shared[k], lanes.mul(sine, shared[4 + k])) for k in range(4)]
            self._store(values, here, row)

    def onward(self, row: Value, axis: Value, wave: Value) -> None:
        """(a, b) after one more feature has turned it about an axis."""
        lanes = self.lanes
        turn = generator(lanes, [lanes.broadcast(axis, k) for k in range(3)])
        with self._each() as here:
            cosine, sine = self._load(here, wave, 2)
            before = self._load(here, row, 4)
            turned = times(lanes, turn, before)
            values = [lanes.fma(cosine, u, lanes.mul(sine, v)) for u, v in zip(before, turned, strict=True)]
            self._store(values, here, row)

    def product(self, chains: Value, state: Value, wires: Value) -> None:
        """The first state: every wire is (a, b) of its own first chain."""
        lanes, b = self.lanes, self.lanes.builder
        with self._each() as here:
            self._store([lanes.constant(1), lanes.constant(0)], here, state)
            size = lanes.variable(lanes.index(1))
            with lanes.loop(wires) as k:
                # The last wire first: every other one doubles what is there.
                wire = b.sub(lanes.plus(wires, -1), k)
                unitary = self._load(here, lanes.plus(chains, lanes.times(wire, 4 * lanes.size)), 4)
                count = lanes.value(size)
                with lanes.loop(count) as m:
                    low = lanes.plus(state, lanes.times(m, 2 * lanes.size))
                    high = lanes.plus(low, lanes.times(count, 2 * lanes.size))
                    p, r = self._load(here, low, 2)
                    for row, (u, v) in ((low, unitary[:2]), (high, unitary[2:])):
                        real, imaginary = lanes.fms(v, r, lanes.mul(u, p)), lanes.fma(v, p, lanes.mul(u, r))
                        self._store([real, imaginary], here, row)
                lanes.set(size, lanes.times(count, 2))

    def spin(self, row: Value, first: Value, count: Value) -> None:
        """A chain's unitary on pairs of amplitudes."""
        with self._each() as here:
            unitary = self._load(here, row, 4)
            with self._entries(first, count, 4) as places:
                self._spread(times(self.lanes, unitary, self._collect(here, places)), here, places)

    def _collect(self, here: Value, places: list[Value]) -> list[Value]:
        return [self.lanes.load(here, place) for place in places]

    def _spread(self, values: list[Value], here: Value, places: list[Value]) -> None:
        for place, value in zip(places, values, strict=True):
            self.lanes.store(value, here, place)

    def turn(self, row: Value, first: Value, count: Value) -> None:
        """A rotation of pairs of rows."""
        with self._each() as here:
            cosine, _, sine, _ = self._load(here, row, 4)
            with self._entries(first, count, 2) as places:
                self._spread(self._rotated(cosine, sine, *self._collect(here, places)), here, places)

    def _rotated(self, cosine: Value, sine: Value, u: Value, v: Value) -> list[Value]:
        lanes = self.lanes
        return [lanes.fma(sine, v, lanes.mul(cosine, u)), lanes.fms(sine, u, lanes.mul(cosine, v))]

    def read(self, result: Value, first: Value, added: Value, less: Value, constant: Value) -> None:
        """An observable: a constant plus twice the products of so many pairs of rows, less those of so many further."""
        lanes = self.lanes
        start = lanes.spread(lanes.builder.sitofp(constant, lanes.scalar))
        rest = lanes.plus(first, lanes.times(added, 2))
        with self._each() as here:
            total = lanes.variable(lanes.constant(0))
            for begin, count, combine in ((first, added, lanes.fma), (rest, less, lanes.fms)):
                with self._entries(begin, count, 2) as places:
                    u, v = self._collect(here, places)
                    lanes.set(total, combine(u, v, lanes.value(total)))
            lanes.store(lanes.fma(lanes.value(total), lanes.constant(2), start), here, result)

    def seed(self, gradient: Value, apart: Value, first: Value, added: Value, less: Value) -> None:
        """Adds an observable's share to the adjoint, `apart` behind the state."""
        lanes = self.lanes
        rest = lanes.plus(first, lanes.times(added, 2))
        with self._each() as here:
            twice = lanes.mul(lanes.load(here, gradient), lanes.constant(2))
            for begin, count, factor in ((first, added, twice), (rest, less, lanes.builder.fneg(twice))):
                with self._entries(begin, count, 2) as places:
                    values = self._collect(here, places)
                    for place, value in zip(places, reversed(values), strict=True):
                        target = lanes.plus(place, apart)
                        lanes.store(lanes.fma(factor, value, lanes.load(here, target)), here, target)

    def unspin(self, row: Value, apart: Value, slopes: Value, first: Value, count: Value, *, undo: bool) -> None:
        """g after a spin; state and adjoint before it, if asked for."""
        lanes = self.lanes
        with self._each() as here:
            back = inverse(lanes, self._load(here, row, 4))
            sums = [lanes.variable(lanes.constant(0)) for _ in range(3)]
            with self._entries(first, count, 4) as places:
                duals = [lanes.plus(place, apart) for place in places]
                state, adjoint = self._collect(here, places), self._collect(here, duals)
                (p, r, q, s), minus = state, lanes.builder.fneg
                # -i times X, Y and Z on the pair.
                changes = (s, minus(q), r, minus(p)), (minus(q), minus(s), p, r), (r, minus(p), minus(s), q)
                for total, change in zip(sums, changes, strict=True):
                    for u, v in zip(adjoint, change, strict=True):
                        lanes.set(total, lanes.fma(u, v, lanes.value(total)))
                if undo:
                    self._spread(times(lanes, back, state), here, places)
                    self._spread(times(lanes, back, adjoint), here, duals)
            self._store([lanes.value(total) for total in sums], here, slopes)

    def unturn(self, row: Value, apart: Value, slopes: Value, first: Value, count: Value) -> None:
        """g after a turn; state and adjoint before it."""
        lanes = self.lanes
        with self._each() as here:
            cosine, _, sine, _ = self._load(here, row, 4)
            back = lanes.builder.fneg(sine)
            total = lanes.variable(lanes.constant(0))
            with self._entries(first, count, 2) as places:
                duals = [lanes.plus(place, apart) for place in places]
                (u, v), (to_u, to_v) = self._collect(here, places), self._collect(here, duals)
                lanes.set(total, lanes.fms(to_v, u, lanes.fma(to_u, v, lanes.value(total))))
                self._spread(self._rotated(cosine, back, u, v), here, places)
                self._spread(self._rotated(cosine, back, to_u, to_v), here, duals)
            self._store([lanes.constant(0), lanes.value(total), lanes.constant(0)], here, slopes)

    def total(self, slopes: Value, sums: Value) -> None:
        """Adds g of all patches to three numbers."""
        lanes = self.lanes
        totals = [lanes.variable(lanes.constant(0)) for _ in range(3)]
        with self._each() as here:
            for total, value in zip(totals, self._load(here, slopes, 3), strict=True):
                lanes.set(total, lanes.add(lanes.value(total), value))
        for k, total in enumerate(totals):
            lanes.write(lanes.builder.fadd(lanes.read(sums, k), lanes.sum(lanes.value(total))), sums, k)

    def back(self, slopes: Value, axis: Value, wave: Value, slope: Value, carry: Value) -> None:
        """Adds the slope of a feature's wave to a row; g before the feature, if `carry`."""
        lanes = self.lanes
        unit = [lanes.broadcast(axis, k) for k in range(3)]
        with self._each() as here:
            g = self._load(here, slopes, 3)
            along = lanes.fma(unit[0], g[0], lanes.fma(unit[1], g[1], lanes.mul(unit[2], g[2])))
            lanes.store(lanes.add(lanes.load(here, slope), along), here, slope)
            with lanes.builder.if_then(carry):
                # Turned back by the full angle, twice that of the wave: Rodrigues' formula.
                cosine, sine = self._load(here, wave, 2)
                whole = lanes.fms(sine, sine, lanes.mul(cosine, cosine))
                twice = lanes.mul(lanes.add(cosine, cosine), sine)
                rest = lanes.mul(lanes.mul(lanes.add(sine, sine), sine), along)
                turned = []
                for k in range(3):
                    across = lanes.fms(unit[k - 1], g[k - 2], lanes.mul(unit[k - 2], g[k - 1]))
                    turned.append(lanes.fms(twice, across, lanes.fma(whole, g[k], lanes.mul(rest, unit[k]))))
                self._store(turned, here, slopes)
