"""Parameterized structured pruning: every structure of a weight has a trained scale, and small scales are zero."""

from collections.abc import Callable, Collection, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from classical.pruning.masks import Pruning, effective_weight, prunable
from classical.pruning.structures import Structure, by_groups, structure_shape
from classical.quantizers import straight_through


class StructureScale(Pruning):
    """q = w alpha(v), one alpha a structure: alpha = v where |v| >= epsilon, else 0.

    The forward pass multiplies by the sparse alpha; the dense v gets alpha's gradient straight through, the sum of
    w dE/dq over the structure, so a structure that is zero can come back.

    Args:
        module: whose weight is scaled.
        structure: "filter", "channel", "column", "layer", or "weight".
        epsilon: threshold on |v|, above 0.
        initial: value of every v; 1 leaves the function as it is.

    Source: Schindler et al., arXiv:1906.05180; straight through: Bengio et al., arXiv:1308.3432.
    """

    def __init__(self, module: nn.Module, structure: Structure, epsilon: float, initial: float) -> None:
        super().__init__()
        weight = effective_weight(module)
        self.epsilon = epsilon
        self.groups = len(by_groups(module, weight))
        self.dense = nn.Parameter(weight.new_full(structure_shape(module, weight, structure), initial))

    @property
    def alpha(self) -> Tensor:
        """The sparse scales that run; their gradient goes to `dense`."""
        return straight_through(torch.where(self.dense.abs() >= self.epsilon, self.dense, 0), self.dense)

    def forward(self, weight: Tensor) -> Tensor:
        """The scaled weight."""
        grouped = weight.reshape(self.groups, len(weight) // self.groups, *weight.shape[1:])
        return (grouped * self.alpha).reshape(weight.shape)

    def extra_repr(self) -> str:
        """Show the number of structures and the threshold."""
        return f"{self.dense.numel()}, epsilon={self.epsilon}"


def add_structures(
    model: nn.Module,
    structure: Structure = "filter",
    *,
    epsilon: float = 0.1,
    initial: float = 1.0,
    skip: Collection[str] = (),
) -> list[nn.Parameter]:
    """Give every structure of a model's weights a trained scale; `finalize` writes the scales into the weights.

    Train the returned parameters with a StructureSGD beside the optimizer of the weights, whose weight decay should not
    reach them. Fixed thresholds and scales that weights can undo make the two learning rates matter; the decay, not the
    threshold, sets how much is pruned. With rule "l1" a scale of 1 that no loss needs falls below epsilon after about
    (1 - epsilon) (1 - momentum) / (lr decay) steps: choose a decay that makes this a half to a sixth of the training.

    Args:
        model: changed in place.
        structure: "filter", "channel", "column", "layer", or "weight".
        epsilon: scales below it in size are zero in the forward pass, above 0.
        initial: scale at the start, at least epsilon in size so that nothing starts pruned.
        skip: names of layers to leave as they are.

    Returns:
        The dense scales v, one tensor a layer.

    Raises:
        ValueError: an argument is out of range, or a layer has such scales already.

    Source: Schindler et al., arXiv:1906.05180.
    """
    if not 0 < epsilon <= abs(initial):
        raise ValueError(f"epsilon is {epsilon} but must be above 0 and at most the initial scale {abs(initial)}")
    layers = prunable(model, skip)
    for name, module in layers.items():
        if any(isinstance(part, StructureScale) for part in module.modules()):
            raise ValueError(f"layer {name!r} has scales of its structures already: finalize the model first")
    scales = {name: StructureScale(module, structure, epsilon, initial) for name, module in layers.items()}
    for name, scale in scales.items():
        parametrize.register_parametrization(layers[name], "weight", scale)
    return [scale.dense for scale in scales.values()]


def structure_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The dense scales v of a model: what StructureSGD moves and other optimizers leave out."""
    return [module.dense for module in model.modules() if isinstance(module, StructureScale)]


class StructureSGD(torch.optim.Optimizer):
    """Gradient descent with momentum and decay, on the dense scales: v += D, D = mu D - eta dE/dalpha - lambda eta r.

    r is v (rule "l2", weight decay) or sign v (rule "l1"). The momentum D contains the learning rate, unlike that of
    torch.optim.SGD: with rule "l2" the two agree while the rate is constant.

    Args:
        params: from `add_structures` or `structure_parameters`.
        lr: eta, above 0.
        momentum: mu, in [0, 1).
        decay: lambda, from 0.
        rule: "l2" or "l1".

    Raises:
        ValueError: an argument is out of range.

    Source: Schindler et al., arXiv:1906.05180, the update with weight decay and that with L1 regularization.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        *,
        momentum: float = 0.9,
        decay: float = 1e-4,
        rule: Literal["l2", "l1"] = "l2",
    ) -> None:
        if not lr > 0 or not 0 <= momentum < 1 or not decay >= 0:
            raise ValueError(
                f"lr={lr}, momentum={momentum}, decay={decay}, but lr must be above 0, momentum from 0 to below 1, "
                "decay from 0"
            )
        if rule not in ("l2", "l1"):
            raise ValueError(f"rule is {rule!r} but must be 'l2' or 'l1'")
        super().__init__(params, {"lr": lr, "momentum": momentum, "decay": decay, "rule": rule})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Move every scale that has a gradient.

        Args:
            closure: computes loss and gradients anew, as torch's optimizers allow; called first.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            lr, decay = group["lr"], group["decay"]
            for scale in group["params"]:
                if scale.grad is None:
                    continue
                state = self.state[scale]
                if not state:
                    state["change"] = torch.zeros_like(scale)
                pull = scale if group["rule"] == "l2" else scale.sign()
                change: Tensor = state["change"]
                change.mul_(group["momentum"]).sub_(scale.grad, alpha=lr).sub_(pull, alpha=lr * decay)
                scale.add_(change)
        return loss
