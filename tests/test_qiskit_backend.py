import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import product
from math import pi
from types import SimpleNamespace

import numpy as np
import oracle
import pytest
import torch
from qiskit.providers.fake_provider import GenericBackendV2
from qiskit_aer.primitives import EstimatorV2

from circuits import Angle, Channel, Circuit, Gate, NoiseModel, ReadoutError, kernel
from qconv import QuantumConv2d, Unsupported, load_backend, simulate
from qconv.backends import qiskit_programs
from qconv.backends.clifford import is_clifford
from qconv.backends.jobs import JobFailed, ranges, run_in_jobs
from qconv.energy.devices import SYCAMORE, Device
from qconv.gradients import differentiate

LINE = [[0, 1], [1, 0], [1, 2], [2, 1], [2, 3], [3, 2]]
CIRCUIT = kernel("strongly_entangling", 3, 1, readout=["ZII", "XYI", "IIZ"])


def draw(circuit, patches=3, filters=2, seed=0):
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(rng.uniform(-1, 1, (patches, circuit.n_inputs)))
    return x, torch.from_numpy(rng.normal(size=(filters, circuit.n_weights)))


def expected(circuit, x, w):
    return torch.tensor(np.array([[oracle.run(circuit, p.numpy(), f.numpy())[0] for f in w] for p in x]))


def deviations(sampled, exact, shots):
    """How many standard errors each value is off."""
    return ((sampled - exact) / ((1 - exact**2) / shots).clamp(min=1e-12).sqrt()).abs()


# --- methods ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["automatic", "statevector", "density_matrix", "matrix_product_state"])
def test_methods_agree_with_the_oracle_and_shots_are_binomial(method):
    x, w = draw(CIRCUIT)
    want = expected(CIRCUIT, x, w)
    backend = load_backend("qiskit", method=method)
    torch.testing.assert_close(simulate(CIRCUIT, x, w, backend=backend), want, atol=1e-10, rtol=0)
    shots = 300
    sampled = simulate(CIRCUIT, x, w, backend=backend, shots=shots, seed=1)
    ups = (sampled + 1) / 2 * shots
    torch.testing.assert_close(ups, ups.round(), atol=1e-9, rtol=0)
    assert 0.3 < deviations(sampled, want, shots).max() < 4.5


CLIFFORD = Circuit(
    3,
    (
        Gate("RY", (0,), (Angle("input", 0, pi / 2),)),
        Gate("RX", (1,), (Angle("weight", 0, pi / 2),)),
        Gate("CNOT", (0, 1)),
        Gate("CRX", (1, 2), (Angle("weight", 1, pi),)),
        Gate("RZZ", (0, 2), (Angle("input", 1, pi / 2),)),
        Gate("ECR", (0, 1)),
    ),
    ("ZII", "XYI", "IIZ", "ZZX"),
)


