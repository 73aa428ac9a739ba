"""Which channels of a traced network belong together, and which are constant whatever the input.

Every channel (axis 1) of every tensor gets a label. What works on each channel by itself hands labels on, an addition
ties those of its operands, a concatenation joins them, flattening repeats them; convolutions and linear layers begin
new ones. All channels of one label are removed together or not at all. A filter without weights emits its bias; such a
constant is followed through normalizations, activations and pools to the layer that reads it.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from classical.layers import QuantizedConv2d, QuantizedLinear

Layer = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear
_LAYERS = (QuantizedConv2d, QuantizedLinear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

# On each number by itself (in eval(), where dropout does nothing).
_ELEMENTWISE_MODULES = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid, nn.Tanh),
    *(nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.Softplus, nn.Softsign, nn.LogSigmoid, nn.Identity),
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout),
)
_ELEMENTWISE_FUNCTIONS = (
    *(torch.relu, torch.sigmoid, torch.tanh, torch.abs, torch.neg, torch.square, torch.clamp, operator.neg),
    *(F.relu, F.relu6, F.leaky_relu, F.elu, F.selu, F.gelu, F.silu, F.mish, F.sigmoid, F.tanh, F.hardtanh),
    *(F.hardswish, F.hardsigmoid, F.softplus, F.dropout, F.dropout1d, F.dropout2d, F.dropout3d),
)
_ELEMENTWISE_METHODS = ("relu", "relu_", "sigmoid", "tanh", "abs", "neg", "square", "clamp", "contiguous", "clone")
_ARITHMETIC: dict[Any, Callable[[Any, Any], Any]] = {
    **dict.fromkeys((operator.add, operator.iadd, torch.add, "add", "add_"), operator.add),
    **dict.fromkeys((operator.sub, operator.isub, torch.sub, "sub", "sub_"), operator.sub),
    **dict.fromkeys((operator.mul, operator.imul, torch.mul, "mul", "mul_"), operator.mul),
}
_IN_PLACE = ("relu_", "add_", "sub_", "mul_", operator.iadd, operator.isub, operator.imul)

# Over windows or all positions of a channel: a constant stays as it is.
_POOL_MODULES = (
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
    *(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
)
_POOL_FUNCTIONS = (
    *(F.max_pool1d, F.max_pool2d, F.max_pool3d, torch.max_pool1d, torch.max_pool2d, torch.max_pool3d),
    *(F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d),
    *(F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d),
)
_AVERAGE_FUNCTIONS = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)
_AVERAGE_ARGUMENTS = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")


class Channels(NamedTuple):
    """The channels of one tensor.

    Attributes:
        labels: int64, (C,).
        known: bool, (C,): whether the channel is one constant at all positions, for every input.
        value: (C,): that constant; 0 where there is none.
    """

    labels: Tensor
    known: Tensor
    value: Tensor


class Reading(NamedTuple):
    """One convolution or linear layer, as it reads and writes channels.

    Attributes:
        name: its path in the model.
        layer: the module.
        weight: (outputs, inputs, taps), as it runs (quantized, if the layer quantizes).
        source: what it reads, after its activation quantizer.
        foldable: bool, (inputs,): whether the input is a constant that its bias can take over.
        outputs: int64, (outputs,): labels that it writes.
    """

    name: str
    layer: Layer
    weight: Tensor
    source: Channels
    foldable: Tensor
    outputs: Tensor


class ChannelFlow:
    """Labels and constants of all channels of a network.

    Attributes:
        readings: dense layers, which read all channels for each output.
        depthwise: name -> (layer, labels read, labels written) of convolutions of one input channel a group.
        per_channel: name -> (module, labels) of modules with a number for each channel.
        tensors: (name, labels) of every tensor.
        pinned: label -> why it stays.

    Args:
        graph: the traced model, in eval().
        example: its inputs.
        exact: whether zero padding ends a constant; if not, it is taken to go on beyond the border.
    """

    def __init__(self, graph: fx.GraphModule, example: tuple[Any, ...], exact: bool = True) -> None:
        self._exact = exact
        self.readings: list[Reading] = []
        self.depthwise: dict[str, tuple[Layer, Tensor, Tensor]] = {}
        self.per_channel: dict[str, tuple[nn.Module, Tensor]] = {}
        self.tensors: list[tuple[str, Tensor]] = []
        self.pinned: dict[int, str] = {}
        self._parents: list[int] = []
        self._flow: dict[fx.Node, Channels] = {}
        self._joins: list[tuple[fx.Node, Tensor]] = []  # additions and products, and the labels that they tie
        self._graph = graph
        self._calls = Counter(node.target for node in graph.graph.nodes if node.op == "call_module")
        self._readers = Counter(id(p) for m in graph.modules() for p in m._parameters.values())
        read_directly = (node.target for node in graph.graph.nodes if node.op == "get_attr")
        self._readers.update(id(operator.attrgetter(str(target))(graph)) for target in read_directly)
        with torch.no_grad():
            self._shapes = _shapes(graph, example)
            for node in graph.graph.nodes:
                found = self._step(node, self._shapes[node])
                if found is not None:
                    self._flow[node] = found
                    self.tensors.append((str(node.target), found.labels))
        self._number()

    @property
    def size(self) -> int:
        """Number of labels."""
        return len(self._parents)

    def pin(self, labels: Tensor, why: str) -> None:
        """Say that channels stay."""
        for label in labels.tolist():
            self.pinned.setdefault(label, why)

    def partner(self, label: int, name: str) -> str | None:
        """What an addition or product joins a pruned channel with that is not constant; None if there is nothing.

        Args:
            label: of the channel.
            name: the layer that writes it.
        """
        for node, labels in self._joins:
            for place in (labels == label).nonzero().flatten().tolist():
                moving = [source for source in node.all_input_nodes if not self._flow[source].known[place]]
                if len(moving) == 1 and len(node.all_input_nodes) == 2:
                    writer = self._writer(moving[0], place)
                    if writer != repr(name):
                        return f"{_title(node)} joins it with {writer}, which is not pruned there"
        return None

    def _writer(self, node: fx.Node, place: int) -> str:
        """The layer, or whatever else, that makes a channel vary."""
        layers = {reading.name for reading in self.readings} | set(self.depthwise)
        while node.op != "call_module" or node.target not in layers:
            width = len(self._flow[node].labels)
            sources = [s for s in node.all_input_nodes if s in self._flow and len(self._flow[s].labels) == width]
            if not sources:
                break
            node = next((source for source in sources if not self._flow[source].known[place]), sources[0])
        return "an input of the model" if node.op == "placeholder" else _title(node)

    # --- what a node does to channels ---

    def _step(self, node: fx.Node, shape: torch.Size | str) -> Channels | None:
        sources = [self._flow[source] for source in node.all_input_nodes if source in self._flow]
        if node.op == "output":
            self._pin_all(sources, "it is an output of the model")
            return None
        if not isinstance(shape, torch.Size):
            if shape == "tensors":
                self._pin_all(sources, f"{_title(node)} reads it, which no rule covers")
            return None
        made = None
        if not self._overwrites(node):
            if node.op == "call_module":
                made = self._module(str(node.target), sources, shape)
            elif node.op in ("call_function", "call_method"):
                made = self._call(node, sources, shape)
        if made is None or len(shape) < 2:
            where = "it is an input of the model" if node.op == "placeholder" else f"{_title(node)} has no rule"
            self._pin_all(sources, where)
            return self._unknown(shape, where)
        return made

    def _overwrites(self, node: fx.Node) -> bool:
        """Whether a node changes in place what others read too."""
        in_place = node.target in _IN_PLACE or bool(node.kwargs.get("inplace"))
        if node.op == "call_module":
            in_place = bool(getattr(self._graph.get_submodule(str(node.target)), "inplace", False))
        elif node.target in _ELEMENTWISE_FUNCTIONS:
            in_place = in_place or any(arg is True for arg in node.args[1:])
        return in_place and isinstance(node.args[0], fx.Node) and len(node.args[0].users) > 1

    def _module(self, name: str, sources: list[Channels], shape: torch.Size) -> Channels | None:
        module = self._graph.get_submodule(name)
        if len(sources) != 1 or module._forward_hooks or module._forward_pre_hooks:
            return None
        source = sources[0]
        dims = len(shape)
        if type(module) in _ELEMENTWISE_MODULES:
            return _mapped(source, module, dims)
        if type(module) in _POOL_MODULES:
            if getattr(module, "return_indices", False):
                return None
            plain = not isinstance(module, nn.AvgPool1d | nn.AvgPool2d | nn.AvgPool3d) or (
                not _any(module.padding) and getattr(module, "divisor_override", None) is None
            )
            return source if plain else _zeros_only(source)
        if type(module) is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1):
            return _flattened(source, shape)
        if type(module) is nn.PReLU and module.num_parameters == 1:
            return _mapped(source, module, dims)
        if self._calls[name] > 1 or any(self._readers[id(p)] > 1 for p in module.parameters()):
            return None  # one tensor of weights cannot be cut in two ways
        if type(module) is nn.PReLU or (type(module) in _NORMS and module.running_mean is not None):
            self.per_channel[name] = (module, source.labels)
            return _mapped(source, module, dims)
        if _plain_layer(module):
            return self._layer(name, cast(Layer, module), source, shape)
        return None

    def _layer(self, name: str, layer: Layer, source: Channels, shape: torch.Size) -> Channels | None:
        dims = len(shape) - layer.weight.dim()
        if dims != 0 or len(source.labels) != _inputs(layer):  # a linear layer on a sequence reads another axis
            return None
        groups = getattr(layer, "groups", 1)
        if groups > 1 and groups != _inputs(layer):
            return None
        weight = layer.weight
        if isinstance(layer, QuantizedConv2d | QuantizedLinear):
            activation = layer.activation_quantizer
            if activation.patch_scale or not activation.calibrated:
                return None  # the channels share a scale, which depends on all of them
            weight = layer.quantized_weight()
            source = _mapped(source, activation, len(shape))
        padded = getattr(layer, "padding_mode", "") == "zeros" and _any(layer._reversed_padding_repeated_twice)
        foldable = source.known & ((source.value == 0) | (not (padded and self._exact)))
        weight = weight.detach().flatten(2) if weight.dim() > 2 else weight.detach()[:, :, None]
        bias = weight.new_zeros(len(weight)) if layer.bias is None else layer.bias.detach()
        if groups > 1:
            repeats = len(weight) // groups
            labels, fold, value = (part.repeat_interleave(repeats) for part in (source.labels, foldable, source.value))
            taps = weight.flatten(1).sum(1)
            known = (weight == 0).flatten(1).all(1) | fold
            self.depthwise[name] = (layer, source.labels, labels)
            return Channels(labels, known, torch.where(known, bias + taps * torch.where(fold, value, 0), 0))
        used = (weight != 0).any(2)
        known = ~(used & ~foldable).any(1)
        value = bias + weight.sum(2) @ torch.where(foldable, source.value, 0)
        outputs = self._fresh(len(weight))
        self.readings.append(Reading(name, layer, weight, source, foldable, outputs))
        return Channels(outputs, known, torch.where(known, value, 0))

    def _call(self, node: fx.Node, sources: list[Channels], shape: torch.Size) -> Channels | None:
        target, rest = node.target, node.args[1:]
        if target in _ARITHMETIC and len(node.args) == 2 and not node.kwargs:
            return self._arithmetic(_ARITHMETIC[target], node)
        if target in (torch.cat, torch.concat) and isinstance(node.args[0], list | tuple):
            axis = node.kwargs.get("dim", rest[0] if rest else 0)
            if axis in (1, 1 - len(shape)):
                return Channels(*(torch.cat(parts) for parts in zip(*sources, strict=True)))
        first = node.args[0] if node.args else None
        if len(sources) != 1 or not isinstance(first, fx.Node) or first not in self._flow:
            return None
        source, before = sources[0], self._tensor_shape(first)
        if target in (torch.flatten, "flatten"):
            start = node.kwargs.get("start_dim", rest[0] if rest else 0)
            end = node.kwargs.get("end_dim", rest[1] if len(rest) > 1 else -1)
            return _flattened(source, shape) if start == 1 and end == -1 else None
        if target in ("view", "reshape", torch.reshape):
            sizes = rest[0] if len(rest) == 1 and isinstance(rest[0], tuple | list) else rest
            # A number of features that is written out would be wrong for fewer channels.
            open_end = len(sizes) == 2 and (sizes[1] == -1 or isinstance(sizes[1], fx.Node))
            return _flattened(source, shape) if open_end and shape[0] == before[0] and not node.kwargs else None
        if any(isinstance(arg, fx.Node) for arg in (*rest, *node.kwargs.values())):
            return None
        if target in _ELEMENTWISE_FUNCTIONS and node.op == "call_function":
            function = cast(Callable[..., Tensor], target)
            if "dropout" in function.__name__ and node.kwargs.get("training", rest[1] if len(rest) > 1 else True):
                return None
            return _mapped(source, lambda x: function(x, *rest, **node.kwargs), len(shape))
        if target in _ELEMENTWISE_METHODS and node.op == "call_method":
            return _mapped(source, lambda x: getattr(x, str(target))(*rest, **node.kwargs), len(shape))
        if target in _POOL_FUNCTIONS:
            return source
        if target in _AVERAGE_FUNCTIONS:
            options: dict[str, Any] = dict(zip(_AVERAGE_ARGUMENTS, rest, strict=False)) | node.kwargs
            plain = not _any(options.get("padding", 0)) and options.get("divisor_override") is None
            return source if plain else _zeros_only(source)
        if target in (torch.mean, "mean"):
            axes: Any = node.kwargs.get("dim", rest[0] if rest else None)
            axes = (axes,) if isinstance(axes, int) else axes or (0,)
            return source if all(axis % len(before) > 1 for axis in axes) else None
        if target is operator.getitem:
            parts = rest[0] if isinstance(rest[0], tuple) else (rest[0],)
            cut = all(isinstance(part, slice) for part in parts) and parts[:2] in ((slice(None),) * 2, (slice(None),))
            return source if cut else None
        return None

    def _arithmetic(self, function: Callable[[Any, Any], Any], node: fx.Node) -> Channels | None:
        a, b = node.args
        if isinstance(a, fx.Node) and isinstance(b, fx.Node):
            if a not in self._flow or b not in self._flow:
                return None
            x, y = self._flow[a], self._flow[b]
            if len(self._tensor_shape(a)) != len(self._tensor_shape(b)) or len(x.labels) != len(y.labels):
                return None
            self._tie(x.labels, y.labels)
            self._joins.append((node, x.labels))
            known = x.known & y.known
            if function is operator.mul:  # zero times anything
                known = known | (x.known & (x.value == 0)) | (y.known & (y.value == 0))
            return Channels(x.labels, known, torch.where(known, function(x.value, y.value), 0))
        tensor, other = (a, b) if isinstance(a, fx.Node) else (b, a)
        if not isinstance(tensor, fx.Node) or tensor not in self._flow or not isinstance(other, int | float):
            return None
        return _mapped(self._flow[tensor], lambda x: function(x, other) if tensor is a else function(other, x))

    def _tensor_shape(self, node: fx.Node) -> torch.Size:
        return cast(torch.Size, self._shapes[node])

    # --- labels ---

    def _unknown(self, shape: torch.Size, why: str) -> Channels | None:
        if len(shape) < 2:
            return None
        labels = self._fresh(shape[1])
        self.pin(labels, why)
        weights = (p for p in self._graph.parameters() if p.is_floating_point())
        zeros = next(weights, torch.empty(0)).new_zeros(shape[1]).detach()
        return Channels(labels, torch.zeros_like(labels, dtype=torch.bool), zeros)

    def _pin_all(self, sources: Iterable[Channels], why: str) -> None:
        for source in sources:
            self.pin(source.labels, why)

    def _fresh(self, n: int) -> Tensor:
        first = len(self._parents)
        self._parents.extend(range(first, first + n))
        return torch.arange(first, first + n)

    def _root(self, label: int) -> int:
        while self._parents[label] != label:
            self._parents[label] = self._parents[self._parents[label]]
            label = self._parents[label]
        return label

    def _tie(self, first: Tensor, second: Tensor) -> None:
        for a, b in zip(first.tolist(), second.tolist(), strict=True):
            self._parents[self._root(b)] = self._root(a)

    def _number(self) -> None:
        """Number the sets of tied labels 0, 1, ... and use those numbers everywhere."""
        found: dict[int, int] = {}
        roots = (self._root(label) for label in range(len(self._parents)))
        numbers = torch.tensor([found.setdefault(root, len(found)) for root in roots], dtype=torch.long)
        self._parents = list(range(len(found)))
        self.readings = [
            reading._replace(
                source=reading.source._replace(labels=numbers[reading.source.labels]), outputs=numbers[reading.outputs]
            )
            for reading in self.readings
        ]
        self.depthwise = {name: (m, numbers[i], numbers[o]) for name, (m, i, o) in self.depthwise.items()}
        self.per_channel = {name: (module, numbers[labels]) for name, (module, labels) in self.per_channel.items()}
        self.tensors = [(name, numbers[labels]) for name, labels in self.tensors]
        self._joins = [(node, numbers[labels]) for node, labels in self._joins]
        pinned, self.pinned = self.pinned, {}
        for label, why in pinned.items():
            self.pinned.setdefault(int(numbers[label]), why)


def _shapes(graph: fx.GraphModule, example: tuple[Any, ...]) -> dict[fx.Node, torch.Size | str]:
    """Run the model once: each node's shape, "tensors" for what may be a collection of them, "" where there is none."""
    seen: dict[fx.Node, torch.Size | str] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            several = isinstance(result, tuple | list | dict) and not isinstance(result, torch.Size)
            seen[n] = result.shape if isinstance(result, Tensor) else "tensors" if several else ""
            return result

    Recorder(graph).run(*example)
    return seen


