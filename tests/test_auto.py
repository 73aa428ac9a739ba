"""What backend "auto" chooses and refuses, how quickly, and what it falls back to."""

import time
from itertools import product

import numpy as np
import pytest
import torch

from circuits import Channel, NoiseModel, kernel
from qconv import QuantumDeformedConv2d, QuantumDeformedLinear, load_backend, simulate
from qconv.backends import sweeps
from qconv.backends.auto import TYPICAL
from qconv.backends.costs import Call, seconds
from qconv.backends.pauli_ops import split_encoding
from qconv.backends.protocol import Unsupported
from qconv.backends.sums import Sums, TooMany
from qconv.backends.tensor_train import TrainCompiled

NOISE = NoiseModel((("CNOT", Channel("depolarizing", 0.05)), ("*", Channel("amplitude_damping", 0.07))))


def test_auto_refuses_a_large_circuit_at_once_and_in_few_words():
    layer = QuantumDeformedLinear(784, 10)
    circuit = layer.circuit()
    start = time.process_time()
    with pytest.raises(Unsupported, match=r"1578 wires, 2\^1581 bytes") as refused:
        load_backend("auto").compile(circuit)
    assert time.process_time() - start < 20  # it was minutes; today less than one second
    assert len(str(refused.value)) < 500
    assert "qiskit" not in str(refused.value)  # 2^1582 bytes are too many for it too


def test_auto_names_who_can_run_a_circuit_of_middle_size():
    with pytest.raises(Unsupported, match=r"22 wires.*or backend 'qiskit'"):
        load_backend("auto").compile(QuantumDeformedConv2d(1, 1, 3).circuit())


def test_auto_falls_to_states_where_coefficients_are_too_many():
    circuit = kernel("heisenberg", 10, 2)
    strings = ["".join(string) for string in product("IZ", repeat=10)][1:]
    compiled = load_backend("auto").compile(circuit.with_observables(tuple(strings)))
    assert list(compiled.ways) == ["statevector"]
    with pytest.raises(Unsupported, match=r"1023 \* 4\^10 coefficients, more than 2\^26"):
        load_backend("fourier").compile(circuit.with_observables(tuple(strings)))
    # With fewer strings there is a choice.
    few = load_backend("auto").compile(circuit)
    assert set(few.ways) == {"fourier (all coefficients)", "statevector"}


def test_a_kernel_with_many_gates_between_wires_is_refused_before_it_is_looked_at(monkeypatch):
    circuit = kernel("strongly_entangling", 8, 1)
    TrainCompiled(circuit, None)
    # A ring of 8 gates: 7 between neighbors, and one from end to end that crosses all 7 gaps.
    monkeypatch.setattr(sweeps, "MOST_CROSSINGS", 1)
    monkeypatch.setattr(sweeps, "_Builder", None)
    with pytest.raises(Unsupported, match="up to 1 gates between neighboring wires but here are 2 on average"):
        sweeps.contract(circuit, *split_encoding(circuit, None))


def test_the_quick_check_refuses_what_the_sums_would():
    circuit = kernel("heisenberg", 8, 2)
    encoders, block = split_encoding(circuit, None)
    factors = Sums(10**6)
    builder = sweeps._Builder(2048, factors, Sums(10**6, factors))
    with pytest.raises(TooMany):
        builder.values(circuit, encoders, block)
    unchecked = sweeps._Builder(2048, factors, Sums(10**6, factors))
    unchecked._check = lambda *arguments: None
    with pytest.raises(TooMany):
        unchecked.values(circuit, encoders, block)


def test_auto_and_the_state_vector_agree_on_a_circuit_without_a_train():
    layer = QuantumDeformedLinear(4, 2)
    circuit, weights = layer.circuit(), layer.circuit_weights()
    inputs = layer.circuit_inputs(torch.rand(3, 4))
    both = [simulate(circuit, inputs, weights, backend=name).detach() for name in ("auto", "statevector")]
    np.testing.assert_allclose(*both, atol=1e-6)


