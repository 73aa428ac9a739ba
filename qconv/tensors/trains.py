"""Tensor trains (matrix product states): pure functions on a list of cores.

A train of n cores (r_{k-1}, d_k, r_k) with r_0 = r_n = 1 stands for the tensor of shape (d_1, ..., d_n)
T[i_1, ..., i_n] = G_1[:, i_1, :] G_2[:, i_2, :] ... G_n[:, i_n, :]; the r_k are its ranks, or bond dimensions. Cores
are real or complex torch tensors of one dtype. Only `to_dense` and `from_dense` make the whole tensor.

Source: Oseledets, SIAM J. Sci. Comput. 33, 2295 (2011) for trains, their construction and rounding; Schollwöck, Annals
of Physics 326, 96 (2011) (arXiv:1008.3477), section 4, for canonical forms and Schmidt values.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import inf, sqrt

import torch
from torch import Tensor

from qconv.patches import whole

Train = list[Tensor]


def check_train(cores: Sequence[Tensor]) -> Train:
    """The cores as a list, checked.

    Raises:
        ValueError: Unless there is a core, all are tensors of three axes and one dtype, neighbors agree in the rank
            between them, and the outer ranks are 1.
    """
    if isinstance(cores, Tensor) or not isinstance(cores, Iterable):
        raise ValueError(f"train is a {type(cores).__name__}: give a list of cores, tensors (rank, size, rank)")
    train = list(cores)
    if not train:
        raise ValueError("train has 0 cores: give at least 1 of shape (rank, size, rank)")
    left = 1
    for k, core in enumerate(train):
        if not isinstance(core, Tensor):
            raise ValueError(f"core {k} is a {type(core).__name__}: give a torch.Tensor, such as torch.as_tensor(core)")
        if core.ndim != 3:
            raise ValueError(f"core {k} has shape {tuple(core.shape)}: give three axes (rank, size, rank)")
        if core.dtype != train[0].dtype:
            raise ValueError(f"core {k} is {core.dtype} but core 0 is {train[0].dtype}: convert one with .to(dtype)")
        if core.shape[0] != left:
            raise ValueError(
                f"core {k} has shape {tuple(core.shape)} but the rank on its left is {left}: neighbors share a rank, "
                "and the outer ranks are 1"
            )
        left = core.shape[2]
    if left != 1:
        raise ValueError(f"the last core has shape {tuple(train[-1].shape)}: its right rank must be 1")
    return train


def ranks(cores: Sequence[Tensor]) -> tuple[int, ...]:
    """Bond dimensions r_1, ..., r_{n-1} between the cores."""
    return tuple(core.shape[2] for core in check_train(cores)[:-1])


def to_dense(cores: Sequence[Tensor]) -> Tensor:
    """The tensor (d_1, ..., d_n) that a train stands for."""
    train = check_train(cores)
    result = train[0].new_ones(1, 1)
    for core in train:
        result = (result @ core.flatten(1)).reshape(-1, core.shape[2])
    return result.reshape([core.shape[1] for core in train])


def from_dense(tensor: Tensor, tolerance: float = 0.0, max_rank: int | None = None) -> Train:
    """A tensor as a train, by one singular value decomposition a cut.

    Args:
        tensor: (d_1, ..., d_n), n at least 1.
        tolerance: Largest Frobenius distance from the tensor, unless max_rank forces a larger one; 0 keeps all but
            numerical zeros.
        max_rank: Largest rank; None for any.

    Returns:
        Cores, all but the last left-orthonormal. `truncate(from_dense(tensor), ...)` also says the error.

    Raises:
        ValueError: For a scalar, or a tolerance or rank out of range.

    Source: Oseledets (2011), algorithm 1 (TT-SVD).
    """
    if not isinstance(tensor, Tensor):
        raise ValueError(f"tensor is a {type(tensor).__name__}: give a torch.Tensor, such as torch.as_tensor(tensor)")
    if tensor.ndim == 0 or tensor.numel() == 0:
        raise ValueError(f"tensor has shape {tuple(tensor.shape)}: give at least one axis, none of size 0")
    train, rest = [], tensor
    budget = _Budget(tolerance, max_rank, tensor.ndim - 1)
    rank = 1
    for size in tensor.shape[:-1]:
        core, rest = budget.split(rest.reshape(rank * size, -1))
        train.append(core.reshape(rank, size, -1))
        rank = core.shape[1]
    return [*train, rest.reshape(rank, -1, 1)]


def canonical(cores: Sequence[Tensor], center: int) -> Train:
    """The same tensor with all cores but one orthonormal.

    Args:
        cores: A train.
        center: The core, 0 to n - 1, that is not: those on its left become isometries (r_{k-1} d_k -> r_k), those on
            its right (r_k d_k -> r_{k-1}). Ranks larger than these allow shrink.

    Raises:
        ValueError: For a center out of range.
    """
    train = check_train(cores)
    if not 0 <= center < len(train):
        raise ValueError(f"center is {center} but the train has cores 0 to {len(train) - 1}")
    for k in range(center):
        q, r = torch.linalg.qr(train[k].flatten(0, 1))
        train[k] = q.reshape(*train[k].shape[:2], -1)
        train[k + 1] = torch.tensordot(r, train[k + 1], 1)
    for k in range(len(train) - 1, center, -1):
        q, r = torch.linalg.qr(train[k].flatten(1).mH)
        train[k] = q.mH.resolve_conj().reshape(-1, *train[k].shape[1:])
        train[k - 1] = torch.tensordot(train[k - 1], r.mH, 1)
    return train


def schmidt_values(cores: Sequence[Tensor], cut: int) -> Tensor:
    """Singular values of the tensor split in two, largest first; their squares add up to the squared norm.

    Args:
        cores: A train.
        cut: Cores left of the cut, 1 to n - 1.

    Raises:
        ValueError: For a cut out of range.
    """
    train = check_train(cores)
    if not 1 <= cut < len(train):
        raise ValueError(f"cut is {cut} but a train of {len(train)} cores has cuts 1 to {len(train) - 1}")
    values: Tensor = torch.linalg.svdvals(canonical(train, cut - 1)[cut - 1].flatten(0, 1))
    return values


def entanglement_entropy(cores: Sequence[Tensor], cut: int) -> Tensor:
    """Von Neumann entropy -sum p ln p of a cut, in nats: p are the Schmidt values squared, over their sum.

    Args:
        cores: A train, not 0.
        cut: Cores left of the cut, 1 to n - 1.

    Returns:
        A scalar between 0 (a product across the cut) and the logarithm of the rank there.

    Raises:
        ValueError: For a cut out of range, or a train that is 0.
    """
    values = schmidt_values(cores, cut)
    if not values.max() > 0:
        raise ValueError(f"the largest Schmidt value at cut {cut} is {values.max().item()}: 0 has no entropy")
    p = (values / values.max()).square()
    p = p / p.sum()
    # p ln p goes to 0, but its derivative at p = 0 does not exist.
    entropy: Tensor = torch.special.entr(p[p > 0]).sum()
    return entropy


def inner(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """Inner product sum conj(A) B of two trains' tensors, a scalar.

    Raises:
        ValueError: If their sizes differ.
    """
    left, right = check_train(a), check_train(b)
    sizes = [[core.shape[1] for core in train] for train in (left, right)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"trains have sizes {sizes[0]} and {sizes[1]}: they must be equal")
    result = left[0].new_ones(1, 1)
    for x, y in zip(left, right, strict=True):
        step = torch.tensordot(result, y, 1)
        result = torch.tensordot(x.conj(), step, ([0, 1], [0, 1]))
    return result[0, 0]


def norm(cores: Sequence[Tensor]) -> Tensor:
    """Frobenius norm of the tensor, a scalar: that of the one core which is not orthonormal."""
    result: Tensor = torch.linalg.vector_norm(canonical(cores, 0)[0])
    return result


def add(trains: Sequence[Sequence[Tensor]]) -> Train:
    """The sum of trains of equal sizes: ranks add up, `truncate` then shortens them.

    Raises:
        ValueError: For no trains, or sizes that differ.
    """
    checked = [check_train(train) for train in trains]
    sizes = {tuple(core.shape[1] for core in train) for train in checked}
    if len(sizes) != 1:
        raise ValueError(f"trains have sizes {sorted(sizes)}: give at least one, all of the same sizes")
    last = len(checked[0]) - 1
    if last == 0:
        return [torch.stack([train[0] for train in checked]).sum(0)]
    result = []
    for k, parts in enumerate(zip(*checked, strict=True)):
        if k in (0, last):
            result.append(torch.cat(parts, dim=2 if k == 0 else 0))
            continue
        blocks = parts[0].new_zeros(sum(p.shape[0] for p in parts), parts[0].shape[1], sum(p.shape[2] for p in parts))
        row = column = 0
        for part in parts:
            blocks[row : row + part.shape[0], :, column : column + part.shape[2]] = part
            row, column = row + part.shape[0], column + part.shape[2]
        result.append(blocks)
    return result


def contract(cores: Sequence[Tensor], vectors: Sequence[Tensor]) -> Tensor:
    """A train's tensor contracted with products of vectors, without making it.

    Args:
        cores: A train of n cores.
        vectors: For each of the last m <= n cores its vectors at P points, (P, d_k); the cores before stay open.

    Returns:
        (P, d_1, ..., d_{n-m}).

    Raises:
        ValueError: For no vectors, more vectors than cores, or sizes that do not fit.
    """
    train = check_train(cores)
    if not 1 <= len(vectors) <= len(train):
        raise ValueError(f"train has {len(train)} cores but {len(vectors)} vectors were given: give 1 to {len(train)}")
    opened, closed = train[: len(train) - len(vectors)], train[len(train) - len(vectors) :]
    shapes, sizes = [tuple(vector.shape) for vector in vectors], [core.shape[1] for core in closed]
    if shapes != [(shapes[0][0], size) for size in sizes]:
        raise ValueError(f"vectors have shapes {shapes} but the cores have sizes {sizes}: give (points, size) for each")
    result = vectors[0].new_ones(len(vectors[0]), 1)
    for core, vector in zip(closed[::-1], vectors[::-1], strict=True):
        result = (vector[:, :, None] * result[:, None]).flatten(1) @ core.flatten(1).T
    rest = result.new_ones(1, 1)
    for core in opened:
        rest = (rest @ core.flatten(1)).reshape(-1, core.shape[2])
    return (result @ rest.T).reshape(len(result), *(core.shape[1] for core in opened))


def truncate(cores: Sequence[Tensor], bond_dim: int | None = None, *, tolerance: float = 0.0) -> tuple[Train, float]:
    """A train with smaller ranks, and how far it is from the given one.

    All cores but the first are made orthonormal; then a sweep from the left cuts the singular values of one rank after
    the other. Each step replaces the tensor T_{k-1} by T_k = (P_k x 1) T_{k-1}, P_k being a projector on the legs left
    of the cut, and all later tensors stay in its range. So the steps T_{k-1} - T_k are orthogonal to one another, and
    their squared norms, which are the sums of the discarded squared singular values, add up to the squared distance: no
    bound, and no difference of large numbers. It is off by rounding alone, about the precision times the norm, where
    <T|T> + <T'|T'> - 2 <T|T'> would be off by the root of that.

    Args:
        cores: A train.
        bond_dim: Largest rank; None for any.
        tolerance: Largest Frobenius distance, unless bond_dim forces a larger one. The squared budget is shared out
            evenly among the cuts still to come. 0 drops numerical zeros only, and so finds the exact ranks.

    Returns:
        (train, error): cores, all but the last left-orthonormal, and the Frobenius distance of the two tensors. With
        one cut it is the smallest possible; else at most sqrt(n - 1) times that.

    Raises:
        ValueError: For a rank below 1 or a negative tolerance.

    Source: Oseledets (2011), algorithm 2 (TT-rounding) and theorem 2.2; that the error is exact: derived above.
    """
    budget = _Budget(tolerance, bond_dim, len(cores) - 1)
    train = canonical(cores, 0)
    for k in range(len(train) - 1):
        core, rest = budget.split(train[k].flatten(0, 1))
        train[k] = core.reshape(*train[k].shape[:2], -1)
        train[k + 1] = torch.tensordot(rest, train[k + 1], 1)
    return train, sqrt(budget.discarded)


class _Budget:
    """How much of the squared norm may be discarded, and how much has been.

    Args:
        tolerance: Frobenius distance.
        max_rank: Largest rank; None for any.
        cuts: Cuts to come.
    """

    def __init__(self, tolerance: float, max_rank: int | None, cuts: int) -> None:
        if not 0 <= tolerance < inf:
            raise ValueError(f"tolerance is {tolerance!r}: give a Frobenius distance, 0 or more")
        self._max_rank = None if max_rank is None else whole(max_rank, "largest rank", 1)
        self._allowed, self._cuts = tolerance**2, cuts
        self.discarded = 0.0

    def split(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """An isometry and the rest, whose product is the matrix without its smallest singular values."""
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        squares = s.detach().double().square()
        tails = [*squares.flip(0).cumsum(0).flip(0).tolist(), 0.0]  # discarded if so many are kept
        share = max(0.0, self._allowed - self.discarded) / max(1, self._cuts)
        zeros = int((s <= s[0] * 4 * max(matrix.shape) * torch.finfo(s.dtype).eps).sum())
        keep = next(k for k, tail in enumerate(tails) if tail <= share)
        keep = max(1, min(keep, len(s) - zeros, len(s) if self._max_rank is None else self._max_rank))
        self.discarded += tails[keep]
        self._cuts -= 1
        return u[:, :keep], s[:keep, None] * vh[:keep]
