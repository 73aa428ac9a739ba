"""Diagnostics of a kernel's states, gradients and waves, against closed forms and dense matrices."""

from math import log, pi

import numpy as np
import oracle
import pytest
import strategies
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from circuits import Angle, Channel, Circuit, Gate, NoiseModel, kernel
from circuits.ansatze import ansatz
from qconv import QuantumConv2d, simulate
from qconv.diagnostics import (
    barren_plateau,
    effective_dimension,
    entangling_capability,
    expressibility,
    fidelities,
    fourier_spectrum,
    gaussian_kernel,
    geometric_difference,
    gradient_variance,
    kernel_matrix,
    meyer_wallach,
    states,
    target_alignment,
)
from qconv.diagnostics.expressibility import haar_log_masses
from qconv.diagnostics.states import patches_of, states_and_slopes


def weight(index):
    return (Angle("weight", index),)


def one_wire(*names):
    """A circuit of one wire; every rotation has a weight of its own."""
    turns = [name for name in names if name.startswith("R")]
    gates = [Gate(name, (0,), weight(turns.index(name)) if name in turns else ()) for name in names]
    return Circuit(1, tuple(gates), ("Z",))


# The idle circuit and circuits A and B by which Sim, Johnson & Aspuru-Guzik explain expressibility.
IDLE, A, B = one_wire("H"), one_wire("H", "RZ"), one_wire("H", "RZ", "RX")
BINS = np.arange(76) / 75
NOISY = QuantumConv2d(
    1, 4, (1, 2), kernel="sim3", depth=1, noise=NoiseModel((("RX", Channel("depolarizing", 0.3)),)), dtype=torch.float64
)


# ---- states


@given(strategies.circuits(), st.integers(0, 2**31))
def test_states_and_their_derivatives_give_the_oracles_values(circuit, seed):
    rng = np.random.default_rng(seed)
    x, w = rng.normal(size=(2, circuit.n_inputs)), rng.normal(size=(2, circuit.n_weights))
    found, slopes = states_and_slopes(circuit, torch.from_numpy(x), torch.from_numpy(w))
    assert found.shape == (2, 2**circuit.n_wires)
    assert torch.equal(found, states(circuit, torch.from_numpy(x), torch.from_numpy(w)))
    for row in range(2):
        values, _, by_weight = oracle.run(circuit, x[row], w[row])
        psi, tangents = found[row].numpy(), slopes[row].numpy()
        for k, text in enumerate(circuit.observables):
            matrix = oracle.pauli_string(text)
            np.testing.assert_allclose((psi.conj() @ matrix @ psi).real, values[k], atol=1e-10)
            np.testing.assert_allclose(2 * (psi.conj() @ matrix @ tangents.T).real, by_weight[k], atol=1e-9)


def test_amplitudes_are_normalized_features():
    circuit = kernel("product", 2, 1, "amplitude")
    x = torch.tensor([[3.0, 0, 4.0, 0]], dtype=torch.float64)
    found = states(circuit, x, torch.zeros(1, circuit.n_weights, dtype=torch.float64))
    np.testing.assert_allclose(found.abs().numpy(), [[0.6, 0, 0.8, 0]], atol=1e-15)


def test_features_computed_from_patches_are_computed():
    circuit = kernel("sim3", 2, 1, "zz")
    x, w = torch.rand(3, 2, dtype=torch.float64), torch.rand(3, circuit.n_weights, dtype=torch.float64)
    found = states(circuit, x, w)
    matrices = torch.stack([torch.from_numpy(oracle.pauli_string(text)) for text in circuit.observables])
    values = torch.einsum("bi,oij,bj->bo", found.conj(), matrices.to(found), found).real
    expected = [simulate(circuit, x[k : k + 1], w[k], backend="qiskit")[0] for k in range(3)]
    np.testing.assert_allclose(values.numpy(), torch.stack(expected).numpy(), atol=1e-10)


