"""Parameterized structured pruning: gradients and both update rules against sums and loops written out."""

import copy
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from classical.pruning import (
    MagnitudePruner,
    StructureSGD,
    add_structures,
    finalize,
    prune,
    shrink,
    sparsity,
    structure_parameters,
)

DTYPES = (torch.float32, torch.float64)
STRUCTURES = ("weight", "filter", "channel", "column", "layer")


def sample(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def layer(groups: int = 1, dtype: torch.dtype = torch.float64) -> nn.Conv2d:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Conv2d(4, 6, (3, 2), groups=groups, dtype=dtype)


def owner(structure: str, groups: int, index: tuple[int, ...]) -> tuple[int, ...]:
    """Place of the structure that a weight (output, input of the group, row, column) belongs to."""
    output, channel, row, column = index
    group, inside = divmod(output, 6 // groups)
    return {
        "weight": (group, inside, channel, row, column),
        "filter": (group, inside, 0, 0, 0),
        "channel": (group, 0, channel, 0, 0),
        "column": (group, 0, channel, row, column),
        "layer": (0, 0, 0, 0, 0),
    }[structure]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_weights_and_gradients_are_the_published_ones(structure: Any, groups: int, dtype: torch.dtype) -> None:
    conv, epsilon = layer(groups, dtype), 0.4
    plain = layer(groups, dtype)
    model = nn.Sequential(conv)
    (v,) = add_structures(model, structure, epsilon=epsilon)
    with torch.no_grad():
        v.copy_(sample(*v.shape, seed=1, dtype=dtype))
        v.view(-1)[0] = -epsilon  # |v| = epsilon is kept
    x, toward = sample(3, 4, 7, 6, seed=2, dtype=dtype), sample(3, 6, 5, 5, seed=3, dtype=dtype)
    w = conv.parametrizations.weight.original
    (model(x) * toward).sum().backward()

    dense, latent, q = v.detach().double().numpy(), w.detach().double().numpy(), np.zeros(w.shape)
    alpha = np.where(abs(dense) >= epsilon, dense, 0.0)
    assert structure == "layer" or (alpha == 0).any()
    for index in itertools.product(*map(range, w.shape)):
        q[index] = latent[index] * alpha[owner(structure, groups, index)]
    np.testing.assert_allclose(conv.weight.detach().numpy(), q, rtol=1e-6)
    plain.weight = nn.Parameter(torch.tensor(q, dtype=dtype))
    (plain(x) * toward).sum().backward()
    assert plain.weight.grad is not None
    dq = plain.weight.grad.double().numpy()
    dv, dw = np.zeros(v.shape), np.zeros(w.shape)
    for index in itertools.product(*map(range, w.shape)):
        place = owner(structure, groups, index)
        dv[place] += latent[index] * dq[index]  # dE/dalpha_i, given to v_i, also where alpha_i is 0
        dw[index] = dq[index] * alpha[place]
    tolerance = {"rtol": 1e-4, "atol": 1e-3} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-12}
    np.testing.assert_allclose(v.grad.numpy(), dv, **tolerance)
    np.testing.assert_allclose(w.grad.numpy(), dw, **tolerance)


@pytest.mark.parametrize("rule", ["l2", "l1"])
def test_updates_are_the_published_rules(rule: Any) -> None:
    """E(v) = sum c q with w = 1 a structure, so that dE/dalpha = c, whatever v is."""
    c = [0.3, -0.2, 0.0, 0.05]
    linear = nn.Linear(1, 4, bias=False, dtype=torch.float64)
    nn.init.ones_(linear.weight)
    model = nn.Sequential(linear)
    (v,) = add_structures(model, "filter", epsilon=0.5)
    eta, mu, decay = 0.2, 0.8, 0.6
    optimizer = StructureSGD([v], eta, momentum=mu, decay=decay, rule=rule)
    expected, change, zero_seen = [1.0] * 4, [0.0] * 4, False
    for step in range(12):
        if step == 6:  # the learning rate is inside the momentum
            eta = optimizer.param_groups[0]["lr"] = 0.05
        optimizer.zero_grad()
        output = model(torch.ones(1, 1, dtype=torch.float64))
        alpha = [x if abs(x) >= 0.5 else 0.0 for x in expected]
        np.testing.assert_allclose(output.detach().numpy()[0], alpha, rtol=1e-12)
        zero_seen |= 0.0 in alpha
        (output * torch.tensor(c, dtype=torch.float64)).sum().backward()
        optimizer.step()
        for i in range(4):
            pull = expected[i] if rule == "l2" else math.copysign(1, expected[i]) if expected[i] else 0.0
            change[i] = mu * change[i] - eta * c[i] - decay * eta * pull
            expected[i] += change[i]
        np.testing.assert_allclose(v.detach().flatten().numpy(), expected, rtol=1e-12, atol=1e-14)
    assert zero_seen


def test_the_rule_with_weight_decay_is_torch_sgd_at_a_constant_rate() -> None:
    ours, theirs = (nn.Parameter(sample(5)) for _ in range(2))
    a = StructureSGD([ours], 0.1, momentum=0.9, decay=0.01)
    b = torch.optim.SGD([theirs], 0.1, momentum=0.9, weight_decay=0.01)
    for step in range(8):
        for parameter, optimizer in ((ours, a), (theirs, b)):
            optimizer.zero_grad()
            (parameter**4 * sample(5, seed=step)).sum().backward()
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_momentum_survives_a_state_dict() -> None:
    parameters = [nn.Parameter(sample(5)) for _ in range(2)]
    first, second = (StructureSGD([p], 0.1, rule="l1", decay=0.1) for p in parameters)
    for _ in range(3):
        parameters[0].grad = torch.ones(5, dtype=torch.float64)
        first.step()
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    with torch.no_grad():
        parameters[1].copy_(parameters[0])
    for parameter, optimizer in zip(parameters, (first, second), strict=True):
        parameter.grad = torch.ones(5, dtype=torch.float64)
        assert optimizer.step(lambda: 2.5) == 2.5
    assert torch.equal(*parameters)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scales_of_one_change_nothing_and_finalize_writes_them_in(dtype: torch.dtype) -> None:
    model = nn.Sequential(layer(dtype=dtype), nn.Flatten(), nn.Linear(150, 3, dtype=dtype))
    x = sample(2, 4, 7, 6, dtype=dtype)
    before = model(x)
    scales = add_structures(model, "column", skip=("2",))
    assert torch.equal(model(x), before)
    assert [s.shape for s in scales] == [(1, 1, 4, 3, 2)]
    assert [id(s) for s in structure_parameters(model)] == [id(s) for s in scales]
    with torch.no_grad():
        scales[0].copy_(sample(*scales[0].shape, dtype=dtype))
        scales[0][..., 0, 0] = 0.05
    after = model(x)
    assert sparsity(model).rows[0].nonzero == int((scales[0].abs() >= 0.1).sum()) * 6
    twin = finalize(copy.deepcopy(model))
    assert torch.equal(twin(x), after)
    assert type(twin[0]) is nn.Conv2d
    assert structure_parameters(twin) == []
    assert torch.equal(model(x), after)


def test_decay_prunes_what_the_loss_does_not_need_and_a_need_brings_it_back() -> None:
    x = sample(64, 3, seed=5)
    model = nn.Sequential(nn.Linear(3, 1, bias=False, dtype=torch.float64))
    nn.init.ones_(model[0].weight)
    (v,) = add_structures(model, "channel")
    model[0].parametrizations.weight.original.requires_grad_(False)
    optimizer = StructureSGD([v], 0.05, momentum=0.5, decay=0.2)

    def train(target: Tensor) -> list[bool]:
        for _ in range(200):
            optimizer.zero_grad()
            (model(x)[:, 0] - x @ target).square().mean().backward()
            optimizer.step()
        return (model[0].weight[0] != 0).tolist()

    assert train(torch.tensor([1.0, 0.0, 0.02], dtype=torch.float64)) == [True, False, False]
    assert train(torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)) == [True, True, False]


