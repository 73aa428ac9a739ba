"""One tensor to bytes and back: which symbols stand for its values, and how they are written.

    value     ->  symbols and a book       ->  symbols written            ->  bytes
    real          bit patterns; levels         all of them                    packed: b bits a symbol
    Codes         codes; scale, zero point     all but the most frequent      huffman: short words for
    Codebook      codes; levels                one, and distances to them     frequent symbols

A header, plain JSON, says what was done; the bytes alone mean nothing.
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from classical.quantizers import Codebook, Codes
from classical.storage import huffman, run_lengths
from classical.storage.packing import WIDEST, pack, packed_bytes, unpack

Stored = Tensor | Codes | Codebook
Header = dict[str, Any]
Integers = NDArray[np.int64]

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64),
    )
}
# Which symbols are written (all of them; all but the most frequent one, walking along rows or along columns), and how.
_BOTH, _SPARSE = ("packed", "huffman"), ("rows", "columns")
_PLANS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "dense": ((), ()),
    "packed": (("all",), ("packed",)),
    "huffman": (("all",), ("huffman",)),
    "sparse": (_SPARSE, ("packed",)),
    "sparse_huffman": (_SPARSE, ("huffman",)),
    "auto": (("all", *_SPARSE), _BOTH),
}
CODINGS = tuple(_PLANS)
_MOST_CODES = 1 << WIDEST
_LEAST_SHARE = 0.25  # of the most frequent symbol; below it, distances cost more than they save
_MOST_NUMBERS = 1 << 48
_HEADER_SHARE = 0.25  # compressed, a header takes about a quarter of its text


def check_coding(coding: str) -> None:
    """Check the name of a coding.

    Raises:
        ValueError: there is no such coding.
    """
    if coding not in _PLANS:
        raise ValueError(f"unknown coding {coding!r}: choose one of {', '.join(CODINGS)}")


def encode(value: Stored, coding: str = "auto") -> tuple[Header, bytes]:
    """Write one value by the coding asked for, or plainly where that is smaller.

    Args:
        value: a tensor of any shape and a type of DTYPES; or what a quantizer states.
        coding: one of CODINGS. "auto" tries them all and takes the smallest.

    Returns:
        What `decode` needs: a header that JSON can hold, and bytes.

    Raises:
        ValueError: an unknown coding, a value of another type, a tensor that is no plain array of numbers, codes that
            lie too far apart.
    """
    check_coding(coding)
    if not isinstance(value, Stored):
        raise ValueError(f"a {type(value).__name__} cannot be stored: give a tensor, Codes or a Codebook")
    forms = _tensor_forms(value, coding) if isinstance(value, Tensor) else _coded_forms(value, coding)
    return min(forms, key=lambda form: len(form[1]) + _HEADER_SHARE * len(repr(form[0])))


def decode(header: Header, data: bytes) -> Stored:
    """Read what `encode` wrote.

    Raises:
        ValueError: header and data do not belong together.
    """
    reader = _Reader(data)
    value = _decode(header, reader)
    if reader.left:
        raise ValueError(f"{reader.left} bytes are left over")
    return value


def shape_of(header: Header) -> tuple[int, ...]:
    """Shape of the value that a header announces.

    Raises:
        ValueError: the header has none, or one beyond 2^48 numbers.
    """
    shape = header.get("shape")
    if not isinstance(shape, list) or len(shape) > 64 or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"the shape must be a list of sizes, not {shape!r}")
    if math.prod(max(n, 1) for n in shape) > _MOST_NUMBERS:
        raise ValueError(f"shape {shape} has more than 2^48 numbers")
    return tuple(shape)


def decoded_bytes(header: Header) -> int:
    """Bytes of memory that the value takes once decoded, at least; 4 for a code.

    Raises:
        ValueError: the header has no valid shape or type.
    """
    return math.prod(shape_of(header)) * (_dtype(header).itemsize if "dtype" in header else 4)


def describe(header: Header) -> str:
    """Say in words how a value was written; a header that `decode` would refuse is described no less."""
    text = f"{header.get('dtype')}"
    for key in ("levels", "codes"):
        if key in header:
            text = f"{header[key]} {'codes' if 'scale' in header else 'levels'}, {header.get('code')}"
    gaps = header.get("gaps")
    if isinstance(gaps, dict):
        text += f"; distances of {gaps.get('bits')} bits by {gaps.get('by')}, {gaps.get('code')}"
    return text


# Encoding.


def _tensor_forms(tensor: Tensor, coding: str) -> Iterator[tuple[Header, bytes]]:
    head: Header = {"dtype": _dtype_name(tensor), "shape": list(tensor.shape)}
    words = _words(tensor)
    yield head, words.tobytes()
    if coding == "dense" or not words.size:
        return
    levels, symbols, counts = np.unique(words, return_inverse=True, return_counts=True)
    layouts, coders = _PLANS[coding]
    if len(levels) <= _MOST_CODES:
        for part, data in _written(symbols, len(levels), tensor.shape, coding):
            yield head | {"levels": len(levels)} | part, levels.tobytes() + data
    for layout in layouts:
        if layout != "all" and counts.max() >= _LEAST_SHARE * words.size:
            base = int(levels[counts.argmax()])
            part, data, chosen = _gaps(words, base, tensor.shape, layout, coders)
            yield head | part, data + words[chosen].tobytes()


def _coded_forms(value: Codes | Codebook, coding: str) -> Iterator[tuple[Header, bytes]]:
    codes = value.codes.detach().cpu()
    if codes.dtype not in (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64):
        raise ValueError(f"codes are {codes.dtype} but must be integers")
    numbers = codes.reshape(-1).numpy().astype(np.int64)
    head: Header = {"shape": list(codes.shape)}
    if isinstance(value, Codebook):
        low, step, alphabet = 0, 1, value.levels.shape[-1]
        if numbers.size and not 0 <= numbers.min() <= numbers.max() < alphabet:
            raise ValueError(f"codes lie in {numbers.min()} ... {numbers.max()} but there are {alphabet} levels")
        head["book"], book = encode(value.levels, "dense")
    else:
        low, high = (int(numbers.min()), int(numbers.max())) if numbers.size else (0, 0)
        step = int(np.gcd.reduce(numbers - low)) or 1
        alphabet = (high - low) // step + 1
        head["scale"], book = encode(value.scale, "dense")
        head |= {"low": low, "step": step}
        if value.zero.dim() or value.zero:
            head["zero"], zero = encode(_narrow(value.zero), "dense")
            book += zero
    if not 1 <= alphabet <= _MOST_CODES:
        raise ValueError(f"there are {alphabet} codes but at most {_MOST_CODES} can be stored: use 16 bits or fewer")
    head["codes"] = alphabet
    symbols = (numbers - low) // step
    for part, data in (_stream(symbols, alphabet, ("packed",)), *_written(symbols, alphabet, codes.shape, coding)):
        yield head | part, book + data


def _narrow(integers: Tensor) -> Tensor:
    """The same integers in the smallest signed type of 8, 16 or 32 bits."""
    fits = (
        dtype for dtype in (torch.int8, torch.int16) if torch.equal(integers.to(dtype).to(integers.dtype), integers)
    )
    return integers.to(next(fits, torch.int32))


def _written(symbols: Integers, alphabet: int, shape: tuple[int, ...], coding: str) -> Iterator[tuple[Header, bytes]]:
    """All ways to write symbols that a coding allows."""
    layouts, coders = _PLANS[coding]
    counts = np.bincount(symbols, minlength=alphabet)
    for layout in layouts:
        if layout == "all":
            yield _stream(symbols, alphabet, coders)
        elif counts.max() >= _LEAST_SHARE * len(symbols) > 0:
            base = int(counts.argmax())
            part, data, chosen = _gaps(symbols, base, shape, layout, coders)
            rest = symbols[chosen]
            coded, stream = _stream(rest - (rest > base), alphabet - 1, coders)
            yield part | coded, data + stream


def _gaps(
    symbols: NDArray[Any], base: int, shape: tuple[int, ...], layout: str, coders: tuple[str, ...]
) -> tuple[Header, bytes, Integers]:
    """Distances between the symbols that are not `base`, written; and where these are, in the order walked."""
    places = _order(shape, layout)
    walked = symbols if places is None else symbols[places]
    positions = np.flatnonzero(walked != base)
    bits = run_lengths.best_width(positions, coders)
    distances = run_lengths.distances(positions, bits)
    alphabet = int(distances.max(initial=0)) + 1
    coded, data = _stream(distances, alphabet, coders)
    part = {"by": layout, "base": base, "count": len(distances), "bits": bits, "distances": alphabet, **coded}
    return {"gaps": part}, data, positions if places is None else places[positions]


def _stream(symbols: Integers, alphabet: int, coders: tuple[str, ...]) -> tuple[Header, bytes]:
    packed = packed_bytes(len(symbols), _bits(alphabet))
    short = (
        huffman.encoded_bytes(np.bincount(symbols, minlength=alphabet)) if 0 < alphabet <= huffman.MOST else math.inf
    )
    if "huffman" in coders and (short < packed or ("packed" not in coders and short < math.inf)):
        return {"code": "huffman"}, huffman.encode(symbols, alphabet)
    return {"code": "packed"}, pack(symbols, _bits(alphabet))


def _bits(alphabet: int) -> int:
    return max(alphabet - 1, 0).bit_length()


def _order(shape: tuple[int, ...], layout: str) -> Integers | None:
    """Places of a tensor's numbers in the order walked; None as they lie."""
    if layout == "rows":
        return None
    count = math.prod(shape)
    rows = shape[0] if shape else 1
    return np.arange(count).reshape(rows, -1).T.reshape(-1)


