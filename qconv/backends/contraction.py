"""Trigonometric polynomials of product form: features of each wire, contracted with a coefficient tensor.

A kernel with a product encoding has expectation values <O> = sum_P c_P prod_j b_{P_j}(x_j): this file knows the sum
and nothing of circuits, so the free polynomial `FourierConv2d` runs on the same code as the quantum kernels.
"""

from collections import Counter
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Patches are taken in chunks whose largest temporary has about this many numbers: it then stays in the caches, and
# wide kernels do not need gigabytes.
CHUNK_NUMBERS = 2**20


def split_wires(sizes: Sequence[int]) -> int:
    """How many wires go to the left half, the rest to the right half, of the contraction."""
    return len(sizes) // 2


def _outer(features: Sequence[Tensor]) -> Tensor | None:
    """Products of all choices of one feature a wire: list of (D_j, P) -> (prod D_j, P), last wire fastest."""
    result: Tensor | None = None
    for feature in features:
        result = feature if result is None else (result[:, None] * feature[None]).flatten(0, 1)
    return result


def _contract(coefficients: Tensor, *features: Tensor) -> Tensor:
    sizes = [len(feature) for feature in features]
    half = split_wires(sizes)
    left, right = _outer(features[:half]), _outer(features[half:])
    assert right is not None
    if left is None:
        return coefficients.flatten(1) @ right
    rows = len(coefficients)
    partial = coefficients.reshape(rows * len(left), len(right)) @ right
    return (partial.reshape(rows, *left.shape) * left).sum(1)


def contract(coefficients: Tensor, features: Sequence[Tensor]) -> Tensor:
    """sum over digits of coefficients times the product of the wires' features.

    Args:
        coefficients: (rows, D_0, ..., D_{n-1}).
        features: For each wire j its features at every patch, (D_j, P).

    Returns:
        (rows, P).
    """
    patches = features[0].shape[1]
    sizes = [len(feature) for feature in features]
    largest = max(len(coefficients) * prod(sizes[: split_wires(sizes)]), prod(sizes[split_wires(sizes) :]))
    chunk = max(256, CHUNK_NUMBERS // largest)
    if patches <= chunk:
        return _contract(coefficients, *features)
    parts = []
    for start in range(0, patches, chunk):
        part = [feature[:, start : start + chunk] for feature in features]
        if torch.is_grad_enabled() and patches * largest > 32 * CHUNK_NUMBERS:
            # The temporaries of a wide kernel are cheaper to compute again than to keep.
            parts.append(checkpoint(_contract, coefficients, *part, use_reentrant=False))
        else:
            parts.append(_contract(coefficients, *part))
    return torch.cat(parts, dim=1)


# Multiplications (and as many additions) charged for the sine and cosine of one angle: range reduction and two
# polynomials of six terms reach float32 precision (Cody & Waite, Software Manual for the Elementary Functions, ch. 8).
SINCOS_MULTIPLICATIONS = 14


def polynomial_counts(rows: int, sizes: Sequence[int], angles: int) -> Counter[str]:
    """Operations of one patch: features of `angles` angles, then `contract`.

    Products with the constant feature 1 are counted too: they are carried out.
    """
    half = split_wires(sizes)
    multiplications = 0
    for part in (sizes[:half], sizes[half:]):
        for k in range(1, len(part)):
            multiplications += prod(part[: k + 1])
    sincos = SINCOS_MULTIPLICATIONS * angles
    return Counter(
        {
            "mac:fp32*fp32": rows * prod(sizes) + (rows * prod(sizes[:half]) if half else 0),
            "mul:fp32": multiplications + sincos + angles,
            "add:fp32": sincos,
        }
    )


def scaled(counts: Counter[str], factor: int) -> Counter[str]:
    """Counts of `factor` repetitions."""
    return Counter({key: value * factor for key, value in counts.items()})
