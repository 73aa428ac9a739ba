"""Shots and noise of the simulators: binomial bounds, seeds, density matrices, gradients."""

import numpy as np
import oracle
import pytest
import torch
from test_backends import draw_numbers, expected
from test_shots import assert_binomial

from circuits import Channel, NoiseModel, kernel
from qconv import load_backend, simulate

NOISE = NoiseModel(
    (
        ("CNOT", Channel("depolarizing", 0.05)),
        ("*", Channel("amplitude_damping", 0.07)),
        ("Rot", Channel("phase_flip", 0.03)),
        ("RY", Channel("phase_damping", 0.1)),
        ("RY", Channel("bit_flip", 0.02)),
    )
)


@pytest.mark.parametrize(
    "backend",
    [
        load_backend("fourier"),
        load_backend("statevector"),
        load_backend("pennylane", device="default.mixed"),
        load_backend("qiskit"),
    ],
    ids=["fourier", "statevector", "default.mixed", "aer"],
)
@pytest.mark.parametrize("encoding", ["angle", "angle_z"])
def test_noise_agrees_with_the_density_matrix(backend, encoding):
    circuit = kernel("strongly_entangling", 3, encoding=encoding, readout=["ZII", "XYI", "IIZ"])
    x, w = draw_numbers(circuit)
    want = np.array([[oracle.run_noisy(circuit, p.numpy(), f.numpy(), NOISE) for f in w] for p in x])
    assert np.abs(want - expected(circuit, x, w)[0]).max() > 0.1
    np.testing.assert_allclose(simulate(circuit, x, w, backend=backend, noise=NOISE), want, atol=1e-10)


def test_noisy_fourier_gradient_is_the_parameter_shifts():
    circuit = kernel("strongly_entangling", 2)
    gradients = []
    for backend in ("fourier", "qiskit"):
        x, w = (t.requires_grad_() for t in draw_numbers(circuit))
        simulate(circuit, x, w, backend=backend, noise=NOISE).square().sum().backward()
        gradients.append((x.grad, w.grad))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


@pytest.mark.parametrize(
    "backend",
    [
        load_backend("qiskit"),
        load_backend("pennylane"),
        load_backend("pennylane", device="lightning.qubit"),
        load_backend("auto"),
    ],
    ids=["aer", "default.qubit", "lightning.qubit", "auto"],
)
def test_shots_stay_within_the_binomial_bound(backend):
    circuit = kernel("strongly_entangling", 3, readout=["ZII", "IZZ", "XIY"])
    x, w = draw_numbers(circuit, patches=12)
    shots = 400
    exact = simulate(circuit, x, w, backend="statevector")
    sampled = simulate(circuit, x, w, backend=backend, shots=shots, seed=7)
    assert_binomial(sampled, exact, shots)


@pytest.mark.parametrize("backend", ["qiskit", "pennylane"])
def test_shots_repeat_under_a_seed_and_differ_between_calls(backend):
    circuit = kernel("heisenberg", 2)
    x, w = draw_numbers(circuit)
    first, again = (load_backend(backend).compile(circuit, shots=200, seed=5) for _ in range(2))
    one, two = first(x, w), first(x, w)
    assert torch.equal(one, again(x, w))
    assert not torch.equal(one, two)


def test_aer_draws_every_patch_on_its_own():
    circuit = kernel("heisenberg", 2)
    x, w = draw_numbers(circuit, patches=1, filters=1)
    values = simulate(circuit, x.expand(300, -1), w, backend="qiskit", shots=100, seed=1)[:, 0]
    exact = simulate(circuit, x, w)[0, 0]
    spread = ((1 - exact**2) / 100).sqrt()
    torch.testing.assert_close(values.std(0) / spread, torch.ones(2).double(), atol=5 / (2 * 300) ** 0.5, rtol=0)