@pytest.mark.parametrize("rule", ["l1", "l2"])
@pytest.mark.parametrize(("lr", "decay", "momentum"), [(0.01, 0.1, 0.9), (0.03, 0.01, 0.5), (0.01, 0.05, 0.0)])
def test_a_scale_that_nothing_needs_is_pruned_when_the_page_says(
    rule: Any, lr: float, decay: float, momentum: float
) -> None:
    layer = nn.Linear(2, 2)
    (scale,) = add_structures(layer, "layer", epsilon=0.1)
    optimizer = StructureSGD([scale], lr, momentum=momentum, decay=decay, rule=rule)
    steps = 0
    while layer.weight.any():
        scale.grad = torch.zeros_like(scale)
        optimizer.step()
        steps += 1
    rate = lr * decay / (1 - momentum)
    if rule == "l1":  # the momentum takes momentum / (1 - momentum) steps to build up
        assert steps == pytest.approx(0.9 / rate + momentum / (1 - momentum), abs=1)
    else:  # it also lags behind a pull that falls with v
        assert steps == pytest.approx(math.log(10) / rate, rel=0.1)


def test_pruned_filters_shrink_and_masks_go_on_top() -> None:
    model = nn.Sequential(layer(), nn.ReLU(), nn.Flatten(), nn.Linear(150, 3, dtype=torch.float64))
    scale, _ = add_structures(model, "filter")
    with torch.no_grad():
        scale[0, 2] = scale[0, 4] = 0.0
    pruner = MagnitudePruner(model, final={"3": 0.5}, schedule=lambda step: 1.0)
    pruner.step()
    prune(model, {"0": 0.4})
    assert [row.nonzero for row in sparsity(model).rows] == [144 - round(0.4 * 144), 225]
    x = sample(2, 4, 7, 6)
    small = shrink(model, x)
    assert small[0].out_channels == 4
    torch.testing.assert_close(small(x), model(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"epsilon": 0.0}, "epsilon is 0.0 but must be above 0 and at most the initial scale 1.0"),
        ({"epsilon": 0.5, "initial": 0.3}, "at most the initial scale 0.3"),
        ({"structure": "row"}, "structure is 'row'"),
        ({"skip": ("1",)}, "no prunable layer '1'"),
    ],
)
def test_errors(arguments: dict[str, Any], message: str) -> None:
    model = nn.Sequential(layer())
    with pytest.raises(ValueError, match=message):
        add_structures(model, **arguments)
    assert type(model[0]) is nn.Conv2d


@pytest.mark.parametrize(
    "arguments", [{"lr": 0.0}, {"lr": 0.1, "momentum": 1.0}, {"lr": 0.1, "decay": -1.0}, {"lr": 0.1, "rule": "l0"}]
)
def test_optimizer_errors(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="but"):
        StructureSGD([nn.Parameter(torch.ones(2))], **arguments)
    model = nn.Sequential(layer())
    add_structures(model)
    with pytest.raises(ValueError, match="layer '0' has scales of its structures already"):
        add_structures(model)
