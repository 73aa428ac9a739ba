"""Quantizers of evenly spaced levels against their equations, written again here in numpy."""

from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.optimize import minimize_scalar
from scipy.stats import norm
from test_quantizers import gradient, ready, sample
from torch import Tensor

from classical.quantizers import (
    LSQ,
    IntegerActivation,
    IntegerWeight,
    half_gaussian_step,
    quantizer,
    quantizer_names,
)

Real = np.ndarray
BITS = range(1, 9)


def numpy_integers(name: str, w: Real) -> Real:
    bits, channel, asymmetric = int(name.split("_")[0][3:]), "_channel" in name, "_affine" in name
    axes = (1, 2, 3) if channel else (0, 1, 2, 3)
    if asymmetric:  # unsigned codes: the library's are the same, shifted by 2^(bits-1)
        low, high = (np.minimum(w.min(axes, keepdims=True), 0), np.maximum(w.max(axes, keepdims=True), 0))
        scale = (high - low) / (2**bits - 1)
        zero = np.rint(-low / scale)
        return (np.clip(np.rint(w / scale) + zero, 0, 2**bits - 1) - zero) * scale
    step = np.abs(w).max(axes, keepdims=True) / (2 ** (bits - 1) - 1)
    return np.rint(w / step) * step


def numpy_dorefa(w: Real, bits: int) -> Real:
    if bits == 1:
        return np.where(w >= 0, 1.0, -1.0) * np.abs(w).mean()
    n = 2**bits - 1
    return 2 * np.rint(n * (np.tanh(w) / (2 * np.abs(np.tanh(w)).max()) + 0.5)) / n - 1


def numpy_weight(name: str, w: Real) -> Real:
    if name.startswith("int"):
        return numpy_integers(name, w)
    if name.startswith("dorefa"):
        return numpy_dorefa(w, int(name[6:]))
    if name.startswith(("lsq", "rq")):
        bits = int(name[-1])
        step = 2 * np.abs(w).mean() / np.sqrt(2 ** (bits - 1) - 1)  # as they start; in eval() both round
        return np.rint(np.clip(w / step, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)) * step
    if name == "twn":
        keep = np.abs(w) > 0.7 * np.abs(w).mean()
        return np.sign(w) * keep * np.abs(w)[keep].mean()
    sign = np.where(w >= 0, 1.0, -1.0)
    return {"float": w, "bnn": sign, "xnor": sign * np.abs(w).mean(axis=(1, 2, 3), keepdims=True)}[name]


def numpy_activation(name: str, x: Real, seen: Real) -> Real:
    bits = int(name[-1]) if name[-1].isdigit() else 0
    if name.startswith("int"):
        bits = int(name[3:])
        low, high = min(seen.min(), 0.0), max(seen.max(), 0.0)
        scale = (high - low) / (2**bits - 1)
        zero = np.rint(-low / scale)
        return (np.clip(np.rint(x / scale) + zero, 0, 2**bits - 1) - zero) * scale
    if name.startswith("dorefa"):
        return np.rint(np.clip(x, 0, 1) * (2**bits - 1)) / (2**bits - 1)
    if name.startswith("hwgq"):
        step = {1: 0.7978846, 2: 0.5388119, 3: 0.3217289, 4: 0.1842433}[bits]
        return np.where(x > 0, np.clip(np.rint(x / step), 1, 2**bits - 1) * half_gaussian_step(2**bits - 1), 0)
    if name.startswith(("lsq", "rq")):
        step = 2 * np.abs(seen).mean() / np.sqrt(2**bits - 1)
        return np.rint(np.clip(x / step, 0, 2**bits - 1)) * step
    return {"float": x, "bnn": np.where(x >= 0, 1.0, -1.0), "xnor": np.where(x >= 0, 1.0, -1.0)}[name]


EVEN_WEIGHTS = [name for name in quantizer_names("weight") if not name.startswith(("lq", "ttq", "naq"))]
EVEN_ACTIVATIONS = [name for name in quantizer_names("activation") if not name.startswith("lq")]