def test_patches_of_a_layer_are_those_it_sees():
    layer = QuantumConv2d(4, 4, 2, stride=2, padding=1, groups=2, depth=1, encoding="amplitude")
    images = torch.rand(3, 4, 5, 5)
    unfolded = torch.nn.Unfold(2, padding=1, stride=2)
    both = [unfolded(images[:, k : k + 2]).transpose(1, 2).flatten(0, 1) for k in (0, 2)]
    np.testing.assert_allclose(patches_of(layer, images).numpy(), torch.cat(both).double().numpy())
    separate = QuantumConv2d(4, 4, 2, stride=2, padding=1, depth=1, channels="separate")
    single = [unfolded(images[:, k : k + 1]).transpose(1, 2).flatten(0, 1) for k in range(4)]
    np.testing.assert_allclose(patches_of(separate, images).numpy(), torch.cat(single).double().numpy())


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: expressibility("heisenberg"), "kernel is a str"),
        (lambda: expressibility(Circuit(21)), "21 wires"),
        (lambda: expressibility(A, torch.rand(3, 2)), r"takes 0 inputs but data have shape \(3, 2\)"),
        (lambda: entangling_capability(QuantumConv2d(1, 4, 2), torch.rand(3, 4)), "1 input channels"),
        (lambda: expressibility(A, pairs=1), "pairs is 1: give at least 2"),
        (lambda: gradient_variance(Circuit(1, (Gate("H", (0,)),), ("Z",))), "0 weights and 1 observables"),
        (lambda: barren_plateau("product", cost="loacl"), "local"),
        (lambda: barren_plateau("product", (3, 3)), "two numbers of wires"),
        (lambda: fourier_spectrum(kernel("product", 2, encoding="amplitude")), "amplitudes"),
        (lambda: fourier_spectrum(kernel("product", 11)), "177147 frequencies"),
        (lambda: fourier_spectrum(kernel("product", 2), torch.zeros(6)), r"weights have shape \(6,\)"),
        (lambda: expressibility(A, pairs=20.5), "pairs is 20.5: give a whole number"),
        (lambda: expressibility(A, level=1.5), "level is 1.5: give a probability"),
        (lambda: entangling_capability(A, level=0), "level is 0: give a probability"),
        (lambda: gradient_variance(A, level=-1), "level is -1: give a probability"),
        (lambda: effective_dimension(A, level=1.5), "level is 1.5: give a probability"),
        (lambda: effective_dimension(A, period=-1), "period is -1: give a finite number above 0"),
        (lambda: entangling_capability(A, period=-1), "period is -1: give a finite number above 0"),
        (lambda: fourier_spectrum(kernel("product", 2), period=0), "period is 0: give a finite number above 0"),
        (lambda: gaussian_kernel(torch.ones(3, 2)), r"data of shape \(3, 2\) have the variance 0"),
        (lambda: gaussian_kernel(torch.rand(3, 2), -1), "gamma is -1: give a finite number above 0"),
        (lambda: kernel_matrix(A, torch.zeros(1, 0), gamma=-1.0, kind="projected"), "gamma is -1.0"),
        (lambda: entangling_capability(NOISY), "layer has noise"),
        (lambda: gradient_variance(NOISY), "layer has noise"),
        (lambda: gradient_variance(QuantumConv2d(1, 1, 1, readout="most_likely_ones")), "has no gradient"),
        (lambda: fourier_spectrum(QuantumConv2d(1, 1, 1, readout="most_likely_ones")), "is no polynomial"),
        (lambda: expressibility(A, seed=-1), "seed is -1: give at least 0"),
        (lambda: barren_plateau("sim2", 3, (1,)), "wires are 3: give a list of whole numbers"),
        (lambda: barren_plateau("sim2", (2, 3), 1), "depths are 1: give a list of whole numbers"),
        (lambda: meyer_wallach(torch.rand(3, 5)), r"state has shape \(3, 5\)"),
        (lambda: meyer_wallach(torch.ones(4)), r"state has shape \(4,\)"),
        (lambda: meyer_wallach(np.eye(4)), "state is a ndarray"),
        (lambda: meyer_wallach(torch.tensor([[1.0, 0, 0, 0], [1, 0, 0, 1]])), "squared norm 2: divide"),
        (lambda: gaussian_kernel(torch.rand(4)), r"data have shape \(4,\)"),
    ],
)
def test_what_does_not_fit_is_said(call, said):
    with pytest.raises(ValueError, match=said):
        call()


