"""Packing, Huffman codes, run lengths and CSR against references written from their definitions."""

import functools
import heapq
import itertools
import math

import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from classical.storage import csr, huffman, run_lengths
from classical.storage.packing import pack, packed_bytes, unpack

COUNTS = st.lists(st.integers(0, 10_000) | st.integers(0, 3), min_size=1, max_size=40)


# Packing.


@given(st.integers(1, 16), st.data())
def test_packing_writes_the_digits_one_after_the_other(bits: int, data: st.DataObject) -> None:
    values = data.draw(st.lists(st.integers(0, 2**bits - 1), max_size=50))
    text = "".join(format(value, f"0{bits}b") for value in values)
    text += "0" * (-len(text) % 8)
    expected = bytes(int(text[i : i + 8], 2) for i in range(0, len(text), 8))
    packed = pack(np.array(values, np.int64), bits)
    assert packed == expected
    assert len(packed) == packed_bytes(len(values), bits) == math.ceil(len(values) * bits / 8)
    assert unpack(packed, bits, len(values)).tolist() == values


def test_zero_bits_hold_zeros_only() -> None:
    assert pack(np.zeros(9, np.int64), 0) == b""
    assert unpack(b"", 0, 9).tolist() == [0] * 9
    with pytest.raises(ValueError, match=r"values lie in 0 ... 1 but 0 bits hold 0 ... 0"):
        pack(np.array([0, 1]), 0)


def test_packing_errors() -> None:
    with pytest.raises(ValueError, match=r"-1 ... 3 but 2 bits hold 0 ... 3"):
        pack(np.array([3, -1]), 2)
    with pytest.raises(ValueError, match="bits is 17 but must be 0 to 16"):
        pack(np.array([1]), 17)
    with pytest.raises(ValueError, match="3 integers of 4 bits take 2 bytes, not 1"):
        unpack(b"\x11", 4, 3)
    with pytest.raises(ValueError, match="the 4 bits after the last integer must be 0"):
        unpack(b"\x11\x11", 4, 3)


# Huffman codes.


def huffman_cost(counts: list[int]) -> int:
    """Bits of an unlimited Huffman code: every merger of the two rarest costs their sum."""
    heap = [count for count in counts if count]
    if len(heap) == 1:
        return heap[0]
    heapq.heapify(heap)
    cost = 0
    while len(heap) > 1:
        pair = heapq.heappop(heap) + heapq.heappop(heap)
        cost += pair
        heapq.heappush(heap, pair)
    return cost


def limited_cost(counts: list[int], longest: int) -> float:
    """Bits of the best code of at most `longest` bits: over all numbers of codewords that end at each depth."""
    rising = sorted(count for count in counts if count)
    below = [0, *itertools.accumulate(rising)]  # a level deeper, every symbol not yet placed costs one bit more

    @functools.cache
    def best(depth: int, nodes: int, left: int) -> float:
        if not left:
            return 0
        if depth == longest:
            return 0 if nodes >= left else math.inf
        ends = range(min(nodes, left) + 1)
        return min(best(depth + 1, min(2 * (nodes - end), left), left - end) + below[left - end] for end in ends)

    return best(0, 1, len(rising))


@given(COUNTS)
def test_code_is_a_huffman_code(counts: list[int]) -> None:
    lengths = huffman.code_lengths(np.array(counts), max(1, len(counts)))  # long enough to be no limit
    used = lengths[np.array(counts) > 0]
    assert (lengths[np.array(counts) == 0] == 0).all()
    assert int(lengths @ counts) == huffman_cost(counts) if any(counts) else not lengths.any()
    if len(used) > 1:
        assert sum(2.0**-length for length in used) == 1  # Kraft's inequality, met with equality
        p = np.array(counts)[np.array(counts) > 0] / sum(counts)
        entropy = -float(p @ np.log2(p))
        assert entropy - 1e-9 <= float(used @ p) < entropy + 1


@given(st.lists(st.integers(0, 100) | st.sampled_from([1, 10, 1000, 10**6]), min_size=2, max_size=12), st.data())
def test_limited_code_is_the_best_of_its_length(counts: list[int], data: st.DataObject) -> None:
    used = sum(count > 0 for count in counts)
    longest = data.draw(st.integers(max(1, math.ceil(math.log2(max(used, 1)))), 6))
    lengths = huffman.code_lengths(np.array(counts), longest)
    assert lengths.max() <= longest
    expected = limited_cost(counts, longest) if used > 1 else sum(counts)
    assert int(lengths @ counts) == expected


