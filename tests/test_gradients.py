import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from strategies import circuits

from circuits import GATES, Angle, Circuit, Gate, kernel
from circuits.circuit import const
from qconv import QuantumConv2d, load_backend
from qconv.gradients import ParameterShift, compile_differentiable


def shift(circuit, backend="statevector"):
    return ParameterShift(load_backend(backend), circuit, shots=None, noise=None, seed=None)


def gradients(compiled, circuit):
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.uniform(-1, 1, (4, circuit.n_inputs))).requires_grad_()
    w = torch.from_numpy(rng.normal(size=(2, circuit.n_weights))).requires_grad_()
    values = compiled(x, w)
    if not values.requires_grad:
        return []
    weighting = torch.linspace(0.5, 1.5, values.numel(), dtype=values.dtype).reshape(values.shape)
    grads = torch.autograd.grad((values * weighting).sum(), (x, w), allow_unused=True, materialize_grads=True)
    return [values.detach(), *grads]


@settings(max_examples=60)
@given(circuits())
def test_parameter_shift_is_autograd(circuit):
    autograd = load_backend("statevector").compile(circuit)
    for ours, theirs in zip(gradients(shift(circuit), circuit), gradients(autograd, circuit), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-11, rtol=0)


@pytest.mark.parametrize("features", [3, 4])
def test_amplitudes_have_an_exact_two_term_rule(features):
    circuit = kernel("strongly_entangling", 2, encoding="amplitude", features=features)
    autograd = load_backend("statevector").compile(circuit)
    for ours, theirs in zip(gradients(shift(circuit), circuit), gradients(autograd, circuit), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-11, rtol=0)


def test_only_what_needs_a_gradient_is_shifted(monkeypatch):
    circuit = kernel("basic_entangler", 2, depth=1)
    compiled = shift(circuit)
    rows = []
    inner = compiled._compiled
    compiled._compiled = lambda x, w: rows.append(len(x)) or inner(x, w)
    x, w = torch.zeros(3, 2), torch.zeros(1, 2, requires_grad=True)
    compiled(x, w).sum().backward()
    assert sum(rows) == compiled.executions(3, 1, inputs=False) == 3 * (1 + 2 * 2)
    rows.clear()
    compiled(x.requires_grad_(), w).sum().backward()
    assert sum(rows) == compiled.executions(3, 1) == 3 * (1 + 2 * 4)


def test_four_terms_for_a_controlled_rotation():
    circuit = Circuit(2, (Gate("H", (0,)), Gate("CRX", (0, 1), (Angle("weight", 0),))), ("ZZ",))
    assert shift(circuit).executions(1, 1) == 1 + 4


def test_large_batches_are_split(monkeypatch):
    import qconv.gradients as module

    circuit = kernel("heisenberg", 2, depth=1)
    whole = gradients(shift(circuit), circuit)
    monkeypatch.setattr(module, "ROWS_A_CALL", 9)
    for a, b in zip(gradients(shift(circuit), circuit), whole, strict=True):
        torch.testing.assert_close(a, b)


def test_exact_backends_are_not_wrapped():
    circuit = kernel("heisenberg", 2)
    for name, wrapped in [("fourier", False), ("statevector", False), ("pennylane", False), ("qiskit", True)]:
        compiled = compile_differentiable(load_backend(name), circuit)
        assert isinstance(compiled, ParameterShift) == wrapped
        assert compiled.differentiable


@pytest.mark.parametrize(
    "backend", [load_backend("qiskit"), load_backend("pennylane", device="lightning.qubit")], ids=["aer", "lightning"]
)
def test_two_quantum_layers_stack_and_train(backend):
    def model(where):
        torch.manual_seed(0)
        options = {"kernel": "strongly_entangling", "depth": 1, "backend": where, "dtype": torch.float64}
        return torch.nn.Sequential(QuantumConv2d(1, 2, (1, 2), **options), QuantumConv2d(2, 2, 1, **options))

    images = torch.rand(2, 1, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    losses = {}
    for where in ("statevector", backend):
        net = model(where)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.3)
        losses[str(where)] = []
        for _ in range(4):
            optimizer.zero_grad()
            loss = (net(images) - 0.3).square().mean()
            loss.backward()
            optimizer.step()
            losses[str(where)].append(loss.item())
    exact, simulated = losses.values()
    np.testing.assert_allclose(simulated, exact, atol=1e-10)
    assert simulated[-1] < simulated[0]


def test_gradients_from_shots_scatter_around_the_exact_ones():
    circuit = kernel("strongly_entangling", 2, depth=1)
    sampled = ParameterShift(load_backend("qiskit"), circuit, shots=2000, noise=None, seed=3)
    _, _, ours = gradients(sampled, circuit)
    _, _, exact = gradients(shift(circuit), circuit)
    # Each entry sums 8 terms (4 patches, 2 outputs) of weight up to 1.5, each a difference of two means of +-1.
    sigma = (8 * 1.5**2 * 2 / 4 / 2000) ** 0.5
    assert (ours - exact).abs().max() < 5 * sigma
    assert (ours - exact).abs().max() > 0


ANGLED = [(name, k) for name, spec in GATES.items() for k in range(spec.n_angles or 0)]


@pytest.mark.parametrize(("name", "place"), ANGLED)
def test_the_rule_of_every_gate_is_exact(name, place):
    # The generator's gaps, from the definition of the gate.
    wires = (2, 0)[: GATES[name].n_wires]
    (generator,) = [g for k, g in oracle.generator_steps(name, wires, 3) if k == place]
    levels = np.linalg.eigvalsh(generator)
    gaps = np.unique(np.round(np.abs(levels[:, None] - levels), 12))[1:]
    assert GATES[name].frequencies[place] == tuple(gaps)
    # Its slope among gates on three wires, which have no angles and change the generator's place, not its gaps.
    others = (0.7, -0.4, 1.1)
    angles = tuple(Angle("weight", 0) if k == place else const(others[k]) for k in range(GATES[name].n_angles))
    mix = tuple(Gate("Rot", (wire,), tuple(const(0.4 * wire + a) for a in others)) for wire in range(3))
    before = (*mix, Gate("CSWAP", (1, 2, 0)), Gate("CCX", (0, 1, 2)))
    after = (Gate("CCZ", (2, 0, 1)), *mix, Gate("CSWAP", (0, 1, 2)))
    circuit = Circuit(3, (*before, Gate(name, wires, angles), *after), ("ZII", "XYI", "YZX"))
    w = torch.tensor([[0.3], [-1.9]], dtype=torch.float64, requires_grad=True)
    values = shift(circuit)(torch.zeros(1, 0, dtype=torch.float64), w)
    for k in range(3):
        (slope,) = torch.autograd.grad(values[0, :, k].sum(), w, retain_graph=True)
        want = [oracle.run(circuit, np.zeros(0), row.detach().numpy())[2][k] for row in w]
        np.testing.assert_allclose(slope, want, atol=1e-11)
    assert shift(circuit).executions(1, 1) == 1 + 2 * len(gaps)
    assert np.abs(want).max() > 1e-3


def test_gates_on_three_wires_have_no_angles():
    wide = [spec for spec in GATES.values() if spec.n_wires == 3]
    assert {spec.name for spec in wide} == {"CCX", "CCZ", "CSWAP"}
    assert all(spec.n_angles == 0 and not spec.rotations for spec in wide)
