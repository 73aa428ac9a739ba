"""Tensor-network convolutions against dense tensors, built here in numpy from the cores alone."""

import copy
import io
import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from qconv.energy import count
from qconv.tensor_layers import TensorNetworkConv2d
from qconv.tensors.feature_maps import FEATURE_MAPS, FeatureMap
from qconv.testing import check_layer

STRUCTURES = ("mps", "tree", "mera", "eps")
BONDED = ("mps", "tree")
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}


def images(*shape, dtype=torch.float32, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def built(*arguments, seed=0, **options):
    torch.manual_seed(seed)
    return TensorNetworkConv2d(*arguments, **options)


def jolted(layer, scale=0.3, seed=1):
    """The layer with weights far from how it starts."""
    with torch.no_grad():
        noise = torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        layer.weight.add_(scale * noise.to(layer.weight))
    return layer


# --- Dense tensors (outputs, d, ..., d), sites in the network's order, from `cores()`.


def dense_mps(cores, sites):
    middle = (sites + 1) // 2 if sites > 1 else 1
    total = cores[0]
    for core in cores[1:]:
        total = np.tensordot(total, core, axes=(-1, 0))
    return np.moveaxis(total[0, ..., 0], middle, 0)


def dense_tree(cores, sites):
    """Blocks are tensors (bond, d, ..., d); neighbors merge as pairs, the last of an odd number waits."""
    cores = list(cores)
    # A core with one site below is a map of that site.
    if cores[0].ndim == 2 and len(cores) > 1:
        blocks = [cores.pop(0) for _ in range(sites)]
    else:
        blocks = [np.eye(cores[0].shape[1])] * sites
    while len(cores) > 1:
        merged = []
        for k in range(0, len(blocks) - 1, 2):
            merged.append(joined(cores.pop(0), blocks[k], blocks[k + 1]))
        blocks = merged + blocks[len(blocks) - len(blocks) % 2 :]
    return joined(cores[0], *blocks)


def joined(core, left, right=None):
    first = np.tensordot(core, left, axes=(1, 0))
    if right is None:
        return first
    # (parent, right bond, left sites...) -> (parent, left sites..., right sites...)
    return np.tensordot(first, right, axes=(1, 0))


def dense_mera(cores, sites):
    """The network read from the input: linear maps on the whole tensor product, as matrices."""
    cores = list(cores)

    def act(tensor, at, inputs, dims):
        """Apply a core (outputs..., inputs...) to the neighboring factors from `at`."""
        outputs = tensor.shape[: tensor.ndim - inputs]
        matrix = tensor.reshape(int(np.prod(outputs)), -1)
        before, after = int(np.prod(dims[:at])), int(np.prod(dims[at + inputs :]))
        full = np.kron(np.kron(np.eye(before), matrix), np.eye(after))
        return full, [*dims[:at], *outputs, *dims[at + inputs :]]

    d = round(cores[0].shape[1] ** (1 / sites)) if len(cores) == 1 else cores[0].shape[-1]
    dims = [d] * sites
    operator = np.eye(d**sites)
    if cores[0].ndim == 2 and len(cores) > 1:
        for k in range(sites):
            full, dims = act(cores.pop(0), k, 1, dims)
            operator = full @ operator
    while len(dims) > 2:
        n = len(dims)
        for k in range(1, n - 1, 2):
            full, dims = act(cores.pop(0), k, 2, dims)
            operator = full @ operator
        for k in range(n // 2):
            full, dims = act(cores.pop(0), k, 2, dims)
            operator = full @ operator
    operator = cores.pop(0) @ operator
    assert not cores
    return operator.reshape(-1, *[d] * sites)


def dense_eps(cores, sites):
    core = cores[0]
    d = round(np.prod(core.shape[1:]) ** (1 / sites))
    return core.reshape(-1, *[d] * sites)


DENSE = {"mps": dense_mps, "tree": dense_tree, "mera": dense_mera, "eps": dense_eps}


def dense(layer, group=0):
    cores = [core.detach().double().numpy() for core in layer.cores(group)]
    return DENSE[layer.structure](cores, layer.network.shape.sites)


def phi(name, x, degree=2, scale=1.0):
    """Textbook feature maps of the numbers at one site, each function of all of them in turn."""
    x = np.atleast_1d(x)
    if name == "cos_sin":
        return np.concatenate([np.cos(np.pi * x / 2), np.sin(np.pi * x / 2)])
    if name == "one_cos_sin":
        return np.concatenate([[1.0], np.cos(np.pi * x), np.sin(np.pi * x)])
    if name == "polynomial":
        return np.concatenate([[1.0], *(x**p for p in range(1, degree + 1))])
    if name == "sin2_cos2":
        return scale * np.concatenate([np.sin(np.pi * x / 2) ** 2, np.cos(np.pi * x / 2) ** 2])
    return x


def reference(layer, x):
    """The layer by a loop over groups and patches, with numpy's padding, on dense tensors."""
    g = layer.geometry
    mode = {"zeros": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}[layer.padding_mode]
    padded = np.pad(x.detach().double().numpy(), ((0, 0), (0, 0), *g.margins()), mode=mode)
    height, width = g.output_size(*x.shape[-2:])
    share, outs = layer.in_channels // layer.groups, layer.out_channels // layer.groups
    result = np.zeros((len(x), layer.out_channels, height, width))
    for group in range(layer.groups):
        tensor = dense(layer, group)
        for b, i, j in itertools.product(range(len(x)), range(height), range(width)):
            patch = padded[
                b,
                group * share : (group + 1) * share,
                i * g.stride[0] : i * g.stride[0] + g.dilation[0] * (g.kernel_size[0] - 1) + 1 : g.dilation[0],
                j * g.stride[1] : j * g.stride[1] + g.dilation[1] * (g.kernel_size[1] - 1) + 1 : g.dilation[1],
            ]
            lines = [patch] if layer.site == "pixel" else patch[:, None]
            value = tensor
            for line in lines:
                for r, row in enumerate(np.moveaxis(line, 0, -1)):
                    for pixel in row[::-1] if layer.order == "snake" and r % 2 else row:
                        vector = phi(layer.feature_map.name, pixel, layer.feature_map.degree, layer.feature_map.scale)
                        value = np.tensordot(value, vector, axes=(1, 0))
            result[b, group * outs : (group + 1) * outs, i, j] = value
    if layer.bias is not None:
        result += layer.bias.detach().double().numpy()[:, None, None]
    return result


def agrees(layer, x):
    want = reference(layer, x)
    got = layer(x).detach().double().numpy()
    assert got.shape == want.shape
    scale = max(1.0, np.abs(want).max())
    assert np.abs(got - want).max() <= TOLERANCE[layer.weight.dtype] * scale


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_values_are_the_dense_contraction(structure, feature_map, dtype):
    chosen = FeatureMap(feature_map, degree=3 if structure == "mps" else 2, scale=1.3)
    channels = 2 if feature_map == "identity" else 1
    layer = built(channels, 3, (2, 3), structure=structure, bond_dim=3, feature_map=chosen, dtype=dtype)
    agrees(jolted(layer), images(2, channels, 3, 4, dtype=dtype))


@pytest.mark.parametrize("bond_dim", [1, 2, 5])
@pytest.mark.parametrize("kernel_size", [(1, 1), (1, 2), (1, 3), (2, 2), (1, 5), (1, 7), (3, 3)])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_any_number_of_sites_and_bond(structure, kernel_size, bond_dim):
    layer = built(1, 3, kernel_size, structure=structure, bond_dim=bond_dim, dtype=torch.float64)
    agrees(jolted(layer), images(2, 1, *kernel_size, dtype=torch.float64))


@pytest.mark.parametrize(
    "options",
    [
        {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2), "bias": True},
        {"padding": "same", "padding_mode": "reflect"},
        {"padding": 1, "padding_mode": "replicate", "groups": 2},
        {"padding": (1, 0), "padding_mode": "circular", "groups": 2, "bias": True, "site": "feature"},
        {"padding": "valid", "order": "raster"},
        {"stride": 3, "site": "feature", "order": "raster"},
        {"groups": 4, "dilation": 2, "checkpoint": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_geometry_is_conv2ds(structure, options):
    layer = built(4, 8, 2, structure=structure, bond_dim=2, dtype=torch.float64, **options)
    if layer.bias is not None:
        nn.init.normal_(layer.bias)
    x = images(2, 4, 5, 6, dtype=torch.float64)
    if layer.site == "feature" and layer.network.shape.sites == 16:
        layer = built(2, 4, 2, structure=structure, bond_dim=2, dtype=torch.float64, **options)
        x = x[:, :2]
    agrees(layer, x)
    names = ("stride", "padding", "dilation", "groups", "bias", "padding_mode")
    plain = nn.Conv2d(x.shape[1], layer.out_channels, 2, **{k: v for k, v in options.items() if k in names})
    assert layer(x).shape == plain(x.float()).shape
    assert layer(x[0]).shape == plain(x.float()).shape[1:]
    torch.testing.assert_close(layer(x[0]), layer(x)[0], atol=1e-12, rtol=1e-12)
    assert layer(x[:0]).shape == (0, *layer(x).shape[1:])


@pytest.mark.parametrize("structure", STRUCTURES)
def test_layers_are_convolutions(structure):
    check_layer(built(2, 3, 2, structure=structure, bond_dim=3), 2)
    check_layer(built(2, 4, 2, (2, 1), groups=2, structure=structure, bond_dim=3), 2, stride=(2, 1))


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_gradients(structure, checkpoint):
    layer = built(
        2, 2, 2, groups=2, padding=1, bias=True, structure=structure, bond_dim=3, checkpoint=checkpoint,
        dtype=torch.float64,
    )  # fmt: skip
    x = images(2, 2, 3, 2, dtype=torch.float64).requires_grad_()

    def function(x, weight, bias):
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,))

    assert torch.autograd.gradcheck(function, (x, layer.weight, layer.bias), fast_mode=True)


def test_gradients_of_a_normalized_chain():
    layer = built(1, 2, (3, 3), normalize=True, bond_dim=3, dtype=torch.float64)
    x = images(1, 1, 3, 3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, w: torch.func.functional_call(layer, {"weight": w}, (x,)), (x, layer.weight)
    )


@pytest.mark.parametrize("structure", BONDED)
def test_normalizing_divides_all_outputs_of_a_patch_by_one_positive_number(structure):
    exact = jolted(built(1, 5, 5, structure=structure, normalize=False, dtype=torch.float64), 0.1)
    divided = built(1, 5, 5, structure=structure, normalize=True, dtype=torch.float64)
    divided.load_state_dict(exact.state_dict())
    x = images(20, 1, 5, 5, dtype=torch.float64)
    ratio = (exact(x) / divided(x)).flatten(1)
    assert (ratio > 0).all()
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio), rtol=1e-9, atol=0)
    assert ratio[:, 0].std() > 1e-3  # it did divide


