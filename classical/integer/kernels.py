"""Compiled loops over the planes of a layout (numba, extra "integer"); imported only where a layer runs them.

A plane is one channel (or 64 channels' signs) at one phase of the stride, image after image and row after row, so that
what one tap contributes to all outputs of a tile is one contiguous run: the inner loops have no branches and LLVM
vectorizes them. They take several runs at a time: a run costs a load and an addition, a pass two more loads and stores.
No numba thread pools: they can abort forked processes.
"""

from typing import Any

import numba
import numpy as np
from numba.core import cgutils, types
from numba.extending import intrinsic
from numpy.typing import NDArray

Array = NDArray[Any]
# Loops take so many runs at a time: with more than 8, LLVM no longer checks that none overlaps the sums.
RUNS = 8
WORDS = 6  # a kernel of 3x3 has 9 taps, or 18 words for 128 channels

_compiled = numba.njit(cache=True, nogil=True)
_memcpy: Any = cgutils.raw_memcpy


def _popcount(_: Any, bits: Any) -> Any:
    return bits(bits), lambda context, builder, signature, arguments: builder.ctpop(arguments[0])


def _copy(_: Any, target: Any, source: Any, count: Any) -> Any:
    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        to, of = (
            context.make_array(kind)(context, builder, array).data
            for kind, array in zip(signature.args[:2], arguments[:2], strict=True)
        )
        _memcpy(builder, to, of, arguments[2], target.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(target, source, count), code


popcount: Any = intrinsic(_popcount)  # bits set in an integer
copy: Any = intrinsic(_copy)  # of so many elements of contiguous arrays; for short rows five times faster than a loop


def _nearest(x: Array, scale: Any, zero: Any, low: Any, high: Any, out: Array) -> bool:
    """Integers clip(round(x / scale) + zero, low, high), ties to even, of reals; whether one was NaN.

    Args:
        x: flat.
        scale, zero, low, high: of x's type, in which all is computed.
        out: integers as many as x.
    """
    wrong = False
    for j in range(len(x)):
        value = np.rint(x[j] / scale) + zero
        wrong |= value != value
        out[j] = low if value < low else high if value > high else value
    return wrong


def _place(x: Array, top: int, left: int, planes: Array) -> None:
    """Copy images into planes.

    Args:
        x: (images, channels, height, width).
        top, left: pixels of padding.
        planes: (channels, stride, stride, images, rows, columns) of x's type; what no pixel reaches stays as it is.
    """
    images, channels, height, width = x.shape
    down, right = planes.shape[1:3]
    for i in range(height):
        part, row = (i + top) % down, (i + top) // down
        for phase in range(right):
            first = (phase - left) % right
            at = (first + left) // right
            for c in range(channels):
                for b in range(images):
                    run = planes[c, part, phase, b, row, at:]
                    if right == 1:
                        copy(run, x[b, c, i], width)
                    else:
                        for j in range((width - first + right - 1) // right):
                            run[j] = x[b, c, i, first + j * right]


def _pack(x: Array, groups: int, low: int, bits: int, words: Array) -> None:
    """Set bit c of a word if a bit of channel c's code is set; for one bit, if the channel is above its lowest code.

    Args:
        x: (images, channels, pixels): codes, or reals for one bit.
        groups: each begins with a new word.
        low: the lowest code; for one bit, what the other is at least.
        bits: of a code.
        words: (bits, images, words of all groups, pixels), uint64.
    """
    images, channels, pixels = x.shape
    each = channels // groups
    per_group = words.shape[2] // groups
    one = np.uint64(1)
    for bit in range(bits):
        for b in range(images):
            for k in range(words.shape[2]):
                word = words[bit, b, k]
                word[:] = 0
                start = k // per_group * each + 64 * (k % per_group)
                for c in range(start, min(start + 64, (k // per_group + 1) * each)):
                    values = x[b, c]
                    at = np.uint64(c - start)
                    if bits == 1:
                        for j in range(pixels):
                            word[j] |= np.uint64(values[j] >= low) << at
                    else:
                        for j in range(pixels):
                            word[j] |= ((np.uint64(values[j] - low) >> np.uint64(bit)) & one) << at


def _reduce(
    planes: Array,
    rows: int,
    columns: int,
    tiles: Array,
    starts: Array,
    offsets: Array,
    lists: Array,
    signs: Array,
    shift: int,
    constants: Array,
    factors: Array,
    offset: Array,
    flush: int,
    partial: Array,
    out: Array,
) -> None:
    """Sums of runs: 2^shift * (sum over a term's lists of sign * sum over the list of what the planes hold) + constant.

    What is stored is the sum times a factor, plus an offset; terms are added up if the result has room for one only.

    Args:
        planes: flat, uint8 or int32.
        rows, columns: of one image in a plane.
        tiles: (tiles, 2): first row, counted through all images, and number of rows.
        starts: (outputs, lists + 1): where each list begins in offsets; every list is a multiple of RUNS long.
        offsets: where the runs begin.
        lists: (terms + 1,): a term's lists.
        signs: (lists,) of 1 and -1.
        shift: at least 0.
        constants: (terms, outputs).
        factors, offset: (terms, outputs) and (outputs,), of the result's type.
        flush: offsets, a multiple of RUNS, after which a partial sum could overflow.
        partial: (longest run,) scratch of the partial sums' type.
        out: (terms or 1, images, outputs, height, width), int32 or real.
    """
    kept, _, outputs, height, width = out.shape
    terms = len(factors)
    whole, scaled, stored = (
        np.empty(len(partial), np.int32),
        np.empty(len(partial), out.dtype),
        np.empty(len(partial), out.dtype),
    )
    for k in range(len(tiles)):
        first, count = tiles[k]
        n = (count - 1) * columns + width
        tile = planes[first * columns :]
        for o in range(outputs):
            for term in range(terms):
                total = whole[:n]
                total[:] = 0
                for kind in range(lists[term], lists[term + 1]):
                    at, end = starts[o, kind], starts[o, kind + 1]
                    while at < end:
                        stop = min(end, at + flush)
                        sums = partial[:n]
                        sums[:] = 0
                        while at < stop:
                            a = tile[offsets[at] :]
                            b = tile[offsets[at + 1] :]
                            c = tile[offsets[at + 2] :]
                            d = tile[offsets[at + 3] :]
                            e = tile[offsets[at + 4] :]
                            f = tile[offsets[at + 5] :]
                            g = tile[offsets[at + 6] :]
                            h = tile[offsets[at + 7] :]
                            for j in range(n):
                                sums[j] += (a[j] + b[j]) + (c[j] + d[j]) + ((e[j] + f[j]) + (g[j] + h[j]))
                            at += RUNS
                        if signs[kind] > 0:
                            for j in range(n):
                                total[j] += sums[j]
                        else:
                            for j in range(n):
                                total[j] -= sums[j]
                constant, factor = constants[term, o], factors[term, o]
                result = stored[:n]
                if term < kept:
                    result[:] = offset[o]
                real = scaled[:n]
                for j in range(n):
                    # Wraps, as both parts may have; stored first: numba multiplies int32 and float32 in float64.
                    real[j] = np.int32((total[j] << shift) + constant)
                    result[j] += factor * real[j]
                if kept == terms or term == terms - 1:
                    for row in range(first, first + count):
                        i = row % rows
                        if i < height:
                            copy(out[min(term, kept - 1), row // rows, o, i], result[(row - first) * columns :], width)


def _agree(tile: Array, at: Array, v: Array, w: Array, sums: Array) -> None:
    """Add popcounts of v XOR the runs to the lower halves of sums, and those of w XOR the runs to the upper halves."""
    high = np.uint64(32)
    s = 0
    while s + WORDS <= len(at):
        a, av, aw = tile[at[s] :], v[s], w[s]
        b, bv, bw = tile[at[s + 1] :], v[s + 1], w[s + 1]
        c, cv, cw = tile[at[s + 2] :], v[s + 2], w[s + 2]
        d, dv, dw = tile[at[s + 3] :], v[s + 3], w[s + 3]
        e, ev, ew = tile[at[s + 4] :], v[s + 4], w[s + 4]
        f, fv, fw = tile[at[s + 5] :], v[s + 5], w[s + 5]
        for j in range(len(sums)):
            one = popcount(a[j] ^ av) + popcount(b[j] ^ bv) + popcount(c[j] ^ cv)
            one += popcount(d[j] ^ dv) + popcount(e[j] ^ ev) + popcount(f[j] ^ fv)
            two = popcount(a[j] ^ aw) + popcount(b[j] ^ bw) + popcount(c[j] ^ cw)
            two += popcount(d[j] ^ dw) + popcount(e[j] ^ ew) + popcount(f[j] ^ fw)
            sums[j] += one + (two << high)
        s += WORDS
    while s < len(at):
        a, av, aw = tile[at[s] :], v[s], w[s]
        for j in range(len(sums)):
            sums[j] += popcount(a[j] ^ av) + (popcount(a[j] ^ aw) << high)
        s += 1


def _agree_masked(tile: Array, at: Array, v: Array, w: Array, p: Array, q: Array, sums: Array) -> None:
    """The same of the bits that p and q, of the lower and of the upper halves, leave."""
    high = np.uint64(32)
    s = 0
    while s + WORDS <= len(at):
        a, av, aw, ap, aq = tile[at[s] :], v[s], w[s], p[s], q[s]
        b, bv, bw, bp, bq = tile[at[s + 1] :], v[s + 1], w[s + 1], p[s + 1], q[s + 1]
        c, cv, cw, cp, cq = tile[at[s + 2] :], v[s + 2], w[s + 2], p[s + 2], q[s + 2]
        d, dv, dw, dp, dq = tile[at[s + 3] :], v[s + 3], w[s + 3], p[s + 3], q[s + 3]
        e, ev, ew, ep, eq = tile[at[s + 4] :], v[s + 4], w[s + 4], p[s + 4], q[s + 4]
        f, fv, fw, fp, fq = tile[at[s + 5] :], v[s + 5], w[s + 5], p[s + 5], q[s + 5]
        for j in range(len(sums)):
            one = popcount((a[j] ^ av) & ap) + popcount((b[j] ^ bv) & bp) + popcount((c[j] ^ cv) & cp)
            one += popcount((d[j] ^ dv) & dp) + popcount((e[j] ^ ev) & ep) + popcount((f[j] ^ fv) & fp)
            two = popcount((a[j] ^ aw) & aq) + popcount((b[j] ^ bw) & bq) + popcount((c[j] ^ cw) & cq)
            two += popcount((d[j] ^ dw) & dq) + popcount((e[j] ^ ew) & eq) + popcount((f[j] ^ fw) & fq)
            sums[j] += one + (two << high)
        s += WORDS
    while s < len(at):
        a, av, aw, ap, aq = tile[at[s] :], v[s], w[s], p[s], q[s]
        for j in range(len(sums)):
            sums[j] += popcount((a[j] ^ av) & ap) + (popcount((a[j] ^ aw) & aq) << high)
        s += 1


def _agreements(
    planes: Array,
    rows: int,
    columns: int,
    tiles: Array,
    offsets: Array,
    weights: Array,
    masks: Array,
    shift: int,
    base: Array,
    factors: Array,
    offset: Array,
    out: Array,
) -> None:
    """Sums of products of bits and signs: base plus 2^shift times the weighted number of bits that agree.

    Bit k of the inputs counts 2^k times. What is stored is the sum times a factor, plus an offset.

    Args:
        planes: (bits, positions of all planes), uint64.
        rows, columns: of one image in a plane.
        tiles: (tiles, 2): first row, counted through all images, and number of rows.
        offsets: (groups, words): where the runs begin.
        weights: (outputs, words), uint64: what a bit is compared with, negated.
        masks: (outputs, words), uint64: which bits count; of no outputs if all do.
        shift: at least 0.
        base: (outputs, positions), int32: where no bit agrees, from the first row of an image to the end of any tile.
        factors, offset: (outputs,), of the result's type.
        out: (images, outputs, height, width), int32 or real.
    """
    _, outputs, height, width = out.shape
    groups = len(offsets)
    each = outputs // groups
    masked = len(masks) > 0
    longest = 0
    for k in range(len(tiles)):
        longest = max(longest, (tiles[k, 1] - 1) * columns + width)
    scratch, stored = np.empty(longest, np.uint64), np.empty(longest, out.dtype)
    low, high = np.uint64(2**32 - 1), np.uint64(32)
    for k in range(len(tiles)):
        first, count = tiles[k]
        n = (count - 1) * columns + width
        sums, result = scratch[:n], stored[:n]
        for group in range(groups):
            at = offsets[group]
            stop = (group + 1) * each
            for o in range(group * each, stop, 2):
                # Two outputs at a time, one in the lower halves of the sums: every input is loaded once for both.
                other = min(o + 1, stop - 1)
                sums[:] = 0
                for bit in range(len(planes) - 1, -1, -1):
                    for j in range(n):
                        sums[j] += sums[j]  # what was counted for a higher bit counts twice
                    tile = planes[bit, first * columns :]
                    if masked:
                        agree_masked(tile, at, weights[o], weights[other], masks[o], masks[other], sums)
                    else:
                        agree(tile, at, weights[o], weights[other], sums)
                for output in range(o, other + 1):
                    same = base[output, first % rows * columns :]
                    factor, extra = factors[output], offset[output]
                    if output == o:
                        for j in range(n):
                            # Stored first: numba multiplies int32 and float32 in float64.
                            result[j] = np.int32(same[j] + (np.int64(sums[j] & low) << shift))
                            result[j] = factor * result[j] + extra
                    else:
                        for j in range(n):
                            result[j] = np.int32(same[j] + (np.int64(sums[j] >> high) << shift))
                            result[j] = factor * result[j] + extra
                    for row in range(first, first + count):
                        i = row % rows
                        if i < height:
                            copy(out[row // rows, output, i], result[(row - first) * columns :], width)


def _weigh(
    planes: Array,
    rows: int,
    columns: int,
    tiles: Array,
    offsets: Array,
    weights: Array,
    shift: int,
    constants: Array,
    out: Array,
) -> None:
    """Sums of runs times weights, times 2^shift, and a constant.

    Args:
        planes: flat, int8 or int16.
        rows, columns: of one image in a plane.
        tiles: (tiles, 2): first row, counted through all images, and number of rows.
        offsets: (groups, taps): where the runs begin.
        weights: (terms, outputs, taps), int32.
        shift: at least 0.
        constants: (terms, outputs).
        out: (terms, images, outputs, height, width), int32.
    """
    terms, _, outputs, height, width = out.shape
    groups, taps = offsets.shape
    longest = 0
    for k in range(len(tiles)):
        longest = max(longest, (tiles[k, 1] - 1) * columns + width)
    whole = np.empty(longest, np.int32)
    for k in range(len(tiles)):
        first, count = tiles[k]
        n = (count - 1) * columns + width
        tile = planes[first * columns :]
        total = whole[:n]
        for o in range(outputs):
            at = offsets[o // (outputs // groups)]
            for term in range(terms):
                w = weights[term, o]
                total[:] = 0
                s = 0
                while s + 3 <= taps:
                    a, b, c = tile[at[s] :], tile[at[s + 1] :], tile[at[s + 2] :]
                    u, v, x = w[s], w[s + 1], w[s + 2]
                    for j in range(n):
                        total[j] += u * a[j] + v * b[j] + x * c[j]
                    s += 3
                while s < taps:
                    a, u = tile[at[s] :], w[s]
                    for j in range(n):
                        total[j] += u * a[j]
                    s += 1
                constant = constants[term, o]
                for j in range(n):
                    total[j] = (total[j] << shift) + constant
                for row in range(first, first + count):
                    i = row % rows
                    if i < height:
                        copy(out[term, row // rows, o, i], total[(row - first) * columns :], width)


def _rescale_planes(
    terms: Any, multiplier: Array, offset: Array, shift: Array, low: int, high: int, out: Array
) -> None:
    """Clip (sum over terms of multiplier * n + offset) >> shift, a channel at a time.

    Args:
        terms: tuple of (batch, channels, pixels), int32.
        multiplier: (terms, channels), int64.
        offset, shift: (channels,), int64.
        low, high: what the result is clipped to.
        out: (batch, channels, pixels).
    """
    batch, channels, pixels = out.shape
    total = np.empty(pixels, np.int64)
    for b in range(batch):
        for c in range(channels):
            total[:] = offset[c]
            for k in range(len(terms)):
                n, m = terms[k][b, c], multiplier[k, c]
                for j in range(pixels):
                    total[j] += n[j] * m
            found, bits = out[b, c], shift[c]
            for j in range(pixels):
                found[j] = min(max(total[j] >> bits, low), high)


def _rescale_rows(terms: Any, multiplier: Array, offset: Array, shift: Array, low: int, high: int, out: Array) -> None:
    """The same of a pixel at a time: terms and out of shape (pixels, channels)."""
    pixels, channels = out.shape
    total = np.empty(channels, np.int64)
    for i in range(pixels):
        total[:] = offset
        for k in range(len(terms)):
            n, m = terms[k][i], multiplier[k]
            for c in range(channels):
                total[c] += n[c] * m[c]
        found = out[i]
        for c in range(channels):
            found[c] = min(max(total[c] >> shift[c], low), high)


# Division as IEEE 754 has it: an exception for 0 would keep the loop from being vectorized.
nearest: Any = numba.njit(cache=True, nogil=True, error_model="numpy")(_nearest)
place: Any = _compiled(_place)
pack: Any = _compiled(_pack)
reduce: Any = _compiled(_reduce)
agree: Any = _compiled(_agree)
agree_masked: Any = _compiled(_agree_masked)
agreements: Any = _compiled(_agreements)
weigh: Any = _compiled(_weigh)
rescale_planes: Any = _compiled(_rescale_planes)
rescale_rows: Any = _compiled(_rescale_rows)
