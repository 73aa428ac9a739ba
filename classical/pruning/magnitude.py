"""One-shot pruning: the weakest weights or structures, by a fraction or below a threshold."""

from collections.abc import Collection, Iterable, Mapping
from numbers import Real
from typing import Literal

import torch
from torch import Tensor, nn

from classical.pruning.masks import check_names, effective_weight, kept, masked, prunable, stored_weight
from classical.pruning.structures import Norm, Structure, spread, strength

Scope = Literal["layer", "global"]


@torch.no_grad()
def prune(
    model: nn.Module,
    fraction: float | Mapping[str, float] | None = None,
    *,
    threshold: float | Mapping[str, float] | None = None,
    scope: Scope = "layer",
    structure: Structure = "weight",
    norm: Norm = "l1",
    scores: Mapping[str, Tensor] | None = None,
    skip: Collection[str] = (),
) -> None:
    """Mask the weakest weights, or the weakest structures of them.

    What was pruned before stays pruned and counts towards the fraction. Among equals the first in memory goes first,
    and in a model the first layer.

    Args:
        model: changed in place; masks are parametrizations of `weight` (see `finalize`).
        fraction: share of all weights (structures) that is zero afterwards, 0 to 1, rounded to a whole number of them;
            a mapping from layer names prunes those layers only, each by its own share.
        threshold: prunes where the strength is at most this, instead of a fraction; a number or a mapping likewise.
        scope: "layer" ranks within each layer, "global" over all layers, so that each gets a share of its own.
        structure: "weight", "filter", "channel", "column" or "layer"; whole layers are ranked by the global scope, or
            pruned with a fraction of 1.
        norm: a structure's strength: mean |s| ("l1") or root mean square ("l2") of the scores s of its weights.
        scores: for each layer a tensor of its weight's shape; the weights themselves by default. See `gradient_scores`.
        skip: names of layers to leave as they are.

    Raises:
        ValueError: not exactly one of fraction and threshold; one out of range; unknown names; scores that do not fit
            or are not numbers; a mapping of fractions together with the global scope; a share of a layer as a whole.

    Source: magnitude: Han et al., arXiv:1506.02626. Filters: Li et al., arXiv:1608.08710.
    """
    if (fraction is None) == (threshold is None):
        raise ValueError(
            f"fraction is {fraction} and threshold is {threshold}: give exactly one of them, as the amount to prune"
        )
    if scope not in ("layer", "global"):
        raise ValueError(f"scope is {scope!r} but must be 'layer' or 'global'")
    layers = prunable(model, skip)
    amounts = amount_of_each(layers, fraction if threshold is None else threshold)
    strengths = {}
    for name in amounts:
        module = layers[name]
        values = _scores(name, module, scores)
        ranks = strength(module, values, structure, norm)
        gone = strength(module, kept(module).to(values.dtype), structure, "l1") == 0
        strengths[name] = torch.where(gone, -1, ranks)  # what is pruned stays pruned: below any strength
    if threshold is not None:
        for name, amount in amounts.items():
            if not amount >= 0:
                raise ValueError(f"the threshold for {name!r} is {amount} but must be 0 or more")
        drop = {name: ranks <= amounts[name] for name, ranks in strengths.items()}
    else:
        check_fractions(amounts, fraction, scope)
        if structure == "layer" and scope == "layer" and any(0 < amount < 1 for amount in amounts.values()):
            raise ValueError(
                f"structure 'layer' has one member in each layer, of which fraction {fraction} is no whole number: "
                "rank layers with scope='global', or choose one with fraction={name: 1.0}"
            )
        if scope == "global":
            drop = _weakest(strengths, next(iter(amounts.values())))
        else:
            drop = {}
            for name, ranks in strengths.items():
                drop |= _weakest({name: ranks}, amounts[name])
    for name, gone in drop.items():
        keep = masked(layers[name]).keep
        keep.logical_and_(~spread(layers[name], gone, keep))


