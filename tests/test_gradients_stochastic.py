"""Gradients from evaluations that are chosen: finite differences and simultaneous perturbation."""

import itertools

import numpy as np
import oracle
import pytest
import torch

import qconv.gradients as module
from circuits import Angle, Circuit, Gate, kernel
from qconv import QuantumConv2d, load_backend, simulate
from qconv.gradients import differentiate, executions

# <ZZZ> behind RX(a_0), RX(a_1), RX(a_2) is cos a_0 cos a_1 cos a_2.
COSINES = Circuit(3, tuple(Gate("RX", (k,), (Angle("input", k),)) for k in range(3)), ("ZZZ",))
POINT = np.array([0.4, -0.9, 0.7])


def enumerate_spsa(f, point, step):
    """The estimates of a gradient for every direction of signs: (2^n, n)."""
    directions = np.array(list(itertools.product((-1, 1), repeat=len(point))))
    return np.array([(f(point + step * d) - f(point - step * d)) / (2 * step) * d for d in directions])


def sampled(circuit, point, step, rows=4000, **options):
    """Estimates of the input gradient of one point, each drawn on its own: (rows, n)."""
    backend = differentiate("statevector", "spsa", step=step, **options)
    x = torch.from_numpy(np.tile(point, (rows, 1))).requires_grad_()
    w = torch.zeros(1, circuit.n_weights, dtype=torch.float64)
    simulate(circuit, x, w[0], backend=backend, seed=3).sum().backward()
    return x.grad.numpy()


@pytest.mark.parametrize("step", [0.1, 0.8])
def test_spsa_scatters_around_the_damped_gradient(step):
    estimates = sampled(COSINES, POINT, step)
    every = enumerate_spsa(lambda a: np.cos(a).prod(), POINT, step)
    # Each estimate is that of one of the directions.
    distance = np.abs(estimates[:, None] - every).max(-1)
    assert distance.min(1).max() < 1e-12
    # Its share of the true slope in closed form.
    slope = -np.tan(POINT) * np.cos(POINT).prod()
    mean = slope * np.sin(step) / step * np.cos(step) ** 2
    np.testing.assert_allclose(every.mean(0), mean, atol=1e-14)
    deviation = every.std(0)
    assert np.all(np.abs(estimates.mean(0) - mean) < 4.5 * deviation / len(estimates) ** 0.5)
    # The variance, whose estimate scatters by its kurtosis.
    squares = (estimates - mean) ** 2
    assert np.all(np.abs(squares.mean(0) - deviation**2) < 4.5 * squares.std(0) / len(squares) ** 0.5)


def test_the_variance_of_spsa_is_that_of_the_other_slopes():
    # To lowest order in the step.
    every = enumerate_spsa(lambda a: np.cos(a).prod(), POINT, 1e-3)
    slope = -np.tan(POINT) * np.cos(POINT).prod()
    np.testing.assert_allclose(every.var(0), (slope**2).sum() - slope**2, atol=1e-5)


def test_spsa_is_unbiased_to_second_order():
    circuit = Circuit(
        2,
        (
            Gate("RY", (0,), (Angle("input", 0, 1.5, 0.2),)),
            Gate("CRX", (0, 1), (Angle("input", 1),)),
            Gate("CRot", (1, 0), (Angle("input", 2), Angle("input", 0, -0.5), Angle("input", 1, 0.3))),
        ),
        ("ZX",),
    )
    # Every angle is moved on its own, so the directions are those of five free angles.
    free = module.with_free_angles(circuit)
    x = np.array([0.3, 0.8, -0.5])
    point = np.array([1.5 * x[0] + 0.2, x[1], x[2], -0.5 * x[0], 0.3 * x[1]])
    chain = np.array([[1.5, 0, 0], [0, 1, 0], [0, 0, 1], [-0.5, 0, 0], [0, 0.3, 0]])

    def value(angles):
        return oracle.run(free, angles, np.zeros(0))[0][0]

    slope = oracle.run(circuit, x, np.zeros(0))[1][0]
    bias = {step: enumerate_spsa(value, point, step).mean(0) @ chain - slope for step in (0.1, 0.2)}
    np.testing.assert_allclose(bias[0.2], 4 * bias[0.1], rtol=0.05)
    # And this is what is sampled.
    every = enumerate_spsa(value, point, 0.2) @ chain
    estimates = sampled(circuit, x, 0.2, rows=1500)
    assert np.abs(estimates[:, None] - every).max(-1).min(1).max() < 1e-12
    assert np.all(np.abs(estimates.mean(0) - every.mean(0)) < 4.5 * every.std(0) / len(estimates) ** 0.5)


