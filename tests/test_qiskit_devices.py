"""Devices of Qiskit's, simulators that stand for them, and samplers."""

import pickle
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import permutations
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from qiskit import QuantumCircuit
from qiskit.primitives import BackendSamplerV2, BaseSamplerV2, StatevectorSampler
from qiskit.providers.fake_provider import GenericBackendV2
from qiskit_aer import AerSimulator
from qiskit_aer.noise import NoiseModel as AerNoiseModel
from qiskit_aer.noise import ReadoutError as AerReadoutError
from qiskit_aer.noise import depolarizing_error, pauli_error
from qiskit_aer.primitives import SamplerV2
from test_qiskit_backend import CIRCUIT, LINE, deviations, draw, expected

from circuits import Angle, Circuit, Gate, kernel
from circuits.circuit import const
from qconv import QuantumConv2d, Unsupported, load_backend, simulate, surrogate
from qconv.backends.jobs import JobFailed
from qconv.gradients import differentiate

NOTHING = torch.zeros(1, 0, dtype=torch.float64)


@pytest.fixture(scope="module")
def device():
    return GenericBackendV2(4, seed=1, coupling_map=LINE)


# --- noise ------------------------------------------------------------------------------------------------------------


def test_an_aer_noise_model_is_that_of_the_same_channel():
    # Aer's depolarizing parameter mixes in the identity too: all 15 errors of two qubits, (1 - p/4 ...) of each one.
    model = AerNoiseModel()
    model.add_all_qubit_quantum_error(depolarizing_error(0.08, 1), ["sx"])
    for wire in range(3):
        model.add_readout_error(AerReadoutError([[0.9, 0.1], [0.3, 0.7]]), [wire])
    backend = load_backend("qiskit", noise_model=model)
    circuit = Circuit(
        3, (Gate("SX", (0,)), Gate("RZ", (1,), (Angle("input", 0),)), Gate("CNOT", (0, 2))), ("ZII", "IIZ")
    )
    x = torch.rand(2, 1, dtype=torch.float64)
    got = simulate(circuit, x, x.new_zeros(1, 0), backend=backend)
    torch.testing.assert_close(got, torch.full_like(got, 0.2))  # <Z> is 0, misread with an offset of 0.3 - 0.1
    flipped = Circuit(3, (Gate("SX", (0,)), Gate("SX", (0,)), *circuit.gates[1:]), ("ZII", "IIZ"))
    got = simulate(flipped, x, x.new_zeros(1, 0), backend=backend)
    torch.testing.assert_close(got, torch.full_like(got, 0.2 - 0.6 * 0.92**2))
    shots = 4000
    assert (
        deviations(simulate(flipped, x, x.new_zeros(1, 0), backend=backend, shots=shots, seed=2), got, shots).max()
        < 4.5
    )


def test_a_device_samples_what_its_noise_model_predicts(device):
    x, w = draw(CIRCUIT, 2, 1)
    modeled = load_backend("qiskit", noise_model=device)
    exact = simulate(CIRCUIT, x, w, backend=modeled)
    off = (exact - expected(CIRCUIT, x, w)).abs().max()
    assert 1e-3 < off < 0.3
    shots = 4000
    for backend in (device, modeled, AerSimulator.from_backend(device)):
        sampled = simulate(CIRCUIT, x, w, backend=backend, shots=shots, seed=4)
        assert deviations(sampled, exact, shots).max() < 4.5
        assert torch.equal(sampled, simulate(CIRCUIT, x, w, backend=backend, shots=shots, seed=4))


def test_a_readout_error_of_all_qubits_gives_way_to_one_of_its_own():
    model = AerNoiseModel()
    model.add_all_qubit_readout_error(AerReadoutError([[0.9, 0.1], [0.3, 0.7]]))
    model.add_readout_error(AerReadoutError([[0.8, 0.2], [0.5, 0.5]]), [1])
    circuit = Circuit(2, (Gate("X", (0,)),), ("ZI", "IZ", "ZZ"))
    got = simulate(circuit, NOTHING, NOTHING, backend=load_backend("qiskit", noise_model=model))
    # <Z> is -(1 - 0.1 - 0.3) + 0.2 where the bit is 1, and (1 - 0.2 - 0.5) + 0.3 where it is 0.
    torch.testing.assert_close(got.flatten(), torch.tensor([-0.4, 0.6, -0.24], dtype=torch.float64))


