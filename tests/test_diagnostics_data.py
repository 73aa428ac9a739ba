"""Diagnostics that see data (effective dimension, kernels), and the command that shows them all."""

import json
from math import inf, log, pi

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from sklearn.kernel_ridge import KernelRidge
from sklearn.metrics.pairwise import rbf_kernel

from circuits import Angle, Circuit, Gate, kernel
from qconv import QuantumConv2d
from qconv.cli import main
from qconv.diagnostics import (
    effective_dimension,
    fisher_information,
    gaussian_kernel,
    geometric_difference,
    kernel_matrix,
    target_alignment,
)
from qconv.diagnostics.command import digit_pixels


def turns(*wires):
    """RY with a weight each on the given wires."""
    gates = (Gate("RY", (wire,), (Angle("weight", k),)) for k, wire in enumerate(wires))
    return Circuit(max(wires) + 1, tuple(gates), ("Z" * (max(wires) + 1),))


def kappa(n, gamma=1.0):
    return gamma * n / (2 * pi * log(n))


def random_kernel(points, seed, rank=None):
    rows = np.random.default_rng(seed).normal(size=(points, rank or points + 5))
    return torch.from_numpy(rows @ rows.T)


# ---- Fisher information


def test_fisher_information_of_independent_turns_is_constant():
    # p = cos^2(w/2): the Fisher information of an angle is 1 everywhere.
    weights = torch.rand(4, 3, dtype=torch.float64)
    found = fisher_information(turns(0, 1, 2), torch.zeros(1, 0, dtype=torch.float64), weights)
    np.testing.assert_allclose(found.numpy(), np.tile(np.eye(3), (4, 1, 1)), atol=1e-12)


def test_fisher_information_of_a_parity():
    # The mean parity is c = cos a cos b, its information grad c grad c^T / (1 - c^2).
    weights = torch.tensor([[0.4, 1.3], [2.0, -0.7]], dtype=torch.float64)
    found = fisher_information(turns(0, 1), torch.zeros(1, 0, dtype=torch.float64), weights, "parity")
    for (a, b), matrix in zip(weights.numpy(), found.numpy(), strict=True):
        slope = np.array([-np.sin(a) * np.cos(b), -np.cos(a) * np.sin(b)])
        np.testing.assert_allclose(matrix, np.outer(slope, slope) / (1 - np.cos(a) ** 2 * np.cos(b) ** 2), atol=1e-12)


def test_fisher_information_is_pennylanes_averaged_over_patches():
    qml = pytest.importorskip("pennylane")
    circuit = kernel("sim14", 2, 1)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.rand(2, 2, dtype=torch.float64, generator=generator)
    weights = 6 * torch.rand(2, circuit.n_weights, dtype=torch.float64, generator=generator)
    function = circuit.with_observables(()).to_pennylane()
    found = fisher_information(circuit, inputs, weights)
    for row, w in enumerate(weights.numpy()):
        total = 0
        for x in inputs.numpy():

            @qml.qnode(qml.device("default.qubit", wires=2))
            def probabilities(w, x=x):
                function(x, w)
                return qml.probs(wires=range(2))

            total = total + qml.gradients.classical_fisher(probabilities)(qml.numpy.array(w, requires_grad=True))
        np.testing.assert_allclose(found[row].numpy(), total / 2, atol=1e-9)


# ---- effective dimension


def test_effective_dimension_of_a_constant_information():
    # F^ = 1, so d(n) = d log(1 + kappa) / log(kappa); globally and around any point.
    expected = 3 * log(1 + kappa(500)) / log(kappa(500))
    found = effective_dimension(turns(0, 1, 2), n_data=500, samples=5, seed=0)
    assert (found.low, found.value, found.high) == pytest.approx((expected,) * 3)
    assert found.normalized == pytest.approx(expected / 3)
    np.testing.assert_allclose(found.eigenvalues, 1, atol=1e-12)
    local = effective_dimension(turns(0, 1, 2), n_data=500, samples=5, around=torch.ones(3), radius=0.1)
    assert local.value == pytest.approx(expected)
    less = effective_dimension(turns(0, 1, 2), n_data=500, gamma=0.5, samples=5)
    assert less.value == pytest.approx(3 * log(1 + kappa(500, 0.5)) / log(kappa(500, 0.5)))


def test_weights_that_add_up_are_one_dimension():
    # Two turns of one wire: F = [[1, 1], [1, 1]] with the eigenvalues 2 and 0, and F^ = F.
    found = effective_dimension(turns(0, 0), n_data=10**6, samples=3)
    assert found.value == pytest.approx(log(1 + 2 * kappa(10**6)) / log(kappa(10**6)))
    np.testing.assert_allclose(found.eigenvalues, [0, 2], atol=1e-12)