def test_more_samples_scatter_less():
    one, many = (sampled(COSINES, POINT, 0.1, rows=2000, samples=samples) for samples in (1, 9))
    np.testing.assert_allclose(one.std(0) / many.std(0), 3, rtol=0.1)


def test_amplitudes_are_perturbed_too():
    circuit = Circuit(
        2, (Gate("Amplitude", (0, 1), tuple(Angle("input", k) for k in range(3))), Gate("CH", (0, 1))), ("ZX",)
    )
    x, step = np.array([0.6, -0.3, 0.9]), 0.1
    size = np.linalg.norm(x)

    def value(units):
        return oracle.run(circuit, units, np.zeros(0))[0][0]

    every = enumerate_spsa(value, x / size, step) / size
    estimates = sampled(circuit, x, step, rows=1500)
    assert np.abs(estimates[:, None] - every).max(-1).min(1).max() < 1e-12
    bias = [
        enumerate_spsa(value, x / size, h).mean(0) / size - oracle.run(circuit, x, np.zeros(0))[1][0]
        for h in (step, step / 2)
    ]
    np.testing.assert_allclose(bias[0], 4 * bias[1], rtol=0.1)
    assert not sampled(circuit, 0 * x, step, rows=3).any()


def train_gradients(backend, circuit, seed=0, dtype=torch.float64, **options):
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.uniform(-1, 1, (3, circuit.n_inputs))).to(dtype).requires_grad_()
    w = torch.from_numpy(rng.normal(size=(2, circuit.n_weights))).to(dtype).requires_grad_()
    values = simulate(circuit, x, w, backend=backend, seed=seed, **options)
    factors = torch.linspace(0.5, 1.5, values.numel(), dtype=dtype).reshape(values.shape)
    return [values.detach(), *torch.autograd.grad((values * factors).sum(), (x, w))]


@pytest.mark.parametrize("backend", ["statevector", "qiskit"])
def test_spsa_repeats_under_a_seed_and_differs_between_seeds(backend):
    circuit = kernel("heisenberg", 2, 1)
    options = {"shots": 50} if backend == "qiskit" else {}
    spsa = differentiate(backend, "spsa")
    first, again, other = (train_gradients(spsa, circuit, seed, **options) for seed in (1, 1, 2))
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first[2], other[2])
    torch.manual_seed(5)
    free = train_gradients(spsa, circuit, None)
    torch.manual_seed(5)
    assert torch.equal(free[2], train_gradients(spsa, circuit, None)[2])
    assert not torch.equal(free[2], train_gradients(spsa, circuit, None)[2])


