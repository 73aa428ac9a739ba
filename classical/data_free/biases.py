"""Biases: high ones absorbed by the next layer, and those that quantization shifted corrected."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.utils.hooks import RemovableHandle

from classical.data_free.clips import ChannelClip
from classical.data_free.folding import output_moments
from classical.data_free.graph import Layer, label, layer_at, operation, traced
from classical.data_free.moments import Moments, summed_weight
from classical.data_free.report import Entry, Report, names
from classical.layers import QuantizedConv2d, QuantizedLinear


def absorb_biases(model: nn.Module, *, sigmas: float = 3.0, padded: bool = False) -> tuple[fx.GraphModule, Report]:
    """Move what a ReLU hardly ever cuts off into the bias of the layers that read it: activations get smaller.

    Where a pre-activation has mean beta and standard deviation gamma, relu(x) = relu(x - c) + c for nearly all x if
    c = max(0, beta - sigmas gamma). So c leaves the first bias, and W c enters the next.

    Args:
        model: any module that torch.fx traces, batch norm folded; it stays as it is.
        sigmas: how far below the mean c lies, in standard deviations.
        padded: whether to do so before convolutions that pad with zeros too, as the paper does. There c is missing at
            the borders, so the function changes.

    Returns:
        The traced copy, of the same function wherever no pre-activation lies below c, and what was absorbed.

    Source: Nagel et al., arXiv:1906.04721, section 4.1.3.
    """
    graph = traced(model)
    entries = []
    for node in graph.graph.nodes:
        kind, _, layer = operation(graph, node)
        moments = output_moments(layer) if kind == "layer" else None
        if moments is None or len(node.users) != 1:
            continue
        activation = next(iter(node.users))
        kind, _, clip = operation(graph, activation)
        if kind not in ("relu", "clip"):
            continue
        shift = (moments[0] - sigmas * moments[1]).clamp(min=0)
        if kind == "clip":  # above its lower bound, and leaving an upper one that is not below
            above = (moments[0] - sigmas * moments[1] - clip.low.to(shift)).clamp(min=0)
            shift = torch.minimum(torch.minimum(shift, above), (clip.high - clip.low).to(shift))
        if not bool(shift.any()):
            continue
        readers = _readers(graph, node, activation, padded)
        if isinstance(readers, str):
            entries.append(Entry("absorb", str(node.target), False, readers))
            continue
        _absorb(graph, layer, None if kind == "relu" else str(activation.target), readers, shift)
        note = f"{int((shift > 0).sum())} of {len(shift)} channels, by up to {float(shift.max()):.3g}"
        entries.append(Entry("absorb", f"{node.target} -> {names(tuple(readers))}", True, note))
    return graph, Report(tuple(entries))


def _readers(graph: fx.GraphModule, writer: fx.Node, start: fx.Node, padded: bool) -> list[str] | str:
    """Names of the layers that read a writer's activation, or why its mean cannot be moved into them."""
    found: list[str] = []
    waiting = list(start.users)
    while waiting:
        node = waiting.pop(0)
        kind, _, detail = operation(graph, node)
        if kind == "layer":
            if not (padded or isinstance(detail, nn.Linear) or detail.padding_mode != "zeros") and any(
                detail._reversed_padding_repeated_twice
            ):
                return f"{node.target} pads with zeros"
            found.append(str(node.target))
        elif kind in ("same", "flatten", "squeeze") or (kind in ("max", "mean", "border") and (padded or not detail)):
            waiting.extend(node.users)
        elif kind != "shape":
            return "it is the network's output" if kind == "output" else f"read by {label(node)}"
    calls = [str(node.target) for node in graph.graph.nodes if node.op == "call_module"]
    repeated = [name for name in (str(writer.target), *found) if calls.count(name) > 1]
    return f"{repeated[0]} is called more than once" if repeated else found


@torch.no_grad()
def _absorb(graph: fx.GraphModule, layer: Layer, clip: str | None, readers: list[str], shift: Tensor) -> None:
    bias_of(layer).sub_(shift)
    layer.get_buffer("output_mean").sub_(shift)
    if clip is not None:
        old = cast(ChannelClip, graph.get_submodule(clip))
        graph.set_submodule(clip, ChannelClip(old.low, old.high - shift.to(old.high), old.axis).eval())
    for name in readers:
        reader = layer_at(graph, name)
        bias_of(reader).add_(summed_weight(reader.weight, reader, shift))


