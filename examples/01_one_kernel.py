"""One quantum kernel on one image: what it is, and what it gives on two patches.

The same two numbers come from the classical emulation, from PennyLane and from Qiskit Aer.
"""

import torch
from sklearn.datasets import load_digits

from circuits import kernel
from qconv import QuantumConv2d

circuit = kernel("heisenberg", wires=4, depth=1)
print(circuit.draw())
print(f"{circuit.n_inputs} pixels in, {circuit.n_weights} trainable angles, {len(circuit.observables)} channels out\n")

image = torch.tensor(load_digits().images[0] / 16, dtype=torch.float32)[None, None]  # a handwritten 0, 8x8
torch.manual_seed(0)
layer = QuantumConv2d(1, 4, kernel_size=2, stride=2, kernel=circuit)

for backend in ("auto", "pennylane", "qiskit"):
    other = QuantumConv2d(1, 4, kernel_size=2, stride=2, kernel=circuit, backend=backend)
    other.load_state_dict(layer.state_dict())
    maps = other(image)
    first, second = maps[0, 0, 0, 0].item(), maps[0, 0, 0, 1].item()
    print(f"{backend:>9}: <Z> of wire 0 on the first two patches {first:+.6f} {second:+.6f}")
