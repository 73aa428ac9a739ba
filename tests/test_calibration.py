"""Ranges from data: against the values that the float model hands on, brute force and equations written again here."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from classical.calibration import Histogram, Range, calibrate, choose_range, divergence, squared_error
from classical.convert import quantize
from classical.quantizers import IntegerActivation

METHODS = ("minmax", "percentile", "mse", "entropy")


def small_net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 5))
    return net.to(dtype)


def batches(n: int = 3, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    random = torch.Generator().manual_seed(0)
    return [torch.randn(8, 3, 8, 8, generator=random, dtype=torch.float64).to(dtype) for _ in range(n)]


def inputs_of_layers(net: nn.Sequential, data: list[Tensor]) -> dict[str, np.ndarray]:
    """What a float network's layers read."""
    with torch.no_grad():
        return {str(i): torch.cat([net[:i](x) for x in data]).numpy().ravel() for i in (0, 2, 4)}


def histogram(values: np.ndarray, bins: int = 2048) -> Histogram:
    low, high = min(0.0, float(values.min())), max(0.0, float(values.max()))
    return Histogram(np.histogram(values, bins, (low, high))[0].astype(float), low, high)


# --- the whole -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", METHODS)
def test_ranges_are_those_of_the_float_network(method: Any, dtype: torch.dtype) -> None:
    net, data = small_net(dtype), batches(dtype=dtype)
    quantized = quantize(net, weight="int4", activation="int4").eval()
    found = calibrate(quantized, data, method=method)
    assert list(found) == ["0.activation_quantizer", "2.activation_quantizer", "4.activation_quantizer"]
    for name, values in inputs_of_layers(net, data).items():
        expected = choose_range(histogram(values), 4, method)
        assert found[f"{name}.activation_quantizer"] == pytest.approx(expected, rel=1e-5, abs=1e-6)
        quantizer = quantized.get_submodule(f"{name}.activation_quantizer")
        assert (float(quantizer.low), float(quantizer.high)) == pytest.approx(expected, rel=1e-5, abs=1e-6)
    values = inputs_of_layers(net, data)["2"]
    assert found["2.activation_quantizer"].low == 0  # after ReLU
    if method == "minmax":
        assert found["2.activation_quantizer"].high == pytest.approx(float(values.max()), rel=1e-6)


def test_only_the_ranges_change() -> None:
    quantized = quantize(small_net()).train()
    quantized[2].eval()
    before = {key: value.clone() for key, value in quantized.state_dict().items()}
    calibrate(quantized, batches())
    changed = {key for key, value in quantized.state_dict().items() if not torch.equal(before[key], value)}
    assert {key.rsplit(".", 1)[1] for key in changed} == {"low", "high"}
    assert [m.training for m in quantized[:3]] == [True, True, False]
    assert all(not m._forward_hooks for m in quantized.modules())


def test_batches_may_be_loaders_and_pairs() -> None:
    data = batches()
    loader = DataLoader(TensorDataset(torch.cat(data), torch.zeros(24)), batch_size=8)
    one, other = (calibrate(quantize(small_net()), source) for source in (loader, data))
    assert one == other


def test_a_better_range_makes_a_better_network() -> None:
    """With outliers in the data and 4 bits: least error still keeps them, least divergence does not."""
    net, data = small_net(), batches()
    for x in data:
        x[0, 0, 0, 0] = 60.0
    errors = {}
    for method in METHODS:
        quantized = quantize(net, weight="float", activation="int4").eval()
        calibrate(quantized, data, method=method)
        clean = batches()[0][1:]
        errors[method] = float((quantized(clean) - net(clean)).detach().square().mean())
    assert errors["mse"] < errors["minmax"]
    assert errors["entropy"] < errors["minmax"] / 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "median"}, "method is 'median' but must be one of minmax, percentile, mse, entropy"),
        ({"method": "percentile", "percentile": 0.999}, "percentile is 0.999 but must be above 50"),
        ({"batches": iter(batches())}, "batches is an iterator"),
        ({"batches": []}, "batches held no values"),
        ({"batches": [torch.full((1, 3, 8, 8), torch.nan)]}, "the input of 0.activation_quantizer holds NaN"),
        ({"model": small_net()}, "no integer activation quantizer"),
    ],
)
def test_errors(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"model": quantize(small_net()), "batches": batches()} | change
    with pytest.raises(ValueError, match=message):
        calibrate(arguments.pop("model"), arguments.pop("batches"), **arguments)


