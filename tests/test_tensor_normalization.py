"""Fresh tensor networks, and long ones that divide by norms: outputs of sane size on any images."""

import numpy as np
import pytest
import torch
from dense_networks import BONDED, built, dense, images, jolted
from torch import nn

from qconv.binary_modules import PixelBits
from qconv.probabilistic import ProbabilisticBinaryConv2d

STRUCTURES = (*BONDED, "mera")
MAPS = ("cos_sin", "one_cos_sin", "polynomial", "sin2_cos2")


@pytest.mark.parametrize("feature_map", MAPS)
@pytest.mark.parametrize("kernel_size", [2, 3, 5])
@pytest.mark.parametrize("structure", [*STRUCTURES, "eps"])
def test_fresh_outputs_have_unit_variance_and_every_core_a_gradient(structure, kernel_size, feature_map):
    if structure == "eps" and kernel_size == 5:
        pytest.skip("2^25 numbers an output are refused")
    layer = built(1, 8, kernel_size, structure=structure, bond_dim=3, feature_map=feature_map, groups=1)
    x = images(4096 if structure != "mera" else 1024, 1, kernel_size, kernel_size, seed=5)
    y = layer(x).flatten(1)
    assert 0.7 < y.var(0).mean() < 1.4
    assert y.mean(0).abs().max() < 0.3
    (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(2))).mean(0).sum().backward()
    gradients = [part.norm().item() for part in layer._split(layer.weight.grad)]
    assert max(gradients) < 300 * min(gradients)
    assert min(gradients) > 1e-3


