"""Quantizers against their equations, written again here in numpy."""

import copy

import numpy as np
import pytest
import torch
from torch import Tensor

from classical.quantizers import IntegerActivation, IntegerWeight, Quantizer, quantizer, quantizer_names

DTYPES = (torch.float32, torch.float64)


def sample(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64, scale: float = 0.6) -> Tensor:
    return scale * torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def ready(name: str, role: str, x: Tensor) -> Quantizer:
    """A quantizer in eval() that has seen x in train()."""
    built = quantizer(name, role).to(x.dtype)
    built(x)
    return built.eval()


def numpy_weight(name: str, w: np.ndarray) -> np.ndarray:
    if name.startswith("int"):
        top = 2 ** (int(name[3:].removesuffix("_channel")) - 1) - 1
        peak = np.abs(w).max(axis=(1, 2, 3), keepdims=True) if name.endswith("_channel") else np.abs(w).max()
        return np.rint(w / (peak / top)) * (peak / top)
    if name == "twn":
        keep = np.abs(w) > 0.7 * np.abs(w).mean()
        return np.sign(w) * keep * np.abs(w)[keep].mean()
    sign = np.where(w >= 0, 1.0, -1.0)
    return {"float": w, "bnn": sign, "xnor": sign * np.abs(w).mean(axis=(1, 2, 3), keepdims=True)}[name]


def numpy_activation(name: str, x: np.ndarray, low: float, high: float) -> np.ndarray:
    if name.startswith("int"):
        bits = int(name[3:])
        low, high = min(low, 0.0), max(high, 0.0)
        scale = (high - low) / (2**bits - 1)
        zero = np.rint(-low / scale)  # unsigned codes: the library's are the same, shifted by 2^(bits-1)
        return (np.clip(np.rint(x / scale) + zero, 0, 2**bits - 1) - zero) * scale
    return {"float": x, "bnn": np.where(x >= 0, 1.0, -1.0), "xnor": np.where(x >= 0, 1.0, -1.0)}[name]


