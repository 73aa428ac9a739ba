"""Compiled loops of the fused kernel: coefficients from weights, and the weights' gradient.

Observables are evolved backwards through the circuit in the Pauli basis. Of each string the numbers of all observables
lie side by side, LANES to a vector.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np

from qconv.backends.lanes import Lanes, vector_code
from qconv.backends.tasks import SOURCES, at, carray, take, task, task_data

# Numbers of a task's int64 data, see threads.py; a part is a filter.
TAKEN, PARTS, WEIGHTS, N_WEIGHTS = 0, 1, 2, 3  # WEIGHTS: pointer to (PARTS, N_WEIGHTS)
OPS, STEPS, ANGLES = 4, 5, 6  # pointers to (OPS, 4): kind, weight (-1: none), first and last entry; (OPS, 2) float64
PLACES, FACTORS = 7, 8  # pointers to the entries' (target, source) and float64 factors
SIZE, CHUNKS, START = 9, 10, 11  # strings, vectors of observables; pointer to (SIZE, CHUNKS * LANES)
FINAL, KEPT, N_KEPT = 12, 13, 14  # pointers to (PARTS, SIZE, ...), (PARTS, N_KEPT, SIZE, ...)
READ, READ_FACTORS, READS = 15, 16, 17  # pointers to (READS, 2): coefficient and string; their float64 factors
MATRICES, NUMBERS, PER_GROUP, OBSERVABLES, OUTS = 18, 19, 20, 21, 22  # pointer to (groups, OUTS, NUMBERS)
COPIES, COPY = 23, 24  # how many of MATRICES to add up (backward), and numbers between two
GRADIENT = 25  # pointer to (PARTS, N_WEIGHTS)
LENGTH = 26

LANES = 4
ROTATION, CONSTANT = 0, 1


@vector_code
def _rotate(lanes: Lanes, values: Any, first: Any, second: Any, cosine: Any, sine: Any, chunks: Any) -> None:
    """(a, b) of two strings become (cos a - sin b, cos b + sin a)."""
    short = Lanes(lanes.builder, lanes.number, LANES)
    turn, shift = short.spread(cosine), short.spread(sine)
    with short.loop(chunks) as chunk:
        here = short.plus(first, short.times(chunk, LANES))
        there = short.plus(second, short.times(chunk, LANES))
        a, b = short.load(values, here), short.load(values, there)
        short.store(short.fms(shift, b, short.mul(turn, a)), values, here)
        short.store(short.fma(shift, a, short.mul(turn, b)), values, there)


@vector_code
def _undo(
    lanes: Lanes,
    values: Any,
    grads: Any,
    first: Any,
    second: Any,
    sign: Any,
    cosine: Any,
    sine: Any,
    chunks: Any,
    slope: Any,
) -> None:
    """Turns a rotation back, values and gradients, and adds the angle's derivative to slope (LANES,)."""
    short = Lanes(lanes.builder, lanes.number, LANES)
    turn, shift, factor = short.spread(cosine), short.spread(sine), short.spread(sign)
    with short.loop(chunks) as chunk:
        here = short.plus(first, short.times(chunk, LANES))
        there = short.plus(second, short.times(chunk, LANES))
        a, b = short.load(values, here), short.load(values, there)
        to_a, to_b = short.load(grads, here), short.load(grads, there)
        mixed = short.fms(to_a, b, short.mul(to_b, a))
        short.store(short.fma(factor, mixed, short.load(slope)), slope)
        short.store(short.fma(shift, b, short.mul(turn, a)), values, here)
        short.store(short.fms(shift, a, short.mul(turn, b)), values, there)
        short.store(short.fma(shift, to_b, short.mul(turn, to_a)), grads, here)
        short.store(short.fms(shift, to_a, short.mul(turn, to_b)), grads, there)


