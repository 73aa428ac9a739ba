"""Schmidt values of tensor networks, and the truncation of trees with the exact error.

Everything is read off a canonical form: every core but the root maps its children isometrically to its parent, so the
norm of the whole tensor is the root's, and the singular values across a bond are those of a small matrix.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from qconv.tensors.structures import Tree


def _parents(tree: Tree) -> dict[int, tuple[int, int]]:
    """For each core but the root's: its parent and the leg there."""
    sites = tree.shape.sites
    return {
        child - sites: (k, 1 + axis)
        for k, node in enumerate(tree.nodes)
        for axis, child in enumerate(node)
        if child is not None and child >= sites
    }


def _applied(core: Tensor, axis: int, matrix: Tensor) -> Tensor:
    """Apply a matrix (new, old) to one leg of a core."""
    applied: Tensor = torch.tensordot(core, matrix, dims=([axis], [1]))
    return applied.movedim(-1, axis)


def _lift(cores: list[Tensor], parents: dict[int, tuple[int, int]], k: int) -> None:
    """Make core k isometric in place; what remains goes to its parent."""
    # v = core x = R^T Q^T x: Q^T stays, R^T goes up.
    q, r = torch.linalg.qr(cores[k].flatten(1).T)
    cores[k] = q.T.reshape(-1, *cores[k].shape[1:])
    above, axis = parents[k]
    cores[above] = _applied(cores[above], axis, r)


def canonical(tree: Tree, cores: Sequence[Tensor]) -> list[Tensor]:
    """The same tensor with every core but the root isometric: core core^T = 1 from children to parent."""
    found, parents = list(cores), _parents(tree)
    for k in range(len(found) - 1):
        _lift(found, parents, k)
    return found


def _factor_above(tree: Tree, cores: Sequence[Tensor], bond: int) -> Tensor:
    """A matrix (bond, s) with the singular values of the whole tensor, everything below the bond against the rest."""
    parents, path = _parents(tree), []
    while bond in parents:
        path.append(parents[bond])
        bond = parents[bond][0]
    top, axis = path.pop()
    # The output leg is one of the rest.
    factor = _compressed(cores[top].movedim(axis, 0).flatten(1))
    for k, axis in reversed(path):
        joined = torch.tensordot(factor, cores[k], dims=([0], [0]))
        factor = _compressed(joined.movedim(axis, 0).flatten(1))
    return factor


def _compressed(matrix: Tensor) -> Tensor:
    """L of the factorization L Q: the same singular values and left vectors in fewer columns."""
    triangle: Tensor = torch.linalg.qr(matrix.T, mode="r").R
    return triangle.T


def spectra(tree: Tree, cores: Sequence[Tensor]) -> list[Tensor]:
    """Singular values across the bond above every core but the root, in one pass from the root down.

    Args:
        tree: The network.
        cores: Of one group, any dtype; computed in float64.
    """
    exact, parents = canonical(tree, [core.detach().double() for core in cores]), _parents(tree)
    factors: dict[int, Tensor] = {}
    for k in range(len(exact) - 2, -1, -1):
        above, axis = parents[k]
        joined = torch.tensordot(factors[above], exact[above], dims=([0], [0])) if above in factors else exact[above]
        factors[k] = _compressed(joined.movedim(axis, 0).flatten(1))
    return [torch.linalg.svdvals(factors[k]) for k in range(len(exact) - 1)]


def plaquette_values(table: Tensor, rows: int) -> Tensor:
    """Singular values, to sum of squares 1, of a plaquette's table (sites' indices, outputs) cut after its first sites.

    Args:
        table: (dim^N, outputs), the first site the slowest index.
        rows: dim^cut.
    """
    matrix = table.reshape(rows, -1)
    tall = matrix if matrix.shape[0] > matrix.shape[1] else matrix.T
    values: Tensor = torch.linalg.svdvals(torch.linalg.qr(tall, mode="r").R)
    return F.normalize(values, dim=0)


def distance(tree: Tree, cores: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    """Frobenius norm of the difference of two tensors on the same tree, without cancellation.

    The difference is one network whose bonds are the direct sums of both: its norm is that of its canonical root.

    Args:
        tree: The network; bonds may have other sizes than its own.
        cores: Of one group, any dtype; computed in float64.
        others: Of the other tensor.
    """
    joined = []
    for node, one, other in zip(tree.nodes, cores, others, strict=True):
        root = node is tree.nodes[-1]
        # Sites and outputs are the same legs in both, bonds are not.
        shared = [root, *(child < tree.shape.sites for child in node if child is not None)]
        sizes = [a if same else a + b for a, b, same in zip(one.shape, other.shape, shared, strict=True)]
        core = torch.zeros(sizes, dtype=torch.float64, device=one.device)
        core[tuple(slice(a) for a in one.shape)] += one.double()
        beginnings = [0 if same else a for a, same in zip(one.shape, shared, strict=True)]
        core[tuple(slice(start, None) for start in beginnings)] += -other.double() if root else other.double()
        joined.append(core)
    return float(torch.linalg.vector_norm(canonical(tree, joined)[-1]))


def truncated(tree: Tree, cores: Sequence[Tensor], smaller: Tree) -> list[Tensor]:
    """Project every bond onto its largest singular vectors, from the leaves to the root.

    The projections of nested and of disjoint blocks of sites commute, so what they discard one after another is
    mutually orthogonal: the squared Frobenius error is the sum of all discarded squares, without cancellation.

    Args:
        tree: The network.
        cores: Of one group.
        smaller: The same network with smaller bonds.

    Returns:
        The cores of `smaller`, float64.

    Source: Grasedyck, Hierarchical singular value decomposition of tensors (SIAM J. Matrix Anal. Appl. 31, 2010).
    """
    found = canonical(tree, [core.detach().double() for core in cores])
    parents = _parents(tree)
    for k, shape in enumerate(smaller.shapes[:-1]):
        vectors, _, _ = torch.linalg.svd(_factor_above(tree, found, k), full_matrices=False)
        kept = vectors[:, : shape[0]].T
        found[k] = _applied(found[k], 0, kept)
        above, axis = parents[k]
        found[above] = _applied(found[above], axis, kept)
        # A core that lost a part of a leg is not isometric any more, nor are those above it.
        while above in parents:
            _lift(found, parents, above)
            above = parents[above][0]
    return [_padded(core, shape) for core, shape in zip(found, smaller.shapes, strict=True)]


def _padded(core: Tensor, shape: tuple[int, ...]) -> Tensor:
    # A canonical form drops directions that a core with more rows than columns cannot use.
    result = core.new_zeros(shape)
    result[tuple(slice(size) for size in core.shape)] = core
    return result
