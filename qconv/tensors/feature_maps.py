"""Local feature maps: a pixel becomes a small vector, and a patch the tensor product of such vectors."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import isfinite, pi
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from circuits.naming import unknown
from qconv.backends.contraction import SINCOS_MULTIPLICATIONS
from qconv.patches import whole

FEATURE_MAPS = ("cos_sin", "one_cos_sin", "polynomial", "sin2_cos2", "identity")


class Moments(NamedTuple):
    """What a feature map's vector looks like for independent uniform inputs, in float64.

    `constant` is the functional u with u.phi as close to 1 as the features allow and mean 1; `frame` (d, d) has it as
    row 0, and below it functionals whose values have mean 0 and variance about 1. `spread` is the trace of phi's
    covariance, and `second` (d, d) the mean of phi phi^T. `heavy` says that products of many features have tails that
    samples miss.
    """

    mean: Tensor
    spread: float
    constant: Tensor
    frame: Tensor
    second: Tensor
    heavy: bool


@dataclass(frozen=True)
class FeatureMap:
    """A map x -> phi(x) of the c numbers at one site; functions of several numbers stand side by side.

    Args:
        name: "cos_sin": [cos(pi x / 2), sin(pi x / 2)]; "one_cos_sin": [1, cos(pi x), sin(pi x)]; "polynomial":
            [1, x, ..., x^degree]; "sin2_cos2": scale [sin^2(pi x / 2), cos^2(pi x / 2)]; "identity": the numbers
            themselves, without a constant: outputs are sums of products of one number from every site. They vanish
            on black patches and have heavy tails (at 15 sites a variance measured on some thousand random patches is
            off by a factor of 2), and with one number a site they are the product of all pixels times a factor, of
            mean above 0. Of several numbers the constant 1 is kept once: [1, x_1, ..., x_c, x_1^2, ...].
        degree: Highest power of "polynomial", at least 1; the others ignore it.
        scale: Factor nu of "sin2_cos2", above 0; the others ignore it.

    Raises:
        ValueError: For an unknown name or a number out of range.

    Source: Stoudenmire & Schwab (arXiv:1605.05775), equation 3 (cos_sin); Blagoveschensky & Phan (arXiv:2005.14506)
        (sin2_cos2).
    """

    name: str = "cos_sin"
    degree: int = 2
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.name not in FEATURE_MAPS:
            raise unknown("feature_map", self.name, FEATURE_MAPS)
        whole(self.degree, "degree", 1)
        if not (isfinite(self.scale) and self.scale > 0):
            raise ValueError(f"scale is {self.scale}: give a number above 0")

    def size(self, numbers: int) -> int:
        """Dimension of the vector of `numbers` numbers."""
        return {
            "cos_sin": 2 * numbers,
            "one_cos_sin": 1 + 2 * numbers,
            "polynomial": 1 + self.degree * numbers,
            "sin2_cos2": 2 * numbers,
            "identity": numbers,
        }[self.name]

    def __call__(self, x: Tensor) -> Tensor:
        """Map the numbers on axis 1: (groups, numbers, ...) -> (groups, size(numbers), ...)."""
        if self.name == "identity":
            return x
        if self.name == "polynomial":
            powers = [torch.ones_like(x[:, :1]), x]
            for _ in range(1, self.degree):
                powers.append(powers[-1] * x)
            return torch.cat(powers, 1)
        if self.name == "sin2_cos2":
            # By the double angle: one cosine instead of a sine and a cosine.
            half = (0.5 * self.scale) * torch.cos(pi * x)
            return torch.cat((0.5 * self.scale - half, 0.5 * self.scale + half), 1)
        angles = x * (pi / 2 if self.name == "cos_sin" else pi)
        waves = [torch.cos(angles), torch.sin(angles)]
        return torch.cat(waves if self.name == "cos_sin" else [torch.ones_like(x[:, :1]), *waves], 1)

    def counts(self, numbers: int) -> Counter[str]:
        """Operations of mapping that many numbers; a sine and cosine together are one polynomial evaluation."""
        if self.name == "identity":
            return Counter()
        if self.name == "polynomial":
            return Counter({"mul:fp32": (self.degree - 1) * numbers})
        extra = 2 if self.name == "sin2_cos2" else 0
        each = SINCOS_MULTIPLICATIONS * numbers
        return Counter({"mul:fp32": each + (1 + extra // 2) * numbers, "add:fp32": each + extra * numbers})

    def moments(self, numbers: int) -> Moments:
        """Mean and frame of the vector of `numbers` independent numbers, uniform on [0, 1]."""
        # Gauss-Legendre: exact to rounding for these smooth functions.
        nodes, weights = np.polynomial.legendre.leggauss(32 + self.degree)
        chances = torch.from_numpy(weights / 2)
        values = self(torch.from_numpy((nodes + 1) / 2)[None, None])[0]
        mean = values @ chances
        covariance = (values - mean[:, None]) * chances @ (values - mean[:, None]).T
        shared = 1 if self.name in ("one_cos_sin", "polynomial") else 0
        ones = torch.ones(numbers, dtype=mean.dtype)
        mean = torch.cat((mean[:shared], torch.kron(mean[shared:], ones)))
        size = len(mean)
        full = torch.zeros(size, size, dtype=mean.dtype)
        full[shared:, shared:] = torch.kron(covariance[shared:, shared:], torch.diag(ones))
        constant = torch.linalg.pinv(full + torch.outer(mean, mean), hermitian=True) @ mean
        constant = constant / (constant @ mean)
        variances, directions = torch.linalg.eigh(full)
        # The directions of least variance are left out or damped: dividing by it would only amplify them.
        damped = variances.clamp(min=5e-2 * float(variances[-1])).rsqrt()
        rest = (directions * damped).T.flip(0)[: size - 1]
        rest = rest - torch.outer(rest @ mean, constant)
        frame = torch.cat((constant[None], rest))
        second = full + torch.outer(mean, mean)
        return Moments(mean, float(variances.sum()), constant, frame, second, self.name == "identity")
