"""Arguments that choose and change a simulator: executors, devices, noise, numbers of numpy, and what is refused."""

import copy
import pickle
import re
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from importlib import util

import numpy as np
import pytest
import torch

import qconv
import qconv.backends
from circuits import Channel, NoiseModel, ReadoutError, kernel
from qconv import QuantumConv2d, Unsupported, load_backend, simulate
from qconv.backends.loading import as_backend
from qconv.gradients import differentiate
from qconv.mitigation import ReadoutInversion, ZeroNoise, measure_readout
from qconv.simulate_arguments import read_noise, read_numbers

qml = pytest.importorskip("pennylane")
providers = pytest.importorskip("qiskit.providers.fake_provider")
primitives = pytest.importorskip("qiskit.primitives")

CIRCUIT = kernel("strongly_entangling", 3, 1)
X = torch.rand(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
W = torch.rand(CIRCUIT.n_weights, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
AFTER_CNOT = NoiseModel((("CNOT", Channel("depolarizing", 0.2)),))


def device(wires=4, **options):
    return providers.GenericBackendV2(wires, seed=0, **options)


# --- executors --------------------------------------------------------------------------------------------------------


class Counting(ThreadPoolExecutor):
    jobs = 0

    def submit(self, *arguments, **options):
        self.jobs += 1
        return super().submit(*arguments, **options)


@pytest.mark.parametrize("backend", ["qiskit", "a device"])
def test_an_executor_runs_the_jobs_of_qiskit(backend):
    given = device() if backend == "a device" else backend
    with Counting(2) as pool:
        shared = simulate(CIRCUIT, X, W, backend=given, shots=20, seed=1, executor=pool)
        assert pool.jobs >= 1
        before = pool.jobs
        layer = QuantumConv2d(1, 3, (1, 3), kernel=CIRCUIT, backend=given, shots=20, seed=1, executor=pool)
        layer(torch.rand(1, 1, 2, 3))
        assert pool.jobs > before
    assert torch.equal(shared, simulate(CIRCUIT, X, W, backend=given, shots=20, seed=1))


@pytest.mark.parametrize("backend", ["auto", "statevector", "pennylane"])
def test_an_executor_of_another_backend_is_refused(backend):
    loaded = load_backend("qiskit")
    with ThreadPoolExecutor(1) as pool:
        assert as_backend(loaded, pool).executor is pool
    assert loaded.executor is None
    for given in (backend, load_backend(backend)):
        with ThreadPoolExecutor(1) as pool, pytest.raises(ValueError, match=f"'{backend}'.*backend='qiskit'.*distrib"):
            QuantumConv2d(1, 4, 2, backend=given, executor=pool)


# --- devices ----------------------------------------------------------------------------------------------------------


def test_mitigation_takes_devices_as_layers_do():
    errors = measure_readout(device(), CIRCUIT, shots=200)
    assert set(errors) == {0, 1, 2}
    sampler = primitives.BackendSamplerV2(backend=device())
    on_device, on_sampler = (load_backend("qiskit", device=d).measured_qubits(CIRCUIT, 10) for d in (device(), sampler))
    assert on_sampler == on_device is not None
    assert set(measure_readout(sampler, CIRCUIT, shots=200)) == {0, 1, 2}
    assert set(measure_readout(primitives.StatevectorSampler(), 3, shots=200)) == {0, 1, 2}
    for chooses in (device(), sampler):
        with pytest.raises(ValueError, match="is a number of wires, 3, but qiskit chooses the qubits of each circuit"):
            measure_readout(chooses, 3, shots=200)
    inverted = simulate(CIRCUIT, X, W, backend=ReadoutInversion(device(), ReadoutError(0.02, 0.02)), shots=50, seed=0)
    extrapolated = simulate(CIRCUIT, X, W, backend=ZeroNoise(device()), shots=50, seed=0)
    assert inverted.shape == extrapolated.shape == (4, 3)


def test_pennylane_devices_are_taken_and_their_names_are_explained():
    got = simulate(CIRCUIT, X, W, backend=qml.device("lightning.qubit", wires=3))
    torch.testing.assert_close(got, simulate(CIRCUIT, X, W), atol=1e-10, rtol=0)
    with pytest.raises(
        ValueError, match=r"unknown backend 'lightning.qubit'.*load_backend\('pennylane', device='light"
    ):
        simulate(CIRCUIT, X, W, backend="lightning.qubit")


def test_a_layer_shows_its_device():
    assert "backend=qiskit on generic_backend_4q, shots=5" in repr(QuantumConv2d(1, 4, 2, backend=device(), shots=5))
    assert "backend=pennylane on default.qubit" in repr(QuantumConv2d(1, 4, 2, backend="pennylane"))
    assert repr(QuantumConv2d(1, 4, 2, backend="statevector")).endswith("backend=statevector)")


@pytest.mark.parametrize("backend", ["statevector", "fourier", "pennylane", "qiskit", "auto"])
def test_numbers_of_numpy_are_shots_and_seeds(backend):
    got = simulate(CIRCUIT, X, W, backend=backend, shots=np.int64(16), seed=np.int32(3))
    assert torch.equal(got, simulate(CIRCUIT, X, W, backend=backend, shots=16, seed=3))
    layer = QuantumConv2d(1, 3, (1, 3), kernel=CIRCUIT, backend=backend, shots=np.int64(16), seed=np.int64(3))
    assert type(layer.shots) is int
    assert layer(torch.rand(1, 1, 2, 3)).shape == (1, 3, 2, 1)


# --- noise ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["auto", "fourier", "statevector", "qiskit"])
def test_noise_of_a_layer_can_change(backend):
    torch.manual_seed(0)
    layer = QuantumConv2d(1, 3, (1, 3), kernel=CIRCUIT, backend=backend)
    images = torch.rand(1, 1, 4, 3)
    clean = layer(images)
    layer.noise = AFTER_CNOT
    fresh = QuantumConv2d(1, 3, (1, 3), kernel=CIRCUIT, backend=backend, noise=AFTER_CNOT)
    fresh.load_state_dict(layer.state_dict())
    assert (layer(images) - clean).abs().max() > 0.01
    for twin in (fresh, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(twin(images), layer(images))
        assert twin.noise == AFTER_CNOT
    with pytest.raises(ValueError, match="noise is a str of builtins"):
        layer.noise = "CNOT"
    assert layer.noise == AFTER_CNOT
    layer.noise = None
    torch.testing.assert_close(layer(images), clean)


def test_noise_after_gates_that_are_not_there_is_warned_of_once():
    says = r"noise follows CNOT, which this circuit does not have.*\(RXX, RY, RYY, RZZ, Rot\), or '\*'"
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        layer = QuantumConv2d(1, 4, 2, noise=AFTER_CNOT)
        layer(torch.rand(1, 1, 3, 3))
        layer.shots = 10
    assert len(found) == 1
    assert re.search(says, str(found[0].message))
    assert found[0].filename == __file__
    circuit = kernel("heisenberg", 2, 1)
    with pytest.warns(UserWarning, match="noise follows CNOT") as found:
        simulate(circuit, torch.rand(1, 2), torch.rand(circuit.n_weights), noise=AFTER_CNOT)
    assert [warning.filename for warning in found] == [__file__]
    elsewhere = NoiseModel((("CZ", Channel("bit_flip", 0.1)), ("RY", Channel("bit_flip", 0.1), (1,))))
    one = kernel("basic_entangler", 1, 1)
    with pytest.raises(ValueError, match="wire 1 but the circuit has wires 0 to 0"):
        simulate(one, torch.rand(1, 1), torch.rand(one.n_weights), noise=elsewhere)
    two = kernel("basic_entangler", 2, 1, encoding="angle_x")
    with pytest.warns(UserWarning, match=r"noise follows CZ, RY on wires \(1,\), which.*\(CNOT, RX\)"):
        simulate(two, torch.rand(1, 2), torch.rand(two.n_weights), noise=elsewhere)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        some = NoiseModel((*elsewhere.after, *AFTER_CNOT.after))
        simulate(two, torch.rand(1, 2), torch.rand(two.n_weights), noise=some)
        QuantumConv2d(1, 4, 2, kernel="strongly_entangling", noise=AFTER_CNOT)
        QuantumConv2d(1, 4, 2, noise=NoiseModel((("*", Channel("bit_flip", 0.1)),), readout=ReadoutError(0.1, 0.1)))


def test_a_noise_model_of_aer_is_led_to_its_place():
    aer = pytest.importorskip("qiskit_aer.noise").NoiseModel()
    with pytest.raises(ValueError, match=r"NoiseModel of qiskit_aer.*load_backend\('qiskit', noise_model=\.\.\.\)"):
        QuantumConv2d(1, 4, 2, noise=aer)


# --- what is refused, and when ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"device": "fake_manila"}, "Aer has no device 'fake_manila' on this machine: choose from .*BackendV2 object"),
        ({"max_memory_mb": "lots"}, "max_memory_mb is 'lots': give a number of megabytes"),
        ({"metod": "x"}, "unknown option of AerSimulator 'metod': did you mean 'method'"),
        ({"basis_gates": ["rzz", "cxx"]}, "unknown basis gate 'cxx': did you mean"),
    ],
)
def test_options_of_aer_are_checked_when_it_is_loaded(options, says):
    with pytest.raises(ValueError, match=says):
        load_backend("qiskit", **options)


def test_a_gate_that_a_device_cannot_make_is_named():
    says = r"has gates .*x, cx, of which RY is not made up, but the kernel has RY on wires \(0,\)"
    for backend in (load_backend("qiskit", basis_gates=["x", "cx"]), device(3, basis_gates=["x", "cx"])):
        with pytest.raises(Unsupported, match=says):
            simulate(CIRCUIT, X, W, backend=backend, shots=10)


@pytest.mark.parametrize(("name", "needed"), [("default.clifford", "stim"), ("default.tensor", "quimb")])
def test_what_a_device_of_pennylane_needs_is_said_when_it_is_loaded(name, needed, monkeypatch):
    monkeypatch.setattr("qconv.backends.pennylane.find_spec", lambda asked: None if asked == needed else util.find_spec)
    with pytest.raises(ValueError, match=f"'{name}' needs the package {needed}"):
        load_backend("pennylane", device=name)


@pytest.mark.parametrize("backend", ["statevector", "tensor_network", "auto", "qiskit", "pennylane"])
def test_many_wires_are_refused_at_once_with_their_bytes(backend):
    circuit = kernel("strongly_entangling", 40, 6)
    start = time.process_time()
    with pytest.raises(Unsupported, match=r"40 wires.*\d,\d{3},\d{3},\d{3} bytes|[\d,]{14,} bytes.* 40 wires"):
        load_backend(backend).compile(circuit)
    assert time.process_time() - start < 15  # half a minute before; today about half a second


def test_differentiation_from_evaluations_says_what_fourier_lacks():
    deep = kernel("strongly_entangling", 3, 2)
    with pytest.raises(Unsupported, match="give every angle of the circuit a value of its own, which backend 'fourier"):
        differentiate("fourier").compile(deep)


def test_what_a_failed_job_raises_is_found_where_users_look():
    assert qconv.JobFailed is qconv.backends.JobFailed


# --- the command line -------------------------------------------------------------------------------------------------


def test_gates_in_noise_may_have_their_names_in_openqasm():
    assert read_noise(["cx:depolarizing:0.1", "rz:bit_flip:0.1", "*:bit_flip:0.1"], None) == NoiseModel(
        (
            ("CNOT", Channel("depolarizing", 0.1)),
            ("RZ", Channel("bit_flip", 0.1)),
            ("*", Channel("bit_flip", 0.1)),
        )
    )


def test_features_that_a_file_has_none_of_are_explained():
    with pytest.raises(ValueError, match=r"inputs needed in a row: 0, .*called x, input or feature.* others weights"):
        read_numbers("0.1", 0, "inputs", "--input")


def test_a_truncated_simulation_is_not_called_exact(capsys):
    from qconv.simulate_file import run_circuit, show

    circuit = kernel("strongly_entangling", 6, 3)
    rng = np.random.default_rng(0)
    numbers = rng.uniform(size=(1, 6)), rng.uniform(0, 6, circuit.n_weights)
    backend = load_backend("tensor_network", max_bond=2)
    for shots in (None, 20):
        outcome = run_circuit(circuit, *numbers, backend=backend, shots=shots, seed=0)
        show(outcome, as_json=False)
        header = capsys.readouterr().out.splitlines()[0]
        assert "exact" not in header
        assert f"truncated: {outcome.truncation}" in header
        assert "bonds up to 2" in header
        assert outcome.record()["truncation"]["discarded"] == outcome.truncation.discarded > 0
    outcome = run_circuit(circuit, *numbers, backend=load_backend("statevector"))
    show(outcome, as_json=False)
    assert "backend statevector, exact" in capsys.readouterr().out
    assert outcome.record()["truncation"] is None
