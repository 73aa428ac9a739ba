"""Ranges of quantized activations from the statistics of batch norm."""

import math

import torch
from torch import fx, nn

from classical.data_free.graph import calls, traced
from classical.data_free.moments import INPUT, Moments, origin
from classical.data_free.report import Entry, Report
from classical.layers import QuantizedConv2d, QuantizedLinear
from classical.quantizers import IntegerActivation


@torch.no_grad()
def set_ranges(quantized: nn.Module, moments: dict[str, Moments]) -> tuple[fx.GraphModule, Report]:
    """Set the range of each quantized layer's input to that of its widest channels, over all calls of the layer.

    Args:
        quantized: traced, its layers QuantizedConv2d or QuantizedLinear; it stays as it is.
        moments: of the network's tensors, from `propagate`.

    Source: Nagel et al., arXiv:1906.04721, section 5: mean +- 6 standard deviations, from 0 after ReLU.
    """
    graph = traced(quantized)
    entries = []
    for name, sources in calls(graph).items():
        layer = graph.get_submodule(name)
        if not isinstance(layer, QuantizedConv2d | QuantizedLinear):
            continue
        if not isinstance(layer.activation_quantizer, IntegerActivation):
            continue
        ends = {source.name: _ends(moments.get(source.name)) for source in sources}
        unknown = [source for source in sources if not _known(ends[source.name])]
        if unknown:
            cause = origin(graph, unknown[0], lambda node: not _known(_ends(moments.get(node.name))))
            cure = "give input_range, or calibrate" if cause == INPUT else "calibrate for one"
            reason = f"that of its input is unknown because of {cause}: each sample gets its own; {cure}"
            entries.append(Entry("range", name, False, reason))
            continue
        low, high = min(low for low, _ in ends.values()), max(high for _, high in ends.values())
        layer.activation_quantizer.low.fill_(low)
        layer.activation_quantizer.high.fill_(high)
        entries.append(Entry("range", name, True, f"{low:.4g} to {high:.4g}"))
    return graph, Report(tuple(entries))


def _known(ends: tuple[float, float]) -> bool:
    return all(map(math.isfinite, ends))


def _ends(known: Moments | None) -> tuple[float, float]:
    """Where the range of all channels begins and ends; NaN where that is unknown."""
    return (math.nan, math.nan) if known is None else (float(known.low.min()), float(known.high.max()))