def test_a_failed_calibration_leaves_no_hooks() -> None:
    quantized = quantize(small_net()).train()
    with pytest.raises(ValueError, match="holds NaN"):
        calibrate(quantized, [torch.full((1, 3, 8, 8), torch.nan)])
    assert all(not m._forward_hooks and m.training for m in quantized.modules())


# --- percentile ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("percentile", [90.0, 99.0, 99.9])
def test_percentiles_are_those_of_the_values(percentile: float) -> None:
    values = np.random.default_rng(0).normal(size=100_000)
    found = choose_range(histogram(values), 8, "percentile", percentile)
    expected = np.percentile(values, [(100 - percentile) / 2, (100 + percentile) / 2])
    width = np.ptp(values) / 2048
    np.testing.assert_allclose(found, expected, atol=2 * width)
    found = choose_range(histogram(np.abs(values)), 8, "percentile", percentile)
    np.testing.assert_allclose(found, [0, np.percentile(np.abs(values), percentile)], atol=2 * width)
    found = choose_range(histogram(-np.abs(values)), 8, "percentile", percentile)
    np.testing.assert_allclose(found, [np.percentile(-np.abs(values), 100 - percentile), 0], atol=2 * width)


# --- least squared error ---------------------------------------------------------------------------------------------


def error_of(values: np.ndarray, tried: Range, bits: int) -> float:
    """What the quantizer itself does to the values."""
    quantizer = IntegerActivation(bits).double().eval()
    quantizer.low.fill_(tried.low)
    quantizer.high.fill_(tried.high)
    x = torch.from_numpy(values)[None]
    return float((quantizer(x) - x).square().mean())


@pytest.mark.parametrize("shape", ["normal", "laplace", "relu", "skewed"])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_mse_is_the_least_of_all_ranges(shape: str, bits: int) -> None:
    random = np.random.default_rng(0)
    values = {
        "normal": random.normal(size=20_000),
        "laplace": random.laplace(size=20_000),
        "relu": np.maximum(random.normal(size=20_000), 0),
        "skewed": random.exponential(size=20_000) - 0.3,
    }[shape]
    counted = histogram(values)
    found = choose_range(counted, bits, "mse")
    # Binning moves values by up to half a bin; what the quantizer really does must agree to that accuracy.
    step = (found.high - found.low) / (2**bits - 1)
    width = (counted.high - counted.low) / 2048
    assert squared_error(counted, found, bits) == pytest.approx(
        error_of(values, found, bits), rel=0.02, abs=width * step
    )
    best = min(
        error_of(values, Range(low, high), bits)
        for low in np.linspace(counted.low, 0, 24)
        for high in np.linspace(counted.high / 24, counted.high, 24)
    )
    assert error_of(values, found, bits) < 1.01 * best + width * step


# --- entropy ---------------------------------------------------------------------------------------------------------


