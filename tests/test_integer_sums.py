"""Additions, popcounts and two kinds of multiplications: ways to one sum, against plain loops over patches."""

import copy
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_integer import IntegersOnly, assert_near, trained
from test_quantized_layers import conv, geometries, sample
from torch import Tensor, nn

from classical.integer import integer_twin
from classical.integer.bits import BitSums
from classical.integer.codes import InputCode
from classical.integer.dense import MatrixSums
from classical.integer.grouped import GroupedSums
from classical.integer.levels import LevelSums, level_terms
from classical.integer.sums import Sums
from classical.layers import Axis, Geometry, QuantizedConv2d, QuantizedLinear
from classical.quantizers import Codebook, quantizer

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks are run from the root, and are not installed

from benchmarks.integer import FLOATS, GOALS, calls

pytest.importorskip("numba", reason="the integer extra is not installed")

BYTE = InputCode(scale=0.1, zero=-7, low=-128, high=127, step=1, shift=0)
SIGN = InputCode(scale=1.0, zero=0, low=-1, high=1, step=2, shift=0)
BIT = InputCode(scale=1.0, zero=0, low=0, high=1, step=1, shift=0)
FEW = InputCode(scale=1.0, zero=-2, low=-4, high=3, step=1, shift=0)
WIDE = InputCode(scale=0.1, zero=300, low=-2048, high=2047, step=1, shift=0)
MODES = {"zeros": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}


def draw(low: int, high: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(low, high + 1, shape, generator=torch.Generator().manual_seed(seed))


def signs(*shape: int, seed: int = 0) -> Tensor:
    return 2 * draw(0, 1, *shape, seed=seed) - 1


def accumulated(weight: Tensor, geometry: Geometry, zero: int, codes: Tensor, constant: Tensor, shift: int) -> Tensor:
    """Loops over outputs and patches, in numpy."""
    ends = [(0, 0), (0, 0), *((axis.before, axis.after) for axis in (geometry.rows, geometry.columns))]
    fill = {"constant_values": zero} if geometry.padding_mode == "zeros" else {}
    x = np.pad(codes.long().numpy(), ends, mode=MODES[geometry.padding_mode], **fill)  # type: ignore[call-overload]
    w = weight.long().numpy()
    rows, columns = geometry.rows, geometry.columns
    terms, outputs, inputs = w.shape[:3]
    height = (x.shape[2] - rows.span) // rows.stride + 1
    width = (x.shape[3] - columns.span) // columns.stride + 1
    found = np.zeros((terms, len(x), outputs, height, width), np.int64)
    for o in range(outputs):
        first = o // (outputs // geometry.groups) * inputs
        for i in range(height):
            for j in range(width):
                top, left = i * rows.stride, j * columns.stride
                patch = x[:, first : first + inputs, top : top + rows.span : rows.dilation]
                patch = patch[..., left : left + columns.span : columns.dilation]
                found[:, :, o, i, j] = np.einsum("bchw,tchw->tb", patch, w[:, o])
    return torch.from_numpy(found * 2**shift) + constant.long()[:, None, :, None, None]


def check(kind: type[Sums], weight: Tensor, geometry: Geometry, code: InputCode, codes: Tensor, **options: Any) -> None:
    terms, outputs = weight.shape[:2]
    constant, shift = draw(-999, 999, terms, outputs, seed=5), 3
    sums = kind(weight, geometry, code, constant, shift, **options)
    expected = accumulated(weight, geometry, code.zero, codes, constant, shift)
    codes = codes.to(code.dtype)
    with IntegersOnly():
        found = sums(codes)
    assert found.dtype == torch.int32
    assert torch.equal(found.long(), expected)
    assert torch.equal(sums(codes.to(memory_format=torch.channels_last)), found)
    assert torch.equal(sums(codes[:0]), found[:, :0])
    factors = sample(terms, outputs, dtype=torch.float64)
    offset = sample(outputs, dtype=torch.float64, seed=1)
    real = (factors[:, None, :, None, None] * expected).sum(0) + offset[:, None, None]
    torch.testing.assert_close(sums.scaled(codes, factors, offset), real, rtol=1e-12, atol=1e-9)
    single = sums.scaled(codes, factors.float(), offset.float())
    torch.testing.assert_close(single.double(), real, rtol=1e-5, atol=1e-6 * float(real.abs().max()) + 1e-6)


@pytest.mark.filterwarnings("ignore:Using padding='same'")  # torch's, about its own speed
@settings(max_examples=30, deadline=None)
@given(geometries(), st.integers(1, 3), st.integers(0, 9))
def test_all_ways_are_the_sums_of_every_geometry(case: tuple[dict[str, Any], Tensor], terms: int, seed: int) -> None:
    args, x = case
    layer = conv(**args)
    shape = layer.weight.shape
    ternary = draw(-1, 1, terms, *shape, seed=seed)
    check(LevelSums, ternary, layer.geometry, BYTE, draw(-128, 127, *x.shape, seed=seed))
    check(LevelSums, ternary, layer.geometry, WIDE, draw(-2048, 2047, *x.shape, seed=seed))
    for weight in (signs(terms, *shape, seed=seed), ternary):
        check(BitSums, weight, layer.geometry, SIGN, signs(*x.shape, seed=seed))
        check(BitSums, weight, layer.geometry, BIT, draw(0, 1, *x.shape, seed=seed))
        check(BitSums, weight, layer.geometry, FEW, draw(-4, 3, *x.shape, seed=seed))
    for code, low, high in ((BYTE, -127, 127), (BYTE, -255, 0), (BYTE, -400, 400), (WIDE, -9, 9)):
        weight = draw(low, high, terms, *shape, seed=seed)
        codes = draw(code.low, code.high, *x.shape, seed=seed)
        check(MatrixSums, weight, layer.geometry, code, codes)
        check(GroupedSums, weight, layer.geometry, code, codes)


# More than one word of channels; a word and a bit; images that fill several tiles, share one, or are one row.
SHAPES = [
    ((2, 130, 5, 6), {"out_channels": 3, "kernel_size": 3, "padding": 1}),
    ((1, 65, 4, 4), {"out_channels": 4, "kernel_size": 2, "stride": 2}),
    ((2, 2, 170, 66), {"out_channels": 2, "kernel_size": 3, "padding": (1, 2), "stride": (1, 2)}),
    ((2, 1, 3, 1100), {"out_channels": 2, "kernel_size": (3, 5), "padding": 1}),
    ((300, 4, 3, 3), {"out_channels": 5, "kernel_size": 3, "padding": 1, "groups": 1}),
    ((5, 6, 9, 9), {"out_channels": 9, "kernel_size": 3, "groups": 3, "dilation": 2}),
]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("shape", "args"), SHAPES)
def test_sizes_that_cross_words_and_tiles(shape: tuple[int, ...], args: dict[str, Any], threads: int) -> None:
    layer = conv(shape[1], **args)
    weight = layer.weight.shape
    check(LevelSums, draw(-1, 1, 2, *weight), layer.geometry, BYTE, draw(-128, 127, *shape), threads=threads)
    check(BitSums, signs(1, *weight), layer.geometry, SIGN, signs(*shape), threads=threads)
    check(BitSums, draw(-1, 1, 2, *weight), layer.geometry, FEW, draw(-4, 3, *shape), threads=threads)
    check(GroupedSums, draw(-127, 127, 2, *weight), layer.geometry, BYTE, draw(-128, 127, *shape), threads=threads)
    check(MatrixSums, draw(-127, 127, 2, *weight), layer.geometry, BYTE, draw(-128, 127, *shape))


