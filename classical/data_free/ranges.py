"""Ranges of quantized activations from the statistics of batch norm."""

import torch
from torch import fx, nn

from classical.data_free.graph import operation, traced
from classical.data_free.moments import Moments
from classical.data_free.report import Entry, Report
from classical.layers import QuantizedConv2d, QuantizedLinear
from classical.quantizers import IntegerActivation


@torch.no_grad()
def set_ranges(quantized: nn.Module, moments: dict[str, Moments]) -> tuple[fx.GraphModule, Report]:
    """Set the range of each quantized layer's input to that of its widest channels.

    Args:
        quantized: traced, its layers QuantizedConv2d or QuantizedLinear; it stays as it is.
        moments: of the network's tensors, from `propagate`.

    Source: Nagel et al., arXiv:1906.04721, section 5: mean +- 6 standard deviations, from 0 after ReLU.
    """
    graph = traced(quantized)
    entries = []
    for node in graph.graph.nodes:
        kind, sources, layer = operation(graph, node)
        if kind != "layer" or not isinstance(layer, QuantizedConv2d | QuantizedLinear):
            continue
        if not isinstance(layer.activation_quantizer, IntegerActivation):
            continue
        known = moments.get(sources[0].name)
        low, high = (known.low.min(), known.high.max()) if known is not None else (torch.tensor(torch.nan),) * 2
        if bool(low.isfinite() & high.isfinite()):
            layer.activation_quantizer.low.copy_(low)
            layer.activation_quantizer.high.copy_(high)
            entries.append(Entry("range", str(node.target), True, f"{float(low):.4g} to {float(high):.4g}"))
        else:
            reason = f"that of its input {sources[0].name} is unknown: each sample gets its own, or use calibrate"
            entries.append(Entry("range", str(node.target), False, reason))
    return graph, Report(tuple(entries))
