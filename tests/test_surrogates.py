from math import pi, prod

import numpy as np
import oracle
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from strategies import circuits

from circuits import Angle, Channel, Circuit, Gate, NoiseModel, kernel
from qconv import Unsupported, simulate
from qconv.backends.statevector import StatevectorBackend
from qconv.patches import unfold
from qconv.surrogates import spectrum_of, surrogate

NOISE = NoiseModel((("*", Channel("amplitude_damping", 0.1)), ("CNOT", Channel("depolarizing", 0.05))))


def uniform(*shape, seed=0, low=-2.0, high=2.0):
    generator = torch.Generator().manual_seed(seed)
    return low + (high - low) * torch.rand(*shape, generator=generator, dtype=torch.float64)


def reuploading(wires=2, uploads=2, name="heisenberg", readout="z"):
    block = kernel(name, wires, 1, readout=readout)
    result = block
    for k in range(1, uploads):
        result = result + block.shift_weights(k * block.n_weights)
    return result


def rescaled(circuit, scales):
    """Every angle that reads an input gets one of the scales in turn."""
    position = iter(range(10**6))

    def angle(a):
        return Angle("input", a.index, scales[next(position) % len(scales)], a.offset) if a.source == "input" else a

    gates = tuple(Gate(g.name, g.wires, tuple(angle(a) for a in g.angles)) for g in circuit.gates)
    return Circuit(circuit.n_wires, gates, circuit.observables)


@settings(max_examples=40)
@given(
    circuit=circuits(),
    scales=st.lists(st.sampled_from([pi, -2 * pi, pi / 2, 1.5 * pi, 0.0]), min_size=1, max_size=3),
    seed=st.integers(0, 99),
)
def test_any_circuit_that_reads_by_rotations_is_its_surrogate(circuit, scales, seed):
    assume(circuit.n_inputs and circuit.gates[0].name != "Amplitude")
    circuit = rescaled(circuit, scales)
    assume(circuit.n_inputs and prod(spectrum_of(circuit).sizes) <= 3000)
    weights, x = uniform(circuit.n_weights, seed=seed), uniform(3, circuit.n_inputs, seed=seed + 1)
    got = surrogate(circuit, weights, "statevector")(x)
    want = np.stack([oracle.run(circuit, row, weights.numpy())[0] for row in x.numpy()])
    np.testing.assert_allclose(got, want, atol=1e-10)


@pytest.mark.parametrize("noise", [None, NOISE], ids=["clean", "noisy"])
@pytest.mark.parametrize("uploads", [1, 2])
@pytest.mark.parametrize("backend", ["auto", "statevector", "fourier", "pennylane", "qiskit"])
def test_every_exact_backend(backend, uploads, noise):
    if (backend == "statevector" and noise) or (backend == "fourier" and uploads == 2):
        return
    if backend == "pennylane" and noise:
        from qconv import load_backend

        backend = load_backend("pennylane", device="default.mixed")
    circuit = reuploading(uploads=uploads, readout=["ZI", "XY"])
    weights, x = uniform(2, circuit.n_weights), uniform(4, 2, seed=1)
    found = surrogate(circuit, weights, backend, noise=noise)
    assert found.spectrum.degrees == (uploads, uploads)
    if noise is None:
        want = np.stack([[oracle.run(circuit, r, w)[0] for w in weights.numpy()] for r in x.numpy()])
    else:
        want = np.stack([[oracle.run_noisy(circuit, r, w, noise) for w in weights.numpy()] for r in x.numpy()])
    np.testing.assert_allclose(found(x), want, atol=1e-10)
    assert (found.standard_error(x) == 0).all()
    assert found.standard_error(x).shape == want.shape
    assert (found.coefficient_errors == 0).all()


def test_one_filter_has_no_filter_axis_and_inputs_have_gradients():
    circuit = reuploading()
    weights = uniform(circuit.n_weights)
    found = surrogate(circuit, weights)
    x = uniform(3, 2, seed=1).requires_grad_()
    (got,) = torch.autograd.grad(found(x).square().sum(), x)
    (want,) = torch.autograd.grad(simulate(circuit, x, weights).square().sum(), x)
    torch.testing.assert_close(got, want)
    assert found(x).shape == (3, 2)
    assert surrogate(circuit, weights.float())(x.float()).dtype == torch.float32


def reading(*angles, gate="RX"):
    return Circuit(1, tuple(Gate(gate, (0,), (angle,)) for angle in angles), ("Z",))


def test_frequencies_follow_from_scales_and_spectral_gaps():
    x = lambda scale, index=0: Angle("input", index, scale)  # noqa: E731
    assert spectrum_of(reading(x(pi))).frequencies == (pi,)
    found = spectrum_of(reading(x(2.0), x(-3.0), x(0.0)))
    assert found.degrees == (5,)
    assert found.frequencies[0] == pytest.approx(1.0, abs=1e-15)
    assert spectrum_of(reading(x(0.1), x(0.3))).degrees == (4,)
    # A controlled rotation has the gaps 1/2 and 1.
    controlled = Circuit(2, (Gate("CRX", (0, 1), (x(pi),)), Gate("RX", (0,), (x(pi, 2),))), ("ZI",))
    found = spectrum_of(controlled)
    assert found.degrees == (2, 0, 1)
    assert found.frequencies == (pi / 2, pi, pi)
    assert spectrum_of(Circuit(1, (Gate("Rot", (0,), (x(1.0), x(1.0), x(1.0))),), ("Z",))).degrees == (3,)


