"""Files of tensors: exact bytes, a checksum, and nothing but data in them.

    bytes 0-3    b"QCNV"
    byte  4      version of the format, 1
    bytes 5-8    length of the header, little-endian
                 header: JSON, deflated with a dictionary of its usual words
                 one section for each tensor, in the header's order
    last 4       CRC-32 of all bytes before, little-endian

A CRC-32 detects every change within 32 neighboring bits, and any other one but 1 in 2^32.
"""

import json
import math
import os
import struct
import uuid
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from classical.quantizers import Codebook, Codes
from classical.storage.codings import Header, Stored, check_coding, decode, decoded_bytes, describe, encode, shape_of

_MAGIC, _VERSION = b"QCNV", 1
_START, _END = struct.Struct("<4sBI"), struct.Struct("<I")
_MOST_HEADER = 1 << 24
MAX_BYTES = 1 << 30
"""What a file may decode to unless more is allowed: a few bytes can announce tensors of any size."""
# Deflate refers back to these words, so that a small file's header need not spell them out.
_WORDS = (
    b'"int64","uint8","bool","float16","float64","num_batches_tracked","metadata":{"zero":{"dtype":"int8","int8_channel'
    b'"scale":{"dtype":"float32","shape":[]},"low":-127,"step":1,"codes":255,"code":"packed","book":{"dtype":'
    b'"columns","code":"huffman","bytes":"levels":16,"code":"packed","gaps":{"base":0,"bits":8,"by":"rows",'
    b'"code":"huffman","count":,"distances":256},"levels":17,"name":"running_var","shape":[64]},'
    b'{"bytes":4,"dtype":"float32","name":"activation_quantizer.low","shape":[]},{"bytes":,"code":"huffman",'
    b'"dtype":"float32","name":"conv1.bias","shape":[3,3]},{"bytes":,"dtype":"float32","name":"fc1.weight","shape":[512,'
)


