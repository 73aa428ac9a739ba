"""Data-free quantization in one call."""

import math
from collections.abc import Collection, Sequence
from typing import Literal

import torch
from torch import Tensor, fx, nn

from classical.checks import real, whole
from classical.convert import quantize
from classical.data_free.biases import absorb_biases, bias_of, correct_biases
from classical.data_free.equalization import equalize
from classical.data_free.folding import fold_batch_norms, record_moments, replace_relu6
from classical.data_free.graph import LAYERS
from classical.data_free.moments import Moments, propagate
from classical.data_free.ranges import set_ranges
from classical.data_free.report import Report


def data_free_quantize(
    model: nn.Module,
    *,
    bits: int = 8,
    per_channel: bool = False,
    symmetric: bool = True,
    input_range: tuple[float, float] | None = None,
    input_mean: float | Sequence[float] | None = None,
    images: Tensor | None = None,
    relu6: Literal["clip", "relu", "keep"] = "clip",
    equalization: bool = True,
    absorption: bool = True,
    correction: bool = True,
    sigmas: float = 6.0,
    skip: str | Collection[str] = (),
) -> tuple[fx.GraphModule, Report]:
    """Quantize a trained network without training it and without its data.

    Batch norm is folded, ReLU6 made to follow its channels, channels equalized, high biases absorbed; then weights and
    inputs of each nn.Conv2d and nn.Linear are quantized, ranges set from the batch-norm statistics, and the biases
    corrected for what quantized weights shift. Each step is also a function of its own.

    Args:
        model: any module that torch.fx traces; it stays as it is.
        bits: of weights and activations, 2 to 16.
        per_channel: a scale for each output channel of a weight instead of one a layer.
        symmetric: weights without zero point.
        input_range: smallest and largest value of the network's input; each sample has its own range unless given.
        input_mean: mean of the network's input, or of each of its channels, for the first layer's correction.
        images: where layers have no batch norm: input from which to record their statistics, real or `natural_noise`,
            (batch, channels, ...), normalized as the network expects. Biases are absorbed by batch-norm statistics
            alone: on noise, deviations come out too small to say what a ReLU never cuts off.
        relu6: "clip", the same function; "relu", without bound; "keep", which leaves its channels unequalized.
        equalization, absorption, correction: whether to take these steps.
        sigmas: half the range of a normal tensor, in standard deviations.
        skip: names of layers to leave float.

    Returns:
        A copy of quantized layers in eval(), each with a bias, and what each step did and left out. Which tensors it
        has depends on the model's structure alone, so that a state_dict fits a copy made of other weights.

    Raises:
        ValueError: torch.fx cannot trace the model, or an argument is out of its range.

    Source: Nagel et al., arXiv:1906.04721.
    """
    if not whole(bits, 2, 16):
        raise ValueError(f"bits is {bits!r} but must be a whole number from 2 to 16")
    if relu6 not in ("clip", "relu", "keep"):
        raise ValueError(f"relu6 is {relu6!r} but must be 'clip', 'relu' or 'keep'")
    if not (real(sigmas) and sigmas > 0):
        raise ValueError(f"sigmas is {sigmas!r} but must be above 0")
    weight = f"int{bits}{'_channel' if per_channel else ''}{'' if symmetric else '_affine'}"
    graph, report = fold_batch_norms(model)
    for layer in graph.modules():
        if isinstance(layer, LAYERS):
            bias_of(layer)  # whether a later step moves it depends on the weights, but names in a file must not
    if relu6 != "keep":
        graph, step = replace_relu6(graph, relu6)
        report += step
    if equalization:
        graph, step = equalize(graph)
        report += step
    if absorption:
        graph, step = absorb_biases(graph)
        report += step
    if images is not None:
        graph, step = record_moments(graph, images)
        report += step
    moments = propagate(graph, sigmas=sigmas, inputs=_inputs(graph, input_range, input_mean))
    quantized: nn.Module = quantize(graph, weight=weight, activation=f"int{bits}", skip=skip).eval()
    quantized, step = set_ranges(quantized, moments)
    report += step
    if correction:
        quantized, step = correct_biases(quantized, graph, moments)
        report += step
    return quantized, report


def _inputs(
    graph: fx.GraphModule, input_range: tuple[float, float] | None, mean: float | Sequence[float] | None
) -> Moments | None:
    """Moments of the network's input, with one number for all channels where only that is known."""
    first = next((m for m in graph.modules() if isinstance(m, nn.Conv2d | nn.Linear)), None)
    if first is None or (input_range is None and mean is None):
        return None
    channels = first.weight.shape[1] * getattr(first, "groups", 1)
    low, high = math.nan, math.nan
    if input_range is not None:
        if not _reals(input_range, 2) or input_range[0] > input_range[1]:
            raise ValueError(f"input_range is {input_range!r} but must be two numbers, the smallest value first")
        low, high = input_range
    if not (mean is None or real(mean) or _reals(mean, channels)):
        raise ValueError(f"input_mean is {mean!r} but must be a number, or one for each of the {channels} channels")
    unknown = first.weight.new_full((channels,), math.nan)
    means = unknown if mean is None else first.weight.new_tensor(mean).expand(channels)
    return Moments(means, unknown, torch.full_like(unknown, low), torch.full_like(unknown, high))


def _reals(values: object, n: int) -> bool:
    """Whether these are n finite numbers."""
    return isinstance(values, Collection) and len(values) == n and all(map(real, values))
