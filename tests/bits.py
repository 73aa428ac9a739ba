"""Bits of given means, layers with drawn weights, and laws by writing down every outcome."""

from itertools import product

import numpy as np
import torch
from torch import nn

from qconv.binary_modules import PixelBits
from qconv.probabilistic import ProbabilisticBinaryConv2d, ProbabilisticBinaryLinear

DTYPES = {torch.float32: 2e-5, torch.float64: 1e-12}


def numbers(*shape, dtype=torch.float64, seed=0):
    """In [-1, 1]."""
    return (2 * torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 1).to(dtype)


def drawn(layer, seed=0):
    with torch.no_grad():
        for k, p in enumerate(layer.parameters()):
            p.copy_(2 * numbers(*p.shape, seed=seed + k))
    return layer


def enumerated(means):
    """Law of a sum of -1s and +1s by writing down every outcome: {value: probability}."""
    law = dict.fromkeys(range(-len(means), len(means) + 1, 2), 0.0)
    for bits in product((-1, 1), repeat=len(means)):
        law[sum(bits)] += np.prod([(1 + s * m) / 2 for s, m in zip(bits, means, strict=True)])
    return law


def network(output="activation", **options):
    torch.manual_seed(0)
    return nn.Sequential(
        PixelBits(),
        ProbabilisticBinaryConv2d(1, 4, 3, stride=2, output=output, **options),
        nn.Flatten(),
        ProbabilisticBinaryLinear(36, 3, output="mean", gamma=3.0, **options),
    )
