"""Lottery tickets: sparse networks, found by training and pruning in rounds, that train well from first values."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from classical.checks import whole
from classical.pruning.magnitude import Scope, amount_of_each, check_fractions, prune
from classical.pruning.masks import Mask, masked, prunable


@dataclass(frozen=True)
class Ticket:
    """How far a search is: what its rounds return to, and what they have pruned.

    Attributes:
        round: rounds done.
        start: values of parameters and buffers to rewind to, by their names in the unpruned model.
        masks: for each pruned layer a bool tensor of its weight's shape, True where a weight is kept.
    """

    round: int
    start: Mapping[str, Tensor]
    masks: Mapping[str, Tensor]

    def tensors(self) -> dict[str, Tensor]:
        """All of it as named tensors, to be saved by safetensors or torch.save."""
        return (
            {"round": torch.tensor(self.round)}
            | {f"start.{name}": value for name, value in self.start.items()}
            | {f"mask.{name}": value for name, value in self.masks.items()}
        )

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Ticket:
        """Rebuild what `tensors` gave.

        Raises:
            ValueError: a name that belongs to no ticket, or no round.
        """
        parts: dict[str, dict[str, Tensor]] = {"start": {}, "mask": {}}
        for name, value in tensors.items():
            part, _, rest = name.partition(".")
            if part in parts:
                parts[part][rest] = value
            elif name != "round":
                raise ValueError(f"a ticket has tensors 'round', 'start.*' and 'mask.*', not {name!r}")
        if "round" not in tensors:
            raise ValueError("a ticket has a tensor 'round', the number of rounds done, but these tensors have none")
        return cls(int(tensors["round"]), parts["start"], parts["mask"])


def find_ticket(
    model: nn.Module,
    train: Callable[[nn.Module], object],
    *,
    final: float | Mapping[str, float],
    rounds: int,
    scope: Scope = "layer",
    skip: Collection[str] = (),
    warm_up: Callable[[nn.Module], object] | None = None,
    ticket: Ticket | None = None,
    on_round: Callable[[Ticket], object] | None = None,
) -> Ticket:
    """Train, prune the smallest weights, rewind the others to their first values; again and again.

    Each of n rounds keeps the share (1 - final)^(1/n) of the weights left. Afterwards the model holds the ticket: first
    values, masked, untrained. `train(model)` trains it, `finalize(model)` makes the masks permanent.

    Args:
        model: changed in place.
        train: trains the model in place, from scratch each time: a new optimizer, and seeds of its own if the search is
            to repeat.
        final: share of pruned weights in the end, 0 to below 1; a mapping from layer names prunes those only.
        rounds: n, from 1.
        scope: "layer" or "global" ranking.
        skip: names of layers that are not pruned (they are rewound).
        warm_up: trains to an early point, to which all rounds rewind instead of the very first values.
        ticket: goes on from here instead of beginning; the model's present values do not matter then.
        on_round: called with the state after the warm-up and after every round, to save it.

    Returns:
        The state after the last round.

    Raises:
        ValueError: an argument is out of range, or the ticket is not of this model.

    Source: Frankle, Carbin, arXiv:1803.03635, iterative pruning with resetting; rewinding to an early step: Frankle
        et al., arXiv:1903.01611.
    """
    if not callable(train):
        raise ValueError(f"train is {train!r} but must be a function that trains the model it is given")
    layers = prunable(model, skip)
    finals = amount_of_each(layers, final)
    check_fractions(finals, final, scope)
    if not whole(rounds, 1) or any(share >= 1 for share in finals.values()):
        raise ValueError(f"a search has 1 or more rounds and leaves some weights, but rounds={rounds!r}, final={final}")
    if ticket is None:
        if warm_up is not None:
            warm_up(model)
        start = {name: value.clone() for name, value in _values(model).items()}
        ticket = Ticket(0, start, {name: masked(layers[name]).keep.clone() for name in finals})
        if on_round is not None:
            on_round(ticket)
    pruned = {name: layers[name] for name in finals}
    _restore(model, pruned, ticket)
    for done in range(ticket.round + 1, rounds + 1):
        train(model)
        shares = {name: 1 - (1 - share) ** (done / rounds) for name, share in finals.items()}
        prune(model, next(iter(shares.values())) if scope == "global" else shares, scope=scope, skip=skip)
        ticket = Ticket(done, ticket.start, {name: masked(module).keep.clone() for name, module in pruned.items()})
        _restore(model, pruned, ticket)
        if on_round is not None:
            on_round(ticket)
    return ticket


def _values(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by their names without parametrizations; not the masks."""
    masks = {f"{name}.keep" for name, module in model.named_modules() if isinstance(module, Mask)}
    return {
        name.replace("parametrizations.weight.original", "weight"): value
        for name, value in model.state_dict().items()
        if isinstance(value, Tensor) and name not in masks
    }


def _restore(model: nn.Module, pruned: Mapping[str, nn.Module], ticket: Ticket) -> None:
    values = _values(model)
    shapes, saved = ({name: tuple(v.shape) for name, v in tensors.items()} for tensors in (values, ticket.start))
    if shapes != saved:
        name = next(name for name in {**saved, **shapes} if saved.get(name) != shapes.get(name))
        raise ValueError(
            f"the ticket is of another model: its {name!r} has shape {saved.get(name)}, the model's {shapes.get(name)}"
        )
    if set(ticket.masks) != set(pruned):
        raise ValueError(f"the ticket prunes {sorted(ticket.masks)} but this search prunes {sorted(pruned)}")
    for name, value in ticket.start.items():
        values[name].copy_(value)
    for name, module in pruned.items():
        masked(module).keep.copy_(ticket.masks[name])
