"""Pruning while training: how much at which step, and an object that a training loop calls."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from classical.checks import real, whole
from classical.pruning.magnitude import Scope, amount_of_each, check_fractions, prune
from classical.pruning.masks import masked, prunable, stored_weight
from classical.pruning.structures import Norm, Structure


@dataclass(frozen=True)
class CubicSchedule:
    """Much pruning at first, little in the end: progress 1 - (1 - (t - t0) / (n dt))^3 at t0, t0 + dt, ..., t0 + n dt.

    With it the sparsity is s_t = s_f + (s_i - s_f) (1 - (t - t0) / (n dt))^3, from s_i (initial) to s_f (final).

    Args:
        begin: t0, the training step of the first pruning, from 0; the sparsity is then the initial one.
        every: dt, steps between prunings, from 1; the weights recover in between.
        times: n, prunings after the first, from 1.

    Raises:
        ValueError: an argument is out of range or no whole number.

    Source: Zhu, Gupta, arXiv:1710.01878, equation 1.
    """

    begin: int
    every: int
    times: int

    def __post_init__(self) -> None:
        if not (whole(self.begin, 0) and whole(self.every, 1) and whole(self.times, 1)):
            raise ValueError(
                "a schedule begins at step 0 or later, prunes every 1 or more steps, 1 or more times, whole numbers, "
                f"but begin={self.begin!r}, every={self.every!r}, times={self.times!r}"
            )

    def __call__(self, step: int) -> float | None:
        """Progress in [0, 1] after `step` training steps, constant between prunings; None before the first."""
        if step < self.begin:
            return None
        done = min((step - self.begin) // self.every, self.times)
        return 1 - (1 - done / self.times) ** 3


class MagnitudePruner:
    """Prunes the weakest weights step by step while a model trains.

    Call `step()` after every optimizer.step(). Masks are laid on at once, empty, so that the model's state_dict has the
    same keys from beginning to end. Register an optimizer before or after: the parameters stay the same objects, though
    model.parameters() lists them in another order, so a resumed run builds the two in the order of the first run.

    To go on after an interruption, save the state_dicts of model, optimizer and pruner, build the three anew in the
    same order and load them.

    Args:
        model: changed in place.
        final: share of pruned weights (structures) in the end, 0 to 1; a mapping from layer names prunes those only.
        schedule: maps the number of training steps done to progress from 0 (initial) to 1 (final), None before it
            begins, constant between prunings: a CubicSchedule, or for one shot `lambda step: float(step >= 1000)`.
        initial: share at progress 0.
        score: "magnitude" ranks by |w|, "gradient" by |w| times the mean |dE/dw| of the steps since the last pruning.
        scope, structure, norm, skip: as for `prune`.

    Raises:
        ValueError: an argument is out of range or names no layer.

    Source: Zhu, Gupta, arXiv:1710.01878.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        final: float | Mapping[str, float],
        schedule: Callable[[int], float | None],
        initial: float = 0.0,
        score: Literal["magnitude", "gradient"] = "magnitude",
        scope: Scope = "layer",
        structure: Structure = "weight",
        norm: Norm = "l1",
        skip: Collection[str] = (),
    ) -> None:
        if score not in ("magnitude", "gradient"):
            raise ValueError(f"score is {score!r} but must be 'magnitude' or 'gradient'")
        if not callable(schedule):
            raise ValueError(f"schedule is {schedule!r} but must be a function of the step, such as a CubicSchedule")
        if structure == "layer" and scope == "layer":
            raise ValueError("structure 'layer' has one member in each layer: rank layers with scope='global'")
        layers = prunable(model, skip)
        self.final = amount_of_each(layers, final)
        check_fractions(self.final, final, scope)
        if not real(initial, 0, min(self.final.values(), default=1.0)):
            raise ValueError(f"initial is {initial!r} but must be from 0 to the final fraction {final}")
        self.model = model
        self.schedule = schedule
        self.initial = initial
        self.score = score
        self._layers = {name: layers[name] for name in self.final}
        self._skip = skip
        self._scope: Scope = scope
        self._structure: Structure = structure
        self._norm: Norm = norm
        self.steps = 0
        self.progress: float | None = None
        for module in self._layers.values():
            masked(module)
        self._gradients = self._no_gradients()
        self._prune()  # prunes nothing, but refuses a structure or a norm at once

    def step(self) -> bool:
        """Count one training step, and prune if it is time to.

        Returns:
            Whether this step pruned.

        Raises:
            ValueError: by score "gradient", a weight has no .grad: zero_grad() came before.
        """
        self.steps += 1
        if self.score == "gradient":
            for name, module in self._layers.items():
                gradient = stored_weight(module).grad
                if gradient is None:
                    raise ValueError(
                        f"the weight of {name!r} has no gradient: call step() between backward() and zero_grad()"
                    )
                self._gradients[name] += gradient.abs()
        progress = self.schedule(self.steps)
        if progress is None or progress == self.progress:
            return False
        self.progress = progress
        if not progress and not self.initial:  # it begins with nothing to prune
            return False
        self._prune()
        self._gradients = self._no_gradients()
        return True

    def target(self, name: str) -> float:
        """Share of one layer's weights (of all, if the scope is global) that the present progress asks for."""
        if self.progress is None:
            return 0.0
        return self.initial + (self.final[name] - self.initial) * self.progress

    def state_dict(self) -> dict[str, Any]:
        """Everything that `load_state_dict` needs: steps, progress, masks and summed gradients."""
        return {
            "steps": self.steps,
            "progress": self.progress,
            "masks": {name: masked(module).keep.clone() for name, module in self._layers.items()},
            "gradients": {name: total.clone() for name, total in self._gradients.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state; also sets the model's masks.

        Raises:
            ValueError: the state is of another pruner or another model; nothing is changed then.
        """
        keys = {"steps", "progress", "masks", "gradients"}
        if set(state) != keys:
            raise ValueError(f"a pruner's state has {sorted(keys)} but this one has {sorted(state)}")
        for part, own in (("masks", self._layers), ("gradients", self._gradients)):
            if set(state[part]) != set(own):
                raise ValueError(f"the state has {part} of {sorted(state[part])} but this pruner of {sorted(own)}")
            for name, tensor in state[part].items():
                shape = masked(self._layers[name]).keep.shape
                if tensor.shape != shape:
                    raise ValueError(
                        f"the {part} of {name!r} have shape {tuple(tensor.shape)} but its weight {tuple(shape)}"
                    )
        self.steps = int(state["steps"])
        self.progress = state["progress"]
        for name, module in self._layers.items():
            masked(module).keep.copy_(state["masks"][name])
        for name, total in self._gradients.items():
            total.copy_(state["gradients"][name])

    def _no_gradients(self) -> dict[str, Tensor]:
        if self.score == "magnitude":
            return {}
        return {name: torch.zeros_like(stored_weight(module)) for name, module in self._layers.items()}

    @torch.no_grad()
    def _prune(self) -> None:
        scores = None
        if self.score == "gradient":
            scores = {name: stored_weight(m).abs() * self._gradients[name] for name, m in self._layers.items()}
        fractions = {name: self.target(name) for name in self._layers}
        prune(
            self.model,
            next(iter(fractions.values())) if self._scope == "global" else fractions,
            scope=self._scope,
            structure=self._structure,
            norm=self._norm,
            scores=scores,
            skip=self._skip,
        )
