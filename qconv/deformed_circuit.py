"""The quantum circuit behind a deformed neuron: its agreements, counted by phase estimation."""

from __future__ import annotations

from math import pi

import torch
from torch import Tensor

from circuits.circuit import Angle, Circuit, Gate, const

SYNAPSE_ANGLES = 4
PAIR_ANGLES = 4


def neuron_circuit(
    synapses: int, pairs: tuple[tuple[int, int], ...], threshold: int, falling: bool, deformed: bool, mixed: bool
) -> Circuit:
    """The circuit of one neuron, whose one observable is its activation 2q - 1.

    Wires: a phase register, then inputs, weights and, for mixed inputs, one purifying qubit an input. Input i is
    RY(pi x_i) |0>. Each pair of inputs passes its gates and each pair (input, weight) its own; then the number S of
    agreements is estimated as a phase, S - threshold in two's complement, and the register's sign bit answers.

    Weights, in radians: for a neuron without deformation the angle of each weight's RY; else, for each synapse, those
    of the input's RY, of the weight's RY, and of the deformation's RY and (controlled by the input) CRY on the weight;
    then for each pair two directions and rotations (d_1, r_1, d_2, r_2), see `neighbor_gate`.

    Args:
        synapses: N.
        pairs: Inputs that share a gate.
        threshold: Agreements from which on the neuron is active, 0 to N + 1.
        falling: Whether it is active below the threshold instead.
        deformed: Whether there are deforming gates.
        mixed: Whether inputs are mixtures of 0 and 1 instead of superpositions.

    Source: Bondesan & Welling, Quantum Deformed Neural Networks (arXiv:2010.11189); phase estimation as in Nielsen &
        Chuang, section 5.2.
    """
    size = 1
    while not (threshold <= 2 ** (size - 1) and synapses - threshold < 2 ** (size - 1)):
        size += 1
    n_wires = size + synapses * (3 if mixed else 2)
    inputs = range(size, size + synapses)
    weights = range(size + synapses, size + 2 * synapses)
    gates = []
    for k, wire in enumerate(inputs):
        gates.append(Gate("RY", (wire,), (Angle("input", k, pi),)))
        if mixed:
            gates.append(Gate("CNOT", (wire, wire + 2 * synapses)))
    if deformed:
        for k, (first, second) in enumerate(pairs):
            angles = [Angle("weight", synapses * SYNAPSE_ANGLES + k * PAIR_ANGLES + j) for j in range(PAIR_ANGLES)]
            gates += neighbor_gate(inputs[first], inputs[second], angles[0], angles[1])
            gates += neighbor_gate(inputs[second], inputs[first], angles[2], angles[3])
    for k, (source, target) in enumerate(zip(inputs, weights, strict=True)):
        if not deformed:
            gates.append(Gate("RY", (target,), (Angle("weight", k),)))
            continue
        turn, prepare, always, controlled = (Angle("weight", k * SYNAPSE_ANGLES + j) for j in range(SYNAPSE_ANGLES))
        gates.append(Gate("RY", (target,), (prepare,)))
        gates.append(Gate("RY", (source,), (turn,)))
        gates.append(Gate("RY", (target,), (always,)))
        gates.append(Gate("CRY", (source, target), (controlled,)))
    gates += _count(size, inputs, weights, threshold)
    if falling:
        gates.append(Gate("X", (0,)))
    return Circuit(n_wires, tuple(gates), ("Z" + "I" * (n_wires - 1),))


def count_threshold(synapses: int, scale: float, shift: float) -> tuple[int, bool]:
    """From which number of agreements on scale (2 S - N) + shift >= 0, and whether it holds below instead."""
    active = [scale * (2 * k - synapses) + shift >= 0 for k in range(synapses + 1)]
    return (sum(active), True) if scale < 0 else (synapses + 1 - sum(active), False)


def neuron_angles(theta: Tensor, high: Tensor, low: Tensor, angle: Tensor | None, gate: Tensor | None) -> Tensor:
    """The weights of a neuron's circuit, in radians.

    Args:
        theta: Means of the weights' bits, (N,).
        high: Means of agreement with an input bit +1 along its axis, (N,).
        low: With an input bit -1, (N,).
        angle: Of the axes, (N,); None without deformation.
        gate: Swings (pairs, 4) of the gates of neighbors, by quaternions (1, x, y, z); None for none.
    """
    weight = torch.arccos(-theta)
    if angle is None:
        return weight
    # RY takes the weight's bit to mean `high` where the input is |1>, and to -`low` where it is |0> and must be met.
    after_0, after_1 = torch.arccos(low) - weight, torch.arccos(-high) - weight
    found = torch.stack([angle, weight, after_0, after_1 - after_0], dim=-1).flatten()
    if gate is None:
        return found
    x, y, yy, zz = gate.unbind(-1)
    # A quaternion (1, v) turns by 2 atan |v|; directions are measured in the planes (S, X) of the swinging bit.
    first = torch.atan2(y, x), 2 * torch.atan(torch.hypot(x, y))
    second = torch.atan2(yy, zz), 2 * torch.atan(torch.hypot(yy, zz))
    return torch.cat([found, torch.stack([*first, *second], dim=-1).flatten()])


def neighbor_gate(first: int, second: int, direction: Angle, rotation: Angle) -> list[Gate]:
    """exp(-i r (cos d Z - sin d X) (x) Y / 2): turns the second qubit about Y, by the first one's bit along d."""
    return [
        Gate("RY", (first,), (direction,)),
        Gate("RX", (second,), (const(pi / 2),)),
        Gate("RZZ", (first, second), (rotation,)),
        Gate("RX", (second,), (const(-pi / 2),)),
        Gate("RY", (first,), (direction.times(-1.0),)),
    ]


def _count(size: int, inputs: range, weights: range, threshold: int) -> list[Gate]:
    """Write S - threshold, modulo 2^size, into wires 0 to size - 1, which start in 0."""
    agree = [gate for i, w in zip(inputs, weights, strict=True) for gate in (Gate("CNOT", (i, w)), Gate("X", (w,)))]
    phases = []
    for wire in range(size):
        # Powers of exp(2 pi i S / 2^size), controlled by the register.
        unit = 2 * pi * 2 ** (size - 1 - wire) / 2**size
        phases += [Gate("CP", (wire, w), (const(unit),)) for w in weights]
        phases.append(Gate("P", (wire,), (const(-unit * threshold),)))
    fourier = []
    for wire in range(size):
        fourier.append(Gate("H", (wire,)))
        fourier += [Gate("CP", (k, wire), (const(pi / 2 ** (k - wire)),)) for k in range(wire + 1, size)]
    fourier += [Gate("SWAP", (wire, size - 1 - wire)) for wire in range(size // 2)]
    back = [gate.inverse() for gate in reversed(fourier)]
    return [*(Gate("H", (wire,)) for wire in range(size)), *agree, *phases, *reversed(agree), *back]