@pytest.mark.parametrize("shift", [0.0, 2.0, -2.0])  # both signs; positive only; negative only
@pytest.mark.parametrize("name", EVEN_WEIGHTS)
def test_weights_follow_their_equation(name: str, shift: float) -> None:
    w = sample(4, 3, 3, 2, scale=0.4) + shift
    found = ready(name, "weight", w)(w)
    np.testing.assert_allclose(found.detach().numpy(), numpy_weight(name, w.numpy()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shift", [0.0, 5.0, -5.0])
@pytest.mark.parametrize("name", EVEN_ACTIVATIONS)
def test_activations_follow_their_equation(name: str, shift: float) -> None:
    seen, x = sample(5, 3, 6, 6) + shift, 1.3 * sample(4, 3, 6, 6, seed=1) + shift
    expected = numpy_activation(name, x.numpy(), seen.numpy())
    found = ready(name, "activation", seen)(x).detach()
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12, atol=1e-12)


def test_level_sets() -> None:
    x = torch.linspace(-3, 3, 6001, dtype=torch.float64)[None]

    def levels(name: str, role: str, of: Tensor = x) -> list[float]:
        found: list[float] = ready(name, role, of)(of).unique().tolist()
        return found

    for bits in BITS:
        n = 2**bits - 1
        assert levels(f"dorefa{bits}", "activation") == pytest.approx([k / n for k in range(n + 1)])
        if bits > 1:
            assert levels(f"dorefa{bits}", "weight") == pytest.approx([2 * k / n - 1 for k in range(n + 1)])
            low, top = 2 ** (bits - 1), 2 ** (bits - 1) - 1
            step = 2 * 4 / top**0.5  # mean |8 x / 3| = 4
            expected = [k * step for k in range(-low, top + 1) if abs(k * step) <= 8 + step / 2]
            assert levels(f"lsq{bits}", "weight", 8 / 3 * x) == pytest.approx(expected, rel=1e-3)
            step = 2 * 2 / n**0.5  # half the values are 0, the others 4 on average
            expected = [k * step for k in range(n + 1) if k * step <= 8 + step / 2]
            assert levels(f"lsq{bits}", "activation", (8 / 3 * x).relu()) == pytest.approx(expected, rel=1e-3)
    assert levels("int2", "weight") == [-3, 0, 3]
    assert levels("int2_affine", "weight") == [-4, -2, 0, 2]  # 0 exact, so the range of 4 codes lies off center
    assert levels("twn", "weight") == pytest.approx([-2.025, 0, 2.025], abs=1e-3)  # 0.7 E|x| = 1.05
    assert levels("bnn", "weight") == [-1, 1]
    for bits, top in enumerate((1, 3, 7, 15), start=1):
        expected = [k * half_gaussian_step(top) for k in range(top + 1)]
        assert levels(f"hwgq{bits}", "activation") == pytest.approx(expected)


def test_dorefa_is_also_round_of_its_first_equation() -> None:
    w = sample(3, 4)
    for bits in range(2, 9):
        codes, scale, zero = quantizer(f"dorefa{bits}").integers(w)
        assert zero == 0
        assert scale == pytest.approx(1 / (2**bits - 1))
        assert (codes % 2 == 1).all()  # odd: 0 is no level


# --- Closed-form optima ---


def test_twn_scale_is_the_best_for_its_support() -> None:
    w = sample(8, 4, 3, 3)
    codes, scale, _ = quantizer("twn").integers(w)

    def error(alpha: Tensor) -> float:
        return float((w - alpha * codes).square().sum())

    assert codes.unique().tolist() == [-1, 0, 1]
    assert error(scale) < min(error(scale * 1.01), error(scale * 0.99))
    # d error / d alpha = 0 in closed form: alpha sum codes^2 = sum w codes.
    torch.testing.assert_close(scale * codes.square().sum(), (w * codes).sum())


def test_xnor_and_one_bit_dorefa_scales_are_the_best_for_their_signs() -> None:
    w = sample(3, 4, 3, 3)
    for name, axes in (("xnor", (1, 2, 3)), ("dorefa1", (0, 1, 2, 3))):
        codes, scale, _ = quantizer(name).integers(w)
        best = (w * codes).sum(axes) / codes.square().sum(axes)
        torch.testing.assert_close(scale.flatten(), best.flatten())


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_hwgq_steps_minimize_the_error_of_a_half_gaussian(bits: int) -> None:
    top = 2**bits - 1

    def error(step: float) -> float:
        edges = [0, *((k + 0.5) * step for k in range(1, top)), np.inf]
        cells = zip(range(1, top + 1), edges[:-1], edges[1:], strict=True)
        return sum(quad(lambda x, k=k: (x - k * step) ** 2 * norm.pdf(x), a, b)[0] for k, a, b in cells)

    found = minimize_scalar(error, bounds=(0.05, 1.5), method="bounded", options={"xatol": 1e-9})
    assert half_gaussian_step(top) == pytest.approx(found.x, abs=1e-7)
    if bits == 1:
        assert half_gaussian_step(top) == pytest.approx(np.sqrt(2 / np.pi), rel=1e-14)
    if bits == 2:
        assert half_gaussian_step(top) == pytest.approx(0.538, abs=1e-3)  # as published


# --- Gradients ---


@pytest.mark.parametrize(
    "name", ["float", "int3", "int8", "int8_channel", "int8_affine", "int4_channel_affine", "twn", "dorefa1"]
)
def test_weight_gradient_passes_straight_through(name: str) -> None:
    found, g = gradient(quantizer(name), sample(4, 3, 3, 3, scale=2.0))
    assert torch.equal(found, g)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("name", "role", "low", "high"),
    [
        ("bnn", "weight", -1, 1),
        ("bnn", "activation", -1, 1),
        ("xnor", "activation", -1, 1),
        *((f"dorefa{bits}", "activation", 0, 1) for bits in (1, 2, 8)),
        *((f"hwgq{bits}", "activation", 1e-6, (2**bits - 1) * half_gaussian_step(2**bits - 1)) for bits in (1, 2, 4)),
    ],
)
def test_gradient_passes_between_two_values_and_at_both(
    name: str, role: str, low: float, high: float, dtype: torch.dtype
) -> None:
    values = [low - 1, low - 1e-6, low, low + 0.1, high - 0.1, high, high + 1e-6, high + 1]
    x = torch.tensor([values], dtype=dtype)
    found, g = gradient(quantizer(name, role).to(dtype), x)  # type: ignore[arg-type]
    assert torch.equal(found, g * torch.tensor([0, 0, 1, 1, 1, 1, 0, 0]))


