"""Weights that are bits: random ones by their means, and hard ones, fixed at -1, +1 or 0; and a state_dict of both."""

from __future__ import annotations

from math import inf, nan
from typing import Any

import torch
from torch import Tensor, nn

from circuits.naming import unknown
from qconv.binary_laws import binary_concrete, sign

MODES = ("map", "ternary", "sample")

_CERTAIN = 20.0  # tanh(20) is exactly 1, in float64 too


class BinaryWeights(nn.Module):
    """What layers of binary weights know of them; `weight` is real, and tanh(weight) the mean of a weight's bit.

    A hard layer has weights fixed and gives signs: another function of the same numbers. Its state_dict therefore has
    the entries "hard" and "bits_in", and loading makes a layer hard, or an ordinary one again, as the one saved.

    Attributes:
        hard: Whether weights are fixed.
        bits_in: Whether inputs of a hard layer are bits too, as those from another hard layer; counts alone read it.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    hard: bool = False
    bits_in: bool = False

    def theta(self) -> Tensor:
        """Means of the weights' bits, of weight's shape."""
        return torch.tanh(self.weight)

    def reset_parameters(self) -> None:
        """Draw new weights from torch's global generator: N(0, 1/2) before the tanh; biases 0. No longer hard."""
        self.set_hard(False)
        with torch.no_grad():
            self.weight.normal_(0, 0.5)
            if self.bias is not None:
                self.bias.zero_()

    def init_from(self, weight: Tensor) -> None:
        """Start from the weights of a trained real layer: theta = w / std(w), clipped to [-0.9, 0.9].

        Raises:
            ValueError: For something else than a tensor, another shape, or weights without a standard deviation above
                0.

        Source: Peters & Welling, Probabilistic Binary Neural Networks (arXiv:1809.03368), section 4.3.
        """
        if not isinstance(weight, Tensor):
            raise ValueError(
                f"weight is a {type(weight).__name__}: give the torch.Tensor of a trained layer's weights, such as "
                f"layer.weight, of shape {tuple(self.weight.shape)}"
            )
        if weight.shape != self.weight.shape:
            raise ValueError(f"weight has shape {tuple(weight.shape)} but the layer {tuple(self.weight.shape)}")
        weight = weight.detach()
        deviation = float(weight.double().std()) if weight.numel() > 1 else nan
        # Rounding gives equal numbers a deviation too.
        if not 1e-12 * float(weight.abs().max()) < deviation < inf:
            raise ValueError(
                f"weight of shape {tuple(weight.shape)} has standard deviation {deviation}, by which it would be "
                "divided: give finite weights that are not all equal"
            )
        self.set_hard(False)
        with torch.no_grad():
            self.weight.copy_(torch.atanh((weight / deviation).clamp(-0.9, 0.9)))

    def check_hardenable(self) -> None:
        """Raise a ValueError where fixed weights would not make a layer of bits."""

    def binarize_(self, mode: str = "map", generator: torch.Generator | None = None) -> None:
        """Fix each weight at -1 or +1 (or 0), and outputs at the sign of the pre-activation; see `binarize`."""
        if mode not in MODES:
            raise unknown("mode", mode, MODES)
        self.check_hardenable()
        theta = self.theta().detach()
        if mode == "sample":
            bits = binary_concrete(theta, generator=generator)
        elif mode == "map":
            bits = sign(theta)
        else:
            # The likelier value, if its probability (1 + |theta|) / 2 is 3/4 or more.
            bits = torch.where(theta.abs() >= 0.5, sign(theta), 0.0)
        with torch.no_grad():
            self.weight.copy_(_CERTAIN * bits)
        self.set_hard(True)

    def set_hard(self, hard: bool, bits_in: bool = False) -> None:
        """Freeze weights and bias and give signs, or release what was frozen."""
        if hard != self.hard:
            for parameter in (self.weight, self.bias):
                if parameter is not None:
                    parameter.requires_grad_(not hard)
        self.hard, self.bits_in = hard, hard and bits_in

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.hard:
            for name in ("hard", "bits_in"):
                destination[prefix + name] = torch.tensor(getattr(self, name), device="cpu")

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        # Taken out before torch looks for entries that it does not know; it hands every module a copy of the dict.
        marks: list[Tensor | None] = [state_dict.pop(prefix + name, None) for name in ("hard", "bits_in")]
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if prefix + "weight" not in state_dict:
            return
        # On "meta" a mark has no value, but only hard layers write any.
        hard, bits_in = (mark is not None and (mark.is_meta or bool(mark)) for mark in marks)
        errors: list[str] = rest[-1]
        try:
            if hard:
                self.check_hardenable()
            self.set_hard(hard, bits_in)
        except ValueError as error:
            errors.append(f"{prefix}hard is True in the state, but {error}")
