"""Smaller models that compute the same: channels that nothing reads, or that are constant, are cut out."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, fx, nn

from classical.layers import QuantizedConv2d, QuantizedLinear, require_module
from classical.pruning.channels import ChannelFlow, Layer, Reading
from classical.pruning.masks import finalize, private_copy


class LayerPlan(NamedTuple):
    """What becomes of one layer.

    Attributes:
        name: its path in the model.
        outputs, inputs: channels (features) before and after.
        kept: why pruned filters and channels stay nevertheless.
    """

    name: str
    outputs: tuple[int, int]
    inputs: tuple[int, int]
    kept: tuple[str, ...]


class ShrinkPlan(NamedTuple):
    """What `shrink` does to a model, a row a layer; str() is a table."""

    rows: tuple[LayerPlan, ...]

    def __str__(self) -> str:
        lines = [
            (row.name, f"{row.outputs[0]} -> {row.outputs[1]}", f"{row.inputs[0]} -> {row.inputs[1]}", kept)
            for row in self.rows
            for kept in ("; ".join(row.kept),)
        ]
        lines.insert(0, ("layer", "outputs", "inputs", "pruned but kept"))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines
        )


def shrink(model: nn.Module, example_input: Tensor | tuple[Any, ...], *, exact: bool = True) -> nn.Module:
    """Cut pruned filters and channels out of a model, whose outputs in eval() stay what they are up to rounding.

    A channel goes when every layer that reads it has no weights for it, or when it is constant (a filter without
    weights emits its bias; normalization and activation turn that into another constant) and the layers that read it
    can add the constant to their bias. Beside zero padding they can for 0 only: such channels stay, as do those of
    additions of which one branch is not pruned, of the model's inputs and outputs, and the last of every layer;
    `shrink_plan` says which and why. Followed are convolutions (dense and depthwise), linear and quantized layers,
    batch normalization, activations, pooling, flattening, additions, products and concatenations.

    Args:
        model: torch.fx must be able to trace it; it stays as it is.
        example_input: a batch that it takes, or a tuple of its arguments. Used for shapes, and to compare outputs.
        exact: False also removes channels whose constant zero padding interrupts, as if it went on: what lies near a
            border then changes a little, which further training makes up for.

    Returns:
        A copy of the same class with smaller layers, masks and scales written into the weights.

    Raises:
        ValueError: the model cannot be traced, the smaller one would give other outputs on the example, or an argument
            is of another type.
    """
    twin, modes, device = _prepared(model)
    example = _arguments(example_input)
    flow, removed = _analyze(twin, example, exact)
    with torch.no_grad():
        before = twin(*example)
        for reading in flow.readings:
            rows, columns, bias = _cuts(reading, removed)
            _cut_layer(reading.layer, rows, columns, bias)
        for layer, _, written in flow.depthwise.values():
            _cut_depthwise(layer, ~removed[written])
        for module, labels in flow.per_channel.values():
            _cut_per_channel(module, ~removed[labels])
        try:
            after = twin(*example)
        except RuntimeError as error:
            raise ValueError(f"the smaller model does not run, its forward relies on sizes: {error}") from error
        if exact:
            _compare(before, after, quantized=any(hasattr(m, "weight_quantizer") for m in twin.modules()))
    for module, mode in modes.items():
        module.training = mode
    return twin.to(device)


def shrink_plan(model: nn.Module, example_input: Tensor | tuple[Any, ...], *, exact: bool = True) -> ShrinkPlan:
    """Say what `shrink` would remove from each layer and why it keeps some of what is pruned; print it for a table.

    Args, Raises: as for `shrink`.
    """
    twin, _, _ = _prepared(model)
    example = _arguments(example_input)
    flow, removed = _analyze(twin, example, exact)
    rows = []
    for reading in flow.readings:
        inputs, outputs = reading.source.labels, reading.outputs
        kept = (
            *_reasons(flow, removed, outputs, (reading.weight == 0).flatten(1).all(1), "filter", reading.name),
            *_reasons(flow, removed, inputs, (reading.weight == 0).all(2).all(0), "channel", reading.name),
        )
        rows.append(_row(reading.name, removed, outputs, inputs, kept))
    for name, (layer, read, written) in flow.depthwise.items():
        empty = (layer.weight == 0).flatten(1).all(1)
        rows.append(_row(name, removed, written, read, _reasons(flow, removed, written, empty, "filter", name)))
    order = {name: place for place, (name, _) in enumerate(flow.tensors)}
    return ShrinkPlan(tuple(sorted(rows, key=lambda row: order[row.name])))


class _Tracer(fx.Tracer):
    """Does not look into modules with parameters of their own: layers, quantum kernels, whatever is unknown."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        own = any(parameter is not None for parameter in m._parameters.values())
        return own or super().is_leaf_module(m, module_qualified_name)


