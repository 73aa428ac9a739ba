"""Entanglement of tensor-network layers and their truncation, against singular values of dense tensors."""

import itertools
import math

import numpy as np
import pytest
import torch
from dense_networks import BONDED, agrees, built, cuts, dense, images, jolted, matricized
from torch import nn

from qconv.tensors.feature_maps import FeatureMap
from qconv.tensors.spectra import canonical, distance


@pytest.mark.parametrize("feature_map", ["cos_sin", "polynomial"])
@pytest.mark.parametrize("kernel_size", [(1, 2), (2, 2), (1, 7)])
@pytest.mark.parametrize("structure", BONDED)
def test_schmidt_values_and_entropy_are_the_dense_ones(structure, kernel_size, feature_map):
    layer = built(
        2, 6, kernel_size, groups=2, structure=structure, bond_dim=2 if feature_map == "polynomial" else 4,
        feature_map=feature_map,
    )  # fmt: skip
    jolted(layer)
    for group, cut in itertools.product(range(2), cuts(layer)):
        want = np.linalg.svd(matricized(layer, cut, group), compute_uv=False)
        want = want / np.linalg.norm(want)
        got = layer.schmidt_values(cut, group).numpy()
        assert len(got) <= layer.bond_dim
        size = min(len(got), len(want))
        np.testing.assert_allclose(got[:size], want[:size], atol=1e-12)
        assert np.abs(want[size:]).sum() < 1e-10
        chances = want[want > 1e-12] ** 2
        assert layer.entanglement_entropy(cut, group) == pytest.approx(-(chances * np.log(chances)).sum(), abs=1e-9)


@pytest.mark.parametrize("kernel_size", [(1, 1), (1, 2), (2, 2), (1, 7)])
@pytest.mark.parametrize("structure", [*BONDED, "eps"])
def test_every_cut_in_one_call(structure, kernel_size):
    layer = jolted(built(2, 6, kernel_size, groups=2, structure=structure, bond_dim=4))
    sites = layer.network.shape.sites
    if structure != "tree":
        assert layer.cuts == range(1, sites + 1)
    for group in range(2):
        spectra, entropies = layer.schmidt_spectra(group), layer.entanglement_entropies(group)
        assert list(spectra) == list(entropies) == list(layer.cuts)
        tensor = dense(layer, group)
        for cut, got in spectra.items():
            if structure == "eps":
                # The first sites against the others and the outputs.
                matrix = np.moveaxis(tensor, 0, -1).reshape(2**cut, -1)
            else:
                matrix = matricized(layer, cut, group)
            want = np.linalg.svd(matrix, compute_uv=False)
            want = want / np.linalg.norm(want)
            size = min(len(got), len(want))
            np.testing.assert_allclose(got.numpy()[:size], want[:size], atol=1e-12)
            assert np.abs(want[size:]).sum() < 1e-10
            chances = want[want > 1e-12] ** 2
            assert entropies[cut] == pytest.approx(-(chances * np.log(chances)).sum(), abs=1e-9)
            assert torch.equal(layer.schmidt_values(cut, group), got)
            assert layer.entanglement_entropy(cut, group) == entropies[cut]


def test_a_plaquette_of_a_train_has_the_trains_spectrum():
    train = jolted(built(1, 3, (1, 4), bond_dim=4, dtype=torch.float64))
    plaquette = built(1, 3, (1, 4), structure="eps", dtype=torch.float64)
    with torch.no_grad():
        plaquette.weight.copy_(torch.from_numpy(dense(train)).flatten()[None])
    x = images(2, 1, 3, 6, dtype=torch.float64)
    torch.testing.assert_close(plaquette(x), train(x), rtol=1e-10, atol=1e-10)
    # The outputs of a train stand between its two middle sites: left of them both cuts part the same sites.
    for cut in (1, 2):
        want = train.schmidt_values(cut)
        torch.testing.assert_close(plaquette.schmidt_values(cut)[: len(want)], want, rtol=0, atol=1e-12)


