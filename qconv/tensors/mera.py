"""The multiscale entanglement renormalization ansatz: a tree whose blocks are disentangled before they merge."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from math import prod

import torch
from torch import Tensor

from qconv.tensors.feature_maps import Moments
from qconv.tensors.structures import SECOND_ORDER, Shape, Structure, TopMoments, mixing, unit, unit_counts

_MOST_DOUBLED = 2**24  # numbers in the largest tensor of two copies of a network


class Mera(Structure):
    """A binary tree whose neighboring blocks are disentangled by a gate before each coarse graining.

    At every level gates act on the sites (1, 2), (3, 4), ... and isometries then merge (0, 1), (2, 3), ... Gates and
    isometries are free tensors. A gate correlates its two sites, so a product vector becomes, patch by patch, a matrix
    product state whose bonds grow with the level: the contraction stays exact, at a cost exponential in the level.

    Args:
        shape: Sizes.
        normalize: Whether to divide what the root takes by its norm.

    Source: Vidal, Entanglement renormalization (arXiv:cond-mat/0512165).
    """

    def __init__(self, shape: Shape, normalize: bool = False) -> None:
        self.shape, self.normalize = shape, normalize
        # Dimension of the sites of each level; the levels' shapes: gates, then isometries.
        dims = [shape.dim] * shape.sites
        shapes: list[tuple[int, ...]] = []
        if shape.dim > shape.bond:
            shapes += [(shape.bond, shape.dim)] * shape.sites
            dims = [shape.bond] * shape.sites
        self.levels: list[tuple[int, ...]] = []
        while len(dims) > 2:
            self.levels.append(tuple(dims))
            shapes += [(dims[k], dims[k + 1]) * 2 for k in range(1, len(dims) - 1, 2)]
            merged = [min(shape.bond, a * b) for a, b in zip(dims[::2], dims[1::2], strict=False)]
            shapes += [(m, a, b) for m, a, b in zip(merged, dims[::2], dims[1::2], strict=False)]
            dims = merged + dims[len(dims) - len(dims) % 2 :]
        self.remaining = tuple(dims)
        self.shapes = (*shapes, (shape.outputs, prod(dims)))

    def top(self, sites: Sequence[Tensor], cores: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """See Structure."""
        remaining = iter(cores)
        if self.shape.dim > self.shape.bond:
            sites = [torch.bmm(next(remaining), site) for site in sites]
        # Matrix product states, one a patch: (groups, patches, bond, site, bond).
        states = [site.mT[:, :, None, :, None] for site in sites]
        for dims in self.levels:
            states = _coarse_grained(states, remaining, len(dims))
        vector = states[0] if len(states) == 1 else torch.einsum("gzapb,gzbqc->gzapqc", *states)
        flat = vector.flatten(2).mT
        return (unit(flat) if self.normalize else flat,)

    def body(self, moments: Moments, groups: int) -> list[Tensor]:
        """See Structure: gates start near the identity and isometries mix, as a tree's."""
        cores: list[Tensor] = []
        raw = [True] * self.shape.sites
        if self.shape.dim > self.shape.bond:
            cores += [mixing(moments, groups, (self.shape.bond, self.shape.dim), [True]) for _ in raw]
            raw = [False] * self.shape.sites
        for dims in self.levels:
            for k in range(1, len(dims) - 1, 2):
                a, b = dims[k], dims[k + 1]
                noise = torch.randn(groups, a * b, a * b, dtype=torch.float64) * (SECOND_ORDER / (a * b))
                cores.append((torch.eye(a * b, dtype=torch.float64) + noise).reshape(groups, a, b, a, b))
            for k in range(0, len(dims) - 1, 2):
                merged = min(self.shape.bond, dims[k] * dims[k + 1])
                cores.append(mixing(moments, groups, (merged, dims[k], dims[k + 1]), raw[k : k + 2]))
            raw = [False] * (len(dims) // 2) + raw[len(dims) - len(dims) % 2 :]
        return cores

    def top_moments(self, moments: Moments, cores: Sequence[Tensor], groups: int) -> list[TopMoments] | None:
        """See Structure: two copies of the network take each site's mean of phi phi^T to that of v v^T."""
        if self.normalize or self.width() ** 2 > _MOST_DOUBLED:
            return None
        site = moments.mean.expand(groups, -1)[..., None]
        mean = self.top([site] * self.shape.sites, cores)[0]
        site = moments.second.expand(groups, -1, -1).flatten(1)[..., None]
        flat = self.top([site] * self.shape.sites, [_doubled(core) for core in cores])[0]
        # Both copies of each remaining leg stand side by side.
        legs = flat.reshape(groups, *(size for size in self.remaining for _ in range(2)))
        order = [1 + 2 * k + copy for copy in range(2) for k in range(len(self.remaining))]
        second = legs.permute(0, *order).reshape(groups, prod(self.remaining), prod(self.remaining))
        return [TopMoments(mean[..., 0], second)]

    def counts(self) -> Counter[str]:
        """See Structure: the sums of products of `top`, in its order."""
        total = self.shapes[-1][0] * self.shapes[-1][1]
        if self.shape.dim > self.shape.bond:
            total += self.shape.sites * self.shape.bond * self.shape.dim
        found = Counter({"mac:fp32*fp32": total})
        for summed, _, products in self._steps():
            # Without a sum a product is a multiplication alone.
            found["mac:fp32*fp32" if summed > 1 else "mul:fp32"] += products
        return found + unit_counts(self.shapes[-1][1]) if self.normalize else found

    def saved(self) -> int:
        """See Structure."""
        return self.shape.sites * self.shape.dim + sum(made for _, made, _ in self._steps())

    def width(self) -> int:
        """See Structure."""
        return max(*self.shapes[-1], *(made for _, made, _ in self._steps()))

    def _steps(self) -> list[tuple[int, int, int]]:
        """(terms of a sum, numbers made, multiplications) of the steps of `top`, a patch."""
        first = self.levels[0] if self.levels else (min(self.shape.dim, self.shape.bond),) * min(2, self.shape.sites)
        states = [(1, dim, 1) for dim in first]
        steps = []
        for _ in self.levels:
            # (bond before, the two sites, bond behind) of each pair that a gate has joined.
            pairs = []
            for k in range(1, len(states) - 1, 2):
                (a, p, b), (_, q, c) = states[k : k + 2]
                steps += [(b, a * p * q * c), (p * q, a * p * q * c)]
                pairs.append((a, p, q, c))
            if len(states) % 2 == 0:
                pairs.append((states[-1][0], states[-1][1], 1, 1))
            merged = []
            for k in range(len(states) // 2):
                a, r, q, c = pairs[k]
                s = states[0][1] if k == 0 else pairs[k - 1][2]
                w = min(self.shape.bond, s * r)
                if k == 0:
                    steps += [(s, w * r * a), (r * a, w * q * c)]
                else:
                    steps.append((r, s * a * w * q * c))
                merged.append((1 if k == 0 else s * a, w, q * c))
            if len(states) % 2:
                merged.append((pairs[-1][2] * pairs[-1][3], pairs[-1][2], 1))
            states = merged
        if len(states) == 2:
            (_, p, b), (_, q, _) = states
            steps.append((b, p * q))
        return [(summed, made, summed * made) for summed, made in steps]


def _doubled(core: Tensor) -> Tensor:
    """Two copies of a core (groups, a, b, ...) as one whose legs are pairs: (groups, a * a, b * b, ...)."""
    first = core.reshape(len(core), *(size for leg in core.shape[1:] for size in (leg, 1)))
    second = core.reshape(len(core), *(size for leg in core.shape[1:] for size in (1, leg)))
    return (first * second).reshape(len(core), *(leg**2 for leg in core.shape[1:]))


def _coarse_grained(states: list[Tensor], cores: Iterator[Tensor], sites: int) -> list[Tensor]:
    """One level of a MERA: gates on (1, 2), (3, 4), ..., then isometries on (0, 1), (2, 3), ..."""
    pairs = []
    for k in range(1, sites - 1, 2):
        joined = torch.einsum("gzapb,gzbqc->gzapqc", states[k], states[k + 1])
        pairs.append(torch.einsum("gzapqc,grspq->gzarsc", joined, next(cores)))
    if sites % 2 == 0:
        # The last site is merged without a gate before.
        pairs.append(states[-1][..., None, :])
    merged = []
    for k in range(sites // 2):
        isometry = next(cores)
        if k == 0:
            half = torch.einsum("gzxsa,gwsr->gzxwra", states[0], isometry)
            block = torch.einsum("gzxwra,gzarqc->gzxwqc", half, pairs[0])
        else:
            # The state of a pair stays whole with its left block: the bond between its blocks is the right site's own
            # index together with the bond behind it.
            block = torch.einsum("gwsr,gzarqc->gzsawqc", isometry, pairs[k]).flatten(2, 3)
        merged.append(block.flatten(-2))
    if sites % 2:
        carried, behind = pairs[-1].shape[-2:]
        whole = torch.eye(carried * behind, dtype=states[0].dtype, device=states[0].device)
        whole = whole.reshape(1, 1, carried * behind, carried, behind)
        merged.append(whole.expand(*states[0].shape[:2], -1, -1, -1))
    return merged