@pytest.mark.parametrize("name", quantizer_names("weight"))
def test_weights_follow_their_equation(name: str) -> None:
    w = sample(4, 3, 3, 2)
    np.testing.assert_allclose(quantizer(name)(w).numpy(), numpy_weight(name, w.numpy()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shift", [0.0, 5.0, -5.0])  # both signs; positive only; negative only
@pytest.mark.parametrize("name", quantizer_names("activation"))
def test_activations_follow_their_equation(name: str, shift: float) -> None:
    seen, x = sample(5, 3, 6, 6) + shift, 1.3 * sample(4, 3, 6, 6, seed=1) + shift
    expected = numpy_activation(name, x.numpy(), float(seen.min()), float(seen.max()))
    np.testing.assert_allclose(ready(name, "activation", seen)(x).numpy(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("role", ["weight", "activation"])
def test_integers_say_exactly_what_forward_gives(role: str, dtype: torch.dtype) -> None:
    x = sample(4, 3, 5, 5, dtype=dtype)
    for name in quantizer_names(role):
        if name != "float":
            q = ready(name, role, x)
            codes, scale, zero = q.integers(x)
            assert codes.dtype == zero.dtype == torch.int32
            assert scale.dtype == dtype
            assert codes.abs().max() <= q.max_code
            assert torch.equal((codes - zero) * scale, q(x)), name


@pytest.mark.parametrize("role", ["weight", "activation"])
def test_zero_is_exact_or_plus_one(role: str) -> None:
    x = sample(2, 3, 4, 4) + 0.3
    x[0, 0, 0] = torch.tensor([0.0, -0.0, 0.0, 0.0])
    for name in quantizer_names(role):
        at_zero = ready(name, role, x)(x)[0, 0, 0]
        if name in ("bnn", "xnor"):
            assert (at_zero > 0).all()
        else:
            assert (at_zero == 0).all(), name


def test_bits_of_the_formats_hold_the_codes() -> None:
    w = sample(6, 4, 3, 3)
    for name in quantizer_names():
        q = quantizer(name)
        if name != "float":
            assert q.integers(w).codes.unique().numel() <= 2**q.bits
            assert q.format == {"twn": "ternary", "bnn": "binary", "xnor": "binary"}.get(name, name.split("_")[0])


def test_twn_scale_is_the_best_for_its_support() -> None:
    w = sample(8, 4, 3, 3)
    codes, scale, _ = quantizer("twn").integers(w)

    def error(alpha: Tensor) -> float:
        return float((w - alpha * codes).square().sum())

    assert codes.unique().tolist() == [-1, 0, 1]
    assert error(scale) < min(error(scale * 1.01), error(scale * 0.99))
    # d error / d alpha = 0 in closed form: alpha sum codes^2 = sum w codes.
    torch.testing.assert_close(scale * codes.square().sum(), (w * codes).sum())


def test_xnor_scale_is_the_best_for_its_signs() -> None:
    w = sample(3, 4, 3, 3)
    codes, scale, _ = quantizer("xnor").integers(w)
    best = (w * codes).sum((1, 2, 3)) / codes.square().sum((1, 2, 3))
    torch.testing.assert_close(scale.flatten(), best)


def gradient(q: Quantizer, x: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of sum(g q(x)) and the random g."""
    x = x.clone().requires_grad_()
    g = sample(*x.shape, seed=7, scale=1.0, dtype=x.dtype)
    (q(x) * g).sum().backward()
    assert x.grad is not None
    return x.grad, g


@pytest.mark.parametrize("name", ["float", "int3", "int8", "int8_channel", "twn"])
def test_weight_gradient_passes_straight_through(name: str) -> None:
    found, g = gradient(quantizer(name), sample(4, 3, 3, 3, scale=2.0))
    assert torch.equal(found, g)


@pytest.mark.parametrize(("name", "role"), [("bnn", "weight"), ("bnn", "activation"), ("xnor", "activation")])
def test_sign_gradient_passes_where_the_input_is_at_most_one(name: str, role: str) -> None:
    x = torch.tensor([[-1.5, -1.0, -0.2, 0.0, 0.7, 1.0, 1.01]], dtype=torch.float64)
    found, g = gradient(quantizer(name, role), x)
    assert torch.equal(found, g * torch.tensor([0, 1, 1, 1, 1, 1, 0]))


def test_xnor_weight_gradient_has_both_factors() -> None:
    w = sample(3, 4, 2, 2, scale=1.0)
    found, g = gradient(quantizer("xnor"), w)
    sign, gate, n = np.sign(w.numpy()), np.abs(w.numpy()) <= 1, 16
    alpha = np.abs(w.numpy()).mean(axis=(1, 2, 3), keepdims=True)
    through_alpha = (g.numpy() * sign).sum(axis=(1, 2, 3), keepdims=True) * sign / n
    np.testing.assert_allclose(found.numpy(), g.numpy() * alpha * gate + through_alpha, rtol=1e-12)


def test_activation_gradient_stops_outside_the_range() -> None:
    q = ready("int8", "activation", torch.tensor([[-1.0, 2.0]], dtype=torch.float64))
    # Levels are 3/255 = 0.0118 apart: what rounds to the first or the last one still lies inside.
    found, g = gradient(q, torch.tensor([[-1.006, -1.0058, 0.3, 2.0058, 2.006]], dtype=torch.float64))
    assert torch.equal(found, g * torch.tensor([0, 1, 1, 1, 0]))


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


def test_eval_moves_no_buffer_and_without_a_range_treats_each_sample_alone() -> None:
    q = IntegerActivation().eval()
    before = copy.deepcopy(q.state_dict())
    x = sample(3, 2, 4, 4, dtype=torch.float32) * torch.tensor([1.0, 10.0, 100.0])[:, None, None, None]
    together = q(x)
    for i in range(3):
        assert torch.equal(together[i], q(x[i : i + 1])[0])
    assert not q.calibrated
    q.train().eval()
    assert all(torch.equal(before[key], value) for key, value in q.state_dict().items())


def test_extreme_values() -> None:
    zeros, tiny = torch.zeros(2, 3), torch.full((2, 3), 1e-42)
    for name in quantizer_names():
        if name != "bnn":
            assert torch.equal(quantizer(name)(zeros), zeros), name
            assert quantizer(name)(tiny).isfinite().all(), name
    assert torch.equal(quantizer("int8", "activation")(zeros), zeros)
    nan = torch.tensor([[float("nan"), 1.0]])
    for role in ("weight", "activation"):
        assert all(quantizer(name, role)(nan)[0, 0].isnan() for name in quantizer_names(role))


def test_half_precision_in_half_precision_out() -> None:
    x = sample(2, 3, 4, 4, dtype=torch.float16)
    for role in ("weight", "activation"):
        for name in quantizer_names(role):
            half, full = quantizer(name, role)(x), quantizer(name, role)(x.float())
            assert half.dtype == torch.float16
            torch.testing.assert_close(half, full.half())


def test_factory() -> None:
    for role in ("weight", "activation"):
        for name in quantizer_names(role):
            built = quantizer(name, role)
            assert built.name == name
            assert quantizer(built, role) is built
            assert name in repr(built)


@pytest.mark.parametrize(
    ("spec", "role", "message"),
    [
        ("int88", "weight", "unknown weight quantizer 'int88': the nearest name is 'int8'"),
        ("INT4", "activation", "unknown activation quantizer"),
        ("twn", "activation", "'twn' is not for activations: choose one of float, int2"),
        ("int8_channel", "activation", "not for activations"),
        (IntegerWeight(8), "activation", r"IntegerWeight\(int8\) is for weight, not for activation"),
        ("int8", "bias", "role is 'bias' but must be 'weight' or 'activation'"),
    ],
)
def test_factory_errors(spec: str | Quantizer, role: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantizer(spec, role)


def test_constructor_errors() -> None:
    with pytest.raises(ValueError, match="2 to 16 bits, not 1"):
        IntegerWeight(1)
    with pytest.raises(ValueError, match="2 to 16 bits, not 17"):
        IntegerActivation(17)
    with pytest.raises(ValueError, match="momentum is 0"):
        IntegerActivation(8, momentum=0)
    with pytest.raises(ValueError, match=r"shape \(3,\) but need a batch axis first"):
        quantizer("int8", "activation")(torch.ones(3))
    with pytest.raises(ValueError, match="no integer codes"):
        quantizer("float").integers(torch.ones(1))