@pytest.mark.parametrize("feature_map", ["cos_sin", "one_cos_sin", "polynomial", "sin2_cos2"])
@pytest.mark.parametrize("kernel_size", [2, 3, 5])
@pytest.mark.parametrize("structure", STRUCTURES)
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


def matricized(layer, cut, group=0):
    """The dense tensor with the sites below a bond as rows."""
    tensor = dense(layer, group)
    n = tensor.ndim - 1
    if layer.structure == "mps":
        middle = (n + 1) // 2
        below = list(range(1, cut + 1)) if cut <= middle else list(range(cut, n + 1))
    else:
        below = [1 + site for site in sites_below(layer, cut)]
    rest = [axis for axis in range(n + 1) if axis not in below]
    return tensor.transpose(*below, *rest).reshape(int(np.prod([tensor.shape[a] for a in below])), -1)


def sites_below(layer, cut):
    n = layer.network.shape.sites
    level, made = [[site] for site in range(n)], []
    if layer.network.shape.dim > layer.bond_dim:
        made = list(level)
    while len(level) > 2:
        pairs = [a + b for a, b in zip(level[::2], level[1::2], strict=False)]
        made += pairs
        level = pairs + level[len(level) - len(level) % 2 :]
    return made[cut]


def cuts(layer):
    return range(1, layer.network.shape.sites + 1) if layer.structure == "mps" else range(len(layer.cores()) - 1)


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
    assert error == 0
    old, new = layer(x).flatten(1), same(x).flatten(1)
    assert torch.equal(old.argmax(1), new.argmax(1))
    ratio = old / new
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio), rtol=1e-2, atol=0)
    assert 0.8 < old.norm() / new.norm() < 1.25


