"""The same layer with shots on Qiskit Aer: the error falls as 1 / sqrt(shots), and noise shifts the mean."""

import torch
from sklearn.datasets import load_digits

from circuits import Channel, NoiseModel
from qconv import QuantumConv2d

images = torch.tensor(load_digits().images[:2] / 16, dtype=torch.float32)[:, None]
torch.manual_seed(0)
options = {"kernel": "strongly_entangling", "depth": 2}
exact = QuantumConv2d(1, 4, 2, stride=2, **options)
torch.nn.init.uniform_(exact.weight, -3, 3)
with torch.no_grad():
    reference = exact(images)

counts = exact.counts((1, 8, 8))
print(f"one image: {counts['device:circuits']} circuits, {counts['device:gates_2q']} two-qubit gates on a device\n")

for shots in (100, 400, 1600):
    layer = QuantumConv2d(1, 4, 2, stride=2, backend="qiskit", shots=shots, seed=1, **options)
    layer.load_state_dict(exact.state_dict())
    error = (layer(images) - reference).square().mean().sqrt().item()
    bound = ((1 - reference**2) / shots).mean().sqrt().item()
    print(f"{shots:5} shots: root-mean-square error {error:.4f}, binomial standard error {bound:.4f}")

noise = NoiseModel((("CNOT", Channel("depolarizing", 0.02)),))
for backend in ("fourier", "qiskit"):
    layer = QuantumConv2d(1, 4, 2, stride=2, backend=backend, noise=noise, **options)
    layer.load_state_dict(exact.state_dict())
    shift = (layer(images) - reference).abs().max().item()
    print(f"depolarizing(0.02) after every CNOT, {backend:>7}: outputs move by up to {shift:.4f}")

# Gradients flow through Aer as well, by parameter shifts.
layer = QuantumConv2d(1, 4, 2, stride=2, backend="qiskit", shots=400, seed=2, **options)
layer.load_state_dict(exact.state_dict())
gradients = []
for one in (exact, layer):
    one(images[:1]).square().mean().backward()
    gradients.append(one.weight.grad)
cosine = torch.nn.functional.cosine_similarity(*gradients).item()
print(f"cosine between the gradient from 400 shots and the exact one: {cosine:.3f}")
