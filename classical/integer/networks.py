"""Whole networks in integers: from a trained network of quantized layers to one that computes with integers alone.

Between layers, a tensor is either the codes of the quantizer that reads it (int8), or int32 accumulators n with
    real value = sum over terms of factor * n + offset,   a factor and an offset for each channel.
Batch norm, bias and the mean of a pooling window only change factors and offset. A sum of two branches has the terms of
both. Rounding happens once, where codes are made: in fixed point, the multipliers being M0 2^-n.
ReLU, clips, maximum pooling and reshaping do not fall where their input grows, so they act on codes where all that
follows reads codes of one quantizer, and on accumulators otherwise.
"""

import copy
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from classical.data_free.graph import Operation, label, operation
from classical.integer.codes import InputCode, input_code, thresholds
from classical.integer.layers import layer_sums, weight_terms
from classical.integer.loading import Kernels
from classical.integer.rescale import INT32_MAX, Rescale, rescale
from classical.integer.steps import Clip, Encode, Largest, Scores, window_sums
from classical.integer.tracing import (
    clip_bounds,
    impossible,
    largest_window,
    pooling_window,
    shape_of,
    traced_quantized,
    zero_padding,
)
from classical.layers import QuantizedConv2d, QuantizedLinear
from classical.quantizers import Quantizer

_FINE_BITS = 29  # of accumulators that were rescaled: far finer than codes, with room for sums
_MONOTONE = ("clip", "same", "max", "flatten", "slice", "border")


@dataclass(frozen=True)
class _Reader:
    """The quantizer of a layer's inputs, and the type in which it computes."""

    quantizer: Quantizer
    like: Tensor
    code: InputCode
    thresholds: Tensor

    def agrees(self, other: "_Reader") -> bool:
        """Whether both give equal codes."""
        return self.code == other.code and torch.equal(self.thresholds, other.thresholds)

    def encode(self, values: Tensor) -> Tensor:
        """Codes of real numbers, int64."""
        real = values.to(self.like.dtype)
        return self.code.encode(self.quantizer, real[None])[0].long()


@dataclass(frozen=True)
class _Codes:
    """A tensor of codes."""

    node: fx.Node
    reader: _Reader
    trailing: int


@dataclass(frozen=True)
class _Wide:
    """A tensor as accumulators: factors, reach (bounds of |n|) of shape (terms, channels), offset (channels,)."""

    nodes: tuple[fx.Node, ...]
    factors: Tensor
    offset: Tensor
    reach: Tensor
    trailing: int


_Value = _Codes | _Wide
_Kind = TypeVar("_Kind", bound=_Codes | _Wide)


def integer_network(
    model: nn.Module, example: Tensor, *, kernels: Kernels = "auto", threads: int = 1
) -> fx.GraphModule:
    """A trained network of quantized layers, from its input's codes to its last accumulators in integers.

    The only real numbers are the input, which is quantized first, and the scales of the outputs. Codes differ from
    those of the network by at most one level where the inputs of the layer before are the same. The network is to be
    read from the CPU in eval(); intermediate integers are the values of the graph's nodes.

    Beside quantized layers it takes batch norm, ReLU, ReLU6 and other clips, maximum and average pooling, flattening,
    sums and concatenations of branches, slices, padding with zeros, and dropout, which vanishes.

    Args:
        model: of QuantizedConv2d and QuantizedLinear, whose input quantizers have seen their range; torch.fx must be
            able to trace it. It stays as it is.
        example: a batch of inputs. Other batches may have other sizes, not other shapes.
        kernels, threads: as for `integer_twin`.

    Returns:
        A module of the same outputs, which refuses NaN. Its submodules have the names of the layers they stand for.

    Raises:
        ValueError: a layer or function without integer form, named; an accumulator that could overflow; an argument of
            another type or out of range.

    Source: Jacob et al., arXiv:1712.05877, section 2.
    """
    return _Builder(model, example, kernels, threads).build()


