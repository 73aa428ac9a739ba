"""Counts as totals and tables, and what they cost."""

import itertools
import math
import pickle
from collections import Counter

import pytest
from test_published_counts import conv, lenet5_caffe

from qconv.energy import (
    HOROWITZ_45NM,
    Counts,
    Measured,
    Price,
    Row,
    count,
    estimate,
)


def quantized_row(weight: str, activation: str) -> Counts:
    """One output pixel of a 3x3 convolution from 64 to 128 channels."""
    macs = {f"mac:{weight}*{activation}": 128 * 576, "units": 128}
    return Counts((Row("conv", "Conv2d", (64, 3, 3), (128, 1, 1), Counter(macs)),))


def test_bit_operations_by_each_formula() -> None:
    counts = quantized_row("int4", "int8")
    assert round(counts.bops("uniq")) == 3_920_112
    assert counts.bops("seed") == 2_949_120
    assert counts.bops("simple") == 2_359_296


def test_bit_operations_follow_the_formats() -> None:
    assert quantized_row("ternary", "binary").bops("simple") == 73_728 * 2
    assert quantized_row("fp16", "fp32").bops("simple") == 73_728 * 512
    real = count(conv(64, 128, 3), (64, 3, 3))
    assert real.bops() == pytest.approx(73_728 * (32 * 32 + 64 + math.log2(576)))
    with pytest.raises(ValueError, match="unknown way to count bit operations 'uniqq': did you mean 'uniq'"):
        real.bops("uniqq")
    with pytest.raises(ValueError, match='"int" is no number format'):
        quantized_row("int", "int8").bops()


def test_totals_by_key_and_beginning() -> None:
    ops = {
        "mac:int8*int8": 5,
        "mac:int8*int16": 7,
        "mac:fp32*fp32": 11,
        "add:int8": 13,
        "weight_bits": 9,
        "device:shots": 3,
    }
    counts = Counts((Row("a", "A", (1,), (1,), Counter(ops)), Row("b", "B", (1,), (1,), Counter({"add:int8": 1}))))
    expected = {"mac": 23, "mac:int8": 12, "mac:int8*int8": 5, "add": 14, "mul": 0, "params": 0, "device:shots": 3}
    assert {key: counts.total(key) for key in expected} == expected
    assert counts.macs() == {"int8*int8": 5, "int8*int16": 7, "fp32*fp32": 11}
    assert counts.weight_bytes == 2
    with pytest.raises(ValueError, match="unknown kind of operation 'parms': did you mean 'params'"):
        counts.total("parms")


def test_table_as_text() -> None:
    counts = count(lenet5_caffe(), (1, 28, 28))
    lines = str(counts).splitlines()
    assert lines[0].split()[:4] == ["layer", "kind", "input", "output"]
    assert lines[3].split() == ["2", "Conv2d", "20x12x12", "50x8x8", "1,600,000", "0", "25,050", "100,200", "12,800"]
    assert lines[9].split()[:2] == ["total", "2,293,000"]
    assert lines[10] == "2,293,000 mac:fp32*fp32"
    assert not any(line.endswith(" ") for line in lines)


def picojoules(key: str) -> tuple[float, float, float]:
    price = HOROWITZ_45NM[key]
    return tuple(round(joules * 1e12, 9) for joules in (price.low, price.typical, price.high))  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("add:int8", (0.03, 0.03, 0.03)),
        ("add:int32", (0.1, 0.1, 0.1)),
        ("add:fp16", (0.4, 0.4, 0.4)),
        ("mul:int32", (3.1, 3.1, 3.1)),
        ("mul:fp32", (3.7, 3.7, 3.7)),
        ("mac:fp32*fp32", (4.6, 4.6, 4.6)),
        ("mac:fp16*fp16", (1.5, 1.5, 2.0)),
        ("mac:int8*int8", (0.23, 0.3, 0.3)),
        ("mac:ternary*int8", (0.03, 0.1, 0.1)),
        ("mac:int8*binary", (0.03, 0.1, 0.1)),
        ("mac:ternary*fp32", (0.9, 0.9, 0.9)),
        ("mac:fp32*binary", (0.9, 0.9, 0.9)),
        ("mac:int8*fp32", (4.6, 4.6, 4.6)),
        # (n / 8)^2 from 8 bits; (n / 32)^2 from 32 bits is lower, n / 8 is higher.
        ("mul:int4", (3.1 / 64, 0.05, 0.1)),
        ("mul:int16", (3.1 / 4, 0.8, 0.8)),
        ("add:int4", (0.0125, 0.015, 0.03)),
        ("add:int12", (0.0375, 0.04, 0.045)),
        # A 1-bit product and a 1-bit sum; high without a counting tree.
        ("mac:binary*binary", (3.1 / 1024 + 0.1 / 32, 0.2 / 64 + 0.03 / 8, 0.2 / 8 + 0.1)),
        ("weight_bits", (10 / 64, 100 / 64, 2600 / 64)),
        ("activation_bits", (10 / 64, 2 * 20 / 64, 2 * 2600 / 64)),
    ],
)
def test_prices(key: str, expected: tuple[float, float, float]) -> None:
    assert picojoules(key) == pytest.approx(expected, rel=1e-6)
    assert "Horowitz" in HOROWITZ_45NM[key].source


