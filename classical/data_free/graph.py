"""What torch.fx sees of a network: its nodes by what they do to channels."""

import copy
import math
import operator
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from classical.data_free.clips import ChannelClip
from classical.layers import require_module

Layer = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear
LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


class Operation(NamedTuple):
    """What a node does.

    Attributes:
        kind: "input", "output", "layer", "clip", "relu", "leaky" (other homogeneous functions), "same", "max" and
            "mean" (pooling), "border" (pixels added), "add", "concat", "widen" (channels of zeros added), "slice"
            (channels taken), "scale" (by a positive number), "flatten", "squeeze" (the mean of each channel, without
            its pixels' axes), "shape" (no tensor), or "unknown".
        sources: the nodes of the tensors that it reads.
        detail: module of a layer or clip; (before, after) of "widen"; slice; factor; whether pooling reads beyond the
            border, true for "border" itself; description of what is unknown.
    """

    kind: str
    sources: tuple[fx.Node, ...]
    detail: Any = None


_MODULES: dict[str, tuple[type[nn.Module], ...]] = {
    "relu": (nn.ReLU,),
    "leaky": (nn.LeakyReLU, nn.PReLU),
    "same": (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.Upsample),
    "max": (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d),
    "mean": (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d),
    "border": (nn.ZeroPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d),
}
_FUNCTIONS: dict[str, tuple[Callable[..., Any], ...]] = {
    "relu": (F.relu, torch.relu),
    "same": (F.dropout, F.interpolate),
    "leaky": (F.leaky_relu,),
    "max": (F.max_pool1d, F.max_pool2d, F.adaptive_max_pool2d, torch.max_pool2d),
    "mean": (F.avg_pool1d, F.avg_pool2d, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d),
    "add": (operator.add, operator.iadd, torch.add),
    "concat": (torch.cat, torch.concat),
    "flatten": (torch.flatten, torch.reshape),
}
_METHODS: dict[str, tuple[str, ...]] = {
    "relu": ("relu", "relu_"),
    "same": ("contiguous", "detach", "clone"),
    "add": ("add", "add_"),
    "flatten": ("flatten", "view", "reshape"),
    "shape": ("size", "dim"),
}
_PIXELS = ([2, 3], (2, 3), [-2, -1], (-2, -1), [-1, -2], (-1, -2))