def test_fibonacci_counts_meet_the_limit() -> None:
    counts = [1, 1]
    while len(counts) < 30:
        counts.append(counts[-1] + counts[-2])  # an unlimited code has codewords of 29 bits
    lengths = huffman.code_lengths(np.array(counts))
    assert lengths.max() == huffman.LONGEST == 15
    assert sum(2.0**-length for length in lengths) == 1
    assert huffman_cost(counts) < int(lengths @ counts) == limited_cost(counts, 15)
    symbols = np.repeat(np.arange(30), np.minimum(counts, 50))
    data = huffman.encode(symbols, 30)
    assert np.array_equal(huffman.decode(data, 30, len(symbols))[0], symbols)


@given(COUNTS)
def test_codewords_are_canonical_and_prefix_free(counts: list[int]) -> None:
    lengths = huffman.code_lengths(np.array(counts))
    words = huffman.codewords(lengths)
    texts = [format(word, f"0{length}b") for word, length in zip(words, lengths, strict=True) if length]
    assert not any(a != b and b.startswith(a) for a, b in itertools.product(texts, texts))
    assert len(set(texts)) == len(texts)
    # Canonical: in the order of length, then symbol, codewords rise as binary fractions.
    order = sorted((int(length), symbol) for symbol, length in enumerate(lengths) if length)
    fractions = [words[symbol] / 2**length for length, symbol in order]
    assert fractions == sorted(fractions)
    assert not fractions or fractions[0] == 0


def reference_decode(data: bytes, alphabet: int, count: int) -> list[int]:
    """Bit by bit, from the definition of a canonical code."""
    digits = "".join(format(byte, "08b") for byte in data)
    table = math.ceil(alphabet / 2)
    lengths = [int(digits[4 * i : 4 * i + 4], 2) for i in range(alphabet)]
    code, words = 0, {}
    for length in range(1, 16):
        for symbol in range(alphabet):
            if lengths[symbol] == length:
                words[format(code, f"0{length}b")] = symbol
                code += 1
        code *= 2
    found, word = [], ""
    for digit in digits[8 * table :]:
        if len(found) == count:
            break
        word += digit
        if word in words:
            found.append(words[word])
            word = ""
    return found


@given(st.integers(1, 40), st.data())
def test_encoding_round_trips_and_follows_the_definition(alphabet: int, data: st.DataObject) -> None:
    symbols = data.draw(arrays(np.int64, st.integers(0, 200), elements=st.integers(0, alphabet - 1)))
    written = huffman.encode(symbols, alphabet)
    assert len(written) == huffman.encoded_bytes(np.bincount(symbols, minlength=alphabet))
    tail = data.draw(st.binary(max_size=5))
    found, used = huffman.decode(written + tail, alphabet, len(symbols))
    assert used == len(written)
    assert found.tolist() == symbols.tolist() == reference_decode(written, alphabet, len(symbols))


def test_long_streams_cross_the_borders_of_the_decoder() -> None:
    rng = np.random.default_rng(0)
    symbols = np.minimum(rng.geometric(0.05, 400_000) - 1, 255)  # several times what is decoded at once
    data = huffman.encode(symbols, 256)
    found, used = huffman.decode(data, 256, len(symbols))
    assert used == len(data) > 3 * 65536
    assert np.array_equal(found, symbols)


def test_code_needs_room() -> None:
    with pytest.raises(ValueError, match="5 symbols occur but codewords of 2 bits distinguish 4"):
        huffman.code_lengths(np.ones(5, np.int64), longest=2)
    assert huffman.code_lengths(np.ones(2**15, np.int64)).tolist() == [15] * 2**15
    with pytest.raises(ValueError, match="32769 symbols occur"):
        huffman.code_lengths(np.ones(2**15 + 1, np.int64))


@given(st.binary(max_size=40), st.integers(1, 20), st.integers(0, 10**12))
def test_any_bytes_decode_to_symbols_or_an_error(data: bytes, alphabet: int, count: int) -> None:
    try:
        found, used = huffman.decode(data, alphabet, count)
    except ValueError:
        return
    assert len(found) == count
    assert used <= len(data)
    assert not count or 0 <= found.min() <= found.max() < alphabet


