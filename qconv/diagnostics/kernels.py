"""Kernel matrices of a circuit, their alignment with labels and their distance from those of classical kernels."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, sqrt

import torch
from torch import Tensor

from circuits.naming import unknown
from qconv.diagnostics.entanglement import one_wire_matrices
from qconv.diagnostics.states import Kernel, check_numbers, circuit_of, parts, patches_of, positive, states
from qconv.layers import QuantumConv2d

KINDS = ("fidelity", "projected")
# Eigenvalues below this share of the largest are rounding errors.
_ROUNDING = 1e-12


@dataclass(frozen=True)
class GeometricDifference:
    """How badly a classical kernel fits what a quantum kernel can make, on given data.

    Args:
        value: g = sqrt(|| sqrt(K_Q) sqrt(K_C) (K_C + lambda)^-2 sqrt(K_C) sqrt(K_Q) ||): the largest norm of a
            classical model fitted to a quantum one of norm 1. For lambda = 0 it is
            sqrt(|| sqrt(K_Q) K_C^-1 sqrt(K_Q) ||), and infinite where no classical model fits.
        training: lambda sqrt(|| sqrt(K_Q) (K_C + lambda)^-2 sqrt(K_Q) ||): the largest root of a sum of squared errors
            that the fit leaves; 0 for lambda = 0.
        regularization: lambda.
        n_data: Points N.
    """

    value: float
    training: float
    regularization: float
    n_data: int

    @property
    def reference(self) -> float:
        """sqrt(N): a value far below it rules out an advantage on these points, whatever the labels."""
        return sqrt(self.n_data)


def kernel_matrix(
    kernel: Kernel,
    data: Tensor,
    weights: Tensor | None = None,
    *,
    kind: str = "fidelity",
    gamma: float = 1.0,
) -> Tensor:
    """The kernel matrix of the states that patches are encoded into.

    Args:
        kernel: A circuit or a layer.
        data: Patches or images, see `states.patches_of`.
        weights: (n_weights,); None for a layer's first filter, and for zeros for a circuit.
        kind: "fidelity", |<psi(x)|psi(x')>|^2, to which gates behind the last one that reads an input make no
            difference; or "projected", exp(-gamma sum_k |rho_k(x) - rho_k(x')|^2) with the density matrices rho_k of
            single wires and the Frobenius norm.
        gamma: Of the projected kernel, above 0.

    Returns:
        (P, P), float64.

    Raises:
        ValueError: For data or weights that do not fit, or an unknown kind.

    Source: Huang et al., Power of data in quantum machine learning (arXiv:2011.01938), for both.
    """
    if kind not in KINDS:
        raise unknown("kind", kind, KINDS)
    positive("gamma", gamma)
    circuit, patches = circuit_of(kernel), patches_of(kernel, data)
    if weights is None:
        layer = isinstance(kernel, QuantumConv2d)
        weights = kernel.weight[0] if layer else torch.zeros(circuit.n_weights)  # type: ignore[union-attr]
    check_numbers("weights", weights)
    if weights.shape != (circuit.n_weights,):
        raise ValueError(f"circuit takes {circuit.n_weights} weights but weights have shape {tuple(weights.shape)}")
    with torch.no_grad():
        rows = weights.detach().double().cpu().expand(len(patches), -1)
        state = torch.cat([states(circuit, patches[k], rows[k]) for k in parts(circuit, len(patches))])
        if kind == "fidelity":
            return (state @ state.mH).abs().square()
        seen = torch.view_as_real(one_wire_matrices(state)).flatten(1)
        return torch.exp(-gamma * torch.cdist(seen, seen).square())


def gaussian_kernel(data: Tensor, gamma: float | None = None) -> Tensor:
    """exp(-gamma |x - x'|^2) of patches (P, n): the classical kernel to compare with.

    Args:
        data: (P, n).
        gamma: Above 0; None for 1 / (n var(x)), as scikit-learn's "scale".

    Raises:
        ValueError: For a gamma that is not above 0, or constant data, which give none.
    """
    check_numbers("data", data)
    if data.ndim != 2:
        raise ValueError(f"data have shape {tuple(data.shape)}: give (patches, features)")
    patches = data.detach().double()
    if gamma is None:
        spread = float(patches.var(unbiased=False)) if patches.numel() else 0.0
        if not spread:
            raise ValueError(f"data of shape {tuple(data.shape)} have the variance 0: give gamma, or data that differ")
        gamma = 1 / (patches.shape[1] * spread)
    positive("gamma", gamma)
    return torch.exp(-gamma * torch.cdist(patches, patches).square())


def target_alignment(matrix: Tensor, labels: Tensor, *, rescale: bool = True) -> float:
    """Kernel-target alignment <K, T> / (|K| |T|) with the Frobenius product; 1 for the perfect kernel.

    T_ij is 1 within a class and -1 / (C - 1) between two of C classes: y_i y_j where there are two, y = +-1.

    Args:
        matrix: (P, P) kernel matrix.
        labels: (P,) of at least two classes.
        rescale: Divide each label by its class's size, so that large classes do not decide alone.

    Raises:
        ValueError: For shapes that do not fit, or a single class.

    Source: Cristianini et al., On kernel-target alignment (NeurIPS 2001); rescaling as PennyLane's
        kernels.target_alignment (Hubregtsen et al., arXiv:2105.02276).
    """
    _check_square(matrix)
    check_numbers("labels", labels)
    if labels.shape != matrix.shape[:1]:
        raise ValueError(f"matrix has {len(matrix)} points but labels have shape {tuple(labels.shape)}")
    _, members, sizes = torch.unique(labels, return_inverse=True, return_counts=True)
    if len(sizes) < 2:
        raise ValueError("labels hold 1 class: an alignment needs at least 2")
    same = (members[:, None] == members[None]).to(matrix.dtype)
    target = same - (1 - same) / (len(sizes) - 1)
    if rescale:
        shares = 1 / sizes[members].to(matrix.dtype)
        target = target * shares[:, None] * shares[None]
    return float((matrix * target).sum() / (matrix.norm() * target.norm()))


def geometric_difference(classical: Tensor, quantum: Tensor, regularization: float = 0.0) -> GeometricDifference:
    """The geometric difference of a quantum kernel from a classical one.

    Labels that a quantum model of norm 1 makes are y = sqrt(K_Q) v with |v| = 1. Kernel ridge regression with K_C
    fits them by a model of squared norm y^T (K_C + lambda)^-1 K_C (K_C + lambda)^-1 y and leaves the residual
    lambda (K_C + lambda)^-1 y: value and training error are their largest over all v.

    Args:
        classical: (N, N) kernel matrix K_C, symmetric and positive semidefinite; scaled to trace N here.
        quantum: K_Q, alike.
        regularization: lambda, at least 0, on that scale.

    Raises:
        ValueError: For matrices of different or other shapes, not symmetric, or of trace 0, or a negative lambda.

    Source: Huang et al., Power of data in quantum machine learning (arXiv:2011.01938): g_CQ, and its regularized
        form in the appendices (there g_gen and g_tra).
    """
    _check_square(classical)
    _check_square(quantum)
    if classical.shape != quantum.shape:
        raise ValueError(f"kernels have shapes {tuple(classical.shape)} and {tuple(quantum.shape)}: make them equal")
    if not 0 <= regularization < inf:
        raise ValueError(f"regularization is {regularization}: give a finite number of 0 or more")
    spectrum, vectors = _spectrum(classical)
    found, basis = _spectrum(quantum)
    # Both matrices in the eigenbasis of K_C.
    mixed = vectors.mT @ (basis * found.sqrt())
    damped = spectrum + regularization
    kept = spectrum > _ROUNDING * spectrum[-1]
    if regularization == 0 and float(mixed[~kept].square().sum()) > _ROUNDING * len(classical):
        return GeometricDifference(inf, 0.0, 0.0, len(classical))
    norm = torch.linalg.matrix_norm((spectrum[kept].sqrt() / damped[kept])[:, None] * mixed[kept], 2)
    left = torch.tensor(0.0)
    if regularization > 0:
        left = torch.linalg.matrix_norm((regularization / damped)[:, None] * mixed, 2)
    return GeometricDifference(float(norm), float(left), regularization, len(classical))


def _check_square(matrix: Tensor) -> None:
    check_numbers("kernel matrices", matrix)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"kernel matrix has shape {tuple(matrix.shape)}: it must be square")


def _spectrum(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, ascending, none below 0, and eigenvectors of a kernel matrix scaled to trace N."""
    exact = matrix.detach().double().cpu()
    if not torch.allclose(exact, exact.mT, atol=1e-6 * float(exact.abs().max())):
        raise ValueError("kernel matrix is not symmetric: give the matrix of one set of points with itself")
    trace = float(exact.trace())
    if not trace > 0:
        raise ValueError(f"kernel matrix has trace {trace}: it must be above 0")
    values, vectors = torch.linalg.eigh((exact + exact.mT) / 2 * (len(exact) / trace))
    return values.clamp(min=0), vectors
