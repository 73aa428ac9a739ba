"""How tensor networks contract with product vectors, one column a patch: chains, trees and plaquettes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from math import prod, sqrt
from typing import NamedTuple

import torch
from torch import Tensor

from qconv.tensors.feature_maps import Moments

MOST_PLAQUETTE = 2**18
_NOISE = 0.5  # how far a matrix product state starts from the identity: the norm of all its sites' deviations together
SECOND_ORDER = 0.3  # products of features, against the features themselves, in a tree that was just drawn


class Shape(NamedTuple):
    """What every structure is built for.

    Attributes:
        sites: Tensor factors of the input.
        dim: Dimension of each factor.
        outputs: Dimension of the output leg.
        bond: Largest dimension of a bond.
    """

    sites: int
    dim: int
    outputs: int
    bond: int


def merge(weight: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """sum_lr W[p, l, r] a[l] b[r] for every patch.

    Args:
        weight: (groups, p, l, r).
        left: (groups, l, patches).
        right: (groups, r, patches).

    Returns:
        (groups, p, patches).
    """
    groups, out, a, b = weight.shape
    # All three orders multiply as much in their matrix product; memory decides, so the smallest intermediate is made.
    if out < a and b <= a:
        half = torch.bmm(weight.permute(0, 3, 1, 2).reshape(groups, b * out, a), left)
        return (half.reshape(groups, b, out, half.shape[-1]) * right[:, :, None]).sum(1)
    if out < b:
        half = torch.bmm(weight.permute(0, 2, 1, 3).reshape(groups, a * out, b), right)
        return (half.reshape(groups, a, out, half.shape[-1]) * left[:, :, None]).sum(1)
    return torch.bmm(weight.reshape(groups, out, a * b), khatri_rao(left, right))


def khatri_rao(left: Tensor, right: Tensor) -> Tensor:
    """Products of all pairs of components: (groups, l, patches), (groups, r, patches) -> (groups, l * r, patches)."""
    return (left[:, :, None] * right[:, None]).flatten(1, 2)


def unit(vectors: Tensor) -> Tensor:
    """Each patch's vector divided by its norm: (groups, n, patches)."""
    norm: Tensor = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
    return vectors / norm.clamp(min=1e-30)


def unit_counts(n: int) -> Counter[str]:
    """Operations of `unit` a patch; the square root and the reciprocal are left out."""
    return Counter({"mac:fp32*fp32": n, "mul:fp32": n})


def merge_counts(out: int, a: int, b: int) -> Counter[str]:
    """Operations of `merge` a patch."""
    last = {"mac:fp32*fp32": min(a, b) * out} if out < max(a, b) else {"mul:fp32": a * b}
    return Counter({"mac:fp32*fp32": out * a * b}) + Counter(last)


def merge_width(out: int, a: int, b: int) -> int:
    """Numbers a patch of the largest tensor that `merge` makes."""
    return max(out, min(a * b, a * out, b * out))


class TopMoments(NamedTuple):
    """Mean (groups, n) and mean of v v^T (groups, n, n) of a random vector v."""

    mean: Tensor
    second: Tensor


