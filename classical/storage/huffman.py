"""Canonical Huffman codes of at most 15 bits a symbol.

A code is known from its lengths alone: codewords of one length are consecutive numbers in the order of their symbols,
and shorter ones come first. A table of all 15-bit words then decodes any symbol in one step.

Source: Huffman, Proc. IRE 40, 1098 (1952); lengths under a limit: Larmore, Hirschberg, J. ACM 37, 464 (1990);
canonical codes: Schwartz, Kallick, Comm. ACM 7, 166 (1964).
"""

import numpy as np
from numpy.typing import NDArray

from classical.storage.packing import pack, packed_bytes, unpack

LONGEST = 15
MOST = 1 << LONGEST
"""Symbols that codewords of the longest kind distinguish."""
_LENGTH_BITS = 4  # of one codeword's length in a file
_CHUNK = 1 << 16  # bytes decoded at a time: a few megabytes of tables

Integers = NDArray[np.int64]


def code_lengths(counts: NDArray[np.integer], longest: int = LONGEST) -> Integers:
    """Lengths of the prefix code that needs the fewest bits among all with codewords of at most `longest` bits.

    Args:
        counts: (symbols,), how often each symbol occurs; one that never occurs gets length 0, that is no codeword.
            A symbol that occurs alone gets 1 bit.
        longest: from 1.

    Raises:
        ValueError: more than 2^longest symbols occur.

    Source: package-merge, Larmore and Hirschberg, section 2.
    """
    lengths = np.zeros(len(counts), np.int64)
    used = np.flatnonzero(counts)
    if len(used) > 2**longest:
        raise ValueError(f"{len(used)} symbols occur but codewords of {longest} bits distinguish {2**longest}")
    if len(used) < 2:
        lengths[used] = 1
        return lengths
    rising = used[np.argsort(counts[used], kind="stable")]
    leaves = counts[rising].astype(np.int64)
    # A coin for each symbol and each length, worth 2^-length and costing the count: the cheapest coins that add up to
    # symbols - 1 give the lengths. Pairs of coins of one length join the coins of the next shorter one.
    single = [np.ones(len(leaves), bool)]
    coins = leaves
    for _ in range(longest - 1):
        pairs = coins[: len(coins) // 2 * 2].reshape(-1, 2).sum(1)
        both = np.concatenate([leaves, pairs])
        order = np.argsort(both, kind="stable")
        single.append(order < len(leaves))
        coins = both[order]
    taken, sizes = 2 * len(leaves) - 2, np.zeros(len(leaves), np.int64)
    for is_leaf in reversed(single):
        bought = int(is_leaf[:taken].sum())
        sizes[:bought] += 1
        taken = 2 * (taken - bought)
    lengths[rising] = sizes
    return lengths


def codewords(lengths: Integers) -> Integers:
    """Codeword of every symbol as a number; 0 where the length is 0.

    Args:
        lengths: (symbols,), from `code_lengths`.
    """
    words = np.zeros(len(lengths), np.int64)
    order = np.argsort(lengths, kind="stable")
    order = order[lengths[order] > 0]
    sizes = lengths[order]
    if len(order):
        # Each codeword takes 2^-length of [0, 1); the next one begins where it ends.
        top = int(sizes[-1])
        ends = np.cumsum(1 << (top - sizes))
        words[order] = (ends >> (top - sizes)) - 1
    return words


def encoded_bytes(counts: NDArray[np.integer]) -> int:
    """Bytes that `encode` needs for symbols that occur so often, its table included.

    Args:
        counts: (alphabet,).
    """
    return packed_bytes(len(counts), _LENGTH_BITS) + packed_bytes(int(code_lengths(counts) @ counts), 1)


def encode(symbols: NDArray[np.integer], alphabet: int) -> bytes:
    """Write the code's lengths, 4 bits a symbol of the alphabet, then the codewords; both filled up to whole bytes.

    Args:
        symbols: (n,), from 0 to alphabet - 1.
        alphabet: from 1.

    Raises:
        ValueError: more than 2^15 symbols occur.
    """
    lengths = code_lengths(np.bincount(symbols, minlength=alphabet))
    places = np.arange(lengths.max(initial=0))
    bits = codewords(lengths)[:, None] >> (lengths[:, None] - 1 - places).clip(0) & 1
    within = places < lengths[:, None]
    stream = bits.astype(np.uint8)[symbols][within[symbols]]
    return pack(lengths, _LENGTH_BITS) + np.packbits(stream).tobytes()


def decode(data: bytes, alphabet: int, count: int) -> tuple[Integers, int]:
    """Read what `encode` wrote at the beginning of `data`.

    Args:
        data: bytes, which may go on after the code.
        alphabet: as given to `encode`.
        count: number of symbols.

    Returns:
        The symbols, (count,), and the number of bytes read.

    Raises:
        ValueError: the lengths form no complete code, or data end early.
    """
    begin = packed_bytes(alphabet, _LENGTH_BITS)
    if len(data) < begin or count > 8 * (len(data) - begin):
        raise ValueError(
            f"a Huffman code of {count} symbols out of {alphabet} takes {begin + packed_bytes(count, 1)} bytes "
            f"or more but {len(data)} are left"
        )
    lengths = unpack(data[:begin], _LENGTH_BITS, alphabet)
    order = np.argsort(lengths, kind="stable")
    order = order[lengths[order] > 0]
    if not count and not len(order):
        return order, begin
    if len(order) == 1 and lengths[order[0]] == 1:  # a symbol alone: its codeword is 0, and 1 is none
        end = begin + packed_bytes(count, 1)
        if unpack(data[begin:end], 1, count).any():
            raise ValueError("the Huffman code has one symbol, written 0, but the data hold a 1")
        return np.full(count, order[0]), end
    top = int(lengths.max(initial=0))
    sizes = 1 << (top - lengths[order])  # of the 2^top words, how many begin with the symbol's codeword
    if sizes.sum() != 1 << top:
        raise ValueError(f"the codewords are the beginning of {sizes.sum()} of {1 << top} words: no complete code")
    symbols, bits = _read(np.frombuffer(data, np.uint8)[begin:], np.repeat(order, sizes), lengths, count)
    end = begin + packed_bytes(bits, 1)
    if end > len(data) or (bits and data[end - 1] & ((1 << -bits % 8) - 1)):
        raise ValueError(f"{count} symbols take {bits} bits; the bits after them are missing or not 0")
    return symbols, end


def _read(data: NDArray[np.uint8], table: Integers, lengths: Integers, count: int) -> tuple[Integers, int]:
    """Decode by the table of the symbols that words begin with; returns the symbols and the bits they take."""
    # Where a codeword begins is known only once the one before is: that walk is a loop over bytes. What each word at
    # each bit stands for is looked up for a chunk at once.
    top = len(table).bit_length() - 1
    steps = lengths.astype(np.uint8)[table]
    padded = np.concatenate([data, np.zeros(2, np.uint8)]).astype(np.uint32)
    shifts = np.arange(24 - top, 16 - top, -1, dtype=np.uint32)
    found, position, left = [table[:0]], 0, count
    for first in range(0, len(data), _CHUNK):
        near = padded[first : first + _CHUNK + 2]
        three = near[:-2] << np.uint32(16) | near[1:-1] << np.uint32(8) | near[2:]
        words = (three[:, None] >> shifts & np.uint32((1 << top) - 1)).reshape(-1)
        step = steps[words].tobytes()
        starts: list[int] = []
        position -= 8 * first
        while position < len(step) and len(starts) < left:
            starts.append(position)
            position += step[position]
        position += 8 * first
        left -= len(starts)
        found.append(table[words[starts]])
        if not left:
            break
    if left:
        raise ValueError(f"the data end {left} symbols early")
    return np.concatenate(found), position
