"""Extrapolation to zero noise where circuits are transpiled: folds stay, and noise grows as they say."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from qiskit.providers.fake_provider import GenericBackendV2
from qiskit_aer import AerSimulator
from qiskit_aer.noise import NoiseModel as AerNoiseModel
from qiskit_aer.noise import depolarizing_error
from test_qiskit_backend import LINE, draw, expected

from circuits import Circuit, Gate, ReadoutError, kernel
from qconv import QuantumConv2d, load_backend, simulate
from qconv.distribution import distribute
from qconv.gradients import differentiate
from qconv.mitigation import ReadoutInversion, ZeroNoise

CIRCUIT = kernel("strongly_entangling", 3, 2, readout=["ZII", "XYI", "IIZ"])
PLAIN = {"coupling_map": LINE, "basis_gates": ["rz", "sx", "x", "cx"]}


def errors(p=0.05, gates=("cx",), width=2):
    model = AerNoiseModel()
    model.add_all_qubit_quantum_error(depolarizing_error(p, width), list(gates))
    return model


def device(**options):
    return GenericBackendV2(4, seed=1, coupling_map=LINE, **options)


BACKENDS = {
    "device": lambda: load_backend("qiskit", device=device()),
    "noise of a device": lambda: load_backend("qiskit", noise_model=device()),
    "level 3": lambda: load_backend("qiskit", noise_model=device(), optimization_level=3),
    "level 0": lambda: load_backend("qiskit", noise_model=device(), optimization_level=0),
    "coupling map": lambda: load_backend("qiskit", coupling_map=LINE, noise_model=errors(0.02)),
    "simulator": lambda: load_backend("qiskit", device=AerSimulator.from_backend(device())),
    "wrapped": lambda: ReadoutInversion(
        differentiate(distribute(device(), ThreadPoolExecutor(1)), "spsa"), ReadoutError(0.01, 0.02)
    ),
}


@pytest.mark.parametrize("name", BACKENDS)
def test_gates_on_two_qubits_grow_with_the_scale(name):
    backend = BACKENDS[name]()
    own = QuantumConv2d(1, 3, (1, 3), kernel=CIRCUIT, backend=backend, shots=10).cost((1, 3, 3))
    per_scale = own.gates_2q
    assert per_scale >= 3 * 2 * 12
    costs = [
        QuantumConv2d(1, 3, (1, 3), kernel=CIRCUIT, backend=ZeroNoise(backend, (1, scale)), shots=10).cost((1, 3, 3))
        for scale in (3, 5)
    ]
    assert [cost.gates_2q for cost in costs] == [per_scale * (1 + scale) for scale in (3, 5)]
    assert costs[0].circuits == 2 * own.circuits
    # A kernel's angle is one angle in all folds of its gates.
    assert costs[0].step == 2 * own.step


def test_folds_do_nothing_where_there_is_no_noise():
    x, w = draw(CIRCUIT, 2, 1)
    for options in (PLAIN, {"coupling_map": LINE, "basis_gates": ["u", "cz"]}, {"basis_gates": ["h", "p", "cz"]}):
        backend = load_backend("qiskit", **options)
        folded = simulate(CIRCUIT, x, w, backend=backend.folded(5))
        torch.testing.assert_close(folded, expected(CIRCUIT, x, w), atol=1e-10, rtol=0)


@pytest.mark.parametrize("level", [0, 3])
def test_noise_grows_as_the_scale_says(level):
    # Depolarizing noise of both wires multiplies every expectation value by 1 - p; a kernel of two CNOTs that level 3
    # would cancel with their folds.
    circuit = kernel("strongly_entangling", 2, 1, readout=["ZI", "XY"])
    x, w = draw(circuit)
    exact = expected(circuit, x, w)
    backend = load_backend("qiskit", noise_model=errors(), coupling_map=[[0, 1], [1, 0]], optimization_level=level)
    gates = backend.compile(circuit)._program.circuits[0].count_ops()["cx"]
    assert gates == 2
    for scale in (1, 3, 5):
        got = simulate(circuit, x, w, backend=backend.folded(scale))
        torch.testing.assert_close(got, exact * 0.95 ** (gates * scale), atol=1e-10, rtol=0)
    decay = ZeroNoise(backend, extrapolation="exponential")
    torch.testing.assert_close(simulate(circuit, x, w, backend=decay), exact, atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", ["noise of a device", "coupling map", "simulator"])
def test_errors_of_devices_are_reduced_with_routing(name):
    backend = BACKENDS[name]()
    if name == "simulator":
        backend = load_backend("qiskit", device=AerSimulator.from_backend(device(), method="density_matrix"))
    x, w = draw(CIRCUIT, 2, 1)
    exact = expected(CIRCUIT, x, w)
    off = [
        float((simulate(CIRCUIT, x, w, backend=b) - exact).square().mean().sqrt())
        for b in (backend, ZeroNoise(backend, extrapolation="richardson"))
    ]
    assert off[0] > 0.01
    assert off[1] < 0.3 * off[0]


def test_gradients_of_devices_are_mitigated():
    circuit = kernel("strongly_entangling", 2, 1)
    x, w = draw(circuit, 2, 1)
    backend = load_backend("qiskit", noise_model=errors(0.03), coupling_map=LINE)
    slopes = []
    for runner in ("statevector", backend, ZeroNoise(backend, (1, 3, 5), "richardson")):
        inputs, weights = x.clone().requires_grad_(), w.clone().requires_grad_()
        simulate(circuit, inputs, weights, backend=runner).square().sum().backward()
        slopes.append(torch.cat([inputs.grad.flatten(), weights.grad.flatten()]))
    before, after = ((s - slopes[0]).norm() for s in slopes[1:])
    assert before > 0.05
    assert after < 0.05 * before


def test_devices_themselves_are_taken():
    layer = QuantumConv2d(1, 4, 2, kernel="strongly_entangling", backend=ZeroNoise(device(), (1, 3)), shots=50, seed=0)
    layer(torch.rand(1, 1, 3, 3)).sum().backward()
    assert layer.weight.grad.isfinite().all()
    assert "zero-noise" in layer.backend


SX = Circuit(1, (Gate("SX", (0,)), Gate("SX", (0,))), ("Z",))
NAMES = ["h", "s", "sdg"]
S = Circuit(1, (Gate("H", (0,)), Gate("S", (0,)), Gate("H", (0,))), ("Z",))


def compiled(circuit, scales=(1, 3), gates=None, **options):
    return ZeroNoise(load_backend("qiskit", **options), scales, gates=gates).compile(circuit)


@pytest.mark.parametrize(
    ("attempt", "says"),
    [
        (lambda: compiled(CIRCUIT, (1, 2), **PLAIN), "scales are (1, 2) and gates None"),
        (lambda: compiled(CIRCUIT, gates=("CNOT",), **PLAIN), "gates ('CNOT',), but qiskit transpiles"),
        # Sdg has no noise, so that one of three gates has none.
        (lambda: compiled(S, noise_model=errors(gates=["s"], width=1), basis_gates=NAMES), "from (1, 0) into (2, 0)"),
        # SX is undone by RZ SX RZ.
        (lambda: compiled(SX, noise_model=errors(gates=["sx", "rz"], width=1)), "from (2, 0) into (10, 0)"),
        (lambda: compiled(SX, noise_model=errors(gates=["x"], width=1)), "none of which has noise"),
        (lambda: compiled(CIRCUIT, basis_gates=["iswap", "rz", "sx"]), "gate iswap cannot be folded"),
    ],
)
def test_noise_that_would_not_grow_by_the_scale_is_refused(attempt, says):
    with pytest.raises(ValueError) as error:
        attempt()
    assert says in str(error.value)


def test_a_gate_and_an_inverse_that_are_alike_noisy_are_folded():
    model = errors(gates=["s", "sdg"], width=1)
    none = torch.zeros(1, 0, dtype=torch.float64)
    backend = load_backend("qiskit", noise_model=model, basis_gates=NAMES)
    for circuit, number in ((S, 1), (Circuit(1, (*S.gates[:2], Gate("S", (0,)), S.gates[2]), ("Z",)), 2)):
        got, exact = (simulate(circuit, none, none, backend=b) for b in (backend.folded(3), "statevector"))
        torch.testing.assert_close(got, exact * 0.95 ** (3 * number))