@pytest.mark.parametrize("features", [255, 256, 257, 4000])
def test_16_bits_never_overflow(features: int) -> None:
    pixel = Axis(kernel=1, stride=1, dilation=1, before=0, after=0)
    geometry = Geometry(features, 3, 1, pixel, pixel, "zeros")
    weight = torch.stack([torch.ones(features), -torch.ones(features), signs(features).float()]).int()
    weight = weight[None, :, :, None, None]
    for worst in (127, -128):
        codes = torch.full((5, features, 1, 1), worst)
        check(LevelSums, weight, geometry, BYTE, codes)
        check(MatrixSums, 127 * weight, geometry, BYTE, codes)


def test_each_output_adds_its_inputs_level_by_level() -> None:
    # c = W_p (sum of a over I_p) - W_n (sum of a over I_n), written out for two outputs of a linear layer.
    positive, negative = 0.75, 0.5
    weight = torch.tensor([[1, 0, -1, 1, 0], [0, -1, -1, 0, 1]])
    book = Codebook((weight + 1).int(), torch.tensor([-negative, 0.0, positive]))
    terms, factors = level_terms(book)
    assert torch.equal(factors, torch.tensor([[positive] * 2, [negative] * 2]).double())
    pixel = Axis(kernel=1, stride=1, dilation=1, before=0, after=0)
    geometry = Geometry(5, 2, 1, pixel, pixel, "zeros")
    sums = LevelSums(terms[..., None, None], geometry, BYTE, torch.zeros(2, 2))
    a = torch.tensor([[3, -5, 7, 11, -13]], dtype=torch.int8)
    levels = sums(a)
    assert levels[:, 0].tolist() == [[3 + 11, -13], [-7, 5 - 7]]
    expected = [positive * (3 + 11) - negative * 7, positive * -13 - negative * (-5 + 7)]
    assert (factors[:, None] * levels).sum(0)[0].tolist() == expected


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=5, unique=True), st.booleans(), st.integers(0, 9))
def test_terms_are_the_weight(levels: list[int], per_channel: bool, seed: int) -> None:
    table = torch.tensor(sorted(levels)).double() / 4
    if per_channel:
        table = torch.stack((table, table.roll(1) * 2, -table))
    codes = draw(0, len(levels) - 1, 3, 2, 3, 3, seed=seed).int()
    book = Codebook(codes, table)
    terms, factors = level_terms(book)
    assert set(terms.unique().tolist()) <= {-1, 0, 1}
    assert (terms != 0).sum(0).max() <= 1  # every weight belongs to one level
    assert torch.equal((factors[..., None, None, None] * terms).sum(0), book.values())
    if not per_channel:
        assert (factors > 0).all() or not any(levels)
        assert len(terms) == max(1, len({abs(level) for level in levels} - {0}))