def _arguments(example_input: Tensor | tuple[Any, ...]) -> tuple[Any, ...]:
    """A model's arguments, on the CPU."""
    if not isinstance(example_input, Tensor | tuple):
        raise ValueError(
            f"example_input is {example_input!r} but must be a tensor, or a tuple of the model's arguments"
        )
    arguments = example_input if isinstance(example_input, tuple) else (example_input,)
    return tuple(part.cpu() if isinstance(part, Tensor) else part for part in arguments)


def _prepared(model: nn.Module) -> tuple[nn.Module, dict[nn.Module, bool], torch.device]:
    """A finalized copy on the CPU in eval(), its modes before, the model's device."""
    require_module(model)
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    twin = finalize(private_copy(model)).cpu()
    modes = {module: module.training for module in twin.modules()}
    return twin.eval(), modes, device


def _analyze(twin: nn.Module, example: tuple[Any, ...], exact: bool) -> tuple[ChannelFlow, Tensor]:
    """Labels of all channels, and which labels are removed."""
    try:
        graph = fx.GraphModule(twin, _Tracer().trace(twin))
    except Exception as error:  # tracing runs the model's own code, which may raise anything
        raise ValueError(
            f"{type(twin).__name__} cannot be traced by torch.fx ({error}): its forward must not branch on values"
        ) from error
    flow = ChannelFlow(graph, example, exact)
    while True:
        removed = _removed(flow)
        tried = len(flow.pinned)
        for name, labels in flow.tensors:
            if len(labels) and removed[labels].all():
                flow.pin(labels[:1], f"it is the last one of {name!r}")
        if len(flow.pinned) == tried:
            _check_quantizers(flow, removed)
        if len(flow.pinned) == tried:
            return flow, removed


def _removed(flow: ChannelFlow) -> Tensor:
    """Labels that no layer needs: the fixed point of removing, which frees what only the removed ones read."""
    pinned = torch.zeros(flow.size, dtype=torch.bool)
    pinned[list(flow.pinned)] = True
    removed = torch.zeros_like(pinned)
    while True:
        needed = pinned.clone()
        for reading in flow.readings:
            needed[reading.source.labels[_needs(reading, removed)]] = True
        if torch.equal(removed, ~needed):
            return removed
        removed = ~needed


def _needs(reading: Reading, removed: Tensor) -> Tensor:
    """Whether a layer, without the outputs removed so far, needs each of its inputs."""
    used = (reading.weight[~removed[reading.outputs]] != 0).any(2).any(0)
    return used & ~reading.foldable


def _check_quantizers(flow: ChannelFlow, removed: Tensor) -> None:
    """Pin the channels without which a layer would quantize its remaining weights to other values."""
    layers = [(r.name, r.layer, r.outputs, r.source.labels) for r in flow.readings]
    layers += [(name, layer, written, read[:0]) for name, (layer, read, written) in flow.depthwise.items()]
    for name, layer, outputs, inputs in layers:
        why = f"{name!r} would quantize its other weights differently"
        if _requantizes(layer, 0, ~removed[outputs]):
            flow.pin(outputs, why)
        if _requantizes(layer, 1, ~removed[inputs]):
            flow.pin(inputs, why)


def _requantizes(layer: Layer, axis: int, stays: Tensor) -> bool:
    """Whether a layer's weights are quantized differently when others are cut away along an axis."""
    if not isinstance(layer, QuantizedConv2d | QuantizedLinear) or stays.all():
        return False
    twin = cast(Any, private_copy(layer))
    index = stays.nonzero().flatten()
    with torch.no_grad():
        twin.weight = nn.Parameter(layer.weight.index_select(axis, index))
        if axis == 0:
            twin.weight_quantizer.select(index)
        try:
            found = twin.quantized_weight()
        except (RuntimeError, ValueError):  # it holds values for each channel, which do not fit fewer
            return True
        expected = layer.quantized_weight().index_select(axis, index)
        # Sums and products of fewer rows may differ in their last bits.
        rounding = 8 * torch.finfo(found.dtype).eps * float(expected.abs().max())
        return found.shape != expected.shape or not torch.allclose(found, expected, rtol=0, atol=rounding)