def test_directions_do_not_depend_on_the_size_of_calls(monkeypatch):
    circuit = kernel("heisenberg", 2, 1)
    spsa = differentiate("statevector", "spsa", samples=5)
    whole = train_gradients(spsa, circuit)
    monkeypatch.setattr(module, "ROWS_A_CALL", 25)
    for a, b in zip(train_gradients(spsa, circuit), whole, strict=True):
        torch.testing.assert_close(a, b, atol=1e-13, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("encoding", ["angle", "amplitude"])
def test_finite_differences_are_autograd(encoding, dtype):
    circuit = kernel("strongly_entangling", 2, 1, encoding=encoding, readout=["ZI", "XY"])
    ours = train_gradients(differentiate("statevector", "finite-diff"), circuit, dtype=dtype)
    exact = train_gradients("statevector", circuit)
    for a, b in zip(ours, exact, strict=True):
        assert a.dtype == dtype
        # Truncation h^2 / 6 and rounding eps / h, times a sum of 12 outputs and angles scaled by pi.
        torch.testing.assert_close(a.double(), b, atol=2e-9 if dtype == torch.float64 else 2e-5, rtol=0)
    # A sine in place of a slope for a step that is not small: sin(h) / h of it, for every Pauli rotation.
    wide = differentiate("statevector", "finite-diff", step=0.5)
    if encoding == "angle":
        for a, b in zip(train_gradients(wide, circuit)[1:], exact[1:], strict=True):
            torch.testing.assert_close(a, b * np.sin(0.5) / 0.5, atol=1e-12, rtol=0)


class Counting:
    """A backend that counts rows and calls."""

    name = "counting"

    def __init__(self):
        self.rows, self.calls = 0, 0

    def compile(self, circuit, **options):
        inner = load_backend("statevector").compile(circuit, **options)
        outer = self

        class Compiled:
            differentiable = False
            counts = inner.counts

            def __call__(self, inputs, weights):
                outer.rows += len(inputs) * len(weights)
                outer.calls += 1
                return inner(inputs, weights)

        return Compiled()


@pytest.mark.parametrize("encoding", ["angle", "amplitude"])
@pytest.mark.parametrize(
    ("method", "options", "inputs", "both"),
    [
        ("parameter-shift", {}, 1 + 2 * 4, {"angle": 1 + 2 * 6, "amplitude": 1 + 2 * 4 + 2 * 3 + 1}),
        ("finite-diff", {}, 1 + 2 * 4, {"angle": 1 + 2 * 6, "amplitude": 1 + 2 * 4 + 2 * 3 + 1}),
        ("spsa", {"samples": 3}, 1 + 2 * 3, {"angle": 1 + 2 * 3, "amplitude": 1 + 2 * 3}),
    ],
)
def test_executions_are_what_runs(method, options, inputs, both, encoding):
    circuit = kernel("basic_entangler", 2, 2, encoding=encoding, features=3 if encoding == "amplitude" else 2)
    for wanted, per_pair in ((False, inputs), (True, both[encoding])):
        backend = Counting()
        x = torch.full((5, circuit.n_inputs), 0.3, requires_grad=wanted)
        w = torch.zeros(2, circuit.n_weights, requires_grad=True)
        simulate(circuit, x, w, backend=differentiate(backend, method, **options)).sum().backward()
        assert backend.rows == executions(circuit, 5, 2, method=method, inputs=wanted, **options) == 10 * per_pair
        compiled = differentiate(backend, method, **options).compile(circuit)
        assert compiled.executions(5, 2, inputs=wanted) == backend.rows
        # All patches and filters, and where features are angles all shifts, in one call each way.
        if encoding == "angle":
            assert backend.calls == 2


def train_two_layers(backend, shots=None):
    torch.manual_seed(0)
    options = {"kernel": "strongly_entangling", "depth": 1, "backend": backend, "shots": shots, "seed": 1}
    net = torch.nn.Sequential(QuantumConv2d(1, 2, (1, 2), **options), QuantumConv2d(2, 2, 1, **options))
    images = torch.rand(2, 1, 2, 3, generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.3)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = (net(images) + 0.4).square().mean()
        loss.backward()
        assert net[0].weight.grad.abs().max() > 0
        optimizer.step()
        losses.append(loss.item())
    return losses, net


@pytest.mark.parametrize("shots", [None, 300])
def test_two_layers_train_by_spsa_almost_as_by_autograd(shots):
    exact, _ = train_two_layers("statevector")
    backend = differentiate("qiskit" if shots else "statevector", "spsa", samples=8, step=0.3 if shots else 0.1)
    losses, net = train_two_layers(backend, shots)
    assert losses[0] - np.mean(losses[-3:]) > 0.7 * (exact[0] - np.mean(exact[-3:])) > 0.1
    assert net[0].backend == ("qiskit (spsa)" if shots else "statevector (spsa)")


def test_parameter_shifts_of_an_exact_backend_are_its_gradient():
    circuit = kernel("heisenberg", 2, 1)
    for name in ("statevector", "auto"):
        for ours, exact in zip(
            train_gradients(differentiate(name), circuit), train_gradients("statevector", circuit), strict=True
        ):
            torch.testing.assert_close(ours, exact, atol=1e-10, rtol=0)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: differentiate("statevector", "spas"), "did you mean 'spsa'"),
        (lambda: executions(COSINES, 1, method="spas"), "did you mean 'spsa'"),
        (lambda: differentiate("statevectr"), "did you mean 'statevector'"),
        (lambda: differentiate("statevector", samples=2), "samples is 2 for method 'parameter-shift'"),
        (lambda: differentiate("statevector", "spsa", samples=0), "samples is 0"),
        (lambda: differentiate("statevector", "spsa", samples=True), "samples is True"),
        (lambda: differentiate("statevector", "spsa", step=0.0), "step is 0.0"),
        (lambda: differentiate("statevector", "spsa", step=2.0), "below pi/2"),
        (lambda: differentiate("statevector", step=0.1), "step is 0.1 for method 'parameter-shift'"),
        (lambda: differentiate("statevector", "spsa").compile(COSINES, shots=0), "shots is 0"),
        (lambda: differentiate("qiskit", "finite-diff").compile(COSINES, shots=10), "such as step=0.5"),
        (
            lambda: differentiate("fourier").compile(kernel("heisenberg", 2)),
            "backend 'fourier' does not take",
        ),
    ],
)
def test_errors_say_what_works(call, says):
    with pytest.raises(ValueError) as error:
        call()
    assert says in str(error.value)