UNEVEN = ("ttq", "naq5", "lq2")


@pytest.mark.filterwarnings("ignore:Using padding='same'")  # torch's, about its own speed
@settings(max_examples=60, deadline=None)
@given(geometries(), st.sampled_from(UNEVEN), st.sampled_from(["int8", "lsq4", "dorefa2", "bnn", "xnor", "hwgq2"]))
def test_twins_of_uneven_levels_equal_their_layers(
    case: tuple[dict[str, Any], Tensor], weight: str, activation: str
) -> None:
    args, x = case[0], case[1].double()
    layer = trained(conv(**args, weight=weight, activation=activation, dtype=torch.float64), x)
    for kernels in ("numba", "torch"):
        twin = integer_twin(layer, kernels=kernels)
        assert (twin(x) - layer(x)).abs().max() <= 1e-12 * (1 + layer(x).abs().max())
        assert torch.equal(twin(x[0]), twin(x)[0])
    single = trained(copy.deepcopy(layer).float(), x.float())
    twin = integer_twin(single)
    assert (twin(x.float()) - single(x.float())).abs().max() <= 1e-5 * (1 + layer(x).abs().max())
    codes = twin.encode(x.float())
    with IntegersOnly():
        accumulators = twin.accumulate(codes)
    assert accumulators.shape[1:] == layer(x).shape


@pytest.mark.parametrize("weight", UNEVEN)
@pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 4, 6)])
def test_linear_twins_of_uneven_levels(shape: tuple[int, ...], weight: str) -> None:
    x = sample(*shape)
    layer = trained(QuantizedLinear(6, 5, weight=weight), x)
    with torch.no_grad():
        assert_near(integer_twin(layer)(x), layer(x))


@pytest.mark.parametrize("weight", UNEVEN)
def test_level_sums_requantize_to_within_one_level(weight: str) -> None:
    x = sample(3, 4, 8, 8)
    layer = trained(conv(4, 6, 3, padding=1, weight=weight), x)
    following = trained(quantizer("int8", "activation"), layer(x[:2]).detach())
    twin = integer_twin(layer)
    codes = twin.requantize(twin.accumulate(twin.encode(x)), following)
    assert (codes - following.integers(layer(x)).codes).abs().max() <= 1


