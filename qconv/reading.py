"""From expectation values to a layer's outputs: probabilities, expected ones, and ones of the most likely bits."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from circuits.readouts import Readout

# Probabilities that differ by less are equal but for rounding.
_TIES = {torch.float32: 1e-5, torch.float64: 1e-10}


def read_out(readout: Readout, values: Tensor, *, only_first: bool = False, shots: int | None = None) -> Tensor:
    """Outputs of a readout.

    Args:
        readout: Which.
        values: Expectation values (N, n_obs, ...).
        only_first: Whether the affine map's constant belongs to index 0 of axis 2 alone, as for coefficients of waves.
        shots: Samples that the values are means of; None for exact ones.

    Returns:
        (N, outputs, ...). Affine in the values, or, of "most_likely", without gradient.
    """
    table = readout.table()
    if table is None:
        return values
    matrix, constant = (torch.from_numpy(part).to(values) for part in table)
    made: Tensor = torch.tensordot(matrix, values, dims=([1], [1])).movedim(0, 1)
    shift = constant.reshape(-1, *[1] * (values.ndim - 2))
    if only_first:
        first = torch.zeros_like(made[:1, :1])
        first[:, :, 0] = 1
        shift = shift * first
    made = made + shift
    if readout.kind != "most_likely":
        return made
    # Of strings equally likely each backend's rounding would choose another; counts that differ by one are no tie.
    tie = min(_TIES.get(made.dtype, 1e-5), 0.5 / shots if shots else 1)
    made = made.detach()
    likely = (made >= made.amax(1, keepdim=True) - tie).int().argmax(1, keepdim=True)
    counted = torch.tensor([float(k.bit_count()) for k in range(len(constant))]).to(values)
    # argmax would turn NaN into some count.
    return counted[likely].masked_fill(values.detach().isnan().any(1, keepdim=True), torch.nan)


def read_out_counts(readout: Readout, circuits: int) -> Counter[str]:
    """Operations of a readout on the values of so many circuits."""
    table = readout.table()
    if table is None:
        return Counter()
    outputs, strings = table[0].shape
    total = Counter({"mac:fp32*fp32": outputs * strings * circuits})
    if readout.kind == "most_likely":
        total["cmp:fp32"] = (outputs - 1) * circuits
    return total
