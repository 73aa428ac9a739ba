"""Ranges of quantized activations from data: smallest and largest value, percentile, least error, least entropy."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from numbers import Real
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from classical.layers import QuantizedConv2d, QuantizedLinear, require_module
from classical.quantizers import IntegerActivation

Method = Literal["minmax", "percentile", "mse", "entropy"]
_METHODS = ("minmax", "percentile", "mse", "entropy")
_BINS = 2048
_CANDIDATES = 64  # ends of the range that "mse" tries, on either side of 0

Reals = NDArray[np.float64]


class Range(NamedTuple):
    """Where a quantizer's levels lie; values beyond are clipped."""

    low: float
    high: float


class Histogram(NamedTuple):
    """How often values fell into bins of equal width between `low` and `high`, which enclose 0."""

    counts: Reals
    low: float
    high: float

    @property
    def centers(self) -> Reals:
        """The middle of each bin."""
        edges = np.linspace(self.low, self.high, len(self.counts) + 1)
        return (edges[1:] + edges[:-1]) / 2


def calibrate(
    model: nn.Module,
    batches: Iterable[Tensor | tuple[Tensor, ...] | list[Tensor]],
    *,
    method: Method = "mse",
    percentile: float = 99.99,
) -> dict[str, Range]:
    """Set the ranges of a model's integer activation quantizers from the values that the float model hands them.

    The data run through twice: once for the smallest and largest values, once for histograms of 2048 bins between them
    ("minmax" needs the first alone). Neither weights nor activations are quantized meanwhile. The model changes in
    place, in its quantizers' ranges alone.

    Args:
        model: with QuantizedConv2d or QuantizedLinear layers whose activation quantizers are intN.
        batches: inputs of the model, or tuples that begin with them; a list, a tuple or a DataLoader, neither an
            iterator nor a single tensor.
        method: "minmax": smallest and largest value. "percentile": leave out as many values on either side. "mse":
            least mean squared error between values and their levels. "entropy": the range whose quantized histogram
            diverges least from the clipped one (Kullback-Leibler).
        percentile: share of values in the range, in percent, for "percentile".

    Returns:
        Name of each quantizer -> its range.

    Raises:
        ValueError: nothing to calibrate, no data, values that are not finite, batches of another kind, or an argument
            out of its range.

    Source: Migacz, 8-bit inference with TensorRT, GTC 2017 ("entropy"); Krishnamoorthi, arXiv:1806.08342, section 3;
    Wu et al., arXiv:2004.09602, section 5.2, compares them.
    """
    if method not in _METHODS:
        raise ValueError(f"method is {method!r} but must be one of {', '.join(_METHODS)}")
    if not isinstance(percentile, Real) or not 50 < percentile <= 100:
        raise ValueError(f"percentile is {percentile!r} but must be above 50 and at most 100")
    require_module(model)
    if isinstance(batches, Tensor | np.ndarray):
        raise ValueError(
            f"batches has shape {tuple(batches.shape)} but must be a list of batches: give [images] or images.split(64)"
        )
    if isinstance(batches, Iterator):
        raise ValueError("batches is an iterator, but the data run through twice: give a list or a DataLoader")
    found = {name: m for name, m in model.named_modules() if isinstance(m, IntegerActivation)}
    if not found:
        raise ValueError("the model has no integer activation quantizer (intN): quantize it first")
    limits = _limits(model, found, batches)
    if method == "minmax":
        ranges = {name: Range(*limits[name]) for name in limits}
    else:
        histograms = _histograms(model, {name: found[name] for name in limits}, batches, limits)
        ranges = {name: choose_range(h, found[name].bits, method, percentile) for name, h in histograms.items()}
    for name, chosen in ranges.items():
        found[name].low.fill_(chosen.low)
        found[name].high.fill_(chosen.high)
    return ranges


# --- what the quantizers see -----------------------------------------------------------------------------------------


