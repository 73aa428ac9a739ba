"""PennyLane functions called with symbols in place of features and weights."""

from __future__ import annotations

import inspect
import re
from numbers import Integral
from traceback import walk_tb
from typing import Any

from circuits.circuit import Source
from circuits.interop.naming import is_feature, is_weight
from circuits.interop.symbols import Linear, NotAffine, symbol, symbols

# Errors that arithmetic on symbols meets in code that wants numbers.
NO_NUMBER = (NotAffine, TypeError, ImportError, AttributeError)

Shape = int | tuple[int, ...] | None


class ShapeNeeded(ValueError):
    """A function uses its features or weights as a whole, whose shape it was not told.

    Args:
        message: What to do.
        source: Which of the two.
        n_wires: Wires that it has acted on before.
    """

    def __init__(self, message: str, source: Source, n_wires: int = 0) -> None:
        super().__init__(message)
        self.source, self.n_wires = source, n_wires


class _Unsized:
    """Features or weights of no known shape: a function may ask for each by its index, which is remembered."""

    # PennyLane takes functions of an array from the package of its class; NumPy's ask for what is refused below.
    __module__ = "numpy"

    def __init__(self, source: Source) -> None:
        self._source = source
        self._asked: list[tuple[int, ...]] = []

    def found_shape(self) -> Shape:
        """The smallest shape of several axes that holds what was asked for; None where one index was enough."""
        axes = max(map(len, self._asked), default=0)
        if axes < 2:
            return None
        return tuple(1 + max(own[axis] for own in self._asked if axis < len(own)) for axis in range(axes))

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, tuple) and len(index) == 2 and index[0] is Ellipsis:
            index = index[1]
        if isinstance(index, slice) and index.stop is not None and index.stop >= 0:
            return symbols(self._source, index.stop)[index]
        return self.element(index if isinstance(index, tuple) else (index,))

    def element(self, index: tuple[Any, ...]) -> Any:
        """The element, or row of elements, of an index."""
        if not all(isinstance(k, Integral) and int(k) >= 0 for k in index):
            return self._refuse()
        self._asked.append(tuple(map(int, index)))
        return _Element(self, self._asked[-1], symbol(self._source, int(index[0])))

    def _refuse(self, *others: Any) -> Any:
        raise ShapeNeeded("", self._source)

    __iter__ = __len__ = __add__ = __radd__ = __mul__ = __rmul__ = __sub__ = __rsub__ = __truediv__ = __neg__ = _refuse
    __array__ = __float__ = _refuse
    shape = ndim = size = T = reshape = ravel = flatten = property(_refuse)


class _Element(Linear):
    """What stands at an index of `_Unsized`: a number, unless the function goes on to index it."""

    def __init__(self, whole: _Unsized, index: tuple[int, ...], value: Linear) -> None:
        super().__init__(value.terms)
        self._whole, self._index = whole, index

    def __getitem__(self, index: Any) -> Any:
        return self._whole.element((*self._index, *(index if isinstance(index, tuple) else (index,))))

    def __iter__(self) -> Any:
        # Without it Python would ask for index 0, 1, ... without end.
        return self._whole._refuse()

    __len__ = __iter__


def trace(fn: Any, n_inputs: Shape, n_weights: Shape, n_wires: int) -> tuple[list[Any], list[Any] | None]:
    """The operations that a function queues, and what it returns: None for nothing.

    Args:
        fn: The function; which argument is which, its names say where they are clear, else their order.
        n_inputs: Number of features, or their shape; None where the function asks for each by its index.
        n_weights: Likewise.
        n_wires: Of its device, if known; else 0.

    Raises:
        ShapeNeeded: If it uses features or weights as a whole whose shape was not given.
        ValueError: For what is no function of features and weights, or does not take symbols.
    """
    import pennylane as qml

    if not callable(fn):
        raise ValueError(f"a {type(fn).__name__} is no PennyLane function, QNode or tape")
    if isinstance(fn, type):
        raise ValueError(
            f"{fn.__name__} is an operation, not a function: call it in one, such as def f(inputs, weights): "
            f"qml.AngleEmbedding(inputs, wires=range(4)); qml.{fn.__name__}(weights, wires=range(4))"
        )
    signature = inspect.signature(fn)
    sizes: dict[Source, Shape] = {"input": n_inputs, "weight": n_weights}
    roles = _roles(signature)
    values: dict[str, Any] = {
        name: _Unsized(source) if (size := sizes[source]) is None else symbols(source, size)
        for name, source in roles.items()
    }
    call = inspect.BoundArguments(signature, values)
    with qml.queuing.AnnotatedQueue() as queue:
        try:
            returned = fn(*call.args, **call.kwargs)
        except (*NO_NUMBER, ValueError, IndexError) as error:
            seen = qml.tape.QuantumScript.from_queue(queue).operations
            if isinstance(error, ShapeNeeded):
                wires = n_wires or len({wire for operation in seen for wire in operation.wires})
                raise ShapeNeeded(_whole_text(error.source, sizes, wires), error.source, wires) from None
            raise ValueError(_failure_text(error, seen, sizes)) from error
    # An index of several axes has its place only once the whole shape is known.
    for name, source in roles.items():
        if isinstance(values[name], _Unsized) and (found := values[name].found_shape()) is not None:
            sizes[source] = found
            return trace(fn, sizes["input"], sizes["weight"], n_wires)
    operations = qml.tape.QuantumScript.from_queue(queue).operations
    if returned is None:
        return operations, None
    returned = list(returned) if isinstance(returned, (list, tuple)) else [returned]
    for k, value in enumerate(returned):
        if not isinstance(value, qml.measurements.MeasurementProcess):
            raise ValueError(f"the function returns {value!r} as result {k}: return expectation values, or nothing")
    return operations, returned