class Structure(ABC):
    """A network whose last core, the root (outputs, l, r) or (outputs, l), is linear in what all others make.

    Attributes:
        shape: Sizes.
        shapes: Shapes of the cores of one group, the root's last.
    """

    shape: Shape
    shapes: tuple[tuple[int, ...], ...]

    @abstractmethod
    def top(self, sites: Sequence[Tensor], cores: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Contract all but the root.

        Args:
            sites: For each site its vectors, (groups, dim, patches).
            cores: (groups, *shape) for each shape but the root's.

        Returns:
            One or two vectors, (groups, n, patches), which the root takes.
        """

    @abstractmethod
    def body(self, moments: Moments, groups: int) -> list[Tensor]:
        """Fresh cores, float64, without the root."""

    @abstractmethod
    def counts(self) -> Counter[str]:
        """Operations a patch, the root's included."""

    @abstractmethod
    def saved(self) -> int:
        """Numbers a patch that autograd keeps, about."""

    @abstractmethod
    def width(self) -> int:
        """Numbers a patch of the largest intermediate tensor."""

    @abstractmethod
    def top_moments(self, moments: Moments, cores: Sequence[Tensor], groups: int) -> list[TopMoments] | None:
        """Exact moments of what `top` makes of independent sites, vector by vector.

        Args:
            moments: Of each site's vector.
            cores: (groups, *shape) for each shape but the root's, float64.
            groups: Number of networks.

        Returns:
            None where divisions, or correlations between the vectors of a large network, leave only samples.
        """

    def contract(self, sites: Sequence[Tensor], cores: Sequence[Tensor]) -> Tensor:
        """Outputs (groups, outputs, patches) of the whole network; see `top`."""
        top = self.top(sites, cores[:-1])
        return merge(cores[-1], *top) if len(top) == 2 else torch.bmm(cores[-1], top[0])

    def initial(self, moments: Moments, samples: Sequence[Tensor]) -> list[Tensor]:
        """Fresh cores, float64, whose outputs have mean 0 and variance 1 (averaged over outputs).

        The root is drawn from a normal distribution, made orthogonal to the mean of what it takes, and scaled: over the
        samples, or by exact moments where products have heavy tails.

        Args:
            moments: Of the feature map.
            samples: For each site its vectors, float64 (groups, dim, samples).

        Source: Mishkin & Matas, All you need is a good init (arXiv:1511.06422), for the scale by samples.
        """
        groups, n = samples[0].shape[0], samples[0].shape[-1]
        cores = self.body(moments, groups)
        exact = self.top_moments(moments, cores, groups) if moments.heavy else None
        if exact is None:
            top = self.top(samples, cores)
            mean = torch.bmm(top[0], top[1].mT) / n if len(top) == 2 else top[0].mean(-1)
        else:
            mean = torch.einsum("gl,gr->glr", exact[0].mean, exact[1].mean) if len(exact) == 2 else exact[0].mean
        mean = mean.reshape(groups, -1, 1)
        root = torch.randn(groups, *self.shapes[-1], dtype=torch.float64).flatten(2)
        # Without its mean only where something else is left: one number times the mean would be nothing.
        if root.shape[-1] > 1:
            root = root - (root @ mean) @ (mean.mT / (mean * mean).sum(1, keepdim=True))
        offset = (root @ mean)[..., 0]
        root = root.reshape(groups, *self.shapes[-1])
        if exact is None:
            deviation = self.contract(samples, [*cores, root]).var(-1).mean(-1).sqrt().clamp(min=1e-12)
        else:
            variance = torch.diagonal(_propagated(root, exact).second, dim1=1, dim2=2) - offset**2
            deviation = variance.mean(-1).clamp(min=1e-60).sqrt()
        root = root / deviation.reshape(groups, *[1] * len(self.shapes[-1]))
        return [*cores, root]


def _propagated(core: Tensor, below: Sequence[TopMoments]) -> TopMoments:
    """Moments of what a core makes of independent vectors."""
    if len(below) == 1:
        return TopMoments((core @ below[0].mean[..., None])[..., 0], core @ below[0].second @ core.mT)
    mean = torch.einsum("gplr,gl,gr->gp", core, below[0].mean, below[1].mean)
    half = torch.einsum("gplr,glm->gpmr", core, below[0].second)
    half = torch.einsum("gpmr,grs->gpms", half, below[1].second)
    return TopMoments(mean, half.flatten(2) @ core.flatten(2).mT)


class Node(NamedTuple):
    """A core above the network: ids of its children, sites first (0 ... sites - 1), then nodes in their order."""

    left: int
    right: int | None = None


class Tree(Structure):
    """Cores on a rooted tree, the output leg at the root; a matrix product state is the tree that is two chains.

    Args:
        shape: Sizes.
        nodes: Children before parents, the root last.
        normalize: A vector made of more than this many others, sites or divided ones, is divided by its norm, as are
            those that the root takes; 0: none.
        chain: Whether to start near the identity along a chain.
    """

    def __init__(self, shape: Shape, nodes: Sequence[Node], normalize: int = 0, chain: bool = False) -> None:
        self.shape, self.nodes, self.normalize, self.chain = shape, tuple(nodes), normalize, chain
        dims = [shape.dim] * shape.sites
        shapes: list[tuple[int, ...]] = []
        for node in self.nodes:
            below = [dims[child] for child in node if child is not None]
            out = shape.outputs if node is self.nodes[-1] else min(shape.bond, prod(below))
            shapes.append((out, *below))
            dims.append(out)
        self.shapes = tuple(shapes)
        self._divided = self._divisions()

    def _divisions(self) -> tuple[bool, ...]:
        since, divided = [1] * self.shape.sites, []
        for k, node in enumerate(self.nodes):
            total = sum(since[child] for child in node if child is not None)
            # What enters the root too, so that the scale of outputs does not depend on the number of sites left over.
            due = total > self.normalize or self.shape.sites + k in self.nodes[-1]
            divided.append(bool(self.normalize) and due and node is not self.nodes[-1])
            # A vector of norm 1 counts like one site's.
            since.append(1 if divided[-1] else total)
        return tuple(divided)

    def top(self, sites: Sequence[Tensor], cores: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """See Structure."""
        vectors = list(sites)
        for node, core, divided in zip(self.nodes, cores, self._divided, strict=False):
            left = vectors[node.left]
            vector = torch.bmm(core, left) if node.right is None else merge(core, left, vectors[node.right])
            vectors.append(unit(vector) if divided else vector)
        return tuple(vectors[child] for child in self.nodes[-1] if child is not None)

    def body(self, moments: Moments, groups: int) -> list[Tensor]:
        """See Structure: near the identity for a chain, else near the sum of random linear features.

        A chain starts as the identity on its bond, as a fresh residual network does: matrices drawn independently lose
        the signal within some tens of sites. A balanced tree is written in a basis whose first vector is the constant:
        parents start as (1, random mixtures of both children's features) plus smaller products of them.
        """
        cores = []
        for node, shape in zip(self.nodes[:-1], self.shapes, strict=False):
            raw = [child < self.shape.sites for child in node if child is not None]
            cores.append(self._link(moments, groups, shape, raw) if self.chain else mixing(moments, groups, shape, raw))
        return cores

    def top_moments(self, moments: Moments, cores: Sequence[Tensor], groups: int) -> list[TopMoments] | None:
        """See Structure: what is below two children of a core is disjoint, so they are independent."""
        if self.normalize:
            return None
        site = TopMoments(moments.mean.expand(groups, -1), moments.second.expand(groups, -1, -1))
        vectors = [site] * self.shape.sites
        for node, core in zip(self.nodes, cores, strict=False):
            vectors.append(_propagated(core, [vectors[child] for child in node if child is not None]))
        return [vectors[child] for child in self.nodes[-1] if child is not None]

    def _link(self, moments: Moments, groups: int, shape: tuple[int, ...], raw: Sequence[bool]) -> Tensor:
        s = self.shape
        noise = torch.randn(groups, *shape, dtype=torch.float64) * (_NOISE / sqrt(s.sites * s.bond * moments.spread))
        if len(shape) == 2:
            start = torch.ones(shape[0], 1, dtype=torch.float64) * (moments.constant / sqrt(shape[0]))
            noise = noise * sqrt(s.sites / shape[0])
            return start + _centered(noise, moments)
        # The site is the first child on the right chain and the second on the left one.
        bond = shape[2] if raw[0] else shape[1]
        start = torch.eye(shape[0], bond, dtype=torch.float64)[:, :, None] * moments.constant
        if not raw[0]:
            return start + _centered(noise, moments)
        return (start + _centered(noise.permute(0, 1, 3, 2), moments)).permute(0, 1, 3, 2).contiguous()

    def counts(self) -> Counter[str]:
        """See Structure."""
        total = Counter[str]()
        for shape, divided in zip(self.shapes, self._divided, strict=True):
            out, *below = shape
            total += merge_counts(out, *below) if len(below) == 2 else Counter({"mac:fp32*fp32": out * below[0]})
            if divided:
                total += unit_counts(out)
        return total

    def saved(self) -> int:
        """See Structure."""
        total = self.shape.sites * self.shape.dim
        for out, *below in self.shapes:
            total += merge_width(out, *below) + out if len(below) == 2 else out
        return total

    def width(self) -> int:
        """See Structure."""
        return max(merge_width(out, *below) if len(below) == 2 else out for out, *below in self.shapes)


def _centered(noise: Tensor, moments: Moments) -> Tensor:
    """Functionals of a site on the last axis, without their mean."""
    return noise - (noise @ moments.mean)[..., None] * moments.constant


def mixing(moments: Moments, groups: int, shape: tuple[int, ...], raw: Sequence[bool]) -> Tensor:
    """A fresh core (groups, *shape) that mixes its children's features; `raw` ones are sites as the map gives them.

    With component 0 of every vector near 1: parent[0] = a[0] b[0], and the others are random mixtures of a[1:] and
    b[1:] with variance kept, plus smaller products of both.
    """
    out, *below = shape
    core = torch.zeros(groups, *shape, dtype=torch.float64)
    core.flatten(1)[:, 0] = 1
    share = 1 / sqrt(len(below))
    for axis, size in enumerate(below):
        if size > 1 and out > 1:
            at: list[int | slice] = [slice(None), slice(1, None), *[0] * len(below)]
            at[2 + axis] = slice(1, None)
            core[tuple(at)] = torch.randn(groups, out - 1, size - 1, dtype=torch.float64) * (share / sqrt(size - 1))
    if len(below) == 2 and out > 1:
        pairs = (below[0] - 1, below[1] - 1)
        products = torch.randn(groups, out - 1, *pairs, dtype=torch.float64)
        core[:, 1:, 1:, 1:] = products * (SECOND_ORDER / sqrt(max(1, prod(pairs))))
    for axis, child in enumerate(raw):
        if child:
            core = torch.tensordot(core, moments.frame, dims=([2 + axis], [0])).movedim(-1, 2 + axis)
    return core.contiguous()


def chains(shape: Shape, normalize: int = 0) -> Tree:
    """A matrix product state: a chain from each end, meeting at the core of the output leg in the middle."""
    nodes: list[Node] = []

    def link(node: Node) -> int:
        nodes.append(node)
        return shape.sites + len(nodes) - 1

    middle = (shape.sites + 1) // 2
    left = link(Node(0))
    for site in range(1, middle):
        left = link(Node(left, site))
    if shape.sites == 1:
        return Tree(shape, [*nodes, Node(left)], normalize, chain=True)
    right = link(Node(shape.sites - 1))
    for site in range(shape.sites - 2, middle - 1, -1):
        right = link(Node(site, right))
    return Tree(shape, [*nodes, Node(left, right)], normalize, chain=True)


def binary(shape: Shape, normalize: int = 0) -> Tree:
    """A binary tree over the sites in their order; the last of an odd number goes up a level as it is."""
    nodes: list[Node] = []

    def link(node: Node) -> int:
        nodes.append(node)
        return shape.sites + len(nodes) - 1

    level = list(range(shape.sites))
    if shape.dim > shape.bond:
        # A cut around one site is a bond too.
        level = [link(Node(site)) for site in level]
    while len(level) > 2:
        carried = level[len(level) - len(level) % 2 :]
        level = [link(Node(a, b)) for a, b in zip(level[::2], level[1::2], strict=False)] + carried
    return Tree(shape, [*nodes, Node(level[0], level[1] if len(level) == 2 else None)], normalize)


class Plaquette(Structure):
    """An entangled plaquette state: one core for all sites, without bonds.

    The exponentially long product vector is never made: the sites are multiplied in two halves, and the core takes one
    half and then the other.
    """

    def __init__(self, shape: Shape) -> None:
        if shape.dim**shape.sites > MOST_PLAQUETTE:
            raise ValueError(
                f'structure "eps" has {shape.sites} sites of dimension {shape.dim}: {shape.dim}^{shape.sites} numbers '
                f'an output are more than {MOST_PLAQUETTE}; use a smaller kernel, fewer channels a group, or "mps"'
            )
        self.shape = shape
        n, d = shape.sites, shape.dim
        # The first half makes outputs * d^a numbers a patch, the other one d^(n - a).
        self.half = min(range(1, n + 1), key=lambda a: shape.outputs * d**a + d**a + (d ** (n - a) if a < n else 0))
        below = (d**self.half,) if self.half == n else (d**self.half, d ** (n - self.half))
        self.shapes = ((shape.outputs, *below),)

    def top(self, sites: Sequence[Tensor], cores: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """See Structure."""
        halves = []
        for part in (sites[: self.half], sites[self.half :]):
            if part:
                vector = part[0]
                for site in part[1:]:
                    vector = khatri_rao(vector, site)
                halves.append(vector)
        return tuple(halves)

    def body(self, moments: Moments, groups: int) -> list[Tensor]:
        """See Structure: there is nothing but the root."""
        return []

    def top_moments(self, moments: Moments, cores: Sequence[Tensor], groups: int) -> list[TopMoments]:
        """See Structure."""
        halves = []
        for sites in (self.half, self.shape.sites - self.half):
            one = torch.ones(1, dtype=torch.float64)
            mean, second = one, one[:, None]
            for _ in range(sites):
                mean, second = torch.kron(mean, moments.mean), torch.kron(second, moments.second)
            if sites:
                halves.append(TopMoments(mean.expand(groups, -1), second.expand(groups, -1, -1)))
        return halves

    def counts(self) -> Counter[str]:
        """See Structure."""
        d, n = self.shape.dim, self.shape.sites
        out, *below = self.shapes[0]
        total = merge_counts(out, *below) if len(below) == 2 else Counter({"mac:fp32*fp32": out * below[0]})
        products = sum(d**k for half in (self.half, n - self.half) for k in range(2, half + 1))
        return total + Counter({"mul:fp32": products})

    def saved(self) -> int:
        """See Structure."""
        out, *below = self.shapes[0]
        return 2 * sum(below) + out + (merge_width(out, *below) if len(below) == 2 else 0)

    def width(self) -> int:
        """See Structure."""
        out, *below = self.shapes[0]
        return merge_width(out, *below) if len(below) == 2 else max(out, *below)
