"""Quantizers against those of torch, torchao and brevitas where they have the same definition."""

import importlib
import warnings
from typing import Any

import pytest
import torch
from test_quantizers import gradient, ready, sample
from torch import Tensor, nn

from classical.quantizers import LSQ, IntegerActivation, quantizer


def peer(name: str) -> Any:
    """A peer's module, or a skip; what it says about itself while it is loaded is its own affair."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip(name.partition(".")[0])
        return importlib.import_module(name)


def without_ends(q: LSQ, x: Tensor) -> Tensor:
    """x fitted to q, then without what rounds to the outermost levels from beyond them.

    LSQ passes such values no gradient, as its paper says; torch and brevitas clip after rounding, and do.
    """
    q.fit(x)
    v = x / q.step.detach()
    kept = ((v >= q.grid[0]) | (v < q.grid[0] - 0.5)) & ((v <= q.grid[-1]) | (v > q.grid[-1] + 0.5))
    return x[kept][None]


# --- torch ---


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("signed", [True, False])
def test_lsq_is_torchs_learnable_fake_quantization(bits: int, signed: bool) -> None:
    q = LSQ(bits, signed=signed)
    x = without_ends(q, sample(60, 15, dtype=torch.float32, scale=1.0))
    low, top = q.grid[0], q.grid[-1]
    found, g = gradient(q, x)
    other, scale = x.clone().requires_grad_(), q.step.detach().reshape(1).clone().requires_grad_()
    factor = (x.numel() * top) ** -0.5
    output = torch._fake_quantize_learnable_per_tensor_affine(other, scale, torch.zeros(1), low, top, factor)
    torch.testing.assert_close(q(x), output, rtol=1e-6, atol=0)
    (output * g).sum().backward()
    torch.testing.assert_close(found, other.grad)
    torch.testing.assert_close(q.step.grad, scale.grad[0], rtol=1e-4, atol=1e-6)  # type: ignore[index]


@pytest.mark.parametrize("bits", [2, 8])
def test_activations_are_torchs_fake_quantization(bits: int) -> None:
    x = sample(4, 3, 5, 5, dtype=torch.float32)
    q = ready(f"int{bits}", "activation", x)
    _, scale, zero = q.integers(x)
    wide = 1.5 * x
    expected = torch.fake_quantize_per_tensor_affine(wide, float(scale[0]), int(zero[0]), q.grid[0], q.grid[-1])
    torch.testing.assert_close(q(wide), expected)


def test_ranges_are_torchs_moving_average() -> None:
    observers = peer("torch.ao.quantization.observer")
    ours = IntegerActivation(8, momentum=0.3)
    theirs = observers.MovingAverageMinMaxObserver(averaging_constant=0.3, dtype=torch.qint8)
    for seed in range(4):
        batch = sample(5, 7, seed=seed, dtype=torch.float32) + seed
        ours(batch)
        theirs(batch)
    torch.testing.assert_close(torch.stack([ours.low, ours.high]), torch.stack([theirs.min_val, theirs.max_val]))


# --- torchao ---


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("suffix", ["", "_channel", "_affine", "_channel_affine"])
def test_integer_weights_are_torchaos(bits: int, suffix: str) -> None:
    primitives = peer("torchao.quantization.quant_primitives")
    w = sample(6, 3, 3, 3, dtype=torch.float32) + 0.2
    q = quantizer(f"int{bits}{suffix}")
    mapping = primitives.MappingType.ASYMMETRIC if "affine" in suffix else primitives.MappingType.SYMMETRIC
    block = (1, 3, 3, 3) if "channel" in suffix else w.shape
    limits = {"quant_min": q.grid[0], "quant_max": q.grid[-1]}
    scale, zero = primitives.choose_qparams_affine(w, mapping, block, torch.int8, **limits, eps=1e-30)
    codes = primitives.quantize_affine(w, block, scale, zero, torch.int8, **limits)
    found = q.integers(w)
    torch.testing.assert_close(found.scale.flatten(), scale.flatten())
    assert torch.equal(found.zero.expand_as(found.scale).flatten(), zero.flatten().int())
    assert torch.equal(found.codes, codes.int())


# --- brevitas ---


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("channel", [False, True])
def test_integer_weights_are_brevitas(bits: int, channel: bool) -> None:
    layers, quant = peer("brevitas.nn"), peer("brevitas.quant")
    kind = quant.Int8WeightPerChannelFloat if channel else quant.Int8WeightPerTensorFloat
    conv = layers.QuantConv2d(3, 4, 3, weight_quant=kind, weight_bit_width=bits)
    found = quantizer(f"int{bits}_channel" if channel else f"int{bits}")(conv.weight)
    torch.testing.assert_close(found, conv.quant_weight().value)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("signed", [True, False])
def test_lsq_is_brevitas_with_a_trained_scale(bits: int, signed: bool) -> None:
    core = peer("brevitas.core.quant")
    ours = LSQ(bits, signed=signed).double()
    x = without_ends(ours, sample(60, 15, scale=1.0))
    theirs = core.IntQuant(narrow_range=False, signed=signed, input_view_impl=nn.Identity())
    found, g = gradient(ours, x)
    other, scale = x.clone().requires_grad_(), ours.step.detach().clone().requires_grad_()
    output = theirs(scale, torch.tensor(0.0), torch.tensor(float(bits)), other)
    torch.testing.assert_close(ours(x), output)
    (output * g).sum().backward()
    torch.testing.assert_close(found, other.grad)
    assert ours.step.grad is not None
    assert scale.grad is not None
    gain = (x.numel() * ours.grid[-1]) ** -0.5  # brevitas leaves the scale's gradient as it is
    torch.testing.assert_close(ours.step.grad, gain * scale.grad)


def test_signs_are_brevitas() -> None:
    core, scaling = peer("brevitas.core.quant"), peer("brevitas.core.scaling")
    x = sample(6, 5, scale=1.0)
    found, g = gradient(quantizer("bnn"), x)
    other = x.clone().requires_grad_()
    output = core.ClampedBinaryQuant(scaling.ConstScaling(1.0))(other)[0]
    assert torch.equal(quantizer("bnn")(x), output.double())
    (output * g).sum().backward()
    torch.testing.assert_close(found, other.grad)
    mean = scaling.ConstScaling(float(x.abs().mean()))
    torch.testing.assert_close(quantizer("dorefa1")(x).float(), core.BinaryQuant(mean)(x.float())[0])


def test_ternary_weights_are_brevitas_with_the_same_threshold_and_scale() -> None:
    core, scaling = peer("brevitas.core.quant"), peer("brevitas.core.scaling")
    w = sample(6, 5, 3, 3, dtype=torch.float32)
    scale = float(quantizer("twn").integers(w).scale)
    threshold = 0.7 * float(w.abs().mean())
    expected = core.TernaryQuant(scaling.ConstScaling(scale), threshold / scale)(w)[0]
    torch.testing.assert_close(quantizer("twn")(w), expected)
    ttq = quantizer("ttq")
    ttq.fit(w)
    levels = ttq.codebook(w).levels
    positive, negative = (
        core.TernaryQuant(scaling.ConstScaling(float(size)), 0.05 * float(w.abs().max()) / float(size))(w)[0]
        for size in (levels[2], -levels[0])
    )
    both: Tensor = torch.where(w > 0, positive, negative)
    torch.testing.assert_close(ttq(w), both)