def bias_of(layer: Layer) -> Tensor:
    """A layer's bias, made of zeros if it had none."""
    if layer.bias is None:
        layer.bias = nn.Parameter(layer.weight.new_zeros(layer.weight.shape[0]))
    return layer.bias


@torch.no_grad()
def correct_biases(
    quantized: nn.Module, model: nn.Module, moments: dict[str, Moments]
) -> tuple[fx.GraphModule, Report]:
    """Take from each bias the mean shift of the output that quantized weights cause.

    Weights W + e instead of W shift the mean output by e E[x]. E[x] follows from statistics, so no image is needed.
    What zero padding takes away at borders is not accounted for.

    Args:
        quantized: traced, its layers QuantizedConv2d or QuantizedLinear; it stays as it is.
        model: the same network with the weights as they were.
        moments: of the model's tensors, from `propagate`.

    Source: Nagel et al., arXiv:1906.04721, section 4.2.
    """
    graph = traced(quantized)
    entries = []
    for node in graph.graph.nodes:
        kind, sources, layer = operation(graph, node)
        if kind != "layer" or not isinstance(layer, QuantizedConv2d | QuantizedLinear):
            continue
        known, name = moments.get(sources[0].name), str(node.target)
        if known is None or bool(known.mean.isnan().any()):
            entries.append(Entry("correct", name, False, f"the mean of its input {sources[0].name} is unknown"))
            continue
        error = layer.quantized_weight() - layer_at(model, name).weight
        entries.append(_correct(name, layer, summed_weight(error, layer, known.mean)))
    return graph, Report(tuple(entries))


@torch.no_grad()
def correct_biases_on(quantized: nn.Module, model: nn.Module, images: Tensor) -> tuple[fx.GraphModule, Report]:
    """Take from each bias the mean shift of the output that is seen on images, layer by layer.

    Each layer is corrected before its output runs on, so that later ones see what will run. Unlike the analytic
    correction it sees borders, clipped ranges and quantized activations too.

    Args:
        quantized: traced, its layers QuantizedConv2d or QuantizedLinear, the ranges of their inputs set.
        model: the same network with the weights as they were.
        images: its input, (batch, channels, ...), all at once.

    Source: Nagel et al., arXiv:1906.04721, appendix D.
    """
    graph = traced(quantized)
    layers = {name: m for name, m in graph.named_modules() if isinstance(m, QuantizedConv2d | QuantizedLinear)}
    means: dict[str, Tensor] = {}
    entries: list[Entry] = []

    def note(name: str, _: Layer, output: Tensor) -> None:
        means[name] = _channel_means(output, layers[name])

    def correct(name: str, layer: Layer, output: Tensor) -> Tensor:
        shift = _channel_means(output, layer) - means[name]
        entries.append(_correct(name, layer, shift))
        return output - (shift if isinstance(layer, nn.Linear) else shift.view(-1, *[1] * (output.dim() - 2)))

    _run(model, layers, images, note)
    _run(graph, layers, images, correct)
    return graph, Report(tuple(entries))


def _run(model: nn.Module, layers: dict[str, Any], images: Tensor, see: Callable[[str, Layer, Tensor], Any]) -> None:
    handles: list[RemovableHandle] = []
    for name in layers:
        hook = lambda layer, _, output, name=name: see(name, layer, output)  # noqa: E731
        handles.append(model.get_submodule(name).register_forward_hook(hook))
    try:
        model(images)
    finally:
        for handle in handles:
            handle.remove()


def _correct(name: str, layer: Layer, shift: Tensor) -> Entry:
    bias_of(layer).sub_(shift)
    return Entry("correct", name, True, f"by up to {float(shift.abs().max()):.3g}")


def _channel_means(output: Tensor, layer: nn.Module) -> Tensor:
    axis = output.dim() - 1 if isinstance(layer, nn.Linear) else 1
    return output.mean([i for i in range(output.dim()) if i != axis])