def divergence_again(counts: np.ndarray, bins: int, levels: int) -> float:
    """Migacz's pseudocode, with one bin at a time."""
    reference = list(counts[:bins])
    reference[-1] += sum(counts[bins:])
    expanded = [0.0] * bins
    for level in range(levels):
        members = [i for i in range(bins) if i * levels // bins == level]
        filled = [i for i in members if reference[i] > 0]
        for i in filled:
            expanded[i] = sum(counts[j] for j in members) / len(filled)
    expanded = [max(b, 1e-4) if a > 0 else b for a, b in zip(reference, expanded, strict=True)]
    p, q = [v / sum(reference) for v in reference], [v / sum(expanded) for v in expanded]
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


@pytest.mark.parametrize("bins", [16, 17, 40, 64])
def test_divergence_follows_the_pseudocode(bins: int) -> None:
    counts = np.random.default_rng(0).poisson(3, 64).astype(float)
    assert divergence(counts, bins, 16) == pytest.approx(divergence_again(counts, bins, 16), rel=1e-12)
    counts[20:60] = 0
    assert divergence(counts, bins, 16) == pytest.approx(divergence_again(counts, bins, 16), rel=1e-12)


def test_entropy_clips_outliers_and_keeps_a_plain_shape() -> None:
    random = np.random.default_rng(0)
    values = np.append(np.abs(random.normal(size=200_000)), [60.0])
    assert 2 < choose_range(histogram(values), 8, "entropy").high < 10
    assert choose_range(histogram(-values), 8, "entropy").low == -choose_range(histogram(values), 8, "entropy").high
    signed = np.concatenate([values, -values[:-1]])
    found = choose_range(histogram(signed), 8, "entropy")
    assert found.low == pytest.approx(-found.high, rel=0.5)
    assert 2 < found.high < 10
    even = random.uniform(size=200_000)
    assert choose_range(histogram(even), 8, "entropy").high > 0.98
    # Zeros of ReLU are exact in any range, so their number does not matter.
    assert choose_range(histogram(np.append(values, np.zeros(10**6))), 8, "entropy") == choose_range(
        histogram(values), 8, "entropy"
    )


def test_entropy_against_onnxruntime() -> None:
    """Its bins are merged in another way, so its threshold agrees only roughly."""
    calibration = pytest.importorskip("onnxruntime.quantization.calibrate")
    values = np.random.default_rng(0).laplace(size=200_000)
    top = float(np.abs(values).max())
    collector = calibration.HistogramCollector("entropy", True, 2049, 128, 99.99, None)
    counts, edges = np.histogram(values, 2049, (-top, top))
    theirs = collector.get_entropy_threshold((counts, edges, -top, top, top), 128)
    ours = choose_range(Histogram(np.histogram(values, 2048, (-top, top))[0].astype(float), -top, top), 8, "entropy")
    assert ours.high == pytest.approx(float(theirs[1]), rel=0.25)


def test_nothing_but_zeros() -> None:
    zeros = Histogram(np.zeros(2048), 0.0, 0.0)
    for method in METHODS:
        assert choose_range(zeros, 8, method) == (0.0, 0.0)
    quantized = quantize(small_net()).eval()
    calibrate(quantized, [torch.zeros(2, 3, 8, 8)], method="mse")
    assert quantized(torch.zeros(2, 3, 8, 8)).isfinite().all()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (torch.rand(4, 3, 8, 8), r"batches has shape \(4, 3, 8, 8\) but .* give \[images\] or images.split"),
        (np.zeros((4, 3, 8, 8)), r"batches has shape \(4, 3, 8, 8\)"),
        ([{"image": torch.rand(4, 3, 8, 8)}], "a batch is or begins with dict but must be a tensor of inputs"),
        ([np.zeros((4, 3, 8, 8))], r"begins with ndarray .* torch.from_numpy"),
        ([()], "begins with tuple"),
    ],
)
def test_batches_of_other_kinds_are_refused(data: Any, message: str) -> None:
    quantized = quantize(small_net())
    with pytest.raises(ValueError, match=message):
        calibrate(quantized, data)
    assert all(not m._forward_hooks for m in quantized.modules())


def test_arguments_of_other_types_are_refused() -> None:
    with pytest.raises(ValueError, match="percentile is '99' but must be above 50"):
        calibrate(quantize(small_net()), batches(), percentile="99")
    with pytest.raises(ValueError, match=r"model is 'm' \(str\) but must be an nn.Module"):
        calibrate("m", batches())
