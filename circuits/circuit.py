"""Angle, Gate and Circuit: a parametrized quantum circuit as immutable, validated data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from numbers import Real
from operator import index
from typing import TYPE_CHECKING, Any, Literal, get_args, overload

from circuits.drawing import PlainTerms, draw
from circuits.features import Feature, Product, simplest
from circuits.gates import AMPLITUDE, GATES, GateSpec
from circuits.naming import unknown

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from qiskit import QuantumCircuit

Source = Literal["input", "weight", "const"]


def _whole(name: str, value: object) -> int:
    """A whole number as an int; numpy's are welcome, floats, texts and truth values are not."""
    if isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}: give a whole number")
    try:
        return index(value)  # type: ignore[arg-type]
    except TypeError:
        raise ValueError(f"{name} is {value!r}: give a whole number") from None


def _number(name: str, value: object) -> float:
    """A real number as a float; numpy's are welcome, arrays, texts and truth values are not."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(f"{name} is {value!r}: give a real number")
    return float(value)


@dataclass(frozen=True)
class Angle:
    """A gate's angle, `scale * source[index] + offset`, or `scale * computed + offset`, in radians.

    Args:
        source: "input" (a feature of the patch), "weight" (a trainable number) or "const" (the offset alone).
        index: Which feature or weight; 0 for "const".
        scale: Factor on it; the angle encoding uses pi.
        offset: Added to it.
        computed: For source "input", a function of several features or a fixed function of one, in place of a plain
            feature; index is then 0. `computed` builds such angles.

    Raises:
        ValueError: For an unknown source, a negative index, or a number that is not finite.
    """

    source: Source
    index: int
    scale: float = 1.0
    offset: float = 0.0
    computed: Feature | None = None

    def __post_init__(self) -> None:
        if self.source not in get_args(Source):
            raise unknown("angle source", self.source, get_args(Source))
        object.__setattr__(self, "index", _whole("angle index", self.index))
        object.__setattr__(self, "scale", _number("angle scale", self.scale))
        # Added to 0, a negative 0 is 0: equal angles have equal texts.
        object.__setattr__(self, "offset", _number("angle offset", self.offset) + 0.0)
        if self.source == "const" and self.scale != 1:
            raise ValueError(f"constant angle has scale {self.scale}: its value is the offset alone, so give scale 1")
        if self.index < 0 or (self.source == "const" and self.index != 0):
            raise ValueError(
                f"angle of source {self.source!r} has index {self.index}: it must be 0 or, if not const, more"
            )
        if not (abs(self.scale) < float("inf") and abs(self.offset) < float("inf")):
            raise ValueError(f"angle has scale {self.scale} and offset {self.offset}: both must be finite")
        if self.computed is not None and (self.source, self.index) != ("input", 0):
            raise ValueError(
                f"computed angle has source {self.source!r} and index {self.index}: it reads features, so give 'input' "
                "and 0"
            )

    @property
    def reads(self) -> tuple[int, ...]:
        """Indices of the features or weights that it reads."""
        if self.source == "const":
            return ()
        return (self.index,) if self.computed is None else self.computed.indices

    def shifted(self, source: Source, by: int) -> Angle:
        """The angle reading features or weights `by` places further on, if it is of that source."""
        if self.source != source:
            return self
        if self.computed is not None:
            return replace(self, computed=self.computed.shifted(by))
        return replace(self, index=self.index + by)

    def times(self, factor: float) -> Angle:
        """The angle multiplied by a number."""
        if self.source == "const":
            return replace(self, offset=self.offset * factor)
        return replace(self, scale=self.scale * factor, offset=self.offset * factor)

    def text(self) -> str:
        """The angle as written in a circuit's canonical text: exact decimals."""
        if self.source == "const":
            return repr(float(self.offset))
        letter = "x" if self.source == "input" else "w"
        name = f"{letter}[{self.index}]" if self.computed is None else self.computed.text()
        scale = "" if self.scale == 1 else f"{float(self.scale)!r}*"
        offset = "" if self.offset == 0 else f"{float(self.offset):+}"
        # Blanks part the angles of a gate.
        return f"{scale}{name}{offset}".replace(" ", "")


