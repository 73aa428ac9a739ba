"""Unmeasured paths add amplitudes, not probabilities: why a quantum-deformed neuron differs from a stochastic one.

A particle reaches C from A or from B. If nobody looks which, P(C) is not P(A) P(A -> C) + P(B) P(B -> C). An input bit
of a neuron is such a particle: A and B are its values, and C is the agreement that the neuron counts.
"""

from math import cos, pi, sin

import torch

from circuits.circuit import Circuit, Gate, const
from qconv import simulate
from qconv.deformed import QuantumDeformedLinear

p, angle = 0.7, pi / 3  # P(B) = 0.7; the way to C is a rotation
way = Gate("RY", (0,), (const(angle),))


def probability(*before: Gate) -> float:
    """P(C): of finding |1> after the way, from a state prepared by gates."""
    z = simulate(Circuit(1, (*before, way), ("Z",)), torch.zeros(1, 0), torch.zeros(0))
    return (1 - z.item()) / 2


a_to_c, b_to_c = probability(), probability(Gate("X", (0,)))
prepared = 2 * torch.tensor(p).sqrt().asin().item()
print(f"summed over paths: {1 - p:.2f} x {a_to_c:.4f} + {p:.2f} x {b_to_c:.4f} = {(1 - p) * a_to_c + p * b_to_c:.4f}")
print(f"unmeasured, P(C) = {probability(Gate('RY', (0,), (const(prepared),))):.4f}")
print(f"by amplitudes:     {((1 - p) ** 0.5 * sin(angle / 2) + p**0.5 * cos(angle / 2)) ** 2:.4f}\n")

h = torch.tensor([[2 * p - 1, 0.2, -0.5]])  # means of three input bits
print("activation 2q - 1 of a neuron | coherent inputs | mixed inputs")
for name, turn in (("diagonal gates", 0.0), ("off-diagonal gates", angle)):
    found = []
    for inputs in ("coherent", "mixed"):
        torch.manual_seed(0)
        neuron = QuantumDeformedLinear(3, 1, deformation="pair", inputs=inputs, law="exact", norm=False)
        torch.nn.init.constant_(neuron.angle, turn)
        circuit = neuron.circuit()
        measured = simulate(circuit, neuron.circuit_inputs(h), neuron.circuit_weights())
        found.append((neuron(h).item(), measured.item()))
    layer, simulated = zip(*found, strict=True)
    print(f"{name:>18}, the layer | {layer[0]:+15.6f} | {layer[1]:+.6f}")
    print(f"{'':>12}its circuit, run | {simulated[0]:+15.6f} | {simulated[1]:+.6f}")