def test_correlated_readout_errors_are_sampled_only():
    model = AerNoiseModel()
    model.add_readout_error(AerReadoutError(np.kron([[0.9, 0.1], [0.3, 0.7]], np.eye(2))), [0, 1])
    backend = load_backend("qiskit", noise_model=model)
    with pytest.raises(Unsupported, match="no misread bit of single qubits"):
        backend.compile(CIRCUIT)
    assert backend.compile(CIRCUIT, shots=5)(*draw(CIRCUIT)).isfinite().all()


@pytest.mark.parametrize("name", ["CP", "CRX", "CRY", "CRZ", "CU3"])
def test_errors_of_gates_that_are_written_as_others_are_refused(name):
    model = AerNoiseModel()
    model.add_all_qubit_quantum_error(depolarizing_error(0.5, 2), ["cp", "crx", "cry", "crz", "cu3", "cx"])
    angles = (const(0.7),) * (3 if name == "CU3" else 1)
    circuit = Circuit(2, (Gate("H", (0,)), Gate(name, (0, 1), angles)), ("XI", "IX", "ZZ"))
    for options in ({"noise_model": model}, {"device": AerSimulator(noise_model=model, method="density_matrix")}):
        backend = load_backend("qiskit", **options)
        for shots in (None, 10):
            with pytest.raises(
                Unsupported, match=f"has errors of {name.lower()}, .* so {name} of this kernel is written"
            ):
                backend.compile(circuit, shots=shots)
        # Errors of cx are those of its parts, and of other gates.
        plain = Circuit(2, (Gate("H", (0,)), Gate("CNOT", (0, 1))), ("ZZ",))
        torch.testing.assert_close(
            simulate(plain, NOTHING, NOTHING, backend=backend), torch.full((1, 1, 1), 0.5, dtype=torch.float64)
        )


# --- transpilation ----------------------------------------------------------------------------------------------------


def test_coupling_map_and_basis_gates_are_respected():
    x, w = draw(CIRCUIT)
    want = expected(CIRCUIT, x, w)
    for options in ({}, {"basis_gates": ["rz", "sx", "cx"]}, {"basis_gates": ["h", "p", "cz"], "method": "automatic"}):
        backend = load_backend("qiskit", coupling_map=LINE[:4], **options)
        torch.testing.assert_close(simulate(CIRCUIT, x, w, backend=backend), want, atol=1e-10, rtol=0)
        program = backend.compile(CIRCUIT, shots=5)._program
        for circuit in program.circuits:
            gates = [item for item in circuit.data if item.operation.name not in ("measure", "barrier")]
            pairs = [[circuit.find_bit(q).index for q in item.qubits] for item in gates if len(item.qubits) == 2]
            assert pairs
            assert all(pair in LINE[:4] for pair in pairs)
            assert {item.operation.name for item in gates} <= set(options.get("basis_gates", circuit.count_ops()))


def entangled(wires, a, b):
    """Gates on two of the wires."""
    gates = (
        Gate("RY", (a,), (Angle("input", 0),)),
        Gate("CNOT", (a, b)),
        Gate("RZZ", (b, a), (Angle("input", 1),)),
        Gate("RX", (b,), (const(0.4),)),
    )
    strings = ["".join(letter if w in (a, b) else rest for w in range(wires)) for letter in "ZX" for rest in "IZ"]
    return Circuit(wires, gates, tuple(strings))


