import json

import numpy as np
import pytest
import torch

from circuits import (
    Angle,
    Circuit,
    Gate,
    as_circuit,
    from_qasm3,
    kernel,
)
from qconv import QuantumConv2d


def _as_function(circuit):
    def function(inputs, weights):
        return circuit.to_pennylane()(inputs, weights)

    return function


def _as_qnode(circuit):
    qml = pytest.importorskip("pennylane")
    return qml.QNode(circuit.to_pennylane(), qml.device("default.qubit", wires=circuit.n_wires))


def _as_tape(circuit):
    qml = pytest.importorskip("pennylane")
    return qml.tape.make_qscript(circuit.to_pennylane())(np.zeros(circuit.n_inputs), np.zeros(circuit.n_weights))


FORMS = {
    "circuit": lambda circuit: circuit,
    "function": _as_function,
    "qnode": _as_qnode,
    "quantum circuit": lambda circuit: circuit.to_qiskit(),
    "qasm": lambda circuit: circuit.to_qasm3(),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("form", FORMS)
def test_a_layer_takes_a_kernel_in_any_form(form, dtype):
    circuit = kernel("hur_su4" if form == "qasm" else "heisenberg", 4, depth=1)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 1, 5, 5, dtype=dtype, generator=generator, requires_grad=True)
    expected = QuantumConv2d(1, 4, 2, kernel=circuit, dtype=dtype)
    layer = QuantumConv2d(1, 4, 2, kernel=FORMS[form](circuit), dtype=dtype)
    assert layer.circuit.observables == circuit.observables
    layer.load_state_dict(expected.state_dict())
    tolerance = 1e-5 if dtype == torch.float32 else 1e-10
    torch.testing.assert_close(layer(images), expected(images), atol=tolerance, rtol=0)
    gradients = [torch.autograd.grad(own(images).square().sum(), (images, own.weight)) for own in (layer, expected)]
    for found, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(found, wanted, atol=100 * tolerance, rtol=0)


def test_a_layer_takes_a_tape():
    # A tape has numbers, so scales and offsets are gone: its first trainable parameters are the features.
    circuit = Circuit(2, (Gate("RY", (0,), (Angle("input", 0),)), Gate("RX", (1,), (Angle("weight", 0),))), ("ZI",))
    assert as_circuit(_as_tape(circuit), 1) == circuit
    assert QuantumConv2d(1, 1, 1, kernel=_as_tape(circuit)).circuit == circuit


def test_a_layer_with_a_foreign_kernel_is_saved_and_copied():
    import copy
    import pickle

    layer = QuantumConv2d(1, 4, 2, kernel=_as_function(kernel("product", 4)))
    images = torch.rand(1, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(images), layer(images))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: 3, "kernel is a int: give a kernel's name"),
        (lambda: kernel("product", 3), "takes 3 features but a 2x2 patch"),
        (lambda: kernel("product", 3).to_qiskit(), "takes 3 features but a 2x2 patch"),
        (lambda: "heisenburg", "did you mean 'heisenberg'"),
        (lambda: "OPENQASM 2.0; qreg q[1];", "only version 3"),
        (
            lambda: pytest.importorskip("qiskit.circuit.library").real_amplitudes(4),
            "none of which is called x or inputs",
        ),
    ],
)
def test_what_is_no_kernel_is_refused(make, says):
    with pytest.raises(ValueError) as error:
        QuantumConv2d(1, 4, 2, kernel=make())
    assert says in str(error.value)


def test_texts_that_are_no_program():
    with pytest.raises(ValueError, match="no OpenQASM 3 text"):
        as_circuit("heisenberg", 4)
    assert from_qasm3(json.loads(json.dumps(kernel("sim1", 3).to_qasm3()))) == kernel("sim1", 3)