class Counting:
    """Exact values of a circuit, and how many executions were asked for."""

    name = "counting"

    def __init__(self):
        self.executions = 0

    def compile(self, circuit, **options):
        compiled = StatevectorBackend().compile(circuit)

        def run(inputs, weights):
            self.executions += len(inputs) * len(weights)
            return compiled(inputs, weights)

        return run


def test_executions_are_what_ran_and_what_would_have():
    circuit = reuploading(uploads=2, readout=["ZI", "IZ"])
    backend = Counting()
    found = surrogate(circuit, uniform(3, circuit.n_weights), backend)
    assert found.executions == backend.executions == 5 * 5 * 3
    assert found.direct_executions((100, 2)) == 300
    assert "executions=75" in repr(found)
    layer = found.conv2d(1, 6, (1, 2), stride=(1, 2), padding=(0, 1))
    assert layer.executions == 75
    assert layer.direct_executions((1, 4, 8)) == 4 * 5 * 3
    assert layer.direct_executions((10, 1, 4, 8)) == 10 * 4 * 5 * 3
    # X and Z of one wire are measured apart.
    assert surrogate(circuit.with_observables(("XI", "ZI")), uniform(3, circuit.n_weights)).executions == 150


def test_layer_is_the_surrogate_on_each_patch():
    circuit = reuploading(uploads=2, readout=["ZI", "IZ", "XX"])
    weights, bias = uniform(4, circuit.n_weights), uniform(8, seed=4)
    found = surrogate(circuit, weights, "qiskit", shots=50, seed=3)
    layer = found.conv2d(4, 8, 1, groups=2, bias=bias)
    images = uniform(2, 4, 3, 3, seed=5)
    for value, patchwise, added in (
        (layer(images), found, bias),
        (layer.standard_error(images), found.standard_error, 0),
    ):
        groups = [patchwise(unfold(part, layer.geometry)).reshape(18, 4, 3) for part in images.chunk(2, dim=1)]
        want = torch.cat([g[:, 2 * k : 2 * k + 2].reshape(18, 6)[:, :4] for k, g in enumerate(groups)], dim=1) + added
        torch.testing.assert_close(value, want.reshape(2, 3, 3, 8).movedim(-1, 1))
    torch.testing.assert_close(layer.standard_error(images[0]), layer.standard_error(images)[0])
    assert not layer.weight.requires_grad
    assert not layer.bias.requires_grad
    assert (surrogate(circuit, weights).conv2d(4, 8, 1, groups=2).standard_error(images) == 0).all()
    single = surrogate(circuit, weights.float(), "qiskit", shots=50, seed=3).conv2d(4, 8, 1, groups=2)
    assert single.standard_error(images.float()).dtype == torch.float32
    assert single.double().standard_error(images).dtype == torch.float64


def dense_map(spectrum):
    """Matrix (K, K) from values on the grid to coefficients, by solving for the waves' values at its points."""
    rows = []
    for points, degree, frequency in zip(spectrum.points(), spectrum.degrees, spectrum.frequencies, strict=True):
        waves = [np.ones_like(points)]
        for k in range(1, degree + 1):
            waves += [np.sin(k * frequency * points), np.cos(k * frequency * points)]
        rows.append(np.linalg.inv(np.stack(waves, axis=1)))
    result = np.eye(1)
    for matrix in rows:
        result = np.kron(result, matrix)
    return result


def test_errors_are_propagated_with_all_covariances():
    circuit = rescaled(reuploading(uploads=2, readout=["ZI", "XY"]), [pi, pi, 2 * pi])
    found = surrogate(circuit, uniform(circuit.n_weights), "qiskit", shots=200, seed=1)
    x = uniform(5, 2, seed=2)
    to_coefficients = dense_map(found.spectrum)
    covariance = np.einsum("kg,og,lg->okl", to_coefficients, found.variances[0].numpy(), to_coefficients)
    a, b = (w.numpy() for w in found.spectrum.waves(x))
    waves = np.einsum("ip,jp->pij", a, b).reshape(5, -1)
    np.testing.assert_allclose(found(x), waves @ found.coefficients[0].numpy().T, atol=1e-12)
    want = np.sqrt(np.einsum("pk,okl,pl->po", waves, covariance, waves))
    np.testing.assert_allclose(found.standard_error(x), want, rtol=1e-9)
    errors = np.sqrt(np.einsum("okk->ok", covariance))
    np.testing.assert_allclose(found.coefficient_errors[0], errors, rtol=1e-9)