@dataclass(frozen=True)
class Size:
    """What one tensor takes in a file.

    Args:
        name: the tensor's.
        coding: how it was written, in words.
        shape: the tensor's.
        bytes: of its section: codes, tables, levels and scales. The header is not in it.
    """

    name: str
    coding: str
    shape: tuple[int, ...]
    bytes: int

    @property
    def numbers(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Sizes:
    """What a file consists of: its tensors, and `overhead` bytes of header and checksum."""

    tensors: tuple[Size, ...]
    overhead: int
    metadata: Mapping[str, str]

    @property
    def bytes(self) -> int:
        """The file's size on disk."""
        return sum(size.bytes for size in self.tensors) + self.overhead

    @property
    def ratio(self) -> float:
        """How many times larger the same numbers are as float32, 4 bytes each with no header."""
        return 4 * sum(size.numbers for size in self.tensors) / self.bytes

    def __str__(self) -> str:
        rows = [("tensor", "coding", "numbers", "bytes", "ratio")]
        rows += [
            (t.name, t.coding, f"{t.numbers:,}", f"{t.bytes:,}", f"{4 * t.numbers / t.bytes:.2f}" if t.bytes else "")
            for t in self.tensors
        ]
        rows += [("(header)", "", "", f"{self.overhead:,}", "")]
        numbers = sum(t.numbers for t in self.tensors)
        rows += [("total", "", f"{numbers:,}", f"{self.bytes:,}", f"{self.ratio:.2f}")]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = (
            "  ".join(c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
            for row in rows
        )
        return "\n".join(line.rstrip() for line in lines)


def save(
    tensors: Mapping[str, Stored],
    path: str | os.PathLike[str],
    *,
    coding: str = "auto",
    metadata: Mapping[str, str] | None = None,
) -> int:
    """Write tensors to a file that `load` reads back bit for bit; the file appears whole or not at all.

    A negative zero is kept too, as one value more: add 0.0 to a weight that was multiplied by a mask.

    Args:
        tensors: by name: tensors, or Codes or a Codebook as a quantizer states them.
        path: written beside and renamed, so an old file stays until the new one is complete.
        coding: "dense"; "packed" (codes of equal width), "huffman"; "sparse", "sparse_huffman" (distances between
            non-zeros, or whatever is not the most frequent value); or "auto", the smallest for each tensor. A tensor
            that a coding would not make smaller is stored plainly.
        metadata: texts to keep beside the tensors.

    Returns:
        Bytes of the file.

    Raises:
        ValueError: an unknown coding, a tensor that cannot be stored, an argument of another type.
    """
    check_coding(coding)
    if not isinstance(tensors, Mapping) or not all(isinstance(name, str) for name in tensors):
        raise ValueError(f"tensors is a {type(tensors).__name__} but must map names, as strings, to tensors")
    if not all(isinstance(text, str) for item in (metadata or {}).items() for text in item):
        raise ValueError(f"metadata is {metadata} but must map strings to strings")
    headers, sections = [], []
    for name, value in tensors.items():
        try:
            header, section = encode(value, coding)
        except ValueError as error:
            raise ValueError(f"{name!r}: {error}") from None
        headers.append(header | {"name": name, "bytes": len(section)})
        sections.append(section)
    content: Header = {"tensors": headers} | ({"metadata": dict(metadata)} if metadata else {})
    packer = zlib.compressobj(9, wbits=-15, zdict=_WORDS)
    text = json.dumps(content, separators=(",", ":"), sort_keys=True).encode()
    head = packer.compress(text) + packer.flush()
    data = b"".join((_START.pack(_MAGIC, _VERSION, len(head)), head, *sections))
    _replace(Path(path), data + _END.pack(zlib.crc32(data)))
    return len(data) + _END.size


def read(path: str | os.PathLike[str], *, max_bytes: int = MAX_BYTES) -> dict[str, Stored]:
    """Read a file as it was given to `save`: codes stay codes.

    Args:
        path: of a file that `save` wrote.
        max_bytes: of memory that the tensors may take.

    Raises:
        ValueError: the file is damaged, incomplete, of another format, or larger than allowed once decoded.
        OSError: it cannot be read.
    """
    data = Path(path).read_bytes()
    headers, _, at = _open(data, path)
    try:
        total = sum(decoded_bytes(header) for header in headers)
    except ValueError as error:
        raise _damaged(path, str(error)) from None
    if total > max_bytes:
        raise ValueError(
            f"{os.fspath(path)} decodes to {total:,} bytes but at most {max_bytes:,} are allowed: "
            "pass a larger max_bytes if you trust it"
        )
    found = {}
    for header in headers:
        end = at + header["bytes"]
        try:
            found[header["name"]] = decode(header, data[at:end])
        except ValueError as error:
            raise _damaged(path, f"{header['name']!r}: {error}") from None
        at = end
    return found


def load(path: str | os.PathLike[str], *, max_bytes: int = MAX_BYTES) -> dict[str, Tensor]:
    """Read a file as real tensors: (codes - zero) * scale of Codes, the levels of a Codebook.

    Args:
        path: of a file that `save` wrote.
        max_bytes: of memory that the tensors may take.

    Raises:
        ValueError: the file is damaged, incomplete, of another format, or larger than allowed once decoded.
        OSError: it cannot be read.
    """
    return {name: values(stored) for name, stored in read(path, max_bytes=max_bytes).items()}


def values(stored: Stored) -> Tensor:
    """The numbers that stored codes stand for; a tensor is its own."""
    if isinstance(stored, Codes):
        return (stored.codes - stored.zero) * stored.scale
    return stored.values() if isinstance(stored, Codebook) else stored


def sizes(path: str | os.PathLike[str]) -> Sizes:
    """What each tensor of a file takes, read from its header.

    Raises:
        ValueError: the file is damaged, incomplete or of another format.
        OSError: it cannot be read.
    """
    data = Path(path).read_bytes()
    headers, metadata, at = _open(data, path)
    rows = tuple(Size(h["name"], describe(h), shape_of(h), h["bytes"]) for h in headers)
    return Sizes(rows, at + _END.size, metadata)


def _open(data: bytes, path: str | os.PathLike[str]) -> tuple[list[Header], dict[str, str], int]:
    """Headers of the tensors, the metadata, and where the first section begins."""
    if data[:4] != _MAGIC:
        raise ValueError(f"{os.fspath(path)} begins with {data[:4]!r}, not {_MAGIC!r}: it was not written by save()")
    if len(data) < _START.size + _END.size or _END.unpack(data[-4:])[0] != zlib.crc32(data[:-4]):
        raise _damaged(path, "its checksum does not fit its content")
    _, version, length = _START.unpack_from(data)
    if version != _VERSION:
        raise ValueError(f"{os.fspath(path)} has format {version} but this version reads {_VERSION}: update qconv")
    begin = _START.size + length
    try:
        if begin > len(data) - _END.size:
            raise ValueError(f"its header of {length} bytes is longer than the file")
        headers, metadata = _parse(data[_START.size : begin])
        announced = sum(header["bytes"] for header in headers)
        if announced != len(data) - _END.size - begin:
            raise ValueError(f"it announces {announced} bytes of tensors but holds {len(data) - _END.size - begin}")
    except (ValueError, zlib.error, RecursionError) as error:
        raise _damaged(path, str(error)) from None
    return headers, metadata, begin


def _parse(head: bytes) -> tuple[list[Header], dict[str, str]]:
    unpacker = zlib.decompressobj(-15, zdict=_WORDS)
    text = unpacker.decompress(head, _MOST_HEADER)
    if not unpacker.eof or unpacker.unused_data:
        raise ValueError(f"its header is cut off or longer than {_MOST_HEADER:,} bytes")
    content = json.loads(text)
    headers = content.get("tensors") if isinstance(content, dict) else None
    metadata = content.get("metadata", {}) if isinstance(content, dict) else None
    if not isinstance(headers, list) or not all(_plausible(header) for header in headers):
        raise ValueError("its header holds no list of tensors with names and sizes")
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError("its metadata are not texts by name")
    if len({header["name"] for header in headers}) < len(headers):
        raise ValueError("two of its tensors have one name")
    return headers, metadata


def _plausible(header: Any) -> bool:
    if not isinstance(header, dict) or not isinstance(header.get("name"), str):
        return False
    shape_of(header)
    return type(header.get("bytes")) is int and header["bytes"] >= 0


def _damaged(path: str | os.PathLike[str], why: str) -> ValueError:
    return ValueError(f"{os.fspath(path)} is damaged or incomplete ({why}): get another copy")


def _replace(path: Path, data: bytes) -> None:
    """Write a file beside its place and rename it: whoever reads sees the old or the new one."""
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with beside.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
