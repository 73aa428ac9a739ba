"""What PennyLane functions are called with: which argument is which, and the shapes of weights."""

import numpy as np
import pytest
from foreign import W, X, assert_same_up_to_phase, pennylane_unitary, unitary

from circuits import Angle, as_circuit, from_pennylane, kernel
from qconv import QuantumConv2d

qml = pytest.importorskip("pennylane")


def _queue(x, w):
    for wire in range(3):
        qml.RY(2 * x[wire], wires=wire)
        qml.RX(w[wire], wires=wire)
        qml.RZ(w[wire + 3], wires=wire)


def _features_first(inputs, weights):
    _queue(inputs, weights)


def _short(x, theta):
    _queue(x, theta)


def _one_clear(data, k):
    _queue(data, k)


def _other_clear(k, params):
    _queue(k, params)


def _by_order(a, b):
    _queue(a, b)


def _with_options(X, W, layers=3):
    _queue(X, W[: 2 * layers])


def _weights_first(weights, inputs):
    _queue(inputs, weights)


def _first_clear(theta, k):
    _queue(k, theta)


def _second_clear(k, image):
    _queue(image, k)


def _keyword_only(weights_0, *, patch):
    _queue(patch, weights_0)


def _default(w, wires=3, pixels=None):
    _queue(pixels, w)


FUNCTIONS = [
    _features_first,
    _short,
    _one_clear,
    _other_clear,
    _by_order,
    _with_options,
    _weights_first,
    _first_clear,
    _second_clear,
    _keyword_only,
    _default,
]


@pytest.mark.parametrize("sizes", [(), (3, 6)])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_arguments_are_known_by_their_names(function, sizes):
    circuit = from_pennylane(function, *sizes)
    assert (circuit.n_inputs, circuit.n_weights) == (3, 6)
    assert circuit == from_pennylane(_features_first)
    assert_same_up_to_phase(unitary(circuit), pennylane_unitary(lambda: _queue(X, W), 3))


def nothing(*operations):
    """What a function returns that only queues operations."""


def test_a_function_of_weights_alone_has_no_features():
    assert from_pennylane(lambda weights: nothing(qml.RX(weights[1], 0))).n_weights == 2
    assert from_pennylane(lambda x: nothing(qml.RX(x[1], 0))).n_inputs == 2


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (lambda x, data: None, "x and data are both called like features"),
        (lambda theta, weights: None, "theta and weights are both called like weights"),
        (lambda x, w, b: None, r"takes 3 arguments \(x, w, b\)"),
    ],
)
def test_arguments_that_contradict_each_other_are_refused(function, says):
    with pytest.raises(ValueError, match=says):
        from_pennylane(function)


def _rows(weights, angles):
    for layer in range(2):
        for wire in range(3):
            qml.Rot(*angles(weights, layer, wire), wires=wire)


@pytest.mark.parametrize(
    "angles",
    [
        lambda w, layer, wire: [w[layer, wire, k] for k in range(3)],
        lambda w, layer, wire: [w[layer][wire][k] for k in range(3)],
        lambda w, layer, wire: [w[layer, wire][k] for k in range(3)],
    ],
)
def test_indices_of_several_axes_tell_the_shape(angles):
    circuit = from_pennylane(lambda x, w: _rows(w, angles))
    expected = pennylane_unitary(lambda: _rows(W[:18].reshape(2, 3, 3), angles), 3)
    assert circuit.n_weights == 18
    assert_same_up_to_phase(unitary(circuit), expected)


def _strongly(weights, inputs):
    qml.AngleEmbedding(np.pi * inputs, wires=range(4), rotation="Y")
    qml.StronglyEntanglingLayers(weights, wires=range(4))


def _basic(inputs, weights):
    qml.BasicEntanglerLayers(weights, wires=range(4))
    qml.AngleEmbedding(inputs, wires=range(4))


def _loop(inputs, weights):
    qml.AngleEmbedding(inputs, wires=range(4))
    for layer in weights:
        for wire, angle in enumerate(layer):
            qml.RX(angle, wires=wire)
        qml.CZ([0, 3])


def _rotations(inputs, weights):
    qml.AngleEmbedding(inputs, wires=range(4))
    for wire, angles in enumerate(weights):
        qml.Rot(*angles, wires=wire)


def _single(inputs, weights):
    qml.AngleEmbedding(inputs, wires=range(4))
    for wire, angle in enumerate(weights):
        qml.RY(angle, wires=wire)


