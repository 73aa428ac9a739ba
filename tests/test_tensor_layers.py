"""Tensor-network convolutions against dense tensors, built in numpy from the cores alone."""

import copy
import io

import pytest
import torch
from dense_networks import STRUCTURES, TOLERANCE, agrees, built, images, jolted
from torch import nn

from qconv.energy import count
from qconv.tensor_layers import TensorNetworkConv2d
from qconv.tensors.feature_maps import FEATURE_MAPS, FeatureMap
from qconv.tensors.mera import Mera
from qconv.tensors.sizes import samples
from qconv.tensors.structures import Shape
from qconv.testing import check_layer


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


def test_half_precision_is_refused_in_the_layers_own_words():
    with pytest.raises(
        ValueError, match=r"the layer is torch\.float16 but TensorNetworkConv2d computes in torch\.float32"
    ):
        built(1, 2, 2).half()(images(1, 1, 3, 3).half())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"structure": "mera", "kernel_size": 28}, r"784 sites .* for every patch; at most 2,097,152 numbers"),
        ({"structure": "mera", "kernel_size": 14}, r"makes a tensor of 16,777,216 numbers, 67,108,864 bytes for every"),
        ({"structure": "mera", "kernel_size": 8, "bond_dim": 999}, r"has cores of .* at most 1,073,741,824 bytes"),
        ({"kernel_size": 28, "bond_dim": 1000}, r"bond_dim 1000 has cores of 1,540,747,048 numbers, 6,162,988,192 b"),
        ({"kernel_size": 28, "bond_dim": 10**9, "structure": "tree"}, r"has cores of over 2\^94 numbers"),
        ({"kernel_size": (3, 6), "structure": "eps", "out_channels": 4096}, r"1,073,741,824 numbers, 4,294,967,296 b"),
        ({"kernel_size": 10**5}, r"10000000000 sites of dimension 2 are 20,000,000,000 numbers, 80,000,000,000 bytes"),
        ({"in_channels": 10**5, "out_channels": 10**5, "groups": 10**5, "kernel_size": 4}, "in 100000 groups are"),
        ({"in_channels": 10**5}, "a site has dimension 200000, whose covariance has 40,000,000,000 numbers"),
    ],
    ids=str,
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_absurd_sizes_are_refused_before_they_are_made(options, says, device):
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match=says):
        TensorNetworkConv2d(**{"in_channels": 1, "out_channels": 10, "kernel_size": 1, "device": device, **options})
    # Nothing was drawn either.
    assert torch.equal(torch.get_rng_state(), before)


def test_bytes_are_those_of_the_dtype():
    options = {"kernel_size": (3, 6), "structure": "eps", "device": "meta"}
    assert TensorNetworkConv2d(1, 1024, **options).weight.numel() == 2**28
    with pytest.raises(ValueError, match="268,435,456 numbers, 2,147,483,648 bytes"):
        TensorNetworkConv2d(1, 1024, **options, dtype=torch.float64)


def test_an_image_of_too_many_patches_is_refused():
    layer = built(1, 2, (2, 8), structure="mera", bond_dim=4)
    numbers = layer.network.width()
    side = int((2**28 / numbers) ** 0.5) + 10
    with pytest.raises(ValueError, match=rf"{(side - 1) * (side - 7)} patches of one image make a tensor of"):
        layer(torch.zeros(1, 1, side, side))


def test_random_patches_become_fewer_where_they_are_large():
    small, large = (Mera(Shape(sites, 2, 10, 4)) for sites in (36, 64))
    assert samples(small, 1) == 2048
    assert samples(large, 1) == 2**25 // large.width() == 128
    assert samples(small, 10**6) == 32


@pytest.mark.parametrize("checkpoint", [False, "auto"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_function_transforms(structure, checkpoint):
    layer = built(1, 2, 2, structure=structure, checkpoint=checkpoint, dtype=torch.float64)
    x = images(3, 1, 3, 3, dtype=torch.float64)

    def function(weight, x):
        return torch.func.functional_call(layer, {"weight": weight}, (x,))

    want = function(layer.weight, x)
    weights = torch.stack([layer.weight.detach(), 2 * layer.weight.detach()])
    torch.testing.assert_close(torch.func.vmap(function, (None, 0))(layer.weight, x), want)
    torch.testing.assert_close(torch.func.vmap(function, (0, None))(weights, x)[0], want)
    for argnum in range(2):
        forward, backward = (make(function, argnum)(layer.weight, x) for make in (torch.func.jacfwd, torch.func.jacrev))
        torch.testing.assert_close(forward, backward)
        assert forward.shape == (*want.shape, *(layer.weight, x)[argnum].shape)


def test_what_recomputes_cannot_be_transformed():
    layer = built(1, 2, 2, checkpoint=True)
    with pytest.raises(RuntimeError, match="saved tensor hooks"):
        torch.func.jacrev(layer)(images(1, 1, 3, 3))


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
