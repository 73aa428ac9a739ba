"""Fixed-point rescaling against exact fractions, and to the codes of every quantizer."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_integer import IntegersOnly
from test_integer_codes import NAMES, ready
from test_quantized_layers import sample

from classical.integer.codes import input_code
from classical.integer.rescale import INT32_MAX, Compare, Rescale, rescale
from classical.quantizers import quantizer


def exact(terms: list[int], factors: list[float], offset: float) -> Fraction:
    return sum((n * Fraction(f) for n, f in zip(terms, factors, strict=True)), Fraction(offset))


factor = st.floats(2.0**-40, 16.0) | st.floats(-16.0, -(2.0**-40)) | st.just(0.0)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(factor, st.integers(1, 2**24)), min_size=1, max_size=4),
    st.floats(-1e4, 1e4),
    st.integers(0, 99),
)
def test_rescaled_integers_are_the_nearest_or_next_to_it(
    terms: list[tuple[float, int]], offset: float, seed: int
) -> None:
    factors, reach = [f for f, _ in terms], [r for _, r in terms]
    values = torch.stack(
        [torch.randint(-r, r + 1, (50, 1), generator=torch.Generator().manual_seed(seed)).int() for r in reach]
    )
    step = Rescale(
        torch.tensor(factors, dtype=torch.float64)[:, None],
        torch.tensor([offset], dtype=torch.float64),
        torch.tensor(reach)[:, None].double(),
        -INT32_MAX,
        INT32_MAX,
        torch.int32,
        0,
    )
    with IntegersOnly():
        found = step(*values)
    assert found.dtype == torch.int32
    step.compiled = False
    assert torch.equal(step(*values), found)
    for row in range(50):
        real = exact(values[:, row, 0].tolist(), factors, offset)
        clipped = min(max(real, Fraction(-INT32_MAX)), Fraction(INT32_MAX))
        distance = abs(int(found[row, 0]) - clipped)
        assert distance <= Fraction(1, 2) + Fraction(1, 60)  # half a level is rounding


def test_31_bits_of_the_multiplier_are_kept() -> None:
    factors = torch.tensor([[0.3, 1e-4, 5.0]], dtype=torch.float64)
    reach = 500 / factors  # a thousand levels
    step = Rescale(factors, torch.zeros(3).double(), reach, -128, 127, torch.int8, 2)
    assert ((step.multiplier >= 2**30) & (step.multiplier < 2**31)).all()
    assert torch.allclose(step.multiplier * torch.exp2(-step.shift.double()), factors, rtol=2.0**-31, atol=0)


def test_shapes_and_clipping() -> None:
    n = torch.arange(-12, 12, dtype=torch.int32).reshape(2, 3, 2, 2)
    factors, offset = torch.tensor([[1.0, 0.5, -1.0]]).double(), torch.tensor([0.0, 1.0, 2.0]).double()
    step = Rescale(factors, offset, torch.full((1, 3), 12.0), -4, 5, torch.int8, 2)
    real = n * factors[0, :, None, None] + offset[:, None, None]
    assert torch.equal(step(n), (real + 0.5).floor().clamp(-4, 5).to(torch.int8))
    assert torch.equal(step(n[:0]), n[:0].to(torch.int8))
    assert torch.equal(step(n.to(memory_format=torch.channels_last)), step(n))
    assert torch.equal(Rescale(factors, offset, torch.full((1, 3), 12.0), -4, 5, torch.int8, 2, "torch")(n), step(n))


def test_what_64_bits_cannot_hold_is_refused() -> None:
    one = torch.ones(1, 1, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"must lie in 2\^-32"):
        Rescale(one * 2.0**31, torch.zeros(1).double(), one, -128, 127, torch.int8, 0)
    with pytest.raises(ValueError, match=r"channel 0 can be off by .* levels: its offset is 1e\+17 levels"):
        Rescale(one, torch.full((1,), 1e17).double(), one * 2**30, -128, 127, torch.int8, 0)


@pytest.mark.parametrize("name", NAMES)
def test_rescaling_to_a_quantizer_gives_its_codes(name: str) -> None:
    x = 2 * sample(4, 300, dtype=torch.float64)
    activation = ready(name, x)
    n = torch.randint(-(2**20), 2**20, (400, 3), generator=torch.Generator().manual_seed(0)).int()
    n[0] = 0
    factors = torch.tensor([[4e-6, -3e-6, 1e-5]], dtype=torch.float64)
    offset = torch.tensor([0.0, 0.3, -0.7], dtype=torch.float64)
    step = rescale(factors, offset, torch.full((1, 3), 2.0**20), activation, torch.zeros((), dtype=torch.float64), 0)
    assert (type(step) is Compare) == name.startswith(("bnn", "hwgq"))
    with IntegersOnly():
        codes = step(n)
    real = n * factors[0] + offset
    expected = activation.integers(real).codes
    shift = input_code(activation, real).shift
    assert ((codes.int() + shift - expected).abs() <= activation.grid.step).all()
    # Half a level is exact where nothing is rounded to fit: real numbers this close to a threshold are rare.
    assert (codes.int() + shift == expected).double().mean() > (0.999 if activation.bits <= 8 else 0.99)
    assert len(codes.unique()) > min(len(activation.grid), 100) // 4
    assert codes[0, 0] + shift == expected[0, 0]  # of exactly 0, where sign and HWGQ differ in which side it is on


@pytest.mark.parametrize("gain", [1.0, 1e-3, 1e-5, 1e-6, 1e-7, 1e-12, 1e-38, 0.0])
@pytest.mark.parametrize("name", ["hwgq1", "hwgq3", "hwgq4"])
def test_channels_that_reach_far_less_than_the_thresholds(name: str, gain: float) -> None:
    activation = quantizer(name, "activation").eval()
    like = torch.zeros((), dtype=torch.float64)
    factors, offset = torch.tensor([[1e-3, 1e-3 * gain]], dtype=torch.float64), torch.tensor([0.0, 0.3]).double()
    step = rescale(factors, offset, torch.full((1, 2), 4000.0), activation, like, 0)
    n = torch.arange(-4000, 4001, 7).int()[:, None].expand(-1, 2)
    expected = activation.integers(n * factors[0] + offset).codes
    wrong = step(n).int() != expected
    assert not wrong[:, 1].any()
    assert wrong[:, 0].sum() <= 1  # at a threshold
    assert len(expected[:, 0].unique()) == len(activation.grid)


def test_thresholds_must_ascend() -> None:
    one = torch.ones(1, 1, dtype=torch.float64)
    code = input_code(quantizer("hwgq2", "activation"), one)
    with pytest.raises(ValueError, match=r"thresholds are \[1.0, 1.0, 2.0\] but must be ascending"):
        Compare(one, one[0], one, torch.tensor([1.0, 1.0, 2.0], dtype=torch.float64), code, 0)
