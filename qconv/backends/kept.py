"""What inference builds from the weights, kept from call to call."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

_MOST = 256
_BYTES = 64 * 1024**2  # of results that are kept; at least one is


class Kept:
    """A function of the weights, remembered where no derivative is taken.

    Weights are found again by their values, so no way of changing them in place can make a result stale.

    Args:
        build: weights -> tensor.
    """

    def __init__(self, build: Callable[[Tensor], Tensor]) -> None:
        self._build = build
        self._results: dict[tuple[object, ...], Tensor] = {}

    def __call__(self, weights: Tensor) -> Tensor:
        """The function's value."""
        if (
            (weights.requires_grad and torch.is_grad_enabled())
            or torch.compiler.is_compiling()
            or torch._C._are_functorch_transforms_active()
            or type(weights) not in (Tensor, torch.nn.Parameter)
            or weights.is_meta
            or unpack_dual(weights).tangent is not None  # type: ignore[no-untyped-call]
        ):
            return self._build(weights)
        values = weights.detach().cpu().numpy().tobytes()
        # The shape tells filters without weights apart; what inference_mode made must not reach training.
        key = (values, weights.shape, weights.dtype, weights.device, torch.is_inference_mode_enabled())
        found = self._results.get(key)
        if found is None:
            found = self._build(weights.detach())
            # A new dictionary, so that other threads never see one change. Groups have weights each: many are kept.
            most = max(1, _BYTES // max(1, found.numel() * found.element_size()))
            self._results = dict([*list(self._results.items()), (key, found)][-min(most, _MOST) :])
        return found