def test_hwgq_passes_nothing_at_zero() -> None:
    found, _ = gradient(quantizer("hwgq2", "activation"), torch.tensor([[0.0, -0.0]], dtype=torch.float64))
    assert torch.equal(found, torch.zeros_like(found))


def test_xnor_weight_gradient_has_both_factors() -> None:
    w = sample(3, 4, 2, 2, scale=1.0)
    found, g = gradient(quantizer("xnor"), w)
    sign, gate, n = np.sign(w.numpy()), np.abs(w.numpy()) <= 1, 16
    alpha = np.abs(w.numpy()).mean(axis=(1, 2, 3), keepdims=True)
    through_alpha = (g.numpy() * sign).sum(axis=(1, 2, 3), keepdims=True) * sign / n
    np.testing.assert_allclose(found.numpy(), g.numpy() * alpha * gate + through_alpha, rtol=1e-12)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_dorefa_weight_gradient_goes_through_tanh_and_the_maximum(bits: int) -> None:
    w = sample(3, 4, 2, 2, scale=1.0)
    found, given = gradient(quantizer(f"dorefa{bits}"), w)
    v, g = w.numpy().ravel(), given.numpy().ravel()
    t, slope = np.tanh(v), 1 - np.tanh(v) ** 2
    m = np.abs(t).argmax()
    peak = np.abs(t[m])
    # 2 q(t / (2 peak) + 1/2) - 1 with q' = 1: t_i / peak, of which peak is |t_m|.
    expected = g * slope / peak
    expected[m] -= (g * t).sum() / peak**2 * np.sign(t[m]) * slope[m]
    np.testing.assert_allclose(found.numpy().ravel(), expected, rtol=1e-10, atol=1e-14)