def const(value: float) -> Angle:
    """A fixed angle of `value` radians."""
    return Angle("const", 0, 1.0, float(value))


def computed(terms: Mapping[Product, float], offset: float = 0.0) -> Angle:
    """The angle that is a sum of products of features, such as {(Factor(0), Factor(1)): 2.0} for 2 x_0 x_1.

    Args:
        terms: Coefficient of each product of factors.
        offset: Added to them.
    """
    found = simplest(terms)
    if found is None:
        return const(offset)
    scale, feature = found
    if isinstance(feature, Feature):
        return Angle("input", 0, scale, offset, feature)
    return Angle("input", feature, scale, offset)


@dataclass(frozen=True)
class Gate:
    """A gate on wires, with its angles.

    Args:
        name: A name of the gate table (`circuits.gates.GATES`).
        wires: The wires it acts on; a controlled gate names its control first.
        angles: As many angles as the gate takes; for "Amplitude", the features that become amplitudes.

    Raises:
        ValueError: For an unknown gate, or a wrong number of wires or angles.
    """

    name: str
    wires: tuple[int, ...]
    angles: tuple[Angle, ...] = ()

    def __post_init__(self) -> None:
        if self.name not in GATES:
            raise unknown("gate", self.name, GATES)
        # Lists are welcome; what is stored is hashable.
        object.__setattr__(self, "wires", tuple(_whole("wire", wire) for wire in self.wires))
        object.__setattr__(self, "angles", tuple(self.angles))
        if not all(isinstance(angle, Angle) for angle in self.angles):
            raise ValueError(f"gate {self.name} was given angles {self.angles}: each must be a circuits.Angle")
        if len(set(self.wires)) != len(self.wires):
            raise ValueError(f"gate {self.name} acts on wires {self.wires}: they must differ")
        spec = self.spec
        if spec.n_wires is not None and len(self.wires) != spec.n_wires:
            raise ValueError(f"gate {self.name} acts on {spec.n_wires} wires but was given {self.wires}")
        if spec.n_angles is not None and len(self.angles) != spec.n_angles:
            raise ValueError(f"gate {self.name} takes {spec.n_angles} angles but was given {len(self.angles)}")
        if self.name == AMPLITUDE and not 1 <= len(self.angles) <= 2 ** len(self.wires):
            raise ValueError(
                f"Amplitude on {len(self.wires)} wires holds 1 to {2 ** len(self.wires)} features but was given "
                f"{len(self.angles)}: use more wires"
            )

    @property
    def spec(self) -> GateSpec:
        """The gate's row in the gate table."""
        return GATES[self.name]

    def depends_on(self, source: Source) -> bool:
        """Whether an angle comes from `source`."""
        return any(angle.source == source for angle in self.angles)

    def inverse(self) -> Gate:
        """The gate that undoes this one.

        Raises:
            ValueError: For a state preparation, which has no inverse.
        """
        if self.spec.inverse is None:
            raise ValueError(f"gate {self.name} prepares a state from |0...0> and has no inverse")
        name, order = self.spec.inverse
        return Gate(name, self.wires, tuple(self.angles[k].times(-1.0) for k in order))

    def parts(self) -> tuple[Gate, ...]:
        """Simpler gates, on at most two wires, that make it up but for a global phase; itself where it is simple."""
        if not self.spec.parts:
            return (self,)
        return tuple(
            Gate(name, tuple(self.wires[k] for k in on), tuple(self._part_angle(angle) for angle in angles))
            for name, on, angles in self.spec.parts
        )

    def _part_angle(self, angle: int | float) -> Angle:
        # An index names one of this gate's angles; a float is a number of radians.
        return self.angles[angle] if isinstance(angle, int) else const(angle)

    def text(self) -> str:
        """The gate as one line of a circuit's canonical text."""
        wires = ",".join(map(str, self.wires))
        return " ".join([self.name, wires, *(angle.text() for angle in self.angles)])