def test_decoding_errors() -> None:
    data = huffman.encode(np.array([0, 1, 2, 2]), 3)  # 2 bytes of lengths 2, 2, 1; then 10 11 0 0 and two bits more
    with pytest.raises(ValueError, match="takes 3 bytes or more but 1 are left"):
        huffman.decode(data[:1], 3, 4)
    with pytest.raises(ValueError, match="bytes or more but 3 are left"):
        huffman.decode(data, 3, 9)
    with pytest.raises(ValueError, match="the data end 1 symbols early"):
        huffman.decode(data[:2] + b"\xff", 3, 5)
    with pytest.raises(ValueError, match="the bits after them are missing or not 0"):
        huffman.decode(data[:2] + bytes([data[2] | 1]), 3, 4)
    with pytest.raises(ValueError, match="the beginning of 3 of 4 words: no complete code"):
        huffman.decode(b"\x22\x20\x00", 3, 2)
    with pytest.raises(ValueError, match="one symbol, written 0, but the data hold a 1"):
        huffman.decode(b"\x10\x40", 2, 2)


# Run lengths.


def reference_positions(symbols: list[int], bits: int) -> list[int]:
    """Walk along the tensor."""
    at, found = 0, []
    for symbol in symbols:
        at += symbol
        if symbol < 2**bits - 1:
            found.append(at)
            at += 1
    return found


@given(st.sets(st.integers(0, 500), max_size=60), st.integers(1, 12))
def test_distances_lead_back_to_the_positions(chosen: set[int], bits: int) -> None:
    positions = np.array(sorted(chosen), np.int64)
    symbols = run_lengths.distances(positions, bits)
    assert not len(symbols) or 0 <= symbols.min() <= symbols.max() < 2**bits
    assert run_lengths.positions(symbols, bits).tolist() == positions.tolist()
    assert reference_positions(symbols.tolist(), bits) == positions.tolist()


def test_a_filler_bridges_long_distances() -> None:
    assert run_lengths.distances(np.array([1, 4, 15]), 3).tolist() == [1, 2, 7, 3]  # 10 zeros: 7 by a filler, 3 more


@pytest.mark.parametrize("coders", [("packed",), ("huffman",), ("packed", "huffman")])
@pytest.mark.parametrize("density", [0.5, 0.08, 0.004])
def test_best_width_is_the_best_of_all_widths(density: float, coders: tuple[str, ...]) -> None:
    positions = np.flatnonzero(np.random.default_rng(1).random(20_000) < density)

    def written(bits: int) -> int:
        symbols = run_lengths.distances(positions, bits)
        lengths = {
            "packed": len(pack(symbols, bits)),
            "huffman": len(huffman.encode(symbols, int(symbols.max()) + 1)),
        }
        return min(lengths[coder] for coder in coders)

    chosen = run_lengths.best_width(positions, coders)
    assert written(chosen) == min(written(bits) for bits in run_lengths.WIDTHS)


def test_best_width_of_nothing() -> None:
    assert run_lengths.best_width(np.zeros(0, np.int64), ("packed", "huffman")) in run_lengths.WIDTHS


# CSR.


def test_csr_of_half_zeros_is_larger_than_the_matrix() -> None:
    matrix = torch.tensor([[1.0, 0, 2, 0], [0, 3, 0, 4], [5, 0, 0, 6], [0, 7, 8, 0]])
    found = csr(matrix)
    assert found.numbers == 5 + 8 + 8 > matrix.numel() == 16
    assert found.bytes() == 5 + 8 + 4 * 8  # every index fits into a byte
    assert found.bytes(value_bits=3) == 5 + 8 + 3


@given(st.integers(1, 5), st.integers(1, 400), st.floats(0, 1), st.integers(0, 99))
def test_csr_is_scipys(rows: int, columns: int, density: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    dense = rng.normal(size=(rows, columns)) * (rng.random((rows, columns)) < density)
    ours, theirs = csr(torch.from_numpy(dense)), scipy.sparse.csr_array(dense)
    assert ours.values.tolist() == theirs.data.tolist()
    assert ours.columns.tolist() == theirs.indices.tolist()
    assert ours.offsets.tolist() == theirs.indptr.tolist()
    assert torch.equal(ours.dense(), torch.from_numpy(dense))
    index = [theirs.indices, theirs.indptr]
    assert ours.bytes() == theirs.data.nbytes + sum(
        len(a) * np.min_scalar_type(a.max(initial=0)).itemsize for a in index
    )


def test_csr_of_other_shapes() -> None:
    kernels = torch.arange(24.0).reshape(2, 3, 2, 2) * (torch.arange(24).reshape(2, 3, 2, 2) % 3 == 0)
    assert torch.equal(csr(kernels).dense(), kernels)
    assert len(csr(kernels).offsets) == 3
    vector = torch.tensor([0.0, 2.0, 0.0])
    assert torch.equal(csr(vector).dense(), vector)
    assert csr(torch.zeros(3, 2)).numbers == 4
    for empty in (torch.tensor(1.0), torch.zeros(0, 3)):
        with pytest.raises(ValueError, match="at least one row and one column"):
            csr(empty)
