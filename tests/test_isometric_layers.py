"""Layers as circuits without post-selection, and what conversions say to something else than they take."""

import numpy as np
import pytest
import torch
from dense_networks import built, images, jolted
from torch import nn

from circuits import kernel
from qconv import ProbabilisticBinaryConv2d, QuantumConv2d, simulate
from qconv.tensors import trains
from qconv.tensors.circuits import TreeNetwork, isometric_circuit, isometric_root, layer_network, train_network
from qconv.tensors.conversions import kernel_to_tensor_train


@pytest.mark.parametrize("structure", ["mps", "tree"])
def test_a_layer_reads_out_without_postselection_once_its_root_is_an_isometry(structure):
    layer = jolted(built(1, 3, 2, structure=structure, bond_dim=2, dtype=torch.float64))
    network = layer_network(layer)
    with pytest.raises(ValueError, match=r"use 'postselect', or isometric_root\(network\)"):
        isometric_circuit(network, "discard")
    whitened = isometric_root(network)
    rows = whitened.tensors[-1].flatten(1)
    torch.testing.assert_close(rows @ rows.T, torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-12)
    x = images(20, 1, 2, 2, dtype=torch.float64).flatten(1)
    found = isometric_circuit(whitened, "discard")
    assert found.scale == pytest.approx(1, abs=1e-12)
    chances = found.probabilities(simulate(found.circuit, x, found.weights, backend="statevector"))
    # Three outputs on two qubits: the fourth state has the rest.
    assert (chances > 0).all()
    assert (chances.sum(1) < 1).all()
    # Postselected amplitudes are G^(-1/2) f, with G the inner products of all W_o, as of the canonical root's rows.
    outputs = layer.evaluate(x, layer.weight).detach().numpy()
    tensors = np.stack([_dense(layer, o) for o in range(3)])
    values, vectors = np.linalg.eigh(tensors @ tensors.T)
    want = outputs @ (vectors / np.sqrt(values)) @ vectors.T
    selected = isometric_circuit(whitened)
    got = selected.probabilities(simulate(selected.circuit, x, selected.weights, backend="statevector"))
    np.testing.assert_allclose(selected.scale**2 * got, want**2, atol=1e-7)
    assert (chances.numpy() >= want**2 - 1e-7).all()


def _dense(layer, output):
    """W_o, from the outputs on all products of basis vectors: the sites' vectors are (1, 0) at x = 0, (0, 1) at 1."""
    corners = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * 4)
    return layer.evaluate(corners, layer.weight).detach().numpy()[:, output]


def test_roots_that_cannot_be_isometries():
    with pytest.raises(ValueError, match="takes 2 numbers to 3 outputs"):
        isometric_root(train_network([torch.rand(1, 2, 2), torch.rand(2, 3, 1)], output=1))
    equal = TreeNetwork((torch.ones(2, 2),), ((0,),))
    with pytest.raises(ValueError, match="only independent rows"):
        isometric_root(equal)


LAYER = built(1, 2, 2, bond_dim=2)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: kernel_to_tensor_train(nn.Conv2d(1, 1, 2)), "kernel is a Conv2d: give a QuantumConv2d, a"),
        (lambda: kernel_to_tensor_train(LAYER), "kernel is a TensorNetworkConv2d"),
        (lambda: kernel_to_tensor_train("heisenberg", torch.zeros(3)), "kernel is a str"),
        (lambda: kernel_to_tensor_train(kernel("product", 2), [0.0] * 6), "weights are a list: give a torch.Tensor"),
        (lambda: layer_network(nn.Conv2d(1, 1, 2)), "layer is a Conv2d: give a TensorNetworkConv2d"),
        (lambda: layer_network(QuantumConv2d(1, 1, 2)), "layer is a QuantumConv2d"),
        (lambda: layer_network(LAYER, "a"), "group is 'a'"),
        (lambda: isometric_circuit(LAYER), r"network is a TensorNetworkConv2d: give a TreeNetwork .* layer_network"),
        (lambda: isometric_circuit(LAYER.cores()), "network is a list"),
        (lambda: isometric_root(LAYER), "network is a TensorNetworkConv2d"),
        (lambda: isometric_circuit(TreeNetwork((np.ones((1, 2)),), ((0,),))), "of ndarray: give a TreeNetwork"),
        (lambda: isometric_circuit(layer_network(built(1, 2, (2, 4), bond_dim=8))), "truncate the bonds, to 4 in a"),
        (lambda: train_network(LAYER), "train is a TensorNetworkConv2d: give a list of cores"),
        (lambda: trains.norm([np.ones((1, 2, 1))]), "core 0 is a ndarray: give a torch.Tensor"),
        (lambda: trains.norm(torch.ones(1, 2, 1)), "train is a Tensor"),
        (lambda: trains.from_dense(np.ones((2, 2))), "tensor is a ndarray"),
        (lambda: ProbabilisticBinaryConv2d(1, 1, 2).init_from(nn.Conv2d(1, 1, 2)), "weight is a Conv2d: give the"),
    ],
)  # fmt: skip
def test_what_conversions_take(make, says):
    with pytest.raises(ValueError, match=says):
        make()


@pytest.mark.parametrize("structure", ["mps", "tree"])
def test_bonds_fill_the_qubits_of_the_next_power_of_two(structure):
    gates = {}
    for bond in (2, 3, 4):
        torch.manual_seed(0)
        layer = built(1, 2, (1, 6), structure=structure, bond_dim=4, dtype=torch.float64).truncate(bond)[0]
        gates[bond] = (
            max(len(gate.wires) for gate in isometric_circuit(layer_network(layer)).circuit.gates),
            len(isometric_circuit(layer_network(layer)).circuit.gates),
        )
    assert gates[2][1] < 0.7 * gates[3][1]
    assert gates[3][1] > 0.7 * gates[4][1]