def test_entropies_of_a_chain_over_a_whole_image():
    entropies = built(1, 10, 14, bond_dim=5).entanglement_entropies()
    assert len(entropies) == 196
    assert all(-1e-12 <= entropy <= math.log(5) for entropy in entropies.values())


def test_entropy_of_known_states():
    layer = built(1, 1, (1, 2), bond_dim=2, dtype=torch.float64)
    eye = torch.eye(2, dtype=torch.float64)
    with torch.no_grad():
        # Chain cores are stored (bond, site), and the middle one (output, left, right).
        layer.weight.copy_(torch.cat([eye.flatten(), eye.flatten(), eye.flatten()])[None])
        assert layer.entanglement_entropy(1) == pytest.approx(math.log(2), abs=1e-12)
        layer.weight.copy_(torch.cat([eye.flatten(), eye.flatten(), torch.ones(4, dtype=torch.float64)])[None])
        assert layer.entanglement_entropy(1) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("kernel_size", [(2, 2), (1, 5), (3, 3)])
@pytest.mark.parametrize("structure", BONDED)
def test_truncation_error_is_the_dense_distance(structure, kernel_size):
    layer = built(2, 6, kernel_size, groups=2, structure=structure, bond_dim=4, bias=True, dtype=torch.float64)
    jolted(layer)
    nn.init.normal_(layer.bias)
    norm = math.sqrt(sum((dense(layer, g) ** 2).sum() for g in range(2)))
    for bond in (4, 3, 2):
        before = torch.get_rng_state()
        smaller, error = layer.truncate(bond)
        assert torch.equal(before, torch.get_rng_state())
        assert smaller.bond_dim == bond
        want = math.sqrt(sum(((dense(layer, g) - dense(smaller, g)) ** 2).sum() for g in range(2)))
        assert error == pytest.approx(want, rel=1e-9, abs=1e-12 * norm)
        if bond == 4:
            assert want < 1e-12 * norm
        agrees(smaller, images(1, 2, 3, 5, dtype=torch.float64))
        # No worse than sqrt(bonds) times the best of this bond, which is at least the worst single cut.
        singles = []
        for cut in cuts(layer):
            squares = [np.linalg.svd(matricized(layer, cut, g), compute_uv=False)[bond:] ** 2 for g in range(2)]
            singles.append(sum(s.sum() for s in squares))
        assert max(singles) ** 0.5 <= error * (1 + 1e-9) + 1e-12 * norm
        assert error <= sum(singles) ** 0.5 * (1 + 1e-9) + 1e-12 * norm


@pytest.mark.parametrize("kernel_size", [(2, 2), (1, 5)])
@pytest.mark.parametrize("structure", BONDED)
def test_the_error_of_float32_is_that_of_the_stored_weights(structure, kernel_size):
    layer = jolted(built(2, 6, kernel_size, groups=2, structure=structure, bond_dim=4))
    norm = math.sqrt(sum((dense(layer, g) ** 2).sum() for g in range(2)))
    for bond in (4, 2):
        smaller, error = layer.truncate(bond)
        want = math.sqrt(sum(((dense(layer, g) - dense(smaller, g)) ** 2).sum() for g in range(2)))
        assert error == pytest.approx(want, rel=1e-6)
        # Nothing is discarded at first, but numbers are rounded.
        assert 1e-9 * norm < want
        assert (want < 1e-6 * norm) == (bond == 4)