def test_stabilizers_run_clifford_angles():
    grid = torch.arange(4, dtype=torch.float64)
    x = torch.cartesian_prod(grid, grid)[::3]
    w = torch.tensor([[0.0, 1.0], [3.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
    want = expected(CLIFFORD, x, w)
    assert set(want.abs().round().unique().tolist()) == {0.0, 1.0}
    backend = load_backend("qiskit", method="stabilizer")
    torch.testing.assert_close(simulate(CLIFFORD, x, w, backend=backend), want, atol=1e-10, rtol=0)
    # Multiples of pi/2 in single precision are off by more than Aer allows.
    torch.testing.assert_close(simulate(CLIFFORD, x.float(), w.float(), backend=backend), want.float())
    shots = 100
    for method in ("stabilizer", "extended_stabilizer"):
        got = simulate(CLIFFORD, x, w, backend=load_backend("qiskit", method=method), shots=shots, seed=3)
        certain = want.abs() > 0.5
        torch.testing.assert_close(got[certain], want[certain])
        assert 0.3 < deviations(got[~certain], want[~certain], shots).max() < 4.5


def test_extended_stabilizer_samples_behind_t_gates():
    gates = Gate("H", (0,)), Gate("T", (0,)), Gate("H", (0,)), Gate("CNOT", (0, 1))
    circuit, nothing = Circuit(2, gates, ("ZI", "IZ", "ZZ")), torch.zeros(1, 0)
    # A looser approximation than Aer's own is faster.
    options = {"method": "extended_stabilizer", "extended_stabilizer_approximation_error": 0.2}
    got = simulate(circuit, nothing, nothing, backend=load_backend("qiskit", **options), shots=100, seed=0)
    assert deviations(got[0, 0, :2], torch.tensor([2**-0.5] * 2), 100).max().item() < 4.5
    for sampling in ("metropolis", "resampled_metropolis"):
        backend = load_backend("qiskit", **options, extended_stabilizer_sampling_method=sampling)
        with pytest.raises(Unsupported, match=f"is '{sampling}', whose steps miss outcomes.* gate T: use 'norm_est"):
            backend.compile(circuit, shots=100)
        backend.compile(CLIFFORD, shots=100)


def test_clifford_gates_are_told_from_others():
    clifford = {"X", "Y", "Z", "H", "S", "Sdg", "SX", "SXdg", "CNOT", "CY", "CZ", "SWAP", "ISWAP", "ISWAPdg", "ECR"}
    others = {"T", "Tdg", "CH", "CCX", "CCZ", "CSWAP", "SQSWAP", "SQSWAPdg"}
    assert {name for name in clifford | others if is_clifford(name)} == clifford


def test_bonds_of_a_matrix_product_state_are_passed_through():
    circuit = Circuit(
        4,
        (*(Gate("H", (k,)) for k in (0, 1)), Gate("CNOT", (0, 2)), Gate("CNOT", (1, 3))),
        ("XIXI", "ZZZZ", "ZIZI"),
    )
    nothing = torch.zeros(1, 0, dtype=torch.float64)
    for bond, exact in ((4, True), (1, False)):
        options = {"method": "matrix_product_state", "matrix_product_state_max_bond_dimension": bond}
        values = simulate(circuit, nothing, nothing, backend=load_backend("qiskit", **options))
        assert torch.allclose(values, torch.ones_like(values), atol=1e-10) == exact


def test_wide_circuits_run_as_matrix_product_states():
    circuit = kernel("basic_entangler", 34, 1, readout=["Z" + "I" * 33, "ZZ" + "I" * 32])
    x, w = draw(circuit, 1, 1)
    got = simulate(circuit, x, w, backend=load_backend("qiskit", method="matrix_product_state"))
    torch.testing.assert_close(got, simulate(circuit, x, w, backend="fourier"), atol=1e-8, rtol=0)


# --- noise ------------------------------------------------------------------------------------------------------------


def test_two_sources_of_our_noise_are_exact_and_sampled():
    noise = NoiseModel(
        (("CNOT", Channel("depolarizing", 0.05)), ("Rot", Channel("amplitude_damping", 0.1))),
        readout={0: ReadoutError(0.02, 0.1), 2: ReadoutError(0.2, 0.05)},
    )
    x, w = draw(CIRCUIT, 2, 1)
    plain = NoiseModel(noise.after)
    values = {text: [] for text in ("ZII", "XYI", "XII", "IYI", "IIZ")}
    for text, found in values.items():
        found += [oracle.run_noisy(CIRCUIT.with_observables((text,)), p.numpy(), w[0].numpy(), plain)[0] for p in x]
    z, xy, y, last = (np.array(values[text]) for text in ("ZII", "XYI", "IYI", "IIZ"))
    # A misread bit's sign has the mean (1 - a - b) z + (b - a), for a = P(1|0) and b = P(0|1).
    want = np.stack([0.88 * z + 0.08, 0.88 * xy + 0.08 * y, 0.75 * last - 0.15], axis=-1)[:, None]
    np.testing.assert_allclose(simulate(CIRCUIT, x, w, backend="qiskit", noise=noise), want, atol=1e-10)
    shots = 2000
    sampled = simulate(CIRCUIT, x, w, backend="qiskit", noise=noise, shots=shots, seed=0)
    assert deviations(sampled, torch.from_numpy(want), shots).max() < 4.5


# --- transpilation ----------------------------------------------------------------------------------------------------


def test_a_layer_transpiles_once(monkeypatch):
    calls = []
    original = qiskit_programs.transpile
    monkeypatch.setattr(qiskit_programs, "transpile", lambda *a, **k: calls.append(len(a[0])) or original(*a, **k))
    layer = QuantumConv2d(1, 2, (1, 2), backend="qiskit", shots=20, readout=["ZI", "XX"], dtype=torch.float64)
    images = torch.rand(2, 1, 3, 4, dtype=torch.float64, requires_grad=True)
    for _ in range(2):
        layer(images).sum().backward()
        with torch.no_grad():
            layer.weight += 0.1
    layer.shots = 30
    layer(images)
    # Both measurement settings in one call; parameter shifts and other numbers of shots are the same circuits.
    assert calls == [2]


# --- jobs -------------------------------------------------------------------------------------------------------------


def test_executors_change_nothing():
    x, w = draw(CIRCUIT, 20)
    options = {"circuits_a_job": 12, "noise_model": None}
    alone = load_backend("qiskit", **options).compile(CIRCUIT, shots=50, seed=5)
    with ThreadPoolExecutor(3) as executor:
        shared = load_backend("qiskit", executor=executor, **options).compile(CIRCUIT, shots=50, seed=5)
        for _ in range(2):
            first = alone(x, w)
            assert torch.equal(first, shared(x, w))
        layer = QuantumConv2d(1, 2, (1, 2), backend=load_backend("qiskit", executor=executor), shots=10)
        # An executor cannot be copied or stored: copies share it, files do without.
        copied, stored = copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))
        assert copied._backend.executor is executor
        assert stored._backend.executor is None
        assert stored(torch.rand(1, 1, 2, 2)).shape == (1, 2, 2, 1)
    # Rows do not repeat from job to job.
    assert len(alone(x[:1].expand(20, -1), w[:1]).unique(dim=0)) > 10
    # What runs a job goes to other processes.
    rows = np.random.default_rng(0).normal(size=(4, 12))
    sent = pickle.loads(pickle.dumps(alone._run))
    np.testing.assert_array_equal(sent(rows, 7), alone._run(rows, 7))


def test_jobs_are_bounded_in_memory():
    wide = kernel("product", 16, 1)
    assert load_backend("qiskit").compile(wide, shots=10)._rows_a_job == 2048
    # 2^16 outcomes of 64 bytes and 16 kB a circuit in 2^28 bytes.
    assert load_backend("qiskit").compile(wide, shots=10**6)._rows_a_job == 2**28 // (2**14 + 64 * 2**16)
    assert load_backend("qiskit", circuits_a_job=100).compile(CIRCUIT, shots=1)._rows_a_job == 50
    # Exact values of 1 kB each, of one circuit.
    strings = ["".join(letters) for letters in product("IZ", repeat=10)][1:]
    many = kernel("product", 10, 1, readout=strings)
    assert load_backend("qiskit").compile(many)._rows_a_job == 2**28 // (2**14 + 2**10 * 1023)


class Halting:
    """AerSimulator whose circuits with these numbers do not finish."""

    def __init__(self, simulator, fails):
        self.simulator, self.fails = simulator, fails

    def run(self, circuits, **options):
        result = self.simulator.run(circuits, **options).result()
        for k in self.fails:
            result.results[k].success = False
        result.success, result.status = not self.fails, "ERROR: out of memory"
        return SimpleNamespace(result=lambda: result)


@pytest.mark.parametrize("shots", [None, 20])
def test_circuits_of_a_job_that_finished_are_kept(shots):
    circuit = kernel("basic_entangler", 2, 1)
    x, w = draw(circuit, 3, 2)
    compiled = load_backend("qiskit").compile(circuit, shots=shots, seed=1)
    want = load_backend("qiskit").compile(circuit, shots=shots, seed=1)(x, w)
    compiled._run = replace(compiled._run, simulator=Halting(compiled._run.simulator, [3]))
    with pytest.raises(JobFailed, match=r"patches 1 of 3 have no values.*out of memory") as caught:
        compiled(x, w)
    assert caught.value.missing.tolist() == [[False, False], [False, True], [False, False]]
    kept = ~torch.from_numpy(caught.value.missing)
    torch.testing.assert_close(torch.from_numpy(caught.value.values)[kept], want[kept])


def test_a_bad_angle_behind_good_ones_is_refused():
    # Aer looks at the first circuit's angles alone and would run the others as something else.
    x, w = torch.zeros(3, 2, dtype=torch.float64), torch.zeros(1, 2, dtype=torch.float64)
    x[2, 1] = 0.3
    with pytest.raises(Unsupported, match=r"gate 4 \(RZZ\) has the angle 0.471239 in circuit 2"):
        simulate(CLIFFORD, x, w, backend=load_backend("qiskit", method="stabilizer"))


def test_interrupted_jobs_are_cancelled():
    def run(rows, seed):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_in_jobs(run, np.zeros((3, 1)), 1, np.random.default_rng(0), 1, None)


def test_ranges_in_words():
    assert ranges(np.array([0, 1, 2, 7])) == "0 to 2, 7"
    assert ranges(np.arange(0, 20, 2)) == "0, 2, 4, 6, 8 and 5 more ranges"


# --- cost -------------------------------------------------------------------------------------------------------------


class Tallying:
    """State vectors that count how often a circuit was evaluated."""

    name = "tallying"

    def __init__(self):
        self.rows = 0

    def compile(self, circuit, *, shots=None, noise=None, seed=None):
        compiled, outer = load_backend("statevector").compile(circuit), self

        class Counted:
            differentiable = False
            counts = staticmethod(compiled.counts)

            def __call__(self, inputs, weights):
                outer.rows += len(inputs) * len(weights)
                return compiled(inputs.detach(), weights.detach())

        return Counted()


@pytest.mark.parametrize("options", [{}, {"groups": 2, "readout": ["ZI", "XI", "YY"]}, {"kernel": "sim14"}])
@pytest.mark.parametrize("method", ["parameter-shift", "spsa", "finite-diff"])
def test_cost_is_what_runs(options, method):
    tally = Tallying()
    backend = tally if method == "parameter-shift" else differentiate(tally, method)
    layer = QuantumConv2d(2, 6, (1, 2 if "groups" in options else 1), backend=backend, dtype=torch.float64, **options)
    cost = layer.cost((3, 2, 4, 5))
    for inputs, circuits in ((False, cost.weight_step), (True, cost.step)):
        tally.rows = 0
        layer(torch.rand(3, 2, 4, 5, dtype=torch.float64, requires_grad=inputs)).square().sum().backward()
        assert circuits == tally.rows * cost.settings
    tally.rows = 0
    with torch.no_grad():
        layer(torch.rand(3, 2, 4, 5, dtype=torch.float64))
    assert cost.circuits == tally.rows * cost.settings
    assert cost.method == method


def test_cost_in_words_and_joules():
    layer = QuantumConv2d(1, 4, 2, stride=2, kernel="strongly_entangling")
    cost, counts = layer.cost((1, 8, 8)), layer.counts((1, 8, 8))
    assert cost.circuits == counts["device:circuits"] == 16
    assert cost.total_shots == counts["device:shots"] == 16 * 1024
    assert (cost.gates_1q, cost.gates_2q) == (counts["device:gates_1q"], counts["device:gates_2q"])
    assert cost.depth == layer.circuit.depth()
    (estimate,) = cost.inference
    assert estimate.device is SYCAMORE
    # 26 kW for 1.1 us, and for 200 s of a million shots, each.
    assert estimate.joules == pytest.approx((16384 * 0.0286, 16384 * 5.2))
    assert estimate.seconds == pytest.approx((16384 * 1.1e-6, 16384 * 2e-4))
    text = str(cost)
    assert "16 patches x 1 filter x 1 measurement setting = 16 circuits" in text
    assert "1,024 shots a circuit (assumed: the layer is exact), 16,384 in all" in text
    assert "arXiv:1910.11333" in text
    layer.shots = 100
    assert "100 shots a circuit, 1,600 in all" in str(layer.cost((1, 8, 8)))
    small = Device("small", 2, (1e-3, 1e-2), (10.0, 20.0), "invented for a test")
    assert layer.cost((1, 8, 8), [small]).inference == ()
    with pytest.raises(ValueError, match=r"are \(2, 1\)"):
        Device("wrong", 2, (2, 1), (10.0, 20.0), "")
    with pytest.raises(ValueError, match=r"input_shape is \(8, 8\)"):
        layer.cost((8, 8))


# --- faults -----------------------------------------------------------------------------------------------------------


def lacking():
    return GenericBackendV2(3, basis_gates=["id", "x", "rz", "cx"], seed=0)


NOISE = NoiseModel((("CNOT", Channel("depolarizing", 0.1)),))
BIG = kernel("product", 40, 1)


@pytest.mark.parametrize(
    ("attempt", "says"),
    [
        (lambda: load_backend("qiskit", method="unitary"), "computes matrices, no expectation values"),
        (lambda: load_backend("qiskit", truncate=3), "unknown option of AerSimulator 'truncate'"),
        (lambda: load_backend("qiskit", noise_model=NOISE), "our own, which is noise="),
        (lambda: load_backend("qiskit", noise_model=3), "noise_model is a int"),
        (lambda: load_backend("qiskit", device=3), "device is a int"),
        (lambda: load_backend("qiskit", device=EstimatorV2()), "add normal noise to exact values"),
        (lambda: load_backend("qiskit", executor=3), "executor is a int"),
        (lambda: load_backend("qiskit", circuits_a_job=0), "circuits_a_job is 0"),
        (lambda: load_backend("qiskit", device=lacking(), method="automatic"), "method was given too"),
        (lambda: load_backend("qiskit", noise_model=lacking(), coupling_map=LINE), "others were given too"),
        (lambda: load_backend("qiskit").compile(BIG), "17,592,186,044,416 bytes for 40 wires"),
        (
            lambda: load_backend("qiskit", method="density_matrix", max_memory_mb=1).compile(kernel("product", 10)),
            "bytes",
        ),
        (lambda: load_backend("qiskit").compile(CIRCUIT, shots=0), "shots is 0"),
        (lambda: load_backend("qiskit", device=lacking()).compile(CIRCUIT), "shots=None (exact values) was asked"),
        (lambda: load_backend("qiskit", device=lacking()).compile(CIRCUIT, shots=1), "of which RY is not made up"),
        (lambda: load_backend("qiskit", device=lacking()).compile(kernel("product", 4), shots=1), "has 3 qubits but"),
        (
            lambda: load_backend("qiskit", coupling_map=LINE).compile(kernel("product", 5)),
            "4 qubits but the kernel has 5",
        ),
        (
            lambda: load_backend("qiskit", noise_model=lacking()).compile(CIRCUIT, noise=NOISE, shots=1),
            "give noise, or",
        ),
        (
            lambda: load_backend("qiskit", method="stabilizer").compile(CLIFFORD, noise=NOISE, shots=1),
            "no Kraus operators",
        ),
        (lambda: load_backend("qiskit", method="extended_stabilizer").compile(CLIFFORD), "give shots"),
        (
            lambda: load_backend("qiskit", method="stabilizer").compile(Circuit(1, (Gate("T", (0,)),), ("Z",))),
            "gate 0 (T) is no Clifford gate",
        ),
        (
            lambda: simulate(CLIFFORD, *draw(CLIFFORD), backend=load_backend("qiskit", method="stabilizer")),
            "gate 0 (RY) has the angle",
        ),
        (lambda: simulate(CIRCUIT, *draw(CIRCUIT), backend=3), "backend is a int"),
    ],
)
def test_faults_are_one_clear_sentence(attempt, says):
    with pytest.raises(ValueError) as error:
        attempt()
    assert says in str(error.value)


def test_wide_noisy_shots_sample_channels_where_a_density_matrix_does_not_fit():
    circuit = kernel("basic_entangler", 3, 1)
    x, w = draw(circuit, 2, 1)
    backend = load_backend("qiskit", max_memory_mb=1)
    assert backend.compile(circuit, shots=1, noise=NOISE)._method == "density_matrix"
    wide = kernel("basic_entangler", 9, 1)
    assert backend.compile(wide, shots=1, noise=NOISE)._method == "statevector"
    with pytest.raises(Unsupported, match="4,194,304 bytes for 9 wires but 1,048,576"):
        backend.compile(wide, noise=NOISE)
    sampled = simulate(
        circuit, x, w, backend=load_backend("qiskit", method="statevector"), noise=NOISE, shots=400, seed=1
    )
    exact = simulate(circuit, x, w, backend="fourier", noise=NOISE)
    assert deviations(sampled, exact, 400).max() < 4.5
