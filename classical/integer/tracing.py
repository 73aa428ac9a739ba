"""What torch.fx sees of a network of quantized layers."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn import functional as F

from classical.data_free.clips import ChannelClip
from classical.data_free.graph import label
from classical.layers import QuantizedConv2d, QuantizedLinear, require_real
from classical.pruning.masks import private_copy


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        own = (QuantizedConv2d, QuantizedLinear, ChannelClip)
        return isinstance(m, own) or super().is_leaf_module(m, module_qualified_name)


def traced_quantized(model: nn.Module, example: Tensor) -> fx.GraphModule:
    """Trace a copy of a model in eval(), on the CPU; quantized layers are calls, and nodes know their shapes.

    Args:
        model: any module.
        example: a batch of inputs.

    Raises:
        ValueError: torch.fx cannot trace the model, it has no quantized layer, or the example is no real tensor.
    """
    require_real(example)
    twin = private_copy(model).eval().cpu()
    tracer = _Tracer()
    try:
        graph = tracer.trace(twin)
    except Exception as error:  # tracing runs the model's own code, which may raise anything
        raise ValueError(
            f"{type(model).__name__} cannot be traced by torch.fx ({error}): its forward must not branch on values"
        ) from error
    if not any(isinstance(module, QuantizedConv2d | QuantizedLinear) for module in twin.modules()):
        raise ValueError(
            f"{type(model).__name__} has no quantized layers: quantize() turns its layers, calibrate() sets ranges"
        )
    traced = fx.GraphModule(tracer.root, graph)
    with torch.no_grad():
        ShapeProp(traced).propagate(example.detach().cpu())
    return traced


def impossible(node: fx.Node, why: str) -> ValueError:
    """The error that names a node and says why it has no integer form."""
    return ValueError(f"{label(node)!r} cannot run in integers: {why}")


def shape_of(node: fx.Node) -> torch.Size:
    """Shape of a node's tensor, the batch included."""
    shape: torch.Size = node.meta["tensor_meta"].shape
    return shape


def clip_bounds(traced: fx.GraphModule, node: fx.Node) -> tuple[Tensor, Tensor] | None:
    """Bounds, float64 of shape (1,) or (channels,), of a node that clips; None for one that does not."""
    rest = node.args[1:]
    if node.op == "call_module":
        module = traced.get_submodule(str(node.target))
        if isinstance(module, ChannelClip):
            bounds: tuple[Any, ...] = (module.low, module.high)
        elif isinstance(module, nn.Hardtanh):  # of which ReLU6 is one
            bounds = (module.min_val, module.max_val)
        elif isinstance(module, nn.ReLU):
            bounds = (0.0, math.inf)
        else:
            return None
    elif node.target in (F.relu, torch.relu, "relu", "relu_"):
        bounds = (0.0, math.inf)
    elif node.target is F.relu6:
        bounds = (0.0, 6.0)
    elif node.target is F.hardtanh:
        bounds = _arguments(rest, node.kwargs, min_val=-1.0, max_val=1.0)
    elif node.target in (torch.clamp, torch.clip, "clamp", "clamp_", "clip"):
        low, high = _arguments(rest, node.kwargs, min=None, max=None)
        bounds = (-math.inf if low is None else low, math.inf if high is None else high)
    else:
        return None
    if any(isinstance(bound, fx.Node) for bound in bounds):
        return None
    low, high = (torch.as_tensor(bound, dtype=torch.float64).reshape(-1) for bound in bounds)
    return low, high


def _arguments(given: tuple[Any, ...], named: dict[str, Any], **defaults: Any) -> tuple[Any, ...]:
    """Values of a call's arguments in the order of their defaults."""
    found = defaults | dict(zip(defaults, given, strict=False))
    return tuple(named.get(name, value) for name, value in found.items())


def pooling_window(traced: fx.GraphModule, node: fx.Node) -> tuple[tuple[int, int], tuple[int, int]]:
    """Kernel and stride of average pooling, of which a mean over all pixels is a case.

    Raises:
        ValueError: windows that are not all of one size, or reach beyond the border.
    """
    _need_images(node, "average pooling")
    options = _pooling_options(traced, node, nn.AvgPool2d, (F.avg_pool2d,), _AVERAGE)
    if options is None:
        kernel = _equal_windows(node)
        return kernel, kernel
    if any(_pair(options["padding"])) or options["ceil_mode"] or options["divisor_override"]:
        raise impossible(node, "average pooling with padding, ceil_mode or a divisor of its own")
    return _pair(options["kernel_size"]), _pair(options["stride"] or options["kernel_size"])


def largest_window(traced: fx.GraphModule, node: fx.Node) -> dict[str, Any]:
    """Arguments of max pooling as torch.nn.functional.max_pool2d takes them, adaptive pooling included.

    Raises:
        ValueError: windows that are not all of one size.
    """
    _need_images(node, "max pooling")
    options = _pooling_options(traced, node, nn.MaxPool2d, (F.max_pool2d, torch.max_pool2d), _LARGEST)
    return {"kernel_size": _equal_windows(node)} if options is None else options


def zero_padding(traced: fx.GraphModule, node: fx.Node) -> list[int]:
    """Pixels of zeros that a node adds, as torch.nn.functional.pad takes them.

    Raises:
        ValueError: it pads with other values.
    """
    module = traced.get_submodule(str(node.target)) if node.op == "call_module" else None
    if module is not None:
        if not isinstance(module, nn.ZeroPad2d):
            raise impossible(node, f"{type(module).__name__} pads with other than zeros: give the layer a padding_mode")
        return list(module.padding)
    widths, mode, _ = _arguments(node.args[1:], node.kwargs, pad=None, mode="constant", value=0)
    if mode != "constant":
        raise impossible(node, "it pads with other than zeros: give the layer a padding_mode")
    return list(widths)


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


def _need_images(node: fx.Node, what: str) -> None:
    before = tuple(shape_of(node.all_input_nodes[0]))
    if len(before) != 4:
        raise impossible(node, f"{what} of shape {before}: images of 4 axes are needed")


def _equal_windows(node: fx.Node) -> tuple[int, int]:
    """Windows of adaptive pooling, of which one over all pixels is a case.

    Raises:
        ValueError: they are not all of one size.
    """
    before, after = (tuple(shape_of(each)[2:]) for each in (node.all_input_nodes[0], node))
    rows, columns = after or (1, 1)
    if before[0] % rows or before[1] % columns:
        raise impossible(node, f"windows of different sizes: {before} pixels for {(rows, columns)}")
    return before[0] // rows, before[1] // columns


_WINDOW: dict[str, Any] = {"kernel_size": None, "stride": None, "padding": 0}
_AVERAGE = _WINDOW | {"ceil_mode": False, "count_include_pad": True, "divisor_override": None}
_LARGEST = _WINDOW | {"dilation": 1, "ceil_mode": False}


def _pooling_options(
    traced: fx.GraphModule,
    node: fx.Node,
    kind: type[nn.Module],
    functions: tuple[Callable[..., Any], ...],
    defaults: dict[str, Any],
) -> dict[str, Any] | None:
    """Arguments of pooling with windows of its own; None of one over all pixels, or an adaptive one."""
    if node.op == "call_module":
        module = traced.get_submodule(str(node.target))
        return {name: getattr(module, name) for name in defaults} if isinstance(module, kind) else None
    if node.target not in functions:
        return None
    return dict(zip(defaults, _arguments(node.args[1:], node.kwargs, **defaults), strict=True))