@contextmanager
def _watched(
    model: nn.Module, quantizers: dict[str, IntegerActivation], see: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """A model in eval() whose quantizers hand on what they get, and show it."""
    modes = {module: module.training for module in model.modules()}
    handles = []

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def hook(_: nn.Module, args: tuple[Tensor, ...], __: Tensor) -> Tensor:
            see(name, args[0])
            return args[0]

        return hook

    def pass_on(_: nn.Module, args: tuple[Tensor, ...], __: Tensor) -> Tensor:
        return args[0]

    try:
        for name, quantizer in quantizers.items():
            handles.append(quantizer.register_forward_hook(watch(name)))
        for module in model.modules():
            if isinstance(module, QuantizedConv2d | QuantizedLinear):
                handles.append(module.weight_quantizer.register_forward_hook(pass_on))
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes.items():
            module.training = training


def _run(
    model: nn.Module,
    quantizers: dict[str, IntegerActivation],
    batches: Iterable[Any],
    see: Callable[[str, Tensor], None],
) -> None:
    with _watched(model, quantizers, see):
        for batch in batches:
            model(_images(batch))


def _images(batch: Any) -> Tensor:
    """The inputs of a batch."""
    found = batch[0] if isinstance(batch, tuple | list) and batch else batch
    if not isinstance(found, Tensor):
        raise ValueError(
            f"a batch is or begins with {type(found).__name__} but must be a tensor of inputs, or a tuple or list that "
            "begins with one: take it out of a dict, turn arrays with torch.from_numpy"
        )
    return found


def _limits(
    model: nn.Module, quantizers: dict[str, IntegerActivation], batches: Iterable[Any]
) -> dict[str, tuple[float, float]]:
    limits: dict[str, tuple[float, float]] = {}

    def see(name: str, x: Tensor) -> None:
        if x.numel():
            low, high = (float(bound) for bound in x.aminmax())
            if not math.isfinite(low) or not math.isfinite(high):
                raise ValueError(f"the input of {name} holds NaN or infinity: check the data and the weights")
            before = limits.get(name, (0.0, 0.0))  # a range holds 0 in any case
            limits[name] = (min(before[0], low), max(before[1], high))

    _run(model, quantizers, batches, see)
    if not limits:
        raise ValueError("batches held no values: give at least one image")
    return limits


def _histograms(
    model: nn.Module,
    quantizers: dict[str, IntegerActivation],
    batches: Iterable[Any],
    limits: dict[str, tuple[float, float]],
) -> dict[str, Histogram]:
    counts = {name: np.zeros(_BINS) for name in quantizers}

    def see(name: str, x: Tensor) -> None:
        low, high = limits[name]
        if high > low:
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            counts[name] += torch.histc(wide, _BINS, low, high).double().cpu().numpy()

    _run(model, quantizers, batches, see)
    return {name: Histogram(counts[name], *limits[name]) for name in quantizers}


# --- from a histogram to a range -------------------------------------------------------------------------------------


def choose_range(histogram: Histogram, bits: int, method: Method = "mse", percentile: float = 99.99) -> Range:
    """The range for so many bits that a method takes from a histogram.

    Args:
        histogram: of the values.
        bits: of a code.
        method, percentile: as for `calibrate`.
    """
    full = Range(histogram.low, histogram.high)
    if method == "minmax" or not histogram.counts.any():
        return full
    if method == "percentile":
        return _percentile(histogram, percentile)
    return _least_error(histogram, bits) if method == "mse" else _least_divergence(histogram, bits)


def _percentile(histogram: Histogram, percentile: float) -> Range:
    """Leave out half of the rest on each side, all of it on one where all values lie on the other side of 0."""
    one_sided = histogram.low == 0 or histogram.high == 0
    left_out = (1 - percentile / 100) / (1 if one_sided else 2)
    share = np.concatenate([[0.0], np.cumsum(histogram.counts)]) / histogram.counts.sum()
    edges = np.linspace(histogram.low, histogram.high, len(share))
    low, high = np.interp([left_out, 1 - left_out], share, edges)
    return Range(
        min(0.0, low) if histogram.low < 0 else histogram.low, max(0.0, high) if histogram.high > 0 else histogram.high
    )


def _least_error(histogram: Histogram, bits: int) -> Range:
    """Try shares of both ends of the range, and take the pair of least mean squared error."""
    shares = np.arange(1, _CANDIDATES + 1) / _CANDIDATES
    lows = histogram.low * shares if histogram.low < 0 else np.zeros(1)
    highs = histogram.high * shares if histogram.high > 0 else np.zeros(1)
    return min(
        (Range(float(low), float(high)) for low in lows for high in highs),
        key=lambda tried: squared_error(histogram, tried, bits),
    )


def squared_error(histogram: Histogram, tried: Range, bits: int) -> float:
    """Mean squared error of a histogram's values when they are quantized in a range."""
    x = histogram.centers
    scale = (tried.high - tried.low) / (2**bits - 1)
    zero = np.round(tried.low / scale)
    levels = np.clip(np.round(x / scale), zero, zero + 2**bits - 1) * scale
    return float(histogram.counts @ (x - levels) ** 2 / histogram.counts.sum())


def _least_divergence(histogram: Histogram, bits: int) -> Range:
    """Try ever more bins around 0, and take those whose quantized version diverges least.

    Values of both signs have their sizes counted, and half of the levels; the range never exceeds what was seen.
    """
    one_sided = histogram.low == 0 or histogram.high == 0
    levels = 2**bits if one_sided else 2 ** (bits - 1)
    top = max(-histogram.low, histogram.high)
    sizes = np.histogram(np.abs(histogram.centers), _BINS, (0, top), weights=histogram.counts)[0]
    sizes[0] = sizes[1]  # the zeros of ReLU are exact with any range
    candidates = range(levels, _BINS + 1, max(1, levels // 64))
    best = min(candidates, key=lambda n: divergence(sizes, n, levels), default=_BINS)
    end = top * best / _BINS
    return Range(max(histogram.low, -end), min(histogram.high, end))


def divergence(counts: Reals, bins: int, levels: int) -> float:
    """Kullback-Leibler divergence of a clipped histogram from its own version of fewer levels.

    What was clipped counts in the histogram and not in its version of fewer levels. Where that leaves nothing it has
    1e-4 counts: an outlier would be infinitely far away.

    Args:
        counts: of sizes, from 0 on.
        bins: how many of them the range holds; what lies beyond counts as its last bin.
        levels: how many values are left. Each spreads its count evenly over its bins that are not empty.
    """
    clipped = counts[:bins].copy()
    clipped[-1] += counts[bins:].sum()
    level = np.arange(bins) * levels // bins
    filled = clipped > 0
    mass = np.bincount(level, counts[:bins], levels)
    width = np.bincount(level, filled, levels)
    spread = np.where(filled, mass[level] / np.maximum(width[level], 1), 0)
    p, q = clipped[filled] / clipped.sum(), np.maximum(spread[filled], 1e-4)
    return float((p * np.log(p / (q / q.sum()))).sum())