def test_effective_dimension_is_its_formula():
    circuit, n = kernel("sim4", 2, 1), 2000
    data = torch.rand(4, 2, dtype=torch.float64)
    found = effective_dimension(circuit, data, n, samples=40, seed=3)
    weights = (
        2 * pi * torch.rand(40, circuit.n_weights, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    )
    fisher = fisher_information(circuit, data, weights).numpy()
    scaled = fisher * circuit.n_weights / np.trace(fisher, axis1=1, axis2=2).mean()
    roots = np.sqrt(np.linalg.det(np.eye(circuit.n_weights) + kappa(n) * scaled))
    assert found.value == pytest.approx(2 * log(roots.mean()) / log(kappa(n)))
    assert found.low < found.value < found.high
    assert found.value < circuit.n_weights


def test_local_weights_stay_in_their_ball():
    # Around a zero of its slope a parity tells little apart; farther away it does.
    circuit = turns(0, 1)
    near = effective_dimension(circuit, outcome="parity", around=torch.tensor([0.0, 1.0]), radius=0.04, seed=0)
    # F = grad c grad c^T / (1 - c^2) = diag(0, 1) at that point, up to the radius.
    np.testing.assert_allclose(near.eigenvalues, [0, 1], atol=0.01)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"n_data": 5}, "kappa is 0.494"),
        ({"gamma": 0.0}, "gamma is 0.0"),
        ({"around": torch.zeros(3), "radius": 1.0}, r"around has shape \(3,\)"),
        ({"around": torch.zeros(2)}, "radius is None"),
        ({"around": torch.zeros(2), "radius": 0.03}, "radius is 0.03: give one above 1/sqrt"),
        ({"outcome": "bit"}, "bits"),
        ({"samples": 1}, "samples is 1"),
    ],
)
def test_effective_dimension_says_what_does_not_fit(options, said):
    with pytest.raises(ValueError, match=said):
        effective_dimension(turns(0, 1), **options)


def test_effective_dimension_needs_weights_that_act():
    with pytest.raises(ValueError, match="0 weights"):
        effective_dimension(Circuit(1, (Gate("H", (0,)),)))
    with pytest.raises(ValueError, match="does not depend on the weights"):
        effective_dimension(Circuit(1, (Gate("RZ", (0,), (Angle("weight", 0),)),)))


# ---- kernels


def test_fidelity_kernel_of_angles():
    data = torch.rand(6, 3, dtype=torch.float64)
    apart = (data[:, None] - data[None]).numpy()
    expected = np.cos(pi * apart / 2).prod(-1) ** 2
    circuit = kernel("sim4", 3, 1)
    for weights in (None, torch.rand(circuit.n_weights)):
        # What follows the encoding is a unitary, which fidelities do not see.
        np.testing.assert_allclose(kernel_matrix(circuit, data, weights).numpy(), expected, atol=1e-12)


def test_projected_kernel_of_angles():
    data = torch.rand(5, 2, dtype=torch.float64)
    angles = pi * data.numpy()
    # |rho - rho'|^2 = |r - r'|^2 / 2 for Bloch vectors r = (sin, 0, cos).
    bloch = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    squares = np.square(bloch[:, None] - bloch[None]).sum(-1) / 2
    found = kernel_matrix(kernel("product", 2, 1), data, kind="projected", gamma=0.7)
    np.testing.assert_allclose(found.numpy(), np.exp(-0.7 * squares), atol=1e-7)


def test_a_layers_kernel_takes_its_first_filter():
    layer = QuantumConv2d(1, 8, 2, kernel="sim4")
    images = torch.rand(2, 1, 3, 3)
    patches = torch.nn.Unfold(2)(images).transpose(1, 2).flatten(0, 1)
    expected = kernel_matrix(layer.circuit, patches, layer.weight[0], kind="projected")
    assert torch.equal(kernel_matrix(layer, images, kind="projected"), expected)


def test_gaussian_kernel_is_scikit_learns():
    data = torch.rand(7, 3)
    np.testing.assert_allclose(gaussian_kernel(data, 0.4), rbf_kernel(data, gamma=0.4), atol=1e-6)
    np.testing.assert_allclose(gaussian_kernel(data), rbf_kernel(data, gamma=1 / (3 * data.numpy().var())), atol=1e-6)