@pytest.mark.parametrize(
    ("weight", "activation", "kind"),
    [
        ("int8", "int8", MatrixSums),
        ("bnn", "int8", MatrixSums),
        ("twn", "int8", LevelSums),
        ("twn", "bnn", BitSums),
        ("twn", "dorefa1", BitSums),
        ("twn", "lsq2", BitSums),
        ("ttq", "dorefa2", BitSums),
        ("twn", "int5", LevelSums),
        ("bnn", "bnn", BitSums),
        ("xnor", "xnor", BitSums),
        ("dorefa1", "bnn", BitSums),
        ("bnn", "dorefa1", BitSums),
        ("bnn", "int4", BitSums),
        ("int8_channel_affine", "lsq8", MatrixSums),
        ("dorefa8", "int8", MatrixSums),
        ("int4", "int12", MatrixSums),
    ],
)
def test_formats_choose_how_they_are_added_up(weight: str, activation: str, kind: type[Sums]) -> None:
    x = sample(2, 120, 7, 7, dtype=torch.float64)
    layer = trained(conv(120, 4, 3, padding=1, weight=weight, activation=activation, dtype=torch.float64), x)
    twin, plain = integer_twin(layer), integer_twin(layer, kernels="torch")
    assert type(twin.sums) is kind
    assert type(plain.sums) is MatrixSums
    assert torch.equal(twin.accumulate(twin.encode(x)), plain.accumulate(plain.encode(x)))
    limit = 1e-12 * layer(x).abs().max() + twin.scale.max()  # the bias is whole steps
    assert (twin(x) - layer(x)).abs().max() <= limit
    torch.testing.assert_close(twin(x), plain(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    x = sample(2, 3, 6, 6).to(dtype)
    layer = conv(3, 4, 3, weight="bnn", activation="bnn", dtype=dtype).eval()
    twin = integer_twin(layer)
    assert twin(x).dtype == dtype
    torch.testing.assert_close(twin(x), layer(x), rtol=1e-2, atol=1e-2)


def test_signs_are_those_of_the_layer_at_zero_and_beyond() -> None:
    layer = conv(1, 1, 1, weight="bnn", activation="bnn", bias=False).eval()
    with torch.no_grad():
        layer.weight.fill_(1)
    x = torch.tensor([0.0, -0.0, -1e-45, torch.inf, -torch.inf])[None, None, None]
    assert torch.equal(integer_twin(layer)(x), layer(x))


@pytest.mark.parametrize(("weight", "activation"), [("twn", "int8"), ("bnn", "bnn")])
def test_threads_at_once_and_copies_give_the_same(weight: str, activation: str) -> None:
    batches = [sample(2, 3, 8 + k, 9, seed=k) for k in range(6)]  # sizes differ: each needs a plan of its own
    layer = trained(conv(3, 4, 3, padding=1, weight=weight, activation=activation), batches[0])
    twin = integer_twin(layer)
    expected = [twin(x) for x in batches]
    with ThreadPoolExecutor(3) as pool:
        for found, wanted in zip(pool.map(twin, batches * 20), expected * 20, strict=True):
            assert torch.equal(found, wanted)
    assert torch.equal(copy.deepcopy(twin)(batches[1]), expected[1])


def test_without_numba_torch_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    x = sample(2, 3, 6, 6)
    layer = trained(conv(3, 4, 3, weight="twn"), x)
    with_numba = integer_twin(layer)
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.delitem(sys.modules, "classical.integer.kernels", raising=False)
    monkeypatch.setattr("classical.integer.loading.find_spec", lambda name: None)
    without = integer_twin(layer)
    assert isinstance(without.sums, MatrixSums)
    with pytest.raises(ImportError, match=r"pip install 'qconv\[integer\]'; kernels='torch' gives the same results"):
        integer_twin(layer, kernels="numba")
    monkeypatch.undo()
    assert torch.equal(without.accumulate(without.encode(x)), with_numba.accumulate(with_numba.encode(x)))


def test_matrix_products_without_exact_int8_fall_back(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = conv(8, 4, 3)
    monkeypatch.setattr("classical.integer.dense._int8_products_are_exact", lambda: False)
    monkeypatch.delattr(torch, "_int_mm")
    check(MatrixSums, draw(-127, 127, 1, *layer.weight.shape), layer.geometry, BYTE, draw(-128, 127, 2, 8, 5, 5))


def test_errors() -> None:
    layer = trained(conv(2, 2, 3, weight="twn"), sample(2, 2, 5, 5))
    with pytest.raises(ValueError, match="kernels is 'fast' but must be 'auto', 'numba' or 'torch'"):
        integer_twin(layer, kernels="fast")  # type: ignore[arg-type]
    for kind in ("numba", "torch"):
        twin = integer_twin(layer, kernels=kind)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"shape \(3, 5, 5\) but the layer takes \(2, height, width\)"):
            twin.accumulate(torch.zeros(1, 3, 5, 5, dtype=torch.int8))
        with pytest.raises(ValueError, match="kernel spans 3x3 but the padded input is 2x5"):
            twin.accumulate(torch.zeros(1, 2, 2, 5, dtype=torch.int8))
    uneven = trained(conv(2, 2, 3, activation="lq2"), sample(2, 2, 5, 5).relu())
    with pytest.raises(ValueError, match="no multiples of one scale"):
        integer_twin(uneven)


def test_dead_weights_are_one_term_of_nothing() -> None:
    layer = QuantizedConv2d(2, 3, 3, weight="twn", activation="int8", bias=False)
    nn.init.zeros_(layer.weight)
    x = sample(1, 2, 5, 5)
    trained(layer, x)
    assert torch.equal(integer_twin(layer)(x), torch.zeros(1, 3, 3, 3))
    terms, factors = level_terms(Codebook(torch.zeros(3, 2, 1, 1, dtype=torch.int32), torch.zeros(1)))
    assert terms.shape == (1, 3, 2, 1, 1)
    assert not factors.any()


def test_the_benchmark_times_what_is_equal() -> None:
    found = calls(sample(1, 128, 28, 28).relu())  # compares every twin with its layer
    assert tuple(found)[: len(FLOATS)] == FLOATS
    assert {f"{name}: real" for name in GOALS} <= found.keys()
    for call in found.values():
        call()