def test_auto_says_what_it_chose():
    auto = load_backend("auto")
    reupload = kernel("product", 2) + kernel("product", 2)
    strings = ["".join(letters) for letters in product("XYZ", repeat=4)]
    for circuit, shots, noise, name in [
        (kernel("heisenberg", 4), None, None, "fourier"),
        (kernel("heisenberg", 4), None, NOISE, "fourier"),
        (kernel("heisenberg", 4, encoding="amplitude"), None, None, "fourier"),
        (kernel("heisenberg", 4, encoding="amplitude"), None, NOISE, "fourier"),
        (kernel("heisenberg", 4, encoding="amplitude", readout=strings), None, None, "statevector"),
        (kernel("heisenberg", 4, encoding="amplitude", readout=strings), None, NOISE, "fourier"),
        (kernel("heisenberg", 9, encoding="amplitude"), None, None, "statevector"),
        (kernel("heisenberg", 9, encoding="amplitude"), None, NOISE, "statevector: density matrices"),
        (reupload, None, None, "statevector"),
        (reupload, None, NOISE, "statevector: density matrices"),
        (kernel("product", 11) + kernel("product", 11), None, NOISE, "pennylane"),
        (kernel("heisenberg", 9), None, None, "statevector"),
        (kernel("heisenberg", 11), None, None, "statevector"),
        (kernel("strongly_entangling", 9), None, None, "fourier"),
        (kernel("strongly_entangling", 25), None, None, "fourier"),
        (kernel("heisenberg", 4), 100, None, "statevector: 100 shots"),
        (kernel("heisenberg", 4), 100, NOISE, "statevector: 100 shots"),
        (reupload, 100, NOISE, "statevector: 100 shots"),
        (kernel("heisenberg", 18), 100, None, "qiskit: 100 shots"),
        (kernel("heisenberg", 8), 100, NOISE, "qiskit: 100 shots"),
        (kernel("heisenberg", 21), 100, None, "qiskit: 100 shots are counts of AerSimulator; since backend 'state"),
    ]:
        forced = auto.forced(circuit, shots, noise)
        if forced is None:
            reason = auto.compile(circuit, noise=noise).reason(TYPICAL)
            assert "predicted" in reason
        else:
            backend, reason = forced
            assert backend.name == name.partition(":")[0]
        assert reason.startswith(name)


def test_auto_takes_the_way_that_the_model_prices_lowest():
    circuit = kernel("strongly_entangling", 8)
    compiled = load_backend("auto").compile(circuit)
    assert len(compiled.ways) == 3
    for call in (Call(1, training=False), Call(1), Call(100_000), Call(100_000, 4, False, "cpu", False)):
        prices = {name: seconds(way, call) for name, way in compiled.ways.items()}
        name, price = compiled.ranking(call)[0]
        assert price == min(prices.values())
        assert compiled.pick(*call) is compiled.ways[name]
        assert compiled.reason(call).startswith(name)
    # A backward pass, more patches and more filters cost more.
    for way in compiled.ways.values():
        few = seconds(way, Call(1000, 1, False))
        assert few < seconds(way, Call(1000, 1, True)) < seconds(way, Call(100_000, 1, True))
        assert few < seconds(way, Call(1000, 8, False))


def test_every_way_of_auto_has_the_same_values():
    for circuit in (
        kernel("strongly_entangling", 8),
        kernel("heisenberg", 3),
        kernel("heisenberg", 3, encoding="amplitude"),
    ):
        compiled = load_backend("auto").compile(circuit)
        assert len(compiled.ways) > 1
        rng = torch.Generator().manual_seed(0)
        x = torch.rand(5, circuit.n_inputs, dtype=torch.float64, generator=rng)
        w = torch.rand(2, circuit.n_weights, dtype=torch.float64, generator=rng)
        want = load_backend("statevector").compile(circuit)(x, w)
        for way in compiled.ways.values():
            torch.testing.assert_close(way(x, w), want, atol=1e-10, rtol=0)
        torch.testing.assert_close(compiled(x, w), want, atol=1e-10, rtol=0)
