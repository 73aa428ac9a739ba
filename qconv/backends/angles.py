"""From features and weights to the angles of a circuit's gates."""

from dataclasses import replace
from itertools import count

import torch
from torch import Tensor

from circuits.circuit import Angle, Circuit
from circuits.gates import AMPLITUDE


def angle_value(angle: Angle, inputs: Tensor, weights: Tensor) -> Tensor:
    """One angle for all patches and filters: (P, 1) from a feature, (1, F) from a weight, (1, 1) if constant."""
    if angle.source == "const":
        return weights.new_full((1, 1), angle.offset)
    if angle.computed is not None:
        raise ValueError("angle is computed from features: see qconv.backends.computed.with_plain_features")
    column = inputs[:, angle.index, None] if angle.source == "input" else weights[None, :, angle.index]
    return column * angle.scale + angle.offset


def features_of(circuit: Circuit) -> tuple[Angle, ...]:
    """Features that an amplitude encoding at the circuit's start turns into amplitudes; empty without one."""
    if circuit.gates and circuit.gates[0].name == AMPLITUDE:
        return circuit.gates[0].angles
    return ()


def angles_of(circuit: Circuit) -> tuple[Angle, ...]:
    """Every angle of every gate, in order, a weight used twice twice; features of a state preparation left out."""
    return tuple(angle for gate in circuit.gates if gate.name != AMPLITUDE for angle in gate.angles)


def with_free_angles(circuit: Circuit) -> Circuit:
    """The same circuit with a separate input for each angle and feature, and no weight.

    Inputs 0 to K - 1 are the K angles of `angles_of` and the following ones the features of `features_of`: what
    backends that bind numbers to parameters and the parameter-shift rule work on.
    """
    angle_index, feature_index = count(), count(len(angles_of(circuit)))
    gates = (
        replace(
            gate,
            angles=tuple(
                Angle("input", next(feature_index if gate.name == AMPLITUDE else angle_index)) for _ in gate.angles
            ),
        )
        for gate in circuit.gates
    )
    return replace(circuit, gates=tuple(gates))


def evaluate_angles(angles: tuple[Angle, ...], inputs: Tensor, weights: Tensor) -> Tensor:
    """All given angles for every (patch, filter) pair.

    Args:
        angles: K angles.
        inputs: (P, n_inputs).
        weights: (F, n_weights).

    Returns:
        (P * F, K), the pair (p, f) in row p * F + f; differentiable in inputs and weights.
    """
    patches, filters = len(inputs), len(weights)
    if not angles:
        return inputs.new_zeros(patches * filters, 0)
    columns = [angle_value(angle, inputs, weights).expand(patches, filters) for angle in angles]
    return torch.stack(columns, dim=-1).reshape(patches * filters, len(angles))


def normalized(features: Tensor, size: int) -> Tensor:
    """Amplitudes of features: (..., k) -> (..., size), padded with zeros, of norm 1.

    A row of zeros has no direction; by convention it becomes |0...0>, with gradient 0.
    """
    padded = torch.nn.functional.pad(features, (0, size - features.shape[-1]))
    largest = padded.detach().abs().amax(-1, keepdim=True)
    empty = largest == 0
    # Scaled by a constant first, which changes neither value nor gradient but keeps the squares in range.
    scaled = padded / torch.where(empty, torch.ones_like(largest), largest)
    square = scaled.square().sum(-1, keepdim=True)
    # The inner where keeps the gradient of the root finite for the rows that the outer one replaces.
    amplitudes = scaled * torch.where(empty, torch.ones_like(square), square).rsqrt()
    ground = torch.zeros_like(padded)
    ground[..., 0] = 1
    return torch.where(empty, ground, amplitudes)