def test_activation_gradient_stops_outside_the_range() -> None:
    q = ready("int8", "activation", torch.tensor([[-1.0, 2.0]], dtype=torch.float64))
    # Levels are 3/255 = 0.0118 apart: what rounds to the first or the last one still lies inside.
    found, g = gradient(q, torch.tensor([[-1.006, -1.0058, 0.3, 2.0058, 2.006]], dtype=torch.float64))
    torch.testing.assert_close(found, g * torch.tensor([0, 1, 1, 1, 0]), rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("role", ["weight", "activation"])
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_lsq_gradients(bits: int, role: str, signed: bool, dtype: torch.dtype) -> None:
    x = sample(6, 5, 2, 3, dtype=dtype, scale=1.0)
    low, top = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    q = LSQ(bits, role=role, signed=signed).to(dtype)  # type: ignore[arg-type]
    with torch.no_grad():
        q.fit(x)
        q.step.fill_(0.125)  # a power of two: the ends below are exact
    x[0, 0, 0] = torch.tensor([top, low, top + 1]) * 0.125
    found, given = gradient(q, x)
    v, g = x.double().numpy() / 0.125, given.double().numpy()
    inside = (v > low) & (v < top)
    np.testing.assert_array_equal(found.double().numpy(), g * inside)
    slope = np.where(inside, np.rint(v) - v, np.where(v <= low, low, top))
    count = x.numel() if role == "weight" else 30  # features of one sample
    assert q.step.grad is not None
    tolerance = 1e-4 if dtype == torch.float32 else 1e-12
    assert float(q.step.grad) == pytest.approx((g * slope).sum() / np.sqrt(count * top), rel=tolerance)
    torch.testing.assert_close(q(x), (x / 0.125).clamp(low, top).round() * 0.125, rtol=0, atol=0)


# --- Ranges ---


def test_range_is_the_first_batch_then_a_moving_average() -> None:
    q = IntegerActivation(8, momentum=0.25)
    assert not q.calibrated
    for batch in ([-1.0, 3.0], [-2.0, 7.0]):
        q(torch.tensor([batch]))
    assert q.calibrated
    assert (float(q.low), float(q.high)) == (-1.25, 4.0)
    q(torch.empty(0, 2))
    q(torch.tensor([[float("nan"), 1.0]]))
    q(torch.tensor([[-torch.inf, 4.0]]))
    assert (float(q.low), float(q.high)) == (-1.25, 4.0)


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("bits", [2, 8, 16])
def test_asymmetric_weights_use_every_code_of_their_range(bits: int, per_channel: bool) -> None:
    w = sample(3, 40, 5, 5) + 0.5
    codes, scale, zero = IntegerWeight(bits, per_channel, symmetric=False).integers(w)
    assert scale.shape == zero.shape == ((3, 1, 1, 1) if per_channel else ())
    ends = (codes.amin(), codes.amax())
    assert ends[0] <= -(2 ** (bits - 1)) + 1
    assert ends[1] >= 2 ** (bits - 1) - 2
    # Half a step from rounding, and half of one at an end from rounding the zero point.
    assert ((w - (codes - zero) * scale).abs() <= 1.0000001 * scale).all()
    narrow, _, _ = IntegerWeight(bits, per_channel).integers(w)
    assert narrow.abs().max() == 2 ** (bits - 1) - 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["lsq2", "lsq3", "lsq4", "rq2", "rq4", "lsq8"])
def test_steps_of_pruned_weights_minimize_the_error_of_those_that_are_left(name: str, dtype: torch.dtype) -> None:
    dense = sample(40, 60, dtype=dtype)
    left = dense.abs() >= dense.abs().flatten().kthvalue(round(0.9 * dense.numel())).values
    q: Any = quantizer(name).to(dtype)
    unfitted = q.eval()(dense * left).detach()
    q.fit(dense * left)
    torch.testing.assert_close(q(dense * left).detach(), unfitted)
    kept, grid = dense[left].double().numpy(), np.array(q.grid)

    def error(step: float) -> float:
        return float(((kept[:, None] - step * grid) ** 2).min(1).sum())

    best = min(error(step) for step in np.linspace(1e-3, 1.5, 1500) * np.abs(kept).max())
    assert error(q.step.item()) <= (1.1 if name == "lsq8" else 1.03) * best
    # Dense weights, and those of which a few happen to be 0, start as published.
    dense[0, :3] = 0
    q.fit(dense)
    expected = 2 * dense.abs().mean().item() / q.grid[-1] ** 0.5
    assert q.step.item() == pytest.approx(expected, rel=1e-6)