def _roles(signature: inspect.Signature) -> dict[str, Source]:
    """What each argument that a function is given stands for."""

    def meant(name: str) -> Source | None:
        return "input" if is_feature(name) else "weight" if is_weight(name) else None

    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    arguments = [p for p in signature.parameters.values() if p.kind not in variadic]
    taken = [p.name for p in arguments if p.default is inspect.Parameter.empty]
    if len(taken) > 2:
        raise ValueError(
            f"the function takes {len(taken)} arguments ({', '.join(taken)}): write it as f(inputs, weights), with all "
            "weights in one array"
        )
    for argument in arguments:
        # Others that have defaults are options, such as a number of layers.
        role = meant(argument.name)
        if argument.name not in taken and len(taken) < 2 and role and role not in map(meant, taken):
            taken.append(argument.name)
    found = [meant(name) for name in taken]
    if len(taken) == 2 and found[0] == found[1] is not None:
        raise ValueError(
            f"the function's arguments {taken[0]} and {taken[1]} are both called like "
            f"{'features' if found[0] == 'input' else 'weights'}: call one inputs and the other weights"
        )
    if found[:1] == ["weight"] or found[1:] == ["input"]:
        return dict(zip(taken, ("weight", "input"), strict=False))
    return dict(zip(taken, ("input", "weight"), strict=False))


def _whole_text(source: Source, sizes: dict[Source, Shape], n_wires: int) -> str:
    inputs, weights = sizes["input"] or 4, sizes["weight"] or (2, n_wires or 4, 3)
    return (
        f"the function uses its {'features' if source == 'input' else 'weights'} as a whole, so their number or shape "
        f"must be known: give both, such as circuits.from_pennylane(function, {inputs}, {weights}) for {inputs} "
        f"features and weights of shape {weights}"
    )


def _failure_text(error: Exception, seen: list[Any], sizes: dict[Source, Shape]) -> str:
    """What went wrong, at which operation, and what angles may be."""
    name = _made_by(error)
    last = f" (the last is {seen[-1].name})" if seen else ""
    where = f"operation {len(seen)} ({name})" if name else f"after {len(seen)} operations{last} it"
    # PennyLane looks for a package with the functions of a symbol.
    missing = re.search(r"function '(\w+)'", str(error)) if isinstance(error, ImportError) else None
    what = f"{type(error).__name__}: {str(error).rstrip('.')}"
    if missing:
        what = f"NotAffine: {missing[1]} of a feature or weight is no such angle"
    shapes = [f"{size} {kind}" for (_, size), kind in zip(sizes.items(), ("features", "weights"), strict=True) if size]
    given = f"; it was given {' and '.join(shapes)}" if shapes else ""
    return (
        f"the function cannot be traced with symbols: {where} raises {what}. Each angle must be scale * (one weight) + "
        f"offset, or a sum of products of features{given}"
    )


def _made_by(error: Exception) -> str:
    """The name of PennyLane's operation that was being made when an error arose; empty for none."""
    from pennylane.operation import Operator

    for frame, _ in walk_tb(error.__traceback__):
        made = frame.f_locals.get("self")
        if isinstance(made, Operator):
            return type(made).__name__
    return ""
