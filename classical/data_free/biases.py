"""Biases: high ones absorbed by the next layer, and those that quantization shifted corrected."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.utils.hooks import RemovableHandle

from classical.data_free.clips import ChannelClip
from classical.data_free.folding import output_moments
from classical.data_free.graph import Layer, calls, label, layer_at, operation, traced
from classical.data_free.moments import INPUT, Moments, origin, summed_weight
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
        The traced copy, of the same function wherever no pre-activation lies below c, and what was absorbed. The
        report leaves out layers of which every c is 0, and those without batch norm that no ReLU follows.

    Source: Nagel et al., arXiv:1906.04721, section 4.1.3.
    """
    graph = traced(model)
    entries: list[Entry] = []
    for node in graph.graph.nodes:
        kind, _, layer = operation(graph, node)
        if kind != "layer":
            continue
        name, moments = str(node.target), output_moments(layer)
        activation = next((user for user in node.users if operation(graph, user).kind in ("relu", "clip")), None)
        if moments is None:
            if activation is not None:
                entries.append(Entry("absorb", name, False, "no batch norm says what is hardly ever cut off"))
            continue
        shift = (moments[0] - sigmas * moments[1]).clamp(min=0)
        kind, _, clip = operation(graph, node if activation is None else activation)
        if kind == "clip":  # above its lower bound, and leaving an upper one that is not below
            above = (moments[0] - sigmas * moments[1] - clip.low.to(shift)).clamp(min=0)
            shift = torch.minimum(torch.minimum(shift, above), (clip.high - clip.low).to(shift))
        if not bool(shift.any()):
            continue
        readers: list[str] | str = "read by nothing"
        others = [user for user in node.users if user is not activation]
        if others:
            readers = _obstacle(graph, others[0])
        elif activation is not None:
            readers = _readers(graph, node, activation, padded)
        if isinstance(readers, str):
            entries.append(Entry("absorb", name, False, readers))
            continue
        bounded = str(activation.target) if activation is not None and kind == "clip" else None
        _absorb(graph, layer, bounded, readers, shift)
        note = f"{int((shift > 0).sum())} of {len(shift)} channels, by up to {float(shift.max()):.3g}"
        entries.append(Entry("absorb", f"{node.target} -> {names(tuple(readers))}", True, note))
    return graph, Report(tuple(dict.fromkeys(entries)))  # a layer that is called twice is one layer


def _obstacle(graph: fx.GraphModule, reader: fx.Node) -> str:
    """Why a mean stays where it is that something else than a ReLU reads."""
    return "it is the network's output" if operation(graph, reader).kind == "output" else f"read by {label(reader)}"


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
            return _obstacle(graph, node)
    called = calls(graph)
    repeated = [name for name in (str(writer.target), *found) if len(called[name]) > 1]
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
    A layer that is called several times has one bias for all: it takes the mean of their shifts, the least squared one.
    What zero padding takes away at borders is not accounted for.

    Args:
        quantized: traced, its layers QuantizedConv2d or QuantizedLinear; it stays as it is.
        model: the same network with the weights as they were.
        moments: of the model's tensors, from `propagate`.

    Source: Nagel et al., arXiv:1906.04721, section 4.2.
    """
    graph = traced(quantized)
    means = {name: known.mean for name, known in moments.items() if not bool(known.mean.isnan().any())}
    entries = []
    for name, sources in calls(graph).items():
        layer = graph.get_submodule(name)
        if not isinstance(layer, QuantizedConv2d | QuantizedLinear):
            continue
        unknown = [source for source in sources if source.name not in means]
        if unknown:
            cause = origin(graph, unknown[0], lambda node: node.name not in means)
            cure = ": give input_mean" if cause == INPUT else ""
            entries.append(Entry("correct", name, False, f"the mean of its input is unknown because of {cause}{cure}"))
            continue
        error = layer.quantized_weight() - layer_at(model, name).weight
        shifts = [summed_weight(error, layer, means[source.name]) for source in sources]
        entries.append(_correct(name, layer, torch.stack(shifts).mean(0)))
    return graph, Report(tuple(entries))


@torch.no_grad()
def correct_biases_on(quantized: nn.Module, model: nn.Module, images: Tensor) -> tuple[fx.GraphModule, Report]:
    """Take from each bias the mean shift of the output that is seen on images, layer by layer.

    Each layer is corrected before its output runs on, so that later ones see what will run. Unlike the analytic
    correction it sees borders, clipped ranges and quantized activations too. A layer that is called several times is
    left alone: its one bias would have to change after the first call has run.

    Args:
        quantized: traced, its layers QuantizedConv2d or QuantizedLinear, the ranges of their inputs set.
        model: the same network with the weights as they were.
        images: its input, (batch, channels, ...), all at once.

    Source: Nagel et al., arXiv:1906.04721, appendix D.
    """
    graph = traced(quantized)
    layers = {name: m for name, m in graph.named_modules() if isinstance(m, QuantizedConv2d | QuantizedLinear)}
    means: dict[str, list[Tensor]] = {}
    entries: list[Entry] = []

    def note(name: str, _: Layer, output: Tensor) -> None:
        means.setdefault(name, []).append(_channel_means(output, layers[name]))

    def correct(name: str, layer: Layer, output: Tensor) -> Tensor:
        if len(means[name]) > 1:
            entries.append(Entry("correct", name, False, f"called {len(means[name])} times, with one bias"))
            return output
        shift = _channel_means(output, layer) - means[name][0]
        entries.append(_correct(name, layer, shift))
        return output - (shift if isinstance(layer, nn.Linear) else shift.view(-1, *[1] * (output.dim() - 2)))

    _run(model, layers, images, note)
    _run(graph, layers, images, correct)
    return graph, Report(tuple(dict.fromkeys(entries)))


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
