"""Files of tensors: exact round trips, exact sizes, and refusal of whatever is not such a file."""

import json
import math
import struct
import subprocess
import sys
import textwrap
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from classical.quantizers import Codebook, Codes, quantizer, quantizer_names
from classical.storage import CODINGS, files, load, read, run_lengths, save, share, sizes
from classical.storage.codings import DTYPES, Stored

IN_FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
SHAPES = st.lists(st.integers(0, 6), max_size=4).map(tuple)
CODING = st.sampled_from(CODINGS)


def bits_equal(a: Tensor, b: Tensor) -> bool:
    """Equal bit patterns: NaN equals itself, -0 is not 0."""
    same = a.dtype == b.dtype and a.shape == b.shape
    flat = (x.reshape(-1).clone(memory_format=torch.contiguous_format).view(torch.uint8) for x in (a, b))
    return same and torch.equal(*flat)


def same(a: Stored, b: Stored) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and bits_equal(a, b)
    return type(a) is type(b) and all(bits_equal(x, y) for x, y in zip(a, b, strict=True))


def sample(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sparse(*shape: int, density: float, levels: int = 0, seed: int = 0) -> Tensor:
    """Normal weights, most of them zero; `levels` values only if that is not 0."""
    weight = sample(*shape, seed=seed)
    kept = torch.rand(*shape, generator=torch.Generator().manual_seed(seed + 1)) < density
    if levels:
        weight = (weight * levels / 6).round().clamp(-levels // 2, levels // 2) * 0.125 + 0.0625
    return torch.where(kept, weight, 0)


# Round trips.


@IN_FOLDER
@given(st.sampled_from(list(DTYPES)), SHAPES, CODING, st.sampled_from([1, 2, 5, 256]), st.integers(0, 99))
def test_any_bits_of_any_type_come_back(
    tmp_path: Path, dtype: str, shape: tuple[int, ...], coding: str, variety: int, seed: int
) -> None:
    # Random bit patterns: NaNs of all kinds, infinities, subnormal numbers, negative zeros.
    size = DTYPES[dtype].itemsize
    rng = np.random.default_rng(seed)
    patterns = rng.integers(0, 2 if dtype == "bool" else 256, (variety, size), np.uint8)
    patterns[0] = 0
    raw = patterns[np.minimum(rng.geometric(0.5, math.prod(shape)) - 1, variety - 1)].reshape(-1)
    tensor = torch.from_numpy(raw).view(DTYPES[dtype]).reshape(shape)
    path = tmp_path / "file"
    assert save({"x": tensor}, path, coding=coding) == path.stat().st_size
    assert bits_equal(load(path)["x"], tensor)


@IN_FOLDER
@given(SHAPES, CODING, st.integers(-(2**31), 2**31 - 20_000), st.integers(1, 9), st.integers(1, 2000), st.data())
def test_codes_come_back(
    tmp_path: Path, shape: tuple[int, ...], coding: str, low: int, step: int, alphabet: int, data: st.DataObject
) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    codes = torch.from_numpy(np.asarray(low + step * rng.integers(0, alphabet, shape))).int()
    channels = (shape[0],) + (1,) * (len(shape) - 1) if shape and data.draw(st.booleans()) else ()
    reach = 10 ** data.draw(st.integers(0, 9))
    zero = torch.from_numpy(np.asarray(rng.integers(-reach, reach, channels))).int()
    scale = torch.from_numpy(np.asarray(rng.random(channels))).to(
        data.draw(st.sampled_from([torch.half, torch.double]))
    )
    stated = Codes(codes, scale, zero)
    path = tmp_path / "file"
    assert save({"x": stated}, path, coding=coding) == path.stat().st_size
    assert same(read(path)["x"], stated)
    assert bits_equal(load(path)["x"], (codes - zero) * stated.scale)


@pytest.mark.parametrize("coding", CODINGS)
def test_codebooks_come_back(tmp_path: Path, coding: str) -> None:
    codes = torch.randint(0, 5, (6, 4, 3), generator=torch.Generator().manual_seed(0)).int()
    whole = Codebook(codes, sample(5).sort().values)
    rows = Codebook(codes, sample(6, 5).sort().values)
    path = tmp_path / "file"
    save({"whole": whole, "rows": rows}, path, coding=coding)
    found = read(path)
    assert same(found["whole"], whole)
    assert same(found["rows"], rows)
    expected = torch.stack([rows.levels[i][codes[i].long()] for i in range(6)])
    assert torch.equal(load(path)["rows"], expected)


def test_every_weight_quantizer_comes_back(tmp_path: Path) -> None:
    weight = 0.1 * sample(6, 5, 3, 3)
    for name in quantizer_names("weight"):
        own = quantizer(name)
        own.fit(weight)
        own.eval()
        for state in (own.integers, own.codebook):
            try:
                stated = state(weight)
            except ValueError:  # levels of unequal distance, or too many to list
                continue
            save({name: stated}, tmp_path / "file")
            assert same(read(tmp_path / "file")[name], stated), name
            assert torch.equal(load(tmp_path / "file")[name], own(weight)), name


CASES = {
    "empty": torch.zeros(0),
    "empty matrix": torch.zeros(3, 0, 2),
    "scalar": torch.tensor(1.5),
    "one number": torch.tensor([[-2.0]]),
    "all zero": torch.zeros(30, 20),
    "one value": torch.full((30, 20), 0.1),
    "one non-zero": torch.eye(1, 600).reshape(30, 20),
    "last non-zero": torch.eye(600)[-1].reshape(30, 20),
    "two values": (sample(30, 20) > 0).float(),
    "columns": sample(1, 20) * torch.ones(30, 20) * (torch.arange(20) % 7 == 0),
    "strided": sample(20, 30).T[::2],
    "channels last": sample(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
    "requires grad": sample(5).requires_grad_(),
    "vector": sparse(5000, density=0.01),
    "deep": sparse(1, 2, 1, 3, 1, 4, density=0.5),
}


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("case", CASES)
def test_shapes_and_contents_at_the_edge(tmp_path: Path, case: str, coding: str) -> None:
    tensor = CASES[case]
    save({"x": tensor, "again": tensor}, tmp_path / "file", coding=coding)
    found = load(tmp_path / "file")
    assert list(found) == ["x", "again"]
    assert all(bits_equal(value, tensor.detach()) for value in found.values())


def test_no_tensors_and_any_names(tmp_path: Path) -> None:
    path = tmp_path / "file"
    save({}, path)
    assert load(path) == {}
    names = ["", "ä\n\u2192", "a" * 1000, '"quoted"']
    save({name: torch.tensor(float(i)) for i, name in enumerate(names)}, str(path), metadata={"who": "\u00fc"})
    assert {name: float(value) for name, value in load(path).items()} == {name: i for i, name in enumerate(names)}
    assert sizes(path).metadata == {"who": "\u00fc"}


# Sizes.


def test_auto_is_never_larger_than_any_coding(tmp_path: Path) -> None:
    tensors: dict[str, Stored] = {
        "float": sample(50, 40),
        "few": sparse(50, 40, density=0.05),
        "half": sparse(50, 40, density=0.5),
        "shared": sparse(50, 40, density=0.1, levels=16),
        "int8": quantizer("int8").integers(sample(50, 40)),
        "ternary": quantizer("twn").integers(sample(50, 40)),
        "signs": quantizer("bnn").integers(sample(50, 40)),
        "rows": sparse(200, 40, density=0.5) * (torch.arange(200) % 9 == 0)[:, None],
        "columns": sparse(40, 200, density=0.5) * (torch.arange(200) % 9 == 0),
    }
    for name, tensor in tensors.items():
        found = {}
        for coding in CODINGS:
            found[coding] = save({"x": tensor}, tmp_path / coding, coding=coding)
            assert same(read(tmp_path / coding)["x"], tensor)
        assert found["auto"] <= min(found.values()) + 8, name  # of a header, only the text is known beforehand
        assert found["dense"] >= max(found.values()) - 8, name


def test_sizes_are_those_on_disk(tmp_path: Path) -> None:
    path = tmp_path / "file"
    tensors = {"w": sparse(60, 50, density=0.1, levels=8), "v": sample(7), "i": torch.arange(3)}
    written = save(tensors | {"c": quantizer("int4_channel").integers(sample(8, 9))}, path)
    found = sizes(path)
    assert written == found.bytes == path.stat().st_size == sum(row.bytes for row in found.tensors) + found.overhead
    assert [row.name for row in found.tensors] == ["w", "v", "i", "c"]
    assert [row.shape for row in found.tensors] == [(60, 50), (7,), (3,), (8, 9)]
    assert found.tensors[1].bytes == 28
    assert found.tensors[3].bytes == 8 * 4 + 36  # a scale a channel, 4 bits a code
    assert found.ratio == 4 * (3000 + 7 + 3 + 72) / written
    text = str(found)
    assert f"{written:,}" in text
    assert "15 codes, packed" in text
    assert "distances of" in text


def test_binary_and_ternary_codes_take_one_and_two_bits(tmp_path: Path) -> None:
    weight = sample(64, 64)
    for name, bits in (("bnn", 1), ("twn", 2), ("int4", 4), ("int8", 8)):
        save({"x": quantizer(name).integers(weight)}, tmp_path / name, coding="packed")
        assert sizes(tmp_path / name).tensors[0].bytes == 64 * 64 * bits // 8 + 4, name


def test_sparse_ternary_weights_are_distances_and_signs(tmp_path: Path) -> None:
    signs = sparse(80, 90, density=0.1).sign()
    stated = Codes(signs.int(), torch.tensor(0.3), torch.tensor(0, dtype=torch.int32))
    places = np.flatnonzero(signs.numpy())
    save({"x": stated}, tmp_path / "file", coding="sparse")
    distances = min(len(run_lengths.distances(places, bits)) * bits for bits in range(1, 10))
    assert sizes(tmp_path / "file").tensors[0].bytes <= 4 + math.ceil(distances / 8) + math.ceil(len(places) / 8)
    save({"x": stated}, tmp_path / "file", coding="sparse_huffman")
    p = len(places) / signs.numel()
    entropy = signs.numel() * -(p * np.log2(p) + (1 - p) * np.log2(1 - p)) / 8 + len(places) / 8
    assert entropy < sizes(tmp_path / "file").tensors[0].bytes < 1.02 * entropy + 2**6 / 2 + 8  # a table of 2^6 lengths
    assert same(read(tmp_path / "file")["x"], stated)


@pytest.mark.parametrize("density", [0.08, 0.04, 0.024])
def test_sparse_shared_weights_come_close_to_their_entropy(tmp_path: Path, density: float) -> None:
    rows, columns, levels = 300, 784, 16
    rng = np.random.default_rng(2)
    kept = rng.random((rows, columns)) < density
    weight = np.where(kept, rng.integers(1, levels + 1, (rows, columns)), 0)
    count, p = kept.sum(), kept.mean()
    positions = -rows * columns * (p * np.log2(p) + (1 - p) * np.log2(1 - p))
    share_of = np.bincount(weight[kept])[1:] / count
    bound = (positions - count * (share_of @ np.log2(share_of))) / 8
    tables = 4 * (levels + 1)
    tensor = torch.from_numpy(weight).float() / 8
    written = save({"fc1.weight": tensor}, tmp_path / "file")
    assert bound < written < 1.015 * bound + tables + 130
    assert torch.equal(load(tmp_path / "file")["fc1.weight"], tensor)


def test_headers_take_tens_of_bytes_a_tensor(tmp_path: Path) -> None:
    few = {f"fc{i}.{kind}": sparse(30, 20, density=0.1, levels=8) for i in range(20) for kind in ("weight", "bias")}
    save(few, tmp_path / "file")
    assert sizes(tmp_path / "file").overhead < 30 * len(few)


# Damage.


REFUSED = r"is damaged or incomplete|it was not written by save\(\)"


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    shared = share(sparse(20, 30, density=0.2), 3)
    save({"a": sample(3), "b": shared, "c": quantizer("int8").integers(sample(4, 9)), "d": shared.values()}, path)
    return path


def test_change_of_any_byte_is_detected(written: Path) -> None:
    data = written.read_bytes()
    for at in range(len(data)):
        written.write_bytes(data[:at] + bytes([data[at] ^ (1 << at % 8)]) + data[at + 1 :])
        with pytest.raises(ValueError, match=REFUSED):
            sizes(written) if at % 2 else load(written)


def test_missing_and_surplus_bytes_are_detected(written: Path) -> None:
    data = written.read_bytes()
    for end in range(len(data)):
        written.write_bytes(data[:end])
        with pytest.raises(ValueError, match=REFUSED):
            load(written)
    for surplus in (b"\0", data[-4:], data):
        written.write_bytes(data + surplus)
        with pytest.raises(ValueError, match="is damaged or incomplete"):
            load(written)


@pytest.mark.parametrize("content", [b"", b"x", b"PK\x03\x04" + bytes(50), b"\x80\x02}q\x00.", b"QCN" + bytes(20)])
def test_foreign_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"file begins with b'.* not b'QCNV': it was not written by save\(\)"):
        load(path)
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none")


def forge(path: Path, header: Any, sections: bytes = b"", version: int = 1) -> Path:
    """A file with a valid checksum and any header, from the description of the format."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    packer = zlib.compressobj(9, wbits=-15, zdict=files._WORDS)
    head = packer.compress(text) + packer.flush()
    data = b"QCNV" + struct.pack("<BI", version, len(head)) + head + sections
    path.write_bytes(data + struct.pack("<I", zlib.crc32(data)))
    return path


def entry(**changes: Any) -> dict[str, Any]:
    return {"tensors": [{"name": "x", "bytes": 4, "dtype": "float32", "shape": [1]} | changes]}


def coded(**changes: Any) -> dict[str, Any]:
    return {"tensors": [{"name": "x", "bytes": 4, "shape": [1], "codes": 1, "low": 0, "step": 1} | changes]}


PLAIN = {"dtype": "uint8", "shape": [1]}
GAPS = {"by": "rows", "base": 0, "count": 1, "bits": 1, "distances": 1, "code": "packed"}
HOSTILE: dict[str, tuple[Any, str]] = {
    "huge": (entry(shape=[2**20, 2**20]), "4,398,046,511,104 bytes but at most 1,073,741,824 are allowed"),
    "astronomic": (entry(shape=[2**62, 2**62]), "more than 2\\^48 numbers"),
    "huge beside nothing": (entry(shape=[0, 2**60]), "more than 2\\^48 numbers"),
    "huge constant": (entry(shape=[2**40], levels=1, code="packed"), "at most 1,073,741,824 are allowed"),
    "larger than its bytes": (entry(shape=[2**20]), "4194304 bytes are announced but 4 are left"),
    "smaller than its bytes": (entry(shape=[0]), "4 bytes are left over"),
    "many packed": (entry(shape=[2**20], levels=2, code="packed"), "8 bytes are announced but 4 are left"),
    "many huffman": (entry(shape=[2**20], levels=1, code="huffman"), "or more but 0 are left"),
    "many levels": (entry(levels=2**17, code="packed"), "'levels' is 131072 but must be .* from 1 to 65536"),
    "no levels": (entry(levels=0, code="packed"), "'levels' is 0"),
    "level of a fraction": (entry(levels=1.0, code="packed"), "'levels' is 1.0"),
    "true levels": (entry(levels=True, code="packed"), "'levels' is True"),
    "many distances": (entry(shape=[9], gaps=GAPS | {"count": 10}), "'count' is 10 but must be .* from 0 to 9"),
    "wide distances": (entry(gaps=GAPS | {"bits": 60}), "'bits' is 60"),
    "distances too far": (entry(gaps=GAPS | {"bits": 2, "distances": 2}, bytes=5), "position 1 of 1"),
    "no distances": (entry(gaps=[1]), "distances run by rows or columns"),
    "negative shape": (entry(shape=[-1]), "the shape must be a list of sizes"),
    "shape of text": (entry(shape="9"), "the shape must be a list of sizes"),
    "deep shape": (entry(shape=[1] * 99), "the shape must be a list of sizes"),
    "unknown type": (entry(dtype="float33"), "unknown number type 'float33'"),
    "type of a list": (entry(dtype=[]), "unknown number type"),
    "unknown coder": (entry(levels=1, code="zip"), "packed or huffman, not 'zip'"),
    "negative bytes": (entry(bytes=-4), "no list of tensors"),
    "surplus bytes": (entry(bytes=3), "it announces 3 bytes of tensors but holds"),
    "no name": ({"tensors": [{"bytes": 4, "dtype": "float32", "shape": [1]}]}, "no list of tensors"),
    "nothing": ({}, "no list of tensors"),
    "a list": ([], "no list of tensors"),
    "no JSON": (b"{", "is damaged"),
    "no text": (b"\xff\xfe", "is damaged"),
    "deep JSON": (b"[" * 1_000_000, "is damaged"),
    "long JSON": (b" " * (1 << 25), "cut off or longer than 16,777,216 bytes"),
    "metadata": (entry() | {"metadata": {"a": 1}}, "metadata are not texts"),
    "two of a name": ({"tensors": [entry(bytes=2)["tensors"][0]] * 2}, "two of its tensors have one name"),
    "scale of another shape": (
        coded(scale=PLAIN | {"shape": [4]}, code="packed"),
        r"of shape \(4,\) does not fit \(1,\)",
    ),
    "scale of many": (coded(scale=PLAIN | {"shape": [2**30], "levels": 1}), "a book has a type and a shape"),
    "codes beyond int32": (coded(codes=9, low=2**31 - 1, scale=PLAIN | {"shape": [4]}), "beyond int32"),
    "book of another size": (coded(codes=2, book=PLAIN), r"levels have shape \(1,\) but there are 2 codes"),
    "no book": (coded(codes=2), "a book has a type and a shape"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_forged_headers_are_refused_and_cost_no_memory(tmp_path: Path, case: str) -> None:
    header, message = HOSTILE[case]
    path = forge(tmp_path / "file", header, b"\x80" * (case == "distances too far") + bytes(4))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=message):
            load(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < (1 << 26 if "JSON" in case else 1 << 20)


def test_forged_bool_and_version(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a bool is 0 or 1, not 9"):
        load(forge(tmp_path / "file", entry(dtype="bool", bytes=1), b"\x09"))
    with pytest.raises(ValueError, match="has format 2 but this version reads 1"):
        load(forge(tmp_path / "file", entry(), bytes(4), version=2))
    assert load(forge(tmp_path / "file", entry(), bytes(4)))["x"].tolist() == [0]


JSON = (
    st.none() | st.booleans() | st.integers(-3, 70) | st.sampled_from([2**16, 2**31, 2**70, 0.5, "", "packed", [], {}])
)


def leaves(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [path] * (path != ()) + [leaf for key, child in items for leaf in leaves(child, (*path, key))]


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_changed_headers_give_an_error_or_a_file(written: Path, tmp_path: Path, data: st.DataObject) -> None:
    original = written.read_bytes()
    length = struct.unpack_from("<I", original, 5)[0]
    header = json.loads(zlib.decompressobj(-15, zdict=files._WORDS).decompress(original[9 : 9 + length]))
    for _ in range(data.draw(st.integers(1, 2))):
        *where, last = data.draw(st.sampled_from(leaves(header) or [("tensors",)]))
        node = header
        for key in where:
            node = node[key]
        if data.draw(st.booleans()) and isinstance(node, dict):
            node.pop(last, None)
        else:
            node[last] = data.draw(JSON)
    path = forge(tmp_path / "forged", header, original[9 + length : -4])
    for function in (load, sizes):
        try:
            function(path)
        except ValueError as error:
            known = str(error)
        else:
            known = str(path)
        assert str(path) in known


# Writing.


def test_failed_writing_leaves_the_old_file(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = written.read_bytes()

    def fail(*_: object) -> None:
        raise OSError("no space")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        save({"x": torch.zeros(3)}, written)
    assert written.read_bytes() == before
    assert list(written.parent.iterdir()) == [written]


def test_killed_writer_leaves_the_old_file(written: Path) -> None:
    before = written.read_bytes()
    script = f"""
        import os, pathlib, torch
        from classical.storage import save
        pathlib.Path.replace = lambda *_: os.kill(os.getpid(), 9)
        save({{"x": torch.zeros(3)}}, {str(written)!r})
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False)
    assert done.returncode == -9
    assert written.read_bytes() == before
    assert len(load(written)) == 4


def test_same_tensors_give_the_same_bytes(written: Path, tmp_path: Path) -> None:
    tensors = read(written)
    save(tensors, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == written.read_bytes()
    assert same(read(tmp_path / "again")["b"], tensors["b"])


def test_saving_errors(tmp_path: Path) -> None:
    path = tmp_path / "file"
    cases: list[tuple[Any, str]] = [
        (
            torch.zeros(2, dtype=torch.complex128),
            "'x': a torch.strided torch.complex128 tensor on cpu cannot be stored",
        ),
        (torch.zeros(2, 2).to_sparse(), "a torch.sparse_coo torch.float32 tensor"),
        (torch.zeros(2, device="meta"), "on meta cannot be stored"),
        (Codes(torch.tensor([0, 70_000]), torch.tensor(1.0), torch.tensor(0)), ""),
        (
            Codes(torch.tensor([0, 1, 70_000]), torch.tensor(1.0), torch.tensor(0)),
            "there are 70001 codes but at most 65536",
        ),
        (
            Codes(torch.tensor([0.0]), torch.tensor(1.0), torch.tensor(0)),
            "codes are torch.float32 but must be integers",
        ),
        (Codebook(torch.tensor([2]), torch.zeros(2)), r"codes lie in 2 ... 2 but there are 2 levels"),
    ]
    for value, message in cases:
        if message:
            with pytest.raises(ValueError, match=message):
                save({"x": value}, path)
        else:
            save({"x": value}, path)
            assert load(path)["x"].tolist() == [0, 70_000]
            path.unlink()
    with pytest.raises(ValueError, match="unknown coding 'zip': choose one of dense, packed"):
        save({}, path, coding="zip")
    assert not path.exists()


def test_limit_of_memory_can_be_raised_and_lowered(tmp_path: Path) -> None:
    path = tmp_path / "file"
    save({"x": torch.zeros(1000)}, path)
    with pytest.raises(ValueError, match="decodes to 4,000 bytes but at most 3,999 are allowed"):
        load(path, max_bytes=3999)
    assert not load(path, max_bytes=4000)["x"].any()
