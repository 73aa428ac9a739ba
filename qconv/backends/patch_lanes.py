"""Vector code of the fused kernel: a block of patches through a trigonometric polynomial, forward and backward.

A wire's features are 1 and sine and cosine of its angle, or with two angles (a, b) sin a cos b, sin a sin b, cos a.
All products of the features of the first wires are called u, of the others v, and an output is u^T M v.
"""

from __future__ import annotations

import math
from typing import Any

from qconv.backends.lanes import Lanes, Value

LANES = 32  # blocks are filled up to a multiple of this many patches


def _wire_features(lanes: Lanes, waves: list[tuple[Value, Value]]) -> list[Value]:
    """Features of a wire after the constant 1, from (sine, cosine) of its one or two angles."""
    if len(waves) == 1:
        return list(waves[0])
    (sine, cosine), (sine_b, cosine_b) = waves
    return [lanes.mul(sine, cosine_b), lanes.mul(sine, sine_b), cosine]


def _products(lanes: Lanes, features: list[list[Value]]) -> list[Value]:
    """All products of one feature a wire, last wire fastest; None stands for the constant 1."""
    result: list[Value] = [None]
    for own in features:
        result = [b if a is None else a if b is None else lanes.mul(a, b) for a in result for b in [None, *own]]
    return result


def _products_backward(lanes: Lanes, features: list[list[Value]], grads: list[Value]) -> list[list[Value]]:
    """Gradients of the features from those of their products (the constant's is not read)."""
    result: list[list[Value]] = []
    for wire in reversed(range(len(features))):
        before = _products(lanes, features[:wire])
        step = 1 + len(features[wire])
        slopes: list[Value] = [None] * (step - 1)
        shared: list[Value] = []
        for k, product in enumerate(before):
            own = grads[k * step + 1 : (k + 1) * step]
            slopes = [_plus(lanes, slope, g, product) for slope, g in zip(slopes, own, strict=True)]
            total = grads[k * step]
            if k:
                for g, feature in zip(own, features[wire], strict=True):
                    total = lanes.fma(g, feature, total)
            shared.append(total)
        result.append(slopes)
        grads = shared
    return result[::-1]


def _plus(lanes: Lanes, total: Value, grad: Value, factor: Value) -> Value:
    if total is None:
        return grad if factor is None else lanes.mul(grad, factor)
    return lanes.add(total, grad) if factor is None else lanes.fma(grad, factor, total)


def _load_features(lanes: Lanes, wires: int, angles: int, turning: Value, rows: Value, place: Value) -> Any:
    """Of the patches at `place`: (sine, cosine) of every wire's angles, and every wire's features."""
    loaded = [
        lanes.load(turning, lanes.plus(lanes.whole(rows, lanes.index(k)), place)) for k in range(2 * wires * angles)
    ]
    pairs = list(zip(loaded[::2], loaded[1::2], strict=True))
    by_wire = [pairs[angles * wire : angles * (wire + 1)] for wire in range(wires)]
    return by_wire, [_wire_features(lanes, own) for own in by_wire]


def turn(lanes: Lanes, pixels: Value, waves: Value, taps: Value, turning: Value, stride: Value, size: Value) -> None:
    """turning (taps, 2, size): sine and cosine of pi (scale * pixel + offset), from pixels (taps, size)."""
    with lanes.loop(taps) as k:
        scale = lanes.spread(lanes.read(waves, lanes.times(k, 2)))
        offset = lanes.spread(lanes.read(waves, lanes.plus(lanes.times(k, 2), 1)))
        source = lanes.move(pixels, lanes.builder.mul(k, stride))
        sines = lanes.move(turning, lanes.builder.mul(lanes.times(k, 2), stride))
        cosines = lanes.move(sines, stride)
        with lanes.loop(lanes.vectors(size)) as tile:
            place = lanes.times(tile, lanes.size)
            sine, cosine = lanes.sine_cosine(lanes.fma(lanes.load(source, place), scale, offset))
            lanes.store(sine, sines, place)
            lanes.store(cosine, cosines, place)


def _row(lanes: Lanes, matrix: Value, a: int, v: list[Value]) -> Value:
    """sum_k M[a, k] v_k."""
    total = lanes.broadcast(matrix, a * len(v))
    for k in range(1, len(v)):
        total = lanes.fma(lanes.broadcast(matrix, a * len(v) + k), v[k], total)
    return total


def evaluate(
    lanes: Lanes,
    left: int,
    right: int,
    angles: int,
    turning: Value,
    rows: Value,
    matrices: Value,
    outs: Value,
    out: Value,
    stride: Value,
    size: Value,
) -> None:
    """Fills out (outs, size) from matrices (outs, n_left, n_right) and the sines and cosines at `rows` of turning."""
    # Two vectors at a time share each coefficient that is read.
    lanes = Lanes(lanes.builder, lanes.bits, LANES)
    with lanes.loop(lanes.vectors(size)) as tile:
        place = lanes.times(tile, lanes.size)
        _, features = _load_features(lanes, left + right, angles, turning, rows, place)
        u, v = _products(lanes, features[:left]), _products(lanes, features[left:])
        with lanes.loop(outs) as r:
            matrix = lanes.move(matrices, lanes.times(r, len(u) * len(v)))
            total = _row(lanes, matrix, 0, v)
            for a in range(1, len(u)):
                total = lanes.fma(u[a], _row(lanes, matrix, a, v), total)
            lanes.store(total, out, lanes.plus(lanes.builder.mul(r, stride), place))