def amount_of_each(layers: Mapping[str, nn.Module], amount: float | Mapping[str, float] | None) -> dict[str, float]:
    """One amount for each layer that is pruned.

    Raises:
        ValueError: a mapping names something that is no layer, or an amount is no number.
    """
    for each in amount.values() if isinstance(amount, Mapping) else (amount,):
        if each is not None and not isinstance(each, Real):
            raise ValueError(f"the amount to prune is {each!r} but must be a number, or a mapping of names to numbers")
    if isinstance(amount, Mapping):
        check_names(amount, layers)
        return {name: float(amount[name]) for name in layers if name in amount}
    return dict.fromkeys(layers, float(amount or 0.0))


def check_fractions(
    amounts: Mapping[str, float], fraction: float | Mapping[str, float] | None, scope: Scope = "layer"
) -> None:
    """See that fractions are shares, and that a global ranking has one only.

    Raises:
        ValueError: it is not so.
    """
    for name, amount in amounts.items():
        if not 0 <= amount <= 1:
            raise ValueError(f"the fraction to prune of {name!r} is {amount} but must be from 0 to 1")
    if scope == "global" and isinstance(fraction, Mapping):
        raise ValueError("scope 'global' ranks all layers together: give one fraction, not one a layer")


def gradient_scores(model: nn.Module, losses: Iterable[Tensor], skip: Collection[str] = ()) -> dict[str, Tensor]:
    """|w dE/dw| of every weight, averaged over batches: to first order, what removing it does to the loss.

    Args:
        model: its .grad fields stay as they are.
        losses: one scalar loss a batch, such as (loss(model(x), y) for x, y in batches); each is differentiated before
            the next is drawn. The mean is of absolute values, which stay apart from zero at a minimum of the loss.
        skip: names of layers to leave out.

    Returns:
        For each layer a tensor of its weight's shape, for `prune(..., scores=...)`.

    Raises:
        ValueError: no losses, or one that does not depend on some layer's weight.

    Source: Lee et al., arXiv:1810.02340 (connection sensitivity); Molchanov et al., arXiv:1906.10771 (first-order
        Taylor expansion).
    """
    layers = prunable(model, skip)
    stored = [stored_weight(module) for module in layers.values()]
    sums = [torch.zeros_like(weight) for weight in stored]
    batches = 0
    for loss in losses:
        for name, total, gradient in zip(
            layers, sums, torch.autograd.grad(loss, stored, allow_unused=True), strict=True
        ):
            if gradient is None:
                raise ValueError(f"the loss does not depend on the weight of {name!r}: skip that layer")
            total += gradient.abs()
        batches += 1
    if not batches:
        raise ValueError("there are no losses to differentiate: give at least one batch")
    # Stored value times its gradient: with scales on top it is still the running weight times that weight's gradient.
    return {
        name: weight.detach().abs() * total / batches for name, weight, total in zip(layers, stored, sums, strict=True)
    }


def _scores(name: str, module: nn.Module, scores: Mapping[str, Tensor] | None) -> Tensor:
    weight = effective_weight(module)
    values = weight
    if scores is not None:
        if name not in scores:
            raise ValueError(f"there are no scores for layer {name!r}: skip it, or give scores of its weight's shape")
        values = scores[name].detach().to(weight.device)
        if values.shape != weight.shape:
            raise ValueError(
                f"the scores of {name!r} have shape {tuple(values.shape)} but its weight has {tuple(weight.shape)}"
            )
    if not values.isfinite().all():
        raise ValueError(f"layer {name!r} has weights or scores that are infinite or not a number: they have no rank")
    return values


def _weakest(strengths: Mapping[str, Tensor], fraction: float) -> dict[str, Tensor]:
    """For each layer whether a structure is among the round(fraction * n) weakest of all n."""
    everything = torch.cat([ranks.flatten() for ranks in strengths.values()])
    drop = torch.zeros_like(everything, dtype=torch.bool)
    drop[everything.argsort(stable=True)[: round(fraction * len(everything))]] = True
    parts = torch.split(drop, [ranks.numel() for ranks in strengths.values()])
    return {name: part.view_as(strengths[name]) for name, part in zip(strengths, parts, strict=True)}
