"""What noise is, as data: channels after gates. No simulation."""

from dataclasses import dataclass
from math import sqrt
from typing import Literal, get_args

import numpy as np

from circuits.gates import GATES, PAULI, Matrix
from circuits.naming import unknown

ChannelName = Literal["depolarizing", "bit_flip", "phase_flip", "amplitude_damping", "phase_damping"]


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
        if not 0 <= self.probability <= 1:
            raise ValueError(f"channel {self.name} has probability {self.probability}: it must lie in [0, 1]")

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
class NoiseModel:
    """Which channel follows which gate, on every wire of that gate.

    Args:
        after: Pairs (gate name, channel); the gate name "*" means every gate that is not a state preparation.
            Several channels after one gate apply in the order given.

    Raises:
        ValueError: For an unknown gate name or an empty model.

    Example:
        NoiseModel((("CNOT", Channel("depolarizing", 0.01)),))
    """

    after: tuple[tuple[str, Channel], ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "after", tuple((name, channel) for name, channel in self.after))
        if not self.after:
            raise ValueError("noise model names 0 channels: give at least 1, or noise=None for none")
        for name, channel in self.after:
            if name != "*" and (name not in GATES or GATES[name].n_wires is None):
                raise unknown("gate in a noise model", name, ["*", *(g for g in GATES if GATES[g].n_wires)])
            if not isinstance(channel, Channel):
                raise ValueError(f"noise after {name} is {channel!r}: give a circuits.Channel")

    def channels_after(self, gate: str) -> tuple[Channel, ...]:
        """Channels that follow a gate of that name, on each of its wires."""
        if GATES[gate].n_wires is None:
            return ()
        return tuple(channel for name, channel in self.after if name in ("*", gate))
