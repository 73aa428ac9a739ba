"""Counting what one inference of a model costs: one row for each layer, in execution order."""

import copy
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from circuits.naming import unknown
from qconv.energy.rules import FAMILIES, function_operations, has_rule, layer_operations, stored

_BOPS: dict[str, Callable[[int, int, float], float]] = {
    "uniq": lambda w, a, fan_in: a * w + a + w + math.log2(fan_in),
    "seed": lambda w, a, fan_in: a * w + a,
    "simple": lambda w, a, fan_in: a * w,
}


def format_bits(number: str) -> int:
    """Bits of one number in a format: 32 for "fp32", 4 for "int4", 2 for "ternary", 1 for "binary".

    Raises:
        ValueError: for a name that is not a format.
    """
    if number in ("ternary", "binary"):
        return 2 if number == "ternary" else 1
    match = re.fullmatch(r"(?:fp|int)([1-9]\d*)", number)
    if match is None:
        raise ValueError(
            f'"{number}" is no number format: use fp16, fp32, fp64, intN (int8, int4, ...), ternary or binary'
        )
    return int(match[1])


@dataclass(frozen=True)
class Row:
    """What one call of one layer costs; shapes are without the batch axis.

    `zero_macs` holds those of the operations' multiply-accumulates whose weight is 0, under the same keys.
    """

    name: str
    kind: str
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    operations: Counter[str]
    zero_macs: Counter[str] = field(default_factory=Counter)

    def macs(self) -> Counter[str]:
        """Multiply-accumulates by format, "weights*activations"."""
        return _by_format(self.operations)

    def bops(self, kind: str = "uniq", *, skip_zeros: bool = False) -> float:
        """Bit operations of this row's multiply-accumulates; see :meth:`Counts.bops`."""
        if kind not in _BOPS:
            raise unknown("way to count bit operations", kind, _BOPS)
        macs = self.macs()
        skipped = _by_format(self.zero_macs) if skip_zeros else Counter[str]()
        fan_in = max(1.0, macs.total() / max(1, self.operations["units"]))
        bits = {pair: [format_bits(number) for number in pair.split("*")] for pair in macs}
        return sum(
            n * _BOPS[kind](bits[pair][0], bits[pair][1], fan_in) - skipped[pair] * math.prod(bits[pair])
            for pair, n in macs.items()
        )