def _words(tensor: Tensor) -> NDArray[Any]:
    """Bit patterns of a tensor's numbers, flat, as little-endian unsigned integers."""
    # A copy, because one number or none may have any strides, with which it cannot be viewed as bytes.
    flat = torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.detach().reshape(-1))
    return flat.view(torch.uint8).numpy().view(f"<u{tensor.dtype.itemsize}")


def _dtype_name(tensor: Tensor) -> str:
    name = str(tensor.dtype).removeprefix("torch.")
    if name not in DTYPES or tensor.layout != torch.strided or tensor.is_meta:
        raise ValueError(
            f"a {tensor.layout} {tensor.dtype} tensor on {tensor.device} cannot be stored: "
            f"make it a dense one of {', '.join(DTYPES)}"
        )
    return name


# Decoding: nothing in a header is trusted. What it announces must be plausible for the bytes that are there before
# memory is taken for it, and a value must use up its bytes exactly.


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    @property
    def left(self) -> int:
        return len(self.data) - self.at

    def take(self, count: int) -> bytes:
        if count > self.left:
            raise ValueError(f"{count} bytes are announced but {self.left} are left")
        self.at += count
        return self.data[self.at - count : self.at]

    def symbols(self, count: int, alphabet: int, code: object) -> Integers:
        if code == "huffman":
            found, used = huffman.decode(self.data[self.at :], alphabet, count)
            self.take(used)
            return found
        if code != "packed":
            raise ValueError(f"symbols are packed or huffman, not {code!r}")
        bits = _bits(alphabet)
        found = unpack(self.take(packed_bytes(count, bits)), bits, count)
        if found.size and found.max() >= alphabet:
            raise ValueError(f"symbol {found.max()} is not among {alphabet}")
        return found


