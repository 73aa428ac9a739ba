"""Two neighboring inputs of a deformed neuron, entangled by a gate of SO(4): what their agreements become.

Traceless real symmetric operators of two qubits are 3x3 matrices T on which SO(4) acts by rotations from both sides,
T -> R_1 T R_2^T (it is SU(2) x SU(2) up to a sign): with e = SX, the antisymmetric matrix of two, the generators are
J = (S(x)e, X(x)e, -e(x)1) and K = (1(x)e, e(x)X, e(x)S), and T_ab stands for
-J_a K_b = [[S1, -XS, XX], [X1, SS, -SX], [ee, -1X, -1S]]. A product state reads each entry as a product of h or X of
both qubits, and ee, whose mean is 0 in real states, not at all.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

INPUTS = ("coherent", "mixed")

# Monomials of one input after the constant: those of a mean, and those of its square.
LINEAR = {"coherent": ("h", "X"), "mixed": ("h",)}
SQUARE = {"coherent": ("h", "X", "hh", "hX"), "mixed": ("h", "hh")}


def tiling(height: int, width: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Taps of a kernel, numbered row by row, in neighboring pairs: (first ones, second ones, what remains).

    Columns 0-1, 2-3, ... of every row, row by row; then, if a column remains, its rows 0-1, 2-3, ...
    """
    grid = np.arange(height * width).reshape(height, width)
    across, down = width // 2 * 2, height // 2 * 2 if width % 2 else 0
    first = [grid[:, 0:across:2].ravel(), grid[0:down:2, across:].ravel()]
    second = [grid[:, 1:across:2].ravel(), grid[1:down:2, across:].ravel()]
    return np.concatenate(first), np.concatenate(second), grid[down:, across:].ravel()


def _readout() -> NDArray[np.float64]:
    """(9, 9): a flattened 3x3 matrix T -> its coefficients on (1, h, X) of one input times (1, h, X) of the other."""
    table = np.zeros((3, 3, 3, 3))
    for a, b, i, j, sign in (
        *((0, 0, 1, 0, 1), (0, 1, 2, 1, -1), (0, 2, 2, 2, 1)),
        *((1, 0, 2, 0, 1), (1, 1, 1, 1, 1), (1, 2, 1, 2, -1)),
        *((2, 1, 0, 2, -1), (2, 2, 0, 1, -1)),
    ):
        table[a, b, i, j] = sign
    return table.reshape(9, 9)


def _squaring(inputs: str) -> NDArray[np.float64]:
    """(n^4, m^2): products of two coefficients of a mean -> coefficients of its square, where X^2 = 1 - h^2.

    A mean has coefficients on products of monomials of two inputs, n each, and its square on m each.
    """
    names, squares = ("1", *LINEAR[inputs]), ("1", *SQUARE[inputs])
    table = np.zeros((len(names), len(names), len(squares)))
    for i, left in enumerate(names):
        for j, right in enumerate(names):
            if left == right == "X":
                table[i, j, 0], table[i, j, squares.index("hh")] = 1, -1
            else:
                product = "".join(sorted((left + right).replace("1", ""), reverse=True)) or "1"
                table[i, j, squares.index(product)] = 1
    both: NDArray[np.float64] = np.einsum("ikm,jln->ijklmn", table, table)
    return both.reshape(len(names) ** 4, len(squares) ** 2)


READOUT = _readout()
SQUARING = {inputs: _squaring(inputs) for inputs in INPUTS}


def columns(a: Tensor, b: Tensor, c: Tensor, d: Tensor, norm: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The columns (..., 3) of the rotation of a quaternion a + b i + c j + d k of squared norm `norm`."""
    f = 2 / norm
    entries = (
        (1 - f * (c * c + d * d), f * (b * c + a * d), f * (b * d - a * c)),
        (f * (b * c - a * d), 1 - f * (b * b + d * d), f * (c * d + a * b)),
        (f * (b * d + a * c), f * (c * d - a * b), 1 - f * (b * b + c * c)),
    )
    first, second, third = (torch.stack(column, dim=-1) for column in entries)
    return first, second, third
