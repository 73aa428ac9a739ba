"""Compressed sparse rows: the usual way to store a sparse matrix, here for comparison."""

from dataclasses import dataclass

import torch
from torch import Tensor

_INDEX_BYTES = (1, 2, 4, 8)


@dataclass(frozen=True)
class Csr:
    """A sparse matrix by rows; axes of the tensor after the first are columns.

    Args:
        values: (non-zeros,), row by row.
        columns: (non-zeros,), int64, the column of each value.
        offsets: (rows + 1,), int64: row i holds values[offsets[i] : offsets[i + 1]].
        shape: of the tensor.
    """

    values: Tensor
    columns: Tensor
    offsets: Tensor
    shape: torch.Size

    @property
    def numbers(self) -> int:
        """How many numbers the three arrays hold."""
        return len(self.values) + len(self.columns) + len(self.offsets)

    def bytes(self, value_bits: int | None = None) -> int:
        """Bytes of the three arrays, columns and offsets each in the smallest of 1, 2, 4 or 8 bytes that holds them.

        Args:
            value_bits: bits of one value; those of the tensor's type unless given.
        """
        bits = 8 * self.values.element_size() if value_bits is None else value_bits
        index = sum(len(array) * _index_bytes(array) for array in (self.columns, self.offsets))
        return -(-len(self.values) * bits // 8) + index

    def dense(self) -> Tensor:
        """The tensor again."""
        tensor = self.values.new_zeros(self.shape)
        rows = torch.repeat_interleave(torch.arange(len(self.offsets) - 1), self.offsets.diff())
        tensor.view(len(self.offsets) - 1, -1)[rows, self.columns] = self.values
        return tensor


def csr(tensor: Tensor) -> Csr:
    """Sort out the non-zeros of a tensor row by row.

    Args:
        tensor: of one axis (one row) or more.

    Raises:
        ValueError: the tensor has no axis, or one of size 0.
    """
    if not tensor.numel() or not tensor.dim():
        raise ValueError(f"a matrix has at least one row and one column, not shape {tuple(tensor.shape)}")
    matrix = tensor.detach().reshape(len(tensor) if tensor.dim() > 1 else 1, -1)
    rows, columns = matrix.nonzero(as_tuple=True)
    offsets = torch.cat((rows.new_zeros(1), rows.bincount(minlength=len(matrix)).cumsum(0)))
    return Csr(matrix[rows, columns], columns, offsets, tensor.shape)


def _index_bytes(array: Tensor) -> int:
    largest = int(array.max()) if array.numel() else 0
    return next(n for n in _INDEX_BYTES if largest < 256**n)
