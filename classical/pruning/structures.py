"""Structures of a weight: which weights are kept or pruned together, and how strong each is."""

from typing import Literal

import torch
from torch import Tensor, nn

Structure = Literal["weight", "filter", "channel", "column", "layer"]
Norm = Literal["l1", "l2"]

STRUCTURES: tuple[Structure, ...] = ("weight", "filter", "channel", "column", "layer")
"""What is kept or pruned as one.

weight: each by itself. filter: all weights of one output. channel: all that read one input channel (one feature, in a
linear layer). column: all that read one kernel position of one input channel: a column of the matrix that multiplies
unfolded patches. layer: all. In a convolution of several groups the filters of a channel or column are its group's.
"""

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_GROUPED = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def structure_shape(module: nn.Module, weight: Tensor, structure: Structure) -> torch.Size:
    """Shape of one number a structure, which broadcasts against `by_groups(module, weight)`.

    Raises:
        ValueError: an unknown structure, or one that a transposed convolution does not have.
    """
    if structure not in STRUCTURES:
        raise ValueError(f"structure is {structure!r} but must be one of {', '.join(STRUCTURES)}")
    if isinstance(module, _TRANSPOSED) and structure not in ("weight", "layer"):
        raise ValueError(
            f"{type(module).__name__} keeps its weights by input channel first, so it has no {structure!r} here: "
            "skip the layer, or prune single weights"
        )
    shape = by_groups(module, weight).shape
    axes = range(len(shape))
    kept = {
        "weight": axes,
        "filter": (0, 1),
        "channel": (0, 2),
        "column": (0, *axes[2:]),
        "layer": (),
    }[structure]
    return torch.Size(size if axis in kept else 1 for axis, size in enumerate(shape))


def by_groups(module: nn.Module, weight: Tensor) -> Tensor:
    """View a weight (outputs, inputs, ...) as (groups, outputs of a group, inputs of a group, ...)."""
    groups = module.groups if isinstance(module, _GROUPED) else 1
    return weight.reshape(groups, len(weight) // groups, *weight.shape[1:])


def strength(module: nn.Module, scores: Tensor, structure: Structure, norm: Norm) -> Tensor:
    """One number a structure: mean |s| ("l1") or root mean square ("l2") of its scores s.

    Means, not sums: within a layer they rank as the norms do, and structures of unlike sizes compare across layers.

    Args:
        module: whose weight the scores belong to.
        scores: of the weight's shape.
        structure: one of STRUCTURES.
        norm: "l1" or "l2".

    Returns:
        A tensor of `structure_shape`.

    Raises:
        ValueError: unknown structure or norm.

    Source: Li et al., arXiv:1608.08710, section 3.1 (L1); Wen et al., arXiv:1608.03665 (filters, channels, shapes).
    """
    if norm not in ("l1", "l2"):
        raise ValueError(f"norm is {norm!r} but must be 'l1' or 'l2'")
    shape = structure_shape(module, scores, structure)
    scores = by_groups(module, scores).abs()
    axes = [axis for axis, (full, kept) in enumerate(zip(scores.shape, shape, strict=True)) if full != kept]
    if not axes:  # each weight for itself, whatever the norm
        return scores
    return scores.mean(axes, keepdim=True) if norm == "l1" else scores.square().mean(axes, keepdim=True).sqrt()


def spread(module: nn.Module, values: Tensor, weight: Tensor) -> Tensor:
    """Repeat one value a structure over the structure's weights: from `structure_shape` to the weight's shape."""
    return values.expand_as(by_groups(module, weight)).reshape(weight.shape)
