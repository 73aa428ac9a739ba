"""Shots on exact backends: circuits measured as often as asked, from exact probabilities.

Gradients are those that a device gives: parameter shifts, every shifted circuit measured with as many shots. A shifted
weight is one more filter and a shifted feature one more patch, so backends whose work on the patches or on the weights
is shared do it once for all shifts.

Source: Schuld, Bergholm, Gogolin, Izaac & Killoran, Phys. Rev. A 99, 032331 (2019); Wierichs et al. (arXiv:2107.12390)
for gates with several frequencies.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from typing import Any

import torch
from torch import Tensor

from circuits.circuit import Angle, Circuit
from circuits.gates import AMPLITUDE, shift_rule
from circuits.naming import unknown
from qconv.backends.angles import angle_value, features_of
from qconv.backends.outcomes import Distribution, Setting, draw_values
from qconv.backends.protocol import Compiled, Unsupported, check_call, device_counts

# Probabilities, or amplitudes, of a chunk of (patch, filter) pairs.
CHUNK_NUMBERS = 2**22
GRADIENTS = ("parameter-shift", "exact")


def check_gradient(gradient: str) -> str:
    """A gradient of sampled values by name.

    Raises:
        ValueError: For an unknown one.
    """
    if gradient not in GRADIENTS:
        raise unknown("gradient", gradient, GRADIENTS)
    return gradient


class SampledCompiled:
    """A circuit measured with a number of shots.

    Args:
        circuit: With at least one observable.
        distribution: Exact probabilities of `free_angles(circuit)`.
        settings: Its measurement settings.
        shots: Bitstrings a circuit and setting.
        seed: Makes shots repeatable: the k-th draw of a compiled circuit repeats under the same seed. None draws from
            torch's global generator.
        exact: Exact expectation values of the circuit, differentiable, whose gradient is taken for that of the shots'
            values. None for parameter shifts: every shifted circuit is measured with as many shots, as on a device.

    Attributes:
        method: How gradients are taken, one of GRADIENTS.
    """

    differentiable = True

    def __init__(
        self,
        circuit: Circuit,
        distribution: Distribution,
        settings: Sequence[Setting],
        *,
        shots: int,
        seed: int | None,
        exact: Compiled | None = None,
    ) -> None:
        self.circuit, self.shots, self._seed = circuit, shots, seed
        self._distribution, self._settings = distribution, settings
        self._exact = exact
        self.method = "exact" if exact is not None else "parameter-shift"
        self._angles = {source: free_sources(circuit, source) for source in ("input", "weight")}
        self._rules = {source: free_rules(circuit, source) for source in ("input", "weight")}
        self._generators: dict[torch.device, torch.Generator] = {}

    def __call__(self, inputs: Tensor, weights: Tensor) -> Tensor:
        """See Compiled."""
        check_call(self.circuit, inputs, weights)
        if torch._C._are_functorch_transforms_active():
            raise ValueError("shots are not drawn inside torch.func transforms: use shots=None there")
        columns = [angle_value(a, inputs, weights).expand(len(inputs), 1) for a in self._angles["input"]]
        x = torch.cat([inputs[:, :0], *columns], dim=1)
        w = torch.cat([weights[:, :0], *(angle_value(a, inputs, weights).t() for a in self._angles["weight"])], dim=1)
        if self._exact is not None:
            straight: Tensor = _Straight.apply(self._exact(inputs, weights), self._draw(x, w))  # type: ignore[no-untyped-call]
            return straight
        values: Tensor = _Shots.apply(x, w, self)  # type: ignore[no-untyped-call]
        return values

    def _generator(self, device: torch.device) -> torch.Generator | None:
        if self._seed is None:
            return None
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self._seed)
        return self._generators[device]

    def _draw(self, inputs: Tensor, weights: Tensor) -> Tensor:
        """Values (P, F, n_obs) of free angles, without gradients."""
        # At most CHUNK_NUMBERS at a time; a chunk is drawn before the next one is computed.
        chunk = max(1, CHUNK_NUMBERS // (self._distribution.numbers * max(1, len(weights))))
        generator = self._generator(weights.device)
        parts = []
        with torch.no_grad():
            for part in torch.split(inputs, chunk) if len(inputs) else ():
                values = part.new_empty(len(part), len(weights), len(self.circuit.observables))
                for setting, p in zip(self._settings, self._distribution.probabilities(part, weights), strict=True):
                    drawn = draw_values(p, setting.signs, self.shots, generator)
                    values[..., torch.as_tensor(setting.members, device=values.device)] = drawn.to(values)
                parts.append(values)
        return torch.cat(parts) if parts else inputs.new_zeros(0, len(weights), len(self.circuit.observables))

    def weight_slopes(self, inputs: Tensor, weights: Tensor, grad: Tensor) -> Tensor:
        """Gradient with respect to free weights (F, K): shifted weights are more filters."""
        result = torch.zeros_like(weights)
        terms = [(k, c, s) for k, rule in enumerate(self._rules["weight"]) for c, s in rule]
        filters = len(weights)
        block = max(1, CHUNK_NUMBERS // (64 * self._distribution.numbers * max(1, filters)))
        for start in range(0, len(terms), block):
            part = terms[start : start + block]
            shifted = weights.repeat(len(part), 1, 1)
            for copy, (k, _, shift) in zip(shifted, part, strict=True):
                copy[:, k] += shift
            values = self._draw(inputs, shifted.flatten(0, 1)).reshape(len(inputs), len(part), filters, -1)
            slopes = torch.einsum("ptfo,pfo->tf", values, grad)
            for slope, (k, c, _) in zip(slopes, part, strict=True):
                result[:, k] += c * slope
        return result

    def input_slopes(self, inputs: Tensor, weights: Tensor, grad: Tensor) -> Tensor:
        """Gradient with respect to free inputs (P, K): shifted features are more patches."""
        result = torch.zeros_like(inputs)
        for k, rule in enumerate(self._rules["input"]):
            for c, shift in rule:
                moved = inputs.clone()
                moved[:, k] += shift
                result[:, k] += c * (grad * self._draw(moved, weights)).sum((1, 2))
        first = len(self._rules["input"])
        if inputs.shape[1] > first:
            result[:, first:] = self._amplitude_slopes(inputs, weights, grad, first)
        return result

    def _amplitude_slopes(self, inputs: Tensor, weights: Tensor, grad: Tensor, first: int) -> Tensor:
        """Gradient with respect to features that become amplitudes.

        f(x) = N(x) / |x|^2 with N quadratic in x, so a central difference of N with any step is exact; the step is the
        norm of x, which keeps the shots' noise in proportion.
        """
        features = inputs[:, first:]
        # f does not change with the length of x: in units of the largest feature the squares stay in range.
        largest = features.abs().amax(1, keepdim=True)
        unit = torch.where(largest > 0, largest, torch.ones_like(largest))
        scaled = torch.cat([inputs[:, :first], features / unit], dim=1)
        square = scaled[:, first:].square().sum(1)
        step = square.sqrt()
        value = self._draw(scaled, weights)
        result = torch.zeros_like(features)
        for k in range(features.shape[1]):
            ends = []
            for sign in (1, -1):
                moved = scaled.clone()
                moved[:, first + k] += sign * step
                ends.append(self._draw(moved, weights) * moved[:, first:].square().sum(1)[:, None, None])
            slope = (ends[0] - ends[1]) / (2 * step)[:, None, None] - 2 * value * scaled[:, first + k, None, None]
            # A patch of zeros alone stays |0...0> by convention, with gradient 0.
            result[:, k] = torch.where(square > 0, (grad * slope).sum((1, 2)) / square, 0.0)
        return result / unit

    def executions(self, patches: int, filters: int, *, inputs: bool = True) -> int:
        """Circuit evaluations of one forward and backward pass; each is measured in every setting.

        Args:
            patches: Number of patches.
            filters: Number of filters.
            inputs: Whether the gradient with respect to the features is wanted too.
        """
        if self._exact is not None:
            return patches * filters
        own = self._rules["input"]
        amplitudes = len(self._angles["input"]) - len(own)
        terms = sum(len(rule) for rule in (*self._rules["weight"], *(own if inputs else ())))
        return patches * filters * (1 + terms + (1 + 2 * amplitudes if inputs and amplitudes else 0))

    def counts(self, patches: int, filters: int) -> Counter[str]:
        """See Compiled: an evaluation without gradients; drawing bits is not counted."""
        simulated = self._distribution.counts(patches, filters)
        own = Counter({key: amount for key, amount in simulated.items() if not key.startswith("device:")})
        return own + device_counts(self.circuit, len(self._settings), patches * filters, self.shots)


class _Straight(torch.autograd.Function):
    """Drawn values with the gradient of exact ones."""

    @staticmethod
    def forward(ctx: Any, exact: Tensor, drawn: Tensor) -> Tensor:
        return drawn

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Shots(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weights: Tensor, compiled: SampledCompiled) -> Tensor:
        ctx.save_for_backward(inputs, weights)
        ctx.compiled = compiled
        return compiled._draw(inputs, weights)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        inputs, weights = ctx.saved_tensors
        x, w = ctx.needs_input_grad[:2]
        return (
            ctx.compiled.input_slopes(inputs, weights, grad) if x else None,
            ctx.compiled.weight_slopes(inputs, weights, grad) if w else None,
            None,
        )


def free_angles(circuit: Circuit) -> Circuit:
    """The same circuit with an input of its own for each angle that reads features, and a weight for each other one.

    Inputs are the angles of `free_sources(circuit, "input")`, weights those of "weight"; constants stay.

    Raises:
        Unsupported: For weights among the amplitudes of a state preparation.
    """
    if any(angle.source == "weight" for angle in features_of(circuit)):
        raise Unsupported("shots on exact backends take no weights among the amplitudes: use backend 'qiskit'")
    angle_index, weight_index = count(), count()
    feature_index = count(sum(a.source == "input" for g in circuit.gates if g.name != AMPLITUDE for a in g.angles))
    gates = []
    for gate in circuit.gates:
        angles: list[Angle] = []
        for angle in gate.angles:
            if gate.name == AMPLITUDE:
                angles.append(Angle("input", next(feature_index)))
            elif angle.source == "const":
                angles.append(angle)
            else:
                angles.append(Angle(angle.source, next(angle_index if angle.source == "input" else weight_index)))
        gates.append(replace(gate, angles=tuple(angles)))
    return replace(circuit, gates=tuple(gates))


def free_sources(circuit: Circuit, source: str) -> list[Angle]:
    """What each free input or weight is in the circuit's own; amplitudes are the last inputs."""
    own = [a for gate in circuit.gates if gate.name != AMPLITUDE for a in gate.angles if a.source == source]
    return own + (list(features_of(circuit)) if source == "input" else [])


def free_rules(circuit: Circuit, source: str) -> list[tuple[tuple[float, float], ...]]:
    """Shift rules of the free inputs or weights that are angles."""
    return [
        shift_rule(frequencies)
        for gate in circuit.gates
        if gate.name != AMPLITUDE
        for angle, frequencies in zip(gate.angles, gate.spec.frequencies, strict=True)
        if angle.source == source
    ]
