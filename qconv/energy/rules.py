"""What one inference of torch's own modules and functions costs, in the vocabulary of operations."""

import math
from collections import Counter
from collections.abc import Callable
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor, nn

FAMILIES = ("mac", "mul", "add", "cmp", "params", "weight_bits", "units", "activation_bits", "device")
"""What an operation's key may begin with."""

# Costs of elementary functions in multiplications and additions. Horowitz prices neither functions nor divisions, so
# they are counted as the arithmetic that computes them: exp as in Cephes' expf (argument reduction 3 + 3, Horner's
# scheme of degree 5 and reassembly 7 + 7), a reciprocal as two Newton steps y(2 - xy).
_EXP = Counter(mul=10, add=10)
_RECIPROCAL = Counter(mul=4, add=2)
_SIGMOID = _EXP + _RECIPROCAL + Counter(add=1)
_TANH = _SIGMOID + Counter(mul=2, add=1)  # 2 sigmoid(2x) - 1


def number_format(dtype: torch.dtype) -> str:
    """Name a torch dtype in the vocabulary: "fp32", "fp16" (bfloat16 too), "fp64", "int8", ...

    Raises:
        ValueError: for a dtype without a name there, such as a complex one.
    """
    if dtype.is_floating_point:
        return f"fp{8 * dtype.itemsize}"
    if dtype.is_complex:
        raise ValueError(
            f"numbers of {dtype} have no format here: count their real and imaginary parts as real numbers"
        )
    return "binary" if dtype == torch.bool else f"int{8 * dtype.itemsize}"


@singledispatch
def layer_operations(layer: nn.Module, inputs: Tensor, outputs: Tensor) -> Counter[str]:
    """Count what one call of a torch module costs; ``layer_operations.register`` adds a foreign module's class.

    A bias costs no addition: it is where the accumulator starts, so K multiply-accumulates make K products and K sums.
    Batch normalization with running statistics is a scale and a shift for each unit. Windows are counted in full, also
    where they overlap the padding. Nothing is fused: each layer that computes hands on its own output.

    Args:
        layer: the module called.
        inputs: its first input, batch axis included.
        outputs: its output, batch axis included.

    Returns:
        The operations of the whole call, "params" and "weight_bits" included.

    Raises:
        ValueError: for a class that nobody registered.
    """
    kind = type(layer).__name__
    raise ValueError(
        f"the cost of layer {kind} is unknown: give the class a method counts(input_shape) that returns a Counter of "
        "operations, or register a rule for it with qconv.energy.layer_operations.register"
    )


def has_rule(layer: nn.Module) -> bool:
    """Say whether a rule covers what this module runs: a subclass with a forward of its own is another layer."""
    base = next(cls for cls in type(layer).__mro__ if cls in layer_operations.registry)
    return base is not object and type(layer).forward is getattr(base, "forward", None)


def tensor_operations(outputs: Tensor, **single: int) -> Counter[str]:
    """Count so many single operations (mul, add, cmp) on the format of a tensor, and the handing on of that tensor."""
    number = number_format(outputs.dtype)
    units = outputs.numel()
    found = Counter({f"{name}:{number}": amount for name, amount in single.items()})
    found.update({"units": units, "activation_bits": units * 8 * outputs.dtype.itemsize})
    return +found


def stored(*tensors: Tensor | None) -> Counter[str]:
    """Count numbers kept for inference and the bits they take."""
    found: Counter[str] = Counter()
    for tensor in tensors:
        if tensor is not None:
            found.update(params=tensor.numel(), weight_bits=tensor.numel() * 8 * tensor.dtype.itemsize)
    return found


def _each(cost: Counter[str], times: int) -> dict[str, int]:
    return {name: amount * times for name, amount in cost.items()}


def _area(size: int | tuple[int, ...], dimensions: int) -> int:
    return size**dimensions if isinstance(size, int) else math.prod(size)


def _softmax(outputs: Tensor, dim: int) -> Counter[str]:
    length = outputs.shape[dim]
    rows = outputs.numel() // length
    # The largest value is subtracted first, as every implementation does against overflow.
    cost = _EXP + Counter(mul=1, add=1)
    one_row = Counter(_each(cost, length)) + _RECIPROCAL + Counter(add=length - 1, cmp=length - 1)
    return tensor_operations(outputs, **_each(one_row, rows))


