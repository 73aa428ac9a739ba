"""What a layer would take on a quantum device: circuits, shots and gates; seconds and joules where figures exist."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qconv.energy.units import NBSP, joules


@dataclass(frozen=True)
class Device:
    """Published figures of a quantum device.

    Args:
        name: Its name.
        qubits: How many it has.
        seconds: A shot, (low, high).
        watts: Of the whole apparatus while it runs, (low, high).
        source: Where the figures are from, and what they stand for.

    Raises:
        ValueError: Unless 0 < low <= high.
    """

    name: str
    qubits: int
    seconds: tuple[float, float]
    watts: tuple[float, float]
    source: str

    def __post_init__(self) -> None:
        for what in ("seconds", "watts"):
            low, high = getattr(self, what)
            if not 0 < low <= high:
                raise ValueError(f"{what} of device {self.name} are ({low}, {high}): give 0 < low <= high")


SYCAMORE = Device(
    "Sycamore",
    53,
    # Low: a circuit of 20 cycles and its readout alone. High: a million shots in 200 s, the control's pauses included.
    (1.1e-6, 200 / 1e6),
    (26e3, 26e3),
    "Arute et al., Quantum supremacy using a programmable superconducting processor (arXiv:1910.11333), supplement "
    "section X: 26 kW whatever it runs; times are those of its circuits of 20 cycles on 53 qubits",
)
"""The one superconducting device whose makers published power and time of the same run."""

DEVICES = (SYCAMORE,)


@dataclass(frozen=True)
class DeviceEstimate:
    """Seconds and joules of so many shots on a device: a model, which adds to no joules of arithmetic.

    Args:
        device: The device.
        shots: How many.
    """

    device: Device
    shots: int

    @property
    def seconds(self) -> tuple[float, float]:
        """Time, (low, high)."""
        low, high = self.device.seconds
        return self.shots * low, self.shots * high

    @property
    def joules(self) -> tuple[float, float]:
        """Energy, (low, high): power times time."""
        return self.seconds[0] * self.device.watts[0], self.seconds[1] * self.device.watts[1]

    def __str__(self) -> str:
        (fast, slow), (low, high) = self.seconds, self.joules
        return f"{fast:.3g}{NBSP}s to {slow:.3g}{NBSP}s, {joules(low)} to {joules(high)} on {self.device.name}"


@dataclass(frozen=True)
class Cost:
    """What a layer would run on a quantum device, known before it runs: nothing was executed.

    Args:
        patches: Of all images and groups.
        filters: Circuits with weights of their own, a patch.
        wires: Qubits of the circuit.
        settings: Measurement settings: circuits that differ in what is measured; of zero-noise extrapolation those of
            all scales.
        shots: A circuit.
        sampled: Whether the layer asks for these shots; where it is exact, they are an assumption.
        gates_1q: On one qubit, of all circuits together.
        gates_2q: On two.
        depth: Longest chain of gates of a circuit, measurements left out.
        weight_step: Circuits of a forward pass and the gradient with respect to the weights.
        step: The same, and with respect to the inputs, as it is behind another layer.
        method: How gradients are taken.
        devices: Whose figures are used; those with fewer qubits are left out.
    """

    patches: int
    filters: int
    wires: int
    settings: int
    shots: int
    sampled: bool
    gates_1q: int
    gates_2q: int
    depth: int
    weight_step: int
    step: int
    method: str
    devices: Sequence[Device] = DEVICES

    @property
    def circuits(self) -> int:
        """Circuits of one forward pass."""
        return self.patches * self.filters * self.settings

    @property
    def total_shots(self) -> int:
        """Shots of one forward pass."""
        return self.circuits * self.shots

    @property
    def inference(self) -> tuple[DeviceEstimate, ...]:
        """Seconds and joules of a forward pass, for each device that is large enough."""
        return self._estimates(self.circuits)

    @property
    def training(self) -> tuple[DeviceEstimate, ...]:
        """Seconds and joules of a forward pass and the gradient with respect to the weights."""
        return self._estimates(self.weight_step)

    def _estimates(self, circuits: int) -> tuple[DeviceEstimate, ...]:
        return tuple(DeviceEstimate(d, circuits * self.shots) for d in self.devices if d.qubits >= self.wires)

    def __str__(self) -> str:
        assumed = "" if self.sampled else " (assumed: the layer is exact)"
        lines = [
            f"{_some(self.patches, 'patch', 'es')} x {_some(self.filters, 'filter')} x "
            f"{_some(self.settings, 'measurement setting')} = {_some(self.circuits, 'circuit')}",
            f"{_some(self.shots, 'shot')} a circuit{assumed}, {self.total_shots:,} in all",
            f"{self.wires} qubits, depth {self.depth}; in all {self.gates_1q:,} gates on 1 qubit and "
            f"{self.gates_2q:,} on 2",
            f"with gradients ({self.method}): {self.weight_step:,} circuits for the weights, {self.step:,} for weights "
            "and inputs",
        ]
        for inference, training in zip(self.inference, self.training, strict=True):
            lines += [f"forward: {inference}", f"with the weights' gradient: {training}"]
        lines += [
            f"seconds and joules are those of {d.name}, whatever the layer's backend is: {d.source}"
            for d in self.devices
            if d.qubits >= self.wires
        ]
        return "\n".join(lines)


def _some(n: int, noun: str, plural: str = "s") -> str:
    return f"{n:,} {noun}{plural if n != 1 else ''}"