@pytest.mark.parametrize("kernel_size", [(1, 1), (1, 2), (1, 3), (2, 2), (1, 5)])
@pytest.mark.parametrize("structure", BONDED)
def test_distances_are_the_dense_ones(structure, kernel_size):
    one = jolted(built(1, 3, kernel_size, structure=structure, bond_dim=3, dtype=torch.float64))
    other = jolted(built(1, 3, kernel_size, structure=structure, bond_dim=2, dtype=torch.float64, seed=3))
    cores = [[core[0] for core in layer._split(layer.weight.detach())] for layer in (one, other)]
    want = np.linalg.norm(dense(one) - dense(other))
    assert distance(one.network, *cores) == pytest.approx(want, rel=1e-12)
    # Nearly equal tensors lose no digits of their difference; the root enters linearly.
    near = [core.clone() for core in cores[0]]
    near[-1] += 1e-9 * torch.randn(near[-1].shape, dtype=torch.float64)
    change = near[-1] - cores[0][-1]
    got = distance(one.network, cores[0], near)
    with torch.no_grad():
        one.weight[0, -change.numel() :] = change.flatten()
    assert got == pytest.approx(np.linalg.norm(dense(one)), rel=1e-5)


def test_truncating_a_single_bond_discards_its_schmidt_values():
    layer = jolted(built(1, 1, (1, 2), structure="mps", bond_dim=3, feature_map="one_cos_sin", dtype=torch.float64))
    values = np.linalg.svd(dense(layer)[0], compute_uv=False)
    _, error = layer.truncate(1)
    assert error == pytest.approx(math.sqrt((values[1:] ** 2).sum()), rel=1e-12)


@pytest.mark.parametrize("structure", BONDED)
def test_a_normalized_network_truncated_keeps_its_size_and_what_is_largest(structure):
    layer = built(1, 10, 14, structure=structure, bond_dim=6)
    x = images(30, 1, 14, 14)
    same, error = layer.truncate(6)
    root = canonical(layer.network, [core[0].double() for core in layer._split(layer.weight.detach())])[-1]
    assert error < 1e-5 * root.norm()
    old, new = layer(x).flatten(1), same(x).flatten(1)
    assert torch.equal(old.argmax(1), new.argmax(1))
    ratio = old / new
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio), rtol=1e-2, atol=0)
    assert 0.8 < old.norm() / new.norm() < 1.25


def test_errors_of_cuts_and_truncation():
    layer = built(1, 2, 2, bond_dim=3)
    for cut in (0, 5):
        with pytest.raises(ValueError, match=f"cut is {cut} but this network is cut from 1 to 4"):
            layer.schmidt_values(cut)
    for structure, cut, says in (
        ("tree", 2, "from 0 to 1"), ("eps", 5, "from 1 to 4"), ("eps", 0, "from 1 to 4"), ("mps", 1.5, "whole number"),
        ("mps", "all", "whole number"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=says):
            built(1, 2, 2, structure=structure, bond_dim=3).schmidt_values(cut)
    with pytest.raises(ValueError, match="cut nowhere: it is one core"):
        built(1, 2, 1, structure="tree").schmidt_values(0)
    assert built(1, 2, 1, structure="tree").schmidt_spectra() == {}
    for ask in ("schmidt_spectra", "entanglement_entropies"):
        with pytest.raises(ValueError, match='structure is "mera", whose gates cross every cut'):
            getattr(built(1, 2, 2, structure="mera"), ask)()
    with pytest.raises(ValueError, match="group is 'first'"):
        layer.schmidt_spectra("first")
    with pytest.raises(ValueError, match="group is 1 but the layer has 1"):
        layer.cores(1)
    with pytest.raises(ValueError, match="bond_dim is 4 but the layer has 3"):
        layer.truncate(4)
    with pytest.raises(ValueError, match='structure is "eps", which has no bonds'):
        built(1, 2, 2, structure="eps").truncate(1)
    with pytest.raises(ValueError, match="truncate to at least 2"):
        built(1, 2, 2, structure="tree").truncate(1)
    with pytest.raises(ValueError, match="degree is 0"):
        FeatureMap("polynomial", degree=0)
    with pytest.raises(ValueError, match="scale is 0"):
        FeatureMap("sin2_cos2", scale=0)