@pytest.mark.parametrize("structure", STRUCTURES)
def test_recomputing_gives_the_same_and_keeps_less(structure):
    kept = {}

    def run(layer, x):
        numbers = {}

        def pack(tensor):
            # Views of one memory count once.
            storage = tensor.untyped_storage()
            numbers[storage.data_ptr()] = storage.nbytes() // 4
            return tensor

        x = x.clone().requires_grad_()
        layer.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = layer(x)
        (y**2).sum().backward()
        return y.detach(), x.grad, layer.weight.grad.clone(), sum(numbers.values())

    x = images(40, 2, 9, 9)
    layer = built(2, 4, 3 if structure != "mera" else 2, structure=structure, bond_dim=6, feature_map="cos_sin")
    *plain, kept["plain"] = run(layer, x)
    layer.checkpoint = True
    *again, kept["again"] = run(layer, x)
    for a, b in zip(again, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))
    # What a block needs is made in the backward pass and kept by nobody else.
    assert kept["again"] < kept["plain"] / 3
    # "auto" pays for memory with time only where there is much of it.
    layer.checkpoint = "auto"
    assert run(layer, x)[-1] == kept["plain"]


def test_blocks_of_images_change_nothing(monkeypatch):
    layer = built(2, 4, 3, groups=2, bond_dim=4, structure="mps", dtype=torch.float64)
    x = images(7, 2, 6, 6, dtype=torch.float64)
    whole = layer(x)
    monkeypatch.setattr("qconv.tensor_layers._BLOCK", 2000)
    torch.testing.assert_close(layer(x), whole, rtol=1e-12, atol=1e-12)
    monkeypatch.setattr("qconv.tensor_layers._BLOCK", 1)
    torch.testing.assert_close(layer(x), whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_half_precision_stays_outside(structure):
    layer = built(2, 4, 2, structure=structure)
    x = images(2, 2, 4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x.bfloat16())
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, layer(x.bfloat16().float()), rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"images are torch\.float64 but the layer is torch.float32"):
        layer(x.double())


