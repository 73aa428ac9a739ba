"""Relaxed quantization: rounding of noisy values, relaxed to a differentiable random choice among grid points."""

import math

import torch
from torch import Tensor, nn

from classical.quantizers.affine import LearnedStep
from classical.quantizers.base import Codes, Role, passing, straight_through, wide

_FAR = 30.0  # spreads of the noise


class RelaxedQuantizer(LearnedStep):
    """Rounding to a grid of learned step a after noise of learned spread s, made differentiable.

    With logistic noise, x rounds to the grid point g with probability
        sigmoid((g + a/2 - x) / s) - sigmoid((g - a/2 - x) / s),
    normalized over the points in reach. In train() a relaxed one-hot choice among them is drawn (the concrete, or
    Gumbel-softmax, distribution) and the points are averaged with it; everything is differentiated. `hard` quantizes
    to the chosen point, and only the choice passes its relaxed gradient straight through (RQ-ST). In eval() x is
    rounded to the nearest point; no noise, and the gradient passes inside the grid. Batch norms have to average their
    statistics again without the noise before a trained network is used: theirs are of noisy values.

    Noise is drawn from torch's global generator. The step is used by its absolute value; the spread is
    a exp(log_noise), positive too, and starts at a third of the step.

    Args:
        bits, role, signed: see LearnedStep.
        hard: RQ-ST instead of RQ.
        temperature: of the relaxed choice; towards 0 it becomes a hard one. By default 1 for RQ-ST, and 1/4 for RQ,
            whose averages are the less like the rounding in eval() the higher it is.
        window: how many of the nearest grid points are in reach, whole grids that have no more.

    Raises:
        ValueError: bits out of range, a temperature that is not positive, a window below 2.

    Source: Louizos et al., arXiv:1810.01875, section 2; straight-through choice: Jang et al.,
    arXiv:1611.01144, section 2.2. The window of fixed size and the spread in steps are our choice.
    """

    def __init__(
        self,
        bits: int = 4,
        role: Role = "weight",
        signed: bool | None = None,
        hard: bool = False,
        temperature: float | None = None,
        window: int = 3,
    ) -> None:
        if temperature is None:
            temperature = 1.0 if hard else 0.25
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature} but must be positive")
        if window < 2:
            raise ValueError(f"the window has {window} grid points but a choice needs at least 2")
        super().__init__(f"rq_st{bits}" if hard else f"rq{bits}", bits, role, signed)
        self.hard = hard
        self.temperature = temperature
        self.window = min(window, len(self.grid))
        self.log_noise = nn.Parameter(torch.tensor(math.log(1 / 3)))

    def choice(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """The points in reach of positions, in steps, and the probabilities of rounding to them.

        Returns:
            Points and probabilities up to a common factor, both of shape (window, *position.shape).
        """
        noise = torch.exp(wide(self.log_noise))
        # So far beyond the grid the shares of its points no longer change, and none underflows.
        far = _FAR * noise.detach()
        position = position.clamp(self.grid[0] - far, self.grid[-1] + far)
        first = (position.detach() - self.window / 2).ceil().clamp(self.grid[0], self.grid[-1] + 1 - self.window)
        offsets = torch.arange(self.window, dtype=position.dtype, device=position.device)
        points = first + offsets.reshape(-1, *[1] * position.dim())
        ahead = (points - position) / noise
        half = 0.5 / noise
        # sigmoid(u) - sigmoid(v) = sigmoid(u) sigmoid(-v) (1 - exp(v - u)), and u - v is the same for all points.
        return points, torch.sigmoid(half + ahead) * torch.sigmoid(half - ahead)

    def forward(self, x: Tensor) -> Tensor:
        """Quantize x: a random choice in train(), rounding in eval()."""
        if not self.training:
            return super().forward(x)
        if not self._fitted:
            self.fit(x)
        step = self.scale(x)
        points, chances = self.choice(wide(x) / step)
        # exp(logit + Gumbel noise) is the probability over an exponential number, -log(uniform).
        raced = chances / -torch.rand_like(chances).log()
        largest = raced.detach().amax(0)
        weights = raced / largest
        if self.temperature != 1:
            # Roots have no slope at 0.
            weights = weights.clamp(min=torch.finfo(weights.dtype).tiny) ** (1 / self.temperature)
        chosen = (weights * points).sum(0) / weights.sum(0)
        if self.hard:
            # The largest point whose weight is the largest: argmax over the first axis is very slow.
            place = (raced.detach() == largest) * (points - points[0])
            chosen = straight_through(points[0] + place.amax(0), chosen)
        return (chosen * step).to(x.dtype)

    def surrogate(self, x: Tensor, stated: Codes) -> Tensor:
        """x clipped to what rounds to a grid point."""
        step = stated.scale.detach().to(x.dtype)
        return passing(x / step, self.grid[0] - 0.5, self.grid[-1] + 0.5) * step

    def constants(self, weight: Tensor) -> int:
        """One step."""
        return 1