def _plain(feature: Feature | None) -> PlainTerms:
    """A feature as tuples, for drawings."""
    terms = () if feature is None else feature.terms
    return tuple((c, tuple((f.index, f.function, f.parameters) for f in product)) for c, product in terms)


@dataclass(frozen=True)
class Circuit:
    """A parametrized quantum circuit with its readout: what a quantum convolution kernel is.

    Immutable and hashable. It starts in |0...0>; wire 0 is the most significant bit.

    Args:
        n_wires: Number of qubits, at least 1.
        gates: The gates in the order of application.
        observables: Pauli strings, wire 0 first ("ZIII"), each an output in [-1, 1]. May be empty for a block that
            is to be concatenated with others.

    Raises:
        ValueError: For a gate outside the wires, a state preparation that is not the first gate on all wires, or
            an observable that is no Pauli string of n_wires letters.
    """

    n_wires: int
    gates: tuple[Gate, ...] = ()
    observables: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        # Lists are welcome; what is stored is hashable.
        object.__setattr__(self, "n_wires", _whole("number of wires", self.n_wires))
        object.__setattr__(self, "gates", tuple(self.gates))
        if isinstance(self.observables, str):
            raise ValueError(f"observables are the text {self.observables!r}: give a tuple, ({self.observables!r},)")
        object.__setattr__(self, "observables", tuple(self.observables))
        if self.n_wires < 1:
            raise ValueError(f"circuit has {self.n_wires} wires: it needs at least 1")
        for position, gate in enumerate(self.gates):
            if any(not 0 <= wire < self.n_wires for wire in gate.wires):
                raise ValueError(
                    f"gate {position} ({gate.name}) acts on wires {gate.wires} but the circuit has wires "
                    f"0 to {self.n_wires - 1}"
                )
            if gate.name == AMPLITUDE and (position != 0 or gate.wires != tuple(range(self.n_wires))):
                raise ValueError(
                    f"gate {position} (Amplitude) acts on wires {gate.wires} of {self.n_wires}: a state preparation "
                    "must be the first gate and act on all wires in order"
                )
        for observable in self.observables:
            if len(observable) != self.n_wires or set(observable) - set("IXYZ") or set(observable) == {"I"}:
                raise ValueError(
                    f"observable {observable!r} does not fit {self.n_wires} wires: it must be {self.n_wires} letters "
                    "of I, X, Y, Z, not all I"
                )

    def _size(self, source: Source) -> int:
        used = (k + 1 for gate in self.gates for a in gate.angles if a.source == source for k in a.reads)
        return max(used, default=0)

    @cached_property
    def n_inputs(self) -> int:
        """Number of features it takes from a patch."""
        return self._size("input")

    @cached_property
    def n_weights(self) -> int:
        """Number of trainable weights."""
        return self._size("weight")

    @cached_property
    def features(self) -> tuple[Feature, ...]:
        """What must be computed from a patch before the circuit runs, each once; empty for plain features."""
        found = (a.computed for gate in self.gates for a in gate.angles)
        return tuple(dict.fromkeys(feature for feature in found if feature is not None))

    def counts(self) -> Counter[str]:
        """Gates by name."""
        return Counter(gate.name for gate in self.gates)

    def depth(self) -> int:
        """Longest chain of gates that must run one after another."""
        level = [0] * self.n_wires
        for gate in self.gates:
            reached = 1 + max(level[wire] for wire in gate.wires)
            for wire in gate.wires:
                level[wire] = reached
        return max(level)

    def text(self) -> str:
        """Canonical text: equal circuits have equal texts, different ones differ."""
        lines = [f"wires {self.n_wires}", *(gate.text() for gate in self.gates)]
        return "\n".join([*lines, " ".join(["observe", *self.observables])]) + "\n"

    @overload
    def draw(
        self, kind: Literal["text", "svg"] = "text", *, width: float = 10.0, columns: int | None = None
    ) -> str: ...
    @overload
    def draw(self, kind: Literal["mpl"], *, width: float = 10.0, columns: int | None = None) -> Figure: ...
    def draw(self, kind: str = "text", *, width: float = 10.0, columns: int | None = None) -> str | Figure:
        """The circuit as a drawing, one line a wire; x are features and w weights.

        Args:
            kind: "text", "mpl" (a matplotlib Figure: `.savefig("circuit.pdf")`) or "svg" (its text).
            width: Of a figure, in inches; what is longer continues in a next row.
            columns: Of text, in characters: as many as a line has room for, such as 80. None for one row.

        Raises:
            ValueError: For an unknown kind, or a width or columns that are not positive.
        """
        gates = [
            (g.name, g.wires, tuple((a.source, a.index, a.scale, a.offset, _plain(a.computed)) for a in g.angles))
            for g in self.gates
        ]
        if kind == "text":
            return draw(self.n_wires, gates, self.observables, columns)
        # matplotlib is loaded only where it draws.
        from circuits.figures import figure, svg

        if kind not in ("mpl", "svg"):
            raise unknown("kind of drawing", kind, ("text", "mpl", "svg"))
        return (figure if kind == "mpl" else svg)(self.n_wires, gates, self.observables, width)

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return f'<div style="overflow-x: auto">{self.draw("svg")}</div>'

    def to_pennylane(self) -> Callable[..., list[Any]]:
        """The circuit as a PennyLane quantum function f(inputs, weights); see `circuits.interop.to_pennylane`."""
        from circuits.interop.pennylane import to_pennylane

        return to_pennylane(self)

    def to_qiskit(self) -> QuantumCircuit:
        """The circuit as a QuantumCircuit with ParameterVectors x and w; see `circuits.interop.to_qiskit`."""
        from circuits.interop.qiskit import to_qiskit

        return to_qiskit(self)

    def to_qasm3(self) -> str:
        """The circuit as OpenQASM 3 with inputs x_0, ... and w_0, ...; see `circuits.interop.to_qasm3`."""
        from circuits.interop.qasm3 import to_qasm3

        return to_qasm3(self)

    def __add__(self, other: Circuit) -> Circuit:
        """Both circuits one after the other, literally: index i names the same feature or weight in both.

        The readout is that of the second circuit, or of the first where the second has none. To give the second
        one weights of its own, see `shift_weights`.
        """
        if not isinstance(other, Circuit):
            return NotImplemented
        if self.n_wires != other.n_wires:
            raise ValueError(
                f"cannot concatenate circuits of {self.n_wires} and {other.n_wires} wires: make them equal"
            )
        return Circuit(self.n_wires, self.gates + other.gates, other.observables or self.observables)

    def shift_weights(self, by: int) -> Circuit:
        """The same circuit reading its weights from index `by` on: `a + b.shift_weights(a.n_weights)` shares none."""
        return self._shifted("weight", by)

    def shift_inputs(self, by: int) -> Circuit:
        """The same circuit reading its features from index `by` on."""
        return self._shifted("input", by)

    def _shifted(self, source: Source, by: int) -> Circuit:
        gates = (replace(g, angles=tuple(a.shifted(source, by) for a in g.angles)) for g in self.gates)
        return replace(self, gates=tuple(gates))

    def with_observables(self, observables: tuple[str, ...]) -> Circuit:
        """The same gates with another readout."""
        return replace(self, observables=observables)

    def inverse(self) -> Circuit:
        """The circuit that undoes this one, with the same weights and the same observables.

        Raises:
            ValueError: If it contains a state preparation.
        """
        return replace(self, gates=tuple(gate.inverse() for gate in reversed(self.gates)))