class _Tracer(fx.Tracer):
    """Takes layers and clips as they are, whatever package they come from."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, ChannelClip | Layer) or super().is_leaf_module(m, module_qualified_name)


def traced(model: nn.Module) -> fx.GraphModule:
    """Trace a copy of the model in eval(), every call of ReLU6 a module of its own; the model stays as it is.

    Args:
        model: any module that torch.fx can trace symbolically, or a GraphModule.

    Raises:
        ValueError: torch.fx cannot trace it, a weight is computed from other tensors, or it is no module.
    """
    require_module(model)
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module) or hasattr(module, "weight_orig"):
            raise ValueError(
                f"weight of {name!r} is computed from other tensors: make it plain first, by "
                "torch.nn.utils.parametrize.remove_parametrizations or torch.nn.utils.prune.remove"
            )
    twin = copy.deepcopy(model).eval()
    if not isinstance(twin, fx.GraphModule):
        try:
            twin = fx.GraphModule(twin, _Tracer().trace(twin), type(model).__name__)
        except Exception as error:  # tracing runs the model's own code, which may raise anything
            raise ValueError(
                f"{type(model).__name__} cannot be traced by torch.fx ({error}): its forward must not branch on "
                "values; or pass a GraphModule from a tracer of your own, which takes such modules as they are"
            ) from error
    _own_clips(twin)
    return twin


def layer_at(model: nn.Module, name: str) -> Layer:
    """The convolution or linear layer of this name."""
    return cast(Layer, model.get_submodule(name))


def calls(model: fx.GraphModule) -> dict[str, list[fx.Node]]:
    """Name of each layer of a traced model -> the nodes that it reads, one for each of its calls."""
    found: dict[str, list[fx.Node]] = {}
    for node in model.graph.nodes:
        kind, sources, _ = operation(model, node)
        if kind == "layer":
            found.setdefault(str(node.target), []).append(sources[0])
    return found


def _own_clips(model: fx.GraphModule) -> None:
    """Give each call of ReLU6 its own module, so that bounds can differ between calls."""
    seen: set[str] = set()
    for node in list(model.graph.nodes):
        if node.op == "call_function" and node.target is F.relu6:
            replace_by_module(model, node, nn.ReLU6())
        elif node.op == "call_module":
            module = model.get_submodule(node.target)
            if isinstance(module, nn.Hardtanh | ChannelClip) and node.target in seen:
                replace_by_module(model, node, copy.deepcopy(module))
            seen.add(node.target)
    model.recompile()


def label(node: fx.Node) -> str:
    """What to call a node in a report: a module's name, or the node's own."""
    return str(node.target) if node.op == "call_module" else node.name


def replace_by_module(model: fx.GraphModule, node: fx.Node, module: nn.Module) -> None:
    """Turn a node into the call of a new module on the tensor that it reads first; its name stays."""
    name = _free_name(model, node.name)
    model.add_submodule(name, module.train(model.training))
    read = node.args[0] if node.args else node.kwargs["input"]
    node.op, node.target, node.args, node.kwargs = "call_module", name, (read,), {}


def _free_name(model: nn.Module, wanted: str) -> str:
    taken = set(dir(model))
    return next(name for i in range(len(taken) + 1) if (name := f"{wanted}_{i}" if i else wanted) not in taken)


def operation(model: fx.GraphModule, node: fx.Node) -> Operation:
    """Say what a node of a traced model does to channels."""
    sources = tuple(node.all_input_nodes)
    if node.op in ("placeholder", "output"):
        return Operation("input" if node.op == "placeholder" else "output", sources)
    if node.op == "call_module":
        return _module(str(node.target), model.get_submodule(str(node.target)), sources)
    if node.op in ("call_function", "call_method"):
        return _call(model, node, sources)
    return Operation("unknown", sources, f"tensor {node.target}")


def _module(name: str, module: nn.Module, sources: tuple[fx.Node, ...]) -> Operation:
    if len(sources) == 1:
        if isinstance(module, LAYERS):
            return Operation("layer", sources, module)
        if isinstance(module, ChannelClip):
            return Operation("clip", sources, module)
        if isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) == (1, -1):
            return Operation("flatten", sources)
        kind = next((kind for kind, classes in _MODULES.items() if type(module) in classes), None)
        if kind is not None and not getattr(module, "return_indices", False):
            return Operation(kind, sources, _padded(getattr(module, "padding", kind == "border")))
    return Operation("unknown", sources, f"{type(module).__name__} {name}")


def _padded(padding: Any) -> bool:
    """Whether pooling reads beyond the border."""
    return any(padding) if isinstance(padding, tuple | list) else bool(padding)


def _call(model: fx.GraphModule, node: fx.Node, sources: tuple[fx.Node, ...]) -> Operation:
    table: dict[str, Any] = _FUNCTIONS if node.op == "call_function" else _METHODS
    name = str(getattr(node.target, "__name__", node.target))
    rest, options = node.args[1:], node.kwargs
    kind = next((kind for kind, targets in table.items() if node.target in targets), name)
    if kind == "shape" or (kind == "getattr" and rest[0] in ("shape", "ndim")):
        return Operation("shape", sources)
    tensors = tuple(source for source in sources if operation(model, source).kind != "shape")
    if sources and not tensors:
        return Operation("shape", sources)
    sources, unknown = tensors, Operation("unknown", tensors, name)
    if kind == "concat":
        axis = options.get("dim", rest[0] if rest else 0)
        operands = node.args[0] if node.args else options["tensors"]
        return Operation(kind, tuple(operands)) if axis == 1 else unknown  # type: ignore[arg-type]
    if kind == "add":
        return Operation(kind, sources) if len(sources) == 2 and not options else unknown
    if kind == "flatten":
        return Operation(kind, sources[:1]) if _flattens(name, rest, options) else unknown
    if len(sources) != 1:
        return unknown
    if name == "mean":
        axes = options.get("dim", rest[0] if rest else None)
        kept = options.get("keepdim", rest[1] if len(rest) > 1 else False)
        return Operation("mean" if kept else "squeeze", sources) if axes in _PIXELS else unknown
    if kind in ("max", "mean"):
        places = {"avg_pool1d": 2, "avg_pool2d": 2, "max_pool1d": 2, "max_pool2d": 2}
        at = places.get(name, len(rest))
        padding = options.get("padding", rest[at] if at < len(rest) else 0)
        return unknown if options.get("return_indices") else Operation(kind, sources, _padded(padding))
    if kind in ("relu", "same", "leaky"):
        return Operation(kind, sources)
    if name in ("mul", "truediv") and not options:
        numbers = [arg for arg in node.args if isinstance(arg, int | float) and 0 < arg < math.inf]
        if numbers and (name == "mul" or node.args[1] is numbers[0]):
            return Operation("scale", sources, numbers[0] if name == "mul" else 1 / numbers[0])
    if name == "getitem":
        return _getitem(rest[0], sources) or unknown
    if name == "pad":
        return _padding(node, sources) or unknown
    return unknown


def _flattens(name: str, rest: tuple[Any, ...], options: dict[str, Any]) -> bool:
    if name == "flatten":
        start = options.get("start_dim", rest[0] if rest else 0)
        return bool(start == 1 and options.get("end_dim", rest[1] if len(rest) > 1 else -1) == -1)
    shape = rest[0] if len(rest) == 1 and isinstance(rest[0], tuple | list) else rest
    return len(shape) == 2 and isinstance(shape[1], int) and shape[1] == -1


def _getitem(index: Any, sources: tuple[fx.Node, ...]) -> Operation | None:
    parts = index if isinstance(index, tuple) else (index,)
    if any(not isinstance(part, slice) for part in parts) or parts[0] != slice(None):
        return None
    return Operation("slice", sources, parts[1] if len(parts) > 1 else slice(None))


def _padding(node: fx.Node, sources: tuple[fx.Node, ...]) -> Operation | None:
    options: dict[str, Any] = dict(zip(("pad", "mode", "value"), node.args[1:], strict=False)) | node.kwargs
    widths = options["pad"]
    if options.get("mode", "constant") == "constant" and options.get("value") not in (None, 0, 0.0):
        return None
    if not all(isinstance(width, int) and width >= 0 for width in widths):
        return None
    if len(widths) <= 4:
        return Operation("border", sources, True)
    # The last axis comes first: of an image's six numbers, the last two are channels.
    if len(widths) == 6 and not any(widths[:4]):
        return Operation("widen", sources, tuple(widths[4:]))
    return None