@pytest.mark.parametrize("wires", [3, 4])
@pytest.mark.parametrize(
    "options", [{"coupling_map": LINE}, {"coupling_map": LINE[::-1]}, {"basis_gates": ["u", "cz"]}, {}]
)
def test_exact_values_are_right_where_no_gate_touches_a_wire(options, wires):
    x = torch.tensor([[0.7, -1.1], [2.0, 0.3]], dtype=torch.float64)
    backend = load_backend("qiskit", **options)
    layouts = set()
    for a, b in permutations(range(wires), 2):
        circuit = entangled(wires, a, b)
        # Each on its own: Aer is right where another one needs the wire.
        for alone in (circuit.with_observables((text,)) for text in circuit.observables[::3]):
            got = simulate(alone, x, x.new_zeros(1, 0), backend=backend)
            torch.testing.assert_close(got, expected(alone, x, x.new_zeros(1, 0)), atol=1e-10, rtol=0)
        (result, *_) = backend.compile(circuit)._program.circuits
        layouts.add(None if result.layout is None else tuple(result.layout.final_index_layout()))
    assert len(layouts) > 2 or "coupling_map" not in options


def test_wires_without_gates_have_no_noise_of_gates(device):
    idle = entangled(3, 0, 2).with_observables(("IZI",))
    model = AerNoiseModel()
    model.add_all_qubit_quantum_error(pauli_error([("X", 0.3), ("I", 0.7)]), ["id", "sx"])
    x = torch.ones(1, 2, dtype=torch.float64)
    for options in ({}, {"coupling_map": LINE}):
        got = simulate(idle, x, NOTHING, backend=load_backend("qiskit", noise_model=model, **options))
        torch.testing.assert_close(got, torch.ones_like(got))
    modeled = load_backend("qiskit", noise_model=device)
    exact = simulate(entangled(3, 0, 2), x, NOTHING, backend=modeled)
    sampled = simulate(entangled(3, 0, 2), x, NOTHING, backend=modeled, shots=20_000, seed=0)
    assert deviations(sampled, exact, 20_000).max() < 4.5


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: BackendSamplerV2(backend=s)], ids=["simulator", "sampler"])
def test_a_simulators_own_coupling_map_is_respected(noisy, wrap):
    model = AerNoiseModel()
    model.add_all_qubit_quantum_error(depolarizing_error(0.02, 2), ["cx"])
    options = {"noise_model": model} if noisy else {}
    simulator = AerSimulator(method="density_matrix", coupling_map=LINE[:4], **options)
    backend = load_backend("qiskit", device=wrap(simulator))
    program = backend.compile(CIRCUIT, shots=5)._program
    for circuit in program.circuits:
        gates = [[circuit.find_bit(q).index for q in i.qubits] for i in circuit.data if i.operation.name != "barrier"]
        pairs = [pair for pair in gates if len(pair) > 1]
        assert pairs
        assert all(pair in LINE[:4] for pair in pairs)
    x, w = draw(CIRCUIT, 2, 1)
    same = load_backend("qiskit", coupling_map=LINE[:4], **options)
    exact = simulate(CIRCUIT, x, w, backend=same)
    assert ((exact - expected(CIRCUIT, x, w)).abs().max() > 1e-3) == noisy
    assert deviations(simulate(CIRCUIT, x, w, backend=backend, shots=4000), exact, 4000).max() < 4.5
    if isinstance(backend.device, AerSimulator):
        torch.testing.assert_close(simulate(CIRCUIT, x, w, backend=backend), exact, atol=1e-12, rtol=0)
    with pytest.raises(Unsupported, match="has 3 qubits but the kernel has 4"):
        backend.compile(kernel("product", 4), shots=1)


# --- devices and samplers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sampler",
    [
        SamplerV2(),
        BackendSamplerV2(backend=AerSimulator()),
        StatevectorSampler(seed=np.random.default_rng(2)),
    ],
    ids=["aer", "backend", "statevector"],
)
def test_samplers_sample(sampler):
    circuit = kernel("basic_entangler", 9, 1, readout=["Z" * 9, "Z" + "I" * 8, "I" * 8 + "X"])
    x, w = draw(circuit, 3, 1)
    shots = 200
    sampled = simulate(circuit, x, w, backend=sampler, shots=shots)
    ups = (sampled + 1) / 2 * shots
    torch.testing.assert_close(ups, ups.round(), atol=1e-9, rtol=0)
    assert 0.3 < deviations(sampled, simulate(circuit, x, w), shots).max() < 4.5