WHOLE = [
    (_strongly, lambda depth: (depth, 4, 3)),
    (_basic, lambda depth: (depth, 4)),
    (_loop, lambda depth: (depth, 4)),
    (_rotations, lambda depth: (4, 3)),
    (_single, lambda depth: (4,)),
]


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize(("function", "shape"), WHOLE)
def test_shapes_of_weights_that_are_used_as_a_whole(function, shape, depth):
    circuit = as_circuit(function, 4, depth)
    values = W[: np.prod(shape(depth))].reshape(shape(depth))
    pair = (values, X[:4]) if function is _strongly else (X[:4], values)
    assert_same_up_to_phase(unitary(circuit), pennylane_unitary(function, 4, *pair))


def test_a_layer_takes_a_qnode_with_templates():
    def measured(weights, inputs):
        _strongly(weights, inputs)
        return [qml.expval(qml.Z(wire)) for wire in range(4)]

    node = qml.QNode(measured, qml.device("default.qubit", wires=4))
    for options, layers in (({}, 2), ({"depth": 3}, 3)):
        layer = QuantumConv2d(1, 4, 2, kernel=node, **options)
        assert layer.circuit == kernel("strongly_entangling", 4, depth=layers)
        expected = pennylane_unitary(_strongly, 4, W[: 12 * layers].reshape(layers, 4, 3), X[:4])
        assert_same_up_to_phase(unitary(layer.circuit), expected)


def test_a_torch_layer_knows_the_shape_of_its_weights():
    node = qml.QNode(lambda inputs, weights: _strongly(weights, inputs), qml.device("default.qubit", wires=4))
    node = qml.qnn.TorchLayer(node, {"weights": (5, 4, 3)})
    circuit = from_pennylane(node, 4)
    assert circuit == kernel("strongly_entangling", 4, depth=5)
    assert QuantumConv2d(1, 4, 2, kernel=node).circuit == circuit


@pytest.mark.parametrize(
    "function",
    [
        # No shape that is tried fits, or leaves no weight unread.
        lambda inputs, weights: nothing(_loop(inputs, weights), weights.shape[5]),
        lambda inputs, weights: _loop(inputs, weights[0]),
    ],
)
def test_weights_of_no_known_shape_are_refused_with_the_whole_call(function):
    with pytest.raises(ValueError) as error:
        QuantumConv2d(1, 4, 2, kernel=function)
    assert "uses its weights as a whole" in str(error.value)
    assert "circuits.from_pennylane(function, 4, (2, 4, 3)) for 4 features" in str(error.value)


def test_the_call_in_the_error_works():
    with pytest.raises(ValueError) as error:
        from_pennylane(_strongly, 4)
    (call,) = [part for part in str(error.value).split(" for ") if "circuits.from_pennylane" in part]
    assert call.endswith("circuits.from_pennylane(function, 4, (2, 4, 3))")
    assert from_pennylane(_strongly, 4, (2, 4, 3)) == kernel("strongly_entangling", 4)


@pytest.mark.parametrize(
    ("operation", "says"),
    [
        (lambda x: qml.BasisEmbedding(x, wires=range(4)), "operation 2 (BasisEmbedding) raises ValueError"),
        (lambda x: qml.AmplitudeEmbedding(x, wires=[0, 1], normalize=True), "operation 2 (AmplitudeEmbedding) raises"),
        (lambda x: qml.SelectPauliRot(x, [0, 1], 2), "operation 2 (SelectPauliRot) cannot be read: PennyLane decom"),
        (lambda x: qml.AngleEmbedding(x, wires=range(3)), "operation 2 (AngleEmbedding) raises ValueError: Features"),
        (lambda x: qml.RX(qml.math.sin(x[0]), 0), "after 2 operations (the last is S) it raises NotAffine: sin of a"),
        (lambda x: qml.RX(x[4], 0), "after 2 operations (the last is S) it raises IndexError: index 4 is out"),
    ],
)
def test_operations_that_take_no_symbols_are_named_with_their_position(operation, says):
    def function(x):
        qml.Hadamard(0)
        qml.S(0)
        operation(x)

    with pytest.raises(ValueError) as error:
        from_pennylane(function, 4)
    assert says in str(error.value)
    assert "raises" not in says or "it was given 4 features" in str(error.value)


def test_a_class_of_operations_is_no_function():
    with pytest.raises(ValueError, match=r"StronglyEntanglingLayers is an operation, not a function: call it in one"):
        QuantumConv2d(1, 4, 2, kernel=qml.StronglyEntanglingLayers)


def test_weights_that_only_need_an_index_keep_their_numbers():
    circuit = from_pennylane(lambda x, w: nothing(qml.RX(w[7], 0), qml.RY(w[..., 2], 0), qml.RZ(w[:3][1], 0)))
    assert [gate.angles for gate in circuit.gates] == [(Angle("weight", k),) for k in (7, 2, 1)]
