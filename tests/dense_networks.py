"""Tensor-network layers as dense tensors, built in numpy from the cores alone, and as loops over patches."""

import itertools

import numpy as np
import torch

from qconv.tensor_layers import TensorNetworkConv2d

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


# Dense tensors (outputs, d, ..., d), sites in the network's order, from `cores()`.


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
