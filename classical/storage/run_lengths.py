"""Positions of the few as distances: how many others lie between one and the next.

A distance is a symbol of b bits. The largest symbol, 2^b - 1, is a filler: so many others, and none of the few after
them. (Deep Compression's filler stands for one stored zero; this one stands for no stored value at all.)

Source: Han, Mao, Dally, arXiv:1510.00149, section 2 and figure 2.
"""

import numpy as np
from numpy.typing import NDArray

from classical.storage import huffman
from classical.storage.packing import packed_bytes

WIDTHS = range(1, 13)
"""Bits of a distance; above 8 only tensors with a percent of non-zeros or less gain anything."""

Integers = NDArray[np.int64]


def distances(positions: Integers, bits: int) -> Integers:
    """Symbols of the distances, fillers included.

    Args:
        positions: (n,), rising, from 0.
        bits: of a symbol, from 1.
    """
    fillers, rest = divmod(_gaps(positions), 2**bits - 1)
    symbols = np.full(len(rest) + int(fillers.sum()), 2**bits - 1)
    symbols[np.cumsum(fillers + 1) - 1] = rest
    return symbols


def positions(symbols: Integers, bits: int) -> Integers:
    """Positions behind the symbols that `distances` gave; what comes after the last position is not stated."""
    filler = symbols == 2**bits - 1
    ends = np.cumsum(symbols + ~filler)
    found: Integers = ends[~filler] - 1
    return found


def best_width(positions: Integers, coders: tuple[str, ...]) -> int:
    """Bits of a distance that make the file smallest.

    Args:
        positions: (n,), rising, from 0.
        coders: how symbols may be written: "packed", "huffman" or both.
    """
    often = np.bincount(_gaps(positions))
    gaps = np.flatnonzero(often)

    def size(bits: int) -> int:
        fillers, rest = divmod(gaps, 2**bits - 1)
        counts = np.zeros(2**bits, np.int64)
        np.add.at(counts, rest, often[gaps])
        counts[-1] = fillers @ often[gaps]
        used = np.trim_zeros(counts, "b")
        sizes = {"packed": packed_bytes(int(counts.sum()), bits), "huffman": huffman.encoded_bytes(used)}
        return min(sizes[coder] for coder in coders)

    return min(WIDTHS, key=size)


def _gaps(positions: Integers) -> Integers:
    return np.diff(positions, prepend=-1) - 1