# --- cutting ---


def _cuts(reading: Reading, removed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs and inputs that stay, and what the constants removed with the others add to the bias."""
    rows, columns = ~removed[reading.outputs], ~removed[reading.source.labels]
    gone = torch.where(reading.foldable & ~columns, reading.source.value, 0)
    return rows, columns, (reading.weight.sum(2) @ gone)[rows]


def _cut_layer(layer: Layer, rows: Tensor, columns: Tensor, bias: Tensor) -> None:
    trained = layer.weight.requires_grad
    layer.weight = nn.Parameter(layer.weight[rows][:, columns].clone(), trained)
    _select(layer, rows)
    if layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias[rows] + bias, layer.bias.requires_grad)
    elif bias.any():
        layer.bias = nn.Parameter(bias, trained)
    if isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = int(rows.sum()), int(columns.sum())
    else:
        layer.out_channels, layer.in_channels = int(rows.sum()), int(columns.sum())


def _cut_depthwise(layer: Layer, rows: Tensor) -> None:
    layer = cast(nn.Conv2d, layer)
    repeats = layer.out_channels // layer.groups
    layer.weight = nn.Parameter(layer.weight[rows].clone(), layer.weight.requires_grad)
    _select(layer, rows)
    if layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias[rows].clone(), layer.bias.requires_grad)
    layer.out_channels = int(rows.sum())
    layer.in_channels = layer.groups = layer.out_channels // repeats


def _select(layer: Layer, rows: Tensor) -> None:
    if isinstance(layer, QuantizedConv2d | QuantizedLinear):
        layer.weight_quantizer.select(rows)


def _cut_per_channel(module: nn.Module, rows: Tensor) -> None:
    for name, parameter in module._parameters.items():
        if parameter is not None:
            setattr(module, name, nn.Parameter(parameter[rows].clone(), parameter.requires_grad))
    for name, buffer in module._buffers.items():
        if buffer is not None and buffer.dim():
            setattr(module, name, buffer[rows].clone())
    number = "num_parameters" if isinstance(module, nn.PReLU) else "num_features"
    setattr(module, number, int(rows.sum()))


def _compare(before: Any, after: Any, quantized: bool) -> None:
    """See that two outputs agree on the example: a last look at what the rules above took for granted."""
    if isinstance(before, Tensor) and before.is_floating_point():
        distance = float((before - after).abs().max()) if before.numel() else 0.0
        # Rounding may move a value across the border of two levels of a quantizer, never across the whole range.
        share = 0.1 if quantized else 1e4 * torch.finfo(before.dtype).eps
        if distance > share * max(1.0, float(before.abs().max())):
            raise ValueError(f"the smaller model's outputs on the example are off by {distance:.3g}: it cannot shrink")
    elif isinstance(before, Sequence):
        for one, other in zip(before, after, strict=True):
            _compare(one, other, quantized)
    elif isinstance(before, dict):
        for key, one in before.items():
            _compare(one, after[key], quantized)


# --- telling ---


def _row(name: str, removed: Tensor, outputs: Tensor, inputs: Tensor, kept: tuple[str, ...]) -> LayerPlan:
    left, right = ((len(labels), int((~removed[labels]).sum())) for labels in (outputs, inputs))
    return LayerPlan(name, left, right, kept)


def _reasons(
    flow: ChannelFlow, removed: Tensor, labels: Tensor, empty: Tensor, kind: str, name: str
) -> tuple[str, ...]:
    """Why empty filters or channels of a layer stay, each reason once."""
    reasons = Counter(_reason(flow, removed, label, kind, name) for label in labels[empty & ~removed[labels]].tolist())
    return tuple(f"{n} {kind}{'s' * (n > 1)}: {why}" for why, n in reasons.items())


def _reason(flow: ChannelFlow, removed: Tensor, label: int, kind: str, name: str) -> str:
    # An empty filter emits a constant: where it stays for what it is added to, that is what to prune too.
    joined = flow.partner(label, name) if kind == "filter" else None
    if joined is not None:
        return joined
    if label in flow.pinned:
        return flow.pinned[label]
    for reading in flow.readings:
        here = (reading.source.labels == label) & _needs(reading, removed)
        if here.any():
            if reading.source.known[here].any():
                return f"{reading.name!r} reads a constant that its zero padding interrupts"
            return f"{reading.name!r} reads it where it is not constant"
    raise RuntimeError("a label is kept for no reason")  # _removed keeps only what is pinned or needed