def _max_pool(outputs: Tensor, window: int) -> Counter[str]:
    return tensor_operations(outputs, cmp=(window - 1) * outputs.numel())


def _average(inputs_read: int, outputs: Tensor) -> Counter[str]:
    return tensor_operations(outputs, add=inputs_read - outputs.numel(), mul=outputs.numel())


def _adaptive_average(inputs: Tensor, outputs: Tensor, dimensions: int) -> Counter[str]:
    # Adaptive windows overlap where the sizes do not divide: add up how many values each one reads.
    read = math.prod(outputs.shape[:-dimensions])
    for full, pooled in zip(inputs.shape[-dimensions:], outputs.shape[-dimensions:], strict=True):
        read *= sum(-(-(i + 1) * full // pooled) - i * full // pooled for i in range(pooled))
    return _average(read, outputs)


@layer_operations.register(nn.Conv1d)
@layer_operations.register(nn.Conv2d)
@layer_operations.register(nn.Conv3d)
def _conv(layer: nn.Conv2d, inputs: Tensor, outputs: Tensor) -> Counter[str]:
    fan_in = layer.in_channels // layer.groups * math.prod(layer.kernel_size)
    return _weighted(layer.weight, layer.bias, inputs, outputs, fan_in)


@layer_operations.register
def _linear(layer: nn.Linear, inputs: Tensor, outputs: Tensor) -> Counter[str]:
    return _weighted(layer.weight, layer.bias, inputs, outputs, layer.in_features)


def _weighted(weight: Tensor, bias: Tensor | None, inputs: Tensor, outputs: Tensor, fan_in: int) -> Counter[str]:
    key = f"mac:{number_format(weight.dtype)}*{number_format(inputs.dtype)}"
    macs = Counter({key: outputs.numel() * fan_in})
    return macs + tensor_operations(outputs) + stored(weight, bias)


@layer_operations.register(nn.BatchNorm1d)
@layer_operations.register(nn.BatchNorm2d)
def _batch_norm(layer: nn.BatchNorm2d, inputs: Tensor, outputs: Tensor) -> Counter[str]:
    if layer.running_mean is None:
        raise ValueError(
            f"{type(layer).__name__} keeps no running statistics (track_running_stats=False), so what it computes in "
            "evaluation depends on the batch and has no cost for one sample: use track_running_stats=True"
        )
    units = outputs.numel()
    # Mean, variance, weight and bias fold into one scale and one shift for each channel.
    return tensor_operations(outputs, mul=units, add=units) + stored(layer.running_mean, layer.running_mean)


@layer_operations.register
def _relu(layer: nn.ReLU, inputs: Tensor, outputs: Tensor) -> Counter[str]:
    return tensor_operations(outputs, cmp=outputs.numel())


@layer_operations.register
def _hardtanh(layer: nn.Hardtanh, inputs: Tensor, outputs: Tensor) -> Counter[str]:  # ReLU6 is one of these
    return tensor_operations(outputs, cmp=2 * outputs.numel())


@layer_operations.register
def _leaky_relu(layer: nn.LeakyReLU, inputs: Tensor, outputs: Tensor) -> Counter[str]:
    return tensor_operations(outputs, cmp=outputs.numel(), mul=outputs.numel())


@layer_operations.register
def _sigmoid(layer: nn.Sigmoid, inputs: Tensor, outputs: Tensor) -> Counter[str]:
    return tensor_operations(outputs, **_each(_SIGMOID, outputs.numel()))


@layer_operations.register
def _tanh(layer: nn.Tanh, inputs: Tensor, outputs: Tensor) -> Counter[str]:
    return tensor_operations(outputs, **_each(_TANH, outputs.numel()))


@layer_operations.register
def _softmax_layer(layer: nn.Softmax, inputs: Tensor, outputs: Tensor) -> Counter[str]:
    return _softmax(outputs, -1 if layer.dim is None else layer.dim)


@layer_operations.register(nn.MaxPool1d)
@layer_operations.register(nn.MaxPool2d)
def _max_pool_layer(layer: nn.MaxPool2d, inputs: Tensor, outputs: Tensor) -> Counter[str]:
    return _max_pool(outputs, _area(layer.kernel_size, 1 if isinstance(layer, nn.MaxPool1d) else 2))


@layer_operations.register(nn.AvgPool1d)
@layer_operations.register(nn.AvgPool2d)
def _avg_pool_layer(layer: nn.AvgPool2d, inputs: Tensor, outputs: Tensor) -> Counter[str]:
    window = _area(layer.kernel_size, 1 if isinstance(layer, nn.AvgPool1d) else 2)
    return _average(outputs.numel() * window, outputs)


@layer_operations.register(nn.AdaptiveAvgPool1d)
@layer_operations.register(nn.AdaptiveAvgPool2d)
def _adaptive_avg_pool_layer(layer: nn.AdaptiveAvgPool2d, inputs: Tensor, outputs: Tensor) -> Counter[str]:
    return _adaptive_average(inputs, outputs, 1 if isinstance(layer, nn.AdaptiveAvgPool1d) else 2)


@layer_operations.register(nn.Flatten)
@layer_operations.register(nn.Unflatten)
@layer_operations.register(nn.Dropout)
@layer_operations.register(nn.Dropout2d)
@layer_operations.register(nn.Identity)
@layer_operations.register(nn.ZeroPad2d)
def _no_arithmetic(layer: nn.Module, inputs: Tensor, outputs: Tensor) -> Counter[str]:
    return Counter()


# Functions called between layers (residual sums, F.relu, pooling): from aten's name to a rule (arguments, outputs).
# Arguments are aten's, and the first is the input tensor.
_Rule = Callable[[Any, Tensor], Counter[str]]


def _unitwise(**cost: int) -> _Rule:
    return lambda args, outputs: tensor_operations(outputs, **_each(Counter(cost), outputs.numel()))


def _divide(args: Any, outputs: Tensor) -> Counter[str]:
    by_number = not isinstance(args[1], Tensor) or args[1].numel() == 1  # its reciprocal is known once for all
    return _unitwise(**(Counter(mul=1) if by_number else _RECIPROCAL + Counter(mul=1)))(args, outputs)


def _reduction(name: str) -> _Rule:
    return lambda args, outputs: tensor_operations(outputs, **{name: args[0].numel() - outputs.numel()})


_FUNCTIONS: dict[str, _Rule] = {
    "add": _unitwise(add=1),
    "sub": _unitwise(add=1),
    "rsub": _unitwise(add=1),
    "mul": _unitwise(mul=1),
    "div": _divide,
    "relu": _unitwise(cmp=1),
    "maximum": _unitwise(cmp=1),
    "minimum": _unitwise(cmp=1),
    "hardtanh": _unitwise(cmp=2),
    "leaky_relu": _unitwise(cmp=1, mul=1),
    "sigmoid": _unitwise(**_SIGMOID),
    "tanh": _unitwise(**_TANH),
    "_softmax": lambda args, outputs: _softmax(outputs, args[1]),
    "sum": _reduction("add"),
    "amax": _reduction("cmp"),
    "mean": lambda args, outputs: _average(args[0].numel(), outputs),
    "max_pool2d_with_indices": lambda args, outputs: _max_pool(outputs, math.prod(args[1])),
    "avg_pool2d": lambda args, outputs: _average(outputs.numel() * math.prod(args[1]), outputs),
    "_adaptive_avg_pool2d": lambda args, outputs: _adaptive_average(args[0], outputs, 2),
}

# Moving values, changing a sign or making a constant is no arithmetic. Views are free too, whatever their name.
_FREE = {
    *("clone", "copy", "cat", "stack", "roll", "flip", "neg", "im2col", "index", "index_select"),
    *("constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "replication_pad1d", "replication_pad2d"),
    *("_unsafe_view", "_to_copy", "contiguous", "lift_fresh", "empty", "zeros", "ones", "full", "arange"),
    *("zeros_like", "ones_like", "full_like", "empty_like", "scalar_tensor", "empty_strided"),
}


def function_operations(function: Any, args: Any, outputs: Any) -> Counter[str]:
    """Count what one aten function costs.

    Args:
        function: the operator (a torch.ops overload).
        args: its positional arguments.
        outputs: its result.

    Raises:
        ValueError: for a function whose cost is not known.
    """
    name = function.overloadpacket.__name__
    name = name if name.startswith("__") else name.rstrip("_")  # add_ is add, in place
    if function.is_view or name in _FREE:
        return Counter()
    if name not in _FUNCTIONS:
        raise ValueError(
            f"the cost of the function {function.name()} is unknown: call it inside a module with a method "
            "counts(input_shape) that returns a Counter of operations"
        )
    return _FUNCTIONS[name](args, outputs[0] if isinstance(outputs, tuple) else outputs)