DATA = torch.rand(5, 2, dtype=torch.float64)
SQUARE = torch.eye(3)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    ("measure", "good"),
    [
        (lambda x: expressibility(kernel("sim3", 2), x, pairs=9), DATA),
        (lambda x: fidelities(kernel("sim3", 2), x, pairs=9), DATA),
        (lambda x: entangling_capability(kernel("sim3", 2), x, samples=9), DATA),
        (lambda x: gradient_variance(kernel("sim3", 2), x, samples=9), DATA),
        (lambda x: effective_dimension(kernel("sim3", 2), x, samples=9), DATA),
        (lambda x: effective_dimension(kernel("basic_entangler", 1, 2), around=x, radius=1.0, samples=9), DATA[0]),
        (lambda x: fourier_spectrum(kernel("basic_entangler", 1, 2), x), DATA),
        (lambda x: kernel_matrix(kernel("sim3", 2), x), DATA),
        (lambda x: kernel_matrix(kernel("basic_entangler", 1, 2), torch.zeros(2, 1), x), DATA[0]),
        (gaussian_kernel, DATA),
        (lambda x: target_alignment(x, torch.arange(3)), SQUARE),
        (lambda x: geometric_difference(x, SQUARE), SQUARE),
        (lambda x: geometric_difference(SQUARE, x), SQUARE),
        (lambda x: states(kernel("sim1", 2, 1), x, torch.zeros(5, 4)), DATA),
        (lambda x: states(kernel("basic_entangler", 1, 2), torch.zeros(5, 1), x), DATA),
        (meyer_wallach, torch.eye(4)),
        (lambda x: expressibility(QuantumConv2d(1, 4, 2), x, pairs=9), torch.rand(1, 1, 3, 3)),
    ],
)
def test_what_is_not_finite_is_refused(measure, good, number):
    measure(good)
    bad = good.clone()
    bad.view(-1)[-1] = number
    with pytest.raises(ValueError, match=r"infinite or NaN|squared norm"):
        measure(bad)


def test_weights_of_a_layer_that_broke_are_refused():
    layer = QuantumConv2d(1, 4, 2)
    torch.nn.init.constant_(layer.weight, float("nan"))
    for measure in (fourier_spectrum, lambda broken: kernel_matrix(broken, torch.rand(1, 1, 3, 3))):
        with pytest.raises(ValueError, match=r"weights hold .* NaN"):
            measure(layer)


@pytest.mark.parametrize(
    "measure", [expressibility, entangling_capability, gradient_variance, effective_dimension, kernel_matrix]
)
def test_arrays_are_refused_with_what_to_do(measure):
    with pytest.raises(ValueError, match="data are a ndarray: give a torch"):
        measure(kernel("sim3", 2), np.zeros((5, 2)))


def test_results_are_short_to_read():
    circuit = kernel("sim3", 2)
    for found in (
        expressibility(circuit, pairs=50, seed=0),
        entangling_capability(circuit, samples=50, seed=0),
        gradient_variance(circuit, samples=50, seed=0),
        effective_dimension(circuit, samples=5, seed=0),
        fourier_spectrum(circuit, samples=2, seed=0),
    ):
        assert len(repr(found)) < 300
        assert "array" not in repr(found)
    assert len(repr(barren_plateau("product", (1, 2), (1,), samples=9, seed=0))) < 600