@pytest.mark.parametrize("rescale", [True, False])
def test_alignment_is_pennylanes(rescale):
    kernels = pytest.importorskip("pennylane").kernels
    data = np.random.default_rng(0).normal(size=(9, 2))
    labels = np.array([1, 1, -1, 1, 1, -1, 1, 1, 1])
    gauss = lambda a, b: float(np.exp(-np.square(a - b).sum()))  # noqa: E731
    expected = kernels.target_alignment(data, labels, gauss, rescale_class_labels=rescale)
    matrix = torch.from_numpy(rbf_kernel(data, gamma=1))
    assert target_alignment(matrix, torch.from_numpy(labels), rescale=rescale) == pytest.approx(expected)


def test_the_target_is_aligned_with_itself():
    labels = torch.tensor([0, 2, 1, 1, 0, 2, 2])
    corners = torch.eye(3, dtype=torch.float64) - 1 / 3
    rows = corners[labels] / torch.bincount(labels)[labels, None]
    assert target_alignment(rows @ rows.T, labels) == pytest.approx(1)
    assert target_alignment(torch.eye(7, dtype=torch.float64), labels) < 1
    with pytest.raises(ValueError, match="1 class"):
        target_alignment(torch.eye(3), torch.zeros(3))
    with pytest.raises(ValueError, match=r"4 points but labels have shape \(3,\)"):
        target_alignment(torch.eye(4), torch.zeros(3))


@pytest.mark.parametrize("regularization", [0.0, 0.3])
def test_geometric_difference_is_its_formula(regularization):
    classical, quantum = (random_kernel(8, seed) for seed in (1, 2))
    found = geometric_difference(classical, quantum, regularization)
    k_c, k_q = ((k * 8 / k.trace()).numpy() for k in (classical, quantum))
    inverse = np.linalg.inv(k_c + regularization * np.eye(8))
    root_c, root_q = sqrtm(k_c).real, sqrtm(k_q).real
    norm = np.linalg.norm(root_q @ root_c @ inverse @ inverse @ root_c @ root_q, 2)
    assert found.value == pytest.approx(np.sqrt(norm))
    left = regularization * np.sqrt(np.linalg.norm(root_q @ inverse @ inverse @ root_q, 2))
    assert found.training == pytest.approx(left)
    assert found.reference == pytest.approx(np.sqrt(8))


def test_geometric_difference_bounds_every_ridge_regression():
    classical, quantum = (random_kernel(6, seed) for seed in (3, 4))
    k_c, k_q = ((k * 6 / k.trace()).numpy() for k in (classical, quantum))
    found = geometric_difference(classical, quantum, 0.2)
    values, vectors = np.linalg.eigh(k_q)
    root_q = vectors * np.sqrt(values)
    directions = np.random.default_rng(0).normal(size=(6, 20000))
    labels = root_q @ (directions / np.linalg.norm(directions, axis=0))
    fitted = KernelRidge(alpha=0.2, kernel="precomputed").fit(k_c, labels)
    norms = np.sqrt(np.einsum("it,ij,jt->t", fitted.dual_coef_, k_c, fitted.dual_coef_))
    errors = np.linalg.norm(labels - fitted.predict(k_c), axis=0)
    for largest, bound in ((norms.max(), found.value), (errors.max(), found.training)):
        assert 0.95 * bound < largest <= bound


def test_geometric_difference_from_itself_and_from_too_few_dimensions():
    full, flat = random_kernel(6, 5), random_kernel(6, 6, rank=2)
    assert geometric_difference(full, 3 * full).value == pytest.approx(1)
    assert geometric_difference(flat, flat).value == pytest.approx(1)
    # What a kernel of rank 2 cannot fit no finite model does; regularized, an error is left.
    assert geometric_difference(flat, full).value == inf
    left = geometric_difference(flat, full, 1e-9)
    assert left.value < inf
    assert left.training > 0.5


@pytest.mark.parametrize(
    ("classical", "quantum", "options", "said"),
    [
        (torch.eye(3), torch.eye(4), {}, r"\(3, 3\) and \(4, 4\)"),
        (torch.ones(3, 2), torch.eye(3), {}, r"shape \(3, 2\): it must be square"),
        (torch.eye(3), torch.eye(3), {"regularization": -1.0}, "regularization is -1.0"),
        (torch.tensor([[1.0, 2], [0, 1]]), torch.eye(2), {}, "not symmetric"),
        (torch.zeros(2, 2), torch.eye(2), {}, "trace 0.0"),
    ],
)
def test_geometric_difference_says_what_does_not_fit(classical, quantum, options, said):
    with pytest.raises(ValueError, match=said):
        geometric_difference(classical, quantum, **options)


# ---- the command


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        main(["diagnose", *map(str, arguments)])
    return ended.value.code, *capsys.readouterr()