def _decode(header: Header, reader: _Reader) -> Stored:
    shape = shape_of(header)
    if "dtype" in header:
        return _decode_tensor(header, reader, shape)
    alphabet = _whole(header, "codes", 1, _MOST_CODES)
    if "book" in header:
        levels = _decode_plain(header["book"], reader)
        if levels.shape not in ((alphabet,), (*shape[:1], alphabet)):
            raise ValueError(f"levels have shape {tuple(levels.shape)} but there are {alphabet} codes")
        symbols = _decode_symbols(header, reader, shape, alphabet)
        return Codebook(torch.from_numpy(symbols.astype(np.int32)).reshape(shape), levels)
    scale = _decode_plain(header.get("scale"), reader)
    zero = _decode_plain(header["zero"], reader).int() if "zero" in header else torch.zeros((), dtype=torch.int32)
    low, step = (_whole(header, key, -(2**31), 2**31 - 1) for key in ("low", "step"))
    if not -(2**31) <= low + step * (alphabet - 1) < 2**31:
        raise ValueError(f"codes {low} + {step} * {alphabet - 1} are beyond int32")
    codes = low + step * _decode_symbols(header, reader, shape, alphabet)
    for constant in (scale, zero):
        own = constant.shape
        if len(own) > len(shape) or any(a not in (1, b) for a, b in zip(reversed(own), reversed(shape), strict=False)):
            raise ValueError(f"a scale or zero point of shape {tuple(own)} does not fit {shape}")
    return Codes(torch.from_numpy(codes.astype(np.int32)).reshape(shape), scale, zero)


