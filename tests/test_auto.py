"""What backend "auto" refuses, how quickly, and what it falls back to."""

import time
from itertools import product

import numpy as np
import pytest
import torch

from circuits import kernel
from qconv import QuantumDeformedConv2d, QuantumDeformedLinear, load_backend, simulate
from qconv.backends import sweeps
from qconv.backends.pauli_ops import split_encoding
from qconv.backends.protocol import Unsupported
from qconv.backends.sums import Sums, TooMany
from qconv.backends.tensor_train import TrainCompiled


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