def exact_variances(layer, group=0):
    """Means and variances over the outputs for independent uniform numbers, from the dense tensor; identity map."""
    tensor = dense(layer, group)
    numbers = layer.feature_map.size(layer.in_channels // layer.groups if layer.site == "pixel" else 1)
    mean = np.full(numbers, 1 / 2)
    second = np.diag(np.full(numbers, 1 / 12)) + np.outer(mean, mean)
    once, twice = tensor, tensor
    for _ in range(tensor.ndim - 1):
        once, twice = np.tensordot(once, mean, axes=(1, 0)), np.tensordot(twice, second, axes=(1, 0))
    return once, (tensor * twice).reshape(len(tensor), -1).sum(1) - once**2


@pytest.mark.parametrize("bond_dim", [1, 2, 3])
@pytest.mark.parametrize(("channels", "kernel_size"), [(2, 1), (2, (1, 2)), (3, (1, 3)), (3, 2), (2, (1, 5)), (2, 3)])
@pytest.mark.parametrize("structure", [*STRUCTURES, "eps"])
def test_the_identity_maps_variance_is_exactly_1(structure, channels, kernel_size, bond_dim):
    """Products of plain numbers have heavy tails: a variance over samples would be off by a factor of 2."""
    layer = built(
        2 * channels, 8, kernel_size, groups=2, structure=structure, bond_dim=bond_dim, feature_map="identity",
        dtype=torch.float64,
    )  # fmt: skip
    for group in range(2):
        means, variances = exact_variances(layer, group)
        assert variances.mean() == pytest.approx(1, abs=1e-9)
        if layer.network.shapes[-1][1:] not in ((1,), (1, 1)):
            assert np.abs(means).max() < 1e-9


@pytest.mark.parametrize("kernel_size", [1, 3, 4, 5])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_identity_map_of_one_number_a_site_is_a_product(structure, kernel_size):
    layer = built(1, 3, kernel_size, structure=structure, bond_dim=3, feature_map="identity", dtype=torch.float64)
    assert not layer.normalize
    sites = kernel_size**2
    factors = layer(torch.ones(1, 1, kernel_size, kernel_size, dtype=torch.float64)).flatten()
    x = images(5, 1, kernel_size, kernel_size, dtype=torch.float64)
    torch.testing.assert_close(layer(x).flatten(1), x.flatten(1).prod(1)[:, None] * factors, rtol=1e-9, atol=0)
    # Of a product of n uniform numbers: E p^2 = 3^-n, E p = 2^-n.
    assert (factors**2).mean().item() * (3.0**-sites - 4.0**-sites) == pytest.approx(1, rel=1e-9)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_identity_map_of_many_sites_is_divided_and_near_unit_variance(structure):
    layer = built(2, 8, 4, structure=structure, bond_dim=3, feature_map="identity")
    assert layer.normalize
    assert 0.7 < layer(images(4096, 2, 4, 4, seed=5)).var(0).mean() < 1.4


def mean_square_root(layer, x):
    with torch.no_grad():
        return layer(x).square().mean().sqrt().item()


@pytest.mark.parametrize("feature_map", MAPS)
@pytest.mark.parametrize(
    ("structure", "kernel_size"), [*((s, k) for s in BONDED for k in (4, 5, 8)), ("mera", 4), ("mera", 5)]
)
def test_black_white_and_sparse_patches_start_in_range_too(structure, kernel_size, feature_map):
    """Digits on black are no uniform numbers: products of many vectors that are all alike shrink or grow with them."""
    layer = built(1, 8, kernel_size, structure=structure, bond_dim=3, feature_map=feature_map)
    shape = (1 if structure == "mera" else 200, 1, kernel_size, kernel_size)
    noise = images(*shape, seed=3)
    for x in (torch.zeros(1, *shape[1:]), torch.ones(1, *shape[1:]), (noise > 0.8).float(), 0.1 * noise):
        assert 0.1 < mean_square_root(layer, x) < 10


def test_means_of_bits_become_numbers_between_0_and_1_first():
    bits = nn.Sequential(PixelBits(), ProbabilisticBinaryConv2d(1, 4, 3))
    h = bits(images(20, 1, 10, 10))
    exact = built(4, 8, 6, normalize=False)
    assert 0.1 < mean_square_root(exact, (1 + h) / 2) < 10
    # For numbers on both sides of 0 a fresh network's factors change their signs.
    assert mean_square_root(exact, h) < 0.01
    assert 0.1 < mean_square_root(built(4, 8, 6), (1 + h) / 2) < 10


def test_only_networks_of_many_sites_divide():
    for structure in STRUCTURES:
        assert not built(1, 2, (3, 5), structure=structure, bond_dim=2).normalize
        assert built(1, 2, 4, structure=structure, bond_dim=2).normalize
        assert built(2, 2, (2, 4), structure=structure, bond_dim=2, site="feature").normalize
        assert not built(1, 2, 4, structure=structure, bond_dim=2, normalize=False).normalize
        # A bond of one number is its own norm, so outputs would be constants.
        alone = built(1, 2, 4, structure=structure, bond_dim=1)
        assert not alone.normalize
        assert alone(images(9, 1, 4, 4)).std() > 0.01
        with pytest.raises(ValueError, match=r"normalize is True but .* bond_dim 1 has no bonds of 2 numbers"):
            built(1, 2, 4, structure=structure, bond_dim=1, normalize=True)
    assert not built(1, 2, (2, 8), structure="eps").normalize
    with pytest.raises(ValueError, match='normalize is True but structure "eps"'):
        built(1, 2, 2, structure="eps", normalize=True)


def test_the_same_weights_with_and_without_dividing():
    exact = built(1, 2, 4, normalize=False)
    divided = built(1, 2, 4)
    divided.load_state_dict(exact.state_dict())
    x = images(5, 1, 4, 4)
    ratio = exact(x) / divided(x)
    torch.testing.assert_close(ratio[:, :1], ratio[:, 1:], rtol=1e-4, atol=0)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_what_dividing_costs(structure):
    exact = built(1, 2, 4, structure=structure, bond_dim=2, normalize=False).counts((1, 4, 4))
    divided = built(1, 2, 4, structure=structure, bond_dim=2).counts((1, 4, 4))
    # A sum of squares and as many products for each vector divided.
    more = divided["mul:fp32"] - exact["mul:fp32"]
    assert divided["mac:fp32*fp32"] - exact["mac:fp32*fp32"] == more
    # Chains and trees divide at the 8th site and at the root at most; the root of a MERA takes 2 vectors at once.
    assert more == (2 * 2 if structure != "mera" else exact["units"] * 2)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_normalizing_divides_all_outputs_of_a_patch_by_one_positive_number(structure):
    exact = jolted(built(1, 5, (4, 4), structure=structure, normalize=False, dtype=torch.float64), 0.1)
    divided = built(1, 5, (4, 4), structure=structure, normalize=True, dtype=torch.float64)
    divided.load_state_dict(exact.state_dict())
    x = images(20, 1, 4, 4, dtype=torch.float64)
    ratio = (exact(x) / divided(x)).flatten(1)
    assert (ratio > 0).all()
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio), rtol=1e-9, atol=0)
    assert ratio[:, 0].std() > 1e-3  # it did divide


def test_gradients_of_a_normalized_chain():
    layer = built(1, 2, (3, 3), normalize=True, bond_dim=3, dtype=torch.float64)
    x = images(1, 1, 3, 3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, w: torch.func.functional_call(layer, {"weight": w}, (x,)), (x, layer.weight)
    )


@pytest.mark.parametrize("structure", BONDED)
def test_an_image_wide_chain_starts_in_range_and_learns(structure):
    layer = built(1, 10, 14, structure=structure, bond_dim=6)
    assert layer.normalize
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(80) % 10
    # Mostly black images: far from the uniform ones that set the scale.
    templates = (torch.rand(10, 1, 14, 14, generator=generator) > 0.8).float()
    x = (templates[labels] + 0.1 * torch.rand(80, 1, 14, 14, generator=generator)).clamp(0, 1)
    assert layer(x).isfinite().all()
    assert 0.1 < layer(x).std() < 10
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.003)
    for _ in range(30):
        loss = nn.functional.cross_entropy(layer(x).flatten(1), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (layer(x).flatten(1).argmax(1) == labels).float().mean() == 1