def _decode_plain(header: object, reader: _Reader) -> Tensor:
    # Written plainly, so that it takes no more memory than the bytes that are there.
    if not isinstance(header, dict) or header.keys() != {"dtype", "shape"}:
        raise ValueError(f"a book has a type and a shape, not {header!r}")
    return _decode_tensor(header, reader, shape_of(header))


def _decode_tensor(header: Header, reader: _Reader, shape: tuple[int, ...]) -> Tensor:
    dtype = _dtype(header)
    word, count = f"<u{dtype.itemsize}", math.prod(shape)
    if "levels" in header:
        alphabet = _whole(header, "levels", 1, _MOST_CODES)
        levels = np.frombuffer(reader.take(alphabet * dtype.itemsize), word)
        words = levels[_decode_symbols(header, reader, shape, alphabet)]
    elif "gaps" in header:
        base, places = _decode_gaps(header["gaps"], reader, shape, 256**dtype.itemsize)
        few = np.frombuffer(reader.take(len(places) * dtype.itemsize), word)
        words = np.full(count, base, word)
        words[places] = few
    else:
        words = np.frombuffer(reader.take(count * dtype.itemsize), word).copy()
    if dtype == torch.bool and words.size and words.max() > 1:
        raise ValueError(f"a bool is 0 or 1, not {words.max()}")
    return torch.from_numpy(words.view(np.uint8)).view(dtype).reshape(shape)


def _decode_symbols(header: Header, reader: _Reader, shape: tuple[int, ...], alphabet: int) -> Integers:
    if "gaps" not in header:
        return reader.symbols(math.prod(shape), alphabet, header.get("code"))
    base, places = _decode_gaps(header["gaps"], reader, shape, alphabet)
    few = reader.symbols(len(places), alphabet - 1, header.get("code"))
    symbols = np.full(math.prod(shape), base, np.int64)
    symbols[places] = few + (few >= base)
    return symbols


def _decode_gaps(header: object, reader: _Reader, shape: tuple[int, ...], bases: int) -> tuple[int, Integers]:
    """The symbol that is not written, and the places of all others."""
    if not isinstance(header, dict) or header.get("by") not in _SPARSE:
        raise ValueError(f"distances run by {' or '.join(_SPARSE)}, not {header!r}")
    base = _whole(header, "base", 0, bases - 1)
    bits = _whole(header, "bits", run_lengths.WIDTHS[0], run_lengths.WIDTHS[-1])
    alphabet = _whole(header, "distances", 1, 2**bits)
    total = math.prod(shape)
    # Every distance but a filler has a value of its own, and a filler covers 2^bits - 1 values.
    symbols = reader.symbols(_whole(header, "count", 0, total), alphabet, header.get("code"))
    positions = run_lengths.positions(symbols, bits)
    if len(positions) and positions[-1] >= total:
        raise ValueError(f"distances lead to position {positions[-1]} of {total}")
    places = _order(shape, header["by"])
    return base, positions if places is None else places[positions]


def _whole(header: Header, key: str, low: int, high: int) -> int:
    number = header.get(key)
    if type(number) is not int or not low <= number <= high:
        raise ValueError(f"{key!r} is {number!r} but must be a whole number from {low} to {high}")
    return number


def _dtype(header: Header) -> torch.dtype:
    name = header.get("dtype")
    if not isinstance(name, str) or name not in DTYPES:
        raise ValueError(f"unknown number type {name!r}")
    return DTYPES[name]