# ---- expressibility


@pytest.mark.parametrize("wires", [1, 2, 4])
def test_haar_masses_are_those_of_a_beta_law(wires):
    # |<a|b>|^2 of random vectors in N dimensions follows Beta(1, N - 1).
    exact = np.diff(stats.beta(1, 2**wires - 1).cdf(BINS))
    np.testing.assert_allclose(np.exp(haar_log_masses(wires)), exact, atol=1e-15)


def test_haar_masses_of_many_wires_have_logarithms():
    masses = haar_log_masses(16)
    assert np.isfinite(masses).all()
    assert masses[-1] == pytest.approx((2**16 - 1) * log(1 / 75))


def test_an_idle_circuit_is_as_far_from_haar_as_can_be():
    found = expressibility(IDLE, pairs=50, seed=0)
    # All fidelities are 1: the divergence is -log of the last bin's probability, 1/75; published as 4.30.
    assert found.value == pytest.approx(log(75))
    assert (found.bias, found.low, found.high) == pytest.approx((0, log(75), log(75)))


def fidelities_of_a():
    # On the equator, F = cos^2(d/2) with d uniform.
    return np.diff(np.arcsin(np.sqrt(BINS))) * 2 / pi


def fidelities_of_b():
    # Bloch vectors with uniform polar and azimuthal angles: F = (1 + r r')/2.
    angles = 2 * pi * (np.arange(400) + 0.5) / 400
    c, s = np.cos(angles), np.sin(angles)
    f = (1 + c[:, None, None] * c[None, :, None] + (s[:, None] * s[None])[..., None] * np.cos(angles[::2] + 0.003)) / 2
    return np.histogram(f, 75, (0, 1))[0] / f.size


@pytest.mark.parametrize(("circuit", "law", "published"), [(A, fidelities_of_a(), 0.22), (B, fidelities_of_b(), 0.02)])
def test_circuits_of_one_wire_have_the_divergence_of_their_law(circuit, law, published):
    true = stats.entropy(law, np.full(75, 1 / 75))
    # The published values are measured, of 5000 pairs.
    assert true == pytest.approx(published, abs=0.03)
    found = expressibility(circuit, seed=1)
    assert found.low < true < found.high
    assert found.value == pytest.approx(stats.entropy(found.histogram, found.haar))
    assert abs(found.corrected - true) < 0.02


def test_bias_is_estimated_and_intervals_hold_the_truth():
    true = stats.entropy(fidelities_of_a(), np.full(75, 1 / 75))
    runs = [expressibility(A, pairs=500, seed=seed, resamples=300) for seed in range(60)]
    spread = np.std([run.corrected for run in runs]) / np.sqrt(len(runs))
    raised = np.mean([run.value for run in runs]) - true
    assert raised > 10 * spread
    assert abs(np.mean([run.corrected for run in runs]) - true) < raised / 3
    # 95 % of the intervals; 60 of them hold it at least 50 times but for one chance in 2,000.
    assert sum(run.low < true < run.high for run in runs) >= 50


def test_deep_circuits_come_close_to_haar():
    found = expressibility(ansatz("strongly_entangling", 3, 6), seed=0)
    assert found.low == 0
    assert abs(found.corrected) < 0.003
    assert found.histogram.sum() == pytest.approx(1)


def test_a_patch_is_shared_by_both_states_of_a_pair():
    # Nothing but the patch moves the state: all fidelities are 1.
    circuit = kernel("product", 2, 1) + Circuit(2)
    still = Circuit(2, circuit.gates[:2], ("ZI",))
    np.testing.assert_allclose(fidelities(still, torch.rand(50, 2), pairs=40).numpy(), 1)


