"""Lottery tickets: the search against a loop written out with numpy masks, interrupted searches, early rewinding."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from classical.pruning import Ticket, finalize, find_ticket, sparsity

NAMES = ("0", "4")


def sample(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def network(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = (nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 10))
        return nn.Sequential(*layers).to(dtype)


def train(model: nn.Module, steps: int = 5) -> None:
    """The same few steps each time, on made images."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model.train()
    dtype = next(model.parameters()).dtype
    for step in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(sample(10, 1, 6, 6, seed=step, dtype=dtype)), torch.arange(10)).backward()
        optimizer.step()


def by_hand(final: dict[str, float], rounds: int, dtype: torch.dtype, early: int = 0) -> tuple[nn.Sequential, Any]:
    """Round after round a new network from the first values, its pruned weights reset to zero after every step."""
    masks = {name: np.ones(network().get_submodule(name).weight.shape, dtype=bool) for name in final}
    start = network(dtype=dtype)
    if early:
        train(start, early)
    values = {name: value.clone() for name, value in start.state_dict().items()}
    for done in range(1, rounds + 1):
        model = network(seed=9, dtype=dtype)
        model.load_state_dict(values)
        hooks = []
        for name, mask in masks.items():
            weight = model.get_submodule(name).weight
            with torch.no_grad():
                weight[torch.tensor(~mask)] = 0
            hooks.append(weight.register_hook(lambda gradient, mask=mask: gradient * torch.tensor(mask)))
        train(model)
        for name, mask in masks.items():
            size = np.abs(model.get_submodule(name).weight.detach().numpy())
            size[~mask] = -1
            count = round((1 - (1 - final[name]) ** (done / rounds)) * mask.size)
            mask.flat[np.argsort(size, axis=None, kind="stable")[:count]] = False
    ticket = network(seed=9, dtype=dtype)
    ticket.load_state_dict(values)
    for name, mask in masks.items():
        with torch.no_grad():
            ticket.get_submodule(name).weight[torch.tensor(~mask)] = 0
    return ticket, masks


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("early", [0, 2])
def test_the_search_is_the_loop_written_out(early: int, dtype: torch.dtype) -> None:
    final = {"0": 0.5, "4": 0.9}
    model = network(dtype=dtype)
    warm_up: Callable[[nn.Module], object] | None = (lambda m: train(m, early)) if early else None
    ticket = find_ticket(model, train, final=final, rounds=3, warm_up=warm_up)
    expected, masks = by_hand(final, 3, dtype, early)
    assert ticket.round == 3
    for name in NAMES:
        assert np.array_equal(ticket.masks[name].numpy(), masks[name])
    shares = [row.nonzero / row.weights for row in sparsity(model).rows]
    assert shares == pytest.approx([0.5, 0.1], abs=1e-3)
    finalize(model)
    for name, value in expected.state_dict().items():  # normalization statistics are rewound too
        assert torch.equal(model.state_dict()[name], value)
    train(model)  # a ticket is a network like any other


def test_an_interrupted_search_goes_on_bit_for_bit(tmp_path: Path) -> None:
    whole, broken, other = network(), network(), network(seed=5)
    expected = find_ticket(whole, train, final=0.8, rounds=4, scope="global", skip=())
    rounds, calls = [], []

    def save(ticket: Ticket) -> None:
        rounds.append(ticket.round)
        save_file({name: value.contiguous() for name, value in ticket.tensors().items()}, tmp_path / "ticket")

    def fragile(model: nn.Module) -> None:
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(model)
        train(model)

    with pytest.raises(KeyboardInterrupt):
        find_ticket(broken, fragile, final=0.8, rounds=4, scope="global", on_round=save)
    assert rounds == [0, 1, 2]
    saved = Ticket.from_tensors(load_file(tmp_path / "ticket"))
    found = find_ticket(other, train, final=0.8, rounds=4, scope="global", ticket=saved, on_round=save)
    assert rounds == [0, 1, 2, 3, 4]
    for a, b in zip(whole.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    for name in NAMES:
        assert torch.equal(found.masks[name], expected.masks[name])
    again = find_ticket(network(seed=6), train, final=0.8, rounds=4, scope="global", ticket=found)
    assert again.round == 4


def test_skipped_layers_are_rewound_but_not_pruned() -> None:
    model = network()
    first = model[0].weight.detach().clone()
    ticket = find_ticket(model, train, final=0.5, rounds=2, skip=("0",))
    assert set(ticket.masks) == {"4"}
    assert torch.equal(model[0].weight, first)
    assert sparsity(model).rows[1].nonzero == 480


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"train": None}, "train is None but must be a function"),
        ({"rounds": 0}, "rounds=0"),
        ({"final": 1.0}, "leaves some weights"),
        ({"final": -0.1}, "must be from 0 to 1"),
        ({"final": {"5": 0.5}}, "no prunable layer '5'"),
        ({"final": {"0": 0.5}, "scope": "global"}, "give one fraction"),
    ],
)
def test_errors(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_ticket(network(), **{"train": train, "final": 0.5, "rounds": 2} | arguments)


def test_foreign_tickets_are_refused() -> None:
    ticket = find_ticket(network(), lambda model: None, final=0.5, rounds=1)
    other = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 5))
    with pytest.raises(ValueError, match=r"its '4.weight' has shape \(10, 96\), the model's \(5, 96\)"):
        find_ticket(other, train, final=0.5, rounds=2, ticket=ticket)
    with pytest.raises(ValueError, match=r"the ticket prunes \['0', '4'\] but this search prunes \['4'\]"):
        find_ticket(network(), train, final=0.5, rounds=2, skip=("0",), ticket=ticket)
    tensors = ticket.tensors()
    with pytest.raises(ValueError, match="not 'other'"):
        Ticket.from_tensors(tensors | {"other": torch.ones(1)})
    del tensors["round"]
    with pytest.raises(ValueError, match="these tensors have none"):
        Ticket.from_tensors(tensors)