@pytest.mark.parametrize("structure", STRUCTURES)
def test_copies_and_state_dict(structure):
    layer = built(1, 3, 2, structure=structure, bond_dim=3, bias=True)
    x = images(2, 1, 4, 4)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    other = built(1, 3, 2, structure=structure, bond_dim=3, bias=True, seed=9)
    assert not torch.equal(other(x), layer(x))
    stream = io.BytesIO()
    torch.save(layer.state_dict(), stream)
    stream.seek(0)
    other.load_state_dict(torch.load(stream))
    assert torch.equal(other(x), layer(x))
    assert set(layer.state_dict()) == {"weight", "bias"}
    assert torch.equal(
        built(1, 3, 2, structure=structure, bond_dim=3)(x), built(1, 3, 2, structure=structure, bond_dim=3)(x)
    )
    assert built(1, 3, 2, structure=structure, device="meta").weight.is_meta


@pytest.mark.parametrize("structure", STRUCTURES)
def test_cores_are_views_that_train(structure):
    layer = built(2, 4, 2, groups=2, structure=structure, bond_dim=3)
    x = images(1, 2, 3, 3)
    before = layer(x)
    with torch.no_grad():
        # The output's core is linear: doubling one group's doubles its outputs alone.
        core = layer.cores(1)[2 if structure == "mps" else -1]
        core *= 2
    torch.testing.assert_close(layer(x)[:, :2], before[:, :2], rtol=0, atol=0)
    torch.testing.assert_close(layer(x)[:, 2:], 2 * before[:, 2:], rtol=1e-5, atol=1e-5)
    assert sum(core.numel() for core in layer.cores()) * 2 == layer.weight.numel()


def test_cores_of_a_chain_are_the_usual_ones():
    layer = built(1, 5, 3, bond_dim=4)
    shapes = [tuple(core.shape) for core in layer.cores()]
    assert shapes == [
        (1, 2, 2), (2, 2, 4), (4, 2, 4), (4, 2, 4), (4, 2, 4), (4, 5, 4), (4, 2, 4), (4, 2, 4), (4, 2, 2), (2, 2, 1),
    ]  # fmt: skip


