"""Which channels of a network must be rescaled together.

A channel of a tensor may be divided by any s > 0 if everything that writes it divides its weights and biases by s, and
everything that reads it multiplies its weights by s: all in between is homogeneous. Each such set of channels is one
variable. Additions tie the channels of their operands; concatenations and slices keep each channel's own variable.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import fx, nn

from classical.data_free.graph import Layer, label, operation

Ids = NDArray[np.int64]


class Value(NamedTuple):
    """A tensor's channels.

    Attributes:
        ids: variable of each channel.
        form: "image" (batch, channels, pixels), "flat" (batch, features: one for each channel, or for each channel and
            pixel), "last" (any axes, the channels last).
    """

    ids: Ids
    form: str


class Group(NamedTuple):
    """Tensors whose channels are tied.

    Attributes:
        writers: names of the layers that write them.
        readers: names of the layers that read them.
        variables: the variables of their channels.
    """

    writers: tuple[str, ...]
    readers: tuple[str, ...]
    variables: Ids


class Flow:
    """The variables of a traced network.

    Attributes:
        layers: name -> module.
        written: name of a layer -> variable of each output channel.
        read: name of a layer -> variable of each input channel; of each channel before flattening, if it was flattened.
        clips: name of a ChannelClip -> what it clips.
        reasons: variable -> why it cannot be rescaled; all others can.
        groups: the sets of tied tensors.
    """

    def __init__(self, model: fx.GraphModule) -> None:
        self.layers: dict[str, Layer] = {}
        self.written: dict[str, Ids] = {}
        self.read: dict[str, Ids] = {}
        self.clips: dict[str, Value] = {}
        self.reasons: dict[int, str] = {}
        self._parents: list[int] = []
        self._values: dict[fx.Node, Value | None] = {}
        for node in model.graph.nodes:
            self._values[node] = self._step(model, node)
        self._check_shared_weights()
        self._number()
        self.groups = self._grouped()

    @property
    def n_variables(self) -> int:
        """How many variables there are."""
        return len(self._parents)

    def free(self) -> NDArray[np.bool_]:
        """Whether each variable may be rescaled."""
        found = np.ones(self.n_variables, dtype=bool)
        found[list(self.reasons)] = False
        return found

    # --- walking the graph ---

    def _step(self, model: fx.GraphModule, node: fx.Node) -> Value | None:
        """The channels of a node's output, None where it is no tensor of known channels."""
        kind, sources, detail = operation(model, node)
        values = [self._values[source] for source in sources]
        name, first = str(node.target), values[0] if values else None
        if kind == "layer":
            return self._layer(name, detail, first)
        if kind == "shape":
            return None
        known = [value for value in values if value is not None]
        alike = len(known) == len(values) and len({value.form for value in known}) == 1
        if alike and known:
            value = known[0]
            if kind in ("relu", "leaky", "same", "scale"):
                return value
            if kind == "clip":
                self.clips[name] = value
                return value
            if kind in ("max", "mean", "border") and value.form == "image":
                return value
            if (kind == "squeeze" and value.form == "image") or (kind == "flatten" and value.form != "last"):
                return Value(value.ids, "flat")
            if kind == "slice" and value.form == "image":
                return Value(value.ids[detail], "image")
            if kind == "widen" and value.form == "image":
                ids = np.concatenate([self._fresh(detail[0]), value.ids, self._fresh(detail[1])])
                return Value(ids, "image")
            if kind == "concat" and value.form == "image":
                return Value(np.concatenate([value.ids for value in known]), "image")
            if kind == "add" and len(known) == 2 and len(value.ids) == len(known[1].ids):
                self._tie(value.ids, known[1].ids)
                return value
        reason = (
            "it is the network's output"
            if kind == "output"
            else f"read by {detail if kind == 'unknown' else label(node)}"
        )
        self._fix((value.ids for value in known), reason)
        return None

    def _layer(self, name: str, layer: Layer, value: Value | None) -> Value:
        linear = isinstance(layer, nn.Linear)
        size = layer.weight.shape[1] * getattr(layer, "groups", 1)
        if value is not None and not _fits(value, size, linear):
            self._fix([value.ids], f"read by {name} along another axis")
            value = None
        form = "image" if not linear else "last" if value is None else value.form
        ids = self._fresh(size) if value is None else value.ids
        if value is None:
            self._fix([ids], f"{name} reads the network's input, or what no rule covers")
        if name in self.layers:  # called before: both calls have the same weights
            if len(ids) == len(self.read[name]):
                self._tie(self.read[name], ids)
            else:
                self._fix([ids, self.read[name], self.written[name]], f"{name} is called in two ways")
            return Value(self.written[name], form)
        self.layers[name], self.read[name] = layer, ids
        self.written[name] = self._fresh(layer.weight.shape[0])
        return Value(self.written[name], form)

    def _check_shared_weights(self) -> None:
        owners: dict[int, str] = {}
        for name, layer in self.layers.items():
            other = owners.setdefault(id(layer.weight), name)
            if other != name:
                both = [self.written[name], self.read[name], self.written[other], self.read[other]]
                self._fix(both, f"{other} and {name} share their weight")

    # --- union-find ---

    def _fresh(self, n: int) -> Ids:
        first = len(self._parents)
        self._parents.extend(range(first, first + n))
        return np.arange(first, first + n)

    def _root(self, variable: int) -> int:
        while self._parents[variable] != variable:
            self._parents[variable] = self._parents[self._parents[variable]]
            variable = self._parents[variable]
        return variable

    def _tie(self, first: Ids, second: Ids) -> None:
        for a, b in zip(first.tolist(), second.tolist(), strict=True):
            self._parents[self._root(b)] = self._root(a)

    def _fix(self, ids: Iterable[Ids], reason: str) -> None:
        for each in ids:
            for variable in each.tolist():
                self.reasons.setdefault(variable, reason)

    def _number(self) -> None:
        """Number the roots 0, 1, ... and forget the rest."""
        roots, numbers = np.unique([self._root(v) for v in range(len(self._parents))], return_inverse=True)
        self.written = {name: numbers[ids] for name, ids in self.written.items()}
        self.read = {name: numbers[ids] for name, ids in self.read.items()}
        self.clips = {name: Value(numbers[value.ids], value.form) for name, value in self.clips.items()}
        reasons: dict[int, str] = {}
        for variable, reason in self.reasons.items():
            reasons.setdefault(int(numbers[variable]), reason)
        self.reasons = reasons
        self._parents = list(range(len(roots)))

    def _grouped(self) -> list[Group]:
        """Collect variables that share a tensor, in the order of the layers that write them."""
        for ids in (*self.written.values(), *self.read.values()):
            self._tie(np.full(len(ids), ids[0]), ids)
        labels = np.array([self._root(v) for v in range(self.n_variables)], dtype=np.int64)
        writers: dict[int, list[str]] = {}
        readers: dict[int, list[str]] = {}
        for name in self.layers:
            writers.setdefault(int(labels[self.written[name][0]]), []).append(name)
            readers.setdefault(int(labels[self.read[name][0]]), []).append(name)
        order = [*writers, *(key for key in readers if key not in writers)]
        return [
            Group(tuple(writers.get(key, ())), tuple(readers.get(key, ())), np.flatnonzero(labels == key))
            for key in order
        ]


def _fits(value: Value, size: int, linear: bool) -> bool:
    """Whether a layer of so many inputs reads these channels, each alone or spread over its pixels by flattening."""
    if not linear:
        return value.form == "image" and len(value.ids) == size
    return value.form != "image" and (len(value.ids) == size or (value.form == "flat" and size % len(value.ids) == 0))
