"""Bit-packing: integers of b bits each, one after the other, the highest bit first."""

import numpy as np
from numpy.typing import NDArray

WIDEST = 16


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that `count` integers of `bits` bits take."""
    return -(-count * bits // 8)


def pack(values: NDArray[np.integer], bits: int) -> bytes:
    """Write integers one after the other; the last byte is filled up with zeros.

    Args:
        values: (n,), from 0 to 2^bits - 1.
        bits: 0 to 16; with 0 bits, all values are 0 and nothing is written.

    Raises:
        ValueError: bits out of range, or values that do not fit.
    """
    _check(bits)
    if values.size and not 0 <= int(values.min()) <= int(values.max()) < 2**bits:
        raise ValueError(
            f"values lie in {values.min()} ... {values.max()} but {bits} bits hold 0 ... {2**bits - 1}: "
            "use more bits or subtract the smallest value"
        )
    words = values.astype(">u2").view(np.uint8).reshape(-1, 2)
    return np.packbits(np.unpackbits(words, axis=1)[:, WIDEST - bits :]).tobytes()


def unpack(data: bytes, bits: int, count: int) -> NDArray[np.int64]:
    """Read `count` integers of `bits` bits each.

    Args:
        data: what `pack` returned, exactly.
        bits: 0 to 16.
        count: from 0.

    Raises:
        ValueError: bits out of range, or data of another length or not ending in zero bits.
    """
    _check(bits)
    if len(data) != packed_bytes(count, bits):
        raise ValueError(f"{count} integers of {bits} bits take {packed_bytes(count, bits)} bytes, not {len(data)}")
    if not bits:
        return np.zeros(count, np.int64)
    stream = np.unpackbits(np.frombuffer(data, np.uint8))
    if stream[count * bits :].any():
        raise ValueError(f"the {len(stream) - count * bits} bits after the last integer must be 0")
    words = np.zeros((count, WIDEST), np.uint8)
    words[:, WIDEST - bits :] = stream[: count * bits].reshape(count, bits)
    return np.packbits(words).view(">u2").astype(np.int64)


def _check(bits: int) -> None:
    if not 0 <= bits <= WIDEST:
        raise ValueError(f"bits is {bits} but must be 0 to {WIDEST}")