@cache
def forward_task(bits: int) -> Any:
    """Task that fills MATRICES, FINAL and KEPT for a filter a part; bits 32 or 64, of a float."""

    sources = SOURCES

    @task
    def compiled(address: Any) -> None:
        data = task_data(address, LENGTH, sources)
        filters, width, length = data[PARTS], data[CHUNKS] * LANES, data[SIZE] * data[CHUNKS] * LANES
        weights = carray(at(data[WEIGHTS], bits), (filters, data[N_WEIGHTS]))
        steps, angles = carray(at(data[STEPS], 0), (data[OPS], 4)), carray(at(data[ANGLES], 64), (data[OPS], 2))
        places, factors = carray(at(data[PLACES], 0), (1 << 40, 2)), carray(at(data[FACTORS], 64), (1 << 40,))
        start = carray(at(data[START], bits), (length,))
        final = carray(at(data[FINAL], bits), (filters, length))
        kept = carray(at(data[KEPT], bits), (filters, data[N_KEPT], length))
        read, read_factors = (
            carray(at(data[READ], 0), (data[READS], 2)),
            carray(at(data[READ_FACTORS], 64), (data[READS],)),
        )
        matrices = carray(at(data[MATRICES], bits), (filters * data[OUTS] * data[NUMBERS],))
        number = weights.dtype.type
        f = take(address)
        while f < filters:
            c = final[f]
            for i in range(length):
                c[i] = start[i]
            stage = 0
            for k in range(data[OPS]):
                kind, index, first, last = steps[k]
                if kind == ROTATION:
                    angle = angles[k, 1]
                    if index >= 0:
                        angle += angles[k, 0] * weights[f, index]
                    cosine, sine = number(math.cos(angle)), math.sin(angle)
                    for e in range(first, last):
                        shift = number(factors[e] * sine)
                        _rotate(c, places[e, 0] * width, places[e, 1] * width, cosine, shift, data[CHUNKS])
                else:
                    before = kept[f, stage]
                    stage += 1
                    for i in range(length):
                        before[i] = c[i]
                        c[i] = 0
                    for e in range(first, last):
                        target, source, factor = places[e, 0] * width, places[e, 1] * width, number(factors[e])
                        for o in range(width):
                            c[target + o] += factor * before[source + o]
            group, place = f // data[PER_GROUP], f % data[PER_GROUP] * data[OBSERVABLES]
            for o in range(min(data[OBSERVABLES], data[OUTS] - place)):
                base = (group * data[OUTS] + place + o) * data[NUMBERS]
                for k in range(data[NUMBERS]):
                    matrices[base + k] = 0
                for e in range(data[READS]):
                    matrices[base + read[e, 0]] += number(read_factors[e]) * c[read[e, 1] * width + o]
            f = take(address)

    return compiled


@cache
def backward_task(bits: int) -> Any:
    """Task that fills GRADIENT from the sum of all COPIES of MATRICES; FINAL is overwritten."""

    sources = SOURCES

    @task
    def compiled(address: Any) -> None:
        data = task_data(address, LENGTH, sources)
        filters, width, length = data[PARTS], data[CHUNKS] * LANES, data[SIZE] * data[CHUNKS] * LANES
        weights = carray(at(data[WEIGHTS], bits), (filters, data[N_WEIGHTS]))
        gradient = carray(at(data[GRADIENT], bits), (filters, data[N_WEIGHTS]))
        steps, angles = carray(at(data[STEPS], 0), (data[OPS], 4)), carray(at(data[ANGLES], 64), (data[OPS], 2))
        places, factors = carray(at(data[PLACES], 0), (1 << 40, 2)), carray(at(data[FACTORS], 64), (1 << 40,))
        final = carray(at(data[FINAL], bits), (filters, length))
        kept = carray(at(data[KEPT], bits), (filters, data[N_KEPT], length))
        read, read_factors = (
            carray(at(data[READ], 0), (data[READS], 2)),
            carray(at(data[READ_FACTORS], 64), (data[READS],)),
        )
        matrices = carray(at(data[MATRICES], bits), (data[COPIES] * data[COPY],))
        number = weights.dtype.type
        g, scratch, slope = (
            np.empty(length, weights.dtype),
            np.empty(length, weights.dtype),
            np.empty(LANES, weights.dtype),
        )
        f = take(address)
        while f < filters:
            c = final[f]
            for i in range(length):
                g[i] = 0
            group, place = f // data[PER_GROUP], f % data[PER_GROUP] * data[OBSERVABLES]
            for o in range(min(data[OBSERVABLES], data[OUTS] - place)):
                base = (group * data[OUTS] + place + o) * data[NUMBERS]
                for e in range(data[READS]):
                    total = number(0)
                    # Always in the same order, so that results repeat bit for bit.
                    for copy in range(data[COPIES]):
                        total += matrices[copy * data[COPY] + base + read[e, 0]]
                    g[read[e, 1] * width + o] += number(read_factors[e]) * total
            for k in range(data[N_WEIGHTS]):
                gradient[f, k] = 0
            stage = data[N_KEPT]
            for k in range(data[OPS] - 1, -1, -1):
                kind, index, first, last = steps[k]
                if kind == ROTATION:
                    angle = angles[k, 1]
                    if index >= 0:
                        angle += angles[k, 0] * weights[f, index]
                    cosine, sine = number(math.cos(angle)), math.sin(angle)
                    for o in range(LANES):
                        slope[o] = 0
                    for e in range(first, last):
                        one, two = places[e, 0] * width, places[e, 1] * width
                        sign, shift = number(factors[e]), number(factors[e] * sine)
                        _undo(c, g, one, two, sign, cosine, shift, data[CHUNKS], slope)
                    if index >= 0:
                        total = number(0)
                        for o in range(LANES):
                            total += slope[o]
                        gradient[f, index] += number(angles[k, 0]) * total
                else:
                    stage -= 1
                    before = kept[f, stage]
                    for i in range(length):
                        scratch[i] = g[i]
                        g[i] = 0
                        c[i] = before[i]
                    for e in range(first, last):
                        target, source, factor = places[e, 0] * width, places[e, 1] * width, number(factors[e])
                        for o in range(width):
                            g[source + o] += factor * scratch[target + o]
            f = take(address)

    return compiled