def keep_products(
    lanes: Lanes,
    left: int,
    right: int,
    angles: int,
    turning: Value,
    rows: Value,
    kept_u: Value,
    kept_v: Value,
    stride: Value,
    size: Value,
) -> None:
    """u (n_left, size) and v (n_right, size) without their first rows, the constants."""
    with lanes.loop(lanes.vectors(size)) as tile:
        place = lanes.times(tile, lanes.size)
        _, features = _load_features(lanes, left + right, angles, turning, rows, place)
        for own, kept in ((features[:left], kept_u), (features[left:], kept_v)):
            for k, product in enumerate(_products(lanes, own)[1:], 1):
                lanes.store(product, kept, lanes.plus(lanes.builder.mul(stride, lanes.index(k)), place))


def pull_back(
    lanes: Lanes,
    left: int,
    right: int,
    angles: int,
    turning: Value,
    rows: Value,
    waves: Value,
    matrices: Value,
    outs: Value,
    grad: Value,
    to_pixels: Value,
    stride: Value,
    size: Value,
) -> None:
    """Fills to_pixels (wires * angles, size), the pixels' gradients, from grad (outs, size)."""
    with lanes.loop(lanes.vectors(size)) as tile:
        place = lanes.times(tile, lanes.size)
        by_wire, features = _load_features(lanes, left + right, angles, turning, rows, place)
        u, v = _products(lanes, features[:left]), _products(lanes, features[left:])
        to_u = [lanes.variable(lanes.constant(0)) for _ in u]
        to_v = [lanes.variable(lanes.constant(0)) for _ in v]
        with lanes.loop(outs) as r:
            matrix = lanes.move(matrices, lanes.times(r, len(u) * len(v)))
            g = lanes.load(grad, lanes.plus(lanes.builder.mul(r, stride), place))
            sums = [lanes.value(variable) for variable in to_v]
            for a in range(len(u)):
                weighted = g if a == 0 else lanes.mul(g, u[a])
                for k in range(1, len(v)):
                    sums[k] = lanes.fma(weighted, lanes.broadcast(matrix, a * len(v) + k), sums[k])
                if a:
                    lanes.set(to_u[a], lanes.fma(g, _row(lanes, matrix, a, v), lanes.value(to_u[a])))
            for variable, total in zip(to_v[1:], sums[1:], strict=True):
                lanes.set(variable, total)
        slopes = [
            *_products_backward(lanes, features[:left], [lanes.value(variable) for variable in to_u]),
            *_products_backward(lanes, features[left:], [lanes.value(variable) for variable in to_v]),
        ]
        for wire, (waves_of, slope) in enumerate(zip(by_wire, slopes, strict=True)):
            for angle, total in enumerate(_to_angles(lanes, waves_of, slope)):
                k = wire * angles + angle
                factor = lanes.mul(lanes.broadcast(waves, 2 * k), lanes.constant(math.pi))
                target = lanes.plus(lanes.builder.mul(stride, lanes.index(k)), place)
                lanes.store(lanes.mul(total, factor), to_pixels, target)


def _to_angles(lanes: Lanes, waves: list[tuple[Value, Value]], slopes: list[Value]) -> list[Value]:
    """Gradients of a wire's angles from those of its features."""
    sine, cosine = waves[0]
    if len(waves) == 1:
        return [lanes.sub(lanes.mul(slopes[0], cosine), lanes.mul(slopes[1], sine))]
    sine_b, cosine_b = waves[1]
    along, across, rest = slopes
    to_sine = lanes.fma(along, cosine_b, lanes.mul(across, sine_b))
    first = lanes.sub(lanes.mul(to_sine, cosine), lanes.mul(rest, sine))
    second = lanes.sub(lanes.mul(across, cosine_b), lanes.mul(along, sine_b))
    return [first, lanes.mul(second, sine)]


def add_outer(
    lanes: Lanes,
    n_left: int,
    n_right: int,
    u: Value,
    v: Value,
    grad: Value,
    outs: Value,
    out: Value,
    stride: Value,
    size: Value,
) -> None:
    """Adds sum_p grad[r, p] u[a, p] v[k, p] to out (outs, n_left, n_right)."""
    # So many sums at a time as fit in registers.
    columns = min(n_right, 18)
    step = max(1, 18 // columns)
    with lanes.loop(outs) as r:
        target = lanes.move(out, lanes.times(r, n_left * n_right))
        incoming = lanes.move(grad, lanes.builder.mul(r, stride))
        for first in range(0, n_left, step):
            for column in range(0, n_right, columns):
                block = [
                    (a, k)
                    for a in range(first, min(first + step, n_left))
                    for k in range(column, min(column + columns, n_right))
                ]
                sums = {pair: lanes.variable(lanes.constant(0)) for pair in block}
                with lanes.loop(lanes.vectors(size)) as tile:
                    place = lanes.times(tile, lanes.size)
                    g = lanes.load(incoming, place)
                    others = {
                        k: lanes.load(v, lanes.plus(lanes.builder.mul(stride, lanes.index(k)), place))
                        for _, k in block
                        if k
                    }
                    for a in dict.fromkeys(a for a, _ in block):
                        mine = (
                            lanes.load(u, lanes.plus(lanes.builder.mul(stride, lanes.index(a)), place)) if a else None
                        )
                        weighted = g if mine is None else lanes.mul(g, mine)
                        for pair in block:
                            if pair[0] == a:
                                total = lanes.value(sums[pair])
                                k = pair[1]
                                lanes.set(
                                    sums[pair],
                                    lanes.fma(weighted, others[k], total) if k else lanes.add(total, weighted),
                                )
                for a, k in block:
                    offset = a * n_right + k
                    lanes.write(
                        lanes.add(lanes.read(target, offset), lanes.sum(lanes.value(sums[a, k]))), target, offset
                    )
