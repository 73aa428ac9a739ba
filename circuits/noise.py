"""What noise is, as data: channels after gates, and errors of the readout. No simulation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import exp, isfinite, sqrt
from typing import Any, Literal, get_args

import numpy as np

from circuits.circuit import Gate
from circuits.gates import GATES, PAULI, Matrix
from circuits.naming import unknown

ChannelName = Literal["depolarizing", "bit_flip", "phase_flip", "amplitude_damping", "phase_damping"]

# Largest deviation of sum K^+ K from the identity that rounding of a double may leave.
TRACE_TOLERANCE = 1e-8


@dataclass(frozen=True)
class Channel:
    """A noise channel on one qubit.

    Args:
        name: "depolarizing" (X, Y or Z, each with probability p/3), "bit_flip" (X with p), "phase_flip" (Z with p),
            "amplitude_damping" (|1> falls to |0> with p) or "phase_damping" (coherence scaled by sqrt(1 - p)).
        probability: p, in [0, 1].

    Raises:
        ValueError: For an unknown name or a probability outside [0, 1].

    Source: Nielsen & Chuang, section 8.3; the depolarizing convention is that of PennyLane's DepolarizingChannel.
    """

    name: ChannelName
    probability: float

    def __post_init__(self) -> None:
        if self.name not in get_args(ChannelName):
            raise unknown("noise channel", self.name, get_args(ChannelName))
        _check_probability(self.probability, f"channel {self.name} has probability")

    @property
    def n_wires(self) -> int:
        """Wires that it acts on."""
        return 1

    def kraus(self) -> tuple[Matrix, ...]:
        """Kraus operators, each (2, 2)."""
        p = self.probability
        if self.name == "amplitude_damping":
            return (np.diag([1, sqrt(1 - p)]).astype(complex), np.array([[0, sqrt(p)], [0, 0]], dtype=complex))
        if self.name == "phase_damping":
            return (np.diag([1, sqrt(1 - p)]).astype(complex), np.diag([0, sqrt(p)]).astype(complex))
        errors = {"depolarizing": "XYZ", "bit_flip": "X", "phase_flip": "Z"}[self.name]
        return (sqrt(1 - p) * PAULI["I"], *(sqrt(p / len(errors)) * PAULI[error] for error in errors))


@dataclass(frozen=True)
class ThermalRelaxation:
    """What waiting does to one qubit: populations decay with T1, coherence with T2.

    rho_11 -> rho_11 exp(-t/T1) + p (1 - exp(-t/T1)) and rho_01 -> rho_01 exp(-t/T2), with t the duration and p the
    excited population.

    Args:
        t1: Relaxation time in seconds, above 0; infinity for none.
        t2: Dephasing time in seconds, above 0 and at most 2 t1.
        duration: Of the gate that it follows, in seconds, at least 0.
        excited_population: Of |1> in equilibrium, in [0, 1]; 0 for a cold qubit.

    Raises:
        ValueError: For numbers outside these ranges.

    Source: Nielsen & Chuang, section 8.3.5 and 8.4.1; Qiskit Aer's thermal_relaxation_error and PennyLane's
        ThermalRelaxationError are the same map.
    """

    t1: float
    t2: float
    duration: float
    excited_population: float = 0.0

    def __post_init__(self) -> None:
        for name in ("t1", "t2"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}: give a time in seconds above 0")
        if self.t2 > 2 * self.t1:
            raise ValueError(
                f"t2 is {self.t2} s but t1 is {self.t1} s: a qubit that relaxes in t1 keeps no coherence for longer "
                f"than 2 t1 = {2 * self.t1} s, so lower t2"
            )
        if not (isfinite(self.duration) and self.duration >= 0):
            raise ValueError(f"duration is {self.duration}: give a time in seconds of at least 0")
        _check_probability(self.excited_population, "excited_population is")

    @property
    def n_wires(self) -> int:
        """Wires that it acts on."""
        return 1

    def kraus(self) -> tuple[Matrix, ...]:
        """Kraus operators, each (2, 2)."""
        reset, coherence = 1 - exp(-self.duration / self.t1), exp(-self.duration / self.t2)
        up, down = self.excited_population * reset, (1 - self.excited_population) * reset
        # What keeps the populations in place: a positive block of the Choi matrix, as T2 <= 2 T1.
        values, vectors = np.linalg.eigh(np.array([[1 - up, coherence], [coherence, 1 - down]]))
        diagonal = [sqrt(max(v, 0.0)) * np.diag(c).astype(complex) for v, c in zip(values, vectors.T, strict=True)]
        jumps = np.array([[0, sqrt(down)], [0, 0]], dtype=complex), np.array([[0, 0], [sqrt(up), 0]], dtype=complex)
        return (*diagonal, *jumps)


@dataclass(frozen=True)
class KrausChannel:
    """Any channel on one or two wires, rho -> sum K rho K^+.

    Args:
        operators: Kraus operators, each (2, 2) or each (4, 4); of two wires the gate's first is the most significant.

    Raises:
        ValueError: For operators of other shapes, or that do not preserve the trace.
    """

    operators: Any

    def __post_init__(self) -> None:
        try:
            stacked = np.array([np.asarray(k) for k in self.operators], dtype=complex)
        except (TypeError, ValueError) as error:
            raise ValueError(f"Kraus operators are no matrices of one shape: {error}") from None
        if stacked.ndim != 3 or stacked.shape[1:] not in ((2, 2), (4, 4)):
            raise ValueError(
                f"Kraus operators have shape {stacked.shape}: give at least one, each (2, 2) for one wire or (4, 4) "
                "for two"
            )
        if not np.isfinite(stacked).all():
            raise ValueError("Kraus operators have entries that are not finite: give numbers")
        total = np.einsum("kji,kjl->il", stacked.conj(), stacked)
        deviation = float(np.abs(total - np.eye(len(total))).max())
        if deviation > TRACE_TOLERANCE:
            raise ValueError(
                f"channel does not preserve the trace: its sum of K^+ K differs from the identity by up to "
                f"{deviation:.3g}, more than {TRACE_TOLERANCE:g}: complete its Kraus operators, or rescale them"
            )
        # Tuples, which are hashed, compared and written out in full.
        object.__setattr__(self, "operators", tuple(tuple(map(tuple, k)) for k in stacked.tolist()))

    @property
    def n_wires(self) -> int:
        """Wires that it acts on."""
        return len(self.operators[0]).bit_length() - 1

    def kraus(self) -> tuple[Matrix, ...]:
        """Kraus operators, each (2, 2) or each (4, 4)."""
        return tuple(np.array(k, dtype=complex) for k in self.operators)


AnyChannel = Channel | ThermalRelaxation | KrausChannel


@dataclass(frozen=True)
class ReadoutError:
    """A measured bit that is read wrongly.

    Args:
        p1_given_0: Probability of reading 1 where the qubit was found in |0>.
        p0_given_1: Probability of reading 0 where it was found in |1>.

    Raises:
        ValueError: For a probability outside [0, 1].
    """

    p1_given_0: float
    p0_given_1: float

    def __post_init__(self) -> None:
        _check_probability(self.p1_given_0, "readout error has p1_given_0")
        _check_probability(self.p0_given_1, "readout error has p0_given_1")

    def confusion(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """P(read i | was j), (2, 2): each column sums to 1."""
        up, down = self.p1_given_0, self.p0_given_1
        return np.array([[1 - up, down], [up, 1 - down]])

    def kraus(self) -> tuple[Matrix, ...]:
        """The error as a channel right before a measurement of Z, behind the change of basis."""
        confusion = self.confusion()
        result = []
        for read, was in product((0, 1), repeat=2):
            operator = np.zeros((2, 2), dtype=complex)
            operator[read, was] = sqrt(confusion[read, was])
            result.append(operator)
        return tuple(result)

    @property
    def factor(self) -> float:
        """What a measured Pauli is multiplied by: its mean becomes offset + factor * mean."""
        return 1 - self.p1_given_0 - self.p0_given_1

    @property
    def offset(self) -> float:
        """What is added to it."""
        return self.p0_given_1 - self.p1_given_0


After = tuple[str, AnyChannel] | tuple[str, AnyChannel, tuple[int, ...]]


@dataclass(frozen=True)
class NoiseModel:
    """Which channel follows which gate, and how bits are misread.

    Args:
        after: Pairs (gate name, channel) or triples (gate name, channel, wires); the gate name "*" means every gate
            that is not a state preparation. A channel on one wire acts on each wire of the gate, a channel on two on
            the gate's wires in their order; with `wires` it acts on those wires alone (a channel on two, only where
            both are among them). Several channels after one gate apply in the order given.
        readout: A ReadoutError of every wire, or {wire: ReadoutError}. It acts on measured bits: of an observable, on
            every wire that is not I.

    Raises:
        ValueError: For an unknown gate name, a channel on two wires after gates on another number, or an empty model.

    Example:
        NoiseModel((("CNOT", Channel("depolarizing", 0.01)),), readout=ReadoutError(0.01, 0.03))
    """

    after: Sequence[After] = ()
    readout: Any = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "after", tuple(self._entry(entry) for entry in self.after))
        object.__setattr__(self, "readout", self._readout())
        if not self.after and not self.readout:
            raise ValueError(
                "noise model names 0 channels and no readout error: give at least 1, or noise=None for none"
            )

    @staticmethod
    def _entry(entry: Any) -> After:
        if not isinstance(entry, (tuple, list)) or len(entry) not in (2, 3):
            raise ValueError(f"noise model has the entry {entry!r}: give (gate, channel) or (gate, channel, wires)")
        name, channel = entry[:2]
        if name != "*" and (name not in GATES or GATES[name].n_wires is None):
            raise unknown("gate in a noise model", name, ["*", *(g for g in GATES if GATES[g].n_wires)])
        if not isinstance(channel, AnyChannel):
            raise ValueError(
                f"noise after {name} is {channel!r}: give a circuits.Channel, ThermalRelaxation or KrausChannel"
            )
        if channel.n_wires == 2 and (name == "*" or GATES[name].n_wires != 2):
            on = "any number of" if name == "*" else GATES[name].n_wires
            raise ValueError(f"channel on 2 wires follows {name}, which acts on {on} wires: name a gate on 2 wires")
        if len(entry) == 2:
            return name, channel
        return name, channel, _wires(entry[2], f"noise after {name}")

    def _readout(self) -> Any:
        given = self.readout
        if given is None or isinstance(given, ReadoutError):
            return given
        try:
            pairs = sorted(dict(given.items() if isinstance(given, Mapping) else given).items())
        except (TypeError, ValueError):
            raise ValueError(f"readout is {given!r}: give a circuits.ReadoutError or {{wire: ReadoutError}}") from None
        _wires([wire for wire, _ in pairs], "readout")
        for wire, error in pairs:
            if not isinstance(error, ReadoutError):
                raise ValueError(f"readout of wire {wire} is {error!r}: give a circuits.ReadoutError")
        return tuple(pairs)

    def check_wires(self, n_wires: int) -> None:
        """Raise a ValueError where it names a wire that a circuit does not have."""
        by_wire = self.readout if isinstance(self.readout, tuple) else ()
        listed = [wire for entry in self.after for wires in entry[2:] for wire in wires]
        for wire in (*listed, *(wire for wire, _ in by_wire)):
            if wire >= n_wires:
                raise ValueError(f"noise model names wire {wire} but the circuit has wires 0 to {n_wires - 1}")

    def channels_after(self, gate: Gate) -> tuple[tuple[AnyChannel, tuple[int, ...]], ...]:
        """Channels that follow a gate, each with the wires it acts on, in the order of application."""
        if gate.spec.n_wires is None:
            return ()
        result: list[tuple[AnyChannel, tuple[int, ...]]] = []
        for name, channel, *among in self.after:
            if name in ("*", gate.name):
                places = [gate.wires] if channel.n_wires == 2 else [(wire,) for wire in gate.wires]
                result += [(channel, on) for on in places if not among or set(on) <= set(among[0])]
        return tuple(result)

    def readout_of(self, wire: int) -> ReadoutError | None:
        """The readout error of a wire."""
        return dict(self.readout).get(wire) if isinstance(self.readout, tuple) else self.readout

    def measured(self, observable: str) -> dict[str, float]:
        """What measuring an observable measures: the mean of its misread values is a sum over Pauli strings.

        Each wire's Pauli P becomes offset I + factor P.

        Args:
            observable: A Pauli string.

        Returns:
            By Pauli string its coefficient, zeros left out; the string of I alone is the constant 1.
        """
        terms = {"": 1.0}
        for wire, letter in enumerate(observable):
            error = self.readout_of(wire) if letter != "I" else None
            parts = {letter: 1.0} if error is None else {letter: error.factor, "I": error.offset}
            terms = {text + own: a * b for text, a in terms.items() for own, b in parts.items() if a * b != 0}
        return terms


def _check_probability(value: float, what: str) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{what} {value}: it must lie in [0, 1]")


def _wires(wires: Any, what: str) -> tuple[int, ...]:
    given = tuple(wires) if isinstance(wires, Iterable) else (wires,)
    if not given or any(isinstance(w, bool) or not isinstance(w, int) or w < 0 for w in given):
        raise ValueError(f"{what} names the wires {given}: give whole numbers of at least 0")
    return given