def test_draws_repeat_with_a_seed_and_follow_torchs_generator_without():
    assert torch.equal(fidelities(A, pairs=5, seed=3), fidelities(A, pairs=5, seed=3))
    torch.manual_seed(7)
    first = fidelities(A, pairs=5)
    assert not torch.equal(first, fidelities(A, pairs=5))
    torch.manual_seed(7)
    assert torch.equal(first, fidelities(A, pairs=5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_layers_are_diagnosed_on_their_patches(dtype):
    layer = QuantumConv2d(1, 4, 2, kernel="sim3", dtype=dtype)
    images = torch.rand(4, 1, 6, 6, dtype=dtype, generator=torch.Generator().manual_seed(0))
    patches = torch.nn.Unfold(2)(images).transpose(1, 2).flatten(0, 1).double()
    for measure in (expressibility, entangling_capability, gradient_variance):
        of_layer, of_circuit = measure(layer, images, seed=0), measure(layer.circuit, patches, seed=0)
        assert of_layer.value == pytest.approx(of_circuit.value, abs=1e-12)
        assert of_layer.value != pytest.approx(measure(layer.circuit, seed=0).value, abs=1e-3)


# ---- entanglement


def test_meyer_wallach_of_known_states():
    def normalized(*entries):
        state = torch.zeros(8, dtype=torch.complex128)
        state[list(entries)] = len(entries) ** -0.5
        return state

    one = torch.tensor([0.6, 0.8j], dtype=torch.complex128)
    product = torch.kron(torch.kron(one, one.conj()), one)
    bell_and_one = torch.kron(torch.tensor([0.5**0.5, 0, 0, 0.5**0.5], dtype=torch.float64), one)
    # GHZ; W, whose wires have the weights 2/3 and 1/3; a product; two of three wires in a Bell pair.
    found = meyer_wallach(torch.stack([normalized(0, 7), normalized(1, 2, 4), product, bell_and_one]))
    np.testing.assert_allclose(found.numpy(), [1, 8 / 9, 0, 2 / 3], atol=1e-14)


@pytest.mark.parametrize("wires", [2, 4])
def test_haar_random_states_have_the_known_mean(wires):
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(20000, 2**wires, dtype=torch.complex128, generator=generator)
    values = meyer_wallach(drawn / drawn.norm(dim=1, keepdim=True))
    expected = entangling_capability(ansatz("product", wires, 1), samples=2).haar
    assert expected == (2**wires - 2) / (2**wires + 1)
    assert abs(values.mean() - expected) < 4 * values.std() / 20000**0.5


def ring_of_controlled_phases():
    # Wire k has 4 rho_00 rho_11 = sin^2, mean 1/2. Each of its two neighbors dampens |rho_01|^2 by a factor
    # 1 - sin^2 sin^2(a/2), mean 3/4 and independent of the other: the mean of Q is (1 - (3/4)^2)/2.
    return (1 - 0.75**2) / 2


def chain_of_controlled_phases():
    # The two ends of four wires have one neighbor.
    return (ring_of_controlled_phases() + (1 - 0.75) / 2) / 2


@pytest.mark.parametrize(
    ("name", "mean"),
    [("sim1", 0), ("sim9", 1), ("sim18", ring_of_controlled_phases()), ("sim3", chain_of_controlled_phases())],
)
def test_entangling_capability_has_the_exact_mean(name, mean):
    found = entangling_capability(ansatz(name, 4, 1), samples=4000, seed=2)
    assert found.value == pytest.approx(mean, abs=1e-12 if mean in (0, 1) else 0.01)
    assert found.low - 1e-12 <= mean <= found.high + 1e-12
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * found.deviation / 4000**0.5, rel=1e-3, abs=1e-12)


# ---- gradients


def test_variances_of_a_product_are_powers_of_two():
    # <Z...Z> is a product of cosines: each derivative has the variance 2^-n exactly.
    def build(wires, depth):
        return Circuit(wires, tuple(Gate("RY", (wire,), weight(wire)) for wire in range(wires)))

    found = barren_plateau(build, (1, 2, 3, 4), (1,), samples=2000, seed=0, resamples=200)
    for wires, point in zip(found.wires, found.points[0], strict=True):
        assert point.low < 2.0**-wires < point.high
        assert point.per_weight.shape == (1, wires)
    assert found.slopes[0].low < -1 < found.slopes[0].high
    assert found.slopes[0].high - found.slopes[0].low < 0.2
    local = barren_plateau(build, (1, 2, 3, 4), (1,), cost="local", samples=2000, seed=0, resamples=200)
    # One weight acts, the others do not count.
    assert (local.points[0][3].per_weight > 0).sum() == 1
    assert local.slopes[0].low < 0 < local.slopes[0].high


def test_gradients_of_deep_random_circuits_fall_as_those_of_two_designs():
    # Between two independent 2-designs the variance is N^2 / (2 (N^2 - 1)(N + 1)): |psi> is random, so it is
    # Tr B^2 / (N (N + 1)) with B = i [P, O]/2, and Tr B^2 = (N + N/(N^2 - 1))/2 on average over random O.
    found = barren_plateau("strongly_entangling", (2, 3, 4), (12,), samples=300, seed=0)
    for wires, point in zip(found.wires, found.points[0], strict=True):
        size = 2**wires
        middle = point.per_weight[0].reshape(12, -1)[4:8].mean()
        assert middle == pytest.approx(size**2 / (2 * (size**2 - 1) * (size + 1)), rel=0.1)
    assert found.slopes[0].low < -0.85
    assert found.slopes[0].high > -1.1


def test_variance_is_that_of_the_oracles_gradients():
    circuit = kernel("sim4", 3, 1, readout=("ZII", "IXZ"))
    found = gradient_variance(circuit, samples=30, seed=5)
    weights = (
        2 * pi * torch.rand(30, circuit.n_weights, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    )
    rows = np.stack([oracle.run(circuit, np.zeros(3), row)[2] for row in weights.numpy()])
    np.testing.assert_allclose(found.per_weight, rows.var(0, ddof=1), atol=1e-12)
    acting = found.per_weight[found.per_weight > 0]
    assert 0 < len(acting) < found.per_weight.size
    assert found.value == pytest.approx(acting.mean())
    assert found.low < found.value < found.high


# ---- Fourier spectrum


def reuploads(times, name="RY"):
    gates = [Gate("RX", (0,), (Angle("input", 0),))]
    for k in range(times):
        gates += [Gate("Rot", (0,), tuple(Angle("weight", 3 * k + j) for j in range(3)))]
        gates += [Gate(name, (0,), (Angle("input", 0),))] if k < times - 1 else []
    return Circuit(1, tuple(gates), ("Z",))


@pytest.mark.parametrize("times", [1, 2, 4])
def test_uploads_add_frequencies(times):
    found = fourier_spectrum(reuploads(times), samples=20, seed=0)
    assert found.spectrum.degrees == (times,)
    assert found.accessible() == times + 1
    # A single upload of a pole of the sphere leaves no constant.
    assert found.present() == times + (times > 1)
    assert found.by_input()[0].shape == (times + 1,)


def test_power_of_known_waves():
    # <Z> after RX(x) is cos x: 1/2 at +-1.
    plain = Circuit(1, (Gate("RX", (0,), (Angle("input", 0),)),), ("Z", "Y"))
    found = fourier_spectrum(plain, torch.zeros(1, 0))
    np.testing.assert_allclose(found.power, [0.25, 0, 0.25], atol=1e-15)
    # cos(x) cos(3 y) has 1/4 at all four (+-1, +-3).
    gates = Gate("RX", (0,), (Angle("input", 0),)), Gate("RX", (1,), (Angle("input", 1, 3.0),))
    found = fourier_spectrum(Circuit(2, gates, ("ZZ",)), torch.zeros(1, 0))
    assert found.spectrum.frequencies == (1, 3)
    np.testing.assert_allclose(found.power[[0, 0, 2, 2], [0, 2, 0, 2]], 1 / 16, atol=1e-15)
    np.testing.assert_allclose(found.by_degree(), [0, 0, 1 / 4], atol=1e-15)
    np.testing.assert_allclose(np.concatenate(found.by_input()), [0, 0.25] * 2, atol=1e-15)
    assert (found.accessible(), found.present()) == (5, 2)


def test_power_is_the_mean_square_of_the_outputs():
    circuit = kernel("sim6", 3, 1)
    weights = torch.randn(2, circuit.n_weights, dtype=torch.float64)
    # Parseval: on a grid finer than twice the largest frequency, means of squares are exact.
    axis = torch.arange(5, dtype=torch.float64) * 2 / 5
    grid = torch.cartesian_prod(axis, axis, axis)
    squares = simulate(circuit, grid, weights, backend="statevector").square().mean()
    assert fourier_spectrum(circuit, weights).power.sum() == pytest.approx(float(squares))


def test_a_layers_own_weights_are_read():
    layer = QuantumConv2d(1, 8, 2, kernel="sim4", dtype=torch.float64)
    found = fourier_spectrum(layer)
    assert found.samples == len(layer.weight)
    np.testing.assert_allclose(found.power, fourier_spectrum(layer.circuit, layer.weight.detach()).power)


# ---- readouts and noise of layers


def grid_of(layer):
    """Outputs of a layer for a patch of two pixels on an even grid over one period, 2."""
    axis = torch.arange(5, dtype=torch.float64) * 2 / 5
    return layer(torch.cartesian_prod(axis, axis).reshape(25, 1, 1, 2)).detach()


@pytest.mark.parametrize("readout", ["z", "probabilities", "ones"])
def test_power_of_a_layer_is_the_mean_square_of_its_outputs(readout):
    outs = {"z": 4, "probabilities": 8, "ones": 2}[readout]
    layer = QuantumConv2d(1, outs, (1, 2), kernel="sim6", depth=1, readout=readout, dtype=torch.float64)
    torch.nn.init.uniform_(layer.weight, 0, 6)
    found = fourier_spectrum(layer)
    # Parseval on a fine grid, all outputs of both filters.
    assert found.power.sum() == pytest.approx(float(grid_of(layer).square().mean()), abs=1e-12)


def test_power_of_a_layer_includes_its_noise():
    torch.nn.init.uniform_(NOISY.weight, 0, 6)
    with_noise = fourier_spectrum(NOISY).power.sum()
    assert with_noise == pytest.approx(float(grid_of(NOISY).square().mean()), abs=1e-12)
    assert with_noise < 0.9 * fourier_spectrum(NOISY.circuit, NOISY.weight.detach()).power.sum()


@pytest.mark.parametrize("readout", ["probabilities", "ones"])
def test_gradient_variance_of_a_layer_is_that_of_its_outputs(readout):
    layer = QuantumConv2d(1, 1, (1, 2), kernel="sim3", depth=1, readout=readout, dtype=torch.float64)
    found = gradient_variance(layer, samples=40, seed=3)
    generator = torch.Generator().manual_seed(3)
    weights = 2 * pi * torch.rand(40, layer.circuit.n_weights, dtype=torch.float64, generator=generator)
    gradients = []
    for w in weights.numpy():
        z1, z2, zz = (
            oracle.run(layer.circuit.with_observables((t,)), np.zeros(2), w)[2][0] for t in ("ZI", "IZ", "ZZ")
        )
        if readout == "ones":
            gradients.append([-(z1 + z2) / 2])
        else:
            gradients.append([(a * z1 + b * z2 + a * b * zz) / 4 for a in (1, -1) for b in (1, -1)])
    np.testing.assert_allclose(found.per_weight, np.var(gradients, axis=0, ddof=1), atol=1e-12)
    assert found.per_weight.shape[0] == {"ones": 1, "probabilities": 4}[readout]
