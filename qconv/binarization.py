"""Networks of weights -1 and +1 from networks of probabilistic binary layers, one or many averaged."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Sequence
from math import log
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from qconv.binary_laws import Moments, handed_on, operations
from qconv.binary_modules import StochasticBatchNorm1d, StochasticBatchNorm2d
from qconv.binary_neurons import BinaryNeurons
from qconv.patches import whole

Model = TypeVar("Model", bound=nn.Module)

# Functions as the arithmetic that computes them, as in Cephes' expf (which qconv.energy prices likewise) and logf.
_EXP = Counter(mul=10, add=10)
_LOG = Counter(mul=14, add=13, cmp=1)


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


class MeanProbabilities(nn.Module):
    """Scores of several classifiers -> the logarithm of the mean of their class probabilities."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.n = n

    def forward(self, scores: Sequence[Tensor]) -> Tensor:
        """n times (B, classes) -> (B, classes)."""
        logarithms = torch.stack([torch.log_softmax(member, dim=-1) for member in scores])
        return torch.logsumexp(logarithms, dim=0) - log(self.n)

    def counts(self, input_shape: tuple[int, ...]) -> Counter[str]:
        """Operations of one inference.

        Args:
            input_shape: Of one classifier's scores, (classes,).
        """
        classes = input_shape[-1]
        # Of each classifier: the largest score, differences to it, their exponentials, a logarithm to subtract.
        softmax = _many(classes, _EXP) + _LOG + Counter(cmp=classes - 1, add=3 * classes - 1)
        # Of each class, over classifiers: likewise, and the largest is added again, less log n.
        mean = _many(self.n, _EXP) + _LOG + Counter(cmp=self.n - 1, add=2 * self.n + 1)
        return operations(1, _many(self.n, softmax) + _many(classes, mean)) + handed_on(classes)


def _many(times: int, cost: Counter[str]) -> Counter[str]:
    return Counter({name: times * amount for name, amount in cost.items()})


class Ensemble(nn.Module):
    """Classifiers averaged: the logarithm of the mean of their class probabilities.

    The ledger (`qconv.energy.count`) has a row for each layer of each member, and one for the average.

    Args:
        members: Classifiers of the same input, giving scores (B, classes); at least one.
    """

    def __init__(self, members: Iterable[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        if not len(self.members):
            raise ValueError("members are empty: give at least 1 classifier to average")
        self.average = MeanProbabilities(len(self.members))

    def forward(self, images: Tensor) -> Tensor:
        """What each member takes -> log-probabilities (B, classes)."""
        result: Tensor = self.average([member(images) for member in self.members])
        return result


def ensemble(model: nn.Module, n: int, generator: torch.Generator | None = None) -> Ensemble:
    """Average `n` networks with drawn binary weights; see `binarize`.

    Each draw has statistics of its own: `reestimate` fits the norms of all members at once.
    """
    return Ensemble(binarize(model, "sample", generator) for _ in range(whole(n, "n", 1)))


def reestimate(model: nn.Module, batches: Iterable[Tensor | Sequence[Tensor]]) -> None:
    """Replace the running statistics of a model's batch norms by their average over batches, in place.

    The rest of the model computes as in eval(): what was trained with drawn weights or noise has other statistics
    without. Weights stay, and so do the modes of modules; after an error the statistics are what they were. Some 20
    batches serve a network with drawn weights.

    Args:
        model: Called on each batch.
        batches: Inputs, or sequences that begin with them, such as (images, labels).

    Raises:
        ValueError: For a model without norms that keep running statistics, stochastic or torch's, or no batches.
    """
    kinds = (StochasticBatchNorm1d, StochasticBatchNorm2d, _BatchNorm)
    norms = [m for m in model.modules() if isinstance(m, kinds) and m.running_mean is not None]
    if not norms:
        raise ValueError("model has 0 batch norms with running statistics: there is nothing to estimate")
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