@dataclass(frozen=True)
class Counts:
    """What one inference of a model costs, a row for each call of a layer in execution order.

    A layer that runs twice has two rows; its weights are counted in the first only.
    """

    rows: tuple[Row, ...]

    @property
    def operations(self) -> Counter[str]:
        """All operations of all rows."""
        return sum((row.operations for row in self.rows), Counter[str]())

    def total(self, key: str) -> int:
        """Add up one kind of operation, or all that begin with it.

        Args:
            key: a whole key ("params", "mac:int8*int8") or its beginning up to ":" or "*" ("mac", "mac:int8", "add").

        Raises:
            ValueError: for a key outside the vocabulary.
        """
        _check_key(key)
        return sum(n for k, n in self.operations.items() if k == key or k.startswith((f"{key}:", f"{key}*")))

    def macs(self) -> Counter[str]:
        """Multiply-accumulates by format: ``Counter({"int8*int8": 230400})``, weights first."""
        return sum((row.macs() for row in self.rows), Counter[str]())

    def bops(self, kind: str = "uniq", *, skip_zeros: bool = False) -> float:
        """Bit operations of all multiply-accumulates with b_w-bit weights and b_a-bit activations.

        Args:
            kind: what one multiply-accumulate of a layer with n inputs an output (channels a group times k^2) costs:
                "uniq" b_a b_w + b_a + b_w + log2(n), that is a product and a sum in an accumulator wide enough;
                "seed" b_a b_w + b_a; "simple" b_a b_w.
            skip_zeros: whether a weight of 0 costs no product; sums are counted as before. With a fraction f of weights
                pruned, "uniq" is (1 - f) b_a b_w + b_a + b_w + log2(n).

        Raises:
            ValueError: for another kind.

        Source:
            "uniq": Baskin et al., UNIQ, arXiv:1804.10969, section 4.2. "simple": van Baalen et al., Bayesian Bits,
            arXiv:2005.07093; Yao et al., HAWQ-V3, arXiv:2011.10680. "seed": UNIQ's without weight and log terms.
            skip_zeros: Hawks et al., Ps and Qs, arXiv:2102.11289, equation 8.
        """
        return sum(row.bops(kind, skip_zeros=skip_zeros) for row in self.rows)

    def skipping_zeros(self) -> "Counts":
        """The same without the multiply-accumulates whose weight is 0: hardware that passes over them.

        Neither finding the weights that are not 0 nor storing where they are is counted.
        """
        return Counts(
            tuple(replace(row, operations=+(row.operations - row.zero_macs), zero_macs=Counter()) for row in self.rows)
        )

    @property
    def params(self) -> int:
        """Numbers stored for inference."""
        return self.total("params")

    @property
    def weight_bytes(self) -> int:
        """Bytes of the stored numbers, rounded up once for the whole model."""
        return -(-self.total("weight_bits") // 8)

    @property
    def activation_bytes(self) -> int:
        """Bytes of all values that layers hand on, rounded up once."""
        return -(-self.total("activation_bits") // 8)

    def __str__(self) -> str:
        head = ("layer", "kind", "input", "output", "MACs", "other ops", "params", "weight B", "activation B")
        lines: list[tuple[str, ...]] = [head]
        total = Row("total", "", (), (), self.operations)
        for row in (*self.rows, total):
            ops = row.operations
            numbers = (
                row.macs().total(),
                sum(n for key, n in ops.items() if key.startswith(("mul:", "add:", "cmp:"))),
                ops["params"],
                -(-ops["weight_bits"] // 8),
                -(-ops["activation_bits"] // 8),
            )
            shapes = ("x".join(map(str, shape)) for shape in (row.input_shape, row.output_shape))
            lines.append((row.name or "(model)", row.kind, *shapes, *(f"{n:,}" for n in numbers)))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = [
            "  ".join(
                cell.ljust(w) if i < 4 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
            )
            for line in lines
        ]
        text += [f"{n:,} {key}" for key, n in sorted(self.operations.items()) if key.startswith(("mac:", "device:"))]
        return "\n".join(line.rstrip() for line in text)


def count(model: nn.Module, input_size: Sequence[int]) -> Counts:
    """Count what one inference of a model costs.

    One mid-gray sample runs through a copy of the model in evaluation mode: the model, its buffers, its training flags
    and the global random state stay as they are. A layer with a method ``counts(input_shape)`` is asked what one sample
    costs; torch's own modules, and functions called between layers, follow the rules of ``qconv.energy.rules``.

    Args:
        model: any torch module; on the meta device nothing is computed.
        input_size: shape of one sample without the batch axis, e.g. (1, 28, 28).

    Raises:
        ValueError: for a layer or function whose cost is unknown, or an input that the model cannot take.
    """
    size = tuple(input_size)
    if not size or any(not isinstance(n, int) or n < 1 for n in size):
        raise ValueError(f"input_size is the shape of one sample, positive integers such as (1, 28, 28), not {size}")
    twin = _private_copy(model)
    tensors = [*twin.parameters(), *twin.buffers()]
    floating = next((t for t in tensors if t.is_floating_point()), torch.empty(0))
    # Gray rather than black: amplitude encodings cannot normalize a patch of zeros.
    sample = torch.full((1, *size), 0.5, dtype=floating.dtype, device=floating.device)
    recorder = _Recorder(twin)
    devices = {t.device.index or 0 for t in tensors if t.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(devices)), torch.no_grad(), recorder:
        try:
            twin(sample)
        except RuntimeError as error:
            raise ValueError(f"the model cannot run on one sample of shape {size}: {error}") from error
    return Counts(tuple(recorder.rows))


def _by_format(operations: Counter[str]) -> Counter[str]:
    pairs = ((key.split(":", 1), amount) for key, amount in operations.items())
    return Counter({rest[0]: amount for (family, *rest), amount in pairs if family == "mac"})


def _macs_at_zeros(layer: nn.Module, operations: Counter[str]) -> Counter[str]:
    """Multiply-accumulates whose weight is 0. In these layers each weight meets as many inputs as any other."""
    if not isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear) or layer.weight.is_meta:
        return Counter()
    quantized: Callable[[], Tensor] | None = getattr(layer, "quantized_weight", None)
    weight = layer.weight if quantized is None else quantized()
    zeros = weight.numel() - int(torch.count_nonzero(weight))
    macs = {key: n * zeros // weight.numel() for key, n in operations.items() if key.startswith("mac:")}
    return +Counter(macs)


def _private_copy(model: nn.Module) -> nn.Module:
    # Computed attributes (torch.nn.utils.prune keeps weights so) carry a graph, which deepcopy refuses.
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(model, memo).eval()


def _check_key(key: str) -> None:
    if key.split(":", 1)[0] not in FAMILIES:
        raise unknown("kind of operation", key, FAMILIES)


def _first_tensor(values: Any) -> Tensor | None:
    if isinstance(values, Tensor):
        return values
    items = values.values() if isinstance(values, dict) else values if isinstance(values, list | tuple) else ()
    return next((found for item in items if (found := _first_tensor(item)) is not None), None)


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes a row for each layer called, and for each function that computes outside of any layer."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.rows: list[Row] = []
        self._inside = 0  # layers entered and not yet left: only the outermost is counted
        self._path: list[str] = []  # containers entered
        self._stored: set[int] = set()
        self._watched: set[int] = set()
        self._watch("", model)

    def _watch(self, name: str, module: nn.Module) -> None:
        if id(module) in self._watched:  # reached twice: its first name stays
            return
        self._watched.add(id(module))
        children = list(module.named_children())
        known = callable(getattr(module, "counts", None)) or has_rule(module)
        if known or not (children or isinstance(module, nn.Sequential)):
            module.register_forward_pre_hook(lambda *_: self._enter_layer(), prepend=True)
            module.register_forward_hook(
                lambda layer, args, kwargs, outputs: self._leave_layer(name, layer, (args, kwargs), outputs),
                with_kwargs=True,
            )
            return
        module.register_forward_pre_hook(lambda container, _: self._enter_container(name, container), prepend=True)
        module.register_forward_hook(lambda *_: self._leave_container())
        for child_name, child in children:
            self._watch(f"{name}.{child_name}".lstrip("."), child)

    def _enter_layer(self) -> None:
        self._inside += 1

    def _leave_layer(self, name: str, layer: nn.Module, arguments: Any, results: Any) -> None:
        if self._inside == 1:
            inputs, outputs = _first_tensor(arguments), _first_tensor(results)
            kind = type(layer).__name__
            where = f'layer "{name}" ({kind})' if name else f"layer {kind}"
            if inputs is None or outputs is None:
                raise ValueError(f"{where} takes or gives no tensor: nothing can be counted")
            operations = self._ask(where, layer, inputs, outputs)
            self._forget_known_weights(layer, operations)
            self._add(name, kind, inputs, outputs, operations, _macs_at_zeros(layer, operations))
        self._inside -= 1

    def _ask(self, where: str, layer: nn.Module, inputs: Tensor, outputs: Tensor) -> Counter[str]:
        counts: Callable[[tuple[int, ...]], Counter[str]] | None = getattr(layer, "counts", None)
        if counts is None:
            rule = layer_operations if has_rule(layer) else layer_operations.dispatch(object)
            try:
                return rule(layer, inputs, outputs)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
        # Models that fold patches into the batch axis call a layer several times a sample.
        calls = inputs.shape[0]
        found = Counter(
            {
                key: n if key in ("params", "weight_bits") else n * calls
                for key, n in counts(tuple(inputs.shape[1:])).items()
            }
        )
        for key, amount in found.items():
            _check_key(key)
            if amount < 0:
                raise ValueError(f"{where} counts {amount} of {key}: amounts are zero or more")
        return +found

    def _forget_known_weights(self, layer: nn.Module, operations: Counter[str]) -> None:
        keys = {id(parameter) for parameter in layer.parameters()} or {id(layer)}
        if keys <= self._stored:
            del operations["params"], operations["weight_bits"]
        self._stored |= keys

    def _enter_container(self, name: str, container: nn.Module) -> None:
        own = [p for p in container.parameters(recurse=False) if id(p) not in self._stored]
        if own and not self._inside:
            self._stored.update(map(id, own))
            self.rows.append(Row(name, type(container).__name__, (), (), stored(*own)))
        self._path.append(name)

    def _leave_container(self) -> None:
        self._path.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        if not self._inside:
            where = self._path[-1] if self._path else ""
            try:
                operations = function_operations(func, args, results)
            except ValueError as error:
                raise ValueError(f'in "{where}": {error}' if where else str(error)) from None
            if operations:
                name = func.overloadpacket.__name__.strip("_")
                inputs, outputs = _first_tensor(args), _first_tensor(results)
                self._add(f"{where}.{name}".lstrip("."), "function", inputs, outputs, operations)
        return results

    def _add(
        self,
        name: str,
        kind: str,
        inputs: Tensor | None,
        outputs: Tensor | None,
        operations: Counter[str],
        zero_macs: Counter[str] | None = None,
    ) -> None:
        source, result = (() if tensor is None else tuple(tensor.shape[1:]) for tensor in (inputs, outputs))
        self.rows.append(Row(name, kind, source, result, operations, zero_macs or Counter()))