@pytest.mark.parametrize(
    "sampler",
    [SamplerV2(), BackendSamplerV2(backend=AerSimulator()), StatevectorSampler(seed=np.random.default_rng(0))],
    ids=["aer", "backend", "statevector"],
)
def test_samplers_draw_anew_for_every_patch_and_call(sampler):
    circuit = kernel("product", 2, 1)
    x, w = draw(circuit, 1, 1)
    backend = load_backend("qiskit", device=sampler, circuits_a_job=8)
    values = torch.stack([simulate(circuit, x.expand(16, -1), w, backend=backend, shots=400) for _ in range(2)])
    # Two calls of two jobs of eight equal patches.
    runs = values.reshape(4, 8, 2)
    assert all(len(run.unique(dim=0)) > 4 for run in runs)
    assert len(runs.unique(dim=0)) == 4
    with pytest.raises(Unsupported, match=r"seed=3 was asked of a \w*Sampler"):
        backend.compile(circuit, shots=5, seed=3)


class RuntimeSampler(BaseSamplerV2):
    """Has its seed where the samplers of Qiskit Runtime have it."""

    options = SimpleNamespace(simulator=SimpleNamespace(seed_simulator=1))

    def run(self, pubs, *, shots=None):
        raise NotImplementedError


@pytest.mark.parametrize(
    "sampler",
    [
        SamplerV2(seed=1),
        StatevectorSampler(seed=np.int64(1)),
        BackendSamplerV2(backend=AerSimulator(), options={"seed_simulator": 1}),
        BackendSamplerV2(backend=AerSimulator(seed_simulator=1)),
        RuntimeSampler(),
    ],
    ids=["aer", "statevector", "backend", "simulator", "runtime"],
)
def test_samplers_that_repeat_their_draws_are_refused(sampler):
    with pytest.raises(
        ValueError, match=r"Sampler\w* with the seed 1, from which it draws the same shots in every job"
    ):
        QuantumConv2d(1, 4, 2, backend=sampler, shots=5)


@pytest.mark.parametrize("shots", [None, 100])
def test_without_a_seed_shots_follow_torchs(shots):
    x, w = draw(CIRCUIT, 2, 1)
    found = []
    for _ in range(2):
        torch.manual_seed(5)
        values = simulate(CIRCUIT, x, w, backend="qiskit", shots=shots)
        found.append((values, torch.rand(1)))
    assert torch.equal(found[0][0], found[1][0])
    torch.manual_seed(5)
    # What draws nothing leaves the generator alone.
    assert torch.equal(found[0][1], torch.rand(1)) == (shots is None)


def test_layers_surrogates_and_gradients_take_devices(device):
    layer = QuantumConv2d(1, 2, (1, 2), backend=device, shots=50, seed=1)
    assert layer.backend == "qiskit"
    layer(torch.rand(1, 1, 1, 3)).sum().backward()
    assert layer.weight.grad.abs().max() > 0
    circuit, weights = kernel("product", 1, 1), torch.zeros(kernel("product", 1, 1).n_weights)
    assert surrogate(circuit, weights, device, shots=20).executions == 3
    assert differentiate(device, "spsa").backend.device is device


def test_fake_devices_of_ibm():
    fake = pytest.importorskip("qiskit_ibm_runtime.fake_provider")
    backend = load_backend("qiskit", noise_model=fake.FakeManilaV2())
    x, w = draw(CIRCUIT, 1, 1)
    assert (simulate(CIRCUIT, x, w, backend=backend) - expected(CIRCUIT, x, w)).abs().max() < 0.5


# --- jobs -------------------------------------------------------------------------------------------------------------


class Limited(GenericBackendV2):
    """Takes few circuits a job, counts them, and fails where it is told to."""

    def __init__(self, fails=()):
        super().__init__(3, seed=1, noise_info=False)
        self.jobs, self.fails, self.simulator = [], fails, AerSimulator()

    @property
    def max_circuits(self):
        return 4

    def run(self, circuits, **options):
        assert all(isinstance(circuit, QuantumCircuit) and not circuit.parameters for circuit in circuits)
        self.jobs.append(len(circuits))
        if len(self.jobs) in self.fails:
            raise OSError("the queue is closed")
        return self.simulator.run(circuits, **options)


