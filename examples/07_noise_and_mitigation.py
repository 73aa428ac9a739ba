"""A noisy kernel on the exact simulator, with shots, and how much of its error two mitigations take away."""

import torch

from circuits import Channel, NoiseModel, ReadoutError, ThermalRelaxation, kernel
from qconv import simulate
from qconv.mitigation import ReadoutInversion, ZeroNoise, measure_readout

circuit = kernel("strongly_entangling", wires=4)
generator = torch.Generator().manual_seed(0)
x = torch.rand(64, circuit.n_inputs, generator=generator)
w = torch.randn(circuit.n_weights, generator=generator)
exact = simulate(circuit, x, w)

# Gates of 300 ns on qubits that relax in some 60 microseconds, CNOTs that fail, and bits that are misread.
noise = NoiseModel(
    (("CNOT", Channel("depolarizing", 0.01)), ("CNOT", ThermalRelaxation(t1=60e-6, t2=40e-6, duration=300e-9))),
    readout=ReadoutError(p1_given_0=0.02, p0_given_1=0.05),
)

# On a device errors are measured, not known.
errors = measure_readout("statevector", circuit.n_wires, shots=20_000, noise=noise, seed=0)
inverted = ReadoutInversion("statevector", errors)
ways = {
    "noisy": "statevector",
    "readout inverted": inverted,
    "readout inverted, linear extrapolation": ZeroNoise(inverted, scales=(1, 3)),
    "readout inverted, Richardson extrapolation": ZeroNoise(inverted, extrapolation="richardson"),
}
print(f"{'root-mean-square error':45} {'exact values':>12} {'20,000 shots':>12} {'500 shots':>10}")
for name, backend in ways.items():
    row = [
        (simulate(circuit, x, w, backend=backend, noise=noise, shots=shots, seed=1) - exact).square().mean().sqrt()
        for shots in (None, 20_000, 500)
    ]
    print(f"{name:45} {row[0].item():12.4f} {row[1].item():12.4f} {row[2].item():10.4f}")
print("\nWith few shots, what extrapolation gains in bias it loses in variance.")
