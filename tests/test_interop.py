import json
from pathlib import Path

import numpy as np
import pytest
import torch

from circuits import (
    Angle,
    Circuit,
    Gate,
    as_circuit,
    encode,
    from_qasm3,
    from_qiskit,
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


def _qiskit_ansatz(name):
    library = pytest.importorskip("qiskit.circuit.library")
    return library.real_amplitudes(4, reps=1, parameter_prefix=name)


def _weights_alone(weights):
    from_qiskit(_qiskit_ansatz("w")).to_pennylane()((), weights)


WITHOUT_FEATURES = {
    "qiskit": lambda: _qiskit_ansatz("θ"),
    "circuit": lambda: from_qiskit(_qiskit_ansatz("k")),
    "qasm": lambda: from_qiskit(_qiskit_ansatz("k")).to_qasm3(),
    "pennylane": lambda: _weights_alone,
}


@pytest.mark.parametrize("form", WITHOUT_FEATURES)
def test_a_kernel_of_weights_alone_has_the_encoding_before_it(form):
    ansatz = from_qiskit(_qiskit_ansatz("k"))
    own = WITHOUT_FEATURES[form]()
    assert QuantumConv2d(1, 4, 2, kernel=own).circuit == encode("angle", 4) + ansatz
    assert QuantumConv2d(1, 4, 2, kernel=own, encoding="zz").circuit == encode("zz", 4) + ansatz
    dense = encode("dense_angle", 8, 4)
    assert QuantumConv2d(2, 4, 2, kernel=own, encoding=dense).circuit == dense + ansatz
    with pytest.raises(ValueError, match="holds 4 features on 4 wires but was given 9"):
        QuantumConv2d(1, 4, 3, kernel=own)


def test_what_a_kernel_of_ones_own_does_not_take_is_named_alone():
    own = kernel("product", 4)
    with pytest.raises(ValueError, match=r"^depth 3 was given with a kernel of your own"):
        QuantumConv2d(1, 4, 2, kernel=own, depth=3)
    with pytest.raises(ValueError, match=r"^encoding 'zz' was given with a kernel of your own that takes 4 features"):
        QuantumConv2d(1, 4, 2, kernel=own, encoding="zz")


def test_a_file_is_a_kernel(tmp_path):
    circuit = kernel("sim1", 4)
    path = tmp_path / "kernel.qasm"
    path.write_text(circuit.to_qasm3(), encoding="utf-8")
    assert QuantumConv2d(1, 4, 2, kernel=path).circuit == circuit
    assert QuantumConv2d(1, 4, 2, kernel=str(path)).circuit == circuit
    path.write_text("OPENQASM 2.0;", encoding="utf-8")
    with pytest.raises(ValueError, match=r"kernel\.qasm is not read: OpenQASM line 1: .* only version 3"):
        QuantumConv2d(1, 4, 2, kernel=path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"kernel\.qasm is no text"):
        QuantumConv2d(1, 4, 2, kernel=str(path))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: 3, "kernel is a int: give a kernel's name"),
        (lambda: kernel("product", 3), "takes 3 features but a 2x2 patch"),
        (lambda: kernel("product", 3).to_qiskit(), "takes 3 features but a 2x2 patch"),
        (lambda: "heisenburg", "did you mean 'heisenberg'"),
        (lambda: "OPENQASM 2.0; qreg q[1];", "only version 3"),
        (lambda: _qiskit_ansatz("k"), "none of which is called x or inputs"),
        (lambda: _qiskit_ansatz("k"), "circuits.encode('angle', 4) + circuits.from_qiskit(qc)"),
        (lambda: "missing.qasm", "kernel 'missing.qasm' cannot be read: No such file"),
        (lambda: Path("missing"), "kernel 'missing' cannot be read: No such file"),
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