class _Builder:
    """Walks through a traced network, and writes the graph that does the same in integers."""

    def __init__(self, model: nn.Module, example: Tensor, kernels: Kernels, threads: int) -> None:
        self.traced = traced_quantized(model, example)
        self.kernels, self.threads = kernels, threads
        self.dtype = example.dtype
        self.graph = fx.Graph()
        self.modules: dict[str, nn.Module] = {}
        self.values: dict[fx.Node, _Value] = {}
        self.readers: dict[str, _Reader] = {}
        self.operations = {node: self._operation(node) for node in self.traced.graph.nodes}
        self.wanted: dict[fx.Node, _Reader | None] = {}
        for node in reversed(self.traced.graph.nodes):
            self.wanted[node] = self._wanted(node)

    def build(self) -> fx.GraphModule:
        """The integer network."""
        for node in self.traced.graph.nodes:
            kind = self.operations[node].kind
            if kind == "shape":
                continue
            if kind == "output":
                self._output(node)
                continue
            value = self._value(node)
            wanted = self.wanted[node]
            self.values[node] = self._codes(node, value, wanted) if wanted is not None else value
        network = fx.GraphModule(self.modules, self.graph, "IntegerNetwork")
        return network.eval()

    # --- what a node is, and what its readers want -------------------------------------------------------------------

    def _operation(self, node: fx.Node) -> Operation:
        """As classical.data_free.graph has it, and what that takes for folded."""
        module = self.traced.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            return Operation("normalize", tuple(node.all_input_nodes), module)
        bounds = clip_bounds(self.traced, node)
        if bounds is not None:
            return Operation("clip", tuple(node.all_input_nodes), bounds)
        return operation(self.traced, node)

    def _wanted(self, node: fx.Node) -> _Reader | None:
        """The one quantizer that reads a node's tensor, through monotone functions; None if not all readers agree."""
        found: list[_Reader | None] = []
        for user in node.users:
            kind, _, detail = self.operations[user]
            if isinstance(detail, QuantizedConv2d | QuantizedLinear):
                found.append(self._reader(user, detail))
            elif kind in _MONOTONE:
                found.append(self.wanted[user])
            elif kind != "shape":
                found.append(None)
        first = found[0] if found else None
        if first is None or any(other is None or not first.agrees(other) for other in found):
            return None
        return first

    def _reader(self, node: fx.Node, layer: QuantizedConv2d | QuantizedLinear) -> _Reader:
        name = str(node.target)
        if name not in self.readers:
            quantizer = copy.deepcopy(layer.activation_quantizer)
            try:
                if quantizer.patch_scale:
                    raise ValueError(f"{quantizer!r} inputs scale each position by a real number; use 'bnn' inputs")
                code = input_code(quantizer, layer.weight, self.kernels)
                self.readers[name] = _Reader(
                    quantizer, layer.weight.detach(), code, thresholds(quantizer, layer.weight)
                )
            except ValueError as error:
                raise impossible(node, str(error)) from error
        return self.readers[name]

    # --- values ------------------------------------------------------------------------------------------------------

    def _value(self, node: fx.Node) -> _Value:
        kind, sources, detail = self.operations[node]
        if kind == "input":
            return self._input(node)
        if isinstance(detail, QuantizedConv2d | QuantizedLinear):
            return self._layer(node, sources[0], detail)
        if kind == "layer":
            raise impossible(node, f"{type(detail).__name__} is not quantized: use classical.quantize")
        steps: dict[str, Callable[..., _Value]] = {
            "normalize": self._normalize,
            "clip": self._clip,
            "same": self._same,
            "max": self._maximum,
            "mean": self._mean,
            "squeeze": self._mean,
            "add": self._add,
            "concat": self._concatenate,
            "scale": self._scale,
            "flatten": self._flatten,
            "slice": self._slice,
            "widen": self._widen,
            "border": self._border,
        }
        if kind not in steps:
            what = detail if kind == "unknown" else kind
            raise impossible(node, f"{what} has no integer form here")
        return steps[kind](node, *(self.values[source] for source in sources), detail=detail)

    def _input(self, node: fx.Node) -> _Value:
        reader = self.wanted[node]
        if reader is None:
            users = ", ".join(label(user) for user in node.users)
            raise impossible(
                node, f"the network's input is read by {users or 'nothing'}: one quantizer must read it first"
            )
        placeholder = self.graph.placeholder(node.name)
        codes = self._call(f"{node.name}_codes", Encode(reader.quantizer, reader.code), placeholder)
        return _Codes(codes, reader, max(0, len(shape_of(node)) - 2))

    def _layer(self, node: fx.Node, source: fx.Node, layer: QuantizedConv2d | QuantizedLinear) -> _Wide:
        reader = self._reader(node, layer)
        dims = 4 if isinstance(layer, QuantizedConv2d) else 2
        if len(shape_of(source)) != dims:
            raise impossible(node, f"its input has shape {shape_of(source)} but {dims} axes are needed")
        codes = self._codes(node, self.values[source], reader).node
        try:
            weight, factors = weight_terms(layer)
            rows = weight.flatten(2).double()
            constant = -reader.code.zero * rows.sum(2)
            ends = [end - reader.code.zero for end in (reader.code.low, reader.code.high)]
            sums = [rows.clamp(min=0).sum(2), rows.clamp(max=0).sum(2)]  # of positive and of negative weights
            reach = torch.maximum(ends[1] * sums[0] + ends[0] * sums[1], -ends[0] * sums[0] - ends[1] * sums[1])
            if not reach.max() <= INT32_MAX:
                raise ValueError(f"sums can reach {reach.max():.4g} but an int32 accumulator holds {INT32_MAX}")
            module = layer_sums(layer, weight, constant, kernels=self.kernels, threads=self.threads)
        except ValueError as error:
            raise impossible(node, str(error)) from error
        found = self._call(str(node.target), module, codes)
        nodes = tuple(self.graph.call_function(operator.getitem, (found, term)) for term in range(len(weight)))
        outputs = rows.shape[1]
        bias = rows.new_zeros(outputs) if layer.bias is None else layer.bias.detach().double()
        return _Wide(nodes, factors * reader.code.scale, bias, reach, dims - 2)

    def _codes(self, node: fx.Node, value: _Value, reader: _Reader) -> _Codes:
        """A value as codes of a quantizer."""
        if isinstance(value, _Codes):
            return value
        try:
            step = rescale(
                value.factors,
                value.offset,
                value.reach,
                reader.quantizer,
                reader.like,
                value.trailing,
                self.kernels,
            )
        except ValueError as error:
            raise impossible(node, str(error)) from error
        return _Codes(self._call(f"{node.name}_codes", step, *value.nodes), reader, value.trailing)

    def _single(self, node: fx.Node, value: _Wide, limit: float = INT32_MAX) -> _Wide:
        """A value as one term without offset, of positive factors: its integers order as what they stand for.

        Args:
            node: whose value it is.
            value: accumulators.
            limit: of their size.
        """
        plain = len(value.nodes) == 1 and not value.offset.any() and (value.factors > 0).all()
        if plain and value.reach.max() <= limit:
            return value
        bits = min(_FINE_BITS, int(math.log2(limit)) - 1)
        bound = (value.factors.abs() * value.reach).sum(0) + value.offset.abs()
        step = torch.where(bound > 0, bound, torch.ones_like(bound)) / 2**bits
        factors, offset = value.factors / step, value.offset / step
        try:
            module = Rescale(
                factors, offset, value.reach, -INT32_MAX, INT32_MAX, torch.int32, value.trailing, self.kernels
            )
        except ValueError as error:
            raise impossible(node, str(error)) from error
        found = self._call(f"{node.name}_fine", module, *value.nodes)
        reach = torch.full_like(step, 2.0**bits + 1)[None]
        return _Wide((found,), step[None], torch.zeros_like(step), reach, value.trailing)

    # --- functions between layers ------------------------------------------------------------------------------------

    def _normalize(self, node: fx.Node, value: _Wide, detail: nn.BatchNorm2d) -> _Value:
        if detail.running_mean is None or detail.running_var is None:
            raise impossible(node, "batch norm without running statistics depends on the batch: track them")
        gain = (detail.running_var.double() + detail.eps).rsqrt()
        shift = -detail.running_mean.double() * gain
        if detail.weight is not None:
            gain, shift = gain * detail.weight.detach().double(), shift * detail.weight.detach().double()
        if detail.bias is not None:
            shift = shift + detail.bias.detach().double()
        return replace(value, factors=value.factors * gain, offset=value.offset * gain + shift)

    def _clip(self, node: fx.Node, value: _Value, detail: tuple[Tensor, Tensor]) -> _Value:
        low, high = detail
        if isinstance(value, _Codes):
            ends = value.reader.encode(low), value.reader.encode(high)
            code = value.reader.code
            if (ends[0] <= code.low).all() and (ends[1] >= code.high).all():
                return value  # codes are clipped as tightly already
            return replace(value, node=self._call(node.name, Clip(*ends, value.trailing), value.node))
        single = self._single(node, value)
        low, high = ((bound / single.factors[0]).round().clamp(-INT32_MAX, INT32_MAX).long() for bound in (low, high))
        reach = single.reach.minimum(torch.maximum(low.abs(), high.abs()))
        found = self._call(node.name, Clip(low, high, single.trailing), single.nodes[0])
        return replace(single, nodes=(found,), reach=reach)

    def _same(self, node: fx.Node, value: _Value, detail: Any) -> _Value:
        module = self.traced.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, nn.Upsample) or node.target is F.interpolate:
            raise impossible(node, "interpolation has no integer form here")
        return value

    def _maximum(self, node: fx.Node, value: _Value, detail: Any) -> _Value:
        # An offset is the same for all that are compared.
        if isinstance(value, _Wide) and (len(value.nodes) > 1 or not (value.factors > 0).all()):
            value = self._single(node, value)
        options = largest_window(self.traced, node)
        return self._mapped(value, lambda source: self._call(label(node), Largest(options), source))

    def _mean(self, node: fx.Node, value: _Wide, detail: Any) -> _Value:
        kernel, stride = pooling_window(self.traced, node)
        area = math.prod(kernel)
        if value.reach.max() * area > INT32_MAX:
            value = self._single(node, value, INT32_MAX / area)
        nodes = tuple(self.graph.call_function(window_sums, (term, kernel, stride)) for term in value.nodes)
        value = replace(value, nodes=nodes, factors=value.factors / area, reach=value.reach * area)
        if len(shape_of(node)) == 2:
            nodes = tuple(self.graph.call_method("flatten", (term, 1)) for term in nodes)
            value = replace(value, nodes=nodes, trailing=0)
        return value

    def _add(self, node: fx.Node, left: _Wide, right: _Wide, detail: Any) -> _Value:
        shapes = [tuple(shape_of(source)) for source in self._sources(node)]
        if shapes[0] != shapes[1]:
            raise impossible(node, f"it adds tensors of shapes {shapes[0]} and {shapes[1]}: they must be equal")
        total = _Wide(
            left.nodes + right.nodes,
            torch.cat((left.factors, right.factors)),
            left.offset + right.offset,
            torch.cat((left.reach, right.reach)),
            left.trailing,
        )
        return self._single(node, total) if len(node.users) > 1 else total

    def _concatenate(self, node: fx.Node, *values: _Wide, detail: Any) -> _Value:
        singles = [self._single(source, value) for source, value in zip(self._sources(node), values, strict=True)]
        found = self.graph.call_function(torch.cat, ([single.nodes[0] for single in singles], 1))
        return _Wide(
            (found,),
            torch.cat([single.factors for single in singles], 1),
            torch.cat([single.offset for single in singles]),
            torch.cat([single.reach for single in singles], 1),
            singles[0].trailing,
        )

    def _scale(self, node: fx.Node, value: _Wide, detail: float) -> _Value:
        return replace(value, factors=value.factors * detail, offset=value.offset * detail)

    def _flatten(self, node: fx.Node, value: _Value, detail: Any) -> _Value:
        pixels = math.prod(shape_of(self._sources(node)[0])[2:])
        value = self._mapped(value, lambda source: self.graph.call_method("flatten", (source, 1)))
        if isinstance(value, _Wide):
            value = replace(
                value,
                factors=value.factors.repeat_interleave(pixels, 1),
                offset=value.offset.repeat_interleave(pixels),
                reach=value.reach.repeat_interleave(pixels, 1),
            )
        return replace(value, trailing=0)

    def _slice(self, node: fx.Node, value: _Value, detail: slice) -> _Value:
        value = self._mapped(value, lambda source: self._copied(node, source))
        if isinstance(value, _Wide):
            factors, reach = value.factors[:, detail], value.reach[:, detail]
            value = replace(value, factors=factors, offset=value.offset[detail], reach=reach)
        return value

    def _widen(self, node: fx.Node, value: _Wide, detail: tuple[int, int]) -> _Value:
        value = self._mapped(value, lambda source: self._copied(node, source))
        return replace(
            value,
            factors=F.pad(value.factors, detail, value=1.0),  # of zeros
            offset=F.pad(value.offset, detail),
            reach=F.pad(value.reach, detail),
        )

    def _border(self, node: fx.Node, value: _Value, detail: Any) -> _Value:
        widths = zero_padding(self.traced, node)
        fill = 0
        if isinstance(value, _Codes):
            fill = int(value.reader.encode(torch.zeros(1)))
        else:
            value = self._single(node, value)
        return self._mapped(value, lambda term: self.graph.call_function(F.pad, (term, widths, "constant", fill)))

    def _output(self, node: fx.Node) -> None:
        source = node.args[0]
        if not isinstance(source, fx.Node):
            raise impossible(node, "the network returns several tensors: return one")
        value = self.values[source]
        if not isinstance(value, _Wide):
            raise impossible(node, "no quantized layer is before it")
        module = Scores(value.factors, value.offset, self.dtype, value.trailing)
        self.graph.output(self._call("scores", module, *value.nodes))

    # --- writing -----------------------------------------------------------------------------------------------------

    def _sources(self, node: fx.Node) -> tuple[fx.Node, ...]:
        return self.operations[node].sources

    def _call(self, name: str, module: nn.Module, *arguments: fx.Node) -> fx.Node:
        while name in self.modules:
            name += "_"
        self.modules[name] = module
        return self.graph.call_module(name, arguments)

    def _mapped(self, value: _Kind, function: Callable[[fx.Node], fx.Node]) -> _Kind:
        """The same function of all integers of a value."""
        if isinstance(value, _Codes):
            return replace(value, node=function(value.node))
        return replace(value, nodes=tuple(function(term) for term in value.nodes))

    def _copied(self, node: fx.Node, source: fx.Node) -> fx.Node:
        """A node again, reading another tensor."""
        if node.op == "call_module":
            return self._call(str(node.target), copy.deepcopy(self.traced.get_submodule(str(node.target))), source)
        read = self._sources(node)[0]
        return self.graph.node_copy(node, lambda old: source if old is read else old)