def _mapped(source: Channels, function: Callable[[Tensor], Tensor], dims: int = 2) -> Channels:
    """Constants after a function of each number, or channel, by itself."""
    value = function(source.value.clone().view(1, -1, *(1,) * (dims - 2))).flatten()
    return Channels(source.labels, source.known, torch.where(source.known, value, 0))


def _zeros_only(source: Channels) -> Channels:
    """Constants after windows that hold different shares of padding."""
    return source._replace(known=source.known & (source.value == 0))


def _flattened(source: Channels, shape: torch.Size) -> Channels:
    """Channels after all axes but the first became one, channel first."""
    repeats = shape[1] // len(source.labels)
    return Channels(*(part.repeat_interleave(repeats) for part in source))


def _plain_layer(module: nn.Module) -> bool:
    """Whether a module computes what its class among _LAYERS does, from a weight of its own."""
    base = next((base for base in _LAYERS if isinstance(module, base)), None)
    own = (getattr(type(module), name, None) is getattr(base, name, None) for name in ("forward", "_conv_forward"))
    return base is not None and all(own) and not parametrize.is_parametrized(module)


def _inputs(layer: Layer) -> int:
    return layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels


def _any(padding: Any) -> bool:
    return any(padding) if isinstance(padding, tuple | list) else bool(padding)


def _title(node: fx.Node) -> str:
    return repr(node.target) if isinstance(node.target, str) else f"{getattr(node.target, '__name__', node.target)}()"