@pytest.mark.parametrize("structure", STRUCTURES)
def test_patches_alone_are_evaluated_like_images(structure):
    layer = built(2, 3, 2, structure=structure, dtype=torch.float64, site="feature" if structure == "mps" else "pixel")
    x = images(3, 2, 4, 4, dtype=torch.float64)
    patches = nn.functional.unfold(x, 2).transpose(1, 2).flatten(0, 1)
    want = layer(x).movedim(1, -1).flatten(0, 2)
    torch.testing.assert_close(layer.evaluate(patches, layer.weight), want, rtol=1e-12, atol=1e-12)


class Multiplications(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts multiplications of matrix products that really run."""

    def __init__(self):
        super().__init__()
        self.macs = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket is torch.ops.aten.bmm:
            self.macs += args[0].numel() * args[1].shape[-1]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kernel_size", [(1, 2), (2, 2), (1, 5), (3, 3)])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_counts_are_what_runs(structure, channels, kernel_size):
    if structure == "eps" and channels == 3 and kernel_size == (3, 3):
        with pytest.raises(ValueError, match=r"9 sites of dimension 6: 6\^9 numbers an output"):
            built(channels, 5, kernel_size, structure=structure)
        return
    layer = built(channels, 5, kernel_size, structure=structure, bond_dim=3)
    x = images(1, channels, 4, 6)
    with torch.no_grad(), Multiplications() as seen:
        layer(x)
    counts = layer.counts(x.shape[1:])
    patches = (5 - kernel_size[0]) * (7 - kernel_size[1])
    assert counts["units"] == 5 * patches
    assert counts["params"] == layer.weight.numel()
    assert counts["weight_bits"] == 32 * layer.weight.numel()
    if structure == "mera":
        assert counts["mac:fp32*fp32"] == seen.macs
    else:
        # The rest are sums of products, one vector at a time.
        sums = counts["mac:fp32*fp32"] - seen.macs
        merges = [shape for shape in layer.network.shapes if len(shape) == 3 and shape[0] < max(shape[1:])]
        assert sums == patches * sum(min(a, b) * out for out, a, b in merges)
    # Cosine and sine once a pixel.
    assert counts["add:fp32"] == 14 * channels * 24
    assert count(nn.Sequential(layer), x.shape[1:]).rows[0].operations == +counts


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"structure": "peps"}, "unknown structure 'peps'"),
        ({"feature_map": "cosine"}, "unknown feature_map 'cosine'"),
        ({"feature_map": 3}, "feature_map is a int"),
        ({"site": "channel"}, "unknown site 'channel'"),
        ({"order": "spiral"}, "unknown order 'spiral'"),
        ({"bond_dim": 0}, "bond_dim is 0: give a whole number of at least 1"),
        ({"normalize": "yes"}, "normalize is 'yes'"),
        ({"checkpoint": 2}, "checkpoint is 2"),
        ({"structure": "eps", "normalize": True}, 'only "mps" and "tree" divide'),
        ({"structure": "eps", "in_channels": 4}, r"4 sites of dimension 8: 8\^4"),
        ({"dtype": torch.float16}, "dtype is torch.float16"),
        ({"groups": 2}, "in_channels is 1, which 2 groups do not divide"),
    ],
)
def test_errors_say_what_to_do(options, message):
    options = {"in_channels": 1, "out_channels": 2, "kernel_size": 2, **options}
    if options.get("in_channels") == 4:
        options["kernel_size"] = (3, 3)
        message = r"9 sites of dimension 8: 8\^9"
    with pytest.raises(ValueError, match=message):
        TensorNetworkConv2d(**options)


def test_errors_of_cuts_and_truncation():
    layer = built(1, 2, 2, bond_dim=3)
    for cut in (0, 5):
        with pytest.raises(ValueError, match=f"cut is {cut} but this network is cut from 1 to 4"):
            layer.schmidt_values(cut)
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


@pytest.mark.parametrize("structure", STRUCTURES)
def test_compiles_without_graph_breaks(structure):
    layer = built(1, 2, 2, structure=structure, bond_dim=2)
    x = images(2, 1, 3, 3)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), layer(x))


def test_exports_for_any_batch_size():
    layer = built(1, 4, 3, bond_dim=4)
    dynamic = ({0: torch.export.Dim("batch", min=2)},)
    exported = torch.export.export(layer, (images(2, 1, 8, 8),), dynamic_shapes=dynamic).module()
    x = images(5, 1, 8, 8)
    torch.testing.assert_close(exported(x), layer(x))
