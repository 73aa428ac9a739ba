"""Networks of weights -1 and +1 from networks of probabilistic binary layers, one or many averaged."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from math import log
from typing import TypeVar

import torch
from torch import Tensor, nn

from qconv.binary_laws import Moments
from qconv.binary_modules import StochasticBatchNorm1d, StochasticBatchNorm2d
from qconv.patches import whole
from qconv.probabilistic import BinaryNeurons

Model = TypeVar("Model", bound=nn.Module)


def binarize(model: Model, mode: str = "map", generator: torch.Generator | None = None) -> Model:
    """A copy of a model whose binary layers have weights of exactly -1 and +1, and give signs.

    Its inputs and the norms' statistics stay; `reestimate` fits the latter to the drawn weights. In the order of
    `model.modules()`, each layer's inputs are counted as bits where the layer before gives signs or is followed by a
    BinaryActivation; the first one's are not. In a network that branches, set `bits_in` of its layers yourself.

    Args:
        model: With ProbabilisticBinary layers, or QuantumDeformed ones without deformation.
        mode: "map": the likelier value. "ternary": that, or 0 where its probability is below 3/4. "sample": a draw.
        generator: Source of the draws; None for torch's global one.

    Raises:
        ValueError: For an unknown mode, or a model without such layers.

    Source: Peters & Welling, Probabilistic Binary Neural Networks (arXiv:1809.03368), section 5.
    """
    result = copy.deepcopy(model)
    layers = [module for module in result.modules() if isinstance(module, BinaryNeurons)]
    if not layers:
        raise ValueError("model has 0 probabilistic binary layers: there is nothing to binarize")
    bits = False
    for layer in layers:
        layer.binarize_(mode, generator)
        layer.set_hard(True, bits_in=bits)
        bits = layer.output != "mean"
    return result


class Ensemble(nn.Module):
    """Classifiers averaged: the logarithm of the mean of their class probabilities."""

    def __init__(self, members: Iterable[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, images: Tensor) -> Tensor:
        """What each member takes -> log-probabilities (B, classes)."""
        scores = torch.stack([torch.log_softmax(member(images), dim=-1) for member in self.members])
        return torch.logsumexp(scores, dim=0) - log(len(self.members))


def ensemble(model: nn.Module, n: int, generator: torch.Generator | None = None) -> Ensemble:
    """Average `n` networks with drawn binary weights; see `binarize`."""
    return Ensemble(binarize(model, "sample", generator) for _ in range(whole(n, "n", 1)))


def reestimate(model: nn.Module, batches: Iterable[Tensor | Sequence[Tensor]]) -> None:
    """Replace the running statistics of a model's stochastic norms by their average over batches, in place.

    Weights stay, and so do the modes of modules; after an error the statistics are what they were. Some 20 batches
    serve a network with drawn weights.

    Args:
        model: Called on each batch.
        batches: Inputs, or sequences that begin with them, such as (images, labels).

    Raises:
        ValueError: For a model without stochastic norms, or no batches.
    """
    norms = [m for m in model.modules() if isinstance(m, StochasticBatchNorm1d | StochasticBatchNorm2d)]
    if not norms:
        raise ValueError("model has 0 stochastic batch norms: there are no statistics to estimate")
    modes = [(module, module.training) for module in model.modules()]
    before = [(norm, norm.momentum, [buffer.clone() for buffer in norm.buffers()]) for norm in norms]
    model.eval()
    seen = 0
    try:
        for norm in norms:
            norm.train()
            norm.momentum = None
            norm.reset_running_stats()
        with torch.no_grad():
            for batch in batches:
                pair = isinstance(batch, tuple | list) and not isinstance(batch, Moments)
                model(batch[0] if pair else batch)
                seen += 1
        if not seen:
            raise ValueError("batches are empty: give at least 1")
    except BaseException:
        for norm, _, buffers in before:
            for buffer, old in zip(norm.buffers(), buffers, strict=True):
                buffer.copy_(old)
        raise
    finally:
        for module, mode in modes:
            module.training = mode
        for norm, momentum, _ in before:
            norm.momentum = momentum