@pytest.mark.parametrize(("noise", "repeats"), [(None, 400), (NOISE, 50)], ids=["clean", "noisy"])
def test_standard_errors_are_the_spread_of_repeated_measurements(noise, repeats):
    # Filters with the same weights are independent surrogates of one kernel.
    shots = 60
    circuit = reuploading(uploads=1, readout=["ZI", "XY"])
    weights = uniform(circuit.n_weights, seed=8)
    exact = surrogate(circuit, weights, noise=noise)
    found = surrogate(circuit, weights.expand(repeats, -1), "qiskit", shots, noise=noise, seed=2)
    grid = torch.cartesian_prod(*(torch.from_numpy(p) for p in exact.spectrum.points()))
    # Cumulants of the mean of `shots` signs whose true mean is v: variance and fourth cumulant.
    variance = (1 - exact(grid).numpy() ** 2) / shots
    fourth = variance * (4 - 6 * shots * variance) / shots**2
    x = uniform(6, 2, seed=3)
    to_coefficients = dense_map(exact.spectrum)
    a, b = (w.numpy() for w in exact.spectrum.waves(x))
    to_values = np.einsum("ip,jp->pij", a, b).reshape(6, -1) @ to_coefficients
    by_point = (found(x).transpose(0, 1), exact(x), to_values, found.standard_error(x).transpose(0, 1))
    by_wave = (
        found.coefficients.mT,
        exact.coefficients[0].T,
        to_coefficients,
        found.coefficient_errors.mT,
    )
    for got, want, linear, stated in (by_point, by_wave):
        spread = linear**2 @ variance
        scores = (got - want).numpy() / np.sqrt(spread)
        # Scores have mean 0 and variance 1, their squares mean 1 and variance 2 + excess kurtosis: 5 standard
        # deviations of the means over the repeats.
        excess = linear**4 @ fourth / spread**2
        assert (np.abs(scores.mean(0)) < 5 / np.sqrt(repeats)).all()
        assert (np.abs((scores**2).mean(0) - 1) < 5 * np.sqrt((2 + excess) / repeats)).all()
        squares = stated.square().numpy()
        assert (np.abs(squares.mean(0) - spread) < 5 * squares.std(0) / np.sqrt(repeats)).all()


def test_shots_repeat_under_a_seed_and_one_shot_states_the_largest_error():
    circuit = reuploading()
    weights, x = uniform(circuit.n_weights), uniform(3, 2)
    first, second, other = (surrogate(circuit, weights, "qiskit", 20, seed=s)(x) for s in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert (surrogate(circuit, weights, "qiskit", 1, seed=0).variances == 1).all()


def test_large_grids_are_run_in_parts():
    circuit = kernel("heisenberg", 8, 1)
    weights, x = uniform(5, circuit.n_weights), uniform(2, 8)
    found = surrogate(circuit, weights)
    torch.testing.assert_close(found(x), simulate(circuit, x, weights), atol=1e-10, rtol=0)


class Untouchable:
    name = "untouchable"

    def compile(self, circuit, **options):
        raise AssertionError("a backend was asked before the circuit was refused")


def many(n):
    return Circuit(n, tuple(Gate("RX", (k,), (Angle("input", k, pi),)) for k in range(n)), ("Z" + "I" * (n - 1),))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda b: surrogate(many(11), torch.zeros(0), b), "177147 coefficients"),
        (lambda b: surrogate(many(11), torch.zeros(0), b), "up to 65536"),
        (lambda b: surrogate(reading(Angle("input", 0), Angle("input", 0, pi)), torch.zeros(0), b), "3.14159"),
        (lambda b: surrogate(reading(Angle("weight", 0)), torch.zeros(1), b), "0 inputs"),
        (lambda b: surrogate(many(2).with_observables(()), torch.zeros(0), b), "0 observables"),
        (lambda b: surrogate(many(2), torch.zeros(3), b), "0 weights but weights have shape (3,)"),
        (lambda b: surrogate(many(2), torch.zeros(0, dtype=torch.float16), b), "weights are torch.float16"),
        (lambda b: surrogate(many(2), torch.zeros(0))(torch.zeros(3, 4)), "shape (3, 4)"),
        (lambda b: surrogate(many(2), torch.zeros(0))(torch.zeros(3, 2).double()), "torch.float64"),
        (lambda b: surrogate(many(2), torch.zeros(0)).direct_executions((1, 8, 8)), "(1, 8, 8)"),
        (lambda b: surrogate(many(2), torch.zeros(2, 0)).conv2d(1, 3, (1, 2)), "2 filters of 1 observables but 3"),
        (lambda b: surrogate(many(2), torch.zeros(0)).conv2d(1, 1, 2), "2 entries but a patch has 4"),
        (
            lambda b: surrogate(many(2), torch.zeros(0)).conv2d(1, 1, (1, 2)).direct_executions((3, 8, 8)),
            "input_shape is (3, 8, 8)",
        ),
        (lambda b: surrogate(many(2), torch.zeros(0), shots=0), "shots is 0"),
    ],
)
def test_errors_say_both_values_before_anything_runs(make, says):
    with pytest.raises(ValueError) as error:
        make(Untouchable())
    assert says in str(error.value)


def test_amplitude_encoding_is_refused():
    with pytest.raises(Unsupported, match="4 amplitudes"):
        surrogate(kernel("product", 2, encoding="amplitude"), torch.zeros(18), Untouchable())
