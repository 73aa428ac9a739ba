"""Gates that few simulators know, and gates on three wires: every backend gives the oracle's values and slopes."""

import numpy as np
import oracle
import pytest
import torch

from circuits import GATES, Angle, Channel, Circuit, Gate, NoiseModel
from qconv import QuantumConv2d, simulate
from qconv.backends import load_backend
from qconv.backends.fused_states import register
from qconv.backends.protocol import device_counts

FIXED = ("CH", "ISWAP", "ISWAPdg", "SQSWAP", "SQSWAPdg", "ECR", "CCX", "CCZ", "CSWAP")
TURNED = ("CRot", "CU3", "RZX")


def circuit_with(name):
    """Three features, the gate between rotations by weights, on wires that are not in order."""
    x = [Angle("input", k) for k in range(3)]
    w = [Angle("weight", k) for k in range(6)]
    spec = GATES[name]
    return Circuit(
        3,
        (
            *(Gate("RY", (k,), (x[k],)) for k in range(3)),
            *(Gate("RX", (k,), (w[k],)) for k in range(3)),
            Gate(name, (2, 0, 1)[: spec.n_wires], tuple(w[3 : 3 + spec.n_angles])),
            *(Gate("Rot", (k,), (w[5], w[4], w[3])) for k in range(3)),
        ),
        ("ZII", "IXY", "YZX"),
    )


def drawn(circuit):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, circuit.n_inputs, generator=generator, dtype=torch.float64)
    w = torch.randn(circuit.n_weights, generator=generator, dtype=torch.float64)
    return x, w


@pytest.mark.parametrize("name", FIXED + TURNED)
@pytest.mark.parametrize("backend", ["statevector", "fourier", "pennylane", "qiskit"])
def test_values_and_slopes(name, backend):
    circuit = circuit_with(name)
    x, w = drawn(circuit)
    x.requires_grad_()
    w.requires_grad_()
    values = simulate(circuit, x, w, backend=backend)
    mix = torch.tensor([[0.3, -1.0, 0.7], [1.1, 0.2, -0.4]], dtype=torch.float64)
    (values * mix).sum().backward()
    slope = np.zeros(circuit.n_weights)
    for row in range(2):
        expected, by_input, by_weight = oracle.run(circuit, x[row].detach().numpy(), w.detach().numpy())
        np.testing.assert_allclose(values[row].detach(), expected, atol=1e-10)
        np.testing.assert_allclose(x.grad[row], mix[row].numpy() @ by_input, atol=1e-10)
        slope += mix[row].numpy() @ by_weight
    np.testing.assert_allclose(w.grad, slope, atol=1e-10)


@pytest.mark.parametrize("name", FIXED + TURNED)
def test_compiled_loops_take_them(name):
    pytest.importorskip("llvmlite")
    circuit = circuit_with(name)
    assert register(circuit) is not None
    x, w = drawn(circuit)
    values = load_backend("statevector").compile(circuit)(x, w[None])[:, 0]
    for row in range(2):
        np.testing.assert_allclose(values[row], oracle.run(circuit, x[row].numpy(), w.numpy())[0], atol=1e-10)


@pytest.mark.parametrize("name", ["CCX", "CSWAP", "SQSWAP", "CU3"])
@pytest.mark.parametrize("backend", ["fourier", "pennylane", "qiskit"])
def test_noise_follows_the_gate_as_a_whole(name, backend):
    circuit = circuit_with(name)
    noise = NoiseModel(((name, Channel("depolarizing", 0.2)), ("CNOT", Channel("bit_flip", 0.5))))
    x, w = drawn(circuit)
    chosen = load_backend("pennylane", device="default.mixed") if backend == "pennylane" else backend
    values = simulate(circuit, x, w, backend=chosen, noise=noise)
    for row in range(2):
        expected = oracle.run_noisy(circuit, x[row].numpy(), w.numpy(), noise)
        np.testing.assert_allclose(values[row], expected, atol=1e-10)


@pytest.mark.parametrize("name", ["CCZ", "CSWAP"])
def test_amplitude_encoding_meets_three_wires(name):
    features = tuple(Angle("input", k) for k in range(8))
    circuit = Circuit(
        3,
        (
            Gate("Amplitude", (0, 1, 2), features),
            Gate("H", (1,)),
            Gate(name, (1, 2, 0)),
            Gate("RX", (0,), (Angle("weight", 0),)),
        ),
        ("ZYI", "XIX"),
    )
    x, w = drawn(circuit)
    for backend in ("statevector", "fourier", "auto"):
        values = simulate(circuit, x, w, backend=backend)
        for row in range(2):
            np.testing.assert_allclose(values[row], oracle.run(circuit, x[row].numpy(), w.numpy())[0], atol=1e-10)


def test_a_layer_with_three_wires_in_single_precision_is_its_surrogate():
    layer = QuantumConv2d(1, 3, (1, 3), kernel=circuit_with("CCX"))
    images = torch.rand(2, 1, 4, 6)
    torch.testing.assert_close(layer.to_classical()(images), layer(images), atol=1e-5, rtol=0)


def test_devices_run_the_parts_of_gates_on_three_wires():
    counts = device_counts(
        Circuit(3, (Gate("CSWAP", (0, 1, 2)), Gate("CU3", (0, 1), (Angle("weight", 0),) * 3))), 1, 1, 1
    )
    # CSWAP is a Toffoli, 6 CNOTs and 9 gates on one wire, between two CNOTs.
    assert (counts["device:gates_2q"], counts["device:gates_1q"]) == (9, 9)