def test_pixels_are_those_in_the_middle():
    pixels, digits = digit_pixels(4, images=10)
    assert pixels.shape == (10, 4)
    assert digits.tolist() == list(range(10))
    from sklearn.datasets import load_digits

    np.testing.assert_allclose(pixels.numpy(), load_digits().images[:10, 3:5, 3:5].reshape(10, 4) / 16, atol=1e-7)


def test_diagnose_prints_a_table_and_writes_files(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "160")
    out = tmp_path / "new" / "folder"
    code, said, _ = run(capsys, "sim3", "--wires", 2, "--depth", 1, "--pairs", 200, "--out", out)
    assert code == 0
    measures = json.loads((out / "diagnosis.json").read_text())["findings"]
    assert len(measures) == 11
    for row in measures:
        assert row["measure"] in said
        assert np.isfinite(row["value"])
        assert row["low"] is None or row["low"] <= row["high"]
    names = ["fidelities", "gradients_global", "gradients_local", "spectrum"]
    assert sorted(path.name for path in out.iterdir()) == ["diagnosis.json", *(f"{name}.png" for name in names)]
    for name in names:
        assert (out / f"{name}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert str(out / f"{name}.png") in said


def test_diagnose_says_where_a_measure_does_not_apply(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "160")
    code, said, _ = run(
        capsys, "product", "--wires", 2, "--depth", 1, "--encoding", "amplitude", "--pairs", 50, "--out", tmp_path
    )
    assert code == 0
    assert "no trigonometric" in said.replace("\n", " ")
    assert not (tmp_path / "spectrum.png").exists()


def test_diagnose_of_an_unknown_kernel_names_the_nearest(capsys, tmp_path):
    code, _, complaint = run(capsys, "heisenburg", "--out", tmp_path)
    assert code == 2
    assert "heisenberg" in complaint
    assert not any(tmp_path.iterdir())


def rows_of(folder):
    return {row["measure"]: row for row in json.loads((folder / "diagnosis.json").read_text())["findings"]}


def test_diagnose_takes_controls_options_and_files(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.chdir(tmp_path)
    small = ("--pairs", 50, "--wires", 2, "--depth", 1)
    code, said, _ = run(capsys, "sim2", "--no-entangle", *small)
    assert code == 0
    assert "sim2 without entanglement on 2 wires, 4 weights" in said
    assert rows_of(tmp_path / "runs" / "diagnose-sim2-control")["entangling capability"]["value"] < 1e-9
    code, said, _ = run(capsys, "ttn", "--option", "block=complex", "--reupload", "--readout", "root", *small)
    assert code == 0
    assert "ttn on 2 wires, 4 weights" in said
    wanted = kernel("ttn", 2, 1, readout="root", reupload=True, block="complex")
    assert json.loads((tmp_path / "runs" / "diagnose-ttn" / "diagnosis.json").read_text())["circuit"] == wanted.text()

    (tmp_path / "mine.qasm").write_text(kernel("sim3", 2, 1).to_qasm3())
    code, said, _ = run(capsys, "mine.qasm", "--pairs", 50, "--seed", 1)
    assert code == 0
    found = rows_of(tmp_path / "runs" / "diagnose-mine")
    assert "a file is one circuit" in found.pop("log2 gradient variance a wire")["meaning"]
    assert run(capsys, "sim3", *small, "--seed", 1, "--out", tmp_path / "named")[0] == 0
    named = rows_of(tmp_path / "named")
    assert found == {measure: row for measure, row in named.items() if measure in found}
    assert len(found) == len(named) - 2


def test_diagnose_of_files_that_lack_something_says_so(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bare.qasm").write_text(
        'OPENQASM 3.0;\ninclude "stdgates.inc";\nqubit[2] q;\nh q[0];\ncx q[0], q[1];\n'
    )
    code, _, _ = run(capsys, "bare.qasm", "--pairs", 50)
    assert code == 0
    found = rows_of(tmp_path / "runs" / "diagnose-bare")
    assert found["gradient variance"]["meaning"] == "the kernel has no weights"
    assert found["kernels of data"]["meaning"] == "the circuit takes no features"
    assert found["entangling capability"]["value"] == pytest.approx(1)
    assert "no weights: one state" in found["expressibility"]["meaning"]
    (tmp_path / "wide.qasm").write_text(kernel("sim1", 11, 1).to_qasm3())
    code, _, complaint = run(capsys, "wide.qasm", "--pairs", 50)
    assert code == 2
    assert "wide.qasm has 11 wires and takes 11 features: give up to 10 wires" in complaint