def test_wider_numbers_never_cost_less() -> None:
    for operation in ("add:int{}", "mul:int{}", "cmp:int{}", "mac:int{0}*int{0}"):
        prices = [picojoules(operation.format(bits)) for bits in range(2, 33)]
        for narrow, wide in itertools.pairwise(prices):
            assert all(a <= b for a, b in zip(narrow, wide, strict=True)), operation
    kinds = ("binary*binary", "ternary*ternary", "ternary*int8", "int8*int8", "fp16*fp16", "fp32*fp32", "fp64*fp64")
    typical = [HOROWITZ_45NM[f"mac:{kind}"].typical for kind in kinds]
    assert typical == sorted(typical)


def test_every_price_has_a_source() -> None:
    assert all("ISSCC 2014" in price.source for price in HOROWITZ_45NM.prices.values())


@pytest.mark.parametrize("values", [(2.0, 1.0, 3.0), (0.0, 2.0, 1.0), (-1.0, 0.0, 1.0), (0.0, 0.0, math.nan)])
def test_a_price_is_an_ordered_range(values: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match="0 <= low <= typical <= high"):
        Price(*values, "nowhere")


def one_row(**operations: int) -> Counts:
    return Counts((Row("layer", "Layer", (1,), (1,), Counter(operations)),))


@pytest.mark.parametrize("key", ["mac:fp8*fp8", "sqrt:fp32"])
def test_an_operation_without_a_price_is_named(key: str) -> None:
    counts = one_row(**{key: 4})
    with pytest.raises(KeyError, match=f"{key.replace('*', '.')}.* has no price in .*Horowitz 45 nm.*with_prices"):
        estimate(counts)
    extended = HOROWITZ_45NM.with_prices({key: Price(1.0, 2.0, 3.0, "mine")})
    found = estimate(counts, extended)
    assert (found.low, found.joules, found.high) == (4.0, 8.0, 12.0)
    assert key not in HOROWITZ_45NM.prices


def test_what_a_quantum_device_would_run_has_no_joules() -> None:
    device = {
        "device:circuits": 9,
        "device:gates_1q": 9,
        "device:gates_2q": 9,
        "device:shots": 9,
        "params": 3,
        "units": 3,
    }
    assert estimate(one_row(**device)).high == 0
    assert estimate(one_row(**device, **{"add:fp32": 1})).joules == pytest.approx(0.9e-12)


def test_lenet5_caffe_in_microjoules() -> None:
    real = count(lenet5_caffe(), (1, 28, 28))
    found = estimate(real)
    assert found.compute.typical == pytest.approx(10.55e-6, rel=1e-3)
    integers = estimate(one_row(**{"mac:int8*int8": real.total("mac")}))
    assert (integers.low, integers.joules) == (pytest.approx(0.527e-6, rel=1e-3), pytest.approx(0.688e-6, rel=1e-3))
    weights = estimate(one_row(weight_bits=real.total("weight_bits")))
    assert weights.high == pytest.approx(560e-6, rel=1e-3)


def test_an_estimate_adds_up() -> None:
    found = estimate(count(lenet5_caffe(), (1, 28, 28)))
    assert found.low < found.joules < found.high
    assert found.joules == pytest.approx(found.compute.typical + found.memory.typical)
    assert found.high == pytest.approx(found.compute.high + found.memory.high)
    assert found.memory.typical == pytest.approx(sum(layer.memory.typical for layer in found.per_layer))
    assert [layer.kind for layer in found.per_layer][:2] == ["Conv2d", "MaxPool2d"]
    assert found.per_layer[0].compute.typical == pytest.approx(288_000 * 4.6e-12)
    assert str(found).startswith(f"{found.joules * 1e6:.4g} uJ an inference")
    assert str(found).endswith("modeled for Horowitz 45 nm")


def test_counts_and_estimates_can_be_sent_to_other_processes() -> None:
    counts = count(lenet5_caffe(), (1, 28, 28))
    found = estimate(counts)
    assert pickle.loads(pickle.dumps((counts, found, HOROWITZ_45NM))) == (counts, found, HOROWITZ_45NM)


def test_modeled_and_measured_joules_do_not_add() -> None:
    modeled, measured = estimate(one_row(**{"add:fp32": 1})), Measured(1.0, 2.0, "CPU")
    for a, b in ((modeled, measured), (measured, modeled), (modeled, modeled), (measured, measured)):
        with pytest.raises(TypeError, match="unsupported operand"):
            a + b  # type: ignore[operator]
