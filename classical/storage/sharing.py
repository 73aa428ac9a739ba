"""Weight sharing: all weights of a layer take one of few values, found by k-means and then trained.

Zeros are what pruning left and stay zeros: they are no cluster.

Source: Han, Mao, Dally, Deep Compression, arXiv:1510.00149, section 3.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from classical.quantizers import Codebook

Init = Literal["linear", "density", "random"]
_MOST_STEPS = 10_000  # k-means on a line ends after some dozens; rounding must not let it go round in circles


@torch.no_grad()
def share(weight: Tensor, bits: int, init: Init = "linear", *, generator: torch.Generator | None = None) -> Codebook:
    """Replace the non-zero weights by 2^bits values or fewer that keep the squared error small.

    k-means on a line: each weight goes to the nearest level, each level to the mean of its weights, until nothing
    moves. A level left without weights halves the cluster with the largest squared error.

    Args:
        weight: of any shape, finite.
        bits: 1 to 16; a level of 0 for the zeros comes on top.
        init: the first levels: "linear", equally spaced from the smallest to the largest weight; "density", equally
            spaced in the weights' order; "random", weights drawn without replacement.
        generator: draws them; torch's global one unless given.

    Returns:
        codes of the weight's shape and ascending levels (L,) of its type.

    Raises:
        ValueError: bits or init out of range, or a weight that is not finite.

    Source: section 3.1, equation 2; initial levels: section 3.2.
    """
    clusters, levels = _clusters(weight, bits, init, generator)
    zero = clusters < 0
    if zero.any():
        place = int(torch.searchsorted(levels, 0.0))
        clusters = torch.where(zero, place, clusters + (clusters >= place))
        levels = torch.cat((levels[:place], levels.new_zeros(1), levels[place:]))
    return Codebook(clusters.int(), levels)


class SharedWeights(nn.Module):
    """A parametrization (torch.nn.utils.parametrize) of a weight by the levels that its entries share.

    The levels are what is trained: the gradient of one is the sum of the gradients of its weights.

    Args:
        clusters: of the weight's shape, the level of each entry, from 0; -1 for an entry that stays 0.
        levels: how many there are.

    Source: section 3.3, equation 3.
    """

    codes: Tensor

    def __init__(self, clusters: Tensor, levels: int) -> None:
        super().__init__()
        self.levels = levels
        self.register_buffer("codes", (clusters + 1).int())

    def forward(self, levels: Tensor) -> Tensor:
        """The weight: levels (L,) in the places of their codes."""
        table = torch.cat((levels.new_zeros(1), levels))
        return table.gather(0, self.codes.flatten().long()).reshape(self.codes.shape)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Levels (L,) nearest to a weight: the mean of each level's entries, 0 for a level without."""
        sums = weight.new_zeros(self.levels + 1, dtype=torch.float64)
        index = self.codes.flatten().long()
        sums.index_add_(0, index, weight.flatten().double())
        counts = index.bincount(minlength=self.levels + 1).clamp(min=1)
        return (sums / counts)[1:].to(weight.dtype)


def share_parameter(
    module: nn.Module,
    name: str = "weight",
    bits: int = 4,
    init: Init = "linear",
    *,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Let a module's weight take 2^bits values that are trained from then on; see `share`.

    `module.parametrizations[name].original` then holds the levels, and an optimizer must be made anew. A mask or
    another parametrization is made permanent first. It ends with torch.nn.utils.parametrize.remove_parametrizations.

    Args:
        module: changed in place, and returned.
        name: of its parameter.
        bits, init, generator: as for `share`.

    Raises:
        ValueError: the module has no such parameter; those of `share`.
    """
    make_permanent(module, name)
    if name not in dict(module.named_parameters(recurse=False)):
        raise ValueError(f"{type(module).__name__} has no parameter {name!r} of its own")
    weight = getattr(module, name)
    with torch.no_grad():
        clusters, levels = _clusters(weight, bits, init, generator)
    parametrize.register_parametrization(module, name, SharedWeights(clusters, len(levels)))
    return module


def is_masked(module: nn.Module, name: str) -> bool:
    """Whether torch.nn.utils.prune holds a mask on a parameter."""
    return hasattr(module, f"{name}_orig") and hasattr(module, f"{name}_mask")


def make_permanent(module: nn.Module, name: str) -> None:
    """Put the value of a parameter where a mask of torch.nn.utils.prune or a parametrization stood, if any did."""
    if is_masked(module, name):
        prune.remove(module, name)  # type: ignore[no-untyped-call]
    elif parametrize.is_parametrized(module, name):
        parametrize.remove_parametrizations(module, name, leave_parametrized=True)


def _clusters(weight: Tensor, bits: int, init: Init, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Index of each weight's level (int64, -1 for zeros) and the levels, ascending."""
    if not 1 <= bits <= 16:
        raise ValueError(f"bits is {bits} but must be 1 to 16")
    if not weight.isfinite().all():
        raise ValueError("a weight is not finite: k-means needs numbers")
    wide = weight.detach().double()
    points = wide[wide != 0].sort().values
    levels = torch.unique_consecutive(points)
    if len(levels) > 2**bits:
        levels = _k_means(points, _first_levels(points, 2**bits, init, generator))
    clusters = torch.bucketize(wide, (levels[1:] + levels[:-1]) / 2, right=True)
    return torch.where(wide == 0, -1, clusters), levels.to(weight.dtype)


def _first_levels(points: Tensor, count: int, init: Init, generator: torch.Generator | None) -> Tensor:
    if init == "linear":
        return torch.linspace(float(points[0]), float(points[-1]), count, dtype=points.dtype, device=points.device)
    if init == "density":
        ranks = (torch.arange(count, dtype=points.dtype, device=points.device) + 0.5) / count
        return points[(ranks * len(points)).long()]
    if init == "random":
        drawn = torch.randperm(len(points), generator=generator)[:count]
        return points[drawn.sort().values.to(points.device)]
    raise ValueError(f"init is {init!r} but must be 'linear', 'density' or 'random'")


def _k_means(points: Tensor, levels: Tensor) -> Tensor:
    """Lloyd's iteration for sorted points: clusters are runs of them, and sums of runs are differences."""
    start, end = levels.new_zeros(1, dtype=torch.int64), torch.tensor([len(points)], device=levels.device)
    sums, squares = (torch.cat((levels.new_zeros(1), x.cumsum(0))) for x in (points, points.square()))
    before = end
    for _ in range(_MOST_STEPS):
        edges = torch.cat((start, torch.searchsorted(points, (levels[1:] + levels[:-1]) / 2), end))
        if torch.equal(edges, before):
            break
        before, full, counts = edges, edges.diff() > 0, edges.diff().clamp(min=1)
        means = torch.where(full, sums[edges].diff() / counts, levels)
        # A level without weights, such as one between the negative and the positive ones, goes where it helps: beside
        # that of the cluster with the largest squared error, one standard deviation away.
        errors = torch.where(full, squares[edges].diff() - counts * means.square(), 0).clamp(min=0)
        worst = errors.topk(int((~full).sum())).indices
        moved = means[worst] + (errors[worst] / counts[worst]).sqrt()
        levels = torch.cat((means[full], moved)).sort().values
    return levels[before.diff() > 0]
