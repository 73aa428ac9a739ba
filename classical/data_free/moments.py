"""Means, variances and ranges of all tensors of a network, from batch-norm statistics instead of images."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from classical.data_free.folding import output_moments
from classical.data_free.graph import Layer, label, operation

INPUT = "the network's input"


class Moments(NamedTuple):
    """What is known of a tensor's values in each channel: (channels,) each, NaN where it is unknown.

    Attributes:
        mean: over images and positions.
        variance: likewise.
        low: where the range begins that nearly all values lie in.
        high: where it ends.
    """

    mean: Tensor
    variance: Tensor
    low: Tensor
    high: Tensor


def clipped_normal(mean: Tensor, std: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of min(max(x, low), high) for normal x.

    With a = (low - mean) / std, b = (high - mean) / std, and density phi and distribution Phi of the standard normal
    law, z = (clipped x - mean) / std has
    E[z]   = phi(a) - phi(b) + a Phi(a) + b Phi(-b),
    E[z^2] = Phi(b) - Phi(a) + a phi(a) - b phi(b) + a^2 Phi(a) + b^2 Phi(-b).

    Args:
        mean, std, low, high: broadcast against each other; std >= 0, low <= high, bounds may be infinite.

    Source: Nagel et al., arXiv:1906.04721, appendix C.
    """
    width = torch.where(std == 0, torch.ones_like(std), std)
    a, b = (low - mean) / width, (high - mean) / width
    below, above = torch.special.ndtr(a), torch.special.ndtr(-b)
    density_a, density_b = (torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi) for z in (a, b))
    # At infinite bounds every product below tends to 0, but would be computed as infinity times 0.
    a, b = (torch.where(z.isinf(), torch.zeros_like(z), z) for z in (a, b))
    first = density_a - density_b + a * below + b * above
    second = 1 - below - above + a * density_a - b * density_b + a**2 * below + b**2 * above
    constant = std == 0  # false where std is NaN, which then shows in the results
    variance = torch.where(constant, torch.zeros_like(first), std**2 * (second - first**2).clamp(min=0))
    return torch.where(constant, torch.clamp(mean, low, high), mean + std * first), variance


def propagate(model: fx.GraphModule, *, sigmas: float = 6.0, inputs: Moments | None = None) -> dict[str, Moments]:
    """Moments of what every node of a traced network hands on, by the node's name.

    A layer with output moments (from its folded batch norm) has those, whatever it reads. Any other layer's follow from
    those of its input, taken as independent between channels and pixels. Clipped values are those of a normal law.
    Means after max pooling or leaky functions are unknown, and so is all that follows from them. A clip's output lies
    between its bounds even where nothing is known of its input.

    Args:
        model: with batch norm folded.
        sigmas: a normal tensor's range is mean +- sigmas standard deviations.
        inputs: of the network's input, unknown unless given.

    Source: Nagel et al., arXiv:1906.04721, sections 4.2.1 and 5.
    """
    found: dict[fx.Node, Moments | None] = {}
    for node in model.graph.nodes:
        found[node] = _step(model, node, found, sigmas, inputs)
    return {node.name: moments for node, moments in found.items() if moments is not None}


def origin(model: fx.GraphModule, node: fx.Node, unknown: Callable[[fx.Node], bool]) -> str:
    """What a node's moments are unknown because of, in words: the first on the way to it of which they are unknown."""
    while True:
        kind, sources, _ = operation(model, node)
        if kind == "layer":
            return f"{label(node)}, which has no batch norm"
        before = next((source for source in sources if unknown(source)), None)
        if before is None:
            break
        node = before
    if node.op == "call_module":
        return f"{type(model.get_submodule(str(node.target))).__name__} {node.target}"
    return INPUT if kind == "input" else label(node)


def _step(
    model: fx.GraphModule, node: fx.Node, found: dict[fx.Node, Moments | None], sigmas: float, inputs: Moments | None
) -> Moments | None:
    kind, sources, detail = operation(model, node)
    if kind == "input":
        return inputs
    kept = model.get_submodule(str(node.target)) if node.op == "call_module" else None
    read = [found[source] for source in sources]
    known = [moments for moments in read if moments is not None]
    if kind == "layer":
        return _layer(detail, read[0], sigmas)
    if not known or len(known) < len(read):
        return None
    x = known[0]
    if kind in ("same", "mean", "squeeze", "border", "flatten"):
        return x
    if kind == "relu":
        return _clip(x, torch.zeros_like(x.mean), torch.full_like(x.mean, math.inf))
    if kind == "clip":
        return _clip(x, detail.low.to(x.mean), detail.high.to(x.mean))
    if isinstance(kept, nn.Hardtanh):  # a ReLU6 that stayed
        return _clip(x, x.mean.new_tensor(kept.min_val), x.mean.new_tensor(kept.max_val))
    if kind in ("max", "leaky"):
        unknown = torch.full_like(x.mean, math.nan)
        return Moments(unknown, unknown, x.low, x.high)
    if kind == "slice":
        return Moments(*(value[detail] for value in x))
    if kind == "scale":
        return Moments(x.mean * detail, x.variance * detail**2, x.low * detail, x.high * detail)
    if kind == "widen":
        return Moments(*(F.pad(value, detail) for value in x))
    if kind == "concat":
        return Moments(*(torch.cat(values) for values in zip(*known, strict=True)))
    if kind == "add" and len(known) == 2 and len(x.mean) == len(known[1].mean):
        return _add(x, known[1], sigmas)
    return None


def _normal(mean: Tensor, variance: Tensor, sigmas: float) -> Moments:
    spread = sigmas * variance.sqrt()
    return Moments(mean, variance, mean - spread, mean + spread)


def _layer(layer: Layer, x: Moments | None, sigmas: float) -> Moments | None:
    own = output_moments(layer)
    if own is not None:
        return _normal(own[0], own[1] ** 2, sigmas)
    weight = layer.weight.detach()
    if x is None:
        return Moments(*[weight.new_full((len(weight),), math.nan)] * 4)
    mean = summed_weight(weight, layer, x.mean) + (0 if layer.bias is None else layer.bias.detach())
    return _normal(mean, summed_weight(weight**2, layer, x.variance), sigmas)


def summed_weight(weight: Tensor, layer: Layer, values: Tensor) -> Tensor:
    """What a layer of these weights makes of an image whose channels are constant, far from its borders: (outputs,).

    Args:
        weight: of the shape of the layer's weight.
        layer: its groups count.
        values: one for each input channel; of each channel before flattening, if it was flattened.
    """
    groups = getattr(layer, "groups", 1)
    blocks = weight.reshape(groups, weight.shape[0] // groups, len(values) // groups, -1).sum(-1)
    return torch.einsum("goi,gi->go", blocks, values.to(weight).reshape(groups, -1)).reshape(-1)


def _clip(x: Moments, low: Tensor, high: Tensor) -> Moments:
    mean, variance = clipped_normal(x.mean, x.variance.sqrt(), low, high)
    # Of what is unknown, the bounds are known.
    bottom = torch.where(x.low.isnan(), -math.inf, x.low)
    top = torch.where(x.high.isnan(), math.inf, x.high)
    return Moments(mean, variance, torch.clamp(bottom, low, high), torch.clamp(top, low, high))


def _add(x: Moments, y: Moments, sigmas: float) -> Moments:
    normal = _normal(x.mean + y.mean, x.variance + y.variance, sigmas)
    # The sum of the ranges holds too; fmax and fmin prefer it to what is unknown.
    return normal._replace(low=torch.fmax(normal.low, x.low + y.low), high=torch.fmin(normal.high, x.high + y.high))