def test_patches_go_in_as_few_jobs_as_the_device_allows():
    device = Limited()
    circuit = kernel("basic_entangler", 2, 1, readout=["ZI", "XX"])
    x, w = draw(circuit, 5, 1)
    values = simulate(circuit, x, w, backend=device, shots=400, seed=0)
    # Five patches in two settings: two patches a job of four circuits.
    assert device.jobs == [4, 4, 2]
    assert deviations(values, expected(circuit, x, w), 400).max() < 4.5
    device.jobs.clear()
    # A patch of five settings is more than a job.
    five = circuit.with_observables(("ZI", "XX", "YY", "XZ", "YX"))
    simulate(five, x[:1], w, backend=device, shots=1)
    assert device.jobs == [4, 1]


@pytest.mark.parametrize("threads", [0, 2])
def test_a_job_that_fails_loses_nothing(threads):
    device = Limited(fails=(2,))
    circuit = kernel("basic_entangler", 2, 1)
    x, w = draw(circuit, 5, 2)
    with ThreadPoolExecutor(max(1, threads)) as executor:
        backend = load_backend("qiskit", device=device, executor=executor if threads else None)
        with pytest.raises(JobFailed) as caught:
            simulate(circuit, x, w, backend=backend, shots=30)
    failure = caught.value
    assert failure.values.shape == (5, 2, 2)
    assert failure.missing.shape == (5, 2)
    assert np.array_equal(np.isnan(failure.values).any(-1), failure.missing)
    assert 4 <= failure.missing.sum() <= 6
    if not threads:
        assert np.flatnonzero(failure.missing).tolist() == [4, 5, 6, 7, 8, 9]
        assert "patches 2 to 4 of 5 have no values" in str(failure)
        assert "the queue is closed" in str(failure)
        assert "4 of 10 circuits did" in str(failure)
    assert isinstance(failure.__cause__, OSError | RuntimeError)
    assert str(pickle.loads(pickle.dumps(failure))) == str(failure)


# --- cost -------------------------------------------------------------------------------------------------------------


def test_cost_on_a_device_is_that_of_its_circuits(device):
    layer = QuantumConv2d(1, 3, (1, 3), backend=device, shots=10, kernel="strongly_entangling", readout=["ZII", "XXI"])
    cost = layer.cost((1, 4, 4))
    program = load_backend("qiskit", device=device).compile(layer.circuit, shots=10)._program
    kept = [
        Counter(len(i.qubits) for i in c.data if i.operation.name not in ("measure", "barrier"))
        for c in program.circuits
    ]
    runs = cost.patches * cost.filters
    assert cost.settings == 2
    assert (cost.gates_1q, cost.gates_2q) == (runs * sum(k[1] for k in kept), runs * sum(k[2] for k in kept))
    assert (cost.gates_1q, cost.gates_2q) == tuple(layer.counts((1, 4, 4))[f"device:gates_{k}q"] for k in (1, 2))
    # A ring of three on a line of four takes more than its six CNOTs.
    assert kept[0][2] > 6
    # No arithmetic is ours: a device runs it.
    assert not any(key.startswith("mac") for key in layer.counts((1, 4, 4)))


def test_exact_values_cost_what_shots_cost(device):
    options = {"kernel": "strongly_entangling", "readout": ["ZII", "XXI"]}
    for backend in (
        load_backend("qiskit", coupling_map=LINE, basis_gates=["rz", "sx", "cx"]),
        load_backend("qiskit", noise_model=device),
    ):
        exact = QuantumConv2d(1, 2, (1, 3), backend=backend, **options)
        sampled = QuantumConv2d(1, 2, (1, 3), backend=backend, shots=1024, **options)
        assert exact.cost((1, 4, 4)).gates_2q > 2 * 8 * 6
        for name in ("settings", "gates_1q", "gates_2q", "depth"):
            assert getattr(exact.cost((1, 4, 4)), name) == getattr(sampled.cost((1, 4, 4)), name)
        assert exact.counts((1, 4, 4))["device:gates_2q"] == exact.cost((1, 4, 4)).gates_2q
